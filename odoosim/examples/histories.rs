//! How many histories there are in a second, and what is in them: `cargo run --example histories -- 200 2` for
//! 200 of each series, in two threads.

#![allow(clippy::print_stdout, reason = "its purpose")]

use std::collections::BTreeMap;
use std::time::Instant;

use odoosim::{History, Options, Rules, Series, Site};
use pgvault_core::{Error, Result};

fn main() -> Result<()> {
    let argument = |n| std::env::args().nth(n).and_then(|text: String| text.parse::<u64>().ok());
    let (number, lanes) = (argument(1).unwrap_or(100), argument(2).unwrap_or(1).max(1));
    let site = Site::start()?;
    for series in Series::ALL {
        let began = Instant::now();
        let results: Vec<Result<Found>> = std::thread::scope(|scope| {
            let lane = |lane| {
                let site = &site;
                scope.spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                    let runtime = runtime.map_err(|error| Error::io("start", "the runtime".as_ref(), error))?;
                    runtime.block_on(Box::pin(several(
                        site,
                        series,
                        lane,
                        (lane..number).step_by(usize::try_from(lanes).unwrap_or(1)),
                    )))
                })
            };
            let threads: Vec<_> = (0..lanes).map(lane).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        let seconds = began.elapsed().as_secs_f64();
        let mut all = Found::default();
        for found in results {
            let found = found?;
            all.steps += found.steps;
            all.dangling += found.dangling;
            for (what, times) in found.tally {
                *all.tally.entry(what).or_default() += times;
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "printed with one digit")]
        let per_second = number as f64 / seconds;
        let (steps, dangling) = (all.steps / number.max(1), all.dangling);
        println!(
            "{series:?}: {per_second:.1} histories/s of {steps} steps; {dangling} of {number} end with a row without its file"
        );
        println!("  {:?}", all.tally);
    }
    Ok(())
}

#[derive(Default)]
struct Found {
    steps: u64,
    dangling: u64,
    tally: BTreeMap<String, u64>,
}

async fn several(site: &Site, series: Series, lane: u64, seeds: impl Iterator<Item = u64>) -> Result<Found> {
    let mut odoo = site.create(&format!("db{}_{lane}", series.major()), series, Rules::default()).await?;
    let mut found = Found::default();
    for seed in seeds {
        odoo = odoo.cleared().await?;
        let outcome = Box::pin(History::new(seed, Options::default()).run(&odoo, Vec::new())).await?;
        found.steps += outcome.ledger.now();
        found.dangling += u64::from(!outcome.dangling().is_empty());
        for (what, times) in outcome.tally {
            *found.tally.entry(what).or_default() += times;
        }
    }
    Ok(found)
}
