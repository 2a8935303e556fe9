use burn::tensor::{DType, Tensor, TensorData, backend::Backend};

use crate::cpu::{
    Kernels,
    bounds::{self, bounds},
    screen::{DEVIATIONS, Screen},
};

/// [`screen_bounds`](crate::screen_bounds), on the host, where a screen lies.
///
/// # Panics
/// If the width of `x` is not the screen's number of columns.
#[must_use]
pub fn screen_bounds<B: Backend>(x: Tensor<B, 2>, screen: &Screen) -> Tensor<B, 2> {
    let (tokens, device) = (x.dims()[0], x.device());
    let x: Vec<f32> = x.into_data().iter::<f32>().collect();
    let mut out = vec![0.0; tokens * screen.rows()];
    let result = bounds(Kernels::detect(), screen, &x, tokens, DEVIATIONS, &mut out);
    assert!(result.is_ok(), "tokens of another width than the screen");
    Tensor::from_data(TensorData::new(out, [tokens, screen.rows()]), (&device, DType::F32))
}

/// [`closer_bounds`](crate::closer_bounds), on the host.
///
/// # Panics
/// If `x` is not one token of the screen's width, or there are not as many `bounds` as `rows`.
pub fn closer_bounds<B: Backend>(x: Tensor<B, 2>, screen: &Screen, rows: &[u32], bounds: &mut [f32]) {
    let x: Vec<f32> = x.into_data().iter::<f32>().collect();
    let result = bounds::closer_bounds(Kernels::detect(), screen, &x, rows, DEVIATIONS, bounds);
    assert!(result.is_ok(), "one token of the screen's width, and a bound for each row");
}
