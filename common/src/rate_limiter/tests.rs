use proptest::prelude::*;

use super::*;

fn ops(rate: u64, burst: u64) -> Limits {
    let direction = DirectionLimits { ops: Some(Limit::new(rate, burst).unwrap()), bytes: None };
    Limits { read: direction, write: DirectionLimits::default() }
}

fn bytes(rate: u64, burst: u64) -> Limits {
    let direction = DirectionLimits { ops: None, bytes: Some(Limit::new(rate, burst).unwrap()) };
    Limits { read: direction, write: DirectionLimits::default() }
}

#[test]
fn without_a_limit_the_clock_is_not_read() {
    let limiter = RateLimiter::default();
    for direction in [Direction::Read, Direction::Write] {
        assert_eq!(limiter.try_take(direction, 1, u64::MAX, || panic!("clock")), Ok(()));
    }
    let limiter = RateLimiter::new(ops(1, 1), Instant::now());
    assert_eq!(limiter.try_take(Direction::Write, 1, 1, || panic!("clock")), Ok(()));
}

#[test]
fn a_burst_passes_then_one_each_tick() {
    let start = Instant::now();
    let limiter = RateLimiter::new(ops(10, 3), start);
    let take = |now| limiter.try_take(Direction::Read, 1, 0, || now);
    for _ in 0..3 {
        assert_eq!(take(start), Ok(()));
    }
    let next = start + Duration::from_millis(100);
    assert_eq!(take(start), Err(next));
    assert_eq!(take(next - Duration::from_nanos(1)), Err(next));
    assert_eq!(take(next), Ok(()));
    assert_eq!(take(next), Err(next + Duration::from_millis(100)));
    // A long quiet time fills the bucket to the burst and no further.
    let later = start + Duration::from_secs(3600);
    assert_eq!([take(later), take(later), take(later)], [Ok(()); 3]);
    assert!(take(later).is_err());
}

#[test]
fn a_request_above_the_burst_passes_and_is_paid_for() {
    let start = Instant::now();
    let limiter = RateLimiter::new(bytes(1000, 100), start);
    let take = |count, now| limiter.try_take(Direction::Read, 1, count, || now);
    assert_eq!(take(200, start), Ok(()));
    // 100 of debt and the one token that has to be there.
    let paid = start + Duration::from_millis(101);
    assert_eq!(take(1, start), Err(paid));
    assert_eq!(take(1, paid), Ok(()));
}

#[test]
fn both_limits_count_and_a_refusal_takes_nothing() {
    let start = Instant::now();
    let read = DirectionLimits {
        ops: Some(Limit::new(100, 100).unwrap()),
        bytes: Some(Limit::new(1000, 10).unwrap()),
    };
    let limiter = RateLimiter::new(Limits { read, write: DirectionLimits::default() }, start);
    assert_eq!(limiter.try_take(Direction::Read, 1, 10, || start), Ok(()));
    for _ in 0..1000 {
        assert!(limiter.try_take(Direction::Read, 1, 1, || start).is_err());
    }
    // Without bytes the byte limit does not matter, and 99 operations are left.
    for _ in 0..99 {
        assert_eq!(limiter.try_take(Direction::Read, 1, 0, || start), Ok(()));
    }
    assert!(limiter.try_take(Direction::Read, 1, 0, || start).is_err());
}

#[test]
fn limits_change_while_running_and_debt_stays() {
    let start = Instant::now();
    let limiter = RateLimiter::new(bytes(1, 1), start);
    let take = |count, now| limiter.try_take(Direction::Read, 1, count, || now);
    assert_eq!(take(1_000_000, start), Ok(()));
    assert_eq!(take(1, start), Err(start + WAIT_MAX));
    limiter.set(bytes(10_000_000, 1), start);
    assert_eq!(limiter.limits(), bytes(10_000_000, 1));
    assert_eq!(take(1, start), Err(start + Duration::from_millis(100)));
    limiter.set(Limits::default(), start);
    assert_eq!(take(u64::MAX, start), Ok(()));
    assert!(!limiter.is_limited(Direction::Read));
}

#[test]
fn a_clock_that_goes_back_neither_gives_nor_panics() {
    let start = Instant::now() + Duration::from_secs(10);
    let limiter = RateLimiter::new(ops(10, 1), start);
    assert_eq!(limiter.try_take(Direction::Read, 1, 0, || start), Ok(()));
    let before = start - Duration::from_secs(5);
    assert!(limiter.try_take(Direction::Read, 1, 0, || before).is_err());
    assert!(limiter.try_take(Direction::Read, 1, 0, || start).is_err());
}

#[test]
fn the_largest_numbers_do_not_overflow() {
    let start = Instant::now();
    let limiter = RateLimiter::new(bytes(u64::MAX, u64::MAX), start);
    assert_eq!(limiter.try_take(Direction::Read, 1, u64::MAX, || start), Ok(()));
    let far = start + Duration::from_secs(u32::MAX.into());
    assert_eq!(limiter.try_take(Direction::Read, 1, u64::MAX, || far), Ok(()));
    let limiter = RateLimiter::new(bytes(1, 1), start);
    assert_eq!(limiter.try_take(Direction::Read, 1, u64::MAX, || start), Ok(()));
    assert_eq!(limiter.try_take(Direction::Read, 1, 1, || far), Err(far + WAIT_MAX));
}

#[test]
fn a_limit_is_written_in_three_ways() {
    let limit = |rate, burst| Limit::new(rate, burst).unwrap();
    assert_eq!("1000".parse(), Ok(limit(1000, 100)));
    assert_eq!("1".parse(), Ok(limit(1, 1)));
    assert_eq!("100M:1G".parse(), Ok(limit(100 << 20, 1 << 30)));
    assert_eq!("0".parse::<Limit>(), Err(LimitError::Zero));
    assert_eq!("5:0".parse::<Limit>(), Err(LimitError::Zero));
    assert!("5:".parse::<Limit>().is_err());
    let text =
        r#"{"read": {"ops": 1000, "bytes": "1M:2M"}, "write": {"ops": {"rate": 5, "burst": 7}}}"#;
    let limits: Limits = serde_json::from_str(text).unwrap();
    assert_eq!(limits.read.ops, Some(limit(1000, 100)));
    assert_eq!(limits.read.bytes, Some(limit(1 << 20, 2 << 20)));
    assert_eq!(limits.write, DirectionLimits { ops: Some(limit(5, 7)), bytes: None });
    // What is printed can be read again.
    let again: Limits = serde_json::from_str(&serde_json::to_string(&limits).unwrap()).unwrap();
    assert_eq!(again, limits);
    assert!(serde_json::from_str::<Limits>(r#"{"reed": {}}"#).is_err());
    assert!(serde_json::from_str::<Limits>(r#"{"read": {"ops": 0}}"#).is_err());
    let error = serde_json::from_str::<Limits>(r#"{"read": {"ops": true}}"#).unwrap_err();
    assert!(error.to_string().starts_with("a limit is a whole number"), "{error}");
}

/// One step of a run: time passes, then a request comes.
fn steps() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((0..50_000_000_u64, 1..10_000_u64), 1..200)
}

proptest! {
    /// Over every stretch of a run, what was taken before its last request is less than burst
    /// plus rate × time.
    #[test]
    fn no_stretch_exceeds_rate_and_burst(rate in 1..100_000_u64, burst in 1..100_000_u64, steps in steps()) {
        let start = Instant::now();
        let limiter = RateLimiter::new(bytes(rate, burst), start);
        let mut now_ns = 0_u64;
        // Time and cost of everything that passed.
        let mut passed: Vec<(u64, u64)> = Vec::new();
        for (pause_ns, cost) in steps {
            now_ns += pause_ns;
            let now = start + Duration::from_nanos(now_ns);
            if limiter.try_take(Direction::Read, 1, cost, || now).is_ok() {
                passed.push((now_ns, cost));
            }
        }
        for first in 0..passed.len() {
            let mut taken = 0;
            for &(at_ns, cost) in &passed[first..] {
                let refilled = u128::from(rate) * u128::from(at_ns - passed[first].0) / 1_000_000_000;
                prop_assert!(taken < u128::from(burst) + refilled);
                taken += u128::from(cost);
            }
        }
    }

    /// Whoever waits as told gets the full rate: a request passes as soon as one token is there.
    #[test]
    fn a_patient_caller_gets_the_rate(rate in 1..1_000_000_u64, burst in 1..1000_u64, cost in 1..5000_u64) {
        let start = Instant::now();
        let limiter = RateLimiter::new(bytes(rate, burst), start);
        let mut now = start;
        let mut taken = 0_u64;
        let mut waited = false;
        // Waits are whole nanoseconds; with a burst of one token, what a rounded wait earns beyond
        // the token spills over.
        let mut spilled_at_most = 0;
        for _ in 0..1000 {
            if let Err(when) = limiter.try_take(Direction::Read, 1, cost, || now) {
                prop_assert!(when > now && when <= now + WAIT_MAX);
                now = when;
                waited = true;
                continue;
            }
            if waited {
                // The caller never lets the bucket fill: what came is burst + rate × time.
                let elapsed = now.duration_since(start).as_nanos();
                let earned = u128::from(burst) * 1_000_000_000 + u128::from(rate) * elapsed;
                let level = earned - u128::from(taken) * 1_000_000_000;
                spilled_at_most += u128::from(rate);
                prop_assert!((1_000_000_000..1_000_000_000 + spilled_at_most).contains(&level));
                waited = false;
            }
            taken += cost;
        }
        prop_assert!(taken > 0);
    }
}
