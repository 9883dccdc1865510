//! IOMMU groups, predicted: functions that could reach each other past the IOMMU.
//!
//! `pci_device_group` in `drivers/iommu/iommu.c`, recomputed in the order in which the kernel found the
//! functions: up to the last bridge that makes others' requests its own (conventional PCI), then up to where
//! all ports above isolate (ACS), then the other functions of the slot. The kernel also knows devices that
//! isolate without saying so, and some that use others' requester ids (`drivers/pci/quirks.c`); those are not
//! known here, so a prediction is compared with another prediction and not with what sysfs says.

use std::collections::HashMap;

use super::{Above, Acs, ConfigSpace, Place, PortType, Reading, Search, Topology};
use crate::PciAddress;

impl Topology {
    /// The groups, each with its functions in order.
    ///
    /// # Errors
    /// What was not read, and would decide; or bridges that run in a circle, as none that a machine has.
    pub fn predicted_iommu_groups(&self) -> Result<Vec<Vec<PciAddress>>, String> {
        self.check()?;
        let by_address: HashMap<PciAddress, &Place> =
            self.places.iter().map(|place| (place.address(), place)).collect();
        let mut groups = Groups { by_address, of: HashMap::new(), members: Vec::new() };
        for place in &self.places {
            let group = groups.find(self, place)?;
            groups.join(place.address(), group);
        }
        Ok(groups.members)
    }
}

struct Groups<'a> {
    by_address: HashMap<PciAddress, &'a Place>,
    of: HashMap<PciAddress, usize>,
    members: Vec<Vec<PciAddress>>,
}

impl<'a> Groups<'a> {
    fn join(&mut self, function: PciAddress, group: Option<usize>) {
        let group = group.unwrap_or_else(|| {
            self.members.push(Vec::new());
            self.members.len() - 1
        });
        self.members[group].push(function);
        self.of.insert(function, group);
    }

    /// The bridge above a function; none on a root bus.
    fn bridge(&self, place: &Place) -> Result<Option<&'a Place>, String> {
        match &place.above {
            Above::HostBridge(_) => Ok(None),
            Above::Bridge(bridge) => {
                let found = self.by_address.get(bridge);
                Ok(Some(
                    found
                        .ok_or_else(|| format!("the bridge {bridge} above {} is missing", place.address()))?,
                ))
            }
        }
    }

    /// The group that a function would be put into, if it is not a new one.
    fn find(&self, topology: &Topology, place: &'a Place) -> Result<Option<usize>, String> {
        let mut at = place;
        // pci_for_each_dma_alias
        let mut below = place;
        while let Some(bridge) = self.bridge(below)? {
            if takes_requests_over(bridge)? {
                if let Some(&group) = self.of.get(&bridge.address()) {
                    return Ok(Some(group));
                }
                at = bridge;
            }
            below = bridge;
        }
        while let Some(bridge) = self.bridge(at)? {
            if self.isolates_up_to_the_root(bridge)? {
                break;
            }
            if let Some(&group) = self.of.get(&bridge.address()) {
                return Ok(Some(group));
            }
            at = bridge;
        }
        self.of_the_slot(topology, at)
    }

    /// `pci_acs_path_enabled`
    fn isolates_up_to_the_root(&self, bridge: &'a Place) -> Result<bool, String> {
        let mut at = Some(bridge);
        while let Some(bridge) = at {
            if !isolates(bridge)? {
                return Ok(false);
            }
            at = self.bridge(bridge)?;
        }
        Ok(true)
    }

    /// `get_pci_function_alias_group`
    fn of_the_slot(&self, topology: &Topology, place: &Place) -> Result<Option<usize>, String> {
        if !is_one_of_several(place)? || isolates(place)? {
            return Ok(None);
        }
        let PciAddress { domain, bus, device, .. } = place.address();
        for other in topology.places() {
            let address = other.address();
            let is_in_the_slot = (address.domain, address.bus, address.device) == (domain, bus, device);
            if is_in_the_slot
                && address != place.address()
                && let Some(&group) = self.of.get(&address)
                && !isolates(other)?
            {
                return Ok(Some(group));
            }
        }
        Ok(None)
    }
}

fn config(place: &Place) -> Result<&ConfigSpace, String> {
    match &place.config {
        Reading::Unread(why) => Err(format!("{} was not read: {why}", place.address())),
        Reading::Known(config) if config.is_all_ones() => Err(format!("{} does not answer", place.address())),
        Reading::Known(config) => Ok(config),
    }
}

fn read<T>(place: &Place, search: Search<T>) -> Result<Option<T>, String> {
    match search {
        Search::Found(value) => Ok(Some(value)),
        Search::Absent => Ok(None),
        Search::Unread => Err(format!("the configuration space of {} was not read as far", place.address())),
    }
}

/// Whether a bridge's own id is on what comes from below it.
fn takes_requests_over(bridge: &Place) -> Result<bool, String> {
    let port_type = read(bridge, config(bridge)?.port_type())?;
    let passes = [PortType::RootPort, PortType::Upstream, PortType::Downstream];
    Ok(port_type.is_none_or(|port_type| !passes.contains(&port_type)))
}

fn is_one_of_several(place: &Place) -> Result<bool, String> {
    Ok(place.address().function != 0 || config(place)?.is_multifunction().unwrap_or(false))
}

/// `pci_acs_enabled`, without the devices that the kernel knows to isolate all the same.
fn isolates(place: &Place) -> Result<bool, String> {
    let Some(port_type) = read(place, config(place)?.port_type())? else { return Ok(false) };
    let says_so = || Ok(read(place, config(place)?.acs())?.is_some_and(Acs::isolates));
    match port_type {
        PortType::ToPci | PortType::FromPci | PortType::Other(_) => Ok(false),
        PortType::RootPort | PortType::Downstream => says_so(),
        PortType::Endpoint | PortType::Upstream | PortType::RootComplexEndpoint => {
            if is_one_of_several(place)? { says_so() } else { Ok(true) }
        }
    }
}
