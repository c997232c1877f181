//! Forms of instructions that sm_90a added and a warpgroup runs together: `wgmma`.
//!
//! Threads store their operands one after the other, so shared memory holds an image that the oracle knows byte by byte; where an
//! element of A or B lies in it is computed from the PTX ISA ("Shared Memory Matrix Layout", "Strides").

use super::inputs::Random;
use super::oracle::Expected;
use super::warp::{UNIT, element, number, place_a, sum_near};
use super::{Expected::Bits, Form, Type, name_of};
use crate::emulator::Sm;
use Type::*;

/// Threads of a warpgroup.
const THREADS: usize = 128;
/// Warpgroups of a form, each a CTA.
const CTAS: usize = 2;
/// Bytes that all threads store at once.
const STORED: usize = 16 * THREADS;
/// Rows of A.
const M: usize = 64;
/// Bytes of k.
const K_BYTES: usize = 32;

/// How a matrix lies in shared memory.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Layout {
    /// Bytes within which chunks are moved: 16 is not at all.
    span: usize,
    /// Is k the outer dimension? Elements then have 16 bits.
    trans: bool,
}

impl Layout {
    /// Bytes of the matrix.
    fn bytes(self, rows: usize) -> usize {
        if self.trans || self.span == 16 { rows * K_BYTES } else { rows * self.span }
    }

    /// The offsets of the descriptor, in bytes: leading and stride.
    fn offsets(self) -> [usize; 2] {
        match self {
            // Of 8 rows the 16 bytes lie together, 128 in all, and the next chunk of k after them.
            Layout { span: 16, trans: false } => [128, 256],
            Layout { span, trans: false } => [16, 8 * span],
            // Panels of as many rows as the span has, each with two times 8 of k.
            Layout { span, trans: true } => [16 * span, 8 * span],
        }
    }

    /// Where the element of `size` bytes at `k` of a row lies, from a multiple of 1024 on.
    fn place(self, row: usize, k: usize, size: usize) -> usize {
        let [leading, stride] = self.offsets();
        let (span, byte) = (self.span, k * size);
        let at = match self {
            Layout { span: 16, trans: false } => {
                row / 8 * stride + byte / 16 * leading + row % 8 * 16 + byte % 16
            }
            Layout { trans: false, .. } => row / 8 * stride + row % 8 * span + byte,
            Layout { trans: true, .. } => {
                let rows = span / 2;
                row / rows * leading + k / 8 * stride + k % 8 * span + 2 * (row % rows)
            }
        };
        let moved =
            [(32, 1), (64, 3), (128, 7)].into_iter().find(|(of, _)| *of == span).map_or(0, |(_, bits)| bits);
        at ^ (at >> 7 & moved) << 4
    }

    /// The descriptor but for the address ("Matrix Descriptor Format").
    fn descriptor(self) -> u64 {
        let [leading, stride] = self.offsets().map(|bytes| bytes as u64 >> 4);
        let swizzle = match self.span {
            128 => 1,
            64 => 2,
            32 => 3,
            _ => 0,
        };
        leading << 16 | stride << 32 | swizzle << 62
    }
}

/// A `wgmma`: columns, the types of A and B, where A and B lie. `None`: A is in registers.
#[derive(Clone, Copy)]
struct Product {
    n: usize,
    types: [Type; 2],
    a: Option<Layout>,
    b: Layout,
}

/// All of them.
pub fn forms() -> Vec<Form> {
    let lies = |span, trans| Layout { span, trans };
    let mut products = Vec::new();
    // Shapes, by the layout that wastes nothing.
    for n in [8, 16, 24, 32, 64, 96, 128, 192, 256] {
        let plain = lies(32, false);
        products.push(Product { n, types: [Bf16; 2], a: Some(plain), b: plain });
    }
    // Swizzles, with A in shared memory and in registers.
    for span in [16, 32, 64, 128] {
        for ty in [Bf16, F16] {
            let plain = lies(span, false);
            products.push(Product { n: 64, types: [ty; 2], a: Some(plain), b: plain });
            products.push(Product { n: 64, types: [ty; 2], a: None, b: plain });
        }
    }
    // Transposed, one or both.
    for span in [32, 64, 128] {
        let (plain, turned) = (lies(span, false), lies(span, true));
        for (a, b) in [(Some(plain), turned), (Some(turned), plain), (Some(turned), turned), (None, turned)] {
            products.push(Product { n: 64, types: [Bf16; 2], a, b });
        }
    }
    // Of one type: two need PTX 8.4, and no kernel has them.
    for ty in [S8, U8] {
        let plain = lies(128, false);
        products.push(Product { n: 64, types: [ty; 2], a: Some(plain), b: plain });
    }
    products.sort_by_key(Product::name);
    products.dedup_by_key(|product| product.name());
    products.into_iter().map(product).collect()
}

impl Product {
    fn instruction(&self) -> String {
        let [a, b] = self.types.map(name_of);
        let (k, d) = if self.types[0].float() { (16, "f32") } else { (32, "s32") };
        format!("wgmma.mma_async.sync.aligned.m64n{}k{k}.{d}.{a}.{b}", self.n)
    }

    fn name(&self) -> String {
        let lies =
            |layout: Layout| format!("{}{}", layout.span, if layout.trans { " transposed" } else { "" });
        let a = self.a.map_or("registers".to_string(), lies);
        format!("{}, A {a}, B {}", self.instruction(), lies(self.b))
    }
}

fn product(product: Product) -> Form {
    let Product { n, types: [a_ty, b_ty], a, b } = product;
    let float = a_ty.float();
    let (size, k) = if float { (2, 16) } else { (1, 32) };
    let begin_b = a.map_or(0, |a| a.bytes(M));
    let bytes = (begin_b + b.bytes(n)).next_multiple_of(STORED);
    let words = bytes / THREADS / 8;
    let register_a = if a.is_none() { 4 } else { 0 };
    let sum = if float { F32 } else { S32 };

    let store =
        |at: usize| format!("st.shared.v2.b64 [%r1+{}], {{%a{}, %a{}}};\n", STORED * at, 2 * at, 2 * at + 1);
    let d: Vec<String> = (0..n / 2).map(|at| format!("%d{at}")).collect();
    let of_a = match a {
        Some(_) => "%l1".to_string(),
        None => {
            format!("{{{}}}", (words..words + 4).map(|at| format!("%a{at}")).collect::<Vec<_>>().join(", "))
        }
    };
    let turned = |layout: Layout| u8::from(layout.trans);
    let flags = match a {
        _ if !float => String::new(),
        Some(a) => format!(", 1, 1, {}, {}", turned(a), turned(b)),
        None => format!(", 1, 1, {}", turned(b)),
    };
    let body = format!(
        "mov.b32 %r0, smem;\nmad.lo.s32 %r1, %t, 16, %r0;\n{}fence.proxy.async;\nbar.sync 0;\n\
         cvt.u64.u32 %l0, %r0;\nshr.u64 %l0, %l0, 4;\n\
         mov.b64 %l1, {:#x};\nor.b64 %l1, %l1, %l0;\n\
         add.s64 %l0, %l0, {};\nmov.b64 %l2, {:#x};\nor.b64 %l2, %l2, %l0;\n{}setp.eq.u32 %p0, %t, %t;\n\
         wgmma.fence.sync.aligned;\n{} {{{}}}, {of_a}, %l2, %p0{flags};\n\
         wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;",
        (0..words / 2).map(store).collect::<String>(),
        a.map_or(0, Layout::descriptor),
        begin_b >> 4,
        b.descriptor(),
        d.iter().map(|d| format!("mov.b32 {d}, 0;\n")).collect::<String>(),
        product.instruction(),
        d.join(", ")
    );
    let name = product.name();
    let mut random = Random::of(&name);
    // Elements in a word of so many bits; B's may be of another type, but are as random.
    let mut word = |bits: u32, small: bool| {
        let each = 8 * size as u32;
        (0..bits / each).fold(0, |all, part| all | element(a_ty, small, &mut random) << (each * part))
    };
    let ctas: Vec<Vec<Vec<u64>>> = (0..CTAS)
        .map(|cta| {
            let mut thread = || {
                let widths = std::iter::repeat_n(64, words).chain(std::iter::repeat_n(32, register_a));
                widths.map(|bits| word(bits, cta == 0)).collect()
            };
            (0..THREADS).map(|_| thread()).collect()
        })
        .collect();
    let takes = [vec![B64; words], vec![B32; register_a]].concat();
    let form = Form::new(&name, &body, [&takes, &vec![sum; n / 2]], &ctas, |cta| {
        let byte =
            |at: usize| (cta[at % STORED / 16][at / STORED * 2 + at % 16 / 8] >> (8 * (at % 8)) & 0xFF) as u8;
        let element = |layout: Layout, begin: usize, ty: Type, row: usize, k: usize| {
            let at = begin + layout.place(row, k, size);
            number(ty, (0..size).fold(0, |all, part| all | u64::from(byte(at + part)) << (8 * part)))
        };
        let mut left = vec![vec![0; k]; M];
        match a {
            Some(a) => left.iter_mut().enumerate().for_each(|(row, of)| {
                (0..k).for_each(|k| of[k] = element(a, 0, a_ty, row, k));
            }),
            // Each warp has 16 rows, as of `mma`.
            None => (0..THREADS).for_each(|thread| {
                for i in 0..8 {
                    let (row, column) = place_a(k, 16, thread % 32, i);
                    left[thread / 32 * 16 + row][column] =
                        number(a_ty, cta[thread][words + i / 2] >> (16 * (i % 2)));
                }
            }),
        }
        let right: Vec<Vec<i128>> =
            (0..n).map(|row| (0..k).map(|k| element(b, begin_b, b_ty, row, k)).collect()).collect();
        let of = |thread: usize, i: usize| -> Expected {
            let (group, lane) = (thread % 32 / 4, thread % 4);
            let (row, column) =
                (thread / 32 * 16 + group + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * lane + (i & 1));
            let terms = left[row].iter().zip(&right[column]).map(|(a, b)| a * b);
            if !float {
                return Bits(terms.sum::<i128>() as u64 & 0xFFFF_FFFF);
            }
            let (exact, all) = terms.fold((0, 0), |(exact, all), term| (exact + term, all + term.abs()));
            sum_near(F32, exact as f64 / (UNIT * UNIT), all as f64 / (UNIT * UNIT), k)
        };
        (0..THREADS).map(|thread| (0..n / 2).map(|i| of(thread, i)).collect()).collect()
    });
    Form { sm: Sm::Sm90a, ..form }.with_shared(bytes as u32)
}
