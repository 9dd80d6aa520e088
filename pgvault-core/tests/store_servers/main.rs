//! Stores of real servers: whether they conform, and what pgvault makes of what only a wire does.
//!
//! - `conforming`: the conformance suite on every server, and the refusal of those that overwrite.
//! - `answers`: those that must not be misunderstood, one by one.
//! - `wire`: a proxy between pgvault and a server, and each way in which a connection goes wrong.

#![expect(clippy::unwrap_used, reason = "a test")]

mod answers;
mod conforming;
mod wire;

use std::time::Duration;

use pgvault_core::store::{Settings, Store, StoreOptions};
use pgvault_teststores::{Kind, Place, Role, Server};

/// How a place is reached; through another address when one is given.
fn settings(server: &Server, endpoint: Option<&str>) -> Settings {
    let info = server.info();
    let key = info.key(Role::Owner).unwrap();
    let endpoint = Some(endpoint.unwrap_or(&info.endpoint).to_owned());
    let mut settings = Settings { allow_http: true, options: quick(), ..Settings::default() };
    match info.kind {
        Kind::Local => {}
        Kind::Azurite => {
            settings.azure.endpoint = endpoint;
            settings.azure.access_key = Some(key.secret.clone().into());
        }
        Kind::Gcs => {
            settings.gcs.endpoint = endpoint;
            settings.gcs.anonymous = true;
        }
        _ => {
            settings.s3.endpoint = endpoint;
            settings.s3.region = Some(info.region.clone());
            settings.s3.access_key_id = Some(key.id.clone());
            settings.s3.secret_access_key = Some(key.secret.clone().into());
        }
    }
    settings
}

/// Patient enough for a busy machine.
fn quick() -> StoreOptions {
    StoreOptions { backoff: Duration::from_millis(20), ..StoreOptions::default() }
}

fn open(server: &Server, place: &Place) -> Store {
    Store::open(&place.url(), settings(server, None)).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}
