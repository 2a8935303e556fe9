//! A model larger than the memory it may take: experts come from the mapped files when they are chosen, and the coldest ones
//! leave resident memory for them. Results do not change.

use std::sync::{Arc, Mutex, PoisonError};

use ternoss_backends::mapped::process_memory;

use crate::checkpoint::{Checkpoint, CheckpointError, ExpertMatrix, Extent, TableName};

/// Share of its heat that an expert keeps from one token to the next.
const COOLING: f64 = 0.98;

/// Bytes that are left free below the budget, for what a step allocates.
const MARGIN: u64 = 48 << 20;

/// Keeps the resident memory of this process within a budget, for all layers of a model.
#[derive(Debug)]
pub(crate) struct Pager {
    checkpoint: Checkpoint,
    budget: u64,
    /// `[layer][expert]`
    experts: Vec<Vec<PagedExpert>>,
    /// Embedding and output layer, of which rows here and there are read.
    tables: Vec<Extent>,
    heat: Mutex<Heat>,
}

#[derive(Debug)]
struct PagedExpert {
    extents: Vec<Extent>,
    bytes: u64,
}

/// How often experts were chosen lately, and which are in memory.
#[derive(Debug)]
struct Heat {
    /// Steps of the first layer.
    clock: u64,
    /// `[layer][expert]`
    states: Vec<Vec<State>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    heat: f64,
    /// When `heat` was right.
    at: u64,
    resident: bool,
}

impl State {
    fn heat_at(&self, clock: u64) -> f64 {
        self.heat * COOLING.powf((clock - self.at) as f64)
    }
}

/// The experts of one layer.
#[derive(Clone, Debug)]
pub(crate) struct LayerPager {
    pager: Arc<Pager>,
    layer: usize,
}

impl Pager {
    /// For a ternary model, whose experts are used in the mapped files.
    ///
    /// # Errors
    /// [`CheckpointError::MemoryBudget`] if the budget cannot hold what every token needs, or this system does not say how much
    /// memory a process has.
    pub(crate) fn new(checkpoint: &Checkpoint, budget: u64) -> Result<Arc<Self>, CheckpointError> {
        let config = checkpoint.config();
        let (layers, count) = (config.num_hidden_layers(), config.num_local_experts);
        let experts: Vec<Vec<_>> = (0..layers)
            .map(|layer| {
                let tensors = checkpoint.extents(&ExpertMatrix::ALL.map(|matrix| format!("{}.", matrix.path(layer))));
                let expert = |index| {
                    let extents: Vec<_> = tensors.iter().map(|tensor| tensor.part(count, index)).collect();
                    PagedExpert { bytes: extents.iter().map(|extent| extent.len() as u64).sum(), extents }
                };
                (0..count).map(expert).collect()
            })
            .collect();
        let tables = checkpoint.extents(&TableName::ALL.map(|table| format!("{}.", table.path())));
        let bytes = |extents: &mut dyn Iterator<Item = u64>| extents.sum::<u64>();
        let all = bytes(&mut checkpoint.tensors().map(|(_, entry)| entry.bytes() as u64));
        let paged = bytes(&mut experts.iter().flatten().map(|expert| expert.bytes));
        let of_tables = bytes(&mut tables.iter().map(|extent| extent.len() as u64));
        let one_token = experts.first().and_then(|layer| layer.first()).map_or(0, |expert| expert.bytes)
            * config.experts_per_token as u64;
        let needed = all - paged - of_tables + one_token + MARGIN + resident_bytes().unwrap_or(u64::MAX / 2);
        if paged == 0 || needed > budget {
            return Err(CheckpointError::MemoryBudget { folder: checkpoint.folder().into(), budget, needed, paged });
        }
        tables.iter().for_each(|extent| checkpoint.scatter(extent));
        let heat = Mutex::new(Heat { clock: 0, states: vec![vec![State::default(); count]; layers] });
        Ok(Arc::new(Self { checkpoint: checkpoint.clone(), budget, experts, tables, heat }))
    }

    /// One of its layers.
    pub(crate) fn layer(self: &Arc<Self>, layer: usize) -> LayerPager {
        LayerPager { pager: self.clone(), layer }
    }

    /// Takes embedding and output layer out of resident memory until they are read again.
    pub(crate) fn release_tables(&self) {
        self.tables.iter().for_each(|extent| self.checkpoint.release(extent));
    }

    /// Makes room for so many bytes of something else than experts.
    pub(crate) fn make_room(&self, bytes: u64) {
        self.free(&mut self.heat.lock().unwrap_or_else(PoisonError::into_inner), bytes, |_, _| false);
    }

    /// Takes tables and the coldest experts out of resident memory until there is room for so many bytes. Experts that
    /// are wanted stay.
    fn free(&self, heat: &mut Heat, incoming: u64, is_wanted: impl Fn(usize, usize) -> bool) {
        let excess = || (resident_bytes().unwrap_or(0) + incoming + MARGIN).saturating_sub(self.budget);
        if excess() > 0 {
            self.release_tables();
        }
        // Looked at again, for the system maps pages beside those that are read.
        let mut left = excess();
        while left > 0 {
            let Some((layer, expert)) = heat.coldest(&is_wanted) else { break };
            let paged = &self.experts[layer][expert];
            paged.extents.iter().for_each(|extent| self.checkpoint.release(extent));
            heat.states[layer][expert].resident = false;
            left = left.checked_sub(paged.bytes).filter(|left| *left > 0).unwrap_or_else(excess);
        }
    }
}

impl Heat {
    /// The resident expert that was chosen least lately, none of those that are wanted.
    fn coldest(&self, is_wanted: impl Fn(usize, usize) -> bool) -> Option<(usize, usize)> {
        let states =
            self.states.iter().enumerate().flat_map(|(layer, states)| {
                states.iter().enumerate().map(move |(expert, state)| ((layer, expert), state))
            });
        let may_leave = states.filter(|((layer, expert), state)| state.resident && !is_wanted(*layer, *expert));
        let coldest = may_leave.min_by(|(_, a), (_, b)| a.heat_at(self.clock).total_cmp(&b.heat_at(self.clock)));
        coldest.map(|(place, _)| place)
    }
}

impl LayerPager {
    /// Makes room for these experts and has them read.
    pub(crate) fn make_room(&self, chosen: &[i64]) {
        let Pager { checkpoint, experts, heat, .. } = &*self.pager;
        let mut heat = heat.lock().unwrap_or_else(PoisonError::into_inner);
        heat.clock += u64::from(self.layer == 0);
        let (clock, count) = (heat.clock, experts[self.layer].len());
        let mut wanted = vec![false; count];
        for expert in chosen.iter().filter_map(|expert| usize::try_from(*expert).ok()).filter(|expert| *expert < count)
        {
            wanted[expert] = true;
        }
        let missing: Vec<usize> =
            (0..count).filter(|&expert| wanted[expert] && !heat.states[self.layer][expert].resident).collect();
        let incoming: u64 = missing.iter().map(|expert| experts[self.layer][*expert].bytes).sum();
        self.pager.free(&mut heat, incoming, |layer, expert| layer == self.layer && wanted[expert]);
        for expert in missing {
            experts[self.layer][expert].extents.iter().for_each(|extent| checkpoint.fetch(extent));
        }
        for (state, _) in heat.states[self.layer].iter_mut().zip(wanted).filter(|(_, wanted)| *wanted) {
            *state = State { heat: state.heat_at(clock) + 1.0, at: clock, resident: true };
        }
    }
}

/// Resident memory of this process, mapped files included; `None` where the system does not say.
fn resident_bytes() -> Option<u64> {
    process_memory("VmRSS")
}
