//! `plan`: what compiling would give, without doing it and without weights.

use super::ceilings::{self, Samples};
use super::error::CliError;
use super::screen::{
    Screen, bandwidth, big, bytes, columns, flops, pairs, parse_bytes, print, print_json, short,
};
use super::source::{BuildOptions, positive};
use clap::Args;
use ir::DType;
use ir::plan::{Cost, Plan};
use llamac::compile::{Code, lower};
use llamac::model::{Model, name_of};
use llamac::pipeline::{CHUNK, Request};
use llamac::predict::{self, Ceilings, Step};
use runtime::manifest::Manifest;
use runtime::pool;
use serde::Serialize;
use serde_json::json;
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
}

impl Lowering {
    /// By the options, or as the artifact was compiled.
    pub fn of(model: &Model, build: &BuildOptions, target: Option<&str>) -> Result<Lowering, CliError> {
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
        Ok(Lowering { config, dtype, context, target: target.map_or(own, str::to_string) })
    }

    /// What the passes take.
    pub fn request(&self) -> Request<'_> {
        Request { config: &self.config, dtype: self.dtype, context: self.context }
    }
}

pub fn plan(options: &Options, screen: &Screen) -> Result<(), CliError> {
    let model = Model::open(&options.model)?;
    let lowering = Lowering::of(&model, &options.build, options.target.as_deref())?;
    let code = lower(&lowering.request(), &lowering.target)?;
    let plan = &code.lowered.plan;
    let threads = options.threads.unwrap_or_else(pool::physical_cores);
    let samples = samples(options, lowering.dtype, plan, threads)?;
    let predicted = Predicted::new(plan, &samples);
    let totals = plan.totals();
    let decode = plan.decode().map(|e| e.cost()).unwrap_or_default();

    if screen.json {
        return print_json(&json!({
            "model": name_of(&options.model),
            "target": lowering.target,
            "dtype": lowering.dtype.name(),
            "context": lowering.context,
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
            "ceilings": {
                "read_bytes_per_s": samples.best().read_bytes_per_s,
                "dot_flops": samples.best().dot_flops,
                "source": source(options),
                "threads": threads,
            },
            "kernels": rows(plan, samples.best()),
        }));
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
    let best = samples.best();
    let measured = format!(
        "read {}, dot {} ({})",
        bandwidth(best.read_bytes_per_s),
        flops(best.dot_flops),
        match source(options) {
            "given" => "given".to_string(),
            source => format!("{source} here now, {threads} threads"),
        }
    );
    text += &pairs(&[
        ("ceilings", measured),
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
        text += &kernels_table(&rows(plan, best));
    }
    if options.why {
        text += &why(&code);
    }
    print(&text)
}

fn source(options: &Options) -> &'static str {
    match (options.bandwidth, options.flops) {
        (Some(_), Some(_)) => "given",
        (None, None) => "measured",
        _ => "in part given, in part measured",
    }
}

fn samples(options: &Options, dtype: DType, plan: &Plan, threads: usize) -> Result<Samples, CliError> {
    let mut samples = Samples::default();
    if options.bandwidth.is_none() || options.flops.is_none() {
        samples = ceilings::measure(threads, dtype, plan.weight_bytes(), METER_SECONDS)?;
    }
    if let Some(given) = options.bandwidth {
        samples.read = vec![given];
    }
    if let Some(given) = options.flops {
        samples.dot = vec![given];
    }
    Ok(samples)
}

#[derive(Clone, Copy, Serialize)]
struct Speeds {
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
}

/// Bounds at the best samples of the ceilings, and at the least.
#[derive(Serialize)]
struct Predicted {
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    prompt_tokens: usize,
    least: Speeds,
}

impl Predicted {
    fn new(plan: &Plan, samples: &Samples) -> Predicted {
        let prompt_tokens = CHUNK.min(plan.context);
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

/// A kernel in a step.
#[derive(Serialize)]
struct Row {
    name: String,
    /// The step: `decode` for one token, `prefill` for a whole chunk.
    entry: String,
    family: &'static str,
    schedule: String,
    launches: usize,
    bytes: u64,
    flops: u64,
    seconds: f64,
    source: &'static str,
}

/// Kernels of a decode step with the cache half full and of a chunk's prefill, in order.
fn rows(plan: &Plan, ceilings: Ceilings) -> Vec<Row> {
    let steps = predict::decode(plan, plan.context / 2)
        .into_iter()
        .chain(predict::prompt(plan, CHUNK.min(plan.context)));
    let mut rows: Vec<Row> = Vec::new();
    for Step { entry, tokens, past } in steps {
        for launch in &entry.launches {
            let Cost { flops, bytes } = predict::launch_cost(plan, &Step { entry, tokens, past }, launch);
            let seconds = ceilings.seconds(Cost { flops, bytes });
            let kernel = &plan.kernels[launch.kernel];
            let known = rows.iter_mut().find(|row| row.name == kernel.name && row.entry == entry.name);
            if let Some(row) = known {
                row.launches += 1;
                row.bytes += bytes;
                row.flops += flops;
                row.seconds += seconds;
                continue;
            }
            rows.push(Row {
                name: kernel.name.clone(),
                entry: entry.name.clone(),
                family: kernel.family.name(),
                schedule: kernel.schedule.clone(),
                launches: 1,
                bytes,
                flops,
                seconds,
                source: "predicted",
            });
        }
    }
    rows
}

fn kernels_table(rows: &[Row]) -> String {
    let all = |entry: &str| rows.iter().filter(|r| r.entry == entry).map(|r| r.seconds).sum::<f64>();
    let line = |row: &Row| {
        vec![
            row.entry.clone(),
            row.name.clone(),
            row.family.to_string(),
            row.launches.to_string(),
            format!("{}B", big(row.bytes as f64)),
            format!("{}FLOP", big(row.flops as f64)),
            format!("{} us", short(1e6 * row.seconds)),
            format!("{:.1} %", 100.0 * row.seconds / all(&row.entry)),
            row.schedule.clone(),
        ]
    };
    let lines: Vec<Vec<String>> = rows.iter().map(line).collect();
    let heads =
        ["entry", "kernel", "family", "launches>", "bytes>", "work>", "predicted>", "share>", "schedule"];
    format!("\n{}", columns(&heads, &lines))
}

/// Groups with their schedules and what passes remarked, layers that are alike told once.
fn why(code: &Code) -> String {
    let mut text = String::new();
    for entry in &code.lowered.entries {
        let graph = &entry.graph;
        let _ = write!(text, "\n{}:\n", graph.name);
        let mut told: Vec<(String, usize)> = Vec::new();
        for (number, group) in graph.groups.iter().enumerate() {
            let values = graph.ids().filter(|&id| graph[id].group.is_some_and(|g| g.0 as usize == number));
            let remarks = values.flat_map(|id| &graph[id].remarks).chain(&group.remarks);
            let mut note = format!("  {}  {}", without_layer(&group.name), group.family.name());
            if let Some(schedule) = &group.schedule {
                let _ = write!(note, ", {schedule}");
            }
            for remark in remarks {
                let _ = write!(note, "\n      {}", without_layer(remark));
            }
            match told.iter_mut().find(|(n, _)| *n == note) {
                Some((_, times)) => *times += 1,
                None => told.push((note, 1)),
            }
        }
        for (note, times) in told {
            let (head, rest) =
                note.split_once('\n').map_or((&*note, String::new()), |(h, r)| (h, format!("\n{r}")));
            let times = if times > 1 { format!("  ({times} times)") } else { String::new() };
            let _ = writeln!(text, "{head}{times}{rest}");
        }
    }
    text
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
