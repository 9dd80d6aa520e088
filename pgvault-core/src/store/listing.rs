//! Listings: all at once, sorted, or page by page for those who cannot hold ten million names.
//!
//! Stores promise no order but clouds', which list by name. So what breaks off is continued there behind the last name that came,
//! and begun anew everywhere else.

use futures::TryStreamExt;
use object_store::path::Path;

use super::failure::Failure;
use super::gate::Verb;
use super::{ObjectInfo, Store, info, path};
use crate::Result;
use std::time::Duration;

/// Objects that a listing hands on at once; as many as a cloud's page has.
const PAGE: usize = 1000;

impl Store {
    /// Every object below a prefix, sorted by name.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        self.list_after(prefix, None).await
    }

    /// Every object below a prefix whose name sorts after `after`, sorted by name.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list_after(&self, prefix: &str, after: Option<&str>) -> Result<Vec<ObjectInfo>> {
        let failed = |e| self.describe(Failure::new(e), "list", prefix);
        let folder = path(prefix).map_err(failed)?;
        let after = after.map(path).transpose().map_err(failed)?;
        let mut metas: Vec<object_store::ObjectMeta> = Vec::new();
        let (mut begin, mut delays) = (after.clone(), self.delays());
        // Each page is a request. All of them together take as long as there are objects, so one that fails is asked for again
        // and not the whole: clouds list by name. Other stores begin anew.
        while let Err(failure) = self.list_into(&folder, begin.as_ref(), &mut metas).await {
            match delays.next() {
                Some(delay) if !failure.is_permanent() => {
                    tracing::warn!(prefix, error = %failure, "a listing broke off, going on");
                    self.back_off(delay).await;
                }
                _ => return Err(self.describe(failure, "list", prefix)),
            }
            let last = metas.iter().map(|meta| &meta.location).max().cloned();
            if !self.is_cloud {
                metas.clear();
            } else if last.is_some() && last != begin {
                (begin, delays) = (last, self.delays());
            }
        }
        let mut found = metas.iter().map(info).collect::<Result<Vec<_>>>()?;
        // Azurite takes `startFrom` and ignores it. Whoever asks must not depend on where a store begins.
        found.retain(|object| after.as_ref().is_none_or(|after| object.name.as_str() > after.as_ref()));
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found.dedup_by(|a, b| a.name == b.name);
        Ok(found)
    }

    /// Adds what is listed, and stops at the first request that fails.
    async fn list_into(
        &self,
        folder: &Path,
        after: Option<&Path>,
        metas: &mut Vec<object_store::ObjectMeta>,
    ) -> Result<(), Failure> {
        self.count(Verb::List);
        let mut listing = match after {
            Some(after) => self.inner.list_with_offset(Some(folder), after),
            None => self.inner.list(Some(folder)),
        };
        while let Some(meta) = self.bounded(Duration::ZERO, listing.try_next()).await? {
            metas.push(meta);
        }
        Ok(())
    }

    /// Hands every object below a prefix to `visit`, a page at a time, and holds no more than that.
    ///
    /// In no order. An object that is there from the first to the last page is visited at least once, and more than once when a
    /// listing broke off; of others nothing is promised. What is visited may be deleted meanwhile.
    ///
    /// # Errors
    /// When the store fails, or `visit` does.
    pub async fn each_page(&self, prefix: &str, mut visit: impl AsyncFnMut(Vec<ObjectInfo>) -> Result<()>) -> Result<()> {
        let folder = path(prefix).map_err(|e| self.describe(Failure::new(e), "list", prefix))?;
        let (mut last, mut delays): (Option<Path>, _) = (None, self.delays());
        'requests: loop {
            self.count(Verb::List);
            // Azurite takes `startFrom` and ignores it.
            let begin = last.clone();
            let mut listing = match &begin {
                Some(after) => self.inner.list_with_offset(Some(&folder), after),
                None => self.inner.list(Some(&folder)),
            };
            let mut page = Vec::new();
            loop {
                let failure = match self.bounded(Duration::ZERO, listing.try_next()).await {
                    Ok(Some(meta)) => {
                        if begin.as_ref().is_none_or(|begin| meta.location > *begin) {
                            page.push(info(&meta)?);
                            if self.is_cloud && last.as_ref().is_none_or(|last| meta.location > *last) {
                                last = Some(meta.location);
                            }
                        }
                        if page.len() >= PAGE {
                            visit(std::mem::take(&mut page)).await?;
                        }
                        continue;
                    }
                    Ok(None) => return if page.is_empty() { Ok(()) } else { visit(page).await },
                    Err(failure) => failure,
                };
                match delays.next() {
                    Some(delay) if !failure.is_permanent() => {
                        tracing::warn!(prefix, error = %failure, "a listing broke off, going on");
                        self.back_off(delay).await;
                    }
                    _ => return Err(self.describe(failure, "list", prefix)),
                }
                if !page.is_empty() {
                    visit(std::mem::take(&mut page)).await?;
                }
                // What came is not asked for again, so the patience is for what follows.
                if last > begin {
                    delays = self.delays();
                }
                continue 'requests;
            }
        }
    }
}
