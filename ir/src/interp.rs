//! The oracle: runs a graph in f64, value by value. Slow, and meant to be obviously right.
//!
//! * Every op is computed in f64 from its operands as they are stored, sums included, and then rounded to the
//!   dtype of its result. Integers and truth values are whole numbers in an f64.
//! * Inside a fused group nothing is stored: a float that no other group and no output reads keeps its f64, even
//!   after a `cast`. A group is judged by its exact inside.
//! * [`Rounding::Exact`] rounds no float at all: the same graph as mathematics, on the weights as stored.
//!
//! The interpreter shares no code with what it judges: not with generators, not with the kernel interpreter.
//! Constant folding asks it, and is judged by the tests below.

use crate::dim::{Dim, MAX_SYMBOLS};
use crate::dtype::{Block, DType};
use crate::graph::{Graph, TensorType, Value, ValueId};
use crate::op::{DotAxes, Op, Reduction};
use indexmap::IndexMap;
use std::rc::Rc;

/// A tensor with concrete extents, row-major. Numbers of a block format stand decoded.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// As what it is stored.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Vec<f64>,
}

impl Tensor {
    /// Adds the rows of a tensor of the same width.
    pub fn append(&mut self, rows: Tensor) {
        self.shape[0] += rows.shape[0];
        self.data.extend(rows.data);
    }

    /// A tensor of `data`, each rounded to `dtype`. The numbers of a block format are taken as they are.
    ///
    /// # Panics
    ///
    /// When `data` does not fill `shape`.
    pub fn new(dtype: DType, shape: &[usize], data: &[f64]) -> Tensor {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "data fill the shape");
        let mut tensor = Tensor { dtype, shape: shape.to_vec(), data: data.to_vec() };
        tensor.round();
        tensor
    }

    fn round(&mut self) {
        if !matches!(self.dtype, DType::Block(_)) {
            self.data.iter_mut().for_each(|x| *x = self.dtype.round(*x));
        }
    }

    /// Are both the same to the bit? One NaN is as good as another.
    pub fn same_bits(&self, other: &Tensor) -> bool {
        let same = |(a, b): (&f64, &f64)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        self.dtype == other.dtype && self.shape == other.shape && self.data.iter().zip(&other.data).all(same)
    }
}

/// Whether values are rounded as they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To each value's dtype, groups apart: what a program that stores these dtypes can at best compute.
    Stored,
    /// Floats never, unless an op is there to round (`quantize`): the exact result for the given inputs and weights.
    Exact,
}

/// Why a graph cannot be run on what it was given.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[allow(missing_docs)] // the messages say what the fields are
pub enum InterpError {
    #[error("symbol `{name}` is {value}, not within {min}..{max}")]
    Symbol { name: String, value: i64, min: i64, max: i64 },
    #[error("nothing is bound to `{0}`")]
    Unbound(String),
    #[error("`{name}` is bound to {found_dtype}{found:?}, the graph asks for {expected_dtype}{expected:?}")]
    Binding {
        name: String,
        found_dtype: DType,
        found: Vec<usize>,
        expected_dtype: DType,
        expected: Vec<usize>,
    },
    #[error("%{value}: index {index} is not within 0..{extent}")]
    Index { value: String, index: i64, extent: usize },
    #[error("%{value}: quantizing to {dtype} is a search, done before compiling, and not run here")]
    Quantize { value: String, dtype: DType },
}

/// What gives a tensor for the name of an input, weight or state.
pub type Bind<'a> = &'a mut dyn FnMut(&str, &TensorType) -> Result<Rc<Tensor>, InterpError>;

/// What sees every value as it is stored.
pub type Trace<'a> = &'a mut dyn FnMut(ValueId, &Tensor);

/// Runs `graph` for given symbols; gives its outputs by name.
///
/// A tensor is asked of `bind` when it is first needed, and dropped after its last use.
///
/// # Errors
///
/// A symbol outside of its range, a binding that is missing or of another type, an index outside of its table.
///
/// # Panics
///
/// On a graph that [`crate::verify::verify`] refuses.
pub fn interpret(
    graph: &Graph,
    symbols: &[i64; MAX_SYMBOLS],
    rounding: Rounding,
    bind: Bind,
    mut trace: Option<Trace>,
) -> Result<IndexMap<String, Tensor>, InterpError> {
    for (symbol, &value) in graph.symbols.0.iter().zip(symbols) {
        if !(symbol.min <= value && value <= symbol.max) {
            let (name, min, max) = (symbol.name.clone(), symbol.min, symbol.max);
            return Err(InterpError::Symbol { name, value, min, max });
        }
    }
    let inside = inside_groups(graph);
    let mut uses_left = count_uses(graph);
    let mut stored: Vec<Option<Rc<Tensor>>> = vec![None; graph.values.len()];
    let mut store = |stored: &mut Vec<Option<Rc<Tensor>>>, id: ValueId, tensor: Rc<Tensor>| {
        if let Some(trace) = &mut trace {
            trace(id, &tensor);
        }
        stored[id.0 as usize] = Some(tensor);
    };
    let is_bound = |id: ValueId| binding(&graph[id].op).is_some();
    for id in graph.ids().filter(|&id| !is_bound(id)) {
        let mut operands = Vec::with_capacity(graph[id].operands.len());
        for &operand in &graph[id].operands {
            if stored[operand.0 as usize].is_none() {
                let tensor = bound(graph, operand, symbols, bind)?;
                store(&mut stored, operand, tensor);
            }
            let slot = &mut stored[operand.0 as usize];
            operands.push(slot.clone().expect("it was stored above, or just now"));
            uses_left[operand.0 as usize] -= 1;
            if uses_left[operand.0 as usize] == 0 {
                *slot = None;
            }
        }
        let rounding = if inside[id.0 as usize] { Rounding::Exact } else { rounding };
        let tensor = compute(&graph[id], &operands, symbols, rounding)?;
        store(&mut stored, id, Rc::new(tensor));
        if uses_left[id.0 as usize] == 0 {
            stored[id.0 as usize] = None;
        }
    }
    let mut outputs = IndexMap::new();
    for (name, id) in &graph.outputs {
        let tensor = match &stored[id.0 as usize] {
            Some(tensor) => tensor.clone(),
            None => bound(graph, *id, symbols, bind)?,
        };
        outputs.insert(name.clone(), Rc::unwrap_or_clone(tensor));
    }
    Ok(outputs)
}

/// The name under which a value is bound, if it is.
fn binding(op: &Op) -> Option<&str> {
    match op {
        Op::Input { name } | Op::Weight { name } | Op::State { name } => Some(name),
        _ => None,
    }
}

/// Asks for the tensor of an input, weight or state.
fn bound(
    graph: &Graph,
    id: ValueId,
    symbols: &[i64; MAX_SYMBOLS],
    bind: Bind,
) -> Result<Rc<Tensor>, InterpError> {
    let Value { op, ty, .. } = &graph[id];
    let name = binding(op).expect("only what is bound has not been computed yet");
    let (tensor, expected) = (bind(name, ty)?, extents(&ty.shape, symbols));
    if tensor.dtype == ty.dtype && tensor.shape == expected {
        return Ok(tensor);
    }
    Err(InterpError::Binding {
        name: name.to_string(),
        found_dtype: tensor.dtype,
        found: tensor.shape.clone(),
        expected_dtype: ty.dtype,
        expected,
    })
}

/// Which values never leave their group.
fn inside_groups(graph: &Graph) -> Vec<bool> {
    let mut inside: Vec<bool> = graph.values.iter().map(|value| value.group.is_some()).collect();
    for value in &graph.values {
        for &operand in &value.operands {
            inside[operand.0 as usize] &= graph[operand].group == value.group;
        }
    }
    for (_, id) in &graph.outputs {
        inside[id.0 as usize] = false;
    }
    inside
}

/// How often each value is read; an output is one more use, which nothing takes away.
fn count_uses(graph: &Graph) -> Vec<usize> {
    let mut uses = vec![0; graph.values.len()];
    let read = graph.values.iter().flat_map(|value| &value.operands);
    for id in read.chain(graph.outputs.iter().map(|(_, id)| id)) {
        uses[id.0 as usize] += 1;
    }
    uses
}

fn extents(shape: &[Dim], symbols: &[i64; MAX_SYMBOLS]) -> Vec<usize> {
    shape.iter().map(|dim| usize::try_from(dim.eval(symbols)).expect("extents are positive")).collect()
}

/// One value from its operands: any op but those that are bound.
///
/// # Errors
///
/// An index outside of its table.
///
/// # Panics
///
/// On operands of other types than the verifier allows, and on inputs, weights and states.
pub fn compute(
    value: &Value,
    operands: &[Rc<Tensor>],
    symbols: &[i64; MAX_SYMBOLS],
    rounding: Rounding,
) -> Result<Tensor, InterpError> {
    let shape = extents(&value.ty.shape, symbols);
    let elems: usize = shape.iter().product();
    let data = match &value.op {
        Op::Input { .. } | Op::Weight { .. } | Op::State { .. } => panic!("a bound value is not computed"),
        Op::Constant { data } => match data.as_slice() {
            [x] => vec![*x; elems],
            data => data.to_vec(),
        },
        Op::Cast | Op::Reshape | Op::Dequantize => operands[0].data.clone(),
        Op::Unary(op) => {
            let eval = op.facts().eval;
            operands[0].data.iter().map(|&x| eval(x)).collect()
        }
        Op::Binary(op) => {
            let eval = op.facts().eval;
            operands[0].data.iter().zip(&operands[1].data).map(|(&a, &b)| eval(a, b)).collect()
        }
        Op::Compare(relation) => {
            let holds = |(&a, &b): (&f64, &f64)| f64::from(u8::from(relation.eval(a, b)));
            operands[0].data.iter().zip(&operands[1].data).map(holds).collect()
        }
        Op::Select => {
            let [c, a, b] = [0, 1, 2].map(|i| &operands[i].data);
            (0..elems).map(|i| if c[i] != 0.0 { a[i] } else { b[i] }).collect()
        }
        Op::Iota { axis } => {
            let inner: usize = shape[axis + 1..].iter().product();
            (0..elems).map(|i| (i / inner % shape[*axis]) as f64).collect()
        }
        Op::Broadcast { axes } => {
            let own = strides(&operands[0].shape);
            let mut steps = vec![0; shape.len()];
            axes.iter().zip(own).for_each(|(&axis, stride)| steps[axis] = stride);
            view(&operands[0].data, 0, &steps, &shape)
        }
        Op::Transpose { perm } => {
            let own = strides(&operands[0].shape);
            let steps: Vec<usize> = perm.iter().map(|&axis| own[axis]).collect();
            view(&operands[0].data, 0, &steps, &shape)
        }
        Op::Slice { axis, start } => {
            let steps = strides(&operands[0].shape);
            let first = start.eval(symbols) as usize * steps[*axis];
            view(&operands[0].data, first, &steps, &shape)
        }
        Op::Concat { axis } => concat(operands, *axis, elems),
        Op::Reduce { kind, axis } => reduce(*kind, &operands[0], *axis),
        Op::Dot { axes } => dot(axes, &operands[0], &operands[1], &shape),
        Op::Gather => gather(value, &operands[0], &operands[1])?,
        Op::ScatterAdd => scatter_add(value, &operands[0], &operands[1], &operands[2])?,
        Op::Attention { causal, scale } => attention(operands, *causal, *scale),
        Op::AttentionLse { causal, scale } => attention_lse(operands, *causal, *scale),
        Op::CacheAppend => cache_append(value, &operands[0], &operands[1], &operands[2])?,
        Op::Quantize => quantize(value, &operands[0])?,
        Op::Argmax => argmax(&operands[0]),
    };
    let mut tensor = Tensor { dtype: value.ty.dtype, shape, data };
    if rounding == Rounding::Stored || !tensor.dtype.is_float() {
        tensor.round();
    }
    Ok(tensor)
}

/// Elements from one index of each axis to the next.
fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}

/// The elements `data[first + sum(index[i] * steps[i])]` for every index of `shape`, in row-major order.
fn view(data: &[f64], first: usize, steps: &[usize], shape: &[usize]) -> Vec<f64> {
    let mut out = Vec::with_capacity(shape.iter().product());
    let Some((&extent, outer)) = shape.split_last() else { return vec![data[first]] };
    let step = steps[outer.len()];
    let mut index = vec![0; outer.len()];
    'rows: loop {
        let from = first + index.iter().zip(steps).map(|(i, step)| i * step).sum::<usize>();
        out.extend((0..extent).map(|i| data[from + i * step]));
        for axis in (0..outer.len()).rev() {
            index[axis] += 1;
            if index[axis] < outer[axis] {
                continue 'rows;
            }
            index[axis] = 0;
        }
        return out;
    }
}

fn concat(parts: &[Rc<Tensor>], axis: usize, elems: usize) -> Vec<f64> {
    let outer: usize = parts[0].shape[..axis].iter().product();
    let mut out = Vec::with_capacity(elems);
    for row in 0..outer {
        for part in parts {
            let inner: usize = part.shape[axis..].iter().product();
            out.extend(&part.data[row * inner..(row + 1) * inner]);
        }
    }
    out
}

fn reduce(kind: Reduction, x: &Tensor, axis: usize) -> Vec<f64> {
    let extent = x.shape[axis];
    let outer: usize = x.shape[..axis].iter().product();
    let inner: usize = x.shape[axis + 1..].iter().product();
    let mut out = Vec::with_capacity(outer * inner);
    for o in 0..outer {
        for i in 0..inner {
            let line = (0..extent).map(|a| x.data[(o * extent + a) * inner + i]);
            out.push(match kind {
                Reduction::Sum => line.fold(0.0, |sum, x| sum + x),
                Reduction::Max => line.fold(f64::NEG_INFINITY, larger),
            });
        }
    }
    out
}

/// The larger; NaN where one is NaN.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// Both operands are brought to `[batch, rows, k]` and `[batch, columns, k]`; then each element is one sum over `k`.
fn dot(axes: &DotAxes, a: &Tensor, b: &Tensor, shape: &[usize]) -> Vec<f64> {
    let DotAxes { lhs, rhs, out } = axes;
    let only = |from: &[char], not_in: &[char]| -> Vec<char> {
        from.iter().copied().filter(|c| out.contains(c) && !not_in.contains(c)).collect()
    };
    let batch: Vec<char> = lhs.iter().copied().filter(|c| out.contains(c) && rhs.contains(c)).collect();
    let (rows, columns, summed) = (only(lhs, rhs), only(rhs, lhs), axes.contracted());
    let extent = |c: &char| match lhs.iter().position(|x| x == c) {
        Some(axis) => a.shape[axis],
        None => b.shape[rhs.iter().position(|x| x == c).expect("each letter is in an operand")],
    };
    let size = |letters: &[char]| letters.iter().map(extent).product::<usize>();
    let (n_batch, n_rows, n_columns, k) = (size(&batch), size(&rows), size(&columns), size(&summed));

    let a = in_order(a, lhs, &[&batch[..], &rows, &summed].concat());
    let b = in_order(b, rhs, &[&batch[..], &columns, &summed].concat());
    let mut sums = vec![0.0; n_batch * n_rows * n_columns];
    for batch in 0..n_batch {
        for column in 0..n_columns {
            let b_k = &b[(batch * n_columns + column) * k..][..k];
            for row in 0..n_rows {
                let a_k = &a[(batch * n_rows + row) * k..][..k];
                sums[(batch * n_rows + row) * n_columns + column] = sum_of_products(a_k, b_k);
            }
        }
    }
    let have = [&batch[..], &rows, &columns].concat();
    let have_shape: Vec<usize> = have.iter().map(extent).collect();
    let own = strides(&have_shape);
    let steps: Vec<usize> =
        out.iter().map(|c| own[have.iter().position(|x| x == c).expect("the result's letters")]).collect();
    if have == *out { sums } else { view(&sums, 0, &steps, shape) }
}

/// Four sums side by side, because one would wait for each of its additions.
fn sum_of_products(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 4];
    let (a_fours, b_fours) = (a.chunks_exact(4), b.chunks_exact(4));
    let rest: f64 = a_fours.remainder().iter().zip(b_fours.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_fours.zip(b_fours) {
        for lane in 0..4 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    (sums[0] + sums[1]) + (sums[2] + sums[3]) + rest
}

/// The elements of `x`, whose axes are called `have`, with its axes in the order `want`.
fn in_order<'a>(x: &'a Tensor, have: &[char], want: &[char]) -> std::borrow::Cow<'a, [f64]> {
    if have == want {
        return (&x.data[..]).into();
    }
    let own = strides(&x.shape);
    let axis = |c: &char| have.iter().position(|x| x == c).expect("the same letters");
    let steps: Vec<usize> = want.iter().map(|c| own[axis(c)]).collect();
    let shape: Vec<usize> = want.iter().map(|c| x.shape[axis(c)]).collect();
    view(&x.data, 0, &steps, &shape).into()
}

/// `index` as a position of an axis.
fn position(value: &Value, index: f64, extent: usize) -> Result<usize, InterpError> {
    if 0.0 <= index && index < extent as f64 {
        return Ok(index as usize);
    }
    Err(InterpError::Index { value: value.name.clone(), index: index as i64, extent })
}

fn gather(value: &Value, table: &Tensor, ids: &Tensor) -> Result<Vec<f64>, InterpError> {
    let row: usize = table.shape[1..].iter().product();
    let mut out = Vec::with_capacity(ids.data.len() * row);
    for &index in &ids.data {
        let at = position(value, index, table.shape[0])?;
        out.extend(&table.data[at * row..][..row]);
    }
    Ok(out)
}

fn scatter_add(value: &Value, into: &Tensor, ids: &Tensor, rows: &Tensor) -> Result<Vec<f64>, InterpError> {
    let row: usize = into.shape[1..].iter().product();
    let mut out = into.data.clone();
    for (t, &index) in ids.data.iter().enumerate() {
        let at = position(value, index, into.shape[0])?;
        let sums = out[at * row..][..row].iter_mut().zip(&rows.data[t * row..][..row]);
        sums.for_each(|(sum, x)| *sum += x);
    }
    Ok(out)
}

/// A later row at the same position replaces an earlier one.
fn cache_append(value: &Value, cache: &Tensor, rows: &Tensor, pos: &Tensor) -> Result<Vec<f64>, InterpError> {
    let &[heads, slots, d] = &cache.shape[..] else { panic!("a cache has three axes") };
    let mut out = cache.data.clone();
    for (t, &index) in pos.data.iter().enumerate() {
        let slot = position(value, index, slots)?;
        for head in 0..heads {
            out[(head * slots + slot) * d..][..d].copy_from_slice(&rows.data[(t * heads + head) * d..][..d]);
        }
    }
    Ok(out)
}

/// Shows for each position and head the scores of the slots that it sees, and where a slot's row lies in the cache.
fn each_row(
    [q, k, pos]: [&Tensor; 3],
    causal: bool,
    scale: f64,
    mut show: impl FnMut(&[f64], &dyn Fn(usize) -> std::ops::Range<usize>),
) {
    let &[tokens, heads, d] = &q.shape[..] else { panic!("queries have three axes") };
    let &[kv_heads, slots, _] = &k.shape[..] else { panic!("a cache has three axes") };
    let newest = pos.data.iter().copied().fold(f64::NEG_INFINITY, larger);
    for t in 0..tokens {
        let last = if causal { pos.data[t] } else { newest };
        let seen = (0..slots).filter(|&slot| slot as f64 <= last).count();
        for head in 0..heads {
            let q = &q.data[(t * heads + head) * d..][..d];
            let kv_head = head / (heads / kv_heads);
            let at = |slot: usize| (kv_head * slots + slot) * d..(kv_head * slots + slot + 1) * d;
            let scores: Vec<f64> =
                (0..seen).map(|slot| scale * sum_of_products(q, &k.data[at(slot)])).collect();
            show(&scores, &at);
        }
    }
}

/// `max + ln Σ exp(score - max)`; of a row that sees nothing NaN, as its attention is.
fn attention_lse(operands: &[Rc<Tensor>], causal: bool, scale: f64) -> Vec<f64> {
    let mut out = Vec::new();
    each_row([0, 1, 2].map(|n| &*operands[n]), causal, scale, |scores, _| {
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, larger);
        out.push(max + scores.iter().map(|score| (score - max).exp()).sum::<f64>().ln());
    });
    out
}

/// Softmax over the slots that a row sees, as [`crate::graph::Builder::attention_expanded`] spells it out.
fn attention(operands: &[Rc<Tensor>], causal: bool, scale: f64) -> Vec<f64> {
    let [q, k, v, pos] = [0, 1, 2, 3].map(|i| &*operands[i]);
    let mut out = Vec::with_capacity(q.data.len());
    each_row([q, k, pos], causal, scale, |scores, at| {
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, larger);
        let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        // A row that sees no slot has the sum of nothing below it: NaN, as a softmax of -inf has.
        let mut row = vec![if scores.is_empty() { f64::NAN } else { 0.0 }; q.shape[2]];
        for (slot, weight) in weights.iter().enumerate() {
            row.iter_mut().zip(&v.data[at(slot)]).for_each(|(out, v)| *out += weight / sum * v);
        }
        out.extend(row);
    });
    out
}

/// The lowest index of the largest element of each row; the first NaN, where there is one.
fn argmax(x: &Tensor) -> Vec<f64> {
    let n = *x.shape.last().expect("argmax is over an axis");
    let best = |row: &[f64]| {
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, larger);
        row.iter()
            .position(|&x| x == largest || x.is_nan() && largest.is_nan())
            .expect("it came from the row")
    };
    x.data.chunks(n).map(|row| best(row) as f64).collect()
}

/// The numbers that are left of `x` in a block format, by ggml's reference quantizers (`quantize_row_*_ref`).
fn quantize(value: &Value, x: &Tensor) -> Result<Vec<f64>, InterpError> {
    let DType::Block(block) = value.ty.dtype else { panic!("quantize makes a block format") };
    let steps: fn(&[f64]) -> Vec<f64> = match block {
        // Scale `max|x| / 127`, rounded to nearest.
        Block::Q8_0 => |x| {
            let scale = x.iter().fold(0.0, |m, x| larger(m, x.abs())) / 127.0;
            x.iter().map(|x| stored(scale) * over(*x, scale).round()).collect()
        },
        Block::Q4_0 => |x| centred(x, 8.0),
        Block::Q5_0 => |x| centred(x, 16.0),
        Block::Q4_1 => |x| from_min(x, 15.0),
        Block::Q5_1 => |x| from_min(x, 31.0),
        Block::Q4K | Block::Q5K | Block::Q6K => {
            return Err(InterpError::Quantize { value: value.name.clone(), dtype: value.ty.dtype });
        }
    };
    Ok(x.data.chunks(block.facts().elems).flat_map(steps).collect())
}

/// A scale as a block holds it.
fn stored(scale: f64) -> f64 {
    DType::F16.round(scale)
}

/// `x / scale`, 0 for a block of zeros.
fn over(x: f64, scale: f64) -> f64 {
    if scale == 0.0 { 0.0 } else { x / scale }
}

/// Codes `0..2*half` around `half`; the element that is largest in size gets code 0.
fn centred(x: &[f64], half: f64) -> Vec<f64> {
    let peak = x.iter().fold(0.0, |peak: f64, &x| if x.abs() > peak.abs() { x } else { peak });
    let scale = peak / -half;
    let code = |x: f64| (over(x, scale) + half + 0.5).trunc().min(2.0 * half - 1.0);
    x.iter().map(|&x| stored(scale) * (code(x) - half)).collect()
}

/// Codes `0..=top` from the smallest element to the largest.
fn from_min(x: &[f64], top: f64) -> Vec<f64> {
    let min = x.iter().copied().fold(f64::INFINITY, f64::min);
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let scale = (max - min) / top;
    let code = |x: f64| (over(x - min, scale) + 0.5).trunc().min(top);
    x.iter().map(|&x| stored(scale) * code(x) + stored(min)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Builder;
    use crate::{parse, verify::verify};

    const T: i64 = 2;

    /// Runs a graph body (with `T = 2`, output "y") on tensors by name.
    fn outputs(body: &str, inputs: &[(&str, &[f64])], rounding: Rounding) -> Result<Tensor, InterpError> {
        let graph = parse::graph(&format!("graph @f(T in 1..8) {{\n{body}\n}}")).unwrap();
        verify(&graph).unwrap();
        let symbols = [T, 0, 0, 0];
        let mut bind = |name: &str, ty: &TensorType| {
            let bound = inputs.iter().find(|(bound, _)| *bound == name);
            let (_, data) = bound.ok_or_else(|| InterpError::Unbound(name.to_string()))?;
            Ok(Rc::new(Tensor::new(ty.dtype, &extents(&ty.shape, &symbols), data)))
        };
        Ok(interpret(&graph, &symbols, rounding, &mut bind, None)?["y"].clone())
    }

    fn run(body: &str, inputs: &[(&str, &[f64])]) -> Vec<f64> {
        outputs(body, inputs, Rounding::Stored).unwrap().data
    }

    /// `%y = {op} : {result}` on inputs `x`, `z` of a type each.
    fn on_two(op: &str, [x_ty, z_ty, result]: [&str; 3], x: &[f64], z: &[f64]) -> Vec<f64> {
        let body = format!(
            "%x = input \"x\" : {x_ty}\n%z = input \"z\" : {z_ty}\n%y = {op} : {result}\noutput \"y\" = %y : {result}"
        );
        run(&body, &[("x", x), ("z", z)])
    }

    fn on_one(op: &str, [x_ty, result]: [&str; 2], x: &[f64]) -> Vec<f64> {
        on_two(op, [x_ty, "f32[]", result], x, &[0.0])
    }

    fn assert_near(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() <= 1e-9 * e.abs().max(1.0), "{found:?} is not {expected:?}");
        }
    }

    #[test]
    #[allow(clippy::approx_constant)] // values worked out by hand, not what the library calls them
    fn unary_ops() {
        let cases: [(&str, f64, f64); 10] = [
            ("neg", 2.5, -2.5),
            ("abs", -2.5, 2.5),
            ("exp", 1.0, 2.718281828459045),
            ("log", 2.0, 0.6931471805599453),
            ("sqrt", 2.25, 1.5),
            ("rsqrt", 4.0, 0.5),
            ("recip", 8.0, 0.125),
            ("sin", 0.5235987755982988, 0.5),
            ("cos", 1.0471975511965979, 0.5),
            ("tanh", 0.5493061443340549, 0.5),
        ];
        assert_eq!(cases.len(), crate::op::Unary::ALL.len());
        for (op, x, y) in cases {
            assert_near(&on_one(&format!("{op} %x"), ["f64[1]", "f64[1]"], &[x]), &[y]);
        }
    }

    #[test]
    fn binary_ops() {
        let on = |op: &str| {
            on_two(&format!("{op} %x, %z"), ["f32[3]"; 3], &[6.0, -1.0, f64::NAN], &[4.0, 2.0, 1.0])
        };
        assert_eq!(on("add")[..2], [10.0, 1.0]);
        assert_eq!(on("sub")[..2], [2.0, -3.0]);
        assert_eq!(on("mul")[..2], [24.0, -2.0]);
        assert_eq!(on("div")[..2], [1.5, -0.5]);
        assert_eq!(on("max")[..2], [6.0, 2.0]);
        assert_eq!(on("min")[..2], [4.0, -1.0]);
        for op in crate::op::Binary::ALL {
            assert!(on(op.facts().name)[2].is_nan());
        }
    }

    #[test]
    fn integers_truncate_and_clamp() {
        assert_eq!(on_two("div %x, %z", ["i32[2]"; 3], &[7.0, -7.0], &[2.0, 2.0]), [3.0, -3.0]);
        assert_eq!(on_two("mul %x, %z", ["i8[2]"; 3], &[100.0, 5.0], &[2.0, 2.0]), [127.0, 10.0]);
    }

    #[test]
    fn relations() {
        let on = |relation: &str| {
            let types = ["f32[4]", "f32[4]", "bool[4]"];
            let (x, z) = ([1.0, 2.0, 3.0, f64::NAN], [2.0, 2.0, 2.0, f64::NAN]);
            on_two(&format!("compare.{relation} %x, %z"), types, &x, &z)
        };
        assert_eq!(on("eq"), [0.0, 1.0, 0.0, 0.0]);
        assert_eq!(on("ne"), [1.0, 0.0, 1.0, 1.0]);
        assert_eq!(on("lt"), [1.0, 0.0, 0.0, 0.0]);
        assert_eq!(on("le"), [1.0, 1.0, 0.0, 0.0]);
        assert_eq!(on("gt"), [0.0, 0.0, 1.0, 0.0]);
        assert_eq!(on("ge"), [0.0, 1.0, 1.0, 0.0]);
    }

    #[test]
    fn select_takes_by_truth() {
        let body = "%c = input \"c\" : bool[2]\n%a = input \"a\" : f32[2]\n%b = input \"b\" : f32[2]\n\
            %y = select %c, %a, %b : f32[2]\noutput \"y\" = %y : f32[2]";
        assert_eq!(run(body, &[("c", &[1.0, 0.0]), ("a", &[1.0, 2.0]), ("b", &[3.0, 4.0])]), [1.0, 4.0]);
    }

    #[test]
    fn constants_and_iota() {
        let body = "%y = constant 0.1 : bf16[T]\noutput \"y\" = %y : bf16[T]";
        assert_eq!(run(body, &[]), [0.10009765625; 2]);
        let body = "%y = constant [1.0, 2.0, 3.0, 4.0] : f32[2, 2]\noutput \"y\" = %y : f32[2, 2]";
        assert_eq!(run(body, &[]), [1.0, 2.0, 3.0, 4.0]);
        let iota = |axis| {
            run(&format!("%y = iota {{ axis = {axis} }} : i32[2, 3]\noutput \"y\" = %y : i32[2, 3]"), &[])
        };
        assert_eq!(iota(0), [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
        assert_eq!(iota(1), [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]);
    }

    #[test]
    fn casts_round() {
        // 1 + 2^-8 is halfway between two bf16 numbers; the even one is 1.
        assert_eq!(on_one("cast %x", ["f32[2]", "bf16[2]"], &[1.00390625, 3.0]), [1.0, 3.0]);
        assert_eq!(on_one("cast %x", ["f32[3]", "i32[3]"], &[-2.9, 2.9, f64::NAN]), [-2.0, 2.0, 0.0]);
        assert_eq!(on_one("cast %x", ["f32[2]", "bool[2]"], &[0.0, 0.5]), [0.0, 1.0]);
    }

    #[test]
    fn moves() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let broadcast = on_one("broadcast %x { axes = [0] }", ["f32[2]", "f32[2, 3]"], &x[..2]);
        assert_eq!(broadcast, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]);
        let broadcast = on_one("broadcast %x { axes = [1] }", ["f32[3]", "f32[2, 3]"], &x[..3]);
        assert_eq!(broadcast, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
        assert_eq!(on_one("broadcast %x { axes = [] }", ["f32[]", "f32[T]"], &x[..1]), [1.0, 1.0]);
        assert_eq!(on_one("reshape %x", ["f32[2, 3]", "f32[6]"], &x), x);
        let turned = on_one("transpose %x { perm = [1, 0] }", ["f32[2, 3]", "f32[3, 2]"], &x);
        assert_eq!(turned, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        // y[i, 0, k] = x[k, i, 0].
        let turned = on_one("transpose %x { perm = [1, 2, 0] }", ["f32[3, 2, 1]", "f32[2, 1, 3]"], &x);
        assert_eq!(turned, [1.0, 3.0, 5.0, 2.0, 4.0, 6.0]);
        let cut = on_one("slice %x { axis = 1, start = 1 }", ["f32[2, 3]", "f32[2, 2]"], &x);
        assert_eq!(cut, [2.0, 3.0, 5.0, 6.0]);
        let last = on_one("slice %x { axis = 0, start = T - 1 }", ["f32[T, 3]", "f32[1, 3]"], &x);
        assert_eq!(last, [4.0, 5.0, 6.0]);
        let joined = on_two(
            "concat %x, %z { axis = 1 }",
            ["f32[2, 1]", "f32[2, 2]", "f32[2, 3]"],
            &[7.0, 8.0],
            &x[..4],
        );
        assert_eq!(joined, [7.0, 1.0, 2.0, 8.0, 3.0, 4.0]);
    }

    #[test]
    fn reductions() {
        let x = [1.0, 5.0, 3.0, 4.0, 2.0, 6.0];
        assert_eq!(on_one("reduce.sum %x { axis = 0 }", ["f32[2, 3]", "f32[3]"], &x), [5.0, 7.0, 9.0]);
        assert_eq!(on_one("reduce.sum %x { axis = 1 }", ["f32[2, 3]", "f32[2]"], &x), [9.0, 12.0]);
        assert_eq!(on_one("reduce.max %x { axis = 1 }", ["f32[2, 3]", "f32[2]"], &x), [5.0, 6.0]);
        let with_nan = on_one("reduce.max %x { axis = 0 }", ["f32[3]", "f32[]"], &[1.0, f64::NAN, 3.0]);
        assert!(with_nan[0].is_nan());
        // f32 would lose the 1: sums are f64 inside.
        let sum = on_one("reduce.sum %x { axis = 0 }", ["f32[3]", "f32[]"], &[16777216.0, 1.0, -16777216.0]);
        assert_eq!(sum, [1.0]);
    }

    #[test]
    fn contractions() {
        let (x, w) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 0.0, -1.0, 2.0, 1.0, 0.0]);
        let dot = |axes: &str, types: [&str; 3]| {
            on_two(&format!("dot %x, %z {{ axes = \"{axes}\" }}"), types, &x, &w)
        };
        // [[1 2 3], [4 5 6]] times the rows [1 0 -1], [2 1 0].
        assert_eq!(dot("tk,nk->tn", ["f32[2, 3]", "f32[2, 3]", "f32[2, 2]"]), [-2.0, 4.0, -2.0, 13.0]);
        assert_eq!(dot("tk,nk->nt", ["f32[2, 3]", "f32[2, 3]", "f32[2, 2]"]), [-2.0, -2.0, 4.0, 13.0]);
        // The same numbers as [3, 2] columns: [[1 0], [-1 2], [1 0]].
        assert_eq!(dot("tk,kn->tn", ["f32[2, 3]", "f32[3, 2]", "f32[2, 2]"]), [2.0, 4.0, 5.0, 10.0]);
        // A batch axis: row by row.
        assert_eq!(dot("bk,bk->b", ["f32[2, 3]", "f32[2, 3]", "f32[2]"]), [-2.0, 13.0]);
        // Two summed axes, none left.
        assert_eq!(dot("ab,ab->", ["f32[2, 3]", "f32[2, 3]", "f32[]"]), [11.0]);
        // An outer product summed over nothing.
        assert_eq!(
            on_two("dot %x, %z { axes = \"a,b->ba\" }", ["f32[2]", "f32[2]", "f32[2, 2]"], &x[..2], &x[2..4]),
            [3.0, 6.0, 4.0, 8.0]
        );
        // Batch axis in the middle of the result, and more than four terms.
        let ones = [1.0; 12];
        let six: Vec<f64> = (1..=12).map(f64::from).collect();
        assert_eq!(
            on_two(
                "dot %x, %z { axes = \"gk,ngk->ng\" }",
                ["f32[2, 6]", "f32[1, 2, 6]", "f32[1, 2]"],
                &six,
                &ones
            ),
            [21.0, 57.0]
        );
    }

    #[test]
    fn rows_by_index() {
        let table = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let types = ["f32[3, 2]", "i32[2]", "f32[2, 2]"];
        assert_eq!(on_two("gather %x, %z", types, &table, &[2.0, 0.0]), [5.0, 6.0, 1.0, 2.0]);
        let body = "%x = input \"x\" : f32[3, 2]\n%i = input \"i\" : i32[2]\n%r = input \"r\" : f32[2, 2]\n\
            %y = scatter_add %x, %i, %r : f32[3, 2]\noutput \"y\" = %y : f32[3, 2]";
        let inputs: [(&str, &[f64]); 3] =
            [("x", &table), ("i", &[1.0, 1.0]), ("r", &[10.0, 20.0, 30.0, 40.0])];
        assert_eq!(run(body, &inputs), [1.0, 2.0, 43.0, 64.0, 5.0, 6.0]);
    }

    #[test]
    fn index_outside() {
        let body = "%x = input \"x\" : f32[3, 1]\n%i = input \"i\" : i32[1]\n%y = gather %x, %i : f32[1, 1]\n\
            output \"y\" = %y : f32[1, 1]";
        let inputs: [(&str, &[f64]); 2] = [("x", &[1.0, 2.0, 3.0]), ("i", &[3.0])];
        let error = outputs(body, &inputs, Rounding::Stored).unwrap_err();
        assert_eq!(error, InterpError::Index { value: "y".to_string(), index: 3, extent: 3 });
    }

    #[test]
    fn cache_slots() {
        // Two heads, three slots, d = 1; the rows of both tokens go to slots 2 and 0.
        let body = "%c = state \"c\" : f32[2, 3, 1]\n%r = input \"r\" : f32[2, 2, 1]\n%p = input \"p\" : i32[2]\n\
            %y = cache_append %c, %r, %p : f32[2, 3, 1]\noutput \"y\" = %y : f32[2, 3, 1]";
        let inputs: [(&str, &[f64]); 3] =
            [("c", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), ("r", &[10.0, 20.0, 30.0, 40.0]), ("p", &[2.0, 0.0])];
        assert_eq!(run(body, &inputs), [30.0, 2.0, 10.0, 40.0, 5.0, 20.0]);
    }

    /// One head, three slots, d = 1, keys 0, ln 2, ln 3 for a query of 1: weights 1 : 2 : 3.
    fn attention_of(causal: bool, pos: [f64; 2]) -> Vec<f64> {
        of_attention("attention %q, %k, %v, %p", "f64[T, 1, 1]", causal, pos)
    }

    fn of_attention(op: &str, ty: &str, causal: bool, pos: [f64; 2]) -> Vec<f64> {
        let body = format!(
            "%q = input \"q\" : f64[T, 1, 1]\n%k = input \"k\" : f64[1, 3, 1]\n%v = input \"v\" : f64[1, 3, 1]\n\
            %p = input \"p\" : i32[T]\n%y = {op} {{ causal = {causal}, scale = 0.5 }} : {ty}\n\
            output \"y\" = %y : {ty}"
        );
        let k = [0.0, 2f64.ln(), 3f64.ln()];
        run(&body, &[("q", &[2.0, 2.0]), ("k", &k), ("v", &[6.0, 12.0, 18.0]), ("p", &pos)])
    }

    #[test]
    fn attention_by_hand() {
        // Slots 0 and 1: (6 + 2 * 12) / 3. All three: (6 + 24 + 54) / 6.
        assert_near(&attention_of(true, [1.0, 2.0]), &[10.0, 14.0]);
        assert_near(&attention_of(true, [0.0, 1.0]), &[6.0, 10.0]);
        assert_near(&attention_of(false, [0.0, 1.0]), &[10.0, 10.0]);
        assert!(attention_of(true, [-1.0, 0.0])[0].is_nan());
        // The exponentials are 1, 2 and 3; as stored in f32.
        let sums = of_attention("attention_lse %q, %k, %p", "f32[T, 1]", true, [1.0, 2.0]);
        assert_eq!(sums, [3.0f64, 6.0].map(|sum| f64::from(sum.ln() as f32)));
    }

    #[test]
    fn attention_is_its_expansion() {
        for causal in [true, false] {
            let mut b = Builder::new("f");
            let t = b.symbol("T", 1, 8);
            let q = b.input("q", DType::F32, &[t, Dim::of(4), Dim::of(2)]);
            let cache = [Dim::of(2), Dim::of(6), Dim::of(2)];
            let (k, v) = (b.state("k", DType::F32, &cache), b.state("v", DType::F32, &cache));
            let pos = b.input("pos", DType::I32, &[t]);
            let one = b.attention("one", q, k, v, pos, causal, 0.7);
            let all = b.attention_expanded("all", q, k, v, pos, causal, 0.7);
            b.output("one", one);
            b.output("all", all);
            let graph = b.finish();
            verify(&graph).unwrap();
            let symbols = [3, 0, 0, 0];
            let mut bind = |name: &str, ty: &TensorType| {
                let shape = extents(&ty.shape, &symbols);
                let waves =
                    (0..shape.iter().product()).map(|i: usize| (i as f64 * name.len() as f64 * 1.3).sin());
                let data: Vec<f64> = if name == "pos" { vec![1.0, 4.0, 2.0] } else { waves.collect() };
                Ok(Rc::new(Tensor::new(ty.dtype, &shape, &data)))
            };
            let outputs = interpret(&graph, &symbols, Rounding::Exact, &mut bind, None).unwrap();
            assert_near(&outputs["one"].data, &outputs["all"].data);
        }
    }

    #[test]
    fn argmax_takes_the_lowest() {
        let y = on_one("argmax %x", ["f32[2, 3]", "i32[2]"], &[1.0, 3.0, 3.0, -1.0, -2.0, -1.0]);
        assert_eq!(y, [1.0, 0.0]);
    }

    /// One block of 32: `head`, then zeros.
    fn one_block(dtype: &str, head: &[f64]) -> Vec<f64> {
        let mut x = head.to_vec();
        x.resize(32, 0.0);
        let body = format!(
            "%x = input \"x\" : f32[32]\n%q = quantize %x : {dtype}[32]\n%y = dequantize %q : f64[32]\n\
            output \"y\" = %y : f64[32]"
        );
        run(&body, &[("x", &x)])[..head.len() + 1].to_vec()
    }

    #[test]
    fn blocks() {
        // Scale 127 / 127 = 1: halves away from zero.
        assert_eq!(one_block("q8_0", &[127.0, 2.5, -2.5, 0.25]), [127.0, 3.0, -3.0, 0.0, 0.0]);
        // Scale -8 / -8 = 1: codes of -8..7, so 7.9 is out of reach.
        assert_eq!(one_block("q4_0", &[-8.0, 7.9, 1.4, -1.4]), [-8.0, 7.0, 1.0, -1.0, 0.0]);
        assert_eq!(one_block("q5_0", &[-16.0, 15.9, 1.4]), [-16.0, 15.0, 1.0, 0.0]);
        // From -3 in steps of 18 / 15.
        assert_near(&one_block("q4_1", &[-3.0, 15.0, 1.0]), &[-3.0, 15.0, 1.0, 0.0].map(q4_1_by_hand));
        // From 0 in steps of 1.
        assert_eq!(one_block("q5_1", &[31.0, 7.4, 7.6]), [31.0, 7.0, 8.0, 0.0]);
        assert_eq!(one_block("q8_0", &[0.0]), [0.0, 0.0]);
    }

    /// The step 1.2 is held as f16: 1.2001953125. Codes of -3, 15, 1 and 0 are 0, 15, 3 and 3 (from 2.5, up).
    fn q4_1_by_hand(x: f64) -> f64 {
        let code = if x == 15.0 { 15.0 } else { ((x + 3.0) / 1.2 + 0.5).floor() };
        1.2001953125 * code - 3.0
    }

    #[test]
    fn k_quants_come_quantized() {
        let body = "%x = input \"x\" : f32[256]\n%y = quantize %x : q4_k[256]\noutput \"y\" = %y : q4_k[256]";
        let error = outputs(body, &[("x", &[0.0; 256])], Rounding::Stored).unwrap_err();
        assert!(matches!(error, InterpError::Quantize { .. }));
    }

    #[test]
    fn stored_values_round_and_groups_do_not() {
        let chain = |open: &str, close: &str| {
            format!(
                "%x = input \"x\" : f32[1]\n{open}\n%a = cast %x : bf16[1]\n%b = cast %a : f32[1]\n{close}\n\
                output \"y\" = %b : f32[1]"
            )
        };
        let x: [(&str, &[f64]); 1] = [("x", &[1.001])];
        assert_eq!(run(&chain("", ""), &x), [1.0]);
        let stored = DType::F32.round(1.001);
        assert_eq!(run(&chain("group @g : elementwise {", "}"), &x), [stored]);
        assert_eq!(outputs(&chain("", ""), &x, Rounding::Exact).unwrap().data, [stored]);
        // A value that another group reads is stored.
        let two = chain("group @g : elementwise {", "}").replace("%b =", "}\ngroup @h : elementwise {\n%b =");
        assert_eq!(run(&two, &x), [1.0]);
    }

    #[test]
    fn bindings_are_checked_and_asked_for_when_needed() {
        let body = "%w = weight \"w\" : f32[2]\n%x = input \"x\" : f32[2]\n%n = neg %x : f32[2]\n\
            %y = add %n, %w : f32[2]\n%u = weight \"unused\" : f32[2]\noutput \"y\" = %y : f32[2]";
        assert_eq!(outputs(body, &[], Rounding::Stored).unwrap_err(), InterpError::Unbound("x".to_string()));
        assert_eq!(run(body, &[("w", &[1.0, 2.0]), ("x", &[3.0, 4.0])]), [-2.0, -2.0]);

        let graph = parse::graph(&format!("graph @f() {{\n{body}\n}}")).unwrap();
        let mut bind = |_: &str, _: &TensorType| Ok(Rc::new(Tensor::new(DType::F32, &[3], &[0.0; 3])));
        let error = interpret(&graph, &[0; 4], Rounding::Stored, &mut bind, None).unwrap_err();
        assert!(error.to_string().contains("`x` is bound to f32[3], the graph asks for f32[2]"), "{error}");
    }

    #[test]
    fn symbols_keep_their_ranges() {
        let graph = parse::graph("graph @f(T in 1..8) { }").unwrap();
        let mut bind = |name: &str, _: &TensorType| Err(InterpError::Unbound(name.to_string()));
        let error = interpret(&graph, &[9, 0, 0, 0], Rounding::Stored, &mut bind, None).unwrap_err();
        assert_eq!(error.to_string(), "symbol `T` is 9, not within 1..8");
    }

    #[test]
    fn traces_every_value() {
        let graph = parse::graph(
            "graph @f() {\n%x = input \"x\" : f32[]\n%y = neg %x : f32[]\n%z = neg %y : f32[]\noutput \"z\" = %z : f32[]\n}",
        )
        .unwrap();
        let mut seen = Vec::new();
        let mut trace = |id: ValueId, tensor: &Tensor| seen.push((id.0, tensor.data[0]));
        let mut bind = |_: &str, _: &TensorType| Ok(Rc::new(Tensor::new(DType::F32, &[], &[2.0])));
        interpret(&graph, &[0; 4], Rounding::Stored, &mut bind, Some(&mut trace)).unwrap();
        assert_eq!(seen, [(0, 2.0), (1, -2.0), (2, 2.0)]);
    }
}
