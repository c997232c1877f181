//! Vectors: joined, repeated, cast, and rounded where the machine does not.

use super::{Function, Pause, literal, llvm_elem, splat_int, suffix, vector};
use ir::dtype::DType;
use ir::kernel::{Arith, Expr, Type};

impl Function<'_> {
    /// The lanes of one value, then those of another.
    pub(super) fn join(&mut self, a: &Expr, b: &Expr) -> String {
        let (Type::Vector { dtype, lanes: first }, more) = (self.type_of(a), self.type_of(b).lanes()) else {
            panic!("verified: vectors")
        };
        let [a, b] = [a, b].map(|e| self.expr(e));
        let mut parts: Vec<String> = (0..first).map(|lane| self.pick(dtype, first, &a, lane, 1)).collect();
        parts.extend((0..more).map(|lane| self.pick(dtype, more, &b, lane, 1)));
        self.gather(llvm_elem(dtype), &parts)
    }

    /// A vector of scalars.
    pub(super) fn gather(&mut self, elem: &str, parts: &[String]) -> String {
        let ty = vector(elem, parts.len() as u16);
        let mut whole = "poison".to_string();
        for (lane, part) in parts.iter().enumerate() {
            whole = self.emit(format!("insertelement {ty} {whole}, {elem} {part}, i64 {lane}"));
        }
        whole
    }

    pub(super) fn vector_arith(&mut self, op: Arith, dtype: DType, lanes: u16, x: &str, y: &str) -> String {
        let ty = vector(llvm_elem(dtype), lanes);
        let (prefix, less) = if dtype.is_float() { ("f", "fcmp olt") } else { ("", "icmp slt") };
        let sign = match op {
            Arith::Add => "add",
            Arith::Sub => "sub",
            Arith::Mul => "mul",
            Arith::Div => "div",
            Arith::Rem => "rem",
            Arith::Min | Arith::Max => {
                // The second operand where either is NaN: what minps and maxps do.
                let (a, b) = if op == Arith::Max { (y, x) } else { (x, y) };
                let flags = self.emit(format!("{less} {ty} {a}, {b}"));
                return self.emit(format!("select {} {flags}, {ty} {x}, {ty} {y}", vector("i1", lanes)));
            }
        };
        self.emit(format!("{prefix}{sign} {ty} {x}, {y}"))
    }

    /// The lanes repeated.
    pub(super) fn repeat(&mut self, dtype: DType, lanes: u16, value: &str, times: u16) -> String {
        let elem = llvm_elem(dtype);
        let (mut value, mut has) = (value.to_string(), lanes);
        if lanes == 1 {
            value = self.emit(format!("insertelement <{times} x {elem}> poison, {elem} {value}, i64 0"));
            has = times;
        }
        let order: Vec<String> = (0..times * lanes).map(|i| format!("i32 {}", i % lanes)).collect();
        let ty = vector(elem, has);
        if has == 1 {
            return value;
        }
        self.emit(format!(
            "shufflevector {ty} {value}, {ty} poison, <{} x i32> <{}>",
            times * lanes,
            order.join(", ")
        ))
    }

    /// Lanes `start..start + lanes`, zero beyond the end.
    pub(super) fn pick(&mut self, dtype: DType, has: u16, value: &str, start: u16, lanes: u16) -> String {
        let elem = llvm_elem(dtype);
        if has == 1 && lanes == 1 {
            return value.to_string();
        }
        if has == 1 {
            return self
                .emit(format!("insertelement <{lanes} x {elem}> zeroinitializer, {elem} {value}, i64 0"));
        }
        let ty = vector(elem, has);
        if lanes == 1 {
            return self.emit(format!("extractelement {ty} {value}, i64 {start}"));
        }
        let order: Vec<String> = (start..start + lanes).map(|i| format!("i32 {}", i.min(has))).collect();
        self.emit(format!(
            "shufflevector {ty} {value}, {ty} zeroinitializer, <{lanes} x i32> <{}>",
            order.join(", ")
        ))
    }

    pub(super) fn cast(&mut self, value: &str, from: Type, to: DType) -> String {
        let (dtype, lanes) = match from {
            Type::Index | Type::Flag => {
                return match to {
                    DType::F32 => self.emit(format!("sitofp {} {value} to float", self.int)),
                    _ if self.int == "i32" => value.to_string(),
                    _ => self.emit(format!("trunc i64 {value} to i32")),
                };
            }
            Type::Vector { dtype, lanes } => (dtype, lanes),
        };
        let (source, target) = (vector(llvm_elem(dtype), lanes), vector(llvm_elem(to), lanes));
        let (ints, floats) = (vector("i32", lanes), vector("float", lanes));
        match (dtype, to) {
            (a, b) if a == b => value.to_string(),
            (DType::BF16, DType::F32) if self.features.pause == Pause::Grid && lanes.is_multiple_of(2) => {
                self.widen_pairs(value, lanes)
            }
            (DType::BF16, DType::F32) => {
                let wide = self.emit(format!("zext {source} {value} to {ints}"));
                let high = self.emit(format!("shl {ints} {wide}, {}", splat_int(16, lanes)));
                self.emit(format!("bitcast {ints} {high} to {floats}"))
            }
            (DType::F32, DType::BF16) if self.features.bf16 => {
                let halves = vector("bfloat", lanes);
                let rounded = self.emit(format!("fptrunc {floats} {value} to {halves}"));
                self.emit(format!("bitcast {halves} {rounded} to {target}"))
            }
            (DType::F32, DType::BF16) => self.round_bf16(lanes, value),
            (DType::F16, DType::F32) | (DType::F32, DType::F64) => {
                self.emit(format!("fpext {source} {value} to {target}"))
            }
            (DType::F32, DType::F16) | (DType::F64, DType::F32) => {
                self.emit(format!("fptrunc {source} {value} to {target}"))
            }
            (DType::F32, DType::I32) => self.emit(format!(
                "call {ints} @llvm.fptosi.sat.{}.{}({floats} {value})",
                suffix("i32", lanes),
                suffix("f32", lanes)
            )),
            (DType::I32 | DType::I8, DType::F32) => self.emit(format!("sitofp {source} {value} to {floats}")),
            (DType::U8 | DType::Bool, DType::F32) => {
                self.emit(format!("uitofp {source} {value} to {floats}"))
            }
            (DType::F32, DType::Bool) => {
                let zero = literal(0.0, Type::f32(lanes));
                self.emit(format!("fcmp une {floats} {value}, {zero}"))
            }
            (DType::Bool, DType::I32) => self.emit(format!("zext {source} {value} to {ints}")),
            (DType::I32, DType::Bool) => {
                self.emit(format!("icmp ne {ints} {value}, {}", splat_int(0, lanes)))
            }
            (a, b) => {
                let middle = self.cast(value, Type::Vector { dtype: a, lanes }, DType::F32);
                self.cast(&middle, Type::f32(lanes), b)
            }
        }
    }

    /// f32 to bf16 to nearest even, by integers: for targets without the instruction. NaN stays NaN.
    pub(super) fn round_bf16(&mut self, lanes: u16, value: &str) -> String {
        let (ints, floats) = (vector("i32", lanes), vector("float", lanes));
        let int = |x: i64| splat_int(x, lanes);
        let bits = self.emit(format!("bitcast {floats} {value} to {ints}"));
        let shifted = self.emit(format!("lshr {ints} {bits}, {}", int(16)));
        let odd = self.emit(format!("and {ints} {shifted}, {}", int(1)));
        let bias = self.emit(format!("add {ints} {odd}, {}", int(0x7fff)));
        let sum = self.emit(format!("add {ints} {bits}, {bias}"));
        let rounded = self.emit(format!("lshr {ints} {sum}, {}", int(16)));
        let quiet = self.emit(format!("or {ints} {shifted}, {}", int(0x40)));
        let nan = self.emit(format!("fcmp uno {floats} {value}, {value}"));
        let flags = vector("i1", lanes);
        let chosen = self.emit(format!("select {flags} {nan}, {ints} {quiet}, {ints} {rounded}"));
        self.emit(format!("trunc {ints} {chosen} to {}", vector("i16", lanes)))
    }

    pub(super) fn dot_bf16(&mut self, lanes: u16, acc: &str, a: &str, b: &str) -> String {
        let pairs = vector("i16", 2 * lanes);
        if self.features.bf16 && lanes == 16 {
            let halves = vector("bfloat", 2 * lanes);
            let a = self.emit(format!("bitcast {pairs} {a} to {halves}"));
            let b = self.emit(format!("bitcast {pairs} {b} to {halves}"));
            return self.emit(format!(
                "call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> {acc}, {halves} {a}, {halves} {b})"
            ));
        }
        let (ints, floats) = (vector("i32", lanes), vector("float", lanes));
        let mut sum = acc.to_string();
        let words = [a, b].map(|x| self.emit(format!("bitcast {pairs} {x} to {ints}")));
        for high in [true, false] {
            let [x, y] = words.each_ref().map(|word| {
                let bits = match high {
                    true => self.emit(format!("and {ints} {word}, {}", splat_int(-65536, lanes))),
                    false => self.emit(format!("shl {ints} {word}, {}", splat_int(16, lanes))),
                };
                self.emit(format!("bitcast {ints} {bits} to {floats}"))
            });
            let name = suffix("f32", lanes);
            sum = self
                .emit(format!("call {floats} @llvm.fma.{name}({floats} {x}, {floats} {y}, {floats} {sum})"));
        }
        sum
    }
}
