//! `eval`: how well a model predicts.

use super::device::DeviceOptions;
use super::error::CliError;
use super::prompt;
use super::screen::{Screen, grouped, pairs, print, print_json, short};
use super::source::{self, BuildOptions, Ready, dtype, positive};
use clap::{ArgGroup, Args, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ir::DType;
use llamac::eval::{self, ANSWER, Beside, Estimate, Normalise, Protocol, Question, Reader, Score, Window};
use models::Tokenizer;
use runtime::device::Program;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(Args)]
#[command(group(ArgGroup::new("what").required(true).args(["text", "tokens", "choices"])), after_help = "\
Perplexity: the text is made tokens once, as one string. It is cut into windows, each run alone from position 0. A window
begins with what the tokenizer puts in front of texts (--no-bos: nothing; then its first token is not scored). Where windows
overlap (--stride below --window), a token is scored in the first that has it. What is left behind the last whole window is
not scored. perplexity = exp(mean of -ln p). The interval is one of 95 % confidence, by Student's t, the windows as sample.

Divergence: the mean over scored tokens of KL(base || model), in nats, and how often both find the same token likeliest.

Choices: a line of the file is {\"context\": \"The sky is\", \"choices\": [\" blue\", \" made of cheese\"], \"answer\": 0}, a choice
with the space that it begins with, the answer counted from 0; other keys are ignored. The choice with the largest likelihood
after the context is picked, normalised by length in characters; the LLaMA paper takes --normalise answer for OpenBookQA and
BoolQ. The interval is Wilson's, of 95 % confidence.

Example:
  llamac eval model.gguf --text wikitext2-test.txt --window 512 --windows 16 --no-bos
  llamac eval model.gguf --dtype bf16 --text wikitext2-test.txt --kld-base model.gguf --kld-dtype f32
  llamac eval model.llamac --choices hellaswag.jsonl")]
pub struct Options {
    /// Model or artifact
    model: String,
    /// Text to predict
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Token ids to predict, an i32 tensor of a safetensors file; nothing is added in front
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
    /// Which tensor of --tokens [default: the only one]
    #[arg(long, value_name = "NAME", requires = "tokens")]
    tensor: Option<String>,
    /// Questions with choices, a line of JSON each
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kld_base", "windows", "no_bos"])]
    choices: Option<PathBuf>,
    /// Tokens of a window
    #[arg(long, default_value_t = 512, value_parser = positive, value_name = "N")]
    window: usize,
    /// Tokens from window to window [default: as --window, so that none overlap]
    #[arg(long, value_parser = positive, value_name = "N")]
    stride: Option<usize>,
    /// Score only the first windows [default: all whole ones]
    #[arg(long, value_parser = positive, value_name = "N")]
    windows: Option<usize>,
    /// Nothing in front of a window, such as the token that begins a text
    #[arg(long)]
    no_bos: bool,
    /// Compare with this model's or artifact's distribution; the vocabularies must be the same
    #[arg(long, value_name = "OTHER")]
    kld_base: Option<String>,
    /// Dtype of --kld-base [default: f32 for f32 checkpoints, else bf16]
    #[arg(long, value_name = "DTYPE", value_parser = dtype, requires = "kld_base")]
    kld_dtype: Option<DType>,
    /// What the likelihood of a choice is divided by
    #[arg(long, value_enum, default_value = "characters", value_name = "BY", requires = "choices")]
    normalise: NormaliseName,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    build: BuildOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum NormaliseName {
    /// Its characters
    Characters,
    /// Its tokens
    Tokens,
    /// Its likelihood after "Answer:"
    Answer,
    /// Nothing
    None,
}

impl NormaliseName {
    fn value(self) -> Normalise {
        match self {
            NormaliseName::Characters => Normalise::Characters,
            NormaliseName::Tokens => Normalise::Tokens,
            NormaliseName::Answer => Normalise::Answer,
            NormaliseName::None => Normalise::Nothing,
        }
    }
}

pub fn eval(options: &Options, screen: &Screen) -> Result<(), CliError> {
    let mut device = options.device.device()?;
    let own = BuildOptions { machine: options.device.machine()?, ..options.build.clone() };
    match &options.choices {
        Some(file) => {
            let text = read(file)?;
            let questions = eval::questions(&text).map_err(|e| CliError::Text {
                file: file.clone(),
                line: e.line,
                message: e.to_string(),
            })?;
            let ready = source::ready(&options.model, &own, screen)?;
            let mut program = device.load(&ready.artifact)?;
            choices(options, &ready, &mut *program, &questions, screen)
        }
        None => {
            let ready = source::ready(&options.model, &own, screen)?;
            let (protocol, windows) = windows(options, &ready)?;
            let mut program = device.load(&ready.artifact)?;
            let base = options.kld_base.as_ref().map(|base| {
                let build = BuildOptions { dtype: options.kld_dtype, ..own.clone() };
                let base = source::ready(base, &build, screen)?;
                same_vocabulary(&ready, &base)?;
                Ok::<_, CliError>((device.load(&base.artifact)?, base))
            });
            let mut base = base.transpose()?;
            let mut bar = Bar::new(windows.iter().map(Window::scored).sum(), screen);
            let begin = Instant::now();
            let mut model = Reader::new(&mut *program)?;
            let mut base_reader =
                base.as_mut().map(|(program, _)| Reader::new(&mut **program)).transpose()?;
            let mut scores = Vec::new();
            for window in &windows {
                let done = &mut |tokens| bar.step(tokens);
                scores.push(eval::score(window, &mut model, base_reader.as_mut(), done)?);
                bar.say(format!("perplexity {:.4}", nll(&scores).mean.exp()));
            }
            bar.end();
            let told = Told { options, ready: &ready, base: base.as_ref().map(|(_, base)| base), screen };
            told.text(&protocol, &scores, begin.elapsed().as_secs_f64())
        }
    }
}

fn read(file: &Path) -> Result<String, CliError> {
    fs::read_to_string(file).map_err(|source| CliError::Read { file: file.to_path_buf(), source })
}

/// The windows to score, and how they were cut.
fn windows(options: &Options, ready: &Ready) -> Result<(Protocol, Vec<Window>), CliError> {
    let mut in_front = Vec::new();
    let (file, tokens) = match (&options.tokens, &options.text) {
        (Some(file), _) => (file, token_file(file, options.tensor.as_deref())?),
        (None, text) => {
            let file = text.as_ref().expect("one of the group is given");
            let tokenizer = prompt::tokenizer(&options.model, &ready.model)?;
            if !options.no_bos {
                in_front = prompt::encode(&options.model, &tokenizer, "")?;
            }
            (file, encode(options, &tokenizer, &read(file)?, false)?)
        }
    };
    let window = options.window.min(tokens.len());
    let stride = options.stride.unwrap_or(options.window);
    let protocol = Protocol { window, stride, in_front };
    let mut windows = protocol.windows(&tokens);
    if windows.is_empty() {
        let found = tokens.len();
        return Err(CliError::Usage(format!("{}: {found} tokens, expected two at least", file.display())));
    }
    if let Some(asked) = options.windows {
        if asked > windows.len() {
            let (file, found) = (file.display(), windows.len());
            return Err(CliError::Usage(format!("--windows {asked}: {file} has {found} of {window} tokens")));
        }
        windows.truncate(asked);
    }
    Ok((protocol, windows))
}

fn encode(
    options: &Options,
    tokenizer: &Tokenizer,
    text: &str,
    add_special: bool,
) -> Result<Vec<i32>, CliError> {
    let ids = tokenizer.encode(text, add_special);
    let ids = ids.map_err(|source| CliError::Tokenizer { model: options.model.clone(), source })?;
    Ok(prompt::to_i32(&ids))
}

/// Token ids from a tensor of a safetensors file.
fn token_file(file: &Path, tensor: Option<&str>) -> Result<Vec<i32>, CliError> {
    let wrong = |what: String| CliError::Usage(format!("{}: {what}", file.display()));
    let bytes = fs::read(file).map_err(|source| CliError::Read { file: file.to_path_buf(), source })?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| wrong(format!("no safetensors file: {e}")))?;
    let mut names = tensors.names();
    names.sort_unstable();
    let name = match (tensor, &names[..]) {
        (Some(name), _) => name,
        (None, [only]) => only,
        (None, _) => return Err(wrong(format!("which tensor? add --tensor: {}", names.join(", ")))),
    };
    let found = tensors.tensor(name);
    let found = found.map_err(|_| wrong(format!("no tensor `{name}`; there are {}", names.join(", "))))?;
    match (found.dtype(), found.shape()) {
        (Dtype::I32, [_]) => {
            Ok(found.data().as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect())
        }
        (dtype, shape) => Err(wrong(format!("`{name}` is {dtype:?} {shape:?}, expected I32 [tokens]"))),
    }
}

/// A distribution is over tokens: both models must have the same ones.
fn same_vocabulary(model: &Ready, base: &Ready) -> Result<(), CliError> {
    let (found, expected) = (model.plan.vocab, base.plan.vocab);
    let named = |ready: &Ready| ready.argument.clone();
    if found != expected {
        let (model, base) = (named(model), named(base));
        return Err(CliError::Usage(format!(
            "--kld-base: {model} has {found} tokens in its vocabulary, {base} {expected}"
        )));
    }
    let tokenizer =
        |ready: &Ready| ready.model.tokenizer().map(|_| prompt::tokenizer(&ready.argument, &ready.model));
    // Models without a tokenizer are known by the number of their tokens alone.
    let (Some(ours), Some(theirs)) = (tokenizer(model).transpose()?, tokenizer(base).transpose()?) else {
        return Ok(());
    };
    match (0..found as u32).find(|&id| ours.piece(id) != theirs.piece(id)) {
        Some(id) => {
            let piece = |tokenizer| prompt::piece(Some(tokenizer), id as i32);
            Err(CliError::Usage(format!(
                "--kld-base: token {id} is {:?} in {}, {:?} in {}",
                piece(&ours),
                named(model),
                piece(&theirs),
                named(base)
            )))
        }
        None => Ok(()),
    }
}

/// Progress on stderr, where that is a terminal: rate, time left, and the result so far.
struct Bar(ProgressBar);

impl Bar {
    fn new(tokens: usize, screen: &Screen) -> Bar {
        let template = "{wide_bar} {pos} of {len} tokens, {per_sec}, {eta} left  {msg}";
        let bar = ProgressBar::new(tokens as u64);
        bar.set_style(ProgressStyle::with_template(template).expect("a template of ours"));
        if screen.json {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        Bar(bar)
    }

    fn step(&mut self, tokens: usize) {
        self.0.inc(tokens as u64);
    }

    fn say(&mut self, text: String) {
        self.0.set_message(text);
    }

    fn end(self) {
        self.0.finish_and_clear();
    }
}

/// Mean of `-ln p` over windows.
fn nll(scores: &[Score]) -> Estimate {
    Estimate::of(&scores.iter().map(|s| (s.nll, s.tokens)).collect::<Vec<_>>())
}

/// What is told of a text.
struct Told<'a> {
    options: &'a Options,
    ready: &'a Ready,
    base: Option<&'a Ready>,
    screen: &'a Screen,
}

impl Told<'_> {
    fn text(&self, protocol: &Protocol, scores: &[Score], seconds: f64) -> Result<(), CliError> {
        let nll = nll(scores);
        let perplexity = nll.map(f64::exp);
        let tokens: usize = scores.iter().map(|s| s.tokens).sum();
        let beside: Vec<(Beside, usize)> =
            scores.iter().filter_map(|s| Some((s.beside?, s.tokens))).collect();
        let mean = |of: &dyn Fn(&Beside) -> f64| {
            Estimate::of(&beside.iter().map(|(sums, tokens)| (of(sums), *tokens)).collect::<Vec<_>>())
        };
        let differences: Vec<(f64, usize)> =
            scores.iter().filter_map(|s| Some((s.nll - s.beside?.base_nll, s.tokens))).collect();
        let compared = self.base.map(|base| Compared {
            base,
            perplexity: mean(&|b| b.base_nll).map(f64::exp),
            ratio: Estimate::of(&differences).map(f64::exp),
            kld: mean(&|b| b.kld),
            same_top: mean(&|b| b.same_top as f64),
        });
        if self.screen.json {
            let mut told = json!({
                "perplexity": perplexity.mean,
                "nll": nll.mean,
                "tokens": tokens,
                "interval": perplexity.interval,
                "windows": scores,
                "protocol": protocol,
                "model": self.ready.manifest.model,
                "dtype": self.ready.manifest.dtype,
                "seconds": seconds,
            });
            if let Some(compared) = &compared {
                told["kld"] = compared.json();
            }
            return print_json(&told);
        }
        let mut rows = vec![
            ("model", format!("{} in {}", self.ready.argument, self.ready.manifest.dtype)),
            ("perplexity", shown(perplexity, |x| format!("{x:.4}"))),
            ("nll", format!("{} nats a token", shown(nll, |x| format!("{x:.4}")))),
        ];
        if let Some(compared) = &compared {
            rows.extend(compared.rows());
        }
        let source = self.options.tokens.as_ref().or(self.options.text.as_ref()).expect("one is given");
        rows.push(("protocol", protocol_text(protocol, scores.len(), source)));
        rows.push((
            "scored",
            format!("{} tokens at {} tok/s", grouped(tokens as u64), short(tokens as f64 / seconds)),
        ));
        print(&pairs(&rows))
    }
}

/// A model beside its base.
struct Compared<'a> {
    base: &'a Ready,
    perplexity: Estimate,
    ratio: Estimate,
    kld: Estimate,
    same_top: Estimate,
}

impl Compared<'_> {
    fn json(&self) -> serde_json::Value {
        let Compared { base, perplexity, ratio, kld, same_top } = self;
        json!({
            "base": base.manifest.model,
            "base_dtype": base.manifest.dtype,
            "base_perplexity": perplexity,
            "perplexity_ratio": ratio,
            "divergence": kld,
            "same_top": same_top,
        })
    }

    fn rows(&self) -> [(&'static str, String); 5] {
        let Compared { base, perplexity, ratio, kld, same_top } = self;
        [
            ("base", format!("{} in {}", base.argument, base.manifest.dtype)),
            ("its perplexity", shown(*perplexity, |x| format!("{x:.4}"))),
            ("ratio", shown(*ratio, |x| format!("{x:.5}"))),
            ("divergence", format!("{} nats a token", shown(*kld, |x| format!("{x:.6}")))),
            ("same top token", format!("{} %", shown(*same_top, |x| format!("{:.2}", 100.0 * x)))),
        ]
    }
}

/// A mean, and where it lies.
fn shown(estimate: Estimate, format: impl Fn(f64) -> String) -> String {
    match estimate.interval {
        Some([low, high]) => format!("{} ({} to {})", format(estimate.mean), format(low), format(high)),
        None => format(estimate.mean),
    }
}

fn protocol_text(protocol: &Protocol, windows: usize, source: &Path) -> String {
    let Protocol { window, stride, in_front } = protocol;
    let front = match in_front.len() {
        0 => "nothing in front".to_string(),
        _ => format!("{in_front:?} in front"),
    };
    let interval = if windows > 1 { "; 95 % intervals by windows" } else { "" };
    format!("{}: {windows} x {window} tokens, stride {stride}, {front}{interval}", source.display())
}

/// Asks every question, and tells how many were answered right.
fn choices(
    options: &Options,
    ready: &Ready,
    program: &mut dyn Program,
    questions: &[Question],
    screen: &Screen,
) -> Result<(), CliError> {
    let tokenizer = prompt::tokenizer(&options.model, &ready.model)?;
    let encode = |text: &str| encode(options, &tokenizer, text, true);
    let by = options.normalise.value();
    let mut asked = Vec::new();
    for (number, question) in questions.iter().enumerate() {
        let windows = |context: &str| -> Result<Vec<Window>, CliError> {
            let windows = question.windows(context, encode)?.into_iter().zip(&question.choices);
            let whole = |(window, choice): (Option<Window>, &String)| {
                window.ok_or_else(|| {
                    let of = format!("question {}", number + 1);
                    CliError::Usage(format!("{of}: {choice:?} and its context are one token"))
                })
            };
            windows.map(whole).collect()
        };
        let after_answer = if by == Normalise::Answer { windows(ANSWER)? } else { Vec::new() };
        asked.push((question, windows(&question.context)?, after_answer));
    }
    let all = asked.iter().flat_map(|(_, windows, after)| windows.iter().chain(after));
    let mut bar = Bar::new(all.map(Window::scored).sum(), screen);
    let mut reader = Reader::new(program)?;
    let mut answers = Vec::new();
    let mut right = 0;
    for (question, windows, after_answer) in &asked {
        let mut score =
            |window: &Window| eval::score(window, &mut reader, None, &mut |tokens| bar.step(tokens));
        let scores: Vec<Score> = windows.iter().map(&mut score).collect::<Result<_, _>>()?;
        let after: Vec<Score> = after_answer.iter().map(&mut score).collect::<Result<_, _>>()?;
        let value = |(choice, score)| question.value(choice, by, score, after.get(choice));
        let values: Vec<f64> = scores.iter().enumerate().map(value).collect();
        let picked = eval::top(&values);
        right += usize::from(picked == question.answer);
        answers.push(json!({ "picked": picked, "answer": question.answer, "values": values }));
        bar.say(format!("{right} of {} right", answers.len()));
    }
    bar.end();
    let accuracy = eval::proportion(right, questions.len());
    let by = options.normalise.to_possible_value().expect("no value is hidden").get_name().to_string();
    if screen.json {
        return print_json(&json!({
            "accuracy": accuracy.mean,
            "interval": accuracy.interval,
            "right": right,
            "questions": questions.len(),
            "normalise": by,
            "answers": answers,
            "model": ready.manifest.model,
            "dtype": ready.manifest.dtype,
        }));
    }
    print(&pairs(&[
        ("model", format!("{} in {}", ready.argument, ready.manifest.dtype)),
        ("accuracy", format!("{} %", shown(accuracy, |x| format!("{:.1}", 100.0 * x)))),
        ("right", format!("{right} of {}", questions.len())),
        (
            "protocol",
            format!(
                "likelihood of the choice after its context, normalised by {by}; 95 % interval by Wilson"
            ),
        ),
    ]))
}
