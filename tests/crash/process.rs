//! A process of ours: started, killed, paused, and never left behind.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts the program; what it says goes to the end of `log`.
    pub(crate) fn start(args: &[&str], env: &BTreeMap<String, String>, log: &Path) -> Self {
        let file = std::fs::File::options().create(true).append(true).open(log).expect("a log can be written");
        let child = Command::new(env!("CARGO_BIN_EXE_wearsync"))
            .args(args)
            .env_clear()
            .envs(env)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(if std::env::var("CRASH_LOG").is_ok() { Stdio::inherit() } else { Stdio::from(file) })
            .spawn()
            .expect("the program starts");
        Self { child, log: log.to_owned() }
    }

    /// What it said so far (nothing under `CRASH_LOG`, which sends it to the terminal).
    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]).status();
        assert!(status.expect("kill runs").success());
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.ended().is_some()
    }

    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("can be asked")
    }

    pub(crate) async fn wait_at_most(&mut self, limit: Duration) -> bool {
        let started = Instant::now();
        while started.elapsed() < limit {
            if self.has_ended() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        false
    }

    /// SIGTERM, and no more than ten seconds.
    pub(crate) async fn stop(&mut self) {
        if self.has_ended() {
            return;
        }
        self.signal("TERM");
        assert!(
            self.wait_at_most(Duration::from_secs(12)).await,
            "a process did not end within ten seconds of SIGTERM"
        );
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A paused process is killed as well as any other.
        self.kill();
    }
}
