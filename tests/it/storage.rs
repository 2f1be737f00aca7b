//! The rules of storage, one by one, on both databases.

use chrono::{DateTime, Duration, Utc};
use serde_json::json;
use wearsync::model::quota::Window as QuotaWindow;
use wearsync::model::{
    AccountId, BEGINNING_MS, Class, ConnectionId, Kind, Purpose, RunId, RunSource, RunState, Schedule, UserId, Window,
};
use wearsync::storage::{
    Accepted, Claim, Db, Error, Fence, NewAccount, NewApiKey, NewRun, NewUser, NewWindow, PageWrite, RefreshFailure,
    Refreshed, Run, RunFilter, Settle, UserFilter, WindowMove,
};

use crate::both;
use crate::oracle::{CONTENT, assert_same, dump, number, t0};
use crate::support::{Place, Shape};

both! {
    equal_requests_are_one_run => equal_requests;
    a_repeated_request_asks_for_another_look => again;
    runs_are_claimed_by_class => claim_order;
    one_run_works_on_a_connection => one_slot;
    an_expired_lease_is_claimed_with_a_higher_epoch => expired_lease;
    an_old_fence_is_refused => old_fence;
    a_page_that_was_overtaken_is_stale => stale_page;
    disconnect_ends_what_is_in_flight => disconnect;
    connecting_again_ends_what_is_in_flight => reconnect;
    erasing_a_user_in_mid_page => erase;
    cancelling_in_each_state => cancel;
    idempotency => idempotent;
    windows_merge => merging;
    an_open_window_is_found_again => open_again;
    one_process_refreshes => refresh_lease;
    api_keys_end => api_keys;
    users_are_found => users;
    a_quota_snapshot_is_kept => quota_snapshot;
    the_last_twenty_runs_stay => clean_up;
    attempts_count_since_the_last_page => attempts;
    leases_are_freed_by_the_only_worker => freed;
    one_exporter_per_user => export_lease;
}

struct Store {
    db: Db,
    user: UserId,
    account: AccountId,
    connection: ConnectionId,
    _place: Place,
}

fn s(seconds: i64) -> DateTime<Utc> {
    t0() + Duration::seconds(seconds)
}

async fn store(shape: Shape) -> Store {
    let place = Place::new(shape).await;
    let db = place.db().await;
    db.migrate().await.unwrap();
    let user = db.insert_user(NewUser::default(), t0()).await.unwrap().id;
    let (account, connection) = connect(&db, user, "1").await;
    Store { db, user, account, connection, _place: place }
}

async fn connect(db: &Db, user: UserId, person: &str) -> (AccountId, ConnectionId) {
    let new = NewAccount {
        id: AccountId::new(),
        provider: "strava".to_owned(),
        client_id: "c".to_owned(),
        provider_user_id: person.to_owned(),
        imported_hash: None,
    };
    let account = db.upsert_account(new, t0()).await.unwrap().id;
    db.store_grant(account, vec![1, 2, 3], t0()).await.unwrap();
    (account, db.connect(user, account, "strava", t0()).await.unwrap())
}

fn new_run(connection: ConnectionId, class: Class, key: &str) -> NewRun {
    NewRun { connection, class, source: RunSource::Pull, request: "{}".to_owned(), request_key: key.to_owned() }
}

impl Store {
    async fn accept(&self, class: Class, key: &str, at: DateTime<Utc>) -> Accepted {
        self.db.insert_run(new_run(self.connection, class, key), at).await.unwrap().expect("is active")
    }

    async fn claim(&self, id: RunId, at: DateTime<Utc>) -> Option<Claim> {
        self.db.claim_run(id, "worker", at, at + Duration::seconds(30)).await.unwrap()
    }

    /// A run in a worker's hands.
    async fn claimed(&self) -> Claim {
        let id = self.accept(Class::Interactive, "key", s(0)).await.id;
        self.claim(id, s(0)).await.expect("is free")
    }

    async fn run(&self, id: RunId) -> Run {
        self.db.find_run(id).await.unwrap().expect("is there")
    }

    async fn page(&self, fence: &Fence) -> Result<(), Error> {
        let state = self.db.load_page_state(fence.connection, &[(Kind::Workout, "x".to_owned())].into()).await?;
        let page = PageWrite { page_seq: state.page_seq, ..PageWrite::default() };
        self.db.commit_page(fence, &page, s(1), s(40)).await.map(|_| ())
    }
}

fn done() -> Settle {
    Settle::Final { state: RunState::Success, report: "{}".to_owned(), reason: None }
}

fn wait(due: DateTime<Utc>, attempt: bool) -> Settle {
    Settle::Wait {
        due,
        reason: "later".to_owned(),
        waiting_on: Some("quota".to_owned()),
        class: Class::Backfill,
        attempt,
        report: "{}".to_owned(),
    }
}

async fn equal_requests(shape: Shape) {
    let store = store(shape).await;
    let first = store.accept(Class::Schedule, "same", s(0)).await;
    let second = store.accept(Class::Backfill, "same", s(1)).await;
    assert_eq!((first.is_new, second.is_new, first.id), (true, false, second.id));
    assert_eq!(second.class, Class::Schedule, "a less urgent request does not slow it down");
    let third = store.accept(Class::Interactive, "same", s(2)).await;
    assert_eq!((third.id, third.class), (first.id, Class::Interactive), "a more urgent one speeds it up");
    assert!(!store.run(first.id).await.again, "it has not begun: it will see everything");
    assert!(store.accept(Class::Interactive, "other", s(3)).await.is_new);
    // A final run is history.
    let claim = store.claim(first.id, s(4)).await.unwrap();
    assert!(store.db.settle_run(&claim.fence, done(), s(5)).await.unwrap());
    assert!(store.accept(Class::Interactive, "same", s(6)).await.is_new);
    // Nothing is accepted for what is not connected.
    store.db.disconnect(store.user, "strava", s(7)).await.unwrap();
    let refused = store.db.insert_run(new_run(store.connection, Class::Interactive, "x"), s(8)).await.unwrap();
    assert_eq!(refused, None);
}

async fn again(shape: Shape) {
    let store = store(shape).await;
    let claim = store.claimed().await;
    assert!(!store.accept(Class::Interactive, "key", s(1)).await.is_new);
    assert!(store.run(claim.run.id).await.again);
    assert!(!store.db.settle_run(&claim.fence, done(), s(2)).await.unwrap(), "it is not final while somebody waits");
    assert!(store.db.is_wanted_again(&claim.fence).await.unwrap());
    store.db.take_again(&claim.fence, "{}").await.unwrap();
    assert!(!store.db.is_wanted_again(&claim.fence).await.unwrap());
    assert!(store.db.settle_run(&claim.fence, done(), s(3)).await.unwrap());

    // Waiting after a page: due at once, and one more look. Waiting without one: only due.
    for committed in [true, false] {
        let id = store.accept(Class::Interactive, "late", s(10)).await.id;
        let claim = store.claim(id, s(10)).await.unwrap();
        if committed {
            store.page(&claim.fence).await.unwrap();
        }
        store.db.settle_run(&claim.fence, wait(s(900), false), s(11)).await.unwrap();
        store.accept(Class::Interactive, "late", s(12)).await;
        let run = store.run(id).await;
        assert_eq!((run.again, run.due_at, run.class), (committed, s(12), 0), "{run:?}");
        store.db.cancel_run(id, s(13)).await.unwrap();
    }
}

async fn claim_order(shape: Shape) {
    let store = store(shape).await;
    let backfill = store.accept(Class::Backfill, "b", s(0)).await.id;
    let schedule = store.accept(Class::Schedule, "s", s(1)).await.id;
    let first = store.accept(Class::Interactive, "i", s(2)).await.id;
    let second = store.accept(Class::Interactive, "j", s(3)).await.id;
    let ready = store.db.list_ready(s(5), 10).await.unwrap();
    assert_eq!(ready.iter().map(|row| row.0).collect::<Vec<_>>(), [first, second, schedule, backfill]);
    for id in [second, schedule, backfill] {
        assert!(store.claim(id, s(5)).await.is_none(), "behind a more urgent one");
    }
    for id in [first, second, schedule, backfill] {
        let claim = store.claim(id, s(5)).await.expect("it is its turn");
        assert!(store.db.settle_run(&claim.fence, done(), s(6)).await.unwrap());
    }
    // What is due later is in nobody's way, and is not taken early.
    let later = store.accept(Class::Interactive, "later", s(100)).await.id;
    let now = store.accept(Class::Backfill, "now", s(7)).await.id;
    assert!(store.claim(later, s(8)).await.is_none());
    let claim = store.claim(now, s(8)).await.unwrap();
    assert_eq!(store.db.find_next_run(store.connection).await.unwrap().map(|row| row.0), Some(later));
    // At the page boundary it hears of the urgent one once that is due.
    let state = store.db.load_page_state(store.connection, &Default::default()).await.unwrap();
    let page = PageWrite { page_seq: state.page_seq, ..PageWrite::default() };
    assert!(!store.db.commit_page(&claim.fence, &page, s(9), s(40)).await.unwrap().give_way);
    let page = PageWrite { page_seq: state.page_seq + 1, ..PageWrite::default() };
    assert!(store.db.commit_page(&claim.fence, &page, s(101), s(140)).await.unwrap().give_way);
}

async fn one_slot(shape: Shape) {
    let store = store(shape).await;
    let claim = store.claimed().await;
    let urgent = store.accept(Class::Interactive, "urgent", s(1)).await.id;
    assert!(store.claim(urgent, s(2)).await.is_none(), "the slot is taken");
    assert!(store.db.list_ready(s(2), 10).await.unwrap().is_empty(), "nobody is told of it in vain");
    // Another connection's slot is its own.
    let user = store.db.insert_user(NewUser::default(), s(0)).await.unwrap().id;
    let (_, other) = connect(&store.db, user, "2").await;
    let id = store.db.insert_run(new_run(other, Class::Backfill, "o"), s(1)).await.unwrap().unwrap().id;
    assert!(store.claim(id, s(2)).await.is_some());
    store.db.settle_run(&claim.fence, done(), s(3)).await.unwrap();
    // Many at once: one wins.
    let race = (0..8).map(|_| store.db.claim_run(urgent, "worker", s(4), s(34)));
    let won = futures::future::join_all(race).await.into_iter().filter(|claim| matches!(claim, Ok(Some(_)))).count();
    assert_eq!(won, 1);
}

async fn expired_lease(shape: Shape) {
    let store = store(shape).await;
    let claim = store.claimed().await;
    assert!(store.claim(claim.run.id, s(29)).await.is_none());
    let next = store.claim(claim.run.id, s(31)).await.expect("the lease ran out");
    assert!(next.fence.run_epoch > claim.fence.run_epoch);
    assert_eq!(next.run.crashes, 1, "a holder that let its lease run out counts as dead");
    assert_eq!(store.db.list_ready(s(62), 10).await.unwrap().len(), 1);
    assert_eq!(store.db.renew_run(&next.fence, s(200)).await.unwrap(), Some(false));
    assert!(store.db.list_ready(s(62), 10).await.unwrap().is_empty());
}

async fn old_fence(shape: Shape) {
    let store = store(shape).await;
    let old = store.claimed().await.fence;
    let new = store.claim(old.run, s(31)).await.unwrap().fence;
    store.page(&new).await.unwrap();
    let before = dump(&store.db, &["runs", "windows", "connections"]).await;
    assert_eq!(store.db.renew_run(&old, s(99)).await.unwrap(), None);
    assert!(matches!(store.page(&old).await, Err(Error::Fenced)));
    assert!(matches!(store.db.take_again(&old, "{}").await, Err(Error::Fenced)));
    for settle in [done(), wait(s(99), true), Settle::Release { report: "{}".to_owned() }] {
        assert!(matches!(store.db.settle_run(&old, settle, s(32)).await, Err(Error::Fenced)));
    }
    let window = NewWindow { stream: "activities", purpose: Purpose::Cover, lo: 0, hi: 10 };
    assert!(matches!(store.db.open_window(&old, window, None).await, Err(Error::Fenced)));
    assert_same("an old fence", &before, &dump(&store.db, &["runs", "windows", "connections"]).await);
    store.page(&new).await.unwrap();
    assert!(store.db.settle_run(&new, done(), s(33)).await.unwrap());
    assert!(matches!(store.page(&new).await, Err(Error::Fenced)), "final states never change");
}

async fn stale_page(shape: Shape) {
    let store = store(shape).await;
    let fence = store.claimed().await.fence;
    let state = store.db.load_page_state(store.connection, &Default::default()).await.unwrap();
    store.page(&fence).await.unwrap();
    let page = PageWrite { page_seq: state.page_seq, ..PageWrite::default() };
    let before = dump(&store.db, &["runs", "connections"]).await;
    let refused = store.db.commit_page(&fence, &page, s(1), s(99)).await;
    assert!(matches!(refused, Err(Error::Stale)), "{refused:?}");
    assert_same("a stale page", &before, &dump(&store.db, &["runs", "connections"]).await);
    store.page(&fence).await.unwrap();
}

async fn disconnect(shape: Shape) {
    let store = store(shape).await;
    let claim = store.claimed().await;
    let waiting = store.accept(Class::Backfill, "waiting", s(1)).await.id;
    let ended = store.db.disconnect(store.user, "strava", s(2)).await.unwrap();
    assert_eq!(ended, Some(store.connection));
    assert!(matches!(store.page(&claim.fence).await, Err(Error::Fenced)));
    let window = NewWindow { stream: "activities", purpose: Purpose::Cover, lo: 0, hi: 10 };
    assert!(matches!(store.db.open_window(&claim.fence, window, None).await, Err(Error::Fenced)));
    let run = store.run(waiting).await;
    assert_eq!((run.run_state(), run.reason.as_deref()), (RunState::Cancelled, Some("disconnected")));
    assert!(store.run(claim.run.id).await.cancel_requested);
    let account = store.db.find_account(store.account).await.unwrap().unwrap();
    assert_eq!(account.refresh_token, None, "the last connection takes the grant with it");
    assert_eq!(store.db.disconnect(UserId::new(), "strava", s(3)).await.unwrap(), None);

    // With a second user on the same account the grant stays.
    let user = store.db.insert_user(NewUser::default(), s(0)).await.unwrap().id;
    store.db.connect(store.user, store.account, "strava", s(4)).await.unwrap();
    store.db.connect(user, store.account, "strava", s(4)).await.unwrap();
    store.db.store_grant(store.account, vec![9], s(4)).await.unwrap();
    store.db.disconnect(user, "strava", s(5)).await.unwrap();
    assert!(store.db.find_account(store.account).await.unwrap().unwrap().refresh_token.is_some());
}

async fn reconnect(shape: Shape) {
    let store = store(shape).await;
    let claim = store.claimed().await;
    let same = store.db.connect(store.user, store.account, "strava", s(1)).await.unwrap();
    assert_eq!(same, store.connection, "the connection is one and the same, with its data");
    assert!(matches!(store.page(&claim.fence).await, Err(Error::Fenced)));
    // Another person's account at the same provider: the old connection is kept, and read no more. Nor is there anything
    // left to do for it, and the user's own schedule goes over.
    let queued = store.accept(Class::Backfill, "queued", s(1)).await.id;
    let put_back = store.accept(Class::Interactive, "put back", s(1)).await.id;
    store.db.cancel_run(claim.run.id, s(1)).await.unwrap();
    store.db.settle_run(&claim.fence, done(), s(1)).await.unwrap();
    let held = store.claim(put_back, s(1)).await.expect("is free");
    store.db.settle_run(&held.fence, wait(s(60), false), s(1)).await.unwrap();
    let in_hand = store.accept(Class::Interactive, "in hand", s(1)).await.id;
    store.claim(in_hand, s(1)).await.expect("is free");
    let cron = Schedule::Cron("0 6 * * *".to_owned());
    assert!(store.db.set_schedule(store.connection, Some(&cron), s(500), s(1)).await.unwrap());
    let (_, other) = connect(&store.db, store.user, "somebody else").await;
    assert_ne!(other, store.connection);
    for id in [queued, put_back] {
        let run = store.run(id).await;
        let told = (run.run_state(), run.reason.as_deref());
        assert_eq!(told, (RunState::Cancelled, Some("another account was connected")));
        let event = store.db.find_last_run_event(id).await.unwrap().expect("an event");
        assert_eq!((event.stage.as_str(), event.status.as_str()), ("cancelled", "cancelled"));
    }
    let run = store.run(in_hand).await;
    assert!(run.run_state() == RunState::InProgress && run.cancel_requested);
    assert_eq!(store.db.find_schedule(other).await.unwrap().and_then(|row| row.own()), Some(cron));
    store.db.set_schedule(other, Some(&Schedule::Off), s(500), s(1)).await.unwrap();
    let (_, third) = connect(&store.db, store.user, "a third one").await;
    assert_eq!(store.db.find_schedule(third).await.unwrap().and_then(|row| row.own()), Some(Schedule::Off));
    store.db.set_schedule(third, None, s(500), s(1)).await.unwrap();
    let (_, other) = connect(&store.db, store.user, "somebody else").await;
    assert_eq!(store.db.find_schedule(other).await.unwrap().and_then(|row| row.own()), None);
    let old = store.db.find_connection(store.connection).await.unwrap().unwrap();
    assert_eq!(old.status, "replaced");
    let list = store.db.list_connections(Some(store.user)).await.unwrap();
    assert_eq!(list.iter().map(|row| row.connection.id).collect::<Vec<_>>(), [other]);
}

async fn erase(shape: Shape) {
    let store = store(shape).await;
    let claim = store.claimed().await;
    store.page(&claim.fence).await.unwrap();
    let state = store.db.load_page_state(store.connection, &Default::default()).await.unwrap();
    assert!(store.db.delete_user(store.user, &[], t0()).await.unwrap().is_some());
    let page = PageWrite { page_seq: state.page_seq, ..PageWrite::default() };
    let refused = store.db.commit_page(&claim.fence, &page, s(1), s(99)).await;
    assert!(matches!(refused, Err(Error::Fenced)), "{refused:?}");
    assert!(matches!(store.page(&claim.fence).await, Err(Error::Fenced)));
    assert!(matches!(store.db.settle_run(&claim.fence, done(), s(2)).await, Err(Error::Fenced)));
    assert!(store.claim(claim.run.id, s(99)).await.is_none());
    for table in CONTENT.iter().chain(&["users", "accounts", "connections", "windows", "runs"]) {
        assert_eq!(number(&store.db, &format!("select count(*) from {table}")).await, 0, "{table}");
    }
    assert!(store.db.delete_user(store.user, &[], t0()).await.unwrap().is_none());
}

async fn cancel(shape: Shape) {
    let store = store(shape).await;
    // Queued and waiting: at once.
    let queued = store.accept(Class::Interactive, "queued", s(0)).await.id;
    assert_eq!(store.db.cancel_run(queued, s(1)).await.unwrap().unwrap().run_state(), RunState::Cancelled);
    assert!(store.claim(queued, s(2)).await.is_none());
    let waiting = store.claimed().await;
    store.db.settle_run(&waiting.fence, wait(s(900), true), s(1)).await.unwrap();
    let run = store.db.cancel_run(waiting.run.id, s(2)).await.unwrap().unwrap();
    assert_eq!((run.run_state(), run.ended_at), (RunState::Cancelled, Some(s(2))));
    // In progress: asked for, and heard of at the page boundary and by the renewal.
    let running = store.claimed().await;
    let run = store.db.cancel_run(running.run.id, s(3)).await.unwrap().unwrap();
    assert_eq!((run.run_state(), run.cancel_requested), (RunState::InProgress, true));
    assert_eq!(store.db.renew_run(&running.fence, s(50)).await.unwrap(), Some(true));
    let state = store.db.load_page_state(store.connection, &Default::default()).await.unwrap();
    let page = PageWrite { page_seq: state.page_seq, ..PageWrite::default() };
    assert!(store.db.commit_page(&running.fence, &page, s(4), s(50)).await.unwrap().cancel);
    let settle = Settle::Final { state: RunState::Cancelled, report: "{}".to_owned(), reason: Some("so".to_owned()) };
    assert!(store.db.settle_run(&running.fence, settle, s(5)).await.unwrap());
    // Final: stays as it is. Unknown: nothing.
    let before = dump(&store.db, &["runs"]).await;
    assert_eq!(store.db.cancel_run(running.run.id, s(6)).await.unwrap().unwrap().ended_at, Some(s(5)));
    assert_same("cancelling what is final", &before, &dump(&store.db, &["runs"]).await);
    assert!(store.db.cancel_run(RunId::new(), s(6)).await.unwrap().is_none());
}

async fn key(db: &Db, hash: u8, expires_at: Option<DateTime<Utc>>) -> uuid::Uuid {
    let new = NewApiKey {
        hash: vec![hash; 32],
        prefix: "ws_abc".to_owned(),
        name: "test".to_owned(),
        scopes: "sync,read".to_owned(),
        created_by: None,
        expires_at,
    };
    db.insert_api_key(new, t0()).await.unwrap().id
}

async fn idempotent(shape: Shape) {
    let store = store(shape).await;
    let (one, two) = (key(&store.db, 1, None).await, key(&store.db, 2, None).await);
    let once = async |api_key, name: &str, hash: &[u8], request: &str, at| {
        let new = new_run(store.connection, Class::Interactive, request);
        store.db.insert_run_once(new, api_key, name, hash, at).await
    };
    let first = once(one, "k", b"hash", "a", s(0)).await.unwrap().unwrap();
    let claim = store.claim(first.id, s(1)).await.unwrap();
    store.db.settle_run(&claim.fence, done(), s(2)).await.unwrap();
    let same = once(one, "k", b"hash", "a", s(3)).await.unwrap().unwrap();
    assert_eq!((same.id, same.is_new), (first.id, false), "the same run, although it is final");
    let other = once(one, "k", b"another", "b", s(4)).await;
    assert!(matches!(&other, Err(Error::Duplicate { constraint }) if constraint == "idempotency"), "{other:?}");
    assert!(once(two, "k", b"another", "b", s(5)).await.unwrap().unwrap().is_new, "another key's words are its own");
    assert!(once(one, "k", b"hash", "a", s(86_401)).await.unwrap().unwrap().is_new, "a day later it is forgotten");
    // Joins an equal run, and remembers that one.
    let joined = store.accept(Class::Interactive, "joined", s(90_000)).await.id;
    assert_eq!(once(one, "j", b"hash", "joined", s(90_001)).await.unwrap().unwrap().id, joined);
    assert_eq!(once(one, "j", b"hash", "joined", s(90_002)).await.unwrap().unwrap().id, joined);
    // Refused requests use up no key.
    store.db.disconnect(store.user, "strava", s(90_003)).await.unwrap();
    assert_eq!(once(one, "r", b"hash", "r", s(90_004)).await.unwrap(), None);
    assert_eq!(number(&store.db, "select count(*) from idempotency where key = 'r'").await, 0);
    // At once: one run for all.
    store.db.connect(store.user, store.account, "strava", s(90_005)).await.unwrap();
    let all = (0..6).map(|_| once(one, "race", b"hash", "race", s(90_006)));
    let ids: std::collections::BTreeSet<_> =
        futures::future::join_all(all).await.into_iter().map(|row| row.unwrap().unwrap().id).collect();
    assert_eq!(ids.len(), 1);
}

impl Store {
    async fn open(&self, fence: &Fence, purpose: Purpose, lo: i64, hi: i64) -> Window {
        self.db.open_window(fence, NewWindow { stream: "activities", purpose, lo, hi }, None).await.unwrap()
    }

    async fn close(&self, fence: &Fence, window: &Window, proves: Option<(i64, i64)>) {
        let state = self.db.load_page_state(self.connection, &Default::default()).await.unwrap();
        let moved = WindowMove { window: window.clone(), stream: "activities", position: None, proves };
        let page = PageWrite { page_seq: state.page_seq, window: Some(moved), ..PageWrite::default() };
        self.db.commit_page(fence, &page, s(1), s(99)).await.unwrap();
    }

    async fn covers(&self) -> Vec<(String, i64, i64)> {
        let rows = self.db.list_windows(self.connection).await.unwrap();
        let mut list: Vec<_> =
            rows.into_iter().filter(|row| row.purpose == "cover").map(|row| (row.state, row.lo, row.hi)).collect();
        list.sort();
        list
    }
}

fn done_at(list: &[(i64, i64)]) -> Vec<(String, i64, i64)> {
    list.iter().map(|(lo, hi)| ("done".to_owned(), *lo, *hi)).collect()
}

async fn merging(shape: Shape) {
    let store = store(shape).await;
    let fence = store.claimed().await.fence;
    let cover = async |lo, hi| {
        let window = store.open(&fence, Purpose::Cover, lo, hi).await;
        store.close(&fence, &window, Some((lo, hi))).await;
    };
    cover(100, 200).await;
    cover(300, 400).await;
    assert_eq!(store.covers().await, done_at(&[(100, 200), (300, 400)]), "apart stays apart");
    cover(200, 250).await;
    assert_eq!(store.covers().await, done_at(&[(100, 250), (300, 400)]), "touching becomes one");
    cover(120, 180).await;
    assert_eq!(store.covers().await, done_at(&[(100, 250), (300, 400)]), "contained changes nothing");
    cover(240, 310).await;
    assert_eq!(store.covers().await, done_at(&[(100, 400)]), "a bridge makes three one");
    cover(BEGINNING_MS, 500).await;
    assert_eq!(store.covers().await, done_at(&[(BEGINNING_MS, 500)]));
    // Reading again proves what it read; without a proof it covers nothing.
    let reread = store.open(&fence, Purpose::Reread, 450, 600).await;
    store.close(&fence, &reread, Some((450, 600))).await;
    assert_eq!(store.covers().await, done_at(&[(BEGINNING_MS, 600)]));
    let reread = store.open(&fence, Purpose::Reread, 700, 800).await;
    store.close(&fence, &reread, None).await;
    assert_eq!(store.covers().await, done_at(&[(BEGINNING_MS, 600)]));
    // An open window is never merged: it is not read yet.
    let open = store.open(&fence, Purpose::Cover, 550, 900).await;
    assert_eq!(store.covers().await.len(), 2);
    cover(580, 650).await;
    assert_eq!(store.covers().await, [done_at(&[(BEGINNING_MS, 650)]), vec![("open".to_owned(), 550, 900)]].concat());
    store.close(&fence, &open, Some((550, 900))).await;
    assert_eq!(store.covers().await, done_at(&[(BEGINNING_MS, 900)]));
    // An open window that begins where the one just read does: what is read is covered, its rest stays open.
    let open = store.open(&fence, Purpose::Cover, 2000, 3000).await;
    let reread = store.open(&fence, Purpose::Reread, 2000, 2500).await;
    store.close(&fence, &reread, Some((2000, 2500))).await;
    let rest = [done_at(&[(BEGINNING_MS, 900), (2000, 2500)]), vec![("open".to_owned(), 2500, 3000)]].concat();
    assert_eq!(store.covers().await, rest);
    store.close(&fence, &open, Some((2000, 3000))).await;
    assert_eq!(store.covers().await, done_at(&[(BEGINNING_MS, 900), (2000, 3000)]));
    // A first sync that waits, a head that is done, and everything read again meanwhile: nothing stays open, and no
    // coverage is lost.
    let first = store.open(&fence, Purpose::Cover, 5000, 6000).await;
    cover(5900, 7000).await;
    let reread = store.open(&fence, Purpose::Reread, 5000, 7100).await;
    store.close(&fence, &reread, Some((5000, 7100))).await;
    assert_eq!(store.covers().await, done_at(&[(BEGINNING_MS, 900), (2000, 3000), (5000, 7100)]));
    // Whoever still reads the window that was open meanwhile harms nothing.
    store.close(&fence, &first, Some((5000, 6000))).await;
    assert_eq!(store.covers().await, done_at(&[(BEGINNING_MS, 900), (2000, 3000), (5000, 7100)]));
}

async fn open_again(shape: Shape) {
    let store = store(shape).await;
    let fence = store.claimed().await.fence;
    let window = store.open(&fence, Purpose::Cover, 100, 200).await;
    let state = store.db.load_page_state(store.connection, &Default::default()).await.unwrap();
    let position = Some(json!({"before": 7}));
    let moved = WindowMove { window: window.clone(), stream: "activities", position: position.clone(), proves: None };
    let page = PageWrite { page_seq: state.page_seq, window: Some(moved), ..PageWrite::default() };
    store.db.commit_page(&fence, &page, s(1), s(99)).await.unwrap();
    // The same place while it is open: the same window with its position and its bounds.
    let same = store.open(&fence, Purpose::Cover, 100, 999).await;
    assert_eq!((same.id, same.hi, same.position), (window.id, 200, position));
    store.close(&fence, &window, Some((100, 200))).await;
    // The same place when it is done: it is read again, without giving up what is covered.
    let again = store.open(&fence, Purpose::Cover, 100, 300).await;
    assert_eq!(again.purpose, Purpose::Reread);
    assert_eq!(store.covers().await, done_at(&[(100, 200)]));
    // A reread that is open is found again by both bounds.
    let reread = store.open(&fence, Purpose::Reread, 100, 300).await;
    assert_eq!(reread.id, again.id);
    assert_ne!(store.open(&fence, Purpose::Reread, 100, 301).await.id, again.id);
    // Why it does not move is told until it does.
    store.db.note_window_error(again.id, "a reason").await.unwrap();
    let rows = store.db.list_windows(store.connection).await.unwrap();
    assert!(rows.iter().any(|row| row.last_error.as_deref() == Some("a reason")));
}

fn brings(sealed: Option<Vec<u8>>) -> Refreshed {
    Refreshed { sealed, ..Refreshed::default() }
}

async fn refresh_lease(shape: Shape) {
    let store = store(shape).await;
    let (db, id) = (&store.db, store.account);
    let version = db.find_account(id).await.unwrap().unwrap().token_version;
    let lease = db.take_refresh_lease(id, version, "a", s(0), s(30)).await.unwrap().expect("is free");
    assert!(!lease.interrupted);
    assert!(db.take_refresh_lease(id, version, "b", s(1), s(31)).await.unwrap().is_none(), "one at a time");
    assert!(db.store_refresh(id, version, "a", brings(Some(vec![7])), s(2)).await.unwrap());
    assert!(!db.store_refresh(id, version, "a", brings(Some(vec![8])), s(2)).await.unwrap(), "the version moved on");
    assert!(db.take_refresh_lease(id, version, "b", s(3), s(33)).await.unwrap().is_none(), "and is spent");
    let account = db.find_account(id).await.unwrap().unwrap();
    assert_eq!((account.token_version, account.refresh_token), (version + 1, Some(vec![7])));
    // A holder that died is told of.
    let version = version + 1;
    db.take_refresh_lease(id, version, "dead", s(4), s(34)).await.unwrap().unwrap();
    assert!(db.take_refresh_lease(id, version, "b", s(34), s(64)).await.unwrap().is_none());
    let lease = db.take_refresh_lease(id, version, "b", s(35), s(65)).await.unwrap().expect("ran out");
    assert!(lease.interrupted);
    // Late answers of the dead one change nothing; an answer without a new refresh token keeps the old one.
    assert!(!db.store_refresh(id, version, "dead", brings(Some(vec![6])), s(36)).await.unwrap());
    assert!(db.store_refresh(id, version, "b", brings(None), s(37)).await.unwrap());
    let account = db.find_account(id).await.unwrap().unwrap();
    assert_eq!((account.refresh_token, account.refresh_owner), (Some(vec![7]), None));
    // Failures give the lease back, and count only refusals.
    let version = version + 1;
    for (failure, count) in [(RefreshFailure::Unspent, 0), (RefreshFailure::Refused, 1), (RefreshFailure::Refused, 2)] {
        let lease = db.take_refresh_lease(id, version, "c", s(40), s(70)).await.unwrap().expect("was given back");
        assert!(!lease.interrupted);
        db.fail_refresh(id, version, "c", failure, s(41)).await.unwrap();
        let account = db.find_account(id).await.unwrap().unwrap();
        assert_eq!((account.refusals, account.status.as_str()), (count, "active"));
    }
    // Where no whole answer came, the token may be spent, and whoever comes next is told.
    db.take_refresh_lease(id, version, "c", s(42), s(72)).await.unwrap().unwrap();
    db.fail_refresh(id, version, "c", RefreshFailure::MaybeSpent, s(43)).await.unwrap();
    let lease = db.take_refresh_lease(id, version, "d", s(44), s(74)).await.unwrap().expect("was given back");
    assert!(lease.interrupted);
    db.fail_refresh(id, version, "d", RefreshFailure::Unspent, s(45)).await.unwrap();
    db.take_refresh_lease(id, version, "c", s(50), s(80)).await.unwrap().unwrap();
    db.fail_refresh(id, version, "c", RefreshFailure::Dead("over"), s(51)).await.unwrap();
    let account = db.find_account(id).await.unwrap().unwrap();
    assert_eq!((account.status.as_str(), account.reason.as_deref()), ("reauth", Some("over")));
    assert_eq!(account.refused_since, Some(s(41)), "since the first of them");
    // A person who connects again revives it.
    db.store_grant(id, vec![5], s(60)).await.unwrap();
    let account = db.find_account(id).await.unwrap().unwrap();
    assert_eq!((account.status.as_str(), account.refusals, account.reason), ("active", 0, None));
    // What ends by our own doing was not refused, whatever was before.
    let version = account.token_version;
    for (failure, refusals) in [(RefreshFailure::Refused, 1), (RefreshFailure::Lost("gone"), 0)] {
        db.take_refresh_lease(id, version, "e", s(61), s(90)).await.unwrap().expect("is free");
        db.fail_refresh(id, version, "e", failure, s(62)).await.unwrap();
        assert_eq!(db.find_account(id).await.unwrap().unwrap().refusals, refusals);
    }
    let account = db.find_account(id).await.unwrap().unwrap();
    assert_eq!((account.status.as_str(), account.reason.as_deref()), ("reauth", Some("gone")));
}

async fn api_keys(shape: Shape) {
    let store = store(shape).await;
    let id = key(&store.db, 1, Some(s(100))).await;
    let found = store.db.find_api_key(&[1; 32]).await.unwrap().expect("is there");
    assert_eq!(found.id, id);
    assert!(found.is_valid(s(99)) && !found.is_valid(s(100)));
    assert!(found.allows("sync") && found.allows("read") && !found.allows("admin"));
    assert!(store.db.find_api_key(&[9; 32]).await.unwrap().is_none());
    assert!(store.db.revoke_api_key(id, s(10)).await.unwrap().is_some());
    assert!(store.db.revoke_api_key(id, s(20)).await.unwrap().is_none(), "of two calls one finds it");
    let found = store.db.find_api_key(&[1; 32]).await.unwrap().unwrap();
    assert_eq!((found.revoked_at, found.is_valid(s(11))), (Some(s(10)), false));
    assert!(store.db.revoke_api_key(uuid::Uuid::now_v7(), s(10)).await.unwrap().is_none());
    store.db.touch_api_key(id, s(60)).await.unwrap();
    assert_eq!(store.db.list_api_keys().await.unwrap()[0].last_used_at, Some(s(60)));
    // One look-up tells everything of a request.
    let access = store.db.find_access(None, Some(&[1; 32]), store.user, "strava").await.unwrap();
    assert_eq!(access.key.map(|key| key.id), Some(id));
    assert_eq!(access.target.map(|target| target.connection_id), Some(store.connection));
    let access = store.db.find_access(None, Some(&[9; 32]), UserId::new(), "strava").await.unwrap();
    assert!(access.key.is_none() && !access.user_exists && access.target.is_none());
}

async fn users(shape: Shape) {
    let store = store(shape).await;
    let add = async |external: &str, first: &str, email: Option<&str>, at| {
        let new = NewUser {
            external_user_id: Some(external.to_owned()),
            first_name: Some(first.to_owned()),
            last_name: None,
            email: email.map(str::to_owned),
        };
        store.db.insert_user(new, at).await
    };
    let percent = add("e1", "100%", Some("a_b@example.org"), s(1)).await.unwrap();
    add("e2", "1000", Some("axb@example.org"), s(2)).await.unwrap();
    add("e3", "Zoë", None, s(3)).await.unwrap();
    assert_eq!(add("e1", "other", None, s(4)).await.unwrap().id, percent.id, "an external id is one user");
    let taken = add("e4", "x", Some("axb@example.org"), s(5)).await;
    assert!(matches!(taken, Err(Error::Duplicate { .. })), "{taken:?}");
    let names = async |filter: UserFilter| {
        let page = store.db.list_users(&filter).await.unwrap();
        let names: Vec<_> =
            page.rows.into_iter().map(|row| row.user.external_user_id.unwrap_or_else(|| "-".to_owned())).collect();
        (names.join(" "), page.total)
    };
    let base = UserFilter { sort_by: "created_at", limit: 10, ..UserFilter::default() };
    let search = |text: &str| UserFilter { search: Some(text.to_owned()), ..base.clone() };
    assert_eq!(names(base.clone()).await, ("- e1 e2 e3".to_owned(), 4));
    assert_eq!(names(UserFilter { descending: true, ..base.clone() }).await.0, "e3 e2 e1 -");
    assert_eq!(names(UserFilter { limit: 2, offset: 1, ..base.clone() }).await, ("e1 e2".to_owned(), 4));
    assert_eq!(names(search("0%")).await.0, "e1", "% is a letter");
    assert_eq!(names(search("a_b")).await.0, "e1", "_ is a letter");
    assert_eq!(names(search("EXAMPLE")).await.0, "e1 e2");
    assert_eq!(names(search("\\")).await.1, 0);
    assert_eq!(names(UserFilter { email: Some("axb@example.org".to_owned()), ..base.clone() }).await.0, "e2");
    assert_eq!(names(UserFilter { external_user_id: Some("e3".to_owned()), ..base.clone() }).await.0, "e3");
    assert_eq!(
        names(UserFilter { sort_by: "email", descending: true, ..base.clone() }).await.0.split(' ').next(),
        Some("e2")
    );
    store.db.touch_connection(store.connection, s(50)).await.unwrap();
    let page = store.db.list_users(&UserFilter { sort_by: "last_synced_at", descending: true, ..base }).await.unwrap();
    assert_eq!((page.rows[0].user.id, page.rows[0].last_synced_at), (store.user, Some(s(50))));
    assert!(page.rows[0].has_active_connection && !page.rows[1].has_active_connection);
    assert_eq!(page.rows[0].last_synced_provider.as_deref(), Some("strava"));
    let changed = store.db.update_user(percent.id, NewUser { last_name: Some("L".to_owned()), ..NewUser::default() });
    let changed = changed.await.unwrap().unwrap();
    assert_eq!((changed.first_name.as_deref(), changed.last_name.as_deref()), (Some("100%"), Some("L")));
}

async fn quota_snapshot(shape: Shape) {
    let store = store(shape).await;
    let window = |used| QuotaWindow { used, limit: 100, resets_at_ms: 900_000 };
    assert!(store.db.load_quota("strava:c").await.unwrap().is_empty());
    store
        .db
        .save_quota("strava:c", &[("15m".to_owned(), window(5)), ("1d".to_owned(), window(6))], s(0))
        .await
        .unwrap();
    store.db.save_quota("strava:c", &[("15m".to_owned(), window(7))], s(1)).await.unwrap();
    store.db.save_quota("strava:other", &[("15m".to_owned(), window(1))], s(1)).await.unwrap();
    let mut found = store.db.load_quota("strava:c").await.unwrap();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(found, [("15m".to_owned(), window(7)), ("1d".to_owned(), window(6))]);
}

async fn clean_up(shape: Shape) {
    let store = store(shape).await;
    let mut ids = Vec::new();
    for n in 0..25 {
        let id = store.accept(Class::Interactive, &format!("k{n}"), s(n)).await.id;
        let claim = store.claim(id, s(n)).await.unwrap();
        store.db.settle_run(&claim.fence, done(), s(n)).await.unwrap();
        ids.push(id);
    }
    let open = store.accept(Class::Interactive, "open", s(26)).await.id;
    store.db.clean_up(s(89 * 86_400)).await.unwrap();
    let all = RunFilter { limit: 100, ..RunFilter::default() };
    assert_eq!(store.db.list_runs(&all).await.unwrap().len(), 26, "nothing is older than 90 days");
    store.db.clean_up(s(91 * 86_400)).await.unwrap();
    let left: Vec<_> = store.db.list_runs(&all).await.unwrap().into_iter().map(|run| run.id).collect();
    assert_eq!(left.len(), 20, "the last 20 stay");
    assert!(left.contains(&open) && left.contains(&ids[24]) && !left.contains(&ids[0]));
    // Pages of a list go on behind the last one seen.
    let page =
        store.db.list_runs(&RunFilter { before: Some(left[3]), limit: 2, ..RunFilter::default() }).await.unwrap();
    assert_eq!(page.iter().map(|run| run.id).collect::<Vec<_>>(), left[4..6]);
    let filter = RunFilter { state: Some(RunState::Queued), user: Some(store.user), limit: 9, ..RunFilter::default() };
    assert_eq!(store.db.list_runs(&filter).await.unwrap().len(), 1);
}

async fn attempts(shape: Shape) {
    let store = store(shape).await;
    let id = store.claimed().await.run.id;
    let claim = store.claim(id, s(31)).await.unwrap();
    assert!(store.db.settle_run(&claim.fence, wait(s(32), true), s(32)).await.unwrap());
    let run = store.run(id).await;
    assert_eq!((run.attempts, run.crashes, run.class), (1, 1, 3));
    assert_eq!((run.run_state(), run.waiting_on.as_deref()), (RunState::Waiting, Some("quota")));
    let claim = store.claim(id, s(33)).await.unwrap();
    assert_eq!(claim.run.crashes, 1, "put back is not dead");
    assert_eq!((claim.run.reason, claim.run.waiting_on), (None, None));
    store.page(&claim.fence).await.unwrap();
    let run = store.run(id).await;
    assert_eq!((run.attempts, run.crashes, run.committed), (0, 0, 1), "a page begins the count anew");
    let release = Settle::Release { report: "{}".to_owned() };
    assert!(store.db.settle_run(&claim.fence, release, s(34)).await.unwrap());
    let run = store.run(id).await;
    assert_eq!((run.run_state(), run.attempts, run.crashes), (RunState::Queued, 0, 0));
    assert!(store.claim(id, s(35)).await.is_some(), "at once");
}

async fn freed(shape: Shape) {
    let store = store(shape).await;
    let claim = store.claimed().await;
    let version = store.db.find_account(store.account).await.unwrap().unwrap().token_version;
    store.db.take_refresh_lease(store.account, version, "dead", s(0), s(30)).await.unwrap().unwrap();
    store.db.take_export_lease(store.user, "dead", s(0), s(30)).await.unwrap().unwrap();
    assert_eq!(store.db.free_leases(s(2)).await.unwrap(), 1);
    let again = store.claim(claim.run.id, s(2)).await.expect("free");
    assert_eq!(again.run.crashes, 1, "a lease freed at start counts as a crash");
    let lease = store.db.take_refresh_lease(store.account, version, "b", s(2), s(30)).await.unwrap().expect("free");
    assert!(lease.interrupted, "a token may be lost with its holder");
    assert!(store.db.take_export_lease(store.user, "b", s(2), s(30)).await.unwrap().is_some());
}

async fn export_lease(shape: Shape) {
    let store = store(shape).await;
    let first = store.db.take_export_lease(store.user, "a", s(0), s(30)).await.unwrap().expect("is free");
    assert!(store.db.take_export_lease(store.user, "b", s(1), s(31)).await.unwrap().is_none());
    let renewed = store.db.take_export_lease(store.user, "a", s(10), s(40)).await.unwrap().expect("is ours");
    assert!(renewed > first);
    store.db.release_export_lease(store.user, first, s(11)).await.unwrap();
    assert!(
        store.db.take_export_lease(store.user, "b", s(12), s(42)).await.unwrap().is_none(),
        "an old epoch frees nothing"
    );
    store.db.release_export_lease(store.user, renewed, s(12)).await.unwrap();
    assert!(store.db.take_export_lease(store.user, "b", s(13), s(43)).await.unwrap().is_some());
    assert!(store.db.take_export_lease(UserId::new(), "b", s(13), s(43)).await.unwrap().is_none(), "nobody's files");
}
