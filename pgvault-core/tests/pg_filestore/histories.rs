//! Random histories of writers, kills and a garbage collector that runs far too often, with capture passes in between and in the middle.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use jiff::SignedDuration;
use odoosim::{History, Odoo, Options, Participant, Participation, Pause, Rules, Series, Site};
use pgvault_core::Result;
use pgvault_core::filestore::capture::{Capture, Depth};
use pgvault_core::filestore::pass;
use pgvault_core::format::file_run::State;
use pgvault_core::postgres::Lsn;
use pgvault_core::vault::Cluster;

use crate::place::{Stops, cluster, runtime};

/// Captures as `filestore sync --watch` does.
struct Watcher {
    odoo: Odoo,
    cluster: Cluster,
    stops: Stops,
    capture: Option<Capture>,
    /// The watermark that each complete pass claimed, and its first and its last step.
    claims: Vec<(Lsn, odoosim::Step, odoosim::Step)>,
}

#[async_trait]
impl Participant for Watcher {
    async fn pass(&mut self, pause: &Pause) -> Result<()> {
        self.stops.at(pause);
        let from = pause.now();
        let capture = match &mut self.capture {
            Some(capture) => capture,
            none => none.insert(Capture::open(&self.cluster, self.stops.options(&self.odoo)).await?),
        };
        match Box::pin(capture.pass(Depth::AsNeeded)).await {
            Ok(_) => {}
            // The writers have not made the directory yet.
            Err(error) if error.code() == "filestore.none" => return Ok(()),
            // All that there was has dangled from the beginning.
            Err(error) if error.code() == "filestore.empty" => return Ok(()),
            Err(error) => return Err(error),
        }
        if let Some((_, mark)) = capture.last().and_then(pgvault_core::filestore::pass::Pass::watermark) {
            self.claims.push((mark.lsn, from, pause.now()));
        }
        Ok(())
    }
}

/// What cannot be had though it should.
#[derive(Debug, Default)]
struct Holes {
    histories: u64,
    references: u64,
    /// A pass that covers a row that refers to it ran from its beginning to its end while the file lay there.
    overlooked: Vec<String>,
    /// It came and went between two passes.
    between: u64,
    /// It was never whole on the disk at all.
    dangling: u64,
}

async fn one(cluster: &Cluster, odoo: &Odoo, seed: u64, options: Options, every: u32, holes: &mut Holes) {
    let mut watcher =
        Watcher { odoo: odoo.clone(), cluster: cluster.clone(), stops: Stops::default(), capture: None, claims: Vec::new() };
    let watching = vec![Participation::new("capture", every, &mut watcher)];
    let outcome = Box::pin(History::new(seed, options).run(odoo, watching)).await.unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
    let Some(watermark) = watcher.claims.iter().map(|(lsn, ..)| *lsn).max() else { return };
    drop(watcher.capture.take());
    holes.histories += 1;
    // Read again, as a restore does.
    let folder = watcher_folder(cluster, odoo).await;
    let mut known = pass::load(cluster, &folder).await.unwrap().unwrap();
    assert_eq!(known.pass.watermark().unwrap().1.lsn, watermark, "seed {seed}");
    let mut at: BTreeMap<String, Lsn> = BTreeMap::new();
    for (lsn, rows) in outcome.truth.states().take_while(|(lsn, _)| *lsn <= watermark) {
        for name in odoosim::truth::local_names(&rows) {
            let _ = at.entry(name).or_insert(lsn);
        }
    }
    for (name, lsn) in at {
        holes.references += 1;
        let path = odoo.series().path_of(&name);
        let entry = known.catalog.entry(&path).await.unwrap();
        if let Some(State::Present(content) | State::Gone(content, _) | State::Lost(content, _)) = entry.map(|entry| entry.state) {
            let mut bytes = Vec::new();
            let len = pgvault_core::filestore::fetch::get(&mut known.catalog, &path, &mut bytes).await.unwrap();
            assert_eq!((len, bytes.len() as u64), (content.size, content.size));
            continue;
        }
        // A pass that began behind its commit, and was there from end to end, must have seen it. Before that it may not even be marked.
        let seen = watcher.claims.iter().any(|(mark, from, to)| lsn <= *mark && outcome.ledger.was_on_disk(&name, *from, *to));
        if seen {
            holes.overlooked.push(format!(
                "seed {seed}: {name} at {lsn}, {:?}, passes {:?}",
                outcome.ledger.intervals(&name),
                outcome.passes
            ));
        } else if outcome.ledger.was_ever_on_disk(&name, 0, u64::MAX) {
            holes.between += 1;
        } else {
            holes.dangling += 1;
        }
    }
}

async fn watcher_folder(cluster: &Cluster, odoo: &Odoo) -> String {
    let found =
        pgvault_core::filestore::database::Odoo::expect(&odoo.conninfo().unwrap(), odoo.name(), cluster.name().system_id).await;
    found.unwrap().database.folder(cluster.keys().digest())
}

/// How many histories of each series: 2,000 in all with `PGVAULT_TEST_HISTORIES=500`.
fn histories() -> u64 {
    std::env::var("PGVAULT_TEST_HISTORIES").ok().and_then(|n| n.parse().ok()).unwrap_or(12)
}

/// Whatever lay on the disk while a pass ran is in the vault, whatever the others did meanwhile; and the watermark is never ahead of that.
#[test]
fn a2_nothing_that_a_pass_could_have_read_is_missing_at_or_below_the_watermark() {
    let mut all = BTreeMap::new();
    let site = Site::start().unwrap();
    for series in Series::ALL {
        let mut holes = Holes::default();
        runtime().block_on(async {
            let mut odoo = site.create(&format!("shop{}", series.major()), series, Rules::default()).await.unwrap();
            // The newest series keeps what is young: passes that come in time miss nothing.
            let step_time = SignedDuration::from_secs(if series == Series::V20 { 12 } else { 60 });
            for seed in 0..histories() {
                odoo = odoo.cleared().await.unwrap();
                let cluster = cluster(&odoo).await;
                one(&cluster, &odoo, seed, Options { step_time, ..Options::default() }, 6, &mut holes).await;
            }
        });
        eprintln!(
            "{series:?}: {} histories, {} references, {} between two passes, {} never on the disk, {} overlooked",
            holes.histories,
            holes.references,
            holes.between,
            holes.dangling,
            holes.overlooked.len()
        );
        assert!(holes.overlooked.is_empty(), "{series:?}: {:#?}", holes.overlooked);
        assert!(holes.references > histories() * 3, "{series:?}: {holes:?}");
        let _ = all.insert(series.major(), holes);
    }
    // The grace of the newest series leaves no hole at all.
    assert_eq!(all.get(&20).map(|holes| holes.between), Some(0));
    let seen: BTreeSet<u32> = all.keys().copied().collect();
    assert_eq!(seen.len(), Series::ALL.len());
}
