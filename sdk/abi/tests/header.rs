//! Holds `sdk/include/sidelane_plugin.h` against this crate: sizes, offsets, the type of every field and
//! slot, every constant. What is compared is generated from the Rust side and kept beside the header as
//! `abi_golden.c`, so that a change of the ABI shows in review: `SIDELANE_BLESS=1 cargo test -p
//! sidelane-abi` writes it anew.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use sidelane_abi::*;

/// Compiles only while the fields are all of the struct's.
macro_rules! structs {
    ($($name:ident $c:ident { $($field:ident),+ })+) => {
        /// Rust's name and C's.
        const NAMES: &[(&str, &str)] = &[$((stringify!($name), stringify!($c))),+];

        fn write_structs(out: &mut String) {
            $({
                fn every_field_is_listed(value: &$name) {
                    let $name { $($field: _),+ } = value;
                }
                let _: fn(&$name) = every_field_is_listed;
                let c = stringify!($c);
                writeln!(out, "\n_Static_assert(sizeof({c}) == {}, \"size of {c}\");", size_of::<$name>()).expect("a string takes it");
                writeln!(out, "_Static_assert(_Alignof({c}) == {}, \"alignment of {c}\");", align_of::<$name>()).expect("a string takes it");
                $(write_field(
                    out,
                    c,
                    stringify!($field),
                    std::mem::offset_of!($name, $field),
                    type_of_field(|value: &$name| &value.$field),
                );)+
            })+
        }
    };
}

structs! {
        Stamp sidelane_stamp_t { magic, size, abi_major, abi_minor, panic, name, version, toolchain, plugin }
        Str sidelane_borrowed_bytes_t { ptr, len }
        Buf sidelane_owned_buf_t { ptr, len, data, vt }
        BufVt sidelane_buf_vt_t { size, clone, drop }
        Waker sidelane_waker_t { vt }
        WakerVt sidelane_waker_vt_t { size, retain, release, wake }
        Future sidelane_owned_future_t { data, vt }
        FutureVt sidelane_future_vt_t { size, poll, drop }
        IoRes sidelane_io_res_t { tag, err, n }
        IoVec sidelane_io_vec_t { ptr, len }
        Io sidelane_owned_io_t { data, vt }
        IoVt sidelane_io_vt_t { size, poll_read, poll_writev, poll_flush, poll_shutdown, drop }
        Timer sidelane_owned_timer_t { data, vt }
        TimerVt sidelane_timer_vt_t { size, poll, reset, drop }
        Failure sidelane_failure_t { size, code, retry_after_s, detail }
        Reset sidelane_reset_t { code, protocol_code }
        Header sidelane_header_t { name, value }
        RequestHead sidelane_request_head_t { size, version, flags, method, scheme, authority, target, protocol, headers, headers_len }
        ResponseHead sidelane_response_head_t { size, status, flags, body_length, headers, headers_len }
        Body sidelane_owned_body_t { data, vt, length }
        Frame sidelane_frame_t { data, end, headers, headers_len, reset }
        BodyVt sidelane_body_vt_t { size, poll_frame, drop }
        Responder sidelane_owned_responder_t { data, vt }
        ResponderVt sidelane_responder_vt_t { size, informational, head, poll_body, finish, abort, poll_closed, upgrade, drop }
        IoOutcome sidelane_io_outcome_t { code, err, io }
        AlpnOutcome sidelane_alpn_outcome_t { code, err, io, protocol }
        Msg sidelane_owned_msg_t { field, flags, head, body }
        SendHalf sidelane_owned_send_half_t { data, vt }
        SendVt sidelane_send_vt_t { size, poll_send, finish, reset, poll_closed, dispatched, refused, drop, dedicate }
        DedicateOutcome sidelane_dedicate_outcome_t { how, reset, io, sent, received }
        RecvHalf sidelane_owned_recv_half_t { data, vt }
        RecvVt sidelane_recv_vt_t { size, poll_recv, drop }
        Exchange sidelane_owned_exchange_t { send, recv }
        Meta sidelane_meta_t { size, deadline_ns, request_id, protocol_type, route, tunnel, client_address, listener, scheme, tls_sni, tls_alpn, tls_client, trace_parent, options, peer_address, response_head_timeout_ns, flags }
        RouteKey sidelane_route_key_t { size, kind, host, path }
        Opened sidelane_opened_t { exchange, meta, failure }
        Opener sidelane_owned_opener_t { data, vt }
        OpenerVt sidelane_opener_vt_t { size, poll_open, drop }
        Service sidelane_owned_service_t { data, vt, id, version, address }
        ServiceVt sidelane_service_vt_t { size, connect, drop, settings, retry, connect_alpn }
        ServiceSettings sidelane_service_settings_t { size, flags, http_version, retries, pool_idle, pool_connections, pool_idle_timeout_ns }
        Host sidelane_host_t { vt }
        HostVt sidelane_host_vt_t { size, spawn, now, timer, connect, log, log_level, metric, metric_add, shard, shards, blocking, splice, dedicate }
        SpliceOutcome sidelane_splice_outcome_t { err, a_to_b, b_to_a }
        ErrorOut sidelane_error_out_t { size, message, path }
        TypeDesc sidelane_type_desc_t { name, born }
        PluginVt sidelane_plugin_vt_t { size, types, types_len, create, validate_route, claims, sniff, accept_http, accept_stream, deliver, refuse_http, refuse_stream, drain, destroy }
}

macro_rules! constants {
    ($($c:ident = $value:expr,)+) => {
        const CONSTANTS: &[(&str, u64)] = &[$((stringify!($c), $value as u64)),+];
    };
}

constants! {
        SIDELANE_ABI_MAJOR = ABI_MAJOR,
        SIDELANE_ABI_MINOR = ABI_MINOR,
        SIDELANE_ABI_MINOR_OLDEST = ABI_MINOR_OLDEST,
        SIDELANE_PANIC_STRATEGY_UNWIND = panic_strategy::UNWIND,
        SIDELANE_PANIC_STRATEGY_ABORT = panic_strategy::ABORT,
        SIDELANE_PANIC_STRATEGY_NONE = panic_strategy::NONE,
        SIDELANE_POLL_PENDING = poll::PENDING,
        SIDELANE_POLL_READY = poll::READY,
        SIDELANE_POLL_CLOSED = poll::CLOSED,
        SIDELANE_POLL_PANICKED = poll::PANICKED,
        SIDELANE_IO_ERROR = io::ERROR,
        SIDELANE_FAILURE_NONE = failure::NONE,
        SIDELANE_FAILURE_CANCELLED = failure::CANCELLED,
        SIDELANE_FAILURE_NO_ROUTE = failure::NO_ROUTE,
        SIDELANE_FAILURE_NO_SIDECAR = failure::NO_SIDECAR,
        SIDELANE_FAILURE_NO_PROTOCOL = failure::NO_PROTOCOL,
        SIDELANE_FAILURE_SERVICE_UNREACHABLE = failure::SERVICE_UNREACHABLE,
        SIDELANE_FAILURE_SERVICE_RESET = failure::SERVICE_RESET,
        SIDELANE_FAILURE_SERVICE_INVALID = failure::SERVICE_INVALID,
        SIDELANE_FAILURE_SERVICE_TIMEOUT = failure::SERVICE_TIMEOUT,
        SIDELANE_FAILURE_RATE_LIMITED = failure::RATE_LIMITED,
        SIDELANE_FAILURE_OVERLOADED = failure::OVERLOADED,
        SIDELANE_FAILURE_TOO_LARGE = failure::TOO_LARGE,
        SIDELANE_FAILURE_TUNNEL_LOST = failure::TUNNEL_LOST,
        SIDELANE_FAILURE_CLIENT_GONE = failure::CLIENT_GONE,
        SIDELANE_FAILURE_BAD_REQUEST = failure::BAD_REQUEST,
        SIDELANE_FAILURE_FLOW_CONTROL = failure::FLOW_CONTROL,
        SIDELANE_FAILURE_PLUGIN_FAILED = failure::PLUGIN_FAILED,
        SIDELANE_FAILURE_DRAINING = failure::DRAINING,
        SIDELANE_FAILURE_FORBIDDEN = failure::FORBIDDEN,
        SIDELANE_FAILURE_INTERNAL = failure::INTERNAL,
        SIDELANE_FAILURE_UNSUPPORTED = failure::UNSUPPORTED,
        SIDELANE_FAILURE_CLIENT_TIMEOUT = failure::CLIENT_TIMEOUT,
        SIDELANE_FAILURE_UNAUTHORIZED = failure::UNAUTHORIZED,
        SIDELANE_FAILURE_MISDIRECTED = failure::MISDIRECTED,
        SIDELANE_NO_PROTOCOL_CODE = NO_PROTOCOL_CODE,
        SIDELANE_LENGTH_UNKNOWN = LENGTH_UNKNOWN,
        SIDELANE_REQUEST_END = request::END,
        SIDELANE_REQUEST_EXPECT_CONTINUE = request::EXPECT_CONTINUE,
        SIDELANE_REQUEST_CAN_UPGRADE = request::CAN_UPGRADE,
        SIDELANE_RESPONSE_END = response::END,
        SIDELANE_BODY_DATA = body::DATA,
        SIDELANE_BODY_TRAILERS = body::TRAILERS,
        SIDELANE_BODY_END = body::END,
        SIDELANE_FIELD_CUSTOM = FIELD_CUSTOM,
        SIDELANE_FIELD_DEDICATION = FIELD_DEDICATION,
        SIDELANE_DEDICATED_ENDED = dedicated::ENDED,
        SIDELANE_DEDICATED_FRAMED = dedicated::FRAMED,
        SIDELANE_MESSAGE_BYTES_MAX = MESSAGE_BYTES_MAX,
        SIDELANE_OPEN_BYTES_MAX = OPEN_BYTES_MAX,
        SIDELANE_MSG_END = msg::END,
        SIDELANE_RECV_MESSAGE = recv::MESSAGE,
        SIDELANE_RECV_RESET = recv::RESET,
        SIDELANE_RECV_FINISHED = recv::FINISHED,
        SIDELANE_META_TRUSTED_PROXY = meta::TRUSTED_PROXY,
        SIDELANE_ROUTE_KEY_LISTENER = route_key::LISTENER,
        SIDELANE_ROUTE_KEY_HOST = route_key::HOST,
        SIDELANE_SERVICE_UNSHARED = service::UNSHARED,
        SIDELANE_SERVICE_TLS = service::TLS,
        SIDELANE_SERVICE_BY_ALPN = service::BY_ALPN,
        SIDELANE_ALPN_MAX = ALPN_MAX,
        SIDELANE_UNSET = UNSET,
        SIDELANE_UNSET_NS = UNSET_NS,
        SIDELANE_LEVEL_ERROR = level::ERROR,
        SIDELANE_LEVEL_WARN = level::WARN,
        SIDELANE_LEVEL_INFO = level::INFO,
        SIDELANE_LEVEL_DEBUG = level::DEBUG,
        SIDELANE_LEVEL_TRACE = level::TRACE,
        SIDELANE_METRIC_COUNTER = metric::COUNTER,
        SIDELANE_METRIC_GAUGE = metric::GAUGE,
        SIDELANE_METRIC_HISTOGRAM = metric::HISTOGRAM,
        SIDELANE_NO_SHARD = NO_SHARD,
        SIDELANE_BORN_HTTP = born::HTTP,
        SIDELANE_BORN_BYTES = born::BYTES,
        SIDELANE_CLAIM_NO = claim::NO,
        SIDELANE_CLAIM_FALLBACK = claim::FALLBACK,
        SIDELANE_CLAIM_YES = claim::YES,
        SIDELANE_SNIFF_NO = sniff::NO,
        SIDELANE_SNIFF_YES = sniff::YES,
        SIDELANE_SNIFF_NEED_MORE = sniff::NEED_MORE,
}

fn type_of_field<S, T>(_: fn(&S) -> &T) -> &'static str {
    std::any::type_name::<T>()
}

fn write_field(out: &mut String, c: &str, field: &str, offset: usize, rust: &str) {
    writeln!(out, "_Static_assert(offsetof({c}, {field}) == {offset}, \"offset of {c}.{field}\");")
        .expect("a string takes it");
    // An array decays where its type is asked for; its size follows from the offsets.
    if !rust.starts_with('[') {
        let ty = c_type(rust);
        writeln!(
            out,
            "_Static_assert(_Generic((({c} *)0)->{field}, {ty}: 1, default: 0), \"type of {c}.{field}\");"
        )
        .expect("a string takes it");
    }
}

/// Turns the compiler's name of a Rust type into C's.
fn c_type(rust: &str) -> String {
    if let Some(inner) =
        rust.strip_prefix("core::option::Option<").and_then(|rest| rest.strip_suffix('>'))
    {
        return c_type(inner);
    }
    if let Some(signature) = rust.strip_prefix("unsafe extern \"C\" fn(") {
        let (parameters, result) = split_signature(signature);
        let parameters =
            split_parameters(parameters).into_iter().map(c_type).collect::<Vec<_>>().join(", ");
        let parameters = if parameters.is_empty() { "void".to_owned() } else { parameters };
        return format!("{} (*)({parameters})", result.map_or_else(|| "void".to_owned(), c_type));
    }
    if let Some(target) = rust.strip_prefix("*const ") {
        return format!("const {} *", c_type(target));
    }
    if let Some(target) = rust.strip_prefix("*mut ") {
        return format!("{} *", c_type(target));
    }
    let name = rust.rsplit("::").next().unwrap_or(rust);
    let primitive = match name {
        "u8" => "uint8_t",
        "u32" => "uint32_t",
        "u64" => "uint64_t",
        "i32" => "int32_t",
        "usize" => "size_t",
        "f64" => "double",
        "c_void" => "void",
        _ => "",
    };
    if !primitive.is_empty() {
        return primitive.to_owned();
    }
    let (_, c) =
        NAMES.iter().find(|(candidate, _)| *candidate == name).expect("a struct of the ABI");
    (*c).to_owned()
}

/// Splits what follows `fn(` into parameters and result.
fn split_signature(signature: &str) -> (&str, Option<&str>) {
    let mut depth = 1;
    let close = signature
        .char_indices()
        .find(|(_, character)| {
            depth += i32::from(*character == '(') - i32::from(*character == ')');
            depth == 0
        })
        .expect("a signature is closed")
        .0;
    (&signature[..close], signature[close + 1..].trim_start().strip_prefix("-> "))
}

fn split_parameters(parameters: &str) -> Vec<&str> {
    let mut depth = 0;
    parameters
        .split(|character| {
            depth += i32::from(character == '(') - i32::from(character == ')');
            character == ',' && depth == 0
        })
        .map(str::trim)
        .filter(|parameter| !parameter.is_empty())
        .collect()
}

fn generated() -> String {
    let mut out = String::from(
        "/* Generated from sdk/abi by its test `header`; a change here is a change of the ABI. */\n\
         #include <stddef.h>\n\n#include \"sidelane_plugin.h\"\n\n",
    );
    for (name, value) in CONSTANTS {
        writeln!(out, "_Static_assert({name} == {value}u, \"{name}\");")
            .expect("a string takes it");
    }
    writeln!(out, "_Static_assert(sizeof(SIDELANE_MAGIC) == {}, \"SIDELANE_MAGIC\");", MAGIC.len())
        .expect("a string takes it");
    write_structs(&mut out);
    out
}

fn include_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../include")
}

fn compile(compiler: &str, standard: &str, source: &Path) -> Option<Output> {
    Command::new(compiler)
        .args([standard, "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", "-I"])
        .arg(include_dir())
        .arg(source)
        .output()
        .ok()
}

fn assert_compiles(compiler: &str, standard: &str, source: &Path) {
    let Some(output) = compile(compiler, standard, source) else {
        // Past the test harness's capture: a skipped test shows even where it passes.
        let skipped = format!("SKIPPED header by {compiler}: not installed\n");
        let _ = std::io::Write::write_all(&mut std::io::stderr(), skipped.as_bytes());
        assert!(std::env::var_os("CI").is_none(), "CI skips nothing: install {compiler}");
        return;
    };
    assert!(output.status.success(), "{compiler}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn golden_copy_is_current() {
    let golden = include_dir().join("abi_golden.c");
    let generated = generated();
    if std::env::var_os("SIDELANE_BLESS").is_some() {
        std::fs::write(&golden, &generated).unwrap();
    }
    let kept = std::fs::read_to_string(&golden).unwrap_or_default();
    let differs = kept.lines().zip(generated.lines()).find(|(kept, new)| kept != new);
    assert!(
        kept == generated,
        "the ABI differs from sdk/include/abi_golden.c, first at {differs:?}; where that is meant, \
         adapt the header, ABI_MINOR and SIDELANE_BLESS=1"
    );
}

#[test]
fn header_has_the_layout_of_this_crate() {
    assert!(NAMES.len() > 40 && CONSTANTS.len() > 60);
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join("layout.c");
    std::fs::write(&source, generated()).unwrap();
    assert_compiles("cc", "-std=c11", &source);
}

#[test]
fn a_differing_layout_is_noticed() {
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join("differing.c");
    let right = "_Generic(((sidelane_io_vt_t *)0)->poll_flush, sidelane_io_res_t (*)";
    let wrong =
        generated().replace(right, "_Generic(((sidelane_io_vt_t *)0)->poll_flush, uint32_t (*)");
    assert_ne!(wrong, generated());
    std::fs::write(&source, wrong).unwrap();
    if let Some(output) = compile("cc", "-std=c11", &source) {
        assert!(!output.status.success());
        assert!(
            String::from_utf8_lossy(&output.stderr).contains("type of sidelane_io_vt_t.poll_flush")
        );
    }
}

#[test]
fn header_is_clean_cpp() {
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join("include.cpp");
    std::fs::write(&source, "#include \"sidelane_plugin.h\"\nint main() { return 0; }\n").unwrap();
    assert_compiles("c++", "-std=c++17", &source);
}
