use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use sqlx::QueryBuilder;

use super::db::{accept, read, transaction, write};
use super::runs::{Accepted, INSERT, NewRun};
use super::{Db, Error, Result};
use crate::model::{AccountId, Class, ConnectionId, DeliveryId, RunId};

/// That a provider speaks of a connection is noted once in this time: a burst of deliveries does not write its row anew
/// each time.
const NOTED: chrono::Duration = chrono::Duration::seconds(60);

/// An inbound webhook call as it is kept, without its body.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct Delivery {
    /// Its id.
    pub id: DeliveryId,
    /// Provider.
    pub provider: String,
    /// Equal keys are one delivery.
    pub dedup_key: String,
    /// `queued`, `in_progress`, `waiting`, `done` or `failed`.
    pub state: String,
    /// Why it waits or failed.
    pub reason: Option<String>,
    /// Raised by every claim.
    pub epoch: i64,
    /// When it is due.
    pub due_at: DateTime<Utc>,
    /// Times that it was put back.
    pub attempts: i64,
    /// Claims that ended by a crash.
    pub crashes: i64,
    /// When it came.
    pub received_at: DateTime<Utc>,
    /// When it was done.
    pub ended_at: Option<DateTime<Utc>>,
    /// JSON: the headers kept.
    pub headers: String,
    /// Whether its body is still there.
    pub has_body: bool,
}

/// A delivery to keep.
#[derive(Clone, Debug)]
pub struct NewDelivery {
    /// Its id.
    pub id: DeliveryId,
    /// Provider.
    pub provider: &'static str,
    /// Equal keys are one delivery.
    pub dedup_key: String,
    /// JSON: the headers kept.
    pub headers: String,
    /// Sealed.
    pub body: Vec<u8>,
}

/// A delivery in a worker's hands.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct DeliveryClaim {
    /// Its id.
    pub id: DeliveryId,
    /// Provider.
    pub provider: String,
    /// What every write has to show.
    pub epoch: i64,
    /// Times that it was put back: 0, and nothing was decided before.
    pub attempts: i64,
    /// Claims that ended by a crash.
    pub crashes: i64,
    /// When it came.
    pub received_at: DateTime<Utc>,
    /// Sealed.
    pub body: Option<Vec<u8>>,
}

/// One connection that a notice may be for.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct Addressee {
    /// The provider's id of the person.
    pub provider_user_id: String,
    /// The account.
    pub account_id: AccountId,
    /// A connection that reads with it, if there is an active one.
    pub connection_id: Option<ConnectionId>,
}

/// What becomes of one notice for one connection.
#[derive(Clone, Debug)]
pub struct NewItem {
    /// JSON of the notice.
    pub notice: String,
    /// The account, where it is known.
    pub account: Option<AccountId>,
    /// What is to be done.
    pub act: Act,
}

/// What is to be done about a notice.
#[derive(Clone, Debug)]
pub enum Act {
    /// Accept this run; the notice is dropped if its connection is no longer active.
    Run(NewRun),
    /// Look again later: the account is unknown.
    Wait,
    /// Nothing.
    Drop,
}

/// How the work on a delivery ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeliveryEnd {
    /// Everything in it has its run, or none.
    Done,
    /// Some of it has to wait until then.
    Wait(DateTime<Utc>, &'static str),
    /// It cannot be worked on.
    Failed(String),
}

/// What became of one notice for one connection.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct DeliveryItem {
    /// Number within the delivery.
    pub n: i64,
    /// The account, where it is known.
    pub account_id: Option<AccountId>,
    /// The connection.
    pub connection_id: Option<ConnectionId>,
    /// JSON of the notice.
    pub notice: String,
    /// `waiting`, `accepted` or `dropped`.
    pub state: String,
    /// The run that acts on it.
    pub run_id: Option<RunId>,
}

/// Which deliveries to list.
#[derive(Clone, Debug, Default)]
pub struct DeliveryFilter {
    /// Of this provider.
    pub provider: Option<String>,
    /// In this state.
    pub state: Option<String>,
    /// Older than this one.
    pub before: Option<DeliveryId>,
    /// At most so many.
    pub limit: i64,
}

/// A subscription of ours at a provider.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct SubscriptionRow {
    /// The provider's id of it.
    pub external_id: String,
    /// Where deliveries go.
    pub callback_url: String,
    /// Verify token or signing key, sealed.
    pub secret: Option<Vec<u8>>,
}

const COLUMNS: &str = "id, provider, dedup_key, state, reason, epoch, due_at, attempts, crashes, received_at, ended_at,
    headers, body is not null as has_body";

/// Keeps a delivery: one statement, on disk before its 2xx.
const KEEP: &str = "insert into deliveries (id, provider, dedup_key, state, due_at, received_at, headers, body)
    values ($1, $2, $3, 'queued', $4, $4, $5, $6)
    on conflict (provider, dedup_key) do nothing";

impl Db {
    /// Keeps a delivery. `false`: an equal one is there already.
    ///
    /// # Errors
    /// When the database fails; then it was not kept.
    pub async fn insert_delivery(&self, new: NewDelivery, now: DateTime<Utc>) -> Result<bool> {
        accept!(self, c => Ok(sqlx::query(KEEP)
            .bind(new.id).bind(new.provider).bind(new.dedup_key).bind(now).bind(new.headers).bind(new.body)
            .execute(&mut *c).await?.rows_affected() > 0))
    }

    /// Takes one delivery for a time, as [`Db::claim_run`] takes a run.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn claim_delivery(
        &self,
        id: DeliveryId,
        owner: &str,
        now: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> Result<Option<DeliveryClaim>> {
        let sql = "update deliveries set
                crashes = case when state = 'in_progress' then crashes + 1 else crashes end,
                state = 'in_progress', owner = $2, lease_until = $4, epoch = epoch + 1, reason = null
            where id = $1 and ((state in ('queued', 'waiting') and due_at <= $3)
                or (state = 'in_progress' and lease_until < $3))
            returning id, provider, epoch, attempts, crashes, received_at, body";
        let owner = owner.to_owned();
        accept!(self, c => Ok(sqlx::query_as(sql).bind(id).bind(owner).bind(now).bind(until)
            .fetch_optional(&mut *c).await?))
    }

    /// Whom a delivery may be for: per account that is known, its active connections, or one row without any.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_addressees(
        &self,
        provider: &str,
        client_id: &str,
        accounts: &BTreeSet<&str>,
    ) -> Result<Vec<Addressee>> {
        if accounts.is_empty() {
            return Ok(Vec::new());
        }
        Ok(read!(self, p => {
            let mut query = QueryBuilder::new("select a.provider_user_id, a.id as account_id, c.id as connection_id
                from accounts a left join connections c on c.account_id = a.id and c.status = 'active'
                where a.provider = ");
            query.push_bind(provider).push(" and a.client_id = ").push_bind(client_id);
            query.push(" and a.provider_user_id in (");
            let mut list = query.separated(", ");
            for account in accounts {
                list.push_bind(*account);
            }
            query.push(") order by a.id, c.id");
            query.build_query_as().persistent(accounts.len() == 1).fetch_all(p).await?
        }))
    }

    /// The notices of a delivery that are done with.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_settled_notices(&self, id: DeliveryId) -> Result<Vec<String>> {
        let sql = "select notice from delivery_items where delivery_id = $1 and state <> 'waiting'";
        let rows: Vec<(String,)> = read!(self, p => sqlx::query_as(sql).bind(id).fetch_all(p).await?);
        Ok(rows.into_iter().map(|(notice,)| notice).collect())
    }

    /// Ends a claim: a run per notice and connection, what became of each, and the delivery's own state, all or nothing.
    /// Answers the runs, to be pushed.
    ///
    /// # Errors
    /// [`Error::Fenced`] when the delivery is no longer ours.
    pub async fn settle_delivery(
        &self,
        claim: &DeliveryClaim,
        items: &[NewItem],
        end: &DeliveryEnd,
        now: DateTime<Utc>,
    ) -> Result<Vec<(Accepted, ConnectionId)>> {
        let (state, reason, due) = match end {
            DeliveryEnd::Done => ("done", None, now),
            DeliveryEnd::Wait(due, why) => ("waiting", Some((*why).to_owned()), *due),
            DeliveryEnd::Failed(why) => ("failed", Some(why.chars().take(500).collect::<String>()), now),
        };
        let put_back = i64::from(state == "waiting");
        let ended = (state != "waiting").then_some(now);
        // In the order in which everybody locks them: connections, by id, before runs.
        let connections: BTreeSet<ConnectionId> = items
            .iter()
            .filter_map(|item| match &item.act {
                Act::Run(run) => Some(run.connection),
                Act::Wait | Act::Drop => None,
            })
            .collect();
        let sql = "update deliveries set state = $3, reason = $4, due_at = $5, attempts = attempts + $6, ended_at = $7,
                owner = null, lease_until = null
            where id = $1 and epoch = $2 and state = 'in_progress'";
        let runs = transaction!(self, t => {
            let held = sqlx::query(sql).bind(claim.id).bind(claim.epoch).bind(state).bind(reason).bind(due).bind(put_back)
                .bind(ended).execute(&mut *t).await?.rows_affected();
            if held == 0 {
                return Err(Error::Fenced);
            }
            for connection in &connections {
                sqlx::query("update connections set delivered_at = $2
                        where id = $1 and (delivered_at is null or delivered_at < $3)")
                    .bind(connection).bind(now).bind(now - NOTED).execute(&mut *t).await?;
            }
            let mut n = 0_i64;
            if claim.attempts > 0 {
                sqlx::query("delete from delivery_items where delivery_id = $1 and state = 'waiting'").bind(claim.id)
                    .execute(&mut *t).await?;
                let (max,): (i64,) =
                    sqlx::query_as("select coalesce(max(n) + 1, 0) from delivery_items where delivery_id = $1")
                        .bind(claim.id).fetch_one(&mut *t).await?;
                n = max;
            }
            let mut runs: BTreeMap<RunId, (Accepted, ConnectionId)> = BTreeMap::new();
            for item in items {
                let (state, connection, run) = match &item.act {
                    Act::Wait => ("waiting", None, None),
                    Act::Drop => ("dropped", None, None),
                    Act::Run(new) => {
                        let id = RunId::new();
                        let row: Option<(RunId, i64, DateTime<Utc>)> = sqlx::query_as(INSERT)
                            .bind(id).bind(new.connection).bind(new.class.number()).bind(new.source.as_str())
                            .bind(new.request.as_str()).bind(new.request_key.as_str()).bind(now)
                            .fetch_optional(&mut *t).await?;
                        match row {
                            Some((found, class, _)) => {
                                let class = Class::from_number(class);
                                let accepted = Accepted { id: found, class, is_new: found == id };
                                runs.entry(found).or_insert((accepted, new.connection));
                                ("accepted", Some(new.connection), Some(found))
                            }
                            None => ("dropped", Some(new.connection), None),
                        }
                    }
                };
                sqlx::query("insert into delivery_items
                            (delivery_id, n, account_id, connection_id, notice, state, run_id)
                        values ($1, $2, $3, $4, $5, $6, $7)")
                    .bind(claim.id).bind(n).bind(item.account).bind(connection).bind(item.notice.as_str()).bind(state)
                    .bind(run).execute(&mut *t).await?;
                n += 1;
            }
            runs
        });
        Ok(runs.into_values().collect())
    }

    /// Deliveries that a worker could take now, the oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_ready_deliveries(
        &self,
        now: DateTime<Utc>,
        limit: i64,
    ) -> Result<Vec<(DeliveryId, DateTime<Utc>)>> {
        let sql = "select id, due_at from deliveries
            where (state in ('queued', 'waiting') and due_at <= $1) or (state = 'in_progress' and lease_until < $1)
            order by due_at, id limit $2";
        Ok(read!(self, p => sqlx::query_as(sql).bind(now).bind(limit).fetch_all(p).await?))
    }

    /// A delivery by id.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_delivery(&self, id: DeliveryId) -> Result<Option<Delivery>> {
        let sql = format!("select {COLUMNS} from deliveries where id = $1");
        Ok(read!(self, p => sqlx::query_as(&sql).bind(id).fetch_optional(p).await?))
    }

    /// The body of a delivery, sealed; `None` when it was dropped.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_delivery_body(&self, id: DeliveryId) -> Result<Option<Vec<u8>>> {
        let sql = "select body from deliveries where id = $1 and body is not null";
        let row: Option<(Vec<u8>,)> = read!(self, p => sqlx::query_as(sql).bind(id).fetch_optional(p).await?);
        Ok(row.map(|(body,)| body))
    }

    /// What became of each notice of a delivery.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_delivery_items(&self, id: DeliveryId) -> Result<Vec<DeliveryItem>> {
        let sql = "select n, account_id, connection_id, notice, state, run_id from delivery_items
            where delivery_id = $1 order by n";
        Ok(read!(self, p => sqlx::query_as(sql).bind(id).fetch_all(p).await?))
    }

    /// Deliveries, the newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_deliveries(&self, filter: &DeliveryFilter) -> Result<Vec<Delivery>> {
        Ok(read!(self, p => {
            let mut query = QueryBuilder::new(format!("select {COLUMNS} from deliveries where true"));
            if let Some(provider) = &filter.provider {
                query.push(" and provider = ").push_bind(provider.clone());
            }
            if let Some(state) = &filter.state {
                query.push(" and state = ").push_bind(state.clone());
            }
            if let Some(before) = filter.before {
                query.push(" and id < ").push_bind(before);
            }
            query.push(" order by id desc limit ").push_bind(filter.limit);
            query.build_query_as().fetch_all(p).await?
        }))
    }

    /// Has a delivery worked on once more, from its body. `false`: nobody can, since the body is gone, or somebody is at
    /// it right now, or there is no such delivery.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn replay_delivery(&self, id: DeliveryId, now: DateTime<Utc>) -> Result<bool> {
        Ok(transaction!(self, t => {
            let replayed = sqlx::query("update deliveries set state = 'queued', reason = null, due_at = $2, attempts = 0,
                        crashes = 0, ended_at = null
                    where id = $1 and state <> 'in_progress' and body is not null")
                .bind(id).bind(now).execute(&mut *t).await?.rows_affected() > 0;
            if replayed {
                sqlx::query("delete from delivery_items where delivery_id = $1").bind(id).execute(&mut *t).await?;
            }
            replayed
        }))
    }

    /// Drops what has outlived its use: bodies of deliveries that were done before one instant, with all else that is known
    /// of those that speak of nobody here; and deliveries that came before another, done or not.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn clean_up_deliveries(&self, done_before: DateTime<Utc>, came_before: DateTime<Utc>) -> Result<()> {
        write!(self, p => sqlx::query("delete from deliveries
                where ended_at < $1 and body is not null and state = 'done' and not exists
                    (select 1 from delivery_items i where i.delivery_id = deliveries.id and i.account_id is not null)")
            .bind(done_before).execute(p).await?.rows_affected());
        write!(self, p => sqlx::query("update deliveries set body = null
                where ended_at < $1 and body is not null and state = 'done'")
            .bind(done_before).execute(p).await?.rows_affected());
        write!(self, p => sqlx::query("delete from deliveries where received_at < $1 and state <> 'in_progress'")
            .bind(came_before).execute(p).await?.rows_affected());
        Ok(())
    }

    /// Our subscriptions at a provider.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_subscriptions(&self, provider: &str, client_id: &str) -> Result<Vec<SubscriptionRow>> {
        let sql = "select external_id, callback_url, secret from subscriptions where provider = $1 and client_id = $2
            order by created_at";
        Ok(read!(self, p => sqlx::query_as(sql).bind(provider).bind(client_id).fetch_all(p).await?))
    }

    /// Keeps a subscription, new or known; a secret that is not told anew stays.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn store_subscription(
        &self,
        provider: &str,
        client_id: &str,
        row: &SubscriptionRow,
        now: DateTime<Utc>,
    ) -> Result<()> {
        write!(self, p => {
            sqlx::query("insert into subscriptions
                        (provider, client_id, external_id, callback_url, secret, created_at, updated_at)
                    values ($1, $2, $3, $4, $5, $6, $6)
                    on conflict (provider, client_id, external_id) do update set callback_url = excluded.callback_url,
                        secret = coalesce(excluded.secret, subscriptions.secret), updated_at = excluded.updated_at")
                .bind(provider).bind(client_id).bind(row.external_id.as_str()).bind(row.callback_url.as_str())
                .bind(row.secret.as_deref()).bind(now).execute(p).await?.rows_affected()
        });
        Ok(())
    }

    /// Forgets a subscription.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn delete_subscription(&self, provider: &str, client_id: &str, external_id: &str) -> Result<()> {
        write!(self, p => sqlx::query("delete from subscriptions
                where provider = $1 and client_id = $2 and external_id = $3")
            .bind(provider).bind(client_id).bind(external_id).execute(p).await?.rows_affected());
        Ok(())
    }
}
