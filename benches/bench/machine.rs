//! What the machine says: processor time, memory.

use std::fs;

/// The kernel counts processor time in hundredths of a second.
const TICK_MS: f64 = 10.0;

/// Milliseconds of processor time that a process has used, all its threads together.
pub(crate) fn cpu_ms(pid: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in brackets may hold blanks.
    let fields: Vec<&str> = text.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |n: usize| fields.get(n).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) * TICK_MS
}

/// The same of this process.
pub(crate) fn own_cpu_ms() -> f64 {
    cpu_ms(std::process::id())
}

/// The same of the server processes that serve a Postgres database right now.
pub(crate) fn backends_cpu_ms(database: &str) -> f64 {
    let Ok(entries) = fs::read_dir("/proc") else { return 0.0 };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let serves = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.starts_with(b"postgres:") && String::from_utf8_lossy(&line).contains(database)
    };
    pids.filter(serves).map(cpu_ms).sum()
}

/// MiB of a line of `/proc/<pid>/status`: `VmRSS` now, `VmHWM` at most so far.
pub(crate) fn memory_mib(pid: u32, line: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let found = text.lines().find_map(|have| have.strip_prefix(line)?.strip_prefix(':'));
    found.and_then(|rest| rest.trim().split(' ').next()?.parse::<f64>().ok()).map_or(f64::NAN, |kib| kib / 1024.0)
}
