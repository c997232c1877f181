//! What warpgroups of sm_90a do beyond other threads: they multiply tiles that lie in shared memory, which bulk copies bring
//! and mbarriers announce.
//!
//! * A **warpgroup** is four warps: 128 threads, the first a multiple of 128. All of them come to a `product`, `close`,
//!   `retire`, `registers` or `fence registers` together. Groups with different work stand in the branches of an `if` whose
//!   condition is made of [`Expr::Uniform`]; each may have `parallel` loops of its own.
//! * **Swizzled** memory is shared memory in rows of 128 bytes, in which the 16-byte chunk `c` of row `r` lies at
//!   `c ^ (r % 8)`: eight rows of one chunk lie in different banks. Axes are `[..., panel, row, column]`. Any threads may use it.
//! * An **mbarrier** counts: its phase ends when as many threads have arrived as it is `of` and all bytes that were expected
//!   have come; then the next begins. `await` goes on when the phase of this parity has ended: at first 1 has, 0 has not.
//! * A **tensor map** is a param with a box: `fetch` copies the box at an index into swizzled memory, with zeros for what lies outside of
//!   the param. One thread asks for it, the mbarrier tells when it has come.
//! * A **product** goes on in the background. `close` ends a group of them, `retire n` waits until all groups but the newest `n`
//!   are done; until then nobody may touch the sums, nor write the operands. `fence registers` stands between the last
//!   write of a register by other means and a product that uses it; `fence async` between the last store to swizzled memory and the
//!   synchronisation behind which a product reads them.
//! * A grid may begin before those before it have ended. `await grids` waits until they have, and all that they stored is seen;
//!   until then a thread touches nothing that they write. From there on the next grid may begin. Every thread of a kernel that
//!   says it does so before it ends; a kernel that does not say it waits at its beginning.
//!
//! ```text
//!   swizzled %tile : bf16[4, 1, 128, 64]
//!   mbarrier %full[4] of 1
//!   map %tiles : %x[128, 64]
//!   expect %full[%s], 16384
//!   fetch %tile[%s, 0, 0, 0] = %tiles[%m, 64 * %step], %full[%s]
//!   await %full[%s], %turn % 2
//!   fence registers
//!   product %sums += %tile[%s, 0, 64 * %group, 16 * %d], %other[%s, 0, 0, 16 * %d]
//!   close
//!   retire 0, %sums
//! ```
//!
//! Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", "mbarrier", "Tensors", "setmaxnreg", "bar, barrier",
//! "griddepcontrol".

use super::{BufferId, Builder, Expr, RegId, Stmt};

/// Threads of a warpgroup.
pub const WARPGROUP: u16 = 128;

/// Bytes of a row of swizzled memory.
pub const ROW_BYTES: usize = 128;

/// Index of mbarriers in [`Kernel::mbarriers`](super::Kernel::mbarriers).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MbarrierId(pub u32);

/// Index of a tensor map in [`Kernel::maps`](super::Kernel::maps).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MapId(pub u32);

/// A row of mbarriers in shared memory. Text: `mbarrier %full[4] of 1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mbarriers {
    /// Name in text, without `%`; unique in the kernel.
    pub name: String,
    /// How many.
    pub count: u16,
    /// Arrivals that end a phase.
    pub arrivals: u16,
}

/// A box of a param, as bulk copies fetch it. Text: `map %tiles : %x[128, 64]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// Name in text, without `%`; unique in the kernel.
    pub name: String,
    /// The param.
    pub buffer: BufferId,
    /// Elements of the box on each axis; of the last, 128 bytes.
    pub extents: Vec<u16>,
}

/// A mbarrier: which row, and which of it.
pub type MbarrierAt = (MbarrierId, Expr);

/// The left operand of a product: 64 rows by 16.
#[derive(Clone, Debug, PartialEq)]
pub enum Left {
    /// In swizzled memory, from an index on: the row a multiple of 8, the column of 16.
    Shared(BufferId, Vec<Expr>),
    /// In registers: 8 elements of each thread, each warp's 16 rows as those of [`Expr::Mma`].
    Registers(Expr),
}

/// A statement of warpgroups, or of other threads of sm_90a.
#[derive(Clone, Debug, PartialEq)]
pub enum Warpgroup {
    /// Gives each thread of the warpgroup so many registers from here on: `registers 240`. (PTX `setmaxnreg`.)
    Registers(u16),
    /// Waits at a numbered barrier until so many threads have come: `meet 2, 256`. (PTX `barrier.sync`.)
    Meet {
        /// 1 to 15; 0 is `sync`'s.
        id: Expr,
        /// Whole warps.
        threads: u16,
    },
    /// Comes to a numbered barrier without waiting: `pass 2, 256`. (PTX `barrier.arrive`.)
    Pass {
        /// 1 to 15.
        id: Expr,
        /// Whole warps.
        threads: u16,
    },
    /// Arrives, and announces bytes that copies will bring in this phase: `expect %full[%s], 16384`.
    Expect {
        /// Whom.
        at: MbarrierAt,
        /// How many bytes, what is filled with zeros counted too.
        bytes: u32,
    },
    /// Arrives: `arrive %empty[%s]`. What this thread did before is seen by who awaits the phase.
    Arrive(MbarrierAt),
    /// Waits until the phase of a parity, an index modulo 2, has ended: `await %full[%s], %parity`.
    Await {
        /// For whom.
        at: MbarrierAt,
        /// 0 or 1.
        parity: Expr,
    },
    /// Copies a box in the background: `fetch %tile[%s, 0, 0, 0] = %tiles[%m, %k], %full[%s]`. (PTX `cp.async.bulk.tensor`.)
    Fetch {
        /// Into which swizzled memory.
        to: BufferId,
        /// Where the box begins there: the beginning of a row that is a multiple of 8.
        place: Vec<Expr>,
        /// What.
        map: MapId,
        /// Where the box begins in the param; it may lie outside.
        index: Vec<Expr>,
        /// Who hears of it.
        at: MbarrierAt,
    },
    /// Waits until the grids before have ended, and lets the next begin: `await grids`. (PTX `griddepcontrol`.)
    AwaitGrids,
    /// Orders writes of registers before products that use them: `fence registers`. (PTX `wgmma.fence`.)
    FenceRegisters,
    /// Orders this thread's stores to swizzled memory before what reads them in the background, once it has synchronised with who asks
    /// for that: `fence async`. (PTX `fence.proxy.async`.)
    FenceAsync,
    /// Begins `sums += left right`, or `sums = left right`, of a warpgroup: 64 rows, 16 deep: `product %sums[0] += %a[...],
    /// %b[...]`. Warp `w` has rows `16 w` to `16 w + 15`, each block of 8 columns as in [`Expr::Mma`]. (PTX `wgmma.mma_async`.)
    Product {
        /// A file of f32x4, one for each 8 columns along its last axis.
        sums: RegId,
        /// On all axes but the last.
        index: Vec<Expr>,
        /// Added to what is there, or instead of it.
        add: bool,
        /// 64 rows by 16.
        left: Left,
        /// In swizzled memory: a row for each column of the sums, 16 columns from the index on; or transposed: 16 rows, a column for each.
        right: BufferId,
        /// From where; as for [`Left::Shared`], transposed the row a multiple of 16.
        place: Vec<Expr>,
        /// Is `right` transposed? Text: `product.t`.
        trans: bool,
    },
    /// Ends a group of products: `close`. (PTX `wgmma.commit_group`.)
    Close,
    /// Waits until all groups but the newest so many are done: `retire 1, %scores after [%total]`. (PTX `wgmma.wait_group`.)
    Retire {
        /// How many may go on.
        newest: u16,
        /// Files whose sums are then complete.
        sums: Vec<RegId>,
        /// What shall be computed before the wait, not behind it: f32 each. The compiler would move it otherwise.
        after: Vec<Expr>,
    },
}

impl Builder {
    /// Adds mbarriers.
    pub fn mbarriers(&mut self, name: &str, count: usize, arrivals: usize) -> MbarrierId {
        let name = self.unique(name);
        self.kernel.mbarriers.push(Mbarriers { name, count: count as u16, arrivals: arrivals as u16 });
        MbarrierId(self.kernel.mbarriers.len() as u32 - 1)
    }

    /// Adds a box of a param.
    pub fn map(&mut self, name: &str, buffer: BufferId, extents: &[usize]) -> MapId {
        let (name, extents) = (self.unique(name), extents.iter().map(|&n| n as u16).collect());
        self.kernel.maps.push(TensorMap { name, buffer, extents });
        MapId(self.kernel.maps.len() as u32 - 1)
    }

    /// Writes a statement of warpgroups.
    pub fn warpgroup(&mut self, stmt: Warpgroup) {
        self.push(Stmt::Warpgroup(stmt));
    }
}
