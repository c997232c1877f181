//! Steps, states, and `feed`.

use runtime::device::{DeviceError, Program, State, Step, StepOutputs, Want, feed};

use crate::fake::Fake;

const TOKENS: [i32; 10] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];

fn feed_all(fake: &mut Fake, chunk: Option<usize>, want: Want) -> StepOutputs {
    let mut state = fake.state().unwrap();
    let outputs = feed(fake, &TOKENS, chunk, want, &mut state).unwrap();
    assert_eq!(state.past(), TOKENS.len());
    outputs
}

#[test]
fn feed_cuts_and_gives_what_one_step_gives() {
    for want in [Want::Token, Want::Logits, Want::AllLogits] {
        let whole = feed_all(&mut Fake::new(&TOKENS), None, want);
        for chunk in 0..12 {
            let mut fake = Fake::new(&TOKENS);
            assert_eq!(feed_all(&mut fake, Some(chunk), want), whole);
            let longest = fake.steps.iter().map(|&(tokens, _)| tokens).max().unwrap();
            assert_eq!(longest, chunk.clamp(1, 10));
            assert_eq!(fake.steps.len(), 10usize.div_ceil(longest));
        }
    }
}

#[test]
fn only_the_last_step_computes_logits_unless_all_are_wanted() {
    let mut fake = Fake::new(&TOKENS);
    let outputs = feed_all(&mut fake, Some(4), Want::Logits);
    assert_eq!(fake.steps, [(4, Want::Nothing), (4, Want::Nothing), (2, Want::Logits)]);
    assert_eq!(outputs, StepOutputs { token: None, logits: fake.logits(9) });

    let mut fake = Fake::new(&TOKENS);
    let outputs = feed_all(&mut fake, Some(4), Want::AllLogits);
    assert_eq!(fake.steps, [(4, Want::AllLogits), (4, Want::AllLogits), (2, Want::AllLogits)]);
    assert_eq!(outputs.logits, (0..10).flat_map(|p| fake.logits(p)).collect::<Vec<f32>>());
}

#[test]
fn limits_may_differ_by_want() {
    // At most 1 for logits: all before go in longer steps, and one token is left for it.
    let mut fake = Fake { max_tokens: [5, 5, 1, 0], ..Fake::new(&TOKENS) };
    feed_all(&mut fake, None, Want::Logits);
    assert_eq!(fake.steps, [(5, Want::Nothing), (4, Want::Nothing), (1, Want::Logits)]);

    let mut state = fake.state().unwrap();
    let error = feed(&mut fake, &TOKENS, None, Want::AllLogits, &mut state).unwrap_err();
    assert!(matches!(error, DeviceError::StepTooLong { max: 0, want: Want::AllLogits, .. }), "{error}");
}

#[test]
fn bad_input_is_found_before_the_first_step() {
    let mut fake = Fake { context: 9, ..Fake::new(&TOKENS) };
    let mut state = fake.state().unwrap();
    let mut error = |tokens: &[i32]| feed(&mut fake, tokens, Some(1), Want::Token, &mut state).unwrap_err();
    assert_eq!(
        error(&TOKENS).to_string(),
        "context full: 0 positions in the cache and 10 more, compiled for 9"
    );
    assert_eq!(error(&[1, 300]).to_string(), "token 300, expected 0..300");
    assert_eq!(error(&[1, -1]).to_string(), "token -1, expected 0..300");
    assert!(matches!(error(&[]), DeviceError::EmptyStep));
    assert!(fake.steps.is_empty());
    assert_eq!(state.past(), 0);
}

#[test]
fn what_is_in_the_cache_takes_room() {
    let mut fake = Fake { context: 13, ..Fake::new(&TOKENS) };
    let mut state = fake.state().unwrap();
    feed(&mut fake, &TOKENS[..4], None, Want::Token, &mut state).unwrap();
    let error = feed(&mut fake, &TOKENS, None, Want::Token, &mut state).unwrap_err();
    assert!(matches!(error, DeviceError::ContextFull { past: 4, tokens: 10, context: 13 }), "{error}");
    feed(&mut fake, &TOKENS[..9], None, Want::Token, &mut state).unwrap();
}

#[test]
fn an_error_on_the_way_leaves_the_state_as_it_was() {
    let mut fake = Fake { broken_at: Some(7), ..Fake::new(&TOKENS) };
    let mut state = fake.state().unwrap();
    feed(&mut fake, &TOKENS[..3], None, Want::Token, &mut state).unwrap();
    let error = feed(&mut fake, &TOKENS, Some(2), Want::Token, &mut state).unwrap_err();
    assert_eq!(error.to_string(), "device fake: lost");
    assert_eq!(state.past(), 3);
}

#[test]
fn a_step_longer_than_the_program_takes_is_refused() {
    let mut fake = Fake { max_tokens: [4; 4], ..Fake::new(&TOKENS) };
    let mut state = fake.state().unwrap();
    let error = fake.run(&Step { tokens: &TOKENS, want: Want::Token }, &mut state).unwrap_err();
    assert_eq!(error.to_string(), "a step of 10 tokens for Token, the program takes 4");
}

#[test]
fn states_rewind_and_know_their_program() {
    let mut fake = Fake::new(&TOKENS);
    let mut state = fake.state().unwrap();
    feed(&mut fake, &TOKENS, None, Want::Token, &mut state).unwrap();
    state.truncate(20);
    assert_eq!(state.past(), 10);
    state.truncate(4);
    assert_eq!(state.past(), 4);

    let mut foreign = State::new("another program's cache");
    let error = feed(&mut fake, &TOKENS, None, Want::Token, &mut foreign).unwrap_err();
    assert!(matches!(error, DeviceError::ForeignState), "{error}");
}
