use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::db::{accept, transaction};
use super::{Db, Result};
use crate::model::UserId;

/// Refresh tokens that one developer or user keeps: the oldest go first. More devices than any person has.
const KEPT: i64 = 50;

/// Whose a refresh token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenOwner {
    /// A developer's.
    Developer(Uuid),
    /// A user's, given out on the word of an application or a developer.
    User {
        /// Which user.
        user: UserId,
        /// On whose word.
        app_id: String,
    },
}

impl TokenOwner {
    fn columns(&self) -> (Option<Uuid>, Option<UserId>, Option<&str>) {
        match self {
            Self::Developer(id) => (Some(*id), None, None),
            Self::User { user, app_id } => (None, Some(*user), Some(app_id)),
        }
    }
}

impl Db {
    /// Keeps a refresh token by its digest.
    ///
    /// # Errors
    /// When the database fails; also when there is no such developer or user.
    pub async fn insert_refresh_token(&self, hash: &[u8], owner: &TokenOwner, now: DateTime<Utc>) -> Result<()> {
        let (developer, user, app_id) = owner.columns();
        transaction!(self, t => {
            sqlx::query("delete from refresh_tokens where hash in (select hash from refresh_tokens
                    where developer_id = $1 or user_id = $2 order by created_at desc, hash limit 1000 offset $3)")
                .bind(developer).bind(user).bind(KEPT - 1).execute(&mut *t).await?;
            sqlx::query("insert into refresh_tokens (hash, developer_id, user_id, app_id, created_at)
                    values ($1, $2, $3, $4, $5)")
                .bind(hash).bind(developer).bind(user).bind(app_id).bind(now).execute(&mut *t).await?;
        });
        Ok(())
    }

    /// Puts one refresh token in another's place, and tells whose it is. `None`: the old one is unknown or spent.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn replace_refresh_token(
        &self,
        old: &[u8],
        new: &[u8],
        now: DateTime<Utc>,
    ) -> Result<Option<TokenOwner>> {
        // One statement: of two who show the same token at once, one finds nothing.
        let sql = "update refresh_tokens set hash = $2, created_at = $3 where hash = $1
            returning developer_id, user_id, app_id";
        let (old, new) = (old.to_vec(), new.to_vec());
        let row: Option<(Option<Uuid>, Option<UserId>, Option<String>)> = accept!(self, c => Ok(sqlx::query_as(sql)
            .bind(old)
            .bind(new)
            .bind(now)
            .fetch_optional(&mut *c)
            .await?))?;
        Ok(row.and_then(|(developer, user, app_id)| match (developer, user) {
            (Some(id), _) => Some(TokenOwner::Developer(id)),
            (None, Some(user)) => Some(TokenOwner::User { user, app_id: app_id.unwrap_or_default() }),
            (None, None) => None,
        }))
    }

    /// Ends a refresh token; `false` when it is unknown or spent.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn delete_refresh_token(&self, hash: &[u8]) -> Result<bool> {
        let hash = hash.to_vec();
        accept!(self, c => Ok(sqlx::query("delete from refresh_tokens where hash = $1")
            .bind(hash).execute(&mut *c).await?.rows_affected() > 0))
    }
}
