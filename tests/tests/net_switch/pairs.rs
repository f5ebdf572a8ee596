//! Ports with several queue pairs: which of them a frame comes on.

use super::*;

const ON_TWO_PAIRS: [&str; 2] = ["--queue-pairs", "2"];
/// Flows tried at once.
const FLOWS: u16 = 24;
const EVERYTHING: u64 = u64::MAX;

/// A UDP datagram of flow `flow` between guests `from` and `to`, with `number` in it.
fn datagram(from: u8, to: u8, flow: u16, number: u8) -> Vec<u8> {
    let mut frame =
        [&mac(to)[..], &mac(from), &[8, 0, 0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17]].concat();
    frame.extend([0, 0, 10, 0, 0, from, 10, 0, 0, to]);
    // One end's port is the flow's.
    let ports = if from < to { [1000 + flow, 7] } else { [7, 1000 + flow] };
    frame.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
    frame.extend([0, 12, 0, 0, number, 0, 0, 0]);
    frame.resize(60, 0);
    frame
}

/// The flow of a datagram that guest 0 got, and its number.
fn flow_of(frame: &[u8]) -> (u16, u8) {
    (u16::from_be_bytes([frame[36], frame[37]]) - 1000, frame[42])
}

fn send(guest: &mut Guest, pair: usize, frame: &[u8]) {
    guest.send_on(pair, &[&PLAIN[..], frame].concat());
}

/// A switch with two ports of two pairs; guest 0 has both pairs (but uses one until it says so), guest 1
/// knows of one alone. Each knows where the other is.
fn two_guests(dir: &Path, format: RingFormat) -> (Daemon, PathBuf, Guest, Guest) {
    let (daemon, metrics) = switch_with(dir, &["", ""], &ON_TWO_PAIRS);
    let features = EVERYTHING;
    let mut many = Guest::with_pairs(dir, 0, format, features, 48, 2);
    let mut one = Guest::new(dir, 1, format, NO_MQ, 32);
    send(&mut many, 0, &frame(ALL, mac(0), 60));
    one.receive();
    send(&mut one, 0, &frame(mac(0), mac(1), 60));
    many.receive();
    (daemon, metrics, many, one)
}

/// On which pair each flow comes.
fn pairs_of_flows(many: &mut Guest, one: &mut Guest) -> Vec<usize> {
    let pair = |flow| {
        let frame = datagram(1, 0, flow, 0);
        send(one, 0, &frame);
        let (pair, got) = many.receive_anywhere();
        assert_eq!(got, frame);
        pair
    };
    (0..FLOWS).map(pair).collect()
}

#[test]
fn a_flow_comes_back_on_the_pair_it_was_sent_on() {
    for format in RingFormat::ALL {
        let dir = tempfile::tempdir().unwrap();
        let (_daemon, metrics, mut many, mut one) = two_guests(dir.path(), format);
        assert_eq!(many.frontend.get_config(8, 2).unwrap(), [2, 0]);
        assert_eq!(many.frontend.get_queue_num().unwrap(), 5);
        // Nobody said that the second pair is used.
        assert_eq!(pairs_of_flows(&mut many, &mut one), [0; FLOWS as usize]);
        for wrong in [&[4, 0, 0, 0][..], &[4, 0, 3, 0], &[4, 0, 2]] {
            assert_eq!(many.control(wrong), 1);
        }
        assert_eq!(many.control(&[4, 0, 2, 0]), 0);
        // Unknown flows spread, and stay where they are.
        let first = pairs_of_flows(&mut many, &mut one);
        assert!(first.contains(&0) && first.contains(&1), "{first:?}");
        assert_eq!(pairs_of_flows(&mut many, &mut one), first);
        // Then they follow the guest, once and again.
        for shift in [0, 1] {
            let wanted: Vec<usize> = (0..FLOWS).map(|f| usize::from(f / 3 + shift) % 2).collect();
            for flow in 0..FLOWS {
                let frame = datagram(0, 1, flow, 0);
                send(&mut many, wanted[usize::from(flow)], &frame);
                one.expect(&frame);
            }
            assert_eq!(pairs_of_flows(&mut many, &mut one), wanted);
        }
        // One pair again.
        assert_eq!(many.control(&[4, 0, 1, 0]), 0);
        assert_eq!(pairs_of_flows(&mut many, &mut one), [0; FLOWS as usize]);
        assert_eq!(metric(&metrics, "net_rx_dropped_total"), 0);
        assert_eq!(metric(&metrics, "net_tx_failed_total"), 0);
    }
}

#[test]
fn a_ring_that_is_stopped_gets_nothing_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (_daemon, _metrics, mut many, mut one) = two_guests(dir.path(), RingFormat::Packed);
    assert_eq!(many.control(&[4, 0, 2, 0]), 0);
    let before = pairs_of_flows(&mut many, &mut one);
    for (stopped, other) in [(1, 0), (0, 1)] {
        let ring = u16::try_from(2 * stopped).unwrap();
        many.frontend.set_vring_enable(ring, false).unwrap();
        many.frontend.get_features().unwrap();
        assert_eq!(pairs_of_flows(&mut many, &mut one), [other; FLOWS as usize]);
        many.frontend.set_vring_enable(ring, true).unwrap();
        many.frontend.get_features().unwrap();
        std::thread::sleep(SETTLE);
        assert_eq!(pairs_of_flows(&mut many, &mut one), before);
    }
}

/// A frame for everybody comes once, on one pair, and not back to its sender's other pair.
#[test]
fn a_frame_for_everybody_comes_once() {
    let dir = tempfile::tempdir().unwrap();
    let (_daemon, metrics) = switch_with(dir.path(), &["", ""], &ON_TWO_PAIRS);
    let features = EVERYTHING;
    let guest = |n| Guest::with_pairs(dir.path(), n, RingFormat::Split, features, 48, 2);
    let (mut a, mut b) = (guest(0), guest(1));
    for guest in [&mut a, &mut b] {
        assert_eq!(guest.control(&[4, 0, 2, 0]), 0);
    }
    for n in 0..20 {
        let hello = frame(ALL, [2, 9, 9, 9, 9, n], 60);
        send(&mut a, usize::from(n % 2), &hello);
        assert_eq!(b.receive_anywhere().1, hello);
    }
    for pair in [0, 1] {
        assert!(a.receive_on(pair, QUIET).is_none());
        assert!(b.receive_on(pair, QUIET).is_none());
    }
    assert_eq!(metric(&metrics, "net_rx_frames_total"), 20);
}

/// Both pairs of a guest send at once to both pairs of another one.
#[test]
fn each_flow_keeps_its_order_while_both_pairs_work() {
    const NUMBERS: u8 = 100;
    for format in RingFormat::ALL {
        let dir = tempfile::tempdir().unwrap();
        let (_daemon, _metrics, mut many, _) = two_guests(dir.path(), format);
        let mut other = Guest::with_pairs(dir.path(), 1, format, EVERYTHING, 100, 2);
        assert_eq!(many.control(&[4, 0, 2, 0]), 0);
        assert_eq!(other.control(&[4, 0, 2, 0]), 0);
        send(&mut many, 0, &frame(ALL, mac(0), 60));
        other.receive_anywhere();
        let mut next = [0; FLOWS as usize];
        let mut seen = [false; 2];
        for number in 0..NUMBERS {
            // Flow `f` on pair `f % 2`, both rings filled before either is kicked.
            for flow in 0..FLOWS {
                let at = other.ram.alloc(128, 64).unwrap();
                let bytes = [&PLAIN[..], &datagram(1, 0, flow, number)].concat();
                other.ram.write(at, &bytes);
                let buffer = Buffer::readable(at, bytes.len() as u32);
                assert!(other.queues[2 * usize::from(flow % 2) + 1].add(&[buffer], at));
            }
            for queue in [1, 3] {
                other.queues[queue].kick();
            }
            for _ in 0..FLOWS {
                let (pair, got) = many.receive_anywhere();
                let (flow, number) = flow_of(&got);
                assert_eq!(number, next[usize::from(flow)], "flow {flow}");
                next[usize::from(flow)] += 1;
                seen[pair] = true;
            }
            for flow in 0..FLOWS {
                other.queues[2 * usize::from(flow % 2) + 1].wait(TIMEOUT).unwrap();
            }
        }
        assert_eq!((next, seen), ([NUMBERS; FLOWS as usize], [true; 2]));
    }
}
