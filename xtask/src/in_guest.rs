//! Which of a guest's devices a program is to use: what `peervram devices` says there.

use anyhow::{Context, Result};
use peervram_lab::Vm;
use peervram_lab::machine::PciId;
use serde_json::Value;
use std::path::Path;

/// The first that can, of each kind.
pub struct Devices {
    /// The address of one that can lend.
    pub lender: String,
    /// The DRM node of one that can import, if one can.
    pub node: Option<String>,
    /// The address of a model GPU, if there is one.
    pub model: Option<String>,
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
        let is_model = |device: &&Value| {
            let id = |field: &str| u16::from_str_radix(device[field].as_str()?, 16).ok();
            id("vendor_id") == Some(PciId::MODEL.vendor) && id("device_id") == Some(PciId::MODEL.device)
        };
        let model = list.iter().find(is_model).and_then(|device| device["address"].as_str());
        Ok(Devices {
            lender: lender
                .with_context(|| format!("`peervram devices` names none that can lend:\n{devices:#}"))?
                .to_owned(),
            node: node.map(|node| format!("/dev/dri/{node}")),
            model: model.map(ToOwned::to_owned),
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
        let mut model = lender.clone();
        model["address"] = json!("0000:03:00.0");
        model["vendor_id"] = json!(format!("{:04x}", PciId::MODEL.vendor));
        model["device_id"] = json!(format!("{:04x}", PciId::MODEL.device));
        let found = Devices::read(&json!({ "devices": [gpu, lender.clone(), model] })).unwrap();
        assert_eq!((found.lender.as_str(), found.node.as_deref()), ("0000:01:00.0", Some("/dev/dri/card0")));
        assert_eq!(found.model.as_deref(), Some("0000:03:00.0"));
        let found = Devices::read(&json!({ "devices": [lender] })).unwrap();
        assert!(found.node.is_none() && found.model.is_none());
        assert!(Devices::read(&json!({ "devices": [] })).is_err());
    }
}
