//! Reading from a vault or from its copies (T1).
//!
//! PostgreSQL ends recovery when it is told that a file does not exist. So what one vault does not have is only absent when every
//! other that was to be asked has said the same: one that cannot answer might have it.
//!
//! | one says | the other says | together |
//! |---|---|---|
//! | present | anything | present |
//! | absent | absent | absent |
//! | trouble | absent, or trouble | trouble |

use crate::{Error, ErrorKind, Result};

/// What one vault says.
#[derive(Debug)]
pub enum Answer<T> {
    /// It has it.
    Present(T),
    /// It proves that it does not have it.
    Absent,
    /// It cannot tell.
    Trouble(Error),
}

/// What two vaults say together: the rule of this module. Of two troubles, the one that may pass is told, so that it is tried again.
pub fn either<T>(one: Answer<T>, other: Answer<T>) -> Answer<T> {
    use Answer::{Absent, Present, Trouble};
    match (one, other) {
        (Present(found), _) | (_, Present(found)) => Present(found),
        (Absent, Absent) => Absent,
        (Trouble(error), Trouble(passing)) if passing.is_transient() && !error.is_transient() => Trouble(passing),
        (Trouble(error), _) | (Absent, Trouble(error)) => Trouble(error),
    }
}

/// Asks one place after the other, until one has it. What `ask` refuses with an error is not asked of the others.
///
/// # Errors
/// The first that `ask` returns.
pub async fn ask<P, T>(places: impl IntoIterator<Item = P>, mut ask: impl AsyncFnMut(P) -> Result<Answer<T>>) -> Result<Answer<T>> {
    let mut together = None;
    for place in places {
        let answer = ask(place).await?;
        let answer = match together {
            Some(before) => either(before, answer),
            None => answer,
        };
        if matches!(answer, Answer::Present(_)) {
            return Ok(answer);
        }
        together = Some(answer);
    }
    // Nobody was asked, so nothing is proven.
    Ok(together.unwrap_or_else(|| Answer::Trouble(Error::new(ErrorKind::Failed, "copy.nowhere", "there is no vault to ask"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(kind: char, name: &'static str) -> Answer<&'static str> {
        match kind {
            'p' => Answer::Present(name),
            'a' => Answer::Absent,
            _ => Answer::Trouble(Error::new(ErrorKind::Storage, name, name)),
        }
    }

    fn said(answer: &Answer<&'static str>) -> String {
        match answer {
            Answer::Present(name) => format!("present in {name}"),
            Answer::Absent => "absent".into(),
            Answer::Trouble(error) => format!("trouble of {}", error.code()),
        }
    }

    /// One vault's answer, the other's, and what they say together.
    const RULE: [(char, char, &str); 9] = [
        ('p', 'p', "present in vault"),
        ('p', 'a', "present in vault"),
        ('p', 't', "present in vault"),
        ('a', 'p', "present in copy"),
        ('a', 'a', "absent"),
        ('a', 't', "trouble of copy"),
        ('t', 'p', "present in copy"),
        ('t', 'a', "trouble of vault"),
        ('t', 't', "trouble of vault"),
    ];

    #[tokio::test]
    async fn t1_an_error_in_one_vault_is_never_absence_because_the_other_has_nothing() {
        for (vault, copy, expected) in RULE {
            assert_eq!(said(&either(answer(vault, "vault"), answer(copy, "copy"))), expected, "{vault} and {copy}");
            let places = [(vault, "vault"), (copy, "copy")];
            let mut asked = 0;
            let all = ask(places, async |(kind, name)| {
                asked += 1;
                Ok(answer(kind, name))
            });
            assert_eq!(said(&all.await.unwrap()), expected, "{vault} and {copy}");
            assert_eq!(asked, if vault == 'p' { 1 } else { 2 }, "the copy is only asked for what the vault does not give");
        }
    }

    #[tokio::test]
    async fn t1_nothing_is_absent_when_nobody_was_asked() {
        let nobody: [(char, &str); 0] = [];
        assert!(matches!(ask(nobody, async |(kind, name)| Ok(answer(kind, name))).await.unwrap(), Answer::Trouble(_)));
    }

    /// What may pass is tried again; an error that stays must not hide it.
    #[test]
    fn of_two_troubles_the_passing_one_is_told() {
        let lasting = Answer::Trouble(Error::new(ErrorKind::NoVault, "none", "none"));
        let Answer::Trouble(error) = either::<()>(lasting, Answer::Trouble(Error::new(ErrorKind::Storage, "away", "away"))) else {
            panic!("two troubles are one")
        };
        assert_eq!(error.code(), "away");
    }
}
