//! Key slots: the ways into a cluster's master key.
//!
//! A slot is one small document that wraps the master key for one passphrase, one X25519 recipient or one key of a key service.
//! Adding, changing or revoking access writes or deletes a slot and touches no data. X25519 slots are ordinary age files, so
//! operators use the identities they already have. A slot of a kind that a later pgvault added stays what it is here: it can be
//! listed, checked and revoked, and opens nothing.

use std::sync::Arc;

use argon2::{Algorithm, Argon2, Params, Version};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use secrecy::{ExposeSecret, SecretString};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use subtle::ConstantTimeEq;
use ulid::Ulid;
use zeroize::Zeroizing;

use super::aead::{Aead, AesGcm, KEY_LEN};
use super::keys::{Identity, MasterKey};
use super::kms::{self, Binding, Kms, Wrapped};
use crate::env::Env;
use crate::format::{FormatError, document};
use crate::{Error, ErrorKind, Result};

/// What opens a slot.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Unlock {
    /// A passphrase.
    Passphrase(SecretString),
    /// The text of an age identity file (`AGE-SECRET-KEY-1...` lines).
    Identity(SecretString),
    /// A key in a key service.
    Kms(Arc<dyn Kms>),
}

/// What a new slot is made for.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Wrap {
    /// A passphrase.
    Passphrase(SecretString),
    /// An age recipient (`age1...`).
    Recipient(String),
    /// A key in a key service.
    Kms(Arc<dyn Kms>),
}

/// How a slot wraps the master key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Method {
    /// AES-256-GCM under an argon2id key.
    Passphrase {
        /// Memory in KiB.
        memory_kib: u32,
        /// Passes over the memory.
        passes: u32,
        /// Lanes.
        lanes: u32,
        /// Salt, base64.
        salt: String,
        /// Sealed master key, base64.
        wrapped: String,
    },
    /// An age file for one X25519 recipient.
    X25519 {
        /// The recipient.
        recipient: String,
        /// The age file, base64.
        wrapped: String,
    },
    /// AES-256-GCM under a random key that a key service wraps, see [`kms`].
    Kms {
        /// Name of the key in the service, as [`kms::KeyName`] spells it.
        key: String,
        /// Which key that was when the slot was made, where its name may come to mean another; otherwise empty.
        key_version: String,
        /// The random key, as the service wrapped it.
        slot_key: String,
        /// Sealed master key, base64.
        wrapped: String,
    },
    /// A kind that this version does not know.
    #[serde(skip)]
    Other(Map<String, Value>),
}

// The derived implementations have a fixed list of kinds; these add that there may be others.

impl Serialize for Method {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Other(fields) => fields.serialize(serializer),
            known => Self::serialize(known, serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Method {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields = Map::deserialize(deserializer)?;
        match fields.get("type").and_then(Value::as_str) {
            Some("passphrase" | "x25519" | "kms") => Self::deserialize(Value::Object(fields)).map_err(D::Error::custom),
            Some(_) => Ok(Self::Other(fields)),
            None => Err(D::Error::missing_field("type")),
        }
    }
}

/// A slot as stored under `keys/`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotDocument {
    /// Always `pgvault key slot`.
    pub format: String,
    /// Always 1.
    pub version: u32,
    /// The slot's id, also its name.
    pub key_id: Ulid,
    /// What the operator called it.
    pub label: String,
    /// When it was made, by the maker's clock; information only.
    pub created_at: jiff::Timestamp,
    /// Which master key it wraps, see [`MasterKey::commitment`]. A slot that names another than the cluster's counts for
    /// nothing.
    pub commitment: String,
    /// How it wraps the master key.
    pub method: Method,
    /// Proves, to whoever holds the master key, that the slot was made by someone who held it too. Base64.
    pub check: String,
}

const SLOT_FORMAT: &str = "pgvault key slot";

/// Argon2id cost of new slots: 64 MiB, two passes, four lanes; about 60 ms of CPU time. `wal push` pays it once per segment.
const MEMORY_KIB: u32 = 64 << 10;
const PASSES: u32 = 2;
const LANES: u32 = 4;

impl SlotDocument {
    /// Wraps `master` for `wrap`.
    ///
    /// # Errors
    /// When the recipient is not an age X25519 recipient, the passphrase is empty, or the key service refuses or does not answer.
    pub async fn create(env: &Env, identity: &Identity, master: &MasterKey, wrap: &Wrap, label: &str) -> Result<Self> {
        let key_id = env.new_id()?;
        let method = match wrap {
            Wrap::Passphrase(passphrase) => {
                if passphrase.expose_secret().is_empty() {
                    return Err(Error::new(ErrorKind::Usage, "key.empty_passphrase", "the passphrase is empty"));
                }
                let salt: [u8; 16] = env.random()?;
                let passphrase = passphrase.clone();
                let key = blocking(move || stretch(&passphrase, &salt, MEMORY_KIB, PASSES, LANES)).await?;
                let mut sealed = master.0.to_vec();
                // The key belongs to this salt alone and seals once, so a fixed nonce cannot repeat.
                let tag = AesGcm::new(&key).seal([0; 12], &slot_aad(identity, key_id), &mut sealed);
                sealed.extend_from_slice(&tag);
                Method::Passphrase {
                    memory_kib: MEMORY_KIB,
                    passes: PASSES,
                    lanes: LANES,
                    salt: BASE64.encode(salt),
                    wrapped: BASE64.encode(sealed),
                }
            }
            Wrap::Recipient(recipient) => {
                let parsed: age::x25519::Recipient = recipient.parse().map_err(|e| {
                    Error::new(ErrorKind::Usage, "key.bad_recipient", format!("`{recipient}` is not an age X25519 recipient: {e}"))
                        .with_hint("a recipient starts with `age1`; `age-keygen -y identity.txt` prints it")
                })?;
                let wrapped = age::encrypt(&parsed, &master.0[..])
                    .map_err(|e| Error::new(ErrorKind::Failed, "key.wrap", format!("wrap the master key for {recipient}: {e}")))?;
                Method::X25519 { recipient: recipient.clone(), wrapped: BASE64.encode(wrapped) }
            }
            Wrap::Kms(kms) => kms::seal(kms.as_ref(), env, &Binding::new(identity, key_id), master).await?,
        };
        let mut slot = Self {
            format: SLOT_FORMAT.into(),
            version: 1,
            key_id,
            label: label.into(),
            created_at: env.now(),
            commitment: master.commitment(identity),
            method,
            check: String::new(),
        };
        slot.check = BASE64.encode(slot.checksum(identity, master)?);
        Ok(slot)
    }

    /// Tries to open the slot.
    ///
    /// `Ok(None)` means that `unlock` is not the key of this slot; an error means that the slot itself is unusable. What is
    /// returned is the master key that the slot's commitment names, and no other.
    ///
    /// # Errors
    /// When the slot is malformed or of a newer version, or wraps another key than it names. From a key service also as
    /// [`Kms::unwrap`].
    pub async fn open(&self, identity: &Identity, unlock: &Unlock) -> Result<Option<MasterKey>> {
        let bad = |why: &str| FormatError::new("key slot", format!("{}: {why}", self.key_id));
        if self.format != SLOT_FORMAT || self.version != 1 {
            return Err(FormatError::unsupported("key slot", format!("{} is of a newer version", self.key_id)).into());
        }
        let opened: Zeroizing<Vec<u8>> = match (&self.method, unlock) {
            (Method::Passphrase { memory_kib, passes, lanes, salt, wrapped }, Unlock::Passphrase(passphrase)) => {
                // A forged slot must not make the reader work or allocate without bound.
                if *memory_kib > 256 << 10 || *passes > 16 || *lanes > 16 {
                    return Err(bad("asks for more work than any slot should").into());
                }
                let salt = BASE64.decode(salt).map_err(|_| bad("has a salt that is not base64"))?;
                let bytes = BASE64.decode(wrapped).map_err(|_| bad("is not base64"))?;
                let (sealed, tag) = bytes.split_last_chunk::<16>().ok_or_else(|| bad("is too short"))?;
                let (passphrase, memory_kib, passes, lanes) = (passphrase.clone(), *memory_kib, *passes, *lanes);
                let key = blocking(move || stretch(&passphrase, &salt, memory_kib, passes, lanes)).await?;
                let mut plain = Zeroizing::new(sealed.to_vec());
                if AesGcm::new(&key).open([0; 12], &slot_aad(identity, self.key_id), &mut plain, *tag).is_err() {
                    return Ok(None);
                }
                plain
            }
            (Method::X25519 { wrapped, .. }, Unlock::Identity(text)) => {
                let bytes = BASE64.decode(wrapped).map_err(|_| bad("is not base64"))?;
                let mut plain = None;
                for line in text.expose_secret().lines().map(str::trim).filter(|l| l.starts_with("AGE-SECRET-KEY-")) {
                    let identity: age::x25519::Identity = line.parse().map_err(|e| {
                        Error::new(
                            ErrorKind::Usage,
                            "key.bad_identity",
                            format!("the identity file has a line that is not an age identity: {e}"),
                        )
                    })?;
                    if let Ok(bytes) = age::decrypt(&identity, &bytes) {
                        plain = Some(Zeroizing::new(bytes));
                        break;
                    }
                }
                let Some(plain) = plain else { return Ok(None) };
                plain
            }
            (Method::Kms { key, key_version, slot_key, wrapped }, Unlock::Kms(kms)) if *key == kms.name().to_string() => {
                let slot_key = Wrapped { version: key_version.clone(), text: slot_key.clone() };
                kms::open(kms.as_ref(), &Binding::new(identity, self.key_id), &slot_key, wrapped).await?
            }
            _ => return Ok(None),
        };
        let master = <[u8; KEY_LEN]>::try_from(&opened[..]).map_err(|_| bad("wraps something that is not a key"))?;
        let master = MasterKey(Zeroizing::new(master));
        if master.commitment(identity) != self.commitment {
            return Err(bad("wraps another master key than it names").into());
        }
        Ok(Some(master))
    }

    /// Checks, with the master key, that the slot is one that a holder of it made.
    ///
    /// # Errors
    /// When it was changed or forged.
    pub fn verify(&self, identity: &Identity, master: &MasterKey) -> Result<(), FormatError> {
        let expected = self.checksum(identity, master).map_err(|e| FormatError::new("key slot", e.to_string()))?;
        let stored = BASE64.decode(&self.check).unwrap_or_default();
        if bool::from(stored.ct_eq(&expected)) {
            Ok(())
        } else {
            Err(FormatError::new("key slot", format!("{} was not made by a holder of the master key", self.key_id)))
        }
    }

    pub(crate) fn checksum(&self, identity: &Identity, master: &MasterKey) -> Result<[u8; 32]> {
        let unchecked = Self { check: String::new(), ..self.clone() };
        let key = master.derive(&[], "pgvault/v1/slot-check", identity);
        Ok(*blake3::keyed_hash(&key, &document::encode(&unchecked)?).as_bytes())
    }

    /// `passphrase`, the recipient or the name of the key, for people.
    pub fn describe(&self) -> String {
        match &self.method {
            Method::Passphrase { .. } => "passphrase".into(),
            Method::X25519 { recipient, .. } => recipient.clone(),
            Method::Kms { key, .. } => key.clone(),
            Method::Other(fields) => {
                let kind = fields.get("type").and_then(Value::as_str).unwrap_or_default();
                format!("of a kind that this version does not know: {:?}", kind.chars().take(40).collect::<String>())
            }
        }
    }
}

/// The recipients of the identities in an age identity file.
///
/// # Errors
/// [`ErrorKind::Usage`] when a line is not an age X25519 identity, or there is none.
pub fn recipients_of(identities: &SecretString) -> Result<Vec<String>> {
    let usage = |why: String| Error::new(ErrorKind::Usage, "key.bad_identity", why);
    let lines = identities.expose_secret().lines().map(str::trim).filter(|line| line.starts_with("AGE-SECRET-KEY-"));
    let recipients = lines
        .map(|line| {
            let identity: age::x25519::Identity =
                line.parse().map_err(|e| usage(format!("a line of the identity file is not an age identity: {e}")))?;
            Ok(identity.to_public().to_string())
        })
        .collect::<Result<Vec<_>>>()?;
    if recipients.is_empty() { Err(usage("the identity file holds no age X25519 identity".into())) } else { Ok(recipients) }
}

/// Stretching a passphrase takes tens of milliseconds of CPU: off the runtime's threads.
async fn blocking<T: Send + 'static>(action: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(action).await.map_err(|e| Error::new(ErrorKind::Failed, "task", e.to_string()))?
}

pub(super) fn slot_aad(identity: &Identity, key_id: Ulid) -> Vec<u8> {
    [b"pgvault/v1/slot".as_slice(), &identity.vault_id, &identity.cluster_id, &key_id.to_bytes()].concat()
}

fn stretch(passphrase: &SecretString, salt: &[u8], memory_kib: u32, passes: u32, lanes: u32) -> Result<Zeroizing<[u8; KEY_LEN]>> {
    let failed = |e: argon2::Error| Error::new(ErrorKind::Failed, "key.argon2", format!("derive a key from the passphrase: {e}"));
    let params = Params::new(memory_kib, passes, lanes, Some(KEY_LEN)).map_err(failed)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(cores.min(lanes as usize)).build();
    let pool = pool.map_err(|e| Error::new(ErrorKind::Failed, "thread", format!("start threads for a key derivation: {e}")))?;
    let mut key = Zeroizing::new([0; KEY_LEN]);
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    pool.install(|| argon2.hash_password_into(passphrase.expose_secret().as_bytes(), salt, key.as_mut())).map_err(failed)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity { vault_id: [1; 16], cluster_id: [2; 16], vault_document: [3; 32] };

    #[tokio::test]
    async fn a_passphrase_slot_opens_with_its_passphrase_only() {
        let env = Env::default();
        let master = MasterKey::generate(&env).unwrap();
        let right: SecretString = "correct horse".into();
        let slot = SlotDocument::create(&env, &IDENTITY, &master, &Wrap::Passphrase(right.clone()), "ops").await.unwrap();
        let opened = slot.open(&IDENTITY, &Unlock::Passphrase(right.clone())).await.unwrap().unwrap();
        assert_eq!(*opened.0, *master.0);
        assert!(slot.open(&IDENTITY, &Unlock::Passphrase("wrong".into())).await.unwrap().is_none());
        let elsewhere = Identity { cluster_id: [9; 16], ..IDENTITY };
        assert!(slot.open(&elsewhere, &Unlock::Passphrase(right)).await.unwrap().is_none());
        slot.verify(&IDENTITY, &master).unwrap();
        let forged = SlotDocument { label: "me".into(), ..slot };
        assert!(forged.verify(&IDENTITY, &master).is_err());
    }

    #[tokio::test]
    async fn a_recipient_slot_opens_with_its_identity_only() {
        let env = Env::default();
        let master = MasterKey::generate(&env).unwrap();
        let identity = age::x25519::Identity::generate();
        let slot = SlotDocument::create(&env, &IDENTITY, &master, &Wrap::Recipient(identity.to_public().to_string()), "ops")
            .await
            .unwrap();
        let file = format!("# created today\n{}\n", identity.to_string().expose_secret());
        assert!(slot.open(&IDENTITY, &Unlock::Identity(file.into())).await.unwrap().is_some());
        let other = age::x25519::Identity::generate().to_string();
        assert!(slot.open(&IDENTITY, &Unlock::Identity(other.expose_secret().into())).await.unwrap().is_none());
        assert!(slot.open(&IDENTITY, &Unlock::Passphrase("x".into())).await.unwrap().is_none());
    }
}
