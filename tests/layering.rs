//! Holds the table of rooms in `ARCHITECTURE.md` against the sources: which room may name which.
//!
//! Reads the text of `src/**/*.rs` and no compiled code. Comments, strings and test modules do not count. Run alone:
//! `cargo test --test layering`.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// A top-level folder or file of `src/`: its level, and the rooms it may name besides `model`, which all may.
struct Room {
    name: &'static str,
    level: u8,
    may: &'static [&'static str],
}

const fn room(name: &'static str, level: u8, may: &'static [&'static str]) -> Room {
    Room { name, level, may }
}

/// Levels 0 to 2, that is everything a run is made of.
const BELOW_SYNC: &[&str] =
    &["clock", "config", "telemetry", "calculated", "vault", "storage", "coordination", "providers", "export"];
const BELOW_WORKER: &[&str] =
    &["clock", "config", "telemetry", "calculated", "vault", "storage", "coordination", "providers", "export", "sync"];
const BELOW_APP: &[&str] = &[
    "clock",
    "config",
    "telemetry",
    "calculated",
    "vault",
    "storage",
    "coordination",
    "providers",
    "export",
    "sync",
    "worker",
    "api",
    "simulator",
];

/// Everything: commands read rows as `api` does, and put the simulator beside the server.
const BELOW_CLI: &[&str] = &[
    "clock",
    "config",
    "telemetry",
    "calculated",
    "vault",
    "storage",
    "coordination",
    "providers",
    "export",
    "sync",
    "worker",
    "api",
    "simulator",
    "app",
];

const ROOMS: &[Room] = &[
    room("model", 0, &[]),
    room("clock", 0, &[]),
    room("config", 0, &[]),
    room("telemetry", 1, &[]),
    room("calculated", 1, &[]),
    room("vault", 1, &["config"]),
    room("storage", 2, &["clock", "config", "telemetry"]),
    room("coordination", 2, &["clock", "config", "telemetry"]),
    room("providers", 2, &["clock", "config", "telemetry"]),
    room("export", 2, &["clock", "config", "telemetry"]),
    room("sync", 3, BELOW_SYNC),
    room("worker", 4, BELOW_WORKER),
    room("api", 4, BELOW_WORKER),
    room("simulator", 4, &["clock", "providers"]),
    room("app", 5, BELOW_APP),
    room("cli", 6, BELOW_CLI),
    // The binary only starts the command line.
    room("main", 6, &["app", "config", "cli"]),
];

/// Modules that are one back end of several: only `app` chooses.
const BACKENDS: &[[&str; 2]] = &[["coordination", "local"], ["coordination", "redis"]];

/// Crates that one room keeps to itself. `app` may hand their values from one room to the next.
const CRATES: &[(&str, &[&str])] = &[
    // model derives sqlx::Type on its ids; it runs no query.
    ("sqlx", &["storage", "app", "model"]),
    ("redis", &["coordination", "app"]),
    ("apalis", &["worker", "app"]),
    ("apalis_core", &["worker", "app"]),
    ("apalis_codec", &["worker", "app"]),
];

/// What is in such a room has no owner; it belongs to the room whose word it is.
const NO_ROOM: &[&str] = &["util", "utils", "helper", "helpers", "common", "misc", "shared"];

#[derive(Debug, PartialEq, Eq)]
struct Violation {
    file: String,
    line: usize,
    rule: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.rule)
    }
}

fn find(name: &str) -> Option<&'static Room> {
    ROOMS.iter().find(|room| room.name == name)
}

// ---- reading Rust -------------------------------------------------------------------------------------------------

/// The source with comments, strings and character literals blanked; lines stay where they are.
fn blank(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut out = String::with_capacity(source.len());
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut i = 0;
    while i < chars.len() {
        let start = i;
        let word_before = i > 0 && (at(i - 1).is_alphanumeric() || at(i - 1) == '_');
        if at(i) == '/' && at(i + 1) == '/' {
            while i < chars.len() && at(i) != '\n' {
                i += 1;
            }
        } else if at(i) == '/' && at(i + 1) == '*' {
            let mut depth = 0;
            while i < chars.len() {
                match (at(i), at(i + 1)) {
                    ('/', '*') => {
                        depth += 1;
                        i += 2;
                    }
                    ('*', '/') => {
                        depth -= 1;
                        i += 2;
                        if depth == 0 {
                            break;
                        }
                    }
                    _ => i += 1,
                }
            }
        } else if let Some(end) = (!word_before).then(|| raw_string_end(&chars, i)).flatten() {
            i = end;
        } else if at(i) == '"' {
            i += 1;
            while i < chars.len() && at(i) != '"' {
                i += if at(i) == '\\' { 2 } else { 1 };
            }
            i += 1;
        } else if at(i) == '\'' && (at(i + 1) == '\\' || at(i + 2) == '\'') {
            // A character; without the closing quote it would be a lifetime. `'\''` has its quote escaped.
            i += if at(i + 1) == '\\' { 3 } else { 2 };
            while i < chars.len() && at(i) != '\'' {
                i += 1;
            }
            i += 1;
        } else {
            out.push(at(i));
            i += 1;
            continue;
        }
        for &c in &chars[start..i.min(chars.len())] {
            out.push(if c == '\n' { '\n' } else { ' ' });
        }
    }
    out
}

/// The index after a raw string (`r"…"`, `r#"…"#`, `br"…"`) that starts at `i`, if one does.
fn raw_string_end(chars: &[char], i: usize) -> Option<usize> {
    let mut j = i;
    if matches!(chars.get(j), Some('b' | 'c')) {
        j += 1;
    }
    if chars.get(j) != Some(&'r') {
        return None;
    }
    j += 1;
    let hashes = chars[j..].iter().take_while(|&&c| c == '#').count();
    j += hashes;
    if chars.get(j) != Some(&'"') {
        return None;
    }
    j += 1;
    while j < chars.len() {
        if chars[j] == '"' && chars[j + 1..].iter().take_while(|&&c| c == '#').count() >= hashes {
            return Some(j + 1 + hashes);
        }
        j += 1;
    }
    Some(j)
}

#[derive(Clone, Debug, PartialEq)]
struct Token {
    text: String,
    line: usize,
}

/// Words, `::`, and every other character by itself.
fn tokens(blanked: &str) -> Vec<Token> {
    let mut out = Vec::new();
    let mut line = 1;
    let mut chars = blanked.chars().peekable();
    while let Some(c) = chars.next() {
        let mut text = c.to_string();
        if c == '\n' {
            line += 1;
        } else if c.is_alphanumeric() || c == '_' {
            while let Some(&next) = chars.peek().filter(|c| c.is_alphanumeric() || **c == '_') {
                text.push(next);
                chars.next();
            }
        } else if c == ':' && chars.peek() == Some(&':') {
            text.push(':');
            chars.next();
        }
        if !c.is_whitespace() {
            out.push(Token { text, line });
        }
    }
    out
}

/// Drops every item behind `#[cfg(test)]`: tests may name what they like.
fn without_tests(tokens: &[Token]) -> Vec<Token> {
    const MARK: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut out = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        let marked = tokens[i..].iter().map(|t| t.text.as_str()).take(MARK.len()).eq(MARK);
        if !marked {
            out.push(tokens[i].clone());
            i += 1;
            continue;
        }
        i += MARK.len();
        // The item ends at its first `;` or at the brace that closes its first one, outside all other brackets.
        let mut depth = 0_usize;
        while i < tokens.len() {
            let text = tokens[i].text.as_str();
            i += 1;
            match text {
                "{" | "(" | "[" => depth += 1,
                "}" | ")" | "]" => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth == 0 && matches!(text, ";" | "}") {
                break;
            }
        }
    }
    out
}

/// A path as written, made absolute: its segments below the crate root.
#[derive(Debug, PartialEq)]
struct Named {
    path: Vec<String>,
    line: usize,
}

/// Every path of this crate that the tokens name, and the tokens that are in none of them. `module` is the place of
/// the file, `["api", "sync"]` for example.
fn paths(module: &[&str], tokens: &[Token]) -> (Vec<Named>, Vec<Token>) {
    let mut out = Vec::new();
    let mut rest = Vec::new();
    // Modules written out inside the file, each with the brace depth at which it ends.
    let mut inner: Vec<(String, usize)> = Vec::new();
    let mut depth = 0;
    let text = |i: usize| tokens.get(i).map_or("", |t| t.text.as_str());
    let mut i = 0;
    while i < tokens.len() {
        match text(i) {
            "{" => depth += 1,
            "}" => {
                depth -= 1;
                if inner.last().is_some_and(|(_, at)| *at == depth) {
                    inner.pop();
                }
            }
            "mod" if text(i + 2) == "{" => inner.push((text(i + 1).to_owned(), depth)),
            "crate" | "wearsync" | "super" if text(i + 1) == "::" && (i == 0 || text(i - 1) != "::") => {
                let mut base: Vec<String> = Vec::new();
                if text(i) == "super" {
                    base.extend(module.iter().map(|&m| m.to_owned()));
                    base.extend(inner.iter().map(|(name, _)| name.clone()));
                    base.pop();
                }
                i = tree(&base, tokens, i + 2, &mut out);
                continue;
            }
            _ => {}
        }
        rest.push(tokens[i].clone());
        i += 1;
    }
    (out, rest)
}

/// Reads what follows a `::`: a name, `*`, or a group. Answers the index after it.
fn tree(base: &[String], tokens: &[Token], mut i: usize, out: &mut Vec<Named>) -> usize {
    let Some(token) = tokens.get(i) else { return i };
    let mut path = base.to_vec();
    match token.text.as_str() {
        "{" => {
            i += 1;
            while let Some(next) = tokens.get(i) {
                match next.text.as_str() {
                    "}" => return i + 1,
                    "," => i += 1,
                    "as" => i += 2,
                    _ => i = tree(&path, tokens, i, out),
                }
            }
            return i;
        }
        // `a::<T>`: the path is over, T is looked at by itself.
        "<" => {
            out.push(Named { path, line: token.line });
            return i;
        }
        "super" => {
            path.pop();
        }
        "self" => {}
        // `crate::name!` is a macro; macros live at the root whatever room they are written in.
        name if path.is_empty() && tokens.get(i + 1).is_some_and(|t| t.text == "!") && name != "*" => return i + 1,
        name => path.push(name.to_owned()),
    }
    if tokens.get(i + 1).is_some_and(|t| t.text == "::") {
        return tree(&path, tokens, i + 2, out);
    }
    out.push(Named { path, line: token.line });
    i + 1
}

/// `src/api/sync.rs` → `["api", "sync"]`; `src/api/mod.rs` → `["api"]`; `src/lib.rs` → `[]`.
fn module_of(file: &str) -> Vec<&str> {
    let mut module: Vec<&str> = file.trim_start_matches("src/").trim_end_matches(".rs").split('/').collect();
    if matches!(module.last(), Some(&"mod" | &"lib")) {
        module.pop();
    }
    module
}

// ---- the rules ----------------------------------------------------------------------------------------------------

/// Why `from` may not name `to`, if it may not.
fn forbidden(from: &Room, to: &str) -> Option<String> {
    if to == from.name || to == "model" || from.may.contains(&to) {
        return None;
    }
    let Some(target) = find(to) else {
        return Some(format!("{} names {to}, which is no room of the table", from.name));
    };
    let why = match target.level.cmp(&from.level) {
        std::cmp::Ordering::Equal => "rooms of one level do not name each other".to_owned(),
        std::cmp::Ordering::Greater => format!("level {} is above level {}", target.level, from.level),
        std::cmp::Ordering::Less => {
            let mut may = vec!["model"];
            may.extend(from.may);
            format!("it may name {}", may.join(", "))
        }
    };
    Some(format!("{} may not name {to}: {why}", from.name))
}

/// Is this file one provider's simulator, or what such simulators share?
fn is_provider_simulator(module: &[&str]) -> bool {
    matches!(module, ["providers", "simulation", ..] | ["providers", _, "simulator", ..])
}

/// All that is wrong with one file. `file` is its path from the repository, with forward slashes.
fn check(file: &str, source: &str) -> Vec<Violation> {
    let mut out = Vec::new();
    let mut say = |line: usize, rule: String| out.push(Violation { file: file.to_owned(), line, rule });
    let module = module_of(file);
    let opens_room = module.len() < 2;
    if opens_room && !source.starts_with("//!") {
        say(1, "a room opens with //!: what it is for, what it may name, what must always hold".to_owned());
    }
    // lib.rs lists the rooms.
    let Some(&name) = module.first() else { return out };
    if NO_ROOM.contains(&name) {
        say(1, format!("no room {name}: put each thing into the room whose word it is"));
        return out;
    }
    let Some(from) = find(name) else {
        say(1, format!("{name} is no room of the table: add it to ARCHITECTURE.md and tests/layering.rs"));
        return out;
    };

    let tokens = without_tests(&tokens(&blank(source)));
    let (paths, rest) = paths(&module, &tokens);
    for Named { path, line } in paths {
        let segments: Vec<&str> = path.iter().map(String::as_str).collect();
        match segments.first() {
            None | Some(&"*") => say(line, "name rooms one by one, not the root of the crate".to_owned()),
            Some(to) => {
                if let Some(rule) = forbidden(from, to) {
                    say(line, rule);
                }
            }
        }
        for backend in BACKENDS {
            if segments.starts_with(backend) && name != backend[0] && name != "app" {
                say(line, format!("{name} may not name {}: only app names concrete back ends", backend.join("::")));
            }
        }
        if is_provider_simulator(&module)
            && let ["providers", _, part @ ("wire" | "normalize"), ..] = segments.as_slice()
        {
            say(line, format!("a simulator may not name {part}: it builds its JSON from the provider's documents"));
        }
    }

    for (i, token) in rest.iter().enumerate() {
        let Some((_, rooms)) = CRATES.iter().find(|(krate, _)| *krate == token.text) else { continue };
        let begins_path = !i.checked_sub(1).is_some_and(|before| matches!(rest[before].text.as_str(), "::" | "."));
        let is_path = rest.get(i + 1).is_some_and(|next| next.text == "::")
            || (i > 0 && rest[i - 1].text == "use" && rest.get(i + 1).is_some_and(|next| next.text == ";"));
        if begins_path && is_path && !rooms.contains(&name) {
            say(token.line, format!("{name} may not name the crate {}: it stays in {}", token.text, rooms[0]));
        }
    }
    out
}

// ---- the tests ----------------------------------------------------------------------------------------------------

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files below `folder`, as paths from the repository, sorted.
fn rust_files(folder: &Path, out: &mut Vec<String>) {
    for entry in fs::read_dir(folder).expect("src can be read") {
        let path = entry.expect("src can be read").path();
        if path.is_dir() {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let relative = path.strip_prefix(root()).expect("below the repository");
            out.push(relative.to_str().expect("UTF-8 names").replace('\\', "/"));
        }
    }
    out.sort();
}

#[test]
fn sources_keep_to_the_table() {
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    assert!(files.len() > 5, "found only {files:?}");
    let found: Vec<String> = files
        .iter()
        .flat_map(|file| check(file, &fs::read_to_string(root().join(file)).expect("a source file can be read")))
        .map(|violation| violation.to_string())
        .collect();
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}

#[test]
fn table_is_in_order() {
    let names: BTreeSet<_> = ROOMS.iter().map(|room| room.name).collect();
    assert_eq!(names.len(), ROOMS.len(), "a room is listed twice");
    for room in ROOMS {
        for to in room.may {
            let target = find(to).unwrap_or_else(|| panic!("{} may name {to}, which is no room", room.name));
            let starts_the_command_line = (room.name, *to) == ("main", "cli");
            assert!(target.level < room.level || starts_the_command_line, "{} may name {to} of its level", room.name);
        }
    }
}

/// The document people read and the table above say the same.
#[test]
fn architecture_lists_the_same_rooms() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let rows: Vec<(u8, String)> = text
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix('|')?.split('|').map(str::trim);
            let level = cells.next()?.parse().ok()?;
            let name = cells.next()?.strip_prefix('`')?.split(['`', '/', '.']).next()?.to_owned();
            Some((level, name))
        })
        .collect();
    let table: Vec<(u8, String)> = ROOMS.iter().map(|room| (room.level, room.name.to_owned())).collect();
    assert_eq!(rows, table, "the table of rooms in ARCHITECTURE.md and ROOMS differ");
}

/// The checker on made-up sources: it must be able to fail.
mod checker {
    use super::*;

    /// The rules broken by this file, as `line: rule`; the opening `//!` is added.
    fn broken(file: &str, source: &str) -> Vec<String> {
        check(file, &format!("//!\n{source}")).into_iter().map(|v| format!("{}: {}", v.line - 1, v.rule)).collect()
    }

    #[test]
    fn lets_good_sources_pass() {
        let source = r##"
            use crate::{clock::Clock, model::{RunId, quota}, storage::{self, Db as Store}};
            use super::error::Error;
            pub(crate) fn f<'a>(x: &'a str) -> crate::sync::Outcome { crate::sync::run::<crate::model::RunId>(x) }
            macro_rules! m { () => { $crate::model::RunId } }
        "##;
        assert_eq!(broken("src/api/sync.rs", source), [""; 0]);
    }

    #[test]
    fn sees_a_room_above() {
        assert_eq!(
            broken("src/storage/runs.rs", "use crate::sync::plan;"),
            ["1: storage may not name sync: level 3 is above level 2"]
        );
    }

    #[test]
    fn sees_a_room_beside() {
        let rule = "rooms of one level do not name each other";
        assert_eq!(
            broken("src/storage/mod.rs", "\nfn f() { crate::export::write() }"),
            [format!("2: storage may not name export: {rule}")]
        );
        assert_eq!(
            broken("src/api/mod.rs", "use super::worker::Handle;"),
            [format!("1: api may not name worker: {rule}")]
        );
        assert_eq!(
            broken("src/providers/acme/client.rs", "use super::super::super::coordination::Quotas;"),
            [format!("1: providers may not name coordination: {rule}")]
        );
        assert_eq!(
            broken("src/clock.rs", "use super::config::Config;"),
            [format!("1: clock may not name config: {rule}")]
        );
    }

    #[test]
    fn sees_a_room_below_that_is_not_allowed() {
        assert_eq!(
            broken("src/telemetry/mod.rs", "use crate::clock::Clock;"),
            ["1: telemetry may not name clock: it may name model"]
        );
        assert_eq!(broken("src/main.rs", "fn main() { wearsync::sync::run() }").len(), 1);
    }

    #[test]
    fn sees_into_groups_and_inner_modules() {
        assert_eq!(
            broken("src/export/mod.rs", "use crate::{\n  model::RunId,\n  clock::{self, Clock},\n  api::{Error},\n};"),
            ["4: export may not name api: level 4 is above level 2"]
        );
        let inner = "mod deep { use super::super::vault; use super::files; }\nuse super::vault;";
        assert_eq!(
            broken("src/export/mod.rs", inner),
            [
                "1: export may not name vault: it may name model, clock, config, telemetry",
                "2: export may not name vault: it may name model, clock, config, telemetry"
            ]
        );
    }

    #[test]
    fn sees_the_root_and_strangers() {
        assert_eq!(broken("src/sync/mod.rs", "use crate::*;"), ["1: name rooms one by one, not the root of the crate"]);
        assert_eq!(
            broken("src/sync/mod.rs", "use crate::oddity::X;"),
            ["1: sync names oddity, which is no room of the table"]
        );
        assert_eq!(broken("src/oddity.rs", "").len(), 1);
        assert_eq!(broken("src/util/mod.rs", ""), ["0: no room util: put each thing into the room whose word it is"]);
        assert_eq!(broken("src/sync/mod.rs", "fn f() { crate::on_db!(x) }"), [""; 0]);
    }

    #[test]
    fn leaves_text_and_tests_alone() {
        let source = r###"
            // use crate::worker::A;
            /* /* crate::worker */ crate::worker::B */
            /// See [`crate::worker::C`].
            const TEXT: &str = "crate::worker::D \" crate::worker::E";
            const RAW: &str = r#"crate::worker::F " "#;
            const QUOTES: [char; 2] = ['"', '\''];
            #[cfg(test)]
            use crate::worker::G;
            #[cfg(test)]
            #[expect(unused)]
            mod tests { fn f(x: [u8; 2]) { crate::worker::H } }
            use crate::worker::Seen;
        "###;
        assert_eq!(broken("src/storage/mod.rs", source), ["13: storage may not name worker: level 4 is above level 2"]);
    }

    #[test]
    fn keeps_back_ends_to_app() {
        let source = "use crate::coordination::{local, redis::Redis, Quotas};";
        let rule = "only app names concrete back ends";
        assert_eq!(
            broken("src/sync/mod.rs", source),
            [
                format!("1: sync may not name coordination::local: {rule}"),
                format!("1: sync may not name coordination::redis: {rule}")
            ]
        );
        assert_eq!(broken("src/app.rs", source), [""; 0]);
        assert_eq!(broken("src/coordination/mod.rs", source), [""; 0]);
    }

    #[test]
    fn keeps_crates_to_their_room() {
        assert_eq!(
            broken("src/api/users.rs", "use sqlx::PgPool;"),
            ["1: api may not name the crate sqlx: it stays in storage"]
        );
        assert_eq!(broken("src/worker/mod.rs", "use apalis::prelude::*;"), [""; 0]);
        assert_eq!(broken("src/sync/mod.rs", "let redis = 1; self.redis.ping();"), [""; 0]);
    }

    #[test]
    fn keeps_simulators_from_the_code_they_check() {
        for source in ["use super::wire::Activity;", "use super::{client, wire};", "use super::normalize;"] {
            assert_eq!(broken("src/providers/acme/simulator.rs", source).len(), 1, "{source}");
        }
        assert_eq!(broken("src/providers/acme/simulator/pages.rs", "use super::super::wire;").len(), 1);
        assert_eq!(broken("src/providers/acme/client.rs", "use super::wire::Activity;"), [""; 0]);
        assert_eq!(broken("src/providers/acme/simulator.rs", "use crate::providers::simulation::Ledger;"), [""; 0]);
    }

    #[test]
    fn wants_rooms_to_open_with_their_purpose() {
        let first = |file: &str| check(file, "use std::fmt;").len();
        assert_eq!(first("src/clock.rs"), 1);
        assert_eq!(first("src/sync/mod.rs"), 1);
        assert_eq!(first("src/lib.rs"), 1);
        assert_eq!(first("src/sync/plan.rs"), 0);
    }
}
