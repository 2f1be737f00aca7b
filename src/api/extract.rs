//! What a handler is given: the caller, the path, the query, the body; each wrong value with the mirrored API's text.

use std::marker::PhantomData;
use std::sync::Arc;

use axum::extract::{FromRequest, FromRequestParts, RawPathParams, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use chrono::{DateTime, NaiveDate, NaiveDateTime, Utc};
use secrecy::SecretString;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::App;
use super::error::Error;
use super::token::{self, Token};
use crate::storage::{ApiKey, Bearer, Developer};
use crate::vault;

/// Seconds between two notes of a key's use.
const TOUCH_S: i64 = 60;

/// The text of paths that the mirrored API documents with it.
pub(super) const BAD_KEY: &str = "Invalid or missing API key";
const NOTHING: &str = "Authentication required: provide JWT token or API key";
const BAD_TOKEN: &str = "Could not validate credentials";
const SDK_TOKEN: &str = "SDK tokens cannot access this endpoint";

// ---- who asks -----------------------------------------------------------------------------------------------------

/// What a caller may do. A developer may do everything.
pub(super) trait Scope: Send + Sync + 'static {
    const WORD: &'static str;
    /// Whether the mirrored API takes a developer's token alone: we take a key with the scope `admin` as well, and
    /// answer everybody else as it does.
    const DEVELOPERS: bool;
}

/// Start and end syncs, make users.
pub(super) enum MaySync {}
/// Look at things.
pub(super) enum MayRead {}
/// End connections: any key of the mirrored API may, of ours those for everything.
pub(super) enum MayEnd {}
/// Everything.
pub(super) enum MayAdmin {}

impl Scope for MaySync {
    const WORD: &'static str = "sync";
    const DEVELOPERS: bool = false;
}
impl Scope for MayRead {
    const WORD: &'static str = "read";
    const DEVELOPERS: bool = false;
}
impl Scope for MayEnd {
    const WORD: &'static str = "admin";
    const DEVELOPERS: bool = false;
}
impl Scope for MayAdmin {
    const WORD: &'static str = "admin";
    const DEVELOPERS: bool = true;
}

/// Proof that the request shows a developer's token, or a key that works for `S`. Comes first among a handler's
/// arguments: who may not ask does not learn what is wrong with the question.
pub(super) struct Caller<S> {
    /// The developer who asks, or who made the key that does; `None`: a key that no developer made.
    pub(super) developer: Option<Uuid>,
    scope: PhantomData<S>,
}

impl<S: Scope> FromRequestParts<Arc<App>> for Caller<S> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Error> {
        let shown = Credentials::read(app, &parts.headers);
        let mut developer = shown.developer(app).await?.map(|developer| developer.id);
        if developer.is_none() {
            match &shown.key_hash {
                Some(hash) => {
                    let key = app.state.engine.db.find_api_key(hash).await?;
                    let key = allow(app, key, S::WORD).map_err(|error| match error {
                        Error::Unauthorized { .. } if S::DEVELOPERS => Error::BadToken { detail: BAD_TOKEN },
                        error => error,
                    })?;
                    developer = key.created_by;
                }
                None if S::DEVELOPERS => return Err(shown.no_developer()),
                None => return Err(Error::Unauthorized { detail: NOTHING }),
            }
        }
        Ok(Self { developer, scope: PhantomData })
    }
}

/// The developer who asks, for what is the developer's own person: name, e-mail, password. A key is answered as no token
/// is, whatever its scopes.
pub(super) struct Myself(pub(super) Developer);

impl FromRequestParts<Arc<App>> for Myself {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Error> {
        let shown = Credentials::read(app, &parts.headers);
        shown.developer(app).await?.map(Self).ok_or_else(|| shown.no_developer())
    }
}

/// What a request shows, before the database is asked. A token that we did not make, or that is over, is as none.
pub(super) struct Credentials {
    /// A developer's token.
    pub(super) bearer: Option<Bearer>,
    /// Whether there is a user's token.
    sdk: bool,
    /// The digest of a key.
    pub(super) key_hash: Option<Vec<u8>>,
}

impl Credentials {
    pub(super) fn read(app: &App, headers: &HeaderMap) -> Self {
        let engine = &app.state.engine;
        let text = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = text.and_then(|text| {
            let (scheme, token) = text.split_once(' ')?;
            scheme
                .eq_ignore_ascii_case("bearer")
                .then(|| token::read(&engine.vault, token.trim(), engine.clock.now()))?
        });
        let bearer = match token {
            Some(Token::Developer(bearer)) => Some(bearer),
            _ => None,
        };
        Self { bearer, sdk: token == Some(Token::Sdk), key_hash: key_hash(headers) }
    }

    /// The developer whose token this is.
    pub(super) async fn developer(&self, app: &App) -> Result<Option<Developer>, Error> {
        match self.bearer {
            Some(bearer) => Ok(app.state.engine.db.find_developer(bearer).await?),
            None => Ok(None),
        }
    }

    /// The answer where a developer's token is needed and there is none.
    pub(super) fn no_developer(&self) -> Error {
        Error::BadToken { detail: if self.sdk { SDK_TOKEN } else { BAD_TOKEN } }
    }
}

/// The answer to a request that shows nothing; the mirrored API has two texts for it.
pub(super) fn missing_key(mirrored: bool) -> Error {
    Error::Unauthorized { detail: if mirrored { NOTHING } else { BAD_KEY } }
}

/// The digest of the key that a request shows.
fn key_hash(headers: &HeaderMap) -> Option<Vec<u8>> {
    let key = headers.get("x-api-key").or_else(|| headers.get("x-open-wearables-api-key"))?;
    if key.is_empty() {
        return None;
    }
    // No key of ours has other letters; any text that is not one has no row either.
    Some(vault::hash_secret(key.to_str().unwrap_or_default()))
}

/// Checks a key as it was found, and notes once a minute that it was used, without keeping the caller waiting.
pub(super) fn allow(app: &Arc<App>, key: Option<ApiKey>, scope: &'static str) -> Result<ApiKey, Error> {
    let engine = &app.state.engine;
    let now = engine.clock.now();
    let key = key.filter(|key| key.is_valid(now)).ok_or(Error::Unauthorized { detail: BAD_KEY })?;
    if !key.allows(scope) {
        return Err(Error::Forbidden { scope });
    }
    let fresh = |at: DateTime<Utc>| (now - at).num_seconds() < TOUCH_S;
    if !key.last_used_at.is_some_and(fresh) {
        let mut touched = app.touched.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Requests that come before the row is written do not write it once more.
        if !touched.get(&key.id).copied().is_some_and(fresh) {
            touched.insert(key.id, now);
            let (db, id) = (engine.db.clone(), key.id);
            tokio::spawn(async move {
                if let Err(error) = db.touch_api_key(id, now).await {
                    tracing::debug!(%error, "the use of a key was not noted");
                }
            });
        }
    }
    Ok(key)
}

// ---- path ---------------------------------------------------------------------------------------------------------

/// The id in the path, whatever it is the id of.
pub(super) struct IdPath(pub(super) Uuid);

impl<S: Send + Sync> FromRequestParts<S> for IdPath {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let params = raw_path(parts, state).await?;
        let (_, text) = params.iter().next().ok_or(Error::NoRoute)?;
        uuid(text).map(Self)
    }
}

/// The parameters of the path, decoded; those that are no text are refused as all else that is wrong.
pub(super) struct PathParams(pub(super) RawPathParams);

impl<S: Send + Sync> FromRequestParts<S> for PathParams {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        raw_path(parts, state).await.map(Self)
    }
}

/// The parameters of the path, decoded.
pub(super) async fn raw_path<S: Send + Sync>(parts: &mut Parts, state: &S) -> Result<RawPathParams, Error> {
    RawPathParams::from_request_parts(parts, state).await.map_err(|_| invalid("path is not valid UTF-8"))
}

// ---- query --------------------------------------------------------------------------------------------------------

/// What a query says, checked.
pub(super) trait FromQuery: Sized {
    fn read(query: &QueryPairs) -> Result<Self, Error>;
}

/// The query of a request. Unknown parameters are ignored.
pub(super) struct Query<T>(pub(super) T);

impl<T: FromQuery, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        T::read(&QueryPairs::new(parts.uri.query().unwrap_or_default())?).map(Self)
    }
}

/// Names and values as they were sent. Of a name that comes twice the last value holds.
pub(super) struct QueryPairs(Vec<(String, String)>);

impl QueryPairs {
    pub(super) fn new(query: &str) -> Result<Self, Error> {
        let pairs: Vec<(String, String)> = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        pairs.iter().try_for_each(|(_, value)| no_null(value))?;
        Ok(Self(pairs))
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().rev().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn parsed<T>(
        &self,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        self.text(name).map(parse).transpose()
    }

    pub(super) fn boolean(&self, name: &str) -> Result<Option<bool>, Error> {
        self.parsed(name, |text| match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" | "t" | "y" => Ok(true),
            "false" | "0" | "no" | "off" | "f" | "n" => Ok(false),
            _ => Err(invalid("Input should be a valid boolean, unable to interpret input")),
        })
    }

    pub(super) fn integer(&self, name: &str, least: i64, most: i64) -> Result<Option<i64>, Error> {
        self.parsed(name, integer)?.map(|number| bounded(number, least, most)).transpose()
    }
}

pub(super) fn invalid(text: &str) -> Error {
    Error::Invalid(text.to_owned())
}

pub(super) fn integer(text: &str) -> Result<i64, Error> {
    let text = text.trim();
    text.parse().map_err(|_| {
        let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
        let number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        invalid(if number {
            "Unable to parse input string as an integer, exceeded maximum size"
        } else {
            "Input should be a valid integer, unable to parse string as an integer"
        })
    })
}

fn bounded(number: i64, least: i64, most: i64) -> Result<i64, Error> {
    if number < least {
        Err(Error::Invalid(format!("Input should be greater than or equal to {least}")))
    } else if number > most {
        Err(Error::Invalid(format!("Input should be less than or equal to {most}")))
    } else {
        Ok(number)
    }
}

/// With dashes or without, any case. The parser's reason comes twice: the mirrored API's validator says it so.
pub(super) fn uuid(text: &str) -> Result<Uuid, Error> {
    Uuid::parse_str(text).map_err(|reason| Error::Invalid(format!("Input should be a valid UUID, {reason} - {reason}")))
}

/// `text` is none of these words.
pub(super) fn one_of<'a>(words: impl IntoIterator<Item = &'a str>) -> Error {
    let words: Vec<String> = words.into_iter().map(|word| format!("'{word}'")).collect();
    let list = match words.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
        None => String::new(),
    };
    Error::Invalid(format!("Input should be {list}"))
}

/// An instant as Unix seconds (from 10^11 on: milliseconds) or ISO 8601; without a zone it is UTC. Milliseconds.
pub(super) fn instant_ms(text: &str) -> Result<i64, Error> {
    let found = if let Ok(number) = text.trim().parse::<f64>() {
        let ms = if number.abs() < 1e11 { number * 1000.0 } else { number };
        // Beyond what a date can say, and everything that is no number.
        #[expect(clippy::cast_possible_truncation, reason = "bounded by the line before")]
        (ms.abs() < 8.0e15).then_some(ms as i64).and_then(DateTime::from_timestamp_millis)
    } else {
        iso8601(text.trim())
    };
    // No person has data from before 1900 or after 2200: such a number was meant otherwise.
    let found = found.filter(|at| (-2_208_988_800_000..7_258_118_400_000).contains(&at.timestamp_millis()));
    found.map(|at| at.timestamp_millis()).ok_or_else(|| {
        let shown: String = text.chars().take(100).collect();
        Error::Invalid(format!("Invalid datetime format: '{shown}'. Expected ISO 8601 format or Unix timestamp."))
    })
}

fn iso8601(text: &str) -> Option<DateTime<Utc>> {
    if let Ok(at) = DateTime::parse_from_rfc3339(text) {
        return Some(at.to_utc());
    }
    if let Ok(day) = NaiveDate::parse_from_str(text, "%Y-%m-%d") {
        return Some(day.and_time(chrono::NaiveTime::MIN).and_utc());
    }
    let text = text.replacen(' ', "T", 1);
    let zoned = ["%Y-%m-%dT%H:%M%:z", "%Y-%m-%dT%H:%M:%S%.f%:z", "%Y-%m-%dT%H:%M:%S%.f%z"];
    let plain = ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M"];
    let text = text.strip_suffix('Z').map_or_else(|| text.clone(), |bare| format!("{bare}+00:00"));
    zoned.iter().find_map(|form| DateTime::parse_from_str(&text, form).ok().map(|at| at.to_utc())).or_else(|| {
        plain.iter().find_map(|form| NaiveDateTime::parse_from_str(&text, form).ok()).map(|at| at.and_utc())
    })
}

/// Postgres keeps no null characters in texts.
pub(super) fn no_null(text: &str) -> Result<(), Error> {
    if text.contains('\0') { Err(invalid("Value error, text holds a null character")) } else { Ok(()) }
}

// ---- body ---------------------------------------------------------------------------------------------------------

/// A JSON object as body.
pub(super) struct JsonBody(Map<String, Value>);

impl FromRequest<Arc<App>> for JsonBody {
    type Rejection = Error;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Error> {
        let bytes = axum::body::Bytes::from_request(request, app).await?;
        if bytes.is_empty() {
            return Err(invalid("Field required"));
        }
        Self::parse(&bytes)
    }
}

/// A JSON object as body, or no body.
pub(super) struct MaybeBody(pub(super) JsonBody);

impl FromRequest<Arc<App>> for MaybeBody {
    type Rejection = Error;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Error> {
        let bytes = axum::body::Bytes::from_request(request, app).await?;
        let nothing = matches!(bytes.trim_ascii(), b"" | b"null");
        if nothing { Ok(Self(JsonBody(Map::new()))) } else { JsonBody::parse(&bytes).map(Self) }
    }
}

impl JsonBody {
    fn parse(bytes: &[u8]) -> Result<Self, Error> {
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(_) => Err(invalid("Input should be a valid dictionary")),
            Err(error) => Err(Error::Invalid(format!("JSON decode error - {error}"))),
        }
    }

    /// A member as it came, null included.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    /// A text that must be there.
    pub(super) fn required(&mut self, name: &str, most: usize) -> Result<String, Error> {
        if !self.0.contains_key(name) {
            return Err(invalid("Field required"));
        }
        self.text(name, most)?.ok_or_else(|| invalid("Input should be a valid string"))
    }

    /// A text that must be there, and is not shown to anybody.
    pub(super) fn secret(&mut self, name: &str, least: usize) -> Result<SecretString, Error> {
        let text = self.required(name, 4096)?;
        if text.chars().count() < least {
            return Err(Error::Invalid(format!("String should have at least {least} characters")));
        }
        Ok(SecretString::from(text))
    }

    /// True or false, where the member is there and not null.
    pub(super) fn boolean(&mut self, name: &str) -> Result<Option<bool>, Error> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(invalid("Input should be a valid boolean")),
        }
    }

    /// A whole number, where the member is there and not null.
    pub(super) fn integer(&mut self, name: &str, least: i64, most: i64) -> Result<Option<i64>, Error> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Number(number)) if number.is_i64() => {
                number.as_i64().map(|number| bounded(number, least, most)).transpose()
            }
            Some(_) => Err(invalid("Input should be a valid integer")),
        }
    }

    /// Whether a member is there, null or not.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// A text, where the member is there and not null.
    pub(super) fn text(&mut self, name: &str, most: usize) -> Result<Option<String>, Error> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => {
                check_text(&text, most)?;
                Ok(Some(text))
            }
            Some(_) => Err(invalid("Input should be a valid string")),
        }
    }

    /// An e-mail address, where the member is there and not null.
    pub(super) fn email(&mut self, name: &str) -> Result<Option<String>, Error> {
        let Some(text) = self.text(name, usize::MAX)? else { return Ok(None) };
        email(&text)?;
        Ok(Some(text))
    }
}

/// Whether a text can be kept, and is no longer than that.
pub(super) fn check_text(text: &str, most: usize) -> Result<(), Error> {
    no_null(text)?;
    if text.chars().count() > most {
        return Err(Error::Invalid(format!("String should have at most {most} characters")));
    }
    Ok(())
}

/// The same for an argument of a command, where nobody means nothing by an empty text.
pub(super) fn argument(text: &str, most: usize) -> Result<String, String> {
    match check_text(text, most) {
        Err(Error::Invalid(why)) => Err(why),
        _ if text.is_empty() => Err("String should have at least 1 character".to_owned()),
        _ => Ok(text.to_owned()),
    }
}

/// Looks for slips, not for what the standard would allow.
pub(super) fn email(text: &str) -> Result<(), Error> {
    let reason = match text.rsplit_once('@') {
        None => "An email address must have an @-sign.",
        Some(("", _)) => "There must be something before the @-sign.",
        Some((_, "")) => "There must be something after the @-sign.",
        _ if text.len() > 254 => "The email address is too long.",
        Some((local, domain)) => {
            let odd = |c: char| c.is_whitespace() || c.is_control() || "@<>()[],;:\\\"".contains(c);
            if local.contains(odd) || local.starts_with('.') || local.ends_with('.') || local.contains("..") {
                "The email address contains invalid characters before the @-sign."
            } else if domain.contains(odd) || domain.split('.').any(str::is_empty) {
                "The part after the @-sign contains invalid characters."
            } else if !domain.contains('.') {
                "The part after the @-sign is not valid. It should have a period."
            } else {
                return Ok(());
            }
        }
    };
    Err(Error::Invalid(format!("value is not a valid email address: {reason}")))
}
