//! Outboard `vsock-proxy`: see the crate's README section.
