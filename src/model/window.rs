use super::WindowId;

/// The beginning of every axis: far below any real instant and exact in a double.
pub const BEGINNING_MS: i64 = -(1 << 53);

/// What a window is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Counts as coverage when done.
    Cover,
    /// Reads a range again; never reopens coverage.
    Reread,
}

impl Purpose {
    /// The word in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cover => "cover",
            Self::Reread => "reread",
        }
    }
}

/// Where a window stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowState {
    /// Not read to its end.
    Open,
    /// Asked of a provider that pushes: answers may still come.
    Asked,
    /// Read to its end, and stored.
    Done,
}

impl WindowState {
    /// The word in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Asked => "asked",
            Self::Done => "done",
        }
    }
}

/// A range `[lo, hi)` of a stream's axis, in milliseconds, with the place reached inside it.
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    /// Its row.
    pub id: WindowId,
    /// What it is for.
    pub purpose: Purpose,
    /// Lower bound, inside.
    pub lo: i64,
    /// Upper bound, outside; never moves.
    pub hi: i64,
    /// The place inside, in the provider's own terms; `None` before the first page.
    pub position: Option<serde_json::Value>,
}
