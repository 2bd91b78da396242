//! The rules every plugin keeps, whatever its language: what a library must answer, survive and give
//! back. Loads the library as the host does, without the host.

use std::path::Path;
use std::time::Duration;

use sidelane_plugin::ffi::abi;
use sidelane_plugin::{Reset, failure};

use crate::kit::{Kit, Outcome, TestFailure, TestMeta, TestRequest};
use crate::{TestService, host::plugin::Instance};

/// Checks the plugin library at `path`, configured with no block of its own.
///
/// # Errors
/// The rules that it breaks, one line each.
pub fn run(path: &Path) -> Result<(), Vec<String>> {
    run_with(path, &serde_json::Value::Null)
}

/// Checks the plugin library at `path` with a configuration that it accepts.
///
/// # Errors
/// The rules that it breaks, one line each.
pub fn run_with(path: &Path, config: &serde_json::Value) -> Result<(), Vec<String>> {
    let stamp = load(path).map_err(|error| vec![error])?;
    let mut suite = Suite { vt: None, config: config.to_string(), broken: Vec::new() };
    suite.check_stamp(stamp);
    if suite.broken.is_empty() {
        suite.check_plugin();
    }
    if suite.broken.is_empty() { Ok(()) } else { Err(suite.broken) }
}

/// Returns the functions of the plugin library at `path`.
pub(crate) fn functions(path: &Path) -> Result<&'static abi::PluginVt, String> {
    let mut suite = Suite { vt: None, config: String::new(), broken: Vec::new() };
    suite.check_stamp(load(path)?);
    suite.vt.filter(|_| suite.broken.is_empty()).ok_or_else(|| suite.broken.join("; "))
}

/// Maps the library for good: its code is never unloaded.
#[allow(
    unsafe_code,
    reason = "loading a library runs its constructors and trusts its symbol's type"
)]
fn load(path: &Path) -> Result<&'static abi::Stamp, String> {
    // SAFETY: a plugin has no constructors that need anything (docs/plugin-guide.md).
    let library = unsafe { libloading::Library::new(path) }
        .map_err(|error| format!("{}: {}", path.display(), cause(&error)))?;
    let library = Box::leak(Box::new(library));
    // SAFETY: the symbol is data; its magic and size are checked before anything else of it is used.
    let symbol = unsafe { library.get::<*const abi::Stamp>(abi::STAMP_SYMBOL.as_bytes()) }
        .map_err(|error| format!("{}: {}", path.display(), cause(&error)))?;
    // SAFETY: mapped for good.
    Ok(unsafe { &**symbol })
}

fn cause(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

struct Suite {
    vt: Option<&'static abi::PluginVt>,
    config: String,
    broken: Vec<String>,
}

/// A case leaves the kit to be looked through for leaks.
type Case<'a> = (&'static str, &'a dyn Fn(&mut Kit) -> Result<(), String>);

impl Suite {
    #[allow(unsafe_code, reason = "the stamp leads to the plugin's functions")]
    fn check_stamp(&mut self, stamp: &'static abi::Stamp) {
        self.expect(stamp.magic == abi::MAGIC, "stamp: the magic differs");
        self.expect(stamp.size as usize == size_of::<abi::Stamp>(), "stamp: the size differs");
        let minors = abi::ABI_MINOR_OLDEST..=abi::ABI_MINOR;
        let speaks = stamp.abi_major == abi::ABI_MAJOR && minors.contains(&stamp.abi_minor);
        self.expect(speaks, "stamp: another ABI");
        let strategy = [abi::panic_strategy::UNWIND, abi::panic_strategy::NONE];
        self.expect(strategy.contains(&stamp.panic), "stamp: panics abort");
        let texts: [(&str, &[u8]); 3] =
            [("name", &stamp.name), ("version", &stamp.version), ("toolchain", &stamp.toolchain)];
        for (what, text) in texts {
            let end = text.iter().position(|byte| *byte == 0).unwrap_or(0);
            let padded = text[end..].iter().all(|byte| *byte == 0);
            let valid = end > 0 && padded && std::str::from_utf8(&text[..end]).is_ok();
            self.expect(valid, &format!("stamp: the {what} is not NUL-padded UTF-8"));
        }
        self.expect(!stamp.plugin.is_null(), "stamp: no functions");
        if !self.broken.is_empty() {
            return;
        }
        // SAFETY: not null, in a library that is mapped for good and says it speaks this ABI.
        let vt = unsafe { &*stamp.plugin };
        let whole = vt.size >= size_of::<abi::PluginVt>();
        self.expect(whole, "the plugin's table is smaller than this ABI's");
        self.expect(
            (1..=8).contains(&vt.types_len) && !vt.types.is_null(),
            "it serves 1 to 8 types",
        );
        self.vt = Some(vt);
    }

    fn expect(&mut self, kept: bool, rule: &str) {
        if !kept {
            self.broken.push(rule.to_owned());
        }
    }

    fn kit(&self) -> Result<Kit, String> {
        let vt = self.vt.ok_or("no functions")?;
        Kit::with_vtable(vt, &self.config).map_err(|error| format!("create refused: {error}"))
    }

    fn case(&mut self, (name, case): Case<'_>) {
        let result = self.kit().and_then(|mut kit| {
            case(&mut kit)?;
            let violations = kit.finish();
            if violations.is_empty() { Ok(()) } else { Err(violations.join("; ")) }
        });
        if let Err(error) = result {
            self.broken.push(format!("{name}: {error}"));
        }
    }

    fn check_plugin(&mut self) {
        self.check_refused_configs();
        let types = match self.kit() {
            Ok(kit) => kit.instance().types(),
            Err(error) => return self.broken.push(error),
        };
        self.case(("types", &check_types));
        let other = self.kit();
        self.case(("two instances", &|kit| {
            kit.drain(Duration::from_secs(1));
            kit.drain(Duration::ZERO);
            Ok(())
        }));
        drop(other);
        let types = (0u32..).zip(types);
        for (protocol, (_, born)) in types {
            self.case(("validate_route", &|kit| check_options(kit.instance(), protocol)));
            self.case(("claims and sniff", &|kit| check_pure(kit.instance(), protocol, born)));
            self.check_handlers(protocol, born);
        }
    }

    fn check_refused_configs(&mut self) {
        let Some(vt) = self.vt else {
            return;
        };
        for config in ["{", "\"unexpected\"", "[0]"] {
            match Kit::with_vtable(vt, config) {
                Ok(_) => self.broken.push(format!("create: accepted the configuration {config}")),
                Err(error) if error.message.is_empty() => {
                    self.broken.push(format!("create: refused {config} without a word"));
                }
                Err(_) => {}
            }
        }
    }

    fn check_handlers(&mut self, protocol: u32, born: u32) {
        let dropped = |kit: &mut Kit| start_all(kit, protocol, born, Stop::BeforeFirstPoll);
        self.case(("a future dropped before its first poll", &dropped));
        self.case(("a future dropped midway", &|kit| start_all(kit, protocol, born, Stop::Midway)));
        self.case(("a future dropped while it opens", &|kit| {
            kit.hold_opens();
            start_all(kit, protocol, born, Stop::Midway)
        }));
        self.case(("the exchange is reset", &|kit| {
            start_all(kit, protocol, born, Stop::PeerReset)
        }));
        self.case(("the client goes away", &|kit| {
            start_all(kit, protocol, born, Stop::ClientGone)
        }));
        self.case(("no route", &|kit| check_no_route(kit, protocol, born)));
        self.case(("the service refuses", &|kit| check_refusing_service(kit, protocol)));
        self.case(("refuse", &|kit| check_refuse(kit, protocol, born)));
    }
}

fn check_types(kit: &mut Kit) -> Result<(), String> {
    let types = kit.instance().types();
    let [claims, sniff, accept_http, accept_stream, refuse_http, refuse_stream] =
        kit.instance().has();
    for (name, born) in &types {
        let valid = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
        if name.is_empty() || name.len() > 32 || !name.bytes().all(valid) {
            return Err(format!("{name:?} is no name: A-Z, 0-9, _, at most 32 bytes"));
        }
        let whole = match *born {
            abi::born::HTTP => claims && accept_http && refuse_http,
            abi::born::BYTES => sniff && accept_stream && refuse_stream,
            _ => return Err(format!("{name} is born in no known way: {born}")),
        };
        if !whole {
            return Err(format!("{name}: functions are absent that its birth needs"));
        }
    }
    let names: std::collections::BTreeSet<_> = types.iter().map(|(name, _)| name).collect();
    if names.len() == types.len() { Ok(()) } else { Err("a type is named twice".to_owned()) }
}

fn check_options(instance: &Instance, protocol: u32) -> Result<(), String> {
    for options in ["null", "{}"] {
        instance
            .validate_route(protocol, options)
            .map_err(|error| format!("refused the options {options}: {error}"))?;
    }
    for options in ["{", "7"] {
        match instance.validate_route(protocol, options) {
            Ok(()) => return Err(format!("accepted the options {options}")),
            Err(error) if error.message.is_empty() => {
                return Err(format!("refused {options} without a word"));
            }
            Err(_) => {}
        }
    }
    Ok(())
}

fn check_pure(instance: &Instance, protocol: u32, born: u32) -> Result<(), String> {
    if born == abi::born::HTTP {
        let requests = [
            TestRequest::new("GET", "/"),
            TestRequest::new("POST", "/x?y").header("content-type", "application/grpc"),
            TestRequest::new("GET", "/").header("upgrade", "websocket"),
            TestRequest::new("OPTIONS", "*").version(20),
        ];
        for request in requests {
            let first = instance.claims(protocol, &request);
            if first > abi::claim::YES {
                return Err(format!("claims returned {first}"));
            }
            if instance.claims(protocol, &request) != first {
                return Err(format!("claims is not pure on {} {}", request.method, request.target));
            }
        }
        return Ok(());
    }
    let inputs: [&[u8]; 5] =
        [b"", b"G", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", b"\x16\x03\x01\x02", &[0xff; 4096]];
    for bytes in inputs {
        let first = instance.sniff(protocol, bytes)?;
        if first.0 > abi::sniff::NEED_MORE {
            return Err(format!("sniff returned {}", first.0));
        }
        if instance.sniff(protocol, bytes)? != first {
            return Err(format!("sniff is not pure on {}", bytes.escape_ascii()));
        }
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stop {
    BeforeFirstPoll,
    Midway,
    PeerReset,
    ClientGone,
}

fn start_all(kit: &mut Kit, protocol: u32, born: u32, stop: Stop) -> Result<(), String> {
    start_accept(kit, protocol, born, stop)?;
    start_deliver(kit, protocol, stop)
}

fn start_accept(kit: &mut Kit, protocol: u32, born: u32, stop: Stop) -> Result<(), String> {
    if born == abi::born::HTTP {
        let request = TestRequest::new("POST", "/").with_body(None);
        let call = kit.accept_http_as(protocol, &request);
        if stop == Stop::BeforeFirstPoll {
            call.running.cancel();
            return Ok(());
        }
        call.body.send("part of a body");
        kit.run_until_idle();
        match stop {
            Stop::PeerReset => call.peer.reset(Reset::new(failure::SERVICE_RESET)),
            Stop::ClientGone => {
                call.body.fail(Reset::new(failure::CLIENT_GONE));
                call.response.disconnect();
            }
            _ => call.running.cancel(),
        }
        kit.run_until_idle();
        return settled("accept_http", stop, call.running.ended());
    }
    let mut call = kit.accept_as(protocol);
    if stop == Stop::BeforeFirstPoll {
        call.running.cancel();
        return Ok(());
    }
    kit.block_on(call.client.write(b"some bytes\n"));
    kit.run_until_idle();
    match stop {
        Stop::PeerReset => call.peer.reset(Reset::new(failure::SERVICE_RESET)),
        Stop::ClientGone => call.client.fail(ECONNRESET),
        _ => call.running.cancel(),
    }
    kit.run_until_idle();
    settled("accept_stream", stop, call.running.ended())
}

const ECONNRESET: i32 = 104;

fn start_deliver(kit: &mut Kit, protocol: u32, stop: Stop) -> Result<(), String> {
    let service = TestService::default();
    let call = kit.deliver_as(protocol, &TestMeta::default(), &service);
    match stop {
        Stop::BeforeFirstPoll => call.running.cancel(),
        Stop::Midway => {
            kit.run_until_idle();
            call.running.cancel();
        }
        Stop::PeerReset | Stop::ClientGone => {
            kit.run_until_idle();
            call.peer.reset(Reset::new(failure::CANCELLED));
            kit.run_until_idle();
            settled("deliver", stop, call.running.ended())?;
        }
    }
    Ok(())
}

/// A handler whose other side is gone ends by itself, and not by a panic.
fn settled(name: &str, stop: Stop, ended: Option<Outcome>) -> Result<(), String> {
    match (stop, ended) {
        (_, Some(Outcome::Panicked)) => Err(format!("{name} panicked")),
        (Stop::PeerReset | Stop::ClientGone, None) => {
            Err(format!("{name} goes on though its other side is gone"))
        }
        _ => Ok(()),
    }
}

fn check_no_route(kit: &mut Kit, protocol: u32, born: u32) -> Result<(), String> {
    kit.refuse_opens(TestFailure::new(failure::NO_ROUTE));
    if born == abi::born::HTTP {
        let call = kit.accept_http_as(protocol, &TestRequest::new("GET", "/"));
        kit.run_until_idle();
        return told("accept_http", call.running.ended(), call.response.has_begun());
    }
    let mut call = kit.accept_as(protocol);
    // Until it knows what the client wants, a plugin may read.
    kit.block_on(call.client.write(b"some bytes\n"));
    kit.block_on(call.client.shutdown());
    kit.run_until_idle();
    told("accept_stream", call.running.ended(), call.client.is_closed())
}

fn told(name: &str, ended: Option<Outcome>, told: bool) -> Result<(), String> {
    match ended {
        Some(Outcome::Ended(_)) if told => Ok(()),
        Some(Outcome::Ended(_)) => Err(format!("{name} ended, but the client was told nothing")),
        Some(Outcome::Panicked) => Err(format!("{name} panicked")),
        None => Err(format!("{name} does not end")),
    }
}

fn check_refusing_service(kit: &mut Kit, protocol: u32) -> Result<(), String> {
    let service = TestService::default();
    service.refuse();
    let call = kit.deliver_as(protocol, &TestMeta::default(), &service);
    kit.run_until_idle();
    if service.connects() == 0 {
        // It waits for a message that this suite cannot know.
        return Ok(());
    }
    told(
        "deliver",
        call.running.ended(),
        call.peer.was_reset().is_some() || call.peer.has_finished(),
    )
}

fn check_refuse(kit: &mut Kit, protocol: u32, born: u32) -> Result<(), String> {
    for code in failure::CANCELLED..=failure::MISDIRECTED {
        let failure = TestFailure::new(code);
        if born == abi::born::HTTP {
            for method in ["GET", "HEAD"] {
                let call = kit.refuse_http_as(protocol, &TestRequest::new(method, "/"), &failure);
                kit.run_until_idle();
                told("refuse_http", call.running.ended(), call.response.has_begun())?;
            }
        } else {
            let call = kit.refuse_as(protocol, &failure);
            kit.run_until_idle();
            told("refuse_stream", call.running.ended(), call.client.is_closed())?;
        }
    }
    Ok(())
}
