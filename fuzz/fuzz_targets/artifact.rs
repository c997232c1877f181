//! Any bytes as an artifact: as they are, and as the one section of a right one, its plan.

#![no_main]

use libfuzzer_sys::fuzz_target;
use runtime::artifact::{Artifact, MAGIC};
use runtime::device::Device;
use runtime::manifest::Manifest;
use runtime::null::Null;
use std::path::Path;
use std::sync::Arc;

fuzz_target!(|bytes: &[u8]| {
    let file = [&MAGIC[..], bytes].concat();
    let Ok(artifact) = Artifact::from_bytes(Path::new("m.llamac"), Arc::new(file)) else { return };
    let _ = artifact.manifest::<Manifest>();
    let _ = Null.load(&artifact);
    let _ = artifact.verify();
});
