//! A program that says a script, whatever it is told, and remembers how it was asked.

use runtime::device::{DeviceError, Program, State, Step, StepOutputs, Want};

/// After position `p` comes `script[p]`, then `script[0]` again.
pub struct Fake {
    pub vocab: usize,
    pub context: usize,
    /// By want: nothing, token, logits, all logits.
    pub max_tokens: [usize; 4],
    pub script: Vec<i32>,
    /// Logit of all that the script does not say; what it says has 1.
    pub other_logits: f32,
    /// Tokens and want of each step so far.
    pub steps: Vec<(usize, Want)>,
    /// The position that fails to run, if any.
    pub broken_at: Option<usize>,
}

/// The fake's cache: nothing, but of its own type.
struct Cache;

impl Fake {
    pub fn new(script: &[i32]) -> Fake {
        let script = script.to_vec();
        let (steps, broken_at) = (Vec::new(), None);
        Fake { vocab: 300, context: 64, max_tokens: [64; 4], script, other_logits: 0.0, steps, broken_at }
    }

    fn after(&self, position: usize) -> i32 {
        self.script[position % self.script.len()]
    }

    /// Logits after `position`.
    pub fn logits(&self, position: usize) -> Vec<f32> {
        let mut row = vec![self.other_logits; self.vocab];
        row[self.after(position) as usize] = 1.0;
        row
    }
}

impl Program for Fake {
    fn vocab(&self) -> usize {
        self.vocab
    }

    fn context(&self) -> usize {
        self.context
    }

    fn max_tokens(&self, want: Want) -> usize {
        self.max_tokens[want as usize]
    }

    fn state(&self) -> Result<State, DeviceError> {
        Ok(State::new(Cache))
    }

    fn run(&mut self, step: &Step<'_>, state: &mut State) -> Result<StepOutputs, DeviceError> {
        step.check(self, state)?;
        state.inner_mut::<Cache>()?;
        self.steps.push((step.tokens.len(), step.want));
        let positions = state.past()..state.past() + step.tokens.len();
        if self.broken_at.is_some_and(|broken| positions.contains(&broken)) {
            return Err(DeviceError::Driver { device: "fake".into(), said: "lost".into() });
        }
        state.advance(step.tokens.len());
        let last = positions.end - 1;
        Ok(match step.want {
            Want::Nothing => StepOutputs::default(),
            Want::Token => StepOutputs { token: Some(self.after(last)), logits: vec![] },
            Want::Logits => StepOutputs { token: None, logits: self.logits(last) },
            Want::AllLogits => {
                StepOutputs { token: None, logits: positions.flat_map(|p| self.logits(p)).collect() }
            }
        })
    }
}
