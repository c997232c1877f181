//! Traces: this machine's run is that of its own trace; other numbers and other code are found, with the launch; artifacts
//! of one model part where they must.

use crate::Checked;
use crate::command::Place;
use crate::reproducer::{forge, rewrite};
use codegen::cpu::Form;
use ir::graph::Family;
use ir::passes::lower::Kernels;
use ir::passes::memory;
use ir::{DType, passes};
use libtest_mimic::Trial;
use llamac::compare::trace::text::parse;
use llamac::compile;
use llamac::model::Model;
use llamac::pipeline::{Entry, Request};
use serde_json::Value;

pub fn trials() -> Vec<Trial> {
    let test = |name: &str, test: fn() -> Checked<()>| Trial::test(name.to_string(), move || Ok(test()?));
    vec![
        test("trace of another level is met", met),
        test("trace finds other numbers", other_numbers),
        test("trace and bisect find other code", other_code),
        test("bisect compares dtypes", dtypes),
        test("bisect compares schedules", schedules),
        test("bisect without taps has logits", without_taps),
        test("compare asks devices for launches", devices),
    ]
}

fn made(place: &Place, name: &str, how: &str) {
    place.ok(&format!("compile builtin --ctx 48 -o {name} {how}"));
}

/// Levels and contexts differ; bits do not, or no more than two devices may.
fn met() -> Checked<()> {
    let place = Place::new();
    for dtype in ["f32", "bf16"] {
        made(&place, "a.llamac", &format!("--dtype {dtype} --taps"));
        place.ok(&format!(
            "compile builtin --ctx 64 --dtype {dtype} --taps --target cpu:x86-64-v3 -o b.llamac"
        ));
        let said = place.ok("compare a.llamac --record a.trace --json").json();
        let text = String::from_utf8(place.read("a.trace"))?;
        assert_eq!(said["bytes"].as_u64(), Some(text.len() as u64));
        assert_eq!(parse(&text)?.to_string(), text, "its own text");
        place.ok("compare a.llamac --record again.trace");
        assert_eq!(place.read("again.trace"), text.as_bytes(), "the same run, another trace");
        for artifact in ["a", "b"] {
            let said = place.ok(&format!("compare {artifact}.llamac --against a.trace"));
            let compared = format!("{} compared", said_values(&text));
            assert!(said.out.contains(&compared), "{compared}: {}", said.out);
            assert!(artifact == "b" || !said.out.contains("differ"), "{}", said.out);
        }
    }
    Ok(())
}

fn said_values(text: &str) -> usize {
    text.lines().filter(|line| line.starts_with("value ")).count()
}

/// The first fault of a run that has one.
fn fault(place: &Place, command: &str) -> Value {
    let said = place.run(&format!("{command} --json"));
    assert_eq!(said.exit, Some(1), "{command}: {}{}", said.out, said.err);
    said.json()["first_fault"].clone()
}

fn of(fault: &Value) -> (Option<u64>, Option<&str>) {
    (fault["layer"].as_u64(), fault["op"].as_str())
}

/// One value of a trace is changed: where the code is the same its digest decides, else its numbers.
fn other_numbers() -> Checked<()> {
    let place = Place::new();
    made(&place, "a.llamac", "--dtype f32 --taps");
    place.ok("compare a.llamac --record a.trace");
    let text = String::from_utf8(place.read("a.trace"))?;
    let line = text.lines().find(|line| line.starts_with("value l2.x1 ")).ok_or("no such value")?;
    let digest = line.split(' ').nth(4).ok_or("no digest")?;
    let bits = text.replacen(digest, &digest.chars().rev().collect::<String>(), 1);
    place.write("bits.trace", &bits);
    let found = fault(&place, "compare a.llamac --against bits.trace");
    assert_eq!(of(&found), (Some(2), Some("o")), "{found}");
    assert_eq!(found["found"], "other bits", "no sample differs");

    // Another arithmetic is a reason for other bits, and none for other numbers.
    let other = |text: &str| text.replacen("arithmetic fma", "arithmetic other", 1);
    place.write("other.trace", other(&bits));
    assert!(
        place.ok("compare a.llamac --against other.trace").out.contains("differ from layer 2, o (kernel @o")
    );
    let sample = line.split(' ').nth(6).ok_or("no sample")?;
    let (index, x) = sample.split_once(':').ok_or("no sample")?;
    for (factor, right) in [(1.000_001, true), (1.5, false)] {
        let changed = format!(" {index}:{}", (x.parse::<f32>()? * factor));
        place.write("other.trace", other(&bits).replacen(&format!(" {sample}"), &changed, 1));
        if right {
            place.ok("compare a.llamac --against other.trace");
        } else {
            let found = fault(&place, "compare a.llamac --against other.trace");
            assert_eq!(of(&found), (Some(2), Some("o")), "{found}");
            assert_eq!(found["index"].as_array().map(Vec::len), Some(2), "{found}");
        }
    }

    // What is no trace is refused with its line; one of another model has nothing in common.
    let cut = text.rfind("\nvalue ").ok_or("no value")?;
    let damaged =
        [text.replace(" i32 1 ", " i32 x "), text.replace("value x ", "value "), text[..=cut].to_string()];
    for bad in damaged {
        place.write("bad.trace", bad);
        let said = place.run("compare a.llamac --against bad.trace");
        assert_eq!(said.exit, Some(3), "{}", said.err);
        assert!(said.err.contains("bad.trace:"), "{}", said.err);
    }
    assert_eq!(place.run("compare a.llamac --against nowhere.trace").exit, Some(2));
    place.write("bad.trace", text.replacen("tokens ", "tokens 100000 ", 1));
    assert_eq!(place.run("compare a.llamac --against bad.trace").exit, Some(2));
    Ok(())
}

/// The kernel `down` of a decode step is wrong: nothing before it is named.
fn other_code() -> Checked<()> {
    let place = Place::new();
    for dtype in [DType::F32, DType::BF16] {
        forge(&place, dtype)?;
        place.ok("compare right.llamac --record right.trace");
        let found = fault(&place, "compare wrong.llamac --against right.trace");
        assert_eq!(
            (of(&found), found["kernel"].as_str()),
            ((Some(0), Some("down")), Some("down")),
            "{found}"
        );
        let found = fault(&place, "compare --bisect wrong.llamac right.llamac");
        assert_eq!(
            (of(&found), found["kernel"].as_str()),
            ((Some(0), Some("down")), Some("down")),
            "{found}"
        );
        assert!(found["what"].as_str().is_some_and(|what| what.contains("@decode")), "{found}");
        let said = place.ok("compare --bisect right.llamac right.llamac");
        assert!(!said.out.contains("differ"), "{}", said.out);
    }
    Ok(())
}

/// A model in f32 and one in bf16 are as far apart as rounding makes them; one with a wrong weight is further.
fn dtypes() -> Checked<()> {
    let place = Place::new();
    for dtype in ["f32", "bf16"] {
        made(&place, &format!("{dtype}.llamac"), &format!("--dtype {dtype} --taps"));
    }
    let said = place.ok("compare --bisect f32.llamac bf16.llamac --json").json();
    let worst = said["worst"].as_f64().ok_or("no worst")?;
    assert!(worst > 0.01 && worst < 1.0, "{worst}");
    let said = place.ok("compare --bisect f32.llamac bf16.llamac");
    assert!(
        said.out.contains("differ from x (kernel @x.1") && said.out.contains("f32 beside bf16"),
        "{}",
        said.out
    );
    // The exponent of the first element of the first panel of layer 1's `o`.
    place.flip("bf16.llamac", "l1.o.0", 0, 14)?;
    let found = fault(&place, "compare --bisect f32.llamac bf16.llamac");
    assert_eq!(of(&found), (Some(1), Some("o")), "{found}");
    Ok(())
}

/// Attention in tiles of 16 keys and of 64: other bits, as near as they must be, from the first kernel that adds so.
fn schedules() -> Checked<()> {
    let place = Place::new();
    made(&place, "right.llamac", "--dtype f32 --taps");
    let (level, config) = (codegen::cpu::level("cpu:native")?, Model::open("builtin")?.config()?);
    let request = Request { config: &config, dtype: DType::F32, context: 48, measured: None };
    let mut entries = compile::lower(&request, "cpu:native", true)?.lowered.entries;
    let mut kernels = Kernels::default();
    for Entry { graph, launches, .. } in &mut entries {
        for group in graph.groups.iter_mut().filter(|group| group.family == Family::Attention) {
            group.schedule = Some("mr 1, nr 1, keys 16".to_string());
        }
        *launches = passes::lower::lower(graph, &level.target, &mut kernels)?;
    }
    let fused: Vec<String> = entries.iter().map(|entry| entry.graph.to_string()).collect();
    let lowered: Vec<_> = (entries.iter())
        .map(|e| memory::Lowered { graph: &e.graph, launches: e.launches.clone(), give: e.give })
        .collect();
    let plan = memory::memory(&lowered, &kernels);
    let text = codegen::lower::module(&plan, &kernels.list, level.features, true);
    let code = codegen::link::link(&codegen::cpu::compile(&text, &level, Form::Object)?)?;
    let (plan, fused) = (plan.to_string(), fused.join("\n"));
    let changed = [("code.", &code[..]), ("plan.", plan.as_bytes()), ("fused.", fused.as_bytes())];
    rewrite(&place, "other.llamac", &changed)?;

    let tokens: Vec<String> = (0..40).map(|n| (n * 31 % 1000 + 1).to_string()).collect();
    let bisect = format!("compare --bisect right.llamac other.llamac --tokens {}", tokens.join(","));
    let said = place.ok(&format!("{bisect} --json")).json();
    let found = &said["first_difference"];
    assert_eq!(of(found), (Some(0), Some("a")), "{found}");
    let what = found["what"].as_str().ok_or("nothing said")?;
    assert!(
        what.contains("keys 16") && found["schedule"].as_str().is_some_and(|s| s.contains("keys 64")),
        "{what}"
    );
    let worst = said["worst"].as_f64().ok_or("no worst")?;
    assert!(worst > 0.0 && worst < 1.0, "{worst}");
    // The other machine's trace says the same, by its samples.
    place.ok(&format!("compare other.llamac --record other.trace --tokens {}", tokens.join(",")));
    let said = place.ok("compare right.llamac --against other.trace --json").json();
    assert_eq!(of(&said["first_difference"]), (Some(0), Some("a")), "{said}");
    Ok(())
}

fn without_taps() -> Checked<()> {
    let place = Place::new();
    made(&place, "tapped.llamac", "--dtype bf16 --taps");
    made(&place, "plain.llamac", "--dtype bf16");
    let said = place.ok("compare --bisect tapped.llamac plain.llamac");
    assert!(said.err.contains("only logits are compared") && said.out.contains("1 compared"), "{}", said.err);
    place.flip("plain.llamac", "l1.o.0", 0, 14)?;
    let found = fault(&place, "compare --bisect tapped.llamac plain.llamac");
    assert_eq!(of(&found), (None, Some("logits")), "{found}");
    let said = place.run("compare plain.llamac --record a.trace");
    assert_eq!(said.exit, Some(4), "{}", said.err);
    assert!(said.err.contains("--taps"), "{}", said.err);
    Ok(())
}

fn devices() -> Checked<()> {
    let place = Place::new();
    made(&place, "a.llamac", "--dtype f32 --taps");
    place.ok("compare a.llamac --device interpreter");
    for (device, how, exit) in [
        ("interpreter", "--level op", 7),
        ("interpreter", "--record b.trace", 7),
        ("null", "", 2),
        ("moon", "", 7),
    ] {
        let said = place.run(&format!("compare a.llamac --device {device} {how}"));
        assert_eq!(said.exit, Some(exit), "{device} {how}: {}", said.err);
    }
    Ok(())
}
