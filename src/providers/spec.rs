use reqwest::header::HeaderMap;

use crate::model::quota::{Quota, Seen};
use crate::model::{Kind, PartName, ProviderName, StreamName};

/// What a provider is, as data. Path checks, the API document, settings, the conformance suite, the simulator and
/// telemetry labels follow from it.
pub struct ProviderSpec {
    /// `strava`
    pub name: ProviderName,
    /// `Strava`
    pub title: &'static str,
    /// Where calls go, prefix included, without a slash at the end. A setting overrides it.
    pub api_base_url: &'static str,
    /// Its OAuth, where it has one.
    pub oauth: OAuthSpec,
    /// Its quotas, per application.
    pub quotas: &'static [Quota],
    /// Reads what its response headers tell of the quotas. Missing headers tell nothing.
    pub read_quotas: fn(&HeaderMap) -> Vec<Seen>,
    /// What can be listed, in the order in which it is read.
    pub streams: &'static [StreamSpec],
    /// Every answer about a record that we keep.
    pub parts: &'static [PartSpec],
}

impl ProviderSpec {
    /// Whether it has anything of this part of the mirrored API.
    #[must_use]
    pub fn supports(&self, part: DataPart) -> bool {
        self.streams.iter().any(|stream| stream.data == part)
    }

    /// The part of a kind with this name.
    #[must_use]
    pub fn part(&self, kind: Kind, name: &str) -> Option<&'static PartSpec> {
        self.parts.iter().find(|part| part.kind == kind && part.name.0 == name)
    }

    /// The stream with this name.
    #[must_use]
    pub fn stream(&self, name: &str) -> Option<&'static StreamSpec> {
        self.streams.iter().find(|stream| stream.name.0 == name)
    }
}

/// How a person grants access.
pub struct OAuthSpec {
    /// Where the person agrees.
    pub authorize_url: &'static str,
    /// Where codes and refresh tokens are exchanged.
    pub token_url: &'static str,
    /// What we ask for.
    pub scopes: &'static [&'static str],
    /// Between two scopes in the authorize address.
    pub scope_separator: &'static str,
    /// How the application names itself at the token address.
    pub client_auth: ClientAuth,
    /// When a refused refresh means that the grant is gone.
    pub dead: Dead,
    /// Says what a refusal of the token endpoint means, from status and body.
    pub read_refusal: fn(u16, &[u8]) -> super::oauth::Refusal,
    /// The provider's user id in the answer to a code exchange, where it is told there.
    pub account_in_grant: fn(&serde_json::Value) -> Option<String>,
}

/// Where the client secret goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// Form fields `client_id` and `client_secret`.
    Body,
    /// HTTP Basic.
    Basic,
}

/// When a refused refresh means that the grant is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dead {
    /// The first refusal that names the grant is final.
    Once,
    /// Only this many refusals in a row over at least this many seconds are: the provider errs at times.
    Repeated(u32, u32),
}

/// The two parts of the mirrored API's `details`, and what both stand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DataPart {
    /// `workouts`
    Workouts,
    /// `data_247`
    Daily,
    /// Profile and gear: read with either, counted in neither.
    Profile,
}

/// What the bounds of a stream's windows mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// When the thing began.
    Start,
    /// There is none: the whole list is read once per run.
    None,
}

/// What the absence of an item from a complete list proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deletes {
    /// Reason to ask for the item itself; 404 deletes it.
    ConfirmByFetch,
    /// Nothing.
    Never,
}

/// One kind of data that can be listed.
#[derive(Debug)]
pub struct StreamSpec {
    /// Its name.
    pub name: StreamName,
    /// Which part of `details` it counts for.
    pub data: DataPart,
    /// The kind of its records.
    pub kind: Kind,
    /// The part that its list rows are.
    pub part: PartName,
    /// What its windows' bounds mean.
    pub axis: Axis,
    /// How far a later sync reads back, milliseconds: late uploads and edits inside it are found.
    pub overlap_ms: i64,
    /// Items a page when nobody says otherwise, and the provider's largest.
    pub page_size: u32,
    /// What absence proves.
    pub deletes: Deletes,
}

/// One answer about a record that we keep.
pub struct PartSpec {
    /// The kind of the records it belongs to.
    pub kind: Kind,
    /// Its name.
    pub name: PartName,
    /// The primary part makes the record; a kind has exactly one.
    pub primary: bool,
    /// JSON pointers of values that change without anything having happened (kudos counts, image addresses).
    /// `*` stands for every element of an array.
    pub volatile: &'static [&'static str],
    /// When a change of the primary part asks for this one again.
    pub refetch: Refetch,
    /// Whether it is fetched when no setting says otherwise.
    pub on_by_default: bool,
    /// The folder of its files.
    pub collection: &'static str,
    /// How its files live.
    pub file: FileRule,
    /// How the body is written on the wire.
    pub wire: Wire,
}

/// How the body of a part is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// One JSON value.
    Json,
}

/// When a change of the primary part asks for another part again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refetch {
    /// Whenever a value that is not volatile changed.
    OnChange,
    /// Only when the record's shape (start, length, distance) changed.
    OnShape,
}

/// How the files of a part live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileRule {
    /// One file per record and version, never rewritten: `activities/2026-02-05-morning-run-123456.json`. The text
    /// before the id is the record's stem; for parts other than the primary one it is this word instead of the slug.
    Entity(Option<&'static str>),
    /// One file per record, rewritten when it changed: `gear/b123.json`.
    Reference,
    /// One file for the connection, rewritten when it changed: `athlete.json`.
    Single(&'static str),
}
