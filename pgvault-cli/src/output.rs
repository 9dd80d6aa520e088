//! Everything that reaches a terminal or a pipe.

use std::fmt::{Display, Write as _};
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex, OnceLock};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pgvault_core::Error;
use pgvault_core::progress::Progress;
use pgvault_core::store::{Requests, Store};
use serde::Serialize;

use crate::args::{LogFormat, OutputFormat};
use crate::exit;

/// Sends the log to standard error.
pub(crate) fn start_logging(format: LogFormat) {
    let filter =
        tracing_subscriber::EnvFilter::try_from_env("PGVAULT_LOG").unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.with_target(false).with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
}

/// The store of a command, once it has one: its requests are part of the summary.
#[derive(Debug, Clone, Default)]
pub(crate) struct Meter(Arc<OnceLock<Store>>);

impl Meter {
    pub(crate) fn watch(&self, store: &Store) {
        let _ = self.0.set(store.clone());
    }

    /// What the store was asked; `None` for a command that asked no store.
    pub(crate) fn requests(&self) -> Option<Requests> {
        self.0.get().map(Store::requests)
    }
}

/// Prints results in the chosen format.
#[derive(Debug)]
pub(crate) struct Printer {
    format: OutputFormat,
    meter: Meter,
}

impl Printer {
    pub(crate) fn new(format: OutputFormat, meter: Meter) -> Self {
        Self { format, meter }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.format == OutputFormat::Json
    }

    /// A line for people; nothing with JSON output.
    pub(crate) fn line(&self, text: impl Display) {
        if !self.is_json() {
            write_line(&text.to_string());
        }
    }

    /// A warning, on standard error.
    #[expect(clippy::unused_self, reason = "all output goes through the printer, whatever its format")]
    pub(crate) fn warn(&self, text: impl Display) {
        let _ = writeln!(std::io::stderr(), "warning: {text}");
    }

    /// The summary object: the last line of JSON output.
    pub(crate) fn summary<T: Serialize>(&self, value: &T) {
        if !self.is_json() {
            return;
        }
        let mut value = serde_json::to_value(value).unwrap_or_default();
        if let (Some(object), Some(requests)) = (value.as_object_mut(), self.meter.requests()) {
            let _ = object.insert("requests".into(), serde_json::json!(requests));
        }
        write_line(&value.to_string());
    }

    /// An error: for people on standard error, and as the summary with JSON output.
    pub(crate) fn error(&self, error: &Error) {
        let mut text = format!("error: {error} [{}]\n", error.code());
        if let Some(hint) = error.hint() {
            let _ = writeln!(text, "hint: {hint}");
        }
        let _ = std::io::stderr().write_all(text.as_bytes());
        self.summary(&serde_json::json!({
            "error": { "code": error.code(), "message": error.to_string(), "hint": error.hint(), "exit_code": exit::of(error) }
        }));
    }

    /// A progress bar, when somebody can see it.
    pub(crate) fn progress(&self) -> std::sync::Arc<dyn Progress> {
        if self.is_json() || !std::io::stderr().is_terminal() {
            return std::sync::Arc::new(pgvault_core::progress::Silent);
        }
        std::sync::Arc::new(Bar(Mutex::new(ProgressBar::hidden())))
    }
}

/// A reader that went away is no error: `pgvault list | head` ends quietly.
fn write_line(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush());
}

#[derive(Debug)]
struct Bar(Mutex<ProgressBar>);

impl Progress for Bar {
    fn phase(&self, name: &'static str, total: Option<u64>) {
        let bar = match total {
            Some(total) => ProgressBar::new(total)
                .with_style(style("{msg:10} {wide_bar} {bytes:>10} / {total_bytes:10} {binary_bytes_per_sec:>12} {eta:>4}")),
            None => ProgressBar::new_spinner().with_style(style("{msg:10} {spinner} {elapsed}")),
        };
        bar.set_draw_target(ProgressDrawTarget::stderr());
        bar.set_message(name);
        bar.enable_steady_tick(std::time::Duration::from_millis(200));
        let before = std::mem::replace(&mut *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner), bar);
        before.finish_and_clear();
    }

    fn advance(&self, bytes: u64) {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).inc(bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// A word of a command that people copy into a shell.
pub(crate) fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "._-/=:,@+".contains(c);
    // One that begins with a dash would be taken for an option.
    if !word.is_empty() && word.chars().all(plain) && !word.starts_with('-') {
        return word.to_owned();
    }
    let quoted = format!("'{}'", word.replace('\'', "'\\''"));
    if word.starts_with('-') { format!("./{quoted}") } else { quoted }
}

/// Bytes for people.
pub(crate) fn bytes(count: u64) -> indicatif::BinaryBytes {
    indicatif::BinaryBytes(count)
}
