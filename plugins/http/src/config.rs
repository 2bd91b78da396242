//! The plugin's configuration block. README.md of this crate describes each key; a test holds the
//! two together.

use std::time::Duration;

use serde::{Deserialize, Deserializer};
use sidelane_http_born::config::{self, Block, duration};

/// The block under `plugins` of whoever loads this library.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, remote = "Self")]
pub struct Config {
    /// How long an unused connection to the service is kept. 55 s: below the 60 s and 75 s after
    /// which usual servers close theirs, so that few requests meet a closing connection.
    #[serde(deserialize_with = "duration")]
    pub idle_timeout: Duration,
    /// Unused connections kept for one service, per data-path thread.
    pub idle_per_service: usize,
    /// Connections to all services, used and unused, per data-path thread. One more is refused with
    /// `overloaded`: it bounds the descriptors that a burst of slow requests takes.
    pub connections_max: usize,
    /// How long the service may take from the request's dispatch to its response head, counted anew
    /// while the request's body is on its way; 0: any time.
    #[serde(deserialize_with = "duration")]
    pub response_timeout: Duration,
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
            idle_timeout: Duration::from_secs(55),
            idle_per_service: 64,
            connections_max: 1024,
            response_timeout: Duration::from_secs(60),
        }
    }
}

impl Config {
    /// Checks what types cannot say: the path of the key at fault, and why.
    pub(crate) fn validate(&self) -> Result<(), (&'static str, String)> {
        if self.connections_max == 0 {
            return Err(("connections_max", "must be at least 1".to_owned()));
        }
        if self.idle_per_service > self.connections_max {
            return Err((
                "idle_per_service",
                format!(
                    "{} is more than connections_max ({})",
                    self.idle_per_service, self.connections_max
                ),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
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
    fn durations_carry_units() {
        for (text, expected) in [
            ("\"250ms\"", Some(Duration::from_millis(250))),
            ("\"55s\"", Some(Duration::from_secs(55))),
            ("\"2 m\"", Some(Duration::from_secs(120))),
            ("\"1h\"", Some(Duration::from_secs(3600))),
            ("\"0\"", Some(Duration::ZERO)),
            ("0", Some(Duration::ZERO)),
            ("55", None),
            ("\"55\"", None),
            ("\"s\"", None),
            ("\"-1s\"", None),
            ("\"99999999999h\"", None),
        ] {
            let config = parse(&format!("{{\"idle_timeout\": {text}}}"));
            assert_eq!(config.ok().map(|config| config.idle_timeout), expected, "{text}");
        }
    }

    #[test]
    fn unknown_keys_are_errors() {
        let error = parse("{\"idle_timeot\": \"1s\"}").unwrap_err();
        assert!(error.contains("idle_timeot") && error.contains("idle_timeout"), "{error}");
    }

    #[test]
    fn a_list_is_no_block() {
        let error = parse("[0]").unwrap_err();
        assert!(error.contains("a block of keys and values"), "{error}");
    }

    #[test]
    fn limits_that_contradict_are_errors() {
        let config = parse("{\"connections_max\": 10}").unwrap();
        assert_eq!(config.validate().unwrap_err().0, "idle_per_service");
        let config = parse("{\"connections_max\": 0, \"idle_per_service\": 0}").unwrap();
        assert_eq!(config.validate().unwrap_err().0, "connections_max");
    }

    #[test]
    fn the_readme_names_every_key_and_default() {
        let readme = include_str!("../README.md");
        for row in [
            "| `idle_timeout` | `55s` |",
            "| `idle_per_service` | `64` |",
            "| `connections_max` | `1024` |",
            "| `response_timeout` | `60s` |",
        ] {
            assert!(readme.contains(row), "README.md lacks {row}");
        }
        let parsed = parse(
            "{\"idle_timeout\": \"55s\", \"idle_per_service\": 64, \"connections_max\": 1024, \
             \"response_timeout\": \"60s\"}",
        );
        assert_eq!(parsed, Ok(Config::default()));
    }
}
