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
    everything_is_read_after_a_part_of_it_was => part_first;
    connecting_again_keeps_what_is_stored => again;
    a_token_of_another_person_gets_its_own_connection => other_person;
    an_answer_given_up_is_told_and_asked_for_later => given_up;
    erasing_a_user_removes_its_files => erased;
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

async fn again(shape: Shape) {
    let world = World::new(shape, small()).await;
    world.sync().await;
    let before = tree(&world.place.export_dir());
    // A pasted token does not say whose it is.
    assert_eq!(world.connect(world.user, 0).await, world.connection, "the connection is the same");
    world.engine.db.disconnect(world.user, "strava", world.clock.now()).await.expect("disconnects");
    assert_eq!(world.connect(world.user, 0).await, world.connection, "after a disconnect too");
    let run = world.sync().await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    assert_eq!(before, tree(&world.place.export_dir()), "nothing was read anew");
    world.check().await;
}

async fn other_person(shape: Shape) {
    let world = World::new(shape, Options { athletes: 2, ..small() }).await;
    world.sync().await;
    world.connect(world.user, 1).await;
    let run = world.sync().await;
    assert_eq!(run.run_state(), RunState::Failed, "{run:?}");
    assert!(run.reason.as_deref().is_some_and(|why| why.contains("another account")), "{run:?}");
    // Nothing of the second person came to the first one's records.
    world.check().await;
    let views = world.engine.db.list_connections(Some(world.user)).await.expect("reads");
    assert!(views.len() == 1 && views[0].connection.id != world.connection, "{views:?}");
    assert_ne!(views[0].provider_user_id, "70412355", "it is the second athlete's");
    let setup = world.engine.provider("strava").expect("strava");
    let (class, source) = (wearsync::model::Class::Interactive, wearsync::model::RunSource::Pull);
    let request = wearsync::model::SyncRequest::default();
    let connection = views[0].connection.id;
    let accepted = wearsync::sync::submit(&world.engine, setup, connection, &request, class, source, None).await;
    let run = world.finish(accepted.expect("accepts").expect("is active").id).await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
}

async fn given_up(shape: Shape) {
    let clock = wearsync::clock::Clock::mock("2026-02-05T12:00:00Z".parse().expect("an instant"));
    let options = Options { activities: 6, manual_share: 0.0, faults: Vec::new(), ..small() };
    let world = World::with(shape, options, clock, &[]).await;
    world.control("fault", json!({"faults": ["broken-json@streams=1"]})).await;
    let run = world.sync().await;
    assert_eq!(run.run_state(), RunState::Partial, "{run:?}");
    assert!(run.reason.as_deref().is_some_and(|why| why.contains("could not be had")), "{run:?}");
    let failed = world.engine.db.count_failed(world.connection).await.expect("counts");
    assert!(failed > 0, "{failed}");
    world.control("fault", json!({"faults": []})).await;
    world.clock.set(world.clock.now() + chrono::Duration::hours(7));
    let run = world.sync().await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    assert_eq!(world.engine.db.count_failed(world.connection).await.expect("counts"), 0);
    world.check().await;
}

async fn erased(shape: Shape) {
    let world = World::new(shape, Options { activities: 10, ..small() }).await;
    world.sync().await;
    assert!(!tree(&world.place.export_dir()).is_empty());
    wearsync::sync::erase_user(&world.engine, world.user).await.expect("erases").expect("was there");
    assert!(tree(&world.place.export_dir()).is_empty(), "files of an erased user");
}

/// A range that is read before the first sync of everything must not hide what is older.
async fn part_first(shape: Shape) {
    let world = World::new(shape, small()).await;
    let since = world.clock.now().timestamp_millis() - 20 * 86_400_000;
    let request = wearsync::model::SyncRequest { since_ms: Some(since), ..Default::default() };
    let run = world.sync_with(&request).await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    let run = world.sync().await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    world.check().await;
    let gaps = wearsync::sync::list_gaps(&world.engine, Some(world.user)).await.expect("lists");
    assert!(gaps.is_empty(), "{gaps:?}");
}
