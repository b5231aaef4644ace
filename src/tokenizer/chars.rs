//! One id a character.

use std::collections::{BTreeSet, HashMap};

use anyhow::{Result, anyhow, ensure};

/// One id for each distinct character, in code point order, as nanoGPT numbers them.
#[derive(Clone, Debug, PartialEq)]
pub struct CharTokenizer {
    pub(super) chars: Vec<char>,
    ids: HashMap<char, u16>,
}

impl CharTokenizer {
    /// The vocabulary of a text: its distinct characters, sorted.
    pub fn from_text(text: &str) -> Result<Self> {
        let distinct: BTreeSet<char> = text.chars().collect();
        Self::from_chars(&distinct.into_iter().collect::<String>())
    }

    /// The vocabulary whose id `i` is the `i`-th character of `chars`. Each must occur once.
    pub fn from_chars(chars: &str) -> Result<Self> {
        let chars: Vec<char> = chars.chars().collect();
        ensure!(!chars.is_empty(), "a character vocabulary needs at least one character");
        ensure!(
            chars.len() <= usize::from(u16::MAX),
            "{} distinct characters do not fit in 16-bit token ids (at most {}); use the gpt2 tokenizer for this text",
            chars.len(),
            u16::MAX
        );
        let mut ids = HashMap::with_capacity(chars.len());
        for (id, &c) in (0u16..).zip(&chars) {
            ensure!(ids.insert(c, id).is_none(), "the character {c:?} occurs twice in the vocabulary");
        }
        Ok(Self { chars, ids })
    }

    /// The characters in the order of their ids.
    pub fn chars(&self) -> String {
        self.chars.iter().collect()
    }

    pub(super) fn encode(&self, text: &str) -> Result<Vec<u16>> {
        let id = |(position, c): (usize, char)| self.ids.get(&c).copied().ok_or_else(|| self.unknown(c, position));
        text.chars().enumerate().map(id).collect()
    }

    fn unknown(&self, c: char, position: usize) -> anyhow::Error {
        let other_case = || c.to_lowercase().chain(c.to_uppercase()).find(|o| self.ids.contains_key(o));
        let hint = match other_case() {
            Some(other) => format!("write {other:?} instead"),
            None => "leave it out, or prepare the data again from a text that contains it".to_string(),
        };
        anyhow!(
            "the character {c:?} (U+{:04X}, character {} of the text) is not among the {} that this model knows; \
             {hint}",
            u32::from(c),
            position + 1,
            self.chars.len()
        )
    }
}
