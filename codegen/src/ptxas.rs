//! PTX to the machine code of one GPU, by NVIDIA's `ptxas`, and that to text, by NVIDIA's `nvdisasm`.
//!
//! Neither is part of llamac. A tool is looked for where its environment variable says, in `PATH`, and where `tools/ptxas` puts
//! it. Where there is none, PTX does: a GPU's driver assembles it at load.

use crate::nvptx;
use std::cmp::Reverse;
use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf, absolute};
use std::process::Command;

/// A program of NVIDIA's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// The assembler.
    Ptxas,
    /// The disassembler.
    Nvdisasm,
}

/// A tool that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Its file.
    pub file: PathBuf,
    /// Its version, such as `13.5.37`.
    pub version: String,
}

/// Machine code of a module.
#[derive(Clone, Debug)]
pub struct Cubin {
    /// An ELF file for one GPU.
    pub bytes: Vec<u8>,
    /// What `ptxas` says of it.
    pub report: Report,
}

/// What `ptxas` says of a module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// A row a kernel, in the order of its assembly.
    pub kernels: Vec<KernelReport>,
    /// Messages C75xx: what was asked for and is not done, such as matrix products that run while the warp goes on.
    pub messages: Vec<String>,
}

/// What a kernel takes of a GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelReport {
    /// Its name in PTX.
    pub kernel: String,
    /// Registers of a thread. A kernel that sets their number as it runs begins with these.
    pub registers: u32,
    /// Barriers of a CTA.
    pub barriers: u32,
    /// Local memory of a thread, spilled registers among it.
    pub stack_bytes: u32,
    /// Bytes that spilling stores.
    pub spill_store_bytes: u32,
    /// Bytes that spilling loads.
    pub spill_load_bytes: u32,
}

/// Why there is no machine code.
#[derive(Debug, thiserror::Error)]
pub enum PtxasError {
    /// The tool is not there.
    #[error("no {}: not named by {}, not in PATH; get it with `{CURE}`", .0.name(), .0.variable())]
    Missing(Tool),
    /// It does not start, or its files cannot be written or read.
    #[error("{}: cannot be run", file.display())]
    Run {
        /// The program.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It does not accept our own text.
    #[error("{} refused generated code: it is older than CUDA 12, or this is a fault of llamac (please report it): {said}", file.display())]
    Refused {
        /// The program.
        file: PathBuf,
        /// What it wrote.
        said: String,
    },
    /// It wrote something else than is known of it.
    #[error("{}: found `{said}`, expected {expected}: llamac was tried with 12.9 and 13.5", file.display())]
    Said {
        /// The program.
        file: PathBuf,
        /// What it wrote.
        said: String,
        /// What was to stand there.
        expected: String,
    },
}

/// The command that gets both tools from PyPI.
pub const CURE: &str = "python3 -m pip install --no-deps --target ~/.local/cuda nvidia-cuda-nvcc nvidia-cuda-nvdisasm && \
                        export PATH=\"$PATH:$HOME/.local/cuda/nvidia/cu13/bin\"";

impl Tool {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Tool::Ptxas => "ptxas",
            Tool::Nvdisasm => "nvdisasm",
        }
    }

    /// The environment variable that names its file.
    pub fn variable(self) -> &'static str {
        match self {
            Tool::Ptxas => "LLAMAC_PTXAS",
            Tool::Nvdisasm => "LLAMAC_NVDISASM",
        }
    }

    /// The program to use.
    ///
    /// # Errors
    ///
    /// [`PtxasError::Missing`]; or the program that was found is none.
    pub fn find(self) -> Result<Program, PtxasError> {
        if let Some(file) = env::var_os(self.variable()) {
            return Program::at(Path::new(&file));
        }
        let folders = env::var_os("PATH").unwrap_or_default();
        let in_path = env::split_paths(&folders).map(|folder| folder.join(self.name())).find(|f| f.is_file());
        match in_path {
            Some(file) => Program::at(&file),
            None => self.fetched().into_iter().next().ok_or(PtxasError::Missing(self)),
        }
    }

    /// What `tools/ptxas` fetched, the newest first.
    pub fn fetched(self) -> Vec<Program> {
        let home = || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cache/llamac-test-data");
        let folder = env::var_os("LLAMAC_TEST_DATA").map_or_else(home, PathBuf::from).join("cuda");
        let folders = fs::read_dir(folder).into_iter().flatten().flatten();
        let files = folders.map(|folder| folder.path().join(self.name())).filter(|file| file.is_file());
        let mut programs: Vec<Program> = files.filter_map(|file| Program::at(&file).ok()).collect();
        programs.sort_by_key(|program| Reverse(program.release()));
        programs
    }
}

impl Program {
    /// The program in this file.
    fn at(file: &Path) -> Result<Program, PtxasError> {
        let failed = |source| PtxasError::Run { file: file.to_path_buf(), source };
        let output = Command::new(file).arg("--version").output().map_err(failed)?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        // `Cuda compilation tools, release 13.5, V13.5.37`
        let line = said.lines().find(|line| line.contains(", release "));
        let Some((_, version)) = line.and_then(|line| line.rsplit_once('V')) else {
            let expected = "a line with `, release `".to_string();
            return Err(PtxasError::Said { file: file.to_path_buf(), said, expected });
        };
        // It will run in other folders.
        Ok(Program { file: absolute(file).map_err(failed)?, version: version.trim().to_string() })
    }

    /// The numbers of its version.
    pub fn release(&self) -> Vec<u32> {
        self.version.split('.').map_while(|part| part.parse().ok()).collect()
    }

    /// What it writes on stdout and on stderr, run in a folder that has its input.
    fn run(&self, folder: &Path, args: &[&str]) -> Result<(String, String), PtxasError> {
        let run = Command::new(&self.file).args(args).current_dir(folder).output();
        let output = run.map_err(|source| PtxasError::Run { file: self.file.clone(), source })?;
        let [out, err] = [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned());
        match output.status.success() {
            true => Ok((out, err)),
            false => Err(PtxasError::Refused { file: self.file.clone(), said: err + &out }),
        }
    }
}

/// Assembles PTX for a GPU such as `sm_80`. The same PTX gives the same bytes.
///
/// # Errors
///
/// When `ptxas` refuses the text, or its report cannot be read.
pub fn assemble(ptxas: &Program, ptx: &str, sm: &str) -> Result<Cubin, PtxasError> {
    let failed = |source| PtxasError::Run { file: ptxas.file.clone(), source };
    let folder = tempfile::tempdir().map_err(failed)?;
    // The options stand in the cubin, so no path may be among them.
    let (input, output) = ("kernels.ptx", "kernels.cubin");
    fs::write(folder.path().join(input), ptx).map_err(failed)?;
    let sm = format!("-arch={sm}");
    let args = [&sm, "-v", "--warn-on-spills", "--warn-on-local-memory-usage", input, "-o", output];
    let (_, log) = ptxas.run(folder.path(), &args)?;
    let entries = ptx.matches(".visible .entry ").count();
    let report = Report::parse(&log).filter(|report| report.kernels.len() == entries).ok_or_else(|| {
        let expected = format!("registers and stack of {entries} kernels");
        PtxasError::Said { file: ptxas.file.clone(), said: log.clone(), expected }
    })?;
    let bytes = fs::read(folder.path().join(output)).map_err(failed)?;
    Ok(Cubin { bytes, report })
}

/// The text of machine code (SASS).
///
/// # Errors
///
/// When `nvdisasm` refuses it.
pub fn disassemble(nvdisasm: &Program, cubin: &[u8]) -> Result<String, PtxasError> {
    let failed = |source| PtxasError::Run { file: nvdisasm.file.clone(), source };
    let folder = tempfile::tempdir().map_err(failed)?;
    fs::write(folder.path().join("kernels.cubin"), cubin).map_err(failed)?;
    Ok(nvdisasm.run(folder.path(), &["-c", "kernels.cubin"])?.0)
}

impl Report {
    /// Reads what `ptxas -v` writes; `None` if that is not what is known of it.
    fn parse(log: &str) -> Option<Report> {
        let mut report = Report::default();
        let mut frames = 0;
        for line in log.lines() {
            if let Some(at) = line.find("(C75") {
                report.messages.push(line[at..].to_string());
            } else if let Some((_, entry)) = line.split_once("Compiling entry function '") {
                let kernel = entry.split('\'').next()?.to_string();
                report.kernels.push(KernelReport { kernel, ..KernelReport::default() });
            } else if line.contains(" bytes stack frame, ") {
                let kernel = report.kernels.last_mut()?;
                // A function that was not inlined has a line of its own.
                kernel.stack_bytes += count(line, " bytes stack frame")?;
                kernel.spill_store_bytes += count(line, " bytes spill stores")?;
                kernel.spill_load_bytes += count(line, " bytes spill loads")?;
                frames += 1;
            } else if line.contains(": Used ") {
                let kernel = report.kernels.last_mut()?;
                kernel.registers = count(line, " registers")?;
                kernel.barriers = count(line, " barriers").unwrap_or(0);
            }
        }
        let whole = report.kernels.iter().all(|kernel| kernel.registers > 0);
        (whole && frames >= report.kernels.len()).then_some(report)
    }

    /// What the assembler could not do well: spilled registers, local memory, messages C75xx. A line each.
    pub fn losses(&self) -> Vec<String> {
        let wasteful = |kernel: &&KernelReport| {
            kernel.stack_bytes + kernel.spill_store_bytes + kernel.spill_load_bytes > 0
        };
        let line = |kernel: &KernelReport| {
            let KernelReport { kernel, stack_bytes, spill_store_bytes, spill_load_bytes, .. } = kernel;
            format!(
                "@{}: a stack of {stack_bytes} bytes, spills of {spill_store_bytes} bytes stored and {spill_load_bytes} loaded",
                nvptx::kernel(kernel)
            )
        };
        self.kernels.iter().filter(wasteful).map(line).chain(self.messages.iter().cloned()).collect()
    }
}

/// The number in front of a word.
fn count(line: &str, word: &str) -> Option<u32> {
    line.split_once(word)?.0.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of ptxas 13.5: a kernel that keeps an array, one that has too few registers, and one that asks in vain for more.
    const LOG: &str = "\
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry.
ptxas warning : Local memory used for function 'k_o$1', size of stack frame: 624 bytes
ptxas warning : Registers are spilled to local memory in function 'k_o$1', 1052 bytes spill stores, 1048 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k_o$1' for 'sm_80'
ptxas info    : Function properties for k_o$1
    624 bytes stack frame, 1052 bytes spill stores, 1048 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 624 bytes cumulative stack size, 408 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 46.699 ms
ptxas info    : Compiling entry function 'k_x' for 'sm_80'
ptxas info    : Function properties for k_x
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers, 384 bytes cmem[0]
ptxas info    : Compile time = 2.321 ms
";

    #[test]
    fn reports_are_read() {
        let report = Report::parse(LOG).unwrap();
        let [o, x] = &report.kernels[..] else { panic!("{report:?}") };
        assert_eq!((&*o.kernel, o.registers, o.barriers), ("k_o$1", 32, 1));
        assert_eq!((&*x.kernel, x.registers, x.barriers), ("k_x", 24, 0));
        let losses = report.losses();
        assert_eq!(losses.len(), 2, "{losses:?}");
        assert_eq!(losses[0], "@o.1: a stack of 624 bytes, spills of 1052 bytes stored and 1048 loaded");
        assert!(losses[1].starts_with("(C7508) Potential Performance Loss"), "{losses:?}");
    }

    #[test]
    fn other_reports_are_not_taken_for_good_ones() {
        for part in ["    624 bytes stack frame, 1052", "Used 24 registers", "'k_x' for"] {
            let other = LOG.lines().filter(|line| !line.contains(part)).collect::<Vec<_>>().join("\n");
            let report = Report::parse(&other);
            assert!(report.is_none_or(|report| report.kernels.len() < 2), "{part}");
        }
        assert!(Report::parse(&LOG.replace("1052 bytes spill stores", "many spills")).is_none());
    }

    #[test]
    fn versions_are_ordered_by_number() {
        let program = |version: &str| Program { file: PathBuf::new(), version: version.to_string() };
        assert!(program("12.10.3").release() > program("12.9.86").release());
    }
}
