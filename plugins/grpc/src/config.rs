//! The plugin's configuration block, and a route's options. README.md of this crate describes each
//! key; a test holds the two together.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use serde_json::Value;
use sidelane_http_born::config::{self, Block, duration, parse_size};
use sidelane_http_born::h2_pool::PoolConfig;
use sidelane_plugin::ConfigError;

/// Most methods that [`Config::methods_max`] may name: with a dozen series each they stay near what a
/// host lets one plugin register.
const METHODS_MAX: usize = 1_000;

/// Shortest [`Config::keepalive_interval`]: gRPC's own clients ping no more often, and servers close
/// connections that do.
const KEEPALIVE_INTERVAL_MIN: Duration = Duration::from_secs(10);

/// The block under `plugins` of whoever loads this library.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, remote = "Self")]
pub struct Config {
    /// Methods that are counted by name, over all routes; what is beyond counts as `other`.
    pub methods_max: usize,
    /// How long a connection to the service is kept without an RPC.
    #[serde(deserialize_with = "duration")]
    pub idle_timeout: Duration,
    /// Connections to one service, per data-path thread. An RPC for which none of them has a stream
    /// left is refused with `overloaded`.
    pub connections_max: usize,
    /// How often a connection to the service with RPCs on it is pinged; 0: never.
    #[serde(deserialize_with = "duration")]
    pub keepalive_interval: Duration,
    /// How long the service may take to answer a ping before its connection is given up.
    #[serde(deserialize_with = "duration")]
    pub keepalive_timeout: Duration,
}

impl<'de> Block<'de> for Config {
    fn derived<D: Deserializer<'de>>(map: D) -> Result<Self, D::Error> {
        // The derived function, which `remote` makes an inherent one.
        Self::deserialize(map)
    }
}

impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        config::block(deserializer)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            methods_max: 500,
            idle_timeout: Duration::from_secs(300),
            connections_max: 32,
            keepalive_interval: Duration::ZERO,
            keepalive_timeout: Duration::from_secs(20),
        }
    }
}

impl Config {
    /// What the pool of connections goes by.
    pub(crate) const fn pool(&self) -> PoolConfig {
        PoolConfig {
            idle_timeout: self.idle_timeout,
            connections_max: self.connections_max,
            keepalive_interval: self.keepalive_interval,
            keepalive_timeout: self.keepalive_timeout,
        }
    }

    /// Checks what types cannot say: the path of the key at fault, and why.
    pub(crate) fn validate(&self) -> Result<(), (&'static str, String)> {
        if self.connections_max == 0 {
            return Err(("connections_max", "must be at least 1".to_owned()));
        }
        if self.methods_max > METHODS_MAX {
            let text = format!("{} is more than {METHODS_MAX}", self.methods_max);
            return Err(("methods_max", text));
        }
        if self.idle_timeout.is_zero() {
            return Err(("idle_timeout", "must be more than 0".to_owned()));
        }
        if !self.keepalive_interval.is_zero() && self.keepalive_interval < KEEPALIVE_INTERVAL_MIN {
            let text = "must be at least 10s, or 0 for no pings".to_owned();
            return Err(("keepalive_interval", text));
        }
        if self.keepalive_timeout.is_zero() {
            return Err(("keepalive_timeout", "must be more than 0".to_owned()));
        }
        Ok(())
    }
}

/// A route's `options.GRPC`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// Longest message, compressed where it is, without its prefix.
    pub(crate) max_message_size: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { max_message_size: u32::MAX }
    }
}

impl Options {
    /// Reads a route's options.
    ///
    /// # Errors
    /// A key is unknown or its value is none.
    pub(crate) fn parse(value: &Value) -> Result<Self, ConfigError> {
        let mut options = Self::default();
        let fields = match value {
            Value::Null => return Ok(options),
            Value::Object(fields) => fields,
            other => return Err(ConfigError::new(format!("{other} is not a block of options"))),
        };
        for (name, value) in fields {
            if name != "max_message_size" {
                let text = format!("unknown option {name:?} (there is: max_message_size)");
                return Err(ConfigError::at(name, text));
            }
            options.max_message_size = size(value).ok_or_else(|| {
                let text = format!(
                    "{value} is not a size from 1 to 4294967295 bytes, such as \"4MiB\", \
                     \"512KiB\" or \"100B\""
                );
                ConfigError::at(name, text)
            })?;
        }
        Ok(options)
    }
}

fn size(value: &Value) -> Option<u32> {
    let bytes = parse_size(value.as_str()?)?;
    u32::try_from(bytes).ok().filter(|bytes| *bytes > 0)
}

/// Most texts that are remembered; there is one for each set of options in use.
const TEXTS_MAX: usize = 1_024;

/// Options by the text that they were read from.
#[derive(Debug, Default)]
pub(crate) struct OptionsCache {
    texts: RwLock<HashMap<Box<str>, Options>>,
}

impl OptionsCache {
    /// Returns what `text` says. What cannot be read was refused by `validate_route` wherever routes
    /// are declared, and is taken for the default.
    pub(crate) fn read(&self, text: &str) -> Options {
        if text.is_empty() {
            return Options::default();
        }
        let texts = self.texts.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(options) = texts.get(text) {
            return *options;
        }
        drop(texts);
        let options = serde_json::from_str(text)
            .ok()
            .and_then(|value| Options::parse(&value).ok())
            .unwrap_or_default();
        let mut texts = self.texts.write().unwrap_or_else(PoisonError::into_inner);
        if texts.len() >= TEXTS_MAX {
            texts.clear();
        }
        texts.insert(text.into(), options);
        options
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_block_is_the_default() {
        assert_eq!(parse("{}"), Ok(Config::default()));
        assert_eq!(Config::default().validate(), Ok(()));
    }

    #[test]
    fn unknown_keys_are_errors() {
        let error = parse("{\"idle_timeot\": \"1s\"}").unwrap_err();
        assert!(error.contains("idle_timeot") && error.contains("idle_timeout"), "{error}");
        assert!(parse("[0]").unwrap_err().contains("a block of keys and values"));
    }

    #[test]
    fn limits_out_of_bounds_are_errors() {
        for (text, path) in [
            ("{\"connections_max\": 0}", "connections_max"),
            ("{\"methods_max\": 1001}", "methods_max"),
            ("{\"idle_timeout\": 0}", "idle_timeout"),
            ("{\"keepalive_interval\": \"9s\"}", "keepalive_interval"),
            ("{\"keepalive_timeout\": 0}", "keepalive_timeout"),
        ] {
            assert_eq!(parse(text).unwrap().validate().unwrap_err().0, path, "{text}");
        }
        let good = parse("{\"methods_max\": 0, \"keepalive_interval\": \"10s\"}").unwrap();
        assert_eq!(good.validate(), Ok(()));
    }

    #[test]
    fn the_readme_names_every_key_and_default() {
        let readme = include_str!("../README.md");
        for row in [
            "| `methods_max` | `500` |",
            "| `idle_timeout` | `5m` |",
            "| `connections_max` | `32` |",
            "| `keepalive_interval` | `0` |",
            "| `keepalive_timeout` | `20s` |",
            "| `max_message_size` | none |",
        ] {
            assert!(readme.contains(row), "README.md lacks {row}");
        }
        let parsed = parse(
            "{\"methods_max\": 500, \"idle_timeout\": \"5m\", \"connections_max\": 32, \
             \"keepalive_interval\": 0, \"keepalive_timeout\": \"20s\"}",
        );
        assert_eq!(parsed, Ok(Config::default()));
    }

    #[test]
    fn sizes_carry_units() {
        for (value, expected) in [
            (json!("4MiB"), Some(4 << 20)),
            (json!("512KiB"), Some(512 << 10)),
            (json!("512 KiB"), None),
            (json!("1GiB"), Some(1 << 30)),
            (json!("100B"), Some(100)),
            (json!("100"), None),
            (json!(1), None),
            (json!(0), None),
            (json!("0"), None),
            (json!("4GiB"), None),
            (json!("MiB"), None),
            (json!("4MB"), None),
            (json!(-1), None),
            (json!(1.5), None),
            (json!(null), None),
            (json!([1]), None),
        ] {
            let options = Options::parse(&json!({ "max_message_size": value }));
            assert_eq!(options.ok().map(|options| options.max_message_size), expected, "{value}");
        }
    }

    #[test]
    fn options_name_what_is_wrong() {
        assert_eq!(Options::parse(&json!({})), Ok(Options::default()));
        assert_eq!(Options::parse(&Value::Null), Ok(Options::default()));
        let error = Options::parse(&json!({ "max_message_size": "4MB" })).unwrap_err();
        assert_eq!(error.path.as_deref(), Some("max_message_size"));
        assert_eq!(
            error.message,
            "\"4MB\" is not a size from 1 to 4294967295 bytes, such as \"4MiB\", \"512KiB\" or \
             \"100B\""
        );
        let error = Options::parse(&json!({ "max_mesage_size": 1 })).unwrap_err();
        assert_eq!(error.path.as_deref(), Some("max_mesage_size"));
        assert_eq!(
            error.message,
            "unknown option \"max_mesage_size\" (there is: max_message_size)"
        );
        assert!(Options::parse(&json!([])).is_err());
    }

    #[test]
    fn options_are_read_once() {
        let cache = OptionsCache::default();
        assert_eq!(cache.read(""), Options::default());
        for _ in 0..2 {
            assert_eq!(cache.read("{\"max_message_size\":\"7B\"}").max_message_size, 7);
        }
        assert_eq!(cache.texts.read().unwrap().len(), 1);
    }
}
