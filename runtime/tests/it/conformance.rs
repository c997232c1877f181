//! Every form of instruction on the emulator, judged by the oracle; and what the judge must notice.

use runtime::conformance::record::{RecordError, Recorded, Recording};
use runtime::conformance::{Form, Machine, RunError, Tensor, forms, judge};
use runtime::emulator::{Options, Sm, Sums};
use runtime::tensor_map::{Swizzle, TensorMap};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The newest machine has every instruction.
fn machine(seed: u64, sums: Sums) -> Machine {
    Machine::Emulator(Options { sm: Sm::Sm90a, seed, sums })
}

/// The first thing that is wrong with a form.
fn fault(machine: &Machine, form: &Form) -> Option<String> {
    match machine.run(form) {
        Ok(results) => judge(form, &results).first().map(ToString::to_string),
        Err(error) => Some(error.to_string()),
    }
}

#[test]
fn the_emulator_gives_what_the_isa_says() {
    let forms = forms();
    let names: BTreeSet<&str> = forms.iter().map(|form| form.name.as_str()).collect();
    assert_eq!(names.len(), forms.len(), "a name stands twice");
    for (seed, sums) in [(0, Sums::Truncated), (1, Sums::Exact)] {
        let machine = machine(seed, sums);
        assert!(forms.iter().all(|form| machine.takes(form)));
        let wrong: Vec<String> = forms.iter().filter_map(|form| fault(&machine, form)).collect();
        assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), forms.len(), wrong.join("\n"));
    }
}

/// A form that takes any result for right judges nothing: the highest bit of each result is one that counts.
#[test]
fn a_wrong_bit_is_noticed_in_every_form() {
    for form in forms() {
        let results = machine(0, Sums::Truncated).run(&form).expect("it runs");
        let wide: u64 = results.iter().fold(0, |all, result| all | result);
        assert_ne!(wide, 0, "{}: all results are 0", form.name);
        let broken: Vec<u64> =
            results.iter().map(|result| result ^ (1 << 63 >> wide.leading_zeros())).collect();
        let wrong = judge(&form, &broken).len();
        // Of a zero any sign may be right, of a NaN any.
        assert!(wrong * 4 > results.len(), "{}: {wrong} of {}", form.name, results.len());
    }
}

/// Things in the wrong places: two registers of A exchanged, two of D, a matrix transposed, a box moved.
#[test]
fn a_wrong_layout_is_noticed() {
    let planted = |form: &Form, from: &str, to: &str| {
        assert!(form.body.contains(from), "{}: `{from}` is not in it", form.name);
        Form { body: form.body.replace(from, to), ..form.clone() }
    };
    let mut planted_forms = Vec::new();
    for form in forms() {
        if form.name.starts_with("mma.") {
            planted_forms.push(planted(&form, "{%a0, %a1", "{%a1, %a0"));
            planted_forms.push(planted(&form, "{%d0, %d1", "{%d1, %d0"));
        } else if form.name.starts_with("wgmma.") {
            planted_forms.push(planted(&form, "{%d0, %d1", "{%d1, %d0"));
        } else if form.name.starts_with("cp.async.bulk.tensor.") {
            // The first coordinate is two: no chunk of a box moves as a whole.
            let at = form.body.find("[%map, {%a").expect("a box") + "[%map, {".len();
            let first = form.body[at..].split(['}', ',']).next().expect("a coordinate");
            planted_forms.push(planted(&form, &format!("{{{first}"), "{2"));
        } else if form.name.starts_with("ldmatrix.") || form.name.starts_with("stmatrix.") {
            let trans = form.name.contains(".trans");
            let (from, to) =
                if trans { (".trans.shared", ".shared") } else { (".shared.b16", ".trans.shared.b16") };
            planted_forms.push(planted(&form, from, to));
        }
    }
    assert_eq!(planted_forms.len(), 2 * 14 + 2 * 6 + 38 + 13 + 3 + 12);
    let missed = planted_forms.iter().filter(|form| fault(&machine(0, Sums::Truncated), form).is_none());
    assert_eq!(missed.map(|form| &form.name).collect::<Vec<_>>(), [""; 0]);
}

/// Boxes that the driver was told otherwise of: without their swizzle, and of a tensor with a column less.
#[test]
fn a_wrong_tensor_map_is_noticed() {
    let boxes = forms().into_iter().filter(|form| form.tensor.is_some());
    let planted = |form: &Form, change: fn(&mut TensorMap)| {
        let mut form = form.clone();
        let (Some(Tensor::OfOperands(map)) | Some(Tensor::OfResults(map))) = &mut form.tensor else {
            unreachable!("it has a map")
        };
        change(map);
        fault(&machine(0, Sums::Truncated), &form)
    };
    let mut boxes_moved = 0;
    for form in boxes {
        let swizzled = !form.name.contains("swizzle of 16 bytes");
        assert_eq!(planted(&form, |map| map.swizzle = Swizzle::None).is_some(), swizzled, "{}", form.name);
        assert!(planted(&form, |map| map.dims[0] -= 1).is_some(), "{}", form.name);
        boxes_moved += 1;
    }
    assert_eq!(boxes_moved, 13 + 1 + 3 + 12);
}

/// A missing wait is the emulator's to report.
#[test]
fn a_missing_wait_is_reported() {
    let form =
        forms().into_iter().find(|form| form.name == "cp.async.cg.shared.global, 16 bytes").expect("a form");
    let body = form.body.replace("cp.async.wait_group 0;", "");
    let error = machine(0, Sums::Truncated).run(&Form { body, ..form }).expect_err("it reads too early");
    assert!(matches!(error, RunError::Reported { .. }), "{error}");
}

#[test]
fn what_is_recorded_comes_back() {
    let form = forms().into_iter().find(|form| form.name == "cvt.rn.f16x2.f32").expect("a form");
    let results = machine(0, Sums::Truncated).run(&form).expect("it runs");
    let recorded = |form: &Form, results: &[u64]| {
        let forms = BTreeMap::from([(form.name.clone(), Recorded::new(form, results))]);
        Recording { device: "a GPU".into(), driver: "12.4".into(), date: "2026-01-31".into(), forms }
    };
    let recording = recorded(&form, &results);
    assert_eq!(recording.results(&form), Ok(results.clone()));
    assert_eq!(recording.judge(&form), Ok(vec![]));
    // Results that the ISA does not allow, that are of another kernel, that are not all there.
    let mut wrong = results.clone();
    wrong[5] ^= 1;
    assert_eq!(recorded(&form, &wrong).judge(&form).expect("its own").len(), 1);
    let other = Form { body: form.body.replace(".rn", ".rz"), ..form.clone() };
    assert!(matches!(recording.judge(&other), Err(RecordError::Other { .. })));
    // Where there is one right answer, it is not written down: a form with others cannot do so.
    let exact = forms().into_iter().find(|form| form.name == "prmt.b32").expect("a form");
    let [known, text] = [&exact, &form].map(|form| {
        let results = machine(0, Sums::Truncated).run(form).expect("it runs");
        let recording = recorded(form, &results);
        assert_eq!(recording.results(form), Ok(results));
        serde_json::to_string(&recording).expect("plain data").len()
    });
    assert!(known < 200 && text > 8 * results.len() / 2, "{known} {text}");
    let short = recorded(&form, &results[1..]);
    assert!(matches!(short.judge(&form), Err(RecordError::Damaged { .. })));
    let missing = Recording { forms: BTreeMap::new(), ..recording };
    assert!(missing.judge(&form).expect_err("nothing is there").to_string().contains("not recorded"));
}

/// Judges every recording of a folder: the emulator and the GPU are held to the same answers.
fn replay(folder: &Path) -> Vec<String> {
    let mut files: Vec<_> =
        fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("a file").path()).collect();
    files.retain(|file| file.extension().is_some_and(|end| end == "json"));
    files.sort();
    let mut wrong = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).expect("a file");
        let recording: Recording = serde_json::from_str(&text).expect("a recording");
        // A GPU that has not what sm_90a has leaves that out.
        let complete = recording.forms.keys().any(|name| name.starts_with("wgmma."));
        for form in forms().into_iter().filter(|form| complete || form.sm == Sm::Sm80) {
            match recording.judge(&form) {
                Ok(judged) => wrong.extend(judged.iter().map(|wrong| format!("{}: {wrong}", file.display()))),
                Err(error) => wrong.push(format!("{}: {error}", file.display())),
            }
        }
    }
    wrong
}

/// The code of one machine is not what another runs.
#[test]
fn machines_take_what_they_have() {
    let of = |sm| Machine::Emulator(Options { sm, seed: 0, sums: Sums::default() });
    let taken = |sm| forms().iter().filter(|form| of(sm).takes(form)).count();
    assert_eq!([taken(Sm::Sm90a) - taken(Sm::Sm80), taken(Sm::Sm120) - taken(Sm::Sm89)], [91, 0]);
}

/// What GPUs gave, as it was committed.
#[test]
fn recordings_hold() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/gpu/recorded");
    let wrong = replay(&folder);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Nothing may be recorded yet: a recording of the emulator's own shows what one of a GPU would.
#[test]
fn a_recording_with_a_fault_does_not_hold() {
    let machine = machine(0, Sums::Truncated);
    let results: Vec<(Form, Vec<u64>)> = forms()
        .into_iter()
        .map(|form| {
            let results = machine.run(&form).expect("it runs");
            (form, results)
        })
        .collect();
    let recording = |fault: usize| {
        let forms = results.iter().enumerate().map(|(at, (form, results))| {
            let mut results = results.clone();
            results[0] ^= if at == fault { 1 << 12 } else { 0 };
            (form.name.clone(), Recorded::new(form, &results))
        });
        Recording {
            device: String::new(),
            driver: String::new(),
            date: String::new(),
            forms: forms.collect(),
        }
    };
    let folder = tempfile::tempdir().expect("a folder");
    let replayed = |fault| {
        let text = serde_json::to_string(&recording(fault)).expect("plain data");
        fs::write(folder.path().join("a.json"), text).expect("a file");
        replay(folder.path()).len()
    };
    assert_eq!((replayed(usize::MAX), replayed(7)), (0, 1));
}
