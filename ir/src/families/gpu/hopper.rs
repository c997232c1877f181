//! Kernels for sm_90a: a CTA's warpgroups have different work. One warp of the first fetches tiles into rings of shared memory
//! by bulk copies; the other groups multiply them. Nobody waits for the whole CTA: mbarriers say which stage is full or empty.
//!
//! See [`crate::kernel::warpgroup`] for what swizzled memory, mbarriers, maps and products are.

pub mod flash;
pub mod gemm;

use super::panel;
use crate::families::access::Lowering;
use crate::kernel::warpgroup::{MbarrierAt, MbarrierId, WARPGROUP, Warpgroup};
use crate::kernel::{Builder, Expr, WARP};
use crate::op::Compare;

/// Warps of a warpgroup.
const WARPS: usize = (WARPGROUP / WARP) as usize;

/// Rows of a product.
const ROWS: usize = 64;

/// Streaming multiprocessors of an H100 SXM or H200, for choosing tiles.
const MULTIPROCESSORS: usize = 132;

/// Registers of a thread that only fetches, and of one that multiplies beside another group: 128 and twice 128 threads share
/// 65,536.
const REGISTERS: (u16, u16) = (24, 240);

/// Tiles in shared memory that one thread fills and warpgroups empty, round and round.
struct Ring {
    full: MbarrierId,
    empty: MbarrierId,
    stages: usize,
}

impl Ring {
    fn new(k: &mut Builder, name: &str, stages: usize, consumers: usize) -> Ring {
        let full = k.mbarriers(&format!("{name}_full"), stages, 1);
        // Each warp says for itself that it is done.
        let empty = k.mbarriers(&format!("{name}_empty"), stages, consumers * WARPS);
        Ring { full, empty, stages }
    }

    /// Fills the ring for the `n`th time, from 0: as soon as its stage is empty, with so many bytes.
    fn fill(
        &self,
        k: &mut Builder,
        n: &Expr,
        bytes: usize,
        fetch: impl FnOnce(&mut Builder, &Expr, &MbarrierAt),
    ) {
        let stage = k.let_("stage", n.clone() % self.stages);
        // At first every stage is empty: the phase before the first counts as ended.
        let parity = (n.clone() / self.stages + 1usize) % 2usize;
        k.warpgroup(Warpgroup::Await { at: (self.empty, stage.clone()), parity });
        let full = (self.full, stage.clone());
        k.warpgroup(Warpgroup::Expect { at: full.clone(), bytes: bytes as u32 });
        fetch(k, &stage, &full);
    }

    /// Waits for what was filled in for the `n`th time: its stage.
    fn filled(&self, k: &mut Builder, n: &Expr) -> Expr {
        let stage = k.let_("stage", n.clone() % self.stages);
        let parity = n.clone() / self.stages % 2usize;
        k.warpgroup(Warpgroup::Await { at: (self.full, stage.clone()), parity });
        stage
    }

    /// Says that this warp has read what was filled in for the `n`th time.
    fn release(&self, k: &mut Builder, lane: &Expr, n: Expr) {
        k.if_(lane.clone().compare(Compare::Eq, 0usize), |k| {
            k.warpgroup(Warpgroup::Arrive((self.empty, n % self.stages)));
        });
    }
}

/// Gives one warp the work of fetching, and each of the other warpgroups, by its number from 0, that of multiplying.
fn roles(
    l: &mut Lowering<'_, '_>,
    consumers: usize,
    mut body: impl FnMut(&mut Lowering<'_, '_>, Option<Expr>),
) {
    let group = l.k.let_("group", (Expr::Thread / usize::from(WARPGROUP)).uniform());
    // One group beside the fetching one has registers enough.
    let share = |l: &mut Lowering<'_, '_>, registers| {
        if consumers > 1 {
            l.k.warpgroup(Warpgroup::Registers(registers));
        }
    };
    l.branch(group.clone().compare(Compare::Eq, 0usize), |l, fetches| match fetches {
        true => {
            share(l, REGISTERS.0);
            let warp = l.k.let_("fetching", (Expr::Thread / usize::from(WARP)).uniform());
            l.only(warp.compare(Compare::Eq, 0usize), |l| body(l, None));
        }
        false => {
            share(l, REGISTERS.1);
            let number = l.k.let_("number", group.clone() - 1usize);
            body(l, Some(number));
        }
    });
}
