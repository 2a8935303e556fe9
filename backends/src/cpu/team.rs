//! Threads that stay awake between pieces of work.
//!
//! A decode step is some hundred short products, one after the other. Waking sleeping threads for each takes longer than
//! the smaller ones themselves, so [`session`] gives the calling thread a team that waits for its next job awake. Work that
//! starts anywhere else is rayon's.
#![allow(unsafe_code)]

use std::{
    cell::RefCell,
    hint::spin_loop,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

/// Looks for work between which a waiting thread only pauses: some 50 microseconds.
const SPINS: usize = 2_000;

/// Looks for work, after these, between which it lets others run, before it sleeps.
const YIELDS: usize = 500;

type Job<'a> = dyn Fn() + Sync + 'a;

/// What a leader and its team share.
struct Team {
    threads: usize,
    /// Counts jobs: what waiting threads look at.
    calls: AtomicUsize,
    desk: Mutex<Desk>,
    /// Rung when there is a job and somebody sleeps.
    bell: Condvar,
    /// Threads at the present job, its leader aside.
    busy: AtomicUsize,
}

/// What is to be done now.
#[derive(Default)]
struct Desk {
    job: Option<&'static Job<'static>>,
    closed: bool,
    sleepers: usize,
    failed: bool,
}

thread_local! {
    /// The team that this thread leads.
    static TEAM: RefCell<Option<Arc<Team>>> = const { RefCell::new(None) };
}

/// Runs `work` on this thread, with a team of as many threads as rayon has here. A session within a session changes
/// nothing.
pub fn session<R>(work: impl FnOnce() -> R) -> R {
    let threads = rayon::current_num_threads();
    if threads == 1 || TEAM.with_borrow(Option::is_some) {
        return work();
    }
    let team = Arc::new(Team {
        threads,
        calls: AtomicUsize::new(0),
        desk: Mutex::default(),
        bell: Condvar::new(),
        busy: AtomicUsize::new(0),
    });
    thread::scope(|scope| {
        for _ in 1..threads {
            let team = &team;
            // A machine that gives fewer threads gets the work done with those.
            let _ = thread::Builder::new().name("ternoss".into()).spawn_scoped(scope, move || team.serve());
        }
        let _end = Session::begin(&team);
        work()
    })
}

/// Ends a session however it ends, so that its threads do.
struct Session<'a>(&'a Team);

impl<'a> Session<'a> {
    fn begin(team: &'a Arc<Team>) -> Self {
        TEAM.set(Some(team.clone()));
        Self(team)
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        TEAM.set(None);
        self.0.desk().closed = true;
        self.0.call();
    }
}

/// Threads that work of the calling thread is shared by.
pub(super) fn threads() -> usize {
    TEAM.with_borrow(|team| team.as_ref().map(|team| team.threads)).unwrap_or_else(rayon::current_num_threads)
}

/// Runs `job` on the calling thread and on those of its team that come while it runs; `false` if it leads none.
pub(super) fn run(job: &Job<'_>) -> bool {
    // Taken away meanwhile: work within work is rayon's.
    let Some(team) = TEAM.take() else { return false };
    team.run(job);
    TEAM.set(Some(team));
    true
}

impl Team {
    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes waiting threads look.
    fn call(&self) {
        self.calls.fetch_add(1, Ordering::Release);
        if self.desk().sleepers > 0 {
            self.bell.notify_all();
        }
    }

    fn run(&self, job: &Job<'_>) {
        // SAFETY: only the lifetime changes. `job` outlives every use: threads take it from the desk and count themselves
        // busy under its lock, `Cleared` takes it from there and waits until nobody is busy, and runs before this returns.
        let lasting = unsafe { std::mem::transmute::<&Job<'_>, &'static Job<'static>>(job) };
        self.desk().job = Some(lasting);
        let cleared = Cleared(self);
        self.call();
        job();
        drop(cleared);
        let failed = std::mem::take(&mut self.desk().failed);
        assert!(!failed, "a thread panicked");
    }

    /// Works for the leader until the session ends.
    fn serve(&self) {
        let mut seen = 0;
        loop {
            seen = self.wait(seen);
            let job = {
                let desk = self.desk();
                if desk.closed {
                    return;
                }
                desk.job.inspect(|_| _ = self.busy.fetch_add(1, Ordering::Relaxed))
            };
            if let Some(job) = job {
                if catch_unwind(AssertUnwindSafe(job)).is_err() {
                    self.desk().failed = true;
                }
                self.busy.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// Waits until the number of calls is another than `seen`, and returns it.
    fn wait(&self, seen: usize) -> usize {
        for look in 0..SPINS + YIELDS {
            let calls = self.calls.load(Ordering::Acquire);
            if calls != seen {
                return calls;
            }
            if look < SPINS { spin_loop() } else { thread::yield_now() }
        }
        let mut desk = self.desk();
        desk.sleepers += 1;
        while self.calls.load(Ordering::Acquire) == seen {
            desk = self.bell.wait(desk).unwrap_or_else(PoisonError::into_inner);
        }
        desk.sleepers -= 1;
        self.calls.load(Ordering::Acquire)
    }
}

/// Takes the job from the desk and waits for those who are at it, even when the leader panics.
struct Cleared<'a>(&'a Team);

impl Drop for Cleared<'_> {
    fn drop(&mut self) {
        self.0.desk().job = None;
        let mut looks = 0;
        while self.0.busy.load(Ordering::Acquire) > 0 {
            if looks < SPINS {
                spin_loop()
            } else {
                thread::yield_now()
            }
            looks += 1;
        }
    }
}
