-- When a connection is read without anybody asking: every so many seconds, by a cron expression in the user's zone, or
-- (neither of them) as the settings say. A row per connection that was ever active; next_at is when it is due, whoever
-- claims it moves it.
create table schedules (
    connection_id uuid primary key references connections (id) on delete cascade,
    provider text not null,
    every_s bigint,
    cron text,
    enabled boolean not null default true,
    next_at timestamptz not null,
    last_at timestamptz,
    -- The daily sweep: when it is due, how often and when it last began, how many calls that was thought to take.
    reconcile_at timestamptz not null,
    reconcile_n bigint not null default 0,
    reconciled_at timestamptz,
    reconcile_calls bigint not null default 0,
    -- Set while a connection that used to be pushed is quiet: polling has taken over.
    quiet_since timestamptz,
    updated_at timestamptz not null,
    check (every_s is null or cron is null)
) with (fillfactor = 70);
create index schedules_next on schedules (provider, next_at) where enabled;
create index schedules_reconcile on schedules (provider, reconcile_at) where enabled;
insert into schedules (connection_id, provider, next_at, reconcile_at, updated_at)
    select id, provider, created_at, created_at, created_at from connections where status = 'active';

-- A run that waits on a quota is held until it is its turn: whoever was put back first goes first.
alter table runs add column put_back_at timestamptz;
create index runs_held on runs (provider, class) where waiting_on is not null;
