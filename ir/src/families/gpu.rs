//! The families on a GPU: the same groups, other generators. A worker is a CTA, and its threads share the work.
//!
//! * Rows (`rowwise`, `elementwise`, `gather`) are done by the CPU's generators: a warp takes a row, its threads the vectors.
//! * [`gemv`] is products of one row, [`gemm`] of more, [`flash`] attention, [`decode`] that of few rows; both do [`tile`]s.
//! * f32 is computed by FMA, never by tensor cores, whose f32 has a roundoff of 2^-11; bf16 by `mma`.
//!
//! Weights lie in rows that begin at multiples of 16 bytes, caches as `[pages, heads, slots, head]`.

pub mod decode;
pub mod flash;
pub mod gemm;
pub mod gemv;
pub mod hopper;
mod softmax;
pub mod tile;

use super::access::Lowering;
use super::{GroupView, LowerError, Lowered, dot, elementwise, rowwise, sample};
use crate::Dim;
use crate::dtype::DType;
use crate::graph::{Family, Pack};
use crate::kernel::warpgroup::ROW_BYTES;
use crate::kernel::{Builder, Expr, WARP};
use crate::op::Compare;
use crate::schedule::Field;
use crate::target::Gpu;

/// Warps of a CTA whose warps do a row each.
const ROWS: usize = 4;

/// Rows of a step up to which warps multiply for themselves, even where warpgroups could.
const FEW_ROWS: i64 = 16;

/// How the text of a schedule of warpgroups begins.
const BY_GROUPS: &str = "consumers";

/// The legal space of a group, the preferred first.
///
/// # Errors
///
/// When the family does not cover the group.
pub fn schedules(view: &GroupView<'_>, gpu: &Gpu) -> Result<Vec<String>, LowerError> {
    match view.family() {
        Family::Dot if is_one_row(&dot::analyse(view)?.m) => Ok(gemv::schedules()),
        Family::Dot => {
            let by_groups = if gpu.warpgroups { hopper::gemm::schedules(view, gpu)? } else { Vec::new() };
            Ok(by_preference(view, gemm::schedules(view, gpu)?, by_groups))
        }
        Family::Attention => {
            let by_groups = if gpu.warpgroups { hopper::flash::schedules(view, gpu)? } else { Vec::new() };
            Ok(by_preference(view, tile::schedules(view, gpu)?, by_groups))
        }
        Family::Rowwise | Family::Elementwise | Family::Gather | Family::Sample => Ok(vec![String::new()]),
    }
}

/// Schedules of warps that multiply for themselves, and of warpgroups. Few rows are bound by reading weights and keys, which more
/// and smaller CTAs do better.
fn by_preference(view: &GroupView<'_>, by_warps: Vec<String>, by_groups: Vec<String>) -> Vec<String> {
    let few = view.graph.symbols.max()[0] <= FEW_ROWS;
    if few { [by_warps, by_groups].concat() } else { [by_groups, by_warps].concat() }
}

/// The kernel of a group.
///
/// # Errors
///
/// When the family does not cover the group, or the schedule does not fit it.
pub fn lower(view: &GroupView<'_>, gpu: &Gpu) -> Result<Lowered, LowerError> {
    let text = match &view.graph.groups[view.id.0 as usize].schedule {
        Some(text) => text.clone(),
        None => schedules(view, gpu)?.swap_remove(0),
    };
    let wrong = |what| LowerError::Schedule { group: view.name().to_string(), schedule: text.clone(), what };
    match view.family() {
        Family::Dot => {
            let group = dot::analyse(view)?;
            match is_one_row(&group.m) {
                true => gemv::lower(view, &group, gemv::Schedule::parse(&text).map_err(wrong)?),
                false if text.starts_with(BY_GROUPS) => {
                    hopper::gemm::lower(view, &group, hopper::gemm::Schedule::parse(&text).map_err(wrong)?)
                }
                false => gemm::lower(view, &group, gemm::Schedule::parse(&text).map_err(wrong)?),
            }
        }
        Family::Attention if text.starts_with(BY_GROUPS) => {
            hopper::flash::lower(view, hopper::flash::Schedule::parse(&text).map_err(wrong)?, gpu)
        }
        Family::Attention => match tile::Schedule::parse(&text).map_err(wrong)? {
            whole if whole.split == 0 => flash::lower(view, whole),
            split => decode::lower(view, split),
        },
        Family::Rowwise => rowwise::lower(Lowering::of_warps(view, ROWS)),
        Family::Elementwise | Family::Gather => elementwise::lower(Lowering::of_warps(view, ROWS)),
        Family::Sample => sample::lower_threads(view),
    }
}

fn is_one_row(rows: &Dim) -> bool {
    rows.constant() == Some(1)
}

/// The fields of a schedule of a GPU's kernels, if it is one.
pub fn fields(family: Family, schedule: &str) -> Option<Vec<Field>> {
    fn of<S, const N: usize>(read: Result<S, String>, fields: fn(S) -> [Field; N]) -> Option<Vec<Field>> {
        read.ok().map(|schedule| fields(schedule).to_vec())
    }
    match family {
        Family::Dot => of(gemm::Schedule::parse(schedule), gemm::Schedule::fields)
            .or_else(|| of(gemv::Schedule::parse(schedule), gemv::Schedule::fields))
            .or_else(|| of(hopper::gemm::Schedule::parse(schedule), hopper::gemm::Schedule::fields)),
        Family::Attention => of(tile::Schedule::parse(schedule), tile::Schedule::fields)
            .or_else(|| of(hopper::flash::Schedule::parse(schedule), hopper::flash::Schedule::fields)),
        Family::Rowwise | Family::Elementwise | Family::Gather | Family::Sample => None,
    }
}

/// How a product of many rows is cut: each turn makes a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProductTile {
    /// Rows.
    pub rows: usize,
    /// Columns of each stream.
    pub columns: usize,
    /// Depth of a step.
    pub depth: usize,
    /// Rows of tiles that neighbouring turns make together, column by column. Turns beyond the last row do nothing.
    pub band: usize,
}

/// The tile of a schedule; `None` for that of one row.
pub fn product_tile(schedule: &str) -> Option<ProductTile> {
    if schedule.starts_with(BY_GROUPS) {
        return hopper::gemm::Schedule::parse(schedule).ok().map(|s| s.tile());
    }
    gemm::Schedule::parse(schedule).ok().map(|s| s.tile())
}

/// How an attention is cut: each turn takes a tile of rows through keys. Heads are padded to 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionTile {
    /// Rows.
    pub rows: usize,
    /// Keys of a step.
    pub keys: usize,
    /// Keys of a turn; 0 if it takes all that its rows see.
    pub split: usize,
}

/// The tile of a schedule; `None` for that of a CPU.
pub fn attention_tile(schedule: &str) -> Option<AttentionTile> {
    if schedule.starts_with(BY_GROUPS) {
        return hopper::flash::Schedule::parse(schedule).ok().map(|s| s.tile());
    }
    tile::Schedule::parse(schedule).ok().map(|s| s.tile())
}

/// The packings that a group's weights need, one a segment: rows of memory.
pub fn packs(view: &GroupView<'_>, group: &dot::DotGroup) -> Vec<Pack> {
    let mut packs = dot::packs(view, group);
    for pack in &mut packs {
        (pack.lanes, pack.word) = (1, group.k.next_multiple_of(chunk(group.dtype)));
    }
    packs
}

/// Elements of 16 bytes, which are copied at once.
fn chunk(dtype: DType) -> usize {
    16 / dtype.bytes(1)
}

/// The chunks of so many rows shared out over the threads of so many warps; `copy` has a row and a chunk's number in it.
fn copies(
    k: &mut Builder,
    rows: usize,
    chunks: usize,
    warps: usize,
    copy: impl Fn(&mut Builder, Expr, Expr),
) {
    let threads = warps * usize::from(WARP);
    k.unroll("c", (rows * chunks).div_ceil(threads), |k, c| {
        let (row, chunk) = match threads.is_multiple_of(chunks) {
            // A thread stays in its column: its addresses differ by constants, which take no registers.
            true => (c * (threads / chunks) + Expr::Thread / chunks, Expr::Thread % chunks),
            false => {
                let number = k.let_("number", c * threads + Expr::Thread);
                (number.clone() / chunks, number % chunks)
            }
        };
        match (rows * chunks).is_multiple_of(threads) {
            true => copy(k, row, chunk),
            false => k.if_(row.clone().compare(Compare::Lt, rows), |k| copy(k, row, chunk)),
        }
    });
}

/// Columns of a panel: elements of a row of swizzled memory.
fn panel(dtype: DType) -> usize {
    ROW_BYTES / dtype.bytes(1)
}

/// The weights of a segment.
fn pack_of(l: &Lowering<'_, '_>, segment: usize) -> Result<usize, LowerError> {
    let name = format!("{}.{segment}", l.view.name());
    let found = l.view.graph.packs.iter().position(|p| p.name == name && p.lanes == 1 && p.words() == 1);
    found.ok_or_else(|| l.view.unsupported("weights that do not lie in rows"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::families::numeric_class;

    #[test]
    fn the_order_of_sums_is_told_by_the_schedule() {
        let class = |family, schedule| numeric_class(family, schedule).unwrap();
        assert_eq!(
            class(Family::Attention, "warps 4, rows 16, keys 64, hold 1, split 256"),
            "keys 64, split 256"
        );
        assert_eq!(class(Family::Attention, "consumers 2, keys 128, stages 2"), "keys 128");
        assert_eq!(class(Family::Dot, "bm 16, bn 64, stages 4, wm 1, wn 4"), "");
        assert_eq!(class(Family::Dot, "consumers 2, bn 256, stages 4, band 8"), "");
        assert!(numeric_class(Family::Attention, "consumers 2, bn 256, stages 4, band 8").is_err());
    }
}
