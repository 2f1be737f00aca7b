//! When connections are read without anybody asking. All that begins by the clock begins in [`Db::schedule_step`].

use chrono::{DateTime, Utc};
use sqlx::QueryBuilder;

use super::db::{accept, read, transaction, write};
use super::{Db, Result};
use crate::model::{Class, ConnectionId, RunId, RunSource, Schedule, UserId};

/// Due rows looked at in one step: those that begin, and those that only move on.
const BATCH: i64 = 500;
/// Sweeps looked at in one step.
const SWEEPS: i64 = 20;

/// The schedule of a connection.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct ScheduleRow {
    /// Its connection.
    pub connection_id: ConnectionId,
    /// Provider.
    pub provider: String,
    /// Its own interval, seconds.
    pub every_s: Option<i64>,
    /// Its own cron expression.
    pub cron: Option<String>,
    /// Whether it is read by the clock at all.
    pub enabled: bool,
    /// When it is due.
    pub next_at: DateTime<Utc>,
    /// When the clock last began to read it.
    pub last_at: Option<DateTime<Utc>>,
    /// When its daily sweep is due.
    pub reconcile_at: DateTime<Utc>,
    /// When its daily sweep last began.
    pub reconciled_at: Option<DateTime<Utc>>,
    /// When the provider last sent something, where that is too long ago.
    pub quiet_since: Option<DateTime<Utc>>,
    /// The user's zone.
    pub time_zone: String,
}

impl ScheduleRow {
    /// Its own schedule; `None`: it is read as the settings say.
    #[must_use]
    pub fn own(&self) -> Option<Schedule> {
        own(self.enabled, self.every_s, self.cron.as_deref())
    }
}

fn own(enabled: bool, every_s: Option<i64>, cron: Option<&str>) -> Option<Schedule> {
    match (enabled, every_s, cron) {
        (false, ..) => Some(Schedule::Off),
        (true, Some(seconds), _) => Some(Schedule::Every(seconds)),
        (true, None, Some(cron)) => Some(Schedule::Cron(cron.to_owned())),
        (true, None, None) => None,
    }
}

/// One provider's part of the clock's work.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Provider.
    pub provider: &'a str,
    /// Kind of the records that its lists are of.
    pub kind: &'a str,
    /// Now.
    pub now: DateTime<Utc>,
    /// Connections without a schedule of their own are not read by the clock.
    pub default_off: bool,
    /// The provider sends its news by itself when nobody says otherwise.
    pub default_pushed: bool,
    /// Beginnings of the quota's windows as they stand.
    pub windows: &'a [DateTime<Utc>],
}

/// Connections of a provider with runs of a class, as far as those use its quota soon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// With one at work, or due and free to be claimed.
    pub active: [u64; 4],
    /// With one that waits on the quota, whose window has opened.
    pub held: [u64; 4],
}

/// A connection whose time has come.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct Due {
    /// Which.
    pub connection_id: ConnectionId,
    /// Whose.
    pub user_id: UserId,
    /// Since when.
    pub due_at: DateTime<Utc>,
    /// See [`ScheduleRow`].
    pub every_s: Option<i64>,
    /// See [`ScheduleRow`].
    pub cron: Option<String>,
    /// The user's zone.
    pub time_zone: String,
    /// It is connected, and its grant is good.
    pub is_active: bool,
    /// The provider sends its news by itself: it is not to be asked.
    pub is_pushed: bool,
}

impl Due {
    /// Its own schedule; `None`: it is read as the settings say.
    #[must_use]
    pub fn own(&self) -> Option<Schedule> {
        own(true, self.every_s, self.cron.as_deref())
    }
}

/// A connection whose sweep is due.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct SweepDue {
    /// Which.
    pub connection_id: ConnectionId,
    /// Whose.
    pub user_id: UserId,
    /// Since when.
    pub due_at: DateTime<Utc>,
    /// Sweeps so far.
    pub reconcile_n: i64,
    /// It is connected, its grant is good, and everything was read once.
    pub is_active: bool,
    /// The sweep before is not over.
    pub is_busy: bool,
    /// Records that are stored.
    pub records: i64,
    /// Start of the oldest.
    pub oldest: Option<DateTime<Utc>>,
}

/// A run that the clock begins.
#[derive(Clone, Debug)]
pub struct ClockRun {
    /// How urgent.
    pub class: Class,
    /// JSON of the request.
    pub request: String,
    /// Digest of connection and request.
    pub request_key: String,
}

/// What becomes of a due row.
#[derive(Clone, Debug)]
pub struct Turn {
    /// Its connection.
    pub connection_id: ConnectionId,
    /// Whose.
    pub user_id: UserId,
    /// When it was due: a row that changed meanwhile does not move.
    pub due_at: DateTime<Utc>,
    /// When it is due again.
    pub next_at: DateTime<Utc>,
    /// What begins; nothing where it only moves on.
    pub runs: Vec<ClockRun>,
    /// Calls that this is thought to take.
    pub calls: i64,
}

/// Decides; called inside the transaction that does it, and so asked of one process at a time.
pub trait Clockwork: Sync {
    /// How many of the runs that wait on the quota go on now, by class; one per connection.
    fn release(&self, queue: &Queue) -> [u64; 4];
    /// Whether anything of a class may begin: else nobody looks what is due.
    fn may_begin(&self, queue: &Queue, class: Class) -> bool;
    /// What becomes of due rows, who has waited longest first; rows left out stay due. `queue` holds what was let go.
    fn begin(&self, queue: &Queue, due: &[Due]) -> Vec<Turn>;
    /// The same for sweeps. `spent`: calls of the sweeps that began in each window.
    fn sweep(&self, queue: &Queue, spent: &[u64], due: &[SweepDue]) -> Vec<Turn>;
}

/// What a step did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stepped {
    /// Runs that stopped waiting on the quota.
    pub released: Vec<(RunId, Class)>,
    /// Runs that began by the clock, or were there already and look once more.
    pub begun: Vec<(RunId, Class)>,
    /// Those of them that are new.
    pub new: Vec<(RunId, Class)>,
    /// There may be more that is due and could begin.
    pub more: bool,
}

/// Schedules of a provider, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScheduleCounts {
    /// Active connections that are read by the clock.
    pub on: i64,
    /// Of them: due for more than an hour.
    pub late: i64,
    /// Of them: the sweep is due for more than a day.
    pub sweep_late: i64,
    /// Of them: quiet.
    pub quiet: i64,
}

/// The first due time of a connection is now: whoever connects waits for the data. Its first sweep comes half a day or
/// more later (`$4`), so that those of connections made together do not come together.
pub(super) const INSERT_SCHEDULE: &str =
    "insert into schedules (connection_id, provider, next_at, reconcile_at, updated_at) values ($1, $2, $3, $4, $3)
    on conflict (connection_id) do update set next_at = excluded.next_at, quiet_since = null,
        updated_at = excluded.updated_at";

/// When the first sweep of a connection is due that was made now.
pub(super) fn first_sweep(now: DateTime<Utc>) -> DateTime<Utc> {
    now + chrono::Duration::seconds(rand::random_range(43_200..79_200))
}

/// Writes the runs of some turns down, and answers those to be worked on and those of them that are new. An equal run
/// that is not final is the one meant: one that was put back in the middle looks at the newest data first; one at work is
/// left to it.
macro_rules! begin {
    ($t:ident, $turns:expr, $step:expr) => {{
        let runs: Vec<(RunId, &Turn, &ClockRun)> = $turns
            .iter()
            .flat_map(|turn| turn.runs.iter().map(move |run| (RunId::new(), turn, run)))
            .collect();
        let mut begun: Vec<(RunId, Class)> = Vec::new();
        let mut new: Vec<(RunId, Class)> = Vec::new();
        if !runs.is_empty() {
            let mut query = QueryBuilder::new(
                "insert into runs (id, connection_id, user_id, provider, class, source, request, request_key, state,
                    due_at, created_at) ",
            );
            query.push_values(&runs, |mut row, (id, turn, run)| {
                row.push_bind(*id).push_bind(turn.connection_id).push_bind(turn.user_id).push_bind($step.provider)
                    .push_bind(run.class.number()).push_bind(RunSource::Schedule.as_str()).push_bind(run.request.as_str())
                    .push_bind(run.request_key.as_str()).push_bind("queued").push_bind($step.now).push_bind($step.now);
            });
            query.push(
                " on conflict (request_key) where state in ('queued', 'waiting', 'in_progress') and not cancel_requested
                do update set
                    again = runs.again or (runs.state = 'waiting' and runs.committed > 0),
                    class = case when runs.state <> 'in_progress' and excluded.class < runs.class then excluded.class
                        else runs.class end,
                    due_at = case when runs.state = 'in_progress' then runs.due_at else excluded.due_at end,
                    waiting_on = null
                returning id, class, state",
            );
            let rows: Vec<(RunId, i64, String)> =
                query.build_query_as().persistent(false).fetch_all(&mut *$t).await?;
            for (id, class, state) in rows {
                let class = Class::from_number(class);
                if state != "in_progress" {
                    begun.push((id, class));
                }
                if runs.iter().any(|(new, ..)| *new == id) {
                    new.push((id, class));
                }
            }
        }
        (begun, new)
    }};
}

impl Db {
    /// The schedule of a connection.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_schedule(&self, connection: ConnectionId) -> Result<Option<ScheduleRow>> {
        let sql =
            "select s.connection_id, s.provider, s.every_s, s.cron, s.enabled, s.next_at, s.last_at, s.reconcile_at,
                s.reconciled_at, s.quiet_since, u.time_zone
            from schedules s join connections c on c.id = s.connection_id join users u on u.id = c.user_id
            where s.connection_id = $1";
        Ok(read!(self, p => sqlx::query_as(sql).bind(connection).fetch_optional(p).await?))
    }

    /// Gives a connection a schedule of its own, or (`None`) that of the settings, and its next due time. `false`: there is
    /// no such connection.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn set_schedule(
        &self,
        connection: ConnectionId,
        own: Option<&Schedule>,
        next_at: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> Result<bool> {
        let (every_s, cron) = match own {
            Some(Schedule::Every(seconds)) => (Some(*seconds), None),
            Some(Schedule::Cron(text)) => (None, Some(text.clone())),
            Some(Schedule::Off) | None => (None, None),
        };
        let enabled = own != Some(&Schedule::Off);
        let sql = "insert into schedules
                (connection_id, provider, every_s, cron, enabled, next_at, reconcile_at, updated_at)
            select c.id, c.provider, $2, $3, $4, $5, $5, $6 from connections c where c.id = $1
            on conflict (connection_id) do update set every_s = excluded.every_s, cron = excluded.cron,
                enabled = excluded.enabled, next_at = excluded.next_at, updated_at = excluded.updated_at";
        accept!(self, c => Ok(sqlx::query(sql).bind(connection).bind(every_s).bind(cron).bind(enabled).bind(next_at)
            .bind(now).execute(&mut *c).await?.rows_affected() > 0))
    }

    /// Sets the zone in which a user's cron expressions are read.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn set_time_zone(&self, user: UserId, zone: &str) -> Result<()> {
        let zone = zone.to_owned();
        accept!(self, c => {
            sqlx::query("update users set time_zone = $2 where id = $1").bind(user).bind(zone).execute(&mut *c).await?;
            Ok(())
        })
    }

    /// Gives active connections a row that have none: a process of an earlier version connected them. They are due at
    /// once.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn add_missing_schedules(&self, now: DateTime<Utc>) -> Result<u64> {
        let sql = "insert into schedules (connection_id, provider, next_at, reconcile_at, updated_at)
            select c.id, c.provider, $1, $1, $1 from connections c
            where c.status = 'active' and not exists (select 1 from schedules s where s.connection_id = c.id)
            on conflict (connection_id) do nothing";
        Ok(write!(self, p => sqlx::query(sql).bind(now).execute(p).await?.rows_affected()))
    }

    /// What is due of a provider by the clock: connections, sweeps, runs that wait on its quota.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn is_anything_due(&self, provider: &str, default_off: bool, now: DateTime<Utc>) -> Result<bool> {
        let sql = "select exists (select 1 from schedules where enabled and provider = $1 and next_at <= $2
                and ($3 = false or every_s is not null or cron is not null))
            or exists (select 1 from schedules where enabled and provider = $1 and reconcile_at <= $2
                and ($3 = false or every_s is not null or cron is not null))
            or exists (select 1 from runs where provider = $1 and waiting_on is not null and state = 'waiting'
                and due_at <= $2)";
        let (due,): (bool,) = read!(self, p => sqlx::query_as(sql).bind(provider).bind(now).bind(default_off)
            .fetch_one(p).await?);
        Ok(due)
    }

    /// Lets waiting runs go on and begins what is due, as `clockwork` decides, in one transaction: the run is there and the
    /// due time has moved, or neither. `None`: another process is at it.
    ///
    /// # Errors
    /// When the database fails; then nothing began.
    pub async fn schedule_step(&self, step: &Step<'_>, clockwork: &dyn Clockwork) -> Result<Option<Stepped>> {
        let lock = match self {
            Self::Postgres(_) => "select pg_try_advisory_xact_lock(hashtextextended($1, 0))",
            // Its transaction is the only one that writes.
            Self::Sqlite(_) => "select $1 is not null",
        };
        let mut stepped = Stepped::default();
        // Begin, lock, count, commit.
        let mut sent = 4_u64;
        transaction!(self, t => {
            let (ours,): (bool,) = sqlx::query_as(lock).bind(format!("schedule {}", step.provider))
                .fetch_one(&mut *t).await?;
            if !ours {
                return Ok(None);
            }
            // A connection has one run at work at a time: the others behind it want no calls yet, be they a thousand.
            let rows: Vec<(i64, i64, i64)> = sqlx::query_as("select class,
                    count(distinct connection_id) filter (where waiting_on is null),
                    count(distinct connection_id) filter (where waiting_on is not null)
                from (select class, connection_id, waiting_on from runs
                        where provider = $1 and state in ('queued', 'waiting') and due_at <= $2
                    union all select class, connection_id, null from runs
                        where provider = $1 and state = 'in_progress') q
                group by class")
                .bind(step.provider).bind(step.now).fetch_all(&mut *t).await?;
            let mut queue = Queue::default();
            for (class, active, held) in rows {
                let class = Class::from_number(class) as usize;
                (queue.active[class], queue.held[class]) = (active.unsigned_abs(), held.unsigned_abs());
            }

            for (class, n) in Class::ALL.into_iter().zip(clockwork.release(&queue)) {
                if n == 0 {
                    continue;
                }
                // One run per connection, and so per user: a user has one connection at a provider.
                let rows: Vec<(RunId,)> = sqlx::query_as("update runs set waiting_on = null, due_at = $2
                    where state = 'waiting' and waiting_on is not null and id in (
                        select id from (
                            select id, put_back_at,
                                row_number() over (partition by connection_id order by due_at, id) as turn
                            from runs where provider = $1 and state = 'waiting' and waiting_on is not null
                                and due_at <= $2 and class = $3) held
                        where turn = 1 order by put_back_at, id limit $4)
                    returning id")
                    .bind(step.provider).bind(step.now).bind(class.number()).bind(i64::try_from(n).unwrap_or(i64::MAX))
                    .fetch_all(&mut *t).await?;
                queue.active[class as usize] += rows.len() as u64;
                sent += 1;
                stepped.released.extend(rows.into_iter().map(|(id,)| (id, class)));
            }

            if clockwork.may_begin(&queue, Class::Schedule) {
                let due: Vec<Due> = sqlx::query_as("select s.connection_id, c.user_id, s.next_at as due_at, s.every_s,
                        s.cron, u.time_zone, c.status = 'active' and a.status = 'active' as is_active,
                        (coalesce((select p.live_sync_mode = 'webhook' from provider_settings p
                            where p.provider = s.provider), $5)
                        and c.delivered_at is not null and s.quiet_since is null) as is_pushed
                    from schedules s join connections c on c.id = s.connection_id join accounts a on a.id = c.account_id
                        join users u on u.id = c.user_id
                    where s.enabled and s.provider = $1 and s.next_at <= $2
                        and ($3 = false or s.every_s is not null or s.cron is not null)
                    order by s.next_at, s.connection_id limit $4")
                    .bind(step.provider).bind(step.now).bind(step.default_off).bind(BATCH).bind(step.default_pushed)
                    .fetch_all(&mut *t).await?;
                sent += 1;
                let turns = clockwork.begin(&queue, &due);
                stepped.more = due.len() as i64 == BATCH && turns.len() == due.len();
                if !turns.is_empty() {
                    sent += 2;
                    let (begun, new) = begin!(t, &turns, step);
                    for (_, class) in &begun {
                        queue.active[*class as usize] += 1;
                    }
                    stepped.begun.extend(begun);
                    stepped.new.extend(new);
                    let mut query = QueryBuilder::new("update schedules set next_at = v.column2, last_at = case when v.column4 then ");
                    query.push_bind(step.now).push(" else last_at end from (");
                    query.push_values(&turns, |mut row, turn| {
                        row.push_bind(turn.connection_id).push_bind(turn.next_at).push_bind(turn.due_at)
                            .push_bind(!turn.runs.is_empty());
                    });
                    query.push(") as v where schedules.connection_id = v.column1 and schedules.next_at = v.column3");
                    query.build().persistent(false).execute(&mut *t).await?;
                }
            }

            if clockwork.may_begin(&queue, Class::Backfill) {
                let due: Vec<SweepDue> = sqlx::query_as("select s.connection_id, c.user_id, s.reconcile_at as due_at, s.reconcile_n,
                        c.status = 'active' and a.status = 'active' and c.last_success_at is not null as is_active,
                        exists (select 1 from runs o where o.connection_id = c.id and o.source = 'schedule' and o.class = 3
                            and o.state in ('queued', 'waiting', 'in_progress')) as is_busy,
                        (select count(*) from records r where r.connection_id = c.id and r.kind = $3
                            and r.deleted_at is null) as records,
                        (select min(r.start_at) from records r where r.connection_id = c.id and r.kind = $3) as oldest
                    from schedules s join connections c on c.id = s.connection_id join accounts a on a.id = c.account_id
                    where s.enabled and s.provider = $1 and s.reconcile_at <= $2
                        and ($4 = false or s.every_s is not null or s.cron is not null)
                    order by s.reconcile_at, s.connection_id limit $5")
                    .bind(step.provider).bind(step.now).bind(step.kind).bind(step.default_off).bind(SWEEPS)
                    .fetch_all(&mut *t).await?;
                sent += 1;
                if !due.is_empty() {
                    sent += step.windows.len() as u64;
                    let mut spent = Vec::new();
                    for since in step.windows {
                        let (calls,): (i64,) = sqlx::query_as("select cast(coalesce(sum(reconcile_calls), 0) as bigint)
                                from schedules where provider = $1 and reconciled_at >= $2")
                            .bind(step.provider).bind(since).fetch_one(&mut *t).await?;
                        spent.push(calls.unsigned_abs());
                    }
                    let turns = clockwork.sweep(&queue, &spent, &due);
                    if !turns.is_empty() {
                        sent += 2;
                        let (begun, new) = begin!(t, &turns, step);
                        stepped.begun.extend(begun);
                        stepped.new.extend(new);
                        let mut query = QueryBuilder::new("update schedules set reconcile_at = v.column2,
                            reconcile_n = reconcile_n + case when v.column5 then 1 else 0 end,
                            reconcile_calls = case when v.column5 then v.column4 else reconcile_calls end,
                            reconciled_at = case when v.column5 then ");
                        query.push_bind(step.now).push(" else reconciled_at end from (");
                        query.push_values(&turns, |mut row, turn| {
                            row.push_bind(turn.connection_id).push_bind(turn.next_at).push_bind(turn.due_at)
                                .push_bind(turn.calls).push_bind(!turn.runs.is_empty());
                        });
                        query.push(") as v where schedules.connection_id = v.column1 and schedules.reconcile_at = v.column3");
                        query.build().persistent(false).execute(&mut *t).await?;
                    }
                }
            }
        });
        self.count_sent(sent);
        Ok(Some(stepped))
    }

    /// How a provider's news come: `pull`, `webhook`; `None`: nobody has set it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_live_mode(&self, provider: &str) -> Result<Option<String>> {
        let sql = "select live_sync_mode from provider_settings where provider = $1";
        let row: Option<(Option<String>,)> =
            read!(self, p => sqlx::query_as(sql).bind(provider).fetch_optional(p).await?);
        Ok(row.and_then(|(mode,)| mode))
    }

    /// Notes which connections of a provider fell quiet (the last delivery came before `before`; they are due at once),
    /// and which are no longer. Answers both.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn note_silence(
        &self,
        provider: &str,
        before: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> Result<(Vec<ConnectionId>, Vec<ConnectionId>)> {
        let sql = "update schedules set next_at = $3, updated_at = $3,
                quiet_since = (select c.delivered_at from connections c where c.id = schedules.connection_id)
            where provider = $1 and quiet_since is null and exists (select 1 from connections c
                where c.id = schedules.connection_id and c.status = 'active' and c.delivered_at < $2)
            returning connection_id";
        let fell: Vec<(ConnectionId,)> =
            write!(self, p => sqlx::query_as(sql).bind(provider).bind(before).bind(now).fetch_all(p).await?);
        let sql = "update schedules set quiet_since = null, updated_at = $3
            where provider = $1 and quiet_since is not null and exists (select 1 from connections c
                where c.id = schedules.connection_id and (c.status <> 'active' or c.delivered_at >= $2))
            returning connection_id";
        let spoke: Vec<(ConnectionId,)> =
            write!(self, p => sqlx::query_as(sql).bind(provider).bind(before).bind(now).fetch_all(p).await?);
        let ids = |rows: Vec<(ConnectionId,)>| rows.into_iter().map(|(id,)| id).collect();
        Ok((ids(fell), ids(spoke)))
    }

    /// Nobody is quiet any more: the provider's news are asked for.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn forget_silence(&self, provider: &str) -> Result<()> {
        let sql = "update schedules set quiet_since = null where provider = $1 and quiet_since is not null";
        write!(self, p => sqlx::query(sql).bind(provider).execute(p).await?.rows_affected());
        Ok(())
    }

    /// The schedules of a provider, in numbers.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn count_schedules(
        &self,
        provider: &str,
        default_off: bool,
        now: DateTime<Utc>,
    ) -> Result<ScheduleCounts> {
        let sql = "select count(*) as on_, count(*) filter (where s.next_at < $2) as late,
                count(*) filter (where s.reconcile_at < $3) as sweep_late,
                count(*) filter (where s.quiet_since is not null) as quiet
            from schedules s join connections c on c.id = s.connection_id join accounts a on a.id = c.account_id
            where s.enabled and s.provider = $1 and c.status = 'active' and a.status = 'active'
                and ($4 = false or s.every_s is not null or s.cron is not null)";
        let (hour, day) = (now - chrono::Duration::hours(1), now - chrono::Duration::days(1));
        let row: (i64, i64, i64, i64) = read!(self, p => sqlx::query_as(sql).bind(provider).bind(hour).bind(day)
            .bind(default_off).fetch_one(p).await?);
        Ok(ScheduleCounts { on: row.0, late: row.1, sweep_late: row.2, quiet: row.3 })
    }
}
