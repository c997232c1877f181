//! sentencepiece's `tokenizer.model`, as LLaMA 1 and 2 came with it.
//!
//! Source: `sentencepiece_model.proto`; what the settings do, `normalizer.cc` and `bpe_model.cc`. Read are BPE models
//! without a table of normalizations; others are refused by name.

use sentencepiece_model::{ModelType, SentencePieceModel, Type};

use crate::tokenizer::TokenizerError;
use crate::tokenizer_json::{Piece, PieceKind, Pieces};

/// Reads a `tokenizer.model`. BOS is put in front of texts and EOS is not, as in `LlamaTokenizer`.
///
/// # Errors
///
/// [`TokenizerError`]: not such a protobuf; a model type, a normalization or a treatment of spaces that is not known.
pub fn read(bytes: &[u8]) -> Result<Pieces, TokenizerError> {
    let model = SentencePieceModel::from_slice(bytes)
        .map_err(|error| TokenizerError::SentencePiece { reason: error.to_string() })?;
    let unknown = |what, found: &str, known| Err(TokenizerError::Kind { what, found: found.into(), known });
    let (trainer, normalizer) =
        (model.trainer().cloned().unwrap_or_default(), model.normalizer().cloned().unwrap_or_default());
    if trainer.model_type() != ModelType::Bpe {
        return unknown("sentencepiece model type", trainer.model_type().as_str_name(), &["BPE"]);
    }
    if normalizer.precompiled_charsmap.as_ref().is_some_and(|map| !map.is_empty()) {
        return unknown("sentencepiece normalization", normalizer.name(), &["identity"]);
    }
    if !normalizer.escape_whitespaces() {
        return unknown("sentencepiece escape_whitespaces", "false", &["true"]);
    }
    if trainer.treat_whitespace_as_suffix() {
        return unknown("sentencepiece treat_whitespace_as_suffix", "true", &["false"]);
    }

    let piece = |piece: &sentencepiece_model::SentencePiece| Piece {
        text: piece.piece().to_owned(),
        score: piece.score().into(),
        kind: match piece.r#type() {
            Type::Normal => PieceKind::Normal,
            Type::Unknown => PieceKind::Unknown,
            Type::Control => PieceKind::Control,
            Type::UserDefined => PieceKind::UserDefined,
            Type::Unused => PieceKind::Unused,
            Type::Byte => PieceKind::Byte,
        },
    };
    let pieces: Vec<Piece> = model.pieces().iter().map(piece).collect();
    let control = |text: &str| {
        let found = pieces.iter().position(|piece| piece.kind == PieceKind::Control && piece.text == text);
        found.map(|id| id as u32)
    };
    Ok(Pieces {
        unknown: None,
        bos: control(trainer.bos_piece()),
        eos: None,
        space_in_front: normalizer.add_dummy_prefix(),
        merge_spaces: normalizer.remove_extra_whitespaces(),
        specials_in_text: false,
        pieces,
    })
}
