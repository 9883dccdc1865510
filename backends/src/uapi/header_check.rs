//! Checks hand-written definitions against the kernel's own headers, by compiling both.
//!
//! The headers must be of a kernel that has the features (Linux 6.19 and later for VFIO dma-bufs).
//! `PEERVRAM_KERNEL_HEADERS` names the folder that holds `linux/vfio.h`; `cargo xtask test` sets
//! it to those of the lab's private root.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;

use crate::host::udmabuf;
use crate::uapi::vfio::{
    DEPENDENT_DEVICE_BYTES, DmaBufRequest, HOT_RESET_HEADER_BYTES, IrqSetEventfd, OPCODES,
};
use crate::uapi::{dma_buf, iommufd, sync_file};
use crate::vfio::header_claims;

/// The C statements that fail to compile where a number or a layout differs.
fn assertions() -> String {
    let mut program = String::from("#include <stddef.h>\n");
    for header in ["dma-buf", "fcntl", "iommufd", "magic", "pci_regs", "sync_file", "udmabuf", "vfio"] {
        let _ = writeln!(program, "#include <linux/{header}.h>");
    }
    let mut claim = |text: String| {
        let _ = writeln!(program, "_Static_assert({text}, \"{text}\");");
    };
    for (name, number) in OPCODES.into_iter().chain(iommufd::OPCODES) {
        claim(format!("{name} == {number:#x}"));
    }
    let header = "offsetof(struct vfio_device_feature, data)";
    let offsets = [
        (
            "offsetof(struct vfio_device_feature, argsz)".to_owned(),
            std::mem::offset_of!(DmaBufRequest, argsz),
        ),
        (
            "offsetof(struct vfio_device_feature, flags)".to_owned(),
            std::mem::offset_of!(DmaBufRequest, feature_flags),
        ),
        (dma_buf_field(header, "region_index"), std::mem::offset_of!(DmaBufRequest, region_index)),
        (dma_buf_field(header, "open_flags"), std::mem::offset_of!(DmaBufRequest, open_flags)),
        (dma_buf_field(header, "flags"), std::mem::offset_of!(DmaBufRequest, flags)),
        (dma_buf_field(header, "nr_ranges"), std::mem::offset_of!(DmaBufRequest, nr_ranges)),
        (dma_buf_field(header, "dma_ranges"), size_of::<DmaBufRequest>()),
        ("sizeof(struct vfio_region_dma_range)".to_owned(), 16),
        ("offsetof(struct vfio_region_dma_range, offset)".to_owned(), 0),
        ("offsetof(struct vfio_region_dma_range, length)".to_owned(), 8),
        ("sizeof(struct vfio_irq_info)".to_owned(), 16),
        ("offsetof(struct vfio_irq_set, index)".to_owned(), std::mem::offset_of!(IrqSetEventfd, index)),
        ("offsetof(struct vfio_irq_set, start)".to_owned(), std::mem::offset_of!(IrqSetEventfd, start)),
        ("offsetof(struct vfio_irq_set, count)".to_owned(), std::mem::offset_of!(IrqSetEventfd, count)),
        ("offsetof(struct vfio_irq_set, data)".to_owned(), std::mem::offset_of!(IrqSetEventfd, eventfd)),
        ("offsetof(struct vfio_pci_hot_reset, count)".to_owned(), 8),
        ("offsetof(struct vfio_pci_hot_reset, group_fds)".to_owned(), HOT_RESET_HEADER_BYTES),
        ("DMA_BUF_NAME_LEN".to_owned(), dma_buf::NAME_BYTES_MAX),
        // The set of a hot reset is read by offset, too.
        ("offsetof(struct vfio_pci_hot_reset_info, count)".to_owned(), 8),
        ("offsetof(struct vfio_pci_hot_reset_info, devices)".to_owned(), HOT_RESET_HEADER_BYTES),
        ("sizeof(struct vfio_pci_dependent_device)".to_owned(), DEPENDENT_DEVICE_BYTES),
        ("offsetof(struct vfio_pci_dependent_device, segment)".to_owned(), 4),
        ("offsetof(struct vfio_pci_dependent_device, bus)".to_owned(), 6),
        ("offsetof(struct vfio_pci_dependent_device, devfn)".to_owned(), 7),
        // `Region::parse` reads these by offset.
        ("sizeof(struct vfio_region_info)".to_owned(), crate::region::INFO_BYTES),
        ("offsetof(struct vfio_region_info, flags)".to_owned(), 4),
        ("offsetof(struct vfio_region_info, index)".to_owned(), 8),
        ("offsetof(struct vfio_region_info, cap_offset)".to_owned(), 12),
        ("offsetof(struct vfio_region_info, size)".to_owned(), 16),
        ("offsetof(struct vfio_region_info, offset)".to_owned(), 24),
        ("offsetof(struct vfio_info_cap_header, next)".to_owned(), 4),
        ("offsetof(struct vfio_region_info_cap_sparse_mmap, nr_areas)".to_owned(), 8),
        ("offsetof(struct vfio_region_info_cap_sparse_mmap, areas)".to_owned(), 16),
        ("VFIO_REGION_INFO_CAP_SPARSE_MMAP".to_owned(), 1),
        ("VFIO_REGION_INFO_CAP_TYPE".to_owned(), 2),
        ("VFIO_REGION_INFO_CAP_MSIX_MAPPABLE".to_owned(), 3),
        ("VFIO_REGION_INFO_FLAG_CAPS".to_owned(), 1 << 3),
    ];
    for (expression, value) in offsets {
        claim(format!("{expression} == {value}"));
    }
    let claims = (udmabuf::claims().into_iter())
        .chain(sync_file::claims())
        .chain(dma_buf::claims())
        .chain(header_claims());
    #[cfg(feature = "drm")]
    let claims = claims.chain(crate::uapi::fcntl::claims());
    for (expression, value) in claims {
        claim(format!("{expression} == {value}"));
    }
    program
}

fn dma_buf_field(header: &str, field: &str) -> String {
    format!("{header} + offsetof(struct vfio_device_feature_dma_buf, {field})")
}

fn compile(headers: &PathBuf, program: &str) -> std::process::Output {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("claims.c");
    std::fs::write(&source, program).unwrap();
    Command::new("cc")
        .args(["-fsyntax-only", "-isystem"])
        .arg(headers)
        .arg("-isystem")
        .arg(headers.join(format!("{}-linux-gnu", std::env::consts::ARCH)))
        .arg(&source)
        .output()
        .unwrap()
}

#[test]
fn numbers_and_layouts_are_the_kernels() {
    let Some(headers) = std::env::var_os("PEERVRAM_KERNEL_HEADERS").map(PathBuf::from) else {
        eprintln!("skipped: numbers_and_layouts_are_the_kernels: PEERVRAM_KERNEL_HEADERS is not set");
        return;
    };
    let output = compile(&headers, &assertions());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // The check itself can fail: a false claim does not compile.
    let output =
        compile(&headers, "#include <linux/vfio.h>\n_Static_assert(VFIO_DEVICE_RESET == 1, \"\");\n");
    assert!(!output.status.success());
}
