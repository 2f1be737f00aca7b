use chrono::{DateTime, NaiveDate, Utc};
use sqlx::QueryBuilder;

use super::db::{PushIn, accept, read, transaction};
use super::{Db, Result};
use crate::model::{ConnectionId, PartId, RecordId, UserId};

/// A stored answer that has no file yet, with the record it belongs to.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct ExportPart {
    /// The part.
    pub id: PartId,
    /// Word of the kind.
    pub kind: String,
    /// The provider's id of the record.
    pub external_id: String,
    /// Name of the part.
    pub part: String,
    /// Which version of the answer.
    pub version: i64,
    /// zstd of the bytes received.
    pub body: Vec<u8>,
    /// When it was stored.
    pub stored_at: DateTime<Utc>,
    /// The formulas its file is computed with.
    pub formula: i64,
    /// The record's stem.
    pub stem: String,
    /// Whether a newer version took its place.
    pub superseded: bool,
    /// zstd of the record's primary answer as it was when this one was stored; `None` for a primary answer itself.
    pub primary_body: Option<Vec<u8>>,
}

/// A record without its parts, for markers of deleted records.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct RecordRow {
    /// Its id.
    pub id: RecordId,
    /// Word of the kind.
    pub kind: String,
    /// The provider's id.
    pub external_id: String,
    /// The provider's own type.
    pub r#type: String,
    /// When it began.
    pub start_at: DateTime<Utc>,
    /// When it was found deleted.
    pub deleted_at: DateTime<Utc>,
    /// Its stem.
    pub stem: String,
}

/// One row of the summary of a kind.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct SummaryRow {
    /// The provider's own type.
    pub r#type: String,
    /// Records.
    pub count: i64,
    /// Metres in all.
    pub distance_m: f64,
    /// Day of the first.
    pub first_day: NaiveDate,
    /// Day of the last.
    pub last_day: NaiveDate,
}

impl Db {
    /// Takes the right to write one user's files: `None` while another process has it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn take_export_lease(
        &self,
        user: UserId,
        owner: &str,
        now: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> Result<Option<i64>> {
        let sql = "insert into export_leases (user_id, owner, epoch, until_at)
            select id, $2, 1, $4 from users where id = $1
            on conflict (user_id) do update set owner = excluded.owner, until_at = excluded.until_at,
                epoch = export_leases.epoch + 1
            where export_leases.owner = excluded.owner or export_leases.until_at < $3
            returning epoch";
        let owner = owner.to_owned();
        let row: Option<(i64,)> = accept!(self, c => Ok::<_, super::Error>(sqlx::query_as(sql)
            .bind(user).bind(owner).bind(now).bind(until).fetch_optional(&mut *c).await?))?;
        Ok(row.map(|(epoch,)| epoch))
    }

    /// Gives the right back.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn release_export_lease(&self, user: UserId, epoch: i64, now: DateTime<Utc>) -> Result<()> {
        accept!(self, c => {
            sqlx::query("update export_leases set until_at = $3 where user_id = $1 and epoch = $2")
                .bind(user).bind(epoch).bind(now).execute(&mut *c).await?;
            Ok(())
        })
    }

    /// Answers of a connection that have no file yet, with their bodies: at most `limit`, and no more after those that
    /// made `bytes` as received.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_unexported(&self, connection: ConnectionId, limit: i64, bytes: i64) -> Result<Vec<ExportPart>> {
        // A file is rendered from versions that never change, so that it comes back identical: hence the primary answer
        // of that time, not of today.
        // The inner limit keeps nothing out: behind it a planner that knows nothing of a new connection cannot see that
        // all its records are of one connection, and compare each of them with each answer (2 000 times 2 000).
        let sql = "with due as (
                select p.id, p.body_size, r.stem
                from (select id, connection_id, kind, external_id, body_size from parts
                        where connection_id = $1 and export_due and body is not null limit 2147483647) p
                join records r
                    on r.connection_id = p.connection_id and r.kind = p.kind and r.external_id = p.external_id
                where not r.provisional and r.stem is not null
                limit $2),
            sized as (
                select id, stem, cast(sum(body_size) over (order by id) - body_size as bigint) as before from due)
            select p.id, p.kind, p.external_id, p.part, p.version, p.body, p.stored_at, p.formula, s.stem,
                p.superseded_at is not null as superseded,
                case when p.part <> 'summary' then coalesce(
                    (select q.body from parts q
                        where q.connection_id = p.connection_id and q.kind = p.kind and q.external_id = p.external_id
                            and q.part = 'summary' and q.body is not null and q.stored_at <= p.stored_at
                        order by q.version desc limit 1),
                    (select q.body from parts q
                        where q.connection_id = p.connection_id and q.kind = p.kind and q.external_id = p.external_id
                            and q.part = 'summary' and q.body is not null
                        order by q.version limit 1))
                end as primary_body
            from sized s join parts p on p.id = s.id
            where s.before < $3";
        Ok(read!(self, p => sqlx::query_as(sql).bind(connection).bind(limit).bind(bytes).fetch_all(p).await?))
    }

    /// Records found deleted that have no marker yet.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_unexported_deletes(&self, connection: ConnectionId, limit: i64) -> Result<Vec<RecordRow>> {
        let sql = "select id, kind, external_id, type, start_at, last_deleted_at as deleted_at, stem from records
            where connection_id = $1 and export_due and last_deleted_at is not null and stem is not null limit $2";
        Ok(read!(self, p => sqlx::query_as(sql).bind(connection).bind(limit).fetch_all(p).await?))
    }

    /// Clears marks, after the files are on disk.
    ///
    /// # Errors
    /// When the database fails; then the files are written again, with the same bytes.
    pub async fn clear_exports(&self, parts: &[PartId], records: &[RecordId]) -> Result<()> {
        transaction!(self, t => {
            if !parts.is_empty() {
                let mut query = QueryBuilder::new("update parts set export_due = false where id");
                let prepared = query.push_in(parts.to_vec());
                query.build().persistent(prepared).execute(&mut *t).await?;
            }
            if !records.is_empty() {
                let mut query = QueryBuilder::new("update records set export_due = false where id");
                let prepared = query.push_in(records.to_vec());
                query.build().persistent(prepared).execute(&mut *t).await?;
            }
        });
        Ok(())
    }

    /// Marks everything of a connection (or of all) to be written again: files are a projection.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn mark_all_exports(&self, connection: ConnectionId) -> Result<u64> {
        Ok(transaction!(self, t => {
            sqlx::query("update records set export_due = true where connection_id = $1 and last_deleted_at is not null")
                .bind(connection).execute(&mut *t).await?;
            sqlx::query("update parts set export_due = true where connection_id = $1 and body is not null
                    and state in ('stored', 'wanted') and part <> 'presence'")
                .bind(connection).execute(&mut *t).await?.rows_affected()
        }))
    }

    /// Connections that have something to write.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_export_due(&self) -> Result<Vec<ConnectionId>> {
        let sql = "select c.id from connections c
            where exists (select 1 from parts p where p.connection_id = c.id and p.export_due)
                or exists (select 1 from records r where r.connection_id = c.id and r.export_due)";
        let rows: Vec<(ConnectionId,)> = read!(self, p => sqlx::query_as(sql).fetch_all(p).await?);
        Ok(rows.into_iter().map(|(id,)| id).collect())
    }

    /// The summary of one kind, a row per type, the most frequent first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn summarize(&self, connection: ConnectionId, kind: &str) -> Result<Vec<SummaryRow>> {
        let sql =
            "select r.type, count(*) as count, cast(coalesce(sum(w.distance_m), 0) as double precision) as distance_m,
                min(r.local_day) as first_day, max(r.local_day) as last_day
            from records r left join workouts w on w.record_id = r.id
            where r.connection_id = $1 and r.kind = $2 and r.deleted_at is null and not r.provisional
            group by r.type order by count(*) desc, r.type";
        Ok(read!(self, p => sqlx::query_as(sql).bind(connection).bind(kind).fetch_all(p).await?))
    }
}
