//! Quota arithmetic, pure. The Redis script and the local store are tested against these functions.

use super::Class;

const MINUTE_MS: i64 = 60_000;
const DAY_MS: i64 = 86_400_000;

/// When a quota's window starts anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// At every multiple of this many minutes past the hour, by the clock (Strava: 15).
    NaturalMinutes(i64),
    /// At midnight UTC.
    UtcDay,
}

impl Reset {
    /// The first instant after `now` at which the window is new, milliseconds.
    #[must_use]
    pub fn next(self, now_ms: i64) -> i64 {
        let length = self.length_ms();
        (now_ms.div_euclid(length) + 1) * length
    }

    /// Length of a whole window, milliseconds.
    #[must_use]
    pub fn length_ms(self) -> i64 {
        match self {
            Self::NaturalMinutes(minutes) => minutes * MINUTE_MS,
            Self::UtcDay => DAY_MS,
        }
    }
}

/// One limit on calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Its name, unique within the provider: `15m`, `1d`, `read-15m`.
    pub name: std::borrow::Cow<'static, str>,
    /// Calls a window.
    pub limit: u64,
    /// When a window starts anew.
    pub reset: Reset,
}

/// Where a quota stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Calls made in this window, ours and those the provider counted besides.
    pub used: u64,
    /// Calls a window, as last told by the provider; starts as the quota's own.
    pub limit: u64,
    /// When it starts anew, milliseconds.
    pub resets_at_ms: i64,
}

/// What a response told of one quota.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The quota's name.
    pub name: &'static str,
    /// Calls the provider counted in this window.
    pub used: u64,
    /// Calls it allows.
    pub limit: u64,
}

/// May a call be made?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Yes, and this many more are left to this class in the tightest window.
    Granted {
        /// Calls left after this one.
        left: u64,
    },
    /// Not before this instant, milliseconds.
    Wait {
        /// When the window that is spent starts anew.
        until_ms: i64,
    },
}

/// What a class may use of a limit: one tenth is kept for those that somebody waits for, and another one from long
/// histories for what is due by the clock.
#[must_use]
pub fn share(limit: u64, class: Class) -> u64 {
    match class {
        Class::Interactive | Class::Webhook => limit,
        Class::Schedule => limit - limit.div_ceil(10),
        Class::Backfill => limit.saturating_sub(2 * limit.div_ceil(10)),
    }
}

/// The window as it stands now: a new one when its time is over.
#[must_use]
pub fn current(quota: &Quota, window: Option<Window>, now_ms: i64) -> Window {
    match window {
        Some(window) if now_ms < window.resets_at_ms => window,
        // A limit the provider told us outlives the window in which it was told.
        other => Window {
            used: 0,
            limit: other.map_or(quota.limit, |window| window.limit),
            resets_at_ms: quota.reset.next(now_ms),
        },
    }
}

/// Takes `cost` calls from all windows in one step, or from none.
pub fn take(quotas: &[Quota], windows: &mut [Option<Window>], class: Class, cost: u64, now_ms: i64) -> Decision {
    let mut left = u64::MAX;
    let mut until_ms: Option<i64> = None;
    for (quota, slot) in quotas.iter().zip(windows.iter_mut()) {
        let window = current(quota, *slot, now_ms);
        *slot = Some(window);
        let share = share(window.limit, class);
        if window.used + cost > share {
            // The latest of the spent windows decides: before it a call would be refused all the same.
            until_ms = Some(until_ms.map_or(window.resets_at_ms, |until| until.max(window.resets_at_ms)));
        } else {
            left = left.min(share - window.used - cost);
        }
    }
    if let Some(until_ms) = until_ms {
        return Decision::Wait { until_ms };
    }
    for window in windows.iter_mut().flatten() {
        window.used += cost;
    }
    Decision::Granted { left }
}

/// Takes in what a response told. Inside a window `used` only grows: answers overtake each other.
pub fn observe(quotas: &[Quota], windows: &mut [Option<Window>], seen: &[Seen], now_ms: i64) {
    for (quota, slot) in quotas.iter().zip(windows.iter_mut()) {
        let mut window = current(quota, *slot, now_ms);
        if let Some(seen) = seen.iter().find(|seen| seen.name == quota.name) {
            window.used = window.used.max(seen.used);
            window.limit = seen.limit;
        }
        *slot = Some(window);
    }
}

/// After a refusal (429): the windows that the refusal may have come from count as spent. When usage shows that a
/// long window is spent, that one; otherwise the shortest, since a refusal proves that one of them is.
pub fn refused(quotas: &[Quota], windows: &mut [Option<Window>], now_ms: i64) -> i64 {
    let mut until_ms = None;
    for (quota, slot) in quotas.iter().zip(windows.iter_mut()) {
        let window = current(quota, *slot, now_ms);
        *slot = Some(window);
        if window.used >= window.limit {
            until_ms = Some(until_ms.map_or(window.resets_at_ms, |until: i64| until.max(window.resets_at_ms)));
        }
    }
    until_ms.unwrap_or_else(|| {
        let shortest = quotas.iter().map(|quota| quota.reset.length_ms()).min();
        let mut until = now_ms;
        for (quota, slot) in quotas.iter().zip(windows.iter_mut()) {
            if let Some(window) = slot.as_mut()
                && Some(quota.reset.length_ms()) == shortest
            {
                window.used = window.used.max(window.limit);
                until = until.max(window.resets_at_ms);
            }
        }
        until
    })
}

/// Reads a setting: `100/15m,1000/1d`, or `off` for none.
///
/// # Errors
/// Says which piece cannot be read.
pub fn parse(text: &str) -> Result<Vec<Quota>, String> {
    if text.trim() == "off" {
        return Ok(Vec::new());
    }
    text.split(',')
        .map(|piece| {
            let piece = piece.trim();
            let bad = || format!("`{piece}` is no quota; write calls/window, for example 100/15m or 1000/1d");
            let (limit, window) = piece.split_once('/').ok_or_else(bad)?;
            let limit: u64 = limit.parse().map_err(|_| bad())?;
            let reset = match window {
                "1d" => Reset::UtcDay,
                minutes => match minutes.strip_suffix('m').and_then(|m| m.parse::<i64>().ok()) {
                    Some(minutes) if (1..=1440).contains(&minutes) => Reset::NaturalMinutes(minutes),
                    _ => return Err(bad()),
                },
            };
            if limit == 0 {
                return Err(bad());
            }
            Ok(Quota { name: window.to_owned().into(), limit, reset })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quotas() -> Vec<Quota> {
        parse("10/15m,20/1d").unwrap()
    }

    #[test]
    fn a_tenth_is_kept_for_those_who_wait() {
        let quotas = quotas();
        let mut windows = vec![None, None];
        for _ in 0..8 {
            assert!(matches!(take(&quotas, &mut windows, Class::Backfill, 1, 0), Decision::Granted { .. }));
        }
        assert_eq!(take(&quotas, &mut windows, Class::Backfill, 1, 0), Decision::Wait { until_ms: 900_000 });
        assert_eq!(take(&quotas, &mut windows, Class::Schedule, 1, 0), Decision::Granted { left: 0 });
        assert_eq!(take(&quotas, &mut windows, Class::Schedule, 1, 0), Decision::Wait { until_ms: 900_000 });
        assert_eq!(take(&quotas, &mut windows, Class::Interactive, 1, 0), Decision::Granted { left: 0 });
        assert_eq!(take(&quotas, &mut windows, Class::Interactive, 1, 0), Decision::Wait { until_ms: 900_000 });
    }

    #[test]
    fn the_day_outlasts_the_quarter_hour() {
        let quotas = quotas();
        let mut windows = vec![None, None];
        for quarter in 0..2 {
            for _ in 0..10 {
                let decision = take(&quotas, &mut windows, Class::Interactive, 1, quarter * 900_000);
                assert!(matches!(decision, Decision::Granted { .. }));
            }
        }
        assert_eq!(take(&quotas, &mut windows, Class::Interactive, 1, 1_800_000), Decision::Wait { until_ms: DAY_MS });
    }

    #[test]
    fn headers_only_raise_what_is_used() {
        let quotas = quotas();
        let mut windows = vec![None, None];
        observe(&quotas, &mut windows, &[Seen { name: "15m", used: 7, limit: 30 }], 0);
        observe(&quotas, &mut windows, &[Seen { name: "15m", used: 5, limit: 30 }], 0);
        assert_eq!(windows[0], Some(Window { used: 7, limit: 30, resets_at_ms: 900_000 }));
        assert_eq!(current(&quotas[0], windows[0], 900_000), Window { used: 0, limit: 30, resets_at_ms: 1_800_000 });
    }

    #[test]
    fn a_refusal_closes_the_window_it_came_from() {
        let quotas = quotas();
        let mut windows = vec![None, None];
        assert_eq!(refused(&quotas, &mut windows, 0), 900_000);
        let mut spent = vec![None, Some(Window { used: 20, limit: 20, resets_at_ms: DAY_MS })];
        assert_eq!(refused(&quotas, &mut spent, 0), DAY_MS);
    }

    #[test]
    fn settings_are_read_or_refused_in_words() {
        assert_eq!(parse("off").unwrap(), vec![]);
        assert_eq!(parse("100/15m, 1000/1d").unwrap().len(), 2);
        for bad in ["", "100", "x/15m", "0/15m", "100/15x", "100/0m"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
