//! Matrix instructions: who holds which element, and how their products are summed.
//!
//! Fragments are those of the PTX ISA, "Matrix Fragments for mma.m16n8k8", "...k16", "...k32" and "Warp-level matrix load
//! instruction: ldmatrix". Lane `l` is in group `g = l / 4`, as its thread `t = l % 4`.
//!
//! What hardware does when it adds is not in the ISA. Tensor cores align the terms of a block to the largest of them and
//! cut off what lies below (Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021):
//! [`Sums::Truncated`] does so. [`Sums::Exact`] adds without error and rounds once.

use super::Sums;
use super::arithmetic::{LANES, Narrow};
use super::float::{Format, bf16, f16, power_of_two, sum_to_odd};
use crate::ptx::{MatrixType, Rounding, Type};

/// Rows of A and D.
const M: usize = 16;
/// Columns of B and D.
const N: usize = 8;
/// The most that K is where elements have 16 bits.
const HALVES_K: usize = 16;
/// The most that K is where they have 8.
const BYTES_K: usize = 32;
/// Bits below the largest term's leading one that take part in a sum.
const FRACTION_BITS: u32 = 24;

/// Row and k of element `i` of A in a lane, where a register holds `PER` elements.
fn place_a<const PER: usize>(lane: usize, i: usize) -> (usize, usize) {
    let (g, t) = (lane / 4, lane % 4);
    let (register, part) = (i / PER, i % PER);
    (g + 8 * (register % 2), t * PER + part + 4 * PER * (register / 2))
}

/// k and column of element `i` of B in a lane.
fn place_b<const PER: usize>(lane: usize, i: usize) -> (usize, usize) {
    let (g, t) = (lane / 4, lane % 4);
    let (register, part) = (i / PER, i % PER);
    (t * PER + part + 4 * PER * register, g)
}

/// Row and column of element `i` of C and D in a lane.
fn place_c(lane: usize, i: usize) -> (usize, usize) {
    (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2)
}

/// A fragment's elements of 8 or 16 bits, from its registers.
fn element<const PER: usize>(registers: &[&Narrow], lane: usize, i: usize) -> u32 {
    let bits = 32 / PER as u32;
    registers[i / PER][lane] >> (bits * (i % PER) as u32) & ((1 << bits) - 1)
}

/// A and B as matrices, each element by the function of its operand.
fn matrices<const PER: usize, const K: usize, T: Copy + Default>(
    [a, b]: [&[&Narrow]; 2],
    of_a: impl Fn(u32) -> T,
    of_b: impl Fn(u32) -> T,
) -> ([[T; K]; M], [[T; N]; K]) {
    let mut left = [[T::default(); K]; M];
    let mut right = [[T::default(); N]; K];
    for lane in 0..LANES {
        for i in 0..PER * a.len() {
            let (row, k) = place_a::<PER>(lane, i);
            left[row][k] = of_a(element::<PER>(a, lane, i));
        }
        for i in 0..PER * b.len() {
            let (k, column) = place_b::<PER>(lane, i);
            right[k][column] = of_b(element::<PER>(b, lane, i));
        }
    }
    (left, right)
}

/// `mma.sync.m16n8kK`: D = A B + C, as registers of D. `BLOCK` terms are aligned together.
pub fn mma<const BLOCK: usize>(
    k: usize,
    types: (MatrixType, MatrixType),
    narrow: bool,
    satfinite: bool,
    sums: Sums,
    [a, b, c]: [&[&Narrow]; 3],
) -> [Narrow; 4] {
    let mut d = [[0; LANES]; 4];
    let places = (0..LANES).flat_map(|lane| (0..4).map(move |i| (lane, i, place_c(lane, i))));
    match types.0 {
        MatrixType::Bf16 | MatrixType::F16 => {
            let (left, right) = match types.0 {
                MatrixType::Bf16 => {
                    matrices::<2, HALVES_K, f64>([a, b], |x| f64::from(bf16(x)), |x| f64::from(bf16(x)))
                }
                _ => matrices::<2, HALVES_K, f64>([a, b], |x| f64::from(f16(x)), |x| f64::from(f16(x))),
            };
            let mut sum = [[0.0; N]; M];
            for (lane, i, (row, column)) in places.clone() {
                let wide = || f32::from_bits(c[i][lane]);
                sum[row][column] = if narrow { f16(element::<2>(c, lane, i)) } else { wide() };
            }
            add_products::<BLOCK>(&left, &right[..k], &mut sum, sums);
            for (lane, i, (row, column)) in places {
                let value = sum[row][column];
                if narrow {
                    let half = Format::of(Type::F16).round(f64::from(value), Rounding::Nearest);
                    d[i / 2][lane] |= half << (16 * (i % 2));
                } else {
                    d[i][lane] = if value.is_nan() { 0x7FFF_FFFF } else { value.to_bits() };
                }
            }
        }
        MatrixType::S8 | MatrixType::U8 => {
            let value =
                |ty| move |bits| if ty == MatrixType::S8 { i32::from(bits as u8 as i8) } else { bits as i32 };
            let (left, right) = matrices::<4, BYTES_K, i32>([a, b], value(types.0), value(types.1));
            for (lane, i, (row, column)) in places {
                let product: i32 = (0..k).map(|k| left[row][k] * right[k][column]).sum();
                let c = c[i][lane] as i32;
                let sum = if satfinite { product.saturating_add(c) } else { product.wrapping_add(c) };
                d[i][lane] = sum as u32;
            }
        }
    }
    d
}

/// `sum += left * right`, row by row; `right` has 8 or 16 rows. Where a term is infinite or no number, so is the sum, however it is added.
fn add_products<const BLOCK: usize>(
    left: &[[f64; HALVES_K]],
    right: &[[f64; N]],
    sum: &mut [[f32; N]],
    sums: Sums,
) {
    let k = right.len();
    let before = sum.iter().flatten().map(|&x| f64::from(x));
    let special = special(left.iter().flatten().chain(right.iter().flatten()).copied().chain(before));
    for (left, sum) in left.iter().zip(sum) {
        let plain = |n: usize, before: f32| {
            left.iter().zip(right).fold(f64::from(before), |sum, (left, right)| sum + left * right[n])
        };
        let before = *sum;
        match sums {
            Sums::Truncated => row_truncated::<BLOCK>(&left[..k], right, sum),
            Sums::Exact => row_exact(&left[..k], right, sum),
        }
        for n in (0..N).filter(|_| special) {
            let plain = plain(n, before[n]);
            sum[n] = if plain.is_finite() { sum[n] } else { plain as f32 };
        }
    }
}

/// Is one of the numbers infinite or no number?
fn special(numbers: impl Iterator<Item = f64>) -> bool {
    // One more in the exponent reaches the sign where all its bits are set.
    numbers.fold(0, |all, x| all | (x.abs().to_bits() + (1 << 52))) >> 63 == 1
}

/// Terms that `mma` aligns together, on sm_80 (Fasi et al., section 4).
pub const MMA_BLOCK: usize = 8;
/// Terms that `wgmma` aligns together, on sm_90: all of an instruction's (arXiv 2512.07004).
pub const WGMMA_BLOCK: usize = 16;

/// Columns that are added together: as many as the registers of any x86-64 hold.
const COLUMNS: usize = 4;

/// `sum += left * right`, in blocks, which [`block_truncated`] does.
fn row_truncated<const BLOCK: usize>(left: &[f64], right: &[[f64; N]], sum: &mut [f32; N]) {
    for (left, right) in left.as_chunks::<BLOCK>().0.iter().zip(right.as_chunks::<BLOCK>().0) {
        for first in (0..N).step_by(COLUMNS) {
            let mut terms = [[0.0; COLUMNS]; BLOCK];
            for k in 0..BLOCK {
                for n in 0..COLUMNS {
                    terms[k][n] = left[k] * right[k][first + n];
                }
            }
            let sum = &mut sum[first..first + COLUMNS];
            sum.copy_from_slice(&block_truncated(std::array::from_fn(|n| f64::from(sum[n])), &terms));
        }
    }
}

/// A number and some terms in each column: the magnitudes of all are cut to multiples of one unit, [`FRACTION_BITS`] below
/// the largest, and added without error; the sum is cut to an f32. All are finite.
#[inline(always)]
fn block_truncated<const BLOCK: usize>(
    before: [f64; COLUMNS],
    terms: &[[f64; COLUMNS]; BLOCK],
) -> [f32; COLUMNS] {
    const SIGN: u64 = 1 << 63;
    const EXPONENT: u64 = 0x7FF << 52;
    // No product of halves is below 2^-300, so neither is a unit; where all terms are 0 any will do.
    let mut largest = before.map(|before| before.abs().clamp(power_of_two(-300), power_of_two(900)));
    for terms in terms {
        for n in 0..COLUMNS {
            largest[n] = if terms[n].abs() > largest[n] { terms[n].abs() } else { largest[n] };
        }
    }
    // Beside so large a number, half of it added so that nothing falls below a power of two, the last bit is a unit: its
    // bits count units. Terms have 24 bits, so taking away what is less than a half by this little makes the nearest
    // multiple the one below.
    let below = u64::from(FRACTION_BITS) << 52;
    let unit = |largest: f64| f64::from_bits((largest.to_bits() & EXPONENT).wrapping_sub(below));
    let counter = largest.map(|largest| unit(largest) * 1.5 * power_of_two(52));
    let half = largest.map(|largest| (unit(largest) * (0.5 - power_of_two(-30))).to_bits());
    let units =
        |n: usize, term: f64| (term - f64::from_bits(half[n] | term.to_bits() & SIGN) + counter[n]).to_bits();
    let mut total: [u64; COLUMNS] = std::array::from_fn(|n| units(n, before[n]));
    for terms in terms {
        for n in 0..COLUMNS {
            total[n] = total[n].wrapping_add(units(n, terms[n]));
        }
    }
    std::array::from_fn(|n| {
        let total = total[n].wrapping_sub(counter[n].to_bits().wrapping_mul(BLOCK as u64));
        let total = f64::from_bits(total) - counter[n];
        // The 29 bits of an f64 that an f32 does not have.
        f64::from_bits(total.to_bits() & !0x1FFF_FFFF) as f32
    })
}

/// `sum += left * right`, rounded once.
///
/// Method: Shewchuk, "Adaptive Precision Floating-Point Arithmetic" (1997): the sum is kept as numbers that do not overlap.
fn row_exact(left: &[f64], right: &[[f64; N]], sum: &mut [f32; N]) {
    for n in 0..N {
        let products = left.iter().zip(right).map(|(left, right)| left * right[n]);
        let terms = products.chain([f64::from(sum[n])]);
        // Most sums fit an f64.
        let (mut total, mut lost) = (0.0, false);
        for term in terms.clone() {
            let whole: f64 = total + term;
            let of = whole - total;
            lost |= (total - (whole - of)) + (term - of) != 0.0;
            total = whole;
        }
        if !lost {
            sum[n] = total as f32;
            continue;
        }
        let mut parts: Vec<f64> = Vec::new();
        for mut term in terms {
            parts.retain_mut(|part| {
                let whole = term + *part;
                let of = whole - term;
                *part = (term - (whole - of)) + (*part - of);
                term = whole;
                *part != 0.0
            });
            parts.push(term);
        }
        // From the smallest on, each sum remembers in its last bit that there was more.
        let total = parts.into_iter().reduce(|rest, part| sum_to_odd(part, rest)).unwrap_or(0.0);
        sum[n] = total as f32;
    }
}

/// Where lane `lane` of `ldmatrix` has its two elements of an 8 x 8 matrix: (row, column) each.
pub fn place_ldmatrix(lane: usize, trans: bool) -> [(usize, usize); 2] {
    let (g, t) = (lane / 4, lane % 4);
    if trans { [(2 * t, g), (2 * t + 1, g)] } else { [(g, 2 * t), (g, 2 * t + 1)] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Rows of A by group and register, as the figures of the ISA have them for all shapes: a0 a1 in row `groupID`, and so on.
    #[test]
    fn fragments_are_those_of_the_isa() {
        // "Matrix Fragments for mma.m16n8k16 with floating point type", A: for lane 0 (T0) and lane 5 (T5), a0 to a7.
        let a = |lane| (0..8).map(|i| place_a::<2>(lane, i)).collect::<Vec<_>>();
        assert_eq!(a(0), [(0, 0), (0, 1), (8, 0), (8, 1), (0, 8), (0, 9), (8, 8), (8, 9)]);
        assert_eq!(a(5), [(1, 2), (1, 3), (9, 2), (9, 3), (1, 10), (1, 11), (9, 10), (9, 11)]);
        assert_eq!(a(31)[7], (15, 15));
        // B: b0 to b3.
        let b = |lane| (0..4).map(|i| place_b::<2>(lane, i)).collect::<Vec<_>>();
        assert_eq!(b(0), [(0, 0), (1, 0), (8, 0), (9, 0)]);
        assert_eq!(b(30), [(4, 7), (5, 7), (12, 7), (13, 7)]);
        // C and D: c0 to c3.
        let c = |lane| (0..4).map(|i| place_c(lane, i)).collect::<Vec<_>>();
        assert_eq!(c(0), [(0, 0), (0, 1), (8, 0), (8, 1)]);
        assert_eq!(c(31), [(7, 6), (7, 7), (15, 6), (15, 7)]);
        // "Matrix Fragments for mma.m16n8k32", A: a0 to a15.
        let a: Vec<_> = (0..16).map(|i| place_a::<4>(6, i)).collect();
        assert_eq!(a[..4], [(1, 8), (1, 9), (1, 10), (1, 11)]);
        assert_eq!(a[4..8], [(9, 8), (9, 9), (9, 10), (9, 11)]);
        assert_eq!(a[8..12], [(1, 24), (1, 25), (1, 26), (1, 27)]);
        assert_eq!(a[12..], [(9, 24), (9, 25), (9, 26), (9, 27)]);
        let b: Vec<_> = (0..8).map(|i| place_b::<4>(6, i)).collect();
        assert_eq!(b, [(8, 1), (9, 1), (10, 1), (11, 1), (24, 1), (25, 1), (26, 1), (27, 1)]);
        // ldmatrix: thread 0 has row 0's elements 0 and 1, thread 4 row 1's.
        assert_eq!(place_ldmatrix(4, false), [(1, 0), (1, 1)]);
        assert_eq!(place_ldmatrix(31, false), [(7, 6), (7, 7)]);
        assert_eq!(place_ldmatrix(4, true), [(0, 1), (1, 1)]);
    }

    fn dot(left: &[f32], right: &[f32], c: f32, sums: Sums) -> f32 {
        dot_in::<MMA_BLOCK>(left, right, c, sums)
    }

    fn dot_in<const BLOCK: usize>(left: &[f32], right: &[f32], c: f32, sums: Sums) -> f32 {
        let mut row = [0.0; HALVES_K];
        row.iter_mut().zip(left).for_each(|(to, &from)| *to = f64::from(from));
        let mut right: Vec<[f64; N]> = right.iter().map(|&value| [f64::from(value); N]).collect();
        right.resize(right.len().next_multiple_of(BLOCK), [0.0; N]);
        let mut sum = [[c; N]];
        add_products::<BLOCK>(&[row], &right, &mut sum, sums);
        let [sum] = sum;
        assert!(sum.iter().all(|value| value.to_bits() == sum[0].to_bits()));
        sum[0]
    }

    #[test]
    fn truncation_cuts_where_rounding_does_not() {
        let ones = [1.0; 8];
        // 2^24 and eight times 1/2: each lies below the last bit that is kept, together they are 4.
        let halves = [0.5; 8];
        assert_eq!(dot(&ones, &halves, 16_777_216.0, Sums::Truncated), 16_777_216.0);
        assert_eq!(dot(&ones, &halves, 16_777_216.0, Sums::Exact), 16_777_220.0);
        // One bit is kept below the 24 of the result: two such terms make a whole.
        assert_eq!(dot(&ones, &[0.5; 8], 8_388_608.0, Sums::Truncated), 8_388_612.0);
        // Towards zero, on both sides.
        assert_eq!(dot(&ones[..1], &[1.0], 33_554_430.0, Sums::Truncated), 33_554_430.0);
        assert_eq!(dot(&ones[..1], &[-1.0], -33_554_430.0, Sums::Truncated), -33_554_430.0);
        // What cancels leaves all of the rest, also where an f64 does not hold the sum on the way.
        let huge = [2f32.powi(60), 1.0, -(2f32.powi(60)), 2f32.powi(-30)];
        assert_eq!(dot(&ones[..4], &huge, 0.0, Sums::Exact), 1.0 + 2f32.powi(-30));
        assert_eq!(dot(&ones[..4], &huge, -1.0, Sums::Exact), 2f32.powi(-30));
        // A zero stays one, and the last bit does.
        assert_eq!(dot(&ones, &[0.0; 8], 16_777_215.0, Sums::Truncated), 16_777_215.0);
        // Two blocks: the second sees what is left of the first.
        let large: Vec<f32> = [1.0; 8].into_iter().chain([2f32.powi(30)]).collect();
        assert_eq!(dot(&[1.0; 9], &large, 0.0, Sums::Truncated), 2f32.powi(30));
        // Eight quarters are two in a block of their own, and nothing beside a large number.
        let late: Vec<f32> = [0.25; 8].into_iter().chain([16_777_216.0]).collect();
        assert_eq!(dot(&[1.0; 9], &late, 0.0, Sums::Truncated), 16_777_218.0);
        assert_eq!(dot_in::<WGMMA_BLOCK>(&[1.0; 9], &late, 0.0, Sums::Truncated), 16_777_216.0);
        assert!(dot(&ones, &[f32::INFINITY; 8], -1.0, Sums::Truncated).is_infinite());
        let early: Vec<f32> = [f32::NAN].into_iter().chain([1.0; 7]).collect();
        assert!(dot(&ones, &early, 1.0, Sums::Truncated).is_nan());
        assert!(dot(&[0.0; 8], &[f32::INFINITY; 8], -1.0, Sums::Exact).is_nan());
    }

    proptest! {
        #[test]
        fn sums_are_near_the_sum(
            left in proptest::collection::vec(-2f32..2.0, 16), right in proptest::collection::vec(-2f32..2.0, 16), c in -4f32..4.0,
        ) {
            let cut = |values: &[f32]| values.iter().map(|&x| bf16(super::super::float::to_bf16(x))).collect::<Vec<_>>();
            let (left, right) = (cut(&left), cut(&right));
            let exact: f64 = left.iter().zip(&right).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() + f64::from(c);
            prop_assert_eq!(dot(&left, &right, c, Sums::Exact), exact as f32);
            // Nine terms of a block and the sum lose less than one unit each; terms are at most 64 in all.
            let lost = 20.0 * 64.0 * 2f64.powi(-24);
            prop_assert!((f64::from(dot(&left, &right, c, Sums::Truncated)) - exact).abs() <= lost);
        }
    }
}
