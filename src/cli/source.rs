//! From the MODEL argument to an artifact: opened if it is one, else compiled into the cache folder, once.

use super::device::Machine;
use super::error::CliError;
use super::screen::Screen;
use clap::Args;
use ir::DType;
use ir::plan::Plan;
#[cfg(feature = "compiler")]
use llamac::compile::CompileError;
use llamac::model::Model;
#[cfg(feature = "compiler")]
use llamac::tune::{
    Here,
    table::{Choices, Table},
};
use runtime::artifact::Artifact;
use runtime::device::DeviceError;
use runtime::manifest::{Manifest, TargetCode};
use std::path::PathBuf;

/// Options of verbs that compile what is not compiled yet.
#[derive(Args, Clone, Debug, Default)]
pub struct BuildOptions {
    /// Dtype of weights and stored values: f32 or bf16 [default: f32 for f32 checkpoints, else bf16]
    #[arg(long, value_parser = dtype, value_name = "DTYPE")]
    pub dtype: Option<DType>,
    /// Positions that a text may have [default: the model's, at most 4096]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub ctx: Option<usize>,
    /// Random weights from this seed, for shapes without weights
    #[arg(long, value_name = "SEED")]
    pub random_weights: Option<u64>,
    /// Take the schedules that `tune` measured on this machine from this table
    #[arg(long, value_name = "FILE")]
    pub tune_db: Option<PathBuf>,
    /// Verbs that look between launches set it.
    #[arg(skip)]
    pub taps: bool,
    /// Verbs that run on a device that is named set it.
    #[arg(skip)]
    pub machine: Machine,
    /// Verbs that can make weights on the device set it: an artifact may have none.
    #[arg(skip)]
    pub weightless: bool,
}

/// Most positions unless more are asked for: the KV cache of long contexts takes more memory than many models do.
#[cfg(feature = "compiler")]
const DEFAULT_CONTEXT: usize = 4096;

/// Reads a dtype that kernels compute in.
pub fn dtype(text: &str) -> Result<DType, String> {
    match DType::from_name(text) {
        Some(dtype @ (DType::F32 | DType::BF16)) => Ok(dtype),
        _ => Err("expected f32 or bf16".to_string()),
    }
}

/// Reads a number above zero.
pub fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a number above zero".to_string()),
        Ok(number) => Ok(number),
    }
}

#[cfg(feature = "compiler")]
impl BuildOptions {
    /// The dtype asked for, or the one that keeps what the model's weights say.
    pub fn dtype(&self, model: &Model) -> DType {
        self.dtype.unwrap_or_else(|| match model {
            Model::Checkpoint(checkpoint) => match checkpoint.stored_dtypes().first() {
                Some((DType::F32, _)) => DType::F32,
                _ => DType::BF16,
            },
            Model::Artifact(_) | Model::Preset(_) => DType::BF16,
        })
    }

    /// The schedules of the table asked for that hold on this machine. That others do not is said.
    pub fn choices(&self, screen: &Screen) -> Result<Option<Choices>, CliError> {
        let Some(file) = &self.tune_db else { return Ok(None) };
        let table = Table::read(file)?;
        let here = Here::new().map_err(CompileError::from)?;
        let choices = table.choices(&|key| here.holds(key));
        let others = Choices::of(table.records.iter()).records().count() - choices.records().count();
        if others > 0 {
            screen.note(format!(
                "{}: {others} choices are of another machine or compiler and are not taken: `llamac tune --db {}` tries them \
                 first",
                file.display(),
                file.display()
            ));
        }
        Ok(Some(choices))
    }

    /// The context asked for, or the model's own where it is not too long.
    pub fn context(&self, own: usize) -> usize {
        self.ctx.unwrap_or_else(|| own.min(DEFAULT_CONTEXT))
    }
}

/// An artifact that can run here, with the parts of it that verbs ask for.
pub struct Ready {
    /// As given.
    pub argument: String,
    /// The file.
    pub artifact: Artifact,
    /// What it says of itself.
    pub manifest: Manifest,
    /// The target that runs here.
    pub target: TargetCode,
    /// Its plan.
    pub plan: Plan,
    /// Its tokenizer and chat template are asked as any model's.
    pub model: Model,
}

#[cfg(feature = "compiler")]
impl Ready {
    /// The measured schedules that the artifact was compiled with.
    pub fn model_choices(&self) -> Result<Option<Choices>, CliError> {
        let choices = Model::Artifact(Box::new(self.artifact.clone())).choices()?;
        Ok((!choices.is_empty()).then_some(choices))
    }
}

/// Opens or makes the artifact of a model, with weights in it.
pub fn ready(argument: &str, build: &BuildOptions, screen: &Screen) -> Result<Ready, CliError> {
    let model = Model::open(argument)?;
    let artifact = match &model {
        Model::Artifact(artifact) => {
            let artifact = (**artifact).clone();
            check(argument, build, &artifact)?;
            artifact
        }
        Model::Preset(_) if build.random_weights.is_none() => {
            let cure = "add --random-weights SEED for numbers from a seed";
            return Err(CliError::NoWeights { model: argument.to_string(), cure });
        }
        Model::Checkpoint(_) | Model::Preset(_) => compiled(argument, &model, build, screen)?,
    };
    let manifest: Manifest = artifact.manifest()?;
    let target = build.machine.choose(artifact.file(), &manifest)?.clone();
    if let Some(remark) = build.machine.remark() {
        screen.note(remark);
    }
    let plan = runtime::cpu::read_plan(&artifact, &target)?;
    Ok(Ready { argument: argument.to_string(), artifact, manifest, target, plan, model })
}

/// An artifact is as it was compiled: options may only say the same again.
fn check(argument: &str, build: &BuildOptions, artifact: &Artifact) -> Result<(), CliError> {
    let manifest: Manifest = artifact.manifest()?;
    if !manifest.weights && !build.weightless {
        let cure = "it was compiled with --no-weights; compile it again without that";
        return Err(CliError::NoWeights { model: argument.to_string(), cure });
    }
    if build.taps && !manifest.taps {
        return Err(DeviceError::NoTaps { file: artifact.file().to_path_buf() }.into());
    }
    let compiled = &manifest.dtype;
    if let Some(dtype) = build.dtype.filter(|dtype| dtype.name() != compiled) {
        return Err(CliError::Usage(format!("--dtype {dtype}: {argument} was compiled as {compiled}")));
    }
    if build.tune_db.is_some() {
        return Err(CliError::Usage(format!("--tune-db: {argument} has its schedules already")));
    }
    if build.random_weights.is_some() && manifest.weights {
        return Err(CliError::Usage(format!("--random-weights: {argument} has weights already")));
    }
    match build.ctx {
        // Longer than compiled: the same refusal as for a text that does not fit.
        Some(tokens) if tokens > manifest.context => {
            Err(DeviceError::ContextFull { past: 0, tokens, context: manifest.context }.into())
        }
        _ => Ok(()),
    }
}

#[cfg(not(feature = "compiler"))]
fn compiled(argument: &str, _: &Model, _: &BuildOptions, _: &Screen) -> Result<Artifact, CliError> {
    Err(CliError::NoCompiler { what: format!("{argument} is no artifact: it") })
}

#[cfg(feature = "compiler")]
fn compiled(
    argument: &str,
    model: &Model,
    build: &BuildOptions,
    screen: &Screen,
) -> Result<Artifact, CliError> {
    use super::{cache, compile};
    let file = cache::place(argument, model, build)?;
    if file.exists() {
        match Artifact::open(&file) {
            Ok(artifact) => {
                screen.detail(format!("using {}", file.display()));
                return Ok(artifact);
            }
            // Such as a file of an older version under the same name: it can be made again.
            Err(error) => screen.note(format!("{error}; compiling again")),
        }
    }
    screen.note(format!(
        "compiling {argument} ({}, context {}) into {}",
        build.dtype(model),
        build.context(model.config()?.context),
        file.display()
    ));
    let options = compile::Request {
        argument,
        model,
        build,
        targets: vec![build.machine.target().to_string()],
        weights: true,
        taps: build.taps,
        cubin: build.machine.takes_cubin(),
        keep: None,
    };
    compile::to_file(&options, &file, screen)?;
    Ok(Artifact::open(&file)?)
}
