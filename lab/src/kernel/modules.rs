//! Which kernel modules to load, in which order: depmod's `modules.dep`, read.

use anyhow::{Context, Result};
use std::collections::HashMap;

/// The files to load for `wanted`, dependencies first, each once. Modules that are built into
/// the kernel need no file.
pub fn load_order(dependencies: &str, builtin: &str, wanted: &[&str]) -> Result<Vec<String>> {
    let modules: HashMap<String, (&str, Vec<&str>)> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needs)| (name_of(file), (file, needs.split_whitespace().collect())))
        .collect();
    let mut order: Vec<String> = Vec::new();
    for name in wanted {
        let name = name.replace('-', "_");
        if builtin.lines().any(|file| name_of(file) == name) {
            continue;
        }
        let (file, needs) = modules
            .get(&name)
            .with_context(|| format!("this kernel has no module {name}, built in or loadable"))?;
        // depmod lists all that a module needs, the deepest last.
        for file in needs.iter().rev().chain([file]) {
            if !order.iter().any(|loaded| loaded == file) {
                order.push((*file).to_string());
            }
        }
    }
    Ok(order)
}

/// The kernel's name for the module in a file: no folder, no suffix, underscores.
pub fn name_of(file: &str) -> String {
    let file = file.rsplit('/').next().unwrap_or(file);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "\
kernel/vfio/pci/vfio-pci.ko.xz: kernel/vfio/pci/vfio-pci-core.ko.xz kernel/vfio/vfio.ko.xz
kernel/vfio/pci/vfio-pci-core.ko.xz: kernel/vfio/vfio.ko.xz
kernel/vfio/vfio_iommu_type1.ko.xz: kernel/vfio/vfio.ko.xz
kernel/vfio/vfio.ko.xz:
";

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let order = load_order(DEPENDENCIES, "", &["vfio_iommu_type1", "vfio_pci"]).unwrap();
        assert_eq!(
            order.iter().map(|file| name_of(file)).collect::<Vec<_>>(),
            ["vfio", "vfio_iommu_type1", "vfio_pci_core", "vfio_pci"]
        );
    }

    #[test]
    fn built_in_modules_need_no_file() {
        let builtin = "kernel/drivers/virtio/virtio_pci.ko\n";
        assert!(load_order(DEPENDENCIES, builtin, &["virtio-pci"]).unwrap().is_empty());
    }

    #[test]
    fn an_absent_module_is_named() {
        let error = load_order(DEPENDENCIES, "", &["i915"]).unwrap_err();
        assert!(error.to_string().contains("i915"));
    }
}
