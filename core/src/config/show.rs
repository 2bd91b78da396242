//! The effective configuration for people: defaults filled in, secrets masked.

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::{
    Config, HostPort, LogFormat, Plugins, Relay, Relays, Route, Secret, Sidecar, Tunnel,
    duration_text, size_text,
};

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
                })
            })
            .collect();
        json!({
            "listeners": listeners,
            "base_domains": self.base_domains.iter().map(AsRef::as_ref).collect::<Vec<&str>>(),
            "tunnel": {
                "address": self.tunnel.address,
                "token": masked(self.tunnel.token.as_ref()),
            },
            "threads": self.threads,
            "limits": {
                "connections": limits.connections,
                "sessions": limits.sessions,
                "lanes_per_session": limits.lanes_per_session,
                "exchanges_per_session": limits.exchanges_per_session,
                "streams_per_connection": limits.streams_per_connection,
                "request_head": size_text(limits.request_head as u64),
                "request_headers": limits.request_headers,
                "queued": size_text(limits.queued),
                "window": size_text(limits.window),
                "handshakes_per_second": limits.handshakes_per_second,
                "handshakes_per_second_per_address": limits.handshakes_per_second_per_address,
            },
            "timeouts": {
                "request_head": duration_text(self.timeouts.request_head),
                "idle": duration_text(self.timeouts.idle),
                "open_wait": duration_text(self.timeouts.open_wait),
                "handshake": duration_text(self.timeouts.handshake),
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
                Relays::Listed(relays) => relays.iter().map(HostPort::to_string).collect(),
            },
            "token": masked(self.token.as_ref()),
            "lanes": self.lanes,
            "threads": self.threads,
            "limits": {
                "exchanges_per_session": self.limits.exchanges_per_session,
                "queued": size_text(self.limits.queued),
                "window": size_text(self.limits.window),
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
            "service": self.service.to_string(),
            "protocols": names(self.protocols.as_ref()),
            "connect_timeout": duration_text(self.connect_timeout),
        })
    }
}

impl Route {
    /// Returns the route as it may stand in a file, secrets masked.
    #[must_use]
    pub fn to_json(&self) -> Json {
        let mut map = serde_json::Map::new();
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
        map.insert("tunnel".into(), self.tunnels_text().into());
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
