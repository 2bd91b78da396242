//! What only plugins know of a configuration: which protocol types there are, and what their
//! options mean.
//!
//! Walks the file rather than the [`Config`], in which what is at fault is missing.

use super::error::{ConfigError, did_you_mean, list};
use super::raw::{Node, Value};
use super::{Config, PluginCheck, value};

/// Returns what plugins do not know or refuse.
pub(super) fn refused(config: &Config, plugins: &dyn PluginCheck) -> Vec<ConfigError> {
    let types = plugins.types();
    let mut errors = Vec::new();
    let mut is_served = |path: &str, protocol_type: &str| {
        // What is no protocol type at all is told already.
        if value::protocol_type(protocol_type).is_err() {
            return false;
        }
        let served = types.iter().any(|served| **served == *protocol_type);
        if !served && plugins.are_all() {
            let names = || types.iter().map(|served| &**served);
            let message = format!(
                "no plugin serves protocol type \"{protocol_type}\" (served: {}){}",
                list(names()),
                did_you_mean(protocol_type, names())
            );
            errors.push(config.origin.error(path, message));
        }
        served
    };
    let root = &config.origin.root;
    let listeners = root.child("relay").and_then(|relay| relay.child("listeners"));
    for (index, listener) in items(listeners) {
        if let Some(text) = listener.child("protocol_type").and_then(Node::text) {
            is_served(&format!("relay.listeners[{index}].protocol_type"), text);
        }
    }
    for (index, tunnel) in items(root.child("tunnels")) {
        for (item, node) in items(tunnel.child("protocols")) {
            if let Some(text) = node.text() {
                is_served(&format!("tunnels[{index}].protocols[{item}]"), text);
            }
        }
    }
    let mut blocks = Vec::new();
    for (index, route) in items(root.child("routes")) {
        if let Some(text) = route.child("protocol_type").and_then(Node::text) {
            is_served(&format!("routes[{index}].protocol_type"), text);
        }
        let Some(Value::Map(options)) = route.child("options").map(|node| &node.value) else {
            continue;
        };
        for entry in options {
            let path = format!("routes[{index}].options.{}", entry.key);
            // What an unset variable leaves open, a plugin would only refuse for that.
            if is_served(&path, &entry.key) && !entry.node.is_faulty() {
                blocks.push((path, entry));
            }
        }
    }
    for (path, entry) in blocks {
        let block = entry.node.to_json();
        let text = if block.is_null() { String::new() } else { block.to_string() };
        if let Err(fault) = plugins.validate_route(&entry.key, &text) {
            errors.push(config.fault(&path, &fault));
        }
    }
    errors
}

/// Returns a plugin's text, with a suggestion where it lists what is accepted: of serde's text on an
/// unknown field the file's words for it.
pub(super) fn in_our_words(message: &str) -> String {
    if let Some((key, rest)) =
        message.strip_prefix("unknown field `").and_then(|rest| rest.split_once('`'))
    {
        let names: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
        return format!(
            "unknown key \"{key}\" (accepted: {}){}",
            list(names.iter().copied()),
            did_you_mean(key, names.iter().copied())
        );
    }
    let unknown = message.strip_prefix("unknown ").and_then(|rest| {
        let value = rest.split('"').nth(1)?;
        let accepted = rest.split_once("(accepted: ")?.1.strip_suffix(')')?;
        Some((value, accepted))
    });
    match unknown {
        Some((value, accepted)) => {
            format!("{message}{}", did_you_mean(value, accepted.split(", ")))
        }
        None => message.to_owned(),
    }
}

fn items(node: Option<&Node>) -> impl Iterator<Item = (usize, &Node)> {
    let items = match node.map(|node| &node.value) {
        Some(Value::List(items)) => items.as_slice(),
        _ => &[],
    };
    items.iter().enumerate()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugins_near_miss_gets_a_suggestion() {
        for (message, expected) in [
            (
                "unknown field `idle_timout`, expected one of `idle_timeout`, `idle`",
                "unknown key \"idle_timout\" (accepted: idle_timeout, idle); did you mean \
                 \"idle_timeout\"?",
            ),
            ("unknown field `x`, expected `a` or `b`", "unknown key \"x\" (accepted: a, b)"),
            ("unknown field `x`, there are no fields", "unknown key \"x\" (accepted: none)"),
            (
                "unknown option \"mod\" (accepted: mode, max)",
                "unknown option \"mod\" (accepted: mode, max); did you mean \"mode\"?",
            ),
            (
                "unknown option \"x\" (this protocol has none)",
                "unknown option \"x\" (this protocol has none)",
            ),
            ("invalid type: `x`", "invalid type: `x`"),
        ] {
            assert_eq!(in_our_words(message), expected);
        }
    }
}
