//! Dates in a certificate: UTC, to the second, as a person reads and a sort orders them.

use std::time::{Duration, SystemTime};

/// Now: "2026-11-24T19:41:00Z".
pub(super) fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

/// How long ago `text` was. Nothing for what is no date, or in the future.
pub(super) fn age(text: &str) -> Option<Duration> {
    SystemTime::now().duration_since(humantime::parse_rfc3339(text).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_was_just_written_is_as_old_as_the_time_since() {
        let (before, text) = (Instant::now(), now());
        assert!(text.len() == 20 && text.ends_with('Z'), "{text}");
        sleep(Duration::from_millis(1100));
        let age = age(&text).unwrap();
        // Written to the second.
        assert!(age >= Duration::from_secs(1) && age <= before.elapsed() + Duration::from_secs(1), "{age:?}");
    }

    #[test]
    fn what_is_no_date_has_no_age() {
        for text in
            ["", "yesterday", "2026-11-24", "2026-13-01T00:00:00Z", "2026-11-24T25:00:00Z", "-1--1--1T0:0:0Z"]
        {
            assert_eq!(age(text), None, "{text}");
        }
        assert_eq!(age("9000-01-01T00:00:00Z"), None);
        let since_2000 = age("2000-02-29T12:34:56Z").unwrap();
        assert!(since_2000 > Duration::from_secs(26 * 365 * 86_400), "{since_2000:?}");
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in ".{0,30}") {
            let _ = age(&text);
        }
    }
}
