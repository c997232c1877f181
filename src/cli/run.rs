//! `run`: writes text.

use super::ceilings;
use super::device::DeviceOptions;
use super::error::CliError;
use super::interrupt;
use super::prompt::{self, Ids, ids};
use super::screen::{Screen, bandwidth, print_json, short};
use super::source::{self, BuildOptions, Ready};
use clap::Args;
use models::{Message, Tokenizer, render_chat};
use runtime::device::{DeviceError, Program, State};
use runtime::generate::{Generation, Request, StopReason, generate};
use runtime::sample::{Sampler, SamplerOptions};
use serde_json::json;
use std::fs;
use std::io::{self, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Args)]
#[command(after_help = "\
Example:
  llamac run builtin -p \"Once upon a time\"
  llamac run model.gguf -f prompt.txt -n 100 --temp 0
  llamac run model.llamac --chat --system \"Be brief.\"")]
pub struct Options {
    /// Model or artifact; what is no artifact is compiled into the cache folder first
    model: String,
    /// Text to go on from
    #[arg(long, short, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// File with the text to go on from; `-` is stdin
    #[arg(long, short, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// Token ids to go on from; nothing is added in front
    #[arg(long, value_parser = ids, value_name = "IDS", conflicts_with_all = ["prompt", "file", "chat"], allow_hyphen_values = true)]
    tokens: Option<Ids>,
    /// Talk, by the model's chat template: turn by turn on a terminal, else one turn from the prompt
    #[arg(long)]
    chat: bool,
    /// What the model is told before a talk
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Most tokens to write
    #[arg(short = 'n', long = "max-tokens", default_value_t = 256, value_name = "N")]
    max_tokens: usize,
    /// Do not repeat the prompt in front of the text
    #[arg(long)]
    no_echo: bool,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    build: BuildOptions,
}

/// How tokens are chosen. The defaults are llama.cpp's.
#[derive(Args)]
#[command(next_help_heading = "Sampling")]
struct Sampling {
    /// Temperature; 0 takes the likeliest token each time
    #[arg(long, default_value_t = 0.8, value_name = "T", allow_negative_numbers = true)]
    temp: f64,
    /// Choose among so many likeliest tokens; 0 is all
    #[arg(long, default_value_t = 40, value_name = "K")]
    top_k: usize,
    /// Choose among the likeliest tokens that make up this share of the probability
    #[arg(long, default_value_t = 0.95, value_name = "P", allow_negative_numbers = true)]
    top_p: f64,
    /// Leave out tokens below this share of the likeliest one's probability
    #[arg(long, default_value_t = 0.05, value_name = "P", allow_negative_numbers = true)]
    min_p: f64,
    /// Above 1: make the last 64 tokens less likely
    #[arg(long, default_value_t = 1.0, value_name = "X", allow_negative_numbers = true)]
    repeat_penalty: f64,
    /// The same seed gives the same text [default: from the clock, shown by -v]
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// End the text before this string; may stand there more than once
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Go on when the model ends its text
    #[arg(long)]
    ignore_eos: bool,
}

/// Seconds that measuring the read bandwidth may take.
const METER_SECONDS: f64 = 0.2;

pub fn run(options: &Options, screen: &Screen) -> Result<(), CliError> {
    // Sampling options and devices are refused before a long compilation.
    let seed = options.sampling.seed.unwrap_or_else(clock);
    let mut sampler = Sampler::new(options.sampling.options(seed))?;
    let mut device = options.device.device()?;
    let given = given(options)?;
    let build = BuildOptions { machine: options.device.machine()?, ..options.build.clone() };
    let ready = source::ready(&options.model, &build, screen)?;
    let tokenizer = match (ready.model.tokenizer(), &options.tokens) {
        (None, Some(_)) => None,
        _ => Some(prompt::tokenizer(&options.model, &ready.model)?),
    };
    let mut program = device.load(&ready.artifact)?;
    screen.detail(format!("seed {seed}, {} threads on {}", options.device.threads(), options.device.device));
    let state = program.state()?;
    let mut talk = Talk { ready: &ready, tokenizer, program: &mut *program, state, cached: Vec::new() };
    let mut told = Told { options, screen, seed, bandwidth: None };
    match (given, options.chat) {
        (Given::Tokens(tokens), _) => told.one(&mut talk, &mut sampler, &tokens, ""),
        (Given::Text(text), false) => {
            let tokenizer = talk.tokenizer.as_ref().expect("text has a tokenizer");
            let tokens = prompt::encode(&options.model, tokenizer, &text)?;
            if tokens.is_empty() {
                return Err(CliError::Usage("the prompt is empty: give one, by -p TEXT or -f FILE".into()));
            }
            let echo = if options.no_echo { "" } else { &text };
            told.one(&mut talk, &mut sampler, &tokens, echo)
        }
        (Given::Text(text), true) => {
            let mut messages = first_messages(options);
            messages.push(Message { role: "user".into(), content: text });
            let tokens = talk.render(&messages)?;
            told.one(&mut talk, &mut sampler, &tokens, "")
        }
        (Given::Terminal, _) => told.turns(&mut talk, &mut sampler),
    }
}

/// What there is to go on from.
enum Given {
    Tokens(Vec<i32>),
    Text(String),
    /// Lines, as they are typed.
    Terminal,
}

fn given(options: &Options) -> Result<Given, CliError> {
    if let Some(Ids(tokens)) = &options.tokens {
        return Ok(Given::Tokens(tokens.clone()));
    }
    if let Some(text) = &options.prompt {
        return Ok(Given::Text(text.clone()));
    }
    let failed = |file: &Path, source| CliError::Read { file: file.to_path_buf(), source };
    let stdin = || {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).map_err(|e| failed(Path::new("stdin"), e))?;
        Ok(Given::Text(text))
    };
    match &options.file {
        Some(file) if file == Path::new("-") => stdin(),
        Some(file) => Ok(Given::Text(fs::read_to_string(file).map_err(|e| failed(file, e))?)),
        None if options.chat && io::stdin().is_terminal() => Ok(Given::Terminal),
        None if options.chat => stdin(),
        // Without a prompt the model begins a text of its own.
        None => Ok(Given::Text(String::new())),
    }
}

fn clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

fn first_messages(options: &Options) -> Vec<Message> {
    let message = |content: &String| Message { role: "system".into(), content: content.clone() };
    options.system.iter().map(message).collect()
}

impl Sampling {
    fn options(&self, seed: u64) -> SamplerOptions {
        SamplerOptions {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            seed,
            ..SamplerOptions::default()
        }
    }
}

/// A model with what it has been told so far.
struct Talk<'a> {
    ready: &'a Ready,
    tokenizer: Option<Tokenizer>,
    program: &'a mut dyn Program,
    state: State,
    /// Tokens in the state's cache.
    cached: Vec<i32>,
}

impl Talk<'_> {
    /// Tokens of a conversation, up to the opening of the assistant's turn.
    fn render(&self, messages: &[Message]) -> Result<Vec<i32>, CliError> {
        let Some(template) = self.ready.model.chat_template() else {
            let model = &self.ready.argument;
            return Err(CliError::Usage(format!("--chat: {model} has no chat template; use -p TEXT")));
        };
        let tokenizer = self.tokenizer.as_ref().expect("a talk is text");
        let piece = |id: Option<u32>| id.and_then(|id| tokenizer.piece(id)).unwrap_or_default();
        let (bos, eos) = (piece(self.ready.manifest.bos), piece(self.ready.manifest.eos.first().copied()));
        let text = render_chat(&template, messages, &bos, &eos, true)?;
        let failed = |source| CliError::Tokenizer { model: self.ready.argument.clone(), source };
        Ok(prompt::to_i32(&tokenizer.encode_rendered(&text).map_err(failed)?))
    }

    /// Goes on from `tokens`, of which the beginning may be in the cache already.
    fn go_on(
        &mut self,
        tokens: &[i32],
        options: &Options,
        sampler: &mut Sampler,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation, CliError> {
        // At least one token is run, since its logits are not kept.
        let common = self.cached.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let common = common.min(tokens.len().saturating_sub(1));
        self.state.truncate(common);
        let stop_tokens = prompt::to_i32(&self.ready.manifest.eos);
        let request = Request {
            prompt: &tokens[common..],
            max_new_tokens: options.max_tokens,
            stop_tokens: &stop_tokens,
            ignore_eos: options.sampling.ignore_eos,
            stop_strings: &options.sampling.stop,
            chunk: None,
        };
        let bytes = |id: i32| match (&self.tokenizer, u32::try_from(id)) {
            (Some(tokenizer), Ok(id)) => tokenizer.token_bytes(id),
            _ => format!("{id} ").into_bytes(),
        };
        let done = interrupt::guarded(|| {
            generate(self.program, &mut self.state, &request, sampler, &bytes, on_text)
        })?;
        self.cached = tokens.to_vec();
        self.cached.extend(&done.tokens);
        self.cached.truncate(self.state.past());
        Ok(done)
    }
}

/// How text and figures are shown.
struct Told<'a> {
    options: &'a Options,
    screen: &'a Screen,
    /// Given, or from the clock.
    seed: u64,
    /// Measured once.
    bandwidth: Option<f64>,
}

impl Told<'_> {
    /// One text: streamed, or as one JSON object.
    fn one(
        &mut self,
        talk: &mut Talk<'_>,
        sampler: &mut Sampler,
        tokens: &[i32],
        echo: &str,
    ) -> Result<(), CliError> {
        // Refused before the prompt is repeated.
        let context = talk.program.context();
        if tokens.len() > context {
            return Err(DeviceError::ContextFull { past: 0, tokens: tokens.len(), context }.into());
        }
        let begins_text = echo.is_empty() && self.options.tokens.is_none();
        if self.screen.json {
            let mut text = Stream::new(talk, begins_text, None);
            let done = talk.go_on(tokens, self.options, sampler, &mut |piece| text.push(piece))?;
            let (_, decode, share) = self.speeds(talk, &done);
            return print_json(&json!({
                "prompt_tokens": tokens,
                "tokens": done.tokens,
                "text": text.text,
                "stop_reason": reason(done.stop),
                "prefill_tokens_per_s": rate(done.prompt_tokens, done.prompt_seconds),
                "decode_tokens_per_s": decode,
                "share_of_bandwidth": share,
                "bandwidth_bytes_per_s": self.bandwidth,
                "seed": self.seed,
            }));
        }
        let done = self.stream(talk, sampler, tokens, echo, begins_text)?;
        self.figures(talk, &done);
        Ok(())
    }

    /// Turn by turn, until the input ends.
    fn turns(&mut self, talk: &mut Talk<'_>, sampler: &mut Sampler) -> Result<(), CliError> {
        let mut messages = first_messages(self.options);
        // Refuses a model without a template before anything is typed.
        let hello = Message { role: "user".into(), content: "Hello".into() };
        talk.render(&[messages.as_slice(), &[hello]].concat())?;
        self.screen.note("Ctrl-D ends the talk, Ctrl-C the model's turn.");
        loop {
            let _ = write!(io::stderr(), "> ");
            let mut line = String::new();
            let read = io::stdin().read_line(&mut line);
            let read = read.map_err(|source| CliError::Read { file: "stdin".into(), source })?;
            if read == 0 {
                self.screen.note("");
                return Ok(());
            }
            let content = line.trim().to_string();
            if content.is_empty() {
                continue;
            }
            messages.push(Message { role: "user".into(), content });
            let tokens = talk.render(&messages)?;
            let done = self.stream(talk, sampler, &tokens, "", true)?;
            messages.push(Message { role: "assistant".into(), content: done.text.trim().to_string() });
            if self.screen.verbose {
                self.figures(talk, &done);
            }
        }
    }

    /// Writes the text as it comes.
    fn stream(
        &mut self,
        talk: &mut Talk<'_>,
        sampler: &mut Sampler,
        tokens: &[i32],
        echo: &str,
        begins_text: bool,
    ) -> Result<Generation, CliError> {
        let mut out = io::stdout().lock();
        out.write_all(echo.as_bytes())?;
        out.flush()?;
        let mut stream = Stream::new(talk, begins_text, Some(&mut out));
        let done = talk.go_on(tokens, self.options, sampler, &mut |piece| stream.push(piece));
        if let Some(error) = stream.failed {
            return Err(error.into());
        }
        // Not for a prompt that was refused before anything was written.
        let begun = done.is_ok() || !echo.is_empty() || !stream.text.is_empty();
        if begun && !stream.text.ends_with('\n') {
            out.write_all(b"\n")?;
        }
        out.flush()?;
        let done = done?;
        if done.stop == StopReason::ContextFull {
            let context = talk.program.context();
            self.screen.note(format!("[context full: {context} positions; --ctx gives more at compilation]"));
        }
        Ok(done)
    }

    /// Bandwidth that decoding used, tokens a second, and its share of what can be read.
    fn speeds(&mut self, talk: &Talk<'_>, done: &Generation) -> (f64, Option<f64>, Option<f64>) {
        let threads = self.options.device.threads();
        let measure = || ceilings::read_weights(talk.ready, threads, METER_SECONDS);
        let bandwidth = *self.bandwidth.get_or_insert_with(measure);
        let decode = rate(done.decode_steps, done.decode_seconds);
        let bytes = talk.ready.plan.bytes_per_token().map(|bytes| bytes as f64);
        let share = decode.zip(bytes).map(|(rate, bytes)| rate * bytes / bandwidth);
        (bandwidth, decode, share.filter(|share| share.is_finite()))
    }

    /// The last line: `[prompt 5 tok, 812 tok/s · 64 tok in 0.21 s, 305 tok/s · 41 % of 38.2 GB/s]`.
    fn figures(&mut self, talk: &Talk<'_>, done: &Generation) {
        let (ceiling, decode, share) = self.speeds(talk, done);
        let speed = |rate: Option<f64>| rate.map_or(String::new(), |rate| format!(", {} tok/s", short(rate)));
        let mut parts = vec![
            format!(
                "prompt {} tok{}",
                done.prompt_tokens,
                speed(rate(done.prompt_tokens, done.prompt_seconds))
            ),
            format!("{} tok in {:.2} s{}", done.tokens.len(), done.decode_seconds, speed(decode)),
        ];
        parts.extend(share.map(|share| format!("{:.0} % of {}", 100.0 * share, bandwidth(ceiling))));
        self.screen.note(format!("[{}]", parts.join(" · ")));
    }
}

fn rate(tokens: usize, seconds: f64) -> Option<f64> {
    (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds)
}

fn reason(stop: StopReason) -> &'static str {
    match stop {
        StopReason::EndOfText => "end_of_text",
        StopReason::StopString => "stop_string",
        StopReason::MaxTokens => "max_tokens",
        StopReason::ContextFull => "context_full",
        StopReason::Cancelled => "cancelled",
    }
}

/// Text as it comes: kept, and written where there is somewhere to write.
struct Stream<'a> {
    out: Option<&'a mut dyn Write>,
    text: String,
    /// The space that sentencepiece puts before the first word is not the text's.
    drop_space: bool,
    failed: Option<io::Error>,
}

impl<'a> Stream<'a> {
    fn new(talk: &Talk<'_>, begins_text: bool, out: Option<&'a mut dyn Write>) -> Stream<'a> {
        let strips = talk.tokenizer.as_ref().is_some_and(Tokenizer::strips_leading_space);
        Stream { out, text: String::new(), drop_space: begins_text && strips, failed: None }
    }

    fn push(&mut self, piece: &str) -> ControlFlow<()> {
        let mut piece = piece;
        if self.drop_space && !piece.is_empty() {
            piece = piece.strip_prefix(' ').unwrap_or(piece);
            self.drop_space = false;
        }
        self.text.push_str(piece);
        if let Some(out) = &mut self.out
            && let Err(error) = out.write_all(piece.as_bytes()).and_then(|()| out.flush())
        {
            self.failed = Some(error);
            return ControlFlow::Break(());
        }
        if interrupt::pressed() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}
