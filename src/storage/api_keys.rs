use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::db::{accept, read, write};
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
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it stops working, if ever.
    pub expires_at: Option<DateTime<Utc>>,
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
        self.revoked_at.is_none() && self.expires_at.is_none_or(|expires| now < expires)
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
    pub expires_at: Option<DateTime<Utc>>,
}

impl Db {
    /// Keeps a new key.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn insert_api_key(&self, new: NewApiKey, now: DateTime<Utc>) -> Result<ApiKey> {
        let sql = "insert into api_keys (id, hash, prefix, name, scopes, created_at, expires_at)
            values ($1, $2, $3, $4, $5, $6, $7)
            returning id, prefix, name, scopes, created_at, expires_at, revoked_at, last_used_at";
        accept!(self, c => Ok(sqlx::query_as(sql)
            .bind(Uuid::now_v7())
            .bind(new.hash)
            .bind(new.prefix)
            .bind(new.name)
            .bind(new.scopes)
            .bind(now)
            .bind(new.expires_at)
            .fetch_one(&mut *c)
            .await?))
    }

    /// A key by the digest of its secret.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_api_key(&self, hash: &[u8]) -> Result<Option<ApiKey>> {
        let sql = "select id, prefix, name, scopes, created_at, expires_at, revoked_at, last_used_at
            from api_keys where hash = $1";
        Ok(read!(self, p => sqlx::query_as(sql).bind(hash).fetch_optional(p).await?))
    }

    /// All keys, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_api_keys(&self) -> Result<Vec<ApiKey>> {
        let sql = "select id, prefix, name, scopes, created_at, expires_at, revoked_at, last_used_at
            from api_keys order by created_at desc, id desc";
        Ok(read!(self, p => sqlx::query_as(sql).fetch_all(p).await?))
    }

    /// Revokes a key; `false` when there is none. Revoking twice keeps the first time.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn revoke_api_key(&self, id: Uuid, now: DateTime<Utc>) -> Result<bool> {
        let sql = "update api_keys set revoked_at = coalesce(revoked_at, $2) where id = $1";
        accept!(self, c => Ok(sqlx::query(sql).bind(id).bind(now).execute(&mut *c).await?.rows_affected() > 0))
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
