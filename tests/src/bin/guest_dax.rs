//! A random-operation checker of mapped files, run inside a guest: `guest_dax DIR FLOOR STEPS SEED`.
//!
//! It knows what every file must be, byte for byte, and does to the files what programs do: maps them shared
//! and privately, stores and loads, writes and reads beside the maps and from one map into another, grows and
//! truncates, punches holes, renames over, removes what is mapped. Each step is compared at once, all there
//! is now and then, and the host compares what it has when it is asked. Sizes move just above `FLOOR`.
#![allow(unsafe_code, reason = "maps files, and looks what signals an access gets")]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use testkit::dax_story::{content, digest, question, reply};

const PAGE: u64 = 4096;
/// Sizes move within this, above the floor.
const SPAN: u64 = 40 * PAGE;
const VIEWS: usize = 5;
/// Steps between two looks at everything, and between two questions to the host.
const LOOK: u64 = 25;
const ASK: u64 = 75;
/// For the host's reply.
const PATIENCE: Duration = Duration::from_secs(60);

/// A page that a private map has for itself.
type Copied = BTreeMap<u64, Vec<u8>>;

fn index(n: u64) -> usize {
    n as usize
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n.max(1)
    }
}

/// A map of a part of a file.
struct View {
    base: *mut u8,
    from: u64,
    len: u64,
    /// `Some`: MAP_PRIVATE.
    copied: Option<Copied>,
}

impl View {
    fn new(file: &File, from: u64, len: u64, private: bool) -> Result<Self> {
        let kind = if private { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping where the kernel likes; unmapped in `drop`.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), index(len), prot, kind, file.as_raw_fd(), from as i64)
        };
        ensure!(base != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Ok(Self { base: base.cast(), from, len, copied: private.then(Copied::new) })
    }

    /// Where offset `at` of the file is; `at .. at + len` must be in the map.
    fn at(&self, at: u64, len: u64) -> *mut u8 {
        assert!(at >= self.from && at + len <= self.from + self.len);
        self.base.wrapping_add(index(at - self.from))
    }

    fn load(&self, at: u64, out: &mut [u8]) {
        // SAFETY: inside the mapping and the file; nobody else stores meanwhile.
        unsafe { self.at(at, out.len() as u64).copy_to_nonoverlapping(out.as_mut_ptr(), out.len()) }
    }

    fn store(&self, at: u64, data: &[u8]) {
        // SAFETY: as in `load`.
        unsafe {
            self.at(at, data.len() as u64).copy_from_nonoverlapping(data.as_ptr(), data.len());
        }
    }

    /// The signal that a load at `at` ends a process with, or 0.
    fn signal_at(&self, at: u64) -> Result<i32> {
        let address = self.at(at, 1);
        // SAFETY: the child loads one byte and leaves.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: inside the mapping; that it may be a SIGBUS is the question.
            let _ = unsafe { address.read_volatile() };
            // SAFETY: a plain call.
            unsafe { libc::_exit(0) };
        }
        ensure!(child > 0, "fork: {}", std::io::Error::last_os_error());
        let mut status = 0;
        // SAFETY: our own child.
        ensure!(unsafe { libc::waitpid(child, &raw mut status, 0) } == child, "waitpid");
        Ok(if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) } else { 0 })
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`.
        unsafe { libc::munmap(self.base.cast(), index(self.len)) };
    }
}

/// A file, what it must be, and the maps of it.
struct Subject {
    name: Option<String>,
    file: File,
    model: Vec<u8>,
    views: Vec<View>,
}

impl Subject {
    fn size(&self) -> u64 {
        self.model.len() as u64
    }

    fn put(&mut self, at: u64, data: &[u8]) {
        let end = index(at) + data.len();
        if self.model.len() < end {
            self.model.resize(end, 0);
        }
        self.model[index(at)..end].copy_from_slice(data);
    }

    /// One page of view `v`, which begins at `at` of the file, is what it must be.
    fn check_page(&self, v: usize, at: u64) -> Result<()> {
        let view = &self.views[v];
        let mut page = [0; PAGE as usize];
        view.load(at, &mut page);
        let in_file = index((self.size() - at).min(PAGE));
        let mut wanted = [0; PAGE as usize];
        wanted[..in_file].copy_from_slice(&self.model[index(at)..][..in_file]);
        let mut compared = page.len();
        if let Some(copy) = view.copied.as_ref().and_then(|copied| copied.get(&(at / PAGE))) {
            wanted.copy_from_slice(copy);
            compared = in_file;
        }
        if let Some(wrong) = (0..compared).find(|&i| page[i] != wanted[i]) {
            bail!(
                "{:?}, {} bytes: a map of {} bytes from {}, private: {}, shows {:#x} and not {:#x} at {}",
                self.name,
                self.size(),
                view.len,
                view.from,
                view.copied.is_some(),
                page[wrong],
                wanted[wrong],
                at + wrong as u64
            );
        }
        Ok(())
    }

    /// The pages of view `v` that are in the file.
    fn pages(&self, v: usize) -> impl Iterator<Item = u64> + use<> {
        let view = &self.views[v];
        (view.from..(view.from + view.len).min(self.size())).step_by(PAGE as usize)
    }

    fn check(&self) -> Result<()> {
        for v in 0..self.views.len() {
            self.pages(v).try_for_each(|at| self.check_page(v, at))?;
        }
        let size = self.file.metadata()?.len();
        ensure!(size == self.size(), "{:?}: {size} bytes and not {}", self.name, self.size());
        let mut bytes = vec![0; self.model.len()];
        self.file.read_exact_at(&mut bytes, 0)?;
        let wrong = bytes.iter().zip(&self.model).position(|(a, b)| a != b);
        ensure!(wrong.is_none(), "{:?}: read(2) is wrong at {wrong:?}", self.name);
        Ok(())
    }

    /// A random view, private or not, and a part of it that is in the file.
    fn place(&self, private: bool, random: &mut Random) -> Option<(usize, u64, u64)> {
        let views = (0..self.views.len()).filter(|&v| {
            self.views[v].copied.is_some() == private && self.views[v].from < self.size()
        });
        let views: Vec<usize> = views.collect();
        let v = *views.get(index(random.below(views.len() as u64)))?;
        let view = &self.views[v];
        let end = (view.from + view.len).min(self.size());
        let at = view.from + random.below(end - view.from);
        Some((v, at, 1 + random.below((end - at).min(3 * PAGE))))
    }

    fn truncated(&mut self, size: u64) {
        self.model.resize(index(size), 0);
        for copied in self.views.iter_mut().filter_map(|view| view.copied.as_mut()) {
            copied.retain(|&page, _| page < size.div_ceil(PAGE));
        }
    }
}

/// What is counted, for the host to see that it happened.
#[derive(Default)]
struct Counts {
    sigbus: u64,
    from_map: u64,
    into_map: u64,
    renamed: u64,
    unlinked: u64,
    holes: u64,
    private: u64,
}

struct Checker {
    dir: PathBuf,
    floor: u64,
    random: Random,
    subjects: Vec<Subject>,
    /// A file for direct I/O, small enough never to be mapped where only large ones are.
    direct: File,
    seed: u64,
    questions: u64,
    counts: Counts,
}

impl Checker {
    fn new(dir: &Path, floor: u64, seed: u64) -> Result<Self> {
        let direct = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_DIRECT)
            .open(dir.join("direct"))?;
        let mut checker = Self {
            dir: dir.to_owned(),
            floor,
            random: Random(seed),
            subjects: Vec::new(),
            direct,
            seed,
            questions: 0,
            counts: Counts::default(),
        };
        for n in 0..3 {
            let subject = checker.make(&format!("subject-{n}"))?;
            checker.subjects.push(subject);
        }
        Ok(checker)
    }

    fn bytes(&mut self, len: u64) -> Vec<u8> {
        self.seed += 1;
        content(index(len), self.seed)
    }

    /// A size above the floor, every other time one of whole pages.
    fn size(&mut self) -> u64 {
        let size = self.floor + self.random.below(SPAN);
        if self.random.below(2) == 0 { size - size % PAGE } else { size }
    }

    /// A new file with new contents; the name of another one may be given.
    fn make(&mut self, name: &str) -> Result<Subject> {
        let size = self.size();
        let model = self.bytes(size);
        let path = self.dir.join(name);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(&path)?;
        file.write_all_at(&model, 0)?;
        drop(file);
        // Whether a file can be mapped in place is decided when the kernel meets it, and this one was empty.
        fs::write("/proc/sys/vm/drop_caches", "2")?;
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        Ok(Subject { name: Some(name.to_owned()), file, model, views: Vec::new() })
    }

    /// An offset near the file's end.
    fn offset(&mut self, s: usize, beyond: u64) -> u64 {
        let size = self.subjects[s].size();
        let low = self.floor.min(size);
        low + self.random.below(size - low + beyond)
    }

    fn map(&mut self, s: usize) -> Result<()> {
        let from = self.offset(s, 4 * PAGE) / PAGE * PAGE;
        let len = (1 + self.random.below(24)) * PAGE;
        let private = self.random.below(3) == 0;
        let subject = &mut self.subjects[s];
        if subject.views.len() == VIEWS {
            subject.views.remove(index(self.random.below(VIEWS as u64)));
        }
        subject.views.push(View::new(&subject.file, from, len, private)?);
        let v = subject.views.len() - 1;
        subject.pages(v).try_for_each(|at| subject.check_page(v, at))
    }

    fn store(&mut self, s: usize, private: bool) -> Result<()> {
        let Some((v, at, len)) = self.subjects[s].place(private, &mut self.random) else {
            return Ok(());
        };
        let data = self.bytes(len);
        let subject = &mut self.subjects[s];
        subject.views[v].store(at, &data);
        if !private {
            subject.put(at, &data);
        }
        for page in at / PAGE..(at + len).div_ceil(PAGE) {
            let start = page * PAGE;
            if private {
                let mut whole = vec![0; PAGE as usize];
                let n = index((subject.size() - start).min(PAGE));
                whole[..n].copy_from_slice(&subject.model[index(start)..][..n]);
                let copied = subject.views[v].copied.as_mut().context("a private map")?;
                let copy = copied.entry(page).or_insert(whole);
                let (low, high) = (at.max(start), (at + len).min(start + PAGE));
                copy[index(low - start)..index(high - start)]
                    .copy_from_slice(&data[index(low - at)..index(high - at)]);
                self.counts.private += 1;
            }
            subject.check_page(v, start)?;
        }
        Ok(())
    }

    /// Writes beside the maps: from memory, or straight from a map of this or another file.
    fn write(&mut self, s: usize) -> Result<()> {
        let at = self.offset(s, 2 * PAGE);
        let t = index(self.random.below(self.subjects.len() as u64));
        let place = self.subjects[t].place(false, &mut self.random);
        let (data, source) = match place {
            Some((v, from, len)) if self.random.below(3) == 0 => {
                let from_model = self.subjects[t].model[index(from)..index(from + len)].to_vec();
                self.counts.from_map += 1;
                (from_model, Some(self.subjects[t].views[v].at(from, len)))
            }
            _ => {
                let len = 1 + self.random.below(3 * PAGE);
                (self.bytes(len), None)
            }
        };
        if at + data.len() as u64 > self.floor + SPAN {
            return Ok(());
        }
        // Into itself, an overlap would be anybody's guess.
        if s == t && source.is_some() {
            return Ok(());
        }
        let pointer = source.map_or(data.as_ptr(), <*mut u8>::cast_const);
        let fd = self.subjects[s].file.as_raw_fd();
        // SAFETY: `data.len()` bytes are at `pointer`, in `data` or in the map of another file.
        let done = unsafe { libc::pwrite(fd, pointer.cast(), data.len(), at as i64) };
        ensure!(done == data.len() as isize, "pwrite: {done}, {}", std::io::Error::last_os_error());
        self.subjects[s].put(at, &data);
        Ok(())
    }

    /// Reads from one file straight into a map of another.
    fn read_into_map(&mut self, s: usize) -> Result<()> {
        let t = (s + 1) % self.subjects.len();
        let Some((v, to, len)) = self.subjects[t].place(false, &mut self.random) else {
            return Ok(());
        };
        let from = self.offset(s, 0);
        let len = len.min(self.subjects[s].size() - from);
        let pointer = self.subjects[t].views[v].at(to, len);
        let fd = self.subjects[s].file.as_raw_fd();
        // SAFETY: `len` bytes of the map are in its file; they are written by the kernel alone.
        let done = unsafe { libc::pread(fd, pointer.cast(), index(len), from as i64) };
        ensure!(done == len as isize, "pread: {done}, {}", std::io::Error::last_os_error());
        let data = self.subjects[s].model[index(from)..index(from + len)].to_vec();
        self.subjects[t].put(to, &data);
        self.counts.into_map += 1;
        Ok(())
    }

    /// Whole pages of a map to the file for direct I/O and back into another map: where that file is not
    /// mapped itself, the device reads and writes the window.
    fn direct(&mut self, s: usize) -> Result<()> {
        let t = (s + 1) % self.subjects.len();
        let page = |subject: &Subject, random: &mut Random| {
            let (v, at, _) = subject.place(false, random)?;
            let at = at / PAGE * PAGE;
            (at + PAGE <= subject.size()).then(|| (v, at, subject.views[v].at(at, PAGE)))
        };
        let from = page(&self.subjects[s], &mut self.random);
        let to = page(&self.subjects[t], &mut self.random);
        let (Some((_, from, source)), Some((v, to, target))) = (from, to) else { return Ok(()) };
        let fd = self.direct.as_raw_fd();
        // SAFETY: a page of a map, all of it in its file.
        let done = unsafe { libc::pwrite(fd, source.cast_const().cast(), index(PAGE), 0) };
        ensure!(done == PAGE as isize, "direct pwrite: {}", std::io::Error::last_os_error());
        // SAFETY: as above; written by the kernel alone.
        let done = unsafe { libc::pread(fd, target.cast(), index(PAGE), 0) };
        ensure!(done == PAGE as isize, "direct pread: {}", std::io::Error::last_os_error());
        let data = self.subjects[s].model[index(from)..index(from + PAGE)].to_vec();
        self.subjects[t].put(to, &data);
        self.counts.into_map += 1;
        self.subjects[t].check_page(v, to)
    }

    fn resize(&mut self, s: usize) -> Result<()> {
        let size = self.size();
        self.subjects[s].file.set_len(size)?;
        self.subjects[s].truncated(size);
        self.look_behind_the_end(s)
    }

    /// A map reaches past the end: its first page there is a SIGBUS, and no other process is hurt.
    fn look_behind_the_end(&mut self, s: usize) -> Result<()> {
        let subject = &self.subjects[s];
        let end = subject.size().next_multiple_of(PAGE);
        let beyond = |view: &&View| view.from.max(end) < view.from + view.len;
        let Some(view) = subject.views.iter().find(beyond) else { return Ok(()) };
        let signal = view.signal_at(view.from.max(end))?;
        ensure!(signal == libc::SIGBUS, "a load behind the end ended with signal {signal}");
        self.counts.sigbus += 1;
        Ok(())
    }

    fn punch(&mut self, s: usize) -> Result<()> {
        let at = self.offset(s, 0);
        let len = 1 + self.random.below(5 * PAGE);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let fd = self.subjects[s].file.as_raw_fd();
        // SAFETY: a plain call.
        let done = unsafe { libc::fallocate(fd, mode, at as i64, len as i64) };
        ensure!(done == 0, "fallocate: {}", std::io::Error::last_os_error());
        let subject = &mut self.subjects[s];
        let end = (at + len).min(subject.size());
        if at < end {
            subject.model[index(at)..index(end)].fill(0);
        }
        self.counts.holes += 1;
        Ok(())
    }

    /// Another file takes the name, or the name goes and a new file gets it; what was there lives on for
    /// a while, mapped.
    fn replace(&mut self, s: usize) -> Result<()> {
        let Some(name) = self.subjects[s].name.clone() else { return Ok(()) };
        let new = if self.random.below(2) == 0 {
            let mut new = self.make("coming")?;
            fs::rename(self.dir.join("coming"), self.dir.join(&name))?;
            new.name = Some(name);
            self.counts.renamed += 1;
            new
        } else {
            fs::remove_file(self.dir.join(&name))?;
            self.counts.unlinked += 1;
            self.make(&name)?
        };
        let mut old = std::mem::replace(&mut self.subjects[s], new);
        old.name = None;
        self.subjects.push(old);
        if self.subjects.len() > 5 {
            self.subjects.remove(3).check()?;
        }
        Ok(())
    }

    fn sync(&mut self, s: usize) -> Result<()> {
        if self.random.below(2) == 0 {
            return Ok(self.subjects[s].file.sync_all()?);
        }
        for view in &self.subjects[s].views {
            // SAFETY: a mapping of ours.
            let done = unsafe { libc::msync(view.base.cast(), index(view.len), libc::MS_SYNC) };
            ensure!(done == 0, "msync: {}", std::io::Error::last_os_error());
        }
        Ok(())
    }

    /// Has the kernel forget: private copies, or everything that is cached.
    fn forget(&mut self, s: usize) -> Result<()> {
        for view in &mut self.subjects[s].views {
            // SAFETY: a mapping of ours, whose private pages the model forgets too.
            unsafe { libc::madvise(view.base.cast(), index(view.len), libc::MADV_DONTNEED) };
            if let Some(copied) = &mut view.copied {
                copied.clear();
            }
        }
        if self.random.below(4) == 0 {
            fs::write("/proc/sys/vm/drop_caches", "3")?;
        }
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        let s = index(self.random.below(self.subjects.len() as u64));
        match self.random.below(34) {
            0..6 => self.map(s),
            6..11 => self.store(s, false),
            11..14 => self.store(s, true),
            14..19 => self.write(s),
            19..21 => self.read_into_map(s),
            21..23 => self.direct(s),
            23..27 => self.resize(s),
            27..29 => self.punch(s),
            29 => self.replace(s),
            30..32 => self.sync(s),
            _ => self.forget(s),
        }?;
        // A page of what was touched, wherever it is.
        let subject = &self.subjects[s];
        for v in 0..subject.views.len() {
            let pages: Vec<u64> = subject.pages(v).collect();
            if !pages.is_empty() {
                let at = pages[index(self.random.below(pages.len() as u64))];
                subject.check_page(v, at)?;
            }
        }
        Ok(())
    }

    /// The host compares its files with ours, and writes into one that is mapped here.
    fn ask_the_host(&mut self) -> Result<()> {
        self.questions += 1;
        let mut text = String::new();
        for subject in &self.subjects {
            subject.file.sync_all()?;
            if let Some(name) = &subject.name {
                let (size, sum) = (subject.size(), digest(&subject.model));
                text.push_str(&format!("file {name} {size} {sum}\n"));
            }
        }
        let s = index(self.random.below(3));
        let at = self.offset(s, 0);
        let len = (1 + self.random.below(2 * PAGE)).min(self.subjects[s].size() - at);
        self.seed += 1;
        let name = self.subjects[s].name.clone().context("the first three have names")?;
        text.push_str(&format!("write {name} {at} {len} {}\n", self.seed));
        fs::write(self.dir.join("asking"), &text)?;
        fs::rename(self.dir.join("asking"), self.dir.join(question(self.questions)))?;
        let start = Instant::now();
        while !self.dir.join(reply(self.questions)).exists() {
            ensure!(start.elapsed() < PATIENCE, "the host does not reply to {}", self.questions);
            std::thread::sleep(Duration::from_millis(5));
        }
        let data = content(index(len), self.seed);
        self.subjects[s].put(at, &data);
        // A program that wants to see others' changes opens the file, as with any network file system.
        drop(File::open(self.dir.join(name))?);
        self.check_all()
    }

    fn check_all(&self) -> Result<()> {
        self.subjects.iter().try_for_each(Subject::check)
    }

    fn run(&mut self, steps: u64) -> Result<()> {
        for step in 1..=steps {
            self.step().with_context(|| format!("step {step}"))?;
            if step % LOOK == 0 {
                self.check_all().with_context(|| format!("after step {step}"))?;
            }
            if step % ASK == 0 || step == steps {
                self.ask_the_host().with_context(|| format!("with the host, after step {step}"))?;
            }
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, floor, steps, seed] = arguments.as_slice() else {
        bail!("guest_dax DIR FLOOR STEPS SEED")
    };
    let start = Instant::now();
    let mut checker = Checker::new(Path::new(dir), floor.parse()?, seed.parse()?)?;
    checker.run(steps.parse()?)?;
    let c = &checker.counts;
    let counts = [
        ("sigbus", c.sigbus),
        ("from_map", c.from_map),
        ("into_map", c.into_map),
        ("renamed", c.renamed),
        ("unlinked", c.unlinked),
        ("holes", c.holes),
        ("private", c.private),
        ("questions", checker.questions),
        ("seconds", start.elapsed().as_secs()),
    ];
    let mut out = std::io::stdout().lock();
    for (name, count) in counts {
        writeln!(out, "result {name} {count}")?;
    }
    Ok(out.flush()?)
}
