#![allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "tests may panic"
)]
#![allow(unsafe_code, reason = "buffers of a test stand in for guest memory")]

use super::*;

const MIB: usize = 1 << 20;

/// A version 3 image of `mib` MiB without data, as the specification of the format lays it out:
/// header, refcount table, refcount block, L1 table, a cluster of 64 KiB each.
fn empty_image(path: &Path, mib: u64, backing: Option<&Path>) {
    const CLUSTER: usize = 64 << 10;
    let mut bytes = vec![0u8; 4 * CLUSTER];
    let backing = backing.map_or(String::new(), |p| p.display().to_string());
    let mut header = Vec::new();
    header.extend(MAGIC);
    header.extend(3u32.to_be_bytes());
    let name_at = if backing.is_empty() { 0 } else { 1024u64 };
    header.extend(name_at.to_be_bytes());
    header.extend(u32::try_from(backing.len()).unwrap().to_be_bytes());
    header.extend(16u32.to_be_bytes());
    header.extend((mib << 20).to_be_bytes());
    header.extend(0u32.to_be_bytes());
    let l1_entries = u32::try_from(mib.div_ceil(512)).unwrap();
    header.extend(l1_entries.to_be_bytes());
    header.extend((3 * CLUSTER as u64).to_be_bytes());
    header.extend((CLUSTER as u64).to_be_bytes());
    header.extend(1u32.to_be_bytes());
    header.extend([0; 4 + 8 + 8 + 8 + 8]);
    header.extend(4u32.to_be_bytes());
    header.extend(104u32.to_be_bytes());
    if !backing.is_empty() {
        // Header extension "backing format": raw or qcow2 by the file's name.
        let format: &[u8] =
            if backing.ends_with(".qcow2") { b"qcow2\0\0\0" } else { b"raw\0\0\0\0\0" };
        header.extend(0xe279_2acau32.to_be_bytes());
        let len = if backing.ends_with(".qcow2") { 5u32 } else { 3 };
        header.extend(len.to_be_bytes());
        header.extend(format);
    }
    header.extend([0; 8]);
    bytes[..header.len()].copy_from_slice(&header);
    bytes[1024..1024 + backing.len()].copy_from_slice(backing.as_bytes());
    bytes[CLUSTER..CLUSTER + 8].copy_from_slice(&(2 * CLUSTER as u64).to_be_bytes());
    for cluster in 0..4 {
        bytes[2 * CLUSTER + 2 * cluster..][..2].copy_from_slice(&1u16.to_be_bytes());
    }
    std::fs::write(path, bytes).unwrap();
}

fn options(path: &Path) -> OpenOptions {
    OpenOptions {
        path: path.to_owned(),
        read_only: false,
        cache: Cache::Auto,
        block_size: None,
        lock: true,
    }
}

fn vectors(buffer: &mut [u8]) -> IoVecs {
    let mut out = IoVecs::new();
    // SAFETY: the buffer outlives the list in every test.
    unsafe { out.push(buffer.as_mut_ptr(), buffer.len()) };
    out
}

fn read(image: &dyn Image, offset: u64, len: usize) -> Vec<u8> {
    let mut buffer = vec![0xff; len];
    image.read(offset, &mut vectors(&mut buffer)).unwrap();
    buffer
}

#[test]
fn what_is_written_is_there_after_closing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    empty_image(&path, 16, None);
    let mut data: Vec<u8> = (0..3 * MIB + 512).map(|i| (i / 512 % 255) as u8 + 1).collect();
    {
        let image = Qcow2Image::open(&options(&path)).unwrap().image;
        assert_eq!(image.size().unwrap(), 16 << 20);
        assert!(read(&*image, 0, 2 * MIB).iter().all(|&b| b == 0));
        image.write(512 * 3, &mut vectors(&mut data), true).unwrap();
        let zero = |offset, len, unmap| ZeroRange { range: ByteRange { offset, len }, unmap };
        image.zero(zero(512 * 3, 512, false)).unwrap();
        image.zero(zero(1 << 20, 1 << 20, true)).unwrap();
        image.discard(ByteRange { offset: 12 << 20, len: 1 << 20 }).unwrap();
        image.flush().unwrap();
    }
    let image = Qcow2Image::open(&options(&path)).unwrap().image;
    let found = read(&*image, 0, 4 * MIB);
    assert!(found[..2048].iter().all(|&b| b == 0));
    assert!(found[2048..MIB] == data[512..MIB - 1536]);
    assert!(found[MIB..2 * MIB].iter().all(|&b| b == 0));
    assert!(found[2 * MIB..3 * MIB + 2048] == data[2 * MIB - 1536..]);
}

#[test]
fn a_chain_reads_through_and_writes_on_top() {
    let dir = tempfile::tempdir().unwrap();
    let (base, middle, top) = (
        dir.path().join("base.raw"),
        dir.path().join("middle.qcow2"),
        dir.path().join("top.qcow2"),
    );
    std::fs::write(&base, vec![1; 4 * MIB]).unwrap();
    empty_image(&middle, 4, Some(&base));
    empty_image(&top, 4, Some(&middle));
    {
        let image = Qcow2Image::open(&options(&middle)).unwrap().image;
        image.write(1 << 20, &mut vectors(&mut vec![2; MIB]), false).unwrap();
        image.flush().unwrap();
    }
    let image = Qcow2Image::open(&options(&top)).unwrap().image;
    image.write((1 << 20) + 4096, &mut vectors(&mut [3; 512]), false).unwrap();
    let found = read(&*image, 0, 4 * MIB);
    let at = MIB + 4096;
    assert!(found[..MIB].iter().all(|&b| b == 1));
    assert!(found[MIB..at].iter().all(|&b| b == 2));
    assert!(found[at..at + 512].iter().all(|&b| b == 3));
    assert!(found[at + 512..2 * MIB].iter().all(|&b| b == 2));
    assert!(found[2 * MIB..].iter().all(|&b| b == 1));
    assert!(std::fs::read(&base).unwrap().iter().all(|&b| b == 1), "the base is untouched");
    // The whole chain is locked: its files must not change under the top image.
    assert!(Qcow2Image::open(&options(&middle)).is_err());
    assert!(super::super::raw::RawImage::open(&options(&base)).is_err());
}

#[test]
fn what_is_not_qcow2_is_refused_in_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    std::fs::write(&path, vec![0; MIB]).unwrap();
    let error = Qcow2Image::open(&options(&path)).unwrap_err().to_string();
    assert!(error.contains("not in qcow2 format"), "{error}");
    let path = dir.path().join("lost.qcow2");
    empty_image(&path, 4, Some(&dir.path().join("gone.raw")));
    let error = Qcow2Image::open(&options(&path)).unwrap_err().to_string();
    assert!(error.contains("gone.raw"), "{error}");
}
