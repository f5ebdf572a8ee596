//! What the checker inside a guest (`bin/guest_dax.rs`) and the test on the host tell each other.
//!
//! Now and then the guest writes a page of lines to [`question`], and waits until [`reply`] is there. A
//! line is a file as it should be (`file NAME BYTES DIGEST`), which the host compares with its own, or
//! what the host shall write into one that the guest has mapped (`write NAME AT BYTES SEED`).

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

/// Bytes that no offset error leaves equal.
#[must_use]
pub fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_add(1);
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 32).to_le_bytes()
    });
    words.flatten().take(len).collect()
}

/// A digest that is quick under emulation; order and length count.
#[must_use]
pub fn digest(bytes: &[u8]) -> u64 {
    let mut sum = 0xcbf2_9ce4_8422_2325_u64 ^ bytes.len() as u64;
    for word in bytes.chunks(8) {
        let mut whole = [0; 8];
        whole[..word.len()].copy_from_slice(word);
        sum = (sum ^ u64::from_le_bytes(whole)).wrapping_mul(0x0100_0000_01b3).rotate_left(23);
    }
    sum
}

/// Name of the guest's question `number`.
#[must_use]
pub fn question(number: u64) -> String {
    format!("question-{number}")
}

/// Name of the host's reply to it.
#[must_use]
pub fn reply(number: u64) -> String {
    format!("reply-{number}")
}

/// The host's side of question `number` in the shared directory; false if it is not there yet.
///
/// # Errors
/// A file is not what the guest says.
pub fn answer(shared: &Path, number: u64) -> Result<bool> {
    let Ok(text) = fs::read_to_string(shared.join(question(number))) else { return Ok(false) };
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| -> Result<u64> {
            words.get(at).context("a short line")?.parse().context("a number")
        };
        let path = shared.join(words.get(1).context("a short line")?);
        match words.first().copied() {
            Some("file") => {
                let bytes = fs::read(&path)?;
                ensure!(
                    bytes.len() as u64 == number(2)? && digest(&bytes) == number(3)?,
                    "{line}: the host has {} bytes with digest {}",
                    bytes.len(),
                    digest(&bytes)
                );
            }
            Some("write") => {
                let file = OpenOptions::new().write(true).open(&path)?;
                let data = content(usize::try_from(number(3)?)?, number(4)?);
                file.write_all_at(&data, number(2)?)?;
            }
            _ => bail!("{line}: nobody says this"),
        }
    }
    fs::write(shared.join(reply(number)), b"")?;
    Ok(true)
}
