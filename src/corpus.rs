//! A built-in text to learn from: about a megabyte of short dialogues, the same on every machine.
//!
//! It needs no download, and what a model learned from it can be checked: many of the dialogues ask for a small sum, so
//! generated text can be marked like homework (`check_answers`). The answers repeat the question's numbers ("7 plus 5
//! is 12."), which keeps a sum within reach of a context of 64 characters.

/// Characters after which the text ends at the next complete dialogue.
const LENGTH: usize = 1_050_000;

/// Equally long, so that an answer stands equally far behind its question: copying the numbers is learned sooner.
const NAMES: [&str; 8] = ["ANNA", "BILL", "EMMA", "FINN", "HUGO", "LUCY", "MIRA", "OTTO"];

const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// Words for spelling: short, and never the same read backwards.
const WORDS: [&str; 24] = [
    "ant", "bird", "cat", "cow", "dog", "fish", "fox", "goat", "hen", "hill", "lake", "leaf", "milk", "moon", "owl",
    "pear", "rain", "road", "sea", "ship", "snow", "star", "sun", "tree",
];

const OPPOSITES: [(&str, &str); 12] = [
    ("big", "small"),
    ("cold", "hot"),
    ("dark", "light"),
    ("dry", "wet"),
    ("early", "late"),
    ("empty", "full"),
    ("fast", "slow"),
    ("high", "low"),
    ("loud", "quiet"),
    ("near", "far"),
    ("old", "new"),
    ("open", "shut"),
];

/// The built-in text: ASCII, between 1.0 and 1.1 million characters, the same for every call.
///
/// It is a sequence of two-line dialogues, each followed by an empty line:
///
/// ```text
/// ANNA: What is 7 plus 5?
/// BEN: 7 plus 5 is 12.
/// ```
pub fn builtin() -> String {
    let mut rng = SplitMix(0x6770_742D_7767_7075);
    let mut text = String::with_capacity(LENGTH + 128);
    while text.len() < LENGTH {
        let asker = rng.below(NAMES.len());
        let answerer = (asker + 1 + rng.below(NAMES.len() - 1)) % NAMES.len();
        let (question, answer) = dialogue(&mut rng);
        text += &format!("{}: {question}\n{}: {answer}\n\n", NAMES[asker], NAMES[answerer]);
    }
    text
}

/// Marks the sums in a generated text: `(right, total)`.
///
/// A sum is a line that asks for one ("What is 7 plus 5?"), and its answer the last number of the line below. Questions
/// that the sample cuts off before their answer's full stop do not count; an answer without a number is wrong.
pub fn check_answers(sample: &str) -> (usize, usize) {
    let (mut right, mut total) = (0, 0);
    let lines: Vec<&str> = sample.lines().collect();
    for pair in lines.windows(2) {
        let Some(expected) = asked_sum(pair[0]) else {
            continue;
        };
        let answer = pair[1].trim_end();
        if !answer.ends_with('.') {
            continue;
        }
        total += 1;
        let given = answer.split_whitespace().filter_map(number).next_back();
        right += usize::from(given == Some(expected));
    }
    (right, total)
}

/// One question and its answer; seven of ten are sums.
fn dialogue(rng: &mut SplitMix) -> (String, String) {
    match rng.below(20) {
        0..14 => sum(rng),
        14 => comparison(rng),
        15 => counting(rng),
        16 | 17 => day(rng),
        18 => opposite(rng),
        _ => spelling(rng),
    }
}

/// `low + rest = high`, forwards or backwards, `high` up to ten: 45 sums and 45 differences, few enough for a model of
/// 4 layers and 128 dimensions to have most of them after 2,000 batches of 12 x 64 characters.
fn sum(rng: &mut SplitMix) -> (String, String) {
    let high = 2 + rng.below(9);
    let low = 1 + rng.below(high - 1);
    let rest = high - low;
    match rng.below(10) {
        0..4 => (format!("What is {low} plus {rest}?"), format!("{low} plus {rest} is {high}.")),
        4..8 => (format!("What is {high} minus {low}?"), format!("{high} minus {low} is {rest}.")),
        8 => (format!("Can you add {low} and {rest}?"), format!("Yes, {low} and {rest} make {high}.")),
        _ => (format!("Which number is {low} more than {rest}?"), format!("{low} more than {rest} is {high}.")),
    }
}

fn comparison(rng: &mut SplitMix) -> (String, String) {
    let a = 1 + rng.below(20);
    let b = 1 + (a + rng.below(19)) % 20; // any of 1..=20 but a
    let (high, low) = (a.max(b), a.min(b));
    if rng.below(2) == 0 {
        (format!("Which is larger, {a} or {b}?"), format!("{high} is larger than {low}."))
    } else {
        (format!("Which is smaller, {a} or {b}?"), format!("{low} is smaller than {high}."))
    }
}

fn counting(rng: &mut SplitMix) -> (String, String) {
    let (from, steps) = (1 + rng.below(9), 2 + rng.below(4));
    let mut numbers: Vec<String> = (from..=from + steps).map(|n| n.to_string()).collect();
    let mut question = format!("Please count from {} to {}.", from, from + steps);
    if rng.below(3) == 0 {
        numbers.reverse();
        question = format!("Now count down from {} to {}.", from + steps, from);
    }
    (question, format!("{}.", numbers.join(", ")))
}

fn day(rng: &mut SplitMix) -> (String, String) {
    let i = rng.below(DAYS.len());
    let (today, next) = (DAYS[i], DAYS[(i + 1) % DAYS.len()]);
    match rng.below(3) {
        0 => (format!("Which day comes after {today}?"), format!("{next} comes after {today}.")),
        1 => (format!("Which day comes before {next}?"), format!("{today} comes before {next}.")),
        _ => (format!("Today is {today}, isn't it?"), format!("Yes! And tomorrow is {next}.")),
    }
}

fn opposite(rng: &mut SplitMix) -> (String, String) {
    let (mut one, mut other) = OPPOSITES[rng.below(OPPOSITES.len())];
    if rng.below(2) == 0 {
        (one, other) = (other, one);
    }
    (format!("What is the opposite of {one}?"), format!("The opposite of {one} is {other}."))
}

fn spelling(rng: &mut SplitMix) -> (String, String) {
    let word = WORDS[rng.below(WORDS.len())];
    let backwards: String = word.chars().rev().collect();
    (format!("How do you spell {word} backwards?"), format!("Easy: {word} backwards is {backwards}."))
}

/// The result of the sum that a line asks for, if it asks for one.
fn asked_sum(line: &str) -> Option<i64> {
    let question = line.trim_end().strip_suffix('?')?;
    let words: Vec<&str> = question.split_whitespace().collect();
    words.windows(4).find_map(|w| match w {
        [a, "more", "than", b] => Some(number(a)? + number(b)?),
        ["add", a, "and", b] => Some(number(a)? + number(b)?),
        [_, a, "plus", b] => Some(number(a)? + number(b)?),
        [_, a, "minus", b] => Some(number(a)? - number(b)?),
        _ => None,
    })
}

/// A word as a number, without the punctuation behind it. Short ones only: a sample may hold any run of digits.
fn number(word: &str) -> Option<i64> {
    let digits = word.trim_end_matches(['.', ',', '!']);
    let plausible = (1..=9).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
    plausible.then(|| digits.parse().ok()).flatten()
}

/// SplitMix64: enough randomness for a text, and private so that nothing else can shift the text by drawing from it.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n`.
    fn below(&mut self, n: usize) -> usize {
        crate::rng::uniform_u64(self.next(), n as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};
    use std::collections::BTreeSet;

    #[test]
    fn the_text_is_as_promised() {
        let text = builtin();
        assert!((1_000_000..1_100_000).contains(&text.len()));
        assert!(text.bytes().all(|b| b == b'\n' || (b' '..=b'~').contains(&b)));
        let symbols: BTreeSet<char> = text.chars().collect();
        assert!((50..=65).contains(&symbols.len()), "{}", symbols.len());
        assert!(text.ends_with(".\n\n"));
    }

    /// Published losses are losses on this text: a change of it must be a decision.
    #[test]
    fn the_text_never_changes() {
        let sum: String = Sha256::digest(builtin()).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(sum, "a16b3f2732291744bfe8a7f9d4c40323032c1b8dd26d378ee5d725b7209d1de1");
    }

    #[test]
    fn every_sum_in_the_text_is_right() {
        let text = builtin();
        let (right, total) = check_answers(&text);
        assert_eq!(right, total);
        let dialogues = text.matches("\n\n").count();
        assert!(total * 2 > dialogues, "{total} sums in {dialogues} dialogues");
    }

    #[test]
    fn answers_are_marked() {
        let cases = [
            ("ANNA: What is 7 plus 5?\nBEN: 7 plus 5 is 12.\n", (1, 1)),
            ("ANNA: What is 7 plus 5?\nBEN: 7 plus 5 is 13.\n", (0, 1)),
            ("ANNA: What is 9 minus 4?\nBEN: 9 minus 4 is 5.\n", (1, 1)),
            ("ANNA: What is 4 minus 9?\nBEN: 4 minus 9 is 5.\n", (0, 1)),
            ("A: Which number is 2 more than 3?\nB: 2 more than 3 is 5.", (1, 1)),
            ("A: Can you add 2 and 3?\nB: Yes, 2 and 3 make 5.", (1, 1)),
            ("A: Can you add 2 and 3?\nB: Friday comes after Monday.", (0, 1)),
            ("A: What is 7 plus 5?\nB: 7 plus 5 is 1", (0, 0)), // cut off
            ("A: What is 7 plus 5?", (0, 0)),
            ("A: Which is larger, 7 or 5?\nB: 7 is larger than 5.", (0, 0)),
            ("A: 7 plus 5 is 12.\nB: 7 plus 5 is 12.", (0, 0)), // no question
            ("A: What is 99999999999999999999 plus 1?\nB: 1.", (0, 0)),
            ("", (0, 0)),
        ];
        for (sample, expected) in cases {
            assert_eq!(check_answers(sample), expected, "{sample}");
        }
    }
}
