//! The generation loop: a prompt in, text out as it comes. Written once, over any [`Program`].

use std::ops::ControlFlow;
use std::time::Instant;

use crate::device::{DeviceError, Program, State, StepOutputs, Want, feed};
use crate::sample::{SampleError, Sampler};
use crate::text::TextStream;

/// What to generate.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Tokens that come after what is in the state already; at least one.
    pub prompt: &'a [i32],
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// Tokens that end the text, and are no part of it.
    pub stop_tokens: &'a [i32],
    /// Go on after a stop token, as after any other.
    pub ignore_eos: bool,
    /// The text ends before the first of these.
    pub stop_strings: &'a [String],
    /// Prompt tokens a step at most; the program's own limit if none.
    pub chunk: Option<usize>,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// A stop token came.
    EndOfText,
    /// A stop string came.
    StopString,
    /// As many tokens as were asked for.
    MaxTokens,
    /// No room in the KV cache for one more token.
    ContextFull,
    /// `on_text` said so.
    Cancelled,
}

/// What was generated.
#[derive(Clone, Debug)]
pub struct Generation {
    /// All tokens chosen, a stop token included. The last one is not in the state's cache.
    pub tokens: Vec<i32>,
    /// Exactly what `on_text` was given.
    pub text: String,
    /// Why it ended.
    pub stop: StopReason,
    /// Seconds until the prompt was in the cache.
    pub prompt_seconds: f64,
    /// Seconds from there to the end: steps, choices and `on_text`.
    pub decode_seconds: f64,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Steps after the prompt's: one fewer than `tokens`, if there are any.
    pub decode_steps: usize,
}

/// Why generation failed. What `on_text` was given before stays given.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// The device failed, or the prompt is empty or too long, which is found before any work.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The logits are not numbers.
    #[error(transparent)]
    Sample(#[from] SampleError),
}

/// Runs the prompt, then chooses tokens until something ends it.
///
/// * `token_bytes` gives a token's bytes; pieces of a character may lie in several tokens.
/// * `on_text` is called after each token with the text that it settled, which may be empty, and at the end with what
///   was held back. It breaks to cancel.
///
/// # Errors
///
/// [`GenerateError::Device`] with [`DeviceError::ContextFull`] before any work if the prompt does not fit; a cache that
/// fills up later is no error but [`StopReason::ContextFull`].
pub fn generate(
    program: &mut dyn Program,
    state: &mut State,
    request: &Request<'_>,
    sampler: &mut Sampler,
    token_bytes: &dyn Fn(i32) -> Vec<u8>,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generation, GenerateError> {
    let Request { prompt, max_new_tokens, stop_tokens, ignore_eos, stop_strings, chunk } = *request;
    let want = if sampler.needs_logits() { Want::Logits } else { Want::Token };
    let begin = Instant::now();
    let mut outputs = feed(program, prompt, chunk, want, state)?;
    let prompt_seconds = begin.elapsed().as_secs_f64();

    let begin = Instant::now();
    let mut stream = TextStream::new(stop_strings);
    let mut text = String::new();
    // The sampler looks back over both.
    let mut history = prompt.to_vec();
    let mut decode_steps = 0;
    let stop = loop {
        if history.len() - prompt.len() == max_new_tokens {
            break StopReason::MaxTokens;
        }
        let token = choose(sampler, want, &outputs, &history)?;
        history.push(token);
        if !ignore_eos && stop_tokens.contains(&token) {
            break StopReason::EndOfText;
        }
        let settled = stream.push(&token_bytes(token));
        text.push_str(&settled);
        let flow = on_text(&settled);
        if stream.stopped() {
            break StopReason::StopString;
        }
        if flow.is_break() {
            break StopReason::Cancelled;
        }
        if history.len() - prompt.len() == max_new_tokens {
            break StopReason::MaxTokens;
        }
        if state.past() == program.context() {
            break StopReason::ContextFull;
        }
        outputs = feed(program, &[token], None, want, state)?;
        decode_steps += 1;
    };
    let stop = match stop {
        // Who cancels is not called again.
        StopReason::Cancelled | StopReason::StopString => stop,
        StopReason::EndOfText | StopReason::MaxTokens | StopReason::ContextFull => {
            let rest = stream.finish();
            if !rest.is_empty() {
                text.push_str(&rest);
                let _ = on_text(&rest);
            }
            if stream.stopped() { StopReason::StopString } else { stop }
        }
    };
    Ok(Generation {
        tokens: history.split_off(prompt.len()),
        text,
        stop,
        prompt_seconds,
        decode_seconds: begin.elapsed().as_secs_f64(),
        prompt_tokens: prompt.len(),
        decode_steps,
    })
}

fn choose(
    sampler: &mut Sampler,
    want: Want,
    outputs: &StepOutputs,
    history: &[i32],
) -> Result<i32, GenerateError> {
    let StepOutputs { token, logits } = outputs;
    match (want, *token) {
        (Want::Token, Some(token)) => Ok(token),
        (Want::Logits, _) if !logits.is_empty() => Ok(sampler.next(logits, history)?),
        _ => Err(DeviceError::BadOutputs { want, token: token.is_some(), logits: logits.len() }.into()),
    }
}
