//! The OpenAPI document: what is checked in is what the code says, and it is one that generators can read.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::Value;

const ACCEPT: &str = "WEARSYNC_ACCEPT=1 cargo test --test openapi";

fn document() -> Value {
    serde_json::from_str(&wearsync::api::document_json()).expect("the document is JSON")
}

/// Every operation as `METHOD path`.
fn operations(document: &Value) -> Vec<(String, &Value)> {
    let methods = ["get", "put", "post", "delete", "patch", "head", "options", "trace"];
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("a path item") {
            if methods.contains(&method.as_str()) {
                found.push((format!("{} {path}", method.to_uppercase()), operation));
            }
        }
    }
    assert!(found.len() > 15, "found only {}", found.len());
    found
}

/// Calls `see` with every value of the document and its place.
fn walk<'a>(value: &'a Value, place: &str, see: &mut dyn FnMut(&str, &'a Value)) {
    see(place, value);
    match value {
        Value::Object(map) => map.iter().for_each(|(name, inner)| walk(inner, &format!("{place}/{name}"), see)),
        Value::Array(list) => list.iter().enumerate().for_each(|(i, inner)| walk(inner, &format!("{place}/{i}"), see)),
        _ => {}
    }
}

fn is_text(value: &Value) -> bool {
    value.as_str().is_some_and(|text| !text.trim().is_empty())
}

fn has_example(value: &Value) -> bool {
    let mut found = false;
    walk(value, "", &mut |place, _| found |= place.ends_with("/example") || place.contains("/examples/"));
    found
}

#[test]
fn what_is_checked_in_is_what_the_code_says() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("openapi/wearsync.json");
    let now = wearsync::api::document_json();
    if std::env::var_os("WEARSYNC_ACCEPT").is_some() {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("openapi/ can be made");
        std::fs::write(&path, &now).expect("openapi/wearsync.json can be written");
    }
    let then = std::fs::read_to_string(&path).unwrap_or_default();
    if then == now {
        return;
    }
    let line = then.lines().zip(now.lines()).take_while(|(then, now)| then == now).count();
    panic!(
        "openapi/wearsync.json differs from the code from line {} on:\n- {}\n+ {}\naccept it with: {ACCEPT}",
        line + 1,
        then.lines().nth(line).unwrap_or_default(),
        now.lines().nth(line).unwrap_or_default(),
    );
}

#[test]
fn no_reference_dangles_and_no_schema_is_left_over() {
    let document = document();
    assert_eq!(document["openapi"], "3.1.0");
    let mut used = BTreeSet::new();
    walk(&document, "", &mut |place, value| {
        if let Some(target) = value.get("$ref").and_then(Value::as_str) {
            let pointer = target.strip_prefix('#').unwrap_or_else(|| panic!("{place}: {target} is outside"));
            assert!(document.pointer(pointer).is_some(), "{place}: {target} is not there");
            used.insert(target.to_owned());
        }
    });
    for name in document["components"]["schemas"].as_object().expect("schemas").keys() {
        assert!(used.contains(&format!("#/components/schemas/{name}")), "nothing refers to the schema {name}");
    }
}

#[test]
fn every_operation_says_what_it_does() {
    let document = document();
    let tags: BTreeSet<&str> =
        document["tags"].as_array().expect("tags").iter().filter_map(|tag| tag["name"].as_str()).collect();
    let mut ids = BTreeSet::new();
    for (name, operation) in operations(&document) {
        for member in ["summary", "description", "operationId"] {
            assert!(is_text(&operation[member]), "{name} has no {member}");
        }
        assert!(ids.insert(operation["operationId"].as_str()), "{name}: its operationId is taken");
        let own = operation["tags"].as_array().map(Vec::as_slice).unwrap_or_default();
        assert!(own.len() == 1 && own[0].as_str().is_some_and(|tag| tags.contains(tag)), "{name} has tags {own:?}");
        let answers = operation["responses"].as_object().expect("responses").iter();
        let mut succeeds =
            answers.filter(|(status, _)| status.starts_with(['2', '3'])).map(|(_, answer)| answer).peekable();
        assert!(succeeds.peek().is_some(), "{name} never succeeds");
        // A redirect and a 204 have no body to show.
        let example = succeeds.any(|answer| has_example(answer) || answer["content"].is_null());
        assert!(example, "{name} has no example of an answer");
        if let Some(body) = operation.get("requestBody") {
            assert!(has_example(body), "{name} has no example of a body");
        }
    }
}

/// Who may call is said for programs as it is said for people; `tests/it/manage.rs` holds it against what happens.
#[test]
fn every_operation_says_who_may_call_it() {
    let document = document();
    assert_eq!(document.get("security"), None, "each operation speaks for itself");
    for (name, operation) in operations(&document) {
        let security = operation["security"].as_array().unwrap_or_else(|| {
            panic!(
                "{name}: end its description with \"Needs the scope `read`.\" (or sync, admin), or give it a `security`"
            )
        });
        for requirement in security.iter().filter_map(Value::as_object) {
            for (scheme, scopes) in requirement {
                let scopes: Vec<&str> = scopes.as_array().expect("scopes").iter().filter_map(Value::as_str).collect();
                match scheme.as_str() {
                    "api_key" | "open_wearables_api_key" => {
                        assert!(matches!(scopes[..], ["sync" | "read" | "admin"]), "{name}: {scopes:?}");
                    }
                    "developer_token" => assert!(scopes.is_empty(), "{name}: {scopes:?}"),
                    _ => panic!("{name}: unknown {scheme}"),
                }
            }
        }
    }
}

#[test]
fn everything_has_a_description() {
    let document = document();
    for (name, operation) in operations(&document) {
        for (status, answer) in operation["responses"].as_object().expect("responses") {
            assert!(is_text(&answer["description"]), "{name}: {status} has no description");
        }
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let parameter_name = parameter["name"].as_str().expect("a name");
            assert!(is_text(&parameter["description"]), "{name}: {parameter_name} has no description");
            assert!(parameter["schema"].is_object(), "{name}: {parameter_name} has no schema");
        }
    }
    for (name, schema) in document["components"]["schemas"].as_object().expect("schemas") {
        for (member, property) in schema["properties"].as_object().into_iter().flatten() {
            // A reference that may be null says it in its second branch.
            let said = [&property["description"], &property["oneOf"][1]["description"]];
            assert!(said.into_iter().any(is_text), "{name}.{member} has no description");
        }
    }
}

#[test]
fn parameters_of_the_path_are_the_ones_in_it() {
    let document = document();
    for (name, operation) in operations(&document) {
        let written: BTreeSet<&str> = name.split('{').skip(1).filter_map(|rest| rest.split('}').next()).collect();
        let listed: BTreeSet<&str> = operation["parameters"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|parameter| parameter["in"] == "path")
            .filter_map(|parameter| parameter["name"].as_str())
            .collect();
        assert_eq!(written, listed, "{name}");
    }
}

/// What generators trip over.
#[test]
fn the_known_traps_are_kept_out_of() {
    let document = document();
    assert!(is_text(&document["servers"][0]["url"]));
    let schemes = document["components"]["securitySchemes"].as_object().expect("schemes");
    let headers: BTreeSet<&str> = schemes.values().filter_map(|scheme| scheme["name"].as_str()).collect();
    assert_eq!(headers, BTreeSet::from(["X-API-Key", "X-Open-Wearables-API-Key"]));
    let trigger = &document["paths"]["/api/v1/{provider}/users/{user_id}/sync"]["post"];
    assert_eq!(trigger["operationId"], "sync_user_data");
    let parameter = |name: &str| {
        let list = trigger["parameters"].as_array().expect("parameters");
        list.iter().find(|parameter| parameter["name"] == name).unwrap_or_else(|| panic!("no {name}"))
    };
    let data_type = &parameter("data_type")["schema"];
    assert_eq!(data_type["enum"], serde_json::json!(["workouts", "247", "all"]));
    assert_eq!(data_type["x-enum-varnames"], serde_json::json!(["workouts", "DATA_247", "all"]));
    let providers: Vec<&str> = wearsync::providers::names().map(|name| name.0).collect();
    assert_eq!(parameter("provider")["schema"]["enum"], serde_json::json!(providers));
    for name in [
        "async",
        "since",
        "limit",
        "offset",
        "filter_by_modification_time",
        "samples",
        "zones",
        "route",
        "summary_start_time",
        "summary_end_time",
        "Idempotency-Key",
    ] {
        assert_eq!(parameter(name)["required"], false, "{name}");
    }
}

/// Where ours is not the mirrored API's, and why. `OPERATION: what`.
const DEVIATIONS: [(&str, &str); 16] = [
    ("POST /api/v1/auth/login: body grant_type", "OAuth's form fields that the mirrored API takes and ignores"),
    ("POST /api/v1/auth/login: body scope", "as above"),
    ("POST /api/v1/auth/login: body client_id", "as above"),
    ("POST /api/v1/auth/login: body client_secret", "as above"),
    ("PATCH /api/v1/auth/me: body password", "a password changes with the old one only: `change-password`"),
    ("GET /api/v1/strava/webhooks: 200 challenge", "the handshake of another provider; Strava's has `hub.challenge`"),
    ("GET /api/v1/strava/webhooks: 401", "as above"),
    ("GET /api/v1/strava/webhooks: 501", "every provider answers the handshake that it has"),
    ("GET /api/v1/providers/{provider}/webhooks: 200 challenge", "as above"),
    ("GET /api/v1/providers/{provider}/webhooks: 401", "as above"),
    ("GET /api/v1/strava/webhook", "the old name of `webhooks`: served, not listed"),
    ("POST /api/v1/strava/webhook", "as above"),
    ("GET /api/v1/strava/webhook/health", "as above"),
    (
        "GET /api/v1/providers/{provider}/webhooks/subscriptions/{subscription_id}: 200 subscription",
        "no provider here offers it: 501 always",
    ),
    (
        "PUT /api/v1/providers/{provider}/webhooks/subscriptions/{subscription_id}: 200 updated",
        "no provider here offers it: 501 always",
    ),
    (
        "POST /api/v1/providers/{provider}/webhooks/subscriptions/renew: 200 renewed",
        "no provider here offers it: 501 always",
    ),
];

/// Paths of every member of a schema: `items[].id`.
fn members(document: &Value, schema: &Value, place: &str, depth: usize, found: &mut BTreeSet<String>) {
    let schema = match schema.get("$ref").and_then(Value::as_str) {
        Some(target) => document.pointer(&target[1..]).expect("no reference dangles"),
        None => schema,
    };
    if depth > 8 {
        return;
    }
    for list in ["anyOf", "oneOf", "allOf"] {
        for inner in schema[list].as_array().into_iter().flatten() {
            members(document, inner, place, depth + 1, found);
        }
    }
    if let Some(items) = schema.get("items") {
        members(document, items, &format!("{place}[]"), depth + 1, found);
    }
    for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
        let place = if place.is_empty() { name.clone() } else { format!("{place}.{name}") };
        members(document, inner, &place, depth + 1, found);
        found.insert(place);
    }
}

/// Members of a body in all its forms.
fn members_of(document: &Value, body: &Value) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for form in body["content"].as_object().into_iter().flat_map(|content| content.values()) {
        members(document, &form["schema"], "", 0, &mut found);
    }
    found
}

/// Clients of the mirrored API find every operation, parameter, status and member that they know. `contract.json` holds
/// their names, as its clients see them.
#[test]
fn nothing_of_the_mirrored_api_is_missing() {
    let document = document();
    let contract: Vec<Value> = serde_json::from_str(include_str!("contract.json")).expect("JSON");
    let ours: std::collections::BTreeMap<_, _> = operations(&document).into_iter().collect();
    let mut missing = BTreeSet::new();
    for asked in &contract {
        let name = asked["operation"].as_str().expect("a name");
        let Some(operation) = ours.get(name) else {
            missing.insert(name.to_owned());
            continue;
        };
        let security: BTreeSet<&str> = operation["security"]
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(|one| one.as_object().expect("schemes").keys().map(String::as_str))
            .collect();
        let needed: &[&str] = match asked["auth"].as_str().expect("a word") {
            "none" => &[],
            "provider_signature" => &[],
            "developer_jwt" => &["developer_token"],
            "api_key_or_jwt" => &["api_key", "open_wearables_api_key", "developer_token"],
            "app_credentials_or_developer_jwt" => &["developer_token"],
            other => panic!("{name}: {other}"),
        };
        assert!(needed.iter().all(|scheme| security.contains(scheme)), "{name} takes {security:?}");
        assert!(!needed.is_empty() || security.is_empty(), "{name} asks for {security:?}");

        let parameters = operation["parameters"].as_array().into_iter().flatten();
        let parameters: Vec<(String, bool)> = parameters
            .map(|one| {
                let text = |member: &str| one[member].as_str().expect("a text").to_owned();
                (format!("{} {}", text("in"), text("name")), one["required"].as_bool().unwrap_or(false))
            })
            .collect();
        let known: Vec<&str> =
            asked["parameters"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
        for parameter in &known {
            let bare = parameter.trim_end_matches(" required");
            if !parameters.iter().any(|(name, _)| name == bare) {
                missing.insert(format!("{name}: parameter {bare}"));
            }
        }
        for (parameter, required) in parameters.iter().filter(|(name, _)| name.starts_with("query ")) {
            let allowed = !required || known.contains(&format!("{parameter} required").as_str());
            assert!(allowed, "{name} requires {parameter}, which clients may leave out");
        }
        for (form, names) in asked["body"].as_object().into_iter().flatten() {
            let body = &operation["requestBody"];
            assert!(body["content"].get(form).is_some(), "{name} takes no {form}");
            let have = members_of(&document, body);
            let names = names.as_array().expect("a list").iter().filter_map(Value::as_str);
            missing
                .extend(names.filter(|member| !have.contains(*member)).map(|member| format!("{name}: body {member}")));
        }
        for (status, names) in asked["answers"].as_object().expect("answers") {
            let Some(answer) = operation["responses"].get(status) else {
                missing.insert(format!("{name}: {status}"));
                continue;
            };
            let have = members_of(&document, answer);
            let names = names.as_array().expect("a list").iter().filter_map(Value::as_str);
            missing.extend(
                names.filter(|member| !have.contains(*member)).map(|member| format!("{name}: {status} {member}")),
            );
        }
    }
    let known: BTreeSet<String> = DEVIATIONS.iter().map(|(what, _)| (*what).to_owned()).collect();
    assert_eq!(missing, known);
}
