//! Streams of bytes to streams of text.

use proptest::prelude::*;
use runtime::text::TextStream;

/// What the stream gives for each piece, and at the end.
fn stream(pieces: &[&[u8]], stops: &[&str]) -> (Vec<String>, bool) {
    let stops: Vec<String> = stops.iter().map(|stop| stop.to_string()).collect();
    let mut stream = TextStream::new(&stops);
    let mut texts: Vec<String> = pieces.iter().map(|piece| stream.push(piece)).collect();
    texts.push(stream.finish());
    (texts, stream.stopped())
}

fn check(pieces: &[&[u8]], stops: &[&str], texts: &[&str], stopped: bool) {
    assert_eq!(stream(pieces, stops), (texts.iter().map(|text| text.to_string()).collect(), stopped));
}

#[test]
fn characters_are_never_split() {
    check(&[b"a\xf0\x9f", b"\x98", b"\x80b"], &[], &["a", "", "\u{1f600}b", ""], false);
}

#[test]
fn invalid_bytes_become_replacements() {
    // 0xff can begin nothing; 0xe2 0x82 begins something that `a` ends; the last is cut off by the end.
    check(
        &[b"\xff", b"\xe2\x82", b"a", b"\xe2\x82"],
        &[],
        &["\u{fffd}", "", "\u{fffd}a", "", "\u{fffd}"],
        false,
    );
}

#[test]
fn what_may_begin_a_stop_string_is_held() {
    check(&[b"one <", b"end", b"less> two"], &["<end>"], &["one ", "", "<endless> two", ""], false);
    check(&[b"one <", b"end", b"> two", b"three"], &["<end>"], &["one ", "", "", "", ""], true);
    check(&[b"one <en"], &["<end>"], &["one ", "<en"], false);
    // The held `a` of `aa` goes when the next `a` takes its place.
    check(&[b"xa", b"b", b"aa", b"b"], &["aab"], &["x", "ab", "", "", ""], true);
    check(&[b"aaa", b"b"], &["aab"], &["a", "", ""], true);
}

#[test]
fn the_stop_that_ends_first_counts() {
    check(&[b"abcd"], &["abcd", "bc"], &["a", ""], true);
    check(&[b"ab", b"cd"], &["abcd", "bc"], &["", "a", ""], true);
    check(&[b"abcd"], &["cd", "bcd"], &["a", ""], true);
}

#[test]
fn empty_stop_strings_are_none() {
    check(&[b"ab"], &["", "b"], &["a", ""], true);
    check(&[b"ab"], &[""], &["ab", ""], false);
}

#[test]
fn a_stop_string_may_lie_in_what_the_end_settles() {
    check(&[b"a\xe2"], &["\u{fffd}"], &["a", ""], true);
}

/// The definition: decode everything, then look for the stop string that ends first.
fn whole(bytes: &[u8], stops: &[String]) -> (String, bool) {
    let text = String::from_utf8_lossy(bytes).into_owned();
    for end in text.char_indices().map(|(at, char)| at + char.len_utf8()) {
        let ending = stops.iter().filter(|stop| !stop.is_empty() && text[..end].ends_with(*stop));
        if let Some(longest) = ending.map(|stop| stop.len()).max() {
            return (text[..end - longest].into(), true);
        }
    }
    (text, false)
}

/// Few letters, so that stop strings are hit, and the pieces of characters, whole and broken.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        6 => Just(b"a".to_vec()),
        6 => Just(b"b".to_vec()),
        3 => Just("é".as_bytes().to_vec()),
        3 => Just("€".as_bytes().to_vec()),
        2 => Just("\u{1f600}".as_bytes().to_vec()),
        2 => any::<u8>().prop_map(|byte| vec![byte]),
        2 => prop::sample::select(vec![0x80, 0xc3, 0xe2, 0xed, 0xf0, 0xf4]).prop_map(|byte| vec![byte]),
    ];
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

fn stops() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec("[ab]{0,4}|[abé€\u{fffd}]{1,3}", 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_stream_is_the_whole(bytes in bytes(), stops in stops(), cuts in prop::collection::vec(1..6usize, 1..60)) {
        let mut stream = TextStream::new(&stops);
        let mut text = String::new();
        let mut rest = &bytes[..];
        for cut in cuts.into_iter().cycle() {
            let (piece, more) = rest.split_at(cut.min(rest.len()));
            text.push_str(&stream.push(piece));
            rest = more;
            if rest.is_empty() {
                break;
            }
        }
        text.push_str(&stream.finish());
        prop_assert_eq!((text, stream.stopped()), whole(&bytes, &stops));
    }
}
