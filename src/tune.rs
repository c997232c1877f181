//! Tuning: the fastest schedule of each kernel on a machine, found by measuring; or the one that should be, on a GPU that is not
//! here.
//!
//! * [`table`]: what was measured, as text: one record a line.
//! * [`task`]: the kernels of a model that have a choice, and what each is measured on.
//! * [`worker`]: the process that makes, judges and times candidates; one that hangs or crashes takes no other with it. It times
//!   them on this CPU (`cpu`), on a GPU ([`gpu`]), or argues from machine code (`predicted`).
//! * [`candidates`]: a file of compiled candidates, for a GPU on a machine without the compiler.
//! * [`search`]: which candidates, in which order, and which is chosen.
//! * [`report`]: what was found, and how well the models of cost predict it.
//!
//! A candidate is timed only if it is right: [`crate::judge`] says so of a few rows, and in a whole step its bits are those
//! of the schedule that the model of cost chose.

pub mod candidates;
#[cfg(feature = "compiler")]
mod cpu;
pub mod gpu;
#[cfg(feature = "compiler")]
mod predicted;
pub mod report;
pub mod search;
pub mod table;
pub mod task;
pub mod worker;

/// The compiler that records hold for: llamac's and LLVM's version, and for GPUs that of the `ptxas` that is found.
#[cfg(feature = "compiler")]
pub fn compiler(target: &str) -> String {
    use codegen::ptxas::Tool;
    let compiler = format!("llamac {}, LLVM {}", env!("CARGO_PKG_VERSION"), codegen::cpu::llvm_version());
    if codegen::nvptx::architecture(target).is_none() {
        return compiler;
    }
    let ptxas =
        Tool::Ptxas.find().map_or("the driver's ptxas".to_string(), |p| format!("ptxas {}", p.version));
    format!("{compiler}, {ptxas}")
}

/// The machine that records of a CPU hold for: its CPU, as the system and LLVM name it, the cores that this process may use, and its
/// largest cache.
///
/// # Errors
///
/// A machine below every level.
#[cfg(feature = "compiler")]
pub fn machine() -> Result<String, codegen::cpu::CodegenError> {
    let level = codegen::cpu::level("cpu:native")?;
    let cache =
        runtime::meter::cache_bytes().map_or(String::new(), |b| format!(", {} MiB of cache", b >> 20));
    let cores = runtime::pool::physical_cores();
    Ok(format!("{} ({}), {cores} cores{cache}", runtime::cpu::model_name(), level.cpu))
}

/// What holds for code that is compiled here: on a CPU what was measured on it, for GPUs what was measured on any or argued for
/// one, each by this compiler.
#[cfg(feature = "compiler")]
pub struct Here {
    compilers: [String; 2],
    machine: String,
}

#[cfg(feature = "compiler")]
impl Here {
    /// This machine and compiler.
    ///
    /// # Errors
    ///
    /// As [`machine`].
    pub fn new() -> Result<Here, codegen::cpu::CodegenError> {
        let gpu = codegen::nvptx::ARCHITECTURES[0].name;
        Ok(Here { compilers: [compiler("cpu"), compiler(gpu)], machine: machine()? })
    }

    /// Does a record's key hold here?
    pub fn holds(&self, key: &table::Key) -> bool {
        match codegen::nvptx::architecture(&key.target) {
            // How long emulating takes says nothing of a GPU.
            Some(_) => key.compiler == self.compilers[1] && !key.machine.starts_with("ptx-emulator"),
            None => key.compiler == self.compilers[0] && key.machine == self.machine,
        }
    }
}
