//! The three properties that everything stands on, under seeded chance. A failing case prints its seed;
//! `WEARSYNC_TEST_SEED=…` runs that one alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};
use wearsync::model::{BEGINNING_MS, RunId, RunState, SyncRequest, UserId};
use wearsync::providers::simulation::Rng;
use wearsync::simulator::Options;
use wearsync::storage::NewUser;
use wearsync::sync::{self, Engine, Executed};

use crate::both;
use crate::oracle::{
    Dump, TABLES, another, assert_same, dump, execute, faults, finish, forward, ledger, rows, sync_with, t0, tens,
    tiny, world,
};
use crate::support::{Shape, World};

both! {
    interleavings_equal_a_serial_order => interleavings;
    nothing_is_written_after_a_disconnect => disconnects;
    rebuild_changes_no_row => rebuilds;
    what_is_covered_is_complete => coverage;
}

/// Seeds of the cases; fewer where each costs a database of its own.
fn seeds(cases: u64) -> Vec<u64> {
    match std::env::var("WEARSYNC_TEST_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        None => (1..=cases).collect(),
    }
}

// -- (i) -------------------------------------------------------------------------------------------------------------

/// Columns that tell when, by whom and how often something was tried: no part of what is known.
const WHEN: &[&str] = &[
    "created_at",
    "updated_at",
    "stored_at",
    "fetched_at",
    "due_at",
    "verified_at",
    "last_success_at",
    "started_at",
    "ended_at",
    "superseded_at",
    "lease_until",
    "owner",
    "epoch",
    "page_seq",
    "crashes",
    "attempts",
    "committed",
    "progress",
    "report",
    "request_key",
    "refresh_token",
    "refresh_until",
    "renew_at",
    "token_version",
    "reason",
    "last_synced_at",
    "hi",
    "waiting_on",
    "class",
];

/// Dumps of two worlds speak of the same things under different ids: ids become what they stand for.
fn normalised(dump: &Dump) -> BTreeMap<String, Vec<String>> {
    let text = |row: &Map<String, Value>, name: &str| row.get(name).map(Value::to_string).unwrap_or_default();
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    for row in &dump["users"] {
        names.insert(text(row, "id"), format!("user {}", text(row, "external_user_id")));
    }
    for row in &dump["connections"] {
        let user = names.get(&text(row, "user_id")).cloned().unwrap_or_default();
        names.insert(text(row, "id"), format!("connection of {user}"));
        names.insert(text(row, "account_id"), format!("account of {user}"));
    }
    for row in &dump["data_sources"] {
        names.insert(format!("source {}", text(row, "id")), format!("{} {}", text(row, "device"), text(row, "writer")));
    }
    for row in &dump["records"] {
        names.insert(text(row, "id"), format!("record {} {}", text(row, "kind"), text(row, "external_id")));
    }
    let mut out = BTreeMap::new();
    for (table, rows) in dump {
        if matches!(table.as_str(), "quota_windows" | "idempotency") {
            continue;
        }
        let mut lines: Vec<String> = rows
            .iter()
            .map(|row| {
                let fields = row.iter().filter(|(name, _)| !WHEN.contains(&name.as_str()));
                let fields = fields.map(|(name, value)| {
                    let value = value.to_string();
                    let known = match name.as_str() {
                        "data_source_id" => names.get(&format!("source {value}")),
                        _ => names.get(&value),
                    };
                    let own = name == "id" && known.is_none()
                        || name == "provider_user_id"
                        || table == "data_sources" && name == "id";
                    format!("{name}={}", if own { "*" } else { known.unwrap_or(&value) })
                });
                fields.collect::<Vec<_>>().join(" ")
            })
            .collect();
        lines.sort();
        out.insert(table.clone(), lines);
    }
    out
}

fn assert_equal(what: &str, left: &BTreeMap<String, Vec<String>>, right: &BTreeMap<String, Vec<String>>) {
    for (table, lines) in left {
        let other = &right[table];
        let only = |a: &[String], b: &[String]| -> Vec<String> {
            a.iter().filter(|line| !b.contains(line)).take(3).map(|line| line.chars().take(600).collect()).collect()
        };
        assert!(lines == other, "{what}: {table}: {:#?} against {:#?}", only(lines, other), only(other, lines));
    }
}

/// Two people with their runs. Nothing volatile: what is received must not depend on how often it was asked for.
async fn two_people(shape: Shape, seed: u64) -> (World, UserId) {
    let options = Options { athletes: 2, volatile: false, seed, ..tiny(14) };
    let world = world(shape, options, &[]).await;
    let named = NewUser { external_user_id: Some("first".to_owned()), ..NewUser::default() };
    world.engine.db.update_user(world.user, named).await.unwrap();
    let named = NewUser { external_user_id: Some("second".to_owned()), ..NewUser::default() };
    let second = world.engine.db.insert_user(named, t0()).await.unwrap().id;
    (world, second)
}

fn five() -> SyncRequest {
    SyncRequest { limit: Some(5), ..SyncRequest::default() }
}

fn everything() -> SyncRequest {
    SyncRequest { since_ms: Some(BEGINNING_MS), limit: Some(7), ..SyncRequest::default() }
}

async fn submit(
    world: &World,
    engine: &Engine,
    connection: wearsync::model::ConnectionId,
    request: &SyncRequest,
) -> RunId {
    let setup = world.engine.provider("strava").unwrap();
    let class = wearsync::model::Class::Webhook;
    let accepted = sync::submit(engine, setup, connection, request, class, wearsync::model::RunSource::Webhook, None);
    accepted.await.unwrap().expect("is active").id
}

fn spawn(engine: &Arc<Engine>, id: RunId) -> tokio::task::JoinHandle<Executed> {
    let engine = engine.clone();
    tokio::spawn(async move { sync::execute(&engine, id).await.expect("executes") })
}

/// Waits until the one slow answer is on its way, or the work is over.
async fn until_slow(world: &World, work: &tokio::task::JoinHandle<Executed>) {
    while ledger(world).await["faults"]["slow"].is_null() && !work.is_finished() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Two workers, the first of which is held up somewhere until its lease is over and the second has the run; a second
/// person's run beside it; another run of the same connection. The rows are those of one worker doing it in order.
async fn interleavings(shape: Shape) {
    for seed in seeds(6) {
        let mut rng = Rng::of(&[seed, 0x1]);
        let endpoint = ["list", "streams", "athlete", "gear", "token"][rng.below(5) as usize];
        let nth = 1 + rng.below(if endpoint == "streams" { 8 } else { 2 });
        let expire = rng.chance(0.7);
        println!("seed {seed}: {endpoint} {nth} expire {expire}");

        // In order.
        let (serial, second) = two_people(shape, seed).await;
        let other = serial.connect(second, 1).await;
        for (connection, request) in [(serial.connection, five()), (other, five()), (serial.connection, everything())] {
            let id = submit(&serial, &serial.engine, connection, &request).await;
            assert_eq!(finish(&serial.engine, id).await.run_state(), RunState::Success, "seed {seed}");
        }
        let wanted = normalised(&dump(&serial.engine.db, &TABLES).await);
        drop(serial);

        // Across each other.
        let (world, second) = two_people(shape, seed).await;
        let other = world.connect(second, 1).await;
        let (a, b) = (world.engine.clone(), another(&world, &[]).await);
        faults(&world, &[&format!("slow@{endpoint}=1/{nth}:250*1")]).await;
        let one = submit(&world, &a, world.connection, &five()).await;
        let paused = spawn(&a, one);
        until_slow(&world, &paused).await;
        if expire {
            // The lease (of the run, and of a refresh) is over while its holder sleeps; the other worker takes it.
            forward(&world.clock, world.clock.now() + chrono::Duration::seconds(31));
        }
        let two = submit(&world, &b, other, &five()).await;
        let three = submit(&world, &b, world.connection, &everything()).await;
        let beside = [spawn(&b, one), spawn(&b, two), spawn(&b, three)];
        for work in beside {
            work.await.unwrap();
        }
        paused.await.unwrap();
        for id in [one, two, three] {
            let run = finish(&b, id).await;
            assert_eq!(run.run_state(), RunState::Success, "seed {seed}: {run:?}");
        }
        assert_equal(&format!("seed {seed}"), &wanted, &normalised(&dump(&world.engine.db, &TABLES).await));
    }
}

/// A disconnect, or an erasure, in mid page: what is stored when it is answered is what is stored at the end.
async fn disconnects(shape: Shape) {
    for seed in seeds(6) {
        let mut rng = Rng::of(&[seed, 0x2]);
        let endpoint = ["list", "streams", "athlete", "gear", "token"][rng.below(5) as usize];
        let nth = 1 + rng.below(if endpoint == "streams" { 8 } else { 2 });
        let what = ["disconnect", "connect again", "erase"][rng.below(3) as usize];
        println!("seed {seed}: {what} at {endpoint} {nth}");
        let (world, _) = two_people(shape, seed).await;
        let db = &world.engine.db;
        faults(&world, &[&format!("slow@{endpoint}=1/{nth}:120*1")]).await;
        let id = submit(&world, &world.engine, world.connection, &five()).await;
        let work = spawn(&world.engine, id);
        until_slow(&world, &work).await;
        match what {
            "erase" => {
                db.delete_user(world.user, &[], t0()).await.unwrap();
            }
            "connect again" => connect_again(&world).await,
            _ => {
                db.disconnect(world.user, "strava", world.clock.now()).await.unwrap();
            }
        }
        let tables =
            ["users", "connections", "windows", "data_sources", "records", "workouts", "parts", "sample_chunks"];
        let after = dump(db, &tables).await;
        work.await.unwrap();
        // Files may be written of what was there; rows of it may not, but for the marks that say so.
        let strip = |mut dump: Dump| {
            for row in dump.values_mut().flatten() {
                row.remove("export_due");
            }
            dump
        };
        assert_same(&format!("seed {seed}"), &strip(after), &strip(dump(db, &tables).await));
        if what == "erase" {
            continue;
        }
        // The slot is free once the lease is over, and a new connection reads everything.
        forward(&world.clock, world.clock.now() + chrono::Duration::seconds(60));
        execute(&world.engine, id).await;
        if what == "disconnect" {
            let run = world.run(id).await;
            assert!(run.run_state().is_final(), "seed {seed}: {run:?}");
            connect_again(&world).await;
        }
        let id = submit(&world, &world.engine, world.connection, &everything()).await;
        assert_eq!(finish(&world.engine, id).await.run_state(), RunState::Success, "seed {seed}");
        assert_eq!(stored(&world).await.len(), 14, "seed {seed}");
        let left = "select count(*) from parts where state not in ('stored', 'none') or export_due";
        assert_eq!(crate::oracle::number(db, left).await, 0, "seed {seed}");
    }
}

/// The same person agrees once more.
async fn connect_again(world: &World) {
    let list = world.engine.db.list_connections(Some(world.user)).await.unwrap();
    let grant = world.control("grant", json!({ "athlete": 0 })).await;
    let token = sync::secret(grant["refresh_token"].as_str().unwrap());
    let setup = world.engine.provider("strava").unwrap();
    let person = Some(list[0].provider_user_id.as_str());
    let same = sync::connect_with_grant(&world.engine, setup, world.user, &token, person, None).await.unwrap();
    assert_eq!(same, world.connection);
}

// -- (ii) ------------------------------------------------------------------------------------------------------------

async fn rebuilds(shape: Shape) {
    for seed in seeds(3) {
        println!("seed {seed}");
        let world = world(shape, Options { seed, very_long: seed == 2, ..tiny(25) }, &[]).await;
        sync_with(&world, &tens()).await;
        unchanged_by_rebuild(&world, seed).await;
        // After edits of every sort, a delete and an upload.
        let ids = live(&world).await;
        let mut rng = Rng::of(&[seed, 0x3]);
        for (id, fields) in ids.iter().zip([
            json!({"name": "another"}),
            json!({"elapsed_time": 999, "moving_time": 900, "distance": 5000.5}),
            json!({"sport_type": "Sauna"}),
            json!({"start": (t0() - chrono::Duration::hours(30)).to_rfc3339()}),
        ]) {
            let mut edit = fields;
            edit["athlete"] = json!(0);
            edit["id"] = json!(id);
            world.control("edit", edit).await;
        }
        world.control("delete", json!({"athlete": 0, "id": ids[5 + rng.below(10) as usize]})).await;
        world.control("upload", json!({"athlete": 0})).await;
        forward(&world.clock, world.clock.now() + chrono::Duration::minutes(9));
        sync_with(&world, &everything()).await;
        world.check().await;
        unchanged_by_rebuild(&world, seed).await;
    }
}

async fn unchanged_by_rebuild(world: &World, seed: u64) {
    let tables: Vec<&str> = TABLES.iter().copied().filter(|table| *table != "runs").collect();
    let strip = |mut dump: Dump| {
        for row in dump.get_mut("connections").into_iter().flatten() {
            // The rebuild is a run, and its success is one.
            row.remove("last_success_at");
        }
        dump
    };
    let before = strip(dump(&world.engine.db, &tables).await);
    let files = crate::support::tree(&world.place.export_dir());
    let rebuilt = sync::rebuild(&world.engine, world.connection).await.unwrap();
    assert!(rebuilt.records > 0 && rebuilt.changed == 0, "seed {seed}: {rebuilt:?}");
    assert_same(&format!("rebuild, seed {seed}"), &before, &strip(dump(&world.engine.db, &tables).await));
    assert_eq!(files, crate::support::tree(&world.place.export_dir()), "seed {seed}");
}

async fn live(world: &World) -> Vec<u64> {
    let truth = world.ask("truth?athlete=0").await;
    let rows = truth["activities"].as_array().unwrap();
    rows.iter().filter(|row| row["deleted_at_ms"].is_null()).map(|row| row["id"].as_u64().unwrap()).collect()
}

// -- (iii) -----------------------------------------------------------------------------------------------------------

/// Uploads, faults and stops by chance. After every step: an id whose place is covered, and that was listable before
/// the last good listing call over that place, is stored.
async fn coverage(shape: Shape) {
    for seed in seeds(5) {
        println!("seed {seed}");
        let mut rng = Rng::of(&[seed, 0x4]);
        let options = Options { seed, short_pages: rng.chance(0.5), private_share: 0.0, ..tiny(30) };
        let world = world(shape, options, &[]).await;
        let mut engine = world.engine.clone();
        for step in 0..8 {
            for _ in 0..rng.below(3) {
                let back = [0, 3600, 86_400, 5 * 86_400, 20 * 86_400][rng.below(5) as usize];
                let start = world.clock.now().timestamp() - back - rng.below(900) as i64;
                world
                    .control(
                        "upload",
                        json!({"athlete": 0, "start": start, "count": 1 + rng.below(3), "spacing_seconds": 0}),
                    )
                    .await;
            }
            let fault = [
                "429@list=1/2*2",
                "500@list=1/2*3",
                "cut@list=1/2*1",
                "broken-json@list=1/3*1",
                "503@streams=1/3*2",
                "429@streams=1/5*2",
                "slow=1/1:4",
                "404@streams=1/9*1",
            ][rng.below(8) as usize];
            faults(&world, &[fault]).await;
            forward(&world.clock, world.clock.now() + chrono::Duration::seconds(1 + rng.below(7200) as i64));
            let request = match rng.below(5) {
                0 => everything(),
                1 => SyncRequest {
                    since_ms: Some(world.clock.now_ms() - 12 * 86_400_000),
                    until_ms: Some(world.clock.now_ms() - 86_400_000),
                    ..SyncRequest::default()
                },
                _ => SyncRequest { limit: Some(3 + rng.below(9) as u32), ..SyncRequest::default() },
            };
            let setup = engine.provider("strava").unwrap();
            let class = wearsync::model::Class::Interactive;
            let source = wearsync::model::RunSource::Pull;
            let id = sync::submit(&engine, setup, world.connection, &request, class, source, None)
                .await
                .unwrap()
                .unwrap()
                .id;
            let stops = rng.chance(0.5);
            let after = Duration::from_millis(rng.below(60));
            let stop = engine.stop.clone();
            let work = tokio::spawn({
                let engine = engine.clone();
                async move { execute(&engine, id).await }
            });
            if stops {
                tokio::time::sleep(after).await;
                world.control("upload", json!({"athlete": 0, "start": world.clock.now().timestamp() - 7200})).await;
                stop.cancel();
            }
            work.await.unwrap();
            holds(&world, &format!("seed {seed} step {step} ({fault})")).await;
            if stops {
                engine = another(&world, &[]).await;
            }
        }
        // Whatever was left open is read in the end, and then everything that can be listed is there.
        faults(&world, &[]).await;
        forward(&world.clock, world.clock.now() + chrono::Duration::hours(2));
        drain(&engine, world.connection).await;
        let setup = engine.provider("strava").unwrap();
        let (class, source) = (wearsync::model::Class::Interactive, wearsync::model::RunSource::Pull);
        let id = sync::submit(&engine, setup, world.connection, &everything(), class, source, None)
            .await
            .unwrap()
            .unwrap()
            .id;
        assert_eq!(finish(&engine, id).await.run_state(), RunState::Success, "seed {seed}");
        holds(&world, &format!("seed {seed} at the end")).await;
        let gaps = engine.db.list_windows(world.connection).await.unwrap();
        let open: Vec<_> = gaps.iter().filter(|row| row.state != "done").collect();
        assert!(open.is_empty(), "seed {seed}: left open: {open:?}");
        assert_eq!(gaps.len(), 1, "seed {seed}: one range is covered: {gaps:?}");
        assert_eq!(stored(&world).await.len(), live(&world).await.len(), "seed {seed}");
    }
}

/// Executes what is ready, in the order in which workers are told of it, until nothing is left.
async fn drain(engine: &Arc<Engine>, connection: wearsync::model::ConnectionId) {
    for _ in 0..400 {
        match engine.db.list_ready(engine.clock.now(), 1).await.unwrap().first() {
            Some((id, ..)) => drop(execute(engine, *id).await),
            None => match engine.db.find_next_run(connection).await.unwrap() {
                Some((_, _, due)) => forward(&engine.clock, due + chrono::Duration::milliseconds(1)),
                None => return,
            },
        }
    }
    panic!("the runs do not end");
}

async fn stored(world: &World) -> BTreeSet<String> {
    let sql = "select external_id from records where kind = 'workout' and deleted_at is null".to_owned();
    rows(&world.engine.db, sql).await.into_iter().collect()
}

async fn holds(world: &World, what: &str) {
    let truth = world.ask("truth?athlete=0").await;
    let lists = ledger(world).await["lists"].clone();
    let lists: Vec<&Value> = lists.as_array().unwrap().iter().filter(|list| list["whole"] == true).collect();
    let covers = world.engine.db.list_windows(world.connection).await.unwrap();
    let stored = stored(world).await;
    for row in truth["activities"].as_array().unwrap() {
        let (id, start) = (row["id"].to_string(), row["start_ms"].as_i64().unwrap());
        let covered = covers
            .iter()
            .any(|cover| cover.purpose == "cover" && cover.state == "done" && cover.lo <= start && start < cover.hi);
        if !covered || !row["deleted_at_ms"].is_null() || stored.contains(&id) {
            continue;
        }
        // The first call over this place came before it could be listed: nobody could know. Had it been listable at
        // the last such call, it would have been answered.
        let last = lists.iter().filter(|list| {
            let before = list["before"].as_i64().unwrap_or(i64::MAX / 1000) * 1000;
            let after = list["after"].as_i64().map_or(i64::MIN, |after| (after + 1) * 1000);
            after <= start && start < before
        });
        let last = last.map(|list| list["at_ms"].as_i64().unwrap()).max();
        let listable = row["listable_at_ms"].as_i64().unwrap();
        assert!(
            last.is_none_or(|last| listable >= last),
            "{what}: {id} at {start} was listable at {listable}, its place was listed at {last:?} and is covered, \
             and it is not stored; windows {covers:?}"
        );
    }
}
