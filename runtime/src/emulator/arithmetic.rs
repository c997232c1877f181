//! What arithmetic instructions compute, 32 lanes at a time.
//!
//! A register that holds fewer bits than its bank has may hold anything above them: each operand is taken at its type's
//! width. All lanes are computed, also those that do not run; the caller keeps what it needs.
//!
//! Approximate instructions (`ex2.approx` and its kind) give the nearest value of their format.

use super::float::{self, Format, bf16, f16, flush, sum_to_odd, to_bf16};
use crate::ptx::{BinaryOp, Comparison, FloatMode, Rounding, TernaryOp, Type, UnaryOp};

/// The lanes of a warp.
pub const LANES: usize = 32;
/// A register of up to 32 bits in every lane.
pub type Narrow = [u32; LANES];
/// A register of 64 bits in every lane.
pub type Wide = [u64; LANES];

/// An operand.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// Of up to 32 bits.
    Narrow(&'a Narrow),
    /// Of 64 bits.
    Wide(&'a Wide),
}

impl<'a> Source<'a> {
    /// Of an instruction whose type says that it has up to 32 bits.
    pub fn narrow(self) -> &'a Narrow {
        match self {
            Source::Narrow(lanes) => lanes,
            Source::Wide(_) => unreachable!("the parser checks widths"),
        }
    }

    /// Of an instruction whose type says that it has 64 bits.
    pub fn wide(self) -> &'a Wide {
        match self {
            Source::Narrow(_) => unreachable!("the parser checks widths"),
            Source::Wide(lanes) => lanes,
        }
    }

    /// As integers, extended to 64 bits as the type says.
    pub fn extended(self, ty: Type) -> Wide {
        match self {
            Source::Narrow(lanes) => map(lanes, |x| extend(ty, u64::from(x))),
            Source::Wide(lanes) => map(lanes, |x| extend(ty, x)),
        }
    }
}

/// A result.
#[derive(Debug)]
pub enum Lanes {
    /// Of up to 32 bits.
    Narrow(Narrow),
    /// Of 64 bits.
    Wide(Wide),
}

/// Applies `f` to every lane.
#[inline(always)]
pub fn map<A: Copy, D: Copy + Default>(a: &[A; LANES], f: impl Fn(A) -> D) -> [D; LANES] {
    let mut d = [D::default(); LANES];
    for lane in 0..LANES {
        d[lane] = f(a[lane]);
    }
    d
}

/// Applies `f` to every lane of two operands.
#[inline(always)]
pub fn map2<A: Copy, B: Copy, D: Copy + Default>(
    a: &[A; LANES],
    b: &[B; LANES],
    f: impl Fn(A, B) -> D,
) -> [D; LANES] {
    let mut d = [D::default(); LANES];
    for lane in 0..LANES {
        d[lane] = f(a[lane], b[lane]);
    }
    d
}

#[inline(always)]
fn map3<T: Copy, B: Copy, C: Copy, D: Copy + Default>(
    a: &[T; LANES],
    b: &[B; LANES],
    c: &[C; LANES],
    f: impl Fn(T, B, C) -> D,
) -> [D; LANES] {
    let mut d = [D::default(); LANES];
    for lane in 0..LANES {
        d[lane] = f(a[lane], b[lane], c[lane]);
    }
    d
}

/// The lowest bits that the type has, extended by zeros or by the sign.
#[inline(always)]
pub fn extend(ty: Type, bits: u64) -> u64 {
    let unused = 64 - ty.bits();
    if ty.signed() { ((bits << unused) as i64 >> unused) as u64 } else { bits << unused >> unused }
}

/// 16-bit operands extended to 32 bits; others as they are.
fn extended(ty: Type, a: &Narrow) -> Narrow {
    match ty {
        Type::S16 => map(a, |x| x as u16 as i16 as u32),
        Type::U16 | Type::B16 => map(a, |x| x & 0xFFFF),
        _ => *a,
    }
}

fn saturate(value: f32) -> f32 {
    // A NaN becomes 0.
    if value > 0.0 { value.min(1.0) } else { 0.0 }
}

/// An f32 result with what the instruction's modifiers do to it.
#[inline(always)]
fn finish(mode: FloatMode, value: f32) -> u32 {
    let mut value = value;
    if mode.ftz {
        value = flush(value);
    }
    if mode.sat {
        value = saturate(value);
    }
    if mode.relu && value < 0.0 {
        value = 0.0;
    }
    if value.is_nan() { 0x7FFF_FFFF } else { value.to_bits() }
}

#[inline(always)]
fn operand(mode: FloatMode, bits: u32) -> f32 {
    let value = f32::from_bits(bits);
    if mode.ftz { flush(value) } else { value }
}

/// `min`, `max`: a number wins over a NaN unless `.NaN` is said; -0 is less than +0.
#[inline(always)]
fn least(nan: bool, a: f64, b: f64) -> f64 {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => f64::NAN,
        (true, false) => {
            if nan {
                f64::NAN
            } else {
                b
            }
        }
        (false, true) => {
            if nan {
                f64::NAN
            } else {
                a
            }
        }
        (false, false) if a == b => {
            if a.is_sign_negative() {
                a
            } else {
                b
            }
        }
        (false, false) => {
            if a < b {
                a
            } else {
                b
            }
        }
    }
}

#[inline(always)]
fn least_f32(nan: bool, a: f32, b: f32) -> f32 {
    // Equal values differ in the sign of a zero at most, which bit patterns order.
    let less = if a == b { a.is_sign_negative() } else { a < b };
    let number = if less || b.is_nan() { a } else { b };
    if nan && (a.is_nan() || b.is_nan()) { f32::NAN } else { number }
}

/// An instruction with one operand.
pub fn unary(op: UnaryOp, ty: Type, mode: FloatMode, a: Source<'_>) -> Lanes {
    match ty {
        Type::F32 => {
            let a = a.narrow();
            let of = |f: fn(f32) -> f32| Lanes::Narrow(map(a, |x| finish(mode, f(operand(mode, x)))));
            match op {
                // These two change the sign's bit, of a NaN too.
                UnaryOp::Neg => Lanes::Narrow(map(a, |x| operand(mode, x).to_bits() ^ 1 << 31)),
                UnaryOp::Abs => Lanes::Narrow(map(a, |x| operand(mode, x).to_bits() & !(1 << 31))),
                UnaryOp::Ex2 => of(libm::exp2f),
                UnaryOp::Lg2 => of(|x| libm::log2(f64::from(x)) as f32),
                UnaryOp::Rcp => of(|x| 1.0 / x),
                UnaryOp::Rsqrt => of(|x| (1.0 / f64::from(x).sqrt()) as f32),
                UnaryOp::Sqrt => of(f32::sqrt),
                UnaryOp::Sin => of(|x| libm::sin(f64::from(x)) as f32),
                UnaryOp::Cos => of(|x| libm::cos(f64::from(x)) as f32),
                UnaryOp::Tanh => of(|x| libm::tanh(f64::from(x)) as f32),
                UnaryOp::Not | UnaryOp::Cnot | UnaryOp::Popc | UnaryOp::Clz | UnaryOp::Brev => {
                    unreachable!("the parser takes no such type")
                }
            }
        }
        Type::F64 => Lanes::Wide(map(a.wide(), |x| float_unary(op, f64::from_bits(x)).to_bits())),
        Type::F16 | Type::F16x2 | Type::Bf16 | Type::Bf16x2 => {
            Lanes::Narrow(halves(ty, mode, [a.narrow()], |[x]| float_unary(op, x)))
        }
        _ if ty.wide() => {
            let a = a.wide();
            match op {
                UnaryOp::Neg => Lanes::Wide(map(a, u64::wrapping_neg)),
                UnaryOp::Abs => Lanes::Wide(map(a, |x| (x as i64).wrapping_abs() as u64)),
                UnaryOp::Not => Lanes::Wide(map(a, |x| !x)),
                UnaryOp::Cnot => Lanes::Wide(map(a, |x| u64::from(x == 0))),
                UnaryOp::Popc => Lanes::Narrow(map(a, u64::count_ones)),
                UnaryOp::Clz => Lanes::Narrow(map(a, u64::leading_zeros)),
                UnaryOp::Brev => Lanes::Wide(map(a, u64::reverse_bits)),
                _ => unreachable!("the parser takes no such type"),
            }
        }
        _ => {
            let a = &extended(ty, a.narrow());
            Lanes::Narrow(match op {
                UnaryOp::Neg => map(a, u32::wrapping_neg),
                UnaryOp::Abs => map(a, |x| (x as i32).wrapping_abs() as u32),
                UnaryOp::Not => map(a, |x| !x),
                UnaryOp::Cnot => map(a, |x| u32::from(x == 0)),
                UnaryOp::Popc => map(a, u32::count_ones),
                UnaryOp::Clz => map(a, u32::leading_zeros),
                UnaryOp::Brev => map(a, u32::reverse_bits),
                _ => unreachable!("the parser takes no such type"),
            })
        }
    }
}

fn float_unary(op: UnaryOp, x: f64) -> f64 {
    match op {
        UnaryOp::Neg => -x,
        UnaryOp::Abs => x.abs(),
        UnaryOp::Ex2 => libm::exp2(x),
        UnaryOp::Rcp => 1.0 / x,
        UnaryOp::Rsqrt => 1.0 / x.sqrt(),
        UnaryOp::Sqrt => x.sqrt(),
        UnaryOp::Tanh => libm::tanh(x),
        _ => unreachable!("the parser takes no such type"),
    }
}

/// Applies `f` to one half or both, in f64, and rounds to the nearest of the format.
#[inline(always)]
fn halves<const N: usize>(
    ty: Type,
    mode: FloatMode,
    sources: [&Narrow; N],
    f: impl Fn([f64; N]) -> f64,
) -> Narrow {
    let half = matches!(ty, Type::F16 | Type::F16x2);
    let one = |bits: [u32; N]| {
        let value = f(bits.map(|bits| f64::from(if half { f16(bits) } else { bf16(bits) })));
        let value = if mode.sat { f64::from(saturate(value as f32)) } else { value };
        let value = if mode.relu && value < 0.0 { 0.0 } else { value };
        Format::of(ty).round(value, Rounding::Nearest)
    };
    let mut d = [0; LANES];
    for (lane, d) in d.iter_mut().enumerate() {
        let bits = sources.map(|source| source[lane]);
        *d = one(bits.map(|bits| bits & 0xFFFF));
        if ty.bits() == 32 {
            *d |= one(bits.map(|bits| bits >> 16)) << 16;
        }
    }
    d
}

/// An instruction with two operands.
pub fn binary(op: BinaryOp, ty: Type, mode: FloatMode, a: Source<'_>, b: Source<'_>) -> Lanes {
    match ty {
        Type::F32 => {
            let (a, b) = (a.narrow(), b.narrow());
            macro_rules! of {
                ($f:expr) => {
                    if mode == FloatMode::default() {
                        // The common case, without the work of the modifiers.
                        map2(a, b, |x, y| {
                            finish(FloatMode::default(), $f(f32::from_bits(x), f32::from_bits(y)))
                        })
                    } else {
                        map2(a, b, |x, y| finish(mode, $f(operand(mode, x), operand(mode, y))))
                    }
                };
            }
            Lanes::Narrow(match op {
                BinaryOp::Add => of!(|x: f32, y: f32| x + y),
                BinaryOp::Sub => of!(|x: f32, y: f32| x - y),
                BinaryOp::MulLo => of!(|x: f32, y: f32| x * y),
                BinaryOp::Div => of!(|x: f32, y: f32| x / y),
                BinaryOp::Min => of!(|x: f32, y: f32| least_f32(mode.nan, x, y)),
                BinaryOp::Max => of!(|x: f32, y: f32| -least_f32(mode.nan, -x, -y)),
                _ => unreachable!("the parser takes no such type"),
            })
        }
        Type::F64 => Lanes::Wide(map2(a.wide(), b.wide(), |x, y| {
            float_binary(op, mode, f64::from_bits(x), f64::from_bits(y)).to_bits()
        })),
        Type::F16 | Type::F16x2 | Type::Bf16 | Type::Bf16x2 => {
            let sources = [a.narrow(), b.narrow()];
            Lanes::Narrow(halves(ty, mode, sources, |[x, y]| float_binary(op, mode, x, y)))
        }
        _ => integer_binary(op, ty, mode, a, b),
    }
}

fn float_binary(op: BinaryOp, mode: FloatMode, x: f64, y: f64) -> f64 {
    match op {
        BinaryOp::Add => x + y,
        BinaryOp::Sub => x - y,
        BinaryOp::MulLo => x * y,
        BinaryOp::Div => x / y,
        BinaryOp::Min => least(mode.nan, x, y),
        BinaryOp::Max => -least(mode.nan, -x, -y),
        _ => unreachable!("the parser takes no such type"),
    }
}

fn integer_binary(op: BinaryOp, ty: Type, mode: FloatMode, a: Source<'_>, b: Source<'_>) -> Lanes {
    let signed = ty.signed();
    // A division by zero gives all ones, which the ISA leaves open.
    macro_rules! of {
        ($a:expr, $b:expr, $unsigned:ty, $signed:ty, $double:ty, $signed_double:ty) => {{
            let (a, b) = ($a, $b);
            let bits = ty.bits();
            match (op, signed) {
                (BinaryOp::Add, true) if mode.sat => {
                    map2(a, b, |x, y| (x as $signed).saturating_add(y as $signed) as $unsigned)
                }
                (BinaryOp::Sub, true) if mode.sat => {
                    map2(a, b, |x, y| (x as $signed).saturating_sub(y as $signed) as $unsigned)
                }
                (BinaryOp::Add, _) => map2(a, b, |x, y| x.wrapping_add(y)),
                (BinaryOp::Sub, _) => map2(a, b, |x, y| x.wrapping_sub(y)),
                (BinaryOp::MulLo, _) => map2(a, b, |x, y| x.wrapping_mul(y)),
                (BinaryOp::MulHi, false) => {
                    map2(a, b, |x, y| ((x as $double * y as $double) >> bits) as $unsigned)
                }
                (BinaryOp::MulHi, true) => map2(a, b, |x, y| {
                    ((x as $signed as $signed_double * y as $signed as $signed_double) >> bits) as $unsigned
                }),
                (BinaryOp::Div, false) => map2(a, b, |x, y| x.checked_div(y).unwrap_or(<$unsigned>::MAX)),
                (BinaryOp::Div, true) => map2(a, b, |x, y| match y {
                    0 => <$unsigned>::MAX,
                    y => (x as $signed).wrapping_div(y as $signed) as $unsigned,
                }),
                (BinaryOp::Rem, false) => map2(a, b, |x, y| x.checked_rem(y).unwrap_or(x)),
                (BinaryOp::Rem, true) => map2(a, b, |x, y| match y {
                    0 => x,
                    y => (x as $signed).wrapping_rem(y as $signed) as $unsigned,
                }),
                (BinaryOp::Min, false) => map2(a, b, |x, y| x.min(y)),
                (BinaryOp::Max, false) => map2(a, b, |x, y| x.max(y)),
                (BinaryOp::Min, true) => map2(a, b, |x, y| (x as $signed).min(y as $signed) as $unsigned),
                (BinaryOp::Max, true) => map2(a, b, |x, y| (x as $signed).max(y as $signed) as $unsigned),
                (BinaryOp::And, _) => map2(a, b, |x, y| x & y),
                (BinaryOp::Or, _) => map2(a, b, |x, y| x | y),
                (BinaryOp::Xor, _) => map2(a, b, |x, y| x ^ y),
                (BinaryOp::Shl | BinaryOp::Shr, _) => unreachable!("shifts are done before"),
            }
        }};
    }
    if matches!(op, BinaryOp::Shl | BinaryOp::Shr) {
        return shift(op, ty, a, b.narrow());
    }
    if ty.wide() {
        return Lanes::Wide(of!(a.wide(), b.wide(), u64, i64, u128, i128));
    }
    let (a, b) = (&extended(ty, a.narrow()), &extended(ty, b.narrow()));
    Lanes::Narrow(of!(a, b, u32, i32, u64, i64))
}

/// Shifts by more than the width clear everything, or leave copies of the sign.
fn shift(op: BinaryOp, ty: Type, a: Source<'_>, count: &Narrow) -> Lanes {
    let (left, signed) = (op == BinaryOp::Shl, ty.signed());
    if ty.wide() {
        let a = a.wide();
        return Lanes::Wide(match (left, signed) {
            (true, _) => map2(a, count, |x, n| x.checked_shl(n).unwrap_or(0)),
            (false, false) => map2(a, count, |x, n| x.checked_shr(n).unwrap_or(0)),
            (false, true) => map2(a, count, |x, n| (x as i64 >> n.min(63)) as u64),
        });
    }
    let a = &extended(ty, a.narrow());
    Lanes::Narrow(match (left, signed) {
        (true, _) => map2(a, count, |x, n| if n < 32 { x << (n & 31) } else { 0 }),
        (false, false) => map2(a, count, |x, n| if n < 32 { x >> (n & 31) } else { 0 }),
        (false, true) => map2(a, count, |x, n| (x as i32 >> n.min(31)) as u32),
    })
}

/// An instruction with three operands.
pub fn ternary(
    op: TernaryOp,
    ty: Type,
    mode: FloatMode,
    a: Source<'_>,
    b: Source<'_>,
    c: Source<'_>,
) -> Lanes {
    let narrow = |f: fn(u32, u32, u32) -> u32| Lanes::Narrow(map3(a.narrow(), b.narrow(), c.narrow(), f));
    match op {
        TernaryOp::Fma => fma(ty, mode, a, b, c),
        TernaryOp::MadLo | TernaryOp::MadHi => {
            let part = if op == TernaryOp::MadLo { BinaryOp::MulLo } else { BinaryOp::MulHi };
            let exact = FloatMode::default();
            match binary(part, ty, exact, a, b) {
                Lanes::Narrow(product) => binary(BinaryOp::Add, ty, mode, Source::Narrow(&product), c),
                Lanes::Wide(product) => binary(BinaryOp::Add, ty, mode, Source::Wide(&product), c),
            }
        }
        TernaryOp::Bfe if ty.wide() => {
            let (a, b, c) = (a.wide(), b.narrow(), c.narrow());
            Lanes::Wide(map3(a, b, c, |a, b, c| extract(ty, a, b, c)))
        }
        TernaryOp::Bfe => {
            let (a, b, c) = (a.narrow(), b.narrow(), c.narrow());
            Lanes::Narrow(map3(a, b, c, |a, b, c| extract(ty, u64::from(a), b, c) as u32))
        }
        TernaryOp::Prmt => narrow(permute),
        TernaryOp::FunnelLeft { clamp: true } => {
            narrow(|low, high, n| (pair(low, high) << n.min(32) >> 32) as u32)
        }
        TernaryOp::FunnelLeft { clamp: false } => {
            narrow(|low, high, n| (pair(low, high) << (n & 31) >> 32) as u32)
        }
        TernaryOp::FunnelRight { clamp: true } => {
            narrow(|low, high, n| (pair(low, high) >> n.min(32)) as u32)
        }
        TernaryOp::FunnelRight { clamp: false } => {
            narrow(|low, high, n| (pair(low, high) >> (n & 31)) as u32)
        }
        TernaryOp::Lop3(table) => Lanes::Narrow(map3(a.narrow(), b.narrow(), c.narrow(), |a, b, c| {
            // Bit `4 a + 2 b + c` of the table.
            let term = |at: u32| {
                let of = |x: u32, bit: u32| if at & bit == 0 { !x } else { x };
                if table >> at & 1 == 0 { 0 } else { of(a, 4) & of(b, 2) & of(c, 1) }
            };
            (0..8).fold(0, |all, at| all | term(at))
        })),
        TernaryOp::Dp4a(a_signed, b_signed) => {
            Lanes::Narrow(map3(a.narrow(), b.narrow(), c.narrow(), |a, b, c| {
                let byte = |x: u32, at: usize, signed: bool| match x.to_le_bytes()[at] {
                    byte if signed => i32::from(byte as i8),
                    byte => i32::from(byte),
                };
                let products = (0..4).map(|at| byte(a, at, a_signed) * byte(b, at, b_signed));
                c.wrapping_add(products.sum::<i32>() as u32)
            }))
        }
    }
}

fn pair(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

fn fma(ty: Type, mode: FloatMode, a: Source<'_>, b: Source<'_>, c: Source<'_>) -> Lanes {
    match ty {
        Type::F32 => {
            let (a, b, c) = (a.narrow(), b.narrow(), c.narrow());
            Lanes::Narrow(map3(a, b, c, |x, y, z| {
                finish(mode, float::fma(operand(mode, x), operand(mode, y), operand(mode, z)))
            }))
        }
        Type::F64 => Lanes::Wide(map3(a.wide(), b.wide(), c.wide(), |x, y, z| {
            f64::from_bits(x).mul_add(f64::from_bits(y), f64::from_bits(z)).to_bits()
        })),
        // The product of two halves is exact in f64.
        _ => {
            let sources = [a.narrow(), b.narrow(), c.narrow()];
            Lanes::Narrow(halves(ty, mode, sources, |[x, y, z]| sum_to_odd(x * y, z)))
        }
    }
}

/// `bfe`: `count` bits from `from` on (PTX ISA, "bfe").
fn extract(ty: Type, a: u64, from: u32, count: u32) -> u64 {
    let (from, count, top) = (from & 0xFF, count & 0xFF, ty.bits() - 1);
    let bit = |at: u32| if at <= top { a >> at & 1 } else { 0 };
    let sign = if ty.signed() && count > 0 { bit((from + count - 1).min(top)) } else { 0 };
    let taken = (0..count.min(64)).filter(|&at| from + at <= top);
    let mut value = taken.clone().fold(0, |value, at| value | bit(from + at) << at);
    let copied = taken.count() as u32;
    if sign == 1 && copied < 64 {
        value |= u64::MAX << copied;
    }
    value
}

/// `prmt` without a mode (PTX ISA, "prmt").
fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = pair(a, b).to_le_bytes();
    (0..4).fold(0, |all, at| {
        let pick = selector >> (4 * at) & 0xF;
        let byte = u32::from(bytes[(pick & 7) as usize]);
        let byte = if pick & 8 == 0 { byte } else { (byte >> 7) * 0xFF };
        all | byte << (8 * at)
    })
}

/// `mul.wide`, and `mad.wide` with `c`.
pub fn wide(ty: Type, a: Source<'_>, b: Source<'_>, c: Option<Source<'_>>) -> Lanes {
    let (a, b) = (a.narrow(), b.narrow());
    let double = |x: u32, y: u32| match ty {
        Type::S32 => (i64::from(x as i32) * i64::from(y as i32)) as u64,
        _ => u64::from(x) * u64::from(y),
    };
    if ty.bits() == 32 {
        let product = map2(a, b, double);
        return Lanes::Wide(c.map_or(product, |c| map2(&product, c.wide(), u64::wrapping_add)));
    }
    let (a, b) = (extended(ty, a), extended(ty, b));
    let product = map2(&a, &b, u32::wrapping_mul);
    Lanes::Narrow(c.map_or(product, |c| map2(&product, c.narrow(), u32::wrapping_add)))
}

/// `setp`: the lanes where it holds, a bit each.
pub fn compare(cmp: Comparison, ty: Type, ftz: bool, a: Source<'_>, b: Source<'_>) -> u32 {
    let mode = FloatMode { ftz, ..FloatMode::default() };
    match ty {
        Type::F32 => bits(&map2(a.narrow(), b.narrow(), |x, y| {
            holds(cmp, f64::from(operand(mode, x)), f64::from(operand(mode, y)))
        })),
        Type::F64 => bits(&map2(a.wide(), b.wide(), |x, y| holds(cmp, f64::from_bits(x), f64::from_bits(y)))),
        Type::F16 | Type::Bf16 | Type::F16x2 | Type::Bf16x2 => {
            let value = |bits: u32| f64::from(if ty == Type::F16 { f16(bits & 0xFFFF) } else { bf16(bits) });
            bits(&map2(a.narrow(), b.narrow(), |x, y| holds(cmp, value(x), value(y))))
        }
        _ if ty.wide() && ty.signed() => {
            bits(&map2(a.wide(), b.wide(), |x, y| ordered(cmp, x as i64, y as i64)))
        }
        _ if ty.wide() => bits(&map2(a.wide(), b.wide(), |x, y| ordered(cmp, x, y))),
        _ => {
            let (a, b) = (extended(ty, a.narrow()), extended(ty, b.narrow()));
            if ty.signed() {
                bits(&map2(&a, &b, |x, y| ordered(cmp, x as i32, y as i32)))
            } else {
                bits(&map2(&a, &b, |x, y| ordered(cmp, x, y)))
            }
        }
    }
}

/// A bit for each lane.
pub fn bits(lanes: &[bool; LANES]) -> u32 {
    lanes.iter().enumerate().fold(0, |all, (lane, &bit)| all | u32::from(bit) << lane)
}

#[inline(always)]
fn ordered<T: PartialOrd>(cmp: Comparison, x: T, y: T) -> bool {
    match cmp {
        Comparison::Eq | Comparison::Equ => x == y,
        Comparison::Ne | Comparison::Neu => x != y,
        Comparison::Lt | Comparison::Ltu => x < y,
        Comparison::Le | Comparison::Leu => x <= y,
        Comparison::Gt | Comparison::Gtu => x > y,
        Comparison::Ge | Comparison::Geu => x >= y,
        Comparison::Num => true,
        Comparison::Nan => false,
    }
}

#[inline(always)]
fn holds(cmp: Comparison, x: f64, y: f64) -> bool {
    if x.is_nan() || y.is_nan() {
        return match cmp {
            Comparison::Eq | Comparison::Ne | Comparison::Lt | Comparison::Le => false,
            Comparison::Gt | Comparison::Ge | Comparison::Num => false,
            Comparison::Equ | Comparison::Neu | Comparison::Ltu | Comparison::Leu => true,
            Comparison::Gtu | Comparison::Geu | Comparison::Nan => true,
        };
    }
    ordered(cmp, x, y)
}

/// `cvt.to.from` (PTX ISA, "cvt"). `wide`: is the result's register of 64 bits?
pub fn convert(
    to: Type,
    from: Type,
    rounding: Option<Rounding>,
    integral: bool,
    mode: FloatMode,
    a: Source<'_>,
    wide: bool,
) -> Lanes {
    let bits = match (to.float(), from.float()) {
        (false, false) if !mode.sat => map(&a.extended(from), |x| extend(to, x)),
        _ => map(&a.extended(if from.float() { Type::B64 } else { from }), |x| {
            convert_one(to, from, rounding, integral, mode, x)
        }),
    };
    if wide { Lanes::Wide(bits) } else { Lanes::Narrow(map(&bits, |x| x as u32)) }
}

fn convert_one(
    to: Type,
    from: Type,
    rounding: Option<Rounding>,
    integral: bool,
    mode: FloatMode,
    x: u64,
) -> u64 {
    let nearest = rounding.unwrap_or(Rounding::Nearest);
    if !from.float() {
        let value = if from.signed() { i128::from(x as i64) } else { i128::from(x) };
        return match to {
            Type::F64 => (value as f64).to_bits(),
            // Beyond 53 bits the value is no f64, but then it is rounded to the nearest anyway.
            Type::F32 if value.abs() > 1 << 53 => u64::from((value as f32).to_bits()),
            _ if to.float() => u64::from(Format::of(to).round(value as f64, nearest)),
            _ => clamp(to, value),
        };
    }
    let value = match from {
        Type::F64 => f64::from_bits(x),
        Type::F32 => f64::from(operand(mode, x as u32)),
        Type::F16 => f64::from(f16(x as u32 & 0xFFFF)),
        _ => f64::from(bf16(x as u32 & 0xFFFF)),
    };
    let whole = |value: f64| match nearest {
        Rounding::Nearest => value.round_ties_even(),
        Rounding::Zero => value.trunc(),
        Rounding::Down => value.floor(),
        Rounding::Up => value.ceil(),
    };
    if !to.float() {
        // `as` saturates and makes 0 of a NaN, as `cvt` does.
        return clamp(to, whole(value) as i128);
    }
    let value = if integral { whole(value) } else { value };
    let value = if mode.sat { f64::from(saturate(value as f32)) } else { value };
    let value = if mode.relu && value < 0.0 { 0.0 } else { value };
    match to {
        Type::F64 => value.to_bits(),
        Type::F32 => {
            let rounded = Format::of(to).round(value, nearest);
            u64::from(if mode.ftz { flush(f32::from_bits(rounded)).to_bits() } else { rounded })
        }
        _ => u64::from(Format::of(to).round(value, nearest)),
    }
}

/// An integer cut to the range of a type.
fn clamp(to: Type, value: i128) -> u64 {
    let bits = to.bits();
    let (low, high) = if to.signed() {
        (-1i128 << (bits - 1), (1i128 << (bits - 1)) - 1)
    } else {
        (0, (1i128 << bits) - 1)
    };
    value.clamp(low, high) as u64
}

/// `cvt.rn.bf16x2.f32`: two f32 to a pair, `a` the upper half.
pub fn convert_pair(to: Type, rounding: Rounding, relu: bool, a: &Narrow, b: &Narrow) -> Narrow {
    let positive = |bits: u32| match f32::from_bits(bits) {
        value if relu && value < 0.0 => 0.0,
        value => value,
    };
    if to == Type::Bf16x2 && rounding == Rounding::Nearest {
        return map2(a, b, |high, low| to_bf16(positive(high)) << 16 | to_bf16(positive(low)));
    }
    let half = |bits: u32| Format::of(to).round(f64::from(positive(bits)), rounding);
    map2(a, b, |high, low| half(high) << 16 | half(low))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn narrow(lanes: Lanes) -> u32 {
        match lanes {
            Lanes::Narrow(lanes) => lanes[0],
            Lanes::Wide(lanes) => panic!("{lanes:?}"),
        }
    }

    fn two(op: BinaryOp, ty: Type, a: u32, b: u32) -> u32 {
        narrow(binary(op, ty, FloatMode::default(), Source::Narrow(&[a; 32]), Source::Narrow(&[b; 32])))
    }

    fn three(op: TernaryOp, ty: Type, a: u32, b: u32, c: u32) -> u32 {
        let [a, b, c] = [[a; 32], [b; 32], [c; 32]];
        narrow(ternary(
            op,
            ty,
            FloatMode::default(),
            Source::Narrow(&a),
            Source::Narrow(&b),
            Source::Narrow(&c),
        ))
    }

    #[test]
    fn narrow_integers_ignore_what_lies_above_them() {
        assert_eq!(two(BinaryOp::Div, Type::S16, 0x1234_FFF8, 0x9999_0002) as u16 as i16, -4);
        assert_eq!(two(BinaryOp::MulHi, Type::U16, 0xFFFF, 0xFFFF) & 0xFFFF, 0xFFFE);
        assert_eq!(two(BinaryOp::Shr, Type::S32, 0x8000_0000, 40), 0xFFFF_FFFF);
        assert_eq!(two(BinaryOp::Shl, Type::B32, 1, 32), 0);
        assert_eq!(two(BinaryOp::Rem, Type::S32, -7i32 as u32, 3) as i32, -1);
    }

    #[test]
    fn a_number_wins_over_a_nan() {
        let (nan, one) = (f32::NAN.to_bits(), 1f32.to_bits());
        assert_eq!(two(BinaryOp::Max, Type::F32, nan, one), one);
        assert_eq!(two(BinaryOp::Min, Type::F32, one, nan), one);
        let zeros = (0f32.to_bits(), (-0f32).to_bits());
        assert_eq!(two(BinaryOp::Max, Type::F32, zeros.1, zeros.0), zeros.0);
        assert_eq!(two(BinaryOp::Min, Type::F32, zeros.0, zeros.1), zeros.1);
        assert_eq!(two(BinaryOp::Add, Type::Bf16x2, 0x3F80_4000, 0x3F80_4000), 0x4000_4080);
    }

    #[test]
    fn bits_are_moved_as_the_isa_says() {
        assert_eq!(three(TernaryOp::Prmt, Type::B32, 0x4433_2211, 0x8877_6655, 0x7410), 0x8855_2211);
        assert_eq!(three(TernaryOp::Prmt, Type::B32, 0x4433_2211, 0x8877_6655, 0x000F), 0x1111_11FF);
        assert_eq!(three(TernaryOp::Bfe, Type::U32, 0xABCD_1234, 8, 8), 0x12);
        assert_eq!(three(TernaryOp::Bfe, Type::S32, 0x0000_8000, 8, 8), 0xFFFF_FF80);
        assert_eq!(three(TernaryOp::Bfe, Type::S32, 0x8000_0000, 28, 8), 0xFFFF_FFF8);
        assert_eq!(three(TernaryOp::Bfe, Type::U32, 0xFFFF_FFFF, 0, 0), 0);
        assert_eq!(three(TernaryOp::Lop3(0x96), Type::B32, 0b1100, 0b1010, 0b0110), 0);
        assert_eq!(three(TernaryOp::Lop3(0xF8), Type::B32, 1, 6, 10), 3);
        assert_eq!(three(TernaryOp::FunnelLeft { clamp: false }, Type::B32, 0x8000_0000, 1, 1), 3);
        assert_eq!(three(TernaryOp::Dp4a(true, false), Type::S32, 0x0000_01FF, 0x0000_0302, 10), 11);
    }

    #[test]
    fn conversions_saturate_and_round() {
        let to = |to, from, rounding, bits: u32| {
            let mode = FloatMode::default();
            narrow(convert(to, from, Some(rounding), true, mode, Source::Narrow(&[bits; 32]), false))
        };
        assert_eq!(to(Type::S32, Type::F32, Rounding::Zero, (-1.5f32).to_bits()) as i32, -1);
        assert_eq!(to(Type::S32, Type::F32, Rounding::Zero, 1e20f32.to_bits()) as i32, i32::MAX);
        assert_eq!(to(Type::U32, Type::F32, Rounding::Nearest, f32::NAN.to_bits()), 0);
        assert_eq!(to(Type::U8, Type::F32, Rounding::Nearest, 300f32.to_bits()), 255);
        assert_eq!(to(Type::S32, Type::S8, Rounding::Zero, 0x1280), 0xFFFF_FF80);
        assert_eq!(to(Type::F32, Type::S32, Rounding::Nearest, -3i32 as u32), (-3f32).to_bits());
        assert_eq!(to(Type::F32, Type::F32, Rounding::Nearest, 2.5f32.to_bits()), 2f32.to_bits());
    }

    #[test]
    fn comparisons_of_a_nan() {
        let of = |cmp| {
            compare(cmp, Type::F32, false, Source::Narrow(&[0x7FC0_0000; 32]), Source::Narrow(&[0; 32]))
        };
        for cmp in [Comparison::Equ, Comparison::Neu, Comparison::Ltu, Comparison::Geu, Comparison::Nan] {
            assert_eq!(of(cmp), u32::MAX, "{cmp:?}");
        }
        for cmp in [Comparison::Eq, Comparison::Ne, Comparison::Lt, Comparison::Ge, Comparison::Num] {
            assert_eq!(of(cmp), 0, "{cmp:?}");
        }
    }
}
