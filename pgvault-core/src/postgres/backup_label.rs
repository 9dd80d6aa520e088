//! `backup_label`: where the recovery of a base backup begins.
//!
//! `pg_backup_stop` returns its text and pgvault restores it byte for byte; it is parsed to check it and to plan with it, never to
//! write it anew. Source: `build_backup_content` in `src/backend/access/transam/xlogbackup.c`.
//!
//! The label that the operator chose stands unescaped in the middle. With a newline in it the file is ambiguous: PostgreSQL's own
//! `read_backup_label` then takes lines of the label for its fields, and the restored cluster may refuse to start (measured on 15:
//! `FATAL: invalid data in file "backup_label"` after a label with a second line `START TIMELINE: 77`). Here the fields are taken
//! from both ends, so that no label can forge them; [`BackupLabel::is_ambiguous`] tells of such a file, and a label that pgvault
//! passes to the server must not contain a line break.

use super::{Lsn, ParseError, SegmentName, TimelineId};

/// The kind of server a backup was taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BackupFrom {
    /// A primary.
    Primary,
    /// A standby: recovery must reach the `min_recovery_point` of the copied `pg_control`.
    Standby,
}

/// The contents of a `backup_label`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    /// Where replay begins: the redo position of the backup's checkpoint.
    pub start_lsn: Lsn,
    /// The segment that holds `start_lsn`.
    pub start_segment: SegmentName,
    /// Where the record of that checkpoint is.
    pub checkpoint_lsn: Lsn,
    /// `streamed` since PostgreSQL 15.
    pub method: String,
    /// Primary or standby.
    pub from: BackupFrom,
    /// When the backup began, in the server's `log_timezone`. Its abbreviation may be ambiguous, so this is for people only.
    pub start_time: String,
    /// What the operator called the backup, as much of it as is UTF-8.
    pub label: String,
    /// The timeline of `start_lsn`.
    pub timeline: TimelineId,
    /// The backup that an incremental one builds on (PostgreSQL 17): its start and its timeline.
    pub incremental_from: Option<(Lsn, TimelineId)>,
}

impl BackupLabel {
    /// Reads a `backup_label`.
    ///
    /// # Errors
    /// When a line is missing, out of order or malformed, or when the timelines of the file contradict each other.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseError> {
        let text = String::from_utf8_lossy(bytes);
        let mut rest: &str = text.strip_suffix('\n').ok_or_else(|| bad("the last line is not terminated"))?;

        let start = first_line(&mut rest, "START WAL LOCATION: ")?;
        let (start_lsn, file) = start
            .strip_suffix(')')
            .and_then(|s| s.split_once(" (file "))
            .ok_or_else(|| bad(format!("`{start}` is not of the form X/Y (file NAME)")))?;
        let checkpoint_lsn = first_line(&mut rest, "CHECKPOINT LOCATION: ")?.parse()?;
        let method = first_line(&mut rest, "BACKUP METHOD: ")?.to_owned();
        let from = match first_line(&mut rest, "BACKUP FROM: ")? {
            "primary" => BackupFrom::Primary,
            "standby" => BackupFrom::Standby,
            other => return Err(bad(format!("`{other}` is neither primary nor standby"))),
        };
        let start_time = first_line(&mut rest, "START TIME: ")?.to_owned();

        let mut incremental_from = None;
        if let Ok(timeline) = last_line(&mut rest, "INCREMENTAL FROM TLI: ") {
            let lsn = last_line(&mut rest, "INCREMENTAL FROM LSN: ")?;
            incremental_from = Some((lsn.parse()?, timeline_of(timeline)?));
        }
        let timeline = timeline_of(last_line(&mut rest, "START TIMELINE: ")?)?;
        let label = rest.strip_prefix("LABEL: ").ok_or_else(|| bad("there is no LABEL line"))?.to_owned();

        let start_segment: SegmentName = file.parse()?;
        if start_segment.timeline != timeline {
            return Err(bad(format!("START TIMELINE {timeline} is not that of {start_segment}")));
        }
        Ok(Self {
            start_lsn: start_lsn.parse()?,
            start_segment,
            checkpoint_lsn,
            method,
            from,
            start_time,
            label,
            timeline,
            incremental_from,
        })
    }

    /// True when PostgreSQL's own reader may misread the file, because the label has line breaks.
    pub fn is_ambiguous(&self) -> bool {
        self.label.contains(['\n', '\r'])
    }
}

fn bad(why: impl Into<String>) -> ParseError {
    ParseError::new("backup_label", why)
}

/// Takes the first line, which must begin with `key`.
fn first_line<'a>(rest: &mut &'a str, key: &str) -> Result<&'a str, ParseError> {
    let (line, after) = rest.split_once('\n').unwrap_or((rest, ""));
    let value = line.strip_prefix(key).ok_or_else(|| bad(format!("`{line}` stands where `{key}` should")))?;
    *rest = after;
    Ok(value)
}

/// Takes the last line, which must begin with `key`.
fn last_line<'a>(rest: &mut &'a str, key: &str) -> Result<&'a str, ParseError> {
    let (before, line) = rest.rsplit_once('\n').unwrap_or(("", rest));
    let value = line.strip_prefix(key).ok_or_else(|| bad(format!("`{line}` stands where `{key}` should")))?;
    *rest = before;
    Ok(value)
}

/// A timeline as the contents of this file have it: in decimal, unlike in file names.
fn timeline_of(text: &str) -> Result<TimelineId, ParseError> {
    match text.parse() {
        Ok(number) if number > 0 && text.bytes().all(|b| b.is_ascii_digit()) => Ok(TimelineId(number)),
        _ => Err(bad(format!("`{text}` is not a timeline"))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REAL: &[u8] = include_bytes!("../../../testdata/postgres/backup_label.15");
    const NEWLINE: &[u8] = include_bytes!("../../../testdata/postgres/backup_label.newline.15");

    #[test]
    fn a_real_label_file_is_read() {
        let label = BackupLabel::parse(REAL).unwrap();
        assert_eq!((label.start_lsn, label.checkpoint_lsn), (Lsn(0xE0_0028), Lsn(0xE0_0060)));
        assert_eq!(label.start_segment.to_string(), "00000001000000000000000E");
        assert_eq!((label.method.as_str(), label.from, label.timeline), ("streamed", BackupFrom::Primary, TimelineId(1)));
        assert_eq!((label.label.as_str(), label.is_ambiguous()), ("nightly of main", false));
        assert_eq!(label.start_time, "2026-11-21 09:29:11 UTC");
        assert_eq!(label.incremental_from, None);
    }

    /// The real text of a label made to look like the file's own fields.
    #[test]
    fn a_label_cannot_forge_fields() {
        let label = BackupLabel::parse(NEWLINE).unwrap();
        assert_eq!((label.label.as_str(), label.timeline), ("line one\nSTART TIMELINE: 77", TimelineId(1)));
        assert!(label.is_ambiguous());
    }

    #[test]
    fn an_incremental_label_names_its_base() {
        let text = String::from_utf8(REAL.to_vec()).unwrap() + "INCREMENTAL FROM LSN: 0/0A000028\nINCREMENTAL FROM TLI: 1\n";
        let label = BackupLabel::parse(text.as_bytes()).unwrap();
        assert_eq!(label.incremental_from, Some((Lsn(0x0A00_0028), TimelineId(1))));
        assert_eq!(label.label, "nightly of main");
    }

    /// T15: decimal in this file's contents, hexadecimal in the file name beside it.
    #[test]
    fn t15_the_timeline_is_decimal_here() {
        let text = String::from_utf8(REAL.to_vec()).unwrap().replace("file 00000001", "file 0000000A");
        assert!(BackupLabel::parse(text.as_bytes()).is_err(), "contradicting timelines");
        let text = text.replace("START TIMELINE: 1", "START TIMELINE: 10");
        assert_eq!(BackupLabel::parse(text.as_bytes()).unwrap().timeline, TimelineId(10));
    }

    #[test]
    fn a_damaged_label_file_is_refused() {
        let text = std::str::from_utf8(REAL).unwrap();
        for length in 0..text.len() {
            assert!(BackupLabel::parse(&REAL[..length]).is_err(), "{length}");
        }
        let lines: Vec<_> = text.lines().collect();
        for skipped in 0..lines.len() {
            let kept: Vec<_> = lines.iter().enumerate().filter(|(i, _)| *i != skipped).map(|(_, line)| *line).collect();
            let without = kept.join(
                "
",
            ) + "
";
            assert!(BackupLabel::parse(without.as_bytes()).is_err(), "without {}", lines[skipped]);
        }
    }

    proptest! {
        #[test]
        fn any_label_leaves_the_fields_alone(label in "(START|INCREMENTAL|TIMELINE|FROM|TLI|LSN|: |[0-9/]|\n|LABEL|[a-zä]){0,40}") {
            let text = String::from_utf8(REAL.to_vec()).unwrap().replace("nightly of main", &label);
            let parsed = BackupLabel::parse(text.as_bytes()).unwrap();
            prop_assert_eq!(parsed, BackupLabel { label, ..BackupLabel::parse(REAL).unwrap() });
        }

        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = BackupLabel::parse(&bytes);
        }
    }
}
