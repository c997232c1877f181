//! Writes GGUF files, right ones and wrong ones, so that readers can be tried on what no model at hand has.

/// A GGUF file in the making. Tensor data are laid out at [`Gguf::finish`], aligned to 32 bytes.
#[derive(Clone)]
pub struct Gguf {
    version: u32,
    keys: Vec<Vec<u8>>,
    pub tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
    /// Offsets that are not where the tensor lies.
    wrong_offsets: Vec<(String, u64)>,
}

pub const U32: u32 = 4;
pub const F32: u32 = 6;
pub const STRING: u32 = 8;
pub const ARRAY: u32 = 9;

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl Gguf {
    pub fn new(version: u32) -> Gguf {
        Gguf { version, keys: vec![], tensors: vec![], wrong_offsets: vec![] }
    }

    /// Adds a metadata entry, or replaces the one of that name.
    pub fn raw(&mut self, key: &str, kind: u32, value: &[u8]) -> &mut Gguf {
        let name = string(key);
        self.keys.retain(|entry| !entry.starts_with(&name));
        self.keys.push([&name[..], &kind.to_le_bytes(), value].concat());
        self
    }

    pub fn u32(&mut self, key: &str, value: u32) -> &mut Gguf {
        self.raw(key, U32, &value.to_le_bytes())
    }

    pub fn f32(&mut self, key: &str, value: f32) -> &mut Gguf {
        self.raw(key, F32, &value.to_le_bytes())
    }

    pub fn string(&mut self, key: &str, value: &str) -> &mut Gguf {
        self.raw(key, STRING, &string(value))
    }

    pub fn strings(&mut self, key: &str, values: &[&str]) -> &mut Gguf {
        let head = [&STRING.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        let values: Vec<u8> = values.iter().flat_map(|value| string(value)).collect();
        self.raw(key, ARRAY, &[head, values].concat())
    }

    pub fn u32s(&mut self, key: &str, values: &[u32]) -> &mut Gguf {
        let head = [&U32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        let values: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.raw(key, ARRAY, &[head, values].concat())
    }

    /// Adds an f32 tensor, or replaces the one of that name; dims innermost first, as in the file.
    pub fn tensor(&mut self, name: &str, dims: &[u64], numbers: &[f32]) -> &mut Gguf {
        self.bytes_tensor(name, dims, 0, numbers.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    pub fn bytes_tensor(&mut self, name: &str, dims: &[u64], kind: u32, bytes: Vec<u8>) -> &mut Gguf {
        self.tensors.retain(|tensor| tensor.0 != name);
        self.tensors.push((name.into(), dims.into(), kind, bytes));
        self
    }

    pub fn version(&mut self, version: u32) -> &mut Gguf {
        self.version = version;
        self
    }

    /// Adds a tensor that is there already.
    pub fn twice(&mut self, name: &str) -> &mut Gguf {
        let tensor = self.tensors.iter().find(|tensor| tensor.0 == name).cloned();
        self.tensors.extend(tensor);
        self
    }

    /// Says a wrong offset for a tensor.
    pub fn offset(&mut self, name: &str, offset: u64) -> &mut Gguf {
        self.wrong_offsets.push((name.into(), offset));
        self
    }

    pub fn finish(&self) -> Vec<u8> {
        let mut file = [&b"GGUF"[..], &self.version.to_le_bytes()].concat();
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.keys.len() as u64).to_le_bytes());
        file.extend(self.keys.concat());
        let mut offset = 0u64;
        for (name, dims, kind, bytes) in &self.tensors {
            file.extend(string(name));
            file.extend((dims.len() as u32).to_le_bytes());
            file.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
            file.extend(kind.to_le_bytes());
            let wrong = self.wrong_offsets.iter().find(|wrong| wrong.0 == *name);
            file.extend(wrong.map_or(offset, |wrong| wrong.1).to_le_bytes());
            offset = (offset + bytes.len() as u64).next_multiple_of(32);
        }
        for (_, _, _, bytes) in &self.tensors {
            file.resize(file.len().next_multiple_of(32), 0);
            file.extend(bytes);
        }
        file
    }

    /// A model of one layer and one head of four, all weights small and different, without a tokenizer.
    pub fn small() -> Gguf {
        let mut gguf = Gguf::new(3);
        gguf.string("general.architecture", "llama")
            .u32("llama.context_length", 64)
            .u32("llama.embedding_length", 4)
            .u32("llama.block_count", 1)
            .u32("llama.feed_forward_length", 8)
            .u32("llama.attention.head_count", 1)
            .u32("llama.vocab_size", 6)
            .f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
        let matrices: [(&str, [u64; 2]); 9] = [
            ("token_embd", [4, 6]),
            ("blk.0.attn_q", [4, 4]),
            ("blk.0.attn_k", [4, 4]),
            ("blk.0.attn_v", [4, 4]),
            ("blk.0.attn_output", [4, 4]),
            ("blk.0.ffn_gate", [4, 8]),
            ("blk.0.ffn_up", [4, 8]),
            ("blk.0.ffn_down", [8, 4]),
            ("output", [4, 6]),
        ];
        for (name, dims) in matrices {
            let numbers: Vec<f32> = (0..dims[0] * dims[1]).map(|i| i as f32).collect();
            gguf.tensor(&format!("{name}.weight"), &dims, &numbers);
        }
        for name in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"] {
            gguf.tensor(&format!("{name}.weight"), &[4], &[1.0; 4]);
        }
        gguf
    }
}
