//! Which of a guest's devices a program is to use: what `peervram devices` says there.

use anyhow::{Context, Result};
use peervram_lab::Vm;
use serde_json::Value;
use std::path::Path;

/// The first that can, of each kind.
pub struct Devices {
    /// The address of one that can lend.
    pub lender: String,
    /// The DRM node of one that can import, if one can.
    pub node: Option<String>,
}

impl Devices {
    /// Asks `program`, which is `peervram`, in the guest.
    pub fn find(vm: &mut Vm, program: &Path) -> Result<Devices> {
        let said = vm.run(program, &["devices", "--json"])?;
        let devices: Value = serde_json::from_str(&said.stdout)
            .with_context(|| format!("`peervram devices` says {}{}", said.stdout, said.stderr))?;
        Devices::read(&devices)
    }

    fn read(devices: &Value) -> Result<Devices> {
        let list = devices["devices"].as_array().map_or(&[][..], Vec::as_slice);
        let first = |can: &str, pick: fn(&Value) -> Option<&str>| {
            list.iter().filter(|device| device[can]["can"] == true).find_map(pick)
        };
        let lender = first("lend", |device| device["address"].as_str());
        let node = first("import", |device| device["drm_nodes"][0].as_str());
        Ok(Devices {
            lender: lender
                .with_context(|| format!("`peervram devices` names none that can lend:\n{devices:#}"))?
                .to_owned(),
            node: node.map(|node| format!("/dev/dri/{node}")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_first_that_can_is_taken() {
        let lender =
            json!({ "address": "0000:01:00.0", "lend": { "can": true }, "import": { "can": false } });
        let gpu = json!({
            "address": "0000:02:00.0",
            "drm_nodes": ["card0", "renderD128"],
            "lend": { "can": false },
            "import": { "can": true },
        });
        let found = Devices::read(&json!({ "devices": [gpu, lender.clone()] })).unwrap();
        assert_eq!((found.lender.as_str(), found.node.as_deref()), ("0000:01:00.0", Some("/dev/dri/card0")));
        assert!(Devices::read(&json!({ "devices": [lender] })).unwrap().node.is_none());
        assert!(Devices::read(&json!({ "devices": [] })).is_err());
    }
}
