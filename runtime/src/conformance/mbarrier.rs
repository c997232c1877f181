//! Forms of instructions by which threads of sm_90a wait for each other and for copies: phases of an `mbarrier`, clusters, and
//! those that change who has what: `setmaxnreg`, `griddepcontrol`.
//!
//! When a phase ends is what the PTX ISA says in "Phase of the mbarrier object": no arrival is missing and no byte. A wait by
//! parity is over if the phase that runs has the other one, so that of a new mbarrier with parity 1 is.

use super::inputs::Random;
use super::memory::{alone, ctas_of};
use super::{Expected, Expected::Bits, Form, Type};
use crate::emulator::Sm;
use Type::*;

/// Threads of a CTA.
const THREADS: usize = 128;

/// All of them.
pub fn forms() -> Vec<Form> {
    let mut forms: Vec<Form> = SEQUENCES.iter().map(sequence).collect();
    forms.push(states());
    forms.extend([false, true].map(rounds));
    forms.extend(CLUSTER_BARRIERS.map(cluster_barrier));
    forms.extend([cluster_arrival(), cta_rank(), registers(), grid_dependency()]);
    forms.into_iter().map(|form| Form { sm: Sm::Sm90a, ..form }).collect()
}

/// What a thread does with an mbarrier of its own, at `%r1`. Operands `a0` and `a1` are 1 to 255, `a2` is their sum.
struct Sequence {
    name: &'static str,
    /// Instructions, and how many phases are over behind each.
    steps: &'static [(&'static str, u64)],
}

#[rustfmt::skip] // a table
const SEQUENCES: &[Sequence] = &[
    Sequence { name: "mbarrier.arrive.shared.b64", steps: &[
        ("mbarrier.init.shared.b64 [%r1], 2;", 0),
        ("mbarrier.arrive.shared.b64 %l0, [%r1];", 0),
        ("mbarrier.arrive.shared.b64 %l0, [%r1];", 1),
        // The next phase waits for as many.
        ("mbarrier.arrive.shared.b64 %l0, [%r1];", 1),
        ("mbarrier.arrive.shared.b64 %l0, [%r1];", 2),
    ] },
    Sequence { name: "mbarrier.arrive.shared.b64, count", steps: &[
        ("mbarrier.init.shared.b64 [%r1], %a2;", 0),
        ("mbarrier.arrive.shared.b64 %l0, [%r1], %a0;", 0),
        ("mbarrier.arrive.shared.b64 %l0, [%r1], %a1;", 1),
        ("mbarrier.arrive.shared.b64 %l0, [%r1], %a2;", 2),
    ] },
    Sequence { name: "mbarrier.arrive.noComplete.shared.b64", steps: &[
        ("mbarrier.init.shared.b64 [%r1], %a2;", 0),
        ("mbarrier.arrive.noComplete.shared.b64 %l0, [%r1], %a0;", 0),
        ("mbarrier.arrive.shared.b64 %l0, [%r1], %a1;", 1),
    ] },
    Sequence { name: "mbarrier.arrive.expect_tx.shared.b64", steps: &[
        ("mbarrier.init.shared.b64 [%r1], 1;", 0),
        ("mbarrier.arrive.expect_tx.shared.b64 %l0, [%r1], %a2;", 0),
        ("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r1], %a0;", 0),
        ("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r1], %a1;", 1),
        // No byte is expected any more.
        ("mbarrier.arrive.shared.b64 %l0, [%r1];", 2),
    ] },
    Sequence { name: "mbarrier.expect_tx.relaxed.cta.shared::cta.b64", steps: &[
        ("mbarrier.init.shared.b64 [%r1], 1;", 0),
        ("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1], %a2;", 0),
        ("mbarrier.arrive.shared.b64 %l0, [%r1];", 0),
        ("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r1], %a2;", 1),
    ] },
    Sequence { name: "mbarrier.complete_tx.relaxed.cta.shared::cta.b64, before it is expected", steps: &[
        ("mbarrier.init.shared.b64 [%r1], 1;", 0),
        ("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r1], %a0;", 0),
        ("mbarrier.arrive.expect_tx.shared.b64 %l0, [%r1], %a0;", 1),
    ] },
    Sequence { name: "mbarrier.inval.shared.b64", steps: &[
        ("mbarrier.init.shared.b64 [%r1], 1;", 0),
        ("mbarrier.arrive.shared.b64 %l0, [%r1];", 1),
        ("mbarrier.inval.shared.b64 [%r1];\nmbarrier.init.shared.b64 [%r1], %a2;", 0),
        ("mbarrier.arrive.shared.b64 %l0, [%r1], %a2;", 1),
    ] },
];

/// Each thread's own 8 bytes.
const OWN: &str = "mov.b32 %r0, smem;\nmad.lo.s32 %r1, %t, 8, %r0;\n";

fn counts(_: usize, operands: &mut [u64], random: &mut Random) {
    (operands[0], operands[1]) = (1 + random.below(255), 1 + random.below(255));
    operands[2] = operands[0] + operands[1];
}

/// Behind each step: are the phases of parity 0 and 1 over?
fn sequence(of: &Sequence) -> Form {
    let look = |at: usize| {
        let parity = |parity: usize| {
            format!(
                "mbarrier.test_wait.parity.shared.b64 %p0, [%r1], {parity};\nselp.b32 %d{}, 1, 0, %p0;\n",
                2 * at + parity
            )
        };
        parity(0) + &parity(1)
    };
    let steps = of.steps.iter().enumerate().map(|(at, (step, _))| format!("{step}\n{}", look(at)));
    let body = format!("{OWN}{}", steps.collect::<String>());
    let over =
        alone(|_| of.steps.iter().flat_map(|(_, over)| [Bits(over & 1), Bits(1 - (over & 1))]).collect());
    let gives = vec![B32; 2 * of.steps.len()];
    ctas_of(THREADS, of.name, &body, [&[U32; 3], &gives], counts, over).with_shared(8 * THREADS as u32)
}

/// Waits by the state that an arrival gave, of a phase that runs and of one that is over; `try_wait` may give up.
fn states() -> Form {
    let name = "mbarrier.test_wait.shared.b64";
    let test = |at: usize, state: &str| {
        format!("mbarrier.test_wait.shared.b64 %p1, [%r1], {state};\nselp.b32 %d{at}, 1, 0, %p1;\n")
    };
    let body = format!(
        "{OWN}mbarrier.init.shared.b64 [%r1], %a2;\nmbarrier.arrive.shared.b64 %l0, [%r1], %a0;\n{}\
         mbarrier.arrive.shared.b64 %l1, [%r1], %a1;\n{}{}mbarrier.arrive.shared.b64 %l1, [%r1], %a0;\n{}",
        test(0, "%l0"),
        until("OVER", "try_wait.shared.b64 %p1, [%r1], %l0"),
        test(1, "%l0"),
        test(2, "%l1")
    );
    let over = alone(|_| [0, 1, 0].map(Bits).to_vec());
    ctas_of(THREADS, name, &body, [&[U32; 3], &[B32; 3]], counts, over).with_shared(8 * THREADS as u32)
}

/// A label and a loop that waits.
fn until(label: &str, wait: &str) -> String {
    format!("{label}: mbarrier.{wait};\n@!%p1 bra {label};\n")
}

/// All threads arrive and wait, twice; each then reads what the thread of an operand has stored. The mbarrier lies behind.
fn rounds(by_state: bool) -> Form {
    let name = if by_state { "mbarrier.try_wait.shared.b64" } else { "mbarrier.try_wait.parity.shared.b64" };
    let at = format!("smem+{}", 4 * THREADS);
    let round = |number: usize| {
        let phase = if by_state { "%l0".to_string() } else { number.to_string() };
        let wait =
            until(&format!("ROUND{number}"), &format!("{} %p1, [{at}], {phase}", &name["mbarrier.".len()..]));
        format!(
            "st.shared.b32 [%r1], %a{number};\nmbarrier.arrive.shared.b64 %l0, [{at}];\n{wait}\
             ld.shared.b32 %d{number}, [%r2];\nbar.sync 0;\n"
        )
    };
    let body = format!(
        "mov.b32 %r0, smem;\nmad.lo.s32 %r1, %t, 4, %r0;\nmad.lo.s32 %r2, %a2, 4, %r0;\nsetp.ne.u32 %p0, %t, 0;\n\
         @%p0 bra MADE;\nmbarrier.init.shared.b64 [{at}], {THREADS};\nMADE: bar.sync 0;\n{}{}",
        round(0),
        round(1)
    );
    let partner = |_, operands: &mut [u64], random: &mut Random| operands[2] = random.below(THREADS as u64);
    let read = |cta: &[Vec<u64>]| {
        let of = |operands: &Vec<u64>| [0, 1].map(|round| Bits(cta[operands[2] as usize][round])).to_vec();
        cta.iter().map(of).collect()
    };
    ctas_of(THREADS, name, &body, [&[B32; 3], &[B32; 2]], partner, read).with_shared(4 * THREADS as u32 + 8)
}

/// How a cluster's barrier may be written: name, arrival, wait.
const CLUSTER_BARRIERS: [[&str; 3]; 3] = [
    ["barrier.cluster.arrive.aligned", "barrier.cluster.arrive.aligned;", "barrier.cluster.wait.aligned;"],
    [
        "barrier.cluster.arrive.release.aligned",
        "barrier.cluster.arrive.release.aligned;",
        "barrier.cluster.wait.acquire.aligned;",
    ],
    [
        "barrier.cluster.arrive.relaxed.aligned",
        "fence.acq_rel.cluster;\nbarrier.cluster.arrive.relaxed.aligned;",
        "barrier.cluster.wait.acquire.aligned;",
    ],
];

/// Each thread stores a word; `sync`; then it reads what the thread of its number has stored in the other CTA of its cluster,
/// where `%r4` is its own place. Nobody ends before all have read.
fn of_the_other(name: &str, before: &str, sync: &str) -> Form {
    let body = format!(
        "mov.b64 %l0, smem;\ncvta.shared.u64 %l0, %l0;\ncvta.to.shared::cluster.u64 %l0, %l0;\ncvt.u32.u64 %r0, %l0;\n\
         mad.lo.s32 %r1, %t, 4, %r0;\nmov.u32 %r2, %cluster_ctarank;\nxor.b32 %r2, %r2, 1;\n\
         mapa.shared::cluster.u32 %r4, %r1, %r2;\n{before}st.shared.b32 [%r1], %a0;\n{sync}\
         ld.shared::cluster.b32 %d0, [%r4];\nbarrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
    );
    let other = |cluster: &[Vec<u64>]| {
        let (first, second) = cluster.split_at(THREADS);
        second.iter().chain(first).map(|operands| vec![Bits(operands[0])]).collect()
    };
    ctas_of(2 * THREADS, name, &body, [&[B32], &[B32]], |_, _, _| (), other)
        .in_clusters(2)
        .with_shared(4 * THREADS as u32 + 8)
}

fn cluster_barrier([name, arrive, wait]: [&str; 3]) -> Form {
    of_the_other(name, "", &format!("{arrive}\n{wait}\n"))
}

/// Threads arrive at the mbarrier of the other CTA, and wait at their own.
fn cluster_arrival() -> Form {
    let at = 4 * THREADS;
    let before = format!(
        "setp.ne.u32 %p0, %t, 0;\n@%p0 bra MADE;\nmbarrier.init.shared.b64 [smem+{at}], {THREADS};\n\
         fence.mbarrier_init.release.cluster;\nMADE:\nmapa.shared::cluster.u32 %r5, %r0, %r2;\n\
         barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
    );
    let wait = format!("try_wait.parity.acquire.cluster.shared::cta.b64 %p1, [smem+{at}], 0");
    let name = "mbarrier.arrive.release.cluster.shared::cluster.b64";
    of_the_other(name, &before, &format!("{name} _, [%r5+{at}];\n{}", until("WAIT", &wait)))
}

/// The rank of the CTA that an address is of, in a cluster of two.
fn cta_rank() -> Form {
    let body = "mov.b32 %r0, smem;\nmapa.shared::cluster.u32 %r1, %r0, %a0;\ngetctarank.shared::cluster.u32 %d0, %r1;\n\
                mov.u32 %d1, %cluster_ctarank;\nmov.u32 %d2, %cluster_nctarank;";
    let rank = |_, operands: &mut [u64], random: &mut Random| operands[0] = random.below(2);
    let name = "getctarank.shared::cluster.u32";
    let of = |cluster: &[Vec<u64>]| {
        let thread =
            |(at, operands): (usize, &Vec<u64>)| [operands[0], (at / THREADS) as u64, 2].map(Bits).to_vec();
        cluster.iter().enumerate().map(thread).collect()
    };
    ctas_of(2 * THREADS, name, body, [&[U32], &[B32; 3]], rank, of).in_clusters(2).with_shared(8)
}

/// One warpgroup gives registers back that two others take. What they hold stays.
fn registers() -> Form {
    let hold: String = (0..4).map(|at| format!("add.s32 %d{at}, %a{at}, %t;\n")).collect();
    let body = format!(
        "{hold}setp.lt.u32 %p0, %t, 128;\n@%p0 bra GIVE;\nsetmaxnreg.inc.sync.aligned.u32 240;\nbra GIVEN;\n\
         GIVE: setmaxnreg.dec.sync.aligned.u32 24;\nGIVEN:"
    );
    let sums = |cta: &[Vec<u64>]| -> Vec<Vec<Expected>> {
        let sum = |thread: usize, a: u64| Bits(u64::from((a as u32).wrapping_add(thread as u32)));
        let of = |(thread, operands): (usize, &Vec<u64>)| operands.iter().map(|&a| sum(thread, a)).collect();
        cta.iter().enumerate().map(of).collect()
    };
    // As many as begin with 168 each.
    ctas_of(384, "setmaxnreg.inc, setmaxnreg.dec", &body, [&[B32; 4], &[B32; 4]], |_, _, _| (), sums)
}

/// Of a grid that waits for none, and for which none waits.
fn grid_dependency() -> Form {
    let body = "griddepcontrol.launch_dependents;\ngriddepcontrol.wait;\nmov.b32 %d0, %a0;";
    let same = alone(|operands| vec![Bits(operands[0])]);
    ctas_of(THREADS, "griddepcontrol.wait", body, [&[B32], &[B32]], |_, _, _| (), same)
}
