//! Foresight: whether an import may be tried whose refusal would cost the importer its device.
//!
//! Most importers answer a map that the kernel refuses with an error, and trying is the best way to know. Some Vulkan
//! drivers lose the `VkDevice` ([`OnRefusal::LosesDevice`]): at the import, or at the next submission, whatever that works
//! on. For these the kernel's answer is predicted from the topology, before anything is imported:
//!
//! | prediction | import |
//! |---|---|
//! | the kernel maps | is made |
//! | it refuses | is not made, and the error says so |
//! | not known | is made with [`Trust::Unverified`](crate::Trust::Unverified), or where a current certificate shows that the path has worked |
//!
//! Absent: memory of others than VFIO. Their exporters have ways of their own where two devices cannot be peers.

use peervram_backends::topology::{Expected, MapType, SEVERAL_RANGES, Topology};
use peervram_backends::{Error, Importer, Kind, OnRefusal, PciAddress, pci};

use crate::Result;
use crate::export_inner::ExportInner;

const TRIED: &str = "import a dma-buf";

/// What is expected of a map.
#[derive(Debug, PartialEq, Eq)]
enum Prediction {
    Maps,
    Refuses,
    /// Nobody can say, because of this.
    Unknown(String),
}

/// Refuses an import that would, or without `may_dare` could, cost the importer its device.
///
/// # Errors
/// [`Kind::RouteRefused`] where the kernel is expected to refuse; [`Kind::Unverified`] where that is not known.
pub(crate) fn check<I: Importer>(
    export: &ExportInner,
    importer: &I,
    may_dare: impl FnOnce() -> bool,
) -> Result<()> {
    if importer.on_refusal() == OnRefusal::ImportFails || !importer.governed_by_p2pdma() {
        return Ok(());
    }
    let Some(exporter) = export.device().exporter()?.pci_address().filter(is_vfio) else { return Ok(()) };
    let driver = importer.driver().unwrap_or_else(|| "its driver".into());
    let error = match predict(export, exporter, importer.pci_address()) {
        Prediction::Maps => return Ok(()),
        Prediction::Refuses => {
            let why = format!(
                "the kernel is expected to refuse it, which under {driver} loses the VkDevice: not tried"
            );
            Error::new(Kind::RouteRefused, TRIED, why)
        }
        Prediction::Unknown(_) if may_dare() => {
            tracing::info!(importer = importer.name(), "an import is tried that the kernel may refuse");
            return Ok(());
        }
        Prediction::Unknown(because) => {
            let why = format!(
                "whether the kernel maps it is not known ({because}), and under {driver} a refusal loses the VkDevice: \
                 not tried"
            );
            Error::new(Kind::Unverified, TRIED, why).next(
                "peervram verify, as root, tests it in a process of its own; Trust::Unverified tries it here",
            )
        }
    };
    Err(error.on(importer.name()))
}

fn is_vfio(address: &PciAddress) -> bool {
    address.driver().is_some_and(|driver| pci::is_vfio_driver(&driver))
}

fn predict(export: &ExportInner, exporter: PciAddress, importer: Option<PciAddress>) -> Prediction {
    let Some(importer) = importer else {
        return Prediction::Unknown("the importer's driver does not tell where its device is".into());
    };
    // All of it: who is first on a root bus decides what the kernel knows of its host bridge.
    let topology = match Topology::read() {
        Ok(topology) => topology,
        Err(error) => return Prediction::Unknown(error.to_string()),
    };
    let several = export.aperture().ranges().as_slice().len() > 1;
    let maps_all = !(several && topology.has_fault(&SEVERAL_RANGES) && pci::is_translated(importer));
    judge(&topology.expected_map_type(exporter, importer).expected, maps_all)
}

/// What the kernel's verdict means, where through a host bridge it `maps_all` ranges or the first only ([`SEVERAL_RANGES`]).
fn judge(expected: &Expected, maps_all: bool) -> Prediction {
    let maps = |map_type: &MapType| match map_type {
        MapType::BusAddress => true,
        MapType::ThroughHostBridge => maps_all,
        MapType::NotSupported => false,
    };
    match expected {
        Expected::Known(map_type) if maps(map_type) => Prediction::Maps,
        Expected::Known(_) => Prediction::Refuses,
        Expected::Unknown { possible, .. } if possible.iter().all(maps) => Prediction::Maps,
        Expected::Unknown { because, .. } => Prediction::Unknown(because.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_certain_to_be_mapped_is_imported_and_nothing_else() {
        use MapType::{BusAddress, NotSupported, ThroughHostBridge};
        let known = |map_type, maps_all| judge(&Expected::Known(map_type), maps_all);
        assert_eq!(known(BusAddress, false), Prediction::Maps);
        assert_eq!(known(ThroughHostBridge, true), Prediction::Maps);
        assert_eq!(known(ThroughHostBridge, false), Prediction::Refuses);
        assert_eq!(known(NotSupported, true), Prediction::Refuses);

        let unknown = |possible: &[MapType], maps_all| {
            judge(
                &Expected::Unknown { possible: possible.to_vec(), because: vec!["a".into(), "b".into()] },
                maps_all,
            )
        };
        let because = Prediction::Unknown("a; b".into());
        assert_eq!(unknown(&[BusAddress, ThroughHostBridge], true), Prediction::Maps);
        assert_eq!(unknown(&[BusAddress, ThroughHostBridge], false), because);
        assert_eq!(unknown(&[BusAddress, NotSupported], true), because);
    }
}
