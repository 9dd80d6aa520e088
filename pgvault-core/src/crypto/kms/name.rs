//! Names of keys in key services, as the configuration and the slots spell them.
//!
//! A name becomes part of a request's address, and a slot that names a key comes from the store; so each form is checked to the
//! character, and has one spelling.

use std::fmt;
use std::str::FromStr;

use crate::{Error, ErrorKind, Result};

/// Longest name that any of the services has.
const MAX_NAME: usize = 2048;

/// A kind of key service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    /// AWS KMS.
    Aws,
    /// Azure Key Vault and Managed HSM.
    Azure,
    /// Google Cloud KMS.
    Gcp,
    /// The transit engine of `HashiCorp` Vault and `OpenBao`.
    Transit,
}

impl Provider {
    const ALL: [Self; 4] = [Self::Aws, Self::Azure, Self::Gcp, Self::Transit];

    /// What a name begins with.
    pub fn scheme(self) -> &'static str {
        match self {
            Self::Aws => "aws-kms",
            Self::Azure => "azure-kv",
            Self::Gcp => "gcp-kms",
            Self::Transit => "vault-transit",
        }
    }

    /// The feature that builds its client.
    pub fn feature(self) -> &'static str {
        match self {
            Self::Aws => "kms-aws",
            Self::Azure => "kms-azure",
            Self::Gcp => "kms-gcp",
            Self::Transit => "kms-transit",
        }
    }

    /// What people call it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Aws => "AWS KMS",
            Self::Azure => "Azure Key Vault",
            Self::Gcp => "Google Cloud KMS",
            Self::Transit => "Vault transit",
        }
    }

    fn form(self) -> &'static str {
        match self {
            Self::Aws => "aws-kms:arn:aws:kms:REGION:ACCOUNT:key/ID, or the key's id or alias/NAME alone",
            Self::Azure => "azure-kv:https://VAULT.vault.azure.net/keys/NAME, with /VERSION to pin one",
            Self::Gcp => "gcp-kms:projects/P/locations/L/keyRings/R/cryptoKeys/K",
            Self::Transit => "vault-transit:https://HOST:8200/MOUNT/KEY, or MOUNT/KEY alone with VAULT_ADDR",
        }
    }
}

/// The name of a key: a service and what that calls it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyName {
    provider: Provider,
    key: String,
}

impl KeyName {
    /// The service.
    pub fn provider(&self) -> Provider {
        self.provider
    }

    /// What the service calls it.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The region in the name of an AWS key.
    #[cfg(feature = "kms-aws")]
    pub(super) fn aws_region(&self) -> Option<&str> {
        self.key.strip_prefix("arn:")?.split(':').nth(2)
    }

    /// The address in the name of an Azure or transit key, when it has one, and the path to the key.
    #[cfg(any(feature = "kms-azure", feature = "kms-transit"))]
    pub(super) fn address_and_path(&self) -> (Option<&str>, &str) {
        let Some(scheme_end) = self.key.find("://") else { return (None, &self.key) };
        let host = scheme_end + 3;
        let slash = self.key.get(host..).and_then(|rest| rest.find('/')).map_or(self.key.len(), |at| host + at);
        (self.key.get(..slash), self.key.get(slash + 1..).unwrap_or_default())
    }
}

impl fmt::Display for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.provider.scheme(), self.key)
    }
}

impl FromStr for KeyName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refused = |hint: String| {
            let shown: String = text.chars().take(200).collect();
            Error::new(ErrorKind::Usage, "kms.name", format!("`{shown}` is not the name of a key in a key service")).with_hint(hint)
        };
        let (scheme, key) = text.split_once(':').unwrap_or((text, ""));
        let Some(provider) = Provider::ALL.into_iter().find(|provider| provider.scheme() == scheme) else {
            return Err(refused(format!("it begins with {}", Provider::ALL.map(|p| format!("{}:", p.scheme())).join(", "))));
        };
        let valid = match provider {
            _ if text.len() > MAX_NAME => None,
            Provider::Aws => aws(key),
            Provider::Azure => azure(key),
            Provider::Gcp => gcp(key),
            Provider::Transit => transit(key),
        };
        match valid {
            Some(key) => Ok(Self { provider, key }),
            None => Err(refused(format!("use {}", provider.form()))),
        }
    }
}

fn is_segment(text: &str, others: &[u8]) -> bool {
    !text.is_empty() && text != "." && text != ".." && text.bytes().all(|b| b.is_ascii_alphanumeric() || others.contains(&b))
}

fn aws(key: &str) -> Option<String> {
    let is_id = |text: &str| {
        let name = text.strip_prefix("alias/").unwrap_or(text);
        name.split('/').all(|part| is_segment(part, b"_-"))
    };
    if let Some(arn) = key.strip_prefix("arn:") {
        let parts: Vec<&str> = arn.split(':').collect();
        let [partition, "kms", region, account, resource] = parts[..] else { return None };
        let named = resource.strip_prefix("key/").is_some_and(|id| is_segment(id, b"-"))
            || resource.starts_with("alias/") && is_id(resource);
        let placed = [partition, region, account].iter().all(|part| is_segment(part, b"-"));
        return (named && placed).then(|| key.to_owned());
    }
    is_id(key).then(|| key.to_owned())
}

fn azure(key: &str) -> Option<String> {
    let url = url::Url::parse(key).ok()?;
    let host = url.host_str()?;
    let plain = url.scheme() == "https" && url.username().is_empty() && url.password().is_none() && url.port().is_none();
    // What the token is asked for is the rest of the host's name.
    let labels: Vec<&str> = host.split('.').collect();
    let known = labels.len() > 2 && matches!(labels.get(1), Some(&("vault" | "managedhsm")));
    let path: Vec<&str> = url.path().strip_prefix('/')?.trim_end_matches('/').split('/').collect();
    let named = match path[..] {
        ["keys", name] => is_segment(name, b"-"),
        ["keys", name, version] => is_segment(name, b"-") && is_segment(version, b""),
        _ => false,
    };
    (plain && known && named && url.query().is_none() && url.fragment().is_none())
        .then(|| format!("https://{host}/{}", path.join("/")))
}

fn gcp(key: &str) -> Option<String> {
    let parts: Vec<&str> = key.split('/').collect();
    let ["projects", project, "locations", location, "keyRings", ring, "cryptoKeys", name] = parts[..] else { return None };
    // The projects of a domain are called DOMAIN:NAME.
    let plain = is_segment(project, b"-.:") && [location, ring, name].iter().all(|part| is_segment(part, b"_-"));
    plain.then(|| key.to_owned())
}

fn transit(key: &str) -> Option<String> {
    let path_of = |path: &str| {
        let parts: Vec<&str> = path.split('/').collect();
        (parts.len() > 1 && parts.iter().all(|part| is_segment(part, b"._-"))).then(|| parts.join("/"))
    };
    if !key.contains("://") {
        return path_of(key);
    }
    let url = url::Url::parse(key).ok()?;
    let plain = matches!(url.scheme(), "https" | "http") && url.username().is_empty() && url.password().is_none();
    let path = path_of(url.path().strip_prefix('/')?)?;
    let port = url.port().map_or(String::new(), |port| format!(":{port}"));
    (plain && url.query().is_none() && url.fragment().is_none())
        .then(|| Some(format!("{}://{}{port}/{path}", url.scheme(), url.host_str()?)))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_keys_have_one_spelling() {
        for name in [
            "aws-kms:arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
            "aws-kms:arn:aws-us-gov:kms:us-gov-west-1:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab",
            "aws-kms:arn:aws:kms:eu-central-1:111122223333:alias/team/backups",
            "aws-kms:1234abcd-12ab-34cd-56ef-1234567890ab",
            "aws-kms:alias/backups",
            "azure-kv:https://backups.vault.azure.net/keys/pgvault",
            "azure-kv:https://backups.managedhsm.azure.net/keys/pgvault/78deebed173b48e48f55abf87ed4cf71",
            "gcp-kms:projects/p-1/locations/europe-west3/keyRings/backups/cryptoKeys/pgvault",
            "gcp-kms:projects/example.com:p/locations/global/keyRings/r_1/cryptoKeys/k",
            "vault-transit:https://vault.example.org:8200/transit/pgvault",
            "vault-transit:http://[::1]:8200/team/transit/pgvault",
            "vault-transit:transit/pgvault",
        ] {
            let parsed: KeyName = name.parse().unwrap();
            assert_eq!(parsed.to_string(), name);
        }
        let same: KeyName = "azure-kv:HTTPS://Backups.Vault.Azure.net/keys/pgvault/".parse().unwrap();
        assert_eq!(same.to_string(), "azure-kv:https://backups.vault.azure.net/keys/pgvault");
    }

    /// What is no name must not become an address, or a path to something else.
    #[test]
    fn what_could_lead_elsewhere_is_no_name() {
        for name in [
            "",
            "aws-kms",
            "aws-kms:",
            "kms:alias/x",
            "aws-kms:arn:aws:s3:eu-central-1:1:key/x",
            "aws-kms:arn:aws:kms:eu-central-1/x:1:key/x",
            "aws-kms:arn:aws:kms:eu-central-1:1:key/x/y",
            "aws-kms:alias/",
            "aws-kms:x y",
            "azure-kv:http://backups.vault.azure.net/keys/k",
            "azure-kv:https://evil.example/keys/k",
            "azure-kv:https://u:p@backups.vault.azure.net/keys/k",
            "azure-kv:https://backups.vault.azure.net/secrets/k",
            "azure-kv:https://backups.vault.azure.net/keys/k/v/wrapkey",
            "azure-kv:https://backups.vault.azure.net/keys/k?x=1",
            "gcp-kms:projects/p/locations/l/keyRings/r/cryptoKeys/..",
            "gcp-kms:projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1",
            "gcp-kms:/projects/p/locations/l/keyRings/r/cryptoKeys/k",
            "vault-transit:k",
            "vault-transit:https://h/k",
            "vault-transit:https://h/transit/../k",
            "vault-transit:transit/%2e%2e",
            "vault-transit:ftp://h/transit/k",
            &format!("aws-kms:{}", "x".repeat(3000)),
        ] {
            let error = name.parse::<KeyName>().unwrap_err();
            assert_eq!((error.kind(), error.code()), (ErrorKind::Usage, "kms.name"), "{name}");
            assert!(error.to_string().len() < 300 && error.hint().is_some());
        }
    }
}
