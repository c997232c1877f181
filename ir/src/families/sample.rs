//! Greedy choice: the index of a row's largest element, the lowest on ties.
//!
//! Each of 16 lanes keeps its best and where it was; a strict comparison keeps the first. Of the lanes that hold the row's
//! largest, the lowest index wins.

use super::access::{Lowering, Vars};
use super::rowwise::padded;
use super::{GroupView, LowerError, Lowered};
use crate::dtype::DType;
use crate::kernel::{Access, Expr, LANES, Type};
use crate::op::{Compare, Op, Reduction};

/// The kernel of an argmax.
///
/// # Errors
///
/// For anything but one argmax over f32 `[T, n]` in memory.
pub fn lower(view: &GroupView<'_>) -> Result<Lowered, LowerError> {
    let [id] = view.values[..] else { return Err(view.unsupported("more than one op")) };
    let operand = view.graph.operand(id, 0);
    let fits = matches!(view.graph[id].op, Op::Argmax)
        && operand.ty.dtype == DType::F32
        && operand.ty.shape.len() == 2;
    let Some(n) = operand.ty.shape.last().and_then(|d| d.constant()).filter(|_| fits) else {
        return Err(view.unsupported("anything but an argmax over rows of f32"));
    };
    let mut l = Lowering::new(view);
    let x = l.tensor("x", view.graph[id].operands[0], Access::Read);
    let y = l.tensor("y", id, Access::Write);
    let ints = Type::Vector { dtype: DType::I32, lanes: LANES };
    let int = |value: f64| Expr::Const { value, ty: ints };
    let rows = operand.ty.shape[0];
    let mut result = Ok(());
    l.parallel("t", rows.into(), |l, t| {
        let best = l.k.reg("best", Type::f32(LANES), &[], Some(Expr::f32(f64::NEG_INFINITY, LANES)));
        let place = l.k.reg("place", ints, &[], Some(Expr::Iota { lanes: LANES }));
        result = l.along(&Vars::default(), n, LANES, &mut |l, vars, index| {
            let at = vars.expr(&index);
            let lanes = vars.lanes();
            let mut v = l.k.load(x, &[t.clone(), at.clone()], lanes);
            if lanes < LANES {
                v = padded(v, lanes, f64::NEG_INFINITY);
            }
            let v = l.k.let_("v", v);
            let more = l.k.let_("more", v.clone().compare(Compare::Gt, l.k.get(best, &[])));
            let here = at.cast(DType::I32).splat(LANES) + Expr::Iota { lanes: LANES };
            l.k.set(place, &[], more.clone().select(here, l.k.get(place, &[])));
            l.k.set(best, &[], more.select(v, l.k.get(best, &[])));
            Ok(())
        });
        let most = l.k.let_("most", l.k.get(best, &[]).reduce(Reduction::Max));
        let is = l.k.get(best, &[]).compare(Compare::Eq, most.splat(LANES));
        // The lowest index is minus the largest of the negated ones.
        let negated = is.select(int(0.0) - l.k.get(place, &[]), int(f64::from(i32::MIN)));
        let zero = Expr::Const { value: 0.0, ty: Type::Vector { dtype: DType::I32, lanes: 1 } };
        l.k.store(y, &[t], zero - negated.reduce(Reduction::Max));
    });
    result?;
    Ok(l.finish())
}
