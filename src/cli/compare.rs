//! `compare`: a program against a reference, a checkpoint and the interpreter.

mod levels;
mod reproducer;
mod traces;

use super::device::DeviceOptions;
use super::error::CliError;
use super::prompt::{Ids, ids};
use super::screen::{Screen, pairs, print, print_json, short};
use super::source::{self, BuildOptions, Ready, dtype};
use clap::{Args, ValueEnum};
use codegen::Backend;
use ir::DType;
use levels::Levels;
use llamac::compare::layers::Layers;
use llamac::compare::reproducer::{GraphCase, Reproducer, WeightCase};
use llamac::compare::{Fault, weights};
use llamac::compile::CompileError;
use llamac::model::{Model, ModelError};
use llamac::pipeline::Request;
use llamac::reference::Reference;
use llamac::weights::Source;
use models::Checkpoint;
use runtime::device::Device;
use runtime::manifest::GRAPH;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Lengths of the prompts that stand in for a reference file's, and the greedy steps after each.
const LENGTHS: [usize; 2] = [1, 9];
const STEPS: usize = 4;

#[derive(Args)]
#[command(after_help = "\
Example:
  llamac compare builtin
  llamac compare stories260K/ --dtype bf16 --reference stories260K.safetensors
  llamac compare model.llamac --checkpoint model/
  llamac compare builtin --level op
  llamac compare --replay smol-l3.o-reproducer
  llamac compare smol.llamac --record here.trace   # and elsewhere: --against here.trace
  llamac compare --bisect old.llamac new.llamac")]
pub struct Options {
    /// Model or artifact
    #[arg(required_unless_present_any = ["replay", "bisect"], default_value = "", hide_default_value = true)]
    model: String,
    /// Logits in f64 to judge by, as safetensors [default: the interpreter, on the same weights]
    #[arg(long, value_name = "FILE")]
    reference: Option<PathBuf>,
    /// Checkpoint that weights and shape should be of [default: MODEL, if it is one]
    #[arg(long, value_name = "MODEL")]
    checkpoint: Option<String>,
    /// What to judge: logits, or layers or ops on what the program itself fed them
    #[arg(long, value_enum, default_value_t = Level::Logits)]
    level: Level,
    /// Judge each module on the inputs in the reference, computed from the artifact's weights
    #[arg(long, requires = "reference", conflicts_with_all = ["level", "record", "against", "replay", "bisect"])]
    modules: bool,
    /// Folder for the first fault, which --replay shows again [default: beside an artifact, else here]
    #[arg(long, value_name = "DIR")]
    reproducer: Option<PathBuf>,
    /// Show the fault in this folder again, alone, in place of comparing a model
    #[arg(long, value_name = "DIR", conflicts_with_all = ["model", "reproducer", "level", "reference", "checkpoint", "dtype", "threads"])]
    replay: Option<PathBuf>,
    /// Tokens to run, where launches are looked at [default: the reference's longest prompt, or some nine]
    #[arg(long, value_name = "IDS", value_parser = ids, allow_hyphen_values = true, conflicts_with_all = ["replay", "against"])]
    tokens: Option<Ids>,
    /// Write what each launch stores to this file: digests and samples
    #[arg(long, value_name = "FILE", conflicts_with_all = ["level", "reproducer", "checkpoint"])]
    record: Option<PathBuf>,
    /// Judge by such a file, of the same model on another machine: the same bits, or as near as two devices must be
    #[arg(long, value_name = "FILE", conflicts_with_all = ["level", "record", "reproducer", "reference"])]
    against: Option<PathBuf>,
    /// Find the first kernel from which two artifacts of one model part, in bits and beyond what two devices may
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["model", "level", "reference", "checkpoint", "dtype", "reproducer", "replay", "record", "against"])]
    bisect: Vec<String>,
    /// Dtype of weights and stored values: f32 or bf16 [default: f32 for f32 checkpoints, else bf16]
    #[arg(long, value_parser = dtype, value_name = "DTYPE")]
    dtype: Option<DType>,
    #[command(flatten)]
    device: DeviceOptions,
}

impl Options {
    /// The device that is judged.
    fn device(&self) -> Result<Box<dyn Device>, CliError> {
        match self.device.device.as_str() {
            "null" => Err(CliError::Usage("--device null: it computes nothing to compare".to_string())),
            _ => self.device.device(),
        }
    }

    /// The tokens that were asked for, those of the longest prompt of a reference, or such as look like none in particular.
    fn tokens(&self, reference: Option<&Reference>, vocab: usize, context: usize) -> Vec<i32> {
        let asked = self.tokens.as_ref().map(|Ids(tokens)| tokens.clone());
        let prompts = reference.into_iter().flat_map(|r| &r.prompts).map(|p| p.tokens.clone());
        let most = LENGTHS[1].min(context);
        let any = || llamac::reference::ids(vocab).take(most).collect();
        asked.or_else(|| prompts.max_by_key(Vec::len)).unwrap_or_else(any)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Level {
    /// What each layer gives, on what the program itself fed it; with a reference, the hidden states behind layers
    Layer,
    /// Each launch of each entry point, by the oracle of its group
    Op,
    /// Logits and greedy tokens
    Logits,
}

/// What was found.
#[derive(Default)]
struct Found {
    /// Lines for the reader: what was judged and how it went.
    lines: Vec<(String, String)>,
    /// The worst share of a bound.
    worst: f64,
    near_ties: usize,
    fault: Option<Fault>,
    /// Where two traces begin to differ, if only in bits.
    difference: Option<Fault>,
    /// The fault, to be looked at alone.
    reproducer: Option<Reproducer>,
}

impl Found {
    /// Takes what layers came to.
    fn take(&mut self, layers: Layers) {
        self.worst = self.worst.max(layers.worst());
        let row = |(of, share): &(String, f64)| (of.clone(), format!("{share:.3} of the bound"));
        self.lines.extend(layers.rows.iter().map(row));
        self.lines.push(("tensors".to_string(), format!("{} judged", layers.tensors)));
        self.fault = layers.fault;
    }
}

pub fn compare(options: &Options, screen: &Screen) -> Result<(), CliError> {
    let begin = Instant::now();
    if let Some(folder) = &options.replay {
        return reproducer::replay(options, folder, screen);
    }
    if let Some(folder) = &options.reproducer {
        reproducer::check(folder)?;
    }
    // Asked before a long compilation.
    options.device()?;
    let launches = matches!(options.level, Level::Op | Level::Layer)
        || options.record.is_some()
        || !options.bisect.is_empty();
    if options.tokens.is_some() && !launches {
        return Err(CliError::Usage("--tokens: for --level op, --record and --bisect".to_string()));
    }
    let mut found = Found::default();
    if !options.bisect.is_empty() {
        traces::bisect(options, &options.bisect, &mut found, screen)?;
        return tell(options, &found, None, begin.elapsed().as_secs_f64(), screen);
    }
    let model = Model::open(&options.model)?;
    let config = model.config()?;
    let reference = options.reference.as_deref().map(|file| Reference::read(file, config.vocab_size));
    let reference = reference.transpose()?;
    let trace = options.against.as_deref().map(traces::read).transpose()?;
    // No more positions than are looked at: the interpreter's cache is large.
    let needed = |r: &Reference| r.prompts.iter().map(|p| p.tokens.len() + p.greedy.len()).max();
    let needed = reference.as_ref().and_then(needed).unwrap_or(LENGTHS[1] + STEPS);
    let asked =
        options.tokens.as_ref().map(|Ids(tokens)| tokens).or(trace.as_ref().map(|trace| &trace.tokens));
    let needed = asked.map_or(needed, |tokens| tokens.len().max(1));
    let ctx = (!matches!(model, Model::Artifact(_))).then_some(needed.min(config.context));
    let taps = launches || trace.is_some();
    let machine = options.device.machine()?;
    let build = BuildOptions { dtype: options.dtype, ctx, taps, machine, ..BuildOptions::default() };
    let ready = source::ready(&options.model, &build, screen)?;
    if let Some(file) = &options.record {
        let tokens = options.tokens(reference.as_ref(), config.vocab_size, ready.manifest.context);
        return traces::record(options, file, &ready, &tokens, screen);
    }

    let original = match &options.checkpoint {
        Some(argument) => Some((argument, Model::open(argument)?)),
        None => None,
    };
    match (&original, &model) {
        (Some((_, Model::Checkpoint(checkpoint))), _) | (None, Model::Checkpoint(checkpoint)) => {
            by_checkpoint(&ready, checkpoint, &mut found)?;
        }
        (Some((argument, _)), _) => {
            return Err(CliError::Usage(format!("--checkpoint {argument}: it has no weights on disk")));
        }
        (None, _) => screen.detail("no checkpoint at hand: weights are not compared"),
    }
    if found.fault.is_none() {
        let levels =
            Levels { options, build: &build, ready: &ready, config: &config, reference: reference.as_ref() };
        match &trace {
            Some(trace) => traces::against(options, trace, &ready, &mut found)?,
            None => levels.judge(&mut found, screen)?,
        }
    }
    let left = reproducer::leave(options.reproducer.as_deref(), &ready, &found, screen);
    tell(options, &found, left.as_deref(), begin.elapsed().as_secs_f64(), screen)
}

/// Judges the artifact's graph and weights.
fn by_checkpoint(ready: &Ready, checkpoint: &Checkpoint, found: &mut Found) -> Result<(), CliError> {
    let text = String::from_utf8_lossy(ready.artifact.require(GRAPH)?).into_owned();
    let dtype = DType::from_name(&ready.manifest.dtype).expect("an artifact's dtype is one");
    let (config, context) = (&checkpoint.config, ready.manifest.context);
    // All targets of an artifact are compiled from the graphs of its first.
    let target = ready.manifest.targets[0].name.clone();
    let machine = Backend::of(&target).map_err(CompileError::from)?.target().machine;
    let request = Request { config, dtype, context, measured: None };
    found.fault = weights::graph(&text, &request.text(&machine));
    if found.fault.is_some() {
        let case = GraphCase { graph: text, config: config.clone(), dtype, context, target };
        found.reproducer = Some(Reproducer::Graph(case));
        return Ok(());
    }
    let (bytes, source) = (ready.artifact.require(&ready.target.weights)?, Source::Checkpoint(checkpoint));
    let judged = weights::weights(bytes, &ready.plan, &source).map_err(ModelError::from)?;
    match judged {
        Ok(tensors) => {
            found
                .lines
                .push(("weights".to_string(), format!("{tensors} tensors, each bit as in the checkpoint")));
        }
        Err(bad) => {
            let case = WeightCase::of(&ready.plan, bad.buffer, bytes, &source).map_err(ModelError::from)?;
            (found.fault, found.reproducer) = (Some(bad.fault), Some(Reproducer::Weight(case)));
        }
    }
    Ok(())
}

/// Prints the verdict.
fn tell(
    options: &Options,
    found: &Found,
    reproducer: Option<&Path>,
    seconds: f64,
    screen: &Screen,
) -> Result<(), CliError> {
    let verdict = if found.fault.is_none() { "pass" } else { "fail" };
    if screen.json {
        let mut fault = json!(found.fault);
        if found.fault.is_some() {
            fault["reproducer"] = json!(reproducer);
        }
        print_json(&json!({
            "verdict": verdict, "worst": found.worst, "first_fault": fault, "near_ties": found.near_ties,
            "first_difference": found.difference, "seconds": seconds,
        }))?;
    } else {
        let said = match &found.fault {
            None => format!("in {} s", short(seconds)),
            Some(fault) => fault.to_string(),
        };
        let mut lines: Vec<_> = found.lines.iter().map(|(of, said)| (of.as_str(), said.clone())).collect();
        lines.push((verdict, said));
        if let Some(folder) = reproducer {
            lines.push(("again", format!("llamac compare --replay {}", folder.display())));
        }
        print(&pairs(&lines))?;
    }
    match found.fault {
        None => Ok(()),
        Some(_) => {
            // What differs of two artifacts is the second.
            let model = options.bisect.last().unwrap_or(&options.model).clone();
            Err(CliError::Mismatch { model })
        }
    }
}
