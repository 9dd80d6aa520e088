//! Whether a store can hold a vault: what `pgvault init` and `pgvault doctor` ask it, in some hundred and fifty small requests: a second or two.
//!
//! Many servers speak S3. Some answer 200 to a PUT that must not overwrite and overwrite; some refuse the second of two such
//! PUTs but not of two at the same moment; some take `Range` for a hint; some show in a listing what was there a while ago.
//! None of this is seen until it costs a backup, so it is asked for before there is one. Names of products and versions say
//! nothing: what counts is what the store at this address does.
//!
//! Each question is a [`Check`] with a name, what was seen, and what to do about it. The store is left as it was, unless the
//! credentials may not delete, as a writer's should not: then six objects of a few bytes stay under `probe/`.
//!
//! The whole of what pgvault relies on is asked by the conformance suite, which begins with these checks
//! (`pgvault_core::testing::conformance`, feature `testing`).

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use serde::Serialize;

use super::{Put, Store};
use crate::env::Env;
use crate::{Error, ErrorKind, Result};

/// Writers that want the same name at the same moment.
const RACERS: usize = 16;

/// How often. The first time connections are still being made, and a server that looks before it writes may pass.
const RACES: usize = 4;

/// More than this between the store's clock and ours, and S3 begins to refuse signatures (at 15 minutes).
const SKEW: Duration = Duration::from_secs(5 * 60);

/// What came out of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The store does what it must.
    Passed,
    /// pgvault works on this store, and something about it should be known.
    Warned,
    /// The store must not be used.
    Failed,
    /// There was nothing to ask, or no way to find out.
    Skipped,
}

/// One question and its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Its stable name, such as `create_only`.
    pub name: &'static str,
    /// What came out.
    pub outcome: Outcome,
    /// What was seen.
    pub evidence: String,
    /// What to do about it; empty where there is nothing to do.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub fix: String,
    /// What [`ProbeReport::ensure`] makes of a failure.
    #[serde(skip)]
    kind: ErrorKind,
    #[serde(skip)]
    code: &'static str,
}

impl Check {
    /// True when it says that two writers of one name destroy each other's work.
    pub(crate) fn is_overwriting(&self) -> bool {
        self.code == OVERWRITES
    }

    /// What another than these questions found out.
    pub(crate) fn new(name: &'static str, outcome: Outcome, evidence: impl Into<String>, fix: &'static str) -> Self {
        Self { name, outcome, evidence: evidence.into(), fix: fix.to_owned(), kind: ErrorKind::Unsupported, code: "store.unfit" }
    }
}

/// What a store was asked and what it did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProbeReport {
    /// The store's address.
    pub location: String,
    /// In the order in which they ran.
    pub checks: Vec<Check>,
    /// True when the credentials may delete; `None` when that was not found out.
    pub may_delete: Option<bool>,
    /// True when the store keeps versions and accepts several of one name at the same moment; the first one counts then.
    pub several_versions: bool,
    /// How long all of it took, in milliseconds.
    pub milliseconds: u64,
}

impl ProbeReport {
    pub(crate) fn new(store: &Store) -> Self {
        Self {
            location: store.location().to_owned(),
            checks: Vec::new(),
            may_delete: None,
            several_versions: false,
            milliseconds: 0,
        }
    }

    /// A check, if it ran.
    pub fn check(&self, name: &str) -> Option<&Check> {
        self.checks.iter().find(|check| check.name == name)
    }

    /// True when nothing failed.
    pub fn is_ok(&self) -> bool {
        self.failures().next().is_none()
    }

    /// What failed.
    pub fn failures(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| check.outcome == Outcome::Failed)
    }

    /// True when writers must look which version of a name was the first.
    pub fn first_version_counts(&self) -> bool {
        self.several_versions
    }

    /// True when two writers of one name would destroy each other's work here.
    pub fn overwrites(&self) -> bool {
        self.failures().any(|check| check.code == OVERWRITES)
    }

    /// Makes the first failure an error.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with the code of what failed (`store.overwrites`, `store.listing`, `store.ranges`, ...); what
    /// the store's own error says where that is why a check failed.
    pub fn ensure(&self) -> Result<()> {
        let Some(check) = self.failures().next() else { return Ok(()) };
        let message = format!("the store at {} cannot hold a vault: {}: {}", self.location, check.name, check.evidence);
        let error = Error::new(check.kind, check.code, message);
        Err(if check.fix.is_empty() { error } else { error.with_hint(check.fix.clone()) })
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.outcome {
            Outcome::Passed => "ok",
            Outcome::Warned => "WARNING",
            Outcome::Failed => "FAILED",
            Outcome::Skipped => "skipped",
        };
        write!(f, "  {:18} {word:8} {}", self.name, self.evidence)?;
        if !self.fix.is_empty() && matches!(self.outcome, Outcome::Warned | Outcome::Failed) {
            write!(f, "\n  {:18} {:8} {}", "", "", self.fix)?;
        }
        Ok(())
    }
}

impl fmt::Display for ProbeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} ({} ms)", self.location, self.milliseconds)?;
        for check in &self.checks {
            writeln!(f, "{check}")?;
        }
        Ok(())
    }
}

/// Why a check did not pass.
#[derive(Debug)]
pub(crate) enum Miss {
    /// The store does something else than it must.
    Wrong(String),
    /// It does what it must, and something should be known.
    Warn(String),
    /// There is nothing to ask here.
    Skip(String),
    /// A request failed.
    Error(Error),
}

impl From<Error> for Miss {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// What a check saw, or why it did not pass.
pub(crate) type Seen = Result<String, Miss>;

/// A check before it ran.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Question {
    pub(crate) name: &'static str,
    pub(crate) code: &'static str,
    pub(crate) fix: &'static str,
}

const OVERWRITES: &str = "store.overwrites";

const MISSING: Question = Question {
    name: "missing",
    code: "store.missing",
    fix: "a missing object must be answered with 404: on S3, grant s3:ListBucket on the bucket, or every missing object is 403",
};
pub(crate) const CREATE_ONLY: Question = Question {
    name: "create_only",
    code: OVERWRITES,
    fix: "use a store that implements conditional PUT (If-None-Match: *), or a newer version of this one; on this one two writers \
          of the same name destroy each other's work",
};
pub(crate) const RACE: Question = Question {
    name: "create_only_race",
    code: OVERWRITES,
    fix: "the store checks and writes in two steps: use one whose conditional PUT is atomic, or make sure that there is only one \
          writer, ever",
};
const VERSIONS_RACE: Question = Question {
    fix: "nothing to do: pgvault looks at the versions after each PUT that others may make too, which is one request more; a bucket \
          without versions does not need it, where the store has no locks to offer anyway",
    ..RACE
};
pub(crate) const RANGES: Question = Question {
    name: "ranges",
    code: "store.ranges",
    fix: "parts of objects are read wrongly: look for a proxy or cache between pgvault and the store that changes `Range` requests",
};
pub(crate) const LISTING: Question = Question {
    name: "listing",
    code: "store.listing",
    fix: "pgvault decides by listings what is not there, so they must show what was just written: switch off caches in front of the \
          store, or use one with consistent listings; on S3, grant s3:ListBucket with the vault's prefix",
};
const CLOCK: Question =
    Question { name: "clock", code: "store.clock", fix: "set this machine's clock, and keep it set (chrony, systemd-timesyncd)" };
pub(crate) const DELETION: Question = Question {
    name: "deletion",
    code: "store.deletion",
    fix: "a deleted object must be gone at once: switch off caches in front of the store",
};

impl Question {
    /// Notes the answer. Trouble that may pass is not an answer.
    ///
    /// # Errors
    /// When a request failed in a way that may pass.
    pub(crate) fn note(self, report: &mut ProbeReport, seen: Seen) -> Result<()> {
        let Self { name, code, fix } = self;
        let check = |outcome, evidence, fix: &str| Check {
            name,
            outcome,
            evidence,
            fix: fix.to_owned(),
            kind: ErrorKind::Unsupported,
            code,
        };
        report.checks.push(match seen {
            Ok(evidence) => check(Outcome::Passed, evidence, ""),
            Err(Miss::Warn(evidence)) => check(Outcome::Warned, evidence, fix),
            Err(Miss::Skip(evidence)) => check(Outcome::Skipped, evidence, ""),
            Err(Miss::Wrong(evidence)) => check(Outcome::Failed, evidence, fix),
            // Of a store that has failed already, nothing else matters.
            Err(Miss::Error(error)) if error.is_transient() && !report.is_ok() => {
                check(Outcome::Skipped, format!("could not be found out: {error}"), "")
            }
            Err(Miss::Error(error)) if error.is_transient() => return Err(error.context(name)),
            Err(Miss::Error(error)) => {
                // Where one right alone may be missing, that is the better advice.
                let own = [MISSING.name, LISTING.name].contains(&name);
                let fix = error.hint().filter(|_| !own).unwrap_or(fix);
                Check { kind: error.kind(), code: error.code(), ..check(Outcome::Failed, error.to_string(), fix) }
            }
        });
        Ok(())
    }
}

/// Asks a store whether it can hold a vault.
///
/// The report says so: [`ProbeReport::ensure`] makes an error of a store that cannot.
///
/// # Errors
/// When the store could not be asked: it cannot be reached, or the credentials may not write.
pub async fn probe(store: &Store, env: &Env) -> Result<ProbeReport> {
    let began = tokio::time::Instant::now();
    let folder = format!("probe/{}", env.new_id()?);
    // One of them a level deeper, for listings by level.
    let [object, listed] = ["object", "listed"].map(|name| format!("{folder}/{name}"));
    let raced: Vec<String> = (1..=RACES).map(|round| format!("{folder}/below/raced-{round}")).collect();
    let mut report = ProbeReport::new(store);
    // Beside them, because they are not always there.
    let again: Vec<String> = (1..=RACES).map(|round| format!("{folder}-again/{round}")).collect();
    let made = Made { folder: &folder, object: &object, listed: &listed, raced: &raced, again: &again };
    let asked = ask(store, env, &mut report, &made).await;
    // Whatever was found out: what the probe made is removed again.
    let (deletion, may_delete) = deletion(store, &made.names()).await;
    asked.map_err(|error| error.context(format_args!("probe the store at {}", store.location())))?;
    report.may_delete = may_delete;
    DELETION.note(&mut report, deletion)?;
    report.milliseconds = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(report)
}

/// The names of what the probe makes.
struct Made<'a> {
    folder: &'a str,
    object: &'a str,
    listed: &'a str,
    raced: &'a [String],
    /// Raced for once more, where the versions have to tell who was first.
    again: &'a [String],
}

impl<'a> Made<'a> {
    fn names(&self) -> Vec<&'a str> {
        self.raced.iter().chain(self.again).map(String::as_str).chain([self.listed, self.object]).collect()
    }
}

async fn ask(store: &Store, env: &Env, report: &mut ProbeReport, made: &Made<'_>) -> Result<()> {
    let object = made.object;
    MISSING.note(report, missing(store, object).await)?;
    let body = pattern(1000);
    match create_only(store, object, &body).await {
        // Nothing can be said about a store that nothing can be written to.
        Err(Miss::Error(error)) => return Err(error),
        seen => CREATE_ONLY.note(report, seen)?,
    }
    // What overwrites has changed the bytes that the next questions are about.
    if report.overwrites() {
        return Ok(());
    }
    let mut seen = race(store, made.raced, RACERS).await;
    let lost = match &seen {
        Err(Miss::Wrong(why)) => Some(why.clone()),
        // That one won this time proves little: a race that nobody wins twice may come up only under load.
        Ok(once) if !store.one_wins_by_contract() => Some(format!("{once}, which proves little on a bucket that keeps versions")),
        _ => None,
    };
    if let Some(why) = lost
        && keeps_versions(store, object).await
    {
        // Nothing is lost there. What is left to find out is whether the versions tell who was first.
        let settled = race(&store.clone().settling_by_versions(), made.again, RACERS).await;
        report.several_versions = settled.is_ok();
        seen = match settled {
            Ok(_) => Err(Miss::Warn(format!("{why}; all versions are kept, and the first one counts"))),
            lost => lost,
        };
    }
    let question = if report.several_versions { VERSIONS_RACE } else { RACE };
    question.note(report, seen)?;
    RANGES.note(report, ranges(store, object, &body).await)?;
    LISTING.note(report, listing(store, made).await)?;
    CLOCK.note(report, clock(store, env, object).await)
}

/// Bytes of which every stretch of a few is unlike every other.
pub(crate) fn pattern(len: usize) -> Bytes {
    (0..len).map(|n| (n.wrapping_mul(167) ^ (n >> 8).wrapping_mul(59) ^ (n >> 16).wrapping_mul(31)).to_le_bytes()[0]).collect()
}

/// What is not there is said not to be there.
pub(crate) async fn missing(store: &Store, name: &str) -> Seen {
    for (doing, error) in [
        ("read", store.get(name).await.err()),
        ("read a part of", store.get_range(name, 0..1).await.err()),
        ("stat", store.head(name).await.err()),
    ] {
        match error {
            Some(error) if error.kind() == ErrorKind::NotFound => {}
            Some(error) => return Err(error.context(format_args!("{doing} an object that does not exist")).into()),
            None => return Err(Miss::Wrong(format!("{doing} {name}: found, although nothing was stored there"))),
        }
    }
    Ok("a missing object is said to be missing".into())
}

/// Why a PUT of a taken name ended with an error.
fn refused(error: Error) -> Miss {
    if error.code() == "store.conflict" {
        return Miss::Wrong("a name is taken for whoever writes it, and missing for whoever reads it".into());
    }
    error.into()
}

/// A name is created once, and read back as it was created.
pub(crate) async fn create_only(store: &Store, name: &str, body: &Bytes) -> Seen {
    let other = Bytes::from_static(b"pgvault probe: a PUT that must be refused");
    let wrong = |what: String| Err(Miss::Wrong(what));
    // The same bytes under a name that nobody else has are this PUT's, repeated by somebody in between.
    if let Put::Different(_) = store.put_new(name, body.clone()).await? {
        return wrong("a new name is said to be taken".into());
    }
    match store.get_if_exists(name).await? {
        Some(found) if found == *body => {}
        Some(found) => return wrong(format!("{} bytes were stored, and {} others are read", body.len(), found.len())),
        None => return wrong("what was just stored is missing".into()),
    }
    match store.put_new(name, other).await {
        Ok(Put::Different(kept)) if kept == *body => {}
        Ok(Put::Different(kept)) => {
            return wrong(format!("the second PUT of a name was refused, and the object holds {} other bytes", kept.len()));
        }
        Ok(_) => return wrong("the second PUT of a name was accepted".into()),
        Err(error) => return Err(refused(error)),
    }
    if let Put::Different(_) = store.put_new(name, body.clone()).await? {
        return wrong("a repeated PUT of the same bytes finds others".into());
    }
    if store.get(name).await? != *body {
        return wrong("the second PUT of a name was refused, and changed the object".into());
    }
    Ok("the second PUT of a name is refused, and the first one's bytes are kept".into())
}

/// Of many writers of one name one wins, and all the others find its bytes; once for each of these names.
pub(crate) async fn race(store: &Store, names: &[String], racers: usize) -> Seen {
    let body = |racer: usize| Bytes::from(format!("pgvault probe: writer {racer} of {racers}"));
    for name in names {
        let puts = join_all((0..racers).map(|racer| store.put_new(name, body(racer)))).await;
        let mut winners = Vec::new();
        let mut found = Vec::new();
        for (racer, put) in puts.into_iter().enumerate() {
            match put.map_err(refused)? {
                Put::Created | Put::Same => winners.push(racer),
                Put::Different(bytes) => found.push(bytes),
            }
        }
        let kept = store.get(name).await?;
        match winners.as_slice() {
            [winner] if kept == body(*winner) && found.iter().all(|bytes| *bytes == kept) => {}
            [_] => {
                return Err(Miss::Wrong(format!(
                    "one of {racers} writers at once was told that it won, and another's bytes are there"
                )));
            }
            many => return Err(Miss::Wrong(format!("of {racers} writers at once {} were told that they won", many.len()))),
        }
    }
    Ok(format!("{} times, of {racers} writers at once one won", names.len()))
}

/// True when the bucket keeps versions; without them an object's only one is called `null`, or there is no list of them.
async fn keeps_versions(store: &Store, name: &str) -> bool {
    store.versions(name).await.is_ok_and(|versions| versions.iter().any(|version| !matches!(version.id.as_str(), "" | "null")))
}

/// Parts of an object are the parts that were asked for.
pub(crate) async fn ranges(store: &Store, name: &str, body: &Bytes) -> Seen {
    let len = body.len() as u64;
    let mut wanted: Vec<Range<u64>> = vec![0..1, len - 1..len, 0..len, len - 16..len, len / 3..len / 3 + 100];
    wanted.retain(|range| range.start < range.end && range.end <= len);
    for range in &wanted {
        let got = match store.get_range(name, range.clone()).await {
            Err(error) if error.kind() == ErrorKind::Corrupt => return Err(Miss::Wrong(error.to_string())),
            got => got?,
        };
        let right = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
        let right = right.and_then(|(start, end)| body.get(start..end)).unwrap_or_default();
        if got != right {
            return Err(Miss::Wrong(format!("bytes {} to {} of {len} are others than were stored", range.start, range.end)));
        }
    }
    Ok(format!("{} parts of an object are right, the first and the last byte among them", wanted.len()))
}

/// What was just written is listed, as a whole, after a name and by level.
async fn listing(store: &Store, made: &Made<'_>) -> Seen {
    // Of the raced ones the first: where many won it, there was no second race.
    let wanted: Vec<&str> = made.raced.first().map(String::as_str).into_iter().chain([made.listed, made.object]).collect();
    let names = |listed: Vec<super::ObjectInfo>| {
        let mut names: Vec<String> = listed.into_iter().map(|object| object.name).collect();
        names.retain(|name| !made.raced.iter().skip(1).any(|raced| raced == name));
        names
    };
    let expect = |what: &str, found: Vec<String>, wanted: &[&str]| {
        if found == wanted {
            return Ok(());
        }
        Err(Miss::Wrong(format!("right after a PUT {what} shows {found:?} instead of {wanted:?}")))
    };
    let prefix = format!("{}/", made.folder);
    // Nothing between this and the next: a cache may need a moment to see what was written.
    store.put_once(made.listed, Bytes::from_static(b"pgvault probe")).await?;
    expect("a listing", names(store.list(&prefix).await?), &wanted)?;
    expect("a listing after a name", names(store.list_after(&prefix, Some(made.listed)).await?), &[made.object])?;
    expect("a listing by level", store.list_directories(&prefix).await?, &["below"])?;
    Ok("listings show what was just written".into())
}

/// Retention goes by the store's clock, and its signatures by ours.
async fn clock(store: &Store, env: &Env, name: &str) -> Seen {
    let theirs = store.head(name).await?.last_modified;
    let behind = env.now().duration_since(theirs);
    if behind.unsigned_abs() > SKEW {
        let direction = if behind.is_negative() { "behind" } else { "ahead of" };
        let seconds = behind.unsigned_abs().as_secs();
        return Err(Miss::Warn(format!("this machine's clock is {seconds} s {direction} the store's")));
    }
    Ok("the store's clock and this machine's agree".into())
}

/// Removes what the probe made, where that is allowed, and sees that it is gone.
pub(crate) async fn deletion(store: &Store, names: &[&str]) -> (Seen, Option<bool>) {
    for name in names {
        match store.delete(name).await {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::Immutable | ErrorKind::Failed) => {
                let evidence = "these credentials may not delete, as a writer's should not; the probe's objects stay".to_owned();
                return (Err(Miss::Skip(evidence)), Some(false));
            }
            Err(error) => return (Err(error.into()), None),
        }
    }
    for name in names {
        match store.head(name).await {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return (Err(error.into()), Some(true)),
            Ok(_) => return (Err(Miss::Wrong(format!("{name} was deleted, and is still there"))), Some(true)),
        }
    }
    (Ok("what is deleted is gone; a writer's credentials should not be able to delete".into()), Some(true))
}
