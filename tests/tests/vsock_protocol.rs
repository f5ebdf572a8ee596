//! vsock-proxy on the packet level: what a guest and a host may do to it, and what must come of it.
//! Each failure that daemons of this kind are known for has its test; decision 0041 says which.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use testkit::driver::vsock::{
    GuestStream, HEADER, HOST, Packet, SEQPACKET, TX_ROOM, VsockOptions, op,
};
use testkit::driver::{IN_ORDER, RingFormat};
use testkit::vsock_host::{PATIENCE, VsockHost, read_ok};

const PROMPT: Duration = Duration::from_millis(50);

/// Bytes that are different at every offset, so that a shift is seen.
fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state.to_le_bytes()[1]
        })
        .collect()
}

fn is_eof(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0))
}

#[test]
fn what_nobody_answers_is_refused_at_once() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let request = |port, op| Packet::new(3, 1025, port, op);
    let mut unknown_type = request(1, op::REQUEST);
    unknown_type.socket_type = 3;
    let mut unknown_cid = request(1, op::REQUEST);
    unknown_cid.dst_cid = 77;
    let mut high_cid = request(1, op::REQUEST);
    high_cid.dst_cid = 1 << 32 | HOST;
    let mut foreign = request(1, op::REQUEST);
    foreign.src_cid = 9;
    let strays = [
        ("a port without a service", request(1, op::REQUEST)),
        ("a stray RW", request(1, op::RW).with(b"data")),
        ("a stray SHUTDOWN", request(1, op::SHUTDOWN).flags(3)),
        ("a stray RESPONSE", request(1, op::RESPONSE)),
        ("a stray CREDIT_REQUEST", request(1, op::CREDIT_REQUEST)),
        ("an unknown operation", request(1, 99)),
        ("an unknown type", unknown_type),
        ("an unknown CID", unknown_cid),
        ("a CID with an upper half", high_cid),
    ];
    let mut wrong = Vec::new();
    for (what, packet) in strays {
        let start = Instant::now();
        guest.send(&packet).unwrap();
        let Ok(answer) = guest.receive(Duration::from_secs(2)) else {
            wrong.push(format!("{what}: no answer"));
            continue;
        };
        let swapped = (answer.src_cid, answer.dst_cid) == (packet.dst_cid, 3)
            && (answer.src_port, answer.dst_port) == (1, 1025)
            && answer.socket_type == packet.socket_type;
        if answer.op != op::RST || !swapped || start.elapsed() > PROMPT {
            wrong.push(format!("{what}: after {:?} {answer:?}", start.elapsed()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // RST is answered by nothing, and so is what is not addressed from here.
    guest.send(&request(1, op::RST)).unwrap();
    assert!(guest.is_silent_for(Duration::from_millis(100)));
}

#[test]
fn malformed_packets_are_contained() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    guest.send_raw(&[1; 10]).unwrap();
    let mut short = Packet::new(3, 5, 6, op::RW);
    short.len = 1000;
    guest.send(&short).unwrap();
    assert_eq!(guest.expect(op::RST).unwrap().src_port, 6);
    short.len = u32::MAX;
    guest.send(&short).unwrap();
    guest.expect(op::RST).unwrap();
    host.serve(&mut guest, 1025, 80).unwrap();
}

#[test]
fn half_close_by_the_guest() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let (mut stream, mut theirs) = host.serve(&mut guest, 1025, 80).unwrap();
    theirs.send_all(&mut guest, b"question").unwrap();
    guest.send(&theirs.packet(op::SHUTDOWN).flags(2)).unwrap();
    let mut question = Vec::new();
    stream.read_to_end(&mut question).unwrap();
    assert_eq!(question, b"question");
    stream.write_all(b"answer").unwrap();
    assert_eq!(theirs.receive_all(&mut guest, 6).unwrap(), b"answer");
    drop(stream);
    let shutdown = guest.expect(op::SHUTDOWN).unwrap();
    assert_eq!(shutdown.flags, 3);
    guest.send(&theirs.packet(op::RST)).unwrap();
    assert!(guest.is_silent_for(Duration::from_millis(100)));
}

#[test]
fn half_close_by_the_host() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let (mut stream, mut theirs) = host.connect(&mut guest, 80).unwrap();
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(theirs.receive_all(&mut guest, 8).unwrap(), b"question");
    assert_eq!(guest.expect(op::SHUTDOWN).unwrap().flags, 2);
    theirs.send_all(&mut guest, b"answer").unwrap();
    guest.send(&theirs.packet(op::SHUTDOWN).flags(3)).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"answer");
    guest.expect(op::RST).unwrap();
}

#[test]
fn a_guest_that_reads_no_more_makes_writing_fail() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let (mut stream, mut theirs) = host.serve(&mut guest, 1025, 80).unwrap();
    guest.send(&theirs.packet(op::SHUTDOWN).flags(1)).unwrap();
    guest.flush(PATIENCE).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while stream.write_all(b"x").is_ok() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    // The other direction goes on; bits add up.
    theirs.send_all(&mut guest, b"still here").unwrap();
    let mut got = [0; 10];
    stream.read_exact(&mut got).unwrap();
    guest.send(&theirs.packet(op::SHUTDOWN).flags(2)).unwrap();
    guest.expect(op::RST).unwrap();
    assert!(is_eof(&mut stream));
}

#[test]
fn connect_lines_in_pieces_with_data_and_in_any_case() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let mut wrong = Vec::new();
    for (pieces, data) in [
        (vec!["CONNECT 52\nhello"], "hello"),
        (vec!["CON", "NECT 5", "2", "\n", "hello"], "hello"),
        (vec!["connect 52\nhel", "lo"], "hello"),
        (vec!["Connect 52\r\nhello"], "hello"),
    ] {
        let mut stream = host.dial().unwrap();
        for piece in &pieces {
            // A proxy that gave up on the line has closed it.
            let _ = stream.write_all(piece.as_bytes());
            std::thread::sleep(Duration::from_millis(5));
        }
        let request = match guest.expect(op::REQUEST) {
            Ok(request) if request.dst_port == 52 && request.src_cid == HOST => request,
            other => {
                wrong.push(format!("{pieces:?}: {other:?}"));
                continue;
            }
        };
        let mut theirs = GuestStream::accept(&mut guest, &request).unwrap();
        let said = read_ok(&mut stream);
        let got = theirs.receive_all(&mut guest, data.len());
        if said.is_err() || !got.as_ref().is_ok_and(|got| got == data.as_bytes()) {
            wrong.push(format!("{pieces:?}: {said:?} {got:?}"));
        }
        guest.send(&theirs.packet(op::RST)).unwrap();
        if !is_eof(&mut stream) {
            wrong.push(format!("{pieces:?}: open after an RST"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn ok_names_the_hosts_port() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let mut stream = host.ask(80).unwrap();
    let request = guest.expect(op::REQUEST).unwrap();
    GuestStream::accept(&mut guest, &request).unwrap();
    assert_eq!(read_ok(&mut stream).unwrap(), request.src_port);
}

#[test]
fn bad_connect_lines_close_the_client_and_nothing_else() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let (mut stream, mut theirs) = host.connect(&mut guest, 80).unwrap();
    let long = format!("CONNECT {}\n", "1".repeat(100));
    for line in ["CONNECT\n", "CONNECT x\n", "CONNECT 4294967296\n", "HELLO 1\n", "\n", &long] {
        let mut bad = host.dial().unwrap();
        let start = Instant::now();
        bad.write_all(line.as_bytes()).unwrap();
        assert!(!matches!(bad.read(&mut [0; 8]), Ok(n) if n > 0), "{line:?}");
        assert!(start.elapsed() < PROMPT, "{line:?}: {:?}", start.elapsed());
    }
    stream.write_all(b"fine").unwrap();
    assert_eq!(theirs.receive_all(&mut guest, 4).unwrap(), b"fine");
}

#[test]
fn a_refusal_closes_the_client_at_once() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let mut stream = host.ask(99).unwrap();
    let request = guest.expect(op::REQUEST).unwrap();
    let start = Instant::now();
    let mut reset = Packet::new(3, request.dst_port, request.src_port, op::RST);
    reset.buf_alloc = 0;
    guest.send(&reset).unwrap();
    assert!(is_eof(&mut stream));
    assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
}

#[test]
fn clients_that_vanish_cost_nothing() {
    let mut host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let fds = host.daemon.open_fds().unwrap();
    for i in 0..60 {
        let mut stream = host.dial().unwrap();
        match i % 4 {
            0 => {}
            1 => stream.write_all(b"CONN").unwrap(),
            2 => {
                stream.write_all(b"CONN").unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            }
            _ => stream.write_all(b"CONNECT 5\n").unwrap(),
        }
    }
    // Those that asked before they left: the guest hears of it, unless they left before it could.
    while let Ok(packet) = guest.receive(Duration::from_millis(300)) {
        assert!([op::REQUEST, op::RST].contains(&packet.op), "{packet:?}");
    }
    let before = host.daemon.cpu_time().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let spent = host.daemon.cpu_time().unwrap() - before;
    assert!(spent <= Duration::from_millis(10), "{spent:?} of CPU for nobody");
    assert!(host.daemon.is_running());
    assert_eq!(host.daemon.open_fds().unwrap(), fds);
    host.connect(&mut guest, 80).unwrap();
}

#[test]
fn a_client_that_is_gone_before_ok_harms_nobody() {
    let mut host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let stream = host.ask(6).unwrap();
    let request = guest.expect(op::REQUEST).unwrap();
    drop(stream);
    guest.expect(op::RST).unwrap();
    guest.send(&Packet::new(3, 6, request.src_port, op::RESPONSE)).unwrap();
    guest.expect(op::RST).unwrap();
    assert!(host.daemon.is_running());
    host.connect(&mut guest, 80).unwrap();
}

#[test]
fn a_repeated_response_says_nothing_to_the_client() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let (mut stream, mut theirs) = host.connect(&mut guest, 80).unwrap();
    for _ in 0..3 {
        guest.send(&theirs.packet(op::RESPONSE)).unwrap();
    }
    theirs.send_all(&mut guest, b"data").unwrap();
    let mut got = [0; 4];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"data");
}

#[test]
fn a_repeated_request_ends_the_connection() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let (mut stream, theirs) = host.serve(&mut guest, 1025, 80).unwrap();
    guest.send(&theirs.packet(op::REQUEST)).unwrap();
    guest.expect(op::RST).unwrap();
    assert!(is_eof(&mut stream));
}

#[test]
fn more_than_credit_is_refused_aloud() {
    let host = VsockHost::start(&["--tx-buffer-size=65536"]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let (mut stream, mut theirs) = host.serve(&mut guest, 1025, 80).unwrap();
    assert_eq!(theirs.credit(), 64 << 10);
    // The host reads nothing: its socket fills up, then the window, and then it is too much.
    let mut got_reset = false;
    for _ in 0..100 {
        let packet = theirs.data(&[7; 32 << 10]);
        guest.send(&packet).unwrap();
        guest.flush(PATIENCE).unwrap();
        while let Ok(packet) = guest.receive(Duration::from_millis(2)) {
            got_reset |= packet.op == op::RST;
        }
        if got_reset {
            break;
        }
    }
    assert!(got_reset, "data beyond the window went somewhere");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
}

#[test]
fn closing_with_unsent_data_delivers_it_and_ends() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let (mut stream, mut theirs) = host.serve(&mut guest, 1025, 80).unwrap();
    // Until the host's socket is full and the rest waits in the proxy.
    let mut sent: Vec<u8> = Vec::new();
    while theirs.credit() > 0 && sent.len() < 4 << 20 {
        let chunk = pattern((theirs.credit() as usize).min(TX_ROOM), 1);
        let packet = theirs.data(&chunk);
        guest.send(&packet).unwrap();
        sent.extend(&chunk);
        guest.flush(PATIENCE).unwrap();
        while let Ok(packet) = guest.receive(Duration::from_millis(5)) {
            theirs.see(&packet);
        }
    }
    assert_eq!(theirs.credit(), 0);
    guest.send(&theirs.packet(op::SHUTDOWN).flags(3)).unwrap();
    assert!(guest.is_silent_for(Duration::from_millis(100)), "an RST while data is on the way");
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
    guest.expect(op::RST).unwrap();
}

#[test]
fn a_guest_that_never_resets_leaks_nothing() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let fds = host.daemon.open_fds().unwrap();
    for _ in 0..5 {
        let (stream, _) = host.connect(&mut guest, 80).unwrap();
        drop(stream);
        assert_eq!(guest.expect(op::SHUTDOWN).unwrap().flags, 3);
    }
    let start = Instant::now();
    for _ in 0..5 {
        guest.expect(op::RST).unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert_eq!(host.daemon.open_fds().unwrap(), fds);
}

#[test]
fn clients_that_come_while_the_vm_attaches_are_served() {
    let host = VsockHost::start(&[]).unwrap();
    // Before there is a VM at all, and all through its attaching.
    let early: Vec<UnixStream> = (0..10).map(|_| host.ask(80).unwrap()).collect();
    let path = host.path("host");
    let late = std::thread::spawn(move || {
        let mut streams = Vec::new();
        for _ in 0..20 {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(b"CONNECT 80\n").unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            streams.push(stream);
            std::thread::sleep(Duration::from_micros(300));
        }
        streams
    });
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    for _ in 0..30 {
        let request = guest.expect(op::REQUEST).unwrap();
        GuestStream::accept(&mut guest, &request).unwrap();
    }
    for mut stream in early.into_iter().chain(late.join().unwrap()) {
        read_ok(&mut stream).unwrap();
    }
}

#[test]
fn packets_in_any_number_of_fragments_are_whole() {
    for format in RingFormat::ALL {
        let host = VsockHost::start(&[]).unwrap();
        let options = VsockOptions { format, ..VsockOptions::default() };
        let mut guest = host.guest(options).unwrap();
        let (mut stream, mut theirs) = host.serve(&mut guest, 1025, 80).unwrap();
        let data = pattern(60_000, 7);
        // As guests since Linux 6.17 send it: a header, and a fragment for each page.
        let pages: Vec<usize> = (0..15).map(|i| HEADER + i * 4096).collect();
        for (cuts, indirect) in [
            (pages.clone(), false),
            (pages, true),
            (vec![HEADER], true),
            (vec![], false),
            (vec![10, 20, 44, 45, 50_000], false),
            (vec![100], true),
        ] {
            while (theirs.credit() as usize) < data.len() {
                let packet = guest.expect(op::CREDIT_UPDATE).unwrap();
                theirs.see(&packet);
            }
            let packet = theirs.data(&data);
            guest.send_cut(&packet, &cuts, indirect).unwrap();
            let mut got = vec![0; data.len()];
            stream.read_exact(&mut got).unwrap();
            assert!(got == data, "{format:?} {cuts:?} {indirect}");
        }
    }
}

#[test]
fn bulk_both_ways_in_every_ring() {
    for (format, features) in [
        (RingFormat::Split, u64::MAX & !IN_ORDER),
        (RingFormat::Split, 0),
        (RingFormat::Split, u64::MAX),
        (RingFormat::Packed, u64::MAX & !IN_ORDER),
        (RingFormat::Packed, u64::MAX),
    ] {
        let host = VsockHost::start(&[]).unwrap();
        let features = features | format.features();
        let options = VsockOptions { format, features, ..VsockOptions::default() };
        let mut guest = host.guest(options).unwrap();
        let (stream, mut theirs) = host.serve(&mut guest, 1025, 80).unwrap();
        let up = pattern(5_000_000, 3);
        let expected = up.clone();
        let mut reader = stream.try_clone().unwrap();
        let reading = std::thread::spawn(move || {
            let mut got = vec![0; expected.len()];
            reader.read_exact(&mut got).unwrap();
            assert!(got == expected);
        });
        theirs.send_all(&mut guest, &up).unwrap();
        reading.join().unwrap();
        let down = pattern(5_000_000, 4);
        let expected = down.clone();
        let mut writer = stream.try_clone().unwrap();
        let writing = std::thread::spawn(move || writer.write_all(&down).unwrap());
        let got = theirs.receive_all(&mut guest, expected.len()).unwrap();
        assert!(got == expected, "{format:?} {features:#x}");
        writing.join().unwrap();
    }
}

#[test]
fn the_host_never_sends_beyond_the_guests_credit() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let mut stream = host.ask(80).unwrap();
    let request = guest.expect(op::REQUEST).unwrap();
    let mut response = Packet::new(3, 80, request.src_port, op::RESPONSE);
    response.buf_alloc = 10_000;
    guest.send(&response).unwrap();
    read_ok(&mut stream).unwrap();
    stream.write_all(&[1; 30_000]).unwrap();
    let mut got = 0;
    while got < 10_000 {
        got += guest.expect(op::RW).unwrap().len;
    }
    assert_eq!(got, 10_000);
    assert!(matches!(
        guest.receive(Duration::from_millis(200)),
        Err(_) | Ok(Packet { op: op::CREDIT_REQUEST, .. })
    ));
    assert!(guest.is_silent_for(Duration::from_millis(100)));
    let mut update = Packet::new(3, 80, request.src_port, op::CREDIT_UPDATE);
    (update.buf_alloc, update.fwd_cnt) = (10_000, 5_000);
    guest.send(&update).unwrap();
    got = 0;
    while got < 5_000 {
        got += guest.expect(op::RW).unwrap().len;
    }
    assert_eq!(got, 5_000);
}

#[test]
fn the_guest_is_heard_while_it_takes_nothing() {
    let host = VsockHost::start(&[]).unwrap();
    let options = VsockOptions { rx_buffers: 4, ..VsockOptions::default() };
    let mut guest = host.guest(options).unwrap();
    let (mut up, mut theirs) = host.serve(&mut guest, 1025, 80).unwrap();
    let (mut down, _) = host.connect(&mut guest, 81).unwrap();
    down.write_all(&[0; 100_000]).unwrap();
    // All four receive buffers are used, and the guest gives none back.
    let kept: Vec<u16> = (0..4).map(|_| guest.receive_keeping(PATIENCE).unwrap().1).collect();
    for _ in 0..3000 {
        guest.send(&Packet::new(3, 7, 7, op::RW)).unwrap();
    }
    let packet = theirs.data(b"heard");
    guest.send(&packet).unwrap();
    let mut got = [0; 5];
    up.read_exact(&mut got).unwrap();
    // Given back, they first bring what was answered meanwhile, in bounded number.
    for buffer in kept {
        guest.give_back(buffer).unwrap();
    }
    let mut resets = 0;
    while guest.receive(PATIENCE).unwrap().op == op::RST {
        resets += 1;
    }
    assert!((1..3000).contains(&resets), "{resets}");
}

#[test]
fn back_pressure_costs_nothing_and_loses_nothing() {
    let host = VsockHost::start(&[]).unwrap();
    let options = VsockOptions { rx_buffers: 32, ..VsockOptions::default() };
    let mut guest = host.guest(options).unwrap();
    // Upwards: until the host's socket and the window are full.
    let (mut up, mut theirs) = host.serve(&mut guest, 1025, 80).unwrap();
    let mut sent: Vec<u8> = Vec::new();
    while theirs.credit() > 0 {
        let chunk = pattern((theirs.credit() as usize).min(TX_ROOM), sent.len() as u32);
        let packet = theirs.data(&chunk);
        guest.send(&packet).unwrap();
        sent.extend(&chunk);
        guest.flush(PATIENCE).unwrap();
        while let Ok(packet) = guest.receive(Duration::from_millis(5)) {
            theirs.see(&packet);
        }
    }
    // Downwards: until the guest has no buffer left, then as much as its host's socket takes.
    let (down, mut other) = host.connect(&mut guest, 81).unwrap();
    down.set_nonblocking(true).unwrap();
    let data = pattern(1 << 20, 5);
    let mut queued = 0;
    let mut kept = Vec::new();
    let deadline = Instant::now() + Duration::from_millis(500);
    while Instant::now() < deadline {
        queued += (&down).write(&data[queued..]).unwrap_or(0);
        if let Ok((packet, buffer)) = guest.receive_keeping(Duration::from_millis(1)) {
            assert_eq!(packet.op, op::RW);
            kept.push((packet, buffer));
        }
    }
    assert_eq!(kept.len(), 32);
    let cpu = host.daemon.cpu_time().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let spent = host.daemon.cpu_time().unwrap() - cpu;
    assert!(spent <= Duration::from_millis(10), "{spent:?} of CPU for nothing");

    let mut got: Vec<u8> = Vec::new();
    for (packet, buffer) in kept {
        other.see(&packet);
        got.extend(&packet.payload);
        guest.give_back(buffer).unwrap();
    }
    let rest = other.receive_all(&mut guest, queued - got.len()).unwrap();
    got.extend(rest);
    assert!(got == data[..queued], "{} bytes", got.len());
    let mut got = vec![0; sent.len()];
    up.read_exact(&mut got).unwrap();
    assert!(got == sent);
}

#[test]
fn a_paused_guest_keeps_its_connections() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let (mut stream, mut theirs) = host.connect(&mut guest, 80).unwrap();
    let bases = [0, 1, 2].map(|i| guest.front.get_vring_base(i).unwrap());
    stream.write_all(b"meanwhile").unwrap();
    for i in [0u16, 1, 2] {
        guest.front.start_queue(i, &guest.queues[usize::from(i)], bases[usize::from(i)]).unwrap();
    }
    assert_eq!(theirs.receive_all(&mut guest, 9).unwrap(), b"meanwhile");
}

#[test]
fn a_restored_guest_is_told_and_loses_its_connections() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let (mut stream, _) = host.connect(&mut guest, 80).unwrap();
    guest.give_event().unwrap();
    let bases = [0, 1, 2].map(|i| guest.front.get_vring_base(i).unwrap());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.front.set_device_state_fd(true, std::os::fd::AsFd::as_fd(&theirs)).unwrap();
    drop(theirs);
    let mut state = Vec::new();
    ours.read_to_end(&mut state).unwrap();
    assert!(guest.front.check_device_state().unwrap());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.front.set_device_state_fd(false, std::os::fd::AsFd::as_fd(&theirs)).unwrap();
    drop(theirs);
    ours.write_all(&state).unwrap();
    drop(ours);
    assert!(guest.front.check_device_state().unwrap());
    for i in [0u16, 1, 2] {
        guest.front.start_queue(i, &guest.queues[usize::from(i)], bases[usize::from(i)]).unwrap();
    }
    assert_eq!(guest.event(PATIENCE).unwrap(), 0);
    assert!(is_eof(&mut stream));
    host.connect(&mut guest, 81).unwrap();
}

#[test]
fn a_new_vm_after_the_old_one_begins_anew() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let (mut stream, _) = host.connect(&mut guest, 80).unwrap();
    drop(guest);
    assert!(is_eof(&mut stream));
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    host.connect(&mut guest, 80).unwrap();
}

#[test]
fn seqpacket_keeps_messages_apart() {
    use rustix::net::{
        AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, connect, listen, recv,
        send, socket,
    };
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let new = || socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    let address = |name: &str| SocketAddrUnix::new(host.path(name)).unwrap();

    // Host to guest.
    let client = new();
    connect(&client, &address("host_seqpacket")).unwrap();
    send(&client, b"CONNECT 9\n", SendFlags::empty()).unwrap();
    let request = guest.expect(op::REQUEST).unwrap();
    assert_eq!(request.socket_type, SEQPACKET);
    let mut theirs = GuestStream::accept(&mut guest, &request).unwrap();
    let mut answer = [0; 64];
    let (n, _) = recv(&client, &mut answer, RecvFlags::empty()).unwrap();
    assert_eq!(answer[..n], *format!("OK {}\n", request.src_port).as_bytes());
    for len in [1, 3000, 100_000, 5, 4052, 4053] {
        let message = pattern(len, 5);
        send(&client, &message, SendFlags::empty()).unwrap();
        let mut got: Vec<u8> = Vec::new();
        loop {
            let packet = guest.expect(op::RW).unwrap();
            theirs.see(&packet);
            got.extend(&packet.payload);
            if packet.flags & 1 != 0 {
                break;
            }
        }
        assert!(got == message, "a message of {len} bytes");
        guest.send(&theirs.packet(op::CREDIT_UPDATE)).unwrap();
    }

    // Guest to host: a message in one packet, and in several.
    let listener = new();
    rustix::net::bind(&listener, &address("host_10")).unwrap();
    listen(&listener, 8).unwrap();
    let mut ours = GuestStream::connect_as(&mut guest, SEQPACKET, 1025, HOST, 10).unwrap();
    let service = rustix::net::accept(&listener).unwrap();
    let mut buffer = vec![0; 300_000];
    for pieces in [vec![10], vec![4, 5, 6], vec![60_000, 60_000, 60_000, 1], vec![1]] {
        let mut whole = Vec::new();
        for (i, len) in pieces.iter().enumerate() {
            let piece = pattern(*len, 9);
            let last = i + 1 == pieces.len();
            while (ours.credit() as usize) < piece.len() {
                let packet = guest.expect(op::CREDIT_UPDATE).unwrap();
                ours.see(&packet);
            }
            let packet = ours.data(&piece).flags(u32::from(last) * 3);
            guest.send(&packet).unwrap();
            whole.extend(piece);
        }
        let (n, _) = recv(&service, buffer.as_mut_slice(), RecvFlags::empty()).unwrap();
        assert!(buffer[..n] == whole, "{n} bytes of {pieces:?}");
    }
    // A stream's service is none for messages.
    let _stream_service = host.listen(11).unwrap();
    guest.send(&Packet::new(3, 1026, 11, op::REQUEST).seqpacket()).unwrap();
    loop {
        let packet = guest.receive(PATIENCE).unwrap();
        if packet.src_port == 11 {
            assert_eq!(packet.op, op::RST);
            break;
        }
    }
}

/// An empty message reads like the end of the socket, and must be told from it both ways.
#[test]
fn seqpacket_messages_may_be_empty() {
    use rustix::net::{
        AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, connect, listen, recv,
        send, socket,
    };
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let new = || socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    let address = |name: &str| SocketAddrUnix::new(host.path(name)).unwrap();

    // Host to guest, the client gone at once after its last message.
    let client = new();
    connect(&client, &address("host_seqpacket")).unwrap();
    send(&client, b"CONNECT 9\n", SendFlags::empty()).unwrap();
    let request = guest.expect(op::REQUEST).unwrap();
    let _theirs = GuestStream::accept(&mut guest, &request).unwrap();
    let mut buffer = [0; 64];
    recv(&client, &mut buffer, RecvFlags::empty()).unwrap();
    for message in [&b"one"[..], b"", b"three", b"", b"", b"six"] {
        send(&client, message, SendFlags::empty()).unwrap();
    }
    drop(client);
    for message in [&b"one"[..], b"", b"three", b"", b"", b"six"] {
        let packet = guest.expect(op::RW).unwrap();
        assert_eq!((&packet.payload[..], packet.flags & 1), (message, 1));
    }
    guest.expect(op::SHUTDOWN).unwrap();

    // Guest to host: the flag of a packet is the only sign of an empty message.
    let listener = new();
    rustix::net::bind(&listener, &address("host_10")).unwrap();
    listen(&listener, 8).unwrap();
    let mut ours = GuestStream::connect_as(&mut guest, SEQPACKET, 1025, HOST, 10).unwrap();
    let service = rustix::net::accept(&listener).unwrap();
    for message in [&b"one"[..], b"", b"three"] {
        let packet = ours.data(message).flags(1);
        guest.send(&packet).unwrap();
    }
    for message in [&b"one"[..], b"", b"three"] {
        let (n, _) = recv(&service, &mut buffer, RecvFlags::empty()).unwrap();
        assert_eq!(&buffer[..n], message);
    }
}
