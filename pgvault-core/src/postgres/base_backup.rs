//! `BASE_BACKUP`: a base backup over a replication connection, as a stream of events.
//!
//! The grammar and the messages are those of PostgreSQL 15 and later; source: `src/backend/backup/basebackup.c` and
//! `basebackup_copy.c`. No manifest is asked for (pgvault makes its own from what it read), WAL is not included (it is
//! streamed), and the server does not wait for its archiver.
//!
//! The order of archives is the server's: with tablespaces, `base.tar`, which carries `backup_label` and `pg_control`,
//! comes **last** (H15).

use std::time::Duration;

use bytes::Bytes;

use super::connection::{Connection, protocol, quote_replication_literal, unexpected};
use super::message::{Fields, Frame, ServerError, data_row, sqlstate};
use super::tar::{TarDecoder, TarEntry, TarEvent};
use super::{Lsn, ParseError, TimelineId};
use crate::{Error, ErrorKind, Result};

/// The longest label the server accepts (`MAXPGPATH`).
const MAX_LABEL: usize = 1024;
/// Tablespaces of one cluster; each is a directory, so more than this is not a cluster.
const MAX_TABLESPACES: usize = 100_000;

/// What to ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseBackupOptions {
    /// Stands in `backup_label` and in the server's log.
    pub label: String,
    /// Start with an immediate checkpoint; else wait for a spread one, which can take `checkpoint_timeout` (see
    /// [`Connection::set_idle_timeout`]).
    pub fast_checkpoint: bool,
    /// Bound of the transfer in KiB per second, from 32 to 1048576.
    pub max_rate: Option<u32>,
}

/// A tablespace of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerTablespace {
    /// Its OID; `None` for the data directory itself.
    pub oid: Option<u32>,
    /// Its directory; empty for the data directory.
    pub location: String,
    /// The server's estimate in KiB.
    pub size_kb: Option<u64>,
}

/// A step of a base backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupEvent {
    /// The backup began: recovery from it has to start here.
    Start {
        /// The redo position of the checkpoint.
        lsn: Lsn,
        /// The timeline of the server.
        timeline: TimelineId,
    },
    /// What will be sent, in the order of the archives.
    Tablespaces(Vec<ServerTablespace>),
    /// An archive begins.
    ArchiveBegin {
        /// `base.tar`, or the tablespace's OID and `.tar`.
        name: String,
        /// The tablespace's directory; empty for `base.tar`.
        location: String,
    },
    /// A file, directory or symlink begins.
    Entry(TarEntry),
    /// The next bytes of the current file, as they came off the connection.
    Data(Bytes),
    /// The current entry is complete.
    EntryEnd,
    /// Bytes of all archives so far, counted by the server.
    Progress(u64),
    /// The current archive is complete.
    ArchiveEnd,
    /// The backup is complete.
    End {
        /// A recovery has to reach this position before the backup is consistent.
        lsn: Lsn,
        /// The timeline at the end.
        timeline: TimelineId,
        /// The server read pages whose checksum stayed wrong at the second reading. All files were sent nevertheless; the
        /// notices of the connection name file and block ([`Connection::take_notices`], at most five per file).
        checksum_failures: bool,
    },
}

impl Connection {
    /// Starts a base backup. The server verifies page checksums and reads a page again before it reports it, because it
    /// knows which pages are only torn by a concurrent write.
    ///
    /// # Errors
    /// When the label cannot stand in `backup_label`, or the server refuses.
    pub fn base_backup(&mut self, options: &BaseBackupOptions) -> Result<BaseBackup<'_>> {
        // A line break would add lines to backup_label, which decides where recovery starts.
        if options.label.chars().any(char::is_control) || options.label.len() >= MAX_LABEL {
            let message = format!("the label must be shorter than {MAX_LABEL} bytes and without control characters");
            return Err(Error::new(ErrorKind::Usage, "backup.label", message));
        }
        self.begin(&command(options))?;
        Ok(BaseBackup {
            connection: self,
            phase: Phase::Start,
            decoder: None,
            begun: None,
            tablespaces: Vec::new(),
            position: None,
            checksum_failures: false,
        })
    }
}

fn command(options: &BaseBackupOptions) -> String {
    let label = quote_replication_literal(&options.label);
    let checkpoint = if options.fast_checkpoint { "fast" } else { "spread" };
    let rate = options.max_rate.map(|rate| format!(", MAX_RATE {rate}")).unwrap_or_default();
    format!("BASE_BACKUP (LABEL {label}, PROGRESS, CHECKPOINT '{checkpoint}', WAIT false, TABLESPACE_MAP, MANIFEST 'no'{rate})")
}

/// Which part of the answer comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Start,
    Tablespaces,
    CopyBegin,
    Copy,
    End,
    Complete,
    Over,
}

/// A running `BASE_BACKUP`.
///
/// Futures are cancel-safe. Dropping it before [`BackupEvent::End`] leaves the connection busy, and dropping the connection
/// makes the server give the backup up.
#[derive(Debug)]
pub struct BaseBackup<'a> {
    connection: &'a mut Connection,
    phase: Phase,
    decoder: Option<TarDecoder>,
    /// The beginning of an archive that waits until the end of the one before was handed out.
    begun: Option<BackupEvent>,
    tablespaces: Vec<ServerTablespace>,
    position: Option<(Lsn, TimelineId)>,
    checksum_failures: bool,
}

impl BaseBackup<'_> {
    /// Bounds the silence of the server. During the copy it is never silent for long; before it, it waits for a checkpoint.
    pub fn set_idle_timeout(&mut self, limit: Option<Duration>) {
        self.connection.set_idle_timeout(limit);
    }

    /// Takes the warnings so far, for example those about page checksums.
    pub fn take_notices(&mut self) -> Vec<super::Notice> {
        self.connection.take_notices()
    }

    /// The next event; `None` after [`BackupEvent::End`].
    ///
    /// # Errors
    /// When the server reports one (a standby that was promoted meanwhile, a file it cannot read), or what it sends is not
    /// a base backup. Nothing that was received is a backup then.
    pub async fn next(&mut self) -> Result<Option<BackupEvent>> {
        if let Some(begun) = self.begun.take() {
            return Ok(Some(begun));
        }
        loop {
            if let Some(decoder) = &mut self.decoder {
                match decoder.next_event() {
                    Ok(Some(TarEvent::Entry(entry))) => return Ok(Some(BackupEvent::Entry(entry))),
                    Ok(Some(TarEvent::Data(bytes))) => return Ok(Some(BackupEvent::Data(bytes))),
                    Ok(Some(TarEvent::EntryEnd)) => return Ok(Some(BackupEvent::EntryEnd)),
                    Ok(None) => {}
                    Err(why) => return Err(self.connection.broken(why)),
                }
            }
            if self.phase == Phase::Over {
                return Ok(None);
            }
            let frame = self.connection.read().await?;
            if frame.tag == b'E' {
                self.failed(frame).await?;
                continue;
            }
            match self.step(frame) {
                Ok(Some(event)) => return Ok(Some(event)),
                Ok(None) => {}
                Err(why) => return Err(self.connection.broken(why)),
            }
        }
    }

    /// An error response. That about page checksums comes when everything was sent and is not the end of the backup.
    async fn failed(&mut self, frame: Frame) -> Result<()> {
        if self.phase == Phase::Complete {
            let server = ServerError::parse(frame.body.clone()).map_err(protocol)?;
            if server.sqlstate == sqlstate::DATA_CORRUPTED && !server.is_fatal() {
                self.checksum_failures = true;
                return Ok(());
            }
        }
        Err(self.connection.failed(frame).await)
    }

    /// Takes one message into account.
    fn step(&mut self, frame: Frame) -> Result<Option<BackupEvent>, ParseError> {
        match (self.phase, frame.tag) {
            (Phase::Start | Phase::Tablespaces | Phase::End, b'T') | (Phase::Complete, b'C') => {}
            (Phase::Start | Phase::End, b'D') => self.position = Some(position(&data_row(frame.body)?)?),
            (Phase::Start, b'C') => {
                let (lsn, timeline) = self.position.take().ok_or_else(|| bad("the start position is missing"))?;
                self.phase = Phase::Tablespaces;
                return Ok(Some(BackupEvent::Start { lsn, timeline }));
            }
            (Phase::Tablespaces, b'D') if self.tablespaces.len() < MAX_TABLESPACES => {
                self.tablespaces.push(tablespace(&data_row(frame.body)?)?);
            }
            (Phase::Tablespaces, b'C') => {
                self.phase = Phase::CopyBegin;
                return Ok(Some(BackupEvent::Tablespaces(std::mem::take(&mut self.tablespaces))));
            }
            (Phase::CopyBegin, b'H') => self.phase = Phase::Copy,
            (Phase::Copy, b'd') => return self.copy_data(frame.body),
            (Phase::Copy, b'c') => {
                self.phase = Phase::End;
                return self.finish_archive();
            }
            (Phase::End, b'C') => self.phase = Phase::Complete,
            (Phase::Complete, b'Z') => {
                let (lsn, timeline) = self.position.take().ok_or_else(|| bad("the end position is missing"))?;
                self.phase = Phase::Over;
                self.connection.end();
                return Ok(Some(BackupEvent::End { lsn, timeline, checksum_failures: self.checksum_failures }));
            }
            _ => return Err(bad(unexpected(&frame, "BASE_BACKUP").to_string())),
        }
        Ok(None)
    }

    fn copy_data(&mut self, body: Bytes) -> Result<Option<BackupEvent>, ParseError> {
        let mut fields = Fields::new("base backup", body);
        match fields.u8()? {
            b'd' => {
                let decoder = self.decoder.as_mut().ok_or_else(|| bad("there is data before the first archive"))?;
                decoder.push(fields.into_rest());
                Ok(None)
            }
            b'p' => {
                let bytes = fields.i64()?;
                Ok(Some(BackupEvent::Progress(u64::try_from(bytes).unwrap_or_default())))
            }
            b'n' => {
                let begin = BackupEvent::ArchiveBegin { name: fields.text()?, location: fields.text()? };
                // The end of the archive before is known by its successor only.
                let end = self.finish_archive()?;
                self.decoder = Some(TarDecoder::new());
                if end.is_none() {
                    return Ok(Some(begin));
                }
                self.begun = Some(begin);
                Ok(end)
            }
            other => Err(bad(format!("a message of the type '{}', which was not asked for", other.escape_ascii()))),
        }
    }

    fn finish_archive(&mut self) -> Result<Option<BackupEvent>, ParseError> {
        let Some(decoder) = self.decoder.take() else { return Ok(None) };
        decoder.finish()?;
        Ok(Some(BackupEvent::ArchiveEnd))
    }
}

fn bad(why: impl Into<String>) -> ParseError {
    ParseError::new("base backup", why)
}

fn text(value: &Bytes) -> Result<&str, ParseError> {
    std::str::from_utf8(value).map_err(|_| bad(format!("`{}` is not UTF-8", value.escape_ascii())))
}

fn optional(value: Option<&Bytes>) -> Result<Option<&str>, ParseError> {
    value.map(text).transpose()
}

fn position(row: &[Option<Bytes>]) -> Result<(Lsn, TimelineId), ParseError> {
    let [Some(lsn), Some(timeline)] = row else { return Err(bad("a position does not have two values")) };
    let timeline = text(timeline)?;
    let timeline = timeline.parse().map_err(|_| bad(format!("timeline `{timeline}`")))?;
    Ok((text(lsn)?.parse()?, TimelineId(timeline)))
}

fn tablespace(row: &[Option<Bytes>]) -> Result<ServerTablespace, ParseError> {
    let [oid, location, size] = row else { return Err(bad("a tablespace does not have three values")) };
    let number = |value: &str| bad(format!("`{value}` is not a number"));
    Ok(ServerTablespace {
        oid: optional(oid.as_ref())?.map(|oid| oid.parse().map_err(|_| number(oid))).transpose()?,
        location: optional(location.as_ref())?.unwrap_or_default().to_owned(),
        size_kb: optional(size.as_ref())?.map(|size| size.parse().map_err(|_| number(size))).transpose()?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt;

    use super::super::connection::testing::*;
    use super::super::tar::EntryKind;
    use super::super::tar::testing::{file, header};
    use super::*;

    fn options(label: &str) -> BaseBackupOptions {
        BaseBackupOptions { label: label.to_owned(), fast_checkpoint: true, max_rate: None }
    }

    fn copy(kind: u8, body: &[u8]) -> Vec<u8> {
        message(b'd', &[&[kind], body].concat())
    }

    /// An answer as PostgreSQL 15.20 gives it, with a tablespace of a hostile name, cut into chunks of `size`.
    fn answer(size: usize, end: &[u8]) -> Vec<u8> {
        let mut all = row(&["recptr", "tli"], &[Some("0/2000028"), Some("1")]);
        all.extend(complete("SELECT"));
        all.extend(row(&["spcoid", "spclocation", "size"], &[Some("16384"), Some("/srv/a 'b\\"), Some("8")]));
        all.extend(data(&[None, None, Some("22000")]));
        all.extend(complete("SELECT"));
        all.extend(message(b'H', &[0, 0, 0]));
        all.extend(copy(b'n', b"16384.tar\0/srv/a 'b\\\0"));
        for chunk in header("PG_15_202209061", None, true, 0).chunks(size) {
            all.extend(copy(b'd', chunk));
        }
        all.extend(copy(b'p', &512_u64.to_be_bytes()));
        all.extend(copy(b'n', b"base.tar\0\0"));
        for chunk in [file("backup_label", b"START"), file("global/pg_control", &[1; 8192])].concat().chunks(size) {
            all.extend(copy(b'd', chunk));
        }
        all.extend(message(b'c', b""));
        all.extend(row(&["recptr", "tli"], &[Some("0/2000100"), Some("1")]));
        all.extend(complete("SELECT"));
        all.extend_from_slice(end);
        all.extend(ready());
        all
    }

    async fn events(answer: Vec<u8>) -> Result<Vec<BackupEvent>> {
        let (mut connection, mut server) = pair();
        let write = tokio::spawn(async move {
            server.write_all(&answer).await.unwrap();
            server
        });
        let mut backup = connection.base_backup(&options("l")).unwrap();
        let mut events: Vec<BackupEvent> = Vec::new();
        while let Some(event) = backup.next().await? {
            if let (BackupEvent::Data(more), Some(BackupEvent::Data(before))) = (&event, events.last_mut()) {
                *before = [&before[..], &more[..]].concat().into();
            } else {
                events.push(event);
            }
        }
        assert!(connection.is_idle());
        drop(write.await.unwrap());
        Ok(events)
    }

    #[tokio::test]
    async fn h15_a_backup_is_the_same_for_any_chunking() {
        let whole = events(answer(32 << 10, &complete("BASE_BACKUP"))).await.unwrap();
        let entry = |path: &str, kind, size| {
            BackupEvent::Entry(TarEntry { path: path.to_owned(), kind, size, mode: 0o600, mtime: 1_700_000_000 })
        };
        let hostile = "/srv/a 'b\\".to_owned();
        let expected = [
            BackupEvent::Start { lsn: Lsn(0x0200_0028), timeline: TimelineId(1) },
            BackupEvent::Tablespaces(vec![
                ServerTablespace { oid: Some(16384), location: hostile.clone(), size_kb: Some(8) },
                ServerTablespace { oid: None, location: String::new(), size_kb: Some(22000) },
            ]),
            BackupEvent::ArchiveBegin { name: "16384.tar".to_owned(), location: hostile },
            entry("PG_15_202209061", EntryKind::Dir, 0),
            BackupEvent::EntryEnd,
            BackupEvent::Progress(512),
            BackupEvent::ArchiveEnd,
            BackupEvent::ArchiveBegin { name: "base.tar".to_owned(), location: String::new() },
            entry("backup_label", EntryKind::File, 5),
            BackupEvent::Data(Bytes::from_static(b"START")),
            BackupEvent::EntryEnd,
            entry("global/pg_control", EntryKind::File, 8192),
            BackupEvent::Data(Bytes::from(vec![1; 8192])),
            BackupEvent::EntryEnd,
            BackupEvent::ArchiveEnd,
            BackupEvent::End { lsn: Lsn(0x0200_0100), timeline: TimelineId(1), checksum_failures: false },
        ];
        assert_eq!(whole, expected);
        for size in [1, 7, 511, 512, 513, 1024] {
            assert_eq!(events(answer(size, &complete("BASE_BACKUP"))).await.unwrap(), whole, "{size}");
        }
    }

    #[tokio::test]
    async fn bad_page_checksums_are_a_flag_and_other_errors_are_not() {
        let error = |code: &str| message(b'E', format!("SERROR\0VERROR\0C{code}\0Mchecksum verification failure\0\0").as_bytes());
        let events_of = |code: &'static str| events(answer(4096, &error(code)));
        assert!(matches!(events_of("XX001").await.unwrap().last(), Some(BackupEvent::End { checksum_failures: true, .. })));
        assert_eq!(events_of("58030").await.unwrap_err().code(), "source.server");
        // The same code in the middle of the copy: not everything was sent.
        let mut early = row(&["recptr", "tli"], &[Some("0/2000028"), Some("1")]);
        early.extend(complete("SELECT"));
        early.extend(error("XX001"));
        early.extend(ready());
        assert_eq!(events(early).await.unwrap_err().code(), "source.server");
    }

    #[test]
    fn labels_stay_within_their_quotes() {
        let (mut connection, _server) = pair();
        assert_eq!(connection.base_backup(&options("a\nSTART WAL LOCATION: 0/0")).unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(connection.base_backup(&options(&"x".repeat(1024))).unwrap_err().kind(), ErrorKind::Usage);
        assert!(connection.is_idle());
        assert_eq!(
            command(&options("a', WAL) \\")),
            "BASE_BACKUP (LABEL 'a'', WAL) \\', PROGRESS, CHECKPOINT 'fast', WAIT false, TABLESPACE_MAP, MANIFEST 'no')"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_damage_makes_the_stream_panic(at in any::<prop::sample::Index>(), to in any::<u8>()) {
            let mut answer = answer(4096, &complete("BASE_BACKUP"));
            let at = at.index(answer.len());
            answer[at] = to;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(async {
                let (mut connection, mut server) = pair();
                let write = tokio::spawn(async move { server.write_all(&answer).await });
                let mut backup = connection.base_backup(&options("l")).unwrap();
                while let Ok(Some(_)) = backup.next().await {}
                drop(backup);
                drop(connection);
                let _ = write.await;
            });
        }
    }
}
