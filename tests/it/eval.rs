//! The verb `eval`, as a user calls it: perplexities by the protocol of `../shared/reference/perplexity.json`, a model beside
//! itself and another, multiple choice, and what is refused.

use crate::Checked;
use crate::reference::{SMOLLM2, test_data};
use crate::skipped::skip;
use ir::DType;
use libtest_mimic::Trial;
use llamac::judge;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A run of the reference: its name, window, and how many windows are tried.
struct Case {
    name: &'static str,
    window: usize,
    windows: usize,
}

const STORIES: Case = Case { name: "stories260K", window: 256, windows: 8 };
const SMOL: Case = Case { name: "smollm2-135m-q4_1", window: 512, windows: 1 };

/// One test a model and dtype, and one for each way to call the verb.
pub fn trials() -> Vec<Trial> {
    let stories = shared("models/stories260K");
    let mut trials = Vec::new();
    for dtype in [DType::F32, DType::BF16] {
        trials.push(trial(format!("eval stories260K {dtype}"), vec![stories.clone()], move |files| {
            tokens(&STORIES, &files[0], dtype, "cpu")
        }));
        trials.push(trial(
            format!("eval SmolLM2-135M {dtype}"),
            vec![test_data().join(SMOLLM2)],
            move |files| tokens(&SMOL, &files[0], dtype, "cpu"),
        ));
    }
    trials.push(trial("eval stories260K interpreter".into(), vec![stories.clone()], |files| {
        tokens(&Case { windows: 1, ..STORIES }, &files[0], DType::F32, "interpreter")
    }));
    trials.push(trial("eval --text".into(), vec![stories.clone()], |files| text(&files[0])));
    trials.push(trial("eval --kld-base".into(), vec![stories], |files| beside(&files[0])));
    trials.push(trial("eval --choices".into(), Vec::new(), |_| choices()));
    trials.push(trial("eval refuses".into(), Vec::new(), |_| refused()));
    trials
}

fn shared(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(path)
}

/// A test that is skipped where a file is missing.
fn trial(
    name: String,
    files: Vec<PathBuf>,
    test: impl Fn(&[PathBuf]) -> Checked<()> + Send + 'static,
) -> Trial {
    Trial::test(name.clone(), move || {
        let needed = if files.is_empty() { Vec::new() } else { vec![shared("reference/perplexity.json")] };
        match files.iter().chain(&needed).find(|file| !file.exists()) {
            Some(file) => skip(&name, &format!("there is no {}", file.display())),
            None => test(&files)?,
        }
        Ok(())
    })
}

/// `llamac eval ARGUMENTS --json`, with a cache folder of its own.
fn call(arguments: &[&str]) -> Checked<Output> {
    let cache = tempfile::tempdir()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_llamac"));
    command
        .arg("eval")
        .args(arguments)
        .args(["--json", "--threads", "2"])
        .env("XDG_CACHE_HOME", cache.path());
    Ok(command.output()?)
}

fn eval(arguments: &[&str]) -> Checked<Value> {
    let output = call(arguments)?;
    match output.status.success() {
        true => Ok(serde_json::from_slice(&output.stdout)?),
        false => Err(format!("{arguments:?}: {}", String::from_utf8_lossy(&output.stderr)).into()),
    }
}

fn number(value: &Value) -> Checked<f64> {
    value.as_f64().ok_or_else(|| format!("{value} is no number").into())
}

/// Sum of `-ln p` of each window of the reference's run in f64.
fn reference(name: &str) -> Checked<Vec<f64>> {
    let all: Value = serde_json::from_slice(&fs::read(shared("reference/perplexity.json"))?)?;
    let runs = all["runs"].as_array().ok_or("no runs")?;
    let run =
        runs.iter().find(|run| run["model"] == name && run["arithmetic"] == "f64").ok_or("no such run")?;
    run["nll"].as_array().ok_or("no nll")?.iter().map(number).collect()
}

/// By how much the perplexity is off over the first windows, as a share of the bound.
fn share(found: &Value, case: &Case, dtype: DType) -> Checked<f64> {
    let windows = found["windows"].as_array().ok_or("no windows")?;
    if windows.len() != case.windows {
        return Err(format!("{} windows, expected {}", windows.len(), case.windows).into());
    }
    let nll = windows.iter().map(|w| number(&w["nll"])).sum::<Checked<f64>>()?;
    let tokens = number(&found["tokens"])?;
    if ((nll / tokens).exp() / number(&found["perplexity"])? - 1.0).abs() > 4.0 * f64::EPSILON {
        return Err("the windows do not add up to the perplexity".into());
    }
    let expected: f64 = reference(case.name)?[..case.windows].iter().sum();
    let expected = expected / (case.windows * (case.window - 1)) as f64;
    Ok((number(&found["nll"])? - expected).exp_m1().abs() / judge::perplexity_bound(dtype))
}

/// From the reference's token ids: the model alone.
fn tokens(case: &Case, model: &Path, dtype: DType, device: &str) -> Checked<()> {
    let found = eval(&[
        &model.display().to_string(),
        "--tokens",
        &shared("reference/perplexity-tokens.safetensors").display().to_string(),
        "--tensor",
        &format!("{}.tokens", case.name),
        "--window",
        &case.window.to_string(),
        "--windows",
        &case.windows.to_string(),
        "--dtype",
        dtype.name(),
        "--device",
        device,
    ])?;
    let share = share(&found, case, dtype)?;
    println!("{} {dtype} on {device}: {share:.3} of the bound", case.name);
    if share <= 1.0 { Ok(()) } else { Err(format!("{share} of the bound").into()) }
}

/// From the text: the tokenizer too. With BOS in front of the windows it is another figure, and judged so.
fn text(model: &Path) -> Checked<()> {
    let (model, text) =
        (model.display().to_string(), shared("text/tinystories-sample.txt").display().to_string());
    let mut arguments = vec![&*model, "--text", &text, "--window", "256", "--windows", "8", "--no-bos"];
    let right = share(&eval(&arguments)?, &STORIES, DType::F32)?;
    arguments.pop();
    let wrong = share(&eval(&arguments)?, &STORIES, DType::F32)?;
    match right <= 1.0 && wrong > 1.0 {
        true => Ok(()),
        false => Err(format!("{right} of the bound; with BOS {wrong}").into()),
    }
}

/// A model does not differ from itself; in bf16 it does, a little, and the interval is around the mean.
fn beside(model: &Path) -> Checked<()> {
    let (model, text) =
        (model.display().to_string(), shared("text/tinystories-sample.txt").display().to_string());
    let arguments = [&*model, "--text", &text, "--window", "64", "--windows", "4", "--kld-base", &model];
    let same = eval(&arguments)?;
    let kld = &same["kld"];
    let found = [&kld["divergence"], &kld["same_top"], &kld["perplexity_ratio"]].map(|e| e["mean"].as_f64());
    if found != [Some(0.0), Some(1.0), Some(1.0)] {
        return Err(format!("beside itself: {kld}").into());
    }
    let other = eval(&[&arguments[..], &["--dtype", "bf16"]].concat())?;
    let divergence = &other["kld"]["divergence"];
    let [low, mean, high] = [&divergence["interval"][0], &divergence["mean"], &divergence["interval"][1]]
        .map(number)
        .map(|n| n.unwrap_or(f64::NAN));
    if !(0.0 < mean && low < mean && mean < high) {
        return Err(format!("bf16 beside f32: {other}").into());
    }
    refuses(&[&model, "--text", &text, "--kld-base", "builtin"], 2, "tokens in its vocabulary")
}

/// The model inside the program knows how its stories begin, wherever the right choice stands.
fn choices() -> Checked<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("questions.jsonl");
    let questions = r#"{"context": "Once upon a time there", "choices": [" was a", " fox the time"], "answer": 0}
{"context": "Once upon a time there", "choices": [" fox the time", " was a"], "answer": 1}
{"context": "Once upon", "choices": [" a time", " time a", " a"], "answer": 1}
"#;
    fs::write(&file, questions)?;
    for by in ["characters", "tokens", "answer", "none"] {
        let found = eval(&["builtin", "--choices", &file.display().to_string(), "--normalise", by])?;
        let picked: Vec<_> =
            found["answers"].as_array().ok_or("no answers")?.iter().map(|a| &a["picked"]).collect();
        if picked[0] != 0
            || picked[1] != 1
            || picked[2] == 1
            || found["right"] != 2
            || found["questions"] != 3
        {
            return Err(format!("{by}: {found}").into());
        }
    }
    Ok(())
}

/// Exit codes, and that the message names what is wrong.
fn refused() -> Checked<()> {
    let folder = tempfile::tempdir()?;
    let file = |name: &str, text: &str| {
        let file = folder.path().join(name);
        fs::write(&file, text).map(|()| file.display().to_string())
    };
    let text = file("text.txt", &"Once upon a time. ".repeat(400))?;
    let questions = file("questions.jsonl", "{\"context\": \"a\", \"choices\": [\" b\"], \"answer\": 0}\n")?;
    let artifact = folder.path().join("other.llamac").display().to_string();
    let cases: [(&[&str], i32, &str); 6] = [
        (&["builtin"], 2, "required arguments"),
        (&["builtin", "--text", &text, "--window", "2000", "--ctx", "512"], 5, "compiled for 512"),
        (&["builtin", "--text", &text, "--windows", "999"], 2, "--windows 999"),
        (&["builtin", "--choices", &questions], 3, "questions.jsonl:1"),
        (
            &["builtin", "--text", &text, "--window", "64", "--windows", "1", "--kld-base", &artifact],
            4,
            "other.llamac",
        ),
        (&["builtin", "--tokens", &text], 2, "safetensors"),
    ];
    cases.into_iter().try_for_each(|(arguments, exit, said)| refuses(arguments, exit, said))
}

fn refuses(arguments: &[&str], exit: i32, said: &str) -> Checked<()> {
    let output = call(arguments)?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    match output.status.code() == Some(exit) && error.contains(said) && output.stdout.is_empty() {
        true => Ok(()),
        false => Err(format!("{arguments:?}: {} {error}", output.status).into()),
    }
}
