use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::db::{accept, read};
use super::{Db, Result};

/// A program that may give out tokens for users.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct Application {
    /// Our id of it.
    pub id: Uuid,
    /// The id it names itself by: `app_` and 32 hex digits.
    pub app_id: String,
    /// What it is.
    pub name: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

impl Db {
    /// Makes an application of a developer; `None`: of the first one. Answers `None` when there is no such developer.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn insert_application(
        &self,
        developer: Option<Uuid>,
        app_id: String,
        secret_hash: Vec<u8>,
        name: String,
        now: DateTime<Utc>,
    ) -> Result<Option<Application>> {
        let sql = "insert into applications (id, app_id, secret_hash, developer_id, name, created_at, updated_at)
            select $1, $2, $3, d.id, $5, $6, $6 from developers d where d.id = coalesce($4, d.id)
            order by d.created_at, d.id limit 1
            returning id, app_id, name, created_at";
        accept!(self, c => Ok(sqlx::query_as(sql)
            .bind(Uuid::now_v7())
            .bind(app_id)
            .bind(secret_hash)
            .bind(developer)
            .bind(name)
            .bind(now)
            .fetch_optional(&mut *c)
            .await?))
    }

    /// A developer's applications, newest first; `None`: those of all.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_applications(&self, developer: Option<Uuid>) -> Result<Vec<Application>> {
        let sql =
            "select id, app_id, name, created_at from applications where developer_id = coalesce($1, developer_id)
            order by created_at desc, id desc";
        Ok(read!(self, p => sqlx::query_as(sql).bind(developer).fetch_all(p).await?))
    }

    /// Removes an application of a developer, or of any; `false` when there is none with this id.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn delete_application(&self, developer: Option<Uuid>, app_id: String) -> Result<bool> {
        accept!(self, c => Ok(sqlx::query("delete from applications where developer_id = coalesce($1, developer_id) and app_id = $2")
            .bind(developer).bind(app_id).execute(&mut *c).await?.rows_affected() > 0))
    }

    /// Gives an application of a developer, or of any, another secret; the old one ends.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn update_application_secret(
        &self,
        developer: Option<Uuid>,
        app_id: String,
        secret_hash: Vec<u8>,
        now: DateTime<Utc>,
    ) -> Result<Option<Application>> {
        let sql = "update applications set secret_hash = $3, updated_at = $4
            where developer_id = coalesce($1, developer_id) and app_id = $2
            returning id, app_id, name, created_at";
        accept!(self, c => Ok(sqlx::query_as(sql)
            .bind(developer)
            .bind(app_id)
            .bind(secret_hash)
            .bind(now)
            .fetch_optional(&mut *c)
            .await?))
    }

    /// Whether an application has this id and secret.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn is_application(&self, app_id: &str, secret_hash: &[u8]) -> Result<bool> {
        let sql = "select count(*) from applications where app_id = $1 and secret_hash = $2";
        let (n,): (i64,) = read!(self, p => sqlx::query_as(sql).bind(app_id).bind(secret_hash).fetch_one(p).await?);
        Ok(n > 0)
    }
}
