//! How much work the GPU is given at once.
//!
//! CubeCL submits 64 launches in one command buffer, whatever they compute. Windows resets a GPU whose command buffer takes
//! longer than 2 s, Metal kills one after about 5 s. Sixty-four launches of GPT-2 124M's head are 3.2 TFLOP: nothing to a large
//! GPU, twenty seconds to a small one. So launches are counted in floating-point operations and submitted before they are too many.

use std::cell::{Cell, RefCell};

/// A byte that a kernel moves counts as this many operations: what small GPUs compute while they read one.
const PER_BYTE: f64 = 10.0;

thread_local! {
    /// Work that this thread has launched since it last submitted. CubeCL submits by itself too, unseen: this is an upper bound.
    static QUEUED: Cell<f64> = const { Cell::new(0.0) };
    /// Launches since the step began; none: CubeCL submits as it likes.
    static OF_STEP: Cell<Option<u32>> = const { Cell::new(None) };
    /// The work of every launch of this thread, while it is weighed.
    static WEIGHED: RefCell<Option<Vec<f64>>> = const { RefCell::new(None) };
}

/// Launches of a step that are submitted by themselves, and launches at which this ends. In between twice as many are submitted
/// each time. Where each step is waited for, the device has nothing to do until the first submit, and little until the second: 64
/// launches are half a millisecond of the host's time.
const FIRST_LAUNCHES: u32 = 4;
const LAST_OF_FIRST: u32 = 60;

/// Says that a step begins: its first launches are submitted soon.
pub fn begin_step() {
    OF_STEP.set(Some(0));
}

/// Counts a launch of the step, and says whether what was launched before is submitted: 4 launches, then 8, 16 and 32.
fn is_early() -> bool {
    let Some(launches) = OF_STEP.get() else {
        return false;
    };
    OF_STEP.set(Some(launches + 1).filter(|_| launches < LAST_OF_FIRST));
    launches > 0 && (launches + FIRST_LAUNCHES).is_power_of_two()
}

/// Operations that a device of this kind (`discrete`, `integrated`, ...) may be given at once.
///
/// A small integrated GPU sustains 0.15 TFLOP/s with our kernels, an M1 about 1, the smallest discrete ones 0.5: each takes a
/// second or two.
pub fn limit(kind: &str) -> f64 {
    if kind == "discrete" { 1e12 } else { 2e11 }
}

/// What `launches` gives, and the work of each launch that this thread makes meanwhile, in [`limit`]'s operations.
pub fn weighed<T>(launches: impl FnOnce() -> T) -> (T, Vec<f64>) {
    /// Ends it, also where the work panics.
    struct Weighing;
    impl Drop for Weighing {
        fn drop(&mut self) {
            WEIGHED.set(None);
        }
    }
    WEIGHED.set(Some(Vec::new()));
    let _weighing = Weighing;
    let done = launches();
    (done, WEIGHED.take().unwrap_or_default())
}

/// The most work in any `count` launches that follow each other.
pub fn heaviest(works: &[f64], count: usize) -> f64 {
    works.windows(count.min(works.len()).max(1)).map(|window| window.iter().sum()).fold(0.0, f64::max)
}

/// Counts a launch of `flops` over `bytes`, and says whether what was launched before has to be submitted first.
pub fn is_full(flops: f64, bytes: usize, limit: f64) -> bool {
    let work = flops + PER_BYTE * bytes as f64;
    WEIGHED.with_borrow_mut(|weighed| weighed.iter_mut().for_each(|weighed| weighed.push(work)));
    let before = QUEUED.get();
    let full = is_early() || before > 0.0 && before + work > limit;
    QUEUED.set(if full { work } else { before + work });
    full
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_submitted_before_it_is_too_much() {
        let full: Vec<bool> = [40.0, 40.0, 40.0, 200.0, 0.0, 1.0].map(|flops| is_full(flops, 0, 100.0)).into();
        assert_eq!(full, [false, false, true, true, true, false]);
        assert!(is_full(0.0, 10, 100.0), "bytes count too");
    }

    #[test]
    fn launches_are_weighed_and_the_heaviest_in_a_row_are_found() {
        let ((), works) = weighed(|| {
            for flops in [1.0, 5.0, 2.0, 4.0, 0.0] {
                is_full(flops, 0, f64::INFINITY);
            }
            is_full(0.0, 1, f64::INFINITY);
        });
        assert_eq!(works, [1.0, 5.0, 2.0, 4.0, 0.0, PER_BYTE]);
        assert_eq!([1, 2, 3, 6, 64].map(|count| heaviest(&works, count)), [10.0, 10.0, 14.0, 22.0, 22.0]);
        assert_eq!(heaviest(&[], 64), 0.0);
        is_full(7.0, 0, f64::INFINITY);
        assert!(weighed(|| ()).1.is_empty(), "a launch outside");
    }

    #[test]
    fn a_steps_first_launches_are_submitted_soon() {
        for _ in 0..2 {
            begin_step();
            let submitted: Vec<u32> = (0..200).filter(|_| is_full(0.0, 0, f64::INFINITY)).collect();
            assert_eq!(submitted, [4, 12, 28, 60]);
        }
    }
}
