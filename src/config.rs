//! All settings, as one value: built-in defaults, then a file, then the environment, then one check of the whole.
//!
//! May name model. What must always hold: a [`Config`] that [`Config::load`] returned is usable as it is; secrets
//! neither print nor appear in an error; nothing but [`Config::from_process`] reads the process's environment.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use figment::Figment;
use figment::providers::{Format, Serialized, Toml};
use figment::value::{Dict, Value};
use secrecy::{ExposeSecret, SecretString};
use url::Url;

use crate::model::Schedule;
use crate::model::quota::{self, Quota};
use crate::model::units::duration;

/// The commented defaults, as checked in.
pub const DEFAULTS: &str = include_str!("../config.default.toml");

/// Looked for in the working directory when no file is named.
const FILE: &str = "wearsync.toml";

const SETTINGS: &[&str] = &[
    "database_url",
    "database_connections",
    "redis_url",
    "redis_prefix",
    "data_dir",
    "export_dir",
    "bind",
    "public_url",
    "redirect_uris",
    "oauth_state_life",
    "sync_on_connect",
    "inline_timeout",
    "cors_origins",
    "secret_key",
    "secret_key_file",
    "secret_key_old",
    "share_access_tokens",
    "concurrency",
    "lease",
    "renew",
    "sweep",
    "page_timeout",
    "schedule",
    "reconcile_share",
    "delivery_bodies_kept",
    "deliveries_kept",
    "on_deauthorize",
    "export_touch",
    "export_flat",
    "event_heartbeat",
    "event_age",
    "events_per_user",
    "log",
    "log_format",
];

const PROVIDER_SETTINGS: &[&str] = &[
    "client_id",
    "client_secret",
    "refresh_token",
    "authorization_code",
    "parts",
    "quota",
    "schedule",
    "api_base_url",
    "authorize_url",
    "token_url",
    "revoke_url",
    "webhook_signature",
    "webhook_secret",
];

/// Variables without our prefix, and the settings they are.
const PLAIN: &[(&str, &str)] = &[
    ("DATABASE_URL", "database_url"),
    ("REDIS_URL", "redis_url"),
    ("STRAVA_CLIENT_ID", "providers.strava.client_id"),
    ("STRAVA_CLIENT_SECRET", "providers.strava.client_secret"),
    ("STRAVA_REFRESH_TOKEN", "providers.strava.refresh_token"),
    ("STRAVA_USER_AUTHORIZATION_CODE", "providers.strava.authorization_code"),
];

/// Every setting, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the rows live.
    pub database: Database,
    /// Postgres connections of one process, at least 2.
    pub database_connections: u32,
    /// Set: several processes work together.
    pub redis_url: Option<SecretUrl>,
    /// In front of every Redis key.
    pub redis_prefix: String,
    /// Holds `state/` and, unless said otherwise, `exports/`.
    pub data_dir: PathBuf,
    /// Where entity files go.
    pub export_dir: PathBuf,
    /// Where we listen.
    pub bind: SocketAddr,
    /// How browsers reach us, without a slash at the end: providers send people back to an address below it.
    pub public_url: String,
    /// Where else people may be sent after connecting; compared letter by letter, `{user_id}` standing for the user's id.
    pub redirect_uris: Vec<String>,
    /// How long somebody may take to agree at a provider.
    pub oauth_state_life: Duration,
    /// Whether connecting queues a first sync.
    pub sync_on_connect: bool,
    /// How long an `async=false` call waits.
    pub inline_timeout: Duration,
    /// Origins whose pages may call the API: scheme, host and port.
    pub cors_origins: Vec<String>,
    /// Encrypts at rest; [`decode_key`] reads it. Unset: a key file in the state folder.
    pub secret_key: Option<SecretString>,
    /// Keys used before, newest first.
    pub secret_key_old: Vec<SecretString>,
    /// Whether access tokens are shared through Redis, encrypted.
    pub share_access_tokens: bool,
    /// Runs worked on at a time in one process.
    pub concurrency: usize,
    /// How long a claimed run belongs to its worker.
    pub lease: Duration,
    /// How often a worker renews.
    pub renew: Duration,
    /// How often runs are looked for that nobody was told of.
    pub sweep: Duration,
    /// The longest that one page may take.
    pub page_timeout: Duration,
    /// How often a connection is read that has no schedule of its own.
    pub schedule: Schedule,
    /// Per cent of each quota window that the daily sweep over what is stored may use; 0 for no sweep.
    pub reconcile_share: u64,
    /// How long the body of a delivery is kept after it was done.
    pub delivery_bodies_kept: Duration,
    /// How long deliveries are kept, done or not.
    pub deliveries_kept: Duration,
    /// What happens to stored data when a grant is taken back.
    pub on_deauthorize: OnDeauthorize,
    /// When summaries are written.
    pub export_touch: ExportTouch,
    /// Leaves the provider's folder out of the paths.
    pub export_flat: bool,
    /// After this time without an event a stream of events says that it lives, and looks for events it was not told of.
    pub event_heartbeat: Duration,
    /// Events of runs are kept for this long,
    pub event_age: Duration,
    /// and no more of each user than this.
    pub events_per_user: u32,
    /// Filter of the log, as of `RUST_LOG`.
    pub log: String,
    /// Log lines as JSON instead of text.
    pub log_json: bool,
    /// By name in lower case; a provider without settings is absent: see [`Config::provider`].
    pub providers: BTreeMap<String, ProviderConfig>,
    /// What looked wrong but does not stop us: unknown settings. To be logged once at start.
    pub warnings: Vec<String>,
}

/// What is set for one provider; unset members mean the provider's own.
#[derive(Clone, Debug, Default)]
pub struct ProviderConfig {
    /// Our application's id there.
    pub client_id: Option<String>,
    /// Our application's secret there.
    pub client_secret: Option<SecretString>,
    /// A grant somebody already has.
    pub refresh_token: Option<SecretString>,
    /// A code from the authorize page, not yet exchanged.
    pub authorization_code: Option<SecretString>,
    /// Optional parts to fetch; empty for none of them.
    pub parts: Option<Vec<String>>,
    /// Quotas instead of the published ones; empty for none.
    pub quota: Option<Vec<Quota>>,
    /// Schedule of its connections instead of the installation's.
    pub schedule: Option<Schedule>,
    /// Where calls go, without a slash at the end.
    pub api_base_url: Option<String>,
    /// Where people agree.
    pub authorize_url: Option<String>,
    /// Where tokens are exchanged.
    pub token_url: Option<String>,
    /// Where grants are given back.
    pub revoke_url: Option<String>,
    /// Whether deliveries need a signature where the provider does not promise one.
    pub webhook_signature: bool,
    /// What signs its deliveries, where that is set at the provider and told by nobody.
    pub webhook_secret: Option<SecretString>,
}

/// Which database.
#[derive(Clone, Debug)]
pub enum Database {
    /// This file, embedded: one working process.
    Sqlite(PathBuf),
    /// A Postgres server.
    Postgres(SecretUrl),
}

/// What happens to stored data when a person takes back the grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDeauthorize {
    /// It stays.
    Keep,
    /// It is erased.
    Delete,
}

/// When `summary.json` and `last_sync.json` are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportTouch {
    /// When the sync stored something.
    Changed,
    /// After every sync.
    Always,
}

/// An address that may hold a password: prints without it.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretUrl(Url);

impl SecretUrl {
    /// The whole address, password included.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.as_str()
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut url = self.0.clone();
        // Postgres takes passwords in the query as well.
        url.set_query(None);
        url.set_fragment(None);
        // Refused only for addresses that cannot hold a password.
        if url.password().is_some() && url.set_password(Some("***")).is_err() {
            return f.write_str("***");
        }
        f.write_str(url.as_str())
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Everything that is wrong with the settings, one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(pub Vec<String>);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [one] => write!(f, "the settings cannot be used: {one}"),
            many => {
                write!(f, "the settings cannot be used:")?;
                many.iter().try_for_each(|problem| write!(f, "\n  - {problem}"))
            }
        }
    }
}

impl std::error::Error for Error {}

impl Config {
    /// The settings of this process: its environment, and `wearsync.toml` in the working directory when no file is
    /// named and that one exists.
    ///
    /// # Errors
    /// All problems at once, in plain words.
    pub fn from_process(file: Option<&Path>) -> Result<Self, Error> {
        let nearby = Path::new(FILE);
        let file = file.or_else(|| nearby.exists().then_some(nearby));
        Self::load(file, std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))))
    }

    /// Defaults, then `file`, then `env`.
    ///
    /// # Errors
    /// All problems at once, in plain words.
    pub fn load(file: Option<&Path>, env: impl IntoIterator<Item = (String, String)>) -> Result<Self, Error> {
        let mut figment = Figment::from(Toml::string(DEFAULTS));
        if let Some(file) = file {
            let text = std::fs::read_to_string(file)
                .map_err(|error| Error(vec![format!("{} cannot be read: {error}", file.display())]))?;
            // Read alone first, so that an error names this file.
            Figment::from(Toml::string(&text)).extract::<Dict>().map_err(|error| unreadable(file, &error))?;
            figment = figment.merge(Toml::string(&text));
        }
        let (plain, ours) = environment(env);
        let all: Dict = figment
            .merge(Serialized::defaults(plain))
            .merge(Serialized::defaults(ours))
            .extract()
            .map_err(|error| unreadable(Path::new("the environment"), &error))?;
        let mut reader = Reader::default();
        flatten("", &all, &mut reader.values);
        let config = reader.config();
        let mut problems = reader.problems;
        problems.extend(config.validate().err().into_iter().flat_map(|error| error.0));
        if problems.is_empty() { Ok(config) } else { Err(Error(problems)) }
    }

    /// Checks what no single setting can tell.
    ///
    /// # Errors
    /// All problems at once, in plain words.
    pub fn validate(&self) -> Result<(), Error> {
        let mut problems = Vec::new();
        let mut check = |good: bool, problem: &str| {
            if !good {
                problems.push(problem.to_owned());
            }
        };
        let embedded = matches!(self.database, Database::Sqlite(_));
        check(
            self.redis_url.is_none() || !embedded,
            "REDIS_URL is set but the database is SQLite: set DATABASE_URL=postgres://… too, or leave REDIS_URL out",
        );
        check(
            self.redis_url.is_none() || embedded || self.secret_key.is_some(),
            "REDIS_URL is set but not WEARSYNC_SECRET_KEY: processes that work together must share one key",
        );
        check(
            self.bind.ip().is_loopback() || self.secret_key.is_some(),
            "WEARSYNC_BIND is reachable from other machines: set WEARSYNC_SECRET_KEY (openssl rand -base64 32)",
        );
        check(
            self.secret_key.is_some() || self.secret_key_old.is_empty(),
            "WEARSYNC_SECRET_KEY_OLD is set but not WEARSYNC_SECRET_KEY: the new key is missing",
        );
        for (name, key) in self
            .secret_key
            .iter()
            .map(|key| ("WEARSYNC_SECRET_KEY", key))
            .chain(self.secret_key_old.iter().map(|key| ("WEARSYNC_SECRET_KEY_OLD", key)))
        {
            check(decode_key(key).is_some(), &format!("{name} must be 32 bytes in base64 or hex"));
        }
        for origin in &self.cors_origins {
            let parsed = Url::parse(origin).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
            check(
                parsed.is_some_and(|url| url.origin().ascii_serialization() == *origin),
                &format!("WEARSYNC_CORS_ORIGINS holds `{origin}`, which is no origin such as https://app.example.com"),
            );
        }
        check(!self.lease.is_zero(), "WEARSYNC_LEASE must be more than 0");
        check(!self.renew.is_zero(), "WEARSYNC_RENEW must be more than 0");
        check(!self.sweep.is_zero(), "WEARSYNC_SWEEP must be more than 0");
        check(!self.page_timeout.is_zero(), "WEARSYNC_PAGE_TIMEOUT must be more than 0");
        check(!self.event_heartbeat.is_zero(), "WEARSYNC_EVENT_HEARTBEAT must be more than 0");
        check(!self.oauth_state_life.is_zero(), "WEARSYNC_OAUTH_STATE_LIFE must be more than 0");
        check(
            self.renew * 2 <= self.lease,
            "WEARSYNC_RENEW must be at most half of WEARSYNC_LEASE: one late renewal must not lose the run",
        );
        check(self.reconcile_share <= 50, "WEARSYNC_RECONCILE_SHARE is in per cent and at most 50");
        check(self.concurrency >= 1, "WEARSYNC_CONCURRENCY must be at least 1");
        check(self.database_connections >= 2, "WEARSYNC_DATABASE_CONNECTIONS must be at least 2");
        check(
            !self.redis_prefix.is_empty()
                && self.redis_prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-:.".contains(&b)),
            "WEARSYNC_REDIS_PREFIX may hold letters, digits, and _ - : . only",
        );
        check(
            !self.export_dir.starts_with(self.state_dir()),
            "WEARSYNC_EXPORT_DIR lies inside the state folder, which holds secrets: choose another one",
        );
        if problems.is_empty() { Ok(()) } else { Err(Error(problems)) }
    }

    /// Database, key and lock: secret.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.data_dir.join("state")
    }

    /// Whether `public_url` is this machine's own address: nobody reaches us by it from elsewhere.
    #[must_use]
    pub fn is_local(&self) -> bool {
        Url::parse(&self.public_url).is_ok_and(|url| match url.host() {
            Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
            Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
            Some(url::Host::Domain(name)) => name == "localhost",
            None => false,
        })
    }

    /// What is set for a provider; empty when nothing is.
    #[must_use]
    pub fn provider(&self, name: &str) -> ProviderConfig {
        self.providers.get(name).cloned().unwrap_or_default()
    }
}

/// The 32 bytes of a key written in base64 (either alphabet, padded or not) or hex.
#[must_use]
pub fn decode_key(text: &SecretString) -> Option<[u8; 32]> {
    let text = text.expose_secret().trim();
    let bytes = if text.len() == 64 {
        (0..64).step_by(2).map(|i| u8::from_str_radix(text.get(i..i + 2)?, 16).ok()).collect::<Option<Vec<_>>>()?
    } else {
        let text = text.trim_end_matches('=').replace('+', "-").replace('/', "_");
        base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(text).ok()?
    };
    bytes.try_into().ok()
}

/// The settings in these variables as nested tables: those without our prefix, and ours.
fn environment(env: impl IntoIterator<Item = (String, String)>) -> (Dict, Dict) {
    let (mut plain, mut ours) = (Dict::new(), Dict::new());
    for (name, value) in env {
        // Compose files pass unset variables on as empty ones.
        if value.trim().is_empty() {
            continue;
        }
        if let Some((_, setting)) = PLAIN.iter().find(|(known, _)| *known == name) {
            insert(&mut plain, &setting.split('.').collect::<Vec<_>>(), value);
        } else if let Some(rest) = name.strip_prefix("WEARSYNC_") {
            let rest = rest.to_ascii_lowercase();
            insert(&mut ours, &rest.split("__").collect::<Vec<_>>(), value);
        }
    }
    (plain, ours)
}

fn insert(dict: &mut Dict, path: &[&str], value: String) {
    match path {
        [] => {}
        [last] => {
            dict.insert((*last).to_owned(), Value::from(value));
        }
        [first, rest @ ..] => {
            let mut inner = match dict.remove(*first) {
                Some(Value::Dict(_, inner)) => inner,
                _ => Dict::new(),
            };
            insert(&mut inner, rest, value);
            dict.insert((*first).to_owned(), Value::from(inner));
        }
    }
}

/// `a.b.c` → text, for every value; lists become comma lists.
fn flatten(prefix: &str, dict: &Dict, into: &mut BTreeMap<String, String>) {
    for (name, value) in dict {
        let name = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match value {
            Value::Dict(_, inner) => flatten(&name, inner, into),
            Value::Array(_, items) => {
                let items: Vec<String> = items.iter().filter_map(scalar).collect();
                into.insert(name, items.join(","));
            }
            value => {
                into.extend(scalar(value).map(|text| (name, text)));
            }
        }
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(_, text) => Some(text.trim().to_owned()),
        Value::Bool(_, value) => Some(value.to_string()),
        Value::Char(_, value) => Some(value.to_string()),
        Value::Num(_, number) => number
            .to_i128()
            .map(|n| n.to_string())
            .or_else(|| number.to_u128().map(|n| n.to_string()))
            .or_else(|| number.to_f64().map(|n| n.to_string())),
        _ => None,
    }
}

/// The parser's words without the line it quotes, which may hold a secret.
fn unreadable(source: &Path, error: &figment::Error) -> Error {
    let text = error.to_string();
    let words: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.contains('|')).collect();
    Error(vec![format!("{} cannot be read: {}", source.display(), words.join(": "))])
}

/// How a setting is written in the environment.
fn variable(setting: &str) -> String {
    match setting {
        "database_url" => "DATABASE_URL".to_owned(),
        "redis_url" => "REDIS_URL".to_owned(),
        _ => format!("WEARSYNC_{}", setting.replace('.', "__").to_ascii_uppercase()),
    }
}

/// Takes typed values out of the texts, and notes what cannot be read.
#[derive(Default)]
struct Reader {
    values: BTreeMap<String, String>,
    problems: Vec<String>,
}

impl Reader {
    fn config(&mut self) -> Config {
        let data_dir = self.path("data_dir").unwrap_or_else(|| PathBuf::from("data"));
        let bind = self.bind();
        let warnings = self.values.keys().filter_map(|name| unknown(name)).collect();
        Config {
            database: self.database(&data_dir),
            database_connections: self.number("database_connections"),
            redis_url: self.redis_url(),
            redis_prefix: self.text("redis_prefix").unwrap_or_default(),
            export_dir: self.path("export_dir").unwrap_or_else(|| data_dir.join("exports")),
            data_dir,
            bind,
            public_url: self.http_url("public_url").unwrap_or_else(|| local_url(bind)),
            redirect_uris: self.redirect_uris(),
            oauth_state_life: self.duration("oauth_state_life"),
            sync_on_connect: self.flag("sync_on_connect"),
            inline_timeout: self.duration("inline_timeout"),
            cors_origins: self.list("cors_origins"),
            secret_key: self.secret_key(),
            secret_key_old: self.list("secret_key_old").into_iter().map(SecretString::from).collect(),
            share_access_tokens: self.flag("share_access_tokens"),
            concurrency: self.number("concurrency"),
            lease: self.duration("lease"),
            renew: self.duration("renew"),
            sweep: self.duration("sweep"),
            page_timeout: self.duration("page_timeout"),
            schedule: self.schedule("schedule").unwrap_or(Schedule::Off),
            reconcile_share: self.number("reconcile_share"),
            delivery_bodies_kept: self.duration("delivery_bodies_kept"),
            deliveries_kept: self.duration("deliveries_kept"),
            on_deauthorize: self
                .choice("on_deauthorize", &[("keep", OnDeauthorize::Keep), ("delete", OnDeauthorize::Delete)]),
            export_touch: self
                .choice("export_touch", &[("changed", ExportTouch::Changed), ("always", ExportTouch::Always)]),
            export_flat: self.flag("export_flat"),
            event_heartbeat: self.duration("event_heartbeat"),
            event_age: self.duration("event_age"),
            events_per_user: self.number("events_per_user"),
            log: self.text("log").unwrap_or_default(),
            log_json: self.choice("log_format", &[("text", false), ("json", true)]),
            providers: self.providers(),
            warnings,
        }
    }

    fn text(&self, name: &str) -> Option<String> {
        self.values.get(name).filter(|text| !text.is_empty()).cloned()
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.text(name).map(PathBuf::from)
    }

    fn secret(&self, name: &str) -> Option<SecretString> {
        self.text(name).map(SecretString::from)
    }

    fn list(&self, name: &str) -> Vec<String> {
        let text = self.text(name).unwrap_or_default();
        text.split(',').map(str::trim).filter(|piece| !piece.is_empty()).map(str::to_owned).collect()
    }

    /// Notes a problem; `said` is quoted, so never a secret.
    fn bad(&mut self, name: &str, said: &str, wanted: &str) {
        self.problems.push(format!("{} is `{said}`, but must be {wanted}", variable(name)));
    }

    fn number<T: std::str::FromStr + Default>(&mut self, name: &str) -> T {
        let text = self.text(name).unwrap_or_default();
        text.parse().unwrap_or_else(|_| {
            self.bad(name, &text, "a whole number");
            T::default()
        })
    }

    fn duration(&mut self, name: &str) -> Duration {
        let text = self.text(name).unwrap_or_default();
        duration(&text).unwrap_or_else(|| {
            self.bad(name, &text, "a duration such as 500ms, 2s, 10m, or plain seconds");
            Duration::from_secs(1)
        })
    }

    fn flag(&mut self, name: &str) -> bool {
        let choices = [("true", true), ("false", false), ("1", true), ("0", false), ("yes", true), ("no", false)];
        self.choice(name, &choices)
    }

    fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> T {
        let text = self.text(name).unwrap_or_default();
        choices.iter().find(|(word, _)| text.eq_ignore_ascii_case(word)).map_or_else(
            || {
                let words: Vec<&str> = choices.iter().take(2).map(|(word, _)| *word).collect();
                self.bad(name, &text, &words.join(" or "));
                choices[0].1
            },
            |(_, value)| *value,
        )
    }

    fn bind(&mut self) -> SocketAddr {
        let text = self.text("bind").unwrap_or_default();
        let numeric = text.strip_prefix("localhost:").map_or_else(|| text.clone(), |port| format!("127.0.0.1:{port}"));
        numeric.parse().unwrap_or_else(|_| {
            self.bad("bind", &text, "an address and a port such as 127.0.0.1:8000 or 0.0.0.0:8000");
            SocketAddr::from(([127, 0, 0, 1], 0))
        })
    }

    fn database(&mut self, data_dir: &Path) -> Database {
        let default = data_dir.join("state").join("wearsync.db");
        let Some(text) = self.text("database_url") else { return Database::Sqlite(default) };
        if let Some(rest) = text.strip_prefix("sqlite:") {
            if rest.contains(":memory:") {
                self.problems.push("DATABASE_URL must name a file: data in memory would be lost".to_owned());
            }
            let file = rest.strip_prefix("//").unwrap_or(rest).split('?').next().unwrap_or_default();
            return Database::Sqlite(if file.is_empty() { default } else { PathBuf::from(file) });
        }
        match Url::parse(&text) {
            Ok(url) if matches!(url.scheme(), "postgres" | "postgresql") => Database::Postgres(SecretUrl(url)),
            // Not quoted: it may hold a password.
            _ => {
                self.problems.push("DATABASE_URL must begin with postgres:// or sqlite:".to_owned());
                Database::Sqlite(default)
            }
        }
    }

    fn redis_url(&mut self) -> Option<SecretUrl> {
        let url = Url::parse(&self.text("redis_url")?).ok().filter(|url| url.scheme() == "redis");
        if url.is_none() {
            // TLS to Redis is not built in.
            self.problems.push("REDIS_URL must be an address that begins with redis://".to_owned());
        }
        url.map(SecretUrl)
    }

    fn secret_key(&mut self) -> Option<SecretString> {
        let Some(file) = self.path("secret_key_file") else { return self.secret("secret_key") };
        if self.text("secret_key").is_some() {
            self.problems.push("set either WEARSYNC_SECRET_KEY or WEARSYNC_SECRET_KEY_FILE, not both".to_owned());
        }
        match std::fs::read_to_string(&file) {
            Ok(text) => Some(SecretString::from(text.trim().to_owned())),
            Err(error) => {
                self.problems.push(format!("WEARSYNC_SECRET_KEY_FILE {} cannot be read: {error}", file.display()));
                None
            }
        }
    }

    fn providers(&mut self) -> BTreeMap<String, ProviderConfig> {
        let names: Vec<String> = self
            .values
            .iter()
            .filter(|(_, value)| !value.is_empty())
            .filter_map(|(name, _)| name.strip_prefix("providers.")?.split_once('.').map(|(name, _)| name.to_owned()))
            .collect();
        names.into_iter().map(|name| (name.clone(), self.provider(&name))).collect()
    }

    fn provider(&mut self, provider: &str) -> ProviderConfig {
        let name = |setting: &str| format!("providers.{provider}.{setting}");
        ProviderConfig {
            client_id: self.text(&name("client_id")),
            client_secret: self.secret(&name("client_secret")),
            refresh_token: self.secret(&name("refresh_token")),
            authorization_code: self.secret(&name("authorization_code")),
            parts: self.text(&name("parts")).map(
                |text| {
                    if text == "none" { Vec::new() } else { self.list(&name("parts")) }
                },
            ),
            quota: self.text(&name("quota")).and_then(|text| {
                quota::parse(&text)
                    .map_err(|why| self.problems.push(format!("{}: {why}", variable(&name("quota")))))
                    .ok()
            }),
            schedule: self.schedule(&name("schedule")),
            api_base_url: self.http_url(&name("api_base_url")),
            authorize_url: self.http_url(&name("authorize_url")),
            token_url: self.http_url(&name("token_url")),
            revoke_url: self.http_url(&name("revoke_url")),
            webhook_signature: self.text(&name("webhook_signature")).is_some() && self.flag(&name("webhook_signature")),
            webhook_secret: self.secret(&name("webhook_secret")),
        }
    }

    fn redirect_uris(&mut self) -> Vec<String> {
        let uris = self.list("redirect_uris");
        for uri in &uris {
            // What a browser would run instead of going there.
            let runs =
                |url: &Url| matches!(url.scheme(), "javascript" | "data" | "vbscript" | "file" | "blob" | "about");
            if !Url::parse(uri).is_ok_and(|url| !runs(&url)) {
                self.bad("redirect_uris", uri, "whole addresses, such as https://app.example.org/connected");
            }
        }
        uris
    }

    fn schedule(&mut self, name: &str) -> Option<Schedule> {
        let text = self.text(name)?;
        text.parse().map_err(|why| self.problems.push(format!("{}: {why}", variable(name)))).ok()
    }

    fn http_url(&mut self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        match Url::parse(&text) {
            Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => {
                Some(text.trim_end_matches('/').to_owned())
            }
            _ => {
                self.bad(name, &text, "an address that begins with http:// or https://");
                None
            }
        }
    }
}

/// How a browser on this machine reaches what listens there.
fn local_url(bind: SocketAddr) -> String {
    if bind.ip().is_unspecified() { format!("http://localhost:{}", bind.port()) } else { format!("http://{bind}") }
}

/// Names the closest setting to one that does not exist.
fn unknown(name: &str) -> Option<String> {
    let (prefix, last, known) = match name.strip_prefix("providers.").and_then(|rest| rest.split_once('.')) {
        Some((provider, last)) => (format!("providers.{provider}."), last, PROVIDER_SETTINGS),
        None => (String::new(), name, SETTINGS),
    };
    if known.contains(&last) {
        return None;
    }
    let closest = known.iter().min_by_key(|word| distance(word, last))?;
    Some(format!(
        "{} is not a setting and is ignored; did you mean {}?",
        variable_as_written(name),
        variable(&format!("{prefix}{closest}"))
    ))
}

/// As [`variable`], for names that are not ours and so have no special writing.
fn variable_as_written(name: &str) -> String {
    format!("WEARSYNC_{} (`{name}` in a file)", name.replace('.', "__").to_ascii_uppercase())
}

/// Levenshtein.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

    fn load(env: &[(&str, &str)]) -> Result<Config, Error> {
        Config::load(None, env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())))
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn nothing_set_is_embedded_on_loopback() {
        let config = load(&[]).unwrap();
        assert!(matches!(&config.database, Database::Sqlite(file) if file == Path::new("./data/state/wearsync.db")));
        assert_eq!(config.bind.to_string(), "127.0.0.1:8000");
        assert_eq!(config.export_dir, Path::new("./data/exports"));
        assert_eq!(
            (config.inline_timeout.as_secs(), config.lease.as_secs(), config.renew.as_secs(), config.sweep.as_secs()),
            (60, 30, 10, 5)
        );
        assert_eq!((config.page_timeout.as_secs(), config.concurrency, config.log.as_str()), (600, 4, "info"));
        assert_eq!((config.event_heartbeat.as_secs(), config.event_age.as_secs()), (15, 86_400));
        assert_eq!(config.events_per_user, 200);
        assert_eq!((config.schedule.clone(), config.reconcile_share), (Schedule::Every(21_600), 10));
        assert!(config.share_access_tokens && !config.export_flat && !config.log_json);
        assert_eq!((config.public_url.as_str(), config.oauth_state_life.as_secs()), ("http://127.0.0.1:8000", 900));
        assert!(config.sync_on_connect && config.redirect_uris.is_empty());
        assert!(config.providers.is_empty() && config.warnings.is_empty() && config.secret_key.is_none());
        assert!(config.provider("strava").client_id.is_none());
    }

    #[test]
    fn a_machines_own_address_is_known() {
        for (url, local) in [
            ("http://127.0.0.1:8000", true),
            ("http://[::1]:8000", true),
            ("http://localhost:8000", true),
            ("https://wear.example.org", false),
            ("http://192.168.1.2:8000", false),
        ] {
            assert_eq!(load(&[("WEARSYNC_PUBLIC_URL", url)]).unwrap().is_local(), local, "{url}");
        }
        assert!(load(&[]).unwrap().is_local());
    }

    #[test]
    fn origins_are_written_as_browsers_write_them() {
        let config = load(&[("WEARSYNC_CORS_ORIGINS", "https://app.example.com, http://localhost:3000")]).unwrap();
        assert_eq!(config.cors_origins, ["https://app.example.com", "http://localhost:3000"]);
        for bad in ["*", "app.example.com", "https://app.example.com/", "https://App.example.com", "ftp://x", "null"] {
            assert!(load(&[("WEARSYNC_CORS_ORIGINS", bad)]).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_setting_is_in_the_defaults_file() {
        for setting in SETTINGS.iter().chain(PROVIDER_SETTINGS) {
            let found = DEFAULTS.lines().any(|line| {
                line.trim_start_matches("# ").strip_prefix(setting).is_some_and(|rest| rest.starts_with(" = "))
            });
            assert!(found, "{setting} is missing in config.default.toml");
        }
        assert!(load(&[]).unwrap().warnings.is_empty(), "config.default.toml names an unknown setting");
    }

    #[test]
    fn the_environment_wins_over_the_file_and_the_file_over_the_defaults() {
        let file =
            file("lease = 40\nrenew = \"2s\"\n[providers.strava]\nclient_id = 12\nparts = [\"streams\", \"zones\"]");
        let env = [("WEARSYNC_RENEW", "500ms"), ("STRAVA_CLIENT_ID", "13"), ("WEARSYNC_CONCURRENCY", "")];
        let env = env.map(|(k, v)| (k.to_owned(), v.to_owned()));
        let config = Config::load(Some(file.path()), env).unwrap();
        assert_eq!((config.lease.as_secs(), config.renew.as_millis(), config.concurrency), (40, 500, 4));
        let strava = config.provider("strava");
        assert_eq!(strava.client_id.as_deref(), Some("13"));
        assert_eq!(strava.parts.unwrap(), ["streams", "zones"]);
    }

    #[test]
    fn the_plain_names_of_the_script_give_way_to_ours() {
        let config = load(&[
            ("WEARSYNC_PROVIDERS__STRAVA__CLIENT_ID", "ours"),
            ("STRAVA_CLIENT_ID", "plain"),
            ("STRAVA_CLIENT_SECRET", "secret-1"),
            ("STRAVA_REFRESH_TOKEN", "secret-2"),
            ("STRAVA_USER_AUTHORIZATION_CODE", "secret-3"),
            ("WEARSYNC_PROVIDERS__STRAVA__API_BASE_URL", "http://127.0.0.1:9000/api/v3/"),
            ("WEARSYNC_PROVIDERS__STRAVA__QUOTA", "100/15m,1000/1d"),
            ("WEARSYNC_PROVIDERS__STRAVA__PARTS", "none"),
            ("WEARSYNC_PROVIDERS__POLAR__QUOTA", "off"),
            ("WEARSYNC_PROVIDERS__SUUNTO__WEBHOOK_SECRET", "secret-4"),
        ])
        .unwrap();
        let strava = config.provider("strava");
        assert_eq!(strava.client_id.as_deref(), Some("ours"));
        assert_eq!(strava.client_secret.as_ref().unwrap().expose_secret(), "secret-1");
        assert_eq!(strava.refresh_token.as_ref().unwrap().expose_secret(), "secret-2");
        assert_eq!(strava.authorization_code.as_ref().unwrap().expose_secret(), "secret-3");
        assert_eq!(strava.api_base_url.as_deref(), Some("http://127.0.0.1:9000/api/v3"));
        assert_eq!((strava.quota.unwrap().len(), strava.parts.unwrap().len()), (2, 0));
        assert_eq!(config.provider("polar").quota.unwrap(), vec![]);
        assert_eq!(config.provider("suunto").webhook_secret.unwrap().expose_secret(), "secret-4");
        assert!(!format!("{config:?}").contains("secret-"));
    }

    #[test]
    fn passwords_in_addresses_do_not_print() {
        let config = load(&[
            ("DATABASE_URL", "postgres://me:hunter2@db/wearsync?password=hunter2"),
            ("REDIS_URL", "redis://:hunter2@redis:6379/1"),
            ("WEARSYNC_SECRET_KEY", KEY),
            ("WEARSYNC_SECRET_KEY_OLD", KEY),
        ])
        .unwrap();
        let shown = format!("{config:?} {}", config.redis_url.as_ref().unwrap());
        assert!(!shown.contains("hunter2") && !shown.contains(KEY), "{shown}");
        assert!(shown.contains("postgres://me:***@db/wearsync") && shown.contains("redis://:***@redis:6379/1"));
        assert_eq!(config.redis_url.unwrap().expose(), "redis://:hunter2@redis:6379/1");
        assert!(matches!(config.database, Database::Postgres(url) if url.expose().contains("hunter2")));
    }

    #[test]
    fn all_problems_are_told_at_once_and_no_secret() {
        let error = load(&[
            ("REDIS_URL", "redis://r"),
            ("WEARSYNC_BIND", "0.0.0.0:80"),
            ("WEARSYNC_LEASE", "soon"),
            ("WEARSYNC_RENEW", "1h"),
            ("WEARSYNC_CONCURRENCY", "0"),
            ("WEARSYNC_EXPORT_TOUCH", "maybe"),
            ("WEARSYNC_EXPORT_FLAT", "perhaps"),
            ("WEARSYNC_SECRET_KEY_OLD", "too-short"),
            ("WEARSYNC_PROVIDERS__STRAVA__QUOTA", "1/x"),
            ("WEARSYNC_PROVIDERS__STRAVA__SCHEDULE", "0 25 * * *"),
            ("WEARSYNC_SCHEDULE", "5s"),
            ("WEARSYNC_RECONCILE_SHARE", "90"),
            ("WEARSYNC_PROVIDERS__STRAVA__TOKEN_URL", "ftp://x"),
            ("WEARSYNC_EXPORT_DIR", "./data/state/exports"),
        ])
        .unwrap_err();
        let text = error.to_string();
        for expected in [
            "WEARSYNC_LEASE is `soon`",
            "WEARSYNC_EXPORT_TOUCH is `maybe`, but must be changed or always",
            "WEARSYNC_EXPORT_FLAT",
            "WEARSYNC_PROVIDERS__STRAVA__QUOTA: `1/x`",
            "WEARSYNC_PROVIDERS__STRAVA__SCHEDULE: `0 25 * * *` is no cron expression",
            "WEARSYNC_SCHEDULE: `5s` is too short",
            "WEARSYNC_RECONCILE_SHARE is in per cent",
            "WEARSYNC_PROVIDERS__STRAVA__TOKEN_URL",
            "REDIS_URL is set but the database is SQLite",
            "WEARSYNC_BIND is reachable",
            "WEARSYNC_SECRET_KEY_OLD must be 32 bytes",
            "WEARSYNC_RENEW must be at most half",
            "WEARSYNC_CONCURRENCY must be at least 1",
            "WEARSYNC_EXPORT_DIR lies inside",
        ] {
            assert!(text.contains(expected), "{expected} not in\n{text}");
        }
        assert!(!text.contains("too-short"));
        for (name, value) in [
            ("DATABASE_URL", "mysql://me:hunter2@db"),
            ("REDIS_URL", "hunter2"),
            ("WEARSYNC_SECRET_KEY", "hunter2"),
            ("DATABASE_URL", "sqlite::memory:"),
            ("WEARSYNC_SECRET_KEY_FILE", "/nowhere/at/all"),
        ] {
            let error = load(&[(name, value)]).unwrap_err().to_string();
            assert!(error.contains(name) && !error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn where_people_are_sent_is_checked() {
        let config = load(&[
            ("WEARSYNC_PUBLIC_URL", "https://wear.example.org/"),
            ("WEARSYNC_REDIRECT_URIS", "https://app.example.org/done?a=1, myapp://connected"),
        ])
        .unwrap();
        assert_eq!(config.public_url, "https://wear.example.org");
        assert_eq!(config.redirect_uris, ["https://app.example.org/done?a=1", "myapp://connected"]);
        let everywhere = load(&[("WEARSYNC_BIND", "0.0.0.0:81"), ("WEARSYNC_SECRET_KEY", KEY)]).unwrap();
        assert_eq!(everywhere.public_url, "http://localhost:81");
        for (name, value) in [
            ("WEARSYNC_REDIRECT_URIS", "javascript:alert(1)"),
            ("WEARSYNC_REDIRECT_URIS", "/done"),
            ("WEARSYNC_PUBLIC_URL", "wear.example.org"),
            ("WEARSYNC_OAUTH_STATE_LIFE", "0"),
        ] {
            assert!(load(&[(name, value)]).unwrap_err().to_string().contains(name), "{value}");
        }
    }

    #[test]
    fn which_shapes_are_allowed() {
        let postgres = ("DATABASE_URL", "postgres://db/w");
        assert!(load(&[postgres]).is_ok());
        assert!(load(&[postgres, ("REDIS_URL", "redis://r"), ("WEARSYNC_SECRET_KEY", KEY)]).is_ok());
        assert!(load(&[postgres, ("REDIS_URL", "redis://r")]).is_err(), "processes must share a key");
        assert!(load(&[("WEARSYNC_BIND", "0.0.0.0:1"), ("WEARSYNC_SECRET_KEY", KEY)]).is_ok());
        assert!(load(&[("WEARSYNC_BIND", "[::1]:1")]).is_ok() && load(&[("WEARSYNC_BIND", "localhost:1")]).is_ok());
        for (url, path) in [("sqlite:a/b.db", "a/b.db"), ("sqlite:///a/b.db?mode=rwc", "/a/b.db")] {
            let config = load(&[("DATABASE_URL", url)]).unwrap();
            assert!(matches!(config.database, Database::Sqlite(file) if file == Path::new(path)));
        }
    }

    #[test]
    fn keys_are_read_in_base64_and_hex() {
        let key: [u8; 32] = *b"0123456789abcdef0123456789abcdef";
        let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        for text in [KEY, KEY.trim_end_matches('='), &hex, &hex.to_uppercase(), &format!(" {KEY}\n")] {
            assert_eq!(decode_key(&SecretString::from(text.to_owned())), Some(key), "{text}");
        }
        for text in ["", "abc", &hex[..62], "äöüß", &"ä".repeat(32)] {
            assert_eq!(decode_key(&SecretString::from(text.to_owned())), None, "{text}");
        }
        let file = file(&format!("{KEY}\n"));
        let config = load(&[("WEARSYNC_SECRET_KEY_FILE", file.path().to_str().unwrap())]).unwrap();
        assert_eq!(config.secret_key.unwrap().expose_secret(), KEY);
    }

    #[test]
    fn unknown_settings_are_named_with_the_closest_one() {
        let config = load(&[
            ("WEARSYNC_CONCURENCY", "3"),
            ("WEARSYNC_DATABASE_URL", "x"),
            ("WEARSYNC_PROVIDERS__STRAVA__CLIENT_KEY", "1"),
            ("WEARSYNC_NONSENSE__THING", "1"),
            ("OTHER", "1"),
        ]);
        // WEARSYNC_DATABASE_URL says what it means, so it is taken.
        assert!(config.unwrap_err().to_string().contains("DATABASE_URL"));
        let config = load(&[("WEARSYNC_CONCURENCY", "3"), ("WEARSYNC_PROVIDERS__STRAVA__CLIENT_KEY", "1")]).unwrap();
        assert_eq!(config.warnings.len(), 2);
        assert!(config.warnings[0].ends_with("did you mean WEARSYNC_CONCURRENCY?"), "{:?}", config.warnings);
        assert!(config.warnings[1].ends_with("did you mean WEARSYNC_PROVIDERS__STRAVA__CLIENT_ID?"));
    }

    #[test]
    fn a_broken_file_is_named_and_its_content_not_quoted() {
        let error = |text: &str| Config::load(Some(file(text).path()), []).unwrap_err().to_string();
        let broken = error("bind = \"127.0.0.1:1\"\nsecret_key = hunter2 oops");
        assert!(broken.contains("line 2") && !broken.contains("hunter2"), "{broken}");
        let missing = Config::load(Some(Path::new("/nowhere.toml")), []).unwrap_err().to_string();
        assert!(missing.contains("/nowhere.toml"));
    }

    #[test]
    fn durations() {
        for (text, ms) in [
            ("2s", 2000),
            ("500ms", 500),
            ("7", 7000),
            ("10m", 600_000),
            ("1h", 3_600_000),
            ("5 s", 5000),
            ("1d", 86_400_000),
        ] {
            assert_eq!(duration(text), Some(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "1x", "-1s", "1.5s", "99999999999999999999s", "99999999999h"] {
            assert_eq!(duration(text), None, "{text}");
        }
    }
}
