//! Protocol plugins: which are loaded, which serves a `protocol_type`, and calls into them.
//!
//! The rest of core sees [`Plugins`], [`Protocol`] and [`Call`] and lends its objects by the traits
//! of [`lend`]. Only `loader`, `host` and `vtable` dereference a plugin's pointers.

pub mod lend;

mod error;
mod generation;
#[allow(unsafe_code, reason = "lends services across the plugin ABI")]
mod host;
#[allow(unsafe_code, reason = "maps libraries and reads their stamp")]
mod loader;
mod registry;
mod stamp;
#[allow(unsafe_code, reason = "turns objects across the plugin ABI")]
mod vtable;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sidelane_abi as abi;

pub use error::{ConfigFault, LoadError, LoadFault};
pub use generation::GenerationState;
pub use host::{HostContext, Labels, MetricSink, current_shard, enter_shard};
pub use loader::LIBRARY_BYTES_MAX;
pub use registry::{Applied, GenerationInfo, Plugins, SniffResult};
pub use stamp::Stamp;
pub use vtable::call::{Call, CallEnd};
pub use vtable::http::PreparedHead;

use generation::{ExchangePin, Generation, ServedType};

/// A plugin as the configuration names it.
#[derive(Clone, Debug)]
pub struct PluginSpec {
    /// Its name in the configuration, logs and metrics.
    pub name: String,
    /// The library's path.
    pub library: PathBuf,
    /// The content that the library must have.
    pub sha256: Option<[u8; 32]>,
    /// Whether the configuration is refused where this plugin cannot be loaded.
    pub required: bool,
    /// Its own block; `Null`: none.
    pub config: serde_json::Value,
    /// The types to serve of those it could; `None`: all.
    pub types: Option<Vec<String>>,
}

/// Bounds on plugins.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most distinct libraries in the process's life: they stay mapped, at about 1 MB each.
    pub generations_max: usize,
    /// As many panics within the window put a generation in quarantine.
    pub panics_max: u32,
    /// Over which panics are counted.
    pub panics_window: Duration,
    /// A poll that takes longer is logged: it holds up every exchange of its thread.
    pub slow_poll: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            generations_max: 8,
            panics_max: 10,
            panics_window: Duration::from_secs(60),
            slow_poll: Duration::from_millis(50),
        }
    }
}

/// How exchanges of a type come into being at the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Born {
    /// From requests of the HTTP front.
    Http,
    /// From bytes of a listener.
    Bytes,
}

/// Reads and judges a library without loading it.
pub fn inspect(path: &Path) -> Result<Stamp, LoadError> {
    loader::read(path, None).map(|image| image.stamp).map_err(|fault| LoadError {
        plugin: String::new(),
        library: path.to_owned(),
        fault,
    })
}

/// A `protocol_type` as one plugin generation serves it. Pins the generation: hold it for an
/// exchange, look it up again for the next.
#[derive(Clone)]
pub struct Protocol {
    generation: Arc<Generation>,
    /// Place among the generation's served types.
    place: usize,
}

impl std::fmt::Debug for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Protocol")
            .field("name", self.name())
            .field("plugin", self.plugin_name())
            .field("version", &self.plugin_version())
            .finish()
    }
}

impl Protocol {
    fn served(&self) -> &ServedType {
        &self.generation.types[self.place]
    }

    fn pin(&self) -> ExchangePin {
        ExchangePin::new(Arc::clone(&self.generation))
    }

    /// The `protocol_type`.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.served().name
    }

    /// How its exchanges come into being.
    #[must_use]
    pub fn born(&self) -> Born {
        self.served().born
    }

    /// The serving plugin's name in the configuration.
    #[must_use]
    pub fn plugin_name(&self) -> &Arc<str> {
        &self.generation.name
    }

    /// The serving plugin's version.
    #[must_use]
    pub fn plugin_version(&self) -> &str {
        &self.generation.record.version
    }

    /// Whether the plugin has panicked too often: its routes answer 503, by core's own words.
    #[must_use]
    pub fn quarantined(&self) -> bool {
        self.generation.record.quarantined()
    }

    /// Relay's end of an HTTP-born exchange.
    pub fn accept_http(
        &self,
        head: PreparedHead,
        meta: lend::Meta,
        body: impl lend::Body,
        responder: impl lend::Responder,
        opener: impl lend::Opener,
    ) -> Call {
        let (instance, index) = (self.generation.instance(), self.served().index);
        instance.accept_http(self.pin(), index, head, meta, (body, responder), opener)
    }

    /// Relay's end of a byte-born exchange.
    pub fn accept_stream(
        &self,
        meta: lend::Meta,
        client: impl lend::Stream,
        opener: impl lend::Opener,
    ) -> Call {
        let (instance, index) = (self.generation.instance(), self.served().index);
        instance.accept_stream(self.pin(), index, meta, Box::new(client), opener)
    }

    /// Sidecar's end of an exchange.
    pub fn deliver(
        &self,
        meta: lend::Meta,
        send: impl lend::SendHalf,
        recv: impl lend::RecvHalf,
        service: impl lend::Service,
    ) -> Call {
        let (instance, index) = (self.generation.instance(), self.served().index);
        instance.deliver(self.pin(), index, meta, (send, recv), service)
    }

    /// Says `failure` to an HTTP client in the protocol's words.
    pub fn refuse_http(
        &self,
        head: PreparedHead,
        responder: impl lend::Responder,
        failure: lend::Failure,
    ) -> Call {
        let (instance, index) = (self.generation.instance(), self.served().index);
        instance.refuse_http(self.pin(), index, head, responder, failure)
    }

    /// Says `failure` on a byte stream in the protocol's words.
    pub fn refuse_stream(&self, client: impl lend::Stream, failure: lend::Failure) -> Call {
        let (instance, index) = (self.generation.instance(), self.served().index);
        instance.refuse_stream(self.pin(), index, Box::new(client), failure)
    }
}

fn born_of(born: u32) -> Born {
    if born == abi::born::HTTP { Born::Http } else { Born::Bytes }
}
