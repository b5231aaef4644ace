//! Text to a dataset: train.bin, val.bin and meta.json in one directory.

use std::{
    env, fmt,
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use sha2::{Digest, Sha256};

use crate::{
    corpus,
    tokenizer::{CharTokenizer, Meta, Tokenizer, TokenizerKind},
};

mod download;
pub use download::{download, hex, progress_bar, sha256_file};

/// Tiny Shakespeare: 40,000 lines of his plays, the text of nanoGPT's two Shakespeare datasets.
const SHAKESPEARE_URL: &str =
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt";
/// Names another address for it: a mirror, or a server on a closed network.
const SHAKESPEARE_URL_ENV: &str = "GPT_WGPU_SHAKESPEARE_URL";
const SHAKESPEARE_SHA256: &str = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed";
const SHAKESPEARE_BYTES: u64 = 1_115_394;

/// Where a dataset's text comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Tiny Shakespeare by characters: nanoGPT's `shakespeare_char`.
    ShakespeareChar,
    /// Tiny Shakespeare in GPT-2's tokens: nanoGPT's `shakespeare`.
    Shakespeare,
    /// A text file in UTF-8.
    File(PathBuf),
    /// The built-in text ([`corpus::builtin`]).
    Builtin,
}

impl Source {
    /// The source that `name` stands for; `None` for anything but `shakespeare_char`, `shakespeare` and `builtin`.
    pub fn named(name: &str) -> Option<Self> {
        [Self::ShakespeareChar, Self::Shakespeare, Self::Builtin].into_iter().find(|source| source.to_string() == name)
    }

    /// The tokenizer to use: `wanted`, or what the source's name implies, or characters.
    fn tokenizer_kind(&self, wanted: Option<TokenizerKind>) -> Result<TokenizerKind> {
        let (implied, other) = match self {
            Self::ShakespeareChar => (TokenizerKind::Char, "shakespeare"),
            Self::Shakespeare => (TokenizerKind::Gpt2, "shakespeare_char"),
            Self::File(_) | Self::Builtin => return Ok(wanted.unwrap_or(TokenizerKind::Char)),
        };
        match wanted {
            Some(kind) if kind != implied => {
                bail!("{self} is made with the {implied} tokenizer; for {kind} prepare {other}")
            }
            _ => Ok(implied),
        }
    }

    /// The bytes of the text; downloads it to `out_dir/input.txt` where that is needed.
    fn read(&self, out_dir: &Path, progress: bool) -> Result<Vec<u8>> {
        match self {
            Self::ShakespeareChar | Self::Shakespeare => shakespeare(&out_dir.join("input.txt"), progress),
            Self::File(path) => fs::read(path).with_context(|| format!("cannot read {}", path.display())),
            Self::Builtin => Ok(corpus::builtin().into_bytes()),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::ShakespeareChar => f.write_str("shakespeare_char"),
            Self::Shakespeare => f.write_str("shakespeare"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Builtin => f.write_str("builtin"),
        }
    }
}

/// What [`prepare`] made. Its `Display` is nanoGPT's report.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Where the three files are.
    pub out_dir: PathBuf,
    /// Characters of the text, both splits together.
    pub characters: usize,
    /// What was written to meta.json.
    pub meta: Meta,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "length of dataset in characters: {}", thousands(self.characters as u64))?;
        if !self.meta.chars.is_empty() {
            writeln!(f, "all the unique characters: {}", self.meta.chars.escape_debug())?;
        }
        writeln!(f, "vocab size: {}", thousands(self.meta.vocab_size as u64))?;
        writeln!(f, "train has {} tokens", thousands(self.meta.train_tokens))?;
        write!(f, "val has {} tokens", thousands(self.meta.val_tokens))
    }
}

/// Makes train.bin, val.bin and meta.json in `out_dir` (created where it is missing) from a text.
///
/// The first nine tenths of the characters are for training, the rest for validation, each encoded on its own, as
/// nanoGPT does. `tokenizer` is `None` for the source's own; the two Shakespeare datasets accept no other. Files appear
/// under their final names only when all of them are whole. `progress` draws bars on a terminal's standard error.
pub fn prepare(source: &Source, out_dir: &Path, tokenizer: Option<TokenizerKind>, progress: bool) -> Result<Summary> {
    let kind = source.tokenizer_kind(tokenizer)?;
    fs::create_dir_all(out_dir).with_context(|| format!("cannot create the directory {}", out_dir.display()))?;
    let bytes = source.read(out_dir, progress)?;
    let sha256 = hex(&Sha256::digest(&bytes));
    let text = decode(bytes).with_context(|| format!("{source} is no text to learn from"))?;

    let characters = text.chars().count();
    let train_characters = (characters as f64 * 0.9) as usize; // Python's int(n * 0.9), to the same rounding
    let cut = text.char_indices().nth(train_characters).map_or(text.len(), |(byte, _)| byte);
    let (train_text, val_text) = text.split_at(cut);

    let tokenizer = match kind {
        TokenizerKind::Char => Tokenizer::Char(CharTokenizer::from_text(&text)?),
        TokenizerKind::Gpt2 => Tokenizer::Gpt2,
    };
    let bar = progress_bar(progress, Some(text.len() as u64));
    let train = tokenizer.encode_with_progress(train_text, |bytes| bar.inc(bytes))?;
    let val = tokenizer.encode_with_progress(val_text, |bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    ensure!(
        val.len() >= 2,
        "{source} is too short: its {characters} characters leave {} tokens for validation; each split needs more \
         tokens than the model's block_size",
        val.len()
    );

    let meta = Meta {
        vocab_size: tokenizer.vocab_size(),
        tokenizer: kind,
        chars: match &tokenizer {
            Tokenizer::Char(tokenizer) => tokenizer.chars(),
            Tokenizer::Gpt2 => String::new(),
        },
        source: source.to_string(),
        sha256,
        train_tokens: train.len() as u64,
        val_tokens: val.len() as u64,
    };
    let json = meta.to_json()?;
    let whole = [
        Pending::write(out_dir.join("train.bin"), train.iter().flat_map(|id| id.to_le_bytes()))?,
        Pending::write(out_dir.join("val.bin"), val.iter().flat_map(|id| id.to_le_bytes()))?,
        Pending::write(out_dir.join(Meta::FILE), json.bytes())?,
    ];
    whole.into_iter().try_for_each(Pending::rename)?;
    Ok(Summary { out_dir: out_dir.to_path_buf(), characters, meta })
}

/// Tiny Shakespeare, from `path` or else from the network.
fn shakespeare(path: &Path, progress: bool) -> Result<Vec<u8>> {
    let reading = || format!("cannot read {}", path.display());
    if !path.exists() {
        let url = env::var(SHAKESPEARE_URL_ENV).unwrap_or_else(|_| SHAKESPEARE_URL.to_string());
        download(&url, path, Some(SHAKESPEARE_SHA256), Some(SHAKESPEARE_BYTES), progress)?;
    }
    let bytes = fs::read(path).with_context(reading)?;
    // Not downloaded over: it may be somebody's own text.
    ensure!(
        hex(&Sha256::digest(&bytes)) == SHAKESPEARE_SHA256,
        "{} is not tiny Shakespeare (its SHA-256 differs); remove it to download that, or prepare it as a text file of \
         your own",
        path.display()
    );
    Ok(bytes)
}

/// UTF-8 to text, with every line ending as `\n`, which is how Python's `open` hands a text to nanoGPT.
fn decode(bytes: Vec<u8>) -> Result<String> {
    ensure!(!bytes.is_empty(), "it is empty");
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count();
        anyhow!(
            "it is not UTF-8: invalid byte 0x{:02X} at offset {at}, in line {line}; save it as UTF-8",
            error.as_bytes()[at]
        )
    })?;
    Ok(match text.contains('\r') {
        true => text.replace("\r\n", "\n").replace('\r', "\n"),
        false => text,
    })
}

/// A file that is whole, under a temporary name beside its final one.
struct Pending {
    temporary: PathBuf,
    path: PathBuf,
}

impl Pending {
    fn write(path: PathBuf, bytes: impl Iterator<Item = u8>) -> Result<Self> {
        let pending = Self { temporary: path.with_added_extension("tmp"), path };
        let write = || {
            let mut file = BufWriter::new(File::create(&pending.temporary)?);
            for byte in bytes {
                file.write_all(&[byte])?;
            }
            file.into_inner()?.sync_all()
        };
        write().with_context(|| format!("cannot write {}", pending.temporary.display()))?;
        Ok(pending)
    }

    fn rename(self) -> Result<()> {
        fs::rename(&self.temporary, &self.path).with_context(|| format!("cannot write {}", self.path.display()))
    }
}

impl Drop for Pending {
    /// What was not renamed is of no use.
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.temporary);
    }
}

/// 1115394 as 1,115,394.
fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let groups = digits.as_bytes().rchunks(3).rev();
    groups.map(String::from_utf8_lossy).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Dataset, Split};
    use std::io::Read;

    /// A directory with tiny Shakespeare as input.txt, where this checkout's surroundings have a copy of it.
    fn with_shakespeare() -> Option<tempfile::TempDir> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/tinyshakespeare.txt");
        if !path.exists() {
            eprintln!("skipped: {} is absent", path.display());
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::copy(path, dir.path().join("input.txt")).unwrap();
        Some(dir)
    }

    fn prepare_bytes(bytes: &[u8], kind: TokenizerKind) -> (tempfile::TempDir, Result<Summary>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("my.txt");
        fs::write(&path, bytes).unwrap();
        let result = prepare(&Source::File(path), &dir.path().join("data"), Some(kind), false);
        (dir, result)
    }

    #[test]
    fn shakespeare_char_is_nanogpts() {
        let Some(dir) = with_shakespeare() else {
            return;
        };
        let summary = prepare(&Source::ShakespeareChar, dir.path(), None, false).unwrap();
        let expected = "length of dataset in characters: 1,115,394\n\
            all the unique characters: \\n !$&\\',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz\n\
            vocab size: 65\ntrain has 1,003,854 tokens\nval has 111,540 tokens";
        assert_eq!(summary.to_string(), expected);
        let mut start = [0; 10];
        File::open(dir.path().join("train.bin")).unwrap().read_exact(&mut start).unwrap();
        assert_eq!(start, [18, 0, 47, 0, 56, 0, 57, 0, 58, 0], "\"First\"");
        let data = Dataset::open(dir.path(), None, 256).unwrap();
        assert_eq!((data.vocab_size(), data.len(Split::Val)), (65, 111_540));
    }

    #[test]
    fn shakespeare_in_gpt2_tokens_is_nanogpts() {
        let Some(dir) = with_shakespeare() else {
            return;
        };
        let meta = prepare(&Source::Shakespeare, dir.path(), None, false).unwrap().meta;
        assert_eq!((meta.train_tokens, meta.val_tokens, meta.vocab_size), (301_966, 36_059, 50_257));
        assert!(prepare(&Source::Shakespeare, dir.path(), Some(TokenizerKind::Char), false).is_err());
    }

    #[test]
    fn somebodys_own_input_is_not_downloaded_over() {
        let dir = tempfile::tempdir().unwrap();
        let input = dir.path().join("input.txt");
        fs::write(&input, "my own text").unwrap();
        let error = prepare(&Source::ShakespeareChar, dir.path(), None, false).unwrap_err();
        assert!(error.to_string().contains("is not tiny Shakespeare"), "{error}");
        assert_eq!(fs::read_to_string(input).unwrap(), "my own text");
    }

    #[test]
    fn the_builtin_text_becomes_a_dataset() {
        let dir = tempfile::tempdir().unwrap();
        let summary = prepare(&Source::Builtin, dir.path(), None, false).unwrap();
        let meta = Meta::load(dir.path()).unwrap().unwrap();
        assert_eq!(meta, summary.meta);
        let data = Dataset::open(dir.path(), None, 64).unwrap();
        assert_eq!(data.len(Split::Train) + data.len(Split::Val), summary.characters);
        let ids: Vec<u16> = data.batch(Split::Val, 1, 0, 1, 64).unwrap().x.iter().map(|&id| id as u16).collect();
        let window = Tokenizer::from_meta(&meta).unwrap().decode(&ids);
        assert!(corpus::builtin().contains(&window), "{window}");
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 3, "no temporary file stays: {names:?}");
    }

    #[test]
    fn the_split_counts_characters_and_line_endings_are_one() {
        let (_dir, result) = prepare_bytes("ééééééééé\r\n".repeat(10).as_bytes(), TokenizerKind::Char);
        let meta = result.unwrap().meta;
        assert_eq!((meta.train_tokens, meta.val_tokens, meta.chars.as_str()), (90, 10, "\né"));
    }

    #[test]
    fn what_is_no_text_is_refused_with_the_reason() {
        let message = |bytes: &[u8]| format!("{:#}", prepare_bytes(bytes, TokenizerKind::Char).1.unwrap_err());
        assert!(message(b"").contains("empty"));
        assert!(message(b"ab\ncd\xFFef").contains("0xFF at offset 5, in line 2"), "{}", message(b"ab\ncd\xFFef"));
        assert!(message(b"too short").contains("leave 1 tokens"), "{}", message(b"too short"));
        let missing = Source::File("/no/such/file".into());
        let error = prepare(&missing, tempfile::tempdir().unwrap().path(), None, false).unwrap_err();
        assert!(error.to_string().contains("/no/such/file"));
    }
}
