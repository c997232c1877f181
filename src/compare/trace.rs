//! What each launch of a program stores, as a text that another machine's run is judged by.
//!
//! One record a line, a word first; numbers and names are parted by single spaces:
//!
//! ```text
//! llamac trace 1
//! model gqa4                           what the artifact calls itself; the rest of the line
//! dtype bf16
//! target cpu:x86-64-v4                 the code that ran
//! arithmetic fma                       what else than schedules decides bits: see [`arithmetic`]
//! compiler 0.1.0
//! tokens 1 5 7 2                       those of a step, and the one after it
//! kernel q.1 dot mr 12, nr 2, kc 0     name, family, and the rest of the line is the schedule; one line each
//! step logits prefill 3 0              what was wanted, entry point, tokens, positions in the cache before
//! launch l0.q q.1                      group, kernel
//! value l0.qr bf16 3x4x16 DIGEST 7:0.25 99:-1.5
//! end 1                                values in all: a file that was cut off is none
//! ```
//!
//! A value is what one launch stored under one name: dtype, extents, the first 128 bits of BLAKE3 over its elements in
//! row-major order, as little-endian bytes and without padding, then elements by index. Of a cache only the slots that are
//! in use count, so the context that a program was compiled for does not matter. Which elements are kept follows from name
//! and size alone.
//!
//! [`mod@text`] prints and reads it; [`mod@part`] compares two of the same tokens.

pub mod part;
pub mod text;

use super::stored::{self, StoredError};
use crate::check::device::encode;
use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::families::{GroupView, storage};
use ir::graph::{Graph, ValueId};
use ir::interp::Tensor;
use ir::op::Op;
use ir::plan::{Give, Plan, PlanKernel};
use ir::random::Rng;
use runtime::device::{DeviceError, Program, Step, Tap, Tapped, Want};
use runtime::manifest::{Manifest, TargetCode};
use std::collections::BTreeSet;

/// Elements of a value that a file keeps.
pub const SAMPLES: usize = 8;

/// What a program stored, step by step.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// What the artifact calls itself.
    pub model: String,
    /// Of weights and stored values.
    pub dtype: DType,
    /// The code that ran.
    pub target: String,
    /// See [`arithmetic`].
    pub arithmetic: String,
    /// Version of the llamac that made the artifact.
    pub compiler: String,
    /// What it was fed.
    pub tokens: Vec<i32>,
    /// Kernels of its launches.
    pub kernels: Vec<PlanKernel>,
    /// In the order in which they ran.
    pub steps: Vec<TracedStep>,
}

/// A run of an entry point.
#[derive(Clone, Debug, PartialEq)]
pub struct TracedStep {
    /// What was wanted of it; a trace has one step of each kind at most.
    pub want: Want,
    /// The entry point.
    pub entry: String,
    /// Tokens.
    pub tokens: usize,
    /// Positions in the cache before.
    pub past: usize,
    /// In the order in which they ran.
    pub launches: Vec<TracedLaunch>,
}

/// A launch.
#[derive(Clone, Debug, PartialEq)]
pub struct TracedLaunch {
    /// The group of the graph.
    pub group: String,
    /// Index in [`Trace::kernels`].
    pub kernel: usize,
    /// What it stored.
    pub values: Vec<TracedValue>,
}

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub struct TracedValue {
    /// Its name in the graph.
    pub name: String,
    /// As what it is stored.
    pub dtype: DType,
    /// Extents; of a cache, the slots in use.
    pub shape: Vec<usize>,
    /// The first 128 bits of BLAKE3, in hexadecimal digits.
    pub digest: String,
    /// Elements by index, in ascending order.
    pub samples: Vec<(usize, f64)>,
}

impl TracedValue {
    fn of(name: &str, tensor: &Tensor, samples: usize) -> TracedValue {
        let mut bytes = vec![0; tensor.data.len() * tensor.dtype.bytes(1)];
        let slots = bytes.chunks_exact_mut(tensor.dtype.bytes(1));
        slots.zip(&tensor.data).for_each(|(slot, &x)| encode(tensor.dtype, x, slot));
        let elems = tensor.data.len();
        let kept: BTreeSet<usize> = if samples < elems {
            let mut rng =
                Rng(name.bytes().fold(elems as u64, |hash, byte| Rng(hash ^ u64::from(byte)).bits()));
            (0..samples).map(|_| rng.below(elems)).collect()
        } else {
            (0..elems).collect()
        };
        TracedValue {
            name: name.to_string(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            digest: blake3::hash(&bytes).to_hex()[..DIGITS].to_string(),
            samples: kept.into_iter().map(|at| (at, tensor.data[at])).collect(),
        }
    }

    fn at(&self, index: usize) -> Option<f64> {
        let found = self.samples.binary_search_by_key(&index, |sample| sample.0);
        found.ok().map(|at| self.samples[at].1)
    }
}

/// Digits of a digest.
const DIGITS: usize = 32;

/// What else than schedules decides bits on a target: how it multiplies numbers of `dtype`. Programs of one arithmetic, of
/// one llamac, whose kernels are of one numeric class, give the same bits.
pub fn arithmetic(target: &TargetCode, dtype: DType) -> &'static str {
    match dtype == DType::BF16 && target.requires.iter().any(|feature| feature == "avx512bf16") {
        true => "vdpbf16ps",
        false => "fma",
    }
}

/// The steps that are traced: all tokens but the last into an empty cache, for each kind of result, and then the last.
fn steps<'t>(tokens: &'t [i32], program: &(impl Program + ?Sized)) -> Vec<Step<'t>> {
    let first = [Want::Nothing, Want::Logits, Want::AllLogits];
    let most = first.into_iter().map(|want| program.max_tokens(want)).min().unwrap_or(0);
    let (before, rest) = tokens.split_at(tokens.len().saturating_sub(1).min(most));
    let mut steps: Vec<Step<'_>> = first.map(|want| Step { tokens: before, want }).into();
    steps.push(Step { tokens: &rest[..rest.len().min(1)], want: Want::Token });
    steps.retain(|step| !step.tokens.is_empty());
    steps
}

/// A tensor, of which a cache is cut to the slots that are in use.
fn in_use(tensor: Tensor, is_cache: bool, slots: usize) -> Tensor {
    match tensor.shape[..] {
        [heads, all, width] if is_cache && slots < all => {
            let rows = tensor.data.chunks_exact(all * width);
            let data = rows.flat_map(|head| &head[..slots * width]).copied().collect();
            Tensor { dtype: tensor.dtype, shape: vec![heads, slots, width], data }
        }
        _ => tensor,
    }
}

fn is_cache(graph: &Graph, id: ValueId) -> bool {
    matches!(graph[storage(graph, id)].op, Op::State { .. })
}

impl Trace {
    fn new(manifest: &Manifest, target: &TargetCode, plan: &Plan, tokens: &[i32]) -> Trace {
        let dtype = DType::from_name(&manifest.dtype).expect("an artifact's dtype is one");
        Trace {
            model: manifest.model.clone(),
            dtype,
            target: target.name.clone(),
            arithmetic: arithmetic(target, dtype).to_string(),
            compiler: manifest.compiler.clone(),
            tokens: tokens.to_vec(),
            kernels: plan.kernels.clone(),
            steps: Vec::new(),
        }
    }

    /// Runs the tokens and keeps `samples` elements of each value that a launch stores. `graphs` are those of
    /// [`stored::fused`].
    ///
    /// # Errors
    ///
    /// What the device says, or that its memory is not as its plan says.
    pub fn record(
        program: &mut dyn Tapped,
        (manifest, target): (&Manifest, &TargetCode),
        graphs: &[Graph],
        tokens: &[i32],
        samples: usize,
    ) -> Result<Trace, TraceError> {
        let plan = program.plan().clone();
        let mut trace = Trace::new(manifest, target, &plan, tokens);
        let mut state = program.state()?;
        for step in steps(tokens, program) {
            if step.want != Want::Token {
                state = program.state()?;
            }
            let (tokens, past) = (step.tokens.len(), state.past());
            let mut symbols = [0; MAX_SYMBOLS];
            (symbols[0], symbols[1]) = (tokens as i64, past as i64);
            let number = plan.entry_number(tokens, step.want.give());
            let number = number.expect("a step no longer than max_tokens has an entry point");
            let (graph, entry) = (&graphs[number], &plan.entries[number]);
            let views = GroupView::all(graph);
            let mut launches: Vec<Result<TracedLaunch, StoredError>> = Vec::new();
            let mut after = |tap: Tap<'_>| {
                let view = &views[tap.launch];
                let value = |&root| {
                    let found = stored::tensor(graph, &plan, root, &symbols, tap)?;
                    let found = in_use(found, is_cache(graph, root), past + tokens);
                    Ok(TracedValue::of(&graph[root].name, &found, samples))
                };
                let (group, kernel) = (view.name().to_string(), entry.launches[tap.launch].kernel);
                let values = view.roots.iter().map(value).collect::<Result<_, _>>();
                launches.push(values.map(|values| TracedLaunch { group, kernel, values }));
            };
            program.run_tapped(&step, &mut state, &mut after)?;
            let launches = launches.into_iter().collect::<Result<_, _>>()?;
            let (want, entry) = (step.want, entry.name.clone());
            trace.steps.push(TracedStep { want, entry, tokens, past, launches });
        }
        Ok(trace)
    }

    /// As [`Trace::record`], of a program that shows nothing but its logits.
    ///
    /// # Errors
    ///
    /// What the device says.
    pub fn record_logits(
        program: &mut dyn Program,
        (manifest, target): (&Manifest, &TargetCode),
        plan: &Plan,
        tokens: &[i32],
        samples: usize,
    ) -> Result<Trace, TraceError> {
        let mut trace = Trace::new(manifest, target, plan, tokens);
        let all = |step: &Step<'_>| step.want == Want::AllLogits;
        let Some(step) = steps(tokens, program).into_iter().find(all) else { return Ok(trace) };
        let logits = program.run(&step, &mut program.state()?)?.logits;
        let (tokens, data) = (step.tokens.len(), logits.into_iter().map(f64::from).collect::<Vec<_>>());
        let tensor = Tensor::new(DType::F32, &[tokens, program.vocab()], &data);
        let number = plan.entry_number(tokens, Give::All).expect("it has just been run");
        let entry = &plan.entries[number];
        let kernel = entry.launches.last().map_or(0, |launch| launch.kernel);
        let values = vec![TracedValue::of(LOGITS, &tensor, samples)];
        let launches = vec![TracedLaunch { group: LOGITS.to_string(), kernel, values }];
        let (want, entry) = (step.want, entry.name.clone());
        trace.steps.push(TracedStep { want, entry, tokens, past: 0, launches });
        Ok(trace)
    }

    /// Values in all.
    pub fn values(&self) -> usize {
        let launches = self.steps.iter().flat_map(|step| &step.launches);
        launches.map(|launch| launch.values.len()).sum()
    }

    /// Launches in all.
    pub fn launches(&self) -> usize {
        self.steps.iter().map(|step| step.launches.len()).sum()
    }
}

/// Name of the value that a model is asked for.
const LOGITS: &str = "logits";

/// Why there is no trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Its memory.
    #[error(transparent)]
    Stored(#[from] StoredError),
    /// Two traces that cannot be compared.
    #[error("the traces cannot be compared: their {what} are {a} and {b}")]
    Apart {
        /// What differs.
        what: &'static str,
        /// In the one.
        a: String,
        /// In the other.
        b: String,
    },
}
