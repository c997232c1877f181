//! The generation loop over a program that says a script.

use std::ops::ControlFlow;

use proptest::prelude::*;
use runtime::device::{DeviceError, Program, Want};
use runtime::generate::{GenerateError, Generation, Request, StopReason, generate};
use runtime::sample::{SampleError, Sampler, SamplerOptions};

use crate::fake::Fake;

const EOS: i32 = 256;

/// Tokens below 256 are bytes; the others say nothing.
fn token_bytes(token: i32) -> Vec<u8> {
    u8::try_from(token).into_iter().collect()
}

fn request<'a>(prompt: &'a [i32]) -> Request<'a> {
    Request {
        prompt,
        max_new_tokens: 100,
        stop_tokens: &[EOS],
        ignore_eos: false,
        stop_strings: &[],
        chunk: None,
    }
}

/// A fake that says `text` after a prompt of two tokens, then the end.
fn saying(text: &str) -> Fake {
    let script = [0].into_iter().chain(text.bytes().map(i32::from)).chain([EOS]);
    Fake::new(&script.collect::<Vec<i32>>())
}

/// Runs greedily and checks that the pieces are the text.
fn run(fake: &mut Fake, request: &Request<'_>) -> Result<Generation, GenerateError> {
    run_with(fake, request, SamplerOptions::default())
}

fn run_with(
    fake: &mut Fake,
    request: &Request<'_>,
    options: SamplerOptions,
) -> Result<Generation, GenerateError> {
    let mut state = fake.state().unwrap();
    let mut sampler = Sampler::new(options).unwrap();
    let mut pieces = String::new();
    let mut on_text = |text: &str| {
        pieces.push_str(text);
        ControlFlow::Continue(())
    };
    let generation = generate(fake, &mut state, request, &mut sampler, &token_bytes, &mut on_text)?;
    assert_eq!(generation.text, pieces);
    assert_eq!(generation.decode_steps, generation.tokens.len().saturating_sub(1));
    assert_eq!(generation.prompt_tokens, request.prompt.len());
    assert_eq!(state.past(), generation.prompt_tokens + generation.decode_steps);
    assert!(generation.prompt_seconds >= 0.0 && generation.decode_seconds >= 0.0);
    Ok(generation)
}

#[test]
fn the_text_ends_at_a_stop_token() {
    let mut fake = saying("hello");
    let generation = run(&mut fake, &request(&[1, 2])).unwrap();
    assert_eq!((generation.text.as_str(), generation.stop), ("hello", StopReason::EndOfText));
    assert_eq!(generation.tokens.len(), 6);
    assert_eq!(generation.tokens[5], EOS);
    assert_eq!(fake.steps[0], (2, Want::Token));
    assert!(fake.steps[1..].iter().all(|&step| step == (1, Want::Token)));
}

#[test]
fn a_sampler_that_needs_logits_gets_them() {
    let mut fake = saying("hello");
    let options = SamplerOptions { temperature: 1e-3, ..SamplerOptions::default() };
    let generation = run_with(&mut fake, &request(&[1, 2]), options).unwrap();
    assert_eq!(generation.text, "hello");
    assert!(fake.steps.iter().all(|&(_, want)| want == Want::Logits));
}

#[test]
fn a_program_may_have_no_steps_that_give_nothing() {
    for (temperature, want) in [(0.0, Want::Token), (1e-3, Want::Logits)] {
        let mut fake = saying("hello");
        fake.max_tokens[Want::Nothing as usize] = 0;
        let options = SamplerOptions { temperature, ..SamplerOptions::default() };
        let request = Request { chunk: Some(1), ..request(&[1, 2]) };
        assert_eq!(run_with(&mut fake, &request, options).unwrap().text, "hello");
        assert!(fake.steps.iter().all(|&step| step == (1, want)));
    }
}

#[test]
fn the_penalty_sees_prompt_and_generated_tokens() {
    let mut fake = Fake { vocab: 3, other_logits: 0.5, ..Fake::new(&[1]) };
    let options = SamplerOptions { repeat_penalty: 4.0, ..SamplerOptions::default() };
    let request = Request { max_new_tokens: 3, ..request(&[0]) };
    // Logits are 1/8, 1, 1/2; then 1/8, 1/4, 1/2; then 1/8, 1/4, 1/8.
    assert_eq!(run_with(&mut fake, &request, options).unwrap().tokens, [1, 2, 1]);
}

#[test]
fn stop_tokens_may_be_ignored() {
    let request = Request { ignore_eos: true, max_new_tokens: 9, ..request(&[1, 2]) };
    let generation = run(&mut saying("hello"), &request).unwrap();
    assert_eq!((generation.text.as_str(), generation.stop), ("hello\0he", StopReason::MaxTokens));
}

#[test]
fn the_text_ends_before_a_stop_string() {
    let stops = ["lo".to_string()];
    let generation =
        run(&mut saying("hello"), &Request { stop_strings: &stops, ..request(&[1, 2]) }).unwrap();
    assert_eq!((generation.text.as_str(), generation.stop), ("hel", StopReason::StopString));
    assert_eq!(generation.tokens.len(), 5);
    // Held text is given when the end decides that it is none.
    let stops = ["lot".to_string()];
    let generation =
        run(&mut saying("hello"), &Request { stop_strings: &stops, ..request(&[1, 2]) }).unwrap();
    assert_eq!((generation.text.as_str(), generation.stop), ("hello", StopReason::EndOfText));
}

#[test]
fn no_more_tokens_than_asked_for() {
    for max_new_tokens in 0..4 {
        let mut fake = saying("hello");
        let generation = run(&mut fake, &Request { max_new_tokens, ..request(&[1, 2]) }).unwrap();
        assert_eq!(
            (&generation.text[..], generation.stop),
            (&"hello"[..max_new_tokens], StopReason::MaxTokens)
        );
        // No step whose outputs nobody wants.
        assert_eq!(fake.steps.len(), max_new_tokens.max(1));
    }
}

#[test]
fn a_full_cache_ends_the_text_and_keeps_it() {
    let mut fake = Fake { context: 4, ..saying("hello") };
    let generation = run(&mut fake, &request(&[1, 2])).unwrap();
    assert_eq!((generation.text.as_str(), generation.stop), ("hel", StopReason::ContextFull));
}

#[test]
fn a_prompt_that_does_not_fit_is_an_error_before_any_work() {
    let mut fake = Fake { context: 2, ..saying("hello") };
    let error = run(&mut fake, &Request { chunk: Some(1), ..request(&[1, 2, 3]) }).unwrap_err();
    let expected = DeviceError::ContextFull { past: 0, tokens: 3, context: 2 };
    assert_eq!(error.to_string(), expected.to_string());
    assert!(fake.steps.is_empty());
    assert!(matches!(run(&mut fake, &request(&[])), Err(GenerateError::Device(DeviceError::EmptyStep))));
    // One that just fits gives one token.
    assert_eq!(run(&mut fake, &request(&[1, 2])).unwrap().stop, StopReason::ContextFull);
}

#[test]
fn the_caller_may_cancel() {
    let mut fake = saying("hello");
    let (mut state, mut calls) = (fake.state().unwrap(), 0);
    let mut on_text = |_: &str| {
        calls += 1;
        if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let mut sampler = Sampler::new(SamplerOptions::default()).unwrap();
    let generation =
        generate(&mut fake, &mut state, &request(&[1, 2]), &mut sampler, &token_bytes, &mut on_text).unwrap();
    assert_eq!((generation.text.as_str(), generation.stop, calls), ("hel", StopReason::Cancelled, 3));
}

#[test]
fn a_conversation_goes_on_where_it_was() {
    let mut fake = saying("hello");
    let mut state = fake.state().unwrap();
    let mut sampler = Sampler::new(SamplerOptions::default()).unwrap();
    let mut turn = |prompt: &[i32]| {
        let request = Request { max_new_tokens: 2, ..request(prompt) };
        generate(&mut fake, &mut state, &request, &mut sampler, &token_bytes, &mut |_| {
            ControlFlow::Continue(())
        })
        .unwrap()
    };
    let first = turn(&[1, 2]);
    assert_eq!(first.text, "he");
    // The last token is not in the cache: the next prompt begins with it.
    assert_eq!(turn(&first.tokens[1..]).text, "ll");
}

#[test]
fn bad_logits_and_broken_devices_are_errors() {
    let mut fake = Fake { broken_at: Some(3), ..saying("hello") };
    let mut state = fake.state().unwrap();
    let mut sampler = Sampler::new(SamplerOptions::default()).unwrap();
    let mut text = String::new();
    let mut on_text = |piece: &str| {
        text.push_str(piece);
        ControlFlow::Continue(())
    };
    let error = generate(&mut fake, &mut state, &request(&[1, 2]), &mut sampler, &token_bytes, &mut on_text);
    assert!(matches!(error, Err(GenerateError::Device(DeviceError::Driver { .. }))));
    assert_eq!(text, "he");

    let error = GenerateError::from(SampleError::NoCandidate { logits: 3 });
    assert_eq!(error.to_string(), "no token is possible: 3 logits, none above minus infinity");
}

proptest! {
    /// Random bytes as tokens, random stop strings: what was streamed is the whole, cut at the first stop.
    #[test]
    fn the_stream_is_the_whole_decoding(
        script in prop::collection::vec(prop_oneof![Just(97), Just(98), 0..256i32], 1..60),
        stops in prop::collection::vec("[ab]{1,3}", 0..3),
    ) {
        let mut fake = Fake { context: 1000, ..Fake::new(&script) };
        let max_new_tokens = script.len();
        let request = Request { stop_strings: &stops, stop_tokens: &[], max_new_tokens, ..request(&[1]) };
        let generation = run(&mut fake, &request).unwrap();
        let said: Vec<u8> = generation.tokens.iter().flat_map(|&token| token_bytes(token)).collect();
        let whole = String::from_utf8_lossy(&said);
        match generation.stop {
            StopReason::StopString => {
                let cut = stops.iter().find(|stop| whole.ends_with(*stop) && generation.text.len() + stop.len() == whole.len());
                prop_assert!(cut.is_some() && whole.starts_with(&generation.text));
            }
            stop => {
                prop_assert_eq!(stop, StopReason::MaxTokens);
                prop_assert_eq!(&generation.text, &whole);
                prop_assert!(!stops.iter().any(|stop| whole.contains(stop)));
            }
        }
    }
}
