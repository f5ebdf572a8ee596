//! The back-end channel: requests from us to the front end. (Filled in with the session.)

/// The socket that SET_BACKEND_REQ_FD brought.
#[derive(Debug)]
pub struct BackendChannel {}
