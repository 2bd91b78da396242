//! The clients.

use std::collections::VecDeque;
use std::io::Read;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout_at;
use tungstenite::handshake::derive_accept_key;

use super::{
    HEAD_BYTES_MAX, MASK, OPCODE_BINARY, READ_BYTES, apply, frame, head_length, header, put_head,
};
use crate::Load;
use crate::tally::{GRACE, Tally, wait_for_line};

/// Any 16 bytes in base64 will do for peers that are ours.
const KEY: &str = "c2lkZWxhbmUtYmVuY2hfXw==";
/// Handshakes at once: enough to hide their latency, below any backlog.
const OPENING_MAX: usize = 64;
/// Shortest message: connection and number, four bytes each.
const MESSAGE_BYTES_MIN: usize = 8;

/// Keeps `in_flight` frames on their way on each connection.
pub(crate) async fn run(load: &Load, in_flight: u32) -> Result<()> {
    let sockets = open(load).await?;
    let (sockets, warm) = drive(sockets, load, in_flight, Instant::now() + load.warm_up).await?;
    ensure!(warm.errors == 0, "{} connections failed while warming up", warm.errors);
    wait_for_line()?;
    let start = Instant::now();
    let (_, tally) = drive(sockets, load, in_flight, start + load.seconds).await?;
    tally.print(start.elapsed());
    Ok(())
}

/// Opens all connections, one echo on each, and keeps them until standard input ends.
pub(crate) async fn idle(load: &Load) -> Result<()> {
    let sockets = open(load).await?;
    println!("open {}", sockets.len());
    // Blocks the only thread: idle connections need none.
    let mut rest = Vec::new();
    std::io::stdin().lock().read_to_end(&mut rest)?;
    drop(sockets);
    Ok(())
}

async fn open(load: &Load) -> Result<Vec<Socket>> {
    ensure!(load.bytes >= MESSAGE_BYTES_MIN, "a message has {MESSAGE_BYTES_MIN} bytes or more");
    let mut opening = JoinSet::new();
    let mut sockets = Vec::with_capacity(load.connections);
    for id in 0..u32::try_from(load.connections)? {
        if opening.len() == OPENING_MAX {
            sockets.push(joined(opening.join_next().await)?);
        }
        opening.spawn(Socket::open(load.clone(), id));
    }
    while !opening.is_empty() {
        sockets.push(joined(opening.join_next().await)?);
    }
    Ok(sockets)
}

fn joined<T>(outcome: Option<Result<Result<T>, tokio::task::JoinError>>) -> Result<T> {
    outcome.context("no task")??
}

/// Runs all connections until `until`, then until nothing is in flight.
async fn drive(
    sockets: Vec<Socket>,
    load: &Load,
    in_flight: u32,
    until: Instant,
) -> Result<(Vec<Socket>, Tally)> {
    let mut running = JoinSet::new();
    for mut socket in sockets {
        let bytes = load.bytes;
        running.spawn(async move {
            let mut tally = Tally::default();
            let echoes = socket.echo(bytes, in_flight, Some(until), &mut tally);
            let outcome = timeout_at((until + GRACE).into(), echoes).await;
            if let Err(error) = outcome.context("no echo").flatten() {
                tally.error(&error.context(format!("connection {}", socket.id)));
            }
            (socket, tally)
        });
    }
    let (mut sockets, mut sum) = (Vec::new(), Tally::default());
    while let Some(joined) = running.join_next().await {
        let (socket, tally) = joined?;
        sockets.push(socket);
        sum.add(tally);
    }
    Ok((sockets, sum))
}

struct Socket {
    id: u32,
    stream: TcpStream,
    inbox: BytesMut,
    /// Number of the next message to send, and of the next that must come back.
    next: u32,
    expected: u32,
}

impl Socket {
    async fn open(load: Load, id: u32) -> Result<Self> {
        let opened = async {
            let stream = TcpStream::connect(load.target).await?;
            stream.set_nodelay(true)?;
            let mut socket = Self { id, stream, inbox: BytesMut::new(), next: 0, expected: 0 };
            socket.handshake(&load.host).await?;
            // Each connection carries something before it counts as open.
            socket.echo(load.bytes, 1, None, &mut Tally::default()).await?;
            socket.inbox = BytesMut::new();
            Ok(socket)
        };
        let opened = tokio::time::timeout(GRACE, opened).await;
        opened.context("no answer").flatten().with_context(|| format!("opening connection {id}"))
    }

    async fn handshake(&mut self, host: &str) -> Result<()> {
        let request = format!(
            "GET / HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        );
        self.stream.write_all(request.as_bytes()).await?;
        let length = loop {
            if let Some(length) = head_length(&self.inbox) {
                break length;
            }
            ensure!(self.inbox.len() < HEAD_BYTES_MAX, "a head beyond {HEAD_BYTES_MAX} bytes");
            ensure!(self.stream.read_buf(&mut self.inbox).await? > 0, "closed in the handshake");
        };
        let head = self.inbox.split_to(length);
        let head = str::from_utf8(&head)?;
        ensure!(
            head.starts_with("HTTP/1.1 101 "),
            "refused: {}",
            head.lines().next().unwrap_or("")
        );
        let accept = derive_accept_key(KEY.as_bytes());
        ensure!(header(head, "Sec-WebSocket-Accept") == Some(&accept), "not the accept of our key");
        Ok(())
    }

    /// Keeps `in_flight` messages on their way until `until` (without it: sends each once), and
    /// ends when all have come back.
    async fn echo(
        &mut self,
        bytes: usize,
        in_flight: u32,
        until: Option<Instant>,
        tally: &mut Tally,
    ) -> Result<()> {
        let mut sent = VecDeque::with_capacity(in_flight as usize);
        let mut out = Vec::new();
        let mut due = in_flight;
        loop {
            if due > 0 {
                out.clear();
                let now = Instant::now();
                for _ in 0..due {
                    self.put_message(&mut out, bytes);
                    sent.push_back(now);
                }
                self.stream.write_all(&out).await?;
            }
            if sent.is_empty() {
                return Ok(());
            }
            self.inbox.reserve(READ_BYTES);
            ensure!(self.stream.read_buf(&mut self.inbox).await? > 0, "closed");
            let mut came = 0;
            while self.take_message(bytes)? {
                let since = sent.pop_front().context("an echo of nothing")?;
                tally.latency(since);
                came += 1;
            }
            tally.operations += u64::from(came);
            due = if until.is_some_and(|until| Instant::now() < until) { came } else { 0 };
        }
    }

    fn put_message(&mut self, out: &mut Vec<u8>, bytes: usize) {
        put_head(out, true, OPCODE_BINARY, bytes, Some(MASK));
        let start = out.len();
        out.extend_from_slice(&self.id.to_be_bytes());
        out.extend_from_slice(&self.next.to_be_bytes());
        out.resize(start + bytes, b'x');
        apply(MASK, &mut out[start..]);
        self.next = self.next.wrapping_add(1);
    }

    /// Takes the next echo, and verifies that it is the next; `false` where it is not there whole.
    fn take_message(&mut self, bytes: usize) -> Result<bool> {
        let Some(found) = frame(&self.inbox)? else { return Ok(false) };
        let payload = &self.inbox[found.payload..found.end];
        if !found.fin || found.opcode != OPCODE_BINARY || found.mask.is_some() {
            bail!("opcode {:#x}, {} bytes: {payload:x?}", found.opcode, payload.len());
        }
        ensure!(payload.len() == bytes, "{} bytes for {bytes}", payload.len());
        let (id, rest) = payload.split_at(4);
        ensure!(id == self.id.to_be_bytes(), "the echo of another connection: {id:x?}");
        let (number, rest) = rest.split_at(4);
        ensure!(number == self.expected.to_be_bytes(), "out of order: {number:x?}");
        ensure!(rest.iter().all(|byte| *byte == b'x'), "other bytes than were sent");
        self.expected = self.expected.wrapping_add(1);
        self.inbox.advance(found.end);
        Ok(true)
    }
}
