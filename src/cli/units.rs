//! Sizes and times as people write them: `10Gi`, `500M`, `200us`.

use std::time::Duration;

/// Bytes of a size. `K` to `P` are powers of 1000, `Ki` to `Pi` of 1024, as in Kubernetes; a trailing `B` may be there.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no size: write bytes, or 500M, 10Gi, 1Ti");
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let unit = unit.strip_suffix('B').unwrap_or(unit);
    let (letter, base) = unit.strip_suffix('i').map_or((unit, 1000_u64), |letter| (letter, 1024));
    let power = match letter {
        "" if base == 1000 => 0,
        "K" | "k" => 1,
        "M" => 2,
        "G" => 3,
        "T" => 4,
        "P" => 5,
        _ => return Err(wrong()),
    };
    number.checked_mul(base.pow(power)).ok_or_else(wrong)
}

/// A number of bytes for people, in powers of 1024.
pub fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = 0;
    let mut scaled = count as f64;
    while scaled >= 1024.0 && unit + 1 < units.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && scaled.fract() >= 0.05 && scaled < 100.0);
    format!("{scaled:.digits$} {}", units[unit])
}

/// A time with its unit: `200us`, `5ms`, `1s`; `0` is none.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no duration: write 200us, 5ms or 1s");
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    match unit {
        "" if number == 0 => Ok(Duration::ZERO),
        "us" => Ok(Duration::from_micros(number)),
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_kubernetes_writes_them() {
        let read =
            [("0", 0), ("4096", 4096), ("10Gi", 10 << 30), ("10GiB", 10 << 30), ("5G", 5_000_000_000), ("1k", 1000)];
        for (text, bytes) in read {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "-1", "1.5G", "i", "10i", "10X", "99999999P", "G", "1 G"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(parse_duration("200us"), Ok(Duration::from_micros(200)));
        assert_eq!(parse_duration("0"), Ok(Duration::ZERO));
        assert!(["", "5", "us", "-1s", "1h"].iter().all(|text| parse_duration(text).is_err()));
    }

    #[test]
    fn sizes_are_shown_short() {
        let shown = [(0, "0 B"), (4096, "4 KiB"), (1536, "1.5 KiB"), (10 << 30, "10 GiB"), ((10 << 30) + 1, "10 GiB")];
        for (bytes, text) in shown {
            assert_eq!(super::bytes(bytes), text);
        }
    }
}
