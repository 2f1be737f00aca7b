//! Entity files: what they are called, what is in them, and how they get into a local folder.
//!
//! May name model, clock, config and telemetry; callers hand in plain values. Rendering is pure: equal input gives
//! equal bytes, so a repeated export changes nothing. What must always hold: a provider's answer is spliced into its
//! file as received; a final name never holds a torn file; nothing is written outside the folder's root.
//! What the files look like from outside is told in `docs/files.md`.

mod entity;
mod folder;
mod paths;
mod stem;
mod summary;

pub use entity::{DeletedFile, EntityFile, FORMAT, RenderError, fields, render, render_deleted};
pub use folder::{Folder, FolderError, Written};
pub use paths::{BadPath, Layout, RelPath};
pub use stem::{MAX_STEM, deleted_file, file, part_stem, reference_file, stem, user_folder};
pub use summary::{CoverWindow, LastSync, Summary, complete_until, render_last_sync, render_summary};

#[cfg(test)]
mod tests;
