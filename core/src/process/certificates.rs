//! Certificates that end while the process runs: which are to be told of, and when.
//!
//! Pure but for the log. Those that ACME obtains are renewed, and told of, by their keeper.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::config::tls::{Certificate, lifetime};
use crate::config::{Config, Relays};

/// How often they are looked at.
pub(super) const LOOK: Duration = Duration::from_secs(3600);

const DAY_SECONDS: u64 = 24 * 3600;

/// Which certificates have been told of, and on which day. Holds no more than the configuration does.
#[derive(Debug, Default)]
pub(super) struct Told(HashMap<Key, u64>);

/// Another certificate at the same place is told of anew.
type Key = (Arc<str>, SystemTime);

impl Told {
    /// Logs which of the configuration's certificates end soon or have ended, once a day each.
    pub(super) fn look(&mut self, config: &Config, now: SystemTime) {
        for (certificate, says) in self.due(certificates(config), now) {
            tracing::warn!(
                file = &*certificate.place,
                name = certificate.names.first().map_or("", |name| name),
                "certificate {says}"
            );
        }
    }

    /// Returns those that are to be told of now, and what.
    fn due<'a>(
        &mut self,
        certificates: impl Iterator<Item = &'a Arc<Certificate>>,
        now: SystemTime,
    ) -> Vec<(&'a Arc<Certificate>, String)> {
        let day = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / DAY_SECONDS;
        let (mut due, mut all) = (Vec::new(), HashSet::new());
        for certificate in certificates {
            // What is not valid yet is told at the start and by each reload.
            let Some(says) = lifetime(now, UNIX_EPOCH, certificate.not_after) else { continue };
            let key = (Arc::clone(&certificate.place), certificate.not_after);
            if all.insert(key.clone()) && self.0.insert(key, day) != Some(day) {
                due.push((certificate, says));
            }
        }
        self.0.retain(|key, _| all.contains(key));
        due
    }
}

/// Returns what each end shows.
fn certificates(config: &Config) -> impl Iterator<Item = &Arc<Certificate>> {
    let relay = config.relay.as_ref();
    let listeners = relay.into_iter().flat_map(|relay| &relay.listeners);
    let shown = listeners
        .filter_map(|listener| listener.tls.as_ref())
        .chain(relay.and_then(|relay| relay.tunnel.tls.as_ref()))
        .flat_map(|tls| &tls.certificates);
    let relays = config.sidecar.iter().flat_map(|sidecar| match &sidecar.relays {
        Relays::Listed(relays) => &relays[..],
        Relays::Embedded => &[],
    });
    let dialled = relays
        .filter_map(|relay| relay.tls.as_ref())
        .chain(config.tunnels.iter().filter_map(|tunnel| tunnel.tls.as_ref()))
        .filter_map(|tls| tls.certificate.as_ref());
    shown.chain(dialled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::test_tls::Ca;

    #[test]
    fn a_certificate_is_told_of_once_a_day_from_two_weeks_before_its_end_on() {
        let day = Duration::from_secs(DAY_SECONDS);
        let ca = Ca::new("ca");
        let ended = ca.expired("a.example");
        let end = ended.not_after;
        let all = [ended, ca.certificate("b.example")];
        let mut told = Told::default();
        let mut look = |now: SystemTime| {
            told.due(all.iter(), now).into_iter().map(|(_, says)| says).collect::<Vec<_>>()
        };
        let none: Vec<String> = Vec::new();
        assert_eq!(look(end - day * 15), none);
        assert_eq!(look(end - day * 13), ["ends on 01 Jan 2001, in 13 days"]);
        assert_eq!(look(end - day * 13 + LOOK), none);
        assert_eq!(look(end - day * 12), ["ends on 01 Jan 2001, in 12 days"]);
        assert_eq!(look(end + day), ["ended on 01 Jan 2001, 1 day ago"]);
        assert_eq!(look(end + day + LOOK * 23), none);
    }

    #[test]
    fn another_certificate_at_the_place_is_told_of_anew() {
        let ended = Ca::new("ca").expired("a.example");
        let now = ended.not_after + LOOK;
        let mut told = Told::default();
        let one = std::slice::from_ref(&ended);
        assert_eq!(told.due(one.iter(), now).len(), 1);
        // Gone, and back.
        assert_eq!(told.due([].iter(), now).len(), 0);
        assert!(told.0.is_empty());
        assert_eq!(told.due(one.iter().chain(one), now).len(), 1);
    }

    #[test]
    fn every_end_that_shows_a_certificate_is_looked_at() {
        use crate::config::{Source, parse};
        let directory = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c", "d"] {
            let key = rcgen::KeyPair::generate().unwrap();
            let params = rcgen::CertificateParams::new(vec![format!("{name}.example")]).unwrap();
            let pem = params.self_signed(&key).unwrap().pem();
            std::fs::write(directory.path().join(format!("{name}.crt")), pem).unwrap();
            let key = key.serialize_pem();
            std::fs::write(directory.path().join(format!("{name}.key")), key).unwrap();
        }
        let pair = |name: &str| format!("{{ cert: {name}.crt, key: {name}.key }}");
        let text = format!(
            "version: 1
relay:
  listeners: [{{ name: l, address: \"127.0.0.1:1\", tls: {{ certificates: [{}] }} }}]
  tunnel: {{ address: \"127.0.0.1:2\", token: 0123456789abcdef, tls: {{ certificates: [{}] }} }}
sidecar:
  relays: [{{ address: \"127.0.0.1:3\", tls: {{ certificate: {} }} }}]
tunnels: [{{ name: t, service: \"https://127.0.0.1:4\", tls: {{ certificate: {} }} }}]
",
            pair("a"),
            pair("b"),
            pair("c"),
            pair("d"),
        );
        let source = Source::from_text(&directory.path().join("c.yaml"), text);
        let config = parse(&source, &|_| None).unwrap_or_else(|errors| panic!("{errors}"));
        let names: Vec<&str> = certificates(&config).map(|one| &*one.names[0]).collect();
        assert_eq!(names, ["a.example", "b.example", "c.example", "d.example"]);
    }
}
