//! The tuning table: one JSON object a line, one line a measurement.
//!
//! Tables are merged by writing one behind the other: no line depends on another, and of several choices for one kernel the
//! newest counts. A line is appended as soon as its measurement is done; one that was cut off in the middle is dropped.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// One measurement of one schedule of one kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What was measured.
    #[serde(flatten)]
    pub key: Key,
    /// The kernel's name, without its layer: for people.
    pub kernel: String,
    /// Its family.
    pub family: String,
    /// Element type of the model.
    pub dtype: String,
    /// Tokens of the step that was timed.
    pub tokens: usize,
    /// The schedule's text.
    pub schedule: String,
    /// The part of it that decides the bits.
    pub class: String,
    /// When, in seconds since 1970.
    pub when: u64,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What a measurement is good for: the same kernel, made by the same compiler, on the same machine.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    /// Digest of what the kernel computes: [`digest`].
    pub group: String,
    /// Target that it was compiled for.
    pub target: String,
    /// Of llamac and LLVM.
    pub compiler: String,
    /// CPU, its caches and the number of cores; or GPU and driver.
    pub machine: String,
    /// Was nothing measured, but argued from machine code?
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub predicted: bool,
}

/// What came of a measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum Outcome {
    /// It is right, and was timed in turn with the default.
    Timed {
        /// Largest share of a bound that its results used.
        share: f64,
        /// Place in the model of cost's order, from 0.
        rank: usize,
        /// What the model of cost says, if it says anything.
        cost: Option<f64>,
        /// Of each turn.
        #[serde(flatten)]
        times: Times,
    },
    /// It is not right.
    Wrong {
        /// What is wrong.
        why: String,
    },
    /// It cannot be compiled, or its process ended.
    Crashed {
        /// What the process said or how it ended.
        why: String,
    },
    /// It was not done in time.
    Hung {
        /// How long it was waited for.
        waited_s: f64,
    },
    /// The end of a search: this schedule is to be used.
    Chosen {
        /// Schedules that were tried.
        tried: usize,
        /// Schedules that there are.
        legal: usize,
        /// Seconds that the machine's ceilings, measured in each turn, allow at least.
        limit_s: Vec<f64>,
        /// Of each turn.
        #[serde(flatten)]
        times: Times,
    },
}

/// Seconds of a schedule, and of the default in the same turns.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// Of the schedule.
    pub seconds: Vec<f64>,
    /// Of the default.
    pub default_s: Vec<f64>,
}

impl Times {
    /// The schedule's time as a share of the default's, in each turn.
    pub fn ratios(&self) -> Vec<f64> {
        self.seconds.iter().zip(&self.default_s).map(|(of, default)| of / default).collect()
    }

    /// The shortest time as a share of the default's shortest: what else the machine did in between counts least in it.
    pub fn best_ratio(&self) -> f64 {
        quantile(&self.seconds, 0.0) / quantile(&self.default_s, 0.0)
    }

    /// The median of the ratios: below 1 is faster than the default.
    pub fn ratio(&self) -> f64 {
        quantile(&self.ratios(), 0.5)
    }
}

/// The number below which that part of the numbers lies; NaN of none.
pub fn quantile(numbers: &[f64], part: f64) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = part * sorted.len().saturating_sub(1) as f64;
    match sorted.get(at.floor() as usize..=at.ceil() as usize) {
        Some([one]) => *one,
        Some([low, high]) => low + (high - low) * at.fract(),
        _ => f64::NAN,
    }
}

/// Digest of a group's signature: 16 hexadecimal digits.
pub fn digest(signature: &str) -> String {
    blake3::hash(signature.as_bytes()).to_hex()[..16].to_string()
}

/// A table in memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// In the order of the file.
    pub records: Vec<Record>,
}

/// Why a table cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum TableError {
    #[error("{}: cannot be read or written", file.display())]
    Io { file: PathBuf, source: io::Error },
    #[error("{}:{line}: no record of a tuning table", file.display())]
    Record { file: PathBuf, line: usize, source: serde_json::Error },
    #[error("{}: another llamac is tuning into this table", file.display())]
    Locked { file: PathBuf },
}

/// A line of a table that is no record.
#[derive(Debug)]
pub struct BadLine {
    /// From 1.
    pub line: usize,
    /// Why.
    pub source: serde_json::Error,
}

impl Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.records.iter().try_for_each(|record| writeln!(f, "{}", record.line()))
    }
}

impl Record {
    fn line(&self) -> String {
        serde_json::to_string(self).expect("a record is plain data")
    }
}

impl Table {
    /// Reads a table's text. A last line without an end is left out: its writer was stopped.
    ///
    /// # Errors
    ///
    /// The first line that is no record.
    pub fn parse(text: &str) -> Result<Table, BadLine> {
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines = whole.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let record =
            |(at, line)| serde_json::from_str(line).map_err(|source| BadLine { line: at + 1, source });
        Ok(Table { records: lines.map(record).collect::<Result<_, _>>()? })
    }

    /// Reads a file; one that is not there is an error.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn read(file: &Path) -> Result<Table, TableError> {
        let text = std::fs::read_to_string(file);
        let text = text.map_err(|source| TableError::Io { file: file.to_path_buf(), source })?;
        Table::parse(&text).map_err(|bad| bad.of(file))
    }

    /// The choices that hold here, and are not hints.
    pub fn choices(&self, holds: &dyn Fn(&Key) -> bool) -> Choices {
        Choices::of(self.records.iter().filter(|record| holds(&record.key)))
    }

    /// Seconds that were argued of a kernel's schedules on a target, by a compiler.
    pub fn predicted(&self, target: &str, group: &str, compiler: &str) -> BTreeMap<&str, f64> {
        let of_it = |key: &Key| {
            key.predicted && key.target == target && key.group == group && key.compiler == compiler
        };
        let timed = self.records.iter().filter(|record| of_it(&record.key));
        let seconds = timed.filter_map(|record| match &record.outcome {
            Outcome::Timed { times, .. } => Some((&*record.schedule, quantile(&times.seconds, 0.5))),
            _ => None,
        });
        seconds.collect()
    }

    /// Choices of other machines and compilers: hints.
    pub fn hints(&self, key: &Key) -> impl Iterator<Item = &Record> {
        let other = move |r: &&Record| {
            r.key.group == key.group && r.key != *key && matches!(r.outcome, Outcome::Chosen { .. })
        };
        self.records.iter().filter(other)
    }
}

impl BadLine {
    fn of(self, file: &Path) -> TableError {
        TableError::Record { file: file.to_path_buf(), line: self.line, source: self.source }
    }
}

/// The schedule to use for each kernel, with the record that says so.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choices {
    /// By target and group.
    by_kernel: BTreeMap<(String, String), Record>,
}

impl Choices {
    /// The newest choice for each kernel, what was measured before what was argued; of the same second, the one whose text is
    /// last.
    pub fn of<'r>(records: impl Iterator<Item = &'r Record>) -> Choices {
        let mut by_kernel: BTreeMap<(String, String), Record> = BTreeMap::new();
        for record in records.filter(|r| matches!(r.outcome, Outcome::Chosen { .. })) {
            let place = (record.key.target.clone(), record.key.group.clone());
            let order = |record: &Record| (!record.key.predicted, record.when, record.line());
            let newer = |known: &Record| order(known) < order(record);
            if by_kernel.get(&place).is_none_or(newer) {
                by_kernel.insert(place, record.clone());
            }
        }
        Choices { by_kernel }
    }

    /// Is nothing chosen?
    pub fn is_empty(&self) -> bool {
        self.by_kernel.is_empty()
    }

    /// The choice for a group on a target.
    pub fn get(&self, target: &str, group: &str) -> Option<&Record> {
        self.by_kernel.get(&(target.to_string(), group.to_string()))
    }

    /// Every choice.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.by_kernel.values()
    }
}

/// A table's file, open for more. It is locked: one tuner at a time.
pub struct TableFile {
    file: File,
    path: PathBuf,
    /// What it holds.
    pub table: Table,
}

impl TableFile {
    /// Opens a table, or makes an empty one. A line that was cut off is removed.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn open(path: &Path) -> Result<TableFile, TableError> {
        let io = |source| TableError::Io { file: path.to_path_buf(), source };
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        file.try_lock().map_err(|error| match error {
            std::fs::TryLockError::WouldBlock => TableError::Locked { file: path.to_path_buf() },
            std::fs::TryLockError::Error(source) => io(source),
        })?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(io)?;
        let table = Table::parse(&text).map_err(|bad| bad.of(path))?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1) as u64;
        file.set_len(whole).map_err(io)?;
        file.seek(SeekFrom::Start(whole)).map_err(io)?;
        Ok(TableFile { file, path: path.to_path_buf(), table })
    }

    /// Adds a record, on disk before anything else happens.
    ///
    /// # Errors
    ///
    /// [`TableError::Io`].
    pub fn append(&mut self, record: Record) -> Result<(), TableError> {
        let written =
            self.file.write_all((record.line() + "\n").as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(|source| TableError::Io { file: self.path.clone(), source })?;
        self.table.records.push(record);
        Ok(())
    }

    /// Adds the records of another table that are not there yet; gives how many.
    ///
    /// # Errors
    ///
    /// [`TableError::Io`].
    pub fn merge(&mut self, other: Table) -> Result<usize, TableError> {
        let new: Vec<Record> =
            other.records.into_iter().filter(|r| !self.table.records.contains(r)).collect();
        let count = new.len();
        new.into_iter().try_for_each(|record| self.append(record))?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(schedule: &str, when: u64, machine: &str) -> Record {
        let times = Times { seconds: vec![1.0, 2.0, 3.0], default_s: vec![2.0, 2.0, 2.0] };
        Record {
            key: Key {
                group: digest("text"),
                target: "cpu:native".into(),
                compiler: "0".into(),
                machine: machine.into(),
                predicted: false,
            },
            kernel: "gate".into(),
            family: "dot".into(),
            dtype: "bf16".into(),
            tokens: 512,
            schedule: schedule.into(),
            class: String::new(),
            when,
            outcome: Outcome::Chosen { tried: 3, legal: 9, limit_s: vec![0.5; 3], times },
        }
    }

    #[test]
    fn tables_round_trip_and_merge_in_any_order() {
        let (a, b) = (record("mr 6", 1, "here"), record("mr 8", 2, "here"));
        let text = |records: &[&Record]| records.iter().map(|r| r.line() + "\n").collect::<String>();
        let table = Table::parse(&text(&[&a, &b])).unwrap();
        assert_eq!(table.records, [a.clone(), b.clone()]);
        assert_eq!(table.to_string(), text(&[&a, &b]));
        let other = Table::parse(&text(&[&b, &a])).unwrap();
        let here = |key: &Key| key.compiler == "0" && key.machine == "here";
        assert_eq!(table.choices(&here), other.choices(&here));
        assert_eq!(table.choices(&here).get("cpu:native", &digest("text")), Some(&b));
        // What was measured counts before what was argued, however old it is.
        let mut argued = record("mr 4", 3, "here");
        argued.key.predicted = true;
        let table = Table { records: vec![argued, a.clone()] };
        assert_eq!(table.choices(&here).get("cpu:native", &digest("text")), Some(&a));
    }

    #[test]
    fn another_machine_or_compiler_gives_hints_and_no_choice() {
        let table = Table { records: vec![record("mr 6", 1, "there")] };
        let of = |compiler, machine| {
            table.choices(&move |key: &Key| key.compiler == compiler && key.machine == machine)
        };
        assert!(of("0", "here").is_empty() && of("1", "there").is_empty() && !of("0", "there").is_empty());
        let key = Key { machine: "here".into(), ..table.records[0].key.clone() };
        assert_eq!(table.hints(&key).count(), 1);
        assert_eq!(table.hints(&table.records[0].key).count(), 0);
    }

    #[test]
    fn a_line_that_was_cut_off_is_dropped_and_a_bad_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl");
        let (one, two) = (record("mr 6", 1, "here"), record("mr 8", 2, "here"));
        std::fs::write(&path, format!("{}\n{}", one.line(), &two.line()[..30])).unwrap();
        let mut file = TableFile::open(&path).unwrap();
        assert!(matches!(TableFile::open(&path), Err(TableError::Locked { .. })));
        file.append(two.clone()).unwrap();
        drop(file);
        assert_eq!(Table::read(&path).unwrap().records, [one, two]);
        std::fs::write(&path, "\n{\"kernel\": 3}\n").unwrap();
        assert!(
            Table::read(&path).unwrap_err().to_string().ends_with("t.jsonl:2: no record of a tuning table")
        );
    }

    #[test]
    fn quantiles() {
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 0.5), 2.0);
        assert_eq!(quantile(&[1.0, 2.0], 0.75), 1.75);
        assert!(quantile(&[], 0.5).is_nan());
    }

    proptest! {
        #[test]
        fn damaged_tables_are_refused_or_read(at in any::<prop::sample::Index>(), with in "[ -~\n]{0,6}") {
            let mut text = format!("{}\n", record("mr 6", 1, "here").line());
            let at = at.index(text.len());
            text.replace_range(at..at + 1, &with);
            let _ = Table::parse(&text);
        }
    }
}
