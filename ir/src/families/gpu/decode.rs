//! Attention of few rows over a long cache (Flash-Decoding: Dao, Haziza, Massa and Sizov 2023). Few rows make few tiles, and few
//! CTAs read memory too slowly: so keys are split, and a CTA takes a [`tile`](super::tile) of rows through one split alone.
//!
//! It leaves its sums, the highest score and the sum of the weights relative to it. When all have done so, a warp a row brings
//! them to the highest score of all and adds them, in the order of the splits. A split has a fixed number of keys, whatever
//! the cache holds, so the order of a row's sum depends on nothing but its position. The grid is that of a full cache, the same
//! in each step: CTAs whose split nobody sees do nothing.

use super::softmax::{Rows, Share, decay};
use super::tile::{Attention, Schedule, Strip, Tile};
use crate::dtype::DType;
use crate::families::access::Lowering;
use crate::families::attention::Shape;
use crate::families::{GroupView, LowerError, Lowered};
use crate::kernel::{Expr, Type, WARP};
use crate::op::{Compare, Reduction};

/// The kernel of an attention whose schedule splits the keys.
///
/// # Errors
///
/// Where shapes are symbolic behind the first axis, a dtype or head is not covered, or the schedule does not fit.
pub fn lower(view: &GroupView<'_>, s: Schedule) -> Result<Lowered, LowerError> {
    let mut l = Lowering::of_warps(view, s.warps);
    let a = Attention::bind(&mut l, s)?;
    let Shape { steps, per_kv, kv_heads, slots, .. } = a.shape;
    let (heads, splits, lane) = (per_kv * kv_heads, slots.div_ceil(s.split), l.warp().lane);
    // Of each row and split `d` sums, the highest score and the sum of the weights.
    let parts = l.workspace("parts", DType::F32, steps * (heads * splits) as i64, a.d + 2, a.d + 4);
    let k = &mut l.k;
    k.parallel("turn", Rows::tiles(&a.shape, a.count()) * kv_heads * splits, |k, turn| {
        let split = k.let_("split", turn.clone() % splits);
        let head = k.let_("kv", turn.clone() / splits % kv_heads);
        let first = k.let_("first", turn / (splits * kv_heads) * a.count());
        let rows = Rows::new(a.shape, a.causal, a.positions.clone(), a.count(), head, first);
        let ends = rows.tiles_of_keys(k, s.keys);
        let begin = k.let_("begin", split.clone() * (s.split / s.keys));
        k.if_(begin.clone().compare(Compare::Lt, ends.end.clone()), |k| {
            let end = k.let_("stop", ends.end.clone().min(begin.clone() + s.split / s.keys));
            let masked = k.let_("masked", ends.whole.clone().max(begin.clone()).min(end.clone()));
            let tile = Tile::run(k, &a, (&rows, &ends), [begin, masked, end]);
            for Strip { row, softmax, sums } in &tile.strips {
                softmax.each_row(k, (&rows, row), |k, half, [step, query], total| {
                    let part = k.let_("at", (step * heads + query) * splits + split.clone());
                    sums.each_pair(k, &lane, a.d / 8, half, |k, column, sum| {
                        k.store(parts, &[part.clone(), column], sum);
                    });
                    let highest = softmax.highest(k, half);
                    k.if_(softmax.first_of_row(), |k| {
                        k.store(parts, &[part, a.d.into()], highest.join(total));
                    });
                });
            }
            // The next turn copies over what others may still read.
            k.sync();
        });
    });
    k.barrier();
    l.each_row(Expr::from(steps) * heads, |l, row| {
        let step = row.clone() / heads;
        let query = row.clone() % heads;
        let seen = match a.causal {
            true => a.positions.at(&l.k, step.clone()).index(),
            false => a.positions.most_and_least(&mut l.k, steps.into(), |i| i)[0].clone(),
        };
        // Of the splits behind these the row sees no key.
        let count = l.k.let_("count", seen / s.split + 1usize);
        let part = |split: Expr| row.clone() * splits + split;
        let highest = l.k.reg("highest", Type::f32(1), &[], Some(Expr::f32(f64::NEG_INFINITY, 1)));
        l.k.for_("split", lane.clone(), count.clone(), WARP.into(), |k, split| {
            let more = k.get(highest, &[]).max(k.load(parts, &[part(split), a.d.into()], 1));
            k.set(highest, &[], more);
        });
        let highest = l.folded(Reduction::Max, l.k.get(highest, &[]));
        let k = &mut l.k;
        let highest = k.let_("highest", highest);
        // A thread has two columns of each block.
        let block = 2 * usize::from(WARP);
        let blocks = a.d.div_ceil(block);
        let column = |b: Expr| b * block + lane.clone() * 2usize;
        let sums = k.reg("sums", Type::f32(2), &[blocks], Some(Expr::f32(0.0, 2)));
        let total = k.reg("total", Type::f32(1), &[], Some(Expr::f32(0.0, 1)));
        k.for_("split", 0usize, count, 1, |k, split| {
            let at = k.let_("at", part(split));
            let of = k.load(parts, &[at.clone(), a.d.into()], 2);
            let of = k.let_("of", of);
            let weight = k.let_("weight", decay(a.scale, a.fma(), of.clone().lanes(0, 1), highest.clone()));
            let more = of.lanes(1, 1).fma(weight.clone(), k.get(total, &[]));
            k.set(total, &[], more);
            k.unroll("b", blocks, |k, b| {
                let sum = k.load(parts, &[at, column(b.clone()).min(a.d - 2)], 2);
                let sum = sum.fma(weight.splat(2), k.get(sums, std::slice::from_ref(&b)));
                k.set(sums, &[b], sum);
            });
        });
        let total = k.get(total, &[]);
        let first = lane.clone().compare(Compare::Eq, 0usize);
        let row = [step.clone(), query.clone()];
        a.to.store_lse(k, (a.scale, a.fma()), first, row, (highest, total.clone()));
        let share = Share::of(k, total, a.fma());
        k.unroll("b", blocks, |k, b| {
            let at = [step, query, k.let_("column", column(b.clone()))];
            let sum = k.get(sums, &[b]);
            a.to.store_pair(k, (a.shape.d, blocks * block), at, share.times(sum));
        });
    });
    Ok(l.finish())
}
