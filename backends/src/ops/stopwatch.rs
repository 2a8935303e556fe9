use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

static NANOSECONDS: AtomicU64 = AtomicU64::new(0);

/// Time that this crate's operations have taken in this process so far. What a program needs beyond its growth was spent
/// elsewhere: in Burn's own operations, for example. Where threads call operations at the same time, their times add up.
#[must_use]
pub fn time_in_operations() -> Duration {
    Duration::from_nanos(NANOSECONDS.load(Ordering::Relaxed))
}

/// Runs an operation and counts its time.
pub(super) fn timed<R>(operation: impl FnOnce() -> R) -> R {
    let started = Instant::now();
    let result = operation();
    NANOSECONDS.fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
    result
}
