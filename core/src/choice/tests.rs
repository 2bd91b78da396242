use super::*;

const SECOND: u64 = 1_000_000_000;

/// The same numbers in each run.
fn randoms(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

struct Stage {
    draw: Draw,
    standings: Vec<Arc<Standing>>,
    able: Vec<bool>,
}

impl Stage {
    /// All have been there for long.
    fn new(weights: &[u32]) -> Self {
        let standings = weights.iter().map(|_| Arc::new(Standing::new(0))).collect();
        Self { draw: Draw::new(weights.to_vec()), standings, able: vec![true; weights.len()] }
    }

    fn choose(&self, now: u64, random: impl FnMut() -> u64) -> Option<usize> {
        self.draw.choose(now, random, |at| &self.standings[at], |at| self.able[at])
    }

    /// How many of 10,000 exchanges each gets, none of which is in flight when the next comes.
    fn shares(&self, now: u64) -> Vec<usize> {
        let mut counts = vec![0; self.standings.len()];
        let mut random = randoms(7);
        for _ in 0..10_000 {
            if let Some(place) = self.choose(now, &mut random) {
                counts[place] += 1;
            }
        }
        counts
    }
}

fn is_near(counts: &[usize], expected: &[usize]) {
    let near = |(a, b): (&usize, &usize)| a.abs_diff(*b) <= 250;
    assert!(counts.iter().zip(expected).all(near), "{counts:?}, expected {expected:?}");
}

#[test]
fn each_gets_its_share_by_weight() {
    let table: &[(&[u32], &[usize])] = &[
        (&[1], &[10_000]),
        (&[1, 1], &[5_000, 5_000]),
        (&[1, 3], &[2_500, 7_500]),
        (&[100, 1], &[9_900, 100]),
        (&[2, 1, 1], &[5_000, 2_500, 2_500]),
    ];
    assert!(!table.is_empty());
    for (weights, expected) in table {
        is_near(&Stage::new(weights).shares(100 * SECOND), expected);
    }
    assert_eq!(Stage::new(&[]).choose(0, randoms(1)), None);
}

#[test]
fn draws_are_by_weight_whatever_the_weights() {
    let table: &[&[u32]] = &[&[1], &[1, 1], &[3, 5, 7], &[1, 100], &[10, 1, 1, 1, 7, 1, 100]];
    assert!(!table.is_empty());
    for weights in table {
        let draw = Draw::new(weights.to_vec());
        let sum: u32 = weights.iter().sum();
        let mut counts = vec![0_usize; weights.len()];
        let mut random = randoms(3);
        for _ in 0..100_000 {
            counts[draw.place(random()).expect("a place")] += 1;
        }
        for (weight, count) in weights.iter().zip(&counts) {
            let expected = 100_000 * *weight as usize / sum as usize;
            assert!(count.abs_diff(expected) <= 700, "{weights:?}: {counts:?}");
        }
    }
}

#[test]
fn of_two_the_one_with_fewer_in_flight_takes_it() {
    let stage = Stage::new(&[1, 1, 1, 1]);
    let mut held = Vec::new();
    let mut random = randoms(5);
    for _ in 0..4_000 {
        let place = stage.choose(100 * SECOND, &mut random).expect("all can");
        held.push(InFlight::both(&stage.standings[place]));
    }
    let counts: Vec<_> = stage.standings.iter().map(|one| one.in_flight()).collect();
    let spread = counts.iter().max().unwrap() - counts.iter().min().unwrap();
    assert!(spread <= 12, "{counts:?}: blind draws differ by about a hundred");
    drop(held);
    assert!(stage.standings.iter().all(|one| one.in_flight() == 0));
    // One that is stuck gets next to nothing.
    let stage = Stage::new(&[1, 1]);
    let _stuck: Vec<_> = (0..50).map(|_| InFlight::both(&stage.standings[0])).collect();
    let shares = stage.shares(100 * SECOND);
    assert!(shares[0] < 400, "{shares:?}");
}

#[test]
fn an_exchange_is_in_flight_until_both_halves_are_gone() {
    let standing = Arc::new(Standing::new(0));
    let (send, recv) = InFlight::both(&standing);
    assert_eq!((standing.in_flight(), standing.opened()), (1, 1));
    drop(send);
    assert_eq!(standing.in_flight(), 1);
    drop(recv);
    assert_eq!(standing.in_flight(), 0);
}

#[test]
fn one_that_has_just_come_gets_a_share_that_grows() {
    let mut stage = Stage::new(&[1, 1]);
    stage.standings[1] = Arc::new(Standing::new(100 * SECOND));
    let at = |seconds: u64| stage.shares((100 + seconds) * SECOND)[1];
    is_near(&[at(0), at(5), at(10)], &[590, 3_330, 5_000]);
    // Where all have just come they share alike.
    stage.standings[0] = Arc::new(Standing::new(100 * SECOND));
    is_near(&stage.shares(100 * SECOND), &[5_000, 5_000]);
    // By their weights, and by what they have in flight.
    let mut stage = Stage::new(&[1, 4]);
    stage.standings = vec![Arc::new(Standing::new(0)), Arc::new(Standing::new(0))];
    is_near(&stage.shares(0), &[2_000, 8_000]);
    let _stuck: Vec<_> = (0..50).map(|_| InFlight::both(&stage.standings[1])).collect();
    assert!(stage.shares(0)[1] < 4_500, "{:?}", stage.shares(0));
}

#[test]
fn those_that_cannot_take_it_are_left_out_however_many() {
    let mut stage = Stage::new(&[1; 50]);
    stage.able = (0..50).map(|place| place == 33).collect();
    assert_eq!(stage.shares(100 * SECOND)[33], 10_000);
    stage.able[33] = false;
    assert_eq!(stage.choose(100 * SECOND, randoms(1)), None);
}

#[test]
fn failures_in_a_row_leave_one_aside_longer_each_time() {
    let standing = Standing::new(0);
    let mut now = 1_000 * SECOND;
    for _ in 0..100 {
        // Something in between, and it is not in a row.
        assert!(!standing.failed());
        standing.succeeded();
    }
    let mut times = Vec::new();
    for _ in 0..40 {
        let failures = (1..).find(|_| standing.failed());
        assert_eq!(failures, Some(FAILURES_MAX));
        let time = standing.eject(now);
        assert!(standing.is_ejected(now) && !standing.is_back(now));
        now += u64::try_from(time.as_nanos()).unwrap();
        assert!(!standing.is_ejected(now));
        assert!(standing.is_back(now) && !standing.is_back(now), "told once");
        times.push(time.as_secs());
    }
    assert_eq!((&times[..3], times[29], times[39]), (&[1, 2, 3][..], 30, 30));
    now += 61 * SECOND;
    assert_eq!(standing.eject(now), EJECTION, "after a long good time");
}

#[test]
fn never_more_than_half_are_left_aside() {
    let table =
        [(0, 1, false), (0, 2, true), (1, 2, false), (0, 3, true), (1, 3, false), (1, 4, true)];
    for (ejected, all, expected) in table {
        assert_eq!(may_eject(ejected, all), expected, "{ejected} of {all}");
    }
}

#[test]
fn one_that_is_left_aside_takes_what_nobody_else_can() {
    let mut stage = Stage::new(&[1, 1]);
    let now = 100 * SECOND;
    stage.standings[0].eject(now);
    assert_eq!(stage.shares(now), [0, 10_000]);
    stage.able[1] = false;
    assert_eq!(stage.shares(now), [10_000, 0]);
    stage.able[1] = true;
    stage.standings[0].readmit(now);
    assert!(stage.shares(now)[0] > 300, "it begins slowly");
}
