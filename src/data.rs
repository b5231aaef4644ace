//! Tokens on disk as batches: nanoGPT's random windows, each a function of the seed and a position.
//!
//! train.bin and val.bin hold token ids as little-endian `u16` and nothing else, so nanoGPT's own files train as they
//! are.

use std::{
    fmt,
    fs::File,
    io,
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use thiserror::Error;

use crate::{
    rng::{philox4x32, site, uniform_u64, words},
    tokenizer::{GPT2_PADDED_VOCAB, Meta},
};

/// Files up to this size are checked whole when they are opened (a fraction of a second); larger ones batch by batch
/// only.
const SCAN_BYTES: usize = 256 << 20;

/// What can be wrong with a dataset: what, where, and what to do about it.
#[derive(Debug, Error)]
#[allow(missing_docs)] // each variant's message is its documentation
pub enum DataError {
    #[error(
        "{} does not exist; make it with `gpt-wgpu prepare`, or point to the directory that holds train.bin and \
         val.bin",
        .0.display()
    )]
    Missing(PathBuf),
    #[error("cannot read {}: {error}", path.display())]
    Unreadable { path: PathBuf, error: io::Error },
    #[error("{} is empty; prepare the data again", .0.display())]
    Empty(PathBuf),
    #[error(
        "{} has an odd number of bytes ({bytes}), yet token ids take two each: it is cut off or no token file; \
         prepare the data again",
        path.display()
    )]
    OddLength { path: PathBuf, bytes: usize },
    #[error(
        "{} holds {tokens} tokens, yet block_size {block_size} needs at least {}; choose a smaller block_size or \
         prepare more text",
        path.display(), block_size + 1
    )]
    TooShort { path: PathBuf, tokens: usize, block_size: usize },
    #[error(
        "{}: token {position} is {id}, yet the vocabulary ends at {}; set vocab_size to what the data was made \
         with (more than {id})",
        path.display(), vocab_size - 1
    )]
    OutOfVocabulary { path: PathBuf, position: usize, id: u16, vocab_size: usize },
    #[error("vocab_size is 0; it must be more than the largest token id")]
    NoVocabulary,
    #[error(
        "{} has a meta.pkl but no meta.json, and Python's pickles are not read here; set vocab_size to the size \
         it was made with (its largest token id is {largest}, so {} or more), or make the data again with \
         `gpt-wgpu prepare`",
        dir.display(), usize::from(*largest) + 1
    )]
    PickledMeta { dir: PathBuf, largest: u16 },
    #[error(transparent)]
    Meta(#[from] anyhow::Error),
}

/// Which of the two files a batch comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// train.bin
    Train,
    /// val.bin
    Val,
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Train => "train",
            Self::Val => "val",
        })
    }
}

/// Windows of tokens and what follows each token, both (B, T) in row-major order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The tokens: B rows of T.
    pub x: Vec<i32>,
    /// The tokens one further on: `y[b, t]` is to be predicted from `x[b, ..=t]`.
    pub y: Vec<i32>,
}

/// An opened dataset directory.
#[derive(Debug)]
pub struct Dataset {
    train: TokenFile,
    val: TokenFile,
    vocab_size: usize,
    meta: Option<Meta>,
}

impl Dataset {
    /// Opens `dir/train.bin` and `dir/val.bin` and checks that windows of `block_size` tokens can be drawn from both.
    ///
    /// The vocabulary is `vocab_size`, else meta.json's, else 50304 as in nanoGPT (GPT-2's, padded); a directory with
    /// only a meta.pkl is not GPT-2's and needs `vocab_size`. The files are mapped, not read: they must not shrink
    /// while they are in use.
    pub fn open(dir: &Path, vocab_size: Option<usize>, block_size: usize) -> Result<Self, DataError> {
        if !dir.is_dir() {
            return Err(DataError::Missing(dir.to_path_buf()));
        }
        let train = TokenFile::open(dir.join("train.bin"))?;
        let val = TokenFile::open(dir.join("val.bin"))?;
        let meta = Meta::load(dir)?;
        let vocab_size = match (vocab_size, &meta) {
            (Some(size), _) => size,
            (None, Some(meta)) => meta.vocab_size,
            (None, None) if dir.join("meta.pkl").exists() => {
                let largest = train.largest().max(val.largest());
                return Err(DataError::PickledMeta { dir: dir.to_path_buf(), largest });
            }
            (None, None) => GPT2_PADDED_VOCAB,
        };
        if vocab_size == 0 {
            return Err(DataError::NoVocabulary);
        }
        for file in [&train, &val] {
            file.windows(block_size)?;
            if file.map.len() <= SCAN_BYTES {
                file.check(0, &file.map, vocab_size)?;
            }
        }
        Ok(Self { train, val, vocab_size, meta })
    }

    /// Every token id is below; what the model's vocabulary is to be.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// What made the data, where meta.json says so.
    pub fn meta(&self) -> Option<&Meta> {
        self.meta.as_ref()
    }

    /// Tokens in a split.
    pub fn len(&self, split: Split) -> usize {
        self.file(split).len()
    }

    /// The `position`-th batch of a split: `batch_size` windows of `block_size` tokens, starts uniform over the file.
    ///
    /// A pure function of its arguments. Row `b` depends on `(split, seed, position, b)` alone, so to resume a run is
    /// to remember how many batches it has taken.
    pub fn batch(
        &self,
        split: Split,
        seed: u64,
        position: u64,
        batch_size: usize,
        block_size: usize,
    ) -> Result<Batch, DataError> {
        let file = self.file(split);
        let windows = file.windows(block_size)?;
        let site = match split {
            Split::Train => site::DATA_TRAIN,
            Split::Val => site::DATA_VAL,
        };
        let [low, high] = words(position);
        let mut x = Vec::with_capacity(batch_size * block_size); // (B, T)
        let mut y = Vec::with_capacity(batch_size * block_size); // (B, T)
        for row in 0..batch_size {
            let random = philox4x32([low, high, row as u32, site], words(seed));
            let bits = u64::from(random[1]) << 32 | u64::from(random[0]);
            let start = uniform_u64(bits, windows as u64) as usize;
            let window = &file.map[2 * start..2 * (start + block_size + 1)]; // T + 1 tokens
            file.check(start, window, self.vocab_size)?;
            x.extend(tokens(&window[..2 * block_size]).map(i32::from));
            y.extend(tokens(&window[2..]).map(i32::from));
        }
        Ok(Batch { x, y })
    }

    fn file(&self, split: Split) -> &TokenFile {
        match split {
            Split::Train => &self.train,
            Split::Val => &self.val,
        }
    }
}

/// A mapped file of token ids: never empty, of even length.
#[derive(Debug)]
struct TokenFile {
    path: PathBuf,
    map: Mmap,
}

impl TokenFile {
    fn open(path: PathBuf) -> Result<Self, DataError> {
        let unreadable = |error| DataError::Unreadable { path: path.clone(), error };
        let metadata = match path.metadata() {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(DataError::Missing(path));
            }
            Err(error) => return Err(unreadable(error)),
        };
        if metadata.is_dir() {
            return Err(unreadable(io::ErrorKind::IsADirectory.into()));
        }
        if !metadata.is_file() {
            return Err(unreadable(io::Error::other("it is no file"))); // to open a pipe is to wait for a writer
        }
        let file = File::open(&path).map_err(unreadable)?;
        if metadata.len() == 0 {
            return Err(DataError::Empty(path)); // an empty file cannot be mapped everywhere
        }
        // SAFETY: the map is only read. Should another process shrink the file meanwhile, the system ends this one with
        // a bus error; `prepare` replaces files by renaming and never shrinks one in place.
        let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
        if map.len() % 2 != 0 {
            return Err(DataError::OddLength { path, bytes: map.len() });
        }
        Ok(Self { path, map })
    }

    fn len(&self) -> usize {
        self.map.len() / 2
    }

    /// How many windows of `block_size` tokens have a token behind them: nanoGPT's `len(data) - block_size`.
    fn windows(&self, block_size: usize) -> Result<usize, DataError> {
        let windows = self.len().saturating_sub(block_size);
        if windows == 0 {
            return Err(DataError::TooShort { path: self.path.clone(), tokens: self.len(), block_size });
        }
        Ok(windows)
    }

    fn largest(&self) -> u16 {
        tokens(&self.map).max().unwrap_or(0)
    }

    /// Checks that all ids of `bytes`, which begin at token `start`, are below `vocab_size`.
    fn check(&self, start: usize, bytes: &[u8], vocab_size: usize) -> Result<(), DataError> {
        match tokens(bytes).position(|id| usize::from(id) >= vocab_size) {
            None => Ok(()),
            Some(offset) => Err(DataError::OutOfVocabulary {
                path: self.path.clone(),
                position: start + offset,
                id: u16::from_le_bytes([bytes[2 * offset], bytes[2 * offset + 1]]),
                vocab_size,
            }),
        }
    }
}

fn tokens(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;
    use tempfile::TempDir;

    fn write(dir: &TempDir, name: &str, ids: impl IntoIterator<Item = u16>) {
        let bytes: Vec<u8> = ids.into_iter().flat_map(u16::to_le_bytes).collect();
        fs::write(dir.path().join(name), bytes).unwrap();
    }

    /// Token i of train.bin is i, of val.bin 1000 + i: a window shows where it began.
    fn counting(train: u16, val: u16) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        write(&dir, "train.bin", 0..train);
        write(&dir, "val.bin", 1000..1000 + val);
        dir
    }

    fn error(dir: &TempDir, vocab_size: Option<usize>) -> DataError {
        Dataset::open(dir.path(), vocab_size, 8).unwrap_err()
    }

    #[test]
    fn what_is_wrong_is_said() {
        let gone = Dataset::open(Path::new("/no/such/dir"), None, 8).unwrap_err();
        assert!(matches!(gone, DataError::Missing(path) if path.ends_with("dir")));

        let dir = counting(100, 9);
        assert_eq!(Dataset::open(dir.path(), None, 8).unwrap().len(Split::Val), 9);
        let at_8 = error(&dir, Some(1008)).to_string();
        assert!(at_8.contains("val.bin: token 8 is 1008, yet the vocabulary ends at 1007"), "{at_8}");
        assert!(Dataset::open(dir.path(), Some(1009), 8).is_ok());
        assert!(matches!(error(&dir, Some(0)), DataError::NoVocabulary));

        write(&dir, "val.bin", 0..8);
        assert!(matches!(error(&dir, None), DataError::TooShort { tokens: 8, block_size: 8, .. }));
        fs::write(dir.path().join("val.bin"), [0; 33]).unwrap();
        assert!(matches!(error(&dir, None), DataError::OddLength { bytes: 33, .. }));
        fs::write(dir.path().join("val.bin"), []).unwrap();
        assert!(matches!(error(&dir, None), DataError::Empty(_)));
        fs::remove_file(dir.path().join("val.bin")).unwrap();
        assert!(matches!(error(&dir, None), DataError::Missing(path) if path.ends_with("val.bin")));
        fs::create_dir(dir.path().join("val.bin")).unwrap();
        assert!(matches!(error(&dir, None), DataError::Unreadable { .. }));
    }

    #[test]
    fn the_vocabulary_comes_from_the_caller_then_meta_then_gpt2() {
        let dir = counting(100, 50);
        let size = |vocab_size| Dataset::open(dir.path(), vocab_size, 8).map(|data| data.vocab_size());
        assert_eq!(size(None).unwrap(), 50_304);
        fs::write(dir.path().join("meta.pkl"), "").unwrap();
        assert!(matches!(size(None), Err(DataError::PickledMeta { largest: 1049, .. })));
        assert_eq!(size(Some(1050)).unwrap(), 1050);
        fs::write(dir.path().join("meta.json"), r#"{"vocab_size": 50257, "tokenizer": "gpt2"}"#).unwrap();
        assert_eq!(size(None).unwrap(), 50_257);
        assert_eq!(size(Some(1050)).unwrap(), 1050);
        fs::write(dir.path().join("meta.json"), "{").unwrap();
        assert!(matches!(size(None), Err(DataError::Meta(_))));
    }

    #[test]
    fn starts_cover_exactly_nanogpts_range() {
        let dir = counting(20, 20);
        let data = Dataset::open(dir.path(), None, 8).unwrap();
        let mut hits = [0; 12]; // starts 0..20 - 8
        for position in 0..100 {
            let batch = data.batch(Split::Train, 1337, position, 12, 8).unwrap();
            batch.x.chunks(8).for_each(|row| hits[row[0] as usize] += 1);
        }
        // 1200 draws over 12 starts: 100 each, five standard deviations are 48.
        assert!(hits.iter().all(|hit| (52..=148).contains(hit)), "{hits:?}");
    }

    #[test]
    fn tokens_are_little_endian_and_may_exceed_i16() {
        let dir = counting(20, 20);
        write(&dir, "val.bin", vec![50_256; 20]);
        let data = Dataset::open(dir.path(), None, 8).unwrap();
        assert_eq!(data.batch(Split::Val, 0, 0, 1, 8).unwrap().x, [50_256; 8]);
    }

    #[test]
    fn a_larger_block_than_opened_with_is_an_error() {
        let dir = counting(100, 20);
        let data = Dataset::open(dir.path(), None, 8).unwrap();
        assert!(matches!(data.batch(Split::Val, 0, 0, 1, 20), Err(DataError::TooShort { .. })));
        assert_eq!(data.batch(Split::Val, 0, 0, 1, 19).unwrap().y[18], 1019);
    }

    proptest! {
        #[test]
        fn batches_are_windows_and_pure(seed: u64, position: u64, batch_size in 1usize..5, block_size in 1usize..8) {
            let dir = counting(500, 500);
            let data = Dataset::open(dir.path(), None, block_size).unwrap();
            for (split, first) in [(Split::Train, 0), (Split::Val, 1000)] {
                let batch = data.batch(split, seed, position, batch_size, block_size).unwrap();
                prop_assert_eq!(batch.x.len(), batch_size * block_size);
                for (i, (&x, &y)) in batch.x.iter().zip(&batch.y).enumerate() {
                    prop_assert_eq!(x, batch.x[i - i % block_size] + (i % block_size) as i32);
                    prop_assert_eq!(y, x + 1);
                    prop_assert!(x >= first);
                }
                prop_assert_eq!(&batch, &data.batch(split, seed, position, batch_size, block_size).unwrap());
                // Eight starts of some 490: none of these agrees by chance.
                let wide = |seed, position| data.batch(split, seed, position, 8, block_size).unwrap();
                prop_assert_ne!(wide(seed, position), wide(seed, position.wrapping_add(1)));
                prop_assert_ne!(wide(seed, position), wide(seed, position ^ 1 << 40));
                prop_assert_ne!(wide(seed, position), wide(seed ^ 1 << 40, position));
            }
            let starts = |split, first| -> Vec<i32> {
                data.batch(split, seed, position, 8, 200).unwrap().x.chunks(200).map(|row| row[0] - first).collect()
            };
            prop_assert_ne!(starts(Split::Train, 0), starts(Split::Val, 1000));
        }
    }
}
