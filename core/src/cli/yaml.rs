//! A configuration as JSON written as the file that would say it: keys in a file's order, what is not
//! set left out.

use serde::ser::{Serialize, SerializeMap as _, SerializeSeq as _, Serializer};
use serde_json::Value as Json;

use crate::config::ROOT_KEYS;

/// Keys that stand first in whatever has them: what it is, before what it does.
const FIRST_KEYS: &[&str] = &[
    "name",
    "principal",
    "cert",
    "type",
    "address",
    "library",
    "service",
    "listeners",
    "relays",
    "subdomain",
    "host",
    "wildcard",
    "path_prefix",
    "listener",
    "protocol_type",
    "tunnel",
    "tunnels",
];

/// Keys below which everything is a plugin's, a null too.
const PLUGINS_KEYS: &[&str] = &["config", "options"];

/// What a certificate says, and a file does not.
const CERTIFICATE_FACTS: [&str; 2] = ["names", "not_after"];

/// Returns the configuration as YAML.
pub(super) fn of(config: &Json) -> String {
    let document = Value { json: config, first: ROOT_KEYS, is_plugins: false };
    serde_saphyr::to_string(&document).unwrap_or_else(|_| format!("{config:#}\n"))
}

#[derive(Clone, Copy)]
struct Value<'a> {
    json: &'a Json,
    /// Keys that stand first.
    first: &'static [&'static str],
    /// A plugin's own.
    is_plugins: bool,
}

impl Value<'_> {
    fn below<'b>(&self, key: &str, json: &'b Json) -> Value<'b> {
        let is_plugins = self.is_plugins || PLUGINS_KEYS.contains(&key);
        Value { json, first: FIRST_KEYS, is_plugins }
    }

    fn place(&self, key: &str) -> usize {
        if self.is_plugins {
            return 0;
        }
        self.first.iter().position(|first| *first == key).unwrap_or(self.first.len())
    }
}

impl Serialize for Value<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.json {
            Json::Object(map) => {
                let is_certificate = map.contains_key("cert");
                let is_written = |(key, json): &(&String, &Json)| {
                    let is_fact = is_certificate && CERTIFICATE_FACTS.contains(&key.as_str());
                    self.is_plugins || !(json.is_null() || is_fact)
                };
                let mut entries: Vec<_> = map.iter().filter(is_written).collect();
                entries.sort_by_key(|(key, _)| self.place(key));
                let mut written = serializer.serialize_map(Some(entries.len()))?;
                for (key, json) in entries {
                    written.serialize_entry(key, &self.below(key, json))?;
                }
                written.end()
            }
            Json::Array(items) => {
                let mut written = serializer.serialize_seq(Some(items.len()))?;
                for json in items {
                    written.serialize_element(&Value { json, ..self.below("", json) })?;
                }
                written.end()
            }
            // A file's `${` begins a substitution.
            Json::String(text) if text.contains("${") => {
                serializer.serialize_str(&text.replace("${", "$${"))
            }
            other => other.serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::config::{Config, Source, parse};

    /// Everything that a file can say, but for secrets.
    const ALL: &str = r#"
version: 1
drain_timeout: 7s
withdraw_timeout: 3s
relay:
  listeners:
    - { name: web, address: 127.0.0.1:9080, proxy_protocol: true, balance: exact }
    - { name: any, address: 127.0.0.1:9443, sniff: true }
    - { name: lines, address: "[::1]:9444", protocol_type: LINE }
    - { name: https, address: 127.0.0.1:9445, tls: { acme: [a.example.org], min_version: "1.3" } }
    - { name: plain, address: 127.0.0.1:9446, https_redirect: 443 }
  base_domains: [localhost, example.org]
  trusted_proxies: [10.0.0.0/8, 192.0.2.7]
  max_connection_age: 1h
  tunnel: { address: 127.0.0.1:9081, listener: https, tls: { acme: [t.example.org] } }
  credentials:
    - principal: cluster
      jwt: [{ issuer: c, subject: "*:a", namespace: "n-*", service_account: "*" }]
      subdomains: ["{service_account}.{namespace}"]
      hosts: ["*.example.org"]
      tunnels: ["{namespace}.*"]
      listeners: [lines]
  token_issuers:
    - { name: c, issuer: i, audiences: [a, b], jwks_url: "https://k.example/keys", refresh: 1m, leeway: 5s }
  acme: { directory: "https://ca.example/d", contacts: ["mailto:a@b.example"], storage: /s, accept_terms: true }
  threads: 2
  limits: { connections: 77, request_head: 17KiB, window: 1MiB }
  timeouts: { request_head: 9s, open_wait: 0s }
sidecar:
  name: laptop
  relays: [127.0.0.1:9081, { address: 127.0.0.1:9181, tls: { server_name: a.internal } }]
  resolve_interval: 20s
  lanes: 3
  timeouts: { dial: 4s }
tunnels:
  - name: web
    service: 127.0.0.1:3000
    protocols: [HTTP, WEBSOCKET]
    http_version: 2
    pool: { idle_timeout: 50s, idle: 3 }
    proxy_protocol: v2
    health_check: { type: http, path: /healthz, host: app.local, interval: 5s }
    wait: 30s
  - { name: rpc, service: "unix:/run/$${x}.sock", health_check: { type: grpc, service: a.B } }
  - { name: tls, service: "https://h.example:2", tls: { server_name: x.internal } }
  - { name: any, service: "https://h.example:3", http_version: 1, tls: { insecure_skip_verify: true } }
  - { name: tcp, service: "h.example:1", health_check: { type: tcp } }
routes:
  - name: shop
    subdomain: shop
    path_prefix: /api
    listener: web
    tunnels: [{ name: web, weight: 90 }, { name: rpc, weight: 0 }]
    timeouts: { connect: 2s, total: 5m }
    retries: { attempts: 2, budget: 20%, budget_min: 10 }
    request_headers: { set: { x-env: "true", x-no: "~" }, add: { x-tag: [a, "1e3"] }, remove: [x-debug] }
    response_headers: { set: { x-a: "'a': #b" } }
    rewrite: { host: app.internal, path_prefix: / }
    addresses: { allow: [10.0.0.0/8], deny: [10.1.0.0/16] }
    limits: { rate: { count: 100, per: 1s, burst: 200 }, concurrent: 50, body: 10MiB }
    compression: { level: 5, min_size: 1KiB }
    hsts: { max_age: 1h, include_subdomains: true }
    affinity: { cookie: stick, max_age: 1h }
    options: { HTTP: { a: null, b: [1, "1", 1.5, "no"], c: "$${d}" } }
  - { name: old, host: "*.old.example", redirect: { status: 308, scheme: https, path_prefix: /x } }
  - { name: rest, wildcard: "*", tunnel: rpc, protocol_type: GRPC }
  - { name: lines, listener: lines, tunnel: tcp }
plugins:
  libraries:
    - { name: http, library: /p/http.so, required: false, protocol_types: [HTTP], config: { x: null } }
    - { name: line, library: /p/line.so }
  generations: 5
  slow_poll: 9ms
health: { address: 127.0.0.1:9082 }
admin: { address: 127.0.0.1:9083 }
log: { level: "info,sidelane=debug", format: json }
"#;

    fn read(text: &str) -> Config {
        let source = Source::from_text("/c/c.yaml".as_ref(), text);
        let env = |name: &str| (name == "SIDELANE_PLUGIN_DIR").then(|| "/p".to_owned());
        parse(&source, &env).unwrap_or_else(|errors| panic!("{errors}\n{text}"))
    }

    /// Returns all that counts of a configuration.
    fn facts(config: &Config) -> String {
        let Config { relay, sidecar, tunnels, routes, plugins, health, admin, log, .. } = config;
        let rest = (health, admin, log, config.drain_timeout, config.withdraw_timeout);
        format!("{relay:#?}{sidecar:#?}{tunnels:#?}{routes:#?}{plugins:#?}{rest:#?}")
    }

    #[track_caller]
    fn check(text: &str) {
        let config = read(text);
        let written = of(&config.to_masked_json());
        let again = read(&written);
        assert_eq!(facts(&again), facts(&config), "{written}");
        assert_eq!(again.routes, config.routes);
        assert_eq!(again.tunnels, config.tunnels);
        assert_eq!((again.relay, again.sidecar), (config.relay, config.sidecar));
    }

    #[test]
    fn what_is_written_reads_as_the_same_configuration() {
        check(ALL);
        check("version: 1\nrelay: {}\n");
        check("version: 1\nrelay: {}\nsidecar: {}\n");
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sidecar.yaml");
        check(&std::fs::read_to_string(file).unwrap());
    }

    #[test]
    fn a_certificate_is_written_as_a_file_has_it() {
        let shown = json!({ "certificates": [
            { "cert": "a.crt", "key": "***", "names": ["a.example"], "not_after": "then" },
        ] });
        assert_eq!(of(&shown), "certificates:\n- cert: a.crt\n  key: \"***\"\n");
    }

    #[test]
    fn keys_stand_as_people_write_them() {
        let config =
            read("version: 1\nrelay: {}\ntunnels: [{ name: a, service: '127.0.0.1:1' }]\n");
        let written = of(&config.to_masked_json());
        let roots: Vec<&str> = written
            .lines()
            .filter(|line| line.starts_with(|first: char| first.is_ascii_lowercase()))
            .filter_map(|line| line.split(':').next())
            .collect();
        assert_eq!(
            roots,
            [
                "version",
                "relay",
                "tunnels",
                "routes",
                "plugins",
                "log",
                "drain_timeout",
                "withdraw_timeout"
            ],
            "{written}"
        );
        assert!(written.contains("- name: a\n  service: 127.0.0.1:1\n"), "{written}");
        assert!(!written.contains("null"), "{written}");
    }
}
