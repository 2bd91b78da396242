//! Tests of the crate as a whole; a module per area.

mod codec;
mod connection;
mod cuts;
mod decode;
mod flow;
mod generated;
mod handshake;
mod hostile;
mod lane;
mod model;
mod operate;
mod operations;
mod pair;
mod pipe;
mod resume;
mod ring;
