//! Forms of instructions that a warp does together: shuffles, votes, matrix products and the loads for them.

use super::inputs::{Random, any, scattered};
use super::oracle::{Expected, near, value};
use super::{Expected::Bits, Type};
use super::{Form, name_of};
use crate::emulator::Sm;
use Type::*;

/// Lanes of a warp.
const LANES: usize = 32;
/// Warps of a form, each a CTA.
const WARPS: usize = 16;
/// Every lane takes part.
const ALL: u64 = 0xFFFF_FFFF;

/// All of them.
pub fn forms() -> Vec<Form> {
    let mut forms = Vec::new();
    forms.extend(["up", "down", "bfly", "idx"].map(shuffle));
    forms.extend(votes());
    forms.extend(matches());
    for &(op, ty, of) in REDUCTIONS {
        let name = format!("redux.sync.{op}.{}", name_of(ty));
        let body = format!("{name} %d0, %a0, -1;");
        let values = |warp: &mut [Vec<u64>], random: &mut Random| {
            warp.iter_mut().for_each(|lane| lane[0] = scattered(op, ty, random));
        };
        forms.push(warps(&name, &body, &[ty], &[ty], values, |warp| {
            let all = column(warp, 0).reduce(of).expect("a warp has lanes") & ALL;
            vec![vec![Bits(all)]; LANES]
        }));
    }
    for (register, of) in LANE_MASKS {
        let (name, body) = (format!("mov.u32, %{register}"), format!("mov.u32 %d0, %{register};"));
        forms.push(warps(
            &name,
            &body,
            &[B32],
            &[B32],
            |_, _| (),
            |warp| (0..warp.len()).map(|lane| vec![Bits(of(lane as u32) & ALL)]).collect(),
        ));
    }
    for count in [1, 2, 4] {
        forms.extend([false, true].map(|trans| load_matrix(count, trans)));
        forms.extend([false, true].map(|trans| store_matrix(count, trans)));
    }
    forms.extend(PRODUCTS.iter().map(product));
    forms.push(elect());
    forms
}

/// A form of CTAs of one warp with random operands, which `adjust` makes such as the instruction takes.
fn warps(
    name: &str,
    body: &str,
    takes: &[Type],
    gives: &[Type],
    adjust: impl Fn(&mut [Vec<u64>], &mut Random),
    oracle: impl Fn(&[Vec<u64>]) -> Vec<Vec<Expected>>,
) -> Form {
    let mut random = Random::of(name);
    let mut warp = || {
        let lane = |random: &mut Random| takes.iter().map(|&ty| any(ty, random)).collect();
        let mut warp: Vec<Vec<u64>> = (0..LANES).map(|_| lane(&mut random)).collect();
        adjust(&mut warp, &mut random);
        warp
    };
    let ctas: Vec<_> = (0..WARPS).map(|_| warp()).collect();
    Form::new(name, body, [takes, gives], &ctas, oracle)
}

/// One operand of all lanes.
fn column(warp: &[Vec<u64>], at: usize) -> impl Iterator<Item = u64> {
    warp.iter().map(move |lane| lane[at])
}

/// `shfl.sync`, with every lane's own source and segments of all sizes (PTX ISA, "shfl.sync").
fn shuffle(mode: &str) -> Form {
    let name = format!("shfl.sync.{mode}.b32");
    let body = format!("{name} %d0|%p0, %a0, %a1, %a2, -1;\nselp.b32 %d1, 1, 0, %p0;");
    let segments = |warp: &mut [Vec<u64>], random: &mut Random| {
        // Segments of 1, 2, 4, ... lanes; the clamp is their first lane of `up` and their last of the others.
        let mask = (0x1F << random.below(6)) & 0x1F;
        let clamp = if mode == "up" { 0 } else { 0x1F };
        for lane in warp {
            lane[1] = random.below(32);
            lane[2] = mask << 8 | clamp;
        }
    };
    warps(&name, &body, &[B32; 3], &[B32; 2], segments, |warp| {
        let of = |(lane, operands): (usize, &Vec<u64>)| {
            let (lane, b) = (lane as i64, operands[1] as i64 & 0x1F);
            let (clamp, mask) = (operands[2] as i64 & 0x1F, operands[2] as i64 >> 8 & 0x1F);
            let (first, last) = (lane & mask, lane & mask | clamp & !mask);
            let (from, inside) = match mode {
                "up" => (lane - b, lane - b >= last),
                "down" => (lane + b, lane + b <= last),
                "bfly" => (lane ^ b, lane ^ b <= last),
                _ => (first | b & !mask, (first | b & !mask) <= last),
            };
            let from = if inside { from } else { lane };
            vec![Bits(warp[from as usize][0]), Bits(inside.into())]
        };
        warp.iter().enumerate().map(of).collect()
    })
}

fn votes() -> impl Iterator<Item = Form> {
    // Of the four, the last is a number.
    ["all.pred", "any.pred", "uni.pred", "ballot.b32"].into_iter().map(|mode| {
        let name = format!("vote.sync.{mode}");
        let vote = if mode.starts_with("ballot") {
            format!("{name} %d0, %p0, -1;")
        } else {
            format!("{name} %p1, %p0, -1;\nselp.b32 %d0, 1, 0, %p1;")
        };
        let body = format!("setp.ne.b32 %p0, %a0, 0;\n{vote}");
        // None, all, or some.
        let some = |warp: &mut [Vec<u64>], random: &mut Random| {
            let share = random.below(3);
            warp.iter_mut().for_each(|lane| lane[0] = if share == 2 { random.below(2) } else { share });
        };
        warps(&name, &body, &[B32], &[B32], some, |warp| {
            let ballot = column(warp, 0).enumerate().fold(0, |all, (lane, vote)| all | vote << lane);
            let given = match mode {
                "all.pred" => u64::from(ballot == ALL),
                "any.pred" => u64::from(ballot != 0),
                "uni.pred" => u64::from(ballot == ALL || ballot == 0),
                _ => ballot,
            };
            vec![vec![Bits(given)]; LANES]
        })
    })
}

fn matches() -> Vec<Form> {
    let few = |warp: &mut [Vec<u64>], random: &mut Random| {
        let kinds = 1 + random.below(4);
        // In 64 bits they differ in the upper half alone.
        warp.iter_mut().for_each(|lane| lane[0] = random.below(kinds) * (1 << 32 | 1));
    };
    let equal = |warp: &[Vec<u64>], of: u64, mask: u64| {
        let same = column(warp, 0).enumerate().filter(|(_, value)| value & mask == of & mask);
        same.fold(0, |all, (lane, _)| all | 1u64 << lane)
    };
    let mut forms = Vec::new();
    for (ty, mask) in [(B32, ALL), (B64, u64::MAX)] {
        let bits = ty.bits();
        let name = format!("match.any.sync.b{bits}");
        let body = format!("{name} %d0, %a0, -1;");
        forms.push(warps(&name, &body, &[ty], &[B32], few, |warp| {
            column(warp, 0).map(|value| vec![Bits(equal(warp, value, mask))]).collect()
        }));
        let name = format!("match.all.sync.b{bits}");
        let body = format!("{name} %d0|%p0, %a0, -1;\nselp.b32 %d1, 1, 0, %p0;");
        forms.push(warps(&name, &body, &[ty], &[B32; 2], few, |warp| {
            let all = equal(warp, warp[0][0], mask) == ALL;
            vec![vec![Bits(if all { ALL } else { 0 }), Bits(all.into())]; LANES]
        }));
    }
    forms
}

/// A reduction of two values.
type Reduce = fn(u64, u64) -> u64;

#[rustfmt::skip] // a table
const REDUCTIONS: &[(&str, Type, Reduce)] = &[
    ("add", U32, |a, b| a.wrapping_add(b)),
    ("add", S32, |a, b| a.wrapping_add(b)),
    ("min", U32, u64::min),
    ("max", U32, u64::max),
    ("min", S32, |a, b| if (a as i32) < b as i32 { a } else { b }),
    ("max", S32, |a, b| if (a as i32) > b as i32 { a } else { b }),
    ("and", B32, |a, b| a & b),
    ("or", B32, |a, b| a | b),
    ("xor", B32, |a, b| a ^ b),
];

/// A lane's number to what a register has there.
type OfLane = fn(u32) -> u64;

/// Special registers.
#[rustfmt::skip] // a table
const LANE_MASKS: &[(&str, OfLane)] = &[
    ("laneid", |lane| lane.into()),
    ("lanemask_eq", |lane| 1 << lane),
    ("lanemask_lt", |lane| (1 << lane) - 1),
    ("lanemask_le", |lane| (2 << lane) - 1),
    ("lanemask_gt", |lane| !((2 << lane) - 1)),
    ("lanemask_ge", |lane| !((1 << lane) - 1)),
];

/// `ldmatrix`: each lane stores a row of 16 bytes, and says which lane's row it means.
///
/// Matrix `j` has the rows that lanes `8 j` to `8 j + 7` name. Lane `l` gets of row `l / 4` the elements `2 (l % 4)` and the
/// next; transposed, of the rows `2 (l % 4)` and the next the element `l / 4` (PTX ISA, "ldmatrix").
fn load_matrix(count: usize, trans: bool) -> Form {
    let instruction =
        format!("ldmatrix.sync.aligned.m8n8.x{count}{}.shared.b16", if trans { ".trans" } else { "" });
    let to: Vec<String> = (0..count).map(|at| format!("%d{at}")).collect();
    let body = format!(
        "mov.b32 %r0, smem;\nshl.b32 %r1, %t, 4;\nadd.s32 %r1, %r0, %r1;\n\
         st.shared.v4.b32 [%r1], {{%a0, %a1, %a2, %a3}};\nbar.warp.sync -1;\n\
         shl.b32 %r2, %a4, 4;\nadd.s32 %r2, %r0, %r2;\n{instruction} {{{}}}, [%r2];",
        to.join(", ")
    );
    let rows = |warp: &mut [Vec<u64>], random: &mut Random| {
        warp.iter_mut().for_each(|lane| lane[4] = random.below(32))
    };
    let form = warps(&instruction, &body, &[B32; 5], &vec![B32; count], rows, |warp| {
        let element = |matrix: usize, row: usize, column: usize| {
            let named = &warp[warp[8 * matrix + row][4] as usize];
            named[column / 2] >> (16 * (column % 2)) & 0xFFFF
        };
        let of = |lane: usize, matrix: usize| {
            let (row, column) = (lane / 4, 2 * (lane % 4));
            let [low, high] = match trans {
                false => [element(matrix, row, column), element(matrix, row, column + 1)],
                true => [element(matrix, column, row), element(matrix, column + 1, row)],
            };
            Bits(high << 16 | low)
        };
        (0..LANES).map(|lane| (0..count).map(|matrix| of(lane, matrix)).collect()).collect()
    });
    form.with_shared(16 * LANES as u32)
}

/// `stmatrix`: over rows of 16 bytes that lanes have stored, those of matrices in registers, at the lanes' rows that lanes name.
///
/// Lane `l` has of each matrix what `ldmatrix` would give it (PTX ISA, "stmatrix").
fn store_matrix(count: usize, trans: bool) -> Form {
    let instruction =
        format!("stmatrix.sync.aligned.m8n8.x{count}{}.shared.b16", if trans { ".trans" } else { "" });
    let from: Vec<String> = (0..count).map(|at| format!("%a{}", 5 + at)).collect();
    let body = format!(
        "mov.b32 %r0, smem;\nshl.b32 %r1, %t, 4;\nadd.s32 %r1, %r0, %r1;\n\
         st.shared.v4.b32 [%r1], {{%a0, %a1, %a2, %a3}};\nbar.warp.sync -1;\n\
         shl.b32 %r2, %a4, 4;\nadd.s32 %r2, %r0, %r2;\n{instruction} [%r2], {{{}}};\nbar.warp.sync -1;\n\
         ld.shared.v4.b32 {{%d0, %d1, %d2, %d3}}, [%r1];",
        from.join(", ")
    );
    // Each lane's row is another's, as no two may store to one.
    let rows = |warp: &mut [Vec<u64>], random: &mut Random| {
        let (odd, first) = (2 * random.below(16) + 1, random.below(32));
        warp.iter_mut().zip(0..).for_each(|(lane, at)| lane[4] = (odd * at + first) % 32);
    };
    let form = warps(&instruction, &body, &vec![B32; 5 + count], &[B32; 4], rows, |warp| {
        let mut stored: Vec<Vec<u64>> = warp.iter().map(|lane| lane[..4].to_vec()).collect();
        for (matrix, row) in (0..count).flat_map(|matrix| (0..8).map(move |row| (matrix, row))) {
            let element = |column: usize| {
                let (a, b) = if trans { (column, row) } else { (row, column) };
                warp[4 * a + b / 2][5 + matrix] >> (16 * (b % 2)) & 0xFFFF
            };
            let word = |at: usize| element(2 * at + 1) << 16 | element(2 * at);
            stored[warp[8 * matrix + row][4] as usize] = (0..4).map(word).collect();
        }
        stored.into_iter().map(|row| row.into_iter().map(Bits).collect()).collect()
    });
    Form { sm: Sm::Sm90a, ..form }.with_shared(16 * LANES as u32)
}

/// `elect.sync`: which lane is elected is open, but not that it is one, and that all are told its number.
fn elect() -> Form {
    let body = "elect.sync %r0|%p0, -1;\nvote.sync.ballot.b32 %r1, %p0, -1;\npopc.b32 %d0, %r1;\n\
                shl.b32 %r2, 1, %r0;\nsetp.eq.b32 %p1, %r1, %r2;\nselp.b32 %d1, 1, 0, %p1;";
    let one = |warp: &[Vec<u64>]| vec![vec![Bits(1); 2]; warp.len()];
    Form { sm: Sm::Sm90a, ..warps("elect.sync", body, &[B32], &[B32; 2], |_, _| (), one) }
}

/// An `mma.sync` of 16 x 8 elements: K, the type of A, the type of B, the type of C and D.
struct Product(usize, Type, Type, Type);

/// Every shape and type that the emulator has.
const PRODUCTS: &[Product] = &[
    Product(8, Bf16, Bf16, F32),
    Product(16, Bf16, Bf16, F32),
    Product(8, F16, F16, F32),
    Product(16, F16, F16, F32),
    Product(8, F16, F16, F16),
    Product(16, F16, F16, F16),
    Product(16, S8, S8, S32),
    Product(16, S8, U8, S32),
    Product(16, U8, S8, S32),
    Product(16, U8, U8, S32),
    Product(32, S8, S8, S32),
    Product(32, S8, U8, S32),
    Product(32, U8, S8, S32),
    Product(32, U8, U8, S32),
];

/// Row and column of element `i` of A in a lane, as the figures of the ISA have it ("Matrix Fragments for mma.m16n8k8",
/// "...k16", "...k32"): of 16-bit elements a0 a1 are in the lane's row, a2 a3 eight rows below; of 8-bit elements a0 to a3 and
/// a4 to a7. The next as many have their columns in the other half.
pub(super) fn place_a(k: usize, bits: u32, lane: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane % 4);
    match (bits, k) {
        (16, 8) => (if i < 2 { group } else { group + 8 }, thread * 2 + (i & 1)),
        (16, _) => {
            let row = if i < 2 || (4..6).contains(&i) { group } else { group + 8 };
            (row, thread * 2 + (i & 1) + if i < 4 { 0 } else { 8 })
        }
        (_, 16) => (if i < 4 { group } else { group + 8 }, thread * 4 + (i & 3)),
        _ => {
            let row = if i < 4 || (8..12).contains(&i) { group } else { group + 8 };
            (row, thread * 4 + (i & 3) + if i < 8 { 0 } else { 16 })
        }
    }
}

/// Row and column of element `i` of B in a lane.
fn place_b(bits: u32, lane: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane % 4);
    let row = match bits {
        16 => thread * 2 + (i & 1) + if i < 2 { 0 } else { 8 },
        _ => thread * 4 + (i & 3) + if i < 4 { 0 } else { 16 },
    };
    (row, group)
}

/// Row and column of element `i` of C and D in a lane.
fn place_c(lane: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane % 4);
    (if i < 2 { group } else { group + 8 }, thread * 2 + (i & 1))
}

/// A form of `mma.sync`. Half of the warps have small integers, whose sum is exact however it is added.
fn product(&Product(k, a_ty, b_ty, sum): &Product) -> Form {
    let [a, b, d] = [a_ty, b_ty, sum].map(name_of);
    let name = format!("mma.sync.aligned.m16n8k{k}.row.col.{d}.{a}.{b}.{d}");
    let bits = a_ty.bits();
    let (n_a, n_b) = (16 * k * bits as usize / 1024, 8 * k * bits as usize / 1024);
    let (n_c, in_c) = if sum == F16 { (2, F16x2) } else { (4, sum) };
    let vector = |letter: char, from: usize, count: usize| {
        let all: Vec<String> = (from..from + count).map(|at| format!("%{letter}{at}")).collect();
        format!("{{{}}}", all.join(", "))
    };
    let (in_a, in_b) = (vector('a', 0, n_a), vector('a', n_a, n_b));
    let body = format!("{name} {}, {in_a}, {in_b}, {};", vector('d', 0, n_c), vector('a', n_a + n_b, n_c));
    let takes: Vec<Type> = [vec![B32; n_a + n_b], vec![in_c; n_c]].concat();
    let operands = |warp: &mut [Vec<u64>], random: &mut Random| {
        let small = random.below(2) == 0;
        for (at, register) in warp.iter_mut().flat_map(|lane| lane.iter_mut().enumerate()) {
            let ty = if at < n_a {
                a_ty
            } else if at < n_a + n_b {
                b_ty
            } else {
                sum
            };
            let per = if at < n_a + n_b { 32 / ty.bits() } else { in_c.bits() / ty.bits() };
            *register = (0..per).fold(0, |all, part| all | element(ty, small, random) << (ty.bits() * part));
        }
    };
    warps(&name, &body, &takes, &vec![in_c; n_c], operands, |warp| {
        // Element i of registers from `first` on.
        let part = |lane: usize, first: usize, ty: Type, i: usize| {
            let per = (if ty == F32 || ty == S32 { 1 } else { 32 / ty.bits() }) as usize;
            number(ty, warp[lane][first + i / per] >> (ty.bits() as usize * (i % per)))
        };
        let (mut left, mut right) = (vec![[0i128; 32]; 16], vec![[0i128; 8]; k]);
        for lane in 0..LANES {
            for i in 0..n_a * 32 / bits as usize {
                let (row, column) = place_a(k, bits, lane, i);
                left[row][column] = part(lane, 0, a_ty, i);
            }
            for i in 0..n_b * 32 / bits as usize {
                let (row, column) = place_b(bits, lane, i);
                right[row][column] = part(lane, n_a, b_ty, i);
            }
        }
        let of = |lane: usize, i: usize| {
            let (row, column) = place_c(lane, i);
            let terms = (0..k).map(|k| left[row][k] * right[k][column]);
            let c = part(lane, n_a + n_b, sum, i);
            if sum == S32 {
                return Bits((terms.sum::<i128>() + c) as u64 & ALL);
            }
            // Products are in units of UNIT squared.
            let terms = terms.chain([c * UNIT as i128]);
            let (exact, all) = terms.fold((0, 0), |(exact, all), term| (exact + term, all + term.abs()));
            let scale = UNIT * UNIT;
            sum_near(sum, exact as f64 / scale, all as f64 / scale, k)
        };
        (0..LANES).map(|lane| (0..4).map(|i| of(lane, i)).collect()).collect()
    })
}

/// An element of a matrix: small, or a float of exponents from -6 to 6.
pub(super) fn element(ty: Type, small: bool, random: &mut Random) -> u64 {
    // Exponent's bias and digits of the fraction.
    let (bias, digits) = match ty {
        F16 => (15, 10),
        Bf16 => (127, 7),
        F32 => (127, 23),
        _ if small => return random.below(5),
        _ => return random.bits() & u64::MAX >> (64 - ty.bits()),
    };
    // 1, 2, 3 and 4 by their exponents and the first digit of their fractions.
    let (exponent, fraction) = match small {
        true => [(0, 0), (1, 0), (1, 1 << (digits - 1)), (2, 0)][random.below(4) as usize],
        false => (random.below(13) as i64 - 6, random.bits() & ((1 << digits) - 1)),
    };
    let sign = random.below(2) << (if ty == F32 { 31 } else { 15 });
    sign | ((exponent + bias) as u64) << digits | fraction
}

/// Elements of matrices are integers in units of its inverse: 29 bits are the last that an f32 of the least exponent has.
pub(super) const UNIT: f64 = (1u64 << 29) as f64;

/// An element's value: of a float in units, of an integer as it is.
pub(super) fn number(ty: Type, bits: u64) -> i128 {
    match ty {
        S8 => i128::from(bits as i8),
        U8 => i128::from(bits as u8),
        S32 => i128::from(bits as i32),
        F16 | Bf16 => (value(ty, bits & 0xFFFF) * UNIT) as i128,
        float => (value(float, bits & ALL) * UNIT) as i128,
    }
}

/// A sum of `k` products and an accumulator, of which `all` is the sum of magnitudes.
///
/// A tensor core aligns the terms of a block to the largest and cuts off what lies below its last digit: each term and each
/// block's sum loses at most 2^-22 of `all`. Where all terms are small integers nothing is lost.
pub(super) fn sum_near(ty: Type, exact: f64, all: f64, k: usize) -> Expected {
    let whole = exact.fract() == 0.0 && all < 1024.0;
    let error = if whole { 0.0 } else { (k + 4) as f64 * 2f64.powi(-22) * all };
    match exact == 0.0 {
        true => Expected::Within(ty, -error, error),
        false => near(ty, exact, error),
    }
}
