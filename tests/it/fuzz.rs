//! Texts and artifacts damaged at random: an error or something that verifies, never a panic. A bounded number of cases, the
//! same each time; `PROPTEST_CASES` asks for more.
//!
//! * Graph text through every pass, as `opt` runs them, with the verifier after each.
//! * Kernel text and plan text: what verifies comes back from its own text.
//! * Traces: what is read comes back from its own text.
//! * Machine code of GPUs: what is read has blocks and loops.
//! * Artifacts with valid digests, as a forger makes them, and something wrong in manifest, plan, graph, tokenizer or
//!   template: everything but running them.
//!
//! Files of models are damaged in `models/tests/it/fuzz.rs`, headers of artifacts in `runtime/tests/it/artifact.rs`.

use crate::damage::{Damage, config, damage, damaged};
use crate::gguf_file::Gguf;
use ir::DType;
use ir::families::LowerError;
use ir::graph::Graph;
use ir::passes::lower::Kernels;
use ir::passes::{self, Run};
use ir::target::Target;
use libtest_mimic::{Failed, Trial};
use llamac::compare::trace::part::part;
use llamac::compare::trace::text::parse as parse_trace;
use llamac::compile::{Stage, lower};
use llamac::judge::StoredBound;
use llamac::model::Model;
use llamac::pipeline::Request;
use llamac::profile::gpus::GPUS;
use llamac::profile::steady::Steady;
use llamac::sass::{parse as parse_sass, rules};
use models::{Config, Tokenizer};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use runtime::artifact::{Artifact, ArtifactWriter};
use runtime::device::{Device, Step, Want};
use runtime::interpreter::Interpreter;
use runtime::manifest::{CHAT_TEMPLATE, GRAPH, Manifest, TOKENIZER, WEIGHTS};
use runtime::null::Null;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub fn trials() -> Vec<Trial> {
    type Test = fn() -> Result<(), Failed>;
    let tests: [(&str, Test); 6] = [
        ("graphs", graphs),
        ("kernels", kernels),
        ("plans", plans),
        ("traces", traces),
        ("machine code", machine_code),
        ("artifacts", artifacts),
    ];
    tests.into_iter().map(|(name, test)| Trial::test(format!("fuzz {name}"), test)).collect()
}

/// Runs `check` on so many damaged versions of `texts`.
fn fuzz(texts: &[String], cases: u32, check: impl Fn(&str)) -> Result<(), Failed> {
    let strategy = (0..texts.len(), prop::collection::vec(damage(), 1..4));
    let outcome = TestRunner::new(config(cases)).run(&strategy, |(which, damages)| {
        if let Ok(text) = String::from_utf8(damaged(texts[which].as_bytes(), &damages)) {
            check(&text);
        }
        Ok(())
    });
    outcome.map_err(|error| error.to_string().into())
}

/// The text of a stage of a model of one layer, and the target that it is for.
fn stage(stage: Stage) -> (String, Target) {
    let file: models::FileBytes = Arc::new(Gguf::small().finish());
    let checkpoint =
        models::Checkpoint::open(Path::new("m.gguf"), &|_| Ok(file.clone())).expect("a right file");
    let request = Request { config: &checkpoint.config, dtype: DType::F32, context: 64, measured: None };
    let code = lower(&request, "cpu:x86-64-v3", false).expect("a known target");
    (code.text(&request, stage).expect("no LLVM is asked"), code.backend.target())
}

/// The texts below a folder of `tests/`.
fn committed(folder: &str) -> Vec<String> {
    fn list(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).expect("a folder of texts") {
            let path = entry.expect("an entry").path();
            if path.is_dir() { list(&path, files) } else { files.push(path) }
        }
    }
    let mut files = Vec::new();
    list(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder), &mut files);
    files.sort();
    files.iter().map(|file| fs::read_to_string(file).expect("a text")).collect()
}

fn graphs() -> Result<(), Failed> {
    let (whole, target) = stage(Stage::Graph);
    // One entry point at a time is small enough for a damage to matter.
    let mut texts: Vec<String> = whole.split_inclusive("\n}\n").map(str::to_string).collect();
    texts.extend(committed("ir"));
    fuzz(&texts, 6000, |text| {
        let Ok(mut graphs) = ir::parse::graphs(text) else { return };
        if graphs.iter().all(|graph| ir::verify::verify(graph).is_ok()) {
            let _ = through_passes(&mut graphs, &target);
        }
    })
}

/// Every pass up to kernels; what a pass makes must verify.
fn through_passes(graphs: &mut [Graph], target: &Target) -> Result<(), LowerError> {
    for pass in &passes::PASSES {
        match pass.run {
            Run::Graph(run) => graphs.iter_mut().try_for_each(|graph| run(graph, target))?,
            Run::Graphs(run) => run(&mut graphs.iter_mut().collect::<Vec<_>>()),
            Run::Kernels => {
                let mut kernels = Kernels::default();
                for graph in graphs.iter().filter(|graph| !graph.groups.is_empty()) {
                    passes::lower::lower(graph, target, &mut kernels)?;
                }
                for kernel in &kernels.list {
                    let found = ir::kernel::verify::verify(kernel);
                    found.unwrap_or_else(|error| panic!("after lower: {error}\n{kernel}"));
                }
            }
            Run::Plan => {}
        }
        for graph in graphs.iter() {
            let found = ir::verify::verify(graph);
            found.unwrap_or_else(|error| panic!("after {}: {error}\n{graph}", pass.name));
        }
    }
    Ok(())
}

fn kernels() -> Result<(), Failed> {
    let (whole, _) = stage(Stage::Kernels);
    let texts: Vec<String> = whole.split("\n\n").map(str::to_string).collect();
    fuzz(&texts, 6000, |text| {
        let Ok(kernels) = ir::kernel::parse::parse(text) else { return };
        for kernel in kernels.iter().filter(|kernel| ir::kernel::verify::verify(kernel).is_ok()) {
            let printed = kernel.to_string();
            let again = ir::kernel::parse::parse(&printed).expect("its own text");
            assert_eq!(again[0].to_string(), printed);
        }
    })
}

fn plans() -> Result<(), Failed> {
    let mut texts = committed("plan");
    texts.push(stage(Stage::Plan).0);
    fuzz(&texts, 6000, |text| {
        let Ok(plan) = ir::plan::parse::parse(text) else { return };
        if ir::plan::verify::verify(&plan).is_ok() {
            assert_eq!(ir::plan::parse::parse(&plan.to_string()).as_ref(), Ok(&plan));
            let _ = (plan.totals(), plan.bytes_per_token(), plan.launches_per_token());
        }
    })
}

fn traces() -> Result<(), Failed> {
    let values = [
        "value l0.qr bf16 3x4x16 00112233445566778899aabbccddeeff 7:0.25 99:-1.5 150:NaN",
        "value token i32 1 00112233445566778899aabbccddeeff 0:17",
        "value x f32 - 00112233445566778899aabbccddeeff 0:-inf",
    ];
    let text = format!(
        "llamac trace 1\nmodel a model\ndtype bf16\ntarget cpu:x86-64-v4\narithmetic fma\ncompiler 0.1.0\n\
         tokens 1 5 7 2\nkernel q.1 dot mr 12, nr 2, kc 0\nkernel token sample \nstep logits prefill 3 0\n\
         launch l0.q q.1\n{}\nlaunch token token\n{}\nstep token decode 1 3\nlaunch l0.q q.1\n{}\nend 3\n",
        values[0], values[1], values[2]
    );
    let right = parse_trace(&text)?;
    assert_eq!(right.to_string(), text);
    fuzz(&[text], 20000, |text| {
        let Ok(trace) = parse_trace(text) else { return };
        assert_eq!(parse_trace(&trace.to_string()).map(|again| again.to_string()), Ok(trace.to_string()));
        // Comparing must not trip over what a file says, either.
        let _ = part(&right, &trace, &mut |_, _| Ok(Some(StoredBound::new(DType::BF16, &[1.0], &[2.0]))));
        let _ = part(&trace, &right, &mut |_, _| Ok(None));
    })
}

/// A part of an artifact that a forger changes.
#[derive(Clone, Copy, Debug)]
enum Part {
    Manifest,
    Section(&'static str),
}

/// What a damaged text says is counted, if it can be read at all.
fn machine_code() -> Result<(), Failed> {
    let text = include_str!("../sass/specialised.sass").to_string();
    fuzz(&[text], 5000, |text| {
        for code in parse_sass(text).unwrap_or_default() {
            let _ = rules::specialised(&code).and_then(|()| rules::pipelined(&code));
            if let Some(steady) = Steady::of(&code, 384, 1.0, &GPUS[0]) {
                assert!(steady.serial() <= 1.0 && steady.overlapped() <= 1.0, "{steady:?}");
            }
        }
    })
}

fn artifacts() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let (right, forged) = (folder.path().join("right.llamac"), folder.path().join("forged.llamac"));
    let Model::Checkpoint(builtin) = Model::open("builtin")? else { return Err("no checkpoint".into()) };
    let options = llamac::compile::Options {
        model: "builtin".to_string(),
        config: &builtin.config,
        weights: None,
        tokenizer: builtin.tokenizer.as_ref().map(|t| &*t.json),
        chat_template: Some("{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"),
        dtype: DType::BF16,
        context: 64,
        targets: vec!["cpu:x86-64-v3".to_string()],
        taps: false,
        measured: None,
        cubin: false,
        keep: None,
    };
    llamac::compile::compile(&options, &right, &mut |_| std::ops::ControlFlow::Continue(()))?;
    let right = Artifact::open(&right)?;
    let mut parts = vec![Part::Manifest];
    parts.extend(["plan.cpu:x86-64-v3", GRAPH, TOKENIZER, CHAT_TEMPLATE].map(Part::Section));
    let strategy = (prop::sample::select(parts), prop::collection::vec(damage(), 0..4));
    let outcome = TestRunner::new(config(1500)).run(&strategy, |(part, damages)| {
        forge(&right, part, &damages, &forged);
        let artifact = Artifact::open(&forged).expect("its digests are right");
        look_at(&artifact);
        Ok(())
    });
    outcome.map_err(|error| error.to_string().into())
}

/// Writes an artifact as `right`, with one part damaged and digests to match.
fn forge(right: &Artifact, part: Part, damages: &[Damage], file: &Path) {
    let mut writer = ArtifactWriter::create(file, None).expect("room");
    for section in right.sections() {
        let contents = right.section(&section.name).expect("a section of the table");
        let contents = match part {
            Part::Section(name) if name == section.name => damaged(contents, damages),
            Part::Section(_) | Part::Manifest => contents.to_vec(),
        };
        let mut out = writer.section(&section.name).expect("a name");
        out.append(&contents).expect("room");
        out.end().expect("room");
    }
    // Devices look at the plan only when the weights that it wants are there.
    let mut out = writer.section(WEIGHTS).expect("a name");
    out.append(&vec![0; 4 << 20]).expect("room");
    out.end().expect("room");
    let manifest = match part {
        Part::Manifest => damaged(right.manifest_bytes(), damages),
        Part::Section(_) => right.manifest_bytes().to_vec(),
    };
    // A manifest that is no JSON cannot be written; `Artifact::manifest` is tried on such below.
    let value: serde_json::Value = serde_json::from_slice(&manifest).unwrap_or_default();
    writer.finish(&value).expect("room");
}

/// All that verbs do with an artifact before its code runs.
fn look_at(artifact: &Artifact) {
    let model = Model::Artifact(Box::new(artifact.clone()));
    if let Ok(config) = model.config() {
        look_at_config(&config);
    }
    if let Some(Ok(tokenizer)) = model.tokenizer().map(Tokenizer::from_json)
        && let Ok(ids) = tokenizer.encode("Once upon a time, é", true)
    {
        let _ = tokenizer.decode(&ids, false);
    }
    if let Some(template) = model.chat_template() {
        let _ = models::render_chat(&template, &[], "<s>", "</s>", true);
    }
    let Ok(manifest) = artifact.manifest::<Manifest>() else { return };
    let _ = runtime::cpu::choose(artifact.file(), &manifest);
    let _ = Interpreter.load(artifact);
    let Ok(mut program) = Null.load(artifact) else { return };
    let Ok(mut state) = program.state() else { return };
    for (tokens, want) in [(&[1, 2, 3][..], Want::Nothing), (&[4], Want::Token), (&[5, 6], Want::AllLogits)] {
        // Small enough to be no trial of memory.
        if program.vocab() < 1 << 20 {
            let _ = program.run(&Step { tokens, want }, &mut state);
        }
    }
}

fn look_at_config(config: &Config) {
    config.parameters();
    config.rope.attention_factor();
}
