use chrono::{DateTime, Utc};

use super::db::{read, transaction};
use super::{Db, Result};
use crate::model::quota::Window;

impl Db {
    /// The last snapshot of a quota's windows.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn load_quota(&self, key: &str) -> Result<Vec<(String, Window)>> {
        let rows: Vec<(String, i64, i64, i64)> = read!(self, p => sqlx::query_as(
                "select name, used, quota_limit, resets_at_ms from quota_windows where quota_key = $1")
            .bind(key).fetch_all(p).await?);
        Ok(rows
            .into_iter()
            .map(|(name, used, limit, resets_at_ms)| {
                let window = Window { used: used.unsigned_abs(), limit: limit.unsigned_abs(), resets_at_ms };
                (name, window)
            })
            .collect())
    }

    /// Keeps a snapshot, so that a restart in mid-window knows what was used.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn save_quota(&self, key: &str, windows: &[(String, Window)], now: DateTime<Utc>) -> Result<()> {
        transaction!(self, t => {
            for (name, window) in windows {
                sqlx::query("insert into quota_windows (quota_key, name, used, quota_limit, resets_at_ms, updated_at)
                        values ($1, $2, $3, $4, $5, $6)
                        on conflict (quota_key, name) do update set used = excluded.used,
                            quota_limit = excluded.quota_limit, resets_at_ms = excluded.resets_at_ms,
                            updated_at = excluded.updated_at")
                    .bind(key).bind(name.as_str()).bind(i64::try_from(window.used).unwrap_or(i64::MAX))
                    .bind(i64::try_from(window.limit).unwrap_or(i64::MAX)).bind(window.resets_at_ms).bind(now)
                    .execute(&mut *t).await?;
            }
        });
        Ok(())
    }
}
