//! The level `op`: each launch is judged on what the program itself fed it.
//!
//! An op's operands are what the launches before it stored, read as soon as they had; so an error is blamed on the op that
//! made it, and a tensor that was overwritten before its reader came on that reader.

use super::reproducer::KernelCase;
use super::stored::{self, Bound, StoredError};
use super::{Fault, Seen, layer_of};
use crate::judge::group::expect;
use crate::judge::{Expected, Mismatch, Shares};
use crate::pipeline::{Entry, Lowered};
use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::families::{GroupView, storage};
use ir::graph::ValueId;
use ir::interp::{InterpError, Tensor};
use ir::kernel::Kernel;
use ir::op::Op;
use runtime::device::{DeviceError, Step, Tap, Tapped, Want};
use runtime::interpreter::InterpretedProgram;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

/// Why ops cannot be judged.
#[derive(Debug, thiserror::Error)]
pub enum OpsError {
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Its memory is not as its plan says.
    #[error(transparent)]
    Stored(#[from] StoredError),
    /// The oracle.
    #[error(transparent)]
    Oracle(#[from] InterpError),
    /// The artifact was not made by this compiler.
    #[error("its plan is not the one that this llamac makes: compile it again, or compare at level logits")]
    OtherPlan,
}

/// What ops came to.
#[derive(Clone, Debug, Default)]
pub struct Ops {
    /// The worst shares of the bounds in each layer; those outside of layers first.
    pub layers: BTreeMap<Option<usize>, Shares>,
    /// Launches that were judged.
    pub launches: usize,
    /// The first that is wrong.
    pub fault: Option<Fault>,
    /// The same, to be looked at alone.
    pub case: Option<Box<KernelCase>>,
}

impl Ops {
    /// Judges every launch of every entry point: the tokens but the last in one step of each kind, then the last in a
    /// decode step. Stops at the first that is wrong.
    ///
    /// `lowered` is what the program was compiled from, `weights` has the same weights.
    ///
    /// # Errors
    ///
    /// [`OpsError`].
    pub fn judge(
        &mut self,
        program: &mut dyn Tapped,
        lowered: &Lowered,
        weights: &mut InterpretedProgram,
        tokens: &[i32],
    ) -> Result<(), OpsError> {
        if lowered.plan.to_string() != program.plan().to_string() {
            return Err(OpsError::OtherPlan);
        }
        self.fault = misplaced(lowered);
        if self.fault.is_some() {
            return Ok(());
        }
        for want in [Want::Nothing, Want::Logits, Want::AllLogits] {
            let mut state = program.state()?;
            let mut caches = BTreeMap::new();
            let before = tokens.len().saturating_sub(1).min(program.max_tokens(want));
            let steps = [(&tokens[..before], want), (&tokens[before..][..1], Want::Token)];
            for (tokens, want) in steps.into_iter().filter(|(tokens, _)| !tokens.is_empty()) {
                let mut symbols = [0; MAX_SYMBOLS];
                (symbols[0], symbols[1]) = (tokens.len() as i64, state.past() as i64);
                let mut walk = Walk { lowered, weights, symbols, tokens, caches, known: HashMap::new() };
                let mut failed = None;
                program.run_tapped(&Step { tokens, want }, &mut state, &mut |tap| {
                    if self.fault.is_none() && failed.is_none() {
                        failed = self.launch(&mut walk, tap).err();
                    }
                })?;
                caches = walk.caches;
                if let Some(error) = failed {
                    return Err(error);
                }
                if self.fault.is_some() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The worst share of a bound.
    pub fn worst(&self) -> f64 {
        self.layers.values().map(|shares| shares.hard.max(shares.typical)).fold(0.0, f64::max)
    }

    /// Judges what one launch stored.
    fn launch(&mut self, walk: &mut Walk<'_>, tap: Tap<'_>) -> Result<(), OpsError> {
        let entry = walk.lowered.entries.iter().find(|entry| entry.graph.name == tap.entry.name);
        let entry = entry.expect("the plan is that of these entry points");
        let view = &GroupView::all(&entry.graph)[tap.launch];
        walk.know(view)?;
        let expected = expect(view, &walk.symbols, &mut |id| walk.known[&id].clone())?;
        let layer = layer_of(view.name()).0;
        self.launches += 1;
        let tensor = |&root| {
            let found = stored::tensor(&entry.graph, &walk.lowered.plan, root, &walk.symbols, tap)?;
            Ok((root, found))
        };
        let found = view.roots.iter().map(tensor).collect::<Result<Vec<_>, StoredError>>()?;
        for ((root, found), expected) in found.iter().zip(&expected) {
            match expected.check(found) {
                Ok(shares) => {
                    let worst = self.layers.entry(layer).or_default();
                    *worst = worst.worst(shares);
                }
                Err(mismatch) if self.fault.is_none() => {
                    let kernel = &walk.lowered.kernels[entry.launches[tap.launch].kernel];
                    let value = &entry.graph[*root].name;
                    self.fault = Some(Fault {
                        kernel: Some(kernel.name.clone()),
                        schedule: Some(kernel.schedule.clone()),
                        ..fault(view.name(), value, expected, found, &mismatch)
                    });
                }
                Err(_) => {}
            }
        }
        if self.fault.is_some() {
            let kernel = &walk.lowered.kernels[entry.launches[tap.launch].kernel];
            let stored = |id| walk.known[&id].clone();
            let read = (&walk.symbols, &stored as &dyn Fn(ValueId) -> Rc<Tensor>);
            let case = KernelCase::of(view, (kernel, &walk.lowered.target), read, &found, &expected);
            self.case = Some(Box::new(case));
        }
        for (root, found) in found {
            walk.keep(entry, root, found);
        }
        Ok(())
    }
}

/// One step, launch by launch.
struct Walk<'s> {
    lowered: &'s Lowered,
    weights: &'s mut InterpretedProgram,
    symbols: [i64; MAX_SYMBOLS],
    tokens: &'s [i32],
    /// What the steps before have stored in the caches, by name; zero where nothing has.
    caches: BTreeMap<String, Rc<Tensor>>,
    /// What is stored so far.
    known: HashMap<ValueId, Rc<Tensor>>,
}

impl Walk<'_> {
    /// Brings what a group reads and no launch has stored.
    fn know(&mut self, view: &GroupView<'_>) -> Result<(), OpsError> {
        let graph = view.graph;
        let Walk { weights, symbols, tokens, caches, known, .. } = self;
        let mut bound = Bound { weights, symbols: *symbols, tokens, caches };
        for &id in view.values.iter().flat_map(|&id| &graph[id].operands) {
            let is_bound = matches!(graph[id].op, Op::Weight { .. } | Op::State { .. } | Op::Input { .. });
            if is_bound && !known.contains_key(&id) {
                known.insert(id, bound.tensor(&graph[id])?);
            }
        }
        Ok(())
    }

    fn keep(&mut self, entry: &Entry, root: ValueId, found: Tensor) {
        let found = Rc::new(found);
        if let Op::State { name } = &entry.graph[storage(&entry.graph, root)].op {
            self.caches.insert(name.clone(), found.clone());
        }
        self.known.insert(root, found);
    }
}

/// The first launch of the plan that is not its group's: left out, with another kernel, or with no argument for a result.
fn misplaced(lowered: &Lowered) -> Option<Fault> {
    let plan = &lowered.plan;
    for (entry, planned) in lowered.entries.iter().zip(&plan.entries) {
        let views = GroupView::all(&entry.graph);
        for at in 0..views.len().max(planned.launches.len()) {
            let (view, launch) = (views.get(at), planned.launches.get(at));
            let own = entry.launches.get(at).map(|launch| &lowered.kernels[launch.kernel]);
            let fault = |found: String, expected: String| {
                let (layer, op) = view.map(|view| layer_of(view.name())).unzip();
                let (kernel, schedule) = own.map(|own| (own.name.clone(), own.schedule.clone())).unzip();
                let (found, expected) = (Seen::Text(found), Seen::Text(expected));
                let what = format!("launch {at} of @{}", planned.name);
                let (layer, op) = (layer.flatten(), op.map(str::to_string));
                Some(Fault { layer, op, kernel, schedule, index: Vec::new(), found, expected, what })
            };
            let name =
                |kernel: Option<&Kernel>| kernel.map_or("none".to_string(), |k| format!("@{}", k.name));
            let found = name(launch.map(|launch| &lowered.kernels[launch.kernel]));
            if found != name(own) {
                return fault(found, name(own));
            }
            let args = launch.into_iter().flat_map(|launch| &launch.args);
            let args: Vec<&str> = args.map(|&arg| &*plan.buffers[arg].name).collect();
            let results = view.into_iter().flat_map(|view| &view.roots);
            let mut results = results.map(|&root| stored::buffer_name(&entry.graph, root));
            if let Some(lost) = results.find(|result| !args.contains(&&**result)) {
                return fault(format!("arguments {}", args.join(", ")), lost);
            }
        }
    }
    None
}

/// Names a wrong result of a group.
pub(super) fn fault(
    group: &str,
    value: &str,
    expected: &Expected,
    found: &Tensor,
    mismatch: &Mismatch,
) -> Fault {
    let (layer, op) = layer_of(group);
    let (index, seen, exact) = match mismatch {
        Mismatch::Element { index, found, expected, .. } => {
            (index.clone(), Seen::Number(*found), Seen::Number(*expected))
        }
        // No element alone is wrong: the one that is farthest off stands for them.
        Mismatch::Spread { .. } => {
            let off = |at: &usize| (found.data[*at] - expected.exact[*at]).abs();
            let at = (0..found.data.len()).max_by(|a, b| off(a).total_cmp(&off(b))).unwrap_or(0);
            let index = crate::judge::index_of(at, &found.shape);
            (index, Seen::Number(found.data[at]), Seen::Number(expected.exact[at]))
        }
        Mismatch::Type { found_dtype, found, expected_dtype, expected } => {
            let text = |dtype: &DType, shape: &[usize]| Seen::Text(format!("{dtype}{shape:?}"));
            (Vec::new(), text(found_dtype, found), text(expected_dtype, expected))
        }
    };
    let how = match mismatch {
        Mismatch::Element { bound, share, .. } => format!("{share:.2} of the hard bound, which is {bound:e}"),
        Mismatch::Spread { .. } => mismatch.to_string(),
        Mismatch::Type { .. } => "another type".to_string(),
    };
    let (op, what) = (Some(op.to_string()), format!("%{value}, {how}"));
    Fault { layer, op, kernel: None, schedule: None, index, found: seen, expected: exact, what }
}
