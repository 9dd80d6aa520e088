//! The statements that modules bring, one by one.
//!
//! `odoo-bin neutralize --stdout` prints one text with its own `BEGIN` and `COMMIT`. They are run inside a larger transaction, and one
//! that fails is to be named; so the text is taken apart where a statement ends, and nowhere else: not in strings, quoted names, dollar
//! quotes and comments. Source: the chapter "Lexical Structure" of PostgreSQL's documentation.

use pgvault_core::{Error, ErrorKind, Result};

/// Characters of a statement that a message shows.
const SHOWN: usize = 120;

/// One statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Statement<'a> {
    pub(super) text: &'a str,
    /// Where it begins; the first line is 1.
    pub(super) line: usize,
}

impl Statement<'_> {
    /// Its beginning on one line, for messages.
    pub(super) fn beginning(&self) -> String {
        let words = self.text.split_whitespace().collect::<Vec<_>>().join(" ");
        if words.chars().count() <= SHOWN { words } else { words.chars().take(SHOWN).chain(['…']).collect() }
    }
}

/// Takes the text apart; leaves out what begins and ends its own transaction.
///
/// # Errors
/// When a quote has no end, and for what would end the transaction that it is run in, or is meant for `psql`.
pub(super) fn split(text: &str) -> Result<Vec<Statement<'_>>> {
    let mut found = Vec::new();
    let mut scanner = Scanner { text, at: 0 };
    while let Some((start, end)) = scanner.statement()? {
        let text = text.get(start..end).unwrap_or_default().trim_end();
        let statement = Statement { text, line: scanner.line_of(start) };
        match control(text) {
            Control::None => found.push(statement),
            Control::Harmless => {}
            Control::Ends => {
                return Err(bad(&statement, "would end the transaction that makes the copy harmless as a whole or not at all"));
            }
        }
    }
    Ok(found)
}

fn bad(statement: &Statement<'_>, why: &str) -> Error {
    let said = format!("line {} of the modules' statements, `{}`, {why}", statement.line, statement.beginning());
    Error::new(ErrorKind::Usage, "neutralise.statements", said).with_hint("give what `odoo-bin neutralize --stdout` prints")
}

/// What a statement does to the transaction it is in.
enum Control {
    None,
    /// It begins or commits the text's own.
    Harmless,
    Ends,
}

fn control(statement: &str) -> Control {
    let words: Vec<String> = statement.split_whitespace().map(str::to_ascii_uppercase).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["BEGIN" | "COMMIT" | "END"] | ["BEGIN" | "COMMIT" | "END", "WORK" | "TRANSACTION"] | ["START", "TRANSACTION"] => {
            Control::Harmless
        }
        ["ROLLBACK", "TO", ..] | ["ROLLBACK", "WORK" | "TRANSACTION", "TO", ..] => Control::None,
        ["BEGIN" | "COMMIT" | "END" | "ROLLBACK" | "ABORT", ..] | ["START" | "PREPARE", "TRANSACTION", ..] => Control::Ends,
        _ => Control::None,
    }
}

struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

impl Scanner<'_> {
    /// Start and end of the next statement, without what separates it from others.
    fn statement(&mut self) -> Result<Option<(usize, usize)>> {
        let mut start = None;
        while let Some(next) = self.peek() {
            let here = self.at;
            match next {
                b';' => {
                    self.at += 1;
                    if let Some(start) = start {
                        return Ok(Some((start, here)));
                    }
                    continue;
                }
                b'-' if self.follows("--") => {
                    self.at = self.find("\n").unwrap_or(self.text.len());
                    continue;
                }
                b'/' if self.follows("/*") => {
                    self.comment()?;
                    continue;
                }
                b'\\' => return Err(self.error(here, "is a command of psql")),
                b'\'' => {
                    let escapes = self.has_prefix(|c| c.eq_ignore_ascii_case(&b'e'));
                    self.quoted(b'\'', escapes)?;
                }
                b'"' => self.quoted(b'"', false)?,
                b'$' if !self.has_prefix(|_| true) => self.dollar()?,
                space if space.is_ascii_whitespace() => {
                    self.at += 1;
                    continue;
                }
                _ => self.at += 1,
            }
            let _ = start.get_or_insert(here);
        }
        Ok(start.map(|start| (start, self.text.len())))
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn rest(&self) -> &str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn follows(&self, what: &str) -> bool {
        self.text.as_bytes().get(self.at..).is_some_and(|rest| rest.starts_with(what.as_bytes()))
    }

    fn find(&self, what: &str) -> Option<usize> {
        self.rest().find(what).map(|offset| self.at + offset)
    }

    /// True when a word ends right here, and `is` holds for a word of this one character, or for any word.
    fn has_prefix(&self, is: impl Fn(&u8) -> bool) -> bool {
        let bytes = self.text.as_bytes();
        let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_' || *byte == b'$' || *byte >= 0x80;
        let before = |back: usize| self.at.checked_sub(back).and_then(|at| bytes.get(at));
        before(1).is_some_and(|last| is_word(last) && is(last)) && (is(&b' ') || !before(2).is_some_and(is_word))
    }

    /// Past a string or a quoted name; a doubled quote is one of its characters.
    fn quoted(&mut self, quote: u8, escapes: bool) -> Result<()> {
        let start = self.at;
        self.at += 1;
        while let Some(byte) = self.peek() {
            self.at += 1;
            if byte == b'\\' && escapes {
                self.at += 1;
            } else if byte == quote {
                if self.peek() != Some(quote) {
                    return Ok(());
                }
                self.at += 1;
            }
        }
        Err(self.error(start, "is a quote without an end"))
    }

    /// Past a comment; they nest.
    fn comment(&mut self) -> Result<()> {
        let start = self.at;
        let mut depth = 0_u32;
        while self.peek().is_some() {
            if self.follows("/*") {
                depth = depth.saturating_add(1);
                self.at += 2;
            } else if self.follows("*/") {
                depth = depth.saturating_sub(1);
                self.at += 2;
                if depth == 0 {
                    return Ok(());
                }
            } else {
                self.at += 1;
            }
        }
        Err(self.error(start, "is a comment without an end"))
    }

    /// Past `$tag$ ... $tag$`, or past a `$` that begins none.
    fn dollar(&mut self) -> Result<()> {
        let start = self.at;
        let inside = self.rest().get(1..).unwrap_or_default();
        let tag = inside.split('$').next().unwrap_or_default();
        let is_tag = inside.len() > tag.len()
            && !tag.starts_with(|c: char| c.is_ascii_digit())
            && tag.chars().all(|c| c.is_alphanumeric() || c == '_');
        if !is_tag {
            self.at += 1;
            return Ok(());
        }
        let quote = format!("${tag}$");
        self.at += quote.len();
        match self.find(&quote) {
            Some(end) => {
                self.at = end + quote.len();
                Ok(())
            }
            None => Err(self.error(start, "is a quote without an end")),
        }
    }

    fn line_of(&self, at: usize) -> usize {
        self.text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count() + 1
    }

    fn error(&self, at: usize, why: &str) -> Error {
        let text = self.text.get(at..).unwrap_or_default().lines().next().unwrap_or_default();
        bad(&Statement { text, line: self.line_of(at) }, why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str) -> Vec<&str> {
        split(text).unwrap().into_iter().map(|statement| statement.text).collect()
    }

    #[test]
    fn statements_end_where_they_end_and_nowhere_else() {
        assert_eq!(texts("a; b\n;;\n c"), ["a", "b", "c"]);
        assert_eq!(texts("-- a; b\nselect 1; -- end"), ["select 1"]);
        assert_eq!(texts("/* a; /* b; */ c; */ select 1"), ["select 1"]);
        assert_eq!(texts("select 'a;''b;'; select \"x;\"\"y\""), ["select 'a;''b;'", "select \"x;\"\"y\""]);
        // A backslash is a character, but in the strings that say otherwise.
        assert_eq!(texts(r"select 'a\'; select 2"), [r"select 'a\'", "select 2"]);
        assert_eq!(texts(r"select e'a\';'; select 2"), [r"select e'a\';'", "select 2"]);
        assert_eq!(texts(r"select note'a\'; select 2"), [r"select note'a\'", "select 2"]);
        assert_eq!(texts("do $$ begin; end $$; b"), ["do $$ begin; end $$", "b"]);
        assert_eq!(texts("do $x$ $$; $y$; $x$; b"), ["do $x$ $$; $y$; $x$", "b"]);
        assert_eq!(texts("select a$b$; c$b$"), ["select a$b$", "c$b$"]);
        assert_eq!(texts("select $1; b"), ["select $1", "b"]);
        assert_eq!(texts("select 'zwölf;'; drei"), ["select 'zwölf;'", "drei"]);
        assert_eq!(texts(" \n -- nothing"), Vec::<&str>::new());
    }

    #[test]
    fn a_statement_knows_its_line() {
        let found = split("BEGIN;\n-- mail\nUPDATE a\n   SET b = 1;\n\nUPDATE c;\nCOMMIT;").unwrap();
        assert_eq!(found.iter().map(|statement| statement.line).collect::<Vec<_>>(), [3, 6]);
        assert_eq!(found[0].beginning(), "UPDATE a SET b = 1");
        let long = Statement { text: &"ä".repeat(500), line: 1 };
        assert_eq!(long.beginning().chars().count(), SHOWN + 1);
    }

    #[test]
    fn the_transaction_around_them_stays() {
        assert_eq!(texts("begin transaction; a; end; start transaction; b; commit work"), ["a", "b"]);
        assert_eq!(texts("savepoint s; rollback to s"), ["savepoint s", "rollback to s"]);
        for text in ["rollback", "a; ABORT", "commit and chain", "prepare transaction 'x'", "begin isolation level serializable"] {
            let error = split(text).unwrap_err();
            assert_eq!((error.kind(), error.code()), (ErrorKind::Usage, "neutralise.statements"), "{text}");
        }
    }

    #[test]
    fn what_has_no_end_is_refused_with_its_line() {
        for text in ["a;\nselect 'b", "a;\n/* b", "a;\n$x$ b $y$", "a;\n\"b", "a;\n\\connect b"] {
            let error = split(text).unwrap_err();
            assert!(error.to_string().starts_with("line 2 of"), "{text}: {error}");
        }
    }

    /// Whatever bytes somebody takes for statements, they are taken apart or refused.
    #[test]
    fn no_text_panics() {
        let pieces = ["'", "\"", "$", "$a$", "/*", "*/", "--", "\n", ";", "e'", "\\", "ö", " ", "x", "1"];
        for seed in 0..20_000_u64 {
            let text: String = (0..8)
                .map(|n| pieces[usize::try_from(crate::seed::scatter(seed * 8 + n) % pieces.len() as u64).unwrap()])
                .collect();
            if let Ok(found) = split(&text) {
                assert!(found.iter().all(|statement| text.contains(statement.text) && !statement.text.is_empty()), "{text}");
            }
        }
    }
}
