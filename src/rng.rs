//! Random numbers that are a function of where they are used, not of what ran before.
//!
//! Everything random comes from Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
//! a keyed bijection from a 128-bit counter to 128 random bits. The key is the seed; the counter names the use. So a
//! batch, a dropout mask or a sample can be regenerated at any time, on any device, from a few integers, and a resumed
//! run is the same run.
//!
//! The last word of a counter is the site, everywhere, so two uses never share a counter. The other three are the use's
//! own: a position (low, high) and a row for batches, a position and 0 for a `Stream`, and so on.

use std::f64::consts::TAU;

/// Sites: which use of randomness a counter belongs to.
pub mod site {
    /// Start positions of training batches.
    pub const DATA_TRAIN: u32 = 1;
    /// Start positions of validation batches.
    pub const DATA_VAL: u32 = 2;
    /// Initial weights.
    pub const INIT: u32 = 3;
    /// Choice of tokens when sampling text.
    pub const SAMPLE: u32 = 4;
    /// First of the dropout sites: the masks are numbered on from here, so no other site may lie above it.
    pub const DROPOUT: u32 = 0x100;
}

/// The Philox4x32-10 block function: 128 random bits for `counter` under `key`. Weights, batches and samples are made of it.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    philox_rounds::<10>(counter, key)
}

/// Philox4x32-7, for dropout's masks: the fewest rounds that pass BigCrush in the paper. A step draws a hundred million words.
pub fn philox4x32_7(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    philox_rounds::<7>(counter, key)
}

/// [`philox4x32_7`] of N counters side by side, each word of all together: what the compiler makes vectors of.
#[inline(always)]
pub fn philox4x32_7_lanes<const N: usize>(counters: [[u32; N]; 4], key: [u32; 2]) -> [[u32; N]; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counters;
    let [mut k0, mut k1] = key;
    for _ in 0..7 {
        for i in 0..N {
            let p0 = 0xD251_1F53_u64 * u64::from(c0[i]);
            let p1 = 0xCD9E_8D57_u64 * u64::from(c2[i]);
            c0[i] = (p1 >> 32) as u32 ^ c1[i] ^ k0;
            c1[i] = p1 as u32;
            c2[i] = (p0 >> 32) as u32 ^ c3[i] ^ k1;
            c3[i] = p0 as u32;
        }
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

fn philox_rounds<const ROUNDS: usize>(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..ROUNDS {
        let p0 = 0xD251_1F53_u64 * u64::from(c0);
        let p1 = 0xCD9E_8D57_u64 * u64::from(c2);
        c0 = (p1 >> 32) as u32 ^ c1 ^ k0;
        c1 = p1 as u32;
        c2 = (p0 >> 32) as u32 ^ c3 ^ k1;
        c3 = p0 as u32;
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// A 64-bit value as Philox words, low word first: seeds as keys, positions as the first half of a counter.
pub fn words(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

/// Maps 64 random bits to `0..n` by multiply-shift; 0 for `n == 0`.
///
/// The bias is below `n / 2^64`, far below what any run could notice, and unlike rejection it costs exactly one draw.
pub fn uniform_u64(bits: u64, n: u64) -> u64 {
    ((u128::from(bits) * u128::from(n)) >> 64) as u64
}

/// A sequential generator over Philox: one stream for each (seed, site), addressed by the count of 32-bit words drawn.
#[derive(Clone, Debug)]
pub struct Stream {
    key: [u32; 2],
    site: u32,
    position: u64,
    /// The block that holds word `position`; meaningful unless `position` is at a block's first word.
    block: [u32; 4],
}

impl Stream {
    /// The stream of `seed` at `site`, at position 0.
    pub fn new(seed: u64, site: u32) -> Self {
        Self { key: words(seed), site, position: 0, block: [0; 4] }
    }

    /// How many 32-bit words have been drawn: with the seed and the site, the whole state.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Goes to a position that [`Stream::position`] gave, forwards or backwards, at the cost of one draw.
    pub fn seek(&mut self, position: u64) {
        self.position = position;
        self.block = self.block_at(position);
    }

    /// 32 uniform bits.
    pub fn next_u32(&mut self) -> u32 {
        let lane = (self.position % 4) as usize;
        if lane == 0 {
            self.block = self.block_at(self.position);
        }
        self.position = self.position.wrapping_add(1);
        self.block[lane]
    }

    /// 64 uniform bits: two words, low word first.
    pub fn next_u64(&mut self) -> u64 {
        let low = u64::from(self.next_u32());
        low | u64::from(self.next_u32()) << 32
    }

    /// Uniform in [0, 1), on the grid of 2^-53; two words.
    pub fn next_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal by Box-Muller; two words.
    ///
    /// Its partner (the sine) is not kept: the position alone stays the whole state. 32 bits of radius reach 6.7 sigma.
    pub fn normal(&mut self) -> f64 {
        const SCALE: f64 = 1.0 / (1u64 << 32) as f64;
        let radius = (f64::from(self.next_u32()) + 0.5) * SCALE; // in (0, 1): the logarithm is finite
        let angle = f64::from(self.next_u32()) * SCALE;
        (-2.0 * radius.ln()).sqrt() * (TAU * angle).cos()
    }

    fn block_at(&self, position: u64) -> [u32; 4] {
        let [low, high] = words(position / 4);
        philox4x32([low, high, 0, self.site], self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that Random123 ships for philox4x32 with 10 and with 7 rounds.
    #[test]
    fn philox_matches_random123() {
        let known = [
            ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
            ([!0; 4], [!0; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
            (
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0],
                [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
            ),
        ];
        for (counter, key, expected) in known {
            assert_eq!(philox4x32(counter, key), expected);
        }
        let of_seven_rounds = [
            [0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48],
            [0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662],
            [0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a],
        ];
        for ((counter, key, _), expected) in known.into_iter().zip(of_seven_rounds) {
            assert_eq!(philox4x32_7(counter, key), expected);
        }
    }

    #[test]
    fn a_stream_resumes_at_any_position() {
        let mut stream = Stream::new(1337, site::INIT);
        let drawn: Vec<u32> = (0..41).map(|_| stream.next_u32()).collect();
        assert_eq!(stream.position(), 41);
        for start in 0..drawn.len() {
            let mut resumed = Stream::new(1337, site::INIT);
            resumed.seek(start as u64);
            let rest: Vec<u32> = (start..drawn.len()).map(|_| resumed.next_u32()).collect();
            assert_eq!(rest, drawn[start..], "from position {start}");
        }
    }

    #[test]
    fn streams_differ_by_seed_and_site() {
        let first = |seed, site| Stream::new(seed, site).next_u64();
        let base = first(1, site::INIT);
        assert_ne!(base, first(2, site::INIT));
        assert_ne!(base, first(1 << 32 | 1, site::INIT), "the seed's high word counts");
        assert_ne!(base, first(1, site::SAMPLE));
    }

    #[test]
    fn multiply_shift_covers_its_range() {
        assert_eq!(uniform_u64(u64::MAX, 0), 0);
        assert_eq!(uniform_u64(0, 10), 0);
        assert_eq!(uniform_u64(u64::MAX, 10), 9);
        assert_eq!(uniform_u64(1 << 63, 10), 5);
        assert_eq!(uniform_u64(u64::MAX, u64::MAX), u64::MAX - 1);
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        const N: usize = 200_000;
        let mut stream = Stream::new(7, site::SAMPLE);
        let uniform: Vec<f64> = (0..N).map(|_| stream.next_f64()).collect();
        assert!(uniform.iter().all(|u| (0.0..1.0).contains(u)));
        let normal: Vec<f64> = (0..N).map(|_| stream.normal()).collect();
        let moment = |values: &[f64], power| values.iter().map(|v| v.powi(power)).sum::<f64>() / N as f64;
        // Five standard errors of each mean.
        assert!((moment(&uniform, 1) - 0.5).abs() < 0.0033);
        assert!((moment(&uniform, 2) - 1.0 / 3.0).abs() < 0.0034);
        assert!(moment(&normal, 1).abs() < 0.0112);
        assert!((moment(&normal, 2) - 1.0).abs() < 0.0159);
        assert!((moment(&normal, 4) - 3.0).abs() < 0.11);
    }
}
