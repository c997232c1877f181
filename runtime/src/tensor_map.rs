//! Tensor maps: what a bulk copy of a box is told of the tensor in global memory.
//!
//! A map is described here, and refused where `cuTensorMapEncodeTiled` refuses it (CUDA Driver API, "Tensor Map Object
//! Management"; PTX ISA, "Tensors", "Tiled mode", "Swizzling modes"). A kernel has it as a parameter of 128 bytes. How the
//! driver lays these out is not public: [`TensorMap::encode`] makes the emulator's own, which begin with a mark, so that a
//! parameter that is no map is noticed.

/// Bytes of a tensor map.
pub const TENSOR_MAP_BYTES: usize = 128;
/// What a tensor map is a multiple of in memory.
pub const TENSOR_MAP_ALIGN: u64 = 64;
/// The first bytes of one.
const MARK: [u8; 8] = *b"our tmap";
/// Dimensions that a tensor may have.
const MOST_DIMS: usize = 5;

/// What a tensor's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// 8 bits.
    U8,
    /// 16 bits.
    U16,
    /// 32 bits.
    U32,
    /// 32 bits, signed.
    S32,
    /// 64 bits.
    U64,
    /// 64 bits, signed.
    S64,
    /// IEEE binary16.
    F16,
    /// The upper half of an IEEE binary32.
    Bf16,
    /// IEEE binary32.
    F32,
    /// IEEE binary64.
    F64,
}

impl Element {
    /// All of them.
    pub const ALL: [Element; 10] = [
        Element::U8,
        Element::U16,
        Element::U32,
        Element::S32,
        Element::U64,
        Element::S64,
        Element::F16,
        Element::Bf16,
        Element::F32,
        Element::F64,
    ];

    /// Bytes of one.
    pub fn bytes(self) -> u64 {
        match self {
            Element::U8 => 1,
            Element::U16 | Element::F16 | Element::Bf16 => 2,
            Element::U32 | Element::S32 | Element::F32 => 4,
            Element::U64 | Element::S64 | Element::F64 => 8,
        }
    }

    /// Can one be no number?
    pub fn float(self) -> bool {
        matches!(self, Element::F16 | Element::Bf16 | Element::F32 | Element::F64)
    }
}

/// How 16-byte chunks are moved in shared memory, so that columns of chunks lie in different banks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Swizzle {
    /// Not at all.
    #[default]
    None,
    /// Within 32 bytes.
    Bytes32,
    /// Within 64 bytes.
    Bytes64,
    /// Within 128 bytes.
    Bytes128,
}

impl Swizzle {
    const ALL: [Swizzle; 4] = [Swizzle::None, Swizzle::Bytes32, Swizzle::Bytes64, Swizzle::Bytes128];

    /// Bytes of the span within which chunks are moved: a row of the box, at most.
    pub fn span(self) -> u64 {
        match self {
            Swizzle::None => 16,
            Swizzle::Bytes32 => 32,
            Swizzle::Bytes64 => 64,
            Swizzle::Bytes128 => 128,
        }
    }

    /// Where the byte at an address of shared memory lies: the number of its chunk in the span, xor that of its 128 bytes.
    pub fn place(self, address: u64) -> u64 {
        let chunks = self.span() / 16;
        address ^ (address >> 7 & (chunks - 1)) << 4
    }
}

/// What a load gives for elements outside the tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Fill {
    /// Zeros.
    #[default]
    Zeros,
    /// A NaN, for floating-point types.
    Nan,
}

/// A tensor in global memory, and the box that is copied at once. Lists go from the innermost dimension outwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// What its elements are.
    pub dtype: Element,
    /// Device address of the first element.
    pub base: u64,
    /// Elements of each dimension.
    pub dims: Vec<u64>,
    /// Bytes from one element to the next of each dimension but the innermost.
    pub strides: Vec<u64>,
    /// Elements that the box spans.
    pub tile: Vec<u32>,
    /// Of so many of them one is copied; of the innermost dimension, all.
    pub element_strides: Vec<u32>,
    /// How it lies in shared memory.
    pub swizzle: Swizzle,
    /// What lies outside.
    pub fill: Fill,
}

/// Why the driver would not make a tensor map.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorMapError {
    /// No list of dimensions, or lists of different lengths.
    #[error(
        "{dims} dims, {strides} strides, {tile} of the box, {element_strides} element strides: 1 to 5 dims, a stride less, as many of the others"
    )]
    Rank {
        /// Dimensions.
        dims: usize,
        /// Strides.
        strides: usize,
        /// Of the box.
        tile: usize,
        /// Element strides.
        element_strides: usize,
    },
    /// An address that is not aligned.
    #[error("the tensor is at {0:#x}, which must be a multiple of 16")]
    Base(u64),
    /// A dimension beyond what can be.
    #[error("dim {at} has {found} elements, 1 to 2^32 can be")]
    Dim {
        /// Which.
        at: usize,
        /// What it is.
        found: u64,
    },
    /// A stride that is not aligned, or too long.
    #[error("the stride of dim {at} is {found} bytes, a multiple of 16 below 2^40 can be")]
    Stride {
        /// Of which dimension.
        at: usize,
        /// What it is.
        found: u64,
    },
    /// A box beyond what can be.
    #[error("the box has {found} elements in dim {at}, 1 to 256 can be")]
    Box {
        /// In which dimension.
        at: usize,
        /// How many.
        found: u32,
    },
    /// Element strides beyond what can be.
    #[error("the element stride of dim {at} is {found}, 1 to 8 can be, 1 of dim 0")]
    ElementStride {
        /// Of which dimension.
        at: usize,
        /// What it is.
        found: u32,
    },
    /// Rows of the box that are no whole chunks.
    #[error("a row of the box has {0} bytes, which must be a multiple of 16")]
    Row(u64),
    /// Rows of the box that are longer than the span of the swizzle.
    #[error("a row of the box has {row} bytes, at most {span} can be swizzled so")]
    Span {
        /// Bytes of a row.
        row: u64,
        /// What can be.
        span: u64,
    },
    /// NaN for integers.
    #[error("elements outside are to be NaN, which {0:?} does not have")]
    Fill(Element),
}

impl TensorMap {
    /// Elements that the box has in shared memory, by dimension.
    pub fn copied(&self) -> Vec<u32> {
        self.tile.iter().zip(&self.element_strides).map(|(tile, stride)| tile.div_ceil(*stride)).collect()
    }

    /// Would the driver make it?
    ///
    /// # Errors
    ///
    /// The first rule that it breaks. That each stride be a multiple of the one before it, as the manual says too, is no
    /// such rule: permuted tensors are made. An element stride of the innermost dimension the driver ignores; it is an error
    /// here.
    pub fn check(&self) -> Result<(), TensorMapError> {
        let TensorMap { dtype, base, dims, strides, tile, element_strides, swizzle, fill } = self;
        let rank = dims.len();
        let lists = strides.len() + 1 == rank && tile.len() == rank && element_strides.len() == rank;
        if !lists || rank > MOST_DIMS {
            return Err(TensorMapError::Rank {
                dims: rank,
                strides: strides.len(),
                tile: tile.len(),
                element_strides: element_strides.len(),
            });
        }
        if !base.is_multiple_of(16) {
            return Err(TensorMapError::Base(*base));
        }
        for at in 0..rank {
            if dims[at] == 0 || dims[at] > 1 << 32 {
                return Err(TensorMapError::Dim { at, found: dims[at] });
            }
            if tile[at] == 0 || tile[at] > 256 {
                return Err(TensorMapError::Box { at, found: tile[at] });
            }
            let most = if at == 0 { 1 } else { 8 };
            if element_strides[at] == 0 || element_strides[at] > most {
                return Err(TensorMapError::ElementStride { at, found: element_strides[at] });
            }
        }
        for (at, &found) in strides.iter().enumerate() {
            if !found.is_multiple_of(16) || found >= 1 << 40 {
                return Err(TensorMapError::Stride { at: at + 1, found });
            }
        }
        let row = u64::from(tile[0]) * dtype.bytes();
        if !row.is_multiple_of(16) {
            return Err(TensorMapError::Row(row));
        }
        if *swizzle != Swizzle::None && row > swizzle.span() {
            return Err(TensorMapError::Span { row, span: swizzle.span() });
        }
        if *fill == Fill::Nan && !dtype.float() {
            return Err(TensorMapError::Fill(*dtype));
        }
        Ok(())
    }

    /// The bytes of a kernel's parameter on the emulator. It must lie at a multiple of [`TENSOR_MAP_ALIGN`].
    ///
    /// # Errors
    ///
    /// As [`TensorMap::check`].
    pub fn encode(&self) -> Result<[u8; TENSOR_MAP_BYTES], TensorMapError> {
        self.check()?;
        let code = |at: Option<usize>| at.expect("it was checked") as u8;
        let mut bytes = MARK.to_vec();
        bytes.push(code(Element::ALL.iter().position(|element| *element == self.dtype)));
        bytes.push(code(Swizzle::ALL.iter().position(|swizzle| *swizzle == self.swizzle)));
        bytes.push(u8::from(self.fill == Fill::Nan));
        bytes.push(self.dims.len() as u8);
        bytes.extend(self.base.to_le_bytes());
        // 2^32 elements need a bit more than 32.
        bytes.extend(self.dims.iter().flat_map(|&dim| ((dim - 1) as u32).to_le_bytes()));
        bytes.extend(self.strides.iter().flat_map(|stride| stride.to_le_bytes()));
        bytes.extend(self.tile.iter().flat_map(|&tile| (tile as u16).to_le_bytes()));
        bytes.extend(self.element_strides.iter().map(|&stride| stride as u8));
        let mut map = [0; TENSOR_MAP_BYTES];
        map[..bytes.len()].copy_from_slice(&bytes);
        Ok(map)
    }

    /// The map that bytes are, if they are one.
    pub fn decode(bytes: &[u8]) -> Option<TensorMap> {
        let mut rest = bytes.strip_prefix(&MARK)?;
        let mut take = |count: usize| {
            let (taken, after) = rest.split_at_checked(count)?;
            rest = after;
            let mut number = [0; 8];
            number[..count].copy_from_slice(taken);
            Some(u64::from_le_bytes(number))
        };
        let mut many = |count: u64, bytes: usize| (0..count).map(|_| take(bytes)).collect::<Option<Vec<_>>>();
        let &[dtype, swizzle, fill, rank] = &many(4, 1)?[..] else { return None };
        if !(1..=MOST_DIMS as u64).contains(&rank) {
            return None;
        }
        let small = |numbers: Vec<u64>| numbers.into_iter().map(|number| number as u32).collect();
        let map = TensorMap {
            dtype: *Element::ALL.get(dtype as usize)?,
            base: many(1, 8)?[0],
            dims: many(rank, 4)?.into_iter().map(|dim| dim + 1).collect(),
            strides: many(rank - 1, 8)?,
            tile: small(many(rank, 2)?),
            element_strides: small(many(rank, 1)?),
            swizzle: *Swizzle::ALL.get(swizzle as usize)?,
            fill: if fill == 1 { Fill::Nan } else { Fill::Zeros },
        };
        map.check().is_ok().then_some(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> TensorMap {
        TensorMap {
            dtype: Element::Bf16,
            base: 1 << 40,
            dims: vec![80, 3, 1 << 32],
            strides: vec![160, 480],
            tile: vec![64, 1, 128],
            element_strides: vec![1, 1, 2],
            swizzle: Swizzle::Bytes128,
            fill: Fill::Zeros,
        }
    }

    #[test]
    fn a_map_is_its_bytes() {
        let bytes = map().encode().unwrap();
        assert_eq!(TensorMap::decode(&bytes), Some(map()));
        assert_eq!(map().copied(), [64, 1, 64]);
        let five = TensorMap {
            dims: vec![8; 5],
            strides: vec![16; 4],
            tile: vec![8; 5],
            element_strides: vec![1; 5],
            fill: Fill::Nan,
            ..map()
        };
        assert_eq!(TensorMap::decode(&five.encode().unwrap()), Some(five));
        // What is no map is noticed, and what no driver would have made.
        assert_eq!(TensorMap::decode(&[0; TENSOR_MAP_BYTES]), None);
        let mut odd = bytes;
        odd[12] = 8;
        assert_eq!(TensorMap::decode(&odd), None);
    }

    #[test]
    fn what_the_driver_refuses_is_refused() {
        use TensorMapError as E;
        let refused = |change: fn(&mut TensorMap)| {
            let mut map = map();
            change(&mut map);
            map.encode().unwrap_err()
        };
        assert!(matches!(refused(|m| m.dims.clear()), E::Rank { dims: 0, .. }));
        assert!(matches!(refused(|m| m.strides.push(16)), E::Rank { strides: 3, .. }));
        assert_eq!(refused(|m| m.base += 8), E::Base((1 << 40) + 8));
        assert_eq!(refused(|m| m.dims[1] = 0), E::Dim { at: 1, found: 0 });
        assert_eq!(refused(|m| m.dims[2] += 1), E::Dim { at: 2, found: (1 << 32) + 1 });
        assert_eq!(refused(|m| m.strides[0] = 168), E::Stride { at: 1, found: 168 });
        assert_eq!(refused(|m| m.strides[1] = 1 << 40), E::Stride { at: 2, found: 1 << 40 });
        assert_eq!(refused(|m| m.tile[2] = 257), E::Box { at: 2, found: 257 });
        assert_eq!(refused(|m| m.element_strides[1] = 9), E::ElementStride { at: 1, found: 9 });
        assert_eq!(refused(|m| m.element_strides[0] = 2), E::ElementStride { at: 0, found: 2 });
        assert_eq!(refused(|m| m.tile[0] = 12), E::Row(24));
        assert_eq!(refused(|m| m.tile[0] = 72), E::Span { row: 144, span: 128 });
        let integers = |m: &mut TensorMap| (m.dtype, m.fill, m.tile[0]) = (Element::U8, Fill::Nan, 64);
        assert_eq!(refused(integers), E::Fill(Element::U8));
    }

    /// PTX ISA, "Swizzling modes": which chunk lies in each of the 8 of a row of 128 bytes, for the rows of a pattern.
    #[test]
    fn swizzles_are_those_of_the_isa() {
        let rows = |swizzle: Swizzle, rows: u64| {
            let row = |row: u64| (0..8).map(move |chunk| swizzle.place(128 * row + 16 * chunk) / 16 % 8);
            (0..rows).map(|at| row(at).collect::<Vec<_>>()).collect::<Vec<_>>()
        };
        assert_eq!(
            rows(Swizzle::Bytes128, 8),
            [
                [0, 1, 2, 3, 4, 5, 6, 7],
                [1, 0, 3, 2, 5, 4, 7, 6],
                [2, 3, 0, 1, 6, 7, 4, 5],
                [3, 2, 1, 0, 7, 6, 5, 4],
                [4, 5, 6, 7, 0, 1, 2, 3],
                [5, 4, 7, 6, 1, 0, 3, 2],
                [6, 7, 4, 5, 2, 3, 0, 1],
                [7, 6, 5, 4, 3, 2, 1, 0],
            ]
        );
        assert_eq!(
            rows(Swizzle::Bytes64, 4),
            [
                [0, 1, 2, 3, 4, 5, 6, 7],
                [1, 0, 3, 2, 5, 4, 7, 6],
                [2, 3, 0, 1, 6, 7, 4, 5],
                [3, 2, 1, 0, 7, 6, 5, 4],
            ]
        );
        assert_eq!(rows(Swizzle::Bytes32, 2), [[0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 3, 2, 5, 4, 7, 6]]);
        assert_eq!(rows(Swizzle::None, 2), [[0, 1, 2, 3, 4, 5, 6, 7]; 2]);
    }
}
