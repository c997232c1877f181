//! Any bytes as a safetensors file.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|bytes: &[u8]| {
    // Headers are rare among random bytes: what does not begin with a length gets the right one.
    let with_length = [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat();
    for file in [bytes, &with_length] {
        let _ = models::safetensors::read(Path::new("m.safetensors"), file);
    }
});
