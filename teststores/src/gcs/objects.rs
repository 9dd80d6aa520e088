//! Buckets and objects, and the rules about who may replace or delete them.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;

use super::Problem;

/// Until when an object stays, and whether that may be taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Retention {
    /// `Locked` (COMPLIANCE in XML), otherwise `Unlocked` (GOVERNANCE).
    pub(super) locked: bool,
    pub(super) until: Timestamp,
}

#[derive(Debug, Clone)]
pub(super) struct Object {
    pub(super) bytes: Bytes,
    pub(super) generation: u64,
    pub(super) metageneration: u64,
    pub(super) modified: Timestamp,
    /// `x-goog-meta-...` and the content type, as they came.
    pub(super) headers: BTreeMap<String, String>,
    pub(super) retention: Option<Retention>,
    pub(super) temporary_hold: bool,
    pub(super) event_based_hold: bool,
}

impl Object {
    pub(super) fn etag(&self) -> String {
        format!("\"{:x}-{:x}\"", self.generation, self.metageneration)
    }

    /// An object under retention or a hold is neither deleted nor replaced.
    fn ensure_free(&self, now: Timestamp) -> Result<(), Problem> {
        let retained = self.retention.is_some_and(|retention| retention.until > now);
        if retained || self.temporary_hold || self.event_based_hold { Err(Problem::Retained) } else { Ok(()) }
    }

    /// Changes the retention, or removes it; `bypass` says that whoever asks insists.
    pub(super) fn retain(&mut self, wanted: Option<Retention>, bypass: bool, now: Timestamp) -> Result<(), Problem> {
        if wanted.is_some_and(|wanted| wanted.until <= now) {
            return Err(Problem::Malformed);
        }
        if let Some(held) = self.retention {
            let weaker = wanted.is_none_or(|wanted| wanted.until < held.until || (held.locked && !wanted.locked));
            // What is locked stays locked; what is not takes a bypass to become shorter, or to be locked.
            let locks = wanted.is_some_and(|wanted| wanted.locked && !held.locked);
            if (held.locked && weaker) || (!held.locked && (weaker || locks) && !bypass) {
                return Err(Problem::Locked);
            }
        }
        self.retention = wanted;
        self.metageneration += 1;
        Ok(())
    }
}

#[derive(Debug, Default)]
pub(super) struct Bucket {
    /// Whether its objects can have a retention.
    pub(super) retention: bool,
    /// Whether what is replaced or deleted is kept.
    pub(super) versioning: bool,
    pub(super) objects: BTreeMap<String, Object>,
    /// What was replaced or deleted, by name and generation.
    pub(super) noncurrent: BTreeMap<(String, u64), Object>,
}

impl Bucket {
    /// Makes room for another object of this name, or for none. One that is retained can still become noncurrent, but not go.
    fn take_away(&mut self, name: &str, now: Timestamp) -> Result<(), Problem> {
        if let Some(found) = self.objects.get(name) {
            if !self.versioning {
                found.ensure_free(now)?;
            }
            if let Some(found) = self.objects.remove(name).filter(|_| self.versioning) {
                let _ = self.noncurrent.insert((name.to_owned(), found.generation), found);
            }
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
pub(super) struct Buckets {
    buckets: BTreeMap<String, Bucket>,
    generation: u64,
}

/// What a write asks of what is there already.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Conditions {
    /// The generation that must be there; 0 means none.
    pub(super) generation: Option<u64>,
    pub(super) metageneration: Option<u64>,
}

impl Conditions {
    pub(super) fn ensure(self, found: Option<&Object>) -> Result<(), Problem> {
        let generation = self.generation.is_none_or(|wanted| wanted == found.map_or(0, |object| object.generation));
        let metageneration = self.metageneration.is_none_or(|wanted| found.is_some_and(|object| object.metageneration == wanted));
        if generation && metageneration { Ok(()) } else { Err(Problem::Condition) }
    }
}

impl Buckets {
    pub(super) fn create(&mut self, name: &str, retention: bool, versioning: bool) -> Result<(), Problem> {
        if self.buckets.contains_key(name) {
            return Err(Problem::BucketExists);
        }
        let _ = self.buckets.insert(name.to_owned(), Bucket { retention, versioning, ..Bucket::default() });
        Ok(())
    }

    pub(super) fn bucket(&mut self, name: &str) -> Result<&mut Bucket, Problem> {
        self.buckets.get_mut(name).ok_or(Problem::NoBucket)
    }

    pub(super) fn object(&mut self, bucket: &str, name: &str) -> Result<&mut Object, Problem> {
        self.bucket(bucket)?.objects.get_mut(name).ok_or(Problem::NoObject)
    }

    /// An object of one generation, current or not; without one the current object.
    pub(super) fn version(&mut self, bucket: &str, name: &str, generation: Option<u64>) -> Result<&Object, Problem> {
        let bucket = self.bucket(bucket)?;
        let current = bucket.objects.get(name).filter(|object| generation.is_none_or(|wanted| wanted == object.generation));
        let noncurrent = || bucket.noncurrent.get(&(name.to_owned(), generation?));
        current.or_else(noncurrent).ok_or(Problem::NoObject)
    }

    /// Stores an object; gives it back with its generation.
    pub(super) fn put(
        &mut self,
        bucket: &str,
        name: &str,
        bytes: Bytes,
        headers: BTreeMap<String, String>,
        retention: Option<Retention>,
        conditions: Conditions,
    ) -> Result<Object, Problem> {
        let now = Timestamp::now();
        let generation = self.next_generation(now);
        let bucket = self.bucket(bucket)?;
        conditions.ensure(bucket.objects.get(name))?;
        if retention.is_some_and(|retention| !bucket.retention || retention.until <= now) {
            return Err(Problem::Malformed);
        }
        bucket.take_away(name, now)?;
        let object = Object {
            bytes,
            generation,
            metageneration: 1,
            modified: now,
            headers,
            retention,
            temporary_hold: false,
            event_based_hold: false,
        };
        let _ = bucket.objects.insert(name.to_owned(), object.clone());
        Ok(object)
    }

    /// Deletes the current object, or one generation for good.
    pub(super) fn delete(
        &mut self,
        bucket: &str,
        name: &str,
        generation: Option<u64>,
        conditions: Conditions,
    ) -> Result<(), Problem> {
        let now = Timestamp::now();
        let found = self.version(bucket, name, generation)?;
        conditions.ensure(Some(found))?;
        let Some(generation) = generation else { return self.bucket(bucket)?.take_away(name, now) };
        found.ensure_free(now)?;
        let bucket = self.bucket(bucket)?;
        let current = bucket.objects.get(name).is_some_and(|object| object.generation == generation);
        let _ = if current { bucket.objects.remove(name) } else { bucket.noncurrent.remove(&(name.to_owned(), generation)) };
        Ok(())
    }

    /// Google's are microseconds, too. Each is larger than the one before, whatever the clock does.
    fn next_generation(&mut self, now: Timestamp) -> u64 {
        self.generation = (self.generation + 1).max(now.as_microsecond().unsigned_abs());
        self.generation
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::SignedDuration;

    fn object(buckets: &mut Buckets, retention: Option<Retention>) -> Result<Object, Problem> {
        buckets.put("b", "x", Bytes::from_static(b"x"), BTreeMap::new(), retention, Conditions::default())
    }

    #[test]
    fn what_is_retained_or_held_stays_and_a_lock_only_grows() {
        let mut buckets = Buckets::default();
        buckets.create("b", true, false).unwrap();
        let now = Timestamp::now();
        let until = |hours: i64| now + SignedDuration::from_hours(hours);
        for locked in [false, true] {
            let first = Retention { locked, until: until(2) };
            let _ = object(&mut buckets, Some(first)).unwrap();
            assert_eq!(buckets.delete("b", "x", None, Conditions::default()), Err(Problem::Retained));
            assert_eq!(object(&mut buckets, None).unwrap_err(), Problem::Retained);
            let held = buckets.object("b", "x").unwrap();
            let shorter = Some(Retention { until: until(1), ..first });
            assert_eq!(held.retain(shorter, false, now), Err(Problem::Locked));
            assert_eq!(held.retain(None, false, now), Err(Problem::Locked));
            held.retain(Some(Retention { until: until(3), ..first }), false, now).unwrap();
            assert_eq!(held.retain(Some(Retention { until: until(0), ..first }), true, now), Err(Problem::Malformed));
            if locked {
                assert_eq!(held.retain(shorter, true, now), Err(Problem::Locked));
                assert_eq!(held.retain(Some(Retention { locked: false, until: until(4) }), true, now), Err(Problem::Locked));
            } else {
                assert_eq!(held.retain(Some(Retention { locked: true, until: until(4) }), false, now), Err(Problem::Locked));
                held.retain(None, true, now).unwrap();
                held.temporary_hold = true;
                assert_eq!(buckets.delete("b", "x", None, Conditions::default()), Err(Problem::Retained));
                buckets.object("b", "x").unwrap().temporary_hold = false;
                buckets.delete("b", "x", None, Conditions::default()).unwrap();
            }
        }
        buckets.create("plain", false, false).unwrap();
        let retention = Some(Retention { locked: true, until: until(1) });
        let refused = buckets.put("plain", "x", Bytes::new(), BTreeMap::new(), retention, Conditions::default());
        assert_eq!(refused.unwrap_err(), Problem::Malformed);
    }

    #[test]
    fn where_versions_are_kept_what_is_replaced_or_deleted_is_there_by_its_generation() {
        let mut buckets = Buckets::default();
        buckets.create("b", true, true).unwrap();
        let retention = Some(Retention { locked: true, until: Timestamp::now() + SignedDuration::from_hours(1) });
        let first = object(&mut buckets, retention).unwrap().generation;
        let second = object(&mut buckets, None).unwrap().generation;
        buckets.delete("b", "x", None, Conditions::default()).unwrap();
        assert_eq!(buckets.version("b", "x", None).unwrap_err(), Problem::NoObject);
        for generation in [first, second] {
            assert_eq!(buckets.version("b", "x", Some(generation)).unwrap().bytes, "x");
        }
        assert_eq!(buckets.delete("b", "x", Some(first), Conditions::default()), Err(Problem::Retained));
        buckets.delete("b", "x", Some(second), Conditions::default()).unwrap();
        assert_eq!(buckets.delete("b", "x", Some(second), Conditions::default()), Err(Problem::NoObject));
    }
}
