//! `profile`: time, bytes, FLOPs and share of the limit of each kernel of a step.
//!
//! [`page`] is the same as one HTML page, with the roofline.

mod page;

use super::ceilings::dot_of;
use super::device::DeviceOptions;
use super::error::CliError;
use super::screen::{Screen, bandwidth, big, bytes, columns, flops, print, print_json, short};
use super::source::{self, BuildOptions, positive};
use clap::Args;
use ir::DType;
use llamac::predict::Ceilings;
use llamac::profile::{self, Phase, Profile};
use runtime::cpu::Cpu;
use runtime::meter::{self, Meter};
use runtime::whole_file;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};

#[derive(Args)]
#[command(after_help = "\
Each step is run whole and launch by launch. The page opens in any browser, the trace at https://ui.perfetto.dev.

Example:
  llamac profile preset:tinyllama-1.1b --dtype bf16 --html profile.html
  llamac compile MODEL -o model.llamac --taps; llamac profile model.llamac --trace trace.json")]
pub struct Options {
    /// Model, or artifact compiled with --taps; a preset gets random weights
    model: String,
    /// Tokens of the prompt
    #[arg(short, long = "prompt", default_value_t = 128, value_name = "N", value_parser = positive)]
    prompt: usize,
    /// Decode steps after it
    #[arg(short = 'n', long = "max-tokens", default_value_t = 32, value_name = "N", value_parser = positive)]
    max_tokens: usize,
    /// Prompts with their steps; medians are over all of them
    #[arg(long, short, default_value_t = 3, value_name = "N", value_parser = positive)]
    repeats: usize,
    /// Write every launch of the last repeat, a lane a worker, for Perfetto
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Write one page with roofline and tables
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    build: BuildOptions,
}

/// Seed of a preset's weights, unless one is given.
const SEED: u64 = 1;
/// Seconds of a sample of a ceiling.
const METER_SECONDS: f64 = 0.05;

pub fn profile(options: &Options, screen: &Screen) -> Result<(), CliError> {
    if options.device.device != "cpu" {
        return Err(CliError::NoDevice {
            name: format!("{} with taps", options.device.device),
            known: "cpu",
        });
    }
    let mut build = BuildOptions { taps: true, ..options.build.clone() };
    if options.model.starts_with("preset:") {
        build.random_weights.get_or_insert(SEED);
    }
    let ready = source::ready(&options.model, &build, screen)?;
    let threads = options.device.threads();
    let mut program = Cpu { threads }.open(&ready.artifact)?;
    let weights = ready.artifact.section(&ready.target.weights).unwrap_or_default();
    let dot = dot_of(DType::from_name(&ready.manifest.dtype).unwrap_or(DType::F32));
    let mut meter = Meter::new(threads);
    let mut ceilings = || Ceilings {
        read_bytes_per_s: meter::median(&meter.read(weights, METER_SECONDS)),
        dot_flops: meter::median(&meter.dot(dot, METER_SECONDS)),
    };
    let run = profile::Options { prompt: options.prompt, new: options.max_tokens, turns: options.repeats };
    let measured = profile::profile(&mut program, &run, &mut ceilings)?;

    let title = format!("{}, {}, {}", ready.manifest.model, ready.manifest.dtype, counted(threads, "thread"));
    if let Some(file) = &options.trace {
        write(file, &profile::trace(&ready.plan, &ready.manifest.model, &measured.trace).to_string())?;
    }
    if let Some(file) = &options.html {
        write(file, &page::page(&title, &measured))?;
    }
    if screen.json {
        return print_json(&json!({
            "model": ready.manifest.model,
            "dtype": ready.manifest.dtype,
            "context": ready.manifest.context,
            "threads": threads,
            "prefill": measured.prefill,
            "decode": measured.decode,
        }));
    }
    let Profile { prefill, decode, trace: _ } = &measured;
    print(&format!("{title}\n\n{}\n{}", table("prefill", prefill), table("decode", decode)))
}

fn write(file: &Path, text: &str) -> Result<(), CliError> {
    Ok(whole_file::write(file, text.len() as u64, |path| fs::write(path, text))?)
}

/// A phase in one line.
fn summary(name: &str, phase: &Phase) -> String {
    let Phase { tokens, past, steps, seconds, .. } = phase;
    let tokens = counted(*tokens, "token");
    format!("{name}, {tokens} after {past}: {}, median of {steps}", time(*seconds))
}

/// `1 token`, `2 tokens`.
fn counted(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

/// What the machine could do meanwhile.
fn roofs(phase: &Phase) -> String {
    format!("{}, {}", bandwidth(phase.ceilings.read_bytes_per_s), flops(phase.ceilings.dot_flops))
}

/// What the measurement cost and what it leaves out.
fn account(phase: &Phase) -> String {
    format!(
        "The kernels take {}, {} of the step run whole; run launch by launch it takes {} ({:+.1} %).",
        time(phase.kernel_seconds),
        percent(phase.sum_share),
        time(phase.tapped_seconds),
        100.0 * (phase.tapped_seconds / phase.seconds - 1.0),
    )
}

/// Heads of [`rows`].
const HEADS: [&str; 11] = [
    "#>",
    "kernel",
    "family",
    "launches>",
    "time>",
    "share>",
    "bytes>",
    "FLOPs>",
    "limit",
    "of limit>",
    "busy>",
];

/// A line a kernel.
fn rows(phase: &Phase) -> Vec<Vec<String>> {
    let row = |(number, kernel): (usize, &profile::KernelTime)| {
        vec![
            (number + 1).to_string(),
            kernel.name.clone(),
            kernel.family.name().to_string(),
            kernel.launches.to_string(),
            time(kernel.seconds),
            percent(kernel.share),
            bytes(kernel.bytes),
            big(kernel.flops as f64).trim_end().to_string(),
            kernel.limit.name().to_string(),
            percent(kernel.share_of_limit),
            percent(kernel.busy),
        ]
    };
    phase.kernels.iter().enumerate().map(row).collect()
}

fn table(name: &str, phase: &Phase) -> String {
    let table = columns(&HEADS, &rows(phase));
    format!("{}; ceilings {}\n\n{table}\n{}\n", summary(name, phase), roofs(phase), account(phase))
}

/// `12.3 ms`, `45.6 us`.
fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{} s", short(s)),
        s if s >= 1e-3 => format!("{} ms", short(s * 1e3)),
        s => format!("{} us", short(s * 1e6)),
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}
