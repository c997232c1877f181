//! The README says what the program does: its outputs are the program's, its verbs, options and files exist.

use crate::Checked;
use libtest_mimic::Trial;
use std::fs;
use std::path::Path;
use std::process::Command;

pub fn trials() -> Vec<Trial> {
    let test = |name: &str, check: fn() -> Checked<()>| Trial::test(name.to_string(), move || Ok(check()?));
    vec![
        test("readme shows what opt --list prints", passes_are_listed),
        test("readme names verbs and options that there are", commands_exist),
        test("readme names files that there are", files_exist),
    ]
}

fn readme() -> Checked<String> {
    Ok(fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md"))?)
}

fn llamac(args: &[&str]) -> Checked<(bool, String)> {
    let output = Command::new(env!("CARGO_BIN_EXE_llamac")).args(args).output()?;
    Ok((output.status.success(), String::from_utf8(output.stdout)?))
}

fn passes_are_listed() -> Checked<()> {
    let (_, printed) = llamac(&["opt", "--list"])?;
    match readme()?.contains(&format!("$ llamac opt --list\n{printed}```")) {
        true => Ok(()),
        false => Err(format!("put this into the README:\n{printed}").into()),
    }
}

/// Every `llamac VERB ... --option` of the README: the verb has help, and the help has the option.
fn commands_exist() -> Checked<()> {
    let mut wrong = Vec::new();
    for part in readme()?.split("llamac ").skip(1) {
        let command = part.split(['\n', '`', '#', '|', ';', '(']).next().unwrap_or_default();
        let mut words = command.split_whitespace();
        let verb = words.next().unwrap_or_default();
        if verb.is_empty() || !verb.chars().all(|c| c.is_ascii_lowercase()) || !part.starts_with(verb) {
            continue;
        }
        let (known, help) = llamac(&[verb, "--help"])?;
        if !known {
            continue; // Prose about llamac; a verb that is none is caught by its options.
        }
        let options = words.filter(|w| w.starts_with("--") && w.len() > 2);
        wrong.extend(options.filter(|o| !help.contains(*o)).map(|o| format!("{verb} {o}")));
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(format!("the README has, the program has not: {wrong:?}").into())
    }
}

/// Paths in backquotes that begin with a folder of ours.
fn files_exist() -> Checked<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ours = ["ir/", "models/", "codegen/", "runtime/", "src/", "tests/", "builtin/", "tools/", "fuzz/"];
    let text = readme()?;
    let named =
        text.split('`').skip(1).step_by(2).filter(|word| ours.iter().any(|folder| word.starts_with(folder)));
    let missing: Vec<&str> = named.filter(|path| !root.join(path).exists()).collect();
    if missing.is_empty() { Ok(()) } else { Err(format!("the README names {missing:?}").into()) }
}
