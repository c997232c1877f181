//! The words of graph text.

use super::{ParseError, ParseFault, Result};
use crate::print;

/// What the grammar is made of.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind<'a> {
    /// `mul`, `compare.le`, `T`.
    Word(&'a str),
    /// `%x`.
    Value(&'a str),
    /// `@l0.qkv`.
    Name(&'a str),
    /// Digits, perhaps with a fraction and an exponent; no sign.
    Number(&'a str),
    /// What the quotes hold.
    Text(String),
    /// A comment on a line of its own.
    Remark(&'a str),
    /// `..`
    Range,
    /// Any other single character of the grammar.
    Sign(char),
    /// The end of the text.
    End,
}

#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) line: usize,
    pub(super) column: usize,
}

impl Place {
    pub(super) fn fault(self, fault: ParseFault) -> ParseError {
        ParseError { line: self.line, column: self.column, fault }
    }
}

pub(super) struct Token<'a> {
    pub(super) kind: Kind<'a>,
    pub(super) place: Place,
}

impl Token<'_> {
    /// As a message shows it.
    pub(super) fn show(&self) -> String {
        match &self.kind {
            Kind::Word(text) | Kind::Number(text) => format!("`{text}`"),
            Kind::Value(name) => format!("`%{name}`"),
            Kind::Name(name) => format!("`@{name}`"),
            Kind::Text(text) => print::quoted(text),
            Kind::Remark(_) => "a comment".to_string(),
            Kind::Range => "`..`".to_string(),
            Kind::Sign(c) => format!("`{c}`"),
            Kind::End => "the end of the text".to_string(),
        }
    }

    pub(super) fn unexpected(&self, expected: &'static str) -> ParseError {
        self.place.fault(ParseFault::Expected { expected, found: self.show() })
    }
}

/// Cuts text into words; the last one is [`Kind::End`].
pub(super) fn tokens(text: &str) -> Result<Vec<Token<'_>>> {
    let mut tokens = Vec::new();
    let mut place = Place { line: 1, column: 1 };
    let mut rest = text;
    let mut line_is_blank = true;
    while let Some(first) = rest.chars().next() {
        let here = place;
        let while_in = |from: usize, keep: fn(char) -> bool| {
            rest[from..].find(|c| !keep(c)).map_or(rest.len(), |end| from + end)
        };
        let (kind, bytes) = match first {
            '\n' => {
                place = Place { line: place.line + 1, column: 1 };
                rest = &rest[1..];
                line_is_blank = true;
                continue;
            }
            c if c.is_whitespace() => {
                place.column += 1;
                rest = &rest[c.len_utf8()..];
                continue;
            }
            '/' if rest.starts_with("//") => {
                let end = while_in(2, |c| c != '\n');
                let text = rest[2..end].strip_suffix('\r').unwrap_or(&rest[2..end]);
                let remark = Kind::Remark(text.strip_prefix(' ').unwrap_or(text));
                (line_is_blank.then_some(remark), end)
            }
            '"' => {
                let (text, end) = text_in_quotes(rest, here)?;
                (Some(Kind::Text(text)), end)
            }
            '.' if rest.starts_with("..") => (Some(Kind::Range), 2),
            '%' | '@' if rest[1..].starts_with(print::is_name_char) => {
                let end = while_in(1, print::is_name_char);
                let name = &rest[1..end];
                (Some(if first == '%' { Kind::Value(name) } else { Kind::Name(name) }), end)
            }
            c if c.is_ascii_digit() => {
                let end = number_end(rest);
                (Some(Kind::Number(&rest[..end])), end)
            }
            c if c.is_ascii_alphabetic() || c == '_' => {
                let end = while_in(0, |c| c.is_ascii_alphanumeric() || c == '_' || c == '.');
                (Some(Kind::Word(&rest[..end])), end)
            }
            c if "(){}[]=:,+-*/%@".contains(c) => (Some(Kind::Sign(c)), 1),
            c => return Err(here.fault(ParseFault::Character(c))),
        };
        line_is_blank = false;
        tokens.extend(kind.map(|kind| Token { kind, place: here }));
        for c in rest[..bytes].chars() {
            place = match c {
                '\n' => Place { line: place.line + 1, column: 1 },
                _ => Place { line: place.line, column: place.column + 1 },
            };
        }
        rest = &rest[bytes..];
    }
    tokens.push(Token { kind: Kind::End, place });
    Ok(tokens)
}

/// Bytes of the number that `text` begins with. `1..64` begins with `1`, `1e-5` and `0.5` are one number.
fn number_end(text: &str) -> usize {
    let digits = |from: usize| text[from..].bytes().take_while(u8::is_ascii_digit).count();
    let mut end = digits(0);
    if text[end..].starts_with('.') && digits(end + 1) > 0 {
        end += 1 + digits(end + 1);
    }
    if text[end..].starts_with(['e', 'E']) {
        let sign = usize::from(text[end + 1..].starts_with(['+', '-']));
        if digits(end + 1 + sign) > 0 {
            end += 1 + sign + digits(end + 1 + sign);
        }
    }
    end
}

/// What the quotes that `text` begins with hold, and the bytes that they take.
fn text_in_quotes(text: &str, place: Place) -> Result<(String, usize)> {
    let mut out = String::new();
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((out, at + 1)),
            '\\' => match chars.next() {
                Some((_, escaped @ ('"' | '\\'))) => out.push(escaped),
                Some((_, 'u')) => {
                    let code: String =
                        chars.by_ref().map(|(_, c)| c).take_while(|&c| c != '}').take(9).collect();
                    let code = code.strip_prefix('{').and_then(|hex| u32::from_str_radix(hex, 16).ok());
                    out.push(code.and_then(char::from_u32).ok_or_else(|| place.fault(ParseFault::Escape))?);
                }
                _ => return Err(place.fault(ParseFault::Escape)),
            },
            c => out.push(c),
        }
    }
    Err(place.fault(ParseFault::OpenQuotes))
}
