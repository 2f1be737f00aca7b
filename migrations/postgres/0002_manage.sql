-- Who runs this service, and what they let others do.

-- A token that was given out before password_changed_at no longer works.
create table developers (
    id uuid primary key,
    email text not null unique,
    first_name text,
    last_name text,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    password_changed_at timestamptz not null,
    password_hash text not null
);

-- Keys made from the command line have no maker.
alter table api_keys add column created_by uuid references developers (id) on delete set null;
-- Another key has taken this one's place; until then both work.
alter table api_keys add column retires_at timestamptz;

-- The secret of an application is shown once; its digest is kept.
create table applications (
    id uuid primary key,
    app_id text not null unique,
    secret_hash bytea not null,
    developer_id uuid not null references developers (id) on delete cascade,
    name text not null,
    created_at timestamptz not null,
    updated_at timestamptz not null
);
create index applications_developer on applications (developer_id);

-- Single use: whoever shows one gets the next one, and this row is gone. app_id: on whose word a user's token was given.
create table refresh_tokens (
    hash bytea primary key,
    developer_id uuid references developers (id) on delete cascade,
    user_id uuid references users (id) on delete cascade,
    created_at timestamptz not null,
    app_id text,
    check ((developer_id is null) <> (user_id is null))
);
create index refresh_tokens_developer on refresh_tokens (developer_id) where developer_id is not null;
create index refresh_tokens_user on refresh_tokens (user_id) where user_id is not null;

-- A provider without a row is as its table of data says.
create table provider_settings (
    provider text primary key,
    is_enabled boolean not null,
    live_sync_mode text check (live_sync_mode in ('pull', 'webhook')),
    data_granularity text not null check (data_granularity in ('raw', 'hourly', 'daily')),
    updated_at timestamptz not null
);
