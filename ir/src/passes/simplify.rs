//! Computes what is known, symbols of one value too, drops what changes no bit, shares what is computed twice, removes what nobody reads.
//!
//! * Takes: a verified graph that is not fused yet; one with groups or packs is left as it is. Gives: a verified
//!   graph with the same outputs to the bit, for -0, infinities and NaN too (one NaN is as good as another).
//! * What is left keeps its name, type and order. An `input` or `state` always stays: callers bind them by
//!   name. A `weight` that nobody reads goes.
//! * Never: merges the q/k/v or gate/up dots that share an input. Their weights stay tensors of their own; `fuse`
//!   puts such dots into one group, whose packs lie side by side.
//! * A rule is an equation in `rewrite`, exact in every dtype that it allows. Missing because they are not
//!   exact: `x + 0` (-0), `x - x` and `x * 0` (NaN, infinities), `x * y / y`, sums in another order.
//! * Ends, because each rule brings a value closer to what is bound. Cost: O(values + text of constants) a
//!   round, few rounds. Tests: `tests/ir/simplify/`, and a proptest a rule.

use crate::dim::{Dim, MAX_SYMBOLS};
use crate::dtype::DType;
use crate::graph::{Graph, TensorType, Value, ValueId};
use crate::interp::{Rounding, Tensor, compute};
use crate::op::{Binary, Op, Unary};
use std::collections::HashMap;
use std::rc::Rc;

/// Elements of the largest constant that is folded or made; one number for all elements counts as one.
const MAX_FOLDED_ELEMS: i64 = 1024;

/// Simplifies until nothing changes; gives the number of values rewritten or removed, and of symbols made constant.
pub fn simplify(graph: &mut Graph) -> usize {
    if !graph.groups.is_empty() || !graph.packs.is_empty() {
        return 0;
    }
    let mut changes = graph.fix_symbols();
    loop {
        let changed = rewrite_all(graph) + remove_dead(graph);
        changes += changed;
        if changed == 0 {
            return changes;
        }
    }
}

/// What a rule makes of a value.
enum Rewrite {
    /// An earlier value of the same type has the same elements.
    Same(ValueId),
    /// Another op gives them, on these operands.
    Becomes(Op, Vec<ValueId>),
}

use Rewrite::{Becomes, Same};

/// Tries every rule on every value once, in order, so that users see their operands as they have become. Gives the
/// number of values with a new op; one that another stands for has no user left and goes with the dead.
fn rewrite_all(graph: &mut Graph) -> usize {
    let mut changes = 0;
    let mut stands_for: Vec<ValueId> = Vec::with_capacity(graph.values.len());
    let mut known: HashMap<String, ValueId> = HashMap::new();
    for id in graph.ids() {
        for operand in &mut graph[id].operands {
            *operand = stands_for[operand.0 as usize];
        }
        let rewritten = fold(graph, id).or_else(|| rewrite(graph, id));
        let same = match rewritten.filter(|rewritten| reads_no_state(graph, rewritten)) {
            Some(Same(other)) => Some(other),
            Some(Becomes(op, operands)) => {
                changes += 1;
                graph[id].op = op;
                graph[id].operands = operands;
                None
            }
            None => None,
        };
        stands_for.push(same.or_else(|| shared(graph, id, &mut known)).unwrap_or(id));
    }
    for (_, id) in &mut graph.outputs {
        *id = stands_for[id.0 as usize];
    }
    changes
}

/// A version of a state may be read only until it is appended to, so nobody is made to read one later than before.
fn reads_no_state(graph: &Graph, rewritten: &Rewrite) -> bool {
    let read = match rewritten {
        Same(other) => std::slice::from_ref(other),
        Becomes(_, operands) => operands,
    };
    read.iter().all(|&id| !matches!(graph[id].op, Op::State { .. } | Op::CacheAppend))
}

/// An earlier value with the same op, operands and type.
fn shared(graph: &Graph, id: ValueId, known: &mut HashMap<String, ValueId>) -> Option<ValueId> {
    let Value { op, operands, ty, .. } = &graph[id];
    // What is bound is one value a name already.
    if matches!(op, Op::Input { .. } | Op::Weight { .. } | Op::State { .. }) {
        return None;
    }
    // The text of a number tells -0 from 0, which `==` would not.
    let first = *known.entry(format!("{op:?} {operands:?} {ty:?}")).or_insert(id);
    (first != id).then_some(first)
}

/// The rules, apart from folding.
fn rewrite(graph: &Graph, id: ValueId) -> Option<Rewrite> {
    let Value { op, operands, ty, .. } = &graph[id];
    let is = |index: usize, number: f64| {
        splat(graph, operands[index]).is_some_and(|x| x.to_bits() == number.to_bits())
    };
    // The first operand, its op, and what that reads.
    let x = *operands.first()?;
    let inner = (&graph[x].op, graph[x].operands.first().copied());
    match (op, inner) {
        // x + -0 = x
        (Op::Binary(Binary::Add), _) if is(1, -0.0) => Some(Same(x)),
        // -0 + x = x
        (Op::Binary(Binary::Add), _) if is(0, -0.0) => Some(Same(operands[1])),
        // x + 0 = x, for integers
        (Op::Binary(Binary::Add), _) if is(1, 0.0) && !ty.dtype.is_float() => Some(Same(x)),
        // 0 + x = x, for integers
        (Op::Binary(Binary::Add), _) if is(0, 0.0) && !ty.dtype.is_float() => Some(Same(operands[1])),
        // x - 0 = x
        (Op::Binary(Binary::Sub), _) if is(1, 0.0) => Some(Same(x)),
        // x * 1 = x
        (Op::Binary(Binary::Mul), _) if is(1, 1.0) => Some(Same(x)),
        // 1 * x = x
        (Op::Binary(Binary::Mul), _) if is(0, 1.0) => Some(Same(operands[1])),
        // x / 1 = x
        (Op::Binary(Binary::Div), _) if is(1, 1.0) => Some(Same(x)),
        // max(x, x) = x, min(x, x) = x
        (Op::Binary(Binary::Max | Binary::Min), _) if x == operands[1] => Some(Same(x)),

        // neg(neg x) = x
        (Op::Unary(Unary::Neg), (Op::Unary(Unary::Neg), Some(y))) => Some(Same(y)),
        // abs(abs x) = abs x
        (Op::Unary(Unary::Abs), (Op::Unary(Unary::Abs), _)) => Some(Same(x)),
        // abs(neg x) = abs x
        (Op::Unary(Unary::Abs), (Op::Unary(Unary::Neg), Some(y))) => Some(Becomes(op.clone(), vec![y])),

        // cast x = x, to its own dtype
        (Op::Cast, _) if graph[x].ty.dtype == ty.dtype => Some(Same(x)),
        // cast(cast x) = cast x, where the inner one lost nothing
        (Op::Cast, (Op::Cast, Some(y))) if holds(graph[x].ty.dtype, graph[y].ty.dtype) => {
            Some(Becomes(Op::Cast, vec![y]))
        }

        // reshape x = x, to its own shape
        (Op::Reshape, _) if graph[x].ty == *ty => Some(Same(x)),
        // reshape(reshape x) = reshape x
        (Op::Reshape, (Op::Reshape, Some(y))) => Some(Becomes(Op::Reshape, vec![y])),

        // transpose x = x, in its own order
        (Op::Transpose { perm }, _) if perm.is_sorted() => Some(Same(x)),
        // transpose(transpose x, p), q = transpose x, p[q]
        (Op::Transpose { perm: q }, (Op::Transpose { perm: p }, Some(y))) => {
            Some(Becomes(Op::Transpose { perm: q.iter().map(|&axis| p[axis]).collect() }, vec![y]))
        }

        // broadcast x = x, to its own shape
        (Op::Broadcast { .. }, _) if graph[x].ty == *ty => Some(Same(x)),
        // broadcast(broadcast x, a), b = broadcast x, b[a]
        (Op::Broadcast { axes: b }, (Op::Broadcast { axes: a }, Some(y))) => {
            Some(Becomes(Op::Broadcast { axes: a.iter().map(|&axis| b[axis]).collect() }, vec![y]))
        }

        // slice x = x, where it is all of it
        (Op::Slice { start, .. }, _) if *start == Dim::of(0) && graph[x].ty == *ty => Some(Same(x)),
        // slice(slice x, a), b = slice x, a + b, along one axis
        (Op::Slice { axis: outer, start: b }, (Op::Slice { axis, start: a }, Some(y))) if axis == outer => {
            Some(Becomes(Op::Slice { axis: *axis, start: *a + *b }, vec![y]))
        }

        // concat x = x
        (Op::Concat { .. }, _) if operands.len() == 1 => Some(Same(x)),

        // select c, x, x = x
        (Op::Select, _) if operands[1] == operands[2] => Some(Same(operands[1])),
        // select true, x, y = x
        (Op::Select, _) if is(0, 1.0) => Some(Same(operands[1])),
        // select false, x, y = y
        (Op::Select, _) if is(0, 0.0) => Some(Same(operands[2])),
        _ => None,
    }
}

/// The number that every element of a constant is, as it is stored.
fn splat(graph: &Graph, id: ValueId) -> Option<f64> {
    let Value { op: Op::Constant { data }, ty, .. } = &graph[id] else { return None };
    let mut numbers = data.iter().map(|&x| ty.dtype.round(x));
    let first = numbers.next()?;
    numbers.all(|x| x.to_bits() == first.to_bits()).then_some(first)
}

/// Does every number of dtype `narrow` survive a cast to `wide`?
fn holds(wide: DType, narrow: DType) -> bool {
    use DType::*;
    let held: &[DType] = match wide {
        F64 => &[F64, F32, BF16, F16, I32, I8, U8, Bool],
        F32 => &[F32, BF16, F16, I8, U8, Bool],
        // 8 bits of mantissa and more hold a byte.
        BF16 => &[BF16, I8, U8, Bool],
        F16 => &[F16, I8, U8, Bool],
        I32 => &[I32, I8, U8, Bool],
        I8 => &[I8, Bool],
        U8 => &[U8, Bool],
        Bool => &[Bool],
        Block(_) => &[],
    };
    held.contains(&narrow)
}

/// A value of constants is a constant: the interpreter says which.
fn fold(graph: &Graph, id: ValueId) -> Option<Rewrite> {
    let value = &graph[id];
    let is_constant = |&id: &ValueId| matches!(graph[id].op, Op::Constant { .. });
    if value.operands.is_empty() || !value.operands.iter().all(is_constant) {
        return None;
    }
    let data = match fold_splats(graph, value) {
        Some(number) => vec![number],
        None => fold_elements(graph, value)?,
    };
    Some(Becomes(Op::Constant { data }, Vec::new()))
}

/// Where each operand is one number for all elements and the op moves elements or takes each alone, so is the result.
fn fold_splats(graph: &Graph, value: &Value) -> Option<f64> {
    let numbers: Option<Vec<f64>> = value.operands.iter().map(|&id| splat(graph, id)).collect();
    let numbers = numbers?;
    match value.op {
        Op::Broadcast { .. } | Op::Reshape | Op::Transpose { .. } | Op::Slice { .. } => Some(numbers[0]),
        Op::Concat { .. } => {
            numbers.iter().all(|x| x.to_bits() == numbers[0].to_bits()).then_some(numbers[0])
        }
        Op::Cast | Op::Unary(_) | Op::Binary(_) | Op::Compare(_) | Op::Select => {
            let scalar = Value { ty: TensorType::new(value.ty.dtype, &[]), ..value.clone() };
            let operand = |(&id, &x): (&ValueId, &f64)| Rc::new(Tensor::new(graph[id].ty.dtype, &[], &[x]));
            let operands: Vec<Rc<Tensor>> = value.operands.iter().zip(&numbers).map(operand).collect();
            let result = compute(&scalar, &operands, &[0; MAX_SYMBOLS], Rounding::Stored);
            Some(result.expect("no index is read").data[0])
        }
        _ => None,
    }
}

/// The elements of a small result of small constants. One that would be larger than what it is made of stays as it is.
fn fold_elements(graph: &Graph, value: &Value) -> Option<Vec<f64>> {
    let small = |ty: &TensorType| {
        let elems = ty.shape.iter().try_fold(1i64, |n, dim| n.checked_mul(dim.constant()?));
        elems.is_some_and(|elems| elems <= MAX_FOLDED_ELEMS)
    };
    let all_small = small(&value.ty) && value.operands.iter().all(|&id| small(&graph[id].ty));
    if !all_small || matches!(value.op, Op::Broadcast { .. } | Op::Quantize) {
        return None;
    }
    let symbols = [0; MAX_SYMBOLS];
    let constant = |&id: &ValueId| compute(&graph[id], &[], &symbols, Rounding::Stored).map(Rc::new);
    let operands: Vec<Rc<Tensor>> = value.operands.iter().map(constant).collect::<Result<_, _>>().ok()?;
    // An index outside of its table is for the run to report.
    let result = compute(value, &operands, &symbols, Rounding::Stored).ok()?;
    Some(result.data)
}

/// Removes every value from which no output can be reached, apart from inputs and states; gives how many.
fn remove_dead(graph: &mut Graph) -> usize {
    let pinned = |value: &Value| matches!(value.op, Op::Input { .. } | Op::State { .. });
    let mut live: Vec<bool> = graph.values.iter().map(pinned).collect();
    for (_, id) in &graph.outputs {
        live[id.0 as usize] = true;
    }
    // Operands come before their users, so one walk from the back reaches everything.
    for id in graph.ids().rev() {
        if live[id.0 as usize] {
            graph[id].operands.iter().for_each(|operand| live[operand.0 as usize] = true);
        }
    }
    let before = graph.values.len();
    let mut moved = Vec::with_capacity(before);
    let mut kept = 0;
    for &live in &live {
        moved.push(ValueId(kept));
        kept += u32::from(live);
    }
    let mut live = live.iter();
    graph.values.retain(|_| *live.next().expect("one a value"));
    let read = graph.values.iter_mut().flat_map(|value| &mut value.operands);
    for id in read.chain(graph.outputs.iter_mut().map(|(_, id)| id)) {
        *id = moved[id.0 as usize];
    }
    before - graph.values.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::infer;
    use crate::interp::interpret;
    use crate::op::Compare;
    use crate::random::{MAX_T, Rng, random_bind, random_graph};
    use crate::verify::verify;
    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;

    /// Numbers on which a rule that is almost exact shows itself.
    const EDGES: [f64; 12] = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
        f32::MAX as f64,
        f32::MIN_POSITIVE as f64,
        1e-40,
        1.0 + 1.0 / 256.0,
        -3.5,
    ];

    /// The graph's outputs, with [`EDGES`] sprinkled over the inputs.
    fn outputs(graph: &Graph, seed: u64) -> Vec<(String, Tensor)> {
        let symbols = [1 + (seed % MAX_T as u64) as i64, 0, 0, 0];
        let mut tame = random_bind(seed, symbols);
        let mut bind = |name: &str, ty: &TensorType| {
            let mut tensor = (*tame(name, ty)?).clone();
            let mut rng = Rng(seed ^ name.len() as u64);
            for x in tensor.data.iter_mut().filter(|_| ty.dtype.is_float()) {
                if rng.below(3) == 0 {
                    *x = ty.dtype.round(rng.pick(&EDGES));
                }
            }
            Ok(Rc::new(tensor))
        };
        let outputs = interpret(graph, &symbols, Rounding::Stored, &mut bind, None).unwrap();
        outputs.into_iter().collect()
    }

    fn assert_same_bits(before: &Graph, after: &Graph, seed: u64) {
        verify(after).unwrap_or_else(|error| panic!("{error}\nbefore:\n{before}"));
        for ((name, a), (_, b)) in outputs(before, seed).iter().zip(&outputs(after, seed)) {
            assert!(a.same_bits(b), "{name}: {a:?}\nis now {b:?}\nbefore:\n{before}after:\n{after}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..Default::default() })]

        #[test]
        fn outputs_keep_their_bits(seed: u64) {
            let before = random_graph(seed, 25);
            let mut after = before.clone();
            simplify(&mut after);
            assert_same_bits(&before, &after, seed);
            let once = after.clone();
            prop_assert_eq!(simplify(&mut after), 0, "a second time:\n{}", once);
            prop_assert!(after.values.len() <= before.values.len());
        }
    }

    /// Adds values to a graph: the left side of an equation. Its root is `%y`, the rest are `%y.1`, `%y.2`...
    struct Plant<'g> {
        graph: &'g mut Graph,
        rng: Rng,
    }

    impl Plant<'_> {
        fn ty(&self, x: ValueId) -> TensorType {
            self.graph[x].ty.clone()
        }

        fn push(&mut self, op: Op, operands: &[ValueId], hint: TensorType) -> ValueId {
            let types: Vec<&TensorType> = operands.iter().map(|&id| &self.graph[id].ty).collect();
            let ty = infer(&op, &types, &hint).unwrap();
            let name = format!("y.{}", self.graph.values.len());
            let operands = operands.to_vec();
            let value = Value { name, op, operands, ty, group: None, layout: None, remarks: Vec::new() };
            self.graph.values.push(value);
            ValueId(self.graph.values.len() as u32 - 1)
        }

        /// An op whose type is that of its last operand, where it does not follow.
        fn op(&mut self, op: Op, operands: &[ValueId]) -> ValueId {
            let hint = self.ty(*operands.last().expect("an operand"));
            self.push(op, operands, hint)
        }

        fn constant(&mut self, number: f64, like: ValueId) -> ValueId {
            let ty = self.ty(like);
            self.push(Op::Constant { data: vec![number] }, &[], ty)
        }

        fn binary(&mut self, op: Binary, a: ValueId, b: ValueId) -> ValueId {
            self.op(Op::Binary(op), &[a, b])
        }

        fn unary(&mut self, op: Unary, x: ValueId) -> ValueId {
            self.op(Op::Unary(op), &[x])
        }

        fn cast(&mut self, x: ValueId, dtype: DType) -> ValueId {
            let shape = self.ty(x).shape;
            self.push(Op::Cast, &[x], TensorType { dtype, shape })
        }

        fn reshape(&mut self, x: ValueId, shape: &[Dim]) -> ValueId {
            let dtype = self.ty(x).dtype;
            self.push(Op::Reshape, &[x], TensorType::new(dtype, shape))
        }

        fn broadcast(&mut self, x: ValueId, axes: &[usize], shape: &[Dim]) -> ValueId {
            let dtype = self.ty(x).dtype;
            self.push(Op::Broadcast { axes: axes.to_vec() }, &[x], TensorType::new(dtype, shape))
        }

        fn transpose(&mut self, x: ValueId) -> ValueId {
            let mut perm: Vec<usize> = (0..self.ty(x).shape.len()).collect();
            for last in (1..perm.len()).rev() {
                perm.swap(last, self.rng.below(last + 1));
            }
            self.op(Op::Transpose { perm }, &[x])
        }

        fn slice(&mut self, x: ValueId, start: i64, extent: Dim) -> ValueId {
            let mut ty = self.ty(x);
            ty.shape[0] = extent;
            self.push(Op::Slice { axis: 0, start: Dim::of(start) }, &[x], ty)
        }

        /// `x`, as integers.
        fn integers(&mut self, x: ValueId) -> ValueId {
            let x = self.cast(x, DType::I32);
            self.binary(Binary::Add, x, x)
        }

        /// `x` with a first axis of 3.
        fn three(&mut self, x: ValueId) -> ValueId {
            self.op(Op::Concat { axis: 0 }, &[x, x, x])
        }
    }

    /// A rule by name: what builds its left side on a value with an axis or more.
    type Rule = (&'static str, fn(&mut Plant, ValueId) -> ValueId);

    #[rustfmt::skip] // a table: one rule a line, or two
    const RULES: &[Rule] = &[
        ("x + -0", |p, x| { let c = p.constant(-0.0, x); p.binary(Binary::Add, x, c) }),
        ("-0 + x", |p, x| { let c = p.constant(-0.0, x); p.binary(Binary::Add, c, x) }),
        ("x + 0 of integers", |p, x| { let x = p.integers(x); let c = p.constant(0.0, x); p.binary(Binary::Add, x, c) }),
        ("0 + x of integers", |p, x| { let x = p.integers(x); let c = p.constant(0.0, x); p.binary(Binary::Add, c, x) }),
        ("x - 0", |p, x| { let c = p.constant(0.0, x); p.binary(Binary::Sub, x, c) }),
        ("x * 1", |p, x| { let c = p.constant(1.0, x); p.binary(Binary::Mul, x, c) }),
        ("1 * x", |p, x| { let c = p.constant(1.0, x); p.binary(Binary::Mul, c, x) }),
        ("x * 1 of integers", |p, x| { let x = p.integers(x); let c = p.constant(1.0, x); p.binary(Binary::Mul, x, c) }),
        ("x / 1", |p, x| { let c = p.constant(1.0, x); p.binary(Binary::Div, x, c) }),
        ("max(x, x)", |p, x| p.binary(Binary::Max, x, x)),
        ("min(x, x)", |p, x| p.binary(Binary::Min, x, x)),
        ("neg(neg x)", |p, x| { let y = p.unary(Unary::Neg, x); p.unary(Unary::Neg, y) }),
        ("abs(neg x)", |p, x| { let y = p.unary(Unary::Neg, x); p.unary(Unary::Abs, y) }),
        ("cast to its own dtype", |p, x| { let dtype = p.ty(x).dtype; p.cast(x, dtype) }),
        ("cast there and back", |p, x| { let dtype = p.ty(x).dtype; let y = p.cast(x, DType::F64); p.cast(y, dtype) }),
        ("cast through f64", |p, x| { let y = p.cast(x, DType::F64); p.cast(y, DType::I32) }),
        ("cast through i32", |p, x| {
            let c = p.constant(0.5, x);
            let y = p.op(Op::Compare(Compare::Lt), &[x, c]);
            let (z, own) = (p.cast(y, DType::I32), p.ty(x).dtype);
            let z = p.cast(z, own);
            // The comparison is no part of the left side; it stays.
            p.graph[c].name = "kept.half".to_string();
            p.graph[y].name = "kept.below".to_string();
            z
        }),
        ("reshape to its own shape", |p, x| { let shape = p.ty(x).shape; p.reshape(x, &shape) }),
        ("reshape of reshape", |p, x| {
            let mut shape = p.ty(x).shape;
            shape.insert(0, Dim::of(1));
            let y = p.reshape(x, &shape);
            shape.insert(2, Dim::of(1));
            p.reshape(y, &shape)
        }),
        ("transpose in order", |p, x| { let perm = (0..p.ty(x).shape.len()).collect(); p.op(Op::Transpose { perm }, &[x]) }),
        ("transpose of transpose", |p, x| { let y = p.transpose(x); p.transpose(y) }),
        ("broadcast to its own shape", |p, x| {
            let shape = p.ty(x).shape;
            p.broadcast(x, &(0..shape.len()).collect::<Vec<_>>(), &shape)
        }),
        ("broadcast of broadcast", |p, x| {
            let mut shape = p.ty(x).shape;
            let own = shape.len();
            shape.insert(0, Dim::of(2));
            let y = p.broadcast(x, &(1..=own).collect::<Vec<_>>(), &shape);
            shape.insert(1, Dim::of(3));
            let axes: Vec<usize> = [0].into_iter().chain(2..own + 2).collect();
            p.broadcast(y, &axes, &shape)
        }),
        ("slice of all", |p, x| { let whole = p.ty(x).shape[0]; p.slice(x, 0, whole) }),
        ("slice of slice", |p, x| {
            let x = p.three(x);
            p.graph[x].name = "kept.three".to_string();
            let whole = p.ty(x).shape[0];
            let y = p.slice(x, 1, whole - Dim::of(1));
            p.slice(y, 1, Dim::of(1))
        }),
        ("concat of one", |p, x| p.op(Op::Concat { axis: 0 }, &[x])),
        ("select with equal arms", |p, x| { let c = p.op(Op::Compare(Compare::Lt), &[x, x]); p.op(Op::Select, &[c, x, x]) }),
        ("select true", |p, x| {
            let (one, minus) = (p.constant(1.0, x), p.constant(-1.0, x));
            let c = p.op(Op::Compare(Compare::Lt), &[minus, one]);
            p.op(Op::Select, &[c, x, one])
        }),
        ("select false", |p, x| {
            let (one, minus) = (p.constant(1.0, x), p.constant(-1.0, x));
            let c = p.op(Op::Compare(Compare::Gt), &[minus, one]);
            p.op(Op::Select, &[c, one, x])
        }),
        ("a constant of constants", |p, x| {
            let (a, b) = (p.constant(0.1, x), p.constant(-0.7, x));
            let y = p.binary(Binary::Div, a, b);
            p.transpose(y)
        }),
        ("a small constant, element by element", |p, x| {
            let ty = TensorType { dtype: p.ty(x).dtype, shape: vec![Dim::of(3)] };
            let a = p.push(Op::Constant { data: vec![0.1, -0.0, 7.3] }, &[], ty);
            let y = p.binary(Binary::Mul, a, a);
            p.op(Op::Dot { axes: crate::op::DotAxes::parse("a,a->").unwrap() }, &[y, a])
        }),
    ];

    #[test]
    fn each_rule_is_exact_and_applies() {
        let config = ProptestConfig { cases: 60, failure_persistence: None, ..Default::default() };
        for &(rule, build) in RULES {
            TestRunner::new(config.clone())
                .run(&any::<u64>(), |seed| {
                    check_rule(rule, build, seed);
                    Ok(())
                })
                .unwrap_or_else(|error| panic!("{rule}: {error}"));
        }
    }

    fn check_rule(rule: &str, build: fn(&mut Plant, ValueId) -> ValueId, seed: u64) {
        let mut before = random_graph(seed, 10);
        // A cache is read by attention alone: it is rewritten in place.
        let is_cache = |id: &ValueId| matches!(before[*id].op, Op::State { .. } | Op::CacheAppend);
        let fits = |id: &ValueId| {
            before[*id].ty.dtype.is_float() && !before[*id].ty.shape.is_empty() && !is_cache(id)
        };
        let some: Vec<ValueId> = before.ids().filter(fits).collect();
        let mut rng = Rng(seed);
        let x = rng.pick(&some);
        let y = build(&mut Plant { graph: &mut before, rng }, x);
        before[y].name = "y".to_string();
        before.outputs.push(("planted".to_string(), y));
        let mut after = before.clone();
        simplify(&mut after);
        assert_same_bits(&before, &after, seed);
        let is_planted = |id: &ValueId| after[*id].name.starts_with("y.");
        let still = after.find("y").is_some_and(|y| after[y].operands.iter().any(is_planted));
        assert!(!still, "{rule} does not apply\nbefore:\n{before}after:\n{after}");
    }

    #[test]
    fn almost_rules_do_not_apply() {
        let stays = |body: &str| {
            let text = format!(
                "graph @f() {{ %x = input \"x\" : f32[2] {body} : f32[2] output \"y\" = %y : f32[2] }}"
            );
            let mut graph = crate::parse::graph(&text).unwrap();
            let changes = simplify(&mut graph);
            assert_eq!(changes, 0, "{graph}");
        };
        stays("%c = constant 0.0 : f32[2] %y = add %x, %c");
        stays("%c = constant -0.0 : f32[2] %y = sub %x, %c");
        stays("%y = sub %x, %x");
        stays("%c = constant 0.0 : f32[2] %y = mul %x, %c");
        stays("%h = cast %x : bf16[2] %y = cast %h");
        stays("%c = constant [1.0, 2.0] : f32[2] %y = mul %x, %c");
        // 1 + 2^-8 is 1 in bf16 only.
        stays("%c = constant 1.00390625 : f32[2] %y = mul %x, %c");
    }
}
