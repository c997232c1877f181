//! Machine code that `ptxas` makes: its steady loops, what they hold, and the speed that is argued from them.
//!
//! Kernels for sm_90a are sketches, which `../shared/prototypes/nvptx` writes where it is; those for sm_80 are ours.

use super::Checked;
use super::ptxas::machine_code;
use super::skipped::skip;
use codegen::nvptx::{self, ARCHITECTURES, Architecture};
use ir::DType;
use ir::graph::Family;
use libtest_mimic::Trial;
use llamac::pipeline::{Request, lower};
use llamac::profile::gpus::Gpu;
use llamac::profile::steady::Steady;
use llamac::sass::flow::Flow;
use llamac::sass::{Code, parse, rules};
use std::path::Path;
use std::process::Command;

pub fn trials() -> Vec<Trial> {
    let test =
        |name: &'static str, check: fn(&str) -> Checked<()>| Trial::test(name, move || Ok(check(name)?));
    vec![test("lower sketches to sass", sketches), test("lower tensor-core kernels to sass", ours)]
}

/// The sketches' machine.
const HOPPER: &Architecture = &ARCHITECTURES[1];

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

/// The text of one kernel.
fn ptx_of<'p>(ptx: &'p str, symbol: &str) -> &'p str {
    let head = format!(".visible .entry {symbol}(");
    let from = ptx.split_once(&head).map_or("", |(_, rest)| rest);
    from.split(".visible .entry ").next().unwrap_or_default()
}
