//! A vault in a folder, its configuration, and the built program beside it.

use std::path::PathBuf;
use std::process::Command;

use pgvault_core::crypto::slot::SlotDocument;
use pgvault_core::format::document;
use tempfile::TempDir;

use super::common::Ran;
use super::services::Service;

pub struct Site {
    pub folder: TempDir,
    pub environment: Vec<(String, String)>,
    /// Lines of `[vault]`.
    pub vault: String,
    /// Lines of `[vault.kms_options]`.
    pub options: String,
}

impl Site {
    /// A vault that is opened by `key`.
    pub fn new(service: &Service, key: &str) -> Self {
        Self {
            folder: TempDir::new().unwrap(),
            environment: service.environment.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect(),
            vault: format!("kms = '{key}'"),
            options: format!("endpoint = '{}'\nallow_http = true\ntimeout = '60s'", service.front.url()),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs pgvault with these arguments on the cluster `main`, with nothing of this process's environment.
    pub fn run(&self, arguments: &[&str]) -> Ran {
        let config = self.path("pgvault.toml");
        let vault = self.path("vault").to_str().unwrap().to_owned();
        let text =
            format!("[vault]\nurl = 'file://{vault}'\n{}\n[vault.kms_options]\n{}\n[cluster.main]\n", self.vault, self.options);
        // Others may be reading it.
        if std::fs::read_to_string(&config).ok().as_deref() != Some(&text) {
            std::fs::write(&config, text).unwrap();
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_pgvault"));
        let _ = command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", self.folder.path());
        let _ = command.env("PGVAULT_LOG", "debug").envs(self.environment.clone());
        let _ = command.arg("--config").arg(&config).args(["--output", "json"]).args(arguments);
        let output = command.output().unwrap();
        Ran {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            line: arguments.join(" "),
        }
    }

    /// Creates the vault and the cluster.
    pub fn init(&self) -> Ran {
        self.run(&["init", "--system-id", "7"]).ok()
    }

    /// Opens the cluster.
    pub fn open(&self) -> Ran {
        self.run(&["status"])
    }

    /// The slots in the vault, and where they are.
    pub fn slots(&self) -> Vec<(PathBuf, SlotDocument)> {
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(self.path("vault/c/main-7/keys")).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let read = |path: PathBuf| {
            let slot = document::parse("key slot", &std::fs::read(&path).unwrap()).unwrap();
            (path, slot)
        };
        files.into_iter().map(read).collect()
    }
}
