//! Every way in which a request can fail, and how the caller hears of it. No other file knows a status code of a failure.

use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{storage, sync};

/// Seconds after which a caller may try again when the database or the time was short.
const TRY_AGAIN_S: u32 = 5;

/// Why a request failed. The texts are the mirrored API's wherever it has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Error {
    /// No key, or none that works.
    Unauthorized { detail: &'static str },
    /// A developer's token is needed, or a secret that stands for one, and there is none that works.
    BadToken { detail: &'static str },
    /// The key works, but not for this.
    Forbidden { scope: &'static str },
    /// The first thing that is wrong with path, query, header or body.
    Invalid(String),
    /// A thing named in the path does not exist. `code` tells cases apart that share a text.
    NotFound { detail: String, code: &'static str, hint: Option<&'static str> },
    /// Something like it exists already.
    Conflict { detail: &'static str, code: &'static str },
    /// The provider is one of ours, but the settings have no application for it.
    NotSetUp { title: &'static str },
    /// The provider could not be asked.
    Provider { detail: String },
    /// The body is larger than we read.
    TooLarge,
    /// No such path.
    NoRoute,
    /// The path exists, the method does not.
    Method,
    /// The provider has none of it.
    Unsupported(String),
    /// The database is away.
    Unavailable,
    /// Answering took too long.
    TimedOut,
    /// A webhook's sender may be anybody.
    Untrusted,
    /// A webhook's validation shows a wrong token; the mirrored API's text.
    WrongToken(&'static str),
    /// The provider has no such interface.
    NotOffered(String),
    /// The provider said no, or nothing.
    ProviderFailed(String),
    /// Our fault; the log knows more.
    Internal,
}

/// What went wrong with a request.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Error, example = json!({
    "detail": "No active connection found for provider",
    "code": "no_connection",
    "hint": "connect the user to the provider first",
    "request_id": "0198c0de-5a0e-7a39-9d0c-2f8e1f0f4c77"
}))]
pub(super) struct Body {
    /// In plain words.
    detail: String,
    /// A word for programs; it does not change between versions.
    code: &'static str,
    /// What to do about it; absent where there is nothing to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    hint: Option<&'static str>,
    /// Also in the header `X-Request-Id` and in our log.
    request_id: String,
}

impl Error {
    /// The status code of the answer.
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Invalid(_) | Self::NotSetUp { .. } => StatusCode::BAD_REQUEST,
            Self::Unauthorized { .. } | Self::BadToken { .. } | Self::Untrusted => StatusCode::UNAUTHORIZED,
            Self::Forbidden { .. } | Self::WrongToken(_) => StatusCode::FORBIDDEN,
            Self::NotFound { .. } | Self::NoRoute => StatusCode::NOT_FOUND,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::Conflict { .. } => StatusCode::CONFLICT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Internal | Self::Provider { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unsupported(_) | Self::NotOffered(_) => StatusCode::NOT_IMPLEMENTED,
            Self::ProviderFailed(_) => StatusCode::BAD_GATEWAY,
            Self::Unavailable | Self::TimedOut => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid_request",
            Self::Unauthorized { .. } | Self::BadToken { .. } => "unauthorized",
            Self::Forbidden { .. } => "insufficient_scope",
            Self::NotFound { code, .. } | Self::Conflict { code, .. } => code,
            Self::NotSetUp { .. } => "provider_not_set_up",
            Self::Provider { .. } => "provider_unavailable",
            Self::NoRoute => "unknown_path",
            Self::Method => "method_not_allowed",
            Self::TooLarge => "body_too_large",
            Self::Internal => "internal_error",
            Self::Unsupported(_) | Self::NotOffered(_) => "unsupported",
            Self::Untrusted => "invalid_signature",
            Self::WrongToken(_) => "wrong_token",
            Self::ProviderFailed(_) => "provider_failed",
            Self::Unavailable => "database_unavailable",
            Self::TimedOut => "timed_out",
        }
    }

    /// What the answer says, in plain words.
    pub(super) fn detail(&self) -> String {
        match self {
            Self::NotSetUp { title } => format!("{title} is not set up on this server"),
            Self::Provider { detail } => detail.clone(),
            Self::Unauthorized { detail } | Self::BadToken { detail } | Self::Conflict { detail, .. } => {
                (*detail).to_owned()
            }
            Self::Forbidden { scope } => format!("API key lacks the scope '{scope}'"),
            Self::Invalid(detail) | Self::NotFound { detail, .. } | Self::Unsupported(detail) => detail.clone(),
            Self::NotOffered(detail) | Self::ProviderFailed(detail) => detail.clone(),
            Self::Untrusted => "Invalid webhook signature".to_owned(),
            Self::WrongToken(detail) => (*detail).to_owned(),
            Self::TooLarge => "Request body is larger than 1 MiB".to_owned(),
            Self::NoRoute => "Not Found".to_owned(),
            Self::Method => "Method Not Allowed".to_owned(),
            Self::Unavailable => "The database is not available".to_owned(),
            Self::TimedOut => "The request took too long".to_owned(),
            Self::Internal => "Internal Server Error".to_owned(),
        }
    }

    fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Unauthorized { .. } => Some("send a key in the header X-API-Key; `wearsync keys create` makes one"),
            Self::BadToken { .. } => {
                Some("log in with POST /api/v1/auth/login and send its access_token as `Authorization: Bearer`")
            }
            Self::Forbidden { .. } => Some("use a key with this scope, or one with the scope admin"),
            Self::NotFound { hint, .. } => *hint,
            Self::Conflict { .. } | Self::Invalid(_) | Self::TooLarge | Self::Method => None,
            Self::NotSetUp { .. } => Some("set the client id and secret of your application there, then start again"),
            Self::Provider { .. } => Some("connect again in a moment"),
            Self::Untrusted | Self::WrongToken(_) | Self::NotOffered(_) | Self::ProviderFailed(_) => None,
            Self::NoRoute => Some("/docs lists all paths"),
            Self::Unsupported(_) => Some("ask for a data_type that this provider has, or for all"),
            Self::Unavailable | Self::TimedOut => Some("nothing is lost that was accepted; try again"),
            Self::Internal => Some("the log of the server has this request_id"),
        }
    }

    /// The whole answer.
    pub(super) fn render(&self, request_id: &str) -> Response {
        let body =
            Body { detail: self.detail(), code: self.code(), hint: self.hint(), request_id: request_id.to_owned() };
        let mut response = (self.status(), Json(body)).into_response();
        if matches!(self, Self::BadToken { .. }) {
            set(&mut response, header::WWW_AUTHENTICATE, "Bearer");
        }
        if matches!(self, Self::Unavailable | Self::TimedOut) {
            retry_after(&mut response, i64::from(TRY_AGAIN_S));
        }
        response
    }
}

/// Failures travel as an extension of an empty answer: the outermost layer, which knows the request's id, writes them.
impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// The failure in an answer, ours or the router's own.
pub(super) fn failure_of(response: &mut Response) -> Option<Error> {
    let told = response.extensions_mut().remove::<Error>();
    told.or_else(|| (response.status() == StatusCode::METHOD_NOT_ALLOWED).then_some(Error::Method))
}

/// Says when to come back: whole seconds, at least 1.
pub(super) fn retry_after(response: &mut Response, seconds: i64) {
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
}

/// Something that we need is away; the body says what.
pub(super) fn not_ready<T: Serialize>(body: T) -> Response {
    let mut response = (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response();
    retry_after(&mut response, i64::from(TRY_AGAIN_S));
    response
}

/// A header of ours whose value is known to be one.
pub(super) fn set(response: &mut Response, name: HeaderName, value: &'static str) {
    response.headers_mut().insert(name, HeaderValue::from_static(value));
}

impl From<storage::Error> for Error {
    fn from(error: storage::Error) -> Self {
        match error {
            storage::Error::Unavailable(_) => {
                tracing::warn!(%error, "the database is away");
                Self::Unavailable
            }
            storage::Error::Duplicate { constraint } if constraint == "idempotency" => Self::Conflict {
                detail: "Idempotency-Key was used for another request",
                code: "idempotency_key_reused",
            },
            storage::Error::Duplicate { constraint } if constraint.contains("external_user_id") => Self::Conflict {
                detail: "User with this external_user_id already exists.",
                code: "duplicate_external_user_id",
            },
            storage::Error::Duplicate { constraint } if constraint.contains("developers") => {
                Self::Conflict { detail: "A developer with this email already exists", code: "duplicate_email" }
            }
            storage::Error::Duplicate { constraint } if constraint.contains("email") => {
                Self::Conflict { detail: "User with this email already exists.", code: "duplicate_email" }
            }
            _ => {
                tracing::error!(%error, "request failed");
                Self::Internal
            }
        }
    }
}

impl From<sync::Error> for Error {
    fn from(error: sync::Error) -> Self {
        match error {
            sync::Error::Storage(error) => error.into(),
            _ => {
                tracing::error!(%error, "request failed");
                Self::Internal
            }
        }
    }
}

/// The body is too large, or the connection broke.
impl From<BytesRejection> for Error {
    fn from(refused: BytesRejection) -> Self {
        match refused.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Self::TooLarge,
            _ => Self::Invalid("the body ended early".to_owned()),
        }
    }
}

impl From<sync::Refused> for Error {
    fn from(refused: sync::Refused) -> Self {
        match refused {
            sync::Refused::Unsupported(detail) => Self::Unsupported(detail),
            sync::Refused::Invalid(detail) => Self::Invalid(detail),
            sync::Refused::NoConnection => no_connection("no_connection"),
        }
    }
}

/// One text for four reasons, as the mirrored API has it; the code tells them apart.
pub(super) fn no_connection(code: &'static str) -> Error {
    let hint = match code {
        "unknown_user" => "no user has this id; POST /api/v1/users makes one",
        "reauthorization_required" => "the provider refused the grant: connect again",
        "revoked" => "the user was disconnected from the provider: connect again",
        _ => "connect the user to the provider first",
    };
    Error::NotFound { detail: "No active connection found for provider".to_owned(), code, hint: Some(hint) }
}

/// The mirrored API has another text for this where it tells of syncs.
pub(super) fn no_user() -> Error {
    Error::NotFound { detail: "User not found".to_owned(), code: "unknown_user", hint: None }
}

/// An entity that is not there; the mirrored API's text.
pub(super) fn missing(what: &str, id: uuid::Uuid) -> Error {
    let code = match what {
        "User" => "unknown_user",
        "Delivery" => "unknown_delivery",
        _ => "unknown_task",
    };
    Error::NotFound { detail: format!("{what} with ID: {id} not found."), code, hint: None }
}
