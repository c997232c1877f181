//! Options of verbs that run a model, and the device that they name.

use super::error::CliError;
use super::source::positive;
use clap::Args;
use runtime::cpu::Cpu;
use runtime::device::Device;
use runtime::interpreter::Interpreter;
use runtime::null::Null;
use runtime::pool;

/// Where to run.
#[derive(Args, Clone, Debug)]
pub struct DeviceOptions {
    /// Threads [default: physical cores that this process may use]
    #[arg(long, short, value_parser = positive, value_name = "N")]
    pub threads: Option<usize>,
    /// Device to run on: cpu; interpreter (slow, in f64); null (checks the plan, computes nothing)
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: String,
}

/// Devices that this program has.
const KNOWN: &str = "cpu, interpreter, null";

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
            name => Err(CliError::NoDevice { name: name.to_string(), known: KNOWN }),
        }
    }
}
