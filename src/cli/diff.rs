//! `diff`: what differs between two plans.

use super::error::CliError;
use super::plan::{CeilingOptions, Lowering, Predicted, summary};
use super::screen::{Screen, big, bytes, columns, pairs, print, print_json, short};
use super::source::{BuildOptions, dtype, positive};
use clap::Args;
use ir::DType;
use ir::plan::{Place, Plan, WeightSource};
use llamac::compile::lower;
use llamac::diff::{self, Change, KernelDiff, Kernels};
use llamac::model::Model;
use llamac::predict::KernelCost;
use runtime::artifact::Artifact;
use runtime::manifest::Manifest;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

#[derive(Args)]
#[command(after_help = "\
A and B are models, which are planned here, artifacts, whose plan is read, or files with the text of a plan (`llamac emit
--stage plan`). An option with one value is for both; two values are one each. Speeds are bounds at the same ceilings, as
`plan` has them.

Example:
  llamac diff preset:tinyllama-1.1b preset:tinyllama-1.1b --dtype bf16,f32
  llamac diff old.llamac new.llamac
  llamac diff model.llamac plan.txt --bandwidth 38GB --flops 300GB")]
pub struct Options {
    /// Model, artifact or plan
    a: String,
    /// Model, artifact or plan
    b: String,
    /// Machine to plan for; of an artifact, whose plan is read [default: this one; an artifact's first]
    #[arg(long, value_delimiter = ',', value_name = "TARGET,..")]
    target: Vec<String>,
    /// Dtype to plan in: f32 or bf16 [default: f32 for f32 checkpoints, else bf16]
    #[arg(long, value_delimiter = ',', value_parser = dtype, value_name = "DTYPE,..")]
    dtype: Vec<DType>,
    /// Positions that a text may have [default: the model's, at most 4096]
    #[arg(long, value_delimiter = ',', value_parser = positive, value_name = "N,..")]
    ctx: Vec<usize>,
    #[command(flatten)]
    ceilings: CeilingOptions,
}

/// A plan with where it is from.
struct Side {
    argument: String,
    plan: Plan,
    artifact: Option<Artifact>,
    target: Option<String>,
}

impl Side {
    /// Dtype of most of the weights' bytes.
    fn dtype(&self) -> DType {
        let packed = |source: &WeightSource| matches!(source, WeightSource::Pack { .. });
        let weights = self.plan.buffers.iter().filter_map(|buffer| match &buffer.place {
            Place::Weight { source, .. } if packed(source) => Some((buffer.bytes, buffer.dtype)),
            Place::Weight { .. } | Place::Arena { .. } | Place::State | Place::Input => None,
        });
        weights.max_by_key(|(bytes, _)| *bytes).map_or(DType::F32, |(_, dtype)| dtype)
    }

    fn shown(&self) -> String {
        let target = self.target.as_ref().map_or(String::new(), |target| format!(", {target}"));
        format!("{} ({}, context {}{target})", self.argument, self.dtype(), self.plan.context)
    }
}

pub fn diff(options: &Options, screen: &Screen) -> Result<(), CliError> {
    let [a, b] = [open(options, 0, screen)?, open(options, 1, screen)?];
    let compiled = |side: &Side| side.artifact.is_some() || side.target.is_none();
    let lowered = [&a, &b].into_iter().filter(|side| !compiled(side)).count();
    let targets = [&a, &b].into_iter().filter(|side| side.target.is_some()).count();
    for (name, values, takers) in [
        ("--dtype", options.dtype.len(), lowered),
        ("--ctx", options.ctx.len(), lowered),
        ("--target", options.target.len(), targets),
    ] {
        if values > takers {
            let of = "plans in files and in artifacts are as they are";
            return Err(CliError::Usage(format!("{name}: {values} values for {takers} plans to make; {of}")));
        }
    }

    let files = sections(&a, &b);
    if a.plan == b.plan {
        return same(&a, &b, &files, screen);
    }
    let weight_bytes = a.plan.weight_bytes().max(b.plan.weight_bytes());
    let target = |side: &Side| side.target.clone().unwrap_or_default();
    let of_a = options.ceilings.samples(&target(&a), a.dtype(), weight_bytes)?;
    // Memory is read at one speed whatever lies there.
    let mut of_b = of_a.clone();
    if a.dtype() != b.dtype() {
        of_b.dot = options.ceilings.samples(&target(&b), b.dtype(), weight_bytes)?.dot;
    }
    let kernels = diff::kernels((&a.plan, of_a.best()), (&b.plan, of_b.best()));
    let [predicted_a, predicted_b] = [Predicted::new(&a.plan, &of_a), Predicted::new(&b.plan, &of_b)];
    if screen.json {
        let side = |side: &Side, predicted: &Predicted| {
            let mut told = summary(&side.plan, predicted);
            told.extend(about(side).as_object().cloned().unwrap_or_default());
            told
        };
        return print_json(&json!({
            "same_plan": false,
            "sections": files,
            "a": side(&a, &predicted_a),
            "b": side(&b, &predicted_b),
            "kernels": kernels,
        }));
    }
    let mut text = pairs(&[("A", a.shown()), ("B", b.shown())]);
    text += &format!("\n{}", totals((&a.plan, &predicted_a), (&b.plan, &predicted_b)));
    text += &format!("ceilings: {}", options.ceilings.shown(&of_a));
    if a.dtype() != b.dtype() {
        text += &format!("; in {} {}", b.dtype(), options.ceilings.shown(&of_b));
    }
    text += &format!("\n\n{}", table(&kernels));
    text += &bits(&a, &b, &kernels);
    text += &files_line(&files);
    print(&text)
}

/// Opens a side: the text of a plan, an artifact's plan, or a model's, which is made.
fn open(options: &Options, number: usize, screen: &Screen) -> Result<Side, CliError> {
    let argument = [&options.a, &options.b][number].clone();
    if let Some(plan) = plan_file(Path::new(&argument))? {
        return Ok(Side { argument, plan, artifact: None, target: None });
    }
    let target = of(&options.target, number);
    let model = Model::open(&argument)?;
    if let Model::Artifact(artifact) = model {
        let manifest: Manifest = artifact.manifest()?;
        let found = match target {
            Some(name) => manifest.targets.iter().find(|t| t.name == *name),
            None => manifest.targets.first(),
        };
        let Some(found) = found else {
            let known: Vec<&str> = manifest.targets.iter().map(|t| &*t.name).collect();
            let asked = target.map_or("any target", String::as_str);
            return Err(CliError::Usage(format!(
                "{argument} is not for {asked}; it is for {}",
                known.join(", ")
            )));
        };
        let plan = runtime::cpu::read_plan(&artifact, found)?;
        let target = Some(found.name.clone());
        return Ok(Side { argument, plan, artifact: Some(*artifact), target });
    }
    let (dtype, ctx) = (of(&options.dtype, number).copied(), of(&options.ctx, number).copied());
    let build = BuildOptions { dtype, ctx, ..BuildOptions::default() };
    let lowering = Lowering::of(&model, &build, target.map(String::as_str), screen)?;
    let plan = lower(&lowering.request(), &lowering.target, false)?.lowered.plan;
    Ok(Side { argument, plan, artifact: None, target: Some(lowering.target) })
}

/// The value for a side: one for both, or one each.
fn of<T>(values: &[T], number: usize) -> Option<&T> {
    values.get(number).or(values.first())
}

/// The plan in a file that begins like one.
fn plan_file(file: &Path) -> Result<Option<Plan>, CliError> {
    let mut begin = [0; 5];
    let begins = File::open(file).and_then(|mut f| f.read_exact(&mut begin)).is_ok();
    if !begins || begin != *b"plan(" {
        return Ok(None);
    }
    let text = fs::read_to_string(file).map_err(|source| CliError::Read { file: file.into(), source })?;
    let wrong = |line, message| CliError::Text { file: file.into(), line, message };
    let plan = ir::plan::parse::parse(&text).map_err(|e| wrong(e.line, e.to_string()))?;
    ir::plan::verify::verify(&plan).map_err(|e| wrong(1, e.to_string()))?;
    Ok(Some(plan))
}

fn about(side: &Side) -> Value {
    json!({
        "model": side.argument,
        "dtype": side.dtype().name(),
        "context": side.plan.context,
        "target": side.target,
    })
}

/// Sections of two artifacts that are not the same, by name.
fn sections(a: &Side, b: &Side) -> Vec<String> {
    let (Some(a), Some(b)) = (&a.artifact, &b.artifact) else { return Vec::new() };
    let digest = |artifact: &Artifact, name: &str| {
        artifact.sections().iter().find(|section| section.name == name).map(|section| section.digest)
    };
    let mut names: Vec<String> = Vec::new();
    for section in a.sections().iter().chain(b.sections()) {
        let name = &section.name;
        if !names.contains(name) && digest(a, name) != digest(b, name) {
            names.push(name.clone());
        }
    }
    names
}

fn files_line(names: &[String]) -> String {
    match names {
        [] => String::new(),
        names => format!("sections that differ in the files: {}\n", names.join(", ")),
    }
}

/// One line for plans that do not differ.
fn same(a: &Side, b: &Side, files: &[String], screen: &Screen) -> Result<(), CliError> {
    if screen.json {
        return print_json(&json!({ "same_plan": true, "sections": files, "a": about(a), "b": about(b) }));
    }
    let files = match files {
        [] => String::new(),
        names => format!("; the files differ in {}", names.join(", ")),
    };
    print(&format!("the same plan: {} and {}{files}\n", a.shown(), b.shown()))
}

/// Memory, launches, work and speed, side by side.
fn totals((a, predicted_a): (&Plan, &Predicted), (b, predicted_b): (&Plan, &Predicted)) -> String {
    let totals = [a.totals(), b.totals()];
    let costs = [a, b].map(|plan| plan.decode().map(|entry| entry.cost()).unwrap_or_default());
    let row = |name: &str, values: [f64; 2], shown: &dyn Fn(f64) -> String| {
        let [a, b] = values;
        let change = match a == b {
            true => "=".to_string(),
            false if a == 0.0 => String::new(),
            false => format!("{:+.1} %", 100.0 * (b / a - 1.0)),
        };
        vec![name.to_string(), shown(a), shown(b), change]
    };
    let memory = |x: f64| bytes(x as u64);
    let count = |x: f64| format!("{x}");
    let speed = |x: f64| format!("{} tok/s", short(x));
    let launches = [a, b].map(|plan| plan.launches_per_token().unwrap_or(0) as f64);
    let rows = [
        row("weights", totals.map(|t| t.weight_bytes as f64), &memory),
        row("KV cache", totals.map(|t| t.kv_cache_bytes as f64), &memory),
        row("workspace", totals.map(|t| t.workspace_bytes as f64), &memory),
        row("memory in all", totals.map(|t| t.total_bytes as f64), &memory),
        row("kernels", [a, b].map(|plan| plan.kernels.len() as f64), &count),
        row("launches a token", launches, &count),
        row("bytes a token", costs.map(|c| c.bytes as f64), &|x| format!("{}B", big(x))),
        row("work a token", costs.map(|c| c.flops as f64), &|x| format!("{}FLOP", big(x))),
        row("decode, at most", [predicted_a, predicted_b].map(|p| p.decode_tokens_per_s), &speed),
        row("prefill, at most", [predicted_a, predicted_b].map(|p| p.prefill_tokens_per_s), &speed),
    ];
    columns(&["", "A>", "B>", "change>"], &rows)
}

/// The kernels that differ; what is the same of one stands there once.
fn table(kernels: &Kernels) -> String {
    let count = |change| kernels.differ.iter().filter(|d| d.change == change).count();
    let head = format!(
        "kernels: {} changed, {} added, {} gone, {} the same\n",
        count(Change::Changed),
        count(Change::Added),
        count(Change::Gone),
        kernels.same
    );
    if kernels.differ.is_empty() {
        return head;
    }
    let rows: Vec<Vec<String>> = kernels.differ.iter().map(line).collect();
    head + &columns(&["step", "kernel", "", "launches>", "bytes>", "work>", "predicted>", "schedule"], &rows)
}

fn line(diff: &KernelDiff) -> Vec<String> {
    let cell = |of: &dyn Fn(&KernelCost) -> String| match (&diff.a, &diff.b) {
        (Some(a), Some(b)) if of(a) != of(b) => format!("{} -> {}", of(a), of(b)),
        (Some(one), _) | (None, Some(one)) => of(one),
        (None, None) => String::new(),
    };
    let change = match diff.change {
        Change::Added => "added",
        Change::Gone => "gone",
        Change::Changed => "",
    };
    vec![
        diff.entry.clone(),
        diff.name.clone(),
        change.to_string(),
        cell(&|c| c.launches.to_string()),
        cell(&|c| format!("{}B", big(c.bytes as f64))),
        cell(&|c| format!("{}FLOP", big(c.flops as f64))),
        cell(&|c| format!("{} us", short(1e6 * c.seconds))),
        cell(&|c| c.schedule.clone()),
    ]
}

/// Whether the results can be the same to the bit.
fn bits(a: &Side, b: &Side, kernels: &Kernels) -> String {
    let others: Vec<String> =
        kernels.differ.iter().filter(|d| d.other_bits).map(|d| format!("{} {}", d.entry, d.name)).collect();
    let what = match (a.dtype() == b.dtype(), others.is_empty()) {
        (false, _) => format!("another one: {} rounds otherwise than {}", b.dtype(), a.dtype()),
        (true, false) => format!("another one: sums run in another order in {}", others.join(", ")),
        (true, true) => "the same: where both have a kernel, it adds in one order".to_string(),
    };
    format!("\nnumeric class: {what}\n")
}
