//! Key services: slots that a KMS opens.
//!
//! ```text
//! key in AWS KMS, Azure Key Vault, GCP KMS or Vault transit      never leaves the service
//!   wraps a random 32-byte key of the slot                        one request, with the slot's identity as its context
//!     seals the cluster's master key                              here, as the key of a passphrase does
//! ```
//!
//! So a slot of this kind is bound to its vault, cluster and id by our own seal, whether the service can bind a context
//! (AWS, Google, transit) or not (Azure), and the master key itself is never sent anywhere.
//!
//! What lies in the store is not trusted to say where to send a request: address and key come from the configuration, and a
//! slot is asked of the service only when it names the configured key. The clients are features of this crate (`kms-aws`,
//! `kms-azure`, `kms-gcp`, `kms-transit`); a build without them reads, lists and checks such slots all the same. Who embeds the
//! engine can implement [`Kms`] for another service.
//!
//! A service that does not answer is trouble that passes ([`crate::ErrorKind::Storage`]), never a wrong key: only its own word that the
//! bytes are not its own is [`crate::ErrorKind::WrongKey`].

#[cfg(feature = "kms-aws")]
mod aws;
#[cfg(feature = "kms-azure")]
mod azure;
#[cfg(feature = "kms-gcp")]
mod gcp;
#[cfg(any(feature = "kms-aws", feature = "kms-azure", feature = "kms-gcp", feature = "kms-transit"))]
mod http;
mod name;
// The crate's own dependency on itself gives its tests every client.
#[cfg(test)]
mod tests;
#[cfg(feature = "kms-transit")]
mod transit;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ulid::Ulid;
use zeroize::Zeroizing;

use super::aead::{Aead, AesGcm, KEY_LEN};
use super::keys::{Identity, MasterKey};
use super::slot::Method;
use crate::Result;
use crate::config::KmsOptions;
use crate::env::Env;
use crate::format::FormatError;

pub use name::{KeyName, Provider};

/// Longest wrapped key that is sent to a service; the largest real ones, of RSA-4096, have 700 characters.
const MAX_WRAPPED: usize = 16 << 10;

/// A key in a key service.
#[async_trait]
pub trait Kms: fmt::Debug + Send + Sync {
    /// Its name; slots that name another are not shown to it.
    fn name(&self) -> &KeyName;

    /// Wraps a slot's key.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Storage`] when the service does not answer, [`crate::ErrorKind::Usage`] when it refuses or has no such key.
    async fn wrap(&self, key: &[u8; KEY_LEN], binding: &Binding) -> Result<Wrapped>;

    /// Unwraps what [`Kms::wrap`] gave for the same binding.
    ///
    /// # Errors
    /// As [`Kms::wrap`], and [`crate::ErrorKind::WrongKey`] when the service says that these bytes are not of this key and binding.
    async fn unwrap(&self, wrapped: &Wrapped, binding: &Binding) -> Result<Zeroizing<Vec<u8>>>;
}

/// A slot's key as a service wrapped it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrapped {
    /// Which key it really was, where the configured name may come to mean another (an alias, a key without its version);
    /// otherwise empty.
    pub version: String,
    /// The ciphertext, as the service spells it.
    pub text: String,
}

/// What a wrapped key is bound to: the slot and where it belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    identity: Identity,
    key_id: Ulid,
}

impl Binding {
    /// The binding of the slot `key_id`.
    pub fn new(identity: &Identity, key_id: Ulid) -> Self {
        Self { identity: *identity, key_id }
    }

    /// For services that bind bytes, and for our own seal.
    pub fn bytes(&self) -> Vec<u8> {
        super::slot::slot_aad(&self.identity, self.key_id)
    }

    /// For services that bind names and values, which then stand in their logs and may stand in their policies.
    pub fn context(&self) -> BTreeMap<&'static str, String> {
        let cluster = self.identity.cluster_id.iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
        BTreeMap::from([
            ("pgvault-vault", Ulid::from_bytes(self.identity.vault_id).to_string()),
            ("pgvault-cluster", cluster),
            ("pgvault-slot", self.key_id.to_string()),
        ])
    }
}

/// Variables that clients take credentials from.
pub type Environment = BTreeMap<String, String>;

/// The variables of this process.
pub fn environment() -> Environment {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))).collect()
}

/// The client for a key. Nothing is sent yet.
///
/// # Errors
/// [`crate::ErrorKind::Usage`] when an option does not fit, or this build has no client for the service.
pub fn connect(name: &KeyName, options: &KmsOptions, environment: &Environment) -> Result<Arc<dyn Kms>> {
    match name.provider() {
        #[cfg(feature = "kms-aws")]
        Provider::Aws => Ok(Arc::new(aws::AwsKms::new(name, options, environment)?)),
        #[cfg(feature = "kms-azure")]
        Provider::Azure => Ok(Arc::new(azure::AzureKeyVault::new(name, options, environment)?)),
        #[cfg(feature = "kms-gcp")]
        Provider::Gcp => Ok(Arc::new(gcp::GcpKms::new(name, options, environment)?)),
        #[cfg(feature = "kms-transit")]
        Provider::Transit => Ok(Arc::new(transit::VaultTransit::new(name, options, environment)?)),
        #[cfg(not(all(feature = "kms-aws", feature = "kms-azure", feature = "kms-gcp", feature = "kms-transit")))]
        provider => {
            let _ = (options, environment);
            let what = format!("this pgvault was built without {} ({name})", provider.title());
            Err(crate::Error::new(crate::ErrorKind::Usage, "kms.not_built", what)
                .with_hint(format!("build it with `--features {}`", provider.feature())))
        }
    }
}

/// Seals the master key for a new slot.
pub(super) async fn seal(kms: &dyn Kms, env: &Env, binding: &Binding, master: &MasterKey) -> Result<Method> {
    let key: Zeroizing<[u8; KEY_LEN]> = Zeroizing::new(env.random()?);
    let wrapped = kms.wrap(&key, binding).await?;
    let mut sealed = master.0.to_vec();
    // The key is random and seals once, so a fixed nonce cannot repeat.
    let tag = AesGcm::new(&key).seal([0; 12], &binding.bytes(), &mut sealed);
    sealed.extend_from_slice(&tag);
    Ok(Method::Kms {
        key: kms.name().to_string(),
        key_version: wrapped.version,
        slot_key: wrapped.text,
        wrapped: BASE64.encode(sealed),
    })
}

/// Opens what [`seal`] made; gives the bytes that the slot holds.
pub(super) async fn open(kms: &dyn Kms, binding: &Binding, wrapped: &Wrapped, sealed: &str) -> Result<Zeroizing<Vec<u8>>> {
    let bad = |why: &str| FormatError::new("key slot", format!("{}: {why}", binding.key_id));
    let bytes = BASE64.decode(sealed).map_err(|_| bad("is not base64"))?;
    let (sealed, tag) = bytes.split_last_chunk::<16>().ok_or_else(|| bad("is too short"))?;
    // It comes from the store: no service should have to judge what none can have made.
    let is_text = wrapped.text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=-_:".contains(&b));
    if !is_text || wrapped.text.is_empty() || wrapped.text.len() > MAX_WRAPPED {
        return Err(bad("holds something that no key service made").into());
    }
    let key = kms.unwrap(wrapped, binding).await?;
    let key = Zeroizing::new(<[u8; KEY_LEN]>::try_from(&key[..]).map_err(|_| bad("holds something that is not a key"))?);
    let mut plain = Zeroizing::new(sealed.to_vec());
    // The service vouches for its own part, so this is no wrong key.
    AesGcm::new(&key)
        .open([0; 12], &binding.bytes(), &mut plain, *tag)
        .map_err(|_| bad("was changed, or made for another vault, cluster or slot"))?;
    Ok(plain)
}
