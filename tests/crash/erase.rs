//! Disconnect and erase while a page is in flight: nothing of the user appears any more, and the others go on.

use std::time::Duration;

use wearsync::model::{RunState, SyncRequest};
use wearsync::simulator::{Options, parse_fault};
use wearsync::storage::Db;

use crate::both;
use crate::scene::{Api, Person, Scene};
use crate::support::Shape;

both! {
    disconnect_in_mid_page => disconnect;
    erase_in_mid_page => erase;
    purge_in_mid_page => purge;
}

/// Three people, so that two are left and files stay below their users' folders.
async fn scene(shape: Shape) -> Scene {
    let faults = vec![parse_fault("slow=1/1:400").expect("a fault")];
    Scene::new(shape, Options { activities: 16, stream_points: 60, athletes: 3, faults, ..Options::default() }).await
}

/// Everything that is kept of a person, by table.
async fn rows(db: &Db, person: &Person) -> Vec<(&'static str, i64)> {
    let (user, connection) = (person.user.0, person.connection.0);
    let by_connection = ["records", "parts", "windows", "runs", "delivery_items"];
    let by_user = ["data_sources", "export_leases", "connections"];
    let mut out = Vec::new();
    let other = [
        (
            "sample_chunks",
            "select count(*) from sample_chunks c join records r on r.id = c.record_id where r.connection_id = $1",
        ),
        ("workouts", "select count(*) from workouts w join records r on r.id = w.record_id where r.connection_id = $1"),
    ];
    let queries = by_connection
        .map(|table| (table, format!("select count(*) from {table} where connection_id = $1"), connection))
        .into_iter()
        .chain(by_user.map(|table| (table, format!("select count(*) from {table} where user_id = $1"), user)))
        .chain([("users", "select count(*) from users where id = $1".to_owned(), user)])
        .chain(other.map(|(table, sql)| (table, sql.to_owned(), connection)));
    for (table, sql, id) in queries {
        let sql = &sql;
        let (count,): (i64,) = match db {
            Db::Postgres(db) => sqlx::query_as(sql).bind(id).fetch_one(db.pool()).await.expect("counts"),
            Db::Sqlite(db) => sqlx::query_as(sql).bind(id).fetch_one(db.pool()).await.expect("counts"),
        };
        out.push((table, count));
    }
    out
}

async fn disconnect(shape: Shape) {
    let scene = scene(shape).await;
    let mut api = Api::of_shape(&scene).await;
    let mut workers = if shape == Shape::Postgres { scene.start_all() } else { Vec::new() };
    // Once in the middle of the list, once among the streams.
    for (place, endpoint) in [(0, "list"), (1, "streams")] {
        let person = scene.people[place];
        let before = scene.calls(endpoint).await;
        let mine = scene.accept_for(person.connection, &SyncRequest::default()).await;
        scene.until_calls(endpoint, before + 1).await;
        let now = scene.engine.clock.now();
        let ended = scene.engine.db.disconnect(person.user, "strava", now).await.expect("disconnects");
        assert_eq!(ended, Some(person.connection));
        let left = rows(&scene.engine.db, &person).await;
        // The call in flight comes back, and finds the door closed.
        let run = scene.until_final(mine).await;
        assert_eq!(run.run_state(), RunState::Cancelled, "{run:?}");
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let after = rows(&scene.engine.db, &person).await;
        let only = |rows: &[(&'static str, i64)]| -> Vec<(&'static str, i64)> {
            // Who writes a user's files is no data of theirs.
            rows.iter().filter(|(table, _)| *table != "export_leases").copied().collect()
        };
        assert_eq!(only(&left), only(&after), "{shape:?}, {endpoint}: something was written after the disconnect");
    }
    let last = scene.people[2];
    let theirs = scene.accept_for(last.connection, &SyncRequest::default()).await;
    scene.until_success(theirs).await;
    scene.check_person(&last).await;
    assert_eq!(api.status(&scene, "/health/ready").await, Some(200));
    // A new grant takes it up where it ended.
    let first = scene.people[0];
    scene.connect(first.user, first.athlete).await;
    assert!(!api.process.has_ended() && workers.iter_mut().all(|worker| !worker.has_ended()));
    api.process.stop().await;
    for worker in &mut workers {
        worker.stop().await;
    }
}

async fn erase(shape: Shape) {
    let scene = scene(shape).await;
    let mut api = Api::of_shape(&scene).await;
    let mut workers = if shape == Shape::Postgres { scene.start_all() } else { Vec::new() };
    let [erased, other, third] = [scene.people[0], scene.people[1], scene.people[2]];
    let mine = scene.accept_for(erased.connection, &SyncRequest::default()).await;
    let theirs = scene.accept_for(other.connection, &SyncRequest::default()).await;
    scene.until_calls("streams", 4).await;
    let call = scene.http.delete(format!("{}/api/v1/users/{}", api.url, erased.user)).header("x-api-key", &api.key);
    let answer = call.send().await.expect("answers");
    assert!(answer.status().is_success(), "{}", answer.status());
    for _ in 0..30 {
        let left = rows(&scene.engine.db, &erased).await;
        assert!(left.iter().all(|(_, count)| *count == 0), "{shape:?}: rows of somebody who was erased: {left:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(scene.engine.db.find_run(mine).await.expect("reads"), None);
    scene.until_success(theirs).await;
    scene.check_person(&other).await;
    // And work goes on: whoever comes next is served by the same processes.
    let next = scene.accept_for(third.connection, &SyncRequest::default()).await;
    scene.until_success(next).await;
    scene.check_person(&third).await;
    assert_eq!(api.status(&scene, "/health/ready").await, Some(200));
    assert!(!api.process.has_ended() && workers.iter_mut().all(|worker| !worker.has_ended()));
    api.process.stop().await;
    for worker in &mut workers {
        worker.stop().await;
    }
}

/// A purge while pages, and files, are on their way: nothing of the user is there afterwards, and the others go on.
async fn purge(shape: Shape) {
    let scene = scene(shape).await;
    let mut api = Api::of_shape(&scene).await;
    let mut workers = if shape == Shape::Postgres { scene.start_all() } else { Vec::new() };
    let other = scene.people[2];
    let theirs = scene.accept_for(other.connection, &SyncRequest::default()).await;
    for (place, endpoint, least) in [(0, "list", 1), (1, "streams", 3)] {
        let person = scene.people[place];
        let before = scene.calls(endpoint).await;
        let mine = scene.accept_for(person.connection, &SyncRequest::default()).await;
        scene.until_calls(endpoint, before + least).await;
        let path = format!("{}/api/v1/users/{}/connections/strava/data", api.url, person.user);
        let answer = scene.http.delete(path).header("x-api-key", &api.key).send().await.expect("answers");
        assert_eq!(answer.status(), 204);
        for round in 0..30 {
            for (table, count) in rows(&scene.engine.db, &person).await {
                // What stays, and who writes the user's files.
                let stays = matches!(table, "users" | "connections" | "export_leases");
                assert!(stays || count == 0, "{shape:?}, {endpoint}: {count} rows in {table}");
            }
            // Files go with the next sweep of whoever owns them, and do not come back.
            let folder = scene.folder(&person);
            assert!(round < 15 || !folder.exists(), "{shape:?}, {endpoint}: files in {}", folder.display());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(scene.engine.db.find_run(mine).await.expect("reads"), None);
    }
    scene.until_success(theirs).await;
    scene.check_person(&other).await;
    // Connected again, everything comes again.
    let first = scene.people[0];
    scene.connect(first.user, first.athlete).await;
    let again = scene.accept_for(first.connection, &SyncRequest::default()).await;
    scene.until_success(again).await;
    scene.check_person(&first).await;
    assert!(!api.process.has_ended() && workers.iter_mut().all(|worker| !worker.has_ended()));
    api.process.stop().await;
    for worker in &mut workers {
        worker.stop().await;
    }
}
