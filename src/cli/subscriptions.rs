//! `wearsync subscriptions`: what a provider is asked to send by itself.

use clap::Subcommand;
use serde_json::{Value, json};

use super::Session;
use super::connections::find_provider;
use super::exit::{Exit, Outcome};
use super::output::{remark, table};
use crate::sync;

const SECRET: &str = "the end of the address is what events are believed by: keep it to yourself";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Have the provider send its events here; the server has to be reachable while this runs
    Create {
        /// Provider, for example `strava`
        provider: String,
        /// Where the provider can reach the server, for example https://sync.example.org; without it `public_url`
        #[arg(long, value_name = "URL")]
        url: Option<String>,
    },
    /// Print the address to be entered at a provider that has no interface for subscriptions
    Address {
        /// Provider, for example `strava`
        provider: String,
        /// Where the provider can reach the server, for example https://sync.example.org; without it `public_url`
        #[arg(long, value_name = "URL")]
        url: Option<String>,
    },
    /// List what the provider has of us
    List {
        /// Provider, for example `strava`
        provider: String,
    },
    /// End a subscription
    Delete {
        /// Provider, for example `strava`
        provider: String,
        /// The provider's id of it, as listed
        id: String,
    },
}

pub(crate) async fn run(session: &Session, command: Command) -> Outcome {
    let app = session.open().await?;
    let engine = &app.engine;
    match command {
        Command::Create { provider, url } => {
            let setup = find_provider(engine, &provider)?;
            let url = sync::callback_url(engine, setup, url.as_ref().unwrap_or(&engine.config.public_url))?;
            let (done, made) = sync::subscribe(engine, setup, &url).await?;
            let answer = json!({ "id": made.external_id, "callback_url": url, "status": done.as_str() });
            session.out.show(&answer, || format!("{} {}", made.external_id, done.as_str()))?;
            remark(&format!("{} sends its events to {url}", setup.spec().title));
            remark(SECRET);
        }
        Command::Address { provider, url } => {
            let setup = find_provider(engine, &provider)?;
            let url = sync::callback_url(engine, setup, url.as_ref().unwrap_or(&engine.config.public_url))?;
            session.out.show(&json!({ "provider": setup.spec().name.0, "callback_url": url }), || url.clone())?;
            remark(SECRET);
        }
        Command::List { provider } => {
            let found = sync::list_subscriptions(engine, find_provider(engine, &provider)?).await?;
            let told: Vec<&Value> = found.iter().map(|one| &one.told).collect();
            session.out.show(&told, || {
                let rows: Vec<Vec<String>> =
                    found.iter().map(|one| vec![one.external_id.clone(), one.callback_url.clone()]).collect();
                table(&["ID", "ADDRESS"], &rows, "no subscription: `wearsync subscriptions create` makes one")
            })?;
        }
        Command::Delete { provider, id } => {
            sync::unsubscribe(engine, find_provider(engine, &provider)?, &id).await?;
            session.out.show(&json!({ "id": id, "status": "deleted" }), || format!("deleted {id}"))?;
        }
    }
    app.close().await;
    Ok(Exit::Done)
}
