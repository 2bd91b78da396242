//! `tracing` events of the plugin, in the host's log. Spans are accepted and say nothing: the host's own
//! span of the exchange surrounds the call.

use std::fmt::{self, Write as _};

use tracing_core::field::{Field, Visit};
use tracing_core::span::{Attributes, Id, Record};
use tracing_core::{Event, Interest, Metadata, Subscriber, dispatcher::Dispatch};

use crate::{Host, Level};

/// Makes the host's log the library's subscriber, unless it has one.
pub(crate) fn install() {
    let _ = tracing_core::dispatcher::set_global_default(Dispatch::new(HostLog));
}

struct HostLog;

fn level(metadata: &Metadata<'_>) -> Level {
    match *metadata.level() {
        tracing_core::Level::ERROR => Level::Error,
        tracing_core::Level::WARN => Level::Warn,
        tracing_core::Level::INFO => Level::Info,
        tracing_core::Level::DEBUG => Level::Debug,
        tracing_core::Level::TRACE => Level::Trace,
    }
}

impl Subscriber for HostLog {
    /// The level may change at any time, and it is the current host's: ask each time.
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if metadata.is_event() { Interest::sometimes() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && Host::try_current().is_some_and(|host| host.logs(level(metadata)))
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let Some(host) = Host::try_current() else {
            return;
        };
        let mut line = Line { message: String::new(), fields: String::new() };
        event.record(&mut line);
        line.message.push_str(&line.fields);
        host.log(level(event.metadata()), event.metadata().target(), &line.message);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
        } else {
            self.record_debug(field, &value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string cannot fail; a `Debug` that fails leaves its field short.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
    }
}
