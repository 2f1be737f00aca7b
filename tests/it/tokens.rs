//! What keeps a grant alive: one refresh per expiry, however many want one, and what no failure of ours may cost.

use std::sync::Arc;

use serde_json::json;
use wearsync::clock::Clock;
use wearsync::model::{Class, ConnectionId, RunSource, RunState, SyncRequest};
use wearsync::simulator::Options;
use wearsync::storage::{Account, NewUser};
use wearsync::sync::{self, Engine};

use crate::both;
use crate::manage::command;
use crate::oracle::{another, calls, faults, forward, ledger, sync_with, tiny, world};
use crate::support::{Place, Shape, World};

both! {
    eight_share_single_use_tokens => race;
    a_token_lost_with_its_holder_is_named_so => rotation_lost;
    a_holder_that_died_before_the_call_costs_nothing => died_early;
    a_refused_grant_is_dead => refused;
    what_we_lost_nobody_took_back => lost;
    wrong_credentials_do_not_kill_a_grant => wrong_secret;
    a_broken_token_endpoint_does_not_kill_a_grant => endpoint_down;
    another_application_is_told_apart => other_app;
    a_pasted_token_is_tried_before_a_working_one_is_given_up => pasted;
    commands_say_what_became_of_a_token => commands;
}

async fn account(world: &World) -> Account {
    let connection = world.engine.db.find_connection(world.connection).await.unwrap().unwrap();
    world.engine.db.find_account(connection.account_id).await.unwrap().unwrap()
}

/// Runs until it went well; a run that met nothing but used-up tokens says so, and is asked for again.
async fn until_success(engine: Arc<Engine>, connection: ConnectionId) -> u32 {
    for tries in 0..20 {
        let setup = engine.provider("strava").unwrap();
        let request = SyncRequest { limit: Some(5), ..SyncRequest::default() };
        let accepted =
            sync::submit(&engine, setup, connection, &request, Class::Interactive, RunSource::Pull, None).await;
        let id = accepted.unwrap().expect("the account is active").id;
        loop {
            sync::execute(&engine, id).await.unwrap();
            let run = engine.db.find_run(id).await.unwrap().unwrap();
            match run.run_state() {
                RunState::Success => return tries,
                state if state.is_final() => {
                    let reason = run.reason.unwrap_or_default();
                    assert!(reason.contains("one fresh access token after the other"), "{reason}");
                    break;
                }
                _ => engine.clock.sleep_until(run.due_at).await,
            }
        }
    }
    panic!("no success");
}

/// Eight processes (on SQLite: eight runs of the one process), one account, tokens that end after five calls and
/// refresh tokens that are good once.
async fn race(shape: Shape) {
    let options = Options { rotate: true, expire_after_calls: Some(5), ..tiny(8) };
    let world = World::with(shape, options, Clock::system(), &[]).await;
    let db = &world.engine.db;
    let shared = account(&world).await.id;
    // All processes first: each tidies up the folder when it opens it.
    let mut engines = Vec::new();
    for _ in 0..8 {
        engines.push(match shape {
            Shape::Postgres => another(&world, &[("WEARSYNC_DATABASE_CONNECTIONS", "2")]).await,
            Shape::Sqlite => world.engine.clone(),
        });
    }
    let mut work = tokio::task::JoinSet::new();
    for (n, engine) in engines.into_iter().enumerate() {
        let connection = match n {
            0 => world.connection,
            _ => {
                let user = db.insert_user(NewUser::default(), world.clock.now()).await.unwrap().id;
                db.connect(user, shared, "strava", world.clock.now()).await.unwrap()
            }
        };
        work.spawn(until_success(engine, connection));
    }
    let repeated: u32 = work.join_all().await.into_iter().sum();
    let tokens = ledger(&world).await["tokens"].clone();
    println!("{tokens}; {repeated} runs repeated");
    assert_eq!(tokens["refresh_refused"], 0, "no token was spent twice: {tokens}");
    // The provider makes a new access token only when the old one ended: a refresh more than that was one too many.
    assert_eq!(tokens["refresh_attempts"], tokens["issued"], "one refresh per expiry: {tokens}");
    assert!(tokens["issued"].as_u64() > Some(10), "{tokens}");
    let account = account(&world).await;
    assert_eq!((account.status.as_str(), account.refusals), ("active", 0));
    assert_eq!(account.refresh_owner, None);
    let records = "select count(*) from records where kind = 'workout'";
    assert_eq!(crate::oracle::number(db, records).await, 64);
}

/// Spends the stored refresh token behind our back; the one that takes its place is nobody's.
async fn spend(world: &World) {
    let grant = world.control("grant", json!({ "athlete": 0 })).await;
    let token = grant["refresh_token"].as_str().unwrap();
    let form = [
        ("client_id", "90417"),
        ("client_secret", "simulated-secret"),
        ("grant_type", "refresh_token"),
        ("refresh_token", token),
    ];
    let call = crate::support::client().post(format!("{}/oauth/token", world.sim.url())).form(&form);
    assert!(call.send().await.unwrap().status().is_success());
}

async fn die_refreshing(world: &World) {
    let account = account(world).await;
    let (now, until) = (world.clock.now(), world.clock.now() + chrono::Duration::seconds(30));
    let lease = world.engine.db.take_refresh_lease(account.id, account.token_version, "a dead one", now, until).await;
    assert!(lease.unwrap().is_some());
}

async fn rotation_lost(shape: Shape) {
    let world = world(shape, Options { rotate: true, ..tiny(3) }, &[]).await;
    die_refreshing(&world).await;
    spend(&world).await;
    forward(&world.clock, world.clock.now() + chrono::Duration::seconds(31));
    let run = sync_with(&world, &SyncRequest::default()).await;
    assert_eq!(run.run_state(), RunState::Failed);
    let account = account(&world).await;
    assert_eq!(account.status, "reauth");
    assert!(account.reason.as_deref().is_some_and(|reason| reason.starts_with("rotation_lost")), "{account:?}");
    assert!(run.reason.as_deref().is_some_and(|reason| reason.contains("connected again")), "{run:?}");
    let setup = world.engine.provider("strava").unwrap();
    let request = SyncRequest::default();
    let (class, source) = (Class::Interactive, RunSource::Pull);
    let accepted = sync::submit(&world.engine, setup, world.connection, &request, class, source, None).await.unwrap();
    assert!(accepted.is_none(), "nothing is accepted for a dead grant");
    // Connected again, everything goes on.
    let list = world.engine.db.list_connections(Some(world.user)).await.unwrap();
    let grant = world.control("grant", json!({ "athlete": 0 })).await;
    let token = sync::secret(grant["refresh_token"].as_str().unwrap());
    let person = Some(list[0].provider_user_id.as_str());
    let same = sync::connect_with_grant(&world.engine, setup, world.user, &token, person, None).await.unwrap();
    assert_eq!(same, world.connection);
    assert_eq!(sync_with(&world, &SyncRequest::default()).await.run_state(), RunState::Success);
    world.check().await;
}

async fn died_early(shape: Shape) {
    let world = world(shape, Options { rotate: true, ..tiny(3) }, &[]).await;
    die_refreshing(&world).await;
    forward(&world.clock, world.clock.now() + chrono::Duration::seconds(31));
    assert_eq!(sync_with(&world, &SyncRequest::default()).await.run_state(), RunState::Success);
    let account = account(&world).await;
    assert_eq!((account.status.as_str(), account.refresh_owner), ("active", None));
}

async fn refused(shape: Shape) {
    let world = world(shape, tiny(3), &[]).await;
    world.control("revoke", json!({ "athlete": 0 })).await;
    let run = sync_with(&world, &SyncRequest::default()).await;
    assert_eq!(run.run_state(), RunState::Failed);
    let account = account(&world).await;
    assert_eq!(account.status, "reauth");
    let reason = account.reason.unwrap_or_default();
    assert!(!reason.contains("rotation_lost") && reason.contains("refused"), "nothing of ours was lost: {reason}");
    assert_eq!(ledger(&world).await["tokens"]["refresh_attempts"], 1, "asking again does not help");
}

/// Somebody says that access was taken back, or nobody does, and it is we who have no good token: nothing is erased.
async fn lost(shape: Shape) {
    let settings = [("WEARSYNC_ON_DEAUTHORIZE", "delete")];
    let world = world(shape, Options { rotate: true, ..tiny(3) }, &settings).await;
    let db = &world.engine.db;
    let check_grant = SyncRequest { check_grant: true, ..SyncRequest::default() };
    assert_eq!(sync_with(&world, &SyncRequest::default()).await.run_state(), RunState::Success);
    let records = crate::oracle::number(db, "select count(*) from records").await;
    assert!(records > 0);
    let untouched = async |status: &str| {
        sync::keep_grants(&world.engine).await.unwrap();
        let connection = db.find_connection(world.connection).await.unwrap().unwrap();
        assert_eq!((connection.status.as_str(), account(&world).await.status.as_str()), ("active", status));
        assert_eq!(crate::oracle::number(db, "select count(*) from records").await, records);
        assert!(world.place.export_dir().join("strava").is_dir());
    };
    // The key of the vault is gone.
    let (elsewhere, key) = (world.place.dir.path().join("elsewhere"), "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=");
    let elsewhere = ("WEARSYNC_DATA_DIR", elsewhere.to_str().unwrap());
    let other = another(&world, &[settings[0], elsewhere, ("WEARSYNC_SECRET_KEY", key)]).await;
    let run = crate::oracle::finish(&other, world.accept(&check_grant).await).await;
    assert_eq!(run.run_state(), RunState::Failed);
    assert!(run.reason.as_deref().is_some_and(|why| why.contains("cannot be opened")), "{run:?}");
    untouched("active").await;
    // A token was lost on its way to us.
    die_refreshing(&world).await;
    spend(&world).await;
    forward(&world.clock, world.clock.now() + chrono::Duration::seconds(31));
    let run = sync_with(&world, &check_grant).await;
    assert_eq!(run.run_state(), RunState::Failed);
    assert!(run.reason.as_deref().is_some_and(|why| why.contains("rotation_lost")), "{run:?}");
    untouched("reauth").await;
    // The grant was taken away here, with the question on its way.
    world.connect(world.user, 0).await;
    assert_eq!(sync_with(&world, &SyncRequest::default()).await.run_state(), RunState::Success);
    let asked = world.accept(&check_grant).await;
    db.drop_grant(account(&world).await.id, "it turned out to be another person's", world.clock.now()).await.unwrap();
    let run = crate::oracle::finish(&world.engine, asked).await;
    assert!(run.reason.as_deref().is_some_and(|why| why.contains("another person's")), "{run:?}");
    untouched("reauth").await;
}

async fn wrong_secret(shape: Shape) {
    let world = world(shape, tiny(3), &[]).await;
    let wrong = another(&world, &[("WEARSYNC_PROVIDERS__STRAVA__CLIENT_SECRET", "wrong")]).await;
    let id = world.accept(&SyncRequest::default()).await;
    let run = crate::oracle::finish(&wrong, id).await;
    assert_eq!(run.run_state(), RunState::Failed);
    assert!(run.reason.as_deref().is_some_and(|reason| reason.contains("our application")), "{run:?}");
    let found = account(&world).await;
    assert_eq!((found.status.as_str(), found.refusals, found.refresh_owner), ("active", 0, None));
    assert_eq!(sync_with(&world, &SyncRequest::default()).await.run_state(), RunState::Success);
}

async fn endpoint_down(shape: Shape) {
    let world = world(shape, Options { rotate: true, ..tiny(3) }, &[]).await;
    faults(&world, &["500@token=1/1*1", "429@token=1/2*1", "503@token=1/3*1"]).await;
    assert_eq!(sync_with(&world, &SyncRequest::default()).await.run_state(), RunState::Success);
    assert!(calls(&ledger(&world).await, "token") >= 3);
    // For good: the run ends and says why, the grant lives.
    world.control("revoke", json!({ "athlete": 0, "access_only": true })).await;
    faults(&world, &["502@token=1/1"]).await;
    forward(&world.clock, world.clock.now() + chrono::Duration::hours(7));
    let run = sync_with(&world, &SyncRequest::default()).await;
    assert_eq!(run.run_state(), RunState::Failed, "{run:?}");
    assert!(run.reason.as_deref().is_some_and(|reason| reason.contains("502")), "{run:?}");
    let found = account(&world).await;
    assert_eq!((found.status.as_str(), found.refusals, found.refresh_owner), ("active", 0, None));
    faults(&world, &[]).await;
    assert_eq!(sync_with(&world, &SyncRequest::default()).await.run_state(), RunState::Success);
}

async fn other_app(shape: Shape) {
    let world = world(shape, tiny(3), &[]).await;
    let other = another(&world, &[("WEARSYNC_PROVIDERS__STRAVA__CLIENT_ID", "12345")]).await;
    let id = world.accept(&SyncRequest::default()).await;
    let run = crate::oracle::finish(&other, id).await;
    assert_eq!(run.run_state(), RunState::Failed);
    assert!(
        run.reason.as_deref().is_some_and(|reason| reason.contains("90417") && reason.contains("12345")),
        "{run:?}"
    );
    assert_eq!(account(&world).await.status, "active");
    assert_eq!(ledger(&world).await["tokens"]["refresh_attempts"], 0, "no token is shown to another application");
}

async fn pasted(shape: Shape) {
    let settings = [("STRAVA_REFRESH_TOKEN", "mistyped")];
    let world = world(shape, Options { rotate: true, ..tiny(3) }, &settings).await;
    assert_eq!(sync_with(&world, &SyncRequest::default()).await.run_state(), RunState::Success);
    let (engine, setup) = (&world.engine, world.engine.provider("strava").unwrap());
    let kept = || async {
        let connection = engine.db.find_connection(world.connection).await.unwrap().unwrap();
        let Account { status, refresh_token, token_version, refusals, imported_hash, .. } = account(&world).await;
        ((status, refresh_token, token_version), (refusals, imported_hash), (connection.status, connection.epoch))
    };
    let paste =
        async |token: &str| sync::connect_with_grant(engine, setup, world.user, &sync::secret(token), None, None).await;
    let before = kept().await;
    // Refused: nothing is given up for it, and a run at work goes on (the epoch is the same).
    let error = paste("mistyped").await.unwrap_err();
    assert!(matches!(&error, sync::Error::NotTaken(why) if why.contains("refused")), "{error}");
    assert_eq!((kept().await, account(&world).await.refresh_owner), (before.clone(), None));
    // From the settings: it is said, each time, and nothing stops.
    for _ in 0..2 {
        let told = sync::import_plain_settings(engine).await.unwrap();
        assert!(matches!(told.as_slice(), [one] if one.contains("was not taken")), "{told:?}");
    }
    assert_eq!(kept().await, before);
    // A provider that does not answer says nothing about it.
    faults(&world, &["502@token=1/1"]).await;
    let error = paste("mistyped").await.unwrap_err();
    assert!(matches!(&error, sync::Error::NotTaken(why) if why.contains("502")), "{error}");
    faults(&world, &[]).await;
    assert_eq!(kept().await, before);
    assert_eq!(sync_with(&world, &SyncRequest::default()).await.run_state(), RunState::Success);

    // A good one is spent once, what came for it is stored, and used for the next sync.
    let grant = world.control("grant", json!({ "athlete": 0 })).await;
    let good = grant["refresh_token"].as_str().unwrap();
    let attempts = async || ledger(&world).await["tokens"]["refresh_attempts"].as_u64().unwrap();
    let tried = attempts().await;
    assert_eq!(paste(good).await.unwrap(), world.connection);
    assert_eq!(attempts().await, tried + 1);
    let ((status, sealed, version), _, (_, epoch)) = kept().await;
    assert!(version > before.0.2 && epoch > before.2.1 && sealed.is_some() && sealed != before.0.1);
    assert_eq!((status.as_str(), account(&world).await.refresh_owner), ("active", None));
    assert_eq!(sync_with(&world, &SyncRequest::default()).await.run_state(), RunState::Success);
    assert_eq!(attempts().await, tried + 1, "the access token came along");
    let error = paste(good).await.unwrap_err();
    assert!(matches!(error, sync::Error::NotTaken(_)), "it was good once: {error}");
    forward(&world.clock, world.clock.now() + chrono::Duration::hours(7));
    assert_eq!(sync_with(&world, &SyncRequest::default()).await.run_state(), RunState::Success, "what came for it");
    assert_eq!(attempts().await, tried + 3);
    world.check().await;
}

/// What is said at a terminal, and the exit code.
async fn commands(shape: Shape) {
    let place = Place::new(shape).await;
    let sim = wearsync::simulator::start(tiny(3), Clock::system()).await.expect("the simulator starts");
    let env = place.env(&sim.url());
    let with = async |more: &[(&str, &str)], arguments: &[&str], stdin: &str| {
        let mut env = env.clone();
        env.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let arguments: Vec<String> = arguments.iter().map(|text| (*text).to_owned()).collect();
        let stdin = stdin.to_owned();
        let done = tokio::task::spawn_blocking(move || {
            command(&env, &arguments.iter().map(String::as_str).collect::<Vec<_>>(), &stdin)
        });
        done.await.unwrap()
    };
    let run = async |arguments: &[&str], stdin: &str| with(&[], arguments, stdin).await;
    if shape == Shape::Postgres {
        assert_eq!(run(&["migrate"], "").await.0, 0);
    }
    let http = crate::support::client();
    let control = async |path: &str| {
        crate::support::post(&http, &format!("{}/_simulator/{path}", sim.url()), &json!({ "athlete": 0 })).await
    };
    let (code, user, said) = run(&["users", "create"], "").await;
    assert_eq!(code, 0, "{said}");
    let (user, grant) = (user.trim(), control("grant").await);
    let add = ["connections", "add", "--provider", "strava", "--refresh-token-stdin", "--user", user];
    let (code, _, said) = run(&add, grant["refresh_token"].as_str().unwrap()).await;
    assert_eq!(code, 0, "{said}");
    let (code, _, said) = run(&["sync", "strava"], "").await;
    assert_eq!(code, 0, "{said}");
    let (code, connection, said) = run(&add, "mistyped\n").await;
    assert!(code == 1 && connection.is_empty() && said.contains("refused this refresh token"), "{code}: {said}");
    let (code, _, said) = with(&[("STRAVA_REFRESH_TOKEN", "mistyped")], &["sync", "strava"], "").await;
    assert!(code == 0 && said.contains("the token from the settings was not taken"), "{code}: {said}");
    let (code, listed, said) = run(&["gaps"], "").await;
    assert!(code == 0 && listed.contains("everything is covered"), "{code}: {listed}{said}");

    // The person takes it back.
    control("revoke").await;
    assert_eq!(run(&["sync", "strava", "--since", "0"], "").await.0, 4);
    let (code, listed, said) = run(&["gaps"], "").await;
    assert!(code == 4 && !listed.contains("everything is covered"), "{code}: {listed}{said}");
    let again = format!("`wearsync connect strava --user {user}`");
    assert!(said.contains("is read no more") && said.contains(&again), "{said}");
    let (code, listed, _) = run(&["--json", "gaps"], "").await;
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let lapsed = &listed["reauthorize"][0];
    assert!(said.contains(lapsed["connection_id"].as_str().unwrap()), "it is named: {lapsed}");
    assert_eq!((code, &lapsed["provider"]), (4, &json!("strava")));
    assert_eq!(run(&["connections", "remove", "--provider", "strava"], "").await.0, 0);
    let (code, _, said) = run(&["sync", "strava"], "").await;
    assert!(code == 4 && said.contains(&again), "{code}: {said}");
}
