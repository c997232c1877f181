//! Hugging Face directories: `config.json`, safetensors files, and the files around a tokenizer.
//!
//! | file | needed | holds |
//! |---|---|---|
//! | `config.json` | yes | the config |
//! | `model.safetensors`, or `model.safetensors.index.json` and its shards | yes | tensors |
//! | `generation_config.json` | no | the tokens that end a text, which then count instead of the config's |
//! | `tokenizer.json`, else `tokenizer.model` | no | the tokenizer |
//! | `tokenizer_config.json` | no | chat template; whether BOS and EOS are added |
//! | `chat_template.jinja` | no | the chat template, which then counts instead of the other |

use std::io;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde_json::Value;

use crate::checkpoint::{FileBytes, Format, OpenFile, Parts};
use crate::config::{self, Config};
use crate::error::ReadError;
use crate::tokenizer::{Origin, Tokenizer, TokenizerError, TokenizerSource};
use crate::{json, safetensors, sentencepiece, tokenizer_json};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Reads a directory.
pub(crate) fn read(dir: &Path, open: OpenFile) -> Result<Parts, ReadError> {
    let file = dir.join("config.json");
    let Some(bytes) = optional(&file, open)? else {
        let expected = "config.json, or a .gguf file";
        return Err(ReadError::NoCheckpoint {
            file: dir.into(),
            found: "a directory without config.json".into(),
            expected,
        });
    };
    let (mut config, ignored_keys) = Config::from_hf_json(text(&file, &bytes)?, &file)?;

    let file = dir.join("generation_config.json");
    if let Some(bytes) = optional(&file, open)? {
        let mut keys = json::object((*bytes).as_ref(), &file)?;
        if let Some(value) = keys.swap_remove("eos_token_id").filter(|value| !value.is_null()) {
            config.eos = config::token_ids(&value).ok_or_else(|| ReadError::Value {
                file: file.clone(),
                key: "eos_token_id".into(),
                found: config::shown(&value),
                expected: "a token id or a list of them".into(),
            })?;
            config.check(&file)?;
        }
    }

    let files = weights(dir, open)?;
    let settings = Settings::read(dir, open)?;
    let tokenizer = tokenizer(dir, open, &settings)?;
    let chat_template = chat_template(dir, open, &settings)?;
    Ok(Parts {
        config,
        format: Format::HuggingFace,
        ignored_keys,
        tokenizer,
        chat_template,
        files,
        pairs: false,
    })
}

/// The bytes of a file that need not be there.
fn optional(file: &Path, open: OpenFile) -> Result<Option<FileBytes>, ReadError> {
    match open(file) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ReadError::Io { file: file.into(), source }),
    }
}

fn text<'a>(file: &Path, bytes: &'a FileBytes) -> Result<&'a str, ReadError> {
    let utf8 = str::from_utf8((**bytes).as_ref());
    utf8.map_err(|_| ReadError::Utf8 { file: file.into(), what: "the file".into() })
}

type Weights = Vec<(PathBuf, FileBytes, Vec<crate::checkpoint::StoredTensor>)>;

/// The safetensors files with their tensors. The single file counts where both forms are there, as in transformers.
fn weights(dir: &Path, open: OpenFile) -> Result<Weights, ReadError> {
    let file = dir.join(SINGLE);
    if let Some(bytes) = optional(&file, open)? {
        let tensors = safetensors::read(&file, (*bytes).as_ref())?;
        return Ok(vec![(file, bytes, tensors)]);
    }
    let index = dir.join(INDEX);
    let Some(bytes) = optional(&index, open)? else {
        let expected = "model.safetensors or model.safetensors.index.json";
        let found = "a directory without either".into();
        return Err(ReadError::NoCheckpoint { file: dir.into(), found, expected });
    };

    let mut shards: IndexMap<String, Vec<String>> = IndexMap::new();
    for (tensor, shard) in weight_map(&index, (*bytes).as_ref())? {
        shards.entry(shard).or_default().push(tensor);
    }
    let mut files = Vec::new();
    for (shard, names) in shards {
        let file = dir.join(&shard);
        let Some(bytes) = optional(&file, open)? else {
            return Err(ReadError::MissingShard { file, tensor: names[0].clone() });
        };
        let tensors = safetensors::read(&file, (*bytes).as_ref())?;
        let there: std::collections::HashSet<&str> =
            tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        if let Some(name) = names.iter().find(|name| !there.contains(name.as_str())) {
            return Err(ReadError::NotInShard { file, tensor: name.clone() });
        }
        files.push((file, bytes, tensors));
    }
    Ok(files)
}

/// Tensor names and the shards that the index puts them in.
fn weight_map(index: &Path, bytes: &[u8]) -> Result<Vec<(String, String)>, ReadError> {
    let bad = |key: &str, value: &Value, expected: &str| ReadError::Value {
        file: index.into(),
        key: key.into(),
        found: config::shown(value),
        expected: expected.into(),
    };
    let mut keys = json::object(bytes, index)?;
    let Some(map) = keys.swap_remove("weight_map") else {
        let expected = "an object of tensor names and file names";
        return Err(ReadError::MissingKey { file: index.into(), key: "weight_map".into(), expected });
    };
    let Value::Object(map) = map else { return Err(bad("weight_map", &map, "an object")) };
    let shard = |(tensor, value): (String, Value)| {
        // A name and no path: an index must not lead out of its directory.
        let is_name = |name: &&str| !name.contains(['/', '\\']) && name.ends_with(".safetensors");
        match value.as_str().filter(is_name) {
            Some(name) => Ok((tensor, name.to_owned())),
            None => Err(bad(
                &format!("weight_map.{tensor}"),
                &value,
                "the name of a .safetensors file beside the index",
            )),
        }
    };
    map.into_iter().map(shard).collect()
}

/// What `tokenizer_config.json` says.
#[derive(Default)]
struct Settings {
    add_bos: Option<bool>,
    add_eos: Option<bool>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    chat_template: Option<String>,
}

impl Settings {
    fn read(dir: &Path, open: OpenFile) -> Result<Settings, ReadError> {
        let file = dir.join("tokenizer_config.json");
        let Some(bytes) = optional(&file, open)? else { return Ok(Settings::default()) };
        let keys = json::object((*bytes).as_ref(), &file)?;
        let get = |key: &str| keys.get(key).filter(|value| !value.is_null());
        // A token is its text, or an object with the text in `content`.
        let token =
            |key: &str| get(key).and_then(|v| v.as_str().or(v["content"].as_str())).map(str::to_owned);
        // LlamaTokenizer adds BOS unless told not to; other classes do what tokenizer.json says unless told.
        let llama = matches!(
            get("tokenizer_class").and_then(Value::as_str),
            Some("LlamaTokenizer" | "LlamaTokenizerFast")
        );
        let said = get("add_bos_token").is_some() || get("add_eos_token").is_some();
        let flag = |key: &str, default: bool| {
            get(key).and_then(Value::as_bool).or((llama || said).then_some(default))
        };
        let chat_template = match get("chat_template") {
            Some(Value::String(template)) => Some(template.clone()),
            // Several templates by name.
            Some(Value::Array(named)) => {
                let default = named.iter().find(|entry| entry["name"] == "default");
                default.and_then(|entry| entry["template"].as_str()).map(str::to_owned)
            }
            _ => None,
        };
        Ok(Settings {
            add_bos: flag("add_bos_token", true),
            add_eos: flag("add_eos_token", false),
            bos_token: token("bos_token"),
            eos_token: token("eos_token"),
            chat_template,
        })
    }
}

/// The tokenizer, with BOS and EOS put around texts as the settings say.
fn tokenizer(dir: &Path, open: OpenFile, settings: &Settings) -> Result<Option<TokenizerSource>, ReadError> {
    let file = dir.join("tokenizer.json");
    if let Some(bytes) = optional(&file, open)? {
        let source = from_json((*bytes).as_ref(), settings);
        return source.map(Some).map_err(|source| ReadError::Tokenizer { file, source });
    }
    let file = dir.join("tokenizer.model");
    if let Some(bytes) = optional(&file, open)? {
        let source = from_sentencepiece((*bytes).as_ref(), settings);
        return source.map(Some).map_err(|source| ReadError::Tokenizer { file, source });
    }
    Ok(None)
}

fn from_json(json: &[u8], settings: &Settings) -> Result<TokenizerSource, TokenizerError> {
    let tokenizer = Tokenizer::from_json(json)?;
    let source = |json| Ok(TokenizerSource { json, origin: Origin::Json });
    let (Some(add_bos), Some(add_eos)) = (settings.add_bos, settings.add_eos) else {
        return source(json.to_vec());
    };
    let bos = settings.bos_token.as_deref().filter(|_| add_bos);
    let eos = settings.eos_token.as_deref().filter(|_| add_eos);
    // The text stays byte for byte as it is where it already says so.
    let wanted: Vec<u32> = bos.iter().chain(&eos).filter_map(|token| tokenizer.id(token)).collect();
    if tokenizer.encode("", true)? == wanted {
        return source(json.to_vec());
    }
    source(tokenizer_json::with_specials(json, bos, eos)?)
}

fn from_sentencepiece(model: &[u8], settings: &Settings) -> Result<TokenizerSource, TokenizerError> {
    let mut pieces = sentencepiece::read(model)?;
    let id = |token: &Option<String>, default: Option<u32>| match token {
        Some(token) => pieces.pieces.iter().position(|piece| piece.text == *token).map(|id| id as u32),
        None => default,
    };
    let (bos, eos) = (id(&settings.bos_token, pieces.bos), id(&settings.eos_token, None));
    pieces.bos = bos.filter(|_| settings.add_bos.unwrap_or(true));
    pieces.eos = eos.filter(|_| settings.add_eos.unwrap_or(false));
    tokenizer_json::from_pieces(&pieces, Origin::SentencePiece)
}

fn chat_template(dir: &Path, open: OpenFile, settings: &Settings) -> Result<Option<String>, ReadError> {
    let file = dir.join("chat_template.jinja");
    match optional(&file, open)? {
        Some(bytes) => Ok(Some(text(&file, &bytes)?.to_owned())),
        None => Ok(settings.chat_template.clone()),
    }
}
