//! JSON objects read strictly: keys in order, no key twice.
//!
//! `serde_json::Map` keeps the last of two equal keys, so a file could show one value to one reader and
//! another to the next.

use std::fmt;
use std::path::Path;

use indexmap::IndexMap;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::error::ReadError;

/// Entries of a JSON object as they stand in the file.
struct Entries<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Entries<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries<T>, D::Error> {
        struct EntriesVisitor<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for EntriesVisitor<T> {
            type Value = Entries<T>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<T>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(EntriesVisitor(std::marker::PhantomData))
    }
}

/// The entries of the JSON object that `bytes` hold, duplicates among them, in order.
pub(crate) fn entries<T: DeserializeOwned>(bytes: &[u8], file: &Path) -> Result<Vec<(String, T)>, ReadError> {
    let parsed: Result<Entries<T>, _> = serde_json::from_slice(bytes);
    parsed.map(|entries| entries.0).map_err(|source| ReadError::Json { file: file.into(), source })
}

/// The JSON object that `bytes` hold; a key that stands twice is an error.
pub(crate) fn object(bytes: &[u8], file: &Path) -> Result<IndexMap<String, Value>, ReadError> {
    let mut map = IndexMap::new();
    for (key, value) in entries(bytes, file)? {
        if map.contains_key(&key) {
            return Err(ReadError::DuplicateKey { file: file.into(), key });
        }
        map.insert(key, value);
    }
    Ok(map)
}
