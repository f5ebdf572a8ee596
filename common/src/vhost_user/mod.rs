//! The vhost-user protocol: messages, the session, guest memory and what else the front end shares.

pub mod backend_channel;
pub mod connection;
pub mod iotlb;
pub mod memory;
pub mod session;
pub mod wire;
