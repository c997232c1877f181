//! The conformance suite: one small kernel for each form of instruction that kernels use, run the same way on the PTX emulator
//! and on a GPU, and judged by an oracle that shares nothing with either.
//!
//! * Takes: the table of forms ([`forms`]), a [`Machine`].
//! * Gives: the results of a form's lanes, and those that are not what the PTX ISA says ([`judge`]).
//! * Operands are the same on every machine, drawn by the form's name: floats of all binades, special values, ends of integers.
//!
//! What a GPU gave is written to a [`record::Recording`]. From then on the emulator stands beside it: the recorded results are
//! judged by the same oracle, and compared with the emulator's, bit for bit where there is one right answer.
//!
//! In reading order: this file, `inputs` (operands), `oracle` (what numbers may come out), `lane` (instructions that each lane
//! does for itself), `warp` (shuffles, votes, matrix products), `memory` (copies, atomics, barriers), `warpgroup` (`wgmma`),
//! `bulk` (boxes of tensors), `mbarrier` (phases, clusters), `record`.

mod bulk;
mod inputs;
mod lane;
mod mbarrier;
mod memory;
mod oracle;
pub mod record;
mod warp;
mod warpgroup;

pub use oracle::Expected;

use crate::cuda::context::{Buffer, Context, Image, Module};
use crate::device::DeviceError;
use crate::emulator::{self, Grid, Memory, Options, Report, Sm};
use crate::gpu::{Call, with_maps};
use crate::ptx::{self, PtxError, Type};
use crate::tensor_map::TensorMap;
use std::fmt::Write as _;
use std::sync::Arc;

/// A form of an instruction, and what tries it.
///
/// Each thread has its operands in registers `%a0`, `%a1`, ..., leaves its results in `%d0`, ..., and its number in the CTA is
/// in `%t`. Predicates `%p0` to `%p7`, and the registers `%r0` to `%r7` and `%l0` to `%l3`, of 32 and 64 bits, are its own. `%map`
/// is the address of the tensor map, where there is one.
#[derive(Clone, Debug)]
pub struct Form {
    /// The instruction without its operands, and what is special about this use of it. No two forms have the same.
    pub name: String,
    /// The machine that has it, and what came after.
    pub sm: Sm,
    /// What the kernel does between loading its operands and storing its results.
    pub body: String,
    /// Types of the operands.
    pub takes: Vec<Type>,
    /// Types of the results.
    pub gives: Vec<Type>,
    /// Threads of a CTA.
    pub threads: usize,
    /// CTAs of a cluster.
    pub cluster: usize,
    /// Bytes of dynamic shared memory; they begin at `smem`.
    pub shared_bytes: u32,
    /// What bulk copies take or fill.
    pub tensor: Option<Tensor>,
    /// The operands of all threads, one thread after the other.
    pub operands: Vec<u64>,
    /// What the results may be, in the same order; both halves of a pair.
    pub expected: Vec<Expected>,
}

/// A tensor in the kernel's memory. The base of its map counts from the beginning of that memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tensor {
    /// In the operands of all threads, which lie one after the other, 8 bytes each.
    OfOperands(TensorMap),
    /// In the results.
    OfResults(TensorMap),
}

/// All forms. To add one is to add a row to a table.
pub fn forms() -> Vec<Form> {
    let mut forms = lane::forms();
    forms.extend(warp::forms());
    forms.extend(memory::forms());
    forms.extend(warpgroup::forms());
    forms.extend(bulk::forms());
    forms.extend(mbarrier::forms());
    forms
}

/// A type's name in PTX.
fn name_of(ty: Type) -> &'static str {
    Type::ALL.iter().find(|(_, known)| *known == ty).expect("every type has a name").0
}

/// Bytes of an operand or a result in memory.
const SLOT_BYTES: usize = 8;

impl Form {
    /// A form whose CTAs have these operands, and whose results an oracle has from a CTA's operands, by thread.
    fn new(
        name: &str,
        body: &str,
        [takes, gives]: [&[Type]; 2],
        ctas: &[Vec<Vec<u64>>],
        oracle: impl Fn(&[Vec<u64>]) -> Vec<Vec<Expected>>,
    ) -> Form {
        Form {
            name: name.to_string(),
            sm: Sm::Sm80,
            body: body.to_string(),
            takes: takes.to_vec(),
            gives: gives.to_vec(),
            threads: ctas[0].len(),
            cluster: 1,
            shared_bytes: 0,
            tensor: None,
            operands: ctas.iter().flatten().flatten().copied().collect(),
            expected: ctas.iter().flat_map(|cta| oracle(cta)).flatten().collect(),
        }
    }

    /// The same, with so much shared memory.
    fn with_shared(self, shared_bytes: u32) -> Form {
        Form { shared_bytes, ..self }
    }

    /// The same on sm_90a, in clusters of so many CTAs: what was a CTA is a cluster.
    fn in_clusters(self, cluster: usize) -> Form {
        Form { sm: Sm::Sm90a, cluster, threads: self.threads / cluster, ..self }
    }

    /// The kernel, as a module.
    pub fn ptx(&self) -> String {
        let (operands, results) = (SLOT_BYTES * self.takes.len(), SLOT_BYTES * self.gives.len());
        // The lowest version that each machine needs here. `setmaxnreg` has to know how many registers a thread begins with, which
        // `ptxas` takes from the bounds of the launch.
        let version = if self.sm == Sm::Sm90a { "8.0" } else { "7.4" };
        let mut text = format!(
            ".version {version}\n.target {}\n.address_size 64\n.extern .shared .align 1024 .b8 smem[];\n\
             .visible .entry k(.param .u64 from, .param .u64 to{}) .maxntid {} .minnctapersm 1{}\n{{\n\
             \t.reg .pred %p<8>;\n\t.reg .b32 %r<8>;\n\t.reg .b64 %l<4>;\n\
             \t.reg .b32 %t;\n\t.reg .b32 %i;\n\t.reg .b64 %from;\n\t.reg .b64 %to;\n",
            self.sm.name(),
            if self.tensor.is_some() { ", .param .align 64 .b8 map[128]" } else { "" },
            self.threads,
            if self.cluster > 1 { format!(" .reqnctapercluster {}", self.cluster) } else { String::new() },
        );
        let mut line = |line: String| writeln!(text, "\t{line}").expect("a string takes everything");
        for (name, types) in [("a", &self.takes), ("d", &self.gives)] {
            for (at, ty) in types.iter().enumerate() {
                line(format!(".reg .b{} %{name}{at};", ty.bits().max(16)));
            }
        }
        line("mov.u32 %t, %tid.x;".into());
        line("mov.u32 %i, %ctaid.x;".into());
        line(format!("mad.lo.s32 %i, %i, {}, %t;", self.threads));
        line("ld.param.b64 %from, [from];".into());
        line("ld.param.b64 %to, [to];".into());
        line(format!("mad.wide.u32 %from, %i, {operands}, %from;"));
        line(format!("mad.wide.u32 %to, %i, {results}, %to;"));
        for (at, ty) in self.takes.iter().enumerate() {
            line(format!("ld.global.b{} %a{at}, [%from+{}];", ty.bits().max(16), SLOT_BYTES * at));
        }
        if self.tensor.is_some() {
            line(".reg .b64 %map;".into());
            line("mov.b64 %map, map;".into());
            line("cvta.param.u64 %map, %map;".into());
        }
        self.body.lines().for_each(|body| line(body.trim().to_string()));
        for (at, ty) in self.gives.iter().enumerate() {
            line(format!("st.global.b{} [%to+{}], %d{at};", ty.bits().max(16), SLOT_BYTES * at));
        }
        text + "\tret;\n}\n"
    }

    /// CTAs of its grid.
    pub fn ctas(&self) -> usize {
        self.operands.len() / self.takes.len() / self.threads
    }

    /// The tensor map, if it has one, of a kernel whose operands and results lie there.
    fn map(&self, from: u64, to: u64) -> Option<TensorMap> {
        self.tensor.clone().map(|tensor| match tensor {
            Tensor::OfOperands(map) => TensorMap { base: map.base + from, ..map },
            Tensor::OfResults(map) => TensorMap { base: map.base + to, ..map },
        })
    }

    /// How many results one of this type is: pairs are two.
    fn parts(ty: Type) -> u32 {
        if matches!(ty, Type::F16x2 | Type::Bf16x2) { 2 } else { 1 }
    }

    /// Results from memory, each as many bits as its type has.
    fn results(&self, memory: &[u8]) -> Vec<u64> {
        let (slots, _) = memory.as_chunks::<SLOT_BYTES>();
        let parts = slots.iter().zip(self.gives.iter().cycle()).flat_map(|(slot, &ty)| {
            let (slot, bits) = (u64::from_le_bytes(*slot), ty.bits() / Form::parts(ty));
            (0..Form::parts(ty)).map(move |part| slot >> (bits * part) & u64::MAX >> (64 - bits))
        });
        parts.collect()
    }
}

/// Where forms run.
#[derive(Clone)]
pub enum Machine {
    /// On the PTX emulator.
    Emulator(Options),
    /// On a GPU.
    Gpu(Arc<Context>),
}

/// Why a form gave no results.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The emulator does not know the instruction.
    #[error("{form}: the emulator does not read its kernel")]
    Unknown {
        /// The form.
        form: String,
        /// Why.
        source: PtxError,
    },
    /// The emulator found something wrong.
    #[error("{form}: {report}")]
    Reported {
        /// The form.
        form: String,
        /// What.
        report: Box<Report>,
    },
    /// The GPU or its driver failed.
    #[error("{form}: {source}")]
    Device {
        /// The form.
        form: String,
        /// How.
        source: Box<DeviceError>,
    },
}

impl Machine {
    /// Has it the instruction of a form?
    pub fn takes(&self, form: &Form) -> bool {
        let capability = match self {
            Machine::Emulator(options) => options.sm.capability(),
            Machine::Gpu(context) => context.gpu.capability,
        };
        // What an `a` architecture has, no other does.
        if form.sm == Sm::Sm90a {
            capability == form.sm.capability()
        } else {
            capability >= form.sm.capability()
        }
    }

    /// Runs a form: its results, in the order of [`Form::expected`].
    ///
    /// # Errors
    ///
    /// [`RunError`]. After a fault a GPU does nothing any more: later forms fail with it.
    pub fn run(&self, form: &Form) -> Result<Vec<u64>, RunError> {
        let operands: Vec<u8> = form.operands.iter().flat_map(|operand| operand.to_le_bytes()).collect();
        let bytes = SLOT_BYTES * form.gives.len() * form.threads * form.ctas();
        let memory = match self {
            Machine::Emulator(options) => emulate(form, options, &operands, bytes)?,
            Machine::Gpu(context) => on_gpu(form, context, &operands, bytes)
                .map_err(|source| RunError::Device { form: form.name.clone(), source: Box::new(source) })?,
        };
        Ok(form.results(&memory))
    }
}

fn emulate(form: &Form, options: &Options, operands: &[u8], bytes: usize) -> Result<Vec<u8>, RunError> {
    let unknown = |source| RunError::Unknown { form: form.name.clone(), source };
    let module = ptx::Module::parse(&form.ptx()).map_err(unknown)?;
    let mut memory = Memory::new();
    let (from, to) = (memory.allocate("operands", operands.len()), memory.allocate("results", bytes));
    memory.write(from, operands);
    let grid = Grid {
        ctas: [form.ctas() as u32, 1, 1],
        threads: [form.threads as u32, 1, 1],
        cluster: form.cluster as u32,
        dynamic_shared: form.shared_bytes,
        dependent: false,
    };
    let map = form.map(from, to).map(|map| map.encode().expect("a map that a driver makes"));
    let params = with_maps(&params(from, to), map);
    emulator::launch(&module.kernels[0], &grid, &params, &mut memory, options)
        .map_err(|report| RunError::Reported { form: form.name.clone(), report: Box::new(report) })?;
    Ok(memory.read(to, bytes).to_vec())
}

fn on_gpu(
    form: &Form,
    context: &Arc<Context>,
    operands: &[u8],
    bytes: usize,
) -> Result<Vec<u8>, DeviceError> {
    let mut module = Module::load(context, &Image::Ptx(&form.ptx()))?;
    module.add(&form.name, "k", form.shared_bytes)?;
    let (from, to) = (Buffer::zeroed(context, operands.len())?, Buffer::zeroed(context, bytes)?);
    from.write(0, operands)?;
    module.launch(&Call {
        phase: 0,
        ctas: form.ctas() as u32,
        threads: form.threads as u32,
        shared_bytes: form.shared_bytes,
        params: params(from.address(), to.address()),
        maps: form.map(from.address(), to.address()).into_iter().collect(),
        dependent: false,
    })?;
    context.wait()?;
    let mut memory = vec![0; bytes];
    to.read(0, &mut memory)?;
    Ok(memory)
}

fn params(from: u64, to: u64) -> Vec<u8> {
    [from, to].iter().flat_map(|address| address.to_le_bytes()).collect()
}

/// A result that is not what it may be.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{form}: result {result} of thread {thread}, from {}, is {found:#x}, expected {}", hex(operands), said(*expected))]
pub struct Wrong {
    /// The form.
    pub form: String,
    /// The thread, counted over all CTAs.
    pub thread: usize,
    /// Which of its results; halves of a pair are two.
    pub result: usize,
    /// The thread's operands.
    pub operands: Vec<u64>,
    /// The bits that came out.
    pub found: u64,
    /// What should have.
    pub expected: Expected,
}

fn hex(operands: &[u64]) -> String {
    operands.iter().map(|operand| format!("{operand:#x}")).collect::<Vec<_>>().join(" ")
}

fn said(expected: Expected) -> String {
    match expected {
        Expected::Bits(bits) => format!("{bits:#x}"),
        Expected::Within(ty, low, high) => format!("a number of {} from {low:e} to {high:e}", name_of(ty)),
        Expected::Nan(_) => "a NaN".to_string(),
    }
}

/// The results that are wrong, in order.
///
/// # Panics
///
/// If there are not as many as the form gives.
pub fn judge(form: &Form, results: &[u64]) -> Vec<Wrong> {
    assert_eq!(results.len(), form.expected.len(), "{}", form.name);
    let each = form.expected.len() / (form.threads * form.ctas());
    let wrong = results
        .iter()
        .zip(&form.expected)
        .enumerate()
        .filter(|(_, (found, expected))| !expected.holds(**found));
    let of = |(at, (&found, &expected)): (usize, (&u64, &Expected))| Wrong {
        form: form.name.clone(),
        thread: at / each,
        result: at % each,
        operands: form.operands.chunks(form.takes.len()).nth(at / each).unwrap_or_default().to_vec(),
        found,
        expected,
    };
    wrong.map(of).collect()
}
