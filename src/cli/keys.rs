//! `wearsync keys`: who may call the API.

use std::ops::RangeInclusive;

use chrono::Duration;
use clap::{Args, Subcommand, ValueEnum};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use uuid::Uuid;

use super::Session;
use super::exit::{Exit, Outcome, usage};
use super::output::{iso, remark, table, time, time_or_dash};
use crate::api::{OVERLAP_MOST_S, key_name};
use crate::clock::Clock;
use crate::storage::{ApiKey, Db, NewApiKey, NextApiKey};
use crate::vault;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a key; prints its secret, this once
    Create(Create),
    /// List all keys, the newest first; secrets are not kept and cannot be shown
    List,
    /// Give a key another name
    Rename {
        /// Its id, as listed
        id: Uuid,
        /// What it is for
        #[arg(long, value_parser = key_name)]
        name: String,
    },
    /// Make a key that takes another one's place, with its name and scopes; prints its secret, this once
    Rotate {
        /// Its id, as listed
        id: Uuid,
        /// How long the old key goes on working: 24h, 30m, 7d, or 0s; at most 30d
        #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_overlap)]
        overlap: Duration,
    },
    /// End a key at once
    Revoke {
        /// Its id, as listed
        id: Uuid,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// What it is for
    #[arg(long, value_parser = key_name)]
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
                            None if key.retires_at.is_some_and(|at| at <= now) => "replaced".to_owned(),
                            None if !key.is_valid(now) => "expired".to_owned(),
                            None => {
                                key.retires_at.map_or_else(|| "valid".to_owned(), |at| format!("until {}", time(at)))
                            }
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
        Command::Rename { id, name } => {
            let key = db.rename_api_key(id, Some(name)).await?.ok_or_else(|| unknown(id))?;
            session.out.show(&key_json(&key), || format!("{id} is now {}", key.name))?;
        }
        Command::Rotate { id, overlap } => {
            let secret = vault::new_api_key();
            let now = clock.now();
            let next = NextApiKey {
                hash: vault::hash_secret(secret.expose_secret()),
                prefix: vault::key_prefix(&secret),
                created_by: None,
                old_until: now + overlap,
            };
            let (key, old_until) = db.rotate_api_key(id, next, now).await?.ok_or_else(|| unknown(id))?;
            let mut answer = key_json(&key);
            answer["key"] = json!(secret.expose_secret());
            session.out.show(&answer, || secret.expose_secret().to_owned())?;
            let works = old_until > now;
            let old = if works { format!("works until {}", time(old_until)) } else { "works no longer".to_owned() };
            remark(&format!("keep it: it is not shown again; the old key {old}"));
        }
        Command::Revoke { id } => {
            if db.revoke_api_key(id, clock.now()).await?.is_none() {
                return Err(unknown(id));
            }
            session.out.show(&json!({ "id": id, "revoked": true }), || format!("revoked {id}"))?;
        }
    }
    app.close().await;
    Ok(Exit::Done)
}

fn unknown(id: Uuid) -> anyhow::Error {
    usage(format!("no key that works has the id {id}: `wearsync keys list` shows them"))
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
    let now = clock.now();
    let mut scopes = scopes.to_vec();
    scopes.sort_unstable();
    scopes.dedup();
    let new = NewApiKey {
        hash: vault::hash_secret(secret.expose_secret()),
        prefix: vault::key_prefix(&secret),
        name: name.to_owned(),
        scopes: scopes.iter().map(|scope| scope.word()).collect::<Vec<_>>().join(","),
        created_by: None,
        expires_at: life.map(|life| now + life),
    };
    Ok((db.insert_api_key(new, now).await?, secret.expose_secret().to_owned()))
}

fn key_json(key: &ApiKey) -> Value {
    json!({
        "id": key.id,
        "prefix": key.prefix,
        "name": key.name,
        "scopes": key.scopes.split(',').collect::<Vec<_>>(),
        "created_at": iso(key.created_at),
        "expires_at": key.expires_at.map(iso),
        "retires_at": key.retires_at.map(iso),
        "revoked_at": key.revoked_at.map(iso),
        "last_used_at": key.last_used_at.map(iso),
    })
}

/// Reads `30d`, `12h`, `90m`, `45s`; at most ten years.
fn parse_life(text: &str) -> Result<Duration, String> {
    parse_time(text, 1..=3650 * 86_400, "3650d")
}

/// The same from nothing to 30 days.
fn parse_overlap(text: &str) -> Result<Duration, String> {
    parse_time(text, 0..=OVERLAP_MOST_S, "30d")
}

fn parse_time(text: &str, range: RangeInclusive<i64>, most: &str) -> Result<Duration, String> {
    let form = || format!("`{text}` is no time: write 30d, 12h, 90m or 45s, at most {most}");
    let unit = text.chars().last().ok_or_else(form)?;
    let seconds = match unit {
        'd' => 86_400,
        'h' => 3600,
        'm' => 60,
        's' => 1,
        _ => return Err(form()),
    };
    let number: i64 = text.strip_suffix(unit).and_then(|digits| digits.parse().ok()).ok_or_else(form)?;
    let seconds = number.checked_mul(seconds).filter(|s| range.contains(s)).ok_or_else(form)?;
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
        assert_eq!(parse_overlap("0s"), Ok(Duration::zero()));
        assert!(parse_overlap("31d").is_err() && parse_overlap("-1s").is_err());
        for text in ["", "d", "30", "0d", "-1d", "1.5h", "3651d", "99999999999999999d", "1ä"] {
            assert!(parse_life(text).is_err(), "{text}");
        }
    }
}
