//! A process of ours: started, killed, paused, and never left behind.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) struct Process {
    child: Child,
}

impl Process {
    pub(crate) fn start(args: &[&str], env: &BTreeMap<String, String>) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_wearsync"))
            .args(args)
            .env_clear()
            .envs(env)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(if std::env::var("CRASH_LOG").is_ok() { Stdio::inherit() } else { Stdio::null() })
            .spawn()
            .expect("the program starts");
        Self { child }
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
        self.child.try_wait().expect("can be asked").is_some()
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
        self.kill();
    }
}
