//! Where clients reach routes, told once to whoever reads the log.
//!
//! Pure but for the telling.

use std::sync::Arc;

use crate::config::Route;
use crate::explain::Public;

/// Lines told at once; a relay may have thousands of routes.
const LINES_MAX: usize = 20;

/// Tells the public address of each route, a line each.
pub(super) fn tell<'a>(routes: impl IntoIterator<Item = &'a Arc<Route>>, public: &Public) {
    let mut more = 0_usize;
    let mut told = 0;
    for route in routes {
        let urls = public.urls(route);
        let Some(address) = urls.first() else { continue };
        if told == LINES_MAX {
            more += 1;
            continue;
        }
        told += 1;
        match route.tunnels.is_empty() {
            true => tracing::info!(route = &*route.name, "public address {address} redirects"),
            false => tracing::info!(
                route = &*route.name,
                "public address {address} → tunnel {}",
                route.tunnels_text()
            ),
        }
    }
    if more > 0 {
        tracing::info!("and {more} more public addresses: /routes of the admin listener has all");
    }
}
