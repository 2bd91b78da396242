use std::future::poll_fn;
use std::net::SocketAddr;

use sha2::{Digest as _, Sha256};
use sidelane_abi::failure;
use sidelane_tunnel::proto;

use super::*;
use crate::config;
use crate::credentials::Authenticated;
use crate::metrics::{Flows, Metrics};
use crate::plugin::lend::{Received, RecvHalf as _};
use crate::plugin::{HostContext, Limits, Plugins};
use crate::relay::lanes;
use crate::router::{self, Query};
use crate::tunnel::RecvHalf;
use crate::tunnel::session::Admitted;

/// A relay's section whose principals are known by these tokens and may claim what is named as they.
fn section(principals: &[(&str, &str)]) -> config::Relay {
    let mut yaml = "version: 1\nrelay:\n  base_domains: [example.org]\n  credentials:\n".to_owned();
    for (name, token) in principals {
        let hash: String = Sha256::digest(token).iter().map(|byte| format!("{byte:02x}")).collect();
        yaml += &format!(
            "    - {{ principal: {name}, tokens: [\"sha256:{hash}\"], subdomains: [{name}], tunnels: [{name}] }}\n"
        );
    }
    let source = config::Source::from_text("relay.yaml".as_ref(), &yaml);
    let config = config::parse(&source, &|_| None).expect("a valid file");
    config.relay.expect("a relay")
}

const BOTH: &[(&str, &str)] =
    &[("shop", "shop-token-of-16-bytes"), ("bank", "bank-token-of-16-bytes")];

fn relay() -> Arc<Relay> {
    let metrics = Arc::new(Metrics::new());
    let plugins = Arc::new(Plugins::new(HostContext::new(metrics.sink()), Limits::default()));
    Relay::new(&section(BOTH), plugins, metrics)
}

async fn known(relay: &Relay, token: &str) -> Result<Authenticated, AuthError> {
    let local = [127, 0, 0, 1].into();
    let presented = Presented { credential: token.as_bytes(), chain: &[], peer: local, local };
    relay.authenticator.authenticate(presented).await
}

fn hello(instance: u8) -> proto::Hello {
    proto::Hello {
        version: sidelane_tunnel::VERSION,
        instance: vec![instance; 16].into(),
        window: 65536,
        message_bytes_max: 128 * 1024,
        ..proto::Hello::default()
    }
}

fn admit_by(relay: &Relay, hello: &proto::Hello, known: Authenticated) -> Admitted {
    let peer = SocketAddr::from(([127, 0, 0, 1], 4711));
    let admitted = relay.sessions.admit(hello, known, peer, |_, _| 0).expect("let in");
    admitted.link.pretend_open();
    admitted
}

fn admit(relay: &Relay, instance: u8, known: Authenticated) -> Arc<Session> {
    admit_by(relay, &hello(instance), known).session
}

/// A session that serves what is named as its principal.
async fn serving(relay: &Relay, instance: u8, name: &str, token: &str) -> Arc<Session> {
    let session = admit(relay, instance, known(relay, token).await.expect("known"));
    let announced = relay.announce(&session, &announce(name));
    assert!(announced.accepted, "{:?}", announced.reasons);
    session
}

fn announce(name: &str) -> proto::Announce {
    proto::Announce {
        version: 1,
        tunnels: vec![proto::AnnouncedTunnel {
            name: name.to_owned(),
            ..proto::AnnouncedTunnel::default()
        }],
        routes: vec![proto::AnnouncedRoute {
            name: name.to_owned(),
            subdomain: name.to_owned(),
            tunnel: name.to_owned(),
            ..proto::AnnouncedRoute::default()
        }],
    }
}

fn is_routed(relay: &Relay, name: &str) -> bool {
    let host = format!("{name}.example.org");
    let query = Query { host: Some(&host), path: "/", listener: "web", protocol_type: "HTTP" };
    let routing = relay.routing.load();
    let granted =
        routing.tunnel(name).is_some_and(|tunnel| tunnel.all().iter().any(|s| s.is_granted()));
    assert_eq!(router::find(&routing.table, &query).is_some(), granted);
    granted
}

fn open(relay: &Relay, session: &Session) -> RecvHalf {
    let flow = Flows::new("relay").of(&relay.metrics, &"HTTP".into());
    let (_, send, recv, _) =
        session.open(None, 1, proto::Open::default(), flow).expect("an exchange");
    // Dropped, it would end the exchange by itself.
    std::mem::forget(send);
    recv
}

fn metric(relay: &Relay, line: &str) -> bool {
    let mut text = String::new();
    relay.metrics.encode(&mut text);
    text.lines().any(|other| other == line)
}

#[tokio::test]
async fn a_session_whose_last_lane_is_never_driven_leaves_no_routes_in_force() {
    let relay = relay();
    let by = async || known(&relay, BOTH[0].1).await.expect("known");
    let first = admit_by(&relay, &hello(1), by().await);
    assert!(relay.announce(&first.session, &announce("shop")).accepted);
    let mut further = hello(1);
    further.session = first.welcome.session.clone();
    further.secret = first.welcome.secret.clone();
    let second = admit_by(&relay, &further, by().await);
    // Its other lanes end while the welcome is on its way, which then cannot be written.
    assert!(!relay.sessions.lane_ended(&first.session, &first.link));
    lanes::not_driven(&relay, &second.session, &second.link, second.is_first);
    assert_eq!(relay.sessions(), 0);
    let sources = relay.lock_sources();
    assert_eq!((sources.documents.len(), sources.lost.len()), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn of_documents_that_come_at_once_the_first_and_the_last_are_looked_at() {
    let relay = relay();
    let known = known(&relay, BOTH[0].1).await.expect("known");
    let shop = admit_by(&relay, &hello(1), known);
    let version = || relay.lock_sources().documents.get(&1).map(|document| document.version);
    for number in 1..1000 {
        let document = proto::Announce { version: number, ..announce("shop") };
        relay.announced(&shop.session, document);
        assert_eq!(version(), Some(1), "the first at once");
    }
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(version(), Some(999));
    assert!(metric(&relay, "sidelane_announcements_total{result=\"accepted\"} 2"));
    // One that waited when the session ended comes into force never.
    for number in 1000..1002 {
        relay.announced(&shop.session, proto::Announce { version: number, ..announce("shop") });
    }
    assert!(relay.sessions.lane_ended(&shop.session, &shop.link));
    relay.session_ended(&shop.session);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(version(), None);
}

#[tokio::test]
async fn a_withdrawn_token_ends_its_session_its_exchanges_and_its_routes() {
    let relay = relay();
    let shop = serving(&relay, 1, "shop", BOTH[0].1).await;
    let bank = serving(&relay, 2, "bank", BOTH[1].1).await;
    let mut exchange = open(&relay, &shop);
    let mut other = open(&relay, &bank);
    assert!(is_routed(&relay, "shop") && is_routed(&relay, "bank"));

    relay.limit(&section(&[("shop", "another-token-16-bytes"), BOTH[1]]));
    assert!(shop.is_revoked() && !bank.is_revoked());
    assert!(!is_routed(&relay, "shop") && is_routed(&relay, "bank"));
    assert!(relay.lock_sources().lost.is_empty(), "404 and not 503");
    let Received::Reset(reset) = poll_fn(|cx| exchange.poll_recv(cx)).await else {
        panic!("the exchange goes on")
    };
    assert_eq!(reset.code, failure::TUNNEL_LOST);
    let waits = poll_fn(|cx| std::task::Poll::Ready(other.poll_recv(cx).is_pending())).await;
    assert!(waits, "the other's goes on");
    assert!(!shop.is_open() && bank.is_open());
    assert!(metric(&relay, "sidelane_sessions_revoked_total{reason=\"withdrawn\"} 1"));
    // What it says at its end is not heard.
    let announced = relay.announce(&shop, &announce("shop"));
    assert_eq!(announced.reasons, ["the session's credential was withdrawn or has expired"]);
    // Giving the token back does not bring the session back; a new one may come.
    relay.limit(&section(BOTH));
    assert!(shop.is_revoked());
    let again = serving(&relay, 1, "shop", BOTH[0].1).await;
    assert!(is_routed(&relay, "shop"));
    assert!(!again.is_revoked());
    // Nothing has changed, so nothing changes.
    let before = relay.routing.load_full();
    relay.recheck();
    assert!(Arc::ptr_eq(&before, &relay.routing.load_full()));
}

#[tokio::test]
async fn routes_of_a_lost_sidecar_go_with_its_credential() {
    let relay = relay();
    let shop = serving(&relay, 1, "shop", BOTH[0].1).await;
    relay.session_ended(&shop);
    assert_eq!(relay.lock_sources().lost.len(), 1);
    relay.limit(&section(BOTH));
    assert_eq!(relay.lock_sources().lost.len(), 1);
    relay.limit(&section(&BOTH[1..]));
    assert!(relay.lock_sources().lost.is_empty());
}

#[tokio::test]
async fn who_is_let_in_by_rules_that_change_meanwhile_is_found() {
    let relay = relay();
    let known = known(&relay, BOTH[0].1).await.expect("known");
    relay.limit(&section(&BOTH[1..]));
    let session = admit(&relay, 1, known);
    relay.confirm(&session);
    assert!(session.is_revoked());
}

#[tokio::test]
async fn an_expired_credential_ends_its_session_unless_it_is_renewed() {
    let relay = relay();
    let shop = serving(&relay, 1, "shop", BOTH[0].1).await;
    let now = SystemTime::now();
    let ends = |at: SystemTime| {
        shop.regrant(|known| {
            Ok::<_, AuthError>(Authenticated { expires: Some(at), ..known.clone() })
        })
        .expect("granted");
    };
    ends(now + Duration::from_secs(10));
    relay.end_expired(now);
    assert!(is_routed(&relay, "shop"));
    // By a token that does not end.
    relay.renew_by(&shop, BOTH[0].1.as_bytes()).await;
    relay.end_expired(now + Duration::from_secs(11));
    assert!(is_routed(&relay, "shop"));
    // Another principal's, and nobody's, change nothing.
    ends(now + Duration::from_secs(10));
    relay.renew_by(&shop, BOTH[1].1.as_bytes()).await;
    relay.renew_by(&shop, b"unknown").await;
    relay.renew_by(&shop, b"").await;
    assert!(is_routed(&relay, "shop"));
    assert_eq!(&*shop.grant().principal, "shop");
    relay.end_expired(now + Duration::from_secs(10));
    assert!(shop.is_revoked() && !is_routed(&relay, "shop"));
    for line in [
        "sidelane_sessions_revoked_total{reason=\"expired\"} 1",
        "sidelane_credentials_renewed_total{result=\"accepted\"} 1",
        "sidelane_credentials_renewed_total{result=\"refused\"} 3",
    ] {
        assert!(metric(&relay, line), "{line}");
    }
}

#[tokio::test]
async fn a_renewal_that_was_refused_counts_once_its_hash_is_known() {
    let relay = relay();
    let first = admit_by(&relay, &hello(1), known(&relay, BOTH[0].1).await.expect("known"));
    let shop = Arc::clone(&first.session);
    assert!(relay.announce(&shop, &announce("shop")).accepted);
    let page = |key: &str| relay.describe_sessions()[0][key].clone();
    let shown = |token: &str| {
        let hash = Sha256::digest(token);
        format!("token sha256:{:02x}{:02x}{:02x}{:02x}…", hash[0], hash[1], hash[2], hash[3])
    };
    assert_eq!(page("credential"), shown(BOTH[0].1));
    let next = "the-next-token-of-shop";
    relay.renew_by(&shop, next.as_bytes()).await;
    let why = AuthError::UnknownToken.to_string();
    assert_eq!(page("credential_refused"), why);
    assert_eq!(page("credential"), shown(BOTH[0].1), "the one before counts");
    // The hash comes, and the one before goes, whether or not the sidecar has asked again.
    relay.limit(&section(&[("shop", next), BOTH[1]]));
    assert!(!shop.is_revoked() && is_routed(&relay, "shop"));
    assert_eq!(page("credential"), shown(next));
    assert!(page("credential_refused").is_null());
    assert!(metric(&relay, "sidelane_credentials_renewed_total{result=\"accepted\"} 1"));

    // A further lane by what counts leaves the refusal as it is; by another one that one counts.
    relay.renew_by(&shop, b"a-token-of-nobody-yet").await;
    let further = proto::Hello {
        session: first.welcome.session.clone(),
        secret: first.welcome.secret.clone(),
        ..hello(1)
    };
    let by_next = known(&relay, next).await.expect("known");
    drop(admit_by(&relay, &further, by_next.clone()));
    assert!(page("credential_refused").is_string());
    let expires = SystemTime::now().checked_add(Duration::from_secs(60));
    drop(admit_by(&relay, &further, Authenticated { expires, ..by_next }));
    assert!(page("credential_refused").is_null());

    // One that becomes another principal's does not keep the session.
    relay.renew_by(&shop, b"a-token-of-nobody-yet").await;
    relay.limit(&section(&[("shop", "not-the-next-but-one"), ("bank", "a-token-of-nobody-yet")]));
    assert!(shop.is_revoked() && !is_routed(&relay, "shop"));
}

#[tokio::test(start_paused = true)]
async fn renewals_are_looked_at_one_at_a_time_and_the_last_counts() {
    let relay = relay();
    let shop = serving(&relay, 1, "shop", BOTH[0].1).await;
    for _ in 0..100 {
        relay.renew(&shop, Bytes::from_static(b"unknown"));
    }
    relay.renew(&shop, Bytes::from_static(BOTH[0].1.as_bytes()));
    let idle = || {
        let renewal = shop.renewal.lock().expect("not poisoned");
        !renewal.is_running && renewal.next.is_none()
    };
    while !idle() {
        tokio::time::sleep(RENEWAL_PAUSE).await;
    }
    assert!(metric(&relay, "sidelane_credentials_renewed_total{result=\"accepted\"} 1"));
    let mut text = String::new();
    relay.metrics.encode(&mut text);
    assert!(!text.contains("sidelane_credentials_renewed_total{result=\"refused\"} 1"), "{text}");
}
