//! The level `logits`: what a program says, against a reference.

use crate::judge::{self, Greedy, ReferenceStep, rms};
use crate::reference::{Prompt, Reference};
use ir::DType;
use runtime::device::{DeviceError, Program, Step, Want, feed};

/// What a program's logits came to.
#[derive(Clone, Debug, Default)]
pub struct Logits {
    /// Share of the bound: the largest at a position in f32, of the rms in bf16.
    pub share: f64,
    /// Largest error of a logit.
    pub largest: f64,
    /// Greedy steps at which errors may decide.
    pub near_ties: usize,
    /// Greedy steps.
    pub steps: usize,
    /// Positions.
    pub positions: usize,
    /// Of each logit that the reference knows.
    errors: Vec<f64>,
}

/// Why logits are wrong.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum LogitsFault {
    #[error(
        "prompt {prompt}, position {position}: the logit of token {token} is {found:e}, expected {expected:e} within \
         {bound:e}"
    )]
    Position { prompt: usize, position: usize, token: usize, found: f64, expected: f64, bound: f64 },
    #[error("rms of the errors of all logits is {found:e}, expected at most {bound:e}")]
    Spread { found: f64, bound: f64 },
    #[error(
        "the weights are not the reference's: with them the interpreter's logits are off by {found:e} (rms), and rounding \
         alone by {bound:e}"
    )]
    Weights { found: f64, bound: f64 },
    #[error(
        "prompt {prompt}, greedy step {step}: token {found}, expected {token} (or {second}, {margin:e} below; largest error \
         {largest:e})"
    )]
    Greedy { prompt: usize, step: usize, found: i32, token: i32, second: i32, margin: f64, largest: f64 },
}

impl LogitsFault {
    /// How far beyond the bound it is; a token is right or wrong.
    pub fn share(&self) -> f64 {
        match self {
            LogitsFault::Position { found, expected, bound, .. } => (found - expected).abs() / bound,
            LogitsFault::Spread { found, bound } | LogitsFault::Weights { found, bound } => found / bound,
            LogitsFault::Greedy { .. } => 0.0,
        }
    }
}

/// What came of judging: `Err` inside is a result too.
pub type Judged = Result<Result<(), LogitsFault>, DeviceError>;

impl Logits {
    /// Judges every prompt of a reference, up to the first fault: first all logits, then the greedy tokens, of which the largest
    /// error of a logit says what a near tie is. In bf16 `honest` is the interpreter, which rounds what is stored and nothing
    /// else; `exact`, which does not, says how much that is, so that other weights than the reference's do not widen the bound.
    ///
    /// # Errors
    ///
    /// What a device says.
    pub fn judge(
        &mut self,
        program: &mut dyn Program,
        [honest, exact]: [&mut dyn Program; 2],
        reference: &Reference,
        dtype: DType,
    ) -> Judged {
        let mut of_honest = Logits::default();
        let mut rounding = Vec::new();
        for (number, prompt) in reference.prompts.iter().enumerate() {
            let found = all_logits(program, &prompt.tokens, None)?;
            if let Err(fault) = self.prompt(number, prompt, &found, program.vocab(), dtype) {
                return Ok(Err(fault));
            }
            if dtype != DType::F32 {
                let found = all_logits(honest, &prompt.tokens, None)?;
                let unrounded = all_logits(exact, &prompt.tokens, None)?;
                rounding.extend(found.iter().zip(&unrounded).map(|(a, b)| f64::from(a - b)));
                if let Err(fault) = of_honest.prompt(number, prompt, &found, honest.vocab(), dtype) {
                    return Ok(Err(fault));
                }
            }
        }
        if dtype != DType::F32 {
            let (found, bound) = (rms(of_honest.errors.iter().copied()), judge::weights_bound(rms(rounding)));
            if found > bound {
                return Ok(Err(LogitsFault::Weights { found, bound }));
            }
            if let Err(fault) = self.spread(&of_honest) {
                return Ok(Err(fault));
            }
        }
        for (number, prompt) in reference.prompts.iter().enumerate() {
            if let Err(fault) = self.greedy(number, [program, exact], prompt)? {
                return Ok(Err(fault));
            }
        }
        Ok(Ok(()))
    }

    /// Judges the logits of a prompt.
    ///
    /// # Errors
    ///
    /// The first position with a logit that is no number or, in f32, outside of its bound.
    pub fn prompt(
        &mut self,
        number: usize,
        prompt: &Prompt,
        logits: &[f32],
        vocab: usize,
        dtype: DType,
    ) -> Result<(), LogitsFault> {
        for (position, (known, found)) in prompt.logits.iter().zip(logits.chunks_exact(vocab)).enumerate() {
            // Where the reference keeps the largest logits only, ours stand for the rest.
            let size = match prompt.whole {
                true => rms(known.iter().map(|k| k.1)),
                false => rms(found.iter().map(|&x| f64::from(x))),
            };
            let bound = match dtype {
                DType::F32 => judge::f32_bound(prompt.f32_error, size),
                _ => f64::INFINITY,
            };
            for &(token, expected) in known {
                let found = f64::from(found[token]);
                let error = (found - expected).abs();
                if !error.is_finite() || error > bound {
                    return Err(LogitsFault::Position {
                        prompt: number,
                        position,
                        token,
                        found,
                        expected,
                        bound,
                    });
                }
                self.largest = self.largest.max(error);
                self.share = self.share.max(error / bound);
                self.errors.push(error);
            }
            self.positions += 1;
        }
        Ok(())
    }

    /// Goes through the reference's greedy continuation, as far as the context reaches. Where a token is neither of the two that
    /// the reference knows, `exact`, a program without rounding, says how far it is below the best.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn greedy(
        &mut self,
        number: usize,
        [program, exact]: [&mut dyn Program; 2],
        prompt: &Prompt,
    ) -> Judged {
        let mut state = program.state()?;
        let room = program.context() - prompt.tokens.len();
        let mut chosen = feed(program, &prompt.tokens, None, Want::Token, &mut state)?.token;
        for (step, &reference) in prompt.greedy.iter().enumerate().take(room) {
            let bad = DeviceError::BadOutputs { want: Want::Token, token: false, logits: 0 };
            let found = chosen.ok_or(bad)?;
            let mut judged = judge::greedy(reference, found, self.largest);
            if judged == Greedy::Wrong && found != reference.second {
                let mut state = exact.state()?;
                let before = prompt.greedy[..step].iter().map(|reference| reference.token);
                let tokens: Vec<i32> = prompt.tokens.iter().copied().chain(before).collect();
                let logits = feed(exact, &tokens, None, Want::Logits, &mut state)?.logits;
                let below = f64::from(logits[reference.token as usize] - logits[found as usize]);
                // A third token is no nearer than the second.
                let third = ReferenceStep { second: found, margin: below.max(reference.margin), ..reference };
                judged = judge::greedy(third, found, self.largest);
            }
            match judged {
                Greedy::Equal => {}
                Greedy::NearTie => self.near_ties += 1,
                Greedy::Wrong => {
                    let (ReferenceStep { token, second, margin }, largest) = (reference, self.largest);
                    let prompt = number;
                    return Ok(Err(LogitsFault::Greedy {
                        prompt,
                        step,
                        found,
                        token,
                        second,
                        margin,
                        largest,
                    }));
                }
            }
            self.steps += 1;
            chosen = program.run(&Step { tokens: &[reference.token], want: Want::Token }, &mut state)?.token;
        }
        Ok(Ok(()))
    }

    /// Judges all errors together by those of the interpreter, as bf16 is.
    ///
    /// # Errors
    ///
    /// When their rms is outside of its bound.
    pub fn spread(&mut self, honest: &Logits) -> Result<(), LogitsFault> {
        let found = rms(self.errors.iter().copied());
        let bound = judge::bf16_bound(rms(honest.errors.iter().copied()));
        self.share = found / bound;
        if found <= bound { Ok(()) } else { Err(LogitsFault::Spread { found, bound }) }
    }
}

/// Logits of every position, in steps of at most `chunk` tokens.
///
/// # Errors
///
/// What the device says.
pub fn all_logits(
    program: &mut dyn Program,
    tokens: &[i32],
    chunk: Option<usize>,
) -> Result<Vec<f32>, DeviceError> {
    let mut state = program.state()?;
    Ok(feed(program, tokens, chunk, Want::AllLogits, &mut state)?.logits)
}
