//! PTX text as a typed module: the instructions of sm_80 and sm_90a that kernels use. `emulator` runs it.
//!
//! * Takes: what LLVM's NVPTX back end writes for sm_80 to sm_120, and the inline assembly in it.
//! * Gives: kernels whose registers, labels and constants are resolved, each instruction with its line.
//! * Refuses by name what it does not know, an instruction with a modifier that it does not know among it. It never guesses
//!   and never panics.
//!
//! Instructions and their operands are those of the *PTX ISA*; a doc comment here names the section where the meaning is
//! not the name's. Every value lives in one of three banks: predicates, registers of up to 32 bits, registers of 64 bits.
//! Constants, special registers and addresses of variables are registers that are filled before the kernel begins.
//!
//! In reading order: this file (the module's types), `op` (the instructions), `lexer`, `parser` (statements and operands),
//! `opcode` (an instruction's name and operands as an [`Op`]), `sm90` (those that sm_90 added).

mod lexer;
mod op;
mod opcode;
mod parser;
mod sm90;

pub use op::*;

use lexer::Kind;
use std::collections::BTreeSet;

/// Why a text is no module that the emulator runs. Lines count from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PtxError {
    /// The text breaks off or has the wrong thing in a place.
    #[error("line {line}: found {found}, expected {expected}")]
    Syntax {
        /// Where.
        line: u32,
        /// The token there.
        found: String,
        /// What may stand there.
        expected: String,
    },
    /// An instruction, or a modifier of one, that is not known.
    #[error("line {line}: unknown instruction `{opcode}`{}", .modifier.as_ref().map(|m| format!(" (`.{m}`)")).unwrap_or_default())]
    UnknownInstruction {
        /// Where.
        line: u32,
        /// The instruction as it is written, without operands.
        opcode: String,
        /// The part of it that is not known, unless it is all.
        modifier: Option<String>,
    },
    /// A directive that is not known, or that kernels are not to use.
    #[error("line {line}: `{directive}` is not supported")]
    UnknownDirective {
        /// Where.
        line: u32,
        /// The directive.
        directive: String,
    },
    /// A register, label, parameter or variable that nobody declared.
    #[error("line {line}: `{name}` is not declared, expected {expected}")]
    Undeclared {
        /// Where.
        line: u32,
        /// The name.
        name: String,
        /// What it would have to be.
        expected: &'static str,
    },
    /// A name that is declared a second time.
    #[error("line {line}: `{name}` is declared twice")]
    Twice {
        /// Where.
        line: u32,
        /// The name.
        name: String,
    },
    /// An operand of another width than the instruction's.
    #[error("line {line}: `{operand}` is {found}, expected {expected}")]
    Width {
        /// Where.
        line: u32,
        /// The operand.
        operand: String,
        /// What it is.
        found: &'static str,
        /// What the instruction takes.
        expected: &'static str,
    },
    /// A count or a number beyond what is supported.
    #[error("line {line}: {what} is {found}, at most {limit} are supported")]
    TooMany {
        /// Where.
        line: u32,
        /// Of what.
        what: &'static str,
        /// How many there are.
        found: u64,
        /// How many there may be.
        limit: u64,
    },
}

/// A module: one PTX file.
#[derive(Clone, Debug)]
pub struct Module {
    /// `.version`, major and minor.
    pub version: (u32, u32),
    /// `.target`, such as `sm_90a`.
    pub target: String,
    /// The kernels, in the order of the text.
    pub kernels: Vec<Kernel>,
}

impl Module {
    /// Reads a module.
    ///
    /// # Errors
    ///
    /// [`PtxError`], with the line.
    pub fn parse(text: &str) -> Result<Module, PtxError> {
        parser::module(text)
    }

    /// The kernel of that name.
    pub fn kernel(&self, name: &str) -> Option<&Kernel> {
        self.kernels.iter().find(|kernel| kernel.name == name)
    }
}

/// The instructions of a text as they are written, without guards and operands: `ld.global.v2.b32`.
///
/// # Errors
///
/// [`PtxError`] where the text has no tokens. It need not be a module that [`Module::parse`] reads.
pub fn opcodes(text: &str) -> Result<BTreeSet<&str>, PtxError> {
    let tokens = lexer::tokens(text)?;
    let (mut found, mut at, mut depth) = (BTreeSet::new(), 0, 0);
    while let [token, next, ..] = tokens[at..] {
        at += match token.text {
            "{" => {
                depth += 1;
                1
            }
            "}" => {
                depth -= 1;
                1
            }
            // Outside of functions, and behind a label.
            _ if depth == 0 || next.text == ":" => 1 + usize::from(depth > 0),
            "@" if next.text == "!" => 3,
            "@" => 2,
            word => {
                if token.kind == Kind::Word && !word.starts_with('.') {
                    found.insert(word);
                }
                1 + tokens[at..]
                    .iter()
                    .take_while(|token| token.text != ";" && token.kind != Kind::End)
                    .count()
            }
        };
    }
    Ok(found)
}

/// An entry function.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// Its parameters, in order.
    pub params: Vec<Param>,
    /// `.maxntid` or `.reqntid`: threads of a CTA, at most.
    pub max_threads: Option<u32>,
    /// `.reqntid`: threads of a CTA, exactly.
    pub required_threads: Option<u32>,
    /// `.minnctapersm`.
    pub min_ctas: Option<u32>,
    /// `.maxnreg`.
    pub max_registers: Option<u32>,
    /// `.reqnctapercluster`: CTAs of a cluster, along x.
    pub cluster: Option<u32>,
    /// Bytes of shared memory that the text declares, without the dynamic part.
    pub static_shared: u32,
    /// Where the dynamic part of shared memory begins: behind all variables that have a size.
    pub dynamic_shared: u32,
    /// Predicates, registers of up to 32 bits and registers of 64 bits that the kernel names.
    pub banks: Banks,
    /// Registers that have a value from the beginning.
    pub constants: Vec<(Reg, Constant)>,
    /// Predicates that are constant.
    pub constant_predicates: Vec<(Pred, bool)>,
    /// The code. A label is an index into it; an index past its end is the end of the kernel.
    pub code: Vec<Instruction>,
    /// The registers' names, for reports.
    pub names: Vec<Names>,
}

impl Kernel {
    /// Bytes of the parameter buffer.
    pub fn param_bytes(&self) -> u32 {
        self.params.last().map_or(0, |last| last.offset + last.bytes)
    }

    /// The name of a register in the text; a constant has none.
    pub fn register_name(&self, reg: Reg) -> String {
        let of = |names: &Names| {
            let index = u32::from(reg.index.checked_sub(names.first.index)?);
            let known = reg.wide == names.first.wide && index < names.count.unwrap_or(1);
            known.then(|| names.count.map_or(names.stem.clone(), |_| format!("{}{index}", names.stem)))
        };
        self.names.iter().find_map(of).unwrap_or_else(|| "a constant".into())
    }
}

/// `.reg .b32 %r<86>`: the registers from `first` on are `%r0` to `%r85`. Without a count it is one register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// The first of them.
    pub first: Reg,
    /// How many; `None` for one without a number in its name.
    pub count: Option<u32>,
    /// The name, without the number.
    pub stem: String,
}

/// How many registers there are of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Banks {
    /// Predicates.
    pub predicates: u16,
    /// Registers of 8, 16 and 32 bits.
    pub narrow: u16,
    /// Registers of 64 bits.
    pub wide: u16,
}

/// A parameter of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Its name.
    pub name: String,
    /// Bytes from the beginning of the parameter buffer.
    pub offset: u32,
    /// Bytes.
    pub bytes: u32,
    /// Alignment in bytes.
    pub align: u32,
}

/// What a constant register holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Constant {
    /// These bits.
    Bits(u64),
    /// A special register.
    Special(Special),
    /// The address in shared memory that lies so many bytes from its beginning.
    Shared(u32),
    /// The address in shared memory that lies so many bytes from where the dynamic part begins.
    Dynamic(u32),
    /// The address of the byte of the parameter buffer.
    Param(u32),
}

/// A statement of the code: `@guard op`.
#[derive(Clone, Debug)]
pub struct Instruction {
    /// Line of the text.
    pub line: u32,
    /// Lanes that run it: those where the predicate is the bool. `None`: all.
    pub guard: Option<(Pred, bool)>,
    /// What it does.
    pub op: Op,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KERNEL: &str = "\
.version 7.4
.target sm_80
.address_size 64

.visible .entry k_add(
\t.param .u64 .ptr .global .align 1 k_add_param_0,
\t.param .u64 k_add_param_1
)
{
\t.reg .pred \t%p<2>;
\t.reg .b32 \t%r<4>;
\t.reg .b64 \t%rd<4>;

\tld.param.b64 \t%rd1, [k_add_param_0];
\tmov.u32 \t%r1, %tid.x;
\tsetp.gt.s32 \t%p1, %r1, 7;
\t@%p1 bra \t$L__BB0_2;
\tmul.wide.u32 \t%rd2, %r1, 4;
\tadd.s64 \t%rd3, %rd1, %rd2;
\tld.global.b32 \t%r2, [%rd3];
\tadd.rn.f32 \t%r3, %r2, 0f3F800000;
\tst.global.b32 \t[%rd3+16], %r3;
$L__BB0_2:
\tret;
}
";

    #[test]
    fn a_kernel_is_read() {
        let module = Module::parse(KERNEL).unwrap();
        assert_eq!((module.version, module.target.as_str()), ((7, 4), "sm_80"));
        let kernel = module.kernel("k_add").unwrap();
        assert_eq!((kernel.params.len(), kernel.param_bytes(), kernel.code.len()), (2, 16, 10));
        // The line that every report will name.
        assert_eq!(kernel.code[3].line, 17);
        assert!(kernel.code[3].guard.is_some_and(|(_, when)| when));
        assert!(kernel.constants.iter().any(|(_, constant)| *constant == Constant::Bits(0x3F80_0000)));
    }

    #[test]
    fn instructions_are_listed_as_they_are_written() {
        let body = ".reg .b32 %r<4>; L: @!%p1 bra.uni L; { .reg .pred q; mma.x {%r1, %r2}, q; } @%p1 ret; .pragma \"p\";";
        let text =
            format!(".version 7.4 .target sm_80 .visible .entry k(.param .u64 p) .maxntid 4 {{ {body} }}");
        assert_eq!(opcodes(&text), Ok(BTreeSet::from(["bra.uni", "mma.x", "ret"])));
        let broken = text.replace("ret;", "ret");
        assert_eq!(opcodes(&broken).map(|found| found.len()), Ok(3));
    }

    #[test]
    fn what_is_not_known_is_named() {
        let said = |from: &str, to: &str| {
            assert!(KERNEL.contains(from));
            Module::parse(&KERNEL.replacen(from, to, 1)).unwrap_err().to_string()
        };
        assert_eq!(said("mul.wide.u32", "mangle.u32"), "line 18: unknown instruction `mangle.u32`");
        assert_eq!(
            said("add.rn.f32", "add.rn.f32.frob"),
            "line 21: unknown instruction `add.rn.f32.frob` (`.frob`)"
        );
        assert!(said("%rd1, %rd2;", "%rd1, %rd9;").contains("`%rd9` is not declared"));
        assert!(said("$L__BB0_2;", "$L__BB0_3;").contains("`$L__BB0_3` is not declared"));
        assert!(said("%r<4>;", "%r<4>; .reg .b32 %r<2>;").contains("`%r` is declared twice"));
        assert!(said(".version 7.4\n", "").contains("expected `.version` and `.target`"));
        // A comment ends behind its beginning.
        let without = Module::parse(&KERNEL.replacen("ret;", "/*/ ret; */", 1)).unwrap();
        assert_eq!(without.kernels[0].code.len(), 9);
    }

    /// What stands in the place of the addition.
    fn with(line: &str) -> Result<Module, PtxError> {
        let text = KERNEL.replacen("add.rn.f32 \t%r3, %r2, 0f3F800000;", line, 1);
        assert!(text.contains(line));
        Module::parse(&text)
    }

    #[test]
    fn what_the_isa_does_not_have_is_refused() {
        for line in [
            "ex2.approx.s32 %r3, %r2;",
            "and.f32 %r3, %r2, %r2;",
            "mul.lo.hi.s32 %r3, %r2, %r2;",
            "mul.wide.f32 %rd3, %r2, %r2;",
            "shf.l.wrap.b64 %rd3, %rd2, %rd2, %r2;",
            "dp4a.f32.f32 %r3, %r2, %r2, %r2;",
            "lop3.b32 %r3, %r2, %r2, %r2, 300;",
            "cp.async.wait_group -1;",
            "cp.async.cg.shared.global [%r2], [%rd2], 4294967312;",
            "prefetch.frob [%rd2];",
            "prefetch.global.L2 [%undeclared];",
            "nanosleep.banana %r2;",
            "ld.global.L1::frob.b32 %r3, [%rd2];",
            "ld.global.L2::cache_hint.b32 %r3, [%rd2], %zz;",
        ] {
            assert!(with(line).is_err(), "{line}");
        }
        with("ld.global.L1::no_allocate.L2::cache_hint.b32 %r3, [%rd2], %rd1;").unwrap();
        with("fence.sc.gpu; prefetch.global.L2 [%rd2]; cp.async.wait_group 2;").unwrap();
    }

    /// Every form that sm_90 added, with an operand of each kind that it takes.
    #[test]
    #[rustfmt::skip] // one form a line
    fn what_sm_90_added_is_read() {
        for line in [
            "mbarrier.init.shared.b64 [%r2], 1;",
            "mbarrier.init.shared::cta.b64 [%r2+8], %r3;",
            "mbarrier.inval.shared.b64 [%r2];",
            "mbarrier.arrive.shared.b64 %rd2, [%r2];",
            "mbarrier.arrive.shared.b64 %rd2, [%r2], 3;",
            "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];",
            "mbarrier.arrive.noComplete.shared.b64 %rd2, [%r2], 1;",
            "mbarrier.arrive.expect_tx.shared.b64 %rd2, [%r2], 4096;",
            "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r2], %r3;",
            "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2], 16;",
            "mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%r2], 16;",
            "mbarrier.test_wait.shared.b64 %p1, [%r2], %rd2;",
            "mbarrier.test_wait.parity.shared.b64 %p1, [%r2], 1;",
            "mbarrier.try_wait.parity.shared.b64 %p1, [%rd2], %r3;",
            "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p1, [%r2], %r3, 1000;",
            "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r2];",
            "cp.async.mbarrier.arrive.shared.b64 [%r2];",
            "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r2], [%rd2, {%r3}], [%r3];",
            "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd2, {%r3, -1, 0, 1, 2}], [%r3];",
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%r2], [%rd2, {0, 1}], [%r3], 3, %rd1;",
            "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%rd2, {0, 1, 2}], [%r2];",
            "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%rd2, {0, 1}], [%r2];",
            "cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%rd2, {0, 1}];",
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd2], 64, [%r3];",
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r2], [%rd2], %r3, [%r3], 3;",
            "cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r2], 64;",
            "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; cp.async.bulk.wait_group.read 2;",
            "prefetch.tensormap [%rd2]; prefetch.param.tensormap [k_add_param_0];",
            "wgmma.fence.sync.aligned; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;",
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r0, %r1, %r2, %r3}, %rd1, %rd2, %p1, 1, -1, 0, 1;",
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r0, %r1, %r2, %r3}, {%r0, %r1, %r2, %r3}, %rd2, 0, 1, 1, 0;",
            "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.u8.satfinite {%r0, %r1, %r2, %r3}, %rd1, %rd2, 1;",
            "fence.proxy.async; fence.proxy.async.shared::cta; fence.proxy.async.global;",
            "fence.mbarrier_init.release.cluster;",
            "setmaxnreg.inc.sync.aligned.u32 240; setmaxnreg.dec.sync.aligned.u32 24;",
            "elect.sync %r3|%p1, -1; elect.sync _|%p1, 0xffffffff;",
            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%r2], {%r0, %r1, %r2, %r3};",
            "stmatrix.sync.aligned.m8n8.x1.shared::cta.b16 [%r2], {%r0};",
            "mapa.shared::cluster.u32 %r3, %r2, 1; mapa.u64 %rd2, %rd1, %r2;",
            "getctarank.shared::cluster.u32 %r3, %r2;",
            "barrier.cluster.arrive.aligned; barrier.cluster.arrive.release.aligned; barrier.cluster.arrive.relaxed.aligned;",
            "barrier.cluster.wait.aligned; barrier.cluster.wait.acquire.aligned;",
            "mov.u32 %r3, %cluster_ctarank; mov.u32 %r3, %cluster_nctarank; mov.u32 %r3, %cluster_ctaid.x;",
            "mov.u32 %r3, %cluster_nctaid.y; mov.u32 %r3, %clusterid.x; mov.u32 %r3, %nclusterid.z;",
            "ld.shared::cluster.b32 %r3, [%r2]; st.shared::cluster.v2.b32 [%rd2], {%r2, %r3};",
            "griddepcontrol.wait; griddepcontrol.launch_dependents;",
            "ex2.approx.ftz.bf16x2 %r3, %r2;",
        ] {
            with(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
        for line in [
            "mbarrier.init.shared::cluster.b64 [%r2], 1;",
            "mbarrier.arrive.parity.shared.b64 %rd2, [%r2];",
            "mbarrier.arrive.shared::cluster.b64 %rd2, [%r2];",
            "mbarrier.pending_count.b64 %r3, %rd2;",
            "cp.async.bulk.tensor.6d.global.shared::cta.tile.bulk_group [%rd2, {0, 1, 2}], [%r2];",
            "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd2, {0, 1, 2}], [%r2];",
            "cp.async.bulk.tensor.3d.global.shared::cta.im2col_no_offs.bulk_group [%rd2, {0, 1, 2}], [%r2];",
            "wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 {%r0, %r1, %r2, %r3}, %rd1, %rd2, 1, 1, 1, 0, 0;",
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.f16 {%r0, %r1, %r2, %r3}, %rd1, %rd2, 1, 1, 1, 0, 0;",
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r0, %r1}, %rd1, %rd2, 1, 1, 1, 0, 0;",
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r0, %r1, %r2, %r3}, %rd1, %rd2, 1, 2, 1, 0, 0;",
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r0, %r1, %r2, %r3}, %rd1, %rd2, 1, 1, 1, 0;",
            "setmaxnreg.inc.sync.aligned.u32 25;",
            "setmaxnreg.sync.aligned.u32 24;",
            "elect.sync %r3, -1;",
            "fence.proxy.tensormap::generic.acquire.gpu [%rd2], 128;",
            "fence.mbarrier_init;",
            "barrier.cluster.sync.aligned;",
            "mapa.shared.u32 %r3, %r2, 1;",
            "griddepcontrol.go;",
        ] {
            assert!(with(line).is_err(), "{line}");
        }
        let map = KERNEL.replacen("\t.param .u64 k_add_param_1", "\t.param .align 64 .b8 k_add_param_1[128]", 1);
        let map = map.replacen(")\n{", ")\n.maxntid 384\n.explicitcluster\n.reqnctapercluster 2, 1, 1\n{", 1);
        let map = map.replacen("ret;", "mov.b64 %rd2, k_add_param_1; cvta.param.u64 %rd3, %rd2; ret;", 1);
        let module = Module::parse(&map).unwrap();
        let kernel = &module.kernels[0];
        assert_eq!((kernel.cluster, kernel.params[1].offset, kernel.param_bytes()), (Some(2), 64, 192));
        assert!(Module::parse(&map.replacen("2, 1, 1", "1, 2, 1", 1)).is_err());
    }

    #[test]
    fn a_pragma_ends_and_dynamic_memory_begins_behind_the_rest() {
        let with =
            ".pragma \"nounroll\"; bar.sync 0;\n.shared .align 16 .b8 red[128];\nmov.b32 %r3, dyn;\nret;";
        let text = KERNEL.replacen("ret;", with, 1);
        let text = text.replacen(".visible", ".extern .shared .align 64 .b8 dyn[];\n.visible", 1);
        let module = Module::parse(&text).unwrap();
        let kernel = module.kernel("k_add").unwrap();
        assert_eq!((kernel.static_shared, kernel.dynamic_shared), (128, 128));
        assert!(kernel.code.iter().any(|i| matches!(i.op, Op::Barrier { .. })));
        assert!(kernel.constants.iter().any(|(_, constant)| *constant == Constant::Dynamic(0)));
    }

    proptest! {
        #[test]
        fn damage_is_refused_or_read(at in any::<prop::sample::Index>(), cut in 0..9usize, with in "[ -~\n]{0,9}") {
            let at = at.index(KERNEL.len());
            let end = (at + cut).min(KERNEL.len());
            let damaged = format!("{}{with}{}", &KERNEL[..at], &KERNEL[end..]);
            let _ = (Module::parse(&damaged), opcodes(&damaged));
        }
    }
}
