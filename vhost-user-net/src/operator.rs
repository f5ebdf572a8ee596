//! Requests of the operator on the control socket.
//!
//! | request | does |
//! |---|---|
//! | `{"link": true}` | plugs (`false`: unplugs) the cable; the guest sees it |
//! | `{"mtu": 9000}` | changes the MTU of the interface and of the device |
//! | `{"announce": null}` | has the guest announce itself to the network |
//! | `{"limits": {...}}` | changes the limits: `read` is towards the guest, `write` from it |
//! | `{"state": null}` | tells link, MTU and limits |
//!
//! With several devices (a switch's ports) the argument is `{"device": "net1", "value": ARGUMENT}`;
//! `{"state": null}` tells of all of them.

use std::sync::Arc;
use std::time::Instant;

use outboard_common::admin::{Control, ControlError};
use outboard_common::rate_limiter::Limits;
use serde_json::{Value, json};

use crate::cli::MTU_MIN;
use crate::config::S_LINK_UP;
use crate::device::NetDevice;

const VERBS: &[&str] = &["link", "mtu", "announce", "limits", "state"];

/// The control socket's side of a device.
#[derive(Debug)]
pub struct Operator {
    devices: Vec<Arc<NetDevice>>,
}

/// A request's argument where there are several devices.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Addressed {
    device: String,
    #[serde(default)]
    value: Value,
}

impl Operator {
    /// For `devices`.
    #[must_use]
    pub fn new(devices: Vec<Arc<NetDevice>>) -> Self {
        Self { devices }
    }

    /// The device that a request is for, and the request's own argument.
    fn addressee(&self, argument: Value) -> Result<(&NetDevice, Value), ControlError> {
        if let [device] = self.devices.as_slice() {
            return Ok((device, argument));
        }
        let names = || {
            let names: Vec<_> = self.devices.iter().map(|d| d.shared().name.as_str()).collect();
            names.join(", ")
        };
        let Ok(Addressed { device: name, value }) = serde_json::from_value(argument) else {
            let how = r#"say which device: {"device": NAME, "value": ARGUMENT}"#;
            return Err(ControlError::Refused(format!("{how}; there are {}", names())));
        };
        let device = self.devices.iter().find(|d| d.shared().name == name);
        let none =
            || ControlError::Refused(format!("there is no device {name:?}, but {}", names()));
        Ok((device.ok_or_else(none)?, value))
    }

    /// The state of every device, by its name.
    fn states(&self) -> Value {
        self.devices.iter().map(|d| (d.shared().name.clone(), state(d))).collect()
    }
}

fn state(device: &NetDevice) -> Value {
    let (mut up, mut mtu) = (false, 0);
    device.shared().change_config(|config| {
        up = config.status() & S_LINK_UP != 0;
        mtu = config.mtu();
        false
    });
    json!({ "link": up, "mtu": mtu, "limits": device.shared().limiter.limits() })
}

fn refused(what: &str, error: &std::io::Error) -> ControlError {
    ControlError::Refused(format!("cannot {what}: {error}"))
}

impl Control for Operator {
    fn on_request(&self, verb: &str, argument: Value) -> Result<Value, ControlError> {
        if !VERBS.contains(&verb) {
            return Err(ControlError::UnknownVerb { known: VERBS });
        }
        if verb == "state" && argument.is_null() && self.devices.len() > 1 {
            return Ok(self.states());
        }
        let (device, argument) = self.addressee(argument)?;
        match verb {
            "link" => {
                let up: bool = serde_json::from_value(argument)?;
                device.set_link(up).map_err(|e| refused("change the link", &e))?;
            }
            "mtu" => {
                let mtu: u16 = serde_json::from_value(argument)?;
                if mtu < MTU_MIN {
                    let why = format!("an MTU has at least {MTU_MIN} bytes");
                    return Err(ControlError::Refused(why));
                }
                device.set_link_mtu(mtu).map_err(|e| refused("change the MTU", &e))?;
            }
            "announce" if device.ask_to_announce() => {}
            "announce" => {
                let why = "there is no guest that takes such a wish (GUEST_ANNOUNCE)";
                return Err(ControlError::Refused(why.to_owned()));
            }
            "limits" => {
                let limits: Limits = serde_json::from_value(argument)?;
                device.shared().limiter.set(limits, Instant::now());
            }
            "state" => {}
            _ => return Err(ControlError::UnknownVerb { known: VERBS }),
        }
        Ok(state(device))
    }
}
