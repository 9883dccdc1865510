//! Barriers between memory and a device's registers.
//!
//! A processor may let a store to ordinary memory be seen after a later store to a register, and a load of ordinary
//! memory be made before an earlier load of one. `std::sync::atomic::fence` orders them for other *processors* only: on
//! arm64 it is `dmb ish`, which does not reach the outer shareable domain where devices are. What stands here is what
//! Linux has before `writel` and after `readl` (`arch/*/include/asm/io.h`).
//!
//! What is ordered on arm64, and how it is mapped (read in Linux 7.3):
//!
//! | memory | attribute | by |
//! |---|---|---|
//! | a BAR: registers, and VRAM behind it | Device-nGnRnE | `pgprot_noncached` in `vfio_pci_core_mmap`, prefetchable or not |
//! | nvgrace's reserved memory | Normal, not cached | `pgprot_writecombine` in `nvgrace_gpu_mmap` |
//! | nvgrace's usable memory, host memory | Normal, write-back | neither changes it |
//!
//! Accesses to Device memory of one peripheral are made in the order of the program, and none is merged, repeated or
//! made early: two of the first row need nothing between them. Accesses to Normal memory, cached or not, are ordered
//! with them by a barrier alone (Arm Architecture Reference Manual, B2.3). `dmb` is enough, and `dsb` waits for nothing
//! more that matters here: order is asked for, and not that a store has arrived, which only a read from the device
//! tells. Linux' `readl` has a dummy branch besides, for `udelay` after it, which nothing here has.
#![expect(unsafe_code, reason = "barriers that only the processor's own instructions are")]

/// Before a register is written that announces what was stored (a *doorbell*): all earlier stores, to host memory and
/// to write-combined device memory, come first.
#[inline]
pub(super) fn before_doorbell() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: an instruction of every x86-64 processor. Stores to uncached memory come after those to cached memory
    // by themselves, and not after those to write-combined memory, whose buffers this empties.
    unsafe {
        std::arch::asm!("sfence", options(nostack, preserves_flags));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier, which changes no register. Outer shareable, stores (`__io_bw`, which is `dma_wmb`).
    unsafe {
        std::arch::asm!("dmb oshst", options(nostack, preserves_flags));
    }
    #[cfg(any(target_arch = "riscv64", target_arch = "riscv32"))]
    // SAFETY: a barrier, which changes no register. Stores to memory before output (`__io_bw`).
    unsafe {
        std::arch::asm!("fence w, o", options(nostack, preserves_flags));
    }
    #[cfg(not(any(
        target_arch = "x86_64",
        target_arch = "aarch64",
        target_arch = "riscv64",
        target_arch = "riscv32"
    )))]
    compile_error!("which barrier comes before a doorbell is not known for this architecture");
}

/// After a register was read that tells of what a device stored: all later loads come after it.
#[inline]
pub(super) fn after_status() {
    #[cfg(target_arch = "x86_64")]
    // Loads stay in order, of uncached memory and of cached; the compiler is to be held, too.
    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier, which changes no register. Outer shareable, loads (`__io_ar`, which is `dma_rmb`).
    unsafe {
        std::arch::asm!("dmb oshld", options(nostack, preserves_flags));
    }
    #[cfg(any(target_arch = "riscv64", target_arch = "riscv32"))]
    // SAFETY: a barrier, which changes no register. Input before loads of memory (`__io_ar`).
    unsafe {
        std::arch::asm!("fence i, r", options(nostack, preserves_flags));
    }
}

#[cfg(all(test, any(target_arch = "x86_64", target_arch = "aarch64")))]
mod tests {
    use super::*;

    /// Whether an instruction is among the first of a function.
    fn begins_with(function: fn(), instruction: &[u8]) -> bool {
        // SAFETY: code of this program, which is readable and longer than what is looked at of it.
        let code = unsafe { std::slice::from_raw_parts(function as *const u8, 64) };
        code.windows(instruction.len()).any(|bytes| bytes == instruction)
    }

    /// Their effect on the order of stores cannot be tested for sure. A `fence(SeqCst)` is another instruction.
    #[test]
    fn the_barriers_are_those_of_linux() {
        #[cfg(target_arch = "x86_64")]
        assert!(begins_with(before_doorbell, &[0x0f, 0xae, 0xf8]), "no sfence");
        #[cfg(target_arch = "aarch64")]
        {
            assert!(begins_with(before_doorbell, &0xd503_32bf_u32.to_le_bytes()), "no dmb oshst");
            assert!(begins_with(after_status, &0xd503_31bf_u32.to_le_bytes()), "no dmb oshld");
        }
    }
}
