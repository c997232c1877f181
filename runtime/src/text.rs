//! Turns the bytes of tokens into text as they come.
//!
//! Neither the cuts between pieces nor their number change the text: it is `String::from_utf8_lossy` of all bytes, up to
//! the first stop string. Of several stop strings in it, the one that ends first counts, the longest if they end together.

use std::str;

/// Bytes in, text out: only text that no later byte can change.
#[derive(Clone, Debug)]
pub struct TextStream {
    stops: Vec<String>,
    /// The beginning of a character.
    bytes: Vec<u8>,
    /// Text that may be the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl TextStream {
    /// A stream that ends before any of `stops`. An empty one is no stop string.
    pub fn new(stops: &[String]) -> TextStream {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        TextStream { stops, bytes: Vec::new(), held: String::new(), stopped: false }
    }

    /// Takes the next bytes, gives the text that they settle. After a stop string there is none.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        if self.stopped {
            return String::new();
        }
        self.bytes.extend(bytes);
        take_characters(&mut self.bytes, &mut self.held);
        let settled = match self.find_stop() {
            Some(start) => start,
            None => self.held.len() - self.stop_begun_bytes(),
        };
        self.held.drain(..settled).collect()
    }

    /// Gives what is left when no more bytes come: what was held, and U+FFFD for the beginning of a character.
    pub fn finish(&mut self) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(&String::from_utf8_lossy(&self.bytes));
        self.bytes.clear();
        let end = self.find_stop().unwrap_or(self.held.len());
        self.held.truncate(end);
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string was found.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Where in `held` the stop string begins that ends first, if there is one.
    fn find_stop(&mut self) -> Option<usize> {
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop)?, stop.len())));
        let start = found.min_by_key(|&(start, len)| (start + len, start))?.0;
        self.stopped = true;
        Some(start)
    }

    /// Length of the longest end of `held` that is the beginning of a stop string.
    fn stop_begun_bytes(&self) -> usize {
        let begun = |stop: &String| {
            let cuts = stop.char_indices().map(|(cut, _)| cut);
            cuts.rev().find(|&cut| self.held.ends_with(&stop[..cut])).expect("every text ends with nothing")
        };
        self.stops.iter().map(begun).max().unwrap_or(0)
    }
}

/// Moves all whole characters from `bytes` to `text`, and U+FFFD for each sequence that can become none.
fn take_characters(bytes: &mut Vec<u8>, text: &mut String) {
    let mut taken = 0;
    loop {
        let rest = &bytes[taken..];
        let (valid, bad) = match str::from_utf8(rest) {
            Ok(_) => (rest.len(), None),
            Err(error) => (error.valid_up_to(), error.error_len()),
        };
        text.push_str(str::from_utf8(&rest[..valid]).expect("valid up to here"));
        taken += valid;
        let Some(bad) = bad else { break };
        text.push(char::REPLACEMENT_CHARACTER);
        taken += bad;
    }
    bytes.drain(..taken);
}
