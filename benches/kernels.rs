//! Every kernel of a model alone, as a share of what limits it: the ceiling is measured in turn with it.
//!
//! `cargo bench --bench kernels -- [preset] [f32|bf16] [tokens] [--schedules PART] [--filter NAME] [--threads N]`
//!
//! `--schedules` tries those of each kernel's legal space whose text has `PART` in it, and not the default alone.

use codegen::cpu::Level;
use ir::DType;
use ir::families::{self, GroupView};
use llamac::measure::alone::Alone;
use llamac::pipeline::{Request, lower};
use llamac::predict::Ceilings;
use runtime::map::OwnedBuf;
use runtime::meter::{self, Dot, Meter};

/// Seconds for which a kernel or a ceiling is measured at a time, and how often in turn.
const SECONDS: f64 = 0.03;
const TURNS: usize = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut free = Vec::new();
    let (mut part, mut filter, mut threads) = (None, String::new(), runtime::pool::physical_cores());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--bench" => {} // cargo says so
            "--schedules" => part = Some(args.next().ok_or("--schedules PART")?),
            "--filter" => filter = args.next().ok_or("--filter NAME")?,
            "--threads" => threads = args.next().ok_or("--threads N")?.parse()?,
            _ => free.push(arg),
        }
    }
    let preset = free.first().map_or("tinyllama-1.1b", String::as_str);
    let dtype = DType::from_name(free.get(1).map_or("bf16", String::as_str)).ok_or("a dtype")?;
    let tokens: usize = free.get(2).map_or(Ok(512), |t| t.parse())?;

    let config = models::preset(preset).ok_or("no such preset")?;
    let request = Request { config: &config, dtype, context: 2048.min(config.context), measured: None };
    let level = codegen::cpu::level("cpu:native")?;
    let lowered = lower(&request, &level.target)?;
    let number =
        lowered.plan.entry_number(tokens, ir::plan::Give::Last).ok_or("no entry point for so many tokens")?;
    let graph = &lowered.entries[number].graph;
    let mut seen = std::collections::BTreeSet::new();
    let mut bench = Bench {
        level: &level,
        meter: Meter::new(threads),
        dtype,
        threads,
        tokens,
        memory: meter::memory(usize::MAX)?,
    };
    println!("{preset} {dtype}, {tokens} tokens, {threads} threads, {}", level.cpu);
    for (view, launch) in GroupView::all(graph).iter().zip(&lowered.entries[number].launches) {
        let kernel = &lowered.kernels[launch.kernel];
        if !seen.insert(launch.kernel) || !kernel.name.contains(&filter) {
            continue;
        }
        let mut schedules = families::schedules(view, &level.target)?;
        match &part {
            Some(part) => schedules.retain(|s| s.contains(part.as_str())),
            None => schedules.truncate(1),
        }
        for schedule in schedules {
            let mut graph = graph.clone();
            graph.groups[view.id.0 as usize].schedule = (!schedule.is_empty()).then_some(schedule.clone());
            bench.kernel(&GroupView::new(&graph, view.id), &schedule)?;
        }
    }
    Ok(())
}

struct Bench<'a> {
    level: &'a Level,
    meter: Meter,
    dtype: DType,
    threads: usize,
    tokens: usize,
    memory: OwnedBuf,
}

impl Bench<'_> {
    fn kernel(&mut self, view: &GroupView<'_>, schedule: &str) -> Result<(), Box<dyn std::error::Error>> {
        let lowered = families::lower(view, &self.level.target)?;
        let mut alone = Alone::new(view, &lowered, self.level, self.threads, [self.tokens, 0], false)?;
        let dot = if self.dtype == DType::BF16 { Dot::Bf16 } else { Dot::F32 };
        let mut shares = Vec::new();
        let mut times = Vec::new();
        for _ in 0..TURNS {
            let top = Ceilings {
                read_bytes_per_s: meter::best(&self.meter.read(&self.memory, SECONDS)),
                dot_flops: meter::best(&self.meter.dot(dot, SECONDS)),
            };
            let time = meter::median(&alone.times(SECONDS));
            shares.push(top.seconds(alone.cost) / time);
            times.push(time);
        }
        println!(
            "{:12} {:40} {:9.1} us  {:5.1} %",
            lowered.kernel.name,
            schedule,
            1e6 * meter::median(&times),
            100.0 * meter::median(&shares)
        );
        Ok(())
    }
}
