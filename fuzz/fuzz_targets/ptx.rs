//! Any text as PTX: its instructions can be listed, and what is read can be made ready for the emulator.

#![no_main]

use libfuzzer_sys::fuzz_target;
use runtime::emulator::Program;
use runtime::ptx::{Module, opcodes};

fuzz_target!(|text: &str| {
    let _ = opcodes(text);
    if let Ok(module) = Module::parse(text) {
        module.kernels.iter().for_each(|kernel| _ = Program::new(kernel));
    }
});
