//! The calls to Strava, one function each, and what their refusals mean.
//!
//! Activities are listed newest first. The place in a window is a keyset: `before` is the oldest start seen plus one
//! second, and what was seen in that second is dropped by id. Page numbers are used only where the keyset cannot
//! move; an empty page is the only proof of an end, since Strava may send short pages in the middle.

use std::collections::HashSet;

use bytes::Bytes;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::header::HeaderMap;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::wire::{self, Athlete, Row};
use super::{DETAIL, STREAMS, SUMMARY, ZONES};
use crate::model::quota::Seen;
use crate::model::{BEGINNING_MS, Kind, PartName};
use crate::providers::http::Answer;
use crate::providers::oauth::Refusal;
use crate::providers::{Api, FetchError, FetchedPage, FetchedPart, Item, Next, PRESENCE, PageRequest};

/// The largest page that Strava sends.
const MAX_PAGE: u32 = 200;
const DAY_S: i64 = 86_400;
/// All that exist: without `resolution` every point comes.
const STREAM_KEYS: &str =
    "time,distance,latlng,altitude,velocity_smooth,heartrate,cadence,watts,temp,moving,grade_smooth";

/// One page of a stream of ours.
pub(super) async fn fetch_page(api: &Api<'_>, request: &PageRequest<'_>) -> Result<FetchedPage, FetchError> {
    match request.stream.kind {
        Kind::Athlete => fetch_athlete(api).await,
        _ => fetch_activities(api, request).await,
    }
}

async fn fetch_athlete(api: &Api<'_>) -> Result<FetchedPage, FetchError> {
    let body = get(api, "/athlete", &[]).await?;
    let athlete: Athlete = serde_json::from_slice(&body)
        .map_err(|_| FetchError::Unreadable { detail: "the profile cannot be read".to_owned() })?;
    let Some(id) = athlete.id else {
        return Err(FetchError::Unreadable { detail: "the profile has no id".to_owned() });
    };
    let order_at = athlete.created_at.as_deref().and_then(wire::instant).unwrap_or_default();
    let item = Item { kind: Kind::Athlete, external_id: id.0, part: SUMMARY, body: json_value(&body, '{')?, order_at };
    Ok(FetchedPage { items: vec![item], unreadable: Vec::new(), next: Next::End })
}

async fn fetch_activities(api: &Api<'_>, request: &PageRequest<'_>) -> Result<FetchedPage, FetchError> {
    let limit = request.limit.clamp(1, MAX_PAGE);
    // A place that cannot be read starts the window anew: that repeats rows and loses none.
    let stored = request.position.and_then(|place| Position::deserialize(place).ok());
    let skip = if stored.is_none() { (request.offset % limit) as usize } else { 0 };
    let mut position = stored.unwrap_or_else(|| Position {
        before: ceil_seconds(request.hi),
        page: request.offset / limit + 1,
        per_page: limit,
        seen: Vec::new(),
    });
    if position.page == 1 {
        // Large enough to reach past what was seen in this second. Page numbers mean something only as long as the
        // page size stays, whatever the next run asks for, so it is part of the place.
        let past_seen = u32::try_from(position.seen.len()).unwrap_or(MAX_PAGE).saturating_add(1);
        position.per_page = limit.max(past_seen).min(MAX_PAGE);
    }

    let mut query = vec![("before", position.before.to_string())];
    if let Some(after) = after_bound(request.lo) {
        query.push(("after", after.to_string()));
    }
    query.push(("page", position.page.to_string()));
    query.push(("per_page", position.per_page.to_string()));
    let body = get(api, "/athlete/activities", &query).await?;
    let rows = cut(&body)?;

    let mut unreadable = Vec::new();
    let mut listed = Vec::with_capacity(rows.len());
    let mut items = Vec::with_capacity(rows.len());
    let seen: HashSet<&str> = position.seen.iter().map(String::as_str).collect();
    for (index, raw) in rows.iter().enumerate() {
        let row = serde_json::from_str::<Row>(raw.get()).ok();
        let id = row.as_ref().and_then(|row| row.id.clone());
        let start = row.and_then(|row| wire::instant(row.start_date.as_deref()?));
        let (Some(id), Some(start)) = (id.clone(), start) else {
            unreadable.push(match id {
                Some(id) => format!("row {index} (id {})", id.0),
                None => format!("row {index}"),
            });
            continue;
        };
        if index >= skip && !seen.contains(id.0.as_str()) {
            items.push(Item {
                kind: Kind::Workout,
                external_id: id.0.clone(),
                part: SUMMARY,
                body: body.slice_ref(raw.get().as_bytes()),
                order_at: start,
            });
        }
        listed.push((id.0, start.timestamp()));
    }
    let next = match next_position(&position, &listed, rows.len()) {
        Some(position) => Next::Position(position.to_json()),
        None => Next::End,
    };
    Ok(FetchedPage { items, unreadable, next })
}

/// The place inside a window of activities.
#[derive(Clone, Debug, PartialEq, Deserialize)]
struct Position {
    /// Only activities that started before this second are listed. Never grows.
    before: i64,
    /// 1 while the keyset moves.
    page: u32,
    /// Rows a page; fixed while pages are counted.
    per_page: u32,
    /// The ids already read that started in the second `before - 1`.
    seen: Vec<String>,
}

impl Position {
    fn to_json(&self) -> Value {
        json!({ "before": self.before, "page": self.page, "per_page": self.per_page, "seen": self.seen })
    }
}

/// The place after a page that was asked for at `at` and brought `count` rows, of which `listed` (id, start in
/// seconds) could be read. `None` at the end.
fn next_position(at: &Position, listed: &[(String, i64)], count: usize) -> Option<Position> {
    if count == 0 {
        return None;
    }
    // A hidden start reads as one second past midnight, hours before the place of its row: it proves nothing about
    // the rows after it. Nor does a row outside the bounds, which must not move them upwards.
    let solid: Vec<_> = listed.iter().filter(|row| row.1 < at.before && row.1.rem_euclid(DAY_S) != 1).collect();
    // Newest first is what was observed, not what is promised; in any other order only page numbers are safe.
    let newest_first = solid.windows(2).all(|pair| pair[0].1 >= pair[1].1);
    let seen: HashSet<&str> = at.seen.iter().map(String::as_str).collect();
    let oldest_new = solid.iter().filter(|row| !seen.contains(row.0.as_str())).map(|row| row.1).min();
    let Some(oldest) = oldest_new.filter(|_| newest_first) else {
        return Some(Position { page: at.page.saturating_add(1), ..at.clone() });
    };
    let before = oldest + 1;
    let mut seen_now = if before == at.before { at.seen.clone() } else { Vec::new() };
    for (id, _) in solid.iter().filter(|row| row.1 == oldest) {
        if !seen_now.contains(id) {
            seen_now.push(id.clone());
        }
    }
    Some(Position { before, page: 1, per_page: at.per_page, seen: seen_now })
}

/// The first whole second that is not before this instant: Strava's upper bound is outside, like ours.
fn ceil_seconds(ms: i64) -> i64 {
    ms.div_euclid(1000) + i64::from(ms.rem_euclid(1000) != 0)
}

/// Strava's lower bound is outside, ours inside. `None` where there is nothing below.
fn after_bound(lo: i64) -> Option<i64> {
    if lo == BEGINNING_MS {
        return None;
    }
    Some(lo.div_euclid(1000) - 1).filter(|after| *after > 0)
}

/// One answer about one record.
pub(super) async fn fetch_part(
    api: &Api<'_>,
    kind: Kind,
    external_id: &str,
    part: PartName,
) -> Result<FetchedPart, FetchError> {
    let id = utf8_percent_encode(external_id, NON_ALPHANUMERIC);
    let (path, query, opening) = match (kind, part) {
        (Kind::Workout, DETAIL) => {
            (format!("/activities/{id}"), vec![("include_all_efforts", "true".to_owned())], '{')
        }
        (Kind::Workout, PRESENCE) => (format!("/activities/{id}"), Vec::new(), '{'),
        (Kind::Workout, STREAMS) => (
            format!("/activities/{id}/streams"),
            vec![("keys", STREAM_KEYS.to_owned()), ("key_by_type", "true".to_owned())],
            '{',
        ),
        (Kind::Workout, ZONES) => (format!("/activities/{id}/zones"), Vec::new(), '['),
        (Kind::Gear, SUMMARY | PRESENCE) => (format!("/gear/{id}"), Vec::new(), '{'),
        (Kind::Athlete, SUMMARY | PRESENCE) => ("/athlete".to_owned(), Vec::new(), '{'),
        _ => {
            let detail = format!("there is no call for the {part} part of a record of kind {}", kind.as_str());
            return Err(FetchError::Rejected { status: 501, detail });
        }
    };
    match get(api, &path, &query).await {
        Ok(body) => json_value(&body, opening).map(FetchedPart::Body),
        Err(FetchError::Gone) => Ok(FetchedPart::None),
        Err(error) => Err(error),
    }
}

/// The body of a successful answer.
async fn get(api: &Api<'_>, path: &str, query: &[(&str, String)]) -> Result<Bytes, FetchError> {
    let answer = api.get(path, query).await?;
    check(api, answer).await
}

async fn check(api: &Api<'_>, answer: Answer) -> Result<Bytes, FetchError> {
    match answer.status {
        200..=299 => Ok(answer.body),
        // The gate knows the windows; Strava documents no `Retry-After`.
        429 => Err(FetchError::Quota { until: api.gate.refused().await }),
        _ => Err(read_error(&answer, api.token.version)),
    }
}

/// What an answer other than success and 429 means.
fn read_error(answer: &Answer, version: i64) -> FetchError {
    let faults = faults(&answer.body);
    match answer.status {
        401 => match faults.into_iter().find(|fault| fault.code == "missing") {
            Some(fault) => FetchError::MissingScope { scope: fault.field },
            None => FetchError::Unauthorized { version },
        },
        403 if faults.iter().any(Fault::is_inactive) => FetchError::AppDisabled { detail: answer.excerpt() },
        404 | 410 => FetchError::Gone,
        // 597 is theirs, too.
        500.. => FetchError::Transient {
            detail: format!("the provider answered {}", answer.status),
            retry_after: answer.retry_after(),
        },
        status => FetchError::Rejected { status, detail: answer.excerpt() },
    }
}

/// One entry of `errors` in Strava's error envelope.
#[derive(Debug, PartialEq)]
struct Fault {
    resource: String,
    field: String,
    code: String,
}

impl Fault {
    fn is_inactive(&self) -> bool {
        self.resource == "Application"
            && self.field.eq_ignore_ascii_case("status")
            && self.code.eq_ignore_ascii_case("inactive")
    }
}

/// The entries of `errors`; none when the body is HTML, empty, or has a text there (old 429 bodies).
fn faults(body: &[u8]) -> Vec<Fault> {
    let Ok(envelope) = serde_json::from_slice::<Value>(body) else { return Vec::new() };
    let errors = envelope.get("errors").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let text = |error: &Value, name: &str| error.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    errors
        .iter()
        .map(|error| Fault {
            resource: text(error, "resource"),
            field: text(error, "field"),
            code: text(error, "code"),
        })
        .collect()
}

/// Says what a refusal of the token endpoint means. Strava never sends OAuth's `invalid_grant`.
pub(super) fn read_refusal(status: u16, body: &[u8]) -> Refusal {
    if !(400..500).contains(&status) {
        return Refusal::Other;
    }
    for fault in faults(body) {
        match (fault.resource.as_str(), fault.field.as_str()) {
            ("RefreshToken" | "AuthorizationCode" | "RequestToken", _) if fault.code == "invalid" => {
                return Refusal::Grant;
            }
            ("Application", "client_id") => return Refusal::Client,
            _ if fault.is_inactive() => return Refusal::AppDisabled,
            _ => {}
        }
    }
    Refusal::Other
}

/// The athlete's id in the answer to a code exchange, as text.
pub(super) fn account_in_grant(grant: &Value) -> Option<String> {
    wire::Id::deserialize(grant.get("athlete")?.get("id")?).ok().map(|id| id.0)
}

/// What the rate headers tell; nothing where they are missing or cannot be read.
pub(super) fn read_quotas(headers: &HeaderMap) -> Vec<Seen> {
    let mut seen = Vec::new();
    for (limit, usage, names) in [
        ("x-ratelimit-limit", "x-ratelimit-usage", ["15m", "1d"]),
        ("x-readratelimit-limit", "x-readratelimit-usage", ["read-15m", "read-1d"]),
    ] {
        let pairs = numbers(headers, limit).into_iter().zip(numbers(headers, usage));
        for (name, (limit, used)) in names.into_iter().zip(pairs) {
            // A limit of 0 is no limit anybody has: taken at its word it would stop all calls for good.
            if let (Some(limit @ 1..), Some(used)) = (limit, used) {
                seen.push(Seen { name, used, limit });
            }
        }
    }
    seen
}

/// `68,211` as numbers.
fn numbers(headers: &HeaderMap, name: &str) -> Vec<Option<u64>> {
    let text = headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    text.split(',').map(|number| number.trim().parse().ok()).collect()
}

/// The rows of a list, each exactly as received.
fn cut(body: &[u8]) -> Result<Vec<&RawValue>, FetchError> {
    serde_json::from_slice(body).map_err(|_| FetchError::Unreadable {
        detail: format!("the list is no complete JSON array ({} bytes)", body.len()),
    })
}

/// The body, if it is one complete JSON value that opens as it should.
fn json_value(body: &Bytes, opening: char) -> Result<Bytes, FetchError> {
    match serde_json::from_slice::<&RawValue>(body) {
        Ok(value) if value.get().starts_with(opening) => Ok(body.clone()),
        Ok(_) => Err(FetchError::Unreadable { detail: "the answer is JSON of another shape".to_owned() }),
        Err(_) => Err(FetchError::Unreadable {
            detail: format!("the answer is no complete JSON ({} bytes)", body.len()),
        }),
    }
}
