//! `wearsync users`: whom data belongs to.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::exit::{Exit, Outcome, usage};
use super::output::{dash, iso, line, remark, table, time, time_or_dash};
use super::{Session, output::Output};
use crate::api::{external_user_id, person_name, user_email};
use crate::model::UserId;
use crate::storage::{Db, NewUser, User, UserFilter, UserRow};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a user; prints its id
    Create(Create),
    /// List all users, the oldest first
    List,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// The id that your own system gives it; a user who has it already is answered instead
    #[arg(long, value_name = "ID", value_parser = external_user_id)]
    external_id: Option<String>,
    /// E-mail, unique
    #[arg(long, value_parser = user_email)]
    email: Option<String>,
    #[arg(long, value_name = "NAME", value_parser = person_name)]
    first_name: Option<String>,
    #[arg(long, value_name = "NAME", value_parser = person_name)]
    last_name: Option<String>,
}

/// `--user U` where it must be told whose.
#[derive(Debug, Args)]
pub(crate) struct Whose {
    /// Id or external id of the user; not needed while there is exactly one
    #[arg(long, value_name = "USER")]
    pub(crate) user: Option<String>,
}

impl Whose {
    /// The user meant: the one named, or the only one.
    pub(crate) async fn find(&self, db: &Db) -> anyhow::Result<User> {
        if let Some(user) = self.named(db).await? {
            return Ok(user);
        }
        let filter = UserFilter { sort_by: "created_at", limit: 2, ..UserFilter::default() };
        let mut rows = db.list_users(&filter).await?.rows;
        match (rows.pop(), rows.is_empty()) {
            (Some(only), true) => Ok(only.user),
            (None, _) => Err(usage("there is no user yet: make one with `wearsync users create`")),
            _ => Err(usage("there are several users: say which with --user (`wearsync users list` shows them)")),
        }
    }

    /// The user named; `None` when none is.
    pub(crate) async fn named(&self, db: &Db) -> anyhow::Result<Option<User>> {
        let Some(name) = &self.user else { return Ok(None) };
        let by_id = match name.parse() {
            Ok(id) => db.find_user(UserId(id)).await?,
            Err(_) => None,
        };
        let user = match by_id {
            Some(user) => Some(user),
            None => db.find_user_by_external_id(name).await?,
        };
        match user {
            Some(user) => Ok(Some(user)),
            None => Err(usage(format!("no user has the id or external id `{name}`: `wearsync users list` shows them"))),
        }
    }
}

pub(crate) async fn run(session: &Session, command: Command) -> Outcome {
    match command {
        Command::Create(new) => create(session, new).await,
        Command::List => list(session).await,
    }
}

async fn create(session: &Session, new: Create) -> Outcome {
    let app = session.open().await?;
    let new = NewUser {
        external_user_id: new.external_id,
        first_name: new.first_name,
        last_name: new.last_name,
        email: new.email,
    };
    let user = match app.engine.db.insert_user(new, app.engine.clock.now()).await {
        Err(crate::storage::Error::Duplicate { constraint }) if constraint.contains("email") => {
            return Err(usage("another user has this e-mail: `wearsync users list` shows who"));
        }
        user => user?,
    };
    session.out.show(&user_json(&user), || user.id.to_string())?;
    app.close().await;
    Ok(Exit::Done)
}

async fn list(session: &Session) -> Outcome {
    let app = session.open().await?;
    // Pages, so that the columns of a table are told from all of them but no statement from too many.
    let mut rows: Vec<UserRow> = Vec::new();
    loop {
        let offset = i64::try_from(rows.len())?;
        let filter = UserFilter { sort_by: "created_at", limit: 500, offset, ..UserFilter::default() };
        let page = app.engine.db.list_users(&filter).await?;
        let last = page.rows.is_empty();
        rows.extend(page.rows);
        if last || i64::try_from(rows.len())? >= page.total {
            break;
        }
    }
    app.close().await;
    show(session.out, &rows)
}

fn show(out: Output, rows: &[UserRow]) -> Outcome {
    if out.json {
        let rows: Vec<Value> = rows
            .iter()
            .map(|row| {
                let mut user = user_json(&row.user);
                user["last_synced_at"] = json!(row.last_synced_at.map(iso));
                user["last_synced_provider"] = json!(row.last_synced_provider);
                user["has_active_connection"] = json!(row.has_active_connection);
                user
            })
            .collect();
        line(&serde_json::to_string_pretty(&rows)?)?;
        return Ok(Exit::Done);
    }
    if rows.is_empty() {
        remark("no users yet: `wearsync users create` makes one");
        return Ok(Exit::Done);
    }
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let user = &row.user;
            let name: Vec<&str> =
                [&user.first_name, &user.last_name].into_iter().flatten().map(String::as_str).collect();
            vec![
                user.id.to_string(),
                user.external_user_id.clone().unwrap_or_else(dash),
                if name.is_empty() { dash() } else { name.join(" ") },
                user.email.clone().unwrap_or_else(dash),
                time(user.created_at),
                time_or_dash(row.last_synced_at),
            ]
        })
        .collect();
    line(table(&["ID", "EXTERNAL ID", "NAME", "E-MAIL", "CREATED", "LAST SYNC"], &cells, "").trim_end())?;
    Ok(Exit::Done)
}

fn user_json(user: &User) -> Value {
    json!({
        "id": user.id,
        "external_user_id": user.external_user_id,
        "first_name": user.first_name,
        "last_name": user.last_name,
        "email": user.email,
        "created_at": iso(user.created_at),
    })
}
