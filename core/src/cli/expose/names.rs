//! Subdomains that can be read aloud.

/// Numbers of a name: with the words below 230,400 names. Two of a relay's hundred are the same once in
/// 46 times; the relay refuses the second, which is told.
const NUMBERS: u64 = 225;

const ADJECTIVES: [&str; 32] = [
    "amber", "bold", "brave", "brisk", "calm", "clear", "cool", "crisp", "deep", "early", "fair",
    "fine", "fresh", "gentle", "glad", "golden", "grand", "green", "keen", "kind", "light",
    "lucky", "mild", "noble", "proud", "quick", "quiet", "rapid", "sunny", "swift", "warm", "wise",
];

const NOUNS: [&str; 32] = [
    "badger", "bay", "birch", "brook", "cedar", "cloud", "comet", "cove", "crane", "dune",
    "falcon", "fern", "finch", "fjord", "fox", "harbor", "heron", "lake", "lark", "maple",
    "meadow", "otter", "owl", "pebble", "pine", "raven", "reef", "river", "seal", "spruce", "tide",
    "wren",
];

/// Returns a name for a random number: `calm-otter-42`.
pub(super) fn random(number: u64) -> String {
    let adjective = ADJECTIVES[(number % 32) as usize];
    let noun = NOUNS[(number / 32 % 32) as usize];
    format!("{adjective}-{noun}-{}", number / 1024 % NUMBERS)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_many_and_subdomains() {
        let all: HashSet<String> = (0..1024 * NUMBERS).map(random).collect();
        assert_eq!(all.len() as u64, 1024 * NUMBERS);
        assert!(all.iter().all(|name| {
            crate::config::Match::parse(&crate::config::MatchSpec {
                subdomain: Some(name),
                ..Default::default()
            })
            .is_ok()
        }));
        assert_eq!(random(u64::MAX), random(u64::MAX));
    }
}
