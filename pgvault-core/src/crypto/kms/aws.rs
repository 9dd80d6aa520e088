//! AWS KMS: `Encrypt` and `Decrypt` under a symmetric key.
//!
//! JSON 1.1 over POST, signed with Signature Version 4
//! (<https://docs.aws.amazon.com/kms/latest/APIReference/API_Encrypt.html>, `API_Decrypt.html`). The binding is the encryption
//! context; it stands in `CloudTrail` and can be a condition of a policy. A request that differs in it fails with
//! `InvalidCiphertextException`.
//!
//! Credentials come from where those of an S3 vault come from: variables, web identity (IRSA), ECS and EKS pod identity, the
//! instance's metadata. Signing and credentials are `object_store`'s.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::{HeaderName, HeaderValue, StatusCode};
use object_store::aws::{AmazonS3Builder, AwsAuthorizer, AwsCredential, AwsCredentialProvider};
use object_store::client::HttpRequestBody;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

use super::http::{Client, Problem, Request, Verdict, by_status, json, post, secret_header};
use super::{Binding, Environment, KeyName, Kms, Provider, Wrapped};
use crate::config::KmsOptions;
use crate::crypto::aead::KEY_LEN;
use crate::{Error, ErrorKind, Result};

/// A key in AWS KMS.
#[derive(Debug)]
pub(super) struct AwsKms {
    name: KeyName,
    region: String,
    endpoint: String,
    client: Client,
    credentials: AwsCredentialProvider,
}

impl AwsKms {
    pub(super) fn new(name: &KeyName, options: &KmsOptions, environment: &Environment) -> Result<Self> {
        let usage = |why: String, hint: &str| Error::new(ErrorKind::Usage, "config.kms", why).with_hint(hint);
        let variable = |name: &str| environment.get(name).filter(|value| !value.is_empty()).cloned();
        let region = name.aws_region().map(ToOwned::to_owned);
        let region =
            region.or_else(|| options.region.clone()).or_else(|| variable("AWS_REGION")).or_else(|| variable("AWS_DEFAULT_REGION"));
        let region = region.ok_or_else(|| {
            usage(
                format!("the region of {name} is not known"),
                "name the key by its ARN, or set vault.kms_options.region or AWS_REGION",
            )
        })?;
        if region.is_empty() || !region.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            return Err(usage(format!("`{region}` is not a region"), "a region is called like eu-central-1"));
        }
        let endpoint = options.endpoint.clone().or_else(|| variable("AWS_ENDPOINT_URL_KMS")).unwrap_or_else(|| {
            let suffix = if region.starts_with("cn-") { "amazonaws.com.cn" } else { "amazonaws.com" };
            format!("https://kms.{region}.{suffix}")
        });
        // A bucket is asked for, and never used.
        let mut builder = AmazonS3Builder::new().with_bucket_name("kms").with_retry(object_store::RetryConfig {
            max_retries: 3,
            retry_timeout: options.timeout,
            ..object_store::RetryConfig::default()
        });
        for (name, value) in environment.iter().filter(|(name, _)| name.starts_with("AWS_")) {
            if let Ok(key) = name.to_ascii_lowercase().parse() {
                builder = builder.with_config(key, value);
            }
        }
        let s3 = builder.with_region(&region).build();
        let s3 = s3.map_err(|e| usage(format!("the AWS credentials: {e}"), "see docs/kms.md for the variables"))?;
        Ok(Self {
            name: name.clone(),
            region,
            endpoint: endpoint.trim_end_matches('/').into(),
            client: Client::new(Provider::Aws, options, options.ca_file.as_deref())?,
            credentials: s3.credentials().clone(),
        })
    }

    async fn call(&self, doing: &str, operation: &str, body: &Body<'_>) -> Result<Answer> {
        let deadline = self.client.deadline();
        let credential = self.client.within(deadline, "get AWS credentials", self.credentials.get_credential()).await?;
        let credential = credential.map_err(|e| no_credential(&self.client, &e))?;
        let body = json(body)?;
        let target = HeaderValue::from_str(&format!("TrentService.{operation}")).map_err(|_| self.client.bad_answer(doing))?;
        let headers = [
            (http::header::CONTENT_TYPE, HeaderValue::from_static("application/x-amz-json-1.1")),
            (HeaderName::from_static("x-amz-target"), target),
        ];
        let build = || self.sign(post(&format!("{}/", self.endpoint), body.clone(), &headers)?, &credential);
        let answer = self.client.call(deadline, doing, build, judge).await?;
        serde_json::from_slice(&answer).map_err(|_| self.client.bad_answer(doing))
    }

    fn sign(&self, request: Request, credential: &AwsCredential) -> Result<Request> {
        let failed =
            |e: &dyn std::fmt::Display| Error::new(ErrorKind::Usage, "kms.credentials", format!("sign a request to AWS KMS: {e}"));
        // The signer takes both for text that a header can hold.
        let _ = secret_header(&credential.key_id)?;
        let _ = credential.token.as_deref().map(secret_header).transpose()?;
        let (parts, body) = request.into_parts();
        let mut signed = http::Request::from_parts(parts, HttpRequestBody::from(body.clone()));
        AwsAuthorizer::new(credential, "kms", &self.region).try_authorize(&mut signed, None).map_err(|e| failed(&e))?;
        let (parts, _) = signed.into_parts();
        Ok(http::Request::from_parts(parts, body))
    }
}

fn no_credential(client: &Client, error: &object_store::Error) -> Error {
    match error {
        object_store::Error::Unauthenticated { .. } | object_store::Error::PermissionDenied { .. } => {
            Error::new(ErrorKind::Usage, "kms.credentials", format!("get AWS credentials: {error}"))
        }
        // It may be the metadata service that does not answer, or that there is none because nothing was configured.
        _ => client.unavailable("get AWS credentials", &error.to_string()),
    }
    .with_hint("set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine or pod a role")
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Body<'a> {
    key_id: &'a str,
    encryption_context: BTreeMap<&'static str, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    plaintext: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ciphertext_blob: Option<&'a str>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    /// The ARN of the key that was used.
    key_id: String,
    ciphertext_blob: Option<String>,
    plaintext: Option<String>,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.plaintext.zeroize();
    }
}

#[async_trait::async_trait]
impl Kms for AwsKms {
    fn name(&self) -> &KeyName {
        &self.name
    }

    async fn wrap(&self, key: &[u8; KEY_LEN], binding: &Binding) -> Result<Wrapped> {
        const DOING: &str = "wrap a key";
        let text = Zeroizing::new(BASE64.encode(key));
        let body =
            Body { key_id: self.name.key(), encryption_context: binding.context(), plaintext: Some(&text), ciphertext_blob: None };
        let answer = self.call(DOING, "Encrypt", &body).await?;
        let text = answer.ciphertext_blob.clone().ok_or_else(|| self.client.bad_answer(DOING))?;
        Ok(Wrapped { version: answer.key_id.clone(), text })
    }

    async fn unwrap(&self, wrapped: &Wrapped, binding: &Binding) -> Result<Zeroizing<Vec<u8>>> {
        const DOING: &str = "unwrap a key";
        // An alias may lead to another key by now; this is the one that it led to.
        let key = if wrapped.version.is_empty() { self.name.key() } else { &wrapped.version };
        let text = Some(wrapped.text.as_str());
        let body = Body { key_id: key, encryption_context: binding.context(), plaintext: None, ciphertext_blob: text };
        let answer = self.call(DOING, "Decrypt", &body).await?;
        let text = answer.plaintext.as_deref().ok_or_else(|| self.client.bad_answer(DOING))?;
        BASE64.decode(text).map(Zeroizing::new).map_err(|_| self.client.bad_answer(DOING))
    }
}

/// Errors are `{"__type": "...#NotFoundException", "message": "..."}`; most have status 400, throttling included
/// (<https://docs.aws.amazon.com/kms/latest/APIReference/CommonErrors.html>).
pub(super) fn judge(status: StatusCode, body: &[u8]) -> Problem {
    #[derive(Deserialize, Default)]
    struct Said {
        #[serde(rename = "__type", default)]
        kind: String,
        #[serde(alias = "Message", default)]
        message: String,
    }
    let said: Said = serde_json::from_slice(body).unwrap_or_default();
    let code = said.kind.rsplit('#').next().unwrap_or_default().to_owned();
    let verdict = match code.as_str() {
        "ThrottlingException"
        | "Throttling"
        | "LimitExceededException"
        | "KMSInternalException"
        | "DependencyTimeoutException"
        | "KeyUnavailableException"
        | "ServiceUnavailable"
        | "ServiceUnavailableException"
        | "InternalFailure"
        | "RequestTimeout" => Verdict::Again,
        "AccessDeniedException"
        | "UnrecognizedClientException"
        | "InvalidClientTokenId"
        | "ExpiredTokenException"
        | "ExpiredToken"
        | "IncompleteSignature"
        | "InvalidSignatureException"
        | "SignatureDoesNotMatch"
        | "MissingAuthenticationToken"
        | "OptInRequired"
        | "NotAuthorized"
        | "InvalidGrantTokenException" => Verdict::Denied,
        "NotFoundException" | "InvalidArnException" => Verdict::NoKey,
        "DisabledException" | "KMSInvalidStateException" | "InvalidKeyUsageException" => Verdict::Unusable,
        "InvalidCiphertextException" | "IncorrectKeyException" => Verdict::Refused,
        _ => by_status(status),
    };
    Problem { verdict, code, message: said.message }
}
