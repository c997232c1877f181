//! What all GPUs have in common, real and emulated: which code of an artifact they take, and what a launch needs.
//!
//! A kernel's parameters are the addresses of its buffers, then the symbols as 32-bit integers, each in the order of its text.
//! Its workers are CTAs; any number of them computes the whole.

use crate::artifact::Artifact;
use crate::cpu::read_plan;
use crate::device::DeviceError;
use crate::manifest::{Manifest, TargetCode};
use ir::dim::MAX_SYMBOLS;
use ir::kernel::{self, Kernel};
use ir::plan::{Launch, Plan};
use std::path::Path;

/// Version of how kernels are called; codegen's number must be the same.
pub const ABI: u32 = 1;

/// Instruction set of GPU code, as a manifest names it.
pub const ARCH: &str = "nvptx64";

/// The first code of an artifact that a GPU of this compute capability runs, in tenths: 8.0 is 80. PTX runs on what came later.
///
/// # Errors
///
/// [`DeviceError::MissingFeature`], with what each target needs.
pub fn choose<'a>(
    file: &Path,
    manifest: &'a Manifest,
    capability: u32,
) -> Result<&'a TargetCode, DeviceError> {
    let runs = |target: &TargetCode| {
        let needs = target.requires.first().and_then(|sm| sm.strip_prefix("sm_")?.parse::<u32>().ok());
        target.arch == ARCH && target.abi == ABI && needs.is_some_and(|needs| needs <= capability)
    };
    manifest.targets.iter().find(|target| runs(target)).ok_or_else(|| {
        let needs: Vec<String> =
            manifest.targets.iter().map(|t| format!("{} (ABI {})", t.name, t.abi)).collect();
        DeviceError::MissingFeature {
            file: file.to_path_buf(),
            needs: needs.join(" or "),
            has: format!("a GPU of compute capability {}.{}, ABI {ABI}", capability / 10, capability % 10),
        }
    })
}

/// Code for GPUs, taken from an artifact and checked.
#[derive(Debug)]
pub struct GpuCode {
    /// What runs on which bytes.
    pub plan: Plan,
    /// The plan's kernels.
    pub kernels: Vec<Kernel>,
    /// The module of all kernels.
    pub ptx: String,
}

impl GpuCode {
    /// Reads the code of a target.
    ///
    /// # Errors
    ///
    /// When a section is missing, or plan and kernels do not belong together.
    pub fn read(artifact: &Artifact, target: &TargetCode) -> Result<GpuCode, DeviceError> {
        let bad = |section: String, said: String| DeviceError::BadPlan {
            file: artifact.file().to_path_buf(),
            section,
            said,
        };
        let text = |section: String| match std::str::from_utf8(artifact.require(&section)?) {
            Ok(text) => Ok((section, text)),
            Err(said) => Err(bad(section, said.to_string())),
        };
        let plan = read_plan(artifact, target)?;
        let (section, kernels) = text(target.kernels_section())?;
        let kernels = kernel::parse::parse(kernels).map_err(|e| bad(section.clone(), e.to_string()))?;
        for kernel in &kernels {
            kernel::verify::verify(kernel).map_err(|e| bad(section.clone(), e.to_string()))?;
        }
        if !kernels.iter().map(|k| &k.name).eq(plan.kernels.iter().map(|k| &k.name)) {
            return Err(bad(section, "the kernels are not those of the plan".to_string()));
        }
        for launch in plan.entries.iter().flat_map(|entry| &entry.launches) {
            let kernel = &kernels[launch.kernel];
            if kernel.params().count() != launch.args.len() {
                return Err(bad(section, format!("@{} has not the parameters of its launch", kernel.name)));
            }
        }
        let ptx = text(target.code_section())?.1.to_string();
        Ok(GpuCode { plan, kernels, ptx })
    }

    /// The parameter bytes of a launch, for buffers at these addresses.
    pub fn params(&self, launch: &Launch, addresses: &[u64], symbols: &[i64; MAX_SYMBOLS]) -> Vec<u8> {
        let mut bytes: Vec<u8> = launch.args.iter().flat_map(|&arg| addresses[arg].to_le_bytes()).collect();
        for (_, &value) in self.kernels[launch.kernel].symbols.0.iter().zip(symbols) {
            bytes.extend((value as i32).to_le_bytes());
        }
        bytes
    }
}

/// The version of the PTX ISA that a text asks for: `7.4`.
pub fn isa(ptx: &str) -> Option<&str> {
    ptx.lines().find_map(|line| line.strip_prefix(".version ")).map(str::trim)
}

/// A kernel's name in PTX, which knows no dots.
pub fn symbol(kernel: &str) -> String {
    format!("k_{}", kernel.replace('.', "$"))
}
