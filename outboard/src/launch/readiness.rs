//! Whether a daemon listens, without connecting: a connection would be a front end to it.

use std::fs;
use std::path::Path;

/// The flag `__SO_ACCEPTCON` of a listening socket in `/proc/net/unix`. proc(5).
const LISTENING: &str = "00010000";

/// Whether every one of `paths` is listened on.
pub(super) fn all_listening(paths: &[&Path]) -> bool {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    paths.iter().all(|path| is_listening(&table, path))
}

fn is_listening(table: &str, path: &Path) -> bool {
    table.lines().any(|line| {
        // Num RefCount Protocol Flags Type St Inode Path
        let mut fields = line.split_ascii_whitespace();
        fields.nth(3) == Some(LISTENING) && fields.nth(3).is_some_and(|it| Path::new(it) == path)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener};

    use super::*;

    #[test]
    fn a_socket_is_ready_once_it_listens() {
        let dir = tempfile::tempdir().unwrap();
        let (stream, datagram) = (dir.path().join("a"), dir.path().join("b"));
        assert!(!all_listening(&[&stream]));
        let _datagram = UnixDatagram::bind(&datagram).unwrap();
        assert!(!all_listening(&[&datagram]), "bound only");
        let listener = UnixListener::bind(&stream).unwrap();
        assert!(all_listening(&[&stream]));
        assert!(!all_listening(&[&stream, &datagram]));
        drop(listener);
        assert!(!all_listening(&[&stream]), "its file is still there");
    }
}
