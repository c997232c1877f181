//! CPU levels, and LLVM IR text to objects.

use crate::lower::{Features, Pause};
use crate::ptxas::PtxasError;
use inkwell::OptimizationLevel;
use inkwell::context::Context;
use inkwell::memory_buffer::MemoryBuffer;
use inkwell::passes::PassBuilderOptions;
use inkwell::targets::{
    CodeModel, FileType, InitializationConfig, RelocMode, Target, TargetMachine, TargetTriple,
};

/// A CPU that objects can be made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Level {
    /// As on the command line: `cpu:x86-64-v4`.
    pub name: String,
    /// LLVM's triple.
    pub triple: String,
    /// LLVM's name of the CPU.
    pub cpu: String,
    /// LLVM's features, `+avx2,-sse4a`.
    pub llvm_features: String,
    /// What the running CPU must have, by the names of `std::arch`'s detection.
    pub requires: Vec<String>,
    /// What lowering asks.
    pub features: Features,
    /// What schedules ask.
    pub target: ir::target::Target,
}

/// Names that [`level`] knows, with what they mean.
pub const LEVELS: [(&str, &str); 4] = [
    ("cpu:native", "this machine, with all its instructions"),
    ("cpu:x86-64-v3", "AVX2 and FMA: Haswell (2013), Zen and later"),
    ("cpu:x86-64-v4", "AVX-512: Skylake-X (2017), Zen 4 and later"),
    ("cpu:aarch64", "64-bit Arm with NEON (cross-compiled)"),
];

const V3: [&str; 6] = ["avx", "avx2", "bmi1", "bmi2", "f16c", "fma"];
const V4: [&str; 11] =
    ["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"];

/// Why no code could be made.
#[derive(Debug, thiserror::Error)]
pub enum CodegenError {
    /// A target's name is not known.
    #[error("target `{name}` is not known; there are {known}")]
    UnknownTarget {
        /// As given.
        name: String,
        /// All that there are.
        known: String,
    },
    /// `cpu:native` on a machine that is below every level.
    #[error("this machine ({cpu}) has no AVX2 and FMA, or is no x86-64: compile for another with --target")]
    Native {
        /// LLVM's name of it.
        cpu: String,
    },
    /// LLVM does not accept our own text: a fault of llamac.
    #[error("LLVM refused generated code (a fault of llamac; please report it): {message}")]
    Llvm {
        /// What LLVM said.
        message: String,
    },
    /// A kernel that a target cannot run.
    #[error("kernel @{kernel}: {what} cannot be lowered for {target}")]
    Unsupported {
        /// The kernel.
        kernel: String,
        /// The target.
        target: String,
        /// What it lacks.
        what: String,
    },
    /// The linker is missing.
    #[error("no linker: ld.lld-22 or ld.lld was not found; install it with `apt-get install lld-22`")]
    NoLinker,
    /// The linker failed.
    #[error("{linker} failed: {message}")]
    Link {
        /// Which program.
        linker: String,
        /// What it wrote.
        message: String,
    },
    /// No machine code of a GPU.
    #[error(transparent)]
    Ptxas(#[from] PtxasError),
    /// A temporary file could not be written or read.
    #[error("a temporary file for the linker")]
    Io(#[from] std::io::Error),
}

/// The level of that name.
///
/// # Errors
///
/// When there is none, or the machine is below them all.
pub fn level(name: &str) -> Result<Level, CodegenError> {
    let strings = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<Vec<_>>();
    let x86 = |cpu: &str, llvm_features: &str, requires: Vec<String>| {
        let has = |feature: &str| requires.iter().any(|r| r == feature);
        let wide = has("avx512f");
        let target = match wide {
            true => ir::target::Target::cpu(name, 32, 64),
            false => ir::target::Target::cpu(name, 16, 32),
        };
        Level {
            name: name.to_string(),
            triple: "x86_64-unknown-linux-gnu".to_string(),
            cpu: cpu.to_string(),
            llvm_features: llvm_features.to_string(),
            features: Features { bf16: has("avx512bf16"), pause: Pause::X86 },
            requires,
            target,
        }
    };
    match name {
        "cpu:x86-64-v3" => Ok(x86("x86-64-v3", "", strings(&V3))),
        "cpu:x86-64-v4" => Ok(x86("x86-64-v4", "", strings(&V4))),
        "cpu:aarch64" => Ok(Level {
            name: name.to_string(),
            triple: "aarch64-unknown-linux-gnu".to_string(),
            cpu: "generic".to_string(),
            llvm_features: "+neon".to_string(),
            requires: strings(&["neon"]),
            features: Features { bf16: false, pause: Pause::Aarch64 },
            target: ir::target::Target::cpu(name, 32, 16),
        }),
        "cpu:native" => {
            let cpu = TargetMachine::get_host_cpu_name().to_string();
            let features = TargetMachine::get_host_cpu_features().to_string();
            let has = |feature: &str| features.split(',').any(|f| f.strip_prefix('+') == Some(feature));
            let base = if V4.iter().all(|f| has(llvm_name(f))) { &V4[..] } else { &V3[..] };
            if !cfg!(target_arch = "x86_64") || !base.iter().all(|f| has(llvm_name(f))) {
                return Err(CodegenError::Native { cpu });
            }
            let mut requires = strings(base);
            requires.extend(["avx512bf16", "avx512vnni"].iter().filter(|f| has(f)).map(|f| f.to_string()));
            Ok(x86(&cpu, &features, requires))
        }
        _ => {
            Err(CodegenError::UnknownTarget { name: name.to_string(), known: LEVELS.map(|l| l.0).join(", ") })
        }
    }
}

/// LLVM's name for a feature of `std::arch`.
fn llvm_name(feature: &str) -> &str {
    if feature == "bmi1" { "bmi" } else { feature }
}

/// The passes that turn stack slots into registers and hoist addresses out of loops. The code generator does the rest: the
/// loops are written as they shall be. Math functions stay calls on a CPU: inlined, their constants are hoisted out of a
/// product's epilogue into registers that its accumulators need (SwiGLU's product went from 91 % of peak to 65 %).
pub(crate) const PASSES: &str = "function(sroa,early-cse<memssa>,simplifycfg,instcombine<no-verify-fixpoint>,\
loop-simplify,lcssa,loop-mssa(licm),gvn,instcombine<no-verify-fixpoint>,simplifycfg)";

/// Form of the code asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// An ELF object.
    Object,
    /// Assembly text.
    Assembly,
}

/// Optimises a module's text and makes an object or assembly of it.
///
/// # Errors
///
/// When LLVM refuses the text, which is a fault of [`crate::lower`].
pub fn compile(text: &str, level: &Level, form: Form) -> Result<Vec<u8>, CodegenError> {
    let config = InitializationConfig::default();
    Target::initialize_x86(&config);
    Target::initialize_aarch64(&config);
    emit(text, &level.triple, &level.cpu, &level.llvm_features, PASSES, form)
}

/// Optimises a module's text for a machine that was initialised, and makes an object or assembly of it.
pub(crate) fn emit(
    text: &str,
    triple: &str,
    cpu: &str,
    features: &str,
    passes: &str,
    form: Form,
) -> Result<Vec<u8>, CodegenError> {
    let llvm = |message: String| CodegenError::Llvm { message };
    let context = Context::create();
    let buffer = MemoryBuffer::create_from_memory_range_copy(text.as_bytes(), "llamac");
    let module = context.create_module_from_ir(buffer).map_err(|e| llvm(e.to_string()))?;
    let triple = TargetTriple::create(triple);
    let target = Target::from_triple(&triple).map_err(|e| llvm(e.to_string()))?;
    let machine = target
        .create_target_machine(
            &triple,
            cpu,
            features,
            OptimizationLevel::Aggressive,
            RelocMode::PIC,
            CodeModel::Default,
        )
        .ok_or_else(|| llvm(format!("no target machine for {cpu}")))?;
    module.set_triple(&triple);
    module.set_data_layout(&machine.get_target_data().get_data_layout());
    module.verify().map_err(|e| llvm(e.to_string()))?;
    module.run_passes(passes, &machine, PassBuilderOptions::create()).map_err(|e| llvm(e.to_string()))?;
    let form = match form {
        Form::Object => FileType::Object,
        Form::Assembly => FileType::Assembly,
    };
    let bytes = machine.write_to_memory_buffer(&module, form).map_err(|e| llvm(e.to_string()))?;
    Ok(bytes.as_slice().to_vec())
}

/// LLVM's version.
pub fn llvm_version() -> String {
    let (major, minor, patch) = inkwell::support::get_llvm_version();
    format!("{major}.{minor}.{patch}")
}
