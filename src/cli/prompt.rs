//! Text to tokens, by the model's own tokenizer.

use super::error::CliError;
use llamac::model::Model;
use models::Tokenizer;

/// The tokenizer of a model.
pub fn tokenizer(argument: &str, model: &Model) -> Result<Tokenizer, CliError> {
    let Some(json) = model.tokenizer() else {
        return Err(CliError::Usage(format!("{argument} has no tokenizer: give ids, by --tokens 1,2,3")));
    };
    Tokenizer::from_json(json).map_err(|source| CliError::Tokenizer { model: argument.to_string(), source })
}

/// Ids of a text, with what the model wants in front of texts.
pub fn encode(argument: &str, tokenizer: &Tokenizer, text: &str) -> Result<Vec<i32>, CliError> {
    let ids = tokenizer.encode(text, true);
    let ids = ids.map_err(|source| CliError::Tokenizer { model: argument.to_string(), source })?;
    Ok(to_i32(&ids))
}

/// Ids as programs take them.
pub fn to_i32(ids: &[u32]) -> Vec<i32> {
    // A vocabulary has at most 2^28 entries; what is beyond, the program refuses.
    ids.iter().map(|&id| i32::try_from(id).unwrap_or(i32::MAX)).collect()
}

/// Reads `1,2,3`; the ids may stand apart, in brackets too, as other programs print them.
pub fn ids(text: &str) -> Result<Ids, String> {
    let inner = text.trim().trim_start_matches('[').trim_end_matches(']');
    let parts = inner.split([',', ' ', '\n']).map(str::trim).filter(|part| !part.is_empty());
    let ids: Result<Vec<i32>, String> =
        parts.map(|part| part.parse().map_err(|_| format!("`{part}` is no token id"))).collect();
    match ids?.as_slice() {
        [] => Err("expected token ids, such as 1,2,3".to_string()),
        ids => Ok(Ids(ids.to_vec())),
    }
}

/// Token ids of one argument.
#[derive(Clone, Debug)]
pub struct Ids(pub Vec<i32>);

/// A token as one sees it: its piece, or its number where it has none.
pub fn piece(tokenizer: Option<&Tokenizer>, id: i32) -> String {
    let piece = tokenizer.and_then(|t| t.piece(u32::try_from(id).ok()?));
    piece.unwrap_or_else(|| format!("#{id}"))
}
