//! Checks that a kernel means something, and that code generation can do it.
//!
//! 1. **Names** of buffers, values and registers are names ([`super::parse::is_name`]) and unique in the kernel;
//!    symbols are words, unique, at most [`MAX_SYMBOLS`], with a range that is not empty. Values and register files
//!    are declared once each, numbered in the order of the text: so the text says all.
//! 2. **Buffers**: no block format and no f64; extents never negative for the symbols' ranges,
//!    and constant in locals; one stride an axis,
//!    positive, the last 1, and no two indices on one element.
//! 3. **Scope**: a `let` or `reg` is seen until its block ends, a loop variable in the loop's body.
//! 4. **Types**: arithmetic on two values of one type, which is index, f32 (no `%`) or i32 (no `/`, `%`); divisors of
//!    indices are positive constants; `fma` and functions on f32; `reduce` on a power of two of f32 or i32;
//!    relations on two indices (a flag), two f32 or two i32 (`bool` lanes); `select` of two values of one type by a
//!    flag, or of vectors by as many `bool` lanes; `cast` among f32, bf16, f16 and i32, and from an index to i32 or
//!    f32; `index` of an i32 scalar; `dot.bf16` of f32 `xN` and twice bf16 `x2N`; `join` of two vectors of one dtype. Vectors have 1 to [`MAX_LANES`]
//!    lanes; `lanes` begins inside its operand; an integer literal is one that its dtype holds.
//! 5. **Constants**: an index is constant if it is made of integers, variables of `unroll` and `let`s of such.
//!    Register indices are constant and inside the file, in every copy of an unrolled body and under every `if`.
//!    An index of memory that is constant is inside the largest extent, lanes counted, unless it stands under an `if`.
//! 6. **Memory**: one index an axis; stored dtypes are the buffer's; no vector is longer than the last axis; no store
//!    to a `read` param, no global store outside of `parallel`.
//! 7. **Control**: `parallel` and `barrier` stand in the outermost block; a register declared outside of a `parallel`
//!    is not set inside (what it held afterwards would depend on the number of workers); steps and unroll counts are
//!    positive, and an innermost body is copied at most [`MAX_COPIES`] times.
//! 8. **Threads** are one, or whole warps up to [`MAX_THREADS`]. `thread`, `exp2`, `shared` memory (of constant extents, at most
//!    [`MAX_SHARED_BYTES`] in all), `sync`, `shuffle`, `matrix`, `mma`, `copy`, `commit` and `wait` are for many; `local` memory
//!    is for one. Behind a `barrier` of many no register is seen that was declared before it, and no value that was read from
//!    memory or registers. `shuffle` takes f32 or i32 and a mask of 1 to 31; `matrix` 1, 2 or 4 matrices of a shared or swizzled
//!    buffer with elements of two bytes; `mma` f32x4, bf16x8 and bf16x4, or f16; `copy` 16 bytes of a param to shared or
//!    swizzled memory of its dtype.
//! 9. **Warpgroups**: mbarriers, maps and the statements of [`super::warpgroup`] are for whole warpgroups; what is
//!    constant in them is in range. There `parallel` may stand in an `if` of the outermost block, and a worker of many threads
//!    may count in an index register over the iterations that it does.
//! 10. **Size**: [`MAX_NODES`], [`MAX_NESTING`], [`MAX_BLOCKS`], [`MAX_REGISTERS`], [`MAX_LOCAL_BYTES`].
//!
//! Cost: as much as unrolling, for each copy is checked with its constants.

mod expr;
mod warpgroup;

use super::parse::{is_name, is_word};
use super::print;
use super::{Access, Buffer, BufferId, Expr, Kernel, RegId, Space, Stmt, Type, VarId, WARP};
use crate::dim::{Dim, MAX_SYMBOLS};
use crate::dtype::DType;
use std::collections::HashSet;

/// Nodes of one expression.
pub const MAX_NODES: usize = 1000;
/// Operands and parentheses inside each other.
pub const MAX_NESTING: usize = 200;
/// Blocks inside each other.
pub const MAX_BLOCKS: usize = 64;
/// Lanes of a vector.
pub const MAX_LANES: u16 = 1024;
/// Copies of an unrolled body, all `unroll`s around it counted.
pub const MAX_COPIES: i64 = 4096;
/// Registers of one file.
pub const MAX_REGISTERS: usize = 4096;

/// Threads of a worker.
pub const MAX_THREADS: u16 = 1024;
/// Bytes of all shared memory of a worker: what a CTA of sm_90 may have.
pub const MAX_SHARED_BYTES: i64 = 227 << 10;

/// Bytes of one local: it lies on a worker's stack.
pub const MAX_LOCAL_BYTES: i64 = 1 << 20;

/// Where a kernel breaks which rule.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("kernel @{kernel}: `{at}`: {rule}")]
pub struct VerifyError {
    /// The kernel's name.
    pub kernel: String,
    /// First line of the statement or declaration.
    pub at: String,
    /// What is wrong.
    pub rule: Rule,
}

/// A broken rule.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Rule {
    /// A name that the parser would not read.
    #[error("{0:?} is no name")]
    Name(String),
    /// Two things of one name.
    #[error("`{0}` is declared twice")]
    Twice(String),
    /// More symbols than a kernel may have.
    #[error("a kernel has at most {MAX_SYMBOLS} symbols")]
    Symbols,
    /// A symbol that can have no value.
    #[error("the range of `{0}` is empty")]
    EmptyRange(String),
    /// Values or register files in another order than in the text, declared twice or never.
    #[error("values and registers are not declared once each, in the order of their numbers")]
    Numbering,
    /// An id beyond the kernel's tables.
    #[error("a buffer or symbol that the kernel does not have")]
    Dangling,
    /// A dtype that no single element has, or that kernels do not compute in.
    #[error("a kernel cannot hold elements of {0}")]
    BufferDType(DType),
    /// An extent that may be negative, or is beyond all memory.
    #[error("the extent `{0}` may be negative or is too large")]
    Extent(String),
    /// Not one stride an axis.
    #[error("{strides} strides for {axes} axes")]
    StrideCount {
        /// Strides found.
        strides: usize,
        /// Axes of the shape.
        axes: usize,
    },
    /// A stride below 1, or a last one that is not 1.
    #[error("strides are positive, and the last is 1")]
    Stride,
    /// Two indices that are one element.
    #[error("axis {axis} overlaps: its stride is {stride}, what lies inside spans {span} elements")]
    Overlap {
        /// The axis.
        axis: usize,
        /// Its stride.
        stride: i64,
        /// Elements from the first to the last of the axes with smaller strides.
        span: i64,
    },
    /// A local that no stack holds.
    #[error("{0} bytes; a local has at most {MAX_LOCAL_BYTES}")]
    LocalBytes(i64),
    /// A local whose size is not known before it runs.
    #[error("the extents of local and shared memory are constant")]
    LocalExtent,
    /// No whole warps, or too many.
    #[error("{0} threads; a worker has one, or whole warps of at most {MAX_THREADS}")]
    Threads(u16),
    /// What one thread does not have.
    #[error("a worker of one thread has no {0}")]
    OneThread(&'static str),
    /// What no grid hands to the next.
    #[error("`%{0}` ends at the barrier: behind it is another grid; declare or load it there")]
    Ended(String),
    /// What threads of a GPU do not have.
    #[error("a worker of many threads has no {0}")]
    ManyThreads(&'static str),
    /// More shared memory than any machine has.
    #[error("{0} bytes of shared memory; a worker has at most {MAX_SHARED_BYTES}")]
    SharedBytes(i64),
    /// A lane that no exchange reaches.
    #[error("a shuffle by {0}; lanes are exchanged by 1 to 31")]
    Mask(u16),
    /// Not one, two or four.
    #[error("{0} matrices; 1, 2 or 4 are loaded at once")]
    Matrices(u16),
    /// Threads that are no whole warpgroups.
    #[error("{0} threads; warpgroups are of 128")]
    Warpgroups(u16),
    /// Swizzled memory of another form.
    #[error("`%{0}`: swizzled memory has three axes or more, rows of 128 bytes and no strides")]
    Swizzled(String),
    /// A box that no copy fetches.
    #[error("`%{name}`: {what}")]
    Map {
        /// The map.
        name: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A number that cannot be.
    #[error("{found} {what}; there may be {least} to {most}")]
    Range {
        /// Of what.
        what: &'static str,
        /// The number.
        found: i64,
        /// The least that can be.
        least: i64,
        /// The most.
        most: i64,
    },
    /// A constant that is no multiple.
    #[error("{what} is {found}, which must be a multiple of {of}")]
    Multiple {
        /// What.
        what: &'static str,
        /// The number.
        found: i64,
        /// Of what it must be a multiple.
        of: i64,
    },
    /// A product of more columns than its right operand has.
    #[error("{columns} columns of sums; the right operand has {has}")]
    Columns {
        /// Of the sums.
        columns: i64,
        /// Of the operand.
        has: i64,
    },
    /// Not the space that an operation is for.
    #[error("`%{name}` is not in {expected} memory")]
    Space {
        /// The buffer.
        name: String,
        /// Where it would have to be.
        expected: &'static str,
    },
    /// A use outside of the block that declares.
    #[error("`%{0}` is not seen here")]
    Scope(String),
    /// A type that differs from the one wanted.
    #[error("{what} is {found}, expected {expected}")]
    Type {
        /// Which part.
        what: &'static str,
        /// Its type.
        found: Type,
        /// What fits.
        expected: Type,
    },
    /// A type that an operation does not take.
    #[error("{op} does not take {found}")]
    Operand {
        /// The operation as in text.
        op: String,
        /// The type it was given.
        found: Type,
    },
    /// No lanes, or too many.
    #[error("{0} lanes; a vector has 1 to {MAX_LANES}")]
    Lanes(u32),
    /// Lanes taken from beyond the end.
    #[error("lane {start} of {found}")]
    FirstLane {
        /// First lane taken.
        start: u16,
        /// Type it is taken from.
        found: Type,
    },
    /// A literal that its dtype does not hold.
    #[error("{ty} does not hold {value:?}")]
    Literal {
        /// The number.
        value: f64,
        /// The literal's type.
        ty: Type,
    },
    /// A divisor that is not a positive constant.
    #[error("the divisor `{0}` is not a positive constant")]
    Divisor(String),
    /// Not one index an axis.
    #[error("`%{name}` has {axes} axes, not {found}")]
    Rank {
        /// Of what.
        name: String,
        /// Its axes.
        axes: usize,
        /// Indices found.
        found: usize,
    },
    /// A constant index beyond an extent, or a vector longer than it.
    #[error("axis {axis} of `%{name}`: {index} to {last} is outside 0..{extent}")]
    Bounds {
        /// Of what.
        name: String,
        /// Which axis.
        axis: usize,
        /// First index.
        index: i64,
        /// Last index.
        last: i64,
        /// The extent, at its largest.
        extent: i64,
    },
    /// A register index that the variables of `unroll` do not determine.
    #[error("the register index `{0}` is not constant once unrolled")]
    NotConstant(String),
    /// A store to what is only read.
    #[error("`%{0}` is only read")]
    ReadOnly(String),
    /// A store that every worker would do.
    #[error("a store to global memory outside of `parallel`")]
    StoreOutside,
    /// A register of all iterations, set in one.
    #[error("`%{0}` is declared outside of this `parallel`")]
    SetOutside(String),
    /// A statement of the outermost block, deeper inside.
    #[error("stands in a kernel's outermost block only")]
    Outermost,
    /// A loop that would not end.
    #[error("a step is positive")]
    Step,
    /// An unroll of nothing, or of too much.
    #[error("{0} copies; an unrolled body has 1 to {MAX_COPIES}")]
    Copies(i64),
    /// A register file of no registers, or of too many.
    #[error("a register file has 1 to {MAX_REGISTERS} registers of indices or vectors")]
    Registers,
    /// An expression too large.
    #[error("an expression has at most {MAX_NODES} nodes, nested at most {MAX_NESTING} deep")]
    Nodes,
    /// Blocks nested too deeply.
    #[error("blocks nest at most {MAX_BLOCKS} deep")]
    Blocks,
}

type Checked<T> = Result<T, Box<Rule>>;

/// Checks all that the module's head lists.
///
/// # Errors
///
/// The first rule broken, in the order of the text.
pub fn verify(kernel: &Kernel) -> Result<(), Box<VerifyError>> {
    let fail =
        |at: String, rule: Box<Rule>| Box::new(VerifyError { kernel: kernel.name.clone(), at, rule: *rule });
    names(kernel).map_err(|rule| fail(format!("kernel @{}", kernel.name), rule))?;
    for buffer in &kernel.buffers {
        check_buffer(kernel, buffer).map_err(|rule| fail(print::declaration(kernel, buffer), rule))?;
    }
    numbering(kernel).map_err(|rule| fail(format!("kernel @{}", kernel.name), rule))?;
    threads(kernel).map_err(|rule| fail(format!("kernel @{}", kernel.name), rule))?;
    let mut ctx = Ctx {
        kernel,
        vars: vec![None; kernel.vars.len()],
        regs: vec![None; kernel.regs.len()],
        depth: 0,
        in_parallel: false,
        in_loop: false,
        under_if: false,
        copies: 1,
    };
    ctx.block(&kernel.body).map_err(|(at, rule)| fail(at, rule))
}

fn rule<T>(rule: Rule) -> Checked<T> {
    Err(Box::new(rule))
}

fn names(kernel: &Kernel) -> Checked<()> {
    let Kernel {
        name,
        symbols,
        buffers,
        mbarriers,
        maps,
        vars,
        regs,
        family: _,
        schedule: _,
        threads: _,
        body: _,
    } = kernel;
    if symbols.0.len() > MAX_SYMBOLS {
        return rule(Rule::Symbols);
    }
    let mut seen = HashSet::new();
    for symbol in &symbols.0 {
        if !is_word(&symbol.name) {
            return rule(Rule::Name(symbol.name.clone()));
        }
        if !seen.insert(&symbol.name) {
            return rule(Rule::Twice(symbol.name.clone()));
        }
        if symbol.min > symbol.max {
            return rule(Rule::EmptyRange(symbol.name.clone()));
        }
    }
    seen.clear();
    let values = vars.iter().map(|v| &v.name).chain(regs.iter().map(|r| &r.name));
    let shared = mbarriers.iter().map(|m| &m.name).chain(maps.iter().map(|m| &m.name));
    for value in buffers.iter().map(|b| &b.name).chain(shared).chain(values) {
        if !is_name(value) {
            return rule(Rule::Name(value.clone()));
        }
        if !seen.insert(value) {
            return rule(Rule::Twice(format!("%{value}")));
        }
    }
    if is_name(name) { Ok(()) } else { rule(Rule::Name(name.clone())) }
}

/// A worker's threads, and what they have.
fn threads(kernel: &Kernel) -> Checked<()> {
    let many = kernel.threads > 1;
    if kernel.threads == 0 || kernel.threads > MAX_THREADS || many && !kernel.threads.is_multiple_of(WARP) {
        return rule(Rule::Threads(kernel.threads));
    }
    for buffer in &kernel.buffers {
        match buffer.space {
            Space::Local if many => return rule(Rule::ManyThreads("local memory")),
            Space::Shared if !many => return rule(Rule::OneThread("shared memory")),
            Space::Global(_) | Space::Local | Space::Shared | Space::Swizzled => {}
        }
    }
    warpgroup::declarations(kernel)?;
    let bytes = kernel.shared_bytes();
    if bytes > MAX_SHARED_BYTES { rule(Rule::SharedBytes(bytes)) } else { Ok(()) }
}

fn check_buffer(kernel: &Kernel, buffer: &Buffer) -> Checked<()> {
    if matches!(buffer.dtype, DType::Block(_) | DType::F64) {
        return rule(Rule::BufferDType(buffer.dtype));
    }
    let Buffer { shape, strides, .. } = buffer;
    if strides.len() != shape.len() {
        return rule(Rule::StrideCount { strides: strides.len(), axes: shape.len() });
    }
    if strides.iter().any(|&s| s < 1) || strides.last().is_some_and(|&s| s != 1) {
        return rule(Rule::Stride);
    }
    let mut axes: Vec<(i64, usize, i64)> = Vec::new();
    for (axis, (&dim, &stride)) in shape.iter().zip(strides).enumerate() {
        let known = dim.coef.iter().skip(kernel.symbols.0.len()).all(|&c| c == 0);
        match extent_range(kernel, dim) {
            _ if !known => return rule(Rule::Dangling),
            _ if !matches!(buffer.space, Space::Global(_)) && dim.constant().is_none() => {
                return rule(Rule::LocalExtent);
            }
            Some((least, most)) if least >= 0 => axes.push((stride, axis, most)),
            _ => return rule(Rule::Extent(kernel.symbols.show(dim))),
        }
    }
    // From the innermost axis out: a step along an axis must pass all that lies inside it.
    axes.sort_by_key(|&(stride, axis, _)| (stride, std::cmp::Reverse(axis)));
    let mut span = 1i64;
    for (stride, axis, extent) in axes {
        if extent <= 1 {
            continue;
        }
        if stride < span {
            return rule(Rule::Overlap { axis, stride, span });
        }
        let last = (extent - 1).checked_mul(stride).and_then(|last| last.checked_add(span));
        let Some(last) = last.filter(|&last| last < 1 << 48) else {
            return rule(Rule::Extent(kernel.symbols.show(shape[axis])));
        };
        span = last;
    }
    let bytes = span * buffer.dtype.bytes(1) as i64;
    if buffer.space == Space::Local && bytes > MAX_LOCAL_BYTES {
        return rule(Rule::LocalBytes(bytes));
    }
    Ok(())
}

/// Smallest and largest value of an extent; `None` beyond 2^48.
fn extent_range(kernel: &Kernel, dim: Dim) -> Option<(i64, i64)> {
    let (mut least, mut most) = (i128::from(dim.base), i128::from(dim.base));
    for (symbol, coef) in kernel.symbols.0.iter().zip(dim.coef) {
        let ends = [symbol.min, symbol.max].map(|x| i128::from(x) * i128::from(coef));
        least += ends[0].min(ends[1]);
        most += ends[0].max(ends[1]);
    }
    let fits = |x: i128| i64::try_from(x).ok().filter(|x| x.abs() < 1 << 48);
    Some((fits(least)?, fits(most)?))
}

/// Every value and register file is declared by one statement, in the order of the text.
fn numbering(kernel: &Kernel) -> Checked<()> {
    fn walk(stmts: &[Stmt], vars: &mut Vec<u32>, regs: &mut Vec<u32>, depth: usize) -> Checked<()> {
        if depth > MAX_BLOCKS {
            return rule(Rule::Blocks);
        }
        for stmt in stmts {
            match stmt {
                Stmt::Let { var, .. }
                | Stmt::For { var, .. }
                | Stmt::Unroll { var, .. }
                | Stmt::Parallel { var, .. } => vars.push(var.0),
                Stmt::Reg { reg, .. } => regs.push(reg.0),
                _ => {} // Nothing else declares.
            }
            stmt.blocks().into_iter().try_for_each(|inside| walk(inside, vars, regs, depth + 1))?;
        }
        Ok(())
    }
    let (mut vars, mut regs) = (Vec::new(), Vec::new());
    walk(&kernel.body, &mut vars, &mut regs, 0)?;
    if vars.into_iter().eq(0..kernel.vars.len() as u32) && regs.into_iter().eq(0..kernel.regs.len() as u32) {
        Ok(())
    } else {
        rule(Rule::Numbering)
    }
}

/// What is known of a value that is seen.
#[derive(Clone, Copy)]
struct Seen {
    /// Its number, in this copy of the unrolled bodies around it.
    constant: Option<i64>,
    /// Is it the same in every grid? Only such values outlive a barrier of CTAs.
    fixed: bool,
    ended: bool,
}

/// What is known of a register file that is seen.
#[derive(Clone, Copy)]
struct SeenReg {
    in_parallel: bool,
    ended: bool,
}

struct Ctx<'a> {
    kernel: &'a Kernel,
    vars: Vec<Option<Seen>>,
    regs: Vec<Option<SeenReg>>,
    depth: usize,
    in_parallel: bool,
    in_loop: bool,
    under_if: bool,
    /// Copies of the block being checked.
    copies: i64,
}

impl Ctx<'_> {
    fn block(&mut self, stmts: &[Stmt]) -> Result<(), (String, Box<Rule>)> {
        for stmt in stmts {
            self.stmt_parts(stmt).map_err(|rule| (print::head(self.kernel, stmt), rule))?;
            match stmt {
                Stmt::For { var, body, .. } => self.body(*var, None, body)?,
                Stmt::Unroll { var, count, body } => {
                    self.copies *= count;
                    for copy in 0..*count {
                        self.body(*var, Some(copy), body)?;
                    }
                    self.copies /= count;
                }
                Stmt::Parallel { var, body, .. } => {
                    self.in_parallel = true;
                    self.body(*var, None, body)?;
                    self.in_parallel = false;
                }
                Stmt::If { then, otherwise, .. } => {
                    let outer = std::mem::replace(&mut self.under_if, true);
                    self.depth += 1;
                    self.block(then)?;
                    self.block(otherwise)?;
                    self.depth -= 1;
                    self.under_if = outer;
                }
                Stmt::Let { .. }
                | Stmt::Reg { .. }
                | Stmt::Set { .. }
                | Stmt::Store { .. }
                | Stmt::Prefetch { .. }
                | Stmt::Barrier
                | Stmt::Sync
                | Stmt::Copy { .. }
                | Stmt::Commit
                | Stmt::Wait(_)
                | Stmt::Warpgroup(_) => {}
            }
        }
        for stmt in stmts {
            match stmt {
                Stmt::Let { var, .. } => self.vars[var.0 as usize] = None,
                Stmt::Reg { reg, .. } => self.regs[reg.0 as usize] = None,
                _ => {} // Nothing else names what later statements see.
            }
        }
        Ok(())
    }

    /// The body of a loop, with its variable.
    fn body(&mut self, var: VarId, constant: Option<i64>, body: &[Stmt]) -> Result<(), (String, Box<Rule>)> {
        self.vars[var.0 as usize] = Some(Seen { constant, fixed: false, ended: false });
        let outer = std::mem::replace(&mut self.in_loop, true);
        self.depth += 1;
        self.block(body)?;
        self.depth -= 1;
        self.in_loop = outer;
        self.vars[var.0 as usize] = None;
        Ok(())
    }

    /// A statement without its bodies.
    fn stmt_parts(&mut self, stmt: &Stmt) -> Checked<()> {
        match stmt {
            Stmt::Let { var, value } => {
                let found = self.whole(value)?;
                same("the value", found, self.kernel[*var].ty)?;
                let (constant, fixed) = (self.constant(value), self.fixed(value));
                self.vars[var.0 as usize] = Some(Seen { constant, fixed, ended: false });
            }
            Stmt::Reg { reg, init } => {
                let file = &self.kernel[*reg];
                let vector = match file.ty {
                    Type::Index => true,
                    Type::Flag => false,
                    Type::Vector { .. } => check_type(file.ty).map(|()| true)?,
                };
                // Saturating: a product of u16s may be beyond usize.
                let size = file.dims.iter().fold(1usize, |n, &d| n.saturating_mul(d.into()));
                if !vector || size == 0 || size > MAX_REGISTERS {
                    return rule(Rule::Registers);
                }
                if let Some(init) = init {
                    same("the initial value", self.whole(init)?, file.ty)?;
                }
                self.regs[reg.0 as usize] = Some(SeenReg { in_parallel: self.in_parallel, ended: false });
            }
            Stmt::Set { reg, index, value } => {
                let seen = self.register(*reg, index)?;
                // A worker of many threads may count what it did.
                let counts = self.kernel.threads > 1 && self.kernel[*reg].ty == Type::Index;
                if self.in_parallel && !seen.in_parallel && !counts {
                    return rule(Rule::SetOutside(self.kernel[*reg].name.clone()));
                }
                same("the value", self.whole(value)?, self.kernel[*reg].ty)?;
            }
            Stmt::Store { buffer, index, value } => {
                let found = self.whole(value)?;
                let Type::Vector { lanes, .. } = found else { return operand("store", found) };
                let target = self.element(*buffer, index, lanes)?;
                same("the value", found, Type::Vector { dtype: target.dtype, lanes })?;
                match target.space {
                    Space::Global(Access::Read) => return rule(Rule::ReadOnly(target.name.clone())),
                    Space::Global(_) if !self.in_parallel => return rule(Rule::StoreOutside),
                    // A chunk of a row stays together.
                    Space::Swizzled if lanes as usize * target.dtype.bytes(1) > 16 => {
                        return operand("store to swizzled memory", found);
                    }
                    Space::Global(_) | Space::Local | Space::Shared | Space::Swizzled => {}
                }
            }
            Stmt::Prefetch { buffer, index } => {
                self.indices(*buffer, index)?;
            }
            Stmt::For { lo, hi, step, .. } => {
                same("the first value", self.whole(lo)?, Type::Index)?;
                same("the end", self.whole(hi)?, Type::Index)?;
                if *step < 1 {
                    return rule(Rule::Step);
                }
            }
            Stmt::Unroll { count, .. } => {
                // Checked one factor at a time, so the product stays small.
                if *count < 1 || *count > MAX_COPIES || self.copies * count > MAX_COPIES {
                    return rule(Rule::Copies(count.saturating_mul(self.copies)));
                }
            }
            Stmt::Parallel { count, .. } => {
                same("the count", self.whole(count)?, Type::Index)?;
                if self.kernel.threads == 1 || self.in_parallel || self.in_loop {
                    self.outermost()?;
                }
            }
            Stmt::If { cond, .. } => same("the condition", self.whole(cond)?, Type::Flag)?,
            Stmt::Barrier => {
                self.outermost()?;
                if self.kernel.threads > 1 {
                    self.vars.iter_mut().flatten().for_each(|seen| seen.ended = !seen.fixed);
                    self.regs.iter_mut().flatten().for_each(|seen| seen.ended = true);
                }
            }
            Stmt::Sync => self.many("`sync`")?,
            Stmt::Commit | Stmt::Wait(_) => self.many("`copy`")?,
            Stmt::Copy { to, at, from, index, lanes, count } => {
                self.many("`copy`")?;
                let target = self.element(*to, at, *lanes)?;
                in_shared(target)?;
                let dtype = target.dtype;
                // Where nothing is read, the index may be anywhere.
                let source = self.indices(*from, index)?;
                if !matches!(source.space, Space::Global(_)) {
                    return rule(Rule::Space { name: source.name.clone(), expected: "global" });
                }
                let ty = |dtype| Type::Vector { dtype, lanes: *lanes };
                same("the source", ty(source.dtype), ty(dtype))?;
                if dtype.bytes(usize::from(*lanes)) != 16 {
                    return operand("copy", ty(dtype));
                }
                same("the count", self.whole(count)?, Type::Index)?;
            }
            Stmt::Warpgroup(stmt) => self.warpgroup(stmt)?,
        }
        Ok(())
    }

    fn many(&self, what: &'static str) -> Checked<()> {
        if self.kernel.threads > 1 { Ok(()) } else { rule(Rule::OneThread(what)) }
    }

    fn outermost(&self) -> Checked<()> {
        if self.depth == 0 { Ok(()) } else { rule(Rule::Outermost) }
    }

    fn register(&self, reg: RegId, index: &[Expr]) -> Checked<SeenReg> {
        let Some(seen) = self.regs.get(reg.0 as usize) else { return rule(Rule::Dangling) };
        let file = &self.kernel[reg];
        let Some(seen) = seen else { return rule(Rule::Scope(file.name.clone())) };
        if seen.ended {
            return rule(Rule::Ended(file.name.clone()));
        }
        rank(&file.name, file.dims.len(), index.len())?;
        for (axis, (i, &extent)) in index.iter().zip(&file.dims).enumerate() {
            same("the index", self.whole(i)?, Type::Index)?;
            let Some(at) = self.constant(i) else {
                return rule(Rule::NotConstant(print::expr(self.kernel, i)));
            };
            bounds(&file.name, axis, at, 1, extent.into())?;
        }
        Ok(*seen)
    }

    fn indices(&self, buffer: BufferId, index: &[Expr]) -> Checked<&Buffer> {
        let Some(found) = self.kernel.buffers.get(buffer.0 as usize) else { return rule(Rule::Dangling) };
        rank(&found.name, found.shape.len(), index.len())?;
        for i in index {
            same("the index", self.whole(i)?, Type::Index)?;
        }
        Ok(found)
    }

    /// An access to `lanes` elements.
    fn element(&self, buffer: BufferId, index: &[Expr], lanes: u16) -> Checked<&Buffer> {
        check_lanes(u32::from(lanes))?;
        let found = self.indices(buffer, index)?;
        if index.is_empty() {
            bounds(&found.name, 0, 0, lanes, 1)?;
        }
        for (axis, (i, &dim)) in index.iter().zip(&found.shape).enumerate() {
            let (_, extent) = extent_range(self.kernel, dim).expect("the buffer was checked");
            let taken = if axis + 1 == index.len() { lanes } else { 1 };
            // What stands under an `if` may never run there; but the vector must fit somewhere.
            let at = self.constant(i).filter(|_| !self.under_if).unwrap_or(0);
            bounds(&found.name, axis, at, taken, extent)?;
        }
        Ok(found)
    }
}

fn in_shared(buffer: &Buffer) -> Checked<()> {
    match buffer.space {
        Space::Shared | Space::Swizzled => Ok(()),
        Space::Global(_) | Space::Local => {
            rule(Rule::Space { name: buffer.name.clone(), expected: "shared" })
        }
    }
}

fn same(what: &'static str, found: Type, expected: Type) -> Checked<()> {
    if found == expected { Ok(()) } else { rule(Rule::Type { what, found, expected }) }
}

fn operand<T>(op: &str, found: Type) -> Checked<T> {
    rule(Rule::Operand { op: op.to_string(), found })
}

fn rank(name: &str, axes: usize, found: usize) -> Checked<()> {
    if axes == found { Ok(()) } else { rule(Rule::Rank { name: name.to_string(), axes, found }) }
}

fn bounds(name: &str, axis: usize, index: i64, lanes: u16, extent: i64) -> Checked<()> {
    let last = index.saturating_add(i64::from(lanes) - 1);
    if 0 <= index && last < extent {
        return Ok(());
    }
    rule(Rule::Bounds { name: name.to_string(), axis, index, last, extent })
}

fn check_lanes(lanes: u32) -> Checked<()> {
    if 1 <= lanes && lanes <= u32::from(MAX_LANES) { Ok(()) } else { rule(Rule::Lanes(lanes)) }
}

/// A vector of some lanes, of a dtype that kernels hold.
fn check_type(ty: Type) -> Checked<()> {
    match ty {
        Type::Index | Type::Flag => Ok(()),
        Type::Vector { dtype: dtype @ (DType::Block(_) | DType::F64), .. } => rule(Rule::BufferDType(dtype)),
        Type::Vector { lanes, .. } => check_lanes(u32::from(lanes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dim::{Sym, Symbol};
    use crate::kernel::parse::parse;
    use crate::kernel::{RegFile, Var};

    // What no text can say; the rest is in `tests/kernel/verify/`.

    fn kernel() -> Kernel {
        let text = "kernel @k : dot, schedule \"\" (T in 1..8) {
          param %x : read f32[T]
          let %a = T + 1
          let %b = %a + 1
          reg %r : f32 = f32(0.0)
        }";
        parse(text).expect("a kernel").remove(0)
    }

    fn broken(change: impl FnOnce(&mut Kernel)) -> Rule {
        let mut kernel = kernel();
        change(&mut kernel);
        verify(&kernel).expect_err("a broken rule").rule
    }

    #[test]
    fn tables_and_text_agree() {
        assert_eq!(verify(&kernel()), Ok(()));
        assert_eq!(broken(|k| k.name = "a b".to_string()), Rule::Name("a b".to_string()));
        assert_eq!(broken(|k| k.vars[0].name = "a.".to_string()), Rule::Name("a.".to_string()));
        assert_eq!(broken(|k| k.symbols.0[0].name = "T.1".to_string()), Rule::Name("T.1".to_string()));
        assert_eq!(broken(|k| k.regs[0].name = "x".to_string()), Rule::Twice("%x".to_string()));
        let symbol = |name: String| Symbol { name, min: 0, max: 1 };
        assert_eq!(broken(|k| k.symbols.0.push(symbol("T".to_string()))), Rule::Twice("T".to_string()));
        assert_eq!(broken(|k| k.symbols.0.extend((0..4).map(|i| symbol(format!("N{i}"))))), Rule::Symbols);
        assert_eq!(broken(|k| k.vars.push(Var { name: "c".to_string(), ty: Type::Index })), Rule::Numbering);
        let file = RegFile { name: "q".to_string(), ty: Type::Index, dims: Vec::new() };
        assert_eq!(broken(|k| k.regs.push(file)), Rule::Numbering);
        assert_eq!(broken(|k| k.body.swap(0, 1)), Rule::Numbering);
        assert_eq!(broken(|k| k.buffers[0].shape[0].coef[1] = 1), Rule::Dangling);
    }

    #[test]
    fn ids_beyond_the_tables_are_refused() {
        let with = |value: Expr| broken(|k| k.body[1] = Stmt::Let { var: VarId(1), value });
        assert_eq!(with(Expr::Sym(Sym(1))), Rule::Dangling);
        assert_eq!(with(Expr::Var(VarId(9))), Rule::Dangling);
        assert_eq!(with(Expr::Reg { reg: RegId(9), index: Vec::new() }), Rule::Dangling);
        assert_eq!(with(Expr::Load { buffer: BufferId(9), index: Vec::new(), lanes: 1 }), Rule::Dangling);
        let literal = |ty| Expr::Const { value: 0.0, ty };
        assert_eq!(
            with(literal(Type::Index)),
            Rule::Operand { op: "a literal".to_string(), found: Type::Index }
        );
        let f64s = Type::Vector { dtype: DType::F64, lanes: 1 };
        assert_eq!(with(literal(f64s)), Rule::BufferDType(DType::F64));
        assert_eq!(
            broken(|k| k.body.push(Stmt::Set { reg: RegId(9), index: Vec::new(), value: Expr::Int(0) })),
            Rule::Dangling
        );
    }

    #[test]
    fn sizes_are_bounded() {
        let sum = |n| (0..n).fold(Expr::Sym(Sym(0)), |sum, _| sum + 1i64);
        let with = |value: Expr| broken(|k| k.body[1] = Stmt::Let { var: VarId(1), value });
        assert_eq!(with(sum(500)), Rule::Nodes);
        let deep = (0..200).fold(Expr::f32(0.0, 1), |x, _| x.unary(crate::op::Unary::Neg));
        assert_eq!(with(deep), Rule::Nodes);
        let nested = |n| {
            let body = |body| Stmt::If { cond: Expr::Int(0), then: body, otherwise: Vec::new() };
            (0..n).fold(Vec::new(), |inner, _| vec![body(inner)])
        };
        assert_eq!(broken(|k| k.body.extend(nested(65))), Rule::Blocks);
    }

    #[test]
    fn the_largest_accepted_comes_back_from_text() {
        let mut kernel = kernel();
        let sum = (0..499).fold(Expr::Sym(Sym(0)), |sum, _| sum + 1i64);
        kernel.body[1] = Stmt::Let { var: VarId(1), value: sum };
        let deep = (0..199).fold(Expr::f32(0.0, 1), |x, _| x.unary(crate::op::Unary::Neg));
        kernel.body[2] = Stmt::Reg { reg: RegId(0), init: Some(deep) };
        let cond = || Expr::Sym(Sym(0)).compare(crate::op::Compare::Lt, 1i64);
        let block = |inner| vec![Stmt::If { cond: cond(), then: inner, otherwise: Vec::new() }];
        kernel.body.extend((0..64).fold(Vec::new(), |inner, _| block(inner)));
        assert_eq!(verify(&kernel), Ok(()));
        assert_eq!(parse(&kernel.to_string()), Ok(vec![kernel]));
    }
}
