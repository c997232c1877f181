//! The device on a driver that the PTX emulator stands behind: all but NVIDIA's driver itself.
//!
//! The model: `logits = table[token of each position so far], summed, + table`; the greedy choice is the position.

use super::driver::{NoDriver, is_out_of_memory, is_sticky};
use super::*;
use crate::artifact::ArtifactWriter;
use crate::conformance::{self, Machine};
use crate::device::feed;
use crate::emulator::{Options, Sm, Sums};
use crate::launcher::Launcher;
use crate::manifest::GPU_WEIGHTS;
use crate::ptx_emulator::PtxEmulator;
use fake::with;
use ir::dim::MAX_SYMBOLS;
use ir::plan;
use libloading::Library;
use std::path::Path;
use std::process::Command;

const PLAN: &str = include_str!("tests/tiny.plan");
const KERNELS: &str = include_str!("tests/tiny.kernels");
const PTX: &str = include_str!("tests/tiny.ptx");

fn table(token: usize) -> f32 {
    (token * token) as f32
}

/// What the model says after these tokens.
fn logits(tokens: &[i32]) -> Vec<f32> {
    let sum: f32 = tokens.iter().map(|&token| table(token as usize)).sum();
    (0..16).map(|v| sum + table(v)).collect()
}

/// The model with other sections beside or instead of its own.
fn artifact(folder: &Path, other: &[(&str, &str)]) -> Artifact {
    let file = folder.join("tiny.llamac");
    let mut writer = ArtifactWriter::create(&file, None).unwrap();
    let weights: Vec<u8> = (0..16).flat_map(|token| table(token).to_le_bytes()).collect();
    let own = [
        ("plan.cuda:sm_80", PLAN),
        ("kernels.cuda:sm_80", KERNELS),
        ("code.cuda:sm_80", PTX),
        ("plan.cuda:sm_80-99k", PLAN),
        ("kernels.cuda:sm_80-99k", KERNELS),
        ("code.cuda:sm_80-99k", PTX),
    ];
    let own = own.into_iter().filter(|(name, _)| !other.iter().any(|(other, _)| name == other));
    let texts = own.chain(other.iter().copied()).map(|(name, text)| (name, text.as_bytes()));
    for (name, bytes) in texts.chain([(GPU_WEIGHTS, &weights[..])]) {
        let mut section = writer.section(name).unwrap();
        section.append(bytes).unwrap();
        section.end().unwrap();
    }
    writer.finish(&manifest()).unwrap();
    Artifact::open(&file).unwrap()
}

fn target(name: &str, shared_bytes: usize) -> TargetCode {
    TargetCode {
        name: name.to_string(),
        abi: gpu::ABI,
        requires: vec!["sm_80".to_string()],
        shared_bytes,
        arch: "nvptx64".to_string(),
        weights: GPU_WEIGHTS.to_string(),
        ptxas: None,
    }
}

fn manifest() -> Manifest {
    Manifest {
        model: "tiny".to_string(),
        config: serde_json::json!({}),
        dtype: "f32".to_string(),
        context: 16,
        weights: true,
        targets: vec![target("cuda:sm_80-99k", 99 << 10), target("cuda:sm_80", 163 << 10)],
        taps: false,
        compiler: String::new(),
        llvm: String::new(),
        bos: None,
        eos: Vec::new(),
    }
}

fn cuda() -> Cuda {
    Cuda::of(fake::driver().unwrap(), 0).unwrap()
}

fn program(other: &[(&str, &str)]) -> Result<CudaProgram, DeviceError> {
    let folder = tempfile::tempdir().unwrap();
    cuda().open(&artifact(folder.path(), other))
}

fn count(name: &str) -> usize {
    with(|fake| fake.calls.iter().filter(|&&call| call == name).count())
}

#[test]
fn prompts_and_steps_give_what_the_model_says() {
    let mut program = program(&[]).unwrap();
    let mut state = program.state().unwrap();
    let mut other = program.state().unwrap();
    let mut tokens = vec![3, 1, 2, 9, 4, 4];
    // A step of four, one of two; then one by one, by turns with another conversation.
    let outputs = feed(&mut program, &tokens, None, Want::Logits, &mut state).unwrap();
    assert_eq!(outputs.logits, logits(&tokens));
    for token in [7, 0, 15] {
        let outputs = program.run(&Step { tokens: &[token], want: Want::Logits }, &mut other).unwrap();
        assert_eq!(outputs.logits.len(), 16);
        tokens.push(token);
        let outputs = program.run(&Step { tokens: &[token], want: Want::Logits }, &mut state).unwrap();
        assert_eq!(outputs, StepOutputs { token: None, logits: logits(&tokens) });
    }
    assert_eq!(state.past(), 9);
    let outputs = program.run(&Step { tokens: &[5], want: Want::Token }, &mut other).unwrap();
    assert_eq!(outputs, StepOutputs { token: Some(3), logits: vec![] });
    // One graph a state, whatever the position; prompts launch their kernels one by one.
    assert_eq!((count("cuGraphInstantiateWithFlags"), count("cuGraphLaunch")), (2, 7));
    // A recorded step ends with one that goes on to the next.
    assert_eq!(count("cuLaunchKernelEx"), 2 * 2 + 2 * (2 + 1));
    drop((program, state, other));
    assert_eq!(with(|fake| fake.live), 0, "something was not given back");
}

#[test]
fn the_next_step_finds_its_token_on_the_gpu() {
    let mut program = program(&[]).unwrap();
    let (mut state, mut other) = (program.state().unwrap(), program.state().unwrap());
    let mut step = |token: i32, state: &mut State| {
        let before = (count("cuMemcpyHtoD_v2"), count("cuMemcpyDtoH_v2"));
        let outputs = program.run(&Step { tokens: &[token], want: Want::Token }, state).unwrap();
        let sent = count("cuMemcpyHtoD_v2") - before.0;
        assert_eq!(count("cuMemcpyDtoH_v2") - before.1, 1);
        (outputs.token.unwrap(), sent)
    };
    let mut tokens = vec![3];
    for number in 0..5 {
        let (next, sent) = step(*tokens.last().unwrap(), &mut state);
        // Nothing but the first token is sent. (The model chooses the position.)
        assert_eq!((next, sent), (number, if number == 0 { 2 } else { 0 }));
        tokens.push(next);
    }
    // Another token, another conversation, or the same one at another place: they are sent.
    let wanted = tokens[5];
    let different = (wanted + 1) % 16;
    assert_eq!(step(different, &mut state).1, 2);
    assert_eq!(step(wanted, &mut other).1, 2);
    let next = step(5, &mut other).0;
    other.truncate(0);
    assert_eq!(step(next, &mut other).1, 2);
    // What was kept on the GPU is what the cache holds.
    tokens[5] = different;
    tokens.push(9);
    let outputs = program.run(&Step { tokens: &[9], want: Want::Logits }, &mut state).unwrap();
    assert_eq!(outputs.logits, logits(&tokens));
}

#[test]
fn a_step_launches_the_same_at_every_position() {
    let code = |kernels: &str| {
        let plan = plan::parse::parse(PLAN).unwrap();
        GpuCode::new(plan, ir::kernel::parse::parse(kernels).unwrap(), PTX.to_string())
    };
    let addresses: Vec<u64> = (1..=8).map(|n| n << 8).collect();
    let calls = |code: &GpuCode, entry, t, p| code.calls(entry, &addresses, &[t, p, 0, 0], 16).concat();
    let own = code(KERNELS);
    let (first, later) = (calls(&own, 0, 1, 0), calls(&own, 0, 1, 1000));
    assert_eq!(first, later);
    assert_eq!((first[0].ctas, first[1].shared_bytes, first[1].params.len()), (1, 64 << 10, 5 * 8 + 2 * 4));
    assert!(own.is_constant(0));
    // A prompt's length is a parameter, so a prompt is not recorded.
    assert_ne!(calls(&own, 1, 2, 0), calls(&own, 1, 3, 0));
    assert!(!own.is_constant(1));
    // A kernel that reads the position shows, and is not recorded.
    let other = code(&KERNELS.replace("load %positions[T - 1]", "load %positions[T - 1 + P - P]"));
    assert_ne!(calls(&other, 0, 1, 0), calls(&other, 0, 1, 1000));
    assert!(!other.is_constant(0));
}

#[test]
fn grids_that_wait_for_those_before_may_begin_early() {
    let begin = "\t.reg .b64 %rd<12>;\n";
    let ptx = PTX.replace(begin, &format!("{begin}\tgriddepcontrol.wait;\n"));
    let code = |ptx: &str| {
        let kernels = ir::kernel::parse::parse(KERNELS).unwrap();
        GpuCode::new(plan::parse::parse(PLAN).unwrap(), kernels, ptx.to_string())
    };
    let calls = |ptx: &str, p| code(ptx).calls(0, &[0; 8], &[1, p, 0, 0], 16).concat();
    let early = |ptx: &str| calls(ptx, 0).iter().map(|call| call.dependent).collect::<Vec<_>>();
    assert_eq!(calls(&ptx, 0), calls(&ptx, 1000));
    // What comes before the first is over; who does not wait must not begin early.
    assert_eq!((early(&ptx), early(PTX)), (vec![false, true], vec![false, false]));

    let folder = tempfile::tempdir().unwrap();
    let artifact = artifact(folder.path(), &[("code.cuda:sm_80", &ptx)]);
    fake::driver().unwrap();
    // Below CUDA 12.3 a graph cannot say that a grid may begin early. The last node does not wait.
    for (version, early) in [(12_020, false), (12_030, true)] {
        let driver = fake::restart_as(Version(version)).unwrap();
        let mut program = Cuda::of(driver, 0).unwrap().open(&artifact).unwrap();
        let mut state = program.state().unwrap();
        for tokens in [&[3, 1][..], &[2], &[9]] {
            let outputs = program.run(&Step { tokens, want: Want::Logits }, &mut state).unwrap();
            assert_eq!(outputs.logits.len(), 16);
        }
        let graph = with(|fake| fake.graphs.pop().unwrap());
        assert_eq!(graph.iter().map(|node| node.grid.dependent).collect::<Vec<_>>(), [false, early, false]);
    }
}

#[test]
fn launches_one_by_one_give_the_same_and_are_timed() {
    let mut program = program(&[]).unwrap();
    let mut state = program.state().unwrap();
    let mut spans = Vec::new();
    let mut cache = Vec::new();
    let mut after = |tap: Tap<'_>| {
        spans.push(tap.span());
        cache = tap.bytes(3).to_vec();
    };
    let step = Step { tokens: &[3, 5], want: Want::Logits };
    let outputs = program.run_tapped(&step, &mut state, &mut after).unwrap();
    assert_eq!(outputs.logits, logits(&[3, 5]));
    // The fake's clock: a millisecond a launch.
    assert_eq!(spans, [0.0..1e-3, 1e-3..2e-3]);
    let cached: Vec<f32> = cache.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(cached[..3], [9.0, 25.0, 0.0]);
}

#[test]
fn a_kernel_with_a_barrier_is_two_grids_of_one_launch() {
    // Behind the barrier the token is doubled.
    let behind = "  barrier
  parallel %two in 0..1 {
    if lt(thread, 1) {
      store %token[0] = load %token[0] : i32 + load %token[0] : i32
    }
  }
}
";
    let kernels = KERNELS.strip_suffix("}\n").unwrap().to_string() + behind;
    let params = PTX.rsplit_once("k_next(").unwrap().1.split_once('\n').unwrap().0;
    let ptx = format!(
        "{PTX}
.visible .entry k_next$$1({params}
{{
	.reg .pred %p<2>;
	.reg .b32 %r<3>;
	.reg .b64 %rd<2>;
	mov.u32 %r2, %tid.x;
	setp.ne.u32 %p1, %r2, 0;
	@%p1 bra DONE;
	ld.param.b64 %rd1, [p4];
	ld.global.b32 %r1, [%rd1];
	add.s32 %r1, %r1, %r1;
	st.global.b32 [%rd1], %r1;
DONE:
	ret;
}}
"
    );
    let mut program = program(&[("kernels.cuda:sm_80", &kernels), ("code.cuda:sm_80", &ptx)]).unwrap();
    let mut state = program.state().unwrap();
    let mut spans = Vec::new();
    let step = Step { tokens: &[3], want: Want::Token };
    for expected in [0, 2] {
        let outputs = program.run(&step, &mut state).unwrap();
        assert_eq!(outputs.token, Some(expected));
    }
    assert_eq!(count("cuLaunchKernelEx"), 3 + 1, "recorded once");
    let outputs = program.run_tapped(&step, &mut state, &mut |tap| spans.push(tap.span())).unwrap();
    assert_eq!(outputs.token, Some(4));
    assert_eq!(spans, [0.0..1e-3, 1e-3..3e-3]);
}

#[test]
fn a_buffer_that_cannot_be_read_fails_the_step() {
    let mut program = program(&[]).unwrap();
    let mut state = program.state().unwrap();
    let mut after = |tap: Tap<'_>| {
        with(|fake| fake.fault = Some(("cuMemcpyDtoH_v2", 0, 1)));
        assert_eq!(tap.bytes(3).len(), 64);
    };
    let error =
        program.run_tapped(&Step { tokens: &[1], want: Want::Token }, &mut state, &mut after).unwrap_err();
    assert_eq!(error.to_string(), "device cuda:0: cuMemcpyDtoH_v2: error 1");
    assert_eq!(state.past(), 0);
}

#[test]
fn memory_is_counted_before_it_is_allocated() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = artifact(folder.path(), &[]);
    let cuda = cuda();
    // Weights, arena, two inputs and a cache.
    let needed = 64 + 128 + 2 * 64 + 64;
    with(|fake| fake.free = needed - 1);
    let error = cuda.open(&artifact).unwrap_err();
    assert!(matches!(error, DeviceError::OutOfMemory { needed: 384, available: 383 }), "{error}");
    assert_eq!(count("cuMemAlloc_v2"), 0);
    with(|fake| fake.free = needed);
    let program = cuda.open(&artifact).unwrap();
    let _first = program.state().unwrap();
    let error = program.state().unwrap_err();
    assert!(matches!(error, DeviceError::OutOfMemory { needed: 64, available: 0 }), "{error}");
}

#[test]
fn memory_that_others_took_meanwhile_is_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = artifact(folder.path(), &[]);
    let cuda = cuda();
    with(|fake| fake.fault = Some(("cuMemAlloc_v2", 2, 2)));
    let error = cuda.open(&artifact).unwrap_err();
    assert!(matches!(error, DeviceError::OutOfMemory { needed: 64, .. }), "{error}");
    assert_eq!(with(|fake| fake.live), 0, "something was not given back");
}

#[test]
fn what_fails_at_load_gives_back_what_was_made() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = artifact(folder.path(), &[]);
    let cuda = cuda();
    for call in
        ["cuStreamCreate", "cuModuleLoadDataEx", "cuModuleGetFunction", "cuMemGetInfo_v2", "cuMemcpyHtoD_v2"]
    {
        with(|fake| fake.fault = Some((call, 0, 1)));
        let said = cuda.open(&artifact).unwrap_err().to_string();
        assert!(said.ends_with(&format!("{call}: error 1")), "{said}");
        assert_eq!(with(|fake| fake.live), 0, "{call}: something was not given back");
    }
}

#[test]
fn after_a_fault_of_a_kernel_all_is_refused() {
    // A write before the buffer.
    let ptx =
        PTX.replace("st.global.b32 [%rd5], %r3;", "sub.s64 %rd5, %rd5, 4096;\n\tst.global.b32 [%rd5], %r3;");
    let mut program = program(&[("code.cuda:sm_80", &ptx)]).unwrap();
    let mut state = program.state().unwrap();
    let step = Step { tokens: &[1], want: Want::Token };
    let error = program.run(&step, &mut state).unwrap_err();
    let said = "launch of a kernel of @decode failed: cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS";
    assert_eq!(error.to_string(), said);
    assert_eq!(state.past(), 0);
    // The driver is not asked again.
    let calls = with(|fake| fake.calls.len());
    let error = program.run(&step, &mut state).unwrap_err();
    assert!(
        matches!(&error, DeviceError::Driver { said, .. } if said.contains("start the program again")),
        "{error}"
    );
    assert_eq!(with(|fake| fake.calls.len()), calls);
    // Launch by launch, the kernel has a name.
    let mut program = self::program(&[("code.cuda:sm_80", &ptx)]).unwrap();
    let mut state = program.state().unwrap();
    let error = program.run_tapped(&step, &mut state, &mut |_| ()).unwrap_err();
    assert!(matches!(&error, DeviceError::Launch { kernel, .. } if kernel == "next"), "{error}");
}

#[test]
fn a_recording_that_fails_leaves_a_stream_that_works() {
    let mut program = program(&[]).unwrap();
    let mut state = program.state().unwrap();
    let step = Step { tokens: &[1], want: Want::Logits };
    with(|fake| fake.fault = Some(("cuLaunchKernelEx", 1, 701)));
    let error = program.run(&step, &mut state).unwrap_err();
    assert_eq!(error.to_string(), "launch of next failed: cuLaunchKernelEx: error 701");
    with(|fake| fake.fault = None);
    assert_eq!(program.run(&step, &mut state).unwrap().logits, logits(&[1]));
    drop((program, state));
    assert_eq!(with(|fake| fake.live), 0, "something was not given back");
}

#[test]
fn a_state_of_another_program_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = artifact(folder.path(), &[]);
    let cuda = cuda();
    let (mut program, other) = (cuda.open(&artifact).unwrap(), cuda.open(&artifact).unwrap());
    let error =
        program.run(&Step { tokens: &[1], want: Want::Token }, &mut other.state().unwrap()).unwrap_err();
    assert!(matches!(error, DeviceError::ForeignState));
}

#[test]
fn what_the_compiler_of_the_driver_says_is_told() {
    let error = program(&[("code.cuda:sm_80", &PTX.replace("shl.b32", "shove.b32"))]).unwrap_err();
    let said = error.to_string();
    assert!(
        said.contains("section `code.cuda:sm_80`: cuModuleLoadDataEx: CUDA_ERROR_INVALID_PTX; "),
        "{said}"
    );
    assert!(said.contains("shove"), "{said}");
    let error = program(&[("code.cuda:sm_80", &PTX.replace("k_next", "k_text"))]).unwrap_err();
    assert!(matches!(&error, DeviceError::Launch { kernel, .. } if kernel == "next"), "{error}");
}

#[test]
fn machine_code_that_the_driver_refuses_leaves_the_ptx() {
    // The fake takes PTX alone, whichever section it is in.
    let cubin = [("cubin.cuda:sm_80", PTX), ("code.cuda:sm_80", "none")];
    program(&cubin).unwrap();
    // One is of the program itself.
    assert_eq!(count("cuModuleLoadDataEx"), 2);
    program(&[("cubin.cuda:sm_80", "\u{7f}ELF")]).unwrap();
    assert_eq!(count("cuModuleLoadDataEx"), 3);
}

#[test]
fn too_much_shared_memory_is_refused_by_name() {
    let kernels = KERNELS.replace("f32[16384]", "f32[45000]");
    let error = program(&[("kernels.cuda:sm_80", &kernels)]).unwrap_err();
    let said = error.to_string();
    assert!(said.contains("launch of next failed: it needs 180096 bytes of shared memory, cuda:0"), "{said}");
}

#[test]
fn shared_memory_of_the_gpu_chooses_the_code() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = artifact(folder.path(), &[("code.cuda:sm_80-99k", "none")]);
    let driver = fake::driver().unwrap();
    let open = |shared_bytes| {
        with(|fake| fake.shared_bytes = shared_bytes);
        Cuda::of(driver, 0).unwrap().open(&artifact).map(drop)
    };
    open(163 << 10).unwrap();
    let said = open(99 << 10).unwrap_err().to_string();
    assert!(said.contains("section `code.cuda:sm_80-99k`"), "{said}");
    let said = open(64 << 10).unwrap_err().to_string();
    let needs = "needs cuda:sm_80-99k (ABI 1, 99 KiB of shared memory) or cuda:sm_80 (ABI 1, 163 KiB of shared memory), ";
    assert!(said.contains(needs), "{said}");
}

#[test]
fn gpus_are_refused_by_number_and_by_age() {
    let driver = fake::driver().unwrap();
    let said = Cuda::of(driver, 1).err().unwrap().to_string();
    assert_eq!(
        said,
        "device cuda:1: the driver has no such GPU; there is cuda:0 Emulated, compute capability 8.0, 1.0 GiB"
    );
    with(|fake| fake.capability = (7, 5));
    let said = Cuda::of(driver, 0).err().unwrap().to_string();
    assert!(
        said.ends_with("compute capability 7.5, 1.0 GiB: compute capability 8.0 or later is needed"),
        "{said}"
    );
}

#[test]
fn weights_are_made_from_a_seed() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = artifact(folder.path(), &[]);
    let logits = |program: &mut dyn Program| {
        let mut state = program.state().unwrap();
        feed(program, &[3, 1, 4], None, Want::Logits, &mut state).unwrap().logits
    };
    let emulator = |seed| {
        let device = PtxEmulator { sm: Sm::Sm80, seed: 0, sums: Sums::default() };
        logits(&mut device.open_filled(&artifact, seed).unwrap())
    };
    let filled = logits(&mut cuda().open_filled(&artifact, 7).unwrap());
    assert!(filled == emulator(7) && filled != emulator(8) && filled.iter().all(|x| x.is_finite()));
}

#[test]
fn forms_of_instructions_run_by_the_driver() {
    let machine = Machine::Gpu(cuda().context().unwrap());
    for form in conformance::forms().into_iter().filter(|form| machine.takes(form)) {
        let results = machine.run(&form).unwrap();
        assert_eq!(conformance::judge(&form, &results), []);
    }
    // What the driver refuses is the form's fault, and says so.
    let form = conformance::forms().swap_remove(0);
    with(|fake| fake.fault = Some(("cuModuleLoadDataEx", 0, 218)));
    let said = machine.run(&form).unwrap_err().to_string();
    assert!(said.starts_with(&form.name) && said.contains("CUDA_ERROR_INVALID_PTX"), "{said}");
}

#[test]
fn uploads_go_in_pieces() {
    let cuda = cuda();
    let context = Context::open(cuda.driver, cuda.gpu).unwrap();
    let bytes: Vec<u8> = (0..context::PIECE_BYTES + 100).map(|n| (n % 251) as u8).collect();
    let buffer = Buffer::zeroed(&context, bytes.len()).unwrap();
    buffer.write(0, &bytes).unwrap();
    assert_eq!(count("cuMemcpyHtoD_v2"), 2);
    let mut read = vec![0; bytes.len()];
    buffer.read(0, &mut read).unwrap();
    assert!(read == bytes);
}

#[test]
fn versions_and_codes_are_what_the_driver_means() {
    assert_eq!(Version(11_080).to_string(), "11.8");
    assert!(Version(11_080) < Version::NEEDED && Version(12_000) >= Version::NEEDED);
    assert!(is_out_of_memory(2) && !is_sticky(2));
    let sticky: Vec<u32> = (0..2000).filter(|&code| is_sticky(code)).collect();
    let expected = [4, 46, 214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 810, 911, 999];
    assert_eq!(sticky, expected);
}

#[test]
fn without_a_driver_there_is_an_error_that_says_what_to_do() {
    // Where there is one, it is used, and there may be a GPU.
    match Driver::load() {
        Ok(driver) => assert!(driver.version >= Version::NEEDED),
        Err(none) => {
            let said = Cuda::new(3).err().unwrap().to_string();
            assert_eq!(said, format!("device cuda:3: {none}"));
            assert!(said.contains("driver"), "{said}");
        }
    }
}

#[test]
fn a_driver_that_is_too_old_is_refused_with_both_versions() {
    let folder = tempfile::tempdir().unwrap();
    let said = |name: &str, code: &str| {
        let (source, library) = (folder.path().join(format!("{name}.c")), folder.path().join(name));
        std::fs::write(&source, code).unwrap();
        // Cargo links by the same program.
        let linked = Command::new("cc").args(["-shared", "-o"]).arg(&library).arg(&source).status().unwrap();
        assert!(linked.success());
        // SAFETY: it has no initialisers.
        Driver::of(&unsafe { Library::new(&library) }.unwrap()).err().unwrap()
    };
    let old = said("old.so", "int cuDriverGetVersion(int *version) { *version = 11080; return 0; }");
    assert_eq!(old, NoDriver::Old { found: Version(11_080) });
    let text = "the driver is of CUDA 11.8, needed is CUDA 12.0: install NVIDIA's driver 525 or later";
    assert_eq!(old.to_string(), text);
    // It says that it is new enough, and a function is missing all the same.
    let part =
        "int cuDriverGetVersion(int *version) { *version = 12000; return 0; } int cuInit() { return 0; }";
    let function = "cuGetErrorName";
    assert_eq!(said("part.so", part), NoDriver::Lacks { found: Version(12_000), function });
    assert_eq!(said("other.so", "int other;"), NoDriver::Absent);
}

#[test]
fn a_driver_that_does_not_start_says_why() {
    fake::driver().unwrap();
    with(|fake| fake.fault = Some(("cuInit", 0, 100)));
    let said = fake::restart().err().unwrap().to_string();
    assert_eq!(said, "the driver does not start: cuInit: CUDA_ERROR_NO_DEVICE");
}

/// `y = 2 x`, one CTA for any number of elements.
const DOUBLE: &str = "kernel @double : elementwise, schedule \"\", 32 threads (T in 1..1) {
  param %x : read f32[64]
  param %y : write f32[64]
  parallel %i in 0..2 {
    let %a = load %x[%i * 32 + thread] : f32
    store %y[%i * 32 + thread] = %a + %a
  }
}
";
const DOUBLE_PTX: &str = ".version 7.4
.target sm_80
.address_size 64
.visible .entry k_double(.param .b64 x, .param .b64 y, .param .b32 T)
{
\t.reg .b32 %r<3>;
\t.reg .b64 %rd<4>;
\tmov.u32 %r1, %tid.x;
\tmul.wide.u32 %rd3, %r1, 4;
\tld.param.b64 %rd1, [x];
\tld.param.b64 %rd2, [y];
\tadd.s64 %rd1, %rd1, %rd3;
\tadd.s64 %rd2, %rd2, %rd3;
\tld.global.b32 %r2, [%rd1];
\tadd.f32 %r2, %r2, %r2;
\tst.global.b32 [%rd2], %r2;
\tld.global.b32 %r2, [%rd1+128];
\tadd.f32 %r2, %r2, %r2;
\tst.global.b32 [%rd2+128], %r2;
\tret;
}
";

#[test]
fn kernels_alone_give_the_same_on_a_gpu_and_on_the_emulator() {
    let kernels = ir::kernel::parse::parse(DOUBLE).unwrap();
    let options = Options { sm: Sm::Sm80, seed: 0, sums: Sums::default() };
    for machine in [Machine::Emulator(options), Machine::Gpu(cuda().context().unwrap())] {
        let mut launcher = Launcher::new(machine);
        let loaded = launcher.load(&kernels, DOUBLE_PTX, None).unwrap();
        let bytes = |f: fn(usize) -> f32| (0..64).flat_map(|i| f(i).to_le_bytes()).collect::<Vec<u8>>();
        let x = launcher.block(&bytes(|i| i as f32)).unwrap();
        let y = launcher.block(&[0; 256]).unwrap();
        let seconds = launcher.launch(&loaded, 0, &[x, y], &[0; MAX_SYMBOLS], 1).unwrap();
        assert!(seconds > 0.0);
        assert_eq!(launcher.read(y, 256).unwrap(), bytes(|i| 2.0 * i as f32));
        // Beyond its memory: a fault, on the GPU for ever.
        let small = launcher.block(&[0; 128]).unwrap();
        let fault = launcher.launch(&loaded, 0, &[x, small], &[0; MAX_SYMBOLS], 1).unwrap_err();
        assert!(fault.to_string().starts_with("launch of double failed: "), "{fault}");
    }
}
