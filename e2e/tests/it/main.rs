//! The program as its users meet it, one module per behaviour.

mod bounds;
mod browser;
mod crowd;
mod failures;
mod framing;
mod grpc;
mod grpc_failures;
mod grpc_raw;
mod head;
mod hop_by_hop;
mod operations;
mod plugins;
mod pool;
mod refused;
mod reload;
mod residue;
mod service_double;
mod several_files;
mod shutdown;
mod start;
mod streaming;
mod two_processes;
mod websocket;
mod websocket_ends;
mod websocket_peers;
