//! A stand-in for Azure Key Vault and Microsoft Entra ID, written from their documentation; real RSA, and not Microsoft's server.
//!
//! Key Vault: `POST /keys/NAME[/VERSION]/{wrapkey,unwrapkey}?api-version=7.4`, base64url, `kid` in the answer, errors as in
//! <https://learn.microsoft.com/azure/key-vault/general/rest-error-codes>. Entra ID: client credentials by secret and by assertion,
//! and the endpoint of a managed identity.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rsa::{KeySize, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, OaepPublicEncryptingKey, PrivateDecryptingKey};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use serde_json::{Value, json};

use super::mini::{Mini, Reply, Seen};

pub const TENANT: &str = "72f988bf-86f1-41af-91ab-2d7cd011db47";
pub const SECRET: &str = "a~client&secret=1";
pub const ASSERTION: &str = "pod.token.signed";
pub const IDENTITY_HEADER: &str = "header-of-the-host";
const HOST: &str = "https://backups.vault.azure.net";

struct Version {
    id: String,
    key: PrivateDecryptingKey,
    enabled: bool,
}

#[derive(Default)]
struct State {
    keys: BTreeMap<String, Vec<Version>>,
    tokens: BTreeSet<String>,
    logins: u32,
}

/// The server and its keys.
#[derive(Clone)]
pub struct Azure {
    pub front: Mini,
    state: Arc<Mutex<State>>,
}

impl Azure {
    pub fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let served = state.clone();
        let front = Mini::start(move |seen| {
            let mut state = served.lock().unwrap();
            let (path, query) = seen.path.split_once('?').unwrap_or((&seen.path, ""));
            let query: BTreeMap<String, String> = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
            let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
            match (seen.method.as_str(), &parts[..]) {
                ("POST", [TENANT, "oauth2", "v2.0", "token"]) => login(&mut state, &seen.form()),
                ("GET", ["msi", "token"]) => managed(&mut state, seen, &query),
                ("POST", ["keys", name, verb]) => operate(&state, seen, &query, name, None, verb),
                ("POST", ["keys", name, version, verb]) => operate(&state, seen, &query, name, Some(version), verb),
                _ => error(404, "NotFound", "no such resource", None),
            }
        });
        Self { front, state }
    }

    /// A key, or a newer version of it.
    pub fn add_key(&self, name: &str) {
        let key = PrivateDecryptingKey::generate(KeySize::Rsa2048).unwrap();
        let mut state = self.state.lock().unwrap();
        let versions = state.keys.entry(name.into()).or_default();
        versions.push(Version { id: format!("{:032x}", 0x78de_ebed + versions.len()), key, enabled: true });
    }

    pub fn enable(&self, name: &str, enabled: bool) {
        self.state.lock().unwrap().keys.get_mut(name).unwrap().iter_mut().for_each(|version| version.enabled = enabled);
    }
}

fn grant(state: &mut State, client: &str) -> String {
    state.logins += 1;
    let token = format!("token-{}-{client}", state.logins);
    let _ = state.tokens.insert(token.clone());
    token
}

fn login(state: &mut State, form: &BTreeMap<String, String>) -> Reply {
    let field = |name: &str| form.get(name).map(String::as_str).unwrap_or_default();
    let refused = |status, error: &str, why: &str| {
        Reply::json(status, &json!({ "error": error, "error_description": why, "error_codes": [7_000_215] }))
    };
    if field("grant_type") != "client_credentials" || field("scope") != "https://vault.azure.net/.default" {
        return refused(400, "invalid_scope", "AADSTS70011: The provided value for the input parameter 'scope' is not valid.");
    }
    let proven = field("client_secret") == SECRET
        || (field("client_assertion_type") == "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
            && field("client_assertion") == ASSERTION);
    if !proven {
        return refused(401, "invalid_client", "AADSTS7000215: Invalid client secret provided.");
    }
    let token = grant(state, field("client_id"));
    Reply::json(200, &json!({ "token_type": "Bearer", "expires_in": 3599, "ext_expires_in": 3599, "access_token": token }))
}

fn managed(state: &mut State, seen: &Seen, query: &BTreeMap<String, String>) -> Reply {
    let right = seen.headers.get("x-identity-header").is_some_and(|header| header == IDENTITY_HEADER);
    if !right
        || query.get("resource").is_none_or(|resource| resource != "https://vault.azure.net")
        || query["api-version"] != "2019-08-01"
    {
        return Reply::json(
            400,
            &json!({ "error": "invalid_request", "error_description": "Required metadata header not specified" }),
        );
    }
    let token = grant(state, query.get("client_id").map_or("system", String::as_str));
    Reply::json(
        200,
        &json!({ "access_token": token, "expires_on": "1586984735", "resource": "https://vault.azure.net", "token_type": "Bearer" }),
    )
}

fn error(status: u16, code: &str, message: &str, inner: Option<&str>) -> Reply {
    let mut error = json!({ "code": code, "message": message });
    if let Some(inner) = inner {
        error["innererror"] = json!({ "code": inner });
    }
    Reply::json(status, &json!({ "error": error }))
}

fn operate(state: &State, seen: &Seen, query: &BTreeMap<String, String>, name: &str, version: Option<&str>, verb: &str) -> Reply {
    if !state.tokens.contains(seen.bearer()) {
        return error(401, "Unauthorized", "AKV10000: Request is missing a Bearer or PoP token.", None);
    }
    if seen.bearer().ends_with("powerless") {
        let why =
            "Caller is not authorized to perform action on resource.\r\nAction: 'Microsoft.KeyVault/vaults/keys/unwrap/action'";
        return error(403, "Forbidden", why, Some("ForbiddenByRbac"));
    }
    if query.get("api-version").is_none_or(|version| version != "7.4") {
        return error(400, "BadParameter", "The specified version () is not recognized.", None);
    }
    let versions = state.keys.get(name).map(Vec::as_slice).unwrap_or_default();
    let found = versions.iter().rev().find(|known| version.is_none_or(|version| version == known.id));
    let Some(found) = found else {
        return error(404, "KeyNotFound", &format!("A key with (name/id) {name} was not found in this key vault."), None);
    };
    if !found.enabled {
        return error(403, "Forbidden", &format!("Operation {verb} is not allowed on a disabled key."), Some("KeyDisabled"));
    }
    let body: Value = seen.json();
    let Some(value) =
        body["value"].as_str().and_then(|value| BASE64URL.decode(value).ok()).filter(|_| body["alg"] == "RSA-OAEP-256")
    else {
        return error(400, "BadParameter", "Property has invalid value", None);
    };
    let result = match verb {
        "wrapkey" => {
            let key = OaepPublicEncryptingKey::new(found.key.public_key()).unwrap();
            let mut out = vec![0; key.ciphertext_size()];
            key.encrypt(&OAEP_SHA256_MGF1SHA256, &value, &mut out, None).map(|bytes| bytes.to_vec())
        }
        "unwrapkey" => {
            let der = AsDer::<aws_lc_rs::encoding::Pkcs8V1Der<'_>>::as_der(&found.key).unwrap();
            let key = OaepPrivateDecryptingKey::new(PrivateDecryptingKey::from_pkcs8(der.as_ref()).unwrap()).unwrap();
            let mut out = vec![0; key.min_output_size()];
            key.decrypt(&OAEP_SHA256_MGF1SHA256, &value, &mut out, None).map(|bytes| bytes.to_vec())
        }
        _ => return error(404, "NotFound", "no such operation", None),
    };
    match result {
        Ok(bytes) => {
            Reply::json(200, &json!({ "kid": format!("{HOST}/keys/{name}/{}", found.id), "value": BASE64URL.encode(bytes) }))
        }
        Err(_) => error(400, "BadParameter", "The parameter is incorrect.\r\n", None),
    }
}
