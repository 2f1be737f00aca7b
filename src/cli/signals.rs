//! Ctrl-C and SIGTERM: the first asks for an orderly end, the second does not wait for it.

use std::io;

use tokio_util::sync::CancellationToken;

use super::output::remark;

/// From now on the first signal cancels `stop`; the second one ends the process at once.
pub(crate) fn stop_on_signal(stop: CancellationToken) -> io::Result<()> {
    // Made here and not in the task: a signal that comes before the task runs must not be lost.
    let mut signals = Signals::new()?;
    tokio::spawn(async move {
        signals.next().await;
        stop.cancel();
        remark("stopping: the page in hand is finished first (once more ends at once)");
        let number = signals.next().await;
        std::process::exit(128 + number);
    });
    Ok(())
}

#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for one and answers its number.
    async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.interrupt.recv() => 2,
            _ = self.terminate.recv() => 15,
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> i32 {
        // Without a handler the system ends the process itself.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
        2
    }
}
