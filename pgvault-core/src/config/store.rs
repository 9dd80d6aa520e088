//! `[vault]`: how the store is reached, what may be taken from it, and how long it has to keep things.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;
use serde::Deserialize;

use super::secret::SecretSource;
use super::{VaultConfig, load};
use crate::store::retention::{Immutability, LockMode};
use crate::store::settings::{AzureSettings, GcsSettings, Placement, S3Encryption, S3Settings};
use crate::store::{Class, Limits, Settings};
use crate::{Error, ErrorKind, Result};

/// What is at work, as far as it has limits of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Job {
    /// Base backups.
    Backup,
    /// WAL in either direction.
    Wal,
    /// Restores.
    Restore,
    /// Everything that reads the whole vault.
    Check,
    /// Anything else.
    Other,
}

/// `vault.immutability`
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImmutabilityConfig {
    /// Whom the locks bind.
    pub mode: LockMode,
    /// For how long.
    #[serde(deserialize_with = "load::duration")]
    pub retain: Duration,
}

/// `[vault.limits]`, and below it one table for each job that has its own.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Requests at once.
    pub requests: Option<u32>,
    /// Bytes sent per second.
    #[serde(deserialize_with = "load::optional_size")]
    pub upload: Option<u64>,
    /// Bytes read per second.
    #[serde(deserialize_with = "load::optional_size")]
    pub download: Option<u64>,
    /// For base backups.
    pub backup: JobLimits,
    /// For WAL.
    pub wal: JobLimits,
    /// For restores.
    pub restore: JobLimits,
    /// For `check` and `scrub`.
    pub check: JobLimits,
}

/// Limits of one job, which win over the vault's.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobLimits {
    /// Requests at once.
    pub requests: Option<u32>,
    /// Bytes sent per second.
    #[serde(deserialize_with = "load::optional_size")]
    pub upload: Option<u64>,
    /// Bytes read per second.
    #[serde(deserialize_with = "load::optional_size")]
    pub download: Option<u64>,
}

impl LimitsConfig {
    fn of(&self, job: Job) -> Limits {
        let own = match job {
            Job::Backup => self.backup,
            Job::Wal => self.wal,
            Job::Restore => self.restore,
            Job::Check => self.check,
            Job::Other => JobLimits::default(),
        };
        let default = Limits::default();
        Limits {
            requests: own.requests.or(self.requests).unwrap_or(default.requests),
            upload: own.upload.or(self.upload),
            download: own.download.or(self.download),
        }
    }
}

/// One value for each kind of object.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ByClass<T> {
    /// Packs.
    pub data: Option<T>,
    /// Write-ahead log.
    pub wal: Option<T>,
    /// Manifests, keys, records.
    pub meta: Option<T>,
}

impl<T: Clone> ByClass<T> {
    fn get(&self, class: Class) -> Option<T> {
        match class {
            Class::Data => self.data.clone(),
            Class::Wal => self.wal.clone(),
            Class::Meta => self.meta.clone(),
            Class::Transient => None,
        }
    }
}

/// `[vault.s3]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct S3Config {
    /// Region.
    pub region: Option<String>,
    /// Endpoint of a store that is not Amazon's.
    pub endpoint: Option<String>,
    /// `host/bucket`, the default, instead of `bucket.host`.
    pub path_style: Option<bool>,
    /// Access key.
    pub access_key_id: Option<String>,
    /// Its secret.
    pub secret_access_key: Option<SecretString>,
    /// File that holds it.
    pub secret_access_key_file: Option<PathBuf>,
    /// Command that prints it.
    pub secret_access_key_command: Option<String>,
    /// Token of temporary credentials.
    pub session_token: Option<SecretString>,
    /// Encryption by the store: `aws:kms`, `aws:kms:dsse` or `customer`.
    pub encryption: Option<String>,
    /// Key of `aws:kms` and `aws:kms:dsse`.
    pub kms_key_id: Option<String>,
    /// Key of `customer`: a file with 32 bytes in base64.
    pub customer_key_file: Option<PathBuf>,
    /// One data key of the KMS for many objects.
    pub bucket_key: bool,
}

/// `[vault.azure]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AzureConfig {
    /// Endpoint, when it is not the public cloud's.
    pub endpoint: Option<String>,
    /// The account's key.
    pub access_key: Option<SecretString>,
    /// File that holds it.
    pub access_key_file: Option<PathBuf>,
    /// Command that prints it.
    pub access_key_command: Option<String>,
    /// A shared access signature.
    pub sas: Option<SecretString>,
    /// File that holds it.
    pub sas_file: Option<PathBuf>,
    /// Command that prints it.
    pub sas_command: Option<String>,
    /// Client id of an identity or an application.
    pub client_id: Option<String>,
    /// Tenant of the application.
    pub tenant_id: Option<String>,
    /// Secret of the application.
    pub client_secret: Option<SecretString>,
    /// File that holds it.
    pub client_secret_file: Option<PathBuf>,
    /// Command that prints it.
    pub client_secret_command: Option<String>,
    /// Which kind of credentials is meant.
    pub credential: Option<String>,
}

/// `[vault.gcs]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GcsConfig {
    /// Endpoint, when it is not Google's.
    pub endpoint: Option<String>,
    /// Key file of a service account.
    pub service_account_file: Option<PathBuf>,
    /// Sends no credentials.
    pub anonymous: bool,
}

impl VaultConfig {
    /// What the store has to know for a job.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when values contradict each other or a secret cannot be read.
    pub fn store_settings(&self, job: Job) -> Result<Settings> {
        let limits = self.limits.of(job);
        if limits.requests == 0 || limits.upload == Some(0) || limits.download == Some(0) {
            return Err(usage("vault.limits: nothing can be done with 0; leave a limit out to have none"));
        }
        for (name, class) in [("wal", &self.storage_class.wal), ("meta", &self.storage_class.meta)] {
            // What is read back right after it was written, or first of all in a disaster, must not have to be thawed.
            if class.as_deref().is_some_and(|class| ["GLACIER", "DEEP_ARCHIVE", "Archive"].contains(&class)) {
                return Err(usage(&format!(
                    "vault.storage_class.{name}: an archive tier cannot be read at once; only data may go there"
                )));
            }
        }
        let mut placement = BTreeMap::new();
        for class in [Class::Data, Class::Wal, Class::Meta] {
            let tags = self.tags.get(class).unwrap_or_default();
            let _ = placement.insert(class, Placement { storage_class: self.storage_class.get(class), tags });
        }
        let immutability = self.immutability.map(|config| Immutability { mode: config.mode, retain: config.retain });
        if immutability.is_some_and(|immutability| immutability.retain < Duration::from_secs(1)) {
            return Err(usage("vault.immutability.retain is at least 1s"));
        }
        Ok(Settings {
            limits,
            allow_http: self.allow_http,
            ca_file: self.ca_file.clone(),
            proxy: self.proxy.clone(),
            immutability,
            placement,
            s3: self.s3.settings()?,
            azure: self.azure.settings()?,
            gcs: GcsSettings {
                endpoint: self.gcs.endpoint.clone(),
                service_account_file: self.gcs.service_account_file.clone(),
                anonymous: self.gcs.anonymous,
            },
            ..Settings::default()
        })
    }
}

impl S3Config {
    fn settings(&self) -> Result<S3Settings> {
        let secret =
            secret(self.secret_access_key.as_ref(), self.secret_access_key_file.as_ref(), self.secret_access_key_command.as_ref())?;
        if self.access_key_id.is_some() != secret.is_some() {
            return Err(usage("vault.s3.access_key_id and vault.s3.secret_access_key belong together"));
        }
        let key = || self.kms_key_id.clone().ok_or_else(|| usage("vault.s3.encryption by a KMS needs vault.s3.kms_key_id"));
        let encryption = match self.encryption.as_deref() {
            None => None,
            Some("aws:kms") => Some(S3Encryption::Kms(key()?)),
            Some("aws:kms:dsse") => Some(S3Encryption::DualKms(key()?)),
            Some("customer") => {
                let file = self.customer_key_file.clone();
                let file = file.ok_or_else(|| usage("vault.s3.encryption = \"customer\" needs vault.s3.customer_key_file"))?;
                Some(S3Encryption::Customer(SecretSource::File(file).read()?))
            }
            Some(other) => {
                return Err(usage(&format!("vault.s3.encryption `{other}` is none of aws:kms, aws:kms:dsse and customer")));
            }
        };
        Ok(S3Settings {
            region: self.region.clone(),
            endpoint: self.endpoint.clone(),
            virtual_hosted: self.path_style == Some(false),
            access_key_id: self.access_key_id.clone(),
            secret_access_key: secret,
            session_token: self.session_token.clone(),
            encryption,
            bucket_key: self.bucket_key,
        })
    }
}

impl AzureConfig {
    fn settings(&self) -> Result<AzureSettings> {
        Ok(AzureSettings {
            endpoint: self.endpoint.clone(),
            access_key: secret(self.access_key.as_ref(), self.access_key_file.as_ref(), self.access_key_command.as_ref())?,
            sas: secret(self.sas.as_ref(), self.sas_file.as_ref(), self.sas_command.as_ref())?,
            client_id: self.client_id.clone(),
            tenant_id: self.tenant_id.clone(),
            client_secret: secret(
                self.client_secret.as_ref(),
                self.client_secret_file.as_ref(),
                self.client_secret_command.as_ref(),
            )?,
            credential: self.credential.clone(),
        })
    }
}

/// A secret that may be given in three ways.
fn secret(value: Option<&SecretString>, file: Option<&PathBuf>, command: Option<&String>) -> Result<Option<SecretString>> {
    let source = match (value, file, command) {
        (Some(value), _, _) => SecretSource::Value(value.clone()),
        (None, Some(file), _) => SecretSource::File(file.clone()),
        (None, None, Some(command)) => SecretSource::Command(command.clone()),
        (None, None, None) => return Ok(None),
    };
    source.read().map(Some)
}

fn usage(why: &str) -> Error {
    Error::new(ErrorKind::Usage, "config.invalid", why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load_text;

    fn settings(text: &str, job: Job) -> Result<Settings> {
        let config = load_text(&format!("[vault]\nurl = 's3://b/p'\n{text}"), std::iter::empty())?;
        config.vault.store_settings(job)
    }

    #[test]
    fn limits_of_a_job_win_over_the_vaults() {
        let text = "[vault.limits]\nrequests = 8\nupload = '50MiB'\n[vault.limits.restore]\nrequests = 64\ndownload = '1GiB'";
        assert_eq!(settings(text, Job::Backup).unwrap().limits, Limits { requests: 8, upload: Some(50 << 20), download: None });
        let restore = Limits { requests: 64, upload: Some(50 << 20), download: Some(1 << 30) };
        assert_eq!(settings(text, Job::Restore).unwrap().limits, restore);
        assert_eq!(settings("[vault.limits]\nrequests = 0", Job::Wal).unwrap_err().kind(), ErrorKind::Usage);
    }

    #[test]
    fn immutability_and_placement_are_read() {
        let text = "immutability = { mode = 'compliance', retain = '35d' }\nstorage_class = { data = 'STANDARD_IA' }\n[vault.tags.wal]\nteam = 'shop'";
        let settings = settings(text, Job::Backup).unwrap();
        let immutability = settings.immutability.unwrap();
        assert_eq!((immutability.mode, immutability.retain), (LockMode::Compliance, Duration::from_secs(35 * 86_400)));
        assert_eq!(settings.placement[&Class::Data].storage_class.as_deref(), Some("STANDARD_IA"));
        assert_eq!(settings.placement[&Class::Wal].tags["team"], "shop");
        for bad in ["immutability = { mode = 'strong', retain = '1d' }", "immutability = { mode = 'governance', retain = '0s' }"] {
            assert!(self::settings(bad, Job::Other).is_err(), "{bad}");
        }
    }

    #[test]
    fn secrets_come_in_three_ways_and_belong_to_their_key() {
        use secrecy::ExposeSecret as _;
        let text = "[vault.s3]\naccess_key_id = 'AK'\nsecret_access_key_command = 'printf SK'";
        let s3 = settings(text, Job::Other).unwrap().s3;
        assert_eq!(s3.secret_access_key.unwrap().expose_secret(), "SK");
        for bad in [
            "[vault.s3]\naccess_key_id = 'AK'",
            "[vault.s3]\nencryption = 'aws:kms'",
            "[vault.s3]\nencryption = 'customer'",
            "[vault.s3]\nencryption = 'rot13'",
            "[vault.azure]\naccess_key_file = '/nowhere'",
            "[vault.gcs]\nfolder = 'x'",
            "[vault.storage_class]\nwal = 'GLACIER'",
        ] {
            assert_eq!(settings(bad, Job::Other).unwrap_err().kind(), ErrorKind::Usage, "{bad}");
        }
    }
}
