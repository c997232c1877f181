//! Forms of bulk copies of boxes of a tensor (`cp.async.bulk.tensor`), to shared memory, of several CTAs too, and from it.
//!
//! Where an element of a box lies is computed from the PTX ISA, "Tensors", "Tiled mode", "Swizzling modes": elements of a box lie
//! one after the other, the innermost dimension first, and chunks of 16 bytes then change their places; what lies outside of the
//! tensor is 0 when it is loaded, and stays as it is when it is stored.

use super::inputs::Random;
use super::{Expected, Expected::Bits, Form, Tensor, Type};
use crate::emulator::Sm;
use crate::tensor_map::{Element, Fill, Swizzle, TensorMap};
use Type::*;

/// Threads of a CTA.
const THREADS: usize = 128;
/// CTAs of a form, or clusters.
const CTAS: usize = 12;
/// Words of 64 bits that all threads of a CTA have once.
const WORD_BYTES: usize = 8 * THREADS;
/// Words of each thread that a tensor of operands is made of.
const WORDS: usize = 8;

/// A tensor and its box.
#[derive(Clone, Copy)]
struct Boxed<'a> {
    dtype: Element,
    dims: &'a [u64],
    tile: &'a [u32],
    swizzle: Swizzle,
}

/// Each number of dimensions, as attention and products have them; each swizzle, with rows as long as it spans; elements of 8, 16
/// and 32 bits.
#[rustfmt::skip] // a table
const BOXES: &[Boxed<'static>] = &[
    Boxed { dtype: Element::F32, dims: &[3000], tile: &[256], swizzle: Swizzle::None },
    Boxed { dtype: Element::Bf16, dims: &[72, 40], tile: &[64, 16], swizzle: Swizzle::None },
    Boxed { dtype: Element::Bf16, dims: &[24, 60], tile: &[16, 32], swizzle: Swizzle::Bytes32 },
    Boxed { dtype: Element::Bf16, dims: &[40, 60], tile: &[32, 32], swizzle: Swizzle::Bytes64 },
    Boxed { dtype: Element::Bf16, dims: &[80, 60], tile: &[64, 32], swizzle: Swizzle::Bytes128 },
    Boxed { dtype: Element::F16, dims: &[80, 60], tile: &[64, 32], swizzle: Swizzle::Bytes128 },
    Boxed { dtype: Element::F32, dims: &[40, 60], tile: &[32, 16], swizzle: Swizzle::Bytes128 },
    Boxed { dtype: Element::U8, dims: &[144, 60], tile: &[128, 24], swizzle: Swizzle::Bytes128 },
    Boxed { dtype: Element::Bf16, dims: &[72, 3, 40], tile: &[64, 1, 16], swizzle: Swizzle::Bytes128 },
    Boxed { dtype: Element::Bf16, dims: &[80, 5, 20], tile: &[64, 3, 8], swizzle: Swizzle::Bytes128 },
    Boxed { dtype: Element::Bf16, dims: &[72, 3, 20, 2], tile: &[64, 1, 16, 1], swizzle: Swizzle::Bytes128 },
    Boxed { dtype: Element::F16, dims: &[80, 3, 10, 4], tile: &[64, 2, 4, 2], swizzle: Swizzle::Bytes128 },
    Boxed { dtype: Element::Bf16, dims: &[72, 2, 5, 3, 3], tile: &[64, 1, 4, 2, 2], swizzle: Swizzle::Bytes128 },
];

/// All of them.
pub fn forms() -> Vec<Form> {
    let mut forms: Vec<Form> = BOXES.iter().map(load).collect();
    forms.push(prefetched(load(&BOXES[4])));
    forms.extend([1, 2, 3].map(|mask| multicast(&BOXES[4], mask)));
    forms.extend(BOXES.iter().filter(|boxed| boxed.dims.len() > 1).map(store));
    forms
}

impl Boxed<'_> {
    fn rank(&self) -> usize {
        self.dims.len()
    }

    fn name(&self) -> String {
        let element = format!("{:?}", self.dtype).to_lowercase();
        let tile: Vec<String> = self.tile.iter().map(u32::to_string).collect();
        format!("{element}, box {}, swizzle of {} bytes", tile.join(" x "), self.swizzle.span())
    }

    fn bytes(&self) -> usize {
        self.tile.iter().product::<u32>() as usize * self.dtype.bytes() as usize
    }

    /// A map whose rows are so many bytes apart, and whose other dimensions lie close.
    fn map(&self, pitch: u64) -> TensorMap {
        let outer = &self.dims[1..];
        TensorMap {
            dtype: self.dtype,
            base: 0,
            dims: self.dims.to_vec(),
            strides: (0..outer.len()).map(|at| pitch * outer[..at].iter().product::<u64>()).collect(),
            tile: self.tile.to_vec(),
            element_strides: vec![1; self.rank()],
            swizzle: self.swizzle,
            fill: Fill::Zeros,
        }
    }

    /// Where the box of a CTA begins: inside, across the end or the beginning of each dimension; any of these or far outside.
    fn corner(&self, cta: usize, random: &mut Random) -> Vec<u64> {
        let corner = self.dims.iter().zip(self.tile).map(|(&dim, &tile)| {
            let (dim, tile) = (dim as i64, i64::from(tile));
            let place = if cta < 3 { cta as u64 } else { random.below(4) };
            let at = match place {
                0 => random.below(dim as u64) as i64,
                1 => dim - tile + 1 + random.below(tile as u64 - u64::from(tile > 1)) as i64,
                2 => -(random.below(tile as u64) as i64),
                _ => [0, dim, -tile, -(1 << 20), 1 << 20][random.below(5) as usize],
            };
            // The upper half of its 8 bytes is a part of the tensor, as all operands are.
            at as u32 as u64 | random.bits() << 32
        });
        corner.collect()
    }

    /// The byte of the tensor, counted from its first element, that lies at a byte of the box in shared memory. `None`: outside.
    fn source(&self, map: &TensorMap, corner: &[u64], byte: usize) -> Option<usize> {
        // Which bits of the number of the 128 bytes are added to that of the chunk, without carry.
        let moved = match self.swizzle {
            Swizzle::None => 0,
            Swizzle::Bytes32 => 1,
            Swizzle::Bytes64 => 3,
            Swizzle::Bytes128 => 7,
        };
        let linear = byte ^ (byte >> 7 & moved) << 4;
        let size = self.dtype.bytes() as usize;
        let (mut element, mut at) = (linear / size, (linear % size) as i64);
        for (axis, (&dim, &tile)) in self.dims.iter().zip(self.tile).enumerate() {
            let index = i64::from(corner[axis] as i32) + (element % tile as usize) as i64;
            element /= tile as usize;
            if index < 0 || index >= dim as i64 {
                return None;
            }
            at += index * if axis == 0 { size as i64 } else { map.strides[axis - 1] as i64 };
        }
        Some(at as usize)
    }
}

/// Registers of operands in braces.
fn operands(from: usize, count: usize) -> String {
    let all: Vec<String> = (from..from + count).map(|at| format!("%a{at}")).collect();
    format!("{{{}}}", all.join(", "))
}

/// Words of bytes.
fn words(bytes: &[u8]) -> Vec<Expected> {
    bytes.as_chunks().0.iter().map(|word| Bits(u64::from_le_bytes(*word))).collect()
}

/// Threads' words as they lie in memory: each thread's from `from` on.
fn image(threads: &[Vec<u64>], from: usize, count: usize) -> Vec<u8> {
    threads
        .iter()
        .flat_map(|operands| &operands[from..from + count])
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

/// Each thread's place in a box of so many words of each.
fn place(each: usize) -> String {
    format!("mov.b32 %r0, smem;\nmad.lo.s32 %r1, %t, {}, %r0;\n", 8 * each)
}

/// Loads or stores of a thread's words.
fn each_word(count: usize, line: impl Fn(usize, usize) -> String) -> String {
    (0..count).map(|at| line(at, 8 * at) + "\n").collect()
}

/// Waits for the first phase of the mbarrier behind the box.
fn wait(bytes: usize) -> String {
    format!("WAIT: mbarrier.try_wait.parity.shared.b64 %p1, [smem+{bytes}], 0;\n@!%p1 bra WAIT;\n")
}

/// Threads of a unit, each with random words, and all of them with one corner of the box.
fn unit(boxed: &Boxed<'_>, cta: usize, count: usize, words: usize, random: &mut Random) -> Vec<Vec<u64>> {
    let corner = boxed.corner(cta, random);
    let thread = |_| (0..words).map(|_| random.bits()).chain(corner.iter().copied()).collect();
    (0..count).map(thread).collect()
}

/// The first thread asks for a box of the operands, all wait for it, each gives its part.
fn load(boxed: &Boxed<'_>) -> Form {
    let (rank, bytes) = (boxed.rank(), boxed.bytes());
    let instruction =
        format!("cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes");
    let name = format!("{instruction}, {}", boxed.name());
    let each = bytes / WORD_BYTES;
    let body = format!(
        "{}setp.ne.u32 %p0, %t, 0;\n@%p0 bra ASKED;\nmbarrier.init.shared.b64 [smem+{bytes}], 1;\n\
         fence.mbarrier_init.release.cluster;\nmbarrier.arrive.expect_tx.shared.b64 %l0, [smem+{bytes}], {bytes};\n\
         {instruction} [smem], [%map, {}], [smem+{bytes}];\nASKED: bar.sync 0;\n{}{}",
        place(each),
        operands(WORDS, rank),
        wait(bytes),
        each_word(each, |at, offset| format!("ld.shared.b64 %d{at}, [%r1+{offset}];")),
    );
    let mut random = Random::of(&name);
    let units: Vec<_> = (0..CTAS).map(|cta| unit(boxed, cta, THREADS, WORDS, &mut random)).collect();
    let map = boxed.map((boxed.dims[0] * boxed.dtype.bytes()).next_multiple_of(16) + 16);
    let tensor = image(&units.concat(), 0, WORDS + rank);
    let takes = [vec![B64; WORDS], vec![S32; rank]].concat();
    let form = Form::new(&name, &body, [&takes, &vec![B64; each]], &units, |cta| {
        let corner = &cta[0][WORDS..];
        let byte = |byte| boxed.source(&map, corner, byte).map_or(0, |at| tensor[at]);
        let loaded: Vec<u8> = (0..bytes).map(byte).collect();
        loaded.chunks(8 * each).map(words).collect()
    });
    Form { sm: Sm::Sm90a, tensor: Some(Tensor::OfOperands(map)), ..form }.with_shared(bytes as u32 + 8)
}

/// The same with a hint in front, which changes nothing.
fn prefetched(load: Form) -> Form {
    let hint = "prefetch.param.tensormap";
    Form {
        name: format!("{hint}, before {}", load.name),
        body: format!("{hint} [map];\n{}", load.body),
        ..load
    }
}

/// As [`load`], to the CTAs of a cluster of two that a mask names. In the others stays what was there.
fn multicast(boxed: &Boxed<'_>, mask: usize) -> Form {
    let (rank, bytes) = (boxed.rank(), boxed.bytes());
    let instruction = format!(
        "cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
    );
    let name = format!("{instruction}, {}, mask {mask} of 3", boxed.name());
    let each = bytes / WORD_BYTES;
    let sync = |number| {
        format!(
            "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned; // {number}\n"
        )
    };
    let body = format!(
        "{}mov.u32 %r2, %cluster_ctarank;\nshr.u32 %r3, {mask}, %r2;\nand.b32 %r3, %r3, 1;\nsetp.eq.u32 %p2, %r3, 0;\n\
         {}fence.proxy.async.shared::cta;\nor.b32 %r4, %t, %r2;\nsetp.ne.u32 %p0, %t, 0;\nsetp.ne.u32 %p3, %r4, 0;\n\
         @%p0 bra MADE;\nmbarrier.init.shared.b64 [smem+{bytes}], 1;\nfence.mbarrier_init.release.cluster;\n\
         @%p2 bra MADE;\nmbarrier.arrive.expect_tx.shared.b64 %l0, [smem+{bytes}], {bytes};\nMADE:\n{}\
         @%p3 bra ASKED;\n{instruction} [smem], [%map, {}], [smem+{bytes}], {mask};\nASKED:\n\
         @%p2 bra OVER;\n{}OVER:\n{}{}",
        place(each),
        each_word(each, |at, offset| format!("st.shared.b64 [%r1+{offset}], %a{at};")),
        sync("all are ready"),
        operands(WORDS, rank),
        wait(bytes),
        sync("who waits has it"),
        each_word(each, |at, offset| format!("ld.shared.b64 %d{at}, [%r1+{offset}];")),
    );
    let mut random = Random::of(&name);
    let units: Vec<_> = (0..CTAS).map(|cta| unit(boxed, cta, 2 * THREADS, WORDS, &mut random)).collect();
    let map = boxed.map((boxed.dims[0] * boxed.dtype.bytes()).next_multiple_of(16) + 16);
    let tensor = image(&units.concat(), 0, WORDS + rank);
    let takes = [vec![B64; WORDS], vec![S32; rank]].concat();
    let form = Form::new(&name, &body, [&takes, &vec![B64; each]], &units, |cluster| {
        let cta = |(rank, threads): (usize, &[Vec<u64>])| -> Vec<Vec<Expected>> {
            let before = image(threads, 0, each);
            let byte = |byte| boxed.source(&map, &threads[0][WORDS..], byte).map_or(0, |at| tensor[at]);
            let bytes = if mask >> rank & 1 == 1 { (0..bytes).map(byte).collect() } else { before };
            bytes.chunks(8 * each).map(words).collect()
        };
        cluster.chunks(THREADS).enumerate().flat_map(cta).collect()
    });
    let tensor = Some(Tensor::OfOperands(map));
    Form { tensor, ..form.in_clusters(2) }.with_shared(bytes as u32 + 8)
}

/// Bytes of a CTA's results in which boxes are stored.
const REGION: usize = WORDS * WORD_BYTES;
/// Bytes from one row to the next there.
const PITCH: u64 = 256;

/// Each thread writes its results, then the first stores a box over some of them. Each CTA has a range of the outermost dimension:
/// only the first and the last come across the ends of that.
fn store(of: &Boxed<'_>) -> Form {
    let (rank, bytes) = (of.rank(), of.bytes());
    let instruction = format!("cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group");
    let name = format!("{instruction}, {}", of.name());
    let each = bytes / WORD_BYTES;
    // Middle dimensions of 2 make a step of the outermost small enough for a CTA to have several.
    let inner: Vec<u64> = [of.dims[0]].into_iter().chain(std::iter::repeat_n(2, rank - 2)).collect();
    let step = PITCH << (rank - 2);
    let ranges = REGION as u64 / step;
    let dims = [inner, vec![ranges * CTAS as u64]].concat();
    let body = format!(
        "{}{}{}fence.proxy.async.global;\nfence.proxy.async.shared::cta;\nbar.sync 0;\n\
         setp.ne.u32 %p0, %t, 0;\n@%p0 bra STORED;\n{instruction} [%map, {}], [smem];\ncp.async.bulk.commit_group;\n\
         cp.async.bulk.wait_group.read 0;\ncp.async.bulk.wait_group 0;\nSTORED: bar.sync 0;\n{}",
        place(each),
        each_word(each, |at, offset| format!("st.shared.b64 [%r1+{offset}], %a{};", WORDS + at)),
        each_word(WORDS, |at, offset| format!("st.global.b64 [%to+{offset}], %a{at};")),
        operands(WORDS + each, rank),
        each_word(WORDS, |at, offset| format!("ld.global.b64 %d{at}, [%to+{offset}];")),
    );
    let boxed = Boxed { dims: &dims, ..*of };
    let mut random = Random::of(&name);
    let unit = |cta: usize| {
        let mut unit = unit(&boxed, cta, THREADS, WORDS + each, &mut random);
        let tile = u64::from(of.tile[rank - 1]);
        let outer = match cta {
            0 => -(random.below(tile) as i64),
            _ if cta + 1 == CTAS => (ranges * CTAS as u64 - 1 - random.below(tile)) as i64,
            _ => (ranges * cta as u64 + random.below(ranges - tile + 1)) as i64,
        };
        unit.iter_mut().for_each(|operands| operands[WORDS + each + rank - 1] = outer as u32 as u64);
        unit
    };
    let units: Vec<_> = (0..CTAS).map(unit).collect();
    let map = boxed.map(PITCH);
    let takes = [vec![B64; WORDS + each], vec![S32; rank]].concat();
    let form = Form::new(&name, &body, [&takes, &[B64; WORDS]], &units, |cta| {
        let cta_number = units.iter().position(|unit| unit[0] == cta[0]).expect("it is one of them");
        let (mut region, from) = (image(cta, 0, WORDS), image(cta, WORDS, each));
        for (byte, &value) in from.iter().enumerate() {
            if let Some(at) = boxed.source(&map, &cta[0][WORDS + each..], byte) {
                region[at - REGION * cta_number] = value;
            }
        }
        region.chunks(8 * WORDS).map(words).collect()
    });
    Form { sm: Sm::Sm90a, tensor: Some(Tensor::OfResults(map)), ..form }.with_shared(bytes as u32)
}
