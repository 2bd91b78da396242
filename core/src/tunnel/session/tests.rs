use std::net::{IpAddr, Ipv4Addr};

use super::*;
use crate::config::credentials::Claims;
use crate::credentials::Proof;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn settings() -> Settings {
    Settings {
        sessions_max: 2,
        sessions_of_principal_max: 2,
        lanes_max: 2,
        lane: LaneConfig::default(),
        grace: Duration::ZERO,
        advertise: None,
        protocols: vec!["HTTP".into()],
        peers: Vec::new(),
    }
}

fn hello(instance: u8) -> proto::Hello {
    proto::Hello {
        version: sidelane_tunnel::VERSION,
        instance: vec![instance; INSTANCE_BYTES].into(),
        window: 65536,
        message_bytes_max: 128 * 1024,
        ..proto::Hello::default()
    }
}

fn authenticated(principal: &str) -> Authenticated {
    let grant = Grant { principal: principal.into(), claims: Claims::everything() };
    Authenticated { grant: Arc::new(grant), proof: Proof::Loopback, expires: None }
}

fn admit(
    sessions: &Sessions,
    hello: &proto::Hello,
    peer: IpAddr,
) -> Result<Admitted, proto::Refuse> {
    let known = authenticated("p");
    let shard_of = |_: &SessionId, lane| lane as usize;
    let admitted = sessions.admit(hello, known, SocketAddr::new(peer, 4711), shard_of)?;
    admitted.link.pretend_open();
    Ok(admitted)
}

fn reason(result: Result<Admitted, proto::Refuse>) -> proto::RefuseReason {
    result.expect_err("refused").reason()
}

#[test]
fn a_further_lane_needs_the_sessions_secret() {
    let sessions = Sessions::new(settings());
    let first = admit(&sessions, &hello(1), LOOPBACK).unwrap();
    let mut further = hello(1);
    further.session = first.welcome.session.clone();
    further.secret = vec![0; 32].into();
    assert_eq!(reason(admit(&sessions, &further, LOOPBACK)), proto::RefuseReason::UnknownSession);
    further.secret = first.welcome.secret.clone();
    let second = admit(&sessions, &further, LOOPBACK).unwrap();
    assert!(Arc::ptr_eq(&first.session, &second.session));
    assert_eq!(second.link.number, 1);
    assert_eq!(reason(admit(&sessions, &further, LOOPBACK)), proto::RefuseReason::Overloaded);
}

#[test]
fn a_newer_session_replaces_the_instances_older_one() {
    let sessions = Sessions::new(settings());
    let old = admit(&sessions, &hello(1), LOOPBACK).unwrap();
    let new = admit(&sessions, &hello(1), LOOPBACK).unwrap();
    assert!(Arc::ptr_eq(&new.replaced.expect("replaced"), &old.session));
    assert!(new.session.epoch > old.session.epoch);
    assert!(sessions.lane_ended(&old.session, &old.link));
    assert_eq!(sessions.len(), 1);
    assert!(sessions.lane_ended(&new.session, &new.link));
    assert!(sessions.is_empty());
    assert!(sessions.by_instance.is_empty());
}

#[test]
fn a_session_that_its_sidecar_holds_is_not_replaced() {
    let sessions = Sessions::new(settings());
    let ours = || sessions.instance.to_vec().into();
    let held = |held| proto::Hello { held, ..hello(1) };
    let other = vec![9; INSTANCE_BYTES].into();
    // None is there yet, or it is another relay's.
    let first = admit(&sessions, &held(vec![ours()]), LOOPBACK).unwrap();
    let refuse = admit(&sessions, &held(vec![other, ours()]), LOOPBACK).expect_err("refused");
    assert_eq!(refuse.reason(), proto::RefuseReason::Held);
    assert_eq!(refuse.relay_instance, ours());
    assert_eq!((sessions.len(), first.session.is_over()), (1, false));
    let other = vec![9; INSTANCE_BYTES].into();
    let second = admit(&sessions, &held(vec![other]), LOOPBACK).unwrap();
    assert!(second.replaced.is_some());
    assert!(sessions.lane_ended(&first.session, &first.link));
    assert!(sessions.lane_ended(&second.session, &second.link));
    // What has ended is held by nobody, whatever its sidecar knows.
    assert!(admit(&sessions, &held(vec![ours()]), LOOPBACK).is_ok());
}

#[test]
fn an_instance_and_a_session_are_their_principals() {
    let sessions = Sessions::new(settings());
    let first = admit(&sessions, &hello(1), LOOPBACK).unwrap();
    let by = |hello: &proto::Hello, principal: &str| {
        let peer = SocketAddr::new(LOOPBACK, 4711);
        sessions.admit(hello, authenticated(principal), peer, |_, lane| lane as usize)
    };
    assert_eq!(reason(by(&hello(1), "other")), proto::RefuseReason::Credential);
    assert_eq!(sessions.len(), 1);
    let mut further = hello(1);
    further.session = first.welcome.session.clone();
    further.secret = first.welcome.secret.clone();
    assert_eq!(reason(by(&further, "other")), proto::RefuseReason::UnknownSession);
    // A session that was revoked ends: nobody joins it, and it is in nobody's way.
    let grant = first.session.grant();
    assert!(first.session.is_granted(&grant));
    first.session.regrant(|_| Err("withdrawn")).unwrap_err();
    assert!(first.session.is_revoked() && !first.session.is_granted(&grant));
    assert_eq!(first.session.grant().claims, Claims::default());
    assert_eq!(reason(by(&further, "p")), proto::RefuseReason::UnknownSession);
    by(&hello(1), "other").unwrap();
}

#[test]
fn a_session_whose_last_lane_has_ended_takes_no_other() {
    let sessions = Sessions::new(settings());
    let first = admit(&sessions, &hello(1), LOOPBACK).unwrap();
    assert!(sessions.lane_ended(&first.session, &first.link));
    // As a dialler that was found to be its own just before.
    let refused = sessions.add_lane(&settings(), &first.session, |_, _| 0);
    assert_eq!(refused.expect_err("refused").reason(), proto::RefuseReason::UnknownSession);
    assert!(first.session.lanes().is_empty());
}

#[test]
fn names_are_shown_on_one_line() {
    let forged = "x\n2026-01-01T00:00:00Z ERROR forged\u{1b}[2J";
    assert!(!shown_name(forged).contains(char::is_control));
    assert_eq!(&*shown_name("laptop"), "laptop");
    assert_ne!(&*shown_name("file"), "file");
    assert!(shown_name(&"é".repeat(1000)).len() <= NAME_BYTES_MAX);
}

#[test]
fn a_session_has_no_more_exchanges_than_its_limit_over_all_lanes() {
    let mut settings = settings();
    settings.lane.exchanges_max = 2;
    let sessions = Sessions::new(settings);
    let first = admit(&sessions, &hello(1), LOOPBACK).unwrap();
    let mut further = hello(1);
    further.session = first.welcome.session.clone();
    further.secret = first.welcome.secret.clone();
    admit(&sessions, &further, LOOPBACK).unwrap();
    let metrics = crate::metrics::Metrics::new();
    let open = || {
        let flow = crate::metrics::Flows::new("relay").of(&metrics, &"HTTP".into());
        first.session.open(None, 1, proto::Open::default(), flow)
    };
    let held = [open().map(drop), open().map(drop)];
    assert!(held.iter().all(Result::is_ok), "halves that are dropped free their place");
    let _held = (open().unwrap(), open().unwrap());
    assert_eq!(open().map(drop), Err(OpenError::Overloaded));
}

#[test]
fn a_refused_hello_leaves_no_session_behind() {
    let mut settings = settings();
    settings.protocols = vec!["HTTP".into(), "no name".into()];
    let sessions = Sessions::new(settings);
    assert_eq!(reason(admit(&sessions, &hello(1), LOOPBACK)), proto::RefuseReason::Malformed);
    assert!(sessions.is_empty());
}

#[test]
fn an_exchange_goes_to_another_lane_where_one_is_leaving() {
    let sessions = Sessions::new(settings());
    let first = admit(&sessions, &hello(1), LOOPBACK).unwrap();
    let mut further = hello(1);
    further.session = first.welcome.session.clone();
    further.secret = first.welcome.secret.clone();
    let second = admit(&sessions, &further, LOOPBACK).unwrap();
    let metrics = crate::metrics::Metrics::new();
    let open = || {
        let flow = crate::metrics::Flows::new("relay").of(&metrics, &"HTTP".into());
        first.session.open(Some(0), 1, proto::Open::default(), flow)
    };
    // As the driver of the lane on this thread leaves it, before it has said so.
    first.link.with(|lane| lane.go_away(proto::GoAway::default()));
    assert!(first.link.is_open());
    let (_, _send, _recv, is_crossing) = open().expect("the other lane takes it");
    assert!(is_crossing && second.link.load() == 1 && !first.link.is_open());
    second.link.with(|lane| lane.go_away(proto::GoAway::default()));
    assert_eq!(open().map(drop), Err(OpenError::Closed));
}

#[test]
fn one_principal_leaves_sessions_for_others() {
    let sessions = Sessions::new(Settings { sessions_max: 4, ..settings() });
    let _held = (admit(&sessions, &hello(1), LOOPBACK), admit(&sessions, &hello(2), LOOPBACK));
    let peer = SocketAddr::new(LOOPBACK, 4711);
    let by = |instance, principal| {
        sessions.admit(&hello(instance), authenticated(principal), peer, |_, lane| lane as usize)
    };
    let refuse = by(3, "p").expect_err("it has as many as one may");
    assert_eq!(refuse.reason(), proto::RefuseReason::Overloaded);
    assert!(refuse.detail.contains("principal p has 2 sessions"), "{}", refuse.detail);
    // A sidecar that is back before its old session is gone replaces that.
    assert!(by(2, "p").expect("its own place").replaced.is_some());
    assert!(by(3, "q").is_ok());
}

#[test]
fn sessions_are_bounded() {
    let sessions = Sessions::new(settings());
    let _held = (admit(&sessions, &hello(1), LOOPBACK), admit(&sessions, &hello(2), LOOPBACK));
    assert_eq!(reason(admit(&sessions, &hello(3), LOOPBACK)), proto::RefuseReason::Overloaded);
}
