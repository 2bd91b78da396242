//! The language as a JSON Schema, for editors and for the tables of `docs/config.md`.
//!
//! The types mirror the YAML and hold nothing: their fields' comments are the descriptions, their
//! fields' types what is accepted. Defaults are the reader's own, taken from what it makes of a file
//! that gives nothing; tests hold keys and bounds to the reader's.

#![allow(dead_code, reason = "the types are there for what their derive makes of them")]

use std::borrow::Cow;
use std::path::Path;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Value as Json, json};

use super::Source;
use super::read::{
    ATTEMPTS_MAX, CHECKS_MAX, CONNECTIONS_MAX, COUNT_MAX, DEDICATED_MAX, LANES_MAX,
    SIDECAR_WEIGHT_MAX, THREADS_MAX, USERS_MAX, WEIGHT_MAX,
};
use super::value::{duration_text, size_text};

/// Extension keywords for the tables; the schema that is printed has none.
const ACCEPTED: &str = "x-accepted";
const DEFAULT: &str = "x-default";
const REQUIRED: &str = "x-required";

/// Returns the JSON Schema (draft 2020-12) of a configuration file.
#[must_use]
pub fn schema() -> Json {
    let mut schema = annotated();
    each(&mut schema, &mut |map| {
        for keyword in [ACCEPTED, DEFAULT, REQUIRED] {
            map.remove(keyword);
        }
    });
    schema
}

/// Returns the schema with what the tables need beside it.
pub(super) fn annotated() -> Json {
    let mut schema = schemars::schema_for!(File).to_value();
    each(&mut schema, &mut |map| {
        shape(map);
        if let Some(Json::String(text)) = map.get_mut("description") {
            *text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        }
    });
    let defaults = defaults();
    if let Some(definitions) = schema.get("$defs").cloned() {
        set_defaults(&mut schema, &definitions, &defaults);
    }
    schema
}

/// Calls `edit` for each object of the schema.
fn each(schema: &mut Json, edit: &mut dyn FnMut(&mut serde_json::Map<String, Json>)) {
    match schema {
        Json::Object(map) => {
            edit(map);
            map.values_mut().for_each(|value| each(value, edit));
        }
        Json::Array(items) => items.iter_mut().for_each(|item| each(item, edit)),
        _ => {}
    }
}

/// Lets a section be empty, closes it, and requires what the reader does.
fn shape(map: &mut serde_json::Map<String, Json>) {
    let nullable = match map.get("type").and_then(Json::as_str) {
        Some("object") => "object",
        Some("array") => "array",
        _ => return,
    };
    map.insert("type".to_owned(), json!([nullable, "null"]));
    let Some(Json::Object(properties)) = map.get("properties") else { return };
    let required: Vec<String> = properties
        .iter()
        .filter(|(_, property)| property.get(REQUIRED).is_some())
        .map(|(key, _)| key.clone())
        .collect();
    map.remove("required");
    if !required.is_empty() {
        map.insert("required".to_owned(), json!(required));
    }
    map.insert("additionalProperties".to_owned(), false.into());
}

/// What the reader makes of a file that leaves out what it can.
fn defaults() -> Json {
    let text = "{version: 1, relay: {}, sidecar: {}, health: {}, admin: {},
        tunnels: [{name: t, service: 'localhost:1', health_check: {type: http}}],
        routes: [{subdomain: a, tunnel: t, retries: {}, compression: {}, hsts: {},
                affinity: {cookie: c}},
            {subdomain: b, redirect: {scheme: https}}],
        plugins: {libraries: [{name: p, library: p}]}}";
    let source = Source::from_text(Path::new("defaults.yaml"), text);
    let config = super::parse(&source, &|_| None).expect("the text is a valid configuration");
    let mut json = config.to_masked_json();
    let redirect = json["routes"][1]["redirect"].take();
    json["routes"][0]["redirect"] = redirect;
    // This one stands there because a route goes somewhere.
    json["routes"][0]["tunnel"].take();
    json["routes"][0]["basic_auth"] = json!({ "realm": super::read::REALM });
    json["routes"][0]["limits"] = json!({ "rate": { "per": "1s" } });
    let shown = json!({ "acme": [], "min_version": "1.2" });
    json["relay"]["listeners"][0]["tls"] = shown.clone();
    json["relay"]["listeners"][0]["tls"]["client_certificates"] =
        json!({ "required": true, "forward": false });
    json["relay"]["tunnel"]["tls"] = shown;
    json["relay"]["acme"] = json!({ "directory": super::read::ACME_DIRECTORY });
    let (refresh, leeway) = super::read::ISSUER_TIMES;
    json["relay"]["token_issuers"] =
        json!([{ "refresh": duration_text(refresh), "leeway": duration_text(leeway) }]);
    json["tunnels"][0]["tls"] = json!({ "insecure_skip_verify": false });
    json["tunnels"][0]["health_check"]["service"] = "".into();
    json["tunnels"][0]["health_check"]["host"] = Json::Null;
    json
}

/// Sets the defaults of an object's properties and of what is below them.
fn set_defaults(schema: &mut Json, definitions: &Json, value: &Json) {
    fn in_object(object: &mut Json, all: &mut serde_json::Map<String, Json>, value: &Json) {
        let Some(Json::Object(properties)) = object.get_mut("properties") else { return };
        for (key, property) in properties {
            let Some(value) = value.get(key) else { continue };
            if property.get(REQUIRED).is_none() && property.get(DEFAULT).is_none() {
                let simple = match value {
                    Json::Array(items) => items.iter().all(Json::is_string),
                    Json::Null | Json::Object(_) => false,
                    _ => true,
                };
                if simple {
                    property["default"] = value.clone();
                }
            }
            let (reference, value) = match property.get("items") {
                Some(items) => (items.get("$ref"), value.get(0).unwrap_or(&Json::Null)),
                None => (property.get("$ref"), value),
            };
            let name = reference.and_then(Json::as_str).and_then(|at| at.rsplit('/').next());
            if let Some(name) = name.map(str::to_owned)
                && let Some(mut definition) = all.remove(&name)
            {
                in_object(&mut definition, all, value);
                all.insert(name, definition);
            }
        }
    }
    let Json::Object(mut all) = definitions.clone() else { return };
    in_object(schema, &mut all, value);
    schema["$defs"] = all.into();
}

/// `${…}` stands for any text.
const VARIABLE: &str = r"\$\{";

fn pattern(text: &str) -> String {
    format!("{text}|{VARIABLE}")
}

/// A scalar's schema: how it is called, and what it is.
macro_rules! scalar {
    ($name:ident $(<$(const $bound:ident),+>)?, $schema:expr) => {
        struct $name $(<$(const $bound: u64),+>)?;

        impl $(<$(const $bound: u64),+>)? JsonSchema for $name $(<$($bound),+>)? {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                $schema
            }
        }
    };
}

/// `1,000,000`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) && digits.len() > 4 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn text(accepted: &str, good: &str) -> Schema {
    json_schema!({ "type": "string", "pattern": pattern(good), "x-accepted": accepted })
}

fn one_of(names: &[&str]) -> Schema {
    let shown: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    json_schema!({
        "anyOf": [{ "enum": names }, { "type": "string", "pattern": VARIABLE }],
        "x-accepted": shown.join(", "),
    })
}

fn number(accepted: &str, good: &[u64]) -> Schema {
    let texts = good.iter().map(u64::to_string);
    let accept: Vec<Json> = good.iter().map(|n| json!(n)).chain(texts.map(Json::from)).collect();
    json_schema!({
        "anyOf": [{ "enum": accept }, { "type": "string", "pattern": VARIABLE }],
        "x-accepted": accepted,
    })
}

scalar!(Int<const MIN, const MAX>, json_schema!({
    "type": ["integer", "string"],
    "minimum": MIN,
    "maximum": MAX,
    "pattern": pattern("^[0-9]+$"),
    "x-accepted": format!("{MIN} to {}", grouped(MAX)),
}));
scalar!(Duration<const MIN, const MAX>, json_schema!({
    "type": "string",
    "pattern": pattern("^([0-9]+(ms|s|m|h)){1,4}$"),
    "x-accepted": format!(
        "`{}` to `{}`",
        duration_text(std::time::Duration::from_millis(MIN)),
        duration_text(std::time::Duration::from_millis(MAX)),
    ),
}));
scalar!(Size<const MIN, const MAX>, json_schema!({
    "type": "string",
    "pattern": pattern("^[0-9]+(B|KiB|MiB|GiB)$"),
    "x-accepted": format!("`{}` to `{}`", size_text(MIN), size_text(MAX)),
}));
scalar!(
    Bool,
    json_schema!({
        "type": ["boolean", "string"],
        "pattern": pattern("^(true|false)$"),
        "x-accepted": "`true`, `false`",
    })
);
scalar!(Percent, text("`1%` to `100%`", "^[0-9]{1,3}%$"));
scalar!(Name, text("a name", "^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$"));
scalar!(ProtocolType, text("a protocol type", "^[A-Z][A-Z0-9_-]{0,31}$"));
scalar!(Listen, text("`IP:port`", "^.+:[0-9]+$"));
scalar!(Dial, text("`host:port`", "^.+:[0-9]+$"));
scalar!(
    RelayUrl,
    text(
        "`host:port` or `tcp://`, `tls://`, `ws://`, `wss://`, `grpc://`, `grpcs://` and host",
        "^(.+:[0-9]+|(tcp|tls|wss?|grpcs?)://.+)$"
    )
);
scalar!(
    ProxyUrl,
    text(
        "`http://host:port`, `http://user:password@host:port`, `none`",
        "^(none|(http://)?[^/ ]+/?)$"
    )
);
scalar!(
    Service,
    text(
        "`host:port` or `http://host:port`, `https://host:port`, `unix:/path`",
        "^(unix:/.+|.+:[0-9]+/?)$"
    )
);
scalar!(Host, text("a host", r"^[A-Za-z0-9._:\[\]-]+$"));
scalar!(MatchedHost, text("a host, `*.` and a host", r"^(\*\.)?[A-Za-z0-9._:-]+$"));
scalar!(Subdomain, text("labels", "^[A-Za-z0-9._-]+$"));
scalar!(Wildcard, text("`*`, `*.` and labels", r"^\*(\.[A-Za-z0-9._-]+)?$"));
scalar!(Authority, text("`host`, `host:port`", r"^[A-Za-z0-9._:\[\]-]+$"));
scalar!(PathPrefix, text("begins with `/`", "^/[^?#\\s]*$"));
scalar!(Network, text("addresses, `address/bits`", "^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$"));
scalar!(Token, text("16 to 4096 bytes without white space", r"^\S+$"));
scalar!(FilePath, text("a path", "."));
scalar!(Variable, text("a variable's name", "."));
scalar!(Sha256, text("64 hexadecimal digits", "^[0-9A-Fa-f]{64}$"));
scalar!(
    Level,
    text(
        "`error`, `warn`, `info`, `debug`, `trace`, `off`; also `target=level`, joined by commas",
        "^([^,=]+=)?(error|warn|info|debug|trace|off)(,([^,=]+=)?(error|warn|info|debug|trace|off))*$"
    )
);
scalar!(Realm, text("1 to 128 visible characters and spaces", "^[ -~]{1,128}$"));
scalar!(GrpcService, text("at most 255 visible characters", "^[!-~]{0,255}$"));
scalar!(
    CookieName,
    text("a cookie's name, not beginning with `__`", "^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}$")
);
scalar!(FieldName, text("fields' names", "^[A-Za-z0-9!#$%&'*+.^_`|~-]+$"));
scalar!(Version, number("`1`", &[1]));
scalar!(
    HttpVersion,
    json_schema!({
        "anyOf": [
            { "enum": [1, 2, "1", "2", "auto"] },
            { "type": "string", "pattern": VARIABLE },
        ],
        "x-accepted": "`1`, `2`, `auto`",
    })
);
scalar!(
    TlsVersion,
    json_schema!({
        "anyOf": [
            { "enum": ["1.2", "1.3", 1.2, 1.3] },
            { "type": "string", "pattern": VARIABLE },
        ],
        "x-accepted": "`1.2`, `1.3`",
    })
);
scalar!(Hash, text("`sha256:` and 64 hexadecimal digits", "^sha256:[0-9A-Fa-f]{64}$"));
scalar!(
    CertificateName,
    text("`spiffe://…`, `uri:…`, `dns:…`, `*` for any characters", "^(spiffe://|uri:|dns:).+$")
);
scalar!(Pattern, text("names, `*` for any characters of a label", r"^[A-Za-z0-9._/*{}-]+$"));
scalar!(AnyText, text("visible characters", "^[!-~]+$"));
scalar!(HttpsUrl, text("`https://…`", "^https://.+$"));
scalar!(KeysUrl, text("`https://…`; `http://…` on loopback", "^https?://.+$"));
scalar!(Contact, text("`mailto:` and an address", "^mailto:.+@.+$"));
scalar!(AcmeName, text("hosts, no wildcards", r"^[A-Za-z0-9._-]+$"));
scalar!(RedirectStatus, number("`301`, `302`, `303`, `307`, `308`", &[301, 302, 303, 307, 308]));
scalar!(Balance, one_of(&["kernel", "exact"]));
scalar!(ProxyVersion, one_of(&["v1", "v2"]));
scalar!(ProbeType, one_of(&["tcp", "http", "grpc"]));
scalar!(Scheme, one_of(&["http", "https"]));
scalar!(LogFormat, one_of(&["text", "json"]));
scalar!(
    Fields,
    json_schema!({
        "type": "object",
        "propertyNames": { "pattern": "^[A-Za-z0-9!#$%&'*+.^_`|~-]+$" },
        "additionalProperties": {
            "type": ["string", "number", "boolean", "array"],
            "items": { "type": ["string", "number", "boolean"] },
        },
        "x-accepted": "fields' names with text, or a list of texts",
    })
);
scalar!(
    Users,
    json_schema!({
        "type": "object",
        "additionalProperties": { "type": "string", "pattern": pattern("^[$]2[abxy][$]") },
        "x-accepted": format!("names with bcrypt hashes, 1 to {USERS_MAX}"),
    })
);
scalar!(
    Options,
    json_schema!({
        "type": "object",
        "propertyNames": { "pattern": "^[A-Z][A-Z0-9_-]{0,31}$" },
        "x-accepted": "protocol types with blocks",
    })
);
scalar!(Block, json_schema!({ "x-accepted": "the plugin's keys" }));

mod tls;

use tls::{Acme, Hsts, Issuer, ListenerTls, Principal, RelayItem, ServiceTls, TunnelTls};

const DAY: u64 = 24 * 3600 * 1000;
const GRACE: u64 = 300 * 1000;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
const THREADS: u64 = THREADS_MAX as u64;
const LANES: u64 = LANES_MAX as u64;
const DEDICATED: u64 = DEDICATED_MAX as u64;
const COUNT: u64 = COUNT_MAX as u64;

/// A relay, a sidecar, or both. Any value may be written as `${NAME}`, `${NAME:-default}` or
/// `${file:path}`.
#[derive(JsonSchema)]
#[schemars(title = "Sidelane configuration")]
struct File {
    /// Version of the language.
    #[schemars(extend("x-required" = true))]
    version: Version,
    /// The role that faces clients.
    #[schemars(extend("x-default" = "absent: no relay"))]
    relay: Relay,
    /// The role beside the service. One of `relay` and `sidecar` must be there.
    #[schemars(extend("x-default" = "absent: no sidecar"))]
    sidecar: Sidecar,
    /// Names for services.
    tunnels: Vec<Tunnel>,
    /// What clients ask for, and the tunnel it goes to.
    routes: Vec<Route>,
    /// Protocols.
    plugins: Plugins,
    /// `/live`, `/ready`, `/metrics`.
    #[schemars(extend("x-default" = "absent: not served"))]
    health: Health,
    /// `/config`, `/routes`, `/tunnels`, `/plugins`, `/explain`, `POST /-/reload`.
    #[schemars(extend("x-default" = "absent: not served"))]
    admin: Admin,
    /// Logs.
    log: Log,
    /// How long running exchanges may take after SIGTERM.
    drain_timeout: Duration<0, DAY>,
    /// How long a relay that is not ready any more takes new clients before it ends: until the balancer before it has noticed.
    /// Counted from SIGTERM, or from a withdrawal before it; not waited for after SIGINT.
    withdraw_timeout: Duration<0, DAY>,
}

/// The role that faces clients.
#[derive(JsonSchema)]
struct Relay {
    /// Where clients come in; one at least.
    #[schemars(extend("x-default" = "`web` on `127.0.0.1:9080`"))]
    listeners: Vec<Listener>,
    /// Hosts whose subdomains are routed; one at least.
    base_domains: Vec<Host>,
    /// Whose word on a client's address is taken, by the PROXY protocol and `X-Forwarded-For`; at most 256.
    trusted_proxies: Vec<Network>,
    /// A client's connection is asked to end at about this age, shortened by up to a tenth at random, so
    /// that clients spread over relays that are new; absent: at none.
    max_connection_age: Duration<1000, DAY>,
    /// Where sidecars come in.
    tunnel: RelayTunnel,
    /// Who sidecars are, and what each may claim: the first entry that fits is it. Without one, and without
    /// a token in `tunnel`, sidecars come in over loopback only and may claim everything.
    credentials: Vec<Principal>,
    /// Who signs tokens (JWT) that `credentials` take.
    token_issuers: Vec<Issuer>,
    /// Certificates by ACME (RFC 8555), for the names in `acme` of listeners and of the tunnel.
    #[schemars(extend("x-default" = "absent: none is obtained"))]
    acme: Acme,
    /// How long after a start the relay is not ready (`/ready`), so that sidecars come before clients do.
    warmup: Warmup,
    /// Data-path threads; `0`: one per core.
    threads: Int<0, THREADS>,
    /// Bounds.
    limits: RelayLimits,
    /// Timeouts.
    timeouts: RelayTimeouts,
}

/// Where clients come in.
#[derive(JsonSchema)]
struct Listener {
    /// Unique.
    #[schemars(extend("x-required" = true))]
    name: Name,
    /// Address to listen on; unique in the configuration.
    #[schemars(extend("x-required" = true))]
    address: Listen,
    /// TLS; absent: connections are plain. Beside `protocol_type` or `sniff` as well.
    #[schemars(extend("x-default" = "absent: plain"))]
    tls: ListenerTls,
    /// Every request is sent to `https` at this port with 308; ACME's HTTP-01 is answered before. Not beside
    /// `tls`.
    https_redirect: Int<1, 65_535>,
    /// Every connection is of this type, `LINE`, say; absent: the HTTP front (HTTP/1.1, and HTTP/2 by
    /// prior knowledge). Not beside `sniff`.
    protocol_type: ProtocolType,
    /// Plugins look at each connection's first bytes; what none recognises goes to the HTTP front.
    sniff: Bool,
    /// Each connection begins with a PROXY protocol header, version 1 or 2, of one of
    /// `trusted_proxies`; without one it is closed.
    proxy_protocol: Bool,
    /// How connections are spread over data-path threads: by the kernel, or to the thread that has the
    /// fewest, for few and long-lived ones.
    balance: Balance,
}

/// Where sidecars come in.
#[derive(JsonSchema)]
struct RelayTunnel {
    /// Address to listen on. Beyond loopback it needs `tls` (or `insecure`), and `credentials` or a token.
    #[schemars(extend("x-default" = "`127.0.0.1:9081`; beside `listener`: none"))]
    address: Listen,
    /// Name of a listener with `tls` on which sidecars come in as well, known by their ALPN `sidelane/1`.
    listener: Name,
    /// TLS at `address`; with `listener` alone it has `client_ca` and no more.
    #[schemars(extend("x-default" = "absent: plain"))]
    tls: TunnelTls,
    /// `true`: `address` is plain beyond loopback, where anybody on the way reads and changes everything.
    insecure: Bool,
    /// One token with which everything may be claimed, in place of `credentials`; best as `${file:…}`. One
    /// of `token`, `token_file`, `token_env` at most.
    token: Token,
    /// File that holds the token.
    token_file: FilePath,
    /// Environment variable that holds the token.
    token_env: Variable,
    /// Where sidecars dial further lanes, and those that come back after the loss of their connection: this
    /// relay's own address, where `address` is behind a virtual one.
    #[schemars(extend("x-default" = "none: where the session was dialled"))]
    advertise: Dial,
    /// How long a lane that has lost its connection is waited for, and its exchanges with it; `0s`: not at
    /// all. For new sessions.
    grace: Duration<0, GRACE>,
    /// Bytes kept for its return, per lane and direction, at most; within `limits.queued`. For new sessions.
    replay: Size<{ 64 * KIB }, { 256 * MIB }>,
    /// Other relays that sidecars are told of when their sessions begin, and dial too; at most 256.
    peers: Vec<Dial>,
}

/// When a relay that has just started is ready.
#[derive(JsonSchema)]
struct Warmup {
    /// Not before, unless the sessions are there.
    time: Duration<0, DAY>,
    /// Sessions that serve something, with which it is ready at once; `0`: when the time is over.
    sessions: Int<0, COUNT>,
}

/// Bounds of a relay.
#[derive(JsonSchema)]
struct RelayLimits {
    /// Clients' connections at once; further ones are closed.
    connections: Int<1, 10_000_000>,
    /// Sessions at once; a further sidecar is refused.
    sessions: Int<1, COUNT>,
    /// The same of one principal, so that none takes all.
    sessions_per_principal: Int<1, COUNT>,
    /// Connections of one session.
    lanes_per_session: Int<1, LANES>,
    /// Exchanges of one session at once; beyond: 503.
    exchanges_per_session: Int<1, COUNT>,
    /// HTTP/2 streams of one connection at once, each with up to 256 KiB that nobody has read yet.
    streams_per_connection: Int<1, 10_000>,
    /// Bytes of a request's head; beyond: 431.
    request_head: Size<{ 8 * KIB }, { 64 * KIB }>,
    /// Fields of a request's head; beyond: 431.
    request_headers: Int<16, 128>,
    /// Bytes of messages queued or held for replay, looked at ten times a second; above half of it
    /// windows stop growing, above it 503.
    queued: Size<MIB, TIB>,
    /// Largest credit of an exchange and direction.
    window: Size<{ 64 * KIB }, { 64 * MIB }>,
    /// Handshakes of sidecars per second; further ones are told to come back.
    handshakes_per_second: Int<1, COUNT>,
    /// The same, from one address that is none of `trusted_proxies`.
    handshakes_per_second_per_address: Int<1, COUNT>,
    /// Handshakes of sidecars of one address, none of `trusted_proxies`, that may fail in a minute; beyond, it is
    /// turned away.
    failed_handshakes_per_minute_per_address: Int<1, COUNT>,
    /// TLS handshakes of clients and sidecars under way at once; beyond, connections are closed.
    tls_handshakes: Int<1, COUNT>,
    /// The same, from one address that is none of `trusted_proxies`.
    tls_handshakes_per_address: Int<1, COUNT>,
}

/// Timeouts of a relay.
#[derive(JsonSchema)]
struct RelayTimeouts {
    /// For a client to send a whole request head.
    request_head: Duration<1, DAY>,
    /// For a client's connection without an exchange.
    idle: Duration<1, DAY>,
    /// An exchange waits this long for a session that is on its way, then 503.
    open_wait: Duration<0, DAY>,
    /// For a sidecar to send its hello, and to take the answer.
    handshake: Duration<1, DAY>,
    /// For a TLS handshake.
    tls_handshake: Duration<1, DAY>,
}

/// The role beside the service.
#[derive(JsonSchema)]
struct Sidecar {
    /// For people; replicas may share it.
    #[schemars(extend("x-default" = "the machine's name"))]
    name: Name,
    /// Relays; every address that a name resolves to is dialled. An address alone is dialled by TLS with the
    /// system's authorities, on loopback plain. Required without `relay`; beyond loopback a token or a
    /// certificate is needed.
    #[schemars(extend("x-default" = "the relay of this process"))]
    relays: Vec<RelayItem>,
    /// HTTP proxy on the way to all relays, by CONNECT; `none`: there is none.
    #[schemars(extend("x-default" = "`HTTPS_PROXY` of the environment, but for loopback and what `NO_PROXY` names"))]
    proxy: ProxyUrl,
    /// Relays that relays tell of are dialled too: with the settings of the one that tells, by TLS that is
    /// verified; without, only hosts that stand in `relays`.
    follow_peers: Bool,
    /// How often the relays' names are resolved anew.
    resolve_interval: Duration<1000, DAY>,
    /// Credential; without `relays` none is needed.
    token: Token,
    /// File that holds the token, read anew at each dial.
    token_file: FilePath,
    /// Environment variable that holds the token.
    token_env: Variable,
    /// Connections to each relay.
    lanes: Int<1, LANES>,
    /// Connections to each relay that are dialled ahead, each for the bytes of one exchange whose route asks for
    /// that (`mode: raw`); `0`: none at all.
    #[schemars(extend("x-default" = "2 where a route of this file asks, else one when an exchange wants it"))]
    dedicated: Int<0, DEDICATED>,
    /// Data-path threads; `0`: one per core.
    threads: Int<0, THREADS>,
    /// Bounds.
    limits: SidecarLimits,
    /// Timeouts.
    timeouts: SidecarTimeouts,
}

/// Bounds of a sidecar.
#[derive(JsonSchema)]
struct SidecarLimits {
    /// Exchanges of one session at once.
    exchanges_per_session: Int<1, COUNT>,
    /// Bytes of messages queued or held for replay, as the relay's.
    queued: Size<MIB, TIB>,
    /// Largest credit of an exchange and direction.
    window: Size<{ 64 * KIB }, { 64 * MIB }>,
    /// Bytes kept for a lane's return, per lane and direction, at most; within `queued`.
    replay: Size<{ 64 * KIB }, { 256 * MIB }>,
}

/// Timeouts of a sidecar.
#[derive(JsonSchema)]
struct SidecarTimeouts {
    /// For a connection to a relay.
    dial: Duration<1, DAY>,
    /// For a relay's welcome.
    handshake: Duration<1, DAY>,
}

/// A name for a service's end.
#[derive(JsonSchema)]
struct Tunnel {
    /// Unique.
    #[schemars(extend("x-required" = true))]
    name: Name,
    /// Where the service is.
    #[schemars(extend("x-required" = true))]
    service: Service,
    /// Protocol types it carries; one at least.
    #[schemars(extend("x-default" = "all that plugins serve"))]
    protocols: Vec<ProtocolType>,
    /// For a connection to the service; beyond: 504.
    connect_timeout: Duration<1, DAY>,
    /// TLS to a service that is written with `https://`; absent: with the defaults.
    #[schemars(extend("x-default" = "the defaults below; without `https://`: plain"))]
    tls: ServiceTls,
    /// What HTTP requests are sent by: HTTP/1.1, HTTP/2 (without TLS by prior knowledge), or, with `https://`,
    /// what the service chooses by ALPN.
    #[schemars(extend("x-default" = "`1`; with `https://`: `auto`"))]
    http_version: HttpVersion,
    /// Connections to the service that are kept.
    #[schemars(extend("x-default" = "as the plugin's own block says"))]
    pool: Pool,
    /// Each connection begins with a PROXY protocol header of this version, and is of one client.
    proxy_protocol: ProxyVersion,
    /// How the service's health is found out; absent: it is taken for healthy. The first check
    /// decides. While it is unhealthy relays send nothing here.
    health_check: HealthCheck,
    /// After a start of the process nothing is sent to the service before it accepts a connection (TLS
    /// is not waited for), or this has passed. A tunnel that a reload adds is not waited for.
    wait: Duration<0, DAY>,
    /// This sidecar's share of the tunnel's exchanges beside others that serve it.
    weight: Int<1, { SIDECAR_WEIGHT_MAX as u64 }>,
}

/// Connections to a service that are kept.
#[derive(JsonSchema)]
struct Pool {
    /// How long an unused one is kept.
    #[schemars(extend("x-default" = "the plugin's"))]
    idle_timeout: Duration<1, DAY>,
    /// Unused ones, per data-path thread.
    #[schemars(extend("x-default" = "the plugin's"))]
    idle: Int<0, { CONNECTIONS_MAX as u64 }>,
    /// Used and unused ones, per data-path thread; beyond: 503.
    #[schemars(extend("x-default" = "the plugin's"))]
    connections: Int<1, { CONNECTIONS_MAX as u64 }>,
}

/// How a service's health is found out.
#[derive(JsonSchema)]
struct HealthCheck {
    /// `tcp`: a connection is accepted, with `https://` TLS included; `http`: a GET is answered with 200
    /// to 399; `grpc`: `grpc.health.v1.Health/Check` says SERVING.
    #[schemars(rename = "type", extend("x-required" = true))]
    kind: ProbeType,
    /// With `http`: path and query.
    path: PathAndQuery,
    /// With `http`: `Host`.
    #[schemars(extend("x-default" = "the service's address"))]
    host: Authority,
    /// With `grpc`: the service asked about; empty: the server as a whole.
    service: GrpcService,
    /// From the end of one check to the next.
    interval: Duration<100, DAY>,
    /// For one check, the connection included.
    timeout: Duration<1, DAY>,
    /// Good checks in a row after which an unhealthy service is healthy.
    healthy_after: Int<1, { CHECKS_MAX as u64 }>,
    /// Bad checks in a row after which a healthy service is unhealthy.
    unhealthy_after: Int<1, { CHECKS_MAX as u64 }>,
}

scalar!(PathAndQuery, text("begins with `/`", "^/[!-~]*$"));

/// What a client asks for, and the tunnel it goes to.
#[derive(JsonSchema)]
struct Route {
    /// Unique.
    #[schemars(extend("x-default" = "host and path prefix, as in `demo/api`"))]
    name: Name,
    /// `demo` takes `demo.<base domain>`.
    #[schemars(extend("x-default" = "any"))]
    subdomain: Subdomain,
    /// `www.example.org` takes that host; `*.example.org` what is below it, any number of labels.
    #[schemars(extend("x-default" = "any"))]
    host: MatchedHost,
    /// `*.apps` takes what is below `apps.<base domain>`, `*` what is below a base domain.
    #[schemars(extend("x-default" = "any"))]
    wildcard: Wildcard,
    /// `/a` takes `/a` and `/a/b`, not `/ab`; matched as sent: escapes and dots are not resolved.
    #[schemars(extend("x-default" = "any"))]
    path_prefix: PathPrefix,
    /// Name of a listener; how byte-born protocols are routed.
    #[schemars(extend("x-default" = "any"))]
    listener: Name,
    /// Only exchanges of this type.
    #[schemars(extend("x-default" = "any"))]
    protocol_type: ProtocolType,
    /// Name of a tunnel; declared in this configuration where it has a `sidecar` section or any
    /// `tunnels`. One of `tunnel`, `tunnels`, `redirect` is required.
    tunnel: Name,
    /// A split between tunnels by weight, 1 to 16 of them.
    tunnels: Vec<Share>,
    /// Timeouts.
    timeouts: RouteTimeouts,
    /// Sending again what a service did not process; absent: only what is safe in any case.
    retries: Retries,
    /// Changes of requests' fields, in the order remove, set, add. HTTP-born protocols only.
    request_headers: Headers,
    /// Changes of responses' fields, in the order remove, set, add. HTTP-born protocols only.
    response_headers: Headers,
    /// What the service sees instead of what the client asked for. HTTP-born protocols only.
    rewrite: Rewrite,
    /// Where the client is sent instead of to a tunnel. HTTP-born protocols only.
    redirect: Redirect,
    /// Who may come in; else 401. HTTP-born protocols only.
    basic_auth: BasicAuth,
    /// From where clients may come; else 403.
    addresses: Addresses,
    /// How much the route takes, at each relay.
    limits: RouteLimits,
    /// Compression of responses by gzip; absent: they pass as they are. HTTP-born protocols only.
    compression: Compression,
    /// `Strict-Transport-Security` (RFC 6797) on responses over TLS: clients come by TLS only from then on.
    /// HTTP-born protocols only.
    #[schemars(extend("x-default" = "absent: none is sent"))]
    hsts: Hsts,
    /// A client's exchanges go to one of several sidecars, as long as that serves, by a cookie that names
    /// it; the service does not see it. HTTP-born protocols only.
    #[schemars(extend("x-default" = "absent: to any"))]
    affinity: Affinity,
    /// A block per protocol type, `options: { HTTP: { … } }`; checked by the plugin and given to it with
    /// each exchange.
    options: Options,
}

/// A cookie that names the sidecar which a client's exchanges go to.
#[derive(JsonSchema)]
struct Affinity {
    /// Its name; no other route of the host should use it at another path.
    #[schemars(extend("x-required" = true))]
    cookie: CookieName,
    /// How long a client keeps it, in whole seconds; `0s`: until it ends.
    max_age: Duration<0, { 400 * DAY }>,
}

/// A tunnel's share of a route's exchanges.
#[derive(JsonSchema)]
struct Share {
    /// The tunnel's name; each once.
    #[schemars(extend("x-required" = true))]
    name: Name,
    /// Of the sum of the route's weights; `0`: only where no other tunnel is served.
    #[schemars(extend("default" = 1))]
    weight: Int<0, { WEIGHT_MAX as u64 }>,
}

/// Timeouts of a route.
#[derive(JsonSchema)]
struct RouteTimeouts {
    /// For a connection to the service; beyond: 504.
    #[schemars(extend("x-default" = "the tunnel's"))]
    connect: Duration<1, DAY>,
    /// From the request's dispatch to the service's response head; beyond: 504.
    #[schemars(extend("x-default" = "the plugin's"))]
    response_head: Duration<1, DAY>,
    /// Nothing passes in either direction for this long; the exchange is ended.
    idle: Duration<1, DAY>,
    /// For the whole exchange; beyond: 504, or an end once a response has begun.
    total: Duration<1, DAY>,
}

/// Sending again what a service did not process.
#[derive(JsonSchema)]
struct Retries {
    /// Most times that one exchange is sent again.
    attempts: Int<1, { ATTEMPTS_MAX as u64 }>,
    /// Retries may be this share of the route's exchanges; beyond it none is sent again.
    budget: Percent,
    /// Retries per second that the budget allows in any case.
    budget_min: Int<0, 10_000>,
}

/// Changes of a head's fields; those of the connection and of framing are refused.
#[derive(JsonSchema)]
struct Headers {
    /// Takes the place of all fields of that name.
    set: Fields,
    /// Is added to those of that name.
    add: Fields,
    /// Removes all fields of that name. At most 64 of each of the three.
    remove: Vec<FieldName>,
}

/// What the service sees instead.
#[derive(JsonSchema)]
struct Rewrite {
    /// Host, and port, in place of the client's.
    #[schemars(extend("x-default" = "as the client asked"))]
    host: Authority,
    /// In place of the route's `path_prefix`; `/`: nothing, so that `/api/x` becomes `/x`.
    #[schemars(extend("x-default" = "as the client asked"))]
    path_prefix: PathPrefix,
}

/// Where the client is sent; one of `scheme`, `host`, `path_prefix` is required.
#[derive(JsonSchema)]
struct Redirect {
    /// 307 and 308 keep the method; browsers keep 301 and 308.
    status: RedirectStatus,
    /// Scheme.
    #[schemars(extend("x-default" = "as the client asked"))]
    scheme: Scheme,
    /// Host, and port.
    #[schemars(extend("x-default" = "as the client asked"))]
    host: Authority,
    /// In place of the route's `path_prefix`.
    #[schemars(extend("x-default" = "as the client asked"))]
    path_prefix: PathPrefix,
}

/// Who may come in (RFC 7617). One of `users`, `users_file` is required.
#[derive(JsonSchema)]
struct BasicAuth {
    /// What a browser shows.
    realm: Realm,
    /// Names and bcrypt hashes of cost 4 to 12, as `htpasswd -nbB NAME PASSWORD` prints them.
    users: Users,
    /// File of lines `name:hash`, as `htpasswd -B` writes them, at most 256 KiB.
    users_file: FilePath,
}

/// From where clients may come.
#[derive(JsonSchema)]
struct Addresses {
    /// Only from these; at most 1024.
    #[schemars(extend("x-default" = "everywhere"))]
    allow: Vec<Network>,
    /// Not from these, whatever `allow` says; at most 1024.
    #[schemars(extend("x-default" = "none"))]
    deny: Vec<Network>,
}

/// How much a route takes, at each relay.
#[derive(JsonSchema)]
struct RouteLimits {
    /// Exchanges of all clients; beyond: 429.
    rate: Rate,
    /// Exchanges of one client's address (IPv6: its /64); beyond: 429.
    rate_per_client: Rate,
    /// Exchanges at once; beyond: 503.
    concurrent: Int<1, COUNT>,
    /// Bytes of a request's body; beyond: 413. HTTP-born protocols only.
    body: Size<0, TIB>,
}

/// A bucket of `burst` tokens that fills by `count` in each `per`.
#[derive(JsonSchema)]
struct Rate {
    /// Exchanges …
    #[schemars(extend("x-required" = true))]
    count: Int<1, COUNT>,
    /// … in this time.
    per: Duration<1, DAY>,
    /// At once after a rest.
    #[schemars(extend("x-default" = "`count`"))]
    burst: Int<1, COUNT>,
}

/// Compression of responses, where the client takes it and the service did not.
#[derive(JsonSchema)]
struct Compression {
    /// From fast to small.
    level: Int<1, 9>,
    /// Bodies of a known length below this pass as they are.
    min_size: Size<0, { 1 << 30 }>,
}

/// Protocols.
#[derive(JsonSchema)]
struct Plugins {
    /// Where relative paths of libraries start; itself relative to the configuration's directory.
    #[schemars(extend("x-default" = "the configuration's directory"))]
    directory: FilePath,
    /// Shared libraries.
    libraries: Vec<Library>,
    /// Distinct libraries in the process's life (a library is never unloaded); then a restart is needed.
    generations: Int<1, 256>,
    /// This many panics …
    panics: Int<1, COUNT>,
    /// … in this time put a plugin in quarantine: its exchanges are answered with 503.
    panics_within: Duration<1, DAY>,
    /// A plugin that holds a thread longer is logged.
    slow_poll: Duration<1, DAY>,
}

/// One plugin.
#[derive(JsonSchema)]
struct Library {
    /// Unique.
    #[schemars(extend("x-required" = true))]
    name: Name,
    /// The shared library.
    #[schemars(extend("x-required" = true))]
    library: FilePath,
    /// Refuse a library with another hash.
    sha256: Sha256,
    /// `false`: start without it where it cannot be loaded.
    required: Bool,
    /// Only these.
    #[schemars(extend("x-default" = "all that it serves"))]
    protocol_types: Vec<ProtocolType>,
    /// The plugin's own settings, checked by it; its README has their keys.
    config: Block,
}

/// Health and metrics.
#[derive(JsonSchema)]
struct Health {
    /// Address to listen on; in Kubernetes the Pod's (`0.0.0.0:9082`).
    address: Listen,
}

/// Administration.
#[derive(JsonSchema)]
struct Admin {
    /// Address to listen on; loopback only.
    address: Listen,
}

/// Logs.
#[derive(JsonSchema)]
struct Log {
    /// Level.
    level: Level,
    /// Text for people, or one JSON object a line.
    format: LogFormat,
}

#[cfg(test)]
mod tests;
