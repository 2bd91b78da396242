//! Whether the services behind tunnels can be served: waited for after a start, checked while they
//! are. What is found out is announced; exchanges that come all the same are delivered.
//!
//! One task per tunnel that has a check or is waited for. It ends where a reload changes or removes
//! the tunnel; one that a reload does not touch goes on, with all that it knows.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;
use sidelane_tunnel::proto;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::Sidecar;
use super::service::dial::Dialer;
use crate::config::{HealthCheck, Tunnel};
use crate::metrics::SidecarMetrics;
use crate::random;

mod probe;

/// From one try to connect to the next while a service is waited for: soon enough that nobody notices,
/// seldom enough to cost nothing.
const WAIT_INTERVAL: Duration = Duration::from_millis(100);

/// Longest reason that is announced and logged; a service's own words are in it.
const REASON_BYTES_MAX: usize = 256;

/// What is known of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Condition {
    /// Nobody checks it, or nobody did yet where it was served before.
    Assumed,
    /// It is waited for.
    Waiting,
    /// Its first check has not ended.
    Unknown,
    /// It passes its check.
    Healthy,
    /// It does not: why.
    Unhealthy(Arc<str>),
}

impl Condition {
    /// Why the service cannot be served; `None`: it can.
    fn unavailable(&self) -> Option<String> {
        match self {
            Self::Assumed | Self::Healthy => None,
            Self::Waiting => Some("waiting for the service".to_owned()),
            Self::Unknown => Some("its first health check has not ended".to_owned()),
            Self::Unhealthy(reason) => Some(format!("its health check fails: {reason}")),
        }
    }

    const fn name(&self) -> &'static str {
        match self {
            Self::Assumed => "unchecked",
            Self::Waiting => "waiting",
            Self::Unknown => "unknown",
            Self::Healthy => "healthy",
            Self::Unhealthy(_) => "unhealthy",
        }
    }
}

/// Turns checks into a condition: the first decides, later ones by how many in a row agree.
#[derive(Debug)]
struct Judge {
    healthy_after: u32,
    unhealthy_after: u32,
    /// `None` before the first check.
    is_healthy: Option<bool>,
    /// Checks in a row that say otherwise.
    against: u32,
}

impl Judge {
    const fn new(check: &HealthCheck) -> Self {
        Self {
            healthy_after: check.healthy_after,
            unhealthy_after: check.unhealthy_after,
            is_healthy: None,
            against: 0,
        }
    }

    /// Takes a check's result, and returns whether that decides something else than before.
    fn decides(&mut self, is_good: bool) -> bool {
        if self.is_healthy == Some(is_good) {
            self.against = 0;
            return false;
        }
        self.against = self.against.saturating_add(1);
        let enough = match self.is_healthy {
            None => 1,
            Some(false) => self.healthy_after,
            Some(true) => self.unhealthy_after,
        };
        if self.against < enough {
            return false;
        }
        self.is_healthy = Some(is_good);
        self.against = 0;
        true
    }
}

/// The conditions of a sidecar's services.
#[derive(Default)]
pub(super) struct Health {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    by_tunnel: HashMap<Arc<str>, Watched>,
    /// Tasks that were begun.
    begun: u64,
}

struct Watched {
    tunnel: Arc<Tunnel>,
    condition: Condition,
    since: Instant,
    /// The task that may change it.
    task: u64,
    /// Dropped to end the task.
    _stop: watch::Sender<()>,
}

/// What a task is begun with.
pub(super) struct Task {
    tunnel: Arc<Tunnel>,
    number: u64,
    stop: watch::Receiver<()>,
    waits: bool,
}

impl Health {
    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes the tunnels of a configuration, and returns the tasks to begin. `was_served` says which
    /// were there before; `is_start`: the process starts, so that services may be waited for.
    pub(super) fn configure<'a>(
        &self,
        tunnels: impl IntoIterator<Item = &'a Arc<Tunnel>>,
        was_served: impl Fn(&str) -> bool,
        is_start: bool,
        metrics: &SidecarMetrics,
    ) -> Vec<Task> {
        self.with(|state| {
            let mut old = std::mem::take(&mut state.by_tunnel);
            let mut tasks = Vec::new();
            for tunnel in tunnels {
                let before = old.remove(&tunnel.name);
                if let Some(watched) = before.as_ref()
                    && watched.tunnel == *tunnel
                {
                    let name = Arc::clone(&tunnel.name);
                    state.by_tunnel.extend(before.map(|watched| (name, watched)));
                    continue;
                }
                let waits = is_start && !tunnel.wait.is_zero();
                if tunnel.health_check.is_none() {
                    metrics.set_healthy(&tunnel.name, None);
                    if !waits {
                        continue;
                    }
                }
                // What was served goes on being served until it is known to be unwell.
                let condition = match before {
                    Some(watched) => watched.condition,
                    None if waits => Condition::Waiting,
                    None if was_served(&tunnel.name) => Condition::Assumed,
                    None => Condition::Unknown,
                };
                state.begun += 1;
                let (stop, stopped) = watch::channel(());
                tasks.push(Task {
                    tunnel: Arc::clone(tunnel),
                    number: state.begun,
                    stop: stopped,
                    waits,
                });
                let watched = Watched {
                    tunnel: Arc::clone(tunnel),
                    condition,
                    since: Instant::now(),
                    task: state.begun,
                    _stop: stop,
                };
                watched.count(metrics);
                state.by_tunnel.insert(Arc::clone(&tunnel.name), watched);
            }
            for name in old.keys() {
                metrics.set_healthy(name, None);
            }
            tasks
        })
    }

    /// Changes a condition; false: it was that, or the task is not the tunnel's any more.
    fn set(&self, task: &Task, condition: Condition, metrics: &SidecarMetrics) -> bool {
        self.with(|state| {
            let watched = state.by_tunnel.get_mut(&task.tunnel.name);
            let Some(watched) = watched.filter(|watched| watched.task == task.number) else {
                return false;
            };
            if watched.condition == condition {
                return false;
            }
            watched.condition = condition;
            watched.since = Instant::now();
            watched.count(metrics);
            true
        })
    }

    /// Says of each announced tunnel whether it can be served; true: something is said anew.
    pub(super) fn mark(&self, tunnels: &mut [proto::AnnouncedTunnel]) -> bool {
        self.with(|state| {
            let mut is_changed = false;
            for tunnel in tunnels {
                let watched = state.by_tunnel.get(tunnel.name.as_str());
                let reason =
                    watched.and_then(|watched| watched.condition.unavailable()).unwrap_or_default();
                is_changed |= tunnel.unavailable != reason;
                tunnel.unavailable = reason;
            }
            is_changed
        })
    }

    /// What the admin page says of a tunnel's service.
    pub(super) fn describe(&self, tunnel: &Tunnel) -> serde_json::Value {
        self.with(|state| {
            let watched = state.by_tunnel.get(&tunnel.name);
            let condition = watched.map_or(&Condition::Assumed, |watched| &watched.condition);
            json!({
                "tunnel": &*tunnel.name,
                "service": tunnel.service.to_string(),
                "tls": tunnel.tls.is_some(),
                "health": condition.name(),
                "unavailable": condition.unavailable(),
                "since_seconds": watched.map(|watched| watched.since.elapsed().as_secs()),
            })
        })
    }
}

impl Watched {
    fn count(&self, metrics: &SidecarMetrics) {
        if self.tunnel.health_check.is_some() {
            let is_healthy = self.condition.unavailable().is_none();
            metrics.set_healthy(&self.tunnel.name, Some(is_healthy));
        }
    }
}

/// Watches one tunnel's service until a reload ends it, or the sidecar stops.
pub(super) async fn run(sidecar: Arc<Sidecar>, task: Task) {
    let mut stop = task.stop.clone();
    let mut stopping = sidecar.stopping.subscribe();
    tokio::select! {
        biased;
        // The sender says nothing; it goes.
        _ = stop.changed() => {}
        _ = stopping.wait_for(|is_stopping| *is_stopping) => {}
        () = watch_service(&sidecar, &task) => {}
    }
}

async fn watch_service(sidecar: &Sidecar, task: &Task) {
    let tunnel = &*task.tunnel;
    let dialer = Dialer::new(&task.tunnel);
    let change = |condition| {
        if sidecar.health.set(task, condition, &sidecar.metrics.sidecar) {
            sidecar.announce_health();
        }
    };
    if task.waits {
        wait(tunnel, &dialer).await;
        if tunnel.health_check.is_none() {
            change(Condition::Assumed);
        }
    }
    let Some(check) = &tunnel.health_check else { return };
    let mut judge = Judge::new(check);
    loop {
        let result = probe::probe(tunnel, &dialer, check).await;
        sidecar.metrics.sidecar.checked(&tunnel.name, result.is_ok());
        let decides = judge.decides(result.is_ok());
        let (name, service) = (&*tunnel.name, tunnel.service.to_string());
        match result {
            Ok(()) if decides => {
                tracing::info!(tunnel = name, service, "the service passes its health check");
                change(Condition::Healthy);
            }
            Err(reason) if decides => {
                let reason = cut(&reason);
                tracing::warn!(
                    tunnel = name,
                    service,
                    reason,
                    "the service fails its health check"
                );
                change(Condition::Unhealthy(reason.into()));
            }
            Ok(()) => {}
            Err(reason) => {
                tracing::debug!(tunnel = name, service, reason, "a health check failed");
            }
        }
        sleep(jittered(check.interval, random::number())).await;
    }
}

/// Waits until the service accepts a connection, no longer than the tunnel says. TLS is not waited for: what
/// is wrong with that does not pass.
async fn wait(tunnel: &Tunnel, dialer: &Dialer) {
    let accepts = async {
        while !probe::accepts(tunnel, dialer).await {
            sleep(WAIT_INTERVAL).await;
        }
    };
    let (name, service) = (&*tunnel.name, tunnel.service.to_string());
    tracing::info!(
        tunnel = name,
        service,
        for_at_most = ?tunnel.wait,
        "waiting for the service to accept connections; relays send nothing here meanwhile"
    );
    match timeout(tunnel.wait, accepts).await {
        Ok(()) => tracing::info!(tunnel = name, service, "the service accepts connections"),
        Err(_) => tracing::warn!(
            tunnel = name,
            service,
            waited = ?tunnel.wait,
            "the service accepts no connection; its tunnel is announced all the same"
        ),
    }
}

/// Returns the time, shortened or lengthened by up to a tenth: services that many sidecars check are
/// not asked by all of them at once.
pub(super) fn jittered(time: Duration, random: u64) -> Duration {
    let tenth = time / 10;
    let nanos = u64::try_from(tenth.as_nanos()).unwrap_or(u64::MAX).max(1);
    time - tenth + Duration::from_nanos(random % nanos) * 2
}

/// Cuts what a service said, at a character's end, to one line.
fn cut(reason: &str) -> String {
    let fits = |(at, c): &(usize, char)| at + c.len_utf8() <= REASON_BYTES_MAX;
    let chars = reason.char_indices().take_while(fits);
    chars.map(|(_, c)| if c.is_control() { ' ' } else { c }).collect()
}

impl Sidecar {
    /// Begins the tasks that a configuration asks for.
    pub(super) fn watch_services(self: &Arc<Self>, tasks: Vec<Task>) {
        for (task, shard) in tasks.into_iter().zip(self.shards.iter().cycle()) {
            // Refused only where the process ends.
            shard.spawn(run(Arc::clone(self), task));
        }
    }

    /// Announces anew where a service's condition has changed, or all are withdrawn.
    pub(super) fn announce_health(&self) {
        self.document.send_if_modified(|document| {
            let mut next = proto::Announce::clone(document);
            let is_changed = self.mark(&mut next.tunnels);
            if is_changed {
                next.version += 1;
                *document = Arc::new(next);
            }
            is_changed
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{HostPort, HttpVersion, Pool, Probe, ServiceAddress};
    use crate::metrics::Metrics;

    fn tunnel(name: &str, has_check: bool, wait: Duration) -> Arc<Tunnel> {
        Arc::new(Tunnel {
            name: name.into(),
            service: ServiceAddress::Tcp(HostPort { host: "127.0.0.1".into(), port: 1 }),
            protocols: None,
            connect_timeout: Duration::from_secs(1),
            tls: None,
            http_version: HttpVersion::Http1,
            pool: Pool::default(),
            proxy_protocol: None,
            health_check: has_check.then(check),
            wait,
            weight: 1,
        })
    }

    fn metrics() -> Metrics {
        Metrics::new()
    }

    fn check() -> HealthCheck {
        HealthCheck {
            probe: Probe::Tcp,
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(1),
            healthy_after: 2,
            unhealthy_after: 3,
        }
    }

    #[test]
    fn the_first_check_decides_and_later_ones_in_a_row() {
        // Checks (+ good, - bad), and where each decides something: H healthy, U unhealthy.
        for (checks, decisions) in [
            ("+", "H"),
            ("-", "U"),
            ("+--", "H.."),
            ("+---", "H..U"),
            ("+--+--", "H....."),
            ("-+", "U."),
            ("-++", "U.H"),
            ("-+-++", "U...H"),
            ("+----++", "H..U..H"),
        ] {
            let mut judge = Judge::new(&check());
            let told: String = checks
                .chars()
                .map(|result| match judge.decides(result == '+') {
                    false => '.',
                    true if result == '+' => 'H',
                    true => 'U',
                })
                .collect();
            assert_eq!(told, decisions, "{checks}");
        }
    }

    fn announced(health: &Health, names: &[&str]) -> Vec<String> {
        let mut tunnels: Vec<_> = names
            .iter()
            .map(|name| proto::AnnouncedTunnel {
                name: (*name).to_owned(),
                ..proto::AnnouncedTunnel::default()
            })
            .collect();
        health.mark(&mut tunnels);
        tunnels.into_iter().map(|tunnel| tunnel.unavailable).collect()
    }

    #[test]
    fn a_tunnel_is_unavailable_until_it_is_known_to_be_well() {
        let (health, metrics) = (Health::default(), metrics());
        let wait = Duration::from_secs(30);
        let tunnels =
            [tunnel("plain", false, Duration::ZERO), tunnel("checked", true, Duration::ZERO)];
        let waiting = [tunnel("waited", false, wait), tunnel("both", true, wait)];
        let all: Vec<_> = tunnels.iter().chain(&waiting).cloned().collect();
        let tasks = health.configure(&all, |_| false, true, &metrics.sidecar);
        assert_eq!(tasks.len(), 3);
        assert_eq!(
            announced(&health, &["plain", "checked", "waited", "both"]),
            [
                "",
                "its first health check has not ended",
                "waiting for the service",
                "waiting for the service"
            ]
        );
        assert!(health.set(&tasks[0], Condition::Healthy, &metrics.sidecar));
        assert!(!health.set(&tasks[0], Condition::Healthy, &metrics.sidecar));
        assert!(health.set(&tasks[1], Condition::Assumed, &metrics.sidecar));
        assert!(health.set(&tasks[2], Condition::Unhealthy("no".into()), &metrics.sidecar));
        assert_eq!(
            announced(&health, &["checked", "waited", "both"]),
            ["", "", "its health check fails: no"]
        );
    }

    #[test]
    fn a_reload_keeps_what_it_does_not_touch() {
        let (health, metrics) = (Health::default(), metrics());
        let plain = |name| tunnel(name, false, Duration::ZERO);
        let checked = |name| tunnel(name, true, Duration::ZERO);
        let old = [checked("same"), checked("changed"), checked("removed"), plain("gets a check")];
        let tasks = health.configure(&old, |_| false, true, &metrics.sidecar);
        for task in &tasks {
            health.set(task, Condition::Unhealthy("no".into()), &metrics.sidecar);
        }
        let mut changed = Tunnel::clone(&old[1]);
        changed.connect_timeout = Duration::from_secs(2);
        let new = [
            checked("same"),
            Arc::new(changed),
            checked("gets a check"),
            checked("new"),
            tunnel("waits", false, Duration::from_secs(30)),
        ];
        let was_served = |name: &str| old.iter().any(|tunnel| &*tunnel.name == name);
        let begun = health.configure(&new, was_served, false, &metrics.sidecar);
        let names: Vec<&str> = begun.iter().map(|task| &*task.tunnel.name).collect();
        // Nothing is waited for after a reload.
        assert_eq!(names, ["changed", "gets a check", "new"]);
        assert_eq!(
            announced(&health, &["same", "changed", "gets a check", "new", "waits"]),
            [
                "its health check fails: no",
                "its health check fails: no",
                "",
                "its first health check has not ended",
                ""
            ]
        );
        // Tasks before the reload: one goes on, the others have ended and change nothing.
        let has_ended = |task: &Task| task.stop.has_changed().is_err();
        assert_eq!(tasks.iter().map(has_ended).collect::<Vec<_>>(), [false, true, true]);
        assert!(health.set(&tasks[0], Condition::Healthy, &metrics.sidecar));
        assert!(!health.set(&tasks[1], Condition::Healthy, &metrics.sidecar));
        assert!(!health.set(&tasks[2], Condition::Healthy, &metrics.sidecar));
        let mut text = String::new();
        metrics.encode(&mut text);
        assert!(text.contains("sidelane_service_healthy{tunnel=\"same\"} 1"), "{text}");
        assert!(text.contains("sidelane_service_healthy{tunnel=\"changed\"} 0"), "{text}");
        assert!(!text.contains("tunnel=\"removed\""), "{text}");
    }

    #[test]
    fn times_are_spread_by_a_tenth_each_way() {
        let second = Duration::from_secs(1);
        assert_eq!(jittered(second, 0), Duration::from_millis(900));
        let most = jittered(second, 99_999_999);
        assert!(most > Duration::from_millis(1_099) && most <= Duration::from_millis(1_100));
        assert_eq!(jittered(Duration::ZERO, 7), Duration::ZERO);
    }

    #[test]
    fn a_reason_is_one_line_of_bounded_length() {
        assert_eq!(cut("a\nb"), "a b");
        assert_eq!(cut(&"ä".repeat(500)).len(), REASON_BYTES_MAX);
    }
}
