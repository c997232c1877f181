//! What a kernel's code names. Two launches that differ in other symbols only are the same launch.

use super::parts::{each_expr, each_stmt};
use super::{Expr, Kernel};
use crate::dim::MAX_SYMBOLS;

/// For each symbol: does the kernel's code name it?
pub fn symbols(kernel: &Kernel) -> [bool; MAX_SYMBOLS] {
    let mut read = [false; MAX_SYMBOLS];
    each_expr(&kernel.body, &mut |expr| {
        if let Expr::Sym(sym) = expr {
            read[sym.0 as usize] = true;
        }
    });
    read
}

/// For each buffer: does the kernel's code name it? An id beyond the kernel's tables is passed over.
pub fn buffers(kernel: &Kernel) -> Vec<bool> {
    let mut named = vec![false; kernel.buffers.len()];
    let mut name = |id: super::BufferId| {
        if let Some(named) = named.get_mut(id.0 as usize) {
            *named = true;
        }
    };
    each_stmt(&kernel.body, &mut |stmt| stmt.buffers().into_iter().for_each(&mut name));
    each_expr(&kernel.body, &mut |expr| expr.buffer().into_iter().for_each(&mut name));
    named
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
