//! The effective configuration for people: defaults filled in, secrets masked.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use ipnet::IpNet;
use serde_json::{Value as Json, json};

use super::policy::{HeaderChanges, Policies, Rate};
use super::show_tls;
use super::{
    Balance, Carries, Config, HealthCheck, HttpVersion, LogFormat, Plugins, Probe, ProxyVersion,
    Relay, Relays, Route, Secret, Share, Sidecar, Tunnel, duration_text, network_text, size_text,
};

type Map = serde_json::Map<String, Json>;

impl Config {
    /// Returns the effective configuration, defaults filled in and secrets masked.
    #[must_use]
    pub fn to_masked_json(&self) -> Json {
        json!({
            "version": 1,
            "relay": self.relay.as_ref().map(Relay::to_json),
            "sidecar": self.sidecar.as_ref().map(Sidecar::to_json),
            "tunnels": self.tunnels.iter().map(|tunnel| tunnel.to_json()).collect::<Vec<_>>(),
            "routes": self.routes.iter().map(|route| route.to_json()).collect::<Vec<_>>(),
            "plugins": self.plugins.to_json(),
            "health": self.health.map(|address| json!({ "address": address })),
            "admin": self.admin.map(|address| json!({ "address": address })),
            "log": {
                "level": self.log.level.as_ref(),
                "format": match self.log.format {
                    LogFormat::Text => "text",
                    LogFormat::Json => "json",
                },
            },
            "drain_timeout": duration_text(self.drain_timeout),
            "withdraw_timeout": duration_text(self.withdraw_timeout),
        })
    }
}

fn masked(token: Option<&Secret>) -> Option<String> {
    token.map(Secret::to_string)
}

impl Relay {
    fn to_json(&self) -> Json {
        let limits = &self.limits;
        let listeners: Vec<Json> = self
            .listeners
            .iter()
            .map(|listener| {
                json!({
                    "name": listener.name.as_ref(),
                    "address": listener.address,
                    "protocol_type": listener.protocol_type().map(AsRef::as_ref),
                    "sniff": listener.carries == Carries::Sniffed,
                    "proxy_protocol": listener.proxy_protocol,
                    "balance": match listener.balance {
                        Balance::Kernel => "kernel",
                        Balance::Exact => "exact",
                    },
                    "tls": listener.tls.as_ref().map(show_tls::listener),
                    "https_redirect": listener.https_redirect,
                })
            })
            .collect();
        json!({
            "listeners": listeners,
            "base_domains": self.base_domains.iter().map(AsRef::as_ref).collect::<Vec<&str>>(),
            "trusted_proxies": self.trusted_proxies.iter().map(network_text).collect::<Vec<_>>(),
            "max_connection_age": self.max_connection_age.map(duration_text),
            "tunnel": {
                "address": self.tunnel.address,
                "listener": self.tunnel.listener.as_deref(),
                "tls": self.tunnel.tls.as_ref().map(show_tls::tunnel),
                "insecure": self.tunnel.insecure,
                "token": masked(self.tunnel.token.as_ref()),
                "peers": self.tunnel.peers.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "advertise": self.tunnel.advertise.as_ref().map(ToString::to_string),
                "grace": duration_text(self.tunnel.grace),
                "replay": size_text(self.tunnel.replay),
            },
            "credentials": self.credentials.principals.iter().map(|one| show_tls::principal(one)).collect::<Vec<_>>(),
            "token_issuers": self.credentials.issuers.iter().map(|one| show_tls::issuer(one)).collect::<Vec<_>>(),
            "acme": self.acme.as_ref().map(show_tls::acme),
            "warmup": {
                "time": duration_text(self.warmup.time),
                "sessions": self.warmup.sessions,
            },
            "threads": self.threads,
            "limits": {
                "connections": limits.connections,
                "sessions": limits.sessions,
                "sessions_per_principal": limits.sessions_per_principal,
                "lanes_per_session": limits.lanes_per_session,
                "exchanges_per_session": limits.exchanges_per_session,
                "streams_per_connection": limits.streams_per_connection,
                "request_head": size_text(limits.request_head as u64),
                "request_headers": limits.request_headers,
                "queued": size_text(limits.queued),
                "window": size_text(limits.window),
                "handshakes_per_second": limits.handshakes_per_second,
                "handshakes_per_second_per_address": limits.handshakes_per_second_per_address,
                "failed_handshakes_per_minute_per_address":
                    limits.failed_handshakes_per_minute_per_address,
                "tls_handshakes": limits.tls_handshakes,
                "tls_handshakes_per_address": limits.tls_handshakes_per_address,
            },
            "timeouts": {
                "request_head": duration_text(self.timeouts.request_head),
                "idle": duration_text(self.timeouts.idle),
                "open_wait": duration_text(self.timeouts.open_wait),
                "handshake": duration_text(self.timeouts.handshake),
                "tls_handshake": duration_text(self.timeouts.tls_handshake),
            },
        })
    }
}

impl Sidecar {
    fn to_json(&self) -> Json {
        json!({
            "name": self.name.as_ref(),
            "relays": match &self.relays {
                Relays::Embedded => Json::Null,
                Relays::Listed(relays) => relays.iter().map(show_tls::relay).collect(),
            },
            "proxy": self.proxy.as_ref().map(ToString::to_string),
            "follow_peers": self.follow_peers,
            "resolve_interval": duration_text(self.resolve_interval),
            "token": masked(self.token.as_ref()),
            "token_file": self.token_file.as_deref(),
            "lanes": self.lanes,
            "dedicated": self.dedicated,
            "threads": self.threads,
            "limits": {
                "exchanges_per_session": self.limits.exchanges_per_session,
                "queued": size_text(self.limits.queued),
                "window": size_text(self.limits.window),
                "replay": size_text(self.limits.replay),
            },
            "timeouts": {
                "dial": duration_text(self.timeouts.dial),
                "handshake": duration_text(self.timeouts.handshake),
            },
        })
    }
}

fn names(types: Option<&Vec<Arc<str>>>) -> Option<Vec<&str>> {
    types.map(|types| types.iter().map(AsRef::as_ref).collect())
}

impl Tunnel {
    fn to_json(&self) -> Json {
        json!({
            "name": self.name.as_ref(),
            "service": self.service_text(),
            "protocols": names(self.protocols.as_ref()),
            "connect_timeout": duration_text(self.connect_timeout),
            "tls": self.tls.as_deref().map(show_tls::service),
            "http_version": match self.http_version {
                HttpVersion::Http1 => Json::from(1),
                HttpVersion::Http2 => Json::from(2),
                HttpVersion::Auto => Json::from("auto"),
            },
            "pool": {
                "idle_timeout": self.pool.idle_timeout.map(duration_text),
                "idle": self.pool.idle,
                "connections": self.pool.connections,
            },
            "proxy_protocol": self.proxy_protocol.map(|version| match version {
                ProxyVersion::V1 => "v1",
                ProxyVersion::V2 => "v2",
            }),
            "health_check": self.health_check.as_ref().map(HealthCheck::to_json),
            "wait": duration_text(self.wait),
            "weight": self.weight,
        })
    }
}

impl HealthCheck {
    fn to_json(&self) -> Json {
        let mut json = json!({
            "interval": duration_text(self.interval),
            "timeout": duration_text(self.timeout),
            "healthy_after": self.healthy_after,
            "unhealthy_after": self.unhealthy_after,
        });
        match &self.probe {
            Probe::Tcp => json["type"] = "tcp".into(),
            Probe::Http { path, host } => {
                json["type"] = "http".into();
                json["path"] = path.as_ref().into();
                json["host"] = host.as_deref().into();
            }
            Probe::Grpc { service } => {
                json["type"] = "grpc".into();
                json["service"] = service.as_ref().into();
            }
        }
        json
    }
}

impl Route {
    /// Returns the route as it may stand in a file, secrets masked.
    #[must_use]
    pub fn to_json(&self) -> Json {
        let mut map = Map::new();
        map.insert("name".into(), self.name.as_ref().into());
        let host = self.matches.host.to_key_value();
        map.extend(host.map(|(key, host)| (key.to_owned(), host.into())));
        let matches = &self.matches;
        let prefix = (!matches.path_prefix.is_empty()).then(|| matches.path_prefix.as_ref());
        map.extend(prefix.map(|prefix| ("path_prefix".to_owned(), prefix.into())));
        map.extend(matches.listener.as_deref().map(|name| ("listener".to_owned(), name.into())));
        map.extend(
            matches.protocol_type.as_deref().map(|name| ("protocol_type".to_owned(), name.into())),
        );
        match self.tunnels.as_slice() {
            [] => {}
            [share] => drop(map.insert("tunnel".into(), share.tunnel.as_ref().into())),
            shares => {
                let share = |share: &Share| json!({ "name": share.tunnel.as_ref(), "weight": share.weight });
                map.insert("tunnels".into(), shares.iter().map(share).collect());
            }
        }
        map.extend(self.policies.iter().flat_map(|asked| policies(asked, Secrets::Masked)));
        if !self.options.is_empty() {
            let options: serde_json::Map<String, Json> = self
                .options
                .iter()
                .map(|(name, block)| (name.to_string(), block.masked.clone()))
                .collect();
            map.insert("options".into(), options.into());
        }
        map.into()
    }
}

impl Plugins {
    fn to_json(&self) -> Json {
        let libraries: Vec<Json> = self
            .libraries
            .iter()
            .map(|library| {
                json!({
                    "name": library.name.as_ref(),
                    "library": library.path.display().to_string(),
                    "sha256": library.sha256.map(|hash| {
                        hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
                    }),
                    "required": library.required,
                    "protocol_types": names(library.protocol_types.as_ref()),
                    "config": library.config.masked,
                })
            })
            .collect();
        json!({
            "libraries": libraries,
            "generations": self.generations,
            "panics": self.panics,
            "panics_within": duration_text(self.panics_within),
            "slow_poll": duration_text(self.slow_poll),
        })
    }
}

/// Whether hashes of passwords and secrets in fields are shown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Secrets {
    Shown,
    Masked,
}

/// Returns the policies under the keys of a route in a file; those that ask for nothing are left
/// out.
pub(super) fn policies(policies: &Policies, secrets: Secrets) -> Map {
    let mut map = Map::new();
    let mut put = |key: &str, value: Option<Json>| {
        map.extend(value.map(|value| (key.to_owned(), value)));
    };
    let Policies {
        timeouts, request_headers, response_headers, rewrite, addresses, limits, ..
    } = policies;
    put(
        "timeouts",
        object([
            ("connect", timeouts.connect.map(duration)),
            ("response_head", timeouts.response_head.map(duration)),
            ("idle", timeouts.idle.map(duration)),
            ("total", timeouts.total.map(duration)),
        ]),
    );
    put(
        "retries",
        policies.retries.map(|retries| {
            json!({
                "attempts": retries.attempts,
                "budget": format!("{}%", retries.budget_percent),
                "budget_min": retries.budget_min,
            })
        }),
    );
    put("request_headers", headers(request_headers, secrets));
    put("response_headers", headers(response_headers, secrets));
    put(
        "rewrite",
        object([
            ("host", rewrite.host.as_deref().map(Json::from)),
            ("path_prefix", rewrite.path_prefix.as_deref().map(path_prefix)),
        ]),
    );
    put(
        "redirect",
        policies.redirect.as_ref().and_then(|redirect| {
            object([
                ("status", Some(redirect.status.into())),
                ("scheme", redirect.scheme.as_deref().map(Json::from)),
                ("host", redirect.host.as_deref().map(Json::from)),
                ("path_prefix", redirect.path_prefix.as_deref().map(path_prefix)),
            ])
        }),
    );
    put(
        "basic_auth",
        policies.basic_auth.as_ref().map(|auth| {
            let hash = |hash: &str| if secrets == Secrets::Shown { hash } else { "***" }.to_owned();
            let users: Map = auth
                .users
                .iter()
                .map(|(name, text)| (name.to_string(), hash(text).into()))
                .collect();
            json!({ "realm": auth.realm.as_ref(), "users": users })
        }),
    );
    put(
        "addresses",
        object([("allow", networks(&addresses.allow)), ("deny", networks(&addresses.deny))]),
    );
    put(
        "limits",
        object([
            ("rate", limits.rate.map(rate)),
            ("rate_per_client", limits.rate_per_client.map(rate)),
            ("concurrent", limits.concurrent.map(Json::from)),
            ("body", limits.body.map(|body| size_text(body).into())),
        ]),
    );
    put(
        "compression",
        policies.compression.map(|compression| {
            json!({ "level": compression.level, "min_size": size_text(compression.min_size) })
        }),
    );
    put(
        "hsts",
        policies.hsts.map(|hsts| {
            json!({
                "max_age": duration_text(hsts.max_age),
                "include_subdomains": hsts.include_subdomains,
                "preload": hsts.preload,
            })
        }),
    );
    put(
        "affinity",
        policies.affinity.as_ref().map(|affinity| {
            json!({
                "cookie": affinity.cookie.as_ref(),
                "max_age": duration_text(affinity.max_age),
            })
        }),
    );
    map
}

/// Returns what is there as an object; `None`: nothing is.
fn object<const N: usize>(entries: [(&str, Option<Json>); N]) -> Option<Json> {
    let map: Map =
        entries.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect();
    (!map.is_empty()).then(|| map.into())
}

fn duration(value: Duration) -> Json {
    duration_text(value).into()
}

/// Empty is the root, which a file cannot write otherwise.
fn path_prefix(prefix: &str) -> Json {
    if prefix.is_empty() { "/" } else { prefix }.into()
}

fn rate(rate: Rate) -> Json {
    json!({ "count": rate.count, "per": duration_text(rate.per), "burst": rate.burst })
}

fn networks(networks: &[IpNet]) -> Option<Json> {
    (!networks.is_empty()).then(|| networks.iter().map(network_text).collect())
}

fn headers(changes: &HeaderChanges, secrets: Secrets) -> Option<Json> {
    let remove = &changes.remove;
    object([
        ("remove", (!remove.is_empty()).then(|| remove.iter().map(HeaderName::as_str).collect())),
        ("set", fields(&changes.set, secrets)),
        ("add", fields(&changes.add, secrets)),
    ])
}

/// Returns the fields by name; those of one name keep their order.
fn fields(fields: &[(HeaderName, HeaderValue)], secrets: Secrets) -> Option<Json> {
    let mut map = Map::new();
    for (name, value) in fields {
        // The reader takes nothing else.
        let value = match secrets {
            Secrets::Masked if value.is_sensitive() => "***",
            _ => value.to_str().unwrap_or_default(),
        };
        let value = Json::from(value);
        match map.get_mut(name.as_str()) {
            Some(Json::Array(values)) => values.push(value),
            Some(first) => *first = vec![first.take(), value].into(),
            None => drop(map.insert(name.to_string(), value)),
        }
    }
    (!map.is_empty()).then(|| map.into())
}
