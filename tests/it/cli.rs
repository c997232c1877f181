//! The command through its binary: fields that scripts rely on, files, streams, the cache, interrupts.
//!
//! Most run the built-in model; those that want another one are skipped where it is not.

use crate::command::{Place, Said};
use crate::skipped::skip;
use libtest_mimic::Trial;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub fn trials() -> Vec<Trial> {
    let tests: [(&str, fn()); 16] = [
        ("help", help),
        ("json fields", json_fields),
        ("logits file", logits_file),
        ("greedy is argmax", greedy),
        ("seed", seed),
        ("ends of a text", ends),
        ("prompts", prompts),
        ("chat", chat),
        ("stream", stream),
        ("cache", cache),
        ("keep", keep),
        ("targets", targets),
        ("same bytes", same_bytes),
        ("interrupt", interrupt),
        ("colour", colour),
        ("a directory and its gguf", stories),
    ];
    let trial = |(name, test): (&str, fn())| {
        Trial::test(format!("cli {name}"), move || {
            test();
            Ok(())
        })
    };
    tests.into_iter().map(trial).collect()
}

const VERBS: [&str; 12] = [
    "inspect",
    "plan",
    "compile",
    "run",
    "logits",
    "tokenize",
    "bench",
    "profile",
    "opt",
    "emit",
    "doctor",
    "completions",
];

/// Every verb explains itself with an example; what shells complete are these verbs.
fn help() {
    let place = Place::new();
    for verb in VERBS {
        let help = place.ok(&format!("{verb} --help")).out;
        assert!(
            help.contains("Example:\n  llamac ") || help.contains(&format!("\n  llamac {verb}")),
            "{verb}: {help}"
        );
    }
    let all = place.ok("--help").out;
    assert!(
        VERBS.iter().all(|verb| all.contains(&format!("\n  {verb} "))) && all.contains("Exit codes: 0 done"),
        "{all}"
    );
    let completions = place.ok("completions bash").out;
    assert!(
        VERBS.iter().all(|verb| completions.contains(&format!("llamac__subcmd__{verb})"))),
        "{completions}"
    );
    place.ok("doctor");
}

/// Fields by JSON pointer, and what they are.
type Fields = [(&'static str, Is)];

/// What a field is.
type Is = fn(&Value) -> bool;

fn json_fields() {
    let place = Place::new();
    place.ok("compile builtin -o a.llamac --ctx 64");
    let (number, text, list): (Is, Is, Is) = (Value::is_number, Value::is_string, Value::is_array);
    #[rustfmt::skip] // a table
    let cases: [(&str, &Fields); 8] = [
        ("run a.llamac --tokens 1,2,3 --temp 0 -n 4", &[("/prompt_tokens", list), ("/tokens", list), ("/text", text), ("/stop_reason", text),
            ("/prefill_tokens_per_s", number), ("/decode_tokens_per_s", number), ("/share_of_bandwidth", number), ("/seed", number)]),
        ("logits a.llamac --tokens 1,2,3", &[("/tokens", list), ("/vocab", number), ("/positions/2/top/0/token", number), ("/positions/2/top/0/logit", number)]),
        ("tokenize a.llamac fox", &[("/ids/0", number), ("/pieces/0", text)]),
        ("tokenize a.llamac --decode 5,6", &[("/text", text)]),
        ("plan builtin --bandwidth 10GB --flops 100GB", &[("/memory/weights", number), ("/memory/kv_cache", number), ("/memory/workspace", number), ("/memory/total", number),
            ("/launches", number), ("/flops_per_token", number), ("/bytes_per_token", number), ("/predicted/prefill_tokens_per_s", number), ("/predicted/decode_tokens_per_s", number),
            ("/kernels/0/name", text), ("/kernels/0/family", text), ("/kernels/0/schedule", text), ("/kernels/0/bytes", number), ("/kernels/0/flops", number), ("/kernels/0/source", text)]),
        ("bench a.llamac -p 8 -n 4 -r 1 --threads 1", &[("/runs/0/threads", number), ("/runs/0/prefill/tokens_per_s", number), ("/runs/0/prefill/share_of_peak", number),
            ("/runs/0/decode/tokens_per_s", number), ("/runs/0/decode/share_of_bandwidth", number), ("/runs/0/ceilings/read_bytes_per_s", number),
            ("/runs/0/ceilings/dot_flops", number), ("/runs/0/predicted/decode_tokens_per_s", number)]),
        ("compile builtin -o b.llamac --ctx 64", &[("/artifact", text), ("/bytes", number), ("/seconds/fuse", number), ("/seconds/codegen", number), ("/seconds/weights", number),
            ("/seconds/total", number), ("/peak_rss_bytes", number)]),
        ("inspect a.llamac", &[("/config", Value::is_object), ("/parameters", number), ("/targets/0/name", text), ("/targets/0/entries/0/name", text), ("/targets/0/kernels/0/source", text),
            ("/digest", text), ("/sections/0/digest", text), ("/taps", Value::is_boolean)]),
    ];
    for (arguments, fields) in cases {
        let said = place.run(&format!("{arguments} --json"));
        // On a busy machine a ceiling may come out too low: `bench` gives its figures, and then says that.
        let busy = said.exit == Some(1) && said.err.contains("of its ceiling");
        assert!(busy || said.exit == Some(0) && said.err.is_empty(), "{said:?}");
        let found = said.json();
        for (pointer, is) in fields {
            let field =
                found.pointer(pointer).unwrap_or_else(|| panic!("{arguments}: no {pointer} in {found}"));
            assert!(is(field), "{arguments}: {pointer} is {field}");
        }
    }
    let of = |arguments: &str| place.ok(&format!("{arguments} --json")).json();
    // A prompt of one token is a decode step: the table has each launch once.
    let one = of("plan builtin --bandwidth 10GB --flops 100GB --ctx 1");
    let kernels = one["kernels"].as_array().expect("a list");
    let launches: u64 = kernels.iter().filter_map(|kernel| kernel["launches"].as_u64()).sum();
    assert_eq!(Some(launches), one["launches"].as_u64());
    let memory = of("plan builtin")["memory"].clone();
    let part = |name: &str| memory[name].as_u64().expect("bytes");
    assert_eq!(part("weights") + part("kv_cache") + part("workspace"), part("total"));
    assert_eq!(of("compile builtin -o b.llamac")["bytes"], place.read("b.llamac").len());
    let decoded = of("tokenize a.llamac --decode 5,6")["text"].as_str().map(|text| format!("{text}\n"));
    assert_eq!(decoded, Some(place.ok("tokenize a.llamac --decode 5,6").out));
}

/// Tokens and logits, row by row, of the file that `logits` writes.
fn logits(place: &Place, arguments: &str) -> (Vec<i32>, Vec<Vec<f32>>) {
    place.ok(&format!("logits {arguments} -o l.safetensors"));
    let file = place.read("l.safetensors");
    let tensors = SafeTensors::deserialize(&file).expect("a safetensors file");
    let mut names = tensors.names();
    names.sort_unstable();
    assert_eq!(names, ["logits", "tokens"]);
    let tensor = |name: &str| tensors.tensor(name).expect("one of the two");
    let (tokens, logits) = (tensor("tokens"), tensor("logits"));
    assert_eq!((tokens.dtype(), logits.dtype()), (Dtype::I32, Dtype::F32));
    assert_eq!(logits.shape()[..1], *tokens.shape());
    let vocab = logits.shape()[1];
    let floats: Vec<f32> = logits.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let tokens = tokens.data().as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
    (tokens, floats.chunks_exact(vocab).map(<[f32]>::to_vec).collect())
}

/// Steps of any length, and any number of threads, give the same bits.
fn logits_file() {
    let place = Place::new();
    let tokens: Vec<i32> = (0..90).map(|i| i * 13 % 1280).collect();
    let list = tokens.iter().map(i32::to_string).collect::<Vec<_>>().join(",");
    for dtype in ["f32", "bf16"] {
        place.ok(&format!("compile builtin -o a.llamac --ctx 96 --dtype {dtype}"));
        let whole = logits(&place, &format!("a.llamac --tokens {list} --threads 1"));
        assert_eq!((&whole.0, whole.1.len(), whole.1[0].len()), (&tokens, 90, 1280));
        let bits = |rows: &[Vec<f32>]| rows.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
        for more in ["--chunk 1", "--chunk 7", "--threads 2", "--chunk 1 --threads 2"] {
            let other = logits(&place, &format!("a.llamac --tokens {list} {more}"));
            assert!(bits(&other.1) == bits(&whole.1), "{dtype} {more}: other bits");
        }
    }
}

fn ids(value: &Value) -> Vec<i32> {
    value.as_array().expect("ids").iter().map(|id| id.as_i64().expect("an id") as i32).collect()
}

/// `--temp 0` writes the likeliest token each time, the lowest id on ties.
fn greedy() {
    let place = Place::new();
    let run = place.ok("run builtin --tokens 0,5,9 --temp 0 -n 40 --ignore-eos --json").json();
    let (mut tokens, written) = (ids(&run["prompt_tokens"]), ids(&run["tokens"]));
    assert_eq!((tokens.as_slice(), written.len()), (&[0, 5, 9][..], 40));
    tokens.extend(&written);
    let list = tokens.iter().map(i32::to_string).collect::<Vec<_>>().join(",");
    let (_, rows) = logits(&place, &format!("builtin --tokens {list}"));
    for (row, token) in rows[2..].iter().zip(&written) {
        let best = (0..row.len()).rev().max_by(|&a, &b| row[a].total_cmp(&row[b]));
        assert_eq!(best, Some(*token as usize));
    }
}

fn seed() {
    let place = Place::new();
    let run = |more: &str| place.ok(&format!("run builtin -p Once -n 30 {more}")).out;
    assert_eq!(run("--seed 7"), run("--seed 7"));
    assert_eq!(run("--seed 7 --threads 1"), run("--seed 7 --threads 2"));
    assert_ne!(run("--seed 7 --temp 2"), run("--seed 8 --temp 2"));
    // Without one, the seed that was taken is told and gives the same again.
    let first = place.ok("run builtin -p Once -n 30 --json").json();
    let again = place.ok(&format!("run builtin -p Once -n 30 --json --seed {}", first["seed"])).json();
    assert_eq!(first["tokens"], again["tokens"]);
}

/// Stop strings, the model's own end, the most tokens.
fn ends() {
    let place = Place::new();
    let run = |more: &str| place.ok(&format!("run builtin -p Once --temp 0 --json {more}")).json();
    let text = |run: &Value| run["text"].as_str().expect("a text").to_string();
    let whole = run("-n 400");
    assert_eq!(whole["stop_reason"], "end_of_text");
    let stop = text(&whole).split(' ').nth(6).expect("some words").to_string();
    let stopped = run(&format!("-n 400 --stop {stop}"));
    assert_eq!(stopped["stop_reason"], "stop_string");
    assert_eq!(Some(text(&stopped).as_str()), text(&whole).split(&stop).next());
    let count = ids(&whole["tokens"]).len();
    let beyond = run("-n 400 --ignore-eos");
    assert!(ids(&beyond["tokens"]).len() > count && beyond["stop_reason"] != "end_of_text");
    let few = run("-n 3");
    assert_eq!(
        (ids(&few["tokens"]), few["stop_reason"].as_str()),
        (ids(&whole["tokens"])[..3].to_vec(), Some("max_tokens"))
    );
}

/// A prompt is an argument, a file, stdin, or ids; it is repeated but for `--no-echo`.
fn prompts() {
    let place = Place::new();
    place.write("prompt.txt", "Once");
    let common = "--temp 0 -n 8";
    let argument = place.ok(&format!("run builtin -p Once {common}")).out;
    assert!(argument.starts_with("Once") && argument.ends_with('\n'), "{argument}");
    assert_eq!(place.ok(&format!("run builtin -f prompt.txt {common}")).out, argument);
    let mut from_stdin = place.command(&format!("run builtin -f - {common}"));
    let file = fs::File::open(place.path("prompt.txt")).expect("it is there");
    assert_eq!(Said::of(from_stdin.stdin(file)).ok().out, argument);
    let quiet = place.ok(&format!("run builtin -p Once --no-echo {common}")).out;
    assert_eq!(format!("Once{quiet}"), argument);
    let ids = place.ok("tokenize builtin Once --json").json()["ids"].to_string();
    let by_ids = place.ok(&format!("run builtin --tokens {ids} {common}")).out;
    assert_eq!(by_ids, quiet);
    // With nothing to go on from the model begins by itself.
    assert!(!place.ok(&format!("run builtin {common}")).out.trim().is_empty());
}

/// One turn by the model's template, which has the prompt's tokens to the letter.
fn chat() {
    let place = Place::new();
    let builtin = Path::new(env!("CARGO_MANIFEST_DIR")).join("builtin");
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        place.write(&format!("m/{name}"), fs::read(builtin.join(name)).expect("the built-in model"));
    }
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    place.write("m/tokenizer_config.json", json!({ "chat_template": template }).to_string());
    let tokens =
        |text: &str| place.ok(&format!("tokenize m {text} --no-special --json")).json()["ids"].clone();
    let run = |more: &str| {
        place.ok(&format!("run m --chat -p Hello -n 1 --json {more}")).json()["prompt_tokens"].clone()
    };
    assert_eq!(run(""), tokens("<user>Hello<assistant>"));
    assert_eq!(run("--system Short"), tokens("<system>Short<user>Hello<assistant>"));
}

/// Whoever reads the stream gets whole characters in each piece, even of text that is nonsense.
fn stream() {
    let place = Place::new();
    place.ok("compile builtin -o a.llamac");
    let mut many = 0;
    for seed in 0..4 {
        let arguments = format!(
            "run a.llamac -p é🙂 --temp 50 --top-k 0 --top-p 1 --min-p 0 --ignore-eos -n 400 --seed {seed}"
        );
        let mut child = place
            .command(&arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts");
        let mut out = child.stdout.take().expect("a pipe");
        let mut text = String::new();
        let mut piece = [0; 1 << 16];
        loop {
            let read = out.read(&mut piece).expect("a pipe");
            if read == 0 {
                break;
            }
            // A write of less than 4096 bytes reaches a pipe whole.
            text += std::str::from_utf8(&piece[..read]).expect("whole characters");
            many += 1;
        }
        assert!(child.wait().expect("its end").success());
        let whole = place.ok(&format!("{arguments} --json")).json();
        assert_eq!(text, format!("é🙂{}\n", whole["text"].as_str().expect("a text")));
    }
    assert!(many > 400, "{many} pieces: the text did not stream");
    // A reader that goes away ends the text, and is no fault.
    let mut child = place
        .command("run a.llamac -p Once --ignore-eos -n 400")
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    drop(child.stdout.take());
    assert!(child.wait().expect("its end").success());
}

/// A checkpoint is compiled once.
fn cache() {
    let place = Place::new();
    let first = place.ok("run builtin -p Once --temp 0 -n 8");
    let files = place.files();
    assert!(matches!(files.as_slice(), [file] if file.starts_with("cache/llamac/builtin-")), "{files:?}");
    assert!(
        first.err.contains("compiling builtin (bf16, context 512) into ") && first.err.contains(&files[0]),
        "{}",
        first.err
    );
    let changed = || fs::metadata(place.path(&files[0])).expect("it is there").modified().expect("a time");
    let before = changed();
    let second = place.ok("run builtin -p Once --temp 0 -n 8");
    assert_eq!((&second.out, changed()), (&first.out, before));
    assert!(!second.err.contains("compiling"), "{}", second.err);
    assert!(place.ok("run builtin -p Once -n 1 -v").err.contains("using "));
    // Other options are another artifact.
    place.ok("run builtin -p Once -n 1 --ctx 64");
    place.ok("logits builtin --tokens 1 --dtype f32");
    assert_eq!(place.files().len(), 3);
}

/// `--keep` leaves what `emit` shows.
fn keep() {
    let place = Place::new();
    place.ok("compile builtin -o a.llamac --keep texts --ctx 64");
    let stages =
        [("graph", "ir"), ("fused", "ir"), ("kernels", "ir"), ("plan", "txt"), ("llvm", "ll"), ("asm", "s")];
    for (stage, ending) in stages {
        let kept = place.read(&format!("texts/cpu-native/{stage}.{ending}"));
        let shown = place.ok(&format!("emit builtin --stage {stage} --ctx 64")).out;
        assert!(String::from_utf8(kept).expect("text") == shown, "{stage} is not what emit shows");
    }
    assert_eq!(place.files().len(), 1 + stages.len());
}

/// One artifact for several machines: the best that runs here runs, in whatever order they were named.
fn targets() {
    let place = Place::new();
    let compile = |file: &str, targets: &[&str]| {
        let targets: Vec<String> = targets.iter().map(|name| format!("--target {name}")).collect();
        place.ok(&format!("compile builtin -o {file} --ctx 64 {}", targets.join(" ")));
        let shown = place.ok(&format!("inspect {file} --json")).json();
        let names: Vec<Value> = shown["targets"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|target| target["name"].clone())
            .collect();
        (json!(names), shown["runs_here"].clone())
    };
    let (names, runs_here) =
        compile("all.llamac", &["cpu:aarch64", "cpu:native", "cpu:x86-64-v3", "cpu:x86-64-v4"]);
    assert_eq!((names.as_array().map(Vec::len), runs_here), (Some(4), json!("cpu:native")));
    let (names, _) = compile("two.llamac", &["cpu:x86-64-v3", "cpu:x86-64-v4"]);
    assert_eq!(names, json!(["cpu:x86-64-v4", "cpu:x86-64-v3"]));
    place.ok("compile builtin -o native.llamac --ctx 64");
    let logits = |file: &str| self::logits(&place, &format!("{file} --tokens 3,4,5"));
    assert!(logits("all.llamac") == logits("native.llamac"));
    let (_, runs_here) = compile("v3.llamac", &["cpu:aarch64", "cpu:x86-64-v3"]);
    assert_eq!(runs_here, "cpu:x86-64-v3");
    place.ok("run v3.llamac -p Once -n 4");
}

fn same_bytes() {
    let place = Place::new();
    for name in ["a", "b"] {
        let targets = "--target cpu:native --target cpu:x86-64-v3";
        place.ok(&format!("compile builtin -o {name}.llamac --dtype f32 {targets}"));
        place.ok(&format!("compile preset:smollm2-135m -o {name}-shape.llamac --no-weights"));
    }
    assert!(place.read("a.llamac") == place.read("b.llamac"));
    assert!(place.read("a-shape.llamac") == place.read("b-shape.llamac"));
}

/// Ctrl-C, or a polite end by another program, while weights are written: no file, and the older one untouched.
fn interrupt() {
    for signal in ["INT", "TERM"] {
        let place = Place::new();
        place.write("a.llamac", "older");
        let arguments = "compile preset:tinyllama-1.1b --random-weights 1 -o a.llamac";
        let child = place
            .command(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let deadline = Instant::now() + Duration::from_secs(60);
        while !place.files().iter().any(|file| file.ends_with(".tmp")) {
            assert!(Instant::now() < deadline, "no weights after a minute");
            std::thread::sleep(Duration::from_millis(5));
        }
        // A shell has `kill` in itself; the program is in a package that a small system may lack.
        let kill = format!("kill -s {signal} {}", child.id());
        let sent = Command::new("sh").args(["-c", &kill]).status().expect("a shell");
        assert!(sent.success());
        let said = Said::from(arguments.to_string(), child.wait_with_output().expect("its end"));
        assert_eq!((said.exit, said.err.as_str()), (Some(130), "error: interrupted\n"), "SIG{signal}");
        assert_eq!(place.files(), ["a.llamac"], "SIG{signal}");
        assert_eq!(place.read("a.llamac"), b"older");
    }
}

/// Colours are for terminals, and for those who want them.
fn colour() {
    let place = Place::new();
    for arguments in [
        "inspect builtin",
        "run none",
        "plan builtin --kernels",
        "run builtin -p x -n 1",
        "--help",
        "opt none.ir",
    ] {
        let said = place.run(arguments);
        assert!(!said.out.contains('\x1b') && !said.err.contains('\x1b'), "{arguments}: {said:?}");
    }
    let on_terminal = |no_color: bool| {
        let command = format!("{} run none", env!("CARGO_BIN_EXE_llamac"));
        let mut script = place.program(Path::new("script"), &["-q", "-c", &command, "/dev/null"]);
        if no_color {
            script.env("NO_COLOR", "1");
        }
        script
            .env("TERM", "xterm")
            .output()
            .ok()
            .filter(|output| output.status.success())
            .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    match (on_terminal(false), on_terminal(true)) {
        (Some(coloured), Some(plain)) => {
            assert!(coloured.contains("\x1b[1;31merror"), "{coloured:?}");
            assert!(plain.contains("error: none") && !plain.contains('\x1b'), "{plain:?}");
        }
        _ => skip("cli colour on a terminal", "there is no program `script`, or no terminal for it"),
    }
}

/// One model in two formats says the same.
fn stories() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/models/stories260K");
    if !folder.exists() {
        return skip("cli a directory and its gguf", &format!("there is no {}", folder.display()));
    }
    let place = Place::new();
    let run =
        |model: &Path| place.ok(&format!("run {} -p Once --temp 0 -n 60 --dtype f32", model.display())).out;
    let text = run(&folder);
    assert!(text.starts_with("Once upon a time, there was a"), "{text}");
    assert_eq!(run(&folder.join("stories260K.gguf")), text);
    let by_oracle = place
        .ok(&format!("run {} -p Once --temp 0 -n 12 --dtype f32 --device interpreter", folder.display()))
        .out;
    assert!(text.starts_with(by_oracle.trim_end()), "{by_oracle}");
}
