//! What it costs to choose a sidecar for an exchange: must not grow with how many there are. Beside it, what
//! the simplest choice costs: each in turn.

#![allow(missing_docs, reason = "a bench's names say what they measure")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use divan::{Bencher, black_box};
use sidelane::choice::{Draw, InFlight, Standing};

const SIDECARS: [usize; 4] = [1, 2, 10, 1_000];

const SECOND: u64 = 1_000_000_000;

fn main() {
    divan::main();
}

/// As the relay draws.
fn randoms() -> impl FnMut() -> u64 {
    let mut state = 7_u64;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

fn standings(count: usize) -> Vec<Arc<Standing>> {
    (0..count).map(|_| Arc::new(Standing::new(0))).collect()
}

#[divan::bench(args = SIDECARS)]
fn in_turn(bencher: Bencher<'_, '_>, count: usize) {
    let turn = AtomicUsize::new(0);
    bencher.bench(|| turn.fetch_add(1, Ordering::Relaxed) % black_box(count));
}

fn choose(bencher: Bencher<'_, '_>, count: usize, now: u64) {
    let (draw, standings, mut random) = (Draw::new(vec![1; count]), standings(count), randoms());
    bencher.bench_local(|| {
        draw.choose(black_box(now), &mut random, |place| &*standings[place], |_| true)
    });
}

/// All have been there for long.
#[divan::bench(args = SIDECARS)]
fn of_two_drawn(bencher: Bencher<'_, '_>, count: usize) {
    choose(bencher, count, 100 * SECOND);
}

/// All have just come: most draws are thrown away.
#[divan::bench(args = SIDECARS)]
fn of_two_drawn_in_slow_start(bencher: Bencher<'_, '_>, count: usize) {
    choose(bencher, count, SECOND);
}

/// Chosen and counted, as an exchange is from its begin to its end.
#[divan::bench(args = SIDECARS)]
fn chosen_and_counted(bencher: Bencher<'_, '_>, count: usize) {
    let (draw, standings, mut random) = (Draw::new(vec![1; count]), standings(count), randoms());
    bencher.bench_local(|| {
        let chosen =
            draw.choose(black_box(100 * SECOND), &mut random, |place| &*standings[place], |_| true);
        chosen.map(|place| InFlight::both(&standings[place]))
    });
}
