//! The level `layer`: what each layer gives, and what each module of a reference does.
//!
//! * [`Layers::judge`]: each layer on what the program itself fed it, by the interpreter on the same stored weights; an
//!   error is blamed on the layer that made it. What is before and behind the layers is judged alike.
//! * [`Layers::judge_reference`]: the hidden state behind each layer, by what a reference file says of it.
//! * [`Layers::judge_modules`]: each module of the checkpoint on the inputs that a reference file has: the interpreter
//!   computes it from the artifact's weights. It says which module of an artifact is not the reference's, without a
//!   checkpoint; that the kernels do what the interpreter does is the other levels' to say.
//!
//! The rule is that of [`chain`](crate::judge::chain).

use super::stored::{self, Bound, StoredError};
use super::{Fault, Seen, layer_of};
use crate::judge::Mismatch;
use crate::judge::chain::{Chain, Likely};
use crate::reference::Reference;
use ir::dim::MAX_SYMBOLS;
use ir::families::{GroupView, storage};
use ir::graph::{Graph, ValueId};
use ir::interp::{InterpError, Tensor};
use ir::op::Op;
use ir::plan::{Give, Plan, PlanKernel};
use models::llama::Module;
use runtime::device::{DeviceError, State, Step, Tap, Tapped, Want};
use runtime::interpreter::InterpretedProgram;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Why layers cannot be judged.
#[derive(Debug, thiserror::Error)]
pub enum LayersError {
    /// The device, or the interpreter.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The device's memory is not as its plan says.
    #[error(transparent)]
    Stored(#[from] StoredError),
    /// The oracle.
    #[error(transparent)]
    Oracle(#[from] InterpError),
    /// There is nothing to ask.
    #[error("the plan has no entry point that gives the logits of every position")]
    NoEntry,
    /// The reference has nothing that could be compared.
    #[error("the reference has no {what}: tools/write-reference.py writes them{how}")]
    Nothing {
        /// What is missing.
        what: &'static str,
        /// How to write it.
        how: &'static str,
    },
}

/// What layers came to.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    /// Layers, or what else was judged, in order, with the largest share of a bound.
    pub rows: Vec<(String, f64)>,
    /// Tensors that were judged.
    pub tensors: usize,
    /// The first that is wrong.
    pub fault: Option<Fault>,
}

/// A value that leaves a layer, the rows of all steps one behind the other.
struct Leaving {
    label: String,
    group: String,
    value: String,
    found: Tensor,
    likely: Likely,
    /// What stored the rows from the first of these on.
    kernels: Vec<(usize, PlanKernel)>,
}

impl Leaving {
    fn fault(&self, mismatch: &Mismatch) -> Fault {
        let row = match mismatch {
            Mismatch::Element { index, .. } => index.first().copied().unwrap_or(0),
            Mismatch::Type { .. } | Mismatch::Spread { .. } => 0,
        };
        let kernel = self.kernels.iter().rfind(|(first, _)| *first <= row).map(|(_, kernel)| kernel);
        Fault {
            kernel: kernel.map(|kernel| kernel.name.clone()),
            schedule: kernel.map(|kernel| kernel.schedule.clone()),
            ..fault(&self.group, &self.value, mismatch)
        }
    }
}

/// A value that a launch stored.
struct StoredValue {
    group: usize,
    id: ValueId,
    tensor: Rc<Tensor>,
}

impl StoredValue {
    /// Is it made in the groups of a layer, and read outside of them? Caches and choices are not judged: what reads them is.
    fn leaves(&self, graph: &Graph, segment: &[usize]) -> bool {
        let inside = |user: ValueId| graph[user].group.is_some_and(|g| segment.contains(&(g.0 as usize)));
        let is_state = matches!(graph[storage(graph, self.id)].op, Op::State { .. });
        let is_output = graph.outputs.iter().any(|(_, output)| *output == self.id);
        let readers = graph.ids().filter(|&user| graph[user].operands.contains(&self.id));
        let read = is_output || readers.into_iter().any(|user| !inside(user));
        segment.contains(&self.group) && graph[self.id].ty.dtype.is_float() && !is_state && read
    }
}

impl Layers {
    /// The largest share of a bound.
    pub fn worst(&self) -> f64 {
        self.rows.iter().map(|row| row.1).fold(0.0, f64::max)
    }

    /// Judges each layer of a prompt and of the decode step after it. `graphs` are those of [`stored::fused`], `weights` has
    /// the artifact's.
    ///
    /// # Errors
    ///
    /// [`LayersError`].
    pub fn judge(
        &mut self,
        program: &mut dyn Tapped,
        graphs: &[Graph],
        weights: &mut InterpretedProgram,
        tokens: &[i32],
    ) -> Result<(), LayersError> {
        let before = tokens.len().saturating_sub(1).min(program.max_tokens(Want::AllLogits));
        let steps = [(&tokens[..before], Want::AllLogits), (&tokens[before..][..1], Want::Token)];
        let mut state = program.state()?;
        let mut caches = BTreeMap::new();
        let mut leaving: Vec<Leaving> = Vec::new();
        for (tokens, want) in steps.into_iter().filter(|(tokens, _)| !tokens.is_empty()) {
            let symbols = symbols(tokens.len(), state.past());
            let (number, stored) = run(program, graphs, &Step { tokens, want }, &mut state)?;
            let graph = &graphs[number];
            let kernels = kernels(program.plan(), &graph.name);
            let mut bound = Bound { weights, symbols, tokens, caches: &caches };
            for segment in segments(graph) {
                let mut chain = Chain::new(graph, symbols, false);
                let outside = stored.iter().filter(|s| !segment.contains(&s.group));
                outside.for_each(|s| chain.give(s.id, s.tensor.clone()));
                let out: Vec<&StoredValue> = stored.iter().filter(|s| s.leaves(graph, &segment)).collect();
                let ids: Vec<ValueId> = out.iter().map(|s| s.id).collect();
                let likely =
                    chain.likely(&ids, &mut |value| bound.tensor(value).map_err(LayersError::from))?;
                for (s, likely) in out.iter().zip(likely) {
                    add(&mut leaving, graph, &ids, s, likely, kernels[s.group].clone());
                }
            }
            for s in &stored {
                if let Op::State { name } = &graph[storage(graph, s.id)].op {
                    caches.insert(name.clone(), s.tensor.clone());
                }
            }
        }
        for value in &leaving {
            self.keep(&value.label, value.likely.check(&value.found), |mismatch| value.fault(mismatch));
        }
        Ok(())
    }

    /// Judges hidden states by a reference's, up to which weights, too, were rounded.
    ///
    /// # Errors
    ///
    /// [`LayersError`].
    pub fn judge_reference(
        &mut self,
        program: &mut dyn Tapped,
        graphs: &[Graph],
        weights: &mut InterpretedProgram,
        (reference, modules): (&Reference, &[Module]),
    ) -> Result<(), LayersError> {
        let number = program.plan().entries.iter().position(|entry| entry.give == Give::All);
        let graph = &graphs[number.ok_or(LayersError::NoEntry)?];
        for prompt in &reference.prompts {
            let found = hidden(program, graphs, &prompt.tokens)?;
            let known = modules.iter().filter_map(|module| {
                let truth = prompt.modules.get(&format!("{}.output", module.name))?;
                Some((module, truth, found.get(&module.output)?, graph.find(&module.output)?))
            });
            let known: Vec<_> = known.collect();
            let symbols = symbols(prompt.tokens.len(), 0);
            let mut bound = Bound { weights, symbols, tokens: &prompt.tokens, caches: &BTreeMap::new() };
            let ids: Vec<ValueId> = known.iter().map(|known| known.3).collect();
            let mut chain = Chain::new(graph, symbols, true);
            let likely = chain.likely(&ids, &mut |value| bound.tensor(value).map_err(LayersError::from))?;
            for ((module, truth, found, _), likely) in known.into_iter().zip(likely) {
                let judged = likely.check_by(truth, found);
                self.keep(&module.name, judged, |mismatch| of_module(module, mismatch));
            }
        }
        match self.rows.is_empty() {
            true => Err(LayersError::Nothing { what: "hidden states of this model", how: "" }),
            false => Ok(()),
        }
    }

    /// Judges each module on a reference's own inputs, the parts of a module before the whole. `graph` is one of `weights`
    /// that gives all logits, before any pass.
    ///
    /// # Errors
    ///
    /// [`LayersError`].
    pub fn judge_modules(
        &mut self,
        graph: &Graph,
        weights: &mut InterpretedProgram,
        (reference, modules): (&Reference, &[Module]),
    ) -> Result<(), LayersError> {
        for prompt in &reference.prompts {
            let symbols = symbols(prompt.tokens.len(), 0);
            let mut bound = Bound { weights, symbols, tokens: &prompt.tokens, caches: &BTreeMap::new() };
            for module in modules {
                let known = |end: &str| prompt.modules.get(&format!("{}.{end}", module.name));
                let (Some(truth), Some(output)) = (known("output"), graph.find(&module.output)) else {
                    continue;
                };
                let mut chain = Chain::new(graph, symbols, true);
                if let (Some(input), Some(id)) = (known("input"), graph.find(&module.input)) {
                    chain.give(id, Rc::new(input.clone()));
                }
                let mut bind = |value: &_| bound.tensor(value).map_err(LayersError::from);
                let likely = chain.likely(&[output], &mut bind)?.remove(0);
                let judged = likely.check_by(truth, &flat(&likely.exact));
                let label = layer_of(&module.name).0.map_or(module.name.clone(), |l| format!("layer {l}"));
                self.keep(&label, judged, |mismatch| of_module(module, mismatch));
                if self.fault.is_some() {
                    return Ok(());
                }
            }
        }
        match self.rows.is_empty() {
            true => Err(LayersError::Nothing { what: "modules of this model", how: ", by --modules" }),
            false => Ok(()),
        }
    }

    fn keep(&mut self, label: &str, judged: Result<f64, Mismatch>, fault: impl FnOnce(&Mismatch) -> Fault) {
        self.tensors += 1;
        let share = match &judged {
            Ok(share) => *share,
            Err(mismatch) => mismatch.shares().hard,
        };
        match self.rows.iter_mut().find(|row| row.0 == label) {
            Some(row) => row.1 = row.1.max(share),
            None => self.rows.push((label.to_string(), share)),
        }
        if let Err(mismatch) = judged {
            self.fault.get_or_insert_with(|| fault(&mismatch));
        }
    }
}

/// The kernel of each launch of an entry point.
fn kernels(plan: &Plan, entry: &str) -> Vec<PlanKernel> {
    let launches = plan.entries.iter().filter(|e| e.name == entry).flat_map(|e| &e.launches);
    launches.map(|launch| plan.kernels[launch.kernel].clone()).collect()
}

/// Adds the rows of a value that leaves a layer with others, `together`.
fn add(
    leaving: &mut Vec<Leaving>,
    graph: &Graph,
    together: &[ValueId],
    stored: &StoredValue,
    likely: Likely,
    kernel: PlanKernel,
) {
    let (value, group) = (&graph[stored.id].name, graph.groups[stored.group].name.clone());
    if let Some(known) = leaving.iter_mut().find(|known| known.value == *value) {
        known.kernels.push((known.found.shape[0], kernel));
        known.found.append(Tensor::clone(&stored.tensor));
        known.likely.append(likely);
        return;
    }
    let names = || together.iter().map(|&id| graph[id].name.as_str()).collect::<Vec<_>>().join(", ");
    let label = layer_of(&group).0.map_or_else(names, |layer| format!("layer {layer}"));
    let found = Tensor::clone(&stored.tensor);
    leaving.push(Leaving { label, group, value: value.clone(), found, likely, kernels: vec![(0, kernel)] });
}

/// Consecutive groups of one layer, by their numbers.
fn segments(graph: &Graph) -> Vec<Vec<usize>> {
    let layer = |group: &usize| layer_of(&graph.groups[*group].name).0;
    let numbers: Vec<usize> = (0..graph.groups.len()).collect();
    numbers.chunk_by(|a, b| layer(a) == layer(b)).map(<[usize]>::to_vec).collect()
}

fn symbols(tokens: usize, past: usize) -> [i64; MAX_SYMBOLS] {
    let mut symbols = [0; MAX_SYMBOLS];
    (symbols[0], symbols[1]) = (tokens as i64, past as i64);
    symbols
}

/// Runs a step; gives the number of its entry point and what each launch stored.
fn run(
    program: &mut dyn Tapped,
    graphs: &[Graph],
    step: &Step<'_>,
    state: &mut State,
) -> Result<(usize, Vec<StoredValue>), LayersError> {
    let plan = program.plan().clone();
    let number = plan.entry_number(step.tokens.len(), step.want.give());
    let number = number.expect("a step no longer than max_tokens has an entry point");
    let (graph, symbols) = (&graphs[number], symbols(step.tokens.len(), state.past()));
    let views = GroupView::all(graph);
    let mut stored: Vec<Result<StoredValue, StoredError>> = Vec::new();
    program.run_tapped(step, state, &mut |tap: Tap<'_>| {
        stored.extend(views[tap.launch].roots.iter().map(|&id| {
            let tensor = Rc::new(stored::tensor(graph, &plan, id, &symbols, tap)?);
            Ok(StoredValue { group: tap.launch, id, tensor })
        }));
    })?;
    Ok((number, stored.into_iter().collect::<Result<_, _>>()?))
}

/// What a program stores for each position of a prompt, by the names of values.
fn hidden(
    program: &mut dyn Tapped,
    graphs: &[Graph],
    tokens: &[i32],
) -> Result<BTreeMap<String, Tensor>, LayersError> {
    let (mut state, mut all) = (program.state()?, BTreeMap::<String, Tensor>::new());
    for tokens in tokens.chunks(program.max_tokens(Want::AllLogits).max(1)) {
        let step = Step { tokens, want: Want::AllLogits };
        let (number, stored) = run(program, graphs, &step, &mut state)?;
        for s in stored.into_iter().filter(|s| s.tensor.shape.first() == Some(&tokens.len())) {
            let (name, rows) = (&graphs[number][s.id].name, flat(&s.tensor));
            match all.get_mut(name) {
                Some(before) => before.append(rows),
                None => drop(all.insert(name.clone(), rows)),
            }
        }
    }
    Ok(all)
}

/// A tensor as rows, one a token, as references have them.
fn flat(tensor: &Tensor) -> Tensor {
    let rows = tensor.shape.first().copied().unwrap_or(1);
    let width = tensor.shape.iter().skip(1).product();
    Tensor { dtype: tensor.dtype, shape: vec![rows, width], data: tensor.data.clone() }
}

fn fault(group: &str, value: &str, mismatch: &Mismatch) -> Fault {
    let (layer, op) = layer_of(group);
    let (index, found, expected, how) = match mismatch {
        Mismatch::Element { index, found, expected, share, .. } => {
            let how = format!("{share:.2} of the bound");
            (index.clone(), Seen::Number(*found), Seen::Number(*expected), how)
        }
        Mismatch::Type { found, expected, .. } => {
            let text = |shape: &[usize]| Seen::Text(format!("{shape:?}"));
            (Vec::new(), text(found), text(expected), "another shape".to_string())
        }
        Mismatch::Spread { share } => {
            let text = |text: &str| Seen::Text(text.to_string());
            (Vec::new(), text("other numbers"), text("the same"), format!("{share:.2} of the bound"))
        }
    };
    let (op, what) = (Some(op.to_string()), format!("%{value}, {how}"));
    Fault { layer, op, kernel: None, schedule: None, index, found, expected, what }
}

fn of_module(module: &Module, mismatch: &Mismatch) -> Fault {
    fault(&module.name, &module.output, mismatch)
}
