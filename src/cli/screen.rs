//! What a user sees: columns, units, JSON, notes.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;
use std::fmt::Display;
use std::io::{self, Write};

use super::error::CliError;

/// How results are told.
#[derive(Clone, Copy, Debug)]
pub struct Screen {
    /// One JSON object and nothing else.
    pub json: bool,
    /// More notes.
    pub verbose: bool,
}

impl Screen {
    /// A note on stderr; not with `--json`, where an error is all that stands there.
    pub fn note(&self, text: impl Display) {
        if !self.json {
            // If stderr is closed, nobody is left to tell.
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// A note on stderr for who asked for more.
    pub fn detail(&self, text: impl Display) {
        if self.verbose {
            self.note(text);
        }
    }
}

/// Prints a result as JSON.
pub fn print_json(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value).expect("results are plain data");
    print(&format!("{text}\n"))
}

/// Prints text.
pub fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Columns under their heads; those whose head ends with `>` stand at the right. An empty head line is left out.
pub fn columns(heads: &[&str], rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if heads.iter().any(|head| !head.is_empty()) {
        table.set_header(heads.iter().map(|head| head.trim_end_matches('>')));
    }
    table.add_rows(rows);
    for (column, head) in table.column_iter_mut().zip(heads) {
        column.set_padding((0, 2));
        if head.ends_with('>') {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let lines = table.lines().map(|line| line.trim_end().to_string() + "\n");
    lines.collect()
}

/// Names and what they are, one a line.
pub fn pairs(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0) + 2;
    rows.iter().map(|(name, value)| format!("{name:width$}{value}\n")).collect()
}

/// Bytes in the unit of memory that fits: `1.2 GiB`.
pub fn bytes(bytes: impl TryInto<u64>) -> String {
    let bytes = bytes.try_into().unwrap_or(u64::MAX);
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| bytes >= 1 << shift) {
        Some((unit, shift)) => format!("{} {unit}", short(bytes as f64 / (1u64 << shift) as f64)),
        None => format!("{bytes} B"),
    }
}

/// A rate or a large count with a decimal prefix: `38.2 G`.
pub fn big(value: f64) -> String {
    let units = [("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)];
    match units.iter().find(|(_, unit)| value >= *unit) {
        Some((prefix, unit)) => {
            let unit = if *prefix == "k" { 1e3 } else { *unit };
            format!("{} {prefix}", short(value / unit))
        }
        None => format!("{} ", short(value)),
    }
}

/// Bytes a second: `38.2 GB/s`.
pub fn bandwidth(bytes_per_s: f64) -> String {
    format!("{}B/s", big(bytes_per_s))
}

/// FLOPs a second: `305 GFLOP/s`.
pub fn flops(flops_per_s: f64) -> String {
    format!("{}FLOP/s", big(flops_per_s))
}

/// Three digits that mean something: `0.123`, `1.23`, `12.3`, `123`, `1234`.
pub fn short(value: f64) -> String {
    match value.abs() {
        v if v == 0.0 || v >= 99.95 => format!("{value:.0}"),
        v if v >= 9.995 => format!("{value:.1}"),
        v if v >= 0.9995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Digits in groups of three: `12 345`.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// Reads a size: `24GiB`, `512MiB`, `3GB`, or bytes.
#[cfg(any(feature = "compiler", test))]
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = match unit.trim() {
        "" | "B" => 1.0,
        "KiB" => 1024.0,
        "MiB" => 1048576.0,
        "GiB" => 1073741824.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        other => return Err(format!("`{other}` is no unit; expected a size such as 24GiB or 512MiB")),
    };
    let number: f64 = number.parse().map_err(|_| format!("`{text}` is no size; expected 24GiB or 512MiB"))?;
    Ok((number * unit) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(
            [bytes(1023_u64), bytes(1536_u64), bytes(3_u64 << 30)],
            ["1023 B", "1.50 KiB", "3.00 GiB"]
        );
        assert_eq!(bandwidth(38.2e9), "38.2 GB/s");
        assert_eq!([big(9_999.0), big(12_345.0)], ["9999 ", "12.3 k"]);
        assert_eq!([grouped(7), grouped(1234), grouped(1_234_567)], ["7", "1 234", "1 234 567"]);
        assert_eq!(parse_bytes("24GiB"), Ok(24 << 30));
        assert_eq!(parse_bytes("1.5kB"), Ok(1500));
        assert!(parse_bytes("12 parsecs").is_err() && parse_bytes("GiB").is_err());
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".to_string(), "1".to_string()], vec!["bcd".to_string(), "23".to_string()]];
        assert_eq!(columns(&["name", "n>"], &rows), "name   n\na      1\nbcd   23\n");
    }
}
