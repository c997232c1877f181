//! Kernels compiled for this CPU.

use super::{Held, LARGE, LaunchError, LoadError, NAN, Param, decoded, differs, numbered};
use codegen::cpu::{Form, Level};
use ir::dim::MAX_SYMBOLS;
use ir::kernel::Kernel;
use ir::plan::Plan;
use runtime::code::{Code, Guarded};

/// Code of kernels, each its own entry point, for one worker and for two.
pub struct Compiled {
    by_workers: [Code; 2],
}

impl Compiled {
    pub(super) fn new(level: &Level, kernels: &[Kernel]) -> Result<Compiled, LoadError> {
        let named = numbered(kernels);
        let plan = Plan::alone(&named);
        let text = codegen::lower::module(&plan, &named, level.features, false);
        let object = codegen::link::link(&codegen::cpu::compile(&text, level, Form::Object)?)?;
        let load = |threads| Code::load(&object, plan.entries.iter().map(|e| e.name.as_str()), threads);
        Ok(Compiled { by_workers: [load(1)?, load(2)?] })
    }

    /// Runs three times, by one worker and by two, in memory full of NaN and full of large numbers: the bits must be the
    /// same, and what is not written is not the same.
    pub(super) fn run(
        &mut self,
        number: usize,
        kernel: &Kernel,
        held: &[Held],
        symbols: [i64; MAX_SYMBOLS],
    ) -> Result<Vec<Vec<f64>>, LaunchError> {
        let params: Vec<Param> = kernel.params().map(|(_, buffer)| Param::new(buffer, &symbols)).collect();
        let mut launch = |workers: usize, poison: u8| -> Result<Vec<Vec<u8>>, LaunchError> {
            let with = params.iter().zip(held);
            let before: Vec<Vec<u8>> = with.map(|(param, held)| param.bytes(held, poison)).collect();
            let mut buffers = Vec::new();
            for bytes in &before {
                let mut buffer = Guarded::zeroed(bytes.len())?;
                buffer.bytes_mut().copy_from_slice(bytes);
                buffers.push(buffer);
            }
            self.by_workers[workers - 1].run_on(number, &mut buffers, symbols);
            for ((param, buffer), before) in params.iter().zip(&buffers).zip(&before) {
                if !buffer.is_intact() || !param.keeps(before, buffer.bytes()) {
                    return Err(LaunchError::Strayed { param: param.buffer.name.clone() });
                }
            }
            let elems = params.iter().zip(&buffers).map(|(param, buffer)| param.elems(buffer.bytes()));
            Ok(elems.collect())
        };
        let first = launch(1, NAN)?;
        for (workers, poison) in [(2, NAN), (1, LARGE)] {
            if let Some((param, at)) = differs(&params, &first, &launch(workers, poison)?) {
                return Err(match workers {
                    2 => LaunchError::Workers { param, at },
                    _ => LaunchError::Leftover { param, at },
                });
            }
        }
        Ok(decoded(&params, &first))
    }
}
