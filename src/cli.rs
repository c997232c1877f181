//! The command line: one file a verb, and what verbs share.
//!
//! * Verbs: [`inspect`], [`run`], [`logits`], [`tokenize`], [`eval`], [`bench`], [`profile`], [`tune`],
//!   [`doctor`]; with the compiler [`plan`], [`diff`], [`compile`], [`opt`], [`emit`], [`check`], [`compare`].
//! * [`source`]: the MODEL argument to an artifact, compiled into the cache folder if it is none; [`prompt`]: text to
//!   tokens; [`device`]: where to run.
//! * [`error`]: every error with its exit code; [`screen`]: columns, units, JSON, notes; [`interrupt`]: Ctrl-C.
//!
//! Results go to stdout, progress and notes to stderr.

mod bench;
mod ceilings;
mod completions;
mod conformance;
mod device;
mod doctor;
mod error;
mod eval;
mod inspect;
mod interrupt;
mod logits;
mod profile;
mod prompt;
mod run;
mod screen;
mod source;
mod tokenize;

#[cfg(feature = "compiler")]
mod cache;
#[cfg(feature = "compiler")]
mod check;
#[cfg(feature = "compiler")]
mod compare;
#[cfg(feature = "compiler")]
mod compile;
#[cfg(feature = "compiler")]
mod diff;
#[cfg(feature = "compiler")]
mod emit;
#[cfg(feature = "compiler")]
mod opt;
#[cfg(feature = "compiler")]
mod plan;
mod tune;

use clap::{Args, CommandFactory, Parser, Subcommand};
use error::CliError;
use screen::Screen;
use std::io;
use std::process::ExitCode;

/// A tensor compiler for LLaMA-family models.
///
/// MODEL is a Hugging Face directory, a .gguf file, a .llamac artifact, preset:NAME (a published shape without weights)
/// or `builtin` (the small model inside this program).
#[derive(Parser)]
#[command(name = "llamac", version, max_term_width = 110, after_help = EXITS)]
struct Cli {
    #[command(flatten)]
    shared: Shared,
    #[command(subcommand)]
    verb: Verb,
}

const EXITS: &str = "\
Exit codes: 0 done, 1 a check failed, 2 wrong usage, 3 bad model, 4 bad artifact, 5 context too short,
6 not enough memory or disk, 7 device failed.";

/// Options of every verb.
#[derive(Args)]
struct Shared {
    /// One JSON object on stdout and nothing else; errors as one JSON object on stderr
    #[arg(long, global = true)]
    json: bool,
    /// Say more
    #[arg(long, short, global = true)]
    verbose: bool,
}

#[derive(Subcommand)]
enum Verb {
    /// What a model or an artifact is
    Inspect(inspect::Options),
    /// What compiling would give: memory, launches, predicted speed; needs no weights
    #[cfg(feature = "compiler")]
    Plan(plan::Options),
    /// What differs between two plans: kernels, memory, launches, predicted speed
    #[cfg(feature = "compiler")]
    Diff(diff::Options),
    /// Compile a model into an artifact
    #[cfg(feature = "compiler")]
    Compile(compile::Options),
    /// Find the fastest schedule of each kernel on this machine
    Tune(tune::Options),
    /// What `tune` starts
    #[command(hide = true)]
    TuneWorker,
    /// Write text
    Run(run::Options),
    /// Logits at every position
    Logits(logits::Options),
    /// Text to token ids and back
    Tokenize(tokenize::Options),
    /// How well the model predicts: perplexity, divergence from another model, multiple choice
    Eval(eval::Options),
    /// Tokens a second, beside the ceilings of this machine
    Bench(bench::Options),
    /// Time, bytes, FLOPs and share of the limit of each kernel of a step
    Profile(profile::Options),
    /// Run passes on IR text
    #[cfg(feature = "compiler")]
    Opt(opt::Options),
    /// The text of any stage of a compilation
    #[cfg(feature = "compiler")]
    Emit(emit::Options),
    /// Judge every kernel family on this machine: schedules, shapes, distributions
    #[cfg(feature = "compiler")]
    Check(check::Options),
    /// Judge a model's program by a reference, its checkpoint and the interpreter
    #[cfg(feature = "compiler")]
    Compare(compare::Options),
    /// What is here, what is missing, and how to get it
    Doctor(doctor::Options),
    /// Shell completions
    Completions(completions::Options),
    #[cfg(not(feature = "compiler"))]
    #[command(hide = true)]
    Plan(WithoutCompiler),
    #[cfg(not(feature = "compiler"))]
    #[command(hide = true)]
    Diff(WithoutCompiler),
    #[cfg(not(feature = "compiler"))]
    #[command(hide = true)]
    Compile(WithoutCompiler),
    #[cfg(not(feature = "compiler"))]
    #[command(hide = true)]
    Opt(WithoutCompiler),
    #[cfg(not(feature = "compiler"))]
    #[command(hide = true)]
    Emit(WithoutCompiler),
    /// Judge instructions of GPUs one by one (`--conformance`); kernels need the compiler
    #[cfg(not(feature = "compiler"))]
    Check(conformance::FormOptions),
    #[cfg(not(feature = "compiler"))]
    #[command(hide = true)]
    Compare(WithoutCompiler),
}

/// Whatever is given to a verb that this program lacks.
#[cfg(not(feature = "compiler"))]
#[derive(Args)]
struct WithoutCompiler {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _rest: Vec<String>,
}

/// Reads the arguments, does what they say, gives the exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let screen = Screen { json: cli.shared.json, verbose: cli.shared.verbose };
    match dispatch(cli.verb, &screen) {
        Ok(exit) => exit,
        // Who reads the output has had enough.
        Err(CliError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            error.report(screen.json);
            error.exit().into()
        }
    }
}

fn dispatch(verb: Verb, screen: &Screen) -> Result<ExitCode, CliError> {
    match verb {
        Verb::Inspect(options) => inspect::inspect(&options, screen),
        Verb::Run(options) => run::run(&options, screen),
        Verb::Logits(options) => logits::logits(&options, screen),
        Verb::Tokenize(options) => tokenize::tokenize(&options, screen),
        Verb::Eval(options) => eval::eval(&options, screen),
        Verb::Bench(options) => bench::bench(&options, screen),
        Verb::Profile(options) => profile::profile(&options, screen),
        Verb::Doctor(options) => doctor::doctor(&options, screen),
        Verb::Completions(options) => completions::completions(&options, &mut Cli::command()),
        #[cfg(feature = "compiler")]
        Verb::Plan(options) => plan::plan(&options, screen),
        #[cfg(feature = "compiler")]
        Verb::Diff(options) => diff::diff(&options, screen),
        #[cfg(feature = "compiler")]
        Verb::Compile(options) => compile::compile(&options, screen),
        Verb::Tune(options) => tune::tune(&options, screen),
        Verb::TuneWorker => tune::worker(),
        #[cfg(feature = "compiler")]
        Verb::Opt(options) => opt::opt(&options, screen),
        #[cfg(feature = "compiler")]
        Verb::Emit(options) => emit::emit(&options, screen),
        #[cfg(feature = "compiler")]
        Verb::Check(options) => check::check(&options, screen),
        #[cfg(feature = "compiler")]
        Verb::Compare(options) => compare::compare(&options, screen),
        #[cfg(not(feature = "compiler"))]
        Verb::Plan(_) => Err(CliError::NoCompiler { what: "plan".into() }),
        #[cfg(not(feature = "compiler"))]
        Verb::Diff(_) => Err(CliError::NoCompiler { what: "diff".into() }),
        #[cfg(not(feature = "compiler"))]
        Verb::Compile(_) => Err(CliError::NoCompiler { what: "compile".into() }),
        #[cfg(not(feature = "compiler"))]
        Verb::Opt(_) => Err(CliError::NoCompiler { what: "opt".into() }),
        #[cfg(not(feature = "compiler"))]
        Verb::Emit(_) => Err(CliError::NoCompiler { what: "emit".into() }),
        #[cfg(not(feature = "compiler"))]
        Verb::Check(options) if options.conformance => conformance::conformance(&options, screen),
        #[cfg(not(feature = "compiler"))]
        Verb::Check(_) => Err(CliError::NoCompiler { what: "check of kernels".into() }),
        #[cfg(not(feature = "compiler"))]
        Verb::Compare(_) => Err(CliError::NoCompiler { what: "compare".into() }),
    }
    .map(|()| ExitCode::SUCCESS)
}

/// Prints help, or what is wrong with the arguments.
fn usage(error: &clap::Error) -> ExitCode {
    let json = std::env::args().any(|argument| argument == "--json");
    if json && error.use_stderr() {
        let text = error.to_string();
        let what: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
        CliError::Usage(what.join(" ").trim_start_matches("error: ").to_string()).report(true);
    } else {
        // Nobody is left to be told that stderr is closed.
        let _ = error.print();
    }
    ExitCode::from(error.exit_code() as u8)
}
