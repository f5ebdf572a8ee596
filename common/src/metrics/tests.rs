use proptest::prelude::*;

use super::*;

#[test]
fn a_counter_adds_and_wraps() {
    let counter = Counter::new();
    counter.add(3);
    counter.add(4);
    assert_eq!(counter.get(), 7);
    counter.add(u64::MAX);
    assert_eq!(counter.get(), 6);
}

#[test]
fn the_same_name_gives_the_same_counters() {
    let registry = Registry::new("test");
    let queue = registry.device("a").queue(1);
    queue.kicks.add(1);
    registry.device("a").queue(1).kicks.add(1);
    assert_eq!(queue.kicks.get(), 2);
    assert_eq!(registry.device("b").queue(1).kicks.get(), 0);
    let own = registry.device("a").counter("flushes_total", "Flushes.", None);
    own.add(5);
    assert_eq!(registry.device("a").counter("flushes_total", "Flushes.", None).get(), 5);
    assert_eq!(registry.device("a").counter("flushes_total", "Flushes.", Some(0)).get(), 0);
    registry.remove_device("a");
    assert_eq!(registry.device("a").queue(1).kicks.get(), 0);
}

#[test]
fn the_buckets_are_powers_of_two() {
    let histogram = Histogram::default();
    for value in [0, 1, 2, 3, 4, 5, 1024, 1025, 1 << 38, (1 << 38) + 1, u64::MAX] {
        histogram.record(value);
    }
    let buckets = histogram.snapshot().buckets;
    let expected = [(0, 2), (1, 1), (2, 2), (3, 1), (10, 1), (11, 1), (38, 1), (39, 2)];
    for (bucket, count) in buckets.iter().enumerate() {
        let known = expected.iter().find(|(index, _)| *index == bucket);
        assert_eq!(*count, known.map_or(0, |(_, count)| *count), "bucket {bucket}");
    }
}

#[test]
fn the_requests_of_a_batch_are_counted_with_one_look_at_the_clock() {
    let histogram = Histogram::default();
    let begun = Instant::now() - std::time::Duration::from_secs(1);
    let now = histogram.record_since(begun, 16);
    assert_eq!(histogram.snapshot().count(), 16);
    let elapsed = u64::try_from((now - begun).as_nanos()).unwrap();
    assert_eq!(histogram.snapshot().mean_ns(), Some(elapsed));
}

#[test]
fn percentiles_of_a_stretch_of_time() {
    let histogram = Histogram::default();
    assert_eq!(histogram.snapshot().percentile_ns(50), None);
    assert_eq!(histogram.snapshot().mean_ns(), None);
    histogram.record(1 << 30);
    let before = histogram.snapshot();
    for _ in 0..99 {
        histogram.record(1000);
    }
    histogram.record(100_000);
    let stretch = histogram.snapshot().since(&before);
    assert_eq!(stretch.count(), 100);
    assert_eq!(stretch.mean_ns(), Some((99 * 1000 + 100_000) / 100));
    assert_eq!(stretch.percentile_ns(50), Some(1024));
    assert_eq!(stretch.percentile_ns(99), Some(1024));
    assert_eq!(stretch.percentile_ns(100), Some(1 << 17));
}

#[test]
fn the_text_is_what_prometheus_reads() {
    let registry = Registry::new("vhost-user-test");
    for name in ["disk\"0\\\n", "disk1"] {
        let device = registry.device(name);
        device.queue(0).requests.add(7);
        device.gauge("capacity_bytes", "Size of the disk in bytes.", None).set(4096);
        device.counter("flushes_total", "Flushes.", Some(0)).add(2);
    }
    let latency = registry.device("disk1").latency("request_seconds", "Latency.", Some(0));
    latency.record(1_500);
    latency.record(3_000_000_000_000);
    let mut text = String::new();
    registry.snapshot().write_prometheus(&mut text).unwrap();

    for line in [
        "outboard_queue_requests_total{device=\"disk\\\"0\\\\\\n\",queue=\"0\"} 7",
        "outboard_queue_requests_total{device=\"disk1\",queue=\"0\"} 7",
        "# TYPE outboard_queue_requests_total counter",
        "outboard_capacity_bytes{device=\"disk1\"} 4096",
        "# TYPE outboard_capacity_bytes gauge",
        "outboard_flushes_total{device=\"disk1\",queue=\"0\"} 2",
        "# TYPE outboard_request_seconds histogram",
        "outboard_request_seconds_bucket{device=\"disk1\",queue=\"0\",le=\"0.000001024\"} 0",
        "outboard_request_seconds_bucket{device=\"disk1\",queue=\"0\",le=\"0.000002048\"} 1",
        "outboard_request_seconds_bucket{device=\"disk1\",queue=\"0\",le=\"17.179869184\"} 1",
        "outboard_request_seconds_bucket{device=\"disk1\",queue=\"0\",le=\"+Inf\"} 2",
        "outboard_request_seconds_sum{device=\"disk1\",queue=\"0\"} 3000.000001500",
        "outboard_request_seconds_count{device=\"disk1\",queue=\"0\"} 2",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\nis not in\n{text}");
    }
    // Each name is described once, and its samples follow.
    let described: Vec<&str> =
        text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let mut once = described.clone();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len(), described.len());
    let mut family = "";
    for line in text.lines() {
        match line.strip_prefix("# TYPE ") {
            Some(rest) => family = rest.split(' ').next().unwrap(),
            None => assert!(line.starts_with("# HELP ") || line.starts_with(family), "{line}"),
        }
    }
}

#[test]
fn the_json_form_can_be_read_back() {
    let registry = Registry::new("vhost-user-test");
    let device = registry.device("disk");
    device.queue(3).bytes_read.add(u64::MAX);
    device.latency("request_seconds", "Latency.", None).record(5);
    device.gauge("depth", "Requests in flight.", Some(3)).set(9);
    let snapshot = registry.snapshot();
    let text = serde_json::to_string(&snapshot).unwrap();
    assert_eq!(serde_json::from_str::<Snapshot>(&text).unwrap(), snapshot);
    assert!(text.contains("\"bytes_read\":18446744073709551615"), "{text}");
}

proptest! {
    /// The bound is never below the true percentile and at most twice as large.
    #[test]
    fn a_percentile_is_right_within_a_factor_of_two(
        mut values in prop::collection::vec(1..1_u64 << 38, 1..300),
        percent in 1..=100_u8,
    ) {
        let histogram = Histogram::default();
        for value in &values {
            histogram.record(*value);
        }
        values.sort_unstable();
        let rank = (values.len() * usize::from(percent)).div_ceil(100).max(1);
        let truth = values[rank - 1];
        let bound = histogram.snapshot().percentile_ns(percent).unwrap();
        prop_assert!(truth <= bound && bound < 2 * truth.max(1) + u64::from(truth == 1));
    }
}
