//! Causal attention, streamed: no matrix of scores in memory, masked tiles neither loaded nor computed (FlashAttention-2: Dao,
//! arXiv 2307.08691). A CTA takes a [`tile`](super::tile) of rows through all keys that it sees.

use super::tile::{Attention, Schedule, Tile};
use crate::families::access::Lowering;
use crate::families::{GroupView, LowerError, Lowered};

/// The kernel of an attention.
///
/// # Errors
///
/// As [`Attention::bind`].
pub fn lower(view: &GroupView<'_>, s: Schedule) -> Result<Lowered, LowerError> {
    let mut l = Lowering::of_warps(view, s.warps);
    let a = Attention::bind(&mut l, s)?;
    let (k, tiles, kv_heads) = (&mut l.k, a.tiles(), a.shape.kv_heads);
    k.parallel("turn", tiles.clone() * kv_heads, |k, turn| {
        let head = k.let_("kv", turn.clone() % kv_heads);
        // The last rows see the most keys: they begin first.
        let first = k.let_("first", (tiles - 1usize - turn / kv_heads) * (16 * s.warps));
        let rows = a.rows(k, head, first);
        let tile = Tile::run(k, &rows, [0usize.into(), rows.whole.clone(), rows.end.clone()]);
        tile.each_row(k, &rows, |k, half, [step, query], total| {
            let row = [step.clone(), query.clone()];
            a.store_lse(k, tile.first_of_row(), row, tile.highest(k, half), total.clone());
            tile.each_pair(k, half, |k, column, sum| a.store(k, a.d, [step, query, column], sum, total));
        });
        // The next turn copies over what others may still read.
        k.sync();
    });
    Ok(l.finish())
}
