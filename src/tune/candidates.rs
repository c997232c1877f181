//! A file of candidates that were compiled elsewhere, for a GPU on a machine without the compiler.
//!
//! It is an artifact of its own kind: the manifest is a [`Head`], and of each candidate there is PTX (`code.N`) and, where
//! `ptxas` was, machine code (`cubin.N`). What the candidates are of is made again from the head by the same passes; that the
//! code belongs to it is checked by the digest of the kernel's text.

use super::gpu::Code;
use super::task::Task;
use super::worker::Setup;
#[cfg(feature = "compiler")]
use codegen::{
    cpu::CodegenError,
    nvptx,
    ptxas::{self, PtxasError, Tool},
};
use ir::kernel::Kernel;
#[cfg(feature = "compiler")]
use ir::{
    families::{GroupView, LowerError, lower},
    graph::GroupId,
    target::Target,
};
use runtime::artifact::{Artifact, ArtifactError};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What a file of candidates says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Head {
    /// Version of llamac.
    pub llamac: String,
    /// The compiler that its records are of.
    pub compiler: String,
    /// The machine that the code is for, as `runtime::gpu` names it: `sm_80`.
    pub machine: String,
    /// Bytes of shared memory that a CTA may use.
    pub shared_bytes: u32,
    /// What is tuned.
    pub setup: Setup,
    /// In the order of the sections.
    pub candidates: Vec<Packed>,
}

/// A candidate whose code is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packed {
    /// Digest of what the kernel computes, as in a table.
    pub group: String,
    /// Its schedule.
    pub schedule: String,
    /// Digest of the kernel's text.
    pub kernel: String,
}

/// Why a file of candidates cannot be used or made.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum CandidatesError {
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error("{}: candidates of llamac {found}, this is {expected}: pack them again", file.display())]
    Version { file: PathBuf, found: String, expected: String },
    #[error("{}: no code of @{kernel} by schedule {schedule}", file.display())]
    Missing { file: PathBuf, kernel: String, schedule: String },
    #[error("{}: code of @{kernel} by schedule {schedule} is another llamac's: pack it again", file.display())]
    Foreign { file: PathBuf, kernel: String, schedule: String },
    #[cfg(feature = "compiler")]
    #[error(transparent)]
    Codegen(#[from] CodegenError),
    #[cfg(feature = "compiler")]
    #[error(transparent)]
    Lower(#[from] LowerError),
}

/// An open file of candidates.
pub struct Candidates {
    artifact: Artifact,
    /// What it says of itself.
    pub head: Head,
}

/// Digest of a kernel's text.
fn digest(kernel: &Kernel) -> String {
    super::table::digest(&kernel.to_string())
}

impl Candidates {
    /// Opens a file.
    ///
    /// # Errors
    ///
    /// One that is damaged, is something else, or was made by another llamac.
    pub fn open(file: &Path) -> Result<Candidates, CandidatesError> {
        let artifact = Artifact::open(file)?;
        let head: Head = artifact.manifest()?;
        let (found, expected) = (head.llamac.clone(), env!("CARGO_PKG_VERSION").to_string());
        if found != expected {
            return Err(CandidatesError::Version { file: file.to_path_buf(), found, expected });
        }
        Ok(Candidates { artifact, head })
    }

    /// Leaves to each task the candidates whose code is there, in the file's order behind the default; tasks without a choice go.
    pub fn restrict(&self, tasks: Vec<Task>) -> Vec<Task> {
        let there = |mut task: Task| {
            let all = std::mem::take(&mut task.candidates);
            let packed = self.head.candidates.iter().filter(|packed| packed.group == task.group);
            let found = packed.filter_map(|packed| all.iter().find(|one| one.schedule == packed.schedule));
            task.candidates = found.cloned().collect();
            let default = task.candidates.iter().position(|one| *one == all[0])?;
            task.candidates[..=default].rotate_right(1);
            (task.candidates.len() > 1).then_some(task)
        };
        tasks.into_iter().filter_map(there).collect()
    }

    /// The code of a task's kernel.
    ///
    /// # Errors
    ///
    /// When it is not there, or of another kernel.
    pub fn code(&self, task: &Task, schedule: &str, kernel: &Kernel) -> Result<Code, CandidatesError> {
        let file = self.artifact.file().to_path_buf();
        let (name, text) = (task.kernel.clone(), schedule.to_string());
        let this = |packed: &Packed| packed.group == task.group && packed.schedule == schedule;
        let Some(number) = self.head.candidates.iter().position(this) else {
            return Err(CandidatesError::Missing { file, kernel: name, schedule: text });
        };
        if self.head.candidates[number].kernel != digest(kernel) {
            return Err(CandidatesError::Foreign { file, kernel: name, schedule: text });
        }
        let ptx = self.artifact.require(&format!("code.{number}"))?;
        Ok(Code {
            ptx: String::from_utf8_lossy(ptx).into_owned(),
            cubin: self.artifact.section(&format!("cubin.{number}")).map(<[u8]>::to_vec),
        })
    }
}

#[cfg(feature = "compiler")]
fn architecture(target: &Target) -> Result<&'static nvptx::Architecture, CodegenError> {
    nvptx::architecture(&target.name).ok_or_else(|| CodegenError::UnknownTarget {
        name: target.name.clone(),
        known: nvptx::ARCHITECTURES.map(|a| a.name).join(", "),
    })
}

/// Compiles a kernel by itself, with machine code where `ptxas` is.
///
/// # Errors
///
/// What LLVM or `ptxas` says; a target that is no GPU's.
#[cfg(feature = "compiler")]
pub fn compile(kernel: &Kernel, target: &Target) -> Result<Code, CodegenError> {
    let architecture = architecture(target)?;
    let kernels = crate::check::device::numbered(std::slice::from_ref(kernel));
    let ptx = nvptx::compile(&nvptx::llvm(&kernels, architecture)?, architecture)?;
    let cubin = match Tool::Ptxas.find() {
        Err(PtxasError::Missing(_)) => None,
        ptxas => Some(ptxas::assemble(&ptxas?, &ptx, architecture.cpu)?.bytes),
    };
    Ok(Code { ptx, cubin })
}

/// Compiles the best candidates of each task and writes them to a file: the default, and so many more by the times that
/// `seconds` gives, which are those that were tried. Gives how many there are.
///
/// # Errors
///
/// [`CandidatesError`].
#[cfg(feature = "compiler")]
pub fn pack(
    file: &Path,
    (setup, compiler): (&Setup, String),
    seconds: &dyn Fn(&Task) -> Vec<(f64, String)>,
    more: usize,
    tasks: &[Task],
) -> Result<usize, CandidatesError> {
    use runtime::artifact::ArtifactWriter;
    let architecture = architecture(&setup.target)?;
    let mut writer = ArtifactWriter::create(file, None)?;
    let mut candidates = Vec::new();
    let mut section = |name: String, bytes: &[u8]| -> Result<(), ArtifactError> {
        let mut section = writer.section(&name)?;
        section.append(bytes)?;
        section.end().map(drop)
    };
    for task in tasks {
        let default = &task.candidates[0].schedule;
        let mut tried = seconds(task);
        tried.sort_by(|a, b| a.0.total_cmp(&b.0));
        let best = tried.into_iter().map(|(_, schedule)| schedule).filter(|schedule| schedule != default);
        for schedule in [default.clone()].into_iter().chain(best.take(more)) {
            let graph = task.with(&schedule);
            let kernel = lower(&GroupView::new(&graph, GroupId(0)), &setup.target)?.kernel;
            let code = compile(&kernel, &setup.target)?;
            let number = candidates.len();
            section(format!("code.{number}"), code.ptx.as_bytes())?;
            if let Some(cubin) = code.cubin {
                section(format!("cubin.{number}"), &cubin)?;
            }
            candidates.push(Packed { group: task.group.clone(), schedule, kernel: digest(&kernel) });
        }
    }
    let count = candidates.len();
    let llamac = env!("CARGO_PKG_VERSION").to_string();
    let (machine, shared_bytes) = (architecture.cpu.to_string(), architecture.shared_bytes as u32);
    writer.finish(&Head { llamac, compiler, machine, shared_bytes, setup: setup.clone(), candidates })?;
    Ok(count)
}

#[cfg(all(test, feature = "compiler"))]
mod tests {
    use super::*;
    use crate::tune::worker::On;
    use ir::DType;

    #[test]
    fn a_file_has_the_code_of_what_was_packed_and_of_nothing_else() {
        let config = models::preset("smollm2-135m").unwrap();
        let target = nvptx::ARCHITECTURES[0].target();
        let on = On::Nowhere { gpu: "a100".into() };
        let setup = Setup { config, dtype: DType::BF16, context: 64, target, on };
        let tasks = setup.tasks().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("some.candidates");
        // The third is the best, the second was not tried.
        let task = tasks[0].clone();
        let schedules: Vec<&String> = task.candidates.iter().map(|one| &one.schedule).collect();
        let seconds = |_: &Task| vec![(2.0, schedules[0].clone()), (1.0, schedules[2].clone())];
        let count =
            pack(&file, (&setup, "a compiler".into()), &seconds, 7, std::slice::from_ref(&task)).unwrap();
        assert_eq!(count, 2);

        let candidates = Candidates::open(&file).unwrap();
        assert_eq!(candidates.head.compiler, "a compiler");
        let left = candidates.restrict(tasks);
        let left: Vec<(&String, Vec<&String>)> =
            left.iter().map(|t| (&t.group, t.candidates.iter().map(|c| &c.schedule).collect())).collect();
        assert_eq!(left, [(&task.group, vec![schedules[0], schedules[2]])]);
        let kernel = |schedule: &str| {
            let graph = task.with(schedule);
            lower(&GroupView::new(&graph, GroupId(0)), &setup.target).unwrap().kernel
        };
        let code = candidates.code(&task, schedules[2], &kernel(schedules[2])).unwrap();
        assert_eq!(code, compile(&kernel(schedules[2]), &setup.target).unwrap());
        let missing = candidates.code(&task, schedules[1], &kernel(schedules[1])).unwrap_err();
        assert!(missing.to_string().contains(&format!("no code of @{}", task.kernel)), "{missing}");
        let foreign = candidates.code(&task, schedules[2], &kernel(schedules[1])).unwrap_err();
        assert!(foreign.to_string().ends_with("is another llamac's: pack it again"), "{foreign}");
    }
}
