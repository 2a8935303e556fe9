//! Model folders that a test takes apart, changes and writes again.

use std::{collections::BTreeMap, fs, path::Path};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

/// A model folder in memory.
#[derive(Clone)]
pub(crate) struct Folder {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, Stored>,
    companions: BTreeMap<String, Vec<u8>>,
}

/// A tensor as it stands in a file.
#[derive(Clone)]
pub(crate) struct Stored {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

impl Folder {
    pub(crate) fn read(folder: &Path) -> Self {
        let mut read = Self { config: Value::Null, tensors: BTreeMap::new(), companions: BTreeMap::new() };
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let (name, contents) = (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap());
            if name == "config.json" {
                read.config = serde_json::from_slice(&contents).unwrap();
            } else if name.starts_with("model") && name.ends_with(".safetensors") {
                for (name, view) in SafeTensors::deserialize(&contents).unwrap().tensors() {
                    let (dtype, shape, data) = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
                    read.tensors.insert(name, Stored { dtype, shape, data });
                }
            } else if !name.starts_with("golden") && !name.ends_with(".index.json") {
                read.companions.insert(name, contents);
            }
        }
        read
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Stored {
        self.tensors.get_mut(name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// Writes the folder with one weight file.
    pub(crate) fn write(&self, folder: &Path) {
        self.write_shards(folder, 1);
    }

    /// Writes the folder with its tensors dealt out to `shards` weight files.
    pub(crate) fn write_shards(&self, folder: &Path, shards: usize) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        for (name, contents) in &self.companions {
            fs::write(folder.join(name), contents).unwrap();
        }
        let mut weight_map = BTreeMap::new();
        for shard in 0..shards {
            let file = match shards {
                1 => "model.safetensors".into(),
                _ => format!("model-{shard:05}-of-{shards:05}.safetensors"),
            };
            let tensors = self.tensors.iter().skip(shard).step_by(shards);
            weight_map.extend(tensors.clone().map(|(name, _)| (name.clone(), file.clone())));
            let views = tensors.map(|(name, tensor)| (name, tensor.view()));
            safetensors::serialize_to_file(views, None, &folder.join(file)).unwrap();
        }
        if shards > 1 {
            let index = json!({ "metadata": {}, "weight_map": weight_map });
            fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
        }
    }
}

impl Stored {
    fn view(&self) -> TensorView<'_> {
        TensorView::new(self.dtype, self.shape.clone(), &self.data).unwrap()
    }

    /// Replaces one element of a float tensor.
    pub(crate) fn set(&mut self, element: usize, value: f32) {
        let bytes = self.encoded(value);
        self.data[element * bytes.len()..(element + 1) * bytes.len()].copy_from_slice(&bytes);
    }

    /// The elements of a bf16 tensor, exactly.
    pub(crate) fn bf16(&self) -> impl Iterator<Item = f32> {
        assert_eq!(self.dtype, Dtype::BF16);
        self.data.chunks_exact(2).map(|pair| f32::from_bits(u32::from_le_bytes([0, 0, pair[0], pair[1]])))
    }

    fn encoded(&self, value: f32) -> Vec<u8> {
        match self.dtype {
            Dtype::F32 => value.to_le_bytes().to_vec(),
            // Cut short, which is exact for what tests plant: infinities, NaN, powers of two.
            Dtype::BF16 => value.to_le_bytes()[2..].to_vec(),
            other => panic!("{other:?} is no float a test plants values in"),
        }
    }
}
