//! Times one kernel of a model alone: what tuning, profiles and benches measure with.
//!
//! A kernel runs on buffers of its own, as large as the model's; numbers are small and random, so that no value is
//! subnormal. Weights are cold, as they are in a model that is larger than every cache: there are several copies of the
//! buffers, used in turn.

#[cfg(feature = "compiler")]
pub mod alone;

use ir::dim::MAX_SYMBOLS;
use ir::dtype::DType;
use ir::families::{Arg, GroupView};
use ir::kernel::{Access, Buffer, Kernel, Space};
use ir::op::Op;
use ir::random::Rng;

/// Bytes of all copies of the buffers, at least: more than caches hold.
const COLD_BYTES: usize = 256 << 20;

/// Copies at most: small buffers are filled quickly, but there is an end.
const MOST_COPIES: usize = 64;

/// As f32 or bf16 a number that no kernel gives here: what it leaves out shows.
pub(crate) const UNWRITTEN: u8 = 0x7B;

/// The symbols of a step.
pub(crate) fn symbols([tokens, past]: [usize; 2]) -> [i64; MAX_SYMBOLS] {
    let mut symbols = [0; MAX_SYMBOLS];
    (symbols[0], symbols[1]) = (tokens as i64, past as i64);
    symbols
}

/// How many copies of so many bytes are cold, each when its turn comes.
pub(crate) fn cold_copies(bytes: usize) -> usize {
    COLD_BYTES.div_ceil(bytes.max(1)).clamp(1, MOST_COPIES)
}

/// Parameters that a kernel writes and does not read.
pub(crate) fn written(kernel: &Kernel) -> Vec<usize> {
    let params = kernel.params().enumerate();
    params.filter(|(_, (_, b))| b.space == Space::Global(Access::Write)).map(|(number, _)| number).collect()
}

/// Bytes of each parameter.
pub(crate) fn sizes(kernel: &Kernel, symbols: &[i64; MAX_SYMBOLS]) -> Vec<usize> {
    kernel.params().map(|(_, buffer)| buffer_bytes(buffer, symbols)).collect()
}

/// Bytes from the first to the last element.
fn buffer_bytes(buffer: &Buffer, symbols: &[i64; MAX_SYMBOLS]) -> usize {
    let reach = |(extent, stride): (&ir::Dim, &i64)| (extent.eval(symbols) - 1).max(0) * stride;
    let last: i64 = buffer.shape.iter().zip(&buffer.strides).map(reach).sum();
    buffer.dtype.bytes(last as usize + 1)
}

/// Are these the positions of the step's tokens?
pub(crate) fn is_position(view: &GroupView<'_>, arg: &Arg) -> bool {
    let Arg::Value(id) = arg else { return false };
    matches!(&view.graph[*id].op, Op::Input { name } if name == "positions")
}

/// Small random numbers; indices are positions after `past`, or zero.
pub(crate) fn fill(memory: &mut [u8], dtype: DType, past: Option<usize>, rng: &mut Rng) {
    match dtype {
        DType::I32 => {
            let first = past.unwrap_or(0) as i32;
            for (number, slot) in memory.as_chunks_mut().0.iter_mut().enumerate() {
                *slot = past.map_or(0, |_| first + number as i32).to_le_bytes();
            }
        }
        DType::F32 => {
            memory.as_chunks_mut().0.iter_mut().for_each(|slot| *slot = (rng.unit() as f32).to_le_bytes())
        }
        // The sign and some of the mantissa: numbers of 1/128 to 1/64.
        DType::BF16 => memory
            .as_chunks_mut()
            .0
            .iter_mut()
            .for_each(|slot| *slot = (0x3C00 | rng.bits() as u16 & 0x807F).to_le_bytes()),
        _ => memory.fill(0),
    }
}
