//! The `tunnels` section.

use std::sync::Arc;
use std::time::Duration;

use super::tls::SERVICE_TLS_KEYS;
use super::{HEALTH_CHECK_KEYS, POOL_KEYS, Reader, TUNNEL_KEYS, protocol_types, timeout};
use crate::config::raw::{Field, Section};
use crate::config::{HealthCheck, HttpVersion, Pool, Probe, ProxyVersion, Tunnel, value};

pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Most connections of a pool: more than there are ports for one address.
pub(crate) const CONNECTIONS_MAX: usize = 65_536;

/// Shortest time between two checks: a check is not to be the service's load.
const CHECK_INTERVAL_MIN: Duration = Duration::from_millis(100);
/// As Kubernetes' probes, but twice as often: a check of a neighbour on the machine costs little.
pub(crate) const CHECK_INTERVAL: Duration = Duration::from_secs(5);
pub(crate) const CHECK_TIMEOUT: Duration = Duration::from_secs(1);
pub(crate) const HEALTHY_AFTER: u32 = 1;
pub(crate) const UNHEALTHY_AFTER: u32 = 3;
/// Largest weight of a sidecar: a machine that takes a hundred times what another does should not stand
/// beside it.
pub(crate) const SIDECAR_WEIGHT_MAX: u32 = 100;

/// Most checks in a row that a change of state waits for.
pub(crate) const CHECKS_MAX: u32 = 100;

/// Longest name of a gRPC service that is asked about.
const SERVICE_BYTES_MAX: usize = 255;

impl Reader<'_> {
    pub(super) fn tunnel(&mut self, field: &Field<'_>) -> Option<Tunnel> {
        let section = field.section(TUNNEL_KEYS)?;
        let name = section.require("name", "text").and_then(|f| f.parse(value::name));
        let service = section
            .require(
                "service",
                "host:port, as in 127.0.0.1:3000, the same behind https://, or unix:/path",
            )
            .and_then(|f| f.parse(value::service));
        let mut protocols = None;
        section.set("protocols", &mut protocols, |f| protocol_types(f).map(Some));
        let mut connect_timeout = CONNECT_TIMEOUT;
        section
            .set("connect_timeout", &mut connect_timeout, |f| timeout(f, Duration::from_millis(1)));
        // Of a service that cannot be read it is not known.
        let is_https = service.as_ref().is_none_or(|(_, is_https)| *is_https);
        let mut tls = None;
        if let Some(field) = section.field("tls") {
            tls = self.client_tls(&field, SERVICE_TLS_KEYS);
            if !is_https {
                field.fail(
                    "goes with a service by TLS (accepted: with https:// in front of the service's address)",
                );
            }
        }
        let mut http_version = if is_https { HttpVersion::Auto } else { HttpVersion::Http1 };
        section.set("http_version", &mut http_version, |f| {
            let version = f.one_of(&[
                ("1", HttpVersion::Http1),
                ("2", HttpVersion::Http2),
                ("auto", HttpVersion::Auto),
            ])?;
            if version == HttpVersion::Auto && !is_https {
                f.fail(
                    "auto is agreed on in the TLS handshake (accepted: 1, 2; or https:// in front of the \
                     service's address)",
                );
            }
            Some(version)
        });
        let mut pool = Pool::default();
        section.set("pool", &mut pool, self::pool);
        let mut proxy_protocol = None;
        section.set("proxy_protocol", &mut proxy_protocol, |f| {
            f.one_of(&[("v1", ProxyVersion::V1), ("v2", ProxyVersion::V2)]).map(Some)
        });
        if proxy_protocol.is_some()
            && let Some(idle) = section.field("pool").and_then(|pool| pool.child("idle"))
        {
            idle.warn(
                "has no effect: with proxy_protocol no connection is kept for another client",
            );
        }
        let mut health_check = None;
        section.set("health_check", &mut health_check, |f| self::health_check(f).map(Some));
        let mut wait = Duration::ZERO;
        section.set("wait", &mut wait, |f| timeout(f, Duration::ZERO));
        let mut weight = 1;
        section.set("weight", &mut weight, |f| f.integer(1, SIDECAR_WEIGHT_MAX));
        let (service, is_https) = service?;
        Some(Tunnel {
            name: name?,
            service,
            protocols,
            connect_timeout,
            tls: is_https.then(|| Arc::new(tls.unwrap_or_default())),
            http_version,
            pool,
            proxy_protocol,
            health_check,
            wait,
            weight,
        })
    }
}

fn pool(field: &Field<'_>) -> Option<Pool> {
    let section = field.section(POOL_KEYS)?;
    let mut pool = Pool::default();
    section.set("idle_timeout", &mut pool.idle_timeout, |f| {
        timeout(f, Duration::from_millis(1)).map(Some)
    });
    section.set("idle", &mut pool.idle, |f| f.integer(0, CONNECTIONS_MAX).map(Some));
    section.set("connections", &mut pool.connections, |f| f.integer(1, CONNECTIONS_MAX).map(Some));
    if let (Some(idle), Some(connections)) = (pool.idle, pool.connections)
        && idle > connections
        && let Some(field) = section.field("idle")
    {
        field.warn(format!("{idle} is more than connections, {connections}, which bounds both"));
    }
    Some(pool)
}

fn health_check(field: &Field<'_>) -> Option<HealthCheck> {
    let section = field.section(HEALTH_CHECK_KEYS)?;
    let probe = section
        .require("type", "tcp, http, grpc")
        .and_then(|field| field.one_of(&[("tcp", "tcp"), ("http", "http"), ("grpc", "grpc")]))
        .map(|kind| probe(&section, kind));
    let mut check = HealthCheck {
        probe: Probe::Tcp,
        interval: CHECK_INTERVAL,
        timeout: CHECK_TIMEOUT,
        healthy_after: HEALTHY_AFTER,
        unhealthy_after: UNHEALTHY_AFTER,
    };
    section.set("interval", &mut check.interval, |f| timeout(f, CHECK_INTERVAL_MIN));
    section.set("timeout", &mut check.timeout, |f| timeout(f, Duration::from_millis(1)));
    section.set("healthy_after", &mut check.healthy_after, |f| f.integer(1, CHECKS_MAX));
    section.set("unhealthy_after", &mut check.unhealthy_after, |f| f.integer(1, CHECKS_MAX));
    check.probe = probe?;
    Some(check)
}

fn probe(section: &Section<'_>, kind: &str) -> Probe {
    for (key, of) in [("path", "http"), ("host", "http"), ("service", "grpc")] {
        if let Some(field) = section.field(key).filter(|_| of != kind) {
            field.fail(format!("goes with type {of} (accepted: with type {kind}, leave it out)"));
        }
    }
    match kind {
        "http" => {
            let mut path: Arc<str> = "/".into();
            section.set("path", &mut path, |f| f.parse(value::request_path));
            let mut host = None;
            section.set("host", &mut host, |f| f.parse(value::authority).map(Some));
            Probe::Http { path, host }
        }
        "grpc" => {
            let mut service: Arc<str> = "".into();
            section.set("service", &mut service, |f| f.parse(grpc_service));
            Probe::Grpc { service }
        }
        _ => Probe::Tcp,
    }
}

fn grpc_service(text: &str) -> Result<Arc<str>, String> {
    if text.len() <= SERVICE_BYTES_MAX && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(text.into())
    } else {
        Err(format!(
            "{text:?} is not the name of a gRPC service (accepted: at most {SERVICE_BYTES_MAX} \
             visible ASCII characters, as in shop.v1.Orders)"
        ))
    }
}
