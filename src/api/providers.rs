//! Providers: which there are, what was set for them, what they can tell, and their pictures.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::{FromRequestParts, State};
use axum::http::header;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use super::App;
use super::error::Error;
use super::extract::{Caller, FromQuery, JsonBody, MayAdmin, Query, QueryPairs, invalid, one_of, raw_path};
use crate::model::{SeriesType, series};
use crate::providers::{Coverage, LiveMode, ProviderSpec, REGISTRY};
use crate::storage::{ProviderChange, ProviderSetting};
use crate::sync;

const GRANULARITIES: [&str; 3] = ["daily", "hourly", "raw"];

/// Where a provider's picture is.
pub(super) fn icon_url(provider: &str) -> String {
    format!("/static/provider-icons/{provider}.svg")
}

fn specs() -> impl Iterator<Item = &'static ProviderSpec> {
    REGISTRY.iter().map(|provider| provider.spec())
}

// ---- list and settings --------------------------------------------------------------------------------------------

/// A provider and what is set for it.
#[derive(Serialize, ToSchema)]
pub(super) struct ProviderRead {
    /// The name in paths.
    provider: String,
    /// The name for people.
    name: String,
    /// Whether people grant access to it on a page of its own (OAuth).
    has_cloud_api: bool,
    /// Whether it is offered to people. Nothing is refused because of it.
    is_enabled: bool,
    /// Its picture, on this server.
    icon_url: String,
    /// How new data comes in: `pull` (we ask) or `webhook` (it tells); null: neither.
    #[schema(required)]
    live_sync_mode: Option<&'static str>,
    /// Whether that can be chosen.
    live_sync_configurable: bool,
    /// `raw`, `hourly` or `daily`: how fine the samples are that are asked for, where the provider gives a choice.
    data_granularity: String,
}

impl ProviderRead {
    fn new(spec: &ProviderSpec, setting: Option<&ProviderSetting>) -> Self {
        Self {
            provider: spec.name.to_string(),
            name: spec.title.to_owned(),
            has_cloud_api: spec.has_oauth(),
            is_enabled: setting.is_none_or(|it| it.is_enabled),
            icon_url: icon_url(spec.name.0),
            live_sync_mode: live_mode(spec, setting),
            live_sync_configurable: spec.live.is_configurable(),
            data_granularity: setting.map_or_else(|| "raw".to_owned(), |it| it.data_granularity.clone()),
        }
    }
}

/// How new data comes in: as it was set, or as the provider is.
pub(super) fn live_mode(spec: &ProviderSpec, setting: Option<&ProviderSetting>) -> Option<&'static str> {
    spec.live.mode_as_set(setting.and_then(|it| it.live_sync_mode.as_deref())).map(LiveMode::as_str)
}

/// Which providers to list.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct ProviderQuery {
    /// Only those that are offered to people.
    #[param(default = false, value_type = Option<bool>)]
    enabled_only: bool,
    /// Only those that people grant access to on a page of their own.
    #[param(default = false, value_type = Option<bool>)]
    cloud_only: bool,
}

impl FromQuery for ProviderQuery {
    fn read(query: &QueryPairs) -> Result<Self, Error> {
        Ok(Self {
            enabled_only: query.boolean("enabled_only")?.unwrap_or_default(),
            cloud_only: query.boolean("cloud_only")?.unwrap_or_default(),
        })
    }
}

async fn all(app: &App) -> Result<Vec<ProviderRead>, Error> {
    let settings = app.state.engine.db.list_provider_settings().await?;
    Ok(specs().map(|spec| ProviderRead::new(spec, settings.get(spec.name.0))).collect())
}

/// List providers
///
/// Every provider, in the order of the documentation, with what is set for it.
#[utoipa::path(
    get,
    path = "/api/v1/oauth/providers",
    operation_id = "list_providers",
    tag = "providers",
    security(()),
    params(ProviderQuery),
    responses(
        (status = 200, description = "The providers", body = [ProviderRead], example = json!([{
            "provider": "strava", "name": "Strava", "has_cloud_api": true, "is_enabled": true,
            "icon_url": "/static/provider-icons/strava.svg", "live_sync_mode": "pull", "live_sync_configurable": true,
            "data_granularity": "raw"
        }])),
        (status = 503, description = "The database is away, or the answer took too long", body = super::error::Body),
    )
)]
pub(super) async fn list_providers(
    State(app): State<Arc<App>>,
    Query(query): Query<ProviderQuery>,
) -> Result<Json<Vec<ProviderRead>>, Error> {
    let mut found = all(&app).await?;
    found.retain(|it| (it.is_enabled || !query.enabled_only) && (it.has_cloud_api || !query.cloud_only));
    Ok(Json(found))
}

/// What changes a provider's settings: members that are left out stay as they are.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents what `update_provider` reads")]
pub(super) struct ProviderUpdate {
    /// Whether it is offered to people.
    is_enabled: Option<bool>,
    /// `pull` or `webhook`, where the provider can do both; not null.
    #[schema(nullable = false)]
    live_sync_mode: Option<String>,
    /// `daily`, `hourly` or `raw`.
    data_granularity: Option<String>,
}

fn unknown(name: &str) -> Error {
    let name: String = name.chars().take(100).collect();
    Error::Invalid(format!("Unknown provider: {name}"))
}

fn find(name: &str) -> Result<&'static ProviderSpec, Error> {
    specs().find(|spec| spec.name.0 == name).ok_or_else(|| unknown(name))
}

fn read_change(body: &mut JsonBody) -> Result<ProviderChange, Error> {
    let modes = LiveMode::ALL.map(LiveMode::as_str);
    let word = |value: Option<Value>, words: &[&'static str]| match value {
        None => Ok(None),
        Some(value) => {
            let found = words.iter().copied().find(|word| value.as_str() == Some(word));
            found.map(Some).ok_or_else(|| one_of(words.iter().copied()))
        }
    };
    Ok(ProviderChange {
        is_enabled: body.boolean("is_enabled")?,
        // Null is a word too many: it says neither of the two.
        live_sync_mode: word(body.take("live_sync_mode"), &modes)?,
        data_granularity: word(body.take("data_granularity").filter(|value| !value.is_null()), &GRANULARITIES)?,
    })
}

/// The provider in the path, as it was written.
pub(super) struct Named(String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let params = raw_path(parts, state).await?;
        Ok(Self(params.iter().next().map(|(_, text)| text.to_owned()).unwrap_or_default()))
    }
}

/// Change a provider's settings
///
/// Changes what is given. With `live_sync_mode` `webhook`, the provider is also asked to send its events to
/// `public_url`, in the background, where it has an interface for that: the log says what came of it, and
/// `GET …/webhooks/subscriptions` what is subscribed to. Needs the scope `admin`.
#[utoipa::path(
    put,
    path = "/api/v1/oauth/providers/{provider}",
    operation_id = "update_provider",
    tag = "providers",
    params(("provider" = String, Path, description = "Provider name", example = "strava")),
    request_body(content = ProviderUpdate, example = json!({"is_enabled": true, "live_sync_mode": "webhook"})),
    responses(
        (status = 200, description = "The provider as it is now", body = ProviderRead, example = json!({
            "provider": "strava", "name": "Strava", "has_cloud_api": true, "is_enabled": true,
            "icon_url": "/static/provider-icons/strava.svg", "live_sync_mode": "webhook",
            "live_sync_configurable": true, "data_granularity": "raw"
        })),
        (status = 413, description = "The body is larger than 1 MiB", body = super::error::Body),
    )
)]
pub(super) async fn update_provider(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    Named(name): Named,
    mut body: JsonBody,
) -> Result<Json<ProviderRead>, Error> {
    let change = read_change(&mut body)?;
    let spec = find(&name)?;
    if change.live_sync_mode.is_some() && !spec.live.is_configurable() {
        return Err(Error::Invalid(format!("Provider '{}' does not support live sync mode configuration", spec.name)));
    }
    let engine = &app.state.engine;
    let is_pushed = change.live_sync_mode == Some(LiveMode::Webhook.as_str());
    engine.db.change_provider_settings(&[(spec.name.0, change)], engine.clock.now()).await?;
    if is_pushed {
        sync::subscribe_soon(engine, spec.name.0);
    }
    let settings = engine.db.list_provider_settings().await?;
    Ok(Json(ProviderRead::new(spec, settings.get(spec.name.0))))
}

/// Which providers are offered to people.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents what `update_providers` reads")]
pub(super) struct ProvidersUpdate {
    /// Provider name to whether it is offered; those left out stay as they are.
    providers: BTreeMap<String, bool>,
}

/// Change which providers are offered
///
/// All that are named, or none if one of them is unknown. Needs the scope `admin`.
#[utoipa::path(
    put,
    path = "/api/v1/oauth/providers",
    operation_id = "update_providers",
    tag = "providers",
    request_body(content = ProvidersUpdate, example = json!({"providers": {"strava": false}})),
    responses(
        (status = 200, description = "All providers as they are now", body = [ProviderRead], example = json!([{
            "provider": "strava", "name": "Strava", "has_cloud_api": true, "is_enabled": false,
            "icon_url": "/static/provider-icons/strava.svg", "live_sync_mode": "pull", "live_sync_configurable": true,
            "data_granularity": "raw"
        }])),
        (status = 413, description = "The body is larger than 1 MiB", body = super::error::Body),
    )
)]
pub(super) async fn update_providers(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    mut body: JsonBody,
) -> Result<Json<Vec<ProviderRead>>, Error> {
    let named = match body.take("providers") {
        None => return Err(invalid("Field required")),
        Some(Value::Object(named)) => named,
        Some(_) => return Err(invalid("Input should be a valid dictionary")),
    };
    let mut changes = Vec::new();
    for (name, value) in &named {
        let Value::Bool(enabled) = value else { return Err(invalid("Input should be a valid boolean")) };
        let change = ProviderChange { is_enabled: Some(*enabled), ..ProviderChange::default() };
        changes.push((find(name)?.name.0, change));
    }
    let engine = &app.state.engine;
    engine.db.change_provider_settings(&changes, engine.clock.now()).await?;
    Ok(Json(all(&app).await?))
}

// ---- coverage -----------------------------------------------------------------------------------------------------

/// One thing that is told, and by whom.
#[derive(Serialize, ToSchema)]
pub(super) struct CoverageField {
    /// Its name.
    code: &'static str,
    /// The providers that can tell it, sorted.
    providers: Vec<&'static str>,
}

/// One series, and who tells it.
#[derive(Serialize, ToSchema)]
pub(super) struct CoverageMetric {
    /// Its name.
    code: &'static str,
    /// Its unit.
    unit: &'static str,
    /// The providers that can tell it, sorted.
    providers: Vec<&'static str>,
}

/// Series of one sort.
#[derive(Serialize, ToSchema)]
pub(super) struct CoverageCategory {
    /// Which sort.
    name: &'static str,
    /// The series, sorted.
    metrics: Vec<CoverageMetric>,
}

/// Everything that any provider can tell. A single record may lack any of it.
#[derive(Serialize, ToSchema)]
pub(super) struct CoverageRead {
    /// The providers, sorted.
    providers: Vec<&'static str>,
    /// Series, by category; categories in a fixed order.
    timeseries: Vec<CoverageCategory>,
    /// Numbers of a workout.
    workout_fields: Vec<CoverageField>,
    /// Numbers of a night.
    sleep_fields: Vec<CoverageField>,
    /// Facts of a cycle.
    menstrual_cycle_fields: Vec<CoverageField>,
    /// Scores that the provider computes itself.
    health_scores: Vec<CoverageField>,
}

/// Get coverage
///
/// What each provider can tell: series, numbers of workouts, nights and cycles, scores. It changes with the version only.
#[utoipa::path(
    get,
    path = "/api/v1/meta/coverage",
    operation_id = "get_coverage",
    tag = "providers",
    security(()),
    responses((status = 200, description = "The coverage", body = CoverageRead, example = json!({
        "providers": ["strava"],
        "timeseries": [{"name": "Heart & Cardiovascular",
            "metrics": [{"code": "heart_rate", "unit": "bpm", "providers": ["strava"]}]}],
        "workout_fields": [{"code": "distance", "providers": ["strava"]}],
        "sleep_fields": [], "menstrual_cycle_fields": [], "health_scores": []
    })))
)]
pub(super) async fn get_coverage() -> Json<CoverageRead> {
    let mut specs: Vec<_> = specs().collect();
    specs.sort_by_key(|spec| spec.name.0);
    let fields = |of: fn(&Coverage) -> &'static [&'static str]| {
        let mut found: BTreeMap<&'static str, Vec<&'static str>> = BTreeMap::new();
        for spec in &specs {
            for code in of(&spec.coverage) {
                found.entry(code).or_default().push(spec.name.0);
            }
        }
        found.into_iter().map(|(code, providers)| CoverageField { code, providers }).collect()
    };
    let mut metrics: BTreeMap<&'static str, (SeriesType, Vec<&'static str>)> = BTreeMap::new();
    for spec in &specs {
        for series in spec.coverage.series {
            metrics.entry(series.name).or_insert_with(|| (*series, Vec::new())).1.push(spec.name.0);
        }
    }
    let timeseries = series::CATEGORIES.into_iter().map(|name| {
        let here = metrics.values().filter(|(series, _)| series.category() == name);
        let metrics = here
            .map(|(series, providers)| CoverageMetric {
                code: series.name,
                unit: series.unit,
                providers: providers.clone(),
            })
            .collect();
        CoverageCategory { name, metrics }
    });
    Json(CoverageRead {
        providers: specs.iter().map(|spec| spec.name.0).collect(),
        timeseries: timeseries.filter(|category| !category.metrics.is_empty()).collect(),
        workout_fields: fields(|it| it.workout_fields),
        sleep_fields: fields(|it| it.sleep_fields),
        menstrual_cycle_fields: fields(|it| it.menstrual_cycle_fields),
        health_scores: fields(|it| it.health_scores),
    })
}

// ---- pictures -----------------------------------------------------------------------------------------------------

/// Get a provider's picture
///
/// A letter on a coloured tile, drawn by this service: no provider's own sign.
#[utoipa::path(
    get,
    path = "/static/provider-icons/{file}",
    operation_id = "get_provider_icon",
    tag = "providers",
    security(()),
    params(("file" = String, Path, description = "Provider name and `.svg`", example = "strava.svg")),
    responses(
        (status = 200, description = "The picture", content_type = "image/svg+xml", body = String,
            headers(("Cache-Control" = String, description = "May be kept for a day")),
            example = json!("<svg xmlns=\"http://www.w3.org/2000/svg\" …")),
        (status = 404, description = "No such provider", body = super::error::Body),
    )
)]
pub(super) async fn get_provider_icon(Named(file): Named) -> Result<Response, Error> {
    let spec = file.strip_suffix(".svg").and_then(|name| specs().find(|spec| spec.name.0 == name));
    let spec = spec.ok_or(Error::NoRoute)?;
    let headers = [
        (header::CONTENT_TYPE, "image/svg+xml; charset=utf-8"),
        (header::CACHE_CONTROL, "public, max-age=86400"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'"),
    ];
    Ok((headers, icon(spec)).into_response())
}

fn icon(spec: &ProviderSpec) -> String {
    let letter: String = spec.title.chars().take(1).collect();
    // A colour of its own, the same everywhere, from the name.
    let hue = spec.name.0.bytes().fold(0_u32, |sum, byte| (sum * 31 + u32::from(byte)) % 360);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 64 64\" role=\"img\" aria-label=\"{}\">\
        <rect width=\"64\" height=\"64\" rx=\"14\" fill=\"hsl({hue},45%,38%)\"/>\
        <text x=\"32\" y=\"43\" font-family=\"system-ui,sans-serif\" font-size=\"32\" font-weight=\"600\" \
        text-anchor=\"middle\" fill=\"#fff\">{letter}</text></svg>\n",
        spec.title
    )
}
