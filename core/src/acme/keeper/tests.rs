//! Against an authority that is told what to answer; time passes by itself.

use std::sync::Mutex;

use tokio::task::JoinHandle;

use super::super::Wanted;
use super::*;
use crate::config::tls::{self, Trust};
use crate::metrics::Metrics;
use crate::tls::Issued;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// What an order ends with; `None`: never.
type Answer = Box<dyn Fn(&str, usize) -> Option<Result<Obtained, Failure>> + Send + Sync>;

struct Fake {
    began: Instant,
    answer: Answer,
    /// Each order: when, for what, how.
    orders: Mutex<Vec<(Duration, Arc<str>, Kind)>>,
}

impl Authority for Fake {
    fn obtain(self: Arc<Self>, name: Arc<str>, kind: Kind, _: Option<SystemTime>) -> Obtaining {
        let mut orders = self.orders.lock().unwrap();
        let answer = (self.answer)(&name, orders.len());
        orders.push((self.began.elapsed(), name, kind));
        Box::pin(async move {
            match answer {
                Some(answer) => answer,
                None => std::future::pending().await,
            }
        })
    }
}

struct Rig {
    fake: Arc<Fake>,
    wanted: watch::Sender<Option<Arc<Settings>>>,
    shelf: Arc<Shelf>,
    _storage: tempfile::TempDir,
    task: JoinHandle<()>,
}

impl Rig {
    fn new(
        names: &[&str],
        answer: impl Fn(&str, usize) -> Option<Result<Obtained, Failure>> + Send + Sync + 'static,
    ) -> Self {
        let storage = tempfile::tempdir().unwrap();
        let began = Instant::now();
        let fake = Arc::new(Fake { began, answer: Box::new(answer), orders: Mutex::default() });
        let shelf = Arc::new(Shelf::new(Arc::new(Issued::default()), Arc::new(Metrics::new())));
        let settings = settings(&storage, names, "https://acme.example/");
        shelf.want(None, Some(&settings));
        let (wanted, receiver) = watch::channel(Some(Arc::new(settings)));
        let met = Arc::clone(&fake);
        let meet = Box::new(move |_: &Settings| Ok(Arc::clone(&met) as Arc<dyn Authority>));
        let task = tokio::spawn(Keeper::new(Arc::clone(&shelf), receiver, meet).run());
        Self { fake, wanted, shelf, _storage: storage, task }
    }

    fn set(&self, names: &[&str], directory: &str) {
        let before = self.wanted.borrow().clone();
        let settings = settings(&self._storage, names, directory);
        self.shelf.want(before.as_deref(), Some(&settings));
        self.wanted.send_replace(Some(Arc::new(settings)));
    }

    fn orders(&self) -> Vec<(Duration, Arc<str>, Kind)> {
        self.fake.orders.lock().unwrap().clone()
    }

    fn times(&self) -> Vec<Duration> {
        self.orders().into_iter().map(|(time, _, _)| time).collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn settings(storage: &tempfile::TempDir, names: &[&str], directory: &str) -> Settings {
    let wanted =
        |name: &&str| Wanted { name: (*name).into(), kinds: vec![Kind::TlsAlpn, Kind::Http] };
    Settings {
        acme: tls::Acme {
            directory: directory.into(),
            contacts: Vec::new(),
            storage: storage.path().into(),
            trust: Trust::System,
            external_account: None,
        },
        names: names.iter().map(wanted).collect(),
    }
}

fn signed(name: &str, life: Duration) -> Option<Result<Obtained, Failure>> {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
    params.not_before = SystemTime::now().into();
    params.not_after = (SystemTime::now() + life).into();
    let chain = params.self_signed(&key).unwrap().pem();
    let certificate = Certificate::from_pem(name, &chain, &key.serialize_pem()).unwrap();
    Some(Ok(Obtained { certificate, kind: Some(Kind::TlsAlpn) }))
}

fn refused(step: Step) -> Option<Result<Obtained, Failure>> {
    Some(Err(Failure::new(step, "no")))
}

fn unreachable() -> Option<Result<Obtained, Failure>> {
    Some(Err(Failure { is_of_authority: true, ..Failure::new(Step::Account, "nobody there") }))
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_tried_again_ever_later() {
    let rig = Rig::new(&["a.example"], |_, _| refused(Step::Order));
    tokio::time::sleep(3 * DAY).await;
    let times = rig.times();
    let gaps: Vec<u64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs()).collect();
    assert!((30..=60).contains(&gaps[0]) && (60..=120).contains(&gaps[1]), "{gaps:?}");
    assert!(gaps.iter().all(|gap| *gap <= 12 * 3600), "{gaps:?}");
    assert!(gaps.iter().filter(|gap| **gap >= 6 * 3600).count() >= 3, "{gaps:?}");
}

#[tokio::test(start_paused = true)]
async fn orders_for_a_name_are_bounded_whatever_is_changed() {
    let rig = Rig::new(&["a.example"], |_, _| refused(Step::Challenge));
    for change in 0..100 {
        tokio::time::sleep(Duration::from_secs(30)).await;
        rig.set(&["a.example"], &format!("https://acme.example/{change}"));
    }
    let times = rig.times();
    for start in 0..times.len() {
        let within = times[start..].iter().filter(|time| **time < times[start] + HOUR).count();
        assert!(within <= ORDERS_PER_NAME_AND_HOUR_MAX, "{times:?}");
    }
    assert!(times.len() >= ORDERS_PER_NAME_AND_HOUR_MAX, "{times:?}");
}

#[tokio::test(start_paused = true)]
async fn orders_for_all_names_are_bounded() {
    let names: Vec<String> = (0..300).map(|number| format!("n{number}.example")).collect();
    let names: Vec<&str> = names.iter().map(|name| &**name).collect();
    let rig = Rig::new(&names, |name, _| signed(name, 90 * DAY));
    tokio::time::sleep(HOUR / 2).await;
    assert_eq!(rig.orders().len(), ORDERS_PER_HOUR_MAX);
    tokio::time::sleep(3 * HOUR).await;
    assert_eq!(rig.orders().len(), names.len());
    assert_eq!(rig.shelf.issued.certificates.load().len(), names.len());
}

#[tokio::test(start_paused = true)]
async fn few_orders_are_under_way_at_once() {
    let names = ["a", "b", "c", "d", "e", "f"];
    let rig = Rig::new(&names, |_, _| None);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(rig.orders().len(), ORDERS_AT_ONCE_MAX);
    // One that never ends is ended.
    tokio::time::sleep(ORDER_TIMEOUT).await;
    assert!(rig.orders().len() >= names.len(), "{:?}", rig.orders());
}

#[tokio::test(start_paused = true)]
async fn the_other_kind_follows_at_once_and_the_delay_after_both() {
    let rig = Rig::new(&["a.example"], |_, _| refused(Step::Challenge));
    tokio::time::sleep(Duration::from_secs(300)).await;
    let orders = rig.orders();
    let kinds: Vec<Kind> = orders.iter().map(|(_, _, kind)| *kind).collect();
    assert_eq!(kinds[..4], [Kind::TlsAlpn, Kind::Http, Kind::TlsAlpn, Kind::Http]);
    assert!(orders[1].0 - orders[0].0 < Duration::from_secs(1));
    assert!(orders[2].0 - orders[1].0 >= Duration::from_secs(30));
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_is_gone_is_not_asked_for_every_name() {
    let names: Vec<String> = (0..50).map(|number| format!("n{number}.example")).collect();
    let names: Vec<&str> = names.iter().map(|name| &**name).collect();
    let rig = Rig::new(&names, |_, _| unreachable());
    tokio::time::sleep(Duration::from_secs(29)).await;
    assert_eq!(rig.orders().len(), ORDERS_AT_ONCE_MAX);
    tokio::time::sleep(DAY).await;
    assert!(rig.orders().len() < 20 * ORDERS_AT_ONCE_MAX, "{}", rig.orders().len());
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_comes_back_is_found() {
    let rig =
        Rig::new(
            &["a.example"],
            |name, orders| {
                if orders < 3 { unreachable() } else { signed(name, 90 * DAY) }
            },
        );
    tokio::time::sleep(HOUR).await;
    assert_eq!(rig.orders().len(), 4);
    assert!(rig.shelf.issued.certificates.load().contains_key("a.example"));
}

#[tokio::test(start_paused = true)]
async fn the_authority_s_own_delay_is_heeded() {
    let later = || SystemTime::now() + 5 * HOUR;
    let rig = Rig::new(&["a.example"], move |_, _| {
        let failure = Failure::new(Step::Challenge, "too many");
        Some(Err(Failure { retry_after: Some(later()), ..failure }))
    });
    tokio::time::sleep(4 * HOUR).await;
    assert_eq!(rig.orders().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_change_of_the_section_ends_delays_and_orders() {
    let rig = Rig::new(&["a.example"], |_, orders| if orders == 0 { None } else { unreachable() });
    tokio::time::sleep(Duration::from_secs(1)).await;
    rig.set(&["a.example"], "https://other.example/");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(rig.orders().len(), 2);
    rig.set(&["a.example"], "https://third.example/");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(rig.orders().len(), 3);
    // The same once more changes nothing.
    rig.set(&["a.example"], "https://third.example/");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(rig.orders().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_gone_while_it_is_ordered_is_not_shown() {
    let rig = Rig::new(&["a.example", "b.example"], |name, _| {
        if name == "a.example" { None } else { signed(name, 90 * DAY) }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    rig.set(&["b.example"], "https://acme.example/");
    tokio::time::sleep(DAY).await;
    let shown = rig.shelf.issued.certificates.load();
    assert_eq!(shown.keys().map(|name| &**name).collect::<Vec<_>>(), ["b.example"]);
    assert_eq!(rig.orders().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_that_is_due_when_it_comes_is_not_ordered_without_end() {
    let rig = Rig::new(&["a.example"], |name, _| signed(name, Duration::ZERO));
    tokio::time::sleep(DAY).await;
    assert!(rig.orders().len() <= 15, "{:?}", rig.times());
}

#[tokio::test(start_paused = true)]
async fn it_ends_with_who_wants_it() {
    let mut rig = Rig::new(&["a.example"], |_, _| None);
    tokio::time::sleep(Duration::from_secs(1)).await;
    rig.wanted.send_replace(None);
    let (other, _) = watch::channel(None);
    drop(std::mem::replace(&mut rig.wanted, other));
    (&mut rig.task).await.unwrap();
}
