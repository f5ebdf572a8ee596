//! Requests of the operator on the control socket.
//!
//! | request | does |
//! |---|---|
//! | `{"link": true}` | plugs (`false`: unplugs) the cable; the guest sees it |
//! | `{"mtu": 9000}` | changes the MTU of the interface and of the device |
//! | `{"announce": null}` | has the guest announce itself to the network |
//! | `{"limits": {...}}` | changes the limits: `read` is towards the guest, `write` from it |
//! | `{"state": null}` | tells link, MTU and limits |

use std::sync::Arc;
use std::time::Instant;

use outboard_common::admin::{Control, ControlError};
use outboard_common::rate_limiter::Limits;
use serde_json::{Value, json};

use crate::config::S_LINK_UP;
use crate::device::NetDevice;

const VERBS: &[&str] = &["link", "mtu", "announce", "limits", "state"];

/// The control socket's side of a device.
#[derive(Debug)]
pub struct Operator {
    device: Arc<NetDevice>,
}

impl Operator {
    /// For `device`.
    #[must_use]
    pub fn new(device: Arc<NetDevice>) -> Self {
        Self { device }
    }

    fn state(&self) -> Value {
        let (mut up, mut mtu) = (false, 0);
        self.device.shared().change_config(|config| {
            up = config.status() & S_LINK_UP != 0;
            mtu = config.mtu();
            false
        });
        json!({ "link": up, "mtu": mtu, "limits": self.device.shared().limiter.limits() })
    }
}

fn refused(what: &str, error: &std::io::Error) -> ControlError {
    ControlError::Refused(format!("cannot {what}: {error}"))
}

impl Control for Operator {
    fn on_request(&self, verb: &str, argument: Value) -> Result<Value, ControlError> {
        match verb {
            "link" => {
                let up: bool = serde_json::from_value(argument)?;
                self.device.set_link(up).map_err(|e| refused("change the link", &e))?;
            }
            "mtu" => {
                let mtu: u16 = serde_json::from_value(argument)?;
                if mtu < 68 {
                    return Err(ControlError::Refused("an MTU has at least 68 bytes".to_owned()));
                }
                self.device.set_link_mtu(mtu).map_err(|e| refused("change the MTU", &e))?;
            }
            "announce" => self.device.ask_to_announce(),
            "limits" => {
                let limits: Limits = serde_json::from_value(argument)?;
                self.device.shared().limiter.set(limits, Instant::now());
            }
            "state" => {}
            _ => return Err(ControlError::UnknownVerb { known: VERBS }),
        }
        Ok(self.state())
    }
}
