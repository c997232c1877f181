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
use ir::kernel::Buffer;
use ir::op::Op;
use ir::plan::{Cost, Entry, Give, Launch, Place, Plan, PlanBuffer, PlanKernel};
use ir::random::Rng;
use runtime::code::{Code, CodeError, Guarded};
use runtime::map::MapError;
use runtime::meter;
use std::time::Instant;

/// Bytes of all copies of the buffers, at least: more than caches hold.
const COLD_BYTES: usize = 256 << 20;

/// Copies at most: small buffers are filled quickly, but there is an end.
const MOST_COPIES: usize = 64;

/// Name of the one entry point.
const ENTRY: &str = "alone";

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
}

/// A kernel with what it runs on.
pub struct Alone {
    code: Code,
    /// Copies, each with one buffer a parameter.
    copies: Vec<Vec<Guarded>>,
    turn: usize,
    symbols: [i64; MAX_SYMBOLS],
    /// FLOPs and bytes of one run.
    pub cost: Cost,
}

impl Alone {
    /// Compiles the kernel of a group, and makes buffers for `tokens` tokens after `past` others. `warm`: one copy of the
    /// buffers, so that what fits a cache stays there.
    ///
    /// # Errors
    ///
    /// When LLVM or the linker fails, or memory is refused.
    pub fn new(
        view: &GroupView<'_>,
        lowered: &Lowered,
        level: &Level,
        threads: usize,
        [tokens, past]: [usize; 2],
        warm: bool,
    ) -> Result<Alone, MeasureError> {
        let kernel = &lowered.kernel;
        let mut symbols = [0; MAX_SYMBOLS];
        (symbols[0], symbols[1]) = (tokens as i64, past as i64);
        let params: Vec<&Buffer> = kernel.params().map(|(_, buffer)| buffer).collect();
        let sizes: Vec<usize> = params.iter().map(|b| buffer_bytes(b, &symbols)).collect();
        let plan = one_launch(&kernel.name, view, &sizes);
        let llvm = codegen::lower::module(&plan, std::slice::from_ref(kernel), level.features, false);
        let object = codegen::cpu::compile(&llvm, level, Form::Object)?;
        let object = codegen::link::link(&object)?;
        let code = Code::load(&object, [ENTRY], threads)?;

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
        let cost = cost(view, &symbols, past as i64);
        Ok(Alone { code, copies, turn: 0, symbols, cost })
    }

    /// Runs once; gives the seconds.
    pub fn run(&mut self) -> f64 {
        self.turn = (self.turn + 1) % self.copies.len();
        let start = Instant::now();
        self.code.run_on(0, &mut self.copies[self.turn], self.symbols);
        start.elapsed().as_secs_f64()
    }

    /// Runs for about `seconds`, but at least three times; gives the median seconds of a run.
    pub fn time(&mut self, seconds: f64) -> f64 {
        let begin = Instant::now();
        let mut samples = Vec::new();
        while samples.len() < 3 || begin.elapsed().as_secs_f64() < seconds {
            samples.push(self.run());
        }
        meter::median(&samples)
    }
}

/// Bytes from the first to the last element.
fn buffer_bytes(buffer: &Buffer, symbols: &[i64; MAX_SYMBOLS]) -> usize {
    let reach = |(extent, stride): (&ir::Dim, &i64)| (extent.eval(symbols) - 1).max(0) * stride;
    let last: i64 = buffer.shape.iter().zip(&buffer.strides).map(reach).sum();
    buffer.dtype.bytes(last as usize + 1)
}

/// A program of one launch.
fn one_launch(kernel: &str, view: &GroupView<'_>, sizes: &[usize]) -> Plan {
    let buffer = |(number, &bytes): (usize, &usize)| PlanBuffer {
        name: number.to_string(),
        place: Place::State,
        dtype: DType::U8,
        bytes,
    };
    let launch = Launch { kernel: 0, args: (0..sizes.len()).collect(), cost: Cost::default() };
    Plan {
        buffers: sizes.iter().enumerate().map(buffer).collect(),
        kernels: vec![PlanKernel {
            name: kernel.to_string(),
            family: view.family(),
            schedule: String::new(),
        }],
        entries: vec![Entry {
            name: ENTRY.to_string(),
            symbols: view.graph.symbols.clone(),
            give: Give::Nothing,
            tokens: 0,
            positions: 0,
            logits: None,
            token: None,
            launches: vec![launch],
        }],
        ..Plan::default()
    }
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
