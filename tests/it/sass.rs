//! Machine code that `ptxas` makes: its steady loops, what they hold, and the speed that is argued from them.
//!
//! Kernels for sm_90a are sketches, which `../shared/prototypes/nvptx` writes where it is; those for sm_80 are ours.

use super::Checked;
use super::command::{Place, Said};
use super::ptxas::machine_code;
use super::skipped::skip;
use codegen::nvptx::{self, ARCHITECTURES, Architecture};
use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::families::attention::shape_of;
use ir::families::gpu::{attention_tile, product_tile};
use ir::families::{GroupView, dot};
use ir::graph::Family;
use ir::plan::{Launch, PlanKernel};
use libtest_mimic::Trial;
use llamac::pipeline::{Lowered, Request, lower};
use llamac::predict::{self, Step};
use llamac::profile::emulated::first_turns;
use llamac::profile::gpus::{GPUS, Gpu};
use llamac::profile::predicted::Problem;
use llamac::profile::recorded::{RECORDED, parse as parse_figures};
use llamac::profile::steady::Steady;
use llamac::sass::flow::Flow;
use llamac::sass::{Code, parse, rules};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

pub fn trials() -> Vec<Trial> {
    let test =
        |name: &'static str, check: fn(&str) -> Checked<()>| Trial::test(name, move || Ok(check(name)?));
    vec![
        test("lower sketches to sass", sketches),
        test("lower tensor-core kernels to sass", ours),
        test("profile counts the work of tiles", tiles),
        test("profile argues from sass", argues),
        test("profile argues enough of warpgroups", enough),
        test("figures of a GPU become records", records),
    ]
}

/// The sketches' machine.
const HOPPER: &Architecture = &ARCHITECTURES[2];

/// A sketch's machine code; none where it cannot be had.
fn sketch(name: &str, script: &str, arguments: &str) -> Checked<Vec<Code>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/prototypes/nvptx");
    let written =
        Command::new("python3").arg(script).args(arguments.split(' ')).current_dir(&folder).output();
    let llvm = match written {
        Ok(output) if output.status.success() => String::from_utf8(output.stdout)?,
        _ => {
            skip(name, &format!("no {script} in {}, or no python3", folder.display()));
            return Ok(Vec::new());
        }
    };
    match machine_code(name, &nvptx::compile(&llvm, HOPPER)?, HOPPER.cpu)? {
        Some(sass) => Ok(parse(&sass)?),
        None => Ok(Vec::new()),
    }
}

/// The shares of the peak that were argued from these kernels when they were written, by hand.
fn sketches(name: &str) -> Checked<()> {
    let gpu = Gpu::of("h100").expect("it is in the table");
    #[rustfmt::skip] // a table: one kernel a line
    let cases = [
        // Script, arguments, T, X, F, I, serial, overlapped.
        ("flash_sm90a.py", "128 128 2 2", [2048.0, 1056.0, 392.0, 898.0], [0.66, 1.00]),
        ("flash_sm90a.py", "64 128 2 2",  [1024.0, 1056.0, 328.0, 806.0], [0.49, 0.97]),
        ("gemm_sm90a.py",  "256 4",       [1024.0, 0.0,    0.0,   74.0],  [0.93, 1.00]),
    ];
    for (script, arguments, [tensor, special, float, issue], [serial, overlapped]) in cases {
        for code in sketch(name, script, arguments)? {
            let steady = Steady::of(&code, 384, 1.0, gpu).ok_or("no steady loop")?;
            let shown = format!("{script} {arguments}: {steady:?}");
            assert!(steady.unknown.is_empty() && steady.producer.is_some() && steady.warps == 8, "{shown}");
            assert_eq!((steady.tensor, steady.special), (tensor, special), "{shown}");
            // What else is in a loop is up to the assembler: within 5 %.
            for (found, expected) in [(steady.float, float), (steady.issue, issue)] {
                assert!((found - expected).abs() <= 0.05 * expected, "{shown}");
            }
            for (found, expected) in [(steady.serial(), serial), (steady.overlapped(), overlapped)] {
                assert!((found - expected).abs() < 0.01, "{shown}");
            }
            rules::specialised(&code)?;
            let trip = Flow::of(&code).steady().ok_or("no steady loop")?;
            rules::hides_exponentials(&trip)?;
        }
    }
    Ok(())
}

/// Products of many rows and attention in bf16 keep the rules of their machine: warps that copy asynchronously, load matrices and
/// multiply, or warpgroups that only multiply, with their exponentials beside it.
fn ours(name: &str) -> Checked<()> {
    for architecture in &ARCHITECTURES {
        let config = models::preset("tinyllama-1.1b").ok_or("no preset")?;
        let request = Request { config: &config, dtype: DType::BF16, context: 1024, measured: None };
        let lowered = lower(&request, &architecture.target())?;
        let ptx = nvptx::compile(&nvptx::llvm(&lowered.kernels, architecture)?, architecture)?;
        let Some(sass) = machine_code(name, &ptx, architecture.cpu)? else { return Ok(()) };
        let codes = parse(&sass)?;
        let mut by_groups = 0;
        for kernel in &lowered.plan.kernels {
            let code =
                codes.iter().find(|code| code.symbol == nvptx::symbol(&kernel.name)).ok_or("no code")?;
            let ptx = ptx_of(&ptx, &code.symbol);
            let broken = |breach| format!("@{} for {}: {breach}", kernel.name, architecture.cpu);
            let trip = Flow::of(code).steady();
            let multiplies = ptx.contains("\tmma.sync.") || ptx.contains("wgmma.mma_async");
            assert_eq!(multiplies, trip.is_some(), "@{}: a loop of tensor cores", kernel.name);
            let Some(trip) = trip else { continue };
            assert!(matches!(kernel.family, Family::Dot | Family::Attention), "@{}", kernel.name);
            if ptx.contains("wgmma.mma_async") {
                by_groups += 1;
                rules::specialised(code).map_err(broken)?;
                rules::hides_exponentials(&trip).map_err(broken)?;
            } else {
                rules::pipelined(code).map_err(broken)?;
            }
        }
        assert_eq!(by_groups > 0, architecture.warpgroups);
        // A fault is seen.
        let without = parse(&sass.replace(" LDGSTS.", " LDG.").replace(" UTMALDG.", " UTMASTG."))?;
        let seen = |code: &Code| rules::pipelined(code).is_err() && rules::specialised(code).is_err();
        assert!(without.iter().filter(|code| Flow::of(code).steady().is_some()).all(seen));
    }
    Ok(())
}

/// What tiles are said to execute is what the emulator counts of a kernel's first turns.
fn tiles(_: &str) -> Checked<()> {
    for architecture in &ARCHITECTURES {
        let config = models::preset("smollm2-135m").ok_or("no preset")?;
        let request = Request { config: &config, dtype: DType::BF16, context: 1024, measured: None };
        let lowered = lower(&request, &architecture.target())?;
        let steps =
            predict::prompt(&lowered.plan, 300).into_iter().chain(predict::decode(&lowered.plan, 300));
        let mut seen = BTreeSet::new();
        for step in steps {
            let entry = lowered.entries.iter().find(|entry| entry.graph.name == step.entry.name);
            for (view, launch) in
                GroupView::all(&entry.ok_or("no entry")?.graph).iter().zip(&step.entry.launches)
            {
                let Some(problem) = problem(view, &step, &lowered.plan.kernels[launch.kernel])? else {
                    continue;
                };
                if seen.insert(launch.kernel) {
                    let of = (&step, launch, problem);
                    turns_are_right(architecture, &lowered, of)?;
                }
            }
        }
        assert!(seen.len() >= 6, "{seen:?}");
    }
    Ok(())
}

/// What a launch is said to do, if it is cut into tiles.
fn problem(view: &GroupView<'_>, step: &Step<'_>, kernel: &PlanKernel) -> Checked<Option<Problem>> {
    Ok(match (kernel.family, product_tile(&kernel.schedule)) {
        (Family::Dot, Some(tile)) => {
            let group = dot::analyse(view)?;
            let segments: Vec<_> = group.segments.iter().map(|s| (s.n(), s.streams.len())).collect();
            Some(Problem::product([step.tokens, group.k], &segments, 0, tile))
        }
        (Family::Attention, _) => {
            let tile = attention_tile(&kernel.schedule).ok_or("no tile")?;
            Some(Problem::attention(&shape_of(view)?, [step.tokens, step.past], 0, tile))
        }
        _ => None,
    })
}

/// As many turns as the kernel has, and in the first of each loop the multiply-adds that are counted.
fn turns_are_right(
    architecture: &Architecture,
    lowered: &Lowered,
    (step, launch, problem): (&Step<'_>, &Launch, Problem),
) -> Checked<()> {
    let kernel = &lowered.kernels[launch.kernel];
    let of = [step.tokens, step.past];
    let counts = first_turns(
        architecture,
        kernel,
        launch.args.iter().position(|&arg| arg == step.entry.positions),
        of,
    )?;
    let expected: u64 = problem.turns.iter().filter_map(|turns| turns.first()).sum();
    assert_eq!(2 * counts.matrix_macs, expected, "@{} for {}", kernel.name, architecture.cpu);
    let mut symbols = [0; MAX_SYMBOLS];
    (symbols[0], symbols[1]) = (step.tokens as i64, step.past as i64);
    let found = kernel.phases()[0].turns(&symbols);
    let expected = problem.turns.iter().map(Vec::len).sum::<usize>();
    assert_eq!(found, expected as i64, "@{} for {}", kernel.name, architecture.cpu);
    Ok(())
}

/// What `benches/gpu/run` leaves becomes figures that are read, with their predictions; nothing is recorded of an emulator.
fn records(name: &str) -> Checked<()> {
    if machine_code(name, EMPTY, "sm_80")?.is_none() {
        return Ok(());
    }
    let place = Place::new();
    let kernels = json!([{ "name": "a.3", "launches": 32, "seconds": 0.002, "flops": 1_100_000_000_000u64 }]);
    let attention = json!({ "prefill": { "tokens": 16384, "kernels": kernels } });
    let steps = [
        json!({ "step": "clocks", "exit": 0, "result": { "gpu": "NVIDIA H100, 580.95.05, 1980 MHz" } }),
        json!({ "step": "attention-128", "exit": 0, "result": attention }),
        json!({ "step": "attention-64", "exit": 1, "result": null }),
        json!({ "step": "gemm-8192", "skipped": "no time" }),
    ];
    let lines = |steps: &[Value]| steps.iter().map(|step| format!("{step}\n")).collect::<String>();
    let device = "cuda:0 NVIDIA H100, compute capability 9.0, 79.1 GiB";
    let recording = json!({ "device": device, "driver": "13.0", "date": "2026-11-25", "forms": {} });
    place.write("conformance.json", recording.to_string());
    place.write("results.jsonl", lines(&steps));
    place.write("emulated.jsonl", lines(&steps[1..]));
    place.write("gpu.csv", RECORDED);
    place.write("gpu/recorded/README.md", "");
    let record = |results: &str| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/gpu/record");
        let mut command = Command::new(script);
        command.arg(place.path(results)).env("RECORDS", place.path("."));
        Said::of(command.env("LLAMAC", env!("CARGO_BIN_EXE_llamac")))
    };
    let said = record("emulated.jsonl");
    assert!(said.exit == Some(1) && said.err.contains("it is of no GPU"), "{said:?}");
    record("results.jsonl").ok();
    let [.., figure] = &parse_figures(&String::from_utf8(place.read("gpu.csv"))?)?[..] else {
        return Err("no figure".into());
    };
    assert_eq!((&*figure.gpu, &*figure.target, &*figure.driver), ("h100", "cuda:sm_90a", "580.95.05"));
    assert_eq!((&*figure.problem, figure.tflops), ("attention 128", 550.0));
    let [least, most] = figure.predicted;
    assert!(300.0 < least && least < most && most < 989.0, "{figure:?}");
    let kept = place.files().into_iter().filter(|file| file.starts_with("gpu/recorded/cuda-0-NVIDIA-H100"));
    assert_eq!(kept.count(), 1);
    Ok(())
}

/// The command's figures are in their bounds, and say that they are predicted.
fn argues(name: &str) -> Checked<()> {
    if machine_code(name, EMPTY, "sm_80")?.is_none() {
        return Ok(());
    }
    let place = Place::new();
    for (gpu, target) in GPUS.iter().zip(["cuda:sm_80", "cuda:sm_90a"]) {
        let told = place.ok(&format!("profile --static builtin --json -p 64 --target {target}")).json();
        assert_eq!(
            (told["source"].as_str(), told["argued"]["gpu"].as_str()),
            (Some("predicted"), Some(gpu.name))
        );
        let loops = told["argued"]["loops"].as_array().ok_or("no loops")?;
        assert!(loops.len() >= 4, "{loops:?}");
        for kernel in loops {
            let of = |key: &str| kernel["steady"][key].as_f64().unwrap_or_default();
            assert!(of("conflicts") >= 1.0 && of("tensor") > 0.0 && of("shared") > 0.0, "{kernel}");
            let tiles = &kernel["stated"]["tile_efficiency"];
            for share in [&kernel["serial"], &kernel["overlapped"], tiles] {
                // Tiles of few rows have no stated problem.
                assert!(
                    share.is_null() || share.as_f64().is_some_and(|share| 0.0 < share && share <= 1.0),
                    "{kernel}"
                );
            }
        }
        for phase in ["decode", "prefill"] {
            for kernel in told["argued"][phase]["kernels"].as_array().ok_or("no kernels")? {
                let of = |key: &str| kernel[key].as_f64().unwrap_or_default();
                let floor = of("bytes") / gpu.bytes_per_s;
                assert!(floor <= of("least_s") && of("least_s") <= of("most_s"), "{kernel}");
            }
        }
    }
    // Kernels in f32 have no use for tensor cores.
    let told = place.ok("profile --static builtin --json -p 64 --dtype f32").json();
    assert_eq!(told["argued"]["loops"].as_array().map(Vec::len), Some(0));
    let shown = place.ok("profile --static builtin").out;
    for expected in [
        "Predictions from machine code for sm_80",
        "no figure of",
        "conflicts",
        "\ndecode, 1 token after 511",
    ] {
        assert!(shown.contains(expected), "{shown}");
    }
    let mut command = place.command("profile --static builtin");
    let tools = command.env("PATH", "").env("LLAMAC_TEST_DATA", place.path("none"));
    let said = Said::of(tools.env_remove("LLAMAC_PTXAS").env_remove("LLAMAC_NVDISASM"));
    assert!(said.exit == Some(2) && said.err.contains("nvidia-cuda-nvdisasm"), "{said:?}");
    Ok(())
}

/// What kernels of warpgroups have to reach: the shares that were argued from the sketches, tiles that waste little, no conflicts.
fn enough(name: &str) -> Checked<()> {
    if machine_code(name, EMPTY, "sm_80")?.is_none() {
        return Ok(());
    }
    let place = Place::new();
    // Heads of 128 and of 64.
    for (model, serial) in [("preset:llama3-8b", 0.64), ("preset:tinyllama-1.1b", 0.48)] {
        let told =
            place.ok(&format!("profile --static {model} --json --ctx 1024 --target cuda:sm_90a")).json();
        let loops = told["argued"]["loops"].as_array().ok_or("no loops")?;
        let by_groups =
            |kernel: &&Value| kernel["schedule"].as_str().is_some_and(|s| s.starts_with("consumers"));
        let (mut attentions, mut products) = (0, 0);
        for kernel in loops.iter().filter(by_groups) {
            let of = |value: &Value| value.as_f64().unwrap_or_default();
            let attention = kernel["stated"]["problem"].as_str().is_some_and(|p| p.starts_with("attention"));
            let (least, overlapped, count) =
                if attention { (serial, 0.95, &mut attentions) } else { (0.0, 0.98, &mut products) };
            *count += 1;
            assert!(of(&kernel["serial"]) >= least && of(&kernel["overlapped"]) >= overlapped, "{kernel}");
            assert!(of(&kernel["stated"]["tile_efficiency"]) >= 0.95, "{kernel}");
            assert_eq!(of(&kernel["steady"]["conflicts"]), 1.0, "{kernel}");
        }
        assert!(attentions == 1 && products >= 4, "{loops:?}");
    }
    Ok(())
}

/// A module that is there to be assembled.
const EMPTY: &str = ".version 7.4\n.target sm_80\n.address_size 64\n.visible .entry k_x() { ret; }\n";

/// The text of one kernel.
fn ptx_of<'p>(ptx: &'p str, symbol: &str) -> &'p str {
    let head = format!(".visible .entry {symbol}(");
    let from = ptx.split_once(&head).map_or("", |(_, rest)| rest);
    from.split(".visible .entry ").next().unwrap_or_default()
}
