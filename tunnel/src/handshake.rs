//! The first messages of a transport connection: hello one way, welcome or refuse the other.
//!
//! Checks what can be checked without knowing who is asking; credentials, sessions and epochs are
//! the caller's. Bytes that follow the message stay in the buffer for the lane.

use bytes::{Bytes, BytesMut};
use prost::Message;

use crate::control::write_control;
use crate::credit::WINDOW_MIN;
use crate::envelope::{self, DecodeError, field};
use crate::proto;
use crate::protocols::{ProtocolTable, ProtocolTableError};

/// Version of the protocol that this end speaks.
pub const VERSION: u32 = 1;

/// Bit of `features`: lanes come back after the loss of their connection.
pub const FEATURE_RESUME: u64 = 1;

/// Longest first message accepted: bounds what an unknown peer can make us hold. Holds a credential
/// and names of any sane length; a welcome with its peers too.
pub const HELLO_BYTES_MAX: usize = 64 * 1024;

/// Least that an end must accept as one message: the longest open with its first payload.
pub const MESSAGE_BYTES_MIN: u32 = 128 * 1024;

/// Longest instance, session or secret.
const IDENTIFIER_BYTES_MAX: usize = 64;

/// Longest credential: a token with many claims is below.
const CREDENTIAL_BYTES_MAX: usize = 16 * 1024;

/// Longest name or address.
const TEXT_BYTES_MAX: usize = 256;

/// Most peers in a welcome: relays of one deployment.
const PEERS_MAX: usize = 256;

/// Most relays that a hello says it has sessions with: as many as a sidecar dials.
pub const HELD_MAX: usize = 64;

/// Why a handshake failed.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The peer's bytes are no message: likely not our protocol at all.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The payload is no message of its type.
    #[error("malformed payload in field {field}")]
    Payload {
        /// Field's number.
        field: u32,
        /// What is wrong with it.
        #[source]
        source: prost::DecodeError,
    },
    /// Another message than the handshake's.
    #[error("field {found} instead of {expected}")]
    Unexpected {
        /// Field's number.
        found: u32,
        /// What is accepted.
        expected: &'static str,
    },
    /// Another version.
    #[error("the peer speaks version {found} of the tunnel's protocol, this end speaks {VERSION}")]
    Version {
        /// The peer's.
        found: u32,
    },
    /// A field outside its range.
    #[error("{field} is {found}, accepted: {accepted}")]
    Range {
        /// Field's name.
        field: &'static str,
        /// Value, or length in bytes.
        found: u64,
        /// What is accepted.
        accepted: &'static str,
    },
    /// The list of protocol types.
    #[error(transparent)]
    Protocols(#[from] ProtocolTableError),
}

impl HandshakeError {
    /// Returns what the peer may be told.
    #[must_use]
    pub fn refusal(&self) -> proto::Refuse {
        let reason = match self {
            Self::Version { .. } => proto::RefuseReason::Version,
            _ => proto::RefuseReason::Malformed,
        };
        proto::Refuse {
            reason: reason.into(),
            detail: self.to_string(),
            ..proto::Refuse::default()
        }
    }
}

/// What a hello is answered with.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// The lane is open.
    Welcome(proto::Welcome),
    /// The lane has come back.
    Resumed(proto::Resumed),
    /// The dialler is not let in.
    Refuse(proto::Refuse),
}

/// What a dialler says first.
#[derive(Clone, Debug, PartialEq)]
pub enum First {
    /// A new session, or a further lane of one.
    Hello(proto::Hello),
    /// A lane that comes back.
    Resume(proto::Resume),
}

/// The end that dials.
#[derive(Debug, Default)]
pub struct Dialler {}

impl Dialler {
    /// Returns a dialler that has said nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self {}
    }

    /// Returns the bytes to send first. The version is filled in.
    ///
    /// # Errors
    ///
    /// The hello is one that no acceptor would take: this end's configuration is at fault.
    pub fn hello(&self, hello: &proto::Hello) -> Result<Bytes, HandshakeError> {
        let hello = proto::Hello { version: VERSION, ..hello.clone() };
        check_hello(&hello)?;
        frame("hello", field::HELLO, &hello)
    }

    /// Returns the bytes to send first where a lane comes back.
    ///
    /// # Errors
    ///
    /// The message is one that no acceptor would take.
    pub fn resume(&self, resume: &proto::Resume) -> Result<Bytes, HandshakeError> {
        check_resume(resume)?;
        frame("resume", field::RESUME, resume)
    }

    /// Takes the answer, once it is whole.
    ///
    /// # Errors
    ///
    /// The acceptor's answer cannot be used; the connection is to be closed.
    pub fn handle_input(&mut self, buffer: &mut BytesMut) -> Result<Option<Reply>, HandshakeError> {
        let Some((number, payload)) = first_message(buffer)? else { return Ok(None) };
        match number {
            field::WELCOME => {
                let welcome = decode(number, payload)?;
                check_welcome(&welcome)?;
                Ok(Some(Reply::Welcome(welcome)))
            }
            field::RESUMED => Ok(Some(Reply::Resumed(decode(number, payload)?))),
            field::REFUSE => Ok(Some(Reply::Refuse(decode(number, payload)?))),
            found => Err(HandshakeError::Unexpected {
                found,
                expected: "33 (welcome), 34 (refuse) or 36 (resumed)",
            }),
        }
    }
}

/// The end that is dialled.
#[derive(Debug, Default)]
pub struct Acceptor {}

impl Acceptor {
    /// Returns an acceptor that has heard nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self {}
    }

    /// Takes what the dialler says first, once it is whole.
    ///
    /// # Errors
    ///
    /// The dialler is to be told [`HandshakeError::refusal`] and the connection closed.
    pub fn handle_input(&mut self, buffer: &mut BytesMut) -> Result<Option<First>, HandshakeError> {
        let Some((number, payload)) = first_message(buffer)? else { return Ok(None) };
        match number {
            field::HELLO => {
                let hello = decode(number, payload)?;
                check_hello(&hello)?;
                Ok(Some(First::Hello(hello)))
            }
            field::RESUME => {
                let resume = decode(number, payload)?;
                check_resume(&resume)?;
                Ok(Some(First::Resume(resume)))
            }
            found => {
                Err(HandshakeError::Unexpected { found, expected: "32 (hello) or 35 (resume)" })
            }
        }
    }

    /// Returns the bytes that tell the dialler that its lane has come back.
    #[must_use]
    pub fn encode_resumed(&self, resumed: &proto::Resumed) -> Bytes {
        frame("resumed", field::RESUMED, resumed).expect("two numbers fit")
    }

    /// Returns the bytes that let the dialler in. The version is filled in.
    ///
    /// # Errors
    ///
    /// The welcome is one that no dialler would take: this end's configuration is at fault.
    pub fn encode_welcome(&self, welcome: &proto::Welcome) -> Result<Bytes, HandshakeError> {
        let welcome = proto::Welcome { version: VERSION, ..welcome.clone() };
        check_welcome(&welcome)?;
        frame("welcome", field::WELCOME, &welcome)
    }

    /// Returns the bytes that turn the dialler away. A detail above 256 bytes is cut.
    #[must_use]
    pub fn encode_refuse(&self, refuse: &proto::Refuse) -> Bytes {
        let mut refuse = refuse.clone();
        while refuse.detail.len() > TEXT_BYTES_MAX {
            refuse.detail.pop();
        }
        frame("refuse", field::REFUSE, &refuse).expect("a short detail fits")
    }
}

fn first_message(buffer: &mut BytesMut) -> Result<Option<(u32, Bytes)>, HandshakeError> {
    let Some(envelope) = envelope::read(buffer, HELLO_BYTES_MAX)? else { return Ok(None) };
    let found = if envelope.request_id.is_some() { field::REQUEST_ID } else { envelope.field };
    Ok(Some((found, envelope.payload)))
}

fn check_hello(hello: &proto::Hello) -> Result<(), HandshakeError> {
    check_version(hello.version)?;
    check_len("instance", hello.instance.len(), 1, IDENTIFIER_BYTES_MAX, "1 to 64 bytes")?;
    check_len("name", hello.name.len(), 0, TEXT_BYTES_MAX, "at most 256 bytes")?;
    let credential = hello.credential.len();
    check_len("credential", credential, 0, CREDENTIAL_BYTES_MAX, "at most 16384 bytes")?;
    check_len("session", hello.session.len(), 0, IDENTIFIER_BYTES_MAX, "at most 64 bytes")?;
    check_len("secret", hello.secret.len(), 0, IDENTIFIER_BYTES_MAX, "at most 64 bytes")?;
    let relay = hello.relay_instance.len();
    check_len("relay_instance", relay, 0, IDENTIFIER_BYTES_MAX, "at most 64 bytes")?;
    check_len("held", hello.held.len(), 0, HELD_MAX, "at most 64")?;
    for held in &hello.held {
        check_len("held", held.len(), 1, IDENTIFIER_BYTES_MAX, "1 to 64 bytes each")?;
    }
    if hello.session.is_empty() != hello.secret.is_empty() {
        return Err(HandshakeError::Range {
            field: "secret",
            found: hello.secret.len() as u64,
            accepted: "present where session is, and only there",
        });
    }
    check_limits(hello.window, hello.message_bytes_max)?;
    ProtocolTable::parse(&hello.protocols)?;
    Ok(())
}

fn check_resume(resume: &proto::Resume) -> Result<(), HandshakeError> {
    check_len("session", resume.session.len(), 1, IDENTIFIER_BYTES_MAX, "1 to 64 bytes")?;
    check_len("secret", resume.secret.len(), 1, IDENTIFIER_BYTES_MAX, "1 to 64 bytes")?;
    let relay = resume.relay_instance.len();
    check_len("relay_instance", relay, 0, IDENTIFIER_BYTES_MAX, "at most 64 bytes")
}

fn check_welcome(welcome: &proto::Welcome) -> Result<(), HandshakeError> {
    check_version(welcome.version)?;
    check_len("session", welcome.session.len(), 1, IDENTIFIER_BYTES_MAX, "1 to 64 bytes")?;
    check_len("secret", welcome.secret.len(), 1, IDENTIFIER_BYTES_MAX, "1 to 64 bytes")?;
    let relay = welcome.relay_instance.len();
    check_len("relay_instance", relay, 1, IDENTIFIER_BYTES_MAX, "1 to 64 bytes")?;
    let address = welcome.advertise_address.len();
    check_len("advertise_address", address, 0, TEXT_BYTES_MAX, "at most 256 bytes")?;
    check_len("peers", welcome.peers.len(), 0, PEERS_MAX, "at most 256")?;
    for peer in &welcome.peers {
        check_len("peers", peer.len(), 1, TEXT_BYTES_MAX, "1 to 256 bytes each")?;
    }
    check_limits(welcome.window, welcome.message_bytes_max)?;
    ProtocolTable::parse(&welcome.protocols)?;
    Ok(())
}

const fn check_version(found: u32) -> Result<(), HandshakeError> {
    if found == VERSION { Ok(()) } else { Err(HandshakeError::Version { found }) }
}

const fn check_len(
    field: &'static str,
    found: usize,
    min: usize,
    max: usize,
    accepted: &'static str,
) -> Result<(), HandshakeError> {
    if found < min || found > max {
        return Err(HandshakeError::Range { field, found: found as u64, accepted });
    }
    Ok(())
}

const fn check_limits(window: u64, message_bytes_max: u32) -> Result<(), HandshakeError> {
    if window < WINDOW_MIN {
        let accepted = "65536 and above";
        return Err(HandshakeError::Range { field: "window", found: window, accepted });
    }
    if message_bytes_max < MESSAGE_BYTES_MIN {
        return Err(HandshakeError::Range {
            field: "message_bytes_max",
            found: message_bytes_max as u64,
            accepted: "131072 and above",
        });
    }
    Ok(())
}

fn frame(name: &'static str, number: u32, message: &impl Message) -> Result<Bytes, HandshakeError> {
    let mut out = Vec::new();
    write_control(&mut out, None, number, message);
    // The frame's own length is counted in, which errs on the safe side.
    check_len(name, out.len(), 0, HELLO_BYTES_MAX, "at most 65536 bytes as a whole")?;
    Ok(Bytes::from(out))
}

fn decode<M: Message + Default>(field: u32, payload: Bytes) -> Result<M, HandshakeError> {
    M::decode(payload).map_err(|source| HandshakeError::Payload { field, source })
}
