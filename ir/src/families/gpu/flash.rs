//! Causal attention, streamed: no matrix of scores in memory, masked tiles neither loaded nor computed (FlashAttention-2: Dao,
//! arXiv 2307.08691). A CTA takes a [`tile`](super::tile) of rows through all keys that it sees.

use super::softmax::Rows;
use super::tile::{Attention, Schedule, Tile};
use crate::families::access::Lowering;
use crate::families::{GroupView, LowerError, Lowered};

/// The kernel of an attention.
///
/// # Errors
///
/// Where shapes are symbolic behind the first axis, a dtype or head is not covered, or the schedule does not fit.
pub fn lower(view: &GroupView<'_>, s: Schedule) -> Result<Lowered, LowerError> {
    let mut l = Lowering::of_warps(view, s.warps);
    let a = Attention::bind(&mut l, s)?;
    l.k.parallel("turn", Rows::tiles(&a.shape, a.count()) * a.shape.kv_heads, |k, turn| {
        let rows = Rows::of_turn(k, (a.shape, a.causal), &a.positions, a.count(), &turn);
        let ends = rows.tiles_of_keys(k, s.keys);
        let all = [0usize.into(), ends.whole.clone(), ends.end.clone()];
        let tile = Tile::run(k, &a, (&rows, &ends), all);
        for strip in &tile.strips {
            strip.softmax.store(k, (&rows, &strip.row), strip.sums, a.to);
        }
        // The next turn copies over what others may still read.
        k.sync();
    });
    Ok(l.finish())
}
