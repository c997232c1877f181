//! Greedy choice: the index of a row's largest element, the lowest on ties.
//!
//! Each of 16 lanes, on a GPU each thread, keeps its best and where it was; a strict comparison keeps the first. Of those that
//! hold the row's largest, the lowest index wins.

use super::access::{Lowering, Vars};
use super::rowwise::padded;
use super::{GroupView, LowerError, Lowered};
use crate::dtype::DType;
use crate::graph::ValueId;
use crate::kernel::{Access, Builder, Expr, LANES, RegId, Type, WARP};
use crate::op::{Compare, Op, Reduction};

/// The argmax of a group and the length of its rows.
fn argmax(view: &GroupView<'_>) -> Result<(ValueId, i64), LowerError> {
    let [id] = view.values[..] else { return Err(view.unsupported("more than one op")) };
    let operand = view.graph.operand(id, 0);
    let fits = matches!(view.graph[id].op, Op::Argmax)
        && operand.ty.dtype == DType::F32
        && operand.ty.shape.len() == 2;
    let Some(n) = operand.ty.shape.last().and_then(|d| d.constant()).filter(|_| fits) else {
        return Err(view.unsupported("anything but an argmax over rows of f32"));
    };
    Ok((id, n))
}

/// The kernel of an argmax.
///
/// # Errors
///
/// For anything but one argmax over f32 `[T, n]` in memory.
pub fn lower(view: &GroupView<'_>) -> Result<Lowered, LowerError> {
    let (id, n) = argmax(view)?;
    let mut l = Lowering::new(view);
    let x = l.tensor("x", view.graph[id].operands[0], Access::Read);
    let y = l.tensor("y", id, Access::Write);
    let ints = Type::Vector { dtype: DType::I32, lanes: LANES };
    let int = |value: f64| Expr::Const { value, ty: ints };
    let rows = view.graph.operand(id, 0).ty.shape[0];
    let mut result = Ok(());
    l.parallel("t", rows.into(), |l, t| {
        let best = l.k.reg("best", Type::f32(LANES), &[], Some(Expr::f32(f64::NEG_INFINITY, LANES)));
        let place = l.k.reg("place", ints, &[], Some(Expr::Iota { lanes: LANES }));
        result = l.along(&Vars::default(), n, LANES, &mut |l, vars, index| {
            let at = vars.expr(&index);
            let lanes = vars.lanes();
            let mut v = l.k.load(x, &[t.clone(), at.clone()], lanes);
            if lanes < LANES {
                v = padded(v, lanes, LANES, f64::NEG_INFINITY);
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

/// Warps that do a row together.
const WARPS: usize = 8;

/// The kernel of an argmax on a GPU: a CTA does a row. Threads take elements in turn, warps fold by shuffles, and what the
/// warps found meets in shared memory.
///
/// # Errors
///
/// As [`lower`].
pub fn lower_threads(view: &GroupView<'_>) -> Result<Lowered, LowerError> {
    let (id, n) = argmax(view)?;
    let mut l = Lowering::of_warps(view, WARPS);
    let x = l.tensor("x", view.graph[id].operands[0], Access::Read);
    let y = l.tensor("y", id, Access::Write);
    let warp = l.warp();
    let rows = view.graph.operand(id, 0).ty.shape[0];
    let k = &mut l.k;
    let int = Type::Vector { dtype: DType::I32, lanes: 1 };
    let bests = k.shared("bests", DType::F32, &[WARPS], WARPS);
    let places = k.shared("places", DType::I32, &[WARPS], WARPS);
    let none = Expr::Const { value: f64::from(i32::MAX), ty: int };
    k.parallel("t", rows, |k, t| {
        let best = k.reg("best", Type::f32(1), &[], Some(Expr::f32(f64::NEG_INFINITY, 1)));
        let place = k.reg("place", int, &[], Some(none));
        k.for_("i", Expr::Thread, n, WARPS as i64 * i64::from(WARP), |k, i| {
            let v = k.load(x, &[t.clone(), i.clone()], 1);
            let v = k.let_("v", v);
            take(k, best, place, v, i.cast(DType::I32));
        });
        let fold = |k: &mut Builder, masks: &[u16]| {
            for &mask in masks {
                let v = k.let_("v", k.get(best, &[]).shuffle(mask));
                let at = k.let_("at", k.get(place, &[]).shuffle(mask));
                take(k, best, place, v, at);
            }
        };
        fold(k, &[16, 8, 4, 2, 1]);
        k.if_(warp.lane.clone().compare(Compare::Eq, 0usize), |k| {
            k.store(bests, std::slice::from_ref(&warp.number), k.get(best, &[]));
            k.store(places, std::slice::from_ref(&warp.number), k.get(place, &[]));
        });
        k.sync();
        let other = [warp.lane.clone() % WARPS];
        let v = k.load(bests, &other, 1);
        k.set(best, &[], v);
        let at = k.load(places, &other, 1);
        k.set(place, &[], at);
        fold(k, &[4, 2, 1]);
        k.if_(Expr::Thread.compare(Compare::Eq, 0usize), |k| k.store(y, &[t], k.get(place, &[])));
        // The next row's bests take the place of these.
        k.sync();
    });
    Ok(l.finish())
}

/// Takes an element if it is larger, or as large and before what was found.
fn take(k: &mut Builder, best: RegId, place: RegId, v: Expr, at: Expr) {
    let at = k.let_("at", at);
    let first = at.clone().min(k.get(place, &[]));
    let equal = v.clone().compare(Compare::Eq, k.get(best, &[]));
    let kept = k.let_("kept", equal.select(first, k.get(place, &[])));
    let more = k.let_("more", v.clone().compare(Compare::Gt, k.get(best, &[])));
    k.set(place, &[], more.clone().select(at, kept));
    k.set(best, &[], more.select(v, k.get(best, &[])));
}
