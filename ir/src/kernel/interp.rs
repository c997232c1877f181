//! Runs a kernel on numbers, slowly and obviously right, and reports what no single worker would notice.
//!
//! * **Arithmetic** on f32 is IEEE binary32, each operation rounded once: `+ - * /` as they stand, `fma` by
//!   [`f32::mul_add`]; `min` and `max` give the second operand where either is NaN or both are equal; a function is
//!   [`Unary`](crate::op::Unary)'s f64 meaning, rounded to f32. i32 wraps; an index that overflows is a fault.
//! * **`cast`** rounds floats to nearest even; to i32 it truncates towards zero and clamps ([`DType::round`]).
//! * **`dot.bf16`**, lane `i`: `fma(a[2i], b[2i], fma(a[2i + 1], b[2i + 1], acc))`: the odd product first, each sum
//!   rounded to f32, subnormals kept. (Intel's SDM has this order for `vdpbf16ps`. Products of bf16 are exact.)
//! * **`reduce`** folds lane `i` with lane `i + n/2`, then halves `n`.
//! * **Workers**: each iteration of a `parallel` counts as a worker of its own, and so does what stands outside of
//!   `parallel`, which every worker runs. Two workers that touch one element of a `write` or `update` param between two
//!   barriers, one of them writing, are a race. A local belongs to the worker: an iteration that reads what another
//!   iteration stored would see that only on some numbers of workers, and this is a fault too.
//! * **Threads**: kernels whose workers have several are refused; the PTX emulator is their judge.
//! * **Memory** begins unwritten in locals and `write` params, and registers without an initial value undefined;
//!   reading either is a fault. So is an element of a `write` param that is unwritten at the end, and an index outside
//!   of its axis: what lies between two rows is thereby never touched.

mod eval;

use super::verify::{VerifyError, verify};
use super::{Access, Buffer, BufferId, Expr, Kernel, RegId, Space, Stmt, VarId, print};
use crate::dim::MAX_SYMBOLS;
use crate::dtype::DType;

/// Content of a buffer: numbers that its dtype holds, and which of them are there.
#[derive(Clone, Debug, PartialEq)]
pub struct KBuffer {
    dtype: DType,
    shape: Vec<i64>,
    strides: Vec<i64>,
    /// By position in memory. What lies between rows is never written.
    elems: Vec<Option<f64>>,
}

impl KBuffer {
    /// A buffer of which nothing is written; its shape is that of `buffer` for these symbols, which are in
    /// their ranges. The kernel is a verified one.
    pub fn unwritten(buffer: &Buffer, symbols: &[i64; MAX_SYMBOLS]) -> KBuffer {
        let shape = extents(buffer, symbols);
        let last: i64 =
            shape.iter().zip(&buffer.strides).map(|(&extent, &stride)| (extent - 1) * stride).sum();
        let span = if shape.contains(&0) { 0 } else { last as usize + 1 };
        KBuffer { dtype: buffer.dtype, shape, strides: buffer.strides.clone(), elems: vec![None; span] }
    }

    /// A buffer with every element written, rounded to its dtype; `data` is in row-major order without gaps.
    ///
    /// # Panics
    ///
    /// When `data` has not as many elements as the shape.
    pub fn from_data(buffer: &Buffer, symbols: &[i64; MAX_SYMBOLS], data: &[f64]) -> KBuffer {
        let mut filled = KBuffer::unwritten(buffer, symbols);
        let positions = filled.positions();
        assert_eq!(positions.len(), data.len(), "elements of %{} {:?}", buffer.name, filled.shape);
        for (position, &x) in positions.into_iter().zip(data) {
            filled.elems[position] = Some(buffer.dtype.round(x));
        }
        filled
    }

    /// The extents.
    pub fn shape(&self) -> &[i64] {
        &self.shape
    }

    /// The elements in row-major order without gaps; `None` where nothing is written.
    pub fn elems(&self) -> Vec<Option<f64>> {
        self.positions().into_iter().map(|position| self.elems[position]).collect()
    }

    /// The elements in row-major order without gaps; NaN where nothing is written.
    pub fn data(&self) -> Vec<f64> {
        self.elems().into_iter().map(|x| x.unwrap_or(f64::NAN)).collect()
    }

    /// Writes one element, or takes it away: a cache is written up to some slot.
    ///
    /// # Panics
    ///
    /// When the index is outside.
    pub fn set(&mut self, index: &[i64], x: Option<f64>) {
        assert_eq!(index.len(), self.shape.len(), "one index an axis");
        assert!(
            index.iter().zip(&self.shape).all(|(&i, &extent)| 0 <= i && i < extent),
            "{index:?} is outside"
        );
        let position: i64 = index.iter().zip(&self.strides).map(|(i, stride)| i * stride).sum();
        self.elems[position as usize] = x.map(|x| self.dtype.round(x));
    }

    /// Positions in memory of all elements, in row-major order.
    fn positions(&self) -> Vec<usize> {
        if self.elems.is_empty() {
            return Vec::new();
        }
        let mut positions = vec![0usize];
        for (&extent, &stride) in self.shape.iter().zip(&self.strides) {
            let along = |base: usize| (0..extent).map(move |i| base + (i * stride) as usize);
            positions = positions.into_iter().flat_map(along).collect();
        }
        positions
    }

    /// The index of the element at a position of a buffer whose axes do not overlap.
    fn index_of(&self, position: usize) -> Vec<i64> {
        let mut axes: Vec<usize> = (0..self.shape.len()).collect();
        axes.sort_by_key(|&axis| (std::cmp::Reverse(self.strides[axis]), axis));
        let (mut rest, mut index) = (position as i64, vec![0; self.shape.len()]);
        for axis in axes {
            // An axis of one element may have any stride.
            if self.shape[axis] > 1 {
                index[axis] = rest / self.strides[axis];
                rest %= self.strides[axis];
            }
        }
        index
    }
}

fn extents(buffer: &Buffer, symbols: &[i64; MAX_SYMBOLS]) -> Vec<i64> {
    buffer.shape.iter().map(|dim| dim.eval(symbols)).collect()
}

/// Limits of a run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Statements and iterations to run at most.
    pub max_steps: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options { max_steps: u64::MAX }
    }
}

/// What a run did, all workers together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes loaded from each buffer of the kernel.
    pub load_bytes: Vec<u64>,
    /// Bytes stored to each buffer of the kernel.
    pub store_bytes: Vec<u64>,
    /// Operations on numbers (indices are free): 1 a lane of arithmetic, 2 of `fma`, 4 of `dot.bf16`, those of the
    /// table for a function, and `n - 1` for a `reduce` of `n` lanes.
    pub flops: u64,
    /// Statements and iterations.
    pub steps: u64,
}

/// What went wrong, and where.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("`{at}`{}: {kind}", within(loops))]
pub struct Fault {
    /// First line of the statement or declaration.
    pub at: String,
    /// Loop variables around it and their values, outermost first.
    pub loops: Vec<(String, i64)>,
    /// What.
    pub kind: FaultKind,
}

fn within(loops: &[(String, i64)]) -> String {
    let values: Vec<String> = loops.iter().map(|(name, value)| format!("%{name} = {value}")).collect();
    if values.is_empty() { String::new() } else { format!(" at {}", values.join(", ")) }
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FaultKind {
    /// No kernel to run.
    #[error(transparent)]
    Invalid(#[from] Box<VerifyError>),
    /// A kernel whose workers are not single threads.
    #[error("a worker of {0} threads; the device ptx-emulator runs such kernels")]
    Threads(u16),
    /// A symbol outside its range.
    #[error("{name} = {value} is outside {min}..{max}")]
    Symbol {
        /// The symbol.
        name: String,
        /// Its value.
        value: i64,
        /// The least it may be.
        min: i64,
        /// The most it may be.
        max: i64,
    },
    /// Not one buffer a parameter.
    #[error("{found} buffers for {params} params")]
    Count {
        /// Buffers given.
        found: usize,
        /// Params of the kernel.
        params: usize,
    },
    /// A buffer made for another declaration or other symbols.
    #[error("`%{0}` is bound to a buffer of another dtype, shape or stride")]
    Binding(String),
    /// An index outside its axis.
    #[error("axis {axis} of `%{buffer}`: {index} to {last} is outside 0..{extent}")]
    OutOfBounds {
        /// The buffer.
        buffer: String,
        /// Which axis.
        axis: usize,
        /// First index.
        index: i64,
        /// Last index: lanes counted.
        last: i64,
        /// The extent.
        extent: i64,
    },
    /// A load of what nothing wrote.
    #[error("`%{buffer}`{index:?} is read, and nothing wrote it")]
    Unwritten {
        /// The buffer.
        buffer: String,
        /// The element.
        index: Vec<i64>,
    },
    /// A register read before it was set.
    #[error("`%{reg}`{index:?} is read, and nothing set it")]
    Undefined {
        /// The register file.
        reg: String,
        /// Which register.
        index: Vec<i64>,
    },
    /// Two workers at one element with no barrier between, one of them writing.
    #[error("race at `%{buffer}`{index:?}: {second} {}, {first} {}", did(*second_writes), did(*first_writes))]
    Race {
        /// The buffer.
        buffer: String,
        /// The element.
        index: Vec<i64>,
        /// Who came first, here.
        first: Worker,
        /// Did it write?
        first_writes: bool,
        /// Who came then.
        second: Worker,
        /// Does it write?
        second_writes: bool,
    },
    /// A worker's own memory, read by an iteration that another worker may run.
    #[error("`%{buffer}`{index:?} is read, and {writer} wrote it, maybe on another worker")]
    Split {
        /// The local.
        buffer: String,
        /// The element.
        index: Vec<i64>,
        /// Who wrote it.
        writer: Worker,
    },
    /// Elements of a `write` param that were not stored.
    #[error("{count} elements are never written, first {first:?}")]
    NeverWritten {
        /// How many.
        count: usize,
        /// The first of them.
        first: Vec<i64>,
    },
    /// An index beyond 64 bits, or beyond 32 where it is cast to i32.
    #[error("an index overflows")]
    Overflow,
    /// `%` of a negative index.
    #[error("the remainder of {0}, which is negative")]
    NegativeRem(i64),
    /// More steps than [`Options::max_steps`].
    #[error("more than {0} steps")]
    Steps(u64),
}

fn did(writes: bool) -> &'static str {
    if writes { "writes" } else { "reads" }
}

/// Who touches memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Worker {
    /// What stands outside of `parallel`: every worker.
    Every,
    /// One iteration of a `parallel`.
    Iteration {
        /// Name of the loop variable.
        var: String,
        /// Its value.
        value: i64,
    },
}

impl std::fmt::Display for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Worker::Every => f.write_str("every worker"),
            Worker::Iteration { var, value } => write!(f, "%{var} = {value}"),
        }
    }
}

/// Runs a kernel. `params` are bound in order; `write` params are unwritten at first, whatever they hold.
///
/// # Errors
///
/// The first fault, in the order of one worker that runs everything.
pub fn run(
    kernel: &Kernel,
    symbols: &[i64; MAX_SYMBOLS],
    params: &mut [KBuffer],
    options: Options,
) -> Result<Stats, Box<Fault>> {
    let header = || format!("kernel @{}", kernel.name);
    let fault = |at: String, kind| Box::new(Fault { at, loops: Vec::new(), kind });
    verify(kernel).map_err(|e| fault(header(), FaultKind::Invalid(e)))?;
    if kernel.threads > 1 {
        return Err(fault(header(), FaultKind::Threads(kernel.threads)));
    }
    for (symbol, &value) in kernel.symbols.0.iter().zip(symbols) {
        let (name, min, max) = (symbol.name.clone(), symbol.min, symbol.max);
        if value < min || max < value {
            return Err(fault(header(), FaultKind::Symbol { name, value, min, max }));
        }
    }
    if params.len() != kernel.params().count() {
        let kind = FaultKind::Count { found: params.len(), params: kernel.params().count() };
        return Err(fault(header(), kind));
    }
    let is_local = |buffer: &&Buffer| buffer.space == Space::Local;
    let mut locals: Vec<KBuffer> =
        kernel.buffers.iter().filter(is_local).map(|b| KBuffer::unwritten(b, symbols)).collect();
    let (mut next_param, mut next_local) = (params.iter_mut(), locals.iter_mut());
    let mut memory = Vec::new();
    for buffer in &kernel.buffers {
        let content = match buffer.space {
            Space::Global(_) => next_param.next().expect("counted above"),
            Space::Local => next_local.next().expect("made above"),
            Space::Shared | Space::Swizzled => unreachable!("refused above"),
        };
        let KBuffer { dtype, shape, strides, elems } = &mut *content;
        if *dtype != buffer.dtype || *shape != extents(buffer, symbols) || *strides != buffer.strides {
            let kind = FaultKind::Binding(buffer.name.clone());
            return Err(fault(print::declaration(kernel, buffer), kind));
        }
        if buffer.space == Space::Global(Access::Write) {
            elems.fill(None);
        }
        let watched = buffer.space != Space::Global(Access::Read);
        let touched = vec![Touched::default(); if watched { content.elems.len() } else { 0 }];
        memory.push(Memory { content, touched });
    }

    let mut machine = Machine {
        kernel,
        symbols,
        memory,
        vars: vec![Value::Index(0); kernel.vars.len()],
        regs: kernel.regs.iter().map(|file| vec![None; file.len()]).collect(),
        loops: Vec::new(),
        workers: vec![None; 2], // 0 is nobody.
        now: 1,
        outside: 1,
        stats: Stats {
            load_bytes: vec![0; kernel.buffers.len()],
            store_bytes: vec![0; kernel.buffers.len()],
            ..Stats::default()
        },
        options,
        failed_at: None,
    };
    if let Err(kind) = machine.block(&kernel.body) {
        let loops = machine.loops.iter().map(|&(var, value)| (kernel[var].name.clone(), value)).collect();
        let at = machine.failed_at.unwrap_or_else(header);
        return Err(Box::new(Fault { at, loops, kind: *kind }));
    }
    for (buffer, Memory { content, .. }) in kernel.buffers.iter().zip(&machine.memory) {
        let missing: Vec<usize> = if buffer.space == Space::Global(Access::Write) {
            content.positions().into_iter().filter(|&position| content.elems[position].is_none()).collect()
        } else {
            Vec::new()
        };
        if let Some(&first) = missing.first() {
            let kind = FaultKind::NeverWritten { count: missing.len(), first: content.index_of(first) };
            return Err(fault(print::declaration(kernel, buffer), kind));
        }
    }
    Ok(machine.stats)
}

/// A value. Every dtype but i32 is a subset of f32, so its lanes are held as f32.
#[derive(Clone, Debug)]
enum Value {
    Index(i64),
    Flag(bool),
    Floats(Vec<f32>),
    Ints(Vec<i32>),
}

/// Who touched an element: indices of [`Machine::workers`], 0 for nobody.
#[derive(Clone, Copy, Default)]
struct Touched {
    writer: usize,
    /// The first and the last reader since the last barrier: any third would race with whom these race with.
    readers: [usize; 2],
}

struct Memory<'a> {
    content: &'a mut KBuffer,
    /// By position; empty for what is only read.
    touched: Vec<Touched>,
}

struct Machine<'a> {
    kernel: &'a Kernel,
    symbols: &'a [i64; MAX_SYMBOLS],
    memory: Vec<Memory<'a>>,
    vars: Vec<Value>,
    regs: Vec<Vec<Option<Value>>>,
    /// Loop variables around the statement.
    loops: Vec<(VarId, i64)>,
    /// All workers so far: iterations of `parallel`, and `None` for what stands outside, one after each barrier.
    workers: Vec<Option<(VarId, i64)>>,
    /// The worker that runs.
    now: usize,
    /// What stands outside of `parallel`, since the last barrier; all workers before it are done.
    outside: usize,
    stats: Stats,
    options: Options,
    /// The innermost statement that failed.
    failed_at: Option<String>,
}

type Eval<T> = Result<T, Box<FaultKind>>;

impl Machine<'_> {
    fn block(&mut self, stmts: &[Stmt]) -> Eval<()> {
        for stmt in stmts {
            if let Err(kind) = self.stmt(stmt) {
                self.failed_at.get_or_insert_with(|| print::head(self.kernel, stmt));
                return Err(kind);
            }
        }
        Ok(())
    }

    fn step(&mut self) -> Eval<()> {
        self.stats.steps += 1;
        if self.stats.steps > self.options.max_steps {
            return Err(Box::new(FaultKind::Steps(self.options.max_steps)));
        }
        Ok(())
    }

    fn stmt(&mut self, stmt: &Stmt) -> Eval<()> {
        self.step()?;
        match stmt {
            Stmt::Let { var, value } => self.vars[var.0 as usize] = self.eval(value)?,
            Stmt::Reg { reg, init } => {
                let init = init.as_ref().map(|init| self.eval(init)).transpose()?;
                self.regs[reg.0 as usize].fill(init);
            }
            Stmt::Set { reg, index, value } => {
                let value = self.eval(value)?;
                let (flat, _) = self.register(*reg, index)?;
                self.regs[reg.0 as usize][flat] = Some(value);
            }
            Stmt::Store { buffer, index, value } => {
                let value = self.eval(value)?;
                self.store(*buffer, index, value)?;
            }
            Stmt::Prefetch { index, .. } => {
                for i in index {
                    self.index(i)?;
                }
            }
            Stmt::For { var, lo, hi, step, body } => {
                let (mut i, hi) = (self.index(lo)?, self.index(hi)?);
                while i < hi {
                    self.iteration(*var, i, body)?;
                    // Past the largest index there is no further iteration.
                    i = i.checked_add(*step).unwrap_or(hi);
                }
            }
            Stmt::Unroll { var, count, body } => {
                for i in 0..*count {
                    self.iteration(*var, i, body)?;
                }
            }
            Stmt::Parallel { var, count, body } => {
                for i in 0..self.index(count)? {
                    self.now = self.workers.len();
                    self.workers.push(Some((*var, i)));
                    self.iteration(*var, i, body)?;
                    self.now = self.outside;
                }
            }
            Stmt::If { cond, then, otherwise } => {
                let Value::Flag(holds) = self.eval(cond)? else { unreachable!("a flag, as verified") };
                self.block(if holds { then } else { otherwise })?;
            }
            Stmt::Barrier => {
                (self.now, self.outside) = (self.workers.len(), self.workers.len());
                self.workers.push(None);
            }
            Stmt::Sync | Stmt::Copy { .. } | Stmt::Commit | Stmt::Wait(_) | Stmt::Warpgroup(_) => {
                unreachable!("refused above")
            }
        }
        Ok(())
    }

    fn iteration(&mut self, var: VarId, value: i64, body: &[Stmt]) -> Eval<()> {
        self.step()?;
        self.vars[var.0 as usize] = Value::Index(value);
        self.loops.push((var, value));
        self.block(body)?;
        self.loops.pop();
        Ok(())
    }

    // Memory.

    /// Position of the first of `lanes` elements.
    fn position(&mut self, buffer: BufferId, index: &[Expr], lanes: usize) -> Eval<usize> {
        let mut position = 0;
        for (axis, i) in index.iter().enumerate() {
            let at = self.index(i)?;
            let content = &self.memory[buffer.0 as usize].content;
            let extent = content.shape[axis];
            let last = if axis + 1 == index.len() { at.saturating_add(lanes as i64 - 1) } else { at };
            if at < 0 || last >= extent {
                let buffer = self.kernel[buffer].name.clone();
                return Err(Box::new(FaultKind::OutOfBounds { buffer, axis, index: at, last, extent }));
            }
            position += at * content.strides[axis];
        }
        Ok(position as usize)
    }

    fn load(&mut self, buffer: BufferId, index: &[Expr], lanes: u16) -> Eval<Value> {
        let lanes = usize::from(lanes);
        let first = self.position(buffer, index, lanes)?;
        let is_local = self.kernel[buffer].space == Space::Local;
        let mut loaded = Vec::with_capacity(lanes);
        for position in first..first + lanes {
            let memory = &mut self.memory[buffer.0 as usize];
            let Some(x) = memory.content.elems[position] else {
                return Err(Box::new(FaultKind::Unwritten {
                    buffer: self.kernel[buffer].name.clone(),
                    index: memory.content.index_of(position),
                }));
            };
            loaded.push(x);
            let Some(touched) = memory.touched.get_mut(position) else { continue };
            let writer = touched.writer;
            if is_local {
                if self.workers[writer].is_some() && writer != self.now {
                    return Err(Box::new(FaultKind::Split {
                        buffer: self.kernel[buffer].name.clone(),
                        index: memory.content.index_of(position),
                        writer: self.worker(writer),
                    }));
                }
                continue;
            }
            let [first, last] = &mut touched.readers;
            if *first < self.outside {
                *first = self.now;
            }
            *last = self.now;
            if self.races_with(writer) {
                return Err(self.race(buffer, position, (writer, true), false));
            }
        }
        let bytes = self.kernel[buffer].dtype.bytes(lanes) as u64;
        self.stats.load_bytes[buffer.0 as usize] += bytes;
        Ok(match self.kernel[buffer].dtype {
            DType::I32 => Value::Ints(loaded.into_iter().map(|x| x as i32).collect()),
            _ => Value::Floats(loaded.into_iter().map(|x| x as f32).collect()),
        })
    }

    fn store(&mut self, buffer: BufferId, index: &[Expr], value: Value) -> Eval<()> {
        let stored: Vec<f64> = match value {
            Value::Floats(lanes) => lanes.into_iter().map(f64::from).collect(),
            Value::Ints(lanes) => lanes.into_iter().map(f64::from).collect(),
            Value::Index(_) | Value::Flag(_) => unreachable!("a vector, as verified"),
        };
        let first = self.position(buffer, index, stored.len())?;
        let is_local = self.kernel[buffer].space == Space::Local;
        self.stats.store_bytes[buffer.0 as usize] += self.kernel[buffer].dtype.bytes(stored.len()) as u64;
        for (position, x) in (first..).zip(stored) {
            let Touched { writer, readers } = self.memory[buffer.0 as usize].touched[position];
            if !is_local {
                if self.races_with(writer) {
                    return Err(self.race(buffer, position, (writer, true), true));
                }
                if let Some(reader) = readers.into_iter().find(|&reader| self.races_with(reader)) {
                    return Err(self.race(buffer, position, (reader, false), true));
                }
            }
            let memory = &mut self.memory[buffer.0 as usize];
            memory.content.elems[position] = Some(x);
            memory.touched[position].writer = self.now;
        }
        Ok(())
    }

    /// Is it another worker, with no barrier between?
    fn races_with(&self, worker: usize) -> bool {
        worker >= self.outside && worker != self.now
    }

    fn race(
        &self,
        buffer: BufferId,
        position: usize,
        first: (usize, bool),
        second_writes: bool,
    ) -> Box<FaultKind> {
        Box::new(FaultKind::Race {
            buffer: self.kernel[buffer].name.clone(),
            index: self.memory[buffer.0 as usize].content.index_of(position),
            first: self.worker(first.0),
            first_writes: first.1,
            second: self.worker(self.now),
            second_writes,
        })
    }

    fn worker(&self, number: usize) -> Worker {
        match self.workers[number] {
            None => Worker::Every,
            Some((var, value)) => Worker::Iteration { var: self.kernel[var].name.clone(), value },
        }
    }

    /// Place of a register in its file, and its index.
    fn register(&mut self, reg: RegId, index: &[Expr]) -> Eval<(usize, Vec<i64>)> {
        let (mut flat, mut at) = (0, Vec::new());
        for (i, &extent) in index.iter().zip(&self.kernel[reg].dims) {
            let i = self.index(i)?;
            flat = flat * usize::from(extent) + i as usize;
            at.push(i);
        }
        Ok((flat, at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::parse::parse;

    /// Runs the one kernel of a text with `T = 2`; gives the params afterwards.
    fn run_text(text: &str, data: &[&[f64]]) -> Result<(Vec<Vec<f64>>, Stats), String> {
        let kernel = parse(text).expect("a kernel").remove(0);
        let symbols = [2, 0, 0, 0];
        let bind = |(&data, (_, buffer)): (&&[f64], (BufferId, &Buffer))| match data {
            [] => KBuffer::unwritten(buffer, &symbols),
            data => KBuffer::from_data(buffer, &symbols, data),
        };
        let mut params: Vec<KBuffer> = data.iter().zip(kernel.params()).map(bind).collect();
        let stats =
            run(&kernel, &symbols, &mut params, Options { max_steps: 10_000 }).map_err(|e| e.to_string())?;
        Ok((params.iter().map(KBuffer::data).collect(), stats))
    }

    /// The lanes of an expression. It may read `%b` (bf16 `1 2 3 4`), `%x` (f32 `1.5 -2 0.25 8`), `%i` (i32 `7 -3`),
    /// `%n` (the index 5) and `T` (2).
    fn eval(ty: &str, lanes: usize, expr: &str) -> Vec<f64> {
        let dtype = ty.split('x').next().expect("a dtype");
        let text = format!(
            "kernel @k : dot, schedule \"\" (T in 1..8) {{
              param %b : read bf16[4]
              param %x : read f32[4]
              param %i : read i32[2]
              param %y : write {dtype}[{lanes}]
              parallel %p in 0..1 {{
                let %n = %p + 5
                store %y[0] = {expr}
              }}
            }}"
        );
        let data: [&[f64]; 4] = [&[1.0, 2.0, 3.0, 4.0], &[1.5, -2.0, 0.25, 8.0], &[7.0, -3.0], &[]];
        let (params, _) = run_text(&text, &data).unwrap_or_else(|e| panic!("{expr}: {e}"));
        params[3].clone()
    }

    #[test]
    fn expressions_by_hand() {
        let inf = f64::INFINITY;
        #[rustfmt::skip] // a table: one expression a line
        let table: &[(&str, &str, &[f64])] = &[
            ("i32",    "cast(42, i32)",                                        &[42.0]),
            ("i32",    "cast(T, i32)",                                         &[2.0]),
            ("i32",    "cast(%n, i32)",                                        &[5.0]),
            ("f32",    "cast(%n, f32)",                                        &[5.0]),
            ("i32",    "cast((%n - 12) / 4, i32)",                             &[-2.0]), // -7 / 4, towards minus infinity
            ("i32",    "cast(%n * 3 % 4, i32)",                                &[3.0]),
            ("i32",    "cast(min(%n, 3) + max(%n, 3), i32)",                   &[8.0]),
            ("f32x2",  "f32x2(0.1)",                                           &[0.1f32 as f64, 0.1f32 as f64]),
            ("bf16",   "bf16(1.00390625)",                                     &[1.0]), // A tie goes to even.
            ("i32x2",  "i32x2(-3)",                                            &[-3.0, -3.0]),
            ("f32x4",  "load %x[0] : f32x4",                                   &[1.5, -2.0, 0.25, 8.0]),
            ("i32x2",  "load %i[0] : i32x2",                                   &[7.0, -3.0]),
            ("f32x2",  "load %x[0] : f32x2 + load %x[2] : f32x2",              &[1.75, 6.0]),
            ("f32x2",  "load %x[0] : f32x2 - load %x[2] : f32x2",              &[1.25, -10.0]),
            ("f32x2",  "load %x[0] : f32x2 * load %x[2] : f32x2",              &[0.375, -16.0]),
            ("f32x2",  "load %x[0] : f32x2 / load %x[2] : f32x2",              &[6.0, -0.25]),
            ("f32",    "f32(1.0) / f32(0.0)",                                  &[inf]),
            ("f32",    "f32(16777216.0) + f32(1.0)",                           &[16777216.0]), // Rounded to even in f32.
            ("f32x2",  "min(load %x[0] : f32x2, load %x[2] : f32x2)",          &[0.25, -2.0]),
            ("f32x2",  "max(load %x[0] : f32x2, load %x[2] : f32x2)",          &[1.5, 8.0]),
            ("f32",    "max(f32(nan), f32(2.0))",                              &[2.0]),
            ("f32",    "min(f32(nan), f32(2.0))",                              &[2.0]),
            ("i32x2",  "load %i[0] : i32x2 * i32x2(2) - i32x2(1)",             &[13.0, -7.0]),
            ("i32",    "i32(2147483647) + i32(1)",                             &[-2147483648.0]),
            ("i32x2",  "max(load %i[0] : i32x2, i32x2(0))",                    &[7.0, 0.0]),
            // (1 + u)^2 - 1 - 2u = u^2 for u = 2^-12, which only one rounding keeps.
            ("f32",    "fma(f32(1.000244140625), f32(1.000244140625), f32(-1.00048828125))", &[2f64.powi(-24)]),
            ("f32",    "f32(1.000244140625) * f32(1.000244140625) - f32(1.00048828125)",     &[0.0]),
            ("f32x4",  "neg(load %x[0] : f32x4)",                              &[-1.5, 2.0, -0.25, -8.0]),
            ("f32x4",  "abs(load %x[0] : f32x4)",                              &[1.5, 2.0, 0.25, 8.0]),
            ("f32",    "exp(f32(1.0))",                                        &[f64::from(std::f32::consts::E)]),
            ("f32",    "exp(f32(-inf))",                                       &[0.0]),
            ("f32",    "rsqrt(f32(0.25)) + sqrt(f32(9.0)) + recip(f32(4.0))",  &[5.25]),
            ("f32",    "log(f32(1.0)) + sin(f32(0.0)) + cos(f32(0.0)) + tanh(f32(0.0))", &[1.0]),
            ("f32",    "select(lt(%n, 5), f32(1.0), f32(2.0))",                &[2.0]),
            ("f32",    "select(le(%n, 5), f32(1.0), f32(2.0))",                &[1.0]),
            ("i32",    "cast(select(ne(%n, T), %n, 9), i32)",                  &[5.0]),
            ("f32x4",  "select(gt(load %x[0] : f32x4, f32x4(1.0)), f32x4(1.0), f32x4(-1.0))", &[1.0, -1.0, -1.0, 1.0]),
            ("i32x2",  "select(eq(load %i[0] : i32x2, i32x2(7)), i32x2(1), iota(2))", &[1.0, 1.0]),
            ("bool",   "ge(load %i[1] : i32, i32(-3))",                        &[1.0]),
            ("bool",   "lt(f32(nan), f32(1.0))",                               &[0.0]),
            ("bool",   "ne(f32(nan), f32(nan))",                               &[1.0]),
            ("bf16x4", "splat(load %b[1] : bf16x2, 2)",                        &[2.0, 3.0, 2.0, 3.0]),
            ("f32x3",  "lanes(load %x[0] : f32x4, 2, 3)",                      &[0.25, 8.0, 0.0]),
            ("i32x3",  "iota(3)",                                              &[0.0, 1.0, 2.0]),
            ("bf16x2", "cast(lanes(load %x[0] : f32x4, 2, 2) + f32x2(0.0009), bf16)", &[0.25, 8.0]),
            ("f16",    "cast(f32(65520.0), f16)",                              &[inf]),
            ("i32x2",  "cast(lanes(load %x[0] : f32x4, 0, 2) * f32x2(1.5), i32)", &[2.0, -3.0]), // 2.25 and -3
            ("i32",    "cast(f32(-2.9), i32)",                                 &[-2.0]),
            ("i32",    "cast(f32(1e10), i32)",                                 &[2147483647.0]),
            ("f32",    "cast(i32(16777217), f32)",                             &[16777216.0]),
            ("f32",    "load %x[index(load %i[1] : i32) + 6] : f32",           &[8.0]),
            ("f32",    "reduce.sum(load %x[0] : f32x4)",                       &[7.75]),
            ("f32",    "reduce.max(load %x[0] : f32x4)",                       &[8.0]),
            ("i32",    "reduce.max(load %i[0] : i32x2) + reduce.sum(iota(4))", &[13.0]),
            ("f32x2",  "dot.bf16(f32x2(0.5), load %b[0] : bf16x4, bf16x4(2.0))", &[6.5, 14.5]),
        ];
        for (ty, expr, expected) in table {
            assert_eq!(eval(ty, expected.len(), expr), *expected, "{expr}");
        }
    }

    #[test]
    fn sums_have_a_stated_order() {
        // By halves: (2^24 + -2^24) + (1 + 1) = 2. From left to right it would be 1: 2^24 + 1 is 2^24 in f32.
        let lanes = [("16777216.0", 0), ("1.0", 1), ("-16777216.0", 2), ("1.0", 3)];
        let vector = lanes
            .map(|(x, i)| format!("select(eq(iota(4), i32x4({i})), f32x4({x}), f32x4(0.0))"))
            .join(" + ");
        assert_eq!(eval("f32", 1, &format!("reduce.sum({vector})")), [2.0]);
        // `fma(even, fma(odd, acc))`: the odd 1 falls to the sum 2^24, and the even -2^24 leaves 0; the other order leaves 1.
        let pair = "cast(select(eq(iota(2), i32x2(0)), f32x2(-16777216.0), f32x2(1.0)), bf16)";
        assert_eq!(eval("f32", 1, &format!("dot.bf16(f32(16777216.0), {pair}, bf16x2(1.0))")), [0.0]);
    }

    #[test]
    fn statements_by_hand() {
        let text = "kernel @k : dot, schedule \"\" (T in 1..8) {
          param %x : read f32[T, 4] strides [6, 1]
          param %c : update f32[3]
          param %y : write f32[T, 4]
          local %s : f32[4]
          store %s[0] = f32x4(10.0)
          parallel %t in 0..T {
            reg %acc : f32[2] = f32(0.0)
            for %k in 0..4 step 2 {
              unroll %j in 0..2 {
                set %acc[%j] = %acc[%j] + load %x[%t, %k + %j] : f32
              }
            }
            prefetch %x[%t + 100, 0]
            if eq(%t, 0) {
              store %y[%t, 0] = splat(%acc[0], 2)
            } else {
              store %y[%t, 0] = splat(%acc[1], 2)
            }
            store %y[%t, 2] = load %s[2] : f32x2
            store %c[%t] = load %c[%t] : f32 * f32(2.0)
          }
          barrier
          parallel %q in 0..1 {
            store %c[2] = load %y[T - 1, 0] : f32
          }
        }";
        let x: Vec<f64> = (1..=8).map(f64::from).collect();
        let (params, stats) = run_text(text, &[&x, &[1.0, 2.0, 3.0], &[]]).expect("no fault");
        assert_eq!(params[2], [4.0, 4.0, 10.0, 10.0, 14.0, 14.0, 10.0, 10.0]); // 1 + 3; 6 + 8
        assert_eq!(params[1], [2.0, 4.0, 14.0]);
        assert_eq!(stats.load_bytes, [32, 8, 4, 16]);
        assert_eq!(stats.store_bytes, [0, 12, 32, 16]);
        assert_eq!(stats.flops, 8 + 2); // sums, products
    }

    #[test]
    fn operations_are_counted() {
        let flops = |expr: &str| {
            let text = format!(
                "kernel @k : dot, schedule \"\" (T in 1..8) {{
                  param %y : write f32[1]
                  parallel %p in 0..1 {{ store %y[0] = lanes({expr}, 0, 1) }}
                }}"
            );
            run_text(&text, &[&[]]).expect("no fault").1.flops
        };
        assert_eq!(flops("f32x16(1.0) * f32x16(1.0)"), 16);
        assert_eq!(flops("fma(f32x16(1.0), f32x16(1.0), f32x16(1.0))"), 32);
        assert_eq!(flops("dot.bf16(f32x16(1.0), bf16x32(1.0), bf16x32(1.0))"), 64);
        assert_eq!(flops("exp(f32x2(1.0))"), 24);
        assert_eq!(flops("reduce.max(f32x16(1.0))"), 15);
    }

    #[test]
    fn buffers_with_gaps() {
        let buffer = Buffer {
            name: "x".to_string(),
            space: Space::Global(Access::Read),
            dtype: DType::BF16,
            shape: vec![2.into(), 3.into(), 2.into()],
            strides: vec![2, 5, 1],
        };
        let data: Vec<f64> = (0..12).map(f64::from).collect();
        let mut filled = KBuffer::from_data(&buffer, &[0; MAX_SYMBOLS], &data);
        assert_eq!(filled.data(), data);
        assert_eq!(filled.elems.len(), 14);
        assert_eq!(filled.elems[4], None); // between rows
        assert_eq!(filled.elems[11], Some(5.0)); // [0, 2, 1]
        assert_eq!(filled.index_of(11), [0, 2, 1]);
        assert_eq!(filled.index_of(8), [1, 1, 1]);
        filled.set(&[1, 0, 0], Some(1.0 + 1.0 / 256.0));
        assert_eq!(filled.elems()[6], Some(1.0));
        filled.set(&[1, 0, 0], None);
        assert!(filled.data()[6].is_nan());
    }

    #[test]
    fn unwritten_slots_of_a_cache_are_not_read() {
        let text = "kernel @k : dot, schedule \"\" {
          param %c : update f32[2]
          parallel %p in 0..2 { store %c[%p] = load %c[%p] : f32 + f32(1.0) }
        }";
        let kernel = parse(text).expect("a kernel").remove(0);
        let mut cache = KBuffer::unwritten(&kernel.buffers[0], &[0; MAX_SYMBOLS]);
        cache.set(&[0], Some(1.0));
        let fault = run(&kernel, &[0; MAX_SYMBOLS], &mut [cache], Options::default()).expect_err("a fault");
        assert_eq!(fault.kind, FaultKind::Unwritten { buffer: "c".to_string(), index: vec![1] });
        assert_eq!(fault.loops, [("p".to_string(), 1)]);
    }

    #[test]
    fn what_is_bound_must_fit() {
        let text = "kernel @k : dot, schedule \"\" (T in 1..8) { param %x : read f32[T] }";
        let kernel = parse(text).expect("a kernel").remove(0);
        let symbols = |t| [t, 0, 0, 0];
        let fault = |t, params: &mut [KBuffer]| {
            run(&kernel, &symbols(t), params, Options::default()).expect_err("a fault").kind
        };
        let mut bound = [KBuffer::unwritten(&kernel.buffers[0], &symbols(2))];
        assert_eq!(run(&kernel, &symbols(2), &mut bound, Options::default()).map(|s| s.flops), Ok(0));
        assert_eq!(fault(3, &mut bound), FaultKind::Binding("x".to_string()));
        assert_eq!(fault(2, &mut []), FaultKind::Count { found: 0, params: 1 });
        let kind = FaultKind::Symbol { name: "T".to_string(), value: 9, min: 1, max: 8 };
        assert_eq!(fault(9, &mut bound), kind);
        let mut broken = kernel.clone();
        broken.name = "a b".to_string();
        let fault = run(&broken, &symbols(2), &mut bound, Options::default()).expect_err("a fault");
        assert!(matches!(fault.kind, FaultKind::Invalid(_)), "{fault}");
    }
}
