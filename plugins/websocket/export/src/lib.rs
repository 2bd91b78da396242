//! Exports the WebSocket plugin: the shared library that a host loads. The logic is the crate
//! `sidelane-websocket`, which links where an exported symbol must not be.
#![forbid(unsafe_code)]

sidelane_plugin::export!(logic::WebSocket, name = "websocket");
