//! Any text as machine code of a GPU: what is read has blocks and loops.

#![no_main]

use libfuzzer_sys::fuzz_target;
use llamac::profile::gpus::GPUS;
use llamac::profile::steady::Steady;
use llamac::sass::{parse, rules};

fuzz_target!(|text: &str| {
    for code in parse(text).unwrap_or_default() {
        let _ = rules::specialised(&code).and_then(|()| rules::pipelined(&code));
        let _ = Steady::of(&code, 384, 1.0, &GPUS[0]);
    }
});
