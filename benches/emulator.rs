//! How fast the PTX emulator runs, with all that it checks: criterion, so that two versions can be compared.
//!
//! * `flash`: kernels of causal attention as they are compiled, one core. Instructions of warps and multiply-adds of matrix
//!   instructions, each over the whole time. A `wgmma` is one instruction of each of its four warps.
//! * Loops of one kind of instruction, four warps of one CTA; the rate is in instructions of warps a second, for `mma` and
//!   `wgmma` in multiply-adds.
//!
//! `cargo bench --bench emulator -- [FILTER]`

use codegen::nvptx;
use criterion::{Criterion, Throughput, criterion_group};
use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::kernel::{Access, Buffer, Kernel, Space};
use ir::random::Rng;
use llamac::check::Subject;
use llamac::check::cases::{self, Case};
use llamac::compare::memory::positions;
use runtime::emulator::{Counts, Grid, Memory, Options, Program, Sm, Sums};
use runtime::gpu;
use runtime::ptx::Module;
use runtime::tensor_map::TensorMap;
use std::time::{Duration, Instant};

/// Queries of the attention, and keys before them.
const TOKENS: i64 = 512;
const PAST: i64 = 200;
/// Runs of which the fastest counts.
const RUNS: usize = 5;

/// Name, what the loop repeats, how many instructions that is.
const LOOPS: [(&str, &str, u64); 8] = [
    (
        "integer",
        "add.s32 %r4, %r1, %r4; xor.b32 %r5, %r4, %r1; shl.b32 %r6, %r5, 2; and.b32 %r7, %r6, %r1;",
        4,
    ),
    ("fma", "fma.rn.f32 %r8, %r8, %r9, %r10; fma.rn.f32 %r11, %r8, %r9, %r10;", 2),
    ("ex2", "ex2.approx.ftz.f32 %r11, %r8;", 1),
    ("load global", "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd3];", 1),
    ("load shared", "ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2];", 1),
    ("store shared", "st.shared.v4.b32 [%r2], {%r4, %r4, %r4, %r4};", 1),
    ("ldmatrix", "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r2];", 1),
    (
        "mma",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r12, %r13, %r14, %r15}, {%r16, %r16, %r16, %r16}, \
         {%r16, %r16}, {%r12, %r13, %r14, %r15};",
        1,
    ),
];
const ROUNDS: u64 = 500;
const REPEATS: u64 = 8;
const WARPS: u32 = 4;

fn kernel(body: &str) -> Program {
    let text = format!(
        ".version 7.4\n.target sm_80\n.extern .shared .align 16 .b8 smem[];\n.entry k(.param .u64 p) {{
        .reg .pred %p; .reg .b32 %r<17>; .reg .b64 %rd<4>;
        ld.param.b64 %rd1, [p]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 16; add.s64 %rd3, %rd1, %rd2;
        shl.b32 %r3, %r1, 4; mov.b32 %r2, smem; add.s32 %r2, %r2, %r3; mov.b32 %r4, 0; mov.b32 %r16, 0x3F803E80;
        mov.b32 %r8, 0f3F800000; mov.b32 %r9, 0f3F000000; mov.b32 %r10, 0f3D000000; mov.b32 %r12, %r8;
        mov.b32 %r13, %r8; mov.b32 %r14, %r8; mov.b32 %r15, %r8; st.shared.v4.b32 [%r2], {{%r1, %r1, %r1, %r1}};
        bar.warp.sync -1; mov.b32 %r3, 0;
        L: {} add.s32 %r3, %r3, 1; setp.lt.u32 %p, %r3, {ROUNDS}; @%p bra L; ret; }}",
        body.repeat(REPEATS as usize)
    );
    Program::new(&Module::parse(&text).expect("a module").kernels[0])
}

fn loops(c: &mut Criterion) {
    let mut memory = Memory::new();
    let address = memory.allocate("data", 4096);
    memory.write(address, &[1; 4096]);
    let grid = Grid {
        ctas: [1; 3],
        threads: [32 * WARPS, 1, 1],
        cluster: 1,
        dynamic_shared: 4096,
        dependent: false,
    };
    let options = Options { sm: Sm::Sm80, seed: 1, sums: Sums::Truncated };
    let mut group = c.benchmark_group("emulator");
    for (name, body, instructions) in LOOPS {
        let program = kernel(body);
        let macs = if name == "mma" { 16 * 8 * 16 } else { 1 };
        group.throughput(Throughput::Elements(u64::from(WARPS) * ROUNDS * REPEATS * instructions * macs));
        group.bench_function(name, |b| {
            b.iter(|| {
                program.launch(&grid, &address.to_le_bytes(), &mut memory, &options).expect("no report")
            });
        });
    }
    group.finish();
}

/// `wgmma` of 64 by 128 by 16 on both operands in shared memory, without swizzle.
fn wgmma(c: &mut Criterion) {
    let d: Vec<String> = (0..64).map(|at| format!("%f{at}")).collect();
    let product = format!(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {{{}}}, %rd1, %rd1, 1, 1, 1, 0, 0; ",
        d.join(", ")
    );
    let zeros: String = d.iter().map(|reg| format!("mov.b32 {reg}, 0;\n")).collect();
    // A descriptor: rows of 16 bytes, 128 bytes from k 0 to k 8, 256 from 8 rows to the next.
    let text = format!(
        ".version 8.0\n.target sm_90a\n.extern .shared .align 128 .b8 smem[];\n.entry k() {{
        .reg .pred %p; .reg .b32 %r<5>; .reg .f32 %f<64>; .reg .b64 %rd<3>;
        mov.u32 %r1, %tid.x; shl.b32 %r1, %r1, 5; mov.b32 %r2, smem; add.s32 %r1, %r1, %r2; mov.b32 %r3, 0x3F803E80;
        st.shared.v4.b32 [%r1], {{%r3, %r3, %r3, %r3}}; st.shared.v4.b32 [%r1+16], {{%r3, %r3, %r3, %r3}};
        fence.proxy.async; bar.sync 0; shr.b32 %r2, %r2, 4; cvt.u64.u32 %rd1, %r2; mov.b64 %rd2, {};
        or.b64 %rd1, %rd1, %rd2; {zeros} mov.b32 %r4, 0;
        L: wgmma.fence.sync.aligned; {} wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        add.s32 %r4, %r4, 1; setp.lt.u32 %p, %r4, 10; @%p bra L; ret; }}",
        128_u64 >> 4 << 16 | 256_u64 >> 4 << 32,
        product.repeat(REPEATS as usize)
    );
    let program = Program::new(&Module::parse(&text).expect("a module").kernels[0]);
    let grid =
        Grid { ctas: [1; 3], threads: [128, 1, 1], cluster: 1, dynamic_shared: 4096, dependent: false };
    let options = Options { sm: Sm::Sm90a, seed: 1, sums: Sums::Truncated };
    let mut group = c.benchmark_group("emulator");
    group.throughput(Throughput::Elements(64 * 128 * 16 * 10 * REPEATS));
    group.bench_function("wgmma", |b| {
        b.iter(|| program.launch(&grid, &[], &mut Memory::new(), &options).expect("no report"));
    });
    group.finish();
}

/// What a parameter of an attention holds: positions, small numbers, or nothing where the kernel writes.
fn fill(memory: &mut Memory, buffer: &Buffer, symbols: &[i64; MAX_SYMBOLS], rng: &mut Rng) -> u64 {
    let (_, span) = positions(buffer, symbols);
    let address = memory.allocate(&buffer.name, span * buffer.dtype.bytes(1));
    if buffer.space != Space::Global(Access::Write) {
        let number = |at: usize| match buffer.dtype {
            DType::I32 => (PAST as i32 + at as i32).to_le_bytes().to_vec(),
            // A sign, a magnitude from 1/4 to 1, and a fraction.
            _ => (rng.bits() as u16 & 0x80FF | 0x3E80).to_le_bytes().to_vec(),
        };
        memory.write(address, &(0..span).flat_map(number).collect::<Vec<u8>>());
    }
    address
}

/// Runs the kernels of an attention once.
fn attend(kernels: &[(Kernel, Program)], whole: &Kernel, sm: Sm) -> (Counts, Duration) {
    let (mut memory, mut rng, mut symbols) = (Memory::new(), Rng(1), [0; MAX_SYMBOLS]);
    symbols[0] = TOKENS;
    let buffers = whole.params().map(|(_, buffer)| fill(&mut memory, buffer, &symbols, &mut rng));
    let addresses: Vec<u64> = buffers.collect();
    let mut params: Vec<u8> = addresses.iter().flat_map(|address| address.to_le_bytes()).collect();
    params.extend(whole.symbols.0.iter().zip(symbols).flat_map(|(_, value)| (value as i32).to_le_bytes()));
    let options = Options { sm, seed: 1, sums: Sums::Truncated };
    let (mut counts, begin) = (Counts::default(), Instant::now());
    for (phase, program) in kernels {
        let grid = Grid {
            ctas: [phase.turns(&symbols) as u32, 1, 1],
            threads: [phase.threads.into(), 1, 1],
            cluster: program.cluster(),
            dynamic_shared: phase.shared_bytes() as u32,
            dependent: false,
        };
        let maps = gpu::tensor_maps(phase, &addresses, &symbols);
        let maps = maps.iter().map(|map| TensorMap::encode(map).expect("a map that drivers take"));
        let params = gpu::with_maps(&params, maps);
        counts += program.launch(&grid, &params, &mut memory, &options).expect("no report");
    }
    (counts, begin.elapsed())
}

/// Causal attention of one head, in bf16.
fn flash() {
    for (machine, d) in [("sm_80", 128), ("sm_80", 64), ("sm_90a", 128), ("sm_90a", 64)] {
        let architecture = nvptx::architecture(&format!("cuda:{machine}")).expect("it is known");
        let Case { graph, .. } = cases::flash(DType::BF16, (1, 1, d), (TOKENS, TOKENS), PAST, 0);
        let mut subject = Subject::new(graph, &architecture.target());
        let group = subject.groups().next().expect("an attention");
        let whole = subject.lower(group, "", &architecture.target()).expect("a kernel").kernel;
        let text = nvptx::llvm(std::slice::from_ref(&whole), architecture).expect("it can run there");
        let module = Module::parse(&nvptx::compile(&text, architecture).expect("PTX")).expect("a module");
        let ready = |phase: Kernel| {
            let program = Program::new(module.kernel(&nvptx::symbol(&phase.name)).expect("it was compiled"));
            (phase, program)
        };
        let kernels: Vec<(Kernel, Program)> = whole.phases().into_iter().map(ready).collect();
        let sm = machine.parse().expect("an emulated machine");
        let runs = (0..RUNS).map(|_| attend(&kernels, &whole, sm));
        let (counts, time) = runs.min_by_key(|(_, time)| *time).expect("there are runs");
        let (counts, seconds) = (counts.total(), time.as_secs_f64());
        println!(
            "flash {machine:<6} d {d:<3}  {:6.2} M warp-instructions/s  {:5.2} GMAC/s  ({:.2} M, {:.2} GMAC, {seconds:.3} s)",
            counts.warp_instructions() as f64 / seconds / 1e6,
            counts.matrix_macs as f64 / seconds / 1e9,
            counts.warp_instructions() as f64 / 1e6,
            counts.matrix_macs as f64 / 1e9,
        );
    }
}

criterion_group!(benches, loops, wgmma);

fn main() {
    // As criterion takes it: a part of the name.
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    if filter.is_none_or(|filter| "flash".contains(&filter)) {
        flash();
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
