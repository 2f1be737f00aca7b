//! Database → files. Everything written here is a function of rows that do not change, so files can be deleted and come
//! back identical.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::connect::give_back;
use super::engine::blocking;
use super::prepare::decompress;
use super::{Engine, Error, ProviderSetup, failpoint};
use crate::calculated;
use crate::config::ExportTouch;
use crate::export::{self, DeletedFile, EntityFile, Folder, LastSync, Layout, RelPath, Summary};
use crate::model::{ConnectionId, Details, Kind, RecordId, UserId, WindowState};
use crate::providers::{Axis, FileRule, PartBody, Provider};
use crate::storage::{Connection, ExportPart, ExportRecord, User, UserFilter};
use crate::telemetry;

/// Answers rendered at a time: each batch waits for the disk twice.
const BATCH: i64 = 1000;
/// No further answer joins a batch that has so many bytes: it is held in memory several times over.
const BATCH_BYTES: i64 = 8 << 20;

/// Writes files, in the one process that owns the folder.
#[derive(Clone, Debug)]
pub struct Exporter {
    folder: Arc<Folder>,
    /// Held shared from reading rows to writing their files, and alone while the files of rows that are gone are removed:
    /// no file is written of a row that is gone by then.
    removing: Arc<tokio::sync::RwLock<()>>,
}

impl Exporter {
    /// Owns this folder.
    #[must_use]
    pub fn new(folder: Folder) -> Self {
        Self { folder: Arc::new(folder), removing: Arc::default() }
    }

    /// The folder's root.
    #[must_use]
    pub fn root(&self) -> &std::path::Path {
        self.folder.root()
    }
}

/// What a drain wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Files written; those that were there with the same content are not counted.
    pub files: u64,
}

/// Writes what a connection has stored since its last drain, then its summaries.
///
/// # Errors
/// When the database or the folder fails; what was not marked is written again, with the same bytes.
pub async fn drain(engine: &Engine, connection: ConnectionId) -> Result<Drained, Error> {
    drain_as(engine, connection, true).await
}

/// The same without the summaries: beside a sync that goes on, and drains once more at its end.
pub(crate) async fn drain_files(engine: &Engine, connection: ConnectionId) -> Result<Drained, Error> {
    drain_as(engine, connection, false).await
}

async fn drain_as(engine: &Engine, connection: ConnectionId, whole: bool) -> Result<Drained, Error> {
    let Some(exporter) = &engine.exporter else { return Ok(Drained::default()) };
    // Before anything is written: the next user's files may stand where an erased one's stood.
    remove_erased(engine).await?;
    let Some(connection) = engine.db.find_connection(connection).await? else { return Ok(Drained::default()) };
    let Some(setup) = engine.provider(&connection.provider) else { return Ok(Drained::default()) };
    // One exporter per user: two would write the same files, harmlessly, but for nothing.
    let Some(mut epoch) = lease(engine, &connection).await? else { return Ok(Drained::default()) };
    let result = write_all(engine, exporter, setup, &connection, whole).await;
    if let Some(held) = lease(engine, &connection).await? {
        epoch = held;
    }
    engine.db.release_export_lease(connection.user_id, epoch, engine.now()).await?;
    result
}

/// Erases a user: rows at once, files by the process that owns them (this one, or at the latest with its next sweep).
/// Grants that nobody else uses are given back at their providers, as far as those answer.
///
/// # Errors
/// When the database or the folder fails.
pub async fn erase_user(engine: &Engine, user: UserId) -> Result<Option<User>, Error> {
    let Some(found) = engine.db.find_user(user).await? else { return Ok(None) };
    let mut folders = vec![export::user_folder(found.external_user_id.as_deref(), found.id)];
    if is_oldest(engine, user).await? {
        for setup in engine.providers.values() {
            folders.extend(provider_folders(&Layout { flat: engine.config.export_flat, user: None }, setup)?);
        }
    }
    let erased = engine.db.delete_user(user, &folders, engine.now()).await?;
    remove_erased(engine).await?;
    let Some((erased, left)) = erased else { return Ok(None) };
    give_back(engine, left).await;
    Ok(Some(erased))
}

/// Where the files of a user's data of one provider are.
pub(crate) async fn folders_of(engine: &Engine, user: &User, setup: &ProviderSetup) -> Result<Vec<String>, Error> {
    let flat = engine.config.export_flat;
    let own = Layout { flat, user: Some(export::user_folder(user.external_user_id.as_deref(), user.id)) };
    let mut folders = provider_folders(&own, setup)?;
    if is_oldest(engine, user.id).await? {
        folders.extend(provider_folders(&Layout { flat, user: None }, setup)?);
    }
    Ok(folders)
}

/// Whether the files without a user's level are this user's: nobody else's ever stand there.
async fn is_oldest(engine: &Engine, user: UserId) -> Result<bool, Error> {
    let oldest = engine.db.list_users(&UserFilter { sort_by: "created_at", limit: 1, ..UserFilter::default() }).await?;
    Ok(oldest.rows.first().is_some_and(|row| row.user.id == user))
}

/// The folder of a provider; where it has none of its own, everything that is written for it.
fn provider_folders(layout: &Layout, setup: &ProviderSetup) -> Result<Vec<String>, Error> {
    let spec = setup.spec();
    if let Some(folder) = layout.provider_folder(spec.name).map_err(bad)? {
        return Ok(vec![folder.to_string()]);
    }
    let files = ["summary.json", "last_sync.json"].into_iter().map(|file| layout.path(spec.name, "", file));
    let parts = spec.parts.iter().map(|part| match part.file {
        FileRule::Single(name) => layout.path(spec.name, part.collection, &format!("{name}.json")),
        FileRule::Entity(_) | FileRule::Reference => layout.path(spec.name, part.collection, ""),
    });
    files.chain(parts).map(|path| path.map(|path| path.to_string()).map_err(bad)).collect()
}

/// Removes the files of data that was erased, where this process owns them.
///
/// # Errors
/// When the database or the folder fails.
pub async fn remove_erased(engine: &Engine) -> Result<(), Error> {
    let Some(exporter) = &engine.exporter else { return Ok(()) };
    if engine.db.list_erased_folders().await?.is_empty() {
        return Ok(());
    }
    let _alone = exporter.removing.write().await;
    for path in engine.db.list_erased_folders().await? {
        let folder = exporter.folder.clone();
        let place = RelPath::new(path.clone()).map_err(bad)?;
        blocking(move || folder.remove_tree(&place).map_err(bad)).await?;
        engine.db.forget_erased_folder(&path).await?;
    }
    Ok(())
}

/// Takes or renews the right to write a user's files.
async fn lease(engine: &Engine, connection: &Connection) -> Result<Option<i64>, Error> {
    let until = engine.after(engine.config.lease);
    Ok(engine.db.take_export_lease(connection.user_id, &engine.owner, engine.now(), until).await?)
}

async fn write_all(
    engine: &Engine,
    exporter: &Exporter,
    setup: &ProviderSetup,
    connection: &Connection,
    whole: bool,
) -> Result<Drained, Error> {
    let layout = layout(engine, exporter, connection).await?;
    // What there is one of, the summaries and the profile, is about the connection that is there now.
    let replaced = connection.status == "replaced";
    let mut drained = Drained::default();
    loop {
        let shared = exporter.removing.read().await;
        let parts = engine.db.list_unexported(connection.id, BATCH, BATCH_BYTES).await?;
        let deleted = engine.db.list_unexported_deletes(connection.id, BATCH).await?;
        if parts.is_empty() && deleted.is_empty() {
            break;
        }
        // Rows that came after an erase were read after it, so it is seen here: its files go before theirs are written.
        if !engine.db.list_erased_folders().await?.is_empty() {
            drop(shared);
            remove_erased(engine).await?;
            continue;
        }
        let ids: Vec<_> = parts.iter().map(|part| part.id).collect();
        let gone: Vec<RecordId> = deleted.iter().map(|record| record.id).collect();
        let (provider, folder, layout) = (setup.provider, exporter.folder.clone(), layout.clone());
        let started = Instant::now();
        let written = blocking(move || {
            let mut files: BTreeMap<RelPath, Vec<u8>> = BTreeMap::new();
            for part in &parts {
                if let Some((path, bytes)) = render(provider, &layout, part, replaced)? {
                    files.insert(path, bytes);
                }
            }
            for record in &deleted {
                if let Some((path, bytes)) = render_deleted(provider, &layout, record)? {
                    files.insert(path, bytes);
                }
            }
            let files: Vec<_> = files.into_iter().collect();
            folder.write_batch(&files).map_err(|error| Error::Export(error.to_string()))
        })
        .await?;
        telemetry::file_batch(written.written as u64, started.elapsed().as_secs_f64());
        drained.files += written.written as u64;
        failpoint::hit("files-written");
        // Late marks repeat work; early marks lose it.
        engine.db.clear_exports(&ids, &gone).await?;
        failpoint::hit("marks-cleared");
        if lease(engine, connection).await?.is_none() {
            return Ok(drained);
        }
    }
    if whole && !replaced {
        let _shared = exporter.removing.read().await;
        drained.files += summaries(engine, exporter, setup, connection, &layout).await?;
    }
    Ok(drained)
}

async fn layout(engine: &Engine, exporter: &Exporter, connection: &Connection) -> Result<Layout, Error> {
    let flat = engine.config.export_flat;
    // The oldest two: the first one's files have no level of their own until there is a second.
    let users = engine.db.list_users(&UserFilter { sort_by: "created_at", limit: 2, ..UserFilter::default() }).await?;
    let [first, _, ..] = users.rows.as_slice() else { return Ok(Layout { flat, user: None }) };
    let folder = |user: &User| export::user_folder(user.external_user_id.as_deref(), user.id);
    if !flat {
        let (folder_of_first, folders) = (folder(&first.user), exporter.folder.clone());
        let names: Vec<&'static str> = engine.providers.keys().copied().collect();
        blocking(move || {
            for name in names {
                let to = RelPath::new(format!("{folder_of_first}/{name}")).map_err(bad)?;
                folders.move_tree(&RelPath::new(name).map_err(bad)?, &to).map_err(bad)?;
            }
            Ok(())
        })
        .await?;
    }
    let user = engine.db.find_user(connection.user_id).await?;
    Ok(Layout { flat, user: user.as_ref().map(folder) })
}

/// The id as the provider sends it: a number where it is one.
fn id_token(external_id: &str) -> String {
    let number = external_id.parse::<u64>().is_ok_and(|number| number.to_string() == external_id);
    if number { external_id.to_owned() } else { Value::from(external_id).to_string() }
}

fn bad(error: impl std::fmt::Display) -> Error {
    Error::Export(error.to_string())
}

fn render(
    provider: &dyn Provider,
    layout: &Layout,
    part: &ExportPart,
    replaced: bool,
) -> Result<Option<(RelPath, Vec<u8>)>, Error> {
    let spec = provider.spec();
    let kind = Kind::parse(&part.kind);
    let Some((kind, part_spec)) = kind.and_then(|kind| Some((kind, spec.part(kind, &part.part)?))) else {
        return Ok(None);
    };
    let file = match part_spec.file {
        FileRule::Entity(None) => export::file(&part.stem, part.version),
        FileRule::Entity(Some(word)) => {
            export::file(&export::part_stem(&part.stem, word, &part.external_id), part.version)
        }
        // These are rewritten: only the version of today has a file.
        FileRule::Reference | FileRule::Single(_) if part.superseded => return Ok(None),
        FileRule::Single(_) if replaced => return Ok(None),
        FileRule::Reference => export::reference_file(&part.external_id),
        FileRule::Single(name) => format!("{name}.json"),
    };
    let raw = decompress(&part.body)?;
    let primary = match &part.primary_body {
        Some(body) => decompress(body)?,
        None => raw.clone(),
    };
    let Some(name) = spec.parts.iter().find(|other| other.kind == kind && other.primary).map(|other| other.name) else {
        return Ok(None);
    };
    let body = PartBody { part: name, body: primary.into() };
    // An answer that cannot be read has no file; it is counted where it was stored.
    let Ok(normalized) = provider.normalize(kind, &part.external_id, &[body]) else { return Ok(None) };
    let record = &normalized.record;
    let workout = match &record.details {
        Details::Workout(workout) => Some(workout),
        Details::None => None,
    };
    let extracted = if part_spec.primary { export::fields(record) } else { Vec::new() };
    let calculated: Option<Vec<(String, Value)>> =
        workout.filter(|_| part_spec.primary).map(|workout| calculated::workout(workout).into_iter().collect());
    let calculated: Option<Vec<(&str, Value)>> =
        calculated.as_ref().map(|values| values.iter().map(|(name, value)| (name.as_str(), value.clone())).collect());
    let bytes = export::render(&EntityFile {
        id_raw: &id_token(&part.external_id),
        timestamp: record.start_at,
        local_time: record.local_start(),
        provider_type: &record.provider_type,
        workout_type: workout.map(|workout| workout.workout_type),
        extracted: &extracted,
        raw: &raw,
        calculated: calculated.as_deref(),
        synced_at: part.stored_at,
        revision: part.version,
        updated_at: record.updated_at,
    })
    .map_err(bad)?;
    Ok(Some((layout.path(spec.name, part_spec.collection, &file).map_err(bad)?, bytes)))
}

fn render_deleted(
    provider: &dyn Provider,
    layout: &Layout,
    record: &ExportRecord,
) -> Result<Option<(RelPath, Vec<u8>)>, Error> {
    let spec = provider.spec();
    let primary = Kind::parse(&record.kind)
        .and_then(|kind| spec.parts.iter().find(|part| part.kind == kind && part.primary))
        .filter(|part| matches!(part.file, FileRule::Entity(_)));
    let Some(primary) = primary else { return Ok(None) };
    let bytes = export::render_deleted(&DeletedFile {
        id_raw: &id_token(&record.external_id),
        timestamp: record.start_at,
        provider_type: &record.r#type,
        deleted_at: record.deleted_at,
    })
    .map_err(bad)?;
    let file = export::deleted_file(&record.stem);
    Ok(Some((layout.path(spec.name, primary.collection, &file).map_err(bad)?, bytes)))
}

async fn summaries(
    engine: &Engine,
    exporter: &Exporter,
    setup: &ProviderSetup,
    connection: &Connection,
    layout: &Layout,
) -> Result<u64, Error> {
    let spec = setup.spec();
    // From a row, so that a summary that was deleted comes back with the same time; unless every sync is to be seen.
    let stored_at = match engine.config.export_touch {
        ExportTouch::Always => None,
        ExportTouch::Changed => engine.db.find_connection(connection.id).await?.and_then(|row| row.stored_at),
    };
    let last_sync: DateTime<Utc> = stored_at.unwrap_or_else(|| engine.now());
    let mut totals: Vec<(&str, u64)> = Vec::new();
    let mut dates = None;
    let mut by_type = Vec::new();
    let mut distance_m = None;
    // The first collection of records with files of their own is the one that types and dates are about.
    for part in spec.parts.iter().filter(|part| part.primary && matches!(part.file, FileRule::Entity(_))) {
        let rows = engine.db.summarize(connection.id, part.kind.as_str()).await?;
        let total = rows.iter().map(|row| row.count.unsigned_abs()).sum();
        if totals.is_empty() {
            let first = rows.iter().map(|row| row.first_day).min();
            let last = rows.iter().map(|row| row.last_day).max();
            dates = first.zip(last);
            distance_m = (part.kind == Kind::Workout).then(|| rows.iter().map(|row| row.distance_m).sum());
            by_type = rows.iter().map(|row| (row.r#type.clone(), row.count.unsigned_abs())).collect();
        }
        totals.push((part.collection, total));
    }
    let windows = engine.db.list_windows(connection.id).await?;
    if windows.is_empty() && totals.iter().all(|(_, total)| *total == 0) {
        // Nothing was read yet, or all of it was purged.
        return Ok(0);
    }
    let streams: Vec<(&str, Vec<export::CoverWindow>)> = spec
        .streams
        .iter()
        .filter(|stream| stream.axis != Axis::None)
        .map(|stream| {
            let cover = windows.iter().filter(|w| w.stream == stream.name.0 && w.purpose == "cover").map(|window| {
                let state = match window.state.as_str() {
                    "done" => WindowState::Done,
                    "asked" => WindowState::Asked,
                    _ => WindowState::Open,
                };
                (window.lo, window.hi, state)
            });
            (stream.name.0, cover.collect())
        })
        .collect();
    let streams: Vec<(&str, &[export::CoverWindow])> =
        streams.iter().map(|(name, windows)| (*name, windows.as_slice())).collect();
    let summary =
        export::render_summary(&Summary { totals: &totals, distance_m, dates, by_type, last_sync }).map_err(bad)?;
    let last = export::render_last_sync(&LastSync { synced_at: last_sync, streams: &streams }).map_err(bad)?;
    let paths = (layout.path(spec.name, "", "summary.json"), layout.path(spec.name, "", "last_sync.json"));
    let (summary_path, last_path) = (paths.0.map_err(bad)?, paths.1.map_err(bad)?);
    let folder = exporter.folder.clone();
    let written = blocking(move || {
        // Windows move with every sync: without news neither file is touched.
        if folder.has(&summary_path, Some(&summary)) && folder.has(&last_path, None) {
            return Ok(0);
        }
        let written = folder.write_batch(&[(last_path, last), (summary_path, summary)]).map_err(bad)?;
        Ok(written.written as u64)
    })
    .await?;
    Ok(written)
}
