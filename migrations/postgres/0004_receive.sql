-- The journal of what providers sent: a row before the 2xx. Equal keys are one delivery. The body is sealed, and dropped
-- some time after the last item is done.
create table deliveries (
    id uuid primary key,
    provider text not null,
    dedup_key text not null,
    state text not null check (state in ('queued', 'in_progress', 'waiting', 'done', 'failed')),
    reason text,
    epoch bigint not null default 0,
    owner text,
    lease_until timestamptz,
    due_at timestamptz not null,
    attempts bigint not null default 0,
    crashes bigint not null default 0,
    received_at timestamptz not null,
    ended_at timestamptz,
    headers text not null,
    body bytea,
    unique (provider, dedup_key)
) with (fillfactor = 70);
create index deliveries_due on deliveries (due_at) where state in ('queued', 'waiting');
create index deliveries_held on deliveries (id) where state = 'in_progress';
create index deliveries_ended on deliveries (ended_at) where body is not null;

-- What a delivery says, one row per notice and connection, and the run that acts on it.
create table delivery_items (
    delivery_id uuid not null references deliveries (id) on delete cascade,
    n bigint not null,
    account_id uuid,
    connection_id uuid references connections (id) on delete cascade,
    notice text not null,
    state text not null check (state in ('waiting', 'accepted', 'dropped')),
    run_id uuid,
    primary key (delivery_id, n)
);
create index delivery_items_connection on delivery_items (connection_id);

-- Our subscriptions at providers. The secret is sealed.
create table subscriptions (
    provider text not null,
    client_id text not null,
    external_id text not null,
    callback_url text not null,
    secret bytea,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    primary key (provider, client_id, external_id)
);

-- When the provider last sent something about this connection.
alter table connections add column delivered_at timestamptz;
