//! Configuration blocks: read from a map alone, and their values, for serde's `deserialize_with`.

use std::marker::PhantomData;
use std::time::Duration;

use serde::{Deserializer, de};

/// A block of keys and values, whose derived function (`#[serde(remote = "Self")]`) would take a list
/// for one, its elements for the keys in order.
pub trait Block<'de>: Sized {
    /// Calls the derived function.
    ///
    /// # Errors
    /// A key or value is not the block's.
    fn derived<D: Deserializer<'de>>(map: D) -> Result<Self, D::Error>;
}

/// Reads a block from a map.
///
/// # Errors
/// It is no map, or a key or value is not the block's.
pub fn block<'de, T: Block<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    struct Visitor<T>(PhantomData<T>);

    impl<'de, T: Block<'de>> de::Visitor<'de> for Visitor<T> {
        type Value = T;

        fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            formatter.write_str("a block of keys and values")
        }

        fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::derived(de::value::MapAccessDeserializer::new(map))
        }
    }

    deserializer.deserialize_map(Visitor(PhantomData))
}

/// Reads `250ms`, `55s`, `2m`, `1h`, or `0`.
///
/// # Errors
/// It is none of these, or longer than a year.
pub fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    struct Visitor;

    impl de::Visitor<'_> for Visitor {
        type Value = Duration;

        fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            formatter.write_str("a duration such as \"250ms\", \"55s\", \"2m\", \"1h\" or 0")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Duration, E> {
            parse_duration(text)
                .ok_or_else(|| de::Error::invalid_value(de::Unexpected::Str(text), &self))
        }

        fn visit_u64<E: de::Error>(self, number: u64) -> Result<Duration, E> {
            match number {
                0 => Ok(Duration::ZERO),
                _ => Err(de::Error::invalid_value(de::Unexpected::Unsigned(number), &self)),
            }
        }
    }

    deserializer.deserialize_any(Visitor)
}

fn parse_duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let milliseconds = match unit.trim_start() {
        "" if number == 0 => 0,
        "ms" => number,
        "s" => number.checked_mul(1_000)?,
        "m" => number.checked_mul(60_000)?,
        "h" => number.checked_mul(3_600_000)?,
        _ => return None,
    };
    // Longer than a year is a slip, and sums of such durations must not overflow a clock.
    (milliseconds <= 366 * 24 * 3_600_000).then(|| Duration::from_millis(milliseconds))
}

const SIZE_UNITS: [(&str, u64); 4] =
    [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];

/// Reads `100B`, `64KiB`, `4MiB`, `1GiB`: a whole number with its unit, as everywhere in the
/// configuration.
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let (_, factor) = SIZE_UNITS.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}
