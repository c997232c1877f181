//! Checks that could not be made here, and why.

use std::sync::{Mutex, PoisonError};

static SKIPPED: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Prints that a check is skipped, and counts it.
pub fn skip(what: &str, why: &str) {
    println!("skipped: {what}: {why}");
    SKIPPED.lock().unwrap_or_else(PoisonError::into_inner).push(what.to_string());
}

/// The last line: how many were skipped.
pub fn print_all() {
    let skipped = SKIPPED.lock().unwrap_or_else(PoisonError::into_inner);
    println!("{} checks skipped: {}", skipped.len(), skipped.join(", "));
}
