//! Some rows of what each kernel of a large step stored, judged: the whole of it would take the oracle hours.
//!
//! A row of a group is what the group gives for one token: its row of every operand that has one a token, all of the weights,
//! and the caches, of which it sees as many positions as come before it. So a step of `T` tokens is judged at token `r` by
//! the group with `T = 1` and `r` more tokens before.
//!
//! Left out are groups that store no row a token: those that write caches, and what runs for the last position alone.

use crate::compare::memory;
use crate::compare::stored::{self, StoredError, buffer_name};
use crate::judge::Shares;
use crate::judge::group::expect;
use crate::predict;
use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::families::{GroupView, storage};
use ir::graph::{Graph, ValueId};
use ir::interp::{InterpError, Tensor};
use ir::op::Op;
use ir::plan::{Give, Place, Plan};
use runtime::artifact::Artifact;
use runtime::device::{DeviceError, Step, Tap, Tapped, Want};
use runtime::interpreter::InterpretedProgram;
use runtime::manifest::TargetCode;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Why rows cannot be judged.
#[derive(Debug, thiserror::Error)]
pub enum SampledError {
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Its memory is not as its plan says.
    #[error(transparent)]
    Stored(#[from] StoredError),
    /// The oracle.
    #[error(transparent)]
    Oracle(#[from] InterpError),
}

/// What rows came to.
#[derive(Clone, Debug, Default)]
pub struct Sampled {
    /// The worst shares of the bounds, by kernel.
    pub kernels: BTreeMap<String, Shares>,
    /// Rows that were judged.
    pub rows: usize,
    /// Kernels that store no row a token.
    pub left_out: BTreeSet<String>,
    /// What is wrong: kernel, row and why.
    pub wrong: Vec<String>,
}

/// Runs a prompt of so many tokens and a decode step, and judges so many rows of what each kernel first stores.
///
/// # Errors
///
/// [`SampledError`]; [`StoredError::Artifact`] in it if the artifact was compiled without taps.
pub fn rows(
    program: &mut dyn Tapped,
    (artifact, target): (&Artifact, &TargetCode),
    prompt: usize,
    rows: usize,
) -> Result<Sampled, SampledError> {
    let plan = program.plan().clone();
    let graphs = stored::fused(artifact, target, &plan)?;
    let mut walk = Walk { artifact, plan: &plan, rows, weights: None, sampled: Sampled::default() };
    let mut state = program.state()?;
    let vocab = program.vocab() as i32;
    let tokens: Vec<i32> = (0..=prompt as i32).map(|i| (i * 7 + 1) % vocab).collect();
    let mut steps = predict::prompt(&plan, prompt);
    steps.extend(predict::decode(&plan, prompt));
    for step in steps {
        let want = if step.entry.give == Give::Nothing { Want::Nothing } else { Want::Token };
        let tokens = &tokens[step.past..][..step.tokens];
        let graph =
            graphs.iter().find(|graph| graph.name == step.entry.name).expect("one graph an entry point");
        let mut failed = None;
        program.run_tapped(&Step { tokens, want }, &mut state, &mut |tap| {
            if failed.is_none() {
                failed = walk.launch(graph, tokens, step.past, tap).err();
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
    }
    Ok(walk.sampled)
}

struct Walk<'a> {
    artifact: &'a Artifact,
    plan: &'a Plan,
    rows: usize,
    /// With the weights as the device has them.
    weights: Option<InterpretedProgram>,
    sampled: Sampled,
}

impl Walk<'_> {
    /// Judges rows of a launch, if its kernel is met for the first time.
    fn launch(
        &mut self,
        graph: &Graph,
        tokens: &[i32],
        past: usize,
        tap: Tap<'_>,
    ) -> Result<(), SampledError> {
        let kernel = self.plan.kernels[tap.entry.launches[tap.launch].kernel].name.clone();
        if self.sampled.kernels.contains_key(&kernel) || self.sampled.left_out.contains(&kernel) {
            return Ok(());
        }
        let view = &GroupView::all(graph)[tap.launch];
        let of = |tokens: usize, past: usize| {
            let mut symbols = [0; MAX_SYMBOLS];
            (symbols[0], symbols[1]) = (tokens as i64, past as i64);
            symbols
        };
        let symbols = of(tokens.len(), past);
        let operands: BTreeSet<ValueId> = view
            .values
            .iter()
            .flat_map(|&id| graph[id].operands.clone())
            .filter(|id| !view.values.contains(id))
            .collect();
        let is_cache = |&id: &ValueId| matches!(graph[storage(graph, id)].op, Op::State { .. });
        let computed = operands.iter().filter(|id| graph[**id].group.is_some() && !is_cache(id));
        let by_row = |id: &ValueId| by_token(graph, *id, tokens.len());
        // By their numbers among the roots.
        let roots: Vec<(usize, ValueId)> = view.roots.iter().copied().enumerate().collect();
        let roots: Vec<_> = roots.into_iter().filter(|(_, root)| by_row(root) && !is_cache(root)).collect();
        if roots.is_empty() || !computed.clone().all(by_row) {
            self.sampled.left_out.insert(kernel);
            return Ok(());
        }
        let mut whole = BTreeMap::new();
        for &id in &operands {
            if let Some(tensor) = self.operand(graph, id, &symbols, tap)? {
                whole.insert(id, tensor);
            }
        }
        let found = |(number, root)| Ok((number, stored::tensor(graph, self.plan, root, &symbols, tap)?));
        let found = roots.into_iter().map(found).collect::<Result<Vec<_>, StoredError>>()?;
        let mut shares = Shares::default();
        for row in spread(tokens.len(), self.rows) {
            let ids = |x: i32| Rc::new(Tensor::new(DType::I32, &[1], &[f64::from(x)]));
            let mut operand = |id: ValueId| match &graph[id].op {
                Op::Input { name } if name == "tokens" => ids(tokens[row]),
                Op::Input { .. } => ids((past + row) as i32),
                _ if by_row(&id) => Rc::new(row_of(&whole[&id], row)),
                _ => whole[&id].clone(),
            };
            let expected = expect(view, &of(1, past + row), &mut operand)?;
            self.sampled.rows += 1;
            for (number, found) in &found {
                match expected[*number].check(&row_of(found, row)) {
                    Ok(of_row) => shares = shares.worst(of_row),
                    Err(mismatch) => self.sampled.wrong.push(format!("{kernel}, row {row}: {mismatch}")),
                }
            }
        }
        self.sampled.kernels.insert(kernel, shares);
        Ok(())
    }

    /// What a group reads, whole; none of what the step is given.
    fn operand(
        &mut self,
        graph: &Graph,
        id: ValueId,
        symbols: &[i64; MAX_SYMBOLS],
        tap: Tap<'_>,
    ) -> Result<Option<Rc<Tensor>>, SampledError> {
        Ok(match &graph[id].op {
            Op::Input { .. } | Op::Constant { .. } => None,
            Op::Weight { name } => {
                let weights = match &mut self.weights {
                    Some(weights) => weights,
                    None => self.weights.insert(self.weights_on(tap)),
                };
                Some(weights.weight(name, &graph[id].ty)?)
            }
            _ => {
                let (name, buffers) = (buffer_name(graph, id), &self.plan.buffers);
                let buffer = buffers.iter().position(|buffer| buffer.name == name);
                let tensor = buffer.and_then(|buffer| memory::stored(graph, id, symbols, &tap.bytes(buffer)));
                Some(Rc::new(tensor.ok_or_else(|| StoredError::Place {
                    entry: tap.entry.name.clone(),
                    value: graph[id].name.clone(),
                    launch: tap.launch,
                })?))
            }
        })
    }

    /// The weights as the device has them.
    fn weights_on(&self, tap: Tap<'_>) -> InterpretedProgram {
        let mut bytes = vec![0; self.plan.weight_bytes()];
        for (number, buffer) in self.plan.buffers.iter().enumerate() {
            if let Place::Weight { offset, .. } = buffer.place {
                bytes[offset..][..buffer.bytes].copy_from_slice(&tap.bytes(number)[..buffer.bytes]);
            }
        }
        InterpretedProgram::of_weights(self.artifact, self.plan.clone(), bytes)
    }
}

/// Is the first axis of a value that of the step's tokens, and no other? In a step of one token an axis of one is as good.
fn by_token(graph: &Graph, id: ValueId, tokens: usize) -> bool {
    let shape = &graph[id].ty.shape;
    let rows = |tokens: i64| shape.first().map(|dim| dim.eval(&[tokens, 0, 0, 0]));
    let (tokens, others) = (tokens as i64, shape.iter().skip(1));
    let grows = tokens == 1 || rows(tokens + 1) == Some(tokens + 1);
    rows(tokens) == Some(tokens) && grows && others.into_iter().all(|dim| dim.constant().is_some())
}

/// A row of a tensor, as a tensor of one.
fn row_of(tensor: &Tensor, row: usize) -> Tensor {
    let elems: usize = tensor.shape[1..].iter().product();
    let shape = [&[1], &tensor.shape[1..]].concat();
    Tensor { dtype: tensor.dtype, shape, data: tensor.data[row * elems..][..elems].to_vec() }
}

/// So many of so many rows, the first and the last among them.
fn spread(rows: usize, wanted: usize) -> BTreeSet<usize> {
    let wanted = wanted.clamp(1, rows);
    (0..wanted).map(|at| if wanted == 1 { rows - 1 } else { at * (rows - 1) / (wanted - 1) }).collect()
}
