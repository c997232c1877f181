//! Reductions of rows with the element-wise work around them: RMSNorm, softmax.
//!
//! A row is read once for each reduction and once for the result, in vectors; the lanes of a sum, and on a GPU the threads of
//! a warp, are folded at its end, so that its order depends on the row's length alone.

use super::access::{Affine, Lowering, Scope, Vars, stored_value};
use super::{LowerError, Lowered};
use crate::dtype::DType;
use crate::graph::ValueId;
use crate::kernel::{Arith, Expr, Type};
use crate::op::{Compare, Op, Reduction};

/// The kernel of a row-wise group.
///
/// # Errors
///
/// Where a reduction is not along the last axis, or an index is not affine.
pub fn lower(mut l: Lowering<'_, '_>) -> Result<Lowered, LowerError> {
    let view = l.view;
    for &root in &view.roots {
        let source = stored_value(view, root);
        let folded = |id: ValueId| matches!(view.graph[id].op, Op::Reduce { .. });
        // The index space of rows: that of what is reduced.
        let shape = view.graph[source].ty.shape.clone();
        let reduced = view.values.iter().copied().filter(|&v| folded(v)).map(|v| view.graph[v].operands[0]);
        let rank = reduced.map(|v| view.graph[v].ty.shape.len()).max().unwrap_or(1);
        let outer = (rank - 1).min(shape.len());
        l.vector_or_scalar(&|l, lanes| {
            let mut result = Ok(());
            let rows = shape.first().filter(|_| outer > 0).map_or(Expr::Int(1), |&d| d.into());
            l.each_row(rows, |l, t| result = row(l, root, outer, vec![t], lanes));
            result
        })?;
    }
    Ok(l.finish())
}

fn row(
    l: &mut Lowering<'_, '_>,
    root: ValueId,
    outer: usize,
    opened: Vec<Expr>,
    lanes: u16,
) -> Result<(), LowerError> {
    let source = stored_value(l.view, root);
    let shape = &l.view.graph[source].ty.shape;
    if opened.len() < outer {
        let extent = shape[opened.len()];
        let mut result = Ok(());
        l.looped("i", extent.into(), |l, i| {
            result = row(l, root, outer, opened.iter().cloned().chain([i]).collect(), lanes);
        });
        return result;
    }
    let mut vars = Vars::default();
    let index: Vec<Affine> =
        (0..outer).map(|axis| vars.add(opened[axis].clone(), shape[axis].constant())).collect();
    let folds = fold(l, &vars, &index, &[source], lanes)?;
    let leaf = |id: ValueId, _: &[Affine]| folds.iter().find(|f| f.0 == id).map(|f| f.1.clone());
    if shape.len() == outer {
        let mut scope = Scope::new(vars);
        let mut result = Ok(());
        l.once(|l| {
            result = l
                .value_at(&mut scope, source, &index, &leaf)
                .and_then(|value| l.store_at(&mut scope, root, &index, value, &leaf));
        });
        return result;
    }
    let Some(extent) = shape.last().and_then(|d| d.constant()).filter(|_| shape.len() == outer + 1) else {
        return Err(l.view.unsupported("rows of several axes"));
    };
    l.along(&vars, extent, lanes, &mut |l, vars, last| {
        let (mut scope, mut index) = (Scope::new(vars), index.clone());
        index.push(last);
        let value = l.value_at(&mut scope, source, &index, &leaf)?;
        l.store_at(&mut scope, root, &index, value, &leaf)
    })
}

/// Computes the reductions that `targets` need for one row, in order; gives each with its scalar. `index` names the row
/// on the axes before the last.
///
/// # Errors
///
/// Where a reduction is not along the last axis, or rows are not aligned.
pub fn fold(
    l: &mut Lowering<'_, '_>,
    vars: &Vars,
    index: &[Affine],
    targets: &[ValueId],
    lanes: u16,
) -> Result<Vec<(ValueId, Expr)>, LowerError> {
    let view = l.view;
    let mut needed: Vec<ValueId> = targets.to_vec();
    let mut at = 0;
    while at < needed.len() {
        for &operand in &view.graph[needed[at]].operands {
            if view.has(operand) && !needed.contains(&operand) {
                needed.push(operand);
            }
        }
        at += 1;
    }
    let mut reductions: Vec<ValueId> =
        needed.into_iter().filter(|&v| matches!(view.graph[v].op, Op::Reduce { .. })).collect();
    reductions.sort_unstable();
    let mut done: Vec<(ValueId, Expr)> = Vec::new();
    for id in reductions {
        let Op::Reduce { kind, axis } = view.graph[id].op else { unreachable!("filtered above") };
        let operand = view.graph[id].operands[0];
        let shape = &view.graph[operand].ty.shape;
        let Some(extent) = shape[axis].constant().filter(|_| axis + 1 == shape.len() && axis == index.len())
        else {
            return Err(view.unsupported("a reduction that is not along the last axis of a row"));
        };
        let (first, sign) = match kind {
            Reduction::Sum => (0.0, Arith::Add),
            Reduction::Max => (f64::NEG_INFINITY, Arith::Max),
        };
        let name = kind.name();
        let acc = l.k.reg(&format!("{name}s"), Type::f32(lanes), &[], Some(Expr::f32(first, lanes)));
        l.along(vars, extent, lanes, &mut |l, vars, last| {
            let now = vars.lanes();
            let (mut scope, mut index) = (Scope::new(vars), index.to_vec());
            index.push(last);
            let leaf = |id: ValueId, _: &[Affine]| done.iter().find(|f| f.0 == id).map(|f| f.1.clone());
            let mut x = l.value_at(&mut scope, operand, &index, &leaf)?;
            let has = l.k.kernel().type_of(&x).lanes();
            x = x.splat(now / has);
            if now < lanes {
                x = padded(x, now, lanes, first);
            }
            let sum = Expr::Arith(sign, Box::new(l.k.get(acc, &[])), Box::new(x));
            l.k.set(acc, &[], sum);
            Ok(())
        })?;
        let whole = l.k.get(acc, &[]);
        let folded = if lanes == 1 { whole } else { whole.reduce(kind) };
        let folded = l.folded(kind, folded);
        let folded = l.k.let_(name, folded);
        done.push((id, folded));
    }
    Ok(done)
}

/// `x` in the first `has` of so many lanes, `fill` in the others.
pub fn padded(x: Expr, has: u16, lanes: u16, fill: f64) -> Expr {
    if fill == 0.0 {
        return x.lanes(0, lanes);
    }
    let end = Expr::Const { value: has.into(), ty: Type::Vector { dtype: DType::I32, lanes } };
    Expr::Iota { lanes }.compare(Compare::Lt, end).select(x.lanes(0, lanes), Expr::f32(fill, lanes))
}
