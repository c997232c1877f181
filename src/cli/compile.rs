//! `compile`: a model into an artifact.

use super::error::CliError;
use super::interrupt;
use super::screen::{self, Screen, print, print_json, short};
use super::source::BuildOptions;
use clap::Args;
use codegen::nvptx::{ARCHITECTURES, Architecture};
use indicatif::{ProgressBar, ProgressStyle};
use llamac::compile::{self, Progress, Seconds};
use llamac::model::{Model, name_of};
use llamac::weights::Source;
use serde_json::{Map, json};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

#[derive(Args)]
#[command(after_help = "\
Targets:
  cpu:native      this machine, with all its instructions
  cpu:x86-64-v3   AVX2 and FMA: Haswell (2013), Zen and later
  cpu:x86-64-v4   AVX-512: Skylake-X (2017), Zen 4 and later
  cpu:aarch64     64-bit Arm with NEON
  cuda:sm_80      NVIDIA GPUs from Ampere (2020) on: PTX, and machine code for the first of them if ptxas is found
  cuda:sm_90a     H100 and H200, with tensor cores fed from shared memory: PTX, and machine code if ptxas is found
  cuda            both

Example:
  llamac compile TinyLlama-1.1B/ -o tiny.llamac --dtype bf16 --target cpu:x86-64-v4 --target cpu:x86-64-v3")]
pub struct Options {
    /// Model to compile
    model: String,
    /// Artifact to write
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Machine to compile for; may stand there more than once, the best that fits is run
    #[arg(long = "target", value_name = "TARGET", default_value = "cpu:native")]
    targets: Vec<String>,
    #[command(flatten)]
    build: BuildOptions,
    /// Code and plan alone: for looking and timing, not for running
    #[arg(long)]
    no_weights: bool,
    /// Functions for single launches beside the entry points, for `profile` and `compare`; the entry points stay as they are
    #[arg(long)]
    taps: bool,
    /// Keep each stage's text in this folder
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

pub fn compile(options: &Options, screen: &Screen) -> Result<(), CliError> {
    // `cuda` is every GPU, `cuda:sm_80` all of one machine: for each amount of shared memory the schedules that fit it.
    let named = |target: &String| -> Vec<String> {
        let is = |a: &&Architecture| {
            target.strip_prefix("cuda").is_some_and(|of| of.is_empty() || of[1..] == *a.cpu)
        };
        let of_machine: Vec<String> = ARCHITECTURES.iter().filter(is).map(|a| a.name.to_string()).collect();
        if of_machine.is_empty() { vec![target.clone()] } else { of_machine }
    };
    let targets: Vec<String> = options.targets.iter().flat_map(named).collect();
    for (number, target) in targets.iter().enumerate() {
        if targets[..number].contains(target) {
            return Err(CliError::Usage(format!("--target {target} stands there twice")));
        }
    }
    let model = Model::open(&options.model)?;
    let request = Request {
        argument: &options.model,
        model: &model,
        build: &options.build,
        targets,
        weights: !options.no_weights,
        taps: options.taps,
        cubin: true,
        keep: options.keep.as_deref(),
    };
    let Done { seconds, notes } = to_file(&request, &options.output, screen)?;
    let bytes = fs::metadata(&options.output)
        .map_err(|source| CliError::Read { file: options.output.clone(), source })?
        .len();
    let peak = runtime::map::peak_rss_bytes();
    if screen.json {
        let mut table: Map<_, _> =
            seconds.passes.iter().map(|&(name, s)| (name.to_string(), json!(s))).collect();
        table.insert("codegen".into(), json!(seconds.codegen));
        table.insert("ptxas".into(), json!(seconds.ptxas));
        table.insert("weights".into(), json!(seconds.weights));
        table.insert("total".into(), json!(seconds.total));
        let artifact = options.output.display().to_string();
        return print_json(&json!({
            "artifact": artifact, "bytes": bytes, "seconds": table, "peak_rss_bytes": peak, "notes": notes,
        }));
    }
    let passes: f64 = seconds.passes.iter().map(|(_, s)| s).sum();
    print(&format!(
        "{}: {} in {} s (passes {} s, code {} s{}, weights {} s), at most {} of memory\n",
        options.output.display(),
        screen::bytes(bytes),
        short(seconds.total),
        short(passes),
        short(seconds.codegen),
        if seconds.ptxas > 0.0 { format!(", ptxas {} s", short(seconds.ptxas)) } else { String::new() },
        short(seconds.weights),
        peak.map_or("?".to_string(), screen::bytes),
    ))
}

/// What to compile, as verbs ask for it.
pub struct Request<'a> {
    /// The MODEL argument.
    pub argument: &'a str,
    /// What it names.
    pub model: &'a Model,
    /// Dtype, context, seed.
    pub build: &'a BuildOptions,
    /// Names of targets.
    pub targets: Vec<String>,
    /// With weights?
    pub weights: bool,
    /// With taps?
    pub taps: bool,
    /// With machine code of GPUs, where `ptxas` is?
    pub cubin: bool,
    /// Folder for texts.
    pub keep: Option<&'a Path>,
}

/// What is told of a compilation that is done.
pub struct Done {
    /// How long its parts took.
    pub seconds: Seconds,
    /// What the user should know, as registers that were spilled; on stderr too, unless an object is all that is said.
    pub notes: Vec<String>,
}

/// Compiles to a file, with a progress bar; Ctrl-C leaves no file.
pub fn to_file(request: &Request<'_>, file: &Path, screen: &Screen) -> Result<Done, CliError> {
    let Request { argument, model, build, targets, weights, taps, cubin, keep } = request;
    let config = model.config()?;
    let source = match (model, build.random_weights) {
        (Model::Artifact(_), _) => {
            return Err(CliError::Usage(format!("{argument} is an artifact: compile what it was made from")));
        }
        _ if !weights => None,
        (_, Some(seed)) => Some(Source::Random(seed)),
        (Model::Checkpoint(checkpoint), None) => Some(Source::Checkpoint(checkpoint)),
        (Model::Preset(_), None) => {
            let cure = "add --random-weights SEED, or --no-weights for code and plan alone";
            return Err(CliError::NoWeights { model: argument.to_string(), cure });
        }
    };
    let chat_template = model.chat_template();
    let choices = build.choices(screen)?;
    let options = compile::Options {
        model: name_of(argument),
        config: &config,
        weights: source,
        tokenizer: model.tokenizer(),
        chat_template: chat_template.as_deref(),
        dtype: build.dtype(model),
        context: build.context(config.context),
        targets: targets.clone(),
        taps: *taps,
        measured: choices.as_ref(),
        cubin: *cubin,
        keep: *keep,
    };
    // Hidden where stderr is no terminal.
    let bar = ProgressBar::no_length();
    bar.set_style(ProgressStyle::with_template("{msg}").expect("a template of ours"));
    if screen.json {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    let mut notes = Vec::new();
    let mut progress = |progress: Progress<'_>| {
        match progress {
            Progress::Note(text) => {
                bar.suspend(|| screen.note(text));
                notes.push(text.to_string());
            }
            Progress::Code(target) => bar.set_message(format!("code for {target}")),
            Progress::Weights(done, all) => {
                if bar.length().is_none() {
                    bar.set_message("weights");
                    bar.set_style(bar_style());
                    bar.set_length(all as u64);
                }
                bar.set_position(done as u64);
            }
        }
        if interrupt::pressed() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let done = interrupt::guarded(|| compile::compile(&options, file, &mut progress));
    bar.finish_and_clear();
    Ok(Done { seconds: done?, notes })
}

fn bar_style() -> ProgressStyle {
    let template =
        "{msg} {wide_bar} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    ProgressStyle::with_template(template).expect("a template of ours")
}
