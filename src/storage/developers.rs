use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::db::{accept, read, transaction};
use super::{Db, Result};

/// A person who runs this service.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct Developer {
    /// Its id.
    pub id: Uuid,
    /// In lower case; unique.
    pub email: String,
    /// First name.
    pub first_name: Option<String>,
    /// Last name.
    pub last_name: Option<String>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
}

/// What makes a developer.
#[derive(Clone, Debug)]
pub struct NewDeveloper {
    /// In lower case.
    pub email: String,
    /// First name.
    pub first_name: Option<String>,
    /// Last name.
    pub last_name: Option<String>,
    /// As `vault::hash_password` made it.
    pub password_hash: String,
}

/// What changes a developer; `None` leaves a field as it is.
#[derive(Clone, Debug, Default)]
pub struct DeveloperChange {
    /// In lower case.
    pub email: Option<String>,
    /// First name.
    pub first_name: Option<String>,
    /// Last name.
    pub last_name: Option<String>,
}

/// A developer's token, as its claims tell: nobody is known yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bearer {
    /// Who it says it is.
    pub developer: Uuid,
    /// When it was given out: before the last change of the password it no longer works.
    pub issued_at: DateTime<Utc>,
}

impl Db {
    /// Makes a developer.
    ///
    /// # Errors
    /// [`super::Error::Duplicate`] for an e-mail that is taken.
    pub async fn insert_developer(&self, new: NewDeveloper, now: DateTime<Utc>) -> Result<Developer> {
        let sql = "insert into developers
                (id, email, first_name, last_name, password_hash, created_at, updated_at, password_changed_at)
            values ($1, $2, $3, $4, $5, $6, $6, $6)
            returning id, email, first_name, last_name, created_at, updated_at";
        accept!(self, c => Ok(sqlx::query_as(sql)
            .bind(Uuid::now_v7())
            .bind(new.email)
            .bind(new.first_name)
            .bind(new.last_name)
            .bind(new.password_hash)
            .bind(now)
            .fetch_one(&mut *c)
            .await?))
    }

    /// The developer that a token is of, if it still works.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_developer(&self, bearer: Bearer) -> Result<Option<Developer>> {
        let sql = "select id, email, first_name, last_name, created_at, updated_at from developers
            where id = $1 and password_changed_at <= $2";
        Ok(read!(self, p => sqlx::query_as(sql).bind(bearer.developer).bind(bearer.issued_at).fetch_optional(p).await?))
    }

    /// Id and password hash of who logs in with this e-mail.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_password(&self, email: &str) -> Result<Option<(Uuid, String)>> {
        let sql = "select id, password_hash from developers where email = $1";
        Ok(read!(self, p => sqlx::query_as(sql).bind(email).fetch_optional(p).await?))
    }

    /// All developers, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_developers(&self) -> Result<Vec<Developer>> {
        let sql = "select id, email, first_name, last_name, created_at, updated_at from developers
            order by created_at, id";
        Ok(read!(self, p => sqlx::query_as(sql).fetch_all(p).await?))
    }

    /// Changes the fields that are given.
    ///
    /// # Errors
    /// [`super::Error::Duplicate`] for an e-mail that is taken.
    pub async fn update_developer(
        &self,
        id: Uuid,
        change: DeveloperChange,
        now: DateTime<Utc>,
    ) -> Result<Option<Developer>> {
        let sql = "update developers set email = coalesce($2, email), first_name = coalesce($3, first_name),
                last_name = coalesce($4, last_name), updated_at = $5
            where id = $1
            returning id, email, first_name, last_name, created_at, updated_at";
        accept!(self, c => Ok(sqlx::query_as(sql)
            .bind(id)
            .bind(change.email)
            .bind(change.first_name)
            .bind(change.last_name)
            .bind(now)
            .fetch_optional(&mut *c)
            .await?))
    }

    /// Gives a developer another password: tokens given out before now end. `false`: the password was changed by
    /// somebody else since `old_hash` was read.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn change_password(&self, id: Uuid, old_hash: &str, new_hash: &str, now: DateTime<Utc>) -> Result<bool> {
        let changed = transaction!(self, t => {
            let changed = sqlx::query("update developers
                    set password_hash = $3, password_changed_at = $4, updated_at = $4
                    where id = $1 and password_hash = $2")
                .bind(id).bind(old_hash).bind(new_hash).bind(now)
                .execute(&mut *t).await?.rows_affected() > 0;
            if changed {
                sqlx::query("delete from refresh_tokens where developer_id = $1").bind(id).execute(&mut *t).await?;
            }
            changed
        });
        Ok(changed)
    }
}
