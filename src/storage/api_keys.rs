use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::db::{accept, read, transaction, write};
use super::{Db, Result};

/// A key as it is kept: the secret's digest, never the secret.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct ApiKey {
    /// Public id.
    pub id: Uuid,
    /// The first characters of the secret, to tell keys apart.
    pub prefix: String,
    /// What it is for.
    pub name: String,
    /// Words with commas between: `sync`, `read`, `admin`.
    pub scopes: String,
    /// The developer who made it; `None`: the command line did.
    pub created_by: Option<Uuid>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it stops working, if ever.
    pub expires_at: Option<DateTime<Utc>>,
    /// When it stops working because another key took its place.
    pub retires_at: Option<DateTime<Utc>>,
    /// When it was revoked.
    pub revoked_at: Option<DateTime<Utc>>,
    /// When it was last used, to the minute.
    pub last_used_at: Option<DateTime<Utc>>,
}

impl ApiKey {
    /// Whether it has a scope; `admin` has all.
    #[must_use]
    pub fn allows(&self, scope: &str) -> bool {
        self.scopes.split(',').any(|have| have == scope || have == "admin")
    }

    /// Whether it works at this moment.
    #[must_use]
    pub fn is_valid(&self, now: DateTime<Utc>) -> bool {
        self.revoked_at.is_none() && [self.expires_at, self.retires_at].into_iter().flatten().all(|end| now < end)
    }
}

/// What makes a key.
#[derive(Clone, Debug)]
pub struct NewApiKey {
    /// SHA-256 of the secret.
    pub hash: Vec<u8>,
    /// See [`ApiKey`].
    pub prefix: String,
    /// See [`ApiKey`].
    pub name: String,
    /// See [`ApiKey`].
    pub scopes: String,
    /// See [`ApiKey`].
    pub created_by: Option<Uuid>,
    /// See [`ApiKey`].
    pub expires_at: Option<DateTime<Utc>>,
}

/// What takes a key's place: its digest and first characters.
#[derive(Clone, Debug)]
pub struct NextApiKey {
    /// SHA-256 of the secret.
    pub hash: Vec<u8>,
    /// See [`ApiKey`].
    pub prefix: String,
    /// Who asks for it.
    pub created_by: Option<Uuid>,
    /// When the old one retires; one that was to retire before still does.
    pub old_until: DateTime<Utc>,
}

impl Db {
    /// Keeps a new key.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn insert_api_key(&self, new: NewApiKey, now: DateTime<Utc>) -> Result<ApiKey> {
        let sql = "insert into api_keys (id, hash, prefix, name, scopes, created_at, expires_at, created_by)
            values ($1, $2, $3, $4, $5, $6, $7, $8)
            returning id, prefix, name, scopes, created_by, created_at, expires_at, retires_at, revoked_at, last_used_at";
        accept!(self, c => Ok(sqlx::query_as(sql)
            .bind(Uuid::now_v7())
            .bind(new.hash)
            .bind(new.prefix)
            .bind(new.name)
            .bind(new.scopes)
            .bind(now)
            .bind(new.expires_at)
            .bind(new.created_by)
            .fetch_one(&mut *c)
            .await?))
    }

    /// A key by the digest of its secret.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_api_key(&self, hash: &[u8]) -> Result<Option<ApiKey>> {
        let sql =
            "select id, prefix, name, scopes, created_by, created_at, expires_at, retires_at, revoked_at, last_used_at
            from api_keys where hash = $1";
        Ok(read!(self, p => sqlx::query_as(sql).bind(hash).fetch_optional(p).await?))
    }

    /// All keys, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_api_keys(&self) -> Result<Vec<ApiKey>> {
        let sql =
            "select id, prefix, name, scopes, created_by, created_at, expires_at, retires_at, revoked_at, last_used_at
            from api_keys order by created_at desc, id desc";
        Ok(read!(self, p => sqlx::query_as(sql).fetch_all(p).await?))
    }

    /// Revokes a key; `None` when there is none that is not revoked: of two calls at once one finds it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn revoke_api_key(&self, id: Uuid, now: DateTime<Utc>) -> Result<Option<ApiKey>> {
        let sql = "update api_keys set revoked_at = $2 where id = $1 and revoked_at is null
            returning id, prefix, name, scopes, created_by, created_at, expires_at, retires_at, revoked_at, last_used_at";
        accept!(self, c => Ok(sqlx::query_as(sql).bind(id).bind(now).fetch_optional(&mut *c).await?))
    }

    /// Gives a key that is not revoked another name, where one is given.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn rename_api_key(&self, id: Uuid, name: Option<String>) -> Result<Option<ApiKey>> {
        let sql = "update api_keys set name = coalesce($2, name) where id = $1 and revoked_at is null
            returning id, prefix, name, scopes, created_by, created_at, expires_at, retires_at, revoked_at, last_used_at";
        accept!(self, c => Ok(sqlx::query_as(sql).bind(id).bind(name).fetch_optional(&mut *c).await?))
    }

    /// Makes a key with the name and scopes of another that works; the other one retires. One that expires is followed by
    /// one with as long a life. Answers, too, until when the other one works: that may be sooner than was asked for.
    /// `None` when there is no such key.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn rotate_api_key(
        &self,
        id: Uuid,
        next: NextApiKey,
        now: DateTime<Utc>,
    ) -> Result<Option<(ApiKey, DateTime<Utc>)>> {
        let new = transaction!(self, t => {
            let sql = "select id, prefix, name, scopes, created_by, created_at, expires_at, retires_at, revoked_at, last_used_at
                from api_keys where id = $1 and revoked_at is null";
            let old: Option<ApiKey> = sqlx::query_as(sql).bind(id).fetch_optional(&mut *t).await?;
            // One that is over would have an heir by every call, and be said to work on.
            match old.filter(|old| old.is_valid(now)) {
                None => None,
                Some(old) => {
                    let until = old.retires_at.map_or(next.old_until, |end| end.min(next.old_until));
                    sqlx::query("update api_keys set retires_at = $2 where id = $1").bind(id).bind(until)
                        .execute(&mut *t).await?;
                    let sql = "insert into api_keys (id, hash, prefix, name, scopes, created_at, expires_at, created_by)
                        values ($1, $2, $3, $4, $5, $6, $7, $8)
                        returning id, prefix, name, scopes, created_by, created_at, expires_at, retires_at,
                            revoked_at, last_used_at";
                    let new: ApiKey = sqlx::query_as(sql)
                        .bind(Uuid::now_v7()).bind(next.hash).bind(next.prefix).bind(old.name).bind(old.scopes)
                        .bind(now).bind(old.expires_at.map(|end| now + (end - old.created_at))).bind(next.created_by)
                        .fetch_one(&mut *t).await?;
                    Some((new, old.expires_at.map_or(until, |end| end.min(until))))
                }
            }
        });
        Ok(new)
    }

    /// Notes that a key was used. Callers do so once a minute and key at most.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn touch_api_key(&self, id: Uuid, now: DateTime<Utc>) -> Result<()> {
        write!(self, p => sqlx::query("update api_keys set last_used_at = $2 where id = $1")
            .bind(id).bind(now).execute(p).await?.rows_affected());
        Ok(())
    }
}
