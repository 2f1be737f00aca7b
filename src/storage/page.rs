//! The one transaction that moves anything: a page of provider data with the position it moves.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::Ordering;

use chrono::{DateTime, Utc};
use sqlx::QueryBuilder;

use super::db::{BULK, PushIn, is_kept, read, transaction};
use super::insert::{Column, Insert, Write};
use super::{Db, Error, Result};
use crate::model::{
    Chunk, ConnectionId, Details, Kind, PartId, PartName, PartState, Purpose, Record, RecordId, RunId, Source, Wanted,
    Window,
};

/// What every write has to show: it is refused when any of it is no longer true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fence {
    /// The run.
    pub run: RunId,
    /// Its epoch when it was claimed.
    pub run_epoch: i64,
    /// Its connection.
    pub connection: ConnectionId,
    /// The connection's epoch when the run was claimed.
    pub connection_epoch: i64,
}

/// What is stored of the records of a page, read before the page is prepared.
#[derive(Clone, Debug, Default)]
pub struct PageState {
    /// The connection's count of committed pages: when it moved, all of this is old.
    pub page_seq: i64,
    /// By kind and external id.
    pub records: HashMap<(Kind, String), RecordRow>,
    /// Current parts by kind, external id and part.
    pub parts: HashMap<(Kind, String, String), PartRow>,
}

/// A stored record, as far as a page needs it.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordRow {
    /// Its id.
    pub id: RecordId,
    /// Digest of its content.
    pub hash: Vec<u8>,
    /// Digest of what its big parts depend on.
    pub shape: i64,
    /// How often it changed.
    pub revision: i64,
    /// Its file stem.
    pub stem: Option<String>,
    /// Whether it is deleted.
    pub deleted: bool,
    /// When it was first stored.
    pub stored_at: DateTime<Utc>,
}

/// A current part, without its body.
#[derive(Clone, Debug, PartialEq)]
pub struct PartRow {
    /// Its id.
    pub id: PartId,
    /// Where it stands.
    pub state: PartState,
    /// Digest of its content without what is volatile.
    pub hash: Option<Vec<u8>>,
    /// Counts the versions of this answer.
    pub version: i64,
    /// Failed attempts.
    pub attempts: i64,
    /// Whether a body is stored (a part may be wanted again while its old body serves).
    pub has_body: bool,
}

/// A new version of an answer.
#[derive(Clone, Debug)]
pub struct NewPart {
    /// Its id.
    pub id: PartId,
    /// Kind of its record.
    pub kind: Kind,
    /// The provider's id of its record.
    pub external_id: String,
    /// Which answer.
    pub part: PartName,
    /// Counts the versions.
    pub version: i64,
    /// `Stored`, `Unreadable`.
    pub state: PartState,
    /// Place of its record on the stream's axis.
    pub order_at: DateTime<Utc>,
    /// zstd of the bytes received.
    pub body: Vec<u8>,
    /// Bytes received.
    pub body_size: i64,
    /// Digest of its content without what is volatile.
    pub hash: Vec<u8>,
    /// Version of the formulas its file is computed with.
    pub formula: i64,
    /// Whether a file is to be written.
    pub export_due: bool,
    /// The row that it takes the place of: kept as an earlier version when it has a body that files were made of.
    pub replaces: Option<(PartId, bool)>,
    /// Why it cannot be read, if it cannot.
    pub last_error: Option<String>,
}

/// A change of a part's state without a new body.
#[derive(Clone, Debug, PartialEq)]
pub struct PartFix {
    /// Which part.
    pub id: PartId,
    /// The new state.
    pub state: PartState,
    /// Failed attempts.
    pub attempts: i64,
    /// When it is due.
    pub due_at: DateTime<Utc>,
    /// Why, where something went wrong.
    pub last_error: Option<String>,
}

/// An answer that a further call must bring.
#[derive(Clone, Debug, PartialEq)]
pub struct WantedWrite {
    /// Which.
    pub wanted: Wanted,
    /// Place of its record on the stream's axis.
    pub order_at: DateTime<Utc>,
}

/// A record as it is to be from now on.
#[derive(Clone, Debug)]
pub struct RecordWrite {
    /// Its id, new or known.
    pub id: RecordId,
    /// Nothing is stored of it: there is no conflict to look for.
    pub is_new: bool,
    /// Its content.
    pub record: Record,
    /// Digest of the content.
    pub hash: Vec<u8>,
    /// See [`RecordRow`].
    pub shape: i64,
    /// How often it changed.
    pub revision: i64,
    /// Not final yet.
    pub provisional: bool,
    /// Its file stem; the first one stays.
    pub stem: String,
    /// When it was first stored.
    pub stored_at: DateTime<Utc>,
}

/// The whole set of chunks of one record.
#[derive(Clone, Debug)]
pub struct ChunkWrite {
    /// The record.
    pub record: RecordId,
    /// Its data source, to be found among the page's records.
    pub source: Source,
    /// Whether the record is new: then there is nothing to compare with.
    pub is_new: bool,
    /// The chunks, with their digests.
    pub chunks: Vec<(Chunk, Vec<u8>)>,
}

/// How the page moves its window.
#[derive(Clone, Debug, PartialEq)]
pub struct WindowMove {
    /// The window as it was when the page was asked for.
    pub window: Window,
    /// Its stream.
    pub stream: &'static str,
    /// The place after this page; `None`: the window is done.
    pub position: Option<serde_json::Value>,
    /// A done `reread` window proves this much coverage (`None`: nothing).
    pub proves: Option<(i64, i64)>,
}

/// Everything one page changes.
#[derive(Clone, Debug, Default)]
pub struct PageWrite {
    /// From [`PageState`].
    pub page_seq: i64,
    /// New versions of answers.
    pub parts: Vec<NewPart>,
    /// Changes of state.
    pub fixes: Vec<PartFix>,
    /// Answers asked for again; their old bodies serve until the new ones come.
    pub again: Vec<PartId>,
    /// Parts that have done their work and go (`presence`).
    pub dropped: Vec<PartId>,
    /// Answers not asked for before.
    pub wanted: Vec<WantedWrite>,
    /// Records.
    pub records: Vec<RecordWrite>,
    /// Samples.
    pub chunks: Vec<ChunkWrite>,
    /// Records found deleted: kept, marked, without samples.
    pub deleted: Vec<RecordId>,
    /// The window it moves.
    pub window: Option<WindowMove>,
    /// JSON of the progress.
    pub progress: Option<String>,
    /// JSON of the report so far: a claim after a crash goes on from it.
    pub report: Option<String>,
}

/// What the worker has to know at a page boundary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Boundary {
    /// Somebody ended the run.
    pub cancel: bool,
    /// A more urgent run of this connection is due.
    pub give_way: bool,
    /// Chunks written.
    pub chunks_written: u64,
}

type ChunkKey = (i64, bool, i64);

const RECORD_COLUMNS: &str = "id, kind, external_id, hash, shape, revision, stem, deleted_at, stored_at";
const PART_COLUMNS: &str = "id, kind, external_id, part, state, hash, version, attempts, body is not null as has_body";

/// What becomes of a record that is stored already.
const RECORD_AGAIN: &str = "on conflict (connection_id, kind, external_id) do update set
    data_source_id = excluded.data_source_id, type = excluded.type, title = excluded.title,
    start_at = excluded.start_at, end_at = excluded.end_at, utc_offset_s = excluded.utc_offset_s,
    zone = excluded.zone, local_day = excluded.local_day, hash = excluded.hash,
    shape = excluded.shape, revision = excluded.revision, provisional = excluded.provisional,
    source_updated_at = excluded.source_updated_at, deleted_at = null";
/// The same, of a workout.
const WORKOUT_AGAIN: &str =
    "on conflict (record_id) do update set type = excluded.type, elapsed_s = excluded.elapsed_s,
    moving_s = excluded.moving_s, distance_m = excluded.distance_m, ascent_m = excluded.ascent_m,
    elevation_high_m = excluded.elevation_high_m, elevation_low_m = excluded.elevation_low_m,
    average_speed_m_per_s = excluded.average_speed_m_per_s,
    max_speed_m_per_s = excluded.max_speed_m_per_s,
    average_heart_rate_bpm = excluded.average_heart_rate_bpm,
    max_heart_rate_bpm = excluded.max_heart_rate_bpm,
    average_cadence_per_min = excluded.average_cadence_per_min,
    average_power_w = excluded.average_power_w, max_power_w = excluded.max_power_w,
    weighted_power_w = excluded.weighted_power_w, power_measured = excluded.power_measured,
    work_kj = excluded.work_kj, energy_kcal = excluded.energy_kcal,
    energy_estimated = excluded.energy_estimated,
    average_temperature_c = excluded.average_temperature_c,
    start_latitude_deg = excluded.start_latitude_deg,
    start_longitude_deg = excluded.start_longitude_deg, gear_id = excluded.gear_id,
    manual = excluded.manual, laps = excluded.laps, heart_rate_zones = excluded.heart_rate_zones,
    power_zones = excluded.power_zones, pace_zones = excluded.pace_zones";

impl Db {
    /// Reads what is stored of these records.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn load_page_state(&self, connection: ConnectionId, ids: &BTreeSet<(Kind, String)>) -> Result<PageState> {
        #[derive(sqlx::FromRow)]
        struct Rec {
            id: RecordId,
            kind: String,
            external_id: String,
            hash: Vec<u8>,
            shape: i64,
            revision: i64,
            stem: Option<String>,
            deleted_at: Option<DateTime<Utc>>,
            stored_at: DateTime<Utc>,
        }
        #[derive(sqlx::FromRow)]
        struct Part {
            id: PartId,
            kind: String,
            external_id: String,
            part: String,
            state: String,
            hash: Option<Vec<u8>>,
            version: i64,
            attempts: i64,
            has_body: bool,
        }
        // The count first: a page that commits between these reads moves it, and the commit notices.
        let seq: Option<(i64,)> = read!(self, p => sqlx::query_as("select page_seq from connections where id = $1")
            .bind(connection).fetch_optional(p).await?);
        let Some((page_seq,)) = seq else { return Err(Error::Fenced) };
        let mut state = PageState { page_seq, ..PageState::default() };
        if ids.is_empty() {
            return Ok(state);
        }
        let (records, parts): (Vec<Rec>, Vec<Part>) = match self {
            Self::Postgres(db) => {
                db.statements.fetch_add(2, Ordering::Relaxed);
                // One look-up in the index for each key: a planner that knows nothing of a new connection would take all
                // of its records for a handful, and read them all for each page.
                let (kinds, names): (Vec<&str>, Vec<&str>) =
                    ids.iter().map(|(kind, id)| (kind.as_str(), id.as_str())).unzip();
                let by_key = |columns: &str, table: &str, more: &str| {
                    format!(
                        "select f.* from unnest($2::text[], $3::text[]) as k (kind, external_id) cross join lateral
                        (select {columns} from {table} where connection_id = $1 and kind = k.kind
                            and external_id = k.external_id {more} limit 100) f"
                    )
                };
                let sql = by_key(RECORD_COLUMNS, "records", "");
                let records =
                    sqlx::query_as(&sql).bind(connection).bind(&kinds).bind(&names).fetch_all(&db.pool).await?;
                let sql = by_key(PART_COLUMNS, "parts", "and superseded_at is null");
                let parts = sqlx::query_as(&sql).bind(connection).bind(&kinds).bind(&names).fetch_all(&db.pool).await?;
                (records, parts)
            }
            Self::Sqlite(db) => {
                db.statements.fetch_add(2, Ordering::Relaxed);
                let mut by_kind: BTreeMap<Kind, Vec<&str>> = BTreeMap::new();
                for (kind, id) in ids {
                    by_kind.entry(*kind).or_default().push(id.as_str());
                }
                let (mut records, mut parts) = (Vec::new(), Vec::new());
                for (kind, names) in by_kind {
                    let by_key = |columns: &str, table: &str, more: &str| {
                        let mut query =
                            QueryBuilder::new(format!("select {columns} from {table} where connection_id = "));
                        query
                            .push_bind(connection)
                            .push(" and kind = ")
                            .push_bind(kind.as_str())
                            .push(" and external_id");
                        let kept = query.push_in(names.clone());
                        query.push(more);
                        (query, kept)
                    };
                    let (mut query, kept) = by_key(RECORD_COLUMNS, "records", "");
                    records.extend(query.build_query_as().persistent(kept).fetch_all(&db.read).await?);
                    let (mut query, kept) = by_key(PART_COLUMNS, "parts", " and superseded_at is null");
                    parts.extend(query.build_query_as().persistent(kept).fetch_all(&db.read).await?);
                }
                (records, parts)
            }
        };
        for row in records {
            let Some(kind) = Kind::parse(&row.kind) else { continue };
            state.records.insert(
                (kind, row.external_id),
                RecordRow {
                    id: row.id,
                    hash: row.hash,
                    shape: row.shape,
                    revision: row.revision,
                    stem: row.stem,
                    deleted: row.deleted_at.is_some(),
                    stored_at: row.stored_at,
                },
            );
        }
        for row in parts {
            let (Some(kind), Some(part_state)) = (Kind::parse(&row.kind), PartState::parse(&row.state)) else {
                continue;
            };
            state.parts.insert(
                (kind, row.external_id, row.part),
                PartRow {
                    id: row.id,
                    state: part_state,
                    hash: row.hash,
                    version: row.version,
                    attempts: row.attempts,
                    has_body: row.has_body,
                },
            );
        }
        Ok(state)
    }

    /// Commits a page: all of it, or nothing.
    ///
    /// # Errors
    /// [`Error::Fenced`] when the run or its connection is no longer what the fence says; [`Error::Stale`] when another
    /// page of this connection was committed since [`Db::load_page_state`]: prepare again.
    pub async fn commit_page(
        &self,
        fence: &Fence,
        page: &PageWrite,
        now: DateTime<Utc>,
        lease_until: DateTime<Utc>,
    ) -> Result<Boundary> {
        // `for no key update`: a plain `for update` would block every accept through its foreign key.
        let lock = match self {
            Self::Postgres(_) => {
                "select epoch, page_seq, user_id, provider from connections where id = $1 for no key update"
            }
            Self::Sqlite(_) => "select epoch, page_seq, user_id, provider from connections where id = $1",
        };
        // Postgres takes a whole table's rows as arrays; a statement of SQLite grows with them.
        let bulk = if matches!(self, Self::Postgres(_)) { usize::MAX } else { BULK };
        transaction!(self, t => {
            let connection: Option<(i64, i64, crate::model::UserId, String)> =
                sqlx::query_as(lock).bind(fence.connection).fetch_optional(&mut *t).await?;
            let Some((epoch, page_seq, user, provider)) = connection else { return Err(Error::Fenced) };
            if epoch != fence.connection_epoch {
                return Err(Error::Fenced);
            }
            let run: Option<(bool, i64)> = sqlx::query_as("update runs set lease_until = $3, committed = committed + 1,
                        crashes = 0, attempts = 0, progress = coalesce($4, progress),
                        report = coalesce($5, report)
                    where id = $1 and epoch = $2 and state = 'in_progress'
                    returning cancel_requested, class")
                .bind(fence.run).bind(fence.run_epoch).bind(lease_until).bind(page.progress.as_deref()).bind(page.report.as_deref())
                .fetch_optional(&mut *t).await?;
            let Some((cancel, class)) = run else { return Err(Error::Fenced) };
            if page_seq != page.page_seq {
                return Err(Error::Stale);
            }
            let stored = !page.parts.is_empty() || !page.deleted.is_empty();
            sqlx::query("update connections set page_seq = page_seq + 1,
                        stored_at = case when $2 then $3 else stored_at end
                    where id = $1")
                .bind(fence.connection).bind(stored).bind(now).execute(&mut *t).await?;

            // Parts: what is replaced makes room first, because one row per answer is current.
            let (kept, gone): (Vec<_>, Vec<_>) =
                page.parts.iter().filter_map(|part| part.replaces).partition(|(_, keep)| *keep);
            if !kept.is_empty() {
                let mut query = QueryBuilder::new("update parts set state = 'stored', superseded_at = ");
                query.push_bind(now).push(" where id");
                let prepared = query.push_in(kept.into_iter().map(|(id, _)| id).collect::<Vec<PartId>>());
                query.build().persistent(prepared).execute(&mut *t).await?;
            }
            if !gone.is_empty() || !page.dropped.is_empty() {
                let mut query = QueryBuilder::new("delete from parts where id");
                let ids: Vec<PartId> = gone.into_iter().map(|(id, _)| id).chain(page.dropped.iter().copied()).collect();
                let prepared = query.push_in(ids);
                query.build().persistent(prepared).execute(&mut *t).await?;
            }
            for parts in page.parts.chunks(bulk) {
                Insert::into("parts", parts.len())
                    .column("id", "uuid", parts.iter().map(|part| part.id))
                    .column("connection_id", "uuid", parts.iter().map(|_| fence.connection))
                    .column("kind", "text", parts.iter().map(|part| part.kind.as_str()))
                    .column("external_id", "text", parts.iter().map(|part| part.external_id.as_str()))
                    .column("part", "text", parts.iter().map(|part| part.part.0))
                    .column("version", "bigint", parts.iter().map(|part| part.version))
                    .column("state", "text", parts.iter().map(|part| part.state.as_str()))
                    .column("order_at", "timestamptz", parts.iter().map(|part| part.order_at))
                    .column("due_at", "timestamptz", parts.iter().map(|_| now))
                    .column("last_error", "text", parts.iter().map(|part| part.last_error.as_deref()))
                    .column("body", "bytea", parts.iter().map(|part| part.body.as_slice()))
                    .column("body_size", "bigint", parts.iter().map(|part| part.body_size))
                    .column("hash", "bytea", parts.iter().map(|part| part.hash.as_slice()))
                    .column("formula", "bigint", parts.iter().map(|part| part.formula))
                    .column("fetched_at", "timestamptz", parts.iter().map(|_| now))
                    .column("stored_at", "timestamptz", parts.iter().map(|_| now))
                    .column("export_due", "boolean", parts.iter().map(|part| part.export_due))
                    .write(&mut *t, "").await?;
            }
            for fix in &page.fixes {
                sqlx::query("update parts set state = $2, attempts = $3, due_at = $4, last_error = $5,
                            fetched_at = case when $2 = 'wanted' then fetched_at else $6 end
                        where id = $1")
                    .bind(fix.id).bind(fix.state.as_str()).bind(fix.attempts).bind(fix.due_at)
                    .bind(fix.last_error.as_deref()).bind(now)
                    .execute(&mut *t).await?;
            }

            // Records, after the sources that they name.
            let mut sources: HashMap<(String, String), i64> = HashMap::new();
            if !page.records.is_empty() {
                let key = |source: &Source| {
                    (source.device.clone().unwrap_or_default(), source.writer.clone().unwrap_or_default())
                };
                let known = "select id, device, writer from data_sources where user_id = $1 and provider = $2";
                let rows: Vec<(i64, String, String)> = sqlx::query_as(known)
                    .bind(user).bind(provider.as_str()).fetch_all(&mut *t).await?;
                sources.extend(rows.into_iter().map(|(id, device, writer)| ((device, writer), id)));
                let unknown: BTreeSet<&Source> = page.records.iter().map(|write| &write.record.source)
                    .filter(|source| !sources.contains_key(&key(source))).collect();
                if !unknown.is_empty() {
                    let mut query =
                        QueryBuilder::new("insert into data_sources (user_id, provider, device, writer, software) ");
                    query.push_values(&unknown, |mut row, source| {
                        let (device, writer) = key(source);
                        row.push_bind(user).push_bind(provider.as_str()).push_bind(device).push_bind(writer)
                            .push_bind(source.software.as_deref());
                    });
                    query.push(" on conflict (user_id, provider, device, writer) do nothing");
                    query.build().persistent(false).execute(&mut *t).await?;
                    let rows: Vec<(i64, String, String)> = sqlx::query_as(known)
                        .bind(user).bind(provider.as_str()).fetch_all(&mut *t).await?;
                    sources.extend(rows.into_iter().map(|(id, device, writer)| ((device, writer), id)));
                }

                let source_of = |source: &Source| -> i64 {
                    // The row was inserted above; were it missing, the foreign key would refuse the page.
                    sources.get(&key(source)).copied().unwrap_or(-1)
                };
                let (new, known): (Vec<_>, Vec<_>) = page.records.iter().partition(|write| write.is_new);
                let (new, known) = (new.chunks(bulk).map(|rows| (true, rows)), known.chunks(bulk).map(|rows| (false, rows)));
                for (is_new, records) in new.chain(known) {
                    let of = || records.iter().map(|write| &write.record);
                    Insert::into("records", records.len())
                        .column("id", "uuid", records.iter().map(|write| write.id))
                        .column("connection_id", "uuid", records.iter().map(|_| fence.connection))
                        .column("kind", "text", of().map(|record| record.kind.as_str()))
                        .column("external_id", "text", of().map(|record| record.external_id.as_str()))
                        .column("data_source_id", "bigint", of().map(|record| source_of(&record.source)))
                        .column("type", "text", of().map(|record| record.provider_type.as_str()))
                        .column("title", "text", of().map(|record| record.title.as_deref()))
                        .column("start_at", "timestamptz", of().map(|record| record.start_at))
                        .column("end_at", "timestamptz", of().map(|record| record.end_at))
                        .column("utc_offset_s", "bigint", of().map(|record| {
                            record.utc_offset.map(|offset| i64::from(offset.local_minus_utc()))
                        }))
                        .column("zone", "text", of().map(|record| record.zone.as_deref()))
                        .column("local_day", "date", of().map(|record| record.local_day))
                        .column("hash", "bytea", records.iter().map(|write| write.hash.as_slice()))
                        .column("shape", "bigint", records.iter().map(|write| write.shape))
                        .column("revision", "bigint", records.iter().map(|write| write.revision))
                        .column("provisional", "boolean", records.iter().map(|write| write.provisional))
                        .column("stem", "text", records.iter().map(|write| write.stem.as_str()))
                        .column("source_updated_at", "timestamptz", of().map(|record| record.updated_at))
                        .column("stored_at", "timestamptz", records.iter().map(|write| write.stored_at))
                        .write(&mut *t, if is_new { "" } else { RECORD_AGAIN }).await?;

                let workouts: Vec<_> = records.iter().filter_map(|write| match &write.record.details {
                    Details::Workout(workout) => Some((write.id, workout)),
                    Details::None => None,
                }).collect();
                if !workouts.is_empty() {
                    let of = || workouts.iter().map(|(_, workout)| workout);
                    Insert::into("workouts", workouts.len())
                        .column("record_id", "uuid", workouts.iter().map(|(id, _)| *id))
                        .column("type", "text", of().map(|w| w.workout_type))
                        .column("elapsed_s", "double precision", of().map(|w| w.elapsed.map(|q| q.get())))
                        .column("moving_s", "double precision", of().map(|w| w.moving.map(|q| q.get())))
                        .column("distance_m", "double precision", of().map(|w| w.distance.map(|q| q.get())))
                        .column("ascent_m", "double precision", of().map(|w| w.ascent.map(|q| q.get())))
                        .column("elevation_high_m", "double precision", of().map(|w| w.elevation_high.map(|q| q.get())))
                        .column("elevation_low_m", "double precision", of().map(|w| w.elevation_low.map(|q| q.get())))
                        .column("average_speed_m_per_s", "double precision", of().map(|w| w.average_speed.map(|q| q.get())))
                        .column("max_speed_m_per_s", "double precision", of().map(|w| w.max_speed.map(|q| q.get())))
                        .column("average_heart_rate_bpm", "double precision", of().map(|w| w.average_heart_rate.map(|q| q.get())))
                        .column("max_heart_rate_bpm", "double precision", of().map(|w| w.max_heart_rate.map(|q| q.get())))
                        .column("average_cadence_per_min", "double precision", of().map(|w| w.average_cadence.map(|q| q.get())))
                        .column("average_power_w", "double precision", of().map(|w| w.average_power.map(|q| q.get())))
                        .column("max_power_w", "double precision", of().map(|w| w.max_power.map(|q| q.get())))
                        .column("weighted_power_w", "double precision", of().map(|w| w.weighted_power.map(|q| q.get())))
                        .column("power_measured", "boolean", of().map(|w| w.power_measured))
                        .column("work_kj", "double precision", of().map(|w| w.work.map(|q| q.get())))
                        .column("energy_kcal", "double precision", of().map(|w| w.energy.map(|q| q.get())))
                        .column("energy_estimated", "boolean", of().map(|w| w.energy_estimated))
                        .column("average_temperature_c", "double precision", of().map(|w| w.average_temperature.map(|q| q.get())))
                        .column("start_latitude_deg", "double precision", of().map(|w| w.start_latitude.map(|q| q.get())))
                        .column("start_longitude_deg", "double precision", of().map(|w| w.start_longitude.map(|q| q.get())))
                        .column("gear_id", "text", of().map(|w| w.gear_id.as_deref()))
                        .column("manual", "boolean", of().map(|w| w.manual))
                        .column("laps", "text", of().map(|w| json_list(&w.laps)))
                        .column("heart_rate_zones", "text", of().map(|w| json_list(&w.heart_rate_zones)))
                        .column("power_zones", "text", of().map(|w| json_list(&w.power_zones)))
                        .column("pace_zones", "text", of().map(|w| json_list(&w.pace_zones)))
                        .write(&mut *t, if is_new { "" } else { WORKOUT_AGAIN }).await?;
                }
                }
            }

            // Samples: the set of a record's chunks is replaced, and what is equal is left alone.
            let mut chunks_written = 0u64;
            for write in &page.chunks {
                let key = (write.source.device.clone().unwrap_or_default(), write.source.writer.clone().unwrap_or_default());
                let source = sources.get(&key).copied();
                let source: i64 = match source {
                    Some(source) => source,
                    None => {
                        let (id,): (i64,) = sqlx::query_as("select data_source_id from records where id = $1")
                            .bind(write.record).fetch_one(&mut *t).await?;
                        id
                    }
                };
                let have: HashMap<ChunkKey, Vec<u8>> = if write.is_new {
                    HashMap::new()
                } else {
                    let rows: Vec<(i64, bool, i64, Vec<u8>)> = sqlx::query_as(
                            "select series_type_id, total, first_at, hash from sample_chunks where record_id = $1")
                        .bind(write.record).fetch_all(&mut *t).await?;
                    rows.into_iter().map(|(series, total, first, hash)| ((series, total, first), hash)).collect()
                };
                let want: BTreeSet<ChunkKey> =
                    write.chunks.iter().map(|(chunk, _)| (chunk.series.id, chunk.total, chunk.first_at)).collect();
                for (series, total, first) in have.keys().filter(|key| !want.contains(key)) {
                    sqlx::query("delete from sample_chunks
                            where record_id = $1 and series_type_id = $2 and total = $3 and first_at = $4")
                        .bind(write.record).bind(series).bind(total).bind(first).execute(&mut *t).await?;
                }
                let changed: Vec<_> = write.chunks.iter().filter(|(chunk, hash)| {
                    have.get(&(chunk.series.id, chunk.total, chunk.first_at)) != Some(hash)
                }).collect();
                if changed.is_empty() {
                    continue;
                }
                chunks_written += changed.len() as u64;
                let mut query = QueryBuilder::new("insert into sample_chunks (record_id, series_type_id, total, first_at,
                    data_source_id, last_at, utc_offset_s, n, min_value, max_value, sum_value, deltas, vals, hash) ");
                query.push_values(&changed, |mut row, (chunk, hash)| {
                    row.push_bind(write.record).push_bind(chunk.series.id).push_bind(chunk.total)
                        .push_bind(chunk.first_at).push_bind(source).push_bind(chunk.last_at)
                        .push_bind(chunk.utc_offset.map(|offset| i64::from(offset.local_minus_utc())))
                        .push_bind(i64::try_from(chunk.values.len()).unwrap_or(i64::MAX))
                        .push_bind(chunk.min()).push_bind(chunk.max()).push_bind(chunk.sum());
                    row.push_arrays(chunk);
                    row.push_bind(hash.as_slice());
                });
                query.push(" on conflict (record_id, series_type_id, total, first_at) do update set
                    data_source_id = excluded.data_source_id, last_at = excluded.last_at,
                    utc_offset_s = excluded.utc_offset_s, n = excluded.n, min_value = excluded.min_value,
                    max_value = excluded.max_value, sum_value = excluded.sum_value, deltas = excluded.deltas,
                    vals = excluded.vals, hash = excluded.hash");
                query.build().persistent(is_kept(changed.len())).execute(&mut *t).await?;
            }

            for record in &page.deleted {
                sqlx::query("update records set deleted_at = $2, last_deleted_at = $2, export_due = true, revision = revision + 1
                        where id = $1 and deleted_at is null")
                    .bind(record).bind(now).execute(&mut *t).await?;
                sqlx::query("delete from sample_chunks where record_id = $1").bind(record).execute(&mut *t).await?;
                sqlx::query("delete from parts where state = 'wanted' and body is null and exists (select 1 from records r
                        where r.id = $1 and r.connection_id = parts.connection_id and r.kind = parts.kind
                            and r.external_id = parts.external_id)")
                    .bind(record).execute(&mut *t).await?;
            }

            if !page.wanted.is_empty() {
                let mut query = QueryBuilder::new("insert into parts (id, connection_id, kind, external_id, part, version,
                    state, order_at, due_at) ");
                query.push_values(&page.wanted, |mut row, write| {
                    row.push_bind(PartId::new()).push_bind(fence.connection).push_bind(write.wanted.kind.as_str())
                        .push_bind(write.wanted.external_id.as_str()).push_bind(write.wanted.part.0).push_bind(1_i64)
                        .push_bind("wanted").push_bind(write.order_at).push_bind(now);
                });
                query.push(" on conflict (connection_id, kind, external_id, part) where superseded_at is null do nothing");
                query.build().persistent(false).execute(&mut *t).await?;
            }
            if !page.again.is_empty() {
                let mut query = QueryBuilder::new("update parts set state = 'wanted', attempts = 0, due_at = ");
                query.push_bind(now).push(" where id");
                let prepared = query.push_in(page.again.clone());
                query.build().persistent(prepared).execute(&mut *t).await?;
            }

            if let Some(moved) = &page.window {
                let window = &moved.window;
                match &moved.position {
                    Some(position) => {
                        sqlx::query("update windows set position = $2, last_error = null where id = $1")
                            .bind(window.id).bind(position.to_string()).execute(&mut *t).await?;
                    }
                    None => {
                        let covered = match window.purpose {
                            Purpose::Cover => Some((window.lo, window.hi)),
                            Purpose::Reread => moved.proves,
                        };
                        sqlx::query("delete from windows where id = $1").bind(window.id).execute(&mut *t).await?;
                        if let Some((mut lo, mut hi)) = covered {
                            // Done windows that touch become one: the gap report stays short for ever.
                            let touching: Vec<(crate::model::WindowId, i64, i64)> = sqlx::query_as(
                                    "select id, lo, hi from windows where connection_id = $1 and stream = $2
                                        and purpose = 'cover' and state = 'done' and lo <= $4 and hi >= $3")
                                .bind(fence.connection).bind(moved.stream).bind(lo).bind(hi)
                                .fetch_all(&mut *t).await?;
                            for (id, other_lo, other_hi) in touching {
                                lo = lo.min(other_lo);
                                hi = hi.max(other_hi);
                                sqlx::query("delete from windows where id = $1").bind(id).execute(&mut *t).await?;
                            }
                            // What is open inside this range was read with it.
                            sqlx::query("delete from windows where connection_id = $1 and stream = $2 and purpose = 'cover'
                                        and state <> 'done' and lo >= $3 and hi <= $4")
                                .bind(fence.connection).bind(moved.stream).bind(lo).bind(hi)
                                .execute(&mut *t).await?;
                            // One that begins at the same place reaches further: only its rest is left to read.
                            sqlx::query("update windows set lo = $4 where connection_id = $1 and stream = $2
                                        and purpose = 'cover' and state <> 'done' and lo = $3 and not exists
                                            (select 1 from windows o where o.connection_id = $1 and o.stream = $2
                                                and o.purpose = 'cover' and o.lo = $4)")
                                .bind(fence.connection).bind(moved.stream).bind(lo).bind(hi)
                                .execute(&mut *t).await?;
                            sqlx::query("insert into windows (id, connection_id, stream, purpose, lo, hi, state, verified_at)
                                    values ($1, $2, $3, 'cover', $4, $5, 'done', $6)
                                    on conflict (connection_id, stream, lo) where purpose = 'cover' do nothing")
                                .bind(window.id).bind(fence.connection).bind(moved.stream).bind(lo).bind(hi).bind(now)
                                .execute(&mut *t).await?;
                        }
                    }
                }
            }

            let (urgent,): (bool,) = sqlx::query_as("select exists (select 1 from runs where connection_id = $1
                    and state in ('queued', 'waiting') and due_at <= $2 and class < $3)")
                .bind(fence.connection).bind(now).bind(class).fetch_one(&mut *t).await?;
            Ok(Boundary { cancel, give_way: urgent, chunks_written })
        })
    }
}

fn json_list<T: serde::Serialize>(list: &[T]) -> Option<String> {
    if list.is_empty() { None } else { serde_json::to_string(list).ok() }
}

/// A JSON array, made by hand: this is where SQLite's samples are made. Neighbours are often equal (a second apart, the
/// same temperature), and copying the text of the one before is faster than making it again.
fn json_array<T>(items: &[T], same: impl Fn(&T, &T) -> bool, write: impl Fn(&mut Vec<u8>, &T)) -> String {
    // Most numbers take four to nine characters.
    let mut text = Vec::with_capacity(items.len() * 8 + 2);
    text.push(b'[');
    let mut last: Option<(&T, std::ops::Range<usize>)> = None;
    for item in items {
        match &last {
            Some((one, range)) if same(one, item) => text.extend_from_within(range.clone()),
            _ => {
                let begin = text.len();
                write(&mut text, item);
                text.push(b',');
                last = Some((item, begin..text.len()));
            }
        }
    }
    if last.is_some() {
        text.pop();
    }
    text.push(b']');
    String::from_utf8(text).unwrap_or_default()
}

fn json_deltas(deltas: &[i32]) -> String {
    // Writing into memory does not fail.
    json_array(
        deltas,
        |a, b| a == b,
        |text, delta| {
            let _ = serde_json::to_writer(text, delta);
        },
    )
}

/// Whole values, which most are, are written without a point: half the text, and half the time.
fn json_values(values: &[f64]) -> String {
    // Every whole number up to here is exact in a double.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    json_array(
        values,
        |a, b| a.to_bits() == b.to_bits(),
        |text, value| {
            let whole = value.fract() == 0.0 && value.abs() < EXACT && (*value != 0.0 || value.is_sign_positive());
            let _ =
                if whole { serde_json::to_writer(text, &(*value as i64)) } else { serde_json::to_writer(text, value) };
        },
    )
}

/// Binds the two arrays of a chunk: arrays in Postgres, JSON text in SQLite. Which one a row builder takes is decided
/// by its own database type.
trait PushArrays {
    fn push_arrays(&mut self, chunk: &Chunk);
}

impl PushArrays for sqlx::query_builder::Separated<'_, '_, sqlx::Postgres, &'static str> {
    fn push_arrays(&mut self, chunk: &Chunk) {
        self.push_bind(chunk.deltas.clone()).push_bind(chunk.values.clone());
    }
}

impl PushArrays for sqlx::query_builder::Separated<'_, '_, sqlx::Sqlite, &'static str> {
    fn push_arrays(&mut self, chunk: &Chunk) {
        self.push_bind(json_deltas(&chunk.deltas)).push_bind(json_values(&chunk.values));
    }
}

#[cfg(test)]
mod tests {
    use super::json_values;

    #[test]
    fn values_come_back_bit_for_bit() {
        let values = [98.0, -3.0, 0.0, -0.0, 46.94812, 1e19, 9_007_199_254_740_993.0, 1e-20, f64::MAX, -0.5];
        let text = json_values(&values);
        assert!(text.starts_with("[98,-3,0,-0.0,46.94812,"), "{text}");
        let back: Vec<f64> = serde_json::from_str(&text).unwrap();
        assert_eq!(back.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), values.map(f64::to_bits));
    }
}
