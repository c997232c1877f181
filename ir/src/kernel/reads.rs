//! Which symbols a kernel reads: two launches that differ in others only are the same launch.

use super::{Expr, Kernel, Stmt};
use crate::dim::MAX_SYMBOLS;

/// For each symbol: does the kernel's code name it?
pub fn symbols(kernel: &Kernel) -> [bool; MAX_SYMBOLS] {
    let mut read = [false; MAX_SYMBOLS];
    block(&kernel.body, &mut read);
    read
}

fn block(stmts: &[Stmt], read: &mut [bool; MAX_SYMBOLS]) {
    for stmt in stmts {
        match stmt {
            Stmt::Let { value, .. } => expr(value, read),
            Stmt::Reg { init, .. } => exprs(init, read),
            Stmt::Set { index, value, .. } | Stmt::Store { index, value, .. } => {
                exprs(index, read);
                expr(value, read);
            }
            Stmt::Prefetch { index, .. } => exprs(index, read),
            Stmt::For { lo, hi, body, .. } => {
                exprs([lo, hi], read);
                block(body, read);
            }
            Stmt::Unroll { body, .. } => block(body, read),
            Stmt::Parallel { count, body, .. } => {
                expr(count, read);
                block(body, read);
            }
            Stmt::If { cond, then, otherwise } => {
                expr(cond, read);
                block(then, read);
                block(otherwise, read);
            }
            Stmt::Copy { at, index, count, .. } => {
                exprs(at, read);
                exprs(index, read);
                expr(count, read);
            }
            Stmt::Barrier | Stmt::Sync | Stmt::Commit | Stmt::Wait(_) => {}
        }
    }
}

fn exprs<'a>(all: impl IntoIterator<Item = &'a Expr>, read: &mut [bool; MAX_SYMBOLS]) {
    all.into_iter().for_each(|one| expr(one, read));
}

fn expr(of: &Expr, read: &mut [bool; MAX_SYMBOLS]) {
    match of {
        Expr::Sym(sym) => read[sym.0 as usize] = true,
        Expr::Arith(_, a, b) | Expr::Compare(_, a, b) | Expr::Join(a, b) => exprs([&**a, &**b], read),
        Expr::Fma(a, b, c) | Expr::Select(a, b, c) | Expr::DotBf16(a, b, c) | Expr::Mma(a, b, c) => {
            exprs([&**a, &**b, &**c], read);
        }
        Expr::Unary(_, a)
        | Expr::Splat { value: a, .. }
        | Expr::Lanes { value: a, .. }
        | Expr::Cast { value: a, .. }
        | Expr::Index(a)
        | Expr::Exp2(a)
        | Expr::Shuffle { value: a, .. }
        | Expr::Reduce(_, a) => expr(a, read),
        Expr::Reg { index, .. } | Expr::Load { index, .. } | Expr::Matrix { index, .. } => exprs(index, read),
        Expr::Int(_) | Expr::Thread | Expr::Var(_) | Expr::Const { .. } | Expr::Iota { .. } => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::parse::parse;

    #[test]
    fn a_symbol_is_found_wherever_it_stands() {
        let text = "kernel @k : elementwise, schedule \"\", 32 threads (T in 1..9, P in 0..9) {
  param %x : read f32[64]
  param %y : write f32[64]
  shared %s : f32[64]
  let %a = 11
  parallel %i in 0..12 {
    if lt(%i, 13) {
      reg %r : index = 14
      for %j in 15..16 {
        unroll %c in 0..2 {
          set %r = min(%r, 17 * 3)
          copy %s[18] = %x[19] : f32x4, 20
          store %y[21] = fma(cast(22, f32), load %x[23] : f32, f32(1.0))
        }
      }
      prefetch %x[24]
    } else {
      store %y[%i] = select(lt(%i, 25), f32(1.0), f32(2.0))
    }
  }
}
";
        let of = |text: &str| symbols(&parse(text).unwrap()[0]);
        assert_eq!(of(text), [false; MAX_SYMBOLS]);
        for number in 11..=25 {
            let read = of(&text.replace(&number.to_string(), "P"));
            assert_eq!(read, [false, true, false, false], "{number}");
        }
    }
}
