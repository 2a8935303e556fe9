//! How fast the machine reads memory: the limit of every kernel that reads weights once.

use std::{hint::black_box, time::Instant};

use rayon::ThreadPool;

/// Bytes that are read to measure the bandwidth: many times what caches hold.
const BUFFER_BYTES: usize = 512 << 20;

/// How often they are read; the best time counts, as disturbances only ever slow it down.
const PASSES: usize = 7;

/// Numbers added side by side: enough to keep several vector registers busy.
const LANES: usize = 16;

/// Gigabytes a second that the threads of each pool read from memory together, as `ternoss bench` tells it. Here, because this
/// crate is optimized in every profile. Takes 512 MiB, and a second or so for each pool.
#[must_use]
pub fn read_bandwidth(pools: &[ThreadPool]) -> Vec<f64> {
    let buffer = vec![1u64; BUFFER_BYTES / size_of::<u64>()];
    pools.iter().map(|pool| read_pass(pool, &buffer)).collect()
}

fn read_pass(pool: &ThreadPool, buffer: &[u64]) -> f64 {
    let part = buffer.len().div_ceil(pool.current_num_threads());
    let seconds = (0..PASSES).map(|_| {
        let started = Instant::now();
        let sums = pool.broadcast(|thread| buffer.chunks(part).nth(thread.index()).map(sum));
        black_box(sums);
        started.elapsed().as_secs_f64()
    });
    BUFFER_BYTES as f64 / 1e9 / seconds.fold(f64::INFINITY, f64::min)
}

/// The sum of all numbers: additions so cheap that fetching the numbers takes longer.
fn sum(numbers: &[u64]) -> u64 {
    let mut lanes = [0u64; LANES];
    let chunks = numbers.chunks_exact(LANES);
    let rest: u64 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (lane, number) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*number);
        }
    }
    lanes.iter().fold(rest, |sum, lane| sum.wrapping_add(*lane))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_read_once() {
        for length in [0, 1, LANES, 3 * LANES + 5] {
            let numbers: Vec<u64> = (0..length as u64).collect();
            assert_eq!(sum(&numbers), numbers.iter().sum::<u64>());
        }
    }
}
