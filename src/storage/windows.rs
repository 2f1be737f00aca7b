use chrono::{DateTime, Utc};

use super::db::{read, transaction};
use super::page::Fence;
use super::{Db, Error, Result};
use crate::model::{ConnectionId, Purpose, Window, WindowId};

/// A window as it is kept.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct WindowRow {
    /// Its id.
    pub id: WindowId,
    /// Stream.
    pub stream: String,
    /// `cover` or `reread`.
    pub purpose: String,
    /// Lower bound, inside.
    pub lo: i64,
    /// Upper bound, outside.
    pub hi: i64,
    /// `open`, `asked` or `done`.
    pub state: String,
    /// JSON, the place inside.
    pub position: Option<String>,
    /// When it was last read to its end.
    pub verified_at: Option<DateTime<Utc>>,
    /// Why it does not move.
    pub last_error: Option<String>,
}

impl WindowRow {
    /// The window itself.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the position is no JSON.
    pub fn window(&self) -> Result<Window> {
        let position =
            self.position.as_deref().map(serde_json::from_str).transpose().map_err(|error| Error::Corrupt {
                table: "windows",
                what: format!("position of {}: {error}", self.id),
            })?;
        let purpose = if self.purpose == "reread" { Purpose::Reread } else { Purpose::Cover };
        Ok(Window { id: self.id, purpose, lo: self.lo, hi: self.hi, position })
    }
}

/// A window to open.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NewWindow<'a> {
    /// Stream.
    pub stream: &'a str,
    /// What it is for.
    pub purpose: Purpose,
    /// Lower bound, inside.
    pub lo: i64,
    /// Upper bound, outside.
    pub hi: i64,
}

/// A range of a stream that is not covered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The connection.
    pub connection_id: ConnectionId,
    /// Provider.
    pub provider: String,
    /// Stream.
    pub stream: String,
    /// Lower bound, milliseconds, inside.
    pub lo: i64,
    /// Upper bound, milliseconds, outside.
    pub hi: i64,
    /// `open`: being read; `asked`: the provider was asked to push it; `unread`: nobody has begun.
    pub state: &'static str,
    /// Why it does not move, where something went wrong.
    pub last_error: Option<String>,
}

const COLUMNS: &str = "id, stream, purpose, lo, hi, state, position, verified_at, last_error";

macro_rules! insert_window {
    ($t:ident, $id:expr, $fence:expr, $new:expr, $purpose:expr) => {
        sqlx::query_as(
            "insert into windows (id, connection_id, stream, purpose, lo, hi, state) values ($1, $2, $3, $4, $5, $6, 'open')
            returning id, stream, purpose, lo, hi, state, position, verified_at, last_error",
        )
        .bind($id)
        .bind($fence.connection)
        .bind($new.stream)
        .bind($purpose.as_str())
        .bind($new.lo)
        .bind($new.hi)
        .fetch_one(&mut *$t)
        .await?
    };
}

impl Db {
    /// All windows of a connection, the newest bounds first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_windows(&self, connection: ConnectionId) -> Result<Vec<WindowRow>> {
        let sql = format!("select {COLUMNS} from windows where connection_id = $1 order by stream, hi desc, lo desc");
        Ok(read!(self, p => sqlx::query_as(&sql).bind(connection).fetch_all(p).await?))
    }

    /// Opens a window for the run behind the fence, and notes in the run's `report` that it did. A cover window that begins at the same place and is still open is
    /// answered instead; one that is done is opened anew only from its upper bound on, by its caller's choice of `lo`.
    ///
    /// # Errors
    /// [`Error::Fenced`].
    pub async fn open_window(&self, fence: &Fence, new: NewWindow<'_>, report: Option<&str>) -> Result<Window> {
        let id = WindowId::new();
        let row: WindowRow = transaction!(self, t => {
            let held: Option<(i64,)> = sqlx::query_as(
                    "select r.epoch from runs r join connections c on c.id = r.connection_id
                    where r.id = $1 and r.epoch = $2 and r.state = 'in_progress' and c.epoch = $3")
                .bind(fence.run).bind(fence.run_epoch).bind(fence.connection_epoch)
                .fetch_optional(&mut *t).await?;
            if held.is_none() {
                return Err(Error::Fenced);
            }
            sqlx::query("update runs set report = coalesce($2, report) where id = $1").bind(fence.run).bind(report)
                .execute(&mut *t).await?;
            let same: Option<WindowRow> = sqlx::query_as(
                    "select id, stream, purpose, lo, hi, state, position, verified_at, last_error from windows
                    where connection_id = $1 and stream = $2 and purpose = $3 and lo = $4
                        and (purpose = 'cover' or (state = 'open' and hi = $5))")
                .bind(fence.connection).bind(new.stream).bind(new.purpose.as_str()).bind(new.lo).bind(new.hi)
                .fetch_optional(&mut *t).await?;
            match same {
                Some(row) if row.state == "open" => row,
                // The range from here on was covered already; read it again and let the done window grow.
                Some(_) => insert_window!(t, id, fence, new, Purpose::Reread),
                None => insert_window!(t, id, fence, new, new.purpose),
            }
        });
        row.window()
    }

    /// Notes why a window does not move.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn note_window_error(&self, id: WindowId, error: &str) -> Result<()> {
        let error: String = error.chars().take(500).collect();
        super::db::write!(self, p => sqlx::query("update windows set last_error = $2 where id = $1 and state <> 'done'")
            .bind(id).bind(error).execute(p).await?.rows_affected());
        Ok(())
    }
}
