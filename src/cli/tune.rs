//! `tune`: the fastest schedule of each kernel on this machine, into a table that `compile --tune-db` reads.

use super::device::DeviceOptions;
use super::error::CliError;
use super::interrupt;
use super::screen::{Screen, columns, print, print_json, short};
#[cfg(feature = "compiler")]
use super::{plan::Lowering, source::BuildOptions};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use llamac::tune::candidates::Candidates;
use llamac::tune::report::{self, Choice, Prediction};
use llamac::tune::search::{Limits, Progress, Search};
use llamac::tune::table::{Choices, Key, Table, TableFile};
use llamac::tune::worker::{On, Setup, serve};
#[cfg(feature = "compiler")]
use llamac::{
    compile::{CompileError, architecture_for},
    model::Model,
    profile::gpus::GPUS,
    tune::{self, candidates::pack, task::Task},
};
use runtime::cuda::Cuda;
use runtime::gpu;
use serde_json::json;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{env, fs, io};

/// Candidates of a kernel that are packed beside the default, the best predicted.
#[cfg(feature = "compiler")]
const PACKED: usize = 7;

#[derive(Args)]
#[command(after_help = "\
Each candidate must be right before it is timed; it is timed in turn with the default, in a process of its own. What is measured
is in the table at once: stop it when you like, and start it again to go on. Tables of several machines may be written one
behind the other; what another machine or compiler measured is tried first and never taken for measured here.

Without a GPU, `--predict` orders the schedules of its kernels by times that are argued from their machine code (as `profile
--static` does, with ptxas and nvdisasm). What was argued is marked: what is measured later goes before it. `--pack` writes the
best of them as code, for `--from-bundle` on a machine that has the GPU and no compiler.

Example:
  llamac tune preset:tinyllama-1.1b --dtype bf16 --budget 10m --db tune.jsonl
  llamac compile TinyLlama-1.1B/ -o tiny.llamac --dtype bf16 --tune-db tune.jsonl
  llamac tune --show --db tune.jsonl
  llamac tune preset:llama-7b --predict h100 --pack 7b.candidates --db tune.jsonl
  llamac tune --from-bundle 7b.candidates --device cuda:0 --db h100.jsonl")]
pub struct Options {
    /// Model whose kernels are tuned; weights are not needed
    #[arg(required_unless_present_any = ["show", "report", "import", "from_bundle"])]
    model: Option<String>,
    /// cpu: this machine with all its instructions; a level that it runs, as cpu:x86-64-v3; cuda[:N], a GPU; ptx-emulator[:SM],
    /// which times emulating
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: String,
    /// Measure nothing: argue times from machine code for this GPU: a100, h100, h200, rtx4090
    #[arg(long, value_name = "GPU", conflicts_with = "device", requires = "model")]
    predict: Option<String>,
    /// Write the code of the best predicted candidates of each kernel to this file
    #[arg(long, value_name = "FILE", requires = "predict")]
    pack: Option<PathBuf>,
    /// Tune what was packed into this file, on a GPU: --device cuda:N
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "dtype", "ctx"])]
    from_bundle: Option<PathBuf>,
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

/// What is searched, and what its records hold for.
struct Job {
    setup: Setup,
    compiler: String,
    machine: String,
}

pub fn tune(options: &Options, screen: &Screen) -> Result<(), CliError> {
    let path = options.db.clone().map_or_else(default_table, Ok)?;
    if let Some(other) = &options.import {
        let new = TableFile::open(&path)?.merge(Table::read(other)?)?;
        screen.note(format!("{}: {new} records added", path.display()));
    }
    let job = match (&options.from_bundle, &options.model) {
        (Some(file), _) => Some(bundled(options, file)?),
        (None, Some(argument)) => Some(modelled(options, argument, screen)?),
        (None, None) => None,
    };
    if let Some(job) = &job {
        search(options, job, &path, screen)?;
    }
    let table = Table::read(&path)?;
    #[cfg(feature = "compiler")]
    if let (Some(file), Some(job)) = (&options.pack, &job) {
        packed(file, job, &table, screen)?;
    }
    let shown = Shown { path: &path, table: &table, here: &here(&job)? };
    match options.report {
        true => shown.report(screen),
        false => shown.choices(screen),
    }
}

/// Does a record hold here?
type Holds = Box<dyn Fn(&Key) -> bool>;

/// Which records are shown: those of what was searched; else those that hold for code that is compiled here.
fn here(job: &Option<Job>) -> Result<Holds, CliError> {
    if let Some(Job { compiler, machine, .. }) = job {
        let (compiler, machine) = (compiler.clone(), machine.clone());
        return Ok(Box::new(move |key| key.compiler == compiler && key.machine == machine));
    }
    #[cfg(feature = "compiler")]
    {
        let here = tune::Here::new().map_err(CompileError::from)?;
        Ok(Box::new(move |key| here.holds(key)))
    }
    // Who compiles nothing looks at all that there is.
    #[cfg(not(feature = "compiler"))]
    Ok(Box::new(|_| true))
}

/// A GPU, real or emulated, that candidates run on.
struct GpuDevice {
    /// By its full name.
    name: String,
    /// In tenths.
    capability: u32,
    /// Bytes of shared memory that it allows a CTA.
    shared_bytes: u32,
    /// What records of it hold for.
    machine: String,
}

impl GpuDevice {
    fn of(device: &str) -> Result<Option<GpuDevice>, CliError> {
        let options = DeviceOptions { threads: None, device: device.to_string() };
        if let Some(number) = options.cuda() {
            let cuda = Cuda::new(number)?;
            let machine = format!("{}, driver of CUDA {}", cuda.gpu().name, cuda.version());
            let runtime::cuda::driver::Gpu { capability, shared_bytes, .. } = *cuda.gpu();
            return Ok(Some(GpuDevice { name: format!("cuda:{number}"), capability, shared_bytes, machine }));
        }
        Ok(options.emulated().map(|sm| {
            let name = format!("ptx-emulator:{}", sm.name());
            let machine = format!("{name} on {}", runtime::cpu::model_name());
            GpuDevice { name, capability: sm.capability(), shared_bytes: sm.shared_bytes(), machine }
        }))
    }
}

/// What a file of candidates has.
fn bundled(options: &Options, file: &Path) -> Result<Job, CliError> {
    let head = Candidates::open(file)?.head;
    let known = "with --from-bundle: cuda, cuda:N, ptx-emulator, ptx-emulator:SM";
    let device = GpuDevice::of(&options.device)?
        .ok_or_else(|| CliError::NoDevice { name: options.device.clone(), known })?;
    let takes = gpu::takes(device.capability).iter().any(|&(sm, _)| sm == head.machine);
    if !takes || head.shared_bytes > device.shared_bytes {
        return Err(CliError::Usage(format!(
            "{}: candidates for {}, which {} of compute capability {} with {} KiB of shared memory a CTA does not run",
            file.display(),
            head.setup.target.name,
            device.name,
            gpu::capability_text(device.capability),
            device.shared_bytes >> 10
        )));
    }
    let on = On::Gpu { device: device.name, candidates: Some(file.to_path_buf()) };
    Ok(Job { setup: Setup { on, ..head.setup }, compiler: head.compiler, machine: device.machine })
}

#[cfg(not(feature = "compiler"))]
fn modelled(_: &Options, _: &str, _: &Screen) -> Result<Job, CliError> {
    Err(CliError::NoCompiler { what: "tune MODEL".into() })
}

/// What a model has.
#[cfg(feature = "compiler")]
fn modelled(options: &Options, argument: &str, screen: &Screen) -> Result<Job, CliError> {
    use codegen::Backend;
    use runtime::pool;
    let model = Model::open(argument)?;
    if matches!(model, Model::Artifact(_)) {
        return Err(CliError::Usage(format!("{argument} is compiled already: tune what it was made from")));
    }
    let levels = || -> Result<Vec<Backend>, CliError> {
        Ok(llamac::check::walk::levels().map_err(CompileError::from)?.0)
    };
    let device = GpuDevice::of(&options.device)?;
    let name = options.device.as_str();
    let (target, on, machine) = match (&options.predict, device) {
        (Some(gpu), _) => {
            let known = || GPUS.map(|gpu| gpu.name).join(", ");
            let gpu = GPUS.iter().find(|one| one.name == gpu);
            let gpu =
                gpu.ok_or_else(|| CliError::Usage(format!("--predict: expected one of {}", known())))?;
            let architecture = architecture_for(gpu.capability, gpu.cta_shared_bytes());
            let architecture = architecture.expect("each GPU of the table has a target");
            let machine = gpu.name.to_string();
            (architecture.name.to_string(), On::Nowhere { gpu: machine.clone() }, machine)
        }
        (None, Some(GpuDevice { name, capability, shared_bytes, machine })) => {
            let target = super::device::Machine::Cuda { capability, shared_bytes }.target().to_string();
            (target, On::Gpu { device: name, candidates: None }, machine)
        }
        (None, None) => {
            let target = match name {
                "cpu" => "cpu:native",
                level if levels()?.iter().any(|known| known.name() == level) => level,
                _ => {
                    let known = "cpu, each of the targets cpu:... that this machine runs, cuda, cuda:N, ptx-emulator, ptx-emulator:SM";
                    return Err(CliError::NoDevice { name: name.to_string(), known });
                }
            };
            let on = On::Cpu { threads: pool::physical_cores() };
            (target.to_string(), on, tune::machine().map_err(CompileError::from)?)
        }
    };
    let build = BuildOptions { dtype: options.dtype, ctx: options.ctx, ..BuildOptions::default() };
    let Lowering { config, dtype, context, .. } = Lowering::of(&model, &build, Some(&target), screen)?;
    let compiler = tune::compiler(&target);
    let target = Backend::of(&target).map_err(CompileError::from)?.target();
    Ok(Job { setup: Setup { config, dtype, context, target, on }, compiler, machine })
}

/// Writes the code of the best candidates.
#[cfg(feature = "compiler")]
fn packed(file: &Path, job: &Job, table: &Table, screen: &Screen) -> Result<(), CliError> {
    let Job { setup, compiler, .. } = job;
    let tasks = setup.tasks()?;
    let seconds = |task: &Task| {
        let argued = table.predicted(&setup.target.name, &task.group, compiler);
        argued.into_iter().map(|(schedule, seconds)| (seconds, schedule.to_string())).collect()
    };
    let count = pack(file, (setup, compiler.clone()), &seconds, PACKED, &tasks)?;
    screen.note(format!("{}: {count} candidates of {} kernels", file.display(), tasks.len()));
    Ok(())
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

fn search(options: &Options, job: &Job, path: &Path, screen: &Screen) -> Result<(), CliError> {
    let Job { setup, compiler, machine } = job;
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
    let (setup, compiler, machine) = (setup.clone(), compiler.clone(), machine.clone());
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
    table: &'a Table,
    /// Does a record hold here?
    here: &'a dyn Fn(&Key) -> bool,
}

impl Shown<'_> {
    fn choices(&self, screen: &Screen) -> Result<(), CliError> {
        let rows = report::choices(self.table, self.here);
        let all = Choices::of(self.table.records.iter()).records().count();
        let hints = self.table.records.iter().filter(|record| !(self.here)(&record.key)).count();
        if screen.json {
            return print_json(&json!({
                "table": self.path.display().to_string(), "choices": rows, "records": self.table.records.len(),
                "records_of_others": hints,
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
        let mut text = format!("{}\n", self.path.display());
        // A table for each machine, for times of different ones do not stand beside each other.
        for of_one in rows.chunk_by(|a, b| (&a.target, &a.machine) == (&b.target, &b.machine)) {
            let Choice { target, machine, predicted, .. } = &of_one[0];
            let how = if *predicted { "predicted for" } else { "measured on" };
            text += &format!("\n{target}, {how} {machine}\n\n");
            text += &columns(&heads, &of_one.iter().map(row).collect::<Vec<_>>());
        }
        text += "\ngain: how often as fast as the default schedule; the default itself has 1\n";
        if rows.iter().any(|row| row.predicted) {
            text += "predicted: nothing was measured; times are argued from machine code, as by `profile --static`\n";
        }
        if hints > 0 {
            text += &format!(
                "{hints} records of other machines or compilers, with {} choices, are hints\n",
                all - rows.len()
            );
        }
        print(&text)
    }

    fn report(&self, screen: &Screen) -> Result<(), CliError> {
        let rows = report::predictions(self.table, self.here);
        if screen.json {
            return print_json(&json!({ "predictions": rows }));
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
        let mut text = format!("{}\n\n", self.path.display());
        text += &columns(&heads, &rows.iter().map(row).collect::<Vec<_>>());
        text += "\nrank corr.: predicted against measured order (Spearman); regret: how much longer the predicted best takes than what was chosen\n";
        print(&text)
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
