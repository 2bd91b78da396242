//! What a lane's TLS costs: a handshake in full and resumed, CPU of both ends together, and the
//! lane's batch from its slices to the records that leave. No sockets: round trips are not counted.

#![allow(missing_docs, reason = "a bench's names say what they measure")]

use std::io::{IoSlice, Write as _};
use std::sync::Arc;

use divan::Bencher;
use divan::counter::BytesCount;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, HandshakeKind, ServerConfig, ServerConnection};
use sidelane::config::tls::{
    Authorities, Certificate, ClientCertificates, ClientTls, ServerTls, TlsVersion, Trust,
};
use sidelane::tls::{Issued, Resolver, TUNNEL_ALPN, client_config, server_config};
use sidelane::tunnel::transport::TLS_BUFFER_BYTES;

/// As `drive` writes.
const SLICES: usize = 64;

fn main() {
    divan::main();
}

fn certificate() -> (Arc<Certificate>, Authorities) {
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(["relay.test".to_owned()]).expect("a name");
    let signed = params.self_signed(&key).expect("signed");
    let certificate = Certificate::from_pem("tls.crt", &signed.pem(), &key.serialize_pem());
    let authorities = Authorities::from_pem("tls.crt", &signed.pem()).expect("an authority");
    (Arc::new(certificate.expect("a certificate")), authorities)
}

/// `mutual`: the dialler shows a certificate too.
fn configs(mutual: bool) -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let (certificate, authorities) = certificate();
    let clients =
        ClientCertificates { authorities: authorities.clone(), required: false, forward: false };
    let server = ServerTls {
        certificates: vec![Arc::clone(&certificate)],
        acme: Vec::new(),
        min_version: TlsVersion::V1_2,
        clients: mutual.then_some(clients),
    };
    let resolver = Resolver::new(&server, Arc::new(Issued::default())).expect("a resolver");
    let server = server_config(&server, Arc::new(resolver), &[TUNNEL_ALPN]).expect("TLS");
    let client = ClientTls {
        trust: Trust::Authorities(authorities),
        server_name: None,
        certificate: mutual.then_some(certificate),
    };
    (Arc::new(client_config(&client, &[TUNNEL_ALPN]).expect("TLS")), Arc::new(server))
}

fn begin(
    client: &Arc<ClientConfig>,
    server: &Arc<ServerConfig>,
) -> (ClientConnection, ServerConnection) {
    let name = ServerName::try_from("relay.test").expect("a name");
    let mut client = ClientConnection::new(Arc::clone(client), name).expect("TLS");
    let mut server = ServerConnection::new(Arc::clone(server)).expect("TLS");
    client.set_buffer_limit(Some(TLS_BUFFER_BYTES));
    server.set_buffer_limit(Some(TLS_BUFFER_BYTES));
    (client, server)
}

/// Carries what either end has to say until neither has; tickets too.
fn shake_hands(client: &mut ClientConnection, server: &mut ServerConnection) {
    let mut wire = Vec::new();
    while client.wants_write() || server.wants_write() {
        wire.clear();
        client.write_tls(&mut wire).expect("memory");
        let mut rest = &wire[..];
        while !rest.is_empty() {
            server.read_tls(&mut rest).expect("memory");
            server.process_new_packets().expect("TLS");
        }
        wire.clear();
        server.write_tls(&mut wire).expect("memory");
        let mut rest = &wire[..];
        while !rest.is_empty() {
            client.read_tls(&mut rest).expect("memory");
            client.process_new_packets().expect("TLS");
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
}

fn handshake(bencher: Bencher<'_, '_>, mutual: bool, kind: HandshakeKind) {
    let (fresh, server) = configs(mutual);
    let bencher = bencher.with_inputs(|| {
        let client = match kind {
            // Remembers nothing.
            HandshakeKind::Full => {
                let mut client = ClientConfig::clone(&fresh);
                client.resumption = rustls::client::Resumption::disabled();
                Arc::new(client)
            }
            _ => Arc::clone(&fresh),
        };
        if kind == HandshakeKind::Resumed {
            // A ticket is taken once: a fresh one each time.
            let (mut client, mut server) = begin(&client, &server);
            shake_hands(&mut client, &mut server);
        }
        begin(&client, &server)
    });
    bencher.bench_local_refs(|(client, server)| {
        shake_hands(client, server);
        assert_eq!(client.handshake_kind(), Some(kind));
    });
}

#[divan::bench(args = [false, true])]
fn full(bencher: Bencher<'_, '_>, mutual: bool) {
    handshake(bencher, mutual, HandshakeKind::Full);
}

#[divan::bench(args = [false, true])]
fn resumed(bencher: Bencher<'_, '_>, mutual: bool) {
    handshake(bencher, mutual, HandshakeKind::Resumed);
}

/// Copied once, from the slices into the records that are encrypted in place. `limit` is rustls's own
/// or ours: the calls that a batch takes.
#[divan::bench(args = [64 * 1024, TLS_BUFFER_BYTES])]
fn batch(bencher: Bencher<'_, '_>, limit: usize) {
    let (client, server) = configs(false);
    let (mut client, mut server) = begin(&client, &server);
    shake_hands(&mut client, &mut server);
    client.set_buffer_limit(Some(limit));
    let batch = vec![7; TLS_BUFFER_BYTES];
    let mut wire = Vec::with_capacity(2 * TLS_BUFFER_BYTES);
    bencher.counter(BytesCount::new(batch.len())).bench_local(|| {
        let mut sent = 0;
        while sent < batch.len() {
            let slices: Vec<IoSlice<'_>> =
                batch[sent..].chunks(TLS_BUFFER_BYTES / SLICES).map(IoSlice::new).collect();
            sent += client.writer().write_vectored(&slices).expect("memory");
            wire.clear();
            while client.wants_write() {
                client.write_tls(&mut wire).expect("memory");
            }
        }
        wire.len()
    });
}

/// The same bytes copied once: what cannot be less.
#[divan::bench]
fn batch_copied(bencher: Bencher<'_, '_>) {
    let batch = vec![7u8; TLS_BUFFER_BYTES];
    let mut wire = Vec::with_capacity(2 * TLS_BUFFER_BYTES);
    bencher.counter(BytesCount::new(batch.len())).bench_local(|| {
        wire.clear();
        for chunk in batch.chunks(TLS_BUFFER_BYTES / SLICES) {
            wire.extend_from_slice(divan::black_box(chunk));
        }
        wire.len()
    });
}
