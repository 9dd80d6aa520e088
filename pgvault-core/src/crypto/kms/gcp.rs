//! Google Cloud KMS: `encrypt` and `decrypt` of a symmetric key.
//!
//! <https://cloud.google.com/kms/docs/reference/rest/v1/projects.locations.keyRings.cryptoKeys/encrypt> and `decrypt`; errors are
//! `google.rpc.Status` (<https://cloud.google.com/apis/design/errors>). The binding is the additional authenticated data. What is
//! sent and received carries CRC-32C both ways, as Google asks of clients.
//!
//! Credentials come from where those of a `gs://` vault come from (`GOOGLE_APPLICATION_CREDENTIALS`, `GOOGLE_SERVICE_ACCOUNT`,
//! gcloud's own file, the metadata server) and are `object_store`'s; their scope is the whole platform.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::StatusCode;
use object_store::gcp::{GcpCredentialProvider, GoogleCloudStorageBuilder};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use zeroize::{Zeroize as _, Zeroizing};

use super::http::{Client, Problem, Verdict, by_status, json, post, secret_header};
use super::{Binding, Environment, KeyName, Kms, Provider, Wrapped};
use crate::config::KmsOptions;
use crate::crypto::aead::KEY_LEN;
use crate::{Error, ErrorKind, Result};

/// A key in Google Cloud KMS.
#[derive(Debug)]
pub(super) struct GcpKms {
    name: KeyName,
    endpoint: String,
    client: Client,
    credentials: GcpCredentialProvider,
}

impl GcpKms {
    pub(super) fn new(name: &KeyName, options: &KmsOptions, environment: &Environment) -> Result<Self> {
        // A bucket is asked for, and never used.
        let mut builder = GoogleCloudStorageBuilder::new().with_bucket_name("kms").with_retry(object_store::RetryConfig {
            max_retries: 3,
            retry_timeout: options.timeout,
            ..object_store::RetryConfig::default()
        });
        if let Some(path) = environment.get("SERVICE_ACCOUNT") {
            builder = builder.with_service_account_path(path);
        }
        for (name, value) in environment.iter().filter(|(name, _)| name.starts_with("GOOGLE_")) {
            // The bucket of a vault is none of ours.
            if let Ok(key) = name.to_ascii_lowercase().parse()
                && !matches!(key, object_store::gcp::GoogleConfigKey::Bucket)
            {
                builder = builder.with_config(key, value);
            }
        }
        let gcs = builder.build().map_err(|e| {
            Error::new(ErrorKind::Usage, "config.kms", format!("the Google credentials: {e}"))
                .with_hint("set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account or of gcloud")
        })?;
        Ok(Self {
            name: name.clone(),
            endpoint: options.endpoint.as_deref().unwrap_or("https://cloudkms.googleapis.com").trim_end_matches('/').into(),
            client: Client::new(Provider::Gcp, options, options.ca_file.as_deref())?,
            credentials: gcs.credentials().clone(),
        })
    }

    async fn call(&self, doing: &str, verb: &str, body: &Body<'_>) -> Result<Answer> {
        let deadline = self.client.deadline();
        let credential = self.client.within(deadline, "get Google credentials", self.credentials.get_credential()).await?;
        let credential = credential.map_err(|e| {
            match e {
                object_store::Error::Unauthenticated { .. } | object_store::Error::PermissionDenied { .. } => {
                    Error::new(ErrorKind::Usage, "kms.credentials", format!("get Google credentials: {e}"))
                }
                // It may be the metadata server that does not answer, or that there is none because nothing was configured.
                _ => self.client.unavailable("get Google credentials", &e.to_string()),
            }
            .with_hint("set GOOGLE_APPLICATION_CREDENTIALS, or give the machine or pod a service account")
        })?;
        let bearer = Zeroizing::new(format!("Bearer {}", credential.bearer));
        let headers = [
            (http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json")),
            (http::header::AUTHORIZATION, secret_header(&bearer)?),
        ];
        let (url, body) = (format!("{}/v1/{}:{verb}", self.endpoint, self.name.key()), json(body)?);
        let answer = self.client.call(deadline, doing, || post(&url, body.clone(), &headers), judge).await?;
        serde_json::from_slice(&answer).map_err(|_| self.client.bad_answer(doing))
    }

    /// The bytes of an answer, when they are what was sent.
    fn checked(&self, doing: &str, text: Option<&str>, crc: Option<&Value>) -> Result<Zeroizing<Vec<u8>>> {
        let bytes = text.and_then(|text| BASE64.decode(text).ok()).map(Zeroizing::new);
        let bytes = bytes.ok_or_else(|| self.client.bad_answer(doing))?;
        let crc = crc.and_then(|crc| crc.as_u64().or_else(|| crc.as_str()?.parse().ok()));
        if crc == Some(crc32c::crc32c(&bytes).into()) {
            Ok(bytes)
        } else {
            Err(self.client.unavailable(doing, "the answer was changed on its way"))
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    plaintext: Option<&'a str>,
    // An int64, which JSON has as text.
    #[serde(skip_serializing_if = "Option::is_none")]
    plaintext_crc32c: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ciphertext: Option<&'a str>,
    additional_authenticated_data: String,
    additional_authenticated_data_crc32c: String,
}

impl Body<'_> {
    fn new(binding: &Binding) -> Self {
        let aad = binding.bytes();
        Self {
            plaintext: None,
            plaintext_crc32c: None,
            ciphertext: None,
            additional_authenticated_data: BASE64.encode(&aad),
            additional_authenticated_data_crc32c: crc32c::crc32c(&aad).to_string(),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    ciphertext: Option<String>,
    ciphertext_crc32c: Option<Value>,
    plaintext: Option<String>,
    plaintext_crc32c: Option<Value>,
    #[serde(default)]
    verified_plaintext_crc32c: bool,
    #[serde(default)]
    verified_additional_authenticated_data_crc32c: bool,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.plaintext.zeroize();
    }
}

#[async_trait::async_trait]
impl Kms for GcpKms {
    fn name(&self) -> &KeyName {
        &self.name
    }

    async fn wrap(&self, key: &[u8; KEY_LEN], binding: &Binding) -> Result<Wrapped> {
        const DOING: &str = "wrap a key";
        let text = Zeroizing::new(BASE64.encode(key));
        let crc = crc32c::crc32c(key).to_string();
        let body = Body { plaintext: Some(&text), plaintext_crc32c: Some(crc), ..Body::new(binding) };
        let answer = self.call(DOING, "encrypt", &body).await?;
        if !answer.verified_plaintext_crc32c || !answer.verified_additional_authenticated_data_crc32c {
            return Err(self.client.unavailable(DOING, "the request was changed on its way"));
        }
        let bytes = self.checked(DOING, answer.ciphertext.as_deref(), answer.ciphertext_crc32c.as_ref())?;
        // The ciphertext says which version of the key made it.
        Ok(Wrapped { version: String::new(), text: BASE64.encode(&*bytes) })
    }

    async fn unwrap(&self, wrapped: &Wrapped, binding: &Binding) -> Result<Zeroizing<Vec<u8>>> {
        const DOING: &str = "unwrap a key";
        let body = Body { ciphertext: Some(&wrapped.text), ..Body::new(binding) };
        let answer = self.call(DOING, "decrypt", &body).await?;
        self.checked(DOING, answer.plaintext.as_deref(), answer.plaintext_crc32c.as_ref())
    }
}

/// `{"error": {"code": 404, "message": "...", "status": "NOT_FOUND", "details": [...]}}`.
pub(super) fn judge(status: StatusCode, body: &[u8]) -> Problem {
    #[derive(Deserialize, Default)]
    struct Outer {
        #[serde(default)]
        error: Inner,
    }
    #[derive(Deserialize, Default)]
    struct Inner {
        #[serde(default)]
        status: String,
        #[serde(default)]
        message: String,
    }
    let said = serde_json::from_slice::<Outer>(body).unwrap_or_default().error;
    let lower = said.message.to_ascii_lowercase();
    let verdict = match said.status.as_str() {
        "UNAVAILABLE" | "RESOURCE_EXHAUSTED" | "INTERNAL" | "ABORTED" | "DEADLINE_EXCEEDED" | "UNKNOWN" | "CANCELLED" => {
            Verdict::Again
        }
        "PERMISSION_DENIED" | "UNAUTHENTICATED" => Verdict::Denied,
        "NOT_FOUND" => Verdict::NoKey,
        // A version that is disabled or destroyed, or a key that is for something else.
        "FAILED_PRECONDITION" => Verdict::Unusable,
        "INVALID_ARGUMENT" if lower.contains("decrypt") || lower.contains("ciphertext") => Verdict::Refused,
        _ => by_status(status),
    };
    Problem { verdict, code: said.status, message: said.message }
}
