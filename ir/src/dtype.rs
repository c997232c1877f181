//! Element types: how numbers are stored, and how an `f64` is rounded to each.

use half::{bf16, f16};

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE binary64; only oracles use it.
    F64,
    /// IEEE binary32.
    F32,
    /// The upper half of binary32.
    BF16,
    /// IEEE binary16.
    F16,
    /// 32-bit signed integer: tokens, positions.
    I32,
    /// 8-bit signed integer.
    I8,
    /// 8-bit unsigned integer.
    U8,
    /// One byte, 0 or 1.
    Bool,
    /// A block format: several elements share scales.
    Block(Block),
}

/// A quantized block format of ggml. What one is made of stands in [`Block::facts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names are the formats
pub enum Block {
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
}

/// Size of a block format.
#[derive(Clone, Copy, Debug)]
pub struct BlockFacts {
    /// Name in text.
    pub name: &'static str,
    /// Elements that share a block.
    pub elems: usize,
    /// Bytes of one block.
    pub bytes: usize,
}

impl Block {
    /// Every format.
    pub const ALL: [Block; 8] =
        [Block::Q8_0, Block::Q4_0, Block::Q4_1, Block::Q5_0, Block::Q5_1, Block::Q4K, Block::Q5K, Block::Q6K];

    /// Name, elements and bytes of a block (ggml-common.h).
    #[rustfmt::skip] // a table: one format a line
    pub const fn facts(self) -> BlockFacts {
        match self {
            Block::Q8_0 => BlockFacts { name: "q8_0", elems: 32,  bytes: 34 },
            Block::Q4_0 => BlockFacts { name: "q4_0", elems: 32,  bytes: 18 },
            Block::Q4_1 => BlockFacts { name: "q4_1", elems: 32,  bytes: 20 },
            Block::Q5_0 => BlockFacts { name: "q5_0", elems: 32,  bytes: 22 },
            Block::Q5_1 => BlockFacts { name: "q5_1", elems: 32,  bytes: 24 },
            Block::Q4K  => BlockFacts { name: "q4_k", elems: 256, bytes: 144 },
            Block::Q5K  => BlockFacts { name: "q5_k", elems: 256, bytes: 176 },
            Block::Q6K  => BlockFacts { name: "q6_k", elems: 256, bytes: 210 },
        }
    }
}

/// The dtypes that are one number an element, with name, bytes and unit roundoff.
#[rustfmt::skip] // a table: one dtype a line
const PLAIN: [(DType, &str, usize, f64); 8] = [
    (DType::F64,  "f64",  8, 1.0 / (1u64 << 53) as f64),
    (DType::F32,  "f32",  4, 1.0 / (1u64 << 24) as f64),
    (DType::BF16, "bf16", 2, 1.0 / (1u64 << 8) as f64),
    (DType::F16,  "f16",  2, 1.0 / (1u64 << 11) as f64),
    (DType::I32,  "i32",  4, 0.0),
    (DType::I8,   "i8",   1, 0.0),
    (DType::U8,   "u8",   1, 0.0),
    (DType::Bool, "bool", 1, 0.0),
];

impl DType {
    fn row(self) -> Option<&'static (DType, &'static str, usize, f64)> {
        PLAIN.iter().find(|row| row.0 == self)
    }

    /// Name in text.
    pub fn name(self) -> &'static str {
        match self {
            DType::Block(block) => block.facts().name,
            plain => plain.row().expect("every plain dtype has a row").1,
        }
    }

    /// The dtype of that name.
    pub fn from_name(name: &str) -> Option<DType> {
        let plain = PLAIN.iter().find(|row| row.1 == name).map(|row| row.0);
        plain.or_else(|| Block::ALL.iter().find(|b| b.facts().name == name).map(|&b| DType::Block(b)))
    }

    /// Bytes of `elems` elements stored without gaps; a block format counts whole blocks.
    pub fn bytes(self, elems: usize) -> usize {
        match self {
            DType::Block(block) => elems.div_ceil(block.facts().elems) * block.facts().bytes,
            plain => plain.row().expect("every plain dtype has a row").2 * elems,
        }
    }

    /// Unit roundoff `u`: the largest relative error of rounding to nearest (0 for integers).
    ///
    /// # Panics
    ///
    /// On block formats, whose step depends on the block.
    pub fn roundoff(self) -> f64 {
        self.row().expect("a block format has no one roundoff").3
    }

    /// Is it a floating-point type?
    pub fn is_float(self) -> bool {
        matches!(self, DType::F64 | DType::F32 | DType::BF16 | DType::F16)
    }

    /// The value that storing `x` in this dtype leaves: floats to nearest even, integers truncated
    /// towards zero and clamped to the range, `bool` 0 or 1.
    ///
    /// # Panics
    ///
    /// On block formats: they round blocks, not elements.
    pub fn round(self, x: f64) -> f64 {
        match self {
            DType::F64 => x,
            DType::F32 => x as f32 as f64,
            DType::BF16 => bf16::from_f32(round_to_odd(x)).to_f64(),
            DType::F16 => f16::from_f32(round_to_odd(x)).to_f64(),
            DType::I32 => x as i32 as f64,
            DType::I8 => x as i8 as f64,
            DType::U8 => x as u8 as f64,
            DType::Bool => (x != 0.0) as u8 as f64,
            DType::Block(_) => panic!("a block format rounds blocks, not elements"),
        }
    }
}

/// `x` in f32, its last bit set where anything was lost: rounding that to nearest even in a narrower dtype is rounding `x`
/// (Boldo and Melquiond 2008). `half`'s own conversions of f64 take what lies just beside a tie for a tie.
fn round_to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    if f64::from(nearest) == x || x.is_nan() {
        return nearest;
    }
    let away = f64::from(nearest.abs()) > x.abs();
    f32::from_bits((nearest.to_bits() - u32::from(away)) | 1)
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for dtype in PLAIN.iter().map(|row| row.0).chain(Block::ALL.map(DType::Block)) {
            assert_eq!(DType::from_name(dtype.name()), Some(dtype));
        }
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        assert_eq!(DType::BF16.round(1.0 + 1.0 / 256.0), 1.0); // a tie goes to the even mantissa
        assert_eq!(DType::BF16.round(1.0 + 3.0 / 256.0), 1.0 + 1.0 / 64.0);
        assert_eq!(DType::BF16.round(1.0 + 1.0 / 256.0 + f64::exp2(-50.0)), 1.0 + 1.0 / 128.0);
        assert_eq!(DType::BF16.round(-1.0 - 3.0 / 256.0 + f64::exp2(-50.0)), -1.0 - 1.0 / 128.0);
        assert_eq!(DType::BF16.round(f64::exp2(-134.0)), 0.0);
        assert_eq!(DType::BF16.round(1.001 * f64::exp2(-134.0)), f64::exp2(-133.0));
        assert_eq!(DType::BF16.round(1e300), f64::INFINITY);
        assert_eq!(DType::BF16.round(-1e-300).to_bits(), (-0.0f64).to_bits());
        assert_eq!(DType::F16.round(1.0 + 1.0 / 2048.0 + f64::exp2(-50.0)), 1.0 + 1.0 / 1024.0);
        assert_eq!(DType::F16.round(65520.0), f64::INFINITY);
        assert_eq!(DType::I32.round(-2.9), -2.0);
    }

    #[test]
    fn blocks_count_whole() {
        assert_eq!(DType::Block(Block::Q4_0).bytes(33), 36);
    }
}
