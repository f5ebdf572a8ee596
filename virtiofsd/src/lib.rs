//! Outboard `virtiofsd`: see the crate's README section.
