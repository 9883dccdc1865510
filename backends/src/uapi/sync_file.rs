//! `include/uapi/linux/sync_file.h`.
#![expect(unsafe_code, reason = "ioctl")]

use std::os::fd::AsFd;

use bytemuck::Zeroable;
use rustix::io::Result;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// `SYNC_IOC_FILE_INFO`.
const FILE_INFO: Opcode = opcode::read_write::<SyncFileInfo>(b'>', 4);

/// `struct sync_file_info`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SyncFileInfo {
    pub name: [u8; 32],
    /// 1 signalled, 0 not yet, negative an errno.
    pub status: i32,
    pub flags: u32,
    pub num_fences: u32,
    pub pad: u32,
    pub sync_fence_info: u64,
}

/// What the above says of the kernel's header, for the test that compiles it.
#[cfg(all(test, feature = "vfio", feature = "host"))]
pub fn claims() -> [(&'static str, usize); 7] {
    use std::mem::offset_of;
    [
        ("SYNC_IOC_FILE_INFO", FILE_INFO as usize),
        ("sizeof(struct sync_file_info)", size_of::<SyncFileInfo>()),
        ("offsetof(struct sync_file_info, status)", offset_of!(SyncFileInfo, status)),
        ("offsetof(struct sync_file_info, flags)", offset_of!(SyncFileInfo, flags)),
        ("offsetof(struct sync_file_info, num_fences)", offset_of!(SyncFileInfo, num_fences)),
        ("offsetof(struct sync_file_info, pad)", offset_of!(SyncFileInfo, pad)),
        ("offsetof(struct sync_file_info, sync_fence_info)", offset_of!(SyncFileInfo, sync_fence_info)),
    ]
}

/// The state of the fences together, without a list of them. ENOTTY of a file that is no sync_file.
pub fn file_info(sync_file: impl AsFd) -> Result<SyncFileInfo> {
    let mut info = SyncFileInfo::zeroed();
    // SAFETY: the kernel reads and writes one sync_file_info; with room for no fence it follows no
    // pointer in it (sync_file_ioctl_fence_info).
    unsafe { ioctl(sync_file, Updater::<FILE_INFO, _>::new(&mut info)) }?;
    Ok(info)
}
