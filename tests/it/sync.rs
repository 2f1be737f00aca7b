//! The engine against the simulator, in process: what a run reads, stores and writes.

use serde_json::json;
use wearsync::model::RunState;
use wearsync::simulator::Options;

use crate::both;
use crate::support::{Shape, World, tree};

both! {
    first_sync_takes_everything => first_sync;
    second_sync_writes_nothing => second_sync;
    edits_deletes_and_late_uploads_are_found => changes;
}

fn small() -> Options {
    Options { activities: 230, stream_points: 50, athletes: 1, ..Options::default() }
}

async fn first_sync(shape: Shape) {
    let world = World::new(shape, small()).await;
    let run = world.sync().await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    world.check().await;
    let summary = std::fs::read(world.place.export_dir().join("strava/summary.json")).expect("a summary");
    let summary: serde_json::Value = serde_json::from_slice(&summary).expect("JSON");
    assert_eq!(summary["total_activities"], json!(230));
}

async fn second_sync(shape: Shape) {
    let world = World::new(shape, small()).await;
    world.sync().await;
    let before = tree(&world.place.export_dir());
    let before_calls = calls(&world).await;
    let run = world.sync().await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    assert_eq!(before, tree(&world.place.export_dir()), "a second sync touches no file");
    // The profile, the overlap's page, the one after it that only repeats the boundary row, and the empty one that ends
    // the list: two more than a client would need that believes a short page.
    assert_eq!(calls(&world).await - before_calls, 4, "provider calls of a sync that finds nothing");
    world.check().await;
}

async fn calls(world: &World) -> u64 {
    let ledger = world.ask("ledger").await;
    let calls = ledger["ledger"]["calls"].as_object().expect("calls").clone();
    calls.iter().filter(|(name, _)| *name != "token").filter_map(|(_, n)| n.as_u64()).sum()
}

async fn changes(shape: Shape) {
    let world = World::new(shape, small()).await;
    world.sync().await;
    let truth = crate::support::truth(&crate::support::client(), &world.sim.url(), 0).await;
    let mut newest: Vec<_> = truth.iter().filter(|(_, t)| !t.manual).collect();
    newest.sort_by_key(|(_, t)| std::cmp::Reverse(t.start));
    let id: u64 = newest[1].0.parse().expect("a number");
    let gone: u64 = newest[2].0.parse().expect("a number");
    world.control("edit", json!({"athlete": 0, "id": id, "name": "A new name"})).await;
    world.control("delete", json!({"athlete": 0, "id": gone})).await;
    let start = world.clock.now() - chrono::Duration::days(6);
    world
        .control("upload", json!({"athlete": 0, "start": start.to_rfc3339(), "manual": false, "private": false}))
        .await;
    let run = world.sync().await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    world.check().await;
    let files = tree(&world.place.export_dir());
    let names: Vec<_> = files.keys().map(|path| path.display().to_string()).collect();
    assert!(names.iter().any(|name| name.ends_with(&format!("{id}.r2.json"))), "the edit has no second file");
    assert!(names.iter().any(|name| name.ends_with(&format!("{gone}.deleted.json"))), "the delete has no marker");
}
