//! The `ternoss` program: see [`ternoss::program`].

/// Burn allocates large temporaries all the time; the system's allocator maps and clears each of them anew.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    ternoss::program::run()
}
