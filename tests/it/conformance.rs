//! What every provider has to do, shown on each of the registry against its simulator.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};
use wearsync::model::{RunState, SyncRequest};
use wearsync::providers::REGISTRY;
use wearsync::simulator::Options;
use wearsync::sync::Executed;

use crate::both;
use crate::oracle::{
    CONTENT, another, assert_same, calls, dump, execute, faults, finish, forward, ledger, number, sync_with, tens,
    tiny, whole_lists, world, youngest_write,
};
use crate::support::{Shape, World, tree, truth};

/// How a provider's simulator is driven.
struct Driver {
    provider: &'static str,
    /// The endpoint that lists its main stream, as faults name it.
    list: &'static str,
    /// The stream that this is.
    stream: &'static str,
    /// The endpoint of the part that is fetched for each record.
    part: &'static str,
    /// The endpoint that tells whether a record still exists.
    single: &'static str,
    /// Calls that a sync makes besides, at its beginning.
    besides: u64,
    /// Scopes that show everything but what only its owner may see; and those that show no record at all.
    public: &'static [&'static str],
    none: &'static [&'static str],
    /// What the refusal is to name.
    lacks: &'static str,
    /// Edits that leave a record's shape as it is, that change it, and that nobody cares for.
    edit: fn(u64) -> Value,
    reshape: fn(u64) -> Value,
    volatile: fn(u64) -> Value,
}

const DRIVERS: &[Driver] = &[Driver {
    provider: "strava",
    list: "list",
    stream: "activities",
    part: "streams",
    single: "detail",
    besides: 1,
    public: &["read", "activity:read"],
    none: &["read"],
    lacks: "activity:read",
    edit: |id| json!({ "athlete": 0, "id": id, "name": "A new name" }),
    reshape: |id| json!({ "athlete": 0, "id": id, "elapsed_time": 4321, "moving_time": 4000, "distance": 12_345.6 }),
    volatile: |id| json!({ "athlete": 0, "id": id, "kudos_count": 999, "comment_count": 77 }),
}];

#[test]
fn every_provider_is_in_the_suite() {
    let known: Vec<&str> = DRIVERS.iter().map(|driver| driver.provider).collect();
    let registered: Vec<&str> = REGISTRY.iter().map(|provider| provider.spec().name.0).collect();
    assert_eq!(known, registered, "a provider without a line in DRIVERS is not tested");
}

macro_rules! suite {
    ($($name:ident),* $(,)?) => {
        both! { $($name => all::$name;)* }
        mod all {
            use super::*;
            $(pub(super) async fn $name(shape: Shape) {
                for driver in DRIVERS {
                    super::$name(shape, driver).await;
                }
            })*
        }
    };
}

suite! {
    pages_to_the_end, empty_account, refused_token_is_refreshed_once, rotation, too_many_calls, server_errors,
    server_errors_that_stay, slow_answers, broken_answers, oversized_answers, goes_on_from_every_page,
    goes_on_from_every_refusal, rows_that_shift, second_sync_writes_nothing, volatile_values_write_nothing,
    late_arrivals, edits, deletes, private_records_without_scope, missing_scope, switched_off_application,
}

fn good(run: &wearsync::storage::Run) {
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
}

/// Ids of recorded (not manual) live records, newest first.
async fn newest(world: &World) -> Vec<u64> {
    let truth = truth(&crate::support::client(), &world.sim.url(), 0).await;
    let mut rows: Vec<_> = truth.iter().filter(|(_, t)| !t.manual && !t.deleted).collect();
    rows.sort_by_key(|(_, t)| std::cmp::Reverse(t.start));
    rows.iter().map(|(id, _)| id.parse().expect("a number")).collect()
}

fn has_file(world: &World, end: &str) -> bool {
    tree(&world.place.export_dir()).keys().any(|path| path.display().to_string().ends_with(end))
}

async fn pages_to_the_end(shape: Shape, driver: &Driver) {
    let world = world(shape, Options { short_pages: true, ..tiny(64) }, &[]).await;
    good(&sync_with(&world, &tens()).await);
    world.check().await;
    let ledger = ledger(&world).await;
    let lists = ledger["lists"].as_array().expect("lists");
    let rows: Vec<u64> = lists.iter().map(|list| list["rows"].as_u64().expect("rows")).collect();
    assert!(rows.len() > 6, "several pages: {rows:?}");
    assert!(rows[..rows.len() - 2].iter().any(|rows| *rows < 10), "a short page in the middle: {rows:?}");
    assert_eq!(rows.last(), Some(&0), "only an empty page is the end");
    // 64 rows in pages of 10, three of them short, one row repeated on each, and the proof of the end.
    assert!(rows.len() <= 14, "no page for nothing: {rows:?}");
    let streams = ledger["by_id"][driver.part].as_object().expect("streams");
    assert!(streams.values().all(|n| n == 1), "a part is fetched once: {streams:?}");
    let windows = world.engine.db.list_windows(world.connection).await.expect("reads");
    let windows: Vec<_> = windows.iter().filter(|window| window.stream == driver.stream).collect();
    assert_eq!(windows.len(), 1);
    assert_eq!((windows[0].state.as_str(), windows[0].lo), ("done", wearsync::model::BEGINNING_MS));
}

async fn empty_account(shape: Shape, driver: &Driver) {
    let world = world(shape, tiny(0), &[]).await;
    good(&sync_with(&world, &SyncRequest::default()).await);
    world.check().await;
    let ledger = ledger(&world).await;
    assert_eq!((calls(&ledger, driver.list), calls(&ledger, driver.part)), (1, 0));
    let done = "select count(*) from windows where state = 'done'";
    assert_eq!(number(&world.engine.db, done).await, 1, "nothing is known to be there, which is knowledge");
}

async fn refused_token_is_refreshed_once(shape: Shape, _: &Driver) {
    let world = world(shape, tiny(15), &[]).await;
    good(&sync_with(&world, &tens()).await);
    let before = ledger(&world).await["tokens"].clone();
    assert_eq!(before["refresh_attempts"], 1);
    world.control("revoke", json!({ "athlete": 0, "access_only": true })).await;
    good(&sync_with(&world, &tens()).await);
    let after = ledger(&world).await["tokens"].clone();
    assert_eq!((&after["refresh_attempts"], &after["dead_calls"]), (&json!(2), &json!(1)), "{after}");
    world.check().await;
}

async fn rotation(shape: Shape, _: &Driver) {
    let options = Options { rotate: true, expire_after_calls: Some(5), ..tiny(25) };
    let world = world(shape, options, &[]).await;
    good(&sync_with(&world, &tens()).await);
    world.check().await;
    let tokens = ledger(&world).await["tokens"].clone();
    assert_eq!(tokens["refresh_refused"], 0, "{tokens}");
    assert_eq!(tokens["refresh_attempts"], tokens["issued"], "each refresh brought a token: {tokens}");
    assert!(tokens["issued"].as_u64() > Some(3), "{tokens}");
}

/// 429, without a word on when to come back and with one: no attempt is used, the run is put back, and ends well.
async fn too_many_calls(shape: Shape, driver: &Driver) {
    let world = world(shape, tiny(35), &[]).await;
    let (list, part) = (driver.list, driver.part);
    faults(&world, &[&format!("429@{list}=1/2*2"), &format!("429@{part}=1/7*2")]).await;
    let id = world.accept(&tens()).await;
    let executed = execute(&world.engine, id).await;
    let run = world.run(id).await;
    assert!(matches!(executed, Executed::PutBack(due) if due > world.clock.now()), "{executed:?} {run:?}");
    assert_eq!((run.run_state(), run.attempts, run.crashes), (RunState::Waiting, 0, 0));
    assert!(run.reason.as_deref().is_some_and(|reason| reason.contains("quota")), "{run:?}");
    assert!(run.waiting_on.is_some());
    good(&finish(&world.engine, id).await);
    world.check().await;
    let told = ledger(&world).await;
    assert_eq!(told["faults"]["429"], 4, "{told}");

    // With `Retry-After`: not before that.
    world.control("upload", json!({ "athlete": 0 })).await;
    faults(&world, &[&format!("429@{list}=1/1:900*1")]).await;
    forward(&world.clock, world.clock.now() + chrono::Duration::seconds(60));
    let id = world.accept(&tens()).await;
    let at = world.clock.now();
    execute(&world.engine, id).await;
    let run = world.run(id).await;
    assert_eq!((run.run_state(), run.attempts), (RunState::Waiting, 0));
    assert!(run.due_at >= at + chrono::Duration::seconds(900), "due {} after {at}", run.due_at);
    good(&finish(&world.engine, id).await);
    world.check().await;
}

async fn server_errors(shape: Shape, driver: &Driver) {
    let world = world(shape, tiny(35), &[]).await;
    let (list, part) = (driver.list, driver.part);
    let wanted = [
        format!("500@{list}=1/2*1"),
        format!("502@{list}=1/3*2"),
        format!("503@{list}=1/4:2*1"),
        format!("503@{part}=1/5:3*2"),
        format!("500@{part}=1/6*2"),
    ];
    faults(&world, &wanted.each_ref().map(String::as_str)).await;
    let run = sync_with(&world, &tens()).await;
    good(&run);
    world.check().await;
}

/// A stream that fails does not move, says why, and is read when the provider is well again; the others go on.
async fn server_errors_that_stay(shape: Shape, driver: &Driver) {
    let world = world(shape, tiny(25), &[]).await;
    faults(&world, &[&format!("500@{}=1/1", driver.list)]).await;
    let run = sync_with(&world, &tens()).await;
    assert!(matches!(run.run_state(), RunState::Partial | RunState::Failed), "{run:?}");
    assert!(run.reason.as_deref().is_some_and(|reason| reason.contains("500")), "{run:?}");
    let tries = calls(&ledger(&world).await, driver.list);
    assert!((3..=12).contains(&tries), "some tries, not many: {tries}");
    let windows = world.engine.db.list_windows(world.connection).await.expect("reads");
    assert!(windows.iter().all(|window| window.state == "open"), "{windows:?}");
    faults(&world, &[]).await;
    good(&sync_with(&world, &tens()).await);
    world.check().await;
}

async fn slow_answers(shape: Shape, driver: &Driver) {
    let world = world(shape, tiny(15), &[("WEARSYNC_PAGE_TIMEOUT", "300ms")]).await;
    let slow = [format!("slow@{}=1/2:900*1", driver.list), format!("slow@{}=1/3:900*1", driver.part)];
    faults(&world, &slow.each_ref().map(String::as_str)).await;
    let run = sync_with(&world, &tens()).await;
    good(&run);
    world.check().await;
    assert_eq!(ledger(&world).await["faults"]["slow"], 2);
}

async fn broken_answers(shape: Shape, driver: &Driver) {
    let world = world(shape, tiny(25), &[]).await;
    let (list, part) = (driver.list, driver.part);
    let wanted = [
        format!("cut@{list}=1/2*1"),
        format!("broken-json@{list}=1/3*2"),
        format!("cut@{part}=1/4*2"),
        format!("broken-json@{part}=1/5*2"),
    ];
    faults(&world, &wanted.each_ref().map(String::as_str)).await;
    good(&sync_with(&world, &tens()).await);
    world.check().await;
    let unreadable = "select count(*) from parts where state not in ('stored', 'none')";
    assert_eq!(number(&world.engine.db, unreadable).await, 0);
}

async fn oversized_answers(shape: Shape, driver: &Driver) {
    let world = world(shape, tiny(8), &[]).await;
    faults(&world, &[&format!("huge@{}=1/1:70*1", driver.list), &format!("huge@{}=1/2:70*1", driver.part)]).await;
    good(&sync_with(&world, &tens()).await);
    world.check().await;
    assert_eq!(ledger(&world).await["faults"]["huge"], 2);
}

/// The process ends after each page; the next one goes on, and fetches nothing twice.
async fn goes_on_from_every_page(shape: Shape, driver: &Driver) {
    let plain = world(shape, tiny(45), &[]).await;
    good(&sync_with(&plain, &tens()).await);
    let pages = whole_lists(&ledger(&plain).await);
    drop(plain);

    let world = world(shape, tiny(45), &[]).await;
    // Slow enough for the stop to come while a page is on its way.
    faults(&world, &["slow=1/1:25"]).await;
    let id = world.accept(&tens()).await;
    let total = |ledger: &Value| {
        [driver.list, driver.part, "athlete", "gear"].iter().map(|endpoint| calls(ledger, endpoint)).sum::<u64>()
    };
    let mut stops = 0_u64;
    let mut seen = 0;
    loop {
        let engine = another(&world, &[]).await;
        // Every page while there are pages; some parts at a time after that.
        let step = if calls(&ledger(&world).await, driver.part) == 0 { 1 } else { 5 };
        let target = seen + step;
        let stop = engine.stop.clone();
        let work = tokio::spawn(async move { execute(&engine, id).await });
        while !work.is_finished() && total(&ledger(&world).await) < target {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        stop.cancel();
        work.await.expect("no panic");
        let run = world.run(id).await;
        if run.run_state().is_final() {
            good(&run);
            break;
        }
        assert_eq!((run.run_state(), run.attempts, run.crashes), (RunState::Queued, 0, 0), "{run:?}");
        seen = total(&ledger(&world).await);
        stops += 1;
        assert!(stops < 60, "it does not end");
    }
    world.check().await;
    let ledger = ledger(&world).await;
    assert!(stops as usize > pages, "{stops} stops, {pages} pages");
    assert_eq!(whole_lists(&ledger), pages, "no page is fetched twice");
    let parts = ledger["by_id"][driver.part].as_object().expect("parts");
    assert!(parts.values().all(|n| n == 1), "no part is fetched twice: {parts:?}");
}

/// The same with a refusal after each page.
async fn goes_on_from_every_refusal(shape: Shape, driver: &Driver) {
    let plain = world(shape, tiny(45), &[]).await;
    good(&sync_with(&plain, &tens()).await);
    let pages = whole_lists(&ledger(&plain).await);
    drop(plain);

    let world = world(shape, tiny(45), &[]).await;
    faults(&world, &[&format!("429@{}=1/2", driver.list), &format!("429@{}=1/4", driver.part)]).await;
    let id = world.accept(&tens()).await;
    loop {
        let engine = another(&world, &[]).await;
        execute(&engine, id).await;
        let run = world.run(id).await;
        if run.run_state().is_final() {
            good(&run);
            break;
        }
        assert_eq!((run.run_state(), run.attempts), (RunState::Waiting, 0), "{run:?}");
        forward(&world.clock, run.due_at + chrono::Duration::milliseconds(1));
    }
    world.check().await;
    assert_eq!(whole_lists(&ledger(&world).await), pages, "no page is fetched twice");
}

/// Uploads push rows from page to page while they are read: none that was there is lost.
async fn rows_that_shift(shape: Shape, driver: &Driver) {
    let world = world(shape, tiny(55), &[]).await;
    faults(&world, &[&format!("slow@{}=1/1:15", driver.list)]).await;
    let there = newest(&world).await;
    let id = world.accept(&tens()).await;
    let engine = world.engine.clone();
    let work = tokio::spawn(async move { execute(&engine, id).await });
    let mut n = 0;
    while !work.is_finished() && n < 12 {
        let days = [0, 20, 3, 45][n % 4];
        let start = world.clock.now() - chrono::Duration::days(days);
        world.control("upload", json!({ "athlete": 0, "start": start.to_rfc3339(), "count": 2 })).await;
        n += 1;
        tokio::time::sleep(Duration::from_millis(8)).await;
    }
    work.await.expect("no panic");
    good(&finish(&world.engine, id).await);
    faults(&world, &[]).await;
    let stored: BTreeSet<String> = stored(&world).await;
    let lost: Vec<_> = there.iter().filter(|id| !stored.contains(&id.to_string())).collect();
    assert!(lost.is_empty(), "lost {lost:?}");
    // What came late lies before the overlap; everything again finds it.
    forward(&world.clock, world.clock.now() + chrono::Duration::minutes(3));
    let all = SyncRequest { since_ms: Some(wearsync::model::BEGINNING_MS), limit: Some(10), ..SyncRequest::default() };
    good(&sync_with(&world, &all).await);
    world.check().await;
}

async fn stored(world: &World) -> BTreeSet<String> {
    let sql = "select external_id from records where kind = 'workout' and deleted_at is null".to_owned();
    crate::oracle::rows(&world.engine.db, sql).await.into_iter().collect()
}

/// Coverage as states and lower bounds: the upper one moves with every sync.
async fn covered(world: &World) -> Vec<(String, String, i64)> {
    let windows = world.engine.db.list_windows(world.connection).await.expect("reads");
    windows.into_iter().map(|window| (window.stream, window.state, window.lo)).collect()
}

async fn second_sync_writes_nothing(shape: Shape, driver: &Driver) {
    let world = world(shape, tiny(40), &[]).await;
    good(&sync_with(&world, &SyncRequest::default()).await);
    let (rows, files, windows) =
        (dump(&world.engine.db, &CONTENT).await, tree(&world.place.export_dir()), covered(&world).await);
    let (written, before) = (youngest_write(&world.engine.db).await, ledger(&world).await);
    forward(&world.clock, world.clock.now() + chrono::Duration::hours(1));
    let run = sync_with(&world, &SyncRequest::default()).await;
    good(&run);
    assert_same("a second sync", &rows, &dump(&world.engine.db, &CONTENT).await);
    assert_eq!(written, youngest_write(&world.engine.db).await, "a row was written anew");
    assert_eq!(windows, covered(&world).await);
    assert_eq!(files, tree(&world.place.export_dir()), "a file was touched");
    let after = ledger(&world).await;
    for endpoint in [driver.part, driver.single, "gear", "token"] {
        assert_eq!(calls(&before, endpoint), calls(&after, endpoint), "{endpoint}");
    }
    // One page of the overlap and the proof that it ends are the least.
    let lists = calls(&after, driver.list) - calls(&before, driver.list);
    assert!(lists <= 4, "{lists} list calls");
    assert!(calls(&after, "athlete") - calls(&before, "athlete") <= driver.besides);
}

async fn volatile_values_write_nothing(shape: Shape, driver: &Driver) {
    let world = world(shape, tiny(20), &[]).await;
    good(&sync_with(&world, &SyncRequest::default()).await);
    let (rows, written) = (dump(&world.engine.db, &CONTENT).await, youngest_write(&world.engine.db).await);
    for id in newest(&world).await.into_iter().take(3) {
        world.control("edit", (driver.volatile)(id)).await;
    }
    forward(&world.clock, world.clock.now() + chrono::Duration::hours(1));
    good(&sync_with(&world, &SyncRequest::default()).await);
    assert_same("a volatile change", &rows, &dump(&world.engine.db, &CONTENT).await);
    assert_eq!(written, youngest_write(&world.engine.db).await, "a row was written anew");
}

async fn late_arrivals(shape: Shape, _: &Driver) {
    let world = world(shape, tiny(20), &[]).await;
    good(&sync_with(&world, &SyncRequest::default()).await);
    forward(&world.clock, world.clock.now() + chrono::Duration::hours(1));
    let start = world.clock.now() - chrono::Duration::days(5);
    let late = world.control("upload", json!({ "athlete": 0, "start": start.to_rfc3339() })).await["id"].to_string();
    let start = world.clock.now() - chrono::Duration::days(300);
    let old = world.control("upload", json!({ "athlete": 0, "start": start.to_rfc3339() })).await["id"].to_string();
    good(&sync_with(&world, &SyncRequest::default()).await);
    assert!(stored(&world).await.contains(&late), "what lies in the overlap is found");
    forward(&world.clock, world.clock.now() + chrono::Duration::seconds(5));
    let all = SyncRequest { since_ms: Some(wearsync::model::BEGINNING_MS), ..SyncRequest::default() };
    good(&sync_with(&world, &all).await);
    assert!(stored(&world).await.contains(&old), "everything again finds what came before it");
    world.check().await;
}

async fn edits(shape: Shape, driver: &Driver) {
    let world = world(shape, Options { awkward: false, ..tiny(12) }, &[]).await;
    good(&sync_with(&world, &SyncRequest::default()).await);
    let ids = newest(&world).await;
    let (renamed, reshaped) = (ids[1], ids[2]);
    let before = ledger(&world).await;
    world.control("edit", (driver.edit)(renamed)).await;
    forward(&world.clock, world.clock.now() + chrono::Duration::hours(1));
    good(&sync_with(&world, &SyncRequest::default()).await);
    world.check().await;
    assert!(has_file(&world, &format!("{renamed}.r2.json")), "an edit has a second file");
    let after = ledger(&world).await;
    assert_eq!(calls(&before, driver.part), calls(&after, driver.part), "a name does not change the samples");

    world.control("edit", (driver.reshape)(reshaped)).await;
    forward(&world.clock, world.clock.now() + chrono::Duration::hours(1));
    good(&sync_with(&world, &SyncRequest::default()).await);
    world.check().await;
    assert!(has_file(&world, &format!("{reshaped}.r2.json")), "an edit has a second file");
    let asked = &ledger(&world).await["by_id"][driver.part];
    assert_eq!(asked[reshaped.to_string()], 2, "another shape may have other samples");
    assert_eq!(asked[renamed.to_string()], 1);
    assert_eq!(calls(&ledger(&world).await, driver.part), calls(&after, driver.part) + 1);
}

async fn deletes(shape: Shape, driver: &Driver) {
    let world = world(shape, tiny(12), &[]).await;
    good(&sync_with(&world, &SyncRequest::default()).await);
    let gone = newest(&world).await[1];
    let before = ledger(&world).await;
    world.control("delete", json!({ "athlete": 0, "id": gone })).await;
    forward(&world.clock, world.clock.now() + chrono::Duration::hours(1));
    good(&sync_with(&world, &SyncRequest::default()).await);
    world.check().await;
    let after = ledger(&world).await;
    assert_eq!(calls(&after, driver.single), calls(&before, driver.single) + 1, "absence is confirmed by a fetch");
    assert!(has_file(&world, &format!("{gone}.deleted.json")), "a delete has a marker");
    let chunks = format!(
        "select count(*) from sample_chunks c join records r on r.id = c.record_id where r.external_id = '{gone}'"
    );
    assert_eq!(number(&world.engine.db, &chunks).await, 0);
    let presence = "select count(*) from parts where part = 'presence'";
    assert_eq!(number(&world.engine.db, presence).await, 0);

    // Once more: a record that is known to be gone is not asked for again.
    let (rows, written) = (dump(&world.engine.db, &CONTENT).await, youngest_write(&world.engine.db).await);
    forward(&world.clock, world.clock.now() + chrono::Duration::hours(1));
    good(&sync_with(&world, &SyncRequest::default()).await);
    assert_eq!(calls(&ledger(&world).await, driver.single), calls(&after, driver.single));
    assert_same("a sync after a delete", &rows, &dump(&world.engine.db, &CONTENT).await);
    assert_eq!(written, youngest_write(&world.engine.db).await);
}

async fn private_records_without_scope(shape: Shape, driver: &Driver) {
    let world = world(shape, Options { private_share: 0.3, ..tiny(30) }, &[]).await;
    let truth = world.ask("truth?athlete=0").await;
    let rows = truth["activities"].as_array().expect("a list");
    let public: BTreeSet<String> =
        rows.iter().filter(|row| row["only_me"] == false).map(|row| row["id"].to_string()).collect();
    assert!(public.len() < rows.len());
    world.control("grant", json!({ "athlete": 0, "scopes": driver.public })).await;
    good(&sync_with(&world, &tens()).await);
    assert_eq!(stored(&world).await, public);
    world.control("grant", json!({ "athlete": 0 })).await;
    forward(&world.clock, world.clock.now() + chrono::Duration::seconds(5));
    let all = SyncRequest { since_ms: Some(wearsync::model::BEGINNING_MS), ..SyncRequest::default() };
    good(&sync_with(&world, &all).await);
    world.check().await;
}

async fn missing_scope(shape: Shape, driver: &Driver) {
    let world = world(shape, tiny(8), &[]).await;
    world.control("grant", json!({ "athlete": 0, "scopes": driver.none })).await;
    let run = sync_with(&world, &SyncRequest::default()).await;
    assert_eq!(run.run_state(), RunState::Partial, "{run:?}");
    let reason = run.reason.clone().unwrap_or_default();
    assert!(reason.contains(driver.lacks) && reason.contains("connect again"), "{reason}");
    assert_eq!(calls(&ledger(&world).await, driver.list), 1, "asking again does not help");
    active(&world).await;
    world.control("grant", json!({ "athlete": 0 })).await;
    good(&sync_with(&world, &SyncRequest::default()).await);
    world.check().await;
}

async fn active(world: &World) {
    let list = world.engine.db.list_connections(Some(world.user)).await.expect("reads");
    assert_eq!((list[0].connection.status.as_str(), list[0].account_status.as_str()), ("active", "active"));
}

async fn switched_off_application(shape: Shape, driver: &Driver) {
    let world = world(shape, tiny(8), &[]).await;
    faults(&world, &[&format!("inactive@{}=1/1", driver.list)]).await;
    let run = sync_with(&world, &SyncRequest::default()).await;
    assert_eq!(run.run_state(), RunState::Failed, "{run:?}");
    assert!(run.reason.as_deref().is_some_and(|reason| reason.contains("switched")), "{run:?}");
    active(&world).await;
    faults(&world, &[]).await;
    good(&sync_with(&world, &SyncRequest::default()).await);
    world.check().await;
}
