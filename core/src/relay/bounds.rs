//! A relay's limits and timeouts, as sessions and handshakes take them.

use std::sync::Arc;
use std::time::Duration;

use sidelane_tunnel::{Budget, LaneConfig, Side};

use crate::config;
use crate::credentials::Rules;
use crate::plugin::Plugins;
use crate::tunnel::session::Settings;

/// Saturates.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// How sessions that begin are set up.
pub(super) fn session_settings(
    section: &config::Relay,
    plugins: &Plugins,
    budget: &Arc<Budget>,
) -> Settings {
    let limits = &section.limits;
    let lane = LaneConfig::new(Side::Relay);
    let window_max = limits.window;
    Settings {
        sessions_max: limits.sessions,
        sessions_of_principal_max: limits.sessions_per_principal,
        lanes_max: u32::try_from(limits.lanes_per_session).unwrap_or(u32::MAX),
        lane: LaneConfig {
            exchanges_max: limits.exchanges_per_session,
            // An exchange's credit, that which it begins with too.
            receive_window: lane.receive_window.min(window_max),
            window_max,
            replay_bytes_min: lane.replay_bytes_min.min(section.tunnel.replay),
            replay_bytes_max: section.tunnel.replay,
            replay_budget: Some(Arc::clone(budget)),
            ..lane
        },
        grace: section.tunnel.grace,
        advertise: section.tunnel.advertise.as_ref().map(|address| address.to_string().into()),
        protocols: plugins.types(),
        peers: section.tunnel.peers.iter().map(ToString::to_string).collect(),
    }
}

/// Who is let in.
pub(super) fn credential_rules(section: &config::Relay) -> Rules {
    let clients = section.tunnel.tls.as_ref().and_then(|tls| tls.clients.as_ref());
    Rules {
        token: section.tunnel.token.clone(),
        credentials: section.credentials.clone(),
        authorities: clients.map(|clients| clients.authorities.clone()),
        // The sidecar is to be told why, within its handshake's time.
        wait: section.timeouts.handshake / 2,
    }
}
