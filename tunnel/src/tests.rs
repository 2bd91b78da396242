//! Tests of the crate as a whole; a module per area.

mod codec;
mod connection;
mod cuts;
mod decode;
mod generated;
mod handshake;
mod lane;
mod model;
mod pair;
mod pipe;
mod resume;
