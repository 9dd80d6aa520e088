//! The run itself: phases, events, and the comparison of what was acknowledged with what the vault gives back.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use pgvault_verify::process::{Install, Mode, Outcome, Server};
use rustix::process::{Pid, Signal, kill_process};

use crate::events::{Deck, Event};
use crate::ledger::{Ledger, Rows};
use crate::pair::Pair;
use crate::place::{FLUSH_INTERVAL, Place, RECEIVE_TIMEOUT, Settings, quiet};
use crate::random::Random;
use crate::report::Report;
use crate::stream::{Sampler, Stream};
use crate::writers::Writers;

const WRITERS: usize = 8;

/// What a PUT and a busy machine may take, beside the flush interval.
const PUT: Duration = Duration::from_secs(2);

/// How long the stream may take to catch up after what disturbed it.
const CATCH_UP: Duration = Duration::from_secs(180);

/// How long a fast stop may take: R1.
const STOP: Duration = Duration::from_secs(15);

/// Everything of a run. What depends on what is dropped in this order.
pub(crate) struct Soak {
    writers: Option<Writers>,
    stream: Option<Stream>,
    pair: Pair,
    sampler: Sampler,
    install: Install,
    place: Place,
    ledger: Arc<Ledger>,
    random: Random,
    report: Report,
    interrupted: Arc<AtomicBool>,
    settings: Settings,
    /// Since when the vault may lack more than the flush interval explains.
    disturbed: Option<Instant>,
    restores: u32,
}

impl Soak {
    pub(crate) fn new(install: Install, place: Place, random: Random, interrupted: Arc<AtomicBool>) -> Result<Self> {
        let report = Report::new();
        report.say(format_args!("making two servers of PostgreSQL {}", install.version()));
        let settings = Settings { synchronous: false, spool: false };
        place.configure(settings)?;
        let pair = Pair::new(&place, &install)?;
        let soak = Self {
            writers: None,
            stream: None,
            pair,
            sampler: Sampler::start(),
            install,
            place,
            ledger: Ledger::new(WRITERS),
            random,
            report,
            interrupted,
            settings,
            disturbed: None,
            restores: 0,
        };
        let _ = soak.place.run(&["init"])?;
        Ok(soak)
    }

    /// The whole run; true when everything held.
    pub(crate) fn run(mut self, length: Duration) -> Result<bool> {
        let ran = self.phases(length);
        if let Err(error) = ran {
            if self.interrupted.load(Ordering::SeqCst) {
                return Err(error);
            }
            self.report.violation(&format!("the run could not go on: {error:#}"));
            Report::detail("the stream's log", &self.stream.as_ref().map_or_else(String::new, Stream::log_tail));
            let log = self.pair.primary().log_tail();
            Report::detail("the primary's log", &log);
        }
        self.report.finish(&self.ledger, &self.sampler.samples());
        Ok(self.report.held())
    }

    fn phases(&mut self, length: Duration) -> Result<()> {
        let how = self.pair.rebuild(&self.place, &self.install, false)?;
        self.report.say(format_args!("the standby follows ({how})"));
        let psql = self.install.client("psql")?;
        self.stream = Some(Stream::start(&self.place, &self.sampler)?);
        self.writers = Some(Writers::start(WRITERS, &self.ledger, &psql, &self.place.address()));
        let _ = self.healed()?;
        let _ = self.place.run(&["backup", "--source", "remote"])?;
        let mut deck = Deck::new(self.place.has_disk());
        let end = Instant::now() + length;
        let phase = (length / 12).clamp(Duration::from_secs(40), Duration::from_secs(600));
        for number in 0.. {
            if Instant::now() >= end {
                break;
            }
            self.begin_phase(number)?;
            let spare = number % 4 >= 2;
            let until = end.min(Instant::now() + phase);
            while Instant::now() < until {
                let calm = self.random.seconds(0, 3);
                self.sleep(calm)?;
                let event = deck.draw(&mut self.random);
                if spare && event.ends_stream() {
                    deck.later(event, &mut self.random);
                    continue;
                }
                self.event(event)?;
            }
            self.whole(&["check", "--sizes-only"])?;
        }
        self.end()
    }

    /// Another configuration of the stream, and the promise that goes with it.
    fn begin_phase(&mut self, number: u32) -> Result<()> {
        let settings = Settings { synchronous: number % 2 == 1, spool: self.random.one_in(3) };
        self.ledger.set_synchronous(false);
        if !settings.synchronous {
            self.name_synchronous("")?;
        }
        self.disturb();
        if let Some(stream) = self.stream.take() {
            self.ended(stream)?;
        }
        self.place.configure(settings)?;
        self.settings = settings;
        self.stream = Some(Stream::start(&self.place, &self.sampler)?);
        let took = self.healed()?;
        if settings.synchronous {
            self.name_synchronous("pgvault")?;
            self.until("commits wait for the stream", |soak| {
                Ok(soak.pair.sql("select count(*) from pg_stat_replication where sync_state = 'sync'")? == "1")
            })?;
            // Every session has seen it when it begins its next transaction.
            self.sleep(Duration::from_secs(1))?;
            self.ledger.set_synchronous(true);
        }
        let (kind, spool) = (kind(settings), if settings.spool { ", with a spool" } else { "" });
        self.report.say(format_args!("phase {}: {kind}{spool}; caught up after {:.1} s", number + 1, took.as_secs_f64()));
        Ok(())
    }

    fn name_synchronous(&mut self, name: &str) -> Result<()> {
        let _ = self.pair.sql(&format!("alter system set synchronous_standby_names = '{name}'; select pg_reload_conf()"))?;
        Ok(())
    }

    /// Whom commits wait for.
    fn awaited(&self) -> &'static str {
        if self.settings.synchronous { "pgvault" } else { "" }
    }

    /// Does it, waits until the stream has caught up, and says what it was.
    fn event(&mut self, event: Event) -> Result<()> {
        let began = Instant::now();
        self.disturb();
        let what = self.perform(event).with_context(|| format!("{event:?}"))?;
        let acted = began.elapsed();
        let healed = self.healed().with_context(|| format!("after {event:?}"))?;
        if self.pair.sql("show synchronous_standby_names")? != self.awaited() {
            bail!("after {event:?} commits do not wait for whom they should: the soak is wrong");
        }
        let (synchronous, asynchronous) = self.ledger.counts();
        self.report.event(
            event,
            format_args!(
                "{:5} {event:?}{what}: {:.1} s, caught up {:.1} s later; {} commits",
                kind(self.settings),
                acted.as_secs_f64(),
                healed.as_secs_f64(),
                synchronous + asynchronous
            ),
        );
        Ok(())
    }

    fn perform(&mut self, event: Event) -> Result<String> {
        let pause = self.random.seconds(1, 8);
        let mut said = String::new();
        match event {
            Event::StoreReadOnly => {
                self.read_only(true)?;
                self.sleep(pause)?;
                self.read_only(false)?;
            }
            Event::StoreReadOnlyAtStop => {
                self.read_only(true)?;
                self.sleep(pause / 2)?;
                self.stop_fast()?;
                self.read_only(false)?;
                self.pair.primary().start()?;
            }
            Event::StoreFull => {
                let filler = self.place.disk().join("filler");
                let left = self.random.between(0, 256) << 10;
                fill(&filler, left)?;
                self.sleep(pause)?;
                fs::remove_file(&filler)?;
            }
            Event::StoreHangs => {
                let _ = quiet(Command::new("fsfreeze").arg("-f").arg(self.place.disk()))?;
                let slept = self.sleep(pause);
                let _ = quiet(Command::new("fsfreeze").arg("-u").arg(self.place.disk()))?;
                slept?;
            }
            Event::StoreAway => {
                let away = self.place.disk().join("away");
                fs::rename(self.place.vault(), &away)?;
                self.sleep(pause)?;
                if self.place.vault().exists() {
                    bail!("something was made where the vault was not mounted");
                }
                fs::rename(&away, self.place.vault())?;
            }
            Event::NoDescriptors => {
                self.stream()?.limit_descriptors(&self.place, true)?;
                self.sleep(pause)?;
                self.stream()?.limit_descriptors(&self.place, false)?;
            }
            Event::StreamStalls => {
                self.stream()?.signal(Signal::STOP)?;
                self.sleep(pause)?;
                self.stream()?.signal(Signal::CONT)?;
            }
            Event::StreamKilled => {
                self.stream.take().context("there is no stream")?.kill9();
                let pause = self.random.seconds(0, 3);
                self.sleep(pause)?;
                self.stream = Some(Stream::start(&self.place, &self.sampler)?);
            }
            Event::StreamTerminated => {
                let stream = self.stream.take().context("there is no stream")?;
                self.ended(stream)?;
                let pause = self.random.seconds(0, 3);
                self.sleep(pause)?;
                self.stream = Some(Stream::start(&self.place, &self.sampler)?);
            }
            Event::ConnectionCut => {
                for _ in 0..self.random.between(1, 5) {
                    let _ = self
                        .pair
                        .sql("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pgvault'")?;
                    let pause = self.random.between(0, 1500);
                    self.sleep(Duration::from_millis(pause))?;
                }
            }
            Event::ConnectionSilent => {
                let active = "select coalesce(max(active_pid), 0) from pg_replication_slots where slot_name = 'pgvault'";
                let walsender = Pid::from_raw(self.pair.sql(active)?.parse()?).context("no slot is in use")?;
                kill_process(walsender, Signal::STOP)?;
                let slept = self.sleep(Duration::from_secs(RECEIVE_TIMEOUT + 2));
                kill_process(walsender, Signal::CONT)?;
                slept?;
            }
            Event::RestartFast => {
                self.stop_fast()?;
                self.pair.primary().start()?;
            }
            Event::RestartImmediate => self.pair.primary().restart(Mode::Immediate)?,
            Event::ServerKilled => {
                self.pair.primary().kill9()?;
                let pause = self.random.seconds(0, 3);
                self.sleep(pause)?;
                self.pair.primary().start()?;
            }
            Event::SlotDropped => self.change_slot("pg_drop_replication_slot('pgvault')")?,
            Event::SlotEmpty => {
                self.change_slot("pg_drop_replication_slot('pgvault'), pg_create_physical_replication_slot('pgvault', false)")?;
            }
            Event::SlotAdvanced => self.change_slot("pg_replication_slot_advance('pgvault', pg_current_wal_lsn())")?,
            Event::Switchover => {
                self.pair.wait_for_standby()?;
                let timeline = self.timeline()?;
                self.stop_fast()?;
                said = self.take_over(timeline)?;
            }
            Event::Failover => {
                self.pair.wait_for_standby()?;
                let timeline = self.timeline()?;
                self.pair.primary().kill9()?;
                said = self.take_over(timeline)?;
            }
            Event::SwitchStorm => {
                for _ in 0..self.random.between(5, 20) {
                    let _ = self.pair.sql("select pg_logical_emit_message(false, '', ''), pg_switch_wal()")?;
                }
            }
            Event::BigTransactions => {
                for _ in 0..self.random.between(1, 3) {
                    let rows = self.random.between(10_000, 120_000);
                    let insert = format!("insert into bulk select repeat(md5(random()::text), 8) from generate_series(1, {rows});");
                    let _ = self.pair.sql(&(insert + "delete from bulk where random() < 0.1"))?;
                }
                let _ = self.pair.sql("truncate bulk")?;
            }
            Event::Idle => {
                self.writers()?.pause(true);
                self.sleep(pause)?;
                self.writers()?.pause(false);
            }
            Event::Burst => {
                self.writers()?.hurry(true);
                self.sleep(pause)?;
                self.writers()?.hurry(false);
            }
            Event::Backup => {
                let source = if self.random.one_in(2) { "local" } else { "remote" };
                let _ = self.place.run(&["backup", "--source", source])?;
                said = format!(" ({source})");
            }
            Event::BackupKilled => {
                let source = if self.random.one_in(2) { "local" } else { "remote" };
                let mut child = self.place.pgvault(&["backup", "--source", source]).stdout(std::process::Stdio::null()).spawn()?;
                let moment = self.random.between(50, 2500);
                let slept = self.sleep(Duration::from_millis(moment));
                let _ = child.kill();
                let _ = child.wait();
                slept?;
            }
            Event::Restore => {
                // Not disturbed: the stream has caught up.
                self.disturbed = None;
                let at = Instant::now();
                let rows = self.restored(&["--to", "latest"])?;
                said = self.compare("a restore beside the server", &rows, at);
                self.no_gaps()?;
            }
            Event::HostLost => {
                let calm = self.random.seconds(1, 3);
                self.disturbed = None;
                self.sleep(calm)?;
                said = self.lose_host()?;
            }
            Event::HostLostInOutage => {
                if self.random.one_in(2) {
                    self.stream.take().context("there is no stream")?.kill9();
                    said.push_str(" without a stream");
                } else {
                    self.read_only(true)?;
                    said.push_str(" with the store read-only");
                }
                self.sleep(pause)?;
                said += &self.lose_host()?;
            }
        }
        Ok(said)
    }

    /// The primary's host is gone, and the standby's. The vault alone becomes the new primary.
    fn lose_host(&mut self) -> Result<String> {
        let kill_stream = self.stream.is_none() || self.random.one_in(2);
        // From here on nothing more can arrive.
        self.disturb();
        if kill_stream && let Some(stream) = self.stream.take() {
            stream.kill9();
        }
        self.pair.lose()?;
        // What was acknowledged in the last moment is written down by now, and a stream that lives has stored what it got.
        self.sleep(Duration::from_millis(500))?;
        let at = Instant::now();
        self.read_only(false)?;
        if !kill_stream {
            let drained = self.random.seconds(0, 12);
            self.sleep(drained)?;
        }
        let pgdata = self.pair.primary().pgdata().to_path_buf();
        let began = Instant::now();
        self.restore_into(&pgdata, &["--to", "latest"])?;
        // The configuration is that of the backup, which may be of a phase with the other promise. The last line counts.
        let mut auto = fs::OpenOptions::new().append(true).open(pgdata.join("postgresql.auto.conf"))?;
        writeln!(auto, "synchronous_standby_names = '{}'", self.awaited())?;
        self.pair.primary().start()?;
        self.promoted()?;
        let took = began.elapsed();
        let rows = rows(self.pair.primary())?;
        let what = if kill_stream { "the hosts and the stream were lost" } else { "the hosts were lost" };
        let mut said = format!("{}, back after {:.1} s", self.compare(what, &rows, at), took.as_secs_f64());
        let _ = self.ledger.write_off(&rows, at);
        for setting in ["restore_command", "recovery_target_timeline", "recovery_target_action", "recovery_target"] {
            let _ = self.pair.sql(&format!("alter system reset {setting}"))?;
        }
        let _ = self.pair.sql("select pg_reload_conf()")?;
        let _ = self.pair.rebuild(&self.place, &self.install, false)?;
        if kill_stream {
            self.stream = Some(Stream::start(&self.place, &self.sampler)?);
            said += ", stream killed";
        }
        Ok(said)
    }

    /// The standby becomes the primary, and the old one its standby.
    fn take_over(&mut self, left: u32) -> Result<String> {
        self.sleep(Duration::from_millis(300))?;
        let at = Instant::now();
        // Settings do not travel with WAL.
        let names = format!("alter system set synchronous_standby_names = '{}'; select pg_reload_conf()", self.awaited());
        let _ = self.pair.standby().psql(&names)?;
        self.sleep(Duration::from_millis(300))?;
        self.pair.promote(&self.place)?;
        let there = rows(self.pair.primary())?;
        let missing = self.ledger.missing(&there, at, Duration::MAX);
        let lacking = missing.synchronous + missing.allowed;
        let mut said = format!(", {lacking} acknowledged commits had not reached the standby");
        if missing.synchronous > 0 {
            // They waited for the vault, so there they are: on the timeline that was left.
            let old = self.restored(&["--to", "latest", "--timeline", &left.to_string()])?;
            said += &self.compare("the timeline that was left", &old, at);
        }
        let _ = self.ledger.write_off(&there, at);
        let rewind = self.random.one_in(2);
        let how = self.pair.rebuild(&self.place, &self.install, rewind)?;
        Ok(format!("{said}, old primary back by {how}"))
    }

    fn timeline(&self) -> Result<u32> {
        let segment = self.pair.sql("select pg_walfile_name(pg_current_wal_lsn())")?;
        Ok(u32::from_str_radix(segment.get(..8).context("a segment's name begins with its timeline")?, 16)?)
    }

    /// The restored primary reaches the end of what the vault has and opens for writing.
    fn promoted(&mut self) -> Result<()> {
        match self.pair.primary().wait_until_paused_or_promoted(CATCH_UP)? {
            Outcome::Promoted => Ok(()),
            other => bail!("recovery of the restored primary ended {other:?}"),
        }
    }

    fn restore_into(&mut self, pgdata: &Path, target: &[&str]) -> Result<()> {
        let mut arguments = vec!["restore", "--pgdata", pgdata.to_str().context("a path that is not UTF-8")?];
        arguments.extend(target);
        self.place.run(&arguments).map(drop)
    }

    /// Restores elsewhere; gives the rows that are there.
    fn restored(&mut self, target: &[&str]) -> Result<Rows> {
        self.restores += 1;
        let pgdata: PathBuf = self.place.path("restored").join(self.restores.to_string());
        self.restore_into(&pgdata, target)?;
        let mut server = Server::adopt(&self.install, &pgdata)
            .option("fsync", "off")
            .option("shared_buffers", "32MB")
            .timeout(CATCH_UP)
            .launch()?;
        let outcome = server.wait_until_paused_or_promoted(CATCH_UP)?;
        if outcome != Outcome::Promoted {
            bail!("recovery of the restored server ended {outcome:?}");
        }
        let rows = rows(&server)?;
        drop(server);
        fs::remove_dir_all(&pgdata)?;
        Ok(rows)
    }

    /// Judges what a restore gave for what was acknowledged until `at`.
    fn compare(&mut self, what: &str, rows: &Rows, at: Instant) -> String {
        let outage = self.disturbed.map_or(Duration::ZERO, |since| at.saturating_duration_since(since));
        let allowance = Duration::from_secs(FLUSH_INTERVAL) + PUT + outage;
        let missing = self.ledger.missing(rows, at, allowance);
        self.report.compared(&missing, outage);
        if missing.is_loss() {
            let text = format!(
                "{what}: {} commits that had waited for the vault are missing, and {} older than the {:.1} s that are allowed, the oldest by {:.1} s",
                missing.synchronous,
                missing.too_old,
                allowance.as_secs_f64(),
                missing.oldest.as_secs_f64()
            );
            self.report.violation(&text);
        }
        let lost = missing.synchronous + missing.too_old + missing.allowed;
        format!(": {lost} missing, oldest {:.1} of {:.1} s allowed", missing.oldest.as_secs_f64(), allowance.as_secs_f64())
    }

    fn no_gaps(&mut self) -> Result<()> {
        let listed = self.place.run(&["list", "--output", "json"])?;
        let json: serde_json::Value = serde_json::from_str(listed.lines().last().unwrap_or_default())?;
        if json["gaps"].as_array().is_none_or(|gaps| !gaps.is_empty()) {
            self.report.violation(&format!("the vault has gaps: {}", json["gaps"]));
        }
        Ok(())
    }

    /// A check that must find nothing.
    fn whole(&mut self, arguments: &[&str]) -> Result<()> {
        self.interrupted()?;
        let began = Instant::now();
        match self.place.run(arguments) {
            Ok(_) => self.report.say(format_args!("{} found nothing, {:.1} s", arguments.join(" "), began.elapsed().as_secs_f64())),
            Err(error) => self.report.violation(&format!("{error:#}")),
        }
        Ok(())
    }

    /// The last comparison: nothing at all may be missing.
    fn end(&mut self) -> Result<()> {
        self.report.say(format_args!("the end: writers stop, everything acknowledged must be in the vault"));
        self.disturb();
        let _ = self.healed()?;
        self.writers = None;
        self.ledger.set_synchronous(false);
        let _ = self.healed()?;
        let at = Instant::now();
        self.pair.lose()?;
        let stream = self.stream.take().context("there is no stream")?;
        self.ended(stream)?;
        let rows = self.restored(&["--to", "latest"])?;
        let missing = self.ledger.missing(&rows, at, Duration::ZERO);
        let count = rows.iter().map(Vec::len).sum::<usize>();
        if missing.is_loss() {
            self.report.violation(&format!("at the end: {missing:?}"));
        }
        self.report.compared(&missing, Duration::ZERO);
        self.report.say(format_args!(
            "restored {count} rows; of what was acknowledged, {} are missing",
            missing.synchronous + missing.too_old
        ));
        self.no_gaps()?;
        self.whole(&["check"])?;
        if self.place.run(&["wal", "check", "--help"]).is_ok() {
            self.whole(&["wal", "check"])?;
        }
        Ok(())
    }

    fn disturb(&mut self) {
        let _ = self.disturbed.get_or_insert_with(Instant::now);
    }

    /// Waits until what is written is confirmed as fast as it should be again; gives how long that took.
    fn healed(&mut self) -> Result<Duration> {
        let began = Instant::now();
        loop {
            let asked = Instant::now();
            let position = self.pair.sql("select pg_current_wal_lsn()")?;
            let confirmed = format!(
                "select coalesce(max(flush_lsn) >= '{position}', false) from pg_stat_replication where application_name = 'pgvault'"
            );
            while self.pair.sql(&confirmed)? != "t" {
                if began.elapsed() > CATCH_UP {
                    return Err(anyhow!("the stream has not caught up with {position} for {CATCH_UP:?}"));
                }
                self.sleep(Duration::from_millis(50))?;
            }
            if asked.elapsed() < Duration::from_secs(FLUSH_INTERVAL) + PUT {
                self.disturbed = None;
                return Ok(began.elapsed());
            }
        }
    }

    fn until(&mut self, what: &str, condition: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let began = Instant::now();
        while !condition(self)? {
            if began.elapsed() > CATCH_UP {
                bail!("waited {CATCH_UP:?} in vain until {what}");
            }
            self.sleep(Duration::from_millis(100))?;
        }
        Ok(())
    }

    /// A fast stop, which the stream must not hold up.
    fn stop_fast(&mut self) -> Result<()> {
        let began = Instant::now();
        self.pair.primary().stop(Mode::Fast)?;
        if began.elapsed() > STOP {
            self.report.violation(&format!("a fast stop of the server took {:.1} s", began.elapsed().as_secs_f64()));
        }
        Ok(())
    }

    /// Drops or moves the slot, which nobody may use at that moment.
    fn change_slot(&mut self, call: &str) -> Result<()> {
        let cut = "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = 'pgvault' and active";
        let began = Instant::now();
        while let Err(error) = self.pair.sql(&format!("{cut}; select pg_sleep(0.05); select {call}")) {
            if began.elapsed() > Duration::from_secs(30) {
                return Err(error);
            }
            self.interrupted()?;
        }
        Ok(())
    }

    /// Whether the folders of the vault can be written.
    fn read_only(&mut self, on: bool) -> Result<()> {
        fn visit(folder: &Path, mode: u32) -> Result<()> {
            fs::set_permissions(folder, fs::Permissions::from_mode(mode))?;
            for entry in fs::read_dir(folder)?.flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    visit(&entry.path(), mode)?;
                }
            }
            Ok(())
        }
        visit(&self.place.vault(), if on { 0o500 } else { 0o700 })
    }

    fn ended(&mut self, stream: Stream) -> Result<()> {
        let tail = stream.log_tail();
        match stream.terminate(Duration::from_secs(30))? {
            Some(0) => {}
            code => self.report.violation(&format!("`wal stream` ended with {code:?} after SIGTERM; its log ends with\n{tail}")),
        }
        Ok(())
    }

    fn stream(&self) -> Result<&Stream> {
        self.stream.as_ref().context("there is no stream")
    }

    fn writers(&self) -> Result<&Writers> {
        self.writers.as_ref().context("there are no writers")
    }

    fn interrupted(&self) -> Result<()> {
        if self.interrupted.load(Ordering::SeqCst) {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Sleeps, unless interrupted; a stream that ended by itself is noticed and started again.
    fn sleep(&mut self, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        loop {
            self.interrupted()?;
            if let Some(stream) = &mut self.stream
                && let Err(error) = stream.ensure_alive()
            {
                self.report.violation(&format!("{error:#}"));
                self.stream = Some(Stream::start(&self.place, &self.sampler)?);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(100)));
        }
    }
}

fn kind(settings: Settings) -> &'static str {
    if settings.synchronous { "sync" } else { "async" }
}

/// All of a disk but about `left` bytes.
fn fill(filler: &Path, left: u64) -> Result<()> {
    let stat = rustix::fs::statvfs(filler.parent().context("a file has a folder")?)?;
    // Reserved at once as far as that goes without the file's own blocks; the rest is written until no more is taken.
    let bytes = (stat.f_bfree * stat.f_frsize).saturating_sub(32 << 20);
    let _ = quiet(Command::new("fallocate").arg("-l").arg(bytes.to_string()).arg(filler))?;
    let mut file = fs::OpenOptions::new().append(true).open(filler)?;
    while file.write_all(&[1; 4096]).and_then(|()| file.flush()).is_ok() {}
    let size = file.metadata()?.len();
    Ok(file.set_len(size.saturating_sub(left))?)
}

/// What the ledger of a server holds.
fn rows(server: &Server) -> Result<Rows> {
    let text = server.psql("select w, n from ledger")?;
    let mut rows: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
    for line in text.lines() {
        let (writer, number) = line.split_once('|').with_context(|| format!("not a row of the ledger: {line}"))?;
        rows.entry(writer.parse()?).or_default().push(number.parse()?);
    }
    Ok((0..WRITERS).map(|writer| rows.remove(&writer).unwrap_or_default()).collect())
}
