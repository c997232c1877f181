//! Runs every text of `tests/ir/`: one file is one test, named by its path, run as its first line says.
//!
//! * `// run: simplify, fuse`: reads the graphs, runs the passes, compares all that is printed with what stands
//!   behind the line `// -----`. The verifier runs before the first pass and after each; its error is output too.
//! * `// print`: reads and prints. The text is as it is printed, or what is printed stands behind `// -----`.
//! * `// error: message`, at the end of the line at fault: reading or verifying fails there, and says so.
//!
//! `UPDATE_EXPECT=1` writes what was found behind `// -----`, and never anything above it. Read the diff before you
//! commit it.

use ir::passes::lower::Kernels;
use ir::plan::Give;
use ir::target::Target;
use ir::verify::VerifyError;
use ir::{Graph, parse, passes, verify};
use libtest_mimic::{Arguments, Failed, Trial};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs, io};

/// Between what is given and what is expected.
const SEPARATOR: &str = "// -----\n";

fn main() -> io::Result<ExitCode> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/ir");
    let mut files = Vec::new();
    collect(&root, &mut files)?;
    files.sort();
    let trial = |file: PathBuf| {
        let name = file.strip_prefix(&root).expect("it was found there").with_extension("");
        let name = name.to_string_lossy().replace('\\', "/");
        Trial::test(name, move || check(&file))
    };
    let trials = files.into_iter().map(trial).collect();
    Ok(libtest_mimic::run(&Arguments::from_args(), trials).exit_code())
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "ir") {
            files.push(path);
        }
    }
    Ok(())
}

fn check(file: &Path) -> Result<(), Failed> {
    let text = fs::read_to_string(file)?;
    if text.contains("// error:") {
        return fails_as_marked(&text);
    }
    let (header, _) = text.split_once('\n').unwrap_or((&text, ""));
    let (input, expected) = match text.split_once(SEPARATOR) {
        Some((input, expected)) => (input, Some(expected)),
        None => (&*text, None),
    };
    if let Some(names) = header.strip_prefix("// run:") {
        let (names, target) = match names.split_once(" on ") {
            Some((names, machine)) => (names, of_name(machine)?),
            None => (names, cpu()),
        };
        let names: Vec<&str> = names.split(',').map(str::trim).collect();
        return compare(file, input, expected.unwrap_or(""), &after_passes(input, &names, &target)?);
    }
    if header == "// print" {
        let actual = printed(&parse::graphs(input)?);
        return match expected {
            Some(expected) => compare(file, input, expected, &actual),
            None if body(input) == actual => Ok(()),
            None => Err(diff(body(input), &actual).into()),
        };
    }
    Err("the first line says nothing to do: `// run: pass, ..` (with ` on cuda:sm_80` for a GPU), `// print`, or `// error: ..` at a fault"
        .into())
}

/// The text without the comments above the first graph.
fn body(text: &str) -> &str {
    let mut rest = text;
    while rest.starts_with("//") {
        rest = rest.split_once('\n').map_or("", |(_, rest)| rest);
    }
    rest
}

fn printed(graphs: &[Graph]) -> String {
    graphs.iter().map(Graph::to_string).collect::<Vec<_>>().join("\n")
}

/// What the graphs print as after the passes, or their kernels or plan; or the verifier's error, which names the pass.
fn after_passes(input: &str, names: &[&str], target: &Target) -> Result<String, Failed> {
    let mut graphs = parse::graphs(input)?;
    graphs.iter().try_for_each(verify::verify)?;
    for name in names {
        let pass = passes::find(name).ok_or_else(|| format!("there is no pass `{name}`"))?;
        match pass.run {
            passes::Run::Graph(run) => graphs.iter_mut().try_for_each(|graph| run(graph, target))?,
            passes::Run::Graphs(run) => run(&mut graphs.iter_mut().collect::<Vec<_>>()),
            // Kernels are made with the plan where one follows.
            passes::Run::Kernels if names.last() != Some(name) => continue,
            passes::Run::Kernels => return lowered(&graphs, target, false),
            passes::Run::Plan => return lowered(&graphs, target, true),
        }
        if let Some(error) = graphs.iter().find_map(|graph| verify::verify(graph).err()) {
            return Ok(format!("after {name}: {error}\n"));
        }
    }
    Ok(printed(&graphs))
}

/// The kernels of scheduled graphs, or their plan; or why a group has no kernel.
fn lowered(graphs: &[Graph], target: &Target, plan: bool) -> Result<String, Failed> {
    let mut kernels = Kernels::default();
    let mut entries = Vec::new();
    for graph in graphs {
        match passes::lower::lower(graph, target, &mut kernels) {
            Ok(launches) => entries.push(passes::memory::Lowered { graph, launches, give: Give::of(graph) }),
            Err(why) => return Ok(format!("lower: {why}\n")),
        }
    }
    if plan {
        return Ok(passes::memory::memory(&entries, &kernels).to_string());
    }
    Ok(kernels.list.iter().map(|kernel| kernel.to_string()).collect::<Vec<_>>().join("\n"))
}

/// What schedules are chosen for, unless a text says otherwise: a CPU with AVX-512.
fn cpu() -> Target {
    Target::cpu("cpu:x86-64-v4", 32, 64)
}

/// What a text says behind ` on `.
fn of_name(machine: &str) -> Result<Target, Failed> {
    match machine.trim() {
        name @ "cuda:sm_80" => Ok(Target::gpu(name, 99 << 10, false)),
        name @ "cuda:sm_90a" => Ok(Target::gpu(name, 227 << 10, true)),
        other => Err(format!("there is no machine `{other}`").into()),
    }
}

fn compare(file: &Path, input: &str, expected: &str, actual: &str) -> Result<(), Failed> {
    if actual == expected {
        return Ok(());
    }
    if env::var_os("UPDATE_EXPECT").is_some() {
        return Ok(fs::write(file, format!("{input}{SEPARATOR}{actual}"))?);
    }
    Err(format!("{}UPDATE_EXPECT=1 accepts\n", diff(expected, actual)).into())
}

/// Both texts by lines: `-` expected only, `+` found only.
fn diff(expected: &str, actual: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (expected.lines().collect(), actual.lines().collect());
    // `common[i][j]`: most lines that `old[i..]` and `new[j..]` have in common, in order.
    let mut common = vec![vec![0; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            common[i][j] = match old[i] == new[j] {
                true => common[i + 1][j + 1] + 1,
                false => common[i + 1][j].max(common[i][j + 1]),
            };
        }
    }
    let (mut i, mut j, mut out) = (0, 0, String::new());
    while i < old.len() || j < new.len() {
        let (sign, line) = if i < old.len() && j < new.len() && old[i] == new[j] {
            (i, j) = (i + 1, j + 1);
            (' ', old[i - 1])
        } else if j == new.len() || i < old.len() && common[i + 1][j] >= common[i][j + 1] {
            i += 1;
            ('-', old[i - 1])
        } else {
            j += 1;
            ('+', new[j - 1])
        };
        out += &format!("{sign} {line}\n");
    }
    out
}

/// The one line marked `// error:` is the line of the first error, whose message holds the words behind the mark.
fn fails_as_marked(text: &str) -> Result<(), Failed> {
    let mut marks = text.lines().enumerate().filter_map(|(index, line)| {
        let (statement, message) = line.split_once("// error:")?;
        Some((index + 1, statement.trim(), message.trim()))
    });
    let (Some((line, statement, message)), None) = (marks.next(), marks.next()) else {
        return Err("one line bears `// error:`, the first at fault".into());
    };
    let (at_line, found) = match parse::graphs(text) {
        Err(error) => (error.line == line, error.to_string()),
        Ok(graphs) => match graphs.iter().find_map(|graph| verify::verify(graph).err()) {
            Some(error) => (is_of(&error, statement), error.to_string()),
            None => return Err("nothing is wrong with it".into()),
        },
    };
    if at_line && found.contains(message) {
        return Ok(());
    }
    Err(format!("expected at line {line}: {message}\nfound: {found}").into())
}

/// Do the line of an error and a line of the file say what the same thing is? Their first two words name it: `%x =`,
/// `group @g`, `pack @p`, `output "y"`, `graph @f`.
fn is_of(error: &VerifyError, statement: &str) -> bool {
    let named = |line: &str| line.split([' ', '(']).take(2).map(str::to_string).collect::<Vec<_>>();
    named(&error.text) == named(statement)
}
