//! Options of verbs that run a model, and the program on the device that they name.

use super::error::CliError;
use super::source::{Ready, positive};
use clap::Args;
use runtime::cpu::Cpu;
use runtime::device::{Device, Program};
use runtime::pool;

/// Where to run.
#[derive(Args, Clone, Debug)]
pub struct DeviceOptions {
    /// Threads [default: physical cores that this process may use]
    #[arg(long, short, value_parser = positive, value_name = "N")]
    pub threads: Option<usize>,
    /// Device to run on
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: String,
}

/// Devices that this program has.
const KNOWN: &str = "cpu";

impl DeviceOptions {
    /// Threads asked for, or one a physical core.
    pub fn threads(&self) -> usize {
        self.threads.unwrap_or_else(pool::physical_cores)
    }

    /// Loads an artifact on the device.
    pub fn load(&self, ready: &Ready) -> Result<Box<dyn Program>, CliError> {
        match self.device.as_str() {
            "cpu" => Ok(Cpu { threads: self.threads() }.load(&ready.artifact)?),
            name => Err(CliError::NoDevice { name: name.to_string(), known: KNOWN }),
        }
    }
}
