//! Entity files as people find them: names, members, schemas, and what happens when they are deleted, committed, moved
//! or cannot be written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use chrono::{DateTime, Duration, Utc};
use serde_json::{Value, json};
use wearsync::app::{App, Role};
use wearsync::clock::Clock;
use wearsync::config::Config;
use wearsync::model::RunState;
use wearsync::simulator::Options;
use wearsync::storage::NewUser;
use wearsync::sync;

use crate::both;
use crate::support::{Place, SECRET_KEY, Shape, World, tree};

both! {
    examples_of_the_convention => examples;
    every_file_is_valid => schemas;
    deleted_files_come_back_identical => projection;
    a_second_user_gets_a_level => second_user;
    flat_leaves_the_provider_out => flat;
    git_sees_nothing_of_a_second_sync_and_nothing_of_the_state => git;
    touch_always_writes_the_time => touch;
    a_blocked_folder_is_told_and_caught_up => blocked;
    rebuild_keeps_the_first_instants => rebuilt;
    files_of_what_was_connected_before_come_back => replaced;
}

fn at(text: &str) -> DateTime<Utc> {
    text.parse().expect("an instant")
}

/// A world that stands on 2026-02-05 in the afternoon.
async fn world(shape: Shape, activities: u32, settings: &[(&str, &str)]) -> World {
    let now = at("2026-02-05T14:22:15Z");
    let options = Options { epoch: Some(now), activities, stream_points: 30, athletes: 2, ..Options::default() };
    World::with(shape, options, Clock::mock(now), settings).await
}

async fn synced(world: &World) {
    let run = world.sync().await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
}

async fn upload(world: &World, id: u64, start: &str, name: &str, sport: &str, distance: f64) {
    let activity = json!({"id": id, "start": start, "name": name, "sport_type": sport, "distance": distance,
        "moving_time": 1800, "elapsed_time": 1800, "manual": false, "private": false});
    world.control("upload", activity).await;
}

fn read(world: &World, path: &str) -> Value {
    let bytes = std::fs::read(world.place.export_dir().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    assert!(bytes.ends_with(b"}\n"), "{path} has no newline at its end");
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn names(world: &World) -> Vec<String> {
    tree(&world.place.export_dir()).keys().map(|path| path.display().to_string()).collect()
}

/// Members in the order of the file.
fn members(world: &World, path: &str) -> Vec<String> {
    let text = std::fs::read_to_string(world.place.export_dir().join(path)).expect("reads");
    // Members of the file itself are the ones indented by two.
    text.lines()
        .filter_map(|line| line.strip_prefix("  \"")?.split_once("\":").map(|(name, _)| name.to_owned()))
        .collect()
}

async fn examples(shape: Shape) {
    let world = world(shape, 0, &[]).await;
    upload(&world, 123_456, "2026-02-05T08:30:00Z", "Morning Run", "Run", 5012.3).await;
    synced(&world).await;
    let path = "strava/activities/2026-02-05-morning-run-123456.json";
    let file = read(&world, path);
    assert_eq!(file["id"], json!(123_456));
    assert_eq!(file["timestamp"], json!("2026-02-05T08:30:00Z"));
    assert_eq!(file["type"], json!("run"));
    assert_eq!(file["raw"]["name"], json!("Morning Run"));
    assert_eq!(file["synced_at"], json!("2026-02-05T14:22:15Z"));
    assert_eq!((&file["revision"], &file["format"]), (&json!(1), &json!(1)));
    assert_eq!(file["distance_m"], json!(5012.3));
    let pace = file["calculated"]["pace_s_per_km"].as_f64().expect("a pace");
    assert!((pace - 1800.0 / 5.0123).abs() < 0.1, "{pace}");
    let members = members(&world, path);
    let told: Vec<&str> = members.iter().map(String::as_str).collect();
    assert_eq!(&told[..5], ["id", "timestamp", "local_time", "type", "workout_type"]);
    assert_eq!(&told[told.len() - 5..], ["raw", "calculated", "synced_at", "revision", "format"]);
    assert_eq!(told.iter().filter(|name| **name == "raw").count(), 1);
    // Later ones: the file of the first is left alone.
    let before = std::fs::read(world.place.export_dir().join(path)).expect("reads");
    world.clock.set(at("2026-02-06T14:22:15Z"));
    upload(&world, 123_457, "2026-02-05T17:30:00Z", "Evening Ride", "Ride", 30_000.0).await;
    upload(&world, 123_458, "2026-02-06T11:10:00Z", "Lunch Walk", "Walk", 3000.0).await;
    synced(&world).await;
    let activities: Vec<String> = names(&world).into_iter().filter(|name| name.contains("/activities/")).collect();
    let expected = ["2026-02-05-evening-ride-123457", "2026-02-05-morning-run-123456", "2026-02-06-lunch-walk-123458"];
    assert_eq!(activities, expected.map(|stem| format!("strava/activities/{stem}.json")));
    assert_eq!(before, std::fs::read(world.place.export_dir().join(path)).expect("reads"));
    let streams = read(&world, "strava/streams/2026-02-05-streams-123456.json");
    assert_eq!(streams["id"], json!(123_456));
    assert_eq!(
        read(&world, "strava/summary.json"),
        json!({
            "total_activities": 3,
            "total_distance_km": 38.0,
            "date_range": {"first": "2026-02-05", "last": "2026-02-06"},
            "by_type": {"run": 1, "ride": 1, "walk": 1},
            "last_sync": "2026-02-06T14:22:15Z"
        })
    );
    let last = read(&world, "strava/last_sync.json");
    assert_eq!(last["timestamp"], json!(at("2026-02-06T14:22:15Z").timestamp()));
    assert_eq!(last["synced_at"], json!("2026-02-06T14:22:15Z"));
    assert_eq!(last["streams"]["activities"]["windows"].as_array().map(Vec::len), Some(1));
}

/// A world with edits, a deletion and all parts: the ids of the edited and the deleted activity.
async fn eventful(shape: Shape) -> (World, u64, u64) {
    let parts = [("WEARSYNC_PROVIDERS__STRAVA__PARTS", "streams,detail,zones")];
    let world = world(shape, 40, &parts).await;
    upload(&world, 501, "2026-02-04T08:00:00Z", "Intervals", "Run", 8000.0).await;
    upload(&world, 502, "2026-02-04T18:00:00Z", "Spin", "Ride", 20_000.0).await;
    synced(&world).await;
    world.clock.set(at("2026-02-05T20:00:00Z"));
    world.control("edit", json!({"id": 501, "name": "Hill Intervals", "distance": 8100.0})).await;
    world.control("delete", json!({"id": 502})).await;
    synced(&world).await;
    (world, 501, 502)
}

async fn schemas(shape: Shape) {
    let (world, ..) = eventful(shape).await;
    let schema = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("docs/schemas/{name}.schema.json"));
        let schema: Value = serde_json::from_slice(&std::fs::read(path).expect("a schema")).expect("JSON");
        jsonschema::validator_for(&schema).expect("a schema")
    };
    let kinds = ["activity", "deleted", "entity", "summary", "last_sync"];
    let validators: BTreeMap<&str, _> = kinds.into_iter().map(|name| (name, schema(name))).collect();
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for name in names(&world) {
        let kind = match name.as_str() {
            "strava/summary.json" => "summary",
            "strava/last_sync.json" => "last_sync",
            name if name.ends_with(".deleted.json") => "deleted",
            name if name.starts_with("strava/activities/") => "activity",
            _ => "entity",
        };
        let file = read(&world, &name);
        let errors: Vec<String> =
            validators[kind].iter_errors(&file).map(|e| format!("{}: {e}", e.instance_path())).collect();
        assert!(errors.is_empty(), "{name}: {errors:?}");
        *seen.entry(kind).or_default() += 1;
    }
    assert_eq!(seen.len(), kinds.len(), "{seen:?}");
}

/// Deletes all files, marks everything and writes again: the tree.
async fn written_anew(world: &World) -> BTreeMap<PathBuf, Vec<u8>> {
    for entry in std::fs::read_dir(world.place.export_dir()).expect("reads") {
        std::fs::remove_dir_all(entry.expect("reads").path()).expect("removes");
    }
    world.engine.db.mark_all_exports(world.connection).await.expect("marks");
    sync::drain(&world.engine, world.connection).await.expect("drains");
    tree(&world.place.export_dir())
}

async fn projection(shape: Shape) {
    let (world, edited, deleted) = eventful(shape).await;
    let before = tree(&world.place.export_dir());
    let all = names(&world);
    let has = |end: String| all.iter().any(|name| name.ends_with(&end));
    // The name stays, the content gets a revision of its own; a deleted one keeps its files and gets a marker.
    assert!(has(format!("activities/2026-02-04-intervals-{edited}.json")), "{all:?}");
    assert!(has(format!("activities/2026-02-04-intervals-{edited}.r2.json")), "{all:?}");
    assert!(has(format!("activities/2026-02-04-spin-{deleted}.json")), "{all:?}");
    assert!(has(format!("activities/2026-02-04-spin-{deleted}.deleted.json")), "{all:?}");
    assert!(has(format!("streams/2026-02-04-streams-{deleted}.json")), "{all:?}");
    assert!(!all.iter().any(|name| name.contains("presence")), "{all:?}");
    for collection in ["streams", "details", "zones", "gear"] {
        assert!(all.iter().any(|name| name.starts_with(&format!("strava/{collection}/"))), "no {collection}: {all:?}");
    }
    // Another day: nothing of it may show in what is written again.
    world.clock.set(at("2026-02-09T00:00:00Z"));
    let after = written_anew(&world).await;
    for (path, bytes) in &before {
        let now = after.get(path).unwrap_or_else(|| panic!("{} did not come back", path.display()));
        let text = String::from_utf8_lossy;
        assert_eq!(text(bytes), text(now), "{}", path.display());
    }
    assert_eq!(before.len(), after.len());
}

async fn second_user(shape: Shape) {
    let world = world(shape, 5, &[]).await;
    let new = NewUser { external_user_id: Some("Ann/1".to_owned()), ..NewUser::default() };
    let user = world.engine.db.insert_user(new, world.clock.now()).await.expect("a user").id;
    let second = world.connect(user, 1).await;
    let setup = world.engine.provider("strava").expect("strava");
    let (class, source) = (wearsync::model::Class::Interactive, wearsync::model::RunSource::Pull);
    let accepted = sync::submit(&world.engine, setup, second, &Default::default(), class, source, None).await;
    let run = world.finish(accepted.expect("accepts").expect("active").id).await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    synced(&world).await;
    let (mine, hers) = (format!("{}/strava/", world.user), format!("Ann%2F1-{user}/strava/"));
    let all = names(&world);
    for folder in [&mine, &hers] {
        for name in ["summary.json", "athlete.json", "activities/", "streams/"] {
            assert!(all.iter().any(|path| path.starts_with(&format!("{folder}{name}"))), "{folder}{name}: {all:?}");
        }
    }
    assert!(all.iter().all(|path| path.starts_with(&mine) || path.starts_with(&hers)), "{all:?}");
}

async fn flat(shape: Shape) {
    let world = world(shape, 5, &[("WEARSYNC_EXPORT_FLAT", "true")]).await;
    upload(&world, 123_456, "2026-02-05T08:30:00Z", "Morning Run", "Run", 5012.3).await;
    synced(&world).await;
    let all = names(&world);
    for name in ["activities/2026-02-05-morning-run-123456.json", "summary.json", "last_sync.json", "athlete.json"] {
        assert!(all.iter().any(|path| path == name), "{name}: {all:?}");
    }
    assert!(!all.iter().any(|path| path.contains("strava")), "{all:?}");
}

/// What git says, in a folder, of nobody's settings.
fn run_git(folder: &Path, arguments: &[&str]) -> String {
    let out = Command::new("git")
        .args(["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"])
        .args(arguments)
        .current_dir(folder)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_SYSTEM", "/dev/null")
        .output()
        .expect("git is installed");
    assert!(out.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("text")
}

async fn git(shape: Shape) {
    let world = world(shape, 10, &[]).await;
    synced(&world).await;
    // From above: nothing that is secret, or changes while nothing happens.
    let above = world.place.dir.path();
    run_git(above, &["init", "-q"]);
    run_git(above, &["add", "-A"]);
    let staged = run_git(above, &["ls-files"]);
    assert!(staged.lines().any(|name| name.starts_with("data/exports/strava/")), "{staged}");
    assert!(staged.lines().all(|name| name.starts_with("data/exports/")), "{staged}");
    // In the folder itself.
    let exports = world.place.export_dir();
    run_git(&exports, &["init", "-q"]);
    run_git(&exports, &["add", "-A"]);
    run_git(&exports, &["commit", "-qm", "data: sync"]);
    world.clock.set(world.clock.now() + Duration::hours(6));
    synced(&world).await;
    assert_eq!(run_git(&exports, &["status", "--porcelain"]), "");
    // One new activity is new files, and the two that tell of the whole.
    world.clock.set(world.clock.now() + Duration::hours(6));
    upload(&world, 123_456, "2026-02-05T18:30:00Z", "Evening Run", "Run", 5012.3).await;
    synced(&world).await;
    run_git(&exports, &["add", "-A"]);
    let changed = run_git(&exports, &["diff", "--staged", "--name-status"]);
    let modified: Vec<&str> = changed.lines().filter_map(|line| line.strip_prefix("M\t")).collect();
    assert_eq!(modified, ["strava/last_sync.json", "strava/summary.json"], "{changed}");
    assert!(changed.contains("A\tstrava/activities/2026-02-05-evening-run-123456.json"), "{changed}");
}

/// A key given by a setting, on SQLite: the database is in the state folder all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_database_is_never_staged_whoever_gives_the_key() {
    let place = Place::new(Shape::Sqlite).await;
    let mut env = place.env("http://127.0.0.1:9");
    env.insert("WEARSYNC_SECRET_KEY".to_owned(), SECRET_KEY.to_owned());
    let config = Config::load(None, env).expect("settings");
    let app = App::open_with(config, Role::Command, Clock::system()).await.expect("opens");
    assert!(app.works() && place.data_dir().join("state/wearsync.db").exists());
    run_git(place.dir.path(), &["init", "-q"]);
    run_git(place.dir.path(), &["add", "-A"]);
    assert_eq!(run_git(place.dir.path(), &["ls-files"]), "");
}

async fn touch(shape: Shape) {
    let world = world(shape, 3, &[("WEARSYNC_EXPORT_TOUCH", "always")]).await;
    synced(&world).await;
    let before = tree(&world.place.export_dir());
    world.clock.set(at("2026-02-05T20:00:00Z"));
    synced(&world).await;
    let after = tree(&world.place.export_dir());
    let changed: Vec<String> = after
        .iter()
        .filter(|(path, bytes)| before.get(*path) != Some(*bytes))
        .map(|(path, _)| path.display().to_string())
        .collect();
    assert_eq!(changed, ["strava/last_sync.json", "strava/summary.json"]);
    assert_eq!(read(&world, "strava/summary.json")["last_sync"], json!("2026-02-05T20:00:00Z"));
    assert_eq!(read(&world, "strava/last_sync.json")["synced_at"], json!("2026-02-05T20:00:00Z"));
}

async fn blocked(shape: Shape) {
    let world = world(shape, 5, &[]).await;
    // A file where a folder has to be: the one obstacle that stops every user of the machine.
    let obstacle = world.place.export_dir().join("strava");
    std::fs::write(&obstacle, "not ours").expect("writes");
    let run = world.sync().await;
    assert_eq!(run.run_state(), RunState::Failed, "{run:?}");
    let reason = run.reason.expect("a reason");
    assert!(reason.contains("cannot create folder") && reason.contains("move it away"), "{reason}");
    assert!(reason.contains(&obstacle.display().to_string()), "{reason}");
    assert_eq!(std::fs::read(&obstacle).expect("reads"), b"not ours");
    std::fs::remove_file(&obstacle).expect("removes");
    synced(&world).await;
    world.check().await;
    let all = names(&world);
    assert_eq!(all.iter().filter(|name| name.starts_with("strava/activities/")).count(), 5, "{all:?}");
    assert!(all.iter().any(|name| name == "strava/summary.json"), "{all:?}");
}

async fn rebuilt(shape: Shape) {
    let (world, edited, _) = eventful(shape).await;
    let before = tree(&world.place.export_dir());
    world.clock.set(at("2026-02-09T00:00:00Z"));
    let rebuilt = sync::rebuild(&world.engine, world.connection).await.expect("rebuilds");
    assert!(rebuilt.records > 0 && rebuilt.changed == 0, "{rebuilt:?}");
    assert_eq!(before, tree(&world.place.export_dir()));
    written_anew(&world).await;
    let synced_at = |suffix: &str| {
        read(&world, &format!("strava/activities/2026-02-04-intervals-{edited}{suffix}"))["synced_at"].clone()
    };
    assert_eq!(synced_at(".json"), json!("2026-02-05T14:22:15Z"));
    assert_eq!(synced_at(".r2.json"), json!("2026-02-05T20:00:00Z"));
}

async fn replaced(shape: Shape) {
    let mut world = world(shape, 4, &[]).await;
    synced(&world).await;
    let old = world.connection;
    world.connection = world.connect(world.user, 1).await;
    // Whose token it is shows when it is used: the account gets a connection of its own.
    assert_eq!(world.sync().await.run_state(), RunState::Failed);
    world.connection = world.engine.db.list_connections(Some(world.user)).await.expect("lists").remove(0).connection.id;
    assert_ne!(world.connection, old);
    synced(&world).await;
    let before = tree(&world.place.export_dir());
    assert_eq!(before.keys().filter(|path| path.starts_with("strava/activities")).count(), 8);
    for entry in std::fs::read_dir(world.place.export_dir()).expect("reads") {
        std::fs::remove_dir_all(entry.expect("reads").path()).expect("removes");
    }
    let ended: Vec<_> = world.engine.db.list_replaced(Some(world.user)).await.expect("lists");
    assert_eq!(ended.iter().map(|connection| connection.id).collect::<Vec<_>>(), [old]);
    let again = async |connection| {
        world.engine.db.mark_all_exports(connection).await.expect("marks");
        sync::drain(&world.engine, connection).await.expect("drains");
        tree(&world.place.export_dir())
    };
    again(old).await;
    let after = again(world.connection).await;
    assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
    let differ: Vec<_> = after.iter().filter(|(path, bytes)| before[*path] != **bytes).map(|(path, _)| path).collect();
    assert!(differ.is_empty(), "{differ:?}");
    // What there is one of stays that of the connection that is there now.
    let after = again(old).await;
    for name in ["strava/athlete.json", "strava/summary.json", "strava/last_sync.json"] {
        assert_eq!(after[Path::new(name)], before[Path::new(name)], "{name}");
    }
}
