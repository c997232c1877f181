//! `bench`: tokens a second, with the ceilings of the machine measured between the runs.
//!
//! A repeat is a prompt into an empty cache, then tokens one by one. The machine may be shared and its speed may change
//! from one moment to the next, so each ceiling is measured right before and right after what is held against it; a
//! share is the median of such pairs, a speed the median of the repeats. The tokens of every repeat and thread count
//! must be the same.

use super::ceilings::{self, Samples};
use super::error::CliError;
use super::screen::{Screen, bandwidth, columns, flops, print, print_json, short};
use super::source::{self, BuildOptions, Ready, positive};
use clap::Args;
use ir::DType;
use llamac::predict;
use runtime::cpu::Cpu;
use runtime::device::{Device, DeviceError, Program, Step, Want, feed};
use runtime::manifest::WEIGHTS;
use runtime::meter::{self, Meter};
use runtime::pool;
use serde::Serialize;
use serde_json::json;
use std::hint::black_box;
use std::time::Instant;

#[derive(Args)]
#[command(after_help = "\
Example:
  llamac bench preset:tinyllama-1.1b --dtype bf16 --threads 1,2
  llamac bench model.llamac -p 128 -n 64 --csv >> speeds.csv")]
pub struct Options {
    /// Model or artifact; a preset gets random weights
    model: String,
    /// Tokens of the prompt
    #[arg(short, long = "prompt", default_value_t = 512, value_name = "N", value_parser = positive_u32)]
    prompt: u32,
    /// Tokens to write
    #[arg(short = 'n', long = "max-tokens", default_value_t = 128, value_name = "N", value_parser = positive_u32)]
    max_tokens: u32,
    /// Numbers of threads to measure with [default: physical cores that this process may use]
    #[arg(long, short, value_delimiter = ',', value_parser = positive, value_name = "N,..")]
    threads: Vec<usize>,
    /// Repeats, of which the median counts
    #[arg(long, short, default_value_t = 3, value_name = "N", value_parser = positive_u32)]
    repeats: u32,
    /// Lines for a spreadsheet
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    #[command(flatten)]
    build: BuildOptions,
}

fn positive_u32(text: &str) -> Result<u32, String> {
    u32::try_from(positive(text)?).map_err(|_| "expected a smaller number".to_string())
}

/// Seed of a preset's weights, unless one is given.
const SEED: u64 = 1;
/// Seconds of a sample of a ceiling.
const METER_SECONDS: f64 = 0.05;
/// Seconds of decode steps between two samples.
const BLOCK_SECONDS: f64 = 0.1;
/// A share above 100 % by no more than this is noise of the two measurements.
const NOISE: f64 = 0.03;

/// Results of one number of threads.
#[derive(Debug, Serialize)]
struct Run {
    threads: usize,
    prefill: Prefill,
    decode: Decode,
    ceilings: Top,
    predicted: Predicted,
}

#[derive(Debug, Serialize)]
struct Prefill {
    tokens_per_s: f64,
    flops_per_s: f64,
    share_of_peak: f64,
}

#[derive(Debug, Serialize)]
struct Decode {
    tokens_per_s: f64,
    bytes_per_s: f64,
    share_of_bandwidth: f64,
}

#[derive(Debug, Serialize)]
struct Top {
    read_bytes_per_s: f64,
    dot_flops: f64,
}

#[derive(Debug, Serialize)]
struct Predicted {
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
}

pub fn bench(options: &Options, screen: &Screen) -> Result<(), CliError> {
    let mut build = options.build.clone();
    if options.model.starts_with("preset:") {
        build.random_weights.get_or_insert(SEED);
    }
    let ready = source::ready(&options.model, &build, screen)?;
    let (prompt, new) = (options.prompt as usize, options.max_tokens as usize);
    if prompt + new > ready.manifest.context {
        let context = ready.manifest.context;
        return Err(DeviceError::ContextFull { past: prompt, tokens: new, context }.into());
    }
    let dtype = DType::from_name(&ready.manifest.dtype).unwrap_or(DType::F32);
    let counts =
        if options.threads.is_empty() { vec![pool::physical_cores()] } else { options.threads.clone() };

    touch(ready.artifact.section(WEIGHTS).unwrap_or_default());

    let mut runs = Vec::new();
    let mut expected: Option<Vec<i32>> = None;
    for &threads in &counts {
        screen.detail(format!("{threads} threads, {} repeats", options.repeats));
        let mut bench = Bench {
            ready: &ready,
            program: Cpu { threads }.load(&ready.artifact)?,
            meter: Meter::new(threads),
            dtype,
            prompt,
            new,
        };
        let run = bench.run(threads, options.repeats, &mut expected)?;
        runs.push(run);
    }

    let peak = runtime::map::peak_rss_bytes();
    if screen.json {
        print_json(&json!({
            "model": ready.manifest.model,
            "dtype": ready.manifest.dtype,
            "context": ready.manifest.context,
            "prompt_tokens": prompt,
            "new_tokens": new,
            "repeats": options.repeats,
            "runs": runs,
            "planned_bytes": ready.plan.totals().total_bytes,
            "peak_rss_bytes": peak,
        }))?;
    } else if options.csv {
        print(&csv(&ready, &runs, prompt, new))?;
    } else {
        print(&table(&ready, &runs, prompt, new))?;
        if let Some(peak) = peak {
            let planned = super::screen::bytes(ready.plan.totals().total_bytes as u64);
            screen.detail(format!("memory: {} at most, {planned} planned", super::screen::bytes(peak)));
        }
    }
    above_ceiling(&runs)
}

/// A model with what measures it.
struct Bench<'a> {
    ready: &'a Ready,
    program: Box<dyn Program>,
    meter: Meter,
    dtype: DType,
    prompt: usize,
    new: usize,
}

impl Bench<'_> {
    fn run(
        &mut self,
        threads: usize,
        repeats: u32,
        expected: &mut Option<Vec<i32>>,
    ) -> Result<Run, CliError> {
        let plan = &self.ready.plan;
        let prompt = predict::prompt(plan, self.prompt);
        let prompt_flops: u64 = prompt.iter().map(|step| predict::step_cost(plan, step).flops).sum();
        // Halfway through the tokens written.
        let step = predict::decode(plan, self.prompt + self.new / 2);
        let step_bytes = step.map_or(0, |step| predict::step_cost(plan, &step).bytes);

        let mut samples = Samples::default();
        let (mut prefills, mut decodes) = (Vec::new(), Vec::new());
        // The first turn takes page faults, and shows the tokens.
        for turn in 0..=repeats {
            let measured = self.turn(&mut samples)?;
            match expected {
                Some(expected) if *expected != measured.tokens => {
                    let at = expected.iter().zip(&measured.tokens).take_while(|(a, b)| a == b).count();
                    return Err(CliError::Unequal { threads, at });
                }
                Some(_) => {}
                None => *expected = Some(measured.tokens),
            }
            if turn > 0 {
                prefills.push(measured.prefill);
                decodes.extend(measured.decode);
            }
        }
        let median = |pairs: &[Pair], value: &dyn Fn(&Pair) -> f64| {
            meter::median(&pairs.iter().map(value).collect::<Vec<f64>>())
        };
        let seconds = |pair: &Pair| pair.seconds;
        let (prefill, decode) = (median(&prefills, &seconds), median(&decodes, &seconds));
        let share = |pairs: &[Pair], work: u64| median(pairs, &|p| work as f64 / p.seconds / p.ceiling);
        let top = samples.median();
        let prompt_seconds: f64 = prompt.iter().map(|step| top.step_seconds(plan, step)).sum();
        Ok(Run {
            threads,
            prefill: Prefill {
                tokens_per_s: self.prompt as f64 / prefill,
                flops_per_s: prompt_flops as f64 / prefill,
                share_of_peak: share(&prefills, prompt_flops),
            },
            decode: Decode {
                tokens_per_s: 1.0 / decode,
                bytes_per_s: step_bytes as f64 / decode,
                share_of_bandwidth: share(&decodes, step_bytes),
            },
            ceilings: Top { read_bytes_per_s: top.read_bytes_per_s, dot_flops: top.dot_flops },
            predicted: Predicted {
                prefill_tokens_per_s: self.prompt as f64 / prompt_seconds,
                decode_tokens_per_s: step.map_or(0.0, |step| 1.0 / top.step_seconds(plan, &step)),
            },
        })
    }

    /// A prompt, and tokens after it, with samples of the ceilings around and between.
    fn turn(&mut self, samples: &mut Samples) -> Result<Turn, CliError> {
        let vocab = self.program.vocab() as i32;
        let prompt: Vec<i32> = (0..self.prompt as i32).map(|i| (i * 7 + 1) % vocab).collect();
        let mut state = self.program.state()?;

        let before = self.dot(samples);
        let start = Instant::now();
        let mut token = feed(&mut *self.program, &prompt, None, Want::Token, &mut state)?.token;
        let seconds = start.elapsed().as_secs_f64();
        let prefill = Pair { seconds, ceiling: (before + self.dot(samples)) / 2.0 };

        let mut tokens = Vec::new();
        let mut decode = Vec::new();
        let mut before = self.read(samples);
        while tokens.len() < self.new {
            let (start, first) = (Instant::now(), tokens.len());
            while tokens.len() < self.new && start.elapsed().as_secs_f64() < BLOCK_SECONDS {
                let last = token.unwrap_or_default();
                tokens.push(last);
                let step = Step { tokens: &[last], want: Want::Token };
                token = self.program.run(&step, &mut state)?.token;
            }
            let seconds = start.elapsed().as_secs_f64() / (tokens.len() - first) as f64;
            let after = self.read(samples);
            decode.push(Pair { seconds, ceiling: (before + after) / 2.0 });
            before = after;
        }
        tokens.extend(token);
        Ok(Turn { prefill, decode, tokens })
    }

    /// FLOPs a second of dot products.
    fn dot(&mut self, samples: &mut Samples) -> f64 {
        let new = self.meter.dot(ceilings::dot_of(self.dtype), METER_SECONDS);
        samples.dot.extend(&new);
        meter::median(&new)
    }

    /// Bytes a second of reading the weights where they lie.
    fn read(&mut self, samples: &mut Samples) -> f64 {
        let new = self.meter.read(self.ready.artifact.section(WEIGHTS).unwrap_or_default(), METER_SECONDS);
        samples.read.extend(&new);
        meter::median(&new)
    }
}

/// A time and the ceiling around it.
struct Pair {
    /// Of a prompt, or of one decode step.
    seconds: f64,
    /// FLOPs or bytes a second.
    ceiling: f64,
}

struct Turn {
    prefill: Pair,
    /// One a block of steps.
    decode: Vec<Pair>,
    tokens: Vec<i32>,
}

/// Reads every page once.
fn touch(bytes: &[u8]) {
    black_box(bytes.iter().step_by(4096).fold(0, |or, byte| or | byte));
}

/// A speed above its ceiling says that the ceiling is wrong.
fn above_ceiling(runs: &[Run]) -> Result<(), CliError> {
    for run in runs {
        for (what, share) in
            [("prefill", run.prefill.share_of_peak), ("decode", run.decode.share_of_bandwidth)]
        {
            if share > 1.0 + NOISE {
                let what = format!("{what} with {} threads", run.threads);
                return Err(CliError::AboveCeiling { what, found: 100.0 * share });
            }
        }
    }
    Ok(())
}

fn table(ready: &Ready, runs: &[Run], prompt: usize, new: usize) -> String {
    let mut rows = Vec::new();
    for run in runs {
        let row = |what: String, speed: f64, used: String, share: f64, top: String, predicted: f64| {
            let share = format!("{:.1} %", 100.0 * share);
            let predicted = format!("{} tok/s", short(predicted));
            vec![
                run.threads.to_string(),
                what,
                format!("{} tok/s", short(speed)),
                used,
                share,
                top,
                predicted,
            ]
        };
        let Run { threads: _, prefill, decode, ceilings, predicted } = run;
        rows.push(row(
            format!("prefill {prompt}"),
            prefill.tokens_per_s,
            flops(prefill.flops_per_s),
            prefill.share_of_peak,
            flops(ceilings.dot_flops),
            predicted.prefill_tokens_per_s,
        ));
        rows.push(row(
            format!("decode {new}"),
            decode.tokens_per_s,
            bandwidth(decode.bytes_per_s),
            decode.share_of_bandwidth,
            bandwidth(ceilings.read_bytes_per_s),
            predicted.decode_tokens_per_s,
        ));
    }
    let heads = ["threads>", "tokens", "speed>", "used>", "share>", "ceiling>", "predicted>"];
    format!("{}, {}\n\n{}", ready.manifest.model, ready.manifest.dtype, columns(&heads, &rows))
}

fn csv(ready: &Ready, runs: &[Run], prompt: usize, new: usize) -> String {
    let mut text = String::from(
        "model,dtype,threads,prompt_tokens,new_tokens,prefill_tokens_per_s,prefill_share_of_peak,decode_tokens_per_s,\
         decode_share_of_bandwidth,read_bytes_per_s,dot_flops,predicted_prefill_tokens_per_s,predicted_decode_tokens_per_s\n",
    );
    for Run { threads, prefill, decode, ceilings, predicted } in runs {
        let quoted = format!("\"{}\"", ready.manifest.model.replace('"', "\"\""));
        text += &format!(
            "{quoted},{},{threads},{prompt},{new},{},{},{},{},{},{},{},{}\n",
            ready.manifest.dtype,
            prefill.tokens_per_s,
            prefill.share_of_peak,
            decode.tokens_per_s,
            decode.share_of_bandwidth,
            ceilings.read_bytes_per_s,
            ceilings.dot_flops,
            predicted.prefill_tokens_per_s,
            predicted.decode_tokens_per_s,
        );
    }
    text
}
