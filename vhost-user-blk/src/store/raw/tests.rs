#![allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "tests may panic"
)]

use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::OFlags;

use super::*;

fn options(path: &Path) -> OpenOptions {
    OpenOptions {
        path: path.to_owned(),
        read_only: false,
        cache: Cache::Auto,
        block_size: None,
        lock: true,
    }
}

fn image(len: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

fn vectors(buffer: &mut [u8], from: usize, len: usize) -> IoVecs {
    let mut out = IoVecs::new();
    // SAFETY: the buffer outlives the list in every test, and `from + len` lies within it.
    unsafe { out.push(buffer[from..].as_mut_ptr(), len) };
    out
}

#[test]
fn sizes_that_cannot_be_served() {
    let small = image(100);
    let error = RawImage::open(&options(small.path())).unwrap_err();
    assert!(matches!(error, OpenError::TooSmall { size: 100, .. }), "{error}");
    let odd = image(1000);
    let error = RawImage::open(&options(odd.path())).unwrap_err();
    assert!(matches!(error, OpenError::Misaligned { size: 1000, .. }), "{error}");
    let blocks = image(4096 + 512);
    let how = OpenOptions { block_size: Some(4096), ..options(blocks.path()) };
    let error = RawImage::open(&how).unwrap_err();
    assert!(error.to_string().contains("multiple of its block size of 4096"), "{error}");
}

#[test]
fn what_is_no_image() {
    let dir = tempfile::tempdir().unwrap();
    let error = RawImage::open(&options(&dir.path().join("none"))).unwrap_err();
    assert!(error.to_string().contains("check the path"), "{error}");
    // A directory cannot be opened for writing; read-only it can, and is refused by kind.
    let how = OpenOptions { read_only: true, ..options(dir.path()) };
    assert!(matches!(RawImage::open(&how), Err(OpenError::Kind(_))));
    let how = OpenOptions { path: "/dev/null".into(), ..options(dir.path()) };
    assert!(matches!(RawImage::open(&how), Err(OpenError::Kind(_))));
}

#[test]
fn two_writers_are_one_too_many() {
    let file = image(1 << 20);
    let first = RawImage::open(&options(file.path())).unwrap();
    let error = RawImage::open(&options(file.path())).unwrap_err();
    assert!(matches!(error, OpenError::Busy { .. }), "{error}");
    let reader = OpenOptions { read_only: true, ..options(file.path()) };
    assert!(RawImage::open(&reader).is_err());
    let careless = OpenOptions { lock: false, ..options(file.path()) };
    RawImage::open(&careless).unwrap();
    drop(first);
    let one = RawImage::open(&reader).unwrap();
    let two = RawImage::open(&reader).unwrap();
    assert!(RawImage::open(&options(file.path())).is_err());
    drop((one, two));
    RawImage::open(&options(file.path())).unwrap();
}

#[test]
fn only_what_is_aligned_goes_past_the_page_cache() {
    let file = image(1 << 20);
    let align = DirectAlignment { memory: 512, offset: 4096 };
    let image = RawImage {
        buffered: file.reopen().unwrap(),
        direct: Some((file.reopen().unwrap(), align)),
        block_device: false,
        blocks: Blocks { logical: 512, physical: 4096, discard: 4096 },
    };
    let mut buffer = vec![0u8; 3 * 4096];
    let start = buffer.as_ptr().align_offset(4096);
    let mut route =
        |offset, from: usize, len| image.route(offset, &vectors(&mut buffer, start + from, len));
    assert_eq!(route(8192, 0, 4096), Descriptor::Direct);
    assert_eq!(route(8192, 512, 4096), Descriptor::Direct);
    assert_eq!(route(512, 0, 4096), Descriptor::Buffered);
    assert_eq!(route(8192, 0, 512), Descriptor::Buffered);
    assert_eq!(route(8192, 8, 4096), Descriptor::Buffered);
}

#[test]
fn blocking_operations() {
    for cache in [Cache::Auto, Cache::Buffered] {
        let file = image(1 << 20);
        let how = OpenOptions { cache, ..options(file.path()) };
        let image = RawImage::open(&how).unwrap().image;
        assert_eq!(image.size().unwrap(), 1 << 20);
        let mut buffer: Vec<u8> = (0..70_000u32).map(|i| (i % 250 + 1) as u8).collect();
        let expected = buffer.clone();
        image.write(512, &mut vectors(&mut buffer, 0, 66_048), true).unwrap();
        image.flush().unwrap();
        buffer.fill(0);
        image.read(512, &mut vectors(&mut buffer, 0, 66_048)).unwrap();
        assert!(buffer[..66_048] == expected[..66_048]);

        let zero = |offset, len, unmap| ZeroRange { range: ByteRange { offset, len }, unmap };
        image.zero(zero(1024, 512, false)).unwrap();
        image.zero(zero(8192, 8192, true)).unwrap();
        image.zero(zero(0, 0, true)).unwrap();
        let mut found = vec![0xffu8; 66_560];
        file.as_file().read_exact_at(&mut found, 0).unwrap();
        assert!(found[1024..1536].iter().all(|&b| b == 0) && found[1536] != 0);
        assert!(found[8192..16384].iter().all(|&b| b == 0) && found[16384] != 0);

        let before = file.as_file().metadata().unwrap().blocks();
        image.discard(ByteRange { offset: 32768, len: 32768 }).unwrap();
        assert!(file.as_file().metadata().unwrap().blocks() < before);
        assert_eq!(image.size().unwrap(), 1 << 20);
        let past = image.read(1 << 20, &mut vectors(&mut buffer, 0, 512));
        assert!(past.is_err());
    }
}

#[test]
fn zeroes_are_written_where_nothing_better_is_possible() {
    let file = image(1 << 20);
    file.as_file().write_all_at(&[7; 300_000], 0).unwrap();
    let image = RawImage {
        buffered: file.reopen().unwrap(),
        direct: None,
        block_device: false,
        blocks: Blocks { logical: 512, physical: 4096, discard: 4096 },
    };
    image.write_zeroes(ByteRange { offset: 512, len: 200_192 }).unwrap();
    let mut found = vec![0; 300_000];
    file.as_file().read_exact_at(&mut found, 0).unwrap();
    assert_eq!(found[511], 7);
    assert!(found[512..200_704].iter().all(|&b| b == 0));
    assert_eq!(found[200_704], 7);
}

/// A guest's reads are no looks at the file, where that can be had: for the file's owner. Others get it all the same.
#[test]
fn images_of_others_are_opened_too() {
    use std::os::unix::fs::PermissionsExt;
    let flags = |path: &Path| {
        let file = open_file(&options(path), 0).unwrap();
        rustix::fs::fcntl_getfl(file).unwrap()
    };
    let file = image(4096);
    assert!(flags(file.path()).contains(OFlags::NOATIME));
    if !rustix::process::geteuid().is_root() {
        // Nobody else's file is at hand.
        return;
    }
    let everybody = std::fs::Permissions::from_mode(0o666);
    file.as_file().set_permissions(everybody).unwrap();
    let theirs = std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let nobody = rustix::process::Uid::from_raw(65534);
            // Of this thread alone.
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            flags(file.path())
        });
        other.join().unwrap()
    });
    assert!(!theirs.contains(OFlags::NOATIME));
}
