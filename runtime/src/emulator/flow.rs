//! Where lanes that took different ways meet again: the immediate post-dominator of a branch.
//!
//! Method: Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm" (2001), on the reversed control flow of single
//! instructions. The end of the kernel is one more node, behind the last instruction.

use crate::ptx::{Instruction, Op};

/// Where control may go from each instruction.
pub fn successors(code: &[Instruction], at: usize) -> Vec<usize> {
    let end = code.len();
    let guarded = code[at].guard.is_some();
    let mut next = match &code[at].op {
        Op::Branch { target } => vec![*target as usize],
        Op::BranchIndexed { targets, .. } => targets.iter().map(|&target| target as usize).collect(),
        Op::Exit => vec![end],
        // No lane goes on from a trap, to the end neither: it is nobody's way around a join.
        Op::Trap => Vec::new(),
        _ => return vec![at + 1],
    };
    if guarded {
        next.push(at + 1);
    }
    next
}

/// The immediate post-dominator of every instruction. What cannot reach the end joins at the end.
pub fn joins(code: &[Instruction]) -> Vec<u32> {
    let end = code.len();
    let next: Vec<Vec<usize>> = (0..end).map(|at| successors(code, at)).collect();
    let mut before = vec![Vec::new(); end + 1];
    for (at, next) in next.iter().enumerate() {
        next.iter().for_each(|&next| before[next].push(at));
    }
    // The reversed graph in post-order, from the end.
    let mut order = Vec::with_capacity(end + 1);
    let mut seen = vec![false; end + 1];
    let mut path = vec![(end, 0)];
    seen[end] = true;
    while let Some((node, child)) = path.last_mut() {
        match before[*node].get(*child) {
            Some(&from) => {
                *child += 1;
                if !std::mem::replace(&mut seen[from], true) {
                    path.push((from, 0));
                }
            }
            None => {
                order.push(*node);
                path.pop();
            }
        }
    }
    let mut number = vec![0; end + 1];
    order.iter().enumerate().for_each(|(at, &node)| number[node] = at);
    let mut join = vec![usize::MAX; end + 1];
    join[end] = end;
    loop {
        let mut changed = false;
        for &node in order.iter().rev().skip(1) {
            let known = next[node].iter().copied().filter(|&next| join[next] != usize::MAX);
            let found = known.reduce(|mut a, mut b| {
                while a != b {
                    if number[a] < number[b] {
                        a = join[a];
                    } else {
                        b = join[b];
                    }
                }
                a
            });
            let found = found.unwrap_or(end);
            changed |= std::mem::replace(&mut join[node], found) != found;
        }
        if !changed {
            return join[..end].iter().map(|&join| join.min(end) as u32).collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ptx::Module;

    fn joins_of(body: &str) -> Vec<u32> {
        let head = ".version 7.4\n.target sm_80\n.entry k() {\n.reg .pred %p<4>;\n.reg .b32 %r<4>;\n";
        joins(&Module::parse(&format!("{head}{body}}}")).unwrap().kernels[0].code)
    }

    #[test]
    fn a_join_that_lies_before_its_branch_is_found() {
        // 0 bra 3; 1 join: mov; 2 ret; 3 branch; 4 mov; 5 bra 1.
        let body = "bra B; J: mov.b32 %r1, 0; ret; B: @%p1 bra J; mov.b32 %r1, 1; bra J;";
        assert_eq!(joins_of(body), [3, 2, 6, 1, 5, 1]);
    }

    #[test]
    fn loops_and_early_exits() {
        // The exit of lane-dependent lanes makes the end of the kernel the join.
        assert_eq!(joins_of("@%p1 ret; mov.b32 %r1, 0; ret;"), [3, 2, 3]);
        assert_eq!(joins_of("L: mov.b32 %r1, 0; @%p1 bra L; ret;"), [1, 2, 3]);
        assert_eq!(joins_of("L: bra L;"), [1]);
    }

    #[test]
    fn a_trap_is_no_way_to_the_end() {
        // 0 branch; 1 mov; 2 bra 4; 3 trap; 4 join: mov; 5 ret.
        let body = "@%p1 bra T; mov.b32 %r1, 0; bra J; T: @%p2 trap; J: mov.b32 %r2, 0; ret;";
        assert_eq!(joins_of(body), [4, 2, 4, 4, 5, 6]);
        // Without a guard, lanes that do not trap have one way.
        assert_eq!(joins_of(&body.replace("@%p2 ", "")), [1, 2, 4, 6, 5, 6]);
    }
}
