//! Captured machines to the parser, the verdict, the groups, the explanation and the drawing.
//!
//! An input that begins with `{` is a captured machine as it stands in a file. Any other is a machine in short:
//! processor (bit 0: one that is trusted), then function after function, each as: what it hangs from (modulo the
//! functions so far, 255: a root bus), device and function number, bits (0: not read, 1: asleep, 2: all ones, 3:
//! conventional), a PCI Express type, an ACS control word, the length of what follows, and bytes that are put into
//! its configuration space at the offset that the first two of them say.

#![no_main]

use libfuzzer_sys::fuzz_target;
use peervram::backends::PciAddress;
use peervram::backends::topology::{MapType, Topology};
use peervram::route::{Answer, End, KernelMessages, Route};
use serde_json::{Value, json};

/// More functions than these show nothing new.
const FUNCTIONS_MAX: usize = 12;

const DRIVERS: [&str; 4] = ["vfio-pci", "virtio-pci", "xe", "vgem"];

fuzz_target!(|input: &[u8]| {
    let text = if input.first() == Some(&b'{') {
        String::from_utf8_lossy(input).into_owned()
    } else {
        machine(input).to_string()
    };
    let Ok(topology) = Topology::from_json(&text) else { return };
    let again = Topology::from_json(&topology.to_json()).expect("what was written is read");
    assert_eq!(again, topology);
    let _ = (topology.unread(), topology.predicted_iommu_groups());

    // The last two, to and fro, and the first: machines begin with their bridges.
    let mut functions: Vec<PciAddress> = topology.places().iter().map(|place| place.address()).collect();
    functions.reverse();
    let first = functions.last().copied();
    functions.truncate(2);
    let messages = KernelMessages::in_text("");
    for &provider in &functions {
        let clients = functions.iter().copied().chain(first).map(End::Function);
        for client in clients.chain([End::Cpu]) {
            let route = Route::explain(&topology, provider, &client, &messages).expect("both are there");
            let drawing = route.draw(&topology);
            assert!(drawing.lines().all(|line| line.chars().count() <= 80), "{drawing}");
            assert!(route.fixes.iter().all(|fix| fix.then != Some(MapType::NotSupported)));
            if let (Answer::Refused | Answer::Unknown, End::Function(_)) = (route.answer(), &client) {
                assert!(route.recommended().is_some(), "{}", route.verdict_words);
            }
        }
    }
});

/// The machine that an input describes.
fn machine(input: &[u8]) -> Value {
    let mut input = input.iter().copied();
    let is_trusted = input.next().is_some_and(|byte| byte & 1 != 0);
    let (vendor, family) = if is_trusted { ("AuthenticAMD", 0x17) } else { ("GenuineIntel", 6) };
    let mut places: Vec<Value> = Vec::new();
    while let (Some(parent), true) = (input.next(), places.len() < FUNCTIONS_MAX) {
        let mut byte = || input.next().unwrap_or(0);
        let [slot, bits, port_type, acs, length] = [byte(), byte(), byte(), byte(), byte()];
        let patch: Vec<u8> = (0..length).map(|_| byte()).collect();
        let number = places.len();
        let address = format!("0000:{number:02x}:{:02x}.{:x}", slot >> 3, slot & 7);
        let above = match parent {
            255 => json!({"host-bridge": "pci0000:00"}),
            254 => json!({"host-bridge": "pci0000:80"}),
            _ if number == 0 => json!({"host-bridge": "pci0000:00"}),
            // Now and then one that is not there, or itself.
            _ if usize::from(parent) % 64 > number => json!({"bridge": "0000:ee:00.0"}),
            _ if usize::from(parent) % 64 == number => json!({"bridge": address}),
            _ => json!({"bridge": places[usize::from(parent) % 64]["function"]["address"]}),
        };
        let config = match bits & 7 {
            1 => json!({"unread": "no"}),
            2 => json!({"unread": "it sleeps in D3cold, and reading would wake it"}),
            4 => json!({"known": {"size_bytes": 256, "bytes": "ff".repeat(64)}}),
            _ => json!({"known": config(bits, port_type, acs, &patch)}),
        };
        places.push(json!({
            "function": {
                "address": address, "vendor_id": 0x8086, "device_id": u16::from(acs) << 4 | 0x2000, "class": 0x30000,
                "driver": DRIVERS[usize::from(slot) % DRIVERS.len()],
                "iommu_group": null, "numa_node": null, "bars": [], "link": null, "drm_nodes": [],
                "memory_enabled": null,
            },
            "above": above,
            "config": config,
            "iommu_domain": if bits & 16 != 0 { Some("DMA-FQ") } else { None },
            "physical_function": null,
        }));
    }
    json!({
        "format": "peervram-topology", "version": 1,
        "kernel_release": {"known": if is_trusted { "7.3.4" } else { "7.1.0" }},
        "command_line": {"unread": "no"}, "boot_id": {"unread": "no"},
        "cpu": {"known": {"vendor": vendor, "family": family, "model": null, "name": null, "microcode": null}},
        "order": {"known": null},
        "places": places,
    })
}

fn config(bits: u8, port_type: u8, acs: u8, patch: &[u8]) -> Value {
    let size_bytes = if bits & 8 != 0 { 256 } else { 512 };
    let mut bytes = vec![0_u8; size_bytes];
    bytes[6] = 0x10;
    bytes[0x0e] = port_type >> 4;
    bytes[0x34] = 0x40;
    bytes[0x40] = 0x10;
    bytes[0x42] = port_type << 4;
    bytes[0x43] = 1;
    if size_bytes > 256 {
        bytes[0x100..0x104].copy_from_slice(&0x0001_000d_u32.to_le_bytes());
        bytes[0x104] = 0x5f;
        bytes[0x106] = acs;
    }
    if let [low, high, rest @ ..] = patch {
        let at = usize::from(u16::from_le_bytes([*low, *high])) % size_bytes;
        for (place, byte) in bytes[at..].iter_mut().zip(rest) {
            *place = *byte;
        }
    }
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    // Beyond what was written, nothing was read.
    json!({"size_bytes": if size_bytes == 256 { 256 } else { 4096 }, "bytes": digits})
}
