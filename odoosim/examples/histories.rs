//! How many histories there are in a second, and what is in them: `cargo run --example histories -- 200`.

#![allow(clippy::print_stdout, reason = "its purpose")]

use std::collections::BTreeMap;
use std::time::Instant;

use odoosim::{History, Options, Rules, Series, Site};
use pgvault_core::Result;

fn main() -> Result<()> {
    let number = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(100);
    let site = Site::start()?;
    let runtime =
        tokio::runtime::Runtime::new().map_err(|error| pgvault_core::Error::io("start", "the runtime".as_ref(), error))?;
    for series in Series::ALL {
        runtime.block_on(Box::pin(several(&site, series, number)))?;
    }
    Ok(())
}

async fn several(site: &Site, series: Series, number: u64) -> Result<()> {
    let began = Instant::now();
    let mut odoo = site.create(&format!("db{}", series.major()), series, Rules::default()).await?;
    let created = began.elapsed();
    let mut tally: BTreeMap<String, u64> = BTreeMap::new();
    let (mut steps, mut dangling) = (0, 0);
    let began = Instant::now();
    for seed in 0..number {
        odoo = odoo.cleared().await?;
        let outcome = Box::pin(History::new(seed, Options::default()).run(&odoo, Vec::new())).await?;
        steps += outcome.ledger.now();
        dangling += u64::from(!outcome.dangling().is_empty());
        for (what, times) in outcome.tally {
            *tally.entry(what).or_default() += times;
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "printed with one digit")]
    let (per_second, steps) = (number as f64 / seconds, steps as f64 / number as f64);
    println!(
        "{series:?}: {per_second:.1} histories/s of {steps:.0} steps; database {created:?}; {dangling} of {number} with dangling rows in the end"
    );
    println!("  {tally:?}");
    Ok(())
}
