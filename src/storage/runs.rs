use chrono::{DateTime, Utc};
use uuid::Uuid;

use sqlx::Connection as _;

use super::db::{accept, read, transaction, write};
use super::page::Fence;
use super::run_events::{RunEvent, Told, is_crossed, tell};
use super::{Db, Error, Result};
use crate::model::{Class, ConnectionId, RunId, RunReport, RunSource, RunState, Step, SyncStatus, UserId};

/// A run as it is kept.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct Run {
    /// Its id, the `task_id` on the wire.
    pub id: RunId,
    /// For which connection.
    pub connection_id: ConnectionId,
    /// Whose.
    pub user_id: UserId,
    /// Provider.
    pub provider: String,
    /// Number of its [`Class`].
    pub class: i64,
    /// Word of its [`RunSource`].
    pub source: String,
    /// JSON of the [`crate::model::SyncRequest`].
    pub request: String,
    /// Word of its [`RunState`].
    pub state: String,
    /// Why it waits, failed or was cancelled.
    pub reason: Option<String>,
    /// Raised by every claim.
    pub epoch: i64,
    /// When it is due.
    pub due_at: DateTime<Utc>,
    /// Failed attempts since the last committed page.
    pub attempts: i64,
    /// Claims that ended by a crash since the last committed page.
    pub crashes: i64,
    /// Pages committed.
    pub committed: i64,
    /// Somebody asked for it again while it ran.
    pub again: bool,
    /// It is to end at the next page boundary.
    pub cancel_requested: bool,
    /// JSON of the [`crate::model::Progress`].
    pub progress: Option<String>,
    /// JSON of the [`crate::model::RunReport`].
    pub report: Option<String>,
    /// What it waits on.
    pub waiting_on: Option<String>,
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// When it was first claimed.
    pub started_at: Option<DateTime<Utc>>,
    /// When it became final.
    pub ended_at: Option<DateTime<Utc>>,
}

impl Run {
    /// Its state.
    #[must_use]
    pub fn run_state(&self) -> RunState {
        RunState::parse(&self.state).unwrap_or(RunState::Failed)
    }

    /// Its class.
    #[must_use]
    pub fn run_class(&self) -> Class {
        Class::from_number(self.class)
    }
}

/// A run to accept.
#[derive(Clone, Debug)]
pub struct NewRun {
    /// For which connection; it must be active.
    pub connection: ConnectionId,
    /// How urgent.
    pub class: Class,
    /// Who asks.
    pub source: RunSource,
    /// JSON of the request.
    pub request: String,
    /// Digest of connection and request: equal keys are one run while it is not final.
    pub request_key: String,
}

/// What became of an accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// The run, new or found.
    pub id: RunId,
    /// Its class, the more urgent of both.
    pub class: Class,
    /// Whether it is new.
    pub is_new: bool,
}

/// A run in a worker's hands.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The run as claimed.
    pub run: Run,
    /// What every write has to show.
    pub fence: Fence,
    /// The account to read with.
    pub account_id: crate::model::AccountId,
    /// What is to be told of it: that it started, the first time.
    pub told: Option<RunEvent>,
}

/// How a claim ends.
#[derive(Clone, Debug, PartialEq)]
pub enum Settle {
    /// For good.
    Final {
        /// A final state.
        state: RunState,
        /// JSON of the report.
        report: String,
        /// Why, where it is not a success.
        reason: Option<String>,
    },
    /// Put back.
    Wait {
        /// When it is due again.
        due: DateTime<Utc>,
        /// In plain words.
        reason: String,
        /// The quota it waits on, where it is one.
        waiting_on: Option<String>,
        /// Its class from now on.
        class: Class,
        /// Whether this counts as a failed attempt.
        attempt: bool,
        /// JSON of the report so far.
        report: String,
    },
    /// Given back untouched: the process shuts down.
    Release {
        /// JSON of the report so far.
        report: String,
    },
}

/// Which runs to list.
#[derive(Clone, Debug, Default)]
pub struct RunFilter {
    /// Of this user.
    pub user: Option<UserId>,
    /// Of this provider.
    pub provider: Option<String>,
    /// In this state.
    pub state: Option<RunState>,
    /// Older than this run.
    pub before: Option<RunId>,
    /// At most so many.
    pub limit: i64,
}

const COLUMNS: &str =
    "id, connection_id, user_id, provider, class, source, request, state, reason, epoch, due_at, attempts,
    crashes, committed, again, cancel_requested, progress, report, waiting_on, created_at, started_at, ended_at";

/// Accepts a run: one statement, so that it is on disk or not there at all. An equal request that is not final is
/// answered instead; one that has begun is asked to look once more at the newest data before it settles. One that is to
/// be cancelled is nobody's answer.
pub(super) const INSERT: &str = "insert into runs
        (id, connection_id, user_id, provider, class, source, request, request_key, state, due_at, created_at)
    select $1, c.id, c.user_id, c.provider, $3, $4, $5, $6, 'queued', $7, $7
    from connections c join accounts a on a.id = c.account_id
    where c.id = $2 and c.status = 'active' and a.status = 'active'
    on conflict (request_key) where state in ('queued', 'waiting', 'in_progress') and not cancel_requested do update set
        class = case when excluded.class < runs.class then excluded.class else runs.class end,
        again = runs.again or runs.state = 'in_progress' or (runs.state = 'waiting' and runs.committed > 0),
        due_at = case when runs.state = 'in_progress' then runs.due_at else excluded.due_at end
    returning id, class, created_at";

impl Db {
    /// Accepts a run. `None`: the connection is not active (any more).
    ///
    /// # Errors
    /// When the database fails; then nothing was accepted.
    pub async fn insert_run(&self, new: NewRun, now: DateTime<Utc>) -> Result<Option<Accepted>> {
        let id = RunId::new();
        let row: Option<(RunId, i64, DateTime<Utc>)> = accept!(self, c => Ok::<_, Error>(sqlx::query_as(INSERT)
            .bind(id)
            .bind(new.connection)
            .bind(new.class.number())
            .bind(new.source.as_str())
            .bind(new.request)
            .bind(new.request_key)
            .bind(now)
            .fetch_optional(&mut *c)
            .await?))?;
        Ok(row.map(|(found, class, _)| Accepted { id: found, class: Class::from_number(class), is_new: found == id }))
    }

    /// Accepts a run under an idempotency key: the same key with the same request gives the same run for a day, with
    /// another request `Err` with the constraint `idempotency`.
    ///
    /// # Errors
    /// [`Error::Duplicate`] for another request under the same key.
    pub async fn insert_run_once(
        &self,
        new: NewRun,
        api_key: Uuid,
        key: &str,
        request_hash: &[u8],
        now: DateTime<Utc>,
    ) -> Result<Option<Accepted>> {
        let id = RunId::new();
        let expires = now + chrono::Duration::days(1);
        transaction!(self, t => {
            sqlx::query("delete from idempotency where expires_at <= $1").bind(now).execute(&mut *t).await?;
            // The key's row first: of two requests at once the second waits here for the first one's run.
            let fresh = sqlx::query("insert into idempotency (api_key_id, key, request_hash, run_id, expires_at)
                    values ($1, $2, $3, $4, $5) on conflict (api_key_id, key) do nothing")
                .bind(api_key).bind(key).bind(request_hash).bind(id).bind(expires)
                .execute(&mut *t).await?.rows_affected() > 0;
            if !fresh {
                let (hash, run): (Vec<u8>, RunId) =
                    sqlx::query_as("select request_hash, run_id from idempotency where api_key_id = $1 and key = $2")
                        .bind(api_key).bind(key).fetch_one(&mut *t).await?;
                if hash != request_hash {
                    return Err(Error::Duplicate { constraint: "idempotency".to_owned() });
                }
                return Ok(Some(Accepted { id: run, class: new.class, is_new: false }));
            }
            let row: Option<(RunId, i64, DateTime<Utc>)> = sqlx::query_as(INSERT)
                .bind(id)
                .bind(new.connection)
                .bind(new.class.number())
                .bind(new.source.as_str())
                .bind(new.request.as_str())
                .bind(new.request_key.as_str())
                .bind(now)
                .fetch_optional(&mut *t)
                .await?;
            match row {
                Some((found, class, _)) => {
                    if found != id {
                        sqlx::query("update idempotency set run_id = $3 where api_key_id = $1 and key = $2")
                            .bind(api_key).bind(key).bind(found).execute(&mut *t).await?;
                    }
                    Ok(Some(Accepted { id: found, class: Class::from_number(class), is_new: found == id }))
                }
                None => {
                    sqlx::query("delete from idempotency where api_key_id = $1 and key = $2")
                        .bind(api_key).bind(key).execute(&mut *t).await?;
                    Ok(None)
                }
            }
        })
    }

    /// Takes one run for a time: when it is due and nothing more urgent of its connection is, or when its holder's
    /// lease ran out. Every claim raises the epoch, so an earlier holder can write nothing more. The first one is an
    /// event.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn claim_run(
        &self,
        id: RunId,
        owner: &str,
        now: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> Result<Option<Claim>> {
        #[derive(sqlx::FromRow)]
        struct Row {
            #[sqlx(flatten)]
            run: Run,
        }
        let sql = format!(
            "update runs set
                crashes = case when state = 'in_progress' then crashes + 1 else crashes end,
                state = 'in_progress', owner = $2, lease_until = $4, epoch = epoch + 1, reason = null,
                waiting_on = null, started_at = coalesce(started_at, $3)
            where id = $1 and (
                (state in ('queued', 'waiting') and due_at <= $3 and not exists (
                    select 1 from runs o where o.connection_id = runs.connection_id and o.id <> runs.id and (
                        o.state = 'in_progress'
                        or (o.state in ('queued', 'waiting') and o.due_at <= $3
                            and (o.class, o.due_at, o.id) < (runs.class, runs.due_at, runs.id)))))
                or (state = 'in_progress' and lease_until < $3))
            returning {COLUMNS}"
        );
        let claimed = loop {
            let claimed: Result<Option<(Run, Option<RunEvent>)>> = async {
                let (sql, owner) = (sql.clone(), owner.to_owned());
                accept!(self, c => {
                    let mut t = c.begin().await?;
                    let row: Option<Row> = sqlx::query_as(&sql).bind(id).bind(owner).bind(now).bind(until)
                        .fetch_optional(&mut *t).await?;
                    let Some(Row { run }) = row else { return Ok(None) };
                    let mut event = None;
                    if run.epoch == 1 {
                        let status = SyncStatus::InProgress;
                        let told = Told { run: id, epoch: 1, step: Step::Started, status, of_webhook: status, at: now };
                        event = tell!(t, told).map(|row| RunEvent::of(&run, &told, row));
                    }
                    t.commit().await?;
                    Ok(Some((run, event)))
                })
            }
            .await;
            if !is_crossed(&claimed) {
                break claimed;
            }
        };
        let (run, told) = match claimed {
            Ok(Some(claimed)) => claimed,
            Ok(None) => return Ok(None),
            // Another run of this connection took the slot between the check and the write.
            Err(Error::Duplicate { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some(connection) = self.find_connection(run.connection_id).await? else { return Ok(None) };
        let fence =
            Fence { run: run.id, run_epoch: run.epoch, connection: connection.id, connection_epoch: connection.epoch };
        Ok(Some(Claim { run, fence, account_id: connection.account_id, told }))
    }

    /// Keeps a claimed run for longer. `None`: it is no longer ours. `Some(true)`: it is to be cancelled.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn renew_run(&self, fence: &Fence, until: DateTime<Utc>) -> Result<Option<bool>> {
        let sql = "update runs set lease_until = $3 where id = $1 and epoch = $2 and state = 'in_progress'
            returning cancel_requested";
        let (run, epoch) = (fence.run, fence.run_epoch);
        let row: Option<(bool,)> = accept!(self, c => Ok::<_, Error>(sqlx::query_as(sql)
            .bind(run).bind(epoch).bind(until).fetch_optional(&mut *c).await?))?;
        Ok(row.map(|(cancel,)| cancel))
    }

    /// Whether somebody asked for a claimed run again.
    ///
    /// # Errors
    /// [`Error::Fenced`] when the run is no longer ours.
    pub async fn is_wanted_again(&self, fence: &Fence) -> Result<bool> {
        let (run, epoch) = (fence.run, fence.run_epoch);
        let row: Option<(bool,)> = read!(self, p => sqlx::query_as(
                "select again from runs where id = $1 and epoch = $2 and state = 'in_progress'")
            .bind(run).bind(epoch).fetch_optional(p).await?);
        row.map(|(again,)| again).ok_or(Error::Fenced)
    }

    /// Takes the wish to look again, and notes in the run's report that it is to be done.
    ///
    /// # Errors
    /// [`Error::Fenced`] when the run is no longer ours.
    pub async fn take_again(&self, fence: &Fence, report: &str) -> Result<()> {
        let (run, epoch, report) = (fence.run, fence.run_epoch, report.to_owned());
        let sql = "update runs set again = false, report = $3 where id = $1 and epoch = $2 and state = 'in_progress'";
        let taken = accept!(self, c => Ok::<_, Error>(sqlx::query(sql).bind(run).bind(epoch).bind(report)
            .execute(&mut *c).await?.rows_affected()))?;
        if taken > 0 { Ok(()) } else { Err(Error::Fenced) }
    }

    /// Ends a claim. A final state is refused (`false`) while somebody wants another look: take it first. It is an event.
    ///
    /// # Errors
    /// [`Error::Fenced`] when the run is no longer ours.
    pub async fn settle_run(&self, fence: &Fence, settle: Settle, now: DateTime<Utc>) -> Result<bool> {
        let (run, epoch) = (fence.run, fence.run_epoch);
        let affected = match settle {
            Settle::Final { state, report, reason } => {
                let sql = "update runs set state = $3, report = $4, reason = $5, ended_at = $6, owner = null,
                        lease_until = null, waiting_on = null
                    where id = $1 and epoch = $2 and state = 'in_progress' and (again = false or $3 <> 'success')";
                let read: RunReport = serde_json::from_str(&report).unwrap_or_default();
                let skipped = state == RunState::Success && read.changed_nothing();
                let of_webhook = if skipped { SyncStatus::Skipped } else { state.into() };
                let told = Told { run, epoch, step: Step::Ended, status: state.into(), of_webhook, at: now };
                loop {
                    let (report, reason) = (report.clone(), reason.clone());
                    let settled: Result<u64> = async {
                        accept!(self, c => {
                            let mut t = c.begin().await?;
                            let affected = sqlx::query(sql).bind(run).bind(epoch).bind(state.as_str()).bind(report)
                                .bind(reason).bind(now).execute(&mut *t).await?.rows_affected();
                            if affected > 0 {
                                tell!(t, told);
                            }
                            t.commit().await?;
                            Ok(affected)
                        })
                    }
                    .await;
                    if !is_crossed(&settled) {
                        break settled?;
                    }
                }
            }
            Settle::Wait { due, reason, waiting_on, class, attempt, report } => {
                let sql = "update runs set state = 'waiting', due_at = $3, reason = $4, waiting_on = $5, class = $6,
                        attempts = attempts + $7, report = $8, owner = null, lease_until = null, put_back_at = $9
                    where id = $1 and epoch = $2 and state = 'in_progress'";
                accept!(self, c => Ok::<_, Error>(sqlx::query(sql).bind(run).bind(epoch).bind(due).bind(reason)
                    .bind(waiting_on).bind(class.number()).bind(i64::from(attempt)).bind(report)
                    .bind(now).execute(&mut *c).await?.rows_affected()))?
            }
            Settle::Release { report } => {
                let sql = "update runs set state = 'queued', due_at = $3, report = $4, owner = null, lease_until = null
                    where id = $1 and epoch = $2 and state = 'in_progress'";
                accept!(self, c => Ok::<_, Error>(sqlx::query(sql).bind(run).bind(epoch).bind(now).bind(report)
                    .execute(&mut *c).await?.rows_affected()))?
            }
        };
        if affected > 0 {
            return Ok(true);
        }
        let held: Option<(bool,)> = read!(self, p => sqlx::query_as("select again from runs where id = $1 and epoch = $2 and state = 'in_progress'")
                .bind(run).bind(epoch).fetch_optional(p).await?);
        if held.is_some() { Ok(false) } else { Err(Error::Fenced) }
    }

    /// Ends a run for everybody who holds its id: at once when nobody works on it (then it is an event), else at the next
    /// page boundary. `None`: there is no such run.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn cancel_run(&self, id: RunId, now: DateTime<Utc>) -> Result<Option<Run>> {
        let sql = format!(
            "update runs set
                ended_at = case when state in ('queued', 'waiting') then $2 else ended_at end,
                cancel_requested = case when state in ('queued', 'waiting', 'in_progress') then true else cancel_requested end,
                reason = case when state in ('queued', 'waiting') then 'cancelled on request' else reason end,
                state = case when state in ('queued', 'waiting') then 'cancelled' else state end
            where id = $1
            returning {COLUMNS}"
        );
        loop {
            let sql = sql.clone();
            let cancelled: Result<Option<Run>> = async {
                accept!(self, c => {
                    let mut t = c.begin().await?;
                    // Final runs stay as they are: the statement writes their own values back.
                    let run: Option<Run> = sqlx::query_as(&sql).bind(id).bind(now).fetch_optional(&mut *t).await?;
                    if let Some(run) = &run && run.run_state() == RunState::Cancelled && run.ended_at == Some(now) {
                        tell!(t, Told::cancelled(run.id, run.epoch, now));
                    }
                    t.commit().await?;
                    Ok(run)
                })
            }
            .await;
            if !is_crossed(&cancelled) {
                return cancelled;
            }
        }
    }

    /// A run by id.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_run(&self, id: RunId) -> Result<Option<Run>> {
        let sql = format!("select {COLUMNS} from runs where id = $1");
        Ok(read!(self, p => sqlx::query_as(&sql).bind(id).fetch_optional(p).await?))
    }

    /// Runs, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_runs(&self, filter: &RunFilter) -> Result<Vec<Run>> {
        Ok(read!(self, p => {
            let mut query = sqlx::QueryBuilder::new(format!("select {COLUMNS} from runs where true"));
            if let Some(user) = filter.user {
                query.push(" and user_id = ").push_bind(user);
            }
            if let Some(provider) = &filter.provider {
                query.push(" and provider = ").push_bind(provider.clone());
            }
            if let Some(state) = filter.state {
                query.push(" and state = ").push_bind(state.as_str());
            }
            if let Some(before) = filter.before {
                query.push(" and id < ").push_bind(before);
            }
            query.push(" order by id desc limit ").push_bind(filter.limit);
            query.build_query_as().fetch_all(p).await?
        }))
    }

    /// Runs that a worker could take now: due, or with a lease that ran out. At most `limit`, the most urgent first. Those
    /// that wait on a quota are left out: the schedule lets them go in turn.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_ready(&self, now: DateTime<Utc>, limit: i64) -> Result<Vec<(RunId, Class, DateTime<Utc>)>> {
        let sql = "select id, class, due_at from runs
            where (state in ('queued', 'waiting') and due_at <= $1 and waiting_on is null
                    and not exists (select 1 from runs o where o.connection_id = runs.connection_id
                        and o.state = 'in_progress' and o.lease_until >= $1))
                or (state = 'in_progress' and lease_until < $1)
            order by class, due_at, id limit $2";
        let rows: Vec<(RunId, i64, DateTime<Utc>)> =
            read!(self, p => sqlx::query_as(sql).bind(now).bind(limit).fetch_all(p).await?);
        Ok(rows.into_iter().map(|(id, class, due)| (id, Class::from_number(class), due)).collect())
    }

    /// The next run of a connection, whenever it is due: to be put on the ready list when the slot becomes free. Not one
    /// that waits on a quota.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_next_run(&self, connection: ConnectionId) -> Result<Option<(RunId, Class, DateTime<Utc>)>> {
        let sql = "select id, class, due_at from runs where connection_id = $1 and state in ('queued', 'waiting')
                and waiting_on is null
            order by class, due_at, id limit 1";
        let row: Option<(RunId, i64, DateTime<Utc>)> =
            read!(self, p => sqlx::query_as(sql).bind(connection).fetch_optional(p).await?);
        Ok(row.map(|(id, class, due)| (id, Class::from_number(class), due)))
    }

    /// The run of a connection that could be claimed before all its others, waiting on a quota or not.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_first_run(&self, connection: ConnectionId, now: DateTime<Utc>) -> Result<Option<RunId>> {
        let sql = "select id from runs where connection_id = $1
                and ((state in ('queued', 'waiting') and due_at <= $2) or (state = 'in_progress' and lease_until < $2))
            order by class, due_at, id limit 1";
        let row: Option<(RunId,)> =
            read!(self, p => sqlx::query_as(sql).bind(connection).bind(now).fetch_optional(p).await?);
        Ok(row.map(|(id,)| id))
    }

    /// Ends all leases: only for the one process that knows that no other works.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn free_leases(&self, now: DateTime<Utc>) -> Result<u64> {
        let before = now - chrono::Duration::milliseconds(1);
        // Refreshers are dead too; their name stays, because it tells that a token may have been lost with them.
        write!(self, p => sqlx::query("update accounts set refresh_until = $1 where refresh_until is not null")
            .bind(before).execute(p).await?.rows_affected());
        write!(self, p => sqlx::query("update export_leases set until_at = $1").bind(before).execute(p).await?.rows_affected());
        write!(self, p => sqlx::query("update deliveries set lease_until = $1 where state = 'in_progress'")
            .bind(before).execute(p).await?.rows_affected());
        Ok(write!(self, p => sqlx::query("update runs set lease_until = $1 where state = 'in_progress'")
            .bind(before).execute(p).await?.rows_affected()))
    }
}
