//! Random histories of the simulator: that they can be had again, that what they record is true, and that they contain what they are for.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test, and its helpers panic like it")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use async_trait::async_trait;
use common::{run, runtime};
use odoosim::truth::{local_names, rows};
use odoosim::{History, Odoo, Options, Outcome, Participant, Participation, Pause, Rules, Series, Site, Step};
use pgvault_core::Result;
use pgvault_core::postgres::{Connection, Lsn};

/// Looks on, at two moments of each pass.
struct Onlooker {
    odoo: Odoo,
    looks: Vec<(Step, Lsn, Vec<String>)>,
}

#[async_trait]
impl Participant for Onlooker {
    async fn pass(&mut self, pause: &Pause) -> Result<()> {
        let mut connection = self.odoo.connect().await?;
        for _ in 0..2 {
            let step = pause.here("look on").await;
            let lsn = connection.query_one("select pg_current_wal_flush_lsn()").await?.required(0)?.parse().unwrap();
            let names = local_names(&rows(&mut connection).await?).into_iter().collect();
            self.looks.push((step, lsn, names));
        }
        Ok(())
    }
}

async fn watched(odoo: &Odoo, seed: u64) -> (Outcome, Vec<(Step, Lsn, Vec<String>)>) {
    let mut onlooker = Onlooker { odoo: odoo.clone(), looks: Vec::new() };
    let watching = vec![Participation::new("onlooker", 6, &mut onlooker)];
    let outcome = Box::pin(History::new(seed, Options::default()).run(odoo, watching)).await.unwrap();
    (outcome, onlooker.looks)
}

/// What somebody reads in the middle of a history is what the record says of that position, and what is recorded of the disk is there.
#[test]
fn what_is_recorded_is_what_was_to_be_seen() {
    run(async |site: &Site, series| {
        for seed in 0..6 {
            let odoo = site.create(&format!("seen{seed}"), series, Rules::default()).await.unwrap();
            let (outcome, looks) = watched(&odoo, seed).await;
            assert!(!looks.is_empty() && !outcome.truth.commits().is_empty(), "{series:?} {seed}");
            for (step, lsn, names) in looks {
                let recorded: Vec<String> = outcome.truth.referenced_at(lsn).into_iter().collect();
                assert_eq!(recorded, names, "{series:?} {seed}: step {step} at {lsn}");
            }
            let direct = rows(&mut odoo.connect().await.unwrap()).await.unwrap();
            let last = outcome.truth.states().last().unwrap().1;
            assert_eq!(last, direct, "{series:?} {seed}");
            for name in local_names(&direct).iter().chain(&outcome.ledger.names()) {
                let content = fs::read(odoo.filestore().path(name)).ok().map(|bytes| odoosim::content::sha1_hex(&bytes));
                let checksum =
                    direct.values().find(|row| row.store_fname.as_ref() == Some(name)).and_then(|row| row.checksum.clone());
                // Of a name that no row has any more, the name says what is right, when it is of the scheme.
                let wanted = checksum.or_else(|| name.rsplit('/').next().map(str::to_owned));
                if !name.starts_with("import/") {
                    assert_eq!(content == wanted, outcome.ledger.is_on_disk(name), "{series:?} {seed}: {name}");
                }
            }
        }
    });
}

/// Passes are in the order of steps, and others go on in the middle of them.
#[test]
fn others_go_on_in_the_middle_of_a_pass() {
    run(async |site: &Site, series| {
        let odoo = site.create("middle", series, Rules::default()).await.unwrap();
        let (outcome, looks) = watched(&odoo, 42).await;
        assert_eq!(outcome.passes.len() * 2, looks.len());
        assert!(outcome.passes.iter().zip(looks.chunks(2)).all(|(pass, looks)| pass.from <= looks[0].0 && looks[1].0 <= pass.to));
        assert!(looks.chunks(2).any(|looks| looks[1].0 > looks[0].0 + 1), "nobody did anything in between");
    });
}

#[test]
fn a_seed_is_the_same_history_again() {
    run(async |site: &Site, series| {
        let mut odoo = site.create("again", series, Rules::default()).await.unwrap();
        for seed in [2, 7, 11] {
            let mut logs = Vec::new();
            for _ in 0..2 {
                odoo = odoo.cleared().await.unwrap();
                let (outcome, _) = watched(&odoo, seed).await;
                let states: Vec<_> = outcome.truth.states().map(|(_, rows)| rows).collect();
                logs.push((outcome.ledger.log(), outcome.tally, states));
            }
            assert!(logs[0] == logs[1], "{series:?} {seed}: {:?} {:?}", logs[0].1, logs[1].1);
        }
    });
}

/// Holds a lock that only the garbage collection minds, and lets go when it waits.
struct Guard {
    connection: Connection,
    armed: bool,
    released: u32,
}

#[async_trait]
impl Participant for Guard {
    async fn pass(&mut self, pause: &Pause) -> Result<()> {
        pause.here("guard").await;
        if !self.armed {
            let _ = self.connection.simple_query("begin; lock table ir_attachment in row exclusive mode").await?;
            self.armed = true;
        }
        let waiter =
            "select count(*) from pg_locks where relation = 'ir_attachment'::regclass and mode = 'ShareLock' and not granted";
        if self.connection.query_one(waiter).await?.required(0)? != "0" {
            let _ = self.connection.simple_query("commit").await?;
            self.armed = false;
            self.released += 1;
        }
        Ok(())
    }
}

/// Everybody gets on although the collection waits for the guard, writers wait for the collection, and the guard waits for it too.
#[test]
fn a_watcher_may_hold_what_others_wait_for() {
    run(async |site: &Site, series| {
        let odoo = site.create("guarded", series, Rules::default()).await.unwrap();
        let connection = odoo.connect().await.unwrap();
        let mut guard = Guard { connection, armed: false, released: 0 };
        let participants = vec![Participation::new("guard", 1, &mut guard)];
        let outcome = Box::pin(History::new(3, Options::default()).run(&odoo, participants)).await.unwrap();
        let runs = outcome.tally.get("gc").copied().unwrap_or_default();
        assert!(runs > 0 && !outcome.tally.contains_key("gc gave up"), "{series:?}: {:?}", outcome.tally);
        assert_eq!(guard.released > 0, series != Series::V20, "{series:?}: {:?}", outcome.tally);
    });
}

/// Counts what it began and what it ended.
#[derive(Default)]
struct Mortal {
    begun: u64,
    done: u64,
    killed: u64,
}

#[async_trait]
impl Participant for Mortal {
    async fn pass(&mut self, pause: &Pause) -> Result<()> {
        self.begun += 1;
        for _ in 0..5 {
            pause.here("live").await;
        }
        self.done += 1;
        Ok(())
    }

    fn killed(&mut self) {
        self.killed += 1;
    }
}

#[test]
fn a_pass_is_killed_in_the_middle_and_begins_again() {
    run(async |site: &Site, series| {
        let odoo = site.create("mortal", series, Rules::default()).await.unwrap();
        let mut mortal = Mortal::default();
        let participants = vec![Participation::new("mortal", 2, &mut mortal).killed_every(8)];
        let outcome = Box::pin(History::new(5, Options::default()).run(&odoo, participants)).await.unwrap();
        assert!(mortal.killed > 0 && mortal.done > 0);
        assert_eq!(mortal.begun, mortal.done + mortal.killed);
        assert_eq!(outcome.tally["pass killed"], mortal.killed);
        assert_eq!(outcome.passes.len() as u64, mortal.done);
    });
}

/// What is asked for as missing is what was referred to and is not had.
#[test]
fn what_nobody_copied_is_missing() {
    run(async |site: &Site, series| {
        let odoo = site.create("missing", series, Rules::default()).await.unwrap();
        let outcome = Box::pin(History::new(8, Options::default()).run(&odoo, Vec::new())).await.unwrap();
        let end = outcome.truth.commits().last().unwrap().lsn;
        let all = outcome.missing(end, |_| false);
        let names: BTreeSet<String> = all.iter().map(|missing| missing.store_fname.clone()).collect();
        assert_eq!(names, outcome.truth.referenced_until(end));
        assert!(all.iter().all(|missing| outcome.truth.referenced_at(missing.at).contains(&missing.store_fname)));
        let first = all[0].store_fname.clone();
        assert!(outcome.missing(end, |name| name != first).iter().all(|missing| missing.store_fname == first));
        let earlier = outcome.truth.commits()[0].lsn;
        assert_eq!(outcome.missing(earlier, |_| false).len(), outcome.truth.referenced_at(earlier).len());
    });
}

/// Histories that never get into the situations they are for would prove nothing.
#[test]
fn histories_contain_what_they_are_for() {
    let site = Site::start().unwrap();
    let mut seen: BTreeMap<(Series, String), u64> = BTreeMap::new();
    for series in Series::ALL {
        runtime().block_on(async {
            let mut odoo = site.create(&format!("all{}", series.major()), series, Rules::default()).await.unwrap();
            for seed in 0..25 {
                odoo = odoo.cleared().await.unwrap();
                let outcome = Box::pin(History::new(seed, Options::default()).run(&odoo, Vec::new())).await.unwrap();
                let removed = outcome.ledger.names().iter().filter(|name| !outcome.ledger.is_on_disk(name)).count();
                let more = [("removed", removed), ("dangling", outcome.dangling().len())];
                for (what, times) in more.into_iter().map(|(what, times)| (what.to_owned(), times as u64)).chain(outcome.tally) {
                    *seen.entry((series, what)).or_default() += times;
                }
            }
        });
    }
    for series in Series::ALL {
        let mut expected = vec!["commit", "rollback", "kill", "gc", "removed", "source.server"];
        match series {
            Series::V14 | Series::V18 => expected.extend(["odoo.collision", "dangling"]),
            Series::V19 => expected.extend(["odoo.collision", "odoo.disk"]),
            // A part is hardly ever to be seen under its name, so nothing collides; who is overtaken fails to rename.
            Series::V20 => expected.extend(["odoo.disk", "io", "gc conflict", "dangling"]),
        }
        for what in expected {
            let times = seen.get(&(series, what.to_owned())).copied().unwrap_or_default();
            assert!(times > 0, "{series:?}: no {what}; {seen:?}");
        }
    }
}
