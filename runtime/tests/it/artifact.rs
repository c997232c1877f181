//! Artifacts: written, read, damaged.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use runtime::artifact::{
    ALIGN, Artifact, ArtifactError, ArtifactWriter, Digest, MAGIC, Part, VERSION, is_weights,
};
use serde_json::{Value, json};

const HEADER_DIGESTED: usize = 120;
const RECORD: usize = 128;

fn write(path: &Path) -> Digest {
    let mut writer = ArtifactWriter::create(path, Some(1 << 16)).unwrap();
    for (name, contents) in contents() {
        let mut section = writer.section(name).unwrap();
        // In two pieces, by both ways.
        let (first, second) = contents.split_at(contents.len() / 3);
        section.append(first).unwrap();
        section.write_all(second).unwrap();
        assert_eq!(section.position(), contents.len() as u64);
        section.end().unwrap();
    }
    writer.finish(&manifest()).unwrap()
}

fn contents() -> Vec<(&'static str, Vec<u8>)> {
    let weights = (0..9000u32).map(|i| (i * 7) as u8).collect();
    vec![("plan", b"plan text".to_vec()), ("weights", weights), ("empty", vec![]), ("code.x", vec![3; 4096])]
}

fn manifest() -> Value {
    json!({"model": "tiny", "context": 64})
}

fn bytes() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.llamac");
    write(&file);
    fs::read(file).unwrap()
}

fn open(bytes: &[u8]) -> Result<Artifact, ArtifactError> {
    Artifact::from_bytes(Path::new("a.llamac"), Arc::new(bytes.to_vec()))
}

#[test]
fn what_was_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.llamac");
    let digest = write(&file);
    let artifact = Artifact::open(&file).unwrap();
    assert_eq!(artifact.digest(), digest);
    assert_eq!(artifact.manifest::<Value>().unwrap(), manifest());
    assert_eq!(serde_json::from_slice::<Value>(artifact.manifest_bytes()).unwrap(), manifest());
    let names: Vec<&str> = artifact.sections().iter().map(|section| section.name.as_str()).collect();
    assert_eq!(names, ["plan", "weights", "empty", "code.x"]);
    for (name, contents) in contents() {
        let section = artifact.section(name).unwrap();
        assert_eq!(section, contents);
        assert_eq!(section.as_ptr().align_offset(ALIGN as usize), 0);
    }
    assert!(artifact.section("other").is_none());
    assert!(matches!(artifact.require("other"), Err(ArtifactError::Missing { name, .. }) if name == "other"));
    assert!(matches!(artifact.manifest::<Vec<u8>>(), Err(ArtifactError::Manifest { .. })));
    artifact.verify().unwrap();
}

#[test]
fn same_inputs_same_bytes() {
    assert_eq!(bytes(), bytes());
}

#[test]
fn an_artifact_may_have_no_sections_or_only_empty_ones() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.llamac");
    for names in [&[][..], &["a"], &["a", "b"]] {
        let mut writer = ArtifactWriter::create(&file, None).unwrap();
        for name in names {
            writer.section(name).unwrap().end().unwrap();
        }
        writer.finish(&json!(null)).unwrap();
        assert_eq!(Artifact::open(&file).unwrap().sections().len(), names.len());
    }
}

#[test]
fn nothing_is_left_behind_without_finish() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.llamac");
    fs::write(&file, "older").unwrap();
    let mut writer = ArtifactWriter::create(&file, None).unwrap();
    writer.section("plan").unwrap().append(&[1; 100_000]).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    drop(writer);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    assert_eq!(fs::read(&file).unwrap(), b"older");
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = ArtifactWriter::create(&folder.path().join("a.llamac"), None).unwrap();
    for name in ["", "a\0", &"x".repeat(81)] {
        assert!(matches!(writer.section(name), Err(ArtifactError::Name { found, .. }) if found == name));
    }
    writer.section(&"x".repeat(80)).unwrap().end().unwrap();
    writer.section("a").unwrap().end().unwrap();
    assert!(matches!(writer.section("a"), Err(ArtifactError::Duplicate { name, .. }) if name == "a"));
    writer.section("b").unwrap().append(b"not ended").unwrap();
    assert!(matches!(writer.section("c"), Err(ArtifactError::Unended { name, .. }) if name == "b"));
    assert!(matches!(writer.finish(&json!({})), Err(ArtifactError::Unended { name, .. }) if name == "b"));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_full_disk_is_found_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    match ArtifactWriter::create(&folder.path().join("a.llamac"), Some(u64::MAX)) {
        Err(ArtifactError::DiskFull { needed, available, .. }) => {
            assert!(needed == u64::MAX && available < needed)
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_folder_that_is_not_there_is_an_error() {
    let error = ArtifactWriter::create(Path::new("/no/such/folder/a.llamac"), None).unwrap_err();
    assert!(matches!(error, ArtifactError::Write { .. }), "{error}");
    assert!(matches!(Artifact::open(Path::new("/no/such/a.llamac")), Err(ArtifactError::Map(_))));
}

#[test]
fn other_files_and_other_versions_are_named_as_such() {
    let error = open(b"GGUF").unwrap_err();
    assert_eq!(
        error.to_string(),
        "a.llamac: not a llamac artifact: begins with 47475546, expected 896c6c616d61630a"
    );
    assert!(matches!(open(b""), Err(ArtifactError::Magic { .. })));
    assert!(matches!(open(&MAGIC), Err(ArtifactError::Length { found: 8, expected: ALIGN, .. })));
    let mut bytes = bytes();
    bytes[8] += 1;
    let expected = VERSION;
    assert!(
        matches!(open(&bytes), Err(ArtifactError::Version { found, expected: e, .. }) if found == e + 1 && e == expected)
    );
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = bytes();
    for len in (0..bytes.len()).rev().step_by(61) {
        assert!(open(&bytes[..len]).is_err(), "{len}");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    let found = longer.len() as u64;
    assert!(
        matches!(open(&longer), Err(ArtifactError::Length { found: f, expected, .. }) if f == found && expected == found - 1)
    );
}

/// Changes header and table as a forger would, digests and all.
fn forge(change: impl FnOnce(&mut Vec<u8>, usize)) -> Result<Artifact, ArtifactError> {
    let mut bytes = bytes();
    let table = u64::from_le_bytes(bytes[64..72].try_into().unwrap()) as usize;
    change(&mut bytes, table);
    let end = (table + u64::from_le_bytes(bytes[72..80].try_into().unwrap()) as usize).min(bytes.len());
    let digest = blake3::hash(&bytes[table..end]);
    bytes[80..112].copy_from_slice(digest.as_bytes());
    let digest = blake3::hash(&bytes[..HEADER_DIGESTED]);
    bytes[HEADER_DIGESTED..HEADER_DIGESTED + 32].copy_from_slice(digest.as_bytes());
    open(&bytes)
}

fn set(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn forged_headers_and_tables_are_errors() {
    forge(|_, _| ()).unwrap();
    let (offset_at, length_at) = (80, 88);

    let error = forge(|bytes, _| bytes[12] = 9).unwrap_err();
    assert!(matches!(error, ArtifactError::Abi { found: 9, .. }), "{error}");
    let error = forge(|bytes, _| set(bytes, 72, RECORD as u64 - 1)).unwrap_err();
    assert!(matches!(error, ArtifactError::Table { found: 127, .. }), "{error}");
    let error = forge(|bytes, _| set(bytes, 24, u64::MAX)).unwrap_err();
    assert!(matches!(error, ArtifactError::OutOfFile { part: Part::Manifest, .. }), "{error}");

    let error = forge(|bytes, table| set(bytes, table + offset_at, 4097)).unwrap_err();
    assert!(matches!(error, ArtifactError::Misaligned { found: 4097, .. }), "{error}");
    let error = forge(|bytes, table| set(bytes, table + offset_at, !4095)).unwrap_err();
    assert!(matches!(error, ArtifactError::OutOfFile { .. }), "{error}");
    let error = forge(|bytes, table| set(bytes, table + length_at, u64::MAX)).unwrap_err();
    assert!(matches!(error, ArtifactError::OutOfFile { length: u64::MAX, .. }), "{error}");
    let error = forge(|bytes, table| set(bytes, table + offset_at, 0)).unwrap_err();
    assert!(matches!(error, ArtifactError::Overlap { first: Part::Header, .. }), "{error}");
    let error = forge(|bytes, table| set(bytes, table + length_at, 4097)).unwrap_err();
    let names = |first: &Part, second: &Part| first.to_string() + ", " + &second.to_string();
    assert!(
        matches!(&error, ArtifactError::Overlap { first, second, .. } if names(first, second) == "section `plan`, section `weights`"),
        "{error}"
    );

    let error =
        forge(|bytes, table| bytes[table + RECORD..table + RECORD + 8].copy_from_slice(b"plan\0\0\0\0"));
    assert!(matches!(error, Err(ArtifactError::Duplicate { name, .. }) if name == "plan"));
    for name in [b"\0\0\0\0", b"pl\0n", b"pl\xffn"] {
        let error = forge(|bytes, table| bytes[table..table + 4].copy_from_slice(name)).unwrap_err();
        assert!(matches!(error, ArtifactError::Name { .. }), "{error}");
    }
    // Renamed to `weights...`, a section would escape the check at open; the table's digest is what stops that.
    assert!(is_weights("weights") && is_weights("weights.sm_80") && !is_weights("weights_of"));
}

#[test]
fn damaged_weights_are_found_by_verify() {
    let mut bytes = bytes();
    let at = open(&bytes).unwrap().sections()[1].offset as usize;
    bytes[at + 5] ^= 1;
    match open(&bytes).unwrap().verify() {
        Err(ArtifactError::Digest { part: Part::Section(name), .. }) => assert_eq!(name, "weights"),
        other => panic!("{other:?}"),
    }
}

/// Where a change is not noticed at open: weights, and the zeros between parts.
fn is_unchecked(bytes: &[u8], at: usize) -> bool {
    let artifact = open(bytes).unwrap();
    let field = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let mut checked = vec![(0, 152), (field(16), field(24)), (field(64), field(72))];
    let sections = artifact.sections().iter().filter(|section| section.name != "weights");
    checked.extend(sections.map(|section| (section.offset, section.length)));
    !checked.iter().any(|&(offset, length)| (offset..offset + length).contains(&(at as u64)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_changed_byte_never_panics_and_is_noticed(at in any::<prop::sample::Index>(), flip in 1..=255u8) {
        let mut bytes = bytes();
        let at = at.index(bytes.len());
        let unchecked = is_unchecked(&bytes, at);
        bytes[at] ^= flip;
        prop_assert_eq!(open(&bytes).is_ok(), unchecked, "byte {}", at);
    }

    /// The parts that steer the reader are small; here every case hits them.
    #[test]
    fn a_changed_header_or_table_never_panics(changes in prop::collection::vec((0..HEADER_DIGESTED, any::<u8>()), 1..4),
        records in prop::collection::vec((0..4 * RECORD, any::<u8>()), 0..4), page in any::<bool>())
    {
        let _ = forge(|bytes, table| {
            for (at, byte) in records {
                bytes[table + at] = byte;
            }
            for (at, byte) in changes.into_iter().filter(|_| page) {
                // The place of the table itself stays, so that its digest can be forged.
                if !(64..80).contains(&at) {
                    bytes[at] = byte;
                }
            }
        });
    }

    #[test]
    fn random_bytes_after_the_magic_never_panic(tail in prop::collection::vec(any::<u8>(), 0..5000)) {
        prop_assert!(open(&[&MAGIC[..], &tail].concat()).is_err());
    }
}
