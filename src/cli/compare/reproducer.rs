//! `--reproducer` and `--replay`: a fault is left in a folder, and shown again from there.

use super::super::error::CliError;
use super::super::screen::{Screen, pairs, print, print_json};
use super::super::source::Ready;
use super::{Found, Options};
use llamac::compare::reproducer::{Replay, Reproducer, Where};
use llamac::model::{Model, name_of};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Refuses a folder that is there, before any work.
pub fn check(folder: &Path) -> Result<(), CliError> {
    match folder.symlink_metadata() {
        Ok(_) => Err(CliError::Usage(format!("--reproducer {}: it is there already", folder.display()))),
        Err(_) => Ok(()),
    }
}

/// Leaves what was found in a folder; says on stderr where, or why not, and whether a kernel is wrong alone too. The verdict
/// stands either way.
pub fn leave(folder: Option<&Path>, ready: &Ready, found: &Found, screen: &Screen) -> Option<PathBuf> {
    let (Some(fault), Some(reproducer)) = (&found.fault, &found.reproducer) else { return None };
    let folder = folder.map_or_else(
        || {
            let place = match &ready.model {
                Model::Artifact(artifact) => artifact.file().with_file_name(""),
                Model::Checkpoint(_) | Model::Preset(_) => PathBuf::new(),
            };
            let layer = fault.layer.map_or(String::new(), |layer| format!("l{layer}."));
            let op = fault.op.as_deref().unwrap_or("fault");
            free(&place.join(format!("{}-{layer}{op}-reproducer", name_of(&ready.argument))))
        },
        Path::to_path_buf,
    );
    match reproducer.write(&folder, &fault.to_string()) {
        Ok(()) => {
            let alone = match reproducer {
                Reproducer::Kernel(_) => reproducer.replay(Where::Cpu).ok(),
                Reproducer::Weight(_) | Reproducer::Graph(_) => None,
            };
            let right = alone.is_some_and(|alone| alone.fault.is_none());
            let but = if right {
                "; alone the kernel is right: look at the code and the plan around it"
            } else {
                ""
            };
            screen.note(format!("{}: a reproducer of the fault{but}", folder.display()));
            Some(folder)
        }
        Err(error) => {
            screen.note(format!("no reproducer: {error}"));
            None
        }
    }
}

/// A name where nothing is: this one, or with a number behind it.
fn free(folder: &Path) -> PathBuf {
    let numbered = |number: usize| PathBuf::from(format!("{}-{number}", folder.display()));
    let names = std::iter::once(folder.to_path_buf()).chain((2..).map(numbered));
    let mut free = names.filter(|name| name.symlink_metadata().is_err());
    free.next().expect("numbers do not end")
}

/// Shows the fault in a folder again.
pub fn replay(options: &Options, folder: &Path, screen: &Screen) -> Result<(), CliError> {
    let place = match options.device.device.as_str() {
        "cpu" => Where::Cpu,
        "interpreter" => Where::Interpreter,
        name => {
            return Err(CliError::NoDevice {
                name: name.to_string(),
                known: "cpu and interpreter to replay on",
            });
        }
    };
    let Replay { lines, worst, fault } = Reproducer::read(folder)?.replay(place)?;
    let verdict = if fault.is_none() { "pass" } else { "fail" };
    if screen.json {
        print_json(&json!({ "verdict": verdict, "worst": worst, "first_fault": fault }))?;
    } else {
        let said = fault.as_ref().map_or("it is right now".to_string(), |fault| fault.to_string());
        let lines: Vec<_> = lines.into_iter().chain([(verdict, said)]).collect();
        print(&pairs(&lines))?;
    }
    match fault {
        None => Ok(()),
        Some(_) => Err(CliError::Mismatch { model: folder.display().to_string() }),
    }
}
