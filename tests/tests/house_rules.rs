//! The house's rules that no compiler checks. A broken rule names the file and what to do.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use testkit::daemon::bin;

/// The crates whose code runs for users.
const PRODUCT: [&str; 6] =
    ["common", "virtiofsd", "vhost-user-net", "vhost-user-blk", "vsock-proxy", "outboard"];
/// Longest source file; unit tests move to `foo/tests.rs` before that.
const FILE_LINES: usize = 800;
/// Longest `main.rs`: it only shows the start-up.
const MAIN_LINES: usize = 60;
/// The hosts a reader may be sent to: specifications, documentation and source.
const HOSTS: [&str; 15] = [
    "crates.io",
    "docs.kernel.org",
    "docs.oasis-open.org",
    "docs.rs",
    "example.com",
    "example.invalid",
    "github.com",
    "gitlab.com",
    "keepachangelog.com",
    "man7.org",
    "semver.org",
    "sh.rustup.rs",
    "www.kernel.org",
    "www.qemu.org",
    "www.w3.org",
];

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every text file of the project, its path relative to the top.
fn files() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    walk(&top(), &mut found);
    assert!(found.len() > 50, "the project's files are not where this test looks");
    found
}

fn walk(dir: &Path, found: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        // What cargo, git and the fuzzer make is not the project's.
        if ["target", ".git", "corpus", "artifacts"].contains(&name) {
            continue;
        }
        if path.is_dir() {
            walk(&path, found);
        } else if let Ok(text) = fs::read_to_string(&path) {
            found.push((path.strip_prefix(top()).unwrap().to_owned(), text));
        }
    }
}

/// The Rust files of the product with their code: no comments, no unit tests.
fn product_code() -> Vec<(PathBuf, String)> {
    let is_product = |path: &Path| {
        PRODUCT.iter().any(|name| path.starts_with(Path::new(name).join("src")))
            && path.extension().is_some_and(|extension| extension == "rs")
            && !path.iter().any(|part| part == "tests" || part == "tests.rs")
    };
    let code = |text: String| {
        let product = text.split("#[cfg(test)]").next().unwrap();
        let is_code = |line: &&str| !line.trim_start().starts_with("//");
        product.lines().filter(is_code).collect::<Vec<_>>().join("\n")
    };
    files()
        .into_iter()
        .filter(|(path, _)| is_product(path))
        .map(|(path, text)| (path, code(text)))
        .collect()
}

fn none(broken: &[String]) {
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

#[test]
fn files_are_short() {
    let mut broken = Vec::new();
    for (path, text) in files() {
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let is_main = path.ends_with("src/main.rs");
        let most = if is_main { MAIN_LINES } else { FILE_LINES };
        let lines = text.lines().count();
        if lines > most {
            broken.push(format!("{}: {lines} lines, {most} at most", path.display()));
        }
    }
    none(&broken);
}

#[test]
fn no_merge_is_half_done() {
    // Not spelt out: this file is read too.
    let marks = ["<", "|", ">"].map(|mark| mark.repeat(7) + " ");
    let mut broken = Vec::new();
    for (path, text) in files() {
        for (number, line) in text.lines().enumerate() {
            if marks.iter().any(|mark| line.starts_with(mark.as_str())) || line == "=".repeat(7) {
                broken.push(format!("{}:{}: a merge's mark", path.display(), number + 1));
            }
        }
    }
    none(&broken);
}

#[test]
fn decisions_have_a_number_of_their_own() {
    let mut seen = BTreeSet::new();
    let mut broken = Vec::new();
    for entry in fs::read_dir(top().join("docs/decisions")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let number: String = name.chars().take_while(char::is_ascii_digit).collect();
        if number.len() != 4 || !name[4..].starts_with('-') || !name.ends_with(".md") {
            broken.push(format!("docs/decisions/{name}: name it NNNN-title.md"));
        }
        if !seen.insert(number) {
            broken.push(format!("docs/decisions/{name}: the number is taken"));
        }
        if !fs::read_to_string(&path).unwrap().starts_with("# ") {
            broken.push(format!("docs/decisions/{name}: begin with a title"));
        }
    }
    assert!(!seen.is_empty(), "there are decisions");
    none(&broken);
}

#[test]
fn nothing_names_the_place_it_was_written_at() {
    let checkout = top();
    // A checkout below /srv or /home says nothing by that; one below a directory of its own does.
    let usual = ["home", "root", "tmp", "usr", "var", "opt", "mnt", "srv", "build", "builds"];
    let first = checkout.iter().nth(1).unwrap().to_str().unwrap();
    let mut places = vec![checkout.to_str().unwrap().to_owned()];
    if !usual.contains(&first) {
        places.push(format!("/{first}/"));
    }
    let mut broken = Vec::new();
    for (path, text) in files() {
        for place in &places {
            if text.contains(place.as_str()) {
                broken.push(format!("{}: names {place}", path.display()));
            }
        }
    }
    none(&broken);
}

/// `docs/specification.md` says what shows each promise; what it names in the last column must be there.
#[test]
fn the_specifications_are_shown_by_tests_that_exist() {
    let code: Vec<(PathBuf, String)> = files()
        .into_iter()
        .filter(|(path, _)| path.extension().is_some_and(|e| e == "rs"))
        .collect();
    let table = fs::read_to_string(top().join("docs/specification.md")).unwrap();
    let (mut named, mut broken) = (0, Vec::new());
    for row in table.lines().filter(|line| line.starts_with("| ") && line.contains('`')) {
        let shown_by = row.trim_end_matches('|').rsplit('|').next().unwrap();
        let is_name = |word: &&str| word.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        for name in shown_by.split('`').skip(1).step_by(2).filter(is_name) {
            named += 1;
            let files = [format!("{name}.rs"), format!("{name}/main.rs")];
            let function = format!("fn {name}(");
            let shows = |(path, text): &(PathBuf, String)| {
                files.iter().any(|file| path.ends_with(file)) || text.contains(&function)
            };
            if !code.iter().any(shows) {
                broken.push(format!("docs/specification.md: there is no test {name}"));
            }
        }
    }
    assert!(named > 50, "only {named} names of tests were found");
    none(&broken);
}

#[test]
fn links_lead_to_known_hosts() {
    let mut broken = Vec::new();
    for (path, text) in files() {
        // The lock file is cargo's own.
        if path.file_name().is_some_and(|name| name == "Cargo.lock") {
            continue;
        }
        for url in text.split("://").skip(1).zip(text.split("://")) {
            let (rest, before) = url;
            if !before.ends_with("http") && !before.ends_with("https") {
                continue;
            }
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '-');
            let host = &rest[..end.unwrap_or(rest.len())];
            // Without a dot it is a made-up name in a request.
            if host.contains('.') && !HOSTS.contains(&host) {
                broken.push(format!("{}: the host {host} is not in HOSTS", path.display()));
            }
        }
    }
    none(&broken);
}

#[test]
fn unsafe_code_is_allowed_module_by_module_with_a_reason() {
    let mut broken = Vec::new();
    for (path, text) in files().into_iter().chain(product_code()) {
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let squeezed = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let Some((_, allowed)) = squeezed
            .split_once(concat!("allow( unsafe", "_code"))
            .or_else(|| squeezed.split_once(concat!("allow(unsafe", "_code")))
        else {
            continue;
        };
        let reason = allowed.split_once("reason = \"").map_or("", |(_, reason)| reason);
        if reason.split('"').next().unwrap_or("").len() < 20 {
            broken.push(format!("{}: unsafe code without a reason", path.display()));
        }
        if path.ends_with("src/lib.rs") || path.ends_with("src/main.rs") {
            broken.push(format!("{}: unsafe code allowed for a whole crate", path.display()));
        }
    }
    none(&broken);
}

#[test]
fn the_product_does_not_end_where_it_likes() {
    let words = [".unwrap()", "process::exit", "process::abort", "todo!(", "unimplemented!("];
    let mut broken = Vec::new();
    for (path, code) in product_code() {
        for word in words.iter().filter(|word| code.contains(**word)) {
            broken.push(format!("{}: {word}", path.display()));
        }
    }
    none(&broken);
}

#[test]
fn files_have_names_that_say_something() {
    let mut broken = Vec::new();
    for (path, _) in product_code() {
        for part in path.iter().filter_map(|part| part.to_str()) {
            let stem = part.trim_end_matches(".rs");
            if ["utils", "util", "helpers", "helper", "manager", "misc"].contains(&stem) {
                broken.push(format!("{}: name it after what it does", path.display()));
            }
        }
    }
    none(&broken);
}

/// The lines of a document's blocks of shell commands, continuation lines joined.
fn commands(text: &str) -> Vec<String> {
    let blocks = text.split("```").skip(1).step_by(2);
    let shell = blocks
        .filter(|block| ["sh\n", "console\n", "bash\n"].iter().any(|kind| block.starts_with(kind)));
    shell
        .flat_map(|block| {
            let joined = block.replace("\\\n", " ");
            joined.lines().skip(1).map(|line| line.trim().to_owned()).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn documented_commands_and_options_exist() {
    let script = fs::read_to_string(top().join("x")).unwrap();
    let documents = files().into_iter().filter(|(path, _)| {
        path.ends_with("README.md")
            || path.starts_with("docs") && !path.starts_with("docs/decisions")
    });
    let mut broken = Vec::new();
    for (path, text) in documents {
        for line in commands(&text) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let at = words.iter().position(|word| {
                *word == "./x" || PRODUCT.contains(&word.rsplit('/').next().unwrap())
            });
            let Some(at) = at else { continue };
            if words[at] == "./x" {
                let command = words.get(at + 1).copied().unwrap_or("help");
                let known = script.lines().any(|case| {
                    case.split(')').next().unwrap().split('|').any(|name| name.trim() == command)
                });
                if !known {
                    broken.push(format!("{}: there is no ./x {command}", path.display()));
                }
                continue;
            }
            let program = words[at].rsplit('/').next().unwrap();
            for option in unknown_options(program, &words[at + 1..]) {
                broken.push(format!("{}: {program} has no {option}", path.display()));
            }
        }
    }
    none(&broken);
}

/// `--help` ends with examples, of options that there are.
#[test]
fn every_program_helps_with_examples() {
    let mut broken = Vec::new();
    for program in PRODUCT.into_iter().filter(|name| *name != "common") {
        let help = Command::new(bin(program).unwrap()).arg("--help").output().unwrap().stdout;
        let help = String::from_utf8(help).unwrap();
        // A command may go on in the next line.
        let examples = help.split_once("Examples:").map_or("", |(_, examples)| examples);
        let examples = examples.replace("\\\n", " ");
        let commands = examples.lines().map(str::trim).filter(|line| line.starts_with(program));
        let mut count = 0;
        for line in commands {
            count += 1;
            let words: Vec<&str> = line.split_whitespace().skip(1).collect();
            for option in unknown_options(program, &words) {
                broken.push(format!("{program} has no {option}, which its help shows"));
            }
        }
        if count < 3 {
            broken.push(format!("{program} --help has {count} examples"));
        }
    }
    none(&broken);
}

/// The long options among `words` that `program --help` does not name.
fn unknown_options(program: &str, words: &[&str]) -> Vec<String> {
    let mut command = Command::new(bin(program).unwrap());
    // Only the launcher has subcommands, each with options of its own.
    let is_word = |word: &&&str| word.starts_with(char::is_alphabetic);
    if let ("outboard", Some(subcommand)) = (program, words.first().filter(is_word)) {
        command.arg(subcommand);
    }
    let help = command.arg("--help").output().unwrap().stdout;
    let help = String::from_utf8_lossy(&help).into_owned();
    // An example is no witness of its own options.
    let help = help.split("Examples:").next().unwrap();
    let word = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let known: BTreeSet<&str> = help.split(|c: char| !word(c)).collect();
    words
        .iter()
        .take_while(|word| !["|", "&&", ";", "&"].contains(*word))
        .filter(|option| option.starts_with("--") && option.len() > 2)
        .map(|option| option.split('=').next().unwrap())
        .filter(|option| !known.contains(option))
        .map(str::to_owned)
        .collect()
}
