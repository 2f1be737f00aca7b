-- When a connection is read without anybody asking: every so many seconds, or by a cron expression in the user's zone.
-- A row per connection that was ever active; next_at is when it is due, whoever claims it moves it.
create table schedules (
    connection_id blob primary key references connections (id) on delete cascade,
    every_s integer,
    cron text,
    enabled integer not null default 1,
    next_at text not null,
    last_at text,
    reconcile_at text not null,
    -- Set while a connection that used to be pushed is quiet: polling has taken over.
    quiet_since text,
    updated_at text not null,
    check (every_s is null or cron is null)
) strict;
create index schedules_next on schedules (next_at) where enabled;
create index schedules_reconcile on schedules (reconcile_at) where enabled;
