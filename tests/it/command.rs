//! The command as a user has it: the program, run in a folder of its own with a cache of its own.

use serde_json::Value;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// A folder to run the command in; it goes with all that was written there.
pub struct Place {
    folder: TempDir,
}

impl Place {
    /// An empty one.
    pub fn new() -> Place {
        Place { folder: tempfile::tempdir().expect("a folder for temporary files") }
    }

    /// A file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file, and the folders that it is in.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("it is in the folder")).expect("a folder");
        fs::write(path, contents).expect("a file");
    }

    /// Reads a file.
    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Flips a bit of an element of a buffer of weights, by its name in the plan, in an artifact of a dtype of 2 or 4 bytes.
    pub fn flip(&self, artifact: &str, buffer: &str, byte: u64, bit: u32) -> Result<(), Box<dyn Error>> {
        let said = self.ok(&format!("inspect {artifact} --json")).json();
        let sections = said["sections"].as_array().ok_or("no sections")?;
        let weights = sections.iter().find(|s| s["name"] == "weights").ok_or("no weights")?;
        let plan = self.ok(&format!("emit {artifact} --stage plan")).out;
        let start = format!("weight %{buffer} ");
        let line = plan.lines().find(|line| line.contains(&start)).ok_or("no such weight")?;
        let offset = line.split(" bytes at ").nth(1).and_then(|rest| rest.split(' ').next());
        let offset: u64 = offset.ok_or("no offset")?.parse()?;
        let at = weights["offset"].as_u64().ok_or("no offset")? + offset + byte + u64::from(bit / 8);
        let mut bytes = self.read(artifact);
        bytes[at as usize] ^= 1 << (bit % 8);
        self.write(artifact, bytes);
        Ok(())
    }

    /// Every file in it and in its folders, sorted.
    pub fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        list(self.folder.path(), &mut files);
        let from = self.folder.path().to_str().expect("a plain name").len() + 1;
        let mut names: Vec<String> =
            files.iter().map(|file| file.display().to_string()[from..].to_string()).collect();
        names.sort();
        names
    }

    /// The command with these arguments, parted by spaces, ready to run here.
    pub fn command(&self, arguments: &str) -> Command {
        self.program(
            Path::new(env!("CARGO_BIN_EXE_llamac")),
            &arguments.split_whitespace().collect::<Vec<_>>(),
        )
    }

    /// Another build of the command.
    pub fn program(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        command.env("XDG_CACHE_HOME", self.path("cache")).env_remove("NO_COLOR");
        command
    }

    /// Runs the command.
    pub fn run(&self, arguments: &str) -> Said {
        Said::of(&mut self.command(arguments))
    }

    /// Runs the command, which must succeed.
    pub fn ok(&self, arguments: &str) -> Said {
        self.run(arguments).ok()
    }
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() { list(&path, files) } else { files.push(path) }
    }
}

/// What a run of the command said.
#[derive(Debug)]
pub struct Said {
    /// Program and arguments.
    pub command: String,
    /// The exit code; none after a signal.
    pub exit: Option<i32>,
    /// Stdout.
    pub out: String,
    /// Stderr.
    pub err: String,
}

impl Said {
    /// Runs it to its end.
    pub fn of(command: &mut Command) -> Said {
        let output = command.output().expect("the command starts");
        Said::from(format!("{command:?}"), output)
    }

    /// What a finished run left.
    pub fn from(command: String, output: Output) -> Said {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(!err.contains("panicked"), "{command}: {err}");
        Said { command, exit: output.status.code(), out, err }
    }

    /// It must have succeeded.
    pub fn ok(self) -> Said {
        assert_eq!(self.exit, Some(0), "{}: {}", self.command, self.err);
        self
    }

    /// Stdout as JSON, with nothing else there.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out)
            .unwrap_or_else(|error| panic!("{}: {error}: {}", self.command, self.out))
    }
}
