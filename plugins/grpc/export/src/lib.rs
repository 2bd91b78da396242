//! Exports the gRPC plugin: the shared library that a host loads. The logic is the crate
//! `sidelane-grpc`, which links where an exported symbol must not be.
#![forbid(unsafe_code)]

sidelane_plugin::export!(logic::Grpc, name = "grpc");
