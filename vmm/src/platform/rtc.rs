//! The CMOS real-time clock (Motorola MC146818A data sheet): it tells the time in UTC and keeps the
//! rest of its RAM. It has no alarm and no interrupt; Linux takes its time from kvmclock.

use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::layout;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// Where PCs keep the century.
const CENTURY: u8 = 0x32;

/// Divider and rate as firmware sets them; no update in progress.
const A_DEFAULT: u8 = 0x26;
/// 24 hours, binary-coded decimal, no interrupts.
const B_DEFAULT: u8 = 0x02;
/// RAM and time are valid.
const D_VALID: u8 = 0x80;

/// The clock.
pub struct Rtc(Mutex<State>);

struct State {
    index: u8,
    ram: [u8; 128],
}

impl Default for Rtc {
    fn default() -> Self {
        Rtc(Mutex::new(State {
            index: 0,
            ram: [0; 128],
        }))
    }
}

impl Rtc {
    /// A load from the index or data port.
    pub fn read(&self, port: u16) -> u8 {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if port == layout::RTC.start {
            return 0xff; // Write-only.
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        match state.index {
            STATUS_A => A_DEFAULT,
            STATUS_B => B_DEFAULT,
            STATUS_C => 0,
            STATUS_D => D_VALID,
            index => time_field(index, now)
                .unwrap_or_else(|| state.ram.get(usize::from(index)).copied().unwrap_or(0)),
        }
    }

    /// A store to the index or data port. Setting the clock has no effect.
    pub fn write(&self, port: u16, value: u8) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let index = usize::from(state.index);
        if port == layout::RTC.start {
            state.index = value & 0x7f; // Bit 7 masks NMIs.
        } else if let Some(byte) = state.ram.get_mut(index) {
            *byte = value;
        }
    }
}

/// The register `index` at `now` (seconds since 1970, UTC), if it is part of the time.
fn time_field(index: u8, now: u64) -> Option<u8> {
    let days = now / 86_400;
    let value = match index {
        SECONDS => now % 60,
        MINUTES => now / 60 % 60,
        HOURS => now / 3600 % 24,
        // 1970-01-01 was a Thursday; 1 is Sunday.
        WEEKDAY => (days + 4) % 7 + 1,
        DAY => date(days).2,
        MONTH => date(days).1,
        YEAR => date(days).0 % 100,
        CENTURY => date(days).0 / 100 % 100,
        _ => return None,
    };
    let value = u8::try_from(value).ok()?;
    Some(((value / 10) << 4) | (value % 10))
}

/// Year, month and day of the month, `days` days after 1970-01-01.
fn date(days: u64) -> (u64, u64, u64) {
    // Counted from a March 1st, leap days come last in the year, and the months' lengths repeat in
    // groups of five (153 days).
    let days = days + 719_468; // Since 0000-03-01.
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        for (days, expected) in [
            (0, (1970, 1, 1)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (19_782, (2024, 2, 29)),
            (20_818, (2026, 12, 31)),
        ] {
            assert_eq!(date(days), expected);
        }
    }

    #[test]
    fn fields_are_bcd() {
        let now = 1_709_210_096; // 2024-02-29 12:34:56 UTC, a Thursday.
        let fields = [
            (SECONDS, 0x56),
            (MINUTES, 0x34),
            (HOURS, 0x12),
            (WEEKDAY, 0x05),
            (DAY, 0x29),
            (MONTH, 0x02),
            (YEAR, 0x24),
            (CENTURY, 0x20),
        ];
        for (index, value) in fields {
            assert_eq!(time_field(index, now), Some(value), "{index:#x}");
        }
        assert_eq!(time_field(0x0f, now), None);
    }

    #[test]
    fn ports() {
        let rtc = Rtc::default();
        rtc.write(0x70, 0x80 | STATUS_A);
        assert_eq!(rtc.read(0x71) & 0x80, 0, "no update in progress");
        rtc.write(0x70, 0x40);
        rtc.write(0x71, 0x5a);
        assert_eq!(rtc.read(0x71), 0x5a);
        rtc.write(0x70, 0x7f);
        rtc.write(0x71, 1);
        assert_eq!(rtc.read(0x71), 1);
    }
}
