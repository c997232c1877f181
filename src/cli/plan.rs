//! `plan`: what compiling would give, without doing it and without weights.

use super::ceilings::{self, Samples};
use super::error::CliError;
use super::screen::{
    Screen, bandwidth, big, bytes, columns, flops, pairs, parse_bytes, print, print_json, short,
};
use super::source::{BuildOptions, positive};
use clap::Args;
use ir::DType;
use ir::families::{self, GroupView};
use ir::graph::ValueId;
use ir::op::Op;
use ir::passes::fuse::is_view;
use ir::plan::{Give, Plan};
use llamac::compile::{Code, CompileError, lower};
use llamac::model::{Model, name_of};
use llamac::pipeline::Request;
use llamac::predict::{self, Ceilings, KernelCost};
use llamac::tune::table::Choices;
use runtime::manifest::Manifest;
use runtime::pool;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::fmt::Write;

#[derive(Args)]
#[command(after_help = "\
Speeds are bounds: each launch takes as long as its bytes or its FLOPs do at the ceilings of this machine. `bench` measures.

Example:
  llamac plan preset:llama-65b --target cpu:x86-64-v4 --dtype bf16
  llamac plan preset:tinyllama-1.1b --kernels --bandwidth 38GB --flops 300GB")]
pub struct Options {
    /// Model or artifact
    model: String,
    /// Machine to plan for [default: this one; an artifact's first]
    #[arg(long, value_name = "TARGET")]
    target: Option<String>,
    #[command(flatten)]
    build: BuildOptions,
    /// Show each kernel
    #[arg(long)]
    kernels: bool,
    /// Show what was fused, what not and why, and each schedule
    #[arg(long)]
    why: bool,
    #[command(flatten)]
    ceilings: CeilingOptions,
}

/// Ceilings to predict speeds with: measured here, or given.
#[derive(Args, Clone, Debug)]
pub struct CeilingOptions {
    /// Bytes a second that the machine reads, such as 38.2GB, instead of measuring
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    bandwidth: Option<f64>,
    /// FLOPs a second that the machine does, such as 1.5T, instead of measuring
    #[arg(long, value_name = "COUNT", value_parser = rate)]
    flops: Option<f64>,
    /// Threads of the measurement [default: physical cores that this process may use]
    #[arg(long, short, value_parser = positive, value_name = "N")]
    threads: Option<usize>,
}

/// Seconds that each ceiling is measured for.
const METER_SECONDS: f64 = 0.05;

impl CeilingOptions {
    /// Threads of the measurement.
    pub fn threads(&self) -> usize {
        self.threads.unwrap_or_else(pool::physical_cores)
    }

    /// Where the ceilings come from, in a word or two.
    pub fn source(&self) -> &'static str {
        match (self.bandwidth, self.flops) {
            (Some(_), Some(_)) => "given",
            (None, None) => "measured",
            _ => "in part given, in part measured",
        }
    }

    /// Samples of both ceilings: what is not given is measured, where that says something of the target.
    pub fn samples(&self, target: &str, dtype: DType, weight_bytes: usize) -> Result<Samples, CliError> {
        if target.starts_with("cuda:") && self.source() != "given" {
            let cure = "give the GPU's, as --bandwidth 3.35TB --flops 989T for an H100";
            return Err(CliError::Usage(format!(
                "--target {target}: a GPU's ceilings cannot be measured here; {cure}"
            )));
        }
        let mut samples = Samples::default();
        if self.bandwidth.is_none() || self.flops.is_none() {
            samples = ceilings::measure(self.threads(), dtype, weight_bytes, METER_SECONDS)?;
        }
        if let Some(given) = self.bandwidth {
            samples.read = vec![given];
        }
        if let Some(given) = self.flops {
            samples.dot = vec![given];
        }
        Ok(samples)
    }

    /// The ceilings for a user: `read 38.2 GB/s, dot 305 GFLOP/s (measured here now, 2 threads)`.
    pub fn shown(&self, samples: &Samples) -> String {
        let best = samples.best();
        let source = match self.source() {
            "given" => "given".to_string(),
            source => format!("{source} here now, {} threads", self.threads()),
        };
        format!("read {}, dot {} ({source})", bandwidth(best.read_bytes_per_s), flops(best.dot_flops))
    }
}

/// Reads a rate: a size, or a count with a decimal prefix.
fn rate(text: &str) -> Result<f64, String> {
    let text = text.trim_end_matches("/s");
    let sized = match text.strip_suffix(['k', 'M', 'G', 'T']) {
        Some(_) => format!("{text}B"),
        None => text.replace("FLOP", "B").replace("flop", "B"),
    };
    match parse_bytes(&sized) {
        Ok(0) => Err("expected a rate above zero".to_string()),
        Ok(rate) => Ok(rate as f64),
        Err(_) => Err("expected a rate such as 38.2GB or 1.5T".to_string()),
    }
}

/// What a model is lowered with, as far as the MODEL argument decides it.
pub struct Lowering {
    /// Config of the model.
    pub config: models::Config,
    /// Dtype.
    pub dtype: DType,
    /// Context.
    pub context: usize,
    /// Target.
    pub target: String,
    /// Schedules that were measured: an artifact's own, or those of `--tune-db`.
    pub choices: Choices,
}

impl Lowering {
    /// By the options, or as the artifact was compiled.
    pub fn of(
        model: &Model,
        build: &BuildOptions,
        target: Option<&str>,
        screen: &Screen,
    ) -> Result<Lowering, CliError> {
        let config = model.config()?;
        let mut dtype = build.dtype(model);
        let mut context = build.context(config.context);
        let mut own = "cpu:native".to_string();
        if let Model::Artifact(artifact) = model {
            let manifest: Manifest = artifact.manifest()?;
            dtype = build.dtype.or(DType::from_name(&manifest.dtype)).unwrap_or(dtype);
            context = build.ctx.unwrap_or(manifest.context);
            own = manifest.targets.first().map_or(own, |target| target.name.clone());
        }
        let choices = build.choices(screen)?.map_or_else(|| model.choices(), Ok)?;
        Ok(Lowering { config, dtype, context, target: target.map_or(own, str::to_string), choices })
    }

    /// What the passes take.
    pub fn request(&self) -> Request<'_> {
        let Lowering { config, dtype, context, target: _, choices } = self;
        let measured = (!choices.is_empty()).then_some(choices);
        Request { config, dtype: *dtype, context: *context, measured }
    }
}

pub fn plan(options: &Options, screen: &Screen) -> Result<(), CliError> {
    let model = Model::open(&options.model)?;
    let lowering = Lowering::of(&model, &options.build, options.target.as_deref(), screen)?;
    let code = lower(&lowering.request(), &lowering.target, false)?;
    let plan = &code.lowered.plan;
    let samples = options.ceilings.samples(&lowering.target, lowering.dtype, plan.weight_bytes())?;
    let predicted = Predicted::new(plan, &samples);
    let totals = plan.totals();
    let decode = plan.decode().map(|e| e.cost()).unwrap_or_default();

    if screen.json {
        let mut told = summary(plan, &predicted);
        let described = json!({
            "model": name_of(&options.model),
            "target": lowering.target,
            "dtype": lowering.dtype.name(),
            "context": lowering.context,
            "ceilings": {
                "read_bytes_per_s": samples.best().read_bytes_per_s,
                "dot_flops": samples.best().dot_flops,
                "source": options.ceilings.source(),
                "threads": options.ceilings.threads(),
            },
            "kernels": rows(plan, samples.best()),
        });
        told.extend(described.as_object().cloned().unwrap_or_default());
        if options.why {
            told.insert("why".into(), json!(decisions(&code, samples.best())?));
        }
        return print_json(&told);
    }

    let mut text = format!(
        "{} for {}, {}, context {}\n\n",
        name_of(&options.model),
        lowering.target,
        lowering.dtype,
        lowering.context
    );
    text += &pairs(&[
        ("weights", bytes(totals.weight_bytes as u64)),
        ("KV cache", bytes(totals.kv_cache_bytes as u64)),
        ("workspace", bytes(totals.workspace_bytes as u64)),
        ("total", bytes(totals.total_bytes as u64)),
    ]);
    text.push('\n');
    text += &pairs(&[
        (
            "launches",
            format!(
                "{} a token, {} kernels in all",
                plan.launches_per_token().unwrap_or(0),
                plan.kernels.len()
            ),
        ),
        (
            "work",
            format!(
                "{}FLOP and {}B a token, the cache half full",
                big(decode.flops as f64),
                big(decode.bytes as f64)
            ),
        ),
    ]);
    text.push('\n');
    text += &pairs(&[
        ("ceilings", options.ceilings.shown(&samples)),
        (
            "decode",
            predicted.shown(
                predicted.decode_tokens_per_s,
                predicted.least.decode_tokens_per_s,
                "the cache half full",
            ),
        ),
        (
            "prefill",
            predicted.shown(
                predicted.prefill_tokens_per_s,
                predicted.least.prefill_tokens_per_s,
                &format!("{} tokens", predicted.prompt_tokens),
            ),
        ),
    ]);
    if let Some(there) = runtime::map::total_bytes().filter(|&there| there < totals.total_bytes as u64) {
        let _ = writeln!(text, "\nThis machine has {} of memory: too little to run it.", bytes(there));
    }
    if options.kernels {
        text += &kernels_table(&rows(plan, samples.best()));
    }
    if options.why {
        text += &why(&decisions(&code, samples.best())?);
    }
    print(&text)
}

/// What a plan needs and how fast it can be, as `--json` has it.
pub fn summary(plan: &Plan, predicted: &Predicted) -> Map<String, Value> {
    let totals = plan.totals();
    let decode = plan.decode().map(|e| e.cost()).unwrap_or_default();
    let told = json!({
        "memory": {
            "weights": totals.weight_bytes,
            "kv_cache": totals.kv_cache_bytes,
            "workspace": totals.workspace_bytes,
            "total": totals.total_bytes,
        },
        "launches": plan.launches_per_token(),
        "flops_per_token": decode.flops,
        "bytes_per_token": decode.bytes,
        "predicted": predicted,
    });
    told.as_object().cloned().unwrap_or_default()
}

/// Tokens a second.
#[derive(Clone, Copy, Serialize)]
pub struct Speeds {
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
}

/// Bounds at the best samples of the ceilings, and at the least.
#[derive(Serialize)]
pub struct Predicted {
    /// Of a prompt into an empty cache.
    pub prefill_tokens_per_s: f64,
    /// With the cache half full.
    pub decode_tokens_per_s: f64,
    prompt_tokens: usize,
    least: Speeds,
}

impl Predicted {
    /// Predicts both speeds.
    pub fn new(plan: &Plan, samples: &Samples) -> Predicted {
        let prompt_tokens = plan.max_tokens(Give::Last);
        let (best, least) =
            (speeds(plan, samples.best(), prompt_tokens), speeds(plan, samples.least(), prompt_tokens));
        let Speeds { prefill_tokens_per_s, decode_tokens_per_s } = best;
        Predicted { prefill_tokens_per_s, decode_tokens_per_s, prompt_tokens, least }
    }

    fn shown(&self, best: f64, least: f64, of: &str) -> String {
        let range = match best - least > 0.005 * best {
            true => format!(", {} at the least of the ceilings' samples", short(least)),
            false => String::new(),
        };
        format!("at most {} tok/s predicted ({of}{range})", short(best))
    }
}

fn speeds(plan: &Plan, ceilings: Ceilings, prompt_tokens: usize) -> Speeds {
    let seconds: f64 =
        predict::prompt(plan, prompt_tokens).iter().map(|s| ceilings.step_seconds(plan, s)).sum();
    let decode = predict::decode(plan, plan.context / 2);
    Speeds {
        prefill_tokens_per_s: prompt_tokens as f64 / seconds,
        decode_tokens_per_s: decode.map_or(0.0, |step| 1.0 / ceilings.step_seconds(plan, &step)),
    }
}

/// Kernels of a decode step with the cache half full and of the longest prompt's step, in order.
fn rows(plan: &Plan, ceilings: Ceilings) -> Vec<KernelCost> {
    predict::kernels(plan, predict::decode_and_prompt(plan), ceilings)
}

fn kernels_table(rows: &[KernelCost]) -> String {
    let all = |entry: &str| rows.iter().filter(|r| r.entry == entry).map(|r| r.seconds).sum::<f64>();
    let line = |row: &KernelCost| {
        vec![
            row.entry.clone(),
            row.name.clone(),
            row.family.name().to_string(),
            row.launches.to_string(),
            format!("{}B", big(row.bytes as f64)),
            format!("{}FLOP", big(row.flops as f64)),
            format!("{} us", short(1e6 * row.seconds)),
            format!("{:.1} %", 100.0 * row.seconds / all(&row.entry)),
            row.source.to_string(),
            row.schedule.clone(),
        ]
    };
    let lines: Vec<Vec<String>> = rows.iter().map(line).collect();
    let heads = [
        "entry",
        "kernel",
        "family",
        "launches>",
        "bytes>",
        "work>",
        "predicted>",
        "share>",
        "chosen by",
        "schedule",
    ];
    format!("\n{}", columns(&heads, &lines))
}

/// What the passes decided about groups that are alike but for their layer.
#[derive(Debug, Serialize)]
struct Decision {
    /// Entry point.
    entry: String,
    /// The group, without its layer.
    name: String,
    family: &'static str,
    launches: usize,
    /// What one launch takes at least in the entry point's largest step.
    seconds: f64,
    fused: Fused,
    /// What was not fused, and why.
    remarks: Vec<String>,
    schedule: Option<Scheduled>,
}

/// What is in a group: counts of values that are computed (views are none), and names.
#[derive(Debug, Serialize)]
struct Fused {
    /// Before the products.
    before: usize,
    products: Vec<String>,
    /// After the products; of a group without one, all.
    after: usize,
    /// What is written to memory.
    stores: Vec<String>,
}

/// The schedule of a group, in the legal space.
#[derive(Debug, Serialize)]
struct Scheduled {
    text: String,
    /// Was it measured, and not chosen by the model of cost?
    measured: bool,
    /// By the family's model of cost, in a unit of its own.
    cost: Option<f64>,
    runner_up: Option<String>,
    runner_up_cost: Option<f64>,
    /// Schedules that there are.
    legal: usize,
    /// The part that decides the bits.
    numeric_class: String,
}

/// Every decision, in the order of first use; layers that are alike are one.
fn decisions(code: &Code, ceilings: Ceilings) -> Result<Vec<Decision>, CliError> {
    let lowered = &code.lowered;
    let mut all: Vec<Decision> = Vec::new();
    for (entry, planned) in lowered.entries.iter().zip(&lowered.plan.entries) {
        for (view, launch) in GroupView::all(&entry.graph).iter().zip(&planned.launches) {
            let group = &entry.graph.groups[view.id.0 as usize];
            let values = view.values.iter().flat_map(|&id| &entry.graph[id].remarks);
            let decision = Decision {
                entry: planned.name.clone(),
                name: without_layer(&group.name),
                family: group.family.name(),
                launches: 1,
                seconds: ceilings.seconds(launch.cost),
                fused: fused(view),
                remarks: values.chain(&group.remarks).map(|remark| without_layer(remark)).collect(),
                schedule: group.schedule.as_ref().map(|text| scheduled(code, view, text)).transpose()?,
            };
            let key = |d: &Decision| (d.entry.clone(), d.name.clone(), reasons(d));
            let of_this = key(&decision);
            match all.iter_mut().find(|d| key(d) == of_this) {
                Some(known) => known.launches += 1,
                None => all.push(decision),
            }
        }
    }
    Ok(all)
}

fn fused(view: &GroupView<'_>) -> Fused {
    let graph = view.graph;
    let is_product = |id: &ValueId| matches!(graph[*id].op, Op::Dot { .. });
    let name = |id: &ValueId| without_layer(&graph[*id].name);
    let computed: Vec<ValueId> = view.values.iter().copied().filter(|&id| !is_view(&graph[id].op)).collect();
    let products: Vec<String> = computed.iter().filter(|id| is_product(id)).map(name).collect();
    let before = computed.iter().position(is_product).unwrap_or(0);
    Fused {
        before,
        after: computed.len() - before - products.len(),
        products,
        stores: view.roots.iter().map(name).collect(),
    }
}

fn scheduled(code: &Code, view: &GroupView<'_>, text: &str) -> Result<Scheduled, CliError> {
    let legal = families::candidates(view, &code.backend.target()).map_err(CompileError::from)?;
    let cost = legal.iter().find(|c| c.schedule == text).and_then(|c| c.cost);
    let runner_up = legal.iter().find(|c| c.schedule != text);
    Ok(Scheduled {
        text: text.to_string(),
        measured: view.graph.groups[view.id.0 as usize].measured,
        cost,
        runner_up: runner_up.map(|c| c.schedule.clone()),
        runner_up_cost: runner_up.and_then(|c| c.cost),
        legal: legal.len(),
        // A schedule that was lowered can be read.
        numeric_class: families::numeric_class(view.family(), text).unwrap_or_default(),
    })
}

/// Decisions as text, a block an entry point; what was decided as in one above is not told again.
fn why(decisions: &[Decision]) -> String {
    let mut text = String::new();
    let mut told: Vec<(String, &str)> = Vec::new();
    for (number, decision) in decisions.iter().enumerate() {
        let Decision { entry, name, family, launches, seconds, .. } = decision;
        if number == 0 || decisions[number - 1].entry != *entry {
            let _ = write!(text, "\n{entry}, at most as long a launch as:\n");
        }
        let times = if *launches > 1 { format!(", {launches} times") } else { String::new() };
        let _ = write!(text, "  {name}  {family}{times}, {} us", short(1e6 * seconds));
        let reasons = reasons(decision);
        match told.iter().find(|(known, _)| *known == reasons) {
            Some((_, above)) => {
                let _ = writeln!(text, "  (as in {above})");
            }
            None => {
                let _ = write!(text, "\n{reasons}");
                told.push((reasons, entry));
            }
        }
    }
    text
}

fn reasons(decision: &Decision) -> String {
    let Decision { fused, remarks, schedule, .. } = decision;
    let Fused { before, products, after, stores } = fused;
    let mut lines = Vec::new();
    let names = |names: &[String]| names.join(", ");
    let ops = |count: &usize| format!("{count} op{}", if *count == 1 { "" } else { "s" });
    match products.is_empty() {
        true => lines.push(format!("fused: {}; stores {}", ops(after), names(stores))),
        false => lines.push(format!(
            "fused: {} before, product{} {}, {} after; stores {}",
            ops(before),
            if products.len() == 1 { "" } else { "s" },
            names(products),
            ops(after),
            names(stores)
        )),
    }
    lines.extend(remarks.iter().cloned());
    if let Some(Scheduled { text, measured, cost, runner_up, runner_up_cost, legal, numeric_class }) =
        schedule
    {
        let mut line = format!("schedule: {text}{}", if *measured { ", measured" } else { "" });
        if let Some(cost) = cost {
            line += &format!(", cost {}", big(*cost).trim_end());
        }
        if let Some(runner_up) = runner_up {
            let more = cost.zip(*runner_up_cost).map_or(", by preference".to_string(), |(cost, other)| {
                format!(", cost {} ({:+.1} %)", big(other).trim_end(), 100.0 * (other / cost - 1.0))
            });
            line += &format!("; runner-up {runner_up}{more}");
        }
        line += &format!("; {legal} legal");
        if !numeric_class.is_empty() {
            line += &format!("; {numeric_class} decides the bits");
        }
        lines.push(line);
    }
    lines.iter().map(|line| format!("      {line}\n")).collect()
}

/// Text without the numbers of layers: `l12.q` is `q`, as `l0.q` is.
fn without_layer(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('l') {
        let (before, from) = rest.split_at(at);
        let digits = from[1..].bytes().take_while(u8::is_ascii_digit).count();
        let begins_word = before.chars().last().is_none_or(|c| !c.is_alphanumeric() && c != '.' && c != '_');
        out.push_str(before);
        if begins_word && digits > 0 && from[1 + digits..].starts_with('.') {
            rest = &from[digits + 2..];
        } else {
            out.push('l');
            rest = &from[1..];
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_lose_their_numbers() {
        assert_eq!(without_layer("l12.q"), "q");
        assert_eq!(
            without_layer("%l0.h2 has two consumers: %l0.a, all l1 of it"),
            "%h2 has two consumers: %a, all l1 of it"
        );
    }

    #[test]
    fn rates() {
        assert_eq!(rate("38.2GB"), Ok(38.2e9));
        assert_eq!(rate("1.5T"), Ok(1.5e12));
        assert_eq!(rate("300GFLOP/s"), Ok(300e9));
        assert!(rate("0").is_err() && rate("fast").is_err());
    }
}
