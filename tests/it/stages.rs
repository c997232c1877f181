//! Every stage of a compilation as text: it parses back to the same text, and `opt` makes each stage of the one before.

use super::Checked;
use libtest_mimic::Trial;
use std::io::Write;
use std::process::{Command, Stdio};

/// Models whose stages are looked at: one with weights, one of another shape.
const MODELS: [&str; 2] = ["builtin", "preset:smollm2-135m"];

/// The machine that they are lowered for, whatever this one is.
const TARGET: &str = "cpu:x86-64-v4";

/// Graph passes, in order; `lower` and `memory` follow.
const GRAPH_PASSES: [&str; 5] = ["simplify", "fuse", "layout", "share", "schedule"];

/// One test a model and dtype.
pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        Trial::test("stages opt lists its passes", || Ok(list()?)),
        Trial::test("stages opt says what it cannot do", || Ok(refusals()?)),
    ];
    for model in MODELS {
        for dtype in ["f32", "bf16"] {
            trials.push(Trial::test(format!("stages {model} {dtype}"), move || Ok(stages(model, dtype)?)));
        }
    }
    trials
}

fn stages(model: &str, dtype: &str) -> Checked<()> {
    let emit = |stage: &str| {
        llamac(&["emit", model, "--dtype", dtype, "--ctx", "512", "--stage", stage, "--target", TARGET], "")
    };
    let [graph, fused, kernels, plan] = ["graph", "fused", "kernels", "plan"].map(emit);
    let (graph, fused, kernels, plan) = (graph?, fused?, kernels?, plan?);

    // Read, verified and printed, each is the same.
    for (stage, text) in [("graph", &graph), ("fused", &fused), ("kernels", &kernels), ("plan", &plan)] {
        same(stage, text, &opt(&[], text)?)?;
    }

    // One pass at a time, from text to text, leads where all of them in one go do.
    let mut text = graph.clone();
    let mut dumps = String::new();
    for pass in GRAPH_PASSES {
        let after = opt(&["--passes", pass], &text)?;
        same(&format!("{pass}, read again"), &after, &opt(&[], &after)?)?;
        dumps += &dump(pass, &text, &after);
        text = after;
    }
    same("after all graph passes", &fused, &text)?;
    same("lowered", &kernels, &opt(&["--passes", "lower"], &fused)?)?;
    same("planned", &plan, &opt(&["--passes", "lower,memory"], &fused)?)?;

    // `--dump-after all` shows each of these texts, and says of what did nothing that it did nothing.
    dumps += &dump("lower", &text, &kernels);
    dumps += &dump("memory", &kernels, &plan);
    let all = [&GRAPH_PASSES[..], &["lower", "memory"]].concat().join(",");
    same("--dump-after all", &dumps, &opt(&["--passes", &all, "--dump-after", "all"], &graph)?)?;
    for (pass, section) in GRAPH_PASSES.iter().zip(dumps.split("// after ").skip(1)) {
        let (_, text) = section.split_once('\n').ok_or("a dump has a heading")?;
        let one = opt(&["--passes", &all, "--dump-after", pass], &graph)?;
        let expected = format!("// after {section}{plan}");
        same(&format!("--dump-after {pass}"), &expected, &one)?;
        same(&format!("the dump after {pass}, read again"), text.trim_end(), opt(&[], text)?.trim_end())?;
    }

    // What a pass made it leaves alone.
    let again = opt(&["--passes", "simplify,simplify,share", "--dump-after", "all"], &fused)?;
    assert_eq!(again.matches("// after simplify (unchanged)\n").count(), 2, "simplify changes what it made");
    assert!(again.contains("// after share (unchanged)\n"), "share changes what it made");
    Ok(())
}

/// What `--dump-after` writes of a pass.
fn dump(pass: &str, before: &str, after: &str) -> String {
    let unchanged = if before == after { " (unchanged)" } else { "" };
    format!("// after {pass}{unchanged}\n{after}\n")
}

fn list() -> Checked<()> {
    let list = llamac(&["opt", "--list"], "")?;
    let names: Vec<&str> = list.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(names, [&GRAPH_PASSES[..], &["lower", "memory"]].concat());
    Ok(())
}

fn refusals() -> Checked<()> {
    let says = |passes: &str, text: &str, expected: &str| match opt(&["--passes", passes], text) {
        Ok(_) => panic!("{passes} did not fail"),
        Err(why) => assert!(why.to_string().contains(expected), "{why}"),
    };
    let graph = "graph @g(T in 1..4) {\n  %x = input \"x\" : f32[T]\n  %y = exp %x : f32[T]\n  output \"y\" = %y : f32[T]\n}\n";
    says("inline", graph, "there is no pass `inline`; there are simplify, fuse");
    says("lower", graph, "lower takes graphs with groups");
    says("memory", graph, "memory takes kernels with their graphs");
    says("fuse,layout,schedule,lower,memory", graph, "memory takes steps of a language model");
    let kernels = opt(&["--passes", "fuse,layout,schedule,lower"], graph)?;
    says("memory", &kernels, "memory takes kernels with their graphs");
    says("simplify", &kernels, "simplify takes graphs");
    says("simplify", &graph.replace("exp %x", "exp %z"), "-:3: column");
    says("simplify", &kernels.replace("exp(", "expo("), "-:6: column");
    Ok(())
}

fn same(what: &str, expected: &str, found: &str) -> Checked<()> {
    let differs = expected.lines().zip(found.lines()).position(|(a, b)| a != b);
    let at = match differs {
        None if expected == found => return Ok(()),
        None => expected.lines().count().min(found.lines().count()),
        Some(at) => at,
    };
    let line = |text: &str| text.lines().nth(at).unwrap_or("the end").to_string();
    let (expected, found) = (line(expected), line(found));
    Err(format!("{what}: line {}: expected `{expected}`, found `{found}`", at + 1).into())
}

/// What `opt` makes of a text.
fn opt(options: &[&str], text: &str) -> Checked<String> {
    llamac(&[&["opt", "-", "--target", TARGET], options].concat(), text)
}

/// What the command writes, given this on stdin.
fn llamac(args: &[&str], stdin: &str) -> Checked<String> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_llamac"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut pipe = child.stdin.take().ok_or("a pipe was asked for")?;
    let text = stdin.to_string();
    // The command may write before it has read all, or stop reading.
    let writer = std::thread::spawn(move || pipe.write_all(text.as_bytes()));
    let output = child.wait_with_output()?;
    let written = writer.join().map_err(|_| "the writer panicked")?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    written?;
    Ok(String::from_utf8(output.stdout)?)
}
