//! What a device is to the rest: it loads an artifact into a [`Program`], and a program runs steps on a [`State`].
//!
//! Generation, evaluation, comparison and benches are written once, over `dyn Program`.

use std::any::Any;
use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use crate::artifact::{Artifact, ArtifactError};
use crate::map::MapError;
use ir::dim::MAX_SYMBOLS;
use ir::plan::{Entry, Give, Plan};

/// Runs artifacts.
pub trait Device {
    /// Makes `artifact` ready to run; what the machine lacks is found here, before any work.
    ///
    /// # Errors
    ///
    /// [`DeviceError::MissingFeature`], [`DeviceError::OutOfMemory`], [`DeviceError::Artifact`] or [`DeviceError::Driver`].
    fn load(&mut self, artifact: &Artifact) -> Result<Box<dyn Program>, DeviceError>;

    /// As [`Device::load`], for who looks between launches.
    ///
    /// # Errors
    ///
    /// As [`Device::load`]; [`DeviceError::NoLaunches`] from a device that has none.
    fn load_tapped(&mut self, artifact: &Artifact) -> Result<Box<dyn Tapped>, DeviceError> {
        Err(DeviceError::NoLaunches { file: artifact.file().to_path_buf() })
    }
}

/// A loaded model. It holds the weights and workspace; what a conversation has said so far is in a [`State`].
pub trait Program {
    /// Token ids are `0..vocab`.
    fn vocab(&self) -> usize;

    /// Positions that the KV cache of a state holds.
    fn context(&self) -> usize;

    /// Most tokens that one step may have; 0 if the program cannot give `want` at all.
    fn max_tokens(&self, want: Want) -> usize;

    /// A fresh state, with nothing in its cache.
    ///
    /// # Errors
    ///
    /// [`DeviceError::OutOfMemory`] if its cache does not fit.
    fn state(&self) -> Result<State, DeviceError>;

    /// Runs one step at positions `state.past()..state.past() + step.tokens.len()` and moves `state` on by as much.
    ///
    /// # Errors
    ///
    /// What [`Step::check`] finds, with nothing done; [`DeviceError::ForeignState`]; or what the machine says.
    fn run(&mut self, step: &Step<'_>, state: &mut State) -> Result<StepOutputs, DeviceError>;
}

/// A program that runs launch by launch too, and shows what each has left in memory.
pub trait Tapped: Program {
    /// The plan that it runs.
    fn plan(&self) -> &Plan;

    /// As [`Program::run`], launch by launch: `after` is called after each, in their order. The result is the same to the
    /// bit: the kernels are the same functions, called with the same buffers.
    ///
    /// # Errors
    ///
    /// As [`Program::run`]; [`DeviceError::NoTaps`] if the artifact was compiled without.
    fn run_tapped(
        &mut self,
        step: &Step<'_>,
        state: &mut State,
        after: &mut dyn FnMut(Tap<'_>),
    ) -> Result<StepOutputs, DeviceError>;
}

/// A launch that was just run.
#[derive(Clone, Copy)]
pub struct Tap<'a> {
    /// The entry point.
    pub entry: &'a Entry,
    /// Number of the launch in it.
    pub launch: usize,
    /// When each worker worked, in seconds since the step began.
    pub workers: &'a [Range<f64>],
    /// The device's memory.
    pub memory: &'a dyn Memory,
}

impl<'a> Tap<'a> {
    /// From when the first worker began until the last was done.
    pub fn span(&self) -> Range<f64> {
        let begin = self.workers.iter().map(|w| w.start).fold(f64::INFINITY, f64::min);
        begin..self.workers.iter().map(|w| w.end).fold(begin, f64::max)
    }

    /// Seconds that the launch took.
    pub fn seconds(&self) -> f64 {
        self.span().end - self.span().start
    }

    /// As [`Memory::bytes`].
    pub fn bytes(&self, buffer: usize) -> Cow<'a, [u8]> {
        self.memory.bytes(buffer)
    }
}

/// What the buffers of a plan hold between two launches.
pub trait Memory {
    /// What a buffer holds now, by its number in the plan. Other launches may have used an arena buffer's place since.
    ///
    /// # Panics
    ///
    /// If the plan has no such buffer.
    fn bytes(&self, buffer: usize) -> Cow<'_, [u8]>;
}

/// What a step shall give back. The model's head runs for those positions only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// The cache alone: what a long prompt's steps before the last are for.
    Nothing,
    /// The greedy choice for the last position, made on the device.
    Token,
    /// Logits of the last position.
    Logits,
    /// Logits of every position.
    AllLogits,
}

impl Want {
    /// What the plan calls it.
    pub fn give(self) -> Give {
        match self {
            Want::Nothing => Give::Nothing,
            Want::Token | Want::Logits => Give::Last,
            Want::AllLogits => Give::All,
        }
    }
}

/// Tokens to run through the model, one position after the other.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// At least one.
    pub tokens: &'a [i32],
    /// What to give back.
    pub want: Want,
}

impl Step<'_> {
    /// Checks all that can be wrong with a step, so that every device refuses in the same words.
    ///
    /// # Errors
    ///
    /// [`DeviceError::EmptyStep`], [`DeviceError::StepTooLong`], [`DeviceError::ContextFull`] or [`DeviceError::BadToken`].
    pub fn check(&self, program: &(impl Program + ?Sized), state: &State) -> Result<(), DeviceError> {
        let Step { tokens, want } = *self;
        let max = program.max_tokens(want);
        if tokens.len() > max {
            return Err(DeviceError::StepTooLong { tokens: tokens.len(), want, max });
        }
        check_tokens(program, tokens, state)
    }

    /// Checks the step, and finds the entry point for it: its number in the plan, and the values of its symbols.
    ///
    /// # Errors
    ///
    /// As [`Step::check`].
    pub(crate) fn entry(
        &self,
        program: &impl Program,
        plan: &Plan,
        state: &State,
    ) -> Result<(usize, [i64; MAX_SYMBOLS]), DeviceError> {
        self.check(program, state)?;
        let number = plan.entry_number(self.tokens.len(), self.want.give());
        let number = number.expect("a step no longer than max_tokens has an entry point");
        let mut symbols = [0; MAX_SYMBOLS];
        (symbols[0], symbols[1]) = (self.tokens.len() as i64, state.past() as i64);
        Ok((number, symbols))
    }
}

impl Step<'_> {
    /// Rows of logits that it gives back.
    pub(crate) fn rows(&self) -> usize {
        match self.want {
            Want::Nothing | Want::Token => 0,
            Want::Logits => 1,
            Want::AllLogits => self.tokens.len(),
        }
    }

    /// What its two inputs hold in memory: tokens, and positions behind `past`.
    pub(crate) fn inputs(&self, past: usize) -> [Vec<u8>; 2] {
        let tokens = self.tokens.iter().flat_map(|token| token.to_le_bytes());
        let positions = past..past + self.tokens.len();
        [tokens.collect(), positions.flat_map(|at| (at as i32).to_le_bytes()).collect()]
    }
}

fn check_tokens(program: &(impl Program + ?Sized), tokens: &[i32], state: &State) -> Result<(), DeviceError> {
    if tokens.is_empty() {
        return Err(DeviceError::EmptyStep);
    }
    let (past, context) = (state.past(), program.context());
    if tokens.len() > context.saturating_sub(past) {
        return Err(DeviceError::ContextFull { past, tokens: tokens.len(), context });
    }
    let vocab = program.vocab();
    match tokens.iter().find(|&&token| usize::try_from(token).map_or(true, |token| token >= vocab)) {
        Some(&token) => Err(DeviceError::BadToken { token, vocab }),
        None => Ok(()),
    }
}

/// What a step gave back.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutputs {
    /// For [`Want::Token`]: the token with the largest logit at the last position, the lowest id on ties.
    pub token: Option<i32>,
    /// Rows of `vocab` logits: none for [`Want::Nothing`] and [`Want::Token`], the last position's for [`Want::Logits`],
    /// one a position for [`Want::AllLogits`].
    pub logits: Vec<f32>,
}

impl StepOutputs {
    /// What an entry point has left for a step; `bytes` gives so many of a buffer of the plan.
    pub(crate) fn of<B: AsRef<[u8]>, E>(
        step: &Step<'_>,
        entry: &Entry,
        vocab: usize,
        bytes: impl Fn(usize, usize) -> Result<B, E>,
    ) -> Result<StepOutputs, E> {
        let words = |buffer: Option<usize>, count: usize| -> Result<Vec<[u8; 4]>, E> {
            let Some(buffer) = buffer.filter(|_| count > 0) else { return Ok(Vec::new()) };
            let bytes = bytes(buffer, 4 * count)?;
            Ok(bytes.as_ref().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]).collect())
        };
        let logits = words(entry.logits, step.rows() * vocab)?;
        let token = words(entry.token, usize::from(step.want == Want::Token))?;
        Ok(StepOutputs {
            token: token.first().map(|&word| i32::from_le_bytes(word)),
            logits: logits.into_iter().map(f32::from_le_bytes).collect(),
        })
    }
}

/// A conversation so far: how many positions are in the cache, and the cache, which is the program's own.
pub struct State {
    past: usize,
    inner: Box<dyn Any + Send>,
}

impl State {
    /// A state with an empty cache, `inner`.
    pub fn new(inner: impl Any + Send) -> State {
        State { past: 0, inner: Box::new(inner) }
    }

    /// Positions in the cache.
    pub fn past(&self) -> usize {
        self.past
    }

    /// Forgets all positions from `past` on; nothing happens if there are no more than that.
    pub fn truncate(&mut self, past: usize) {
        self.past = self.past.min(past);
    }

    /// Moves on by `tokens` positions. For programs, which have just written them.
    pub fn advance(&mut self, tokens: usize) {
        self.past += tokens;
    }

    /// The program's own part.
    ///
    /// # Errors
    ///
    /// [`DeviceError::ForeignState`] if another kind of program made this state.
    pub fn inner_mut<T: Any>(&mut self) -> Result<&mut T, DeviceError> {
        self.inner.downcast_mut().ok_or(DeviceError::ForeignState)
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("past", &self.past).finish_non_exhaustive()
    }
}

/// Why a device cannot load or run.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum DeviceError {
    /// More tokens than the cache has room for.
    #[error("context full: {past} positions in the cache and {tokens} more, compiled for {context}")]
    ContextFull { past: usize, tokens: usize, context: usize },
    /// More tokens than a step of this program takes; [`feed`] cuts them. `max` is 0 if it has no such entry point.
    #[error("a step of {tokens} tokens for {want:?}, the program takes {max}")]
    StepTooLong { tokens: usize, want: Want, max: usize },
    /// A step needs a token.
    #[error("a step of no tokens, expected at least one")]
    EmptyStep,
    /// A token id that the model does not have.
    #[error("token {token}, expected 0..{vocab}")]
    BadToken { token: i32, vocab: usize },
    /// The state is of another device's program.
    #[error("this state was made by another kind of program")]
    ForeignState,
    /// A program broke its word: our own mistake.
    #[error("bug: a step for {want:?} gave a token: {token}, and {logits} logits")]
    BadOutputs { want: Want, token: bool, logits: usize },
    /// Code for another machine.
    #[error("{file}: needs {needs}, this machine is {has}; `compile --target` makes code for it", file = .file.display())]
    MissingFeature { file: std::path::PathBuf, needs: String, has: String },
    /// Not enough memory for weights, cache or workspace, in bytes.
    #[error("out of memory: {needed} bytes needed, {available} available")]
    OutOfMemory { needed: u64, available: u64 },
    /// The artifact cannot be read, or lacks something.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// A section of the artifact is not what it should be.
    #[error("{file}: section `{section}`: {said}", file = .file.display())]
    BadPlan { file: std::path::PathBuf, section: String, said: String },
    /// Code that can be run whole, but not launch by launch.
    #[error("{file}: has no taps; `compile --taps` makes code that has", file = .file.display())]
    NoTaps { file: std::path::PathBuf },
    /// A device that runs graphs or nothing, and has no launches to look between.
    #[error("{file}: this device has no launches to look between; the device cpu has", file = .file.display())]
    NoLaunches { file: std::path::PathBuf },
    /// A launch was refused or failed; `said` is what the driver said.
    #[error("launch of {kernel} failed: {said}")]
    Launch { kernel: String, said: String },
    /// No driver, or the device is lost; `said` is what the driver said.
    #[error("device {device}: {said}")]
    Driver { device: String, said: String },
}

impl From<MapError> for DeviceError {
    fn from(error: MapError) -> DeviceError {
        match error {
            MapError::Memory { needed, available, source: _ } => {
                DeviceError::OutOfMemory { needed, available: available.unwrap_or(0) }
            }
            MapError::File { .. } | MapError::NotAFile { .. } => DeviceError::Artifact(error.into()),
        }
    }
}

/// Runs any number of tokens, in as few steps of at most `chunk` tokens as the program allows.
///
/// Only what is wanted is computed: for [`Want::AllLogits`] the logits of all steps, one after the other; else those
/// before the last step ask for nothing, if the program has steps for that.
///
/// # Errors
///
/// As [`Program::run`]. Too many tokens and bad ones are found before the first step; on any error `state` is as it was.
pub fn feed(
    program: &mut dyn Program,
    tokens: &[i32],
    chunk: Option<usize>,
    want: Want,
    state: &mut State,
) -> Result<StepOutputs, DeviceError> {
    check_tokens(program, tokens, state)?;
    let chunk = chunk.unwrap_or(usize::MAX).max(1);
    if program.max_tokens(want) == 0 {
        return Err(DeviceError::StepTooLong { tokens: tokens.len(), want, max: 0 });
    }
    let before = match want {
        Want::AllLogits => want,
        // A program with no such entry point does more than it must.
        Want::Nothing | Want::Token | Want::Logits if program.max_tokens(Want::Nothing) == 0 => want,
        Want::Nothing | Want::Token | Want::Logits => Want::Nothing,
    };
    let (max_before, max_last) = (program.max_tokens(before).min(chunk), program.max_tokens(want).min(chunk));

    let past = state.past();
    let mut logits = Vec::new();
    let mut rest = tokens;
    let result = loop {
        let (step, more) = if rest.len() <= max_last {
            (Step { tokens: rest, want }, &[][..])
        } else {
            // At least one token is left for the last step.
            let (first, more) = rest.split_at(max_before.min(rest.len() - 1));
            (Step { tokens: first, want: before }, more)
        };
        match program.run(&step, state) {
            Err(error) => break Err(error),
            Ok(mut outputs) if more.is_empty() => {
                logits.append(&mut outputs.logits);
                break Ok(StepOutputs { token: outputs.token, logits });
            }
            Ok(mut outputs) if want == Want::AllLogits => logits.append(&mut outputs.logits),
            Ok(_) => {}
        }
        rest = more;
    };
    if result.is_err() {
        state.truncate(past);
    }
    result
}
