//! What begins without anybody asking: due connections, the daily sweep over what is stored, and the runs that wait on
//! a quota. Never more begin than the quota has permits for; who has waited longest goes first.
//!
//! The daily sweep lists again what is stored, because providers do not tell of everything: a ride of last year that is
//! uploaded today, an edit, a delete, a push that got lost. A history of a dozen pages is listed whole every time; of a
//! longer one the newest days (the provider's data says how many), and the rest in slices, one a day.

use std::sync::Arc;

use chrono::{DateTime, Duration, Utc};
use chrono_tz::Tz;

use super::accept::request_key;
use super::{Engine, Error, ProviderSetup, failpoint};
use crate::model::quota::{Window, share};
use crate::model::{BEGINNING_MS, Class, Schedule, SyncRequest};
use crate::providers::{Axis, LiveMode, StreamSpec};
use crate::storage::{ClockRun, Clockwork, Due, Queue, ScheduleRow, Step, Stepped, SweepDue, Turn};
use crate::telemetry;

/// From one sweep to the next: what changes is found within a day, with two hours for the sweep to get its turn.
const SWEEP_EVERY_S: i64 = 22 * 3600;
/// A sweep whose predecessor is not over looks again then.
const SWEEP_AGAIN_S: i64 = 3600;
/// A sweep lists at most so many pages; longer histories are listed in slices.
const SWEEP_PAGES: u64 = 12;
/// Calls that a long read is thought to want soon. It takes what there is: a few at a time, not all at once.
const BACKFILL_CALLS: u64 = 25;
/// What there is where nothing limits the calls.
const UNLIMITED: u64 = 1 << 40;
const DAY_MS: i64 = 86_400_000;
/// Steps in a row while there is more to begin; the next tick goes on.
const STEPS: usize = 20;

/// How a connection of a provider is read that has no schedule of its own.
#[must_use]
pub fn default_schedule<'a>(engine: &'a Engine, setup: &'a ProviderSetup) -> &'a Schedule {
    setup.config.schedule.as_ref().unwrap_or(&engine.config.schedule)
}

/// When a connection is due next by a schedule. One that is off, or never comes, is looked at a day later.
#[must_use]
pub fn next_due(schedule: &Schedule, after: DateTime<Utc>, time_zone: &str) -> DateTime<Utc> {
    // A zone that is none was not checked when it was stored: universal time serves.
    let zone = time_zone.parse().unwrap_or(Tz::UTC);
    let next = schedule.next(after, zone, rand::random_range(-1.0..=1.0));
    next.unwrap_or_else(|| after + Duration::days(1))
}

/// Sets a connection's schedule (`None`: that of the settings), and the user's zone where one is given. `None`: there is
/// no such connection.
///
/// # Errors
/// When the database fails.
pub async fn set_schedule(
    engine: &Engine,
    setup: &ProviderSetup,
    connection: crate::model::ConnectionId,
    own: Option<&Schedule>,
    zone: Option<Tz>,
) -> Result<Option<ScheduleRow>, Error> {
    let now = engine.now();
    if let Some(zone) = zone
        && let Some(connection) = engine.db.find_connection(connection).await?
    {
        engine.db.set_time_zone(connection.user_id, zone.name()).await?;
    }
    let zone = engine.db.find_schedule(connection).await?.map(|row| row.time_zone).unwrap_or_default();
    let next = next_due(own.unwrap_or_else(|| default_schedule(engine, setup)), now, &zone);
    if !engine.db.set_schedule(connection, own, next, now).await? {
        return Ok(None);
    }
    Ok(engine.db.find_schedule(connection).await?)
}

/// Begins what is due, of every provider. Every process may; one at a time does.
///
/// # Errors
/// When the database fails; what is due stays due.
pub async fn tick(engine: &Arc<Engine>) -> Result<Stepped, Error> {
    let mut all = Stepped::default();
    for setup in engine.providers.values() {
        for _ in 0..STEPS {
            let Some(stepped) = step(engine, setup).await? else { break };
            let more = stepped.more;
            all.released.extend(stepped.released);
            all.begun.extend(stepped.begun);
            all.new.extend(stepped.new);
            if !more {
                break;
            }
        }
    }
    Ok(all)
}

async fn step(engine: &Engine, setup: &ProviderSetup) -> Result<Option<Stepped>, Error> {
    let name = setup.spec().name;
    let now = engine.now();
    let default = default_schedule(engine, setup);
    let default_off = *default == Schedule::Off;
    if !engine.db.is_anything_due(name.0, default_off, now).await? {
        return Ok(None);
    }
    let Some(windows) = windows(engine, setup, now.timestamp_millis()).await? else { return Ok(None) };
    let plan = Plan { engine, setup, now, default, windows };
    if plan.budget(Class::Interactive) == 0 {
        return Ok(None);
    }
    let since: Vec<DateTime<Utc>> = plan.window_starts();
    let step = Step {
        provider: name.0,
        kind: setup.spec().streams.iter().find(|stream| stream.axis != Axis::None).map_or("", |s| s.kind.as_str()),
        now,
        default_off,
        default_pushed: setup.spec().live.mode() == Some(LiveMode::Webhook),
        windows: &since,
    };
    let Some(stepped) = engine.db.schedule_step(&step, &plan).await? else { return Ok(None) };
    if !stepped.begun.is_empty() {
        failpoint::hit("schedule-begun");
    }
    for (id, class) in &stepped.new {
        telemetry::run_accepted(*id, name, *class, crate::model::RunSource::Schedule);
    }
    telemetry::schedule_step(name, stepped.begun.len() as u64, stepped.released.len() as u64);
    for (id, class) in stepped.released.iter().chain(&stepped.begun) {
        // The rows are the truth; a lost push costs one sweep.
        if let Err(error) = engine.shared.push(*id, *class, now.timestamp_millis()).await {
            telemetry::redis_down(&error);
            break;
        }
    }
    Ok(Some(stepped))
}

/// The windows of a provider's quotas as they stand, from the snapshot where the store has forgotten them; `None` while
/// the store is away: nobody gets a permit then.
async fn windows(engine: &Engine, setup: &ProviderSetup, now_ms: i64) -> Result<Option<Vec<Window>>, Error> {
    let (key, quotas) = (setup.quota_key(), &setup.quotas);
    let told = async {
        let windows = engine.shared.windows(&key, quotas, now_ms).await?;
        if !windows.is_empty() || quotas.is_empty() {
            return Ok::<_, Error>(windows);
        }
        let known = engine.db.load_quota(&key).await?;
        engine.shared.restore(&key, quotas, &known, now_ms).await?;
        Ok(engine.shared.windows(&key, quotas, now_ms).await?)
    };
    match told.await {
        Ok(windows) if windows.len() == quotas.len() => Ok(Some(windows)),
        Ok(_) => Ok(None),
        Err(Error::Coordination(error)) => {
            telemetry::redis_down(&error);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Looks for connections that used to be pushed and are quiet for too long: they are asked again, as if the provider
/// pushed nothing, until it does.
///
/// # Errors
/// When the database fails.
pub async fn find_silence(engine: &Engine) -> Result<(), Error> {
    let now = engine.now();
    for setup in engine.providers.values() {
        let spec = setup.spec();
        let mode = engine.db.find_live_mode(spec.name.0).await?;
        let is_pushed = spec.live.mode_as_set(mode.as_deref()) == Some(LiveMode::Webhook);
        if !is_pushed || spec.rhythm.quiet_after_s == 0 {
            engine.db.forget_silence(spec.name.0).await?;
            continue;
        }
        let before = now - Duration::seconds(spec.rhythm.quiet_after_s);
        let (fell, spoke) = engine.db.note_silence(spec.name.0, before, now).await?;
        for connection in fell {
            telemetry::connection_quiet(spec.name, connection, true);
        }
        for connection in spoke {
            telemetry::connection_quiet(spec.name, connection, false);
        }
    }
    Ok(())
}

/// What one step decides by.
struct Plan<'a> {
    engine: &'a Engine,
    setup: &'a ProviderSetup,
    now: DateTime<Utc>,
    default: &'a Schedule,
    windows: Vec<Window>,
}

impl Plan<'_> {
    /// Calls that are left to a class in the tightest window.
    fn budget(&self, class: Class) -> u64 {
        let left = self.windows.iter().map(|window| share(window.limit, class).saturating_sub(window.used));
        left.min().unwrap_or(UNLIMITED)
    }

    fn window_starts(&self) -> Vec<DateTime<Utc>> {
        let start = |(window, quota): (&Window, &crate::model::quota::Quota)| {
            DateTime::from_timestamp_millis(window.resets_at_ms - quota.reset.length_ms()).unwrap_or_default()
        };
        self.windows.iter().zip(&self.setup.quotas).map(start).collect()
    }

    /// Calls that a run of a class is thought to make.
    fn calls(&self, class: Class) -> u64 {
        if class == Class::Backfill { BACKFILL_CALLS } else { self.setup.spec().rhythm.calls.max(1) }
    }

    /// Calls that are left to a class when all who come before it are served.
    fn room(&self, queue: &Queue, class: Class) -> u64 {
        let before = Class::ALL.into_iter().filter(|other| *other <= class.max(Class::Webhook));
        let wanted: u64 = before.map(|other| queue.active[other as usize] * self.calls(other)).sum();
        self.budget(class).saturating_sub(wanted)
    }

    /// Runs of so many calls that may begin. One at a time where a whole window has fewer calls than one takes.
    fn fitting(&self, queue: &Queue, class: Class, calls: u64) -> u64 {
        let whole = self.windows.iter().map(|window| share(window.limit, class)).min();
        let small = whole.is_some_and(|whole| whole < calls) && self.budget(class) > 0 && is_idle(queue);
        (self.room(queue, class) / calls.max(1)).max(u64::from(small))
    }

    fn clock_run(&self, connection: crate::model::ConnectionId, class: Class, request: &SyncRequest) -> ClockRun {
        ClockRun {
            class,
            request: serde_json::to_string(request).unwrap_or_default(),
            request_key: request_key(connection, request),
        }
    }

    /// What a sweep asks for, and in how many calls.
    fn sweep_of(&self, due: &SweepDue, stream: &StreamSpec) -> (Vec<SyncRequest>, u64) {
        let smallest = self.windows.iter().map(|window| share(window.limit, Class::Backfill)).min();
        // Whatever a window allows: a sweep that is cut in two proves no delete.
        let pages = SWEEP_PAGES.min(smallest.unwrap_or(UNLIMITED) / 2).max(5);
        // Each page repeats a row of the one before.
        let rows = u64::from(stream.page_size.max(2) - 1);
        let newest = self.now.timestamp_millis() - self.setup.spec().rhythm.reconcile_days * DAY_MS;
        let oldest = due.oldest.map_or(newest, |oldest| oldest.timestamp_millis());
        let (ranges, calls) = ranges(due.records.unsigned_abs(), rows, pages, due.reconcile_n, oldest, newest);
        let request = |(lo, hi): (i64, Option<i64>)| SyncRequest {
            since_ms: Some(lo),
            until_ms: hi,
            reconcile: true,
            ..SyncRequest::default()
        };
        (ranges.into_iter().map(request).collect(), calls)
    }
}

fn is_idle(queue: &Queue) -> bool {
    queue.active.iter().sum::<u64>() == 0
}

/// The ranges that the `n`th sweep lists (an upper bound that is none is now), and the calls that takes: everything where
/// that is `pages` at most; else what begins at `newest`, and one slice of what is older, each in its turn.
fn ranges(records: u64, rows: u64, pages: u64, n: i64, oldest: i64, newest: i64) -> (Vec<(i64, Option<i64>)>, u64) {
    // One more page, an empty one, ends the list.
    let whole = records / rows + 2;
    if whole <= pages {
        return (vec![(BEGINNING_MS, None)], whole);
    }
    let oldest = oldest.min(newest - 1);
    // The newest days are thought to take two pages, and two calls more to be sure of their end.
    let slices = i64::try_from(records.div_ceil((pages - 4) * rows)).unwrap_or(i64::MAX).max(1);
    let n = n.rem_euclid(slices);
    let bound = |n: i64| oldest + (newest - oldest) / slices * n;
    let lo = if n == 0 { BEGINNING_MS } else { bound(n) };
    let hi = if n + 1 == slices { newest } else { bound(n + 1) };
    (vec![(newest, None), (lo, Some(hi))], pages + 2)
}

impl Clockwork for Plan<'_> {
    fn release(&self, queue: &Queue) -> [u64; 4] {
        let mut queue = *queue;
        Class::ALL.map(|class| {
            let fit = self.fitting(&queue, class, self.calls(class));
            // A long read takes what there is, and whoever waits in person may need one call; what is due by the clock needs
            // all of its calls.
            let rest = class != Class::Schedule && self.budget(class) > 0 && is_idle(&queue);
            let n = fit.max(u64::from(rest)).min(queue.held[class as usize]);
            queue.active[class as usize] += n;
            n
        })
    }

    fn may_begin(&self, queue: &Queue, class: Class) -> bool {
        let off = class == Class::Backfill && self.engine.config.reconcile_share == 0;
        !off && self.fitting(queue, class, 1) > 0
    }

    fn begin(&self, queue: &Queue, due: &[Due]) -> Vec<Turn> {
        if !due.is_empty() {
            failpoint::hit("schedule-due");
        }
        let mut left = self.fitting(queue, Class::Schedule, self.calls(Class::Schedule));
        let request = SyncRequest::default();
        let mut turns = Vec::new();
        for due in due {
            let begins = due.is_active && !due.is_pushed;
            if begins && left == 0 {
                continue;
            }
            left -= u64::from(begins);
            let own = due.own();
            let schedule = own.as_ref().unwrap_or(self.default);
            let run = || self.clock_run(due.connection_id, Class::Schedule, &request);
            turns.push(Turn {
                connection_id: due.connection_id,
                user_id: due.user_id,
                due_at: due.due_at,
                // From now on, and not from when it was due: however many times were missed, it is one.
                next_at: next_due(schedule, self.now.max(due.due_at), &due.time_zone),
                runs: begins.then(run).into_iter().collect(),
                calls: 0,
            });
        }
        turns
    }

    fn sweep(&self, queue: &Queue, spent: &[u64], due: &[SweepDue]) -> Vec<Turn> {
        let streams = &self.setup.spec().streams;
        let Some(stream) = streams.iter().find(|stream| stream.axis != Axis::None) else { return Vec::new() };
        let mut queue = *queue;
        let mut spent = spent.to_vec();
        let mut turns = Vec::new();
        for due in due {
            let (runs, calls, wait_s) = match (due.is_active, due.is_busy) {
                (false, _) => (Vec::new(), 0, SWEEP_EVERY_S),
                (true, true) => (Vec::new(), 0, SWEEP_AGAIN_S),
                (true, false) => {
                    let (requests, calls) = self.sweep_of(due, stream);
                    let within = self.windows.iter().zip(&spent).all(|(window, spent)| {
                        // The first of a window may be larger than the share of a short one: the day's share holds it.
                        *spent == 0 || (spent + calls) * 100 <= window.limit * self.engine.config.reconcile_share
                    });
                    if !within || self.fitting(&queue, Class::Backfill, calls) == 0 {
                        // Not the next one instead: whoever is large would never get a turn.
                        break;
                    }
                    spent.iter_mut().for_each(|spent| *spent += calls);
                    queue.active[Class::Backfill as usize] += 1;
                    let class = Class::Backfill;
                    let run = |request: &SyncRequest| self.clock_run(due.connection_id, class, request);
                    (requests.iter().map(run).collect(), calls, SWEEP_EVERY_S)
                }
            };
            turns.push(Turn {
                connection_id: due.connection_id,
                user_id: due.user_id,
                due_at: due.due_at,
                next_at: self.now + Duration::seconds(wait_s),
                runs,
                calls: i64::try_from(calls).unwrap_or(i64::MAX),
            });
        }
        turns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_history_is_swept_whole_and_a_long_one_within_some_days() {
        let (newest, oldest) = (2000 * DAY_MS, 10 * DAY_MS);
        assert_eq!(ranges(0, 199, 12, 3, newest, newest), (vec![(BEGINNING_MS, None)], 2));
        assert_eq!(ranges(1990, 199, 12, 3, oldest, newest), (vec![(BEGINNING_MS, None)], 12));
        for (records, days) in [(2400, 2), (5000, 4), (30_000, 19)] {
            // From any day on, so many sweeps in a row leave nothing out.
            for first in [0, 1, 17] {
                let mut covered: Vec<(i64, i64)> = Vec::new();
                for n in first..first + days {
                    let (parts, calls) = ranges(records, 199, 12, n, oldest, newest);
                    assert_eq!((parts[0], parts.len(), calls), ((newest, None), 2, 14), "the newest days, every day");
                    covered.push((parts[1].0, parts[1].1.unwrap()));
                }
                covered.sort_unstable();
                assert_eq!((covered[0].0, covered[covered.len() - 1].1), (BEGINNING_MS, newest), "{records}");
                assert!(covered.windows(2).all(|pair| pair[0].1 >= pair[1].0), "{records}: {covered:?}");
            }
        }
    }
}
