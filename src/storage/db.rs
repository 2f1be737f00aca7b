use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use sqlx::QueryBuilder;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use tokio::sync::{mpsc, oneshot};

use super::{Error, Result};

/// How many accepts share one commit at most.
const GROUP: usize = 256;

/// The database, one of two.
#[derive(Clone, Debug)]
pub enum Db {
    /// Several processes.
    Postgres(Postgres),
    /// One process.
    Sqlite(Sqlite),
}

/// A Postgres pool.
#[derive(Clone, Debug)]
pub struct Postgres {
    pub(super) pool: PgPool,
    pub(super) statements: Arc<AtomicU64>,
}

/// A SQLite file: one connection writes, several read.
#[derive(Clone, Debug)]
pub struct Sqlite {
    pub(super) write: SqlitePool,
    pub(super) read: SqlitePool,
    accepts: mpsc::Sender<Job>,
    pub(super) statements: Arc<AtomicU64>,
}

impl Postgres {
    /// The pool, for reading what no function here reads: tests, and queries of people's own.
    #[must_use]
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }
}

/// Called when the group's commit came through (`true`) or did not.
type Completion = Box<dyn FnOnce(bool) + Send>;
type Job = Box<dyn for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, Completion> + Send>;

/// Runs one body against whichever pool reads. The body is compiled for both drivers.
macro_rules! read {
    ($db:expr, $p:ident => $body:expr) => {
        match $db {
            $crate::storage::Db::Postgres(inner) => {
                inner.statements.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let $p = &inner.pool;
                $body
            }
            $crate::storage::Db::Sqlite(inner) => {
                inner.statements.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let $p = &inner.read;
                $body
            }
        }
    };
}

/// Runs one writing statement on its own.
macro_rules! write {
    ($db:expr, $p:ident => $body:expr) => {
        match $db {
            $crate::storage::Db::Postgres(inner) => {
                inner.statements.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let $p = &inner.pool;
                $body
            }
            $crate::storage::Db::Sqlite(inner) => {
                inner.statements.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let $p = &inner.write;
                $body
            }
        }
    };
}

/// Runs one writing statement (two would not be undone together, unless in a transaction that the body begins) that
/// somebody waits for: on SQLite it shares its commit with its neighbours. The body ends in a `Result` and owns what it
/// names.
macro_rules! accept {
    ($db:expr, $c:ident => $body:expr) => {
        match $db {
            $crate::storage::Db::Postgres(inner) => {
                inner.statements.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let mut connection = inner.pool.acquire().await?;
                let $c = &mut *connection;
                $body
            }
            $crate::storage::Db::Sqlite(inner) => {
                inner.statements.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                inner.accept(move |$c| Box::pin(async move { $body })).await
            }
        }
    };
}

/// Runs a body in one transaction; an early return rolls back. SQLite takes its write lock at once: a transaction
/// that reads first and writes later could not be retried.
macro_rules! transaction {
    ($db:expr, $t:ident => $body:expr) => {
        match $db {
            $crate::storage::Db::Postgres(inner) => {
                let mut tx = inner.pool.begin().await?;
                let value = {
                    let $t = &mut *tx;
                    $body
                };
                tx.commit().await?;
                value
            }
            $crate::storage::Db::Sqlite(inner) => {
                let mut tx = inner.write.begin_with("BEGIN IMMEDIATE").await?;
                let value = {
                    let $t = &mut *tx;
                    $body
                };
                tx.commit().await?;
                value
            }
        }
    };
}

pub(super) use {accept, read, transaction, write};

/// Writes ` = any(…)` or ` in (…)`: Postgres takes an array, and the statement is the same for any number of values.
pub(super) trait PushIn<T> {
    /// Whether the statement is worth keeping prepared.
    fn push_in(&mut self, values: Vec<T>) -> bool;
}

impl<'q, T> PushIn<T> for QueryBuilder<'q, sqlx::Postgres>
where
    Vec<T>: sqlx::Encode<'q, sqlx::Postgres> + sqlx::Type<sqlx::Postgres> + 'q,
{
    fn push_in(&mut self, values: Vec<T>) -> bool {
        self.push(" = any(").push_bind(values).push(")");
        true
    }
}

impl<'q, T> PushIn<T> for QueryBuilder<'q, sqlx::Sqlite>
where
    T: sqlx::Encode<'q, sqlx::Sqlite> + sqlx::Type<sqlx::Sqlite> + 'q,
{
    fn push_in(&mut self, values: Vec<T>) -> bool {
        let kept = is_kept(values.len());
        self.push(" in (");
        let mut list = self.separated(", ");
        for value in values {
            list.push_bind(value);
        }
        self.push(")");
        kept
    }
}

/// Rows written by one statement. Statements of exactly so many rows, or of a few, are prepared once per connection: to
/// have a page of 200 workouts parsed and planned takes Postgres longer than to write it.
pub(super) const BULK: usize = 50;
/// A part with its samples comes as one row, or as one per series.
const FEW: usize = 8;

/// Whether a statement of so many rows is kept prepared.
pub(super) fn is_kept(rows: usize) -> bool {
    rows <= FEW || rows == BULK
}

impl Db {
    /// Opens a Postgres database and brings nothing up to date yet.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when it cannot be reached within ten seconds.
    pub async fn postgres(url: &str, connections: u32) -> Result<Self> {
        let options = PgConnectOptions::from_str(url)
            .map_err(|error| Error::Settings(format!("DATABASE_URL cannot be read: {error}")))?
            .application_name("wearsync")
            // A process that is stopped inside a transaction holds row locks: the server ends it, and others go on.
            .options([("idle_in_transaction_session_timeout", "30s")]);
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(Duration::from_secs(10))
            // A ping before every statement would double the round trips; a dead connection fails the statement, and
            // every statement here may be repeated.
            .test_before_acquire(false)
            .connect_with(options)
            .await?;
        Ok(Self::Postgres(Postgres { pool, statements: Arc::default() }))
    }

    /// Opens (or makes) a SQLite file.
    ///
    /// # Errors
    /// [`Error::Unavailable`] or [`Error::Database`] when the file cannot be opened.
    pub async fn sqlite(path: &Path) -> Result<Self> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // FULL: what was answered with 2xx survives a power cut, not only a crash.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(5))
            // A page of streams is about a megabyte: with the default of four a checkpoint comes after every few pages.
            .pragma("wal_autocheckpoint", "4000")
            .pragma("temp_store", "memory");
        let write = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(Duration::from_secs(30))
            .test_before_acquire(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(options.clone())
            .await?;
        let read = SqlitePoolOptions::new()
            .max_connections(4)
            .acquire_timeout(Duration::from_secs(10))
            .test_before_acquire(false)
            .max_lifetime(None)
            .connect_lazy_with(options.read_only(true).create_if_missing(false));
        let (accepts, queue) = mpsc::channel(4 * GROUP);
        tokio::spawn(commit_groups(write.clone(), queue));
        Ok(Self::Sqlite(Sqlite { write, read, accepts, statements: Arc::default() }))
    }

    /// Brings the schema up to date. Forward only.
    ///
    /// # Errors
    /// [`Error::Migrate`].
    pub async fn migrate(&self) -> Result<()> {
        match self {
            Self::Postgres(db) => sqlx::migrate!("migrations/postgres").run(&db.pool).await?,
            Self::Sqlite(db) => sqlx::migrate!("migrations/sqlite").run(&db.write).await?,
        }
        Ok(())
    }

    /// Whether the schema is as this program needs it.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the database is away.
    pub async fn is_migrated(&self) -> Result<bool> {
        let needed = match self {
            Self::Postgres(_) => sqlx::migrate!("migrations/postgres").iter().map(|m| m.version).max(),
            Self::Sqlite(_) => sqlx::migrate!("migrations/sqlite").iter().map(|m| m.version).max(),
        };
        let sql = "select max(version) from _sqlx_migrations where success";
        let found: Result<(Option<i64>,), sqlx::Error> = read!(self, p => sqlx::query_as(sql).fetch_one(p).await);
        match found {
            Ok((version,)) => Ok(version >= needed),
            // The table itself is missing: nothing was ever migrated.
            Err(sqlx::Error::Database(_)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// `postgres` or `sqlite`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Postgres(_) => "postgres",
            Self::Sqlite(_) => "sqlite",
        }
    }

    /// Answers when the database does.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn ping(&self) -> Result<()> {
        read!(self, p => sqlx::query("select 1").execute(p).await?.rows_affected());
        Ok(())
    }

    /// The database server's own time, milliseconds since 1970; `None` where there is no server.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn server_time_ms(&self) -> Result<Option<i64>> {
        match self {
            Self::Postgres(db) => {
                let (ms,): (i64,) = sqlx::query_as("select (extract(epoch from clock_timestamp()) * 1000)::bigint")
                    .fetch_one(&db.pool)
                    .await?;
                Ok(Some(ms))
            }
            Self::Sqlite(_) => Ok(None),
        }
    }

    /// Statements sent so far outside of page transactions, those of the clock's steps included: what a request costs can
    /// be counted.
    #[must_use]
    pub fn statements(&self) -> u64 {
        match self {
            Self::Postgres(db) => db.statements.load(Ordering::Relaxed),
            Self::Sqlite(db) => db.statements.load(Ordering::Relaxed),
        }
    }

    /// Counts statements that were sent inside a transaction.
    pub(super) fn count_sent(&self, n: u64) {
        match self {
            Self::Postgres(db) => db.statements.fetch_add(n, Ordering::Relaxed),
            Self::Sqlite(db) => db.statements.fetch_add(n, Ordering::Relaxed),
        };
    }

    /// Takes a lock that one process at a time can hold for as long as it keeps the answer. SQLite's lock is the data
    /// folder's and not taken here.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn try_working_lock(&self) -> Result<Option<WorkingLock>> {
        match self {
            Self::Postgres(db) => {
                let mut connection = db.pool.acquire().await?.detach();
                let (held,): (bool,) = sqlx::query_as("select pg_try_advisory_lock($1)")
                    .bind(WORKING_LOCK)
                    .fetch_one(&mut connection)
                    .await?;
                Ok(held.then_some(WorkingLock { _connection: Some(connection) }))
            }
            Self::Sqlite(_) => Ok(Some(WorkingLock { _connection: None })),
        }
    }

    /// Closes all connections.
    pub async fn close(&self) {
        match self {
            Self::Postgres(db) => db.pool.close().await,
            Self::Sqlite(db) => {
                db.read.close().await;
                db.write.close().await;
            }
        }
    }
}

/// `wears` in ASCII: a number that no other program is likely to lock.
const WORKING_LOCK: i64 = 0x77_65_61_72_73;

/// Held for as long as it lives.
#[derive(Debug)]
pub struct WorkingLock {
    _connection: Option<sqlx::PgConnection>,
}

impl Sqlite {
    /// The pool that only reads, for what no function here reads: tests, and queries of people's own.
    #[must_use]
    pub fn pool(&self) -> &SqlitePool {
        &self.read
    }

    /// Runs `body`, one statement, in the next group of accepts; answers when the group is on disk. A statement that
    /// fails undoes itself alone, so its neighbours need no savepoints (which would be two statements more for each).
    pub(super) async fn accept<T, F>(&self, body: F) -> Result<T>
    where
        T: Send + 'static,
        F: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, Result<T>> + Send + 'static,
    {
        let (answer, wait) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            Box::pin(async move {
                let result = body(connection).await;
                Box::new(move |committed: bool| {
                    let result = if committed || result.is_err() {
                        result
                    } else {
                        Err(Error::Unavailable(sqlx::Error::WorkerCrashed))
                    };
                    // The caller may have gone; what it asked for is done all the same.
                    let _ = answer.send(result);
                }) as Completion
            })
        });
        let closed = || Error::Unavailable(sqlx::Error::PoolClosed);
        self.accepts.send(job).await.map_err(|_| closed())?;
        wait.await.map_err(|_| closed())?
    }
}

/// Commits accepts in groups: whatever has gathered while the last commit was on its way to the disk. Between two
/// groups the write connection is free for one page, first come, first served.
async fn commit_groups(write: SqlitePool, mut queue: mpsc::Receiver<Job>) {
    let mut jobs = Vec::with_capacity(GROUP);
    while queue.recv_many(&mut jobs, GROUP).await > 0 {
        let Ok(mut tx) = write.begin_with("BEGIN IMMEDIATE").await else {
            // Dropping a job answers its caller that the database is away.
            jobs.clear();
            continue;
        };
        let mut completions = Vec::with_capacity(jobs.len());
        for job in jobs.drain(..) {
            completions.push(job(&mut tx).await);
        }
        let committed = tx.commit().await.is_ok();
        for completion in completions {
            completion(committed);
        }
    }
}
