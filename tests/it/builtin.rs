//! The built-in model: what transformers writes with it (`builtin/expected.json`), and whether the grammar reads its stories.

use crate::Checked;
use crate::reference::compile_model;
use crate::skipped::skip;
use ir::DType;
use ir::plan::Give;
use libtest_mimic::Trial;
use llamac::judge::{self, Greedy, ReferenceStep};
use llamac::model::{BUILTIN, Model};
use models::Tokenizer;
use runtime::cpu::Cpu;
use runtime::device::{Device, Step, Want, feed};
use runtime::gpu::{self, GpuCode};
use runtime::manifest::Manifest;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Stories that the model is asked for.
const STORIES: usize = 16;

/// Of so many sentences at most one may be none of the grammar's.
const SENTENCES_A_SLIP: usize = 20;

pub fn trials() -> Vec<Trial> {
    let test = |name: &str, check: fn() -> Checked<()>| Trial::test(name.to_string(), move || Ok(check()?));
    vec![
        test("builtin writes what transformers writes", writes_as_expected),
        test("builtin tells stories that the grammar reads", tells_stories),
        test("builtin decodes by the same launches at every position", launches_the_same),
    ]
}

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/builtin"))
}

/// Then a GPU records a decode step once and replays it.
fn launches_the_same() -> Checked<()> {
    let out = tempfile::tempdir()?;
    let artifact =
        compile_model(Path::new(BUILTIN), &out.path().join("b.llamac"), DType::BF16, "cuda:sm_80")?;
    let manifest: Manifest = artifact.manifest()?;
    let code = GpuCode::read(&artifact, gpu::choose(artifact.file(), &manifest, 80, 163 << 10)?)?;
    let decode = code.plan.entry_number(1, Give::Last).ok_or("a decode step")?;
    let addresses: Vec<u64> = (1..=code.plan.buffers.len() as u64).map(|number| number << 8).collect();
    let calls = |past| code.calls(decode, &addresses, &[1, past, 0, 0], u32::MAX).concat();
    let parted = calls(0).into_iter().zip(calls(1000)).find(|(first, later)| first != later);
    if let Some((first, later)) = parted {
        let kernel = &code.phases[first.phase].code.name;
        return Err(format!("@{kernel}: {first:?} at first, {later:?} behind 1000 positions").into());
    }
    if !code.is_constant(decode) {
        return Err("a decode step has a kernel that reads the past".into());
    }
    Ok(())
}

fn writes_as_expected() -> Checked<()> {
    let expected: Value = serde_json::from_slice(&fs::read(folder().join("expected.json"))?)?;
    let tokenizer = Model::open(BUILTIN)?.tokenizer().ok_or("it has a tokenizer")?.to_vec();
    let tokenizer = Tokenizer::from_json(&tokenizer)?;
    let out = tempfile::tempdir()?;
    let artifact = compile_model(Path::new(BUILTIN), &out.path().join("b.llamac"), DType::F32, "cpu:native")?;
    let mut program = Cpu { threads: 2 }.load(&artifact)?;
    for case in expected["cases"].as_array().ok_or("cases")? {
        let i32s = |name: &str| {
            case[name]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_i64)
                .map(|id| id as i32)
                .collect::<Vec<_>>()
        };
        let prompt = case["prompt"].as_str().ok_or("a prompt")?;
        let ids: Vec<i32> = tokenizer.encode(prompt, true)?.into_iter().map(|id| id as i32).collect();
        if ids != i32s("ids") {
            return Err(format!("`{prompt}` is {ids:?}, expected {:?}", i32s("ids")).into());
        }
        let mut state = program.state()?;
        let logits = feed(program.as_mut(), &ids, None, Want::Logits, &mut state)?.logits;
        // Those of transformers in f32: half of what two honest programs may differ by is its own.
        let mut largest = 0f64;
        for top in case["top8_after_prompt"].as_array().ok_or("logits")? {
            let (id, logit) = (top["id"].as_u64().ok_or("an id")?, top["logit"].as_f64().ok_or("a logit")?);
            largest = largest.max((f64::from(logits[id as usize]) - logit).abs());
        }
        let mut state = program.state()?;
        let mut chosen = feed(program.as_mut(), &ids, None, Want::Token, &mut state)?.token;
        let margins = case["greedy_margins"].as_array().ok_or("margins")?.iter().filter_map(Value::as_f64);
        for (number, (token, margin)) in i32s("greedy_ids").into_iter().zip(margins).enumerate() {
            let found = chosen.ok_or("a step for a token gave none")?;
            let reference = ReferenceStep { token, second: found, margin };
            if judge::greedy(reference, found, largest) == Greedy::Wrong {
                return Err(format!("`{prompt}`, token {number} after it: {found}, expected {token}").into());
            }
            chosen = program.run(&Step { tokens: &[token], want: Want::Token }, &mut state)?.token;
        }
    }
    Ok(())
}

fn tells_stories() -> Checked<()> {
    if Command::new("python3").arg("--version").output().is_err() {
        skip("the grammar reads the built-in model's stories", "there is no python3");
        return Ok(());
    }
    let out = tempfile::tempdir()?;
    let mut stories = Vec::new();
    for seed in 1..=STORIES {
        let run = Command::new(env!("CARGO_BIN_EXE_llamac"))
            .args(["run", BUILTIN, "-p", "Once upon a time", "-n", "400", "--temp", "0.6", "--seed"])
            .arg(seed.to_string())
            .env("XDG_CACHE_HOME", out.path())
            .output()?;
        stories.push(String::from_utf8(run.stdout)?.trim().to_string());
    }
    let file = out.path().join("stories.txt");
    fs::write(&file, stories.join("\n\n"))?;
    let read = Command::new("python3").arg(folder().join("grammar.py")).arg("--check").arg(&file).output()?;
    let said = String::from_utf8(read.stdout)?;
    let slips: Vec<&str> = said.lines().filter(|line| line.contains("not a sentence")).collect();
    let sentences = stories.iter().flat_map(|s| s.split(['.', '!', '?'])).filter(|s| s.len() > 1).count();
    println!(
        "{} of about {sentences} sentences refused; {}",
        slips.len(),
        said.lines().last().unwrap_or_default()
    );
    let told = stories.iter().all(|story| story.starts_with("Once upon a time") && story.len() > 100);
    match told && slips.len() * SENTENCES_A_SLIP <= sentences {
        true => Ok(()),
        false => Err(format!("the built-in model does not speak its grammar:\n{}", slips.join("\n")).into()),
    }
}
