//! System calls that no safe wrapper covers, and the event fd on which all waking rests.

mod event_fd;
mod inherited;
mod wait;

pub use event_fd::EventFd;
pub use inherited::inherited_fd;
pub use wait::epoll_wait_for;
