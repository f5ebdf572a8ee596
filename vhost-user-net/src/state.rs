//! A device's own state, as it moves to a newer daemon or to another host.
//!
//! Rings and features travel with the session. What is left is what control commands and the operator
//! changed. JSON: readable, and a field more does no harm to an older reader.

use serde::{Deserialize, Serialize};

use crate::control::{Coalescing, RxFilter};
use crate::rss::SteeringConfig;

/// What the control queue's commands set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlState {
    /// Queue pairs in use.
    pub pairs: u16,
    /// `VIRTIO_NET_F_GUEST_*` bits in use.
    pub offloads: u64,
    /// Which frames the driver wants.
    pub filter: RxFilter,
    /// When it wants to be told of received and of sent frames.
    pub coalescing: [Coalescing; 2],
    /// Where received frames go, if the driver said so; a daemon of before never does.
    #[serde(default)]
    pub steering: Option<SteeringConfig>,
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// The guest's address in configuration space.
    pub mac: [u8; 6],
    /// The MTU there, bytes; 0: none.
    pub mtu: u16,
    /// `status` there.
    pub status: u16,
    /// Whether the operator has the cable plugged in; a daemon of before says only whether the link is up.
    #[serde(default)]
    pub plugged: Option<bool>,
    /// With a control queue of ours.
    pub control: Option<ControlState>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Command, MacAddr};
    use crate::rss::{HashConfig, Table};

    #[test]
    fn a_filter_survives_the_journey() {
        let mut filter = RxFilter::for_station(Some(MacAddr([2, 0, 0, 0, 0, 1])), u64::MAX);
        filter.apply(&Command::Vlan(4095, true));
        filter.apply(&Command::MacTable {
            unicast: Some(vec![MacAddr([2, 0, 0, 0, 0, 7])]),
            multicast: None,
        });
        let coalescing = [Coalescing { max_packets: 8, max_usecs: 50 }, Coalescing::default()];
        let hash = HashConfig { types: 0x3f, key: vec![7; 40] };
        let table = Some(Table { pairs: vec![0, 2], unclassified: 1 });
        let steering = Some(SteeringConfig { hash, table });
        let control = Some(ControlState { pairs: 3, offloads: 0x82, filter, coalescing, steering });
        let state = SavedState {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 9000,
            status: 1,
            plugged: Some(true),
            control,
        };
        let text = serde_json::to_vec(&state).unwrap();
        assert_eq!(serde_json::from_slice::<SavedState>(&text).unwrap(), state);
        // One of a daemon that knew of no steering.
        let mut older = serde_json::to_value(&state).unwrap();
        older["control"].as_object_mut().unwrap().remove("steering").unwrap();
        let older: SavedState = serde_json::from_value(older).unwrap();
        assert_eq!(older.control.unwrap().steering, None);
    }
}
