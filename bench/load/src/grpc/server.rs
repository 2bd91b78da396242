//! The service.

use std::future::poll_fn;
use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, Response};
use tokio::net::{TcpListener, TcpStream};

use super::{
    CONNECTION_WINDOW, PREFIX_BYTES, STREAM_PATH, STREAM_WINDOW, UNARY_PATH, message, number,
    take_message,
};

/// Streams of one connection: all calls of a load may come over one.
const STREAMS_MAX: u32 = 1024;
/// Bytes that a stream asks room for at once: some dozens of messages.
const RESERVE_BYTES: usize = 8 * 1024;

/// Serves until it is killed; says where it listens.
pub(crate) async fn serve(listen: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(listen).await?;
    println!("listening {}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            if let Err(error) = connection(stream).await {
                eprintln!("connection: {error:#}");
            }
        });
    }
}

async fn connection(stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut connection = h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(STREAMS_MAX)
        .handshake(stream)
        .await?;
    while let Some(accepted) = connection.accept().await {
        let (request, respond) = accepted?;
        tokio::spawn(async move {
            if let Err(error) = answer(request, respond).await {
                eprintln!("call: {error:#}");
            }
        });
    }
    Ok(())
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Result<()> {
    let (head, mut body) = request.into_parts();
    let mut inbox = BytesMut::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        inbox.extend_from_slice(&data);
    }
    let mut response = Response::new(());
    response
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let mut stream = respond.send_response(response, false)?;
    match head.uri.path() {
        // The message as it came, its prefix included.
        UNARY_PATH => stream.send_data(inbox.freeze(), false)?,
        STREAM_PATH => {
            let message = take_message(&mut inbox).context("no message")?;
            let count = number(&message).context("no number of messages")?;
            send_messages(&mut stream, count, message.len()).await?;
        }
        path => bail!("nothing at {path}"),
    }
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    stream.send_trailers(trailers)?;
    Ok(())
}

/// Sends numbered messages, a DATA frame each, as the windows allow.
async fn send_messages(stream: &mut SendStream<Bytes>, count: u32, bytes: usize) -> Result<()> {
    let mut capacity = 0;
    for number in 0..count {
        while capacity < PREFIX_BYTES + bytes {
            stream.reserve_capacity((PREFIX_BYTES + bytes).max(RESERVE_BYTES));
            capacity =
                poll_fn(|cx| stream.poll_capacity(cx)).await.context("the stream ended")??;
        }
        stream.send_data(message(number, bytes), false)?;
        capacity -= PREFIX_BYTES + bytes;
    }
    Ok(())
}
