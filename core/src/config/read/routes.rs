//! The `routes` section, but for policies.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::policies::policies;
use super::{Names, ROUTE_KEYS, SHARE_KEYS, block, refer};
use crate::config::files::Files;
use crate::config::policy::Policies;
use crate::config::raw::{Field, Section};
use crate::config::{HostMatch, Match, MatchSpec, Route, Share, value};

/// Most tunnels that a route's exchanges are split between.
pub(crate) const SHARES_MAX: usize = 16;

/// Largest weight; the sum of all stays far from a 32-bit number's end.
pub(crate) const WEIGHT_MAX: u32 = 10_000;

/// What a route's references are checked against; `None`: not known in this process.
pub(super) struct Known<'a> {
    pub(super) tunnels: Option<Names<'a>>,
    pub(super) listeners: Option<Names<'a>>,
}

pub(super) fn route(field: &Field<'_>, known: &Known<'_>, files: &mut Files<'_>) -> Option<Route> {
    let section = field.section(ROUTE_KEYS)?;
    let texts = ["subdomain", "host", "wildcard", "path_prefix", "listener", "protocol_type"]
        .map(|key| section.field(key).map(|field| field.text()));
    // A part that is there but no text is told already.
    let shapes_good = texts.iter().all(|text| !matches!(text, Some(None)));
    let [subdomain, host, wildcard, path_prefix, listener, protocol_type] =
        texts.map(Option::flatten);
    let spec = MatchSpec { subdomain, host, wildcard, path_prefix, listener, protocol_type };
    let matches = match Match::parse(&spec) {
        _ if !shapes_good => None,
        Ok(matches) => Some(matches),
        Err((key, message)) => {
            match section.field(key) {
                // Through the field, so that what came from a file stays hidden.
                Some(field) => drop(field.parse(|_| Err::<(), _>(message))),
                // What it takes may stand behind a key that is mistyped.
                None if section.has_unknown() => {}
                None => section.fail(&message),
            }
            None
        }
    };
    if let (Some(listeners), Some(name)) = (&known.listeners, section.field("listener")) {
        refer(&name, "listener", listeners);
    }
    let policies = policies(&section, Some(files));
    let tunnels = tunnels(&section, known);
    let mut name = None;
    section.set("name", &mut name, |f| f.parse(value::name).map(Some));
    let mut options = BTreeMap::new();
    section.set("options", &mut options, |f| {
        let mut options = BTreeMap::new();
        for (entry, field) in f.entries()? {
            match value::protocol_type(&entry.key) {
                Ok(protocol_type) => {
                    options.insert(protocol_type, block(&field));
                }
                Err(message) => field.fail(message),
            }
        }
        Some(options)
    });
    let matches = matches?;
    if let Some(message) = pointless(&policies, &matches) {
        section.fail(&message);
    }
    Some(Route {
        name: name.unwrap_or_else(|| matches.to_string().into()),
        tunnels: tunnels?,
        matches,
        options,
        policies: (!policies.is_default()).then(|| Arc::new(policies)),
    })
}

/// Reads one of `tunnel`, `tunnels`; with `redirect` neither.
fn tunnels(section: &Section<'_>, known: &Known<'_>) -> Option<Vec<Share>> {
    let given: Vec<&str> = ["tunnel", "tunnels", "redirect"]
        .into_iter()
        .filter(|key| section.field(key).is_some())
        .collect();
    match given.as_slice() {
        [] if section.is_mistyped("tunnel")
            || section.is_mistyped("tunnels")
            || section.is_mistyped("redirect") =>
        {
            None
        }
        [] => {
            section.fail(
                "goes nowhere (accepted: one of `tunnel`, the name of a tunnel, `tunnels`, \
                 `redirect`)",
            );
            None
        }
        ["tunnel"] => {
            let tunnel = tunnel_name(&section.field("tunnel")?, known)?;
            Some(vec![Share { tunnel, weight: 1 }])
        }
        ["tunnels"] => shares(&section.field("tunnels")?, known),
        ["redirect"] => Some(Vec::new()),
        several => {
            section.fail(&format!(
                "has {} at once (accepted: one of tunnel, tunnels, redirect)",
                several.join(" and ")
            ));
            None
        }
    }
}

fn tunnel_name(field: &Field<'_>, known: &Known<'_>) -> Option<Arc<str>> {
    let name = field.parse(value::name)?;
    if let Some(tunnels) = &known.tunnels {
        refer(field, "tunnel", tunnels);
    }
    Some(name)
}

fn shares(field: &Field<'_>, known: &Known<'_>) -> Option<Vec<Share>> {
    let items = field.items()?;
    if items.is_empty() || items.len() > SHARES_MAX {
        field.fail(format!("has {} tunnels (accepted: 1 to {SHARES_MAX})", items.len()));
        return None;
    }
    let mut shares: Vec<Share> = Vec::new();
    for item in &items {
        let Some(section) = item.section(SHARE_KEYS) else { continue };
        let name = section.require("name", "the name of a tunnel");
        let name = name.and_then(|field| Some((tunnel_name(&field, known)?, field)));
        let mut weight = 1;
        section.set("weight", &mut weight, |field| field.integer(0, WEIGHT_MAX));
        let Some((tunnel, field)) = name else { continue };
        if shares.iter().any(|share| share.tunnel == tunnel) {
            field.fail(format!("\"{tunnel}\" stands here twice"));
        }
        shares.push(Share { tunnel, weight });
    }
    let whole = shares.len() == items.len();
    if whole && shares.iter().all(|share| share.weight == 0) {
        field.fail("has no weight above 0 (accepted: one at least)");
    }
    whole.then_some(shares)
}

/// Returns what is wrong with policies of a route that takes these exchanges.
fn pointless(policies: &Policies, matches: &Match) -> Option<String> {
    let redirect = policies.redirect.as_ref()?;
    let (None, Some(path_prefix)) = (&redirect.scheme, &redirect.path_prefix) else { return None };
    let same_host = redirect
        .host
        .as_ref()
        .is_none_or(|host| matches!(&matches.host, HostMatch::Exact(exact) if exact == host));
    let taken = path_prefix
        .strip_prefix(&*matches.path_prefix)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    (same_host && taken).then(|| {
        "redirects to what it takes itself, without end (accepted: another host, or a path_prefix \
         that the route does not take)"
            .to_owned()
    })
}
