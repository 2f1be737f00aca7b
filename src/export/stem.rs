use std::fmt::Write;

use chrono::{Datelike, NaiveDate};
use sha2::{Digest, Sha256};

use crate::model::UserId;

/// The longest stem in bytes: with suffix and folders it stays far below every file system's limit.
pub const MAX_STEM: usize = 120;

/// `YYYY-MM-DD`.
const DATE: usize = 10;
/// The longest id that is written out; leaves `2026-02-05-` and eight bytes of slug.
const MAX_ID: usize = MAX_STEM - DATE - 1 - 8 - 1;

/// The name of a record's files without suffix: `{YYYY-MM-DD}-{slug}-{id}`. The slug is the title in ASCII kebab case,
/// else the provider's type, else the kind; it is cut so that the whole has at most [`MAX_STEM`] bytes. Call it once
/// per record and keep the answer: titles change, names do not.
#[must_use]
pub fn stem(
    local_day: NaiveDate,
    title: Option<&str>,
    provider_type: &str,
    kind_word: &str,
    external_id: &str,
) -> String {
    let slug = [title.unwrap_or_default(), provider_type, kind_word].into_iter().map(kebab).find(|s| !s.is_empty());
    // Four digits always: `part_stem` finds the date by its length.
    let year = local_day.year().clamp(0, 9999);
    let date = format!("{year:04}-{:02}-{:02}", local_day.month(), local_day.day());
    join(&date, &slug.unwrap_or_else(|| "entity".into()), external_id)
}

/// The stem for another part of a record: `{date of its stem}-{word}-{id}`, for example `2026-02-05-streams-123456`.
#[must_use]
pub fn part_stem(stem: &str, word: &str, external_id: &str) -> String {
    join(stem.get(..DATE).unwrap_or(stem), &kebab(word), external_id)
}

/// The file of one version (from 1): `<stem>.json`, later ones `<stem>.r2.json`.
#[must_use]
pub fn file(stem: &str, version: i64) -> String {
    if version > 1 { format!("{stem}.r{version}.json") } else { format!("{stem}.json") }
}

/// The file that says that the record is gone: `<stem>.deleted.json`.
#[must_use]
pub fn deleted_file(stem: &str) -> String {
    format!("{stem}.deleted.json")
}

/// The file of a thing that is rewritten when it changed: `<id>.json`.
#[must_use]
pub fn reference_file(external_id: &str) -> String {
    format!("{}.json", safe_id(external_id))
}

/// The folder of one user: the user's id, after the external id where there is one. The id is what makes it unique:
/// external ids may repeat, or differ only by case.
#[must_use]
pub fn user_folder(external_id: Option<&str>, user: UserId) -> String {
    match external_id.filter(|text| !text.is_empty()) {
        Some(text) => format!("{}-{user}", safe_id(text)),
        None => user.to_string(),
    }
}

fn join(date: &str, slug: &str, external_id: &str) -> String {
    let id = safe_id(external_id);
    let room = MAX_STEM.saturating_sub(date.len() + id.len() + 2);
    // ASCII, so every byte is a boundary.
    let slug = slug.get(..room).unwrap_or(slug).trim_end_matches('-');
    format!("{date}-{slug}-{id}")
}

/// Lower-case ASCII letters and digits, words joined by single dashes. Empty if nothing of the text can be written so.
fn kebab(text: &str) -> String {
    let mut slug = String::new();
    for c in deunicode::deunicode(text).chars() {
        if c.is_ascii_alphanumeric() {
            slug.push(c.to_ascii_lowercase());
        } else if c != '\'' && !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
        // Titles have no limit of ours; the rest would be cut anyway.
        if slug.len() > MAX_STEM {
            break;
        }
    }
    slug.truncate(slug.trim_end_matches('-').len());
    slug
}

/// The id as part of a file name: everything but letters, digits, `_` and `-` as percent escapes. Dots are escaped as
/// well, so that no id can look like a suffix (`1.r2`), a hidden file or `..`. An id too long for a name becomes its
/// beginning, `~`, and a digest; `~` appears in no other.
fn safe_id(id: &str) -> String {
    let mut safe = String::with_capacity(id.len());
    for byte in id.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
            safe.push(char::from(byte));
        } else {
            let _ = write!(safe, "%{byte:02X}");
        }
        // An endless id is digested below; its escapes need not be written out.
        if safe.len() > MAX_ID {
            break;
        }
    }
    if !safe.is_empty() && safe.len() <= MAX_ID {
        return safe;
    }
    safe.truncate(40);
    safe.push('~');
    for byte in &Sha256::digest(id)[..16] {
        let _ = write!(safe, "{byte:02x}");
    }
    safe
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn day() -> NaiveDate {
        NaiveDate::from_ymd_opt(2026, 2, 5).unwrap()
    }

    #[test]
    fn names_are_those_of_the_convention() {
        assert_eq!(stem(day(), Some("Morning Run"), "run", "workout", "123456"), "2026-02-05-morning-run-123456");
        assert_eq!(stem(day(), None, "Virtual Ride", "workout", "7"), "2026-02-05-virtual-ride-7");
        assert_eq!(stem(day(), Some("  ?! "), "", "weight", "78945"), "2026-02-05-weight-78945");
        assert_eq!(part_stem("2026-02-05-morning-run-123456", "streams", "123456"), "2026-02-05-streams-123456");
        assert_eq!(file("s", 1), "s.json");
        assert_eq!(file("s", 2), "s.r2.json");
        assert_eq!(deleted_file("s"), "s.deleted.json");
        assert_eq!(reference_file("b123"), "b123.json");
    }

    #[test]
    fn slugs_keep_what_ascii_can_say() {
        assert_eq!(kebab("Fröhlicher Läufer — Żółć"), "frohlicher-laufer-zolc");
        assert_eq!(kebab("Don't stop"), "dont-stop");
        assert_eq!(kebab("朝のラン"), "zhao-noran");
        assert_eq!(kebab("🏃"), "runner");
        assert_eq!(kebab("../../etc/passwd"), "etc-passwd");
        assert_eq!(kebab("\u{0301}\u{200b}"), "");
    }

    #[test]
    fn ids_are_safe_and_never_cut() {
        assert_eq!(safe_id("a/b c"), "a%2Fb%20c");
        assert_eq!(safe_id(".."), "%2E%2E");
        assert_eq!(safe_id("1.r2"), "1%2Er2");
        assert_eq!(safe_id("00000000-0000-7000-8000-000000000000"), "00000000-0000-7000-8000-000000000000");
        assert_ne!(safe_id(""), "");
        let long = "x".repeat(100);
        let name = stem(day(), Some(&"very long ".repeat(50)), "run", "workout", &long);
        assert_eq!(name, format!("2026-02-05-very-lon-{long}"));
        let (one, two) = (format!("{long}1"), format!("{long}2"));
        assert_ne!(safe_id(&one), safe_id(&two));
        assert!(safe_id(&one).len() <= MAX_ID);
    }

    #[test]
    fn users_do_not_share_a_folder() {
        let (one, two) = (UserId::new(), UserId::new());
        assert_ne!(user_folder(Some("alice"), one), user_folder(Some("alice"), two));
        assert_eq!(user_folder(None, one), one.to_string());
        assert!(user_folder(Some("../Ann"), one).starts_with("%2E%2E%2FAnn-"));
    }

    proptest! {
        #[test]
        fn stems_are_short_ascii_and_safe(
            title in proptest::option::of("\\PC{0,200}"), kind in "\\PC{0,12}", id in "\\PC{0,150}", days in 0..60_000i32,
        ) {
            let day = NaiveDate::from_num_days_from_ce_opt(700_000 + days).unwrap();
            let name = stem(day, title.as_deref(), &kind, "workout", &id);
            prop_assert!(name.len() <= MAX_STEM, "{} bytes", name.len());
            prop_assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_%~".contains(&b)), "{name}");
            prop_assert!(name.starts_with(&day.to_string()));
            prop_assert!(part_stem(&name, "streams", &id).len() <= MAX_STEM);
        }

        #[test]
        fn distinct_ids_have_distinct_stems(
            title in "\\PC{0,200}", one in "\\PC{0,150}|[0-9]{1,4}", two in "\\PC{0,150}|[0-9]{1,4}",
        ) {
            prop_assume!(one != two);
            prop_assert_ne!(safe_id(&one), safe_id(&two));
            prop_assert_ne!(
                stem(day(), Some(&title), "run", "workout", &one), stem(day(), Some(&title), "run", "workout", &two)
            );
        }
    }
}
