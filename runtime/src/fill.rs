//! Weights made on a GPU from a seed: numbers for what is timed, where a file of them would be too large to bring along.
//!
//! They are about normal, of variance 1 / columns, so that activations stay near one; norms' weights lie around one. All zeros
//! would not do: a GPU multiplies them faster than numbers, because it draws less power.

use crate::gpu::Call;
use ir::dtype::DType;
use ir::plan::{Place, Plan, WeightSource};

/// The kernel; `STORE` stands for what differs by dtype.
const TEMPLATE: &str = include_str!("fill.ptx");

/// Threads of a CTA.
const THREADS: u32 = 256;

/// What the sum of four numbers of 16 bits has as its standard deviation: the square root of `4 (2^32 - 1) / 12`.
const DEVIATION: f64 = 37_837.2;

/// The kernels, in the order of their phases: f32, bf16.
pub const SYMBOLS: [&str; 2] = ["fill_f32", "fill_bf16"];

/// The module.
pub fn ptx() -> String {
    let stored = |line: &str| TEMPLATE.replace("STORE", line);
    let f32 = stored("shl.b64 %l6, %l3, 2;\n\tadd.s64 %l6, %l0, %l6;\n\tst.global.b32 [%l6], %r0;");
    let bf16 = stored(
        ".reg .b16 %h;\n\tcvt.rn.bf16.f32 %h, %r0;\n\tshl.b64 %l6, %l3, 1;\n\tadd.s64 %l6, %l0, %l6;\n\t\
         st.global.b16 [%l6], %h;",
    );
    let kernel = bf16.split_once(".visible").expect("the template has a kernel").1;
    format!("{f32}\n.visible{}", kernel.replace(SYMBOLS[0], SYMBOLS[1]))
}

/// What one weight of a plan is made of.
pub enum Fill {
    /// Numbers that the plan has: where they lie from the weights' beginning, and their bytes.
    Constant(usize, Vec<u8>),
    /// Numbers from the seed, by this launch.
    Random(Call),
}

/// All weights of a plan, for memory that begins at `address`, by at most so many CTAs each.
pub fn fills(plan: &Plan, seed: u64, address: u64, most_ctas: u32) -> Vec<Fill> {
    let mut fills = Vec::new();
    for (number, buffer) in plan.buffers.iter().enumerate() {
        let Place::Weight { offset, source } = &buffer.place else { continue };
        let (elems, columns, norm) = match source {
            WeightSource::Constant { data } => {
                fills.push(Fill::Constant(
                    *offset,
                    data.iter().flat_map(|&x| bytes(buffer.dtype, x)).collect(),
                ));
                continue;
            }
            WeightSource::Tensor { name, rows, columns } => {
                (rows * columns, *columns, name.ends_with("norm.weight"))
            }
            WeightSource::Pack { pack, .. } => (pack.elems(), pack.k, false),
        };
        let (centre, spread) = if norm { (1.0, 0.1) } else { (0.0, (columns as f64).sqrt().recip()) };
        // Each buffer counts on from a place of its own, far from the others'.
        let seed = seed.rotate_right(16) ^ (number as u64) << 32;
        let mut params = Vec::new();
        [address + *offset as u64, elems as u64, seed].iter().for_each(|x| params.extend(x.to_le_bytes()));
        [centre as f32, (spread / DEVIATION) as f32].iter().for_each(|x| params.extend(x.to_le_bytes()));
        fills.push(Fill::Random(Call {
            phase: usize::from(buffer.dtype == DType::BF16),
            ctas: elems.div_ceil(THREADS as usize).clamp(1, most_ctas as usize) as u32,
            threads: THREADS,
            shared_bytes: 0,
            params,
            maps: Vec::new(),
            dependent: false,
        }));
    }
    fills
}

/// A number as a weight's memory has it.
fn bytes(dtype: DType, x: f64) -> Vec<u8> {
    let bits = (dtype.round(x) as f32).to_bits();
    if dtype == DType::BF16 {
        ((bits >> 16) as u16).to_le_bytes().to_vec()
    } else {
        bits.to_le_bytes().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emulator::{Grid, Memory, Options, Sm, Sums, launch};
    use crate::ptx::Module;

    /// The numbers are those of the formula, and have the mean and the variance that they should.
    #[test]
    fn numbers_are_those_of_the_seed() {
        let module = Module::parse(&ptx()).unwrap();
        let (elems, seed) = (10_000u64, 7u64);
        let mut memory = Memory::new();
        let to = memory.allocate("to", 4 * elems as usize);
        let mut params = Vec::new();
        [to, elems, seed].iter().for_each(|x| params.extend(x.to_le_bytes()));
        [1.0f32, (0.5 / DEVIATION) as f32].iter().for_each(|x| params.extend(x.to_le_bytes()));
        let grid = Grid {
            ctas: [3, 1, 1],
            threads: [THREADS, 1, 1],
            cluster: 1,
            dynamic_shared: 0,
            dependent: false,
        };
        let options = Options { sm: Sm::Sm80, seed: 0, sums: Sums::default() };
        launch(module.kernel(SYMBOLS[0]).unwrap(), &grid, &params, &mut memory, &options).unwrap();
        let (words, _) = memory.read(to, 4 * elems as usize).as_chunks();
        let found: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
        for (i, &found) in found.iter().enumerate() {
            let z = (seed + i as u64).wrapping_add(0x9E37_79B9_7F4A_7C15);
            let z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
            let z = z ^ z >> 31;
            let sum: i64 = (0..4).map(|part| (z >> (16 * part) & 0xFFFF) as i64).sum();
            assert_eq!(found, ((sum - 131_070) as f32).mul_add((0.5 / DEVIATION) as f32, 1.0));
        }
        let mean = found.iter().map(|&x| f64::from(x)).sum::<f64>() / elems as f64;
        let variance = found.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / elems as f64;
        assert!((mean - 1.0).abs() < 0.02 && (variance - 0.25).abs() < 0.02, "{mean} {variance}");
    }
}
