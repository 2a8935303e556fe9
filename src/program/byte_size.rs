//! Sizes as people write them.
#![cfg_attr(test, allow(dead_code, reason = "what calls it is not built for these tests"))]

/// Parses `1.5GB`, `700 MiB` or plain bytes.
pub(crate) fn byte_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => f64::from(1u32 << 10),
        "mib" => f64::from(1u32 << 20),
        "gib" => f64::from(1u32 << 30),
        _ => return Err(format!("unknown unit {unit:?}, expected B, kB, MB, GB, TB, KiB, MiB or GiB")),
    };
    match number.trim().parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok((number * factor) as u64),
        _ => Err(format!("{text:?} is no size: expected one such as 1.5GB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_written() {
        let known = [("1.5GB", 1_500_000_000), ("1GiB", 1 << 30), ("700 mb", 700_000_000), ("12", 12), ("2kB", 2000)];
        for (text, expected) in known {
            assert_eq!(byte_size(text), Ok(expected), "{text}");
        }
        for text in ["", "GB", "-1GB", "1.5XB", "1,5GB", "NaN", "inf", "0"] {
            assert!(byte_size(text).is_err(), "{text}");
        }
    }
}
