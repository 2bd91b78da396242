use std::net::{Ipv4Addr, SocketAddr};

use sidelane_tunnel::LaneConfig;

use super::*;
use crate::config::credentials::Claims;
use crate::credentials::{Grant, Proof};
use crate::tunnel::session::{Admitted, Settings};

fn authenticated(principal: &str) -> Authenticated {
    let grant = Grant { principal: principal.into(), claims: Claims::everything() };
    Authenticated { grant: Arc::new(grant), proof: Proof::Loopback, expires: None }
}

fn sessions() -> Sessions {
    let sessions = Sessions::new(Settings {
        sessions_max: 2,
        sessions_of_principal_max: 2,
        lanes_max: 2,
        lane: LaneConfig::default(),
        grace: Duration::ZERO,
        advertise: None,
        peers: Vec::new(),
        protocols: vec!["HTTP".into()],
    });
    sessions.dedicate(&Arc::new(Metrics::new()), Duration::from_secs(1));
    sessions
}

fn begin(sessions: &Sessions, features: u64) -> Admitted {
    let hello = proto::Hello {
        version: sidelane_tunnel::VERSION,
        features,
        instance: vec![7; 16].into(),
        window: 65536,
        message_bytes_max: 128 * 1024,
        ..proto::Hello::default()
    };
    let peer = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 4711);
    sessions.admit(&hello, authenticated("p"), peer, |_, lane| lane as usize).unwrap()
}

fn dedicated(of: &Admitted) -> proto::Hello {
    proto::Hello {
        session: of.welcome.session.clone(),
        secret: of.welcome.secret.clone(),
        relay_instance: of.welcome.relay_instance.clone(),
        dedicated: true,
        ..proto::Hello::default()
    }
}

fn refused(
    sessions: &Sessions,
    hello: &proto::Hello,
    principal: &str,
) -> (proto::RefuseReason, String) {
    let refuse = sessions.admit_dedicated(hello, &authenticated(principal)).err().unwrap();
    (refuse.reason(), refuse.detail)
}

#[test]
fn only_the_sessions_own_sidecar_has_connections_wait_for_it() {
    let sessions = sessions();
    let admitted = begin(&sessions, FEATURE_DEDICATED);
    assert_ne!(admitted.welcome.features & FEATURE_DEDICATED, 0);
    let hello = dedicated(&admitted);
    let (session, seat, _) = sessions.admit_dedicated(&hello, &authenticated("p")).unwrap();
    assert!(Arc::ptr_eq(&session, &admitted.session));
    assert_eq!(session.pool().unwrap().len(), 1);
    drop(seat);
    assert!(session.pool().unwrap().is_empty());

    let unknown = proto::RefuseReason::UnknownSession;
    assert_eq!(refused(&sessions, &hello, "other").0, unknown);
    let mut wrong = hello.clone();
    wrong.secret = vec![0; 32].into();
    assert_eq!(refused(&sessions, &wrong, "p").0, unknown);
    let mut wrong = hello.clone();
    wrong.relay_instance = vec![0; 16].into();
    assert_eq!(refused(&sessions, &wrong, "p").0, proto::RefuseReason::WrongRelay);
    assert!(session.pool().unwrap().is_empty());
}

#[test]
fn a_session_whose_hello_did_not_ask_has_none() {
    let sessions = sessions();
    let admitted = begin(&sessions, 0);
    assert_eq!(admitted.welcome.features & FEATURE_DEDICATED, 0);
    let (reason, detail) = refused(&sessions, &dedicated(&admitted), "p");
    assert_eq!(reason, proto::RefuseReason::Malformed);
    assert!(detail.contains("bit 4"), "{detail}");
}

#[test]
fn so_many_wait_and_no_more() {
    let sessions = sessions();
    let admitted = begin(&sessions, FEATURE_DEDICATED);
    let hello = dedicated(&admitted);
    let enter = || sessions.admit_dedicated(&hello, &authenticated("p"));
    let mut seats: Vec<_> = (0..WAITING_PER_SESSION_MAX).map(|_| enter().unwrap()).collect();
    let (reason, detail) = refused(&sessions, &hello, "p");
    assert_eq!(reason, proto::RefuseReason::Overloaded);
    assert!(detail.starts_with("64 dedicated connections of the session wait"), "{detail}");
    seats.pop();
    seats.push(enter().unwrap());
    assert_eq!(refused(&sessions, &hello, "p").0, proto::RefuseReason::Overloaded);
}

#[test]
fn a_session_that_is_over_or_revoked_takes_none() {
    let sessions = sessions();
    let admitted = begin(&sessions, FEATURE_DEDICATED);
    let hello = dedicated(&admitted);
    let enter = || sessions.admit_dedicated(&hello, &authenticated("p"));
    let (session, seat, _) = enter().unwrap();
    session.revoke_lanes("withdrawn");
    assert!(session.pool().unwrap().is_empty());
    assert!(enter().is_err());
    drop(seat);
    sessions.lane_ended(&admitted.session, &admitted.link);
    assert!(enter().is_err());
}
