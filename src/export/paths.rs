use std::path::{Path, PathBuf};

use crate::model::ProviderName;

/// How the folder of files is laid out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Leaves out the provider's level: for one provider only, since two would share a `summary.json`.
    pub flat: bool,
    /// The user's level, from `user_folder`; `None` while there is one user.
    pub user: Option<String>,
}

impl Layout {
    /// `[<user>/]<provider>/<collection>/<file>`. The collection may be empty (`athlete.json`) or have levels of its
    /// own (`scrobbles/2026/02`).
    ///
    /// # Errors
    /// If one of them would lead out of the folder or to a hidden name.
    pub fn path(&self, provider: ProviderName, collection: &str, file: &str) -> Result<RelPath, BadPath> {
        self.join(provider, [collection, file])
    }

    /// The folder of everything of one provider, for erasing it. `None` when flat: then it has no folder of its own.
    ///
    /// # Errors
    /// As for [`Layout::path`].
    pub fn provider_folder(&self, provider: ProviderName) -> Result<Option<RelPath>, BadPath> {
        if self.flat { Ok(None) } else { self.join(provider, [""; 2]).map(Some) }
    }

    fn join(&self, provider: ProviderName, rest: [&str; 2]) -> Result<RelPath, BadPath> {
        let user = self.user.as_deref().unwrap_or_default();
        let provider = if self.flat { "" } else { provider.0 };
        let levels: Vec<&str> = [user, provider].into_iter().chain(rest).filter(|level| !level.is_empty()).collect();
        RelPath::new(levels.join("/"))
    }
}

/// A place below the folder's root: levels joined by `/`, none of them empty or starting with a dot.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelPath(String);

impl RelPath {
    /// Checks a path.
    ///
    /// # Errors
    /// If it is empty or absolute, or a level is empty or begins with a dot (`..`, `.git`, our temporary names).
    pub fn new(text: impl Into<String>) -> Result<Self, BadPath> {
        let text = text.into();
        let good = |level: &str| !level.is_empty() && !level.starts_with('.');
        // Backslash and colon are separators on some systems.
        if text.split('/').all(good) && !text.contains(['\\', ':', '\0']) { Ok(Self(text)) } else { Err(BadPath(text)) }
    }

    /// The path as text, with `/` between levels.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The place below this root.
    pub(super) fn below(&self, root: &Path) -> PathBuf {
        let mut path = root.to_path_buf();
        path.extend(self.0.split('/'));
        path
    }
}

impl std::fmt::Display for RelPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A path that would leave the folder, or name something hidden in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("refused to export to {0:?}: not a plain path below the export folder")]
pub struct BadPath(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    const STRAVA: ProviderName = ProviderName("strava");

    #[test]
    fn levels_come_and_go_with_the_layout() {
        let path = |flat, user: Option<&str>, collection| {
            Layout { flat, user: user.map(Into::into) }.path(STRAVA, collection, "a.json").unwrap().to_string()
        };
        assert_eq!(path(false, None, "activities"), "strava/activities/a.json");
        assert_eq!(path(false, Some("ann"), "activities"), "ann/strava/activities/a.json");
        assert_eq!(path(true, None, "activities"), "activities/a.json");
        assert_eq!(path(true, None, ""), "a.json");
        assert_eq!(path(false, None, "scrobbles/2026/02"), "strava/scrobbles/2026/02/a.json");
        assert_eq!(Layout { flat: true, user: None }.provider_folder(STRAVA), Ok(None));
        assert_eq!(Layout::default().provider_folder(STRAVA).unwrap().unwrap().as_str(), "strava");
    }

    #[test]
    fn nothing_leads_out() {
        for bad in ["", "/etc/x", "a/../b", "..", "./a", "a//b", "a/", ".git/config", "a\\b", "C:/x", "a\0"] {
            assert_eq!(RelPath::new(bad), Err(BadPath(bad.into())), "{bad:?}");
        }
        assert!(RelPath::new("a/b..json").is_ok());
    }
}
