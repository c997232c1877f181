//! Reproducers: a group alone lowers to the kernel that it has in its graph; a wrong kernel is shown again from its folder,
//! and is right once its text is; a damaged folder is refused.

use crate::Checked;
use crate::command::{Place, Said};
use codegen::cpu::{Form, Level};
use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::families::GroupView;
use ir::graph::Graph;
use ir::interp::Tensor;
use ir::kernel::Kernel;
use libtest_mimic::Trial;
use llamac::check::cases::{Case, cases, random};
use llamac::check::{Distribution, Feed, Subject, device::Device, results};
use llamac::compare::reproducer::{KernelCase, Reproducer};
use llamac::compile;
use llamac::model::Model;
use llamac::pipeline::Request;
use runtime::artifact::{Artifact, ArtifactWriter};
use runtime::manifest::Manifest;
use safetensors::SafeTensors;
use std::fs;
use std::rc::Rc;

pub fn trials() -> Vec<Trial> {
    let test = |name: &str, test: fn() -> Checked<()>| Trial::test(name.to_string(), move || Ok(test()?));
    vec![
        test("reproducer holds a group as it was", alone),
        test("reproducer shows a wrong kernel again", shows_again),
        test("reproducer of wrong code in an artifact", wrong_code),
        test("reproducer refuses a damaged folder", damaged),
    ]
}

fn native() -> Checked<Level> {
    Ok(codegen::cpu::level("cpu:native")?)
}

/// Every group of a graph, taken out of it: a valid graph that lowers to the same kernel. Gives how many there are.
fn groups_alone(graph: &Graph, level: &Level) -> Checked<usize> {
    let mut lowered = 0;
    for view in GroupView::all(graph) {
        let Ok(whole) = ir::families::lower(&view, &level.target) else { continue };
        let empty = |_| Rc::new(Tensor::new(DType::F32, &[0], &[]));
        let read = (&[0; MAX_SYMBOLS], &empty as &dyn Fn(_) -> _);
        let case = KernelCase::of(&view, (&whole.kernel, &level.name), read, &[], &[]);
        let text = case.graph().to_string();
        let graph = ir::parse::graph(&text)?;
        ir::verify::verify(&graph)?;
        let views = GroupView::all(&graph);
        let [alone] = &views[..] else { return Err(format!("{} groups\n{text}", views.len()).into()) };
        let found = ir::families::lower(alone, &level.target)?;
        let numbers = |kernel: &Kernel| Kernel { name: String::new(), ..kernel.clone() }.to_string();
        assert_eq!(numbers(&found.kernel), numbers(&whole.kernel), "{text}");
        assert_eq!(found.args.len(), whole.args.len());
        lowered += 1;
    }
    Ok(lowered)
}

fn alone() -> Checked<()> {
    let (level, config) = (native()?, Model::open("builtin")?.config()?);
    let mut groups = 0;
    for dtype in [DType::F32, DType::BF16] {
        let request = Request { config: &config, dtype, context: 96, measured: None };
        for entry in compile::lower(&request, "cpu:native", false)?.lowered.entries {
            groups += groups_alone(&entry.graph, &level)?;
        }
    }
    for case in cases().into_iter().chain(random(1, 60)) {
        let Subject { graph } = Subject::new(case.graph, &level.target);
        groups += groups_alone(&graph, &level)?;
    }
    println!("{groups} groups");
    assert!(groups > 500, "{groups} groups are few");
    Ok(())
}

/// The residual is subtracted.
fn wrong(kernel: &Kernel) -> Checked<Kernel> {
    let text = kernel.to_string();
    let changed = text.replacen(" + %sum", " - %sum", 1);
    assert_ne!(text, changed, "there is no such sum");
    Ok(ir::kernel::parse::parse(&changed)?.remove(0))
}

/// A product with a residual, and a kernel that gets it wrong, in the folder `case`.
fn wrong_case(place: &Place) -> Checked<KernelCase> {
    let level = native()?;
    let case = cases().into_iter().find(|case| case.name.starts_with("residual")).ok_or("no such case")?;
    let mut subject = Subject::new(case.graph, &level.target);
    let group = subject.groups().last().ok_or("no group")?;
    let feed = Feed { symbols: Case::symbols(5), past: 0, distribution: Distribution::Normal, seed: 1 };
    let tensors = subject.tensors(&feed)?;
    let mut lowered = subject.lower(group, "", &level.target)?;
    lowered.kernel = wrong(&lowered.kernel)?;
    let mut device = Device::cpu(&level, std::slice::from_ref(&lowered.kernel))?;
    let read = (&feed.symbols, &tensors);
    let found = results(&subject, group, (0, &lowered), &mut device, read)?;
    let expected = subject.expected(group, &feed.symbols, &tensors)?;
    let case = KernelCase::of(
        &GroupView::new(&subject.graph, group),
        (&lowered.kernel, &level.name),
        (&feed.symbols, &|id| tensors[&id].clone()),
        &found,
        &expected,
    );
    Reproducer::Kernel(Box::new(case.clone())).write(&place.path("case"), "a wrong sign")?;
    Ok(case)
}

fn shows_again() -> Checked<()> {
    let place = Place::new();
    let case = wrong_case(&place)?;
    assert!(Reproducer::Kernel(Box::new(case)).write(&place.path("case"), "").is_err(), "it was overwritten");
    // What llamac itself makes of the group is right.
    let said = place.ok("compare --replay case");
    assert!(said.out.contains("which is not kernel.ir any more"), "{}", said.out);
    // Whoever edits the kernel has that run: here with another name in it, and then put right.
    let kernel = String::from_utf8(place.read("case/kernel.ir"))?;
    place.write("case/kernel.ir", kernel.replace("%sum", "%s"));
    let said = place.run("compare --replay case --json");
    assert_eq!(said.exit, Some(1), "{}{}", said.out, said.err);
    let fault = said.json()["first_fault"].clone();
    assert!(fault["found"] != fault["expected"] && fault["index"].is_array(), "{fault}");
    assert!(said.json()["worst"].as_f64().is_some_and(|worst| worst > 1.0), "{}", said.out);
    // The kernel interpreter says the same of it.
    let said = place.run("compare --replay case --device interpreter --json");
    assert_eq!((said.exit, &said.json()["first_fault"]["index"]), (Some(1), &fault["index"]), "{}", said.err);
    // A launch that goes astray has no numbers to judge.
    let stores = |line: &&str| !line.trim_start().starts_with("store %y");
    let without: Vec<&str> = kernel.lines().filter(stores).collect();
    place.write("case/kernel.ir", without.join("\n"));
    let said = place.run("compare --replay case --json");
    let found = &said.json()["first_fault"]["what"];
    assert!(said.exit == Some(1) && found.as_str().is_some_and(|what| what.contains("%y")), "{found}");
    place.write("case/kernel.ir", kernel.replacen(" - %sum", " + %sum", 1));
    assert!(place.ok("compare --replay case").out.contains("which was edited"));
    // The folder holds what each stage reads, and the numbers of both sides.
    place.ok("opt case/graph.ir --passes lower");
    let bytes = place.read("case/tensors.safetensors");
    let tensors = SafeTensors::deserialize(&bytes)?;
    for prefix in ["input.", "found.", "expected."] {
        assert!(tensors.names().iter().any(|name| name.starts_with(prefix)), "{prefix}");
    }
    Ok(())
}

/// Compiles `right.llamac`, and `wrong.llamac` with a mistake in the code of the kernel `down`, which decode steps run.
pub fn forge(place: &Place, dtype: DType) -> Checked<()> {
    place.ok(&format!("compile builtin --dtype {dtype} --ctx 32 --taps -o right.llamac"));
    let (level, config) = (native()?, Model::open("builtin")?.config()?);
    let request = Request { config: &config, dtype, context: 32, measured: None };
    let mut lowered = compile::lower(&request, "cpu:native", true)?.lowered;
    let number = lowered.kernels.iter().position(|kernel| kernel.name == "down").ok_or("no such kernel")?;
    lowered.kernels[number] = wrong(&lowered.kernels[number])?;
    let text = codegen::lower::module(&lowered.plan, &lowered.kernels, level.features, true);
    let code = codegen::link::link(&codegen::cpu::compile(&text, &level, Form::Object)?)?;
    rewrite(place, "wrong.llamac", &[("code.", &code)])
}

/// Writes `right.llamac` under another name, with other contents for sections whose names begin so.
pub fn rewrite(place: &Place, name: &str, changed: &[(&str, &[u8])]) -> Checked<()> {
    let right = Artifact::open(&place.path("right.llamac"))?;
    let mut writer = ArtifactWriter::create(&place.path(name), None)?;
    for section in right.sections() {
        let other = changed.iter().find(|(begin, _)| section.name.starts_with(begin));
        let mut out = writer.section(&section.name)?;
        out.append(other.map_or(right.require(&section.name)?, |(_, contents)| contents))?;
        out.end()?;
    }
    writer.finish(&right.manifest::<Manifest>()?)?;
    Ok(())
}

/// An artifact whose code is not what its plan's kernels say: level op names the op, the kernel alone is right.
fn wrong_code() -> Checked<()> {
    let place = Place::new();
    forge(&place, DType::F32)?;
    place.ok("compare right.llamac --level op");
    for (how, folder) in [
        ("", place.path("wrong-l0.down-reproducer")),
        ("", place.path("wrong-l0.down-reproducer-2")),
        ("--reproducer here", "here".into()),
    ] {
        let artifact = place.path("wrong.llamac").display().to_string();
        let said = place.run(&format!("compare {artifact} --level op --json {how}"));
        assert_eq!(said.exit, Some(1), "{}", said.err);
        let fault = said.json()["first_fault"].clone();
        assert_eq!((fault["layer"].as_u64(), fault["op"].as_str()), (Some(0), Some("down")), "{fault}");
        assert_eq!(fault["reproducer"].as_str(), folder.to_str());
        let said = place.ok(&format!("compare --replay {} --json", folder.display()));
        assert_eq!(said.json()["verdict"], "pass");
    }
    // Wrong logits are followed by a look at each op.
    place.ok("compare right.llamac");
    let said = place.run("compare wrong.llamac --json");
    let fault = &said.json()["first_fault"];
    assert_eq!((fault["layer"].as_u64(), fault["op"].as_str()), (Some(0), Some("down")), "{fault}");
    let said = place.run("compare wrong.llamac --level op");
    assert!(said.err.contains("alone the kernel is right"), "{}", said.err);
    let said = place.run("compare wrong.llamac --level op --reproducer here");
    assert_eq!(said.exit, Some(2), "{}", said.err);
    Ok(())
}

/// A file of each kind of folder away, short, or of something else.
fn damaged() -> Checked<()> {
    let place = Place::new();
    wrong_case(&place)?;
    place.ok("compile builtin --dtype f32 --ctx 32 -o model.llamac");
    place.flip("model.llamac", "l0.q.1", 4, 30)?;
    let said = place.run("compare model.llamac --checkpoint builtin --reproducer weight");
    assert_eq!(said.exit, Some(1), "{}{}", said.out, said.err);
    assert_eq!(place.run("compare --replay weight").exit, Some(1));
    let mut tried = 0;
    for folder in ["case", "weight"] {
        let refused = |said: Said, file: &str| {
            assert_eq!(said.exit, Some(3), "{file}: {}{}", said.out, said.err);
            assert!(said.err.contains(file), "{}", said.err);
        };
        let replay = format!("compare --replay {folder}");
        let mut files = place.files();
        files.retain(|file| file.starts_with(&format!("{folder}/")) && !file.ends_with("README"));
        for file in files {
            let whole = place.read(&file);
            let other = if folder == "case" { "weight" } else { "case" };
            let other = fs::read(place.path(&file.replacen(folder, other, 1))).unwrap_or_default();
            for damage in [&whole[..whole.len() / 2], b"{}", b"\xff", &other] {
                place.write(&file, damage);
                // Another kind of case asks for other files.
                let name = if damage == other && file.ends_with("case.json") { folder } else { &file };
                refused(place.run(&replay), name);
                tried += 1;
            }
            fs::remove_file(place.path(&file))?;
            refused(place.run(&replay), &file);
            place.write(&file, whole);
        }
        assert_eq!(place.run("compare --replay nowhere").exit, Some(3));
    }
    assert!(tried >= 28, "{tried}");
    Ok(())
}
