//! The time of the day, where the user is.

/// A moment in the machine's time zone (localtime(3)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalTime {
    /// For instance 2026.
    pub year: i32,
    /// From 0.
    pub month: usize,
    /// From 1.
    pub day: i32,
    /// From 0.
    pub hour: i32,
    /// From 0.
    pub minute: i32,
}

/// The local time `seconds` after the beginning of 1970.
pub fn local_time(seconds: u64) -> Option<LocalTime> {
    let seconds = libc::time_t::try_from(seconds).ok()?;
    // SAFETY: both pointers are valid for the call, which keeps neither; `tm` is plain numbers, and a pointer that is not
    // looked at, so all bytes zero are a value.
    let time = unsafe {
        let mut time: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&raw const seconds, &raw mut time).is_null() {
            return None;
        }
        time
    };
    Some(LocalTime {
        year: time.tm_year + 1900,
        month: usize::try_from(time.tm_mon).ok()?,
        day: time.tm_mday,
        hour: time.tm_hour,
        minute: time.tm_min,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_year_is_a_year() {
        let (then, later) = (local_time(86_400 * 30).unwrap(), local_time(86_400 * (30 + 365)).unwrap());
        assert_eq!((then.year, later.year), (1970, 1971));
        assert_eq!((then.month, then.day), (later.month, later.day));
        assert_eq!(local_time(u64::MAX), None);
    }
}
