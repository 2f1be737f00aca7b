-- Who runs this service, and what they let others do.

-- A token that was given out before password_changed_at no longer works.
create table developers (
    id blob primary key,
    email text not null unique,
    first_name text,
    last_name text,
    created_at text not null,
    updated_at text not null,
    password_changed_at text not null,
    password_hash text not null
) strict;

-- Keys made from the command line have no maker.
alter table api_keys add column created_by blob references developers (id) on delete set null;
-- Another key has taken this one's place; until then both work.
alter table api_keys add column retires_at text;

-- The secret of an application is shown once; its digest is kept.
create table applications (
    id blob primary key,
    app_id text not null unique,
    secret_hash blob not null,
    developer_id blob not null references developers (id) on delete cascade,
    name text not null,
    created_at text not null,
    updated_at text not null
) strict;
create index applications_developer on applications (developer_id);

-- Single use: whoever shows one gets the next one, and this row is gone. app_id: on whose word a user's token was given.
create table refresh_tokens (
    hash blob primary key,
    developer_id blob references developers (id) on delete cascade,
    user_id blob references users (id) on delete cascade,
    created_at text not null,
    app_id text,
    check ((developer_id is null) <> (user_id is null))
) strict;
create index refresh_tokens_developer on refresh_tokens (developer_id) where developer_id is not null;
create index refresh_tokens_user on refresh_tokens (user_id) where user_id is not null;

-- A provider without a row is as its table of data says.
create table provider_settings (
    provider text primary key,
    is_enabled integer not null,
    live_sync_mode text check (live_sync_mode in ('pull', 'webhook')),
    data_granularity text not null check (data_granularity in ('raw', 'hourly', 'daily')),
    updated_at text not null
) strict;
