//! Any text as PTX: what is read can be made ready for the emulator.

#![no_main]

use libfuzzer_sys::fuzz_target;
use runtime::emulator::Program;
use runtime::ptx::Module;

fuzz_target!(|text: &str| {
    if let Ok(module) = Module::parse(text) {
        module.kernels.iter().for_each(|kernel| _ = Program::new(kernel));
    }
});
