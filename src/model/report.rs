use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How far a run is; written with every page.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The stream or part being read (`activities`, `streams`).
    pub stream: String,
    /// Items done of it in this run.
    pub done: u64,
    /// Items of it in all, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// Calls left to this run's class in the tightest quota window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota_left: Option<u64>,
    /// Seconds until the run is thought to end, waits for quota included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<u64>,
    /// Provider calls made by this run so far.
    #[serde(default)]
    pub calls: u64,
}

/// What one stream of a run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamReport {
    /// Items that the provider listed.
    pub listed: u64,
    /// Records new to us.
    pub inserted: u64,
    /// Records that changed.
    pub updated: u64,
    /// Records found deleted.
    pub deleted: u64,
    /// Its newest window was opened by this run: a claim after a crash goes on with it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub opened: bool,
    /// Everything asked of it was read.
    #[serde(default)]
    pub complete: bool,
    /// What went wrong, in plain words; absent when nothing did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What the part calls (detail, streams, …) of a run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartReport {
    /// Stored.
    pub stored: u64,
    /// The provider has none (404).
    pub none: u64,
    /// Given up.
    pub failed: u64,
}

/// The result of a run. Kept with it for good.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// Per stream.
    #[serde(default)]
    pub streams: BTreeMap<String, StreamReport>,
    /// Per part name.
    #[serde(default)]
    pub parts: BTreeMap<String, PartReport>,
    /// Samples stored.
    #[serde(default)]
    pub samples: u64,
    /// Of these, samples of an answer that was stored before and changed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub samples_updated: u64,
    /// Files written.
    #[serde(default)]
    pub files: u64,
    /// Provider calls made.
    #[serde(default)]
    pub calls: u64,
    /// Somebody asked for it again while it ran: it reads the newest data once more before it ends.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub again: bool,
    /// What a rebuild came to, where the run was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebuilt: Option<Rebuilt>,
    /// Things worth knowing: ignored parameters, dropped values.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl RunReport {
    /// Records made, changed and found deleted.
    #[must_use]
    pub fn records(&self) -> (u64, u64, u64) {
        self.streams.values().fold((0, 0, 0), |(inserted, updated, deleted), stream| {
            (inserted + stream.inserted, updated + stream.updated, deleted + stream.deleted)
        })
    }

    /// Whether nothing that is stored is other than before.
    #[must_use]
    pub fn changed_nothing(&self) -> bool {
        self.records() == (0, 0, 0) && self.parts.values().all(|part| part.stored == 0)
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde asks for")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// What a rebuild came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rebuilt {
    /// Records looked at.
    pub records: u64,
    /// Records whose row or samples were written anew.
    pub changed: u64,
}
