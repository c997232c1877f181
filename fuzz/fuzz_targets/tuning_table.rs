//! Any text as a tuning table: read, and written as it was read.

#![no_main]

use libfuzzer_sys::fuzz_target;
use llamac::tune::table::{Choices, Table};

fuzz_target!(|text: &str| {
    let Ok(table) = Table::parse(text) else { return };
    let _ = Choices::of(table.records.iter());
    let again = Table::parse(&table.to_string()).expect("what was written can be read");
    assert_eq!(again.to_string(), table.to_string());
});
