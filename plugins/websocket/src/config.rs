//! The plugin's configuration block. README.md of this crate describes each key; a test holds the
//! two together.

use std::time::Duration;

use serde::{Deserialize, Deserializer};
use sidelane_http_born::config::{self, Block, duration};

/// The block under `plugins` of whoever loads this library.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, remote = "Self")]
pub struct Config {
    /// How long the service may take to answer a handshake. Counted at both ends.
    #[serde(deserialize_with = "duration")]
    pub handshake_timeout: Duration,
    /// How long no frame may pass in either direction; 0: any time. Counted at the relay's end.
    #[serde(deserialize_with = "duration")]
    pub idle_timeout: Duration,
    /// Time between pings of our own to clients; 0: none.
    #[serde(deserialize_with = "duration")]
    pub ping_interval: Duration,
    /// How long an end is waited for once there is nothing left to say: after a close frame in both
    /// directions, or after one of our own.
    #[serde(deserialize_with = "duration")]
    pub close_timeout: Duration,
    /// The close code of connections that end because this process, or the peer's, goes away.
    pub drain_code: u16,
    /// WebSockets per data-path thread. One more is refused with `overloaded`: it bounds memory and
    /// descriptors, which each takes for as long as it lives.
    pub connections_max: usize,
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
            handshake_timeout: Duration::from_secs(30),
            idle_timeout: Duration::ZERO,
            ping_interval: Duration::ZERO,
            close_timeout: Duration::from_secs(5),
            drain_code: 1001,
            connections_max: 16_384,
        }
    }
}

impl Config {
    /// Checks what types cannot say: the path of the key at fault, and why.
    pub(crate) fn validate(&self) -> Result<(), (&'static str, String)> {
        if self.handshake_timeout.is_zero() {
            return Err(("handshake_timeout", "must be longer than 0".to_owned()));
        }
        if self.close_timeout.is_zero() {
            return Err(("close_timeout", "must be longer than 0".to_owned()));
        }
        if !matches!(self.drain_code, 1001 | 1012) {
            let text = format!(
                "{} is not accepted (accepted: 1001, going away, or 1012, service restart)",
                self.drain_code
            );
            return Err(("drain_code", text));
        }
        if self.connections_max == 0 {
            return Err(("connections_max", "must be at least 1".to_owned()));
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
    fn values_that_make_no_sense_are_errors() {
        for (text, key) in [
            ("{\"handshake_timeout\": 0}", "handshake_timeout"),
            ("{\"close_timeout\": \"0s\"}", "close_timeout"),
            ("{\"drain_code\": 1000}", "drain_code"),
            ("{\"drain_code\": 1006}", "drain_code"),
            ("{\"connections_max\": 0}", "connections_max"),
        ] {
            assert_eq!(parse(text).unwrap().validate().unwrap_err().0, key, "{text}");
        }
    }

    #[test]
    fn the_readme_names_every_key_and_default() {
        let readme = include_str!("../README.md");
        for row in [
            "| `handshake_timeout` | `30s` |",
            "| `idle_timeout` | `0` |",
            "| `ping_interval` | `0` |",
            "| `close_timeout` | `5s` |",
            "| `drain_code` | `1001` |",
            "| `connections_max` | `16384` |",
        ] {
            assert!(readme.contains(row), "README.md lacks {row}");
        }
        let parsed = parse(
            "{\"handshake_timeout\": \"30s\", \"idle_timeout\": 0, \"ping_interval\": 0, \
             \"close_timeout\": \"5s\", \"drain_code\": 1001, \"connections_max\": 16384}",
        );
        assert_eq!(parsed, Ok(Config::default()));
    }
}
