//! From fetched items to a page that can be committed: digests, normalised records, chunks, further wants. Pure, and
//! heavy: it runs on a blocking thread.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io::Read;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde_json::Value;

use super::Error;
use crate::calculated::FORMULA_VERSION;
use crate::export;
use crate::model::{Details, Kind, Normalized, PartId, PartName, PartState, RecordId, chunks};
use crate::providers::{Item, NormalizeError, PartBody, Provider, Refetch};
use crate::storage::{
    ChunkWrite, NewPart, PageState, PageWrite, PartFix, PartRow, RecordRow, RecordWrite, WantedWrite,
};

/// zstd's own default: a tenth of the time of level 9 for a few per cent more bytes.
const LEVEL: i32 = 3;

/// What a page is prepared from.
pub(crate) struct Input {
    pub(crate) provider: &'static dyn Provider,
    /// Optional parts to fetch.
    pub(crate) parts: Vec<&'static str>,
    pub(crate) items: Vec<Item>,
    pub(crate) state: PageState,
    /// zstd bodies of stored parts, see [`needed_bodies`].
    pub(crate) bodies: HashMap<PartId, Vec<u8>>,
    pub(crate) now: DateTime<Utc>,
}

/// What became of a page.
#[derive(Debug, Default)]
pub(crate) struct Prepared {
    pub(crate) write: PageWrite,
    pub(crate) inserted: u64,
    pub(crate) updated: u64,
    pub(crate) samples: u64,
    pub(crate) samples_updated: u64,
    pub(crate) dropped: u64,
    pub(crate) unreadable: Vec<String>,
    /// Records of other kinds whose state has to be known before this page can be prepared for good.
    pub(crate) also: BTreeSet<(Kind, String)>,
}

/// Compresses the way bodies are kept. One for a page: to make one costs more than a small body.
struct Compressor(zstd::bulk::Compressor<'static>);

impl Compressor {
    fn new() -> Result<Self, Error> {
        zstd::bulk::Compressor::new(LEVEL).map(Self).map_err(|error| bad_body(&error))
    }

    fn compress(&mut self, body: &[u8]) -> Result<Vec<u8>, Error> {
        self.0.compress(body).map_err(|error| bad_body(&error))
    }
}

fn bad_body(error: &std::io::Error) -> Error {
    Error::Corrupt(format!("a body cannot be compressed: {error}"))
}

/// The reverse of [`Compressor`].
pub(crate) fn decompress(body: &[u8]) -> Result<Vec<u8>, Error> {
    let mut out = Vec::new();
    zstd::stream::read::Decoder::new(body)
        .and_then(|mut decoder| decoder.read_to_end(&mut out))
        .map_err(|error| Error::Corrupt(format!("a stored body cannot be decompressed: {error}")))?;
    Ok(out)
}

/// The stored parts whose bodies a page needs: those of known records that change, except what the page replaces.
pub(crate) fn needed_bodies(provider: &dyn Provider, items: &[Item], state: &PageState) -> Vec<PartId> {
    let changed: HashSet<(Kind, &str)> = items
        .iter()
        .filter(|item| !is_unchanged(provider, item, state))
        .map(|item| (item.kind, item.external_id.as_str()))
        .collect();
    state
        .parts
        .iter()
        .filter(|((kind, id, _), row)| row.has_body && changed.contains(&(*kind, id.as_str())))
        .map(|(_, row)| row.id)
        .collect()
}

/// All stored bodies of the records of a page state.
pub(crate) fn needed_for_rebuild(state: &PageState) -> Vec<PartId> {
    state.parts.values().filter(|row| row.has_body).map(|row| row.id).collect()
}

fn is_unchanged(provider: &dyn Provider, item: &Item, state: &PageState) -> bool {
    let record = (item.kind, item.external_id.clone());
    let Some(row) = part_row(state, item.kind, &item.external_id, item.part) else { return false };
    row.has_body
        && row.hash.as_deref() == Some(digest(provider, item).as_slice())
        && state.records.get(&record).is_none_or(|record| !record.deleted)
}

fn part_row<'a>(state: &'a PageState, kind: Kind, id: &str, part: PartName) -> Option<&'a PartRow> {
    state.parts.get(&(kind, id.to_owned(), part.0.to_owned()))
}

/// Digest of an answer without what is volatile: equal digests mean that nothing happened.
fn digest(provider: &dyn Provider, item: &Item) -> Vec<u8> {
    let volatile = provider.spec().part(item.kind, item.part.0).map_or(&[][..], |part| part.volatile);
    // Where nothing is volatile the bytes speak for themselves: streams are long, and need not be read for this.
    let value = if volatile.is_empty() { None } else { serde_json::from_slice::<Value>(&item.body).ok() };
    let hash = match value {
        None => blake3::hash(&item.body),
        Some(mut value) => {
            for pointer in volatile {
                remove(&mut value, pointer);
            }
            let mut text = Vec::with_capacity(item.body.len());
            write_one_form(&mut text, &value);
            blake3::hash(&text)
        }
    };
    hash.as_bytes()[..16].to_vec()
}

/// Removes what a JSON pointer names; `*` stands for every element of an array.
fn remove(value: &mut Value, pointer: &str) {
    let Some(rest) = pointer.strip_prefix('/') else { return };
    let (name, rest) = match rest.split_once('/') {
        Some((name, _)) => (name, Some(&rest[name.len()..])),
        None => (rest, None),
    };
    match (value, rest) {
        (Value::Object(map), None) => {
            map.remove(name);
        }
        (Value::Object(map), Some(rest)) => {
            if let Some(inner) = map.get_mut(name) {
                remove(inner, rest);
            }
        }
        (Value::Array(list), Some(rest)) if name == "*" => {
            for inner in list {
                remove(inner, rest);
            }
        }
        _ => {}
    }
}

/// Writes a value in one form: keys sorted, whole numbers without a point (providers send `0` and `0.0` in turn).
fn write_one_form(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Null => out.extend_from_slice(b"n"),
        Value::Bool(flag) => out.extend_from_slice(if *flag { b"t" } else { b"f" }),
        Value::Number(number) => {
            out.extend_from_slice(b"#");
            match number.as_f64() {
                Some(float) if float.fract() == 0.0 && float.abs() < 9.0e15 => {
                    out.extend_from_slice((float as i64).to_string().as_bytes());
                }
                _ => out.extend_from_slice(number.to_string().as_bytes()),
            }
        }
        Value::String(text) => {
            out.extend_from_slice(b"s");
            out.extend_from_slice(&(text.len() as u64).to_le_bytes());
            out.extend_from_slice(text.as_bytes());
        }
        Value::Array(list) => {
            out.extend_from_slice(b"[");
            for inner in list {
                write_one_form(out, inner);
            }
            out.extend_from_slice(b"]");
        }
        Value::Object(map) => {
            let mut keys: Vec<&String> = map.keys().collect();
            keys.sort_unstable();
            out.extend_from_slice(b"{");
            for key in keys {
                out.extend_from_slice(&(key.len() as u64).to_le_bytes());
                out.extend_from_slice(key.as_bytes());
                write_one_form(out, &map[key]);
            }
            out.extend_from_slice(b"}");
        }
    }
}

/// Digest of a record's content, to see whether its row has to be written.
pub(crate) fn record_hash(normalized: &Normalized) -> Vec<u8> {
    let text = format!("{:?}{}", normalized.record, normalized.provisional);
    blake3::hash(text.as_bytes()).as_bytes()[..16].to_vec()
}

/// Normalises what can be read: a secondary part that cannot be is left out and named.
pub(crate) fn normalize_readable(
    provider: &dyn Provider,
    kind: Kind,
    external_id: &str,
    mut parts: Vec<PartBody>,
) -> Result<(Normalized, Vec<NormalizeError>), NormalizeError> {
    let mut left_out = Vec::new();
    loop {
        match provider.normalize(kind, external_id, &parts) {
            Ok(normalized) => return Ok((normalized, left_out)),
            Err(error) => {
                let Some(at) = parts.iter().skip(1).position(|part| part.part == error.part) else { return Err(error) };
                parts.remove(at + 1);
                left_out.push(error);
            }
        }
    }
}

/// All readable bodies of a record, its primary part first; `None` while that one is missing.
pub(crate) fn bodies_of(
    provider: &dyn Provider,
    kind: Kind,
    external_id: &str,
    state: &PageState,
    bodies: &HashMap<PartId, Vec<u8>>,
    fresh: Option<&Item>,
) -> Result<Option<Vec<PartBody>>, Error> {
    let mut out: Vec<PartBody> = Vec::new();
    let mut names: Vec<_> = provider.spec().parts.iter().filter(|part| part.kind == kind).collect();
    names.sort_by_key(|part| !part.primary);
    for spec in names {
        if let Some(item) = fresh.filter(|item| item.part == spec.name) {
            out.push(PartBody { part: spec.name, body: item.body.clone() });
            continue;
        }
        let row = part_row(state, kind, external_id, spec.name);
        let body =
            row.filter(|row| row.has_body && row.state != PartState::Unreadable).and_then(|row| bodies.get(&row.id));
        match body {
            Some(body) => out.push(PartBody { part: spec.name, body: Bytes::from(decompress(body)?) }),
            None if spec.primary => return Ok(None),
            None => {}
        }
    }
    Ok(Some(out))
}

/// Prepares a page.
pub(crate) fn prepare(input: Input) -> Result<Prepared, Error> {
    let mut out =
        Prepared { write: PageWrite { page_seq: input.state.page_seq, ..PageWrite::default() }, ..Prepared::default() };
    let mut seen: HashSet<(Kind, &str, PartName)> = HashSet::new();
    // The last answer about a record in a page is the newest one.
    let mut compressor = Compressor::new()?;
    for item in input.items.iter().rev() {
        if seen.insert((item.kind, item.external_id.as_str(), item.part)) {
            prepare_item(&input, item, &mut compressor, &mut out)?;
        }
    }
    let mut wanted = HashSet::new();
    out.write.wanted.retain(|write| wanted.insert(write.wanted.clone()));
    Ok(out)
}

fn prepare_item(input: &Input, item: &Item, compressor: &mut Compressor, out: &mut Prepared) -> Result<(), Error> {
    let Input { provider, state, now, .. } = input;
    let spec = provider.spec();
    let Some(part) = spec.part(item.kind, item.part.0) else {
        return Err(Error::Corrupt(format!("{} has no part {} of {}", spec.name, item.part, item.kind.as_str())));
    };
    let row = part_row(state, item.kind, &item.external_id, item.part);
    let record = state.records.get(&(item.kind, item.external_id.clone()));

    if is_unchanged(*provider, item, state) {
        if let Some(row) = row.filter(|row| row.state == PartState::Wanted) {
            out.write.fixes.push(stored(row, *now));
        }
        if part.primary && misses_a_part(input, item) {
            // A part was switched on, or asked for, after this record was stored.
            let fresh = vec![PartBody { part: item.part, body: item.body.clone() }];
            if let Ok((normalized, _)) = normalize_readable(*provider, item.kind, &item.external_id, fresh) {
                want(input, item, &normalized, None, out);
            }
        }
        return Ok(());
    }

    let has_body = row.is_some_and(|row| row.has_body);
    let mut new = NewPart {
        id: PartId::new(),
        kind: item.kind,
        external_id: item.external_id.clone(),
        part: item.part,
        version: row.map_or(1, |row| row.version + i64::from(row.has_body)),
        state: PartState::Stored,
        order_at: item.order_at,
        body: compressor.compress(&item.body)?,
        body_size: i64::try_from(item.body.len()).unwrap_or(i64::MAX),
        hash: digest(*provider, item),
        formula: FORMULA_VERSION,
        export_due: true,
        replaces: row.map(|row| (row.id, has_body)),
        last_error: None,
    };
    let unreadable = |new: &mut NewPart, error: &NormalizeError, out: &mut Prepared| {
        new.state = PartState::Unreadable;
        new.export_due = false;
        new.last_error = Some(error.to_string());
        out.unreadable.push(error.to_string());
    };

    let Some(bodies) = bodies_of(*provider, item.kind, &item.external_id, state, &input.bodies, Some(item))? else {
        // The record itself was never listed: the answer is kept, and serves when it is.
        out.write.parts.push(new);
        return Ok(());
    };
    let (normalized, left_out) = match normalize_readable(*provider, item.kind, &item.external_id, bodies) {
        Ok(done) => done,
        Err(error) => {
            unreadable(&mut new, &error, out);
            out.write.parts.push(new);
            return Ok(());
        }
    };
    if let Some(error) = left_out.iter().find(|error| error.part == item.part) {
        unreadable(&mut new, error, out);
    }
    out.dropped += normalized.dropped;
    if normalized.provisional
        && let Some((_, keep)) = new.replaces.as_mut()
    {
        // What is not final has no history.
        *keep = false;
        new.version = row.map_or(1, |row| row.version);
    }
    out.write.parts.push(new);

    let id = record.map_or_else(RecordId::new, |record| record.id);
    let hash = record_hash(&normalized);
    if record.is_none_or(|record| record.deleted || record.hash != hash) {
        match record {
            None => out.inserted += 1,
            Some(_) => out.updated += 1,
        }
        out.write.records.push(RecordWrite {
            id,
            is_new: record.is_none(),
            record: normalized.record.clone(),
            hash,
            shape: normalized.shape,
            revision: record.map_or(1, |record| record.revision + 1),
            provisional: normalized.provisional,
            stem: record.and_then(|record| record.stem.clone()).unwrap_or_else(|| stem(&normalized)),
            stored_at: record.map_or(*now, |record| record.stored_at),
        });
    }
    want(input, item, &normalized, record.filter(|_| part.primary), out);
    let Normalized { record: normal, samples, .. } = normalized;
    let has_others = state.parts.iter().any(|((kind, id, _), row)| {
        *kind == item.kind && *id == item.external_id && row.has_body && row.state != PartState::Unreadable
    });
    if !samples.is_empty() || (record.is_some() && has_others) {
        let mut list = Vec::new();
        let again = part_row(state, item.kind, &item.external_id, item.part).is_some_and(|row| row.has_body);
        for set in samples {
            out.samples += set.samples.len() as u64;
            out.samples_updated += if again { set.samples.len() as u64 } else { 0 };
            list.extend(chunks(set).into_iter().map(|chunk| {
                let hash = chunk.hash();
                (chunk, hash)
            }));
        }
        out.write.chunks.push(ChunkWrite { record: id, source: normal.source, is_new: record.is_none(), chunks: list });
    }
    Ok(())
}

fn stem(normalized: &Normalized) -> String {
    let record = &normalized.record;
    let title = record.title.as_deref().filter(|_| matches!(record.details, Details::Workout(_)));
    export::stem(record.local_day, title, &record.provider_type, record.kind.as_str(), &record.external_id)
}

fn stored(row: &PartRow, now: DateTime<Utc>) -> PartFix {
    PartFix { id: row.id, state: PartState::Stored, attempts: 0, due_at: now, last_error: None }
}

fn misses_a_part(input: &Input, item: &Item) -> bool {
    input
        .provider
        .spec()
        .parts
        .iter()
        .filter(|part| part.kind == item.kind && !part.primary && input.parts.contains(&part.name.0))
        .any(|part| part_row(&input.state, item.kind, &item.external_id, part.name).is_none())
}

/// Notes what further calls must bring. `changed`: the stored record whose primary part changed.
fn want(input: &Input, item: &Item, normalized: &Normalized, changed: Option<&RecordRow>, out: &mut Prepared) {
    let profile = matches!(normalized.record.details, Details::None);
    for wanted in &normalized.wants {
        let same = wanted.kind == item.kind && wanted.external_id == item.external_id;
        if same && !input.parts.contains(&wanted.part.0) {
            continue;
        }
        let Some(row) = part_row(&input.state, wanted.kind, &wanted.external_id, wanted.part) else {
            if profile && changed.is_some() {
                out.also.insert((wanted.kind, wanted.external_id.clone()));
            }
            out.write.wanted.push(WantedWrite { wanted: wanted.clone(), order_at: item.order_at });
            continue;
        };
        let Some(record) = changed else { continue };
        let refetch = input.provider.spec().part(wanted.kind, wanted.part.0).map(|part| part.refetch);
        let due = match refetch {
            Some(Refetch::OnChange) => same || profile,
            Some(Refetch::OnShape) => same && (record.deleted || record.shape != normalized.shape),
            None => false,
        };
        if due && row.state != PartState::Wanted {
            out.write.again.push(row.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volatile_values_and_number_forms_do_not_count() {
        let provider = crate::providers::find("strava").unwrap();
        let item = |body: &str| Item {
            kind: Kind::Workout,
            external_id: "1".to_owned(),
            part: PartName("summary"),
            body: Bytes::copy_from_slice(body.as_bytes()),
            order_at: DateTime::default(),
        };
        let base = digest(provider, &item(r#"{"id":1,"distance":0,"kudos_count":3,"name":"a"}"#));
        assert_eq!(base, digest(provider, &item(r#"{"name":"a", "id":1,"distance":0.0,"kudos_count":9}"#)));
        assert_ne!(base, digest(provider, &item(r#"{"id":1,"distance":0.5,"kudos_count":3,"name":"a"}"#)));
        assert_ne!(base, digest(provider, &item(r#"{"id":1,"distance":0,"kudos_count":3,"name":"b"}"#)));
    }

    #[test]
    fn pointers_reach_into_arrays() {
        let mut value = serde_json::json!({"bikes": [{"id": 1, "distance": 2}, {"distance": 3}], "x": 1});
        remove(&mut value, "/bikes/*/distance");
        remove(&mut value, "/x");
        remove(&mut value, "/not/there");
        assert_eq!(value, serde_json::json!({"bikes": [{"id": 1}, {}]}));
    }

    #[test]
    fn bodies_come_back_byte_for_byte() {
        let body = br#"{"a": 1.00, "a": 2}"#;
        assert_eq!(decompress(&Compressor::new().unwrap().compress(body).unwrap()).unwrap(), body);
    }
}
