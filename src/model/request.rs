use serde::{Deserialize, Serialize};

use super::Kind;

/// The mirrored API's `data_type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DataType {
    /// Activities and exercises.
    #[serde(rename = "workouts")]
    Workouts,
    /// Sleep, recovery, activity samples.
    #[serde(rename = "247")]
    Daily,
    /// Everything that the provider has.
    #[default]
    #[serde(rename = "all")]
    All,
}

impl DataType {
    /// All of them, in the order of the documentation.
    pub const ALL: [Self; 3] = [Self::Workouts, Self::Daily, Self::All];

    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Workouts => "workouts",
            Self::Daily => "247",
            Self::All => "all",
        }
    }
}

/// What one run was asked to read. Kept with the run, and hashed into its request key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SyncRequest {
    /// Which data.
    pub data_type: DataType,
    /// Lower bound in milliseconds: read again from here. `Some(BEGINNING_MS)` reads everything again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_ms: Option<i64>,
    /// Upper bound in milliseconds, outside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_ms: Option<i64>,
    /// Page size, never a cap on the result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    /// Items to skip; above 0 the read proves nothing.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub offset: u32,
    /// Also fetch the parts called samples (Polar).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub samples: bool,
    /// Also fetch the parts called zones.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub zones: bool,
    /// Also fetch the parts called route (Polar).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub route: bool,
    /// Choose the axis by creation instead of modification time, where a provider has both.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub by_creation_time: bool,
    /// The daily sweep over what is stored: a cut list begins anew, because only a whole one proves what is gone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reconcile: bool,
    /// Read these items and nothing else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub items: Vec<NamedItem>,
    /// Read nothing: find out whether the grant still lives, and end the connection if it does not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub check_grant: bool,
    /// Read nothing: make records and samples anew from the stored answers.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rebuild: bool,
    /// Parameters of another provider that were sent along and ignored.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignored: Vec<String>,
}

/// One item that a provider named.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NamedItem {
    /// What it is.
    pub kind: Kind,
    /// The provider's id of it.
    pub external_id: String,
    /// The provider says that it is gone: only that is to be found out.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gone: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde asks for")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}
