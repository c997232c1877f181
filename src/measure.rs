//! Times one kernel of a model alone: what tuning, profiles and benches measure with.
//!
//! A kernel runs on buffers of its own, as large as the model's; numbers are small and random, so that no value is
//! subnormal. Weights are cold, as they are in a model that is larger than every cache: there are several copies of the
//! buffers, used in turn.

use codegen::cpu::{CodegenError, Form, Level};
use ir::cost::cost;
use ir::dim::MAX_SYMBOLS;
use ir::dtype::DType;
use ir::families::{Arg, GroupView, Lowered};
use ir::kernel::{Access, Buffer, Kernel, Space};
use ir::op::Op;
use ir::plan::{Cost, Plan};
use ir::random::Rng;
use runtime::code::{Code, CodeError, Guarded};
use runtime::map::MapError;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

/// Bytes of all copies of the buffers, at least: more than caches hold.
const COLD_BYTES: usize = 256 << 20;

/// Copies at most: small buffers are filled quickly, but there is an end.
const MOST_COPIES: usize = 64;

/// Why a kernel cannot be timed.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// LLVM or the linker.
    #[error(transparent)]
    Codegen(#[from] CodegenError),
    /// The code cannot be loaded.
    #[error(transparent)]
    Code(#[from] CodeError),
    /// There is no memory for its buffers.
    #[error(transparent)]
    Memory(#[from] MapError),
    /// It is not right.
    #[error("the kernel writes beside its buffers")]
    Strayed,
}

/// What a kernel runs on: one buffer a parameter, in several copies.
pub struct Operands {
    /// Copies, each with one buffer a parameter.
    copies: Vec<Vec<Guarded>>,
    /// Bytes of each parameter.
    sizes: Vec<usize>,
    turn: usize,
    symbols: [i64; MAX_SYMBOLS],
}

impl Operands {
    /// Buffers for `tokens` tokens after `past` others. `warm`: one copy, so that what fits a cache stays there.
    ///
    /// # Errors
    ///
    /// When memory is refused.
    pub fn new(
        view: &GroupView<'_>,
        lowered: &Lowered,
        [tokens, past]: [usize; 2],
        warm: bool,
    ) -> Result<Operands, MapError> {
        let mut symbols = [0; MAX_SYMBOLS];
        (symbols[0], symbols[1]) = (tokens as i64, past as i64);
        let params: Vec<&Buffer> = lowered.kernel.params().map(|(_, buffer)| buffer).collect();
        let sizes = sizes(&lowered.kernel, &symbols);
        let whole: usize = sizes.iter().sum::<usize>().max(1);
        let copies = if warm { 1 } else { COLD_BYTES.div_ceil(whole).clamp(1, MOST_COPIES) };
        let copies = (0..copies).map(|_| {
            let mut rng = Rng(1);
            let params = params.iter().zip(&lowered.args).zip(&sizes);
            let buffer = |((buffer, arg), &bytes): ((&&Buffer, &Arg), &usize)| {
                let mut memory = Guarded::zeroed(bytes)?;
                fill(memory.bytes_mut(), buffer.dtype, is_position(view, arg).then_some(past), &mut rng);
                Ok(memory)
            };
            params.map(buffer).collect::<Result<Vec<Guarded>, MapError>>()
        });
        let copies = copies.collect::<Result<_, _>>()?;
        Ok(Operands { copies, sizes, turn: 0, symbols })
    }

    /// Bytes of all copies.
    pub fn bytes(&self) -> usize {
        self.copies.len() * self.sizes.iter().sum::<usize>()
    }

    /// Has each parameter of the kernel a buffer of its size?
    pub fn fit(&self, kernel: &Kernel) -> bool {
        self.sizes == sizes(kernel, &self.symbols)
    }
}

/// A kernel with what it runs on. Kernels of one group may share operands.
pub struct Alone {
    code: Code,
    operands: Rc<RefCell<Operands>>,
    /// Parameters that it writes and does not read.
    writes: Vec<usize>,
    /// FLOPs and bytes of one run.
    pub cost: Cost,
}

impl Alone {
    /// Compiles the kernel of a group, and makes buffers for it: see [`Operands::new`].
    ///
    /// # Errors
    ///
    /// When LLVM or the linker fails, or memory is refused.
    pub fn new(
        view: &GroupView<'_>,
        lowered: &Lowered,
        level: &Level,
        threads: usize,
        step: [usize; 2],
        warm: bool,
    ) -> Result<Alone, MeasureError> {
        let operands = Operands::new(view, lowered, step, warm)?;
        Alone::on(view, lowered, level, threads, Rc::new(RefCell::new(operands)))
    }

    /// Compiles the kernel of a group, to run on `operands` that fit it.
    ///
    /// # Errors
    ///
    /// When LLVM or the linker fails.
    ///
    /// # Panics
    ///
    /// If the operands do not fit.
    pub fn on(
        view: &GroupView<'_>,
        lowered: &Lowered,
        level: &Level,
        threads: usize,
        operands: Rc<RefCell<Operands>>,
    ) -> Result<Alone, MeasureError> {
        let kernel = &lowered.kernel;
        assert!(operands.borrow().fit(kernel), "operands of another kernel");
        let plan = Plan::alone(std::slice::from_ref(kernel));
        let llvm = codegen::lower::module(&plan, std::slice::from_ref(kernel), level.features, false);
        let object = codegen::cpu::compile(&llvm, level, Form::Object)?;
        let object = codegen::link::link(&object)?;
        let code = Code::load(&object, [plan.entries[0].name.as_str()], threads)?;
        let symbols = operands.borrow().symbols;
        let cost = cost(view, &symbols, symbols[1]);
        let writes =
            kernel.params().enumerate().filter(|(_, (_, b))| b.space == Space::Global(Access::Write));
        let writes = writes.map(|(number, _)| number).collect();
        Ok(Alone { code, operands, writes, cost })
    }

    /// Runs once; gives the seconds.
    pub fn run(&mut self) -> f64 {
        let operands = &mut *self.operands.borrow_mut();
        operands.turn = (operands.turn + 1) % operands.copies.len();
        let start = Instant::now();
        self.code.run_on(0, &mut operands.copies[operands.turn], operands.symbols);
        start.elapsed().as_secs_f64()
    }

    /// Digest of the bits that a run writes; what it leaves out shows too.
    ///
    /// # Errors
    ///
    /// When it writes beside its buffers.
    pub fn result(&mut self) -> Result<[u8; 32], MeasureError> {
        /// As f32 or bf16 a number that no kernel gives here.
        const UNWRITTEN: u8 = 0x7B;
        let operands = &mut *self.operands.borrow_mut();
        let copy = &mut operands.copies[0];
        self.writes.iter().for_each(|&at| copy[at].bytes_mut().fill(UNWRITTEN));
        self.code.run_on(0, copy, operands.symbols);
        if copy.iter().any(|buffer| !buffer.is_intact()) {
            return Err(MeasureError::Strayed);
        }
        let mut hasher = blake3::Hasher::new();
        for &at in &self.writes {
            hasher.update(copy[at].bytes());
        }
        Ok(hasher.finalize().into())
    }

    /// Runs for about `seconds`, but at least three times; gives the seconds of each run.
    pub fn times(&mut self, seconds: f64) -> Vec<f64> {
        let begin = Instant::now();
        let mut samples = Vec::new();
        while samples.len() < 3 || begin.elapsed().as_secs_f64() < seconds {
            samples.push(self.run());
        }
        samples
    }
}

/// Bytes of each parameter.
fn sizes(kernel: &Kernel, symbols: &[i64; MAX_SYMBOLS]) -> Vec<usize> {
    kernel.params().map(|(_, buffer)| buffer_bytes(buffer, symbols)).collect()
}

/// Bytes from the first to the last element.
fn buffer_bytes(buffer: &Buffer, symbols: &[i64; MAX_SYMBOLS]) -> usize {
    let reach = |(extent, stride): (&ir::Dim, &i64)| (extent.eval(symbols) - 1).max(0) * stride;
    let last: i64 = buffer.shape.iter().zip(&buffer.strides).map(reach).sum();
    buffer.dtype.bytes(last as usize + 1)
}

/// Are these the positions of the step's tokens?
fn is_position(view: &GroupView<'_>, arg: &Arg) -> bool {
    let Arg::Value(id) = arg else { return false };
    matches!(&view.graph[*id].op, Op::Input { name } if name == "positions")
}

/// Small random numbers; indices are positions after `past`, or zero.
fn fill(memory: &mut [u8], dtype: DType, past: Option<usize>, rng: &mut Rng) {
    match dtype {
        DType::I32 => {
            let first = past.unwrap_or(0) as i32;
            for (number, slot) in memory.as_chunks_mut().0.iter_mut().enumerate() {
                *slot = past.map_or(0, |_| first + number as i32).to_le_bytes();
            }
        }
        DType::F32 => {
            memory.as_chunks_mut().0.iter_mut().for_each(|slot| *slot = (rng.unit() as f32).to_le_bytes())
        }
        // The sign and some of the mantissa: numbers of 1/128 to 1/64.
        DType::BF16 => memory
            .as_chunks_mut()
            .0
            .iter_mut()
            .for_each(|slot| *slot = (0x3C00 | rng.bits() as u16 & 0x807F).to_le_bytes()),
        _ => memory.fill(0),
    }
}
