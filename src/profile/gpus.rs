//! GPUs that speed is predicted for.
//!
//! An SM does in a cycle what its compute capability says (*CUDA C++ Programming Guide*, "Arithmetic Instructions" and "Technical
//! Specifications"): 16 approximate functions, 64 operations on integers, four instructions of warps, 128 bytes of shared
//! memory; the rest is in the table. The rate of tensor cores follows from the peak of the data sheet, dense, in bf16 with sums
//! in f32: `peak = SMs * clock * rate`.

use ir::plan::Cost;

/// Results of approximate functions of an SM a cycle.
pub const SPECIAL_LANES: f64 = 16.0;
/// Results on integers, comparisons and conversions of an SM a cycle.
pub const INTEGER_LANES: f64 = 64.0;
/// Instructions of warps that an SM issues a cycle.
pub const ISSUED: f64 = 4.0;
/// Bytes that an SM moves from or to its shared memory a cycle.
pub const SHARED_BYTES: f64 = 128.0;
/// Registers of an SM.
const REGISTERS: u32 = 65_536;
/// Bytes of shared memory that each CTA takes beside its own.
const RESERVED_BYTES: u32 = 1024;

/// A GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    /// On the command line.
    pub name: &'static str,
    /// As NVIDIA calls it, with the source of its figures.
    pub product: &'static str,
    /// Compute capability, in tenths: 8.0 is 80.
    pub capability: u32,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Cycles a second at which the peak holds.
    pub clock_hz: f64,
    /// Bytes a second between memory and chip.
    pub bytes_per_s: f64,
    /// FLOPs of an SM a cycle by matrix instructions of a warp.
    pub warp_flops: f64,
    /// The same by those of a warpgroup, which only 9.0 has.
    pub warpgroup_flops: Option<f64>,
    /// Additions or multiplications in f32 of an SM a cycle.
    pub float_lanes: f64,
    /// Bytes of shared memory of an SM.
    pub shared_bytes: u32,
    /// Threads that an SM holds.
    pub threads: u32,
    /// CTAs that an SM holds.
    pub ctas: u32,
}

const H100: Gpu = Gpu {
    name: "h100",
    product: "H100 SXM (data sheet: 989 TFLOP/s, which is 1830 MHz, and 3.35 TB/s)",
    capability: 90,
    sms: 132,
    clock_hz: 1.83e9,
    bytes_per_s: 3.35e12,
    // Measured: 62.9 % of the peak (Luo et al. 2024, arXiv 2402.13499).
    warp_flops: 0.629 * 4096.0,
    warpgroup_flops: Some(4096.0),
    float_lanes: 128.0,
    shared_bytes: 228 << 10,
    threads: 2048,
    ctas: 32,
};

/// All of them.
pub const GPUS: [Gpu; 4] = [
    Gpu {
        name: "a100",
        product: "A100 SXM 80 GB (data sheet: 312 TFLOP/s at 1410 MHz, 2039 GB/s)",
        capability: 80,
        sms: 108,
        clock_hz: 1.41e9,
        bytes_per_s: 2.039e12,
        warp_flops: 2048.0,
        warpgroup_flops: None,
        float_lanes: 64.0,
        shared_bytes: 164 << 10,
        threads: 2048,
        ctas: 32,
    },
    H100,
    Gpu {
        name: "h200",
        product: "H200 SXM (data sheet: 989 TFLOP/s, which is 1830 MHz, and 4.8 TB/s)",
        bytes_per_s: 4.8e12,
        ..H100
    },
    Gpu {
        name: "rtx4090",
        product: "GeForce RTX 4090 (Ada white paper: 165.2 TFLOP/s at 2520 MHz, 1008 GB/s)",
        capability: 89,
        sms: 128,
        clock_hz: 2.52e9,
        bytes_per_s: 1.008e12,
        warp_flops: 512.0,
        warpgroup_flops: None,
        float_lanes: 128.0,
        shared_bytes: 100 << 10,
        threads: 1536,
        ctas: 24,
    },
];

impl Gpu {
    /// The GPU of that name.
    pub fn of(name: &str) -> Option<&'static Gpu> {
        GPUS.iter().find(|gpu| gpu.name == name)
    }

    /// FLOPs of an SM a cycle by matrix instructions that so many warps do together.
    pub fn tensor_flops(&self, warps: u64) -> f64 {
        if warps > 1 { self.warpgroup_flops.unwrap_or(self.warp_flops) } else { self.warp_flops }
    }

    /// Seconds below which no launch is done, whatever it computes in.
    pub fn least_seconds(&self, cost: Cost) -> f64 {
        let peak = f64::from(self.sms) * self.clock_hz * self.warpgroup_flops.unwrap_or(self.warp_flops);
        (cost.bytes as f64 / self.bytes_per_s).max(cost.flops as f64 / peak)
    }

    /// Bytes of shared memory that a CTA may use.
    pub fn cta_shared_bytes(&self) -> u32 {
        self.shared_bytes - RESERVED_BYTES
    }

    /// CTAs that an SM holds at once, of so many threads with so many registers each, and of so many bytes of shared memory.
    /// At least 1: what does not fit is refused elsewhere.
    pub fn resident(&self, threads: u32, registers: u32, shared_bytes: u32) -> u32 {
        // Registers are given out by the 256 of a warp.
        let of_warp = (32 * registers).next_multiple_of(256).max(1);
        let by_registers = REGISTERS / of_warp / threads.div_ceil(32).max(1);
        let by_shared = self.shared_bytes / (shared_bytes + RESERVED_BYTES);
        [by_registers, by_shared, self.threads / threads.max(1), self.ctas]
            .into_iter()
            .min()
            .unwrap_or(1)
            .max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SMs, clock and rate give the peak of the data sheet.
    #[test]
    fn peaks_are_those_of_the_data_sheets() {
        let peaks = [("a100", 312.0), ("h100", 989.4), ("h200", 989.4), ("rtx4090", 165.2)];
        for (name, peak) in peaks {
            let gpu = Gpu::of(name).unwrap();
            let found = f64::from(gpu.sms) * gpu.clock_hz * gpu.tensor_flops(4) / 1e12;
            assert!((found / peak - 1.0).abs() < 1e-3, "{name}: {found}");
        }
        assert_eq!(GPUS.len(), peaks.len());
    }

    #[test]
    fn ctas_fit_what_they_share() {
        let gpu = Gpu::of("a100").unwrap();
        assert_eq!(gpu.resident(128, 168, 0), 3); // registers: 65,536 / (168 * 128)
        assert_eq!(gpu.resident(128, 32, 80 << 10), 2); // shared memory
        assert_eq!(gpu.resident(1024, 32, 0), 2); // threads
        assert_eq!(gpu.resident(32, 16, 0), 32); // CTAs
        assert_eq!(gpu.resident(1024, 255, 164 << 10), 1);
    }
}
