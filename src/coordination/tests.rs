//! One suite over both stores, and the scripts against the pure functions.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use tokio::time::timeout;

use super::*;
use crate::model::{DeliveryId, RunId};

const QUARTER: i64 = 900_000;

/// A store of its own per test, and what is left of it goes away.
struct Store {
    coordination: Coordination,
    prefix: String,
}

fn redis_url() -> String {
    std::env::var("TEST_REDIS_URL").unwrap_or_else(|_| "redis://127.0.0.1:6379".to_owned())
}

/// The same server by another address; user and password stay.
fn through_url(address: impl std::fmt::Display) -> String {
    let mut url = url::Url::parse(&redis_url()).unwrap();
    let address = address.to_string();
    let (host, port) = address.rsplit_once(':').unwrap();
    url.set_host(Some(host)).unwrap();
    url.set_port(port.parse().ok()).unwrap();
    url.to_string()
}

fn both() -> [Store; 2] {
    let prefix = format!("wearsync-test-{}", uuid::Uuid::new_v4());
    let shared = Shared::new(&redis_url(), &prefix).unwrap();
    [
        Store { coordination: Coordination::local(), prefix: String::new() },
        Store { coordination: Coordination::Redis(shared), prefix },
    ]
}

impl Drop for Store {
    fn drop(&mut self) {
        if self.prefix.is_empty() {
            return;
        }
        let mut connection = ::redis::Client::open(redis_url()).unwrap().get_connection().unwrap();
        let pattern = format!("{{{}}}:*", self.prefix);
        let keys: Vec<String> = ::redis::cmd("KEYS").arg(pattern).query(&mut connection).unwrap();
        for key in keys {
            let () = ::redis::cmd("DEL").arg(key).query(&mut connection).unwrap();
        }
    }
}

fn id(n: u128) -> Job {
    // Both kinds go the same way; which goes first of two that are due at once is nobody's business.
    let id = uuid::Uuid::from_u128(n);
    if n == 4 { Job::Delivery(DeliveryId(id)) } else { Job::Run(RunId(id)) }
}

#[tokio::test]
async fn ready_runs_come_by_class_then_due_then_id_and_only_when_due() {
    for store in both() {
        let c = &store.coordination;
        assert_eq!(c.pop(i64::MAX >> 11).await.unwrap(), None);
        for (n, class, due) in [
            (1, Class::Backfill, 0),
            (3, Class::Schedule, 5),
            (2, Class::Schedule, 5),
            (4, Class::Schedule, 4),
            (5, Class::Interactive, 100),
        ] {
            c.push(id(n), class, due).await.unwrap();
        }
        let mut popped = Vec::new();
        for now in [5, 5, 100, 100, 100, 100] {
            popped.push(c.pop(now).await.unwrap());
        }
        assert_eq!(popped, [Some(id(4)), Some(id(2)), Some(id(5)), Some(id(3)), Some(id(1)), None]);
    }
}

#[tokio::test]
async fn pushing_again_moves() {
    for store in both() {
        let c = &store.coordination;
        c.push(id(1), Class::Backfill, 0).await.unwrap();
        c.push(id(2), Class::Schedule, 0).await.unwrap();
        c.push(id(1), Class::Interactive, 0).await.unwrap();
        c.push(id(1), Class::Interactive, 0).await.unwrap();
        let popped = [c.pop(0).await.unwrap(), c.pop(0).await.unwrap(), c.pop(0).await.unwrap()];
        assert_eq!(popped, [Some(id(1)), Some(id(2)), None]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_push_is_popped_once_by_many() {
    for store in both() {
        let c = store.coordination.clone();
        for n in 0..200 {
            c.push(id(n), Class::ALL[(n % 4) as usize], 0).await.unwrap();
        }
        let workers = (0..8).map(|_| {
            let c = c.clone();
            tokio::spawn(async move {
                let mut mine = Vec::new();
                while let Some(id) = c.pop(0).await.unwrap() {
                    mine.push(id);
                }
                mine
            })
        });
        let mut all: Vec<Job> = Vec::new();
        for worker in workers.collect::<Vec<_>>() {
            all.extend(worker.await.unwrap());
        }
        all.sort();
        let mut pushed: Vec<Job> = (0..200).map(id).collect();
        pushed.sort();
        assert_eq!(all, pushed);
    }
}

#[tokio::test]
async fn a_push_wakes_who_waits() {
    for store in both() {
        let waiting = store.coordination.ready_notify();
        store.coordination.push(id(1), Class::Interactive, 0).await.unwrap();
        timeout(Duration::from_secs(5), waiting.notified()).await.unwrap();
    }
}

#[tokio::test]
async fn a_push_wakes_other_processes() {
    let [_, store] = both();
    let other = Shared::new(&redis_url(), &store.prefix).unwrap();
    let waiting = other.ready_notify();
    // The first one says that the channel is open.
    timeout(Duration::from_secs(5), waiting.notified()).await.unwrap();
    store.coordination.push(id(1), Class::Interactive, 0).await.unwrap();
    timeout(Duration::from_secs(5), waiting.notified()).await.unwrap();
    assert_eq!(other.pop(0).await.unwrap(), Some(id(1)));
}

#[tokio::test]
async fn an_unknown_key_is_restored_before_it_grants() {
    let quotas = quota::parse("10/15m,20/1d").unwrap();
    for store in both() {
        let c = &store.coordination;
        assert_eq!(c.take("k", &quotas, Class::Interactive, 1, 0).await.unwrap(), Taken::Unknown);
        c.observe("k", &quotas, &[Seen { name: "15m", used: 3, limit: 10 }], 0).await.unwrap();
        assert_eq!(c.refused("k", &quotas, 0).await.unwrap(), QUARTER);
        assert_eq!(c.windows("k", &quotas, 0).await.unwrap(), vec![], "still unknown");

        let day = Window { used: 19, limit: 30, resets_at_ms: 96 * QUARTER };
        let over = Window { used: 9, limit: 12, resets_at_ms: 0 };
        c.restore("k", &quotas, &[("1d".into(), day), ("15m".into(), over), ("x".into(), day)], 1).await.unwrap();
        let fresh = Window { used: 0, limit: 12, resets_at_ms: QUARTER };
        assert_eq!(c.windows("k", &quotas, 1).await.unwrap(), [fresh, day]);
        // Another process restores an older snapshot: nothing sinks.
        c.restore("k", &quotas, &[("1d".into(), Window { used: 2, limit: 5, ..day })], 1).await.unwrap();
        assert_eq!(c.windows("k", &quotas, 1).await.unwrap(), [fresh, day]);

        assert_eq!(c.take("k", &quotas, Class::Backfill, 1, 1).await.unwrap(), Taken::Granted { left: 4 });
        assert_eq!(c.take("other", &quotas, Class::Backfill, 1, 1).await.unwrap(), Taken::Unknown);
    }
}

#[tokio::test]
async fn no_quota_grants_everything() {
    for store in both() {
        let c = &store.coordination;
        assert_eq!(c.take("k", &[], Class::Backfill, 9, 0).await.unwrap(), Taken::Granted { left: u64::MAX });
        c.restore("k", &[], &[], 0).await.unwrap();
        c.observe("k", &[], &[], 0).await.unwrap();
        assert_eq!(c.refused("k", &[], 7).await.unwrap(), 7);
        assert_eq!(c.windows("k", &[], 0).await.unwrap(), vec![]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_takers_never_get_more_than_there_is() {
    let quotas = quota::parse("100/15m").unwrap();
    for store in both() {
        let c = store.coordination.clone();
        c.restore("k", &quotas, &[], 0).await.unwrap();
        let takers = (0..8).map(|_| {
            let (c, quotas) = (c.clone(), quotas.clone());
            tokio::spawn(async move {
                let mut got = 0;
                while let Taken::Granted { .. } = c.take("k", &quotas, Class::Interactive, 1, 5).await.unwrap() {
                    got += 1;
                }
                got
            })
        });
        let mut got = 0;
        for taker in takers.collect::<Vec<_>>() {
            got += taker.await.unwrap();
        }
        assert_eq!(got, 100);
    }
}

#[tokio::test]
async fn tokens_last_as_long_as_they_do_and_only_grow() {
    for store in both() {
        let c = &store.coordination;
        let account = AccountId::new();
        assert_eq!(c.cached_token(account, 0).await.unwrap(), None);
        c.cache_token(account, 2, vec![0, 255, 7], 60_000, 0).await.unwrap();
        c.cache_token(account, 1, vec![1], 60_000, 0).await.unwrap();
        assert_eq!(c.cached_token(account, 59_999).await.unwrap(), Some((2, vec![0, 255, 7])));
        assert_eq!(c.cached_token(account, 60_000).await.unwrap(), None, "over");
        assert_eq!(c.cached_token(AccountId::new(), 0).await.unwrap(), None, "another account");
        c.forget_token(account, 1).await.unwrap();
        assert!(c.cached_token(account, 0).await.unwrap().is_some(), "another version");
        c.forget_token(account, 2).await.unwrap();
        assert_eq!(c.cached_token(account, 0).await.unwrap(), None);
        c.cache_token(account, 3, vec![3], 5, 5).await.unwrap();
        assert_eq!(c.cached_token(account, 0).await.unwrap(), None, "was over when it came");
        c.cache_token(account, 9, vec![9], 60_000, 0).await.unwrap();
        c.cache_token(account, 1, vec![1], 180_000, 120_000).await.unwrap();
        assert_eq!(c.cached_token(account, 120_000).await.unwrap(), Some((1, vec![1])), "an ended one gives way");
    }
}

#[tokio::test]
async fn events_reach_the_listeners_of_their_user() {
    for store in both() {
        let c = &store.coordination;
        let (user, other) = (UserId::new(), UserId::new());
        if let Coordination::Redis(shared) = c {
            // The first one says that the channel is open.
            timeout(Duration::from_secs(5), shared.ready_notify().notified()).await.unwrap();
        }
        let (mut first, mut second) = (c.subscribe(user), c.subscribe(user));
        let mut elsewhere = c.subscribe(other);
        c.publish(user, "one word and more".to_owned()).await.unwrap();
        c.publish(user, "{}".to_owned()).await.unwrap();
        c.publish(other, "theirs".to_owned()).await.unwrap();
        for listener in [&mut first, &mut second] {
            assert_eq!(timeout(Duration::from_secs(5), listener.next()).await.unwrap().unwrap(), "one word and more");
            assert_eq!(timeout(Duration::from_secs(5), listener.next()).await.unwrap().unwrap(), "{}");
        }
        assert_eq!(timeout(Duration::from_secs(5), elsewhere.next()).await.unwrap().unwrap(), "theirs");
        drop((first, second));
        c.publish(user, "to nobody".to_owned()).await.unwrap();
    }
}

/// Stands between us and Redis, and can be cut or made silent.
struct Cable {
    address: String,
    tasks: tokio::task::JoinHandle<()>,
}

async fn cable(address: &str, answers: bool) -> Cable {
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let url = url::Url::parse(&redis_url()).unwrap();
    let target = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap_or(6379));
    let tasks = tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let target = target.clone();
            connections.spawn(async move {
                if answers {
                    let mut far = tokio::net::TcpStream::connect(target).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                } else {
                    std::future::pending::<()>().await;
                }
            });
        }
    });
    Cable { address, tasks }
}

#[tokio::test]
async fn a_dead_redis_is_an_error_in_seconds_and_comes_back_by_itself() {
    let [_, store] = both();
    let through = cable("127.0.0.1:0", true).await;
    let c = Coordination::Redis(Shared::new(&through_url(&through.address), &store.prefix).unwrap());
    c.ping().await.unwrap();
    let waiting = c.ready_notify();
    timeout(Duration::from_secs(5), waiting.notified()).await.unwrap();

    through.tasks.abort();
    let _ = through.tasks.await;
    let begun = Instant::now();
    assert!(c.ping().await.is_err());
    assert!(c.push(id(1), Class::Interactive, 0).await.is_err());
    assert!(begun.elapsed() < Duration::from_secs(7), "{:?}", begun.elapsed());

    let again = cable(&through.address, true).await;
    let mut back = false;
    for _ in 0..30 {
        back = c.push(id(1), Class::Interactive, 0).await.is_ok();
        if back {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(back);
    assert_eq!(c.pop(0).await.unwrap(), Some(id(1)));

    // The channels come back too.
    let user = UserId::new();
    let mut events = c.subscribe(user);
    let mut told = false;
    for _ in 0..50 {
        c.publish(user, "back".to_owned()).await.unwrap();
        told = timeout(Duration::from_millis(100), events.next()).await.is_ok();
        if told {
            break;
        }
    }
    assert!(told);
    again.tasks.abort();
}

#[tokio::test]
async fn a_cut_connection_is_not_noticed() {
    let [_, store] = both();
    let mut through = cable("127.0.0.1:0", true).await;
    let c = Coordination::Redis(Shared::new(&through_url(&through.address), &store.prefix).unwrap());
    for n in 0..5 {
        c.push(id(n), Class::Interactive, 0).await.unwrap();
        // As a restart does: every connection ends, new ones are taken.
        through.tasks.abort();
        tokio::time::sleep(Duration::from_millis(20)).await;
        through = cable(&through.address, true).await;
        assert_eq!(c.pop(0).await.unwrap(), Some(id(n)));
    }
    through.tasks.abort();
}

#[tokio::test]
async fn a_silent_redis_is_an_error_in_seconds() {
    let silent = cable("127.0.0.1:0", false).await;
    let c = Coordination::Redis(Shared::new(&format!("redis://{}", silent.address), "wearsync-test").unwrap());
    let begun = Instant::now();
    let error = c.ping().await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(7), "{error}");
    silent.tasks.abort();
}

#[derive(Clone, Debug)]
enum Step {
    Take(Class, u64),
    Observe(Vec<Seen>),
    Refused,
    Restore(Vec<(String, Window)>),
    Pass(i64),
}

const NAMES: [&str; 3] = ["15m", "1d", "read"];

fn quotas() -> Vec<Quota> {
    use crate::model::quota::Reset::{NaturalMinutes, UtcDay};
    let quota = |name: &'static str, limit, reset| Quota { name: name.into(), limit, reset };
    vec![quota(NAMES[0], 15, NaturalMinutes(15)), quota(NAMES[1], 40, UtcDay), quota(NAMES[2], 11, NaturalMinutes(15))]
}

fn step() -> impl Strategy<Value = Step> {
    let name = prop::sample::select(&NAMES[..]);
    let seen = (name.clone(), 0..50_u64, 1..60_u64).prop_map(|(name, used, limit)| Seen { name, used, limit });
    let window = (name, 0..50_u64, 1..60_u64, 0..200 * QUARTER)
        .prop_map(|(name, used, limit, resets_at_ms)| (name.to_owned(), Window { used, limit, resets_at_ms }));
    prop_oneof![
        8 => (prop::sample::select(&Class::ALL[..]), 1..5_u64).prop_map(|(class, cost)| Step::Take(class, cost)),
        2 => prop::collection::vec(seen, 0..3).prop_map(Step::Observe),
        1 => Just(Step::Refused),
        1 => prop::collection::vec(window, 0..3).prop_map(Step::Restore),
        3 => (0..QUARTER).prop_map(Step::Pass),
        // Clocks of several processes disagree a little.
        1 => (-500..0_i64).prop_map(Step::Pass),
    ]
}

#[test]
fn the_scripts_compute_what_the_pure_functions_do() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _inside = runtime.enter();
    let [_, store] = both();
    let Coordination::Redis(shared) = &store.coordination else { unreachable!() };
    let cases = ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() };
    let all = quotas();
    proptest!(cases, |(steps in prop::collection::vec(step(), 1..60), start in 0..100 * QUARTER)| {
        let key = uuid::Uuid::new_v4().to_string();
        runtime.block_on(async {
            let mut now = start;
            let mut windows: Option<Vec<Option<Window>>> = None;
            for step in steps {
                match step {
                    Step::Take(class, cost) => {
                        let expected = match windows.as_mut() {
                            None => Taken::Unknown,
                            Some(windows) => match quota::take(&all, windows, class, cost, now) {
                                quota::Decision::Granted { left } => Taken::Granted { left },
                                quota::Decision::Wait { until_ms } => Taken::Wait { until_ms },
                            },
                        };
                        prop_assert_eq!(shared.take(&key, &all, class, cost, now).await.unwrap(), expected);
                    }
                    Step::Observe(seen) => {
                        if let Some(windows) = windows.as_mut() {
                            quota::observe(&all, windows, &seen, now);
                        }
                        shared.observe(&key, &all, &seen, now).await.unwrap();
                    }
                    Step::Refused => {
                        let mut none = vec![None; all.len()];
                        let expected = quota::refused(&all, windows.as_mut().unwrap_or(&mut none), now);
                        prop_assert_eq!(shared.refused(&key, &all, now).await.unwrap(), expected);
                    }
                    Step::Restore(snapshot) => {
                        restored(&all, windows.get_or_insert_with(|| vec![None; all.len()]), &snapshot, now);
                        shared.restore(&key, &all, &snapshot, now).await.unwrap();
                    }
                    Step::Pass(ms) => now += ms,
                }
                let expected: Vec<Window> = windows.iter().flatten().zip(&all).map(|(w, q)| quota::current(q, *w, now)).collect();
                prop_assert_eq!(shared.windows(&key, &all, now).await.unwrap(), expected);
            }
            Ok(())
        })?;
    });
}
