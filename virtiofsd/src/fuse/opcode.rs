//! FUSE operations by number.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

macro_rules! opcodes {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// An operation that Linux 7.2 can send to a virtio-fs device. `include/uapi/linux/fuse.h`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Opcode {
            $($(#[$doc])* $name = $number,)*
        }

        impl Opcode {
            /// Every operation, by number.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The operation of number `number`, `None` if there is none that we know.
            #[inline]
            #[must_use]
            pub const fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

opcodes! {
    /// Find a name in a directory.
    Lookup = 1,
    /// Drop references to an inode; no reply.
    Forget = 2,
    /// Attributes.
    Getattr = 3,
    /// Change attributes.
    Setattr = 4,
    /// A symbolic link's target.
    Readlink = 5,
    /// Make a symbolic link.
    Symlink = 6,
    /// Make a file of any kind but directory.
    Mknod = 8,
    /// Make a directory.
    Mkdir = 9,
    /// Remove a file.
    Unlink = 10,
    /// Remove a directory.
    Rmdir = 11,
    /// Rename without flags.
    Rename = 12,
    /// Make a hard link.
    Link = 13,
    /// Open a file.
    Open = 14,
    /// Read a file.
    Read = 15,
    /// Write a file.
    Write = 16,
    /// File system statistics.
    Statfs = 17,
    /// Close a file.
    Release = 18,
    /// Write a file to stable storage.
    Fsync = 20,
    /// Set an extended attribute.
    Setxattr = 21,
    /// Get an extended attribute.
    Getxattr = 22,
    /// List extended attributes.
    Listxattr = 23,
    /// Remove an extended attribute.
    Removexattr = 24,
    /// A descriptor of the file was closed.
    Flush = 25,
    /// Start a session.
    Init = 26,
    /// Open a directory.
    Opendir = 27,
    /// Read a directory.
    Readdir = 28,
    /// Close a directory.
    Releasedir = 29,
    /// Write a directory to stable storage.
    Fsyncdir = 30,
    /// Test for a lock.
    Getlk = 31,
    /// Set a lock, at once or not at all.
    Setlk = 32,
    /// Set a lock when it gets free.
    Setlkw = 33,
    /// Check permissions.
    Access = 34,
    /// Create and open a file.
    Create = 35,
    /// Give up on an earlier request.
    Interrupt = 36,
    /// Map a block; only for file systems on block devices.
    Bmap = 37,
    /// End the session.
    Destroy = 38,
    /// A device or file control.
    Ioctl = 39,
    /// Poll a file.
    Poll = 40,
    /// Answer to a notification.
    NotifyReply = 41,
    /// Drop references to many inodes; no reply.
    BatchForget = 42,
    /// Allocate, punch or move space.
    Fallocate = 43,
    /// Read a directory with attributes.
    Readdirplus = 44,
    /// Rename with flags.
    Rename2 = 45,
    /// Find data or a hole.
    Lseek = 46,
    /// Copy between files, result of 32 bits.
    CopyFileRange = 47,
    /// Map a file into the DAX window.
    SetupMapping = 48,
    /// Unmap from the DAX window.
    RemoveMapping = 49,
    /// Write a file system to stable storage.
    Syncfs = 50,
    /// Make and open a nameless file.
    Tmpfile = 51,
    /// Extended attributes of the `statx(2)` kind.
    Statx = 52,
    /// Copy between files, result of 64 bits.
    CopyFileRange64 = 53,
}

impl Opcode {
    /// Whether the operation can take long by its nature, and so goes to a slow thread.
    #[inline]
    #[must_use]
    pub const fn waits(self) -> bool {
        matches!(
            self,
            Self::Fsync
                | Self::Fsyncdir
                | Self::Syncfs
                | Self::Fallocate
                | Self::CopyFileRange
                | Self::CopyFileRange64
        )
    }

    /// Whether the operation waits for storage when names, attributes or directories are not in memory, or
    /// when memory is full of what was written. READ is not among them, since the kernel says beforehand
    /// whether it would wait; nor is what ends something (RELEASE, FLUSH, FORGET), whose order counts.
    #[inline]
    #[must_use]
    pub const fn may_wait(self) -> bool {
        matches!(
            self,
            Self::Lookup
                | Self::Getattr
                | Self::Setattr
                | Self::Readlink
                | Self::Symlink
                | Self::Mknod
                | Self::Mkdir
                | Self::Unlink
                | Self::Rmdir
                | Self::Rename
                | Self::Rename2
                | Self::Link
                | Self::Open
                | Self::Statfs
                | Self::Setxattr
                | Self::Getxattr
                | Self::Listxattr
                | Self::Removexattr
                | Self::Opendir
                | Self::Readdir
                | Self::Readdirplus
                | Self::Access
                | Self::Create
                | Self::Lseek
                | Self::Tmpfile
                | Self::Statx
                | Self::Write
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_enumeration() {
        for &op in Opcode::ALL {
            assert_eq!(Opcode::from_number(op as u32), Some(op));
        }
        for number in [0, 7, 19, 54, 4096, u32::MAX] {
            assert_eq!(Opcode::from_number(number), None);
        }
    }
}
