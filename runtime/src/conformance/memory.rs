//! Forms of instructions that move bytes or order them: vectors, asynchronous copies, atomics, barriers.

use super::inputs::{Random, any, scattered};
use super::oracle::{Expected, nearest, value};
use super::{Expected::Bits, Type};
use super::{Form, name_of};
use Type::*;

/// Threads of a CTA.
const THREADS: usize = 128;
/// CTAs of a form.
const CTAS: usize = 4;

/// All of them.
pub fn forms() -> Vec<Form> {
    let mut forms: Vec<Form> = VECTORS.iter().flat_map(|&(ty, count)| vectors(ty, count)).collect();
    forms.extend(
        [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)]
            .into_iter()
            .flat_map(|(cache, bytes)| [false, true].map(|ignored| copy(cache, bytes, ignored))),
    );
    forms.push(copies_in_groups());
    forms.extend(MOVES.iter().map(|&(name, ty, body)| {
        let same = alone(|operands| vec![Bits(operands[0])]);
        ctas(name, body, [&[ty], &[ty]], |_, _, _| (), same).with_shared(8 * THREADS as u32)
    }));
    for space in ["shared", "global"] {
        forms.extend(ATOMICS.iter().map(|atomic| own_word(space, atomic)));
    }
    forms.extend(ATOMICS.iter().filter(|atomic| atomic.commutes).map(one_word));
    forms.extend(barriers());
    forms
}

/// A form whose threads have random operands, which `adjust` makes such as the instruction takes, with the thread's number.
fn ctas(
    name: &str,
    body: &str,
    types: [&[Type]; 2],
    adjust: impl Fn(usize, &mut [u64], &mut Random),
    oracle: impl Fn(&[Vec<u64>]) -> Vec<Vec<Expected>>,
) -> Form {
    ctas_of(THREADS, name, body, types, adjust, oracle)
}

/// As [`ctas`], with so many threads.
pub(super) fn ctas_of(
    threads: usize,
    name: &str,
    body: &str,
    [takes, gives]: [&[Type]; 2],
    adjust: impl Fn(usize, &mut [u64], &mut Random),
    oracle: impl Fn(&[Vec<u64>]) -> Vec<Vec<Expected>>,
) -> Form {
    let mut random = Random::of(name);
    let mut thread = |number: usize| {
        let mut operands: Vec<u64> = takes.iter().map(|&ty| any(ty, &mut random)).collect();
        adjust(number, &mut operands, &mut random);
        operands
    };
    let ctas: Vec<Vec<_>> = (0..CTAS).map(|_| (0..threads).map(&mut thread).collect()).collect();
    Form::new(name, body, [takes, gives], &ctas, oracle)
}

/// An oracle that looks at each thread alone.
pub(super) fn alone(of: impl Fn(&[u64]) -> Vec<Expected>) -> impl Fn(&[Vec<u64>]) -> Vec<Vec<Expected>> {
    move |cta| cta.iter().map(|operands| of(operands)).collect()
}

/// Registers in braces.
fn vector(letter: char, count: usize) -> String {
    let all: Vec<String> = (0..count).map(|at| format!("%{letter}{at}")).collect();
    format!("{{{}}}", all.join(", "))
}

/// Types and lengths of vectors that kernels load and store.
const VECTORS: [(Type, usize); 5] = [(B16, 2), (B16, 4), (B32, 2), (B32, 4), (B64, 2)];

/// A vector stored at once and loaded part by part, and the other way round, in shared and in global memory; and one of the
/// operands as they lie, which nobody writes.
fn vectors(ty: Type, count: usize) -> Vec<Form> {
    let (bits, bytes) = (ty.bits(), ty.bits() as usize / 8);
    let (whole, types) = (format!("v{count}.b{bits}"), vec![ty; count]);
    let (a, d) = (vector('a', count), vector('d', count));
    let each = |line: &dyn Fn(usize, usize) -> String| -> String {
        (0..count).map(|at| line(at, bytes * at)).collect()
    };
    let mut forms = Vec::new();
    for (space, begin, word) in
        [("shared", "mov.b32 %r0, smem;\nmad.lo.s32 %r0, %t, SIZE, %r0;\n", "%r0"), ("global", "", "%to")]
    {
        let begin = begin.replace("SIZE", &(bytes * count).to_string());
        let load = each(&|at, offset| format!("ld.{space}.b{bits} %d{at}, [{word}+{offset}];\n"));
        let store = each(&|at, offset| format!("st.{space}.b{bits} [{word}+{offset}], %a{at};\n"));
        for (name, moves) in [
            (format!("st.{space}.{whole}"), format!("st.{space}.{whole} [{word}], {a};\n{load}")),
            (format!("ld.{space}.{whole}"), format!("{store}ld.{space}.{whole} {d}, [{word}];")),
        ] {
            let same = alone(|operands| operands.iter().map(|&operand| Bits(operand)).collect());
            let form = ctas(&name, &format!("{begin}{moves}"), [&types, &types], |_, _, _| (), same);
            forms.push(form.with_shared((THREADS * count * bytes) as u32));
        }
    }
    let name = format!("ld.global.nc.{whole}");
    let parts = alone(move |operands| {
        let memory: Vec<u8> = operands.iter().flat_map(|operand| operand.to_le_bytes()).collect();
        let part = |part: &[u8]| part.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        memory.chunks(bytes).take(count).map(|bytes| Bits(part(bytes))).collect()
    });
    forms.push(ctas(&name, &format!("{name} {d}, [%from];"), [&[B64; 2], &types], |_, _, _| (), parts));
    forms
}

/// Name; type; a way on which the operand comes to the result.
#[rustfmt::skip] // a table
const MOVES: &[(&str, Type, &str)] = &[
    ("st.global.b16", B16, "st.global.b16 [%to], %a0;\nld.global.b16 %d0, [%to];"),
    ("ld.global.nc.b16", B16, "ld.global.nc.b16 %d0, [%from];"),
    ("ld.global.nc.b32", B32, "ld.global.nc.b32 %d0, [%from];"),
    ("ld.global.u32, st.global.u32", B32, "st.global.u32 [%to], %a0;\nld.global.u32 %d0, [%to];"),
    ("ld.param.u64", U64, "ld.param.b64 %l0, [from];\nsub.s64 %l0, %from, %l0;\nld.param.u64 %l1, [from];\nadd.s64 %l1, %l1, %l0;\nld.global.b64 %d0, [%l1];"),
    ("nanosleep.u32", B32, "nanosleep.u32 20;\nmov.b32 %d0, %a0;"),
    ("cvta.to.global.u64", B32, "cvta.to.global.u64 %l0, %from;\nld.global.b32 %d0, [%l0];"),
    (
        "cvta.shared.u64",
        B64,
        "mov.b64 %l0, smem;\nmad.wide.u32 %l0, %t, 8, %l0;\nst.shared.b64 [%l0], %a0;\ncvta.shared.u64 %l1, %l0;\n\
         ld.b64 %d0, [%l1];",
    ),
    (
        "ld.param.b32",
        B32,
        "ld.param.b64 %l0, [from];\nsub.s64 %l0, %from, %l0;\nld.param.b32 %r0, [from];\nld.param.b32 %r1, [from+4];\n\
         mov.b64 %l1, {%r0, %r1};\nadd.s64 %l1, %l1, %l0;\nld.global.b32 %d0, [%l1];",
    ),
];

/// `cp.async` of so many bytes to shared memory; with `ignored`, only the first of them are read and the rest is zero.
fn copy(cache: &str, bytes: usize, ignored: bool) -> Form {
    let instruction = format!("cp.async.{cache}.shared.global");
    let name = format!("{instruction}, {bytes} bytes{}", if ignored { ", some ignored" } else { "" });
    let words = bytes / 4;
    let load = if words == 1 {
        "ld.shared.b32 %d0".into()
    } else {
        format!("ld.shared.v{words}.b32 {}", vector('d', words))
    };
    let size = if ignored { ", %a2" } else { "" };
    let body = format!(
        "mov.b32 %r0, smem;\nmad.lo.s32 %r0, %t, {bytes}, %r0;\n{instruction} [%r0], [%from], {bytes}{size};\n\
         cp.async.commit_group;\ncp.async.wait_group 0;\n{load}, [%r0];"
    );
    // The fourth operand makes a thread's operands 32 bytes, so that each begins where a copy of 16 may.
    let takes = [B64, B64, B32, B32];
    let counts = |_, operands: &mut [u64], random: &mut Random| operands[2] = random.below(bytes as u64 + 1);
    let oracle = alone(|operands| {
        let read = if ignored { operands[2] as usize } else { bytes };
        let mut source: Vec<u8> = operands[..2].iter().flat_map(|word| word.to_le_bytes()).collect();
        source[read..].fill(0);
        source
            .chunks(4)
            .take(words)
            .map(|word| Bits(u32::from_le_bytes(word.try_into().expect("4 bytes")).into()))
            .collect()
    });
    ctas(&name, &body, [&takes, &vec![B32; words]], counts, oracle).with_shared((THREADS * bytes) as u32)
}

/// Two groups of copies, waited for one after the other; a third that `wait_all` takes without a group.
fn copies_in_groups() -> Form {
    let copy = |number: usize| {
        format!("cp.async.ca.shared.global [%r0+{}], [%from+{}], 8;\n", 8 * number, 8 * number)
    };
    let body = format!(
        "mov.b32 %r0, smem;\nmad.lo.s32 %r0, %t, 24, %r0;\n{}cp.async.commit_group;\n{}cp.async.commit_group;\n\
         cp.async.wait_group 1;\nld.shared.b64 %d0, [%r0];\n{}cp.async.wait_all;\n\
         ld.shared.b64 %d1, [%r0+8];\nld.shared.b64 %d2, [%r0+16];",
        copy(0),
        copy(1),
        copy(2)
    );
    let same = alone(|operands| operands.iter().map(|&operand| Bits(operand)).collect());
    ctas("cp.async.wait_group, cp.async.wait_all", &body, [&[B64; 3], &[B64; 3]], |_, _, _| (), same)
        .with_shared(24 * THREADS as u32)
}

/// A word's value after an atomic: the value before, the operand, and that of `cas`.
type Update = fn(u64, u64, u64) -> Expected;

struct Atomic {
    op: &'static str,
    ty: Type,
    /// Is the word the same in whatever order threads come?
    commutes: bool,
    update: Update,
}

fn signed(x: u64) -> i32 {
    x as i32
}

#[rustfmt::skip] // a table
const ATOMICS: &[Atomic] = &[
    Atomic { op: "add", ty: U32, commutes: true, update: |a, b, _| Bits(a.wrapping_add(b) as u32 as u64) },
    Atomic { op: "add", ty: U64, commutes: true, update: |a, b, _| Bits(a.wrapping_add(b)) },
    Atomic { op: "add", ty: F32, commutes: false, update: |a, b, _| nearest(F32, (value(F32, a) as f32 + value(F32, b) as f32).into()) },
    Atomic { op: "min", ty: U32, commutes: true, update: |a, b, _| Bits(a.min(b)) },
    Atomic { op: "max", ty: U32, commutes: true, update: |a, b, _| Bits(a.max(b)) },
    Atomic { op: "min", ty: S32, commutes: true, update: |a, b, _| Bits(signed(a).min(signed(b)) as u32 as u64) },
    Atomic { op: "max", ty: S32, commutes: true, update: |a, b, _| Bits(signed(a).max(signed(b)) as u32 as u64) },
    Atomic { op: "and", ty: B32, commutes: true, update: |a, b, _| Bits(a & b) },
    Atomic { op: "or", ty: B32, commutes: true, update: |a, b, _| Bits(a | b) },
    Atomic { op: "xor", ty: B32, commutes: true, update: |a, b, _| Bits(a ^ b) },
    Atomic { op: "exch", ty: B32, commutes: false, update: |_, b, _| Bits(b) },
    Atomic { op: "exch", ty: B64, commutes: false, update: |_, b, _| Bits(b) },
    Atomic { op: "cas", ty: B32, commutes: false, update: |a, b, c| Bits(if a == b { c } else { a }) },
    Atomic { op: "cas", ty: B64, commutes: false, update: |a, b, c| Bits(if a == b { c } else { a }) },
    Atomic { op: "inc", ty: U32, commutes: false, update: |a, b, _| Bits(if a >= b { 0 } else { a + 1 }) },
    Atomic { op: "dec", ty: U32, commutes: false, update: |a, b, _| Bits(if a == 0 || a > b { b } else { a - 1 }) },
];

/// `atom` by each thread on a word of its own: what was there, and what is there then.
fn own_word(space: &str, atomic: &Atomic) -> Form {
    let Atomic { op, ty, update, .. } = atomic;
    let ty_name = name_of(*ty);
    let (bits, bytes) = (ty.bits(), ty.bits() / 8);
    let name = format!("atom.{space}.{op}.{ty_name}");
    let (at, word) = match space {
        "shared" => (format!("mov.b32 %r0, smem;\nmad.lo.s32 %r0, %t, {bytes}, %r0;\n"), "%r0"),
        _ => (String::new(), "%to"),
    };
    let third = if *op == "cas" { ", %a2" } else { "" };
    let body = format!(
        "{at}st.{space}.b{bits} [{word}], %a0;\n{name} %d0, [{word}], %a1{third};\nld.{space}.b{bits} %d1, [{word}];"
    );
    let likely = |_, operands: &mut [u64], random: &mut Random| {
        // What `cas` compares is there every other time. Additions in global memory may flush subnormals: there are none.
        if *op == "cas" && random.below(2) == 0 {
            operands[1] = operands[0];
        }
        if *ty == F32 {
            operands
                .iter_mut()
                .for_each(|operand| *operand = (118 + random.below(20)) << 23 | *operand & 0x807F_FFFF);
        }
    };
    let oracle = alone(|operands| vec![Bits(operands[0]), update(operands[0], operands[1], operands[2])]);
    ctas(&name, &body, [&[*ty; 3], &[*ty; 2]], likely, oracle).with_shared(THREADS as u32 * bytes)
}

/// `red` by all threads of a CTA on one word.
fn one_word(atomic: &Atomic) -> Form {
    let Atomic { op, ty, update, .. } = atomic;
    let bits = ty.bits();
    let name = format!("red.shared.{op}.{}", name_of(*ty));
    let body = format!(
        "mov.b32 %r0, smem;\nsetp.ne.u32 %p0, %t, 0;\n@%p0 bra WRITTEN;\nst.shared.b{bits} [%r0], %a0;\nWRITTEN: bar.sync 0;\n\
         @!%p0 bra ADDED;\n{name} [%r0], %a0;\nADDED: bar.sync 0;\nld.shared.b{bits} %d0, [%r0];"
    );
    let values = |_, operands: &mut [u64], random: &mut Random| operands[0] = scattered(op, *ty, random);
    let all = |cta: &[Vec<u64>]| {
        let add = |sum: u64, operands: &Vec<u64>| match update(sum, operands[0], 0) {
            Bits(sum) => sum,
            Expected::Within(..) | Expected::Nan(_) => unreachable!("an integer is a number of bits"),
        };
        vec![vec![Bits(cta[1..].iter().fold(cta[0][0], add))]; cta.len()]
    };
    ctas(&name, &body, [&[*ty], &[*ty]], values, all).with_shared(8)
}

/// Each thread stores its first operand, and reads behind the barrier what the thread of its second operand stored.
fn barriers() -> Vec<Form> {
    let store = "mov.b32 %r0, smem;\nmad.lo.s32 %r1, %t, 4, %r0;\nst.shared.b32 [%r1], %a0;\n";
    let read = "mad.lo.s32 %r2, %a1, 4, %r0;\nld.shared.b32 %d0, [%r2];";
    let read_other =
        |cta: &[Vec<u64>]| cta.iter().map(|operands| vec![Bits(cta[operands[1] as usize][0])]).collect();
    let form = |name: &str, sync: &str, partner: fn(usize, u64) -> u64| {
        let body = format!("{store}{sync}\n{read}");
        let other =
            |thread, operands: &mut [u64], random: &mut Random| operands[1] = partner(thread, random.bits());
        ctas(name, &body, [&[B32; 2], &[B32]], other, read_other).with_shared(4 * THREADS as u32)
    };
    let any = |_, random| random % THREADS as u64;
    let mut forms = vec![
        form("bar.sync 0", "bar.sync 0;", any),
        form("barrier.sync.aligned 0", "barrier.sync.aligned 0;", any),
        form(
            "bar.sync, count",
            "shr.u32 %r3, %t, 6;\nadd.s32 %r3, %r3, 1;\nbar.sync %r3, 64;",
            |thread, random| (thread & !63) as u64 + random % 64,
        ),
        form("bar.warp.sync", "bar.warp.sync -1;", |thread, random| (thread & !31) as u64 + random % 32),
        form(
            "bar.arrive",
            "setp.lt.u32 %p0, %t, 64;\n@%p0 bra FIRST;\nbar.sync 1, 128;\nbra READ;\nFIRST: bar.arrive 1, 128;\nREAD:",
            // The first half does not wait: it may read what is its own.
            |thread, random| if thread < 64 { thread as u64 } else { random % 64 },
        ),
    ];
    for (op, all) in [("and", true), ("or", false)] {
        let name = format!("bar.red.{op}.pred");
        let body = format!("setp.ne.b32 %p0, %a0, 0;\n{name} %p1, 0, %p0;\nselp.b32 %d0, 1, 0, %p1;");
        // One thread in 256 is of another mind: of two CTAs about, one has none.
        let rare = |_, operands: &mut [u64], random: &mut Random| {
            operands[0] = u64::from((random.below(256) == 0) != all)
        };
        forms.push(ctas(&name, &body, [&[B32], &[B32]], rare, |cta| {
            let mut votes = cta.iter().map(|operands| operands[0] != 0);
            let given = if all { votes.all(|vote| vote) } else { votes.any(|vote| vote) };
            vec![vec![Bits(given.into())]; cta.len()]
        }));
    }
    forms
}
