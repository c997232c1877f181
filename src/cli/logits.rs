//! `logits`: what the model says at every position.

use super::device::DeviceOptions;
use super::error::CliError;
use super::prompt::{self, Ids, ids};
use super::screen::{Screen, columns, print, print_json};
use super::source::{self, BuildOptions, positive};
use clap::Args;
use models::Tokenizer;
use runtime::device::{Program, Step, Want, feed};
use runtime::whole_file;
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize;
use std::io;
use std::path::{Path, PathBuf};

#[derive(Args)]
#[command(after_help = "\
Example:
  llamac logits builtin -p \"Once upon a\"
  llamac logits model/ --tokens 1,403,407 --dtype f32 --chunk 1 -o logits.safetensors")]
pub struct Options {
    /// Model or artifact
    model: String,
    /// Token ids; nothing is added in front
    #[arg(long, value_parser = ids, value_name = "IDS", required_unless_present = "prompt", allow_hyphen_values = true)]
    tokens: Option<Ids>,
    /// Text
    #[arg(long, short, conflicts_with = "tokens", value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Write tensors `tokens` i32 [T] and `logits` f32 [T, V] to this safetensors file
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Tokens a step; 1 is decode steps [default: as many as the program takes]
    #[arg(long, value_parser = positive, value_name = "N")]
    chunk: Option<usize>,
    /// Likeliest tokens to show at each position
    #[arg(long, default_value_t = 5, value_name = "K")]
    top_k: usize,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    build: BuildOptions,
}

pub fn logits(options: &Options, screen: &Screen) -> Result<(), CliError> {
    let mut device = options.device.device()?;
    let build = BuildOptions { machine: options.device.machine()?, ..options.build.clone() };
    let ready = source::ready(&options.model, &build, screen)?;
    let tokenizer =
        ready.model.tokenizer().map(|_| prompt::tokenizer(&options.model, &ready.model)).transpose();
    let (tokens, tokenizer) = match (&options.tokens, &options.prompt) {
        // Ids need no tokenizer; without one the table shows ids.
        (Some(Ids(tokens)), _) => (tokens.clone(), tokenizer.ok().flatten()),
        (None, text) => {
            let tokenizer = match tokenizer? {
                Some(tokenizer) => tokenizer,
                None => prompt::tokenizer(&options.model, &ready.model)?,
            };
            let text = text.as_deref().unwrap_or_default();
            (prompt::encode(&options.model, &tokenizer, text)?, Some(tokenizer))
        }
    };
    let mut program = device.load(&ready.artifact)?;
    let logits = all_logits(&mut *program, &tokens, options.chunk)?;
    let vocab = program.vocab();
    if let Some(file) = &options.output {
        write(file, &tokens, &logits, vocab)?;
        screen.detail(format!("{}: {} rows of {vocab} logits", file.display(), tokens.len()));
    }
    let rows: Vec<Position> = tokens
        .iter()
        .zip(logits.chunks_exact(vocab))
        .enumerate()
        .map(|(at, (&token, row))| Position {
            position: at,
            token,
            piece: prompt::piece(tokenizer.as_ref(), token),
            top: top(row, options.top_k, tokenizer.as_ref()),
        })
        .collect();
    if screen.json {
        let output = options.output.as_ref().map(|file| file.display().to_string());
        return print_json(
            &serde_json::json!({ "tokens": tokens, "vocab": vocab, "output": output, "positions": rows }),
        );
    }
    print(&table(&rows, screen))
}

/// Logits of every position, by decode steps if `chunk` is 1.
fn all_logits(program: &mut dyn Program, tokens: &[i32], chunk: Option<usize>) -> Result<Vec<f32>, CliError> {
    let mut state = program.state()?;
    if chunk != Some(1) {
        return Ok(feed(program, tokens, chunk, Want::AllLogits, &mut state)?.logits);
    }
    // Too many tokens are refused before any work, as `feed` does.
    if tokens.len() > program.context() {
        let (tokens, context) = (tokens.len(), program.context());
        return Err(runtime::device::DeviceError::ContextFull { past: 0, tokens, context }.into());
    }
    let mut logits = Vec::new();
    for &token in tokens {
        let step = Step { tokens: &[token], want: Want::Logits };
        logits.append(&mut program.run(&step, &mut state)?.logits);
    }
    Ok(logits)
}

#[derive(Serialize)]
struct Position {
    position: usize,
    token: i32,
    piece: String,
    top: Vec<Choice>,
}

#[derive(Serialize)]
struct Choice {
    token: i32,
    piece: String,
    logit: f32,
    probability: f64,
}

/// The `k` likeliest tokens of a row, lower ids first on ties.
fn top(row: &[f32], k: usize, tokenizer: Option<&Tokenizer>) -> Vec<Choice> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&x| f64::from(x - max).exp()).sum();
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
    let choice = |&id: &usize| Choice {
        token: id as i32,
        piece: prompt::piece(tokenizer, id as i32),
        logit: row[id],
        probability: f64::from(row[id] - max).exp() / sum,
    };
    order.iter().take(k).map(choice).collect()
}

/// The last position whole; the likeliest token of the others where there are few, or all were asked for.
fn table(rows: &[Position], screen: &Screen) -> String {
    const FEW: usize = 16;
    let shown = |piece: &str| piece.escape_debug().to_string();
    let mut text = String::new();
    if rows.len() > 1 && !rows[0].top.is_empty() {
        let from = if screen.verbose { 0 } else { rows.len().saturating_sub(FEW) };
        if from > 0 {
            text += &format!("{from} positions before these; -v shows them\n");
        }
        let line = |row: &Position| {
            let best = &row.top[0];
            vec![
                row.position.to_string(),
                row.token.to_string(),
                shown(&row.piece),
                best.token.to_string(),
                shown(&best.piece),
                format!("{:.4}", best.logit),
                format!("{:.1} %", 100.0 * best.probability),
            ]
        };
        let lines: Vec<Vec<String>> = rows[from..].iter().map(line).collect();
        text +=
            &columns(&["position>", "token>", "piece", "next>", "piece", "logit>", "probability>"], &lines);
        text.push('\n');
    }
    if let Some(last) = rows.last() {
        let line = |choice: &Choice| {
            vec![
                choice.token.to_string(),
                shown(&choice.piece),
                format!("{:.4}", choice.logit),
                format!("{:.1} %", 100.0 * choice.probability),
            ]
        };
        let lines: Vec<Vec<String>> = last.top.iter().map(line).collect();
        text += &format!("after position {} ({}):\n", last.position, shown(&last.piece));
        text += &columns(&["next>", "piece", "logit>", "probability>"], &lines);
    }
    text
}

/// Writes the tensors, to a file that is whole or not there.
fn write(file: &Path, tokens: &[i32], logits: &[f32], vocab: usize) -> Result<(), CliError> {
    let (token_bytes, logit_bytes): (Vec<u8>, Vec<u8>) = (
        tokens.iter().flat_map(|t| t.to_le_bytes()).collect(),
        logits.iter().flat_map(|l| l.to_le_bytes()).collect(),
    );
    let rows = tokens.len();
    let view = |dtype, shape, bytes| TensorView::new(dtype, shape, bytes).expect("as many bytes as elements");
    let views = [
        ("tokens", view(Dtype::I32, vec![rows], &token_bytes)),
        ("logits", view(Dtype::F32, vec![rows, vocab], &logit_bytes)),
    ];
    let needed = token_bytes.len() + logit_bytes.len();
    let fill = |path: &Path| {
        safetensors::serialize_to_file(views, None, path).map_err(|error| match error {
            SafeTensorError::IoError(source) => source,
            other => io::Error::other(other),
        })
    };
    Ok(whole_file::write(file, needed as u64, fill)?)
}
