//! The client's cases.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::uri::PathAndQuery;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::client::Grpc;
use tonic::codec::CompressionEncoding;
use tonic::metadata::{BinaryMetadataValue, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Response, Status, Streaming};

use crate::codec::BytesCodec;
use crate::{hexadecimal, shown};

const HOST: &str = "api.localhost";
const AUTHORITY: &str = "http://api.localhost";
const MIB: usize = 1024 * 1024;
const SHORT_RPCS: usize = 10_000;
const IN_FLIGHT: usize = 100;
/// Above what a stream that nobody reads holds, so that it leaves room for the connection's others.
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;

/// Runs a case and returns what it saw.
pub(crate) async fn run(case: &str, address: &str) -> Result<Value> {
    let peer = Peer::connect(address).await?;
    match case {
        "shapes" => shapes(peer).await,
        "metadata" => metadata(peer).await,
        "status" => status(peer).await,
        "unary" => unary(peer).await,
        "deadline" => deadline(peer).await,
        "cancel" => cancel(peer).await,
        "held" => held(peer).await,
        "numbers" => numbers(peer).await,
        "large" => large(peer).await,
        "limit" => limit(peer).await,
        "huge" => huge(peer).await,
        "short" => short(peer).await,
        "many" => many(peer).await,
        "stalled" => stalled(peer).await,
        "gzip" => gzip(peer).await,
        _ => bail!("no such case: {case}"),
    }
}

/// One channel and the shapes of the methods of `e2e.Peer`.
#[derive(Clone)]
struct Peer(Grpc<Channel>);

impl Peer {
    async fn connect(address: &str) -> Result<Self> {
        let endpoint = match std::env::var_os("SIDELANE_E2E_CA") {
            None => Endpoint::from_shared(format!("http://{address}"))?.origin(AUTHORITY.parse()?),
            Some(ca) => {
                let ca = Certificate::from_pem(std::fs::read(ca)?);
                let tls = ClientTlsConfig::new().ca_certificate(ca).domain_name(HOST);
                Endpoint::from_shared(format!("https://{address}"))?
                    .origin(format!("https://{HOST}").parse()?)
                    .tls_config(tls)?
            }
        };
        let channel = endpoint.initial_connection_window_size(CONNECTION_WINDOW).connect().await?;
        let grpc = Grpc::new(channel)
            .max_decoding_message_size(usize::MAX)
            .max_encoding_message_size(usize::MAX)
            .accept_compressed(CompressionEncoding::Gzip);
        Ok(Self(grpc))
    }

    async fn ready(&mut self, method: &str) -> Result<PathAndQuery, Status> {
        self.0.ready().await.map_err(|error| Status::unknown(error.to_string()))?;
        format!("/e2e.Peer/{method}").parse().map_err(|_| Status::internal("not a method"))
    }

    async fn unary(
        &mut self,
        method: &str,
        request: Request<Bytes>,
    ) -> Result<Response<Bytes>, Status> {
        let path = self.ready(method).await?;
        self.0.unary(request, path, BytesCodec).await
    }

    async fn echo(&mut self, message: impl Into<Bytes>) -> Result<bool, Status> {
        let message = message.into();
        Ok(self.unary("Echo", Request::new(message.clone())).await?.into_inner() == message)
    }

    async fn down(
        &mut self,
        method: &str,
        request: Request<Bytes>,
    ) -> Result<Streaming<Bytes>, Status> {
        let path = self.ready(method).await?;
        Ok(self.0.server_streaming(request, path, BytesCodec).await?.into_inner())
    }

    async fn up<S>(&mut self, method: &str, requests: S) -> Result<Bytes, Status>
    where
        S: Stream<Item = Bytes> + Send + 'static,
    {
        let path = self.ready(method).await?;
        let reply = self.0.client_streaming(Request::new(requests), path, BytesCodec).await?;
        Ok(reply.into_inner())
    }

    async fn both(
        &mut self,
        method: &str,
    ) -> Result<(mpsc::Sender<Bytes>, Streaming<Bytes>), Status> {
        let path = self.ready(method).await?;
        let (sender, requests) = mpsc::channel(1);
        let requests = Request::new(ReceiverStream::new(requests));
        let replies = self.0.streaming(requests, path, BytesCodec).await?;
        Ok((sender, replies.into_inner()))
    }

    async fn count(&mut self, request: String) -> Result<Vec<Bytes>, Status> {
        let mut replies = self.down("Count", Request::new(Bytes::from(request))).await?;
        let mut all = Vec::new();
        while let Some(reply) = replies.message().await? {
            all.push(reply);
        }
        Ok(all)
    }
}

fn shown_status(status: &Status, messages: usize) -> Value {
    let details = status.details();
    let details = if details.is_empty() { Value::Null } else { json!([hexadecimal(details)]) };
    json!({
        "code": i32::from(status.code()),
        "message": status.message(),
        "details": details,
        "messages": messages,
    })
}

/// The status with which a call without a stream of replies ends.
fn outcome<T>(result: &Result<T, Status>) -> Value {
    match result {
        Ok(_) => json!({ "code": 0, "messages": 1 }),
        Err(status) => shown_status(status, 0),
    }
}

/// The status with which a stream ends, and how many messages came before.
async fn end(replies: Result<Streaming<Bytes>, Status>, mut messages: usize) -> Value {
    let mut replies = match replies {
        Ok(replies) => replies,
        Err(status) => return shown_status(&status, messages),
    };
    loop {
        match replies.message().await {
            Ok(Some(_)) => messages += 1,
            Ok(None) => return json!({ "code": 0, "messages": messages }),
            Err(status) => return shown_status(&status, messages),
        }
    }
}

fn text(bytes: &Bytes) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

async fn shapes(mut peer: Peer) -> Result<Value> {
    let down = peer.count("1000 100".to_owned()).await?;
    let in_order = (0_u32..).zip(&down).all(|(index, message)| message[..4] == index.to_be_bytes());
    let (requests, mut replies) = peer.both("Chat").await?;
    let mut chat = true;
    for message in (0..100).map(|number| Bytes::from(number.to_string())).chain([Bytes::new()]) {
        requests.send(message.clone()).await?;
        chat &= replies.message().await?.as_ref() == Some(&message);
    }
    drop(requests);
    chat &= replies.message().await?.is_none();
    let (requests, mut replies) = peer.both("First").await?;
    let ready = replies.message().await?.context("a reply before any request")?;
    requests.send(Bytes::from_static(b"after")).await?;
    let after = replies.message().await?.context("an echo")?;
    drop(requests);
    let rest = if replies.message().await?.is_none() { 0 } else { 1 };
    let sizes = tokio_stream::iter((0..100).map(|size| Bytes::from(vec![b'a'; size])));
    Ok(json!({
        "echo": peer.echo("hello").await?,
        "empty": peer.echo("").await?,
        "down": down.len(),
        "in_order": in_order,
        "none": peer.count("0 4".to_owned()).await?.len(),
        "up": text(&peer.up("Sum", sizes).await?),
        "up_none": text(&peer.up("Sum", tokio_stream::empty()).await?),
        "up_empty": text(&peer.up("Sum", tokio_stream::iter(vec![Bytes::new(); 3])).await?),
        "chat": chat,
        "first": [json!(text(&ready)), json!(text(&after)), json!(rest)],
    }))
}

async fn metadata(mut peer: Peer) -> Result<Value> {
    let mut request = Request::new(Bytes::new());
    request.set_timeout(std::time::Duration::from_secs(60));
    let sent = request.metadata_mut();
    sent.append("x-repeated", MetadataValue::from_static("1"));
    sent.append_bin("x-data-bin", BinaryMetadataValue::from_bytes(b"\x00\x01\xff"));
    sent.append("x-repeated", MetadataValue::from_static("2"));
    sent.append_bin("x-data-bin", BinaryMetadataValue::from_bytes(b""));
    let path = peer.ready("Show").await?;
    // Of a unary reply tonic merges head and trailers; of a stream it tells them apart.
    let reply = peer.0.server_streaming(request, path, BytesCodec).await?;
    let initial = shown(reply.metadata())?;
    let mut replies = reply.into_inner();
    let seen = replies.message().await?.context("a reply")?;
    let trailing = replies.trailers().await?.unwrap_or_default();
    let bare = peer.unary("Show", Request::new(Bytes::new())).await?.into_inner();
    let bare: Value = serde_json::from_slice(&bare)?;
    let mut seen: Value = serde_json::from_slice(&seen)?;
    seen["without_deadline"] = bare["deadline"].clone();
    seen["initial"] = initial;
    seen["trailing"] = shown(&trailing)?;
    Ok(seen)
}

async fn status(mut peer: Peer) -> Result<Value> {
    let nothing = || Request::new(Bytes::new());
    let endless = tokio_stream::iter(std::iter::repeat(Bytes::from_static(b"more")));
    Ok(json!({
        "fail": outcome(&peer.unary("Fail", nothing()).await),
        "late": end(peer.down("Late", nothing()).await, 0).await,
        "early": outcome(&peer.up("Refuse", endless).await),
        "unknown": outcome(&peer.unary("Unknown", nothing()).await),
    }))
}

async fn unary(mut peer: Peer) -> Result<Value> {
    Ok(outcome(&peer.echo("hello").await))
}

async fn deadline(mut peer: Peer) -> Result<Value> {
    // The deadline is sent; who enforces it is the peer.
    let mut request = Request::new(Bytes::from_static(b"deadline"));
    request.metadata_mut().insert("grpc-timeout", MetadataValue::from_static("500m"));
    Ok(end(peer.down("Hang", request).await, 0).await)
}

async fn cancel(mut peer: Peer) -> Result<Value> {
    let mut replies = peer.down("Hang", Request::new(Bytes::from_static(b"cancel"))).await?;
    replies.message().await?;
    // This is how tonic's clients cancel; nobody is left who could be told a status.
    drop(replies);
    Ok(json!({ "code": 1, "after": peer.echo("hello").await? }))
}

async fn held(mut peer: Peer) -> Result<Value> {
    let mut replies = peer.down("Hang", Request::new(Bytes::from_static(b"held"))).await?;
    replies.message().await?;
    println!("{}", json!({ "held": true }));
    Ok(end(Ok(replies), 0).await)
}

async fn large(mut peer: Peer) -> Result<Value> {
    Ok(json!({ "same": peer.echo(noise(5 * MIB)).await? }))
}

/// Bytes that do not compress to nothing.
fn noise(size: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = (0..size.div_ceil(8)).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(size).collect()
}

async fn limit(mut peer: Peer) -> Result<Value> {
    let limit = 4 * MIB;
    let below = peer.echo(vec![0; limit - 1]).await?;
    let above = outcome(&peer.echo(vec![0; limit + 1]).await);
    let request = Request::new(Bytes::from(format!("1 {}", limit + 1)));
    let answer = end(peer.down("Count", request).await, 0).await;
    Ok(json!({ "below": below, "above": above, "answer_above": answer }))
}

async fn huge(mut peer: Peer) -> Result<Value> {
    let sizes = |replies: Vec<Bytes>| [replies.len(), replies.iter().map(Bytes::len).sum()];
    let down = sizes(peer.count(format!("100 {MIB}")).await?);
    let large = sizes(peer.count(format!("5 {}", 20 * MIB)).await?);
    let requests = tokio_stream::iter(vec![noise(MIB); 100]);
    Ok(json!({ "down": down, "large": large, "up": text(&peer.up("Sum", requests).await?) }))
}

async fn short(peer: Peer) -> Result<Value> {
    let slots = Arc::new(Semaphore::new(IN_FLIGHT));
    let mut calls = JoinSet::new();
    for number in 0..SHORT_RPCS {
        let slot = Arc::clone(&slots).acquire_owned().await?;
        let mut peer = peer.clone();
        calls.spawn(async move {
            let same = peer.echo(number.to_string()).await;
            drop(slot);
            same
        });
    }
    let mut ok = 0;
    while let Some(call) = calls.join_next().await {
        ok += usize::from(call??);
    }
    Ok(json!({ "ok": ok }))
}

async fn many(mut peer: Peer) -> Result<Value> {
    let mut calls = Vec::new();
    for _ in 0..IN_FLIGHT {
        calls.push(peer.both("Chat").await?);
    }
    let mut same = true;
    for turn in 0..10 {
        let message = |number| Bytes::from(format!("{number} {turn}"));
        for (number, (requests, _)) in calls.iter().enumerate() {
            requests.send(message(number)).await?;
        }
        for (number, (_, replies)) in calls.iter_mut().enumerate() {
            same &= replies.message().await? == Some(message(number));
        }
    }
    let mut ended = 0;
    for (requests, mut replies) in calls {
        drop(requests);
        ended += usize::from(replies.next().await.is_none());
    }
    Ok(json!({ "same": same, "ended": ended }))
}

/// Numbered messages both ways, a bounded number in flight, until a line comes in.
async fn numbers(mut peer: Peer) -> Result<Value> {
    let (requests, mut replies) = peer.both("Chat").await?;
    let slots = Arc::new(Semaphore::new(IN_FLIGHT));
    let (told, mut ended) = oneshot::channel();
    // Blocks until there is one; the process does not wait for it.
    std::thread::spawn(move || {
        let line = std::io::stdin().read_line(&mut String::new());
        // Whoever waits for it is there until the end.
        let _ = told.send(line);
    });
    let sender = tokio::spawn({
        let slots = Arc::clone(&slots);
        async move {
            let mut sent = 0_u32;
            loop {
                tokio::select! {
                    biased;
                    _ = &mut ended => return sent,
                    slot = slots.acquire() => match slot {
                        Ok(slot) => slot.forget(),
                        Err(_) => return sent,
                    },
                }
                if requests.send(numbered(sent)).await.is_err() {
                    return sent;
                }
                sent += 1;
            }
        }
    });
    let (mut received, mut wrong) = (0_u32, Vec::new());
    let status = loop {
        match replies.message().await {
            Ok(Some(reply)) => {
                if reply != numbered(received) {
                    wrong.push(received);
                }
                if received == 0 {
                    println!("{}", json!({ "begun": true }));
                }
                received += 1;
                slots.add_permits(1);
            }
            Ok(None) => break json!({ "code": 0 }),
            Err(status) => break shown_status(&status, 0),
        }
    };
    slots.close();
    let sent = sender.await?;
    let (code, message) = (&status["code"], &status["message"]);
    Ok(
        json!({ "code": code, "message": message, "received": received, "wrong": wrong, "sent": sent }),
    )
}

/// A message that no other is equal to, of 4 to 3,003 bytes.
fn numbered(number: u32) -> Bytes {
    let mut message = number.to_be_bytes().to_vec();
    message.resize(4 + number as usize * 37 % 3000, 0);
    message.into()
}

async fn stalled(mut peer: Peer) -> Result<Value> {
    let mut unread = peer.down("Count", Request::new(Bytes::from("100000 65536"))).await?;
    unread.message().await?;
    let endless = tokio_stream::iter(std::iter::repeat(Bytes::from(vec![0; 65_536])));
    let mut ignoring = peer.clone();
    let ignored = tokio::spawn(async move { ignoring.up("Ignore", endless).await });
    let (requests, mut replies) = peer.both("Chat").await?;
    let mut rounds = 0;
    for number in 0..500 {
        let message = Bytes::from(number.to_string());
        requests.send(message.clone()).await?;
        rounds += usize::from(replies.message().await?.as_ref() == Some(&message));
    }
    ignored.abort();
    drop(unread);
    Ok(json!({ "rounds": rounds }))
}

async fn gzip(mut peer: Peer) -> Result<Value> {
    peer.0 = peer.0.send_compressed(CompressionEncoding::Gzip);
    let same = peer.echo("abc".repeat(400_000)).await?;
    let seen = peer.unary("Show", Request::new(Bytes::new())).await?.into_inner();
    let seen: Value = serde_json::from_slice(&seen)?;
    Ok(json!({ "same": same, "metadata": seen["metadata"] }))
}
