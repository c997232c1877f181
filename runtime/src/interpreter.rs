//! The oracle as a device: runs the artifact's graphs, as they were before any pass, in f64.
//!
//! * Weights are unpacked by the plan: each element of a tensor is looked up in the panel that holds it. A tensor is
//!   decoded when it is first needed, and kept.
//! * Every stored value is rounded to its dtype ([`Rounding::Stored`]), unless asked otherwise; logits are rounded to f32
//!   when they leave.
//! * A state is the cache's tensors. Any target's plan serves: all of an artifact share the weights.
//!
//! It is slow: some 100 million multiplications a second, and 8 bytes of memory for each weight.

use crate::artifact::Artifact;
use crate::cpu::{read_plan, weights_of};
use crate::device::{Device, DeviceError, Program, State, Step, StepOutputs, Want};
use crate::manifest::{GRAPH, Manifest};
use crate::map::FileBytes;
use ir::dim::MAX_SYMBOLS;
use ir::dtype::DType;
use ir::graph::{Graph, TensorType, Value};
use ir::interp::{InterpError, Rounding, Tensor, interpret};
use ir::op::Op;
use ir::plan::{Place, Plan, PlanBuffer, WeightSource};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

/// The device that interprets.
#[derive(Clone, Copy, Debug)]
pub struct Interpreter;

impl Device for Interpreter {
    fn load(&mut self, artifact: &Artifact) -> Result<Box<dyn Program>, DeviceError> {
        Ok(Box::new(InterpretedProgram::load(artifact, Rounding::Stored)?))
    }
}

/// A loaded artifact, interpreted.
pub struct InterpretedProgram {
    file: PathBuf,
    plan: Plan,
    context: usize,
    graphs: HashMap<String, Graph>,
    weights: Option<(FileBytes, Range<usize>)>,
    decoded: HashMap<String, Rc<Tensor>>,
    rounding: Rounding,
}

/// The cache's tensors by name; the state of an [`InterpretedProgram`].
type Cache = BTreeMap<String, Tensor>;

impl InterpretedProgram {
    /// Loads an artifact. [`Rounding::Exact`] rounds nothing that is stored: the truth for the artifact's weights.
    ///
    /// # Errors
    ///
    /// As [`Device::load`].
    pub fn load(artifact: &Artifact, rounding: Rounding) -> Result<InterpretedProgram, DeviceError> {
        let manifest: Manifest = artifact.manifest()?;
        let none = || bad_graph(artifact.file().to_path_buf(), "no target, and so no plan".to_string());
        let target = manifest.targets.first().ok_or_else(none)?;
        let plan = read_plan(artifact, target)?;
        let weights = weights_of(artifact, target, &plan)?;
        let bad = |said: String| bad_graph(artifact.file().to_path_buf(), said);
        let text = std::str::from_utf8(artifact.require(GRAPH)?).map_err(|e| bad(e.to_string()))?;
        let mut graphs = HashMap::new();
        for graph in ir::parse::graphs(text).map_err(|e| bad(e.to_string()))? {
            ir::verify::verify(&graph).map_err(|e| bad(e.to_string()))?;
            graphs.insert(graph.name.clone(), graph);
        }
        for entry in &plan.entries {
            let Some(graph) = graphs.get(&entry.name) else {
                return Err(bad(format!("there is no graph @{}", entry.name)));
            };
            if graph.symbols != entry.symbols {
                return Err(bad(format!("graph @{} has other symbols than the plan", entry.name)));
            }
        }
        let (file, context) = (artifact.file().to_path_buf(), manifest.context);
        Ok(InterpretedProgram { file, plan, context, graphs, weights, decoded: HashMap::new(), rounding })
    }

    /// The weights alone, of any target's plan and in its order, to be asked for by [`InterpretedProgram::weight`]: a device may
    /// have made them. There is no graph to run, which are those of the first target ([`GRAPH`]).
    pub fn of_weights(artifact: &Artifact, plan: Plan, weights: Vec<u8>) -> InterpretedProgram {
        let (all, context) = (0..weights.len(), plan.context);
        InterpretedProgram {
            file: artifact.file().to_path_buf(),
            plan,
            context,
            graphs: HashMap::new(),
            weights: Some((Arc::new(weights), all)),
            decoded: HashMap::new(),
            rounding: Rounding::Stored,
        }
    }

    /// Takes the weights of another program of the same model, rounded to the dtypes of this one.
    ///
    /// # Errors
    ///
    /// If one of both does not hold all of a tensor.
    pub fn take_weights(&mut self, other: &mut InterpretedProgram) -> Result<(), DeviceError> {
        let weights = |program: &InterpretedProgram| -> BTreeMap<String, TensorType> {
            let values = program.graphs.values().flat_map(|graph| &graph.values);
            let typed = |value: &Value| match &value.op {
                Op::Weight { name } => Some((name.clone(), value.ty.clone())),
                _ => None,
            };
            values.filter_map(typed).collect()
        };
        let theirs = weights(other);
        for (name, ty) in weights(self) {
            let Some(their_ty) = theirs.get(&name) else { continue };
            let tensor = other.weight(&name, their_ty)?;
            let rounded = Tensor::new(ty.dtype, &tensor.shape, &tensor.data);
            self.decoded.insert(name, Rc::new(rounded));
        }
        Ok(())
    }

    /// As [`Program::run`]; `seen` is told the name and contents of every value, as soon as it is computed.
    ///
    /// # Errors
    ///
    /// As [`Program::run`].
    pub fn run_seen(
        &mut self,
        step: &Step<'_>,
        state: &mut State,
        seen: &mut dyn FnMut(&str, &Tensor),
    ) -> Result<StepOutputs, DeviceError> {
        let (number, symbols) = step.entry(self, &self.plan, state)?;
        let (tokens, past) = (step.tokens, state.past());
        let name = &self.plan.entries[number].name;
        let graph = self.graphs[name].clone();
        self.decode(&graph)?;

        let cache = state.inner_mut::<Cache>()?;
        let kept: HashMap<String, Rc<Tensor>> =
            std::mem::take(cache).into_iter().map(|(name, tensor)| (name, Rc::new(tensor))).collect();
        let ids = |ids: &mut dyn Iterator<Item = f64>| {
            Rc::new(Tensor::new(DType::I32, &[tokens.len()], &ids.collect::<Vec<_>>()))
        };
        let token_ids = ids(&mut tokens.iter().map(|&t| f64::from(t)));
        let positions = ids(&mut (past..past + tokens.len()).map(|p| p as f64));
        let mut bind = |name: &str, _: &TensorType| match name {
            "tokens" => Ok(token_ids.clone()),
            "positions" => Ok(positions.clone()),
            name => {
                let tensor = self.decoded.get(name).or_else(|| kept.get(name));
                tensor.cloned().ok_or_else(|| InterpError::Unbound(name.to_string()))
            }
        };
        let mut seen = |id, tensor: &Tensor| seen(&graph[id].name, tensor);
        let result = interpret(&graph, &symbols, self.rounding, &mut bind, Some(&mut seen));
        // What was there stays, where the step did not replace it.
        *cache = kept.into_iter().map(|(name, tensor)| (name, Rc::unwrap_or_clone(tensor))).collect();
        let mut outputs =
            result.map_err(|e| DeviceError::Launch { kernel: graph.name.clone(), said: e.to_string() })?;
        for (name, tensor) in cache.iter_mut() {
            if let Some(next) = outputs.swap_remove(name) {
                *tensor = next;
            }
        }
        state.advance(tokens.len());

        let token = outputs.get("token").filter(|_| step.want == Want::Token).map(|t| t.data[0] as i32);
        let logits = outputs.get("logits").filter(|_| step.want != Want::Token);
        let logits = logits.map(|t| t.data.iter().map(|&x| x as f32).collect());
        Ok(StepOutputs { token, logits: logits.unwrap_or_default() })
    }

    /// Decodes the weights that `graph` names and that no step before needed.
    fn decode(&mut self, graph: &Graph) -> Result<(), DeviceError> {
        for value in &graph.values {
            if let Op::Weight { name } = &value.op {
                self.weight(name, &value.ty)?;
            }
        }
        Ok(())
    }

    /// A weight, unpacked: decoded when it is first asked for, and kept.
    ///
    /// # Errors
    ///
    /// If the artifact does not hold all of such a tensor.
    pub fn weight(&mut self, name: &str, ty: &TensorType) -> Result<Rc<Tensor>, DeviceError> {
        if let Some(tensor) = self.decoded.get(name) {
            return Ok(tensor.clone());
        }
        let tensor = Rc::new(self.tensor(name, ty)?);
        self.decoded.insert(name.to_string(), tensor.clone());
        Ok(tensor)
    }

    /// The graph of an entry point, before any pass.
    ///
    /// # Errors
    ///
    /// If the artifact has no such entry point.
    pub fn graph(&self, entry: &str) -> Result<&Graph, DeviceError> {
        let none = || bad_graph(self.file.clone(), format!("there is no graph @{entry}"));
        self.graphs.get(entry).ok_or_else(none)
    }

    /// A tensor of the checkpoint, from all buffers of the plan that hold parts of it.
    fn tensor(&self, name: &str, ty: &TensorType) -> Result<Tensor, DeviceError> {
        let bad = |said: &str| bad_graph(self.file.clone(), format!("weight `{name}`: {said}"));
        let shape: Option<Vec<usize>> = ty.shape.iter().map(|d| d.constant().map(|d| d as usize)).collect();
        let shape = shape.ok_or_else(|| bad("its shape has a symbol in it"))?;
        let k = shape.last().copied().unwrap_or(1);
        let mut data = vec![f64::NAN; shape.iter().product()];
        let mut left = data.len();
        for buffer in &self.plan.buffers {
            let Place::Weight { offset, source } = &buffer.place else { continue };
            if buffer.dtype != ty.dtype {
                continue;
            }
            match source {
                WeightSource::Tensor { name: n, rows, columns } if n == name => {
                    if rows * columns != data.len() {
                        return Err(bad("the plan has another shape"));
                    }
                    let elements = (0..data.len()).map(|at| self.element(buffer, *offset, at));
                    data = elements.collect();
                    left = 0;
                }
                WeightSource::Pack { pack, names } if pack.k == k => {
                    let streams = pack.streams.iter().zip(names).enumerate();
                    for (number, (stream, _)) in streams.filter(|(_, (_, n))| *n == name) {
                        for n in 0..pack.n {
                            let row = data.get_mut(stream.row(n) * k..).and_then(|rows| rows.get_mut(..k));
                            let row = row.ok_or_else(|| bad("the plan has more rows"))?;
                            if row.first().is_some_and(|x| x.is_nan()) {
                                left = left.saturating_sub(k);
                            }
                            for (at, x) in row.iter_mut().enumerate() {
                                *x = self.element(buffer, *offset, pack.index(number, n, at));
                            }
                        }
                    }
                }
                WeightSource::Tensor { .. } | WeightSource::Pack { .. } | WeightSource::Constant { .. } => {}
            }
        }
        match left {
            0 => Ok(Tensor { dtype: ty.dtype, shape, data }),
            _ => Err(bad("the plan does not hold all of it")),
        }
    }

    /// Element `at` of the buffer that begins at `offset` of the weights.
    fn element(&self, buffer: &PlanBuffer, offset: usize, at: usize) -> f64 {
        let (bytes, range) = self.weights.as_ref().expect("a plan with weights was loaded with them");
        let bytes = &(**bytes).as_ref()[range.clone()][offset..];
        match buffer.dtype {
            DType::BF16 => {
                let bits = u16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]);
                f64::from(f32::from_bits(u32::from(bits) << 16))
            }
            DType::F32 => {
                let bytes = &bytes[4 * at..4 * at + 4];
                f64::from(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            }
            other => unreachable!("no plan stores weights as {other}"),
        }
    }
}

fn bad_graph(file: PathBuf, said: String) -> DeviceError {
    DeviceError::BadPlan { file, section: GRAPH.to_string(), said }
}

impl Program for InterpretedProgram {
    fn vocab(&self) -> usize {
        self.plan.vocab
    }

    fn context(&self) -> usize {
        self.context
    }

    fn max_tokens(&self, want: Want) -> usize {
        self.plan.max_tokens(want.give())
    }

    fn state(&self) -> Result<State, DeviceError> {
        let mut cache = Cache::new();
        for value in self.graphs.values().flat_map(|graph| &graph.values) {
            let Op::State { name } = &value.op else { continue };
            let shape = value.ty.shape.iter().map(|d| d.eval(&[0; MAX_SYMBOLS]) as usize);
            let shape: Vec<usize> = shape.collect();
            let data = vec![0.0; shape.iter().product()];
            cache.insert(name.clone(), Tensor { dtype: value.ty.dtype, shape, data });
        }
        Ok(State::new(cache))
    }

    fn run(&mut self, step: &Step<'_>, state: &mut State) -> Result<StepOutputs, DeviceError> {
        self.run_seen(step, state, &mut |_, _| ())
    }
}
