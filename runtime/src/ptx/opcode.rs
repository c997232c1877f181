//! An instruction's name and operands as an [`Op`].
//!
//! A name is cut at its dots. What stands first chooses a function below, which takes the modifiers that it knows; one that
//! is left over is refused by name.

use super::PtxError;
use super::op::*;
use super::parser::{Arg, Parser, type_named};
use super::sm90;

/// Modifiers of an instruction, of which some have been taken.
pub(super) struct Mods<'t> {
    line: u32,
    pub opcode: &'t str,
    pub left: Vec<&'t str>,
}

impl<'t> Mods<'t> {
    /// Takes `name` if it is there.
    pub fn has(&mut self, name: &str) -> bool {
        let at = self.left.iter().position(|&part| part == name);
        at.map(|at| self.left.remove(at)).is_some()
    }

    /// Takes the first modifier for which `pick` has a meaning.
    pub fn find<T>(&mut self, pick: impl Fn(&str) -> Option<T>) -> Option<T> {
        let at = self.left.iter().position(|part| pick(part).is_some())?;
        pick(self.left.remove(at))
    }

    /// Takes the first type.
    pub fn ty(&mut self) -> Result<Type, PtxError> {
        self.find(type_named).ok_or_else(|| self.unknown())
    }

    pub fn unknown(&self) -> PtxError {
        let modifier = self.left.first().map(|part| part.to_string());
        PtxError::UnknownInstruction { line: self.line, opcode: self.opcode.to_string(), modifier }
    }

    /// Nothing may be left.
    fn end(&self) -> Result<(), PtxError> {
        if self.left.is_empty() { Ok(()) } else { Err(self.unknown()) }
    }
}

/// The instruction `opcode` with `args`.
pub fn read<'t>(p: &mut Parser<'t>, line: u32, opcode: &'t str, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    let mut parts = opcode.split('.');
    let stem = parts.next().unwrap_or_default();
    let mut mods = Mods { line, opcode, left: parts.collect() };
    let m = &mut mods;
    let op = match stem {
        "mov" => mov(p, m, args),
        "add" | "sub" | "div" | "rem" | "min" | "max" | "and" | "or" | "xor" | "shl" | "shr" => {
            binary(p, m, stem, args)
        }
        "mul" | "mul24" => mul(p, m, args),
        "mad" => mad(p, m, args),
        "fma" => fma(p, m, args),
        "neg" | "abs" | "not" | "cnot" | "popc" | "clz" | "brev" => unary(p, m, stem, args),
        "ex2" | "lg2" | "rcp" | "rsqrt" | "sqrt" | "sin" | "cos" | "tanh" => unary(p, m, stem, args),
        "bfe" | "prmt" | "shf" | "lop3" | "dp4a" => bits(p, m, stem, args),
        "setp" => setp(p, m, args),
        "selp" => selp(p, m, args),
        "cvt" => cvt(p, m, args),
        "cvta" => cvta(p, m, args),
        "ld" => load(p, m, args),
        "st" => store(p, m, args),
        "atom" | "red" => atomic(p, m, stem == "atom", args),
        "bra" => branch(p, m, args),
        "brx" => branch_indexed(p, m, args),
        "ret" | "exit" => count(p, args, 0).map(|()| Op::Exit),
        "trap" => count(p, args, 0).map(|()| Op::Trap),
        "nanosleep" => {
            need(m, "u32")?;
            count(p, args, 1)?;
            p.source(&args[0], Type::U32).map(|_| Op::Hint)
        }
        "prefetch" if m.has("tensormap") => {
            m.find(|part| matches!(part, "param" | "const").then_some(()));
            count(p, args, 1)?;
            p.address(&args[0]).map(|_| Op::Hint)
        }
        "prefetch" => {
            m.left.retain(|part| !matches!(*part, "global" | "L1" | "L2"));
            count(p, args, 1)?;
            p.address(&args[0]).map(|_| Op::Hint)
        }
        "fence" | "membar" => fence(p, m, args),
        "bar" | "barrier" => barrier(p, m, args),
        "shfl" => shuffle(p, m, args),
        "vote" => vote(p, m, args),
        "match" => match_sync(p, m, args),
        "redux" => redux(p, m, args),
        "activemask" => {
            need(m, "b32")?;
            count(p, args, 1)?;
            Ok(Op::ActiveMask { d: p.reg(&args[0], 32)? })
        }
        "mma" => mma(p, m, args),
        "ldmatrix" => matrix_rows(p, m, args.get(1)).and_then(|(trans, n, address)| {
            count(p, args, 2)?;
            Ok(Op::LoadMatrix { trans, d: p.regs(&args[0], 32, n)?, address })
        }),
        "stmatrix" => matrix_rows(p, m, args.first()).and_then(|(trans, n, address)| {
            count(p, args, 2)?;
            Ok(Op::StoreMatrix { trans, address, a: p.sources(&args[1], Type::B32, n)? })
        }),
        "cp" if m.left.contains(&"bulk") || m.left.contains(&"mbarrier") => sm90::copy(p, m, args),
        "cp" => copy(p, m, args),
        "mbarrier" => sm90::mbarrier(p, m, args),
        "wgmma" => sm90::wgmma(p, m, args),
        "setmaxnreg" => sm90::set_max_registers(p, m, args),
        "elect" => sm90::elect(p, m, args),
        "mapa" | "getctarank" => sm90::rank(p, m, args),
        "griddepcontrol" => sm90::grid_dependency(p, m, args),
        _ => {
            let opcode = opcode.to_string();
            return Err(PtxError::UnknownInstruction { line, opcode, modifier: None });
        }
    }?;
    mods.end()?;
    Ok(op)
}

/// Takes a type that the instruction has.
fn typed(m: &mut Mods<'_>, fits: impl Fn(Type) -> bool) -> Result<Type, PtxError> {
    let ty = m.ty()?;
    if fits(ty) {
        return Ok(ty);
    }
    let modifier = Type::ALL.iter().find(|(_, known)| *known == ty).map(|(name, _)| name.to_string());
    Err(PtxError::UnknownInstruction { line: m.line, opcode: m.opcode.to_string(), modifier })
}

fn integer(ty: Type) -> bool {
    matches!(ty, Type::U16 | Type::U32 | Type::U64 | Type::S16 | Type::S32 | Type::S64)
}

fn bare(ty: Type) -> bool {
    matches!(ty, Type::B16 | Type::B32 | Type::B64)
}

/// Takes a modifier that must be there.
pub(super) fn need(m: &mut Mods<'_>, name: &str) -> Result<(), PtxError> {
    if m.has(name) { Ok(()) } else { Err(m.unknown()) }
}

/// There must be so many operands.
pub(super) fn count(p: &Parser<'_>, args: &[Arg<'_>], count: usize) -> Result<(), PtxError> {
    between(p, args, count, count)
}

pub(super) fn between(p: &Parser<'_>, args: &[Arg<'_>], least: usize, most: usize) -> Result<(), PtxError> {
    if least <= args.len() && args.len() <= most {
        return Ok(());
    }
    let expected =
        if least == most { format!("{least} operands") } else { format!("{least} to {most} operands") };
    Err(PtxError::Syntax { line: p.statement_line(), found: format!("{} operands", args.len()), expected })
}

fn mode(m: &mut Mods<'_>) -> FloatMode {
    FloatMode {
        ftz: m.has("ftz"),
        sat: m.has("sat"),
        nan: m.has("NaN"),
        approx: m.has("approx") | m.has("full"),
        relu: m.has("relu"),
    }
}

/// The rounding of arithmetic: to nearest is all that there is.
fn nearest(m: &mut Mods<'_>) {
    m.has("rn");
}

fn mov<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    count(p, args, 2)?;
    if m.has("pred") {
        let (a, negated) = p.pred_source(&args[1])?;
        let d = p.pred(&args[0])?;
        return Ok(if negated { Op::NotPred { d, a } } else { Op::MovPred { d, a } });
    }
    let ty = m.ty()?;
    if let Arg::Vector(parts) = &args[1] {
        let part = part_type(p, ty, parts.len(), &args[1])?;
        return Ok(Op::Pack {
            d: p.reg(&args[0], ty.bits())?,
            parts: p.sources(&args[1], part, parts.len())?,
        });
    }
    if let Arg::Vector(parts) = &args[0] {
        let part = part_type(p, ty, parts.len(), &args[0])?;
        let parts = parts.iter().map(|arg| p.reg_or_sink(arg, part.bits())).collect::<Result<_, _>>()?;
        return Ok(Op::Unpack { parts, a: p.source(&args[1], ty)? });
    }
    Ok(Op::Mov { d: p.reg(&args[0], ty.bits())?, a: p.source(&args[1], ty)? })
}

fn part_type(p: &Parser<'_>, ty: Type, parts: usize, arg: &Arg<'_>) -> Result<Type, PtxError> {
    match (ty.bits(), parts) {
        (64, 2) => Ok(Type::B32),
        (64, 4) | (32, 2) => Ok(Type::B16),
        _ => p.wrong_operand(arg, "2 or 4 registers that fill the type"),
    }
}

fn binary<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, stem: &str, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    if m.has("pred") {
        count(p, args, 3)?;
        let op = match stem {
            "and" => Logic::And,
            "or" => Logic::Or,
            "xor" => Logic::Xor,
            _ => return Err(m.unknown()),
        };
        return Ok(Op::LogicPred { op, d: p.pred(&args[0])?, a: pred(p, &args[1])?, b: pred(p, &args[2])? });
    }
    let mode = mode(m);
    nearest(m);
    let ty = typed(m, |ty| match stem {
        "and" | "or" | "xor" | "shl" => bare(ty),
        "shr" => bare(ty) || integer(ty),
        "rem" => integer(ty),
        "div" => integer(ty) || matches!(ty, Type::F32 | Type::F64),
        _ => integer(ty) || ty.float(),
    })?;
    let op = match stem {
        "add" => BinaryOp::Add,
        "sub" => BinaryOp::Sub,
        "div" => BinaryOp::Div,
        "rem" => BinaryOp::Rem,
        "min" => BinaryOp::Min,
        "max" => BinaryOp::Max,
        "and" => BinaryOp::And,
        "or" => BinaryOp::Or,
        "xor" => BinaryOp::Xor,
        "shl" => BinaryOp::Shl,
        _ => BinaryOp::Shr,
    };
    count(p, args, 3)?;
    // A shift's count has 32 bits, whatever is shifted.
    let second = if matches!(op, BinaryOp::Shl | BinaryOp::Shr) { Type::U32 } else { ty };
    Ok(Op::Binary {
        op,
        ty,
        mode,
        d: p.reg(&args[0], ty.bits())?,
        a: p.source(&args[1], ty)?,
        b: p.source(&args[2], second)?,
    })
}

fn mul<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    count(p, args, 3)?;
    let (wide, hi, lo) = (m.has("wide"), m.has("hi"), m.has("lo"));
    let mode = mode(m);
    nearest(m);
    let parts = usize::from(wide) + usize::from(hi) + usize::from(lo);
    // An integer's product is cut or widened in one way.
    let ty = typed(m, |ty| (parts == 0 && ty.float()) || (parts == 1 && integer(ty)))?;
    let (a, b) = (p.source(&args[1], ty)?, p.source(&args[2], ty)?);
    if wide {
        return Ok(Op::Wide { ty, d: p.reg(&args[0], 2 * ty.bits())?, a, b, c: None });
    }
    let op = if hi { BinaryOp::MulHi } else { BinaryOp::MulLo };
    Ok(Op::Binary { op, ty, mode, d: p.reg(&args[0], ty.bits())?, a, b })
}

fn mad<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    count(p, args, 4)?;
    let (wide, hi, lo) = (m.has("wide"), m.has("hi"), m.has("lo"));
    let mode = mode(m);
    nearest(m);
    let parts = usize::from(wide) + usize::from(hi) + usize::from(lo);
    // An integer's product is cut or widened in one way.
    let ty = typed(m, |ty| (parts == 0 && ty.float()) || (parts == 1 && integer(ty)))?;
    let (a, b) = (p.source(&args[1], ty)?, p.source(&args[2], ty)?);
    if wide {
        let (bits, sum) = (2 * ty.bits(), if ty.bits() == 32 { Type::B64 } else { Type::B32 });
        return Ok(Op::Wide { ty, d: p.reg(&args[0], bits)?, a, b, c: Some(p.source(&args[3], sum)?) });
    }
    let op = match (ty.float(), hi) {
        (true, _) => TernaryOp::Fma,
        (false, true) => TernaryOp::MadHi,
        (false, false) => TernaryOp::MadLo,
    };
    Ok(Op::Ternary { op, ty, mode, d: p.reg(&args[0], ty.bits())?, a, b, c: p.source(&args[3], ty)? })
}

fn fma<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    let mode = mode(m);
    need(m, "rn")?;
    three(p, m, TernaryOp::Fma, mode, args)
}

fn three<'t>(
    p: &mut Parser<'t>,
    m: &mut Mods<'t>,
    op: TernaryOp,
    mode: FloatMode,
    args: &[Arg<'t>],
) -> Result<Op, PtxError> {
    let ty = typed(m, |ty| match op {
        TernaryOp::Fma => ty.float(),
        TernaryOp::Bfe => integer(ty) && ty.bits() > 16,
        TernaryOp::Dp4a(..) => true,
        _ => ty == Type::B32,
    })?;
    count(p, args, 4)?;
    // The bit positions of `bfe` have 32 bits.
    let short = matches!(op, TernaryOp::Bfe);
    let (b_ty, c_ty) = if short { (Type::U32, Type::U32) } else { (ty, ty) };
    Ok(Op::Ternary {
        op,
        ty,
        mode,
        d: p.reg(&args[0], ty.bits())?,
        a: p.source(&args[1], ty)?,
        b: p.source(&args[2], b_ty)?,
        c: p.source(&args[3], c_ty)?,
    })
}

fn bits<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, stem: &str, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    let mode = FloatMode::default();
    match stem {
        "bfe" => three(p, m, TernaryOp::Bfe, mode, args),
        "prmt" => three(p, m, TernaryOp::Prmt, mode, args),
        "shf" => {
            let (left, right) = (m.has("l"), m.has("r"));
            let (clamp, wrap) = (m.has("clamp"), m.has("wrap"));
            if left == right || clamp == wrap {
                return Err(m.unknown());
            }
            let op = if left { TernaryOp::FunnelLeft { clamp } } else { TernaryOp::FunnelRight { clamp } };
            three(p, m, op, mode, args)
        }
        "lop3" => {
            let Some((table, args)) = args.split_last() else { return Err(m.unknown()) };
            let table = p.immediate(table, 255)? as u8;
            three(p, m, TernaryOp::Lop3(table), mode, args)
        }
        // `dp4a.a.b`: the types of a and b; the sum is signed if either is.
        _ => {
            let four = |ty| matches!(ty, Type::U32 | Type::S32);
            let (a, b) = (typed(m, four)?, typed(m, four)?);
            m.left.push(if a.signed() || b.signed() { "s32" } else { "u32" });
            three(p, m, TernaryOp::Dp4a(a.signed(), b.signed()), mode, args)
        }
    }
}

fn unary<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, stem: &str, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    count(p, args, 2)?;
    if m.has("pred") {
        if stem != "not" {
            return Err(m.unknown());
        }
        return Ok(Op::NotPred { d: p.pred(&args[0])?, a: pred(p, &args[1])? });
    }
    let mode = mode(m);
    nearest(m);
    let ty = typed(m, |ty| match stem {
        "neg" | "abs" => ty.float() || ty.signed() && ty.bits() > 8,
        "not" | "cnot" => bare(ty),
        "popc" | "clz" | "brev" => matches!(ty, Type::B32 | Type::B64),
        "ex2" | "tanh" => ty.float() && ty != Type::F64,
        "lg2" | "sin" | "cos" => ty == Type::F32,
        _ => matches!(ty, Type::F32 | Type::F64),
    })?;
    let op = match stem {
        "neg" => UnaryOp::Neg,
        "abs" => UnaryOp::Abs,
        "not" => UnaryOp::Not,
        "cnot" => UnaryOp::Cnot,
        "popc" => UnaryOp::Popc,
        "clz" => UnaryOp::Clz,
        "brev" => UnaryOp::Brev,
        "ex2" => UnaryOp::Ex2,
        "lg2" => UnaryOp::Lg2,
        "rcp" => UnaryOp::Rcp,
        "rsqrt" => UnaryOp::Rsqrt,
        "sqrt" => UnaryOp::Sqrt,
        "sin" => UnaryOp::Sin,
        "cos" => UnaryOp::Cos,
        _ => UnaryOp::Tanh,
    };
    let bits = if matches!(op, UnaryOp::Popc | UnaryOp::Clz) { 32 } else { ty.bits() };
    Ok(Op::Unary { op, ty, mode, d: p.reg(&args[0], bits)?, a: p.source(&args[1], ty)? })
}

/// A predicate source that may not be negated, or a constant.
pub(super) fn pred<'t>(p: &mut Parser<'t>, arg: &Arg<'t>) -> Result<Pred, PtxError> {
    match p.pred_source(arg)? {
        (pred, false) => Ok(pred),
        (_, true) => p.wrong_operand(arg, "a predicate without `!`"),
    }
}

#[rustfmt::skip] // a table
const COMPARISONS: [(&str, Comparison); 18] = [
    ("eq", Comparison::Eq), ("ne", Comparison::Ne), ("lt", Comparison::Lt), ("le", Comparison::Le),
    ("gt", Comparison::Gt), ("ge", Comparison::Ge), ("lo", Comparison::Lt), ("ls", Comparison::Le),
    ("hi", Comparison::Gt), ("hs", Comparison::Ge), ("equ", Comparison::Equ), ("neu", Comparison::Neu),
    ("ltu", Comparison::Ltu), ("leu", Comparison::Leu), ("gtu", Comparison::Gtu), ("geu", Comparison::Geu),
    ("num", Comparison::Num), ("nan", Comparison::Nan),
];

fn setp<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    let cmp = m.find(|part| COMPARISONS.iter().find(|(name, _)| *name == part).map(|&(_, cmp)| cmp));
    let Some(cmp) = cmp else { return Err(m.unknown()) };
    let logic = m.find(|part| match part {
        "and" => Some(Logic::And),
        "or" => Some(Logic::Or),
        "xor" => Some(Logic::Xor),
        _ => None,
    });
    let ftz = m.has("ftz");
    let ty = m.ty()?;
    count(p, args, if logic.is_some() { 4 } else { 3 })?;
    let (d, other) = match args[0] {
        Arg::Pair(d, other) => {
            let name = |name| Arg::Name { name, negated: false };
            let second = if other == "_" { None } else { Some(p.pred(&name(other))?) };
            (p.pred(&name(d))?, second)
        }
        _ => (p.pred(&args[0])?, None),
    };
    let combine = match logic {
        Some(op) => {
            let (pred, negated) = p.pred_source(&args[3])?;
            Some((op, pred, negated))
        }
        None => None,
    };
    Ok(Op::Setp { cmp, ty, ftz, d, other, combine, a: p.source(&args[1], ty)?, b: p.source(&args[2], ty)? })
}

fn selp<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    let ty = m.ty()?;
    count(p, args, 4)?;
    let d = p.reg(&args[0], ty.bits())?;
    Ok(Op::Selp { d, a: p.source(&args[1], ty)?, b: p.source(&args[2], ty)?, p: pred(p, &args[3])? })
}

fn cvt<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    let mode = mode(m);
    let found = m.find(|part| {
        Some(match part {
            "rn" => (Rounding::Nearest, false),
            "rz" => (Rounding::Zero, false),
            "rm" => (Rounding::Down, false),
            "rp" => (Rounding::Up, false),
            "rni" => (Rounding::Nearest, true),
            "rzi" => (Rounding::Zero, true),
            "rmi" => (Rounding::Down, true),
            "rpi" => (Rounding::Up, true),
            _ => return None,
        })
    });
    let (rounding, integral) = found.map_or((None, false), |(rounding, integral)| (Some(rounding), integral));
    let (to, from) = (m.ty()?, m.ty()?);
    if matches!(to, Type::Bf16x2 | Type::F16x2) {
        let (Some(rounding), Type::F32) = (rounding, from) else { return Err(m.unknown()) };
        count(p, args, 3)?;
        let (d, a) = (p.reg(&args[0], 32)?, p.source(&args[1], Type::F32)?);
        return Ok(Op::CvtPair { to, rounding, relu: mode.relu, d, a, b: p.source(&args[2], Type::F32)? });
    }
    count(p, args, 2)?;
    // A wider register may hold a narrower value (PTX ISA, "Operand Size Exceeding Instruction-Type Size").
    let d = loose(p, &args[0], to)?;
    let a = match &args[1] {
        name @ Arg::Name { .. } if p.bits(name).is_some() => loose(p, name, from)?,
        other => p.source(other, from)?,
    };
    Ok(Op::Cvt { to, from, rounding, integral, mode, d, a })
}

/// A register at least as wide as `ty`.
fn loose<'t>(p: &mut Parser<'t>, arg: &Arg<'t>, ty: Type) -> Result<Reg, PtxError> {
    let bits = p.bits(arg).unwrap_or(ty.bits());
    p.reg(arg, if bits > 1 { bits.max(ty.bits()) } else { ty.bits() })
}

pub(super) fn space(m: &mut Mods<'_>) -> Space {
    m.find(|part| {
        Some(match part {
            "global" => Space::Global,
            "shared" | "shared::cta" => Space::Shared,
            "shared::cluster" => Space::SharedCluster,
            "param" | "param::entry" => Space::Param,
            "const" => Space::Const,
            _ => return None,
        })
    })
    .unwrap_or(Space::Generic)
}

fn scope(m: &mut Mods<'_>) -> Scope {
    m.find(|part| {
        Some(match part {
            "cta" => Scope::Cta,
            "cluster" => Scope::Cluster,
            "gpu" | "gl" => Scope::Gpu,
            "sys" => Scope::Sys,
            _ => return None,
        })
    })
    .unwrap_or(Scope::Gpu)
}

fn order(m: &mut Mods<'_>, default: Order) -> Order {
    m.find(|part| {
        Some(match part {
            "weak" => Order::Weak,
            "nc" => Order::NonCoherent,
            "relaxed" => Order::Relaxed,
            "volatile" => Order::Volatile,
            "acquire" => Order::Acquire,
            "release" => Order::Release,
            "acq_rel" => Order::AcquireRelease,
            _ => return None,
        })
    })
    .unwrap_or(default)
}

/// What tells a cache what to keep, which changes no result.
#[rustfmt::skip] // a table
const CACHE_HINTS: [&str; 18] = [
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first",
    "L1::evict_last", "L1::no_allocate", "L2::evict_normal", "L2::evict_first", "L2::evict_last", "L2::64B",
    "L2::128B", "L2::256B",
];

/// Takes the hints; gives whether a policy is one more operand, the last.
pub(super) fn cache_hints(m: &mut Mods<'_>) -> bool {
    m.left.retain(|part| !CACHE_HINTS.contains(part));
    m.has("L2::cache_hint")
}

pub(super) fn cache_policy<'t>(p: &mut Parser<'t>, policy: bool, args: &[Arg<'t>]) -> Result<(), PtxError> {
    match args.last() {
        Some(last) if policy => p.source(last, Type::B64).map(drop),
        _ => Ok(()),
    }
}

/// What loads and stores have before their operands.
struct Access {
    order: Order,
    space: Space,
    scope: Scope,
    policy: bool,
    count: usize,
    ty: Type,
}

fn access(m: &mut Mods<'_>) -> Result<Access, PtxError> {
    let order = order(m, Order::Weak);
    let (space, scope) = (space(m), scope(m));
    let (policy, count) = (cache_hints(m), vector(m));
    Ok(Access { order, space, scope, policy, count, ty: m.ty()? })
}

fn vector(m: &mut Mods<'_>) -> usize {
    m.find(|part| match part {
        "v2" => Some(2),
        "v4" => Some(4),
        "v8" => Some(8),
        _ => None,
    })
    .unwrap_or(1)
}

fn cvta<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    let to = m.has("to");
    let space = space(m);
    let ty = m.ty()?;
    count(p, args, 2)?;
    Ok(Op::Cvta { space, to, d: p.reg(&args[0], ty.bits())?, a: p.source(&args[1], ty)? })
}

fn load<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    let Access { order, space, scope, policy, count: count_, ty } = access(m)?;
    count(p, args, if policy { 3 } else { 2 })?;
    cache_policy(p, policy, args)?;
    let d = match &args[0] {
        Arg::Vector(_) => p.regs(&args[0], ty.bits(), count_)?,
        // The register may be wider than what is loaded.
        one => [loose(p, one, ty)?].into(),
    };
    if d.len() != count_ {
        return p.wrong_operand(&args[0], &format!("{count_} registers"));
    }
    let space = if space == Space::Generic && p.is_param(&args[1]) { Space::Param } else { space };
    Ok(Op::Load { space, ty, order, scope, d, address: p.address(&args[1])? })
}

fn store<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    let Access { order, space, scope, policy, count: count_, ty } = access(m)?;
    count(p, args, if policy { 3 } else { 2 })?;
    cache_policy(p, policy, args)?;
    let a = match &args[1] {
        name @ Arg::Name { .. } if p.bits(name).is_some() && count_ == 1 => [loose(p, name, ty)?].into(),
        other => p.sources(other, ty, count_)?,
    };
    Ok(Op::Store { space, ty, order, scope, address: p.address(&args[0])?, a })
}

pub(super) fn atomic_op(part: &str) -> Option<AtomicOp> {
    Some(match part {
        "add" => AtomicOp::Add,
        "min" => AtomicOp::Min,
        "max" => AtomicOp::Max,
        "and" => AtomicOp::And,
        "or" => AtomicOp::Or,
        "xor" => AtomicOp::Xor,
        "exch" => AtomicOp::Exch,
        "cas" => AtomicOp::Cas,
        "inc" => AtomicOp::Inc,
        "dec" => AtomicOp::Dec,
        _ => return None,
    })
}

fn atomic<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, result: bool, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    let order = order(m, Order::Relaxed);
    let (space, scope) = (space(m), scope(m));
    let Some(op) = m.find(atomic_op) else { return Err(m.unknown()) };
    m.has("noftz");
    let count_ = vector(m);
    let ty = m.ty()?;
    let cas = op == AtomicOp::Cas;
    count(p, args, 2 + usize::from(result) + usize::from(cas))?;
    let (d, rest) = if result { (p.reg_or_sink(&args[0], ty.bits())?, &args[1..]) } else { (None, args) };
    let address = p.address(&rest[0])?;
    let b = p.sources(&rest[1], ty, count_)?;
    let c = if cas { Some(p.source(&rest[2], ty)?) } else { None };
    Ok(Op::Atomic { op, ty, space, order, scope, d, address, b, c })
}

fn branch<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    m.has("uni");
    count(p, args, 1)?;
    p.jump(&args[0])?;
    Ok(Op::Branch { target: 0 })
}

fn branch_indexed<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    m.has("uni");
    need(m, "idx")?;
    count(p, args, 2)?;
    p.jump(&args[1])?;
    Ok(Op::BranchIndexed { index: p.source(&args[0], Type::U32)?, targets: [].into() })
}

fn fence<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    count(p, args, 0)?;
    if m.left.iter().any(|part| matches!(*part, "proxy" | "mbarrier_init")) {
        return sm90::fence(m);
    }
    // `membar` is `fence.sc` (PTX ISA, "membar, fence"); a fence without a word is acquire and release.
    let sequential = m.has("sc") || m.opcode.starts_with("membar");
    if !sequential {
        m.has("acq_rel");
    }
    Ok(Op::Fence { scope: scope(m), sequential })
}

fn barrier<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    let aligned = m.has("aligned");
    if m.has("cluster") {
        return sm90::cluster_barrier(p, m, args);
    }
    if m.has("warp") {
        need(m, "sync")?;
        count(p, args, 1)?;
        return Ok(Op::WarpSync { mask: p.source(&args[0], Type::B32)? });
    }
    // `bar` is aligned by itself. `barrier` without `.aligned` may be met lane by lane, which no kernel here does.
    m.has("cta");
    if m.opcode.starts_with("barrier") && !aligned {
        return Err(m.unknown());
    }
    if m.has("red") {
        let op = if m.has("and") {
            ReduceOp::And
        } else {
            need(m, "or")?;
            ReduceOp::Or
        };
        need(m, "pred")?;
        between(p, args, 3, 4)?;
        let (d, a) = (p.pred(&args[0])?, pred(p, &args[args.len() - 1])?);
        let threads = if args.len() == 4 { Some(p.source(&args[2], Type::U32)?) } else { None };
        return Ok(Op::Barrier {
            op: BarrierOp::Reduce(d, op, a),
            id: p.source(&args[1], Type::U32)?,
            threads,
        });
    }
    let op = if m.has("arrive") { BarrierOp::Arrive } else { BarrierOp::Sync };
    if op == BarrierOp::Sync {
        need(m, "sync")?;
    }
    between(p, args, if op == BarrierOp::Arrive { 2 } else { 1 }, 2)?;
    let id = p.source(&args[0], Type::U32)?;
    let threads = match args.get(1) {
        Some(arg) => Some(p.source(arg, Type::U32)?),
        None => None,
    };
    Ok(Op::Barrier { op, id, threads })
}

fn shuffle<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    need(m, "sync")?;
    need(m, "b32")?;
    let mode = m.find(|part| {
        Some(match part {
            "up" => ShuffleMode::Up,
            "down" => ShuffleMode::Down,
            "bfly" => ShuffleMode::Bfly,
            "idx" => ShuffleMode::Idx,
            _ => return None,
        })
    });
    let Some(mode) = mode else { return Err(m.unknown()) };
    count(p, args, 5)?;
    let (d, q) = match args[0] {
        Arg::Pair(d, q) => (p.reg(&plain(d), 32)?, Some(p.pred(&plain(q))?)),
        _ => (p.reg(&args[0], 32)?, None),
    };
    let mut source = |at: usize| p.source(&args[at], Type::B32);
    Ok(Op::Shuffle { mode, d, p: q, a: source(1)?, b: source(2)?, c: source(3)?, mask: source(4)? })
}

pub(super) fn plain(name: &str) -> Arg<'_> {
    Arg::Name { name, negated: false }
}

fn vote<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    need(m, "sync")?;
    count(p, args, 3)?;
    let mode = if m.has("ballot") {
        need(m, "b32")?;
        VoteMode::Ballot(p.reg(&args[0], 32)?)
    } else {
        need(m, "pred")?;
        let d = p.pred(&args[0])?;
        match (m.has("all"), m.has("any"), m.has("uni")) {
            (true, ..) => VoteMode::All(d),
            (_, true, _) => VoteMode::Any(d),
            (.., true) => VoteMode::Uni(d),
            _ => return Err(m.unknown()),
        }
    };
    let (a, negated) = p.pred_source(&args[1])?;
    Ok(Op::Vote { mode, a, negated, mask: p.source(&args[2], Type::B32)? })
}

fn match_sync<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    need(m, "sync")?;
    let (all, any) = (m.has("all"), m.has("any"));
    if all == any {
        return Err(m.unknown());
    }
    let ty = m.ty()?;
    count(p, args, 3)?;
    let (d, q) = match args[0] {
        Arg::Pair(d, q) if all => (p.reg(&plain(d), 32)?, Some(p.pred(&plain(q))?)),
        _ => (p.reg(&args[0], 32)?, None),
    };
    let (a, mask) = (p.source(&args[1], ty)?, p.source(&args[2], Type::B32)?);
    Ok(Op::Match { all: all.then_some(q), wide: ty.wide(), d, a, mask })
}

fn redux<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    need(m, "sync")?;
    let Some(op) = m.find(atomic_op) else { return Err(m.unknown()) };
    let ty = m.ty()?;
    count(p, args, 3)?;
    let float = ty.float() || ty.bits() != 32;
    if float || matches!(op, AtomicOp::Exch | AtomicOp::Cas | AtomicOp::Inc | AtomicOp::Dec) {
        return Err(m.unknown());
    }
    Ok(Op::Redux {
        op,
        ty,
        d: p.reg(&args[0], 32)?,
        a: p.source(&args[1], ty)?,
        mask: p.source(&args[2], Type::B32)?,
    })
}

pub(super) fn matrix_type(part: &str) -> Option<MatrixType> {
    Some(match part {
        "bf16" => MatrixType::Bf16,
        "f16" => MatrixType::F16,
        "s8" => MatrixType::S8,
        "u8" => MatrixType::U8,
        _ => return None,
    })
}

fn mma<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    need(m, "sync")?;
    need(m, "aligned")?;
    need(m, "row")?;
    need(m, "col")?;
    let satfinite = m.has("satfinite");
    let k = m.find(|part| match part {
        "m16n8k8" => Some(8),
        "m16n8k16" => Some(16),
        "m16n8k32" => Some(32),
        _ => None,
    });
    // What is left: the types of D, A, B, C.
    let (Some(k), [d, a, b, c]) = (k, &m.left[..]) else { return Err(m.unknown()) };
    let (Some(a_ty), Some(b_ty)) = (matrix_type(a), matrix_type(b)) else { return Err(m.unknown()) };
    let float = matches!(a_ty, MatrixType::Bf16 | MatrixType::F16);
    let narrow = *d == "f16";
    let accumulators = if !float {
        "s32"
    } else if narrow {
        "f16"
    } else {
        "f32"
    };
    let shapes_ok = if float {
        a_ty == b_ty && k <= 16
    } else {
        k >= 16 && matches!(b_ty, MatrixType::S8 | MatrixType::U8)
    };
    if *d != accumulators || *c != accumulators || !shapes_ok || narrow && a_ty != MatrixType::F16 {
        return Err(m.unknown());
    }
    m.left.clear();
    count(p, args, 4)?;
    // 32 bits hold two elements of A and B, or four of 8 bits.
    let per = if float { 2 } else { 4 };
    let (n_a, n_b, n_c) =
        ((16 * k / 32 / per) as usize, (8 * k / 32 / per) as usize, if narrow { 2 } else { 4 });
    Ok(Op::Mma {
        k,
        a_ty,
        b_ty,
        narrow,
        satfinite,
        d: p.regs(&args[0], 32, n_c)?,
        a: p.sources(&args[1], Type::B32, n_a)?,
        b: p.sources(&args[2], Type::B32, n_b)?,
        c: p.sources(&args[3], if float && !narrow { Type::F32 } else { Type::B32 }, n_c)?,
    })
}

/// What `ldmatrix` and `stmatrix` share: whether matrices are transposed, how many there are, where their rows lie.
fn matrix_rows<'t>(
    p: &mut Parser<'t>,
    m: &mut Mods<'t>,
    rows: Option<&Arg<'t>>,
) -> Result<(bool, usize, Address), PtxError> {
    need(m, "sync")?;
    need(m, "aligned")?;
    need(m, "m8n8")?;
    need(m, "b16")?;
    let count = m.find(|part| match part {
        "x1" => Some(1),
        "x2" => Some(2),
        "x4" => Some(4),
        _ => None,
    });
    let (trans, space) = (m.has("trans"), space(m));
    let (Some(count), Space::Shared, Some(rows)) = (count, space, rows) else { return Err(m.unknown()) };
    Ok((trans, count, p.address(rows)?))
}

/// Groups of copies that may be waited for: more than any ring has stages.
pub(super) const MOST_GROUPS: u32 = 64;

fn copy<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    need(m, "async")?;
    if m.has("commit_group") {
        count(p, args, 0)?;
        return Ok(Op::CopyCommit);
    }
    if m.has("wait_all") {
        count(p, args, 0)?;
        return Ok(Op::CopyWait(None));
    }
    if m.has("wait_group") {
        count(p, args, 1)?;
        return Ok(Op::CopyWait(Some(p.immediate(&args[0], MOST_GROUPS)?)));
    }
    let whole = m.left.contains(&"cg");
    let policy = cache_hints(m);
    need(m, "global")?;
    if !m.has("shared") {
        need(m, "shared::cta")?;
    }
    let plain = 3 + usize::from(policy);
    between(p, args, plain, plain + 1)?;
    let bytes = p.immediate(&args[2], 16)?;
    if !(matches!(bytes, 4 | 8 | 16) && (!whole || bytes == 16)) {
        return p.wrong_operand(&args[2], if whole { "16" } else { "4, 8 or 16" });
    }
    let size = if args.len() > plain { Some(p.source(&args[3], Type::U32)?) } else { None };
    cache_policy(p, policy, args)?;
    Ok(Op::Copy { bytes, d: p.address(&args[0])?, a: p.address(&args[1])?, size })
}
