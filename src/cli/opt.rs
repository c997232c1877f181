//! `opt`: runs passes on graph text.

use super::error::CliError;
use super::screen::{Screen, columns, print, print_json};
use clap::Args;
use ir::Graph;
use ir::families::LowerError;
use ir::op::Op;
use ir::passes::lower::Kernels;
use ir::passes::{self, PASSES, Pass, Run};
use ir::plan::Give;
use ir::target::Target;
use ir::{parse, verify};
use llamac::compile::CompileError;
use serde_json::json;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

#[derive(Args)]
#[command(after_help = "\
Example:
  llamac opt --list
  llamac emit builtin --stage graph | llamac opt - --passes simplify,fuse --dump-after all")]
pub struct Options {
    /// Graph text; `-` is stdin
    #[arg(required_unless_present = "list")]
    file: Option<PathBuf>,
    /// Passes to run, in this order; none reads, verifies and prints
    #[arg(long, value_delimiter = ',', value_name = "PASSES")]
    passes: Vec<String>,
    /// Print the text after this pass too, or after every one: all
    #[arg(long, value_name = "PASS")]
    dump_after: Option<String>,
    /// Show what passes there are
    #[arg(long)]
    list: bool,
    /// Machine that schedules and kernels are for
    #[arg(long, value_name = "TARGET", default_value = "cpu:x86-64-v4")]
    target: String,
}

pub fn opt(options: &Options, screen: &Screen) -> Result<(), CliError> {
    if options.list {
        if screen.json {
            let list: Vec<_> = PASSES.iter().map(|p| json!({ "name": p.name, "does": p.does })).collect();
            return print_json(&json!({ "passes": list }));
        }
        let rows: Vec<_> = PASSES.iter().map(|p| vec![p.name.to_string(), p.does.to_string()]).collect();
        return print(&columns(&["pass", "does"], &rows));
    }
    let named: Vec<&Pass> = options.passes.iter().map(|name| find(name.trim())).collect::<Result<_, _>>()?;
    let dumped = |pass: &Pass| options.dump_after.as_ref().is_some_and(|d| d == "all" || d == pass.name);
    if let Some(name) = options.dump_after.as_deref().filter(|name| *name != "all") {
        find(name)?;
    }
    let file = options.file.as_deref().expect("clap asks for it");
    let text = read(file)?;
    let target = codegen::cpu::level(&options.target).map_err(CompileError::from)?.target;

    let mut level = Level::Graphs(read_graphs(file, &text)?);
    let mut out = String::new();
    let mut last = level.to_string();
    let mut shown = false;
    for &pass in &named {
        level = level.after(pass, &target)?;
        let now = level.to_string();
        shown = dumped(pass);
        if shown {
            let unchanged = if now == last { " (unchanged)" } else { "" };
            out += &format!("// after {}{unchanged}\n{now}\n", pass.name);
        }
        last = now;
    }
    if !shown {
        out += &last;
    }
    if screen.json { print_json(&json!({ "text": out })) } else { print(&out) }
}

fn find(name: &str) -> Result<&'static Pass, CliError> {
    passes::find(name).ok_or_else(|| {
        let known: Vec<&str> = PASSES.iter().map(|p| p.name).collect();
        CliError::Usage(format!("there is no pass `{name}`; there are {}", known.join(", ")))
    })
}

fn read(file: &Path) -> Result<String, CliError> {
    let mut text = String::new();
    let done = match file == Path::new("-") {
        true => io::stdin().read_to_string(&mut text).map(drop),
        false => fs::read_to_string(file).map(|read| text = read),
    };
    done.map_err(|source| CliError::Read { file: file.to_path_buf(), source })?;
    Ok(text)
}

fn read_graphs(file: &Path, text: &str) -> Result<Vec<Graph>, CliError> {
    let failed = |line, message| CliError::Text { file: file.to_path_buf(), line, message };
    let graphs =
        parse::graphs(text).map_err(|e| failed(e.line, format!("column {}: {}", e.column, e.fault)))?;
    for graph in &graphs {
        if let Err(error) = verify::verify(graph) {
            // The verifier knows the text of what is wrong, not its line.
            let at = text.lines().position(|line| line.trim() == error.text.trim());
            return Err(failed(at.map_or(1, |at| at + 1), format!("{}: {}", error.text.trim(), error.fault)));
        }
    }
    Ok(graphs)
}

/// What there is between two passes.
enum Level {
    Graphs(Vec<Graph>),
    Kernels(Vec<Graph>, Vec<Vec<passes::lower::Launched>>, Kernels),
    Plan(Box<ir::plan::Plan>),
}

impl Level {
    fn after(self, pass: &'static Pass, target: &Target) -> Result<Level, CliError> {
        let wants = |what: &str| CliError::Usage(format!("--passes: {} takes {what}", pass.name));
        let lowered = |error: LowerError| CompileError::from(error);
        match (pass.run, self) {
            (Run::Graph(run), Level::Graphs(mut graphs)) => {
                for graph in &mut graphs {
                    run(graph, target).map_err(lowered)?;
                }
                checked(pass, graphs)
            }
            (Run::Graphs(run), Level::Graphs(mut graphs)) => {
                run(&mut graphs.iter_mut().collect::<Vec<_>>());
                checked(pass, graphs)
            }
            (Run::Kernels, Level::Graphs(graphs)) => {
                if graphs.iter().any(|graph| graph.groups.is_empty()) {
                    return Err(wants("graphs with groups: run fuse, layout and schedule before"));
                }
                let mut kernels = Kernels::default();
                let launches = graphs.iter().map(|graph| passes::lower::lower(graph, target, &mut kernels));
                let launches = launches.collect::<Result<Vec<_>, _>>().map_err(lowered)?;
                Ok(Level::Kernels(graphs, launches, kernels))
            }
            (Run::Plan, Level::Kernels(graphs, launches, kernels)) => {
                let steps = graphs.iter().all(is_step);
                if !steps {
                    return Err(wants("steps of a language model: inputs `tokens` and `positions`"));
                }
                let entries: Vec<_> = graphs
                    .iter()
                    .zip(launches)
                    .map(|(graph, launches)| passes::memory::Lowered { graph, launches, give: give(graph) })
                    .collect();
                Ok(Level::Plan(Box::new(passes::memory::memory(&entries, &kernels))))
            }
            (Run::Graph(_) | Run::Graphs(_) | Run::Kernels, _) => Err(wants("graphs: it comes before lower")),
            (Run::Plan, _) => Err(wants("kernels: it comes after lower")),
        }
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let join = |texts: Vec<String>| texts.join("\n");
        match self {
            Level::Graphs(graphs) => f.write_str(&join(graphs.iter().map(Graph::to_string).collect())),
            Level::Kernels(_, _, kernels) => {
                f.write_str(&join(kernels.list.iter().map(|k| k.to_string()).collect()))
            }
            Level::Plan(plan) => plan.fmt(f),
        }
    }
}

fn checked(pass: &Pass, graphs: Vec<Graph>) -> Result<Level, CliError> {
    for graph in &graphs {
        verify::verify(graph).map_err(|e| CliError::Pass { pass: pass.name, message: e.to_string() })?;
    }
    Ok(Level::Graphs(graphs))
}

fn is_step(graph: &Graph) -> bool {
    let has =
        |wanted: &str| graph.ids().any(|id| matches!(&graph[id].op, Op::Input { name } if name == wanted));
    has("tokens") && has("positions")
}

/// What a step gives back, by its outputs.
fn give(graph: &Graph) -> Give {
    let has = |wanted: &str| graph.outputs.iter().any(|(name, _)| name == wanted);
    match (has("logits"), has("token")) {
        (false, _) => Give::Nothing,
        (true, true) => Give::Last,
        (true, false) => Give::All,
    }
}
