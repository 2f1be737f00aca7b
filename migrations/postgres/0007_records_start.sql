-- Without the kind: a planner that has no statistics yet took an index over (connection, kind, …) for as good as the unique
-- one over (connection, kind, external id), and looked through all records of a connection for each one.
drop index records_start;
create index records_start on records (connection_id, start_at);
