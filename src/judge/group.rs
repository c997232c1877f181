//! How far roundings can carry each value of a group: the oracle's value with its error bounds, op by op.
//!
//! Each element carries its exact value `x` and a bound `h` on what is computed in its place: `|x̂ - x| <= h`. What a
//! group reads from memory is exact; one f32 rounding adds `u |x|` (`u = 2^-24`), or `η = 2^-150` below 2^-126.
//!
//! | op | bound of the result `y` |
//! |---|---|
//! | `a ± b` | `h_a + h_b + u abs(y)` |
//! | `a b` | `abs(a) h_b + abs(b) h_a + h_a h_b + u abs(y) + η` |
//! | `a / b` | `(h_a + abs(y) h_b) / (abs(b) - h_b) + u abs(y) + η` |
//! | `f(x)` | `max abs(f(x ± h) - f(x)) + 2 c u abs(y) + 2 c η`, `c` of [`function_ulp`] (`sin cos abs`: `h` for the first term) |
//! | `max min`, `reduce.max` | the largest bound of an operand |
//! | `reduce.sum` over `K` | `Σ h + K u Σ (abs(x) + h)` |
//! | `dot` over `K` | `Σ (abs(a) h_b + abs(b) h_a + h_a h_b) + K u Σ (abs(a) + h_a)(abs(b) + h_b)`, and `2 K η` |
//! | `compare`, then `select` | exact where the operands differ by more than their bounds; else either choice |
//! | moves, `cast` between floats | the operand's: floats stay f32 inside |
//!
//! `h` is what it would be if f32 had no largest number. Where `abs(x) + h` is beyond that, what is computed may be
//! infinite: a quotient by it, its `recip` and its `rsqrt` are then 0 at least, `abs(y)` away; of a result within f32's
//! range that other ops make of it nothing can be said, nor of a sum whose `Σ abs` is beyond.
//!
//! The statistical bound has `sqrt(K)` for `K`. For a sum of products of stored numbers the formulas are those of the
//! policy: `K u Σ abs(a) abs(b)` is `g(K) u_acc s`.
//!
//! Dtypes inside, as the families declare them:
//! * a `dot`'s operand that its own group computes is stored in its dtype: `u_in abs(x)` more, in f16 2^-25 more; where that
//!   may be beyond the dtype's largest number, nothing can be said;
//! * bf16 products by `vdpbf16ps` take subnormals for zero: 2^-126 for each product, and `2^-126 (abs(a) + abs(b))`;
//! * attention stores probabilities in the dtype of V: `u_in Σ p abs(v)` more, in f16 `2^-25 Σ abs(v)` more.

use super::{Expected, function_ulp, near_zero};
use ir::DType;
use ir::Graph;
use ir::dim::MAX_SYMBOLS;
use ir::families::GroupView;
use ir::graph::{Value, ValueId};
use ir::interp::{InterpError, Rounding, Tensor, compute};
use ir::op::{Binary, Op, Reduction, Unary};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::rc::Rc;

/// f32's unit roundoff.
pub(super) const U: f64 = 1.0 / (1u64 << 24) as f64;

/// f32's largest number.
const LARGEST: f64 = f32::MAX as f64;

/// Half of f32's smallest number: what rounding a result below 2^-126 may cost.
const ETA: f64 = f64::from_bits((1023 - 150) << 52);

/// f32's and bf16's smallest normal number: what flushing subnormals may cost.
const NORMAL: f64 = f64::from_bits((1023 - 126) << 52);

/// Keys of the smallest tile that an attention schedule may have.
const LEAST_KEYS: usize = 16;

/// A value with its bounds, element by element.
#[derive(Clone, Debug)]
struct Known {
    exact: Rc<Tensor>,
    /// `None` where it is zero throughout.
    errors: Option<Errors>,
}

#[derive(Clone, Debug)]
struct Errors {
    hard: Vec<f64>,
    typical: Vec<f64>,
}

impl Known {
    fn stored(exact: Rc<Tensor>) -> Known {
        Known { exact, errors: None }
    }

    fn hard(&self, at: usize) -> f64 {
        self.errors.as_ref().map_or(0.0, |e| e.hard[at])
    }

    fn typical(&self, at: usize) -> f64 {
        self.errors.as_ref().map_or(0.0, |e| e.typical[at])
    }

    /// The bounds of one kind as a tensor, so that the interpreter can move them.
    fn bounds(&self, pick: fn(&Errors) -> &Vec<f64>) -> Rc<Tensor> {
        let data = self.errors.as_ref().map_or_else(|| vec![0.0; self.exact.data.len()], |e| pick(e).clone());
        Rc::new(Tensor { dtype: DType::F64, shape: self.exact.shape.clone(), data })
    }
}

/// What each root of a group must be near to, given what the group reads from memory. In the order of `view.roots`.
///
/// Inside, nothing is rounded; that holds for a root that the group itself reads on, too.
///
/// # Errors
///
/// What the interpreter says of an op, such as an index outside of its table.
pub fn expect(
    view: &GroupView<'_>,
    symbols: &[i64; MAX_SYMBOLS],
    stored: &mut dyn FnMut(ValueId) -> Rc<Tensor>,
) -> Result<Vec<Expected>, InterpError> {
    let graph = view.graph;
    let mut known: HashMap<ValueId, Known> = HashMap::new();
    for &id in &view.values {
        let mut operands = Vec::new();
        for &operand in &graph[id].operands {
            if let Entry::Vacant(unknown) = known.entry(operand) {
                let tensor = match &graph[operand].op {
                    Op::Constant { .. } => Rc::new(compute(&graph[operand], &[], symbols, Rounding::Stored)?),
                    _ => stored(operand),
                };
                unknown.insert(Known::stored(tensor));
            }
            operands.push(known[&operand].clone());
        }
        let result = step(view, id, &operands, symbols)?;
        known.insert(id, result);
    }
    let expected = |root: &ValueId| {
        let (value, known) = (&graph[*root], &known[root]);
        let bounds = |pick| Rc::unwrap_or_clone(known.bounds(pick)).data;
        let (hard, typical) = (bounds(|e| &e.hard), bounds(|e| &e.typical));
        let (dtype, shape) = (value.ty.dtype, known.exact.shape.clone());
        Expected { dtype, shape, exact: known.exact.data.clone(), hard, typical }
    };
    Ok(view.roots.iter().map(expected).collect())
}

/// What one element is, from its index and what is asked of each operand there.
pub(super) type Formula<'f> = dyn Fn(usize, &dyn Fn(usize) -> f64) -> f64 + 'f;

/// One value of a group.
fn step(
    view: &GroupView<'_>,
    id: ValueId,
    operands: &[Known],
    symbols: &[i64; MAX_SYMBOLS],
) -> Result<Known, InterpError> {
    let graph: &Graph = view.graph;
    let value = &graph[id];
    let exact_operands: Vec<Rc<Tensor>> = operands.iter().map(|k| k.exact.clone()).collect();
    let exact = Rc::new(compute(value, &exact_operands, symbols, Rounding::Exact)?);
    let y = &exact.data;
    let float = value.ty.dtype.is_float();
    let from_int = |n: usize| !operands[n].exact.dtype.is_float();
    let each = |f: &Formula<'_>| {
        // The formula of one element, from each operand's bound there.
        let over = |bound: fn(&Known, usize) -> f64| {
            (0..y.len()).map(|at| f(at, &|n: usize| bound(&operands[n], at))).collect::<Vec<f64>>()
        };
        Some(Errors { hard: over(Known::hard), typical: over(Known::typical) })
    };
    let x = |n: usize, at: usize| operands[n].exact.data[at];
    let errors = match &value.op {
        Op::Cast if float && from_int(0) => each(&|at, _| U * y[at].abs()),
        Op::Cast if float => operands[0].errors.clone(),
        // A float that may lie on either side of a whole number.
        Op::Cast => each(&|at, h| {
            let (low, high) = (x(0, at) - h(0), x(0, at) + h(0));
            let round = |x: f64| value.ty.dtype.round(x);
            (round(high) - y[at]).abs().max((round(low) - y[at]).abs())
        }),
        Op::Unary(op) => each(&|at, h| {
            let usual = spread(*op, x(0, at), h(0)) + function_error(*op, y[at]);
            match op {
                _ if !overflows(x(0, at), h(0)) => usual,
                Unary::Recip | Unary::Rsqrt => usual.max(y[at].abs()),
                Unary::Log | Unary::Sqrt | Unary::Sin | Unary::Cos => f64::INFINITY,
                Unary::Neg | Unary::Abs | Unary::Exp | Unary::Tanh => usual,
            }
        }),
        Op::Binary(_) if !float => None,
        Op::Binary(op) => each(&|at, h| {
            let (a, b, rounding) = (x(0, at).abs(), x(1, at).abs(), U * y[at].abs());
            let infinite = [0, 1].map(|n| overflows(x(n, at), h(n)));
            let usual = match op {
                Binary::Add | Binary::Sub => h(0) + h(1) + rounding,
                Binary::Mul => a * h(1) + b * h(0) + h(0) * h(1) + rounding + ETA,
                Binary::Div if h(1) < b => (h(0) + y[at].abs() * h(1)) / (b - h(1)) + rounding + ETA,
                Binary::Div if h(0) == 0.0 && h(1) == 0.0 => 0.0,
                Binary::Div => f64::INFINITY,
                Binary::Max | Binary::Min => h(0).max(h(1)),
            };
            match op {
                Binary::Max | Binary::Min => usual,
                _ if infinite == [false; 2] || y[at].abs() > LARGEST => usual,
                Binary::Div if infinite == [false, true] => usual.max(y[at].abs()),
                Binary::Add | Binary::Sub | Binary::Mul | Binary::Div => f64::INFINITY,
            }
        }),
        Op::Compare(_) => each(&|at, h| {
            let both = [0, 1].iter().all(|&n| overflows(x(n, at), h(n)));
            let doubt = if both { f64::INFINITY } else { h(0) + h(1) };
            f64::from(u8::from(doubt > 0.0 && (x(0, at) - x(1, at)).abs() <= doubt))
        }),
        Op::Select => each(&|at, h| match h(0) == 0.0 {
            true if x(0, at) != 0.0 => h(1),
            true => h(2),
            false => (x(1, at) - x(2, at)).abs() + h(1).max(h(2)),
        }),
        Op::Iota { .. } | Op::Constant { .. } | Op::Argmax => None,
        Op::Broadcast { .. }
        | Op::Reshape
        | Op::Transpose { .. }
        | Op::Slice { .. }
        | Op::Concat { .. }
        | Op::Gather
        | Op::CacheAppend => moved(value, operands, symbols)?,
        Op::Reduce { kind, axis } => Some(reduced(*kind, &operands[0], value, *axis, symbols)?),
        Op::Dot { .. } => {
            let inside = |n: usize| view.has(value.operands[n]);
            let [a, b] = [0, 1].map(|n| in_memory(&operands[n], inside(n)));
            Some(dot(value, &a, &b, symbols)?)
        }
        Op::Attention { causal, scale } => Some(attention(operands, *causal, *scale)),
        Op::AttentionLse { causal, scale } => Some(attention_lse(operands, *causal, *scale)),
        Op::ScatterAdd | Op::Quantize | Op::Dequantize => {
            // No family has these; whoever adds one says here what it rounds.
            each(&|_, _| f64::INFINITY)
        }
        Op::Input { .. } | Op::Weight { .. } | Op::State { .. } => {
            unreachable!("bound values are in no group")
        }
    };
    Ok(Known { exact, errors })
}

/// Can what is computed in place of `x` be infinite in f32?
fn overflows(x: f64, h: f64) -> bool {
    x.abs() + h > LARGEST
}

/// How far `f` moves when its argument does.
pub(super) fn spread(op: Unary, x: f64, h: f64) -> f64 {
    if h == 0.0 {
        return 0.0;
    }
    let f = op.facts().eval;
    match op {
        // Of slope one at most; the others are monotone, or have a pole that makes the difference infinite.
        Unary::Neg | Unary::Abs | Unary::Sin | Unary::Cos => h,
        Unary::Exp | Unary::Log | Unary::Sqrt | Unary::Rsqrt | Unary::Tanh => {
            (f(x + h) - f(x)).abs().max((f(x - h) - f(x)).abs())
        }
        Unary::Recip if h < x.abs() => (f(x + h) - f(x)).abs().max((f(x - h) - f(x)).abs()),
        Unary::Recip => f64::INFINITY,
    }
}

pub(super) fn function_error(op: Unary, y: f64) -> f64 {
    2.0 * function_ulp(op) * (U * y.abs() + ETA)
}

/// Bounds that move with their elements.
fn moved(
    value: &Value,
    operands: &[Known],
    symbols: &[i64; MAX_SYMBOLS],
) -> Result<Option<Errors>, InterpError> {
    if operands.iter().all(|k| k.errors.is_none()) {
        return Ok(None);
    }
    let run = |pick: fn(&Errors) -> &Vec<f64>| {
        let is_index = |n: usize| n + 1 == operands.len() && matches!(value.op, Op::Gather | Op::CacheAppend);
        let bounds: Vec<Rc<Tensor>> = (operands.iter().enumerate())
            .map(|(n, k)| if is_index(n) { k.exact.clone() } else { k.bounds(pick) })
            .collect();
        moved_by(value, &bounds, symbols)
    };
    Ok(Some(Errors { hard: run(|e| &e.hard)?, typical: run(|e| &e.typical)? }))
}

/// What an op that moves or sums elements makes of numbers in f64.
pub(super) fn moved_by(
    value: &Value,
    operands: &[Rc<Tensor>],
    symbols: &[i64; MAX_SYMBOLS],
) -> Result<Vec<f64>, InterpError> {
    compute(&as_f64(value), operands, symbols, Rounding::Exact).map(|tensor| tensor.data)
}

fn as_f64(value: &Value) -> Value {
    let mut like = value.clone();
    like.ty.dtype = DType::F64;
    like
}

fn reduced(
    kind: Reduction,
    x: &Known,
    value: &Value,
    axis: usize,
    symbols: &[i64; MAX_SYMBOLS],
) -> Result<Errors, InterpError> {
    let fold = |t: Rc<Tensor>| moved_by(value, &[t], symbols);
    let length = x.exact.shape[axis] as f64;
    let bound = |pick: fn(&Errors) -> &Vec<f64>, growth: f64| {
        let h = x.bounds(pick);
        let moved = fold(h.clone())?;
        if kind == Reduction::Max {
            return Ok(moved);
        }
        let sizes = x.exact.data.iter().zip(&h.data).map(|(x, h)| x.abs() + h).collect();
        let sizes = fold(Rc::new(Tensor { dtype: DType::F64, shape: x.exact.shape.clone(), data: sizes }))?;
        let bound =
            |(h, s): (&f64, f64)| if s > LARGEST { f64::INFINITY } else { h + growth * (U * s + ETA) };
        Ok(moved.iter().zip(sizes).map(bound).collect())
    };
    Ok(Errors { hard: bound(|e| &e.hard, length)?, typical: bound(|e| &e.typical, length.sqrt())? })
}

/// What storing inside costs near zero. What bf16 loses there, products lose too: its bounds have it already.
fn lost(dtype: DType) -> f64 {
    if dtype == DType::F16 { near_zero(dtype) } else { 0.0 }
}

/// An operand as a product reads it: what its own group computes is stored in its dtype before.
fn in_memory(x: &Known, inside: bool) -> Known {
    let dtype = x.exact.dtype;
    let u = if dtype == DType::F32 { 0.0 } else { dtype.roundoff() };
    if !inside || u == 0.0 {
        return x.clone();
    }
    let round = |pick: fn(&Errors) -> &Vec<f64>| {
        let bounds = x.bounds(pick);
        let stored = |(h, size): (&f64, f64)| match dtype.round(size + h).is_finite() {
            true => h + u * (size + h) + lost(dtype),
            false => f64::INFINITY,
        };
        bounds.data.iter().zip(x.exact.data.iter().map(|x| x.abs())).map(stored).collect()
    };
    let errors = Some(Errors { hard: round(|e| &e.hard), typical: round(|e| &e.typical) });
    Known { exact: x.exact.clone(), errors }
}

fn dot(value: &Value, a: &Known, b: &Known, symbols: &[i64; MAX_SYMBOLS]) -> Result<Errors, InterpError> {
    let Op::Dot { axes } = &value.op else { unreachable!("called for products") };
    let extent = |c: &char| a.exact.shape[axes.lhs.iter().position(|l| l == c).expect("in both operands")];
    let length = axes.contracted().iter().map(extent).product::<usize>() as f64;
    let product = |p: Vec<f64>, q: Vec<f64>| {
        let tensor =
            |k: &Known, data| Rc::new(Tensor { dtype: DType::F64, shape: k.exact.shape.clone(), data });
        moved_by(value, &[tensor(a, p), tensor(b, q)], symbols)
    };
    let sizes = |k: &Known| -> Vec<f64> { k.exact.data.iter().map(|x| x.abs()).collect() };
    let bf16 = a.exact.dtype == DType::BF16;
    let bound = |pick: fn(&Errors) -> &Vec<f64>, growth: f64| -> Result<Vec<f64>, InterpError> {
        let wide = |k: &Known| -> Vec<f64> {
            let h = k.bounds(pick);
            sizes(k).iter().zip(&h.data).map(|(x, h)| x + h).collect()
        };
        // (|a| + h_a)(|b| + h_b) - |a||b| is what the operands' errors can do.
        let (s, wide_s) = (product(sizes(a), sizes(b))?, product(wide(a), wide(b))?);
        let mut bound: Vec<f64> = s
            .iter()
            .zip(&wide_s)
            .map(|(s, w)| match *w > LARGEST {
                true => f64::INFINITY,
                false => (w - s).max(0.0) + growth * U * w + 2.0 * length * ETA,
            })
            .collect();
        if bf16 {
            let ones = |k: &Known| vec![NORMAL; k.exact.data.len()];
            let (left, right) = (product(wide(a), ones(b))?, product(ones(a), wide(b))?);
            let floors = left.iter().zip(&right).map(|(l, r)| l + r + 2.0 * length * NORMAL);
            bound.iter_mut().zip(floors).for_each(|(h, floor)| *h += floor);
        }
        Ok(bound)
    };
    Ok(Errors { hard: bound(|e| &e.hard, length)?, typical: bound(|e| &e.typical, length.sqrt())? })
}

/// A score with the size of its sum, and what flushing may cost it.
type Score = (f64, f64, f64);

/// Shows for each position and head the scores of the slots that it sees, and where a slot's row of keys begins.
fn each_row(
    [q, k, pos]: [&Tensor; 3],
    causal: bool,
    scale: f64,
    mut show: impl FnMut(&[Score], &dyn Fn(usize) -> usize),
) {
    let &[tokens, heads, d] = &q.shape[..] else { panic!("queries have three axes") };
    let &[kv_heads, slots, _] = &k.shape[..] else { panic!("a cache has three axes") };
    let newest = pos.data.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let floor = floor(q.dtype);
    for t in 0..tokens {
        let last = if causal { pos.data[t] } else { newest };
        let seen = (0..slots).filter(|&slot| slot as f64 <= last).count();
        for head in 0..heads {
            let q = &q.data[(t * heads + head) * d..][..d];
            let row = |slot: usize| (head / (heads / kv_heads) * slots + slot) * d;
            let mut scores = Vec::with_capacity(seen);
            for slot in 0..seen {
                let products = q.iter().zip(&k.data[row(slot)..][..d]).map(|(a, b)| a * b);
                let (mut s, mut size, mut flushed) = (0.0, 0.0, 0.0);
                for (at, x) in products.enumerate() {
                    s += x;
                    size += x.abs();
                    flushed += floor * (2.0 + q[at].abs() + k.data[row(slot) + at].abs());
                }
                scores.push((scale * s, scale.abs() * size, scale.abs() * flushed));
            }
            show(&scores, &row);
        }
    }
}

/// What taking subnormals for zero may cost a product.
fn floor(dtype: DType) -> f64 {
    if dtype == DType::BF16 { NORMAL } else { 2.0 * ETA }
}

/// How far a weight `p = exp(s - max)` is off, over `tiles` of keys and heads of `d`: absolute, of it and of its score.
fn off((s, size, flushed): Score, max: f64, tiles: f64, d: usize, grown: impl Fn(f64) -> f64) -> f64 {
    let c = 2.0 * function_ulp(Unary::Exp) + 1.0;
    let score = grown(d as f64) * U * size + 2.0 * U * s.abs() + flushed;
    let off = score + U * (s - max).abs() + grown(tiles + 1.0) * c * U;
    (s - max).exp() * off.exp_m1() + 2.0 * ETA
}

/// `y = max + ln D`, of an attention's D: `h_y = -ln(1 - h_D / D)`, the errors of the logarithm and of the highest score,
/// which takes part in the sum, and `u (abs(max) + abs(y))`.
fn attention_lse(operands: &[Known], causal: bool, scale: f64) -> Errors {
    let [q, k, pos] = [0, 1, 2].map(|n| &*operands[n].exact);
    let d = q.shape[2];
    let mut errors = Errors { hard: Vec::new(), typical: Vec::new() };
    each_row([q, k, pos], causal, scale, |scores, _| {
        let max = scores.iter().map(|s| s.0).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s.0 - max).exp()).sum();
        let tiles = (scores.len() / LEAST_KEYS + 1) as f64;
        for (growth, out) in [(1.0, &mut errors.hard), (0.5, &mut errors.typical)] {
            let grown = |n: f64| n.powf(growth);
            let of_weights: f64 = scores.iter().map(|&score| off(score, max, tiles, d, grown)).sum();
            let share = of_weights / sum + grown(scores.len() as f64) * U * (1.0 + of_weights / sum);
            out.push(match share < 1.0 {
                true => {
                    let whole = max + sum.ln();
                    -(-share).ln_1p()
                        + function_error(Unary::Log, sum.ln())
                        + U * (2.0 * max.abs() + whole.abs())
                }
                false => f64::INFINITY,
            });
        }
    });
    errors
}

/// `y = N / D`, `N = Σ p v`, `D = Σ p`, `p = exp(s - max)`, `s = scale q k`, streamed over tiles.
///
/// * A score: `h_s = scale K u Σ abs(q k) + 2 u abs(s)`, `K` the head's width.
/// * The maximum cancels between N and D whatever it is. Subtracting it, and what later tiles add to it, rounds by
///   `u abs(s - max)` in all; each tile has an `exp` and a multiplication more: `p` is off by
///   `δ = exp(h_s + u abs(s - max) + (tiles + 1)(2 c + 1) u) - 1`.
/// * `h_N = Σ p δ abs(v) + S u Σ p abs(v)`, `h_D = Σ p δ + S u Σ p` over `S` slots; N has `u_in Σ p abs(v)` more.
/// * `h_y = (h_N + abs(y) h_D) / (D - h_D) + u abs(y)`.
fn attention(operands: &[Known], causal: bool, scale: f64) -> Errors {
    let [q, k, v, pos] = [0, 1, 2, 3].map(|n| &*operands[n].exact);
    let d = q.shape[2];
    let u_in = if q.dtype == DType::F32 { 0.0 } else { q.dtype.roundoff() };
    let (floor, lost) = (floor(q.dtype), lost(q.dtype));
    let mut errors = Errors { hard: Vec::new(), typical: Vec::new() };
    each_row([q, k, pos], causal, scale, |scores, row| {
        let max = scores.iter().map(|s| s.0).fold(f64::NEG_INFINITY, f64::max);
        let tiles = (scores.len() / LEAST_KEYS + 1) as f64;
        for (growth, out) in [(1.0, &mut errors.hard), (0.5, &mut errors.typical)] {
            let grown = |n: f64| n.powf(growth);
            let (mut sum, mut sum_error) = (0.0, 0.0);
            let mut columns = vec![(0.0, 0.0, 0.0); d];
            for (slot, &score) in scores.iter().enumerate() {
                let (p, p_error) = ((score.0 - max).exp(), off(score, max, tiles, d, grown));
                sum += p;
                sum_error += p_error;
                for (column, v) in columns.iter_mut().zip(&v.data[row(slot)..][..d]) {
                    column.0 += p * v;
                    column.1 += p * v.abs();
                    column.2 +=
                        (p_error + u_in * (p + p_error) + lost) * v.abs() + floor * (2.0 + v.abs() + p);
                }
            }
            let length = grown(scores.len() as f64);
            sum_error += length * U * (sum + sum_error);
            out.extend(columns.into_iter().map(|(n, size, error)| {
                let n_error = error + length * U * (size + error);
                let y = (n / sum).abs();
                match sum_error < sum {
                    true => (n_error + y * sum_error) / (sum - sum_error) + U * y + ETA,
                    false => f64::INFINITY,
                }
            }));
        }
    });
    errors
}
