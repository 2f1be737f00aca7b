//! Puts the parts together from the settings: the only room that names concrete backends.
//!
//! May name everything. What must always hold: whoever works holds the right to (the data folder's lock, the database's
//! lock, or a place among several workers); the embedded database is up to date before anything reads it.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use tokio::net::TcpListener;

use crate::clock::Clock;
use crate::config::{Config, Database};
use crate::coordination::Coordination;
use crate::storage::Db;
use crate::sync::{Engine, Exporter};
use crate::vault::{Vault, prepare_state_folder};
use crate::{api, export, telemetry, worker};

/// What a process is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Answers HTTP; works as well, unless told not to.
    Server {
        /// Whether it works on runs.
        worker: bool,
    },
    /// Works on runs.
    Worker {
        /// Whether it owns the export folder.
        export: bool,
    },
    /// One command; works if nobody else does.
    Command,
}

/// A process, put together.
pub struct App {
    /// The engine.
    pub engine: Arc<Engine>,
    role: Role,
    works: bool,
    /// Held while this process lives: the data folder's lock, or the database's.
    _folder_lock: Option<File>,
    _database_lock: Option<crate::storage::WorkingLock>,
}

impl App {
    /// Opens everything that the settings name.
    ///
    /// # Errors
    /// In words: what could not be opened, why, and what to do.
    pub async fn open(config: Config, role: Role) -> anyhow::Result<Self> {
        Self::open_with(config, role, Clock::system()).await
    }

    /// The same with a clock of one's own.
    ///
    /// # Errors
    /// See [`App::open`].
    pub async fn open_with(config: Config, role: Role, clock: Clock) -> anyhow::Result<Self> {
        let wants_work = !matches!(role, Role::Server { worker: false });
        let distributed = matches!(config.database, Database::Postgres(_)) && config.redis_url.is_some();
        let state = config.state_dir();
        let folder_lock = if distributed || !wants_work { None } else { lock_folder(&state)? };
        let needs_work = matches!(role, Role::Worker { .. } | Role::Server { worker: true });
        if needs_work && !distributed && folder_lock.is_none() {
            // Before the database is touched: the other one may be making it.
            bail!(
                "another wearsync process works on {} already: end it first, or start this one with `serve --no-worker`",
                state.display()
            );
        }
        let db = open_database(&config).await?;
        let mut database_lock = None;
        let works = match &config.database {
            Database::Sqlite(_) => {
                // Whoever opens the file first brings it up to date; the migrations take a lock of their own.
                db.migrate().await?;
                folder_lock.is_some()
            }
            Database::Postgres(_) => {
                if !db.is_migrated().await? {
                    bail!("the database's schema is not up to date: run `wearsync migrate` once, then start again");
                }
                if wants_work && !distributed {
                    database_lock = db.try_working_lock().await?;
                    database_lock.is_some()
                } else {
                    wants_work
                }
            }
        };
        refuse_lost_key(&config, &db).await?;
        let vault = Vault::from_config(&config).context("the secret key cannot be used")?;
        if needs_work && !works {
            bail!("another wearsync process works on this database already: end it first, or use `serve --no-worker`");
        }
        let shared = match &config.redis_url {
            Some(url) if distributed => Coordination::redis(url, &config.redis_prefix)?,
            _ => Coordination::local(),
        };
        if let Some(ms) = db.server_time_ms().await? {
            clock.follow(ms);
        }
        let exports = match role {
            Role::Worker { export } => export || !distributed,
            Role::Server { .. } | Role::Command => !distributed,
        };
        let exporter = if works && exports { Some(open_exporter(&config, &state)?) } else { None };
        let engine = Engine::new(config, db, shared, vault, clock, exporter)?;
        if works && !distributed {
            // Holding the lock proves that no other worker lives: leases found now are of the dead.
            engine.db.free_leases(engine.clock.now()).await?;
        }
        Ok(Self { engine, role, works, _folder_lock: folder_lock, _database_lock: database_lock })
    }

    /// Whether this process may execute runs itself.
    #[must_use]
    pub fn works(&self) -> bool {
        self.works
    }

    /// Answers HTTP (and works, as its role says) until the engine is told to stop; ends within ten seconds then.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(&self, listener: TcpListener) -> anyhow::Result<()> {
        let metrics_need_key = !listener.local_addr()?.ip().is_loopback();
        let metrics = telemetry::install_metrics();
        let router = api::router(api::ApiState { engine: self.engine.clone(), metrics, metrics_need_key });
        let working = self.works.then(|| tokio::spawn(worker::work(self.engine.clone())));
        let stop = self.engine.stop.clone();
        let served = axum::serve(listener, router).with_graceful_shutdown(async move { stop.cancelled().await });
        let stop = self.engine.stop.clone();
        tokio::select! {
            result = served => result?,
            // Open connections (event streams, inline calls) are not waited for beyond the grace.
            () = async {
                stop.cancelled().await;
                tokio::time::sleep(std::time::Duration::from_secs(8)).await;
            } => {}
        }
        if let Some(working) = working {
            working.await??;
        }
        Ok(())
    }

    /// Works until the engine is told to stop.
    ///
    /// # Errors
    /// When the worker cannot be set up.
    pub async fn work(&self) -> anyhow::Result<()> {
        worker::work(self.engine.clone()).await
    }

    /// What the process is there for.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Closes the database.
    pub async fn close(&self) {
        self.engine.db.close().await;
    }
}

/// Brings the database up to date.
///
/// # Errors
/// When it cannot be reached, or a migration fails.
pub async fn migrate(config: &Config) -> anyhow::Result<()> {
    let db = open_database(config).await?;
    db.migrate().await?;
    db.close().await;
    Ok(())
}

/// Tokens without their key: a new one would be made in silence, and every stored token be lost.
async fn refuse_lost_key(config: &Config, db: &Db) -> anyhow::Result<()> {
    let key = config.state_dir().join("secret.key");
    if config.secret_key.is_none() && !key.exists() && db.has_sealed_tokens().await? {
        bail!(
            "the key file {} is gone, and the stored tokens cannot be read without it: put it back; or set \
             WEARSYNC_SECRET_KEY to a new key (`openssl rand -base64 32`) and connect the accounts again",
            key.display()
        );
    }
    Ok(())
}

async fn open_database(config: &Config) -> anyhow::Result<Db> {
    match &config.database {
        Database::Sqlite(path) => {
            // Before the database is in it: with a key given by a setting nobody else prepares it.
            prepare_state_folder(&config.state_dir()).context("the state folder cannot be used")?;
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder)
                    .with_context(|| format!("cannot make the folder {}", folder.display()))?;
            }
            Db::sqlite(path).await.with_context(|| {
                format!("cannot open the database {}: check that the folder can be written", path.display())
            })
        }
        Database::Postgres(url) => Db::postgres(url.expose(), config.database_connections)
            .await
            .with_context(|| format!("cannot reach the database {url}: check DATABASE_URL and that the server runs")),
    }
}

fn lock_folder(state: &Path) -> anyhow::Result<Option<File>> {
    prepare_state_folder(state).context("the state folder cannot be used")?;
    let path = state.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(std::fs::TryLockError::WouldBlock) => Ok(None),
        Err(std::fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}: is it on a network drive?", path.display()))
        }
    }
}

fn open_exporter(config: &Config, state: &Path) -> anyhow::Result<Exporter> {
    prepare_state_folder(state).context("the state folder cannot be used")?;
    let folder = export::Folder::open(&config.export_dir, &state.join("export.lock"))?;
    Ok(Exporter::new(folder))
}
