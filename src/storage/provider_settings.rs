use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use super::db::{read, transaction};
use super::{Db, Result};

/// What was set for a provider while the service runs. A provider without a row is as its table of data says.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct ProviderSetting {
    /// Provider name.
    pub provider: String,
    /// Whether it is offered to people; nothing is refused because of it.
    pub is_enabled: bool,
    /// `pull` or `webhook`; `None`: the provider's own.
    pub live_sync_mode: Option<String>,
    /// `raw`, `hourly` or `daily`.
    pub data_granularity: String,
}

/// What changes a provider's settings; `None` leaves one as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProviderChange {
    /// See [`ProviderSetting`].
    pub is_enabled: Option<bool>,
    /// See [`ProviderSetting`].
    pub live_sync_mode: Option<&'static str>,
    /// See [`ProviderSetting`].
    pub data_granularity: Option<&'static str>,
}

impl Db {
    /// The settings of all providers that have some, by name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_provider_settings(&self) -> Result<BTreeMap<String, ProviderSetting>> {
        let sql = "select provider, is_enabled, live_sync_mode, data_granularity from provider_settings";
        let rows: Vec<ProviderSetting> = read!(self, p => sqlx::query_as(sql).fetch_all(p).await?);
        Ok(rows.into_iter().map(|row| (row.provider.clone(), row)).collect())
    }

    /// Changes the settings of some providers, all or none.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn change_provider_settings(&self, changes: &[(&str, ProviderChange)], now: DateTime<Utc>) -> Result<()> {
        transaction!(self, t => {
            for (provider, change) in changes {
                sqlx::query("insert into provider_settings
                        (provider, is_enabled, live_sync_mode, data_granularity, updated_at)
                        values ($1, coalesce($2, true), $3, coalesce($4, 'raw'), $5)
                        on conflict (provider) do update set
                            is_enabled = coalesce($2, provider_settings.is_enabled),
                            live_sync_mode = coalesce($3, provider_settings.live_sync_mode),
                            data_granularity = coalesce($4, provider_settings.data_granularity),
                            updated_at = $5")
                    .bind(*provider).bind(change.is_enabled).bind(change.live_sync_mode).bind(change.data_granularity)
                    .bind(now).execute(&mut *t).await?;
            }
        });
        Ok(())
    }
}
