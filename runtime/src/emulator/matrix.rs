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
/// Bytes of k of a row of a `wgmma`: 16 elements of 16 bits or 32 of 8.
pub const K_BYTES: usize = 32;
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

/// An element of 8 or 16 bits of a register.
fn element<const PER: usize>(register: u32, part: usize) -> u32 {
    let bits = 32 / PER as u32;
    register >> (bits * part as u32) & ((1 << bits) - 1)
}

/// A as numbers.
pub enum Left {
    /// And whether one of them is infinite or no number.
    Halves([[f32; HALVES_K]; M], bool),
    Bytes([[i16; BYTES_K]; M]),
}

/// B as numbers; as many rows as K is count.
pub enum Right {
    /// And whether one of them is infinite or no number.
    Halves([[f32; N]; HALVES_K], bool, usize),
    Bytes([[i16; N]; BYTES_K], usize),
}

/// Elements of 8 bits as numbers.
fn byte(ty: MatrixType) -> impl Fn(u32) -> i16 {
    move |x| if ty == MatrixType::S8 { i16::from(x as u8 as i8) } else { x as i16 }
}

impl Left {
    /// Of a fragment.
    pub fn new(ty: MatrixType, a: &[&Narrow]) -> Left {
        match ty {
            MatrixType::Bf16 => Left::halves(left::<2, HALVES_K, f32>(a, bf16)),
            MatrixType::F16 => Left::halves(left::<2, HALVES_K, f32>(a, f16)),
            MatrixType::S8 | MatrixType::U8 => Left::Bytes(left::<4, BYTES_K, i16>(a, byte(ty))),
        }
    }

    /// Of rows with their bytes of k.
    pub fn of_rows(ty: MatrixType, rows: &[[u8; K_BYTES]; M]) -> Left {
        match ty {
            MatrixType::Bf16 => Left::halves(rows.map(|row| numbers::<2, HALVES_K, f32>(&row, bf16))),
            MatrixType::F16 => Left::halves(rows.map(|row| numbers::<2, HALVES_K, f32>(&row, f16))),
            MatrixType::S8 | MatrixType::U8 => {
                Left::Bytes(rows.map(|row| numbers::<4, BYTES_K, i16>(&row, byte(ty))))
            }
        }
    }

    fn halves(rows: [[f32; HALVES_K]; M]) -> Left {
        Left::Halves(rows, special(rows.as_flattened()))
    }

    /// All with the other sign.
    pub fn negate(&mut self) {
        match self {
            Left::Halves(rows, _) => rows.as_flattened_mut().iter_mut().for_each(|x| *x = -*x),
            Left::Bytes(rows) => rows.as_flattened_mut().iter_mut().for_each(|x| *x = -*x),
        }
    }
}

impl Right {
    /// Of a fragment.
    pub fn new(ty: MatrixType, b: &[&Narrow]) -> Right {
        let (halves_k, bytes_k) = (HALVES_K / 2 * b.len(), BYTES_K / 2 * b.len());
        match ty {
            MatrixType::Bf16 => Right::halves(right::<2, HALVES_K, f32>(b, bf16), halves_k),
            MatrixType::F16 => Right::halves(right::<2, HALVES_K, f32>(b, f16), halves_k),
            MatrixType::S8 | MatrixType::U8 => Right::Bytes(right::<4, BYTES_K, i16>(b, byte(ty)), bytes_k),
        }
    }

    /// Of columns with their bytes of k.
    pub fn of_columns(ty: MatrixType, columns: &[[u8; K_BYTES]; N]) -> Right {
        let halves = |of: fn(u32) -> f32| {
            Right::halves(turned(&columns.map(|column| numbers::<2, HALVES_K, f32>(&column, of))), HALVES_K)
        };
        match ty {
            MatrixType::Bf16 => halves(bf16),
            MatrixType::F16 => halves(f16),
            MatrixType::S8 | MatrixType::U8 => {
                let columns = columns.map(|column| numbers::<4, BYTES_K, i16>(&column, byte(ty)));
                Right::Bytes(turned(&columns), BYTES_K)
            }
        }
    }

    fn halves(rows: [[f32; N]; HALVES_K], k: usize) -> Right {
        Right::Halves(rows, special(rows.as_flattened()), k)
    }
}

/// A row of a matrix, from its bytes.
fn numbers<const PER: usize, const K: usize, T: Copy + Default>(
    bytes: &[u8; K_BYTES],
    of: impl Fn(u32) -> T,
) -> [T; K] {
    let mut row = [T::default(); K];
    for (to, &word) in row.chunks_exact_mut(PER).zip(bytes.as_chunks::<4>().0) {
        let word = u32::from_le_bytes(word);
        to.iter_mut().enumerate().for_each(|(part, to)| *to = of(element::<PER>(word, part)));
    }
    row
}

/// Columns as rows.
fn turned<const K: usize, T: Copy + Default>(columns: &[[T; K]; N]) -> [[T; N]; K] {
    let mut rows = [[T::default(); N]; K];
    for (k, row) in rows.iter_mut().enumerate() {
        row.iter_mut().zip(columns).for_each(|(to, column)| *to = column[k]);
    }
    rows
}

/// The four lanes of a group hold elements of a row, one behind the other.
fn left<const PER: usize, const K: usize, T: Copy + Default>(
    a: &[&Narrow],
    of: impl Fn(u32) -> T,
) -> [[T; K]; M] {
    let mut left = [[T::default(); K]; M];
    for (register, lanes) in a.iter().enumerate() {
        for (g, lanes) in lanes.as_chunks::<4>().0.iter().enumerate() {
            let (row, k) = place_a::<PER>(4 * g, PER * register);
            let to = &mut left[row][k..k + 4 * PER];
            for (to, &lane) in to.chunks_exact_mut(PER).zip(lanes) {
                to.iter_mut().enumerate().for_each(|(part, to)| *to = of(element::<PER>(lane, part)));
            }
        }
    }
    left
}

fn right<const PER: usize, const K: usize, T: Copy + Default>(
    b: &[&Narrow],
    of: impl Fn(u32) -> T,
) -> [[T; N]; K] {
    let mut right = [[T::default(); N]; K];
    for lane in 0..LANES {
        for i in 0..PER * b.len() {
            let (k, column) = place_b::<PER>(lane, i);
            right[k][column] = of(element::<PER>(b[i / PER][lane], i % PER));
        }
    }
    right
}

/// How a matrix instruction adds.
#[derive(Clone, Copy, Debug)]
pub struct Adding {
    /// C and D are f16.
    pub narrow: bool,
    /// Integers stop at the ends of their range.
    pub satfinite: bool,
    pub sums: Sums,
}

/// D = A B + C, as registers of D; `c` as many. `BLOCK` terms are aligned together.
pub fn multiply<const BLOCK: usize>(
    left: &Left,
    right: &Right,
    adding: Adding,
    c: &[&Narrow],
) -> [Narrow; 4] {
    // The two elements of a register of halves are as far apart as those of two registers.
    let half = |i: usize| c[i / 2].map(|pair| f16(element::<2>(pair, i % 2)).to_bits());
    let c: [Narrow; 4] = std::array::from_fn(|i| if adding.narrow { half(i) } else { *c[i] });
    let mut sum = [[0; N]; M];
    for (i, c) in c.iter().enumerate() {
        for (g, lanes) in c.as_chunks::<4>().0.iter().enumerate() {
            let (row, first) = place_c(4 * g, i);
            lanes.iter().enumerate().for_each(|(t, &lane)| sum[row][first + 2 * t] = lane);
        }
    }
    match (left, right) {
        (Left::Halves(left, special_left), Right::Halves(right, special_right, k)) => {
            let mut values = sum.map(|row| row.map(f32::from_bits));
            let special = *special_left || *special_right;
            add_products::<BLOCK>((left, &right[..*k], special), &mut values, adding.sums);
            sum = values.map(|row| row.map(|x| if x.is_nan() { 0x7FFF_FFFF } else { x.to_bits() }));
        }
        (Left::Bytes(left), Right::Bytes(right, k)) => {
            for (left, sum) in left.iter().zip(&mut sum) {
                for (n, sum) in sum.iter_mut().enumerate() {
                    let products =
                        left.iter().zip(&right[..*k]).map(|(&a, b)| i32::from(a) * i32::from(b[n]));
                    let product: i32 = products.sum();
                    let c = *sum as i32;
                    let saturated = product.saturating_add(c);
                    *sum = if adding.satfinite { saturated } else { product.wrapping_add(c) } as u32;
                }
            }
        }
        _ => unreachable!("the parser checks types"),
    }
    let mut d = [[0; LANES]; 4];
    for (i, d) in d.iter_mut().enumerate() {
        for (g, lanes) in d.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let (row, first) = place_c(4 * g, i);
            lanes.iter_mut().enumerate().for_each(|(t, lane)| *lane = sum[row][first + 2 * t]);
        }
    }
    if adding.narrow {
        let half = |x: u32| Format::of(Type::F16).round(f64::from(f32::from_bits(x)), Rounding::Nearest);
        let pair = |i: usize| std::array::from_fn(|lane| half(d[i][lane]) | half(d[i + 1][lane]) << 16);
        [d[0], d[1]] = [pair(0), pair(2)];
    }
    d
}

/// `sum += left * right`, row by row; `right` has 8 or 16 rows. Where a term is infinite or no number, so is the sum, however it
/// is added; the third says whether a factor is.
fn add_products<const BLOCK: usize>(
    (left, right, special_factors): (&[[f32; HALVES_K]], &[[f32; N]], bool),
    sum: &mut [[f32; N]],
    sums: Sums,
) {
    let k = right.len();
    let special = special_factors || special(sum.as_flattened());
    for (left, sum) in left.iter().zip(sum) {
        let left = &left[..k];
        let before = *sum;
        match sums {
            Sums::Truncated => {
                for (left, right) in left.as_chunks::<BLOCK>().0.iter().zip(right.as_chunks::<BLOCK>().0) {
                    if special {
                        block_truncated_wide(left, right, sum);
                    } else {
                        block_truncated(left, right, sum);
                    }
                }
            }
            Sums::Exact => row_exact(left, right, sum),
        }
        for n in (0..N).filter(|_| special) {
            let products = left.iter().zip(right).map(|(&left, right)| product(left, right[n]));
            let plain = products.fold(f64::from(before[n]), |sum, product| sum + product);
            sum[n] = if plain.is_finite() { sum[n] } else { plain as f32 };
        }
    }
}

/// The product of two halves, without error.
#[inline(always)]
fn product(left: f32, right: f32) -> f64 {
    f64::from(left) * f64::from(right)
}

/// Is one of the numbers infinite or no number?
fn special(numbers: &[f32]) -> bool {
    // One more in the exponent reaches the sign where all its bits are set.
    numbers.iter().fold(0, |all, x| all | (x.abs().to_bits() + (1 << 23))) >> 31 == 1
}

/// Terms that `mma` aligns together, on sm_80 (Fasi et al., section 4).
pub const MMA_BLOCK: usize = 8;
/// Terms that `wgmma` aligns together, on sm_90: all of an instruction's (arXiv 2512.07004).
pub const WGMMA_BLOCK: usize = 16;

/// A number and some products in each column: the magnitudes of all are cut to multiples of one unit, [`FRACTION_BITS`]
/// below the largest, and added without error; the sum is cut to an f32. All numbers are finite.
#[inline(always)]
fn block_truncated<const BLOCK: usize>(left: &[f32; BLOCK], right: &[[f32; N]; BLOCK], sum: &mut [f32; N]) {
    const EXPONENT: u32 = 0xFF << 23;
    let mut terms = [[0.0; N]; BLOCK];
    let mut largest = sum.map(f32::abs);
    for k in 0..BLOCK {
        for n in 0..N {
            terms[k][n] = left[k] * right[k][n];
            let magnitude = terms[k][n].abs();
            largest[n] = if magnitude > largest[n] { magnitude } else { largest[n] };
        }
    }
    // In this range a product that is no f32 is below the unit, and so is what it is rounded to.
    let (least, most) = (power_of_two(-100) as f32, power_of_two(100) as f32);
    if !largest.iter().fold(true, |fits, &largest| fits & (largest >= least) & (largest < most)) {
        return block_truncated_wide(left, right, sum);
    }
    let (mut unit, mut units) = ([0.0; N], [0.0; N]);
    for n in 0..N {
        unit[n] = f32::from_bits((largest[n].to_bits() & EXPONENT) - (FRACTION_BITS << 23));
        units[n] = f32::from_bits((254 << 23) - unit[n].to_bits());
    }
    let mut total = [0; N];
    for n in 0..N {
        // SAFETY: finite, as `largest` is, and below `2^(FRACTION_BITS + 1)` units.
        let in_units = |term: f32| unsafe { (term * units[n]).to_int_unchecked::<i32>() };
        total[n] = in_units(sum[n]);
        for terms in &terms {
            total[n] += in_units(terms[n]);
        }
    }
    for n in 0..N {
        sum[n] = cut(f64::from(total[n]) * f64::from(unit[n]));
    }
}

/// The f32 that is nearest on the side of zero, if it is a normal one.
#[inline(always)]
fn cut(value: f64) -> f32 {
    // The 29 bits of an f64 that an f32 does not have.
    f64::from_bits(value.to_bits() & !0x1FFF_FFFF) as f32
}

/// As [`block_truncated`], of numbers of any size.
#[inline(never)]
fn block_truncated_wide<const BLOCK: usize>(
    left: &[f32; BLOCK],
    right: &[[f32; N]; BLOCK],
    sum: &mut [f32; N],
) {
    const EXPONENT: u64 = 0x7FF << 52;
    for (n, sum) in sum.iter_mut().enumerate() {
        let terms = || (0..BLOCK).map(|k| product(left[k], right[k][n])).chain([f64::from(*sum)]);
        // No product of halves is below 2^-300, so neither is a unit; where all terms are 0 any will do.
        let largest = terms().fold(power_of_two(-300), |largest, term| largest.max(term.abs()));
        let largest = largest.min(power_of_two(900));
        let below = u64::from(FRACTION_BITS) << 52;
        let unit = f64::from_bits((largest.to_bits() & EXPONENT) - below);
        let total = terms().fold(0i64, |total, term| total.wrapping_add((term / unit) as i64));
        *sum = cut(total as f64 * unit);
    }
}

/// `sum += left * right`, rounded once.
///
/// Method: Shewchuk, "Adaptive Precision Floating-Point Arithmetic" (1997): the sum is kept as numbers that do not overlap.
fn row_exact(left: &[f32], right: &[[f32; N]], sum: &mut [f32; N]) {
    for n in 0..N {
        let products = left.iter().zip(right).map(|(&left, right)| product(left, right[n]));
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
        row[..left.len()].copy_from_slice(left);
        let mut right: Vec<[f32; N]> = right.iter().map(|&value| [value; N]).collect();
        right.resize(right.len().next_multiple_of(BLOCK), [0.0; N]);
        let mut sum = [[c; N]];
        let factors = special(&row) || special(right.as_flattened());
        add_products::<BLOCK>((&[row], &right, factors), &mut sum, sums);
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
        /// Numbers of all sizes, near ones and such as an f32 has no product of.
        #[test]
        fn sums_in_range_are_those_of_any_size(
            seed in proptest::collection::vec(any::<u16>(), 16), right in proptest::collection::vec(any::<u16>(), 16 * N),
            c in any::<[u16; N]>(), centre in 0u16..255, spread in 1u16..32, half in any::<bool>(),
        ) {
            let number = |bits: u16| match half {
                true => f16(u32::from(bits & 0xBFFF)),
                false => bf16(u32::from(bits & 0x807F | (centre + bits / 128 % spread).min(254) << 7)),
            };
            let left: [f32; 16] = std::array::from_fn(|k| number(seed[k]));
            let right: [[f32; N]; 16] = std::array::from_fn(|k| std::array::from_fn(|n| number(right[N * k + n])));
            let mut sum = c.map(|c| number(c) * number(c));
            prop_assume!(sum.iter().all(|sum| sum.is_finite()));
            let mut wide = sum;
            block_truncated(&left, &right, &mut sum);
            block_truncated_wide(&left, &right, &mut wide);
            prop_assert_eq!(sum.map(f32::to_bits), wide.map(f32::to_bits));
        }

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
