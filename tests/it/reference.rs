//! Real models against reference outputs in f64 (`../shared/reference`, beside the checkout): every model, f32 and bf16.
//!
//! For each model and dtype, on the device `cpu`:
//! * logits of every position of every prompt within the judge's bound;
//! * the greedy continuation is the reference's, but for near ties, which are counted;
//! * one step, steps of 1, 3 and 7 tokens, decode steps, and two workers give the same bits;
//! * `interpreter` within its own bound, `null` finds nothing wrong.

use crate::Checked;
use crate::skipped::skip;
use ir::DType;
use libtest_mimic::Trial;
use llamac::compile::{self, Options};
use llamac::judge::{self, Greedy, ReferenceStep, rms};
use llamac::model::Model;
use llamac::weights::Source;
use runtime::artifact::Artifact;
use runtime::cpu::Cpu;
use runtime::device::{Device, Program, State, Step, Want, feed};
use runtime::interpreter::Interpreter;
use runtime::null::Null;
use safetensors::SafeTensors;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// The most positions that a test needs: 24 of a prompt and 60 after it.
const CONTEXT: usize = 128;

/// Models by their path in `models/` and the reference's in `reference/`.
const MODELS: [(&str, &str); 17] = [
    ("stories260K", "stories260K"),
    ("stories260K/stories260K.gguf", "stories260K"),
    ("quant-mixed.gguf", "quant-mixed"),
    ("variants/biases", "variants/biases"),
    ("variants/f16", "variants/f16"),
    ("variants/gqa4", "variants/gqa4"),
    ("variants/head-dim", "variants/head-dim"),
    ("variants/llama1-mha", "variants/llama1-mha"),
    ("variants/odd", "variants/odd"),
    ("variants/rope-default-new", "variants/rope-default-new"),
    ("variants/rope-linear-old", "variants/rope-linear-old"),
    ("variants/rope-llama3-new", "variants/rope-llama3-new"),
    ("variants/rope-llama3-old", "variants/rope-llama3-old"),
    ("variants/rope-yarn-new", "variants/rope-yarn-new"),
    ("variants/rope-yarn-old", "variants/rope-yarn-old"),
    ("variants/sharded-bf16", "variants/sharded-bf16"),
    ("variants/tied", "variants/tied"),
];

/// Models that are tried on the published levels too, and not on this machine's alone.
const ON_ALL_LEVELS: [&str; 4] =
    ["stories260K", "variants/odd", "variants/head-dim", "variants/sharded-bf16"];

/// Too large for the folder: fetched once.
pub const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// One test a model and dtype.
pub fn trials() -> Vec<Trial> {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared");
    let mut trials = Vec::new();
    for dtype in [DType::F32, DType::BF16] {
        for (model, reference) in MODELS {
            let files = [
                shared.join("models").join(model),
                shared.join("reference").join(format!("{reference}.safetensors")),
            ];
            trials.push(trial(model, files, dtype));
        }
        let files = [test_data().join(SMOLLM2), shared.join("reference/smollm2-135m-q4_1.safetensors")];
        trials.push(trial("SmolLM2-135M", files, dtype));
    }
    trials
}

/// Where large test files are kept.
pub fn test_data() -> PathBuf {
    match std::env::var_os("LLAMAC_TEST_DATA") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/llamac-test-data"),
    }
}

fn trial(model: &'static str, [file, reference]: [PathBuf; 2], dtype: DType) -> Trial {
    let name = format!("reference {model} {dtype}");
    Trial::test(name.clone(), move || {
        for file in [&file, &reference] {
            if !file.exists() {
                skip(&name, &format!("there is no {}", file.display()));
                return Ok(());
            }
        }
        let reference = std::fs::read(&reference)?;
        let reference = Reference::read(&reference)?;
        let mut levels = vec!["cpu:native"];
        if ON_ALL_LEVELS.contains(&model) {
            levels.extend(["cpu:x86-64-v3", "cpu:x86-64-v4"]);
        }
        for level in levels {
            check(&name, &file, &reference, dtype, level)?;
        }
        Ok(())
    })
}

/// A reference file.
struct Reference {
    prompts: Vec<Prompt>,
}

/// One prompt of a reference file.
struct Prompt {
    tokens: Vec<i32>,
    /// Which logits are known at each position, and what they are in f64.
    logits: Vec<Vec<(usize, f64)>>,
    /// Are all known?
    whole: bool,
    f32_error: f64,
    greedy: Vec<ReferenceStep>,
}

impl Reference {
    fn read(bytes: &[u8]) -> Checked<Reference> {
        let (_, metadata) = SafeTensors::read_metadata(bytes)?;
        let text = metadata.metadata().as_ref().and_then(|m| m.get("reference")).ok_or("no metadata")?;
        let described: serde_json::Value = serde_json::from_str(text)?;
        let tensors = SafeTensors::deserialize(bytes)?;
        let mut prompts = Vec::new();
        for (number, of) in described["prompts"].as_array().ok_or("no prompts")?.iter().enumerate() {
            let f64s = |name: &str| f64s(&tensors, &format!("p{number}.{name}"));
            let i32s = |name: &str| i32s(&tensors, &format!("p{number}.{name}"));
            let tokens = i32s("tokens")?;
            let whole = tensors.tensor(&format!("p{number}.logits_f64")).is_ok();
            let logits = if whole {
                let all = f64s("logits_f64")?;
                let row = |row: &[f64]| row.iter().copied().enumerate().collect();
                all.chunks_exact(all.len() / tokens.len()).map(row).collect()
            } else {
                let (ids, values) = (i32s("top_tokens")?, f64s("top_logits")?);
                let known: Vec<_> = ids.iter().map(|&id| id as usize).zip(values).collect();
                known.chunks_exact(known.len() / tokens.len()).map(<[_]>::to_vec).collect()
            };
            let steps = i32s("greedy")?.into_iter().zip(i32s("greedy_second")?).zip(f64s("greedy_margin")?);
            let greedy =
                steps.map(|((token, second), margin)| ReferenceStep { token, second, margin }).collect();
            let f32_error = of["f32_max_error"].as_f64().ok_or("no f32_max_error")?;
            prompts.push(Prompt { tokens, logits, whole, f32_error, greedy });
        }
        Ok(Reference { prompts })
    }
}

fn i32s(tensors: &SafeTensors<'_>, name: &str) -> Checked<Vec<i32>> {
    let data = tensors.tensor(name)?.data().to_vec();
    Ok(data.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect())
}

fn f64s(tensors: &SafeTensors<'_>, name: &str) -> Checked<Vec<f64>> {
    let data = tensors.tensor(name)?.data().to_vec();
    Ok(data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect())
}

/// Compiles a model and runs all checks on one level.
fn check(name: &str, file: &Path, reference: &Reference, dtype: DType, level: &str) -> Checked<()> {
    let folder = tempfile::tempdir()?;
    let artifact = compile_model(file, &folder.path().join("model.llamac"), dtype, level)?;
    let mut program = match (Cpu { threads: 1 }).load(&artifact) {
        Err(runtime::device::DeviceError::MissingFeature { needs, has, .. }) => {
            skip(&format!("{name} on {level}"), &format!("it needs {needs}, this machine has {has}"));
            return Ok(());
        }
        program => program?,
    };
    let program = program.as_mut();
    let mut two = Cpu { threads: 2 }.load(&artifact)?;

    let mut shares = Shares::default();
    let mut errors = Vec::new();
    for (number, prompt) in reference.prompts.iter().enumerate() {
        let logits = all_logits(program, &prompt.tokens, None)?;
        let largest = compare(prompt, &logits, program.vocab(), dtype, &mut shares, &mut errors)
            .map_err(|e| format!("{level}, prompt {number}: {e}"))?;
        same_bits(program, &prompt.tokens, &logits).map_err(|e| format!("{level}, prompt {number}: {e}"))?;
        if all_logits(two.as_mut(), &prompt.tokens, None)? != logits {
            return Err(format!("{level}, prompt {number}: two workers give other bits than one").into());
        }
        let near_ties =
            greedy(program, prompt, largest).map_err(|e| format!("{level}, prompt {number}: {e}"))?;
        shares.near_ties += near_ties;
        shares.steps += prompt.greedy.len();
    }
    if level == "cpu:native" {
        other_devices(&artifact, reference, dtype, &mut shares, &errors)?;
    }
    println!("{name} on {level}: {shares}");
    Ok(())
}

/// What a model came to.
#[derive(Default)]
struct Shares {
    /// Of the bound: the largest at a position in f32, of the rms in bf16.
    bound: f64,
    /// The interpreter's.
    interpreter: f64,
    near_ties: usize,
    steps: usize,
}

impl std::fmt::Display for Shares {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Shares { bound, interpreter, near_ties, steps } = self;
        if *bound > 0.0 {
            write!(f, "{bound:.3} of the bound, ")?;
        }
        if *interpreter > 0.0 {
            write!(f, "interpreter {interpreter:.3}, ")?;
        }
        write!(f, "{near_ties} near ties in {steps} steps")
    }
}

pub fn compile_model(file: &Path, out: &Path, dtype: DType, level: &str) -> Checked<Artifact> {
    let Model::Checkpoint(checkpoint) = Model::open(&file.display().to_string())? else {
        return Err(format!("{} is no checkpoint", file.display()).into());
    };
    let options = Options {
        model: llamac::model::name_of(&file.display().to_string()),
        config: &checkpoint.config,
        weights: Some(Source::Checkpoint(&checkpoint)),
        tokenizer: None,
        chat_template: None,
        dtype,
        context: checkpoint.config.context.min(CONTEXT),
        targets: vec![level.to_string()],
        taps: false,
        keep: None,
    };
    compile::compile(&options, out, &mut |_| ControlFlow::Continue(()))?;
    Ok(Artifact::open(out)?)
}

fn all_logits(program: &mut dyn Program, tokens: &[i32], chunk: Option<usize>) -> Checked<Vec<f32>> {
    let mut state = program.state()?;
    Ok(feed(program, tokens, chunk, Want::AllLogits, &mut state)?.logits)
}

/// Compares the logits of a prompt; gives the largest error and adds all errors to `errors`.
fn compare(
    prompt: &Prompt,
    logits: &[f32],
    vocab: usize,
    dtype: DType,
    shares: &mut Shares,
    errors: &mut Vec<f64>,
) -> Checked<f64> {
    let mut largest_of_all = 0f64;
    for (position, (known, found)) in prompt.logits.iter().zip(logits.chunks_exact(vocab)).enumerate() {
        let off = |&(id, exact): &(usize, f64)| f64::from(found[id]) - exact;
        let largest = known.iter().map(|k| off(k).abs()).fold(0.0, f64::max);
        if known.iter().any(|k| off(k).is_nan()) {
            return Err(format!("position {position}: a logit is NaN").into());
        }
        errors.extend(known.iter().map(off));
        largest_of_all = largest_of_all.max(largest);
        if dtype == DType::F32 {
            // Where the reference keeps the largest logits only, ours stand for the rest.
            let size = match prompt.whole {
                true => rms(known.iter().map(|k| k.1)),
                false => rms(found.iter().map(|&x| f64::from(x))),
            };
            let bound = judge::f32_bound(prompt.f32_error, size);
            shares.bound = shares.bound.max(largest / bound);
            if largest > bound {
                return Err(format!("position {position}: largest error {largest:e}, bound {bound:e}").into());
            }
        }
    }
    Ok(largest_of_all)
}

/// However the prompt is cut, the bits are the same.
fn same_bits(program: &mut dyn Program, tokens: &[i32], logits: &[f32]) -> Checked<()> {
    for chunk in [1, 3, 7] {
        if all_logits(program, tokens, Some(chunk))? != logits {
            return Err(format!("steps of {chunk} give other bits than one step").into());
        }
    }
    let vocab = program.vocab();
    let mut state = program.state()?;
    for (position, &token) in tokens.iter().enumerate() {
        let found = program.run(&Step { tokens: &[token], want: Want::Logits }, &mut state)?.logits;
        if found != logits[position * vocab..][..vocab] {
            return Err(format!("decode gives other bits than prefill at position {position}").into());
        }
    }
    for chunk in [None, Some(1), Some(3), Some(7)] {
        let mut state = program.state()?;
        let last = feed(program, tokens, chunk, Want::Logits, &mut state)?.logits;
        if last != logits[logits.len() - vocab..] {
            return Err(format!("the last position alone, in steps of {chunk:?}, has other bits").into());
        }
    }
    Ok(())
}

/// Goes through the reference's greedy continuation; gives the number of near ties.
fn greedy(program: &mut dyn Program, prompt: &Prompt, largest: f64) -> Checked<usize> {
    let mut state: State = program.state()?;
    let room = program.context() - prompt.tokens.len();
    let mut chosen = feed(program, &prompt.tokens, None, Want::Token, &mut state)?.token;
    let mut near_ties = 0;
    for (number, &step) in prompt.greedy.iter().enumerate().take(room) {
        let found = chosen.ok_or("a step for a token gave none")?;
        match judge::greedy(step, found, largest) {
            Greedy::Equal => {}
            Greedy::NearTie => near_ties += 1,
            Greedy::Wrong => {
                let ReferenceStep { token, second, margin } = step;
                return Err(format!(
                    "greedy step {number}: token {found}, expected {token} (or {second}, {margin:e} below; \
                     largest error {largest:e})"
                )
                .into());
            }
        }
        chosen = program.run(&Step { tokens: &[step.token], want: Want::Token }, &mut state)?.token;
    }
    Ok(near_ties)
}

/// The interpreter gives the bf16 bound, and keeps its own in f32; `null` finds nothing wrong.
fn other_devices(
    artifact: &Artifact,
    reference: &Reference,
    dtype: DType,
    shares: &mut Shares,
    errors: &[f64],
) -> Checked<()> {
    let (mut interpreter, mut null) = (Interpreter.load(artifact)?, Null.load(artifact)?);
    let mut of_interpreter = Shares::default();
    let mut interpreter_errors = Vec::new();
    for (number, prompt) in reference.prompts.iter().enumerate() {
        let logits = all_logits(interpreter.as_mut(), &prompt.tokens, None)?;
        let vocab = interpreter.vocab();
        compare(prompt, &logits, vocab, dtype, &mut of_interpreter, &mut interpreter_errors)
            .map_err(|e| format!("interpreter, prompt {number}: {e}"))?;
        if all_logits(null.as_mut(), &prompt.tokens, Some(3))?.len() != logits.len() {
            return Err("null gives another number of logits".into());
        }
    }
    shares.interpreter = of_interpreter.bound;
    if dtype == DType::F32 {
        return Ok(());
    }
    let (found, bound) =
        (rms(errors.iter().copied()), judge::bf16_bound(rms(interpreter_errors.iter().copied())));
    shares.bound = found / bound;
    match found <= bound {
        true => Ok(()),
        false => Err(format!("rms error {found:e}, bound {bound:e}").into()),
    }
}
