//! What a machine can do, as far as schedules ask.

/// A machine that kernels are compiled for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// As on the command line: `cpu:x86-64-v4`, `cuda:sm_80`.
    pub name: String,
    /// What it is.
    pub machine: Machine,
}

/// What schedules and layouts ask about a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// Workers are threads with vector registers.
    Cpu(Vectors),
    /// Workers are CTAs with shared memory.
    Gpu(Gpu),
}

/// The vector registers of a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vectors {
    /// How many.
    pub registers: usize,
    /// Bytes of one.
    pub bytes: usize,
}

impl Vectors {
    /// Registers that one 16-lane f32 vector of kernel IR takes.
    pub fn per_vector(&self) -> usize {
        (64 / self.bytes).max(1)
    }
}

/// A GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Bytes of shared memory that a CTA may use.
    pub shared_bytes: usize,
    /// Has it tensor maps, mbarriers and products of warpgroups?
    pub warpgroups: bool,
}

impl Target {
    /// A CPU.
    pub fn cpu(name: &str, registers: usize, bytes: usize) -> Target {
        Target { name: name.to_string(), machine: Machine::Cpu(Vectors { registers, bytes }) }
    }

    /// A GPU.
    pub fn gpu(name: &str, shared_bytes: usize, warpgroups: bool) -> Target {
        Target { name: name.to_string(), machine: Machine::Gpu(Gpu { shared_bytes, warpgroups }) }
    }
}
