use chrono::{DateTime, Utc};
use sqlx::QueryBuilder;

use super::connections::{DROP_UNUSED_ACCOUNT, LeftGrant, drop_deliveries, leave_accounts};
use super::db::{accept, read, transaction};
use super::{Db, Result};
use crate::model::{AccountId, UserId};

const COLUMNS: &str = "id, external_user_id, first_name, last_name, email, time_zone, created_at";

/// One of our users.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct User {
    /// Its id.
    pub id: UserId,
    /// The id that the caller's own system gives it.
    pub external_user_id: Option<String>,
    /// First name.
    pub first_name: Option<String>,
    /// Last name.
    pub last_name: Option<String>,
    /// E-mail; unique.
    pub email: Option<String>,
    /// IANA zone, `UTC` unless told.
    pub time_zone: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

/// What makes or changes a user; `None` leaves a field empty, or as it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NewUser {
    /// See [`User`].
    pub external_user_id: Option<String>,
    /// See [`User`].
    pub first_name: Option<String>,
    /// See [`User`].
    pub last_name: Option<String>,
    /// See [`User`].
    pub email: Option<String>,
}

/// Which users to list.
#[derive(Clone, Debug, Default)]
pub struct UserFilter {
    /// Part of e-mail, first or last name, any case.
    pub search: Option<String>,
    /// Exactly this e-mail.
    pub email: Option<String>,
    /// Exactly this id of the caller's system.
    pub external_user_id: Option<String>,
    /// A column: `created_at`, `email`, `first_name`, `last_name`, `last_synced_at`.
    pub sort_by: &'static str,
    /// Largest first.
    pub descending: bool,
    /// Rows a page.
    pub limit: i64,
    /// Rows to skip.
    pub offset: i64,
}

/// A user in a list, with what its connections tell.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct UserRow {
    /// The user.
    #[sqlx(flatten)]
    pub user: User,
    /// The latest success of any of its connections.
    pub last_synced_at: Option<DateTime<Utc>>,
    /// The provider of that success.
    pub last_synced_provider: Option<String>,
    /// Whether it has an active connection.
    pub has_active_connection: bool,
}

/// One page of users.
#[derive(Clone, Debug)]
pub struct UserPage {
    /// The rows.
    pub rows: Vec<UserRow>,
    /// Rows in all.
    pub total: i64,
}

impl Db {
    /// Makes a user. An external id that exists already gives back the user who has it, unchanged.
    ///
    /// # Errors
    /// [`super::Error::Duplicate`] for an e-mail that is taken.
    pub async fn insert_user(&self, new: NewUser, now: DateTime<Utc>) -> Result<User> {
        let id = UserId::new();
        let sql = "insert into users (id, external_user_id, first_name, last_name, email, created_at)
            values ($1, $2, $3, $4, $5, $6)
            on conflict (external_user_id) where external_user_id is not null do update
            set external_user_id = excluded.external_user_id
            returning id, external_user_id, first_name, last_name, email, time_zone, created_at";
        accept!(self, c => Ok(sqlx::query_as(sql)
            .bind(id)
            .bind(new.external_user_id)
            .bind(new.first_name)
            .bind(new.last_name)
            .bind(new.email)
            .bind(now)
            .fetch_one(&mut *c)
            .await?))
    }

    /// A user by id.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_user(&self, id: UserId) -> Result<Option<User>> {
        let sql = "select id, external_user_id, first_name, last_name, email, time_zone, created_at
            from users where id = $1";
        Ok(read!(self, p => sqlx::query_as(sql).bind(id).fetch_optional(p).await?))
    }

    /// A user by the id of the caller's system.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_user_by_external_id(&self, external: &str) -> Result<Option<User>> {
        let sql = "select id, external_user_id, first_name, last_name, email, time_zone, created_at
            from users where external_user_id = $1";
        Ok(read!(self, p => sqlx::query_as(sql).bind(external).fetch_optional(p).await?))
    }

    /// Changes the fields that are given.
    ///
    /// # Errors
    /// [`super::Error::Duplicate`] for an e-mail that is taken.
    pub async fn update_user(&self, id: UserId, change: NewUser) -> Result<Option<User>> {
        let sql = "update users set
                external_user_id = coalesce($2, external_user_id),
                first_name = coalesce($3, first_name),
                last_name = coalesce($4, last_name),
                email = coalesce($5, email)
            where id = $1
            returning id, external_user_id, first_name, last_name, email, time_zone, created_at";
        accept!(self, c => Ok(sqlx::query_as(sql)
            .bind(id)
            .bind(change.external_user_id)
            .bind(change.first_name)
            .bind(change.last_name)
            .bind(change.email)
            .fetch_optional(&mut *c)
            .await?))
    }

    /// Folders of erased users that are still there.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_erased_folders(&self) -> Result<Vec<String>> {
        let rows: Vec<(String,)> =
            read!(self, p => sqlx::query_as("select path from erased_folders order by path").fetch_all(p).await?);
        Ok(rows.into_iter().map(|(path,)| path).collect())
    }

    /// A folder of an erased user is gone.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn forget_erased_folder(&self, path: &str) -> Result<()> {
        let path = path.to_owned();
        accept!(self, c => {
            sqlx::query("delete from erased_folders where path = $1").bind(path).execute(&mut *c).await?;
            Ok(())
        })
    }

    /// Erases a user with everything under it, and notes its folders for whoever owns the files. Work in flight finds its
    /// connection gone and writes nothing. Answers the grants that nobody uses any more, too.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn delete_user(
        &self,
        id: UserId,
        folders: &[String],
        now: DateTime<Utc>,
    ) -> Result<Option<(User, Vec<LeftGrant>)>> {
        let Some(found) = self.find_user(id).await? else { return Ok(None) };
        let left: Vec<LeftGrant> = transaction!(self, t => {
            sqlx::query("update connections set status = 'revoked', epoch = epoch + 1
                    where user_id = $1 and status = 'active'")
                .bind(id).execute(&mut *t).await?;
            let left = leave_accounts!(self, t, "cast($2 as text) is null", id, None::<String>, now);
            let accounts: Vec<(AccountId,)> =
                sqlx::query_as("select distinct account_id from connections where user_id = $1")
                    .bind(id).fetch_all(&mut *t).await?;
            sqlx::query(drop_deliveries!("")).bind(id).execute(&mut *t).await?;
            // Records and chunks name the data source and the connection: the connection's cascade goes first, so that
            // the sources' cascade finds nothing left to do.
            sqlx::query("delete from connections where user_id = $1").bind(id).execute(&mut *t).await?;
            for folder in folders {
                sqlx::query("insert into erased_folders (path, erased_at) values ($1, $2) on conflict (path) do nothing")
                    .bind(folder.as_str()).bind(now).execute(&mut *t).await?;
            }
            sqlx::query("delete from users where id = $1").bind(id).execute(&mut *t).await?;
            for (account,) in accounts {
                sqlx::query(DROP_UNUSED_ACCOUNT).bind(account).execute(&mut *t).await?;
            }
            // What moved to another account left its first one behind. One of this hour may be about to be connected.
            sqlx::query("delete from accounts where updated_at < $1 and not exists
                    (select 1 from connections c where c.account_id = accounts.id)")
                .bind(now - chrono::Duration::hours(1)).execute(&mut *t).await?;
            left
        });
        Ok(Some((found, left)))
    }

    /// A page of users.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_users(&self, filter: &UserFilter) -> Result<UserPage> {
        macro_rules! conditions {
            ($query:expr) => {{
                $query.push(" where true");
                if let Some(search) = &filter.search {
                    // `%` and `_` of the caller are letters, not wildcards.
                    let escaped = search.replace('\\', "\\\\").replace('%', "\\%").replace('_', "\\_");
                    let pattern = format!("%{escaped}%");
                    for (n, column) in ["email", "first_name", "last_name"].into_iter().enumerate() {
                        $query.push(if n == 0 { " and (" } else { " or " });
                        // The database lowers both sides: SQLite knows ASCII only.
                        $query.push(format!("lower(coalesce({column}, '')) like lower("));
                        $query.push_bind(pattern.clone()).push(") escape '\\'");
                    }
                    $query.push(")");
                }
                if let Some(email) = &filter.email {
                    $query.push(" and email = ").push_bind(email.clone());
                }
                if let Some(external) = &filter.external_user_id {
                    $query.push(" and external_user_id = ").push_bind(external.clone());
                }
            }};
        }
        let direction = if filter.descending { "desc nulls last" } else { "asc nulls first" };
        let select = format!(
            "select {COLUMNS},
                (select max(c.last_success_at) from connections c where c.user_id = users.id) as last_synced_at,
                (select c.provider from connections c where c.user_id = users.id and c.last_success_at is not null
                    order by c.last_success_at desc limit 1) as last_synced_provider,
                exists (select 1 from connections c join accounts a on a.id = c.account_id
                    where c.user_id = users.id and c.status = 'active' and a.status = 'active') as has_active_connection
            from users"
        );
        let order = format!(" order by {} {direction}, id limit ", filter.sort_by);
        let rows = read!(self, p => {
            let mut query = QueryBuilder::new(select.as_str());
            conditions!(query);
            query.push(order.as_str()).push_bind(filter.limit).push(" offset ").push_bind(filter.offset);
            query.build_query_as::<UserRow>().fetch_all(p).await?
        });
        let (total,): (i64,) = read!(self, p => {
            let mut query = QueryBuilder::new("select count(*) from users");
            conditions!(query);
            query.build_query_as().fetch_one(p).await?
        });
        Ok(UserPage { rows, total })
    }

    /// How many users there are; entity files leave out the user level while there is one.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn count_users(&self) -> Result<i64> {
        let (count,): (i64,) = read!(self, p => sqlx::query_as("select count(*) from users").fetch_one(p).await?);
        Ok(count)
    }
}
