//! How fast the PTX emulator runs, with all that it checks: criterion, so that two versions can be compared.
//!
//! Loops of one kind of instruction, four warps of one CTA; the rate is in instructions of warps a second, for `mma` in
//! multiply-adds.
//!
//! `cargo bench --bench emulator -- [FILTER]`

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use runtime::emulator::{Grid, Memory, Options, Program, Sm, Sums};
use runtime::ptx::Module;

/// Name, what the loop repeats, how many instructions that is.
const LOOPS: [(&str, &str, u64); 7] = [
    (
        "integer",
        "add.s32 %r4, %r1, %r4; xor.b32 %r5, %r4, %r1; shl.b32 %r6, %r5, 2; and.b32 %r7, %r6, %r1;",
        4,
    ),
    ("fma", "fma.rn.f32 %r8, %r8, %r9, %r10; fma.rn.f32 %r11, %r8, %r9, %r10;", 2),
    ("ex2", "ex2.approx.ftz.f32 %r11, %r8;", 1),
    ("load global", "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd3];", 1),
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

criterion_group!(benches, loops);
criterion_main!(benches);
