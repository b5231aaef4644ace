//! `meta.json`, the file beside a dataset and in a checkpoint that says how text became tokens.

use std::{fs, io, path::Path};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Tokenizer, TokenizerKind};
use crate::config::MOST_VOCABULARY;

/// `meta.json`: what made a dataset's tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// Every token id is below.
    pub vocab_size: usize,
    /// What encoded the text.
    pub tokenizer: TokenizerKind,
    /// The characters in the order of their ids; empty unless `tokenizer` is `char`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub chars: String,
    /// Where the text came from: a name, a path or an address.
    #[serde(default)]
    pub source: String,
    /// SHA-256 of the text, in hexadecimal.
    #[serde(default)]
    pub sha256: String,
    /// Tokens in train.bin.
    #[serde(default)]
    pub train_tokens: u64,
    /// Tokens in val.bin.
    #[serde(default)]
    pub val_tokens: u64,
}

impl Meta {
    /// Its name in a dataset's directory.
    pub const FILE: &str = "meta.json";

    /// Reads `dir/meta.json`; `None` where there is none.
    pub fn load(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(Self::FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        let broken = || format!("{} is broken; prepare the data again or mend it", path.display());
        let meta: Self = serde_json::from_str(&text).with_context(broken)?;
        meta.check().with_context(broken)?;
        Ok(Some(meta))
    }

    /// As readable JSON, with a newline at the end.
    pub fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    fn check(&self) -> Result<()> {
        let ids = Tokenizer::from_meta(self)?.vocab_size();
        if self.vocab_size < ids {
            bail!("vocab_size is {}, yet its tokenizer has {ids} ids", self.vocab_size);
        }
        if self.vocab_size > MOST_VOCABULARY {
            bail!("vocab_size is {}, and no vocabulary has more than {MOST_VOCABULARY} ids", self.vocab_size);
        }
        Ok(())
    }
}
