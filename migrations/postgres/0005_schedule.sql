-- When a connection is read without anybody asking: every so many seconds, or by a cron expression in the user's zone.
-- A row per connection that was ever active; next_at is when it is due, whoever claims it moves it.
create table schedules (
    connection_id uuid primary key references connections (id) on delete cascade,
    every_s bigint,
    cron text,
    enabled boolean not null default true,
    next_at timestamptz not null,
    last_at timestamptz,
    reconcile_at timestamptz not null,
    -- Set while a connection that used to be pushed is quiet: polling has taken over.
    quiet_since timestamptz,
    updated_at timestamptz not null,
    check (every_s is null or cron is null)
) with (fillfactor = 70);
create index schedules_next on schedules (next_at) where enabled;
create index schedules_reconcile on schedules (reconcile_at) where enabled;
