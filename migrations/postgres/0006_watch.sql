-- What a run went through, in the words of the mirrored API: for the event stream and the list of recent events.
create table run_events (
    run_id uuid not null,
    n bigint not null,
    id uuid not null unique,
    user_id uuid not null references users (id) on delete cascade,
    provider text not null,
    source text not null,
    stage text not null,
    status text not null,
    at timestamptz not null,
    event text not null,
    primary key (run_id, n)
);
create index run_events_user on run_events (user_id, id);
create index run_events_at on run_events (at);
