//! The two ends of a lane's gRPC carrier as tonic makes them, by `tunnel/proto/carrier.proto`: one takes
//! TCP and calls a relay, the other is called and connects to a relay by TCP. Neither knows what it carries.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};

use anyhow::Result;
use bytes::{Bytes, BytesMut};
use http::uri::PathAndQuery;
use prost::Message;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::server::{NamedService, StreamingService};
use tonic::transport::Endpoint;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};
use tower_service::Service;

const METHOD: &str = "/sidelane.tunnel.v1.Tunnel/Connect";

/// Messages that wait.
const WAITING: usize = 4;

/// Bytes of a message; an odd number, so that no two ends agree on where one ends.
const MESSAGE_BYTES: usize = 40_009;

/// As prost has it.
#[derive(Clone, PartialEq, Message)]
struct CarrierBytes {
    #[prost(bytes = "bytes", tag = "1")]
    data: Bytes,
}

/// Passes messages through prost.
#[derive(Clone, Copy, Debug, Default)]
struct ProstCodec(PhantomData<CarrierBytes>);

impl Codec for ProstCodec {
    type Encode = CarrierBytes;
    type Decode = CarrierBytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for ProstCodec {
    type Item = CarrierBytes;
    type Error = Status;

    fn encode(&mut self, item: CarrierBytes, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.encode(into).map_err(|error| Status::internal(error.to_string()))
    }
}

impl Decoder for ProstCodec {
    type Item = CarrierBytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<CarrierBytes>, Status> {
        CarrierBytes::decode(from).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

/// Takes TCP, and calls the relay at `address` for each connection; until the input ends.
pub(crate) async fn to_grpc(address: &str) -> Result<Value> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", json!({ "port": listener.local_addr()?.port() }));
    let address = address.to_owned();
    let serving = async {
        loop {
            let (stream, _) = listener.accept().await?;
            let address = address.clone();
            // What fails closes the connection.
            tokio::spawn(async move { call(stream, &address).await });
        }
        #[allow(unreachable_code, reason = "it says what the block is")]
        Ok::<_, anyhow::Error>(())
    };
    until_told(serving).await
}

async fn call(stream: TcpStream, address: &str) -> Result<()> {
    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect().await?;
    let mut grpc = Grpc::new(channel);
    grpc.ready().await?;
    let (from, to) = stream.into_split();
    let (send, messages) = mpsc::channel(WAITING);
    tokio::spawn(read(from, send));
    let messages = ReceiverStream::new(messages).map_while(Result::ok);
    let request = Request::new(messages);
    let path = PathAndQuery::from_static(METHOD);
    let answer = grpc.streaming(request, path, ProstCodec::default()).await?;
    write(answer.into_inner(), to).await
}

/// Is called, and connects to the relay at `address` by TCP for each call; until the input ends.
pub(crate) async fn to_tcp(address: &str) -> Result<Value> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", json!({ "port": listener.local_addr()?.port() }));
    let called = Called { relay: address.to_owned() };
    let serving = async {
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        tonic::transport::Server::builder().serve_with_incoming(called, incoming).await?;
        Ok(())
    };
    until_told(serving).await
}

async fn until_told(serving: impl Future<Output = Result<()>>) -> Result<Value> {
    let mut stdin = tokio::io::stdin();
    let mut input = Vec::new();
    tokio::select! {
        served = serving => served?,
        read = stdin.read_to_end(&mut input) => { read?; }
    }
    Ok(json!({}))
}

async fn read(mut from: OwnedReadHalf, to: mpsc::Sender<Result<CarrierBytes, Status>>) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(MESSAGE_BYTES);
        let mut limited = (&mut from).take(MESSAGE_BYTES as u64);
        match limited.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if to.send(Ok(CarrierBytes { data: buffer.split().freeze() })).await.is_err() {
            return;
        }
    }
}

async fn write(mut from: Streaming<CarrierBytes>, mut to: OwnedWriteHalf) -> Result<()> {
    while let Some(message) = from.message().await? {
        to.write_all(&message.data).await?;
    }
    to.shutdown().await?;
    Ok(())
}

#[derive(Clone)]
struct Called {
    relay: String,
}

impl NamedService for Called {
    const NAME: &'static str = "sidelane.tunnel.v1.Tunnel";
}

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl Service<http::Request<Body>> for Called {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let called = self.clone();
        Box::pin(async move {
            if request.uri().path() != METHOD {
                return Ok(Status::unimplemented("no such method").into_http());
            }
            let mut grpc = tonic::server::Grpc::new(ProstCodec::default());
            Ok(grpc.streaming(called, request).await)
        })
    }
}

impl StreamingService<CarrierBytes> for Called {
    type Response = CarrierBytes;
    type ResponseStream = ReceiverStream<Result<CarrierBytes, Status>>;
    type Future = BoxFuture<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<CarrierBytes>>) -> Self::Future {
        let relay = self.relay.clone();
        Box::pin(async move {
            let stream = TcpStream::connect(relay).await?;
            let (from, to) = stream.into_split();
            let (send, messages) = mpsc::channel(WAITING);
            tokio::spawn(read(from, send));
            tokio::spawn(write(request.into_inner(), to));
            Ok(Response::new(ReceiverStream::new(messages)))
        })
    }
}
