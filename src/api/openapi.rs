//! The document: what the handlers say of themselves, and what is the same for all of them.

use utoipa::openapi::extensions::ExtensionsBuilder;
use utoipa::openapi::path::{Operation, Parameter};
use utoipa::openapi::response::Response;
use utoipa::openapi::schema::{ObjectBuilder, Schema, SchemaType, Type};
use utoipa::openapi::security::{
    ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme,
};
use utoipa::openapi::{Content, Header, Ref, RefOr, ServerBuilder};
use utoipa::{Modify, OpenApi};

use super::users::{SORT_BY, SORT_ORDER};
use crate::model::{DataType, RunState};
use crate::providers;

/// What stands above all operations.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "wearsync",
        description = "Mirrors personal and wearable data into your own database and files.\n\n\
            Every request shows a key (`wearsync keys create`) in `X-API-Key` or `X-Open-Wearables-API-Key`, or the \
            token of a developer (`POST /api/v1/auth/login`) in `Authorization: Bearer`. A key has scopes, and each \
            operation names the one it needs; `admin` stands for all. A developer's token stands for all as well, and is \
            looked at first: one that does not work is as none. Every answer has an `X-Request-Id`; a sane one that comes with the request is kept. Failures are \
            `{\"detail\": \"<text>\", \"code\": \"<word>\", \"hint\": \"<text>\", \"request_id\": \"<id>\"}`.",
        license(name = "MIT", identifier = "MIT"),
    ),
    tags(
        (name = "sync", description = "Bring data in"),
        (name = "sync status", description = "What happens to syncs, as it happens"),
        (name = "tasks", description = "What became of a sync"),
        (name = "users", description = "Whose data"),
        (name = "connections", description = "From where, and how complete"),
        (name = "developers", description = "Who runs this service"),
        (name = "keys", description = "Which programs may call it"),
        (name = "applications", description = "Which programs may give out tokens for users"),
        (name = "providers", description = "What can be connected, and what it tells"),
        (name = "oauth", description = "Connecting in a browser"),
        (name = "provider webhooks", description = "What providers send by themselves"),
        (name = "service", description = "The service itself"),
    ),
    components(schemas(super::error::Body, super::sync::SyncQueued, super::sync::SyncDone)),
    modifiers(&Keys),
)]
pub(super) struct Document;

/// How keys may be sent.
const KEYS: [&str; 2] = ["api_key", "open_wearables_api_key"];
const DEVELOPER: &str = "developer_token";

struct Keys;

impl Modify for Keys {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        document.servers = Some(vec![
            ServerBuilder::new()
                .url("http://127.0.0.1:8000")
                .description(Some("Where `wearsync serve` listens"))
                .build(),
        ]);
        let components = document.components.get_or_insert_default();
        for (name, header) in [("api_key", "X-API-Key"), ("open_wearables_api_key", "X-Open-Wearables-API-Key")] {
            let key = ApiKey::Header(ApiKeyValue::with_description(header, "A key made by `wearsync keys create`"));
            components.add_security_scheme(name, SecurityScheme::ApiKey(key));
        }
        let token = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .bearer_format("JWT")
            .description(Some("The access token of a developer, made by `POST /api/v1/auth/login`"));
        components.add_security_scheme(DEVELOPER, SecurityScheme::Http(token.build()));
    }
}

/// Adds to each operation what all have, so that no handler can forget it.
pub(super) fn finish(mut document: utoipa::openapi::OpenApi) -> utoipa::openapi::OpenApi {
    for item in document.paths.paths.values_mut() {
        let methods = [&mut item.get, &mut item.post, &mut item.patch, &mut item.delete, &mut item.put];
        for operation in methods.into_iter().flatten() {
            access(operation);
            words(operation);
            failures(operation);
        }
    }
    document
}

/// Says for programs what the description says for people: the scope that a key needs. A test holds both against what
/// each operation does.
fn access(operation: &mut Operation) {
    let description = operation.description.as_deref().unwrap_or_default().replace('\n', " ");
    let scope = description.split_once("Needs the scope `").and_then(|(_, rest)| Some(rest.split_once('`')?.0));
    if let (None, Some(scope)) = (&operation.security, scope) {
        let keys = KEYS.map(|name| SecurityRequirement::new(name, [scope]));
        let developer = SecurityRequirement::new(DEVELOPER, [""; 0]);
        operation.security = Some(keys.into_iter().chain([developer]).collect());
    }
}

/// Value lists come from the code that checks them.
fn words(operation: &mut Operation) {
    // Its filters take any word.
    if operation.operation_id.as_deref() == Some("list_sync_runs") {
        return;
    }
    for parameter in operation.parameters.iter_mut().flatten() {
        let RefOr::T(parameter) = parameter else { continue };
        let (words, names): (Vec<&str>, Option<Vec<&str>>) = match parameter.name.as_str() {
            "provider" => (providers::names().map(|name| name.0).collect(), None),
            "status" => (RunState::ALL.map(RunState::as_str).to_vec(), None),
            "sort_by" => (SORT_BY.to_vec(), None),
            "sort_order" => (SORT_ORDER.to_vec(), None),
            "data_type" => {
                let words = DataType::ALL.map(DataType::as_str).to_vec();
                // Generators cannot make a name of `247`.
                let names = words.iter().map(|word| if *word == "247" { "DATA_247" } else { word }).collect();
                (words, Some(names))
            }
            _ => continue,
        };
        set_words(parameter, &words, names);
    }
}

fn set_words(parameter: &mut Parameter, words: &[&str], names: Option<Vec<&str>>) {
    let (default, example) = match &parameter.schema {
        Some(RefOr::T(Schema::Object(old))) => (old.default.clone(), old.examples.first().cloned()),
        _ => (None, None),
    };
    let mut object = ObjectBuilder::new()
        .schema_type(SchemaType::new(Type::String))
        .enum_values(Some(words.iter().copied()))
        .default(default)
        .examples(example);
    if let Some(names) = names {
        object = object.extensions(Some(ExtensionsBuilder::new().add("x-enum-varnames", names).build()));
    }
    parameter.schema = Some(RefOr::T(Schema::Object(object.build())));
}

/// Failures that every operation can answer.
fn failures(operation: &mut Operation) {
    let mut common = vec![("500", "Our fault; the log has the request id")];
    // An empty requirement says that no key is needed.
    let needs: Vec<_> =
        operation.security.iter().flatten().filter(|it| **it != SecurityRequirement::default()).collect();
    if !needs.is_empty() {
        if needs.iter().any(|it| **it != SecurityRequirement::new(DEVELOPER, [""; 0])) {
            common.push(("403", "The key lacks the scope; `code` is `insufficient_scope`"));
        }
        common.extend([
            ("401", "No key or token, or one that does not work"),
            ("503", "The database is away, or the answer took too long"),
        ]);
    }
    if operation.parameters.as_ref().is_some_and(|list| !list.is_empty()) || operation.request_body.is_some() {
        common.push(("400", "Something in path, query, header or body is wrong: the first thing"));
    }
    for (status, description) in common {
        let entry = operation.responses.responses.entry(status.to_owned());
        entry.or_insert_with(|| {
            let content = Content::new(Some(RefOr::Ref(Ref::from_schema_name("Error"))));
            let mut response = Response::new(description);
            response.content.insert("application/json".to_owned(), content.into());
            if status == "503" {
                let mut header = Header::new(ObjectBuilder::new().schema_type(SchemaType::new(Type::Integer)).build());
                header.description = Some("Seconds after which to try again".to_owned());
                response.headers.insert("Retry-After".to_owned(), header.into());
            }
            RefOr::T(response)
        });
    }
}
