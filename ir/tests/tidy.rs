//! What no compiler checks, over the whole workspace. Each message says what to do.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Crates of ours with the crates of ours that each may depend on. A new line here is a change of architecture: change
/// the page that describes it in the same commit.
const MAY_DEPEND_ON: [(&str, &[&str]); 5] = [
    ("ir", &[]),
    ("models", &["ir"]),
    ("codegen", &["ir"]),
    ("runtime", &["ir"]),
    (".", &["ir", "models", "codegen", "runtime"]),
];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every Rust file of the workspace, by its path from the root.
fn rust_files() -> Vec<(String, String)> {
    let mut files = Vec::new();
    for (folder, _) in MAY_DEPEND_ON {
        for part in ["src", "tests", "benches", "examples"] {
            collect(&workspace().join(folder).join(part), &mut files);
        }
    }
    files.sort();
    assert!(files.len() > 10, "the workspace's sources were not found");
    files
}

fn collect(folder: &Path, files: &mut Vec<(String, String)>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for path in entries.map(|entry| entry.expect("a readable folder").path()) {
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(workspace()).expect("it was found there");
            let name = name.to_string_lossy().replace('\\', "/").trim_start_matches("./").to_string();
            files.push((name, fs::read_to_string(&path).expect("a readable file")));
        }
    }
}

/// Fails with all that was found.
fn assert_none(found: Vec<String>, what_to_do: &str) {
    assert!(found.is_empty(), "{what_to_do}\n  {}", found.join("\n  "));
}

#[test]
fn files_say_what_they_are() {
    let silent = |(name, text): (String, String)| (!text.starts_with("//!")).then_some(name);
    let found = rust_files().into_iter().filter_map(silent).collect();
    assert_none(found, "begin each file with a `//!` line that says what it holds:");
}

#[test]
fn files_have_a_subject() {
    let vague = |name: &String| {
        let stem = name.rsplit('/').next().unwrap_or(name).trim_end_matches(".rs");
        let folders =
            name.split('/').any(|part| ["utils", "util", "common", "misc", "helpers"].contains(&part));
        folders || ["mod", "utils", "util", "common", "misc", "helpers"].contains(&stem)
    };
    let found = rust_files().into_iter().map(|(name, _)| name).filter(vague).collect();
    assert_none(found, "`foo.rs` beside `foo/` instead of `foo/mod.rs`; name a file after what it is about:");
}

#[test]
fn nothing_is_left_open() {
    // Spelt apart, so that this file does not find itself.
    let marks = ["#[ig", "todo", "unimplemented", "dbg"].map(|word| match word {
        "#[ig" => "#[ignore".to_string(),
        word => format!("{word}!("),
    });
    let mut found = Vec::new();
    for (name, text) in rust_files().into_iter().filter(|(name, _)| name != "ir/tests/tidy.rs") {
        for (index, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or(line);
            if marks.iter().any(|mark| code.contains(mark)) {
                found.push(format!("{name}:{}: {}", index + 1, line.trim()));
            }
        }
    }
    assert_none(found, "finish it, or take it out; a test that cannot run here prints that it was skipped:");
}

#[test]
fn passes_have_texts() {
    let has_texts = |name: &str| {
        let texts = fs::read_dir(workspace().join("tests/ir").join(name));
        texts.is_ok_and(|mut texts| {
            texts.any(|text| text.is_ok_and(|text| text.path().extension().is_some_and(|e| e == "ir")))
        })
    };
    let pass = |(name, _): (String, String)| {
        let pass = name.strip_prefix("ir/src/passes/")?.strip_suffix(".rs")?.to_string();
        (!pass.contains('/') && !has_texts(&pass)).then_some(pass)
    };
    let found = rust_files().into_iter().filter_map(pass).collect();
    assert_none(
        found,
        "write a text test or two in `tests/ir/<pass>/`, which is what the pass does on one page:",
    );
}

#[test]
fn crates_depend_as_designed() {
    let ours: BTreeSet<&str> = ["ir", "models", "codegen", "runtime", "llamac"].into();
    let mut found = Vec::new();
    for (folder, may) in MAY_DEPEND_ON {
        let manifest = workspace().join(folder).join("Cargo.toml");
        let text = fs::read_to_string(manifest).expect("each crate has a manifest");
        let refused = dependencies(&text).into_iter().filter(|name| ours.contains(&**name));
        let refused = refused.filter(|name| !may.contains(&&**name));
        found.extend(refused.map(|name| format!("{folder}/Cargo.toml: {name}")));
    }
    assert_none(found, "take the dependency out, or change the design and `MAY_DEPEND_ON` with it:");
}

/// Names in every `[dependencies]`, also those of tests, builds and targets.
fn dependencies(manifest: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut inside = false;
    for line in manifest.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[') {
            let section = section.trim_end_matches(']');
            inside = section.ends_with("dependencies") && !section.starts_with("workspace");
            // `[dependencies.name]`
            names.extend(section.split_once("dependencies.").map(|(_, name)| name.to_string()));
        } else if inside && !line.starts_with('#') {
            names.extend(line.split(['=', '.', ' ']).next().filter(|n| !n.is_empty()).map(str::to_string));
        }
    }
    names
}

#[test]
fn dependencies_are_read() {
    let manifest = "[workspace.dependencies]\na = 1\n[dependencies]\nir.workspace = true # why\nmodels = \"1\"\n\
        [dev-dependencies.codegen]\npath = \"x\"\n[lints]\nworkspace = true";
    assert_eq!(dependencies(manifest), ["ir", "models", "codegen"]);
}
