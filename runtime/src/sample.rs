//! Chooses the next token from logits, on the host: one sampler for all devices.
//!
//! The order of filters is that of transformers' `generate`; every one has a value that switches it off:
//!
//! | step | does | off |
//! |---|---|---|
//! | repeat penalty | `l / penalty` for `l > 0`, else `l * penalty`, once for each token among the last `repeat_last_n` | 1, or `repeat_last_n` 0 |
//! | temperature | 0: the largest logit, the lowest id on ties, and no more steps. Else `w = exp((l - max) / temperature)` | 1 |
//! | top-k | keeps the `top_k` largest, lower ids first on ties | 0 |
//! | top-p | keeps the fewest largest whose sum reaches `top_p` of the sum of those that top-k kept | 1 |
//! | min-p | keeps `w >= min_p * (largest w)` | 0 |
//! | draw | proportional to `w` | |
//!
//! (llama.cpp applies its temperature last, so that top-p and min-p see the probabilities of temperature 1.)
//!
//! A seed gives the same tokens from the same logits on every machine: ChaCha8, f64, sums in a stated order, and the
//! `exp` of `libm`, which is not the system's.

use std::cmp::Ordering;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// How to choose. The default is greedy, with everything else off.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// 0 is greedy; finite, not negative.
    pub temperature: f64,
    /// Tokens to choose from; 0 is all.
    pub top_k: usize,
    /// Share of the probability to choose from, above 0 to 1.
    pub top_p: f64,
    /// Least probability, as a share of the largest, 0 to 1.
    pub min_p: f64,
    /// Above 1 makes recent tokens less likely, below 1 more; finite, above 0.
    pub repeat_penalty: f64,
    /// How many tokens are recent; `usize::MAX` is all.
    pub repeat_last_n: usize,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> SamplerOptions {
        SamplerOptions {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            seed: 0,
        }
    }
}

/// Why no token can be chosen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum SampleError {
    /// An option outside its range.
    #[error("{option} is {found}, expected {expected}")]
    Option { option: &'static str, found: f64, expected: &'static str },
    /// NaN or plus infinity: something went wrong before. Minus infinity is a token that cannot be.
    #[error("logit of token {token} is {found}, expected a number")]
    BadLogit { token: usize, found: f32 },
    /// No logits, or all minus infinity.
    #[error("no token is possible: {logits} logits, none above minus infinity")]
    NoCandidate { logits: usize },
}

/// Chooses tokens by [`SamplerOptions`]; holds the state of the random numbers.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    rng: ChaCha8Rng,
    /// Kept between calls for its memory only.
    candidates: Vec<Candidate>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: i32,
    logit: f32,
    /// `exp((logit - max) / temperature)`: 1 for the likeliest.
    weight: f64,
}

impl Sampler {
    /// A sampler at the beginning of its random numbers.
    ///
    /// # Errors
    ///
    /// [`SampleError::Option`] for an option outside its range.
    pub fn new(options: SamplerOptions) -> Result<Sampler, SampleError> {
        let SamplerOptions { temperature, top_k: _, top_p, min_p, repeat_penalty, repeat_last_n: _, seed } =
            options;
        for (option, found, good, expected) in [
            ("temperature", temperature, temperature.is_finite() && 0.0 <= temperature, "0 or more"),
            ("top-p", top_p, 0.0 < top_p && top_p <= 1.0, "above 0, at most 1"),
            ("min-p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1"),
            ("repeat-penalty", repeat_penalty, repeat_penalty.is_finite() && 0.0 < repeat_penalty, "above 0"),
        ] {
            if !good {
                return Err(SampleError::Option { option, found, expected });
            }
        }
        // `seed_from_u64` stretches the seed by a generator of rand's choosing; these bytes are ours.
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        Ok(Sampler { options, rng: ChaCha8Rng::from_seed(bytes), candidates: Vec::new() })
    }

    /// Whether a choice needs logits. If not, it is what the device chooses by itself for `Want::Token`.
    pub fn needs_logits(&self) -> bool {
        self.options.temperature > 0.0 || self.penalizes()
    }

    fn penalizes(&self) -> bool {
        self.options.repeat_penalty != 1.0 && self.options.repeat_last_n > 0
    }

    /// The next token, given its logits and the tokens before it.
    ///
    /// # Errors
    ///
    /// [`SampleError::BadLogit`] or [`SampleError::NoCandidate`].
    pub fn next(&mut self, logits: &[f32], history: &[i32]) -> Result<i32, SampleError> {
        if !self.needs_logits() {
            return greedy(logits);
        }
        check(logits)?;
        self.candidates.clear();
        self.candidates.extend(logits.iter().zip(0..).map(|(&logit, token)| Candidate {
            token,
            logit,
            weight: 0.0,
        }));
        self.penalize(logits, history);
        if self.options.temperature == 0.0 {
            return Ok(self.candidates.iter().min_by(|a, b| likeliest_first(a, b)).expect("checked").token);
        }
        self.keep_top_k();
        self.weigh();
        self.keep_top_p();
        self.candidates.retain(|candidate| candidate.weight >= self.options.min_p);
        Ok(self.draw())
    }

    fn penalize(&mut self, logits: &[f32], history: &[i32]) {
        if !self.penalizes() {
            return;
        }
        let SamplerOptions { repeat_penalty: penalty, repeat_last_n, .. } = self.options;
        for &token in &history[history.len().saturating_sub(repeat_last_n)..] {
            let Some(&logit) = usize::try_from(token).ok().and_then(|token| logits.get(token)) else {
                continue;
            };
            if logit == f32::NEG_INFINITY {
                continue;
            }
            let wide = f64::from(logit);
            let penalized = if logit > 0.0 { wide / penalty } else { wide * penalty };
            // From the model's logit, so a token seen twice is penalized once. What was finite stays so.
            self.candidates[token as usize].logit = (penalized as f32).clamp(f32::MIN, f32::MAX);
        }
    }

    fn keep_top_k(&mut self) {
        let k = self.options.top_k;
        if 0 < k && k < self.candidates.len() {
            sort_front(&mut self.candidates, k);
            self.candidates.truncate(k);
        }
    }

    fn weigh(&mut self) {
        let max = self.candidates.iter().map(|candidate| candidate.logit).fold(f32::NEG_INFINITY, f32::max);
        for candidate in &mut self.candidates {
            candidate.weight =
                libm::exp((f64::from(candidate.logit) - f64::from(max)) / self.options.temperature);
        }
    }

    fn keep_top_p(&mut self) {
        if self.options.top_p == 1.0 {
            return;
        }
        let wanted = self.options.top_p * total(&self.candidates);
        // Sorting a vocabulary takes as long as a small model's step, and few tokens make up most of the sum.
        let (mut sorted, mut sum) = (0, 0.0);
        while sorted < self.candidates.len() {
            let more = (3 * sorted).max(64).min(self.candidates.len() - sorted);
            sort_front(&mut self.candidates[sorted..], more);
            for idx in sorted..sorted + more {
                sum += self.candidates[idx].weight;
                if sum >= wanted {
                    self.candidates.truncate(idx + 1);
                    return;
                }
            }
            sorted += more;
        }
    }

    fn draw(&mut self) -> i32 {
        // 53 bits: every f64 in [0, 1) that is a multiple of 2^-53 is equally likely.
        let uniform = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let at = uniform * total(&self.candidates);
        let mut sum = 0.0;
        let reached = self.candidates.iter().find(|candidate| {
            sum += candidate.weight;
            at < sum
        });
        // `at` is below the total, which is the last `sum` in the same order of additions.
        reached.expect("the likeliest has weight 1").token
    }
}

/// The token with the largest logit, the lowest id on ties.
///
/// # Errors
///
/// [`SampleError::BadLogit`] or [`SampleError::NoCandidate`].
pub fn greedy(logits: &[f32]) -> Result<i32, SampleError> {
    check(logits)?;
    let mut best = 0;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = token;
        }
    }
    Ok(best as i32)
}

fn check(logits: &[f32]) -> Result<(), SampleError> {
    if let Some(token) = logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
        return Err(SampleError::BadLogit { token, found: logits[token] });
    }
    if logits.iter().all(|&logit| logit == f32::NEG_INFINITY) {
        return Err(SampleError::NoCandidate { logits: logits.len() });
    }
    Ok(())
}

fn likeliest_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).expect("no NaN by `check`").then(a.token.cmp(&b.token))
}

/// Brings the `n` likeliest to the front, in order.
fn sort_front(candidates: &mut [Candidate], n: usize) {
    if n < candidates.len() {
        candidates.select_nth_unstable_by(n, likeliest_first);
    }
    candidates[..n].sort_unstable_by(likeliest_first);
}

fn total(candidates: &[Candidate]) -> f64 {
    // Not `sum`, whose order of additions is not promised.
    candidates.iter().fold(0.0, |sum, candidate| sum + candidate.weight)
}
