//! Operands for the forms: the same on every machine, from a seed that is the form's name.

use crate::ptx::Type;

/// A generator of numbers.
///
/// Method: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (2014), `SplitMix64`.
pub struct Random(u64);

impl Random {
    /// Seeded by a name, so that a form keeps its operands when others come and go.
    pub fn of(name: &str) -> Random {
        // FNV-1a, 64 bits.
        let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
        Random(name.bytes().fold(0xCBF2_9CE4_8422_2325, step))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.bits() % limit
    }
}

/// Bits of the fraction and of the exponent of a type, or of one half of a pair.
fn layout(ty: Type) -> Option<(u32, u32)> {
    match ty {
        Type::F16 | Type::F16x2 => Some((10, 5)),
        Type::Bf16 | Type::Bf16x2 => Some((7, 8)),
        Type::F32 => Some((23, 8)),
        Type::F64 => Some((52, 11)),
        _ => None,
    }
}

fn paired(ty: Type) -> bool {
    matches!(ty, Type::F16x2 | Type::Bf16x2)
}

/// Operands of an instruction that has one, for so many lanes at least: every binade of both signs with the first, the
/// second, the last and random fractions, so zeros, subnormals, infinities and NaNs too; of integers the ends and random ones.
pub fn every(ty: Type, random: &mut Random) -> Vec<u64> {
    let Some((fraction, exponent)) = layout(ty).filter(|_| ty != Type::F64) else {
        return (0..512).map(|_| any(ty, random)).collect();
    };
    let random_ones = if exponent == 5 { 5 } else { 1 };
    let last = (1 << fraction) - 1;
    let mut values = Vec::new();
    for binade in 0..2 << exponent {
        let fractions = [0, 1, last].into_iter().chain((0..random_ones).map(|_| random.bits() & last));
        values.extend(fractions.map(|bits| binade << fraction | bits));
    }
    if paired(ty) {
        // Beside each a random other one, in the upper half or in the lower.
        let other: Vec<u64> =
            values.iter().map(|_| values[random.below(values.len() as u64) as usize]).collect();
        let low = |at: usize, (one, other): (&u64, &u64)| {
            if at.is_multiple_of(2) { one | other << 16 } else { other | one << 16 }
        };
        values = values.iter().zip(&other).enumerate().map(|(at, pair)| low(at, pair)).collect();
    }
    values
}

/// A value: a special one, a moderate one, or any bits.
pub fn any(ty: Type, random: &mut Random) -> u64 {
    if paired(ty) {
        let half = if ty == Type::F16x2 { Type::F16 } else { Type::Bf16 };
        return any(half, random) | any(half, random) << 16;
    }
    let mask = u64::MAX >> (64 - ty.bits());
    let bits = random.bits() & mask;
    let Some((fraction, exponent)) = layout(ty) else {
        let top = 1 << (ty.bits() - 1);
        let ends = [0, 1, 2, mask, mask - 1, top, top - 1, top + 1];
        return match random.below(4) {
            0 => ends[random.below(8) as usize] & mask,
            1 => random.below(72) & mask,
            _ => bits,
        };
    };
    let (sign, one) = (bits & 1 << (fraction + exponent), (1 << (exponent - 1)) - 1);
    match random.below(8) {
        0 => {
            let infinity = ((1 << exponent) - 1) << fraction;
            let specials = [
                0,
                1,
                1 << fraction,
                (1 << fraction) - 1,
                one << fraction,
                infinity - 1,
                infinity,
                infinity + 1,
            ];
            sign | specials[random.below(8) as usize]
        }
        1 | 2 => bits,
        // About one.
        _ => sign | (one - 8 + random.below(16)) << fraction | bits & ((1 << fraction) - 1),
    }
}

/// Operands of one lane of an instruction that has several. One lane in eight of a float's adds what almost cancels.
pub fn several(types: &[Type], random: &mut Random) -> Vec<u64> {
    let mut values: Vec<u64> = types.iter().map(|&ty| any(ty, random)).collect();
    let ty = types[0];
    let alike = types.iter().all(|&other| other == ty);
    if let Some((fraction, exponent)) = layout(ty).filter(|_| alike && random.below(8) == 0) {
        let both = |bits: u64| if paired(ty) { bits | bits << 16 } else { bits };
        if let [_, middle, _] = &mut values[..] {
            *middle = both(((1 << (exponent - 1)) - 1) << fraction);
        }
        let last = values.len() - 1;
        values[last] = values[0] ^ both(1 << (fraction + exponent) | random.below(4));
    }
    values
}

/// A value for a reduction, of which the result depends on many lanes: not the ends of an integer, and of `and` and `or` mostly
/// what changes nothing.
pub fn scattered(op: &str, ty: Type, random: &mut Random) -> u64 {
    let (bits, one) = (random.bits(), 1 << random.below(64));
    let value = match op {
        "and" => bits | !one,
        "or" => bits & one,
        _ => bits,
    };
    value & u64::MAX >> (64 - ty.bits())
}
