use chrono::{DateTime, Utc};

use super::db::{accept, write};
use super::{Db, Result};
use crate::model::UserId;

/// One visit to a provider's consent page, known by the digest of its state.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct OAuthState {
    /// Provider.
    pub provider: String,
    /// Who is to be connected.
    pub user_id: UserId,
    /// Where the person goes afterwards, if not to our own page.
    pub redirect_uri: Option<String>,
    /// Where the provider sends the person back to.
    pub callback_url: String,
    /// PKCE verifier, sealed; where the provider takes one.
    pub verifier: Option<Vec<u8>>,
    /// From then on it is good for nothing.
    pub expires_at: DateTime<Utc>,
}

impl Db {
    /// Notes a visit.
    ///
    /// # Errors
    /// When the database fails, or the user is gone.
    pub async fn insert_oauth_state(&self, hash: Vec<u8>, state: OAuthState, now: DateTime<Utc>) -> Result<()> {
        let sql = "insert into oauth_states
                (hash, provider, user_id, redirect_uri, callback_url, verifier, created_at, expires_at)
            values ($1, $2, $3, $4, $5, $6, $7, $8)";
        accept!(self, c => {
            sqlx::query(sql).bind(hash).bind(state.provider).bind(state.user_id).bind(state.redirect_uri)
                .bind(state.callback_url).bind(state.verifier).bind(now).bind(state.expires_at)
                .execute(&mut *c).await?;
            Ok(())
        })
    }

    /// Takes a visit: it is there once, for whoever comes first, however it ends.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn take_oauth_state(&self, hash: Vec<u8>) -> Result<Option<OAuthState>> {
        let sql = "delete from oauth_states where hash = $1
            returning provider, user_id, redirect_uri, callback_url, verifier, expires_at";
        accept!(self, c => Ok(sqlx::query_as(sql).bind(hash).fetch_optional(&mut *c).await?))
    }

    /// Drops visits that led to nothing.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn drop_old_oauth_states(&self, now: DateTime<Utc>) -> Result<u64> {
        let sql = "delete from oauth_states where expires_at <= $1";
        Ok(write!(self, p => sqlx::query(sql).bind(now).execute(p).await?.rows_affected()))
    }
}
