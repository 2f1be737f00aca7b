//! The providers' APIs as one server, for the demo and the tests.
//!
//! May name model, clock and providers. It only assembles what each provider's `simulator.rs` offers and serves it.
//! What must always hold: the same options and the same calls give the same bytes, and nothing of this is reachable
//! from beyond this machine.

#[cfg(test)]
mod tests;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use axum::Router;
use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::providers::simulation::{Shared, controls};
use crate::providers::strava;

pub use crate::providers::simulation::{Client, Fault, FaultKind, Options, Rule, parse_fault};

/// Builds one provider's paths.
type Build = fn(&Shared) -> Router;

/// Where each provider is mounted, and how it is built. Strava keeps its own paths; others get a prefix.
const MOUNTS: [(&str, Build); 1] = [("", strava::simulator::router)];

/// A simulator that serves until it is shut down or dropped.
#[derive(Debug)]
pub struct Running {
    /// Where it listens.
    pub addr: SocketAddr,
    stop: CancellationToken,
    served: JoinHandle<()>,
}

impl Running {
    /// Prefix of all paths, without a slash at its end.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Ends it: takes no more calls, and gives those under way a second.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        let _ = tokio::time::timeout(Duration::from_secs(1), &mut self.served).await;
    }

    /// Serves until somebody else ends it.
    pub async fn wait(mut self) {
        let _ = (&mut self.served).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Starts serving on 127.0.0.1.
///
/// # Errors
/// When the port is taken.
pub async fn start(options: Options, clock: Clock) -> std::io::Result<Running> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, options.port)).await?;
    let addr = listener.local_addr()?;
    let app = MOUNTS.iter().fold(Router::new(), |app, (prefix, build)| {
        let shared = Shared::new(options.clone(), clock.clone());
        let provider = build(&shared).merge(controls(&shared));
        if prefix.is_empty() { app.merge(provider) } else { app.nest(prefix, provider) }
    });
    // Answers go out in several writes; waiting for acknowledgements between them would cost 40 ms each.
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    let stop = CancellationToken::new();
    let stopped = stop.clone().cancelled_owned();
    let served = tokio::spawn(async move {
        // It only ends by `stopped`: errors of single connections stay with these.
        let _ = axum::serve(listener, app).with_graceful_shutdown(stopped).await;
    });
    Ok(Running { addr, stop, served })
}
