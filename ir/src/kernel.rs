//! Kernel IR: how one kernel computes a group. A structured SPMD language of loops, short vectors and memory.
//!
//! * **Values** are scalars and short vectors, named by `let`, written as expressions. What changes from one
//!   iteration to the next lives in register files ([`Stmt::Reg`]): arrays of vectors that only constants index,
//!   so that they never reach memory.
//! * **Memory** is a list of [`Buffer`]s with dtype, shape and strides; every access is checked against them by the
//!   verifier where it can, else by the interpreter (of threads: by the PTX emulator).
//! * **Control** is `for`, `if`, and `unroll`, whose variable is a constant in each copy of its body.
//! * **Parallelism**: the body is run by every worker. A `parallel` loop's iterations are split over them, in one
//!   contiguous piece each, on a GPU in turn; what follows it starts without waiting unless a `barrier` stands between.
//!   Statements outside of `parallel` may compute and declare, but not store to global memory.
//! * **Threads**: on a GPU a worker is a CTA of [`Kernel::threads`] threads. Each runs the body with values and registers of
//!   its own and its number, `thread`; they have `shared` memory, meet at `sync`, and in warps of 32 exchange values
//!   (`shuffle`), load matrices (`matrix`) and multiply them (`mma`). `copy` fetches memory in the background: `commit` ends a
//!   group of copies, `wait n` waits until all but the newest `n` groups of this thread have arrived, and a `sync` behind it
//!   lets the others see them. What must be done by all threads of a warp or CTA together may not stand where some of them
//!   do not come. What only warpgroups of later GPUs do is told in [`warpgroup`].
//! * **Phases**: a `barrier` of CTAs is the end of one grid and the begin of the next ([`Kernel::phases`]). No register and no
//!   shared memory outlives it, and of the values those that are the same in every grid: what is made of numbers, symbols and
//!   `thread`, not of memory or registers.
//!
//! ```text
//! kernel @l0.down : dot, schedule "mr 1, nr 4" (T in 1..1) {
//!   param %x : read bf16[T, 5632]
//!   param %y : write bf16[T, 2048]
//!   parallel %p in 0..32 {
//!     reg %acc : f32x16[4] = f32x16(0.0)
//!     for %k in 0..2816 {
//!       let %a = splat(load %x[0, 2 * %k] : bf16x2, 16)
//!       unroll %j in 0..4 {
//!         set %acc[%j] = dot.bf16(%acc[%j], %a, load %w[4 * %p + %j, 0, %k, 0] : bf16x32)
//!       }
//!     }
//!   }
//! }
//! ```

mod builder;
pub mod interp;
pub mod parse;
mod parts;
pub mod phases;
pub mod print;
pub mod reads;
pub mod verify;
pub mod warpgroup;

pub use builder::Builder;

use crate::dim::{Dim, Sym, Symbols};
use crate::dtype::DType;
use crate::graph::Family;
use crate::op::{Compare, Reduction, Unary};
use warpgroup::{MapId, MbarrierId, Mbarriers, TensorMap, Warpgroup};

/// Lanes of the vectors that families use: 64 bytes of f32. Targets with narrower registers use several, so the order
/// of a sum is the same on all.
pub const LANES: u16 = 16;

/// Threads of a warp.
pub const WARP: u16 = 32;

/// Index of a value (a `let` or a loop variable) in [`Kernel::vars`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VarId(pub u32);

/// Index of a register file in [`Kernel::regs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegId(pub u32);

/// Index of a buffer in [`Kernel::buffers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub u32);

/// One kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// Name in text, without `@`.
    pub name: String,
    /// The generator that made it.
    pub family: Family,
    /// Text of the schedule it was made with.
    pub schedule: String,
    /// Threads of a worker: 1 on a CPU; on a GPU, where a worker is a CTA, whole warps.
    pub threads: u16,
    /// Run-time scalars: `T` and what else the shapes name.
    pub symbols: Symbols,
    /// Parameters in calling order, then locals.
    pub buffers: Vec<Buffer>,
    /// Mbarriers in shared memory, behind the buffers there.
    pub mbarriers: Vec<Mbarriers>,
    /// Tensor maps: parameters too, behind the symbols.
    pub maps: Vec<TensorMap>,
    /// Names and types of values.
    pub vars: Vec<Var>,
    /// Names, types and extents of register files.
    pub regs: Vec<RegFile>,
    /// What every worker runs.
    pub body: Vec<Stmt>,
}

/// Where a buffer lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Bound by the launch, seen by all workers. Text: `param`.
    Global(Access),
    /// One copy a worker, undefined at first. Text: `local`.
    Local,
    /// One copy a worker, seen by all its threads, undefined at first. Text: `shared`.
    Shared,
    /// Shared memory in rows of 128 bytes whose chunks are swizzled, as [`warpgroup`] says. Text: `swizzled`.
    Swizzled,
}

/// What a kernel may do to a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Only loads.
    Read,
    /// Stores, and loads of what it stored. Everything must be written, except in a `ReadWrite`.
    Write,
    /// Updates in place: a cache.
    ReadWrite,
}

impl Access {
    /// Every access.
    pub const ALL: [Access; 3] = [Access::Read, Access::Write, Access::ReadWrite];

    /// Name in text.
    pub fn name(self) -> &'static str {
        match self {
            Access::Read => "read",
            Access::Write => "write",
            Access::ReadWrite => "update",
        }
    }
}

/// Memory that a kernel reads or writes.
#[derive(Clone, Debug, PartialEq)]
pub struct Buffer {
    /// Name in text, without `%`.
    pub name: String,
    /// Where it lies.
    pub space: Space,
    /// Element type.
    pub dtype: DType,
    /// Extents; an index must lie inside on every axis.
    pub shape: Vec<Dim>,
    /// Elements from one index to the next on each axis; the last is 1.
    pub strides: Vec<i64>,
}

impl Buffer {
    /// Elements from the first to the last, both counted, of a buffer of constant shape.
    pub fn span(&self) -> i64 {
        let last = |(dim, stride): (&Dim, &i64)| (dim.constant().unwrap_or(1) - 1).max(0) * stride;
        1 + self.shape.iter().zip(&self.strides).map(last).sum::<i64>()
    }
}

/// Row-major strides; extents behind the first must be constant.
///
/// # Panics
///
/// On a symbolic extent behind axis 0.
pub fn row_major(shape: &[Dim]) -> Vec<i64> {
    row_major_checked(shape).expect("constant extents behind axis 0")
}

/// Row-major strides; `None` where an extent behind the first has a symbol, or the product is too large.
pub fn row_major_checked(shape: &[Dim]) -> Option<Vec<i64>> {
    let mut strides = vec![1i64; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].checked_mul(shape[axis].constant()?)?;
    }
    Some(strides)
}

/// Type of a value in a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Type {
    /// A 64-bit signed number that counts: sizes, positions.
    Index,
    /// A truth value from comparing indices.
    Flag,
    /// One or more elements of a dtype. Arithmetic is on f32 (and comparisons on i32); the others are stored, loaded,
    /// cast, splat and fed to machine ops.
    Vector {
        /// Element type.
        dtype: DType,
        /// 1 for a scalar.
        lanes: u16,
    },
}

impl Type {
    /// f32 vector of so many lanes.
    pub const fn f32(lanes: u16) -> Type {
        Type::Vector { dtype: DType::F32, lanes }
    }

    /// Lanes of a vector; 1 for an index.
    pub fn lanes(self) -> u16 {
        match self {
            Type::Index | Type::Flag => 1,
            Type::Vector { lanes, .. } => lanes,
        }
    }
}

impl std::fmt::Display for Type {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Type::Index => f.write_str("index"),
            Type::Flag => f.write_str("flag"),
            Type::Vector { dtype, lanes: 1 } => write!(f, "{dtype}"),
            Type::Vector { dtype, lanes } => write!(f, "{dtype}x{lanes}"),
        }
    }
}

/// A named value.
#[derive(Clone, Debug, PartialEq)]
pub struct Var {
    /// Name in text, without `%`; unique in the kernel.
    pub name: String,
    /// Its type.
    pub ty: Type,
}

/// An array of registers.
#[derive(Clone, Debug, PartialEq)]
pub struct RegFile {
    /// Name in text, without `%`; unique in the kernel.
    pub name: String,
    /// Type of each.
    pub ty: Type,
    /// Extents; empty for a single register.
    pub dims: Vec<u16>,
}

impl RegFile {
    /// Number of registers.
    pub fn len(&self) -> usize {
        self.dims.iter().map(|&d| d as usize).product()
    }

    /// Has it no registers?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Arithmetic on two values of one type. Text: infix, and `min(a, b)`, `max(a, b)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names say it
pub enum Arith {
    Add,
    Sub,
    Mul,
    /// On indices: towards minus infinity; the verifier wants a positive constant divisor.
    Div,
    /// On indices only, not negative; the verifier wants a positive constant divisor.
    Rem,
    /// On floats the second operand where either is NaN (x86's rule, and the cheapest).
    Min,
    /// As `Min`.
    Max,
}

impl Arith {
    /// Every operation.
    pub const ALL: [Arith; 7] =
        [Arith::Add, Arith::Sub, Arith::Mul, Arith::Div, Arith::Rem, Arith::Min, Arith::Max];

    /// Sign or name in text.
    pub fn name(self) -> &'static str {
        match self {
            Arith::Add => "+",
            Arith::Sub => "-",
            Arith::Mul => "*",
            Arith::Div => "/",
            Arith::Rem => "%",
            Arith::Min => "min",
            Arith::Max => "max",
        }
    }

    /// Of two indices; `None` where it overflows or divides by zero.
    pub fn of_indices(self, a: i64, b: i64) -> Option<i64> {
        match self {
            Arith::Add => a.checked_add(b),
            Arith::Sub => a.checked_sub(b),
            Arith::Mul => a.checked_mul(b),
            Arith::Div => a.checked_div_euclid(b),
            Arith::Rem => a.checked_rem_euclid(b),
            Arith::Min => Some(a.min(b)),
            Arith::Max => Some(a.max(b)),
        }
    }
}

/// A pure computation.
#[derive(Clone, Debug, PartialEq)]
pub enum Expr {
    /// An index constant.
    Int(i64),
    /// A run-time scalar of the launch; an index.
    Sym(Sym),
    /// The number of the thread in its worker; an index. Text: `thread`.
    Thread,
    /// An index that is the same in the whole warp, as its first lane has it: `uniform(thread / 128)`. (PTX `shfl.sync.idx`.)
    Uniform(Box<Expr>),
    /// A named value.
    Var(VarId),
    /// A literal in every lane: `f32x16(0.0)`.
    Const {
        /// The number; rounded to the type.
        value: f64,
        /// Type of the literal.
        ty: Type,
    },
    /// A register: `%acc[%i, 2]`. Indices are constants once unrolled.
    Reg {
        /// The register file.
        reg: RegId,
        /// One index an axis.
        index: Vec<Expr>,
    },
    /// Consecutive elements from memory: `load %x[%t, %k] : bf16x2`.
    Load {
        /// From where.
        buffer: BufferId,
        /// One index an axis; lanes run along the last.
        index: Vec<Expr>,
        /// Lanes taken.
        lanes: u16,
    },
    /// Arithmetic, lane by lane.
    Arith(Arith, Box<Expr>, Box<Expr>),
    /// `fma(a, b, c) = a * b + c`, rounded once.
    Fma(Box<Expr>, Box<Expr>, Box<Expr>),
    /// A function of each f32 lane: `exp(%x)`.
    Unary(Unary, Box<Expr>),
    /// A relation: a flag for indices, `bool` lanes for vectors: `lt(%a, %b)`.
    Compare(Compare, Box<Expr>, Box<Expr>),
    /// `select(c, a, b)`, lane by lane.
    Select(Box<Expr>, Box<Expr>, Box<Expr>),
    /// The lanes of a value, repeated `times` times: `splat(%a, 16)`.
    Splat {
        /// What is repeated.
        value: Box<Expr>,
        /// How often.
        times: u16,
    },
    /// Lanes `start..start + lanes`; those beyond the end are zero: `lanes(%v, 0, 8)`.
    Lanes {
        /// Whence they come.
        value: Box<Expr>,
        /// First lane.
        start: u16,
        /// How many.
        lanes: u16,
    },
    /// The lanes of one value, then those of another of its dtype: `join(%a, %b)`.
    Join(Box<Expr>, Box<Expr>),
    /// `0, 1, 2, ...` in i32: `iota(16)`.
    Iota {
        /// How many.
        lanes: u16,
    },
    /// Another dtype, rounded to nearest even: `cast(%v, bf16)`. From an index: to i32 or f32.
    Cast {
        /// What is converted.
        value: Box<Expr>,
        /// To what.
        dtype: DType,
    },
    /// An i32 scalar as an index: `index(load %pos[%t] : i32)`.
    Index(Box<Expr>),
    /// Folds the lanes by halves (lane `i` with lane `i + n/2`, and so on): a scalar: `reduce.sum(%v)`.
    Reduce(Reduction, Box<Expr>),
    /// `dot.bf16(acc, a, b)`: lane `i` of `acc` plus the products of lanes `2i` and `2i + 1`, in f32. The rounding
    /// between the two, and of subnormals, is the machine's (`vdpbf16ps`; elsewhere two FMAs).
    DotBf16(Box<Expr>, Box<Expr>, Box<Expr>),
    /// Two to the power of each f32 lane, to a relative error of 2^-22; subnormal results are zero: `exp2(%x)`. (PTX
    /// `ex2.approx.ftz.f32`.)
    Exp2(Box<Expr>),
    /// The value that the lane `l ^ mask` of the warp has, in each lane `l`, of f32 or i32: `shuffle(%v, 16)`. (PTX
    /// `shfl.sync.bfly`.)
    Shuffle {
        /// What is exchanged.
        value: Box<Expr>,
        /// 1 to 31.
        mask: u16,
    },
    /// Matrices of 8 rows of 16 bytes from shared memory: `matrix %a[%r, %c] : bf16x8`. Lane `8 j + r` gives the place of row
    /// `r` of matrix `j`; of each matrix lane `l` gets the two elements `2 (l % 4)` of row `l / 4`. `matrix.t` gives it those
    /// of the transposed matrix. (PTX `ldmatrix.m8n8`; the buffer has elements of two bytes.)
    Matrix {
        /// From where.
        buffer: BufferId,
        /// One index an axis.
        index: Vec<Expr>,
        /// How many: 1, 2 or 4; the value has twice as many lanes.
        matrices: u16,
        /// Transposed.
        trans: bool,
    },
    /// `mma(acc, a, b)`: a warp's 16 x 8 sums, plus the product of 16 x 16 by 16 x 8, f32 of bf16 or f16. With `g = lane / 4`
    /// and `t = lane % 4`, element `i` of `acc` is row `g + 8 (i / 2)`, column `2 t + i % 2`; of `a` (8) row `g + 8 (i / 2 %
    /// 2)`, k `2 t + i % 2 + 8 (i / 4)`; of `b` (4) k `2 t + i % 2 + 8 (i / 2)`, column `g`. (PTX `mma.sync.m16n8k16`.)
    Mma(Box<Expr>, Box<Expr>, Box<Expr>),
}

/// One step of a kernel.
#[derive(Clone, Debug, PartialEq)]
pub enum Stmt {
    /// Names a value, seen until the end of the block.
    Let {
        /// The name.
        var: VarId,
        /// The value.
        value: Expr,
    },
    /// Declares registers, seen until the end of the block; each starts as `init`, or undefined.
    Reg {
        /// The file.
        reg: RegId,
        /// First content of each.
        init: Option<Expr>,
    },
    /// Writes a register.
    Set {
        /// The file.
        reg: RegId,
        /// Which register; constants once unrolled.
        index: Vec<Expr>,
        /// New content.
        value: Expr,
    },
    /// Writes consecutive elements along the last axis.
    Store {
        /// To where.
        buffer: BufferId,
        /// One index an axis.
        index: Vec<Expr>,
        /// What; its dtype is the buffer's.
        value: Expr,
    },
    /// Asks for a cache line early, into a core's larger cache. It may lie outside the buffer.
    Prefetch {
        /// From where.
        buffer: BufferId,
        /// One index an axis.
        index: Vec<Expr>,
    },
    /// `for %i in lo..hi step s`.
    For {
        /// The index.
        var: VarId,
        /// First value.
        lo: Expr,
        /// End, not reached.
        hi: Expr,
        /// Positive.
        step: i64,
        /// Body.
        body: Vec<Stmt>,
    },
    /// A loop copied out: its variable is a constant in each copy.
    Unroll {
        /// The index.
        var: VarId,
        /// Number of copies; the index counts from 0.
        count: i64,
        /// Body.
        body: Vec<Stmt>,
    },
    /// A loop whose iterations are split over the workers. Only in a kernel's outermost block.
    Parallel {
        /// The index.
        var: VarId,
        /// End, not reached; the index counts from 0.
        count: Expr,
        /// Body.
        body: Vec<Stmt>,
    },
    /// Runs one of two blocks.
    If {
        /// A flag.
        cond: Expr,
        /// If it holds.
        then: Vec<Stmt>,
        /// If not.
        otherwise: Vec<Stmt>,
    },
    /// Waits for all workers; what they stored is then seen by all. Only in a kernel's outermost block.
    Barrier,
    /// Waits for all threads of the worker; what they stored is then seen by all.
    Sync,
    /// Begins to copy 16 bytes to shared memory: `copy %s[%i, 0] = %x[%t, %k] : bf16x8, %n`. Only the first `count` elements
    /// (at least 0, at most all) are read; the others become zero. (PTX `cp.async`.)
    Copy {
        /// To where, in shared memory.
        to: BufferId,
        /// One index an axis.
        at: Vec<Expr>,
        /// From where, in global memory.
        from: BufferId,
        /// One index an axis.
        index: Vec<Expr>,
        /// Elements written.
        lanes: u16,
        /// Elements read.
        count: Expr,
    },
    /// Ends a group of copies, which may be empty.
    Commit,
    /// Waits until all groups of this thread but the newest so many have arrived.
    Wait(u16),
    /// What only warpgroups do.
    Warpgroup(Warpgroup),
}

impl std::ops::Index<BufferId> for Kernel {
    type Output = Buffer;
    fn index(&self, id: BufferId) -> &Buffer {
        &self.buffers[id.0 as usize]
    }
}

impl std::ops::Index<RegId> for Kernel {
    type Output = RegFile;
    fn index(&self, id: RegId) -> &RegFile {
        &self.regs[id.0 as usize]
    }
}

impl std::ops::Index<VarId> for Kernel {
    type Output = Var;
    fn index(&self, id: VarId) -> &Var {
        &self.vars[id.0 as usize]
    }
}

impl std::ops::Index<MbarrierId> for Kernel {
    type Output = Mbarriers;
    fn index(&self, id: MbarrierId) -> &Mbarriers {
        &self.mbarriers[id.0 as usize]
    }
}

impl std::ops::Index<MapId> for Kernel {
    type Output = TensorMap;
    fn index(&self, id: MapId) -> &TensorMap {
        &self.maps[id.0 as usize]
    }
}

impl Kernel {
    /// The parameters, in calling order.
    pub fn params(&self) -> impl Iterator<Item = (BufferId, &Buffer)> {
        let ids = (0..).map(BufferId).zip(&self.buffers);
        ids.filter(|(_, buffer)| matches!(buffer.space, Space::Global(_)))
    }

    /// Where each shared buffer that the body names begins in a worker's shared memory: bytes, in the order of the buffers,
    /// multiples of 128, of swizzled ones of 1,024.
    pub fn shared_offsets(&self) -> impl Iterator<Item = (BufferId, i64)> {
        let named = reads::buffers(self);
        let shared = (0..).map(BufferId).zip(&self.buffers).zip(named);
        let shared =
            shared.filter(|((_, b), named)| *named && matches!(b.space, Space::Shared | Space::Swizzled));
        shared.map(|(one, _)| one).scan(0i64, |end, (id, buffer)| {
            let align = if buffer.space == Space::Swizzled { 1024 } else { 128 };
            let begin = (*end + align - 1) / align * align;
            *end = self.shared_end(id, begin);
            Some((id, begin))
        })
    }

    /// Where a shared buffer ends that begins at `begin`.
    fn shared_end(&self, id: BufferId, begin: i64) -> i64 {
        begin + (self[id].span() * self[id].dtype.bytes(1) as i64 + 127) / 128 * 128
    }

    /// Where mbarriers begin in a worker's shared memory: 8 bytes each, behind the buffers.
    pub fn mbarrier_offset(&self, id: MbarrierId) -> i64 {
        let buffers = self.shared_offsets().last().map_or(0, |(id, begin)| self.shared_end(id, begin));
        let before = self.mbarriers.iter().take(id.0 as usize);
        buffers + before.map(|m| 8 * i64::from(m.count)).sum::<i64>()
    }

    /// Bytes of shared memory that a worker needs.
    pub fn shared_bytes(&self) -> i64 {
        self.mbarrier_offset(MbarrierId(self.mbarriers.len() as u32))
    }

    /// Is something in it that only warpgroups do?
    pub fn needs_warpgroups(&self) -> bool {
        let any = self.has(|stmt| matches!(stmt, Stmt::Warpgroup(_)));
        !self.mbarriers.is_empty() || !self.maps.is_empty() || any
    }

    /// Does it say where it waits for the grids before it?
    pub fn awaits_grids(&self) -> bool {
        self.has(|stmt| matches!(stmt, Stmt::Warpgroup(Warpgroup::AwaitGrids)))
    }

    fn has(&self, is: impl Fn(&Stmt) -> bool) -> bool {
        let mut found = false;
        parts::each_stmt(&self.body, &mut |stmt| found |= is(stmt));
        found
    }

    /// The turns of all `parallel` loops of this kernel: workers beyond that have nothing to do. Of one whose turns cannot be
    /// told 1 is counted.
    pub fn turns(&self, symbols: &[i64; crate::dim::MAX_SYMBOLS]) -> i64 {
        self.turns_of(&self.body, symbols).max(1)
    }

    fn turns_of(&self, block: &[Stmt], symbols: &[i64; crate::dim::MAX_SYMBOLS]) -> i64 {
        let counts = block.iter().map(|stmt| match stmt {
            Stmt::Parallel { count, .. } => self.value_of(count, symbols).unwrap_or(1),
            // Groups of threads with work of their own.
            Stmt::If { then, otherwise, .. } => {
                self.turns_of(then, symbols).max(self.turns_of(otherwise, symbols))
            }
            _ => 0,
        });
        counts.fold(0, i64::saturating_add)
    }

    /// What an index made of numbers and symbols is.
    fn value_of(&self, expr: &Expr, symbols: &[i64; crate::dim::MAX_SYMBOLS]) -> Option<i64> {
        match expr {
            Expr::Int(x) => Some(*x),
            Expr::Sym(sym) => symbols.get(sym.0 as usize).copied(),
            Expr::Arith(op, a, b) => op.of_indices(self.value_of(a, symbols)?, self.value_of(b, symbols)?),
            _ => None,
        }
    }

    /// The type of an expression of this kernel, as its parts say; the verifier checks that they fit.
    pub fn type_of(&self, expr: &Expr) -> Type {
        match expr {
            Expr::Int(_) | Expr::Sym(_) | Expr::Thread | Expr::Uniform(_) | Expr::Index(_) => Type::Index,
            Expr::Var(var) => self[*var].ty,
            Expr::Const { ty, .. } => *ty,
            Expr::Reg { reg, .. } => self[*reg].ty,
            Expr::Load { buffer, lanes, .. } => Type::Vector { dtype: self[*buffer].dtype, lanes: *lanes },
            Expr::Arith(_, a, _)
            | Expr::Fma(a, _, _)
            | Expr::Unary(_, a)
            | Expr::DotBf16(a, _, _)
            | Expr::Exp2(a)
            | Expr::Shuffle { value: a, .. }
            | Expr::Mma(a, _, _) => self.type_of(a),
            Expr::Join(a, b) => match (self.type_of(a), self.type_of(b)) {
                (Type::Vector { dtype, lanes }, Type::Vector { lanes: more, .. }) => {
                    Type::Vector { dtype, lanes: lanes.saturating_add(more) }
                }
                (other, _) => other,
            },
            Expr::Matrix { buffer, matrices, .. } => {
                Type::Vector { dtype: self[*buffer].dtype, lanes: matrices.saturating_mul(2) }
            }
            Expr::Compare(_, a, _) => match self.type_of(a) {
                Type::Vector { lanes, .. } => Type::Vector { dtype: DType::Bool, lanes },
                Type::Index | Type::Flag => Type::Flag,
            },
            Expr::Select(_, a, _) => self.type_of(a),
            Expr::Splat { value, times } => match self.type_of(value) {
                Type::Vector { dtype, lanes } => Type::Vector { dtype, lanes: lanes.saturating_mul(*times) },
                other => other,
            },
            Expr::Lanes { value, lanes, .. } => match self.type_of(value) {
                Type::Vector { dtype, .. } => Type::Vector { dtype, lanes: *lanes },
                other => other,
            },
            Expr::Iota { lanes } => Type::Vector { dtype: DType::I32, lanes: *lanes },
            Expr::Cast { value, dtype } => Type::Vector { dtype: *dtype, lanes: self.type_of(value).lanes() },
            Expr::Reduce(_, value) => match self.type_of(value) {
                Type::Vector { dtype, .. } => Type::Vector { dtype, lanes: 1 },
                other => other,
            },
        }
    }
}

// Expressions are written with the usual signs. (Constant folding here keeps the text of kernels readable.)

impl Expr {
    /// An f32 literal in each of `lanes` lanes.
    pub fn f32(value: f64, lanes: u16) -> Expr {
        Expr::Const { value, ty: Type::f32(lanes) }
    }

    fn arith(op: Arith, a: Expr, b: Expr) -> Expr {
        match (op, &a, &b) {
            (Arith::Add, Expr::Int(x), Expr::Int(y)) => Expr::Int(x + y),
            (Arith::Sub, Expr::Int(x), Expr::Int(y)) => Expr::Int(x - y),
            (Arith::Mul, Expr::Int(x), Expr::Int(y)) => Expr::Int(x * y),
            (Arith::Div, Expr::Int(x), Expr::Int(y)) => Expr::Int(x.div_euclid(*y)),
            (Arith::Rem, Expr::Int(x), Expr::Int(y)) => Expr::Int(x.rem_euclid(*y)),
            (Arith::Min, Expr::Int(x), Expr::Int(y)) => Expr::Int(*x.min(y)),
            (Arith::Max, Expr::Int(x), Expr::Int(y)) => Expr::Int(*x.max(y)),
            (Arith::Add, Expr::Int(0), _) => b,
            (Arith::Add | Arith::Sub, _, Expr::Int(0)) => a,
            (Arith::Mul, Expr::Int(1), _) => b,
            (Arith::Mul | Arith::Div, _, Expr::Int(1)) => a,
            (Arith::Mul, Expr::Int(0), _) | (Arith::Mul, _, Expr::Int(0)) => Expr::Int(0),
            (Arith::Rem, _, Expr::Int(1)) => Expr::Int(0),
            _ => Expr::Arith(op, Box::new(a), Box::new(b)),
        }
    }

    /// The smaller.
    pub fn min(self, other: impl Into<Expr>) -> Expr {
        Expr::arith(Arith::Min, self, other.into())
    }

    /// The larger.
    pub fn max(self, other: impl Into<Expr>) -> Expr {
        Expr::arith(Arith::Max, self, other.into())
    }

    /// `self * b + c`, rounded once.
    pub fn fma(self, b: Expr, c: Expr) -> Expr {
        Expr::Fma(Box::new(self), Box::new(b), Box::new(c))
    }

    /// A function of each lane.
    pub fn unary(self, op: Unary) -> Expr {
        Expr::Unary(op, Box::new(self))
    }

    /// A relation.
    pub fn compare(self, op: Compare, other: impl Into<Expr>) -> Expr {
        Expr::Compare(op, Box::new(self), Box::new(other.into()))
    }

    /// `a` where `self` holds, else `b`.
    pub fn select(self, a: Expr, b: Expr) -> Expr {
        Expr::Select(Box::new(self), Box::new(a), Box::new(b))
    }

    /// The lanes repeated; nothing for once.
    pub fn splat(self, times: u16) -> Expr {
        if times == 1 { self } else { Expr::Splat { value: Box::new(self), times } }
    }

    /// Some of the lanes, zero beyond the end.
    pub fn lanes(self, start: u16, lanes: u16) -> Expr {
        Expr::Lanes { value: Box::new(self), start, lanes }
    }

    /// Converted to another dtype.
    pub fn cast(self, dtype: DType) -> Expr {
        Expr::Cast { value: Box::new(self), dtype }
    }

    /// The same in the whole warp. See [`Expr::Uniform`].
    pub fn uniform(self) -> Expr {
        Expr::Uniform(Box::new(self))
    }

    /// An i32 scalar as an index.
    pub fn index(self) -> Expr {
        Expr::Index(Box::new(self))
    }

    /// The lanes folded to one.
    pub fn reduce(self, kind: Reduction) -> Expr {
        Expr::Reduce(kind, Box::new(self))
    }

    /// The lanes of `self`, then those of `b`.
    pub fn join(self, b: Expr) -> Expr {
        Expr::Join(Box::new(self), Box::new(b))
    }

    /// Two to the power of each lane. See [`Expr::Exp2`].
    pub fn exp2(self) -> Expr {
        Expr::Exp2(Box::new(self))
    }

    /// The value of the lane `mask` away. See [`Expr::Shuffle`].
    pub fn shuffle(self, mask: u16) -> Expr {
        Expr::Shuffle { value: Box::new(self), mask }
    }

    /// `self` plus a product of matrices. See [`Expr::Mma`].
    pub fn mma(self, a: Expr, b: Expr) -> Expr {
        Expr::Mma(Box::new(self), Box::new(a), Box::new(b))
    }

    /// `self` plus products of pairs. See [`Expr::DotBf16`].
    pub fn dot_bf16(self, a: Expr, b: Expr) -> Expr {
        Expr::DotBf16(Box::new(self), Box::new(a), Box::new(b))
    }
}

impl From<i64> for Expr {
    fn from(x: i64) -> Expr {
        Expr::Int(x)
    }
}

impl From<usize> for Expr {
    fn from(x: usize) -> Expr {
        Expr::Int(x as i64)
    }
}

impl From<Dim> for Expr {
    fn from(dim: Dim) -> Expr {
        let terms = dim.coef.iter().enumerate().filter(|(_, c)| **c != 0);
        let sum = terms.fold(Expr::Int(0), |sum, (i, &c)| {
            let term = Expr::Sym(Sym(i as u8)) * i64::from(c);
            if sum == Expr::Int(0) { term } else { sum + term }
        });
        sum + dim.base
    }
}

macro_rules! signs {
    ($($name:ident $method:ident),*) => {$(
        impl<E: Into<Expr>> std::ops::$name<E> for Expr {
            type Output = Expr;
            fn $method(self, other: E) -> Expr {
                Expr::arith(Arith::$name, self, other.into())
            }
        }
    )*};
}
signs!(Add add, Sub sub, Mul mul, Div div, Rem rem);
