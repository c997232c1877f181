//! Forms of instructions that each lane does for itself: arithmetic, conversions, comparisons, bits.

use super::inputs::{Random, every, several};
use super::oracle::{Expected, exactly, flush, fused, near, nearest, value, within_ulps};
use super::{Expected::Bits, Form, name_of};
use crate::ptx::Type::{self, *};
use std::cmp::Ordering::{self, Equal, Greater, Less};

/// Threads of a CTA.
const THREADS: usize = 128;
/// Threads of a form with several operands.
const SEVERAL: usize = 1024;

/// A result of the type, from operands; those that an instruction lacks are 0.
type OfFloats = fn(Type, [f64; 3]) -> Expected;
/// A result of the type, from an operand.
type OfFloat = fn(Type, f64) -> Expected;
/// The bits of a result, from operands; what lies above its type does not count.
type OfIntegers = fn([u64; 3]) -> u64;

/// All of them.
pub fn forms() -> Vec<Form> {
    let mut forms = Vec::new();
    for &(name, ty, count, gives) in FLOATS {
        forms.push(form(name, &vec![ty; count], ty, |operands| of_floats(ty, ty, operands, gives)));
    }
    for &(name, from, to, gives) in CONVERSIONS {
        forms.push(form(name, &[from], to, |operands| {
            of_floats(from, to, operands, |to, [a, ..]| gives(to, a))
        }));
    }
    for &(name, types, to, gives) in INTEGERS {
        let mask = u64::MAX >> (64 - to.bits());
        let of = |operands: &[u64]| gives(std::array::from_fn(|at| operands.get(at).copied().unwrap_or(0)));
        forms.push(form(name, types, to, |operands| vec![Bits(of(operands) & mask)]));
    }
    for table in [0x96, 0xE8, 0xF8, 0x1B] {
        let (name, body) =
            (format!("lop3.b32, table {table:#x}"), format!("lop3.b32 %d0, %a0, %a1, %a2, {table};"));
        forms.push(form_of(&name, &body, &[B32; 3], &[B32], |operands| vec![Bits(lop3(table, operands))]));
    }
    for pair in [F16x2, Bf16x2] {
        let half = if pair == F16x2 { F16 } else { Bf16 };
        for (name, round, relu) in [
            ("rn", f64::round_ties_even as fn(f64) -> f64, false),
            ("rz", f64::trunc, false),
            ("rn.relu", f64::round_ties_even, true),
        ] {
            let name = format!("cvt.{name}.{}.f32", name_of(pair));
            // The first operand is the upper half.
            let half = move |bits: u64| {
                let x = value(F32, bits);
                if relu && x <= 0.0 { Expected::Within(half, 0.0, 0.0) } else { exactly(half, x, round) }
            };
            forms.push(form(&name, &[F32, F32], pair, |operands| vec![half(operands[1]), half(operands[0])]));
        }
    }
    for ty in [F32, F64, F16, S32, U32, S64, U64, B32, B64] {
        forms.extend(comparisons(ty));
    }
    for ty in [B16, B32, B64, F32, F64] {
        let name = format!("selp.{}", name_of(ty));
        let body = format!("setp.ne.b32 %p0, %a2, 0;\n{name} %d0, %a0, %a1, %p0;");
        forms.push(form_of(&name, &body, &[ty, ty, B32], &[ty], |a| {
            vec![Bits(if a[2] != 0 { a[0] } else { a[1] })]
        }));
    }
    for ty in [B16, B32, B64] {
        forms.push(form(&format!("mov.{}", name_of(ty)), &[ty], ty, |operands| vec![Bits(operands[0])]));
    }
    forms.extend(PREDICATES.iter().map(|&(name, count, of)| {
        let sources = &["%p0, %p1", "%p0"][2 - count];
        let body = format!(
            "and.b32 %r0, %a0, 1;\nsetp.ne.b32 %p0, %r0, 0;\nand.b32 %r1, %a1, 1;\nsetp.ne.b32 %p1, %r1, 0;\n\
             {name} %p2, {sources};\nselp.b32 %d0, 1, 0, %p2;"
        );
        form_of(name, &body, &[B32, B32], &[B32], |a| vec![Bits(of(a[0] & 1 == 1, a[1] & 1 == 1).into())])
    }));
    let body = "mov.b32 %d0, %a0;\nbra.uni OVER;\nadd.s32 %d0, %d0, 1;\nOVER:";
    forms.push(form_of("bra.uni", body, &[B32], &[B32], |operands| vec![Bits(operands[0])]));
    forms
}

/// An instruction whose name says what it is, with its operands in order.
fn form(name: &str, takes: &[Type], gives: Type, oracle: impl Fn(&[u64]) -> Vec<Expected>) -> Form {
    let operands: String = (0..takes.len()).map(|at| format!(", %a{at}")).collect();
    form_of(name, &format!("{name} %d0{operands};"), takes, &[gives], oracle)
}

fn form_of(
    name: &str,
    body: &str,
    takes: &[Type],
    gives: &[Type],
    oracle: impl Fn(&[u64]) -> Vec<Expected>,
) -> Form {
    let mut random = Random::of(name);
    let mut threads: Vec<Vec<u64>> = match takes {
        [one] => every(*one, &mut random).into_iter().map(|value| vec![value]).collect(),
        _ => (0..SEVERAL).map(|_| several(takes, &mut random)).collect(),
    };
    // What a division by zero gives, the ISA leaves open.
    if name.starts_with("rem.") || name.starts_with("div.") && takes[1] != F32 {
        threads.iter_mut().for_each(|operands| operands[1] = operands[1].max(1));
    }
    let ctas: Vec<_> = threads.chunks(THREADS).map(<[_]>::to_vec).collect();
    Form::new(name, body, [takes, gives], &ctas, |cta| cta.iter().map(|operands| oracle(operands)).collect())
}

/// Applies a function of numbers, to each half of pairs.
fn of_floats(
    from: Type,
    to: Type,
    operands: &[u64],
    gives: impl Fn(Type, [f64; 3]) -> Expected,
) -> Vec<Expected> {
    let (half, shifts): (Type, &[u32]) = match from {
        F16x2 => (F16, &[0, 16]),
        Bf16x2 => (Bf16, &[0, 16]),
        one => (one, &[0]),
    };
    let to = if shifts.len() == 2 { half } else { to };
    let number = |bits: u64| match half {
        U16 | U32 | U64 => bits as f64,
        S16 => f64::from(bits as i16),
        S32 => f64::from(bits as i32),
        S64 => bits as i64 as f64,
        float => value(float, bits),
    };
    let at = |shift: u32| {
        gives(to, std::array::from_fn(|at| operands.get(at).map_or(0.0, |bits| number(bits >> shift))))
    };
    shifts.iter().map(|&shift| at(shift)).collect()
}

/// f32 arithmetic, rounded once, which is the language's.
fn single(x: f32) -> Expected {
    nearest(F32, x.into())
}

/// The same, of an instruction with `.ftz`.
fn flushed(x: f32) -> Expected {
    nearest(F32, flush(x.into()))
}

/// An f32 as it is, or as `.ftz` takes it.
fn z(x: f64) -> f32 {
    flush(x) as f32
}

/// An approximation with `.ftz`: where it may be subnormal it may be zero.
fn or_flushed(x: f64, expected: Expected) -> Expected {
    match expected {
        Expected::Within(ty, low, high) if x.abs() < 1.0001 * f64::from(f32::MIN_POSITIVE) => {
            Expected::Within(ty, low.min(0.0), high.max(0.0))
        }
        other => other,
    }
}

/// "The maximum ulp error is 2 ulp from correctly rounded result across the full range of inputs", and of zeros 1.0 (PTX ISA,
/// "Floating Point Instructions: ex2").
fn ex2(a: f64) -> Expected {
    if a == 0.0 { nearest(F32, 1.0) } else { within_ulps(F32, a.exp2(), 2.0) }
}

/// "The maximum absolute error is 2^-22 when the input operand is in the range (0.5, 2). For positive finite inputs outside of
/// this interval, maximum relative error is 2^-22" (PTX ISA, "Floating Point Instructions: lg2").
fn lg2(a: f64) -> Expected {
    let scale = if 0.5 < a && a < 2.0 { 1.0 } else { a.log2().abs() };
    near(F32, a.log2(), scale * 2f64.powi(-22))
}

/// "The maximum ulp error is 1 across the full range of inputs" (PTX ISA, "Floating Point Instructions: rcp").
fn rcp(a: f64) -> Expected {
    within_ulps(F32, 1.0 / a, 1.0)
}

/// "The maximum relative error for `rsqrt.f32` over the entire positive finite floating-point range is 2^-22.9" (PTX ISA,
/// "Floating Point Instructions: rsqrt").
fn rsqrt(a: f64) -> Expected {
    near(F32, 1.0 / a.sqrt(), 2f64.powf(-22.9) / a.sqrt())
}

/// "The maximum relative error over the entire positive finite floating-point range is 2^-23" (PTX ISA, "Floating Point
/// Instructions: sqrt").
fn sqrt(a: f64) -> Expected {
    near(F32, a.sqrt(), a.sqrt() * 2f64.powi(-23))
}

/// "The maximum relative error for `.f16` type is 2^-9.9" (PTX ISA, "Half Precision Floating Point Instructions: ex2").
fn half_ex2(ty: Type, a: f64) -> Expected {
    near(ty, a.exp2(), a.exp2() * 2f64.powf(-9.9))
}

/// The lesser number; -0 is less than +0. A number is less than a NaN, unless `nan` wins.
fn least(nan: bool, a: f64, b: f64) -> f64 {
    match (a.is_nan(), b.is_nan()) {
        (false, false) => {
            if a.total_cmp(&b).is_le() {
                a
            } else {
                b
            }
        }
        (true, true) => a,
        _ if nan => f64::NAN,
        (a_nan, _) => {
            if a_nan {
                b
            } else {
                a
            }
        }
    }
}

fn most(nan: bool, a: f64, b: f64) -> f64 {
    -least(nan, -a, -b)
}

/// `fma` with `.relu`: what is negative is 0.
fn relu(ty: Type, x: f64) -> Expected {
    if x <= 0.0 { Expected::Within(ty, 0.0, 0.0) } else { nearest(ty, x) }
}

/// Name; type of operands and result; how many operands; the result of their values.
#[rustfmt::skip] // a table: one form a line
const FLOATS: &[(&str, Type, usize, OfFloats)] = &[
    ("add.rn.f32", F32, 2, |_, [a, b, _]| single(a as f32 + b as f32)),
    ("add.rn.ftz.f32", F32, 2, |_, [a, b, _]| flushed(z(a) + z(b))),
    ("sub.rn.f32", F32, 2, |_, [a, b, _]| single(a as f32 - b as f32)),
    ("mul.rn.f32", F32, 2, |_, [a, b, _]| single(a as f32 * b as f32)),
    ("mul.rn.ftz.f32", F32, 2, |_, [a, b, _]| flushed(z(a) * z(b))),
    ("div.rn.f32", F32, 2, |_, [a, b, _]| single(a as f32 / b as f32)),
    ("fma.rn.f32", F32, 3, |_, [a, b, c]| single((a as f32).mul_add(b as f32, c as f32))),
    ("fma.rn.ftz.f32", F32, 3, |_, [a, b, c]| flushed(z(a).mul_add(z(b), z(c)))),
    ("min.f32", F32, 2, |t, [a, b, _]| nearest(t, least(false, a, b))),
    ("max.f32", F32, 2, |t, [a, b, _]| nearest(t, most(false, a, b))),
    ("min.NaN.f32", F32, 2, |t, [a, b, _]| nearest(t, least(true, a, b))),
    ("max.NaN.f32", F32, 2, |t, [a, b, _]| nearest(t, most(true, a, b))),
    ("neg.f32", F32, 1, |t, [a, ..]| nearest(t, -a)),
    ("abs.f32", F32, 1, |t, [a, ..]| nearest(t, a.abs())),
    ("rcp.rn.f32", F32, 1, |_, [a, ..]| single(1.0 / a as f32)),
    ("sqrt.rn.f32", F32, 1, |_, [a, ..]| single((a as f32).sqrt())),
    ("ex2.approx.f32", F32, 1, |_, [a, ..]| ex2(a)),
    ("ex2.approx.ftz.f32", F32, 1, |_, [a, ..]| or_flushed(flush(a).exp2(), ex2(flush(a)))),
    ("lg2.approx.f32", F32, 1, |_, [a, ..]| lg2(a)),
    ("lg2.approx.ftz.f32", F32, 1, |_, [a, ..]| or_flushed(flush(a).log2(), lg2(flush(a)))),
    ("rcp.approx.f32", F32, 1, |_, [a, ..]| rcp(a)),
    ("rcp.approx.ftz.f32", F32, 1, |_, [a, ..]| or_flushed(1.0 / flush(a), rcp(flush(a)))),
    ("rsqrt.approx.f32", F32, 1, |_, [a, ..]| rsqrt(a)),
    ("rsqrt.approx.ftz.f32", F32, 1, |_, [a, ..]| or_flushed(1.0 / flush(a).sqrt(), rsqrt(flush(a)))),
    ("sqrt.approx.f32", F32, 1, |_, [a, ..]| sqrt(a)),
    ("sqrt.approx.ftz.f32", F32, 1, |_, [a, ..]| or_flushed(flush(a).sqrt(), sqrt(flush(a)))),
    // "The maximum relative error over the entire floating point range is 2^-11" (PTX ISA, "Floating Point Instructions: tanh").
    ("tanh.approx.f32", F32, 1, |t, [a, ..]| near(t, a.tanh(), a.tanh().abs() * 2f64.powi(-11))),
    ("add.rn.f64", F64, 2, |t, [a, b, _]| nearest(t, a + b)),
    ("mul.rn.f64", F64, 2, |t, [a, b, _]| nearest(t, a * b)),
    ("fma.rn.f64", F64, 3, |t, [a, b, c]| nearest(t, a.mul_add(b, c))),
    ("neg.f64", F64, 1, |t, [a, ..]| nearest(t, -a)),
    ("abs.f64", F64, 1, |t, [a, ..]| nearest(t, a.abs())),
    ("add.rn.f16", F16, 2, |t, [a, b, _]| nearest(t, a + b)),
    ("add.rn.f16x2", F16x2, 2, |t, [a, b, _]| nearest(t, a + b)),
    ("sub.rn.f16x2", F16x2, 2, |t, [a, b, _]| nearest(t, a - b)),
    ("mul.rn.f16", F16, 2, |t, [a, b, _]| nearest(t, a * b)),
    ("mul.rn.f16x2", F16x2, 2, |t, [a, b, _]| nearest(t, a * b)),
    ("fma.rn.f16", F16, 3, |t, [a, b, c]| nearest(t, fused(a, b, c))),
    ("fma.rn.f16x2", F16x2, 3, |t, [a, b, c]| nearest(t, fused(a, b, c))),
    ("fma.rn.relu.f16x2", F16x2, 3, |t, [a, b, c]| relu(t, fused(a, b, c))),
    ("fma.rn.bf16", Bf16, 3, |t, [a, b, c]| nearest(t, fused(a, b, c))),
    ("fma.rn.bf16x2", Bf16x2, 3, |t, [a, b, c]| nearest(t, fused(a, b, c))),
    ("fma.rn.relu.bf16x2", Bf16x2, 3, |t, [a, b, c]| relu(t, fused(a, b, c))),
    ("min.f16x2", F16x2, 2, |t, [a, b, _]| nearest(t, least(false, a, b))),
    ("max.f16x2", F16x2, 2, |t, [a, b, _]| nearest(t, most(false, a, b))),
    ("max.NaN.f16", F16, 2, |t, [a, b, _]| nearest(t, most(true, a, b))),
    ("min.bf16x2", Bf16x2, 2, |t, [a, b, _]| nearest(t, least(false, a, b))),
    ("max.bf16x2", Bf16x2, 2, |t, [a, b, _]| nearest(t, most(false, a, b))),
    ("max.NaN.bf16x2", Bf16x2, 2, |t, [a, b, _]| nearest(t, most(true, a, b))),
    ("neg.f16x2", F16x2, 1, |t, [a, ..]| nearest(t, -a)),
    ("neg.bf16x2", Bf16x2, 1, |t, [a, ..]| nearest(t, -a)),
    ("abs.f16x2", F16x2, 1, |t, [a, ..]| nearest(t, a.abs())),
    ("abs.bf16x2", Bf16x2, 1, |t, [a, ..]| nearest(t, a.abs())),
    ("ex2.approx.f16", F16, 1, |t, [a, ..]| half_ex2(t, a)),
    ("ex2.approx.f16x2", F16x2, 1, |t, [a, ..]| half_ex2(t, a)),
    // "The maximum absolute error for `.f16` type is 2^-10.987" (PTX ISA, "Half Precision Floating Point Instructions: tanh").
    ("tanh.approx.f16x2", F16x2, 1, |t, [a, ..]| near(t, a.tanh(), 2f64.powf(-10.987))),
];

/// Name, from, to, the result of the operand's value.
#[rustfmt::skip] // a table
const CONVERSIONS: &[(&str, Type, Type, OfFloat)] = &[
    ("cvt.rn.f16.f32", F32, F16, nearest),
    ("cvt.rz.f16.f32", F32, F16, |t, a| exactly(t, a, f64::trunc)),
    ("cvt.rn.bf16.f32", F32, Bf16, nearest),
    ("cvt.rz.bf16.f32", F32, Bf16, |t, a| exactly(t, a, f64::trunc)),
    ("cvt.rn.relu.bf16.f32", F32, Bf16, relu),
    ("cvt.f32.f16", F16, F32, nearest),
    ("cvt.f64.f32", F32, F64, nearest),
    ("cvt.rn.f32.f64", F64, F32, nearest),
    ("cvt.rni.f32.f32", F32, F32, |t, a| nearest(t, a.round_ties_even())),
    ("cvt.rzi.f32.f32", F32, F32, |t, a| nearest(t, a.trunc())),
    ("cvt.rmi.f32.f32", F32, F32, |t, a| nearest(t, a.floor())),
    ("cvt.rpi.f32.f32", F32, F32, |t, a| nearest(t, a.ceil())),
    ("cvt.sat.f32.f32", F32, F32, |t, a| if a > 0.0 { nearest(t, a.min(1.0)) } else { Expected::Within(t, 0.0, 0.0) }),
    ("cvt.rn.f32.s32", S32, F32, nearest),
    ("cvt.rn.f32.u32", U32, F32, nearest),
    ("cvt.rn.f64.s32", S32, F64, nearest),
    ("cvt.rn.f16.s16", S16, F16, nearest),
    // The language's conversions cut at the ends and make 0 of a NaN, as the ISA wants it.
    ("cvt.rni.s32.f32", F32, S32, |_, a| Bits(u64::from(a.round_ties_even() as i32 as u32))),
    ("cvt.rzi.s32.f32", F32, S32, |_, a| Bits(u64::from(a.trunc() as i32 as u32))),
    ("cvt.rmi.s32.f32", F32, S32, |_, a| Bits(u64::from(a.floor() as i32 as u32))),
    ("cvt.rzi.u32.f32", F32, U32, |_, a| Bits(u64::from(a.trunc() as u32))),
];

fn signed(x: u64) -> i32 {
    x as i32
}

/// Name, operands, result, the bits of the result.
#[rustfmt::skip] // a table
const INTEGERS: &[(&str, &[Type], Type, OfIntegers)] = &[
    ("add.s32", &[S32, S32], S32, |[a, b, _]| a.wrapping_add(b)),
    ("add.sat.s32", &[S32, S32], S32, |[a, b, _]| signed(a).saturating_add(signed(b)) as u64),
    ("add.s16", &[S16, S16], S16, |[a, b, _]| a.wrapping_add(b)),
    ("add.s64", &[S64, S64], S64, |[a, b, _]| a.wrapping_add(b)),
    ("sub.s32", &[S32, S32], S32, |[a, b, _]| a.wrapping_sub(b)),
    ("mul.lo.s32", &[S32, S32], S32, |[a, b, _]| a.wrapping_mul(b)),
    ("mul.lo.s64", &[S64, S64], S64, |[a, b, _]| a.wrapping_mul(b)),
    ("mul.hi.u32", &[U32, U32], U32, |[a, b, _]| (a * b) >> 32),
    ("mul.hi.s32", &[S32, S32], S32, |[a, b, _]| ((i64::from(signed(a)) * i64::from(signed(b))) >> 32) as u64),
    ("mul.wide.u16", &[U16, U16], U32, |[a, b, _]| a * b),
    ("mul.wide.s16", &[S16, S16], S32, |[a, b, _]| (i32::from(a as i16) * i32::from(b as i16)) as u64),
    ("mul.wide.u32", &[U32, U32], U64, |[a, b, _]| a * b),
    ("mul.wide.s32", &[S32, S32], S64, |[a, b, _]| (i64::from(signed(a)) * i64::from(signed(b))) as u64),
    ("mad.lo.s32", &[S32, S32, S32], S32, |[a, b, c]| a.wrapping_mul(b).wrapping_add(c)),
    ("mad.wide.u32", &[U32, U32, U64], U64, |[a, b, c]| (a * b).wrapping_add(c)),
    ("div.s32", &[S32, S32], S32, |[a, b, _]| signed(a).wrapping_div(signed(b)) as u64),
    ("div.u32", &[U32, U32], U32, |[a, b, _]| a / b),
    ("rem.s32", &[S32, S32], S32, |[a, b, _]| signed(a).wrapping_rem(signed(b)) as u64),
    ("rem.u32", &[U32, U32], U32, |[a, b, _]| a % b),
    ("min.s32", &[S32, S32], S32, |[a, b, _]| signed(a).min(signed(b)) as u64),
    ("max.s32", &[S32, S32], S32, |[a, b, _]| signed(a).max(signed(b)) as u64),
    ("min.u32", &[U32, U32], U32, |[a, b, _]| a.min(b)),
    ("max.s16", &[S16, S16], S16, |[a, b, _]| (a as i16).max(b as i16) as u64),
    ("neg.s32", &[S32], S32, |[a, ..]| a.wrapping_neg()),
    ("abs.s32", &[S32], S32, |[a, ..]| signed(a).wrapping_abs() as u64),
    ("and.b32", &[B32, B32], B32, |[a, b, _]| a & b),
    ("and.b16", &[B16, B16], B16, |[a, b, _]| a & b),
    ("and.b64", &[B64, B64], B64, |[a, b, _]| a & b),
    ("or.b64", &[B64, B64], B64, |[a, b, _]| a | b),
    ("xor.b64", &[B64, B64], B64, |[a, b, _]| a ^ b),
    ("xor.b32", &[B32, B32], B32, |[a, b, _]| a ^ b),
    ("not.b32", &[B32], B32, |[a, ..]| !a),
    ("cnot.b32", &[B32], B32, |[a, ..]| u64::from(a == 0)),
    // A count beyond the width shifts everything out.
    ("shl.b32", &[B32, U32], B32, |[a, n, _]| if n < 32 { a << n } else { 0 }),
    ("shl.b64", &[B64, U32], B64, |[a, n, _]| if n < 64 { a << n } else { 0 }),
    ("shr.u32", &[U32, U32], U32, |[a, n, _]| if n < 32 { a >> n } else { 0 }),
    ("shr.s32", &[S32, U32], S32, |[a, n, _]| (signed(a) >> n.min(31)) as u64),
    ("shr.u16", &[U16, U32], U16, |[a, n, _]| if n < 16 { a >> n } else { 0 }),
    ("shr.s64", &[S64, U32], S64, |[a, n, _]| (a as i64 >> n.min(63)) as u64),
    ("popc.b32", &[B32], U32, |[a, ..]| a.count_ones().into()),
    ("popc.b64", &[B64], U32, |[a, ..]| a.count_ones().into()),
    ("clz.b32", &[B32], U32, |[a, ..]| (a as u32).leading_zeros().into()),
    ("brev.b32", &[B32], B32, |[a, ..]| (a as u32).reverse_bits().into()),
    ("bfe.u32", &[U32, U32, U32], U32, |[a, from, count]| field(a.into(), false, from, count)),
    ("bfe.s32", &[S32, U32, U32], S32, |[a, from, count]| field(signed(a).into(), true, from, count)),
    ("bfe.u64", &[U64, U32, U32], U64, |[a, from, count]| field(a.into(), false, from, count)),
    ("prmt.b32", &[B32, B32, B32], B32, |[a, b, pick]| permuted(a | b << 32, pick)),
    ("shf.l.wrap.b32", &[B32, B32, U32], B32, |[low, high, n]| (high << 32 | low) << (n & 31) >> 32),
    ("shf.r.wrap.b32", &[B32, B32, U32], B32, |[low, high, n]| (high << 32 | low) >> (n & 31)),
    ("shf.l.clamp.b32", &[B32, B32, U32], B32, |[low, high, n]| (high << 32 | low) << n.min(32) >> 32),
    ("shf.r.clamp.b32", &[B32, B32, U32], B32, |[low, high, n]| (high << 32 | low) >> n.min(32)),
    ("dp4a.s32.s32", &[B32, B32, S32], S32, |[a, b, c]| c.wrapping_add(dot(a, b, |x| (x as i8).into(), |x| (x as i8).into()))),
    ("dp4a.s32.u32", &[B32, B32, S32], S32, |[a, b, c]| c.wrapping_add(dot(a, b, |x| (x as i8).into(), u8::into))),
    ("dp4a.u32.u32", &[B32, B32, U32], U32, |[a, b, c]| c.wrapping_add(dot(a, b, u8::into, u8::into))),
    ("cvt.u64.u32", &[U32], U64, |[a, ..]| a),
    ("cvt.s64.s32", &[S32], S64, |[a, ..]| i64::from(signed(a)) as u64),
    ("cvt.u32.u64", &[U64], U32, |[a, ..]| a),
    ("cvt.u16.u32", &[U32], U16, |[a, ..]| a),
    ("cvt.u32.u16", &[U16], U32, |[a, ..]| a),
    ("cvt.s32.s16", &[S16], S32, |[a, ..]| i64::from(a as i16) as u64),
    ("cvt.s32.s8", &[S8], S32, |[a, ..]| i64::from(a as i8) as u64),
    ("cvt.sat.u8.s32", &[S32], U8, |[a, ..]| signed(a).clamp(0, 255) as u64),
];

/// `count` bits from `from` on, of a signed integer the last of them copied (PTX ISA, "bfe").
fn field(a: i128, signed: bool, from: u64, count: u64) -> u64 {
    let (shifted, count) = (a >> (from & 0xFF).min(127), (count & 0xFF).min(64));
    match count {
        0 => 0,
        count if signed => (shifted << (128 - count) >> (128 - count)) as u64,
        count => (shifted & ((1 << count) - 1)) as u64,
    }
}

/// Bytes of eight that four numbers of four bits pick; the highest bit of such a number asks for copies of the byte's sign.
fn permuted(bytes: u64, pick: u64) -> u64 {
    let byte = |pick: u64| match bytes >> (8 * (pick & 7)) & 0xFF {
        byte if pick & 8 == 0 => byte,
        byte => {
            if byte & 0x80 == 0 {
                0
            } else {
                0xFF
            }
        }
    };
    (0..4).map(|at| byte(pick >> (4 * at) & 15) << (8 * at)).sum()
}

fn dot(a: u64, b: u64, of_a: fn(u8) -> i64, of_b: fn(u8) -> i64) -> u64 {
    let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
    (0..4).map(|at| of_a(a[at]) * of_b(b[at])).sum::<i64>() as u64
}

/// Bit by bit, the bit of the table that the three say (PTX ISA, "lop3").
fn lop3(table: u64, operands: &[u64]) -> u64 {
    let bit = |at: u32| operands.iter().fold(0, |index, operand| 2 * index + (operand >> at & 1));
    (0..32).map(|at| (table >> bit(at) & 1) << at).sum()
}

/// A predicate of two.
type OfPredicates = fn(bool, bool) -> bool;

/// Name; how many predicates it takes; the one that it gives.
#[rustfmt::skip] // a table
const PREDICATES: &[(&str, usize, OfPredicates)] = &[
    ("and.pred", 2, |a, b| a && b),
    ("or.pred", 2, |a, b| a || b),
    ("xor.pred", 2, |a, b| a != b),
    ("not.pred", 1, |a, _| !a),
    ("mov.pred", 1, |a, _| a),
];

/// Name; the orders in which it holds; does it hold if one is a NaN?
#[rustfmt::skip] // a table
const COMPARISONS: [(&str, &[Ordering], bool); 14] = [
    ("eq", &[Equal], false), ("ne", &[Less, Greater], false), ("lt", &[Less], false), ("le", &[Less, Equal], false),
    ("gt", &[Greater], false), ("ge", &[Greater, Equal], false), ("equ", &[Equal], true), ("neu", &[Less, Greater], true),
    ("ltu", &[Less], true), ("leu", &[Less, Equal], true), ("gtu", &[Greater], true), ("geu", &[Greater, Equal], true),
    ("num", &[Less, Equal, Greater], false), ("nan", &[], true),
];

/// `setp` for all comparisons that the type has.
fn comparisons(ty: Type) -> impl Iterator<Item = Form> {
    let order = move |a: u64, b: u64| match ty {
        S32 => Some(signed(a).cmp(&signed(b))),
        S64 => Some((a as i64).cmp(&(b as i64))),
        _ if ty.float() => value(ty, a).partial_cmp(&value(ty, b)),
        _ => Some(a.cmp(&b)),
    };
    let count = if ty.float() {
        14
    } else if matches!(ty, B32 | B64) {
        2
    } else {
        6
    };
    COMPARISONS[..count].iter().map(move |&(name, holds, nan)| {
        let name = format!("setp.{name}.{}", name_of(ty));
        let body = format!("{name} %p0, %a0, %a1;\nselp.b32 %d0, 1, 0, %p0;");
        form_of(&name, &body, &[ty, ty], &[B32], |operands| {
            let found = order(operands[0], operands[1]);
            vec![Bits(u64::from(found.map_or(nan, |order| holds.contains(&order))))]
        })
    })
}
