//! Taps: a step launch by launch gives what it gives at once. And what `profile` tells of its launches, but for the times.

use crate::Checked;
use crate::command::Place as Folder;
use crate::reproducer::rewrite;
use ir::DType;
use ir::plan::Place;
use libtest_mimic::Trial;
use llamac::compile::{Options, compile};
use llamac::model::Model;
use llamac::predict;
use llamac::weights::Source;
use runtime::artifact::Artifact;
use runtime::cpu::Cpu;
use runtime::device::{Device, DeviceError, Program, Step, Tapped, Want};
use runtime::manifest::WEIGHTS;
use serde_json::Value;
use std::ops::ControlFlow;
use std::path::Path;

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("profile taps", || Ok(taps()?)),
        Trial::test("profile tells", || Ok(tells()?)),
        Trial::test("profile judges rows", || Ok(rows()?)),
        Trial::test("profile refuses", || {
            refuses();
            Ok(())
        }),
    ]
}

fn builtin(file: &Path, dtype: DType, taps: bool) -> Checked<Artifact> {
    let Model::Checkpoint(checkpoint) = Model::open("builtin")? else { return Err("no checkpoint".into()) };
    let options = Options {
        model: "builtin".to_string(),
        config: &checkpoint.config,
        weights: Some(Source::Checkpoint(&checkpoint)),
        tokenizer: None,
        chat_template: None,
        dtype,
        context: 96,
        targets: vec!["cpu:native".to_string()],
        taps,
        measured: None,
        cubin: false,
        keep: None,
    };
    compile(&options, file, &mut |_| ControlFlow::Continue(()))?;
    Ok(Artifact::open(file)?)
}

/// Prompt, chunk, one token, every position: both ways in turn, each on its own cache, bit for bit.
fn taps() -> Checked<()> {
    let folder = tempfile::tempdir()?;
    for (dtype, threads) in [(DType::F32, 1), (DType::BF16, 2)] {
        let tapped = builtin(&folder.path().join("tapped.llamac"), dtype, true)?;
        let plain = builtin(&folder.path().join("plain.llamac"), dtype, false)?;
        let cpu = Cpu { threads };
        let (mut program, mut other) = (cpu.open(&tapped)?, { cpu }.load(&plain)?);
        let (mut state, mut whole, mut others) = (program.state()?, program.state()?, other.state()?);
        let tokens: Vec<i32> = (0..60).map(|i| (i * 7 + 1) % program.vocab() as i32).collect();
        let steps = [(0..40, Want::Nothing), (40..53, Want::Logits), (53..54, Want::Token)];
        let steps = steps.into_iter().chain([(54..55, Want::Logits), (55..60, Want::AllLogits)]);
        for (range, want) in steps {
            let step = Step { tokens: &tokens[range.clone()], want };
            let found = run_tapped(&mut program, &step, &mut state, &tapped)?;
            assert_eq!(found, program.run(&step, &mut whole)?, "{dtype} {range:?}");
            assert_eq!(found, other.run(&step, &mut others)?, "{dtype} {range:?}: artifact without taps");
            assert_eq!(state.past(), range.end);
        }
        let step = Step { tokens: &tokens[..1], want: Want::Token };
        let (mut program, mut state) = (cpu.open(&plain)?, program.state()?);
        let refused = program.run_tapped(&step, &mut state, &mut |_| panic!("nothing was run"));
        assert!(matches!(refused, Err(DeviceError::NoTaps { .. })), "{refused:?}");
        assert_eq!(state.past(), 0);
    }
    Ok(())
}

/// Runs a step launch by launch, and looks at all that a tap shows.
fn run_tapped(
    program: &mut dyn Tapped,
    step: &Step<'_>,
    state: &mut runtime::device::State,
    artifact: &Artifact,
) -> Checked<runtime::device::StepOutputs> {
    let plan = program.plan().clone();
    let weights = artifact.section(WEIGHTS).ok_or("weights")?;
    let (mut seen, mut entries, mut logits, mut end) = (0, Vec::new(), Vec::new(), 0.0);
    let found = program.run_tapped(step, state, &mut |tap| {
        assert_eq!(tap.launch, seen);
        assert!(tap.span().start >= end && tap.seconds() >= 0.0, "launches overlap");
        (seen, end) = (seen + 1, tap.span().end);
        entries.push(tap.entry.clone());
        for &arg in &tap.entry.launches[tap.launch].args {
            let (bytes, buffer) = (tap.bytes(arg), &plan.buffers[arg]);
            assert_eq!(bytes.len(), buffer.bytes, "{}", buffer.name);
            match buffer.place {
                Place::Weight { offset, .. } => assert!(bytes == &weights[offset..][..buffer.bytes]),
                Place::Input if arg == tap.entry.tokens => {
                    let given = step.tokens.iter().flat_map(|token| token.to_le_bytes());
                    assert!(bytes.iter().copied().zip(given).all(|(a, b)| a == b));
                }
                Place::Input | Place::Arena { .. } | Place::State => {}
            }
        }
        logits = tap.entry.logits.map(|buffer| tap.bytes(buffer).to_vec()).unwrap_or_default();
    })?;
    assert!(entries.iter().all(|entry| *entry == entries[0]) && seen == entries[0].launches.len());
    // What the last tap shows is what the step gives.
    let last: Vec<f32> = logits.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    assert!(found.logits.iter().zip(&last).all(|(a, b)| a.to_bits() == b.to_bits()));
    assert!(found.logits.len() <= last.len());
    Ok(found)
}

const PROMPT: usize = 9;
const NEW: usize = 4;
const THREADS: usize = 2;

/// JSON, table, trace and page agree with the plan and with each other.
fn tells() -> Checked<()> {
    let folder = Folder::new();
    let artifact = builtin(&folder.path("a.llamac"), DType::BF16, true)?;
    let command = format!("profile a.llamac -p {PROMPT} -n {NEW} -r 2 --threads {THREADS}");
    let found = folder.ok(&format!("{command} --json --trace trace.json --html page.html")).json();
    let manifest = artifact.manifest()?;
    let plan = runtime::cpu::read_plan(&artifact, runtime::cpu::choose(artifact.file(), &manifest)?)?;
    let prompt = predict::prompt(&plan, PROMPT);
    let [prefill] = prompt[..] else { return Err("the prompt is one step".into()) };

    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value} is no number"));
    let text = |value: &Value| value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_string();
    let list = |value: &Value| value.as_array().unwrap_or_else(|| panic!("{value} is no list")).clone();
    let table = folder.ok(&command).out;
    let page = String::from_utf8(folder.read("page.html"))?;
    let (mut circles, mut lines) = (0, 0);
    for (name, steps, tokens) in [("prefill", 2, PROMPT), ("decode", 2 * NEW, 1)] {
        let phase = &found[name];
        let past = number(&phase["past"]) as usize;
        let decode = predict::decode(&plan, past).ok_or("a decode step")?;
        let step = if name == "decode" { decode } else { prefill };
        assert_eq!((number(&phase["steps"]), number(&phase["tokens"])), (steps as f64, tokens as f64));
        assert!((PROMPT..PROMPT + NEW).contains(&past) || (name == "prefill" && past == 0), "{past}");
        for field in ["seconds", "tapped_seconds", "kernel_seconds", "sum_share"] {
            assert!(number(&phase[field]) > 0.0, "{field}");
        }
        assert!(number(&phase["ceilings"]["read_bytes_per_s"]) > 0.0);

        let kernels = list(&phase["kernels"]);
        let sum = |field: &str| kernels.iter().map(|kernel| number(&kernel[field])).sum::<f64>() as u64;
        let cost = predict::step_cost(&plan, &step);
        assert_eq!(sum("launches"), step.entry.launches.len() as u64, "{name}");
        assert_eq!((sum("bytes"), sum("flops")), (cost.bytes, cost.flops), "{name}");
        assert!(kernels.is_sorted_by(|a, b| number(&a["seconds"]) >= number(&b["seconds"])));
        for kernel in &kernels {
            let of = plan.kernels.iter().find(|k| k.name == kernel["name"]).ok_or("a kernel of the plan")?;
            assert_eq!(
                (text(&kernel["family"]), text(&kernel["schedule"])),
                (of.family.name().into(), of.schedule.clone())
            );
            assert!(
                (0.0..=1.0).contains(&number(&kernel["share"])) && number(&kernel["share_of_limit"]) > 0.0
            );
            assert!((0.0..=1.0).contains(&number(&kernel["busy"])), "{kernel}");
            assert!(["memory", "compute"].contains(&text(&kernel["limit"]).as_str()));
            assert!(table.contains(&of.name) && page.contains(&of.name), "{}", of.name);
            circles += usize::from(number(&kernel["flops"]) > 0.0);
        }
        lines += kernels.len();
    }
    assert!(table.matches("The kernels take ").count() == 2 && table.contains("of limit"), "{table}");
    assert_eq!(page.matches("<circle ").count(), circles);
    assert_eq!(page.matches("<tr title=").count(), lines);
    // Self-contained: nothing is fetched.
    assert!(["http", "src=", "href=", "url(", "@import", "NaN", "inf"].iter().all(|no| !page.contains(no)));

    let trace: Value = serde_json::from_slice(&folder.read("trace.json"))?;
    let events = list(&trace["traceEvents"]);
    let lane = |wanted: usize| {
        let of_lane = events.iter().filter(|e| e["ph"] == "X" && e["tid"] == wanted);
        let nanos = |value: &Value| (1e3 * number(value)).round() as u64;
        let spans: Vec<[u64; 2]> =
            of_lane.map(|e| [nanos(&e["ts"]), nanos(&e["ts"]) + nanos(&e["dur"])]).collect();
        assert!(spans.is_sorted_by(|a, b| a[1] < b[0]), "lane {wanted}: launches overlap");
        spans
    };
    let decode = plan.decode().ok_or("a decode step")?;
    let launches = prefill.entry.launches.len() + NEW * decode.launches.len();
    let steps = lane(0);
    assert_eq!(steps.len(), 1 + NEW);
    for worker in 1..=THREADS {
        let spans = lane(worker);
        assert_eq!(spans.len(), launches);
        let inside = |span: &[u64; 2]| steps.iter().any(|step| step[0] <= span[0] && span[1] <= step[1]);
        assert!(spans.iter().all(inside), "a launch lies outside of its step");
        let name = events.iter().find(|e| e["ph"] == "M" && e["tid"] == worker).ok_or("a lane's name")?;
        assert_eq!(name["args"]["name"], format!("worker {}", worker - 1));
    }
    assert!(lane(THREADS + 1).is_empty());
    Ok(())
}

/// An emulated GPU makes the weights, and rows of every kernel are right; by a graph with another scale of attention they are not.
fn rows() -> Checked<()> {
    let folder = Folder::new();
    folder
        .ok("compile builtin -o right.llamac --ctx 96 --taps --no-weights --dtype bf16 --target cuda:sm_80");
    let profile = |file: &str| {
        folder.run(&format!(
            "profile {file} --device ptx-emulator:sm_80 -p 17 -n 1 -r 1 --check-rows 3 --random-weights 5 --json"
        ))
    };
    let said = profile("right.llamac");
    assert_eq!(said.exit, Some(0), "{}", said.err);
    let told = said.json();
    assert_eq!((&told["weights_seed"], &told["threads"]), (&Value::from(5), &Value::Null));
    let checked = &told["checked"];
    let kernels = checked["kernels"].as_object().ok_or("no kernels")?;
    assert!(kernels.len() >= 10, "{checked}");
    assert_eq!(checked["wrong"].as_array().map(Vec::len), Some(0), "{checked}");

    let right = Artifact::open(&folder.path("right.llamac"))?;
    let fused = String::from_utf8(right.require("fused.cuda:sm_80")?.to_vec())?;
    let other = fused.replace("scale = 0.17", "scale = 0.27");
    assert_ne!(fused, other);
    rewrite(&folder, "wrong.llamac", &[("fused.", other.as_bytes())])?;
    let said = profile("wrong.llamac");
    assert_eq!(said.exit, Some(1), "{}", said.err);
    let told = said.json();
    let wrong = told["checked"]["wrong"].as_array().ok_or("nothing is wrong")?;
    assert!(
        !wrong.is_empty() && wrong.iter().all(|wrong| wrong.as_str().is_some_and(|w| w.starts_with("a"))),
        "{wrong:?}"
    );
    Ok(())
}

/// An artifact without taps, a device without, a text that does not fit.
fn refuses() {
    let folder = Folder::new();
    folder.ok("compile builtin -o plain.llamac --ctx 64");
    folder.ok("compile builtin -o tapped.llamac --ctx 64 --taps");
    let cases = [
        (
            "profile --static builtin --target cpu:native",
            2,
            "found --target cpu:native, expected cuda:sm_80, cuda:sm_80-99k, cuda:sm_90a",
        ),
        ("profile --static builtin --gpu b200", 2, "found b200, expected a100, h100, h200, rtx4090"),
        ("profile --static builtin -p 512", 5, "context full: 512 positions in the cache and 1 more"),
        ("profile --static builtin --threads 2", 2, "cannot be used with '--threads"),
        ("profile builtin --gpu h100", 2, "--static"),
        ("profile plain.llamac", 4, "plain.llamac: has no taps; `compile --taps` makes code that has"),
        ("profile tapped.llamac --device null", 7, "there is no device `null with taps`"),
        (
            "profile tapped.llamac -p 60 -n 5",
            5,
            "context full: 60 positions in the cache and 5 more, compiled for 64",
        ),
    ];
    for (command, exit, words) in cases {
        let said = folder.run(command);
        assert_eq!(said.exit, Some(exit), "{command}: {}", said.err);
        assert!(said.err.contains(words), "{command}: {}", said.err);
    }
}
