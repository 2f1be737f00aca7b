use super::{RunSource, RunState};

/// A point that a run passes at most once, however often it is claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Claimed for the first time.
    Started,
    /// Begins to read workouts.
    Workouts,
    /// Begins to read what comes around the clock: sleep, recovery, activity.
    Daily,
    /// Final.
    Ended,
}

impl Step {
    /// All, in the order in which a run passes them.
    pub const ALL: [Self; 4] = [Self::Started, Self::Workouts, Self::Daily, Self::Ended];

    /// The number in the database.
    #[must_use]
    pub fn number(self) -> i64 {
        self as i64
    }

    /// The reverse of [`Step::number`]; anything unknown is the end.
    #[must_use]
    pub fn from_number(number: i64) -> Self {
        Self::ALL.into_iter().find(|step| step.number() == number).unwrap_or(Self::Ended)
    }

    /// The mirrored API's word for where a run is that passed this point with this status.
    #[must_use]
    pub fn stage(self, status: SyncStatus) -> &'static str {
        match (self, status) {
            (Self::Started, _) => "started",
            (Self::Workouts | Self::Daily, _) => "fetching",
            (Self::Ended, SyncStatus::Failed) => "failed",
            (Self::Ended, SyncStatus::Cancelled) => "cancelled",
            (Self::Ended, _) => "completed",
        }
    }
}

/// The mirrored API's words for how a run stands; all but the first are final.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncStatus {
    /// Not final, whoever holds it: also while it is queued or put back.
    InProgress,
    /// Everything was read.
    Success,
    /// Some of it was not.
    Partial,
    /// None of it was.
    Failed,
    /// Ended on request.
    Cancelled,
    /// A delivery that changed nothing.
    Skipped,
}

impl SyncStatus {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::InProgress, Self::Success, Self::Partial, Self::Failed, Self::Cancelled, Self::Skipped];

    /// The word in the database and in answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InProgress => "in_progress",
            Self::Success => "success",
            Self::Partial => "partial",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Skipped => "skipped",
        }
    }
}

impl From<RunState> for SyncStatus {
    fn from(state: RunState) -> Self {
        match state {
            RunState::Queued | RunState::InProgress | RunState::Waiting => Self::InProgress,
            RunState::Success => Self::Success,
            RunState::Partial => Self::Partial,
            RunState::Failed => Self::Failed,
            RunState::Cancelled => Self::Cancelled,
        }
    }
}

impl RunSource {
    /// The mirrored API's word: what the clock asks for is a pull there.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Schedule => Self::Pull.as_str(),
            source => source.as_str(),
        }
    }
}
