//! Outboard `vhost-user-blk`: see the crate's README section.
