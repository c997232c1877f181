//! Ways to damage files and texts at random.

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// One way to damage a file; places are shares of its length.
#[derive(Clone, Debug)]
pub enum Damage {
    /// Changes bits of one byte.
    Flip(f64, u8),
    /// Puts a number that readers must distrust over eight bytes.
    Number(f64, u64),
    /// Puts another number over the digits that come next.
    Digits(f64, &'static str),
    /// Cuts the rest off.
    Cut(f64),
    /// Takes bytes out.
    Remove(f64, usize),
    /// Puts a piece of the file somewhere else.
    Splice(f64, f64, usize),
}

/// Numbers at the edges of what types hold, as text.
const NUMBERS: [&str; 12] = [
    "0",
    "1",
    "2",
    "7",
    "-1",
    "64",
    "65537",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "1e400",
];

/// Damages, most of them at the beginning.
pub fn damage() -> impl Strategy<Value = Damage> {
    let share = || 0.0..1.0f64;
    let number = prop_oneof![Just(0), Just(1), Just(u64::MAX), Just(1 << 63), Just(1 << 32), 0..300u64];
    // Most changes hit the beginning, where headers are.
    let place = || prop_oneof![share(), share().prop_map(|x| x / 10.0), share().prop_map(|x| x / 80.0)];
    prop_oneof![
        4 => (place(), 1..=255u8).prop_map(|(at, bits)| Damage::Flip(at, bits)),
        2 => (place(), number).prop_map(|(at, number)| Damage::Number(at, number)),
        2 => (share(), prop::sample::select(&NUMBERS)).prop_map(|(at, number)| Damage::Digits(at, number)),
        1 => share().prop_map(Damage::Cut),
        1 => (place(), 1..40usize).prop_map(|(at, n)| Damage::Remove(at, n)),
        1 => (place(), place(), 1..200usize).prop_map(|(from, to, n)| Damage::Splice(from, to, n)),
    ]
}

/// What `right` becomes.
pub fn damaged(right: &[u8], damages: &[Damage]) -> Vec<u8> {
    let mut bytes = right.to_vec();
    for damage in damages {
        if bytes.is_empty() {
            break;
        }
        let at = |share: f64, bytes: &[u8]| (share * bytes.len() as f64) as usize;
        let end = |at: usize, n: usize, bytes: &[u8]| (at + n).min(bytes.len());
        match *damage {
            Damage::Flip(share, bits) => {
                let at = at(share, &bytes);
                bytes[at] ^= bits;
            }
            Damage::Number(share, number) => {
                let at = at(share, &bytes);
                let end = end(at, 8, &bytes);
                bytes[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
            }
            Damage::Digits(share, number) => {
                let from = at(share, &bytes);
                let begin =
                    bytes[from..].iter().position(u8::is_ascii_digit).map_or(bytes.len(), |n| from + n);
                let digits = bytes[begin..].iter().take_while(|b| b.is_ascii_digit()).count();
                bytes.splice(begin..begin + digits, number.bytes());
            }
            Damage::Cut(share) => bytes.truncate(at(share, &bytes)),
            Damage::Remove(share, n) => {
                let at = at(share, &bytes);
                bytes.drain(at..end(at, n, &bytes));
            }
            Damage::Splice(from, to, n) => {
                let (from, to) = (at(from, &bytes), at(to, &bytes));
                let piece = bytes[from..end(from, n, &bytes)].to_vec();
                bytes.splice(to..to, piece);
            }
        }
    }
    bytes
}

/// So many cases, unless `PROPTEST_CASES` says otherwise.
pub fn config(cases: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { cases };
    // No file of failures: cases are the same in every run, so a failure comes again by itself.
    ProptestConfig { cases, failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..default }
}

/// No small file asks for much memory. The most that this process has ever mapped, touched or not, stays below.
pub fn check_memory(most_bytes: u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmPeak:")?.trim().strip_suffix(" kB")?.parse().ok());
    let bytes = 1024 * peak.unwrap_or(0_u64);
    assert!(bytes < most_bytes, "{bytes} bytes were mapped");
}
