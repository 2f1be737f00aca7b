//! How a grant comes and goes: a visit to the provider's consent page, the account and the connection that come of it,
//! and their end. Rows first: what a provider does not answer to keeps nobody connected.

use std::time::Duration;

use chrono::{DateTime, Utc};
use rand::Rng as _;
use secrecy::{ExposeSecret, SecretString};

use super::accept::{app, submit};
use super::fetch::RunGate;
use super::project::folders_of;
use super::{Engine, Error, ProviderSetup, remove_erased, token_aad};
use crate::config::OnDeauthorize;
use crate::model::{AccountId, Class, ConnectionId, RunId, RunSource, SyncRequest, UserId};
use crate::providers::oauth::{self, App, Code, Grant, Owner, TokenError};
use crate::providers::{AccessToken, Api, FetchError, Leave, Scope, ScopesTold};
use crate::storage::{Ended, Ending, LeftGrant, NewAccount, NewGrant, OAuthState};
use crate::telemetry;
use crate::vault;

/// A provider that is told that we leave has this long to answer: somebody waits, and nothing depends on it.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);
/// Grants refreshed by one look, one after the other: a thousand that are due at once are spread over hours.
const KEPT_AT_ONCE: i64 = 20;
/// A grant that could not be refreshed is tried again after this.
const KEEP_AGAIN: Duration = Duration::from_secs(3600);

/// In an address that people may be sent to: the id of the user who is connected.
const USER_ID: &str = "{user_id}";

/// Why nobody was connected. Words for people, without any secret.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody began this visit, or it is over.
    #[error("Invalid or expired state parameter")]
    UnknownState,
    /// The visit was to another provider. It is over now.
    #[error("Provider mismatch in state")]
    WrongProvider,
    /// Nobody knows this user any more.
    #[error("the user was removed meanwhile")]
    UnknownUser,
    /// That is no place to send people to.
    #[error("redirect_uri is not among the addresses that people may be sent to: add it to WEARSYNC_REDIRECT_URIS")]
    Redirect,
    /// The provider took nothing.
    #[error("Failed to exchange authorization code: {0}")]
    Refused(String),
    /// The provider cannot be asked.
    #[error("Token exchange failed: {0}")]
    Unreachable(String),
    /// The person allowed too little.
    #[error("{0}")]
    NothingToRead(String),
    /// Ours.
    #[error(transparent)]
    Internal(#[from] Error),
}

impl From<crate::storage::Error> for ConnectError {
    fn from(error: crate::storage::Error) -> Self {
        Self::Internal(error.into())
    }
}

impl From<TokenError> for ConnectError {
    fn from(error: TokenError) -> Self {
        match error {
            TokenError::Refused { detail, .. } => Self::Refused(detail),
            TokenError::Transient { detail, .. } => Self::Unreachable(detail),
        }
    }
}

/// The way to a provider's consent page.
#[derive(Debug)]
pub struct Visit {
    /// Where the person agrees; holds the state.
    pub authorization_url: String,
    /// Comes back with the person.
    pub state: SecretString,
    /// The other half of the PKCE challenge, where the provider takes one.
    pub verifier: Option<SecretString>,
}

/// Somebody is connected.
#[derive(Clone, Debug)]
pub struct Connected {
    /// Who.
    pub user: UserId,
    /// With what.
    pub connection: ConnectionId,
    /// To whose account.
    pub owner: Owner,
    /// What we asked for in vain.
    pub missing: Vec<&'static Scope>,
}

/// Makes a way to the consent page that nobody has noted yet.
///
/// # Errors
/// When the provider is not set up.
pub fn prepare_visit(setup: &ProviderSetup, callback_url: &str) -> Result<Visit, Error> {
    let app = app(setup)?;
    let state = oauth::random_secret();
    let verifier = app.oauth.pkce.then(oauth::random_secret);
    let url = oauth::authorize_url(app, callback_url, &state, verifier.as_ref())
        .map_err(|error| Error::Settings(format!("{}: the authorize address is none: {error}", setup.spec().title)))?;
    Ok(Visit { authorization_url: url.into(), state, verifier })
}

/// Where providers send people back to.
fn callback_url(engine: &Engine, setup: &ProviderSetup) -> String {
    format!("{}/api/v1/oauth/{}/callback", engine.config.public_url, setup.spec().name)
}

/// Begins a visit: noted, with the digest of its state, for as long as the settings say.
///
/// # Errors
/// [`ConnectError::Redirect`]; or the provider is not set up, or the database fails.
pub async fn begin_visit(
    engine: &Engine,
    setup: &ProviderSetup,
    user: UserId,
    redirect_uri: Option<&str>,
) -> Result<Visit, ConnectError> {
    let redirect_uri = match redirect_uri {
        Some(uri) if uri == success_url(engine) => None,
        Some(uri) if may_redirect(engine, user, uri) => Some(uri.to_owned()),
        Some(_) => return Err(ConnectError::Redirect),
        None => None,
    };
    let callback_url = callback_url(engine, setup);
    let visit = prepare_visit(setup, &callback_url)?;
    let now = engine.now();
    let hash = vault::hash_secret(visit.state.expose_secret());
    let verifier = visit.verifier.as_ref().map(|verifier| engine.vault.seal(&verifier_aad(&hash), verifier));
    let provider = setup.spec().name.0.to_owned();
    let expires_at = engine.after(engine.config.oauth_state_life);
    let row = OAuthState { provider, user_id: user, redirect_uri, callback_url, verifier, expires_at };
    engine.db.insert_oauth_state(hash, row, now).await?;
    Ok(visit)
}

/// Our own page after connecting.
fn success_url(engine: &Engine) -> String {
    format!("{}/api/v1/oauth/success", engine.config.public_url)
}

/// Letter by letter, once the user's id stands where the list leaves room for it.
fn may_redirect(engine: &Engine, user: UserId, uri: &str) -> bool {
    let user = user.to_string();
    engine.config.redirect_uris.iter().any(|allowed| allowed.replace(USER_ID, &user) == uri)
}

fn verifier_aad(hash: &[u8]) -> Vec<u8> {
    [b"verifier:", hash].concat()
}

/// A visit is over, however it ended: its state is good for nothing any more.
///
/// # Errors
/// When the database fails.
pub async fn end_visit(engine: &Engine, state: &SecretString) -> Result<(), Error> {
    engine.db.take_oauth_state(vault::hash_secret(state.expose_secret())).await?;
    Ok(())
}

/// Ends a visit with the code that came back: connects, and queues a first sync where the settings say so. Answers where
/// the person goes now, if not to our own page.
///
/// # Errors
/// [`ConnectError`]; the state is spent all the same.
pub async fn finish_visit(
    engine: &Engine,
    setup: &ProviderSetup,
    state: &SecretString,
    code: SecretString,
    scope: Option<&str>,
) -> Result<(Connected, Option<String>), ConnectError> {
    let hash = vault::hash_secret(state.expose_secret());
    let row = engine.db.take_oauth_state(hash.clone()).await?.ok_or(ConnectError::UnknownState)?;
    if row.expires_at <= engine.now() {
        return Err(ConnectError::UnknownState);
    }
    if row.provider != setup.spec().name.0 {
        return Err(ConnectError::WrongProvider);
    }
    let verifier = match &row.verifier {
        Some(sealed) => Some(engine.vault.open(&verifier_aad(&hash), sealed).map_err(Error::from)?),
        None => None,
    };
    let code = Code { code, verifier, callback_url: Some(row.callback_url) };
    let connected = connect_with_code(engine, setup, row.user_id, &code, scope, None).await?;
    if engine.config.sync_on_connect {
        first_sync(engine, setup, connected.connection).await?;
    }
    // The settings may have changed since the visit began.
    Ok((connected, row.redirect_uri.filter(|uri| may_redirect(engine, row.user_id, uri))))
}

/// Queues what a new connection reads first: everything, newest first, behind what people wait for.
///
/// # Errors
/// When the database fails. `None`: the connection ended meanwhile.
pub async fn first_sync(
    engine: &Engine,
    setup: &ProviderSetup,
    connection: ConnectionId,
) -> Result<Option<RunId>, Error> {
    let request = SyncRequest::default();
    let accepted = submit(engine, setup, connection, &request, Class::Schedule, RunSource::Backfill, None).await?;
    Ok(accepted.map(|accepted| accepted.id))
}

/// Exchanges a code, learns whose account it is and what was allowed, and connects. `scope`: as the callback told it.
///
/// # Errors
/// [`ConnectError`]; then nothing was changed here.
pub async fn connect_with_code(
    engine: &Engine,
    setup: &ProviderSetup,
    user: UserId,
    code: &Code,
    scope: Option<&str>,
    imported_hash: Option<Vec<u8>>,
) -> Result<Connected, ConnectError> {
    let (app, title) = (app(setup)?, setup.spec().title);
    let told = scope.filter(|_| app.oauth.scopes_told == ScopesTold::Callback).map(oauth::split_scopes);
    // Before the exchange, where it is known by then: a code that is not exchanged makes no grant.
    check_scopes(setup, app, told.as_deref())?;
    if engine.db.find_user(user).await?.is_none() {
        return Err(ConnectError::UnknownUser);
    }
    let mut grant = oauth::exchange(&engine.http, app, code, engine.now()).await?;
    if told.is_some() {
        grant.owner.scopes = told;
    }
    let token = AccessToken { secret: grant.access_token.clone(), version: 0, expires_at: grant.expires_at };
    let gate = RunGate::new(engine, setup, Class::Interactive);
    let api = Api { http: &engine.http, spec: setup.spec(), base_url: &setup.base_url, token: &token, gate: &gate };
    let owner = setup.provider.fetch_owner(&api, grant.owner, user).await.map_err(|error| match error {
        FetchError::Quota { .. } | FetchError::Transient { .. } => {
            ConnectError::Unreachable(format!("{title} did not say whose account it is: {error}"))
        }
        error => ConnectError::Refused(format!("{title} did not say whose account it is: {error}")),
    })?;
    check_scopes(setup, app, owner.scopes.as_deref())?;
    let Some(id) = owner.id.clone() else {
        return Err(ConnectError::Refused(format!("{title} did not say whose account it is")));
    };
    let Some(refresh_token) = grant.refresh_token else {
        return Err(ConnectError::Refused(format!("{title} gave no refresh token for this code")));
    };
    let missing = owner.scopes.as_deref().map(|granted| app.oauth.missing(granted)).unwrap_or_default();
    let new = NewAccount {
        id: AccountId::new(),
        provider: setup.spec().name.0.to_owned(),
        client_id: app.client_id.clone(),
        provider_user_id: id,
        imported_hash,
    };
    let account = engine.db.upsert_account(new, engine.now()).await?.id;
    let bring = Bring { refresh_token: &refresh_token, owner: Some(&owner), access: Some(token) };
    let connection = store_grant(engine, setup, user, account, bring).await?;
    Ok(Connected { user, connection, owner, missing })
}

fn check_scopes(setup: &ProviderSetup, app: &App, granted: Option<&[String]>) -> Result<(), ConnectError> {
    match granted {
        Some(granted) if !app.oauth.can_read(granted) => Err(ConnectError::NothingToRead(format!(
            "{} was not allowed to give us anything to read: connect again and leave {} ticked",
            setup.spec().title,
            app.oauth.reads_with.join(" or ")
        ))),
        _ => Ok(()),
    }
}

/// A grant on its way to its account.
pub(crate) struct Bring<'a> {
    pub(crate) refresh_token: &'a SecretString,
    pub(crate) owner: Option<&'a Owner>,
    /// Comes with a code: the first sync needs no refresh.
    pub(crate) access: Option<AccessToken>,
}

/// Seals a grant, stores it and connects the user with its account, in one transaction.
pub(crate) async fn store_grant(
    engine: &Engine,
    setup: &ProviderSetup,
    user: UserId,
    account: AccountId,
    bring: Bring<'_>,
) -> Result<ConnectionId, Error> {
    let name = setup.spec().name;
    let now = engine.now();
    let grant = NewGrant {
        sealed: engine.vault.seal(&token_aad("refresh", account), bring.refresh_token),
        scopes: bring.owner.and_then(|owner| owner.scopes.as_ref()).map(|scopes| scopes.join(" ")),
        username: bring.owner.and_then(|owner| owner.username.clone()),
        renew_at: renew_at(app(setup)?, now),
        with_access: bring.access.is_some(),
    };
    let connected = engine.db.connect_with(user, account, name.0, Some(grant), now).await?;
    // Runs of a connection to another account may have been cancelled.
    engine.tell_news(user).await;
    telemetry::connected(name, connected.connection);
    if let Some(access) = bring.access {
        engine.keep_token(account, AccessToken { version: connected.token_version, ..access }).await;
    }
    give_back(engine, connected.left).await;
    Ok(connected.connection)
}

/// When a grant that nobody uses is refreshed: around half of what the provider allows, spread over a fifth of it.
pub(crate) fn renew_at(app: &App, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
    let limit = app.oauth.idle_limit?;
    let share = rand::rng().random_range(0.4..0.6);
    Some(now + chrono::Duration::from_std(limit.mul_f64(share)).ok()?)
}

/// Ends a user's connection: work in flight is refused from now on, its grant goes if nobody else uses it, and the
/// provider is told then, as far as it answers. What is stored stays. `None`: there was none.
///
/// # Errors
/// When the database fails.
pub async fn disconnect(engine: &Engine, user: UserId, provider: &str) -> Result<Option<ConnectionId>, Error> {
    let Some(ended) = engine.db.end_connection(user, provider, Ending::Asked, None, engine.now()).await? else {
        return Ok(None);
    };
    engine.tell_news(user).await;
    telemetry::disconnected(provider_name(engine, provider), ended.connection, "disconnected");
    give_back(engine, ended.left).await;
    Ok(Some(ended.connection))
}

/// The same, and everything that the user has of this provider goes with it: rows at once, files by whoever owns them.
///
/// # Errors
/// When the database or the folder fails.
pub async fn purge(engine: &Engine, user: UserId, provider: &str) -> Result<Option<ConnectionId>, Error> {
    let Some(ended) = purge_rows(engine, user, provider, Ending::Asked).await? else { return Ok(None) };
    telemetry::disconnected(provider_name(engine, provider), ended.connection, "purged");
    give_back(engine, ended.left).await;
    Ok(Some(ended.connection))
}

/// Ends the connections whose grant the provider itself refused: a person took it back there. Under `delete` what is stored
/// goes with them, wherever it was found out. Under `keep` nothing is in a hurry: they end when the provider said so
/// (`noticed`), and are otherwise left to be connected again. Of one account, or of all. Answers how many ended.
///
/// # Errors
/// When the database or the folder fails.
pub(crate) async fn end_refused(engine: &Engine, account: Option<AccountId>, noticed: bool) -> Result<usize, Error> {
    let purges = engine.config.on_deauthorize == OnDeauthorize::Delete;
    if !purges && !noticed {
        return Ok(0);
    }
    let mut count = 0;
    for (user, provider) in engine.db.list_refused(account).await? {
        let ended = if purges {
            purge_rows(engine, user, &provider, Ending::Refused).await?
        } else {
            engine.db.end_connection(user, &provider, Ending::Refused, None, engine.now()).await?
        };
        let Some(ended) = ended else { continue };
        count += 1;
        engine.tell_news(user).await;
        telemetry::disconnected(provider_name(engine, &provider), ended.connection, "deauthorized");
        give_back(engine, ended.left).await;
    }
    Ok(count)
}

async fn purge_rows(engine: &Engine, user: UserId, provider: &str, why: Ending) -> Result<Option<Ended>, Error> {
    let Some(setup) = engine.provider(provider) else { return Ok(None) };
    let Some(found) = engine.db.find_user(user).await? else { return Ok(None) };
    let folders = folders_of(engine, &found, setup).await?;
    let Some(ended) = engine.db.end_connection(user, provider, why, Some(&folders), engine.now()).await? else {
        return Ok(None);
    };
    remove_erased(engine).await?;
    if engine.config.export_flat {
        // Other providers' files stood in the same folders, and come back as they were.
        for view in engine.db.list_connections(Some(user)).await? {
            engine.db.mark_all_exports(view.connection.id).await?;
        }
    }
    Ok(Some(ended))
}

fn provider_name(engine: &Engine, provider: &str) -> &'static str {
    engine.provider(provider).map_or("unknown", |setup| setup.spec().name.0)
}

/// Gives grants back that nobody uses any more. They are gone here already: a provider that does not answer keeps one
/// that leads nowhere.
pub(crate) async fn give_back(engine: &Engine, left: Vec<LeftGrant>) {
    for grant in left {
        engine.forget_token(grant.account, grant.version).await;
        let told = tokio::time::timeout(LEAVE_LIMIT, leave(engine, &grant)).await;
        let told = told.unwrap_or_else(|_| Err("it did not answer in time".to_owned()));
        telemetry::grant_left(provider_name(engine, &grant.provider), grant.account, told.as_ref().err());
    }
}

/// Tells one provider. The error is for the log: no secret is in it.
async fn leave(engine: &Engine, grant: &LeftGrant) -> Result<(), String> {
    // Nobody knows yet whose it was: most likely the person's who is connected anew, and to give it back would end all that
    // the person has granted, the new grant with it.
    if grant.provider_user_id.starts_with("pending:") {
        return Ok(());
    }
    let Some(setup) = engine.provider(&grant.provider) else { return Ok(()) };
    let Some(app) = setup.app.as_ref().filter(|app| app.client_id == grant.client_id) else {
        return Err(format!("it was given to application {}, which is not the one set", grant.client_id));
    };
    let token = engine.vault.open(&token_aad("refresh", grant.account), &grant.sealed).map_err(|e| e.to_string())?;
    match (app.oauth.leave, &app.revoke_url) {
        (Leave::Never, _) | (Leave::Revoke(_), None) => Ok(()),
        (Leave::Revoke(_), Some(url)) => {
            oauth::revoke(&engine.http, app, url, &token).await.map_err(|error| error.to_string())
        }
        (Leave::Call, _) => {
            let Grant { access_token, expires_at, .. } =
                oauth::refresh(&engine.http, app, &token, engine.now()).await.map_err(|error| error.to_string())?;
            let token = AccessToken { secret: access_token, version: grant.version, expires_at };
            let gate = RunGate::new(engine, setup, Class::Interactive);
            let (http, spec, base_url) = (&engine.http, setup.spec(), &setup.base_url);
            let api = Api { http, spec, base_url, token: &token, gate: &gate };
            let told = setup.provider.deregister(&api, app, &grant.provider_user_id).await;
            told.map_err(|error| error.to_string())
        }
    }
}

/// Refreshes grants that would lie idle for too long. Each is taken by one process; one that fails is due again later.
/// Then looks after those that were refused, here or wherever: who found it out may have ended before it was acted on.
///
/// # Errors
/// When the database fails.
pub async fn keep_grants(engine: &Engine) -> Result<usize, Error> {
    let accounts = engine.db.take_idle_grants(engine.now(), engine.after(KEEP_AGAIN), KEPT_AT_ONCE).await?;
    let mut kept = 0;
    for account in accounts {
        let Some(setup) = engine.provider(&account.provider) else { continue };
        if engine.stop.is_cancelled() {
            break;
        }
        match engine.access_token(setup, account.id, account.token_version).await {
            Ok(_) => kept += 1,
            Err(error) => tracing::warn!(account = %account.id, %error, "an idle grant could not be refreshed"),
        }
    }
    end_refused(engine, None, false).await?;
    Ok(kept)
}

/// The state that came back, compared without telling by the time it takes how much of it is right.
#[must_use]
pub fn is_same(left: &SecretString, right: &str) -> bool {
    // Digests of equal length, of something that nobody can steer.
    vault::hash_secret(left.expose_secret()) == vault::hash_secret(right)
}

/// What a page of [`result_page`] may do: nothing.
pub const PAGE_POLICY: &str = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A page for whoever comes back from a provider: a heading and words, all of them escaped.
#[must_use]
pub fn result_page(title: &str, words: &[String]) -> String {
    let title = escape(title);
    let words: String = words.iter().map(|words| format!("<p>{}</p>\n", escape(words))).collect();
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta name=\"referrer\" content=\"no-referrer\">\n<title>{title}</title>\n</head>\n\
         <body>\n<h1>{title}</h1>\n{words}</body>\n</html>\n"
    )
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}
