//! Several sorted sources as one: of each name, what the newest says.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::run::Reading;
use crate::Result;
use crate::format::file_run::{Entry, State};

/// All entries of a catalog, sorted by name, each once.
#[derive(Debug)]
pub struct Merged {
    /// The newest first.
    sources: Vec<Reading>,
    heads: Vec<Option<Entry>>,
    /// The next name of each source, the newest first among equals.
    order: BinaryHeap<Reverse<(String, usize)>>,
    began: bool,
    forgotten: bool,
}

impl Merged {
    pub(super) fn new(sources: Vec<Reading>) -> Self {
        Self { forgotten: false, ..Self::with_forgotten(sources) }
    }

    /// Gives names as well of which nothing is known any more: older runs may still have them.
    pub(super) fn with_forgotten(sources: Vec<Reading>) -> Self {
        Self { heads: sources.iter().map(|_| None).collect(), sources, order: BinaryHeap::new(), began: false, forgotten: true }
    }

    async fn advance(&mut self, source: usize) -> Result<()> {
        let (Some(reading), Some(head)) = (self.sources.get_mut(source), self.heads.get_mut(source)) else { return Ok(()) };
        *head = reading.next().await?;
        if let Some(entry) = head {
            self.order.push(Reverse((entry.name.clone(), source)));
        }
        Ok(())
    }

    /// The next entry.
    ///
    /// # Errors
    /// When the store fails, or a run was changed.
    pub async fn next(&mut self) -> Result<Option<Entry>> {
        if !self.began {
            self.began = true;
            for source in 0..self.sources.len() {
                self.advance(source).await?;
            }
        }
        loop {
            let Some(Reverse((name, source))) = self.order.pop() else { return Ok(None) };
            let entry = self.heads.get_mut(source).and_then(Option::take);
            self.advance(source).await?;
            // What older ones say of it.
            while let Some(Reverse((next, _))) = self.order.peek() {
                if *next != name {
                    break;
                }
                let Some(Reverse((_, older))) = self.order.pop() else { break };
                self.advance(older).await?;
            }
            if let Some(entry) = entry.filter(|entry| self.forgotten || entry.state != State::Forgotten) {
                return Ok(Some(entry));
            }
        }
    }
}
