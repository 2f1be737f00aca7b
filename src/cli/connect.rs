//! `wearsync connect`: a browser, a listener on this machine, and the code that comes back to it.

use std::net::Ipv4Addr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use clap::Args;
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::Session;
use super::connections::find_provider;
use super::exit::{Exit, Outcome, usage};
use super::output::{facts, remark, span};
use super::signals;
use super::users::Whose;
use crate::model::{RunId, UserId};
use crate::providers::oauth::Code;
use crate::sync::{self, ConnectError, Connected, Engine, ProviderSetup, Visit};

#[derive(Debug, Args)]
pub(crate) struct Connect {
    /// Provider, for example `strava`
    provider: String,
    #[command(flatten)]
    whose: Whose,
    /// Print the address to open instead of opening a browser
    #[arg(long)]
    no_browser: bool,
    /// Port on 127.0.0.1 that the browser comes back to; 0 takes a free one
    #[arg(long, default_value_t = 0)]
    port: u16,
}

/// What the browser came back with.
#[derive(Deserialize)]
struct Callback {
    #[serde(default)]
    state: String,
    code: Option<String>,
    scope: Option<String>,
    error: Option<String>,
}

/// A page's heading and words.
type Page = (&'static str, Vec<String>);

/// Somebody came back with the right state; the page waits for what it is to say.
struct Arrived {
    callback: Callback,
    page: oneshot::Sender<Page>,
}

struct Door {
    state: SecretString,
    arrived: mpsc::Sender<Arrived>,
}

pub(crate) async fn run(session: &Session, arguments: Connect) -> Outcome {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, arguments.port)).await.map_err(|error| {
        usage(format!("cannot listen on 127.0.0.1:{} ({error}): choose another with --port", arguments.port))
    })?;
    let callback_url = format!("http://{}/callback", listener.local_addr()?);

    // Opened twice: who thinks over whether to agree must not keep a server from starting.
    let app = session.open().await?;
    let engine = &app.engine;
    let title = find_provider(engine, &arguments.provider)?.spec().title;
    let visit = sync::prepare_visit(find_provider(engine, &arguments.provider)?, &callback_url)?;
    // Whoever is the first here is made a user when it is known that they agree.
    let first = arguments.whose.user.is_none() && engine.db.count_users().await? == 0;
    let user = if first { None } else { Some(arguments.whose.find(&engine.db).await?.id) };
    let (life, queues) = (engine.config.oauth_state_life, engine.config.sync_on_connect);
    app.close().await;
    drop(app);

    let Visit { authorization_url, state, verifier } = visit;
    let (arrived, mut arrivals) = mpsc::channel(1);
    let door = Arc::new(Door { state, arrived });
    let router = Router::new().route("/callback", get(come_in)).with_state(door);
    let shut = CancellationToken::new();
    let serving = tokio::spawn({
        let shut = shut.clone();
        axum::serve(listener, router).with_graceful_shutdown(async move { shut.cancelled().await }).into_future()
    });
    let stop = CancellationToken::new();
    signals::stop_on_signal(stop.clone())?;

    if arguments.no_browser || open::that_detached(&authorization_url).is_err() {
        remark(&format!("open this address in a browser on this machine, and agree:\n\n  {authorization_url}\n"));
    } else {
        remark(&format!("{title} asks in your browser; if none opens, end this and take --no-browser"));
    }
    let arrival = tokio::select! {
        arrival = arrivals.recv() => arrival,
        () = tokio::time::sleep(life) => None,
        () = stop.cancelled() => anyhow::bail!("ended before anybody agreed: nothing was changed"),
    };
    let outcome = match arrival {
        None => Err(anyhow::anyhow!("nobody agreed within {}: nothing was changed; start again", span(life.as_secs()))),
        Some(Arrived { callback, page }) => {
            let code = code_of(callback, verifier, callback_url, title);
            let outcome = match code {
                Ok((code, scope)) => finish(session, &arguments, user, queues, &code, scope.as_deref()).await,
                Err(error) => Err(error),
            };
            // The window may be closed already.
            let _ = page.send(words(title, &outcome));
            outcome
        }
    };
    shut.cancel();
    // A browser that keeps its connection open is not waited for.
    let _ = tokio::time::timeout(std::time::Duration::from_secs(2), serving).await;
    let (connected, task) = outcome?;
    show(session, title, &arguments.provider, &connected, task)
}

/// A callback with another state is told so, and the right one is waited for: anybody on this machine can knock.
async fn come_in(State(door): State<Arc<Door>>, Query(callback): Query<Callback>) -> Response {
    if !sync::is_same(&door.state, &callback.state) {
        remark("somebody came back with a state that is not ours; still waiting");
        let words = vec!["This visit was not begun here, or is over. Begin again with `wearsync connect`.".to_owned()];
        return (StatusCode::BAD_REQUEST, page("Not connected", &words)).into_response();
    }
    let (send, wait) = oneshot::channel();
    let (title, words) = match door.arrived.try_send(Arrived { callback, page: send }) {
        Ok(()) => wait.await.unwrap_or_else(|_| ("Not connected", vec!["It was ended.".to_owned()])),
        Err(_) => ("Not connected", vec!["This visit is over.".to_owned()]),
    };
    page(title, &words)
}

fn page(title: &str, words: &[String]) -> Response {
    let headers = [
        (HeaderName::from_static("content-security-policy"), sync::PAGE_POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, Html(sync::result_page(title, words))).into_response()
}

fn code_of(
    callback: Callback,
    verifier: Option<SecretString>,
    callback_url: String,
    title: &str,
) -> anyhow::Result<(Code, Option<String>)> {
    match (callback.error, callback.code) {
        (Some(error), _) if error == "access_denied" => {
            anyhow::bail!("you did not agree at {title}: nothing was changed")
        }
        (Some(error), _) => {
            let error: String = error.chars().filter(|c| !c.is_control()).take(100).collect();
            anyhow::bail!("{title} sent the browser back with `{error}`: nothing was changed")
        }
        (None, None) => anyhow::bail!("{title} sent the browser back without a code: nothing was changed"),
        (None, Some(code)) => {
            let code = SecretString::from(code);
            Ok((Code { code, verifier, callback_url: Some(callback_url) }, callback.scope))
        }
    }
}

/// The run of a first sync, where one was queued.
type Task = Option<RunId>;

async fn finish(
    session: &Session,
    arguments: &Connect,
    user: Option<UserId>,
    queues: bool,
    code: &Code,
    scope: Option<&str>,
) -> anyhow::Result<(Connected, Task)> {
    let app = session.open().await?;
    let engine: &Engine = &app.engine;
    let setup = find_provider(engine, &arguments.provider)?;
    let user = match user {
        Some(user) => user,
        None => sync::only_user(engine).await?.ok_or_else(|| usage("somebody made users meanwhile: start again"))?.id,
    };
    let connected = connect(engine, setup, user, code, scope).await;
    let done = match connected {
        Ok(connected) if queues => {
            let task = sync::first_sync(engine, setup, connected.connection).await?;
            Ok((connected, task))
        }
        Ok(connected) => Ok((connected, None)),
        Err(error) => Err(error),
    };
    app.close().await;
    done
}

async fn connect(
    engine: &Engine,
    setup: &ProviderSetup,
    user: UserId,
    code: &Code,
    scope: Option<&str>,
) -> anyhow::Result<Connected> {
    match sync::connect_with_code(engine, setup, user, code, scope, None).await {
        Ok(connected) => Ok(connected),
        Err(ConnectError::Internal(error)) => Err(error.into()),
        Err(error) => Err(anyhow::Error::from(error).context("nothing was changed")),
    }
}

fn words(title: &str, outcome: &anyhow::Result<(Connected, Task)>) -> Page {
    match outcome {
        Ok(_) => ("Connected", vec![format!("{title} sends your data here from now on. You can close this window.")]),
        Err(error) => ("Not connected", vec![super::exit::words(error)]),
    }
}

fn show(session: &Session, title: &str, provider: &str, connected: &Connected, task: Task) -> Outcome {
    let owner = &connected.owner;
    let missing: Vec<&str> = connected.missing.iter().map(|scope| scope.name).collect();
    let answer = json!({
        "id": connected.connection,
        "user_id": connected.user,
        "provider": provider,
        "provider_user_id": owner.id,
        "provider_username": owner.username,
        "scopes": owner.scopes,
        "missing_scopes": missing,
        "task_id": task,
    });
    session.out.show(&answer, || {
        let account = match (&owner.id, &owner.username) {
            (Some(id), Some(name)) => Some(format!("{id} ({name})")),
            (Some(id), None) => Some(id.clone()),
            _ => None,
        };
        facts(&[
            ("connected", Some(title.to_owned())),
            ("account", account),
            ("granted", owner.scopes.as_ref().map(|scopes| scopes.join(", "))),
        ])
    })?;
    for scope in &connected.missing {
        remark(&format!("not allowed: {} ({}); connect again to allow it", scope.lets, scope.name));
    }
    remark(&match task {
        Some(id) => format!(
            "the first sync is queued as {id}: a running `wearsync serve` works on it, or `wearsync sync {provider}`"
        ),
        None => format!("next: wearsync sync {provider}"),
    });
    Ok(Exit::Done)
}
