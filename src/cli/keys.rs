//! `wearsync keys`: who may call the API.

use chrono::Duration;
use clap::{Args, Subcommand, ValueEnum};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use uuid::Uuid;

use super::Session;
use super::exit::{Exit, Outcome, usage};
use super::output::{iso, remark, table, time, time_or_dash};
use crate::clock::Clock;
use crate::storage::{ApiKey, Db, NewApiKey};
use crate::vault;

/// Characters of the secret that are kept to tell keys apart; the 33 others are too many to guess.
const PREFIX: usize = 10;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a key; prints its secret, this once
    Create(Create),
    /// List all keys, the newest first; secrets are not kept and cannot be shown
    List,
    /// End a key at once
    Revoke {
        /// Its id, as listed
        id: Uuid,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// What it is for
    #[arg(long)]
    name: String,
    /// What it may do
    #[arg(long, value_delimiter = ',', default_value = "sync,read")]
    scopes: Vec<Scope>,
    /// When it ends: 30d, 12h, 90m; without it, never
    #[arg(long, value_name = "TIME", value_parser = parse_life)]
    expires_in: Option<Duration>,
    /// Do nothing if there is any key already
    #[arg(long)]
    if_none: bool,
}

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Scope {
    /// Start and cancel syncs
    Sync,
    /// Read
    Read,
    /// Everything
    Admin,
}

impl Scope {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Sync, Self::Read, Self::Admin];

    fn word(self) -> &'static str {
        match self {
            Self::Sync => "sync",
            Self::Read => "read",
            Self::Admin => "admin",
        }
    }
}

pub(crate) async fn run(session: &Session, command: Command) -> Outcome {
    let app = session.open().await?;
    let (db, clock) = (&app.engine.db, &app.engine.clock);
    match command {
        Command::Create(new) => {
            if new.if_none && !db.list_api_keys().await?.is_empty() {
                remark("there is a key already: none was made");
            } else {
                let (key, secret) = make(db, clock, &new.name, &new.scopes, new.expires_in).await?;
                let mut answer = key_json(&key);
                answer["key"] = json!(secret);
                session.out.show(&answer, || secret)?;
                remark("keep it: only its digest is stored, and it is not shown again");
            }
        }
        Command::List => {
            let keys = db.list_api_keys().await?;
            session.out.show(&keys.iter().map(key_json).collect::<Vec<_>>(), || {
                let now = clock.now();
                let rows: Vec<Vec<String>> = keys
                    .iter()
                    .map(|key| {
                        let state = match key.revoked_at {
                            Some(at) => format!("revoked {}", time(at)),
                            None if !key.is_valid(now) => "expired".to_owned(),
                            None => "valid".to_owned(),
                        };
                        vec![
                            key.id.to_string(),
                            format!("{}…", key.prefix),
                            key.name.clone(),
                            key.scopes.clone(),
                            state,
                            time(key.created_at),
                            key.expires_at.map_or_else(|| "never".to_owned(), time),
                            time_or_dash(key.last_used_at),
                        ]
                    })
                    .collect();
                let head = ["ID", "KEY", "NAME", "SCOPES", "STATE", "CREATED", "EXPIRES", "LAST USED"];
                table(&head, &rows, "no keys: `wearsync keys create --name …` makes one")
            })?;
        }
        Command::Revoke { id } => {
            if !db.revoke_api_key(id, clock.now()).await? {
                return Err(usage(format!("no key has the id {id}: `wearsync keys list` shows them")));
            }
            session.out.show(&json!({ "id": id, "revoked": true }), || format!("revoked {id}"))?;
        }
    }
    app.close().await;
    Ok(Exit::Done)
}

/// Makes a key and answers it with its secret, which nobody can show again.
pub(crate) async fn make(
    db: &Db,
    clock: &Clock,
    name: &str,
    scopes: &[Scope],
    life: Option<Duration>,
) -> anyhow::Result<(ApiKey, String)> {
    let secret = vault::new_api_key();
    let secret = secret.expose_secret();
    let now = clock.now();
    let mut scopes = scopes.to_vec();
    scopes.sort_unstable();
    scopes.dedup();
    let new = NewApiKey {
        hash: vault::hash_secret(secret),
        prefix: secret.chars().take(PREFIX).collect(),
        name: name.to_owned(),
        scopes: scopes.iter().map(|scope| scope.word()).collect::<Vec<_>>().join(","),
        expires_at: life.map(|life| now + life),
    };
    Ok((db.insert_api_key(new, now).await?, secret.to_owned()))
}

fn key_json(key: &ApiKey) -> Value {
    json!({
        "id": key.id,
        "prefix": key.prefix,
        "name": key.name,
        "scopes": key.scopes.split(',').collect::<Vec<_>>(),
        "created_at": iso(key.created_at),
        "expires_at": key.expires_at.map(iso),
        "revoked_at": key.revoked_at.map(iso),
        "last_used_at": key.last_used_at.map(iso),
    })
}

/// Reads `30d`, `12h`, `90m`, `45s`; at most ten years.
fn parse_life(text: &str) -> Result<Duration, String> {
    let form = || format!("`{text}` is no time: write 30d, 12h, 90m or 45s, at most 3650d");
    let unit = text.chars().last().ok_or_else(form)?;
    let seconds = match unit {
        'd' => 86_400,
        'h' => 3600,
        'm' => 60,
        's' => 1,
        _ => return Err(form()),
    };
    let number: i64 = text.strip_suffix(unit).and_then(|digits| digits.parse().ok()).ok_or_else(form)?;
    let seconds = number.checked_mul(seconds).filter(|s| (1..=3650 * 86_400).contains(s)).ok_or_else(form)?;
    Ok(Duration::seconds(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_of_keys() {
        for (text, seconds) in [("30d", 2_592_000), ("12h", 43_200), ("90m", 5400), ("45s", 45)] {
            assert_eq!(parse_life(text), Ok(Duration::seconds(seconds)));
        }
        for text in ["", "d", "30", "0d", "-1d", "1.5h", "3651d", "99999999999999999d", "1ä"] {
            assert!(parse_life(text).is_err(), "{text}");
        }
    }
}
