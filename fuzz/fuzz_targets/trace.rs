//! Any text as a trace: what is read comes back from its own text, and can be compared with itself.

#![no_main]

use libfuzzer_sys::fuzz_target;
use llamac::compare::trace::part::part;
use llamac::compare::trace::text::parse;

fuzz_target!(|text: &str| {
    if let Ok(trace) = parse(text) {
        let printed = trace.to_string();
        assert_eq!(parse(&printed).expect("its own text").to_string(), printed);
        let _ = part(&trace, &trace, &mut |_, _| Ok(None));
    }
});
