//! The sync engine: a request becomes windows, windows become pages, pages become rows and files.
//!
//! May name everything below it (levels 0 to 2). What must always hold: data before position, database before file,
//! file before "done"; every write shows its fence; one place decides what an error means (`engine.rs`).

mod accept;
mod connect;
mod deliver;
mod engine;
mod events;
mod execute;
mod failpoint;
mod fetch;
mod gaps;
mod import;
mod items;
mod plan;
mod prepare;
mod probe;
mod project;
mod rebuild;
mod schedule;
mod tokens;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use secrecy::SecretString;
use tokio_util::sync::CancellationToken;

pub use accept::{Refused, app, check_support, connect_with_grant, parse_request, request_key, since_ms, submit};
pub use connect::{
    ConnectError, Connected, PAGE_POLICY, Visit, begin_visit, connect_with_code, disconnect, end_visit, finish_visit,
    first_sync, is_same, keep_grants, prepare_visit, purge, result_page,
};
pub use deliver::{
    Delivered, SubscribeError, Subscribed, SubscriptionCache, Unwelcome, callback_url, clean_up_deliveries, deliver,
    delivery_body, is_believed, list_subscriptions, receive, replay, subscribe, subscribe_soon, unsubscribe,
};
pub use events::{Event, EventLine, PartOutcome, part_outcomes};
pub use execute::{Executed, execute, run_inline, sweep};
pub use gaps::list_gaps;
pub use import::{NewGrant, connect, import_plain_settings, only_user};
pub use probe::{Probe, probe};
pub use project::{Exporter, drain, erase_user, remove_erased};
pub use rebuild::rebuild;
pub use schedule::{default_schedule, find_silence, next_due, set_schedule, tick};
pub use tokens::{TokenFailure, TokenStore};

use crate::clock::Clock;
use crate::config::{Config, ProviderConfig};
use crate::coordination::Coordination;
use crate::model::quota::Quota;
use crate::providers::oauth::App;
use crate::providers::{self, Http, Leave, OAuthSpec, Provider, ProviderSpec};
use crate::storage::Db;
use crate::vault::Vault;

/// Why engine work failed as a whole.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database.
    #[error(transparent)]
    Storage(#[from] crate::storage::Error),
    /// Redis. Runs survive without it; this is only answered where nothing can be done without it.
    #[error(transparent)]
    Coordination(#[from] crate::coordination::Error),
    /// The vault.
    #[error(transparent)]
    Vault(#[from] crate::vault::VaultError),
    /// The files.
    #[error("{0}")]
    Export(String),
    /// A setting is missing or wrong.
    #[error("{0}")]
    Settings(String),
    /// A token that a person brought was not taken; whatever was stored stays.
    #[error("{0}")]
    NotTaken(String),
    /// A stored value cannot be read.
    #[error("a stored value cannot be read: {0}")]
    Corrupt(String),
}

/// One provider with what is set for it.
pub struct ProviderSetup {
    /// The provider.
    pub provider: &'static dyn Provider,
    /// Our application there; `None`: not set up.
    pub app: Option<App>,
    /// Where calls go.
    pub base_url: String,
    /// Its quotas, or those set instead.
    pub quotas: Vec<Quota>,
    /// Names of the optional parts that are fetched.
    pub parts: Vec<&'static str>,
    /// What the settings say besides.
    pub config: ProviderConfig,
}

impl ProviderSetup {
    fn new(provider: &'static dyn Provider, config: ProviderConfig) -> Result<Self, Error> {
        let spec = provider.spec();
        let app = match (&spec.oauth, &config.client_id, &config.client_secret) {
            (Some(oauth), Some(client_id), Some(client_secret)) => Some(App {
                oauth,
                client_id: client_id.clone(),
                client_secret: client_secret.clone(),
                authorize_url: config.authorize_url.clone().unwrap_or_else(|| oauth.authorize_url.to_owned()),
                token_url: config.token_url.clone().unwrap_or_else(|| oauth.token_url.to_owned()),
                revoke_url: revoke_url(oauth, &config),
            }),
            _ => None,
        };
        let optional: Vec<&'static str> = {
            let mut names: Vec<_> = spec.parts.iter().filter(|part| !part.primary).map(|part| part.name.0).collect();
            names.dedup();
            names
        };
        let parts = match &config.parts {
            None => spec.parts.iter().filter(|p| !p.primary && p.on_by_default).map(|part| part.name.0).collect(),
            Some(wanted) => wanted
                .iter()
                .map(|name| {
                    optional.iter().copied().find(|known| known == name).ok_or_else(|| {
                        Error::Settings(format!(
                            "WEARSYNC_PROVIDERS__{}__PARTS names `{name}`; it can name {}",
                            spec.name.0.to_uppercase(),
                            optional.join(", ")
                        ))
                    })
                })
                .collect::<Result<_, _>>()?,
        };
        Ok(Self {
            provider,
            app,
            base_url: config.api_base_url.clone().unwrap_or_else(|| spec.api_base_url.to_owned()),
            quotas: config.quota.clone().unwrap_or_else(|| spec.quotas.to_vec()),
            parts,
            config,
        })
    }

    /// The provider, as data.
    #[must_use]
    pub fn spec(&self) -> &'static ProviderSpec {
        self.provider.spec()
    }

    /// Under this name all processes share the quotas of this application.
    #[must_use]
    pub fn quota_key(&self) -> String {
        let client = self.app.as_ref().map_or("", |app| app.client_id.as_str());
        format!("{}:{client}", self.spec().name)
    }
}

/// Where grants are given back. Whoever sets another token address means another provider (a simulator, a proxy): then
/// no token goes to the real one.
fn revoke_url(oauth: &OAuthSpec, config: &ProviderConfig) -> Option<String> {
    let Leave::Revoke(own) = oauth.leave else { return None };
    if let Some(url) = &config.revoke_url {
        return Some(url.clone());
    }
    let Some(token_url) = &config.token_url else { return Some(own.to_owned()) };
    let path = url::Url::parse(own).ok()?.path().to_owned();
    Some(url::Url::parse(token_url).ok()?.join(&path).ok()?.into())
}

/// The engine: everything that work needs, shared by all of a process.
pub struct Engine {
    /// The database.
    pub db: Db,
    /// What processes share besides it.
    pub shared: Coordination,
    /// The client for providers.
    pub http: Http,
    /// Seals tokens.
    pub vault: Arc<Vault>,
    /// Time.
    pub clock: Clock,
    /// The settings.
    pub config: Config,
    /// By name.
    pub providers: BTreeMap<&'static str, ProviderSetup>,
    /// Access tokens in memory.
    pub tokens: TokenStore,
    /// Our subscriptions at providers, as last seen.
    pub subscriptions: SubscriptionCache,
    /// Writes files, where this process does.
    pub exporter: Option<Exporter>,
    /// Names this start of this process in leases.
    pub owner: String,
    /// Cancelled when the process is to end: work stops at the next page boundary.
    pub stop: CancellationToken,
}

impl Engine {
    /// Puts the engine together.
    ///
    /// # Errors
    /// When the settings of a provider are wrong, or the TLS set-up of the machine cannot be read.
    pub fn new(
        config: Config,
        db: Db,
        shared: Coordination,
        vault: Vault,
        clock: Clock,
        exporter: Option<Exporter>,
    ) -> Result<Arc<Self>, Error> {
        let http = Http::new().map_err(|error| Error::Settings(format!("no HTTPS client can be made: {error}")))?;
        let providers = providers::REGISTRY
            .iter()
            .map(|provider| {
                let name = provider.spec().name.0;
                Ok((name, ProviderSetup::new(*provider, config.provider(name))?))
            })
            .collect::<Result<_, Error>>()?;
        Ok(Arc::new(Self {
            db,
            shared,
            http,
            vault: Arc::new(vault),
            clock,
            config,
            providers,
            tokens: TokenStore::default(),
            subscriptions: SubscriptionCache::default(),
            exporter,
            owner: format!("{}-{}", std::process::id(), uuid::Uuid::now_v7()),
            stop: CancellationToken::new(),
        }))
    }

    /// A provider by name.
    #[must_use]
    pub fn provider(&self, name: &str) -> Option<&ProviderSetup> {
        self.providers.get(name)
    }

    pub(crate) fn now(&self) -> DateTime<Utc> {
        self.clock.now()
    }

    pub(crate) fn after(&self, duration: Duration) -> DateTime<Utc> {
        self.now() + chrono::Duration::from_std(duration).unwrap_or(chrono::Duration::MAX / 2)
    }
}

/// A token that nobody but its owner may read, in the form in which it is sealed: bound to its account.
fn token_aad(purpose: &str, account: crate::model::AccountId) -> Vec<u8> {
    format!("{purpose}:{account}").into_bytes()
}

/// A secret from plain text; the text is not kept.
#[must_use]
pub fn secret(text: &str) -> SecretString {
    SecretString::from(text.to_owned())
}
