//! The table: which graphs are tried, in which shapes and dtypes.
//!
//! Shapes: 1, odd, one below and one above each tile edge (16 columns, 12 rows, 64 keys), and real
//! models' (stories260K, SmolLM2-135M). Random graphs bring prologues and epilogues that nobody thought of. Tiles of a GPU are
//! larger, and its kernels are chosen by the rows of a step: [`gpu`] has shapes for them.

use super::Distribution;
use ir::DType;
use ir::dim::{Dim, MAX_SYMBOLS};
use ir::graph::{Builder, Graph, ValueId};
use ir::op::{Binary, Compare, Reduction, Unary};
use ir::random::{MAX_T, Rng, SLOTS, random_graph};
use std::cmp::Reverse;
use std::collections::BTreeSet;

/// A graph with the steps that it is tried on.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it is, with its shape: `linear n 17 k 33 bf16`.
    pub name: String,
    /// Before any pass.
    pub graph: Graph,
    /// Tokens of a step, and positions in the caches before it.
    pub steps: Vec<(i64, i64)>,
    /// How its numbers are drawn, one after the other.
    pub distributions: Vec<Distribution>,
}

impl Case {
    /// The symbols of a step of so many tokens.
    pub fn symbols(tokens: i64) -> [i64; MAX_SYMBOLS] {
        let mut symbols = [0; MAX_SYMBOLS];
        symbols[0] = tokens;
        symbols
    }
}

/// Most tokens of a step: one more than the tallest register tile.
const TOKENS: i64 = 13;

/// Steps about the edges of register tiles.
const STEPS: [(i64, i64); 5] = [(1, 0), (5, 1), (7, 0), (12, 2), (13, 0)];

/// `n` and `k` of products: rows of the weight, and its columns.
const PRODUCTS: [(usize, usize); 13] = [
    (1, 1),
    (7, 5),
    (15, 16),
    (16, 15),
    (17, 33),
    (31, 1),
    (33, 17),
    (63, 64),
    (64, 65),
    (65, 63),
    (97, 48),
    (172, 64),  // stories260K's MLP
    (576, 192), // SmolLM2's K and V, turned
];

/// The same where more is done around a product.
const FUSED: [(usize, usize); 5] = [(1, 7), (16, 16), (17, 33), (64, 64), (172, 64)];

/// Heads, KV heads and width of a head.
const HEADS: [(usize, usize, usize); 7] = [
    (1, 1, 2),
    (2, 1, 16),
    (3, 3, 18),
    (4, 2, 32),
    (7, 1, 34),
    (8, 4, 8),  // stories260K
    (9, 3, 64), // SmolLM2
];

/// Widths of rows.
const WIDTHS: [usize; 10] = [1, 7, 15, 16, 17, 31, 33, 64, 172, 576];

/// The whole table.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in [DType::F32, DType::BF16] {
        for (n, k) in PRODUCTS {
            cases.push(rows(format!("linear n {n} k {k} {dtype}"), |b, t| around(b, t, dtype, k, n, linear)));
            let one = |b: &mut Builder, t| around(b, t, dtype, k, n, linear);
            cases.push(one_row(rows(format!("linear one row n {n} k {k} {dtype}"), one)));
        }
        for (n, k) in FUSED {
            let shape = format!("n {n} k {k} {dtype}");
            cases.push(rows(format!("norm before a product {shape}"), |b, t| {
                around(b, t, dtype, k, n, normed)
            }));
            cases.push(rows(format!("residual {shape}"), |b, t| around(b, t, dtype, k, n, residual)));
            cases.push(rows(format!("gated {shape}"), |b, t| around(b, t, dtype, k, n, gated)));
            cases.push(rows(format!("tied {shape}"), |b, t| around(b, t, dtype, k, n, tied)));
        }
        for shape in HEADS {
            cases.extend(attentions(dtype, shape));
        }
        for n in WIDTHS {
            let shape = format!("{n} {dtype}");
            cases.push(rows(format!("norm {shape}"), |b, t| {
                let (x, w) = (b.input("x", dtype, &[t, n.into()]), b.weight("w", "w", dtype, &[n.into()]));
                let y = b.rms_norm("y", x, w, 1e-5);
                b.output("y", y);
            }));
            cases.push(rows(format!("softmax {shape}"), |b, t| {
                let x = b.input("x", dtype, &[t, n.into()]);
                let y = b.softmax("y", x);
                b.output("y", y);
            }));
            for kind in [Reduction::Sum, Reduction::Max] {
                cases.push(rows(format!("{} {shape}", kind.name()), |b, t| {
                    let x = b.input("x", dtype, &[t, n.into()]);
                    let y = b.reduce("y", kind, x, 1);
                    b.output("y", y);
                }));
            }
            cases.push(rows(format!("functions {shape}"), |b, t| functions(b, t, dtype, n)));
            cases.push(rows(format!("arithmetic {shape}"), |b, t| arithmetic(b, t, dtype, n)));
            cases.push(rows(format!("moves {shape}"), |b, t| moves(b, t, dtype, n)));
            cases.push(rows(format!("rows by index {shape}"), |b, t| {
                let table = b.weight("table", "table", dtype, &[Dim::of(37), n.into()]);
                let ids = b.input("ids", DType::I32, &[t]);
                let y = b.gather("y", table, ids);
                b.output("y", y);
            }));
        }
    }
    for n in WIDTHS {
        cases.push(rows(format!("greedy choice {n}"), |b, t| {
            let x = b.input("x", DType::F32, &[t, n.into()]);
            let y = b.argmax("y", x);
            b.output("y", y);
        }));
    }
    cases
}

/// Rows of a step, and most rows that its entry point takes: kernels are chosen by these.
const GPU_ROWS: [(i64, i64); 7] = [(1, 1), (1, 16), (2, 16), (17, 64), (64, 64), (129, 513), (513, 513)];

/// Shapes about the edges of a GPU's tiles: products, each with what may be done around it, and attentions. Every combination,
/// each in a dtype and a distribution that are drawn, or as many as it takes for every pair of choices to meet.
pub fn gpu(all: bool) -> Vec<Case> {
    const SHAPES: [(usize, usize); 5] = [(131, 48), (172, 64), (64, 172), (1536, 576), (576, 1536)];
    const AROUND: [(&str, Build); 5] = [
        ("linear", linear),
        ("norm before a product", normed),
        ("residual", residual),
        ("gated", gated),
        ("tied", tied),
    ];
    const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];
    const HEADS: [usize; 7] = [8, 24, 64, 80, 96, 128, 256];
    const PER_KV: [usize; 4] = [1, 3, 4, 7];
    const PAST: [i64; 4] = [0, 1, 63, 200];
    // Of few rows: about the edges of splits, and behind several.
    const FEW_ROWS: [(i64, i64); 4] = [(1, 1), (1, 16), (2, 16), (16, 16)];
    const LONG: [i64; 5] = [0, 255, 256, 628, 752];
    let numbers = [DTYPES.len(), Distribution::ALL.len()];
    let mut cases = Vec::new();
    for choice in combinations(&[SHAPES.len(), AROUND.len(), GPU_ROWS.len()], &numbers, all) {
        let [shape, around, rows, dtype, distribution] = choice[..] else {
            unreachable!("as many as asked for")
        };
        let ((n, k), (what, build)) = (SHAPES[shape], AROUND[around]);
        let ((t, most), dtype) = (GPU_ROWS[rows], DTYPES[dtype]);
        let mut b = Builder::new("case");
        let rows = b.symbol("T", 1, most);
        let mut x = b.input("x", dtype, &[rows, k.into()]);
        if !dtype.bytes(k).is_multiple_of(16) {
            // What is bound lies without gaps; what a kernel stored begins its rows where copies can.
            x = b.unary("x.n", Unary::Neg, x);
        }
        build(&mut b, x, n);
        cases.push(of_rows(
            format!("{what} n {n} k {k} {dtype} T {t} of {most}"),
            b,
            (t, 0),
            most,
            distribution,
        ));
    }
    for choice in combinations(&[HEADS.len(), PER_KV.len(), GPU_ROWS.len(), PAST.len()], &numbers, all) {
        let [d, per_kv, rows, past, dtype, distribution] = choice[..] else {
            unreachable!("as many as asked for")
        };
        let ((d, per_kv), ((t, most), past, dtype)) =
            ((HEADS[d], PER_KV[per_kv]), (GPU_ROWS[rows], PAST[past], DTYPES[dtype]));
        cases.push(flash(dtype, (1, per_kv, d), (t, most), past, distribution));
    }
    for choice in combinations(&[HEADS.len(), PER_KV.len(), FEW_ROWS.len(), LONG.len()], &numbers, all) {
        let [d, per_kv, rows, past, dtype, distribution] = choice[..] else {
            unreachable!("as many as asked for")
        };
        let ((d, per_kv), ((t, most), past, dtype)) =
            ((HEADS[d], PER_KV[per_kv]), (FEW_ROWS[rows], LONG[past], DTYPES[dtype]));
        let name = format!("decode d {d} of {per_kv} {dtype} T {t} of {most} P {past}");
        cases.push(of_rows(name, cached(dtype, (2, per_kv, d), most), (t, past), most, distribution));
    }
    cases
}

/// An attention: `t` tokens of a step of at most `most`, behind `past` positions.
pub fn flash(
    dtype: DType,
    (kv_heads, per_kv, d): (usize, usize, usize),
    (t, most): (i64, i64),
    past: i64,
    distribution: usize,
) -> Case {
    let name = format!("flash d {d} of {per_kv} {dtype} T {t} of {most} P {past}");
    of_rows(name, cached(dtype, (kv_heads, per_kv, d), most), (t, past), most, distribution)
}

/// An attention over a cache of 768 positions, with the logarithms of its sums.
fn cached(dtype: DType, (kv_heads, per_kv, d): (usize, usize, usize), most: i64) -> Builder {
    let mut b = Builder::new("case");
    let rows = b.symbol("T", 1, most);
    let q = b.input("q", dtype, &[rows, (kv_heads * per_kv).into(), d.into()]);
    let pos = b.input("positions", DType::I32, &[rows]);
    let [k, v] = ["k", "v"].map(|name| b.state(name, dtype, &[kv_heads.into(), Dim::of(768), d.into()]));
    let scale = 1.0 / (d as f64).sqrt();
    let y = b.attention("a", q, k, v, pos, true, scale);
    b.output("y", y);
    let sums = b.attention_lse("lse", q, k, pos, true, scale);
    b.output("sums", sums);
    b
}

fn of_rows(name: String, b: Builder, step: (i64, i64), most: i64, distribution: usize) -> Case {
    let graph = b.finish();
    let graph = if most == 1 { graph.specialise("T", 1, 1) } else { graph };
    Case { name, graph, steps: vec![step], distributions: vec![Distribution::ALL[distribution]] }
}

/// Choices of one of so many for each place, of shapes and then of numbers: all of the shapes, with numbers drawn; or in order
/// those that bring a pair of choices that none before has.
fn combinations(shapes: &[usize], numbers: &[usize], all: bool) -> Vec<Vec<usize>> {
    let longer = |found: Vec<Vec<usize>>, &count: &usize| -> Vec<Vec<usize>> {
        found.iter().flat_map(|one| (0..count).map(|i| [&one[..], &[i]].concat())).collect()
    };
    let mut found = shapes.iter().fold(vec![Vec::new()], longer);
    if all {
        let mut rng = Rng(1);
        found.iter_mut().for_each(|one| one.extend(numbers.iter().map(|&count| rng.below(count))));
        return found;
    }
    found = numbers.iter().fold(found, longer);
    let pairs = |one: &[usize]| -> Vec<(usize, usize, usize, usize)> {
        let places = (0..one.len()).flat_map(|b| (0..b).map(move |a| (a, b)));
        places.map(|(a, b)| (a, one[a], b, one[b])).collect()
    };
    let mut missing: BTreeSet<_> = found.iter().flat_map(|one| pairs(one)).collect();
    let mut taken: Vec<Vec<usize>> = Vec::new();
    // The one with the most new pairs each time; of several the first whose numbers were taken least.
    while !missing.is_empty() {
        let new = |one: &Vec<usize>| pairs(one).iter().filter(|pair| missing.contains(pair)).count();
        let as_before =
            |one: &Vec<usize>, place: usize| taken.iter().filter(|t| t[place] == one[place]).count();
        let before = |one: &Vec<usize>| (shapes.len()..one.len()).map(|place| as_before(one, place)).sum();
        let key = |one: &&Vec<usize>| (new(one), Reverse::<usize>(before(one)));
        let best = found.iter().rev().max_by_key(key).expect("there are combinations").clone();
        pairs(&best).iter().for_each(|pair| {
            missing.remove(pair);
        });
        taken.push(best);
        // Of several as good, the next one is to be of other numbers.
        found.rotate_left(1 + numbers.last().unwrap_or(&0));
    }
    taken
}

/// Random graphs, as many as asked for.
pub fn random(seed: u64, count: usize) -> Vec<Case> {
    let mut rng = Rng(seed);
    let case = |_| {
        let seed = rng.bits() >> 32;
        let (graph, steps) = (random_graph(seed, 24), vec![(1, 3), (MAX_T - 1, SLOTS - MAX_T)]);
        Case { name: format!("random {seed}"), graph, steps, distributions: Distribution::ALL.to_vec() }
    };
    (0..count).map(case).collect()
}

fn rows(name: String, build: impl FnOnce(&mut Builder, Dim)) -> Case {
    let mut b = Builder::new("case");
    let t = b.symbol("T", 1, TOKENS);
    build(&mut b, t);
    Case { name, graph: b.finish(), steps: STEPS.to_vec(), distributions: Distribution::ALL.to_vec() }
}

/// The same compiled for one token: kernels of their own.
fn one_row(case: Case) -> Case {
    Case { graph: case.graph.specialise("T", 1, 1), steps: vec![(1, 0)], ..case }
}

fn product(b: &mut Builder, name: &str, x: ValueId, n: usize, k: usize) -> ValueId {
    let dtype = b.ty(x).dtype;
    let w = b.weight(&format!("w{name}"), name, dtype, &[n.into(), k.into()]);
    b.dot(name, "tk,nk->tn", x, w, dtype)
}

/// Something around a product of rows with a weight of so many rows.
type Build = fn(&mut Builder, ValueId, usize);

fn around(b: &mut Builder, t: Dim, dtype: DType, k: usize, n: usize, build: Build) {
    let x = b.input("x", dtype, &[t, k.into()]);
    build(b, x, n);
}

/// Rows, dtype and width.
fn facts(b: &Builder, x: ValueId) -> (Dim, DType, usize) {
    let ty = b.ty(x);
    (ty.shape[0], ty.dtype, ty.shape[1].constant().expect("a width is constant") as usize)
}

fn linear(b: &mut Builder, x: ValueId, n: usize) {
    let k = facts(b, x).2;
    let y = product(b, "y", x, n, k);
    b.output("y", y);
}

fn normed(b: &mut Builder, x: ValueId, n: usize) {
    let (_, dtype, k) = facts(b, x);
    let w = b.weight("scale", "scale", dtype, &[k.into()]);
    let x = b.rms_norm("n", x, w, 1e-5);
    let y = product(b, "y", x, n, k);
    b.output("y", y);
}

fn residual(b: &mut Builder, x: ValueId, n: usize) {
    let (t, dtype, k) = facts(b, x);
    let r = b.input("r", dtype, &[t, n.into()]);
    let y = product(b, "y", x, n, k);
    let y = b.binary("sum", Binary::Add, r, y);
    b.output("y", y);
}

fn gated(b: &mut Builder, x: ValueId, n: usize) {
    let (_, dtype, k) = facts(b, x);
    let (gate, up) = (product(b, "gate", x, n, k), product(b, "up", x, n, k));
    let gate = b.cast("gate.f", gate, DType::F32);
    let gate = b.silu("silu", gate);
    let gate = b.cast("gate.s", gate, dtype);
    let y = b.binary("y", Binary::Mul, gate, up);
    b.output("y", y);
}

/// A table that rows are picked from and that is multiplied too: it is stored packed only.
fn tied(b: &mut Builder, rows: ValueId, n: usize) {
    let (t, dtype, k) = facts(b, rows);
    let table = b.weight("table", "table", dtype, &[n.into(), k.into()]);
    let ids = b.input("ids", DType::I32, &[t]);
    let x = b.gather("x", table, ids);
    let y = b.dot("y", "tk,nk->tn", x, table, DType::F32);
    b.output("y", y);
}

/// Queries, keys and values of one product each, rotated, appended to caches that attention reads.
fn attentions(dtype: DType, (heads, kv_heads, d): (usize, usize, usize)) -> Vec<Case> {
    const CAPACITY: i64 = 128;
    let build = |causal: bool| {
        let mut b = Builder::new("case");
        let t = b.symbol("T", 1, TOKENS);
        let width = 24;
        let x = b.input("x", dtype, &[t, width.into()]);
        let pos = b.input("positions", DType::I32, &[t]);
        let frequencies: Vec<f64> = (0..d / 2).map(|i| 0.6f64.powi(i as i32)).collect();
        let (cos, sin) = b.rope_tables(pos, &frequencies, 1.0);
        let [q, k, v] = [("q", heads), ("k", kv_heads), ("v", kv_heads)].map(|(name, heads)| {
            let y = product(&mut b, name, x, heads * d, width);
            b.reshape(&format!("{name}.h"), y, &[t, heads.into(), d.into()])
        });
        let (q, k) = (b.rope("qr", q, cos, sin), b.rope("kr", k, cos, sin));
        let [k, v] = [("k.0", k), ("v.0", v)].map(|(name, rows)| {
            let cache = b.state(name, dtype, &[kv_heads.into(), Dim::of(CAPACITY), d.into()]);
            let cache = b.cache_append(&format!("{name}.c"), cache, rows, pos);
            b.output(name, cache);
            cache
        });
        let y = b.attention("a", q, k, v, pos, causal, 1.0 / (d as f64).sqrt());
        b.output("y", y);
        b.finish()
    };
    // Positions about the edges of a tile of 64 keys, and the last that the cache has.
    let steps = vec![(1, 0), (1, 63), (1, 64), (5, 60), (TOKENS, 0), (7, CAPACITY - 7)];
    let shape = format!("heads {heads} of {kv_heads} d {d} {dtype}");
    let distributions = Distribution::ALL.to_vec();
    let one = |causal: bool| {
        let steps = steps.iter().copied().filter(|s| s.0 == 1).collect();
        let graph = build(causal).specialise("T", 1, 1);
        Case { name: String::new(), graph, steps, distributions: distributions.clone() }
    };
    let named = |form: &str, case: Case| Case { name: format!("{form} {shape}"), ..case };
    let many = |causal: bool| {
        let (graph, steps) = (build(causal), steps.clone());
        Case { name: String::new(), graph, steps, distributions: distributions.clone() }
    };
    vec![
        named("attention", many(true)),
        named("attention without a mask", many(false)),
        named("attention one row", one(true)),
    ]
}

fn functions(b: &mut Builder, t: Dim, dtype: DType, n: usize) {
    let x = b.input("x", dtype, &[t, n.into()]);
    let x = b.cast("x32", x, DType::F32);
    let size = b.unary("size", Unary::Abs, x);
    for op in Unary::ALL {
        // Where it is defined: beside zero too, in `tiny`.
        let argument = match op {
            Unary::Log | Unary::Sqrt | Unary::Rsqrt => size,
            Unary::Neg | Unary::Abs | Unary::Exp | Unary::Sin | Unary::Cos | Unary::Tanh | Unary::Recip => x,
        };
        let y = b.unary(op.facts().name, op, argument);
        let y = b.cast("stored", y, dtype);
        b.output(op.facts().name, y);
    }
}

fn arithmetic(b: &mut Builder, t: Dim, dtype: DType, n: usize) {
    let (x, z) = (b.input("x", dtype, &[t, n.into()]), b.input("z", dtype, &[t, n.into()]));
    for op in Binary::ALL {
        let y = b.binary(op.facts().name, op, x, z);
        b.output(op.facts().name, y);
    }
    for op in Compare::ALL {
        let holds = b.compare(op.name(), op, x, z);
        let y = b.select("chosen", holds, x, z);
        b.output(op.name(), y);
    }
}

fn moves(b: &mut Builder, t: Dim, dtype: DType, n: usize) {
    let n = Dim::from(n);
    let (x, w) = (b.input("x", dtype, &[t, n]), b.weight("w", "w", dtype, &[Dim::of(3), n]));
    let joined = b.concat("joined", &[x, x], 1);
    let part = b.slice("part", joined, 1, Dim::of(1), n);
    let turned = b.transpose("turned", w, &[1, 0]);
    let spread = b.broadcast("spread", w, &[1, 2], &[t, Dim::of(3), n]);
    let flat = b.reshape("flat", spread, &[t, n * 3]);
    for (name, y) in [("joined", joined), ("part", part), ("turned", turned), ("flat", flat)] {
        b.output(name, y);
    }
}
