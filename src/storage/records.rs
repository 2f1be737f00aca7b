use chrono::{DateTime, Utc};

use super::db::{PushIn, read, write};
use super::{Db, Result};
use crate::model::{ConnectionId, Kind, PartId, RecordId, UserId};

/// How much there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, sqlx::FromRow, serde::Serialize)]
pub struct Counts {
    /// Records, deleted ones left out.
    pub records: i64,
    /// Samples.
    pub samples: i64,
    /// Answers kept.
    pub parts: i64,
}

/// A wanted part that is due.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct WantedPart {
    /// Its id.
    pub id: PartId,
    /// Word of the kind.
    pub kind: String,
    /// The provider's id of the record.
    pub external_id: String,
    /// Name of the part.
    pub part: String,
    /// Failed attempts.
    pub attempts: i64,
    /// Place of the record on the stream's axis.
    pub order_at: DateTime<Utc>,
}

impl Db {
    /// Wanted parts that are due, newest record first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_wanted(
        &self,
        connection: ConnectionId,
        now: DateTime<Utc>,
        limit: i64,
    ) -> Result<Vec<WantedPart>> {
        let sql = "select id, kind, external_id, part, attempts, order_at from parts
            where connection_id = $1 and state = 'wanted' and superseded_at is null and due_at <= $2
            order by order_at desc, kind, external_id, part limit $3";
        Ok(read!(self, p => sqlx::query_as(sql).bind(connection).bind(now).bind(limit).fetch_all(p).await?))
    }

    /// Wanted parts of one record, due or not, with when they are.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_wanted_of(
        &self,
        connection: ConnectionId,
        kind: Kind,
        external_id: &str,
    ) -> Result<Vec<(WantedPart, DateTime<Utc>)>> {
        #[derive(sqlx::FromRow)]
        struct Row {
            #[sqlx(flatten)]
            wanted: WantedPart,
            due_at: DateTime<Utc>,
        }
        let sql = "select id, kind, external_id, part, attempts, order_at, due_at from parts
            where connection_id = $1 and kind = $2 and external_id = $3 and state = 'wanted' and superseded_at is null
            order by part";
        let rows: Vec<Row> = read!(self, p => sqlx::query_as(sql).bind(connection).bind(kind.as_str()).bind(external_id)
            .fetch_all(p).await?);
        Ok(rows.into_iter().map(|row| (row.wanted, row.due_at)).collect())
    }

    /// When a record begins, and whether it is deleted.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_start(
        &self,
        connection: ConnectionId,
        kind: Kind,
        external_id: &str,
    ) -> Result<Option<(DateTime<Utc>, bool)>> {
        let sql = "select start_at, deleted_at is not null from records
            where connection_id = $1 and kind = $2 and external_id = $3";
        Ok(read!(self, p => sqlx::query_as(sql).bind(connection).bind(kind.as_str()).bind(external_id)
            .fetch_optional(p).await?))
    }

    /// How many parts are wanted, and when the first one that is not due yet will be.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn count_wanted(
        &self,
        connection: ConnectionId,
        now: DateTime<Utc>,
    ) -> Result<(i64, Option<DateTime<Utc>>)> {
        let sql = "select count(*), min(case when due_at > $2 then due_at end) from parts
            where connection_id = $1 and state = 'wanted' and superseded_at is null";
        Ok(read!(self, p => sqlx::query_as(sql).bind(connection).bind(now).fetch_one(p).await?))
    }

    /// Asks again for parts that were given up and are due.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn want_failed_again(&self, connection: ConnectionId, now: DateTime<Utc>) -> Result<u64> {
        let sql = "update parts set state = 'wanted', attempts = 0
            where connection_id = $1 and state = 'failed' and superseded_at is null and due_at <= $2";
        Ok(write!(self, p => sqlx::query(sql).bind(connection).bind(now).execute(p).await?.rows_affected()))
    }

    /// How many parts were given up.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn count_failed(&self, connection: ConnectionId) -> Result<i64> {
        let sql = "select count(*) from parts where connection_id = $1 and state = 'failed' and superseded_at is null";
        let (count,): (i64,) = read!(self, p => sqlx::query_as(sql).bind(connection).fetch_one(p).await?);
        Ok(count)
    }

    /// The bodies of stored parts, as kept (zstd).
    ///
    /// # Errors
    /// When the database fails.
    pub async fn load_bodies(&self, ids: &[PartId]) -> Result<Vec<(PartId, Vec<u8>)>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        Ok(read!(self, p => {
            let mut query = sqlx::QueryBuilder::new("select id, body from parts where body is not null and id");
            let prepared = query.push_in(ids.to_vec());
            query.build_query_as().persistent(prepared).fetch_all(p).await?
        }))
    }

    /// External ids of live records of a kind that start inside a range (milliseconds).
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_ids_between(
        &self,
        connection: ConnectionId,
        kind: Kind,
        lo: DateTime<Utc>,
        hi: DateTime<Utc>,
    ) -> Result<Vec<(String, DateTime<Utc>)>> {
        let sql = "select external_id, start_at from records
            where connection_id = $1 and kind = $2 and start_at >= $3 and start_at < $4 and deleted_at is null";
        Ok(
            read!(self, p => sqlx::query_as(sql).bind(connection).bind(kind.as_str()).bind(lo).bind(hi).fetch_all(p).await?),
        )
    }

    /// External ids of records of a kind after a given one, in order: for walking through all of them.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_ids_after(
        &self,
        connection: ConnectionId,
        kind: Kind,
        after: &str,
        limit: i64,
    ) -> Result<Vec<String>> {
        let sql = "select external_id from records where connection_id = $1 and kind = $2 and external_id > $3
            order by external_id limit $4";
        let rows: Vec<(String,)> = read!(self, p => sqlx::query_as(sql).bind(connection).bind(kind.as_str()).bind(after).bind(limit).fetch_all(p).await?);
        Ok(rows.into_iter().map(|(id,)| id).collect())
    }

    /// How much there is of a user, or of all.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn count_all(&self, user: Option<UserId>) -> Result<Counts> {
        let of = |column: &str| match user {
            Some(_) => format!("{column} in (select id from connections where user_id = $1)"),
            None => "true".to_owned(),
        };
        let sql = format!(
            "select
                (select count(*) from records where deleted_at is null and {0}) as records,
                (select cast(coalesce(sum(n), 0) as bigint) from sample_chunks s join records r on r.id = s.record_id
                    where {1}) as samples,
                (select count(*) from parts where body is not null and {0}) as parts",
            of("connection_id"),
            of("r.connection_id")
        );
        Ok(read!(self, p => {
            let mut query = sqlx::query_as(&sql);
            if let Some(user) = user {
                query = query.bind(user);
            }
            query.fetch_one(p).await?
        }))
    }

    /// Drops what has outlived its use: parts of records deleted 30 days ago, final runs older than 90 days beyond the
    /// last 20 of their connection.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn clean_up(&self, now: DateTime<Utc>) -> Result<()> {
        let parts_before = now - chrono::Duration::days(30);
        let runs_before = now - chrono::Duration::days(90);
        write!(self, p => sqlx::query("delete from parts where exists (select 1 from records r
                where r.connection_id = parts.connection_id and r.kind = parts.kind
                    and r.external_id = parts.external_id and r.deleted_at < $1 and not r.export_due)
                and not export_due")
            .bind(parts_before).execute(p).await?.rows_affected());
        write!(self, p => sqlx::query("delete from runs where ended_at < $1
                and (select count(*) from runs n where n.connection_id = runs.connection_id and n.id > runs.id) >= 20")
            .bind(runs_before).execute(p).await?.rows_affected());
        self.drop_old_oauth_states(now).await?;
        Ok(())
    }

    /// Digests of a record's stored chunks, by series, total and first instant.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_chunk_hashes(&self, record: RecordId) -> Result<Vec<(i64, bool, i64, Vec<u8>)>> {
        let sql = "select series_type_id, total, first_at, hash from sample_chunks where record_id = $1
            order by series_type_id, total, first_at";
        Ok(read!(self, p => sqlx::query_as(sql).bind(record).fetch_all(p).await?))
    }
}
