//! Text of kernels: one statement a line. `parse(print(k)) == [k]` for every kernel that the verifier accepts.
//!
//! Arithmetic is infix; parentheses stand only where another tree would be read without them. Strides are printed
//! where they are not row-major, `step` where it is not 1.

use super::warpgroup::{Left, MapId, MbarrierAt, Mbarriers, TensorMap, Warpgroup};
use super::{
    Arith, Buffer, BufferId, Expr, Kernel, RegFile, RegId, Space, Stmt, Type, VarId, row_major_checked,
};
use std::fmt::{self, Display, Formatter, Write};

impl Display for Kernel {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "kernel @{} : {}, schedule {}", self.name, self.family.name(), quoted(&self.schedule))?;
        if self.threads != 1 {
            write!(f, ", {} threads", self.threads)?;
        }
        if !self.symbols.0.is_empty() {
            let symbols = self.symbols.0.iter().map(|s| format!("{} in {}..{}", s.name, s.min, s.max));
            write!(f, " ({})", symbols.collect::<Vec<_>>().join(", "))?;
        }
        f.write_str(" {\n")?;
        for buffer in &self.buffers {
            writeln!(f, "  {}", declaration(self, buffer))?;
        }
        for row in &self.mbarriers {
            writeln!(f, "  {}", mbarriers(row))?;
        }
        for tensor in &self.maps {
            writeln!(f, "  {}", map(self, tensor))?;
        }
        let mut body = String::new();
        block(self, &self.body, 1, &mut body);
        f.write_str(&body)?;
        f.write_str("}\n")
    }
}

/// The line that declares a buffer: `param %x : read bf16[T, 64]`.
pub fn declaration(kernel: &Kernel, buffer: &Buffer) -> String {
    let kind = match buffer.space {
        Space::Global(_) => "param",
        Space::Local => "local",
        Space::Shared => "shared",
        Space::Swizzled => "swizzled",
    };
    let access = match buffer.space {
        Space::Global(access) => format!("{} ", access.name()),
        Space::Local | Space::Shared | Space::Swizzled => String::new(),
    };
    let shape: Vec<String> = buffer.shape.iter().map(|&dim| kernel.symbols.show(dim)).collect();
    let mut text = format!("{kind} %{} : {access}{}[{}]", buffer.name, buffer.dtype, shape.join(", "));
    if row_major_checked(&buffer.shape).as_ref() != Some(&buffer.strides) {
        let strides: Vec<String> = buffer.strides.iter().map(i64::to_string).collect();
        text += &format!(" strides [{}]", strides.join(", "));
    }
    text
}

/// The line that declares mbarriers: `mbarrier %full[4] of 1`.
pub fn mbarriers(row: &Mbarriers) -> String {
    format!("mbarrier %{}[{}] of {}", row.name, row.count, row.arrivals)
}

/// The line that declares a tensor map: `map %tiles : %x[128, 64]`.
pub fn map(kernel: &Kernel, map: &TensorMap) -> String {
    let TensorMap { name, buffer, extents } = map;
    format!(
        "map %{name} : {}{extents:?}",
        named(kernel.buffers.get(buffer.0 as usize).map(|b| &b.name), buffer.0)
    )
}

/// The first line of a statement, without the brace that opens its body.
pub fn head(kernel: &Kernel, stmt: &Stmt) -> String {
    let of = |value: &Expr| expr(kernel, value);
    match stmt {
        Stmt::Let { var, value } => format!("let {} = {}", var_name(kernel, *var), of(value)),
        Stmt::Reg { reg, init } => {
            let init = init.as_ref().map_or(String::new(), |init| format!(" = {}", of(init)));
            match kernel.regs.get(reg.0 as usize) {
                Some(RegFile { name, ty, dims }) if dims.is_empty() => format!("reg %{name} : {ty}{init}"),
                Some(RegFile { name, ty, dims }) => format!("reg %{name} : {ty}{dims:?}{init}"),
                None => format!("reg {}{init}", reg_name(kernel, *reg)),
            }
        }
        Stmt::Set { reg, index, value } => format!("set {} = {}", register(kernel, *reg, index), of(value)),
        Stmt::Store { buffer, index, value } => {
            format!("store {} = {}", element(kernel, *buffer, index), of(value))
        }
        Stmt::Prefetch { buffer, index } => format!("prefetch {}", element(kernel, *buffer, index)),
        Stmt::For { var, lo, hi, step, .. } => {
            let step = if *step == 1 { String::new() } else { format!(" step {step}") };
            format!("for {} in {}..{}{step}", var_name(kernel, *var), of(lo), of(hi))
        }
        Stmt::Unroll { var, count, .. } => format!("unroll {} in 0..{count}", var_name(kernel, *var)),
        Stmt::Parallel { var, count, .. } => {
            format!("parallel {} in 0..{}", var_name(kernel, *var), of(count))
        }
        Stmt::If { cond, .. } => format!("if {}", of(cond)),
        Stmt::Barrier => "barrier".to_string(),
        Stmt::Sync => "sync".to_string(),
        Stmt::Copy { to, at, from, index, lanes, count } => {
            let dtype = kernel.buffers.get(from.0 as usize).map_or("?", |b| b.dtype.name());
            let (to, from) = (element(kernel, *to, at), element(kernel, *from, index));
            format!("copy {to} = {from} : {dtype}x{lanes}, {}", of(count))
        }
        Stmt::Commit => "commit".to_string(),
        Stmt::Wait(newest) => format!("wait {newest}"),
        Stmt::Warpgroup(stmt) => warpgroup(kernel, stmt),
    }
}

fn warpgroup(kernel: &Kernel, stmt: &Warpgroup) -> String {
    let of = |value: &Expr| expr(kernel, value);
    let slot = |at: &MbarrierAt| {
        let name = named(kernel.mbarriers.get(at.0.0 as usize).map(|m| &m.name), at.0.0);
        format!("{name}[{}]", of(&at.1))
    };
    match stmt {
        Warpgroup::Registers(count) => format!("registers {count}"),
        Warpgroup::Meet { id, threads } => format!("meet {}, {threads}", of(id)),
        Warpgroup::Pass { id, threads } => format!("pass {}, {threads}", of(id)),
        Warpgroup::Expect { at, bytes } => format!("expect {}, {bytes}", slot(at)),
        Warpgroup::Arrive(at) => format!("arrive {}", slot(at)),
        Warpgroup::Await { at, parity } => format!("await {}, {}", slot(at), of(parity)),
        Warpgroup::Fetch { to, place, map: MapId(id), index, at } => {
            let map = named(kernel.maps.get(*id as usize).map(|m| &m.name), *id);
            let (to, index) = (element(kernel, *to, place), list(kernel, index));
            format!("fetch {to} = {map}[{index}], {}", slot(at))
        }
        Warpgroup::AwaitGrids => "await grids".to_string(),
        Warpgroup::FenceRegisters => "fence registers".to_string(),
        Warpgroup::FenceAsync => "fence async".to_string(),
        Warpgroup::Product { sums, index, add, left, right, place, trans } => {
            let word = if *trans { "product.t" } else { "product" };
            let sign = if *add { "+=" } else { "=" };
            let left = match left {
                Left::Shared(buffer, index) => element(kernel, *buffer, index),
                Left::Registers(value) => of(value),
            };
            let (sums, right) = (register(kernel, *sums, index), element(kernel, *right, place));
            format!("{word} {sums} {sign} {left}, {right}")
        }
        Warpgroup::Close => "close".to_string(),
        Warpgroup::Retire { newest, sums, after } => {
            let sums: String = sums.iter().map(|&reg| format!(", {}", reg_name(kernel, reg))).collect();
            let after = match after.is_empty() {
                true => String::new(),
                false => format!(" after [{}]", list(kernel, after)),
            };
            format!("retire {newest}{sums}{after}")
        }
    }
}

/// An expression, on one line.
pub fn expr(kernel: &Kernel, value: &Expr) -> String {
    let of = |part: &Expr| expr(kernel, part);
    let call = |name: &str, parts: &[&Expr]| {
        format!("{name}({})", parts.iter().map(|p| of(p)).collect::<Vec<_>>().join(", "))
    };
    match value {
        Expr::Int(x) => x.to_string(),
        Expr::Sym(sym) => match kernel.symbols.0.get(sym.0 as usize) {
            Some(symbol) => symbol.name.clone(),
            None => format!("?{}", sym.0),
        },
        Expr::Thread => "thread".to_string(),
        Expr::Uniform(a) => call("uniform", &[a]),
        Expr::Var(var) => var_name(kernel, *var),
        Expr::Const { value, ty } => format!("{ty}({})", number(*value, *ty)),
        Expr::Reg { reg, index } => register(kernel, *reg, index),
        Expr::Load { buffer, index, .. } => {
            // Only a kernel that the verifier refuses has no such buffer.
            let known = (buffer.0 as usize) < kernel.buffers.len();
            let ty = if known { kernel.type_of(value).to_string() } else { "?".to_string() };
            format!("load {} : {ty}", element(kernel, *buffer, index))
        }
        Expr::Arith(op @ (Arith::Min | Arith::Max), a, b) => call(op.name(), &[a, b]),
        Expr::Arith(op, a, b) => {
            let own = precedence(value);
            let side = |part: &Expr, least: u8| {
                if precedence(part) < least { format!("({})", of(part)) } else { of(part) }
            };
            format!("{} {} {}", side(a, own), op.name(), side(b, own + 1))
        }
        Expr::Fma(a, b, c) => call("fma", &[a, b, c]),
        Expr::Unary(op, a) => call(op.facts().name, &[a]),
        Expr::Compare(op, a, b) => call(op.name(), &[a, b]),
        Expr::Select(c, a, b) => call("select", &[c, a, b]),
        Expr::Splat { value, times } => format!("splat({}, {times})", of(value)),
        Expr::Lanes { value, start, lanes } => format!("lanes({}, {start}, {lanes})", of(value)),
        Expr::Join(a, b) => call("join", &[a, b]),
        Expr::Iota { lanes } => format!("iota({lanes})"),
        Expr::Cast { value, dtype } => format!("cast({}, {dtype})", of(value)),
        Expr::Index(a) => call("index", &[a]),
        Expr::Reduce(kind, a) => call(&format!("reduce.{}", kind.name()), &[a]),
        Expr::DotBf16(acc, a, b) => call("dot.bf16", &[acc, a, b]),
        Expr::Exp2(a) => call("exp2", &[a]),
        Expr::Shuffle { value, mask } => format!("shuffle({}, {mask})", of(value)),
        Expr::Matrix { buffer, index, trans, .. } => {
            let known = (buffer.0 as usize) < kernel.buffers.len();
            let ty = if known { kernel.type_of(value).to_string() } else { "?".to_string() };
            let word = if *trans { "matrix.t" } else { "matrix" };
            format!("{word} {} : {ty}", element(kernel, *buffer, index))
        }
        Expr::Mma(acc, a, b) => call("mma", &[acc, a, b]),
    }
}

fn block(kernel: &Kernel, stmts: &[Stmt], depth: usize, out: &mut String) {
    let indent = "  ".repeat(depth);
    for stmt in stmts {
        *out += &indent;
        *out += &head(kernel, stmt);
        let mut blocks = stmt.blocks().into_iter();
        if let Some(body) = blocks.next() {
            *out += " {\n";
            block(kernel, body, depth + 1, out);
            for otherwise in blocks.filter(|otherwise| !otherwise.is_empty()) {
                let _ = writeln!(out, "{indent}}} else {{");
                block(kernel, otherwise, depth + 1, out);
            }
            let _ = write!(out, "{indent}}}");
        }
        out.push('\n');
    }
}

/// 1 for sums, 2 for products, 3 for what needs no parentheses anywhere.
pub(super) fn precedence(value: &Expr) -> u8 {
    match value {
        Expr::Arith(Arith::Add | Arith::Sub, _, _) => 1,
        Expr::Arith(Arith::Mul | Arith::Div | Arith::Rem, _, _) => 2,
        _ => 3,
    }
}

/// Digits that read back as the same f64: as an integer where the dtype is one.
fn number(value: f64, ty: Type) -> String {
    let whole = value as i64;
    let integer = matches!(ty, Type::Vector { dtype, .. } if !dtype.is_float());
    let exact =
        whole as f64 == value && whole.unsigned_abs() < 1 << 53 && (value != 0.0 || value.is_sign_positive());
    match (integer && exact, value.is_nan()) {
        (true, _) => whole.to_string(),
        (false, true) => "nan".to_string(),
        (false, false) => format!("{value:?}"),
    }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

/// `%name`, or `%?3` for an id that the kernel does not have: errors about such a kernel are printed too.
fn named(name: Option<&String>, id: u32) -> String {
    name.map_or_else(|| format!("%?{id}"), |name| format!("%{name}"))
}

fn var_name(kernel: &Kernel, var: VarId) -> String {
    named(kernel.vars.get(var.0 as usize).map(|v| &v.name), var.0)
}

fn reg_name(kernel: &Kernel, reg: RegId) -> String {
    named(kernel.regs.get(reg.0 as usize).map(|r| &r.name), reg.0)
}

fn register(kernel: &Kernel, reg: RegId, index: &[Expr]) -> String {
    let brackets = if index.is_empty() { String::new() } else { format!("[{}]", list(kernel, index)) };
    reg_name(kernel, reg) + &brackets
}

fn element(kernel: &Kernel, buffer: BufferId, index: &[Expr]) -> String {
    let name = named(kernel.buffers.get(buffer.0 as usize).map(|b| &b.name), buffer.0);
    format!("{name}[{}]", list(kernel, index))
}

fn list(kernel: &Kernel, index: &[Expr]) -> String {
    index.iter().map(|i| expr(kernel, i)).collect::<Vec<_>>().join(", ")
}
