//! Stored numbers to f32: plain floats and ggml's block formats.
//!
//! Source: `dequantize_row_*` in ggml-quants.c and the block structs in ggml-common.h. In every format the
//! products of scales and quants have at most 24 significant bits, so only the last addition rounds, and the
//! result is ggml's to the bit whether or not a compiler fuses it.

use half::{bf16, f16};
use ir::DType;
use ir::dtype::Block;

/// Types that [`decode`] takes, for messages.
pub const DTYPES: [&str; 11] =
    ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"];

/// Decodes `out.len()` numbers stored as `dtype`.
///
/// # Panics
///
/// If `bytes` are not exactly those of `out.len()` numbers (whole blocks in a block format), or `dtype` is
/// none of f32, f16, bf16 and the block formats: readers check both when they read a tensor's header.
pub fn decode(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), dtype.bytes(out.len()), "bytes of {} {dtype} numbers", out.len());
    match dtype {
        DType::F32 => plain(bytes, out, f32::from_le_bytes),
        DType::F16 => plain(bytes, out, |two| f16::from_le_bytes(two).to_f32()),
        DType::BF16 => plain(bytes, out, |two| bf16::from_le_bytes(two).to_f32()),
        DType::Block(block) => {
            let facts = block.facts();
            assert_eq!(out.len() % facts.elems, 0, "{dtype} numbers come in blocks of {}", facts.elems);
            let decode_block = match block {
                Block::Q8_0 => q8_0,
                Block::Q4_0 => q4_0,
                Block::Q4_1 => q4_1,
                Block::Q5_0 => q5_0,
                Block::Q5_1 => q5_1,
                Block::Q4K => q4_k,
                Block::Q5K => q5_k,
                Block::Q6K => q6_k,
            };
            for (block, out) in bytes.chunks_exact(facts.bytes).zip(out.chunks_exact_mut(facts.elems)) {
                decode_block(block, out);
            }
        }
        DType::F64 | DType::I32 | DType::I8 | DType::U8 | DType::Bool => {
            panic!("no checkpoint stores {dtype}")
        }
    }
}

fn plain<const N: usize>(bytes: &[u8], out: &mut [f32], number: impl Fn([u8; N]) -> f32) {
    for (bytes, out) in bytes.as_chunks::<N>().0.iter().zip(out) {
        *out = number(*bytes);
    }
}

/// The f16 at byte `at`.
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `d: f16, q: [i8; 32]`; `d q`.
fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = d * f32::from(q as i8);
    }
}

/// `d: f16, q: [u4; 32]`; `d (q - 8)`. Low halves are the first 16 numbers.
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half(block, 0);
    for (j, &q) in block[2..].iter().enumerate() {
        out[j] = d * (f32::from(q & 15) - 8.0);
        out[j + 16] = d * (f32::from(q >> 4) - 8.0);
    }
}

/// `d: f16, m: f16, q: [u4; 32]`; `d q + m`.
fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for (j, &q) in block[4..].iter().enumerate() {
        out[j] = d * f32::from(q & 15) + m;
        out[j + 16] = d * f32::from(q >> 4) + m;
    }
}

/// Numbers `j` and `j + 16` of 32 whose fifth bits are the bits of `high`.
fn five_bits(low: u8, high: u32, j: usize) -> (f32, f32) {
    let (first, second) = ((high >> j & 1) << 4, (high >> (j + 16) & 1) << 4);
    ((u32::from(low & 15) | first) as f32, (u32::from(low >> 4) | second) as f32)
}

/// `d: f16, high: u32, q: [u4; 32]`; `d (q - 16)`.
fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half(block, 0);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for (j, &low) in block[6..].iter().enumerate() {
        let (first, second) = five_bits(low, high, j);
        out[j] = d * (first - 16.0);
        out[j + 16] = d * (second - 16.0);
    }
}

/// `d: f16, m: f16, high: u32, q: [u4; 32]`; `d q + m`.
fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for (j, &low) in block[8..].iter().enumerate() {
        let (first, second) = five_bits(low, high, j);
        out[j] = d * first + m;
        out[j + 16] = d * second + m;
    }
}

/// The 6-bit scale and minimum of group `j` of eight, from the twelve bytes that hold all of them
/// (`get_scale_min_k4`).
fn scale_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = match j {
        0..4 => (packed[j] & 63, packed[j + 4] & 63),
        _ => (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4),
    };
    (f32::from(scale), f32::from(min))
}

/// `d: f16, dmin: f16, scales: [u8; 12], q: [u4; 256]`; `(d scale) q - dmin min` in groups of 32; a pair of
/// groups shares 32 bytes, low halves first.
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    for (pair, q) in block[16..].chunks_exact(32).enumerate() {
        for (group, shift) in [(2 * pair, 0), (2 * pair + 1, 4)] {
            let (scale, min) = scale_min(&block[4..16], group);
            for (out, &q) in out[32 * group..][..32].iter_mut().zip(q) {
                *out = d * scale * f32::from(q >> shift & 15) - dmin * min;
            }
        }
    }
}

/// As [`q4_k`], with a fifth bit of number `l` of group `j` in bit `j` of `high[l]`: `d, dmin, scales,
/// high: [u8; 32], q: [u4; 256]`.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    let high = &block[16..48];
    for (pair, q) in block[48..].chunks_exact(32).enumerate() {
        for (group, shift) in [(2 * pair, 0), (2 * pair + 1, 4)] {
            let (scale, min) = scale_min(&block[4..16], group);
            for ((out, &q), &high) in out[32 * group..][..32].iter_mut().zip(q).zip(high) {
                let q = q >> shift & 15 | (high >> group & 1) << 4;
                *out = d * scale * f32::from(q) - dmin * min;
            }
        }
    }
}

/// `low: [u4; 256], high: [u2; 256], scales: [i8; 16], d: f16`; `(d scale) (q - 32)` in groups of 16.
/// Each half of 128 numbers is four runs of 32: run `r` takes the low or high halves of 32 bytes of `low`, and
/// bits `2r` and `2r + 1` of `high`.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let d = half(block, 208);
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    for (i, out) in out.iter_mut().enumerate() {
        let (part, run, l) = (i / 128, i / 32 % 4, i % 32);
        let low = low[64 * part + 32 * (run % 2) + l] >> (4 * (run / 2)) & 15;
        let high = high[32 * part + l] >> (2 * run) & 3;
        let q = f32::from(low | high << 4) - 32.0;
        *out = d * f32::from(scales[i / 16] as i8) * q;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(dtype: DType, bytes: &[u8], elems: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; elems];
        decode(dtype, bytes, &mut out);
        out
    }

    fn f16_bytes(x: f32) -> [u8; 2] {
        f16::from_f32(x).to_le_bytes()
    }

    #[test]
    fn plain_floats() {
        assert_eq!(decoded(DType::F32, &1.5f32.to_le_bytes(), 1), [1.5]);
        assert_eq!(decoded(DType::BF16, &[0x80, 0x3f, 0xc0, 0xbf], 2), [1.0, -1.5]);
        assert_eq!(decoded(DType::F16, &[0x00, 0x3c, 0x01, 0x00], 2), [1.0, 2f32.powi(-24)]);
    }

    #[test]
    fn q8_0_is_signed() {
        let mut block = f16_bytes(0.5).to_vec();
        block.extend((0..32).map(|i| if i == 0 { 0x80 } else { i as u8 })); // -128, 1, 2, ...
        let out = decoded(DType::Block(Block::Q8_0), &block, 32);
        assert_eq!((out[0], out[1], out[31]), (-64.0, 0.5, 15.5));
    }

    #[test]
    fn four_bits_low_halves_first() {
        let mut block = f16_bytes(2.0).to_vec();
        block.extend([0xf0; 16]);
        let out = decoded(DType::Block(Block::Q4_0), &block, 32);
        assert_eq!((out[0], out[15], out[16], out[31]), (-16.0, -16.0, 14.0, 14.0));

        let mut block = [f16_bytes(2.0), f16_bytes(-1.0)].concat();
        block.extend([0x3f; 16]);
        let out = decoded(DType::Block(Block::Q4_1), &block, 32);
        assert_eq!((out[0], out[16]), (29.0, 5.0));
    }

    #[test]
    fn five_bits_come_from_the_mask() {
        // Bits 0 and 31 of the mask: numbers 0 and 31 have their fifth bit.
        let mask = 0x8000_0001u32.to_le_bytes();
        let mut block = [&f16_bytes(1.0)[..], &mask].concat();
        block.extend([0x21; 16]);
        let out = decoded(DType::Block(Block::Q5_0), &block, 32);
        assert_eq!((out[0], out[1], out[16], out[31]), (1.0, -15.0, -14.0, 2.0));

        let mut block = [&f16_bytes(1.0)[..], &f16_bytes(0.5), &mask].concat();
        block.extend([0x21; 16]);
        let out = decoded(DType::Block(Block::Q5_1), &block, 32);
        assert_eq!((out[0], out[1], out[16], out[31]), (17.5, 1.5, 2.5, 18.5));
    }

    /// Twelve bytes: scales 1, 2, 3, 4 and minima 5, 6, 7, 8 in groups 0 to 3; in groups 4 to 7 scales
    /// 0x1a, 0x2b, 0x3c, 0x0d and minima 0x31, 0x22, 0x13, 0x04, whose upper two bits lie on top of the first eight.
    const SCALES: [u8; 12] = [0x41, 0x82, 0xc3, 0x04, 0xc5, 0x86, 0x47, 0x08, 0x1a, 0x2b, 0x3c, 0x4d];

    #[test]
    fn scales_of_six_bits() {
        let all: Vec<(f32, f32)> = (0..8).map(|j| scale_min(&SCALES, j)).collect();
        assert_eq!(all[..4], [(1.0, 5.0), (2.0, 6.0), (3.0, 7.0), (4.0, 8.0)]);
        assert_eq!(all[4..], [(26.0, 49.0), (43.0, 34.0), (60.0, 19.0), (13.0, 4.0)]);
    }

    #[test]
    fn k_quants_of_four_and_five_bits() {
        let head = [&f16_bytes(0.5)[..], &f16_bytes(0.25), &SCALES].concat();
        let mut block = head.clone();
        block.extend((0..128).map(|i| if i < 32 { 0xa3 } else { 0x10 }));
        let out = decoded(DType::Block(Block::Q4K), &block, 256);
        assert_eq!(out[0], 0.5 * 1.0 * 3.0 - 0.25 * 5.0); // group 0: low half of byte 0
        assert_eq!(out[32], 0.5 * 2.0 * 10.0 - 0.25 * 6.0); // group 1: its high half
        assert_eq!(out[255], 0.5 * 13.0 * 1.0 - 0.25 * 4.0); // group 7

        let mut block = head;
        block.extend([0b1000_0010; 32]); // fifth bits of groups 1 and 7
        block.extend((0..128).map(|i| if i < 32 { 0xa3 } else { 0x10 }));
        let out = decoded(DType::Block(Block::Q5K), &block, 256);
        assert_eq!(out[0], 0.5 * 1.0 * 3.0 - 0.25 * 5.0);
        assert_eq!(out[32], 0.5 * 2.0 * 26.0 - 0.25 * 6.0);
        assert_eq!(out[255], 0.5 * 13.0 * 17.0 - 0.25 * 4.0);
    }

    #[test]
    fn k_quants_of_six_bits() {
        let mut block = vec![0x21u8; 128];
        block[64 + 32] = 0x7f; // second half, byte 32: number 128 + 32 (low), number 128 + 96 (high)
        block.extend([0b11_10_01_00u8; 64]);
        block.extend((0..16).map(|i| (i as i8 - 8) as u8));
        block.extend(f16_bytes(0.5));
        let out = decoded(DType::Block(Block::Q6K), &block, 256);
        // Runs 0 to 3 of the first half: low halves 1, 1, high halves 2, 2; high bits 0, 1, 2, 3.
        assert_eq!(out[0], 0.5 * -8.0 * (1.0 - 32.0));
        assert_eq!(out[32], 0.5 * -6.0 * (17.0 - 32.0));
        assert_eq!(out[64], 0.5 * -4.0 * (34.0 - 32.0));
        assert_eq!(out[127], -0.5 * (50.0 - 32.0));
        assert_eq!(out[160], 0.5 * 2.0 * (31.0 - 32.0));
        assert_eq!(out[224], 0.5 * 6.0 * (55.0 - 32.0));
    }
}
