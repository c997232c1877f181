//! `check`: every kernel family on every shape and distribution of the table, judged; or instructions, with `--conformance`.

use super::conformance;
use super::device::DeviceOptions;
use super::error::CliError;
use super::interrupt;
use super::screen::{Screen, columns, grouped, print, print_json};
use clap::Args;
use codegen::Backend;
use codegen::backend::names;
use codegen::nvptx::{ARCHITECTURES, Architecture};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ir::graph::Family;
use llamac::check::cases::{self, cases, random};
use llamac::check::walk::{Failure, How, Report, Walk, levels, walk};
use llamac::compare::reproducer::Reproducer;
use llamac::compile::CompileError;
use runtime::cuda::Cuda;
use runtime::cuda::context::Context;
use runtime::emulator::Sums;
use runtime::gpu;
use serde_json::json;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

/// Schedules of a group, unless all are asked for.
const SCHEDULES: usize = 4;

/// Random graphs, and as many as that with `--exhaustive`.
const RANDOM: [usize; 2] = [60, 600];

/// Failures that are shown; all are counted.
const SHOWN: usize = 10;

#[derive(Args)]
#[command(after_help = "\
Example:
  llamac check
  llamac check --device cpu:x86-64-v3 --family dot --filter 'gated n 17'
  llamac check --conformance --device cuda:0 --record h100.json")]
pub struct Options {
    #[command(flatten)]
    cases: conformance::FormOptions,
    /// Only kernels of this family
    #[arg(long, value_name = "FAMILY", value_parser = family)]
    family: Option<Family>,
    /// Every schedule, ten times the random graphs, and every shape about the tiles of a GPU: on a CPU two million launches, an hour
    #[arg(long)]
    exhaustive: bool,
    /// Folder for the first launch that is wrong, which `compare --replay` shows again
    #[arg(long, value_name = "DIR")]
    reproducer: Option<PathBuf>,
    /// Of numbers, random graphs, and schedules drawn
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

fn family(text: &str) -> Result<Family, String> {
    let known = Family::ALL.map(Family::name).join(", ");
    let found = Family::ALL.into_iter().find(|family| family.name() == text);
    found.ok_or_else(|| format!("there is no such family; expected one of {known}"))
}

pub fn check(options: &Options, screen: &Screen) -> Result<(), CliError> {
    if options.cases.conformance {
        return conformance::conformance(&options.cases, screen);
    }
    if let Some(folder) = options.reproducer.as_ref().filter(|folder| folder.symlink_metadata().is_ok()) {
        return Err(CliError::Usage(format!("--reproducer {}: it is there already", folder.display())));
    }
    let On { backends, how, gpu } = on(options, screen)?;
    let mut table = cases();
    if matches!(backends.first(), Some(Backend::Cuda(_))) {
        table.extend(cases::gpu(options.exhaustive));
    }
    table.extend(random(options.seed, RANDOM[usize::from(options.exhaustive)]));
    table.retain(|case| case.name.contains(&options.cases.filter));
    if table.is_empty() {
        return Err(CliError::Usage(format!("no case has `{}` in its name", options.cases.filter)));
    }
    let schedules = (!options.exhaustive).then_some(SCHEDULES);
    let plan = Walk {
        family: options.family,
        schedules,
        seed: options.seed,
        backends,
        how,
        gpu,
        sums: Sums::default(),
    };

    let bar = ProgressBar::new(table.len() as u64);
    let style = "{bar:30} {pos}/{len} cases, {elapsed}, {eta} left";
    bar.set_style(ProgressStyle::with_template(style).expect("a constant template"));
    if screen.json {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let mut progress = |done: usize, _| {
        bar.set_position(done as u64);
        if interrupt::pressed() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let report = interrupt::guarded(|| walk(&plan, &table, &mut progress))?;
    bar.finish_and_clear();
    if let (Some(folder), Some(case), [first, ..]) = (&options.reproducer, &report.case, &report.failures[..])
    {
        let what = format!("{}\n{}", describe(first), first.why);
        Reproducer::Kernel(case.clone()).write(folder, &what)?;
        screen.note(format!("{}: a reproducer of the first that is wrong", folder.display()));
    }

    if report.launches() == 0 {
        return Err(CliError::Usage("no kernel fits these options: nothing was checked".to_string()));
    }
    for why in &report.refused {
        screen.detail(format!("not covered: {why}"));
    }
    if screen.json {
        print_json(&as_json(options, &report))?
    } else {
        print(&as_text(options, &report))?
    }
    match report.failures.len() {
        0 => Ok(()),
        wrong => Err(CliError::Wrong { wrong }),
    }
}

/// Where kernels run.
struct On {
    /// What they are compiled for.
    backends: Vec<Backend>,
    /// What is done with them.
    how: Vec<How>,
    /// The GPU that runs them.
    gpu: Option<Arc<Context>>,
}

fn on(options: &Options, screen: &Screen) -> Result<On, CliError> {
    let name = options.cases.device.as_str();
    let device = DeviceOptions { threads: None, device: name.to_string() };
    let code = |backends| On { backends, how: vec![How::Code], gpu: None };
    let of_gpus = |runs: &dyn Fn(&Architecture) -> bool| {
        ARCHITECTURES.iter().filter(|&a| runs(a)).map(Backend::Cuda).collect::<Vec<_>>()
    };
    if let Some(number) = device.cuda() {
        let cuda = Cuda::new(number)?;
        let takes = gpu::takes(cuda.gpu().capability);
        let backends = of_gpus(&|a| takes.iter().any(|&(sm, _)| sm == a.cpu));
        return Ok(On { gpu: Some(cuda.context()?), ..code(backends) });
    }
    let (here, missing) = levels().map_err(CompileError::from)?;
    let how = match name {
        "interpreter" => vec![How::Interpreter],
        "null" => vec![How::Null],
        "cpu" => {
            for name in missing {
                screen.note(format!("skipped: {name}: this machine does not run it"));
            }
            return Ok(code(here));
        }
        "ptx-emulator" => return Ok(code(of_gpus(&|_| true))),
        name if let Some(sm) = device.emulated() => {
            let backends = of_gpus(&|a| a.cpu == sm.name());
            let none = || CliError::Usage(format!("{name}: kernels are made for sm_80 and sm_90a"));
            return backends.first().map(|_| code(backends.clone())).ok_or_else(none);
        }
        name if names().iter().any(|known| known.0 == name) => {
            let level = here.into_iter().find(|level| level.name() == name);
            let level = level.ok_or_else(|| CliError::Usage(format!("this machine does not run {name}")))?;
            return Ok(code(vec![level]));
        }
        name => {
            let known = "cpu, each of the targets cpu:..., cuda, cuda:N, ptx-emulator, ptx-emulator:SM, interpreter, null";
            return Err(CliError::NoDevice { name: name.to_string(), known });
        }
    };
    Ok(On { backends: here.into_iter().take(1).collect(), how, gpu: None })
}

fn as_text(options: &Options, report: &Report) -> String {
    let heads = ["family", "dtype", "device", "launches>", "hard>", "statistical>", "worst"];
    let row = |((family, dtype, device), tally): (&(Family, ir::DType, String), &_)| {
        let tally: &llamac::check::walk::Tally = tally;
        let (launches, shares) = (grouped(tally.launches as u64), tally.shares);
        let (hard, typical) = (format!("{:.3}", shares.hard), format!("{:.3}", shares.typical));
        let [family, dtype] = [family.name(), dtype.name()].map(str::to_string);
        vec![family, dtype, device.clone(), launches, hard, typical, tally.worst.clone()]
    };
    let mut text = columns(&heads, &report.rows.iter().map(row).collect::<Vec<_>>());
    for failure in report.failures.iter().take(SHOWN) {
        text += &format!("\nwrong: {}\n", describe(failure));
        text += &format!("  {}\n  again: {}\n", failure.why, again(options, failure));
    }
    let (launches, wrong) = (grouped(report.launches() as u64), report.failures.len());
    let refused = report.refused.len();
    text + &format!(
        "\n{launches} launches judged, seed {}; shares of the bounds, 1 is the most that is right\n\
         {wrong} kernels wrong; {refused} random groups have no kernel and were not tried\n",
        options.seed
    )
}

fn describe(failure: &Failure) -> String {
    let Failure { family, case, group, schedule, device, feed, why: _ } = failure;
    format!(
        "{} `{case}`, group @{group}, schedule `{schedule}`, on {device}, T = {}, past {}, {}",
        family.name(),
        feed.symbols[0],
        feed.past,
        feed.distribution.name()
    )
}

/// The command that shows a failure again.
fn again(options: &Options, failure: &Failure) -> String {
    let exhaustive = if options.exhaustive { " --exhaustive" } else { "" };
    let Failure { family, case, device, .. } = failure;
    let family = family.name();
    // Of a GPU's code the table says what it was compiled for, and not what ran it.
    let device = if device.starts_with("cuda") { &options.cases.device } else { device };
    format!(
        "llamac check --device {device} --family {family} --filter '{case}' --seed {}{exhaustive}",
        options.seed
    )
}

fn as_json(options: &Options, report: &Report) -> serde_json::Value {
    let rows: Vec<_> = (report.rows.iter())
        .map(|((family, dtype, device), tally)| {
            json!({
                "family": family.name(), "dtype": dtype.name(), "device": device, "launches": tally.launches,
                "hard": tally.shares.hard, "statistical": tally.shares.typical, "worst": tally.worst,
                "elements": tally.shares.elems, "open": tally.shares.open,
            })
        })
        .collect();
    let failures: Vec<_> = (report.failures.iter())
        .map(|f| {
            json!({
                "family": f.family.name(), "case": f.case, "group": f.group, "schedule": f.schedule,
                "device": f.device, "tokens": f.feed.symbols[0], "past": f.feed.past,
                "distribution": f.feed.distribution.name(), "why": f.why, "again": again(options, f),
            })
        })
        .collect();
    json!({
        "verdict": if failures.is_empty() { "pass" } else { "fail" },
        "launches": report.launches(), "seed": options.seed, "rows": rows, "failures": failures,
        "without_kernel": report.refused.len(),
        "reproducer": options.reproducer.as_ref().filter(|_| !report.failures.is_empty()),
    })
}
