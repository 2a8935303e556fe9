//! The streaming pipeline: checkpoint in, ternary folder out.

use std::path::Path;

use serde_json::{Value, json};
use ternoss_backends::{Rotation, TernaryBackend};
use ternoss_model::{
    Checkpoint, GptOss, GptOssConfig,
    checkpoint::{FolderWriter, fingerprint},
    config::Quantization,
    layer::apply_norm,
    perplexity::Comparison,
    table::Table,
};
use ternoss_quant::{Granularity, TernaryConfig};

use crate::{
    CalibError, Calibration, Method, Report, Steps,
    activations::{Activations, Streams},
    budget::{PLAN_FILE, Plan, plan, plane_budget},
    distilled::calibrate_and_distill,
    folder::{bytes_in, check_folders, finish, quantization_config, read_config},
    levels::MAX_PLANES,
    report::HeldOut,
    rows::ActivationMemory,
    size::{layer_weights, table_weights},
    step::{Done, Job, activations_file},
    ternarize::Recipe,
};

/// What to do with a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct QuantizeOptions {
    /// Quantization method.
    pub method: Method,
    /// Its steps, some perhaps left out.
    pub steps: Steps,
    /// Granularity of the scales and packing of the trits. The rotation is the steps' to say.
    pub ternary: TernaryConfig,
    /// Trits a weight is the sum of: 1 to 3 for ternoss, 1 for the others.
    pub planes: usize,
    /// Most bits a weight may cost on average, scales included: planes go to the matrices where they help most, one at
    /// least and three at most, and `planes` says nothing.
    pub bits_per_weight: Option<f64>,
    /// Steps of distillation after the last layer: 0 for none.
    pub distill: usize,
    /// Highest learning rate of distillation: the share of itself by which a scale moves in a step. Small models take more.
    pub distillation_rate: f64,
    /// Planes of embedding and output layer, 1 to 3; `None` leaves them as the checkpoint has them.
    pub table_planes: Option<usize>,
    /// Experts that each layer keeps, the most important ones on the calibration text; `None` for all.
    pub keep_experts: Option<usize>,
    /// Bytes that the whole folder may take: see [`resolved`](Self::resolved).
    pub target_size: Option<u64>,
    /// Bytes of memory for what is kept of the calibration text: the rest goes to files in the unfinished output. The result
    /// does not depend on it.
    pub activation_memory: u64,
    /// Whether an existing output may be replaced.
    pub overwrite: bool,
}

/// How far a quantization has come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Progress {
    /// The sensitivity of another layer was measured.
    Measured,
    /// So many more weights became ternary.
    Weights(usize),
    /// So many more steps of distillation are done.
    Distilled {
        /// Many at once where an earlier run took them.
        steps: usize,
        /// How far the predictions were from the full-precision model's before a step that is done now: the mean divergence,
        /// in nats.
        divergence: Option<f64>,
    },
}

impl QuantizeOptions {
    /// A method with all its steps, one plane.
    pub fn new(method: Method) -> Self {
        Self {
            method,
            steps: method.steps(),
            ternary: TernaryConfig::default(),
            planes: 1,
            bits_per_weight: None,
            distill: 0,
            distillation_rate: DISTILLATION_RATE,
            table_planes: None,
            keep_experts: None,
            target_size: None,
            activation_memory: ACTIVATION_MEMORY,
            overwrite: false,
        }
    }
}

/// [`distillation_rate`](QuantizeOptions::distillation_rate) unless another is given.
pub const DISTILLATION_RATE: f64 = 1e-3;

/// [`activation_memory`](QuantizeOptions::activation_memory) unless another is given.
pub const ACTIVATION_MEMORY: u64 = 2_000_000_000;

/// Weights of attention and experts, which a quantization of all of them makes ternary.
pub fn ternary_weights(checkpoint: &Checkpoint) -> usize {
    checkpoint.config().num_hidden_layers() * layer_weights(checkpoint, None)
}

/// Makes a checkpoint ternary and writes it to `output`, one weight file a layer; `progress` hears of the weights that
/// became ternary. Methods that look at a text need `calibration`, and so do leaving out experts and distillation.
///
/// Peak memory without a text is one layer's packed weights and four expert matrices in f32 with their temporaries:
/// 0.8 GB for gpt-oss-20b. With a text it is a layer's packed weights, four experts in f32, their statistics, and
/// [`activation_memory`](QuantizeOptions::activation_memory). Ternary tables are in memory packed while they are written. Every tensor is scanned
/// for NaN and infinity. The output is whole or not there (see [`FolderWriter`]).
/// A run that was killed goes on at the first layer that was not done, in distillation at a step a few before, and gives the
/// same bytes. Until distillation is done the model before it stands beside the output, as `OUTPUT.undistilled`.
///
/// # Errors
/// [`CalibError`], naming the file, the tensor, and what was expected.
pub fn quantize<B: TernaryBackend>(
    checkpoint: &Checkpoint,
    output: &Path,
    options: &QuantizeOptions,
    calibration: Option<&Calibration>,
    device: &B::Device,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Report, CalibError> {
    check(checkpoint, output, options)?;
    let options = &options.resolved(checkpoint)?;
    let recipe = recipe(options)?;
    let weights = |weights| progress(Progress::Weights(weights));
    let job = Job::<B> { checkpoint, recipe, plan: None, device, progress: &weights };
    let calibration = calibration.filter(|_| options.look_at_text());
    let report = match options.distill {
        0 => calibrate(&job, output, options, calibration, progress)?,
        _ => calibrate_and_distill(&job, output, options, calibration, progress)?,
    };
    let found = bytes_in(output);
    match options.target_size.filter(|target| found > *target) {
        Some(target) => Err(CalibError::TargetMissed { folder: output.display().to_string(), target, found }),
        None => Ok(report),
    }
}

/// Everything but distillation.
pub(crate) fn calibrate<B: TernaryBackend>(
    job: &Job<'_, B>,
    output: &Path,
    options: &QuantizeOptions,
    calibration: Option<&Calibration>,
    progress: &dyn Fn(Progress),
) -> Result<Report, CalibError> {
    let &Job { checkpoint, ref recipe, device, .. } = job;
    let settings = settings(checkpoint, recipe, options, calibration);
    let fits = recipe.steps.look_at_text();
    match (calibration, recipe.keep_experts) {
        (None, _) if fits => return Err(CalibError::NoText { method: recipe.method }),
        (None, Some(keep)) => return Err(CalibError::NoTextToChoose { keep }),
        _ => {}
    }
    let config = read_config(checkpoint)?;
    let layers = checkpoint.config().num_hidden_layers();
    let (mut writer, mut done) = FolderWriter::resume::<Done>(output, layers + 1, options.overwrite, &settings)?;
    let layers_done = done.len().saturating_sub(1);
    progress(Progress::Weights(layer_weights(checkpoint, recipe.keep_experts) * layers_done));
    if !done.is_empty() && recipe.table_planes.is_some() {
        progress(Progress::Weights(table_weights(checkpoint)));
    }
    if done.is_empty() {
        done.push(take_step(job, 0, None, &mut writer)?);
    }
    let tables = ternary_tables(checkpoint, recipe, &writer)?;
    // Where experts are dropped and no step looks at the text, only the full-precision stream goes through the layers.
    let looked_at = calibration.filter(|_| fits || recipe.keep_experts.is_some());
    // Found out by a run that was killed at its very end, when the activations may be gone already.
    let known: Option<Option<HeldOut>> = (done.len() > layers).then(|| writer.note(layers + 1)).flatten();
    let mut activations = match looked_at.filter(|_| known.is_none()) {
        Some(calibration) => {
            let memory = ActivationMemory::new(writer.folder(), options.activation_memory);
            let hidden = checkpoint.config().hidden_size;
            let streams = Streams { memory, calibration, hidden, student: fits, device };
            Some(start(job, &streams, layers_done, tables.as_ref(), &writer)?)
        }
        None => None,
    };
    let plan = match (options.bits_per_weight, calibration) {
        (Some(bits), Some(calibration)) => Some(plan(job, bits, calibration, &writer, progress)?),
        _ => None,
    };
    let job = &Job { plan, ..*job };
    for step in done.len()..=layers {
        done.push(take_step(job, step, activations.as_mut(), &mut writer)?);
    }
    let held_out = match (known, &activations, calibration) {
        (Some(known), ..) => known,
        (None, Some(activations), Some(calibration)) if fits => {
            held_out(checkpoint, tables.as_ref(), calibration, activations, device)?
        }
        _ => None,
    };
    writer.commit(layers + 1, &json!(held_out))?;
    // Any of them may be left of a run that was killed.
    (0..=layers).for_each(|layers| writer.remove(&activations_file(layers)));
    writer.remove(PLAN_FILE);
    let mut report = Report::new(checkpoint, recipe, options.target_size, looked_at, done);
    report.planes = job.plan.as_ref().map_or(recipe.planes, Plan::most);
    report.run = fingerprint_of(&settings);
    report.held_out = held_out;
    // Their files are about to be renamed.
    drop((tables, activations));
    finish(checkpoint, config, &report, writer)?;
    Ok(report)
}

/// The activations after so many layers: what an earlier run left, or before the first layer the models' own embeddings.
fn start<B: TernaryBackend>(
    job: &Job<'_, B>,
    streams: &Streams<'_, B>,
    layers_done: usize,
    tables: Option<&Checkpoint>,
    writer: &FolderWriter,
) -> Result<Activations<B>, CalibError> {
    if layers_done > 0 {
        return streams.load(&writer.folder().join(activations_file(layers_done)));
    }
    let full = Table::embedding(job.checkpoint, job.device)?;
    // Read back from the first weight file where it is ternary.
    let own = tables.map(|tables| Table::embedding(tables, job.device)).transpose()?;
    streams.embed(&full, own.as_ref().unwrap_or(&full))
}

/// Makes a weight file and notes that it is done.
fn take_step<B: TernaryBackend>(
    job: &Job<'_, B>,
    step: usize,
    activations: Option<&mut Activations<B>>,
    writer: &mut FolderWriter,
) -> Result<Done, CalibError> {
    let done = job.step(step, activations, writer)?;
    writer.commit(step, &json!(done))?;
    writer.remove(&activations_file(step.saturating_sub(1)));
    Ok(done)
}

/// The ternary embedding and output layer, if they are to be ternary, from the first weight file, which stands.
fn ternary_tables(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    writer: &FolderWriter,
) -> Result<Option<Checkpoint>, CalibError> {
    if recipe.table_planes.is_none() {
        return Ok(None);
    }
    let quantization = quantization_config(recipe.method, &recipe.ternary, recipe.planes, 0.0);
    let config = GptOssConfig { quantization: Quantization::Ternary(quantization), ..checkpoint.config().clone() };
    Ok(Some(writer.written(0, config)?))
}

/// Compares the two models on the windows that were held out; the ternary one may have ternary tables.
fn held_out<B: TernaryBackend>(
    checkpoint: &Checkpoint,
    tables: Option<&Checkpoint>,
    calibration: &Calibration,
    activations: &Activations<B>,
    device: &B::Device,
) -> Result<Option<HeldOut>, CalibError> {
    if calibration.held_out().is_empty() {
        return Ok(None);
    }
    let (norm, head) = GptOss::<B>::load_output(checkpoint, device)?;
    let own_head = match tables {
        Some(tables) => Table::output(tables, device)?,
        None => head.clone(),
    };
    let mut sum = Comparison::default();
    for (number, window) in (activations.calibrated..).zip(calibration.held_out()) {
        let (student, teacher) = (activations.student.get(number)?, activations.teacher.get(number)?);
        sum.add((&own_head, apply_norm(&norm, student)), (&head, apply_norm(&norm, teacher)), window);
    }
    Ok(Some(HeldOut::new(&sum, calibration.held_out().len() * calibration.context())))
}

/// What a run was started with: another one may go on only with the same.
pub(crate) fn settings(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    options: &QuantizeOptions,
    calibration: Option<&Calibration>,
) -> Value {
    json!({
        "program": env!("CARGO_PKG_VERSION"),
        "method": recipe.method,
        "steps": recipe.steps,
        "scales and packing": recipe.ternary,
        "planes": recipe.planes,
        "bits per weight": options.bits_per_weight,
        "planes of the tables": recipe.table_planes,
        "experts kept": recipe.keep_experts,
        "calibration text": calibration.map(Calibration::fingerprint),
        "model": checkpoint.stamp(),
    })
}

pub(crate) fn fingerprint_of(settings: &Value) -> String {
    format!("{:016x}", fingerprint(settings.to_string().into_bytes()))
}

/// Refuses what [`quantize`] would refuse before it starts: for callers with long work to do first.
///
/// # Errors
/// [`CalibError`]
pub fn check(checkpoint: &Checkpoint, output: &Path, options: &QuantizeOptions) -> Result<(), CalibError> {
    check_folders(checkpoint, output)?;
    let recipe = recipe(&options.resolved(checkpoint)?)?;
    recipe.check_layout(checkpoint)?;
    if let Some(bits) = options.bits_per_weight {
        plane_budget(checkpoint, &recipe, bits)?;
    }
    Ok(FolderWriter::check(output, options.overwrite)?)
}

/// What the options come down to.
pub(crate) fn recipe(options: &QuantizeOptions) -> Result<Recipe, CalibError> {
    let QuantizeOptions { method, steps, planes, table_planes, keep_experts, .. } = *options;
    let most = if method == Method::Ternoss { MAX_PLANES } else { 1 };
    if options.bits_per_weight.is_some() && most == 1 {
        return Err(CalibError::OnePlane { method });
    }
    if !(1..=most).contains(&planes) {
        return Err(CalibError::Planes { planes, method, most });
    }
    if options.ternary.granularity == Granularity::Tensor && method != Method::Absmean {
        return Err(CalibError::OneScale { method });
    }
    let rotation = steps.rotation.then(Rotation::default);
    Ok(Recipe {
        method,
        steps,
        ternary: TernaryConfig { rotation, ..options.ternary },
        planes,
        table_planes,
        keep_experts,
        tuned: steps.reconstruction > 0 || options.distill > 0,
    })
}
