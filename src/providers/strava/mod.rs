//! Strava: one quota for all users, thin webhooks, start-time axis.

mod client;
mod normalize;
#[cfg(feature = "simulator")]
pub mod simulator;
mod webhook;
mod wire;

use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};

use super::oauth::Owner;
use super::{
    Api, Axis, ClientAuth, Coverage, DataPart, Dead, Deletes, FetchError, FetchedItem, FetchedPage, FetchedPart,
    FileRule, Leave, LiveSpec, NormalizeError, OAuthSpec, PageRequest, PartBody, PartSpec, Provider, ProviderSpec,
    Refetch, Rhythm, Scope, ScopesTold, StreamSpec, WebhookKind, Wire,
};
use crate::model::quota::{Quota, Reset};
use crate::model::{Kind, Normalized, PartName, ProviderName, StreamName, UserId, series};

/// The one value of this provider.
pub static PROVIDER: Strava = Strava;

/// Strava.
pub struct Strava;

const SUMMARY: PartName = PartName("summary");
const DETAIL: PartName = PartName("detail");
const STREAMS: PartName = PartName("streams");
const ZONES: PartName = PartName("zones");

const DAY_MS: i64 = 86_400_000;

static SPEC: ProviderSpec = ProviderSpec {
    name: ProviderName("strava"),
    title: "Strava",
    api_base_url: "https://www.strava.com/api/v3",
    oauth: Some(OAuthSpec {
        authorize_url: "https://www.strava.com/oauth/authorize",
        authorize_params: &[],
        token_url: "https://www.strava.com/oauth/token",
        token_params: &[],
        refresh_params: &[],
        scopes: &[
            Scope { name: "read", lets: "your public profile and your gear" },
            Scope { name: "read_all", lets: "your private routes and segments" },
            Scope { name: "profile:read_all", lets: "your whole profile, with weight and zones" },
            Scope {
                name: "activity:read_all",
                lets: "all your activities, with those only you can see and the parts hidden near your home",
            },
        ],
        scope_separator: ",",
        scopes_told: ScopesTold::Callback,
        reads_with: &["activity:read_all", "activity:read"],
        client_auth: ClientAuth::Body,
        pkce: false,
        redirect_in_exchange: false,
        // Seen by others: a code may be refused for about two seconds after it was made.
        code_settles: Some(Duration::from_secs(2)),
        grant_at: "",
        owner_in_grant: client::owner_in_grant,
        refreshes: true,
        // None is published. Half a year: so that a grant nobody uses is at least known to be alive.
        idle_limit: Some(Duration::from_secs(180 * 86_400)),
        dead: Dead::Once,
        read_refusal: client::read_refusal,
        // The older /oauth/deauthorize ends in June 2027.
        leave: Leave::Revoke("https://www.strava.com/oauth/revoke"),
    }),
    quotas: &[
        Quota { name: std::borrow::Cow::Borrowed("15m"), limit: 200, reset: Reset::NaturalMinutes(15) },
        Quota { name: std::borrow::Cow::Borrowed("1d"), limit: 2000, reset: Reset::UtcDay },
        Quota { name: std::borrow::Cow::Borrowed("read-15m"), limit: 100, reset: Reset::NaturalMinutes(15) },
        Quota { name: std::borrow::Cow::Borrowed("read-1d"), limit: 1000, reset: Reset::UtcDay },
    ],
    read_quotas: client::read_quotas,
    rhythm: Rhythm {
        // The profile, the page, one that repeats its last row, an empty one.
        calls: 4,
        reconcile_days: 90,
        // Who trains every other day is never quiet.
        quiet_after_s: 2 * 86_400,
    },
    streams: &[
        StreamSpec {
            name: StreamName("athlete"),
            data: DataPart::Profile,
            kind: Kind::Athlete,
            part: SUMMARY,
            axis: Axis::None,
            overlap_ms: 0,
            page_size: 1,
            deletes: Deletes::Never,
        },
        StreamSpec {
            name: StreamName("activities"),
            data: DataPart::Workouts,
            kind: Kind::Workout,
            part: SUMMARY,
            axis: Axis::Start,
            // Watches that are read out by cable bring a week at once.
            overlap_ms: 7 * DAY_MS,
            page_size: 200,
            deletes: Deletes::ConfirmByFetch,
        },
    ],
    parts: &[
        PartSpec {
            kind: Kind::Athlete,
            name: SUMMARY,
            primary: true,
            volatile: &[
                "/updated_at",
                "/follower_count",
                "/friend_count",
                "/mutual_friend_count",
                "/profile",
                "/profile_medium",
                "/bikes/*/distance",
                "/bikes/*/converted_distance",
                "/shoes/*/distance",
                "/shoes/*/converted_distance",
            ],
            refetch: Refetch::OnChange,
            on_by_default: true,
            collection: "",
            file: FileRule::Single("athlete"),
            wire: Wire::Json,
        },
        PartSpec {
            kind: Kind::Gear,
            name: SUMMARY,
            primary: true,
            volatile: &["/distance", "/converted_distance"],
            refetch: Refetch::OnChange,
            on_by_default: true,
            collection: "gear",
            file: FileRule::Reference,
            wire: Wire::Json,
        },
        PartSpec {
            kind: Kind::Workout,
            name: SUMMARY,
            primary: true,
            volatile: &[
                "/achievement_count",
                "/kudos_count",
                "/comment_count",
                "/athlete_count",
                "/photo_count",
                "/total_photo_count",
                "/pr_count",
                "/has_kudoed",
            ],
            refetch: Refetch::OnChange,
            on_by_default: true,
            collection: "activities",
            file: FileRule::Entity(None),
            wire: Wire::Json,
        },
        PartSpec {
            kind: Kind::Workout,
            name: DETAIL,
            primary: false,
            volatile: &[
                "/achievement_count",
                "/kudos_count",
                "/comment_count",
                "/athlete_count",
                "/photo_count",
                "/total_photo_count",
                "/pr_count",
                "/has_kudoed",
                "/gear/distance",
                "/gear/converted_distance",
                "/photos",
                "/embed_token",
                "/segment_efforts",
                "/best_efforts",
                "/similar_activities",
                "/highlighted_kudosers",
            ],
            refetch: Refetch::OnChange,
            on_by_default: false,
            collection: "details",
            file: FileRule::Entity(Some("detail")),
            wire: Wire::Json,
        },
        PartSpec {
            kind: Kind::Workout,
            name: STREAMS,
            primary: false,
            volatile: &[],
            refetch: Refetch::OnShape,
            on_by_default: true,
            collection: "streams",
            file: FileRule::Entity(Some("streams")),
            wire: Wire::Json,
        },
        PartSpec {
            kind: Kind::Workout,
            name: ZONES,
            primary: false,
            volatile: &[],
            refetch: Refetch::OnShape,
            on_by_default: false,
            collection: "zones",
            file: FileRule::Entity(Some("zones")),
            wire: Wire::Json,
        },
    ],
    live: LiveSpec { rest_pull: true, webhooks: &[WebhookKind::Ping], max_historical_days: None },
    coverage: Coverage {
        series: &[
            series::HEART_RATE,
            series::SPEED,
            series::CADENCE,
            series::POWER,
            series::ELEVATION,
            series::LATITUDE,
            series::LONGITUDE,
            series::AIR_TEMPERATURE,
        ],
        workout_fields: &[
            "distance",
            "energy_burned",
            "heart_rate_avg",
            "heart_rate_max",
            "moving_time_seconds",
            "average_speed",
            "max_speed",
            "average_watts",
            "max_watts",
            "average_cadence",
            "total_elevation_gain",
            "elev_high",
            "elev_low",
        ],
        sleep_fields: &[],
        menstrual_cycle_fields: &[],
        health_scores: &[],
    },
    webhooks: Some(&webhook::SPEC),
};

#[async_trait]
impl Provider for Strava {
    fn spec(&self) -> &'static ProviderSpec {
        &SPEC
    }

    async fn fetch_page(&self, api: &Api<'_>, request: &PageRequest<'_>) -> Result<FetchedPage, FetchError> {
        client::fetch_page(api, request).await
    }

    async fn fetch_part(
        &self,
        api: &Api<'_>,
        kind: Kind,
        external_id: &str,
        part: PartName,
    ) -> Result<FetchedPart, FetchError> {
        client::fetch_part(api, kind, external_id, part).await
    }

    async fn fetch_owner(&self, api: &Api<'_>, known: Owner, _: UserId) -> Result<Owner, FetchError> {
        if known.id.is_some() { Ok(known) } else { client::fetch_owner(api, known).await }
    }

    async fn fetch_item(
        &self,
        api: &Api<'_>,
        kind: Kind,
        external_id: &str,
        start: Option<DateTime<Utc>>,
    ) -> Result<FetchedItem, FetchError> {
        client::fetch_item(api, kind, external_id, start).await
    }

    fn normalize(&self, kind: Kind, external_id: &str, parts: &[PartBody]) -> Result<Normalized, NormalizeError> {
        normalize::normalize(kind, external_id, parts)
    }
}
