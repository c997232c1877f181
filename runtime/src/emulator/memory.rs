//! Bytes that know whether they were written, and global memory made of them.

use super::race::Shadow;
use crate::map::FileBytes;
use std::fmt;
use std::ops::Range;

/// Where the first allocation lies. Far above the windows of the other spaces, so that no address is of two spaces.
const FIRST_ADDRESS: u64 = 1 << 40;
/// Addresses between two allocations that belong to nobody: more than an index is usually wrong by.
const GUARD_BYTES: u64 = 1 << 20;
/// What `cudaMalloc` promises (CUDA C++ Programming Guide, "Device Memory Accesses").
const ALIGN_BYTES: u64 = 256;

/// Bytes, and which of them were written.
pub struct Bytes {
    data: Data,
    /// A bit a byte. Nothing if all were written.
    written: Vec<u64>,
}

enum Data {
    Owned(Vec<u8>),
    Borrowed(FileBytes, Range<usize>),
}

/// The bits of the bytes `from..to` in word `word`.
fn bits(word: usize, from: usize, to: usize) -> u64 {
    let low = from.saturating_sub(64 * word);
    let high = (to - 64 * word).min(64);
    u64::MAX >> (64 - (high - low)) << low
}

impl Bytes {
    /// So many bytes, nothing of them written.
    pub fn unwritten(bytes: usize) -> Bytes {
        Bytes { data: Data::Owned(vec![0; bytes]), written: vec![0; bytes.div_ceil(64)] }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.all().len()
    }

    /// All of them, written or not.
    pub fn all(&self) -> &[u8] {
        match &self.data {
            Data::Owned(bytes) => bytes,
            Data::Borrowed(bytes, range) => &(**bytes).as_ref()[range.clone()],
        }
    }

    /// All of them, to be written; `None` if they are somebody else's.
    pub fn all_mut(&mut self) -> Option<&mut [u8]> {
        match &mut self.data {
            Data::Owned(bytes) => Some(bytes),
            Data::Borrowed(..) => None,
        }
    }

    /// Are they somebody else's, lent to be read?
    pub fn read_only(&self) -> bool {
        matches!(self.data, Data::Borrowed(..))
    }

    /// The first byte of `range` that was not written.
    pub fn first_unwritten(&self, range: Range<usize>) -> Option<usize> {
        if self.written.is_empty() || range.is_empty() {
            return None;
        }
        (range.start / 64..range.end.div_ceil(64)).find_map(|word| {
            let missing = !self.written[word] & bits(word, range.start, range.end);
            (missing != 0).then(|| 64 * word + missing.trailing_zeros() as usize)
        })
    }

    /// Marks bytes as written or not.
    pub fn mark(&mut self, range: Range<usize>, written: bool) {
        if self.written.is_empty() || range.is_empty() {
            return;
        }
        for word in range.start / 64..range.end.div_ceil(64) {
            let bits = bits(word, range.start, range.end);
            if written {
                self.written[word] |= bits;
            } else {
                self.written[word] &= !bits;
            }
        }
    }
}

/// A bit for each byte of an allocation; none of them is set where there are no bits.
#[derive(Default)]
struct Marks(Vec<u64>);

impl Marks {
    fn mark(&mut self, range: Range<usize>) {
        let words = range.end.div_ceil(64);
        if self.0.len() < words {
            self.0.resize(words, 0);
        }
        (range.start / 64..words).for_each(|word| self.0[word] |= bits(word, range.start, range.end));
    }

    fn first(&self, range: Range<usize>) -> Option<usize> {
        (range.start / 64..range.end.div_ceil(64).min(self.0.len())).find_map(|word| {
            let marked = self.0[word] & bits(word, range.start, range.end);
            (marked != 0).then(|| 64 * word + marked.trailing_zeros() as usize)
        })
    }
}

/// What grids did that may go on when a later one begins.
#[derive(Default)]
struct Earlier {
    read: Marks,
    written: Marks,
    /// What the last of them did, not yet among the marks.
    last: Option<Shadow>,
}

struct Allocation {
    name: String,
    address: u64,
    bytes: Bytes,
    earlier: Earlier,
}

/// Global memory: allocations with guard gaps between them. What is in it stays between launches.
#[derive(Default)]
pub struct Memory {
    /// By address.
    allocations: Vec<Allocation>,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let one = |a: &Allocation| format!("{} at {:#x}: {} bytes", a.name, a.address, a.bytes.len());
        f.debug_list().entries(self.allocations.iter().map(one)).finish()
    }
}

impl Memory {
    /// Nothing yet.
    pub fn new() -> Memory {
        Memory::default()
    }

    /// An allocation of `bytes` bytes, nothing of it written. Its device address is a multiple of 256 and never 0.
    pub fn allocate(&mut self, name: &str, bytes: usize) -> u64 {
        self.add(name, Bytes::unwritten(bytes))
    }

    /// An allocation whose bytes are `range` of somebody else's, not copied, all written; kernels may not write them.
    ///
    /// # Panics
    ///
    /// If `range` does not lie in `bytes`.
    pub fn borrow(&mut self, name: &str, bytes: FileBytes, range: Range<usize>) -> u64 {
        assert!(
            range.start <= range.end && range.end <= (*bytes).as_ref().len(),
            "{name}: {range:?} is outside"
        );
        self.add(name, Bytes { data: Data::Borrowed(bytes, range), written: Vec::new() })
    }

    fn add(&mut self, name: &str, bytes: Bytes) -> u64 {
        let end =
            self.allocations.last().map_or(FIRST_ADDRESS, |last| last.address + last.bytes.len() as u64);
        let address = (end + GUARD_BYTES).next_multiple_of(ALIGN_BYTES);
        let (name, earlier) = (name.to_string(), Earlier::default());
        self.allocations.push(Allocation { name, address, bytes, earlier });
        address
    }

    /// Takes an allocation away.
    ///
    /// # Panics
    ///
    /// If none begins there.
    pub fn release(&mut self, address: u64) {
        let index = self.allocations.iter().position(|a| a.address == address);
        self.allocations.remove(index.expect("an allocation begins there"));
    }

    /// Writes from the host; the bytes count as written.
    ///
    /// # Panics
    ///
    /// Outside an allocation, and in a borrowed one.
    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        let (index, range) = self.on_host(address, bytes.len());
        let to = &mut self.allocations[index].bytes;
        to.all_mut().expect("borrowed bytes are not written")[range.clone()].copy_from_slice(bytes);
        to.mark(range, true);
    }

    /// Reads from the host, what was written and what was not.
    ///
    /// # Panics
    ///
    /// Outside an allocation.
    pub fn read(&self, address: u64, bytes: usize) -> &[u8] {
        let (index, range) = self.on_host(address, bytes);
        &self.allocations[index].bytes.all()[range]
    }

    /// Marks bytes as not written: those of an arena, between two lives of them.
    ///
    /// # Panics
    ///
    /// Outside an allocation.
    pub fn forget(&mut self, address: u64, bytes: usize) {
        let (index, range) = self.on_host(address, bytes);
        self.allocations[index].bytes.mark(range, false);
    }

    /// Takes bytes as read, or written, by a grid that may go on when the next begins, if that one is dependent
    /// ([`super::Grid`]).
    ///
    /// # Panics
    ///
    /// Outside an allocation.
    pub fn touched_by_earlier(&mut self, address: u64, bytes: usize, wrote: bool) {
        let (index, range) = self.on_host(address, bytes);
        let earlier = &mut self.allocations[index].earlier;
        if wrote { &mut earlier.written } else { &mut earlier.read }.mark(range);
    }

    /// A grid begins; all before it have ended, unless it is dependent.
    pub(super) fn begin_grid(&mut self, dependent: bool) {
        for Allocation { earlier, .. } in &mut self.allocations {
            match earlier.last.take() {
                _ if !dependent => *earlier = Earlier::default(),
                None => {}
                Some(shadow) => {
                    for (range, wrote) in shadow.touched() {
                        if wrote { &mut earlier.written } else { &mut earlier.read }.mark(range);
                    }
                }
            }
        }
    }

    /// A grid ends, and this is what it did to each allocation.
    pub(super) fn end_grid(&mut self, shadows: Vec<Shadow>) {
        for (allocation, shadow) in self.allocations.iter_mut().zip(shadows) {
            allocation.earlier.last = Some(shadow);
        }
    }

    /// The first byte of a range that earlier grids wrote, or that they read if it is written now; and whether they wrote it.
    pub(super) fn touched_before(
        &self,
        index: usize,
        range: Range<usize>,
        writes: bool,
    ) -> Option<(usize, bool)> {
        let Earlier { read, written, .. } = &self.allocations[index].earlier;
        let written = written.first(range.clone()).map(|at| (at, true));
        written.or_else(|| read.first(range).filter(|_| writes).map(|at| (at, false)))
    }

    fn on_host(&self, address: u64, bytes: usize) -> (usize, Range<usize>) {
        self.find(address, bytes)
            .unwrap_or_else(|| panic!("{bytes} bytes at {address:#x} are in no allocation"))
    }

    /// The allocation that holds all of so many bytes, and where they are in it.
    pub(super) fn find(&self, address: u64, bytes: usize) -> Option<(usize, Range<usize>)> {
        let index = self.allocations.partition_point(|a| a.address <= address).checked_sub(1)?;
        let allocation = &self.allocations[index];
        let start = usize::try_from(address - allocation.address).ok()?;
        let end = start.checked_add(bytes).filter(|&end| end <= allocation.bytes.len())?;
        Some((index, start..end))
    }

    /// The bytes of an allocation.
    pub(super) fn bytes(&self, index: usize) -> &Bytes {
        &self.allocations[index].bytes
    }

    /// The bytes of an allocation, to be written.
    pub(super) fn bytes_mut(&mut self, index: usize) -> &mut Bytes {
        &mut self.allocations[index].bytes
    }

    /// The name of an allocation.
    pub(super) fn name(&self, index: usize) -> &str {
        &self.allocations[index].name
    }

    /// How many allocations there are.
    pub(super) fn count(&self) -> usize {
        self.allocations.len()
    }

    /// Where an address lies, seen from the nearest allocation.
    pub(super) fn near(&self, address: u64) -> String {
        let nearest = self.allocations.iter().min_by_key(|a| {
            let end = a.address + a.bytes.len() as u64;
            if address < a.address { a.address - address } else { address.saturating_sub(end) }
        });
        let Some(Allocation { name, address: begin, bytes, .. }) = nearest else {
            return "nothing is allocated".into();
        };
        let len = bytes.len() as u64;
        match address.checked_sub(*begin) {
            None => format!("{} bytes before `{name}`", begin - address),
            Some(at) if at >= len => {
                format!("{} bytes behind the end of `{name}`, which has {len}", at - len)
            }
            Some(at) => format!("at byte {at} of `{name}`, which has {len}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn what_is_written_is_known_by_the_byte() {
        let mut bytes = Bytes::unwritten(200);
        bytes.mark(3..130, true);
        assert_eq!(bytes.first_unwritten(3..130), None);
        assert_eq!(bytes.first_unwritten(2..130), Some(2));
        assert_eq!(bytes.first_unwritten(64..131), Some(130));
        bytes.mark(64..65, false);
        assert_eq!(bytes.first_unwritten(3..130), Some(64));
        assert_eq!(bytes.first_unwritten(7..7), None);
    }

    #[test]
    fn allocations_lie_apart() {
        let mut memory = Memory::new();
        let a = memory.allocate("a", 100);
        let b = memory.borrow("b", Arc::new(vec![1u8, 2, 3, 4]), 1..3);
        assert_eq!((a % 256, b % 256), (0, 0));
        memory.write(a + 96, &[7; 4]);
        assert_eq!(memory.read(a + 98, 2), [7, 7]);
        assert_eq!(memory.read(b, 2), [2, 3]);
        assert_eq!(memory.find(a + 96, 4), Some((0, 96..100)));
        assert!(memory.find(a + 98, 4).is_none() && memory.find(b - 8, 4).is_none());
        assert_eq!(memory.near(a + 104), "4 bytes behind the end of `a`, which has 100");
        assert_eq!(memory.near(a + 98), "at byte 98 of `a`, which has 100");
        assert_eq!(memory.near(b - 8), "8 bytes before `b`");
    }
}
