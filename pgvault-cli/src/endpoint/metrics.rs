//! The metrics of a stream. The gauges are read when they are asked for; only what happens between two questions is counted here.

use std::sync::Arc;

use jiff::Timestamp;
use pgvault_core::store::{Requests, Store};
use pgvault_core::wal::stream::{StreamEvent, StreamState};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

/// What is counted.
#[derive(Debug, Clone)]
pub(crate) struct StreamMetrics {
    cluster: Arc<str>,
    /// It counts its requests.
    store: Store,
    /// Seconds from the arrival of WAL to its being durable in the vault.
    flushes: Histogram,
}

impl StreamMetrics {
    pub(crate) fn new(cluster: impl Into<Arc<str>>, store: Store) -> Self {
        // 1 ms to 65 s.
        Self { cluster: cluster.into(), store, flushes: Histogram::new(exponential_buckets(0.001, 2.0, 17)) }
    }

    pub(crate) fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Counts what an event says.
    pub(crate) fn observe(&self, event: &StreamEvent) {
        if let StreamEvent::Durable { waited, .. } = event
            && !waited.is_zero()
        {
            self.flushes.observe(waited.as_secs_f64());
        }
    }

    /// Everything as `OpenMetrics` text.
    pub(crate) fn text(&self, state: &StreamState, now: Timestamp) -> String {
        let mut registry =
            Registry::with_prefix_and_labels("pgvault", [("cluster".into(), self.cluster.to_string().into())].into_iter());
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The program", build);
        registry.register_with_unit(
            "wal_flush",
            "Time from the arrival of WAL to its being durable in the vault",
            Unit::Seconds,
            self.flushes.clone(),
        );
        registry.register_collector(Box::new(Snapshot { state: state.clone(), requests: self.store.requests(), now }));
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = text::encode(&mut out, &registry);
        out
    }
}

/// The state at the moment of the question.
#[derive(Debug)]
struct Snapshot {
    state: StreamState,
    requests: Requests,
    now: Timestamp,
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let state = &self.state;
        let whole = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let lag = state.lag(self.now).as_secs_f64();
        let mut gauge = |name: &str,
                         help: &str,
                         metric: &dyn Fn(prometheus_client::encoding::MetricEncoder<'_>) -> std::fmt::Result,
                         kind| { metric(encoder.encode_descriptor(name, help, None, kind)?) };
        let mut number = |name: &str, help: &str, value: i64| {
            let metric = ConstGauge::new(value);
            gauge(name, help, &|encoder| metric.encode(encoder), metric.metric_type())
        };
        number("wal_stream_connected", "1 while WAL is being received", i64::from(state.connected))?;
        number("wal_server_lsn_bytes", "End of the server's WAL", whole(state.server.0))?;
        number("wal_received_lsn_bytes", "End of the WAL that has arrived", whole(state.received.0))?;
        number("wal_spooled_lsn_bytes", "End of the WAL that is durable in the spool", whole(state.spooled.0))?;
        number("wal_durable_lsn_bytes", "End of the WAL that is durable in the vault", whole(state.durable.0))?;
        number("wal_archive_lag_bytes", "WAL of the server that is not in the vault", whole(state.lag_bytes()))?;
        number("wal_gaps", "Holes that no server can fill, found since the start", whole(state.gaps))?;
        number("wal_store_trouble", "1 while the store does not take WAL", i64::from(state.store_trouble.is_some()))?;
        if let Some(retention) = &state.retention {
            number("slot_retained_bytes", "WAL that the server keeps for the slot", whole(retention.retained))?;
            number("slot_lost", "1 when the server has given up WAL of the slot", i64::from(!retention.held))?;
            if let Some(safe) = retention.safe {
                number("slot_safe_bytes", "WAL that can be written before the slot may lose some", whole(safe))?;
            }
            if let Some(free) = retention.disk_free {
                number("slot_disk_free_bytes", "Free bytes of the disk of pg_wal", whole(free))?;
            }
        }
        let seconds = ConstGauge::new(lag);
        gauge(
            "wal_archive_lag_seconds",
            "Age of the oldest WAL that is not in the vault; of the connection's loss while there is none",
            &|encoder| seconds.encode(encoder),
            seconds.metric_type(),
        )?;
        gauge(
            "rpo_seconds",
            "What would be missing if the server were lost now, in time",
            &|mut encoder| seconds.encode(encoder.encode_family(&[("kind", "wal")])?),
            seconds.metric_type(),
        )?;
        let requests = &self.requests;
        let mut family = encoder.encode_descriptor(
            "store_requests",
            "Requests to the object store, repeated ones included",
            None,
            prometheus_client::metrics::MetricType::Counter,
        )?;
        for (kind, value) in [
            ("put", requests.put),
            ("get", requests.get),
            ("head", requests.head),
            ("list", requests.list),
            ("delete", requests.delete),
            ("other", requests.other),
        ] {
            ConstCounter::new(value).encode(family.encode_family(&[("kind", kind)])?)?;
        }
        let mut gauge = |name: &str,
                         help: &str,
                         metric: &dyn Fn(prometheus_client::encoding::MetricEncoder<'_>) -> std::fmt::Result,
                         kind| { metric(encoder.encode_descriptor(name, help, None, kind)?) };
        for (name, help, value) in [
            ("store_retries", "Requests to the object store that repeated one that had failed", requests.retried),
            ("store_throttled", "Answers with which the object store asked for fewer requests", requests.throttled),
            ("store_sent_bytes", "Bytes of objects sent to the store", requests.bytes_sent),
            ("store_received_bytes", "Bytes of objects received from the store", requests.bytes_received),
            ("wal_archived_segments", "Whole segments stored", state.segments),
            ("wal_archived_parts", "Parts of segments stored", state.parts),
            ("wal_archive_failures", "PUTs that failed", state.store_failures),
            ("wal_connection_failures", "Connections that were lost or could not be made", state.connection_failures),
            ("wal_keepalives", "Questions of the server that wanted an answer at once", state.keepalives),
        ] {
            let metric = ConstCounter::new(value);
            gauge(name, help, &|encoder| metric.encode(encoder), metric.metric_type())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgvault_core::postgres::{Lsn, TimelineId};

    #[test]
    fn what_is_exported_says_where_the_stream_stands() {
        let metrics = StreamMetrics::new("main-1", Store::in_memory());
        let waited = std::time::Duration::from_millis(30);
        metrics.observe(&StreamEvent::Durable { to: Lsn(5), timeline: TimelineId(1), waited });
        let now: Timestamp = "2026-11-21T12:00:00Z".parse().unwrap();
        let state = StreamState {
            connected: true,
            server: Lsn(0x300),
            received: Lsn(0x200),
            durable: Lsn(0x100),
            waiting_since: Some(now - jiff::SignedDuration::from_millis(1500)),
            segments: 7,
            ..StreamState::default()
        };
        let text = metrics.text(&state, now);
        for line in [
            "pgvault_wal_durable_lsn_bytes{cluster=\"main-1\"} 256",
            "pgvault_wal_archive_lag_bytes{cluster=\"main-1\"} 512",
            "pgvault_wal_archive_lag_seconds{cluster=\"main-1\"} 1.5",
            "pgvault_wal_archived_segments_total{cluster=\"main-1\"} 7",
            "pgvault_wal_flush_seconds_count{cluster=\"main-1\"} 1",
            "pgvault_rpo_seconds{cluster=\"main-1\",kind=\"wal\"} 1.5",
            "pgvault_store_requests_total{cluster=\"main-1\",kind=\"put\"} 0",
            "pgvault_store_retries_total{cluster=\"main-1\"} 0",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(text.contains("pgvault_build_info{"), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }
}
