-- The journal of what providers sent: a row before the 2xx. Equal keys are one delivery. The body is sealed, and dropped
-- some time after the last item is done.
create table deliveries (
    id blob primary key,
    provider text not null,
    dedup_key text not null,
    state text not null check (state in ('queued', 'in_progress', 'waiting', 'done', 'failed')),
    reason text,
    epoch integer not null default 0,
    owner text,
    lease_until text,
    due_at text not null,
    attempts integer not null default 0,
    crashes integer not null default 0,
    received_at text not null,
    ended_at text,
    headers text not null,
    body blob,
    unique (provider, dedup_key)
) strict;
create index deliveries_due on deliveries (due_at) where state in ('queued', 'waiting');
create index deliveries_held on deliveries (id) where state = 'in_progress';
create index deliveries_ended on deliveries (ended_at) where body is not null;

-- What a delivery says, one row per notice and connection, and the run that acts on it.
create table delivery_items (
    delivery_id blob not null references deliveries (id) on delete cascade,
    n integer not null,
    account_id blob,
    connection_id blob references connections (id) on delete cascade,
    notice text not null,
    state text not null check (state in ('waiting', 'accepted', 'dropped')),
    run_id blob,
    primary key (delivery_id, n)
) strict;
create index delivery_items_connection on delivery_items (connection_id);

-- Our subscriptions at providers. The secret is sealed.
create table subscriptions (
    provider text not null,
    client_id text not null,
    external_id text not null,
    callback_url text not null,
    secret blob,
    created_at text not null,
    updated_at text not null,
    primary key (provider, client_id, external_id)
) strict;

-- When the provider last sent something about this connection.
alter table connections add column delivered_at text;
