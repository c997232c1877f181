//! What kernels can be compiled for: CPU levels and GPU architectures, by their names on the command line.

use crate::cpu::{self, CodegenError, Form, LEVELS, Level};
use crate::nvptx::{self, ARCHITECTURES, Architecture};
use crate::ptxas::{self, Tool};
use crate::{link, lower};
use ir::kernel::Kernel;
use ir::plan::Plan;
use ir::target::Target;

/// A target that code can be made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// A shared object.
    Cpu(Level),
    /// PTX.
    Cuda(&'static Architecture),
}

/// Names that [`Backend::of`] knows, with what they mean.
pub fn names() -> Vec<(&'static str, &'static str)> {
    LEVELS.into_iter().chain(ARCHITECTURES.iter().map(|a| (a.name, a.meaning))).collect()
}

impl Backend {
    /// The back end of that name.
    ///
    /// # Errors
    ///
    /// When there is none, or the machine is below all levels.
    pub fn of(name: &str) -> Result<Backend, CodegenError> {
        if let Some(architecture) = nvptx::architecture(name) {
            return Ok(Backend::Cuda(architecture));
        }
        match cpu::level(name) {
            Ok(level) => Ok(Backend::Cpu(level)),
            Err(CodegenError::UnknownTarget { name, .. }) => {
                let known: Vec<&str> = names().into_iter().map(|(name, _)| name).collect();
                Err(CodegenError::UnknownTarget { name, known: known.join(", ") })
            }
            Err(other) => Err(other),
        }
    }

    /// Its name on the command line.
    pub fn name(&self) -> &str {
        match self {
            Backend::Cpu(level) => &level.name,
            Backend::Cuda(architecture) => architecture.name,
        }
    }

    /// What schedules ask.
    pub fn target(&self) -> Target {
        match self {
            Backend::Cpu(level) => level.target.clone(),
            Backend::Cuda(architecture) => architecture.target(),
        }
    }

    /// What a machine must have, as an artifact names it.
    pub fn requires(&self) -> Vec<String> {
        match self {
            Backend::Cpu(level) => level.requires.clone(),
            Backend::Cuda(architecture) => vec![architecture.cpu.to_string()],
        }
    }

    /// Bytes of shared memory that a GPU must allow a CTA; 0 for a CPU.
    pub fn shared_bytes(&self) -> usize {
        match self {
            Backend::Cpu(_) => 0,
            Backend::Cuda(architecture) => architecture.shared_bytes,
        }
    }

    /// The instruction set, as an artifact names it.
    pub fn arch(&self) -> String {
        let triple = match self {
            Backend::Cpu(level) => &level.triple,
            Backend::Cuda(_) => nvptx::TRIPLE,
        };
        triple.split('-').next().unwrap_or_default().to_string()
    }

    /// Version of how its code is called.
    pub fn abi(&self) -> u32 {
        match self {
            Backend::Cpu(_) => lower::ABI,
            Backend::Cuda(_) => nvptx::ABI,
        }
    }

    /// LLVM IR text of all kernels; for a CPU with the plan's entry points, and with taps if they are wanted. The launches of
    /// a GPU are the runtime's, each by itself.
    ///
    /// # Errors
    ///
    /// When the target cannot run a kernel.
    pub fn llvm(&self, plan: &Plan, kernels: &[Kernel], taps: bool) -> Result<String, CodegenError> {
        match self {
            Backend::Cpu(level) => Ok(lower::module(plan, kernels, level.features, taps)),
            Backend::Cuda(architecture) => nvptx::llvm(kernels, architecture),
        }
    }

    /// The text of a module as code: a shared object, or PTX.
    ///
    /// # Errors
    ///
    /// When LLVM refuses the text, or there is no linker.
    pub fn code(&self, llvm: &str) -> Result<Vec<u8>, CodegenError> {
        match self {
            Backend::Cpu(level) => link::link(&cpu::compile(llvm, level, Form::Object)?),
            Backend::Cuda(architecture) => Ok(nvptx::compile(llvm, architecture)?.into_bytes()),
        }
    }

    /// The text of a module as assembly, or PTX.
    ///
    /// # Errors
    ///
    /// When LLVM refuses the text.
    pub fn assembly(&self, llvm: &str) -> Result<String, CodegenError> {
        match self {
            Backend::Cpu(level) => {
                Ok(String::from_utf8_lossy(&cpu::compile(llvm, level, Form::Assembly)?).into_owned())
            }
            Backend::Cuda(architecture) => nvptx::compile(llvm, architecture),
        }
    }

    /// The machine code of a module as text: of a CPU its assembly, of a GPU what `nvdisasm` reads in what `ptxas` wrote.
    ///
    /// # Errors
    ///
    /// When LLVM or `ptxas` refuses the text, or a tool is missing.
    pub fn machine_code(&self, llvm: &str) -> Result<String, CodegenError> {
        match self {
            Backend::Cpu(_) => self.assembly(llvm),
            Backend::Cuda(architecture) => {
                let (ptxas, nvdisasm) = (Tool::Ptxas.find()?, Tool::Nvdisasm.find()?);
                let cubin = ptxas::assemble(&ptxas, &nvptx::compile(llvm, architecture)?, architecture.cpu)?;
                Ok(ptxas::disassemble(&nvdisasm, &cubin.bytes)?)
            }
        }
    }
}
