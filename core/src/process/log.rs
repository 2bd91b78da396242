//! Logs: to standard error, as the file says.

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::config::{Log, LogFormat};

/// Changes the level of a running process.
pub(super) struct Handle(Option<reload::Handle<EnvFilter, Registry>>);

/// Begins to log. A process that logs already (a test) goes on as it was.
pub(super) fn init(log: &Log) -> Handle {
    let (filter, handle) = reload::Layer::new(filter(log));
    let registry = tracing_subscriber::registry().with(filter);
    let is_terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let format =
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(is_terminal);
    let begun = match log.format {
        LogFormat::Text => registry.with(format).try_init(),
        LogFormat::Json => registry.with(format.json()).try_init(),
    };
    Handle(begun.is_ok().then_some(handle))
}

impl Handle {
    /// Takes the level of a reloaded file.
    pub(super) fn update(&self, log: &Log) {
        if let Some(handle) = &self.0
            && let Err(error) = handle.reload(filter(log))
        {
            tracing::error!(%error, "the log level cannot be changed");
        }
    }
}

/// The level was checked when the file was read.
fn filter(log: &Log) -> EnvFilter {
    EnvFilter::try_new(&*log.level).unwrap_or_else(|_| EnvFilter::new("info"))
}
