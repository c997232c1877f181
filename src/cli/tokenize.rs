//! `tokenize`: text to token ids and back.

use super::error::CliError;
use super::prompt::{self, Ids, ids};
use super::screen::{Screen, columns, print, print_json};
use clap::Args;
use llamac::model::Model;
use serde_json::json;

#[derive(Args)]
#[command(after_help = "\
Example:
  llamac tokenize builtin \"Once upon a time\"
  llamac tokenize model.gguf --decode 1,403,407")]
pub struct Options {
    /// Model or artifact
    model: String,
    /// Text
    #[arg(required_unless_present = "decode", conflicts_with = "decode")]
    text: Option<String>,
    /// Ids to turn into text
    #[arg(long, value_parser = ids, value_name = "IDS", allow_hyphen_values = true)]
    decode: Option<Ids>,
    /// Nothing in front of the text, such as the token that begins one
    #[arg(long)]
    no_special: bool,
}

pub fn tokenize(options: &Options, screen: &Screen) -> Result<(), CliError> {
    let model = Model::open(&options.model)?;
    let tokenizer = prompt::tokenizer(&options.model, &model)?;
    let failed = |source| CliError::Tokenizer { model: options.model.clone(), source };

    if let Some(Ids(ids)) = &options.decode {
        let known = |&id: &i32| u32::try_from(id).ok().filter(|&id| tokenizer.piece(id).is_some());
        let ids: Option<Vec<u32>> = ids.iter().map(known).collect();
        let Some(ids) = ids else {
            let most = tokenizer.vocab_size();
            return Err(CliError::Usage(format!(
                "--decode: there are token ids 0 to {}",
                most.saturating_sub(1)
            )));
        };
        let text = tokenizer.decode(&ids, false).map_err(failed)?;
        return if screen.json { print_json(&json!({ "text": text })) } else { print(&format!("{text}\n")) };
    }

    let text = options.text.as_deref().unwrap_or_default();
    let ids = tokenizer.encode(text, !options.no_special).map_err(failed)?;
    let pieces: Vec<String> =
        prompt::to_i32(&ids).iter().map(|&id| prompt::piece(Some(&tokenizer), id)).collect();
    if screen.json {
        return print_json(&json!({ "ids": ids, "pieces": pieces }));
    }
    let shown = |piece: &String| piece.escape_debug().to_string();
    let rows: Vec<Vec<String>> =
        ids.iter().zip(&pieces).map(|(id, piece)| vec![id.to_string(), shown(piece)]).collect();
    let list: Vec<String> = ids.iter().map(u32::to_string).collect();
    print(&format!("{}\n{} tokens: {}\n", columns(&["id>", "piece"], &rows), ids.len(), list.join(",")))
}
