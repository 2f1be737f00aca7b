use serde::{Deserialize, Serialize};

/// How urgent a run is; the lower, the sooner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Somebody waits for it.
    Interactive,
    /// The provider told us of a change.
    Webhook,
    /// The clock asked for it.
    Schedule,
    /// The rest of a long history.
    Backfill,
}

impl Class {
    /// All, the most urgent first.
    pub const ALL: [Self; 4] = [Self::Interactive, Self::Webhook, Self::Schedule, Self::Backfill];

    /// The number in the database.
    #[must_use]
    pub fn number(self) -> i64 {
        self as i64
    }

    /// The reverse of [`Class::number`]; anything unknown is the least urgent.
    #[must_use]
    pub fn from_number(number: i64) -> Self {
        Self::ALL.into_iter().find(|class| class.number() == number).unwrap_or(Self::Backfill)
    }
}

/// Who asked for a run; the words of the mirrored API's `source`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunSource {
    /// A call or a command.
    Pull,
    /// A delivery.
    Webhook,
    /// The clock.
    Schedule,
    /// A historical read.
    Backfill,
}

impl RunSource {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Pull, Self::Webhook, Self::Schedule, Self::Backfill];

    /// The word in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Webhook => "webhook",
            Self::Schedule => "schedule",
            Self::Backfill => "backfill",
        }
    }
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Accepted, not begun.
    Queued,
    /// A worker holds it.
    InProgress,
    /// Put back: due again later, holding no worker.
    Waiting,
    /// Everything asked for was read.
    Success,
    /// Some of it could not be read.
    Partial,
    /// None of it could be read.
    Failed,
    /// Ended on request.
    Cancelled,
}

impl RunState {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Queued, Self::InProgress, Self::Waiting, Self::Success, Self::Partial, Self::Failed, Self::Cancelled];

    /// The word in the database and in answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::InProgress => "in_progress",
            Self::Waiting => "waiting",
            Self::Success => "success",
            Self::Partial => "partial",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The reverse of [`RunState::as_str`].
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == text)
    }

    /// Final states never change.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Success | Self::Partial | Self::Failed | Self::Cancelled)
    }
}
