//! `opt`: runs passes on text.

use super::error::CliError;
use super::screen::{Screen, columns, print, print_json};
use clap::Args;
use codegen::Backend;
use ir::Graph;
use ir::families::LowerError;
use ir::kernel::Kernel;
use ir::op::Op;
use ir::passes::lower::{Kernels, Launched};
use ir::passes::memory::Lowered;
use ir::passes::{self, PASSES, Pass, Run};
use ir::plan::{Give, Plan};
use ir::target::Target;
use ir::{kernel, parse, plan, verify};
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
    /// Text of graphs, or of kernels or a plan, which are only verified; `-` is stdin
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
    let target = Backend::of(&options.target).map_err(CompileError::from)?.target();

    let mut level = Level::read(file, &text)?;
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

/// What there is between two passes.
enum Level {
    Graphs(Vec<Graph>),
    /// Kernels with the graphs that launch them.
    Lowered(Vec<(Graph, Vec<Launched>)>, Kernels),
    /// Kernels that were read: nobody knows what launches them.
    Kernels(Vec<Kernel>),
    Plan(Box<Plan>),
}

impl Level {
    /// Reads and verifies what the first word of a text says it is.
    fn read(file: &Path, text: &str) -> Result<Level, CliError> {
        let failed = |line, message| CliError::Text { file: file.to_path_buf(), line, message };
        // A verifier knows the text of what is wrong, not its line.
        let line_of =
            |wrong: &str| text.lines().position(|l| l.trim() == wrong.trim()).map_or(1, |at| at + 1);
        let code = text.lines().find(|line| !line.trim().is_empty() && !line.trim_start().starts_with("//"));
        match code.and_then(|line| line.trim_start().split([' ', '(']).next()) {
            Some("kernel") => {
                let list = kernel::parse::parse(text)
                    .map_err(|e| failed(e.line, format!("column {}: {}", e.column, e.kind)))?;
                let wrong = list.iter().find_map(|kernel| kernel::verify::verify(kernel).err());
                match wrong {
                    Some(error) => Err(failed(line_of(&error.at), error.to_string())),
                    None => Ok(Level::Kernels(list)),
                }
            }
            Some("plan") => {
                let plan = plan::parse::parse(text)
                    .map_err(|e| failed(e.line, format!("column {}: {}", e.column, e.fault)))?;
                plan::verify::verify(&plan).map_err(|e| failed(1, e.to_string()))?;
                Ok(Level::Plan(Box::new(plan)))
            }
            _ => {
                let graphs = parse::graphs(text)
                    .map_err(|e| failed(e.line, format!("column {}: {}", e.column, e.fault)))?;
                match graphs.iter().find_map(|graph| verify::verify(graph).err()) {
                    Some(error) => {
                        let message = format!("{}: {}", error.text.trim(), error.fault);
                        Err(failed(line_of(&error.text), message))
                    }
                    None => Ok(Level::Graphs(graphs)),
                }
            }
        }
    }

    fn after(self, pass: &'static Pass, target: &Target) -> Result<Level, CliError> {
        let wants = |what: &str| CliError::Usage(format!("--passes: {} takes {what}", pass.name));
        match (pass.run, self) {
            (Run::Graph(run), Level::Graphs(mut graphs)) => {
                for graph in &mut graphs {
                    run(graph, target).map_err(CompileError::from)?;
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
                let lowered = graphs.into_iter().map(|graph| {
                    let launches = passes::lower::lower(&graph, target, &mut kernels)?;
                    Ok((graph, launches))
                });
                let entries = lowered.collect::<Result<Vec<_>, LowerError>>().map_err(CompileError::from)?;
                Ok(Level::Lowered(entries, kernels))
            }
            (Run::Plan, Level::Lowered(entries, kernels)) => {
                if !entries.iter().all(|(graph, _)| is_step(graph)) {
                    return Err(wants("steps of a language model: inputs `tokens` and `positions`"));
                }
                let lowered = entries.iter().map(|(graph, launches)| {
                    let (launches, give) = (launches.clone(), Give::of(graph));
                    Lowered { graph, launches, give }
                });
                let entries: Vec<Lowered<'_>> = lowered.collect();
                Ok(Level::Plan(Box::new(passes::memory::memory(&entries, &kernels))))
            }
            (Run::Graph(_) | Run::Graphs(_) | Run::Kernels, _) => Err(wants("graphs: it comes before lower")),
            (Run::Plan, _) => Err(wants("kernels with their graphs: run lower and memory in one go")),
        }
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        fn joined<T: ToString>(parts: &[T]) -> String {
            parts.iter().map(T::to_string).collect::<Vec<_>>().join("\n")
        }
        match self {
            Level::Graphs(graphs) => f.write_str(&joined(graphs)),
            Level::Kernels(list) | Level::Lowered(_, Kernels { list, .. }) => f.write_str(&joined(list)),
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
