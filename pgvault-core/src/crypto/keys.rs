//! A cluster's keys in memory, and what is derived from them.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hkdf::Hkdf;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use ulid::Ulid;
use zeroize::Zeroizing;

use super::aead::{Aead, AesGcm, KEY_LEN};
use super::digest::DigestKey;
use super::signature::SigningKey;
use crate::env::Env;
use crate::format::object::{Header, Kind, Suite};
use crate::format::{FormatError, document};
use crate::{Error, ErrorKind, Result};

/// Binds a vault and a cluster into every derivation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The vault.
    pub vault_id: [u8; 16],
    /// The cluster in it.
    pub cluster_id: [u8; 16],
    /// SHA-256 of `vault.json`; sealed into each epoch so that a changed one is noticed.
    pub vault_document: [u8; 32],
}

/// The identity of a cluster inside a vault: a hash of its name and system identifier.
pub fn cluster_id(name: &str, system_id: u64) -> [u8; 16] {
    let mut hash = Sha256::new();
    hash.update(b"pgvault/v1/cluster\0");
    hash.update(system_id.to_le_bytes());
    hash.update(name.as_bytes());
    let mut id = [0; 16];
    id.copy_from_slice(hash.finalize().get(..16).unwrap_or(&[]));
    id
}

fn expand<const N: usize>(ikm: &[u8], salt: &[u8], info: &[&[u8]]) -> Zeroizing<[u8; N]> {
    let mut out = Zeroizing::new([0; N]);
    // HKDF-SHA256 fails only above 8160 bytes of output.
    let _ = Hkdf::<Sha256>::new(Some(salt), ikm).expand_multi_info(info, out.as_mut());
    out
}

/// The secret that everything else of a cluster is derived from or wrapped by.
#[derive(Clone)]
pub struct MasterKey(pub(super) Zeroizing<[u8; KEY_LEN]>);

impl std::fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MasterKey")
    }
}

impl MasterKey {
    /// A new random key.
    ///
    /// # Errors
    /// When there is no randomness.
    pub fn generate(env: &Env) -> Result<Self> {
        Ok(Self(Zeroizing::new(env.random()?)))
    }

    /// True when both are the same key; takes the same time whatever they are.
    pub fn is(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0[..]).into()
    }

    pub(super) fn derive(&self, salt: &[u8], purpose: &str, identity: &Identity) -> Zeroizing<[u8; KEY_LEN]> {
        expand(&self.0[..], salt, &[purpose.as_bytes(), &identity.vault_id, &identity.cluster_id])
    }

    /// Names the key in the clear without giving it away: no other key has the same commitment. Base64.
    pub fn commitment(&self, identity: &Identity) -> String {
        BASE64.encode(&self.derive(&[], "pgvault/v1/master", identity)[..])
    }
}

/// The cluster's document, `cluster.json`: says which master key is the cluster's.
///
/// Its name is fixed and it is created once, so of two that are made at the same moment one is the cluster's, and whatever
/// the other maker wrapped or sealed counts for nothing.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterDocument {
    /// Always `pgvault cluster`.
    pub format: String,
    /// Always 1.
    pub version: u32,
    /// When it was made, by the maker's clock; information only.
    pub created_at: jiff::Timestamp,
    /// [`MasterKey::commitment`].
    pub commitment: String,
}

const CLUSTER_FORMAT: &str = "pgvault cluster";

impl ClusterDocument {
    /// Makes `master` the cluster's key, once it is stored.
    pub fn create(env: &Env, identity: &Identity, master: &MasterKey) -> Self {
        Self { format: CLUSTER_FORMAT.into(), version: 1, created_at: env.now(), commitment: master.commitment(identity) }
    }

    /// Reads a stored document.
    ///
    /// # Errors
    /// When it was changed, or is of a newer version.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let parsed: Self = document::parse("cluster document", bytes)?;
        if parsed.format != CLUSTER_FORMAT || parsed.version != 1 {
            return Err(FormatError::unsupported("cluster document", "is of a newer version"));
        }
        Ok(parsed)
    }
}

/// A wrapped data key, as stored under `epochs/`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EpochDocument {
    /// Always `pgvault epoch`.
    pub format: String,
    /// Always 1.
    pub version: u32,
    /// The epoch's ULID, also its name.
    pub epoch_id: Ulid,
    /// When it was made, by the writer's clock; information only.
    pub created_at: jiff::Timestamp,
    /// Data key and hash of `vault.json`, sealed by the master key, base64.
    pub wrapped: String,
}

const EPOCH_FORMAT: &str = "pgvault epoch";

impl EpochDocument {
    /// Makes a new epoch with a fresh data key.
    ///
    /// # Errors
    /// When there is no randomness.
    pub fn create(env: &Env, identity: &Identity, master: &MasterKey) -> Result<Self> {
        let epoch_id = env.new_id()?;
        let mut sealed = Zeroizing::new(env.random::<KEY_LEN>()?.to_vec());
        sealed.extend_from_slice(&identity.vault_document);
        let id = epoch_id.to_bytes();
        let key = master.derive(&id, "pgvault/v1/epoch", identity);
        // The key is derived for this epoch alone and seals once, so a fixed nonce cannot repeat.
        let tag = AesGcm::new(&key).seal([0; 12], &id, &mut sealed);
        sealed.extend_from_slice(&tag);
        Ok(Self { format: EPOCH_FORMAT.into(), version: 1, epoch_id, created_at: env.now(), wrapped: BASE64.encode(&*sealed) })
    }

    /// The data key; `None` when another master key sealed it, as an `init` that did not become the cluster's leaves it.
    fn unwrap(&self, identity: &Identity, master: &MasterKey) -> Result<Option<Zeroizing<[u8; KEY_LEN]>>, FormatError> {
        let bad = |why: &str| FormatError::new("epoch", format!("{}: {why}", self.epoch_id));
        if self.format != EPOCH_FORMAT || self.version != 1 {
            return Err(FormatError::unsupported("epoch", "is of a newer version"));
        }
        let bytes = Zeroizing::new(BASE64.decode(&self.wrapped).map_err(|_| bad("is not base64"))?);
        let (sealed, tag) = bytes.split_last_chunk::<16>().ok_or_else(|| bad("is too short"))?;
        let mut opened = Zeroizing::new(sealed.to_vec());
        let id = self.epoch_id.to_bytes();
        let key = master.derive(&id, "pgvault/v1/epoch", identity);
        if AesGcm::new(&key).open([0; 12], &id, &mut opened, *tag).is_err() {
            return Ok(None);
        }
        let (data_key, document) = opened.split_first_chunk::<KEY_LEN>().ok_or_else(|| bad("is too short"))?;
        if document != identity.vault_document {
            return Err(bad("was made for another vault.json; that file was changed or replaced"));
        }
        Ok(Some(Zeroizing::new(*data_key)))
    }
}

/// A cluster's opened keys.
#[derive(Clone)]
pub struct ClusterKeys {
    identity: Identity,
    master: MasterKey,
    epochs: BTreeMap<Ulid, Zeroizing<[u8; KEY_LEN]>>,
    digest: DigestKey,
}

impl std::fmt::Debug for ClusterKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterKeys").field("identity", &self.identity).field("epochs", &self.epochs.len()).finish_non_exhaustive()
    }
}

impl ClusterKeys {
    /// Opens every epoch with the master key.
    ///
    /// # Errors
    /// When an epoch is malformed or was made for another `vault.json`, or none opens.
    pub fn open(identity: Identity, master: MasterKey, epochs: &[EpochDocument]) -> Result<Self> {
        let mut opened = BTreeMap::new();
        for epoch in epochs {
            if let Some(data_key) = epoch.unwrap(&identity, &master)? {
                let _ = opened.insert(epoch.epoch_id, data_key);
            }
        }
        if opened.is_empty() {
            return Err(Error::new(ErrorKind::Corrupt, "keys.no_epoch", "the cluster has key slots but no data key epoch")
                .with_hint(
                    "an object under `epochs/` was deleted; restore it from the store's own versions or a copy of the vault",
                ));
        }
        let digest = DigestKey::new(*master.derive(&[], "pgvault/v1/digest", &identity));
        Ok(Self { identity, master, epochs: opened, digest })
    }

    /// Which vault and cluster the keys belong to.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// True when the epoch opened with the master key.
    pub fn has_epoch(&self, epoch: Ulid) -> bool {
        self.epochs.contains_key(&epoch)
    }

    /// The master key, for making new slots and epochs.
    pub fn master(&self) -> &MasterKey {
        &self.master
    }

    /// The key of content digests.
    pub fn digest(&self) -> &DigestKey {
        &self.digest
    }

    /// The key that signs receipts of restore drills.
    ///
    /// # Errors
    /// As [`SigningKey::from_seed`].
    pub fn receipt_key(&self) -> Result<SigningKey> {
        SigningKey::from_seed(&self.master.derive(&[], "pgvault/v1/receipt", &self.identity))
    }

    /// A header and key for a new object called `name`.
    ///
    /// # Errors
    /// When there is no randomness.
    pub fn new_object(&self, env: &Env, kind: Kind, name: &str) -> Result<(Header, ObjectKey)> {
        let Some((epoch, data_key)) = self.epochs.last_key_value() else {
            return Err(Error::new(ErrorKind::Corrupt, "keys.no_epoch", "the cluster has no data key epoch"));
        };
        let mut header = Header {
            kind,
            suite: Suite::Aes256GcmHkdfSha256Blake3,
            vault_id: self.identity.vault_id,
            cluster_id: self.identity.cluster_id,
            epoch_id: epoch.to_bytes(),
            salt: env.random()?,
            commitment: [0; 16],
        };
        let (key, commitment) = derive_object_key(data_key, &header, name);
        header.commitment = commitment;
        Ok((header, key))
    }

    /// The key of a stored object that was found under `name`.
    ///
    /// # Errors
    /// When the object belongs elsewhere, its epoch is missing, or its bytes were written under another name or key.
    pub fn stored_object(&self, header: &Header, name: &str) -> Result<ObjectKey, FormatError> {
        let bad = |why: &str| FormatError::new("object header", why);
        if header.vault_id != self.identity.vault_id || header.cluster_id != self.identity.cluster_id {
            return Err(bad("belongs to another vault or cluster"));
        }
        let epoch = Ulid::from_bytes(header.epoch_id);
        let data_key =
            self.epochs.get(&epoch).ok_or_else(|| bad(&format!("names the data key epoch {epoch}, which is not there")))?;
        let (key, commitment) = derive_object_key(data_key, header, name);
        if !bool::from(commitment.ct_eq(&header.commitment)) {
            return Err(bad("was written under another name, or was changed"));
        }
        Ok(key)
    }
}

/// The cipher of one object.
#[derive(Debug)]
pub struct ObjectKey(AesGcm);

impl ObjectKey {
    /// The cipher itself.
    pub fn cipher(&self) -> &dyn Aead {
        &self.0
    }
}

fn derive_object_key(data_key: &[u8; KEY_LEN], header: &Header, name: &str) -> (ObjectKey, [u8; 16]) {
    let kind = [header.kind as u8];
    let ids: [&[u8]; 4] = [&header.vault_id, &header.cluster_id, &kind, name.as_bytes()];
    let info = |purpose: &'static [u8]| [purpose, ids[0], ids[1], ids[2], ids[3]];
    let key = expand::<KEY_LEN>(data_key, &header.salt, &info(b"pgvault/v1/object"));
    let commitment = expand::<16>(data_key, &header.salt, &info(b"pgvault/v1/commit"));
    (ObjectKey(AesGcm::new(&key)), *commitment)
}
