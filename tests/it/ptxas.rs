//! Machine code of GPUs: what the assemblers of two CUDA versions make of PTX, and what the command does with them.
//!
//! `tools/ptxas` fetches them, and `make test` calls it. Where they cannot be had, `LLAMAC_NO_PTXAS=1` skips what needs them.

use super::Checked;
use super::command::{Place, Said};
use super::lower;
use super::skipped::skip;
use codegen::nvptx::{self, Architecture};
use codegen::ptxas::{Cubin, Program, Tool, assemble, disassemble};
use libtest_mimic::Trial;
use runtime::emulator::Sm;
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// One test a promise.
pub fn trials() -> Vec<Trial> {
    let test =
        |name: &'static str, check: fn(&str) -> Checked<()>| Trial::test(name, move || Ok(check(name)?));
    vec![
        test("ptxas checks can fail", checks_can_fail),
        test("ptxas makes a cubin", cubin),
        test("ptxas takes every form of an instruction", forms),
        test("ptxas is said to be missing", missing),
        test("ptxas warns of spills", spills),
    ]
}

/// Major versions of CUDA whose assembler PTX has to pass.
const MAJORS: [u32; 2] = [12, 13];

/// The assemblers, the newest first; none if they are to be done without.
pub fn assemblers(name: &str) -> Checked<Vec<Program>> {
    if std::env::var_os("LLAMAC_NO_PTXAS").is_some_and(|value| value == "1") {
        skip(name, "LLAMAC_NO_PTXAS=1");
        return Ok(Vec::new());
    }
    let found = Tool::Ptxas.fetched();
    let missing = MAJORS.iter().find(|&&major| !found.iter().any(|p| p.release().first() == Some(&major)));
    match missing {
        Some(major) => Err(format!(
            "no ptxas of CUDA {major}: tools/ptxas fetches it; LLAMAC_NO_PTXAS=1 skips what needs it"
        )
        .into()),
        None => Ok(found),
    }
}

/// The kernels of the conformance suite, all in one module.
fn forms(name: &str) -> Checked<()> {
    for sm in [Sm::Sm80, Sm::Sm90a] {
        let mut module = String::new();
        let forms = runtime::conformance::forms();
        for (number, form) in forms.iter().filter(|form| form.sm == sm).enumerate() {
            let ptx = form.ptx();
            let (head, kernel) = ptx.split_once(".visible .entry k(").ok_or("no kernel")?;
            if number == 0 {
                module += head;
            }
            module += &format!("// {}\n.visible .entry k{number}({kernel}", form.name);
        }
        for ptxas in assemblers(name)? {
            clean(&ptxas, &module, sm.name()).map_err(|e| format!("{e}\n{module}"))?;
        }
    }
    Ok(())
}

/// Assembles PTX: nothing is spilled or kept on a stack.
pub fn check(name: &str, ptx: &str, architecture: &Architecture) -> Checked<()> {
    assemblers(name)?.iter().try_for_each(|ptxas| clean(ptxas, ptx, architecture.cpu).map(drop))
}

/// As [`check`], and each instruction has become what it stands for. Not of kernels that have code which can never run: that goes.
pub fn check_instructions(name: &str, ptx: &str, architecture: &Architecture) -> Checked<()> {
    for ptxas in assemblers(name)? {
        clean(&ptxas, ptx, architecture.cpu)?;
        let cubin = assemble(&ptxas, &rolled(ptx), architecture.cpu)?;
        as_many(ptx, &sass(&cubin)?).map_err(|e| format!("ptxas {}: {e}", ptxas.version))?;
    }
    Ok(())
}

/// Machine code that loses nothing.
fn clean(ptxas: &Program, ptx: &str, sm: &str) -> Checked<Cubin> {
    let cubin = assemble(ptxas, ptx, sm)?;
    match &cubin.report.losses()[..] {
        [] => Ok(cubin),
        losses => Err(format!("ptxas {}: {}", ptxas.version, losses.join("\n")).into()),
    }
}

/// PTX whose loops `ptxas` does not unroll (PTX ISA, "Pragma Strings"): short ones it unrolls whole, which doubles instructions.
fn rolled(ptx: &str) -> String {
    let label = |line: &str| line.starts_with("$L__BB") && line.ends_with(':');
    let pragma = |line: &str| if label(line) { "\t.pragma \"nounroll\";\n" } else { "" };
    ptx.lines().map(|line| format!("{line}\n{}", pragma(line))).collect()
}

/// The machine code of PTX by the newest assembler, as text; none if it is to be done without.
pub fn machine_code(name: &str, ptx: &str, sm: &str) -> Checked<Option<String>> {
    let Some(ptxas) = assemblers(name)?.into_iter().next() else { return Ok(None) };
    Ok(Some(sass(&clean(&ptxas, ptx, sm)?)?))
}

fn sass(cubin: &Cubin) -> Checked<String> {
    let nvdisasm =
        Tool::Nvdisasm.fetched().into_iter().next().ok_or("no nvdisasm: tools/ptxas fetches it")?;
    Ok(disassemble(&nvdisasm, &cubin.bytes)?)
}

/// Instructions of PTX and of machine code that stand one for one.
const PAIRS: [(&str, &str); 11] = [
    ("mma.sync.aligned.m16n8k16.", " HMMA.16816."),
    ("ldmatrix.sync.", " LDSM."),
    ("cp.async.cg.", " LDGSTS."),
    ("cp.async.commit_group", " LDGDEPBAR"),
    ("cp.async.wait_group", " DEPBAR.LE "),
    ("bar.sync", " BAR.SYNC"),
    ("bar.arrive", " BAR.ARV"),
    ("wgmma.mma_async.", " HGMMA."),
    ("wgmma.wait_group.", " WARPGROUP.DEPBAR."),
    ("cp.async.bulk.tensor.", " UTMALDG."),
    ("setmaxnreg.", " USETMAXREG."),
];

/// Has the machine code of each kernel as many of them as its PTX?
fn as_many(ptx: &str, sass: &str) -> Result<(), String> {
    for kernel in ptx.split(".visible .entry ").skip(1) {
        let name = kernel.split('(').next().unwrap_or_default();
        let label = format!("\n.text.{name}:\n");
        let code = sass.split_once(&label).ok_or_else(|| format!("no code of {name}"))?.1;
        let code = code.split("\n\t.section").next().unwrap_or_default();
        for (of_ptx, of_sass) in PAIRS {
            let (expected, found) = (kernel.matches(of_ptx).count(), code.matches(of_sass).count());
            if expected != found {
                return Err(format!(
                    "{name}: found {found}{of_sass}, expected {expected} as {of_ptx} in PTX"
                ));
            }
        }
    }
    Ok(())
}

/// A kernel that keeps an array in local memory.
const ON_THE_STACK: &str = ".version 7.4
.target sm_80
.address_size 64
.visible .entry k_stack(.param .u64 out, .param .u32 at)
{
  .local .align 4 .b8 stack[64];
  .reg .b32 %r<3>;
  .reg .b64 %rd<5>;
  ld.param.u64 %rd1, [out];
  ld.param.u32 %r1, [at];
  mov.u64 %rd2, stack;
  mul.wide.u32 %rd3, %r1, 4;
  add.s64 %rd4, %rd2, %rd3;
  st.local.u32 [%rd4], %r1;
  ld.local.u32 %r2, [%rd2];
  st.global.u32 [%rd1], %r2;
  ret;
}
";

/// A kernel that asks for registers without saying how many it begins with.
const IN_VAIN: &str = ".version 8.0
.target sm_90a
.address_size 64
.visible .entry k_in_vain(.param .u64 out)
{
  .reg .b64 %rd<2>;
  setmaxnreg.inc.sync.aligned.u32 240;
  ld.param.u64 %rd1, [out];
  st.global.u64 [%rd1], %rd1;
  ret;
}
";

/// A kernel with one of each of the first of [`PAIRS`].
const ONE_OF_EACH: &str = ".version 7.4
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 tile[];
.visible .entry k_each(.param .u64 in)
{
  .reg .b32 %r<9>;
  .reg .b64 %rd<3>;
  ld.param.u64 %rd1, [in];
  mov.u32 %r1, tile;
  cp.async.cg.shared.global [%r1], [%rd1], 16;
  cp.async.commit_group;
  cp.async.wait_group 0;
  bar.sync 0;
  ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];
  mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r2, %r3, %r4, %r5}, {%r2, %r3, %r4, %r5}, {%r2, %r3}, {%r2, %r3, %r4, %r5};
  st.global.v4.b32 [%rd1], {%r2, %r3, %r4, %r5};
  ret;
}
";

fn checks_can_fail(name: &str) -> Checked<()> {
    assert!(runtime::ptx::Module::parse(ON_THE_STACK).is_err(), "it was read");
    for ptxas in assemblers(name)? {
        let refusal =
            |ptx: &str, sm: &str| clean(&ptxas, ptx, sm).err().map_or(String::new(), |e| e.to_string());
        let said = refusal(ON_THE_STACK, "sm_80");
        assert!(said.contains("@stack: a stack of 64 bytes"), "{said}");
        let said = refusal(IN_VAIN, "sm_90a");
        assert!(said.contains("(C7508)"), "{said}");
        let said = refusal("k_none", "sm_80");
        assert!(said.contains("refused generated code") && said.contains("Missing .version"), "{said}");

        // What warpgroups do stands in no kernel of a few lines.
        let groups = include_str!("../lower/ptx/attention_groups.ir");
        let sm_90a = nvptx::architecture("cuda:sm_90a").ok_or("no such GPU")?;
        let groups = rolled(&lower::ptx_of(groups, sm_90a)?);
        let mut seen = Vec::new();
        for (ptx, sm) in [(ONE_OF_EACH, "sm_80"), (&groups, "sm_90a")] {
            let sass = sass(&clean(&ptxas, ptx, sm)?)?;
            as_many(ptx, &sass)?;
            for (of_ptx, of_sass) in PAIRS.into_iter().filter(|(of_ptx, _)| ptx.contains(of_ptx)) {
                let other = as_many(ptx, &sass.replacen(of_sass, " NOP", 1));
                assert!(other.is_err(), "{of_ptx} without {of_sass} was overlooked");
                seen.push(of_ptx);
            }
            assert!(
                as_many(&ptx.replace(".entry k_", ".entry k_other_"), &sass).is_err(),
                "no code was overlooked"
            );
        }
        let unseen = PAIRS.iter().find(|pair| !seen.contains(&pair.0));
        assert!(unseen.is_none(), "{unseen:?} was not tried");
    }
    Ok(())
}

/// The command with this assembler.
fn with_tools(place: &Place, ptxas: &Program, arguments: &str) -> Said {
    Said::of(place.command(arguments).env("LLAMAC_PTXAS", &ptxas.file))
}

/// The same text gives the same machine code, of which `inspect`, `--keep` and `emit` tell.
fn cubin(name: &str) -> Checked<()> {
    let place = Place::new();
    for ptxas in assemblers(name)? {
        let run = |arguments: &str| with_tools(&place, &ptxas, arguments).ok();
        for file in ["a", "b"] {
            let said =
                run(&format!("compile builtin -o {file}.llamac --ctx 64 --target cuda:sm_80 --keep {file}"));
            assert_eq!(said.err, "");
        }
        assert!(place.read("a.llamac") == place.read("b.llamac"), "two compilations differ");
        let target = run("inspect a.llamac --json").json()["targets"][0].clone();
        assert_eq!(target["gpu"]["ptx_isa"], "7.4");
        assert_eq!(target["gpu"]["cubin"]["ptxas"], ptxas.version.as_str());
        let shown = run("inspect a.llamac").out;
        let expected = "\ncuda:sm_80 (needs sm_80, 163 KiB of shared memory a CTA and PTX ISA 7.4; ";
        assert!(shown.contains(expected) && shown.contains("\ncubin.cuda:sm_80 "), "{shown}");
        assert!(shown.contains(&format!(" of machine code by ptxas {})", ptxas.version)), "{shown}");
        let sass = run("emit builtin --ctx 64 --stage sass").out;
        assert!(
            place.read("a/cuda-sm_80/sass.sass") == sass.as_bytes(),
            "emit shows other code than was kept"
        );
        // It is the artifact's.
        assert!(sass.contains("\n.text.k_q:\n") && sass.contains("\n.text.k_down:\n"));
        let one = run("emit builtin --ctx 64 --stage sass --kernel q").out;
        assert!(one.contains("\n.text.k_q:\n") && !one.contains(".text.k_down"), "{one}");
    }
    Ok(())
}

/// Without a tool there is PTX, and the command says what is missing and how to get it.
fn missing(_: &str) -> Checked<()> {
    let place = Place::new();
    let run = |arguments: &str| {
        let mut command = place.command(arguments);
        command.env("PATH", "").env("LLAMAC_TEST_DATA", place.path("none"));
        Said::of(command.env_remove("LLAMAC_PTXAS").env_remove("LLAMAC_NVDISASM"))
    };
    let said = run("compile builtin -o a.llamac --ctx 64 --target cuda:sm_80 --keep texts").ok();
    for expected in
        ["sass.sass is not kept: no ptxas", "cuda:sm_80: PTX alone", "pip install", "nvidia-cuda-nvcc"]
    {
        assert!(said.err.contains(expected), "{}", said.err);
    }
    assert!(!place.files().contains(&"texts/cuda-sm_80/sass.sass".to_string()));
    let shown = run("inspect a.llamac --json").ok().json();
    assert_eq!(shown["targets"][0]["gpu"]["ptx_isa"], "7.4");
    assert!(shown["targets"][0]["gpu"]["cubin"].is_null(), "{shown}");
    let said = run("emit builtin --stage sass");
    assert!(said.exit == Some(2) && said.err.contains("nvidia-cuda-nvdisasm"), "{said:?}");
    let said = run("doctor").ok().out;
    for expected in ["\nptxas        missing\n", "\nnvdisasm     missing\n", "\n  python3 -m pip install "] {
        assert!(said.contains(expected), "{said}");
    }

    // What is named has to be there, and has to be ptxas.
    let named = |program: &str| {
        let mut command = place.command("emit builtin --stage sass");
        Said::of(command.env("LLAMAC_PTXAS", program))
    };
    let said = named("nonesuch");
    assert!(said.exit == Some(2) && said.err.contains("nonesuch: cannot be run"), "{said:?}");
    let said = named("/bin/echo");
    assert!(said.exit == Some(2) && said.err.contains("/bin/echo: found"), "{said:?}");
    Ok(())
}

/// An assembler that is told to use few registers spills, and the command names the kernels.
fn spills(name: &str) -> Checked<()> {
    let Some(ptxas) = assemblers(name)?.into_iter().next() else { return Ok(()) };
    let place = Place::new();
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --version ] || sed -i 's/maxnreg [0-9]*/maxnreg 32/' kernels.ptx\nexec '{}' \"$@\"\n",
        ptxas.file.display()
    );
    place.write("ptxas", script);
    fs::set_permissions(place.path("ptxas"), fs::Permissions::from_mode(0o755))?;
    let few = Program { file: place.path("ptxas"), ..ptxas };
    let said = with_tools(&place, &few, "compile builtin -o a.llamac --ctx 64 --target cuda:sm_80").ok();
    let warning = |line: &str| {
        line.starts_with("cuda:sm_80: warning of ptxas ")
            && line.contains(": @a: a stack of ")
            && line.contains(" bytes stored and ")
    };
    assert!(said.err.lines().any(warning), "{}", said.err);
    // An object is all that is said then: it has the warnings.
    let said =
        with_tools(&place, &few, "compile builtin -o a.llamac --ctx 64 --target cuda:sm_80 --json").ok();
    let notes = said.json()["notes"].clone();
    let notes = notes.as_array().ok_or("no notes")?.iter().filter_map(|note| note.as_str());
    assert!(notes.into_iter().any(warning), "{}", said.out);
    Ok(())
}
