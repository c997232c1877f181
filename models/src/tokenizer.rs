//! Text to token ids and back.
//!
//! Every tokenizer is one `tokenizer.json` text (the form of the `tokenizers` library) by the time it is run:
//! readers convert the others to it ([`crate::tokenizer_json`]). That text is what an artifact holds.
//!
//! One key is ours: an added token with `"in_text": false` is not looked for in text by [`Tokenizer::encode`],
//! as sentencepiece does not look for its control pieces. The library reads past the key.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, DeserializeOwned, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper};

/// A tokenizer as text, and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizerSource {
    /// `tokenizer.json` text, for [`Tokenizer::from_json`].
    pub json: Vec<u8>,
    /// What it was read from.
    pub origin: Origin,
}

/// What a tokenizer was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `tokenizer.json`.
    Json,
    /// sentencepiece's `tokenizer.model`.
    SentencePiece,
    /// The metadata of a GGUF file, kind `llama`.
    GgufLlama,
    /// The metadata of a GGUF file, kind `gpt2`.
    GgufGpt2,
}

impl Origin {
    /// Name for listings.
    pub fn name(self) -> &'static str {
        match self {
            Origin::Json => "tokenizer.json",
            Origin::SentencePiece => "tokenizer.model",
            Origin::GgufLlama => "gguf llama",
            Origin::GgufGpt2 => "gguf gpt2",
        }
    }
}

/// Why a tokenizer cannot be read or run.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// Not JSON, or not a `tokenizer.json`.
    #[error("not a tokenizer.json")]
    Json(#[source] serde_json::Error),
    /// The library refused.
    #[error("the tokenizers library: {0}")]
    Library(#[source] tokenizers::Error),
    /// Not the protobuf that `tokenizer.model` should be.
    #[error("not a sentencepiece model: {reason}")]
    SentencePiece {
        /// What the protobuf reader said.
        reason: String,
    },
    /// A kind of tokenizer that is not known.
    #[error("{what} `{found}` is not known, known are {}", known.join(", "))]
    Kind {
        /// Which setting names the kind.
        what: &'static str,
        /// The kind.
        found: String,
        /// Kinds that are known.
        known: &'static [&'static str],
    },
    /// Lists that should be equally long, or ids outside the vocabulary.
    #[error("{what}: found {found}, expected {expected}")]
    Count {
        /// Which number.
        what: &'static str,
        /// The number.
        found: u64,
        /// What it should be, or its limit.
        expected: u64,
    },
    /// A piece that stands twice.
    #[error("piece {piece:?} stands twice: ids {first} and {second}")]
    DuplicatePiece {
        /// The piece.
        piece: String,
        /// Its first id.
        first: u32,
        /// Its second id.
        second: u32,
    },
    /// A merge that is not two pieces of the vocabulary.
    #[error("merge {found:?} is not two pieces of the vocabulary")]
    Merge {
        /// The merge.
        found: String,
    },
    /// An added token that ends up with another id than it says.
    #[error("added token {token:?} has id {found:?}, its entry says {expected}")]
    AddedToken {
        /// Its text.
        token: String,
        /// The id that it has.
        found: Option<u32>,
        /// The id of its entry.
        expected: u32,
    },
    /// A post-processor that does more than put tokens around a text.
    #[error("post-processor template {found}: expected special tokens that it lists, around one sequence A")]
    Template {
        /// The template.
        found: String,
    },
    /// A token that should be put around texts and that the vocabulary does not have.
    #[error("token {token:?} is not in the vocabulary")]
    UnknownToken {
        /// Its text.
        token: String,
    },
    /// BPE that leaves out merges at random.
    #[error("the model drops merges at random (dropout {found}): ids would differ from run to run")]
    Dropout {
        /// The probability.
        found: f64,
    },
}

/// A tokenizer, ready to run.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Tokens put in front of a text.
    prefix: Vec<u32>,
    /// Tokens put behind it.
    suffix: Vec<u32>,
    /// Special tokens that `encode` does not look for in text, with their ids.
    not_in_text: Vec<(String, u32)>,
    alphabet: Alphabet,
}

/// How pieces spell bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alphabet {
    /// Each character of a piece is a byte (GPT-2's table).
    ByteLevel,
    /// `▁` is a space; `<0xNN>` is a byte where `bytes`; `strip`: decoding drops a space at the start of the text.
    Spaces { bytes: bool, strip: bool },
    /// Ask the library.
    Other,
}

/// A `tokenizer.json`. The library could read it by itself, in twice the time and with less care: it takes for
/// granted what [`check_parts`] and [`specials_around`] check.
#[derive(Deserialize)]
struct TokenizerJson {
    version: Option<String>,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    model: ModelJson,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    #[serde(flatten)]
    token: tokenizers::AddedToken,
    in_text: Option<bool>,
}

#[derive(Deserialize)]
struct ModelJson {
    r#type: Option<String>,
    dropout: Option<f64>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
    #[serde(default)]
    vocab: VocabJson,
    #[serde(default)]
    merges: Vec<MergeJson>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json` with a BPE model. Truncation and padding in it are read past: they are settings of a
    /// training run, and would change what a prompt says.
    ///
    /// # Errors
    ///
    /// [`TokenizerError`]: not a `tokenizer.json`; a part of a kind that no LLaMA's tokenizer has; an added token
    /// whose id is taken; BPE dropout.
    pub fn from_json(bytes: &[u8]) -> Result<Tokenizer, TokenizerError> {
        let json: TokenizerJson = serde_json::from_slice(bytes).map_err(TokenizerError::Json)?;
        check_parts(&json)?;
        let (prefix, suffix) = specials_around(json.post_processor.as_ref())?;
        let alphabet = alphabet(json.decoder.as_ref());
        let TokenizerJson { added_tokens, normalizer, pre_tokenizer, decoder, model, .. } = json;

        let mut inner = tokenizers::Tokenizer::new(bpe(model)?);
        inner.with_normalizer(part::<NormalizerWrapper>(normalizer)?).map_err(TokenizerError::Library)?;
        inner.with_pre_tokenizer(part::<PreTokenizerWrapper>(pre_tokenizer)?);
        inner.with_decoder(part::<DecoderWrapper>(decoder)?);
        let tokens = added_tokens.iter().map(|added| added.token.clone());
        inner.add_tokens(tokens).map_err(TokenizerError::Library)?;

        let mut not_in_text = Vec::new();
        for AddedToken { id, token, in_text } in added_tokens {
            let found = inner.token_to_id(&token.content);
            if found != Some(id) {
                return Err(TokenizerError::AddedToken { token: token.content, found, expected: id });
            }
            if token.special && in_text == Some(false) {
                not_in_text.push((token.content, id));
            }
        }
        inner.set_encode_special_tokens(!not_in_text.is_empty());
        Ok(Tokenizer { inner, prefix, suffix, not_in_text, alphabet })
    }

    /// Ids of a text. `add_special` puts in front (or behind) what the model was trained with, usually BOS.
    ///
    /// Special tokens that stand in the text are found, except those of a sentencepiece `tokenizer.model`, which
    /// knows them only as ids: see [`Tokenizer::encode_rendered`].
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Library`].
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, false).map_err(TokenizerError::Library)?;
        let (prefix, suffix): (&[u32], &[u32]) =
            if add_special { (&self.prefix, &self.suffix) } else { (&[], &[]) };
        Ok([prefix, encoding.get_ids(), suffix].concat())
    }

    /// Ids of a rendered chat template: special tokens that stand in the text are found whatever the tokenizer, and
    /// none is added.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Library`].
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::new();
        let mut rest = text;
        // The leftmost special token; of those that begin there, the longest.
        let next = |rest: &str| {
            let found = self.not_in_text.iter().filter(|(token, _)| !token.is_empty());
            let found = found.filter_map(|(token, id)| Some((rest.find(token.as_str())?, token.len(), *id)));
            found.min_by_key(|&(at, len, _)| (at, std::cmp::Reverse(len)))
        };
        while let Some((at, len, id)) = next(rest) {
            ids.extend(self.encode(&rest[..at], false)?);
            ids.push(id);
            rest = &rest[at + len..];
        }
        ids.extend(self.encode(rest, false)?);
        Ok(ids)
    }

    /// Text of ids. Ids without a piece (a model's vocabulary may be padded) give nothing; bytes that are no
    /// UTF-8 give U+FFFD. `skip_special` leaves special tokens out.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Library`].
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        self.inner.decode(ids, skip_special).map_err(TokenizerError::Library)
    }

    /// The piece of an id, as the vocabulary spells it.
    pub fn piece(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a piece, as the vocabulary spells it.
    pub fn id(&self, piece: &str) -> Option<u32> {
        self.inner.token_to_id(piece)
    }

    /// Pieces, added tokens among them.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The bytes that a token stands for, which need not be whole characters: a caller that streams text collects
    /// them until they are. A sentencepiece token at the start of a word gives its space, also where
    /// [`Tokenizer::decode`] drops it because it begins the text: see [`Tokenizer::strips_leading_space`].
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(piece) = self.piece(id) else { return Vec::new() };
        match self.alphabet {
            Alphabet::ByteLevel => {
                piece.chars().map(byte_of_char).collect::<Option<_>>().unwrap_or_else(|| piece.into())
            }
            Alphabet::Spaces { bytes, .. } => match byte_token(&piece).filter(|_| bytes) {
                Some(byte) => vec![byte],
                None => piece.replace(SPACE, " ").into(),
            },
            Alphabet::Other => self.decode(&[id], false).unwrap_or_default().into(),
        }
    }

    /// Does decoding drop one space at the very start of a text, because encoding put it there?
    pub fn strips_leading_space(&self) -> bool {
        matches!(self.alphabet, Alphabet::Spaces { strip: true, .. })
    }
}

/// A part as the library has it.
fn part<P: DeserializeOwned>(value: Option<Value>) -> Result<Option<P>, TokenizerError> {
    value.map(serde_json::from_value).transpose().map_err(TokenizerError::Json)
}

fn bpe(model: ModelJson) -> Result<BPE, TokenizerError> {
    let merges = model.merges.into_iter().map(|MergeJson(left, right)| (left, right)).collect();
    let mut builder = BPE::builder()
        .vocab_and_merges(model.vocab.0, merges)
        .fuse_unk(model.fuse_unk.unwrap_or(false))
        .byte_fallback(model.byte_fallback.unwrap_or(false))
        .ignore_merges(model.ignore_merges.unwrap_or(false));
    if let Some(unknown) = model.unk_token {
        builder = builder.unk_token(unknown);
    }
    builder.build().map_err(TokenizerError::Library)
}

/// Refuses what the library would panic on or run wrongly, and kinds of parts that no LLaMA's tokenizer has.
fn check_parts(json: &TokenizerJson) -> Result<(), TokenizerError> {
    const MODELS: &[&str] = &["BPE"];
    const NORMALIZERS: &[&str] = &["Sequence", "Prepend", "Replace", "Strip", "NFC", "NFD", "NFKC", "NFKD"];
    const PRE_TOKENIZERS: &[&str] = &[
        "Sequence",
        "ByteLevel",
        "Split",
        "Digits",
        "Metaspace",
        "Punctuation",
        "Whitespace",
        "WhitespaceSplit",
    ];
    const DECODERS: &[&str] =
        &["Sequence", "ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"];

    if let Some(found) = json.version.as_ref().filter(|version| *version != "1.0") {
        return Err(TokenizerError::Kind { what: "version", found: found.clone(), known: &["1.0"] });
    }
    let model = &json.model;
    let kind = model.r#type.clone().unwrap_or("none".into());
    if !MODELS.contains(&kind.as_str()) {
        return Err(TokenizerError::Kind { what: "model type", found: kind, known: MODELS });
    }
    if let Some(found) = model.dropout.filter(|&dropout| dropout != 0.0) {
        return Err(TokenizerError::Dropout { found });
    }
    let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
    if let Some(affix) = affixes.into_iter().flatten().find(|affix| !affix.is_empty()) {
        return Err(TokenizerError::Kind {
            what: "subword prefix or suffix",
            found: affix.clone(),
            known: &["none"],
        });
    }
    // The library copies a merged piece into a buffer as long as the longest piece.
    let longest_piece = model.vocab.0.keys().map(String::len).max().unwrap_or(0);
    let longest_merge =
        model.merges.iter().map(|MergeJson(left, right)| left.len() + right.len()).max().unwrap_or(0);
    if longest_merge > longest_piece {
        let (found, expected) = (longest_merge as u64, longest_piece as u64);
        return Err(TokenizerError::Count { what: "bytes of the longest merge", found, expected });
    }
    // It counts on from the largest id, and graphs have i32 tokens.
    let largest_id = model.vocab.0.values().copied().max().unwrap_or(0);
    if largest_id > i32::MAX as u32 {
        let (found, expected) = (largest_id.into(), i32::MAX as u64);
        return Err(TokenizerError::Count { what: "largest token id", found, expected });
    }

    check_kinds("normalizer", json.normalizer.as_ref(), NORMALIZERS)?;
    check_kinds("pre-tokenizer", json.pre_tokenizer.as_ref(), PRE_TOKENIZERS)?;
    check_kinds("decoder", json.decoder.as_ref(), DECODERS)
}

/// A part and, if it is a sequence, the parts in it are of known kinds. `null` is no part.
fn check_kinds(
    what: &'static str,
    part: Option<&Value>,
    known: &'static [&'static str],
) -> Result<(), TokenizerError> {
    let Some(part) = part else { return Ok(()) };
    let kind = part["type"].as_str().unwrap_or("none");
    if !known.contains(&kind) {
        return Err(TokenizerError::Kind { what, found: kind.into(), known });
    }
    // The library cuts what is not there from a short piece.
    if what == "decoder" && kind == "Strip" && part["stop"] != 0 {
        let found = part["stop"].to_string();
        return Err(TokenizerError::Kind { what: "decoder Strip stop", found, known: &["0"] });
    }
    let lists =
        ["normalizers", "pretokenizers", "decoders"].into_iter().filter_map(|key| part[key].as_array());
    lists.flatten().try_for_each(|part| check_kinds(what, Some(part), known))
}

/// The ids that a post-processor puts in front of a text and behind it. It is run here and not in the library, which
/// takes for granted that a template fits.
fn specials_around(part: Option<&Value>) -> Result<(Vec<u32>, Vec<u32>), TokenizerError> {
    const KNOWN: &[&str] = &["Sequence", "ByteLevel", "TemplateProcessing"];
    let Some(part) = part else { return Ok((vec![], vec![])) };
    match part["type"].as_str().unwrap_or("none") {
        // Only moves offsets.
        "ByteLevel" => Ok((vec![], vec![])),
        "Sequence" => {
            let (mut prefix, mut suffix) = (Vec::new(), Vec::new());
            for part in part["processors"].as_array().into_iter().flatten() {
                let (before, behind) = specials_around(Some(part))?;
                prefix.splice(0..0, before);
                suffix.extend(behind);
            }
            Ok((prefix, suffix))
        }
        "TemplateProcessing" => specials_of_template(part).ok_or_else(|| TokenizerError::Template {
            found: part["single"].to_string().chars().take(200).collect(),
        }),
        found => Err(TokenizerError::Kind { what: "post-processor", found: found.into(), known: KNOWN }),
    }
}

/// `single` of a template: special tokens, one sequence A, special tokens.
fn specials_of_template(template: &Value) -> Option<(Vec<u32>, Vec<u32>)> {
    let pieces = template["single"].as_array()?;
    let text = pieces.iter().position(|piece| piece["Sequence"]["id"] == "A")?;
    let ids = |pieces: &[Value]| {
        let mut all = Vec::new();
        for piece in pieces {
            let ids =
                template["special_tokens"].get(piece["SpecialToken"]["id"].as_str()?)?["ids"].as_array()?;
            for id in ids {
                all.push(u32::try_from(id.as_u64()?).ok()?);
            }
        }
        Some(all)
    };
    Some((ids(&pieces[..text])?, ids(&pieces[text + 1..])?))
}

/// A vocabulary: pieces and their ids.
#[derive(Default)]
struct VocabJson(Vocab);

impl<'de> Deserialize<'de> for VocabJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<VocabJson, D::Error> {
        struct VocabVisitor;
        impl<'de> Visitor<'de> for VocabVisitor {
            type Value = VocabJson;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of pieces and ids")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<VocabJson, A::Error> {
                let mut vocab = Vocab::default();
                while let Some((piece, id)) = map.next_entry()? {
                    vocab.insert(piece, id);
                }
                Ok(VocabJson(vocab))
            }
            // Another model's vocabulary; the model's type is what will be refused.
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<VocabJson, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(VocabJson::default())
            }
        }
        deserializer.deserialize_any(VocabVisitor)
    }
}

/// A merge: `"left right"` or `["left", "right"]`.
struct MergeJson(String, String);

impl<'de> Deserialize<'de> for MergeJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<MergeJson, D::Error> {
        struct MergeVisitor;
        impl<'de> Visitor<'de> for MergeVisitor {
            type Value = MergeJson;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a merge: two pieces in a list, or in a string with one space between")
            }
            fn visit_str<E: de::Error>(self, line: &str) -> Result<MergeJson, E> {
                let pair = line.split_once(' ').filter(|(_, right)| !right.contains(' '));
                let (left, right) = pair.ok_or_else(|| E::invalid_value(de::Unexpected::Str(line), &self))?;
                Ok(MergeJson(left.into(), right.into()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<MergeJson, A::Error> {
                let (left, right) = (seq.next_element()?, seq.next_element()?);
                let (Some(left), Some(right), None) = (left, right, seq.next_element::<IgnoredAny>()?) else {
                    return Err(de::Error::invalid_length(0, &self));
                };
                Ok(MergeJson(left, right))
            }
        }
        deserializer.deserialize_any(MergeVisitor)
    }
}

/// sentencepiece's sign for a space.
pub(crate) const SPACE: &str = "\u{2581}";

/// The byte that a `<0xNN>` piece stands for.
pub(crate) fn byte_token(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let upper = digits.len() == 2 && digits.bytes().all(|c| c.is_ascii_digit() || (b'A'..=b'F').contains(&c));
    upper.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The byte that a character stands for in byte-level pieces: printable Latin-1 stands for itself, the other 68
/// bytes for the characters from U+0100 on, in order (GPT-2's `bytes_to_unicode`).
fn byte_of_char(c: char) -> Option<u8> {
    const PRINTABLE: [std::ops::RangeInclusive<u8>; 3] = [b'!'..=b'~', 0xa1..=0xac, 0xae..=0xff];
    let is_printable = |byte: &u8| PRINTABLE.iter().any(|range| range.contains(byte));
    match u32::from(c) {
        code @ 0..=0xff => u8::try_from(code).ok().filter(is_printable),
        code => (0..=0xff).filter(|byte| !is_printable(byte)).nth((code - 0x100) as usize),
    }
}

/// How pieces spell bytes, from the `decoder` of a `tokenizer.json`.
fn alphabet(decoder: Option<&Value>) -> Alphabet {
    let Some(decoder) = decoder else { return Alphabet::Other };
    let steps = match decoder["decoders"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![decoder],
    };
    let (mut spaces, mut bytes, mut strip) = (false, false, false);
    for step in steps {
        match step["type"].as_str() {
            Some("ByteLevel") => return Alphabet::ByteLevel,
            Some("Replace") if step["pattern"]["String"] == SPACE && step["content"] == " " => spaces = true,
            Some("Metaspace") if step["replacement"] == SPACE => {
                (spaces, strip) = (true, step["prepend_scheme"] != "never");
            }
            Some("ByteFallback") => bytes = true,
            Some("Fuse") => {}
            Some("Strip") if step["content"] == " " && step["start"] == 1 && step["stop"] == 0 => {
                strip = true
            }
            _ => return Alphabet::Other,
        }
    }
    if spaces { Alphabet::Spaces { bytes, strip } } else { Alphabet::Other }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_characters() {
        // From GPT-2's table: a space is U+0120, a newline U+010A, 0xad the last of the moved ones.
        let spelled = [
            ('A', 0x41),
            ('\u{120}', b' '),
            ('\u{10a}', b'\n'),
            ('\u{100}', 0),
            ('é', 0xe9),
            ('\u{143}', 0xad),
        ];
        for (c, byte) in spelled {
            assert_eq!(byte_of_char(c), Some(byte), "{c:?}");
        }
        assert_eq!([' ', '\u{ad}', '\u{144}', '▁'].map(byte_of_char), [None; 4]);
        let mut all: Vec<u8> = ('\0'..='\u{143}').filter_map(byte_of_char).collect();
        all.sort_unstable();
        assert_eq!(all, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn byte_tokens() {
        assert_eq!(byte_token("<0x0A>"), Some(10));
        for piece in ["<0x0a>", "<0x+1>", "<0x>", "<0x123>", "0x0A", "<0x0A"] {
            assert_eq!(byte_token(piece), None, "{piece}");
        }
    }
}
