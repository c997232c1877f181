//! PTX text as tokens with their lines.

use super::PtxError;

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A name, a directive or an instruction: `%r1`, `.reg`, `ld.global.b32`, `$L__BB0_1`.
    Word,
    /// A number: `12`, `0x1F`, `0f3F800000`, `7.4`.
    Number,
    /// A string, with its quotes.
    Text,
    /// One character.
    Sign,
    /// The end of the text.
    End,
}

/// A token.
#[derive(Clone, Copy, Debug)]
pub struct Token<'t> {
    /// What it is.
    pub kind: Kind,
    /// Its text.
    pub text: &'t str,
    /// Its line, from 1.
    pub line: u32,
}

impl Token<'_> {
    /// For messages.
    pub fn shown(&self) -> String {
        match self.kind {
            Kind::End => "the end of the text".into(),
            Kind::Word | Kind::Number | Kind::Text | Kind::Sign => {
                let short: String = self.text.chars().take(60).collect();
                format!("`{short}`")
            }
        }
    }
}

/// All tokens, with one [`Kind::End`] at the end.
pub fn tokens(text: &str) -> Result<Vec<Token<'_>>, PtxError> {
    let bytes = text.as_bytes();
    let (mut out, mut at, mut line) = (Vec::new(), 0, 1);
    let syntax = |line, found: &str, expected: &str| PtxError::Syntax {
        line,
        found: found.to_string(),
        expected: expected.to_string(),
    };
    while let Some(&first) = bytes.get(at) {
        let begin = at;
        let kind = match first {
            b'\n' => {
                line += 1;
                at += 1;
                continue;
            }
            // LLVM ends its text with a zero byte.
            b' ' | b'\t' | b'\r' | 0 => {
                at += 1;
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'/') => {
                at += bytes[at..].iter().position(|&b| b == b'\n').unwrap_or(bytes.len() - at);
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'*') => {
                let Some(length) = text[at + 2..].find("*/") else {
                    return Err(syntax(line, "the end of the text", "`*/`"));
                };
                line += text[at + 2..][..length].matches('\n').count() as u32;
                at += length + 4;
                continue;
            }
            b'"' => {
                let line_end = text[at..].find('\n').unwrap_or(text.len() - at);
                let Some(length) = text[at + 1..at + line_end].find('"') else {
                    return Err(syntax(line, "the end of the line", "`\"`"));
                };
                at += length + 2;
                Kind::Text
            }
            b'0'..=b'9' => {
                at += bytes[at..]
                    .iter()
                    .position(|&b| !b.is_ascii_alphanumeric() && b != b'.')
                    .unwrap_or(bytes.len() - at);
                Kind::Number
            }
            _ if starts_word(first) => {
                at += 1;
                loop {
                    match bytes.get(at) {
                        Some(&b) if starts_word(b) || b.is_ascii_digit() => at += 1,
                        Some(b':') if bytes.get(at + 1) == Some(&b':') => at += 2,
                        _ => break,
                    }
                }
                Kind::Word
            }
            _ if first.is_ascii() => {
                at += 1;
                Kind::Sign
            }
            _ => {
                let found = text[at..].chars().next().map(|c| format!("`{c}`")).unwrap_or_default();
                return Err(syntax(line, &found, "PTX, which is ASCII"));
            }
        };
        let Some(token) = text.get(begin..at) else {
            return Err(syntax(line, "a character outside ASCII", "PTX, which is ASCII"));
        };
        out.push(Token { kind, text: token, line });
    }
    out.push(Token { kind: Kind::End, text: "", line });
    Ok(out)
}

fn starts_word(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || matches!(byte, b'_' | b'$' | b'%' | b'.')
}
