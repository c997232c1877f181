//! Formats of floating-point numbers and their rounding.

use crate::ptx::{Rounding, Type};

/// A binary format of IEEE 754's kind: bits of the fraction and of the exponent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    fraction: u32,
    exponent: u32,
}

impl Format {
    /// The format of a floating-point type other than f64, or of one half of a pair.
    pub fn of(ty: Type) -> Format {
        match ty {
            Type::F16 | Type::F16x2 => Format { fraction: 10, exponent: 5 },
            Type::Bf16 | Type::Bf16x2 => Format { fraction: 7, exponent: 8 },
            _ => Format { fraction: 23, exponent: 8 },
        }
    }

    /// `value`, rounded once. A NaN becomes the one NaN that instructions make, all ones but the sign.
    pub fn round(self, value: f64, rounding: Rounding) -> u32 {
        let Format { fraction, exponent } = self;
        let sign = u32::from(value.is_sign_negative()) << (fraction + exponent);
        let infinity = ((1 << exponent) - 1) << fraction;
        if value.is_nan() {
            return infinity | ((1 << fraction) - 1);
        }
        if value.is_infinite() {
            return sign | infinity;
        }
        let least = 2 - (1 << (exponent - 1));
        let size = ((value.to_bits() >> 52 & 0x7FF) as i32 - 1023).max(least);
        let scaled = value.abs() * power_of_two(fraction as i32 - size);
        let (whole, rest) = (scaled.trunc() as u64, scaled.fract());
        let up = match rounding {
            Rounding::Nearest => rest > 0.5 || rest == 0.5 && whole % 2 == 1,
            Rounding::Zero => false,
            Rounding::Down => sign != 0 && rest > 0.0,
            Rounding::Up => sign == 0 && rest > 0.0,
        };
        // The hidden bit of a normal number adds one to the exponent's field.
        let bits = (((size - least) as u64) << fraction) + whole + u64::from(up);
        if bits < u64::from(infinity) {
            return sign | bits as u32;
        }
        let to_infinity = match rounding {
            Rounding::Nearest => true,
            Rounding::Zero => false,
            Rounding::Down => sign != 0,
            Rounding::Up => sign == 0,
        };
        sign | (infinity - u32::from(!to_infinity))
    }
}

/// `2^k` for `-1022 <= k <= 1023`.
pub fn power_of_two(k: i32) -> f64 {
    f64::from_bits(((k + 1023) as u64) << 52)
}

/// An f16 from its bits.
pub fn f16(bits: u32) -> f32 {
    let magnitude = match bits & 0x7FFF {
        special @ 0x7C00.. => f32::from_bits(special << 13 | 0x7F80_0000),
        // The fraction in its place, the exponent corrected; this also normalises subnormals.
        finite => f32::from_bits(finite << 13) * power_of_two(112) as f32,
    };
    if bits & 0x8000 == 0 { magnitude } else { -magnitude }
}

/// A bf16 from its bits.
pub fn bf16(bits: u32) -> f32 {
    f32::from_bits(bits << 16)
}

/// The nearest bf16, ties to even; what [`Format::round`] gives, for 32 lanes at once.
pub fn to_bf16(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    if value.is_nan() { 0x7FFF } else { rounded }
}

/// A subnormal becomes the zero of its sign.
pub fn flush(value: f32) -> f32 {
    if value.abs() < f32::MIN_POSITIVE { 0.0f32.copysign(value) } else { value }
}

/// `a + b`, of which the last bit says whether more follows: rounding it again to a narrower format rounds once.
///
/// Method: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd" (2008).
/// Without branches, for 32 lanes at once.
#[inline(always)]
pub fn sum_to_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    let part = sum - a;
    let rest = (a - (sum - part)) + (b - part);
    let bits = sum.to_bits();
    // The rest is no number where the sum is not finite: nothing is changed then.
    let step = u64::from(rest.abs() > 0.0) & !bits;
    let towards_zero = (rest.to_bits() ^ bits) >> 63;
    f64::from_bits(bits.wrapping_add(step.wrapping_sub(2 * (step & towards_zero))))
}

/// `a * b + c`, rounded once.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    // The product is exact.
    sum_to_odd(f64::from(a) * f64::from(b), f64::from(c)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_half_comes_back() {
        for bits in 0..=0xFFFF {
            for (ty, value) in [(Type::F16, f16(bits)), (Type::Bf16, bf16(bits))] {
                let again = Format::of(ty).round(f64::from(value), Rounding::Nearest);
                assert!(value.is_nan() || again == bits, "{bits:#x} {value}");
            }
        }
    }

    #[test]
    fn the_four_roundings_differ_where_they_should() {
        let all = |value: f64| {
            [Rounding::Nearest, Rounding::Zero, Rounding::Down, Rounding::Up]
                .map(|rounding| f16(Format::of(Type::F16).round(value, rounding)))
        };
        // 2049 lies between 2048 and 2050.
        assert_eq!(all(2049.0), [2048.0, 2048.0, 2048.0, 2050.0]);
        assert_eq!(all(-2051.0), [-2052.0, -2050.0, -2052.0, -2050.0]);
        assert_eq!(all(1e9), [f32::INFINITY, 65504.0, 65504.0, f32::INFINITY]);
        assert_eq!(all(1e-9), [0.0, 0.0, 0.0, 2f32.powi(-24)]);
    }

    proptest! {
        #[test]
        fn products_and_sums_round_once(a in any::<u32>(), b in any::<u32>(), c in any::<u32>(), near in any::<bool>()) {
            let [a, b, mut c] = [a, b, c].map(f32::from_bits);
            if near {
                // Where most cancels.
                c = -(a * b);
            }
            let (found, expected) = (fma(a, b, c), a.mul_add(b, c));
            prop_assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{} {}", found, expected);
        }

        #[test]
        fn rounding_agrees_with_the_language(bits in any::<u64>(), small in any::<u32>()) {
            let value = f64::from_bits(bits);
            let rounded = Format::of(Type::F32).round(value, Rounding::Nearest);
            prop_assert!(value.is_nan() || rounded == (value as f32).to_bits());
            let value = f32::from_bits(small);
            prop_assert_eq!(to_bf16(value), Format::of(Type::Bf16).round(f64::from(value), Rounding::Nearest));
        }
    }
}
