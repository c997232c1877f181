//! The artifact: one file, `NAME.llamac`, that holds all a device needs to run a model.
//!
//! All numbers are little-endian; `digest` is BLAKE3, 32 bytes. The parts begin at multiples of 4096, with zeros between.
//!
//! ```text
//! header     0 magic   8 version u32   12 abi u32   16 manifest {offset u64, length u64, digest}
//!           64 table {offset u64, length u64, digest}   112 file length u64   120 digest of bytes 0..120
//! sections  in the order in which they were written
//! manifest  JSON text; its type is the caller's
//! table     one record of 128 bytes a section: name [80], padded with zeros; offset u64, length u64, digest
//! ```
//!
//! * The header digests the table and the manifest, the table digests the sections: the header's digest names the whole.
//! * Opening checks everything but the contents of weights (`weights` and `weights.*`), which [`Artifact::verify`] does.
//! * Writing goes to a temporary file beside the target, is synced and renamed: the file is whole or not there.
//! * The same sections and manifest give the same bytes: no time, no path, no address is written.

use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::NamedTempFile;

pub use blake3::Hash as Digest;

use crate::map::{FileBytes, MapError, map_file};
use crate::whole_file::{self, folder, room};

/// First bytes of every artifact. The first is not ASCII and the last is a newline, so that text tools show at once.
pub const MAGIC: [u8; 8] = *b"\x89llamac\n";
/// Version of the layout above.
pub const VERSION: u32 = 1;
/// Number of the calling convention between runtime and compiled code; it changes whenever `fn(ctx, worker)` does.
pub const ABI: u32 = 1;
/// Every part begins at a multiple of this, bytes.
pub const ALIGN: u64 = 4096;
/// Longest name of a section, bytes.
pub const MAX_NAME: usize = 80;

const HEADER_LEN: usize = 152;
const DIGESTED_HEADER_LEN: usize = 120;
const RECORD_LEN: usize = 128;

/// Why an artifact cannot be written or opened: file, found, expected.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum ArtifactError {
    /// The file cannot be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The first bytes are another format's.
    #[error("{file}: not a llamac artifact: begins with {found}, expected {expected}", found = hex(.found), expected = hex(&MAGIC))]
    Magic { file: PathBuf, found: Vec<u8> },
    /// Written by another version of llamac.
    #[error("{file}: artifact version is {found}, this program reads {expected}: compile the model again")]
    Version { file: PathBuf, found: u32, expected: u32 },
    /// Its code is called in another way than this program calls.
    #[error("{file}: code has ABI number {found}, this program calls {expected}: compile the model again")]
    Abi { file: PathBuf, found: u32, expected: u32 },
    /// Truncated, or something was appended.
    #[error("{file}: file is {found} bytes, expected {expected}")]
    Length { file: PathBuf, found: u64, expected: u64 },
    /// A part's bytes are not those that were written.
    #[error("{file}: digest of {part} is {found}, expected {expected}: the file is damaged")]
    Digest { file: PathBuf, part: Part, found: Digest, expected: Digest },
    /// A part does not begin at a multiple of [`ALIGN`].
    #[error("{file}: {part} begins at byte {found}, expected a multiple of {ALIGN}")]
    Misaligned { file: PathBuf, part: Part, found: u64 },
    /// A part reaches past the end of the file.
    #[error("{file}: {part} is {length} bytes at byte {offset}, the file has {file_length}")]
    OutOfFile { file: PathBuf, part: Part, offset: u64, length: u64, file_length: u64 },
    /// Two parts share bytes.
    #[error("{file}: {second} begins at byte {found}, inside {first}, which ends at {expected}")]
    Overlap { file: PathBuf, first: Part, second: Part, found: u64, expected: u64 },
    /// The table is not a whole number of records.
    #[error("{file}: section table is {found} bytes, expected a multiple of {RECORD_LEN}")]
    Table { file: PathBuf, found: u64 },
    /// Not 1 to [`MAX_NAME`] bytes of UTF-8 without NUL.
    #[error("{file}: bad section name {found:?}, expected 1 to {MAX_NAME} bytes of UTF-8 without NUL")]
    Name { file: PathBuf, found: String },
    /// Two sections of one name.
    #[error("{file}: two sections are named `{name}`, expected one")]
    Duplicate { file: PathBuf, name: String },
    /// A section that the reader cannot do without.
    #[error("{file}: no section `{name}`")]
    Missing { file: PathBuf, name: String },
    /// The manifest is not JSON of the expected type.
    #[error("{file}: manifest does not parse")]
    Manifest { file: PathBuf, source: serde_json::Error },
    /// A section was begun and not ended, or writing it failed: our own mistake, seen before it reaches a file.
    #[error("{file}: section `{name}` was not ended")]
    Unended { file: PathBuf, name: String },
    /// No room for the file.
    #[error("{file}: no room: the file needs {needed} bytes, there is room for {available}")]
    DiskFull { file: PathBuf, needed: u64, available: u64 },
    /// The system refuses; `source` says why.
    #[error("{file}: cannot be written")]
    Write { file: PathBuf, source: io::Error },
}

/// A part of the file, as errors name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// The first page.
    Header,
    /// The manifest.
    Manifest,
    /// The table of sections.
    Table,
    /// The section of this name.
    Section(String),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Header => f.write_str("header"),
            Part::Manifest => f.write_str("manifest"),
            Part::Table => f.write_str("section table"),
            Part::Section(name) => write!(f, "section `{name}`"),
        }
    }
}

/// One section as the table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Unique in the file.
    pub name: String,
    /// First byte, from the beginning of the file; a multiple of [`ALIGN`].
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Digest of these bytes.
    pub digest: Digest,
}

/// Whether a section of this name is checked only by [`Artifact::verify`], because reading it all takes long.
pub fn is_weights(name: &str) -> bool {
    name == "weights" || name.starts_with("weights.")
}

/// An open artifact: mapped, and all but its weights checked.
#[derive(Clone)]
pub struct Artifact {
    file: PathBuf,
    bytes: FileBytes,
    manifest: Range<usize>,
    // Each lies inside `bytes`: checked at open.
    sections: Vec<Section>,
    digest: Digest,
}

impl Artifact {
    /// Maps `path` and checks it.
    ///
    /// # Errors
    ///
    /// Any [`ArtifactError`] that speaks of a file's contents, or [`ArtifactError::Map`].
    pub fn open(path: &Path) -> Result<Artifact, ArtifactError> {
        Artifact::from_bytes(path, map_file(path)?)
    }

    /// Opens an artifact that is in memory; errors name it `file`. Sections are aligned only as far as `bytes` is.
    ///
    /// # Errors
    ///
    /// As [`Artifact::open`].
    pub fn from_bytes(file: &Path, bytes: FileBytes) -> Result<Artifact, ArtifactError> {
        let (manifest, sections, digest) = check(file, (*bytes).as_ref())?;
        Ok(Artifact { file: file.into(), bytes, manifest, sections, digest })
    }

    /// The file it was opened from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// All bytes of the file, to be kept as long as something points into them.
    pub fn bytes(&self) -> &FileBytes {
        &self.bytes
    }

    /// The manifest's text.
    pub fn manifest_bytes(&self) -> &[u8] {
        &(*self.bytes).as_ref()[self.manifest.clone()]
    }

    /// The manifest.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::Manifest`] if the text is not an `M`.
    pub fn manifest<M: DeserializeOwned>(&self) -> Result<M, ArtifactError> {
        serde_json::from_slice(self.manifest_bytes())
            .map_err(|source| ArtifactError::Manifest { file: self.file.clone(), source })
    }

    /// All sections, in the order in which they were written.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The bytes of a section, if there is one of this name.
    pub fn section(&self, name: &str) -> Option<&[u8]> {
        self.sections.iter().find(|section| section.name == name).map(|section| self.contents(section))
    }

    /// The bytes of a section that must be there.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::Missing`] if it is not.
    pub fn require(&self, name: &str) -> Result<&[u8], ArtifactError> {
        self.section(name)
            .ok_or_else(|| ArtifactError::Missing { file: self.file.clone(), name: name.into() })
    }

    /// Names the whole file: equal digests, equal bytes (weights included, once [`Artifact::verify`] agrees).
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Reads the weights and checks their digests.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::Digest`] with the first section that differs.
    pub fn verify(&self) -> Result<(), ArtifactError> {
        for section in self.sections.iter().filter(|section| is_weights(&section.name)) {
            let part = || Part::Section(section.name.clone());
            check_digest(&self.file, part, self.contents(section), section.digest)?;
        }
        Ok(())
    }

    fn contents(&self, section: &Section) -> &[u8] {
        &(*self.bytes).as_ref()[section.offset as usize..][..section.length as usize]
    }
}

impl fmt::Debug for Artifact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Artifact { file, bytes: _, manifest: _, sections, digest } = self;
        f.debug_struct("Artifact")
            .field("file", file)
            .field("sections", sections)
            .field("digest", digest)
            .finish_non_exhaustive()
    }
}

/// Everything that is checked at open. Of what it returns, every range lies inside `bytes`.
fn check(file: &Path, bytes: &[u8]) -> Result<(Range<usize>, Vec<Section>, Digest), ArtifactError> {
    if !bytes.starts_with(&MAGIC) {
        let found = bytes[..bytes.len().min(MAGIC.len())].to_vec();
        return Err(ArtifactError::Magic { file: file.into(), found });
    }
    let file_length = bytes.len() as u64;
    if file_length < ALIGN {
        return Err(ArtifactError::Length { file: file.into(), found: file_length, expected: ALIGN });
    }
    // Magic and version keep their places in all versions; the rest is this version's.
    let version = u32_at(bytes, 8);
    if version != VERSION {
        return Err(ArtifactError::Version { file: file.into(), found: version, expected: VERSION });
    }
    let digest = digest_at(bytes, DIGESTED_HEADER_LEN);
    check_digest(file, || Part::Header, &bytes[..DIGESTED_HEADER_LEN], digest)?;
    let abi = u32_at(bytes, 12);
    if abi != ABI {
        return Err(ArtifactError::Abi { file: file.into(), found: abi, expected: ABI });
    }
    let expected = u64_at(bytes, 112);
    if file_length != expected {
        return Err(ArtifactError::Length { file: file.into(), found: file_length, expected });
    }

    let manifest = range(file, bytes, Part::Manifest, u64_at(bytes, 16), u64_at(bytes, 24))?;
    let table = range(file, bytes, Part::Table, u64_at(bytes, 64), u64_at(bytes, 72))?;
    check_digest(file, || Part::Manifest, &bytes[manifest.clone()], digest_at(bytes, 32))?;
    check_digest(file, || Part::Table, &bytes[table.clone()], digest_at(bytes, 80))?;
    if table.len() % RECORD_LEN != 0 {
        return Err(ArtifactError::Table { file: file.into(), found: table.len() as u64 });
    }
    let records = bytes[table.clone()].chunks_exact(RECORD_LEN);
    let sections = records.map(|record| read_record(file, record)).collect::<Result<Vec<_>, _>>()?;
    check_names(file, &sections)?;

    let mut parts = vec![(0..ALIGN as usize, Part::Header), (manifest.clone(), Part::Manifest)];
    parts.push((table, Part::Table));
    for section in &sections {
        let part = Part::Section(section.name.clone());
        parts.push((range(file, bytes, part.clone(), section.offset, section.length)?, part));
    }
    check_apart(file, parts)?;

    // Parts are apart, so this reads each byte once, however many sections the table claims.
    for section in sections.iter().filter(|section| !is_weights(&section.name)) {
        let contents = &bytes[section.offset as usize..][..section.length as usize];
        check_digest(file, || Part::Section(section.name.clone()), contents, section.digest)?;
    }
    Ok((manifest, sections, digest))
}

fn check_digest(
    file: &Path,
    part: impl FnOnce() -> Part,
    bytes: &[u8],
    expected: Digest,
) -> Result<(), ArtifactError> {
    let found = blake3::hash(bytes);
    if found != expected {
        return Err(ArtifactError::Digest { file: file.into(), part: part(), found, expected });
    }
    Ok(())
}

fn range(
    file: &Path,
    bytes: &[u8],
    part: Part,
    offset: u64,
    length: u64,
) -> Result<Range<usize>, ArtifactError> {
    if !offset.is_multiple_of(ALIGN) {
        return Err(ArtifactError::Misaligned { file: file.into(), part, found: offset });
    }
    let file_length = bytes.len() as u64;
    match offset.checked_add(length) {
        Some(end) if end <= file_length => Ok(offset as usize..end as usize),
        _ => Err(ArtifactError::OutOfFile { file: file.into(), part, offset, length, file_length }),
    }
}

fn read_record(file: &Path, record: &[u8]) -> Result<Section, ArtifactError> {
    let padded = &record[..MAX_NAME];
    let length = padded.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let name = String::from_utf8_lossy(&padded[..length]).into_owned();
    if !is_name(&name) || name.as_bytes() != &padded[..length] {
        return Err(ArtifactError::Name { file: file.into(), found: name });
    }
    let offset = u64_at(record, MAX_NAME);
    Ok(Section {
        name,
        offset,
        length: u64_at(record, MAX_NAME + 8),
        digest: digest_at(record, MAX_NAME + 16),
    })
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME && !name.contains('\0')
}

fn check_names(file: &Path, sections: &[Section]) -> Result<(), ArtifactError> {
    let mut names: Vec<&str> = sections.iter().map(|section| section.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(ArtifactError::Duplicate { file: file.into(), name: pair[0].into() }),
        None => Ok(()),
    }
}

fn check_apart(file: &Path, mut parts: Vec<(Range<usize>, Part)>) -> Result<(), ArtifactError> {
    // An empty part may lie where another begins, and comes before it.
    parts.sort_by_key(|(range, _)| (range.start, !range.is_empty()));
    for pair in parts.windows(2) {
        let ((first_range, first), (second_range, second)) = (&pair[0], &pair[1]);
        if second_range.start < first_range.end {
            return Err(ArtifactError::Overlap {
                file: file.into(),
                first: first.clone(),
                second: second.clone(),
                found: second_range.start as u64,
                expected: first_range.end as u64,
            });
        }
    }
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..][..4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..][..8].try_into().expect("eight bytes"))
}

fn digest_at(bytes: &[u8], at: usize) -> Digest {
    Digest::from_bytes(bytes[at..][..32].try_into().expect("32 bytes"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes an artifact. Dropped before [`ArtifactWriter::finish`], it leaves nothing behind.
#[derive(Debug)]
pub struct ArtifactWriter {
    file: PathBuf,
    out: BufWriter<NamedTempFile>,
    /// Bytes written so far.
    position: u64,
    sections: Vec<Section>,
    /// The section that was begun and not yet ended.
    unended: Option<String>,
    expected_bytes: Option<u64>,
}

impl ArtifactWriter {
    /// Begins an artifact that will be `file`. Where its size is known to be about `expected_bytes`, free space is checked first.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::DiskFull`] if that much will not fit, [`ArtifactError::Write`] if the directory refuses.
    pub fn create(file: &Path, expected_bytes: Option<u64>) -> Result<ArtifactWriter, ArtifactError> {
        let cannot = |source| ArtifactError::Write { file: file.into(), source };
        // First, so that a place that takes no files is not called full.
        let out = whole_file::beside(file).map_err(cannot)?;
        let available = room(folder(file), 0).map_err(cannot)?;
        if let Some(needed) = expected_bytes.filter(|&needed| needed > available) {
            return Err(ArtifactError::DiskFull { file: file.into(), needed, available });
        }
        let mut writer = ArtifactWriter {
            file: file.into(),
            out: BufWriter::new(out),
            position: 0,
            sections: Vec::new(),
            unended: None,
            expected_bytes,
        };
        // The header's page, filled in at the end.
        writer.append(&[0; ALIGN as usize])?;
        Ok(writer)
    }

    /// Begins a section; its contents are then written to what this returns.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::Name`] or [`ArtifactError::Duplicate`] for a name that cannot be, [`ArtifactError::Unended`] if
    /// the section before was not ended, [`ArtifactError::DiskFull`] or [`ArtifactError::Write`].
    pub fn section(&mut self, name: &str) -> Result<SectionWriter<'_>, ArtifactError> {
        if !is_name(name) {
            return Err(ArtifactError::Name { file: self.file.clone(), found: name.into() });
        }
        if self.sections.iter().any(|section| section.name == name) {
            return Err(ArtifactError::Duplicate { file: self.file.clone(), name: name.into() });
        }
        self.check_ended()?;
        self.align()?;
        self.unended = Some(name.into());
        let offset = self.position;
        Ok(SectionWriter { writer: self, offset, digest: blake3::Hasher::new(), failed: false })
    }

    /// Writes manifest, table and header, syncs, and puts the file in its place, over an older one.
    ///
    /// The same bytes for the same manifest, if `M` serializes its maps in a fixed order.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::Manifest`] if `manifest` is no JSON, [`ArtifactError::Unended`], [`ArtifactError::DiskFull`] or
    /// [`ArtifactError::Write`]; the place is then as it was before.
    pub fn finish<M: Serialize>(mut self, manifest: &M) -> Result<Digest, ArtifactError> {
        self.check_ended()?;
        let manifest = serde_json::to_vec_pretty(manifest)
            .map_err(|source| ArtifactError::Manifest { file: self.file.clone(), source })?;
        let table: Vec<u8> = self.sections.iter().flat_map(record).collect();
        self.align()?;
        let manifest_offset = self.position;
        self.append(&manifest)?;
        self.align()?;
        let table_offset = self.position;
        self.append(&table)?;

        let mut header = Vec::with_capacity(HEADER_LEN);
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend(ABI.to_le_bytes());
        for (offset, part) in [(manifest_offset, &manifest), (table_offset, &table)] {
            header.extend(offset.to_le_bytes());
            header.extend((part.len() as u64).to_le_bytes());
            header.extend(blake3::hash(part).as_bytes());
        }
        header.extend(self.position.to_le_bytes());
        debug_assert_eq!(header.len(), DIGESTED_HEADER_LEN);
        let digest = blake3::hash(&header);
        header.extend(digest.as_bytes());

        let written = self
            .out
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.out.write_all(&header))
            .and_then(|()| self.out.flush())
            .and_then(|()| self.out.get_ref().as_file().sync_all());
        written.map_err(|source| self.error(source, 0))?;

        let ArtifactWriter { file, out, .. } = self;
        let cannot = |source| ArtifactError::Write { file: file.clone(), source };
        let out = out.into_inner().map_err(|error| cannot(error.into_error()))?;
        out.persist(&file).map_err(|error| cannot(error.error))?;
        // The rename is a change of the directory, which has a cache of its own.
        File::open(folder(&file)).and_then(|folder| folder.sync_all()).map_err(cannot)?;
        Ok(digest)
    }

    fn check_ended(&self) -> Result<(), ArtifactError> {
        match &self.unended {
            Some(name) => Err(ArtifactError::Unended { file: self.file.clone(), name: name.clone() }),
            None => Ok(()),
        }
    }

    fn align(&mut self) -> Result<(), ArtifactError> {
        let padding = self.position.next_multiple_of(ALIGN) - self.position;
        self.append(&[0; ALIGN as usize][..padding as usize])
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), ArtifactError> {
        self.out.write_all(bytes).map_err(|source| self.error(source, bytes.len()))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    /// What `source` means, met while writing `bytes` more.
    fn error(&self, source: io::Error, bytes: usize) -> ArtifactError {
        let file = self.file.clone();
        if !whole_file::is_full(&source) {
            return ArtifactError::Write { file, source };
        }
        let needed = (self.position + bytes as u64).max(self.expected_bytes.unwrap_or(0));
        // What the temporary file holds comes back when it goes.
        let held = self.out.get_ref().as_file().metadata().map_or(0, |metadata| metadata.len());
        let available = room(folder(&file), held).unwrap_or(held);
        ArtifactError::DiskFull { file, needed, available }
    }
}

fn record(section: &Section) -> Vec<u8> {
    let Section { name, offset, length, digest } = section;
    let mut record = name.as_bytes().to_vec();
    record.resize(MAX_NAME, 0);
    record.extend(offset.to_le_bytes());
    record.extend(length.to_le_bytes());
    record.extend(digest.as_bytes());
    record
}

/// Writes one section, in pieces of any size. [`SectionWriter::end`] enters it into the table.
///
/// Through [`io::Write`], an [`ArtifactError`] is inside the [`io::Error`].
#[derive(Debug)]
pub struct SectionWriter<'a> {
    writer: &'a mut ArtifactWriter,
    offset: u64,
    digest: blake3::Hasher,
    failed: bool,
}

impl SectionWriter<'_> {
    /// Writes all of `bytes`.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::DiskFull`] or [`ArtifactError::Write`]; the section cannot be ended then.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), ArtifactError> {
        let written = self.writer.append(bytes);
        self.failed |= written.is_err();
        self.digest.update(bytes);
        written
    }

    /// Bytes written to this section so far: the offset in it of what comes next.
    pub fn position(&self) -> u64 {
        self.writer.position - self.offset
    }

    /// Ends the section.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::Unended`] if a write to it failed.
    pub fn end(self) -> Result<Section, ArtifactError> {
        if self.failed {
            self.writer.check_ended()?;
        }
        let length = self.position();
        let name = self.writer.unended.take().expect("begun by `section`");
        let section = Section { name, offset: self.offset, length, digest: self.digest.finalize() };
        self.writer.sections.push(section.clone());
        Ok(section)
    }
}

impl Write for SectionWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.append(bytes).map_err(|error| match &error {
            ArtifactError::DiskFull { .. } => io::Error::new(io::ErrorKind::StorageFull, error),
            _ => io::Error::other(error),
        })?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // A disk cannot be filled everywhere that tests run, so these say what the system would.

    #[test]
    fn a_full_disk_names_bytes_needed_and_there() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ArtifactWriter::create(&folder.path().join("a.llamac"), None).unwrap();
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
            let error = writer.error(kind.into(), 100);
            assert!(matches!(error, ArtifactError::DiskFull { needed: 4196, .. }), "{error}");
        }
        writer.expected_bytes = Some(10_000);
        let error = writer.error(io::ErrorKind::StorageFull.into(), 100);
        assert!(matches!(error, ArtifactError::DiskFull { needed: 10_000, .. }), "{error}");
        let error = writer.error(io::ErrorKind::PermissionDenied.into(), 100);
        assert!(matches!(error, ArtifactError::Write { .. }), "{error}");
    }

    #[test]
    fn a_section_whose_write_failed_cannot_be_ended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.llamac");
        let mut writer = ArtifactWriter::create(&path, None).unwrap();
        // A temporary file that is open for reading only refuses every write.
        let read_only = File::open(writer.out.get_ref().path()).unwrap();
        let (_, temporary) = tempfile::NamedTempFile::new_in(folder.path()).unwrap().into_parts();
        writer.out = BufWriter::with_capacity(0, NamedTempFile::from_parts(read_only, temporary));
        let mut section = writer.section("weights").unwrap();
        assert!(matches!(section.append(b"a"), Err(ArtifactError::Write { .. })));
        assert!(matches!(section.end(), Err(ArtifactError::Unended { name, .. }) if name == "weights"));
    }
}
