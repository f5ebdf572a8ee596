//! Outboard `vhost-user-net`: see the crate's README section.
