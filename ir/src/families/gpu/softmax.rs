//! What attentions on a GPU do alike: which rows a CTA has and which keys they see, and weights out of scores, one tile of keys
//! after another (online softmax: Milakov and Gimelshein, arXiv 1805.02867).
//!
//! A row is a position and a query head; the heads that share a KV head are rows beside each other, so that a tile of keys
//! serves them all. Scores and sums lie in registers as [`Expr::Mma`] has them: each thread has two rows, `half` 0 and 1, eight
//! apart, and of each block of 8 columns two of each row.

use crate::dtype::DType;
use crate::families::access::Lowering;
use crate::families::attention::Shape;
use crate::families::{LowerError, storage};
use crate::graph::Layout;
use crate::kernel::{Access, BufferId, Builder, Expr, RegId, Type, WARP};
use crate::op::{Compare, Reduction, Unary};

/// The positions of a step's tokens, each of which is the last key that the token sees.
#[derive(Clone)]
pub(super) struct Positions {
    /// `pos[t]`.
    pub pos: BufferId,
    pub lane: Expr,
}

impl Positions {
    /// That of a token.
    pub fn at(&self, k: &Builder, step: Expr) -> Expr {
        k.load(self.pos, &[step], 1)
    }

    /// The largest and the smallest of so many tokens, in every thread of a warp.
    pub fn most_and_least(&self, k: &mut Builder, count: Expr, step: impl Fn(Expr) -> Expr) -> [Expr; 2] {
        let most = k.reg("most", i32s(), &[], Some(int(0)));
        let least = k.reg("least", i32s(), &[], Some(int(i32::MAX)));
        k.for_("i", self.lane.clone(), count, WARP.into(), |k, i| {
            let at = self.at(k, step(i));
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
}

/// What an attention reads and writes.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    /// Queries: `[t, head, column]`.
    pub q: BufferId,
    /// Keys and values: `[head, slot, column]`.
    pub k: BufferId,
    pub v: BufferId,
    /// Positions: `[t]`.
    pub pos: BufferId,
    /// Where results go.
    pub to: Results,
}

/// Where an attention's results go.
#[derive(Clone, Copy)]
pub(super) struct Results {
    /// Like the queries.
    pub out: BufferId,
    /// The logarithms of the sums, `[t, head]`, if they are wanted.
    lse: Option<BufferId>,
}

/// Binds the operands of a group's kernel.
///
/// # Errors
///
/// Where the cache lies otherwise.
pub(super) fn operands(l: &mut Lowering<'_, '_>) -> Result<Operands, LowerError> {
    let view = l.view;
    let operands = &view.graph[view.values[0]].operands;
    let stored = |n: usize| storage(view.graph, operands[n]);
    if [1, 2].iter().any(|&n| !matches!(view.graph[stored(n)].layout, Some(Layout::Pages { .. }))) {
        return Err(view.unsupported("a cache that does not lie in pages"));
    }
    let mut read = |name, n: usize| l.tensor(name, operands[n], Access::Read);
    let [q, k, v, pos] = [read("q", 0), read("k", 1), read("v", 2), read("pos", 3)];
    let out = l.tensor("out", view.values[0], Access::Write);
    let lse = view.values.get(1).map(|&lse| l.tensor("lse", lse, Access::Write));
    Ok(Operands { q, k, v, pos, to: Results { out, lse } })
}

/// The rows of a CTA's turn: a tile of those of a KV head.
pub(super) struct Rows {
    pub shape: Shape,
    pub causal: bool,
    positions: Positions,
    /// Rows of a tile.
    count: usize,
    /// The KV head.
    pub head: Expr,
    /// The first row.
    first: Expr,
}

impl Rows {
    /// So many rows of a KV head from `first` on.
    pub fn new(
        shape: Shape,
        causal: bool,
        positions: Positions,
        count: usize,
        head: Expr,
        first: Expr,
    ) -> Rows {
        Rows { shape, causal, positions, count, head, first }
    }

    /// The turn of a grid that has one for each KV head and tile. The last rows see the most keys: they begin first.
    pub fn of_turn(
        k: &mut Builder,
        (shape, causal): (Shape, bool),
        positions: &Positions,
        count: usize,
        turn: &Expr,
    ) -> Rows {
        let head = k.let_("kv", turn.clone() % shape.kv_heads);
        let last = Rows::tiles(&shape, count) - 1usize;
        let first = k.let_("first", (last - turn.clone() / shape.kv_heads) * count);
        Rows::new(shape, causal, positions.clone(), count, head, first)
    }

    /// Tiles of so many rows that a KV head has.
    pub fn tiles(shape: &Shape, count: usize) -> Expr {
        (Expr::from(shape.steps) * shape.per_kv + (count - 1)) / count
    }

    fn all(&self) -> Expr {
        Expr::from(self.shape.steps) * self.shape.per_kv
    }

    /// The number of the tile's row `i`.
    pub fn number(&self, i: impl Into<Expr>) -> Expr {
        self.first.clone() + i.into()
    }

    /// The same of a row that there is: those beyond the end are the last one.
    pub fn existing(&self, i: impl Into<Expr>) -> Expr {
        self.number(i).min(self.all() - 1usize)
    }

    /// Is there a row of that number?
    pub fn exists(&self, number: &Expr) -> Expr {
        number.clone().compare(Compare::Lt, self.all())
    }

    /// Where a row's query, and its result, begins: `[t, head]`.
    pub fn place(&self, number: Expr) -> [Expr; 2] {
        let per_kv = self.shape.per_kv;
        [number.clone() / per_kv, self.head.clone() * per_kv + number % per_kv]
    }

    /// The tiles of keys that any row sees, and those that all rows see whole, by all threads of a warp together.
    pub fn tiles_of_keys(&self, k: &mut Builder, keys: usize) -> Ends {
        let step = |i: Expr| self.place(self.existing(i))[0].clone();
        let [most, least] = match self.causal {
            true => self.positions.most_and_least(k, self.count.into(), step),
            false => self.positions.most_and_least(k, self.shape.steps.into(), |i| i),
        };
        let most = k.let_("last", most);
        // Every lane has the same; said so, what is counted by them stays out of the lanes' own registers.
        let end = k.let_("end", (most.clone() / keys + 1usize).uniform());
        let whole = if self.causal { least } else { most.clone() };
        let whole = k.let_("whole", ((whole + 1usize) / keys).uniform());
        Ends { most, end, whole }
    }

    /// The last key that a row sees.
    fn seen(&self, k: &Builder, i: Expr, ends: &Ends) -> Expr {
        match self.causal {
            true => self.positions.at(k, self.place(self.existing(i))[0].clone()).index(),
            false => ends.most.clone(),
        }
    }
}

/// How far the keys of a tile of rows go.
pub(super) struct Ends {
    /// The last key that any row sees.
    most: Expr,
    /// Tiles of keys that any row sees.
    pub end: Expr,
    /// Tiles of keys that every row sees whole: they need no mask.
    pub whole: Expr,
}

fn i32s() -> Type {
    Type::Vector { dtype: DType::I32, lanes: 1 }
}

fn int(value: i32) -> Expr {
    Expr::Const { value: value.into(), ty: i32s() }
}

/// Blocks of 8 columns of a warp's rows: a register of four each, or, for FMA, four of one.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    pub reg: RegId,
    pub fma: bool,
}

impl Blocks {
    /// Declares so many.
    pub fn new(k: &mut Builder, name: &str, count: usize, fma: bool, init: Option<f64>) -> Blocks {
        let (ty, dims) = if fma { (Type::f32(1), vec![count, 4]) } else { (Type::f32(4), vec![count]) };
        Blocks { reg: k.reg(name, ty, &dims, init.map(|x| Expr::f32(x, ty.lanes()))), fma }
    }

    /// The two elements of a row's `half` of block `j`.
    pub fn pair(&self, k: &Builder, j: &Expr, half: usize) -> Expr {
        if !self.fma {
            return k.get(self.reg, std::slice::from_ref(j)).lanes(2 * half as u16, 2);
        }
        let one = |e: usize| k.get(self.reg, &[j.clone(), (2 * half + e).into()]);
        one(0).join(one(1))
    }

    /// Sets one pair of block `j`.
    fn set_half(&self, k: &mut Builder, j: &Expr, half: usize, pair: Expr) {
        if self.fma {
            for e in 0..2usize {
                k.set(self.reg, &[j.clone(), (2 * half + e).into()], pair.clone().lanes(e as u16, 1));
            }
            return;
        }
        let other = self.pair(k, j, 1 - half);
        let both = if half == 0 { pair.join(other) } else { other.join(pair) };
        k.set(self.reg, std::slice::from_ref(j), both);
    }

    /// Shows the pairs of a row's `half`, one after another: the first's column, and both.
    pub fn each_pair(
        &self,
        k: &mut Builder,
        lane: &Expr,
        count: usize,
        half: usize,
        show: impl FnOnce(&mut Builder, Expr, Expr),
    ) {
        k.unroll("j", count, |k, j| {
            let column = k.let_("column", j.clone() * 8usize + lane.clone() % 4usize * 2usize);
            let pair = self.pair(k, &j, half);
            show(k, column, pair);
        });
    }

    /// Multiplies each row by its factor.
    pub fn scale(&self, k: &mut Builder, count: usize, factors: &[Expr; 2]) {
        k.unroll("j", count, |k, j| {
            let [low, high] = [0, 1].map(|half| self.pair(k, &j, half) * factors[half].clone().splat(2));
            if !self.fma {
                return k.set(self.reg, &[j], low.join(high));
            }
            for (half, pair) in [low, high].into_iter().enumerate() {
                let pair = k.let_("pair", pair);
                self.set_half(k, &j, half, pair);
            }
        });
    }
}

/// By what scores are multiplied: `exp2` takes the scale with it; f32 is scaled first, and has an exponential of its own.
fn factor(scale: f64, fma: bool) -> f64 {
    if fma { scale } else { scale * std::f64::consts::LOG2_E }
}

/// What weights relative to the score `old` are multiplied by, to be relative to the higher score `new`.
pub(super) fn decay(scale: f64, fma: bool, old: Expr, new: Expr) -> Expr {
    match fma {
        true => (old - new).unary(Unary::Exp),
        false => ((old - new) * Expr::f32(factor(scale, fma), 1)).exp2(),
    }
}

/// The softmax of a warp's 16 rows, as far as it has got.
pub(super) struct Softmax {
    /// Keys of a tile.
    keys: usize,
    scale: f64,
    lane: Expr,
    /// Scores of a tile, then weights.
    pub scores: Blocks,
    /// Of the two rows of a thread: the last key that each sees, its highest score so far, and its sum of weights.
    seen: RegId,
    highest: RegId,
    total: RegId,
}

impl Softmax {
    /// Of rows `row` and `row + 8` of the tile, which are this thread's.
    pub fn new(
        k: &mut Builder,
        rows: &Rows,
        ends: &Ends,
        (row, lane): (&Expr, &Expr),
        keys: usize,
        scale: f64,
        scores: Blocks,
    ) -> Softmax {
        let one = Type::f32(1);
        let softmax = Softmax {
            keys,
            scale,
            lane: lane.clone(),
            scores,
            seen: k.reg("seen", Type::Index, &[2], Some(Expr::Int(0))),
            highest: k.reg("highest", one, &[2], Some(Expr::f32(f64::NEG_INFINITY, 1))),
            total: k.reg("total", one, &[2], Some(Expr::f32(0.0, 1))),
        };
        for half in 0..2usize {
            let seen = rows.seen(k, row.clone() + 8 * half, ends);
            k.set(softmax.seen, &[half.into()], seen);
        }
        softmax
    }

    /// Scores to weights relative to the highest score so far. Gives for each row by what to multiply what was summed before.
    pub fn weights(&self, k: &mut Builder, tile: &Expr, masked: bool) -> [Expr; 2] {
        let fma = self.scores.fma;
        let scale = factor(self.scale, fma);
        let blocks = self.keys / 8;
        let first = k.let_("key", tile.clone() * self.keys + self.lane.clone() % 4usize * 2usize);
        [0usize, 1].map(|half| {
            let seen = k.let_("left", k.get(self.seen, &[half.into()]) - first.clone());
            let most = k.reg("most", Type::f32(2), &[], Some(Expr::f32(f64::NEG_INFINITY, 2)));
            k.unroll("j", blocks, |k, j| {
                let mut pair = self.scores.pair(k, &j, half);
                if fma {
                    pair = pair * Expr::f32(scale, 2);
                }
                if masked {
                    let left = (seen.clone() - j.clone() * 8usize).max(-1i64).min(2i64);
                    let visible =
                        Expr::Iota { lanes: 2 }.compare(Compare::Le, left.cast(DType::I32).splat(2));
                    pair = visible.select(pair, Expr::f32(f64::NEG_INFINITY, 2));
                }
                let pair = k.let_("pair", pair);
                self.scores.set_half(k, &j, half, pair.clone());
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
            let shrink = k.let_("shrink", decay(self.scale, fma, old, new.clone()));
            let from = k.let_("from", if fma { new } else { new * Expr::f32(-scale, 1) });
            let part = k.reg("part", Type::f32(2), &[], Some(Expr::f32(0.0, 2)));
            k.unroll("j", blocks, |k, j| {
                let pair = self.scores.pair(k, &j, half);
                let weight = match fma {
                    true => (pair - from.clone().splat(2)).unary(Unary::Exp),
                    false => pair.fma(Expr::f32(scale, 2), from.clone().splat(2)).exp2(),
                };
                let weight = k.let_("weight", weight);
                self.scores.set_half(k, &j, half, weight.clone());
                let more = k.get(part, &[]) + weight;
                k.set(part, &[], more);
            });
            let sum = k.get(part, &[]).reduce(Reduction::Sum);
            let total = k.get(self.total, &[half.into()]).fma(shrink.clone(), sum);
            k.set(self.total, &[half.into()], total);
            shrink
        })
    }

    /// The sum of a row's weights, of which its four threads have parts.
    pub fn total(&self, k: &mut Builder, half: usize) -> Expr {
        let mut total = k.get(self.total, &[half.into()]);
        for mask in [1, 2] {
            let part = k.let_("part", total);
            total = part.clone() + part.shuffle(mask);
        }
        k.let_("sum", total)
    }

    /// The parts of this thread's own.
    pub fn parts(&self, k: &Builder) -> [Expr; 2] {
        [0usize, 1].map(|half| k.get(self.total, &[half.into()]))
    }

    /// The highest score of a row.
    pub fn highest(&self, k: &Builder, half: usize) -> Expr {
        k.get(self.highest, &[half.into()])
    }

    /// Shows this thread's rows that there are: which half, the token and query head, and the sum of the weights.
    pub fn each_row(
        &self,
        k: &mut Builder,
        (rows, row): (&Rows, &Expr),
        mut show: impl FnMut(&mut Builder, usize, [Expr; 2], Expr),
    ) {
        for half in 0..2usize {
            let total = self.total(k, half);
            let number = k.let_("r", rows.number(row.clone() + 8 * half));
            k.if_(rows.exists(&number), |k| show(k, half, rows.place(number.clone()), total));
        }
    }

    /// Is this thread the first of its rows'?
    pub fn first_of_row(&self) -> Expr {
        (self.lane.clone() % 4usize).compare(Compare::Eq, 0usize)
    }

    /// Writes this thread's part of its rows: sums, divided by the sum of the weights.
    pub fn store(&self, k: &mut Builder, at: (&Rows, &Expr), sums: Blocks, to: Results) {
        let d = at.0.shape.d;
        self.each_row(k, at, |k, half, [t, head], total| {
            let row = [t.clone(), head.clone()];
            let highest = self.highest(k, half);
            to.store_lse(k, (self.scale, sums.fma), self.first_of_row(), row, (highest, total.clone()));
            let share = Share::of(k, total, sums.fma);
            let blocks = d.div_ceil(8);
            sums.each_pair(k, &self.lane, blocks, half, |k, column, sum| {
                to.store_pair(k, (d, 8 * blocks), [t, head, column], share.times(sum));
            });
        });
    }
}

/// One by the sum of a row's weights. f32 is divided; for what is rounded to 16 bits one reciprocal serves the row.
pub(super) struct Share {
    total: Expr,
    reciprocal: bool,
}

impl Share {
    pub fn of(k: &mut Builder, total: Expr, fma: bool) -> Share {
        let total = if fma { total } else { k.let_("share", Expr::f32(1.0, 1) / total) };
        Share { total, reciprocal: !fma }
    }

    /// Of two columns.
    pub fn times(&self, sum: Expr) -> Expr {
        let total = self.total.clone().splat(2);
        if self.reciprocal { sum * total } else { sum / total }
    }
}

impl Results {
    /// Stores two of so many columns of a row, if the head has them.
    pub fn store_pair(&self, k: &mut Builder, (d, columns): (usize, usize), at: [Expr; 3], share: Expr) {
        let store = |k: &mut Builder| k.store(self.out, &at, share);
        match columns == d {
            true => store(k),
            false => k.if_(at[2].clone().compare(Compare::Lt, d), store),
        }
    }

    /// Stores the logarithm of a row's sum where it is wanted and `first` holds: its weights are relative to the highest score.
    pub fn store_lse(
        &self,
        k: &mut Builder,
        (scale, fma): (f64, bool),
        first: Expr,
        row: [Expr; 2],
        (highest, total): (Expr, Expr),
    ) {
        let Some(lse) = self.lse else { return };
        k.if_(first, |k| {
            let sum = total.unary(Unary::Log);
            // Of f32 scores were scaled before.
            let whole = if fma { highest + sum } else { highest.fma(Expr::f32(scale, 1), sum) };
            k.store(lse, &row, whole);
        });
    }
}
