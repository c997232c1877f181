//! A kernel's launch that stores something else than its group says.

use super::{Case, File, Reader, Replay, ReproducerError, Stored, TENSORS, Where, safetensors};
use crate::check::device::{Device, encode};
use crate::check::{Subject, Tensors, results};
use crate::compare::memory::decode;
use crate::compare::{Fault, Seen, layer_of, ops};
use crate::judge::{Expected, Shares};
use codegen::Backend;
use codegen::backend::names;
use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::families::GroupView;
use ir::families::alone::alone;
use ir::graph::{Graph, GroupId, ValueId};
use ir::interp::{Rounding, Tensor, compute};
use ir::kernel::Kernel;
use ir::op::Op;
use safetensors::tensor::Dtype;
use std::collections::BTreeMap;
use std::rc::Rc;

/// A group alone, with what its kernel was fed and what it stored.
#[derive(Clone, Debug)]
pub struct KernelCase {
    /// The group; what others stored are inputs.
    graph: Graph,
    /// What ran.
    kernel: Kernel,
    /// BLAKE3 of its text when the folder was written.
    kernel_digest: String,
    /// As on the command line.
    target: String,
    symbols: [i64; MAX_SYMBOLS],
    /// What the graph binds, by name of the value.
    inputs: BTreeMap<String, Rc<Tensor>>,
    /// What was stored and what should have been; kept for who reads the folder, and not read back.
    found: Vec<(String, Tensor)>,
    expected: Vec<(String, Expected)>,
}

impl KernelCase {
    /// Takes a group out of its graph. `stored` gives what it read, `found` is what its kernel stored.
    pub fn of(
        view: &GroupView<'_>,
        (kernel, target): (&Kernel, &str),
        (symbols, stored): (&[i64; MAX_SYMBOLS], &dyn Fn(ValueId) -> Rc<Tensor>),
        found: &[(ValueId, Tensor)],
        expected: &[Expected],
    ) -> KernelCase {
        let (graph, whole) = alone(view);
        let bound = graph.values.iter().zip(&whole).filter(|(value, _)| is_bound(&value.op));
        let inputs = bound.map(|(value, &id)| (value.name.clone(), stored(id))).collect();
        let name = |id: ValueId| view.graph[id].name.clone();
        KernelCase {
            graph,
            kernel: kernel.clone(),
            kernel_digest: digest(&kernel.to_string()),
            target: target.to_string(),
            symbols: *symbols,
            inputs,
            found: found.iter().map(|(id, tensor)| (name(*id), tensor.clone())).collect(),
            expected: view.roots.iter().zip(expected).map(|(&id, e)| (name(id), e.clone())).collect(),
        }
    }

    /// The group alone, as `graph.ir` holds it.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    pub(super) fn files(&self) -> Vec<File> {
        let symbols = self.graph.symbols.0.iter().zip(self.symbols);
        let case = Case::Kernel {
            target: self.target.clone(),
            symbols: symbols.map(|(symbol, value)| (symbol.name.clone(), value)).collect(),
            kernel_digest: self.kernel_digest.clone(),
        };
        let stored = |prefix: &str, name: &str, tensor: &Tensor| -> Stored {
            let mut bytes = vec![0; tensor.data.len() * tensor.dtype.bytes(1)];
            let slots = bytes.chunks_exact_mut(tensor.dtype.bytes(1));
            slots.zip(&tensor.data).for_each(|(slot, &x)| encode(tensor.dtype, x, slot));
            (format!("{prefix}.{name}"), file_dtype(tensor.dtype), tensor.shape.clone(), bytes)
        };
        let mut tensors: Vec<Stored> =
            self.inputs.iter().map(|(name, tensor)| stored("input", name, tensor)).collect();
        tensors.extend(self.found.iter().map(|(name, tensor)| stored("found", name, tensor)));
        tensors.extend(self.expected.iter().map(|(name, expected)| {
            let bytes = expected.exact.iter().flat_map(|x| x.to_le_bytes()).collect();
            (format!("expected.{name}"), Dtype::F64, expected.shape.clone(), bytes)
        }));
        vec![
            case.file(),
            ("graph.ir", self.graph.to_string().into()),
            ("kernel.ir", self.kernel.to_string().into()),
            safetensors(tensors),
        ]
    }

    pub(super) fn read(
        reader: &Reader<'_>,
        target: String,
        named: &BTreeMap<String, i64>,
        kernel_digest: String,
    ) -> Result<KernelCase, ReproducerError> {
        if !names().iter().any(|known| known.0 == target) {
            let known = names().iter().map(|known| known.0).collect::<Vec<_>>().join(", ");
            return Err(reader.content("case.json", "target", target, known));
        }
        let text = reader.string("graph.ir")?;
        let graph = ir::parse::graph(&text).map_err(|error| reader.text("graph.ir", error))?;
        ir::verify::verify(&graph).map_err(|error| reader.text("graph.ir", error))?;
        if graph.groups.len() != 1 {
            let found = format!("{} groups", graph.groups.len());
            return Err(reader.content("graph.ir", "the graph", found, "one group"));
        }
        let text = reader.string("kernel.ir")?;
        let kernels = ir::kernel::parse::parse(&text).map_err(|error| reader.text("kernel.ir", error))?;
        let Ok([kernel]) = <[Kernel; 1]>::try_from(kernels) else {
            return Err(reader.content("kernel.ir", "the text", "none or several", "one kernel"));
        };
        ir::kernel::verify::verify(&kernel).map_err(|error| reader.text("kernel.ir", error))?;

        let mut symbols = [0; MAX_SYMBOLS];
        for (at, symbol) in graph.symbols.0.iter().enumerate() {
            let (name, range) =
                (format!("symbol {}", symbol.name), format!("{}..{}", symbol.min, symbol.max));
            match named.get(&symbol.name) {
                Some(&value) if symbol.min <= value && value <= symbol.max => symbols[at] = value,
                Some(value) => return Err(reader.content("case.json", name, value, range)),
                None => return Err(reader.content("case.json", name, "nothing", range)),
            }
        }
        let bytes = reader.bytes(TENSORS)?;
        let file = reader.tensors(&bytes)?;
        let mut inputs = BTreeMap::new();
        for value in graph.values.iter().filter(|value| is_bound(&value.op)) {
            let name = format!("input.{}", value.name);
            let shape: Vec<usize> = value.ty.shape.iter().map(|d| d.eval(&symbols) as usize).collect();
            let dtype = value.ty.dtype;
            let expected = format!("{dtype}{shape:?}");
            let Ok(view) = file.tensor(&name) else {
                return Err(reader.content(TENSORS, name, "nothing", expected));
            };
            if !is_kept(dtype) || view.dtype() != file_dtype(dtype) || view.shape() != shape {
                let found = format!("{:?}{:?}", view.dtype(), view.shape());
                return Err(reader.content(TENSORS, name, found, expected));
            }
            let data = decode(dtype, view.data());
            inputs.insert(value.name.clone(), Rc::new(Tensor { dtype, shape, data }));
        }
        if let Some(value) = graph.values.iter().find(|v| v.group.is_some() && !is_kept(v.ty.dtype)) {
            let known = "f32, bf16, i32 or bool";
            return Err(reader.content("graph.ir", format!("%{}", value.name), value.ty.dtype, known));
        }
        let (found, expected) = (Vec::new(), Vec::new());
        Ok(KernelCase { graph, kernel, kernel_digest, target, symbols, inputs, found, expected })
    }

    /// Lowers the group anew and runs that, or the kernel of `kernel.ir` where somebody edited it.
    pub(super) fn replay(&self, place: Where) -> Result<Replay, ReproducerError> {
        let backend = Backend::of(&self.target)?;
        let features = runtime::cpu::features();
        let requires = match &backend {
            Backend::Cpu(level) => level.requires.clone(),
            // The emulator has it.
            Backend::Cuda(_) => Vec::new(),
        };
        let lacks = requires.iter().find(|feature| !features.contains(&feature.as_str()));
        if let (Where::Cpu, Some(needs)) = (place, lacks) {
            return Err(ReproducerError::Machine { target: self.target.clone(), needs: needs.to_string() });
        }
        let (mut subject, group) = (Subject { graph: self.graph.clone() }, GroupId(0));
        let schedule = self.graph.groups[0].schedule.clone().unwrap_or_default();
        let mut lowered = subject.lower(group, &schedule, &backend.target())?;
        lowered.kernel.name.clone_from(&self.kernel.name);
        let text = self.kernel.to_string();
        let ran = match (digest(&text) == self.kernel_digest, lowered.kernel.to_string() == text) {
            (true, true) => "as in kernel.ir",
            (true, false) => "as this llamac lowers graph.ir, which is not kernel.ir any more",
            (false, _) => {
                lowered.kernel = self.kernel.clone();
                "kernel.ir, which was edited"
            }
        };
        let mut tensors = Tensors::new();
        for id in self.graph.ids().filter(|&id| is_bound(&self.graph[id].op)) {
            tensors.insert(id, self.inputs[&self.graph[id].name].clone());
        }
        for id in self.graph.ids().filter(|&id| matches!(self.graph[id].op, Op::Constant { .. })) {
            let constant = compute(&self.graph[id], &[], &self.symbols, Rounding::Stored)?;
            tensors.insert(id, Rc::new(constant));
        }
        // First: it refuses indices outside of their tables, which code would follow.
        let expected = subject.expected(group, &self.symbols, &tensors)?;
        let mut device = match place {
            Where::Cpu => Device::of(&backend, std::slice::from_ref(&lowered.kernel))?,
            Where::Interpreter => Device::Interpreter,
        };
        let bound = (&self.symbols, &tensors);
        let (shares, fault) = match results(&subject, group, (0, &lowered), &mut device, bound) {
            Ok(found) => self.judge(&found, &expected),
            Err(error) => {
                let (layer, op) = layer_of(self.group());
                let [found, expected] =
                    ["a wrong launch", "a right one"].map(|text| Seen::Text(text.to_string()));
                let (op, index, what) = (Some(op.to_string()), Vec::new(), error.to_string());
                let fault = Fault { layer, op, kernel: None, schedule: None, index, found, expected, what };
                (Shares { hard: f64::INFINITY, ..Shares::default() }, Some(fault))
            }
        };
        let named = self.graph.symbols.0.iter().zip(self.symbols);
        let symbols: Vec<String> = named.map(|(s, value)| format!("{} = {value}", s.name)).collect();
        let on = match place {
            Where::Cpu => format!("as code for {}", self.target),
            Where::Interpreter => "in the kernel interpreter".to_string(),
        };
        let lines = vec![
            ("group", format!("@{}, {}", self.group(), symbols.join(", "))),
            (
                "kernel",
                format!("@{}, schedule \"{}\": {ran}; {on}", lowered.kernel.name, lowered.kernel.schedule),
            ),
            (
                "judged",
                format!("{:.3} of the hard bound, {:.3} of the statistical", shares.hard, shares.typical),
            ),
        ];
        let (kernel, schedule) = (Some(lowered.kernel.name), Some(lowered.kernel.schedule));
        let fault = fault.map(|fault| Fault { kernel, schedule, ..fault });
        Ok(Replay { lines, worst: shares.hard.max(shares.typical), fault })
    }

    /// The worst shares of the bounds, and the first result that is wrong.
    fn judge(&self, found: &[(ValueId, Tensor)], expected: &[Expected]) -> (Shares, Option<Fault>) {
        let (mut shares, mut fault) = (Shares::default(), None);
        for ((id, found), expected) in found.iter().zip(expected) {
            match expected.check(found) {
                Ok(share) => shares = shares.worst(share),
                Err(mismatch) => {
                    let value = &self.graph[*id].name;
                    shares = shares.worst(mismatch.shares());
                    fault =
                        fault.or_else(|| Some(ops::fault(self.group(), value, expected, found, &mismatch)));
                }
            }
        }
        (shares, fault)
    }

    fn group(&self) -> &str {
        &self.graph.groups[0].name
    }
}

fn digest(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex().to_string()
}

/// Is its contents given from outside?
fn is_bound(op: &Op) -> bool {
    matches!(op, Op::Input { .. } | Op::Weight { .. } | Op::State { .. })
}

/// Dtypes that kernels keep in memory.
fn is_kept(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16 | DType::I32 | DType::Bool)
}

/// # Panics
///
/// On dtypes that no kernel keeps in memory.
fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::I32 => Dtype::I32,
        DType::Bool => Dtype::BOOL,
        DType::F64 | DType::I8 | DType::U8 | DType::Block(_) => {
            unreachable!("no kernel keeps {dtype} in memory")
        }
    }
}
