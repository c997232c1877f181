//! A kernel alone on this CPU.

use super::{UNWRITTEN, cold_copies, fill, is_position, sizes, symbols, written};
use codegen::cpu::{CodegenError, Form, Level};
use ir::cost::cost;
use ir::dim::MAX_SYMBOLS;
use ir::families::{Arg, GroupView, Lowered};
use ir::kernel::{Buffer, Kernel};
use ir::plan::{Cost, Plan};
use ir::random::Rng;
use runtime::code::{Code, CodeError, Guarded};
use runtime::map::MapError;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

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
        step: [usize; 2],
        warm: bool,
    ) -> Result<Operands, MapError> {
        let symbols = symbols(step);
        let params: Vec<&Buffer> = lowered.kernel.params().map(|(_, buffer)| buffer).collect();
        let sizes = sizes(&lowered.kernel, &symbols);
        let whole: usize = sizes.iter().sum();
        let copies = if warm { 1 } else { cold_copies(whole) };
        let copies = (0..copies).map(|_| {
            let mut rng = Rng(1);
            let params = params.iter().zip(&lowered.args).zip(&sizes);
            let buffer = |((buffer, arg), &bytes): ((&&Buffer, &Arg), &usize)| {
                let mut memory = Guarded::zeroed(bytes)?;
                fill(memory.bytes_mut(), buffer.dtype, is_position(view, arg).then_some(step[1]), &mut rng);
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
        let writes = written(kernel);
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
