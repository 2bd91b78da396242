//! The echo service.

use std::net::SocketAddr;

use anyhow::{Result, bail, ensure};
use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tungstenite::handshake::derive_accept_key;

use super::{
    HEAD_BYTES_MAX, OPCODE_CLOSE, OPCODE_PING, OPCODE_PONG, READ_BYTES, apply, frame, head_length,
    header, put_head,
};

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

async fn connection(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut inbox = BytesMut::new();
    if !handshake(&mut stream, &mut inbox).await? {
        return Ok(());
    }
    // Both are given back while nothing comes: thousands of connections may be idle.
    let mut out = Vec::new();
    loop {
        out.clear();
        let ended = answer(&mut inbox, &mut out)?;
        if !out.is_empty() {
            stream.write_all(&out).await?;
        }
        if ended {
            return Ok(());
        }
        if inbox.is_empty() {
            inbox = BytesMut::new();
            out = Vec::new();
            stream.readable().await?;
        }
        inbox.reserve(READ_BYTES);
        if stream.read_buf(&mut inbox).await? == 0 {
            return Ok(());
        }
    }
}

/// Reads a request and answers it; returns whether it became a WebSocket.
async fn handshake(stream: &mut TcpStream, inbox: &mut BytesMut) -> Result<bool> {
    let length = loop {
        if let Some(length) = head_length(inbox) {
            break length;
        }
        ensure!(inbox.len() < HEAD_BYTES_MAX, "a head beyond {HEAD_BYTES_MAX} bytes");
        if stream.read_buf(inbox).await? == 0 {
            return Ok(false);
        }
    };
    let head = inbox.split_to(length);
    let head = str::from_utf8(&head)?;
    let Some(key) = header(head, "Sec-WebSocket-Key") else {
        // Whoever asks whether this service stands.
        let text = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n";
        stream.write_all(text).await?;
        return Ok(false);
    };
    let accept = derive_accept_key(key.as_bytes());
    let text = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
    );
    stream.write_all(text.as_bytes()).await?;
    Ok(true)
}

/// Answers all frames that are there whole; returns whether one of them was a close.
fn answer(inbox: &mut BytesMut, out: &mut Vec<u8>) -> Result<bool> {
    while let Some(found) = frame(inbox)? {
        let Some(mask) = found.mask else { bail!("a client's frame without a mask") };
        let opcode = if found.opcode == OPCODE_PING { OPCODE_PONG } else { found.opcode };
        if opcode != OPCODE_PONG || found.opcode == OPCODE_PING {
            put_head(out, found.fin, opcode, found.end - found.payload, None);
            let start = out.len();
            out.extend_from_slice(&inbox[found.payload..found.end]);
            apply(mask, &mut out[start..]);
        }
        inbox.advance(found.end);
        if opcode == OPCODE_CLOSE {
            return Ok(true);
        }
    }
    Ok(false)
}
