use serde::Serialize;

/// The name of one answer about a record, for example `summary`, `detail`, `streams`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct PartName(pub &'static str);

impl std::fmt::Display for PartName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

/// Where a part stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PartState {
    /// A further call must bring it.
    Wanted,
    /// The bytes are here, as received.
    Stored,
    /// The provider says that it does not exist (404).
    None,
    /// The bytes are here but the normaliser cannot read them.
    Unreadable,
    /// Given up after its own attempts; a later change of the record asks again.
    Failed,
}

impl PartState {
    /// The word in the database and in answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Wanted => "wanted",
            Self::Stored => "stored",
            Self::None => "none",
            Self::Unreadable => "unreadable",
            Self::Failed => "failed",
        }
    }

    /// The reverse of [`PartState::as_str`].
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Wanted, Self::Stored, Self::None, Self::Unreadable, Self::Failed]
            .into_iter()
            .find(|s| s.as_str() == text)
    }
}
