//! A route's `options.WEBSOCKET`: limits on the messages of its connections.

use serde_json::Value;
use sidelane_http_born::config::parse_size;
use sidelane_plugin::ConfigError;

const MAX_MESSAGE_SIZE: &str = "max_message_size";
const MESSAGES_PER_SECOND: &str = "messages_per_second";
const MODE: &str = "mode";

/// Limits of a route; each direction has them for itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// Bytes of a message, all its fragments together, as sent.
    pub(crate) max_message_size: Option<u64>,
    /// Messages of data; a second's worth may come at once.
    pub(crate) messages_per_second: Option<u32>,
    /// Its bytes are read by nobody, and go on a connection of their own where there is one.
    pub(crate) is_raw: bool,
}

impl Options {
    pub(crate) fn parse(options: &Value) -> Result<Self, ConfigError> {
        let fields = match options {
            Value::Null => return Ok(Self::default()),
            Value::Object(fields) => fields,
            other => return Err(ConfigError::new(format!("{other} is not a block of options"))),
        };
        let mut parsed = Self::default();
        for (name, value) in fields {
            match name.as_str() {
                MAX_MESSAGE_SIZE => parsed.max_message_size = Some(size(name, value)?),
                MESSAGES_PER_SECOND => parsed.messages_per_second = Some(rate(name, value)?),
                MODE => parsed.is_raw = is_raw(name, value)?,
                _ => {
                    let text = format!(
                        "unknown option {name:?} (accepted: {MAX_MESSAGE_SIZE}, \
                         {MESSAGES_PER_SECOND}, {MODE})"
                    );
                    return Err(ConfigError::at(name, text));
                }
            }
        }
        let limit = fields.keys().find(|name| *name != MODE);
        if let Some(name) = limit.filter(|_| parsed.is_raw) {
            let text = format!(
                "has no effect with {MODE}: raw, where nobody reads messages (accepted with {MODE}: framed)"
            );
            return Err(ConfigError::at(name, text));
        }
        Ok(parsed)
    }

    /// Reads what the host passes on; it was validated by both ends.
    pub(crate) fn from_text(text: &str) -> Self {
        if text.is_empty() {
            return Self::default();
        }
        serde_json::from_str(text)
            .ok()
            .and_then(|value| Self::parse(&value).ok())
            .unwrap_or_default()
    }
}

fn size(name: &str, value: &Value) -> Result<u64, ConfigError> {
    let parsed = value.as_str().and_then(parse_size);
    parsed.filter(|size| *size > 0).ok_or_else(|| {
        let text = format!(
            "{value} is not a size (accepted: a whole number above 0 with B, KiB, MiB or GiB, as \
             in 64KiB)"
        );
        ConfigError::at(name, text)
    })
}

fn is_raw(name: &str, value: &Value) -> Result<bool, ConfigError> {
    match value.as_str() {
        Some("framed") => Ok(false),
        Some("raw") => Ok(true),
        _ => Err(ConfigError::at(name, format!("{value} is no mode (accepted: framed, raw)"))),
    }
}

fn rate(name: &str, value: &Value) -> Result<u32, ConfigError> {
    let parsed = value.as_u64().and_then(|rate| u32::try_from(rate).ok());
    parsed.filter(|rate| *rate > 0).ok_or_else(|| {
        let text =
            format!("{value} is not a rate (accepted: a whole number from 1 to {})", u32::MAX);
        ConfigError::at(name, text)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn limits_are_read() {
        let both = json!({"max_message_size": "64KiB", "messages_per_second": 100});
        let expected = Options {
            max_message_size: Some(65_536),
            messages_per_second: Some(100),
            is_raw: false,
        };
        assert_eq!(Options::parse(&both), Ok(expected));
        assert_eq!(Options::from_text(&both.to_string()), expected);
        assert_eq!(Options::parse(&Value::Null), Ok(Options::default()));
        assert_eq!(Options::parse(&json!({})), Ok(Options::default()));
        assert_eq!(Options::from_text(""), Options::default());
        assert_eq!(Options::parse(&json!({"mode": "framed"})), Ok(Options::default()));
        let raw = Options { is_raw: true, ..Options::default() };
        assert_eq!(Options::parse(&json!({"mode": "raw"})), Ok(raw));
    }

    #[test]
    fn errors_name_the_option_and_what_is_accepted() {
        for (options, path, text) in [
            (json!({"max_message_size": 65536}), Some("max_message_size"), "65536 is not a size"),
            (json!({"max_message_size": "64kb"}), Some("max_message_size"), "\"64kb\" is not a"),
            (json!({"max_message_size": "0B"}), Some("max_message_size"), "above 0"),
            (json!({"max_message_size": "99999999999GiB"}), Some("max_message_size"), "64KiB"),
            (json!({"messages_per_second": 0}), Some("messages_per_second"), "0 is not a rate"),
            (json!({"messages_per_second": 1.5}), Some("messages_per_second"), "whole number"),
            (json!({"messages_per_second": "9"}), Some("messages_per_second"), "not a rate"),
            (json!({"max_size": 1}), Some("max_size"), "accepted: max_message_size, messages_per"),
            (json!({"mode": "row"}), Some("mode"), "\"row\" is no mode (accepted: framed, raw)"),
            (json!({"mode": true}), Some("mode"), "accepted: framed, raw"),
            (
                json!({"mode": "raw", "max_message_size": "1MiB"}),
                Some("max_message_size"),
                "has no effect with mode: raw",
            ),
            (json!([1]), None, "[1] is not a block of options"),
        ] {
            let error = Options::parse(&options).unwrap_err();
            assert_eq!(error.path.as_deref(), path, "{options}");
            assert!(error.message.contains(text), "{options}: {}", error.message);
        }
    }
}
