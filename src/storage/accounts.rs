use chrono::{DateTime, Utc};

use super::db::{accept, read};
use super::{Db, Result};
use crate::model::AccountId;

/// A person's account at a provider, with its grant.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct Account {
    /// Its id.
    pub id: AccountId,
    /// Provider.
    pub provider: String,
    /// Our application there.
    pub client_id: String,
    /// The provider's id of the person; `pending:…` until the first call names it.
    pub provider_user_id: String,
    /// `active` or `reauth`.
    pub status: String,
    /// Why it is not active, in plain words.
    pub reason: Option<String>,
    /// Sealed.
    pub refresh_token: Option<Vec<u8>>,
    /// Grows with every new token.
    pub token_version: i64,
    /// Access tokens up to this version belong to an earlier grant.
    pub grant_version: i64,
    /// Who refreshes right now, died doing it, or got no answer.
    pub refresh_owner: Option<String>,
    /// Until when it is theirs.
    pub refresh_until: Option<DateTime<Utc>>,
    /// Refusals in a row. Of an account that is not active: 0 unless it was the provider that ended the grant.
    pub refusals: i64,
    /// When the first of them came.
    pub refused_since: Option<DateTime<Utc>>,
    /// Digest of the refresh token that a person last pasted.
    pub imported_hash: Option<Vec<u8>>,
    /// What the person granted, in the provider's words with blanks between; `None`: never told.
    pub scopes: Option<String>,
    /// The name that the person has at the provider.
    pub username: Option<String>,
}

/// What makes or replaces an account's grant.
#[derive(Clone, Debug)]
pub struct NewAccount {
    /// Its id, unless the account exists already.
    pub id: AccountId,
    /// Provider.
    pub provider: String,
    /// Our application there.
    pub client_id: String,
    /// The provider's id of the person, or `pending:…`.
    pub provider_user_id: String,
    /// Digest of the pasted token, where one was pasted.
    pub imported_hash: Option<Vec<u8>>,
}

/// The right to refresh one account's token, given to one process for a time.
#[derive(Clone, Debug, PartialEq)]
pub struct RefreshLease {
    /// The account as it was when the lease was taken.
    pub account: Account,
    /// An earlier holder died in the middle, or its answer never came: the provider may have given it a token that we
    /// never saw.
    pub interrupted: bool,
}

/// What a refresh brought, as far as it is stored.
#[derive(Clone, Debug, Default)]
pub struct Refreshed {
    /// The new refresh token, sealed; `None`: the old one stays.
    pub sealed: Option<Vec<u8>>,
    /// Until then the access token is on its way to other processes, which do well to wait for it.
    pub coming: Option<DateTime<Utc>>,
    /// When the grant is refreshed again though nobody needs it.
    pub renew_at: Option<DateTime<Utc>>,
}

/// Why a refresh brought nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefreshFailure<'a> {
    /// The provider did not take the token.
    Unspent,
    /// The provider may have taken it: no whole answer came. The holder's name stays, and tells so.
    MaybeSpent,
    /// The provider refused it.
    Refused,
    /// The provider refused it for good: the grant is over, for this reason.
    Dead(&'a str),
    /// The grant is over, and that is our own doing: nobody took it back.
    Lost(&'a str),
}

const COLUMNS: &str = "id, provider, client_id, provider_user_id, status, reason, refresh_token, token_version,
    grant_version, refresh_owner, refresh_until, refusals, refused_since, imported_hash, scopes, username";

impl Db {
    /// An account by id.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn find_account(&self, id: AccountId) -> Result<Option<Account>> {
        let sql = format!("select {COLUMNS} from accounts where id = $1");
        Ok(read!(self, p => sqlx::query_as(&sql).bind(id).fetch_optional(p).await?))
    }

    /// Makes an account without a grant, or finds the one that is this person's already. The grant is stored by
    /// [`Db::store_grant`], since its ciphertext names the account's id.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn upsert_account(&self, new: NewAccount, now: DateTime<Utc>) -> Result<Account> {
        let sql = format!(
            "insert into accounts (id, provider, client_id, provider_user_id, status, imported_hash, created_at, updated_at)
            values ($1, $2, $3, $4, 'active', $5, $6, $6)
            on conflict (provider, client_id, provider_user_id) do update
            set imported_hash = coalesce(excluded.imported_hash, accounts.imported_hash), updated_at = excluded.updated_at
            returning {COLUMNS}"
        );
        accept!(self, c => Ok(sqlx::query_as(&sql)
            .bind(new.id)
            .bind(new.provider)
            .bind(new.client_id)
            .bind(new.provider_user_id)
            .bind(new.imported_hash)
            .bind(now)
            .fetch_one(&mut *c)
            .await?))
    }

    /// Stores a grant that a person gave: revives the account.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn store_grant(&self, id: AccountId, sealed: Vec<u8>, now: DateTime<Utc>) -> Result<()> {
        let sql = "update accounts set refresh_token = $2, token_version = token_version + 1, grant_version = token_version + 1, status = 'active',
                reason = null, refusals = 0, refused_since = null, refresh_owner = null, refresh_until = null,
                updated_at = $3
            where id = $1";
        accept!(self, c => {
            sqlx::query(sql).bind(id).bind(sealed).bind(now).execute(&mut *c).await?;
            Ok(())
        })
    }

    /// Notes which token a person last pasted, so that it is taken in once.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn note_imported(&self, id: AccountId, imported_hash: Vec<u8>) -> Result<()> {
        accept!(self, c => {
            sqlx::query("update accounts set imported_hash = $2 where id = $1").bind(id).bind(imported_hash)
                .execute(&mut *c).await?;
            Ok(())
        })
    }

    /// Takes a grant away again: it turned out to be another person's.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn drop_grant(&self, id: AccountId, why: &'static str, now: DateTime<Utc>) -> Result<()> {
        let sql = "update accounts set refresh_token = null, token_version = token_version + 1, status = 'reauth',
                refusals = 0, reason = $2, updated_at = $3
            where id = $1";
        accept!(self, c => {
            sqlx::query(sql).bind(id).bind(why).bind(now).execute(&mut *c).await?;
            Ok(())
        })
    }

    /// Takes the right to refresh: `None` while another process has it, or when the version moved on or the grant is over
    /// (a second refusal would only hide why).
    ///
    /// # Errors
    /// When the database fails; then no token may be spent.
    pub async fn take_refresh_lease(
        &self,
        id: AccountId,
        version: i64,
        owner: &str,
        now: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> Result<Option<RefreshLease>> {
        let Some(before) = self.find_account(id).await? else { return Ok(None) };
        if before.token_version != version {
            return Ok(None);
        }
        let sql = format!(
            "update accounts set refresh_owner = $3, refresh_until = $5
            where id = $1 and token_version = $2 and status = 'active'
                and (refresh_owner is null or refresh_until is null or refresh_until < $4)
            returning {COLUMNS}"
        );
        let owner = owner.to_owned();
        let taken: Option<Account> = accept!(self, c => Ok::<_, super::Error>(sqlx::query_as(&sql)
            .bind(id)
            .bind(version)
            .bind(owner)
            .bind(now)
            .bind(until)
            .fetch_optional(&mut *c)
            .await?))?;
        // A holder that ends well clears the owner; one that is still named died, or got no answer.
        Ok(taken.map(|account| RefreshLease { interrupted: before.refresh_owner.is_some(), account }))
    }

    /// Stores what a refresh brought and gives the lease back. `false`: the lease was lost, the version moved on. While an
    /// access token is on its way, `refresh_until` says so without an owner; a lease is given all the same, to whoever was
    /// refused it already.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn store_refresh(
        &self,
        id: AccountId,
        version: i64,
        owner: &str,
        brought: Refreshed,
        now: DateTime<Utc>,
    ) -> Result<bool> {
        let sql = "update accounts set refresh_token = coalesce($4, refresh_token), token_version = token_version + 1,
                refresh_owner = null, refresh_until = $6, refusals = 0, refused_since = null, status = 'active',
                reason = null, updated_at = $5, renew_at = $7
            where id = $1 and token_version = $2 and refresh_owner = $3";
        let owner = owner.to_owned();
        accept!(self, c => Ok(sqlx::query(sql).bind(id).bind(version).bind(owner).bind(brought.sealed)
            .bind(now).bind(brought.coming).bind(brought.renew_at)
            .execute(&mut *c).await?.rows_affected() > 0))
    }

    /// Grants of active connections that have to be refreshed though nobody needs them. They are taken by whoever is
    /// answered them: nobody else is before `again_at`.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn take_idle_grants(
        &self,
        now: DateTime<Utc>,
        again_at: DateTime<Utc>,
        limit: i64,
    ) -> Result<Vec<Account>> {
        let sql = format!(
            "update accounts set renew_at = $2 where renew_at <= $1 and id in (
                select a.id from accounts a where a.renew_at <= $1 and a.status = 'active' and a.refresh_token is not null
                    and exists (select 1 from connections c where c.account_id = a.id and c.status = 'active')
                order by a.renew_at limit $3)
            returning {COLUMNS}"
        );
        accept!(self, c => Ok(sqlx::query_as(&sql).bind(now).bind(again_at).bind(limit).fetch_all(&mut *c).await?))
    }

    /// Gives the lease back after a refresh that brought nothing. A dead grant's token is dropped.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn fail_refresh(
        &self,
        id: AccountId,
        version: i64,
        owner: &str,
        failure: RefreshFailure<'_>,
        now: DateTime<Utc>,
    ) -> Result<()> {
        let sql = "update accounts set
                refresh_owner = case when $4 then refresh_owner else null end,
                refresh_until = null,
                refresh_token = case when $6 = '' then refresh_token else null end,
                refusals = case when $8 then 0 else refusals + $5 end,
                refused_since = case when $5 = 1 then coalesce(refused_since, $7) else refused_since end,
                status = case when $6 = '' then status else 'reauth' end,
                reason = case when $6 = '' then reason else $6 end,
                updated_at = $7
            where id = $1 and token_version = $2 and refresh_owner = $3";
        let (keep, refused, dead) = match failure {
            RefreshFailure::Unspent => (false, 0_i64, ""),
            RefreshFailure::MaybeSpent => (true, 0, ""),
            RefreshFailure::Refused => (false, 1, ""),
            RefreshFailure::Dead(why) => (false, 1, why),
            RefreshFailure::Lost(why) => (false, 0, why),
        };
        let lost = matches!(failure, RefreshFailure::Lost(_));
        let (owner, dead) = (owner.to_owned(), dead.to_owned());
        accept!(self, c => {
            sqlx::query(sql).bind(id).bind(version).bind(owner).bind(keep).bind(refused).bind(dead).bind(now)
                .bind(lost).execute(&mut *c).await?;
            Ok(())
        })
    }

    /// Names an account that was pasted in before the provider told whose it is. `false`: the person's account
    /// exists already under another id, and the caller has to move over.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn name_account(&self, id: AccountId, provider_user_id: &str, now: DateTime<Utc>) -> Result<bool> {
        let sql = "update accounts set provider_user_id = $2, updated_at = $3
            where id = $1 and provider_user_id like 'pending:%'
                and not exists (select 1 from accounts o where o.provider = accounts.provider
                    and o.client_id = accounts.client_id and o.provider_user_id = $2)";
        let provider_user_id = provider_user_id.to_owned();
        accept!(self, c => Ok(sqlx::query(sql).bind(id).bind(provider_user_id).bind(now)
            .execute(&mut *c).await?.rows_affected() > 0))
    }

    /// Whether any token is stored.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn has_sealed_tokens(&self) -> Result<bool> {
        let sql = "select exists (select 1 from accounts where refresh_token is not null)";
        let (found,): (bool,) = read!(self, p => sqlx::query_as(sql).fetch_one(p).await?);
        Ok(found)
    }

    /// Whether this pasted token was taken in already, for whomever.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn is_imported(&self, provider: &str, hash: &[u8]) -> Result<bool> {
        let sql = "select exists (select 1 from accounts where provider = $1 and imported_hash = $2)";
        let (found,): (bool,) = read!(self, p => sqlx::query_as(sql).bind(provider).bind(hash).fetch_one(p).await?);
        Ok(found)
    }
}
