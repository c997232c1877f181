//! Every error of the command with its exit code, and how it is told.

use llamac::compare::stored::StoredError;
use llamac::model::ModelError;
use llamac::sampled::SampledError;
use models::{ChatError, ReadError, TokenizerError};
use runtime::artifact::ArtifactError;
use runtime::device::DeviceError;
use runtime::generate::GenerateError;
use runtime::map::MapError;
use runtime::sample::SampleError;
use runtime::whole_file::WriteError;
use serde::Serialize;
use std::error::Error;
use std::fmt::{Debug, Display};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[cfg(feature = "compiler")]
use codegen::cpu::CodegenError;
#[cfg(feature = "compiler")]
use codegen::ptxas::PtxasError;
#[cfg(feature = "compiler")]
use llamac::check::device::LoadError;
#[cfg(feature = "compiler")]
use llamac::check::walk::WalkError;
#[cfg(feature = "compiler")]
use llamac::compare::layers::LayersError;
#[cfg(feature = "compiler")]
use llamac::compare::ops::OpsError;
#[cfg(feature = "compiler")]
use llamac::compare::reproducer::ReproducerError;
#[cfg(feature = "compiler")]
use llamac::compare::trace::TraceError;
#[cfg(feature = "compiler")]
use llamac::compile::CompileError;
#[cfg(feature = "compiler")]
use llamac::file_error::FileError;
#[cfg(feature = "compiler")]
use llamac::profile::machine_code::ArgueError;
use llamac::tune::candidates::CandidatesError;
use llamac::tune::search::SearchError;
use llamac::tune::table::TableError;
use llamac::tune::worker::TasksError;

/// Why the command ends, as a number for scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// A check failed: a result, not a failure to run.
    Mismatch = 1,
    /// Wrong usage.
    Usage = 2,
    /// A model that cannot be read, or is not supported.
    Model = 3,
    /// An artifact that cannot be opened, or is for another machine.
    Artifact = 4,
    /// A context longer than compiled, or a full cache.
    Context = 5,
    /// Not enough memory or disk.
    Room = 6,
    /// A device lost, without driver, or failing.
    Device = 7,
    /// A fault of llamac itself (`EX_SOFTWARE` of BSD's sysexits).
    Bug = 70,
    /// Ctrl-C, as shells count it.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Arguments that do not fit together.
    #[error("{0}")]
    Usage(String),
    /// This program was built without the feature `compiler`.
    #[cfg_attr(feature = "compiler", expect(dead_code, reason = "of the program without the compiler"))]
    #[error(
        "{what} needs the compiler, and this llamac was built without it: it runs .llamac artifacts. Make one with a full \
         llamac: `llamac compile MODEL -o FILE.llamac`"
    )]
    NoCompiler {
        /// Verb, or what was to be compiled.
        what: String,
    },
    /// A verb that needs weights, and a model that has none.
    #[error("{model} has no weights: {cure}")]
    NoWeights {
        /// As given.
        model: String,
        /// What to do.
        cure: &'static str,
    },
    /// The MODEL cannot be opened.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// It cannot be compiled.
    #[cfg(feature = "compiler")]
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// A tuning table.
    #[error(transparent)]
    Table(#[from] TableError),
    /// Layers cannot be judged.
    #[cfg(feature = "compiler")]
    #[error(transparent)]
    Layers(#[from] LayersError),
    /// Tuning.
    #[error(transparent)]
    Search(#[from] SearchError),
    /// What is to be tuned.
    #[error(transparent)]
    Tasks(#[from] TasksError),
    /// The device cannot load or run.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A device that this program does not have.
    #[error("there is no device `{name}` in this llamac; there is {known}")]
    NoDevice {
        /// As given.
        name: String,
        /// Those that there are.
        known: &'static str,
    },
    /// No text, or not to its end.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// Sampling options.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// Text cannot be made tokens, or tokens text.
    #[error("{model}: tokenizer")]
    Tokenizer {
        /// As given.
        model: String,
        /// Why.
        source: TokenizerError,
    },
    /// The chat template.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A text, of IR or of questions, that cannot be read.
    #[error("{}:{line}: {message}", file.display())]
    Text {
        /// The file.
        file: PathBuf,
        /// Line in it.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// Nothing can be argued from machine code.
    #[cfg(feature = "compiler")]
    #[error(transparent)]
    Argue(#[from] ArgueError),
    /// A pass made something that its verifier refuses.
    #[cfg(feature = "compiler")]
    #[error("after {pass}: {message}")]
    Pass {
        /// The pass.
        pass: &'static str,
        /// The verifier's words.
        message: String,
    },
    /// A file named on the command line.
    #[error("{}: cannot be read", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that was to be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A share of more than its ceiling: the bench is wrong.
    #[error(
        "{what} is {found:.1} % of its ceiling: the ceiling was measured too low, so this bench says nothing"
    )]
    AboveCeiling {
        /// Which speed.
        what: String,
        /// Share, percent.
        found: f64,
    },
    /// The same prompt gave other tokens: what was timed is wrong.
    #[error(
        "with {threads} threads the tokens part from the first run's at number {at}: this bench says nothing"
    )]
    Unequal {
        /// Threads.
        threads: usize,
        /// The first token that differs.
        at: usize,
    },
    /// Kernels that compute something else than they should.
    #[error("{wrong} kernels are wrong")]
    Wrong {
        /// How many.
        wrong: usize,
    },
    /// Rows of kernels could not be judged.
    #[error(transparent)]
    Sampled(#[from] SampledError),
    /// Instructions that give something else than the PTX ISA says.
    #[error("{wrong} forms of instructions are wrong")]
    NonConforming {
        /// How many.
        wrong: usize,
    },
    /// `check` could not go on.
    #[cfg(feature = "compiler")]
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// A reference file that cannot be used.
    #[cfg(feature = "compiler")]
    #[error(transparent)]
    Reference(#[from] FileError),
    /// Ops that cannot be judged.
    #[cfg(feature = "compiler")]
    #[error(transparent)]
    Ops(#[from] OpsError),
    /// A folder that shows no fault again.
    #[cfg(feature = "compiler")]
    #[error(transparent)]
    Reproducer(#[from] ReproducerError),
    /// What launches store cannot be compared.
    #[cfg(feature = "compiler")]
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// A program that is not what it should be.
    #[cfg(feature = "compiler")]
    #[error("{model} is not what it should be")]
    Mismatch {
        /// As given.
        model: String,
    },
    /// Stdout.
    #[error("stdout: cannot be written")]
    Output(#[from] io::Error),
}

impl From<CandidatesError> for CliError {
    fn from(error: CandidatesError) -> CliError {
        CliError::Tasks(error.into())
    }
}

impl CliError {
    /// The exit code.
    pub fn exit(&self) -> Exit {
        match self {
            CliError::Usage(_) | CliError::NoCompiler { .. } | CliError::NoWeights { .. } => Exit::Usage,
            CliError::Model(error) => model(error),
            #[cfg(feature = "compiler")]
            CliError::Compile(error) => compile(error),
            CliError::Table(error) => match error {
                TableError::Io { source, .. } if source.kind() != io::ErrorKind::NotFound => {
                    write_failed(source)
                }
                TableError::Io { .. } | TableError::Locked { .. } => Exit::Usage,
                TableError::Record { .. } => Exit::Model,
            },
            #[cfg(feature = "compiler")]
            CliError::Layers(error) => match error {
                LayersError::Device(error) => device(error),
                LayersError::Stored(error) => stored(error),
                LayersError::Oracle(_) => Exit::Bug,
                LayersError::NoEntry => Exit::Artifact,
                LayersError::Nothing { .. } => Exit::Model,
            },
            CliError::Search(error) => match error {
                SearchError::Table(_) => Exit::Room,
                SearchError::Start { .. } => Exit::Device,
                SearchError::Interrupted => Exit::Interrupted,
            },
            CliError::Tasks(TasksError::Lower(_)) => Exit::Model,
            CliError::Tasks(TasksError::Candidates(error)) => match error {
                CandidatesError::Artifact(error) => artifact(error),
                CandidatesError::Version { .. }
                | CandidatesError::Missing { .. }
                | CandidatesError::Foreign { .. } => Exit::Artifact,
                #[cfg(feature = "compiler")]
                CandidatesError::Codegen(error) => codegen(error),
                #[cfg(feature = "compiler")]
                CandidatesError::Lower(_) => Exit::Model,
            },
            CliError::Device(error) => device(error),
            CliError::NoDevice { .. } => Exit::Device,
            CliError::Generate(GenerateError::Device(error)) => device(error),
            CliError::Generate(GenerateError::Sample(error)) | CliError::Sample(error) => sample(error),
            CliError::Tokenizer { .. } | CliError::Chat(_) => Exit::Model,
            CliError::Text { .. } => Exit::Model,
            #[cfg(feature = "compiler")]
            CliError::Argue(error) => match error {
                ArgueError::Codegen(error) => codegen(error),
                ArgueError::Sass(_) | ArgueError::Unfit { .. } => Exit::Usage,
                ArgueError::Emulation { .. } | ArgueError::Lower(_) => Exit::Bug,
            },
            #[cfg(feature = "compiler")]
            CliError::Pass { .. } => Exit::Bug,
            CliError::Read { .. } => Exit::Usage,
            CliError::Write(error) => write(error),
            CliError::Output(source) => write_failed(source),
            CliError::AboveCeiling { .. } | CliError::Unequal { .. } => Exit::Mismatch,
            CliError::Wrong { .. } | CliError::NonConforming { .. } => Exit::Mismatch,
            CliError::Sampled(error) => match error {
                SampledError::Device(error) => device(error),
                SampledError::Stored(error) => stored(error),
                SampledError::Oracle(_) => Exit::Bug,
            },
            #[cfg(feature = "compiler")]
            CliError::Walk(error) => match error {
                WalkError::Load(LoadError::Codegen(error)) => codegen(error),
                WalkError::Load(LoadError::Code(_)) => Exit::Device,
                WalkError::Load(LoadError::Gpu(error)) => device(error),
                WalkError::Load(LoadError::Ptx(_)) | WalkError::Lower(_) | WalkError::Case { .. } => {
                    Exit::Bug
                }
                WalkError::Interrupted => Exit::Interrupted,
            },
            #[cfg(feature = "compiler")]
            CliError::Reference(FileError::Read { .. }) => Exit::Usage,
            #[cfg(feature = "compiler")]
            CliError::Reference(_) => Exit::Model,
            #[cfg(feature = "compiler")]
            CliError::Ops(error) => match error {
                OpsError::Device(error) => device(error),
                OpsError::Stored(error) => stored(error),
                OpsError::Oracle(_) => Exit::Bug,
                OpsError::OtherPlan => Exit::Artifact,
            },
            #[cfg(feature = "compiler")]
            CliError::Reproducer(error) => match error {
                ReproducerError::Load(LoadError::Codegen(error)) => codegen(error),
                ReproducerError::Load(LoadError::Code(_)) => Exit::Device,
                ReproducerError::Load(LoadError::Gpu(error)) => device(error),
                ReproducerError::Load(LoadError::Ptx(_)) => Exit::Bug,
                ReproducerError::Machine { .. } => Exit::Artifact,
                ReproducerError::File(_) | ReproducerError::Lower(_) | ReproducerError::Oracle(_) => {
                    Exit::Model
                }
            },
            #[cfg(feature = "compiler")]
            CliError::Trace(error) => match error {
                TraceError::Device(error) => device(error),
                TraceError::Stored(error) => stored(error),
                TraceError::Apart { .. } => Exit::Model,
            },
            #[cfg(feature = "compiler")]
            CliError::Mismatch { .. } => Exit::Mismatch,
        }
    }

    /// Tells the user on stderr: a line, or one JSON object.
    pub fn report(&self, json: bool) {
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(error) = source {
            let said = error.to_string();
            // Transparent errors say the same twice.
            if !text.contains(&said) {
                text = format!("{text}: {said}");
            }
            source = error.source();
        }
        // If stderr is closed, nobody is left to tell.
        if json {
            #[derive(Serialize)]
            struct Told {
                error: String,
                exit: u8,
                file: Option<String>,
                found: Option<String>,
                expected: Option<String>,
            }
            let Facts { file, found, expected } = self.facts();
            let told = Told {
                error: text,
                exit: self.exit() as u8,
                file: file.map(|file| file.display().to_string()),
                found,
                expected,
            };
            let line = serde_json::to_string(&told).expect("strings and a number");
            let _ = writeln!(io::stderr(), "{line}");
        } else {
            let _ = writeln!(anstream::stderr(), "\x1b[1;31merror\x1b[0m: {text}");
        }
    }

    fn facts(&self) -> Facts {
        match self {
            CliError::Usage(_) | CliError::NoCompiler { .. } => Facts::default(),
            CliError::NoWeights { model, .. } => Facts::default().file(Path::new(model)),
            CliError::Model(ModelError::Read(error)) => read_facts(error),
            CliError::Model(ModelError::Artifact(error)) => artifact_facts(error),
            CliError::Model(ModelError::Preset { name, known }) => Facts::of(name, known),
            #[cfg(feature = "compiler")]
            CliError::Compile(error) => compile_facts(error),
            CliError::Table(
                TableError::Io { file, .. } | TableError::Record { file, .. } | TableError::Locked { file },
            ) => Facts::default().file(file),
            #[cfg(feature = "compiler")]
            CliError::Layers(error) => match error {
                LayersError::Device(error) => device_facts(error),
                LayersError::Stored(error) => stored_facts(error),
                LayersError::Oracle(_) | LayersError::NoEntry | LayersError::Nothing { .. } => {
                    Facts::default()
                }
            },
            CliError::Search(_) | CliError::Tasks(TasksError::Lower(_)) => Facts::default(),
            CliError::Tasks(TasksError::Candidates(error)) => match error {
                CandidatesError::Artifact(error) => artifact_facts(error),
                CandidatesError::Version { file, found, expected } => Facts::of(found, expected).file(file),
                CandidatesError::Missing { file, .. } | CandidatesError::Foreign { file, .. } => {
                    Facts::default().file(file)
                }
                #[cfg(feature = "compiler")]
                CandidatesError::Codegen(_) | CandidatesError::Lower(_) => Facts::default(),
            },
            CliError::Device(error) | CliError::Generate(GenerateError::Device(error)) => device_facts(error),
            CliError::NoDevice { name, known } => Facts::of(name, known),
            CliError::Generate(GenerateError::Sample(error)) | CliError::Sample(error) => match error {
                SampleError::Option { found, expected, option: _ } => Facts::of(found, expected),
                SampleError::BadLogit { found, token: _ } => Facts::of(found, "a number"),
                SampleError::NoCandidate { .. } => Facts::default(),
            },
            CliError::Tokenizer { model, .. } => Facts::default().file(Path::new(model)),
            CliError::Chat(_) => Facts::default(),
            #[cfg(feature = "compiler")]
            CliError::Argue(ArgueError::Unfit { has, fit, .. }) => Facts::of(has, fit),
            #[cfg(feature = "compiler")]
            CliError::Pass { .. } | CliError::Argue(_) => Facts::default(),
            CliError::Text { file, .. } => Facts::default().file(file),
            CliError::Read { file, .. } => Facts::default().file(file),
            CliError::Write(error) => write_facts(error),
            CliError::AboveCeiling { found, .. } => Facts::of(format!("{found:.1} %"), "at most 100 %"),
            CliError::Unequal { .. } | CliError::Output(_) => Facts::default(),
            CliError::Wrong { .. } | CliError::NonConforming { .. } => Facts::default(),
            CliError::Sampled(SampledError::Device(error)) => device_facts(error),
            CliError::Sampled(SampledError::Stored(error)) => stored_facts(error),
            CliError::Sampled(SampledError::Oracle(_)) => Facts::default(),
            #[cfg(feature = "compiler")]
            CliError::Walk(_) => Facts::default(),
            #[cfg(feature = "compiler")]
            CliError::Reference(error) => file_facts(error),
            #[cfg(feature = "compiler")]
            CliError::Ops(OpsError::Device(error)) => device_facts(error),
            #[cfg(feature = "compiler")]
            CliError::Ops(OpsError::Stored(error)) => stored_facts(error),
            #[cfg(feature = "compiler")]
            CliError::Ops(OpsError::Oracle(_) | OpsError::OtherPlan) => Facts::default(),
            #[cfg(feature = "compiler")]
            CliError::Reproducer(error) => match error {
                ReproducerError::File(error) => file_facts(error),
                ReproducerError::Machine { needs, .. } => Facts::of("a machine without", needs),
                ReproducerError::Lower(_) | ReproducerError::Oracle(_) | ReproducerError::Load(_) => {
                    Facts::default()
                }
            },
            #[cfg(feature = "compiler")]
            CliError::Trace(error) => match error {
                TraceError::Device(error) => device_facts(error),
                TraceError::Stored(error) => stored_facts(error),
                TraceError::Apart { what: _, a, b } => Facts::of(a, b),
            },
            #[cfg(feature = "compiler")]
            CliError::Mismatch { model } => Facts::default().file(Path::new(model)),
        }
    }
}

impl From<ArtifactError> for CliError {
    fn from(error: ArtifactError) -> CliError {
        CliError::Model(error.into())
    }
}

fn model(error: &ModelError) -> Exit {
    match error {
        ModelError::Read(_) => Exit::Model,
        ModelError::Artifact(error) => artifact(error),
        ModelError::Preset { .. } => Exit::Usage,
    }
}

#[cfg(feature = "compiler")]
fn compile(error: &CompileError) -> Exit {
    match error {
        CompileError::Read(_) | CompileError::Lower(_) => Exit::Model,
        CompileError::Codegen(error) => codegen(error),
        CompileError::Artifact(error) => artifact(error),
        CompileError::DType { .. } => Exit::Usage,
        CompileError::Context { .. } => Exit::Context,
        CompileError::Interrupted => Exit::Interrupted,
        CompileError::Keep(error) => write(error),
    }
}

#[cfg(feature = "compiler")]
fn codegen(error: &CodegenError) -> Exit {
    match error {
        CodegenError::UnknownTarget { .. }
        | CodegenError::Native { .. }
        | CodegenError::Unsupported { .. }
        | CodegenError::NoLinker => Exit::Usage,
        CodegenError::Llvm { .. } | CodegenError::Link { .. } => Exit::Bug,
        CodegenError::Ptxas(PtxasError::Missing(_) | PtxasError::Run { .. } | PtxasError::Said { .. }) => {
            Exit::Usage
        }
        CodegenError::Ptxas(PtxasError::Refused { .. }) => Exit::Bug,
        CodegenError::Io(error) => write_failed(error),
    }
}

fn stored(error: &StoredError) -> Exit {
    match error {
        StoredError::Artifact(error) => artifact(error),
        StoredError::Graphs { .. } | StoredError::Place { .. } => Exit::Artifact,
    }
}

fn artifact(error: &ArtifactError) -> Exit {
    match error {
        ArtifactError::Map(MapError::Memory { .. }) => Exit::Room,
        ArtifactError::Map(MapError::File { .. } | MapError::NotAFile { .. })
        | ArtifactError::Magic { .. }
        | ArtifactError::Version { .. }
        | ArtifactError::Abi { .. }
        | ArtifactError::Length { .. }
        | ArtifactError::Digest { .. }
        | ArtifactError::Misaligned { .. }
        | ArtifactError::OutOfFile { .. }
        | ArtifactError::Overlap { .. }
        | ArtifactError::Table { .. }
        | ArtifactError::Name { .. }
        | ArtifactError::Duplicate { .. }
        | ArtifactError::Missing { .. }
        | ArtifactError::Manifest { .. } => Exit::Artifact,
        ArtifactError::Unended { .. } => Exit::Bug,
        ArtifactError::DiskFull { .. } => Exit::Room,
        ArtifactError::Write { source, .. } => write_failed(source),
    }
}

fn device(error: &DeviceError) -> Exit {
    match error {
        DeviceError::ContextFull { .. } | DeviceError::StepTooLong { .. } => Exit::Context,
        DeviceError::EmptyStep | DeviceError::BadToken { .. } => Exit::Usage,
        DeviceError::ForeignState | DeviceError::BadOutputs { .. } => Exit::Bug,
        DeviceError::MissingFeature { .. } | DeviceError::BadPlan { .. } | DeviceError::NoTaps { .. } => {
            Exit::Artifact
        }
        DeviceError::OutOfMemory { .. } => Exit::Room,
        DeviceError::Artifact(error) => artifact(error),
        DeviceError::NoLaunches { .. } | DeviceError::Launch { .. } | DeviceError::Driver { .. } => {
            Exit::Device
        }
    }
}

fn sample(error: &SampleError) -> Exit {
    match error {
        SampleError::Option { .. } => Exit::Usage,
        // Weights that give no numbers.
        SampleError::BadLogit { .. } | SampleError::NoCandidate { .. } => Exit::Model,
    }
}

fn write(error: &WriteError) -> Exit {
    match error {
        WriteError::DiskFull { .. } => Exit::Room,
        WriteError::Io { source, .. } => write_failed(source),
    }
}

/// A place that may not be written is wrong usage; a full one is not.
fn write_failed(error: &io::Error) -> Exit {
    use io::ErrorKind;
    match error.kind() {
        ErrorKind::NotFound
        | ErrorKind::PermissionDenied
        | ErrorKind::IsADirectory
        | ErrorKind::NotADirectory
        | ErrorKind::ReadOnlyFilesystem
        | ErrorKind::InvalidInput => Exit::Usage,
        _ => Exit::Room,
    }
}

/// What scripts want to know of an error besides its text.
#[derive(Default)]
struct Facts {
    file: Option<PathBuf>,
    found: Option<String>,
    expected: Option<String>,
}

impl Facts {
    fn of(found: impl Display, expected: impl Display) -> Facts {
        Facts { file: None, found: Some(found.to_string()), expected: Some(expected.to_string()) }
    }

    fn seen(found: impl Debug, expected: impl Debug) -> Facts {
        Facts::of(format!("{found:?}"), format!("{expected:?}"))
    }

    fn found(found: impl Display) -> Facts {
        Facts { found: Some(found.to_string()), ..Facts::default() }
    }

    fn file(self, file: &Path) -> Facts {
        Facts { file: Some(file.to_path_buf()), ..self }
    }
}

fn read_facts(error: &ReadError) -> Facts {
    use ReadError as E;
    match error {
        E::Io { file, source: _ } | E::Json { file, source: _ } | E::Utf8 { file, what: _ } => {
            Facts::default().file(file)
        }
        E::MissingKey { file, key: _, expected } => Facts::of("nothing", expected).file(file),
        E::DuplicateKey { file, key } => Facts::found(key).file(file),
        E::Value { file, key: _, found, expected } => Facts::of(found, expected).file(file),
        E::UnknownValue { file, key: _, found, known } => Facts::of(found, known.join(", ")).file(file),
        E::UnknownKey { file, key, found, expected } => {
            Facts::of(format!("{key} = {found}"), expected).file(file)
        }
        E::NoCheckpoint { file, found, expected } => Facts::of(found, expected).file(file),
        E::Version { file, found, known } => Facts::seen(found, known).file(file),
        E::Truncated { file, what: _, found, expected } => Facts::of(found, expected).file(file),
        E::TooLarge { file, what: _, found, limit } => {
            Facts::of(found, format!("at most {limit}")).file(file)
        }
        E::MissingShard { file, tensor } | E::NotInShard { file, tensor } => {
            Facts::of("nothing", tensor).file(file)
        }
        E::MissingTensor { file, tensor, expected } => {
            Facts::of("nothing", format!("{tensor} {expected:?}")).file(file)
        }
        E::UnexpectedTensor { file, tensor, found } => Facts::found(format!("{tensor} {found:?}")).file(file),
        E::DuplicateTensor { file, tensor } => Facts::found(tensor).file(file),
        E::Shape { file, tensor: _, found, expected } => Facts::seen(found, expected).file(file),
        E::Dims { file, tensor: _, found, expected } => Facts::of(format!("{found:?}"), expected).file(file),
        E::DType { file, tensor: _, found, known } => Facts::of(found, known.join(", ")).file(file),
        E::TensorBytes { file, tensor: _, found, expected } => Facts::of(found, expected).file(file),
        E::OutOfFile { file, tensor: _, found, expected } => Facts::seen(found, expected).file(file),
        E::Overlap { file, tensor: _, other: _, found, expected } => Facts::of(found, expected).file(file),
        E::Gap { file, found } => Facts::found(format!("{found:?}")).file(file),
        E::Misaligned { file, tensor: _, found, expected } => Facts::of(found, expected).file(file),
        E::Rows { file, tensor: _, found, expected } => Facts::seen(found, expected).file(file),
        E::Buffer { file, tensor: _, found, expected } => Facts::of(found, expected).file(file),
        E::Tokenizer { file, source: _ } => Facts::default().file(file),
    }
}

fn artifact_facts(error: &ArtifactError) -> Facts {
    use ArtifactError as E;
    match error {
        E::Map(MapError::File { file, source: _ } | MapError::NotAFile { file }) => {
            Facts::default().file(file)
        }
        E::Map(MapError::Memory { needed, available, source: _ }) => {
            Facts { expected: Some(needed.to_string()), found: available.map(|a| a.to_string()), file: None }
        }
        E::Magic { file, found } => Facts::seen(found, runtime::artifact::MAGIC).file(file),
        E::Version { file, found, expected } | E::Abi { file, found, expected } => {
            Facts::of(found, expected).file(file)
        }
        E::Length { file, found, expected } => Facts::of(found, expected).file(file),
        E::Digest { file, part: _, found, expected } => Facts::of(found, expected).file(file),
        E::Misaligned { file, part: _, found } => {
            Facts::of(found, format!("a multiple of {}", runtime::artifact::ALIGN)).file(file)
        }
        E::OutOfFile { file, part: _, offset, length, file_length } => {
            Facts::of(format!("{length} bytes at {offset}"), format!("inside {file_length} bytes")).file(file)
        }
        E::Overlap { file, first: _, second: _, found, expected } => Facts::of(found, expected).file(file),
        E::Table { file, found } => Facts::found(found).file(file),
        E::Name { file, found } => Facts::found(found).file(file),
        E::Duplicate { file, name } | E::Unended { file, name } => Facts::found(name).file(file),
        E::Missing { file, name } => Facts::of("nothing", name).file(file),
        E::Manifest { file, source: _ } | E::Write { file, source: _ } => Facts::default().file(file),
        E::DiskFull { file, needed, available } => Facts::of(available, needed).file(file),
    }
}

fn write_facts(error: &WriteError) -> Facts {
    match error {
        WriteError::DiskFull { file, needed, available } => Facts::of(available, needed).file(file),
        WriteError::Io { file, source: _ } => Facts::default().file(file),
    }
}

fn device_facts(error: &DeviceError) -> Facts {
    use DeviceError as E;
    match error {
        E::ContextFull { past, tokens, context } => Facts::of(past + tokens, context),
        E::StepTooLong { tokens, want: _, max } => Facts::of(tokens, max),
        E::EmptyStep => Facts::of(0, "at least one token"),
        E::BadToken { token, vocab } => Facts::of(token, format!("0..{vocab}")),
        E::ForeignState | E::BadOutputs { .. } | E::Launch { .. } | E::Driver { .. } => Facts::default(),
        E::MissingFeature { file, needs, has } => Facts::of(has, needs).file(file),
        E::OutOfMemory { needed, available } => Facts::of(available, needed),
        E::Artifact(error) => artifact_facts(error),
        E::BadPlan { file, .. } | E::NoTaps { file } | E::NoLaunches { file } => Facts::default().file(file),
    }
}

#[cfg(feature = "compiler")]
fn file_facts(error: &FileError) -> Facts {
    match error {
        FileError::Read { file, .. } | FileError::Text { file, .. } | FileError::Format { file, .. } => {
            Facts::default().file(file)
        }
        FileError::Content { file, found, expected, .. } => Facts::of(found, expected).file(file),
    }
}

fn stored_facts(error: &StoredError) -> Facts {
    match error {
        StoredError::Artifact(error) => artifact_facts(error),
        StoredError::Graphs { file, .. } => Facts::default().file(file),
        StoredError::Place { .. } => Facts::default(),
    }
}

#[cfg(feature = "compiler")]
fn compile_facts(error: &CompileError) -> Facts {
    match error {
        CompileError::Read(error) => read_facts(error),
        CompileError::Artifact(error) => artifact_facts(error),
        CompileError::Codegen(CodegenError::UnknownTarget { name, known }) => Facts::of(name, known),
        CompileError::Lower(_) | CompileError::Codegen(_) | CompileError::Interrupted => Facts::default(),
        CompileError::DType { found } => Facts::of(found, "f32 or bf16"),
        CompileError::Context { found, most } => Facts::of(found, format!("1 to {most}")),
        CompileError::Keep(error) => write_facts(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_the_help() {
        let io = || io::Error::from(io::ErrorKind::NotFound);
        let read = ReadError::Io { file: "m".into(), source: io() };
        assert_eq!(CliError::from(ModelError::from(read)).exit(), Exit::Model);
        let full = DeviceError::ContextFull { past: 1, tokens: 2, context: 2 };
        assert_eq!(CliError::from(full).exit(), Exit::Context);
        let disk = ArtifactError::DiskFull { file: "a".into(), needed: 2, available: 1 };
        assert_eq!(CliError::from(disk).exit(), Exit::Room);
        assert_eq!(CliError::Usage(String::new()).exit(), Exit::Usage);
    }
}
