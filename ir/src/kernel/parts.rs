//! What statements and expressions are made of, for whoever walks through a kernel.

use super::warpgroup::{Left, Warpgroup};
use super::{BufferId, Expr, Stmt};

/// The parts of a thing, by shared or by exclusive reference: the same matches serve both.
macro_rules! parts {
    ($operands:ident, $exprs:ident, $blocks:ident, $list:ty, $iter:ident, $($mutable:tt)?) => {
        impl Expr {
            /// The expressions that it is computed from, in the order of its text; indices among them.
            pub fn $operands(&$($mutable)? self) -> Vec<&$($mutable)? Expr> {
                match self {
                    Expr::Int(_)
                    | Expr::Sym(_)
                    | Expr::Thread
                    | Expr::Var(_)
                    | Expr::Const { .. }
                    | Expr::Iota { .. } => Vec::new(),
                    Expr::Arith(_, a, b) | Expr::Compare(_, a, b) | Expr::Join(a, b) => vec![a, b],
                    Expr::Fma(a, b, c)
                    | Expr::Select(a, b, c)
                    | Expr::DotBf16(a, b, c)
                    | Expr::Mma(a, b, c) => vec![a, b, c],
                    Expr::Unary(_, a)
                    | Expr::Uniform(a)
                    | Expr::Splat { value: a, .. }
                    | Expr::Lanes { value: a, .. }
                    | Expr::Cast { value: a, .. }
                    | Expr::Index(a)
                    | Expr::Exp2(a)
                    | Expr::Shuffle { value: a, .. }
                    | Expr::Reduce(_, a) => vec![a],
                    Expr::Reg { index, .. } | Expr::Load { index, .. } | Expr::Matrix { index, .. } => {
                        index.$iter().collect()
                    }
                }
            }
        }

        impl Stmt {
            /// Its expressions, in the order of its text, without those of the statements inside.
            pub fn $exprs(&$($mutable)? self) -> Vec<&$($mutable)? Expr> {
                match self {
                    Stmt::Let { value, .. } => vec![value],
                    Stmt::Reg { init, .. } => init.$iter().collect(),
                    Stmt::Set { index, value, .. } | Stmt::Store { index, value, .. } => {
                        index.$iter().chain([value]).collect()
                    }
                    Stmt::Prefetch { index, .. } => index.$iter().collect(),
                    Stmt::For { lo, hi, .. } => vec![lo, hi],
                    Stmt::Parallel { count, .. } => vec![count],
                    Stmt::If { cond, .. } => vec![cond],
                    Stmt::Copy { at, index, count, .. } => {
                        at.$iter().chain(index.$iter()).chain([count]).collect()
                    }
                    Stmt::Warpgroup(stmt) => stmt.$exprs(),
                    Stmt::Unroll { .. } | Stmt::Barrier | Stmt::Sync | Stmt::Commit | Stmt::Wait(_) => {
                        Vec::new()
                    }
                }
            }

            /// The blocks inside.
            pub fn $blocks(&$($mutable)? self) -> Vec<&$($mutable)? $list> {
                match self {
                    Stmt::For { body, .. } | Stmt::Unroll { body, .. } | Stmt::Parallel { body, .. } => {
                        vec![body]
                    }
                    Stmt::If { then, otherwise, .. } => vec![then, otherwise],
                    Stmt::Let { .. }
                    | Stmt::Reg { .. }
                    | Stmt::Set { .. }
                    | Stmt::Store { .. }
                    | Stmt::Prefetch { .. }
                    | Stmt::Barrier
                    | Stmt::Sync
                    | Stmt::Copy { .. }
                    | Stmt::Commit
                    | Stmt::Wait(_)
                    | Stmt::Warpgroup(_) => Vec::new(),
                }
            }
        }

        impl Warpgroup {
            /// Its expressions, in the order of its text.
            pub fn $exprs(&$($mutable)? self) -> Vec<&$($mutable)? Expr> {
                match self {
                    Warpgroup::Meet { id, .. } | Warpgroup::Pass { id, .. } => vec![id],
                    Warpgroup::Expect { at, .. } | Warpgroup::Arrive(at) => vec![&$($mutable)? at.1],
                    Warpgroup::Await { at, parity } => vec![&$($mutable)? at.1, parity],
                    Warpgroup::Fetch { place, index, at, .. } => {
                        place.$iter().chain(index.$iter()).chain([&$($mutable)? at.1]).collect()
                    }
                    Warpgroup::Product { index, left, place, .. } => {
                        let left = match left {
                            Left::Shared(_, index) => index.$iter().collect(),
                            Left::Registers(value) => vec![value],
                        };
                        index.$iter().chain(left).chain(place.$iter()).collect()
                    }
                    Warpgroup::Retire { after, .. } => after.$iter().collect(),
                    Warpgroup::Registers(_)
                    | Warpgroup::AwaitGrids
                    | Warpgroup::FenceRegisters
                    | Warpgroup::FenceAsync
                    | Warpgroup::Close => Vec::new(),
                }
            }
        }
    };
}

impl Expr {
    /// The memory that it reads itself.
    pub fn buffer(&self) -> Option<BufferId> {
        match self {
            Expr::Load { buffer, .. } | Expr::Matrix { buffer, .. } => Some(*buffer),
            _ => None, // What else reads memory does so by its operands.
        }
    }
}

impl Stmt {
    /// The memory that it writes, reads or asks for itself; what a map stands for apart.
    pub fn buffers(&self) -> Vec<BufferId> {
        match self {
            Stmt::Store { buffer, .. } | Stmt::Prefetch { buffer, .. } => vec![*buffer],
            Stmt::Copy { to, from, .. } => vec![*to, *from],
            Stmt::Warpgroup(stmt) => stmt.buffers(),
            Stmt::Let { .. }
            | Stmt::Reg { .. }
            | Stmt::Set { .. }
            | Stmt::For { .. }
            | Stmt::Unroll { .. }
            | Stmt::Parallel { .. }
            | Stmt::If { .. }
            | Stmt::Barrier
            | Stmt::Sync
            | Stmt::Commit
            | Stmt::Wait(_) => Vec::new(),
        }
    }
}

impl Warpgroup {
    fn buffers(&self) -> Vec<BufferId> {
        match self {
            Warpgroup::Fetch { to, .. } => vec![*to],
            Warpgroup::Product { left: Left::Shared(left, _), right, .. } => vec![*left, *right],
            Warpgroup::Product { left: Left::Registers(_), right, .. } => vec![*right],
            Warpgroup::Registers(_)
            | Warpgroup::AwaitGrids
            | Warpgroup::Meet { .. }
            | Warpgroup::Pass { .. }
            | Warpgroup::Expect { .. }
            | Warpgroup::Arrive(_)
            | Warpgroup::Await { .. }
            | Warpgroup::FenceRegisters
            | Warpgroup::FenceAsync
            | Warpgroup::Close
            | Warpgroup::Retire { .. } => Vec::new(),
        }
    }
}

/// Shows every statement of a block and of the blocks inside, in the order of the text.
pub(super) fn each_stmt(stmts: &[Stmt], see: &mut dyn FnMut(&Stmt)) {
    for stmt in stmts {
        see(stmt);
        stmt.blocks().into_iter().for_each(|inside| each_stmt(inside, see));
    }
}

/// Shows every expression of a block and of the blocks inside, operands after what they are operands of.
pub(super) fn each_expr(stmts: &[Stmt], see: &mut dyn FnMut(&Expr)) {
    fn inside(expr: &Expr, see: &mut dyn FnMut(&Expr)) {
        see(expr);
        expr.operands().into_iter().for_each(|operand| inside(operand, see));
    }
    each_stmt(stmts, &mut |stmt| stmt.exprs().into_iter().for_each(|expr| inside(expr, see)));
}

parts!(operands, exprs, blocks, Vec<Stmt>, iter,);
parts!(operands_mut, exprs_mut, blocks_mut, Vec<Stmt>, iter_mut, mut);
