//! Causal attention, streamed: no matrix of scores in memory, masked tiles neither loaded nor computed (FlashAttention-2: Dao,
//! arXiv 2307.08691).
//!
//! A row is a position and a query head; the heads that share a KV head are rows beside each other, so that a tile of keys
//! serves them all. A CTA does a tile of rows, 16 a warp, against tiles of `keys`, which pass through a ring of two in shared
//! memory: while one is multiplied, the next is copied. Scores stay in registers: their layout as sums of one product is that
//! of the left operand of the next. Each thread has two rows' maxima and sums; a row's four threads exchange them by shuffles.
//!
//! Tiles in which every row sees every key need no mask; the last tiles compare positions. Rows of a head are padded with zeros
//! to 16. bf16 is multiplied by `mma`, with `exp2` and the scale folded into it; f32 by FMA, through weights in shared memory.

use super::chunk;
use crate::dtype::DType;
use crate::families::access::Lowering;
use crate::families::attention::{Shape, shape_of};
use crate::families::{GroupView, LowerError, Lowered};
use crate::kernel::{Access, BufferId, Builder, Expr, RegId, Type, WARP};
use crate::op::{Compare, Op, Unary};
use crate::schedule::{self, Field};
use crate::target::Gpu;

/// Tile sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Warps of a CTA: it does 16 rows for each.
    pub warps: usize,
    /// Keys of a tile.
    pub keys: usize,
    /// Do queries stay in registers (1), or are they read anew for each tile (0)?
    pub hold: usize,
}

impl Schedule {
    /// The fields, for text, tuning and the numeric class: maxima are taken tile by tile.
    pub fn fields(self) -> [Field; 3] {
        let field = |name, value, numeric| Field { name, value, numeric };
        [field("warps", self.warps, false), field("keys", self.keys, true), field("hold", self.hold, false)]
    }

    /// Reads the text form.
    ///
    /// # Errors
    ///
    /// What does not fit, in words.
    pub fn parse(text: &str) -> Result<Schedule, String> {
        let mut fields = Schedule { warps: 0, keys: 0, hold: 0 }.fields();
        schedule::parse(text, &mut fields)?;
        let [warps, keys, hold] = fields.map(|f| f.value);
        match (1..=16).contains(&warps) && matches!(keys, 16 | 32 | 64) && hold <= 1 {
            true => Ok(Schedule { warps, keys, hold }),
            false => Err("warps must be 1 to 16, keys 16, 32 or 64, hold 0 or 1".to_string()),
        }
    }

    fn shared_bytes(self, d: usize, dtype: DType) -> usize {
        let pitch = d + chunk(dtype);
        let rows = |rows: usize, pitch: usize| (rows * pitch * dtype.bytes(1)).next_multiple_of(128);
        let weights = if dtype == DType::F32 { rows(16 * self.warps, self.keys + 4) } else { 0 };
        rows(16 * self.warps, pitch) + 2 * rows(2 * self.keys, pitch) + weights
    }
}

/// Columns of a head in shared memory.
fn padded(d: usize) -> usize {
    d.next_multiple_of(16)
}

/// The legal space, the preferred first: as many rows as a step has and shared memory holds.
///
/// # Errors
///
/// When the group is no attention.
pub fn schedules(view: &GroupView<'_>, gpu: &Gpu) -> Result<Vec<String>, LowerError> {
    let shape = covered(view)?;
    let rows = view.graph.symbols.max()[0] as usize * shape.per_kv;
    let d = padded(shape.d);
    let mut found = Vec::new();
    for keys in [64, 32, 16] {
        for warps in [4, 8, 2, 1] {
            // Queries of a head in registers beside its sums: no more than half of them.
            let hold = usize::from(d <= 128 && shape.dtype != DType::F32);
            let schedule = Schedule { warps, keys, hold };
            if schedule.shared_bytes(d, shape.dtype) <= gpu.shared_bytes
                && (warps == 1 || 16 * warps < 2 * rows)
            {
                found.push(schedule::print(&schedule.fields()));
            }
        }
    }
    match found.is_empty() {
        true => Err(view.unsupported(format!("a head of {}", shape.d))),
        false => Ok(found),
    }
}

/// The extents of an attention that these kernels cover.
fn covered(view: &GroupView<'_>) -> Result<Shape, LowerError> {
    let shape = shape_of(view)?;
    let Shape { d, dtype, .. } = shape;
    match dtype {
        DType::F32 | DType::BF16 | DType::F16 if d.is_multiple_of(chunk(dtype)) && d <= 256 => Ok(shape),
        _ => Err(view.unsupported(format!("attention in {dtype} with a head of {d}"))),
    }
}

/// A tile as its threads see it.
struct Tile {
    s: Schedule,
    shape: Shape,
    /// Columns of a head in shared memory.
    d: usize,
    scale: f64,
    /// In global memory: `k[head, slot, column]`, `v` alike.
    k: BufferId,
    v: BufferId,
    /// In shared memory: `[row, column]`, `[2, key, column]`, and for f32 weights `[row, key]`.
    tile_q: BufferId,
    tile_k: BufferId,
    tile_v: BufferId,
    weights: Option<BufferId>,
    /// The KV head.
    head: Expr,
    lane: Expr,
    /// First row of this warp in the tile.
    warp_row: Expr,
    /// Queries, as left operands: `[d / 16]`.
    queries: Option<RegId>,
    /// Scores of 16 rows by 8 keys each, and sums by 8 columns each; of f32 four registers a thread.
    scores: RegId,
    sums: RegId,
    /// Of the two rows of a thread: the last key that each sees, its highest score so far, and its sum of weights.
    seen: RegId,
    highest: RegId,
    total: RegId,
}

/// The kernel of an attention.
///
/// # Errors
///
/// Where shapes are symbolic behind the first axis, a dtype or head is not covered, or the schedule does not fit.
pub fn lower(view: &GroupView<'_>, s: Schedule) -> Result<Lowered, LowerError> {
    let shape = covered(view)?;
    let Shape { per_kv, kv_heads, slots, dtype, .. } = shape;
    let Op::Attention { causal, scale } = view.graph[view.values[0]].op else {
        unreachable!("shape_of looked")
    };
    if slots % s.keys != 0 {
        return Err(view.unsupported(format!("a cache of {slots} slots, not whole tiles of {} keys", s.keys)));
    }
    let operands = view.graph[view.values[0]].operands.clone();
    if [1, 2].iter().any(|&n| view.graph[crate::families::storage(view.graph, operands[n])].layout.is_some())
    {
        return Err(view.unsupported("a cache in panels"));
    }
    let mut l = Lowering::of_warps(view, s.warps);
    let q = l.tensor("q", operands[0], Access::Read);
    let (k_in, v_in) = (l.tensor("k", operands[1], Access::Read), l.tensor("v", operands[2], Access::Read));
    let pos = l.tensor("pos", operands[3], Access::Read);
    let out = l.tensor("out", view.values[0], Access::Write);
    let warp = l.warp();
    let k = &mut l.k;
    let (d, bm, mma) = (padded(shape.d), 16 * s.warps, dtype != DType::F32);
    let pitch = d + chunk(dtype);
    let tile_q = k.shared("tile_q", dtype, &[bm, d], pitch);
    let tile_k = k.shared("tile_k", dtype, &[2, s.keys, d], pitch);
    let tile_v = k.shared("tile_v", dtype, &[2, s.keys, d], pitch);
    let weights = (!mma).then(|| k.shared("weights", DType::F32, &[bm, s.keys], s.keys + 4));
    let steps = Expr::from(shape.steps);
    let all_rows = steps.clone() * per_kv;
    let tiles = (all_rows.clone() + (bm - 1)) / bm;
    k.parallel("turn", tiles.clone() * kv_heads, |k, turn| {
        let head = k.let_("kv", turn.clone() % kv_heads);
        // The last rows see the most keys: they begin first.
        let first = k.let_("first", (tiles - 1usize - turn / kv_heads) * bm);
        let last = all_rows.clone() - 1usize;
        let row = |i: Expr| (first.clone() + i).min(last.clone());
        let time = |row: Expr| row / per_kv;
        let query = |row: Expr| head.clone() * per_kv + row % per_kv;
        let position = |k: &Builder, row: Expr| k.load(pos, &[time(row)], 1).index();

        // Every thread learns the last key that any row of the tile sees, and the last that all do.
        let (most, least) =
            (k.reg("most", i32s(), &[], Some(int(0))), k.reg("least", i32s(), &[], Some(int(i32::MAX))));
        let (from, to, by) = match causal {
            true => (warp.lane.clone(), Expr::from(bm), i64::from(WARP)),
            false => (warp.lane.clone(), steps.clone(), i64::from(WARP)),
        };
        k.for_("i", from, to, by, |k, i| {
            let i = if causal { time(row(i)) } else { i };
            let at = k.load(pos, &[i], 1);
            let at = k.let_("at", at);
            let (more, less) = (k.get(most, &[]).max(at.clone()), k.get(least, &[]).min(at));
            k.set(most, &[], more);
            k.set(least, &[], less);
        });
        for mask in [16, 8, 4, 2, 1] {
            let more = k.get(most, &[]).max(k.get(most, &[]).shuffle(mask));
            k.set(most, &[], more);
            let less = k.get(least, &[]).min(k.get(least, &[]).shuffle(mask));
            k.set(least, &[], less);
        }
        let end = k.let_("end", k.get(most, &[]).index() / s.keys + 1usize);
        let whole =
            if causal { k.get(least, &[]).index() + 1usize } else { k.get(most, &[]).index() + 1usize };
        let whole = k.let_("whole", whole / s.keys);

        // Queries to shared memory; they arrive with the first tile of keys.
        let wide = chunk(dtype);
        copies(k, bm, d / wide, s.warps, |k, i, chunk| {
            let i = k.let_("i", i);
            let column = k.let_("column", chunk * wide);
            let r = k.let_("r", row(i.clone()));
            let left = (Expr::from(shape.d) - column.clone()).max(0i64).min(wide);
            k.copy((tile_q, &[i, column.clone()]), (q, &[time(r.clone()), query(r), column]), left);
        });
        let ty = if mma { Type::f32(4) } else { Type::f32(1) };
        let dims = |blocks: usize| if mma { vec![blocks] } else { vec![blocks, 4] };
        let one = Type::f32(1);
        let queries =
            (s.hold == 1 && mma).then(|| k.reg("queries", Type::Vector { dtype, lanes: 8 }, &[d / 16], None));
        let tile = Tile {
            s,
            d,
            scale,
            k: k_in,
            v: v_in,
            tile_q,
            tile_k,
            tile_v,
            weights,
            lane: warp.lane.clone(),
            warp_row: k.let_("warp_row", warp.number.clone() * 16usize),
            queries,
            scores: k.reg("scores", ty, &dims(s.keys / 8), None),
            sums: k.reg("sums", ty, &dims(d / 8), Some(Expr::f32(0.0, ty.lanes()))),
            seen: k.reg("seen", Type::Index, &[2], Some(Expr::Int(0))),
            highest: k.reg("highest", one, &[2], Some(Expr::f32(f64::NEG_INFINITY, 1))),
            total: k.reg("total", one, &[2], Some(Expr::f32(0.0, 1))),
            head: head.clone(),
            shape,
        };
        let mine = |half: usize| tile.warp_row.clone() + tile.lane.clone() / 4usize + 8 * half;
        for half in 0..2usize {
            let seen = if causal { position(k, row(mine(half))) } else { k.get(most, &[]).index() };
            k.set(tile.seen, &[half.into()], seen);
        }
        tile.fetch(k, Expr::Int(0), Expr::Int(0));
        k.commit();
        let body = |k: &mut Builder, at: Expr, masked: bool| {
            // Everybody is done with the tile before, whose place the next one takes.
            k.sync();
            let next = k.let_("next", at.clone() + 1usize);
            k.if_(next.clone().compare(Compare::Lt, end.clone()), |k| {
                tile.fetch(k, next.clone() % 2usize, next.clone());
            });
            k.commit();
            k.wait(1);
            k.sync();
            let stage = k.let_("stage", at.clone() % 2usize);
            if mma {
                tile.scores_mma(k, &stage, &at)
            } else {
                tile.scores_fma(k, &stage)
            }
            tile.softmax(k, &at, masked);
            if mma { tile.sums_mma(k, &stage) } else { tile.sums_fma(k, &stage) }
        };
        k.for_("tile", 0usize, whole.clone(), 1, |k, at| body(k, at, false));
        k.for_("tile", whole, end.clone(), 1, |k, at| body(k, at, true));

        // The four threads of a row have parts of its sum.
        for half in 0..2usize {
            let mut total = k.get(tile.total, &[half.into()]);
            for mask in [1, 2] {
                let part = k.let_("part", total);
                total = part.clone() + part.shuffle(mask);
            }
            let total = k.let_("whole", total);
            let r = k.let_("r", first.clone() + mine(half));
            k.if_(r.clone().compare(Compare::Lt, all_rows.clone()), |k| {
                k.unroll("j", tile.d / 8, |k, j| {
                    let column = k.let_("column", j.clone() * 8usize + tile.lane.clone() % 4usize * 2usize);
                    let sum = tile.pair(k, tile.sums, &j, half);
                    let share = Expr::Arith(
                        crate::kernel::Arith::Div,
                        Box::new(sum),
                        Box::new(total.clone().splat(2)),
                    );
                    let at = [time(r.clone()), query(r.clone()), column.clone()];
                    let store = |k: &mut Builder| k.store(out, &at, share);
                    match tile.d == tile.shape.d {
                        true => store(k),
                        false => k.if_(column.compare(Compare::Lt, tile.shape.d), store),
                    }
                });
            });
        }
        // The next turn copies over what others may still read.
        k.sync();
    });
    Ok(l.finish())
}

fn i32s() -> Type {
    Type::Vector { dtype: DType::I32, lanes: 1 }
}

fn int(value: i32) -> Expr {
    Expr::Const { value: value.into(), ty: i32s() }
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

impl Tile {
    /// Begins to copy a tile of keys and values to a stage. Every slot of a cache holds numbers; what a row does not see, the
    /// mask removes.
    fn fetch(&self, k: &mut Builder, stage: Expr, tile: Expr) {
        let wide = chunk(self.shape.dtype);
        for (to, from) in [(self.tile_k, self.k), (self.tile_v, self.v)] {
            copies(k, self.s.keys, self.d / wide, self.s.warps, |k, key, chunk| {
                let key = k.let_("key", key);
                let column = k.let_("column", chunk * wide);
                let slot = k.let_("slot", tile.clone() * self.s.keys + key.clone());
                let left = (Expr::from(self.shape.d) - column.clone()).max(0i64).min(wide);
                let at = [stage.clone(), key, column.clone()];
                k.copy((to, &at), (from, &[self.head.clone(), slot, column]), left);
            });
        }
    }

    /// The two elements of a row's `half` of block `j`.
    fn pair(&self, k: &Builder, reg: RegId, j: &Expr, half: usize) -> Expr {
        match self.weights {
            None => k.get(reg, std::slice::from_ref(j)).lanes(2 * half as u16, 2),
            Some(_) => {
                let one = |e: usize| k.get(reg, &[j.clone(), (2 * half + e).into()]);
                one(0).join(one(1))
            }
        }
    }

    /// Sets both pairs of block `j`.
    fn set_pairs(&self, k: &mut Builder, reg: RegId, j: &Expr, pairs: [Expr; 2]) {
        let [low, high] = pairs;
        if self.weights.is_none() {
            return k.set(reg, std::slice::from_ref(j), low.join(high));
        }
        for (half, pair) in [low, high].into_iter().enumerate() {
            let pair = k.let_("pair", pair);
            for e in 0..2usize {
                k.set(reg, &[j.clone(), (2 * half + e).into()], pair.clone().lanes(e as u16, 1));
            }
        }
    }

    /// `scores = q k^T`, by `mma`.
    fn scores_mma(&self, k: &mut Builder, stage: &Expr, tile: &Expr) {
        let lane = self.lane.clone();
        let row = k.let_("row", self.warp_row.clone() + lane.clone() % 16usize);
        let deep = k.let_("deep", lane.clone() / 16usize * 8usize);
        let query = |k: &Builder, at: &Expr| {
            k.matrix(self.tile_q, &[row.clone(), at.clone() * 16usize + deep.clone()], 4, false)
        };
        if let Some(queries) = self.queries {
            k.if_(tile.clone().compare(Compare::Eq, 0usize), |k| {
                k.unroll("d", self.d / 16, |k, at| {
                    let loaded = query(k, &at);
                    k.set(queries, &[at], loaded);
                });
            });
        }
        k.unroll("j", self.s.keys / 8, |k, j| k.set(self.scores, &[j], Expr::f32(0.0, 4)));
        let key = k.let_("key", lane.clone() % 8usize + lane.clone() / 16usize * 8usize);
        let part = k.let_("part", lane / 8usize % 2usize * 8usize);
        k.unroll("d", self.d / 16, |k, at| {
            let left = match self.queries {
                Some(queries) => k.get(queries, std::slice::from_ref(&at)),
                None => query(k, &at),
            };
            let left = k.let_("left", left);
            k.unroll("j", self.s.keys / 16, |k, j| {
                let place =
                    [stage.clone(), j.clone() * 16usize + key.clone(), at.clone() * 16usize + part.clone()];
                let right = k.matrix(self.tile_k, &place, 4, false);
                let right = k.let_("right", right);
                for half in 0..2u16 {
                    let block = [j.clone() * 2usize + i64::from(half)];
                    let b = right.clone().lanes(4 * half, 4);
                    let sum = k.get(self.scores, &block).mma(left.clone(), b);
                    k.set(self.scores, &block, sum);
                }
            });
        });
    }

    /// `scores = q k^T`, by FMA: a thread has two rows and two keys of each 16 by 8.
    fn scores_fma(&self, k: &mut Builder, stage: &Expr) {
        let four = Type::f32(4);
        let row = k.let_("row", self.warp_row.clone() + self.lane.clone() / 4usize);
        let key = k.let_("key", self.lane.clone() % 4usize * 2usize);
        k.unroll("j", self.s.keys / 8, |k, j| {
            k.unroll("e", 4, |k, e| k.set(self.scores, &[j, e], Expr::f32(0.0, 1)));
        });
        let left = k.reg("left", four, &[2], None);
        let right = k.reg("right", four, &[2], None);
        k.for_("deep", 0usize, self.d, 4, |k, deep| {
            k.unroll("h", 2, |k, h| {
                let loaded = k.load(self.tile_q, &[row.clone() + h.clone() * 8usize, deep.clone()], 4);
                k.set(left, &[h], loaded);
            });
            k.unroll("j", self.s.keys / 8, |k, j| {
                k.unroll("e", 2, |k, e| {
                    let at = [stage.clone(), key.clone() + j.clone() * 8usize + e.clone(), deep.clone()];
                    let loaded = k.load(self.tile_k, &at, 4);
                    k.set(right, &[e], loaded);
                });
                k.unroll("h", 2, |k, h| {
                    k.unroll("e", 2, |k, e| {
                        let place = [j.clone(), h.clone() * 2usize + e.clone()];
                        let mut sum = k.get(self.scores, &place);
                        for lane in 0..4 {
                            let x = k.get(left, std::slice::from_ref(&h)).lanes(lane, 1);
                            sum = x.fma(k.get(right, std::slice::from_ref(&e)).lanes(lane, 1), sum);
                        }
                        k.set(self.scores, &place, sum);
                    });
                });
            });
        });
    }

    /// Scores to weights relative to the highest score so far; what was summed before is scaled to it.
    fn softmax(&self, k: &mut Builder, tile: &Expr, masked: bool) {
        let mma = self.weights.is_none();
        // `exp2` takes the scale with it; f32 is scaled first, and has an exponential of its own.
        let scale = if mma { self.scale * std::f64::consts::LOG2_E } else { self.scale };
        let blocks = self.s.keys / 8;
        let first = k.let_("key", tile.clone() * self.s.keys + self.lane.clone() % 4usize * 2usize);
        let shrinks: Vec<Expr> = (0..2usize)
            .map(|half| {
                let seen = k.let_("left", k.get(self.seen, &[half.into()]) - first.clone());
                let most = k.reg("most", Type::f32(2), &[], Some(Expr::f32(f64::NEG_INFINITY, 2)));
                k.unroll("j", blocks, |k, j| {
                    let mut pair = self.pair(k, self.scores, &j, half);
                    if !mma {
                        pair = pair * Expr::f32(scale, 2);
                    }
                    if masked {
                        let left = (seen.clone() - j.clone() * 8usize).max(-1i64).min(2i64);
                        let visible =
                            Expr::Iota { lanes: 2 }.compare(Compare::Le, left.cast(DType::I32).splat(2));
                        pair = visible.select(pair, Expr::f32(f64::NEG_INFINITY, 2));
                    }
                    let pair = k.let_("pair", pair);
                    self.set_half(k, &j, half, pair.clone());
                    let more = k.get(most, &[]).max(pair);
                    k.set(most, &[], more);
                });
                let mut highest = k.get(most, &[]).reduce(crate::op::Reduction::Max);
                for mask in [1, 2] {
                    let part = k.let_("part", highest);
                    highest = part.clone().max(part.shuffle(mask));
                }
                let old = k.let_("old", k.get(self.highest, &[half.into()]));
                let new = k.let_("new", highest.max(old.clone()));
                k.set(self.highest, &[half.into()], new.clone());
                let shrink = match mma {
                    true => ((old - new.clone()) * Expr::f32(scale, 1)).exp2(),
                    false => (old - new.clone()).unary(Unary::Exp),
                };
                let shrink = k.let_("shrink", shrink);
                let from = k.let_("from", if mma { new * Expr::f32(-scale, 1) } else { new });
                let part = k.reg("part", Type::f32(2), &[], Some(Expr::f32(0.0, 2)));
                k.unroll("j", blocks, |k, j| {
                    let pair = self.pair(k, self.scores, &j, half);
                    let weight = match mma {
                        true => pair.fma(Expr::f32(scale, 2), from.clone().splat(2)).exp2(),
                        false => (pair - from.clone().splat(2)).unary(Unary::Exp),
                    };
                    let weight = k.let_("weight", weight);
                    self.set_half(k, &j, half, weight.clone());
                    let more = k.get(part, &[]) + weight;
                    k.set(part, &[], more);
                });
                let sum = k.get(part, &[]).reduce(crate::op::Reduction::Sum);
                let total = k.get(self.total, &[half.into()]).fma(shrink.clone(), sum);
                k.set(self.total, &[half.into()], total);
                shrink
            })
            .collect();
        k.unroll("j", self.d / 8, |k, j| {
            let scaled =
                [0, 1].map(|half| self.pair(k, self.sums, &j, half) * shrinks[half].clone().splat(2));
            self.set_pairs(k, self.sums, &j, scaled);
        });
    }

    /// Sets one pair of a block of scores.
    fn set_half(&self, k: &mut Builder, j: &Expr, half: usize, pair: Expr) {
        let other = self.pair(k, self.scores, j, 1 - half);
        match (self.weights, half) {
            (None, 0) => k.set(self.scores, std::slice::from_ref(j), pair.join(other)),
            (None, _) => k.set(self.scores, std::slice::from_ref(j), other.join(pair)),
            (Some(_), _) => {
                for e in 0..2usize {
                    k.set(self.scores, &[j.clone(), (2 * half + e).into()], pair.clone().lanes(e as u16, 1));
                }
            }
        }
    }

    /// `sums += weights v`, by `mma`: two blocks of scores are the left operand.
    fn sums_mma(&self, k: &mut Builder, stage: &Expr) {
        let lane = self.lane.clone();
        let dtype = self.shape.dtype;
        let key = k.let_("key", lane.clone() % 16usize);
        let part = k.let_("part", lane / 16usize * 8usize);
        k.unroll("s", self.s.keys / 16, |k, s| {
            let [low, high] = [0i64, 1].map(|e| k.get(self.scores, &[s.clone() * 2usize + e]));
            let left = k.let_("left", low.join(high).cast(dtype));
            k.unroll("j", self.d / 16, |k, j| {
                let place =
                    [stage.clone(), s.clone() * 16usize + key.clone(), j.clone() * 16usize + part.clone()];
                let right = k.matrix(self.tile_v, &place, 4, true);
                let right = k.let_("right", right);
                for half in 0..2u16 {
                    let block = [j.clone() * 2usize + i64::from(half)];
                    let b = right.clone().lanes(4 * half, 4);
                    let sum = k.get(self.sums, &block).mma(left.clone(), b);
                    k.set(self.sums, &block, sum);
                }
            });
        });
    }

    /// `sums += weights v`, by FMA, the weights by way of shared memory.
    fn sums_fma(&self, k: &mut Builder, stage: &Expr) {
        let weights = self.weights.expect("f32 has them");
        let row = k.let_("row", self.warp_row.clone() + self.lane.clone() / 4usize);
        let pair = k.let_("pair", self.lane.clone() % 4usize * 2usize);
        k.unroll("j", self.s.keys / 8, |k, j| {
            for half in 0..2usize {
                let value = self.pair(k, self.scores, &j, half);
                k.store(weights, &[row.clone() + 8 * half, j.clone() * 8usize + pair.clone()], value);
            }
        });
        k.sync();
        k.for_("s", 0usize, self.s.keys, 1, |k, s| {
            let weight = [0usize, 1].map(|half| {
                let loaded = k.load(weights, &[row.clone() + 8 * half, s.clone()], 1);
                k.let_("weight", loaded)
            });
            k.unroll("j", self.d / 8, |k, j| {
                let value =
                    k.load(self.tile_v, &[stage.clone(), s.clone(), j.clone() * 8usize + pair.clone()], 2);
                let value = k.let_("value", value);
                for (half, weight) in weight.iter().enumerate() {
                    for e in 0..2u16 {
                        let place = [j.clone(), (2 * half + usize::from(e)).into()];
                        let sum = weight.clone().fma(value.clone().lanes(e, 1), k.get(self.sums, &place));
                        k.set(self.sums, &place, sum);
                    }
                }
            });
        });
    }
}
