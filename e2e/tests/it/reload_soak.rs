//! Reloads under load, again and again: nothing is lost and nothing is left behind.
//!
//! `SIDELANE_SOAK_RELOADS` says how many (`cargo soak` sets it); few by default, so that CI stays short.

use std::io;
use std::sync::{Arc, Mutex};

use sidelane_e2e::load::Load;
use sidelane_e2e::process::{Route, Setup, Sidelane};
use sidelane_e2e::service::{Connection, Service};
use sidelane_e2e::stage::get;
use sidelane_e2e::wait;

/// Reloads by default.
const RELOADS: u64 = 100;

/// Answers between two reloads, of each load.
const ANSWERS_BETWEEN: u64 = 5;

/// Reloads before anything is measured: pools, caches and allocators are filled by then, and every
/// kind of edit has been made twice.
const WARM_UP: u64 = 20;

/// What resident memory may grow by, in bytes: the allocator's own changes of mind, and what one
/// plugin generation more holds. A leak of 40 KiB per reload is found by 100 reloads, one of 4 KiB by
/// 1,000.
const GROWTH_MAX: u64 = 4 * 1024 * 1024;

/// Times that so many reloads are made, at most: an allocator that was not full after the warm-up is so
/// after the first of them; what leaks grows with each.
const SPANS_MAX: u64 = 4;

/// Answers without remembering what came.
fn answer(connection: &mut Connection) -> io::Result<()> {
    connection.stop_recording();
    let mut head = Vec::new();
    loop {
        let bytes = connection.some()?;
        if bytes.is_empty() {
            return Ok(());
        }
        head.extend_from_slice(&bytes);
        if head.ends_with(b"\r\n\r\n") {
            head.clear();
            connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
    }
}

/// The `n`th file. Each next one adds or removes routes, changes a tunnel, moves a listener, and
/// changes a plugin's block, by turns; `api` by the listener `web` is always there.
fn edition(setup: &Setup, n: u64) -> String {
    let mut setup = setup.clone();
    let is = |part: u64| (n >> part) & 1 == 1;
    if is(0) {
        setup.routes.extend((0..50).map(|n| Route::new(&format!("r{n}"), "other")));
    }
    if is(1) {
        setup.tunnels[1].1.set_port(9);
    }
    if is(3) {
        setup.http_config = "{ idle_timeout: 50s }".to_owned();
    }
    let ip = if is(2) { "127.0.0.2" } else { "127.0.0.1" };
    let web = "    - { name: web, address: \"127.0.0.1:0\" }\n";
    let moves = format!("{web}    - {{ name: moves, address: \"{ip}:0\" }}\n");
    setup.both().replace(web, &moves)
}

#[test]
fn reloads_under_load_lose_and_leak_nothing() {
    let reloads = std::env::var("SIDELANE_SOAK_RELOADS")
        .map_or(RELOADS, |text| text.parse().expect("SIDELANE_SOAK_RELOADS is a number"));
    let service = Service::start(answer);
    let setup = Setup::of(service.address()).tunnel("other", service.address());
    let sidelane = Sidelane::start("sidelane", &edition(&setup, 0));
    let web = Arc::new(Mutex::new(sidelane.web()));
    let moves = Arc::new(Mutex::new(sidelane.listener("moves")));
    let loads = [
        Load::keeping(Arc::clone(&web), get("/")),
        Load::keeping(Arc::clone(&moves), get("/")),
        Load::connecting(web, get("/")),
    ];
    let mut before = (0, 0);
    let mut spans = 0;
    for n in 1..=WARM_UP + SPANS_MAX * reloads {
        if loads.iter().any(Load::has_failed) {
            break;
        }
        loads.iter().for_each(|load| load.goes_on(ANSWERS_BETWEEN));
        sidelane.rewrite(&edition(&setup, n));
        let (status, said) = sidelane.reload();
        assert_eq!(status, 200, "reload {n}: {said}");
        *moves.lock().unwrap() = sidelane.listener_now("moves").expect("the listener is there");
        if n >= WARM_UP && (n - WARM_UP).is_multiple_of(reloads) {
            let now = (settled(&sidelane), sidelane.memory_resident());
            if n > WARM_UP && now.1 <= before.1 + GROWTH_MAX {
                break;
            }
            spans = (n - WARM_UP) / reloads + 1;
            if spans <= SPANS_MAX {
                before = now;
            }
        }
    }
    let answers: Vec<_> =
        loads.into_iter().map(|load| load.end().expect("no request fails")).collect();
    let after = (settled(&sidelane), sidelane.memory_resident());
    let good = sidelane.metric("sidelane_config_reloads_total", &["result=\"success\""]);
    let bad = sidelane.metric("sidelane_config_reloads_total", &["result=\"failure\""]);
    let generations = |state: &str| {
        let state = format!("state=\"{state}\"");
        sidelane.metric("sidelane_plugin_generations", &[&state]).unwrap_or_default()
    };
    println!(
        "soak: {} exchanges in all, {reloads} reloads (span {spans}, after {WARM_UP} to warm up), 0 errors; \
         descriptors {} before, {} after; resident {} KiB before, {} KiB after; \
         plugin generations {} current, {} draining",
        answers.iter().sum::<u64>(),
        before.0,
        after.0,
        before.1 / 1024,
        after.1 / 1024,
        generations("current"),
        generations("draining"),
    );
    assert_eq!(bad, Some(0.0));
    assert!(good.is_some_and(|good| good > reloads as f64), "{good:?}");
    // As many loads' connections, the service's, and a few that are on their way out.
    assert!(after.0 <= before.0 + 8, "descriptors: {} before, {} after", before.0, after.0);
    assert!(after.1 <= before.1 + GROWTH_MAX, "memory: {} before, {} after", before.1, after.1);
}

/// Waits until the generations that were replaced are gone, and returns the descriptors then.
fn settled(sidelane: &Sidelane) -> usize {
    wait::until("the end of replaced generations", || {
        let draining = sidelane.metric("sidelane_plugin_generations", &["state=\"draining\""]);
        (draining.unwrap_or_default() == 0.0).then_some(())
    });
    sidelane.descriptors()
}
