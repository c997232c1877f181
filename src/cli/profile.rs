//! `profile`: time, bytes, FLOPs and share of the limit of each kernel of a step.
//!
//! [`page`] is the same as one HTML page, with the roofline; `machine_code` what is argued of a GPU that is not here.

#[cfg(feature = "compiler")]
mod machine_code;
mod page;

use super::ceilings::dot_of;
use super::device::{DeviceOptions, Machine};
use super::error::CliError;
use super::screen::{Screen, bandwidth, big, bytes, columns, flops, print, print_json, short};
use super::source::{self, BuildOptions, Ready, positive};
use clap::Args;
use ir::DType;
use llamac::judge::Shares;
use llamac::predict::Ceilings;
use llamac::profile::{self, Phase, Profile};
use llamac::sampled::{self, Sampled};
use runtime::conformance;
use runtime::cpu::Cpu;
use runtime::cuda::Cuda;
use runtime::device::{DeviceError, Tapped};
use runtime::emulator::Sums;
use runtime::gpu_meter;
use runtime::meter::{self, Meter};
use runtime::ptx_emulator::PtxEmulator;
use runtime::whole_file;
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

#[derive(Args)]
#[command(after_help = "\
Each step is run whole and launch by launch. The page opens in any browser, the trace at https://ui.perfetto.dev.

Example:
  llamac profile preset:tinyllama-1.1b --dtype bf16 --html profile.html
  llamac compile MODEL -o model.llamac --taps; llamac profile model.llamac --trace trace.json
  llamac profile --static preset:llama3-8b --target cuda:sm_80 --gpu h100")]
pub struct Options {
    /// Model, or artifact compiled with --taps; a preset gets random weights, and so does on a GPU what has none
    model: String,
    /// Tokens of the prompt [default: 128; with --static the most that are one step]
    #[arg(short, long = "prompt", value_name = "N", value_parser = positive)]
    prompt: Option<usize>,
    /// Decode steps after it
    #[arg(short = 'n', long = "max-tokens", default_value_t = 32, value_name = "N", value_parser = positive)]
    max_tokens: usize,
    /// Prompts with their steps; medians are over all of them
    #[arg(long, short, default_value_t = 3, value_name = "N", value_parser = positive)]
    repeats: usize,
    /// After that, judge so many rows of what each kernel stores: 0 for none
    #[arg(long, default_value_t = 0, value_name = "N")]
    check_rows: usize,
    /// Write every launch of the last repeat, a lane a worker, for Perfetto
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Write one page with roofline and tables
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Run nothing: argue the speed on a GPU from the machine code of its kernels, which ptxas and nvdisasm give
    #[arg(
        long = "static",
        conflicts_with_all = ["max_tokens", "repeats", "check_rows", "trace", "html", "device", "threads", "random_weights"]
    )]
    is_static: bool,
    /// What to compile for [default: cuda:sm_80]
    #[arg(long, value_name = "TARGET", requires = "is_static")]
    target: Option<String>,
    /// GPU to argue of: a100, h100, h200 or rtx4090 [default: the one that the target is meant for]
    #[arg(long, value_name = "GPU", requires = "is_static")]
    gpu: Option<String>,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    build: BuildOptions,
}

/// Tokens of a prompt that is run, unless more or less are asked for.
const PROMPT: usize = 128;
/// Seed of a preset's weights, unless one is given.
const SEED: u64 = 1;
/// Seconds of a sample of a ceiling.
const METER_SECONDS: f64 = 0.05;

/// Measures the ceilings of where the program runs.
type Measure = Box<dyn FnMut() -> Result<Ceilings, DeviceError>>;

pub fn profile(options: &Options, screen: &Screen) -> Result<(), CliError> {
    if options.is_static {
        #[cfg(feature = "compiler")]
        return machine_code::argue(options, screen);
        #[cfg(not(feature = "compiler"))]
        return Err(CliError::NoCompiler { what: "profile --static".into() });
    }
    let machine = options.device.machine()?;
    // A GPU makes weights that an artifact has not.
    let weightless = !matches!(machine, Machine::Cpu);
    let mut build = BuildOptions { taps: true, machine, weightless, ..options.build.clone() };
    if options.model.starts_with("preset:") {
        build.random_weights.get_or_insert(SEED);
    }
    let ready = source::ready(&options.model, &build, screen)?;
    let seed = (!ready.manifest.weights).then_some(build.random_weights.unwrap_or(SEED));
    let (mut program, mut measure, place) = on(&options.device, &ready, seed)?;
    let mut failed = None;
    let mut ceilings = || {
        measure().unwrap_or_else(|error| {
            failed.get_or_insert(error);
            Ceilings { read_bytes_per_s: f64::NAN, dot_flops: f64::NAN }
        })
    };
    let prompt = options.prompt.unwrap_or(PROMPT);
    let run = profile::Options { prompt, new: options.max_tokens, turns: options.repeats };
    let measured = profile::profile(&mut *program, &run, &mut ceilings)?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    let from = (&ready.artifact, &ready.target);
    let sampled = match options.check_rows {
        0 => None,
        rows => Some(sampled::rows(&mut *program, from, prompt, rows)?),
    };

    let title = format!("{}, {}, {place}", ready.manifest.model, ready.manifest.dtype);
    if let Some(file) = &options.trace {
        write(file, &profile::trace(&ready.plan, &ready.manifest.model, &measured.trace).to_string())?;
    }
    if let Some(file) = &options.html {
        write(file, &page::page(&title, &measured))?;
    }
    if screen.json {
        let threads = matches!(machine, Machine::Cpu).then(|| options.device.threads());
        print_json(&json!({
            "model": ready.manifest.model,
            "dtype": ready.manifest.dtype,
            "context": ready.manifest.context,
            "device": options.device.device,
            "threads": threads,
            "weights_seed": seed,
            "prefill": measured.prefill,
            "decode": measured.decode,
            "checked": sampled.as_ref().map(checked),
        }))?;
    } else {
        let Profile { prefill, decode, trace: _ } = &measured;
        print(&format!("{title}\n\n{}\n{}", table("prefill", prefill), table("decode", decode)))?;
        sampled.iter().try_for_each(|sampled| print(&judged(sampled)))?;
    }
    match sampled.map_or(0, |sampled| sampled.wrong.len()) {
        0 => Ok(()),
        wrong => Err(CliError::Wrong { wrong }),
    }
}

/// The program on the device that is named, what measures that, and its name.
fn on(
    device: &DeviceOptions,
    ready: &Ready,
    seed: Option<u64>,
) -> Result<(Box<dyn Tapped>, Measure, String), CliError> {
    let of = |[read_bytes_per_s, dot_flops]: [f64; 2]| Ceilings { read_bytes_per_s, dot_flops };
    if let Some(number) = device.cuda() {
        let cuda = Cuda::new(number)?;
        let program = match seed {
            Some(seed) => cuda.open_filled(&ready.artifact, seed)?,
            None => cuda.open(&ready.artifact)?,
        };
        let (place, gpu) = (cuda.gpu().to_string(), conformance::Machine::Gpu(cuda.context()?));
        return Ok((Box::new(program), Box::new(move || gpu_meter::ceilings(&gpu).map(of)), place));
    }
    if let Some(sm) = device.emulated() {
        let emulator = PtxEmulator { sm, seed: 0, sums: Sums::default() };
        let program = match seed {
            Some(seed) => emulator.open_filled(&ready.artifact, seed)?,
            None => emulator.open(&ready.artifact)?,
        };
        let gpu = conformance::Machine::Emulator(emulator.options());
        let place = format!("ptx-emulator:{}", sm.name());
        return Ok((Box::new(program), Box::new(move || gpu_meter::ceilings(&gpu).map(of)), place));
    }
    if device.device != "cpu" {
        let (name, known) = (format!("{} with taps", device.device), "cpu, cuda, cuda:N, ptx-emulator:SM");
        return Err(CliError::NoDevice { name, known });
    }
    let threads = device.threads();
    let program = Cpu { threads }.open(&ready.artifact)?;
    let (artifact, section) = (ready.artifact.clone(), ready.target.weights.clone());
    let dot = dot_of(DType::from_name(&ready.manifest.dtype).unwrap_or(DType::F32));
    let mut meter = Meter::new(threads);
    let measure = move || {
        Ok(Ceilings {
            read_bytes_per_s: meter::median(
                &meter.read(artifact.section(&section).unwrap_or_default(), METER_SECONDS),
            ),
            dot_flops: meter::median(&meter.dot(dot, METER_SECONDS)),
        })
    };
    Ok((Box::new(program), Box::new(measure), counted(threads, "thread")))
}

/// What rows came to, for scripts.
fn checked(sampled: &Sampled) -> serde_json::Value {
    let shares = |shares: &Shares| json!({ "hard": shares.hard, "statistical": shares.typical });
    let kernels: BTreeMap<&String, _> = sampled.kernels.iter().map(|(name, of)| (name, shares(of))).collect();
    json!({ "rows": sampled.rows, "kernels": kernels, "left_out": sampled.left_out, "wrong": sampled.wrong })
}

/// The same in a few lines.
fn judged(sampled: &Sampled) -> String {
    let worst = sampled.kernels.values().fold(Shares::default(), |worst, &of| worst.worst(of));
    let wrong: String = sampled.wrong.iter().map(|wrong| format!("wrong: {wrong}\n")).collect();
    format!(
        "\n{wrong}{} of {} judged, {} wrong; {:.3} of the hard bound, {:.3} of the statistical one\n",
        counted(sampled.rows, "row"),
        counted(sampled.kernels.len(), "kernel"),
        sampled.wrong.len(),
        worst.hard,
        worst.typical
    )
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
