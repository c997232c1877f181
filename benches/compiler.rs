//! How long compiling takes, stage by stage, and a step of the built-in model: criterion, so that two versions can be compared.
//!
//! `cargo bench --bench compiler -- [FILTER]`

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ir::DType;
use llamac::compile::{self, Options};
use llamac::model::{BUILTIN, Model};
use llamac::pipeline::{Request, lower};
use llamac::weights::{self, Source};
use models::{Config, ReadError};
use runtime::artifact::Artifact;
use runtime::cpu::Cpu;
use runtime::device::{Device, Step, Want, feed};
use std::hint::black_box;
use std::ops::ControlFlow;

const TARGET: &str = "cpu:x86-64-v4";

fn request(config: &Config) -> Request<'_> {
    Request { config, dtype: DType::BF16, context: 2048.min(config.context), measured: None }
}

fn preset(name: &str) -> Config {
    models::preset(name).expect("a preset's name")
}

/// Config to kernels and plan; kernels to objects; the plan's text.
fn stages(c: &mut Criterion) {
    let level = codegen::cpu::level(TARGET).expect("a level");
    for name in ["smollm2-135m", "llama-7b", "llama-65b"] {
        let config = preset(name);
        c.bench_function(&format!("passes {name}"), |b| b.iter(|| lower(&request(&config), &level.target)));
    }
    let config = preset("llama-7b");
    let code = compile::lower(&request(&config), TARGET, false).expect("the preset compiles");
    let mut slow = c.benchmark_group("codegen");
    slow.sample_size(10);
    slow.bench_function("llama-7b", |b| {
        b.iter(|| codegen::cpu::compile(&code.llvm, &level, codegen::cpu::Form::Object));
    });
    slow.finish();
    let (plan, text) = (&code.lowered.plan, code.lowered.plan.to_string());
    let mut texts = c.benchmark_group("plan text");
    texts.throughput(Throughput::Bytes(text.len() as u64));
    texts.bench_function("print", |b| b.iter(|| plan.to_string()));
    texts.bench_function("parse", |b| b.iter(|| ir::plan::parse::parse(black_box(&text))));
    texts.finish();
}

/// Weights into panels.
fn packing(c: &mut Criterion) {
    let Ok(Model::Checkpoint(checkpoint)) = Model::open(BUILTIN) else { panic!("the built-in model opens") };
    let level = codegen::cpu::level(TARGET).expect("a level");
    let plan = lower(&request(&checkpoint.config), &level.target).expect("it compiles").plan;
    let mut group = c.benchmark_group("pack weights");
    group.throughput(Throughput::Bytes(plan.weight_bytes() as u64));
    group.bench_function(BUILTIN, |b| {
        b.iter(|| {
            weights::write::<ReadError>(&plan, &Source::Checkpoint(&checkpoint), &mut |_| Ok(()), &mut |_| {})
        });
    });
    group.finish();
}

/// A prompt of 128 tokens, and one token after it.
fn steps(c: &mut Criterion) {
    let Ok(Model::Checkpoint(checkpoint)) = Model::open(BUILTIN) else { panic!("the built-in model opens") };
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("builtin.llamac");
    let options = Options {
        model: BUILTIN.to_string(),
        config: &checkpoint.config,
        weights: Some(Source::Checkpoint(&checkpoint)),
        tokenizer: None,
        chat_template: None,
        dtype: DType::BF16,
        context: checkpoint.config.context,
        targets: vec!["cpu:native".to_string()],
        taps: false,
        measured: None,
        cubin: false,
        keep: None,
    };
    compile::compile(&options, &file, &mut |_| ControlFlow::Continue(())).expect("it compiles");
    let artifact = Artifact::open(&file).expect("it was just written");
    let mut program = Cpu { threads: runtime::pool::physical_cores() }.load(&artifact).expect("it runs here");
    let prompt: Vec<i32> = (0..128).collect();
    let mut group = c.benchmark_group(BUILTIN);
    group.throughput(Throughput::Elements(prompt.len() as u64));
    group.bench_function("prefill 128", |b| {
        let mut state = program.state().expect("a cache");
        b.iter(|| {
            state.truncate(0);
            feed(program.as_mut(), &prompt, None, Want::Token, &mut state)
        });
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("decode", |b| {
        let mut state = program.state().expect("a cache");
        feed(program.as_mut(), &prompt, None, Want::Token, &mut state).expect("it fits");
        b.iter(|| {
            state.truncate(prompt.len());
            program.run(&Step { tokens: &[1], want: Want::Token }, &mut state)
        });
    });
    group.finish();
}

criterion_group!(benches, stages, packing, steps);
criterion_main!(benches);
