//! A trace as text: see the head of [`super`]. What is read is printed as it was: `parse(print(t)) == t`.

use super::{DIGITS, Trace, TracedLaunch, TracedStep, TracedValue};
use ir::DType;
use ir::graph::Family;
use ir::plan::PlanKernel;
use runtime::device::Want;
use std::fmt::{self, Display, Formatter};
use std::str::{FromStr, SplitWhitespace};

/// First line; the number is the format's.
const HEAD: &str = "llamac trace 1";

/// Names of what is wanted of a step.
const WANTS: [(Want, &str); 4] = [
    (Want::Nothing, "nothing"),
    (Want::Logits, "logits"),
    (Want::AllLogits, "all_logits"),
    (Want::Token, "token"),
];

impl Display for Trace {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Trace { model, dtype, target, arithmetic, compiler, tokens, kernels, steps } = self;
        writeln!(f, "{HEAD}")?;
        let dtype = dtype.name();
        let facts = [("model", &**model), ("dtype", dtype), ("target", target)];
        for (word, rest) in facts.into_iter().chain([("arithmetic", &**arithmetic), ("compiler", compiler)]) {
            writeln!(f, "{word} {}", one_line(rest))?;
        }
        write!(f, "tokens")?;
        tokens.iter().try_for_each(|token| write!(f, " {token}"))?;
        for PlanKernel { name, family, schedule, .. } in kernels {
            write!(f, "\nkernel {name} {} {}", family.name(), one_line(schedule))?;
        }
        for TracedStep { want, entry, tokens, past, launches } in steps {
            let want = WANTS.iter().find(|known| known.0 == *want).expect("every want has a name").1;
            write!(f, "\nstep {want} {entry} {tokens} {past}")?;
            for TracedLaunch { group, kernel, values } in launches {
                write!(f, "\nlaunch {group} {}", kernels[*kernel].name)?;
                for TracedValue { name, dtype, shape, digest, samples } in values {
                    let extents: Vec<String> = shape.iter().map(usize::to_string).collect();
                    let extents = if shape.is_empty() { "-".to_string() } else { extents.join("x") };
                    write!(f, "\nvalue {name} {dtype} {extents} {digest}")?;
                    for &(at, x) in samples {
                        // The shortest text that reads back as the same number.
                        match is_narrow(*dtype) {
                            true => write!(f, " {at}:{}", x as f32)?,
                            false => write!(f, " {at}:{x}")?,
                        }
                    }
                }
            }
        }
        writeln!(f, "\nend {}", self.values())
    }
}

/// Is every number of the dtype one of f32?
fn is_narrow(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16)
}

/// A name that somebody else chose cannot end its line.
fn one_line(text: &str) -> String {
    text.trim().chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Why a text is no trace.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("found {found}, expected {expected}")]
pub struct ParseError {
    /// The line, from 1.
    pub line: usize,
    /// What stands there.
    pub found: String,
    /// What should.
    pub expected: String,
}

/// Reads a trace.
///
/// # Errors
///
/// The first line that is not as it should be.
pub fn parse(text: &str) -> Result<Trace, ParseError> {
    let mut lines = Lines { rest: text.lines().collect(), at: 0 };
    if lines.peek() != Some(HEAD) {
        return Err(lines.error(HEAD));
    }
    lines.at += 1;
    let model = lines.rest_of("model")?.to_string();
    let dtype = lines.rest_of("dtype")?;
    let dtype = DType::from_name(dtype).ok_or_else(|| lines.last("a dtype"))?;
    let [target, arithmetic, compiler] = ["target", "arithmetic", "compiler"].map(|word| lines.rest_of(word));
    let (target, arithmetic) = (target?.to_string(), arithmetic?.to_string());
    let compiler = compiler?.to_string();
    let mut words = lines.words("tokens")?;
    let mut tokens = Vec::new();
    while words.left() {
        tokens.push(words.number("a token")?);
    }
    let mut kernels: Vec<PlanKernel> = Vec::new();
    while lines.begins("kernel") {
        let mut words = lines.words("kernel")?;
        let name = words.word("a kernel's name")?.to_string();
        if kernels.iter().any(|kernel| kernel.name == name) {
            return Err(words.error("each kernel once"));
        }
        let family = words.word("a family")?;
        let family = Family::ALL.into_iter().find(|known| known.name() == family);
        let family = family.ok_or_else(|| words.error("a kernel's family"))?;
        let schedule = words.words.by_ref().collect::<Vec<_>>().join(" ");
        kernels.push(PlanKernel { name, family, schedule, measured: false });
    }
    let mut steps = Vec::new();
    while lines.begins("step") {
        steps.push(step(&mut lines, &kernels)?);
    }
    let trace = Trace { model, dtype, target, arithmetic, compiler, tokens, kernels, steps };
    let mut words = lines.words("end")?;
    if words.number::<usize>("a number of values")? != trace.values() {
        return Err(words.error(format!("{}, the number of values above", trace.values())));
    }
    words.end()?;
    match lines.peek() {
        Some(_) => Err(lines.error("nothing behind `end`")),
        None => Ok(trace),
    }
}

fn step(lines: &mut Lines<'_>, kernels: &[PlanKernel]) -> Result<TracedStep, ParseError> {
    let mut words = lines.words("step")?;
    let want = words.word("what was wanted")?;
    let want = WANTS.iter().find(|known| known.1 == want).ok_or_else(|| words.error("what was wanted"))?.0;
    let entry = words.word("an entry point")?.to_string();
    let (tokens, past) = (words.number("tokens")?, words.number("positions")?);
    words.end()?;
    let mut launches = Vec::new();
    while lines.begins("launch") {
        let mut words = lines.words("launch")?;
        let group = words.word("a group")?.to_string();
        let name = words.word("a kernel")?;
        let kernel = kernels.iter().position(|kernel| kernel.name == name);
        let kernel = kernel.ok_or_else(|| words.error("one of the kernels above"))?;
        words.end()?;
        let mut values = Vec::new();
        while lines.begins("value") {
            values.push(value(lines.words("value")?)?);
        }
        launches.push(TracedLaunch { group, kernel, values });
    }
    Ok(TracedStep { want, entry, tokens, past, launches })
}

fn value(mut words: Words<'_>) -> Result<TracedValue, ParseError> {
    let name = words.word("a value's name")?.to_string();
    let dtype = words.word("a dtype")?;
    let dtype = DType::from_name(dtype).ok_or_else(|| words.error("a dtype"))?;
    let extents = words.word("extents")?;
    let shape: Vec<usize> = match extents {
        "-" => Vec::new(),
        extents => {
            let shape = extents.split('x').map(usize::from_str).collect::<Result<_, _>>();
            shape.map_err(|_| words.error("extents as 3x4, or -"))?
        }
    };
    let elems = shape.iter().try_fold(1usize, |elems, &extent| elems.checked_mul(extent));
    let elems = elems.ok_or_else(|| words.error("extents that can be counted"))?;
    let digest = words.word("a digest")?.to_string();
    if digest.len() != DIGITS || !digest.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Err(words.error(format!("a digest of {DIGITS} hexadecimal digits")));
    }
    let mut samples: Vec<(usize, f64)> = Vec::new();
    while words.left() {
        let sample = words.word("a sample")?.split_once(':');
        let number = |x: &str| match is_narrow(dtype) {
            true => x.parse::<f32>().map(f64::from),
            false => x.parse(),
        };
        let sample = sample.and_then(|(at, x)| Some((at.parse().ok()?, number(x).ok()?)));
        match sample {
            Some((at, x)) if at < elems && samples.last().is_none_or(|last| last.0 < at) => {
                samples.push((at, x));
            }
            _ => return Err(words.error("samples as 7:0.25, by ascending index")),
        }
    }
    Ok(TracedValue { name, dtype, shape, digest, samples })
}

/// The lines of a text, one after the other.
struct Lines<'t> {
    rest: Vec<&'t str>,
    at: usize,
}

impl<'t> Lines<'t> {
    fn peek(&self) -> Option<&'t str> {
        self.rest.get(self.at).copied()
    }

    fn begins(&self, word: &str) -> bool {
        self.peek().is_some_and(|line| line.split(' ').next() == Some(word))
    }

    /// What stands behind the word that the next line begins with.
    fn rest_of(&mut self, word: &str) -> Result<&'t str, ParseError> {
        let line = self.peek().and_then(|line| line.strip_prefix(word));
        let rest = line.filter(|rest| rest.is_empty() || rest.starts_with(' '));
        let rest = rest.ok_or_else(|| self.error(format!("a line that begins with `{word}`")))?;
        self.at += 1;
        Ok(rest.trim())
    }

    fn words(&mut self, word: &str) -> Result<Words<'t>, ParseError> {
        let rest = self.rest_of(word)?;
        Ok(Words { text: rest, line: self.at, words: rest.split_whitespace() })
    }

    /// An error in the line that comes next.
    fn error(&self, expected: impl ToString) -> ParseError {
        let found = self.peek().map_or("the end".to_string(), shown);
        ParseError { line: self.at + 1, found, expected: expected.to_string() }
    }

    /// An error in the line that was read last.
    fn last(&self, expected: impl ToString) -> ParseError {
        let found = shown(self.rest[self.at - 1]);
        ParseError { line: self.at, found, expected: expected.to_string() }
    }
}

/// The words of a line.
struct Words<'t> {
    text: &'t str,
    line: usize,
    words: SplitWhitespace<'t>,
}

impl<'t> Words<'t> {
    fn word(&mut self, what: &str) -> Result<&'t str, ParseError> {
        self.words.next().ok_or_else(|| self.error(what))
    }

    fn number<N: FromStr>(&mut self, what: &str) -> Result<N, ParseError> {
        self.word(what)?.parse().map_err(|_| self.error(what))
    }

    fn left(&self) -> bool {
        self.words.clone().next().is_some()
    }

    fn end(&self) -> Result<(), ParseError> {
        if self.left() { Err(self.error("the end of the line")) } else { Ok(()) }
    }

    fn error(&self, expected: impl ToString) -> ParseError {
        ParseError { line: self.line, found: shown(self.text), expected: expected.to_string() }
    }
}

/// As much of a line as can be shown.
fn shown(line: &str) -> String {
    let short: String = line.chars().take(60).collect();
    format!("`{}`", one_line(&short))
}
