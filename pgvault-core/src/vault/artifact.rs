//! Artifacts: the small files that a restored database is of little use without, such as `odoo.conf` or the manifests of a
//! deployment.
//!
//! Each version is one sealed object, whose first frame is what there is to know of it, and the others its content. Its name in
//! the vault is an id alone: what the file is called is sealed with it, and no index is kept. There are few, so that whoever
//! looks for one reads the first frame of each.
//!
//! A version may go when another had taken its place before the oldest moment that can be restored. The newest never does.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use futures::{StreamExt, stream};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use ulid::Ulid;

use super::{Cluster, audit, layout};
use crate::crypto::sealed::{FrameEncoder, SealedWriter};
use crate::format::MAX_FRAME;
use crate::format::object::Kind;
use crate::store::ObjectInfo;
use crate::{Error, ErrorKind, Result};

/// Bytes that an artifact may have.
pub const MAX_SIZE: usize = 16 << 20;

/// Bytes that its name may have.
pub const MAX_NAME: usize = 200;

/// Artifacts read at once.
const PARALLEL: usize = 8;

/// A version of an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// Its id, also the object's name.
    pub id: Ulid,
    /// What it is called: a relative path.
    pub name: String,
    /// When it was stored, by that program's clock.
    pub at: Timestamp,
    /// Bytes of its content.
    pub size: u64,
    /// The permissions of the file it came from, as in `chmod`.
    pub mode: u32,
    /// SHA-256 of its content, in hexadecimal digits.
    pub sha256: String,
    /// User and host that stored it, as far as the program could tell.
    pub by: String,
    /// Of the program.
    pub version: String,
}

/// A file that is to be stored.
#[derive(Debug, Clone)]
pub struct NewArtifact {
    /// What to call it; see [`ensure_name`].
    pub name: String,
    /// Its permissions.
    pub mode: u32,
    /// Its content, [`MAX_SIZE`] bytes at most.
    pub content: Vec<u8>,
}

/// What became of a file that was to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stored {
    /// It is a new version.
    New(Artifact),
    /// The newest version is the same.
    Unchanged(Artifact),
}

/// The artifacts of a cluster.
#[derive(Debug, Default)]
pub struct Artifacts {
    /// Those that can be read, by name, and the versions of each from the oldest on.
    pub versions: Vec<Artifact>,
    /// The objects of the others, by their full names, and what is wrong.
    pub damaged: Vec<(String, Error)>,
    objects: BTreeMap<Ulid, ObjectInfo>,
}

impl Artifacts {
    /// The newest version of each artifact at a time, or of all times.
    pub fn newest(&self, at: Option<Timestamp>) -> Vec<&Artifact> {
        let mut newest: BTreeMap<&str, &Artifact> = BTreeMap::new();
        for version in self.versions.iter().filter(|version| at.is_none_or(|at| version.at <= at)) {
            let _ = newest.insert(&version.name, version);
        }
        newest.into_values().collect()
    }

    /// The newest version of an artifact at a time, or of all times.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none.
    pub fn find(&self, name: &str, at: Option<Timestamp>) -> Result<&Artifact> {
        let mut versions = self.versions.iter().filter(|version| version.name == name);
        let first = versions.next();
        let newest = first.into_iter().chain(versions).rfind(|version| at.is_none_or(|at| version.at <= at));
        newest.ok_or_else(|| match (first, at) {
            (Some(first), Some(at)) => {
                Error::new(ErrorKind::NotFound, "artifact.too_early", format!("there was no artifact `{name}` at {at}"))
                    .with_hint(format!("its first version is {} of {}", first.id, first.at))
            }
            _ => Error::new(ErrorKind::NotFound, "artifact.unknown", format!("there is no artifact `{name}`"))
                .with_hint("`pgvault artifact list` shows what there is"),
        })
    }

    /// The versions whose successor was there before `horizon`, the oldest moment that can be restored.
    ///
    /// A program's clock may be wrong, and whoever may only write may lie: a successor counts when the store's time says so, too.
    pub(crate) fn superseded(&self, horizon: Timestamp) -> Vec<ObjectInfo> {
        let early = |version: &Artifact| {
            version.at < horizon && self.objects.get(&version.id).is_some_and(|object| object.last_modified < horizon)
        };
        let gone = self.versions.iter().enumerate().filter(|(number, version)| {
            let later = self.versions.iter().skip(number + 1).take_while(|later| later.name == version.name);
            later.into_iter().any(early)
        });
        gone.filter_map(|(_, version)| self.objects.get(&version.id).cloned()).collect()
    }
}

/// Refuses what cannot be a name: 1 to [`MAX_NAME`] bytes, a relative path of parts that are neither empty nor `.` nor `..`,
/// without control characters.
///
/// # Errors
/// [`ErrorKind::Usage`] when it is not.
pub fn ensure_name(name: &str) -> Result<()> {
    let why = if name.is_empty() || name.len() > MAX_NAME {
        format!("it has {} bytes, and 1 to {MAX_NAME} are allowed", name.len())
    } else if name.chars().any(char::is_control) {
        "it holds a control character".to_owned()
    } else if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
        "it is not a plain relative path".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Usage, "artifact.name", format!("{name:?} cannot name an artifact: {why}"))
        .with_hint("use a name such as odoo.conf or deploy/values.yaml"))
}

/// Stores a file, unless the newest version of it in `known` has the same content and permissions. With `force` it is stored in
/// any case.
///
/// # Errors
/// [`ErrorKind::Usage`] for a name that is none, or when it is too large. When the store fails.
pub async fn put(cluster: &Cluster, known: &Artifacts, file: &NewArtifact, force: bool) -> Result<Stored> {
    ensure_name(&file.name)?;
    if file.content.len() > MAX_SIZE {
        return Err(too_large(&file.name));
    }
    let sha256 = hex(&file.content);
    let newest = known.versions.iter().rfind(|version| version.name == file.name);
    if let Some(newest) = newest.filter(|newest| !force && newest.sha256 == sha256 && newest.mode == file.mode) {
        return Ok(Stored::Unchanged(newest.clone()));
    }
    let artifact = Artifact {
        id: cluster.env().new_id()?,
        name: file.name.clone(),
        at: cluster.env().now(),
        size: file.content.len() as u64,
        mode: file.mode,
        sha256,
        by: audit::who(),
        version: env!("CARGO_PKG_VERSION").into(),
    };
    let json = serde_json::to_vec(&artifact).map_err(|e| Error::new(ErrorKind::Failed, "json", e.to_string()))?;
    let (name, capacity) = (layout::artifact(artifact.id), json.len() + file.content.len() + 1024);
    let mut writer = SealedWriter::new(cluster.env(), cluster.keys(), Kind::Artifact, name, capacity)?;
    let mut encoder = FrameEncoder::new(1)?;
    for frame in std::iter::once(json.as_slice()).chain(file.content.chunks(MAX_FRAME)) {
        let _ = writer.push(&mut encoder, frame, cluster.keys().digest().frame(frame))?;
    }
    cluster.put_once(&writer.finish(Vec::new())).await?;
    Ok(Stored::New(artifact))
}

/// Says that a file is larger than [`MAX_SIZE`]: for whoever reads it, before all of it is in memory.
pub fn too_large(name: &str) -> Error {
    let why = format!("`{name}` is larger than {} MiB", MAX_SIZE >> 20);
    Error::new(ErrorKind::Usage, "artifact.too_large", why)
        .with_hint("artifacts are small configuration files; documents of Odoo go with `pgvault filestore sync`")
}

fn hex(content: &[u8]) -> String {
    Sha256::digest(content).iter().fold(String::with_capacity(64), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// What there is to know of every version.
///
/// # Errors
/// When the store fails. A version that cannot be read is no error; it is in the list of those.
pub async fn list(cluster: &Cluster) -> Result<Artifacts> {
    let listed = cluster.store().list(&cluster.path(layout::dir::ARTIFACT)).await?;
    let named = listed.into_iter().filter_map(|object| {
        let id = layout::id_of(&object.name)?;
        (object.name == cluster.path(&layout::artifact(id))).then_some((id, object))
    });
    let mut reading = stream::iter(named.collect::<Vec<_>>())
        .map(|(id, object)| async move {
            let about = about(cluster, id, Some(object.size)).await;
            (object, about)
        })
        .buffered(PARALLEL);
    let mut artifacts = Artifacts::default();
    while let Some((object, about)) = reading.next().await {
        match about {
            Ok(version) => {
                let _ = artifacts.objects.insert(version.id, object);
                artifacts.versions.push(version);
            }
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => {
                artifacts.damaged.push((object.name, error));
            }
            // Deleted since it was listed.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    artifacts.versions.sort_by(|a, b| (&a.name, a.at, a.id).cmp(&(&b.name, b.at, b.id)));
    Ok(artifacts)
}

/// What there is to know of one version.
///
/// # Errors
/// [`ErrorKind::NotFound`] when there is none of that id, [`ErrorKind::Corrupt`] when it was changed. When the store fails.
pub async fn about(cluster: &Cluster, id: Ulid, size: Option<u64>) -> Result<Artifact> {
    let name = layout::artifact(id);
    let path = cluster.path(&name);
    let object = cluster.open(Kind::Artifact, &name, size).await.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::new(ErrorKind::NotFound, "artifact.unknown", format!("there is no artifact of version {id}"))
            .with_hint("`pgvault artifact list` shows what there is")
            .with_source(error),
        _ => error,
    })?;
    let json = object.frame(0).await?;
    let corrupt = |why: String| Error::new(ErrorKind::Corrupt, "artifact.damaged", format!("{path}: {why}"));
    let artifact: Artifact = serde_json::from_slice(&json).map_err(|e| corrupt(e.to_string()))?;
    if artifact.id != id || ensure_name(&artifact.name).is_err() || artifact.size > MAX_SIZE as u64 {
        return Err(corrupt("is not what its name says".into()));
    }
    Ok(artifact)
}

/// The content of a version.
///
/// # Errors
/// [`ErrorKind::Corrupt`] when it was changed; nothing of it is given then. When the store fails.
pub async fn read(cluster: &Cluster, artifact: &Artifact) -> Result<Vec<u8>> {
    let name = layout::artifact(artifact.id);
    let object = cluster.open(Kind::Artifact, &name, None).await?;
    let content = object.frames(1, object.frame_count().saturating_sub(1), MAX_SIZE as u64).await?;
    if content.len() as u64 == artifact.size && hex(&content) == artifact.sha256 {
        return Ok(content);
    }
    let why = format!("{}: its content is not what it says of it", cluster.path(&name));
    Err(Error::new(ErrorKind::Corrupt, "artifact.damaged", why).with_hint("`pgvault artifact list` shows other versions"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere_else() {
        for name in ["odoo.conf", "deploy/values.yaml", "..data", "a b", "ü", &"x".repeat(MAX_NAME)] {
            ensure_name(name).unwrap();
        }
        for name in
            ["", "/etc/odoo.conf", "a//b", "a/", "..", "a/../b", "./a", "a\nb", "a\0", "a\u{1b}b", &"x".repeat(MAX_NAME + 1)]
        {
            let error = ensure_name(name).unwrap_err();
            assert_eq!((error.kind(), error.code()), (ErrorKind::Usage, "artifact.name"), "{name:?}");
        }
    }

    fn version(number: u128, name: &str, at: i64, stored: i64) -> (Artifact, ObjectInfo) {
        let time = |seconds| Timestamp::from_second(seconds).unwrap();
        let artifact = Artifact {
            id: Ulid(number),
            name: name.into(),
            at: time(at),
            size: 0,
            mode: 0o600,
            sha256: hex(b""),
            by: "me@here".into(),
            version: "0".into(),
        };
        (artifact, ObjectInfo { name: number.to_string(), size: 1, last_modified: time(stored) })
    }

    fn gone(versions: &[(Artifact, ObjectInfo)], horizon: i64) -> Vec<String> {
        let objects = versions.iter().map(|(artifact, object)| (artifact.id, object.clone())).collect();
        let versions = versions.iter().map(|(artifact, _)| artifact.clone()).collect();
        let artifacts = Artifacts { versions, damaged: Vec::new(), objects };
        artifacts.superseded(Timestamp::from_second(horizon).unwrap()).into_iter().map(|object| object.name).collect()
    }

    #[test]
    fn a_version_goes_when_another_stood_in_its_place_before_anything_that_can_be_restored() {
        let versions = [
            version(1, "a", 10, 10),
            version(2, "a", 20, 20),
            version(3, "a", 30, 30),
            version(4, "b", 10, 10),
            version(5, "c", 10, 10),
        ];
        assert!(gone(&versions, 20).is_empty());
        assert_eq!(gone(&versions, 21), ["1"]);
        assert_eq!(gone(&versions, 31), ["1", "2"]);
        assert_eq!(gone(&versions, 1000), ["1", "2"], "the newest of each never goes");
        // A successor that claims to be old, and one whose writer's clock was ahead.
        assert!(gone(&[version(1, "a", 10, 10), version(2, "a", 20, 500)], 100).is_empty());
        assert!(gone(&[version(1, "a", 10, 10), version(2, "a", 500, 20)], 100).is_empty());
    }
}
