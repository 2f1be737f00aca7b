//! Whether a connection works, tried for real: one refresh of its token, and one call per stream.

use super::fetch::RunGate;
use super::{Engine, ProviderSetup, TokenFailure};
use crate::model::{AccountId, BEGINNING_MS, Class, StreamName};
use crate::providers::{AccessToken, Api, Axis, FetchError, PageRequest};

/// What a connection may do.
#[derive(Debug)]
pub struct Probe {
    /// Until when the new access token is good.
    pub token: AccessToken,
    /// Per stream: whether it can be read with this grant.
    pub streams: Vec<(StreamName, Result<(), FetchError>)>,
}

/// Refreshes the account's token, whatever is cached, and reads one item of every stream. Stores nothing but the token;
/// costs one call per stream.
///
/// # Errors
/// [`TokenFailure`] when there is no token to try with.
pub async fn probe(engine: &Engine, setup: &ProviderSetup, id: AccountId) -> Result<Probe, TokenFailure> {
    let version = engine.db.find_account(id).await?.map_or(0, |account| account.token_version);
    // Refusing the version in use makes a new one, as after a 401.
    let token = engine.access_token(setup, id, version).await?;
    let gate = RunGate::new(engine, setup, Class::Interactive);
    let spec = setup.spec();
    let api = Api { http: &engine.http, spec, base_url: &setup.base_url, token: &token, gate: &gate };
    let mut streams = Vec::with_capacity(spec.streams.len());
    for stream in spec.streams {
        let hi = match stream.axis {
            Axis::Start => engine.clock.now_ms(),
            Axis::None => i64::MAX,
        };
        let request = PageRequest { stream, lo: BEGINNING_MS, hi, position: None, limit: 1, offset: 0 };
        streams.push((stream.name, setup.provider.fetch_page(&api, &request).await.map(|_| ())));
    }
    gate.snapshot(true).await;
    Ok(Probe { token, streams })
}
