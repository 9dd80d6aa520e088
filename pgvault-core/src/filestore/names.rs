//! Names of files below a filestore.
//!
//! Rules of Odoo's `ir_attachment.py`: a name in `store_fname` is joined to the filestore after dots (from 19 on colons, too) are taken out
//! and slashes at both ends stripped (`_full_path`); content lies under `<sha1[:2]>/<sha1>`, of old under `<sha1[:3]>/<sha1>`; below
//! `checklist/` are empty files that mark names for the garbage collector; from 19.5 on `*.__new` is being written and `*.__gc` removed.

use crate::format::file_run::MAX_NAME;

/// The folder of marks.
pub const CHECKLIST: &str = "checklist";

/// Endings of files that are on their way in or out.
const TRANSIENT: [&str; 2] = [".__new", ".__gc"];

/// What a `store_fname` means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place<'a> {
    /// A file below the filestore.
    Local,
    /// An object elsewhere, under this scheme.
    Remote(&'a str),
}

/// Where a `store_fname` leads.
pub fn place(store_fname: &str) -> Place<'_> {
    match store_fname.split_once("://") {
        Some((scheme, _)) if !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-+.".contains(&b)) => {
            Place::Remote(scheme)
        }
        _ => Place::Local,
    }
}

/// The path below the filestore that a local `store_fname` leads to; none when it leads nowhere.
///
/// Dots go as in every version, colons stay: no name that Odoo makes has any, and those before 19 would keep them.
pub fn resolve(store_fname: &str) -> Option<String> {
    let path: String = store_fname.chars().filter(|c| *c != '.').collect();
    let path = path.trim_matches(['/', '\\']);
    let usable = !path.is_empty() && path.len() <= MAX_NAME && !path.contains('\0') && !path.split('/').any(str::is_empty);
    usable.then(|| path.to_owned())
}

/// True for a path below the filestore that holds content: no mark, and nothing on its way.
pub fn is_content(path: &str) -> bool {
    let first = path.split('/').next().unwrap_or_default();
    first != CHECKLIST && !first.starts_with('.') && path.len() <= MAX_NAME && !TRANSIENT.iter().any(|end| path.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_where_odoo_looks() {
        let digits = "0123456789abcdef0123456789abcdef01234567";
        for (name, path) in [
            (format!("01/{digits}"), Some(format!("01/{digits}"))),
            (format!("/01/{digits}/"), Some(format!("01/{digits}"))),
            ("../../etc/passwd".into(), Some("etc/passwd".into())),
            ("a/b.txt".into(), Some("a/btxt".into())),
            ("..".into(), None),
            (String::new(), None),
            ("a//b".into(), None),
            ("x".repeat(MAX_NAME + 1), None),
        ] {
            assert_eq!(resolve(&name), path, "{name}");
        }
    }

    #[test]
    fn schemes_are_elsewhere() {
        assert_eq!(place("s3://bucket/abc"), Place::Remote("s3"));
        assert_eq!(place("my_code://x"), Place::Remote("my_code"));
        for local in ["01/abc", "://x", "a b://x", "01/a:b"] {
            assert_eq!(place(local), Place::Local, "{local}");
        }
    }

    #[test]
    fn marks_and_transient_files_are_no_content() {
        assert!(is_content("01/0123") && is_content("012/0123") && is_content("web/x"));
        for other in ["checklist/01/0123", "checklist", "01/0123.__new", "01/0123.__gc", ".pgvault/x"] {
            assert!(!is_content(other), "{other}");
        }
    }
}
