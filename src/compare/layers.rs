//! The level `layer`: what each layer gives, and what each module of a reference does.
//!
//! * [`Layers::judge`]: each layer on what the program itself fed it, by the interpreter on the same stored weights; an
//!   error is blamed on the layer that made it. What is before and behind the layers is judged alike.
//! * [`Layers::judge_reference`]: the hidden state behind each layer, by what a reference file says of it.
//! * [`Layers::judge_modules`]: each module of the checkpoint on the inputs that a reference file has: the interpreter
//!   computes it from the artifact's weights. It says which module of an artifact is not the reference's, without a
//!   checkpoint; that the kernels do what the interpreter does is the other levels' to say.
//!
//! The rule is [`judge::model_tensor`]'s.
//!
//! In bf16 its root mean square over all channels is ruled by the largest one, where a model has one of thousands among small
//! ones: rounding alone may then exceed the bound. What the level `op` says of the same launches decides.

use super::stored::{self, StoredError};
use super::{Fault, Seen, layer_of};
use crate::judge::{self, Mismatch};
use crate::reference::Reference;
use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::families::{GroupView, storage};
use ir::graph::{Graph, ValueId};
use ir::interp::{Rounding, Tensor};
use ir::op::Op;
use ir::plan::{Plan, PlanKernel};
use models::llama::Module;
use runtime::device::{DeviceError, Program, State, Step, Tap, Tapped, Want};
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

/// Tensors by the names of values.
type Named = BTreeMap<String, Rc<Tensor>>;

/// A value that leaves a layer, the rows of all steps one behind the other.
struct Leaving {
    label: String,
    group: String,
    value: String,
    dtype: DType,
    /// Found, exact, honest.
    rows: [Tensor; 3],
    /// What stored the rows from the first of these on.
    kernels: Vec<(usize, PlanKernel)>,
}

impl Leaving {
    fn judge(&self) -> Result<f64, Mismatch> {
        let [found, exact, honest] = &self.rows;
        judge::model_tensor(found, exact, judge::honest_error(honest, exact, self.dtype), self.dtype)
    }

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

impl Layers {
    /// The largest share of a bound.
    pub fn worst(&self) -> f64 {
        self.rows.iter().map(|row| row.1).fold(0.0, f64::max)
    }

    /// Judges each layer of a prompt and of the decode step after it. `graphs` are those of [`stored::fused`], `oracle` has
    /// the artifact's weights.
    ///
    /// # Errors
    ///
    /// [`LayersError`].
    pub fn judge(
        &mut self,
        program: &mut dyn Tapped,
        graphs: &[Graph],
        oracle: &mut InterpretedProgram,
        tokens: &[i32],
    ) -> Result<(), LayersError> {
        let before = tokens.len().saturating_sub(1).min(program.max_tokens(Want::AllLogits));
        let steps = [(&tokens[..before], Want::AllLogits), (&tokens[before..][..1], Want::Token)];
        let mut state = program.state()?;
        let mut caches = Named::new();
        // One position alone has few numbers, and a root mean square of few says little: each value is judged at the end.
        let mut leaving: Vec<Leaving> = Vec::new();
        for (tokens, want) in steps.into_iter().filter(|(tokens, _)| !tokens.is_empty()) {
            let symbols = symbols(tokens.len(), state.past());
            let (number, stored) = run(program, graphs, &Step { tokens, want }, &mut state)?;
            let graph = &graphs[number];
            let bound = inputs(tokens, symbols[1] as usize);
            for segment in segments(graph) {
                let outside = stored.iter().filter(|s| !segment.contains(&s.group));
                let mut given: Named =
                    outside.map(|s| (graph[s.id].name.clone(), s.tensor.clone())).collect();
                given.extend(bound.clone());
                given.extend(caches.clone());
                let kernels = kernels(program.plan(), &graph.name);
                segment_rows(&mut leaving, graph, &segment, (&stored, &kernels), oracle, (&symbols, &given))?;
            }
            for s in &stored {
                let kept = &graph[storage(graph, s.id)];
                if matches!(kept.op, Op::State { .. }) {
                    caches.insert(kept.name.clone(), s.tensor.clone());
                }
            }
        }
        for value in &leaving {
            self.keep(&value.label, value.judge(), |mismatch| value.fault(mismatch));
        }
        Ok(())
    }

    /// Judges hidden states by a reference's. In bf16 the honest error is that of the interpreter, which runs the prompts too;
    /// `exact`, which rounds nothing, says how much of it is rounding, so that other weights than the reference's do not widen
    /// the bound.
    ///
    /// # Errors
    ///
    /// [`LayersError`].
    pub fn judge_reference(
        &mut self,
        program: &mut dyn Tapped,
        graphs: &[Graph],
        [oracle, exact]: [&mut InterpretedProgram; 2],
        (reference, modules): (&Reference, &[Module]),
        dtype: DType,
    ) -> Result<(), LayersError> {
        // By module, all prompts one behind the other: found, truth, honest, exact.
        let mut all: BTreeMap<usize, [Tensor; 4]> = BTreeMap::new();
        for prompt in &reference.prompts {
            let found = hidden(program, graphs, &prompt.tokens)?;
            let [honest, exact] = match dtype {
                DType::F32 => [Named::new(), Named::new()],
                _ => [seen(oracle, &prompt.tokens)?, seen(exact, &prompt.tokens)?],
            };
            for (number, module) in modules.iter().enumerate() {
                let truth = prompt.modules.get(&format!("{}.output", module.name));
                let (Some(truth), Some(found)) = (truth, found.get(&module.output)) else { continue };
                let found = flat(found);
                match honest.get(&module.output).zip(exact.get(&module.output)) {
                    None => {
                        let honest_error = prompt.f32_errors.get(&format!("{}.output", module.name));
                        let judged =
                            judge::model_tensor(&found, truth, honest_error.copied().unwrap_or(0.0), dtype);
                        self.keep(&module.name, judged, |mismatch| of_module(module, mismatch));
                    }
                    Some((honest, exact)) => {
                        let rows = [found, truth.clone(), flat(honest), flat(exact)];
                        match all.get_mut(&number) {
                            Some(before) => before.iter_mut().zip(rows).for_each(|(a, b)| append(a, b)),
                            None => drop(all.insert(number, rows)),
                        }
                    }
                }
            }
        }
        for (number, [found, truth, honest, exact]) in all {
            let module = &modules[number];
            let rounding = judge::honest_error(&honest, &exact, dtype);
            // Where no stored value was rounded before, as behind the embedding, the weights' own rounding is all there is.
            let rounded = Tensor::new(dtype, &truth.shape, &truth.data);
            let of_weights = judge::honest_error(&rounded, &truth, dtype);
            let allowed = judge::weights_error(rounding).hypot(of_weights);
            if let Err(mismatch) = judge::model_tensor(&honest, &truth, allowed, dtype) {
                let fault = of_module(module, &mismatch);
                let what = format!("{}: the weights are not the reference's", fault.what);
                self.fault.get_or_insert(Fault { what, ..fault });
            }
            let honest_error = judge::honest_error(&honest, &truth, dtype);
            let judged = judge::model_tensor(&found, &truth, honest_error, dtype);
            self.keep(&module.name, judged, |mismatch| of_module(module, mismatch));
        }
        match self.rows.is_empty() {
            true => Err(LayersError::Nothing { what: "hidden states of this model", how: "" }),
            false => Ok(()),
        }
    }

    /// Judges each module on a reference's own inputs, the parts of a module before the whole.
    ///
    /// # Errors
    ///
    /// [`LayersError`].
    pub fn judge_modules(
        &mut self,
        oracle: &mut InterpretedProgram,
        entry: &str,
        (reference, modules): (&Reference, &[Module]),
        dtype: DType,
    ) -> Result<(), LayersError> {
        for prompt in &reference.prompts {
            let symbols = symbols(prompt.tokens.len(), 0);
            for module in modules {
                let (input, output) = (format!("{}.input", module.name), format!("{}.output", module.name));
                let Some(truth) = prompt.modules.get(&output) else { continue };
                let mut given = inputs(&prompt.tokens, 0);
                if module.input != "tokens" {
                    let Some(input) = prompt.modules.get(&input) else { continue };
                    given.insert(module.input.clone(), Rc::new(input.clone()));
                }
                let wanted = [module.output.as_str()];
                let exact = oracle.part(entry, &symbols, Rounding::Exact, &given, &wanted)?.remove(0);
                let found = flat(&exact);
                let honest_error = match dtype {
                    DType::F32 => prompt.f32_errors.get(&output).copied().unwrap_or(0.0),
                    _ => {
                        for tensor in given.values_mut().filter(|tensor| tensor.dtype.is_float()) {
                            *tensor = Rc::new(Tensor::new(dtype, &tensor.shape, &tensor.data));
                        }
                        let stored =
                            oracle.part(entry, &symbols, Rounding::Stored, &given, &wanted)?.remove(0);
                        // Its weights are rounded once more than the reference's: as much as rounding the result.
                        let rounded = Tensor::new(dtype, &truth.shape, &truth.data);
                        let of_weights = judge::honest_error(&rounded, truth, dtype);
                        judge::honest_error(&flat(&stored), &found, dtype).hypot(of_weights)
                    }
                };
                let judged = judge::model_tensor(&found, truth, honest_error, dtype);
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

/// Adds what the groups of one layer give to others, and what they should.
fn segment_rows(
    leaving: &mut Vec<Leaving>,
    graph: &Graph,
    segment: &[usize],
    (stored, kernels): (&[StoredValue], &[PlanKernel]),
    oracle: &mut InterpretedProgram,
    (symbols, given): (&[i64; MAX_SYMBOLS], &Named),
) -> Result<(), LayersError> {
    let users = graph.users();
    let leaves = |id: ValueId| {
        let inside = |user: &ValueId| graph[*user].group.is_some_and(|g| segment.contains(&(g.0 as usize)));
        let is_state = matches!(graph[storage(graph, id)].op, Op::State { .. });
        let is_output = graph.outputs.iter().any(|(_, output)| *output == id);
        let read = is_output || users[id.0 as usize].iter().any(|user| !inside(user));
        // What a pass made has no place in the graph that the interpreter runs.
        let known = oracle.graph(&graph.name).is_ok_and(|whole| whole.find(&graph[id].name).is_some());
        graph[id].ty.dtype.is_float() && !is_state && read && known
    };
    let out: Vec<&StoredValue> =
        stored.iter().filter(|s| segment.contains(&s.group) && leaves(s.id)).collect();
    let names: Vec<&str> = out.iter().map(|s| graph[s.id].name.as_str()).collect();
    let exact = oracle.part(&graph.name, symbols, Rounding::Exact, given, &names)?;
    let honest = oracle.part(&graph.name, symbols, Rounding::Summed, given, &names)?;
    for ((s, exact), honest) in out.iter().zip(&exact).zip(&honest) {
        let rows = [&s.tensor, exact, honest].map(|tensor| flat(tensor));
        let (value, kernel) = (&graph[s.id].name, kernels[s.group].clone());
        if let Some(known) = leaving.iter_mut().find(|known| known.value == *value) {
            known.kernels.push((known.rows[0].shape[0], kernel));
            known.rows.iter_mut().zip(rows).for_each(|(a, b)| append(a, b));
            continue;
        }
        let group = graph.groups[s.group].name.clone();
        let label = layer_of(&group).0.map_or_else(|| names.join(", "), |layer| format!("layer {layer}"));
        let (value, dtype, kernels) = (value.clone(), graph[s.id].ty.dtype, vec![(0, kernel)]);
        leaving.push(Leaving { label, group, value, dtype, rows, kernels });
    }
    Ok(())
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

/// What a step binds.
fn inputs(tokens: &[i32], past: usize) -> Named {
    let ids = |data: Vec<f64>| Rc::new(Tensor::new(DType::I32, &[data.len()], &data));
    let positions = (past..past + tokens.len()).map(|p| p as f64).collect();
    let tokens = tokens.iter().map(|&t| f64::from(t)).collect();
    Named::from([("tokens".to_string(), ids(tokens)), ("positions".to_string(), ids(positions))])
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
fn hidden(program: &mut dyn Tapped, graphs: &[Graph], tokens: &[i32]) -> Result<Named, LayersError> {
    let (mut state, mut all) = (program.state()?, BTreeMap::<String, Tensor>::new());
    for tokens in tokens.chunks(program.max_tokens(Want::AllLogits).max(1)) {
        let step = Step { tokens, want: Want::AllLogits };
        let (number, stored) = run(program, graphs, &step, &mut state)?;
        for s in stored.into_iter().filter(|s| s.tensor.shape.first() == Some(&tokens.len())) {
            join(&mut all, &graphs[number][s.id].name, flat(&s.tensor));
        }
    }
    Ok(all.into_iter().map(|(name, tensor)| (name, Rc::new(tensor))).collect())
}

/// The same of the interpreter.
fn seen(oracle: &mut InterpretedProgram, tokens: &[i32]) -> Result<Named, LayersError> {
    let (mut state, mut all) = (oracle.state()?, BTreeMap::<String, Tensor>::new());
    for tokens in tokens.chunks(oracle.max_tokens(Want::AllLogits).max(1)) {
        oracle.run_seen(&Step { tokens, want: Want::AllLogits }, &mut state, &mut |name, tensor| {
            if tensor.shape.len() > 1 && tensor.shape[0] == tokens.len() {
                join(&mut all, name, flat(tensor));
            }
        })?;
    }
    Ok(all.into_iter().map(|(name, tensor)| (name, Rc::new(tensor))).collect())
}

fn join(all: &mut BTreeMap<String, Tensor>, name: &str, rows: Tensor) {
    match all.get_mut(name) {
        Some(before) => append(before, rows),
        None => drop(all.insert(name.to_string(), rows)),
    }
}

/// Adds rows.
fn append(to: &mut Tensor, rows: Tensor) {
    to.shape[0] += rows.shape[0];
    to.data.extend(rows.data);
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
