/// What storage functions answer.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a storage function failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller's run was taken over, cancelled or disconnected: nothing was written, and nothing may be.
    #[error("this work is no longer ours: another worker holds it, or the connection changed")]
    Fenced,
    /// Somebody else committed in between: read again and prepare anew. Nothing was written.
    #[error("the data changed while the page was prepared")]
    Stale,
    /// A value that must be unique exists already.
    #[error("{constraint} exists already")]
    Duplicate {
        /// The constraint's name.
        constraint: String,
    },
    /// A stored row cannot be read.
    #[error("a row of {table} holds a value that cannot be read: {what}")]
    Corrupt {
        /// Which table.
        table: &'static str,
        /// Which value.
        what: String,
    },
    /// The database is not there, or not now.
    #[error("the database is not available: {0}")]
    Unavailable(#[source] sqlx::Error),
    /// The database refused a statement.
    #[error("the database refused a statement: {0}")]
    Database(#[source] sqlx::Error),
    /// The schema could not be brought up to date.
    #[error("the database could not be migrated: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// The settings name no database that can be used.
    #[error("{0}")]
    Settings(String),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Database(db) if db.is_unique_violation() => {
                // Postgres names the constraint; SQLite the columns, in the message.
                let constraint = db.constraint().map_or_else(|| db.message().to_owned(), str::to_owned);
                Self::Duplicate { constraint }
            }
            // 57P0x: shutting down, crash recovery; 08xxx: connection; 53300: too many connections.
            sqlx::Error::Database(db)
                if db
                    .code()
                    .is_some_and(|code| code.starts_with("57P0") || code.starts_with("08") || code == "53300") =>
            {
                Self::Unavailable(error)
            }
            sqlx::Error::Io(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::WorkerCrashed => Self::Unavailable(error),
            _ => Self::Database(error),
        }
    }
}
