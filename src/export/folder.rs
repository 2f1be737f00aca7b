use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::paths::RelPath;

/// Up to this many files or folders are synced one by one; above, the whole file system at once: 30 000 files a second
/// instead of 134. Not always at once, because that also waits for what other programs have just written.
#[cfg(any(target_os = "linux", test))]
const FEW: usize = 8;

/// Our temporary files: `.wearsync-<16 hex>-<n>.tmp`, in the folder of the file they become.
const TEMP_PREFIX: &str = ".wearsync-";
const TEMP_SUFFIX: &str = ".tmp";

/// A local folder of files, held by this process alone. Calls block: run them where blocking is allowed.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    /// Dropping it frees the folder; so does the death of the process.
    _lock: File,
}

/// What a batch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Files that are new or have new content.
    pub written: usize,
    /// Files that had this content already and were left alone.
    pub unchanged: usize,
}

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// Another process holds the lock.
    #[error("another wearsync process writes this export folder (it holds {path}): stop it, or let it do the export", path = .0.display())]
    InUse(PathBuf),
    /// Two files of one batch have the same name; neither is written.
    #[error("two records of one export would become the same file {0}")]
    Twice(RelPath),
    /// The system refused.
    #[error("cannot {doing} {path}: {source}{hint}", path = .path.display(), hint = hint(.source))]
    Io {
        /// What was tried, as a verb.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What a person can do about it, after the system's own words.
fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "; free some space or set WEARSYNC_EXPORT_DIR to another disk: the export goes on where it stopped"
        }
        ErrorKind::PermissionDenied => {
            "; give the user that runs wearsync write access, or set WEARSYNC_EXPORT_DIR to a folder of its own"
        }
        ErrorKind::ReadOnlyFilesystem => "; mount it writable, or set WEARSYNC_EXPORT_DIR to another folder",
        ErrorKind::NotADirectory | ErrorKind::IsADirectory | ErrorKind::AlreadyExists => {
            "; something else has this name: move it away, or set WEARSYNC_EXPORT_DIR to another folder"
        }
        _ => "",
    }
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FolderError {
    move |source| FolderError::Io { doing, path: path.to_path_buf(), source }
}

impl Folder {
    /// Makes the folder if it is missing, takes it for this process, and removes temporary files that a crash left.
    /// The lock is a file outside the folder (people commit the folder); it stays there, unlocked, afterwards.
    ///
    /// # Errors
    /// If another process holds it, or the system refuses.
    pub fn open(root: impl Into<PathBuf>, lock_path: &Path) -> Result<Self, FolderError> {
        let root = root.into();
        if let Some(parent) = lock_path.parent() {
            fs::create_dir_all(parent).map_err(io_error("create folder", parent))?;
        }
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(lock_path);
        let lock = lock.map_err(io_error("open lock file", lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(FolderError::InUse(lock_path.to_path_buf())),
            Err(TryLockError::Error(source)) => return Err(io_error("lock", lock_path)(source)),
        }
        let missing: Vec<_> = root.ancestors().take_while(|up| !up.as_os_str().is_empty() && !up.exists()).collect();
        fs::create_dir_all(&root).map_err(io_error("create folder", &root))?;
        let above = missing.iter().filter_map(|made| made.parent()).filter(|up| up.is_dir());
        settle_folders(&above.map(Path::to_path_buf).collect())?;
        remove_leftovers(&root)?;
        Ok(Self { root, _lock: lock })
    }

    /// Where the files are.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Writes all these files, each whole or not at all, and returns when they are safe on disk. A file that has this
    /// content already is not touched. After an error some of them may be in place; writing them again is harmless.
    ///
    /// # Errors
    /// If two of them have the same name, or the system refuses.
    pub fn write_batch(&self, files: &[(RelPath, Vec<u8>)]) -> Result<Written, FolderError> {
        let mut names = HashSet::with_capacity(files.len());
        if let Some((path, _)) = files.iter().find(|(path, _)| !names.insert(path)) {
            return Err(FolderError::Twice(path.clone()));
        }
        let mut batch = Batch { token: rand::random(), temps: Vec::new() };
        // Folders of untouched files count as well: a crash may have come between their renames and the sync.
        let mut folders = BTreeSet::new();
        for (path, content) in files {
            let target = path.below(&self.root);
            let folder = target.parent().unwrap_or(&self.root).to_path_buf();
            if !folders.contains(&folder) {
                fs::create_dir_all(&folder).map_err(io_error("create folder", &folder))?;
                folders.extend(folder.ancestors().take_while(|up| up.starts_with(&self.root)).map(Path::to_path_buf));
            }
            if !has_content(&target, content) {
                batch.write(&folder, target, content)?;
            }
        }
        let written = batch.temps.len();
        // Content first, names second, places last: a name never stands before what it names.
        settle(batch.temps.iter().map(|(temp, _)| temp.as_path()), &folders)?;
        batch.rename()?;
        settle_folders(&folders)?;
        Ok(Written { written, unchanged: files.len() - written })
    }

    /// Whether a file stands there with exactly this content; without content, whether one stands there at all.
    #[must_use]
    pub fn has(&self, path: &RelPath, content: Option<&[u8]>) -> bool {
        let target = path.below(&self.root);
        content.map_or_else(|| target.is_file(), |content| has_content(&target, content))
    }

    /// Removes one file; `false` if there was none. Folders that become empty go with it.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn remove(&self, path: &RelPath) -> Result<bool, FolderError> {
        let target = path.below(&self.root);
        self.gone(&target, fs::remove_file(&target))
    }

    /// Removes a folder with everything in it; `false` if there was none. Folders that become empty go with it.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn remove_tree(&self, path: &RelPath) -> Result<bool, FolderError> {
        let target = path.below(&self.root);
        let removed = if target.is_dir() { fs::remove_dir_all(&target) } else { fs::remove_file(&target) };
        self.gone(&target, removed)
    }

    /// Moves a folder; `false` if there is none, or something stands at the new place.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn move_tree(&self, from: &RelPath, to: &RelPath) -> Result<bool, FolderError> {
        let (from, to) = (from.below(&self.root), to.below(&self.root));
        if !from.is_dir() || to.exists() {
            return Ok(false);
        }
        let parent = to.parent().unwrap_or(&self.root).to_path_buf();
        fs::create_dir_all(&parent).map_err(io_error("make", &parent))?;
        fs::rename(&from, &to).map_err(io_error("move", &from))?;
        settle_folders(&BTreeSet::from([parent, self.root.clone()]))?;
        Ok(true)
    }

    fn gone(&self, target: &Path, result: io::Result<()>) -> Result<bool, FolderError> {
        match result {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            other => other.map_err(io_error("remove", target))?,
        }
        let mut folder = target.parent().unwrap_or(&self.root);
        while folder != self.root && fs::remove_dir(folder).is_ok() {
            folder = folder.parent().unwrap_or(&self.root);
        }
        settle_folders(&BTreeSet::from([folder.to_path_buf()]))?;
        Ok(true)
    }
}

/// Temporary files and what they become. What is not renamed is removed.
struct Batch {
    token: u64,
    temps: Vec<(PathBuf, PathBuf)>,
}

impl Batch {
    fn write(&mut self, folder: &Path, target: PathBuf, content: &[u8]) -> Result<(), FolderError> {
        let temp = folder.join(format!("{TEMP_PREFIX}{:016x}-{}{TEMP_SUFFIX}", self.token, self.temps.len()));
        let file = OpenOptions::new().write(true).create_new(true).open(&temp);
        let mut file = file.map_err(io_error("write", &target))?;
        let written = file.write_all(content).map_err(io_error("write", &target));
        self.temps.push((temp, target));
        written
    }

    fn rename(&mut self) -> Result<(), FolderError> {
        while let Some((temp, target)) = self.temps.last() {
            fs::rename(temp, target).map_err(io_error("write", target))?;
            self.temps.pop();
        }
        Ok(())
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        for (temp, _) in &self.temps {
            // Best effort: the next start removes what is left.
            let _ = fs::remove_file(temp);
        }
    }
}

fn has_content(path: &Path, content: &[u8]) -> bool {
    // Symbolic links are replaced by files, not followed: what they point to is not ours.
    let same_length = fs::symlink_metadata(path).is_ok_and(|m| m.is_file() && m.len() == content.len() as u64);
    same_length && fs::read(path).is_ok_and(|found| found == content)
}

/// Returns when these folders are safe on disk: the names in them, that is.
fn settle_folders(folders: &BTreeSet<PathBuf>) -> Result<(), FolderError> {
    settle(folders.iter().map(PathBuf::as_path), folders)
}

/// Returns when these files or folders are safe on disk; `folders` tell which disks they are on.
fn settle<'a>(paths: impl ExactSizeIterator<Item = &'a Path>, folders: &BTreeSet<PathBuf>) -> Result<(), FolderError> {
    #[cfg(target_os = "linux")]
    if paths.len() > FEW {
        use std::os::unix::fs::MetadataExt;
        let mut disks = HashSet::new();
        for path in folders {
            let file = File::open(path).map_err(io_error("open", path))?;
            if disks.insert(file.metadata().map_err(io_error("open", path))?.dev()) {
                rustix::fs::syncfs(&file).map_err(io::Error::from).map_err(io_error("sync", path))?;
            }
        }
        return Ok(());
    }
    for path in paths {
        // Elsewhere folders cannot be opened as files, and files only be synced when opened for writing.
        if cfg!(unix) || path.is_file() {
            let file = OpenOptions::new().read(true).write(!cfg!(unix)).open(path).map_err(io_error("open", path))?;
            match file.sync_all() {
                // Some network file systems cannot sync folders; they have no other way either.
                Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {}
                result => result.map_err(io_error("sync", path))?,
            }
        }
    }
    Ok(())
}

/// Removes our own temporary files below a folder. Hidden folders (`.git`) and links to folders are left alone.
fn remove_leftovers(folder: &Path) -> Result<(), FolderError> {
    for entry in fs::read_dir(folder).map_err(io_error("read folder", folder))? {
        let entry = entry.map_err(io_error("read folder", folder))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(io_error("read folder", &path))?;
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        if kind.is_dir() && !name.starts_with('.') {
            remove_leftovers(&path)?;
        } else if kind.is_file() && is_temp(name) {
            match fs::remove_file(&path) {
                // Whoever made it was faster: it has its name by now.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                result => result.map_err(io_error("remove", &path))?,
            }
        }
    }
    Ok(())
}

fn is_temp(name: &str) -> bool {
    let middle = name.strip_prefix(TEMP_PREFIX).and_then(|rest| rest.strip_suffix(TEMP_SUFFIX));
    middle.and_then(|text| text.split_once('-')).is_some_and(|(token, n)| {
        token.len() == 16
            && token.bytes().all(|b| b.is_ascii_hexdigit())
            && !n.is_empty()
            && n.bytes().all(|b| b.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(root: &Path) -> Folder {
        Folder::open(root.join("exports"), &root.join("state/export.lock")).unwrap()
    }

    fn files(paths: &[&str], content: &str) -> Vec<(RelPath, Vec<u8>)> {
        paths.iter().map(|path| (RelPath::new(*path).unwrap(), content.as_bytes().to_vec())).collect()
    }

    /// Every file below, hidden ones too.
    fn list(folder: &Path) -> Vec<String> {
        let mut found = Vec::new();
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let name = entry.file_name().into_string().unwrap();
            if entry.file_type().unwrap().is_dir() {
                found.extend(list(&entry.path()).into_iter().map(|below| format!("{name}/{below}")));
            } else {
                found.push(name);
            }
        }
        found.sort();
        found
    }

    #[test]
    fn batches_of_any_size_are_written_and_repeats_touch_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let folder = open(dir.path());
        for n in [0, 1, FEW, FEW + 1, 100] {
            let names: Vec<String> = (0..n).map(|i| format!("of{n}/level{}/{i}.json", i % 3)).collect();
            let batch = files(&names.iter().map(String::as_str).collect::<Vec<_>>(), "content\n");
            assert_eq!(folder.write_batch(&batch).unwrap(), Written { written: n, unchanged: 0 });
            let modified = |path: &RelPath| fs::metadata(path.below(folder.root())).unwrap().modified().unwrap();
            let before: Vec<_> = batch.iter().map(|(path, _)| modified(path)).collect();
            assert_eq!(folder.write_batch(&batch).unwrap(), Written { written: 0, unchanged: n });
            assert_eq!(before, batch.iter().map(|(path, _)| modified(path)).collect::<Vec<_>>());
        }
        assert!(list(folder.root()).iter().all(|name| name.ends_with(".json")));
        // Same length, other content.
        assert_eq!(folder.write_batch(&files(&["of1/level0/0.json"], "CONTENT\n")).unwrap().written, 1);
        assert_eq!(fs::read(folder.root().join("of1/level0/0.json")).unwrap(), b"CONTENT\n");
    }

    #[test]
    fn leftovers_of_a_crash_go_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("exports");
        let keep = [".git/.wearsync-0123456789abcdef-0.tmp", ".wearsync-notes.tmp", "a/.tmp-1", "a/x.json", "b.tmp"];
        for name in keep.iter().chain(&["a/.wearsync-0123456789abcdef-0.tmp", ".wearsync-0123456789abcdef-17.tmp"]) {
            fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
            fs::write(root.join(name), "x").unwrap();
        }
        open(dir.path());
        let mut keep = keep.to_vec();
        keep.sort_unstable();
        assert_eq!(list(&root), keep);
    }

    #[test]
    fn one_process_at_a_time_and_no_state_in_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let folder = open(dir.path());
        let second = Folder::open(dir.path().join("exports"), &dir.path().join("state/export.lock"));
        assert!(matches!(second, Err(FolderError::InUse(_))), "{second:?}");
        assert!(list(folder.root()).is_empty());
        drop(folder);
        open(dir.path());
    }

    #[test]
    fn a_failed_batch_leaves_old_content_and_no_temporary_files() {
        let dir = tempfile::tempdir().unwrap();
        let folder = open(dir.path());
        folder.write_batch(&files(&["a/1.json", "blocked"], "old")).unwrap();
        let error = folder.write_batch(&files(&["a/1.json", "a/2.json", "blocked/3.json"], "new")).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("cannot create folder ") && text.contains("exports/blocked"), "{text}");
        assert!(text.contains("move it away"), "{text}");
        assert_eq!(list(folder.root()), ["a/1.json", "blocked"]);
        assert_eq!(fs::read(folder.root().join("a/1.json")).unwrap(), b"old");
        // A folder where a file should go stops at the rename.
        fs::create_dir_all(folder.root().join("a/3.json/x")).unwrap();
        folder.write_batch(&files(&["a/3.json"], "new")).unwrap_err();
        assert_eq!(list(folder.root()), ["a/1.json", "blocked"]);
        let twice = folder.write_batch(&files(&["a/9.json", "a/9.json"], "new"));
        assert!(matches!(twice, Err(FolderError::Twice(_))), "{twice:?}");
    }

    #[test]
    fn errors_say_what_to_do() {
        let say = |kind: ErrorKind| io_error("write", Path::new("/data/x.json"))(kind.into()).to_string();
        for (kind, words) in [
            (ErrorKind::StorageFull, "free some space"),
            (ErrorKind::PermissionDenied, "write access"),
            (ErrorKind::ReadOnlyFilesystem, "mount it writable"),
        ] {
            let text = say(kind);
            assert!(text.starts_with("cannot write /data/x.json: ") && text.contains(words), "{text}");
        }
    }

    #[test]
    fn removing_takes_empty_folders_along_but_never_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let folder = open(dir.path());
        let batch = files(&["ann/strava/a/1.json", "ann/strava/a/2.json", "ann/strava/b/3.json", "bob/4.json"], "x");
        folder.write_batch(&batch).unwrap();
        assert!(folder.remove(&batch[0].0).unwrap());
        assert!(!folder.remove(&batch[0].0).unwrap());
        assert!(!folder.remove(&RelPath::new("no/such").unwrap()).unwrap());
        assert!(folder.remove_tree(&RelPath::new("ann/strava").unwrap()).unwrap());
        assert!(!folder.remove_tree(&RelPath::new("ann/strava").unwrap()).unwrap());
        assert_eq!(list(folder.root()), ["bob/4.json"]);
        assert!(!folder.root().join("ann").exists());
        assert!(folder.remove(&batch[3].0).unwrap());
        assert!(folder.root().is_dir());
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_replaced_and_its_target_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let folder = open(dir.path());
        let outside = dir.path().join("outside");
        fs::write(&outside, "x").unwrap();
        std::os::unix::fs::symlink(&outside, folder.root().join("a.json")).unwrap();
        folder.write_batch(&files(&["a.json"], "y")).unwrap();
        assert_eq!(fs::read(&outside).unwrap(), b"x");
        assert!(!folder.root().join("a.json").is_symlink());
    }
}
