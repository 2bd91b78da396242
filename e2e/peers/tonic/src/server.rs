//! The service.

use std::convert::Infallible;
use std::future::{Future, ready};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use anyhow::Result;
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::body::Body;
use tonic::codec::CompressionEncoding;
use tonic::metadata::{BinaryMetadataValue, MetadataValue};
use tonic::server::{ClientStreamingService, Grpc, StreamingService, UnaryService};
use tonic::server::{NamedService, ServerStreamingService};
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status, Streaming};
use tower_service::Service;

use crate::codec::BytesCodec;
use crate::shown;

/// Flow-control window of a connection, beside 1 MiB of a stream.
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type Reply<T> = Result<Response<T>, Status>;

/// Listens, prints the port, and returns what was seen once the input has ended.
pub(crate) async fn serve() -> Result<Value> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", json!({ "port": listener.local_addr()?.port() }));
    let peer = Peer::default();
    let cancelled = Arc::clone(&peer.cancelled);
    let serving = tonic::transport::Server::builder()
        // Above what one stream that nobody reads can hold: it leaves room for the others.
        .initial_connection_window_size(CONNECTION_WINDOW)
        .serve_with_incoming(peer, TcpIncoming::from(listener).with_nodelay(Some(true)));
    let mut input = Vec::new();
    let mut stdin = tokio::io::stdin();
    tokio::select! {
        served = serving => served?,
        read = stdin.read_to_end(&mut input) => { read?; }
    }
    let cancelled = cancelled.lock().expect("no panic").clone();
    Ok(json!({ "cancelled": cancelled }))
}

/// All methods.
#[derive(Clone, Default)]
struct Peer {
    cancelled: Arc<Mutex<Vec<String>>>,
}

impl NamedService for Peer {
    const NAME: &'static str = "e2e.Peer";
}

impl Service<http::Request<Body>> for Peer {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let cancelled = Arc::clone(&self.cancelled);
        Box::pin(async move {
            let mut grpc = Grpc::new(BytesCodec)
                .max_decoding_message_size(usize::MAX)
                .max_encoding_message_size(usize::MAX)
                .accept_compressed(CompressionEncoding::Gzip);
            let method = request.uri().path().strip_prefix("/e2e.Peer/").map(str::to_owned);
            Ok(match method.as_deref() {
                Some("Echo") => {
                    grpc = grpc.send_compressed(CompressionEncoding::Gzip);
                    grpc.unary(Unary(echo), request).await
                }
                Some("Show") => grpc.unary(Unary(show), request).await,
                Some("Fail") => grpc.unary(Unary(fail), request).await,
                Some("Count") => grpc.server_streaming(Down(count), request).await,
                Some("Late") => grpc.server_streaming(Down(late), request).await,
                Some("Hang") => {
                    let hang = move |request| hang(request, &cancelled);
                    grpc.server_streaming(Down(hang), request).await
                }
                Some("Sum") => grpc.client_streaming(Up(total), request).await,
                Some("Refuse") => grpc.client_streaming(Up(refuse), request).await,
                Some("Ignore") => grpc.client_streaming(Up(ignore), request).await,
                Some("Chat") => grpc.streaming(Both(chat), request).await,
                Some("First") => grpc.streaming(Both(first), request).await,
                _ => Status::unimplemented("no such method").into_http(),
            })
        })
    }
}

/// A stream of replies. A type of its own: the compiler cannot see through the lifetime of a boxed
/// one across an await.
struct Replies(Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>);

impl Replies {
    fn new(stream: impl Stream<Item = Result<Bytes, Status>> + Send + 'static) -> Self {
        Self(Box::pin(stream))
    }
}

impl Stream for Replies {
    type Item = Result<Bytes, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll_next(cx)
    }
}

/// Functions as tonic's services, one wrapper per shape.
struct Unary<F>(F);
struct Down<F>(F);
struct Up<F>(F);
struct Both<F>(F);

impl<F, R> UnaryService<Bytes> for Unary<F>
where
    F: FnMut(Request<Bytes>) -> R,
    R: Future<Output = Reply<Bytes>> + Send + 'static,
{
    type Response = Bytes;
    type Future = BoxFuture<Reply<Bytes>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        Box::pin((self.0)(request))
    }
}

impl<F> ServerStreamingService<Bytes> for Down<F>
where
    F: FnMut(Bytes) -> Result<Replies, Status>,
{
    type Response = Bytes;
    type ResponseStream = Replies;
    type Future = BoxFuture<Reply<Replies>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let replies = (self.0)(request.into_inner());
        Box::pin(ready(replies.map(Response::new)))
    }
}

impl<F, R> ClientStreamingService<Bytes> for Up<F>
where
    F: FnMut(Streaming<Bytes>) -> R,
    R: Future<Output = Result<Bytes, Status>> + Send + 'static,
{
    type Response = Bytes;
    type Future = BoxFuture<Reply<Bytes>>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let reply = (self.0)(request.into_inner());
        Box::pin(async { reply.await.map(Response::new) })
    }
}

impl<F> StreamingService<Bytes> for Both<F>
where
    F: FnMut(Streaming<Bytes>) -> Replies,
{
    type Response = Bytes;
    type ResponseStream = Replies;
    type Future = BoxFuture<Reply<Replies>>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let replies = (self.0)(request.into_inner());
        Box::pin(ready(Ok(Response::new(replies))))
    }
}

async fn echo(request: Request<Bytes>) -> Reply<Bytes> {
    Ok(Response::new(request.into_inner()))
}

async fn show(request: Request<Bytes>) -> Reply<Bytes> {
    let metadata = request.metadata();
    let deadline = metadata.contains_key("grpc-timeout");
    let seen = shown(metadata).map_err(|error| Status::internal(error.to_string()))?;
    let seen = json!({ "metadata": seen, "deadline": deadline }).to_string();
    let mut reply = Response::new(Bytes::from(seen));
    reply.metadata_mut().append("x-initial", MetadataValue::from_static("1"));
    reply.metadata_mut().append("x-initial", MetadataValue::from_static("2"));
    reply.metadata_mut().append_bin("x-initial-bin", binary(b"\x00\xfe\xff"));
    Ok(reply)
}

fn binary(bytes: &[u8]) -> BinaryMetadataValue {
    BinaryMetadataValue::from_bytes(bytes)
}

async fn fail(_: Request<Bytes>) -> Reply<Bytes> {
    let details = Bytes::from_static(b"\x08\x03\xff");
    Err(Status::with_details(Code::InvalidArgument, "käse 100%\nsecond line", details))
}

fn count(request: Bytes) -> Result<Replies, Status> {
    let text = String::from_utf8_lossy(&request).into_owned();
    let words = text.split_once(' ').and_then(|(number, size)| {
        Some((number.parse::<u32>().ok()?, size.parse::<usize>().ok()?))
    });
    let (number, size) = words.ok_or_else(|| Status::invalid_argument("COUNT SIZE"))?;
    Ok(Replies::new(tokio_stream::iter((0..number).map(move |index| {
        let mut message = vec![0; size];
        message[..4].copy_from_slice(&index.to_be_bytes());
        Ok(Bytes::from(message))
    }))))
}

fn late(_: Bytes) -> Result<Replies, Status> {
    let end = Status::failed_precondition("after one message");
    Ok(Replies::new(tokio_stream::iter([Ok(Bytes::from_static(b"one")), Err(end)])))
}

/// One message and no end; the stream's drop is the call's.
fn hang(request: Bytes, cancelled: &Arc<Mutex<Vec<String>>>) -> Result<Replies, Status> {
    let (replies, stream) = mpsc::channel(1);
    let cancelled = Arc::clone(cancelled);
    tokio::spawn(async move {
        // Fails where the call is cancelled already, which the next line sees.
        let _ = replies.send(Ok(Bytes::from_static(b"hanging"))).await;
        replies.closed().await;
        let name = String::from_utf8_lossy(&request).into_owned();
        cancelled.lock().expect("no panic").push(name);
    });
    Ok(Replies::new(ReceiverStream::new(stream)))
}

async fn total(mut requests: Streaming<Bytes>) -> Result<Bytes, Status> {
    let (mut messages, mut size) = (0, 0);
    while let Some(message) = requests.message().await? {
        messages += 1;
        size += message.len();
    }
    Ok(Bytes::from(format!("{messages} {size}")))
}

async fn refuse(mut requests: Streaming<Bytes>) -> Result<Bytes, Status> {
    requests.message().await?;
    Err(Status::resource_exhausted("enough"))
}

async fn ignore(requests: Streaming<Bytes>) -> Result<Bytes, Status> {
    std::future::pending::<()>().await;
    drop(requests);
    Ok(Bytes::new())
}

fn chat(requests: Streaming<Bytes>) -> Replies {
    Replies::new(requests)
}

fn first(requests: Streaming<Bytes>) -> Replies {
    Replies::new(tokio_stream::once(Ok(Bytes::from_static(b"ready"))).chain(requests))
}
