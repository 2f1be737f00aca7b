use std::time::Duration;

use reqwest::header::HeaderMap;

use crate::model::quota::{Quota, Seen};
use crate::model::{Kind, PartName, ProviderName, SeriesType, StreamName};

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
    pub oauth: Option<OAuthSpec>,
    /// Its quotas, per application.
    pub quotas: &'static [Quota],
    /// Reads what its response headers tell of the quotas. Missing headers tell nothing.
    pub read_quotas: fn(&HeaderMap) -> Vec<Seen>,
    /// What the clock has to know of it.
    pub rhythm: Rhythm,
    /// What can be listed, in the order in which it is read.
    pub streams: &'static [StreamSpec],
    /// Every answer about a record that we keep.
    pub parts: &'static [PartSpec],
    /// How its data can come in.
    pub live: LiveSpec,
    /// What records and samples made of it can hold.
    pub coverage: Coverage,
    /// What it sends by itself, where it does.
    pub webhooks: Option<&'static super::WebhookSpec>,
}

impl ProviderSpec {
    /// Whether it has anything of this part of the mirrored API.
    #[must_use]
    pub fn supports(&self, part: DataPart) -> bool {
        self.streams.iter().any(|stream| stream.data == part)
    }

    /// Whether people grant access to it on a page of its own.
    #[must_use]
    pub fn has_oauth(&self) -> bool {
        self.oauth.is_some()
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

/// How a provider's news come, as far as the clock goes by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rhythm {
    /// Calls that a sync makes which finds next to nothing: so many are counted on for each that begins.
    pub calls: u64,
    /// Days before today that every daily sweep lists again; what is older has its turn with long histories.
    pub reconcile_days: i64,
    /// A connection that used to be pushed and was not for so long is quiet, seconds; 0: the provider pushes nothing.
    pub quiet_after_s: i64,
}

/// How data can come in.
#[derive(Debug)]
pub struct LiveSpec {
    /// Whether data can be asked for.
    pub rest_pull: bool,
    /// What the provider sends by itself, or on request.
    pub webhooks: &'static [WebhookKind],
    /// How many days back it can be asked for; `None`: as far back as it has data.
    pub max_historical_days: Option<u32>,
}

impl LiveSpec {
    /// How new data comes in when nobody says otherwise; `None`: neither way.
    #[must_use]
    pub fn mode(&self) -> Option<LiveMode> {
        if self.rest_pull { Some(LiveMode::Pull) } else { self.tells().then_some(LiveMode::Webhook) }
    }

    /// How new data comes in, by what was set; by [`LiveSpec::mode`] where nothing was.
    #[must_use]
    pub fn mode_as_set(&self, set: Option<&str>) -> Option<LiveMode> {
        set.and_then(LiveMode::parse).or_else(|| self.mode())
    }

    /// Whether both ways are open.
    #[must_use]
    pub fn is_configurable(&self) -> bool {
        self.rest_pull && self.tells()
    }

    fn tells(&self) -> bool {
        self.webhooks.iter().any(|kind| *kind != WebhookKind::Callback)
    }
}

/// What a provider's webhook brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WebhookKind {
    /// The data itself.
    Stream,
    /// Word that there is some.
    Ping,
    /// The data that was asked for, later.
    Callback,
}

/// How new data comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LiveMode {
    /// We ask.
    Pull,
    /// The provider tells.
    Webhook,
}

impl LiveMode {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Pull, Self::Webhook];

    /// The word in the database and in answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Webhook => "webhook",
        }
    }

    /// The reverse of [`LiveMode::as_str`].
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.as_str() == text)
    }
}

/// What records and samples of a provider can hold, in the mirrored API's names; a single record may lack any of it.
#[derive(Debug)]
pub struct Coverage {
    /// Series of samples.
    pub series: &'static [SeriesType],
    /// Some of [`WORKOUT_FIELDS`].
    pub workout_fields: &'static [&'static str],
    /// Some of [`SLEEP_FIELDS`].
    pub sleep_fields: &'static [&'static str],
    /// Some of [`MENSTRUAL_CYCLE_FIELDS`].
    pub menstrual_cycle_fields: &'static [&'static str],
    /// Some of [`HEALTH_SCORES`].
    pub health_scores: &'static [&'static str],
}

/// Numbers of a workout.
pub const WORKOUT_FIELDS: [&str; 15] = [
    "distance",
    "energy_burned",
    "heart_rate_avg",
    "heart_rate_max",
    "heart_rate_min",
    "steps_count",
    "moving_time_seconds",
    "average_speed",
    "max_speed",
    "average_watts",
    "max_watts",
    "average_cadence",
    "total_elevation_gain",
    "elev_high",
    "elev_low",
];

/// Numbers of a night.
pub const SLEEP_FIELDS: [&str; 9] = [
    "sleep_total_duration_minutes",
    "sleep_time_in_bed_minutes",
    "sleep_efficiency_score",
    "sleep_deep_minutes",
    "sleep_rem_minutes",
    "sleep_light_minutes",
    "sleep_awake_minutes",
    "sleep_stages",
    "is_nap",
];

/// Facts of a cycle.
pub const MENSTRUAL_CYCLE_FIELDS: [&str; 15] = [
    "day_in_cycle",
    "current_phase",
    "current_phase_type",
    "length_of_current_phase",
    "days_until_next_phase",
    "cycle_length",
    "predicted_cycle_length",
    "is_predicted_cycle",
    "period_length",
    "fertile_window_start",
    "length_of_fertile_window",
    "has_specified_cycle_length",
    "has_specified_period_length",
    "pregnancy_snapshot",
    "last_updated_at",
];

/// Scores that a provider computes itself.
pub const HEALTH_SCORES: [&str; 8] =
    ["sleep", "recovery", "readiness", "activity", "stress", "resilience", "body_battery", "strain"];

/// How a person grants access, and how it is given back. Codes live for 30 seconds to ten minutes: they are exchanged in
/// the request that brings them, so their life is no data here.
#[derive(Clone, Copy)]
pub struct OAuthSpec {
    /// Where the person agrees.
    pub authorize_url: &'static str,
    /// Further parameters of that address.
    pub authorize_params: &'static [(&'static str, &'static str)],
    /// Where codes and refresh tokens are exchanged.
    pub token_url: &'static str,
    /// Further fields of every call to it.
    pub token_params: &'static [(&'static str, &'static str)],
    /// Further fields of a refresh.
    pub refresh_params: &'static [(&'static str, &'static str)],
    /// What we ask for. Empty: what an application may read is set at the provider.
    pub scopes: &'static [Scope],
    /// Between two scopes in the authorize address.
    pub scope_separator: &'static str,
    /// Where the scopes are told that were granted: people untick boxes.
    pub scopes_told: ScopesTold,
    /// Without any of these nothing can be read, and the grant is refused. Empty: there is no such thing.
    pub reads_with: &'static [&'static str],
    /// How the application names itself at the token address.
    pub client_auth: ClientAuth,
    /// Whether a PKCE verifier (S256) goes with each visit.
    pub pkce: bool,
    /// Whether the callback address is said again when the code is exchanged.
    pub redirect_in_exchange: bool,
    /// A code refused within this time after it was made may be good a moment later: it is tried once more after it.
    pub code_settles: Option<Duration>,
    /// The token answer's members stand below this JSON pointer; empty for the top.
    pub grant_at: &'static str,
    /// Whose grant it is, where the token answer tells: a member, or a claim of its access token. What it does not tell,
    /// [`super::Provider::fetch_owner`] asks for.
    pub owner_in_grant: fn(&serde_json::Value) -> super::oauth::Owner,
    /// Whether there are refresh tokens. Without them the access token itself lives for long: it is kept as the grant,
    /// sealed as a refresh token is.
    pub refreshes: bool,
    /// A grant ends when its token endpoint is not asked for so long. `None`: it does not.
    pub idle_limit: Option<Duration>,
    /// When a refused refresh means that the grant is gone.
    pub dead: Dead,
    /// Says what an answer of the token endpoint refuses, from status and body; `None`: nothing, it is a grant.
    pub read_refusal: fn(u16, &[u8]) -> Option<super::oauth::Refusal>,
    /// How we take our leave when the last user of an account is disconnected.
    pub leave: Leave,
}

impl OAuthSpec {
    /// What was asked for and not granted.
    #[must_use]
    pub fn missing(&self, granted: &[String]) -> Vec<&'static Scope> {
        self.scopes.iter().filter(|scope| !granted.iter().any(|name| name == scope.name)).collect()
    }

    /// Whether anything can be read with these.
    #[must_use]
    pub fn can_read(&self, granted: &[String]) -> bool {
        self.reads_with.is_empty() || self.reads_with.iter().any(|needed| granted.iter().any(|name| name == needed))
    }
}

/// One permission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scope {
    /// The provider's word.
    pub name: &'static str,
    /// What it lets us read, in plain words.
    pub lets: &'static str,
}

/// Where the granted scopes are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScopesTold {
    /// In the parameter `scope` of the callback.
    Callback,
    /// In the member `scope` of the token answer.
    Grant,
    /// By a call of its own: [`super::Provider::fetch_owner`].
    Owner,
    /// Nowhere: it is all or nothing.
    Nowhere,
}

/// How a grant is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// The provider has no way.
    Never,
    /// RFC 7009 at this address: client by HTTP Basic, the refresh token as `token`.
    Revoke(&'static str),
    /// By a call of its own: [`super::Provider::deregister`].
    Call,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::series;

    #[test]
    fn coverage_is_told_in_known_words() {
        let known: Vec<SeriesType> = series::all().collect();
        for provider in crate::providers::REGISTRY {
            let (name, told) = (provider.spec().name, &provider.spec().coverage);
            assert!(told.series.iter().all(|series| known.contains(series)), "{name}");
            for (words, all) in [
                (told.workout_fields, &WORKOUT_FIELDS[..]),
                (told.sleep_fields, &SLEEP_FIELDS),
                (told.menstrual_cycle_fields, &MENSTRUAL_CYCLE_FIELDS),
                (told.health_scores, &HEALTH_SCORES),
            ] {
                let order: Vec<_> = words.iter().map(|word| all.iter().position(|known| known == word)).collect();
                assert!(order.iter().all(Option::is_some) && order.is_sorted(), "{name}: {words:?}");
            }
        }
    }

    #[test]
    fn how_new_data_comes_in_follows_from_what_can_be_done() {
        use WebhookKind::{Callback, Ping, Stream};
        let live = |rest_pull, webhooks| LiveSpec { rest_pull, webhooks, max_historical_days: None };
        for (spec, mode, configurable) in [
            (live(true, &[Ping]), Some(LiveMode::Pull), true),
            (live(true, &[Stream]), Some(LiveMode::Pull), true),
            (live(true, &[]), Some(LiveMode::Pull), false),
            (live(false, &[Stream, Callback]), Some(LiveMode::Webhook), false),
            (live(false, &[]), None, false),
        ] {
            assert_eq!((spec.mode(), spec.is_configurable()), (mode, configurable), "{spec:?}");
            for set in [None, Some("nonsense")] {
                assert_eq!(spec.mode_as_set(set), mode, "{spec:?}");
            }
            assert_eq!(spec.mode_as_set(Some("webhook")), Some(LiveMode::Webhook));
            assert_eq!(spec.mode_as_set(Some("pull")), Some(LiveMode::Pull));
        }
    }
}
