//! The value of an expression.

use super::{Eval, FaultKind, Machine, Value};
use crate::dtype::DType;
use crate::kernel::{Arith, Expr, Type};
use crate::op::Reduction;

impl Machine<'_> {
    pub(super) fn eval(&mut self, expr: &Expr) -> Eval<Value> {
        Ok(match expr {
            Expr::Int(x) => Value::Index(*x),
            Expr::Sym(sym) => Value::Index(self.symbols[sym.0 as usize]),
            Expr::Var(var) => self.vars[var.0 as usize].clone(),
            Expr::Const { value, ty } => match *ty {
                Type::Vector { dtype: DType::I32, lanes } => {
                    Value::Ints(vec![DType::I32.round(*value) as i32; lanes.into()])
                }
                Type::Vector { dtype, lanes } => {
                    Value::Floats(vec![dtype.round(*value) as f32; lanes.into()])
                }
                Type::Index | Type::Flag => unreachable!("a literal is a vector, as verified"),
            },
            Expr::Reg { reg, index } => {
                let (flat, at) = self.register(*reg, index)?;
                match &self.regs[reg.0 as usize][flat] {
                    Some(value) => value.clone(),
                    None => {
                        let reg = self.kernel[*reg].name.clone();
                        return Err(Box::new(FaultKind::Undefined { reg, index: at }));
                    }
                }
            }
            Expr::Load { buffer, index, lanes } => self.load(*buffer, index, *lanes)?,
            Expr::Arith(op, a, b) => match (self.eval(a)?, self.eval(b)?) {
                (Value::Index(a), Value::Index(b)) => Value::Index(arith_index(*op, a, b)?),
                (Value::Floats(mut a), Value::Floats(b)) => {
                    self.stats.flops += a.len() as u64;
                    a.iter_mut().zip(b).for_each(|(a, b)| *a = arith_f32(*op, *a, b));
                    Value::Floats(a)
                }
                (Value::Ints(mut a), Value::Ints(b)) => {
                    self.stats.flops += a.len() as u64;
                    a.iter_mut().zip(b).for_each(|(a, b)| *a = arith_i32(*op, *a, b));
                    Value::Ints(a)
                }
                _ => unreachable!("two values of one type, as verified"),
            },
            Expr::Fma(a, b, c) => {
                let (mut a, b, c) = (self.floats(a)?, self.floats(b)?, self.floats(c)?);
                self.stats.flops += 2 * a.len() as u64;
                a.iter_mut().zip(b.into_iter().zip(c)).for_each(|(a, (b, c))| *a = a.mul_add(b, c));
                Value::Floats(a)
            }
            Expr::Unary(op, a) => {
                let (mut a, facts) = (self.floats(a)?, op.facts());
                self.stats.flops += u64::from(facts.flops) * a.len() as u64;
                a.iter_mut().for_each(|x| *x = (facts.eval)(f64::from(*x)) as f32);
                Value::Floats(a)
            }
            Expr::Compare(op, a, b) => {
                let holds = |a: f64, b: f64| f32::from(u8::from(op.eval(a, b)));
                match (self.eval(a)?, self.eval(b)?) {
                    // Not through f64: an index may have more than 53 bits.
                    (Value::Index(a), Value::Index(b)) => Value::Flag(op.eval(a.cmp(&b) as i8 as f64, 0.0)),
                    (Value::Floats(a), Value::Floats(b)) => {
                        Value::Floats(a.iter().zip(b).map(|(&a, b)| holds(a.into(), b.into())).collect())
                    }
                    (Value::Ints(a), Value::Ints(b)) => {
                        Value::Floats(a.iter().zip(b).map(|(&a, b)| holds(a.into(), b.into())).collect())
                    }
                    _ => unreachable!("two values of one type, as verified"),
                }
            }
            Expr::Select(c, a, b) => match (self.eval(c)?, self.eval(a)?, self.eval(b)?) {
                (Value::Flag(c), a, b) => {
                    if c {
                        a
                    } else {
                        b
                    }
                }
                (Value::Floats(c), Value::Floats(a), Value::Floats(b)) => Value::Floats(choose(&c, &a, &b)),
                (Value::Floats(c), Value::Ints(a), Value::Ints(b)) => Value::Ints(choose(&c, &a, &b)),
                _ => unreachable!("a flag, or bool lanes and vectors, as verified"),
            },
            Expr::Splat { value, times } => match self.eval(value)? {
                Value::Floats(a) => Value::Floats(a.repeat((*times).into())),
                Value::Ints(a) => Value::Ints(a.repeat((*times).into())),
                Value::Index(_) | Value::Flag(_) => unreachable!("a vector, as verified"),
            },
            Expr::Lanes { value, start, lanes } => {
                let (start, lanes) = (usize::from(*start), usize::from(*lanes));
                match self.eval(value)? {
                    Value::Floats(a) => Value::Floats(take(&a, start, lanes, 0.0)),
                    Value::Ints(a) => Value::Ints(take(&a, start, lanes, 0)),
                    Value::Index(_) | Value::Flag(_) => unreachable!("a vector, as verified"),
                }
            }
            Expr::Iota { lanes } => Value::Ints((0..i32::from(*lanes)).collect()),
            Expr::Cast { value, dtype } => cast(self.eval(value)?, *dtype)?,
            Expr::Index(a) => match self.eval(a)? {
                Value::Ints(a) => Value::Index(a[0].into()),
                _ => unreachable!("an i32 scalar, as verified"),
            },
            Expr::Reduce(kind, a) => {
                let op = match kind {
                    Reduction::Sum => Arith::Add,
                    Reduction::Max => Arith::Max,
                };
                let value = self.eval(a)?;
                self.stats.flops += u64::from(self.kernel.type_of(a).lanes()) - 1;
                match value {
                    Value::Floats(a) => Value::Floats(fold(a, |low, high| arith_f32(op, low, high))),
                    Value::Ints(a) => Value::Ints(fold(a, |low, high| arith_i32(op, low, high))),
                    Value::Index(_) | Value::Flag(_) => unreachable!("a vector, as verified"),
                }
            }
            Expr::Join(a, b) => match (self.eval(a)?, self.eval(b)?) {
                (Value::Floats(a), Value::Floats(b)) => Value::Floats([a, b].concat()),
                (Value::Ints(a), Value::Ints(b)) => Value::Ints([a, b].concat()),
                _ => unreachable!("two vectors of one dtype, as verified"),
            },
            Expr::Thread
            | Expr::Uniform(_)
            | Expr::Exp2(_)
            | Expr::Shuffle { .. }
            | Expr::Matrix { .. }
            | Expr::Mma(..) => unreachable!("refused above"),
            Expr::DotBf16(acc, a, b) => {
                let (mut acc, a, b) = (self.floats(acc)?, self.floats(a)?, self.floats(b)?);
                self.stats.flops += 4 * acc.len() as u64;
                for (acc, (a, b)) in acc.iter_mut().zip(a.chunks(2).zip(b.chunks(2))) {
                    *acc = a[0].mul_add(b[0], a[1].mul_add(b[1], *acc));
                }
                Value::Floats(acc)
            }
        })
    }

    pub(super) fn index(&mut self, expr: &Expr) -> Eval<i64> {
        match self.eval(expr)? {
            Value::Index(x) => Ok(x),
            _ => unreachable!("an index, as verified"),
        }
    }

    fn floats(&mut self, expr: &Expr) -> Eval<Vec<f32>> {
        match self.eval(expr)? {
            Value::Floats(lanes) => Ok(lanes),
            _ => unreachable!("a vector of floats, as verified"),
        }
    }
}

fn arith_index(op: Arith, a: i64, b: i64) -> Eval<i64> {
    let exact = match op {
        Arith::Add => a.checked_add(b),
        Arith::Sub => a.checked_sub(b),
        Arith::Mul => a.checked_mul(b),
        Arith::Div => a.checked_div_euclid(b),
        Arith::Rem if a < 0 => return Err(Box::new(FaultKind::NegativeRem(a))),
        Arith::Rem => a.checked_rem(b),
        Arith::Min => Some(a.min(b)),
        Arith::Max => Some(a.max(b)),
    };
    exact.ok_or_else(|| Box::new(FaultKind::Overflow))
}

fn arith_f32(op: Arith, a: f32, b: f32) -> f32 {
    match op {
        Arith::Add => a + b,
        Arith::Sub => a - b,
        Arith::Mul => a * b,
        Arith::Div => a / b,
        Arith::Min => {
            if a < b {
                a
            } else {
                b
            }
        }
        Arith::Max => {
            if a > b {
                a
            } else {
                b
            }
        }
        Arith::Rem => unreachable!("on indices only, as verified"),
    }
}

fn arith_i32(op: Arith, a: i32, b: i32) -> i32 {
    match op {
        Arith::Add => a.wrapping_add(b),
        Arith::Sub => a.wrapping_sub(b),
        Arith::Mul => a.wrapping_mul(b),
        Arith::Min => a.min(b),
        Arith::Max => a.max(b),
        Arith::Div | Arith::Rem => unreachable!("not on i32, as verified"),
    }
}

/// Lane `i` with lane `i + n/2`, until one is left.
fn fold<T: Copy>(mut lanes: Vec<T>, op: impl Fn(T, T) -> T) -> Vec<T> {
    while lanes.len() > 1 {
        let high = lanes.split_off(lanes.len() / 2);
        lanes.iter_mut().zip(high).for_each(|(low, high)| *low = op(*low, high));
    }
    lanes
}

fn choose<T: Copy>(c: &[f32], a: &[T], b: &[T]) -> Vec<T> {
    (0..c.len()).map(|lane| if c[lane] != 0.0 { a[lane] } else { b[lane] }).collect()
}

fn take<T: Copy>(lanes: &[T], start: usize, count: usize, beyond: T) -> Vec<T> {
    (start..start + count).map(|lane| lanes.get(lane).copied().unwrap_or(beyond)).collect()
}

fn cast(value: Value, dtype: DType) -> Eval<Value> {
    Ok(match (value, dtype) {
        (Value::Index(x), DType::I32) => {
            let x = i32::try_from(x).map_err(|_| Box::new(FaultKind::Overflow))?;
            Value::Ints(vec![x])
        }
        (Value::Index(x), _) => Value::Floats(vec![x as f32]),
        (Value::Floats(a), DType::I32) => Value::Ints(a.into_iter().map(|x| x as i32).collect()),
        (Value::Floats(a), _) => Value::Floats(a.into_iter().map(|x| dtype.round(x.into()) as f32).collect()),
        (Value::Ints(a), DType::I32) => Value::Ints(a),
        (Value::Ints(a), _) => Value::Floats(a.into_iter().map(|x| dtype.round(x.into()) as f32).collect()),
        (Value::Flag(_), _) => unreachable!("a number, as verified"),
    })
}
