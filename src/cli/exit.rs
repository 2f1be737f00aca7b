//! How commands end: one table of exit codes, and errors in plain words.

use std::process::ExitCode;

use crate::config;
use crate::storage;
use crate::sync::{self, TokenFailure};

/// The exit codes, all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Success, or put back: the rest will be done later.
    Done = 0,
    /// Failed, partial or cancelled.
    Failed = 1,
    /// Wrong usage: arguments or settings. The same that clap ends with.
    Usage = 2,
    /// Something is not covered.
    Stale = 3,
    /// The connection needs to be authorised again.
    Reauthorize = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// What every command answers.
pub(crate) type Outcome = anyhow::Result<Exit>;

/// A command that ends with this code and these words.
#[derive(Debug, thiserror::Error)]
#[error("{words}")]
struct Refusal {
    exit: Exit,
    words: String,
}

/// The command was called wrongly: says how to call it.
pub(crate) fn usage(words: impl Into<String>) -> anyhow::Error {
    Refusal { exit: Exit::Usage, words: words.into() }.into()
}

/// A person has to connect again.
pub(crate) fn reauthorize(words: impl Into<String>) -> anyhow::Error {
    Refusal { exit: Exit::Reauthorize, words: words.into() }.into()
}

/// What an error ends with.
pub(crate) fn code(error: &anyhow::Error) -> Exit {
    for cause in error.chain() {
        if let Some(refusal) = cause.downcast_ref::<Refusal>() {
            return refusal.exit;
        }
        if cause.is::<config::Error>()
            || cause.is::<sync::Refused>()
            || matches!(cause.downcast_ref(), Some(sync::Error::Settings(_)))
        {
            return Exit::Usage;
        }
        if matches!(cause.downcast_ref(), Some(TokenFailure::Reauthorize(_))) {
            return Exit::Reauthorize;
        }
    }
    Exit::Failed
}

/// What happened and why, outermost first, and what can be done where that is known.
pub(crate) fn words(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        // Many errors quote the one below them.
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    // Who opened the database has said it already.
    if let Some(hint) = error.chain().find_map(hint).filter(|_| !text.contains("DATABASE_URL")) {
        text.push_str("\n  ");
        text.push_str(hint);
    }
    text
}

fn hint(cause: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    match cause.downcast_ref::<storage::Error>()? {
        storage::Error::Unavailable(_) => {
            Some("look whether the database runs and whether DATABASE_URL names it; then try again")
        }
        storage::Error::Migrate(_) => {
            Some("`wearsync doctor` says what state the database is in; an older program cannot use a newer database")
        }
        storage::Error::Corrupt { .. } => Some("`wearsync rebuild` makes normalised rows again from the raw answers"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn every_error_has_its_code() {
        let failed = || anyhow::anyhow!("x");
        assert_eq!(code(&failed()), Exit::Failed);
        assert_eq!(code(&usage("x").context("while")), Exit::Usage);
        assert_eq!(code(&config::Error(vec!["x".to_owned()]).into()), Exit::Usage);
        assert_eq!(code(&sync::Refused::Invalid("x".to_owned()).into()), Exit::Usage);
        assert_eq!(code(&sync::Error::Settings("x".to_owned()).into()), Exit::Usage);
        assert_eq!(code(&reauthorize("x")), Exit::Reauthorize);
        assert_eq!(code(&TokenFailure::Reauthorize("x".to_owned()).into()), Exit::Reauthorize);
    }

    #[test]
    fn causes_are_told_once() {
        let error = Err::<(), _>(anyhow::anyhow!("port 1 is taken")).context("cannot listen: port 1 is taken");
        assert_eq!(words(&error.unwrap_err()), "cannot listen: port 1 is taken");
        let error = Err::<(), _>(anyhow::anyhow!("why")).context("what").unwrap_err();
        assert_eq!(words(&error), "what: why");
    }
}
