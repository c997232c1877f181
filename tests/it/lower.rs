//! What kernels become: LLVM IR, assembly, objects, PTX.
//!
//! Texts of `tests/lower/{llvm,asm,ptx}/` are kernels or graphs; the folder says what is made of them, comments what must
//! be in it. Another LLVM picks other registers, so features are compared and not texts.
//!
//! * `// target: cpu:x86-64-v3`: the machine. `// needs: avx512bf16`: skipped where the machine has no such thing.
//! * `// check: vdpbf16ps`: stands on a line after that of the `check` above.
//! * `// not: call`: stands on no line between the `check` above it and the one below it; `// never: call`: on no line.
//! * `// loop: fmla`: all of these are about the innermost loop that holds this.
//! * `// refused: message`: no code comes of it, for this reason.
//!
//! Objects of all kernels of the built-in model, and of random graphs, are disassembled for each CPU level; PTX of the same
//! is read and assembled (`ptxas.rs`).

use super::skipped::skip;
use super::{Checked, machine, ptxas};
use codegen::cpu::{Form, LEVELS, Level};
use codegen::lower::Pause;
use codegen::nvptx::{self, ARCHITECTURES, Architecture};
use ir::families::{GroupView, lower as lower_group};
use ir::graph::Family;
use ir::kernel::Kernel;
use ir::passes::lower::Kernels;
use ir::passes::{PASSES, Run};
use ir::plan::{Cost, Entry, Give, Launch, Plan, PlanKernel};
use ir::random::random_graph;
use ir::target::Target;
use ir::{DType, Graph};
use libtest_mimic::Trial;
use llamac::model::Model;
use llamac::pipeline::{self, Request};
use std::path::{Path, PathBuf};
use std::process::Command;

/// One test a text, and one a machine.
pub fn trials() -> Vec<Trial> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lower");
    let mut trials = Vec::new();
    for folder in ["asm", "llvm", "ptx"] {
        let texts = std::fs::read_dir(root.join(folder)).expect("a folder of texts");
        let mut texts: Vec<PathBuf> = texts.map(|entry| entry.expect("a readable folder").path()).collect();
        texts.sort();
        for file in texts {
            let stem = file.file_stem().expect("a file").to_string_lossy().into_owned();
            let name = format!("lower {folder}/{stem}");
            trials.push(Trial::test(name.clone(), move || Ok(text(&name, folder, &file)?)));
        }
    }
    trials.push(Trial::test("lower checks can fail", || Ok(checks_can_fail()?)));
    for (level, _) in LEVELS {
        let name = format!("lower objects {level}");
        trials.push(Trial::test(name.clone(), move || Ok(objects(&name, level)?)));
    }
    trials.push(Trial::test("lower products stay in registers", || Ok(products_in_registers()?)));
    for gpu in &ARCHITECTURES {
        for dtype in [DType::F32, DType::BF16] {
            let name = format!("lower ptx {} {dtype}", machine(gpu));
            trials.push(Trial::test(name.clone(), move || Ok(models_in_ptx(&name, dtype, gpu)?)));
        }
        let name = format!("lower ptx {} random", machine(gpu));
        trials.push(Trial::test(name.clone(), move || Ok(random_in_ptx(&name, gpu)?)));
    }
    trials
}

// Texts.

/// A line of a text that says something of the code.
enum Directive<'t> {
    Check(&'t str),
    Not(&'t str),
    Never(&'t str),
}

fn text(name: &str, folder: &str, file: &Path) -> Checked<()> {
    let text = std::fs::read_to_string(file)?;
    let of = |key: &str| text.lines().find_map(|line| line.strip_prefix("// ")?.strip_prefix(key));
    let target = of("target: ").ok_or("no `// target: `")?;
    let code = if folder == "ptx" {
        let gpu = nvptx::architecture(target).ok_or("no GPU of that name")?;
        let ptx = |kernels: &[Kernel]| nvptx::compile(&nvptx::llvm(kernels, gpu)?, gpu);
        match (ptx(&kernels(&text, &gpu.target())?), of("refused: ")) {
            (Ok(ptx), None) => {
                read(&ptx)?;
                ptxas::check_instructions(name, &ptx, gpu)?;
                ptx
            }
            (Err(why), Some(expected)) if why.to_string() == expected => return Ok(()),
            (found, expected) => {
                let found = found.map_or_else(|e| e.to_string(), |_| "PTX".to_string());
                return Err(format!("expected {}, found {found}", expected.unwrap_or("PTX")).into());
            }
        }
    } else {
        let level = codegen::cpu::level(target)?;
        if let Some(feature) = of("needs: ").filter(|f| !level.requires.iter().any(|r| r == f)) {
            skip(name, &format!("this machine has no {feature}"));
            return Ok(());
        }
        let module = module(&kernels(&text, &level.target)?, &level);
        if folder == "llvm" { module } else { kernels_of(&assembly(&module, &level)?) }
    };
    let code = match of("loop: ") {
        None => code,
        Some(holds) => {
            innermost_loop(&code, holds).ok_or_else(|| format!("no loop with `{holds}`\n{code}"))?
        }
    };
    matches(&directives(&text), &code).map_err(|e| format!("{e}\n{code}").into())
}

/// The shortest piece of code, from a label to a jump back to it, that holds a text.
fn innermost_loop(code: &str, holds: &str) -> Option<String> {
    let lines: Vec<&str> = code.lines().collect();
    let mut found: Option<&[&str]> = None;
    for (begin, line) in lines.iter().enumerate() {
        let Some(label) = line.strip_suffix(':').filter(|l| l.starts_with(['.', '$'])) else { continue };
        let jumps = |line: &&str| line.trim_end_matches(';').ends_with(&format!("\t{label}"));
        let Some(end) = lines.iter().rposition(jumps).filter(|&end| end > begin) else { continue };
        let piece = &lines[begin..=end];
        if piece.iter().any(|l| l.contains(holds)) && found.is_none_or(|f| piece.len() < f.len()) {
            found = Some(piece);
        }
    }
    found.map(|lines| lines.join("\n"))
}

fn directives(text: &str) -> Vec<Directive<'_>> {
    fn directive(line: &str) -> Option<Directive<'_>> {
        let (key, value) = line.strip_prefix("// ")?.split_once(": ")?;
        match key {
            "check" => Some(Directive::Check(value)),
            "not" => Some(Directive::Not(value)),
            "never" => Some(Directive::Never(value)),
            _ => None,
        }
    }
    text.lines().filter_map(directive).collect()
}

/// Does the code hold what it must, in order, and between nothing that it must not?
fn matches(directives: &[Directive<'_>], code: &str) -> Result<(), String> {
    let lines: Vec<&str> = code.lines().collect();
    let none_of = |refused: &[&str], lines: &[&str]| {
        let found = refused.iter().find_map(|r| lines.iter().find(|l| l.contains(r)).map(|l| (r, l)));
        found.map_or(Ok(()), |(refused, line)| Err(format!("`{refused}` stands in `{}`", line.trim())))
    };
    let (mut at, mut refused) = (0, Vec::new());
    for directive in directives {
        match *directive {
            Directive::Not(text) => refused.push(text),
            Directive::Never(text) => none_of(&[text], &lines)?,
            Directive::Check(text) => {
                let found = lines[at..].iter().position(|line| line.contains(text));
                let found = at + found.ok_or_else(|| format!("`{text}` is missing after line {at}"))?;
                none_of(&refused, &lines[at..found])?;
                refused.clear();
                at = found + 1;
            }
        }
    }
    none_of(&refused, &lines[at..])
}

fn checks_can_fail() -> Checked<()> {
    let code = "one\ntwo\nthree\nfour";
    let says = |text: &str| matches(&directives(text), code).err().unwrap_or_default();
    assert_eq!(says("// check: one\n// check: three\n// not: two"), "");
    assert_eq!(says("// check: two\n// check: one"), "`one` is missing after line 2");
    assert_eq!(says("// check: one\n// not: two\n// check: three"), "`two` stands in `two`");
    assert_eq!(says("// check: two\n// not: four"), "`four` stands in `four`");
    assert_eq!(says("// not: four\n// check: two\n// not: one"), "");
    assert_eq!(says("// check: two\n// never: one"), "`one` stands in `one`");
    Ok(())
}

/// The kernels of a text: as they stand there, or those that the passes make of its graphs.
fn kernels(text: &str, target: &Target) -> Checked<Vec<Kernel>> {
    if text.lines().any(|line| line.starts_with("kernel ")) {
        let kernels = ir::kernel::parse::parse(text)?;
        kernels
            .iter()
            .try_for_each(|kernel| ir::kernel::verify::verify(kernel).map_err(|e| e.to_string()))?;
        return Ok(kernels);
    }
    let mut kernels = Kernels::default();
    for mut graph in ir::parse::graphs(text)? {
        prepare(&mut graph, target)?;
        ir::passes::lower::lower(&graph, target, &mut kernels)?;
    }
    Ok(kernels.list)
}

/// Runs all passes up to `lower`.
fn prepare(graph: &mut Graph, target: &Target) -> Checked<()> {
    ir::verify::verify(graph)?;
    for pass in &PASSES {
        match pass.run {
            Run::Graph(run) => run(graph, target)?,
            Run::Graphs(run) => run(&mut [&mut *graph]),
            Run::Kernels | Run::Plan => {}
        }
    }
    Ok(())
}

/// A module with an entry point that launches each kernel: nothing else keeps their code.
fn module(kernels: &[Kernel], level: &Level) -> String {
    let mut plan = Plan::default();
    let mut launches = Vec::new();
    for (number, kernel) in kernels.iter().enumerate() {
        let (name, family, schedule) = (kernel.name.clone(), kernel.family, kernel.schedule.clone());
        plan.kernels.push(PlanKernel { name, family, schedule, measured: false });
        let args = (0..kernel.params().count()).collect();
        launches.push(Launch { kernel: number, args, cost: Cost::default() });
    }
    let (name, symbols, give) = ("all".to_string(), Default::default(), Give::Nothing);
    let entry = Entry { name, symbols, give, tokens: 0, positions: 0, logits: None, token: None, launches };
    plan.entries.push(entry);
    codegen::lower::module(&plan, kernels, level.features, false)
}

fn assembly(module: &str, level: &Level) -> Checked<String> {
    Ok(String::from_utf8(codegen::cpu::compile(module, level, Form::Assembly)?)?)
}

/// The functions of kernels, out of an assembly.
fn kernels_of(assembly: &str) -> String {
    let mut inside = false;
    let mut out = String::new();
    for line in assembly.lines() {
        inside |= line.starts_with("k.") || line.starts_with("\"k.");
        inside &= !line.starts_with(".Lfunc_end");
        if inside {
            out += line;
            out += "\n";
        }
    }
    out
}

// Objects.

/// Random graphs whose row-wise and element-wise kernels are lowered beside a model's.
const SEEDS: std::ops::Range<u64> = 0..40;

/// No instruction leaves the object; products and attention are made of the machine's multiply-adds.
fn objects(name: &str, target: &str) -> Checked<()> {
    let level = match codegen::cpu::level(target) {
        Err(why @ codegen::cpu::CodegenError::Native { .. }) => {
            skip(name, &why.to_string());
            return Ok(());
        }
        level => level?,
    };
    let mut by_family = [0; Family::ALL.len()];
    for dtype in [DType::F32, DType::BF16] {
        let mut kernels = Kernels::default();
        for kernel in model("builtin", dtype, &level.target)? {
            kernels.add(kernel);
        }
        random_kernels(&level.target, &mut kernels)?;
        let object = codegen::cpu::compile(&module(&kernels.list, &level), &level, Form::Object)?;
        let Some(disassembly) = disassemble(&object)? else {
            skip(name, "there is no llvm-objdump-22; `apt-get install llvm-22` brings it");
            return Ok(());
        };
        check_object(&disassembly, &kernels.list, &level).map_err(|e| format!("{dtype}: {e}"))?;
        // The check sees a call out of the object, and a product without its instruction.
        let call = if level.triple.starts_with("aarch64") { "bl" } else { "callq" };
        let called = disassembly.replacen("<k.token>:", &format!("<k.token>:\n0:\t{call}\t0x0 <expf>"), 1);
        assert!(check_object(&called, &kernels.list, &level).is_err(), "a call was overlooked");
        let other =
            disassembly.replace("fmla", "fmul").replace("vfmadd", "vmul").replace("vdpbf16ps", "vmul");
        assert!(check_object(&other, &kernels.list, &level).is_err(), "a product was overlooked");
        kernels.list.iter().for_each(|k| by_family[k.family as usize] += 1);
    }
    assert!(by_family.iter().all(|&count| count > 0), "a family has no kernel here: {by_family:?}");
    Ok(())
}

fn check_object(disassembly: &str, kernels: &[Kernel], level: &Level) -> Result<(), String> {
    if let Some(symbol) = disassembly.lines().find(|line| line.contains("*UND*")) {
        return Err(format!("a symbol is not defined: {symbol}"));
    }
    // A function begins with `0000000000000000 <name>:`.
    let mut functions: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in disassembly.lines() {
        if let Some(function) = line.strip_suffix(">:").and_then(|l| l.split_once(" <")) {
            functions.push((function.1, Vec::new()));
        } else if let Some((_, lines)) = functions.last_mut() {
            lines.push(line);
        }
    }
    for kernel in kernels {
        let symbol = codegen::lower::symbol(&kernel.name);
        let symbol = symbol.trim_matches(['@', '"']);
        let (_, lines) = functions.iter().find(|f| f.0 == symbol).ok_or(format!("no function {symbol}"))?;
        let is_call = |line: &&&str| ["\tbl\t", "\tblr\t", "\tcall"].iter().any(|call| line.contains(call));
        let inside = |line: &&&str| line.contains("<barrier>") || line.contains("<m.");
        if let Some(call) = lines.iter().filter(is_call).find(|line| !inside(line)) {
            return Err(format!("{symbol} calls: {}", call.trim()));
        }
        if let Some(multiply) = multiply(kernel, level)
            && !lines.iter().any(|line| line.contains(multiply))
        {
            return Err(format!("{symbol} has no {multiply}"));
        }
    }
    Ok(())
}

/// In every product's innermost loop, of a real model and whatever stands around it, no accumulator is on the stack, if its
/// operands need no conversion.
fn products_in_registers() -> Checked<()> {
    for level in ["cpu:x86-64-v4", "cpu:native"] {
        let Ok(level) = codegen::cpu::level(level) else { continue };
        let dtypes = [Some(DType::F32), level.features.bf16.then_some(DType::BF16)];
        for dtype in dtypes.into_iter().flatten() {
            let kernels = model("preset:tinyllama-1.1b", dtype, &level.target)?;
            for kernel in kernels.iter().filter(|k| k.family == Family::Dot) {
                let code = kernels_of(&assembly(&module(std::slice::from_ref(kernel), &level), &level)?);
                let multiply = multiply(kernel, &level).ok_or("a product multiplies")?;
                let product = innermost_loop(&code, multiply).ok_or("a product is a loop")?;
                // An address may be there; a vector may not.
                if product.lines().any(|line| line.contains("%rsp") && line.contains("%zmm")) {
                    let on = format!("{} {dtype}, @{}", level.name, kernel.name);
                    return Err(format!("{on}: on the stack in its loop:\n{product}").into());
                }
            }
        }
    }
    Ok(())
}

/// The instruction that a kernel's products are made of, if it has any.
fn multiply(kernel: &Kernel, level: &Level) -> Option<&'static str> {
    let text = kernel.to_string();
    let bf16 = text.contains("dot.bf16(");
    match level.features.pause {
        _ if !bf16 && !text.contains("fma(") => None,
        Pause::X86 if bf16 && level.features.bf16 => Some("vdpbf16ps"),
        Pause::X86 => Some("vfmadd"),
        Pause::Aarch64 => Some("fmla"),
        Pause::Grid => None,
    }
}

/// Symbols, code and relocations of an object; `None` where the tool is missing.
fn disassemble(object: &[u8]) -> Checked<Option<String>> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), object)?;
    for tool in ["llvm-objdump-22", "/usr/lib/llvm-22/bin/llvm-objdump"] {
        let run = Command::new(tool).args(["-d", "-r", "-t", "--no-show-raw-insn"]).arg(file.path()).output();
        let Ok(output) = run else { continue };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return Ok(Some(String::from_utf8(output.stdout)?));
    }
    Ok(None)
}

/// All kernels of a model.
fn model(name: &str, dtype: DType, target: &Target) -> Checked<Vec<Kernel>> {
    let config = Model::open(name)?.config()?;
    let context = config.context.min(512);
    Ok(pipeline::lower(&Request { config: &config, dtype, context, measured: None }, target)?.kernels)
}

/// Adds what random graphs give: kernels of the groups that have a generator.
fn random_kernels(target: &Target, kernels: &mut Kernels) -> Checked<()> {
    for seed in SEEDS {
        let mut graph = random_graph(seed, 20);
        ir::passes::simplify::simplify(&mut graph);
        ir::passes::fuse::fuse(&mut graph, target);
        ir::passes::layout::layout(&mut graph, target);
        for view in GroupView::all(&graph) {
            if let Ok(lowered) = lower_group(&view, target) {
                kernels.add(lowered.kernel);
            }
        }
    }
    Ok(())
}

// PTX.

fn models_in_ptx(name: &str, dtype: DType, gpu: &Architecture) -> Checked<()> {
    for of in ["builtin", "preset:smollm2-135m", "preset:llama-7b", "preset:llama3-8b"] {
        let ptx = ptx(&model(of, dtype, &gpu.target())?, gpu)?;
        ptxas::check_instructions(name, &ptx, gpu)?;
    }
    Ok(())
}

fn random_in_ptx(name: &str, gpu: &Architecture) -> Checked<()> {
    let mut kernels = Kernels::default();
    random_kernels(&gpu.target(), &mut kernels)?;
    let count = |family: Family| kernels.list.iter().filter(|k| k.family == family).count();
    for family in [Family::Rowwise, Family::Elementwise, Family::Gather] {
        assert!(count(family) > 0, "no {} kernel among them", family.name());
    }
    ptxas::check(name, &ptx(&kernels.list, gpu)?, gpu)
}

/// A module of kernels, which is read.
fn ptx(kernels: &[Kernel], gpu: &Architecture) -> Checked<String> {
    let ptx = nvptx::compile(&nvptx::llvm(kernels, gpu)?, gpu)?;
    read(&ptx)?;
    Ok(ptx)
}

/// PTX of a text of `tests/lower/ptx/`.
pub fn ptx_of(text: &str, gpu: &Architecture) -> Checked<String> {
    ptx(&kernels(text, &gpu.target())?, gpu)
}

/// Every instruction of PTX must be known, and every kernel found.
fn read(ptx: &str) -> Checked<()> {
    let module = runtime::ptx::Module::parse(ptx)?;
    assert_eq!(module.kernels.len(), ptx.matches(".visible .entry").count());
    Ok(())
}
