//! The estimate of a run's memory on the CPU against what its steps take from the allocator, which this program counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use gpt_wgpu::config::Config;
use gpt_wgpu::data::Batch;
use gpt_wgpu::device::{self, DeviceSpec};
use gpt_wgpu::kernel::{self, Kernels};
use gpt_wgpu::memory::plan::{Budget, Plan};
use gpt_wgpu::model::{Gpt, GptConfig};
use gpt_wgpu::ops::linear::Gelu;
use gpt_wgpu::optim::Optimizer;
use gpt_wgpu::recompute::Recompute;
use gpt_wgpu::step::Step;

/// The system's allocator, which keeps count.
struct Counting;

static ALIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn taken(bytes: usize) {
    let alive = ALIVE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    MOST.fetch_max(alive, Ordering::Relaxed);
}

// SAFETY: every call is handed on as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        ALIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        taken(size);
        ALIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How far the estimate may be from what is measured.
const TOLERANCE: f64 = 0.1;

/// Most bytes that three steps had at a time, model and optimizer included.
fn measured(gpt: &GptConfig, config: &Config) -> usize {
    let inner = device::choose(DeviceSpec::Cpu).unwrap().device;
    let device = inner.clone().autodiff();
    let tokens: Vec<i32> =
        (0..config.data.batch_size * gpt.block_size).map(|i| (i * 7 % gpt.vocab_size) as i32).collect();
    let batch = |_| Ok(Batch { x: tokens.clone(), y: tokens.clone() });
    let step = Step { config, device: &device, batch: &batch };
    let before = ALIVE.load(Ordering::Relaxed);
    let mut model = Gpt::init(gpt, 1, &device);
    let (mut optimizer, mut position) = (Optimizer::new(false, &inner), 0);
    MOST.store(ALIVE.load(Ordering::Relaxed), Ordering::Relaxed);
    for _ in 0..3 {
        let (updated, _) = step.run(model, &mut optimizer, &mut position, 1e-3).unwrap();
        model = updated;
    }
    MOST.load(Ordering::Relaxed) - before
}

#[test]
fn the_loops_take_what_is_estimated() {
    // One at a time: the count is the process's.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock();
    kernel::choose(Kernels::Auto);
    let small =
        GptConfig { n_layer: 4, n_head: 4, n_embd: 128, block_size: 64, vocab_size: 65, bias: false, gelu: Gelu::Erf };
    // Narrower layers than these are packed on some processors and not on others.
    let wide = GptConfig { n_layer: 1, n_embd: 256, ..small };
    let cases = [
        ("nanoGPT's small shape", small, 12, 1, 0.0, Recompute::None),
        ("many activations", small, 64, 1, 0.0, Recompute::None),
        ("dropout, biases", GptConfig { bias: true, ..small }, 32, 1, 0.2, Recompute::None),
        ("accumulation", GptConfig { n_embd: 256, ..small }, 8, 2, 0.0, Recompute::None),
        ("a large vocabulary", GptConfig { vocab_size: 20_000, ..wide }, 4, 1, 0.0, Recompute::None),
        ("many rows of logits", GptConfig { vocab_size: 5_000, ..wide }, 16, 1, 0.0, Recompute::None),
        ("a long context", GptConfig { n_layer: 2, block_size: 1024, ..small }, 4, 1, 0.1, Recompute::None),
        ("attention_mlp", small, 64, 1, 0.1, Recompute::AttentionMlp),
        ("block", small, 64, 2, 0.0, Recompute::Block),
    ];
    let chosen = device::choose(DeviceSpec::Cpu).unwrap();
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let mut wrong = Vec::new();
    // `gemm` keeps a block as large as the cache for each thread from a process's first products on.
    let mut largest = Config::default();
    (largest.data.batch_size, largest.data.gradient_accumulation_steps) = (64, 1);
    measured(&small, &largest);
    for (name, gpt, batch_size, accumulation, dropout, recompute) in cases {
        let mut config = Config::default();
        (config.model.n_layer, config.model.n_head, config.model.n_embd) = (gpt.n_layer, gpt.n_head, gpt.n_embd);
        (config.model.block_size, config.model.bias, config.model.dropout) = (gpt.block_size, gpt.bias, dropout);
        config.data.batch_size = batch_size;
        config.data.gradient_accumulation_steps = accumulation;
        config.train.recompute = recompute;
        let estimate = Plan::new(&config, &gpt, Budget::of(&chosen, false), false).estimate;
        let (estimated, measured) = (estimate.total() as f64, measured(&gpt, &config) as f64);
        let off = estimated / measured - 1.0;
        let line = format!(
            "{name}: {:.1} MiB estimated, {:.1} MiB measured: {:+.1} %",
            mib(estimated),
            mib(measured),
            100.0 * off
        );
        eprintln!("{line}");
        if off.abs() >= TOLERANCE {
            wrong.push(line);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
