-- What runs went through, in the words of the mirrored API; the rest of what an event says is in its run. A run passes each
-- point n at most once: 0 started, 1 reads workouts, 2 reads what comes around the clock, 3 ended. The events of a user are
-- numbered by seq without gaps, in the order of their commits: who has read up to a number missed nothing before it.
create table run_events (
    run_id uuid not null,
    n bigint not null,
    user_id uuid not null references users (id) on delete cascade,
    seq bigint not null,
    id uuid not null,
    at timestamptz not null,
    provider text not null,
    source text not null,
    stage text not null,
    status text not null,
    primary key (run_id, n)
);
create unique index run_events_user on run_events (user_id, seq);
create index run_events_at on run_events (at);
create index run_events_passing on run_events (at) where n < 3;
