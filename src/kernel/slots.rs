//! Kernels that handle several tensors in one launch: a model has dozens of parameters, most of them too small to fill a GPU.
//!
//! WGSL has no arrays of buffers. So what such a kernel does with one tensor is a file of its own, written for slot 0: the
//! buffers, and `visit_0`. The other slots are the same text with other numbers, and `visit` calls the one of a number.
//! `wgsl/slots.wgsl` finds a workgroup's slot and its share of the elements.

use std::fmt::Write;
use std::sync::OnceLock;

use burn_cubecl::tensor::CubeTensor;

use super::lanes::Lanes;
use super::{Kernel, fold};

/// Slots of a launch at most. AdamW's four buffers a slot, its verdict, the uniform and the sizes that naga adds are the 31 buffers
/// that Metal binds.
pub const MOST: usize = 7;

/// Threads of a workgroup.
const THREADS: usize = 256;

/// A kernel over slots.
pub struct SlotKernel {
    name: &'static str,
    /// What activations are stored in, f16 or f32.
    f16: bool,
    /// Lanes that each thread handles.
    lanes: usize,
    /// The files of slot 0 and of the rest.
    files: [&'static str; 2],
    /// For 1, 2, ... slots.
    texts: OnceLock<[String; MOST]>,
}

/// A tensor of a launch.
pub struct Slot<'a> {
    /// In the order of the file's bindings; contiguous and with equally many elements.
    pub buffers: Vec<&'a CubeTensor>,
    /// A number for the kernel.
    pub factor: f32,
}

impl Slot<'_> {
    fn lanes(&self) -> Lanes {
        Lanes::of(self.buffers[0].meta.shape().num_elements())
    }
}

impl SlotKernel {
    /// `slot` and `file` are the texts of slot 0 and of the rest, `lanes` what each thread handles.
    pub const fn new(name: &'static str, f16: bool, slot: &'static str, file: &'static str, lanes: usize) -> Self {
        Self { name, f16, lanes, files: [slot, file], texts: OnceLock::new() }
    }

    /// The kernel for 1 to [`MOST`] slots of tensors that are made of lanes as `lanes`.
    pub fn kernel(&'static self, lanes: Lanes, slots: usize) -> Kernel {
        let [slot, file] = self.files;
        let texts = self.texts.get_or_init(|| std::array::from_fn(|last| repeated(slot, last + 1)));
        let constants = format!("const SLOTS: u32 = {slots}u;\nconst CHUNK: u32 = {}u;\n", THREADS * self.lanes);
        let files = [&texts[slots - 1], include_str!("../../wgsl/slots.wgsl"), file];
        lanes.kernel(self.name, [self.f16; 2], &constants, &files, THREADS as u32)
    }

    /// Every kernel that [`SlotKernel::launch`] may choose.
    pub fn kernels(&'static self) -> Vec<Kernel> {
        let [single, quad] = [1, 4].map(Lanes::of);
        (1..=MOST).map(|slots| self.kernel(quad, slots)).chain([self.kernel(single, 1)]).collect()
    }

    /// Workgroups for a tensor of `count` elements.
    pub fn groups(&self, count: usize) -> usize {
        Lanes::of(count).count.div_ceil(THREADS * self.lanes)
    }

    /// The uniform of a launch over tensors of `counts` elements with these factors, `before` workgroups of other launches coming
    /// first, and the workgroups of this one. `own` are the kernel's own words.
    pub fn params(&self, slots: impl IntoIterator<Item = (usize, f32)>, before: u32, own: &[u32]) -> (Vec<u32>, u32) {
        let (mut table, mut groups) = (Vec::new(), 0);
        for (count, factor) in slots {
            table.extend([groups, Lanes::of(count).count as u32, factor.to_bits(), 0]);
            groups += self.groups(count) as u32;
        }
        ([&[groups, before, 0, 0], &table[..], own].concat(), groups)
    }

    /// Queues launches over all of `slots`, at most `most` in one, with the buffers `shared` behind those of the slots. Tensors of
    /// four elements a lane share a launch; others, which a model hardly has, get one each.
    pub fn launch(&'static self, slots: &[Slot], shared: &[&CubeTensor], own: &[u32], most: usize) {
        let quads = |slot: &Slot| slot.lanes().is_quads();
        let mut before = 0;
        for slots in slots.chunk_by(|a, b| quads(a) && quads(b)).flat_map(|run| run.chunks(most)) {
            let sizes = slots.iter().map(|slot| (slot.buffers[0].meta.shape().num_elements(), slot.factor));
            let (params, groups) = self.params(sizes, before, own);
            let buffers: Vec<&CubeTensor> =
                slots.iter().flat_map(|slot| &slot.buffers).chain(shared).copied().collect();
            self.kernel(slots[0].lanes(), slots.len()).launch(fold(groups), &buffers, &params);
            before += groups;
        }
    }
}

/// Slots that a launch on `tensor`'s device can have, with `each` buffers a slot and `shared` more.
pub fn most(tensor: &CubeTensor, each: usize, shared: usize) -> usize {
    fitting(tensor.client.properties().hardware.max_bindings as usize, each, shared)
}

fn fitting(bindings: usize, each: usize, shared: usize) -> usize {
    (bindings.saturating_sub(shared) / each).clamp(1, MOST)
}

/// The text of slot 0 once for each of `slots`, and the choice among them.
fn repeated(slot: &str, slots: usize) -> String {
    let (mut text, mut cases) = (String::new(), String::new());
    for i in 0..slots {
        // Writing to a string does not fail.
        let _ = write!(text, "const SLOT_{i}: u32 = {i}u;\n{}\n", slot.replace("_0", &format!("_{i}")));
        let _ = writeln!(cases, "        case SLOT_{i}: {{ visit_{i}(start, end); }}");
    }
    text + "fn visit(slot: u32, start: u32, end: u32) {\n    switch slot {\n"
        + &cases
        + "        default: {}\n    }\n}\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_of_few_bindings_takes_a_tensor_at_a_time() {
        // What every device of WebGPU's has, less the one that CubeCL keeps back; Apple's; a device without a limit.
        let bindings = [7, 30, usize::MAX];
        assert_eq!(bindings.map(|bindings| fitting(bindings, 4, 1)), [1, 7, 7]);
        assert_eq!(bindings.map(|bindings| fitting(bindings, 1, 1)), [6, 7, 7]);
        assert_eq!(fitting(3, 4, 1), 1);
    }

    #[test]
    fn every_slot_has_its_own_numbers() {
        let text = repeated("var p_0 = SLOT_0; fn visit_0() {}", 3);
        for part in
            ["const SLOT_2: u32 = 2u;\nvar p_2 = SLOT_2; fn visit_2() {}", "case SLOT_1: { visit_1(start, end); }"]
        {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("_3"), "{text}");
    }
}
