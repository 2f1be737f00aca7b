//! Records and samples, made anew from the stored answers. Changes no row unless the program that reads them changed.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::engine::{Stop, blocking};
use super::prepare::{bodies_of, needed_for_rebuild, normalize_readable, record_hash};
use super::{Engine, Error, ProviderSetup};
use crate::export;
use crate::model::{
    Chunk, Class, ConnectionId, Details, Kind, Rebuilt, RecordId, RunReport, RunSource, SyncRequest, chunks,
};
use crate::storage::{ChunkWrite, Claim, PageWrite, RecordRow, RecordWrite};

/// Records looked at in one page.
const BATCH: i64 = 50;

/// One record made anew.
struct Remade {
    write: RecordWrite,
    row: RecordRow,
    chunks: Vec<(Chunk, Vec<u8>)>,
}

/// Rebuilds all records of the claimed run's connection.
pub(crate) async fn records(engine: &Engine, setup: &ProviderSetup, claim: &Claim) -> Result<Rebuilt, Stop> {
    let mut done = Rebuilt::default();
    let connection = claim.fence.connection;
    let kinds: BTreeSet<Kind> = setup.spec().parts.iter().map(|part| part.kind).collect();
    for kind in kinds {
        let mut after = String::new();
        loop {
            let ids = engine.db.list_ids_after(connection, kind, &after, BATCH).await?;
            let Some(last) = ids.last() else { break };
            after.clone_from(last);
            done.records += ids.len() as u64;
            let ids: BTreeSet<(Kind, String)> = ids.into_iter().map(|id| (kind, id)).collect();
            let state = engine.db.load_page_state(connection, &ids).await?;
            let bodies: HashMap<_, _> = engine.db.load_bodies(&needed_for_rebuild(&state)).await?.into_iter().collect();
            let (provider, page_seq) = (setup.provider, state.page_seq);
            let remade = blocking(move || {
                let mut out = Vec::new();
                for ((row_kind, id), row) in &state.records {
                    if *row_kind != kind || row.deleted {
                        continue;
                    }
                    let Some(parts) = bodies_of(provider, kind, id, &state, &bodies, None)? else { continue };
                    let Ok((normalized, _)) = normalize_readable(provider, kind, id, parts) else { continue };
                    let hash = record_hash(&normalized);
                    let list = normalized.samples.into_iter().flat_map(chunks).map(|chunk| {
                        let hash = chunk.hash();
                        (chunk, hash)
                    });
                    let chunks = list.collect();
                    let record = normalized.record;
                    let title = record.title.as_deref().filter(|_| matches!(record.details, Details::Workout(_)));
                    let stem = row.stem.clone().unwrap_or_else(|| {
                        export::stem(record.local_day, title, &record.provider_type, kind.as_str(), id)
                    });
                    let write = RecordWrite {
                        id: row.id,
                        is_new: false,
                        record,
                        hash,
                        shape: normalized.shape,
                        revision: row.revision,
                        provisional: normalized.provisional,
                        stem,
                        stored_at: row.stored_at,
                    };
                    out.push(Remade { write, row: row.clone(), chunks });
                }
                Ok(out)
            })
            .await?;
            let mut page = PageWrite { page_seq, ..PageWrite::default() };
            for Remade { write, row, chunks } in remade {
                let samples_differ = !same_chunks(engine, write.id, &chunks).await?;
                let record_differs = write.hash != row.hash || write.shape != row.shape;
                if !record_differs && !samples_differ {
                    continue;
                }
                done.changed += 1;
                if samples_differ {
                    let source = write.record.source.clone();
                    page.chunks.push(ChunkWrite { record: write.id, source, is_new: false, chunks });
                }
                if record_differs {
                    page.records.push(write);
                }
            }
            if !page.records.is_empty() || !page.chunks.is_empty() {
                let lease = engine.after(engine.config.lease);
                engine.db.commit_page(&claim.fence, &page, engine.now(), lease).await?;
            }
        }
    }
    Ok(done)
}

async fn same_chunks(engine: &Engine, record: RecordId, chunks: &[(Chunk, Vec<u8>)]) -> Result<bool, Error> {
    let stored = engine.db.list_chunk_hashes(record).await?;
    let mut made: Vec<_> =
        chunks.iter().map(|(chunk, hash)| (chunk.series.id, chunk.total, chunk.first_at, hash.clone())).collect();
    made.sort();
    Ok(stored == made)
}

/// Rebuilds a connection through a run of its own, so that no other work is in its way, and waits for its end.
///
/// # Errors
/// When the connection is not active, other work holds it, or the database fails.
pub async fn rebuild(engine: &Arc<Engine>, connection: ConnectionId) -> Result<Rebuilt, Error> {
    let Some(found) = engine.db.find_connection(connection).await? else {
        return Err(Error::Settings("there is no such connection".to_owned()));
    };
    let setup = engine
        .provider(&found.provider)
        .ok_or_else(|| Error::Corrupt(format!("connections.provider: {}", found.provider)))?;
    let request = SyncRequest { rebuild: true, ..SyncRequest::default() };
    let accepted =
        super::submit(engine, setup, connection, &request, Class::Interactive, RunSource::Pull, None).await?;
    let Some(accepted) = accepted else {
        return Err(Error::Settings("the connection is not active: connect it again first".to_owned()));
    };
    super::execute(engine, accepted.id).await?;
    let run = engine.db.find_run(accepted.id).await?;
    let report = run.and_then(|run| serde_json::from_str::<RunReport>(&run.report.unwrap_or_default()).ok());
    report.and_then(|report| report.rebuilt).ok_or_else(|| {
        Error::Settings(format!(
            "another run of this connection goes first; the rebuild is queued as {}: see `wearsync runs show`",
            accepted.id
        ))
    })
}
