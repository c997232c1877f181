//! `compare`: what is right passes at every level; each planted fault is named by layer and op.

use crate::Checked;
use crate::command::{Place, Said};
use crate::skipped::skip;
use ir::DType;
use ir::interp::Rounding;
use ir::op::Op;
use libtest_mimic::Trial;
use llamac::compare::layers::Layers;
use llamac::compare::logits::{Logits, LogitsFault};
use llamac::compare::ops::Ops;
use llamac::compare::stored;
use llamac::compile;
use llamac::pipeline::Request;
use llamac::reference::Reference;
use runtime::artifact::Artifact;
use runtime::cpu::Cpu;
use runtime::device::{Program, Tapped};
use runtime::interpreter::InterpretedProgram;
use runtime::manifest::Manifest;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// One test a claim.
pub fn trials() -> Vec<Trial> {
    let trial = |name: &'static str, test: fn(&Place, &Model) -> Checked<()>| {
        Trial::test(name, move || {
            let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared");
            let folder = shared.join("models/variants/gqa4");
            let reference = shared.join("reference/variants/gqa4.safetensors");
            if !folder.exists() || !reference.exists() {
                skip(name, &format!("there is no {} or no {}", folder.display(), reference.display()));
                return Ok(());
            }
            Ok(test(&Place::new(), &Model { folder, reference })?)
        })
    };
    vec![
        trial("compare passes what is right", passes),
        trial("compare names a scaled tensor", scaled),
        trial("compare names swapped heads", swapped),
        trial("compare names another rope theta", theta),
        trial("compare names a flipped bit", flipped),
        trial("compare in bf16 sees other weights", other_weights),
        trial("compare names a layer", layers),
        trial("compare names an op", ops),
        trial("compare refuses a damaged reference", damaged),
    ]
}

/// A model with two layers, and what it should say.
struct Model {
    folder: PathBuf,
    reference: PathBuf,
}

impl Model {
    /// A copy, with other bytes for one tensor.
    fn with(&self, place: &Place, tensor: &str, change: impl Fn(&mut [f32])) -> Checked<String> {
        let bytes = fs::read(self.folder.join("model.safetensors"))?;
        let tensors = SafeTensors::deserialize(&bytes)?;
        let mut changed = Vec::new();
        for (name, view) in tensors.tensors() {
            let mut data = view.data().to_vec();
            if name == tensor {
                assert_eq!(view.dtype(), Dtype::F32, "the model is of f32");
                let mut values: Vec<f32> =
                    data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                change(&mut values);
                data = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            }
            changed.push((name, view.dtype(), view.shape().to_vec(), data));
        }
        let views = changed.iter().map(|(name, dtype, shape, data)| {
            (name.clone(), TensorView::new(*dtype, shape.clone(), data).expect("as many bytes as before"))
        });
        place.write("changed/model.safetensors", safetensors::serialize(views, None)?);
        place.write("changed/config.json", fs::read(self.folder.join("config.json"))?);
        Ok("changed".to_string())
    }
}

fn passes(place: &Place, model: &Model) -> Checked<()> {
    let (folder, reference) = (model.folder.display(), model.reference.display());
    for dtype in ["f32", "bf16"] {
        let by_modules =
            [format!("--level layer --reference {MODULES}"), format!("--modules --reference {MODULES}")];
        let levels = ["", "--level layer", "--level op"].map(str::to_string);
        for how in levels.into_iter().chain([format!("--reference {reference}")]).chain(by_modules) {
            let said = place.ok(&format!("compare {folder} --dtype {dtype} {how} --json")).json();
            assert_eq!((&said["verdict"], &said["first_fault"]), (&"pass".into(), &Value::Null));
            let worst = said["worst"].as_f64().ok_or("no worst")?;
            assert!(worst > 0.0 && worst < 1.0, "{worst} of the bound");
        }
    }
    Ok(())
}

/// A program whose layer 1 does something else than the interpreter's: that layer is wrong on what it was fed, the one
/// before is right.
fn layers(place: &Place, model: &Model) -> Checked<()> {
    let changed =
        model.with(place, "model.layers.1.mlp.down_proj.weight", |w| w.iter_mut().for_each(|x| *x *= 1.1))?;
    for dtype in ["f32", "bf16"] {
        for (folder, name) in [(model.folder.display().to_string(), "right"), (changed.clone(), "wrong")] {
            place.ok(&format!("compile {folder} --dtype {dtype} --taps -o {name}.llamac"));
        }
        let judge = |name: &str| -> Checked<Layers> {
            let artifact = Artifact::open(&place.path(&format!("{name}.llamac")))?;
            let manifest: Manifest = artifact.manifest()?;
            let mut program = Cpu { threads: 1 }.open(&artifact)?;
            let target = runtime::cpu::choose(artifact.file(), &manifest)?;
            let graphs = stored::fused(&artifact, target, program.plan())?;
            let right = Artifact::open(&place.path("right.llamac"))?;
            let mut oracle = InterpretedProgram::load(&right, Rounding::Stored)?;
            let mut layers = Layers::default();
            layers.judge(&mut program, &graphs, &mut oracle, &[1, 5, 7, 2, 3, 9, 4])?;
            Ok(layers)
        };
        let right = judge("right")?;
        assert!(right.fault.is_none() && right.worst() > 0.0 && right.worst() < 1.0, "{:?}", right.rows);
        let wrong = judge("wrong")?;
        let fault = wrong.fault.as_ref().ok_or("the weights were overlooked")?;
        assert_eq!((fault.layer, fault.op.as_deref()), (Some(1), Some("down")), "{fault}");
        assert!(fault.kernel.is_some() && fault.index.len() == 2, "{fault}");
        assert!(wrong.rows.iter().any(|(of, share)| of == "layer 0" && *share < 1.0), "{:?}", wrong.rows);
    }
    Ok(())
}

/// In bf16 the bound is the interpreter's own error: weights that are not the reference's must not widen it.
fn other_weights(place: &Place, model: &Model) -> Checked<()> {
    let tensor = "model.layers.0.mlp.down_proj.weight";
    let changed = model.with(place, tensor, |w| w.iter_mut().for_each(|x| *x *= 1.1))?;
    let said =
        place.run(&format!("compare {changed} --dtype bf16 --level layer --reference {MODULES} --json"));
    names(&said, Some(0), "model.layers.0");
    place.ok(&format!("compile {changed} --dtype bf16 -o changed.llamac"));
    let artifact = Artifact::open(&place.path("changed.llamac"))?;
    let mut program = Cpu { threads: 1 }.open(&artifact)?;
    let load = |rounding| InterpretedProgram::load(&artifact, rounding);
    let (mut honest, mut exact) = (load(Rounding::Stored)?, load(Rounding::Exact)?);
    let mut reference = Reference::read(&model.reference, program.vocab())?;
    // Other tokens would give it away.
    reference.prompts.iter_mut().for_each(|prompt| prompt.greedy.clear());
    let judged = Logits::default().judge(&mut program, [&mut honest, &mut exact], &reference, DType::BF16)?;
    assert!(matches!(judged, Err(LogitsFault::Weights { .. })), "{judged:?}");
    Ok(())
}

/// The command finds a fault, and names its layer and op.
fn names(said: &Said, layer: Option<u64>, op: &str) -> Value {
    assert_eq!(said.exit, Some(1), "{}: {}", said.command, said.err);
    let found = said.json();
    assert_eq!(found["verdict"], "fail");
    let fault = found["first_fault"].clone();
    assert_eq!((fault["layer"].as_u64(), fault["op"].as_str()), (layer, Some(op)), "{fault}");
    fault
}

/// The reproducer of a fault shows it again: the same place, found and expected.
fn again(place: &Place, fault: &Value) -> Checked<()> {
    let folder = fault["reproducer"].as_str().ok_or("no reproducer")?;
    let said = place.run(&format!("compare --replay {folder} --json"));
    assert_eq!(said.exit, Some(1), "{}: {}", said.command, said.err);
    let found = &said.json()["first_fault"];
    for field in ["layer", "op", "index", "found", "expected"] {
        assert_eq!(found[field], fault[field], "{field}");
    }
    Ok(())
}

/// What transformers says of each module.
const MODULES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reference/gqa4.safetensors");

/// A model that differs from its checkpoint: the reference says that it does, its modules and the checkpoint say where.
fn differs(
    place: &Place,
    model: &Model,
    changed: &str,
    (layer, op): (Option<u64>, &str),
    (layer_of_module, module): (u64, &str),
) -> Checked<()> {
    for dtype in ["f32", "bf16"] {
        let how = format!("--dtype {dtype} --modules --reference {MODULES}");
        names(&place.run(&format!("compare {changed} {how} --json")), Some(layer_of_module), module);
    }
    let said = place.run(&format!("compare {changed} --level layer --reference {MODULES} --json"));
    names(&said, Some(layer_of_module), &format!("model.layers.{layer_of_module}"));
    let (folder, reference) = (model.folder.display(), model.reference.display());
    let said = place.run(&format!("compare {changed} --reference {reference} --json"));
    let fault = names(&said, None, "logits");
    assert_eq!(fault["reproducer"], Value::Null, "each op is right for the weights that there are");
    for dtype in ["f32", "bf16"] {
        let how = format!("--dtype {dtype} --reference {reference} --checkpoint {folder}");
        let said = place.run(&format!("compare {changed} {how} --json"));
        let fault = names(&said, layer, op);
        assert!(fault["found"] != fault["expected"], "{fault}");
        again(place, &fault)?;
    }
    Ok(())
}

fn scaled(place: &Place, model: &Model) -> Checked<()> {
    let tensor = "model.layers.1.mlp.up_proj.weight";
    let changed = model.with(place, tensor, |w| w.iter_mut().for_each(|x| *x *= 1.01))?;
    differs(place, model, &changed, (Some(1), "mlp.up_proj"), (1, "mlp.up_proj"))
}

fn swapped(place: &Place, model: &Model) -> Checked<()> {
    let config: Value = serde_json::from_slice(&fs::read(model.folder.join("config.json"))?)?;
    let heads = config["num_attention_heads"].as_u64().ok_or("no heads")? as usize;
    let changed = model.with(place, "model.layers.0.self_attn.q_proj.weight", |w| {
        let head = w.len() / heads;
        let (first, second) = w.split_at_mut(head);
        first.swap_with_slice(&mut second[..head]);
    })?;
    differs(place, model, &changed, (Some(0), "self_attn.q_proj"), (0, "self_attn.q_proj"))
}

fn theta(place: &Place, model: &Model) -> Checked<()> {
    let changed = model.with(place, "", |_| ())?;
    let mut config: Value = serde_json::from_slice(&fs::read(model.folder.join("config.json"))?)?;
    let place_of =
        if config["rope_parameters"].is_object() { &mut config["rope_parameters"] } else { &mut config };
    place_of["rope_theta"] = 12345.0.into();
    place.write("changed/config.json", config.to_string());
    differs(place, model, &changed, (None, "freq"), (0, "self_attn"))
}

fn flipped(place: &Place, model: &Model) -> Checked<()> {
    let folder = model.folder.display();
    for dtype in ["f32", "bf16"] {
        place.ok(&format!("compile {folder} --dtype {dtype} -o model.llamac"));
        let compare = format!("compare model.llamac --checkpoint {folder} --json");
        assert_eq!(place.ok(&compare).json()["verdict"], "pass");
        // The lowest bit of the first element of the first panel of layer 1's `o`.
        place.flip("model.llamac", "l1.o.0", 0, 0)?;
        let fault = names(&place.run(&compare), Some(1), "self_attn.o_proj");
        assert_eq!(fault["index"], serde_json::json!([0, 0]));
        assert!(fault["kernel"].is_string(), "{fault}");
        again(place, &fault)?;
    }
    Ok(())
}

/// A program that scales the scores of layer 1 otherwise than its graph says.
fn ops(place: &Place, model: &Model) -> Checked<()> {
    for dtype in [DType::F32, DType::BF16] {
        let folder = model.folder.display().to_string();
        place.ok(&format!("compile {folder} --dtype {dtype} --taps -o model.llamac"));
        let artifact = Artifact::open(&place.path("model.llamac"))?;
        let config = llamac::model::Model::open(&folder)?.config()?;
        let request = Request { config: &config, dtype, context: config.context, measured: None };
        let mut lowered = compile::lower(&request, "cpu:native", true)?.lowered;
        let mut program = Cpu { threads: 1 }.open(&artifact)?;
        let mut weights = InterpretedProgram::load(&artifact, Rounding::Stored)?;
        let tokens = [1, 5, 7, 2, 3];
        let mut right = Ops::default();
        right.judge(&mut program, &lowered, &mut weights, &tokens)?;
        assert!(right.fault.is_none() && right.launches > 0 && right.worst() < 1.0);
        for graph in lowered.entries.iter_mut().map(|entry| &mut entry.graph) {
            // An entry point that gives nothing ends before it.
            let Some(id) = graph.find("l1.a") else { continue };
            let Op::Attention { scale, .. } = &mut graph.values[id.0 as usize].op else {
                panic!("no attention")
            };
            *scale *= 1.1;
        }
        let mut wrong = Ops::default();
        wrong.judge(&mut program, &lowered, &mut weights, &tokens)?;
        let fault = wrong.fault.ok_or("the scale was overlooked")?;
        assert_eq!((fault.layer, fault.op.as_deref()), (Some(1), Some("a")));
        assert!(fault.kernel.is_some() && fault.index.len() == 3, "{fault}");
    }
    Ok(())
}

fn damaged(place: &Place, model: &Model) -> Checked<()> {
    let folder = model.folder.display();
    let bytes = fs::read(&model.reference)?;
    place.write("short.safetensors", &bytes[..bytes.len() / 2]);
    let said = place.run(&format!("compare {folder} --reference short.safetensors"));
    assert_eq!(said.exit, Some(3), "{}", said.err);
    let said = place.run(&format!("compare {folder} --reference nowhere.safetensors"));
    assert_eq!(said.exit, Some(2), "{}", said.err);
    // A file for another model.
    let said = place.run(&format!("compare builtin --reference {}", model.reference.display()));
    assert_eq!(said.exit, Some(3), "{}", said.err);
    assert!(said.err.contains("logits_f64"), "{}", said.err);
    Ok(())
}
