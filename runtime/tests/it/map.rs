//! Mapped files and anonymous memory.

use std::fs;
use std::path::Path;

use runtime::map::{MapError, OwnedBuf, available_bytes, map_file};

#[test]
fn a_file_gives_its_bytes_and_an_empty_one_none() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("f");
    fs::write(&file, b"abc").unwrap();
    assert_eq!((*map_file(&file).unwrap()).as_ref(), b"abc");
    fs::write(&file, b"").unwrap();
    assert_eq!((*map_file(&file).unwrap()).as_ref(), b"");
}

#[test]
fn what_is_no_file_is_an_error() {
    assert!(matches!(map_file(Path::new("/no/such/file")), Err(MapError::File { .. })));
    assert!(matches!(map_file(Path::new("/")), Err(MapError::NotAFile { .. })));
}

#[test]
fn a_buffer_is_zeroed_aligned_and_writable() {
    for (huge, align) in [(false, 4096), (true, 2 << 20)] {
        for len in [0, 1, 4096, (2 << 20) + 1] {
            let mut buf = OwnedBuf::zeroed(len, huge).unwrap();
            assert_eq!(buf.len(), len);
            assert_eq!(buf.as_ptr().align_offset(align), 0);
            assert!(buf.iter().all(|&byte| byte == 0));
            buf.fill(7);
            assert!(buf.iter().all(|&byte| byte == 7));
        }
    }
}

#[test]
fn too_much_memory_is_an_error_with_the_bytes_asked() {
    for huge in [false, true] {
        for len in [usize::MAX, isize::MAX as usize, 1 << 62] {
            match OwnedBuf::zeroed(len, huge) {
                Err(MapError::Memory { needed, available, .. }) => {
                    assert_eq!(needed, len as u64);
                    assert_eq!(available.is_some(), available_bytes().is_some());
                }
                other => panic!("{len}: {other:?}"),
            }
        }
    }
}
