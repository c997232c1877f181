//! An object to a loadable file: no library is named in it, nothing is left to resolve.

use crate::cpu::CodegenError;
use std::process::Command;

/// Where the linker may be, best first.
const LINKERS: [&str; 4] = ["ld.lld-22", "/usr/lib/llvm-22/bin/ld.lld", "ld.lld", "ld.lld-21"];

/// The linker that is there, with its version line.
pub fn linker() -> Option<(String, String)> {
    LINKERS.iter().find_map(|&name| {
        let output = Command::new(name).arg("--version").output().ok()?;
        let version = String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_string();
        output.status.success().then(|| (name.to_string(), version))
    })
}

/// Links one object to a shared file.
///
/// # Errors
///
/// When there is no linker, or it fails.
pub fn link(object: &[u8]) -> Result<Vec<u8>, CodegenError> {
    let (linker, _) = linker().ok_or(CodegenError::NoLinker)?;
    let folder = tempfile::tempdir()?;
    let (input, output) = (folder.path().join("kernels.o"), folder.path().join("kernels.so"));
    std::fs::write(&input, object)?;
    let run = Command::new(&linker)
        .args(["-shared", "--no-undefined", "--strip-all", "--hash-style=gnu", "--build-id=none", "-o"])
        .args([&output, &input])
        .output()?;
    if !run.status.success() {
        let message = String::from_utf8_lossy(&run.stderr).into_owned();
        return Err(CodegenError::Link { linker, message });
    }
    Ok(std::fs::read(&output)?)
}
