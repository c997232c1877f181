//! What this machine can do at most: measured beside the speed that is held against it.

use super::error::CliError;
use super::source::Ready;
use ir::DType;
use llamac::predict::Ceilings;
use runtime::device::DeviceError;
use runtime::meter::{self, Dot, Meter};

/// Samples of both ceilings.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    /// Bytes a second.
    pub read: Vec<f64>,
    /// FLOPs a second.
    pub dot: Vec<f64>,
}

impl Samples {
    /// The ceilings: what was reached once can be reached.
    pub fn best(&self) -> Ceilings {
        Ceilings { read_bytes_per_s: meter::best(&self.read), dot_flops: meter::best(&self.dot) }
    }

    /// The middle of the samples: what the machine gave most of the time.
    pub fn median(&self) -> Ceilings {
        Ceilings { read_bytes_per_s: meter::median(&self.read), dot_flops: meter::median(&self.dot) }
    }

    /// The least of the samples: how far the measurement spreads.
    #[cfg(feature = "compiler")]
    pub fn least(&self) -> Ceilings {
        let least = |samples: &[f64]| samples.iter().copied().fold(f64::INFINITY, f64::min);
        Ceilings { read_bytes_per_s: least(&self.read), dot_flops: least(&self.dot) }
    }
}

/// What dot products of a dtype are measured by.
pub fn dot_of(dtype: DType) -> Dot {
    if dtype == DType::BF16 { Dot::Bf16 } else { Dot::F32 }
}

/// The best speed of reading the model's weights where they lie, in bytes a second: what decoding cannot exceed.
/// Weights that fit a cache are read from that cache, by this as by the model.
pub fn read_weights(ready: &Ready, threads: usize, seconds: f64) -> f64 {
    let weights = ready.artifact.section(&ready.target.weights).unwrap_or_default();
    meter::best(&Meter::new(threads).read(weights, seconds))
}

/// Both ceilings, each for `seconds`, without a model.
pub fn measure(threads: usize, dtype: DType, weight_bytes: usize, seconds: f64) -> Result<Samples, CliError> {
    let mut meter = Meter::new(threads);
    let read = meter.read(&meter::memory(weight_bytes).map_err(DeviceError::from)?, seconds);
    Ok(Samples { read, dot: meter.dot(dot_of(dtype), seconds) })
}
