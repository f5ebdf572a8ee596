//! The engine of Outboard's daemons: everything about vhost-user that is not one device's own.
//!
//! | room | what it holds |
//! |---|---|
//! | [`daemon`] | a daemon's life: sessions, signals, the start-up order |
//! | [`transport`] | listen, dial, sockets passed by number |
//! | [`handover`] | a new daemon takes the sessions of an old one over |
//! | [`device`] | what a device back end is: the trait each daemon implements |
//! | [`vhost_user`] | the protocol: messages, session, guest memory, back-end channel |
//! | [`ring`] | virtqueues, split and packed; inflight record; notification |
//! | [`worker`] | threads that own queues; the epoll loop |
//! | [`metrics`] | counters |
//! | [`admin`] | the sockets on which metrics are read and settings changed |
//! | [`rate_limiter`] | limits on operations and bytes a second |
//! | [`sandbox`] | how a daemon locks itself in, stage by stage |
//! | [`cli`], [`capabilities`], [`logging`] | what every program shares: arguments, errors, log |
//! | [`config_file`] | TOML with errors that point at the line |
//! | [`footprint`] | memory of the start-up, given back |
//! | [`sys`] | event descriptors and system calls |
//!
//! Invariants: a queue belongs to one worker; nothing a guest writes can panic or end the process;
//! nothing is acknowledged before it is done.

pub mod admin;
pub mod capabilities;
pub mod cli;
pub mod config_file;
pub mod daemon;
pub mod device;
pub mod footprint;
pub mod handover;
pub mod logging;
pub mod metrics;
pub mod rate_limiter;
pub mod ring;
pub mod sandbox;
pub mod sys;
pub mod transport;
pub mod vhost_user;
pub mod worker;
