//! What the features in `vault.json` forbid to a program that does not know them.
//!
//! A newer version that changes how a vault is used names that change where it matters: in the list of what must be known to
//! read the vault, to write to it, or to collect garbage in it. So an older program keeps doing what the change leaves sound:
//! reading from a vault that only has to be written in a new way, and both in one where only deleting has new rules.

use std::collections::BTreeMap;

use crate::{Error, ErrorKind, Result};

/// What somebody is about to do with a vault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// List, restore, check, scrub.
    Read,
    /// Create objects, or delete one that this program created, as revoking a key does.
    Write,
    /// Delete what nothing needs any more.
    CollectGarbage,
}

impl Purpose {
    /// The list in `vault.json` that has what must be known.
    const fn list(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::CollectGarbage => "gc",
        }
    }

    const fn doing(self) -> &'static str {
        match self {
            Self::Read => "read it",
            Self::Write => "write to it",
            Self::CollectGarbage => "collect garbage in it",
        }
    }
}

/// The store overwrites, so that only one program at a time may write. Who writes must know it, to look at a name first.
pub const SINGLE_WRITER: &str = "single-writer";

/// The store keeps versions, and tells several writers of one name at the same moment that each has created it. Who writes must
/// know that the first version counts.
pub const FIRST_VERSION: &str = "first-version";

/// What this version knows.
const KNOWN: [&str; 2] = [SINGLE_WRITER, FIRST_VERSION];

/// The names of the lists, as a new vault has them.
pub(super) fn none() -> BTreeMap<String, Vec<String>> {
    [Purpose::Read, Purpose::Write, Purpose::CollectGarbage].map(|purpose| (purpose.list().to_owned(), Vec::new())).into()
}

/// The lists of a vault with a feature that writers must know.
pub(super) fn for_writers(feature: &str) -> BTreeMap<String, Vec<String>> {
    let mut features = none();
    features.entry(Purpose::Write.list().to_owned()).or_default().push(feature.to_owned());
    features
}

/// True when a vault has it.
pub(super) fn has_for_writers(features: &BTreeMap<String, Vec<String>>, feature: &str) -> bool {
    features.get(Purpose::Write.list()).is_some_and(|names| names.iter().any(|name| name == feature))
}

/// Makes sure that this version knows every feature that stands in the way of `purpose`.
///
/// Whoever writes also reads, and whoever collects garbage also writes. A list under a name that this version does not know
/// forbids everything.
pub(super) fn ensure(features: &BTreeMap<String, Vec<String>>, purpose: Purpose) -> Result<()> {
    let concerned: &[Purpose] = match purpose {
        Purpose::Read => &[Purpose::Read],
        Purpose::Write => &[Purpose::Read, Purpose::Write],
        Purpose::CollectGarbage => &[Purpose::Read, Purpose::Write, Purpose::CollectGarbage],
    };
    let harmless = [Purpose::Read, Purpose::Write, Purpose::CollectGarbage]
        .into_iter()
        .filter(|known| !concerned.contains(known))
        .map(Purpose::list)
        .collect::<Vec<_>>();
    let unknown = features
        .iter()
        .filter(|(list, _)| !harmless.contains(&list.as_str()))
        .find_map(|(_, names)| names.iter().find(|name| !KNOWN.contains(&name.as_str())));
    unknown.map_or(Ok(()), |name| Err(refused(name, purpose)))
}

fn refused(feature: &str, purpose: Purpose) -> Error {
    let what = format!("the vault has the feature `{feature}`, unknown to this version, which must not {}", purpose.doing());
    Error::new(ErrorKind::Unsupported, "vault.feature", what).with_hint("use a newer pgvault")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_feature_forbids_what_its_list_says() {
        use Purpose::{CollectGarbage, Read, Write};
        for (list, forbidden) in [
            ("read", &[Read, Write, CollectGarbage][..]),
            ("write", &[Write, CollectGarbage]),
            ("gc", &[CollectGarbage]),
            ("elsewhere", &[Read, Write, CollectGarbage]),
        ] {
            let mut features = none();
            features.entry(list.into()).or_default().push("x".into());
            for purpose in [Read, Write, CollectGarbage] {
                let judged = ensure(&features, purpose);
                assert_eq!(judged.is_err(), forbidden.contains(&purpose), "{list}, {purpose:?}: {judged:?}");
                assert!(ensure(&none(), purpose).is_ok());
                for known in KNOWN {
                    assert!(ensure(&for_writers(known), purpose).is_ok());
                }
                if let Err(error) = judged {
                    assert_eq!((error.kind(), error.code()), (ErrorKind::Unsupported, "vault.feature"));
                    assert!(error.to_string().contains("`x`"), "{error}");
                }
            }
        }
    }
}
