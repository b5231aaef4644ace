//! Text to token ids and back: one id a character, or GPT-2's byte pair encoding.
//!
//! `meta.json` beside a dataset says which of the two made it, so that samples decode the way the text was encoded.

mod chars;
mod meta;

use std::{fmt, str::FromStr};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

pub use chars::CharTokenizer;
pub use meta::Meta;

/// Ids of GPT-2's vocabulary, `<|endoftext|>` included.
pub const GPT2_VOCAB: usize = 50_257;
/// nanoGPT's vocabulary for GPT-2 tokens without a meta file: [`GPT2_VOCAB`] rounded up to a multiple of 64 for speed.
pub const GPT2_PADDED_VOCAB: usize = 50_304;
/// GPT-2's `<|endoftext|>`, which separates documents. Text never encodes to it.
pub const END_OF_TEXT: u16 = 50_256;

/// GPT-2's splitter gives up on longer runs of whitespace (its regular expression backtracks through them).
const MAX_WHITESPACE: usize = 100_000;
/// About how much text [`Tokenizer::encode`] hands to the byte pair encoder at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// The kinds of tokenizer, as `meta.json` and the command line name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum TokenizerKind {
    /// One id for each distinct character.
    Char,
    /// GPT-2's byte pair encoding (`r50k_base`).
    Gpt2,
}

impl fmt::Display for TokenizerKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Char => "char",
            Self::Gpt2 => "gpt2",
        })
    }
}

impl FromStr for TokenizerKind {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        [Self::Char, Self::Gpt2]
            .into_iter()
            .find(|kind| kind.to_string() == name)
            .ok_or_else(|| anyhow!("there is no tokenizer {name:?}; it is char or gpt2"))
    }
}

/// A tokenizer of either kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Tokenizer {
    /// One id for each distinct character.
    Char(CharTokenizer),
    /// GPT-2's byte pair encoding.
    Gpt2,
}

impl Tokenizer {
    /// The tokenizer that `meta` describes.
    pub fn from_meta(meta: &Meta) -> Result<Self> {
        Ok(match meta.tokenizer {
            TokenizerKind::Char => Self::Char(CharTokenizer::from_chars(&meta.chars)?),
            TokenizerKind::Gpt2 => Self::Gpt2,
        })
    }

    /// Which kind it is.
    pub fn kind(&self) -> TokenizerKind {
        match self {
            Self::Char(_) => TokenizerKind::Char,
            Self::Gpt2 => TokenizerKind::Gpt2,
        }
    }

    /// How many ids there are; every id that [`Tokenizer::encode`] returns is below.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Char(tokenizer) => tokenizer.chars.len(),
            Self::Gpt2 => GPT2_VOCAB,
        }
    }

    /// The ids of `text`. Special tokens get no special treatment: `<|endoftext|>` is encoded as the text it is.
    ///
    /// Errors: a character outside a character vocabulary; for GPT-2, more than 100,000 whitespace characters in a row.
    pub fn encode(&self, text: &str) -> Result<Vec<u16>> {
        self.encode_with_progress(text, |_| ())
    }

    /// [`Tokenizer::encode`], calling `progress` now and then with the number of further bytes of `text` done.
    pub fn encode_with_progress(&self, text: &str, progress: impl Fn(u64)) -> Result<Vec<u16>> {
        let mut ids = Vec::new();
        match self {
            Self::Char(tokenizer) => {
                ids = tokenizer.encode(text)?;
                progress(text.len() as u64);
            }
            Self::Gpt2 => {
                check_whitespace(text)?;
                let mut rest = text;
                while !rest.is_empty() {
                    let (chunk, tail) = rest.split_at(boundary(rest, CHUNK_BYTES));
                    for id in tiktoken_rs::r50k_base_singleton().encode_ordinary(chunk) {
                        ids.push(u16::try_from(id).context("GPT-2's ids fit in 16 bits")?);
                    }
                    progress(chunk.len() as u64);
                    rest = tail;
                }
            }
        }
        Ok(ids)
    }

    /// The text of `ids`. What is no id or no UTF-8 becomes U+FFFD, so that any model output can be shown.
    pub fn decode(&self, ids: &[u16]) -> String {
        let mut decoder = self.decoder();
        let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
        text += &decoder.finish();
        text
    }

    /// A decoder for ids that arrive one at a time.
    pub fn decoder(&self) -> Decoder<'_> {
        Decoder { tokenizer: self, pending: Vec::new() }
    }

    /// Appends the bytes of one id: not always whole characters.
    fn push_bytes(&self, id: u16, bytes: &mut Vec<u8>) {
        let known = match self {
            Self::Char(tokenizer) => tokenizer.chars.get(usize::from(id)).map(|c| c.to_string().into_bytes()),
            Self::Gpt2 => tiktoken_rs::r50k_base_singleton().decode_bytes(&[id.into()]).ok(),
        };
        // A model with a padded vocabulary can produce ids that no text has.
        bytes.extend(known.unwrap_or_else(|| char::REPLACEMENT_CHARACTER.to_string().into_bytes()));
    }
}

/// Decodes a stream of ids, holding back the bytes of a character until it is complete.
///
/// A GPT-2 token can end in the middle of a character; printing it at once would print garbage.
#[derive(Debug)]
pub struct Decoder<'a> {
    tokenizer: &'a Tokenizer,
    pending: Vec<u8>,
}

impl Decoder<'_> {
    /// Takes one id and returns the text that it completes: possibly none.
    pub fn push(&mut self, id: u16) -> String {
        self.tokenizer.push_bytes(id, &mut self.pending);
        let mut text = String::new();
        loop {
            match str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text += valid;
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text += &String::from_utf8_lossy(&self.pending[..valid]);
                    let Some(invalid) = error.error_len() else {
                        self.pending.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending.drain(..valid + invalid);
                }
            }
        }
    }

    /// What is left at the end: U+FFFD for a character that was never completed.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Where to cut `text` near `limit` bytes so that both sides encode to what the whole would.
///
/// That is before a newline between two characters that are no whitespace: there GPT-2's splitter always ends a piece,
/// and what follows never changes what it made of the text before. Without such a place the text stays whole.
fn boundary(text: &str, limit: usize) -> usize {
    let bytes = text.as_bytes();
    let plain = |byte: u8| byte.is_ascii_graphic();
    (limit..bytes.len().saturating_sub(1))
        .find(|&i| bytes[i] == b'\n' && plain(bytes[i - 1]) && plain(bytes[i + 1]))
        .unwrap_or(bytes.len())
}

fn check_whitespace(text: &str) -> Result<()> {
    let mut run = 0;
    for (position, c) in text.chars().enumerate() {
        run = if c.is_whitespace() { run + 1 } else { 0 };
        if run > MAX_WHITESPACE {
            bail!(
                "more than {MAX_WHITESPACE} whitespace characters in a row (from character {} of the text on); \
                 shorten them, or use the char tokenizer",
                position + 2 - run
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use proptest::prelude::*;

    fn abc() -> Tokenizer {
        Tokenizer::Char(CharTokenizer::from_text("cab\né").unwrap())
    }

    #[test]
    fn characters_are_numbered_in_code_point_order() {
        let tokenizer = abc();
        assert_eq!(tokenizer.vocab_size(), 5);
        assert_eq!(tokenizer.encode("\nabcé").unwrap(), [0, 1, 2, 3, 4]);
        assert_eq!(tokenizer.decode(&[4, 3, 9]), "éc\u{FFFD}");
    }

    #[test]
    fn kinds_have_names() {
        for kind in [TokenizerKind::Char, TokenizerKind::Gpt2] {
            assert_eq!(kind.to_string().parse::<TokenizerKind>().unwrap(), kind);
        }
        assert!("gpt3".parse::<TokenizerKind>().is_err());
    }

    #[test]
    fn an_unknown_character_is_named_with_its_place() {
        let message = |text| abc().encode(text).unwrap_err().to_string();
        assert!(message("éaz").contains("'z' (U+007A, character 3"), "{}", message("éaz"));
        assert!(message("A").contains("write 'a' instead"), "{}", message("A"));
    }

    #[test]
    fn vocabularies_that_cannot_be_are_refused() {
        let too_many: String = ('\0'..=char::MAX).take(65_536).collect();
        assert!(CharTokenizer::from_text(&too_many).unwrap_err().to_string().contains("gpt2"));
        assert!(CharTokenizer::from_chars("aba").is_err());
        assert!(CharTokenizer::from_text("").is_err());
    }

    /// Ids from OpenAI's tiktoken.
    #[test]
    fn gpt2_ids_are_those_of_openai() {
        assert_eq!(Tokenizer::Gpt2.encode("Hello world").unwrap(), [15496, 995]);
        assert_eq!(Tokenizer::Gpt2.decode(&[END_OF_TEXT]), "<|endoftext|>");
        assert!(!Tokenizer::Gpt2.encode("<|endoftext|>").unwrap().contains(&END_OF_TEXT));
        assert_eq!(Tokenizer::Gpt2.decode(&[50_257, 15_496]), "\u{FFFD}Hello", "a padded id");
    }

    #[test]
    fn endless_whitespace_is_an_error_not_a_panic() {
        let text = format!("ab{}", " ".repeat(2_000_000));
        let message = Tokenizer::Gpt2.encode(&text).unwrap_err().to_string();
        assert!(message.contains("from character 3 "), "{message}");
        assert!(Tokenizer::Gpt2.encode(&" ".repeat(MAX_WHITESPACE)).is_ok());
    }

    #[test]
    fn streaming_waits_for_whole_characters() {
        let ids = Tokenizer::Gpt2.encode("𝄞").unwrap();
        assert!(ids.len() > 1, "this character must take several tokens");
        let mut decoder = Tokenizer::Gpt2.decoder();
        let parts: Vec<String> = ids.iter().map(|&id| decoder.push(id)).collect();
        assert!(parts[..ids.len() - 1].iter().all(String::is_empty), "{parts:?}");
        assert_eq!(parts[ids.len() - 1], "𝄞");
        decoder.push(ids[0]);
        assert_eq!(decoder.finish(), "\u{FFFD}");
    }

    #[test]
    fn meta_survives_a_round_trip_and_a_broken_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Meta::load(dir.path()).unwrap(), None);
        let meta = Meta {
            vocab_size: 5,
            tokenizer: TokenizerKind::Char,
            chars: "\nabcé".into(),
            source: "test".into(),
            sha256: "00".into(),
            train_tokens: 9,
            val_tokens: 1,
        };
        let write = |text: &str| fs::write(dir.path().join(Meta::FILE), text).unwrap();
        write(&meta.to_json().unwrap());
        assert_eq!(Meta::load(dir.path()).unwrap(), Some(meta.clone()));
        assert_eq!(Tokenizer::from_meta(&meta).unwrap(), abc());
        write(r#"{"vocab_size": 50257, "tokenizer": "gpt2"}"#); // as one would write it by hand
        assert_eq!(Meta::load(dir.path()).unwrap().unwrap().tokenizer, TokenizerKind::Gpt2);
        for broken in ["{", r#"{"vocab_size": 2, "tokenizer": "char", "chars": "abc"}"#] {
            write(broken);
            assert!(Meta::load(dir.path()).is_err(), "{broken}");
        }
    }

    proptest! {
        #[test]
        fn text_survives_both_tokenizers(text in "\\PC{1,40}[ \n]{0,3}\\PC{0,20}") {
            let char = Tokenizer::Char(CharTokenizer::from_text(&text).unwrap());
            for tokenizer in [char, Tokenizer::Gpt2] {
                prop_assert_eq!(tokenizer.decode(&tokenizer.encode(&text).unwrap()), text.clone());
            }
        }

        #[test]
        fn streamed_text_is_the_whole_text(ids in prop::collection::vec(0u16..50_257, 0..40)) {
            let mut bytes = Vec::new();
            ids.iter().for_each(|&id| Tokenizer::Gpt2.push_bytes(id, &mut bytes));
            prop_assert_eq!(Tokenizer::Gpt2.decode(&ids), String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn cutting_at_a_boundary_changes_no_token(text in "[ab1.' \n\r\té]{0,30}[a \n]{0,30}", limit in 1usize..60) {
            let (head, tail) = text.split_at(boundary(&text, limit));
            let mut parts = Tokenizer::Gpt2.encode(head).unwrap();
            parts.extend(Tokenizer::Gpt2.encode(tail).unwrap());
            prop_assert_eq!(parts, Tokenizer::Gpt2.encode(&text).unwrap());
        }
    }
}
