//! Small kernels in PTX, each with what comes of it: `tests/ptx/*.ptx`. To add a case is to add a file.
//!
//! The first comment lines of a file say what it shows, how it is launched, and what the emulator must give or report:
//!
//! ```text
//! // launch: ctas=2 threads=64 shared=1024 sm=sm_80 cluster=1
//! // launch: dependent=1            ... as a grid that may begin before those before it have ended
//! // earlier: reads out             such a grid reads the buffer, or writes it
//! // param: out u32[64]             a buffer, nothing of it written
//! // param: in u32[64] = index      a buffer with 0, 1, 2, ...; or with the values that are listed, over and over
//! // param: in u32[64] = 0..5 7*3    0, 1, 2, 3, 4 and three times 7
//! // param: n u32 = 7               a number
//! // param: m map = in f32 dims=6,3 strides=32 box=8,2 swizzle=32   a tensor map of a buffer above
//! // expect: out = 0 1 2 3          what it begins with; with ` ...` behind, what it has over and over
//! // report: text                   instead: the report has this text
//! // plant: `from` => `to` => text  with the first `from` in the text replaced by `to`, the report has this text
//! // plant: `from` => `to` => text | text     or, by seed, one of these
//! // plant: `from` => `to` => values   or there is no report, and other values than expected
//! // also: `from` => `to`; `from` => `to`   with these replaced everywhere, head and all, it holds too
//! ```
//!
//! Each is run under several seeds, and must hold under every one.

use proptest::prelude::*;
use runtime::emulator::{Grid, Memory, Options, Program, Report, Sums, launch};
use runtime::ptx::Module;
use runtime::tensor_map::{Element, Fill, Swizzle, TensorMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

const SEEDS: u64 = 8;

#[derive(Debug)]
enum Param {
    Buffer {
        name: String,
        ty: String,
        count: usize,
        values: Vec<String>,
    },
    Number {
        ty: String,
        value: String,
    },
    /// A map of the buffer of that name.
    Map {
        of: String,
        map: TensorMap,
    },
}

/// `in f32 dims=6,3 strides=32 box=8,2 swizzle=32 every=2,1`: all but type, dims and box may be left out.
fn map(text: &str) -> Param {
    let words: Vec<&str> = text.split_whitespace().collect();
    let list = |key: &str| -> Option<Vec<u64>> {
        let value = words.iter().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))?;
        Some(value.split(',').map(parsed).collect())
    };
    let small = |numbers: Vec<u64>| numbers.into_iter().map(|number| number as u32).collect::<Vec<_>>();
    let dims = list("dims").expect("dims");
    let map = TensorMap {
        dtype: *Element::ALL.iter().find(|e| format!("{e:?}").to_lowercase() == words[1]).expect("a type"),
        base: 0,
        strides: list("strides").unwrap_or_default(),
        tile: small(list("box").expect("a box")),
        element_strides: list("every").map_or(vec![1; dims.len()], small),
        swizzle: match list("swizzle").map(|list| list[0]) {
            None => Swizzle::None,
            Some(32) => Swizzle::Bytes32,
            Some(64) => Swizzle::Bytes64,
            Some(128) => Swizzle::Bytes128,
            Some(other) => panic!("no swizzle: {other}"),
        },
        fill: if words.contains(&"nan") { Fill::Nan } else { Fill::Zeros },
        dims,
    };
    Param::Map { of: words[0].into(), map }
}

#[derive(Debug, Default)]
struct Case {
    ctas: u32,
    threads: u32,
    shared: u32,
    cluster: u32,
    dependent: bool,
    /// Buffers that earlier grids touch, and whether they write them.
    earlier: Vec<(String, bool)>,
    sm: String,
    params: Vec<Param>,
    expect: Vec<(String, Vec<String>)>,
    report: Option<String>,
    plants: Vec<[String; 3]>,
    also: Vec<Vec<[String; 2]>>,
}

/// `0..5 7*3` as values.
fn values(text: &str) -> Vec<String> {
    let many = |word: &str| -> Vec<String> {
        if let Some((first, end)) = word.split_once("..").filter(|(first, _)| !first.is_empty()) {
            return (parsed::<i64>(first)..parsed(end)).map(|value| value.to_string()).collect();
        }
        let (value, times) = word.split_once('*').unwrap_or((word, "1"));
        vec![value.to_string(); parsed(times)]
    };
    text.split_whitespace().flat_map(many).collect()
}

/// What stands between backticks.
fn quoted(part: &str) -> String {
    part.trim().trim_matches('`').to_string()
}

fn case(text: &str) -> Case {
    let mut case = Case { ctas: 1, threads: 32, cluster: 1, sm: "sm_80".into(), ..Case::default() };
    for line in text.lines().map_while(|line| line.strip_prefix("//")) {
        let Some((key, rest)) = line.trim().split_once(": ") else { continue };
        let words = || rest.split_whitespace();
        match key {
            "launch" => words().for_each(|word| {
                let (key, value) = word.split_once('=').expect("key=value");
                let number = || value.parse().expect("a number");
                match key {
                    "ctas" => case.ctas = number(),
                    "threads" => case.threads = number(),
                    "shared" => case.shared = number(),
                    "cluster" => case.cluster = number(),
                    "dependent" => case.dependent = number() != 0,
                    "sm" => case.sm = value.into(),
                    _ => panic!("unknown: {word}"),
                }
            }),
            "param" => {
                let (what, held) = rest.split_once(" = ").unwrap_or((rest, ""));
                let mut words = what.split_whitespace().map(String::from);
                let (name, ty) = (words.next().expect("a name"), words.next().expect("a type"));
                case.params.push(match ty.strip_suffix(']').and_then(|ty| ty.split_once('[')) {
                    Some((ty, count)) => {
                        let count = count.parse().expect("a count");
                        Param::Buffer { name, ty: ty.into(), count, values: values(held) }
                    }
                    None if ty == "map" => map(held),
                    None => Param::Number { ty, value: held.into() },
                });
            }
            "earlier" => {
                let (verb, name) = rest.split_once(' ').expect("reads or writes a buffer");
                case.earlier.push((name.into(), verb == "writes"));
            }
            "expect" => {
                let (name, held) = rest.split_once(" = ").expect("name = values");
                case.expect.push((name.into(), values(held)));
            }
            "report" => case.report = Some(rest.into()),
            "plant" => {
                let parts: Vec<&str> = rest.split(" => ").collect();
                let [from, to, report] = parts[..] else { panic!("from => to => report: {rest}") };
                case.plants.push([quoted(from), quoted(to), report.into()]);
            }
            "also" => case.also.push(
                rest.split("; ")
                    .map(|pair| {
                        let (from, to) = pair.split_once(" => ").expect("from => to");
                        [quoted(from), quoted(to)]
                    })
                    .collect(),
            ),
            _ => {}
        }
    }
    case
}

fn parsed<T: FromStr>(value: &str) -> T {
    value.parse().unwrap_or_else(|_| panic!("{value} is no {}", std::any::type_name::<T>()))
}

fn bytes(ty: &str, value: &str) -> Vec<u8> {
    match ty {
        "u8" => parsed::<u8>(value).to_le_bytes().into(),
        "u16" => parsed::<u16>(value).to_le_bytes().into(),
        "u32" => parsed::<u32>(value).to_le_bytes().into(),
        "s32" => parsed::<i32>(value).to_le_bytes().into(),
        "u64" => match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).expect("a number").to_le_bytes().into(),
            None => parsed::<u64>(value).to_le_bytes().into(),
        },
        "f32" => parsed::<f32>(value).to_le_bytes().into(),
        "bf16" => parsed::<f32>(value).to_le_bytes()[2..].into(),
        // Of numbers that it has, and that are not below its normal ones.
        "f16" => {
            let bits = parsed::<f32>(value).to_bits();
            let rest = (bits >> 13 & 0x3_FFFF).saturating_sub(112 << 10);
            ((bits >> 16 & 0x8000 | rest) as u16).to_le_bytes().into()
        }
        _ => panic!("unknown type {ty}"),
    }
}

/// Runs a text; gives the buffers as they are then.
fn run(case: &Case, text: &str, seed: u64) -> Result<Vec<(String, String, Vec<u8>)>, Report> {
    let module = Module::parse(text).unwrap_or_else(|error| panic!("{error}"));
    let mut memory = Memory::new();
    let (mut params, mut buffers) = (Vec::<u8>::new(), Vec::new());
    for param in &case.params {
        let value: Vec<u8> = match param {
            Param::Buffer { name, ty, count, values } => {
                let size = bytes(ty, "0").len();
                let address = memory.allocate(name, count * size);
                if !values.is_empty() {
                    let value = |at: usize| match values[0].as_str() {
                        "index" => bytes(ty, &at.to_string()),
                        _ => bytes(ty, &values[at % values.len()]),
                    };
                    memory.write(address, &(0..*count).flat_map(value).collect::<Vec<u8>>());
                }
                buffers.push((name.clone(), ty.clone(), address, count * size));
                address.to_le_bytes().to_vec()
            }
            Param::Number { ty, value } => bytes(ty, value),
            Param::Map { of, map } => {
                let of = buffers.iter().find(|(name, ..)| name == of).expect("a buffer above");
                TensorMap { base: of.2, ..map.clone() }.encode().expect("a map").to_vec()
            }
        };
        params.resize(params.len().next_multiple_of(value.len().min(64)), 0);
        params.extend(value);
    }
    let grid = Grid {
        ctas: [case.ctas, 1, 1],
        threads: [case.threads, 1, 1],
        cluster: case.cluster,
        dynamic_shared: case.shared,
        dependent: case.dependent,
    };
    for (name, wrote) in &case.earlier {
        let (.., address, len) = buffers.iter().find(|(of, ..)| of == name).expect("a buffer");
        memory.touched_by_earlier(*address, *len, *wrote);
    }
    // Kernels hold under both ways to add.
    let sums = if seed.is_multiple_of(2) { Sums::Truncated } else { Sums::Exact };
    let options = Options { sm: case.sm.parse().expect("a machine"), seed, sums };
    launch(&module.kernels[0], &grid, &params, &mut memory, &options)?;
    let read = |(name, ty, address, len): (String, String, u64, usize)| {
        (name, ty, memory.read(address, len).to_vec())
    };
    Ok(buffers.into_iter().map(read).collect())
}

fn must_report(case: &Case, text: &str, seed: u64, report: &str) -> Result<(), String> {
    match run(case, text, seed) {
        Ok(_) => Err(format!("seed {seed}: no report, expected `{report}`")),
        Err(found) if report.split(" | ").any(|text| found.to_string().contains(text)) => Ok(()),
        Err(found) => Err(format!("seed {seed}: `{found}`, expected `{report}`")),
    }
}

/// What differs from what is expected, if something does.
fn other_values(case: &Case, text: &str, seed: u64) -> Result<Option<String>, Report> {
    let buffers = run(case, text, seed)?;
    for (name, values) in &case.expect {
        let (_, ty, found) = buffers.iter().find(|(known, ..)| known == name).expect("a buffer");
        let (values, more) = match values.split_last() {
            Some((last, values)) if last == "..." => (values, true),
            _ => (&values[..], false),
        };
        let mut expected: Vec<u8> = values.iter().flat_map(|value| bytes(ty, value)).collect();
        let len = if more { found.len() } else { expected.len() };
        expected = expected.iter().copied().cycle().take(len).collect();
        if found[..len] != expected {
            return Ok(Some(format!("seed {seed}: {name} begins with {:?}", &found[..len.min(64)])));
        }
    }
    Ok(None)
}

fn check(text: &str, seed: u64) -> Result<(), String> {
    let case = case(text);
    for pairs in &case.also {
        let without =
            text.lines().filter(|line| !line.starts_with("// also: ") && !line.starts_with("// plant: "));
        let mut other = without.collect::<Vec<_>>().join("\n");
        for [from, to] in pairs {
            if !other.contains(from) {
                return Err(format!("`{from}` is not in the file"));
            }
            other = other.replace(from, to);
        }
        check(&other, seed).map_err(|error| format!("with {pairs:?}: {error}"))?;
    }
    for [from, to, report] in &case.plants {
        let code = text.find(".version").expect("a module");
        let (head, code) = text.split_at(code);
        if !code.contains(from) {
            return Err(format!("`{from}` is not in the kernel"));
        }
        let planted = format!("{head}{}", code.replacen(from, to, 1));
        let missed = match (report.as_str(), other_values(&case, &planted, seed)) {
            ("values", Ok(Some(_))) => Ok(()),
            ("values", Ok(None)) => Err(format!("seed {seed}: the values are those expected")),
            ("values", Err(found)) => Err(format!("seed {seed}: `{found}`, expected other values")),
            _ => must_report(&case, &planted, seed, report),
        };
        missed.map_err(|error| format!("with `{to}` for `{from}`: {error}"))?;
    }
    if let Some(report) = &case.report {
        return must_report(&case, text, seed, report);
    }
    match other_values(&case, text, seed) {
        Ok(None) => Ok(()),
        Ok(Some(error)) => Err(error),
        Err(report) => Err(format!("seed {seed}: {report}")),
    }
}

/// The files, each with its text.
fn files() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ptx");
    let paths = fs::read_dir(&folder).expect("the folder").map(|entry| entry.expect("a file").path());
    let paths = paths.filter(|path| path.extension().is_some_and(|end| end == "ptx"));
    let named = |path: PathBuf| {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        (name, fs::read_to_string(&path).expect("a file"))
    };
    let mut files: Vec<_> = paths.map(named).collect();
    files.sort();
    assert!(!files.is_empty());
    files
}

#[test]
fn every_file_holds() {
    let mut wrong = Vec::new();
    for (name, text) in files() {
        if let Some(error) = (0..SEEDS).find_map(|seed| check(&text, seed).err()) {
            wrong.push(format!("{name}: {error}"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// One seed gives one schedule: the same report, and another seed may give another.
#[test]
fn a_seed_gives_one_report() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ptx/stage_reuse.ptx");
    let text = fs::read_to_string(file).expect("a file").replacen("\tbar.sync 0;", "\t", 1);
    let case = case(&text);
    let report = |seed| run(&case, &text, seed).expect_err("a race");
    let reports: Vec<Report> = (0..SEEDS).map(report).collect();
    assert_eq!(reports, (0..SEEDS).map(report).collect::<Vec<_>>());
    assert!(reports.iter().any(|other| *other != reports[0]));
}

/// A check that cannot fail is none: a wrong value, a missing report and another report are all noticed.
#[test]
fn what_does_not_hold_is_noticed() {
    let kernel = ".version 7.4\n.target sm_80\n.entry k(.param .u64 o) {\n.reg .b64 %d;\n.reg .b32 %r;\n\
        ld.param.b64 %d, [o];\nmov.b32 %r, 7;\nst.global.b32 [%d], %r;\nret;\n}\n";
    let head = "// launch: threads=1\n// param: out u32[1]\n";
    assert_eq!(check(&format!("{head}// expect: out = 7\n{kernel}"), 0), Ok(()));
    assert!(check(&format!("{head}// expect: out = 8\n{kernel}"), 0).unwrap_err().contains("begins with [7"));
    assert!(check(&format!("{head}// report: trap\n{kernel}"), 0).unwrap_err().contains("no report"));
    let planted =
        |report: &str| check(&format!("{head}// plant: `ret;` => `trap;` => {report}\n{kernel}"), 0);
    assert_eq!(planted("trap"), Ok(()));
    assert!(planted("deadlock").unwrap_err().contains("expected `deadlock`"));
    assert_eq!(planted("deadlock | trap"), Ok(()));
    assert!(planted("values").unwrap_err().contains("expected other values"));
    let with = |line: &str| check(&format!("{head}// expect: out = 7 ...\n{line}\n{kernel}"), 0);
    assert_eq!(with("// plant: `r, 7` => `r, 8` => values"), Ok(()));
    assert!(with("// plant: `r, 7` => `r, 7` => values").unwrap_err().contains("are those expected"));
    assert_eq!(with("// also: `7` => `8`"), Ok(()));
    assert!(with("// also: `r, 7` => `r, 8`").unwrap_err().contains("begins with [8"));
    let twice = head.replace("u32[1]", "u32[2] = 7 6");
    assert!(
        check(&format!("{twice}// expect: out = 7 ...\n{kernel}"), 0).unwrap_err().contains("[7, 0, 0, 0, 6")
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1024) })]

    /// Words of all files, in places where they do not belong: what is read can be made ready, the rest is refused.
    #[test]
    fn damaged_texts_are_read_or_refused(
        file: prop::sample::Index,
        damages in prop::collection::vec(any::<(prop::sample::Index, prop::sample::Index, bool)>(), 1..4),
    ) {
        let files = files();
        let words: Vec<&str> = files.iter().flat_map(|(_, text)| text.split_inclusive([' ', '\t', '\n', '.'])).collect();
        let text = &file.get(&files).1;
        let mut damaged: Vec<&str> = text.split_inclusive([' ', '\t', '\n', '.']).collect();
        for (at, word, in_place) in damages {
            let at = at.index(damaged.len());
            damaged.splice(at..at + usize::from(in_place), [*word.get(&words)]);
        }
        if let Ok(module) = Module::parse(&damaged.concat()) {
            module.kernels.iter().for_each(|kernel| _ = Program::new(kernel));
        }
    }
}
