//! Training steps that are recorded once and replayed.
//!
//! A step's launches are the same every time, and to make them costs the host more than some GPUs need to do them. CubeCL can record
//! them, with their buffers and parameters, and hand them to the device again for a tenth of the time. What is not the same in
//! every step stands in buffers, which are written before each replay: the micro-batches' tokens and targets, and the [`kernel::clock`].
//!
//! What is recorded is not run. So a step is recorded and then replayed, as all that follow it. Between two evaluations that is:
//! 1. A step as usual, on the tensors that the recording will have. What memory it needs the pool has afterwards.
//! 2. A step that is recorded, from that memory and no other, and replayed.
//! 3. Replays.
//!
//! The recording holds all memory that the step uses: nobody else gets it until it is dropped.

use anyhow::{Result, bail, ensure};
use burn::backend::{BackendTensor, DispatchTensorKind};
use burn::tensor::{DType, Int, Tensor};
use burn_cubecl::{CubeDevice, tensor::CubeTensor};
use cubecl::bytes::Bytes;
use cubecl::client::{Client, Graph};
use cubecl::server::BufferBinding;

use crate::device::TASKS_MAX;
use crate::failure::first_lines;
use crate::kernel::{self, Kernels, clock};
use crate::model::Gpt;
use crate::optim::Optimizer;
use crate::parameters::{self, Visit};
use crate::step::Step;

/// Launches of a step at most. CubeCL keeps a bind group and up to one page of 32 KiB for each; and where a step has more, they
/// are those of many micro-batches, which the device is long busy with.
const MOST_LAUNCHES: usize = 4096;

/// Makes steps, by replays where that is possible.
pub struct Replay<'a> {
    step: &'a Step<'a>,
    state: State,
}

/// What the next step is.
enum State {
    /// Made as usual, and so are all after it.
    Direct,
    /// Made as usual: the first of all, which compiles kernels and makes the optimizer's moments.
    First,
    /// Made as usual, on the recording's tensors.
    WarmUp,
    /// Recorded, then replayed.
    Record(Inputs),
    /// Replayed.
    Recorded(Recording),
}

impl<'a> Replay<'a> {
    /// Makes `step`s; where they are not `wanted`, without replays.
    pub fn new(step: &'a Step<'a>, wanted: bool) -> Self {
        let state = if wanted { State::First } else { State::Direct };
        Self { step, state }
    }

    /// [`Step::run`], without the losses. The model and the optimizer have to be those of the last call, unless there was a
    /// [`Replay::forget`] since.
    ///
    /// # Errors
    /// As [`Step::run`], and when the device refuses a replay.
    pub fn advance(&mut self, model: Gpt, optimizer: &mut Optimizer, position: &mut u64, lr: f64) -> Result<Gpt> {
        match std::mem::replace(&mut self.state, State::Direct) {
            State::Direct => self.direct(model, optimizer, position, lr),
            State::First => {
                let model = self.direct(model, optimizer, position, lr)?;
                self.state = self.begin(optimizer);
                Ok(model)
            }
            State::WarmUp => self.warm_up(model, optimizer, position, lr),
            State::Record(inputs) => self.record(model, optimizer, position, lr, inputs),
            State::Recorded(recording) => {
                recording.inputs.write(self.step, *position, lr)?;
                recording.replay()?;
                *position += recording.inputs.batches.len() as u64;
                self.state = State::Recorded(recording);
                Ok(model)
            }
        }
    }

    /// Whether the next step is a replay.
    pub fn is_recorded(&self) -> bool {
        matches!(self.state, State::Recorded(_))
    }

    /// Gives the recording's memory back. To be called before anything else than steps is done on the device.
    pub fn forget(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Direct) {
            State::Record(inputs) => {
                unprepare(&inputs.client);
                State::WarmUp
            }
            State::Recorded(_) => State::WarmUp,
            state => state,
        };
    }

    fn direct(&self, model: Gpt, optimizer: &mut Optimizer, position: &mut u64, lr: f64) -> Result<Gpt> {
        Ok(self.step.run(model, optimizer, position, lr)?.0)
    }

    /// What comes after the first step.
    fn begin(&self, optimizer: &Optimizer) -> State {
        let why = match primitive(optimizer.memory.clone()) {
            None => "the CPU has none",
            Some(_) if kernel::choice() == Kernels::Composed => "composed operations read and write on their way",
            Some(_) => return State::WarmUp,
        };
        tracing::debug!("no recorded steps: {why}");
        State::Direct
    }

    fn warm_up(&mut self, model: Gpt, optimizer: &mut Optimizer, position: &mut u64, lr: f64) -> Result<Gpt> {
        let inputs = match Inputs::new(self.step, optimizer, *position)? {
            Some(inputs) => inputs,
            None => {
                tracing::warn!("no recorded steps: tokens are not 32-bit integers on this device");
                return self.direct(model, optimizer, position, lr);
            }
        };
        if let Err(error) = inputs.client.graph_prepare() {
            tracing::warn!("no recorded steps: the device cannot ({})", first_lines(&error.to_string()));
            return self.direct(model, optimizer, position, lr);
        }
        let before = Places::of(&model, optimizer);
        inputs.set_clock(self.step, *position, lr);
        let (done, works) =
            kernel::weighed(|| self.step.work(model, optimizer, *position, lr, |i| Ok(inputs.batch(i))));
        let (model, _) = done.inspect_err(|_| unprepare(&inputs.client))?;
        *position += inputs.batches.len() as u64;

        let (heaviest, limit) = (kernel::heaviest(&works, TASKS_MAX), inputs.work_limit);
        let in_place = Places::of(&model, optimizer) == before;
        if works.len() > MOST_LAUNCHES {
            tracing::debug!("no recorded steps: {} launches a step, at most {MOST_LAUNCHES} are recorded", works.len());
        } else if heaviest > limit {
            tracing::debug!(
                "no recorded steps: {TASKS_MAX} launches are submitted at once, up to {heaviest:.1e} operations, and the \
                 device may be given {limit:.1e}"
            );
        } else if !in_place {
            tracing::warn!("no recorded steps: a step leaves a parameter or a moment elsewhere than it found it");
        } else {
            self.state = State::Record(inputs);
            return Ok(model);
        }
        unprepare(&inputs.client);
        Ok(model)
    }

    fn record(
        &mut self,
        model: Gpt,
        optimizer: &mut Optimizer,
        position: &mut u64,
        lr: f64,
        inputs: Inputs,
    ) -> Result<Gpt> {
        inputs.write(self.step, *position, lr)?;
        let before = Places::of(&model, optimizer);
        if let Err(error) = inputs.client.start_capture() {
            unprepare(&inputs.client);
            tracing::warn!("no recorded steps: the recording did not begin ({})", first_lines(&error.to_string()));
            return self.direct(model, optimizer, position, lr);
        }
        let done = kernel::recorded(|| self.step.work(model, optimizer, *position, lr, |i| Ok(inputs.batch(i))));
        // Ended also where the work failed: an open recording refuses everything else.
        let graph = inputs.client.stop_capture();
        let (model, _) = done?;
        let in_place = Places::of(&model, optimizer) == before;
        match graph {
            Ok(graph) => {
                let recording = Recording { graph, inputs };
                recording.replay()?;
                *position += recording.inputs.batches.len() as u64;
                // Else it did this step's work, but would not do the next one's.
                if in_place {
                    tracing::debug!("a step is recorded, and replayed from now on");
                    self.state = State::Recorded(recording);
                } else {
                    tracing::warn!("no recorded steps: a step left a parameter or a moment elsewhere than it found it");
                }
                Ok(model)
            }
            Err(error) if in_place => {
                // Nothing was run, and everything is where it was. Had the clock been written in the recording, it would be spoiled.
                clock::rewrite();
                tracing::warn!("no recorded steps: a recording failed ({})", first_lines(&error.to_string()));
                drop(inputs);
                self.direct(model, optimizer, position, lr)
            }
            Err(error) => bail!(
                "a step could not be recorded ({}), and a parameter or a moment was moved meanwhile; --replay=false \
                 records nothing",
                first_lines(&error.to_string())
            ),
        }
    }
}

impl Drop for Replay<'_> {
    fn drop(&mut self) {
        self.forget();
    }
}

/// Takes back that a recording is to begin. CubeCL calls it an error that none was begun.
fn unprepare(client: &Client) {
    let _ = client.stop_capture();
}

/// A recorded step.
struct Recording {
    graph: Graph,
    inputs: Inputs,
}

impl Recording {
    /// Queues the step.
    fn replay(&self) -> Result<()> {
        // SAFETY: the graph keeps every page that its launches use from being given to anybody else. Parameters, moments and
        // the optimizer's memory are where they were (`Places`), and are this thread's alone, as a `Replay` is: what it writes
        // and reads goes to the stream that the graph was recorded on.
        let replayed = unsafe { self.graph.replay() };
        if let Err(error) = replayed {
            bail!(
                "the device refused a recorded step ({}); --replay=false records nothing",
                first_lines(&error.to_string())
            );
        }
        Ok(())
    }
}

/// What changes from step to step.
struct Inputs {
    client: Client,
    device: CubeDevice,
    /// Operations that it may be given at once.
    work_limit: f64,
    /// tokens and targets of each micro-batch, with what they are to CubeCL.
    batches: Vec<[Input; 2]>,
}

struct Input {
    tensor: Tensor<2, Int>,
    primitive: CubeTensor,
}

impl Inputs {
    /// The micro-batches of the step at `position`. None where they are not stored as the host has them.
    fn new(step: &Step, optimizer: &Optimizer, position: u64) -> Result<Option<Self>> {
        let Some(memory) = primitive(optimizer.memory.clone()) else {
            return Ok(None);
        };
        let mut batches = Vec::new();
        for i in 0..step.config.data.gradient_accumulation_steps as u64 {
            let (tokens, targets) = step.uploaded(position + i)?;
            let (Some(tokens), Some(targets)) = (Input::of(tokens), Input::of(targets)) else {
                return Ok(None);
            };
            batches.push([tokens, targets]);
        }
        let work_limit = kernel::work_limit(&memory);
        // Without a share in the memory itself, which is rewritten in place.
        Ok(Some(Self { client: memory.client, device: memory.device, work_limit, batches }))
    }

    /// tokens and targets of the i-th micro-batch.
    fn batch(&self, i: u64) -> (Tensor<2, Int>, Tensor<2, Int>) {
        let [tokens, targets] = &self.batches[i as usize];
        (tokens.tensor.clone(), targets.tensor.clone())
    }

    /// Queues the writes of all that a step at `position` finds: behind the steps before it, ahead of what is launched next.
    /// CubeCL submits what is queued before it writes, since wgpu writes ahead of what is not.
    fn write(&self, step: &Step, position: u64, lr: f64) -> Result<()> {
        for (i, [tokens, targets]) in self.batches.iter().enumerate() {
            let batch = (step.batch)(position + i as u64)?;
            tokens.write(&self.client, batch.x)?;
            targets.write(&self.client, batch.y)?;
        }
        self.set_clock(step, position, lr);
        Ok(())
    }

    fn set_clock(&self, step: &Step, position: u64, lr: f64) {
        step.set_clock(position, lr);
        clock::buffer(&self.client, &self.device); // and writes it
    }
}

impl Input {
    fn of(tensor: Tensor<2, Int>) -> Option<Self> {
        let primitive = int_primitive(tensor.clone().inner())?;
        (primitive.dtype == DType::I32).then_some(Self { tensor, primitive })
    }

    fn write(&self, client: &Client, values: Vec<i32>) -> Result<()> {
        let want = self.primitive.meta.shape().num_elements();
        ensure!(values.len() == want, "a micro-batch of {} tokens, not {want} as those before it", values.len());
        client.write(&self.primitive.handle, Bytes::from_elems(values));
        Ok(())
    }
}

/// Where parameters, moments and the optimizer's memory are. Holding it does not hinder anybody from rewriting them in place.
#[derive(Default)]
struct Places(Vec<BufferBinding>);

impl PartialEq for Places {
    /// The same allocations, and in each the same bytes.
    fn eq(&self, other: &Self) -> bool {
        let keys = |places: &Self| places.0.iter().map(BufferBinding::claim_key).collect::<Vec<_>>();
        keys(self) == keys(other)
    }
}

impl Places {
    fn of(model: &Gpt, optimizer: &Optimizer) -> Self {
        let mut places = Self::default();
        parameters::visit(model, &mut places);
        for moments in optimizer.moments.values() {
            places.add(moments.m.clone());
            places.add(moments.v.clone());
        }
        places.add(optimizer.memory.clone());
        places
    }

    fn add<const D: usize>(&mut self, tensor: Tensor<D>) {
        self.0.extend(primitive(tensor).map(|tensor| tensor.handle.binding()));
    }
}

impl Visit for Places {
    fn parameter<const D: usize>(&mut self, _: &str, tensor: &Tensor<D>) {
        self.add(tensor.clone().inner());
    }
}

/// What a GPU's tensor is to CubeCL; none on the CPU.
fn primitive<const D: usize>(tensor: Tensor<D>) -> Option<CubeTensor> {
    match tensor.into_dispatch().kind {
        DispatchTensorKind::Cube(BackendTensor::Float(tensor)) => Some(tensor),
        _ => None,
    }
}

fn int_primitive<const D: usize>(tensor: Tensor<D, Int>) -> Option<CubeTensor> {
    match tensor.into_dispatch().kind {
        DispatchTensorKind::Cube(BackendTensor::Int(tensor)) => Some(tensor),
        _ => None,
    }
}
