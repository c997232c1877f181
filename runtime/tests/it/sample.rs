//! The sampler, by numbers worked out by hand and by frequencies.

use proptest::prelude::*;
use runtime::sample::{SampleError, Sampler, SamplerOptions, greedy};

/// Probabilities 0.1, 0.4, 0.2, 0.3, as logits.
fn logits() -> Vec<f32> {
    [0.1f32, 0.4, 0.2, 0.3].map(f32::ln).to_vec()
}

fn warm() -> SamplerOptions {
    SamplerOptions { temperature: 1.0, seed: 7, ..SamplerOptions::default() }
}

fn draw(options: SamplerOptions, logits: &[f32], history: &[i32], draws: usize) -> Vec<i32> {
    let mut sampler = Sampler::new(options).unwrap();
    (0..draws).map(|_| sampler.next(logits, history).unwrap()).collect()
}

/// Draws 20 000 times and holds each token's share against `expected`, within five standard deviations.
fn check_shares(options: SamplerOptions, history: &[i32], expected: [f64; 4]) {
    let draws = 20_000;
    let tokens = draw(options.clone(), &logits(), history, draws);
    for (token, p) in expected.into_iter().enumerate() {
        let count = tokens.iter().filter(|&&drawn| drawn == token as i32).count();
        let deviation = (p * (1.0 - p) * draws as f64).sqrt();
        let off = (count as f64 - p * draws as f64).abs();
        assert!(off <= 5.0 * deviation, "{options:?}: token {token}: {count} of {draws}, expected {p}");
    }
}

#[test]
fn greedy_takes_the_lowest_of_equals() {
    assert_eq!(greedy(&[1.0, 3.0, 3.0, 2.0]), Ok(1));
    assert_eq!(greedy(&[f32::NEG_INFINITY, -5.0, -5.0]), Ok(1));
    assert_eq!(draw(SamplerOptions::default(), &[1.0, 3.0, 3.0], &[], 2), [1, 1]);
    // -0 and 0 are equal.
    assert_eq!(greedy(&[-0.0, 0.0]), Ok(0));
}

#[test]
fn only_plain_greedy_needs_no_logits() {
    let needs = |options| Sampler::new(options).unwrap().needs_logits();
    let greedy = SamplerOptions::default();
    assert!(!needs(greedy.clone()));
    assert!(!needs(SamplerOptions { top_k: 5, top_p: 0.5, min_p: 0.5, ..greedy.clone() }));
    assert!(!needs(SamplerOptions { repeat_penalty: 1.1, repeat_last_n: 0, ..greedy.clone() }));
    assert!(needs(SamplerOptions { repeat_penalty: 1.1, ..greedy.clone() }));
    assert!(needs(SamplerOptions { temperature: 0.1, ..greedy }));
}

#[test]
fn shares_are_the_probabilities() {
    check_shares(warm(), &[], [0.1, 0.4, 0.2, 0.3]);
    // p^2, over 0.30.
    check_shares(
        SamplerOptions { temperature: 0.5, ..warm() },
        &[],
        [1.0 / 30.0, 16.0 / 30.0, 4.0 / 30.0, 9.0 / 30.0],
    );
    check_shares(SamplerOptions { top_k: 3, ..warm() }, &[], [0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]);
    // 0.4 + 0.3 reaches 0.65, 0.4 alone does not.
    check_shares(SamplerOptions { top_p: 0.65, ..warm() }, &[], [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
    // After top-k, the sum is 0.7: 0.4 is more than half of it.
    check_shares(SamplerOptions { top_k: 2, top_p: 0.55, ..warm() }, &[], [0.0, 1.0, 0.0, 0.0]);
    // Two equals: 1 of the largest is not below 1 of it.
    let mut both = draw(SamplerOptions { min_p: 1.0, ..warm() }, &[2.0, 2.0, 1.9], &[], 100);
    both.sort();
    both.dedup();
    assert_eq!(both, [0, 1]);
    // 0.4 * 0.4 = 0.16.
    check_shares(SamplerOptions { min_p: 0.4, ..warm() }, &[], [0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]);
    // Temperature comes first: with p^2, 0.04 is 0.25 of the largest.
    check_shares(
        SamplerOptions { temperature: 0.5, min_p: 0.3, ..warm() },
        &[],
        [0.0, 16.0 / 25.0, 0.0, 9.0 / 25.0],
    );
}

#[test]
fn the_penalty_counts_once_and_only_recent_tokens() {
    // A logit ln p becomes 2 ln p: p^2. Token 1: 0.16; the sum is 0.76.
    let options = SamplerOptions { repeat_penalty: 2.0, ..warm() };
    let expected = [0.1 / 0.76, 0.16 / 0.76, 0.2 / 0.76, 0.3 / 0.76];
    check_shares(options.clone(), &[1, 1, 1], expected);
    check_shares(SamplerOptions { repeat_last_n: 1, ..options.clone() }, &[3, 0, 1], expected);
    check_shares(SamplerOptions { repeat_last_n: usize::MAX, ..options }, &[1], expected);
}

#[test]
fn the_penalty_divides_positive_logits_and_works_when_greedy() {
    let options = SamplerOptions { repeat_penalty: 2.0, ..SamplerOptions::default() };
    let next = |logits: &[f32], history: &[i32]| draw(options.clone(), logits, history, 1)[0];
    assert_eq!(next(&[3.0, 2.0], &[]), 0);
    // 1.5 and 2.
    assert_eq!(next(&[3.0, 2.0], &[0]), 1);
    // -2 and -1.5.
    assert_eq!(next(&[-1.0, -1.5], &[0]), 1);
    // Tokens that the model does not have are passed over.
    assert_eq!(next(&[3.0, 2.0], &[-1, 2, i32::MAX]), 0);
}

#[test]
fn the_harshest_penalties_leave_numbers() {
    for repeat_penalty in [f64::MIN_POSITIVE, f64::MAX] {
        for sign in [-1.0, 1.0] {
            let options = SamplerOptions { repeat_penalty, ..warm() };
            let logits = [f32::NEG_INFINITY, sign * f32::MAX, sign * f32::MAX];
            assert!(draw(options, &logits, &[0, 1, 2], 20).iter().all(|&token| token != 0));
        }
    }
}

#[test]
fn ties_at_a_limit_go_to_the_lower_id() {
    let equal = [1.0; 8];
    for options in [SamplerOptions { top_k: 2, ..warm() }, SamplerOptions { top_p: 0.25, ..warm() }] {
        let mut tokens = draw(options, &equal, &[], 100);
        tokens.sort();
        tokens.dedup();
        assert_eq!(tokens, [0, 1]);
    }
}

#[test]
fn what_cannot_be_is_never_drawn() {
    let logits = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY, -1e30];
    assert!(draw(warm(), &logits, &[], 1000).iter().all(|&token| token == 1));
    let cold = SamplerOptions { temperature: f64::MIN_POSITIVE, ..warm() };
    assert!(draw(cold, &[1.0, 1.001], &[], 100).iter().all(|&token| token == 1));
}

#[test]
fn bad_logits_are_errors() {
    for options in [SamplerOptions::default(), warm()] {
        let mut sampler = Sampler::new(options).unwrap();
        let mut next = |logits: &[f32]| sampler.next(logits, &[]).unwrap_err();
        assert_eq!(next(&[0.0, f32::NAN]).to_string(), "logit of token 1 is NaN, expected a number");
        assert_eq!(next(&[f32::INFINITY]), SampleError::BadLogit { token: 0, found: f32::INFINITY });
        assert_eq!(next(&[f32::NEG_INFINITY; 2]), SampleError::NoCandidate { logits: 2 });
        assert_eq!(next(&[]), SampleError::NoCandidate { logits: 0 });
    }
}

#[test]
fn bad_options_are_errors() {
    let off = SamplerOptions::default();
    for (options, name) in [
        (SamplerOptions { temperature: -1.0, ..off.clone() }, "temperature"),
        (SamplerOptions { temperature: f64::NAN, ..off.clone() }, "temperature"),
        (SamplerOptions { top_p: 0.0, ..off.clone() }, "top-p"),
        (SamplerOptions { top_p: 1.1, ..off.clone() }, "top-p"),
        (SamplerOptions { min_p: 1.1, ..off.clone() }, "min-p"),
        (SamplerOptions { repeat_penalty: 0.0, ..off }, "repeat-penalty"),
    ] {
        assert!(matches!(Sampler::new(options), Err(SampleError::Option { option, .. }) if option == name));
    }
}

/// If this changes, seeds no longer give the texts that they gave. Worked out by another program, from RFC 8439's rounds
/// (8 of them; key: the seed, little-endian, and zeros; block counter of 64 bits).
#[test]
fn a_seed_gives_these_tokens_for_ever() {
    let logits: Vec<f32> = (0..1000).map(|i| (i * 37 % 101) as f32 / 10.0).collect();
    let options = SamplerOptions { temperature: 0.8, top_p: 0.9, seed: 42, ..SamplerOptions::default() };
    assert_eq!(draw(options.clone(), &logits, &[], 8), [999, 393, 655, 221, 835, 535, 655, 191]);
    assert_eq!(draw(SamplerOptions { seed: 43, ..options }, &logits, &[], 4), [723, 827, 248, 868]);
}

/// Top-p as its definition says it: sort all, add up, cut.
fn plain_top_p(logits: &[f32], top_p: f64) -> Vec<i32> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let weights: Vec<f64> = order.iter().map(|&token| f64::from(logits[token]).exp()).collect();
    let wanted = top_p * weights.iter().sum::<f64>();
    let mut sum = 0.0;
    let mut kept = Vec::new();
    for (token, weight) in order.into_iter().zip(weights) {
        kept.push(token as i32);
        sum += weight;
        // A hair off: sums here are in another order.
        if sum >= wanted * (1.0 + 1e-9) {
            break;
        }
    }
    kept
}

proptest! {
    #[test]
    fn top_p_draws_from_what_its_definition_keeps(
        logits in prop::collection::vec((-80i32..80).prop_map(|l| l as f32 / 20.0), 1..700),
        top_p in 0.01..1.0f64,
        seed in any::<u64>(),
    ) {
        let kept = plain_top_p(&logits, top_p);
        for token in draw(SamplerOptions { top_p, seed, ..warm() }, &logits, &[], 20) {
            prop_assert!(kept.contains(&token), "{token} is not in {kept:?}");
        }
    }
}
