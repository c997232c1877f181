//! Ctrl-C, and what ends a program politely: ends the program at once, except inside [`guarded`], where the work ends by itself and tidies up.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use super::error::Exit;

static GUARDED: AtomicBool = AtomicBool::new(false);
static PRESSED: AtomicBool = AtomicBool::new(false);
static INSTALL: Once = Once::new();

/// Runs `work`, which asks [`pressed`] now and then. A second Ctrl-C ends the program all the same.
pub fn guarded<T>(work: impl FnOnce() -> T) -> T {
    INSTALL.call_once(|| {
        // Without a handler Ctrl-C ends the program at once, which is no worse than before.
        let _ = ctrlc::set_handler(|| {
            if !GUARDED.load(Ordering::SeqCst) || PRESSED.swap(true, Ordering::SeqCst) {
                std::process::exit(Exit::Interrupted as i32);
            }
        });
    });
    PRESSED.store(false, Ordering::SeqCst);
    GUARDED.store(true, Ordering::SeqCst);
    let done = work();
    GUARDED.store(false, Ordering::SeqCst);
    done
}

/// Was Ctrl-C pressed since [`guarded`] began?
pub fn pressed() -> bool {
    PRESSED.load(Ordering::SeqCst)
}
