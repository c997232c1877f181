//! Taps: a step launch by launch gives what it gives at once.

use crate::Checked;
use ir::DType;
use ir::plan::Place;
use libtest_mimic::Trial;
use llamac::compile::{Options, compile};
use llamac::model::Model;
use llamac::weights::Source;
use runtime::artifact::Artifact;
use runtime::cpu::{Cpu, CpuProgram};
use runtime::device::{Device, DeviceError, Program, Step, Want};
use runtime::manifest::WEIGHTS;
use std::ops::ControlFlow;
use std::path::Path;

pub fn trials() -> Vec<Trial> {
    vec![Trial::test("profile taps", || Ok(taps()?))]
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
    program: &mut CpuProgram,
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
