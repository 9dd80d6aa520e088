//! `dump.sql` on its way to `psql`, which is to take statements from it and no commands of its own.
//!
//! `psql` runs programs and reads files when a script says so (`\!`, `\i`, `\copy`). Since the corrections of August 2025 it has a mode
//! in which it does not: between `\restrict KEY` and `\unrestrict KEY`. `pg_dump` puts both around what it writes, which guards against
//! what lies in a database; an archive of unknown origin can leave them out. So both are put around the whole script, with a key that
//! nobody knows, and `pg_dump`'s own pair is left out, because the mode does not nest.
//!
//! Only that pair: the first among the comments at the beginning, and the second by the key of the first. No row of a dump can be taken for
//! it, because a dump doubles every backslash of a row.

use std::io::{self, Write};

/// The longest line that is looked at among the comments at the beginning.
const LONGEST: usize = 4096;

const BEGIN: &[u8] = b"\\restrict ";

/// Leaves out the pair of the one who wrote the script.
pub(super) struct Script<W> {
    out: W,
    state: State,
    /// The beginning of a line that is not decided about.
    held: Vec<u8>,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// Among the comments at the beginning.
    Comments,
    /// The pair's second line is still to come; whether a line begins here.
    Looking { line: Vec<u8>, at_begin: bool },
    /// All else is passed on as it is.
    Through,
}

impl<W: Write> Script<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, state: State::Comments, held: Vec::new() }
    }

    /// Passes on what was held, at the end of the script, and gives what it went to.
    pub(super) fn finish(mut self) -> io::Result<W> {
        if !self.is_second() {
            self.out.write_all(&self.held)?;
        }
        Ok(self.out)
    }

    fn is_second(&self) -> bool {
        matches!(&self.state, State::Looking { line, .. } if self.held.trim_ascii_end() == line.as_slice())
    }

    /// A line, or the next part of one.
    fn part(&mut self, part: &[u8]) -> io::Result<()> {
        let ends = part.ends_with(b"\n");
        match &mut self.state {
            State::Through => return self.out.write_all(part),
            State::Looking { at_begin: false, .. } if self.held.is_empty() => self.out.write_all(part)?,
            State::Looking { line, .. } => {
                self.held.extend_from_slice(part);
                let common = self.held.len().min(line.len());
                let may_be = self.held.get(..common) == line.get(..common);
                if may_be && !ends && self.held.len() <= line.len() + 1 {
                    return Ok(());
                }
                if !self.is_second() {
                    self.out.write_all(&self.held)?;
                }
                self.held.clear();
            }
            State::Comments => {
                self.held.extend_from_slice(part);
                if !ends && self.held.len() <= LONGEST {
                    return Ok(());
                }
                let held = std::mem::take(&mut self.held);
                let text = held.trim_ascii();
                if let Some(key) = text.strip_prefix(BEGIN) {
                    self.state = State::Looking { line: [b"\\unrestrict ", key].concat(), at_begin: true };
                    return Ok(());
                }
                if !text.is_empty() && !text.starts_with(b"--") {
                    self.state = State::Through;
                }
                self.out.write_all(&held)?;
            }
        }
        if let State::Looking { at_begin, .. } = &mut self.state {
            *at_begin = ends;
        }
        Ok(())
    }
}

impl<W: Write> Write for Script<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.part(part)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Whether a `psql` has the mode, by what `psql --version` says.
pub(super) fn can_be_restricted(version: &str) -> bool {
    let number = version.split("(PostgreSQL)").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap_or_default();
    let mut parts = number.split('.').map(|part| part.parse::<u32>().ok());
    let (major, minor) = (parts.next().flatten(), parts.next().flatten().unwrap_or(0));
    match major {
        Some(13) => minor >= 22,
        Some(14) => minor >= 19,
        Some(15) => minor >= 14,
        Some(16) => minor >= 10,
        Some(17) => minor >= 6,
        Some(major) => major >= 18,
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(script: &str, chunk: usize) -> String {
        let mut out = Script::new(Vec::new());
        for bytes in script.as_bytes().chunks(chunk) {
            out.write_all(bytes).unwrap();
        }
        String::from_utf8(out.finish().unwrap()).unwrap()
    }

    #[test]
    fn only_the_pair_of_the_dump_is_left_out_however_it_is_cut() {
        let script = "--\n-- a dump\n--\n\n\\restrict Key1\n\nCOPY t FROM stdin;\n\\N\n\\restrict Key1\n\\unrestrict Key2\n\\unrest\n\\.\n\n\\unrestrict Key1\n\n-- end";
        let wanted =
            "--\n-- a dump\n--\n\n\nCOPY t FROM stdin;\n\\N\n\\restrict Key1\n\\unrestrict Key2\n\\unrest\n\\.\n\n\n-- end";
        for chunk in 1..=script.len() {
            assert_eq!(passed(script, chunk), wanted, "{chunk}");
        }
        for script in ["select 1;\n\\restrict x\n", "", "-- x", "\\! true\n", "select '\n\\unrestrict x\n'"] {
            for chunk in 1..=script.len().max(1) {
                assert_eq!(passed(script, chunk), script, "{chunk}");
            }
        }
        assert_eq!(passed("\\restrict k\na\n\\unrestrict k", 3), "a\n");
        assert_eq!(passed("\\restrict k\na\\unrestrict k\n\\unrestrict kk\n", 5), "a\\unrestrict k\n\\unrestrict kk\n");
    }

    #[test]
    fn the_mode_is_known_by_the_version() {
        for (version, can) in [
            ("15.18 (Debian)", true),
            ("15.13", false),
            ("17.6", true),
            ("17.5", false),
            ("18.0", true),
            ("19rc1", false),
            ("12.30", false),
        ] {
            assert_eq!(can_be_restricted(&format!("psql (PostgreSQL) {version}")), can, "{version}");
        }
    }
}
