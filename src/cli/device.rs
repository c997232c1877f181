//! Options of verbs that run a model, and the device that they name.

use super::error::CliError;
use super::source::positive;
use clap::Args;
use runtime::cpu::{self, Cpu};
use runtime::device::{Device, DeviceError};
use runtime::emulator::{Sm, Sums};
use runtime::gpu;
use runtime::interpreter::Interpreter;
use runtime::manifest::{Manifest, TargetCode};
use runtime::null::Null;
use runtime::pool;
use runtime::ptx_emulator::PtxEmulator;
use std::path::Path;
use std::str::FromStr;

/// Where to run.
#[derive(Args, Clone, Debug)]
pub struct DeviceOptions {
    /// Threads [default: physical cores that this process may use]
    #[arg(long, short, value_parser = positive, value_name = "N")]
    pub threads: Option<usize>,
    /// Device to run on: cpu; ptx-emulator[:sm_80] (a GPU's code, on this CPU, with every access checked); interpreter
    /// (slow, in f64); null (checks the plan, computes nothing)
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: String,
}

/// Devices that this program has.
const KNOWN: &str = "cpu, ptx-emulator, ptx-emulator:SM with sm_80, sm_89 or sm_120, interpreter, null";

/// Whose code of an artifact a device runs.
#[derive(Clone, Copy, Debug, Default)]
pub enum Machine {
    /// This CPU's. The interpreter and `null` read its plan.
    #[default]
    Cpu,
    /// A GPU's.
    Gpu(Sm),
}

impl Machine {
    /// What a model that is no artifact is compiled for.
    #[cfg(feature = "compiler")]
    pub fn target(self) -> &'static str {
        match self {
            Machine::Cpu => "cpu:native",
            Machine::Gpu(_) => "cuda:sm_80",
        }
    }

    /// The code that it runs.
    pub fn choose<'a>(self, file: &Path, manifest: &'a Manifest) -> Result<&'a TargetCode, DeviceError> {
        match self {
            Machine::Cpu => cpu::choose(file, manifest),
            Machine::Gpu(sm) => gpu::choose(file, manifest, sm.capability()),
        }
    }
}

impl DeviceOptions {
    /// Threads asked for, or one a physical core.
    pub fn threads(&self) -> usize {
        self.threads.unwrap_or_else(pool::physical_cores)
    }

    /// The device; asked before a long compilation.
    pub fn device(&self) -> Result<Box<dyn Device>, CliError> {
        match self.device.as_str() {
            "cpu" => Ok(Box::new(Cpu { threads: self.threads() })),
            "interpreter" => Ok(Box::new(Interpreter)),
            "null" => Ok(Box::new(Null)),
            _ => match self.machine() {
                Machine::Gpu(sm) => Ok(Box::new(PtxEmulator { sm, seed: 0, sums: Sums::default() })),
                Machine::Cpu => Err(CliError::NoDevice { name: self.device.clone(), known: KNOWN }),
            },
        }
    }

    /// Whose code it runs.
    pub fn machine(&self) -> Machine {
        let emulated = self.device.strip_prefix("ptx-emulator");
        let sm = emulated.and_then(|rest| match rest.strip_prefix(':') {
            None if rest.is_empty() => Some(Sm::Sm80),
            // What only sm_90a has, no code asks for yet.
            sm => Sm::from_str(sm?).ok().filter(|&sm| sm != Sm::Sm90a),
        });
        sm.map_or(Machine::Cpu, Machine::Gpu)
    }
}
