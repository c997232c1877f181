//! Random graphs and tensors from a seed, for tests that compare two ways of computing the same thing.
//!
//! The numbers stay tame: magnitudes are tracked, what could grow goes through `tanh`, and arguments of `log`, `sqrt` and
//! divisions are kept positive. A difference then is a fault and no overflow. One seed gives one graph, everywhere.

use crate::dim::{Dim, MAX_SYMBOLS};
use crate::dtype::DType;
use crate::graph::{Builder, Graph, TensorType, ValueId};
use crate::interp::{InterpError, Tensor};
use crate::op::{Binary, Compare, Reduction, Unary};
use std::rc::Rc;

/// Indices drawn for i32 tensors are below this; a table that is gathered from has at least as many rows.
pub const INDICES: usize = 4;

/// Slots of a random graph's caches.
pub const SLOTS: i64 = 64;

/// Largest value of the symbol `T` of a random graph; the smallest is 1.
pub const MAX_T: i64 = 6;

/// SplitMix64 (Steele, Lea and Flood 2014).
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// One of several.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// A number of `-1..1`.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// A tensor of numbers of `-2..2`; indices below [`INDICES`] where the dtype is `i32`.
pub fn random_tensor(rng: &mut Rng, dtype: DType, shape: &[usize]) -> Tensor {
    let one = |rng: &mut Rng| match dtype {
        DType::I32 => rng.below(INDICES) as f64,
        DType::Bool => rng.below(2) as f64,
        _ => 2.0 * rng.unit(),
    };
    let data: Vec<f64> = (0..shape.iter().product()).map(|_| one(rng)).collect();
    Tensor::new(dtype, shape, &data)
}

/// Binds each name to a random tensor that depends on the name and the seed only.
pub fn random_bind(
    seed: u64,
    symbols: [i64; MAX_SYMBOLS],
) -> impl FnMut(&str, &TensorType) -> Result<Rc<Tensor>, InterpError> {
    move |name, ty| {
        let mut rng = Rng(name.bytes().fold(seed, |hash, byte| Rng(hash ^ u64::from(byte)).bits()));
        let shape: Vec<usize> = ty.shape.iter().map(|dim| dim.eval(&symbols) as usize).collect();
        Ok(Rc::new(random_tensor(&mut rng, ty.dtype, &shape)))
    }
}

/// A verified graph of about `size` ops on small shapes, some with the symbol `T` in `1..`[`MAX_T`].
pub fn random_graph(seed: u64, size: usize) -> Graph {
    let mut b = Builder::new("random");
    let t = b.symbol("T", 1, MAX_T);
    let mut draw = Draw { rng: Rng(seed), b, t, pool: Vec::new(), pos: None, n_bound: 0 };
    let width = Dim::of(draw.rng.pick(&[1, 16, 17, 33]));
    for shape in [vec![t, Dim::of(8)], vec![Dim::of(4), Dim::of(6)], vec![t], vec![t, width]] {
        let dtype = draw.rng.pick(&[DType::F32, DType::BF16]);
        draw.input(dtype, &shape);
    }
    for _ in 0..size {
        draw.step();
    }
    draw.finish()
}

/// A float value with a bound on its magnitude.
#[derive(Clone, Copy)]
struct Known {
    id: ValueId,
    bound: f64,
}

struct Draw {
    rng: Rng,
    b: Builder,
    t: Dim,
    pool: Vec<Known>,
    /// The input `positions`, once something asked for it.
    pos: Option<ValueId>,
    n_bound: usize,
}

/// Numbers of at most this size go on as they are.
const TAME: f64 = 100.0;

impl Draw {
    /// Puts a value into the pool, tamed.
    fn keep(&mut self, id: ValueId, bound: f64) -> Known {
        let known = match bound <= TAME {
            true => Known { id, bound },
            false => Known { id: self.b.unary("tame", Unary::Tanh, id), bound: 1.0 },
        };
        self.pool.push(known);
        known
    }

    fn input(&mut self, dtype: DType, shape: &[Dim]) -> Known {
        self.n_bound += 1;
        let name = format!("x{}", self.n_bound);
        let id = self.b.input(&name, dtype, shape);
        self.keep(id, 2.0)
    }

    fn weight(&mut self, dtype: DType, shape: &[Dim]) -> ValueId {
        self.n_bound += 1;
        let name = format!("w{}", self.n_bound);
        self.b.weight(&name, &format!("model.{name}"), dtype, shape)
    }

    fn ty(&self, id: ValueId) -> TensorType {
        self.b.ty(id).clone()
    }

    /// A value of the same type as `x`: from the pool, or a constant, or a new input.
    fn partner(&mut self, x: Known) -> Known {
        let ty = self.ty(x.id);
        let same: Vec<Known> = self.pool.iter().copied().filter(|y| *self.b.ty(y.id) == ty).collect();
        match self.rng.below(4) {
            0 => {
                let number = self.rng.pick(&[0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 0.1]);
                let id = self.b.constant("c", number, ty.dtype, &ty.shape);
                Known { id, bound: number.abs() }
            }
            1 => self.input(ty.dtype, &ty.shape),
            _ => self.rng.pick(&same),
        }
    }

    /// `|x| + 0.5`.
    fn positive(&mut self, x: Known) -> ValueId {
        let ty = self.ty(x.id);
        let size = self.b.unary("abs", Unary::Abs, x.id);
        let half = self.b.constant("half", 0.5, ty.dtype, &ty.shape);
        self.b.binary("pos", Binary::Add, size, half)
    }

    /// Adds one op, with what it needs around it, on some value of the pool.
    fn step(&mut self) {
        let x = self.rng.pick(&self.pool.clone());
        match self.rng.below(17) {
            0 => self.unary(x),
            1 | 2 => self.binary(x),
            3 => self.cast(x),
            4 => self.reduce(x),
            5 => self.broadcast(x),
            6 => self.reshape(x),
            7 => self.transpose(x),
            8 => self.slice(x),
            9 => self.concat(x),
            10 | 11 => self.dot(x),
            12 => self.select(x),
            13 => self.gather(x),
            14 => self.norm(x),
            15 => self.gated(x),
            _ => match self.rng.below(3) {
                0 => self.argmax(x),
                _ => self.attend(x),
            },
        }
    }

    fn unary(&mut self, x: Known) {
        let op = self.rng.pick(&Unary::ALL);
        let (argument, bound) = match op {
            Unary::Neg | Unary::Abs => (x.id, x.bound),
            Unary::Sin | Unary::Cos | Unary::Tanh => (x.id, 1.0),
            Unary::Exp => (self.b.unary("tame", Unary::Tanh, x.id), 3.0),
            Unary::Log => (self.positive(x), x.bound + 1.0),
            Unary::Sqrt => (self.positive(x), x.bound + 1.0),
            Unary::Rsqrt | Unary::Recip => (self.positive(x), 2.0),
        };
        let id = self.b.unary("u", op, argument);
        self.keep(id, bound);
    }

    fn binary(&mut self, x: Known) {
        let op = self.rng.pick(&Binary::ALL);
        let y = self.partner(x);
        let (right, bound) = match op {
            Binary::Add | Binary::Sub => (y.id, x.bound + y.bound),
            Binary::Mul => (y.id, x.bound * y.bound),
            Binary::Div => (self.positive(y), 2.0 * x.bound),
            Binary::Max | Binary::Min => (y.id, x.bound.max(y.bound)),
        };
        let id = self.b.binary("b", op, x.id, right);
        self.keep(id, bound);
    }

    fn cast(&mut self, x: Known) {
        let to = if self.ty(x.id).dtype == DType::F32 { DType::BF16 } else { DType::F32 };
        let id = self.b.cast("cast", x.id, to);
        self.keep(id, x.bound);
    }

    /// Some axis of `x`.
    fn axis(&mut self, x: Known) -> Option<usize> {
        let rank = self.ty(x.id).shape.len();
        (rank > 0).then(|| self.rng.below(rank))
    }

    fn reduce(&mut self, x: Known) {
        let Some(axis) = self.axis(x) else { return };
        let extent = self.ty(x.id).shape[axis].eval(&[MAX_T; MAX_SYMBOLS]) as f64;
        let (kind, bound) = self.rng.pick(&[(Reduction::Sum, extent * x.bound), (Reduction::Max, x.bound)]);
        let id = self.b.reduce("r", kind, x.id, axis);
        self.keep(id, bound);
    }

    fn broadcast(&mut self, x: Known) {
        let mut shape = self.ty(x.id).shape;
        if shape.len() >= 3 {
            return;
        }
        let new = self.rng.below(shape.len() + 1);
        shape.insert(new, self.rng.pick(&[self.t, Dim::of(2), Dim::of(3)]));
        let axes: Vec<usize> = (0..shape.len()).filter(|&axis| axis != new).collect();
        let id = self.b.broadcast("bc", x.id, &axes, &shape);
        self.keep(id, x.bound);
    }

    fn reshape(&mut self, x: Known) {
        let mut shape = self.ty(x.id).shape;
        let Some(axis) = self.axis(x) else { return };
        let next = shape.get(axis + 1).and_then(|dim| dim.constant());
        match (shape[axis].constant(), next) {
            (Some(extent), Some(next)) => {
                shape[axis] = Dim::of(extent * next);
                shape.remove(axis + 1);
            }
            (Some(extent), None) if extent % 2 == 0 => {
                shape[axis] = Dim::of(extent / 2);
                shape.insert(axis + 1, Dim::of(2));
            }
            _ => shape.insert(axis, Dim::of(1)),
        }
        if shape.len() <= 4 {
            let id = self.b.reshape("rs", x.id, &shape);
            self.keep(id, x.bound);
        }
    }

    fn transpose(&mut self, x: Known) {
        let mut perm: Vec<usize> = (0..self.ty(x.id).shape.len()).collect();
        for last in (1..perm.len()).rev() {
            perm.swap(last, self.rng.below(last + 1));
        }
        let id = self.b.transpose("tr", x.id, &perm);
        self.keep(id, x.bound);
    }

    fn slice(&mut self, x: Known) {
        let Some(axis) = self.axis(x) else { return };
        let whole = self.ty(x.id).shape[axis];
        let (start, extent) = match whole.constant() {
            Some(extent) => {
                let start = self.rng.below(extent as usize) as i64;
                let left = (extent - start) as usize;
                (Dim::of(start), Dim::of(1 + self.rng.below(left) as i64))
            }
            None => self.rng.pick(&[
                (Dim::of(0), Dim::of(1)),
                (Dim::of(0), whole),
                (whole - Dim::of(1), Dim::of(1)),
            ]),
        };
        let id = self.b.slice("sl", x.id, axis, start, extent);
        self.keep(id, x.bound);
    }

    fn concat(&mut self, x: Known) {
        let Some(axis) = self.axis(x) else { return };
        if self.ty(x.id).elems(&[MAX_T; MAX_SYMBOLS]) > 500 {
            return;
        }
        let y = self.partner(x);
        let id = self.b.concat("cc", &[x.id, y.id], axis);
        self.keep(id, x.bound.max(y.bound));
    }

    /// The last axis with a weight's, or that of two values with the first axis as batch.
    fn dot(&mut self, x: Known) {
        let TensorType { dtype, shape } = self.ty(x.id);
        let Some(&k) = shape.last() else { return };
        let store = self.rng.pick(&[dtype, DType::F32]);
        let length = k.eval(&[MAX_T; MAX_SYMBOLS]) as f64;
        let letters = &"abcd"[..shape.len()];
        let (outer, summed) = letters.split_at(shape.len() - 1);
        if self.rng.below(4) > 0 && k.constant().is_some() {
            let n = self.rng.pick(&[1, 5, 8, 16, 17, 40]);
            let w = self.weight(dtype, &[Dim::of(n), k]);
            let id = self.b.dot("d", &format!("{letters},n{summed}->{outer}n"), x.id, w, store);
            self.keep(id, length * x.bound * 2.0);
        } else {
            let y = self.partner(x);
            let id = self.b.dot("d", &format!("{letters},{letters}->{outer}"), x.id, y.id, store);
            self.keep(id, length * x.bound * y.bound);
        }
    }

    fn select(&mut self, x: Known) {
        let (a, b) = (self.partner(x), self.partner(x));
        let relation = self.rng.pick(&Compare::ALL);
        let seen = self.b.compare("cmp", relation, x.id, a.id);
        let id = self.b.select("sel", seen, x.id, b.id);
        self.keep(id, x.bound.max(b.bound));
    }

    fn gather(&mut self, x: Known) {
        let rows = self.ty(x.id).shape.first().and_then(|dim| dim.constant());
        if rows.is_none_or(|rows| rows < INDICES as i64) {
            return;
        }
        self.n_bound += 1;
        let count = self.rng.pick(&[self.t, Dim::of(3)]);
        let ids = self.b.input(&format!("ids{}", self.n_bound), DType::I32, &[count]);
        let id = self.b.gather("g", x.id, ids);
        self.keep(id, x.bound);
    }

    /// The width of `x`, if it is rows of a constant width.
    fn rows(&self, x: Known) -> Option<Dim> {
        match self.ty(x.id).shape[..] {
            [t, k] if t == self.t && k.constant().is_some() => Some(k),
            _ => None,
        }
    }

    /// `x W^T`, of rows.
    fn linear(&mut self, x: Known, k: Dim, n: usize) -> Known {
        let dtype = self.ty(x.id).dtype;
        let w = self.weight(dtype, &[n.into(), k]);
        let id = self.b.dot("d", "tk,nk->tn", x.id, w, dtype);
        Known { id, bound: 2.0 * x.bound * k.base as f64 }
    }

    fn norm(&mut self, x: Known) {
        let Some(k) = self.rows(x) else { return };
        let w = self.weight(self.ty(x.id).dtype, &[k]);
        let id = self.b.rms_norm("norm", x.id, w, 1e-5);
        self.keep(id, 2.0 * (k.base as f64).sqrt());
    }

    /// Two products of one left operand, joined: one gates the other.
    fn gated(&mut self, x: Known) {
        let Some(k) = self.rows(x) else { return };
        let n = self.rng.pick(&[3, 8, 16, 24]);
        let (gate, up) = (self.linear(x, k, n), self.linear(x, k, n));
        let gate = self.b.unary("gate", Unary::Tanh, gate.id);
        let id = self.b.binary("gated", Binary::Mul, gate, up.id);
        self.keep(id, up.bound);
    }

    fn argmax(&mut self, x: Known) {
        if self.rows(x).is_some() && self.ty(x.id).dtype == DType::F32 {
            self.n_bound += 1;
            let id = self.b.argmax("best", x.id);
            self.b.output(&format!("best{}", self.n_bound), id);
        }
    }

    /// Products for queries, keys and values, a rotation, caches and attention.
    fn attend(&mut self, x: Known) {
        let Some(width) = self.rows(x) else { return };
        let id = self.b.unary("tame", Unary::Tanh, x.id);
        let x = Known { id, bound: 1.0 };
        let (heads, kv_heads) = self.rng.pick(&[(1, 1), (2, 1), (4, 2), (3, 3)]);
        let d = self.rng.pick(&[2, 8, 16, 18]);
        let t = self.t;
        let pos = match self.pos {
            Some(pos) => pos,
            None => *self.pos.insert(self.b.input("positions", DType::I32, &[t])),
        };
        let heads_of = |draw: &mut Draw, heads: usize| {
            let y = draw.linear(x, width, heads * d);
            let id = draw.b.reshape("heads", y.id, &[t, heads.into(), d.into()]);
            Known { id, bound: y.bound }
        };
        let (q, k, v) = (heads_of(self, heads), heads_of(self, kv_heads), heads_of(self, kv_heads));
        let frequencies: Vec<f64> = (0..d / 2).map(|i| 0.5f64.powi(i as i32)).collect();
        let (cos, sin) = self.b.rope_tables(pos, &frequencies, 1.0);
        let (q, k) = (self.b.rope("qr", q.id, cos, sin), self.b.rope("kr", k.id, cos, sin));
        let (dtype, shape) = (self.ty(k).dtype, [kv_heads.into(), Dim::of(SLOTS), d.into()]);
        let cached = |draw: &mut Draw, rows: ValueId| {
            draw.n_bound += 1;
            let name = format!("cache{}", draw.n_bound);
            let cache = draw.b.state(&name, dtype, &shape);
            let cache = draw.b.cache_append("kv", cache, rows, pos);
            draw.b.output(&name, cache);
            cache
        };
        let (keys, values) = (cached(self, k), cached(self, v.id));
        let causal = self.rng.below(4) > 0;
        let a = self.b.attention("a", q, keys, values, pos, causal, 0.125);
        let id = self.b.reshape("af", a, &[t, (heads * d).into()]);
        self.keep(id, v.bound.max(2.0));
    }

    /// Names as outputs the last value and most of those that nobody reads.
    fn finish(mut self) -> Graph {
        let last = self.pool.last().expect("a pool begins with inputs").id;
        let pool = std::mem::take(&mut self.pool);
        let mut graph = self.b.finish();
        let users = graph.users();
        for Known { id, .. } in pool {
            let unread = users[id.0 as usize].is_empty() && self.rng.below(4) > 0;
            if id == last || unread {
                graph.outputs.push((graph[id].name.clone(), id));
            }
        }
        graph
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interp::{Rounding, interpret};
    use crate::verify::verify;

    #[test]
    fn graphs_verify_and_stay_tame() {
        let mut n_values = 0;
        for seed in 0..300 {
            let graph = random_graph(seed, 20);
            verify(&graph).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            let symbols = [1 + (seed % MAX_T as u64) as i64, 0, 0, 0];
            let mut bind = random_bind(seed, symbols);
            let outputs = interpret(&graph, &symbols, Rounding::Stored, &mut bind, None).unwrap();
            let tame = outputs.values().flat_map(|tensor| &tensor.data).all(|x| x.abs() <= 2.0 * TAME);
            assert!(tame, "seed {seed}\n{graph}");
            n_values += graph.values.len();
        }
        assert!(n_values > 300 * 20, "graphs are smaller than asked for: {n_values}");
    }

    #[test]
    fn one_seed_one_graph() {
        assert_eq!(random_graph(7, 30), random_graph(7, 30));
        assert_ne!(random_graph(7, 30), random_graph(8, 30));
    }
}
