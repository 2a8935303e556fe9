//! The kernel of [`attention`](super::attention) for a few tokens of each sequence.

use cubecl::prelude::*;

use super::ring::{LEAST_SLOTS, Sequences, turned};

/// Units that share a key's score.
pub(super) const SHARERS: u32 = 4;
/// Units of a cube at least, and at most: as many as [`SHARERS`] for each key that is seen, and the device allows.
pub(super) const UNITS: [usize; 2] = [256, 1024];
/// So the slots of keys that are looked at together go round a ring once at most, the one after them included: see [`fetch`].
const _: () = assert!(UNITS[1] / SHARERS as usize <= LEAST_SLOTS);
/// Scores that a unit compares before all units compare what was found.
const COMPARED: u32 = 16;
/// Values that a unit fetches together.
const AHEAD: u32 = 16;

/// A cube computes one query head for one token, or one of several `shares` of its keys: the softmax runs over as many keys at a
/// time as there are units for. In a `step`, the query and the token's own key are yet to be rotated, and one cube of each key
/// head puts key and value where the next tokens find them.
#[cube(launch_unchecked)]
pub(super) fn attend(
    q: &Array<f32>,
    k: &Array<f32>,
    v: &Array<f32>,
    cos: &Array<f32>,
    sin: &Array<f32>,
    keys: &mut Array<f32>,
    values: &mut Array<f32>,
    sinks: &Array<f32>,
    sequences: &Sequences,
    out: &mut Array<f32>,
    width: u32,
    window: u32,
    scale: f32,
    #[comptime] group: u32,
    #[comptime] head_dim: u32,
    #[comptime] units: u32,
    #[comptime] step: bool,
    #[comptime] shares: u32,
) {
    let (token, head) = (CUBE_POS_X, CUBE_POS_Y);
    let (position, first, slots) = sequences.of(token);
    let end = position + 1;
    let together = comptime!(units / SHARERS);
    let at = (token * CUBE_COUNT_Y + head) * head_dim;
    let column = first * width + head / group * head_dim;
    // Where the token's own key and value are in their arrays, and which keys are not in their places yet.
    let new = token * width + head / group * head_dim;
    let mut placed = end;
    if comptime!(step) {
        placed = position;
    }
    let mut query = SharedMemory::<f32>::new(comptime!(head_dim as usize));
    let mut newest = SharedMemory::<f32>::new(comptime!(head_dim as usize));
    let mut sums = SharedMemory::<f32>::new(comptime!(units as usize));
    let mut scores = SharedMemory::<f32>::new(comptime!(together as usize));
    let mut highs = SharedMemory::<f32>::new(comptime!((together / COMPARED) as usize));
    let mut i = UNIT_POS;
    while i < head_dim {
        if comptime!(step) {
            let half = comptime!(head_dim / 2);
            query[i as usize] = turned(q, cos, sin, at + i, i, token * half, half);
            let key = turned(k, cos, sin, new + i, i, token * half, half);
            newest[i as usize] = key;
            if head % group == 0 && CUBE_POS_Z == 0 {
                let to = (position % slots * width + column + i) as usize;
                keys[to] = key;
                values[to] = v[(new + i) as usize];
            }
        } else {
            query[i as usize] = q[(at + i) as usize];
        }
        i += units;
    }
    // Units mix the values in runs of `head_dim`: each run some of the keys, and a unit more than one number of a wide head.
    let runs = comptime!(if head_dim < units { units / head_dim } else { 1 });
    let own = comptime!(head_dim.div_ceil(units));
    let (run, number) = (UNIT_POS / head_dim, UNIT_POS % head_dim);
    let (mut top, mut total) = (sinks[head as usize], f32::new(0.0));
    let mut mixed = Array::<f32>::new(comptime!(own as usize));
    let mut own_value = Array::<f32>::new(comptime!(own as usize));
    #[unroll]
    for n in 0..own {
        mixed[comptime!(n as usize)] = 0.0;
        own_value[comptime!(n as usize)] = 0.0;
        if comptime!(step) {
            let number = min(n * units + number, comptime!(head_dim - 1));
            own_value[comptime!(n as usize)] = v[(new + number) as usize];
        }
    }
    let mut fetched = Array::<f32>::new(comptime!((own * AHEAD) as usize));
    // What the softmax has been divided by since the sink was its largest score.
    let mut sink = f32::new(1.0);
    sync_cube();
    let mut start = end - min(end, window);
    let mut end = end;
    if comptime!(shares > 1) {
        let share = (end - start).div_ceil(shares);
        start = min(start + CUBE_POS_Z * share, end);
        end = min(start + share, end);
    }
    while start < end {
        let count = min(end - start, together);
        let (key, part) = (start + UNIT_POS / SHARERS, UNIT_POS % SHARERS);
        let mut sum = f32::new(0.0);
        if key < placed {
            let entry = key % slots * width + column;
            #[unroll]
            for n in 0..comptime!(head_dim.div_ceil(SHARERS)) {
                let i = part + n * SHARERS;
                if comptime!(head_dim.is_multiple_of(SHARERS)) || i < head_dim {
                    sum += query[i as usize] * keys[(entry + i) as usize];
                }
            }
        }
        if comptime!(step) && key == placed {
            #[unroll]
            for n in 0..comptime!(head_dim.div_ceil(SHARERS)) {
                let i = part + n * SHARERS;
                if comptime!(head_dim.is_multiple_of(SHARERS)) || i < head_dim {
                    sum += query[i as usize] * newest[i as usize];
                }
            }
        }
        // The first values are on their way while the scores are looked at.
        let values_at = Fetch { start: start % slots, count, placed: placed - start, slots, width, column, number };
        fetch(values, &values_at, &own_value, run, &mut fetched, head_dim, units, step);
        sums[UNIT_POS as usize] = sum;
        sync_cube();
        let mut score = f32::new(f32::MIN);
        if UNIT_POS < count {
            score = 0.0;
            #[unroll]
            for part in 0..SHARERS {
                score += sums[(UNIT_POS * SHARERS + part) as usize];
            }
            score *= scale;
            scores[UNIT_POS as usize] = score;
        }
        sync_cube();
        if UNIT_POS < comptime!(together / COMPARED) {
            let mut highest = f32::new(f32::MIN);
            #[unroll]
            for n in 0..COMPARED {
                let key = UNIT_POS * COMPARED + n;
                if key < count {
                    highest = max(highest, scores[key as usize]);
                }
            }
            highs[UNIT_POS as usize] = highest;
        }
        sync_cube();
        let before = top;
        #[unroll]
        for n in 0..comptime!(together / COMPARED) {
            top = max(top, highs[n as usize]);
        }
        if UNIT_POS < count {
            scores[UNIT_POS as usize] = f32::exp(score - top);
        }
        sync_cube();
        let shrink = f32::exp(before - top);
        total *= shrink;
        sink *= shrink;
        #[unroll]
        for n in 0..own {
            mixed[comptime!(n as usize)] *= shrink;
        }
        #[unroll]
        for pass in 0..comptime!(together.div_ceil(AHEAD * runs)) {
            let first = run + pass * AHEAD * runs;
            if comptime!(pass > 0) {
                fetch(values, &values_at, &own_value, first, &mut fetched, head_dim, units, step);
            }
            #[unroll]
            for n in 0..AHEAD {
                let key = first + n * runs;
                let share = select(key < count && run < runs, scores[min(key, count - 1) as usize], f32::new(0.0));
                total += share;
                #[unroll]
                for m in 0..own {
                    mixed[comptime!(m as usize)] += share * fetched[comptime!((n * own + m) as usize)];
                }
            }
        }
        start += together;
    }
    // The runs of a narrow head are added up; a wide one has a single run.
    sync_cube();
    if comptime!(runs > 1) {
        let mixed_here = mixed[0];
        mixed[0] = added(mixed_here, &mut sums, number, head_dim, runs);
        total = added(total, &mut sums, number, head_dim, runs);
    }
    let mut to = at;
    let mut divisor = total + sink;
    if comptime!(shares > 1) {
        to = (at / head_dim * shares + CUBE_POS_Z) * comptime!(head_dim + 2);
        divisor = f32::new(1.0);
        if UNIT_POS == 0 {
            out[(to + head_dim) as usize] = total;
            out[(to + head_dim + 1) as usize] = top;
        }
    }
    #[unroll]
    for n in 0..own {
        if run == 0 && n * units + number < head_dim {
            out[(to + n * units + number) as usize] = mixed[comptime!(n as usize)] / divisor;
        }
    }
}

/// Where the values of some keys are: the slot of the first one, how many keys there are, how many of them are in their
/// places, and which number of a head.
#[derive(CubeType)]
struct Fetch {
    start: u32,
    count: u32,
    placed: u32,
    slots: u32,
    width: u32,
    column: u32,
    number: u32,
}

/// Brings the values of [`AHEAD`] keys of a run, from key `first` on. Nothing here depends on a condition, so that all are
/// fetched together.
#[cube]
fn fetch(
    values: &Array<f32>,
    at: &Fetch,
    own_value: &Array<f32>,
    first: u32,
    fetched: &mut Array<f32>,
    #[comptime] head_dim: u32,
    #[comptime] units: u32,
    #[comptime] step: bool,
) {
    let runs = comptime!(if head_dim < units { units / head_dim } else { 1 });
    let own = comptime!(head_dim.div_ceil(units));
    #[unroll]
    for n in 0..AHEAD {
        let key = min(first + n * runs, at.count - 1);
        let is_own = comptime!(step) && key == at.placed;
        // Another cube may be writing into the token's own slot: the next one is looked at instead.
        let slot = at.start + select(is_own, key + 1, key);
        let slot = select(slot < at.slots, slot, slot - at.slots);
        #[unroll]
        for m in 0..own {
            let number = min(m * units + at.number, comptime!(head_dim - 1));
            let value = values[(slot * at.width + at.column + number) as usize];
            fetched[comptime!((n * own + m) as usize)] = select(is_own, own_value[comptime!(m as usize)], value);
        }
    }
}

/// The sum of what the units of each run have at this number.
#[cube]
fn added(
    value: f32,
    sums: &mut SharedMemory<f32>,
    number: u32,
    #[comptime] head_dim: u32,
    #[comptime] runs: u32,
) -> f32 {
    sums[UNIT_POS as usize] = value;
    sync_cube();
    let mut sum = f32::new(0.0);
    for run in 0..runs {
        sum += sums[(run * head_dim + number) as usize];
    }
    sync_cube();
    sum
}
