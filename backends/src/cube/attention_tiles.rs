//! Attention of many tokens: tiles of queries against tiles of keys, so that a key read once serves many queries
//! (the tiling and the running softmax of FlashAttention-2, Dao 2023).

use cubecl::prelude::*;

/// Units of a cube, a square of rows and columns.
pub(super) const UNITS: u32 = SIDE * SIDE;
const SIDE: u32 = 16;
/// Queries of a tile: of several tokens, and of several heads that share a key head.
pub(super) const ROWS: u32 = 64;
/// Keys of a tile.
const KEYS: u32 = 32;
/// Queries, and keys, of a tile that a unit computes.
const OWN: [u32; 2] = [ROWS / SIDE, KEYS / SIDE];
/// Numbers that are read at once.
const VECTOR: u32 = 4;
type Four = Vector<f32, Const<4>>;
/// Numbers of a head at most: 32 KiB of shared memory, which every device has.
const WIDEST_HEAD: usize = 64;
/// Tokens from which on a tile is worth it.
pub(super) const LEAST_TOKENS: usize = 16;

/// How many heads of a key head share a tile, if tiles suit these sizes.
pub(super) fn shared_heads(tokens: usize, head_dim: usize, group: usize) -> Option<usize> {
    let suit =
        tokens >= LEAST_TOKENS && head_dim.is_power_of_two() && (SIDE as usize..=WIDEST_HEAD).contains(&head_dim);
    suit.then(|| if (ROWS as usize).is_multiple_of(group) { group } else { 1 })
}

/// A cube computes [`ROWS`] queries: `shared` heads of so many tokens as there is room for.
#[cube(launch_unchecked)]
pub(super) fn in_tiles(
    q: &Array<f32>,
    keys: &Array<f32>,
    values: &Array<f32>,
    sinks: &Array<f32>,
    out: &mut Array<f32>,
    tokens: u32,
    width: u32,
    slots: u32,
    first: u32,
    position: u32,
    window: u32,
    scale: f32,
    #[comptime] group: u32,
    #[comptime] shared: u32,
    #[comptime] head_dim: u32,
) {
    let first_token = CUBE_POS_X * comptime!(ROWS / shared);
    let first_head = CUBE_POS_Y * shared;
    let heads = CUBE_COUNT_Y * shared;
    let column = first * width + first_head / group * head_dim;
    let (row, side) = (UNIT_POS / SIDE * comptime!(OWN[0]), UNIT_POS % SIDE);
    let mut queries = SharedMemory::<Four>::new(comptime!((ROWS * head_dim / VECTOR) as usize));
    // First the keys of a tile, then its values.
    let mut tile = SharedMemory::<Four>::new(comptime!((KEYS * head_dim / VECTOR) as usize));
    // First the largest score of each unit, then every key's share.
    let mut shares = SharedMemory::<f32>::new(comptime!((ROWS * KEYS) as usize));
    let mut slot = UNIT_POS;
    while slot < comptime!(ROWS * head_dim / VECTOR) {
        let (r, i) = (slot / (head_dim / VECTOR), slot % (head_dim / VECTOR));
        let token = min(first_token + r / shared, tokens - 1);
        let at = (token * heads + first_head + r % shared) * head_dim + VECTOR * i;
        queries[place(r / comptime!(OWN[0]), r, i, comptime!(head_dim / VECTOR))] = four(q, at);
        slot += UNITS;
    }
    let (mut tops, mut totals) =
        (Array::<f32>::new(comptime!(OWN[0] as usize)), Array::<f32>::new(comptime!(OWN[0] as usize)));
    let mut ends = Array::<u32>::new(comptime!(OWN[0] as usize));
    #[unroll]
    for r in 0..comptime!(OWN[0]) {
        let n = comptime!(r as usize);
        tops[n] = sinks[(first_head + (row + r) % shared) as usize];
        totals[n] = 1.0;
        ends[n] = position + min(first_token + (row + r) / shared, tokens - 1) + 1;
    }
    let own_numbers = comptime!(head_dim / SIDE);
    let numbers = comptime!((OWN[0] * own_numbers) as usize);
    let mut mixed = Array::<f32>::new(numbers);
    #[unroll]
    for number in 0..numbers {
        mixed[number] = 0.0;
    }
    let first_end = position + first_token + 1;
    let end = position + min(first_token + comptime!(ROWS / shared), tokens);
    let mut start = first_end - min(first_end, window);
    while start < end {
        bring(keys, &mut tile, start, end, slots, width, column, head_dim);
        sync_cube();
        let mut scores = products(&queries, &tile, row, side, head_dim);
        #[unroll]
        for r in 0..comptime!(OWN[0]) {
            let last = ends[comptime!(r as usize)];
            let mut best = f32::new(f32::MIN);
            #[unroll]
            for k in 0..comptime!(OWN[1]) {
                let number = comptime!((r * OWN[1] + k) as usize);
                let key = start + side + k * SIDE;
                scores[number] *= scale;
                if !is_seen(key, last, window) {
                    scores[number] = f32::new(f32::MIN);
                }
                best = max(best, scores[number]);
            }
            shares[place(row / comptime!(OWN[0]), row + r, side, KEYS)] = best;
        }
        sync_cube();
        let mut shrinks = Array::<f32>::new(comptime!(OWN[0] as usize));
        #[unroll]
        for r in 0..comptime!(OWN[0]) {
            let n = comptime!(r as usize);
            let mut top = tops[n];
            for other in 0..SIDE {
                top = max(top, shares[place(row / comptime!(OWN[0]), row + r, other, KEYS)]);
            }
            shrinks[n] = f32::exp(tops[n] - top);
            tops[n] = top;
        }
        // The keys are no longer needed, and everybody has seen everybody's largest score.
        sync_cube();
        #[unroll]
        for r in 0..comptime!(OWN[0]) {
            let n = comptime!(r as usize);
            #[unroll]
            for k in 0..comptime!(OWN[1]) {
                let number = comptime!((r * OWN[1] + k) as usize);
                let key = start + side + k * SIDE;
                let seen = is_seen(key, ends[n], window);
                let share = select(seen, f32::exp(scores[number] - tops[n]), f32::new(0.0));
                shares[place(row / comptime!(OWN[0]), row + r, side + k * SIDE, KEYS)] = share;
            }
            totals[n] *= shrinks[n];
            #[unroll]
            for i in 0..own_numbers {
                mixed[comptime!((r * own_numbers + i) as usize)] *= shrinks[n];
            }
        }
        bring(values, &mut tile, start, end, slots, width, column, head_dim);
        sync_cube();
        mix(&shares, &tile, row, side, head_dim, &mut totals, &mut mixed);
        sync_cube();
        start += KEYS;
    }
    #[unroll]
    for r in 0..comptime!(OWN[0]) {
        let token = first_token + (row + r) / shared;
        if token < tokens {
            let at = (token * heads + first_head + (row + r) % shared) * head_dim + side * own_numbers;
            #[unroll]
            for i in 0..own_numbers {
                let number = comptime!((r * own_numbers + i) as usize);
                out[(at + i) as usize] = mixed[number] / totals[comptime!(r as usize)];
            }
        }
    }
}

/// Whether a query that sees keys up to `end` sees this one.
#[cube]
fn is_seen(key: u32, end: u32, window: u32) -> bool {
    key < end && end - key <= window
}

/// Where number `i` of row `row` lies, or vector, in rows of `width`: `turn` says which banks a row starts at, so that units
/// that read the same number of different rows, or different numbers of one row, do not wait for each other.
#[cube]
fn place(turn: u32, row: u32, i: u32, #[comptime] width: u32) -> usize {
    (row * width + (i ^ (turn % comptime!(if width < SIDE { width } else { SIDE })))) as usize
}

/// Four neighbouring numbers.
#[cube]
fn four(from: &Array<f32>, at: u32) -> Four {
    let mut four = Four::empty();
    #[unroll]
    for n in 0..VECTOR {
        four[comptime!(n as usize)] = from[(at + n) as usize];
    }
    four
}

/// Brings the keys or values of a tile; zeros past the last one.
#[cube]
fn bring(
    from: &Array<f32>,
    tile: &mut SharedMemory<Four>,
    start: u32,
    end: u32,
    slots: u32,
    width: u32,
    column: u32,
    #[comptime] head_dim: u32,
) {
    let fours = comptime!(head_dim / VECTOR);
    let mut slot = UNIT_POS;
    while slot < comptime!(KEYS * fours) {
        let (key, i) = (slot / fours, slot % fours);
        let mut value = Four::new(0.0);
        if start + key < end {
            value = four(from, (start + key) % slots * width + column + VECTOR * i);
        }
        tile[place(key, key, i, fours)] = value;
        slot += UNITS;
    }
}

/// The scores of a unit's queries with its keys: `[OWN[0], OWN[1]]`.
#[cube]
fn products(
    queries: &SharedMemory<Four>,
    tile: &SharedMemory<Four>,
    row: u32,
    side: u32,
    #[comptime] head_dim: u32,
) -> Array<f32> {
    let fours = comptime!(head_dim / VECTOR);
    let mut scores = Array::<f32>::new(comptime!((OWN[0] * OWN[1]) as usize));
    #[unroll]
    for number in 0..comptime!((OWN[0] * OWN[1]) as usize) {
        scores[number] = 0.0;
    }
    for i in 0..fours {
        let mut own_keys = Array::<Four>::new(comptime!(OWN[1] as usize));
        #[unroll]
        for k in 0..comptime!(OWN[1]) {
            own_keys[comptime!(k as usize)] = tile[place(side, side + k * SIDE, i, fours)];
        }
        #[unroll]
        for r in 0..comptime!(OWN[0]) {
            let query = queries[place(row / comptime!(OWN[0]), row + r, i, fours)];
            #[unroll]
            for k in 0..comptime!(OWN[1]) {
                let key = own_keys[comptime!(k as usize)];
                let mut score = scores[comptime!((r * OWN[1] + k) as usize)];
                #[unroll]
                for n in 0..comptime!(VECTOR as usize) {
                    score += query[n] * key[n];
                }
                scores[comptime!((r * OWN[1] + k) as usize)] = score;
            }
        }
    }
    scores
}

/// Adds a tile's values by their shares, and the shares. A unit looks after neighbouring numbers of each of its rows.
#[cube]
fn mix(
    shares: &SharedMemory<f32>,
    tile: &SharedMemory<Four>,
    row: u32,
    side: u32,
    #[comptime] head_dim: u32,
    totals: &mut Array<f32>,
    mixed: &mut Array<f32>,
) {
    let own_numbers = comptime!(head_dim / SIDE);
    for key in 0..KEYS {
        let first = side * own_numbers;
        let four = tile[place(key, key, first / VECTOR, comptime!(head_dim / VECTOR))];
        #[unroll]
        for r in 0..comptime!(OWN[0]) {
            let share = shares[place(row / comptime!(OWN[0]), row + r, key, KEYS)];
            totals[comptime!(r as usize)] += share;
            #[unroll]
            for i in 0..own_numbers {
                let mut value = four[comptime!(i as usize)];
                if comptime!(own_numbers < VECTOR) {
                    value = part(four, first % VECTOR + i);
                }
                mixed[comptime!((r * own_numbers + i) as usize)] += share * value;
            }
        }
    }
}

/// One of four numbers.
#[cube]
fn part(four: Four, n: u32) -> f32 {
    let low = select(n & 1 == 0, four[0], four[1]);
    let high = select(n & 1 == 0, four[2], four[3]);
    select(n < 2, low, high)
}
