//! What instructions should give, in plain Rust from the PTX ISA: nothing here is shared with the emulator.

use crate::ptx::Type;

/// What one result may be. Halves of a pair are two results.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Expected {
    /// These bits.
    Bits(u64),
    /// A number of the type in this closed range; a zero has any sign.
    Within(Type, f64, f64),
    /// Any NaN of the type.
    Nan(Type),
}

impl Expected {
    /// Is a result right?
    pub fn holds(self, found: u64) -> bool {
        match self {
            Expected::Bits(bits) => found == bits,
            Expected::Within(ty, low, high) => (low..=high).contains(&value(ty, found)),
            Expected::Nan(ty) => value(ty, found).is_nan(),
        }
    }
}

/// How a number is rounded to a whole one.
pub type Round = fn(f64) -> f64;

/// A float from its bits.
pub fn value(ty: Type, bits: u64) -> f64 {
    match ty {
        Type::F32 => f64::from(f32::from_bits(bits as u32)),
        Type::F64 => f64::from_bits(bits),
        // A bf16 is the upper half of an f32.
        Type::Bf16 => f64::from(f32::from_bits((bits as u32 & 0xFFFF) << 16)),
        Type::F16 => {
            let (exponent, fraction) = (bits >> 10 & 0x1F, (bits & 0x3FF) as f64);
            let magnitude = match exponent {
                0 => fraction * 2f64.powi(-24),
                31 if fraction == 0.0 => f64::INFINITY,
                31 => f64::NAN,
                _ => (1024.0 + fraction) * 2f64.powi(exponent as i32 - 25),
            };
            if bits & 0x8000 == 0 { magnitude } else { -magnitude }
        }
        _ => unreachable!("the type is a float's"),
    }
}

/// Digits of the fraction, the exponent of the least normal number, and the largest one, of a float narrower than f64.
fn range(ty: Type) -> (i32, i32, f64) {
    match ty {
        Type::F16 => (10, -14, 65504.0),
        Type::Bf16 => (7, -126, value(Type::Bf16, 0x7F7F)),
        Type::F32 => (23, -126, f64::from(f32::MAX)),
        _ => unreachable!("the type is a float's, and narrower than f64"),
    }
}

/// The distance of numbers of the type about `x`.
fn step(ty: Type, x: f64) -> f64 {
    let (digits, least, _) = range(ty);
    let exponent = if x == 0.0 { least } else { ((x.abs().to_bits() >> 52) as i32 - 1023).max(least) };
    2f64.powi(exponent - digits)
}

/// `x` as a number of the type, or the infinity beyond it; rounded by `round`, which has `x` in units of the last place.
pub fn rounded(ty: Type, x: f64, round: Round) -> f64 {
    if !x.is_finite() || x == 0.0 {
        return x;
    }
    let (unit, (_, _, largest)) = (step(ty, x), range(ty));
    let near = round(x / unit) * unit;
    match near.abs() > largest {
        // To the nearest, what rounds beyond the largest is infinite; towards zero nothing is.
        true if round(0.75) == 1.0 => f64::INFINITY.copysign(x),
        true => largest.copysign(x),
        false => near.copysign(x),
    }
}

/// The bits of a number that the type has.
fn bits(ty: Type, x: f64) -> u64 {
    match ty {
        Type::F64 => x.to_bits(),
        Type::F32 => u64::from((x as f32).to_bits()),
        Type::Bf16 => u64::from((x as f32).to_bits() >> 16),
        Type::F16 => {
            let sign = u64::from(x.is_sign_negative()) << 15;
            let magnitude = match x.abs() {
                infinite if infinite == f64::INFINITY => 0x7C00,
                small if small < 2f64.powi(-14) => (small * 2f64.powi(24)) as u64,
                normal => {
                    let exponent = (normal.to_bits() >> 52) + 15 - 1023;
                    exponent << 10 | normal.to_bits() >> 42 & 0x3FF
                }
            };
            sign | magnitude
        }
        _ => unreachable!("the type is a float's"),
    }
}

/// `x`, rounded to the type.
pub fn exactly(ty: Type, x: f64, round: Round) -> Expected {
    if x.is_nan() {
        return Expected::Nan(ty);
    }
    Expected::Bits(bits(ty, if ty == Type::F64 { x } else { rounded(ty, x, round) }))
}

/// `x`, rounded to the nearest of the type.
pub fn nearest(ty: Type, x: f64) -> Expected {
    exactly(ty, x, f64::round_ties_even)
}

/// `x` or what differs from it by at most `error`, and by half a step. Zeros and infinities are themselves.
pub fn near(ty: Type, x: f64, error: f64) -> Expected {
    if x.is_nan() || x == 0.0 || x.is_infinite() {
        return nearest(ty, x);
    }
    let beyond = |x: f64| rounded(ty, x, f64::round_ties_even);
    let error = error.max(0.5 * step(ty, x));
    Expected::Within(ty, beyond(x - error), beyond(x + error))
}

/// `x` rounded to the type, or what differs from that by at most so many units in its last place. Zeros and infinities are
/// themselves.
pub fn within_ulps(ty: Type, x: f64, count: f64) -> Expected {
    if x.is_nan() || x == 0.0 || x.is_infinite() {
        return nearest(ty, x);
    }
    let (_, _, largest) = range(ty);
    let beyond = |x: f64| rounded(ty, x, f64::round_ties_even);
    let middle = beyond(x).clamp(-largest, largest);
    let error = count * step(ty, middle);
    Expected::Within(ty, beyond(middle - error), beyond(middle + error))
}

/// `x`, where subnormals of f32 count as zeros of their sign.
pub fn flush(x: f64) -> f64 {
    if x.abs() < f64::from(f32::MIN_POSITIVE) { 0.0f64.copysign(x) } else { x }
}

/// `a b + c` of halves, so that rounding it once more to their type rounds once.
///
/// The product is exact, the sum is rounded to 53 bits. That matters where the sum looks as if it lay halfway between two
/// halves; there it goes one step towards what was lost.
pub fn fused(a: f64, b: f64, c: f64) -> f64 {
    let product = a * b;
    let sum = product + c;
    let part = sum - product;
    let lost = (product - (sum - part)) + (c - part);
    match sum.to_bits().trailing_zeros() {
        30.. if lost > 0.0 => sum.next_up(),
        30.. if lost < 0.0 => sum.next_down(),
        _ => sum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_is_itself() {
        for ty in [Type::F16, Type::Bf16] {
            for bits in 0..=0xFFFF {
                assert!(nearest(ty, value(ty, bits)).holds(bits), "{ty:?} {bits:#x}");
            }
        }
    }

    #[test]
    fn numbers_are_rounded_as_they_should() {
        let to = |x, round: Round| rounded(Type::F16, x, round);
        assert_eq!([to(2049.0, f64::round_ties_even), to(2051.0, f64::round_ties_even)], [2048.0, 2052.0]);
        assert_eq!([to(-2051.0, f64::trunc), to(1e9, f64::trunc)], [-2050.0, 65504.0]);
        assert_eq!(
            [to(65519.9, f64::round_ties_even), to(65520.0, f64::round_ties_even)],
            [65504.0, f64::INFINITY]
        );
        // Halfway, and a little more that an f64 does not hold.
        assert_eq!(rounded(Type::Bf16, fused(1.0, 257.0, 1e-30), f64::round_ties_even), 258.0);
        assert_eq!(rounded(Type::Bf16, fused(1.0, 257.0, -1e-30), f64::round_ties_even), 256.0);
        assert!(
            near(Type::F32, 1.0, 0.0).holds(0x3F80_0000) && !near(Type::F32, 1.0, 0.0).holds(0x3F80_0001)
        );
        // Units in the last place are as many at the end of a binade as at its beginning.
        for middle in [0x3F80_0010, 0x3FFF_FFF0, 0x40] {
            let two = within_ulps(Type::F32, value(Type::F32, middle), 2.0);
            let held = (0..7).map(|at| two.holds(middle + at - 3));
            assert!(held.eq([false, true, true, true, true, true, false]), "{middle:#x}");
        }
    }
}
