//! Options of verbs that run a model, and the device that they name.

use super::error::CliError;
use super::source::positive;
use clap::Args;
use runtime::cpu::{self, Cpu};
use runtime::cuda::Cuda;
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
    /// Device to run on: cpu; cuda[:N] (an NVIDIA GPU, the first or number N); ptx-emulator[:sm_90a] (a GPU's code, on
    /// this CPU, with every access checked; sm_80 if none is named); interpreter (slow, in f64); null (checks the plan, computes nothing)
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: String,
}

/// Devices that this program has.
const KNOWN: &str = "cpu, cuda, cuda:N with a GPU's number, ptx-emulator, ptx-emulator:SM with sm_80, sm_89, sm_90a or sm_120, interpreter, null";

/// Whose code of an artifact a device runs.
#[derive(Clone, Copy, Debug, Default)]
pub enum Machine {
    /// This CPU's. The interpreter and `null` read its plan.
    #[default]
    Cpu,
    /// That of a GPU that is emulated.
    Emulated(Sm),
    /// A GPU's.
    Cuda {
        /// Its compute capability, in tenths.
        capability: u32,
        /// Bytes of shared memory that it allows a CTA.
        shared_bytes: u32,
    },
}

impl Machine {
    /// What a model that is no artifact is compiled for.
    #[cfg(feature = "compiler")]
    pub fn target(self) -> &'static str {
        match self {
            Machine::Cpu => "cpu:native",
            Machine::Emulated(sm) => best(sm.capability(), sm.shared_bytes()),
            Machine::Cuda { capability, shared_bytes } => best(capability, shared_bytes),
        }
    }

    /// Is machine code of a GPU of use? The emulator reads PTX.
    #[cfg(feature = "compiler")]
    pub fn takes_cubin(self) -> bool {
        matches!(self, Machine::Cuda { .. })
    }

    /// The code that it runs.
    pub fn choose<'a>(self, file: &Path, manifest: &'a Manifest) -> Result<&'a TargetCode, DeviceError> {
        match self {
            Machine::Cpu => cpu::choose(file, manifest),
            Machine::Emulated(sm) => gpu::choose(file, manifest, sm.capability(), sm.shared_bytes()),
            Machine::Cuda { capability, shared_bytes } => {
                gpu::choose(file, manifest, capability, shared_bytes)
            }
        }
    }

    /// What the user should know of it before it runs.
    pub fn remark(self) -> Option<String> {
        match self {
            Machine::Cpu | Machine::Emulated(_) => None,
            Machine::Cuda { capability, .. } => gpu::remark(capability),
        }
    }
}

/// The architecture whose code such a GPU takes first.
#[cfg(feature = "compiler")]
fn best(capability: u32, shared_bytes: u32) -> &'static str {
    let found = llamac::compile::architecture_for(capability, shared_bytes);
    found.expect("no older GPU is opened, and none allows less shared memory").name
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
            _ => match (self.cuda(), self.emulated()) {
                (Some(number), _) => Ok(Box::new(Cuda::new(number)?)),
                (None, Some(sm)) => Ok(Box::new(PtxEmulator { sm, seed: 0, sums: Sums::default() })),
                (None, None) => Err(CliError::NoDevice { name: self.device.clone(), known: KNOWN }),
            },
        }
    }

    /// Whose code it runs.
    pub fn machine(&self) -> Result<Machine, CliError> {
        Ok(match (self.cuda(), self.emulated()) {
            (Some(number), _) => {
                let cuda = Cuda::new(number)?;
                let gpu = cuda.gpu();
                Machine::Cuda { capability: gpu.capability, shared_bytes: gpu.shared_bytes }
            }
            (None, Some(sm)) => Machine::Emulated(sm),
            (None, None) => Machine::Cpu,
        })
    }

    /// The number of a GPU.
    pub fn cuda(&self) -> Option<u32> {
        match self.device.strip_prefix("cuda")? {
            "" => Some(0),
            rest => rest.strip_prefix(':')?.parse().ok(),
        }
    }

    /// The GPU that is emulated.
    pub fn emulated(&self) -> Option<Sm> {
        match self.device.strip_prefix("ptx-emulator")? {
            "" => Some(Sm::Sm80),
            rest => Sm::from_str(rest.strip_prefix(':')?).ok(),
        }
    }
}
