use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{DeliveryId, RunId};

/// In front of a delivery's id, where jobs are written as text. A run is its bare id.
const DELIVERY: &str = "delivery:";

/// What a worker can take: the rows say what is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Job {
    /// A run.
    Run(RunId),
    /// A delivery.
    Delivery(DeliveryId),
}

impl Job {
    /// The bare id.
    #[must_use]
    pub fn id(self) -> Uuid {
        match self {
            Self::Run(id) => id.0,
            Self::Delivery(id) => id.0,
        }
    }
}

impl From<RunId> for Job {
    fn from(id: RunId) -> Self {
        Self::Run(id)
    }
}

impl From<DeliveryId> for Job {
    fn from(id: DeliveryId) -> Self {
        Self::Delivery(id)
    }
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run(id) => id.fmt(f),
            Self::Delivery(id) => write!(f, "{DELIVERY}{id}"),
        }
    }
}

impl FromStr for Job {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        match text.strip_prefix(DELIVERY) {
            Some(id) => Uuid::parse_str(id).map(|id| Self::Delivery(DeliveryId(id))),
            None => Uuid::parse_str(text).map(|id| Self::Run(RunId(id))),
        }
    }
}
