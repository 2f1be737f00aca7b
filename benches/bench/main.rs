//! The figures of `docs/benchmarks.md`:
//! `just bench [--quick] [accept|receive|sync|streams|samples|memory|watch|schedule …]`.
//!
//! One table of measured values, each against its target and, where the target is a ratio, against its reference in the
//! same run. Nothing here fails for being slow: a machine's speed is no property of the code.

#[path = "../../tests/support/mod.rs"]
mod support;

mod accept;
mod machine;
mod memory;
mod receive;
mod rig;
mod samples;
mod schedule;
mod sync;
mod table;
mod watch;

use table::Table;

/// How much is measured.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    /// Smaller worlds and shorter rounds: shows that everything works, and roughly how it stands.
    pub(crate) quick: bool,
}

impl Size {
    /// One of two sizes.
    pub(crate) fn of<T>(self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let size = Size { quick: words.iter().any(|word| word == "--quick") };
    let asked: Vec<&str> = words.iter().map(String::as_str).filter(|word| !word.starts_with("--")).collect();
    let known = ["accept", "receive", "sync", "streams", "samples", "memory", "watch", "schedule"];
    if let Some(word) = asked.iter().find(|word| !known.contains(word)) {
        eprintln!("there is no benchmark `{word}`; there are {}", known.join(", "));
        std::process::exit(2);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let mut table = Table::default();
    for name in known.into_iter().filter(|name| asked.is_empty() || asked.contains(name)) {
        let begun = std::time::Instant::now();
        runtime.block_on(async {
            match name {
                "accept" => accept::run(size, &mut table).await,
                "receive" => receive::run(size, &mut table).await,
                "sync" => sync::activities(size, &mut table).await,
                "streams" => sync::streams(size, &mut table).await,
                "samples" => samples::run(size, &mut table).await,
                "memory" => memory::run(size, &mut table).await,
                "watch" => watch::run(size, &mut table).await,
                _ => schedule::run(size, &mut table).await,
            }
        });
        eprintln!("{name}: {:.0} s", begun.elapsed().as_secs_f64());
    }
    print!("{}", table.render());
}
