//! The instructions, as far as kernels use them: a closed set, with typed operands.

/// A register of up to 32 bits, or of 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reg {
    /// Is it one of the 64-bit bank?
    pub wide: bool,
    /// Index in its bank.
    pub index: u16,
}

/// A predicate register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pred(pub u16);

/// A type of an instruction.
#[allow(missing_docs, reason = "the names are those of the PTX ISA")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Type {
    B8,
    B16,
    B32,
    B64,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    F32,
    F64,
}

impl Type {
    /// All, with their names.
    #[rustfmt::skip] // a table
    pub const ALL: [(&'static str, Type); 18] = [
        ("b8", Type::B8), ("b16", Type::B16), ("b32", Type::B32), ("b64", Type::B64),
        ("u8", Type::U8), ("u16", Type::U16), ("u32", Type::U32), ("u64", Type::U64),
        ("s8", Type::S8), ("s16", Type::S16), ("s32", Type::S32), ("s64", Type::S64),
        ("f16", Type::F16), ("f16x2", Type::F16x2), ("bf16", Type::Bf16), ("bf16x2", Type::Bf16x2),
        ("f32", Type::F32), ("f64", Type::F64),
    ];

    /// Bits of a value.
    pub fn bits(self) -> u32 {
        match self {
            Type::B8 | Type::U8 | Type::S8 => 8,
            Type::B16 | Type::U16 | Type::S16 | Type::F16 | Type::Bf16 => 16,
            Type::B32 | Type::U32 | Type::S32 | Type::F32 | Type::F16x2 | Type::Bf16x2 => 32,
            Type::B64 | Type::U64 | Type::S64 | Type::F64 => 64,
        }
    }

    /// Does it live in the 64-bit bank?
    pub fn wide(self) -> bool {
        self.bits() == 64
    }

    /// Is it a signed integer?
    pub fn signed(self) -> bool {
        matches!(self, Type::S8 | Type::S16 | Type::S32 | Type::S64)
    }

    /// Is it a floating-point type?
    pub fn float(self) -> bool {
        matches!(self, Type::F16 | Type::F16x2 | Type::Bf16 | Type::Bf16x2 | Type::F32 | Type::F64)
    }
}

/// What a special register says (PTX ISA, "Special Registers").
#[allow(missing_docs, reason = "the names are those of the PTX ISA; the number is x, y, z")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    LaneId,
    WarpId,
    NwarpId,
    LanemaskEq,
    LanemaskLt,
    LanemaskLe,
    LanemaskGt,
    LanemaskGe,
    DynamicSharedBytes,
    ClusterCtaRank,
    ClusterNctaRank,
    ClusterCtaid(u8),
    ClusterNctaid(u8),
    ClusterId(u8),
    NclusterId(u8),
}

/// Where an address lies.
#[allow(missing_docs, reason = "the names are those of the PTX ISA")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    Generic,
    Global,
    Shared,
    /// Shared memory of all CTAs of the cluster, of the own one among them.
    SharedCluster,
    Param,
    Const,
}

/// `[base+offset]`. The base has 32 or 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The register.
    pub base: Reg,
    /// Bytes added.
    pub offset: i64,
}

/// One operand in, one out.
#[allow(missing_docs, reason = "the names are those of the PTX ISA")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnaryOp {
    Neg,
    Abs,
    Not,
    Cnot,
    Popc,
    Clz,
    Brev,
    Ex2,
    Lg2,
    Rcp,
    Rsqrt,
    Sqrt,
    Sin,
    Cos,
    Tanh,
}

/// Two operands in, one out.
#[allow(missing_docs, reason = "the names are those of the PTX ISA")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BinaryOp {
    Add,
    Sub,
    MulLo,
    MulHi,
    Div,
    Rem,
    Min,
    Max,
    And,
    Or,
    Xor,
    Shl,
    Shr,
}

/// Three operands in, one out.
#[allow(missing_docs, reason = "the names are those of the PTX ISA")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TernaryOp {
    Fma,
    MadLo,
    MadHi,
    Bfe,
    Prmt,
    /// `shf.l`, `shf.r` with `.wrap` or `.clamp`.
    FunnelLeft {
        clamp: bool,
    },
    FunnelRight {
        clamp: bool,
    },
    /// The truth table.
    Lop3(u8),
    /// Signed a, signed b.
    Dp4a(bool, bool),
}

/// Modifiers of floating-point arithmetic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FloatMode {
    /// Subnormal f32 operands and results count as zeros of their sign.
    pub ftz: bool,
    /// The result is clamped to `[0, 1]`, NaN to 0.
    pub sat: bool,
    /// `min`, `max`: NaN if an operand is.
    pub nan: bool,
    /// An approximate form (`.approx`).
    pub approx: bool,
    /// `fma`: a negative result is 0.
    pub relu: bool,
}

/// A comparison; `unordered` ones are true of NaN.
#[allow(missing_docs, reason = "the names are those of the PTX ISA")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
    Num,
    Nan,
}

/// `and`, `or`, `xor` of predicates.
#[allow(missing_docs, reason = "the names are those of the PTX ISA")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logic {
    And,
    Or,
    Xor,
}

/// How a conversion rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest, ties to even.
    Nearest,
    /// Towards zero.
    Zero,
    /// Down.
    Down,
    /// Up.
    Up,
}

/// The order that a memory access keeps (PTX ISA, "Memory Consistency Model").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// A plain access: others may not touch the bytes unordered.
    Weak,
    /// `ld.global.nc`: nobody writes the bytes while the grid runs.
    NonCoherent,
    /// May meet other such accesses, orders nothing.
    Relaxed,
    /// As `Relaxed`, for everybody, and it is done as often as it is written.
    Volatile,
    /// What the writer released is seen after it.
    Acquire,
    /// What went before is seen by who acquires it.
    Release,
    /// Both.
    AcquireRelease,
}

impl Order {
    /// Does it take over what was released?
    pub fn acquires(self) -> bool {
        matches!(self, Order::Acquire | Order::AcquireRelease)
    }

    /// Does it publish what went before?
    pub fn releases(self) -> bool {
        matches!(self, Order::Release | Order::AcquireRelease)
    }

    /// May it meet another such access without a race?
    pub fn strong(self) -> bool {
        !matches!(self, Order::Weak | Order::NonCoherent)
    }
}

/// How far an order reaches.
#[allow(missing_docs, reason = "the names are those of the PTX ISA")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    Cta,
    Cluster,
    Gpu,
    Sys,
}

/// What an atomic does with the value in memory.
#[allow(missing_docs, reason = "the names are those of the PTX ISA")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomicOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Inc,
    Dec,
}

/// A form of `bar`, `barrier`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarrierOp {
    /// Waits.
    Sync,
    /// Does not wait.
    Arrive,
    /// Waits; the predicate is the reduction of all threads' predicates.
    Reduce(Pred, ReduceOp, Pred),
}

/// The reduction of `bar.red`.
#[allow(missing_docs, reason = "the names are those of the PTX ISA")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    And,
    Or,
}

/// Where `shfl` reads.
#[allow(missing_docs, reason = "the names are those of the PTX ISA")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShuffleMode {
    Up,
    Down,
    Bfly,
    Idx,
}

/// What `vote` asks.
#[allow(missing_docs, reason = "the names are those of the PTX ISA")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VoteMode {
    All(Pred),
    Any(Pred),
    Uni(Pred),
    Ballot(Reg),
}

/// Element types of a matrix product, A and B. Accumulators are f32 for floats (f16 where said), s32 for integers.
#[allow(missing_docs, reason = "the names are those of the PTX ISA")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatrixType {
    Bf16,
    F16,
    S8,
    U8,
}

/// A of a `wgmma`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MatrixA {
    /// Four registers, as A of `mma.sync` m16n8k16.
    Registers(Box<[Reg]>),
    /// In shared memory: the descriptor, and whether rows are innermost there.
    Shared(Reg, bool),
}

/// `wgmma.mma_async`: D of 64 x `n` is A B, or A B + D.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wgmma {
    /// Columns of B and D.
    pub n: u32,
    /// Elements of A and B.
    pub types: (MatrixType, MatrixType),
    /// Is a sum of integers clamped?
    pub satfinite: bool,
    /// Accumulators, `n / 2` registers.
    pub d: Box<[Reg]>,
    /// The left matrix.
    pub a: MatrixA,
    /// Descriptor of the right matrix.
    pub b: Reg,
    /// Are columns innermost in B?
    pub trans_b: bool,
    /// Is it added to D?
    pub scale_d: Pred,
    /// Are A and B negated?
    pub negate: (bool, bool),
}

/// `[map, {x, y, z}]`: a box of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Generic address of the tensor map.
    pub map: Reg,
    /// Where the box begins, innermost first.
    pub coordinates: Box<[Reg]>,
}

/// `mbarrier` (PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier").
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MbarrierOp {
    /// Makes one that so many arrivals complete.
    Init(Reg),
    /// Its bytes may be used otherwise.
    Inval,
    /// Expects so many bytes more.
    ExpectTx(Reg),
    /// So many bytes less.
    CompleteTx(Reg),
    /// Arrives.
    Arrive {
        /// Where the phase's state goes.
        state: Option<Reg>,
        /// Bytes to expect before.
        expect: Option<Reg>,
        /// How many arrivals; 1 if it is not said.
        count: Option<Reg>,
        /// It may not complete the phase.
        no_complete: bool,
    },
    /// Is the phase over that has this parity (32 bits) or this state (64 bits)? It may `block` until it is.
    Wait {
        /// The answer.
        d: Pred,
        /// Parity or state.
        phase: Reg,
        /// `try_wait`.
        block: bool,
    },
    /// `cp.async.mbarrier.arrive`: arrives when the lane's copies before it are there. `noinc`: it is one of the arrivals that
    /// are counted already.
    CopyArrive {
        /// See above.
        noinc: bool,
    },
}

/// What an instruction does.
#[allow(
    missing_docs,
    reason = "fields are the operands in the order of the PTX ISA: d result, a b c sources"
)]
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    Mov {
        d: Reg,
        a: Reg,
    },
    MovPred {
        d: Pred,
        a: Pred,
    },
    Pack {
        d: Reg,
        parts: Box<[Reg]>,
    },
    Unpack {
        parts: Box<[Option<Reg>]>,
        a: Reg,
    },
    Unary {
        op: UnaryOp,
        ty: Type,
        mode: FloatMode,
        d: Reg,
        a: Reg,
    },
    Binary {
        op: BinaryOp,
        ty: Type,
        mode: FloatMode,
        d: Reg,
        a: Reg,
        b: Reg,
    },
    Ternary {
        op: TernaryOp,
        ty: Type,
        mode: FloatMode,
        d: Reg,
        a: Reg,
        b: Reg,
        c: Reg,
    },
    /// `mul.wide`, `mad.wide`: operands of `ty`, the result of twice its width.
    Wide {
        ty: Type,
        d: Reg,
        a: Reg,
        b: Reg,
        c: Option<Reg>,
    },
    NotPred {
        d: Pred,
        a: Pred,
    },
    LogicPred {
        op: Logic,
        d: Pred,
        a: Pred,
        b: Pred,
    },
    Setp {
        cmp: Comparison,
        ty: Type,
        ftz: bool,
        d: Pred,
        other: Option<Pred>,
        combine: Option<(Logic, Pred, bool)>,
        a: Reg,
        b: Reg,
    },
    Selp {
        d: Reg,
        a: Reg,
        b: Reg,
        p: Pred,
    },
    Cvt {
        to: Type,
        from: Type,
        rounding: Option<Rounding>,
        integral: bool,
        mode: FloatMode,
        d: Reg,
        a: Reg,
    },
    /// Two f32 to a pair: `a` is the upper half.
    CvtPair {
        to: Type,
        rounding: Rounding,
        relu: bool,
        d: Reg,
        a: Reg,
        b: Reg,
    },
    /// Address of a space to a generic one, or back (`to`).
    Cvta {
        space: Space,
        to: bool,
        d: Reg,
        a: Reg,
    },
    Load {
        space: Space,
        ty: Type,
        order: Order,
        scope: Scope,
        d: Box<[Reg]>,
        address: Address,
    },
    Store {
        space: Space,
        ty: Type,
        order: Order,
        scope: Scope,
        address: Address,
        a: Box<[Reg]>,
    },
    /// `atom` (with `d`) and `red`.
    Atomic {
        op: AtomicOp,
        ty: Type,
        space: Space,
        order: Order,
        scope: Scope,
        d: Option<Reg>,
        address: Address,
        b: Box<[Reg]>,
        c: Option<Reg>,
    },
    Branch {
        target: u32,
    },
    BranchIndexed {
        index: Reg,
        targets: Box<[u32]>,
    },
    Exit,
    Trap,
    /// `nanosleep`, `prefetch`: no effect on results. `griddepcontrol.launch_dependents`: what a grid that begins early may not
    /// do is the same however early it begins.
    Hint,
    /// `griddepcontrol.wait`
    WaitForGrids,
    Fence {
        scope: Scope,
        /// `fence.sc`: all such fences are in one order.
        sequential: bool,
    },
    Barrier {
        op: BarrierOp,
        id: Reg,
        threads: Option<Reg>,
    },
    WarpSync {
        mask: Reg,
    },
    Shuffle {
        mode: ShuffleMode,
        d: Reg,
        p: Option<Pred>,
        a: Reg,
        b: Reg,
        c: Reg,
        mask: Reg,
    },
    Vote {
        mode: VoteMode,
        a: Pred,
        negated: bool,
        mask: Reg,
    },
    Match {
        all: Option<Option<Pred>>,
        wide: bool,
        d: Reg,
        a: Reg,
        mask: Reg,
    },
    Redux {
        op: AtomicOp,
        ty: Type,
        d: Reg,
        a: Reg,
        mask: Reg,
    },
    ActiveMask {
        d: Reg,
    },
    /// `mma.sync` m16n8kK; D and C f32 (f16 pairs if `narrow`) or s32.
    Mma {
        k: u32,
        a_ty: MatrixType,
        b_ty: MatrixType,
        narrow: bool,
        satfinite: bool,
        d: Box<[Reg]>,
        a: Box<[Reg]>,
        b: Box<[Reg]>,
        c: Box<[Reg]>,
    },
    LoadMatrix {
        trans: bool,
        d: Box<[Reg]>,
        address: Address,
    },
    StoreMatrix {
        trans: bool,
        address: Address,
        a: Box<[Reg]>,
    },
    /// `cp.async`: `bytes` from global to shared memory, of which `size` are read and the rest is zero.
    Copy {
        bytes: u32,
        d: Address,
        a: Address,
        size: Option<Reg>,
    },
    CopyCommit,
    /// All but the newest so many groups; `None`: all, committed or not.
    CopyWait(Option<u32>),
    /// `fence.proxy.async`: writes before it are seen by asynchronous operations behind it, those to shared or global memory
    /// or, if nothing is said, to both.
    FenceProxyAsync(Option<Space>),
    /// `fence.mbarrier_init`: the same of `mbarrier.init` alone, and for the other CTAs of the cluster.
    FenceMbarrierInit,
    Mbarrier {
        op: MbarrierOp,
        space: Space,
        address: Address,
    },
    /// `cp.async.bulk.tensor` to shared memory.
    TileLoad {
        d: Address,
        tile: Tile,
        mbarrier: Address,
        multicast: Option<Reg>,
    },
    /// `cp.async.bulk.tensor` or `cp.reduce.async.bulk.tensor` from shared memory.
    TileStore {
        tile: Tile,
        a: Address,
        reduce: Option<AtomicOp>,
    },
    /// `cp.async.bulk` from global to shared memory.
    BulkLoad {
        d: Address,
        a: Address,
        bytes: Reg,
        mbarrier: Address,
        multicast: Option<Reg>,
    },
    /// `cp.async.bulk` from shared to global memory.
    BulkStore {
        d: Address,
        a: Address,
        bytes: Reg,
    },
    BulkCommit,
    /// All but the newest so many groups: they have `read` their source, or are done.
    BulkWait {
        keep: u32,
        read: bool,
    },
    Wgmma(Box<Wgmma>),
    WgmmaFence,
    WgmmaCommit,
    /// All but the newest so many groups.
    WgmmaWait(u32),
    SetMaxRegisters {
        increase: bool,
        registers: u32,
    },
    Elect {
        d: Option<Reg>,
        p: Pred,
        mask: Reg,
    },
    /// The address that `a` has in the CTA of that rank.
    MapA {
        space: Space,
        d: Reg,
        a: Reg,
        rank: Reg,
    },
    /// The rank of the CTA that an address belongs to.
    GetCtaRank {
        space: Space,
        d: Reg,
        a: Reg,
    },
    ClusterArrive {
        releases: bool,
    },
    ClusterWait,
}

impl Op {
    /// Must all lanes of the warp, or of the mask that it names, be at this instruction together?
    pub fn collective(&self) -> bool {
        matches!(
            self,
            Op::Barrier { .. }
                | Op::WarpSync { .. }
                | Op::Shuffle { .. }
                | Op::Vote { .. }
                | Op::Match { .. }
                | Op::Redux { .. }
                | Op::Mma { .. }
                | Op::LoadMatrix { .. }
                | Op::StoreMatrix { .. }
                | Op::Wgmma(_)
                | Op::WgmmaFence
                | Op::WgmmaCommit
                | Op::WgmmaWait(_)
                | Op::SetMaxRegisters { .. }
                | Op::Elect { .. }
                | Op::ClusterArrive { .. }
                | Op::ClusterWait
        )
    }
}
