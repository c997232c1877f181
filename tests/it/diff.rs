//! The verbs `diff` and `plan --why`, as a user calls them.

use crate::Checked;
use libtest_mimic::Trial;
use serde_json::Value;
use std::fs;
use std::process::{Command, Output};

/// One test for each thing that is shown.
pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("diff dtypes", || Ok(dtypes()?)),
        Trial::test("diff files", || Ok(files()?)),
        Trial::test("diff refuses", || Ok(refused()?)),
        Trial::test("plan --why", || Ok(why()?)),
    ]
}

/// Ceilings that are given, so that nothing is measured.
const GIVEN: [&str; 4] = ["--bandwidth", "38GB", "--flops", "300GB"];

fn llamac(arguments: &[&str]) -> Checked<Output> {
    Ok(Command::new(env!("CARGO_BIN_EXE_llamac")).args(arguments).output()?)
}

fn text(arguments: &[&str]) -> Checked<String> {
    let output = llamac(arguments)?;
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout)?),
        false => Err(format!("{arguments:?}: {}", String::from_utf8_lossy(&output.stderr)).into()),
    }
}

fn json(arguments: &[&str]) -> Checked<Value> {
    Ok(serde_json::from_str(&text(&[arguments, &["--json"]].concat())?)?)
}

fn require(holds: bool, what: &str, found: impl std::fmt::Display) -> Checked<()> {
    if holds { Ok(()) } else { Err(format!("{what}: {found}").into()) }
}

const SMOL: &str = "preset:smollm2-135m";

/// f32 weights are twice bf16's; every product moves more, the choice of the token does not; all on one screen.
fn dtypes() -> Checked<()> {
    let arguments = [&["diff", SMOL, SMOL, "--dtype", "bf16,f32", "--ctx", "512"][..], &GIVEN].concat();
    let found = json(&arguments)?;
    let weights = |side: &str| found[side]["memory"]["weights"].as_f64().unwrap_or(f64::NAN);
    require((weights("b") / weights("a") - 2.0).abs() < 0.01, "weights", &found["b"]["memory"])?;
    let differ = found["kernels"]["differ"].as_array().ok_or("no kernels")?;
    let has = |name: &str| differ.iter().any(|d| d["entry"] == "decode" && d["name"] == name);
    require(has("gate") && has("logits") && !has("token"), "kernels", &found["kernels"])?;
    let shown = text(&arguments)?;
    require(shown.contains("numeric class: another one: f32 rounds otherwise than bf16"), "text", &shown)?;
    require(shown.lines().count() <= 50, "more than a screen", &shown)
}

/// A plan's text, an artifact and a model that are the same are said to be, in a line; a changed schedule is named.
fn files() -> Checked<()> {
    let folder = tempfile::tempdir()?;
    let place = |name: &str| folder.path().join(name).display().to_string();
    let (artifact, bare, plan, other) =
        (place("a.llamac"), place("b.llamac"), place("plan.txt"), place("other.txt"));
    text(&["compile", "builtin", "-o", &artifact])?;
    text(&["compile", "builtin", "-o", &bare, "--no-weights"])?;
    fs::write(&plan, text(&["emit", "builtin", "--stage", "plan"])?)?;
    for (a, b) in [("builtin", &*artifact), (&artifact, &plan), (&plan, &plan)] {
        let found = text(&["diff", a, b])?;
        require(found.starts_with("the same plan: ") && found.lines().count() == 1, "not the same", found)?;
    }
    let found = text(&["diff", &artifact, &bare])?;
    require(found.trim_end().ends_with("the files differ in weights"), "sections", found)?;

    let changed = fs::read_to_string(&plan)?.replace("keys 64", "keys 128");
    fs::write(&other, &changed)?;
    let found = json(&[&["diff", &artifact, &other][..], &GIVEN].concat())?;
    let differ = found["kernels"]["differ"].as_array().ok_or("no kernels")?;
    let attention =
        |d: &Value| d["change"] == "changed" && d["other_bits"] == true && d["a"]["family"] == "attention";
    require(!differ.is_empty() && differ.iter().all(attention), "keys", &found)?;
    let shown = text(&[&["diff", &artifact, &other][..], &GIVEN].concat())?;
    require(shown.contains("sums run in another order in decode a"), "text", shown)
}

fn refused() -> Checked<()> {
    let folder = tempfile::tempdir()?;
    let bad = folder.path().join("bad.txt").display().to_string();
    fs::write(&bad, "plan(context = 5, nonsense) {\n}\n")?;
    let cases: [(&[&str], i32, &str); 4] = [
        (&["diff", SMOL, "preset:none"], 2, "preset:none"),
        (&["diff", SMOL, &bad], 3, "bad.txt:1"),
        (&["diff", SMOL, SMOL, "--dtype", "f32,bf16,f32"], 2, "--dtype"),
        (&["diff", SMOL, SMOL, "--ctx", "99999999"], 5, "99999999"),
    ];
    for (arguments, exit, said) in cases {
        let output = llamac(arguments)?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        require(
            output.status.code() == Some(exit) && error.contains(said),
            &format!("{arguments:?}"),
            error,
        )?;
    }
    Ok(())
}

/// A decode layer is five launches, each told once, with what stands between them and the schedule's runner-up.
fn why() -> Checked<()> {
    let arguments = [&["plan", SMOL, "--why", "--ctx", "512", "--dtype", "bf16"][..], &GIVEN].concat();
    let found = json(&arguments)?;
    let decisions = found["why"].as_array().ok_or("no decisions")?;
    let layer: Vec<&Value> =
        // The last layer's result goes elsewhere.
        decisions.iter().filter(|d| d["entry"] == "decode" && d["launches"].as_u64() >= Some(29)).collect();
    let names: Vec<&str> = layer.iter().filter_map(|d| d["name"].as_str()).collect();
    require(names == ["q", "a", "o", "gate", "down"], "layer", format!("{names:?}"))?;
    for decision in layer {
        let schedule = &decision["schedule"];
        let remarks = decision["remarks"].as_array().ok_or("no remarks")?;
        let told = !remarks.is_empty() && schedule["runner_up"].is_string();
        let ranked = decision["family"] != "dot"
            || schedule["cost"].as_f64().is_some()
                && schedule["cost"].as_f64() <= schedule["runner_up_cost"].as_f64();
        require(told && ranked, "reasons", decision)?;
    }
    let shown = text(&arguments)?;
    let remark = "not fused: %qr: attention @a reads whole heads";
    let decode = shown.split("\n\n").find(|block| block.starts_with("decode, ")).ok_or("no decode step")?;
    require(decode.contains(remark) && decode.lines().count() <= 40, "text", decode)
}
