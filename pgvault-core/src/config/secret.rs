//! Where a secret comes from: a value, a file or a command.

use std::path::PathBuf;
use std::process::Command;

use secrecy::SecretString;

use super::VaultConfig;
use crate::crypto::slot::Unlock;
use crate::{Error, ErrorKind, Result};

/// A place that a secret is read from each time it is needed, so that a rotated one is picked up.
#[derive(Debug, Clone)]
pub enum SecretSource {
    /// The secret itself.
    Value(SecretString),
    /// A file that holds it.
    File(PathBuf),
    /// A shell command that prints it.
    Command(String),
}

impl SecretSource {
    /// Reads the secret; trailing line ends are not part of it.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when the file or command fails or gives nothing.
    pub fn read(&self) -> Result<SecretString> {
        let usage = |why: String| Error::new(ErrorKind::Usage, "config.secret", why);
        let text = match self {
            Self::Value(value) => return Ok(value.clone()),
            Self::File(path) => {
                std::fs::read_to_string(path).map_err(|e| usage(format!("read the secret in {}: {e}", path.display())))?
            }
            Self::Command(command) => {
                let output = Command::new("/bin/sh").arg("-c").arg(command).output();
                let output = output.map_err(|e| usage(format!("run the secret's command: {e}")))?;
                if !output.status.success() {
                    return Err(usage(format!("the secret's command failed ({})", output.status)));
                }
                String::from_utf8(output.stdout)
                    .map_err(|_| usage("the secret's command printed something that is not text".into()))?
            }
        };
        let text = text.trim_end_matches(['\r', '\n']);
        if text.is_empty() {
            return Err(usage(match self {
                Self::File(path) => format!("the secret in {} is empty", path.display()),
                _ => "the secret's command printed nothing".into(),
            }));
        }
        Ok(text.into())
    }
}

impl VaultConfig {
    /// The configured passphrase, if there is one.
    pub fn passphrase_source(&self) -> Option<SecretSource> {
        let value = self.passphrase.clone().map(SecretSource::Value);
        let file = self.passphrase_file.clone().map(SecretSource::File);
        value.or(file).or_else(|| self.passphrase_command.clone().map(SecretSource::Command))
    }

    /// The configured X25519 identities, if there are any.
    pub fn identity_source(&self) -> Option<SecretSource> {
        let file = self.identity_file.clone().map(SecretSource::File);
        file.or_else(|| self.identity_command.clone().map(SecretSource::Command))
    }

    /// The key that opens the vault: the identity when one is configured, else the passphrase, else the key in a key service,
    /// which is the only one that needs the network.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when there is no key or it cannot be read.
    pub fn unlock(&self) -> Result<Unlock> {
        if let Some(identity) = self.identity_source() {
            return identity.read().map(Unlock::Identity);
        }
        if let Some(source) = self.passphrase_source() {
            return source.read().map(Unlock::Passphrase);
        }
        self.kms()?.map(Unlock::Kms).ok_or_else(|| {
            Error::new(ErrorKind::Usage, "config.no_key", "no key is configured").with_hint(
                "set vault.passphrase_file, vault.passphrase_command, vault.identity_file or vault.kms, or PGVAULT_VAULT_PASSPHRASE_FILE",
            )
        })
    }
}
