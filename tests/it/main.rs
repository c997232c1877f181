//! Everything that links LLVM, in one binary.
//!
//! * [`builtin`]: the built-in model writes what transformers writes with it.
//! * [`instructions`]: the conformance suite has every instruction of the kernels that ship.
//! * [`lower`]: kernels as LLVM IR, assembly, objects and PTX.
//! * [`ptxas`]: what NVIDIA's assemblers make of PTX, and what the command does with it.
//! * [`sass`]: what is read in machine code of GPUs.
//! * [`diff`]: the verbs `diff` and `plan --why`.
//! * [`eval`]: the verb `eval` by the protocol of reference perplexities.
//! * [`faults`]: faults planted in kernels, weights and plans, and what catches them.
//! * [`ops`]: every kernel family on the table of shapes and distributions, on every device.
//! * [`random`]: random graphs, compiled and interpreted.
//! * [`readme`]: what the README says.
//! * [`reference`]: real models against what PyTorch computes, on every device.
//! * [`reproducer`]: groups taken out of their graphs, and faults shown again from a folder.
//! * [`synchronisation`]: statements taken out of GPU kernels, each of which the emulator misses.
//! * [`trace`]: what launches store, compared with other runs and other artifacts.
//! * [`compare`]: the verb passes what is right and names each planted fault.
//! * [`stages`]: every stage as text, and `opt` from one to the next.
//! * [`cli`]: what the command gives to people and scripts, and [`bad`]: how it refuses bad input; both run it by [`command`].
//! * [`tune`]: searches for schedules, and what is done with what they find.
//! * [`profile`]: steps launch by launch, and what is told of them.
//! * [`fuzz`]: texts and artifacts damaged at random.
//!
//! A check that cannot run here says so and why; their number is the last line. Figures are printed as shares of a bound:
//! 1 is the most that is right.

mod bad;
mod builtin;
mod cli;
mod command;
mod compare;
#[path = "../../models/tests/it/damage.rs"]
#[expect(dead_code, reason = "the tests of `models` look at memory too")]
mod damage;
mod diff;
mod eval;
mod faults;
mod fuzz;
#[path = "../../models/tests/it/gguf_file.rs"]
#[expect(dead_code, reason = "the tests of `models` write more kinds of files")]
mod gguf_file;
mod instructions;
mod lower;
mod ops;
mod profile;
mod ptxas;
mod random;
mod readme;
mod reference;
mod reproducer;
mod sass;
mod skipped;
mod stages;
mod synchronisation;
mod trace;
mod tune;

/// What a GPU's architecture is called in names of tests.
fn machine(architecture: &codegen::nvptx::Architecture) -> &'static str {
    architecture.name.trim_start_matches("cuda:")
}

/// What a check says: nothing, or what is wrong.
type Checked<T> = Result<T, Box<dyn std::error::Error>>;

fn main() {
    if tune::is_worker() {
        return;
    }
    let args = libtest_mimic::Arguments::from_args();
    let mut trials = Vec::new();
    trials.extend(builtin::trials());
    trials.extend(synchronisation::trials());
    trials.extend(instructions::trials());
    trials.extend(lower::trials());
    trials.extend(ptxas::trials());
    trials.extend(sass::trials());
    trials.extend(bad::trials());
    trials.extend(cli::trials());
    trials.extend(compare::trials());
    trials.extend(fuzz::trials());
    trials.extend(diff::trials());
    trials.extend(eval::trials());
    trials.extend(faults::trials());
    trials.extend(ops::trials());
    trials.extend(random::trials());
    trials.extend(readme::trials());
    trials.extend(profile::trials());
    trials.extend(reference::trials());
    trials.extend(reproducer::trials());
    trials.extend(stages::trials());
    trials.extend(tune::trials());
    trials.extend(trace::trials());
    let conclusion = libtest_mimic::run(&args, trials);
    skipped::print_all();
    conclusion.exit();
}
