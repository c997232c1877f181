//! Products of one row: `y[n] = epilogue(sum over k of a[k] * w[n, k])`, limited by how fast weights stream.
//!
//! A warp takes a few columns; its threads take 16 bytes of each in turn, so that a warp reads 512 bytes in a row. The row of
//! `a` is made where it is multiplied: a norm costs a pass over it in each warp, and no memory. Each thread's sums are folded
//! by shuffles, so the order of a sum depends on `k` alone.

use super::pack_of;
use crate::Dim;
use crate::dtype::DType;
use crate::families::access::{Affine, Lowering, Scope, Vars};
use crate::families::dot::{DotGroup, Place, Segment, outputs, stored_left};
use crate::families::{GroupView, LowerError, Lowered, rowwise};
use crate::graph::ValueId;
use crate::kernel::{BufferId, Expr, Type};
use crate::op::{Compare, Reduction};
use crate::schedule::{self, Field};

/// How a row's product is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Warps of a CTA.
    pub warps: usize,
    /// Columns of each stream that a warp does at once.
    pub columns: usize,
}

impl Schedule {
    /// The fields, for text and tuning. None changes the order of a sum.
    pub fn fields(self) -> [Field; 2] {
        let field = |name, value| Field { name, value, numeric: false };
        [field("warps", self.warps), field("columns", self.columns)]
    }

    /// Reads the text form.
    ///
    /// # Errors
    ///
    /// What does not fit, in words.
    pub fn parse(text: &str) -> Result<Schedule, String> {
        let mut fields = Schedule { warps: 0, columns: 0 }.fields();
        schedule::parse(text, &mut fields)?;
        let [warps, columns] = fields.map(|f| f.value);
        match (1..=32).contains(&warps) && (1..=16).contains(&columns) {
            true => Ok(Schedule { warps, columns }),
            false => Err("warps must be 1 to 32, columns 1 to 16".to_string()),
        }
    }
}

/// The legal space, the preferred first.
pub fn schedules() -> Vec<String> {
    let all =
        [4, 8, 2, 1].into_iter().flat_map(|warps| [2, 4, 1, 8].map(|columns| Schedule { warps, columns }));
    all.map(|s| schedule::print(&s.fields())).collect()
}

/// The kernel of a product of one row.
///
/// # Errors
///
/// Where an access is no vector and no scalar, or weights have no layout.
pub fn lower(view: &GroupView<'_>, group: &DotGroup, schedule: Schedule) -> Result<Lowered, LowerError> {
    let mut l = Lowering::of_warps(view, schedule.warps);
    l.vector_or_scalar(&|l, lanes| {
        let mut vars = Vars::default();
        let row = vars.add(Expr::Int(0), Some(1));
        let folds = rowwise::fold(l, &vars, std::slice::from_ref(&row), &[group.a], lanes)?;
        let stored = stored_left(view, group.a).map(|stored| l.rows("a", stored));
        let left = Left { group, stored, vars, row, folds, lanes };
        for (number, segment) in group.segments.iter().enumerate() {
            product(l, &left, segment, number, schedule)?;
        }
        Ok(())
    })?;
    Ok(l.finish())
}

/// The row that is multiplied.
struct Left<'a> {
    group: &'a DotGroup,
    /// Where it lies, if nothing has to be made.
    stored: Option<BufferId>,
    vars: Vars,
    row: Affine,
    folds: Vec<(ValueId, Expr)>,
    lanes: u16,
}

fn product(
    l: &mut Lowering<'_, '_>,
    left: &Left<'_>,
    segment: &Segment,
    number: usize,
    schedule: Schedule,
) -> Result<(), LowerError> {
    let Schedule { warps, columns } = schedule;
    let (n, streams, warp) = (segment.n(), segment.streams.len(), l.warp());
    let pack = pack_of(l, number)?;
    let w = l.pack("w", pack);
    let mut result = Ok(());
    l.parallel("turn", n.div_ceil(warps * columns).into(), |l, turn| {
        let first = l.k.let_("first", (turn * warps + warp.number.clone()) * columns);
        l.only(first.clone().compare(Compare::Lt, n), |l| {
            let sums = l.k.reg("sums", Type::f32(1), &[streams, columns], Some(Expr::f32(0.0, 1)));
            let floats = |x: Expr| if left.group.dtype == DType::F32 { x } else { x.cast(DType::F32) };
            let leaf = |id: ValueId, _: &[Affine]| left.folds.iter().find(|f| f.0 == id).map(|f| f.1.clone());
            result = l.along(&left.vars, left.group.k as i64, left.lanes, &mut |l, vars, column| {
                let (at, now) = (vars.expr(&column), vars.lanes());
                let x = match left.stored {
                    Some(stored) => floats(l.k.load(stored, &[Expr::Int(0), at.clone()], now)),
                    None => {
                        let mut scope = Scope::new(vars);
                        l.value_at(&mut scope, left.group.a, &[left.row.clone(), column], &leaf)?
                    }
                };
                let has = l.k.kernel().type_of(&x).lanes();
                let x = l.k.let_("x", x.splat(now / has));
                l.k.unroll("s", streams, |k, s| {
                    k.unroll("c", columns, |k, c| {
                        let row = (first.clone() + c.clone()).min(n - 1);
                        let weights = k.load(w, &[row, s.clone(), Expr::Int(0), at.clone()], now);
                        let weights = k.let_("weights", floats(weights));
                        let place = [s, c];
                        let mut sum = k.get(sums, &place);
                        for lane in 0..now {
                            sum = x.clone().lanes(lane, 1).fma(weights.clone().lanes(lane, 1), sum);
                        }
                        k.set(sums, &place, sum);
                    });
                });
                Ok(())
            });
            // Each lane takes the sums of its own column.
            let mine: Vec<Expr> = (0..streams)
                .map(|s| {
                    let whole = (0..columns).map(|c| {
                        let sum = l.k.get(sums, &[s.into(), c.into()]);
                        let sum = l.folded(Reduction::Sum, sum);
                        l.k.let_("sum", sum)
                    });
                    let whole: Vec<Expr> = whole.collect();
                    let first = whole[0].clone();
                    let chosen = (1..).zip(&whole[1..]).fold(first, |chosen, (c, sum)| {
                        let is = warp.lane.clone().compare(Compare::Eq, Expr::Int(c));
                        is.select(sum.clone(), chosen)
                    });
                    l.k.let_("mine", chosen)
                })
                .collect();
            let column = l.k.let_("column", first + warp.lane.clone());
            let last = if n % columns == 0 {
                Expr::Int(columns as i64)
            } else {
                l.k.let_("last", (Expr::from(n) - column.clone() + warp.lane.clone()).min(columns))
            };
            l.only(warp.lane.clone().compare(Compare::Lt, last), |l| {
                let place = Place::of(l, segment, &Expr::from(Dim::of(0)), &column, 1);
                let stored = outputs(l, segment, place, &mine);
                result = std::mem::replace(&mut result, Ok(())).and(stored);
            });
        });
    });
    result
}
