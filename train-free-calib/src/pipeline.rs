//! The streaming pipeline: checkpoint in, ternary folder out.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use ternoss_backends::{Rotation, TernaryBackend};
use ternoss_model::{
    Checkpoint, GptOss,
    checkpoint::{CONFIG_FILE, ExpertMatrix, FolderWriter, LinearName, fingerprint},
    config::{FORMAT_VERSION, Quantization, TERNOSS, TernaryQuantization},
    perplexity::Comparison,
};
use ternoss_quant::{Granularity, TernaryConfig};

use crate::{
    CalibError, Calibration, Method, Report, Steps,
    budget::{Plan, TENSORS, sensitivity},
    distill::Distillation,
    layer::{Activations, TernaryLayer},
    levels::MAX_PLANES,
    picture::{PICTURE_FILE, picture},
    report::{Distilled, HeldOut, PartBytes, REPORT_FILE},
    step::{Done, Job, activations_file, write_changed},
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
    /// A step of distillation is done; before it the predictions had this mean divergence from the full-precision model's.
    Distilled {
        /// In nats.
        divergence: f64,
    },
}

impl QuantizeOptions {
    /// Whether a calibration text is needed.
    pub fn look_at_text(&self) -> bool {
        self.steps.look_at_text() || self.distill > 0 || self.bits_per_weight.is_some()
    }

    /// A method with all its steps, one plane.
    pub fn new(method: Method) -> Self {
        Self {
            method,
            steps: method.steps(),
            ternary: TernaryConfig::default(),
            planes: 1,
            bits_per_weight: None,
            distill: 0,
            overwrite: false,
        }
    }
}

/// Planes of every matrix, for a run that goes on.
const PLAN_FILE: &str = "plan.json";

/// Files beside the weights that a ternary folder keeps.
const COMPANIONS: [&str; 7] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE",
    "USAGE_POLICY",
];

/// Weights of a model that a quantization makes ternary.
pub fn ternary_weights(checkpoint: &Checkpoint) -> usize {
    let config = checkpoint.config();
    let size = |[in_features, out_features]: [usize; 2]| in_features * out_features;
    let attention: usize = LinearName::ALL.iter().map(|linear| size(linear.shape(config))).sum();
    let expert: usize = ExpertMatrix::ALL.iter().map(|matrix| size(matrix.shape(config))).sum();
    config.num_hidden_layers() * (attention + config.num_local_experts * expert)
}

/// Makes a checkpoint ternary and writes it to `output`, one weight file a layer; `progress` hears of the weights that
/// became ternary. Methods that look at a text need `calibration`.
///
/// Peak memory without a text is one layer's packed weights and four expert matrices in f32 with their temporaries:
/// 0.8 GB for gpt-oss-20b. With a text it is a layer's packed weights, four experts in f32, and eight or nine
/// copies of the text's residual stream. Every tensor is scanned for NaN and infinity. The output is whole or not there (see [`FolderWriter`]).
/// A run that was killed goes on at the first layer that was not done, and gives the same bytes. Distillation starts anew:
/// until it is done the model before it stands beside the output, as `OUTPUT.undistilled`.
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
    let recipe = recipe(options)?;
    let weights = |weights| progress(Progress::Weights(weights));
    let job = Job::<B> { checkpoint, recipe, plan: None, device, progress: &weights };
    let calibration = calibration.filter(|_| options.look_at_text());
    let settings = settings(checkpoint, &recipe, options, calibration);
    let Some(calibration) = calibration.filter(|_| options.distill > 0) else {
        return calibrate(&job, output, options, calibration, &settings, progress);
    };
    if calibration.held_out().is_empty() {
        return Err(CalibError::NothingHeldOut);
    }
    let undistilled = with_suffix(output, ".undistilled");
    let finished = Report::read(&undistilled).filter(|report| report.run == fingerprint_of(&settings));
    let report = match finished {
        Some(report) => {
            weights(ternary_weights(checkpoint));
            report
        }
        None => calibrate(&job, &undistilled, options, Some(calibration), &settings, progress)?,
    };
    let report = distill(&job, &undistilled, output, options, calibration, report, progress)?;
    // A model that stays only takes space.
    let _ = std::fs::remove_dir_all(&undistilled);
    Ok(report)
}

/// Everything but distillation.
fn calibrate<B: TernaryBackend>(
    job: &Job<'_, B>,
    output: &Path,
    options: &QuantizeOptions,
    calibration: Option<&Calibration>,
    settings: &Value,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Report, CalibError> {
    let &Job { checkpoint, ref recipe, device, .. } = job;
    let mut activations = match calibration.filter(|_| recipe.steps.look_at_text()) {
        Some(calibration) => Some(Activations::embed(checkpoint, calibration, device)?),
        None if recipe.steps.look_at_text() => return Err(CalibError::NoText { method: recipe.method }),
        None => None,
    };
    let config = read_config(checkpoint)?;
    let layers = checkpoint.config().num_hidden_layers();
    let (mut writer, mut done) = FolderWriter::resume::<Done>(output, layers + 1, options.overwrite, settings)?;
    let layers_done = done.len().saturating_sub(1);
    if let (Some(activations), 1..) = (&mut activations, layers_done) {
        let name = activations_file(layers_done);
        if !activations.set_bytes(&writer.read(&name)?) {
            return Err(CalibError::Activations { name });
        }
    }
    let plan = match (options.bits_per_weight, calibration) {
        (Some(bits), Some(calibration)) => Some(plan(job, bits, calibration, &writer, progress)?),
        _ => None,
    };
    let job = &Job { plan, ..*job };
    progress(Progress::Weights(ternary_weights(checkpoint) / layers * layers_done));
    for step in done.len()..=layers {
        let finished = job.step(step, activations.as_mut(), &mut writer)?;
        writer.commit(step, &json!(finished))?;
        writer.remove(&activations_file(step.saturating_sub(1)));
        done.push(finished);
    }
    // Any of them may be left of a run that was killed.
    (0..=layers).for_each(|layers| writer.remove(&activations_file(layers)));
    writer.remove(PLAN_FILE);
    let mut report = Report::new(checkpoint, recipe, calibration.filter(|_| recipe.steps.look_at_text()), done);
    report.planes = job.plan.as_ref().map_or(recipe.planes, Plan::most);
    report.run = fingerprint_of(settings);
    if let (Some(activations), Some(calibration)) = (activations, calibration) {
        report.held_out = held_out(checkpoint, calibration, activations, device)?;
    }
    finish(checkpoint, config, &report, writer)?;
    Ok(report)
}

/// The planes of every matrix within so many bits a weight: measured, or taken over from an interrupted run.
fn plan<B: TernaryBackend>(
    job: &Job<'_, B>,
    bits_per_weight: f64,
    calibration: &Calibration,
    writer: &FolderWriter,
    progress: &dyn Fn(Progress),
) -> Result<Plan, CalibError> {
    let checkpoint = job.checkpoint;
    let layers = checkpoint.config().num_hidden_layers();
    let known = writer.read(PLAN_FILE).ok().and_then(|text| serde_json::from_slice::<Plan>(&text).ok());
    if let Some(plan) = known.filter(|plan| plan.0.len() == layers) {
        return Ok(plan);
    }
    let bytes = job.recipe.plane_bytes(checkpoint.config());
    let budget = bits_per_weight / 8.0 * ternary_weights(checkpoint) as f64;
    let least = (bytes.iter().sum::<usize>() * layers) as f64;
    if budget < least {
        return Err(CalibError::Budget { bits_per_weight, least: least / budget * bits_per_weight });
    }
    let measured = || progress(Progress::Measured);
    let plan = match least * MAX_PLANES as f64 <= budget {
        true => Plan(vec![[MAX_PLANES; TENSORS]; layers]),
        false => {
            Plan::within(budget, &sensitivity::<B>(checkpoint, &job.recipe, calibration, job.device, &measured)?, bytes)
        }
    };
    writer.file(PLAN_FILE, json!(plan).to_string().as_bytes())?;
    Ok(plan)
}

/// Compares the two models on the windows that were held out.
fn held_out<B: TernaryBackend>(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    activations: Activations<B>,
    device: &B::Device,
) -> Result<Option<HeldOut>, CalibError> {
    if calibration.held_out().is_empty() {
        return Ok(None);
    }
    let (norm, head) = GptOss::<B>::load_output(checkpoint, device)?;
    let mut sum = Comparison::default();
    let streams = activations.student.into_iter().zip(activations.teacher).skip(activations.calibrated);
    for (window, (student, teacher)) in calibration.held_out().iter().zip(streams) {
        sum.add((&head, norm.forward(student)), (&head, norm.forward(teacher)), window);
    }
    Ok(Some(HeldOut::new(&sum, calibration.held_out().len() * calibration.context())))
}

/// Distills the ternary model in `undistilled` and writes the result to `output`.
fn distill<B: TernaryBackend>(
    job: &Job<'_, B>,
    undistilled: &Path,
    output: &Path,
    options: &QuantizeOptions,
    calibration: &Calibration,
    mut report: Report,
    progress: &dyn Fn(Progress),
) -> Result<Report, CalibError> {
    let student = Checkpoint::open(undistilled)?;
    let layers = student.config().num_hidden_layers();
    let mut writer = FolderWriter::create(output, layers + 1, options.overwrite)?;
    let distillation = Distillation::<B>::new(job.checkpoint, &student, calibration, job.device)?;
    let distilled = distillation.run(options.distill, &|divergence| progress(Progress::Distilled { divergence }))?;
    let kept = distilled.after.kl_divergence < distilled.before.kl_divergence;
    report.distillation = Some(Distilled { steps: options.distill, kept, before: distilled.before });
    report.held_out = Some(if kept { distilled.after } else { distilled.before });
    let mut parts = PartBytes::new();
    for step in 0..=layers {
        let changed = match (kept, step.checked_sub(1)) {
            (false, _) => TernaryLayer::default(),
            (true, None) => distilled.outside(),
            (true, Some(layer)) => distilled.layers[layer].harden()?.written(layer),
        };
        let written = write_changed(&student, step, &changed, &mut writer)?;
        written.into_iter().for_each(|(part, bytes)| *parts.entry(part).or_default() += bytes);
    }
    report.set_parts(parts);
    finish(&student, read_config(&student)?, &report, writer)?;
    Ok(report)
}

fn settings(
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
        "calibration text": calibration.map(Calibration::fingerprint),
        "model": checkpoint.stamp(),
    })
}

fn fingerprint_of(settings: &Value) -> String {
    format!("{:016x}", fingerprint(settings.to_string().into_bytes()))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or(path.as_os_str()).to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

/// Refuses what [`quantize`] would refuse before it starts: for callers with long work to do first.
///
/// # Errors
/// [`CalibError`]
pub fn check(checkpoint: &Checkpoint, output: &Path, options: &QuantizeOptions) -> Result<(), CalibError> {
    check_folders(checkpoint, output)?;
    recipe(options)?.check_layout(checkpoint)?;
    Ok(FolderWriter::check(output, options.overwrite)?)
}

fn check_folders(checkpoint: &Checkpoint, output: &Path) -> Result<(), CalibError> {
    if matches!(checkpoint.config().quantization, Quantization::Ternary(_)) {
        return Err(CalibError::AlreadyTernary { folder: checkpoint.folder().display().to_string() });
    }
    let model = checkpoint.folder().canonicalize().ok();
    let takes_its_place =
        |path: &Path| path.canonicalize().ok().zip(model.as_ref()).is_some_and(|(a, b)| b.starts_with(a));
    if takes_its_place(output) || takes_its_place(&FolderWriter::partial_of(output)) {
        return Err(CalibError::OutputIsInput { folder: output.display().to_string() });
    }
    Ok(())
}

/// Writes what stands beside the weights, and makes the folder a model.
fn finish(checkpoint: &Checkpoint, mut config: Value, report: &Report, writer: FolderWriter) -> Result<(), CalibError> {
    for name in COMPANIONS {
        writer.copy(checkpoint.folder(), name)?;
    }
    writer.file(REPORT_FILE, format!("{:#}\n", json!(report)).as_bytes())?;
    writer.file(PICTURE_FILE, picture(report).as_bytes())?;
    config["quantization_config"] = json!(TernaryQuantization {
        quant_method: TERNOSS.into(),
        version: FORMAT_VERSION,
        method: report.method.to_string(),
        format: report.ternary.format,
        group_size: report.ternary.granularity.group_size(),
        rotation: report.ternary.rotation,
        planes: report.planes,
        activation_bits: 8,
        bits_per_weight: report.bits_per_weight,
    });
    Ok(writer.finish(&config)?)
}

/// What the options come down to.
fn recipe(options: &QuantizeOptions) -> Result<Recipe, CalibError> {
    let QuantizeOptions { method, steps, planes, .. } = *options;
    let most = if method == Method::Ternoss { MAX_PLANES } else { 1 };
    if !(1..=most).contains(&planes) {
        return Err(CalibError::Planes { planes, method, most });
    }
    if options.ternary.granularity == Granularity::Tensor && method != Method::Absmean {
        return Err(CalibError::OneScale { method });
    }
    let rotation = steps.rotation.then(Rotation::default);
    Ok(Recipe { method, steps, ternary: TernaryConfig { rotation, ..options.ternary }, planes })
}

/// The model's `config.json` as it is, so that keys this project does not know survive.
fn read_config(checkpoint: &Checkpoint) -> Result<Value, CalibError> {
    let path = checkpoint.folder().join(CONFIG_FILE);
    let broken = || CalibError::Config { path: path.display().to_string() };
    let text = std::fs::read_to_string(&path).map_err(|_| broken())?;
    let config: Value = serde_json::from_str(&text).map_err(|_| broken())?;
    match config.is_object() {
        true => Ok(config),
        false => Err(broken()),
    }
}
