//! Ports with several queue pairs: which of them a frame comes on.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::SocketAddrV4;
use std::os::fd::AsFd as _;

use super::*;

const ON_TWO_PAIRS: [&str; 2] = ["--queue-pairs", "2"];
/// Flows tried at once.
const FLOWS: u16 = 24;
/// Headers stay as long as they are for most drivers.
const SHORT: u64 = !(1 << v::VIRTIO_NET_F_HASH_REPORT);
/// A driver of before.
const ONE_PAIR: u64 = SHORT & NO_MQ & !(1 << v::VIRTIO_NET_F_RSS);

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
    guest.send_on(pair, &[&vec![0; guest.header_size()], frame].concat());
}

/// A switch with two ports of two pairs; guest 0 has both pairs (but uses one until it says so), guest 1
/// knows of one alone. Each knows where the other is.
fn two_guests(dir: &Path, format: RingFormat) -> (Daemon, PathBuf, Guest, Guest) {
    let (daemon, metrics) = switch_with(dir, &["", ""], &ON_TWO_PAIRS);
    let mut many = Guest::with_pairs(dir, 0, format, SHORT, 48, 2);
    let mut one = Guest::new(dir, 1, format, ONE_PAIR, 32);
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
    let guest = |n| Guest::with_pairs(dir.path(), n, RingFormat::Split, SHORT, 48, 2);
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
    const NUMBERS: u8 = 50;
    for format in RingFormat::ALL {
        let dir = tempfile::tempdir().unwrap();
        let (_daemon, _metrics, mut many, _) = two_guests(dir.path(), format);
        let mut other = Guest::with_pairs(dir.path(), 1, format, SHORT, 100, 2);
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

/// The key and three IPv4 values of the published verification suite of receive-side scaling: destination,
/// source, the hash of the addresses, and that with ports.
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];
const SUITE: [(&str, &str, u32, u32); 5] = [
    ("161.142.100.80:1766", "66.9.149.187:2794", 0x323e_8fc2, 0x51cc_c178),
    ("65.69.140.83:4739", "199.92.111.2:14230", 0xd718_262a, 0xc626_b0ea),
    ("12.22.207.184:38024", "24.19.198.95:12898", 0xd2d0_a5de, 0x5c2b_394a),
    ("209.142.163.6:2217", "38.27.205.30:48228", 0x8298_9176, 0xafc7_327f),
    ("202.188.127.2:1303", "153.39.163.191:44251", 0x5d18_09c5, 0x10e8_28a2),
];
/// IPv4, TCPv4 and UDPv4, as hash types and in `hash_report`.
const TYPES: u32 = 7;
const BY_ADDRESSES: u16 = 1;
const BY_TCP: u16 = 2;
const BY_UDP: u16 = 3;

/// A packet of the suite from guest 1 to guest 0.
fn suite_frame(to: &str, from: &str, protocol: u8) -> Vec<u8> {
    let (to, from): (SocketAddrV4, SocketAddrV4) = (to.parse().unwrap(), from.parse().unwrap());
    let mut frame =
        [&mac(0)[..], &mac(1), &[8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, protocol]].concat();
    frame.extend([0, 0]);
    frame.extend([from.ip().octets(), to.ip().octets()].concat());
    frame.extend([from.port().to_be_bytes(), to.port().to_be_bytes()].concat());
    frame.resize(60, 0);
    frame
}

fn rss(types: u32, table: &[u16], unclassified: u16, pairs: u16, key: &[u8]) -> Vec<u8> {
    let mut bytes = vec![4, 1];
    bytes.extend(types.to_le_bytes());
    let mask = (table.len() - 1) as u16;
    let words = [&[mask, unclassified], table, &[pairs]].concat();
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    bytes.push(key.len() as u8);
    bytes.extend(key);
    bytes
}

fn hash_config(types: u32, key: &[u8]) -> Vec<u8> {
    let mut bytes = vec![4, 2];
    bytes.extend(types.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.push(key.len() as u8);
    bytes.extend(key);
    bytes
}

/// Sends each frame of the suite, and one without hash, to guest 0; checks where it comes by `pair_of` its
/// hash.
fn expect_steering(many: &mut Guest, one: &mut Guest, pair_of: impl Fn(Option<u32>) -> usize) {
    for (to, from, without, with) in SUITE {
        for (protocol, hash) in [(6, with), (17, with), (1, without)] {
            let frame = suite_frame(to, from, protocol);
            one.send(PLAIN, &frame);
            assert_eq!(many.receive_anywhere(), (pair_of(Some(hash)), frame));
        }
    }
    let arp = frame(mac(0), mac(1), 60);
    one.send(PLAIN, &arp);
    assert_eq!(many.receive_anywhere(), (pair_of(None), arp));
}

#[test]
fn frames_go_where_the_drivers_table_says() {
    let dir = tempfile::tempdir().unwrap();
    let (_daemon, metrics, mut many, mut one) = two_guests(dir.path(), RingFormat::Split);
    // The longest key, the longest table, six types.
    assert_eq!(many.frontend.get_config(17, 7).unwrap(), [40, 128, 0, 0x3f, 0, 0, 0]);
    let table: Vec<u16> = (0..128).map(|n| u16::from(n % 3 == 0)).collect();
    let by_table = |hash: Option<u32>| hash.map_or(1, |h| usize::from(table[h as usize % 128]));
    let right = rss(TYPES, &table, 1, 2, &KEY);
    assert_eq!(many.control(&right), 0);
    expect_steering(&mut many, &mut one, by_table);
    // What is refused changes nothing.
    let mut long_table = table.clone();
    long_table.extend([0; 128]);
    for wrong in [
        rss(TYPES | 0x40, &[0, 0], 0, 2, &KEY),
        rss(TYPES, &[0, 0, 0], 0, 2, &KEY),
        rss(TYPES, &long_table, 0, 2, &KEY),
        rss(TYPES, &[0, 2], 0, 2, &KEY),
        rss(TYPES, &[0, 0], 2, 2, &KEY),
        rss(TYPES, &[0, 0], 0, 0, &KEY),
        rss(TYPES, &[0, 0], 0, 3, &KEY),
        rss(TYPES, &[0, 0], 0, 2, &[7; 41]),
        rss(TYPES, &[0, 0], 0, 2, &[]),
        right[..right.len() - 1].to_vec(),
        [&right[..], &[0, 0]].concat(),
        vec![4, 1],
    ] {
        assert_eq!(many.control(&wrong), 1, "{wrong:?}");
    }
    expect_steering(&mut many, &mut one, by_table);
    // Its table counts, whatever the guest sent last.
    let (to, from, _, with) = SUITE[0];
    let mut back = suite_frame(from, to, 6);
    back[..6].copy_from_slice(&mac(1));
    back[6..12].copy_from_slice(&mac(0));
    send(&mut many, 1 - by_table(Some(with)), &back);
    one.expect(&back);
    expect_steering(&mut many, &mut one, by_table);
    // A table may change, or be given up.
    assert_eq!(many.control(&rss(TYPES, &[1, 0], 0, 2, &KEY)), 0);
    expect_steering(&mut many, &mut one, |h| usize::from(h.is_some_and(|h| h % 2 == 0)));
    assert_eq!(many.control(&rss(0, &[0], 1, 2, &[])), 0);
    expect_steering(&mut many, &mut one, |_| 1);
    assert_eq!(metric(&metrics, "net_rx_dropped_total"), 0);
    assert_eq!(many.control(&[4, 0, 1, 0]), 0);
    expect_steering(&mut many, &mut one, |_| 0);
}

/// A driver that stops the ring which its own table names gets nothing there. Virtio 1.3, 5.1.6.5.6.
#[test]
fn a_table_that_names_a_stopped_ring_is_the_guests_loss() {
    let dir = tempfile::tempdir().unwrap();
    let (_daemon, metrics, mut many, mut one) = two_guests(dir.path(), RingFormat::Packed);
    assert_eq!(many.control(&rss(TYPES, &[1], 1, 2, &KEY)), 0);
    expect_steering(&mut many, &mut one, |_| 1);
    many.frontend.set_vring_enable(2, false).unwrap();
    many.frontend.get_features().unwrap();
    one.send(PLAIN, &frame(mac(0), mac(1), 60));
    assert!(many.receive_on(0, QUIET).is_none());
    assert_eq!(metric(&metrics, "net_tx_failed_total"), 1);
    many.frontend.set_vring_enable(2, true).unwrap();
    many.frontend.get_features().unwrap();
    std::thread::sleep(SETTLE);
    expect_steering(&mut many, &mut one, |_| 1);
}

/// The hash in a received frame's header: its value and what it was made of; the frame.
fn split_hash(received: &[u8]) -> ((u32, u16), &[u8]) {
    let value = u32::from_le_bytes(received[12..16].try_into().unwrap());
    let kind = u16::from_le_bytes(received[16..18].try_into().unwrap());
    assert_eq!(received[18..20], [0; 2]);
    ((value, kind), &received[20..])
}

/// Sends the suite to a guest with hashes in its headers, and checks those.
fn expect_hashes(hashing: &mut Guest, one: &mut Guest, types: u32) {
    for (to, from, without, with) in SUITE {
        for (protocol, ports_bit, by_ports) in [(6, 2, BY_TCP), (17, 4, BY_UDP), (1, 0, 0)] {
            let frame = suite_frame(to, from, protocol);
            one.send(PLAIN, &frame);
            let hash = if types & ports_bit != 0 {
                (with, by_ports)
            } else if types & 1 != 0 {
                (without, BY_ADDRESSES)
            } else {
                (0, 0)
            };
            assert_eq!(split_hash(&hashing.receive()), (hash, &frame[..]), "{to} {protocol}");
        }
    }
    let arp = frame(mac(0), mac(1), 60);
    one.send(PLAIN, &arp);
    assert_eq!(split_hash(&hashing.receive()), ((0, 0), &arp[..]));
}

#[test]
fn headers_tell_the_hash() {
    for format in RingFormat::ALL {
        let dir = tempfile::tempdir().unwrap();
        let (_daemon, metrics) = switch_with(dir.path(), &["", ""], &ON_TWO_PAIRS);
        let tso = 1 << v::VIRTIO_NET_F_GUEST_TSO4;
        let mut hashing = Guest::with_pairs(dir.path(), 0, format, !tso, 48, 2);
        let mut one = Guest::new(dir.path(), 1, format, ONE_PAIR, 32);
        assert_eq!(hashing.header_size(), 20);
        let hello = frame(ALL, mac(0), 60);
        // What the guest writes behind its own header means nothing.
        hashing.send_on(0, &[&PLAIN[..], &[0xff; 8], &hello].concat());
        one.expect(&hello);
        expect_hashes(&mut hashing, &mut one, 0);
        for types in [TYPES, 1, 2, 4, 0] {
            assert_eq!(hashing.control(&hash_config(types, &KEY)), 0);
            expect_hashes(&mut hashing, &mut one, types);
        }
        assert_eq!(hashing.control(&rss(TYPES, &[0], 0, 1, &KEY)), 0);
        expect_hashes(&mut hashing, &mut one, TYPES);
        for wrong in [
            hash_config(0x40, &KEY),
            hash_config(1, &[]),
            hash_config(1, &[1; 41]),
            hash_config(1, &KEY)[..53].to_vec(),
            [&hash_config(1, &KEY)[..], &[0, 0]].concat(),
            vec![4, 2],
        ] {
            assert_eq!(hashing.control(&wrong), 1, "{wrong:?}");
        }
        // What is hashed stays when steering becomes automatic.
        assert_eq!(hashing.control(&[4, 0, 1, 0]), 0);
        expect_hashes(&mut hashing, &mut one, TYPES);
        assert_eq!(metric(&metrics, "net_tx_failed_total"), 0);
    }
}

/// A longer header moves everything behind it: long frames, pieces of super-frames, chains that are too short.
#[test]
fn a_longer_header_is_counted_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let (_daemon, metrics) = switch_with(dir.path(), &["", ""], &ON_TWO_PAIRS);
    let tso = 1 << v::VIRTIO_NET_F_GUEST_TSO4;
    let mut hashing = Guest::with_pairs(dir.path(), 0, RingFormat::Split, !tso, 0, 2);
    let mut one = Guest::new(dir.path(), 1, RingFormat::Split, ONE_PAIR, 32);
    send(&mut hashing, 0, &frame(ALL, mac(0), 60));
    one.receive();
    // Header and Ethernet header do not fit; then buffers that do.
    let small = hashing.ram.alloc(64, 64).unwrap();
    assert!(hashing.queues[0].add(&[Buffer::writable(small, 33)], 0));
    for _ in 0..32 {
        let at = hashing.ram.alloc(u64::from(BUFFER), 64).unwrap();
        assert!(hashing.queues[0].add(&[Buffer::writable(at, BUFFER)], at));
    }
    assert_eq!(hashing.control(&hash_config(TYPES, &KEY)), 0);
    let (to, from, _, with) = SUITE[0];
    let mut long = suite_frame(to, from, 6);
    long[17] = 0;
    long.resize(34, 0);
    long[14..34].copy_from_slice(&suite_frame(to, from, 6)[14..34]);
    long.extend(&suite_frame(to, from, 6)[34..38]);
    long.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    long.extend((0..1000).map(|i| (i % 251) as u8));
    one.send(PLAIN, &long);
    let used = hashing.queues[0].wait(TIMEOUT).unwrap();
    assert_eq!((used.cookie, used.len), (0, 0));
    let got = hashing.receive();
    assert_eq!(u16::from_le_bytes([got[10], got[11]]), 5);
    assert_eq!(split_hash(&got), ((with, BY_TCP), &long[..]));
    // Cut up into frames of 400 bytes of payload, of which each tells the hash.
    one.send([1, 1, 54, 0, 0x90, 1, 34, 0, 16, 0, 0, 0], &long);
    for part in long[54..].chunks(400) {
        let got = hashing.receive();
        let (hash, frame) = split_hash(&got);
        assert_eq!((hash, &frame[54..]), ((with, BY_TCP), part));
    }
    // Chains that would be frames with the usual header.
    for len in [1, 12, 19, 20, 33] {
        hashing.send_on(0, &vec![0; len]);
    }
    assert_eq!(metric(&metrics, "net_tx_malformed_total"), 5);
    let last = frame(mac(1), mac(0), 14);
    send(&mut hashing, 1, &last);
    one.expect(&last);
}

/// The driver's table and key go where the guest goes, and with the guest when it leaves.
#[test]
fn steering_moves_to_another_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let (_daemon, _metrics, mut many, _one) = two_guests(dir.path(), RingFormat::Split);
    assert_eq!(many.control(&rss(TYPES, &[1, 0], 0, 2, &KEY)), 0);
    let bases: Vec<u32> = (0..5).map(|i| many.frontend.get_vring_base(i).unwrap()).collect();
    let (read, write) = rustix::pipe::pipe().unwrap();
    many.frontend.set_device_state_fd(true, write.as_fd()).unwrap();
    drop(write);
    let mut state = Vec::new();
    File::from(read).read_to_end(&mut state).unwrap();
    assert!(many.frontend.check_device_state().unwrap());

    let there = tempfile::tempdir().unwrap();
    let (_destination, _metrics) = switch_with(there.path(), &["", ""], &ON_TWO_PAIRS);
    let mut frontend = FrontEnd::connect(&socket(there.path(), 0)).unwrap();
    frontend.negotiate(many.queues[0].features(), u64::MAX).unwrap();
    let (read, write) = rustix::pipe::pipe().unwrap();
    frontend.set_device_state_fd(false, read.as_fd()).unwrap();
    File::from(write).write_all(&state).unwrap();
    assert!(frontend.check_device_state().unwrap());
    frontend.set_mem_table(&many.ram).unwrap();
    for (index, base) in (0u16..).zip(bases) {
        frontend.start_queue(index, &many.queues[usize::from(index)], base).unwrap();
    }
    frontend.get_features().unwrap();
    many.frontend = frontend;
    let mut one = Guest::new(there.path(), 1, RingFormat::Split, ONE_PAIR, 32);
    send(&mut many, 0, &frame(ALL, mac(0), 60));
    one.receive();
    let by_table = |h: Option<u32>| usize::from(h.is_some_and(|h| h % 2 == 0));
    expect_steering(&mut many, &mut one, by_table);
    drop(many);
    let mut next = Guest::with_pairs(there.path(), 0, RingFormat::Split, SHORT, 48, 2);
    send(&mut next, 0, &frame(ALL, mac(0), 60));
    one.receive();
    expect_steering(&mut next, &mut one, |_| 0);
}
