//! Tuning: searches with a worker that misbehaves, a search that is killed, and what is done with a table.

use crate::command::Place;
use crate::{Checked, ptxas};
use libtest_mimic::Trial;
use llamac::model::Model;
use llamac::tune::search::{Limits, Progress, Search};
use llamac::tune::table::{Key, Outcome, Record, Table, TableFile, Times};
use llamac::tune::task::Task;
use llamac::tune::worker::{On, Setup, serve};
use llamac::tune::{compiler, machine};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::io::{self, BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

/// One test for each thing that is shown.
pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("tune: a candidate that hangs or crashes is recorded and skipped", || Ok(misbehaving()?)),
        Trial::test("tune: behind a candidate that fails the next has a process of its own", || {
            Ok(failing()?)
        }),
        Trial::test("tune: a second run finds nothing to do", || Ok(twice()?)),
        Trial::test("tune: a run that was killed goes on where it was", || Ok(killed()?)),
        Trial::test("tune: compile takes what was measured here, and nothing else", || Ok(taken()?)),
        Trial::test(
            "tune: without a GPU, machine code says what is best, and what is packed is timed elsewhere",
            || Ok(argued("tune: without a GPU")?),
        ),
    ]
}

/// Name of the variable that makes this program a worker, with the schedules on which it hangs and crashes.
const WORKER: &str = "LLAMAC_TEST_TUNE_WORKER";

/// Is this program started as a worker? Then it is one, to its end.
pub fn is_worker() -> bool {
    let Ok(text) = env::var(WORKER) else { return false };
    let (hang, crash) = text.split_once('|').unwrap_or_default();
    let input = Misbehaving { stdin: io::stdin().lock(), hang, crash, line: Vec::new() };
    serve(BufReader::new(input), io::stdout().lock()).is_ok()
}

/// Standard input, of which some lines are never answered.
struct Misbehaving<'a> {
    stdin: io::StdinLock<'static>,
    hang: &'a str,
    crash: &'a str,
    line: Vec<u8>,
}

impl Read for Misbehaving<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.line.is_empty() {
            self.stdin.read_until(b'\n', &mut self.line)?;
            let text = String::from_utf8_lossy(&self.line);
            let asks_for = |schedule: &str| !schedule.is_empty() && text.contains(&format!("\"{schedule}\""));
            while asks_for(self.hang) {
                thread::sleep(Duration::from_secs(1));
            }
            if asks_for(self.crash) {
                std::process::abort();
            }
        }
        let count = out.len().min(self.line.len());
        out[..count].copy_from_slice(&self.line[..count]);
        self.line.drain(..count);
        Ok(count)
    }
}

fn setup() -> Checked<Setup> {
    let config = Model::open("builtin")?.config()?;
    let target = codegen::cpu::level("cpu:native")?.target;
    Ok(Setup { config, dtype: ir::DType::F32, context: 64, target, on: On::Cpu { threads: 1 } })
}

/// The kernel of that name for one token.
fn task(setup: &Setup, kernel: &str) -> Checked<Vec<Task>> {
    let mut tasks = setup.tasks()?;
    tasks.retain(|task| task.kernel == kernel && task.tokens == 1);
    // The worker numbers all of them; only one that comes first has the same number here.
    let first = setup.tasks()?.first().map(|t| t.group.clone());
    match tasks.first().map(|t| t.group.clone()) == first {
        true => Ok(tasks),
        false => Err(format!("@{kernel} is not the first kernel").into()),
    }
}

/// Gives how often a worker was started.
fn search(setup: &Setup, tasks: &[Task], faults: &str, file: &mut TableFile) -> Checked<usize> {
    let program = env::current_exe()?;
    let starts = Cell::new(0);
    let start = || {
        starts.set(starts.get() + 1);
        let mut command = Command::new(&program);
        command.env(WORKER, faults);
        command
    };
    let limits =
        Limits { budget: Duration::from_secs(100), patience: Duration::from_secs(15), same_bits: true };
    let (compiler, machine) = (compiler("cpu"), machine()?);
    let mut go_on = |_: Option<Progress<'_>>| ControlFlow::Continue(());
    let mut search =
        Search { setup: setup.clone(), start: &start, compiler, machine, limits, go_on: &mut go_on };
    search.run(tasks, file)?;
    Ok(starts.get())
}

/// On a GPU nothing goes on after a fault.
fn failing() -> Checked<()> {
    let place = Place::new();
    let setup = setup()?;
    let mut tasks = task(&setup, "q")?;
    tasks[0].candidates.truncate(3);
    let mut file = TableFile::open(&place.path("good.jsonl"))?;
    let starts = search(&setup, &tasks, "|", &mut file)?;
    tasks[0].candidates[1].schedule = "nonsense".to_string();
    let mut file = TableFile::open(&place.path("bad.jsonl"))?;
    assert_eq!(search(&setup, &tasks, "|", &mut file)?, starts + 1);
    let of = |schedule: &str| file.table.records.iter().find(|r| r.schedule == schedule).map(|r| &r.outcome);
    assert!(matches!(of("nonsense"), Some(Outcome::Crashed { .. })), "{:?}", of("nonsense"));
    let next = of(&tasks[0].candidates[2].schedule);
    assert!(matches!(next, Some(Outcome::Timed { .. })), "{next:?}");
    Ok(())
}

fn misbehaving() -> Checked<()> {
    let place = Place::new();
    let setup = setup()?;
    let tasks = task(&setup, "q")?;
    let texts: Vec<&str> = tasks[0].candidates.iter().map(|c| c.schedule.as_str()).collect();
    let [default, hang, crash, ..] = texts[..] else { return Err("too few candidates".into()) };
    let mut file = TableFile::open(&place.path("t.jsonl"))?;
    search(&setup, &tasks, &format!("{hang}|{crash}"), &mut file)?;
    let outcome = |schedule: &str| {
        let records = &file.table.records;
        records.iter().find(|r| r.schedule == schedule).map(|r| r.outcome.clone())
    };
    assert!(matches!(outcome(default), Some(Outcome::Timed { .. })), "{:?}", outcome(default));
    assert!(matches!(outcome(hang), Some(Outcome::Hung { .. })), "{:?}", outcome(hang));
    match outcome(crash) {
        Some(Outcome::Crashed { why }) if why.contains("signal") => {}
        other => return Err(format!("{other:?}").into()),
    }
    let last = file.table.records.last().ok_or("no record")?;
    match &last.outcome {
        Outcome::Chosen { tried, legal, .. } if *tried == texts.len() && tried == legal => Ok(()),
        other => Err(format!("{other:?}").into()),
    }
}

fn twice() -> Checked<()> {
    let place = Place::new();
    let setup = setup()?;
    let tasks = task(&setup, "q")?;
    let path = place.path("t.jsonl");
    search(&setup, &tasks, "|", &mut TableFile::open(&path)?)?;
    let first = fs::read(&path)?;
    search(&setup, &tasks, "|", &mut TableFile::open(&path)?)?;
    assert!(!first.is_empty() && fs::read(&path)? == first, "the table changed");
    Ok(())
}

/// A kill loses the measurement that was going on, and nothing is measured twice.
fn killed() -> Checked<()> {
    let place = Place::new();
    let path = place.path("t.jsonl");
    let run = "tune builtin --dtype f32 --ctx 64 --db t.jsonl --budget 20s";
    let mut child = place.command(run).spawn()?;
    let begin = Instant::now();
    while lines(&path) < 6 {
        thread::sleep(Duration::from_millis(20));
        assert!(begin.elapsed() < Duration::from_secs(60), "it measures nothing");
    }
    child.kill()?;
    child.wait()?;
    let before = Table::parse(&fs::read_to_string(&path)?).map_err(|bad| bad.source)?.records;
    assert!(before.len() >= 6);
    place.ok("tune builtin --dtype f32 --ctx 64 --db t.jsonl --budget 3s");
    let after = Table::read(&path)?.records;
    assert_eq!(after[..before.len()], before[..]);
    assert!(after.len() > before.len(), "it did not go on");
    let mut seen = BTreeSet::new();
    for record in after.iter().filter(|r| matches!(r.outcome, Outcome::Timed { .. })) {
        assert!(seen.insert((record.key.group.clone(), record.schedule.clone())), "{record:?} twice");
    }
    Ok(())
}

fn lines(path: &Path) -> usize {
    fs::read(path).map_or(0, |bytes| bytes.iter().filter(|&&byte| byte == b'\n').count())
}

fn taken() -> Checked<()> {
    let place = Place::new();
    let setup = setup()?;
    let task = setup.tasks()?.into_iter().find(|t| t.kernel == "down" && t.tokens > 1).ok_or("no kernel")?;
    let other = task.candidates.last().ok_or("no candidate")?.schedule.clone();
    let record = |machine: String| Record {
        key: Key {
            group: task.group.clone(),
            target: "cpu:native".into(),
            compiler: compiler("cpu"),
            machine,
            predicted: false,
        },
        kernel: "down".into(),
        family: "dot".into(),
        dtype: "f32".into(),
        tokens: task.tokens,
        schedule: other.clone(),
        class: String::new(),
        when: 1,
        outcome: Outcome::Chosen {
            tried: 1,
            legal: task.candidates.len(),
            limit_s: vec![1.0],
            times: Times { seconds: vec![1.0], default_s: vec![2.0] },
        },
    };
    place.write("here.jsonl", Table { records: vec![record(machine()?)] }.to_string());
    place.write("there.jsonl", Table { records: vec![record("another CPU".into())] }.to_string());
    let options = "--dtype f32 --ctx 64 --taps";
    place.ok(&format!("compile builtin -o here.llamac {options} --tune-db here.jsonl"));
    place.ok(&format!("compile builtin -o plain.llamac {options}"));
    let there = place.ok(&format!("compile builtin -o there.llamac {options} --tune-db there.jsonl"));
    assert!(
        there.err.contains("1 choices are of another machine or compiler and are not taken"),
        "{}",
        there.err
    );

    let measured = |artifact: &str| {
        let told = place.ok(&format!("inspect {artifact} --json")).json();
        let kernels = told["targets"][0]["kernels"].as_array().cloned().unwrap_or_default();
        kernels.into_iter().filter(|k| k["source"] == "measured").collect::<Vec<_>>()
    };
    assert!(measured("plain.llamac").is_empty() && measured("there.llamac").is_empty());
    let kernels = measured("here.llamac");
    assert!(!kernels.is_empty() && kernels.iter().all(|k| k["schedule"] == *other), "{kernels:?}");
    // What the artifact was made with, its other readers know too; and no schedule changes bits.
    place.ok("compare here.llamac --level op");
    let plan = place.ok("plan here.llamac --kernels --bandwidth 38GB --flops 300GB --json").json();
    let sources = plan["kernels"].as_array().cloned().unwrap_or_default();
    assert!(sources.iter().any(|k| k["source"] == "measured"), "{sources:?}");
    for name in ["here", "plain"] {
        place.ok(&format!("logits {name}.llamac --tokens 1,2,3,4,5,6,7 -o {name}.safetensors"));
    }
    assert!(place.read("here.safetensors") == place.read("plain.safetensors"), "other bits");
    let refused = place.run("run here.llamac --tokens 1 --tune-db here.jsonl");
    assert!(refused.err.contains("has its schedules already"), "{}", refused.err);
    Ok(())
}

fn argued(name: &str) -> Checked<()> {
    if ptxas::assemblers(name)?.is_empty() {
        return Ok(());
    }
    let place = Place::new();
    let shape = "--dtype bf16 --ctx 64";
    let predict = format!("tune builtin {shape} --predict a100 --budget 15s --db argued.jsonl");
    let told = place.ok(&format!("{predict} --pack some.candidates --json")).json();
    let argued = told["choices"].as_array().cloned().unwrap_or_default();
    assert!(!argued.is_empty() && argued.iter().all(|c| c["predicted"] == true && c["machine"] == "a100"));

    // What was argued is taken, and marked.
    let mut table = TableFile::open(&place.path("argued.jsonl"))?;
    let other = |r: &&Record| matches!(r.outcome, Outcome::Timed { rank, .. } if rank > 0);
    let mut record = table.table.records.iter().find(other).ok_or("the defaults alone were tried")?.clone();
    let Outcome::Timed { times, .. } = record.outcome else { unreachable!("it was timed") };
    record.outcome = Outcome::Chosen { tried: 2, legal: 2, limit_s: vec![1e-9], times };
    record.when += 1000;
    let schedule = record.schedule.clone();
    table.append(record)?;
    drop(table);
    let compile = format!("compile builtin {shape} --target cuda:sm_80 --no-weights --tune-db");
    place.ok(&format!("{compile} argued.jsonl -o argued.llamac"));
    let kernels = |artifact: &str| {
        let told = place.ok(&format!("inspect {artifact} --json")).json();
        told["targets"][0]["kernels"].as_array().cloned().unwrap_or_default()
    };
    let with = |k: &serde_json::Value| k["schedule"] == *schedule && k["source"] == "predicted";
    place.ok(&format!("compile builtin {shape} --target cuda:sm_80 --no-weights -o plain.llamac"));
    let count = |artifact: &str| kernels(artifact).iter().filter(|kernel| with(kernel)).count();
    assert!(count("argued.llamac") > count("plain.llamac"), "{schedule}");

    // From the file alone: what a GPU would do. How long emulating takes is taken for no GPU's time.
    let from = "tune --from-bundle some.candidates --budget 8s";
    let told = place.ok(&format!("{from} --device ptx-emulator:sm_80 --db timed.jsonl --json")).json();
    let timed = told["choices"].as_array().cloned().unwrap_or_default();
    let of_emulator = |c: &serde_json::Value| {
        c["predicted"] == false && c["machine"].as_str().is_some_and(|m| m.starts_with("ptx-emulator:sm_80"))
    };
    assert!(!timed.is_empty() && timed.iter().all(of_emulator), "{timed:?}");
    let table = Table::read(&place.path("timed.jsonl"))?;
    let bad = |r: &&Record| !matches!(r.outcome, Outcome::Timed { .. } | Outcome::Chosen { .. });
    assert_eq!(table.records.iter().find(bad), None);
    let said = place.ok(&format!("{compile} timed.jsonl -o timed.llamac"));
    assert!(said.err.contains("choices are of another machine or compiler"), "{}", said.err);

    // What is not packed, or not for this GPU, or no such file.
    let refused = |command: &str| place.run(command).err;
    assert!(refused(&format!("{from} --device cpu")).contains("there is with --from-bundle: cuda"));
    assert!(
        refused("tune --from-bundle argued.llamac --device ptx-emulator").contains("manifest does not parse")
    );
    place.ok(&format!(
        "tune builtin {shape} --predict h100 --budget 1s --db h100.jsonl --pack h100.candidates"
    ));
    let other = refused("tune --from-bundle h100.candidates --device ptx-emulator:sm_80");
    assert!(other.contains("candidates for cuda:sm_90a, which ptx-emulator:sm_80"), "{other}");
    let mut bytes = place.read("some.candidates");
    bytes[5000] ^= 1;
    place.write("some.candidates", bytes);
    assert!(refused(&format!("{from} --device ptx-emulator")).contains("the file is damaged"));
    Ok(())
}
