use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::db::{accept, read, write};
use super::runs::Run;
use super::{Bearer, Db, Error, Result};
use crate::model::{RunId, RunSource, Step, SyncStatus, UserId};

/// Something that a run went through, with what its run tells of it.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct RunEvent {
    /// Its place among the events of the user: without gaps, in the order of the commits.
    pub seq: i64,
    /// Its id.
    pub id: Uuid,
    /// The run.
    pub run_id: RunId,
    /// Number of its [`Step`].
    pub n: i64,
    /// Whose.
    pub user_id: UserId,
    /// Provider.
    pub provider: String,
    /// The mirrored API's word for who asked.
    pub source: String,
    /// The mirrored API's word for where the run is.
    pub stage: String,
    /// Word of a [`SyncStatus`].
    pub status: String,
    /// When.
    pub at: DateTime<Utc>,
    /// When the run was first claimed.
    pub started_at: Option<DateTime<Utc>>,
    /// JSON of the run's [`crate::model::SyncRequest`].
    pub request: String,
    /// JSON of the run's [`crate::model::RunReport`]; of the last event only.
    pub report: Option<String>,
    /// Why the run ended as it did; of the last event only.
    pub reason: Option<String>,
}

impl RunEvent {
    /// Which point of the run.
    #[must_use]
    pub fn step(&self) -> Step {
        Step::from_number(self.n)
    }
}

/// Whose runs to show, by their last events. Words that nothing has find nothing.
#[derive(Clone, Debug, Default)]
pub struct RunEventFilter {
    /// Of this user.
    pub user: Option<UserId>,
    /// Of this provider.
    pub provider: Option<String>,
    /// With this status.
    pub status: Option<String>,
    /// With this source.
    pub source: Option<String>,
    /// At most so many.
    pub limit: i64,
}

/// An event to write down.
#[derive(Clone, Copy, Debug)]
pub(super) struct Told {
    pub(super) run: RunId,
    pub(super) epoch: i64,
    pub(super) step: Step,
    pub(super) status: SyncStatus,
    /// What a delivery asked for ends with this status instead; it tells nothing before its end.
    pub(super) of_webhook: SyncStatus,
    pub(super) at: DateTime<Utc>,
}

impl Told {
    /// A run that nobody works on was cancelled.
    pub(super) fn cancelled(run: RunId, epoch: i64, at: DateTime<Utc>) -> Self {
        let status = SyncStatus::Cancelled;
        Self { run, epoch, step: Step::Ended, status, of_webhook: status, at }
    }
}

/// Writes an event down, once, and only for whoever holds the run. The number is the next one of the user: of two
/// transactions at once the second waits for the first, is refused, and tries again (see [`is_crossed`]). So numbers
/// become visible in their order.
pub(super) const TELL: &str =
    "insert into run_events (run_id, n, user_id, seq, id, at, provider, source, stage, status)
    select r.id, $3, r.user_id,
        coalesce((select max(e.seq) from run_events e where e.user_id = r.user_id), 0) + 1, $4, $5, r.provider,
        case r.source when 'schedule' then 'pull' else r.source end,
        case r.source when 'webhook' then $8 else $6 end, case r.source when 'webhook' then $9 else $7 end
    from runs r
    where r.id = $1 and r.epoch = $2 and ($3 = 3 or r.source <> 'webhook')
        and not exists (select 1 from run_events e where e.run_id = r.id and e.n = $3)
    returning seq, id";

/// Writes one event in a transaction; answers its number and id, or nothing where it is not to be written.
macro_rules! tell {
    ($t:expr, $told:expr) => {{
        let told: $crate::storage::run_events::Told = $told;
        let row: Option<(i64, uuid::Uuid)> = sqlx::query_as($crate::storage::run_events::TELL)
            .bind(told.run)
            .bind(told.epoch)
            .bind(told.step.number())
            .bind(uuid::Uuid::now_v7())
            .bind(told.at)
            .bind(told.step.stage(told.status))
            .bind(told.status.as_str())
            .bind(told.step.stage(told.of_webhook))
            .bind(told.of_webhook.as_str())
            .fetch_optional(&mut *$t)
            .await?;
        row
    }};
}
pub(super) use tell;

/// Another event of the user took the number: everything is undone, and the same again will do.
pub(super) fn is_crossed<T>(result: &Result<T>) -> bool {
    matches!(result, Err(Error::Duplicate { constraint }) if constraint.contains("run_events"))
}

const COLUMNS: &str =
    "e.seq, e.id, e.run_id, e.n, e.user_id, e.provider, e.source, e.stage, e.status, e.at, r.started_at,
    r.request, case when e.n = 3 then r.report end as report, case when e.n = 3 then r.reason end as reason
    from run_events e join runs r on r.id = e.run_id";

impl RunEvent {
    /// What was just written of a run.
    pub(super) fn of(run: &Run, told: &Told, (seq, id): (i64, Uuid)) -> Self {
        let ended = told.step == Step::Ended;
        let source = RunSource::ALL.into_iter().find(|source| source.as_str() == run.source);
        Self {
            seq,
            id,
            run_id: run.id,
            n: told.step.number(),
            user_id: run.user_id,
            provider: run.provider.clone(),
            source: source.map_or_else(|| run.source.clone(), |source| source.word().to_owned()),
            stage: told.step.stage(told.status).to_owned(),
            status: told.status.as_str().to_owned(),
            at: told.at,
            started_at: run.started_at,
            request: run.request.clone(),
            report: run.report.clone().filter(|_| ended),
            reason: run.reason.clone().filter(|_| ended),
        }
    }
}

impl Db {
    /// Notes that a claimed run begins with something. `None`: it was told before, the run is no longer ours, or a
    /// delivery asked for it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn insert_run_event(&self, run: &Run, step: Step, now: DateTime<Utc>) -> Result<Option<RunEvent>> {
        let status = SyncStatus::InProgress;
        let told = Told { run: run.id, epoch: run.epoch, step, status, of_webhook: status, at: now };
        loop {
            let written = async { accept!(self, c => Ok::<_, Error>(tell!(c, told))) }.await;
            if !is_crossed(&written) {
                return Ok(written?.map(|row| RunEvent::of(run, &told, row)));
            }
        }
    }

    /// The last thing that a run went through.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_last_run_event(&self, run: RunId) -> Result<Option<RunEvent>> {
        let sql = format!("select {COLUMNS} where e.run_id = $1 order by e.seq desc limit 1");
        Ok(read!(self, p => sqlx::query_as(&sql).bind(run).fetch_optional(p).await?))
    }

    /// Events of a user, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_run_events(&self, user: UserId, limit: i64) -> Result<Vec<RunEvent>> {
        let sql = format!("select {COLUMNS} where e.user_id = $1 order by e.seq desc limit $2");
        Ok(read!(self, p => sqlx::query_as(&sql).bind(user).bind(limit).fetch_all(p).await?))
    }

    /// Events of a user that came after this number, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_run_events_after(&self, user: UserId, seq: i64, limit: i64) -> Result<Vec<RunEvent>> {
        let sql = format!("select {COLUMNS} where e.user_id = $1 and e.seq > $2 order by e.seq limit $3");
        Ok(read!(self, p => sqlx::query_as(&sql).bind(user).bind(seq).bind(limit).fetch_all(p).await?))
    }

    /// The number of an event of a user, while it is kept.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_run_event_seq(&self, user: UserId, id: Uuid) -> Result<Option<i64>> {
        let sql = "select seq from run_events where user_id = $1 and id = $2";
        let row: Option<(i64,)> = read!(self, p => sqlx::query_as(sql).bind(user).bind(id).fetch_optional(p).await?);
        Ok(row.map(|(seq,)| seq))
    }

    /// The number of a user's newest event; 0 before the first one.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn newest_run_event_seq(&self, user: UserId) -> Result<i64> {
        let sql = "select coalesce(max(seq), 0) from run_events where user_id = $1";
        let (seq,): (i64,) = read!(self, p => sqlx::query_as(sql).bind(user).fetch_one(p).await?);
        Ok(seq)
    }

    /// The same for one who has listened for a while. `None`: the user is gone, or what was shown no longer works.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn newest_seq_for_listener(
        &self,
        user: UserId,
        bearer: Option<Bearer>,
        key_hash: Option<&[u8]>,
        now: DateTime<Utc>,
    ) -> Result<Option<i64>> {
        let sql = "select (select coalesce(max(seq), 0) from run_events where user_id = $1) from users u
            where u.id = $1 and (
                exists (select 1 from developers where id = $2 and password_changed_at <= $3)
                or exists (select 1 from api_keys where hash = $4 and revoked_at is null
                    and (expires_at is null or expires_at > $5) and (retires_at is null or retires_at > $5)))";
        let (developer, issued_at) = (bearer.map(|it| it.developer), bearer.map(|it| it.issued_at));
        let found: Option<(i64,)> = read!(self, p => sqlx::query_as(sql).bind(user).bind(developer).bind(issued_at)
            .bind(key_hash).bind(now).fetch_optional(p).await?);
        Ok(found.map(|(seq,)| seq))
    }

    /// The last event of each run, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_last_run_events(&self, filter: &RunEventFilter) -> Result<Vec<RunEvent>> {
        Ok(read!(self, p => {
            let mut query = sqlx::QueryBuilder::new(format!("select {COLUMNS}
                where not exists (select 1 from run_events l where l.run_id = e.run_id and l.seq > e.seq)"));
            if let Some(user) = filter.user {
                query.push(" and e.user_id = ").push_bind(user);
            }
            let words = [("provider", &filter.provider), ("status", &filter.status), ("source", &filter.source)];
            for (column, word) in words {
                if let Some(word) = word {
                    query.push(format!(" and e.{column} = ")).push_bind(word.clone());
                }
            }
            // A user's own numbers are the better order; over all users there are none.
            let order = if filter.user.is_some() { "e.seq" } else { "e.at desc, e.id" };
            query.push(format!(" order by {order} desc limit ")).push_bind(filter.limit);
            query.build_query_as().fetch_all(p).await?
        }))
    }

    /// Drops events that are older than `before`, or not among the newest `keep` of their user. The last one of a run
    /// stays while there is the run, and the last one of a user always: its number is where the next ones go on.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn drop_run_events(&self, before: DateTime<Utc>, keep: i64) -> Result<u64> {
        let passed = "delete from run_events where n < 3
                and (at < $1 or seq <= (select max(m.seq) from run_events m where m.user_id = run_events.user_id) - $2)
                and exists (select 1 from run_events l where l.run_id = run_events.run_id and l.seq > run_events.seq)";
        let orphans = "delete from run_events where at < $1
                and not exists (select 1 from runs r where r.id = run_events.run_id)
                and exists (select 1 from run_events l where l.user_id = run_events.user_id and l.seq > run_events.seq)";
        let passed = write!(self, p => sqlx::query(passed).bind(before).bind(keep).execute(p).await?.rows_affected());
        let orphans = write!(self, p => sqlx::query(orphans).bind(before).execute(p).await?.rows_affected());
        Ok(passed + orphans)
    }
}
