//! What a running stream shows over HTTP: metrics for Prometheus, a status for people and scripts, and health for supervisors.
//!
//! - `/metrics`: `OpenMetrics` text.
//! - `/status`: where the stream stands, as JSON.
//! - `/healthz`: 200 while the process serves; a supervisor restarts it otherwise.
//! - `/readyz`: 200 while WAL flows, 503 with the reason when it does not.
//!
//! Nothing here changes anything or shows a secret; there is no protection, so it belongs on loopback or a pod's own network.

pub(crate) mod metrics;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json};
use axum::routing::get;
use axum::{Router, serve};
use jiff::Timestamp;
use pgvault_core::wal::stream::{Pressure, StreamState};
use pgvault_core::{Error, ErrorKind, Result};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use metrics::StreamMetrics;

/// A served endpoint; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) address: SocketAddr,
    task: JoinHandle<()>,
}

#[derive(Debug, Clone)]
struct Served {
    metrics: StreamMetrics,
    state: watch::Receiver<StreamState>,
    /// How far behind the vault may be.
    patience: Duration,
}

impl Endpoint {
    /// Listens on `address`.
    pub(crate) async fn open(
        address: &str,
        metrics: &StreamMetrics,
        state: watch::Receiver<StreamState>,
        flush_interval: Duration,
    ) -> Result<Self> {
        let failed = |e: std::io::Error| {
            Error::new(ErrorKind::Usage, "metrics.listen", format!("listen on {address}: {e}"))
                .with_hint("choose a free port of this machine, such as 127.0.0.1:9187")
        };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let served = Served { metrics: metrics.clone(), state, patience: (flush_interval * 3).max(Duration::from_secs(30)) };
        let router = Router::new()
            .route("/metrics", get(show_metrics))
            .route("/status", get(show_status))
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(show_readiness))
            .with_state(Arc::new(served));
        let task = tokio::spawn(async move {
            if let Err(error) = serve(listener, router).await {
                tracing::warn!(%error, "the metrics endpoint ended");
            }
        });
        Ok(Self { address, task })
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn show_metrics(State(served): State<Arc<Served>>) -> impl IntoResponse {
    let text = served.metrics.text(&served.state.borrow(), Timestamp::now());
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
}

/// The status, with what a reader would work out from it.
#[derive(Serialize)]
struct Status<'a> {
    cluster: &'a str,
    version: &'static str,
    #[serde(flatten)]
    state: &'a StreamState,
    lag_bytes: u64,
    lag_seconds: f64,
    pressure: Option<Pressure>,
    trouble: Vec<String>,
}

async fn show_status(State(served): State<Arc<Served>>) -> impl IntoResponse {
    let state = served.state.borrow().clone();
    let now = Timestamp::now();
    let status = Status {
        cluster: served.metrics.cluster(),
        version: env!("CARGO_PKG_VERSION"),
        lag_bytes: state.lag_bytes(),
        lag_seconds: state.lag(now).as_secs_f64(),
        pressure: state.retention.map(|retention| retention.pressure()),
        trouble: trouble(&state, now, served.patience),
        state: &state,
    };
    Json(serde_json::to_value(&status).unwrap_or_default())
}

async fn show_readiness(State(served): State<Arc<Served>>) -> impl IntoResponse {
    let trouble = trouble(&served.state.borrow(), Timestamp::now(), served.patience);
    if trouble.is_empty() {
        (StatusCode::OK, "ok\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, trouble.join("\n") + "\n")
    }
}

/// Why WAL does not flow; nothing when it does.
fn trouble(state: &StreamState, now: Timestamp, patience: Duration) -> Vec<String> {
    let mut trouble = Vec::new();
    if !state.connected {
        let why = state.connection_trouble.as_deref().map_or(String::new(), |why| format!(": {why}"));
        trouble.push(format!("not connected to PostgreSQL{why}"));
    }
    if let Some(why) = &state.store_trouble {
        trouble.push(format!("the store does not take WAL: {why}"));
    }
    if state.lag(now) > patience {
        trouble.push(format!("the vault is {} s behind", state.lag(now).as_secs()));
    }
    if state.retention.is_some_and(|retention| retention.pressure() == Pressure::Lost) {
        trouble.push("the server has given up WAL that is not in the vault".into());
    }
    trouble
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_named() {
        let now: Timestamp = "2026-11-21T12:00:00Z".parse().unwrap();
        let of = |state: &StreamState| trouble(state, now, Duration::from_secs(30)).join("; ");
        let good = StreamState { connected: true, ..StreamState::default() };
        assert_eq!(of(&good), "");
        let since = now - jiff::SignedDuration::from_secs(31);
        assert_eq!(of(&StreamState { waiting_since: Some(since), ..good.clone() }), "the vault is 31 s behind");
        let down = StreamState { store_trouble: Some("disk full".into()), ..good.clone() };
        assert_eq!(of(&down), "the store does not take WAL: disk full");
        let away =
            StreamState { connection_trouble: Some("refused".into()), disconnected_since: Some(since), ..StreamState::default() };
        assert_eq!(of(&away), "not connected to PostgreSQL: refused; the vault is 31 s behind");
    }
}
