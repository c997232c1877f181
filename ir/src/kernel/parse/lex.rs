//! The tokens of kernels' text.

use super::{ParseError, ParseErrorKind, Result, is_name_char};

/// What the grammar is made of.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    /// `for`, `f32x16`, `dot.bf16`.
    Word(String),
    /// `%x`, without the sign.
    Value(String),
    /// `@x`, without the sign.
    At(String),
    Int(u64),
    Float(f64),
    Text(String),
    Sign(&'static str),
    End,
}

impl Token {
    pub(super) fn describe(&self) -> String {
        match self {
            Token::Word(word) => format!("`{word}`"),
            Token::Value(name) => format!("`%{name}`"),
            Token::At(name) => format!("`@{name}`"),
            Token::Int(x) => format!("`{x}`"),
            Token::Float(x) => format!("`{x:?}`"),
            Token::Text(text) => format!("{text:?}"),
            Token::Sign(sign) => format!("`{sign}`"),
            Token::End => "the end".to_string(),
        }
    }
}

pub(super) struct Place {
    pub(super) token: Token,
    pub(super) line: usize,
    pub(super) column: usize,
}

/// Longest first: `..` is not two dots.
const SIGNS: [&str; 16] = ["..", "+=", "{", "}", "(", ")", "[", "]", ",", ":", "=", "+", "-", "*", "/", "%"];

pub(super) fn lex(text: &str) -> Result<Vec<Place>> {
    let mut tokens = Vec::new();
    let (mut rest, mut line, mut column) = (text, 1, 1);
    loop {
        let blank = rest.len() - rest.trim_start().len();
        let comment = if rest[blank..].starts_with("//") {
            rest[blank..].find('\n').unwrap_or(rest.len() - blank)
        } else {
            0
        };
        let (skipped, after) = rest.split_at(blank + comment);
        advance(skipped, &mut line, &mut column);
        rest = after;
        if comment > 0 {
            continue;
        }
        let fail = |kind| Err(ParseError { line, column, kind });
        let Some(first) = rest.chars().next() else {
            tokens.push(Place { token: Token::End, line, column });
            return Ok(tokens);
        };
        let (token, length) = match first {
            '%' | '@' if rest[1..].starts_with(is_name_char) => {
                let length = name_length(&rest[1..]);
                let name = rest[1..=length].to_string();
                (if first == '%' { Token::Value(name) } else { Token::At(name) }, length + 1)
            }
            '0'..='9' => match lex_number(rest) {
                Some(found) => found,
                None => return fail(ParseErrorKind::Range),
            },
            '"' => match lex_string(rest) {
                Some(found) => found,
                None => return fail(ParseErrorKind::OpenString),
            },
            c if is_name_char(c) => {
                let length = name_length(rest);
                (Token::Word(rest[..length].to_string()), length)
            }
            c => match SIGNS.iter().find(|sign| rest.starts_with(**sign)) {
                Some(sign) => (Token::Sign(sign), sign.len()),
                None => return fail(ParseErrorKind::Character(c)),
            },
        };
        tokens.push(Place { token, line, column });
        advance(&rest[..length], &mut line, &mut column);
        rest = &rest[length..];
    }
}

fn advance(text: &str, line: &mut usize, column: &mut usize) {
    for c in text.chars() {
        if c == '\n' {
            (*line, *column) = (*line + 1, 1);
        } else {
            *column += 1;
        }
    }
}

/// Bytes of the name that `text` begins with. A dot belongs to it if a name goes on behind: `lo..hi` are two.
fn name_length(text: &str) -> usize {
    let mut length = 0;
    loop {
        let part = text[length..].find(|c| !is_name_char(c)).unwrap_or(text.len() - length);
        length += part;
        let goes_on = text[length..].strip_prefix('.').is_some_and(|rest| rest.starts_with(is_name_char));
        if !goes_on {
            return length;
        }
        length += 1;
    }
}

/// `12`, `0.5`, `1e-30`.
fn lex_number(text: &str) -> Option<(Token, usize)> {
    let digits = |from: usize| text[from..].find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len() - from);
    let whole = digits(0);
    let mut length = whole;
    if text[length..].starts_with('.') && digits(length + 1) > 0 {
        length += 1 + digits(length + 1);
    }
    if text[length..].starts_with('e') {
        let sign = usize::from(text[length + 1..].starts_with(['-', '+']));
        let exponent = digits(length + 1 + sign);
        if exponent > 0 {
            length += 1 + sign + exponent;
        }
    }
    let token = if length == whole {
        Token::Int(text[..length].parse().ok()?)
    } else {
        Token::Float(text[..length].parse().ok()?)
    };
    Some((token, length))
}

fn lex_string(text: &str) -> Option<(Token, usize)> {
    let mut out = String::new();
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((Token::Text(out), at + 1)),
            '\\' => match chars.next()?.1 {
                'n' => out.push('\n'),
                other => out.push(other),
            },
            other => out.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::is_name;
    use super::*;

    #[test]
    fn names_end_before_two_dots() {
        assert_eq!(name_length("lo.1..hi"), 4);
        assert_eq!(name_length("k."), 1);
        assert!(is_name("acc.1") && !is_name("acc.") && !is_name("") && !is_name("a b"));
    }

    #[test]
    fn numbers() {
        assert_eq!(lex_number("0..4"), Some((Token::Int(0), 1)));
        assert_eq!(lex_number("1e-7)"), Some((Token::Float(1e-7), 4)));
        assert_eq!(lex_number("1.5e300"), Some((Token::Float(1.5e300), 7)));
        assert_eq!(lex_number("99999999999999999999"), None);
    }
}
