//! Dates in a certificate: UTC, to the second, as a person reads and a sort orders them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Now: "2026-11-24T19:41:00Z".
pub(super) fn now() -> String {
    date(since_1970().as_secs())
}

/// How long ago `text` was. Nothing for what is no date of ours, or in the future.
pub(super) fn age(text: &str) -> Option<Duration> {
    since_1970().checked_sub(Duration::from_secs(parse(text)?))
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The proleptic Gregorian calendar, by Howard Hinnant's `civil_from_days`.
fn date(seconds: u64) -> String {
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// The seconds since 1970 of what [`date`] wrote; the same author's `days_from_civil`.
fn parse(text: &str) -> Option<u64> {
    let (day, time) = text.strip_suffix('Z')?.split_once('T')?;
    let numbers = |text: &str, separator| -> Option<[u64; 3]> {
        let numbers: Option<Vec<u64>> = text.split(separator).map(|digits| digits.parse().ok()).collect();
        numbers?.try_into().ok()
    };
    let ([year, month, day], [hour, minute, second]) = (numbers(day, '-')?, numbers(time, ':')?);
    if !(1970..10_000).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let year = year - u64::from(month <= 2);
    let (era, year_of_era) = (year / 400, year % 400);
    let from_march = if month > 2 { month - 3 } else { month + 9 };
    let day_of_era =
        365 * year_of_era + year_of_era / 4 - year_of_era / 100 + (153 * from_march + 2) / 5 + day - 1;
    let days = era * 146_097 + day_of_era - 719_468;
    (hour < 24 && minute < 60 && second < 60).then_some(days * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn dates_are_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01T00:00:00Z");
        assert_eq!(date(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(date(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(date(1_795_549_260), "2026-11-24T19:41:00Z");
        assert_eq!(parse("2000-02-29T00:00:00Z"), Some(951_782_400));
    }

    #[test]
    fn what_is_no_date_has_no_age() {
        for text in
            ["", "yesterday", "2026-11-24", "2026-13-01T00:00:00Z", "2026-11-24T25:00:00Z", "-1--1--1T0:0:0Z"]
        {
            assert_eq!(age(text), None, "{text}");
        }
        assert_eq!(age("9000-01-01T00:00:00Z"), None);
        assert!(age(&now()).unwrap() < Duration::from_secs(60));
    }

    proptest! {
        #[test]
        fn dates_are_read_as_they_were_written(seconds in 0_u64..200_000_000_000) {
            prop_assert_eq!(parse(&date(seconds)), Some(seconds));
        }

        #[test]
        fn any_text_is_read(text in ".{0,30}") {
            let _ = age(&text);
        }
    }
}
