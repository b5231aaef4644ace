//! What changes with every step, in a small buffer of its own.
//!
//! CubeCL keeps the uniform of a launch and finds it again by its words; a launch that is recorded has the same uniform for ever. So
//! a word that is new in every step is in no uniform. It stands in a buffer, the clock, which is written once a step: the step that
//! dropout's masks are drawn for, of which a uniform holds only the distance, and the learning rate, which the verdict hands on.

use std::cell::{Cell, RefCell};

use burn_cubecl::CubeDevice;
use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::server::Handle;

/// Words of the clock, 16 bytes.
pub const WORDS: usize = 4;

/// Their places: the step of the masks; the learning rate and what decaying parameters are multiplied by, both f32.
const STEP: usize = 0;
const RATE: usize = 1;
const KEEP: usize = 2;

thread_local! {
    /// What this thread's launches go by.
    static NOW: Cell<[u32; WORDS]> = const { Cell::new([0; WORDS]) };
    /// The clock of each device that this thread launches on.
    static CLOCKS: RefCell<Vec<Clock>> = const { RefCell::new(Vec::new()) };
}

struct Clock {
    device: CubeDevice,
    buffer: Handle,
    /// What was last written into it, where that counts.
    written: Option<[u32; WORDS]>,
}

/// Sets the step that this thread's launches count from.
pub fn set_step(step: u32) {
    set(STEP, step);
}

/// Sets the learning rate of this thread's verdicts, and what parameters that decay are multiplied by.
pub fn set_rates(rate: f32, keep: f32) {
    set(RATE, rate.to_bits());
    set(KEEP, keep.to_bits());
}

fn set(place: usize, word: u32) {
    let mut words = NOW.get();
    words[place] = word;
    NOW.set(words);
}

/// What was set: step, learning rate, keep.
pub fn words() -> [u32; WORDS] {
    NOW.get()
}

/// What a launch's uniform says of `step`: how far it is from the clock.
pub fn distance(step: u32) -> u32 {
    step.wrapping_sub(NOW.get()[STEP])
}

/// Lets this thread's clocks be written again before they are read, whatever stands in them.
pub fn rewrite() {
    CLOCKS.with_borrow_mut(|clocks| clocks.iter_mut().for_each(|clock| clock.written = None));
}

/// The buffer of `device`'s clock, written first where it is behind: behind all that was queued before, ahead of what follows.
pub fn buffer(client: &Client, device: &CubeDevice) -> Handle {
    let now = NOW.get();
    let bytes = || now.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<_>>();
    CLOCKS.with_borrow_mut(|clocks| {
        if let Some(clock) = clocks.iter_mut().find(|clock| clock.device == *device) {
            if clock.written != Some(now) {
                client.write(&clock.buffer, Bytes::from_bytes_vec(bytes()));
                clock.written = Some(now);
            }
            return clock.buffer.clone();
        }
        let buffer = client.create_from_slice(&bytes());
        clocks.push(Clock { device: device.clone(), buffer: buffer.clone(), written: Some(now) });
        buffer
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uniform_is_the_same_in_every_step() {
        for step in [0, 7, u32::MAX] {
            set_step(step);
            assert_eq!(distance(step), 0);
            assert_eq!(distance(step.wrapping_add(3)), 3);
            assert_eq!(distance(5).wrapping_add(step), 5, "any other step still comes out");
        }
    }

    #[test]
    fn a_word_is_set_alone() {
        set_step(7);
        set_rates(1.0, 0.5);
        set_step(8);
        assert_eq!(words(), [8, 1f32.to_bits(), 0.5f32.to_bits(), 0]);
    }
}
