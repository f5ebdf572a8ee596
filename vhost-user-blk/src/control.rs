//! The control socket's requests.
//!
//! - `{"info": null}` lists the disks: name, sectors, limits, failed requests.
//! - `{"limits": {"disk": NAME, "limits": {...}}}` sets a disk's rate limits; what is left out is
//!   unlimited. They are `{"read": {"ops": LIMIT, "bytes": LIMIT}, "write": {...}}`, each per second; a
//!   LIMIT is a number, "RATE:BURST" or `{"rate": N, "burst": N}`.
//! - `{"resize": {"disk": NAME}}` looks at the image's size and tells the guest; answers the sectors.
//!
//! NAME may be left out when there is one disk; `{"resize": null}` does then.

use std::sync::Arc;
use std::time::Instant;

use outboard_common::admin::{Control, ControlError};
use outboard_common::device::Device;
use outboard_common::rate_limiter::Limits;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::device::BlkDevice;

/// Answers the control socket.
#[derive(Debug)]
pub struct BlkControl {
    devices: Vec<Arc<BlkDevice>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    disk: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SetLimits {
    disk: Option<String>,
    limits: Limits,
}

impl BlkControl {
    /// Control over `devices`.
    #[must_use]
    pub fn new(devices: Vec<Arc<BlkDevice>>) -> Self {
        Self { devices }
    }

    fn find(&self, name: Option<&str>) -> Result<&BlkDevice, ControlError> {
        match (name, self.devices.as_slice()) {
            (None, [only]) => Ok(only),
            (None, _) => Err(ControlError::Refused("say which disk: {\"disk\": NAME}".to_owned())),
            (Some(name), devices) => devices
                .iter()
                .find(|d| d.name() == name)
                .map(|d| &**d)
                .ok_or_else(|| ControlError::Refused(format!("there is no disk {name}"))),
        }
    }

    fn info(&self) -> Value {
        let disks: Vec<Value> = self
            .devices
            .iter()
            .map(|d| {
                json!({
                    "disk": d.name(),
                    "sectors": d.shared().capacity_sectors(),
                    "limits": d.limiter().limits(),
                    "write_through": d.shared().is_write_through(),
                    "errors": d.shared().errors(),
                })
            })
            .collect();
        json!(disks)
    }
}

impl Control for BlkControl {
    fn on_request(&self, verb: &str, argument: Value) -> Result<Value, ControlError> {
        match verb {
            "info" => Ok(self.info()),
            "limits" => {
                let request: SetLimits = serde_json::from_value(argument)?;
                let device = self.find(request.disk.as_deref())?;
                device.limiter().set(request.limits, Instant::now());
                Ok(json!(device.limiter().limits()))
            }
            "resize" => {
                let request: Option<Resize> = serde_json::from_value(argument)?;
                let request = request.unwrap_or_default();
                let device = self.find(request.disk.as_deref())?;
                let sectors =
                    device.check_size().map_err(|e| ControlError::Refused(e.to_string()))?;
                Ok(json!({ "sectors": sectors }))
            }
            _ => Err(ControlError::UnknownVerb { known: &["info", "limits", "resize"] }),
        }
    }
}
