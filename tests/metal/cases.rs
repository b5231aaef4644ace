//! What is executed: one file an operation. A `Case` is a launch with its buffers and what must be in them afterwards.

mod adamw;
mod attention;
mod cast;
mod cross_entropy;
mod dropout;
mod embedding;
mod layer_norm;
mod linear;
mod verdict;

use gpt_wgpu::kernel::{Kernel, clock};
use gpt_wgpu::ops::verdict::set_rates;
use half::f16;

/// The step that the cases' uniforms count from.
const CLOCK: u32 = 3;

/// Every case of every operation, with the clock at [`CLOCK`] where a kernel has one.
pub fn all() -> Vec<Case> {
    clock::set_step(CLOCK);
    set_rates(verdict::RULES.lr, verdict::RULES.weight_decay);
    let words = clock::words().map(f64::from);
    let mut cases = [
        attention::cases(),
        dropout::cases(),
        linear::cases(),
        layer_norm::cases(),
        embedding::cases(),
        adamw::cases(),
        verdict::cases(),
        cross_entropy::cases(),
        cast::cases(),
    ]
    .concat();
    for case in cases.iter_mut().filter(|case| case.kernel.is_clocked()) {
        case.buffers.push(Buffer::input("clock", Elem::Int, &words));
    }
    cases
}

/// A grid of two rows, as `kernel::fold` makes of very many groups; one group too many where they are odd.
pub fn two_rows(groups: u32) -> (u32, u32, u32) {
    (groups.div_ceil(2), 2, 1)
}

/// One launch.
#[derive(Clone)]
pub struct Case {
    pub kernel: Kernel,
    /// The shape, for people.
    pub what: String,
    /// Workgroups.
    pub grid: (u32, u32, u32),
    /// In the order of the bindings.
    pub buffers: Vec<Buffer>,
    /// The words of the uniform.
    pub params: Vec<u32>,
}

impl Case {
    /// The same launch of the kernel whose random generator multiplies 64-bit integers.
    pub fn with_int64(mut self) -> Self {
        self.kernel = self.kernel.with_int64(true);
        self
    }
}

/// What inputs of about 1 leave of a sum that should vanish is within the tolerances of this.
const LEAST: f64 = 1e-2;

/// A buffer's type of element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elem {
    F32,
    F16,
    /// i32 or u32.
    Int,
    /// f32 before; after the launch twice as many f16 in the same place.
    F32ThenF16,
}

/// A buffer before and after the launch.
#[derive(Clone)]
pub struct Buffer {
    pub name: &'static str,
    pub elem: Elem,
    pub before: Vec<f64>,
    /// A NaN: the element must be as it was before. An infinity: it may be anything.
    pub want: Vec<f64>,
    /// Relative to the wanted value, and to the root mean square of all that are wanted, which counts for at least
    /// [`LEAST`].
    pub tolerance: f64,
}

impl Buffer {
    /// A buffer that is only read.
    pub fn input(name: &'static str, elem: Elem, values: &[f64]) -> Self {
        Self { name, elem, before: values.to_vec(), want: vec![f64::NAN; values.len()], tolerance: 0.0 }
    }

    /// A buffer of NaN that is only written; where `want` is NaN, not even that.
    pub fn output(name: &'static str, elem: Elem, want: Vec<f64>, tolerance: f64) -> Self {
        Self { name, elem, before: vec![f64::NAN; want.len()], want, tolerance }
    }

    /// As [`Buffer::output`], to the bit.
    pub fn exact(name: &'static str, elem: Elem, want: Vec<f64>) -> Self {
        Self::output(name, elem, want, 0.0)
    }

    /// The content before the launch.
    pub fn bytes(&self) -> Vec<u8> {
        let value = |v: &f64| match self.elem {
            Elem::F32ThenF16 if v.is_nan() => vec![0xff; 4],
            _ if v.is_nan() => vec![0xff; self.elem.bytes()],
            Elem::F32 | Elem::F32ThenF16 => (*v as f32).to_le_bytes().to_vec(),
            Elem::F16 => f16::from_f64(*v).to_le_bytes().to_vec(),
            Elem::Int => (*v as i64 as u32).to_le_bytes().to_vec(),
        };
        self.before.iter().flat_map(value).collect()
    }

    /// What is wrong with the content after the launch.
    pub fn difference(&self, after: &[u8]) -> Option<String> {
        let before = self.bytes();
        let finite: Vec<f64> = self.want.iter().copied().filter(|v| v.is_finite()).collect();
        let rms = (finite.iter().map(|v| v * v).sum::<f64>() / finite.len().max(1) as f64).sqrt().max(LEAST);
        let size = self.elem.bytes();
        let place = |i: usize| i * size..(i + 1) * size;
        self.want.iter().enumerate().find_map(|(i, want)| {
            let got = self.elem.value(&after[place(i)]);
            if want.is_infinite() {
                return None;
            }
            if want.is_nan() {
                let touched = after[place(i)] != before[place(i)];
                return touched.then(|| format!("{}[{i}] must stay untouched, and is {got}", self.name));
            }
            let near = (got - want).abs() <= self.tolerance * (rms + want.abs());
            (!near).then(|| format!("{}[{i}] is {got}, wanted {want} (within {:e})", self.name, self.tolerance))
        })
    }
}

impl Elem {
    /// How activations are stored, and what an output of theirs may differ: by its rounding to 11 bits, else by `near`.
    pub fn activation(f16: bool, near: f64) -> (Self, f64) {
        if f16 { (Self::F16, 1e-3) } else { (Self::F32, near) }
    }

    fn bytes(self) -> usize {
        if matches!(self, Self::F16 | Self::F32ThenF16) { 2 } else { 4 }
    }

    fn value(self, bytes: &[u8]) -> f64 {
        match (self, bytes) {
            (Self::F32, &[a, b, c, d]) => f64::from(f32::from_le_bytes([a, b, c, d])),
            (Self::Int, &[a, b, c, d]) => f64::from(i32::from_le_bytes([a, b, c, d])),
            (Self::F16 | Self::F32ThenF16, &[a, b]) => f16::from_le_bytes([a, b]).to_f64(),
            _ => f64::NAN,
        }
    }
}

#[test]
fn the_comparer_fails_on_a_wrong_value_a_nan_and_a_touched_element() {
    let anything = Buffer::output("y", Elem::F32, vec![f64::INFINITY, 1.0], 1e-3);
    assert_eq!(anything.difference(&Buffer::input("y", Elem::F32, &[7.0, 1.0]).bytes()), None);
    assert!(anything.difference(&Buffer::input("y", Elem::F32, &[7.0, 2.0]).bytes()).is_some());
    for elem in [Elem::F32, Elem::F16, Elem::Int] {
        let buffer = Buffer::output("y", elem, vec![4.0, -2.0, f64::NAN], 1e-3);
        let content = |values: [f64; 3]| Buffer::input("y", elem, &values).bytes();
        assert_eq!(buffer.difference(&content([4.0, -2.0, f64::NAN])), None);
        assert!(buffer.difference(&content([4.0, -3.0, f64::NAN])).unwrap().starts_with("y[1] is -3"));
        assert!(buffer.difference(&content([4.0, f64::NAN, f64::NAN])).unwrap().starts_with("y[1]"));
        assert!(buffer.difference(&content([4.0, -2.0, 0.0])).unwrap().starts_with("y[2] must stay untouched"));
    }
}
