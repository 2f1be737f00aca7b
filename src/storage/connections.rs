use chrono::{DateTime, Utc};

use super::api_keys::ApiKey;
use super::db::{accept, read, transaction};
use super::run_events::{Told, is_crossed, tell};
use super::schedules::{INSERT_SCHEDULE, first_sweep};
use super::{Bearer, Db, Result};
use crate::model::{AccountId, ConnectionId, RunId, UserId};

/// One of our users bound to an account.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct Connection {
    /// Its id.
    pub id: ConnectionId,
    /// Whose.
    pub user_id: UserId,
    /// The grant it reads with.
    pub account_id: AccountId,
    /// Provider.
    pub provider: String,
    /// `active`, `revoked` or `replaced`.
    pub status: String,
    /// Changes with every connect, disconnect, purge and erase.
    pub epoch: i64,
    /// When a page last brought something.
    pub stored_at: Option<DateTime<Utc>>,
    /// When a run last read everything it was asked for.
    pub last_success_at: Option<DateTime<Utc>>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
}

/// A connection with what its account tells, for lists.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct ConnectionView {
    /// The connection.
    #[sqlx(flatten)]
    pub connection: Connection,
    /// `active` or `reauth`.
    pub account_status: String,
    /// Why the account is not active.
    pub account_reason: Option<String>,
    /// The provider's id of the person.
    pub provider_user_id: String,
    /// The provider's name of the person.
    pub username: Option<String>,
    /// What the person agreed to, in the provider's words with blanks between; `None`: never told.
    pub scopes: Option<String>,
    /// When the provider last sent something, where that is too long ago; see `schedules`.
    pub quiet_since: Option<DateTime<Utc>>,
}

/// A connection as a request finds it.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct Target {
    /// The connection.
    pub connection_id: ConnectionId,
    /// `active` or `revoked`.
    pub status: String,
    /// `active` or `reauth`.
    pub account_status: String,
}

/// What one look-up tells of a request: who asks, and what for.
#[derive(Clone, Debug, PartialEq)]
pub struct Access {
    /// Whether the developer's token works.
    pub is_developer: bool,
    /// The key, if the secret is one of ours.
    pub key: Option<ApiKey>,
    /// Whether the user exists.
    pub user_exists: bool,
    /// The user's connection to the provider, if there is one.
    pub target: Option<Target>,
}

/// A grant that comes with a connection.
#[derive(Clone, Debug)]
pub struct NewGrant {
    /// Sealed for its account.
    pub sealed: Vec<u8>,
    /// See [`super::Account`]; `None` keeps what is known.
    pub scopes: Option<String>,
    /// See [`super::Account`]; `None` keeps what is known.
    pub username: Option<String>,
    /// When it is refreshed though nobody needs it.
    pub renew_at: Option<DateTime<Utc>>,
    /// Whether an access token came with it: that one is of a version of its own, above the grant's.
    pub with_access: bool,
}

/// A connection that was made, or brought to an account.
#[derive(Clone, Debug)]
pub struct Connected {
    /// The connection.
    pub connection: ConnectionId,
    /// Version of the account's token, and of the access token that came along.
    pub token_version: i64,
    /// The grant of the account it had before, if nobody else uses that.
    pub left: Vec<LeftGrant>,
}

/// A connection that was ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// The connection.
    pub connection: ConnectionId,
    /// The grants that nobody uses any more.
    pub left: Vec<LeftGrant>,
}

/// Why a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Somebody asked for it.
    Asked,
    /// The provider itself refused the grant. Whether that is so is looked at in the same transaction. Of what is purged,
    /// runs in hand stay: the one that found it out tells why it ends.
    Refused,
}

/// A grant that no active connection uses any more. It is not stored any longer: this is the last chance to give it back.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct LeftGrant {
    /// The account.
    pub account: AccountId,
    /// Provider.
    pub provider: String,
    /// Our application there.
    pub client_id: String,
    /// The provider's id of the person.
    pub provider_user_id: String,
    /// Version of the token.
    pub version: i64,
    /// Sealed for the account.
    pub sealed: Vec<u8>,
}

/// Takes the grants of a user's accounts at a provider that no active connection uses any more. The accounts are locked
/// before it is asked who uses them: of two users who leave one account at once, the second one takes the grant.
macro_rules! leave_accounts {
    ($db:expr, $t:ident, $whose:literal, $user:expr, $provider:expr, $now:expr) => {{
        let lock = if matches!($db, Db::Postgres(_)) { "for no key update" } else { "" };
        let sql = format!(
            "select id as account, provider, client_id, provider_user_id, token_version as version, refresh_token as sealed
            from accounts where refresh_token is not null
                and id in (select account_id from connections where user_id = $1 and {})
            order by id {lock}",
            $whose
        );
        let held: Vec<LeftGrant> =
            sqlx::query_as(&sql).bind($user).bind($provider).fetch_all(&mut *$t).await?;
        let mut left = Vec::new();
        for grant in held {
            let dropped = sqlx::query("update accounts set refresh_token = null, token_version = token_version + 1,
                    renew_at = null, updated_at = $2
                    where id = $1 and not exists
                        (select 1 from connections c where c.account_id = $1 and c.status = 'active')")
                .bind(grant.account).bind($now).execute(&mut *$t).await?.rows_affected();
            if dropped > 0 {
                left.push(grant);
            }
        }
        left
    }};
}

pub(super) use leave_accounts;

/// Ends the runs of a connection that is read no more: those that nobody works on at once, the others at their next page.
macro_rules! cancel_runs {
    ($t:ident, $connection:expr, $reason:expr, $now:expr) => {{
        let cancelled: Vec<(RunId, i64)> = sqlx::query_as(
            "update runs
                set state = 'cancelled', ended_at = $2, reason = $3, owner = null
                where connection_id = $1 and state in ('queued', 'waiting') returning id, epoch",
        )
        .bind($connection)
        .bind($now)
        .bind($reason)
        .fetch_all(&mut *$t)
        .await?;
        for (run, epoch) in cancelled {
            tell!($t, Told::cancelled(run, epoch, $now));
        }
        sqlx::query("update runs set cancel_requested = true where connection_id = $1 and state = 'in_progress'")
            .bind($connection)
            .execute(&mut *$t)
            .await?;
    }};
}

pub(super) const DROP_UNUSED_ACCOUNT: &str = "delete from accounts where id = $1
    and not exists (select 1 from connections c where c.account_id = accounts.id)";

/// Drops the deliveries that speak of a user: of a connection that it has or had, or of its account while there was none.
/// Those that speak of other users' connections as well stay, without what they say of this one.
macro_rules! drop_deliveries {
    ($which:literal) => {
        concat!(
            "delete from deliveries where id in (
                select i.delivery_id from delivery_items i join connections c on c.id = i.connection_id
                    where c.user_id = $1",
            $which,
            " union select i.delivery_id from delivery_items i join connections c on c.account_id = i.account_id
                    where i.connection_id is null and c.user_id = $1",
            $which,
            ") and not exists (select 1 from delivery_items i join connections c on c.id = i.connection_id
                where i.delivery_id = deliveries.id and c.user_id <> $1)"
        )
    };
}

pub(super) use drop_deliveries;

/// What a connection of a user to a provider has brought, with whatever was asked and told about it. Each takes the user
/// and the provider.
const PURGE: [&str; 11] = [
    drop_deliveries!(" and c.provider = $2"),
    "delete from delivery_items where connection_id in (select id from connections where user_id = $1 and provider = $2)",
    "delete from idempotency where run_id in
        (select r.id from runs r join connections c on c.id = r.connection_id where c.user_id = $1 and c.provider = $2)",
    // All but the newest of the user's: their numbers go on from it.
    "delete from run_events where user_id = $1 and provider = $2
        and seq < (select max(e.seq) from run_events e where e.user_id = $1)",
    "delete from records where connection_id in (select id from connections where user_id = $1 and provider = $2)",
    "delete from parts where connection_id in (select id from connections where user_id = $1 and provider = $2)",
    "delete from windows where connection_id in (select id from connections where user_id = $1 and provider = $2)",
    "delete from data_sources where user_id = $1 and provider = $2",
    "delete from oauth_states where user_id = $1 and provider = $2",
    // What an earlier account left behind: the connection itself has nothing to tell without its data.
    "delete from connections where user_id = $1 and provider = $2 and status = 'replaced'",
    "update connections set stored_at = null, last_success_at = null, delivered_at = null
        where user_id = $1 and provider = $2",
];

/// Belongs to it, and comes last: what stands under an idempotency key is found by its run.
const PURGE_RUNS: &str =
    "delete from runs where connection_id in (select id from connections where user_id = $1 and provider = $2)";

/// Whether an account's grant was refused by its provider.
const IS_REFUSED: &str = "a.status = 'reauth' and a.refusals > 0";

#[derive(sqlx::FromRow)]
struct AccessRow {
    is_developer: bool,
    key_created_by: Option<uuid::Uuid>,
    key_id: Option<uuid::Uuid>,
    prefix: Option<String>,
    name: Option<String>,
    scopes: Option<String>,
    key_created_at: Option<DateTime<Utc>>,
    expires_at: Option<DateTime<Utc>>,
    retires_at: Option<DateTime<Utc>>,
    revoked_at: Option<DateTime<Utc>>,
    last_used_at: Option<DateTime<Utc>>,
    user_id: Option<UserId>,
    connection_id: Option<ConnectionId>,
    status: Option<String>,
    account_status: Option<String>,
}

const COLUMNS: &str =
    "c.id, c.user_id, c.account_id, c.provider, c.status, c.epoch, c.stored_at, c.last_success_at, c.created_at,
    c.updated_at";

impl Db {
    /// Developer, key, user and connection of a sync request in one round trip.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_access(
        &self,
        bearer: Option<Bearer>,
        key_hash: Option<&[u8]>,
        user: UserId,
        provider: &str,
    ) -> Result<Access> {
        let sql = "select d.id is not null as is_developer, k.created_by as key_created_by, k.id as key_id, k.prefix, k.name, k.scopes, k.created_at as key_created_at, k.expires_at,
                k.retires_at, k.revoked_at, k.last_used_at, u.id as user_id, c.id as connection_id, c.status,
                a.status as account_status
            from (select 1 as one) o
            left join api_keys k on k.hash = $1
            left join users u on u.id = $2
            left join connections c on c.user_id = u.id and c.provider = $3 and c.status <> 'replaced'
            left join accounts a on a.id = c.account_id
            left join developers d on d.id = $4 and d.password_changed_at <= $5";
        let (developer, issued_at) = (bearer.map(|it| it.developer), bearer.map(|it| it.issued_at));
        let row: AccessRow = read!(self, p => sqlx::query_as(sql)
            .bind(key_hash).bind(user).bind(provider).bind(developer).bind(issued_at).fetch_one(p).await?);
        let key = match (row.key_id, row.prefix, row.name, row.scopes, row.key_created_at) {
            (Some(id), Some(prefix), Some(name), Some(scopes), Some(created_at)) => Some(ApiKey {
                id,
                prefix,
                name,
                scopes,
                created_by: row.key_created_by,
                created_at,
                expires_at: row.expires_at,
                retires_at: row.retires_at,
                revoked_at: row.revoked_at,
                last_used_at: row.last_used_at,
            }),
            _ => None,
        };
        let target = match (row.connection_id, row.status, row.account_status) {
            (Some(connection_id), Some(status), Some(account_status)) => {
                Some(Target { connection_id, status, account_status })
            }
            _ => None,
        };
        Ok(Access { is_developer: row.is_developer, key, user_exists: row.user_id.is_some(), target })
    }

    /// Binds a user to an account: makes the connection, or brings the one it has for this provider to this account.
    /// Either way the epoch is new and work in flight ends. Of one that another account takes the place of, waiting runs
    /// are cancelled, and its schedule goes over.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn connect(
        &self,
        user: UserId,
        account: AccountId,
        provider: &str,
        now: DateTime<Utc>,
    ) -> Result<ConnectionId> {
        Ok(self.connect_with(user, account, provider, None, now).await?.connection)
    }

    /// The same, and in the same transaction the grant that the person gave, which revives the account.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn connect_with(
        &self,
        user: UserId,
        account: AccountId,
        provider: &str,
        grant: Option<NewGrant>,
        now: DateTime<Utc>,
    ) -> Result<Connected> {
        loop {
            let connected = self.connect_once(user, account, provider, grant.as_ref(), now).await;
            if !is_crossed(&connected) {
                return connected;
            }
        }
    }

    async fn connect_once(
        &self,
        user: UserId,
        account: AccountId,
        provider: &str,
        grant: Option<&NewGrant>,
        now: DateTime<Utc>,
    ) -> Result<Connected> {
        let id = ConnectionId::new();
        let replaced: Option<(ConnectionId,)>;
        let connected = transaction!(self, t => {
            // Another account of the same provider: its history stays under the old connection, which nobody reads any more.
            replaced = sqlx::query_as("update connections set status = 'replaced', epoch = epoch + 1, updated_at = $4
                    where user_id = $1 and provider = $2 and status <> 'replaced' and account_id <> $3
                    returning id")
                .bind(user).bind(provider).bind(account).bind(now)
                .fetch_optional(&mut *t).await?;
            let (connection,): (ConnectionId,) = sqlx::query_as(
                    "insert into connections (id, user_id, account_id, provider, status, created_at, updated_at)
                    values ($1, $2, $3, $4, 'active', $5, $5)
                    on conflict (user_id, provider) where status <> 'replaced' do update
                    set status = 'active', epoch = connections.epoch + 1, updated_at = excluded.updated_at
                    returning id")
                .bind(id).bind(user).bind(account).bind(provider).bind(now)
                .fetch_one(&mut *t).await?;
            sqlx::query(INSERT_SCHEDULE).bind(connection).bind(provider).bind(now).bind(first_sweep(now))
                .execute(&mut *t).await?;
            if let Some((old,)) = replaced {
                cancel_runs!(t, old, "another account was connected", now);
                // How often it is read was said of the user, whichever account that is.
                sqlx::query("update schedules set every_s = o.every_s, cron = o.cron, enabled = o.enabled
                        from schedules o where schedules.connection_id = $1 and o.connection_id = $2")
                    .bind(connection).bind(old).execute(&mut *t).await?;
            }
            if let Some(grant) = grant {
                sqlx::query("update accounts set refresh_token = $2, token_version = token_version + 1 + $7,
                        grant_version = token_version + 1, status = 'active', reason = null, refusals = 0,
                        refused_since = null, refresh_owner = null, refresh_until = null,
                        scopes = coalesce($3, scopes), username = coalesce($4, username), renew_at = $5, updated_at = $6
                        where id = $1")
                    .bind(account).bind(grant.sealed.as_slice()).bind(grant.scopes.as_deref())
                    .bind(grant.username.as_deref()).bind(grant.renew_at).bind(now).bind(i64::from(grant.with_access))
                    .execute(&mut *t).await?;
            }
            let (token_version,): (i64,) = sqlx::query_as("select token_version from accounts where id = $1")
                .bind(account).fetch_one(&mut *t).await?;
            let left = leave_accounts!(self, t, "provider = $2", user, provider, now);
            Connected { connection, token_version, left }
        });
        if replaced.is_some() {
            tracing::info!(%user, provider, "connection moved to another account; the old one keeps its data");
        }
        Ok(connected)
    }

    /// Ends a connection: work in flight is refused from now on, waiting runs are cancelled, data stays. `None`: there
    /// was none. The account's grant is dropped with its last active connection.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn disconnect(&self, user: UserId, provider: &str, now: DateTime<Utc>) -> Result<Option<ConnectionId>> {
        Ok(self.end_connection(user, provider, Ending::Asked, None, now).await?.map(|ended| ended.connection))
    }

    /// The same, with the grants that were dropped. With `purge`, everything that the user has of this provider goes in
    /// the same transaction, and these folders are noted for whoever owns the files; the connection itself stays, ended.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn end_connection(
        &self,
        user: UserId,
        provider: &str,
        why: Ending,
        purge: Option<&[String]>,
        now: DateTime<Utc>,
    ) -> Result<Option<Ended>> {
        loop {
            let ended = self.end_connection_once(user, provider, why, purge, now).await;
            if !is_crossed(&ended) {
                return ended;
            }
        }
    }

    async fn end_connection_once(
        &self,
        user: UserId,
        provider: &str,
        why: Ending,
        purge: Option<&[String]>,
        now: DateTime<Utc>,
    ) -> Result<Option<Ended>> {
        let reason = match why {
            Ending::Asked => "disconnected",
            Ending::Refused => "access was taken back",
        };
        let in_hand = match why {
            Ending::Asked => "",
            Ending::Refused => " and state <> 'in_progress'",
        };
        let ended: Option<Ended> = transaction!(self, t => {
            if why == Ending::Refused {
                // Locked before it is asked: a person may be connecting anew just now.
                let lock = if matches!(self, Db::Postgres(_)) { "for no key update" } else { "" };
                let sql = format!("select id from connections where user_id = $1 and provider = $2 and status = 'active' {lock}");
                sqlx::query(&sql).bind(user).bind(provider).fetch_all(&mut *t).await?;
                let sql = format!("select exists (select 1 from connections c join accounts a on a.id = c.account_id
                    where c.user_id = $1 and c.provider = $2 and c.status = 'active' and {IS_REFUSED})");
                let (refused,): (bool,) = sqlx::query_as(&sql).bind(user).bind(provider).fetch_one(&mut *t).await?;
                if !refused {
                    return Ok(None);
                }
            }
            let found: Option<(ConnectionId,)> = sqlx::query_as(
                    "update connections set status = 'revoked', epoch = epoch + 1, updated_at = $3
                    where user_id = $1 and provider = $2 and status <> 'replaced'
                    returning id")
                .bind(user).bind(provider).bind(now)
                .fetch_optional(&mut *t).await?;
            match found {
                None => None,
                Some((connection,)) => {
                    cancel_runs!(t, connection, reason, now);
                    let left = leave_accounts!(self, t, "provider = $2", user, provider, now);
                    if let Some(folders) = purge {
                        let earlier: Vec<(AccountId,)> = sqlx::query_as("select account_id from connections
                                where user_id = $1 and provider = $2 and status = 'replaced'")
                            .bind(user).bind(provider).fetch_all(&mut *t).await?;
                        for sql in PURGE {
                            sqlx::query(sql).bind(user).bind(provider).execute(&mut *t).await?;
                        }
                        let sql = format!("{PURGE_RUNS}{in_hand}");
                        sqlx::query(&sql).bind(user).bind(provider).execute(&mut *t).await?;
                        for (account,) in earlier {
                            sqlx::query(DROP_UNUSED_ACCOUNT).bind(account).execute(&mut *t).await?;
                        }
                        for folder in folders {
                            sqlx::query("insert into erased_folders (path, erased_at) values ($1, $2)
                                    on conflict (path) do nothing")
                                .bind(folder.as_str()).bind(now).execute(&mut *t).await?;
                        }
                    }
                    Some(Ended { connection, left })
                }
            }
        });
        Ok(ended)
    }

    /// Who has an active connection though the provider refused the grant, and to which provider; of this account, or of all.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_refused(&self, account: Option<AccountId>) -> Result<Vec<(UserId, String)>> {
        let sql = format!(
            "select c.user_id, c.provider from connections c join accounts a on a.id = c.account_id
            where c.status = 'active' and {IS_REFUSED} {} order by c.id",
            if account.is_some() { "and a.id = $1" } else { "" }
        );
        Ok(read!(self, p => {
            let mut query = sqlx::query_as(&sql);
            if let Some(account) = account {
                query = query.bind(account);
            }
            query.fetch_all(p).await?
        }))
    }

    /// Who has an active connection with this account, and to which provider.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_users_of_account(&self, account: AccountId) -> Result<Vec<(UserId, String)>> {
        let sql = "select user_id, provider from connections where account_id = $1 and status = 'active' order by id";
        Ok(read!(self, p => sqlx::query_as(sql).bind(account).fetch_all(p).await?))
    }

    /// One connection.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_connection(&self, id: ConnectionId) -> Result<Option<Connection>> {
        let sql = format!("select {COLUMNS} from connections c where c.id = $1");
        Ok(read!(self, p => sqlx::query_as(&sql).bind(id).fetch_optional(p).await?))
    }

    /// Connections, newest first; of one user, or of all.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_connections(&self, user: Option<UserId>) -> Result<Vec<ConnectionView>> {
        let sql = format!(
            "select {COLUMNS}, a.status as account_status, a.reason as account_reason, a.provider_user_id,
                a.username, a.scopes, s.quiet_since
            from connections c join accounts a on a.id = c.account_id
                left join schedules s on s.connection_id = c.id
            where c.status <> 'replaced' {} order by c.created_at desc, c.id desc",
            if user.is_some() { "and c.user_id = $1" } else { "" }
        );
        Ok(read!(self, p => {
            let mut query = sqlx::query_as(&sql);
            if let Some(user) = user {
                query = query.bind(user);
            }
            query.fetch_all(p).await?
        }))
    }

    /// Connections whose place another account has taken, of one user or of all: what they brought is kept.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_replaced(&self, user: Option<UserId>) -> Result<Vec<Connection>> {
        let sql = format!(
            "select {COLUMNS} from connections c where c.status = 'replaced' and c.user_id = coalesce($1, c.user_id)
            order by c.created_at, c.id"
        );
        Ok(read!(self, p => sqlx::query_as(&sql).bind(user).fetch_all(p).await?))
    }

    /// For each active connection of a user: who else is connected to the same account, oldest connection first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_linked_users(&self, user: UserId) -> Result<Vec<(ConnectionId, UserId)>> {
        // The same person may have granted access to two applications of ours.
        let sql = "select c.id, o.user_id
            from connections c
            join accounts a on a.id = c.account_id
            join accounts b on b.provider = a.provider and b.provider_user_id = a.provider_user_id
            join connections o on o.account_id = b.id and o.status = 'active' and o.user_id <> c.user_id
            where c.user_id = $1 and c.status = 'active'
            order by o.created_at, o.id";
        Ok(read!(self, p => sqlx::query_as(sql).bind(user).fetch_all(p).await?))
    }

    /// Notes that a run read everything it was asked for.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn touch_connection(&self, id: ConnectionId, now: DateTime<Utc>) -> Result<()> {
        accept!(self, c => {
            sqlx::query("update connections set last_success_at = $2 where id = $1").bind(id).bind(now)
                .execute(&mut *c).await?;
            Ok(())
        })
    }

    /// Moves a connection from a pasted account to the account that turned out to be the person's.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn move_account(&self, from: AccountId, provider_user_id: &str, now: DateTime<Utc>) -> Result<AccountId> {
        let into = transaction!(self, t => {
            let (into,): (AccountId,) = sqlx::query_as("select o.id from accounts o join accounts p on p.id = $1
                    where o.provider = p.provider and o.client_id = p.client_id and o.provider_user_id = $2")
                .bind(from).bind(provider_user_id).fetch_one(&mut *t).await?;
            sqlx::query("update connections set account_id = $2, updated_at = $3 where account_id = $1")
                .bind(from).bind(into).bind(now).execute(&mut *t).await?;
            // Not deleted: its grant has still to be handed over. It is unreachable, and goes with the next erase.
            into
        });
        Ok(into)
    }
}
