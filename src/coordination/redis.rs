//! The store that processes share: Redis, one script per operation, so that each is one step for everybody.
//!
//! Keys, all with one hash tag (`{prefix}`) and an expiry, so that what nobody uses any more goes away:
//!
//! | Key | What |
//! |---|---|
//! | `{prefix}:ready:0` … `:3` | sorted set per class: run id, or `delivery:` and id, by due time (ms) |
//! | `{prefix}:quota:<key>` | hash: `<quota>/used`, `/limit`, `/resets` |
//! | `{prefix}:token:<account>` | hash: `version`, `sealed`, `expires`; ends with the token |
//!
//! Channels: `{prefix}:ready` says that something was pushed, `{prefix}:events` carries `<user> <payload>`. Every
//! process listens to both on one connection and hands the events on to its own listeners.
//!
//! The scripts repeat the arithmetic of `model::quota` and are tested against it. Time is an argument; what depends on
//! the calendar (the next reset) is computed here.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{Future, StreamExt as _};
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Client, FromRedisValue, RedisResult, Script, ScriptInvocation};
use tokio::sync::Notify;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use uuid::Uuid;

use super::{Error, Fanout, Taken};
use crate::model::quota::{Quota, Seen, Window};
use crate::model::{AccountId, Class, Job, UserId};
use crate::telemetry;

/// To connect, and for one answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// For one call with all its tries.
const WHOLE: Duration = Duration::from_secs(6);
/// How often a silent channel is asked whether it still lives.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Quotas and ready lists that nobody touched for so long go away, seconds: the sweep and the snapshot bring them back.
const KEPT_S: i64 = 7 * 86_400;
/// Lua counts in doubles.
const MOST: u64 = 1 << 53;

const PUSH: &str = r"
for i = 1, 4 do redis.call('ZREM', KEYS[i], ARGV[1]) end
local list = KEYS[ARGV[2] + 1]
redis.call('ZADD', list, ARGV[3], ARGV[1])
redis.call('EXPIRE', list, ARGV[4])
redis.call('PUBLISH', KEYS[5], '')
";

const POP: &str = r"
for i = 1, 4 do
  local first = redis.call('ZRANGEBYSCORE', KEYS[i], '-inf', ARGV[1], 'LIMIT', 0, 1)[1]
  if first then
    redis.call('ZREM', KEYS[i], first)
    return first
  end
end
return false
";

/// Before every quota script: reads the windows of KEYS[1] as they stand now. ARGV: now, two arguments of the
/// operation, the expiry, then seven values per quota.
const QUOTAS: &str = r"
local key, now = KEYS[1], tonumber(ARGV[1])
local known = redis.call('EXISTS', key) == 1
local quotas = {}
for i = 5, #ARGV, 7 do
  local name = ARGV[i]
  local stored = redis.call('HMGET', key, name .. '/used', name .. '/limit', name .. '/resets')
  local q = {
    name = name, had = stored[1] ~= false, length = tonumber(ARGV[i + 3]),
    used = 0, limit = tonumber(stored[2] or ARGV[i + 1]), resets = tonumber(ARGV[i + 2]),
    told_used = tonumber(ARGV[i + 4]), told_limit = tonumber(ARGV[i + 5]), told_resets = tonumber(ARGV[i + 6]),
  }
  if q.had and now < tonumber(stored[3]) then
    q.used, q.resets = tonumber(stored[1]), tonumber(stored[3])
  end
  quotas[#quotas + 1] = q
end
local function save()
  for _, q in ipairs(quotas) do
    local n = q.name
    redis.call('HSET', key, n .. '/used', q.used, n .. '/limit', q.limit, n .. '/resets', q.resets)
  end
  redis.call('EXPIRE', key, ARGV[4])
end
";

const TAKE: &str = r"
if not known then return {-1, 0} end
local class, cost = tonumber(ARGV[2]), tonumber(ARGV[3])
local left, wait
for _, q in ipairs(quotas) do
  local share = q.limit
  if class == 2 then share = q.limit - math.ceil(q.limit / 10) end
  if class >= 3 then share = math.max(0, q.limit - 2 * math.ceil(q.limit / 10)) end
  if q.used + cost > share then
    wait = math.max(wait or q.resets, q.resets)
  else
    left = math.min(left or share, share - q.used - cost)
  end
end
if not wait then
  for _, q in ipairs(quotas) do q.used = q.used + cost end
end
save()
if wait then return {0, wait} end
return {1, left}
";

const RESTORE: &str = r"
for _, q in ipairs(quotas) do
  if q.told_used >= 0 then
    local current = now < q.told_resets
    if not q.had then
      q.limit = q.told_limit
      if current then q.resets = q.told_resets end
    end
    if current then q.used = math.max(q.used, q.told_used) end
  end
end
save()
";

const OBSERVE: &str = r"
if not known then return end
for _, q in ipairs(quotas) do
  if q.told_used >= 0 then
    q.used = math.max(q.used, q.told_used)
    q.limit = q.told_limit
  end
end
save()
";

const REFUSED: &str = r"
local wait, shortest
for _, q in ipairs(quotas) do
  if q.used >= q.limit then wait = math.max(wait or q.resets, q.resets) end
  shortest = math.min(shortest or q.length, q.length)
end
if not wait then
  wait = now
  for _, q in ipairs(quotas) do
    if q.length == shortest then
      q.used = math.max(q.used, q.limit)
      wait = math.max(wait, q.resets)
    end
  end
end
if known then save() end
return wait
";

const WINDOWS: &str = r"
local answer = {}
if not known then return answer end
for _, q in ipairs(quotas) do
  answer[#answer + 1] = {q.used, q.limit, q.resets}
end
return answer
";

const CACHE_TOKEN: &str = r"
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or '')
local expires = tonumber(redis.call('HGET', KEYS[1], 'expires') or '')
local now = tonumber(ARGV[4])
if version and expires > now and version > tonumber(ARGV[1]) then return end
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'sealed', ARGV[2], 'expires', ARGV[3])
redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[3]) - now)
";

const FORGET_TOKEN: &str = r"
if redis.call('HGET', KEYS[1], 'version') == ARGV[1] then redis.call('DEL', KEYS[1]) end
";

/// What is told of a quota: by a response or by a snapshot.
type Told = Option<(u64, u64, i64)>;

#[derive(Debug)]
struct Scripts {
    push: Script,
    pop: Script,
    take: Script,
    restore: Script,
    observe: Script,
    refused: Script,
    windows: Script,
    cache_token: Script,
    forget_token: Script,
}

/// See [`super::Coordination`] for what its functions promise.
#[derive(Clone)]
pub struct Shared(Arc<Inner>);

struct Inner {
    connection: ConnectionManager,
    scripts: Scripts,
    prefix: String,
    notify: Arc<Notify>,
    fanout: Arc<Fanout>,
    listener: tokio::task::AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("prefix", &self.0.prefix).finish_non_exhaustive()
    }
}

impl From<redis::RedisError> for Error {
    fn from(error: redis::RedisError) -> Self {
        Self(error.to_string())
    }
}

impl Shared {
    /// Connects when first used, and again whenever the connection was lost.
    pub(super) fn new(url: &str, prefix: &str) -> Result<Self, Error> {
        let client = Client::open(url)?;
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(PATIENCE))
            .set_min_delay(Duration::from_millis(50))
            .set_number_of_retries(2);
        let connection = ConnectionManager::new_lazy_with_config(client.clone(), config)?;
        // The hash tag keeps all keys on one node, as scripts over several keys need.
        let prefix = format!("{{{prefix}}}");
        let (notify, fanout) = (Arc::<Notify>::default(), Arc::<Fanout>::default());
        let listener = tokio::spawn(listen(client, prefix.clone(), notify.clone(), fanout.clone())).abort_handle();
        let quota = |operation: &str| Script::new(&format!("{QUOTAS}{operation}"));
        let scripts = Scripts {
            push: Script::new(PUSH),
            pop: Script::new(POP),
            take: quota(TAKE),
            restore: quota(RESTORE),
            observe: quota(OBSERVE),
            refused: quota(REFUSED),
            windows: quota(WINDOWS),
            cache_token: Script::new(CACHE_TOKEN),
            forget_token: Script::new(FORGET_TOKEN),
        };
        Ok(Self(Arc::new(Inner { connection, scripts, prefix, notify, fanout, listener })))
    }

    pub(super) async fn push(&self, job: Job, class: Class, due_ms: i64) -> Result<(), Error> {
        let mut call = self.0.scripts.push.prepare_invoke();
        self.ready_lists(&mut call);
        call.key(ready_channel(&self.0.prefix)).arg(job.to_string()).arg(class.number()).arg(due_ms).arg(KEPT_S);
        self.run::<()>(&call).await?;
        self.0.notify.notify_one();
        Ok(())
    }

    pub(super) async fn pop(&self, now_ms: i64) -> Result<Option<Job>, Error> {
        let mut call = self.0.scripts.pop.prepare_invoke();
        self.ready_lists(&mut call);
        call.arg(now_ms);
        let job: Option<String> = self.run(&call).await?;
        job.map(|job| job.parse().map_err(|_| Error("the ready list holds something that is no job".to_owned())))
            .transpose()
    }

    pub(super) fn ready_notify(&self) -> Arc<Notify> {
        self.0.notify.clone()
    }

    pub(super) async fn take(
        &self,
        key: &str,
        quotas: &[Quota],
        class: Class,
        cost: u64,
        now_ms: i64,
    ) -> Result<Taken, Error> {
        let call = (class.number(), i64::try_from(cost.min(MOST)).unwrap_or(i64::MAX));
        let answer: (i64, i64) = self.quota(&self.0.scripts.take, key, quotas, call, now_ms, |_| None).await?;
        Ok(match answer {
            (1, left) => Taken::Granted { left: u64::try_from(left).unwrap_or(0) },
            (0, until_ms) => Taken::Wait { until_ms },
            _ => Taken::Unknown,
        })
    }

    pub(super) async fn restore(
        &self,
        key: &str,
        quotas: &[Quota],
        snapshot: &[(String, Window)],
        now_ms: i64,
    ) -> Result<(), Error> {
        let told = |quota: &Quota| {
            let (_, window) = snapshot.iter().find(|(name, _)| *name == quota.name)?;
            Some((window.used, window.limit, window.resets_at_ms))
        };
        self.quota(&self.0.scripts.restore, key, quotas, (0, 0), now_ms, told).await
    }

    pub(super) async fn observe(&self, key: &str, quotas: &[Quota], seen: &[Seen], now_ms: i64) -> Result<(), Error> {
        let told = |quota: &Quota| {
            let seen = seen.iter().find(|seen| seen.name == quota.name)?;
            Some((seen.used, seen.limit, 0))
        };
        self.quota(&self.0.scripts.observe, key, quotas, (0, 0), now_ms, told).await
    }

    pub(super) async fn refused(&self, key: &str, quotas: &[Quota], now_ms: i64) -> Result<i64, Error> {
        self.quota(&self.0.scripts.refused, key, quotas, (0, 0), now_ms, |_| None).await
    }

    pub(super) async fn windows(&self, key: &str, quotas: &[Quota], now_ms: i64) -> Result<Vec<Window>, Error> {
        let answer: Vec<(u64, u64, i64)> =
            self.quota(&self.0.scripts.windows, key, quotas, (0, 0), now_ms, |_| None).await?;
        Ok(answer.into_iter().map(|(used, limit, resets_at_ms)| Window { used, limit, resets_at_ms }).collect())
    }

    pub(super) async fn cache_token(
        &self,
        account: AccountId,
        version: i64,
        sealed: Vec<u8>,
        expires_at_ms: i64,
        now_ms: i64,
    ) -> Result<(), Error> {
        if expires_at_ms <= now_ms {
            return Ok(());
        }
        let mut call = self.0.scripts.cache_token.prepare_invoke();
        call.key(self.token_key(account)).arg(version).arg(sealed).arg(expires_at_ms).arg(now_ms);
        self.run(&call).await
    }

    pub(super) async fn cached_token(&self, account: AccountId, now_ms: i64) -> Result<Option<(i64, Vec<u8>)>, Error> {
        let mut command = redis::cmd("HMGET");
        command.arg(self.token_key(account)).arg(&["version", "sealed", "expires"]);
        let stored: (Option<i64>, Option<Vec<u8>>, Option<i64>) = self.command(&command).await?;
        Ok(match stored {
            (Some(version), Some(sealed), Some(expires_at_ms)) if now_ms < expires_at_ms => Some((version, sealed)),
            _ => None,
        })
    }

    pub(super) async fn forget_token(&self, account: AccountId, version: i64) -> Result<(), Error> {
        let mut call = self.0.scripts.forget_token.prepare_invoke();
        call.key(self.token_key(account)).arg(version);
        self.run(&call).await
    }

    pub(super) async fn publish(&self, user: UserId, payload: &str) -> Result<(), Error> {
        let mut command = redis::cmd("PUBLISH");
        command.arg(events_channel(&self.0.prefix)).arg(format!("{user} {payload}"));
        self.command(&command).await
    }

    pub(super) fn subscribe(&self, user: UserId) -> BoxStream<'static, String> {
        self.0.fanout.listen(user)
    }

    pub(super) async fn ping(&self) -> Result<(), Error> {
        let command = redis::cmd("PING");
        self.command(&command).await
    }

    fn token_key(&self, account: AccountId) -> String {
        format!("{}:token:{account}", self.0.prefix)
    }

    fn ready_lists(&self, call: &mut ScriptInvocation<'_>) {
        for class in Class::ALL {
            call.key(format!("{}:ready:{}", self.0.prefix, class.number()));
        }
    }

    async fn quota<T: FromRedisValue>(
        &self,
        script: &Script,
        key: &str,
        quotas: &[Quota],
        (first, second): (i64, i64),
        now_ms: i64,
        told: impl Fn(&Quota) -> Told,
    ) -> Result<T, Error> {
        let mut call = script.prepare_invoke();
        call.key(format!("{}:quota:{key}", self.0.prefix)).arg(now_ms).arg(first).arg(second).arg(KEPT_S);
        for quota in quotas {
            call.arg(&*quota.name)
                .arg(quota.limit.min(MOST))
                .arg(quota.reset.next(now_ms))
                .arg(quota.reset.length_ms());
            match told(quota) {
                Some((used, limit, resets)) => call.arg(used.min(MOST)).arg(limit.min(MOST)).arg(resets),
                None => call.arg(-1).arg(-1).arg(-1),
            };
        }
        self.run(&call).await
    }

    async fn run<T: FromRedisValue>(&self, call: &ScriptInvocation<'_>) -> Result<T, Error> {
        self.ask(|mut c| async move { call.invoke_async(&mut c).await }).await
    }

    async fn command<T: FromRedisValue>(&self, command: &redis::Cmd) -> Result<T, Error> {
        self.ask(|mut c| async move { command.query_async(&mut c).await }).await
    }

    /// Asks, and once more when the connection turns out to be gone: a Redis that restarted is not noticed. What is
    /// done twice by that errs on the safe side: a run popped in vain (the sweep finds it), a call counted twice.
    async fn ask<T, F>(&self, call: impl Fn(ConnectionManager) -> F) -> Result<T, Error>
    where
        F: Future<Output = RedisResult<T>>,
    {
        let tries = async {
            match call(self.0.connection.clone()).await {
                Err(error) if error.is_connection_dropped() => call(self.0.connection.clone()).await,
                answer => answer,
            }
        };
        let answer = match timeout(WHOLE, tries).await {
            Ok(answer) => answer.map_err(Error::from),
            Err(_) => Err(Error(format!("no answer in {} s", WHOLE.as_secs()))),
        };
        answer.inspect_err(|error| telemetry::redis_down(error))
    }
}

fn ready_channel(prefix: &str) -> String {
    format!("{prefix}:ready")
}

fn events_channel(prefix: &str) -> String {
    format!("{prefix}:events")
}

/// Hands on what is told on the channels, for ever.
async fn listen(client: Client, prefix: String, notify: Arc<Notify>, fanout: Arc<Fanout>) {
    loop {
        // Errors are not told here: whoever asks Redis for something gets them.
        let _ = listen_once(&client, &prefix, &notify, &fanout).await;
        sleep(Duration::from_secs(1)).await;
    }
}

async fn listen_once(client: &Client, prefix: &str, notify: &Notify, fanout: &Fanout) -> Result<(), Error> {
    let late = |_| Error("no answer".to_owned());
    let events = events_channel(prefix);
    let mut channels = timeout(PATIENCE, client.get_async_pubsub()).await.map_err(late)??;
    timeout(PATIENCE, channels.subscribe(&[&ready_channel(prefix), &events])).await.map_err(late)??;
    let (mut sink, mut messages) = channels.split();
    // Pushes and events may have been missed meanwhile.
    notify.notify_one();
    fanout.send_all();
    let mut heartbeat = interval(HEARTBEAT);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            message = messages.next() => {
                let Some(message) = message else { return Ok(()) };
                if message.get_channel_name() != events {
                    notify.notify_one();
                } else if let Ok(text) = std::str::from_utf8(message.get_payload_bytes())
                    && let Some((user, payload)) = text.split_once(' ')
                    && let Ok(user) = Uuid::parse_str(user)
                {
                    fanout.send(UserId(user), payload.to_owned());
                }
            }
            _ = heartbeat.tick() => {
                timeout(PATIENCE, sink.ping::<redis::Value>()).await.map_err(late)??;
            }
        }
    }
}
