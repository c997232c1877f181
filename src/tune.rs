//! Tuning: the fastest schedule of each kernel on this machine, found by measuring.
//!
//! * [`table`]: what was measured, as text: one record a line.
//! * [`task`]: the kernels of a model that have a choice, and what each is measured on.
//! * [`worker`]: the process that compiles, judges and times candidates; one that hangs or crashes takes no other with it.
//! * [`search`]: which candidates, in which order, and which is chosen.
//! * [`report`]: what was found, and how well the models of cost predict it.
//!
//! A candidate is timed only if it is right: [`crate::judge`] says so of a few rows, and in a whole step its bits are those
//! of the schedule that the model of cost chose.

#[cfg(feature = "compiler")]
pub mod report;
#[cfg(feature = "compiler")]
pub mod search;
pub mod table;
#[cfg(feature = "compiler")]
pub mod task;
#[cfg(feature = "compiler")]
pub mod worker;

/// The compiler that records hold for: llamac's and LLVM's version.
#[cfg(feature = "compiler")]
pub fn compiler() -> String {
    format!("llamac {}, LLVM {}", env!("CARGO_PKG_VERSION"), codegen::cpu::llvm_version())
}

/// The machine that records hold for: its CPU, as the system and LLVM name it, the cores that this process may use, and its
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
