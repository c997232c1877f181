//! `tune`: the fastest schedule of each kernel on this machine, into a table that `compile --tune-db` reads.

use super::error::CliError;
use super::interrupt;
use super::plan::Lowering;
use super::screen::{Screen, columns, print, print_json, short};
use super::source::BuildOptions;
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use llamac::compile::CompileError;
use llamac::model::Model;
use llamac::tune::report::{self, Choice, Prediction};
use llamac::tune::search::{Limits, Progress, Search};
use llamac::tune::table::{Choices, Table, TableFile};
use llamac::tune::worker::{Setup, serve};
use llamac::tune::{compiler, machine};
use runtime::pool;
use serde_json::json;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{env, fs, io};

#[derive(Args)]
#[command(after_help = "\
Each candidate must be right before it is timed; it is timed in turn with the default, in a process of its own. What is measured
is in the table at once: stop it when you like, and start it again to go on. Tables of several machines may be written one
behind the other; what another machine or compiler measured is tried first and never taken for measured here.

Example:
  llamac tune preset:tinyllama-1.1b --dtype bf16 --budget 10m --db tune.jsonl
  llamac compile TinyLlama-1.1B/ -o tiny.llamac --dtype bf16 --tune-db tune.jsonl
  llamac tune --show --db tune.jsonl")]
pub struct Options {
    /// Model whose kernels are tuned; weights are not needed
    #[arg(required_unless_present_any = ["show", "report", "import"])]
    model: Option<String>,
    /// cpu: this machine with all its instructions; or a level that it runs, as cpu:x86-64-v3
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: String,
    /// Time to spend, as 90s, 10m or 2h
    #[arg(long, default_value = "10m", value_name = "TIME", value_parser = duration)]
    budget: Duration,
    /// The table [default: tune.jsonl in the data folder, ~/.local/share/llamac]
    #[arg(long, value_name = "FILE")]
    db: Option<PathBuf>,
    /// Only schedules that give the bits of the default
    #[arg(long)]
    same_bits: bool,
    /// Show what was chosen, with gains and shares of the limit, and measure nothing
    #[arg(long)]
    show: bool,
    /// Show how well the models of cost predict what was measured, and measure nothing
    #[arg(long)]
    report: bool,
    /// Add the records of another table, and measure nothing
    #[arg(long, value_name = "FILE")]
    import: Option<PathBuf>,
    /// Time to wait for one measurement before its process is ended
    #[arg(long, default_value = "60s", value_name = "TIME", value_parser = duration)]
    patience: Duration,
    /// Dtype of weights and stored values: f32 or bf16 [default: f32 for f32 checkpoints, else bf16]
    #[arg(long, value_parser = super::source::dtype, value_name = "DTYPE")]
    dtype: Option<ir::DType>,
    /// Positions that a text may have [default: the model's, at most 4096]
    #[arg(long, value_name = "N", value_parser = super::source::positive)]
    ctx: Option<usize>,
}

/// Reads a time: a number with `s`, `m` or `h`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "expected a time as 90s, 10m or 2h".to_string();
    let unit = match text.chars().last() {
        Some('s') => 1.0,
        Some('m') => 60.0,
        Some('h') => 3600.0,
        _ => return Err(wrong()),
    };
    let number: f64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    match Duration::try_from_secs_f64(number * unit) {
        Ok(time) if !time.is_zero() => Ok(time),
        _ => Err(wrong()),
    }
}

pub fn tune(options: &Options, screen: &Screen) -> Result<(), CliError> {
    let path = options.db.clone().map_or_else(default_table, Ok)?;
    let machine = machine().map_err(CompileError::from)?;
    if let Some(other) = &options.import {
        let new = TableFile::open(&path)?.merge(Table::read(other)?)?;
        screen.note(format!("{}: {new} records added", path.display()));
    }
    if let Some(argument) = &options.model {
        search(options, argument, &path, &machine, screen)?;
    }
    let table = Table::read(&path)?;
    let shown = Shown { path: &path, machine: &machine, table: &table };
    match options.report {
        true => shown.report(screen),
        false => shown.choices(screen),
    }
}

/// `tune.jsonl` in `llamac` in `$XDG_DATA_HOME`, or in `~/.local/share`.
fn default_table() -> Result<PathBuf, CliError> {
    let given = env::var_os("XDG_DATA_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share"));
    let Some(folder) = given.or_else(home) else {
        return Err(CliError::Usage(
            "there is no home folder for a table: give one with --db FILE".to_string(),
        ));
    };
    let folder = folder.join("llamac");
    fs::create_dir_all(&folder).map_err(|source| CliError::Read { file: folder.clone(), source })?;
    Ok(folder.join("tune.jsonl"))
}

fn search(
    options: &Options,
    argument: &str,
    path: &Path,
    machine: &str,
    screen: &Screen,
) -> Result<(), CliError> {
    let model = Model::open(argument)?;
    if matches!(model, Model::Artifact(_)) {
        return Err(CliError::Usage(format!("{argument} is compiled already: tune what it was made from")));
    }
    let target = match options.device.as_str() {
        "cpu" => "cpu:native",
        name if llamac::check::walk::levels()
            .map_err(CompileError::from)?
            .0
            .iter()
            .any(|l| l.name() == name) =>
        {
            name
        }
        name => {
            let known = "cpu, and each of the targets cpu:... that this machine runs";
            return Err(CliError::NoDevice { name: name.to_string(), known });
        }
    };
    let build = BuildOptions { dtype: options.dtype, ctx: options.ctx, ..BuildOptions::default() };
    let Lowering { config, dtype, context, .. } = Lowering::of(&model, &build, Some(target), screen)?;
    let threads = pool::physical_cores();
    let target = target.to_string();
    let setup = Setup { config, dtype, context, target, threads };
    let tasks = setup.tasks()?;
    let mut file = TableFile::open(path)?;
    let program = env::current_exe()?;
    let start = || {
        let mut command = Command::new(&program);
        command.arg("tune-worker");
        command
    };

    let bar = ProgressBar::new(0);
    let style = "{elapsed}  {bar:20} {pos}/{len}  {msg}";
    bar.set_style(ProgressStyle::with_template(style).expect("a constant template"));
    if screen.json {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let mut go_on = |progress: Option<Progress<'_>>| {
        if let Some(Progress { task, number: [number, of], done }) = progress {
            bar.set_length(task.candidates.len() as u64);
            bar.set_position(done as u64);
            bar.set_message(format!("kernel {number} of {of}: {}, {} tokens", task.kernel, task.tokens));
        }
        if interrupt::pressed() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let limits = Limits { budget: options.budget, patience: options.patience, same_bits: options.same_bits };
    let (compiler, machine) = (compiler(), machine.to_string());
    let mut search = Search { setup, start: &start, compiler, machine, limits, go_on: &mut go_on };
    let done = interrupt::guarded(|| search.run(&tasks, &mut file));
    bar.finish_and_clear();
    Ok(done?)
}

/// Answers a search: see [`llamac::tune::worker`].
pub fn worker() -> Result<(), CliError> {
    serve(io::stdin().lock(), io::stdout().lock())
        .map_err(|error| CliError::Usage(format!("tune-worker: {error}")))
}

/// A table, as this machine sees it.
struct Shown<'a> {
    path: &'a Path,
    machine: &'a str,
    table: &'a Table,
}

impl Shown<'_> {
    fn choices(&self, screen: &Screen) -> Result<(), CliError> {
        let rows = report::choices(self.table, &compiler(), self.machine);
        let all = Choices::of(self.table.records.iter()).records().count();
        let hints = self.table.records.len() - self.here();
        if screen.json {
            return print_json(&json!({
                "table": self.path.display().to_string(), "machine": self.machine, "compiler": compiler(),
                "choices": rows, "records": self.table.records.len(), "records_of_others": hints,
            }));
        }
        let row = |c: &Choice| {
            let bad = if c.bad > 0 { format!(", {} bad", c.bad) } else { String::new() };
            vec![
                c.kernel.clone(),
                c.dtype.clone(),
                c.tokens.to_string(),
                format!("{} us", short(1e6 * c.seconds)),
                format!("{:.1} %", 100.0 * c.share_of_limit),
                format!("{:.3}", c.gain),
                format!("{} of {}{bad}", c.tried[0], c.tried[1]),
                c.schedule.clone(),
            ]
        };
        let heads = ["kernel", "dtype", "tokens>", "time>", "of limit>", "gain>", "tried>", "schedule"];
        let mut text = format!("{}: {}, {}\n\n", self.path.display(), self.machine, compiler());
        text += &columns(&heads, &rows.iter().map(row).collect::<Vec<_>>());
        text += "\ngain: how often as fast as the default schedule; the default itself has 1\n";
        if hints > 0 {
            text += &format!(
                "{hints} records of other machines or compilers, with {} choices, are hints\n",
                all - rows.len()
            );
        }
        print(&text)
    }

    fn report(&self, screen: &Screen) -> Result<(), CliError> {
        let rows = report::predictions(self.table, &compiler(), self.machine);
        if screen.json {
            return print_json(
                &json!({ "machine": self.machine, "compiler": compiler(), "predictions": rows }),
            );
        }
        let row = |p: &Prediction| {
            vec![
                p.kernel.clone(),
                p.dtype.clone(),
                p.tokens.to_string(),
                p.timed.to_string(),
                format!("{:.2}", p.correlation),
                format!("{:.1} %", 100.0 * p.regret),
                p.predicted.clone(),
                p.best.clone(),
            ]
        };
        let heads =
            ["kernel", "dtype", "tokens>", "timed>", "rank corr.>", "regret>", "predicted best", "chosen"];
        let mut text = format!("{}: {}, {}\n\n", self.path.display(), self.machine, compiler());
        text += &columns(&heads, &rows.iter().map(row).collect::<Vec<_>>());
        text += "\nrank corr.: predicted against measured order (Spearman); regret: how much longer the predicted best takes than what was chosen\n";
        print(&text)
    }

    /// Records of this machine and compiler.
    fn here(&self) -> usize {
        let here =
            |r: &&llamac::tune::table::Record| r.key.compiler == compiler() && r.key.machine == self.machine;
        self.table.records.iter().filter(here).count()
    }
}

#[cfg(test)]
mod tests {
    use super::duration;
    use std::time::Duration;

    #[test]
    fn durations() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert!(duration("10").is_err() && duration("0s").is_err() && duration("-1h").is_err());
        assert!(duration("").is_err() && duration("ös").is_err());
    }
}
