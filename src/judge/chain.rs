//! How far roundings are likely to carry a value through a chain of kernels: a layer, or a whole model.
//!
//! Bounds that hold for every rounding ([`super::group`]) grow by the length of each sum, so of a chain they say nothing. Here
//! each rounding is a random number of its own, uniform in its interval: each element has its exact value `x` and the size
//! `s` of its error, the root of the sum of squares of what each rounding can do to it, to first order.
//!
//! | op | `s²` of the result `y` |
//! |---|---|
//! | `a ± b` | `s_a² + s_b²` |
//! | `a b` | `a² s_b² + b² s_a²` |
//! | `a / b` | `(s_a² + y² s_b²) / b²` |
//! | `f(x)` | `max abs(f(x ± s) - f(x))²` |
//! | `max min select`, `reduce.max` | of the operand that is taken; the largest |
//! | `reduce.sum` over `K` | `Σ s² + K (u Σ abs(x))²` |
//! | `dot` over `K` | `Σ (a² s_b² + b² s_a²) + K (u Σ abs(a b))²` |
//! | attention | `Σ p² s_v² + Σ p² (v - y)² s_score²`, and probabilities in the dtype of V |
//! | moves | the operand's |
//!
//! Each op adds `(u y)²` of f32. What a group stores is rounded to its dtype for those that read it: `(u_out x)²` more; so is
//! an operand of a product that its own group computes. Values outside of groups are rounded not at all.
//!
//! An error that is the sum of uniform roundings has a standard deviation of `s / √3`. The same rounding may reach an element
//! on two ways, which adds up to `√2 s` where squares say `s`.

use super::group::{Formula, U, function_error, moved_by, spread};
use super::{Mismatch, index_of, near_zero, rms};
use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::graph::{Graph, Value, ValueId};
use ir::interp::{InterpError, Rounding, Tensor, compute};
use ir::op::{Binary, Op, Reduction};
use std::collections::HashMap;
use std::rc::Rc;

/// Largest root mean square of `error / s` over a tensor: five standard deviations, even if all of its errors are one
/// rounding's, or three and a half on two ways.
const RMS: f64 = 3.0;

/// Largest `error / s` of an element: eight standard deviations, or six on two ways.
const ELEMENT: f64 = 5.0;

/// A tensor as it is likely to be: what a chain gives.
#[derive(Clone, Debug)]
pub struct Likely {
    /// The oracle's value, without any rounding.
    pub exact: Tensor,
    /// The size of each element's error, storing included.
    pub size: Vec<f64>,
}

impl Likely {
    /// Judges what was found: the share of the bound that was used, at most 1.
    ///
    /// # Errors
    ///
    /// The element that is farthest off.
    pub fn check(&self, found: &Tensor) -> Result<f64, Mismatch> {
        self.check_by(&self.exact, found)
    }

    /// As [`Likely::check`], where somebody else says what is true.
    ///
    /// # Errors
    ///
    /// The element that is farthest off.
    pub fn check_by(&self, truth: &Tensor, found: &Tensor) -> Result<f64, Mismatch> {
        if found.shape != truth.shape || truth.data.len() != self.size.len() {
            return Err(Mismatch::Type {
                found_dtype: found.dtype,
                found: found.shape.clone(),
                expected_dtype: truth.dtype,
                expected: truth.shape.clone(),
            });
        }
        let ratio = |at: usize| match (found.data[at] - truth.data[at]).abs() {
            0.0 => 0.0,
            error if error.is_nan() => f64::INFINITY,
            error => error / self.size[at],
        };
        let ratios: Vec<f64> = (0..self.size.len()).map(ratio).collect();
        let worst = (0..ratios.len()).max_by(|&a, &b| ratios[a].total_cmp(&ratios[b]));
        let Some(at) = worst else { return Ok(0.0) };
        let share = (ratios[at] / ELEMENT).max(rms(ratios.iter().copied()) / RMS);
        match share <= 1.0 {
            true => Ok(share),
            false => Err(Mismatch::Element {
                index: index_of(at, &found.shape),
                found: found.data[at],
                expected: truth.data[at],
                bound: ELEMENT * self.size[at],
                share,
            }),
        }
    }

    /// Adds the rows of another.
    pub fn append(&mut self, other: Likely) {
        self.exact.append(other.exact);
        self.size.extend(other.size);
    }
}

/// A value with the squares of its errors' sizes; `None` where they are zero throughout.
#[derive(Clone, Debug)]
struct Known {
    exact: Rc<Tensor>,
    squares: Option<Rc<Vec<f64>>>,
}

impl Known {
    fn square(&self, at: usize) -> f64 {
        self.squares.as_ref().map_or(0.0, |squares| squares[at])
    }

    /// Its squares as a tensor, so that the interpreter can move and sum them.
    fn tensor(&self) -> Rc<Tensor> {
        let data = self.squares.as_ref().map_or_else(|| vec![0.0; self.exact.data.len()], |s| s.to_vec());
        Rc::new(Tensor { dtype: DType::F64, shape: self.exact.shape.clone(), data })
    }

    /// As it is read after it was stored.
    fn stored(&self, dtype: DType) -> Known {
        if !dtype.is_float() {
            return self.clone();
        }
        let (u, least) = (dtype.roundoff(), near_zero(dtype));
        let square = |(at, x): (usize, &f64)| self.square(at) + (u * x.abs() + least).powi(2);
        let squares = self.exact.data.iter().enumerate().map(square).collect();
        Known { exact: self.exact.clone(), squares: Some(Rc::new(squares)) }
    }
}

/// Values of a graph, computed as they are asked for.
pub struct Chain<'c> {
    graph: &'c Graph,
    symbols: [i64; MAX_SYMBOLS],
    /// By value: inside of its group.
    known: HashMap<ValueId, Known>,
    /// Are weights those of a checkpoint, rounded to their dtype?
    rounded_weights: bool,
}

impl<'c> Chain<'c> {
    /// A chain of a graph. `rounded_weights`: what is asked for is to be compared with a model whose weights were not rounded
    /// to the graph's dtypes.
    pub fn new(graph: &'c Graph, symbols: [i64; MAX_SYMBOLS], rounded_weights: bool) -> Chain<'c> {
        Chain { graph, symbols, known: HashMap::new(), rounded_weights }
    }

    /// Gives a value: it is as it is, and what made it does not matter.
    pub fn give(&mut self, id: ValueId, exact: Rc<Tensor>) {
        self.known.insert(id, Known { exact, squares: None });
    }

    /// Computes values from those that were given. `bound` is asked for weights, states and inputs.
    ///
    /// # Errors
    ///
    /// What `bound` says; what the interpreter says of an op, such as an index outside of its table.
    pub fn likely<E: From<InterpError>>(
        &mut self,
        wanted: &[ValueId],
        bound: &mut dyn FnMut(&Value) -> Result<Rc<Tensor>, E>,
    ) -> Result<Vec<Likely>, E> {
        let mut needed = vec![false; self.graph.values.len()];
        wanted.iter().for_each(|id| needed[id.0 as usize] = true);
        for id in self.graph.ids().rev() {
            if needed[id.0 as usize] && !self.known.contains_key(&id) {
                self.graph[id].operands.iter().for_each(|operand| needed[operand.0 as usize] = true);
            }
        }
        for id in self.graph.ids().filter(|id| needed[id.0 as usize]) {
            if self.known.contains_key(&id) {
                continue;
            }
            let value = &self.graph[id];
            let known = match &value.op {
                Op::Input { .. } | Op::State { .. } => Known { exact: bound(value)?, squares: None },
                Op::Weight { .. } => {
                    let exact = Known { exact: bound(value)?, squares: None };
                    if self.rounded_weights { exact.stored(value.ty.dtype) } else { exact }
                }
                _ => self.step(id)?,
            };
            self.known.insert(id, known);
        }
        let likely = |id: &ValueId| {
            let value = &self.graph[*id];
            let known = &self.known[id];
            let known = if value.group.is_some() { known.stored(value.ty.dtype) } else { known.clone() };
            let size = (0..known.exact.data.len()).map(|at| known.square(at).sqrt()).collect();
            Likely { exact: Tensor::clone(&known.exact), size }
        };
        Ok(wanted.iter().map(likely).collect())
    }

    /// An operand as a value reads it.
    fn operand(&self, reader: ValueId, id: ValueId) -> Known {
        let (known, of) = (&self.known[&id], &self.graph[id]);
        let inside = of.group == self.graph[reader].group;
        let product = matches!(self.graph[reader].op, Op::Dot { .. });
        match of.group.is_some() && (!inside || product) && known.squares.is_some() {
            true => known.stored(of.ty.dtype),
            false => known.clone(),
        }
    }

    fn step(&self, id: ValueId) -> Result<Known, InterpError> {
        let value = &self.graph[id];
        let operands: Vec<Known> = value.operands.iter().map(|&o| self.operand(id, o)).collect();
        let plain: Vec<Rc<Tensor>> = operands.iter().map(|k| k.exact.clone()).collect();
        let exact = Rc::new(compute(value, &plain, &self.symbols, Rounding::Exact)?);
        let squares = match value.ty.dtype.is_float() {
            true => self.squares(value, &exact, &operands)?,
            false => None,
        };
        Ok(Known { exact, squares: squares.map(Rc::new) })
    }

    fn squares(
        &self,
        value: &Value,
        exact: &Tensor,
        operands: &[Known],
    ) -> Result<Option<Vec<f64>>, InterpError> {
        let y = &exact.data;
        let x = |n: usize, at: usize| operands[n].exact.data[at];
        let each = |f: &Formula<'_>| {
            Some(
                (0..y.len())
                    .map(|at| f(at, &|n: usize| operands[n].square(at)) + (U * y[at]).powi(2))
                    .collect(),
            )
        };
        let on = |tensors: &[Rc<Tensor>]| moved_by(value, tensors, &self.symbols);
        Ok(match &value.op {
            Op::Cast if !operands[0].exact.dtype.is_float() => each(&|_, _| 0.0),
            Op::Cast => operands[0].squares.as_ref().map(|squares| squares.to_vec()),
            Op::Unary(op) => each(&|at, s| {
                let moved = spread(*op, x(0, at), s(0).sqrt());
                moved.powi(2) + function_error(*op, y[at]).powi(2)
            }),
            Op::Binary(op) => each(&|at, s| {
                let (a, b) = (x(0, at), x(1, at));
                match op {
                    Binary::Add | Binary::Sub => s(0) + s(1),
                    Binary::Mul => a * a * s(1) + b * b * s(0),
                    Binary::Div => (s(0) + y[at] * y[at] * s(1)) / (b * b),
                    Binary::Max => {
                        if a > b {
                            s(0)
                        } else {
                            s(1)
                        }
                    }
                    Binary::Min => {
                        if a < b {
                            s(0)
                        } else {
                            s(1)
                        }
                    }
                }
            }),
            Op::Select => each(&|at, s| if x(0, at) != 0.0 { s(1) } else { s(2) }),
            Op::Iota { .. } | Op::Constant { .. } | Op::Argmax | Op::Compare(_) => None,
            Op::Broadcast { .. }
            | Op::Reshape
            | Op::Transpose { .. }
            | Op::Slice { .. }
            | Op::Concat { .. }
            | Op::Gather
            | Op::CacheAppend => {
                let is_index =
                    |n: usize| n + 1 == operands.len() && matches!(value.op, Op::Gather | Op::CacheAppend);
                let moved = |(n, k): (usize, &Known)| if is_index(n) { k.exact.clone() } else { k.tensor() };
                match operands.iter().all(|k| k.squares.is_none()) {
                    true => None,
                    false => Some(on(&operands.iter().enumerate().map(moved).collect::<Vec<_>>())?),
                }
            }
            Op::Reduce { kind, axis } => {
                let mut squares = on(&[operands[0].tensor()])?;
                if *kind == Reduction::Sum {
                    let length = operands[0].exact.shape[*axis] as f64;
                    let sizes = on(&[map(&operands[0].exact, f64::abs)])?;
                    squares.iter_mut().zip(sizes).for_each(|(s, size)| *s += length * (U * size).powi(2));
                }
                Some(squares)
            }
            Op::Dot { axes } => {
                let (a, b) = (&operands[0], &operands[1]);
                let extent =
                    |c: &char| axes.lhs.iter().position(|l| l == c).map_or(1, |at| a.exact.shape[at]);
                let length = axes.contracted().iter().map(extent).product::<usize>() as f64;
                let sizes = on(&[map(&a.exact, f64::abs), map(&b.exact, f64::abs)])?;
                let mut squares: Vec<f64> = sizes.iter().map(|size| length * (U * size).powi(2)).collect();
                let square = |x: f64| x * x;
                let parts = [
                    a.squares.as_ref().map(|_| [a.tensor(), map(&b.exact, square)]),
                    b.squares.as_ref().map(|_| [map(&a.exact, square), b.tensor()]),
                ];
                for part in parts.into_iter().flatten() {
                    squares.iter_mut().zip(on(&part)?).for_each(|(s, more)| *s += more);
                }
                Some(squares)
            }
            Op::Attention { causal, scale } => Some(attention(operands, y, *causal, *scale)),
            Op::AttentionLse { causal, scale } => Some(attention_lse(operands, y, *causal, *scale)),
            Op::ScatterAdd | Op::Quantize | Op::Dequantize => {
                // No family has these; whoever adds one says here what it rounds.
                each(&|_, _| f64::INFINITY)
            }
            Op::Input { .. } | Op::Weight { .. } | Op::State { .. } => unreachable!("it is bound"),
        })
    }
}

fn map(x: &Tensor, f: fn(f64) -> f64) -> Rc<Tensor> {
    let data = x.data.iter().map(|&x| f(x)).collect();
    Rc::new(Tensor { dtype: DType::F64, shape: x.shape.clone(), data })
}

/// Shows for each position and head its number among them, the scores of the slots that it sees, each with the square of its
/// error, and where a slot's row of keys begins.
fn each_row(
    [q, k, pos]: [&Known; 3],
    causal: bool,
    scale: f64,
    mut show: impl FnMut(usize, &[(f64, f64)], &dyn Fn(usize) -> usize),
) {
    let &[tokens, heads, d] = &q.exact.shape[..] else { panic!("queries have three axes") };
    let &[kv_heads, slots, _] = &k.exact.shape[..] else { panic!("a cache has three axes") };
    let newest = pos.exact.data.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    for row in 0..tokens * heads {
        let last = if causal { pos.exact.data[row / heads] } else { newest };
        let seen = (0..slots).filter(|&slot| slot as f64 <= last).count();
        let at = |slot: usize| (row % heads / (heads / kv_heads) * slots + slot) * d;
        let score = |slot| {
            let (mut score, mut size, mut square) = (0.0, 0.0, 0.0);
            for i in 0..d {
                let (a, b) = (q.exact.data[row * d + i], k.exact.data[at(slot) + i]);
                score += a * b;
                size += (a * b).abs();
                square += a * a * k.square(at(slot) + i) + b * b * q.square(row * d + i);
            }
            (scale * score, scale * scale * (square + d as f64 * (U * size).powi(2)))
        };
        show(row, &(0..seen).map(score).collect::<Vec<_>>(), &at);
    }
}

/// The weights of scores with the squares of their relative errors: of an exponential its argument's rounding, and its own.
fn weights(scores: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let max = scores.iter().map(|s| s.0).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s.0 - max).exp()).sum();
    let weight = |&(score, s): &(f64, f64)| {
        let of_p = s + (U * (score - max)).powi(2) + function_error(ir::op::Unary::Exp, 1.0).powi(2);
        ((score - max).exp() / sum, of_p)
    };
    scores.iter().map(weight).collect()
}

/// `y = ln Σ exp(score)`: `dy = Σ p dscore`, `p` the softmax, and the logarithm's own.
fn attention_lse(operands: &[Known], y: &[f64], causal: bool, scale: f64) -> Vec<f64> {
    let mut squares = Vec::with_capacity(y.len());
    each_row([0, 1, 2].map(|n| &operands[n]), causal, scale, |row, scores, _| {
        let of_weights: f64 = weights(scores).iter().map(|(p, of_p)| p * p * of_p).sum();
        squares.push(of_weights + function_error(ir::op::Unary::Log, y[row]).powi(2) + (U * y[row]).powi(2));
    });
    squares
}

/// `y = Σ p v`, `p` the softmax of `score = scale q k`: `dy = Σ p dv + Σ p (v - y) dscore`.
fn attention(operands: &[Known], y: &[f64], causal: bool, scale: f64) -> Vec<f64> {
    let [q, k, v, pos] = [0, 1, 2, 3].map(|n| &operands[n]);
    let d = q.exact.shape[2];
    let u_in = if v.exact.dtype == DType::F32 { 0.0 } else { v.exact.dtype.roundoff() };
    let mut squares = Vec::with_capacity(y.len());
    each_row([q, k, pos], causal, scale, |row, scores, at| {
        let weights = weights(scores);
        for (i, &y) in y[row * d..][..d].iter().enumerate() {
            let square = weights.iter().enumerate().map(|(slot, &(p, of_p))| {
                let at = at(slot) + i;
                let (x, away) = (v.exact.data[at], v.exact.data[at] - y);
                p * p * (v.square(at) + away * away * of_p + (u_in * x).powi(2))
            });
            squares.push(square.sum::<f64>() + scores.len() as f64 * (U * y).powi(2));
        }
    });
    squares
}

#[cfg(test)]
mod tests {
    use super::*;
    use ir::interp::interpret;
    use ir::random::Rng;

    /// Two products, of which the second reads what the first has stored in bf16.
    const GRAPH: &str = "\
graph @chain(T = 1) {
  %x = input \"x\" : bf16[8, 256]
  %w = weight \"w\" : bf16[256, 256]
  group @h : dot {
    %h = dot %x, %w { axes = \"tk,nk->tn\" } : bf16[8, 256]
  }
  group @y : dot {
    %y = dot %h, %w { axes = \"tk,nk->tn\" } : f32[8, 256]
  }
  output \"y\" = %y : f32[8, 256]
}
";

    /// Sizes are those of the errors that rounding makes: the root mean square of `error / s` is that of a uniform number in an
    /// interval of half to the whole of `s`, some 0.43; and what is not rounding is found.
    #[test]
    fn sizes_are_those_of_honest_errors() {
        let graph = ir::parse::graph(GRAPH).unwrap();
        let mut rng = Rng(1);
        let mut draw = |shape: &[usize]| {
            let data: Vec<f64> = (0..shape.iter().product()).map(|_| rng.unit()).collect();
            Rc::new(Tensor::new(DType::BF16, shape, &data))
        };
        let (x, w) = (draw(&[8, 256]), draw(&[256, 256]));
        let bound = |name: &str| if name == "x" { x.clone() } else { w.clone() };
        let symbols = [1, 0, 0, 0];
        let mut bind = |name: &str, _: &_| Ok(bound(name));
        let honest = interpret(&graph, &symbols, Rounding::Stored, &mut bind, None).unwrap()["y"].clone();

        let mut chain = Chain::new(&graph, symbols, false);
        let y = graph.find("y").unwrap();
        let mut bind = |value: &Value| Ok::<_, InterpError>(bound(&value.name));
        let likely = chain.likely(&[y], &mut bind).unwrap().remove(0);
        let errors =
            honest.data.iter().zip(&likely.exact.data).zip(&likely.size).map(|((a, b), s)| (a - b) / s);
        let ratio = rms(errors);
        assert!((0.38..0.48).contains(&ratio), "{ratio}");
        assert!(likely.check(&honest).unwrap() < 0.5);

        let scaled = honest.data.iter().map(|x| 1.02 * x).collect();
        let wrong = Tensor { data: scaled, ..honest };
        assert!(likely.check(&wrong).is_err());
    }
}
