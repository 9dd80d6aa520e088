//! A stand-in for Google Cloud KMS, written from its documentation; real AES-GCM, real checks of the service account's signature,
//! and not Google's server.
//!
//! `POST /v1/projects/*/locations/*/keyRings/*/cryptoKeys/*:{encrypt,decrypt}` with CRC-32C both ways; errors are
//! `google.rpc.Status`. A service account signs its own token (<https://google.aip.dev/auth/4111>).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD as BASE64, URL_SAFE_NO_PAD as BASE64URL};
use serde_json::{Value, json};

use super::mini::{Mini, Reply, Seen};

pub const RING: &str = "projects/p-1/locations/europe-west3/keyRings/backups/cryptoKeys";

struct Key {
    bytes: [u8; 32],
    enabled: bool,
}

#[derive(Default)]
struct State {
    keys: BTreeMap<String, Key>,
    /// Public keys of service accounts, by their addresses.
    accounts: BTreeMap<String, Vec<u8>>,
}

/// The server and its keys.
#[derive(Clone)]
pub struct Gcp {
    pub front: Mini,
    state: Arc<Mutex<State>>,
}

impl Gcp {
    pub fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let served = state.clone();
        let front = Mini::start(move |seen| operate(&served.lock().unwrap(), seen));
        Self { front, state }
    }

    pub fn add_key(&self, name: &str) {
        let mut bytes = [0; 32];
        aws_lc_rs::rand::fill(&mut bytes).unwrap();
        let _ = self.state.lock().unwrap().keys.insert(format!("{RING}/{name}"), Key { bytes, enabled: true });
    }

    pub fn enable(&self, name: &str, enabled: bool) {
        self.state.lock().unwrap().keys.get_mut(&format!("{RING}/{name}")).unwrap().enabled = enabled;
    }

    /// Writes the file of a service account; one called `powerless` may do nothing.
    pub fn account(&self, name: &str, file: &Path) {
        let pair = KeyPair::generate(KeySize::Rsa2048).unwrap();
        let der = AsDer::<aws_lc_rs::encoding::Pkcs8V1Der<'_>>::as_der(&pair).unwrap();
        let pem = BASE64
            .encode(der.as_ref())
            .as_bytes()
            .chunks(64)
            .fold(String::new(), |pem, line| pem + str::from_utf8(line).unwrap() + "\n");
        let email = format!("{name}@p-1.iam.gserviceaccount.com");
        let account = json!({
            "type": "service_account", "project_id": "p-1", "private_key_id": "1f2e3d", "client_email": email, "client_id": "1",
            "private_key": format!("-----BEGIN PRIVATE KEY-----\n{pem}-----END PRIVATE KEY-----\n"),
            "auth_uri": "https://accounts.google.com/o/oauth2/auth", "token_uri": "https://oauth2.googleapis.com/token",
        });
        std::fs::write(file, account.to_string()).unwrap();
        let _ = self.state.lock().unwrap().accounts.insert(email, pair.public_key().as_ref().to_vec());
    }
}

fn error(code: u16, status: &str, message: &str) -> Reply {
    Reply::json(code, &json!({ "error": { "code": code, "message": message, "status": status } }))
}

/// Who asks, when the token is one that they signed for this platform.
fn caller(state: &State, seen: &Seen) -> Option<String> {
    let mut parts = seen.bearer().rsplitn(2, '.');
    let (signature, signed) = (BASE64URL.decode(parts.next()?).ok()?, parts.next()?);
    let decode = |part: &str| serde_json::from_slice::<Value>(&BASE64URL.decode(part).ok()?).ok();
    let (header, claims) = signed.split_once('.')?;
    let (header, claims) = (decode(header)?, decode(claims)?);
    let email = claims["iss"].as_str()?;
    let lives = claims["exp"].as_i64()? - claims["iat"].as_i64()?;
    let right = header["alg"] == "RS256"
        && header["kid"] == "1f2e3d"
        && claims["sub"] == email
        && claims["scope"] == "https://www.googleapis.com/auth/cloud-platform"
        && (1..=3600).contains(&lives);
    let public = state.accounts.get(email)?;
    UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, public).verify(signed.as_bytes(), &signature).ok()?;
    right.then(|| email.to_owned())
}

fn operate(state: &State, seen: &Seen) -> Reply {
    let Some(caller) = caller(state, seen) else {
        return error(401, "UNAUTHENTICATED", "Request had invalid authentication credentials. Expected OAuth 2 access token.");
    };
    let Some((name, verb)) = seen.path.strip_prefix("/v1/").and_then(|path| path.split_once(':')) else {
        return error(404, "NOT_FOUND", "no such method");
    };
    if caller.starts_with("powerless") {
        let why =
            format!("Permission 'cloudkms.cryptoKeyVersions.useToDecrypt' denied on resource '{name}' (or it may not exist).");
        return error(403, "PERMISSION_DENIED", &why);
    }
    let Some(key) = state.keys.get(name) else { return error(404, "NOT_FOUND", &format!("CryptoKey {name} not found.")) };
    if !key.enabled {
        let why = format!("{name}/cryptoKeyVersions/1 is not enabled, current state is: DISABLED.");
        return error(400, "FAILED_PRECONDITION", &why);
    }
    let body: Value = seen.json();
    let field = |name: &str| body[name].as_str().and_then(|text| BASE64.decode(text).ok());
    let has_crc = |name: &str, bytes: &[u8]| body[name].as_str() == Some(crc32c::crc32c(bytes).to_string().as_str());
    let aad = field("additionalAuthenticatedData").unwrap_or_default();
    let aad_right = has_crc("additionalAuthenticatedDataCrc32c", &aad);
    let cipher = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key.bytes).unwrap());
    match (verb, field("plaintext"), field("ciphertext")) {
        ("encrypt", Some(plain), None) => {
            let verified = has_crc("plaintextCrc32c", &plain);
            let mut nonce = [0; NONCE_LEN];
            aws_lc_rs::rand::fill(&mut nonce).unwrap();
            let mut sealed = plain;
            cipher.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(&aad), &mut sealed).unwrap();
            let text = [&nonce[..], &sealed].concat();
            Reply::json(
                200,
                &json!({
                    "name": format!("{name}/cryptoKeyVersions/1"), "protectionLevel": "SOFTWARE",
                    "ciphertext": BASE64.encode(&text), "ciphertextCrc32c": crc32c::crc32c(&text).to_string(),
                    "verifiedPlaintextCrc32c": verified, "verifiedAdditionalAuthenticatedDataCrc32c": aad_right,
                }),
            )
        }
        ("decrypt", None, Some(mut bytes)) if bytes.len() > NONCE_LEN && aad_right => {
            let mut sealed = bytes.split_off(NONCE_LEN);
            let nonce = Nonce::assume_unique_for_key(bytes.try_into().unwrap());
            match cipher.open_in_place(nonce, Aad::from(&aad), &mut sealed) {
                Ok(plain) => Reply::json(
                    200,
                    &json!({
                        "plaintext": BASE64.encode(&plain), "plaintextCrc32c": crc32c::crc32c(plain).to_string(),
                        "usedPrimary": true, "protectionLevel": "SOFTWARE",
                    }),
                ),
                Err(_) => error(400, "INVALID_ARGUMENT", "Decryption failed: verify that 'name' refers to the correct CryptoKey."),
            }
        }
        _ => error(400, "INVALID_ARGUMENT", "Request contains an invalid argument."),
    }
}
