//! The verdict on a step, made on the device so that nobody waits: is the gradient finite, is it an outlier, how is it
//! clipped and unscaled, and what becomes of the loss scale. AdamW obeys it; the host reads it when it logs.

use burn::backend::{Backend, Dispatch, Flex, TensorMetadata, backend_extension, tensor::FloatTensor};
use burn::tensor::{Shape, Tensor, TensorData};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};

use crate::kernel::lanes::serves;
use crate::kernel::{Kernel, Made, clock, empty, own};

/// Losses and norms of the last steps that an outlier is measured against, as in llm.c.
pub const WINDOW: usize = 128;

/// The places of what is remembered from step to step, all f32.
pub mod state {
    use super::WINDOW;

    /// What the loss's gradient is multiplied by.
    pub const LOSS_SCALE: usize = 0;
    /// Finite steps since the scale last changed.
    pub const GOOD_STEPS: usize = 1;
    /// Updates made: AdamW's t.
    pub const UPDATES: usize = 2;
    /// Steps skipped because a number was not finite.
    pub const OVERFLOWS: usize = 3;
    /// Steps skipped because the loss or the norm was an outlier.
    pub const SPIKES: usize = 4;
    /// Steps remembered, up to [`WINDOW`].
    pub const REMEMBERED: usize = 5;
    /// Where in the window the next step goes.
    pub const NEXT: usize = 6;
    /// The last step's mean loss in nats.
    pub const LOSS: usize = 7;
    /// The last step's gradient norm, unscaled, before clipping.
    pub const NORM: usize = 8;
    /// 1 where the last step's update was made, else 0.
    pub const APPLIED: usize = 9;
    /// 1 where the loss scale is one, and moves; 0 where it is always 1, in f32. Verdicts leave it as it is.
    pub const HAS_SCALE: usize = 10;
    /// The last losses.
    pub const LOSSES: usize = 16;
    /// The last norms.
    pub const NORMS: usize = LOSSES + WINDOW;
    /// Elements in all.
    pub const SIZE: usize = NORMS + WINDOW;
}

/// Elements of a verdict: the factor on the gradient (unscaling and clip); 1 where the update is made, else 0; AdamW's
/// lr / (1 - β1^t) and 1 / √(1 - β2^t); what parameters that decay are multiplied by. All that an update needs and that changes from
/// step to step is here, so that its launches are the same in every step.
pub const VERDICT: usize = 5;

/// PyTorch's GradScaler: the scale doubles after this many finite steps and halves with every other.
pub const GROWTH_INTERVAL: f32 = 2000.0;
/// A scale that PyTorch begins with.
pub const FIRST_SCALE: f32 = 65536.0;
/// The scale that a step of so many micro-batches begins with. Their gradients are summed and divided at the end, so each of them gets
/// the room below f16's largest number that it has in PyTorch, where their losses are divided first.
pub fn first_scale(micro_batches: usize) -> f32 {
    (FIRST_SCALE / micro_batches.next_power_of_two() as f32).max(SCALES.0)
}

/// The scale stays in this range.
pub const SCALES: (f32, f32) = (6.103_515_6e-5, 16_777_216.0);

/// What a verdict is made by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// Largest global gradient norm; 0: no clip.
    pub grad_clip: f64,
    /// Learning rate.
    pub lr: f64,
    /// AdamW's decoupled decay.
    pub weight_decay: f64,
    /// AdamW's decay of the first moment.
    pub beta1: f64,
    /// AdamW's decay of the second moment.
    pub beta2: f64,
    /// Whether the loss scale moves.
    pub dynamic_scale: bool,
    /// Standard deviations over the window's mean from which on a step is skipped; 0: never.
    pub skip_spike_sigma: f64,
    /// Micro-batches that loss and gradients are sums over.
    pub parts: usize,
}

impl Rules {
    /// The words of the kernel's parameters behind the number of sums. The learning rate stands in the [`clock`].
    pub fn params(&self) -> [u32; 6] {
        [
            (self.grad_clip as f32).to_bits(),
            (self.beta1.ln() as f32).to_bits(),
            (self.beta2.ln() as f32).to_bits(),
            u32::from(self.dynamic_scale),
            (self.skip_spike_sigma as f32).to_bits(),
            (self.parts as f32).to_bits(),
        ]
    }
}

/// What parameters that decay are multiplied by: made in f64, used in f32.
fn keep(lr: f64, weight_decay: f64) -> f32 {
    (1.0 - lr * weight_decay) as f32
}

/// Sets the learning rate of this thread's verdicts from now on, recorded ones too, in the [`clock`].
pub fn set_rates(lr: f64, weight_decay: f64) {
    clock::set_rates(lr as f32, keep(lr, weight_decay));
}

/// What is remembered before the first step.
pub fn first_state(loss_scale: f32, updates: u64) -> Vec<f32> {
    let mut first = vec![0.0; state::SIZE];
    first[state::LOSS_SCALE] = loss_scale;
    first[state::UPDATES] = updates as f32;
    first
}

/// 1 - exp(x) for x <= 0 without the difference of two numbers near 1.
fn one_minus_exp(x: f32) -> f32 {
    -x.exp_m1()
}

/// How many standard deviations the newest of `window` lies over its mean; 0 where all are the same.
fn deviations(newest: f32, window: &[f32]) -> f32 {
    let count = window.len() as f32;
    let mean = window.iter().sum::<f32>() / count;
    let variance = window.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / count;
    if variance > 0.0 { (newest - mean) / variance.sqrt() } else { 0.0 }
}

/// The definition: of Σ g² of the scaled gradients and the sum of the micro-batches' losses a verdict, and the state after it.
pub fn judge(square_sum: f32, loss: f32, memory: &mut [f32], rules: &Rules) -> [f32; VERDICT] {
    let scale = memory[state::LOSS_SCALE];
    // Of the mean over the micro-batches, as the loss: in f32 here, since f16 has no room for a division more.
    let divisor = scale * rules.parts as f32;
    let norm = square_sum.sqrt() / divisor;
    // Of what comes in, not of what is made of it: Metal's compiler may assume that arithmetic gives finite numbers.
    let finite = square_sum.is_finite() && loss.is_finite();
    let loss = loss / rules.parts as f32;
    memory[state::LOSS] = loss;
    memory[state::NORM] = norm;
    let mut spike = false;
    if finite {
        let next = memory[state::NEXT] as usize;
        memory[state::LOSSES + next] = loss;
        memory[state::NORMS + next] = norm;
        memory[state::NEXT] = ((next + 1) % WINDOW) as f32;
        memory[state::REMEMBERED] = (memory[state::REMEMBERED] + 1.0).min(WINDOW as f32);
        let sigma = rules.skip_spike_sigma as f32;
        if sigma > 0.0 && memory[state::REMEMBERED] == WINDOW as f32 {
            let of = |newest, first: usize| deviations(newest, &memory[first..first + WINDOW]);
            spike = of(loss, state::LOSSES) > sigma || of(norm, state::NORMS) > sigma;
        }
    }
    if rules.dynamic_scale {
        memory[state::GOOD_STEPS] = if finite { memory[state::GOOD_STEPS] + 1.0 } else { 0.0 };
        if !finite {
            memory[state::LOSS_SCALE] = (0.5 * scale).max(SCALES.0);
        } else if memory[state::GOOD_STEPS] >= GROWTH_INTERVAL {
            memory[state::LOSS_SCALE] = (2.0 * scale).min(SCALES.1);
            memory[state::GOOD_STEPS] = 0.0;
        }
    }
    memory[state::OVERFLOWS] += f32::from(!finite);
    memory[state::SPIKES] += f32::from(spike);
    let applied = finite && !spike;
    memory[state::APPLIED] = f32::from(applied);
    memory[state::UPDATES] += f32::from(applied);
    // No update is made before the first: then t only has to give finite numbers.
    let t = memory[state::UPDATES].max(1.0);
    let limit = rules.grad_clip as f32;
    let clip = if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) } else { 1.0 };
    let [beta1, beta2] = [rules.beta1, rules.beta2].map(|beta| beta.ln() as f32);
    [
        clip / divisor,
        f32::from(applied),
        rules.lr as f32 / one_minus_exp(t * beta1),
        one_minus_exp(t * beta2).sqrt().recip(),
        keep(rules.lr, rules.weight_decay),
    ]
}

/// The verdict of a backend.
#[backend_extension(Cube, Flex)]
pub trait VerdictOps: Backend {
    /// sums (N) of g², loss (1), memory ([`state::SIZE`]) -> (memory after it, verdict ([`VERDICT`])), all f32.
    ///
    /// The default waits for the device: it is [`judge`] on the host.
    fn verdict(
        sums: FloatTensor<Self>,
        loss: FloatTensor<Self>,
        memory: FloatTensor<Self>,
        rules: Rules,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed_verdict::<Self>(sums, loss, memory, rules)
    }
}

impl VerdictOps for Flex {}

/// The whole of [`VerdictOps::verdict`]'s default, for the GPU path to fall back on.
fn composed_verdict<B: Backend>(
    sums: FloatTensor<B>,
    loss: FloatTensor<B>,
    memory: FloatTensor<B>,
    rules: Rules,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let device = memory.device();
    // A device that fails to answer leaves NaN, which no update is made of; the next wait says what failed.
    let read = |tensor: FloatTensor<B>, count: usize| {
        let data = pollster::block_on(B::float_into_data(tensor)).ok();
        data.and_then(|data| data.try_into_vec::<f32>().ok()).unwrap_or_else(|| vec![f32::NAN; count])
    };
    let (sum, loss) = (read(B::float_sum(sums), 1)[0], read(loss, 1)[0]);
    let mut memory = read(memory, state::SIZE);
    let verdict = judge(sum, loss, &mut memory, &rules);
    let upload = |values: &[f32]| B::float_from_data(TensorData::new(values.to_vec(), [values.len()]), &device);
    (upload(&memory), upload(&verdict))
}

/// The kernel: one workgroup, which also adds up the sums.
pub fn kernel() -> Kernel {
    static MADE: Made<()> = Made::new();
    MADE.get((), |()| make())
}

fn make() -> Kernel {
    let header = format!(
        "const WINDOW: u32 = {WINDOW}u;\nconst GROWTH_INTERVAL: f32 = {GROWTH_INTERVAL:e};\n\
         const LEAST_SCALE: f32 = {:e};\nconst MOST_SCALE: f32 = {:e};\n",
        SCALES.0, SCALES.1
    );
    Kernel::new("verdict", header, vec![include_str!("../../wgsl/verdict.wgsl")], (256, 1, 1))
}

/// Queues sums (N), loss (1) -> memory ([`state::SIZE`]) in place, verdict ([`VERDICT`]); all contiguous f32.
///
/// For the tests, which give their own outputs; the optimizer calls [`verdict`].
pub fn launch(sums: &CubeTensor, loss: &CubeTensor, memory: &CubeTensor, verdict: &CubeTensor, rules: &Rules) {
    let mut params = vec![sums.meta.shape().num_elements() as u32];
    params.extend(rules.params());
    set_rates(rules.lr, rules.weight_decay);
    kernel().launch((1, 1, 1), &[sums, loss, memory, verdict], &params);
}

impl VerdictOps for CubeBackend {
    fn verdict(
        sums: FloatTensor<Self>,
        loss: FloatTensor<Self>,
        memory: FloatTensor<Self>,
        rules: Rules,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !serves(&sums, Ok(())) {
            return composed_verdict::<Self>(sums, loss, memory, rules);
        }
        let (sums, loss, memory) = (into_contiguous(sums), into_contiguous(loss), own(memory));
        let verdict = empty(&sums, Shape::new([VERDICT]));
        launch(&sums, &loss, &memory, &verdict, &rules);
        (memory, verdict)
    }
}

/// (memory after it ([`state::SIZE`]), verdict ([`VERDICT`])) of sums (N) of the scaled gradients' squares and the sum of the
/// losses, (1); nothing waits.
pub fn verdict(sums: Tensor<1>, loss: Tensor<1>, memory: Tensor<1>, rules: Rules) -> (Tensor<1>, Tensor<1>) {
    let (memory, verdict) =
        <Dispatch as VerdictOps>::verdict(sums.into_dispatch(), loss.into_dispatch(), memory.into_dispatch(), rules);
    (Tensor::from_dispatch(memory), Tensor::from_dispatch(verdict))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules {
        grad_clip: 1.0,
        lr: 1e-3,
        weight_decay: 0.1,
        beta1: 0.9,
        beta2: 0.95,
        dynamic_scale: true,
        skip_spike_sigma: 0.0,
        parts: 1,
    };

    /// The published rule: halve at an overflow, double after 2000 good steps in a row, and no update from bad numbers.
    #[test]
    fn the_loss_scale_follows_pytorchs() {
        let mut memory = first_state(FIRST_SCALE, 0);
        let verdict = judge(f32::INFINITY, 1.0, &mut memory, &RULES);
        assert_eq!((verdict[1], memory[state::LOSS_SCALE], memory[state::OVERFLOWS]), (0.0, 32768.0, 1.0));
        for _ in 0..1999 {
            assert_eq!(judge(1.0, 1.0, &mut memory, &RULES)[1], 1.0);
        }
        assert_eq!(memory[state::LOSS_SCALE], 32768.0);
        judge(1.0, 1.0, &mut memory, &RULES);
        assert_eq!((memory[state::LOSS_SCALE], memory[state::GOOD_STEPS]), (65536.0, 0.0));
        judge(1.0, f32::NAN, &mut memory, &RULES);
        assert_eq!((memory[state::LOSS_SCALE], memory[state::UPDATES]), (32768.0, 2000.0));
        for _ in 0..60 {
            judge(f32::NAN, 1.0, &mut memory, &RULES);
        }
        assert_eq!(memory[state::LOSS_SCALE], SCALES.0);
    }

    #[test]
    fn the_gradient_is_unscaled_and_clipped_and_the_bias_corrected() {
        let mut memory = first_state(1024.0, 4);
        let verdict = judge((4.0 * 3.0f32 * 1024.0).powi(2), 8.0, &mut memory, &Rules { parts: 4, ..RULES });
        assert_eq!((memory[state::LOSS], memory[state::NORM], memory[state::UPDATES]), (2.0, 3.0, 5.0));
        let want = [
            1.0 / 3.0 / 1024.0 / 4.0,
            1.0,
            1e-3 / (1.0 - 0.9f64.powi(5)),
            (1.0 - 0.95f64.powi(5)).sqrt().recip(),
            1.0 - 1e-4,
        ];
        for (got, want) in verdict.iter().zip(want) {
            assert!((f64::from(*got) / want - 1.0).abs() < 1e-6, "{verdict:?}");
        }
    }

    /// One outlier among 128 is skipped, and neither the 127 before nor the steps after it are.
    #[test]
    fn an_outlier_of_a_full_window_is_skipped() {
        let rules = Rules { skip_spike_sigma: 5.0, ..RULES };
        let mut memory = first_state(1.0, 0);
        for i in 0..WINDOW {
            assert_eq!(judge(1.0, 2.0 + 0.01 * (i % 7) as f32, &mut memory, &rules)[1], 1.0);
        }
        assert_eq!(judge(1.0, 9.0, &mut memory, &rules)[1], 0.0);
        assert_eq!(judge(1.0, 2.0, &mut memory, &rules)[1], 1.0);
        assert_eq!(judge(1e4, 2.0, &mut memory, &rules)[1], 0.0);
        assert_eq!((memory[state::SPIKES], memory[state::UPDATES]), (2.0, WINDOW as f32 + 1.0));
        let never = Rules { skip_spike_sigma: 0.0, ..rules };
        assert_eq!(judge(1e9, 9e9, &mut memory, &never)[1], 1.0);
    }

    #[test]
    fn the_kernel_is_valid_and_fits() {
        let bytes = kernel().workgroup_memory().unwrap_or_else(|error| panic!("{error}"));
        assert!(bytes <= 32 << 10, "{bytes} bytes of workgroup memory");
    }
}
