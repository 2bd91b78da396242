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
    let invalid = ["invalid type: ", "invalid value: "];
    if let Some((found, expected)) = invalid
        .iter()
        .find_map(|start| message.strip_prefix(start))
        .and_then(|rest| rest.rsplit_once(", expected "))
    {
        return format!("{} is not accepted (accepted: {})", of_serde(found), kind(expected));
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

/// Returns what serde found: ``integer `5` `` is 5.
fn of_serde(found: &str) -> &str {
    match found {
        "map" => "a mapping",
        "sequence" => "a list",
        "unit value" | "null" | "Option value" => "no value",
        _ => ["string ", "integer ", "floating point ", "boolean "]
            .iter()
            .find_map(|kind| found.strip_prefix(kind))
            .map_or(found, |value| value.trim_matches('`')),
    }
}

/// Returns a type of Rust in the file's words.
fn kind(expected: &str) -> &str {
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number, negative ones too",
        "a boolean" => "true, false",
        "a string" => "text",
        "a map" => "a mapping",
        "a sequence" => "a list",
        _ if expected.starts_with("struct ") => "a mapping of keys to values",
        _ => expected,
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
    fn a_plugin_that_quotes_a_secret_is_not_quoted() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("secret"), "hunter2 \"x\"\n").unwrap();
        std::fs::write(directory.path().join("number"), "8\n").unwrap();
        let file = directory.path().join("c.yaml");
        let text = "version: 1\nrelay: {}\nplugins:\n  libraries:\n  - name: p\n    library: p.so\n    \
                    config: { a: '${file:secret}', b: '${file:number}', api_token: hunter3, c: plain }\n";
        std::fs::write(&file, text).unwrap();
        let source = crate::config::Source::read(&file).unwrap();
        let config = crate::config::parse(&source, &|_| None).unwrap();
        for (path, message, expected) in [
            (
                "a",
                "\"hunter2 \"x\"\" is not a size (accepted: 1KiB)",
                "\"***\" is not accepted (accepted: 1KiB)",
            ),
            (
                "a",
                "invalid value: string \"hunter2 \\\"x\\\"\", expected a size",
                "\"***\" is not accepted (accepted: a size)",
            ),
            ("b", "8 is too small (accepted: 8 to 16)", "\"***\" is not accepted"),
            ("", "{\"api_token\":\"hunter3\"} is not a list", "\"***\" is not accepted"),
            ("c", "\"plain\" is not a size", "\"plain\" is not a size"),
            ("d", "unknown key \"d\" (accepted: a, b)", "unknown key \"d\" (accepted: a, b)"),
        ] {
            let fault = crate::config::Fault { message: message.into(), path: path.into() };
            let error = config.library_fault("p", &fault);
            assert_eq!(error.message, expected);
            assert_eq!(error.position.line, 7, "{path}");
        }
    }

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
            (
                "invalid type: string \"x\", expected usize",
                "\"x\" is not accepted (accepted: a whole number)",
            ),
            (
                "invalid type: sequence, expected struct Config",
                "a list is not accepted (accepted: a mapping of keys to values)",
            ),
            (
                "invalid value: integer `-5`, expected a size, \"4MiB\"",
                "-5 is not accepted (accepted: a size, \"4MiB\")",
            ),
        ] {
            assert_eq!(in_our_words(message), expected);
        }
    }
}
