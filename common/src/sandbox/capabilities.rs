//! Capabilities: all are dropped but those the device needs.

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
};

use super::{Outcome, StageError};

/// Keeps the capabilities in `kept`, in force at once, and drops all others from every set.
///
/// The ambient, inheritable and bounding sets end up empty, so a program this process could start
/// has none. The bounding set needs `CAP_SETPCAP` and is left alone without it: then the process is
/// not root, and no new privileges are to be had.
///
/// # Errors
/// [`StageError::MissingCapabilities`] when the process does not have one of `kept`, and
/// [`StageError::System`].
pub fn keep(kept: CapabilitySet) -> Result<Outcome, StageError> {
    let held = capabilities(None).map_err(StageError::system("read the capabilities"))?;
    let missing = kept - held.permitted;
    if !missing.is_empty() {
        return Err(StageError::MissingCapabilities(names(missing)));
    }
    if held.effective.contains(CapabilitySet::SETPCAP) {
        empty_bounding_set()?;
    }
    match clear_ambient_capability_set() {
        // Kernels before 4.3 have no ambient set.
        Ok(()) | Err(Errno::INVAL) => {}
        Err(error) => return Err(StageError::system("clear the ambient capabilities")(error)),
    }
    let sets =
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(StageError::system("drop capabilities"))?;
    Ok(Outcome::Applied)
}

fn empty_bounding_set() -> Result<(), StageError> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match capability_is_in_bounding_set(capability) {
            Ok(true) => remove_capability_from_bounding_set(capability)
                .map_err(StageError::system("drop a capability from the bounding set"))?,
            Ok(false) => {}
            // One past the last capability that this kernel knows.
            Err(_) => break,
        }
    }
    Ok(())
}

/// Those of `wanted` that the process has, so that they can be kept.
pub fn held(wanted: CapabilitySet) -> CapabilitySet {
    capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.permitted & wanted)
}

/// The capability with this name, like `CAP_SYS_ADMIN` or `sys_admin`.
pub fn by_name(name: &str) -> Option<CapabilitySet> {
    let upper = name.to_ascii_uppercase();
    CapabilitySet::from_name(upper.strip_prefix("CAP_").unwrap_or(&upper))
}

/// The names, as manual pages write them, separated by commas.
fn names(set: CapabilitySet) -> String {
    let names: Vec<String> = set.iter_names().map(|(name, _)| format!("CAP_{name}")).collect();
    names.join(", ")
}
