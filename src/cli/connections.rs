//! `wearsync connections`: a user's account at a provider.

use std::io::{IsTerminal as _, Read as _};

use chrono::{DateTime, Utc};
use clap::{Args, Subcommand};
use secrecy::SecretString;
use serde_json::{Value, json};

use super::Session;
use super::exit::{Exit, Outcome, usage};
use super::output::{iso, remark, table, time, time_or_dash};
use super::users::Whose;
use crate::model::UserId;
use crate::storage::ConnectionView;
use crate::sync::{self, Engine, NewGrant, ProviderSetup};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Connect a user with a grant that you have; prints the connection's id
    Add(Add),
    /// List connections
    List(Whose),
    /// End a connection: its grant is given back and forgotten, what is stored stays
    Remove {
        #[command(flatten)]
        whose: Whose,
        /// Provider, for example `strava`
        #[arg(long)]
        provider: String,
        /// Erase what is stored of the user from this provider, rows and files
        #[arg(long)]
        purge: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Add {
    #[command(flatten)]
    whose: Whose,
    /// Provider, for example `strava`
    #[arg(long)]
    provider: String,
    #[command(flatten)]
    grant: Grant,
}

/// Secrets come by stdin: arguments can be read by everybody on the machine.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Grant {
    /// Read a refresh token from stdin
    #[arg(long)]
    refresh_token_stdin: bool,
    /// Read a fresh authorization code from stdin
    #[arg(long)]
    authorization_code_stdin: bool,
}

/// The provider of this name.
pub(crate) fn find_provider<'a>(engine: &'a Engine, name: &str) -> anyhow::Result<&'a ProviderSetup> {
    engine.provider(name).ok_or_else(|| {
        let known: Vec<&str> = engine.providers.keys().copied().collect();
        usage(format!("`{name}` is no provider; known are {}", known.join(", ")))
    })
}

/// How a user is connected (again).
pub(crate) fn add_command(user: UserId, provider: &str) -> String {
    format!("wearsync connect {provider} --user {user}")
}

pub(crate) async fn run(session: &Session, command: Command) -> Outcome {
    match command {
        Command::Add(new) => add(session, new).await,
        Command::List(whose) => list(session, whose).await,
        Command::Remove { whose, provider, purge } => remove(session, whose, &provider, purge).await,
    }
}

async fn add(session: &Session, new: Add) -> Outcome {
    // Before anything is opened: who thinks over what to paste must not keep a server from starting.
    let grant = read_grant(&new.grant).await?;
    let app = session.open().await?;
    let engine = &app.engine;
    let setup = find_provider(engine, &new.provider)?;
    let user = new.whose.find(&engine.db).await?;
    let id = sync::connect(engine, setup, user.id, &grant, None).await?;
    app.close().await;
    let answer = json!({ "id": id, "user_id": user.id, "provider": setup.spec().name });
    session.out.show(&answer, || id.to_string())?;
    remark(&format!("next: wearsync sync {}", setup.spec().name));
    Ok(Exit::Done)
}

async fn list(session: &Session, whose: Whose) -> Outcome {
    let app = session.open().await?;
    let user = whose.named(&app.engine.db).await?;
    let views = app.engine.db.list_connections(user.map(|user| user.id)).await?;
    app.close().await;
    session.out.show(&views.iter().map(view_json).collect::<Vec<_>>(), || {
        let rows: Vec<Vec<String>> = views.iter().map(view_row).collect();
        let head = ["ID", "USER", "PROVIDER", "STATUS", "ACCOUNT", "CREATED", "LAST SUCCESS", ""];
        table(&head, &rows, "no connections: `wearsync connections add` makes one")
    })?;
    Ok(Exit::Done)
}

async fn remove(session: &Session, whose: Whose, provider: &str, purge: bool) -> Outcome {
    let app = session.open().await?;
    let engine = &app.engine;
    let setup = find_provider(engine, provider)?;
    let user = whose.find(&engine.db).await?;
    let name = setup.spec().name.0;
    let removed =
        if purge { sync::purge(engine, user.id, name).await? } else { sync::disconnect(engine, user.id, name).await? };
    let files = engine.exporter.is_some();
    app.close().await;
    let Some(id) = removed else {
        anyhow::bail!("user {} has no connection to {}: there is nothing to remove", user.id, setup.spec().title);
    };
    session.out.show(&json!({ "id": id, "status": "revoked", "purged": purge }), || format!("removed {id}"))?;
    match (purge, files) {
        (false, _) => remark("what is stored stays; --purge erases it"),
        (true, true) => remark("what was stored is erased, with its files"),
        (true, false) => {
            remark("what was stored is erased; its files go with the next sweep of the process that owns them")
        }
    }
    Ok(Exit::Done)
}

async fn read_grant(grant: &Grant) -> anyhow::Result<NewGrant> {
    let what = if grant.refresh_token_stdin { "refresh token" } else { "authorization code" };
    if std::io::stdin().is_terminal() {
        remark(&format!("paste the {what}, then Enter and Ctrl-D"));
    }
    let text = tokio::task::spawn_blocking(|| {
        let mut text = String::new();
        // Far more than any token: a wrong file is noticed and not read to its end.
        std::io::stdin().lock().take(16 * 1024).read_to_string(&mut text).map(|_| text)
    })
    .await??;
    let text = text.trim();
    if text.is_empty() || text.contains(char::is_whitespace) {
        return Err(usage(format!("stdin holds no {what}: one word is expected and nothing else")));
    }
    let secret = SecretString::from(text.to_owned());
    Ok(if grant.refresh_token_stdin { NewGrant::RefreshToken(secret) } else { NewGrant::AuthorizationCode(secret) })
}

/// What a person needs to know of it: `active`, `reauth`, `revoked`.
fn status(view: &ConnectionView) -> &str {
    if view.connection.status == "active" { &view.account_status } else { &view.connection.status }
}

/// The provider's id of the person, once a call has told it.
fn person(view: &ConnectionView) -> Option<&str> {
    (!view.provider_user_id.starts_with("pending:")).then_some(&view.provider_user_id)
}

/// A connection that used to be pushed, for people.
pub(crate) fn quiet(since: DateTime<Utc>) -> String {
    format!("nothing was sent since {}: the provider is asked instead", time(since))
}

fn view_row(view: &ConnectionView) -> Vec<String> {
    let connection = &view.connection;
    vec![
        connection.id.to_string(),
        connection.user_id.to_string(),
        connection.provider.clone(),
        status(view).to_owned(),
        person(view).unwrap_or("not known yet").to_owned(),
        time(connection.created_at),
        time_or_dash(connection.last_success_at),
        view.account_reason.clone().or_else(|| view.quiet_since.map(quiet)).unwrap_or_default(),
    ]
}

fn view_json(view: &ConnectionView) -> Value {
    let connection = &view.connection;
    json!({
        "id": connection.id,
        "user_id": connection.user_id,
        "provider": connection.provider,
        "status": status(view),
        "reason": view.account_reason,
        "quiet_since": view.quiet_since.map(iso),
        "provider_user_id": person(view),
        "created_at": iso(connection.created_at),
        "last_success_at": connection.last_success_at.map(iso),
    })
}
