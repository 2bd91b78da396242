use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU8, Ordering};

use sidelane_tunnel::{LaneConfig, proto};

use super::*;
use crate::config::credentials::{Claims, Pattern};
use crate::credentials::{AuthError, Authenticated, Proof};
use crate::metrics::Metrics;
use crate::relay::routing::Routing;
use crate::router::{self, Query};
use crate::tunnel::session::{Sessions, Settings};

const BASE: &str = "example.org";

fn patterns(texts: &[&str]) -> Vec<Pattern> {
    texts.iter().map(|text| Pattern::new(text)).collect()
}

/// May claim these as subdomains, as tunnels, and as hosts below the base domain.
fn claims(names: &[&str]) -> Claims {
    Claims { subdomains: patterns(names), tunnels: patterns(names), ..Claims::default() }
}

fn authenticated(principal: &str, claims: Claims) -> Authenticated {
    let grant = Arc::new(Grant { principal: principal.into(), claims });
    Authenticated { grant, proof: Proof::Token([0; 32]), expires: None }
}

struct Stage {
    sessions: Sessions,
    sources: Sources,
    instances: AtomicU8,
}

impl Stage {
    fn new() -> Self {
        let sessions = Sessions::new(Settings {
            sessions_max: 4096,
            sessions_of_principal_max: 4096,
            lanes_max: 2,
            lane: LaneConfig::default(),
            grace: Duration::ZERO,
            advertise: None,
            protocols: vec!["HTTP".into()],
            peers: Vec::new(),
        });
        let sources = Sources { base_domains: vec![BASE.into()], ..Sources::default() };
        Self { sessions, sources, instances: AtomicU8::new(0) }
    }

    fn session(&self, name: &str, principal: &str, claims: Claims) -> Arc<Session> {
        let instance = self.instances.fetch_add(1, Ordering::Relaxed);
        let hello = proto::Hello {
            version: sidelane_tunnel::VERSION,
            instance: vec![instance; 16].into(),
            name: name.to_owned(),
            window: 65536,
            message_bytes_max: 128 * 1024,
            ..proto::Hello::default()
        };
        let peer = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 4711);
        let known = authenticated(principal, claims);
        let admitted = self.sessions.admit(&hello, known, peer, |_, _| 0).expect("let in");
        admitted.link.pretend_open();
        admitted.session
    }

    fn announce(
        &mut self,
        session: &Arc<Session>,
        tunnel: &str,
        hosts: &[(&str, &str)],
    ) -> Settled {
        let document = document(session, tunnel, hosts);
        self.sources.hold(document);
        self.sources.settle()
    }

    /// Name of the sidecar whose route takes this host and path.
    fn finds(&self, host: &str) -> Option<String> {
        let metrics = Arc::new(Metrics::new());
        let routing = Routing::build(&self.sources, &Routing::default(), &metrics);
        let (host, path) = host.split_at(host.find('/').unwrap_or(host.len()));
        let query = Query { host: Some(host), path, listener: "web", protocol_type: "HTTP" };
        let route = router::find(&routing.table, &query)?;
        let mut documents = self.sources.documents.values();
        let has = |document: &&Document| document.routes.iter().any(|own| Arc::ptr_eq(own, route));
        documents.find(has).map(|document| document.session.name.to_string())
    }
}

/// Of one tunnel, and a route for each key and value, which may have a path behind it.
fn document(session: &Arc<Session>, tunnel: &str, hosts: &[(&str, &str)]) -> Document {
    let route = |(key, value): &(&str, &str)| {
        let (value, path) = value.split_at(value.find('/').unwrap_or(value.len()));
        let mut route = proto::AnnouncedRoute {
            name: value.replace(['*', '.'], "x"),
            path_prefix: path.to_owned(),
            tunnel: tunnel.to_owned(),
            ..proto::AnnouncedRoute::default()
        };
        let field = match *key {
            "subdomain" => &mut route.subdomain,
            "host" => &mut route.host,
            "wildcard" => &mut route.wildcard,
            "listener" => &mut route.listener,
            key => panic!("no key {key}"),
        };
        *field = value.to_owned();
        route
    };
    let announce = proto::Announce {
        version: 1,
        tunnels: vec![proto::AnnouncedTunnel {
            name: tunnel.to_owned(),
            ..proto::AnnouncedTunnel::default()
        }],
        routes: hosts.iter().map(route).collect(),
    };
    Document::parse(session, &announce).expect("a valid document")
}

/// Why the one document that is told of is kept out.
fn why(settled: &Settled) -> (String, bool) {
    let [one] = settled.refused.as_slice() else { panic!("{} refused", settled.refused.len()) };
    assert!(settled.accepted.is_empty());
    (one.reasons.join("; "), one.is_forbidden)
}

#[test]
fn what_a_principal_may_not_claim_is_refused_whole() {
    let mut stage = Stage::new();
    let shop = stage.session("s", "shop", claims(&["shop", "shop-*"]));
    let table: &[(&str, &str, &str, &str)] = &[
        ("bank", "subdomain", "shop", "tunnel bank: principal shop may not claim tunnel bank"),
        ("shop", "subdomain", "bank", "route bank: principal shop may not claim subdomain bank"),
        ("shop", "host", "bank.example.org", "may not claim host bank.example.org"),
        ("shop", "host", "shop.example.net", "may not claim host shop.example.net"),
        ("shop", "host", "*.example.org", "may not claim host *.example.org"),
        ("shop", "wildcard", "*", "may not claim wildcard *"),
        ("shop", "wildcard", "*.shop", "may not claim wildcard *.shop"),
        ("shop", "listener", "lines", "may not claim listener lines as a whole"),
    ];
    assert!(!table.is_empty());
    for (tunnel, key, value, expected) in table {
        stage.sources.forget(shop.epoch);
        let settled = stage.announce(&shop, tunnel, &[("subdomain", "shop-1"), (key, value)]);
        let (reasons, is_forbidden) = why(&settled);
        assert!(reasons.contains(expected) && is_forbidden, "{reasons}");
        assert_eq!(stage.finds("shop-1.example.org"), None, "{value}");
    }
    stage.sources.forget(shop.epoch);
    let fine = [("subdomain", "shop-1"), ("host", "shop.example.org")];
    assert_eq!(stage.announce(&shop, "shop", &fine).accepted.len(), 1);
    assert_eq!(stage.finds("SHOP.example.org.").as_deref(), Some("s"));
}

#[test]
fn nobody_takes_what_another_principal_has_in_whatever_words() {
    type Words = (&'static str, &'static str);
    let table: &[(Words, Words, &str)] = &[
        (("subdomain", "shop"), ("subdomain", "shop"), "shop.example.org"),
        (("subdomain", "shop"), ("host", "shop.example.org"), "shop.example.org"),
        (("host", "shop.example.org"), ("subdomain", "shop"), "shop.example.org"),
        (("wildcard", "*.apps"), ("host", "*.apps.example.org"), "x.apps.example.org"),
        (("host", "*.apps.example.org"), ("wildcard", "*.apps"), "x.apps.example.org"),
        (("wildcard", "*"), ("host", "*.example.org"), "x.example.org"),
    ];
    assert!(!table.is_empty());
    for (first, second, host) in table {
        let mut stage = Stage::new();
        // Both may: the operator's word. Who comes first has it all the same.
        let may = || Claims { listeners: vec![], ..Claims::everything() };
        let (a, b) = (stage.session("a", "a", may()), stage.session("b", "b", may()));
        stage.announce(&a, "a", &[*first]);
        let settled = stage.announce(&b, "b", &[*second]);
        let (reasons, is_forbidden) = why(&settled);
        assert!(reasons.contains("of another principal; the older session keeps it"), "{reasons}");
        assert!(!is_forbidden);
        assert_eq!(stage.finds(host).as_deref(), Some("a"), "{first:?} {second:?}");
        stage.sources.lose(a.epoch, Instant::now());
        assert_eq!(stage.sources.settle().accepted.len(), 1);
        assert_eq!(stage.finds(host).as_deref(), Some("b"), "{first:?} {second:?}");
    }
}

#[test]
fn a_whole_host_does_not_shadow_another_principals_paths() {
    let mut stage = Stage::new();
    let a = stage.session("a", "a", claims(&["a", "shared"]));
    let b = stage.session("b", "b", claims(&["b", "shared"]));
    let mut with_path = document(&a, "a", &[("subdomain", "shared")]);
    let route = Route {
        matches: Match { path_prefix: "/a".into(), ..with_path.routes[0].matches.clone() },
        ..(*with_path.routes[0]).clone()
    };
    with_path.routes = vec![Arc::new(route)];
    stage.sources.hold(with_path);
    assert_eq!(stage.sources.settle().accepted.len(), 1);
    let settled = stage.announce(&b, "b", &[("host", "shared.example.org")]);
    assert!(why(&settled).0.contains("taken by a sidecar of another principal"));
    // Beside it, in the same words, the other paths are free.
    assert_eq!(stage.announce(&b, "b", &[("subdomain", "shared")]).accepted.len(), 1);
}

#[test]
fn what_is_in_force_stays_whatever_an_older_session_announces() {
    let mut stage = Stage::new();
    let may = || claims(&["shop", "t", "u"]);
    let (older, younger) = (stage.session("a", "a", may()), stage.session("b", "b", may()));
    stage.announce(&younger, "t", &[("subdomain", "shop")]);
    let settled = stage.announce(&older, "u", &[("subdomain", "shop")]);
    assert!(why(&settled).0.contains("the session that has it keeps it"));
    assert_eq!(stage.finds("shop.example.org").as_deref(), Some("b"));
}

#[test]
fn a_tunnel_is_one_principals_and_replicas_share_it() {
    let mut stage = Stage::new();
    let first = stage.session("a", "shop", claims(&["shop", "web"]));
    let replica = stage.session("b", "shop", claims(&["shop", "web"]));
    let other = stage.session("c", "bank", claims(&["bank", "web"]));
    assert_eq!(stage.announce(&first, "web", &[("subdomain", "shop")]).accepted.len(), 1);
    assert_eq!(stage.announce(&replica, "web", &[("subdomain", "shop")]).accepted.len(), 1);
    let (reasons, is_forbidden) = why(&stage.announce(&other, "web", &[("subdomain", "bank")]));
    assert!(
        reasons.starts_with("tunnel web: taken by a sidecar of another principal"),
        "{reasons}"
    );
    assert!(!is_forbidden);
    // Two who may claim everything are as one.
    let mut stage = Stage::new();
    let embedded = stage.session("a", "embedded", Claims::everything());
    let token = stage.session("b", "token", Claims::everything());
    stage.announce(&embedded, "web", &[("subdomain", "shop")]);
    assert_eq!(stage.announce(&token, "web", &[("subdomain", "shop")]).accepted.len(), 1);
}

#[test]
fn claims_that_change_take_documents_out_and_in() {
    let mut stage = Stage::new();
    let a = stage.session("a", "a", claims(&["shop", "t"]));
    let b = stage.session("b", "b", claims(&["shop", "u"]));
    stage.announce(&a, "t", &[("subdomain", "shop")]);
    stage.announce(&b, "u", &[("subdomain", "shop")]);
    let grant = |session: &Arc<Session>, claims: Claims| {
        let principal = session.grant().principal.to_string();
        session
            .regrant(|_| Ok::<_, AuthError>(authenticated(&principal, claims)))
            .expect("granted");
    };
    grant(&a, claims(&["t"]));
    let settled = stage.sources.settle();
    assert!(settled.is_changed);
    assert!(settled.refused[0].is_forbidden && settled.refused[0].session.epoch == a.epoch);
    assert_eq!(settled.accepted[0].session.epoch, b.epoch);
    assert_eq!(stage.finds("shop.example.org").as_deref(), Some("b"));
    assert_eq!(stage.sources.held_counts(), (0, 1));
    // Nothing new is told where nothing is.
    let settled = stage.sources.settle();
    assert!(settled.refused.is_empty() && settled.accepted.is_empty() && !settled.is_changed);
    // Wider again: it waits for the other.
    grant(&a, claims(&["shop", "t"]));
    let settled = stage.sources.settle();
    assert!(!settled.refused[0].is_forbidden);
    assert_eq!(stage.sources.held_counts(), (1, 0));
    grant(&b, claims(&["u"]));
    assert_eq!(stage.sources.settle().accepted[0].session.epoch, a.epoch);
    assert_eq!(stage.finds("shop.example.org").as_deref(), Some("a"));
}

#[test]
fn a_refused_document_leaves_the_one_before_in_force() {
    let mut stage = Stage::new();
    let a = stage.session("a", "a", claims(&["shop", "t"]));
    stage.announce(&a, "t", &[("subdomain", "shop")]);
    why(&stage.announce(&a, "t", &[("subdomain", "bank")]));
    assert_eq!(stage.finds("shop.example.org").as_deref(), Some("a"));
    assert_eq!(stage.announce(&a, "t", &[]).accepted.len(), 1);
    assert_eq!(stage.finds("shop.example.org"), None);
    assert_eq!(stage.sources.held_counts(), (0, 0));
}

#[test]
fn one_document_is_not_in_two_minds() {
    let stage = Stage::new();
    let a = stage.session("a", "a", Claims::everything());
    let twice = document(&a, "t", &[("subdomain", "shop"), ("host", "shop.example.org")]);
    let reasons = ambiguities(&twice, &stage.sources.base_domains);
    assert_eq!(reasons, ["routes shop and shopxexamplexorg take the same"]);
    let fine = document(&a, "t", &[("subdomain", "shop"), ("host", "shop.example.net")]);
    assert!(ambiguities(&fine, &stage.sources.base_domains).is_empty());
}

#[test]
fn the_files_routes_stand_whatever_is_announced() {
    let mut stage = Stage::new();
    let a = stage.session("a", "a", Claims::everything());
    let own = document(&a, "t", &[("wildcard", "*.apps"), ("subdomain", "own")]);
    stage.sources.own = own.routes;
    let b = stage.session("b", "b", Claims::everything());
    stage.announce(&b, "u", &[("host", "*.apps.example.org"), ("subdomain", "shop")]);
    assert_eq!(stage.finds("x.apps.example.org"), None, "the file's");
    assert_eq!(stage.finds("shop.example.org").as_deref(), Some("b"), "nothing else is lost");
}

#[test]
fn what_is_lost_is_its_principals() {
    let mut stage = Stage::new();
    let may = || claims(&["shop", "bank", "t", "u"]);
    let a = stage.session("same name", "a", may());
    stage.announce(&a, "t", &[("subdomain", "shop")]);
    stage.sources.lose(a.epoch, Instant::now());
    // Another principal's sidecar of the same name does not make it forgotten.
    let b = stage.session("same name", "b", may());
    stage.announce(&b, "u", &[("subdomain", "bank")]);
    assert_eq!(stage.sources.lost.len(), 1);
    let again = stage.session("same name", "a", may());
    stage.announce(&again, "t", &[("subdomain", "shop")]);
    assert!(stage.sources.lost.is_empty());
    // What a lost one had as a whole host is not in the way of a subdomain that is served.
    stage.announce(&again, "t", &[("host", "bank.example.org")]);
    stage.sources.forget(b.epoch);
    stage.sources.settle();
    stage.announce(&again, "t", &[("host", "bank.example.org")]);
    stage.sources.lose(again.epoch, Instant::now());
    let c = stage.session("c", "c", may());
    stage.announce(&c, "u", &[("subdomain", "bank")]);
    assert_eq!(stage.finds("bank.example.org").as_deref(), Some("c"));
}

#[test]
fn a_flood_of_lost_sidecars_pushes_out_its_own() {
    let mut stage = Stage::new();
    let quiet = stage.session("quiet", "quiet", claims(&["quiet"]));
    stage.announce(&quiet, "quiet", &[("subdomain", "quiet")]);
    stage.sources.lose(quiet.epoch, Instant::now());
    let flood = stage.session("flood", "flood", claims(&["f"]));
    for _ in 0..=LOST_DOCUMENTS_MAX {
        stage.sources.documents.insert(flood.epoch, document(&flood, "f", &[]));
        stage.sources.lose(flood.epoch, Instant::now());
    }
    assert_eq!(stage.sources.lost.len(), LOST_DOCUMENTS_MAX);
    assert_eq!(&*stage.sources.lost[0].1.grant.principal, "quiet");
}

#[test]
fn lost_routes_are_bounded_too_and_the_principal_with_the_most_makes_room() {
    let mut stage = Stage::new();
    let quiet = stage.session("quiet", "quiet", claims(&["quiet"]));
    stage.announce(&quiet, "quiet", &[("subdomain", "quiet")]);
    stage.sources.lose(quiet.epoch, Instant::now());
    let flood = stage.session("flood", "flood", claims(&["*"]));
    let route = Arc::clone(&document(&flood, "f", &[("subdomain", "f")]).routes[0]);
    for _ in 0..30 {
        let mut many = document(&flood, "f", &[]);
        many.routes = vec![Arc::clone(&route); 9_999];
        stage.sources.documents.insert(flood.epoch, many);
        stage.sources.lose(flood.epoch, Instant::now());
    }
    let lost = &stage.sources.lost;
    let routes: usize = lost.iter().map(|(_, lost)| lost.routes.len()).sum();
    assert_eq!((lost.len(), routes), (11, 99_991));
    assert_eq!(&*lost[0].1.grant.principal, "quiet");
}

/// The routes of such a document, as a file's.
fn own(stage: &Stage, hosts: &[(&str, &str)]) -> Vec<Arc<Route>> {
    document(&stage.session("file", "file", claims(&["*"])), "own", hosts).routes
}

#[test]
fn the_relays_own_routes_win_however_a_host_is_said() {
    type File<'a> = &'a [(&'a str, &'a str)];
    let table: &[(File<'_>, &str, &str, bool)] = &[
        (&[("subdomain", "shop")], "host", "shop.example.org", true),
        (&[("host", "shop.example.org")], "subdomain", "shop", true),
        (&[("wildcard", "*")], "host", "*.example.org", true),
        // Whole hosts come first, and would take what is below the path, too.
        (&[("subdomain", "shop/admin")], "host", "shop.example.org", true),
        (&[("subdomain", "shop")], "host", "shop.example.org/api", false),
        // As far as it is more specific it takes nothing that is the relay's.
        (&[("subdomain", "other")], "host", "shop.example.org", false),
        (&[("wildcard", "*")], "host", "shop.example.org", false),
    ];
    assert!(!table.is_empty());
    for (file, key, value, is_own) in table {
        let mut stage = Stage::new();
        stage.sources.own = own(&stage, file);
        let shop = stage.session("shop", "shop", claims(&["*"]));
        let settled = stage.announce(&shop, "shop", &[(key, value)]);
        let [accepted] = settled.accepted.as_slice() else { panic!("not accepted: {key} {value}") };
        let notes = accepted.notes.join("; ");
        assert_eq!(notes.contains("overruled"), *is_own, "{file:?} {value}: {notes}");
        let expected = if *is_own { None } else { Some("shop") };
        let path = value.find('/').map_or("", |at| &value[at..]);
        let asked = format!("shop.example.org{path}");
        assert_eq!(stage.finds(&asked).as_deref(), expected, "{file:?} {value}");
    }
}

#[test]
fn a_whole_host_that_nobody_serves_is_not_in_the_way_of_a_subdomain_below_it() {
    let mut stage = Stage::new();
    let gone = stage.session("gone", "p", claims(&["*"]));
    stage.announce(&gone, "gone", &[("host", "shop.example.org"), ("host", "a.example.org/x")]);
    assert!(stage.sources.lose(gone.epoch, Instant::now()));
    let live = stage.session("live", "p", claims(&["*"]));
    stage.announce(&live, "live", &[("subdomain", "shop/api"), ("subdomain", "a")]);
    assert_eq!(stage.finds("shop.example.org/api").as_deref(), Some("live"));
    assert_eq!(stage.finds("a.example.org/y").as_deref(), Some("live"));
}

/// All its lanes are lost, and may come back.
fn is_gone(session: &Session) {
    session.lanes().iter().for_each(|link| link.leave());
    assert!(!session.is_open());
}

#[test]
fn a_ghost_holds_no_name_against_a_newcomer_of_its_principal() {
    let mut stage = Stage::new();
    let ghost = stage.session("ghost", "shop", claims(&["web", "a", "b"]));
    stage.announce(&ghost, "a", &[("subdomain", "web")]);
    is_gone(&ghost);
    let other = stage.session("other", "bank", claims(&["web", "a", "b"]));
    let settled = stage.announce(&other, "b", &[("subdomain", "web")]);
    assert!(settled.accepted.is_empty(), "another principal's it stays");
    let new = stage.session("new", "shop", claims(&["web", "a", "b"]));
    let settled = stage.announce(&new, "b", &[("subdomain", "web")]);
    assert_eq!(settled.accepted.len(), 1);
    let [refused] = &settled.refused[..] else { panic!("the ghost is told") };
    assert!(Arc::ptr_eq(&refused.session, &ghost) && !refused.is_forbidden);
    assert!(refused.reasons[0].contains("taken by sidecar new for tunnel b"));
    assert_eq!(stage.finds("web.example.org").as_deref(), Some("new"));
    // It waits, as whoever comes second.
    assert!(stage.sources.held.contains_key(&ghost.epoch));
    stage.sources.lose(new.epoch, Instant::now());
    stage.sources.settle();
    assert_eq!(stage.finds("web.example.org").as_deref(), Some("ghost"));
}

#[test]
fn a_ghost_shares_with_a_newcomer_that_announces_the_same() {
    let mut stage = Stage::new();
    let ghost = stage.session("web", "shop", claims(&["web"]));
    stage.announce(&ghost, "web", &[("subdomain", "web")]);
    is_gone(&ghost);
    let new = stage.session("web", "shop", claims(&["web"]));
    let settled = stage.announce(&new, "web", &[("subdomain", "web")]);
    assert_eq!((settled.accepted.len(), settled.refused.len()), (1, 0));
    assert_eq!(stage.sources.documents.len(), 2, "one name, two instances");
}

#[test]
fn one_that_waits_is_let_in_once_the_other_has_been_silent_for_a_while() {
    let mut stage = Stage::new();
    let first = stage.session("first", "shop", claims(&["web", "a", "b"]));
    stage.announce(&first, "a", &[("subdomain", "web")]);
    let second = stage.session("second", "shop", claims(&["web", "a", "b"]));
    let settled = stage.announce(&second, "b", &[("subdomain", "web")]);
    assert!(settled.accepted.is_empty());
    let begin = Instant::now();
    assert!(!stage.sources.look_at_silent(begin), "it is there");
    is_gone(&first);
    assert!(!stage.sources.look_at_silent(begin), "a blink");
    stage.sources.settle();
    assert_eq!(stage.finds("web.example.org").as_deref(), Some("first"));
    // As if it had been seen before.
    let earlier = begin.checked_sub(SILENT_MAX).expect("a clock that has run for seconds");
    stage.sources.silent.insert(first.epoch, earlier);
    assert!(stage.sources.look_at_silent(begin));
    let settled = stage.sources.settle();
    assert_eq!((settled.accepted.len(), settled.refused.len()), (1, 1));
    assert_eq!(stage.finds("web.example.org").as_deref(), Some("second"));
}
