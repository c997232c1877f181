//! The phases of a kernel: what its barriers cut it into. On a GPU each is a grid, which begins when the one before has ended.

use super::parts::each_expr;
use super::{Expr, Kernel, Stmt, VarId};
use std::collections::HashSet;

impl Kernel {
    /// The kernel cut at its barriers: each phase with the parameters of the whole, and with those `let`s before it that it
    /// reads. The first has the kernel's name; the others, `name..1` and so on, have names that no kernel bears.
    pub fn phases(&self) -> Vec<Kernel> {
        let parts: Vec<&[Stmt]> = self.body.split(|stmt| matches!(stmt, Stmt::Barrier)).collect();
        let phase = |number: usize| {
            let name = if number == 0 { self.name.clone() } else { format!("{}..{number}", self.name) };
            let mut body = parts[number].to_vec();
            let before = parts[..number].iter().copied().flatten();
            let lets = before.filter(|stmt| matches!(stmt, Stmt::Let { .. })).rev();
            let mut read = values(&body);
            let needed = lets.filter(|stmt| {
                let needed = matches!(stmt, Stmt::Let { var, .. } if read.contains(var));
                if needed {
                    read.extend(values(std::slice::from_ref(*stmt)));
                }
                needed
            });
            let needed: Vec<Stmt> = needed.cloned().collect();
            body.splice(0..0, needed.into_iter().rev());
            Kernel { name, body, ..self.clone() }
        };
        (0..parts.len()).map(phase).collect()
    }
}

/// The values that a block reads.
fn values(stmts: &[Stmt]) -> HashSet<VarId> {
    let mut read = HashSet::new();
    each_expr(stmts, &mut |expr| {
        if let Expr::Var(var) = expr {
            read.insert(*var);
        }
    });
    read
}

#[cfg(test)]
mod tests {
    use crate::kernel::parse::parse;
    use crate::kernel::verify::verify;

    #[test]
    fn each_phase_has_what_it_reads() {
        let text = "kernel @k.1 : elementwise, schedule \"\", 32 threads (T in 1..9, P in 0..9) {
  param %x : read f32[T, 32]
  param %y : write f32[T, 32]
  shared %a : f32[32]
  shared %b : f32[64]
  let %half = thread / 2
  let %other = thread / 4 + P
  let %late = %half + T
  parallel %t in 0..T {
    store %a[thread] = load %x[%t, %other] : f32
    sync
    store %y[%t, thread] = load %a[%half] : f32
  }
  barrier
  parallel %u in 0..T * 2 {
    store %b[%late] = f32(1.0)
  }
}
";
        let kernel = parse(text).unwrap().remove(0);
        verify(&kernel).unwrap();
        let [first, second] = &kernel.phases()[..] else { panic!("two phases") };
        assert_eq!([&*first.name, &*second.name], ["k.1", "k.1..1"]);
        assert_eq!([first, second].map(|phase| phase.turns(&[3, 0, 0, 0])), [3, 6]);
        assert_eq!([&kernel, first, second].map(|kernel| kernel.shared_bytes()), [128 + 256, 128, 256]);
        assert_eq!(
            second.to_string().split_once("shared %b : f32[64]\n").unwrap().1,
            "  let %half = thread / 2
  let %late = %half + T
  parallel %u in 0..T * 2 {
    store %b[%late] = f32(1.0)
  }
}
"
        );
        assert_eq!(first.body.len(), 4);
    }
}
