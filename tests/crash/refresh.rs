//! Eight processes, one grant, refresh tokens that can be used once.

use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use wearsync::model::{AccountId, ConnectionId, RunId, RunState, SyncRequest};
use wearsync::simulator::{Options, parse_fault};
use wearsync::storage::Account;
use wearsync::sync;

use crate::process::Process;
use crate::scene::{Person, Scene};
use crate::support::{Shape, query};

const PROCESSES: usize = 8;
/// Around the one call that cannot be repeated.
const POINTS: [&str; 3] = ["refresh-leased", "refresh-answered", "refresh-stored"];

#[derive(sqlx::FromRow)]
struct AccountOf {
    account_id: AccountId,
}

/// Eight users of one athlete: eight connections, one account.
async fn scene(activities: u32) -> (Scene, AccountId) {
    let options = Options {
        athletes: 1,
        activities,
        stream_points: 20,
        rotate: true,
        expire_after_calls: Some(5),
        faults: vec![parse_fault("slow=1/1:20").expect("a fault")],
        ..Options::default()
    };
    let mut scene = Scene::new(Shape::Postgres, options).await;
    // Named from the start: an account that is not named yet cannot be connected again.
    let grant = scene.control("grant", json!({ "athlete": 0 })).await;
    scene.people[0].connection = connect(&scene, &grant).await;
    let sql = "select account_id from connections where id = $1";
    let account = query::<AccountOf>(&scene.engine.db, sql, scene.people[0].connection).await[0].account_id;
    for _ in 1..PROCESSES {
        let user = scene.user().await;
        let now = scene.engine.clock.now();
        let connection = scene.engine.db.connect(user, account, "strava", now).await.expect("connects");
        scene.people.push(Person { user, connection, athlete: 0 });
    }
    (scene, account)
}

fn start(scene: &Scene, n: usize, failpoint: Option<&str>) -> Process {
    let args: &[&str] = if n == 0 { &["worker", "--export"] } else { &["worker"] };
    // One run at a time in each process, so that all of them want the token at once.
    let mut settings = vec![("WEARSYNC_CONCURRENCY", "1"), ("WEARSYNC_DATABASE_CONNECTIONS", "3")];
    settings.extend(failpoint.map(|point| ("WEARSYNC_FAILPOINT", point)));
    scene.start(args, &settings)
}

async fn account(scene: &Scene, id: AccountId) -> Account {
    scene.engine.db.find_account(id).await.expect("reads").expect("is there")
}

async fn accept_all(scene: &Scene) -> Vec<RunId> {
    let mut runs = Vec::new();
    for person in &scene.people {
        runs.push(scene.accept_for(person.connection, &SyncRequest::default()).await);
    }
    runs
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_refresh_per_expiry() {
    let (scene, id) = scene(12).await;
    let runs = accept_all(&scene).await;
    let started = Instant::now();
    let mut processes: Vec<Process> = (0..PROCESSES).map(|n| start(&scene, n, None)).collect();
    for run in runs {
        scene.until_success(run).await;
    }
    scene.check().await;
    let ledger = scene.ledger().await;
    let tokens = &ledger["tokens"];
    let of = |name: &str| tokens[name].as_u64().expect("a count");
    let api_calls: u64 =
        ["athlete", "list", "streams", "gear"].iter().filter_map(|e| ledger["calls"][*e].as_u64()).sum();
    println!(
        "{PROCESSES} processes, {:.0} s: {api_calls} calls, {} refreshes, {} access tokens, {} refused, {} calls with a dead \
         token",
        started.elapsed().as_secs_f64(),
        of("refresh_attempts"),
        of("issued"),
        of("refresh_refused"),
        of("dead_calls"),
    );
    // The simulator gives a new access token only in place of a dead one: as many refreshes as tokens is one each.
    assert_eq!(of("refresh_attempts"), of("issued"), "a token that lived was refreshed: {tokens}");
    assert_eq!(of("refresh_refused"), 0, "a refresh token was spent twice: {tokens}");
    assert!(of("refresh_attempts") >= (api_calls - of("dead_calls")) / 5, "{tokens}");
    let account = account(&scene, id).await;
    assert_eq!((account.status.as_str(), account.reason), ("active", None));
    for process in &mut processes {
        process.stop().await;
    }
}

/// The one loss that cannot be prevented: killed between the provider's answer and our commit. It is called by its name,
/// and nothing else ends a grant.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_lose_only_rotations() {
    let mut rng = crate::chance();
    let (scene, id) = scene(30).await;
    let kills = crate::kills(60).min(200);
    let mut runs = accept_all(&scene).await;
    let started = Instant::now();
    let arm = |rng: &mut StdRng, n: usize| {
        // Most are to die around a refresh; one that does not come by there is killed at any moment.
        let which = rng.random_range(0..4);
        let point = POINTS.get(which).map(|point| format!("{point}:{}", rng.random_range(1..3)));
        (start(&scene, n, point.as_deref()), which)
    };
    let mut processes: Vec<(Process, usize)> = (0..PROCESSES).map(|n| arm(&mut rng, n)).collect();
    let mut lost: Vec<String> = Vec::new();
    let (mut hits, mut random) = ([0; POINTS.len()], 0);
    let mut next = Instant::now() + Duration::from_millis(500);
    while hits.iter().sum::<u64>() + random < kills {
        assert!(started.elapsed() < Duration::from_secs(60 + kills * 2), "too few processes die: {hits:?}, {random}");
        tokio::time::sleep(Duration::from_millis(30)).await;
        let at = rng.random_range(0..PROCESSES);
        if Instant::now() >= next {
            next = Instant::now() + Duration::from_millis(rng.random_range(100..1500));
            random += 1;
            processes[at].0.kill();
            processes[at] = arm(&mut rng, at);
        }
        for (n, slot) in processes.iter_mut().enumerate() {
            if slot.0.has_ended() {
                *hits.get_mut(slot.1).unwrap_or_else(|| panic!("it ended by itself: {}", slot.0.said())) += 1;
                *slot = arm(&mut rng, n);
            }
        }
        revive(&scene, id, &mut lost).await;
        for (person, run) in scene.people.iter().zip(&mut runs) {
            let state = scene.run(*run).await;
            if state.run_state().is_final() {
                judge(&state);
                // More work, so that tokens are used up all the time.
                let since = scene.engine.clock.now().timestamp_millis() - rng.random_range(1..3_000) * 1_000_000;
                let request = SyncRequest { since_ms: Some(since), ..SyncRequest::default() };
                if let Some(new) = try_accept(&scene, person, &request).await {
                    *run = new;
                }
            }
        }
    }
    let took = started.elapsed();
    for (n, slot) in processes.iter_mut().enumerate() {
        slot.0.kill();
        slot.0 = start(&scene, n, None);
    }
    // Whatever was lost on the way, a last sync of everybody is whole.
    let waiting = Instant::now();
    'all: loop {
        assert!(
            waiting.elapsed() < Duration::from_secs(60),
            "the last syncs do not end: {:?}",
            account(&scene, id).await
        );
        revive(&scene, id, &mut lost).await;
        for person in &scene.people {
            let Some(run) = try_accept(&scene, person, &SyncRequest::default()).await else { continue 'all };
            let run = scene.until_final(run).await;
            judge(&run);
            if run.run_state() != RunState::Success {
                continue 'all;
            }
        }
        break;
    }
    scene.check().await;
    let ledger = scene.ledger().await;
    println!(
        "{kills} kills in {:.0} s ({} leased, {} answered, {} stored, {random} at random), {} refreshes, {} refused by the simulator: {} \
         rotation_lost, 0 false",
        took.as_secs_f64(),
        hits[0],
        hits[1],
        hits[2],
        ledger["tokens"]["refresh_attempts"],
        ledger["tokens"]["refresh_refused"],
        lost.len(),
    );
    // Every death was one that the provider saw as well: a refusal of a token that it had replaced.
    assert!(lost.len() as u64 <= ledger["tokens"]["refresh_refused"].as_u64().expect("a count"), "{ledger}");
    // And each is paid for by a kill that can lose one: after the answer, or at any moment.
    assert!(lost.len() as u64 <= hits[1] + random, "{} losses", lost.len());
    assert!(hits[1] == 0 || !lost.is_empty(), "a lost rotation was not noticed");
    for (process, _) in &mut processes {
        process.stop().await;
    }
}

/// The provider's answer is cut off, the next one is an outage, and only then comes the refusal: it is still called by its
/// name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_never_came_is_no_plain_refusal() {
    let faults = ["cut@token=1/1*1", "503@token=1/2*1"].map(|fault| parse_fault(fault).expect("a fault"));
    let options = Options {
        athletes: 1,
        activities: 3,
        stream_points: 20,
        rotate: true,
        faults: faults.into(),
        ..Options::default()
    };
    let scene = Scene::new(Shape::Postgres, options).await;
    let run = scene.accept(&SyncRequest::default()).await;
    let mut processes = scene.start_all();
    let run = scene.until_final(run).await;
    assert!(run.reason.as_deref().is_some_and(|why| why.contains("rotation_lost")), "{run:?}");
    assert_eq!(scene.calls("token").await, 3);
    scene.connect(scene.people[0].user, 0).await;
    for process in &mut processes {
        process.stop().await;
    }
}

/// A run may end for want of a grant whose rotation was lost, or because kill after kill hit it; for no other reason.
fn judge(run: &wearsync::storage::Run) {
    let why = run.reason.as_deref().unwrap_or_default();
    let excused = why.contains("rotation_lost") || why.contains("died working on it");
    assert!(run.run_state() == RunState::Success || excused, "{run:?}");
}

async fn try_accept(scene: &Scene, person: &Person, request: &SyncRequest) -> Option<RunId> {
    let setup = scene.engine.provider("strava").expect("strava");
    let (class, source) = (wearsync::model::Class::Interactive, wearsync::model::RunSource::Pull);
    let accepted = sync::submit(&scene.engine, setup, person.connection, request, class, source, None).await;
    accepted.expect("accepts").map(|accepted| accepted.id)
}

/// A dead grant has to say why, and the person connects again.
async fn revive(scene: &Scene, id: AccountId, lost: &mut Vec<String>) {
    let account = account(scene, id).await;
    if account.status == "active" {
        return;
    }
    let why = account.reason.expect("a reason");
    assert!(why.starts_with("rotation_lost"), "a grant was given up that was good: {why}");
    lost.push(why);
    // The same person, so the same account: all eight connections are alive again.
    let grant = scene.control("grant", json!({ "athlete": 0 })).await;
    assert_eq!(connect(scene, &grant).await, scene.people[0].connection);
}

/// Brings a grant for the first user.
async fn connect(scene: &Scene, grant: &Value) -> ConnectionId {
    let token = sync::secret(grant["refresh_token"].as_str().expect("a token"));
    let setup = scene.engine.provider("strava").expect("strava");
    let (user, name) = (scene.people[0].user, grant["athlete"].to_string());
    sync::connect_with_grant(&scene.engine, setup, user, &token, Some(&name), None).await.expect("connects")
}
