//! What every provider is and does, as one trait and one table of data per provider.
//!
//! May name model, clock, config and telemetry. What must always hold: a provider never touches our database, never
//! refreshes a token and never waits long; it answers [`FetchError`] and the engine decides. One folder and one
//! line in `providers!` add a provider.

pub mod http;
pub mod oauth;
#[cfg(feature = "simulator")]
pub mod simulation;
mod spec;
pub mod webhook;

pub use http::{AccessToken, Answer, Api, FetchError, Gate, Http};
pub use spec::{
    Axis, ClientAuth, Coverage, DataPart, Dead, Deletes, FileRule, HEALTH_SCORES, Leave, LiveMode, LiveSpec,
    MENSTRUAL_CYCLE_FIELDS, OAuthSpec, PartSpec, ProviderSpec, Refetch, Rhythm, SLEEP_FIELDS, Scope, ScopesTold,
    StreamSpec, WORKOUT_FIELDS, WebhookKind, Wire,
};

pub use webhook::{Notice, WebhookSpec};

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde_json::Value;

use crate::model::{Kind, Normalized, PartName, ProviderName, UserId};

macro_rules! providers {
    ($($module:ident),* $(,)?) => {
        $(pub mod $module;)*

        /// Every provider, in the order of the documentation.
        pub static REGISTRY: &[&dyn Provider] = &[$(&$module::PROVIDER),*];
    };
}

providers! { strava }

/// Finds a provider by its name in paths and settings.
#[must_use]
pub fn find(name: &str) -> Option<&'static dyn Provider> {
    REGISTRY.iter().copied().find(|provider| provider.spec().name.0 == name)
}

/// The names of all providers, in order.
pub fn names() -> impl Iterator<Item = ProviderName> {
    REGISTRY.iter().map(|provider| provider.spec().name)
}

/// One page of a stream is asked for with this.
#[derive(Clone, Debug)]
pub struct PageRequest<'a> {
    /// Which stream.
    pub stream: &'a StreamSpec,
    /// Lower bound on the stream's axis, milliseconds, inside; [`crate::model::BEGINNING_MS`] for none.
    pub lo: i64,
    /// Upper bound, milliseconds, outside.
    pub hi: i64,
    /// The place reached inside these bounds, as an earlier page left it.
    pub position: Option<&'a Value>,
    /// Items a page; at most the stream's largest.
    pub limit: u32,
    /// Items to skip at the first page (the mirrored API's `offset`).
    pub offset: u32,
}

/// One item of a page: one answer about one record, exactly as received.
#[derive(Clone, Debug)]
pub struct Item {
    /// What it is about.
    pub kind: Kind,
    /// The provider's id of it, as text.
    pub external_id: String,
    /// Which answer this is.
    pub part: PartName,
    /// The bytes received, cut out of the page without change.
    pub body: Bytes,
    /// The record's place on the stream's axis; orders later part calls, newest first.
    pub order_at: DateTime<Utc>,
}

/// What comes after a page.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// Ask again from this place.
    Position(Value),
    /// The window was read to its end.
    End,
}

/// One page as fetched.
#[derive(Clone, Debug)]
pub struct FetchedPage {
    /// The items, in the provider's order.
    pub items: Vec<Item>,
    /// Items that were listed but could not be read (no id, no time): each is named in the report.
    pub unreadable: Vec<String>,
    /// What comes after it.
    pub next: Next,
}

/// One part as fetched.
#[derive(Clone, Debug)]
pub enum FetchedPart {
    /// The bytes received.
    Body(Bytes),
    /// The provider has none (404 and its like).
    None,
}

/// A stored answer, handed to the normaliser.
#[derive(Clone, Debug)]
pub struct PartBody {
    /// Which answer.
    pub part: PartName,
    /// As received.
    pub body: Bytes,
}

/// Why parts could not be normalised.
#[derive(Debug, thiserror::Error)]
#[error("{part} part of {kind} {external_id} cannot be read: {why}")]
pub struct NormalizeError {
    /// What sort of record.
    pub kind: &'static str,
    /// Which record.
    pub external_id: String,
    /// The part at fault.
    pub part: PartName,
    /// What is wrong with it; never quotes the content.
    pub why: String,
}

/// What an item comes to that was asked for by its id.
#[derive(Clone, Debug)]
pub enum FetchedItem {
    /// Its answers; the primary part comes first. Without one, the item is not listed (yet).
    Found(Vec<Item>),
    /// The provider has none (404 and its like).
    None,
}

/// Three ways in (`fetch_page`, `fetch_part`, `fetch_item` after a delivery), one way down (`normalize`).
#[async_trait]
pub trait Provider: Send + Sync + 'static {
    /// What it is, as data.
    fn spec(&self) -> &'static ProviderSpec;

    /// One page of a stream.
    async fn fetch_page(&self, api: &Api<'_>, request: &PageRequest<'_>) -> Result<FetchedPage, FetchError>;

    /// One answer about one record. The part named `presence` only asks whether the record still exists:
    /// any [`FetchedPart::Body`] says yes, [`FetchedPart::None`] says that it is gone.
    async fn fetch_part(
        &self,
        api: &Api<'_>,
        kind: Kind,
        external_id: &str,
        part: PartName,
    ) -> Result<FetchedPart, FetchError>;

    /// What a new grant needs before it can be used: whose it is and what it allows, where the token answer does not say
    /// (a profile call, a list of permissions), and a registration of the person, where the provider wants one. `known`
    /// is what the answer told, `user` the person's id with us. Answers `known` with what it learnt.
    async fn fetch_owner(&self, api: &Api<'_>, known: oauth::Owner, user: UserId) -> Result<oauth::Owner, FetchError> {
        let _ = (api, user);
        Ok(known)
    }

    /// Tells the provider that we are done with a person ([`Leave::Call`] only).
    async fn deregister(&self, api: &Api<'_>, app: &oauth::App, provider_user_id: &str) -> Result<(), FetchError> {
        let _ = (api, app, provider_user_id);
        Ok(())
    }

    /// One item by its id, with its primary part as a listing would bring it, byte for byte. `start`: where its record is
    /// known to lie on the stream's axis. Called for what a delivery named only.
    async fn fetch_item(
        &self,
        api: &Api<'_>,
        kind: Kind,
        external_id: &str,
        start: Option<DateTime<Utc>>,
    ) -> Result<FetchedItem, FetchError>;

    /// All stored parts of one record, made into the record and its samples. Pure: same parts, same answer.
    /// The first element is always the kind's primary part.
    fn normalize(&self, kind: Kind, external_id: &str, parts: &[PartBody]) -> Result<Normalized, NormalizeError>;
}

/// The part that only asks whether a record still exists.
pub const PRESENCE: PartName = PartName("presence");
