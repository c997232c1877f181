//! Days by their dates, in UTC.

use std::time::SystemTime;

/// Seconds of a day.
pub(crate) const DAY_SECONDS: u64 = 86_400;

/// The date of a moment, as 2026-01-31.
pub fn date(moment: SystemTime) -> String {
    let since = moment.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (year, month, day) = civil(since / DAY_SECONDS);
    format!("{year:04}-{month:02}-{day:02}")
}

/// Year, month and day of a day counted from 1970-01-01 (Hinnant, *chrono-Compatible Low-Level Date Algorithms*,
/// `civil_from_days`: years begin in March, eras have 400 years).
pub(crate) fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // from 0000-03-01
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn days_have_dates() {
        let at = |day: u64| {
            date(SystemTime::UNIX_EPOCH + Duration::from_secs(day * DAY_SECONDS + DAY_SECONDS - 1))
        };
        assert_eq!([at(0), at(11_016), at(20_484)], ["1970-01-01", "2000-02-29", "2026-01-31"]);
    }
}
