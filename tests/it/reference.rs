//! Real models against reference outputs in f64 (`../shared/reference`, beside the checkout): every model, f32 and bf16.
//!
//! For each model and dtype, on the device `cpu`:
//! * logits of every position of every prompt within the judge's bound;
//! * the greedy continuation is the reference's, but for near ties, which are counted;
//! * one step, steps of 1, 3 and 7 tokens, decode steps, and two workers give the same bits;
//! * `interpreter` within its own bound, `null` finds nothing wrong.
//!
//! And on the PTX emulator, for GPU code: logits and greedy tokens as above, no report, and in bf16 matrix instructions.

use crate::skipped::skip;
use crate::{Checked, machine};
use codegen::nvptx::{ARCHITECTURES, Architecture};
use ir::DType;
use ir::interp::Rounding;
use libtest_mimic::Trial;
use llamac::compare::logits::{Logits, all_logits};
use llamac::compile::{self, Options};
use llamac::model::Model;
use llamac::reference::Reference;
use llamac::weights::Source;
use runtime::artifact::Artifact;
use runtime::cpu::Cpu;
use runtime::device::{Device, Program, Step, Want, feed};
use runtime::emulator::{Class, Sm, Sums};
use runtime::interpreter::{InterpretedProgram, Interpreter};
use runtime::null::Null;
use runtime::ptx_emulator::PtxEmulator;
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
            trials.push(trial(model, files.clone(), dtype));
            if !model.ends_with(".gguf") {
                trials.extend(ARCHITECTURES.iter().map(|gpu| emulated(model, files.clone(), dtype, gpu)));
            }
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
        let Some(reference) = read(&name, &file, &reference)? else { return Ok(()) };
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

/// The reference of a model; none where one of both files is missing, which is counted.
fn read(name: &str, file: &Path, reference: &Path) -> Checked<Option<Reference>> {
    if let Some(missing) = [file, reference].into_iter().find(|file| !file.exists()) {
        skip(name, &format!("there is no {}", missing.display()));
        return Ok(None);
    }
    let vocab = Model::open(&file.display().to_string())?.config()?.vocab_size;
    Ok(Some(Reference::read(reference, vocab)?))
}

/// The code for a GPU, on the emulator.
fn emulated(
    model: &'static str,
    [file, reference]: [PathBuf; 2],
    dtype: DType,
    architecture: &'static Architecture,
) -> Trial {
    let name = format!("reference {model} {dtype} on ptx-emulator:{}", machine(architecture));
    Trial::test(name.clone(), move || {
        let Some(reference) = read(&name, &file, &reference)? else { return Ok(()) };
        let folder = tempfile::tempdir()?;
        let artifact = compile_model(&file, &folder.path().join("model.llamac"), dtype, architecture.name)?;
        let sm: Sm = architecture.cpu.parse()?;
        let mut program = PtxEmulator { sm, seed: 1, sums: Sums::Truncated }.open(&artifact)?;
        let mut honest = InterpretedProgram::load(&artifact, Rounding::Stored)?;
        let mut exact = InterpretedProgram::load(&artifact, Rounding::Exact)?;
        let mut found = Logits::default();
        found.judge(&mut program, [&mut honest, &mut exact], &reference, dtype)??;
        let counts = program.counts().total();
        let ran = |class: Class| counts.instructions[class as usize];
        // Few rows are multiplied by warps for themselves, on every GPU.
        assert_eq!(ran(Class::Matrix) > 0, dtype == DType::BF16, "products of warps");
        let groups = dtype == DType::BF16 && architecture.warpgroups;
        for class in [Class::MatrixGroup, Class::BulkCopy] {
            assert_eq!(ran(class) > 0, groups, "{class:?}: {}", ran(class));
        }
        let Logits { share, near_ties, steps, .. } = found;
        println!("{name}: {share:.3} of the bound, {near_ties} near ties in {steps} greedy steps");
        Ok(())
    })
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

    let mut found = Logits::default();
    for (number, prompt) in reference.prompts.iter().enumerate() {
        let at = |e: &dyn std::fmt::Display| format!("{level}, prompt {number}: {e}");
        let logits = all_logits(program, &prompt.tokens, None)?;
        found.prompt(number, prompt, &logits, program.vocab(), dtype).map_err(|e| at(&e))?;
        same_bits(program, &prompt.tokens, &logits).map_err(|e| at(&e))?;
        if all_logits(two.as_mut(), &prompt.tokens, None)? != logits {
            return Err(at(&"two workers give other bits than one").into());
        }
        let mut interpreter = Interpreter.load(&artifact)?;
        found.greedy(number, [program, interpreter.as_mut()], prompt)?.map_err(|e| at(&e))?;
    }
    let mut said = String::new();
    if level == "cpu:native" {
        let of_interpreter = other_devices(&artifact, reference, dtype)?;
        match dtype {
            DType::F32 => said = format!("interpreter {:.3}, ", of_interpreter.share),
            _ => found.spread(&of_interpreter)?,
        }
    }
    let Logits { share, near_ties, steps, .. } = found;
    if share > 0.0 {
        said += &format!("{share:.3} of the bound, ");
    }
    println!("{name} on {level}: {said}{near_ties} near ties in {steps} steps");
    Ok(())
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
        measured: None,
        cubin: false,
        keep: None,
    };
    compile::compile(&options, out, &mut |_| ControlFlow::Continue(()))?;
    Ok(Artifact::open(out)?)
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

/// The interpreter keeps its own bound in f32, and `null` finds nothing wrong. Gives what the interpreter came to.
fn other_devices(artifact: &Artifact, reference: &Reference, dtype: DType) -> Checked<Logits> {
    let (mut interpreter, mut null) = (Interpreter.load(artifact)?, Null.load(artifact)?);
    let mut of_interpreter = Logits::default();
    for (number, prompt) in reference.prompts.iter().enumerate() {
        let logits = all_logits(interpreter.as_mut(), &prompt.tokens, None)?;
        let judged = of_interpreter.prompt(number, prompt, &logits, interpreter.vocab(), dtype);
        judged.map_err(|e| format!("interpreter: {e}"))?;
        if all_logits(null.as_mut(), &prompt.tokens, Some(3))?.len() != logits.len() {
            return Err("null gives another number of logits".into());
        }
    }
    Ok(of_interpreter)
}
