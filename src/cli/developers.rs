//! `wearsync developers`: who runs this service and may log in.

use std::io::{IsTerminal as _, Read as _};

use clap::{Args, Subcommand};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};

use super::Session;
use super::exit::{Exit, Outcome, usage};
use super::init::hidden;
use super::output::{dash, iso, table, time};
use crate::api::{PASSWORD_LEAST, developer_email, person_name};
use crate::storage::{Developer, Error, NewDeveloper};
use crate::vault;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a developer; asks for the password
    Create(Create),
    /// List all developers, the oldest first
    List,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// The address to log in with
    #[arg(long, value_parser = developer_email)]
    email: String,
    #[arg(long, value_name = "NAME", value_parser = person_name)]
    first_name: Option<String>,
    #[arg(long, value_name = "NAME", value_parser = person_name)]
    last_name: Option<String>,
    /// Read the password from stdin instead of asking for it
    #[arg(long)]
    password_stdin: bool,
}

pub(crate) async fn run(session: &Session, command: Command) -> Outcome {
    match command {
        Command::Create(new) => create(session, new).await,
        Command::List => list(session).await,
    }
}

async fn create(session: &Session, new: Create) -> Outcome {
    let from_stdin = new.password_stdin;
    let password = tokio::task::spawn_blocking(move || read_password(from_stdin)).await??;
    let app = session.open().await?;
    let password_hash = tokio::task::spawn_blocking(move || vault::hash_password(&password)).await?;
    let new = NewDeveloper { email: new.email, first_name: new.first_name, last_name: new.last_name, password_hash };
    let developer = match app.engine.db.insert_developer(new, app.engine.clock.now()).await {
        Err(Error::Duplicate { .. }) => {
            return Err(usage("a developer has this e-mail already: `wearsync developers list` shows them"));
        }
        developer => developer?,
    };
    session.out.show(&developer_json(&developer), || developer.id.to_string())?;
    app.close().await;
    Ok(Exit::Done)
}

/// Never an argument: those can be read by everybody on the machine.
fn read_password(from_stdin: bool) -> anyhow::Result<SecretString> {
    let password = if from_stdin {
        let mut text = String::new();
        std::io::stdin().lock().take(16 * 1024).read_to_string(&mut text)?;
        SecretString::from(text.trim_end_matches(['\r', '\n']).to_owned())
    } else if std::io::stdin().is_terminal() {
        let password = SecretString::from(hidden("Password")?);
        if hidden("Password again")? != password.expose_secret() {
            return Err(usage("the two passwords differ: nothing was made"));
        }
        password
    } else {
        return Err(usage("there is no terminal to ask for the password: use --password-stdin"));
    };
    if password.expose_secret().chars().count() < PASSWORD_LEAST {
        return Err(usage(format!("the password needs at least {PASSWORD_LEAST} characters: nothing was made")));
    }
    Ok(password)
}

async fn list(session: &Session) -> Outcome {
    let app = session.open().await?;
    let developers = app.engine.db.list_developers().await?;
    app.close().await;
    session.out.show(&developers.iter().map(developer_json).collect::<Vec<_>>(), || {
        let rows: Vec<Vec<String>> = developers
            .iter()
            .map(|it| {
                let name: Vec<&str> =
                    [&it.first_name, &it.last_name].into_iter().flatten().map(String::as_str).collect();
                let name = if name.is_empty() { dash() } else { name.join(" ") };
                vec![it.id.to_string(), it.email.clone(), name, time(it.created_at)]
            })
            .collect();
        table(&["ID", "E-MAIL", "NAME", "CREATED"], &rows, "no developers: `wearsync developers create` makes one")
    })?;
    Ok(Exit::Done)
}

fn developer_json(it: &Developer) -> Value {
    json!({
        "id": it.id,
        "email": it.email,
        "first_name": it.first_name,
        "last_name": it.last_name,
        "created_at": iso(it.created_at),
    })
}
