//! What a machine can do, as far as schedules ask.

/// A machine that kernels are compiled for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// As on the command line: `cpu:x86-64-v4`.
    pub name: String,
    /// Vector registers.
    pub vector_registers: usize,
    /// Bytes of one.
    pub vector_bytes: usize,
}

impl Target {
    /// Registers that one 16-lane f32 vector of kernel IR takes.
    pub fn registers_per_vector(&self) -> usize {
        (64 / self.vector_bytes).max(1)
    }
}
