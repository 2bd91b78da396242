//! The clients.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use h2::{RecvStream, client};
use http::{HeaderMap, Method, Request, Version};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout_at;

use super::{
    CONNECTION_WINDOW, Call, STREAM_PATH, STREAM_WINDOW, UNARY_PATH, message, number, take_message,
};
use crate::Load;
use crate::tally::{GRACE, Tally, wait_for_line};

/// Keeps one call in flight on each of `streams`, spread over the connections.
pub(crate) async fn run(load: &Load, streams: usize, call: Call) -> Result<()> {
    ensure!(load.bytes >= 4, "a message has 4 bytes or more");
    let mut clients = Vec::new();
    for _ in 0..load.connections {
        clients.push(connect(load).await?);
    }
    let workers: Vec<_> = (0..streams)
        .map(|index| Worker {
            client: clients[index % clients.len()].clone(),
            host: load.host.clone(),
            bytes: load.bytes,
            call,
        })
        .collect();
    let warm = drive(&workers, Instant::now() + load.warm_up).await?;
    ensure!(warm.errors == 0, "{} calls failed while warming up", warm.errors);
    wait_for_line()?;
    let start = Instant::now();
    let tally = drive(&workers, start + load.seconds).await?;
    tally.print(start.elapsed());
    Ok(())
}

async fn connect(load: &Load) -> Result<SendRequest<Bytes>> {
    let stream = TcpStream::connect(load.target).await?;
    stream.set_nodelay(true)?;
    let (client, connection) = client::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .handshake(stream)
        .await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            eprintln!("connection: {error:#}");
        }
    });
    Ok(client)
}

async fn drive(workers: &[Worker], until: Instant) -> Result<Tally> {
    let mut running = JoinSet::new();
    for worker in workers {
        let worker = worker.clone();
        running.spawn(async move {
            let mut tally = Tally::default();
            let calls = worker.calls(until, &mut tally);
            let outcome = timeout_at((until + GRACE).into(), calls).await;
            if let Err(error) = outcome.context("no answer").flatten() {
                tally.error(&error);
            }
            tally
        });
    }
    let mut sum = Tally::default();
    while let Some(tally) = running.join_next().await {
        sum.add(tally?);
    }
    Ok(sum)
}

#[derive(Clone)]
struct Worker {
    client: SendRequest<Bytes>,
    host: String,
    bytes: usize,
    call: Call,
}

impl Worker {
    async fn calls(&self, until: Instant, tally: &mut Tally) -> Result<()> {
        let mut id = 0;
        loop {
            let start = Instant::now();
            tally.operations += match self.call {
                Call::Unary => self.unary(id).await?,
                Call::Stream { messages } => self.stream(messages).await?,
            };
            tally.latency(start);
            id += 1;
            if Instant::now() >= until {
                return Ok(());
            }
        }
    }

    async fn unary(&self, id: u32) -> Result<u64> {
        let sent = message(id, self.bytes);
        let mut body = self.start(UNARY_PATH, sent.clone()).await?;
        let mut received = BytesMut::new();
        while let Some(data) = body.data().await {
            let data = data?;
            body.flow_control().release_capacity(data.len())?;
            received.extend_from_slice(&data);
        }
        ensure!(received == sent, "{} bytes came back for {}", received.len(), sent.len());
        ensure_ok(body.trailers().await?.as_ref())?;
        Ok(1)
    }

    async fn stream(&self, messages: u32) -> Result<u64> {
        let mut body = self.start(STREAM_PATH, message(messages, self.bytes)).await?;
        let mut inbox = BytesMut::new();
        let mut count = 0;
        while let Some(data) = body.data().await {
            let data = data?;
            body.flow_control().release_capacity(data.len())?;
            inbox.extend_from_slice(&data);
            while let Some(message) = take_message(&mut inbox) {
                ensure!(message.len() == self.bytes, "a message of {} bytes", message.len());
                ensure!(number(&message) == Some(count), "message {count} is not the next");
                count += 1;
            }
        }
        ensure!(inbox.is_empty(), "{} bytes after the last message", inbox.len());
        ensure_ok(body.trailers().await?.as_ref())?;
        ensure!(count == messages, "{count} messages of {messages}");
        Ok(u64::from(count))
    }

    /// Sends a call with its one message, and returns the answer's body.
    async fn start(&self, path: &str, message: Bytes) -> Result<RecvStream> {
        let request = Request::builder()
            .method(Method::POST)
            .version(Version::HTTP_2)
            .uri(format!("http://{}{path}", self.host))
            .header("te", "trailers")
            .header("content-type", "application/grpc")
            .body(())?;
        let mut client = self.client.clone().ready().await?;
        let (response, mut body) = client.send_request(request, false)?;
        body.send_data(message, true)?;
        let response = response.await?;
        ensure!(response.status() == 200, "status {}", response.status());
        // An answer that is trailers alone carries its status here.
        if let Some(status) = response.headers().get("grpc-status") {
            ensure!(status == "0", "grpc-status {status:?}: {:?}", response.headers());
        }
        Ok(response.into_body())
    }
}

fn ensure_ok(trailers: Option<&HeaderMap>) -> Result<()> {
    let trailers = trailers.context("no trailers")?;
    let status = trailers.get("grpc-status").context("no grpc-status")?;
    ensure!(status == "0", "grpc-status {status:?}: {trailers:?}");
    Ok(())
}
