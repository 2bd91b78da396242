//! Protocol types by number and by name, as one session binds them.

use std::sync::Arc;

use crate::proto::{ProtocolName, ProtocolType};

/// First number that a session binds to a name; lower ones are the schema's.
pub const PROTOCOL_NUMBER_NAMED_MIN: u32 = 64;

/// Most protocol types that one end may list; bounds a look-up by name.
pub const PROTOCOLS_MAX: usize = 256;

/// Longest name of a protocol type, as the plugin ABI has it.
const NAME_BYTES_MAX: usize = 32;

const FIXED: [(ProtocolType, &str); 3] = [
    (ProtocolType::Http, "HTTP"),
    (ProtocolType::Grpc, "GRPC"),
    (ProtocolType::Websocket, "WEBSOCKET"),
];

/// The protocol types that an end carries, and their numbers in the session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProtocolTable {
    /// Invariant: names and numbers are unique.
    entries: Vec<(u32, Arc<str>)>,
}

/// A list of protocol types that cannot stand.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProtocolTableError {
    /// Not a name.
    #[error(
        "protocol type {name:?} is not a name (accepted: upper-case letters, digits and _, 1 to 32)"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// The number is not this name's to have.
    #[error(
        "protocol type {name} has number {number} (accepted: HTTP 1, GRPC 2, WEBSOCKET 3, others from 64)"
    )]
    Number {
        /// The name.
        name: String,
        /// The number.
        number: u32,
    },
    /// Listed twice, by name or by number.
    #[error("protocol type {name} (number {number}) is listed twice")]
    Repeated {
        /// The name.
        name: String,
        /// The number.
        number: u32,
    },
    /// Too many.
    #[error("{count} protocol types, at most {PROTOCOLS_MAX} are accepted")]
    TooMany {
        /// How many there are.
        count: usize,
    },
}

impl ProtocolTable {
    /// Binds names to numbers: those of the schema to theirs, others from 64 on in the order given.
    ///
    /// # Errors
    ///
    /// A name that is none, or is given twice; too many names.
    pub fn bind<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Self, ProtocolTableError> {
        Self::default().answer(names)
    }

    /// Binds names as [`ProtocolTable::bind`] does, with the numbers that `self`, the other end's
    /// table, has for them: what the relay welcomes a hello with.
    ///
    /// # Errors
    ///
    /// A name that is none, or is given twice; too many names.
    pub fn answer<'a>(
        &self,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, ProtocolTableError> {
        let mut table = Self::default();
        // The other end may have taken any number, the largest too. Of a few hundred one is free.
        let mut free = PROTOCOL_NUMBER_NAMED_MIN..;
        for name in names {
            let number = match self.number(name).or_else(|| fixed_number(name)) {
                Some(number) => number,
                None => free.find(|number| self.name(*number).is_none()).unwrap_or(u32::MAX),
            };
            table.add(number, name)?;
        }
        Ok(table)
    }

    /// Reads what a peer lists.
    ///
    /// # Errors
    ///
    /// See [`ProtocolTableError`]; a list is taken whole or not at all.
    pub fn parse(protocols: &[ProtocolName]) -> Result<Self, ProtocolTableError> {
        if protocols.len() > PROTOCOLS_MAX {
            return Err(ProtocolTableError::TooMany { count: protocols.len() });
        }
        let mut table = Self::default();
        for ProtocolName { number, name } in protocols {
            table.add(*number, name)?;
        }
        Ok(table)
    }

    /// Returns the list as it goes on the wire.
    #[must_use]
    pub fn to_wire(&self) -> Vec<ProtocolName> {
        self.entries
            .iter()
            .map(|(number, name)| ProtocolName { number: *number, name: name.to_string() })
            .collect()
    }

    /// Returns the number of a name.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<u32> {
        self.entries.iter().find(|(_, known)| &**known == name).map(|&(number, _)| number)
    }

    /// Returns the name of a number.
    #[must_use]
    pub fn name(&self, number: u32) -> Option<&Arc<str>> {
        self.entries.iter().find(|&&(known, _)| known == number).map(|(_, name)| name)
    }

    /// Returns the names, in the order in which they are listed.
    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.entries.iter().map(|(_, name)| name)
    }

    fn add(&mut self, number: u32, name: &str) -> Result<(), ProtocolTableError> {
        if !is_name(name) {
            return Err(ProtocolTableError::Name { name: name.to_owned() });
        }
        let accepted = match fixed_number(name) {
            Some(fixed) => number == fixed,
            None => number >= PROTOCOL_NUMBER_NAMED_MIN,
        };
        if !accepted {
            return Err(ProtocolTableError::Number { name: name.to_owned(), number });
        }
        if self.number(name).is_some() || self.name(number).is_some() {
            return Err(ProtocolTableError::Repeated { name: name.to_owned(), number });
        }
        if self.entries.len() == PROTOCOLS_MAX {
            return Err(ProtocolTableError::TooMany { count: PROTOCOLS_MAX + 1 });
        }
        self.entries.push((number, Arc::from(name)));
        Ok(())
    }
}

fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
    !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.bytes().all(allowed)
}

fn fixed_number(name: &str) -> Option<u32> {
    let (number, _) = FIXED.iter().find(|(_, fixed)| *fixed == name)?;
    u32::try_from(i32::from(*number)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(entries: &[(u32, &str)]) -> Vec<ProtocolName> {
        entries
            .iter()
            .map(|&(number, name)| ProtocolName { number, name: name.to_owned() })
            .collect()
    }

    #[test]
    fn names_of_the_schema_have_its_numbers() {
        let table = ProtocolTable::bind(["LINE", "WEBSOCKET", "HTTP", "ECHO", "GRPC"]).unwrap();
        assert_eq!(
            table.to_wire(),
            wire(&[(64, "LINE"), (3, "WEBSOCKET"), (1, "HTTP"), (65, "ECHO"), (2, "GRPC")])
        );
        assert_eq!(table.number("ECHO"), Some(65));
        assert_eq!(table.name(64).map(|name| &**name), Some("LINE"));
        assert_eq!(table.number("REDIS"), None);
        assert_eq!(ProtocolTable::parse(&table.to_wire()), Ok(table));
    }

    #[test]
    fn an_answer_keeps_the_numbers_of_the_hello() {
        let hello = ProtocolTable::bind(["HTTP", "LINE", "ECHO"]).unwrap();
        let answer = hello.answer(["REDIS", "ECHO", "HTTP", "SMTP"]).unwrap();
        assert_eq!(
            answer.to_wire(),
            wire(&[(66, "REDIS"), (65, "ECHO"), (1, "HTTP"), (67, "SMTP")])
        );
    }

    #[test]
    fn an_answer_finds_free_numbers_beside_the_largest() {
        let hello = ProtocolTable::parse(&wire(&[(u32::MAX, "LAST"), (64, "ECHO")])).unwrap();
        let answer = hello.answer(["REDIS", "LAST", "SMTP"]).unwrap();
        assert_eq!(answer.to_wire(), wire(&[(65, "REDIS"), (u32::MAX, "LAST"), (66, "SMTP")]));
    }

    #[test]
    fn a_list_that_cannot_stand_is_refused_with_its_reason() {
        for (entries, text) in [
            (wire(&[(2, "HTTP")]), "protocol type HTTP has number 2 "),
            (wire(&[(7, "LINE")]), "protocol type LINE has number 7 "),
            (wire(&[(64, "line")]), "protocol type \"line\" is not a name "),
            (wire(&[(64, "")]), "protocol type \"\" is not a name "),
            (wire(&[(64, "A"), (65, "A")]), "protocol type A (number 65) is listed twice"),
            (wire(&[(64, "A"), (64, "B")]), "protocol type B (number 64) is listed twice"),
            (wire(&[(64, "A"); 257]), "257 protocol types, at most 256 are accepted"),
        ] {
            let error = ProtocolTable::parse(&entries).unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
    }
}
