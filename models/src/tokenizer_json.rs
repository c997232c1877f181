//! Writes tokenizers of other forms as `tokenizer.json`.
//!
//! * [`from_pieces`]: sentencepiece BPE, given as pieces with scores. The library's BPE wants merges in order: each way
//!   to put a piece together from two others is one, and the best score comes first. sentencepiece breaks a tie between
//!   two ways to the same piece by position and not by rank; no text is known where that shows.
//! * [`from_byte_level`]: byte-level BPE, given as pieces and merges, with the name of its way to cut text into words.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::tokenizer::{Origin, SPACE, Tokenizer, TokenizerError, TokenizerSource};

/// What a piece is for, as sentencepiece and GGUF tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceKind {
    /// Found in text, and put together from others.
    Normal,
    /// Stands for what no other piece spells.
    Unknown,
    /// Steers the model: BOS, EOS, ends of turns.
    Control,
    /// Found in text as a whole, before anything else.
    UserDefined,
    /// Kept for later use.
    Unused,
    /// One byte, `<0xNN>`.
    Byte,
}

/// One entry of a vocabulary; its id is its place.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The spelling.
    pub text: String,
    /// The larger, the earlier it is put together.
    pub score: f64,
    /// What it is for.
    pub kind: PieceKind,
}

/// A sentencepiece BPE vocabulary and how text is prepared for it.
#[derive(Clone, Debug)]
pub struct Pieces {
    /// Pieces by id.
    pub pieces: Vec<Piece>,
    /// The piece for what no other spells, if it is known by id and not by kind.
    pub unknown: Option<u32>,
    /// Token put in front of every text.
    pub bos: Option<u32>,
    /// Token put behind every text.
    pub eos: Option<u32>,
    /// A space is put in front of the text (`add_dummy_prefix`).
    pub space_in_front: bool,
    /// Spaces at the ends go, runs of spaces become one (`remove_extra_whitespaces`).
    pub merge_spaces: bool,
    /// Control pieces are looked for in text.
    pub specials_in_text: bool,
}

/// A byte-level BPE vocabulary.
#[derive(Clone, Debug)]
pub struct ByteLevelBpe {
    /// Pieces by id; scores are of no meaning.
    pub pieces: Vec<Piece>,
    /// `left right`, best first.
    pub merges: Vec<String>,
    /// Token put in front of every text.
    pub bos: Option<u32>,
    /// Token put behind every text.
    pub eos: Option<u32>,
    /// A space is put in front of the text.
    pub space_in_front: bool,
    /// How text is cut into words: one of [`PRE_NAMES`].
    pub pre: String,
}

/// Ways to cut text into words, as `tokenizer.ggml.pre` names them.
pub const PRE_NAMES: [&str; 4] = ["default", "gpt-2", "llama-bpe", "smollm"];

/// GPT-2's pattern for words.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// LLaMA 3's.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Pieces longer than this cannot be put together from others. sentencepiece's longest are 16 characters unless told
/// otherwise; the work for a piece grows with the square of its length.
const MAX_MERGED_CHARS: usize = 256;

/// Writes a sentencepiece BPE vocabulary.
///
/// # Errors
///
/// [`TokenizerError`]: a piece twice, a special id outside the vocabulary, no unknown piece.
pub fn from_pieces(source: &Pieces, origin: Origin) -> Result<TokenizerSource, TokenizerError> {
    let Pieces { pieces, unknown, bos, eos, space_in_front, merge_spaces, specials_in_text } = source;
    let ids = ids(pieces)?;
    let unknown = match unknown {
        Some(id) => Some(text_of(pieces, *id, "unknown token id")?),
        None => pieces.iter().find(|piece| piece.kind == PieceKind::Unknown).map(|piece| piece.text.as_str()),
    };

    let replace = |from: Value, to: &str| json!({ "type": "Replace", "pattern": from, "content": to });
    let mut normalizers = Vec::new();
    if *merge_spaces {
        // Spaces alone: other white space stays, as in sentencepiece.
        normalizers.push(replace(json!({ "Regex": r"\A +| +\z" }), ""));
        normalizers.push(replace(json!({ "Regex": " {2,}" }), " "));
    }
    if *space_in_front {
        normalizers.push(json!({ "type": "Prepend", "prepend": SPACE }));
    }
    normalizers.push(replace(json!({ "String": " " }), SPACE));

    let mut decoders = vec![
        replace(json!({ "String": SPACE }), " "),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if *space_in_front {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }

    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(pieces, *specials_in_text),
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "post_processor": template(pieces, *bos, *eos)?,
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": pieces.iter().any(|piece| piece.kind == PieceKind::Byte),
            "ignore_merges": false,
            "vocab": vocab(pieces),
            "merges": merges_by_score(pieces, &ids),
        },
    });
    finish(&json, origin)
}

/// Writes a byte-level BPE vocabulary.
///
/// # Errors
///
/// [`TokenizerError`]: a piece twice, a special id outside the vocabulary, a merge that is not two pieces, an unknown
/// way to cut text into words.
pub fn from_byte_level(source: &ByteLevelBpe) -> Result<TokenizerSource, TokenizerError> {
    let ByteLevelBpe { pieces, merges, bos, eos, space_in_front, pre } = source;
    let ids = ids(pieces)?;
    let mut pairs = Vec::new();
    for merge in merges {
        // A piece of this alphabet holds no space.
        let pair = merge.split_once(' ').filter(|(left, right)| {
            ids.contains_key(left)
                && ids.contains_key(right)
                && ids.contains_key(format!("{left}{right}").as_str())
        });
        let Some((left, right)) = pair else { return Err(TokenizerError::Merge { found: merge.clone() }) };
        pairs.push([left, right]);
    }

    let split = |pattern: &str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
    let byte_level = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": space_in_front, "trim_offsets": true, "use_regex": use_regex });
    let words = match pre.as_str() {
        "gpt-2" => vec![byte_level(true)],
        "smollm" => vec![json!({ "type": "Digits", "individual_digits": true }), byte_level(true)],
        "llama-bpe" => vec![split(LLAMA3), byte_level(false)],
        // llama.cpp's, for files that do not say.
        "default" => {
            let patterns = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"];
            patterns.into_iter().map(split).chain([byte_level(false)]).collect()
        }
        _ => {
            return Err(TokenizerError::Kind {
                what: "pre-tokenizer",
                found: pre.clone(),
                known: &PRE_NAMES,
            });
        }
    };
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(pieces, true),
        "normalizer": null,
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": words },
        "post_processor": template(pieces, *bos, *eos)?,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            // Whole words of the vocabulary are taken as they are: LLaMA 3's was made without merges for all.
            "ignore_merges": pre == "llama-bpe",
            "vocab": vocab(pieces),
            "merges": pairs,
        },
    });
    finish(&json, Origin::GgufGpt2)
}

/// Sets what a `tokenizer.json` puts in front of a text and behind it.
///
/// # Errors
///
/// [`TokenizerError`]: not a `tokenizer.json`; a token that it does not know.
pub(crate) fn with_specials(
    json: &[u8],
    bos: Option<&str>,
    eos: Option<&str>,
) -> Result<Vec<u8>, TokenizerError> {
    let tokenizer = Tokenizer::from_json(json)?;
    let known = |token: &str| match tokenizer.id(token) {
        Some(id) => Ok((token.to_owned(), id)),
        None => Err(TokenizerError::UnknownToken { token: token.into() }),
    };
    let (bos, eos) = (bos.map(known).transpose()?, eos.map(known).transpose()?);
    let mut value: Map<String, Value> = serde_json::from_slice(json).map_err(TokenizerError::Json)?;
    value.insert("post_processor".into(), template_of(bos, eos));
    Ok(serde_json::to_vec(&value).expect("JSON values are written without fail"))
}

/// Checks the text by reading it.
fn finish(json: &Value, origin: Origin) -> Result<TokenizerSource, TokenizerError> {
    let json = serde_json::to_vec(json).expect("JSON values are written without fail");
    Tokenizer::from_json(&json)?;
    Ok(TokenizerSource { json, origin })
}

/// Ids by text; each piece stands once.
fn ids(pieces: &[Piece]) -> Result<HashMap<&str, u32>, TokenizerError> {
    if pieces.len() > i32::MAX as usize {
        let (found, expected) = (pieces.len() as u64, i32::MAX as u64);
        return Err(TokenizerError::Count { what: "pieces", found, expected });
    }
    let mut ids = HashMap::new();
    for (id, piece) in pieces.iter().enumerate() {
        let second = id as u32;
        if let Some(first) = ids.insert(piece.text.as_str(), second) {
            return Err(TokenizerError::DuplicatePiece { piece: piece.text.clone(), first, second });
        }
    }
    Ok(ids)
}

fn text_of<'a>(pieces: &'a [Piece], id: u32, what: &'static str) -> Result<&'a str, TokenizerError> {
    let piece = pieces.get(id as usize);
    let outside = || TokenizerError::Count { what, found: id.into(), expected: pieces.len() as u64 };
    piece.map(|piece| piece.text.as_str()).ok_or_else(outside)
}

fn vocab(pieces: &[Piece]) -> Map<String, Value> {
    pieces.iter().enumerate().map(|(id, piece)| (piece.text.clone(), id.into())).collect()
}

/// Entries for pieces that are found in text as a whole.
fn added_tokens(pieces: &[Piece], specials_in_text: bool) -> Vec<Value> {
    let entry = |(id, piece): (usize, &Piece)| {
        let special = match piece.kind {
            PieceKind::Control | PieceKind::Unknown => true,
            PieceKind::UserDefined => false,
            PieceKind::Normal | PieceKind::Unused | PieceKind::Byte => return None,
        };
        let mut entry = json!({
            "id": id,
            "content": piece.text,
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": false,
            "special": special,
        });
        if special && !specials_in_text {
            entry["in_text"] = false.into();
        }
        Some(entry)
    };
    pieces.iter().enumerate().filter(|(_, piece)| !piece.text.is_empty()).filter_map(entry).collect()
}

/// The post-processor that puts BOS in front and EOS behind.
fn template(pieces: &[Piece], bos: Option<u32>, eos: Option<u32>) -> Result<Value, TokenizerError> {
    let known = |id: u32| Ok((text_of(pieces, id, "special token id")?.to_owned(), id));
    Ok(template_of(bos.map(known).transpose()?, eos.map(known).transpose()?))
}

fn template_of(bos: Option<(String, u32)>, eos: Option<(String, u32)>) -> Value {
    let special = |token: &Option<(String, u32)>, type_id: u32| {
        token.as_ref().map(|(text, _)| json!({ "SpecialToken": { "id": text, "type_id": type_id } }))
    };
    let around = |name: &str, type_id: u32| {
        let text = json!({ "Sequence": { "id": name, "type_id": type_id } });
        [special(&bos, type_id), Some(text), special(&eos, type_id)].into_iter().flatten().collect::<Vec<_>>()
    };
    let tokens: Map<String, Value> = [&bos, &eos]
        .into_iter()
        .flatten()
        .map(|(text, id)| (text.clone(), json!({ "id": text, "ids": [id], "tokens": [text] })))
        .collect();
    let pair = [around("A", 0), around("B", 1)].concat();
    json!({
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": pair,
        "special_tokens": tokens,
    })
}

/// Every way to put a piece together from two others, best score first; ways that score the same in order of the
/// ids of the whole, the left and the right part (as in the `tokenizer.json` that transformers converts).
fn merges_by_score<'a>(pieces: &'a [Piece], ids: &HashMap<&str, u32>) -> Vec<[&'a str; 2]> {
    let takes_part =
        |piece: &Piece| matches!(piece.kind, PieceKind::Normal | PieceKind::UserDefined | PieceKind::Unused);
    let half = |text: &str| ids.get(text).copied().filter(|&id| takes_part(&pieces[id as usize]));
    let mut merges = Vec::new();
    for piece in pieces.iter().filter(|piece| takes_part(piece)) {
        if piece.text.chars().nth(MAX_MERGED_CHARS).is_some() {
            continue;
        }
        let mut ways = Vec::new();
        for (at, _) in piece.text.char_indices().skip(1) {
            let (left, right) = piece.text.split_at(at);
            if let (Some(left_id), Some(right_id)) = (half(left), half(right)) {
                ways.push((left_id, right_id, [left, right]));
            }
        }
        ways.sort_unstable();
        merges.extend(ways.into_iter().map(|(_, _, halves)| (piece.score, halves)));
    }
    // A stable sort, so that the order of ids stays where scores are equal.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    merges.into_iter().map(|(_, halves)| halves).collect()
}
