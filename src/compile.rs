//! Compiling a model into an artifact.

use crate::pipeline::{self, Request};
use crate::tune::table::{Choices, Table};
use crate::weights::{self, Source};
use codegen::Backend;
use codegen::cpu::CodegenError;
use codegen::nvptx::{self, Architecture};
use codegen::ptxas::{self, PtxasError, Tool};
use ir::DType;
use ir::families::LowerError;
use ir::plan::Plan;
use models::{Config, ReadError};
use runtime::artifact::{ArtifactError, ArtifactWriter};
use runtime::gpu;
use runtime::manifest::{self, Manifest, TargetCode};
use runtime::whole_file::{self, WriteError};
use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

/// What to compile and for what.
pub struct Options<'a> {
    /// Name that the artifact shall bear.
    pub model: String,
    /// The model's shape.
    pub config: &'a Config,
    /// Its weights; none for code and plan alone.
    pub weights: Option<Source<'a>>,
    /// `tokenizer.json`.
    pub tokenizer: Option<&'a [u8]>,
    /// Jinja text.
    pub chat_template: Option<&'a str>,
    /// Dtype of weights and stored values.
    pub dtype: DType,
    /// Positions that a sequence may have.
    pub context: usize,
    /// Names of targets, each once.
    pub targets: Vec<String>,
    /// Taps beside the entry points: see [`codegen::lower`].
    pub taps: bool,
    /// Schedules that were measured.
    pub measured: Option<&'a Choices>,
    /// Machine code of GPUs beside their PTX, where `ptxas` is.
    pub cubin: bool,
    /// Folder for each stage's text, one folder a target in it.
    pub keep: Option<&'a Path>,
}

/// Why a compilation failed.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// No kernel for a group.
    #[error(transparent)]
    Lower(#[from] LowerError),
    /// No code.
    #[error(transparent)]
    Codegen(#[from] CodegenError),
    /// The artifact cannot be written.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// A dtype that no kernel computes in.
    #[error("dtype {found} cannot be compiled; expected f32 or bf16")]
    DType {
        /// As asked.
        found: DType,
    },
    /// `progress` said so.
    #[error("interrupted")]
    Interrupted,
    /// A stage's text cannot be kept.
    #[error(transparent)]
    Keep(#[from] WriteError),
    /// A context that the model was not made for.
    #[error("context {found}: expected 1 to {most}, the model's own")]
    Context {
        /// As asked.
        found: usize,
        /// The model's.
        most: usize,
    },
}

/// How long the parts of a compilation took.
#[derive(Clone, Debug, Default)]
pub struct Seconds {
    /// Graph building and each pass, over all targets.
    pub passes: Vec<(&'static str, f64)>,
    /// LLVM and linker.
    pub codegen: f64,
    /// `ptxas`.
    pub ptxas: f64,
    /// Reading, packing and writing weights.
    pub weights: f64,
    /// All.
    pub total: f64,
}

/// What a compilation is doing.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// Making code for a target.
    Code(&'a str),
    /// Writing weights: bytes done and in all.
    Weights(usize, usize),
    /// Something that the user should know.
    Note(&'a str),
}

/// Code of one target.
pub struct Code {
    /// What makes code of it.
    pub backend: Backend,
    /// All stages before it.
    pub lowered: pipeline::Lowered,
    /// LLVM IR text.
    pub llvm: String,
}

/// A stage whose text can be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Graphs before any pass.
    Graph,
    /// Graphs after all passes: groups, layouts, schedules.
    Fused,
    /// Kernel IR.
    Kernels,
    /// The plan.
    Plan,
    /// LLVM IR, before LLVM's passes.
    Llvm,
    /// Assembly of a CPU.
    Asm,
    /// PTX of a GPU.
    Ptx,
    /// Machine code of a GPU.
    Sass,
}

impl Stage {
    /// Every stage, with its name and the ending of its file.
    #[rustfmt::skip] // a table
    pub const ALL: [(Stage, &'static str, &'static str); 8] = [
        (Stage::Graph,   "graph",   "ir"),
        (Stage::Fused,   "fused",   "ir"),
        (Stage::Kernels, "kernels", "ir"),
        (Stage::Plan,    "plan",    "txt"),
        (Stage::Llvm,    "llvm",    "ll"),
        (Stage::Asm,     "asm",     "s"),
        (Stage::Ptx,     "ptx",     "ptx"),
        (Stage::Sass,    "sass",    "sass"),
    ];

    /// Has a back end this stage?
    pub fn is_of(self, backend: &Backend) -> bool {
        match self {
            Stage::Graph | Stage::Fused | Stage::Kernels | Stage::Plan | Stage::Llvm => true,
            Stage::Asm => matches!(backend, Backend::Cpu(_)),
            Stage::Ptx | Stage::Sass => matches!(backend, Backend::Cuda(_)),
        }
    }
}

impl Code {
    /// The text of a stage.
    ///
    /// # Errors
    ///
    /// [`Stage::Asm`], [`Stage::Ptx`] and [`Stage::Sass`] ask LLVM, which may refuse; the last asks for tools that may be missing.
    pub fn text(&self, request: &Request<'_>, stage: Stage) -> Result<String, CodegenError> {
        let join = |graphs: Vec<String>| graphs.join("\n");
        Ok(match stage {
            Stage::Graph => request.text(&self.backend.target().machine),
            Stage::Fused => join(self.lowered.entries.iter().map(|e| e.graph.to_string()).collect()),
            Stage::Kernels => join(self.lowered.kernels.iter().map(|k| k.to_string()).collect()),
            Stage::Plan => self.lowered.plan.to_string(),
            Stage::Llvm => self.llvm.clone(),
            Stage::Asm | Stage::Ptx => self.backend.assembly(&self.llvm)?,
            Stage::Sass => self.backend.machine_code(&self.llvm)?,
        })
    }

    /// Writes the text of every stage into a folder. That a tool for one is missing is told.
    fn keep(
        &self,
        request: &Request<'_>,
        folder: &Path,
        progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> Result<(), CompileError> {
        let folder = folder.join(self.backend.name().replace(':', "-"));
        fs::create_dir_all(&folder).map_err(|source| WriteError::Io { file: folder.clone(), source })?;
        for (stage, name, ending) in Stage::ALL.into_iter().filter(|stage| stage.0.is_of(&self.backend)) {
            let file = folder.join(format!("{name}.{ending}"));
            let text = match self.text(request, stage) {
                Err(CodegenError::Ptxas(why @ PtxasError::Missing(_))) => {
                    check(progress(Progress::Note(&format!("{} is not kept: {why}", file.display()))))?;
                    continue;
                }
                text => text?,
            };
            whole_file::write(&file, text.len() as u64, |path| fs::write(path, text))?;
        }
        Ok(())
    }
}

/// Lowers a model for a target, up to LLVM IR text, with or without taps.
///
/// # Errors
///
/// An unknown target, or a group without a kernel.
pub fn lower(request: &Request<'_>, target: &str, taps: bool) -> Result<Code, CompileError> {
    if !matches!(request.dtype, DType::F32 | DType::BF16) {
        return Err(CompileError::DType { found: request.dtype });
    }
    let most = request.config.context;
    if request.context == 0 || request.context > most {
        return Err(CompileError::Context { found: request.context, most });
    }
    let backend = Backend::of(target)?;
    let lowered = pipeline::lower(request, &backend.target())?;
    let llvm = backend.llvm(&lowered.plan, &lowered.kernels, taps)?;
    Ok(Code { backend, lowered, llvm })
}

/// The architecture whose code a GPU of this compute capability, in tenths, takes first, if it allows a CTA so many bytes of
/// shared memory; none for one that is too old.
pub fn architecture_for(capability: u32, shared_bytes: u32) -> Option<&'static Architecture> {
    let (machine, _) = gpu::takes(capability).first()?;
    let fit = nvptx::of_machine(machine).filter(|a| a.shared_bytes <= shared_bytes as usize);
    fit.max_by_key(|a| a.shared_bytes)
}

/// Compiles a model to `file`.
///
/// # Errors
///
/// [`CompileError`], [`CompileError::Interrupted`] if `progress` breaks; the file is then as it was before.
pub fn compile(
    options: &Options<'_>,
    file: &Path,
    progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<Seconds, CompileError> {
    let begin = Instant::now();
    let mut seconds = Seconds::default();
    let (config, dtype, context) = (options.config, options.dtype, options.context);
    let request = Request { config, dtype, context, measured: options.measured };
    let mut codes = Vec::new();
    for target in &options.targets {
        check(progress(Progress::Code(target)))?;
        let code = lower(&request, target, options.taps)?;
        add(&mut seconds.passes, &code.lowered.seconds);
        if let Some(folder) = options.keep {
            code.keep(&request, folder, progress)?;
        }
        let start = Instant::now();
        let made = code.backend.code(&code.llvm)?;
        seconds.codegen += start.elapsed().as_secs_f64();
        let cubin = match &code.backend {
            Backend::Cuda(architecture) if options.cubin => {
                let start = Instant::now();
                let cubin = assemble(architecture, &String::from_utf8_lossy(&made), progress)?;
                if cubin.is_some() {
                    seconds.ptxas += start.elapsed().as_secs_f64();
                }
                cubin
            }
            Backend::Cuda(_) | Backend::Cpu(_) => None,
        };
        codes.push((code, made, cubin));
    }
    // The loader takes the first that fits. Of one architecture each level has what the one below has, and more.
    codes.sort_by_key(|(code, ..)| Reverse(code.backend.requires().len()));

    // All CPUs read one packing of the weights, all GPUs another.
    let mut packings: BTreeMap<&str, &Plan> = BTreeMap::new();
    for (code, ..) in codes.iter().filter(|_| options.weights.is_some()) {
        packings.entry(weights_section(&code.backend)).or_insert(&code.lowered.plan);
    }
    let bytes = packings.values().map(|plan| plan.weight_bytes()).sum();
    let mut writer = ArtifactWriter::create(file, Some(bytes as u64))?;
    let mut targets = Vec::new();
    for (code, made, cubin) in &codes {
        let target = TargetCode {
            name: code.backend.name().to_string(),
            abi: code.backend.abi(),
            requires: code.backend.requires(),
            shared_bytes: code.backend.shared_bytes(),
            arch: code.backend.arch(),
            weights: weights_section(&code.backend).to_string(),
            ptxas: cubin.as_ref().map(|(version, _)| version.clone()),
        };
        section(&mut writer, &target.plan_section(), code.lowered.plan.to_string().as_bytes())?;
        section(&mut writer, &target.code_section(), made)?;
        if let Some((_, cubin)) = cubin {
            section(&mut writer, &target.cubin_section(), cubin)?;
        }
        if let Backend::Cuda(_) = code.backend {
            let kernels = code.text(&request, Stage::Kernels)?;
            section(&mut writer, &target.kernels_section(), kernels.as_bytes())?;
        }
        if options.taps {
            let fused = code.text(&request, Stage::Fused)?;
            section(&mut writer, &target.fused_section(), fused.as_bytes())?;
        }
        targets.push(target);
    }
    if let Some(choices) = options.measured {
        let taken =
            codes.iter().flat_map(|(code, ..)| code.lowered.taken(&code.backend.target(), choices)).collect();
        section(&mut writer, manifest::TUNING, Table { records: taken }.to_string().as_bytes())?;
    }
    let graph = codes[0].0.text(&request, Stage::Graph)?;
    section(&mut writer, manifest::GRAPH, graph.as_bytes())?;
    if let Some(tokenizer) = options.tokenizer {
        section(&mut writer, manifest::TOKENIZER, tokenizer)?;
    }
    if let Some(template) = options.chat_template {
        section(&mut writer, manifest::CHAT_TEMPLATE, template.as_bytes())?;
    }
    if let Some(source) = &options.weights {
        let start = Instant::now();
        let mut before = 0;
        for (name, plan) in packings {
            let mut out = writer.section(name)?;
            let go_on = Cell::new(ControlFlow::Continue(()));
            let mut append = |piece: &[u8]| {
                check(go_on.get())?;
                out.append(piece).map_err(CompileError::from)
            };
            let mut done = |done| go_on.set(progress(Progress::Weights(before + done, bytes)));
            weights::write(plan, source, &mut append, &mut done)?;
            out.end()?;
            before += plan.weight_bytes();
        }
        seconds.weights = start.elapsed().as_secs_f64();
    }
    writer.finish(&Manifest {
        model: options.model.clone(),
        config: serde_json::to_value(options.config).expect("a config is plain data"),
        dtype: options.dtype.name().to_string(),
        context: options.context,
        weights: options.weights.is_some(),
        targets,
        taps: options.taps,
        compiler: env!("CARGO_PKG_VERSION").to_string(),
        llvm: codegen::cpu::llvm_version(),
        bos: options.config.bos,
        eos: options.config.eos.clone(),
    })?;
    seconds.total = begin.elapsed().as_secs_f64();
    Ok(seconds)
}

/// PTX as machine code, with the version of `ptxas`; none where that is missing. This, and what the machine code lacks, is told.
fn assemble(
    architecture: &Architecture,
    ptx: &str,
    progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<Option<(String, Vec<u8>)>, CompileError> {
    let mut tell = |text: String| check(progress(Progress::Note(&format!("{}: {text}", architecture.name))));
    let ptxas = match Tool::Ptxas.find() {
        Err(why @ PtxasError::Missing(_)) => {
            tell(format!("PTX alone, which the driver assembles at load: {why}"))?;
            return Ok(None);
        }
        ptxas => ptxas.map_err(CodegenError::from)?,
    };
    let cubin = ptxas::assemble(&ptxas, ptx, architecture.cpu).map_err(CodegenError::from)?;
    for loss in cubin.report.losses() {
        tell(format!("warning of ptxas {}: {loss}", ptxas.version))?;
    }
    Ok(Some((ptxas.version, cubin.bytes)))
}

/// The section of the weights as a back end's kernels read them.
fn weights_section(backend: &Backend) -> &'static str {
    match backend {
        Backend::Cpu(_) => manifest::WEIGHTS,
        Backend::Cuda(_) => manifest::GPU_WEIGHTS,
    }
}

fn check(flow: ControlFlow<()>) -> Result<(), CompileError> {
    if flow.is_break() { Err(CompileError::Interrupted) } else { Ok(()) }
}

/// Adds the seconds of another target.
fn add(sum: &mut Vec<(&'static str, f64)>, more: &[(&'static str, f64)]) {
    for &(name, seconds) in more {
        match sum.iter_mut().find(|(n, _)| *n == name) {
            Some((_, s)) => *s += seconds,
            None => sum.push((name, seconds)),
        }
    }
}

fn section(writer: &mut ArtifactWriter, name: &str, bytes: &[u8]) -> Result<(), ArtifactError> {
    let mut section = writer.section(name)?;
    section.append(bytes)?;
    section.end().map(drop)
}
