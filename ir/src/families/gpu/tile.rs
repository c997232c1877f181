//! Tiles of an attention: rows of queries against tiles of keys, for [`super::flash`] and [`super::decode`].
//!
//! A row is a position and a query head; the heads that share a KV head are rows beside each other, so that a tile of keys
//! serves them all. A CTA does a tile of rows, 16 a warp, against tiles of `keys`, which pass through a ring of two in shared
//! memory: while one is multiplied, the next is copied. Scores stay in registers: their layout as sums of one product is that
//! of the left operand of the next. Each thread has two rows' maxima and sums; a row's four threads exchange them by shuffles.
//!
//! Tiles in which every row sees every key need no mask; the last tiles compare positions. Rows of a head are padded with zeros
//! to 16. bf16 and f16 are multiplied by `mma`, with `exp2` and the scale folded into it; f32 by FMA, through weights in shared
//! memory.

use super::chunk;
use crate::dtype::DType;
use crate::families::access::{Lowering, Warp};
use crate::families::attention::{Shape, shape_of};
use crate::families::{GroupView, LowerError, storage};
use crate::kernel::{Access, BufferId, Builder, Expr, RegId, Type, WARP};
use crate::op::{Compare, Op, Reduction, Unary};
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
    /// Keys that a CTA takes, whole tiles of them: the next ones are another's. 0: it takes all.
    pub split: usize,
}

impl Schedule {
    /// The fields, for text, tuning and the numeric class: maxima are taken tile by tile, sums split by split.
    pub fn fields(self) -> [Field; 4] {
        let Schedule { warps, keys, hold, split } = self;
        let field = |name, value, numeric| Field { name, value, numeric };
        [
            field("warps", warps, false),
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
        let mut fields = Schedule { warps: 0, keys: 0, hold: 0, split: 0 }.fields();
        schedule::parse(text, &mut fields)?;
        let [warps, keys, hold, split] = fields.map(|f| f.value);
        match (1..=16).contains(&warps) && matches!(keys, 16 | 32 | 64) && hold <= 1 && split % keys == 0 {
            true => Ok(Schedule { warps, keys, hold, split }),
            false => {
                Err("warps must be 1 to 16, keys 16, 32 or 64, hold 0 or 1, split a multiple of keys"
                    .to_string())
            }
        }
    }

    /// Bytes of shared memory of a CTA.
    fn shared_bytes(self, shape: &Shape) -> usize {
        let Shape { d, dtype, .. } = *shape;
        let pitch = padded(d) + chunk(dtype);
        let rows = |rows: usize, pitch: usize| (rows * pitch * dtype.bytes(1)).next_multiple_of(128);
        let weights = if dtype == DType::F32 { rows(16 * self.warps, self.keys + 4) } else { 0 };
        rows(16 * self.warps, pitch) + 2 * rows(2 * self.keys, pitch) + weights
    }
}

/// Columns of a head in shared memory.
fn padded(d: usize) -> usize {
    d.next_multiple_of(16)
}

/// Steps that a GPU's tiles of rows do not fill: for these the keys are split.
const FEW: usize = 16;

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
        for keys in [64, 32, 16] {
            for warps in [4, 8, 2, 1] {
                // Queries of a head in registers beside its sums: no more than half of them.
                let hold = usize::from(shape.d <= 128 && shape.dtype != DType::F32);
                let schedule = Schedule { warps, keys, hold, split };
                if schedule.shared_bytes(&shape) <= gpu.shared_bytes
                    && (warps == 1 || 16 * warps < 2 * steps * shape.per_kv)
                {
                    found.push(schedule::print(&schedule.fields()));
                }
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

/// An attention's operands, and its memory in a CTA.
pub(super) struct Attention {
    pub s: Schedule,
    pub shape: Shape,
    pub causal: bool,
    /// Columns of a head in shared memory.
    pub d: usize,
    scale: f64,
    /// In global memory: `[position, head, column]`, and `[head, slot, column]`.
    q: BufferId,
    k: BufferId,
    v: BufferId,
    pos: BufferId,
    out: BufferId,
    /// The logarithms of the sums, `[position, head]`, if they are wanted.
    lse: Option<BufferId>,
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
        let operands = view.graph[view.values[0]].operands.clone();
        if [1, 2].iter().any(|&n| view.graph[storage(view.graph, operands[n])].layout.is_some()) {
            return Err(view.unsupported("a cache in panels"));
        }
        let q = l.tensor("q", operands[0], Access::Read);
        let (k, v) = (l.tensor("k", operands[1], Access::Read), l.tensor("v", operands[2], Access::Read));
        let pos = l.tensor("pos", operands[3], Access::Read);
        let out = l.tensor("out", view.values[0], Access::Write);
        let lse = view.values.get(1).map(|&lse| l.tensor("lse", lse, Access::Write));
        let (d, bm) = (padded(shape.d), 16 * s.warps);
        let pitch = d + chunk(dtype);
        let tile_q = l.k.shared("tile_q", dtype, &[bm, d], pitch);
        let tile_k = l.k.shared("tile_k", dtype, &[2, s.keys, d], pitch);
        let tile_v = l.k.shared("tile_v", dtype, &[2, s.keys, d], pitch);
        let weights =
            (dtype == DType::F32).then(|| l.k.shared("weights", DType::F32, &[bm, s.keys], s.keys + 4));
        let warp = l.warp();
        Ok(Attention {
            s,
            shape,
            causal,
            d,
            scale,
            q,
            k,
            v,
            pos,
            out,
            lse,
            tile_q,
            tile_k,
            tile_v,
            weights,
            warp,
        })
    }

    /// Rows of a KV head.
    pub fn all_rows(&self) -> Expr {
        Expr::from(self.shape.steps) * self.shape.per_kv
    }

    /// Tiles that they are.
    pub fn tiles(&self) -> Expr {
        let bm = 16 * self.s.warps;
        (self.all_rows() + (bm - 1)) / bm
    }

    /// The position at a step, which is the last key that it sees.
    pub fn position(&self, k: &Builder, step: Expr) -> Expr {
        k.load(self.pos, &[step], 1)
    }

    /// The largest and the smallest position of so many steps, in every thread.
    pub fn most_and_least(&self, k: &mut Builder, count: Expr, step: impl Fn(Expr) -> Expr) -> [Expr; 2] {
        let most = k.reg("most", i32s(), &[], Some(int(0)));
        let least = k.reg("least", i32s(), &[], Some(int(i32::MAX)));
        k.for_("i", self.warp.lane.clone(), count, WARP.into(), |k, i| {
            let at = self.position(k, step(i));
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
        [most, least].map(|reg| k.get(reg, &[]).index())
    }

    /// The tile of rows of a KV head that begins with row `first`.
    pub fn rows(&self, k: &mut Builder, head: Expr, first: Expr) -> Rows<'_> {
        let bm = 16 * self.s.warps;
        let last = self.all_rows() - 1usize;
        let step = |i: Expr| (first.clone() + i).min(last.clone()) / self.shape.per_kv;
        // Every thread learns the last key that any row of the tile sees, and the last that all do.
        let [most, least] = match self.causal {
            true => self.most_and_least(k, Expr::from(bm), step),
            false => self.most_and_least(k, Expr::from(self.shape.steps), |i| i),
        };
        let end = k.let_("end", most.clone() / self.s.keys + 1usize);
        let whole = if self.causal { least } else { most.clone() } + 1usize;
        let whole = k.let_("whole", whole / self.s.keys);
        Rows { a: self, head, first, most, end, whole }
    }

    /// By what scores are multiplied: `exp2` takes the scale with it; f32 is scaled first, and has an exponential of its own.
    fn factor(&self) -> f64 {
        if self.weights.is_none() { self.scale * std::f64::consts::LOG2_E } else { self.scale }
    }

    /// What weights relative to the score `old` are multiplied by, to be relative to the higher score `new`.
    pub fn decay(&self, old: Expr, new: Expr) -> Expr {
        match self.weights {
            None => ((old - new) * Expr::f32(self.factor(), 1)).exp2(),
            Some(_) => (old - new).unary(Unary::Exp),
        }
    }

    /// Stores the logarithm of a row's sum where it is wanted and `first` holds: its weights are relative to the highest score.
    pub fn store_lse(&self, k: &mut Builder, first: Expr, at: [Expr; 2], highest: Expr, total: Expr) {
        let Some(lse) = self.lse else { return };
        k.if_(first, |k| {
            let sum = total.unary(Unary::Log);
            let whole = match self.weights {
                None => highest.fma(Expr::f32(self.scale, 1), sum),
                Some(_) => highest + sum,
            };
            k.store(lse, &at, whole);
        });
    }

    /// Stores two of so many columns of a row, if the head has them: their sums by the sum of the weights.
    pub fn store(&self, k: &mut Builder, columns: usize, at: [Expr; 3], sum: Expr, total: Expr) {
        let store = |k: &mut Builder| k.store(self.out, &at, sum / total.splat(2));
        match columns == self.shape.d {
            true => store(k),
            false => k.if_(at[2].clone().compare(Compare::Lt, self.shape.d), store),
        }
    }
}

/// A tile of rows, and which keys it sees.
pub(super) struct Rows<'a> {
    a: &'a Attention,
    /// The KV head.
    head: Expr,
    /// First row.
    first: Expr,
    /// The last key that any row sees.
    most: Expr,
    /// Tiles of keys of which a row sees any, and of which all rows see all.
    pub end: Expr,
    pub whole: Expr,
}

impl Rows<'_> {
    /// A row of the KV head; beyond the last it is the last again.
    fn row(&self, i: Expr) -> Expr {
        (self.first.clone() + i).min(self.a.all_rows() - 1usize)
    }

    fn step(&self, row: Expr) -> Expr {
        row / self.a.shape.per_kv
    }

    fn query(&self, row: Expr) -> Expr {
        self.head.clone() * self.a.shape.per_kv + row % self.a.shape.per_kv
    }
}

/// What a thread knows of its tile.
pub(super) struct Tile<'a> {
    a: &'a Attention,
    lane: Expr,
    /// The KV head.
    head: Expr,
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

impl<'a> Tile<'a> {
    /// Takes rows through tiles `begin` to `end` of the keys; from `masked` on it compares positions.
    pub fn run(k: &mut Builder, rows: &Rows<'a>, [begin, masked, end]: [Expr; 3]) -> Tile<'a> {
        let a = rows.a;
        let Attention { s, d, shape, .. } = *a;
        // Queries to shared memory; they arrive with the first tile of keys.
        let wide = chunk(shape.dtype);
        copies(k, 16 * s.warps, d / wide, s.warps, |k, i, chunk| {
            let i = k.let_("i", i);
            let column = k.let_("column", chunk * wide);
            let r = k.let_("r", rows.row(i.clone()));
            let left = (Expr::from(shape.d) - column.clone()).max(0i64).min(wide);
            let from = [rows.step(r.clone()), rows.query(r), column.clone()];
            k.copy((a.tile_q, &[i, column]), (a.q, &from), left);
        });
        let mma = a.weights.is_none();
        let ty = if mma { Type::f32(4) } else { Type::f32(1) };
        let dims = |blocks: usize| if mma { vec![blocks] } else { vec![blocks, 4] };
        let (one, dtype) = (Type::f32(1), shape.dtype);
        let queries =
            (s.hold == 1 && mma).then(|| k.reg("queries", Type::Vector { dtype, lanes: 8 }, &[d / 16], None));
        let tile = Tile {
            a,
            lane: a.warp.lane.clone(),
            head: rows.head.clone(),
            warp_row: k.let_("warp_row", a.warp.number.clone() * 16usize),
            queries,
            scores: k.reg("scores", ty, &dims(s.keys / 8), None),
            sums: k.reg("sums", ty, &dims(d / 8), Some(Expr::f32(0.0, ty.lanes()))),
            seen: k.reg("seen", Type::Index, &[2], Some(Expr::Int(0))),
            highest: k.reg("highest", one, &[2], Some(Expr::f32(f64::NEG_INFINITY, 1))),
            total: k.reg("total", one, &[2], Some(Expr::f32(0.0, 1))),
        };
        for half in 0..2usize {
            let row = rows.row(tile.row(half));
            let seen = if a.causal { a.position(k, rows.step(row)).index() } else { rows.most.clone() };
            k.set(tile.seen, &[half.into()], seen);
        }
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
            if mma {
                tile.scores_mma(k, &stage, &at, &begin)
            } else {
                tile.scores_fma(k, &stage)
            }
            tile.softmax(k, &at, masked);
            if mma { tile.sums_mma(k, &stage) } else { tile.sums_fma(k, &stage) }
        };
        k.for_("tile", begin.clone(), masked.clone(), 1, |k, at| body(k, at, false));
        k.for_("tile", masked, end.clone(), 1, |k, at| body(k, at, true));
        tile
    }

    /// A row of this thread, in the tile.
    fn row(&self, half: usize) -> Expr {
        self.warp_row.clone() + self.lane.clone() / 4usize + 8 * half
    }

    /// Shows this thread's rows that there are: which half of a tile of 16 it is in, its step and query head, and the sum of
    /// its weights.
    pub fn each_row(
        &self,
        k: &mut Builder,
        rows: &Rows<'_>,
        mut show: impl FnMut(&mut Builder, usize, [Expr; 2], Expr),
    ) {
        for half in 0..2usize {
            // The four threads of a row have parts of its sum.
            let mut total = k.get(self.total, &[half.into()]);
            for mask in [1, 2] {
                let part = k.let_("part", total);
                total = part.clone() + part.shuffle(mask);
            }
            let total = k.let_("whole", total);
            let r = k.let_("r", rows.first.clone() + self.row(half));
            k.if_(r.clone().compare(Compare::Lt, self.a.all_rows()), |k| {
                show(k, half, [rows.step(r.clone()), rows.query(r)], total);
            });
        }
    }

    /// Shows two columns after the other of a row of this thread: the first's number, and what the weights sum up to.
    pub fn each_pair(&self, k: &mut Builder, half: usize, show: impl FnOnce(&mut Builder, Expr, Expr)) {
        k.unroll("j", self.a.d / 8, |k, j| {
            let column = k.let_("column", j.clone() * 8usize + self.lane.clone() % 4usize * 2usize);
            let sum = self.pair(k, self.sums, &j, half);
            show(k, column, sum);
        });
    }

    /// Is this thread the first of its rows'?
    pub fn first_of_row(&self) -> Expr {
        (self.lane.clone() % 4usize).compare(Compare::Eq, 0usize)
    }

    /// The highest score of a row of this thread.
    pub fn highest(&self, k: &Builder, half: usize) -> Expr {
        k.get(self.highest, &[half.into()])
    }
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
                k.copy((to, &at), (from, &[self.head.clone(), slot, column]), left);
            });
        }
    }

    /// The two elements of a row's `half` of block `j`.
    fn pair(&self, k: &Builder, reg: RegId, j: &Expr, half: usize) -> Expr {
        match self.a.weights {
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
        if self.a.weights.is_none() {
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
    fn scores_mma(&self, k: &mut Builder, stage: &Expr, tile: &Expr, begin: &Expr) {
        let lane = self.lane.clone();
        let row = k.let_("row", self.warp_row.clone() + lane.clone() % 16usize);
        let deep = k.let_("deep", lane.clone() / 16usize * 8usize);
        let query = |k: &Builder, at: &Expr| {
            k.matrix(self.a.tile_q, &[row.clone(), at.clone() * 16usize + deep.clone()], 4, false)
        };
        if let Some(queries) = self.queries {
            k.if_(tile.clone().compare(Compare::Eq, begin.clone()), |k| {
                k.unroll("d", self.a.d / 16, |k, at| {
                    let loaded = query(k, &at);
                    k.set(queries, &[at], loaded);
                });
            });
        }
        k.unroll("j", self.a.s.keys / 8, |k, j| k.set(self.scores, &[j], Expr::f32(0.0, 4)));
        let key = k.let_("key", lane.clone() % 8usize + lane.clone() / 16usize * 8usize);
        let part = k.let_("part", lane / 8usize % 2usize * 8usize);
        k.unroll("d", self.a.d / 16, |k, at| {
            let left = match self.queries {
                Some(queries) => k.get(queries, std::slice::from_ref(&at)),
                None => query(k, &at),
            };
            let left = k.let_("left", left);
            k.unroll("j", self.a.s.keys / 16, |k, j| {
                let place =
                    [stage.clone(), j.clone() * 16usize + key.clone(), at.clone() * 16usize + part.clone()];
                let right = k.matrix(self.a.tile_k, &place, 4, false);
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
        k.unroll("j", self.a.s.keys / 8, |k, j| {
            k.unroll("e", 4, |k, e| k.set(self.scores, &[j, e], Expr::f32(0.0, 1)));
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
        let mma = self.a.weights.is_none();
        let scale = self.a.factor();
        let blocks = self.a.s.keys / 8;
        let first = k.let_("key", tile.clone() * self.a.s.keys + self.lane.clone() % 4usize * 2usize);
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
                let mut highest = k.get(most, &[]).reduce(Reduction::Max);
                for mask in [1, 2] {
                    let part = k.let_("part", highest);
                    highest = part.clone().max(part.shuffle(mask));
                }
                let old = k.let_("old", k.get(self.highest, &[half.into()]));
                let new = k.let_("new", highest.max(old.clone()));
                k.set(self.highest, &[half.into()], new.clone());
                let shrink = k.let_("shrink", self.a.decay(old, new.clone()));
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
                let sum = k.get(part, &[]).reduce(Reduction::Sum);
                let total = k.get(self.total, &[half.into()]).fma(shrink.clone(), sum);
                k.set(self.total, &[half.into()], total);
                shrink
            })
            .collect();
        k.unroll("j", self.a.d / 8, |k, j| {
            let scaled =
                [0, 1].map(|half| self.pair(k, self.sums, &j, half) * shrinks[half].clone().splat(2));
            self.set_pairs(k, self.sums, &j, scaled);
        });
    }

    /// Sets one pair of a block of scores.
    fn set_half(&self, k: &mut Builder, j: &Expr, half: usize, pair: Expr) {
        let other = self.pair(k, self.scores, j, 1 - half);
        match (self.a.weights, half) {
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
        let dtype = self.a.shape.dtype;
        let key = k.let_("key", lane.clone() % 16usize);
        let part = k.let_("part", lane / 16usize * 8usize);
        k.unroll("s", self.a.s.keys / 16, |k, s| {
            let [low, high] = [0i64, 1].map(|e| k.get(self.scores, &[s.clone() * 2usize + e]));
            let left = k.let_("left", low.join(high).cast(dtype));
            k.unroll("j", self.a.d / 16, |k, j| {
                let place =
                    [stage.clone(), s.clone() * 16usize + key.clone(), j.clone() * 16usize + part.clone()];
                let right = k.matrix(self.a.tile_v, &place, 4, true);
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
        let weights = self.a.weights.expect("f32 has them");
        let row = k.let_("row", self.warp_row.clone() + self.lane.clone() / 4usize);
        let pair = k.let_("pair", self.lane.clone() % 4usize * 2usize);
        k.unroll("j", self.a.s.keys / 8, |k, j| {
            for half in 0..2usize {
                let value = self.pair(k, self.scores, &j, half);
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
                        let sum = weight.clone().fma(value.clone().lanes(e, 1), k.get(self.sums, &place));
                        k.set(self.sums, &place, sum);
                    }
                }
            });
        });
    }
}
