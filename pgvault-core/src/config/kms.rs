//! `[vault.kms_options]`: how to reach the key service of `vault.kms`.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::VaultConfig;
use crate::Result;
use crate::crypto::kms::{self, KeyName, Kms};

/// `[vault.kms_options]`. What is not said comes from the variables that each service's own tools read.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KmsOptions {
    /// Address of the service: a private endpoint, or a server on this machine. The key keeps its name.
    pub endpoint: Option<String>,
    /// Allow an address without TLS.
    pub allow_http: bool,
    /// PEM file of a certificate authority to trust besides the system's.
    pub ca_file: Option<PathBuf>,
    /// Time for one use of the key, with everything that it takes; 1 s to 10 min.
    #[serde(deserialize_with = "super::load::kms_timeout")]
    pub timeout: Duration,
    /// AWS: the region, when the key's name does not have it.
    pub region: Option<String>,
    /// Vault: how to log in.
    pub auth: VaultAuth,
    /// Vault: the path of the auth method, when it is not the usual one.
    pub auth_mount: Option<String>,
    /// Vault: the Kubernetes role, or the role id of an `AppRole`.
    pub role: Option<String>,
    /// Vault: file with the token, the service account's token or the secret id.
    pub credential_file: Option<PathBuf>,
    /// Vault: the namespace.
    pub namespace: Option<String>,
}

impl Default for KmsOptions {
    fn default() -> Self {
        Self {
            endpoint: None,
            allow_http: false,
            ca_file: None,
            timeout: Duration::from_secs(30),
            region: None,
            auth: VaultAuth::Token,
            auth_mount: None,
            role: None,
            credential_file: None,
            namespace: None,
        }
    }
}

/// How to log in to Vault.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VaultAuth {
    /// With a token.
    #[default]
    Token,
    /// With the token of a pod's service account.
    Kubernetes,
    /// With a role id and a secret id.
    Approle,
}

impl VaultConfig {
    /// The client for the key that `vault.kms` names; `None` when it names none.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] when it is no name of a key, an option does not fit, or this build has no client for it.
    pub fn kms(&self) -> Result<Option<std::sync::Arc<dyn Kms>>> {
        self.kms.as_deref().map(|name| kms::connect(&name.parse()?, &self.kms_options, &kms::environment())).transpose()
    }

    /// The client for another key. The options are those of `vault.kms`; they hold for another service only by chance, so then
    /// there are none but the variables.
    ///
    /// # Errors
    /// As [`VaultConfig::kms`].
    pub fn other_kms(&self, name: &str) -> Result<std::sync::Arc<dyn Kms>> {
        let name: KeyName = name.parse()?;
        let configured: Option<KeyName> = self.kms.as_deref().map(str::parse).transpose()?;
        let own = configured.is_none_or(|configured| configured.provider() == name.provider());
        let none = KmsOptions::default();
        kms::connect(&name, if own { &self.kms_options } else { &none }, &kms::environment())
    }
}
