//! The arithmetic of [`math`](super::math), [`screen`](super::screen) and [`bounds`](super::bounds), compiled for an
//! instruction set: one list of functions for all of them.

/// Defines the functions in the file of an instruction set, with its features where it has some.
macro_rules! shared_arithmetic {
    ($($features:literal)?) => {
        $crate::cpu::shared::shared_arithmetic! { @each ($($features)?)
            math::quantize(
                x: &mut [f32], rotation: Option<$crate::format::Rotation>, quads: &mut [$crate::cpu::tokens::Quad], block_sums: &mut [i16]
            ) -> f32;
            math::swiglu(activation: $crate::ops::ClampedSwiGlu, gate_up: &[f32], out: &mut [f32]);
            math::swiglu_gradient(
                activation: $crate::ops::ClampedSwiGlu, gate_up: &[f32], gradient: &[f32], out: &mut [f32]
            );
            math::round_token(x: &mut [f32], rotation: Option<$crate::format::Rotation>);
            math::sink_softmax(scores: &mut [f32], scale: f32, sink: f32);
            math::exponentials(scores: &mut [f32], scale: f32, least: f32) -> [f32; 2];
            math::sink_softmax_gradient(shares: &[f32], gradient: &mut [f32], scale: f32) -> f32;
            math::rms_norm(x: &[f32], gamma: &[f32], epsilon: f32, out: &mut [f32]);
            screen::screen_row(
                float: $crate::ops::StoredFloat, words: &[u32], dither: &$crate::cpu::screen::Dither, x: &mut [f32],
                bits: (&mut [u8], &mut [u8])
            ) -> [f32; 2];
            bounds::screen_bounds(
                token: $crate::cpu::bounds::TokenTerms, totals: &[i32], steps: &[f32], lengths: &[f32], out: &mut [f32]
            );
        }
    };
    (@each () $($module:ident::$function:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        $(
            pub(in crate::cpu) fn $function($($argument: $type),*) $(-> $result)? {
                $crate::cpu::$module::$function($($argument),*)
            }
        )*
    };
    (@each ($features:literal) $($module:ident::$function:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        $(
            #[target_feature(enable = $features)]
            pub(in crate::cpu) fn $function($($argument: $type),*) $(-> $result)? {
                $crate::cpu::$module::$function($($argument),*)
            }
        )*
    };
}
pub(super) use shared_arithmetic;
