//! What a GPU can do at most, measured: the bytes that it reads a second, and the FLOPs of `mma.sync`.
//!
//! Of a GPU that has `wgmma` the second is no ceiling: its tensor cores are faster by that.

use crate::conformance::Machine;
use crate::cuda::context::{Buffer, Context, Event, Image, Module};
use crate::device::DeviceError;
use crate::emulator::{self, Grid, Memory, Options};
use crate::gpu::Call;
use crate::{meter, ptx};
use std::sync::Arc;
use std::time::Instant;

/// The kernels; the long parts of `multiply` are written by [`text`].
const TEMPLATE: &str = include_str!("gpu_meter.ptx");
/// Their names, in the order of their phases.
const SYMBOLS: [&str; 2] = ["read", "multiply"];
/// Threads of a CTA.
const THREADS: u32 = 256;
/// Products of a round, each with an accumulator of its own.
const PRODUCTS: usize = 8;
/// FLOPs of a product of 16 x 8 x 16.
const FLOPS: u64 = 2 * 16 * 8 * 16;
/// Launches that are timed; one more goes before.
const TURNS: usize = 5;

/// How much is read and multiplied.
#[derive(Clone, Copy, Debug)]
struct Size {
    ctas: u32,
    bytes: usize,
    rounds: u64,
}

fn text() -> String {
    let accumulators = 4 * PRODUCTS;
    let all =
        |line: &dyn Fn(usize) -> String, count: usize| (0..count).map(line).collect::<Vec<_>>().join("\n\t");
    let product = |at: usize| {
        let sum: Vec<String> = (4 * at..4 * at + 4).map(|register| format!("%c{register}")).collect();
        let sum = sum.join(", ");
        format!(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{sum}}}, {{%a0, %a1, %a2, %a3}}, {{%a1, %a2}}, {{{sum}}};"
        )
    };
    TEMPLATE
        .replace("ZEROS", &all(&|at| format!("mov.b32 %c{at}, 0;"), accumulators))
        .replace("PRODUCTS", &all(&product, PRODUCTS))
        .replace("SUMS", &all(&|at| format!("xor.b32 %c0, %c0, %c{};", at + 1), accumulators - 1))
}

/// Bytes read a second, and FLOPs of products a second: medians.
///
/// On the emulator both are those of the emulator, on little work.
///
/// # Errors
///
/// What the device says.
pub fn ceilings(machine: &Machine) -> Result<[f64; 2], DeviceError> {
    let (size, [read, multiply]) = match machine {
        Machine::Gpu(context) => {
            // More than caches hold, and some milliseconds of work.
            let size = Size { ctas: 8 * context.gpu.sms, bytes: 1 << 30, rounds: 1 << 14 };
            (size, on_gpu(context, size)?)
        }
        Machine::Emulator(options) => {
            let size = Size { ctas: 2, bytes: 1 << 16, rounds: 4 };
            (size, emulated(options, size)?)
        }
    };
    let flops = u64::from(size.ctas * THREADS / 32) * size.rounds * PRODUCTS as u64 * FLOPS;
    Ok([size.bytes as f64 / read, flops as f64 / multiply])
}

fn call(phase: usize, size: Size, from: u64, to: u64) -> Call {
    let count = [size.bytes as u64 / 16, size.rounds][phase];
    let params = [from, to, count].iter().flat_map(|x| x.to_le_bytes()).collect();
    let maps = Vec::new();
    Call { phase, ctas: size.ctas, threads: THREADS, shared_bytes: 0, params, maps, dependent: false }
}

fn on_gpu(context: &Arc<Context>, size: Size) -> Result<[f64; 2], DeviceError> {
    let mut module = Module::load(context, &Image::Ptx(&text()))?;
    SYMBOLS.iter().try_for_each(|symbol| module.add(symbol, symbol, 0))?;
    let from = Buffer::zeroed(context, size.bytes)?;
    let to = Buffer::zeroed(context, 4 * (size.ctas * THREADS) as usize)?;
    let mut seconds = [0.0; 2];
    for (phase, seconds) in seconds.iter_mut().enumerate() {
        let call = call(phase, size, from.address(), to.address());
        let mut times = Vec::new();
        for turn in 0..=TURNS {
            let begin = Event::record(context)?;
            module.launch(&call)?;
            let end = Event::record(context)?;
            context.wait()?;
            if turn > 0 {
                times.push(end.seconds_since(&begin)?);
            }
        }
        *seconds = meter::median(&times);
    }
    Ok(seconds)
}

fn emulated(options: &Options, size: Size) -> Result<[f64; 2], DeviceError> {
    let failed = |said: String| DeviceError::Launch { kernel: "a ceiling".to_string(), said };
    let module = ptx::Module::parse(&text()).map_err(|error| failed(error.to_string()))?;
    let mut memory = Memory::new();
    let from = memory.allocate("from", size.bytes);
    memory.write(from, &vec![0; size.bytes]);
    let to = memory.allocate("to", 4 * (size.ctas * THREADS) as usize);
    let mut seconds = [0.0; 2];
    for (phase, seconds) in seconds.iter_mut().enumerate() {
        let kernel = module.kernel(SYMBOLS[phase]).expect("the module has both");
        let call = call(phase, size, from, to);
        let (ctas, threads) = ([call.ctas, 1, 1], [THREADS, 1, 1]);
        let grid = Grid { ctas, threads, cluster: 1, dynamic_shared: 0, dependent: false };
        let begin = Instant::now();
        emulator::launch(kernel, &grid, &call.params, &mut memory, options)
            .map_err(|report| failed(report.to_string()))?;
        *seconds = begin.elapsed().as_secs_f64();
    }
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emulator::{Sm, Sums};

    /// As many bytes and products as the figures are made of.
    #[test]
    fn kernels_do_what_is_counted() {
        let options = Options { sm: Sm::Sm80, seed: 0, sums: Sums::default() };
        let module = ptx::Module::parse(&text()).unwrap();
        let size = Size { ctas: 2, bytes: 1 << 16, rounds: 3 };
        let mut memory = Memory::new();
        let (from, to) = (memory.allocate("from", size.bytes), memory.allocate("to", 4 * 512));
        memory.write(from, &vec![1; size.bytes]);
        let [read, multiply] = [0, 1].map(|phase| {
            let grid = Grid {
                ctas: [2, 1, 1],
                threads: [THREADS, 1, 1],
                cluster: 1,
                dynamic_shared: 0,
                dependent: false,
            };
            let params = call(phase, size, from, to).params;
            emulator::launch(module.kernel(SYMBOLS[phase]).unwrap(), &grid, &params, &mut memory, &options)
                .unwrap()
        });
        assert_eq!(read.total().global_read_bytes, 1 << 16);
        assert_eq!(2 * multiply.total().matrix_macs, 16 * 3 * PRODUCTS as u64 * FLOPS);
        assert!(ceilings(&Machine::Emulator(options)).unwrap().iter().all(|&ceiling| ceiling > 0.0));
    }
}
