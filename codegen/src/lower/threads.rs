//! What only workers of many threads have, and what only their machine wants: LLVM's NVPTX intrinsics, alignment, pairs of bf16.

use super::{Function, gcd, llvm_elem, vector};
use crate::lower::Pause;
use ir::dtype::DType;
use ir::kernel::{Arith, Buffer, BufferId, Expr, Space, Stmt, Type, VarId};

/// What accesses of kernels of so many buffers say that they belong to: LLVM's scopes, one a buffer, that do not alias
/// (LLVM Language Reference, "`noalias` and `alias.scope` Metadata").
pub(crate) fn scopes(buffers: usize) -> String {
    let mut text = "\n!0 = distinct !{!0}\n".to_string();
    for number in 0..buffers {
        let [scope, own, others] = [1, 2, 3].map(|n| 3 * number + n);
        let list: Vec<_> = (0..buffers).filter(|&b| b != number).map(|b| format!("!{}", 3 * b + 1)).collect();
        let list = list.join(", ");
        text += &format!(
            "!{scope} = distinct !{{!{scope}, !0}}\n!{own} = !{{!{scope}}}\n!{others} = !{{{list}}}\n"
        );
    }
    text
}

impl Function<'_> {
    /// Says of an access to a param that it meets no other, where the kernel waits for the grids before it. To say so of the param,
    /// as elsewhere, would also say that the wait changes nothing of it.
    pub(super) fn scope(&self, buffer: BufferId) -> String {
        match self.kernel[buffer].space {
            Space::Global(_) if self.awaits_grids => {
                format!(", !alias.scope !{}, !noalias !{}", 3 * buffer.0 + 2, 3 * buffer.0 + 3)
            }
            Space::Global(_) | Space::Local | Space::Shared | Space::Swizzled => String::new(),
        }
    }

    /// A `parallel` loop: neighbouring CTAs take neighbouring turns. The next loop's follow behind them, so that no CTA takes two
    /// turns before each has one.
    pub(super) fn turns(&mut self, var: VarId, count: &str, body: &[Stmt]) {
        let first = self.turn.clone();
        let beyond = self.looped(var, &first, count, "%workers", body);
        self.turn = self.emit(format!("sub nsw i32 {beyond}, {count}"));
    }

    /// Begins to copy 16 bytes to shared memory.
    pub(super) fn copy(&mut self, to: (BufferId, &[Expr]), from: (BufferId, &[Expr]), count: &Expr) {
        let bytes = self.kernel[from.0].dtype.bytes(1);
        let count = self.expr(count);
        let size = self.emit(format!("mul i32 {count}, {bytes}"));
        let to = self.address(to.0, to.1);
        // Where nothing is read, the index may be anywhere.
        let from = self.address_of(from.0, from.1, "getelementptr");
        let from = self.emit(format!("addrspacecast ptr {from} to ptr addrspace(1)"));
        self.line(&format!(
            "call void @llvm.nvvm.cp.async.cg.shared.global.16.s(ptr addrspace(3) {to}, ptr addrspace(1) {from}, i32 {size})"
        ));
    }

    /// Two to the power of each lane.
    pub(super) fn exp2(&mut self, value: &Expr) -> String {
        let lanes = self.type_of(value).lanes();
        let value = self.expr(value);
        let one = |x: &str| format!("call float @llvm.nvvm.ex2.approx.ftz.f32(float {x})");
        self.each_lane(DType::F32, lanes, &value, &one)
    }

    /// The value of another thread of the warp.
    pub(super) fn shuffle(&mut self, value: &Expr, mask: u16) -> String {
        let Type::Vector { dtype, lanes } = self.type_of(value) else { panic!("verified: a vector") };
        let value = self.expr(value);
        let (name, elem) = if dtype == DType::I32 { ("i32", "i32") } else { ("f32", "float") };
        self.each_lane(dtype, lanes, &value, &|x| {
            format!("call {elem} @llvm.nvvm.shfl.sync.bfly.{name}(i32 -1, {elem} {x}, i32 {mask}, i32 31)")
        })
    }

    /// Bytes that the address of an element is surely a multiple of. On a CPU accesses need not be aligned.
    pub(super) fn align(&self, buffer: BufferId, index: &[Expr], lanes: u16) -> u64 {
        let Buffer { dtype, strides, .. } = &self.kernel[buffer];
        let bytes = dtype.bytes(1) as u64;
        if self.features.pause != Pause::Grid {
            return bytes;
        }
        let along =
            index.iter().zip(strides).map(|(i, &stride)| self.multiple(i).saturating_mul(stride as u64));
        let elements = along.fold(0, gcd);
        // Buffers begin at cache lines; no access is longer than 16 bytes. LLVM would fill up an odd vector that is aligned to
        // more than itself, beyond the end of a row.
        let whole = bytes << lanes.trailing_zeros();
        let known =
            if elements == 0 { 16 } else { (1u64 << elements.trailing_zeros().min(4)).saturating_mul(bytes) };
        known.min(whole).min(16)
    }

    /// A number that an index is surely a multiple of; 0 if it is 0.
    pub(super) fn multiple(&self, expr: &Expr) -> u64 {
        match expr {
            Expr::Int(x) => x.unsigned_abs(),
            Expr::Sym(sym) => match &self.kernel.symbols.0[sym.0 as usize] {
                fixed if fixed.min == fixed.max => fixed.min.unsigned_abs(),
                _ => 1,
            },
            Expr::Var(var) => match self.vars.get(var).map(|value| value.parse::<i64>()) {
                Some(Ok(constant)) => constant.unsigned_abs(),
                _ => self.multiples.get(var).copied().unwrap_or(1),
            },
            Expr::Arith(op, a, b) => {
                let (a, b) = (self.multiple(a), self.multiple(b));
                match op {
                    Arith::Add | Arith::Sub | Arith::Min | Arith::Max | Arith::Rem => gcd(a, b),
                    Arith::Mul => a.saturating_mul(b),
                    Arith::Div if b > 0 && a % b == 0 => a / b,
                    Arith::Div => 1,
                }
            }
            Expr::Uniform(a) => self.multiple(a),
            Expr::Select(_, a, b) => gcd(self.multiple(a), self.multiple(b)),
            _ => 1,
        }
    }

    /// An operation on scalars, for each lane.
    fn each_lane(&mut self, dtype: DType, lanes: u16, value: &str, op: &dyn Fn(&str) -> String) -> String {
        let done: Vec<String> = (0..lanes)
            .map(|lane| {
                let x = self.pick(dtype, lanes, value, lane, 1);
                self.emit(op(&x))
            })
            .collect();
        if lanes == 1 { done[0].clone() } else { self.gather(llvm_elem(dtype), &done) }
    }

    pub(super) fn matrix(&mut self, buffer: BufferId, index: &[Expr], matrices: u16, trans: bool) -> String {
        let dtype = self.kernel[buffer].dtype;
        let at = self.address(buffer, index);
        let trans = if trans { ".trans" } else { "" };
        let name = format!("llvm.nvvm.ldmatrix.sync.aligned.m8n8.x{matrices}{trans}.b16.p3");
        let words = match matrices {
            1 => "i32".to_string(),
            n => format!("{{ {} }}", vec!["i32"; n.into()].join(", ")),
        };
        let loaded = self.emit(format!("call {words} @{name}(ptr addrspace(3) {at})"));
        let parts: Vec<String> = match matrices {
            1 => vec![loaded],
            n => (0..n).map(|i| self.emit(format!("extractvalue {words} {loaded}, {i}"))).collect(),
        };
        let whole = if matrices == 1 { parts[0].clone() } else { self.gather("i32", &parts) };
        let to = vector(llvm_elem(dtype), 2 * matrices);
        self.emit(format!("bitcast {} {whole} to {to}", vector("i32", matrices)))
    }

    pub(super) fn mma(&mut self, acc: &Expr, a: &Expr, b: &Expr) -> String {
        let Type::Vector { dtype, .. } = self.type_of(a) else { panic!("verified: a vector") };
        let [acc, a, b] = [acc, a, b].map(|e| self.expr(e));
        let (name, pair) = match dtype {
            DType::F16 => ("f32.f32", "<2 x half>"),
            _ => ("bf16", "i32"),
        };
        let mut args = Vec::new();
        for (value, lanes) in [(a, 8), (b, 4)] {
            for at in 0..lanes / 2 {
                let part = self.pick(dtype, lanes, &value, 2 * at, 2);
                let part = match dtype {
                    DType::F16 => part,
                    _ => self.emit(format!("bitcast <2 x i16> {part} to i32")),
                };
                args.push(format!("{pair} {part}"));
            }
        }
        for lane in 0..4 {
            let part = self.pick(DType::F32, 4, &acc, lane, 1);
            args.push(format!("float {part}"));
        }
        let sums = "{ float, float, float, float }";
        let made = self.emit(format!(
            "call {sums} @llvm.nvvm.mma.m16n8k16.row.col.{name}({}) convergent",
            args.join(", ")
        ));
        let parts: Vec<String> =
            (0..4).map(|i| self.emit(format!("extractvalue {sums} {made}, {i}"))).collect();
        self.gather("float", &parts)
    }

    /// bf16 to f32, two lanes at a time: one instruction each, where registers have 32 bits.
    pub(super) fn widen_pairs(&mut self, value: &str, lanes: u16) -> String {
        let words = vector("i32", lanes / 2);
        let all = self.emit(format!("bitcast {} {value} to {words}", vector("i16", lanes)));
        let mut parts = Vec::new();
        for pair in 0..lanes / 2 {
            let word = self.pick(DType::I32, lanes / 2, &all, pair, 1);
            let halves = [format!("shl i32 {word}, 16"), format!("and i32 {word}, -65536")];
            for half in halves {
                let bits = self.emit(half);
                parts.push(self.emit(format!("bitcast i32 {bits} to float")));
            }
        }
        self.gather("float", &parts)
    }
}
