//! Tiles of an attention: rows of queries against tiles of keys, for [`super::flash`] and [`super::decode`].
//!
//! A row is a position and a query head; the heads that share a KV head are rows beside each other, so that a tile of keys
//! serves them all. A CTA does a tile of rows, 16 or 32 a warp, against tiles of `keys`, which pass through a ring of two in
//! shared memory: while one is multiplied, the next is copied. Scores stay in registers: their layout as sums of one product is
//! that of the left operand of the next. Of each 16 rows of its warp a thread has two rows' maxima and sums; a row's four
//! threads exchange them by shuffles.
//!
//! A warp reads all keys and values from shared memory. With 16 rows that takes as long as the tensor cores do; two strips of 16
//! share what is read, and it takes half.
//!
//! Tiles in which every row sees every key need no mask; the last tiles compare positions. Rows of a head are padded with zeros
//! to 16. bf16 and f16 are multiplied by `mma`, with `exp2` and the scale folded into it; f32 by FMA, through weights in shared
//! memory.

use super::softmax::{Blocks, Ends, Operands, Positions, Results, Rows, Softmax, operands};
use super::{AttentionTile, chunk, copies};
use crate::dtype::DType;
use crate::families::access::{Lowering, Warp, paged};
use crate::families::attention::{Shape, shape_of};
use crate::families::{GroupView, LowerError};
use crate::kernel::{BufferId, Builder, Expr, RegId, Type, WARP};
use crate::op::{Compare, Op};
use crate::schedule::{self, Field};
use crate::target::Gpu;

/// Tile sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Warps of a CTA.
    pub warps: usize,
    /// Rows of a warp: 16 or 32.
    pub rows: usize,
    /// Keys of a tile.
    pub keys: usize,
    /// Do queries stay in registers (1), or are they read anew for each tile (0)?
    pub hold: usize,
    /// Keys that a CTA takes, whole tiles of them: the next ones are another's. 0: it takes all.
    pub split: usize,
}

impl Schedule {
    /// The fields, for text, tuning and the numeric class: maxima are taken tile by tile, sums split by split.
    pub fn fields(self) -> [Field; 5] {
        let Schedule { warps, rows, keys, hold, split } = self;
        let field = |name, value, numeric| Field { name, value, numeric };
        [
            field("warps", warps, false),
            field("rows", rows, false),
            field("keys", keys, true),
            field("hold", hold, false),
            field("split", split, true),
        ]
    }

    /// Reads the text form.
    ///
    /// # Errors
    ///
    /// What does not fit, in words.
    pub fn parse(text: &str) -> Result<Schedule, String> {
        let mut fields = Schedule { warps: 0, rows: 0, keys: 0, hold: 0, split: 0 }.fields();
        schedule::parse(text, &mut fields)?;
        let [warps, rows, keys, hold, split] = fields.map(|f| f.value);
        let fits = (1..=16).contains(&warps) && matches!(rows, 16 | 32) && matches!(keys, 16 | 32 | 64);
        match fits && hold <= 1 && split % keys == 0 {
            true => Ok(Schedule { warps, rows, keys, hold, split }),
            false => Err("warps must be 1 to 16, rows 16 or 32, keys 16, 32 or 64, hold 0 or 1, split a multiple of keys"
                .to_string()),
        }
    }

    /// How an attention is cut.
    pub fn tile(self) -> AttentionTile {
        AttentionTile { rows: self.of_cta(), keys: self.keys, split: self.split }
    }

    /// Rows of a CTA.
    fn of_cta(self) -> usize {
        self.warps * self.rows
    }

    /// Is it for two strips a warp? There must be rows for four warps, and registers: ptxas spills 24 bytes with a head of 96 and
    /// 64 keys, 200 with 128, and none with 80.
    fn shares(self, shape: &Shape, steps: usize) -> bool {
        let enough = 4 * self.rows <= steps * shape.per_kv;
        enough
            && self.split == 0
            && shape.dtype != DType::F32
            && shape.d <= 128
            && padded(shape.d) + 2 * self.keys <= 208
    }

    /// Bytes of shared memory of a CTA.
    fn shared_bytes(self, shape: &Shape) -> usize {
        let Shape { d, dtype, .. } = *shape;
        let pitch = padded(d) + chunk(dtype);
        let rows = |rows: usize, pitch: usize| (rows * pitch * dtype.bytes(1)).next_multiple_of(128);
        let weights = if dtype == DType::F32 { rows(self.of_cta(), self.keys + 4) } else { 0 };
        rows(self.of_cta(), pitch) + 2 * rows(2 * self.keys, pitch) + weights
    }
}

/// Columns of a head in shared memory.
fn padded(d: usize) -> usize {
    d.next_multiple_of(16)
}

/// Steps that a GPU's tiles of rows do not fill: for these the keys are split.
const FEW: usize = 16;

/// Copies of a tile of keys that a thread should do at most: with more, some registers of a head of 128 are spilled.
const MOST_COPIES: usize = 16;

/// Keys of a split, the preferred first: with 8 KV heads and 8192 positions the first makes 256 CTAs.
const SPLITS: [usize; 2] = [256, 512];

/// The legal space, the preferred first: as many rows as a step has and shared memory holds.
///
/// # Errors
///
/// When these kernels do not cover the group.
pub fn schedules(view: &GroupView<'_>, gpu: &Gpu) -> Result<Vec<String>, LowerError> {
    let shape = covered(view)?;
    let steps = view.graph.symbols.max()[0] as usize;
    let splits = SPLITS.into_iter().filter(|&split| steps <= FEW && split < shape.slots);
    let mut found = Vec::new();
    for split in splits.chain([0]) {
        for rows in [32, 16] {
            for keys in [64, 32, 16] {
                for warps in [4, 8, 2, 1] {
                    // Queries of a head in registers beside its sums: no more than half of them, and of one strip alone.
                    let hold = usize::from(rows == 16 && shape.d <= 128 && shape.dtype != DType::F32);
                    let schedule = Schedule { warps, rows, keys, hold, split };
                    if schedule.shared_bytes(&shape) <= gpu.shared_bytes
                        && (warps == 1 || schedule.of_cta() < 2 * steps * shape.per_kv)
                        && (rows == 16 || schedule.shares(&shape, steps))
                    {
                        found.push(schedule);
                    }
                }
            }
        }
    }
    // A thread has the address of each of its copies in registers.
    let copies = |s: &Schedule| s.keys * padded(shape.d) / chunk(shape.dtype) / (s.warps * usize::from(WARP));
    found.sort_by_key(|s| copies(s) > MOST_COPIES);
    let found: Vec<String> = found.into_iter().map(|s| schedule::print(&s.fields())).collect();
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

/// An attention's operands, and its memory in a CTA.
pub(super) struct Attention {
    pub s: Schedule,
    pub shape: Shape,
    pub causal: bool,
    pub positions: Positions,
    pub scale: f64,
    pub to: Results,
    /// Columns of a head in shared memory.
    pub d: usize,
    /// In global memory: `[position, head, column]`, and `[page, head, slot, column]`.
    q: BufferId,
    k: BufferId,
    v: BufferId,
    /// In shared memory: `[row, column]`, `[2, key, column]`, and for f32 weights `[row, key]`.
    tile_q: BufferId,
    tile_k: BufferId,
    tile_v: BufferId,
    weights: Option<BufferId>,
    warp: Warp,
}

impl Attention {
    /// Binds the operands of a group's kernel, and allots its shared memory.
    ///
    /// # Errors
    ///
    /// Where shapes are symbolic behind the first axis, a dtype or head is not covered, or the schedule does not fit.
    pub fn bind(l: &mut Lowering<'_, '_>, s: Schedule) -> Result<Attention, LowerError> {
        let view = l.view;
        let shape = covered(view)?;
        let Shape { slots, dtype, .. } = shape;
        let Op::Attention { causal, scale } = view.graph[view.values[0]].op else {
            unreachable!("shape_of looked")
        };
        if slots % s.keys != 0 {
            return Err(
                view.unsupported(format!("a cache of {slots} slots, not whole tiles of {} keys", s.keys))
            );
        }
        let Operands { q, k, v, pos, to } = operands(l)?;
        let (d, bm) = (padded(shape.d), s.of_cta());
        let pitch = d + chunk(dtype);
        let tile_q = l.k.shared("tile_q", dtype, &[bm, d], pitch);
        let tile_k = l.k.shared("tile_k", dtype, &[2, s.keys, d], pitch);
        let tile_v = l.k.shared("tile_v", dtype, &[2, s.keys, d], pitch);
        let weights =
            (dtype == DType::F32).then(|| l.k.shared("weights", DType::F32, &[bm, s.keys], s.keys + 4));
        let warp = l.warp();
        let positions = Positions { pos, lane: warp.lane.clone() };
        Ok(Attention {
            s,
            shape,
            causal,
            positions,
            scale,
            to,
            d,
            q,
            k,
            v,
            tile_q,
            tile_k,
            tile_v,
            weights,
            warp,
        })
    }

    /// Rows of a CTA.
    pub fn count(&self) -> usize {
        self.s.of_cta()
    }

    /// Is it computed by FMA?
    pub fn fma(&self) -> bool {
        self.weights.is_some()
    }
}

/// What a thread knows of its tile.
pub(super) struct Tile<'a> {
    a: &'a Attention,
    pub lane: Expr,
    /// The KV head.
    head: Expr,
    /// First row of this warp in the tile.
    warp_row: Expr,
    /// Queries, as left operands: `[strip, d / 16]`.
    queries: Option<RegId>,
    pub strips: Vec<Strip>,
}

/// 16 rows of a warp.
pub(super) struct Strip {
    /// First row of this thread in the tile.
    pub row: Expr,
    pub softmax: Softmax,
    /// By 8 columns each.
    pub sums: Blocks,
}

impl<'a> Tile<'a> {
    /// Takes rows through tiles `begin` to `end` of the keys; from `masked` on it compares positions.
    pub fn run(
        k: &mut Builder,
        a: &'a Attention,
        (rows, ends): (&Rows, &Ends),
        [begin, masked, end]: [Expr; 3],
    ) -> Tile<'a> {
        let Attention { s, d, shape, .. } = *a;
        // Queries to shared memory; they arrive with the first tile of keys.
        let wide = chunk(shape.dtype);
        copies(k, s.of_cta(), d / wide, s.warps, |k, i, chunk| {
            let i = k.let_("i", i);
            let column = k.let_("column", chunk * wide);
            let r = k.let_("r", rows.existing(i.clone()));
            let left = (Expr::from(shape.d) - column.clone()).max(0i64).min(wide);
            let [t, head] = rows.place(r);
            k.copy((a.tile_q, &[i, column.clone()]), (a.q, &[t, head, column]), left);
        });
        let (mma, dtype, lane) = (!a.fma(), shape.dtype, a.warp.lane.clone());
        let count = s.rows / 16;
        let fragment = Type::Vector { dtype, lanes: 8 };
        let queries = (s.hold == 1 && mma).then(|| k.reg("queries", fragment, &[count, d / 16], None));
        let warp_row = k.let_("warp_row", a.warp.number.clone() * s.rows);
        let strips = (0..count).map(|n| {
            let row = k.let_("mine", warp_row.clone() + 16 * n + lane.clone() / 4usize);
            let scores = Blocks::new(k, "scores", s.keys / 8, !mma, None);
            let sums = Blocks::new(k, "sums", d / 8, !mma, Some(0.0));
            let softmax = Softmax::new(k, rows, ends, (&row, &lane), s.keys, a.scale, scores);
            Strip { row, softmax, sums }
        });
        let strips = strips.collect();
        let tile = Tile { a, lane, head: rows.head.clone(), warp_row, queries, strips };
        tile.fetch(k, begin.clone() % 2usize, begin.clone());
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
            match mma {
                true => tile.scores_mma(k, &stage, &at, &begin),
                false => tile.strips.iter().for_each(|strip| tile.scores_fma(k, &stage, strip)),
            }
            for strip in &tile.strips {
                let shrinks = strip.softmax.weights(k, &at, masked);
                strip.sums.scale(k, d / 8, &shrinks);
            }
            match mma {
                true => tile.sums_mma(k, &stage),
                false => tile.strips.iter().for_each(|strip| tile.sums_fma(k, &stage, strip)),
            }
        };
        k.for_("tile", begin.clone(), masked.clone(), 1, |k, at| body(k, at, false));
        k.for_("tile", masked, end.clone(), 1, |k, at| body(k, at, true));
        tile
    }
}

impl Tile<'_> {
    /// Begins to copy a tile of keys and values to a stage. Every slot of a cache holds numbers; what a row does not see, the
    /// mask removes.
    fn fetch(&self, k: &mut Builder, stage: Expr, tile: Expr) {
        let wide = chunk(self.a.shape.dtype);
        for (to, from) in [(self.a.tile_k, self.a.k), (self.a.tile_v, self.a.v)] {
            copies(k, self.a.s.keys, self.a.d / wide, self.a.s.warps, |k, key, chunk| {
                let key = k.let_("key", key);
                let column = k.let_("column", chunk * wide);
                let slot = k.let_("slot", tile.clone() * self.a.s.keys + key.clone());
                let left = (Expr::from(self.a.shape.d) - column.clone()).max(0i64).min(wide);
                let at = [stage.clone(), key, column.clone()];
                let there = paged(&k.kernel()[from].shape, self.head.clone(), slot, column);
                k.copy((to, &at), (from, &there), left);
            });
        }
    }

    /// `scores = q k^T`, by `mma`.
    fn scores_mma(&self, k: &mut Builder, stage: &Expr, tile: &Expr, begin: &Expr) {
        let lane = self.lane.clone();
        let row = k.let_("row", self.warp_row.clone() + lane.clone() % 16usize);
        let deep = k.let_("deep", lane.clone() / 16usize * 8usize);
        let query = |k: &Builder, strip: usize, at: &Expr| {
            let place = [row.clone() + 16 * strip, at.clone() * 16usize + deep.clone()];
            k.matrix(self.a.tile_q, &place, 4, false)
        };
        let strips = self.strips.len();
        if let Some(queries) = self.queries {
            k.if_(tile.clone().compare(Compare::Eq, begin.clone()), |k| {
                k.unroll("d", self.a.d / 16, |k, at| {
                    for strip in 0..strips {
                        let loaded = query(k, strip, &at);
                        k.set(queries, &[strip.into(), at.clone()], loaded);
                    }
                });
            });
        }
        for strip in &self.strips {
            let scores = strip.softmax.scores.reg;
            k.unroll("j", self.a.s.keys / 8, |k, j| k.set(scores, &[j], Expr::f32(0.0, 4)));
        }
        let key = k.let_("key", lane.clone() % 8usize + lane.clone() / 16usize * 8usize);
        let part = k.let_("part", lane / 8usize % 2usize * 8usize);
        k.unroll("d", self.a.d / 16, |k, at| {
            let lefts: Vec<Expr> = (0..strips)
                .map(|strip| {
                    let left = match self.queries {
                        Some(queries) => k.get(queries, &[strip.into(), at.clone()]),
                        None => query(k, strip, &at),
                    };
                    k.let_("left", left)
                })
                .collect();
            k.unroll("j", self.a.s.keys / 16, |k, j| {
                let place =
                    [stage.clone(), j.clone() * 16usize + key.clone(), at.clone() * 16usize + part.clone()];
                let right = k.matrix(self.a.tile_k, &place, 4, false);
                let right = k.let_("right", right);
                for half in 0..2u16 {
                    let block = [j.clone() * 2usize + i64::from(half)];
                    let b = right.clone().lanes(4 * half, 4);
                    for (strip, left) in self.strips.iter().zip(&lefts) {
                        let scores = strip.softmax.scores.reg;
                        let sum = k.get(scores, &block).mma(left.clone(), b.clone());
                        k.set(scores, &block, sum);
                    }
                }
            });
        });
    }

    /// `scores = q k^T`, by FMA: a thread has two rows and two keys of each 16 by 8.
    fn scores_fma(&self, k: &mut Builder, stage: &Expr, strip: &Strip) {
        let four = Type::f32(4);
        let (row, scores) = (&strip.row, strip.softmax.scores.reg);
        let key = k.let_("key", self.lane.clone() % 4usize * 2usize);
        k.unroll("j", self.a.s.keys / 8, |k, j| {
            k.unroll("e", 4, |k, e| k.set(scores, &[j, e], Expr::f32(0.0, 1)));
        });
        let left = k.reg("left", four, &[2], None);
        let right = k.reg("right", four, &[2], None);
        k.for_("deep", 0usize, self.a.d, 4, |k, deep| {
            k.unroll("h", 2, |k, h| {
                let loaded = k.load(self.a.tile_q, &[row.clone() + h.clone() * 8usize, deep.clone()], 4);
                k.set(left, &[h], loaded);
            });
            k.unroll("j", self.a.s.keys / 8, |k, j| {
                k.unroll("e", 2, |k, e| {
                    let at = [stage.clone(), key.clone() + j.clone() * 8usize + e.clone(), deep.clone()];
                    let loaded = k.load(self.a.tile_k, &at, 4);
                    k.set(right, &[e], loaded);
                });
                k.unroll("h", 2, |k, h| {
                    k.unroll("e", 2, |k, e| {
                        let place = [j.clone(), h.clone() * 2usize + e.clone()];
                        let mut sum = k.get(scores, &place);
                        for lane in 0..4 {
                            let x = k.get(left, std::slice::from_ref(&h)).lanes(lane, 1);
                            sum = x.fma(k.get(right, std::slice::from_ref(&e)).lanes(lane, 1), sum);
                        }
                        k.set(scores, &place, sum);
                    });
                });
            });
        });
    }

    /// `sums += weights v`, by `mma`: two blocks of scores are the left operand.
    fn sums_mma(&self, k: &mut Builder, stage: &Expr) {
        let lane = self.lane.clone();
        let dtype = self.a.shape.dtype;
        let key = k.let_("key", lane.clone() % 16usize);
        let part = k.let_("part", lane / 16usize * 8usize);
        k.unroll("s", self.a.s.keys / 16, |k, s| {
            let left = |k: &mut Builder, strip: &Strip| {
                let block = |e: i64| k.get(strip.softmax.scores.reg, &[s.clone() * 2usize + e]);
                let left = block(0).join(block(1)).cast(dtype);
                k.let_("left", left)
            };
            let lefts: Vec<Expr> = self.strips.iter().map(|strip| left(k, strip)).collect();
            k.unroll("j", self.a.d / 16, |k, j| {
                let place =
                    [stage.clone(), s.clone() * 16usize + key.clone(), j.clone() * 16usize + part.clone()];
                let right = k.matrix(self.a.tile_v, &place, 4, true);
                let right = k.let_("right", right);
                for half in 0..2u16 {
                    let block = [j.clone() * 2usize + i64::from(half)];
                    let b = right.clone().lanes(4 * half, 4);
                    for (strip, left) in self.strips.iter().zip(&lefts) {
                        let sum = k.get(strip.sums.reg, &block).mma(left.clone(), b.clone());
                        k.set(strip.sums.reg, &block, sum);
                    }
                }
            });
        });
    }

    /// `sums += weights v`, by FMA, the weights by way of shared memory.
    fn sums_fma(&self, k: &mut Builder, stage: &Expr, strip: &Strip) {
        let weights = self.a.weights.expect("f32 has them");
        let (row, sums) = (&strip.row, strip.sums.reg);
        let pair = k.let_("pair", self.lane.clone() % 4usize * 2usize);
        k.unroll("j", self.a.s.keys / 8, |k, j| {
            for half in 0..2usize {
                let value = strip.softmax.scores.pair(k, &j, half);
                k.store(weights, &[row.clone() + 8 * half, j.clone() * 8usize + pair.clone()], value);
            }
        });
        k.sync();
        k.for_("s", 0usize, self.a.s.keys, 1, |k, s| {
            let weight = [0usize, 1].map(|half| {
                let loaded = k.load(weights, &[row.clone() + 8 * half, s.clone()], 1);
                k.let_("weight", loaded)
            });
            k.unroll("j", self.a.d / 8, |k, j| {
                let value =
                    k.load(self.a.tile_v, &[stage.clone(), s.clone(), j.clone() * 8usize + pair.clone()], 2);
                let value = k.let_("value", value);
                for (half, weight) in weight.iter().enumerate() {
                    for e in 0..2u16 {
                        let place = [j.clone(), (2 * half + usize::from(e)).into()];
                        let sum = weight.clone().fma(value.clone().lanes(e, 1), k.get(sums, &place));
                        k.set(sums, &place, sum);
                    }
                }
            });
        });
    }
}
