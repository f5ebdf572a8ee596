//! The control socket: `{"status":null}` tells what the guest knows and has open.

use std::sync::Arc;

use outboard_common::admin::{Control, ControlError};
use serde_json::{Value, json};

use crate::fuse::Server;
use crate::passthrough::PassthroughFs;

/// Answers the control socket of a daemon that shares a directory.
#[derive(Debug)]
pub(crate) struct FsControl(pub(crate) Arc<Server<PassthroughFs>>);

impl Control for FsControl {
    fn on_request(&self, verb: &str, _argument: Value) -> Result<Value, ControlError> {
        if verb != "status" {
            return Err(ControlError::UnknownVerb { known: &["status"] });
        }
        let fs = self.0.file_system();
        Ok(json!({
            "mounted": self.0.negotiated().is_some(),
            "fuse_flags": self.0.negotiated().map(|flags| format!("{flags:#x}")),
            "inodes": fs.inode_count(),
            "open_files": fs.open_count(),
        }))
    }
}
