use std::collections::BTreeSet;
use std::time::Instant;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};

use super::*;
use crate::model::quota::Seen;
use crate::model::{BEGINNING_MS, Kind};
use crate::providers::{AccessToken, Api, FetchedPart, Gate, Http, Next, PageRequest, PartBody, Provider};

/// A started simulator, a client of it and a valid token.
struct World {
    running: Running,
    http: reqwest::Client,
    clock: Clock,
    token: String,
    refresh: String,
}

struct Got {
    status: u16,
    headers: reqwest::header::HeaderMap,
    text: String,
}

impl Got {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

fn noon() -> DateTime<Utc> {
    "2026-05-04T12:00:00Z".parse().unwrap()
}

fn options() -> Options {
    Options { activities: 250, manual_share: 0.1, private_share: 0.1, ..Options::default() }
}

impl World {
    async fn start(options: Options) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).no_proxy().build().unwrap();
        let clock = Clock::mock(noon());
        let running = start(options, clock.clone()).await.unwrap();
        let mut world = Self { running, http, clock, token: String::new(), refresh: String::new() };
        world.refresh = world.grant(json!({})).await;
        world.token = world.refreshed(&world.refresh).await.json()["access_token"].as_str().unwrap().to_owned();
        world
    }

    async fn get(&self, path: &str) -> Got {
        let url = format!("{}{path}", self.running.url());
        let response = self.http.get(url).bearer_auth(&self.token).send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Got { status, headers, text: response.text().await.unwrap() }
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        let response = self.http.post(format!("{}{path}", self.running.url())).json(&body).send().await.unwrap();
        assert!(response.status().is_success(), "{path} {body}: {}", response.status());
        response.json().await.unwrap()
    }

    async fn form(&self, path: &str, fields: &[(&str, &str)]) -> Got {
        let url = format!("{}{path}", self.running.url());
        let response = self.http.post(url).form(fields).send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Got { status, headers, text: response.text().await.unwrap() }
    }

    async fn grant(&self, ask: Value) -> String {
        self.post("/_simulator/grant", ask).await["refresh_token"].as_str().unwrap().to_owned()
    }

    async fn refreshed(&self, token: &str) -> Got {
        let fields = [
            ("client_id", "90417"),
            ("client_secret", "simulated-secret"),
            ("grant_type", "refresh_token"),
            ("refresh_token", token),
        ];
        self.form("/oauth/token", &fields).await
    }

    async fn ledger(&self) -> Value {
        self.get("/_simulator/ledger").await.json()["ledger"].clone()
    }

    async fn truth(&self) -> Vec<Value> {
        let athlete = self.get("/_simulator/truth").await.json();
        athlete["activities"].as_array().unwrap().clone()
    }

    /// Every row, page by page to the empty one.
    async fn all(&self, query: &str) -> Vec<Value> {
        let mut rows = Vec::new();
        for page in 1.. {
            let got = self.get(&format!("/api/v3/athlete/activities?page={page}{query}")).await;
            assert_eq!(got.status, 200, "{}", got.text);
            let more = got.json().as_array().unwrap().clone();
            if more.is_empty() {
                break;
            }
            rows.extend(more);
        }
        rows
    }
}

fn ids(rows: &[Value]) -> Vec<u64> {
    rows.iter().map(|row| row["id"].as_u64().unwrap()).collect()
}

fn starts(rows: &[Value]) -> Vec<i64> {
    let start = |row: &Value| row["start_date"].as_str().unwrap().parse::<DateTime<Utc>>().unwrap().timestamp();
    rows.iter().map(start).collect()
}

#[tokio::test]
async fn pages_end_with_an_empty_one_and_lose_nothing() {
    let world = World::start(options()).await;
    let rows = world.all("&per_page=60").await;
    let truth: Vec<u64> = ids(&world.truth().await);
    assert_eq!(ids(&rows), truth);
    assert_eq!(rows.len(), 250);
    let starts = starts(&rows);
    assert!(starts.is_sorted_by(|a, b| a >= b), "newest first");
    assert!(starts.windows(2).any(|pair| pair[0] == pair[1]), "some begin at the same second");
    assert!(rows.iter().all(|row| row["id"].as_u64().unwrap() > 1 << 32));
    assert_eq!(world.get("/athlete/activities").await.json().as_array().unwrap().len(), 30, "without the prefix");
    assert_eq!(world.get("/athlete/activities?per_page=1000").await.json().as_array().unwrap().len(), 200);
}

#[tokio::test]
async fn bounds_are_outside_and_only_after_turns_the_order() {
    let world = World::start(options()).await;
    let rows = world.all("&per_page=200").await;
    let (low, high) = (starts(&rows)[120], starts(&rows)[40]);
    let inside = world.all(&format!("&per_page=50&after={low}&before={high}")).await;
    let expected: Vec<u64> = rows
        .iter()
        .zip(starts(&rows))
        .filter(|(_, at)| low < *at && *at < high)
        .map(|(row, _)| row["id"].as_u64().unwrap())
        .collect();
    assert_eq!(ids(&inside), expected);
    let turned = world.all(&format!("&per_page=50&after={low}")).await;
    assert!(starts(&turned).is_sorted());
    assert!(starts(&turned).iter().all(|at| *at > low));

    let future = world.get(&format!("/athlete/activities?after={}", noon().timestamp() + 1)).await;
    assert_eq!((future.status, &future.json()["errors"][0]["code"]), (400, &json!("future")));
    let words = world.get("/athlete/activities?before=yesterday").await;
    assert_eq!((words.status, &words.json()["errors"][0]["field"]), (400, &json!("before")));
}

#[tokio::test]
async fn short_pages_lose_nothing() {
    let world = World::start(Options { short_pages: true, ..options() }).await;
    let truth = ids(&world.truth().await);
    for query in ["&per_page=50", "&per_page=50&before=1999999999", "&per_page=1"] {
        assert_eq!(ids(&world.all(query).await), truth, "{query}");
    }
    let second = world.get("/athlete/activities?page=2&per_page=50").await.json();
    assert_eq!(second.as_array().unwrap().len(), 47);
}

#[tokio::test]
async fn rows_are_as_awkward_as_the_real_ones() {
    let world = World::start(options()).await;
    let rows = world.all("&per_page=200").await;
    let any = |what: &str, test: &dyn Fn(&Value) -> bool| assert!(rows.iter().any(test), "no row: {what}");
    any("unknown sport", &|row| row["sport_type"] == "UnderwaterHockey" && row["utc_offset"] == 20700.0);
    any("old", &|row| row.get("sport_type").is_none() && row["type"] == "Ride");
    any("manual", &|row| row["manual"] == true && row["upload_id"].is_null() && row.get("upload_id_str").is_none());
    any("only me", &|row| row["visibility"] == "only_me" && row["private"] == true);
    any("hidden start", &|row| {
        row["start_date"].as_str().unwrap().ends_with("T00:00:01Z") && row["start_date"] == row["start_date_local"]
    });
    any("zero length", &|row| row["elapsed_time"] == 0 && row["distance"] == json!(0.0));
    any("whole as integer", &|row| row["distance"] == json!(0));
    any("Newfoundland", &|row| row["timezone"] == "(GMT-03:30) America/St_Johns" && row["utc_offset"] == -9000.0);
    any("below the sea", &|row| row["timezone"].as_str().unwrap().contains("Jerusalem"));
    any("clock change", &|row| row["start_date"] == "2025-10-25T23:30:00Z" && row["utc_offset"] == 7200.0);
    any("summer", &|row| row["timezone"] == "(GMT+01:00) Europe/Zurich" && row["utc_offset"] == 7200.0);
    any("winter", &|row| row["timezone"] == "(GMT+01:00) Europe/Zurich" && row["utc_offset"] == 3600.0);
    any("virtual", &|row| row["type"] == "VirtualRide" && row["start_latlng"][1] == 166.97213);
    any("no map", &|row| row["start_latlng"] == json!([]) && row["map"]["summary_polyline"] == "");

    for row in &rows {
        let detail = world.get(&format!("/api/v3/activities/{}", row["id"])).await.json();
        assert_eq!((&detail["name"], &detail["resource_state"]), (&row["name"], &json!(3)));
        let streams =
            world.get(&format!("/activities/{}/streams?keys=time,heartrate&key_by_type=true", row["id"])).await;
        if row["manual"] == true {
            assert_eq!((streams.status, &streams.json()["errors"][0]["resource"]), (404, &json!("Activity")));
            continue;
        }
        let streams = streams.json();
        let time: Vec<i64> = serde_json::from_value(streams["time"]["data"].clone()).unwrap();
        assert!(time.is_sorted_by(|a, b| a < b), "{}", row["name"]);
        assert_eq!(*time.last().unwrap(), row["elapsed_time"].as_i64().unwrap(), "{row}");
        assert_eq!(streams["distance"]["data"].as_array().unwrap().len(), time.len());
        assert_eq!(streams.get("heartrate").is_some(), row["has_heartrate"] == true);
        assert!(streams.get("watts").is_none());
    }
}

#[tokio::test]
async fn streams_have_what_there_is() {
    let world = World::start(Options { stream_points: 3600, ..options() }).await;
    let rows = world.all("&per_page=200").await;
    let row = rows.iter().find(|row| row["device_watts"] == true && row["start_latlng"] != json!([])).unwrap();
    let keys = "time,distance,latlng,altitude,velocity_smooth,heartrate,cadence,watts,temp,moving,grade_smooth";
    let set = world.get(&format!("/activities/{}/streams?keys={keys}&key_by_type=true", row["id"])).await.json();
    for (key, stream) in set.as_object().unwrap() {
        assert_eq!(stream["data"].as_array().unwrap().len(), 3600, "{key}");
        assert_eq!(stream["original_size"], 3600);
    }
    assert!(set["watts"]["data"].as_array().unwrap().iter().any(Value::is_null));
    assert_eq!(set["latlng"]["data"][0], json!([46.94812, 7.44741]));
    let low = world.get(&format!("/activities/{}/streams?keys=watts&resolution=low", row["id"])).await.json();
    let types: Vec<&str> = low.as_array().unwrap().iter().map(|stream| stream["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["distance", "watts"]);
    assert_eq!(low[0]["data"].as_array().unwrap().len(), 100);
    assert_eq!(world.get(&format!("/activities/{}/streams?resolution=all", row["id"])).await.status, 400);
}

#[tokio::test]
async fn the_rest_of_the_api_answers() {
    let world = World::start(options()).await;
    let athlete = world.get("/api/v3/athlete").await.json();
    assert_eq!((&athlete["id"], &athlete["resource_state"]), (&json!(70_412_355), &json!(3)));
    assert_eq!(world.get("/gear/b9012345").await.json()["frame_type"], 3);
    assert_eq!(world.get("/gear/b1").await.status, 404);
    assert_eq!(world.get("/athletes/70412355/stats").await.json()["recent_ride_totals"]["count"], 3);
    assert_eq!(world.get("/athletes/1/stats").await.status, 404);
    assert_eq!(world.get("/athlete/zones").await.json()["heart_rate"]["zones"][4]["max"], -1);
    let rows = world.all("&per_page=200").await;
    let run = rows.iter().find(|row| row["sport_type"] == "Run" && row["has_heartrate"] == true).unwrap();
    let zones = world.get(&format!("/activities/{}/zones", run["id"])).await.json();
    assert_eq!((&zones[0]["type"], &zones[1]["type"]), (&json!("heartrate"), &json!("pace")));
    let laps = world.get(&format!("/activities/{}/laps", run["id"])).await.json();
    assert_eq!(laps[0]["lap_index"], 1);
    let detail = world.get(&format!("/activities/{}", run["id"])).await.json();
    assert_eq!(detail["laps"], laps);
    assert!(world.get("/nowhere").await.json()["errors"][0]["field"] == "path");
    assert_eq!(world.get("/activities/17000000001").await.status, 404);
}

#[tokio::test]
async fn the_same_seed_gives_the_same_bytes() {
    let (one, two) = (World::start(options()).await, World::start(options()).await);
    let other = World::start(Options { seed: 2, ..options() }).await;
    assert_eq!(one.token, two.token);
    for path in ["/athlete", "/athlete/activities?per_page=200", "/athlete/activities?per_page=200&page=2"] {
        let text = one.get(path).await.text;
        assert_eq!(text, two.get(path).await.text);
        assert!(path == "/athlete" || text != other.get(path).await.text);
    }
    for id in ids(&one.truth().await).iter().take(40) {
        let path = format!("/activities/{id}/streams?keys=time,watts,latlng&key_by_type=true");
        assert_eq!(one.get(&path).await.text, two.get(&path).await.text);
    }
}

#[tokio::test]
async fn quotas_count_refuse_and_begin_anew() {
    let world = World::start(Options { quota: true, limits: [6, 20, 4, 12], ..options() }).await;
    for used in 1..=4 {
        let got = world.get("/athlete").await;
        assert_eq!((got.status, got.header("X-RateLimit-Limit")), (200, "6,20"));
        assert_eq!(got.header("X-ReadRateLimit-Usage"), format!("{used},{used}"));
        assert_eq!(got.header("date"), "Mon, 04 May 2026 12:00:00 GMT");
    }
    let refused = world.get("/athlete").await;
    assert_eq!((refused.status, &refused.json()["errors"][0]["field"]), (429, &json!("read rate limit")));
    assert_eq!(world.get("/athlete").await.status, 429);
    let refused = world.get("/athlete").await;
    assert_eq!((refused.status, &refused.json()["errors"][0]["field"]), (429, &json!("overall rate limit")));
    world.clock.set(noon() + TimeDelta::minutes(15));
    let got = world.get("/athlete").await;
    assert_eq!((got.status, got.header("X-RateLimit-Usage")), (200, "1,8"));
    world.clock.set(noon() + TimeDelta::hours(12));
    assert_eq!(world.refreshed(&world.refresh).await.status, 200);
    assert_eq!(world.ledger().await["over_quota"], 3);
}

#[tokio::test]
async fn tokens_live_rotate_and_die() {
    let world = World::start(Options { rotate: true, ..options() }).await;
    // The first refresh of `start` has already spent the token that was granted.
    assert_eq!(world.refreshed(&world.refresh).await.json()["errors"][0]["resource"], "RefreshToken");
    let refresh = world.grant(json!({})).await;
    let same = world.refreshed(&refresh).await.json();
    assert_eq!((&same["access_token"], &same["expires_in"]), (&json!(world.token), &json!(21600)));
    assert_ne!(same["refresh_token"], refresh);
    world.clock.set(noon() + TimeDelta::hours(5));
    let fresh = world.refreshed(same["refresh_token"].as_str().unwrap()).await.json();
    assert_ne!(fresh["access_token"], world.token);
    assert_eq!(world.get("/athlete").await.status, 200, "the old one works until it ends");
    world.clock.set(noon() + TimeDelta::hours(6));
    let refused = world.get("/athlete").await;
    assert_eq!((refused.status, &refused.json()["errors"][0]["field"]), (401, &json!("access_token")));

    let tokens = world.ledger().await["tokens"].clone();
    assert_eq!((&tokens["refresh_attempts"], &tokens["refresh_refused"]), (&json!(4), &json!(1)));
    assert_eq!((&tokens["issued"], &tokens["dead_calls"]), (&json!(2), &json!(1)));

    let url = format!("{}/oauth/revoke", world.running.url());
    let revoke = world.http.post(url).basic_auth("90417", Some("simulated-secret"));
    let token = fresh["access_token"].as_str().unwrap();
    assert_eq!(revoke.form(&[("token", token)]).send().await.unwrap().status(), 200);
    assert_eq!(world.refreshed(fresh["refresh_token"].as_str().unwrap()).await.status, 400);
    assert_eq!(world.get("/athlete").await.status, 401);
    assert_eq!(world.ledger().await["tokens"]["revoked_calls"], 1);
    let wrong = world.form("/oauth/token", &[("client_id", "90417"), ("client_secret", "x")]).await;
    assert_eq!(wrong.json()["errors"][0]["resource"], "Application");
}

#[tokio::test]
async fn a_token_may_die_after_some_calls() {
    let mut world = World::start(Options { expire_after_calls: Some(3), ..options() }).await;
    for status in [200, 200, 200, 401, 401] {
        assert_eq!(world.get("/athlete").await.status, status);
    }
    world.token = world.refreshed(&world.refresh).await.json()["access_token"].as_str().unwrap().to_owned();
    assert_eq!(world.get("/athlete").await.status, 200);
    world.post("/_simulator/revoke", json!({"access_only": true})).await;
    assert_eq!(world.get("/athlete").await.status, 401);
    assert_eq!(world.refreshed(&world.refresh).await.status, 200);
}

#[tokio::test]
async fn consent_goes_round() {
    let world =
        World::start(Options { auto_approve: true, unticked_scopes: vec!["activity:read_all".into()], ..options() })
            .await;
    let ask = "/oauth/authorize?client_id=90417&response_type=code&redirect_uri=http%3A%2F%2Flocalhost%3A1%2Fback\
               &scope=read%2Cactivity%3Aread_all%2Cactivity%3Aread&state=a%26b&athlete=1";
    let back = world.get(ask).await;
    assert_eq!(back.status, 302);
    let back = url::Url::parse(back.header("location")).unwrap();
    let field = |name: &str| back.query_pairs().find(|(key, _)| key == name).unwrap().1.into_owned();
    assert_eq!((field("state"), field("scope")), ("a&b".to_owned(), "read,activity:read".to_owned()));
    let code = field("code");
    let exchange = [
        ("client_id", "90417"),
        ("client_secret", "simulated-secret"),
        ("grant_type", "authorization_code"),
        ("code", &code),
    ];
    let tokens = world.form("/oauth/token", &exchange).await.json();
    assert_eq!((&tokens["athlete"]["id"], &tokens["token_type"]), (&json!(70_412_362), &json!("Bearer")));
    assert_eq!(world.form("/oauth/token", &exchange).await.json()["errors"][0]["resource"], "AuthorizationCode");
    assert_eq!(world.get("/oauth/authorize?client_id=1").await.json()["errors"][0]["field"], "client_id");
    let bad = ask.replace("activity%3Aread_all", "everything");
    assert_eq!(world.get(&bad).await.json()["errors"][0]["field"], "scope");

    // The page itself, and Cancel.
    let world = World::start(options()).await;
    let page = world.get(ask).await;
    assert!(page.text.contains("value=\"activity:read_all\" checked") && page.text.contains("value=\"a&amp;b\""));
    let answer = [("client_id", "90417"), ("redirect_uri", "http://localhost:1/"), ("answer", "cancel")];
    let back = world.form("/oauth/authorize", &answer).await;
    assert_eq!(back.header("location"), "http://localhost:1/?error=access_denied");
}

#[tokio::test]
async fn scopes_hide_what_they_do_not_cover() {
    let mut world = World::start(options()).await;
    let all: BTreeSet<u64> = ids(&world.all("&per_page=200").await).into_iter().collect();
    let hidden: Vec<Value> = world.truth().await.into_iter().filter(|row| row["only_me"] == true).collect();
    let limited = world.grant(json!({"scopes": ["read", "activity:read"]})).await;
    world.token = world.refreshed(&limited).await.json()["access_token"].as_str().unwrap().to_owned();
    let seen: BTreeSet<u64> = ids(&world.all("&per_page=200").await).into_iter().collect();
    assert_eq!(seen.len() + hidden.len(), all.len());
    assert!(!hidden.is_empty() && ids(&hidden).iter().all(|id| !seen.contains(id)));
    assert_eq!(world.get(&format!("/activities/{}", hidden[0]["id"])).await.status, 404);
    let zones = world.get("/athlete/zones").await;
    assert_eq!((zones.status, &zones.json()["errors"][0]["code"]), (401, &json!("missing")));
    assert_eq!(world.get("/athlete").await.json()["resource_state"], 2);
    world.grant(json!({"scopes": ["read"]})).await;
    let list = world.get("/athlete/activities").await.json();
    assert_eq!(list["errors"][0]["field"], "activity:read_permission");
    // What belongs to others does not exist.
    let theirs = world.get("/_simulator/truth?athlete=1").await.json()["activities"][0]["id"].clone();
    world.grant(json!({})).await;
    assert_eq!(world.get(&format!("/activities/{theirs}")).await.status, 404);
}

#[tokio::test]
async fn events_change_the_world_and_the_ledger_knows() {
    let world = World::start(options()).await;
    let rows = world.all("&per_page=200").await;
    let (edited, deleted) = (rows[3]["id"].clone(), rows[5]["id"].clone());
    world.clock.set(noon() + TimeDelta::hours(1));
    let edit = json!({"id": edited, "name": "Abendrunde 🌙", "distance": 4321.5, "start_date": "2026-01-01T10:00:00Z", "odd": [1]});
    world.post("/_simulator/edit", edit).await;
    world.post("/_simulator/delete", json!({"id": deleted})).await;
    let late = world
        .post("/_simulator/upload", json!({"start": "2026-04-28T05:00:00Z", "elapsed_time": 600, "name": "late"}))
        .await;
    let same = world
        .post("/_simulator/upload", json!({"start": "2026-04-01T05:00:00Z", "count": 5, "spacing_seconds": 0}))
        .await;

    let after = world.all("&per_page=200").await;
    assert_eq!(after.len(), 250 - 1 + 6);
    assert!(starts(&after).is_sorted_by(|a, b| a >= b));
    let row = after.iter().find(|row| row["id"] == edited).unwrap();
    assert_eq!((&row["name"], &row["distance"], &row["odd"]), (&json!("Abendrunde 🌙"), &json!(4321.5), &json!([1])));
    assert_eq!(row["start_date"], "2026-01-01T10:00:00Z");
    assert!(!ids(&after).contains(&deleted.as_u64().unwrap()));
    assert_eq!(world.get(&format!("/activities/{deleted}")).await.status, 404);
    let row = after.iter().find(|row| row["id"] == late["id"]).unwrap();
    assert_eq!((&row["name"], &row["start_date"]), (&json!("late"), &json!("2026-04-28T05:00:00Z")));
    let streams = world.get(&format!("/activities/{}/streams?keys=time", late["id"])).await;
    assert!(streams.status == 200 || row["manual"] == true);
    assert_eq!(same["ids"].as_array().unwrap().len(), 5);

    let truth = world.truth().await;
    assert_eq!(truth.len(), 256);
    let now = (noon() + TimeDelta::hours(1)).timestamp_millis();
    let of = |id: &Value| truth.iter().find(|row| row["id"] == *id).unwrap();
    assert_eq!((&of(&deleted)["deleted_at_ms"], &of(&edited)["changed_at_ms"]), (&json!(now), &json!(now)));
    assert_eq!(of(&late["id"])["listable_at_ms"], now);
    assert_eq!(of(&edited)["listable_at_ms"], noon().timestamp_millis());

    let ledger = world.ledger().await;
    assert_eq!(ledger["calls"]["detail"], 1);
    assert_eq!(
        ledger["by_id"]["streams"][late["id"].to_string()],
        if row["manual"] == true { Value::Null } else { json!(1) }
    );
    let lists = ledger["lists"].as_array().unwrap();
    assert_eq!(
        (&lists[0]["page"], &lists[0]["rows"], &lists[0]["athlete"]),
        (&json!(1), &json!(200), &json!(70_412_355))
    );
    assert_eq!(lists.last().unwrap()["rows"], 0);
    let full = world.get("/_simulator/truth?full=true").await.json();
    assert!(full["activities"].as_array().unwrap().iter().all(|row| row["summary"]["id"] == row["id"]));
    let nobody = world.http.post(format!("{}/_simulator/delete", world.running.url())).json(&json!({"id": deleted}));
    assert_eq!(nobody.send().await.unwrap().status(), 400);
}

#[tokio::test]
async fn volatile_counts_differ_at_every_listing() {
    let world = World::start(options()).await;
    let (one, two) = (world.all("&per_page=200").await, world.all("&per_page=200").await);
    assert_ne!(one, two);
    let still = |mut rows: Vec<Value>| {
        rows.iter_mut().for_each(|row| row["kudos_count"] = json!(0));
        rows
    };
    assert_eq!(still(one), still(two));
    let world = World::start(Options { volatile: false, ..options() }).await;
    assert_eq!(world.all("&per_page=200").await, world.all("&per_page=200").await);
}

#[tokio::test]
async fn faults_happen_as_asked() {
    let world = World::start(Options { faults: vec![parse_fault("429@list=1/2:30").unwrap()], ..options() }).await;
    let statuses = async |path: &str, n: usize| {
        let mut statuses = Vec::new();
        for _ in 0..n {
            statuses.push(world.get(path).await.status);
        }
        statuses
    };
    assert_eq!(statuses("/athlete/activities", 4).await, [200, 429, 200, 429]);
    assert_eq!(world.get("/athlete").await.status, 200);
    world.get("/athlete/activities").await;
    assert_eq!(world.get("/athlete/activities").await.header("retry-after"), "30");

    let arm = async |faults: &[&str]| drop(world.post("/_simulator/fault", json!({"faults": faults})).await);
    for (fault, status) in [("500", 500), ("502", 502), ("503", 503), ("inactive", 403), ("404", 404)] {
        arm(&[&format!("{fault}=1*1")]).await;
        assert_eq!(statuses("/athlete", 2).await, [status, 200], "{fault}");
    }
    arm(&["500@token=1*1"]).await;
    assert_eq!(world.get("/athlete").await.status, 200);
    assert_eq!(world.refreshed(&world.refresh).await.status, 500);
    assert_eq!(world.refreshed(&world.refresh).await.status, 200);

    arm(&["cut=1"]).await;
    let url = format!("{}/athlete/activities?per_page=200", world.running.url());
    let cut = world.http.get(&url).bearer_auth(&world.token).send().await.unwrap();
    assert_eq!(cut.status(), 200);
    assert!(cut.bytes().await.is_err());
    let lists = world.ledger().await["lists"].clone();
    assert_eq!(
        (&lists[0]["whole"], &lists.as_array().unwrap().last().unwrap()["whole"]),
        (&json!(true), &json!(false))
    );
    arm(&["broken-json=1"]).await;
    assert!(serde_json::from_str::<Value>(&world.get("/athlete").await.text).is_err());
    arm(&["huge=1:3"]).await;
    assert_eq!(world.get("/athlete").await.text.len(), 3 << 20);
    arm(&["slow=1:150", "skew=1:-300"]).await;
    let since = Instant::now();
    assert_eq!(world.get("/athlete").await.header("date"), "Mon, 04 May 2026 11:55:00 GMT");
    assert!(since.elapsed().as_millis() >= 150);
    arm(&["503=0.3"]).await;
    let failed = statuses("/athlete", 200).await.into_iter().filter(|status| *status == 503).count();
    assert!((35..85).contains(&failed), "{failed}");
    assert_eq!(world.ledger().await["faults"]["cut"], 1);
    let bad = world.http.post(format!("{}/_simulator/fault", world.running.url())).json(&json!({"faults": ["x"]}));
    assert!(bad.send().await.unwrap().text().await.unwrap().contains("no `=`"));
}

#[tokio::test]
async fn two_clients_share_an_athlete() {
    let second = Client { id: "2".into(), secret: "two".into() };
    let clients = vec![Options::default().clients[0].clone(), second];
    let world = World::start(Options { clients, quota: true, ..options() }).await;
    let theirs = world.grant(json!({"client_id": "2"})).await;
    assert_ne!(theirs, world.refresh);
    assert_eq!(world.refreshed(&theirs).await.status, 400, "a token belongs to its client");
    world.get("/athlete").await;
    assert_eq!(world.get("/athlete").await.header("x-ratelimit-usage"), "2,2");
}

#[tokio::test]
async fn the_clock_moves_from_outside() {
    let world = World::start(options()).await;
    world.post("/_simulator/clock", json!({"advance_seconds": 900})).await;
    assert_eq!(world.clock.now(), noon() + TimeDelta::minutes(15));
}

#[tokio::test]
async fn a_large_world_is_made_quickly() {
    let since = Instant::now();
    let world = World::start(Options { activities: 20_000, athletes: 1, ..options() }).await;
    assert_eq!(world.get("/athlete/activities?per_page=200&page=100").await.json().as_array().unwrap().len(), 200);
    assert!(since.elapsed().as_secs() < 5, "{:?}", since.elapsed());
    let since = Instant::now();
    world.running.shutdown().await;
    assert!(since.elapsed().as_millis() < 900, "an idle connection does not hold it up");
}

struct Open;

#[async_trait::async_trait]
impl Gate for Open {
    async fn take(&self) -> Result<(), DateTime<Utc>> {
        Ok(())
    }
    async fn observe(&self, _: &[Seen]) {}
    async fn refused(&self, _: Option<std::time::Duration>) -> DateTime<Utc> {
        noon()
    }
}

/// Both sides were written from the same documents by different hands: here they meet.
#[tokio::test]
async fn our_own_client_reads_all_of_it() {
    let options = Options { very_long: true, short_pages: true, activities: 130, ..options() };
    let world = World::start(options).await;
    world.post("/_simulator/upload", json!({"start": "2026-04-01T05:00:00Z", "count": 70, "spacing_seconds": 0})).await;
    let provider = &strava::PROVIDER;
    let token = AccessToken { secret: world.token.clone().into(), version: 1, expires_at: noon() };
    let http = Http::new().unwrap();
    let base_url = format!("{}/api/v3", world.running.url());
    let api = Api { http: &http, spec: provider.spec(), base_url: &base_url, token: &token, gate: &Open };
    let stream = provider.spec().streams.iter().find(|stream| stream.kind == Kind::Workout).unwrap();
    let (mut place, mut seen) = (None, BTreeSet::new());
    loop {
        let hi = noon().timestamp_millis();
        let request = PageRequest { stream, lo: BEGINNING_MS, hi, position: place.as_ref(), limit: 50, offset: 0 };
        let page = provider.fetch_page(&api, &request).await.unwrap();
        assert_eq!(page.unreadable, [""; 0]);
        for item in page.items {
            let mut parts = vec![PartBody { part: item.part, body: item.body }];
            for part in provider.spec().parts.iter().filter(|part| part.kind == Kind::Workout && !part.primary) {
                match provider.fetch_part(&api, Kind::Workout, &item.external_id, part.name).await.unwrap() {
                    FetchedPart::Body(body) => parts.push(PartBody { part: part.name, body }),
                    FetchedPart::None => {}
                }
            }
            let normalized = provider.normalize(Kind::Workout, &item.external_id, &parts).unwrap();
            assert_eq!(normalized.dropped, 0, "{}", item.external_id);
            seen.insert(item.external_id);
        }
        match page.next {
            Next::Position(next) => place = Some(next),
            Next::End => break,
        }
    }
    let truth: BTreeSet<String> = ids(&world.truth().await).iter().map(u64::to_string).collect();
    assert_eq!(seen, truth);
}
