//! `out[t] = softmax(scale * q[t] K^T, slots past pos[t] masked) V`, streamed over tiles of keys: no `T x C` matrix is in
//! memory, and tiles that are masked as a whole are neither loaded nor computed.
//!
//! Online softmax with a running maximum and sum (Milakov and Gimelshein 2018, algorithm 3; FlashAttention-2,
//! algorithm 1). All query heads that share a KV head are rows of one tile, so K and V are read once for them.
//!
//! Tiles of keys have one size and begin at slot 0; what is masked adds an exact zero. So a row's bits depend neither on
//! the number of rows nor on how the sequence was cut into steps.
//!
//! Rounding: probabilities are stored in the dtype of V, one extra `u_in * s` in the bound.

use super::access::Lowering;
use super::{GroupView, LowerError, Lowered};
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Layout, Pack};
use crate::kernel::{Access, Expr, LANES, Type};
use crate::op::{Compare, Op, Reduction, Unary};
use crate::schedule::{self, Field};
use crate::target::Vectors;

/// Tile sizes of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionSchedule {
    /// Rows (positions times heads of a group) of a tile.
    pub mr: usize,
    /// Vectors of 16 keys, or of 16 columns of V, in registers at once.
    pub nr: usize,
    /// Keys of a tile; a multiple of `16 nr`.
    pub keys: usize,
}

impl AttentionSchedule {
    /// The fields, for text, tuning and the numeric class.
    pub fn fields(self) -> [Field; 3] {
        let AttentionSchedule { mr, nr, keys } = self;
        let field = |name, value, numeric| Field { name, value, numeric };
        [field("mr", mr, false), field("nr", nr, false), field("keys", keys, true)]
    }

    /// Reads the text form.
    ///
    /// # Errors
    ///
    /// What does not fit, in words.
    pub fn parse(text: &str) -> Result<AttentionSchedule, String> {
        let mut fields = AttentionSchedule { mr: 0, nr: 0, keys: 0 }.fields();
        schedule::parse(text, &mut fields)?;
        let [mr, nr, keys] = fields.map(|f| f.value);
        if mr == 0 || nr == 0 || mr * nr > 64 || keys == 0 || keys > 1024 || keys % (Pack::LANES * nr) != 0 {
            return Err(
                "mr and nr must be at least 1, mr * nr at most 64, keys a multiple of 16 nr".to_string()
            );
        }
        Ok(AttentionSchedule { mr, nr, keys })
    }
}

/// Keys of a tile unless a schedule says otherwise. Cache capacities are multiples of it.
pub const KEYS: usize = 64;

/// Register tiles that the machine holds, best first as measured: many rows above all. All have [`KEYS`] keys: entry points that share a cache then give
/// the same bits.
///
/// # Errors
///
/// When the group is no attention.
pub fn schedules(view: &GroupView<'_>, vectors: &Vectors) -> Result<Vec<String>, LowerError> {
    let shape = shape_of(view)?;
    word_of(view, &shape)?;
    let one_step = shape.steps.constant() == Some(1);
    let wide = vectors.per_vector();
    let fits = |mr: usize, nr: usize| (mr * nr + nr) * wide < vectors.registers;
    let most = if one_step { shape.per_kv.min(8) } else { 6 };
    // One position has too few rows to use a vector of keys often: the narrowest tile loads the least.
    let widths = if one_step { [1, 2, 4] } else { [4, 2, 1] };
    let tiles = (1..=most).rev().flat_map(|mr| widths.map(|nr| (mr, nr)));
    let mut tiles: Vec<(usize, usize)> = tiles.filter(|&(mr, nr)| fits(mr, nr)).collect();
    if tiles.is_empty() {
        tiles.push((1, 1));
    }
    Ok(tiles
        .iter()
        .map(|&(mr, nr)| schedule::print(&AttentionSchedule { mr, nr, keys: KEYS }.fields()))
        .collect())
}

/// Extents of an attention.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Positions of a step.
    pub steps: Dim,
    /// Query heads for each KV head.
    pub per_kv: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub d: usize,
    /// Slots of the cache.
    pub slots: usize,
    /// Slots of a page of it: of all that lies without pages.
    pub page: usize,
    /// Of all operands.
    pub dtype: DType,
}

/// The extents of a group whose first value is an attention.
///
/// # Errors
///
/// When it is none, or heads or capacity are not known.
pub fn shape_of(view: &GroupView<'_>) -> Result<Shape, LowerError> {
    let id = view.values[0];
    if !matches!(view.graph[id].op, Op::Attention { .. }) {
        return Err(view.unsupported("anything but attention"));
    }
    let (q, k) = (&view.graph.operand(id, 0).ty, &view.graph.operand(id, 1).ty);
    let constant = |dim: Dim| dim.constant().map(|d| d as usize);
    let extents = (constant(q.shape[1]), constant(k.shape[0]), constant(k.shape[1]), constant(k.shape[2]));
    let (Some(heads), Some(kv_heads), Some(slots), Some(d)) = extents else {
        return Err(view.unsupported("symbolic heads or capacity"));
    };
    let page = match view.graph[super::storage(view.graph, view.graph[id].operands[1])].layout {
        Some(Layout::Pages { slots }) => slots,
        _ => slots,
    };
    let (steps, dtype) = (q.shape[0], q.dtype);
    Ok(Shape { steps, per_kv: heads / kv_heads, kv_heads, d, slots, page, dtype })
}

/// Elements that are multiplied together: those of four bytes.
fn word_of(view: &GroupView<'_>, shape: &Shape) -> Result<usize, LowerError> {
    if view.values.len() > 1 {
        return Err(view.unsupported("more than the attention"));
    }
    let Shape { d, dtype, .. } = *shape;
    let word = match dtype {
        DType::BF16 => 2,
        DType::F32 => 1,
        _ => return Err(view.unsupported(format!("attention in {dtype}"))),
    };
    match d % word {
        0 => Ok(word),
        _ => Err(view.unsupported(format!("attention in {dtype} with a head of {d}"))),
    }
}

/// The kernel of an attention.
///
/// # Errors
///
/// Where shapes are symbolic behind the first axis, the dtype is neither f32 nor bf16, or the schedule does not fit.
pub fn lower(view: &GroupView<'_>, vectors: &Vectors) -> Result<Lowered, LowerError> {
    let shape = shape_of(view)?;
    let Shape { steps, per_kv, kv_heads, d, slots, dtype, .. } = shape;
    let word = word_of(view, &shape)?;
    let text = match &view.graph.groups[view.id.0 as usize].schedule {
        Some(text) => text.clone(),
        None => schedules(view, vectors)?.swap_remove(0),
    };
    let wrong =
        |what: String| LowerError::Schedule { group: view.name().to_string(), schedule: text.clone(), what };
    let AttentionSchedule { mr, nr, keys } = AttentionSchedule::parse(&text).map_err(wrong)?;
    if slots % keys != 0 {
        return Err(wrong(format!("a cache of {slots} slots is not whole tiles of {keys} keys")));
    }
    let id = view.values[0];
    let Op::Attention { causal, scale } = view.graph[id].op else { unreachable!("shape_of looked") };
    let operands = view.graph[id].operands.clone();
    let key_layout = |n: usize| view.graph[super::storage(view.graph, operands[n])].layout;
    if key_layout(1) != Some(Layout::KeyPanels { word })
        || key_layout(2) != Some(Layout::ValuePanels { word })
    {
        return Err(view.unsupported("a cache that is not in panels"));
    }

    let mut l = Lowering::new(view);
    let q = l.tensor("q", operands[0], Access::Read);
    let keys_in = l.tensor("k", operands[1], Access::Read);
    let values_in = l.tensor("v", operands[2], Access::Read);
    let pos = l.tensor("pos", operands[3], Access::Read);
    let out = l.tensor("out", id, Access::Write);
    let k = &mut l.k;
    let lanes = Pack::LANES;
    let (key_panels, column_panels) = (keys / lanes, d.div_ceil(lanes));
    let scores = k.local("scores", DType::F32, &[mr, keys]);
    let weights = k.local("weights", dtype, &[mr, keys]);
    let sums = k.local("sums", DType::F32, &[mr, column_panels * lanes]);
    let highest = k.local("highest", DType::F32, &[mr, 1]);
    let total = k.local("total", DType::F32, &[mr, 1]);
    let vector = Type::Vector { dtype, lanes: LANES * word as u16 };
    let dot = |acc: Expr, a: Expr, b: Expr| match dtype {
        DType::BF16 => acc.dot_bf16(a, b),
        _ => a.fma(b, acc),
    };
    let steps = Expr::from(steps);
    let all_rows = steps.clone() * per_kv;
    // A tile's rows reach to its last position, so later tiles cost more. Taking tiles from both ends in turn gives each
    // worker, whose turns are contiguous, equal work.
    let tiles = (all_rows.clone() + (mr - 1)) / mr;
    k.parallel("turn", tiles.clone() * kv_heads, |k, turn| {
        let head = k.let_("kv", turn.clone() % kv_heads);
        let nth = k.let_("nth", turn / kv_heads);
        let even = (nth.clone() % 2usize).compare(Compare::Eq, 0usize);
        let tile = even.select(nth.clone() / 2usize, tiles.clone() - 1usize - nth / 2usize);
        let first = k.let_("first", tile * mr);
        let row = |i: &Expr| (first.clone() + i.clone()).min(all_rows.clone() - 1usize);
        let time = |i: &Expr| row(i) / per_kv;
        let query = |i: &Expr| head.clone() * per_kv + row(i) % per_kv;

        let end = k.reg("end", Type::Index, &[], Some(Expr::Int(0)));
        let position = |k: &crate::kernel::Builder, i: &Expr| k.load(pos, &[time(i)], 1).index();
        if causal {
            k.unroll("i", mr, |k, i| {
                let later = k.get(end, &[]).max(position(k, &i));
                k.set(end, &[], later);
            });
        } else {
            k.for_("s", 0usize, steps.clone(), 1, |k, s| {
                let later = k.get(end, &[]).max(k.load(pos, &[s], 1).index());
                k.set(end, &[], later);
            });
        }
        let end = k.let_("last", k.get(end, &[]));
        k.for_("i", 0usize, mr, 1, |k, i| {
            k.store(highest, &[i.clone(), Expr::Int(0)], Expr::f32(f64::NEG_INFINITY, 1));
            k.store(total, &[i.clone(), Expr::Int(0)], Expr::f32(0.0, 1));
            k.for_("c", 0usize, column_panels, 1, |k, c| {
                k.store(sums, &[i, c * lanes], Expr::f32(0.0, LANES));
            });
        });
        k.for_("tile", 0usize, end.clone() / keys + 1usize, 1, |k, tile| {
            // scores = scale * q K^T, for all keys of the tile.
            k.for_("p", 0usize, key_panels / nr, 1, |k, p| {
                let acc = k.reg("s", Type::f32(LANES), &[mr, nr], Some(Expr::f32(0.0, LANES)));
                let column = k.reg("key", vector, &[nr], None);
                k.for_("d", 0usize, d / word, 1, |k, at| {
                    k.unroll("j", nr, |k, j| {
                        let panel = tile.clone() * key_panels + p.clone() * nr + j.clone();
                        let loaded = k.load(
                            keys_in,
                            &[head.clone(), panel, at.clone(), Expr::Int(0)],
                            LANES * word as u16,
                        );
                        k.set(column, &[j], loaded);
                    });
                    k.unroll("i", mr, |k, i| {
                        let x = k.load(q, &[time(&i), query(&i), at.clone() * word], word as u16);
                        let x = k.let_("x", x.splat(LANES));
                        k.unroll("j", nr, |k, j| {
                            let place = [i.clone(), j.clone()];
                            let sum = dot(k.get(acc, &place), x.clone(), k.get(column, &[j]));
                            k.set(acc, &place, sum);
                        });
                    });
                });
                k.unroll("i", mr, |k, i| {
                    k.unroll("j", nr, |k, j| {
                        let scaled = k.get(acc, &[i.clone(), j.clone()]) * Expr::f32(scale, LANES);
                        k.store(scores, &[i, (p.clone() * nr + j) * lanes], scaled);
                    });
                });
            });
            // Probabilities relative to the highest score so far; what was summed before is scaled to it.
            k.for_("i", 0usize, mr, 1, |k, i| {
                let zero = Expr::Int(0);
                let seen = if causal { position(k, &i) } else { end.clone() };
                let seen = k.let_("seen", seen - tile.clone() * keys);
                let old = k.let_("old", k.load(highest, &[i.clone(), zero.clone()], 1));
                let most = k.reg("most", Type::f32(LANES), &[], Some(Expr::f32(f64::NEG_INFINITY, LANES)));
                let score = k.reg("score", Type::f32(LANES), &[key_panels], None);
                k.unroll("j", key_panels, |k, j| {
                    let left = (seen.clone() - j.clone() * lanes).max(-1i64).min(lanes);
                    let visible =
                        Expr::Iota { lanes: LANES }.compare(Compare::Le, left.cast(DType::I32).splat(LANES));
                    let loaded = k.load(scores, &[i.clone(), j.clone() * lanes], LANES);
                    let masked = visible.select(loaded, Expr::f32(f64::NEG_INFINITY, LANES));
                    k.set(score, std::slice::from_ref(&j), masked);
                    let more = k.get(most, &[]).max(k.get(score, &[j]));
                    k.set(most, &[], more);
                });
                let new = k.let_("new", k.get(most, &[]).reduce(Reduction::Max).max(old.clone()));
                let shrink = k.let_("shrink", (old - new.clone()).unary(Unary::Exp));
                let part = k.reg("part", Type::f32(LANES), &[], Some(Expr::f32(0.0, LANES)));
                k.unroll("j", key_panels, |k, j| {
                    let p =
                        (k.get(score, std::slice::from_ref(&j)) - new.clone().splat(LANES)).unary(Unary::Exp);
                    let p = k.let_("w", p);
                    k.store(weights, &[i.clone(), j * lanes], p.clone());
                    let sum = k.get(part, &[]) + p;
                    k.set(part, &[], sum);
                });
                let before = k.load(total, &[i.clone(), zero.clone()], 1);
                let after = before.fma(shrink.clone(), k.get(part, &[]).reduce(Reduction::Sum));
                k.store(total, &[i.clone(), zero.clone()], after);
                k.store(highest, &[i.clone(), zero], new);
                k.for_("c", 0usize, column_panels, 1, |k, c| {
                    let scaled = k.load(sums, &[i.clone(), c.clone() * lanes], LANES) * shrink.splat(LANES);
                    k.store(sums, &[i, c * lanes], scaled);
                });
            });
            // sums += probabilities * V.
            let columns = |k: &mut crate::kernel::Builder, from: Expr, count: usize| {
                let acc = k.reg("o", Type::f32(LANES), &[mr, count], None);
                let row = k.reg("value", vector, &[count], None);
                let place = |j: &Expr| (from.clone() + j.clone()) * lanes;
                k.unroll("i", mr, |k, i| {
                    k.unroll("j", count, |k, j| {
                        let sum = k.load(sums, &[i.clone(), place(&j)], LANES);
                        k.set(acc, &[i, j], sum);
                    });
                });
                k.for_("s", 0usize, keys / word, 1, |k, s| {
                    k.unroll("j", count, |k, j| {
                        let slot = tile.clone() * (keys / word) + s.clone();
                        let at = [head.clone(), from.clone() + j.clone(), slot, Expr::Int(0)];
                        let loaded = k.load(values_in, &at, LANES * word as u16);
                        k.set(row, &[j], loaded);
                    });
                    k.unroll("i", mr, |k, i| {
                        let w = k.load(weights, &[i.clone(), s.clone() * word], word as u16);
                        let w = k.let_("w", w.splat(LANES));
                        k.unroll("j", count, |k, j| {
                            let at = [i.clone(), j.clone()];
                            let sum = dot(k.get(acc, &at), w.clone(), k.get(row, &[j]));
                            k.set(acc, &at, sum);
                        });
                    });
                });
                k.unroll("i", mr, |k, i| {
                    k.unroll("j", count, |k, j| {
                        let sum = k.get(acc, &[i.clone(), j.clone()]);
                        k.store(sums, &[i, place(&j)], sum);
                    });
                });
            };
            k.for_("c", 0usize, column_panels / nr, 1, |k, c| columns(k, c * nr, nr));
            if column_panels % nr > 0 {
                columns(k, (column_panels / nr * nr).into(), column_panels % nr);
            }
        });
        let rows = (all_rows.clone() - first.clone()).min(mr);
        k.for_("i", 0usize, rows, 1, |k, i| {
            let whole = k.load(total, &[i.clone(), Expr::Int(0)], 1);
            let whole = k.let_("whole", whole.splat(LANES));
            for panel in 0..column_panels {
                let sum = k.load(sums, &[i.clone(), Expr::from(panel * lanes)], LANES);
                let mut share =
                    Expr::Arith(crate::kernel::Arith::Div, Box::new(sum), Box::new(whole.clone()));
                let left = d - panel * lanes;
                if left < lanes {
                    share = share.lanes(0, left as u16);
                }
                k.store(out, &[time(&i), query(&i), Expr::from(panel * lanes)], share);
            }
        });
    });
    Ok(l.finish())
}
