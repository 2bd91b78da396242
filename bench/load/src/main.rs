//! Load and services for `bench/run.py`: WebSocket and gRPC, one thread, as cheap as can be, so that
//! what is measured is the proxy between them.
//!
//! A load opens its connections, warms them, prints `open`, and waits for a line on standard input:
//! whoever measures reads the proxies' clocks then. At the end it prints one line of JSON. It
//! verifies all that it receives; what is not as it should be counts as an error.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program that reports")]

mod grpc;
mod tally;
mod websocket;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

/// Load and services of the head-to-head.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answers every WebSocket frame by its like, and a plain GET by 200.
    WsEchoServer {
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: SocketAddr,
    },
    /// One frame in flight per connection.
    WsPingPong(Load),
    /// Many frames in flight per connection.
    WsPipelined {
        #[command(flatten)]
        load: Load,
        /// Frames in flight per connection.
        #[arg(long, default_value_t = 32)]
        in_flight: u32,
    },
    /// Opens connections, one echo on each, and keeps them until standard input ends.
    WsIdle(Load),
    /// Unary echo, and a stream of as many messages as the request asks for.
    GrpcServer {
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: SocketAddr,
    },
    /// Unary calls, one in flight per stream.
    GrpcUnary {
        #[command(flatten)]
        load: Load,
        /// Calls in flight over all connections.
        #[arg(long, default_value_t = 64)]
        streams: usize,
    },
    /// Server streaming: an operation is a message, a latency that of a whole call.
    GrpcStream {
        #[command(flatten)]
        load: Load,
        /// Calls in flight over all connections.
        #[arg(long, default_value_t = 64)]
        streams: usize,
        /// Messages of one call.
        #[arg(long, default_value_t = 1000)]
        messages: u32,
    },
}

/// What every load is told.
#[derive(Args, Clone)]
struct Load {
    /// Where to connect.
    #[arg(long)]
    target: SocketAddr,
    /// `Host` or `:authority`.
    #[arg(long, default_value = "localhost")]
    host: String,
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Bytes of a message.
    #[arg(long, default_value_t = 125)]
    bytes: usize,
    #[arg(long, default_value = "5", value_parser = seconds)]
    seconds: Duration,
    /// Before the line `open`, on the same connections.
    #[arg(long, default_value = "0.3", value_parser = seconds)]
    warm_up: Duration,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.parse::<f64>().map_err(|error| error.to_string())?;
    Duration::try_from_secs_f64(number).map_err(|error| error.to_string())
}

fn main() -> Result<()> {
    let command = Arguments::parse().command;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        match command {
            Command::WsEchoServer { listen } => websocket::server::serve(listen).await,
            Command::WsPingPong(load) => websocket::load::run(&load, 1).await,
            Command::WsPipelined { load, in_flight } => {
                websocket::load::run(&load, in_flight).await
            }
            Command::WsIdle(load) => websocket::load::idle(&load).await,
            Command::GrpcServer { listen } => grpc::server::serve(listen).await,
            Command::GrpcUnary { load, streams } => {
                grpc::load::run(&load, streams, grpc::Call::Unary).await
            }
            Command::GrpcStream { load, streams, messages } => {
                grpc::load::run(&load, streams, grpc::Call::Stream { messages }).await
            }
        }
    })
}
