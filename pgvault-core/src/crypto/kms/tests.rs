//! The seal of a slot, byte for byte, and answers that no service gives.

use std::sync::Mutex;

use ::http::StatusCode;
use proptest::prelude::*;

use super::http::{Judge, Problem, Verdict};
use super::*;
use crate::ErrorKind;

const IDENTITY: Identity = Identity { vault_id: [1; 16], cluster_id: [2; 16], vault_document: [3; 32] };

/// A service that wraps nothing and gives back whatever it is told to.
#[derive(Debug)]
struct Parrot {
    name: KeyName,
    wrapped: Mutex<Vec<u8>>,
}

#[async_trait]
impl Kms for Parrot {
    fn name(&self) -> &KeyName {
        &self.name
    }

    async fn wrap(&self, key: &[u8; KEY_LEN], _: &Binding) -> Result<Wrapped> {
        *self.wrapped.lock().unwrap() = key.to_vec();
        Ok(Wrapped { version: String::new(), text: "vault:v1:x".into() })
    }

    async fn unwrap(&self, _: &Wrapped, _: &Binding) -> Result<Zeroizing<Vec<u8>>> {
        Ok(Zeroizing::new(self.wrapped.lock().unwrap().clone()))
    }
}

fn parrot(key: &[u8]) -> Parrot {
    Parrot { name: "vault-transit:transit/k".parse().unwrap(), wrapped: Mutex::new(key.to_vec()) }
}

fn text(of: &str) -> Wrapped {
    Wrapped { version: String::new(), text: of.into() }
}

/// Made with another implementation of AES-GCM, from docs/format.md.
#[tokio::test]
async fn the_seal_is_the_documented_one() {
    let kms = parrot(&[5; 32]);
    let binding = Binding::new(&IDENTITY, Ulid::from_bytes([4; 16]));
    let sealed = "D+tTmNtezFrJJgR3a9iqiTmjt7GFMcfWqOkhIRPMLORodQLo12YrY1n6xXXx8Cfv";
    let opened = open(&kms, &binding, &text("vault:v1:x"), sealed).await.unwrap();
    assert_eq!(*opened, [6; 32]);
    for other in [
        Binding::new(&Identity { vault_id: [9; 16], ..IDENTITY }, Ulid::from_bytes([4; 16])),
        Binding::new(&Identity { cluster_id: [9; 16], ..IDENTITY }, Ulid::from_bytes([4; 16])),
        Binding::new(&IDENTITY, Ulid::from_bytes([9; 16])),
    ] {
        assert_eq!(open(&kms, &other, &text("vault:v1:x"), sealed).await.unwrap_err().kind(), ErrorKind::Corrupt);
    }
    assert_eq!(open(&parrot(&[7; 32]), &binding, &text("vault:v1:x"), sealed).await.unwrap_err().kind(), ErrorKind::Corrupt);
}

#[tokio::test]
async fn what_is_sealed_opens_again_and_each_slot_has_a_key_of_its_own() {
    let (kms, env) = (parrot(&[]), Env::default());
    let master = MasterKey::generate(&env).unwrap();
    let binding = Binding::new(&IDENTITY, Ulid(1));
    let Method::Kms { slot_key, wrapped, .. } = seal(&kms, &env, &binding, &master).await.unwrap() else { panic!() };
    let first = kms.wrapped.lock().unwrap().clone();
    assert_eq!(*open(&kms, &binding, &text(&slot_key), &wrapped).await.unwrap(), *master.0);
    let _ = seal(&kms, &env, &binding, &master).await.unwrap();
    assert_ne!(*kms.wrapped.lock().unwrap(), first);
}

/// A store can hold anything; what no service made is not sent to one.
#[tokio::test]
async fn what_no_service_made_is_not_sent() {
    let binding = Binding::new(&IDENTITY, Ulid(1));
    let sealed = BASE64.encode([0; 48]);
    for slot_key in ["", "a b", "x\"", "é", "a\n", &"A".repeat(MAX_WRAPPED + 1)] {
        let error = open(&parrot(&[5; 32]), &binding, &text(slot_key), &sealed).await.unwrap_err();
        assert!(error.to_string().contains("no key service made"), "{error}");
    }
    for sealed in ["", "x", "AAAA"] {
        assert_eq!(open(&parrot(&[5; 32]), &binding, &text("A"), sealed).await.unwrap_err().kind(), ErrorKind::Corrupt);
    }
    for key in [&[][..], &[0; 31], &[0; 33]] {
        assert_eq!(open(&parrot(key), &binding, &text("A"), &sealed).await.unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn the_context_names_vault_cluster_and_slot() {
    let context = Binding::new(&IDENTITY, Ulid::from_bytes([4; 16])).context();
    assert_eq!(context["pgvault-vault"], Ulid::from_bytes([1; 16]).to_string());
    assert_eq!(context["pgvault-cluster"], "02".repeat(16));
    assert_eq!(context["pgvault-slot"], Ulid::from_bytes([4; 16]).to_string());
}

const JUDGES: [Judge; 5] = [aws::judge, azure::judge, azure::token::judge, gcp::judge, transit::judge];

proptest! {
    /// Whatever answers, there is a decision; and what says that it may pass by its status is not taken for good.
    #[test]
    fn every_answer_is_judged(status in 300u16..600, body in prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        "\\{\"(__type|error|errors)\": ?(\"[a-zA-Z#]{0,20}\"|\\[\"[a-z ]{0,20}\"\\]|\\{\"(code|status|message)\": ?\"[a-zA-Z ]{0,20}\"\\}|null|7)\\}"
            .prop_map(String::into_bytes),
    ]) {
        let status = StatusCode::from_u16(status).unwrap();
        for judge in JUDGES {
            let Problem { verdict, code, message } = judge(status, &body);
            prop_assert!(code.len() + message.len() <= body.len() + 200);
            if matches!(status.as_u16(), 429 | 500 | 503) {
                prop_assert_eq!(verdict, Verdict::Again);
            }
        }
    }

    /// A name is one that was written so, or none.
    #[test]
    fn every_text_is_a_name_or_none(text in "(aws-kms|azure-kv|gcp-kms|vault-transit|):?[ -~é]{0,60}") {
        if let Ok(name) = text.parse::<KeyName>() {
            let again: KeyName = name.to_string().parse().unwrap();
            prop_assert_eq!(&again, &name);
            prop_assert!(!name.key().contains("..") || name.key().split('/').all(|part| part != ".."));
        }
    }
}

/// Answers as the services document them, and as `LocalStack` and `OpenBao` were seen to give them.
#[test]
fn documented_answers_are_understood() {
    for (judge, status, body, verdict) in [
        (aws::judge as Judge, 400, r#"{"__type":"ThrottlingException","message":"Rate exceeded"}"#, Verdict::Again),
        (aws::judge, 500, r#"{"__type":"KMSInternalException","message":""}"#, Verdict::Again),
        (aws::judge, 400, r#"{"__type":"com.amazonaws.kms#NotFoundException","message":"x"}"#, Verdict::NoKey),
        (aws::judge, 409, r#"{"__type":"KMSInvalidStateException","message":"is pending deletion"}"#, Verdict::Unusable),
        (aws::judge, 400, r#"{"__type":"AccessDeniedException","Message":"x"}"#, Verdict::Denied),
        (aws::judge, 400, r#"{"__type":"InvalidCiphertextException"}"#, Verdict::Refused),
        (aws::judge, 400, r#"{"__type":"IncorrectKeyException","message":"x"}"#, Verdict::Refused),
        (aws::judge, 400, r#"{"__type":"ValidationException","message":"x"}"#, Verdict::Request),
        (
            azure::judge,
            403,
            r#"{"error":{"code":"Forbidden","message":"x","innererror":{"code":"ForbiddenByRbac"}}}"#,
            Verdict::Denied,
        ),
        (
            azure::judge,
            403,
            r#"{"error":{"code":"Forbidden","message":"Operation unwrapKey is not allowed on a disabled key."}}"#,
            Verdict::Unusable,
        ),
        (azure::judge, 404, r#"{"error":{"code":"KeyNotFound","message":"x"}}"#, Verdict::NoKey),
        (azure::judge, 400, r#"{"error":{"code":"BadParameter","message":"x"}}"#, Verdict::Refused),
        (azure::judge, 429, r#"{"error":{"code":"Throttled","message":"x"}}"#, Verdict::Again),
        (azure::token::judge, 400, r#"{"error":"unauthorized_client","error_description":"AADSTS700016: x"}"#, Verdict::Denied),
        (azure::token::judge, 400, r#"{"error":"temporarily_unavailable"}"#, Verdict::Again),
        (gcp::judge, 403, r#"{"error":{"code":403,"message":"x","status":"PERMISSION_DENIED"}}"#, Verdict::Denied),
        (
            gcp::judge,
            400,
            r#"{"error":{"code":400,"message":"Decryption failed: x","status":"INVALID_ARGUMENT"}}"#,
            Verdict::Refused,
        ),
        (
            gcp::judge,
            400,
            r#"{"error":{"code":400,"message":"x is not enabled","status":"FAILED_PRECONDITION"}}"#,
            Verdict::Unusable,
        ),
        (gcp::judge, 429, r#"{"error":{"code":429,"message":"Quota","status":"RESOURCE_EXHAUSTED"}}"#, Verdict::Again),
        (transit::judge, 503, r#"{"errors":["Vault is sealed"]}"#, Verdict::Again),
        (transit::judge, 412, r#"{"errors":["required index state not present"]}"#, Verdict::Again),
        (transit::judge, 403, r#"{"errors":["permission denied"]}"#, Verdict::Denied),
        (transit::judge, 400, r#"{"errors":["encryption key not found"]}"#, Verdict::NoKey),
        (transit::judge, 400, r#"{"errors":["cipher: message authentication failed"]}"#, Verdict::Refused),
        (
            transit::judge,
            400,
            r#"{"errors":["'[0].associated_data' provided for non-AEAD cipher suite rsa-2048"]}"#,
            Verdict::Unusable,
        ),
        (transit::judge, 404, r#"{"errors":["no handler for route \"x\""]}"#, Verdict::Request),
    ] {
        let problem = judge(StatusCode::from_u16(status).unwrap(), body.as_bytes());
        assert_eq!(problem.verdict, verdict, "{body}");
    }
}
