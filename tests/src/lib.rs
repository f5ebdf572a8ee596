//! The testkit: everything that tests of several daemons share.

pub mod cargo_tool;
pub mod daemon;
pub mod dax_story;
pub mod demo;
pub mod driver;
pub mod file_view;
pub mod frontend;
pub mod fuse_bridge;
pub mod guests;
pub mod inverter;
pub mod link_socket;
pub mod loop_device;
pub mod memory;
pub mod mounted;
pub mod netns;
pub mod page_cache;
pub mod pcap;
pub mod peers;
pub mod pod;
pub mod service;
pub mod skip;
pub mod testpmd;
pub mod toolroot;
pub mod vsock_host;
pub mod vsock_stream;
