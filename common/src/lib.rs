//! The engine of Outboard's daemons: everything about vhost-user that is not one device's own.
//!
//! | room | what it holds |
//! |---|---|
//! | [`device`] | what a device back end is: the trait each daemon implements |
//! | [`vhost_user`] | the protocol: messages, session, guest memory, back-end channel |
//! | [`ring`] | virtqueues, split and packed; inflight record; notification |
//! | [`worker`] | threads that own queues; the epoll loop |
//! | [`metrics`] | counters |
//! | [`sys`] | event descriptors and system calls |
//!
//! Invariants: a queue belongs to one worker; nothing a guest writes can panic or end the process;
//! nothing is acknowledged before it is done.

pub mod device;
pub mod metrics;
pub mod ring;
pub mod sys;
pub mod vhost_user;
pub mod worker;
