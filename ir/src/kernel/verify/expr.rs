//! What expressions mean: their types, their constants, their size.

use super::{
    Checked, Ctx, MAX_NESTING, MAX_NODES, Rule, check_lanes, check_type, in_shared, operand, rule, same,
};
use crate::dtype::DType;
use crate::kernel::{Arith, Expr, Space, Type, WARP, print};

impl Ctx<'_> {
    /// A whole expression of a statement.
    pub(super) fn whole(&self, expr: &Expr) -> Checked<Type> {
        let mut nodes = 0;
        measure(expr, 1, &mut nodes)?;
        self.expr(expr)
    }

    fn expr(&self, expr: &Expr) -> Checked<Type> {
        let ty = match expr {
            Expr::Int(_) => Type::Index,
            Expr::Sym(sym) if (sym.0 as usize) < self.kernel.symbols.0.len() => Type::Index,
            Expr::Sym(_) => return rule(Rule::Dangling),
            Expr::Thread => {
                self.many("`thread`")?;
                Type::Index
            }
            Expr::Uniform(a) => {
                self.many("`uniform`")?;
                same("the number", self.expr(a)?, Type::Index)?;
                Type::Index
            }
            Expr::Var(var) => match self.vars.get(var.0 as usize) {
                Some(Some(seen)) if seen.ended => return rule(Rule::Ended(self.kernel[*var].name.clone())),
                Some(Some(_)) => self.kernel[*var].ty,
                Some(None) => return rule(Rule::Scope(self.kernel[*var].name.clone())),
                None => return rule(Rule::Dangling),
            },
            Expr::Const { value, ty } => {
                let Type::Vector { dtype, .. } = *ty else { return operand("a literal", *ty) };
                check_type(*ty)?;
                if !dtype.is_float() && dtype.round(*value) != *value {
                    return rule(Rule::Literal { value: *value, ty: *ty });
                }
                *ty
            }
            Expr::Reg { reg, index } => {
                self.register(*reg, index)?;
                self.kernel[*reg].ty
            }
            Expr::Load { buffer, index, lanes } => {
                let found = self.element(*buffer, index, *lanes)?;
                let ty = Type::Vector { dtype: found.dtype, lanes: *lanes };
                // A chunk of a row stays together.
                if found.space == Space::Swizzled && usize::from(*lanes) * found.dtype.bytes(1) > 16 {
                    return operand("load from swizzled memory", ty);
                }
                ty
            }
            Expr::Arith(op, a, b) => self.arith(*op, a, b)?,
            Expr::Fma(a, b, c) => {
                let ty = self.f32("fma", a)?;
                same("the second factor", self.expr(b)?, ty)?;
                same("the summand", self.expr(c)?, ty)?;
                ty
            }
            Expr::Unary(op, a) => self.f32(op.facts().name, a)?,
            Expr::Compare(op, a, b) => {
                let ty = self.expr(a)?;
                same("the second operand", self.expr(b)?, ty)?;
                match ty {
                    Type::Index => Type::Flag,
                    Type::Vector { dtype: DType::F32 | DType::I32, lanes } => {
                        Type::Vector { dtype: DType::Bool, lanes }
                    }
                    _ => return operand(op.name(), ty),
                }
            }
            Expr::Select(c, a, b) => {
                let (cond, ty) = (self.expr(c)?, self.expr(a)?);
                same("the second choice", self.expr(b)?, ty)?;
                if cond != Type::Flag {
                    let lanes = ty.lanes();
                    same("the condition", cond, Type::Vector { dtype: DType::Bool, lanes })?;
                    if !matches!(ty, Type::Vector { .. }) {
                        return operand("select by lanes", ty);
                    }
                }
                ty
            }
            Expr::Splat { value, times } => match self.expr(value)? {
                Type::Vector { dtype, lanes } => {
                    let lanes = u32::from(lanes) * u32::from(*times);
                    check_lanes(lanes)?;
                    Type::Vector { dtype, lanes: lanes as u16 }
                }
                found => return operand("splat", found),
            },
            Expr::Lanes { value, start, lanes } => match self.expr(value)? {
                found @ Type::Vector { dtype, lanes: has } => {
                    check_lanes(u32::from(*lanes))?;
                    if *start >= has {
                        return rule(Rule::FirstLane { start: *start, found });
                    }
                    Type::Vector { dtype, lanes: *lanes }
                }
                found => return operand("lanes", found),
            },
            Expr::Join(a, b) => match (self.expr(a)?, self.expr(b)?) {
                (Type::Vector { dtype, lanes }, found @ Type::Vector { lanes: more, .. }) => {
                    same("the second part", found, Type::Vector { dtype, lanes: more })?;
                    check_lanes(u32::from(lanes) + u32::from(more))?;
                    Type::Vector { dtype, lanes: lanes + more }
                }
                (found, _) => return operand("join", found),
            },
            Expr::Exp2(a) => {
                self.many("`exp2`")?;
                self.f32("exp2", a)?
            }
            Expr::Iota { lanes } => {
                check_lanes(u32::from(*lanes))?;
                Type::Vector { dtype: DType::I32, lanes: *lanes }
            }
            Expr::Cast { value, dtype } => {
                let number = |d: DType| matches!(d, DType::F32 | DType::BF16 | DType::F16 | DType::I32);
                match self.expr(value)? {
                    Type::Index if matches!(dtype, DType::F32 | DType::I32) => {
                        Type::Vector { dtype: *dtype, lanes: 1 }
                    }
                    Type::Vector { dtype: from, lanes } if number(from) && number(*dtype) => {
                        Type::Vector { dtype: *dtype, lanes }
                    }
                    found => return operand(&format!("cast to {dtype}"), found),
                }
            }
            Expr::Index(a) => {
                same("the number", self.expr(a)?, Type::Vector { dtype: DType::I32, lanes: 1 })?;
                Type::Index
            }
            Expr::Reduce(kind, a) => match self.expr(a)? {
                Type::Vector { dtype: dtype @ (DType::F32 | DType::I32), lanes }
                    if lanes.is_power_of_two() =>
                {
                    Type::Vector { dtype, lanes: 1 }
                }
                found => return operand(&format!("reduce.{}", kind.name()), found),
            },
            Expr::DotBf16(acc, a, b) => {
                let ty = self.f32("dot.bf16", acc)?;
                let lanes = u32::from(ty.lanes()) * 2;
                check_lanes(lanes)?;
                let pairs = Type::Vector { dtype: DType::BF16, lanes: lanes as u16 };
                same("the first factor", self.expr(a)?, pairs)?;
                same("the second factor", self.expr(b)?, pairs)?;
                ty
            }
            Expr::Shuffle { value, mask } => {
                self.many("`shuffle`")?;
                if !(1..WARP).contains(mask) {
                    return rule(Rule::Mask(*mask));
                }
                match self.expr(value)? {
                    ty @ Type::Vector { dtype: DType::F32 | DType::I32, .. } => ty,
                    found => return operand("shuffle", found),
                }
            }
            Expr::Matrix { buffer, index, matrices, trans: _ } => {
                self.many("`matrix`")?;
                if !matches!(matrices, 1 | 2 | 4) {
                    return rule(Rule::Matrices(*matrices));
                }
                let found = self.element(*buffer, index, 8)?;
                in_shared(found)?;
                let ty = Type::Vector { dtype: found.dtype, lanes: 2 * matrices };
                if found.dtype.bytes(1) != 2 {
                    return operand("matrix", ty);
                }
                ty
            }
            Expr::Mma(acc, a, b) => {
                self.many("`mma`")?;
                same("the sums", self.expr(acc)?, Type::f32(4))?;
                let dtype = match self.expr(a)? {
                    Type::Vector { dtype: dtype @ (DType::BF16 | DType::F16), lanes: 8 } => dtype,
                    found => return operand("mma", found),
                };
                same("the second factor", self.expr(b)?, Type::Vector { dtype, lanes: 4 })?;
                Type::f32(4)
            }
        };
        Ok(ty)
    }

    fn f32(&self, op: &str, value: &Expr) -> Checked<Type> {
        match self.expr(value)? {
            ty @ Type::Vector { dtype: DType::F32, .. } => Ok(ty),
            found => operand(op, found),
        }
    }

    fn arith(&self, op: Arith, a: &Expr, b: &Expr) -> Checked<Type> {
        let ty = self.expr(a)?;
        same("the second operand", self.expr(b)?, ty)?;
        let takes = match (ty, op) {
            (Type::Index, Arith::Div | Arith::Rem) => {
                if self.constant(b).is_none_or(|divisor| divisor < 1) {
                    return rule(Rule::Divisor(print::expr(self.kernel, b)));
                }
                true
            }
            (Type::Index, _) => true,
            (Type::Vector { dtype: DType::F32, .. }, _) => op != Arith::Rem,
            (Type::Vector { dtype: DType::I32, .. }, _) => !matches!(op, Arith::Div | Arith::Rem),
            (Type::Vector { .. } | Type::Flag, _) => false,
        };
        if takes { Ok(ty) } else { operand(op.name(), ty) }
    }

    /// The number that an index is in this copy of the unrolled bodies.
    pub(super) fn constant(&self, expr: &Expr) -> Option<i64> {
        match expr {
            Expr::Int(x) => Some(*x),
            Expr::Var(var) => self.vars.get(var.0 as usize)?.as_ref()?.constant,
            Expr::Arith(op, a, b) => op.of_indices(self.constant(a)?, self.constant(b)?),
            _ => None,
        }
    }

    /// Is a value made of numbers, symbols and `thread` alone?
    pub(super) fn fixed(&self, expr: &Expr) -> bool {
        match expr {
            Expr::Reg { .. } => false,
            Expr::Var(var) => self.vars.get(var.0 as usize).is_some_and(|seen| seen.is_some_and(|s| s.fixed)),
            _ => expr.buffer().is_none() && expr.operands().into_iter().all(|operand| self.fixed(operand)),
        }
    }
}

/// Nodes and nesting, as the parser counts them: the left operand of infix arithmetic is read by a loop.
fn measure(expr: &Expr, depth: usize, nodes: &mut usize) -> Checked<()> {
    *nodes += 1;
    if *nodes > MAX_NODES || depth > MAX_NESTING {
        return rule(Rule::Nodes);
    }
    let infix = match expr {
        Expr::Arith(Arith::Min | Arith::Max, ..) => None,
        Expr::Arith(_, a, _) => Some(usize::from(print::precedence(a) < print::precedence(expr))),
        _ => None,
    };
    let operands = expr.operands().into_iter().enumerate();
    operands
        .map(|(number, operand)| (operand, infix.filter(|_| number == 0).unwrap_or(1)))
        .try_for_each(|(operand, deeper)| measure(operand, depth + deeper, nodes))
}
