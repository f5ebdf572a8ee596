//! User and group ids of a user namespace.

use std::fmt;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::str::FromStr;

use rustix::process::{Pid, getegid, geteuid, getpid};
use rustix::thread::UnshareFlags;

use super::super::StageError;
use super::{supervisor, unshare_flags, write_own_maps};

/// `count` ids from `inside` on stand for those from `outside` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdMap {
    /// First id in the namespace.
    pub inside: u32,
    /// First id outside of it.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

/// A text that is not a map of ids.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a map of ids: write :INSIDE:OUTSIDE:COUNT:, each a number, and COUNT at least 1")]
pub struct IdMapError;

impl IdMap {
    /// One id that is the same on both sides.
    pub const fn same(id: u32) -> Self {
        Self { inside: id, outside: id, count: 1 }
    }

    /// Whether this id of the namespace stands for anybody.
    fn has_inside(&self, id: u32) -> bool {
        id.checked_sub(self.inside).is_some_and(|offset| offset < self.count)
    }

    /// Whether a process of this id may write the map itself.
    fn is_only(&self, id: u32) -> bool {
        self.outside == id && self.count == 1
    }
}

/// As `/proc/PID/uid_map` and `newuidmap` want it.
impl fmt::Display for IdMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.inside, self.outside, self.count)
    }
}

/// `:INSIDE:OUTSIDE:COUNT:`, where any one character may stand for the colon.
impl FromStr for IdMap {
    type Err = IdMapError;

    fn from_str(text: &str) -> Result<Self, IdMapError> {
        let separator = text.chars().next().filter(|first| !first.is_ascii_digit());
        let separator = separator.ok_or(IdMapError)?;
        let inner = text.strip_prefix(separator).and_then(|rest| rest.strip_suffix(separator));
        let numbers = inner.ok_or(IdMapError)?.split(separator).map(str::parse::<u32>);
        let numbers: Vec<u32> = numbers.collect::<Result<_, _>>().map_err(|_number| IdMapError)?;
        match numbers[..] {
            [inside, outside, count]
                if count > 0
                    && inside.checked_add(count).is_some()
                    && outside.checked_add(count).is_some() =>
            {
                Ok(Self { inside, outside, count })
            }
            _ => Err(IdMapError),
        }
    }
}

/// The ids of a user namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMaps {
    /// User ids.
    pub users: Vec<IdMap>,
    /// Group ids.
    pub groups: Vec<IdMap>,
}

impl IdMaps {
    /// This user and its group appear as root, and nobody else is there. Needs no privilege.
    #[cfg(test)]
    pub fn self_as_root() -> Self {
        let one = |outside| vec![IdMap { inside: 0, outside, count: 1 }];
        Self { users: one(geteuid().as_raw()), groups: one(getegid().as_raw()) }
    }

    /// The single maps, when a process without privileges may write them itself.
    fn own(&self) -> Option<(IdMap, IdMap)> {
        match (&self.users[..], &self.groups[..]) {
            ([user], [group])
                if user.is_only(geteuid().as_raw()) && group.is_only(getegid().as_raw()) =>
            {
                Some((*user, *group))
            }
            _ => None,
        }
    }
}

/// Enters new namespaces, a user namespace with these ids among them, and becomes its root if it
/// has one.
pub(super) fn enter_user_namespace(maps: &IdMaps, flags: UnshareFlags) -> Result<(), StageError> {
    let flags = flags | UnshareFlags::NEWUSER;
    let unshare = || unshare_flags(flags).map_err(StageError::system("make a user namespace"));
    if let Some((user, group)) = maps.own() {
        unshare()?;
        write_own_maps(user, group)?;
    } else {
        write_maps_from_outside(maps, unshare)?;
    }
    become_root(maps)
}

/// Has a child that stays outside write the maps once `unshare` is done.
fn write_maps_from_outside(
    maps: &IdMaps,
    unshare: impl FnOnce() -> Result<(), StageError>,
) -> Result<(), StageError> {
    let failed = "start the process that maps ids";
    let (mut ours, mut theirs) = UnixStream::pair().map_err(StageError::system(failed))?;
    let target = getpid();
    let child = supervisor::fork_with(|| {
        // Nothing comes when `unshare` failed: then there is nothing to map.
        let mut go = [0];
        if theirs.read_exact(&mut go).is_err() {
            return 1;
        }
        write_maps_of(target, maps)
    })
    .map_err(StageError::system(failed))?;
    drop(theirs);
    let unshared = unshare().and_then(|()| {
        ours.write_all(&[1]).map_err(StageError::system("tell the process that maps ids"))
    });
    drop(ours);
    let status = supervisor::wait_for(child).map_err(StageError::system("wait for the maps"))?;
    unshared?;
    match status {
        0 => Ok(()),
        USER_FAILED => Err(StageError::IdMapProgram { program: "newuidmap" }),
        _ => Err(StageError::IdMapProgram { program: "newgidmap" }),
    }
}

/// Exit codes of the child that maps ids.
const USER_FAILED: u8 = 2;
const GROUP_FAILED: u8 = 3;

/// Runs in the child. Root writes the maps itself; others ask the programs of the `uidmap` package,
/// which look into /etc/subuid and /etc/subgid.
fn write_maps_of(target: Pid, maps: &IdMaps) -> u8 {
    let pid = target.as_raw_nonzero().to_string();
    let write = |file: &str, program: &str, maps: &[IdMap]| {
        let lines: Vec<String> = maps.iter().map(IdMap::to_string).collect();
        if fs::write(format!("/proc/{pid}/{file}"), lines.join("\n")).is_ok() {
            return true;
        }
        let words = lines.iter().flat_map(|line| line.split(' '));
        let status = Command::new(program).arg(&pid).args(words).status();
        status.is_ok_and(|status| status.success())
    };
    if !write("uid_map", "newuidmap", &maps.users) {
        return USER_FAILED;
    }
    if !write("gid_map", "newgidmap", &maps.groups) {
        return GROUP_FAILED;
    }
    0
}

/// Takes the ids 0 of the namespace where they stand for somebody.
fn become_root(maps: &IdMaps) -> Result<(), StageError> {
    use rustix::process::{Gid, Uid};
    use rustix::thread::{set_thread_res_gid, set_thread_res_uid};

    // There is one thread, so the thread's ids are the process's.
    if maps.groups.iter().any(|map| map.has_inside(0)) {
        set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)
            .map_err(StageError::system("become root's group in the user namespace"))?;
    }
    if maps.users.iter().any(|map| map.has_inside(0)) {
        set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)
            .map_err(StageError::system("become root in the user namespace"))?;
    }
    Ok(())
}
