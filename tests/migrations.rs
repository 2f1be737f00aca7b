//! Holds the two folders of migrations against each other: same numbers and names, same tables, columns, constraints and
//! indexes, nothing named by a reserved word. Reads text; needs no database. Alone: `cargo test --test migrations`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// A word of one dialect, and what both are compared as.
const TYPES: &[(&str, &str)] = &[
    // Longest first.
    ("bigint generated always as identity", "number"),
    ("double precision[]", "text"),
    ("integer[]", "text"),
    ("double precision", "real"),
    ("timestamptz", "text"),
    ("boolean", "number"),
    ("integer", "number"),
    ("bigint", "number"),
    ("bytea", "blob"),
    ("uuid", "blob"),
    ("date", "text"),
    ("text", "text"),
    ("real", "real"),
    ("blob", "blob"),
];

/// Words that cannot name a table or column without quotes in Postgres 15 or SQLite 3.
const RESERVED: &str = "abort add all alter always analyse analyze and any array as asc asymmetric authorization autoincrement
    between binary both case cast check collate collation column commit concurrently constraint create cross current_catalog
    current_date current_role current_schema current_time current_timestamp current_user default deferrable deferred delete
    desc distinct do drop else end escape except exists false fetch for foreign freeze from full grant group having ilike
    in index initially inner insert intersect into is isnull join lateral leading left like limit localtime localtimestamp
    natural not notnull nothing null offset on only or order outer overlaps placing primary references returning right
    select session_user set similar some symmetric table tablesample then to trailing transaction true union unique update
    user using values variadic verbose when where window with";

#[derive(Debug, Default, PartialEq)]
struct Schema {
    /// Table to column to the rest of its definition; constraints of the table under `constraint: …`.
    tables: BTreeMap<String, BTreeMap<String, String>>,
    /// View to its columns.
    views: BTreeMap<String, Vec<String>>,
    /// Whole statements.
    indexes: BTreeSet<String>,
    /// What a table is filled with.
    rows: BTreeSet<String>,
}

fn files(dialect: &str) -> BTreeMap<String, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations").join(dialect);
    fs::read_dir(folder)
        .expect("a folder of migrations")
        .map(|entry| {
            let path = entry.expect("reads").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            (name, fs::read_to_string(&path).expect("is text"))
        })
        .collect()
}

/// Pieces between commas (or other separators) that stand outside of parentheses.
fn split(text: &str, separator: char) -> Vec<String> {
    let (mut depth, mut out) = (0, vec![String::new()]);
    for c in text.chars() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        match out.last_mut() {
            Some(piece) if c != separator || depth > 0 => piece.push(c),
            _ => out.push(String::new()),
        }
    }
    out.into_iter().map(|piece| piece.trim().to_owned()).filter(|piece| !piece.is_empty()).collect()
}

/// All migrations of a dialect as one schema.
fn schema(dialect: &str) -> Schema {
    let mut out = Schema::default();
    for (name, text) in files(dialect) {
        let lines: Vec<&str> = text.lines().map(|line| line.split("--").next().unwrap_or_default()).collect();
        // Bodies of functions are Postgres's own and hold semicolons.
        let text = lines.join("\n");
        let text: String = text.split("$$").step_by(2).collect();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for statement in split(&text, ';') {
            let words: Vec<&str> = statement.split(' ').collect();
            match words.as_slice() {
                ["create", "table", table, ..] => {
                    let body = statement.split_once('(').expect("columns").1;
                    let end = body.rfind(") with (").or_else(|| body.rfind(") strict")).or_else(|| body.rfind(')'));
                    let columns = split(&body[..end.expect("an end")], ',').into_iter().map(|column| {
                        let (name, rest) = column.split_once(' ').expect("a definition");
                        match name {
                            "primary" | "unique" | "check" | "foreign" => {
                                (format!("constraint: {column}"), String::new())
                            }
                            _ => (name.to_owned(), plain(rest)),
                        }
                    });
                    assert!(out.tables.insert((*table).to_owned(), columns.collect()).is_none(), "{table} twice");
                }
                ["create", "view", view, ..] => {
                    let list = statement.split_once(" select ").expect("a query").1;
                    let list = split(&list.replace(" from sample_chunks c", "\u{1}"), '\u{1}').remove(0);
                    let columns = split(&list, ',')
                        .into_iter()
                        .map(|column| column.rsplit([' ', '.']).next().expect("a name").to_owned());
                    out.views.insert((*view).to_owned(), columns.collect());
                }
                ["create", "unique", "index", ..] | ["create", "index", ..] => {
                    out.indexes.insert(statement.clone());
                }
                ["drop", "index", index] => {
                    let before = out.indexes.len();
                    out.indexes.retain(|made| !made.contains(&format!("index {index} ")));
                    assert_eq!(before, out.indexes.len() + 1, "{name}: no index {index}");
                }
                ["insert", ..] => {
                    out.rows.insert(statement.clone());
                }
                // Storage and functions are Postgres's own.
                ["alter", "table", _, "alter", "column", _, "set", "compression" | "storage", ..]
                    if dialect == "postgres" => {}
                ["alter", "table", table, "add", "column", column, ..] => {
                    let rest = statement.split_once(&format!(" {column} ")).expect("a definition").1;
                    let known = out.tables.get_mut(*table).unwrap_or_else(|| panic!("{name}: no table {table}"));
                    known.insert((*column).to_owned(), plain(rest));
                }
                ["create", "function", ..] if dialect == "postgres" => {}
                _ => panic!("{dialect}/{name}: this test cannot compare `{statement}`: teach it"),
            }
        }
    }
    out
}

/// A column's definition with its type in the words that both share.
fn plain(definition: &str) -> String {
    let found = TYPES.iter().find_map(|(word, common)| Some((definition.strip_prefix(word)?, *common)));
    let (rest, common) = found.unwrap_or_else(|| panic!("unknown type in `{definition}`"));
    format!("{common}{}", rest.replace("default false", "default 0").replace("default true", "default 1"))
}

#[test]
fn both_folders_have_the_same_files_numbered_in_order() {
    let names = |dialect| files(dialect).into_keys().collect::<Vec<_>>();
    assert_eq!(names("sqlite"), names("postgres"));
    for (place, name) in names("sqlite").iter().enumerate() {
        let number = name.get(..4).and_then(|number| number.parse::<usize>().ok());
        assert!(number == Some(place + 1) && name.get(4..5) == Some("_") && name.ends_with(".sql"), "{name}");
    }
}

#[test]
fn both_databases_get_the_same_schema() {
    let (sqlite, postgres) = (schema("sqlite"), schema("postgres"));
    let names = |schema: &Schema| schema.tables.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&sqlite), names(&postgres));
    for (table, columns) in &sqlite.tables {
        assert_eq!(columns, &postgres.tables[table], "{table}");
    }
    assert_eq!(sqlite.views, postgres.views);
    assert_eq!(sqlite.indexes, postgres.indexes);
    assert_eq!(sqlite.rows, postgres.rows);
    assert!(sqlite.tables.len() > 10 && sqlite.views.len() == 1, "{:?}", names(&sqlite));
}

#[test]
fn nothing_is_named_by_a_reserved_word() {
    let reserved: BTreeSet<&str> = RESERVED.split_whitespace().collect();
    let schema = schema("sqlite");
    let tables = schema.tables.iter().flat_map(|(table, columns)| std::iter::once(table).chain(columns.keys()));
    for name in tables.chain(schema.views.values().flatten()).filter(|name| !name.starts_with("constraint: ")) {
        let simple = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        assert!(simple && !reserved.contains(name.as_str()), "`{name}` has to be quoted somewhere");
    }
}
