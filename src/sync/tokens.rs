//! Access tokens: reused while they live, refreshed by one process at a time, never stored in the database.
//!
//! The order is what keeps a grant alive: the lease is a committed row before the refresh token is spent (so a dead
//! database is noticed first), and the answer is committed before it is used.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use super::connect::renew_at;
use super::{Engine, Error, ProviderSetup, failpoint, secret, token_aad};
use crate::clock::Clock;
use crate::coordination::Coordination;
use crate::model::AccountId;
use crate::providers::oauth::{self, App, Grant, Refusal, TokenError};
use crate::providers::{AccessToken, Dead, Http};
use crate::storage::{self, Account, Db, RefreshFailure, Refreshed};
use crate::telemetry::{self, Refresh};
use crate::vault::Vault;

/// A token that ends sooner than this is not worth starting a call with.
const SPARE_SECONDS: i64 = 30;
/// How often a process looks whether the one that refreshes is done.
const POLL: Duration = Duration::from_millis(50);

/// A token that another process has just stored is on its way to the shared cache for at most this long.
const ON_ITS_WAY: chrono::Duration = chrono::Duration::seconds(5);

/// Access tokens in memory.
#[derive(Debug, Default)]
pub struct TokenStore {
    tokens: Mutex<HashMap<AccountId, AccessToken>>,
    /// Held while a token is looked for outside: whoever comes next finds it in memory.
    looking: Mutex<HashMap<AccountId, Arc<tokio::sync::Mutex<()>>>>,
}

/// Why there is no access token.
#[derive(Debug, thiserror::Error)]
pub enum TokenFailure {
    /// The person has to connect again.
    #[error("the account has to be connected again: {0}")]
    Reauthorize(String),
    /// Our application's credentials are wrong, or it is switched off; says nothing about the grant.
    #[error("{0}")]
    Application(String),
    /// Worth trying again.
    #[error("{0}")]
    Transient(String),
    /// Ours.
    #[error(transparent)]
    Internal(#[from] Error),
}

impl From<crate::storage::Error> for TokenFailure {
    fn from(error: crate::storage::Error) -> Self {
        Self::Internal(error.into())
    }
}

/// An access token as it waits in the shared cache, sealed.
#[derive(Serialize, Deserialize)]
struct Shared {
    token: String,
    expires_ms: i64,
}

impl TokenStore {
    fn get(&self, account: AccountId) -> Option<AccessToken> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).get(&account).cloned()
    }

    fn put(&self, account: AccountId, token: AccessToken) {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).insert(account, token);
    }

    fn looking(&self, account: AccountId) -> Arc<tokio::sync::Mutex<()>> {
        self.looking.lock().unwrap_or_else(PoisonError::into_inner).entry(account).or_default().clone()
    }

    fn forget(&self, account: AccountId, version: i64) {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.get(&account).is_some_and(|token| token.version <= version) {
            tokens.remove(&account);
        }
    }
}

impl Engine {
    /// An access token of this account, of a version above `refused` (a version that the provider answered 401 to).
    ///
    /// # Errors
    /// [`TokenFailure`].
    pub async fn access_token(
        &self,
        setup: &ProviderSetup,
        id: AccountId,
        refused: i64,
    ) -> Result<AccessToken, TokenFailure> {
        let deadline = self.after(self.config.lease * 3);
        // Within a process one looks, and the others find what it brought.
        let looking = self.tokens.looking(id);
        let _looking = looking.lock().await;
        loop {
            if let Some(token) = self.cached(id, refused).await {
                return Ok(token);
            }
            let account = self
                .db
                .find_account(id)
                .await?
                .ok_or_else(|| TokenFailure::Reauthorize("it was removed".to_owned()))?;
            if account.status != "active" {
                let why = account.reason.unwrap_or_else(|| "the grant is no longer good".to_owned());
                return Err(TokenFailure::Reauthorize(why));
            }
            // The version that nobody has refused was stored a moment ago: its access token is about to be shared.
            let coming = account.token_version > refused
                && account.refresh_owner.is_none()
                && account.refresh_until.is_some_and(|until| self.now() <= until);
            if !coming && let Some(token) = self.refresh(setup, &account).await? {
                return Ok(token);
            }
            // Another process refreshes: its answer comes through the cache, or its lease runs out.
            if self.now() > deadline {
                return Err(TokenFailure::Transient("another process refreshes the token and does not end".to_owned()));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Spends a refresh token that a person brought for an account whose own is good. The lease is taken for it: the two
    /// may be of one grant, and who spends the other one meanwhile would end this one. Storing the answer ends the lease;
    /// so does a refusal, and the account's own token stays. `None`: its own is not good, and there is nothing to lose.
    ///
    /// # Errors
    /// [`Error::NotTaken`]; or the database fails.
    pub(crate) async fn try_token(
        &self,
        setup: &ProviderSetup,
        app: &App,
        id: AccountId,
        brought: &SecretString,
    ) -> Result<Option<Grant>, Error> {
        let title = setup.spec().title;
        let deadline = self.after(self.config.lease * 3);
        let lease = loop {
            let now = self.now();
            let account = self.db.find_account(id).await?;
            let works = |account: &Account| account.status == "active" && account.refresh_token.is_some();
            let Some(account) = account.filter(works) else { return Ok(None) };
            let (version, until) = (account.token_version, self.after(self.config.lease));
            if let Some(lease) = self.db.take_refresh_lease(id, version, &self.owner, now, until).await? {
                break lease;
            }
            if now > deadline {
                let why = "the stored token is being refreshed and that does not end; try again";
                return Err(Error::NotTaken(format!("{title}: {why}")));
            }
            tokio::time::sleep(POLL).await;
        };
        match spend(&self.http, app, brought, self.now(), self.config.lease).await {
            Ok(grant) => Ok(Some(grant)),
            Err(error) => {
                // Of a refusal the stored token knows nothing. One that may be spent may have been the newer one of it.
                let spent = matches!(error, TokenError::Transient { spent: true, .. });
                let failure = unspent(spent || lease.interrupted);
                self.db.fail_refresh(id, lease.account.token_version, &self.owner, failure, self.now()).await?;
                Err(Error::NotTaken(match error {
                    TokenError::Refused { refusal: Refusal::Grant, .. } => {
                        format!("{title} refused this refresh token; the connection keeps the one it has")
                    }
                    error => format!(
                        "{title}: this refresh token could not be tried, and the connection keeps the one it has: {error}"
                    ),
                }))
            }
        }
    }

    /// The provider answered 401 to a token of this version: nobody is to use it again.
    pub(crate) async fn forget_token(&self, account: AccountId, version: i64) {
        self.tokens.forget(account, version);
        if let Err(error) = self.shared.forget_token(account, version).await {
            telemetry::redis_down(&error);
        }
    }

    /// Gives the newest grant of one account to another: both are the same person's.
    pub(crate) async fn adopt_grant(&self, from: &Account, into: AccountId) -> Result<(), Error> {
        let Some(from) = self.db.find_account(from.id).await? else { return Ok(()) };
        let Some(sealed) = &from.refresh_token else { return Ok(()) };
        let token = self.vault.open(&token_aad("refresh", from.id), sealed)?;
        let sealed = self.vault.seal(&token_aad("refresh", into), &token);
        self.db.store_grant(into, sealed, self.now()).await?;
        Ok(())
    }

    /// A token above the version that was refused: from memory, else from the shared cache. An older one in memory, which
    /// may well live for hours yet, must not hide the newer one there.
    async fn cached(&self, account: AccountId, refused: i64) -> Option<AccessToken> {
        let now = self.now();
        let is_good = |token: &AccessToken| {
            token.version > refused && token.expires_at > now + chrono::Duration::seconds(SPARE_SECONDS)
        };
        if let Some(token) = self.tokens.get(account).filter(is_good) {
            // A version that another process has replaced since is still good: the old access token lives until it ends.
            return Some(token);
        }
        if !self.config.share_access_tokens {
            return None;
        }
        let (version, sealed) = self.shared.cached_token(account, now.timestamp_millis()).await.ok().flatten()?;
        let plain = self.vault.open(&token_aad("access", account), &sealed).ok()?;
        let shared: Shared = serde_json::from_str(plain.expose_secret()).ok()?;
        let token = AccessToken {
            secret: secret(&shared.token),
            version,
            expires_at: DateTime::<Utc>::from_timestamp_millis(shared.expires_ms)?,
        };
        let token = Some(token).filter(is_good)?;
        self.tokens.put(account, token.clone());
        Some(token)
    }

    /// Refreshes, if this process may: `None` while another one does.
    async fn refresh(&self, setup: &ProviderSetup, account: &Account) -> Result<Option<AccessToken>, TokenFailure> {
        let spec = setup.spec();
        let app = setup.app.as_ref().ok_or_else(|| {
            let name = spec.name.0.to_uppercase();
            TokenFailure::Application(format!(
                "{} is not set up: set WEARSYNC_PROVIDERS__{name}__CLIENT_ID and …__CLIENT_SECRET",
                spec.title
            ))
        })?;
        if app.client_id != account.client_id {
            return Err(TokenFailure::Application(format!(
                "the account was connected through application {}, but {} is set: connect it again or set the old one",
                account.client_id, app.client_id
            )));
        }
        let now = self.now();
        let until = self.after(self.config.lease);
        let version = account.token_version;
        let lease = self.db.take_refresh_lease(account.id, version, &self.owner, now, until).await?;
        let Some(lease) = lease else { return Ok(None) };
        failpoint::hit("refresh-leased");
        let Some(sealed) = &lease.account.refresh_token else {
            let why = "it has no refresh token";
            self.db.fail_refresh(account.id, version, &self.owner, RefreshFailure::Lost(why), now).await?;
            return Err(TokenFailure::Reauthorize(why.to_owned()));
        };
        let refresh_token = match self.vault.open(&token_aad("refresh", account.id), sealed) {
            Ok(token) => token,
            Err(error) => {
                self.db.fail_refresh(account.id, version, &self.owner, unspent(lease.interrupted), now).await?;
                return Err(TokenFailure::Reauthorize(format!("the stored token cannot be opened: {error}")));
            }
        };
        let shares = self.config.share_access_tokens && matches!(self.shared, Coordination::Redis(_));
        let spend = Spend {
            http: self.http.clone(),
            app: app.clone(),
            refresh_token,
            db: self.db.clone(),
            vault: self.vault.clone(),
            clock: self.clock.clone(),
            account: account.id,
            version,
            owner: self.owner.clone(),
            lease: self.config.lease,
            coming: shares.then_some(ON_ITS_WAY),
        };
        // A task of its own: who asked may be dropped in the middle, but what the provider gave has to be stored.
        let answer = tokio::spawn(spend.run()).await.map_err(|panic| {
            TokenFailure::Internal(Error::Corrupt(format!("the refresh ended in a panic: {panic}")))
        })??;
        match answer {
            Ok(None) => Ok(None),
            Ok(Some(grant)) => {
                telemetry::token_refreshed(spec.name, account.id, Refresh::Ok);
                let token =
                    AccessToken { secret: grant.access_token, version: version + 1, expires_at: grant.expires_at };
                self.keep_token(account.id, token.clone()).await;
                Ok(Some(token))
            }
            Err(TokenError::Refused { refusal: Refusal::Grant, .. }) => {
                let lost = lease.interrupted;
                let dead = lost
                    || match app.oauth.dead {
                        Dead::Once => true,
                        Dead::Repeated(times, seconds) => {
                            let since = lease.account.refused_since.unwrap_or(now);
                            lease.account.refusals + 1 >= i64::from(times)
                                && now - since >= chrono::Duration::seconds(i64::from(seconds))
                        }
                    };
                let why = if lost {
                    "rotation_lost: a process or a connection ended between the provider's answer and our commit, and \
                     the provider no longer takes the token before it"
                } else {
                    "the provider refused the refresh token: access was taken back, or the token was used elsewhere"
                };
                telemetry::token_refreshed(
                    spec.name,
                    account.id,
                    if lost { Refresh::RotationLost } else { Refresh::Refused },
                );
                let failure = match (lost, dead) {
                    (true, _) => RefreshFailure::Lost(why),
                    (false, true) => RefreshFailure::Dead(why),
                    (false, false) => RefreshFailure::Refused,
                };
                self.db.fail_refresh(account.id, version, &self.owner, failure, self.now()).await?;
                if dead {
                    Err(TokenFailure::Reauthorize(why.to_owned()))
                } else {
                    Err(TokenFailure::Transient("the provider refused the refresh token; it errs at times".to_owned()))
                }
            }
            Err(TokenError::Refused { detail, .. }) => {
                telemetry::token_refreshed(spec.name, account.id, Refresh::Transient);
                self.db.fail_refresh(account.id, version, &self.owner, unspent(lease.interrupted), self.now()).await?;
                Err(TokenFailure::Application(format!(
                    "{} refused our application (client id, secret, or its state): {detail}",
                    spec.title
                )))
            }
            Err(TokenError::Transient { detail, spent }) => {
                telemetry::token_refreshed(spec.name, account.id, Refresh::Transient);
                let failure = unspent(spent || lease.interrupted);
                self.db.fail_refresh(account.id, version, &self.owner, failure, self.now()).await?;
                Err(TokenFailure::Transient(detail))
            }
        }
    }

    /// Keeps a new access token for whoever needs one, here and in other processes.
    pub(crate) async fn keep_token(&self, account: AccountId, token: AccessToken) {
        self.share(account, &token).await;
        self.tokens.put(account, token);
    }

    async fn share(&self, account: AccountId, token: &AccessToken) {
        if !self.config.share_access_tokens {
            return;
        }
        let shared =
            Shared { token: token.secret.expose_secret().to_owned(), expires_ms: token.expires_at.timestamp_millis() };
        let Ok(plain) = serde_json::to_string(&shared) else { return };
        let sealed = self.vault.seal(&token_aad("access", account), &secret(&plain));
        let now = self.now().timestamp_millis();
        let shared = self.shared.cache_token(account, token.version, sealed, shared.expires_ms, now).await;
        if let Err(error) = shared {
            telemetry::redis_down(&error);
        }
    }
}

/// Nothing was brought. What an earlier holder left unsure stays so: what a later refusal means depends on it.
fn unspent(unsure: bool) -> RefreshFailure<'static> {
    if unsure { RefreshFailure::MaybeSpent } else { RefreshFailure::Unspent }
}

/// Refreshes while the lease lasts: two holders at once would spend one token twice.
async fn spend(
    http: &Http,
    app: &App,
    token: &SecretString,
    now: DateTime<Utc>,
    lease: Duration,
) -> Result<Grant, TokenError> {
    let call = oauth::refresh(http, app, token, now);
    tokio::time::timeout(lease.mul_f64(0.75), call).await.unwrap_or_else(|_| {
        let detail = "the token endpoint did not answer in time".to_owned();
        Err(TokenError::Transient { detail, spent: true })
    })
}

/// The spending of one refresh token, with all it needs to end well by itself.
struct Spend {
    http: Http,
    app: App,
    refresh_token: SecretString,
    db: Db,
    vault: Arc<Vault>,
    clock: Clock,
    account: AccountId,
    version: i64,
    owner: String,
    lease: Duration,
    coming: Option<chrono::Duration>,
}

impl Spend {
    /// Asks the provider, and stores its answer. `Ok(None)`: somebody else had the lease by then.
    async fn run(self) -> Result<Result<Option<Grant>, TokenError>, storage::Error> {
        let answer = spend(&self.http, &self.app, &self.refresh_token, self.clock.now(), self.lease).await;
        failpoint::hit("refresh-answered");
        let grant = match answer {
            Ok(grant) => grant,
            Err(error) => return Ok(Err(error)),
        };
        let aad = token_aad("refresh", self.account);
        let sealed = grant.refresh_token.as_ref().map(|token| self.vault.seal(&aad, token));
        let now = self.clock.now();
        let coming = self.coming.map(|span| now + span);
        let brought = Refreshed { sealed, coming, renew_at: renew_at(&self.app, now) };
        let stored = self.db.store_refresh(self.account, self.version, &self.owner, brought, now).await?;
        failpoint::hit("refresh-stored");
        Ok(Ok(stored.then_some(grant)))
    }
}
