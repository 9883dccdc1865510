//! amdgpu, include/uapi/drm/amdgpu_drm.h: what a submission lists is mapped for it, all of it or the submission fails.
#![expect(unsafe_code, reason = "reads what a driver passes")]

use core::ffi::{c_int, c_ulong, c_void};

use rustix::io::Errno;
use rustix::ioctl::opcode;

use crate::talk::{self, Call};
use crate::{Driver, imports, next};

/// Requests of the driver begin here: `DRM_COMMAND_BASE`.
const COMMANDS: u8 = 0x40;
const GEM_CREATE: u8 = COMMANDS;
pub const GEM_MMAP: u8 = COMMANDS + 0x01;
const SUBMIT: u8 = COMMANDS + 0x04;
const GEM_VA: u8 = COMMANDS + 0x08;
const GEM_OP: u8 = COMMANDS + 0x10;

const CHUNK_OF_HANDLES: u32 = 0x06;
const MAP: u32 = 1;
const GET_CREATE_INFO: u32 = 0;
/// `AMDGPU_GEM_DOMAIN_GTT`: where the kernel puts what is imported (`amdgpu_dma_buf_create_obj`).
const GTT: u64 = 0x2;

/// `union drm_amdgpu_gem_create`, of which `out` is the handle.
#[repr(C)]
struct GemCreate {
    size_bytes: u64,
    alignment_bytes: u64,
    domains: u64,
    flags: u64,
}

/// `struct drm_amdgpu_cs_in`.
#[repr(C)]
struct Submission {
    context: u32,
    list: u32,
    count: u32,
    flags: u32,
    chunks: *const *const Chunk,
}

/// `struct drm_amdgpu_cs_chunk`.
#[repr(C)]
struct Chunk {
    id: u32,
    length_words: u32,
    data: *const c_void,
}

/// `struct drm_amdgpu_bo_list_in`.
#[repr(C)]
struct Handles {
    operation: u32,
    list: u32,
    count: u32,
    entry_bytes: u32,
    entries: *const u8,
}

/// `struct drm_amdgpu_gem_va`, its beginning.
#[repr(C)]
struct GemVa {
    handle: u32,
    padding: u32,
    operation: u32,
}

/// `struct drm_amdgpu_gem_op`, its beginning.
#[repr(C)]
struct GemOp {
    handle: u32,
    operation: u32,
    value: *mut GemCreate,
}

pub struct Amdgpu;

impl Driver for Amdgpu {
    fn stand_in(&self, file: c_int, size_bytes: u64) -> Result<u32, Errno> {
        let mut create = GemCreate { size_bytes, alignment_bytes: 4096, domains: GTT, flags: 0 };
        let request = opcode::read_write::<GemCreate>(b'd', GEM_CREATE);
        // SAFETY: the request wants this structure.
        let result = unsafe { next::ioctl(file, c_ulong::from(request), (&raw mut create).cast()) };
        // The shim returns what the kernel would, not what the C library does.
        if result != 0 {
            return Err(Errno::NOMEM);
        }
        // The handle is at the beginning of the answer.
        Ok(create.size_bytes as u32)
    }

    unsafe fn answer(&self, file: c_int, number: u8, argument: *mut c_void) -> Option<Result<(), Errno>> {
        match number {
            // SAFETY: each request wants this structure, or one that begins with it.
            SUBMIT => Some(unsafe { submit(file, &*argument.cast::<Submission>()) }),
            // SAFETY: as above.
            GEM_VA => unsafe { map_address(file, &*argument.cast::<GemVa>()) },
            // SAFETY: as above.
            GEM_OP => unsafe { describe(file, &*argument.cast::<GemOp>()) },
            _ => None,
        }
    }
}

/// What `amdgpu_cs_ioctl` does with what is listed: each import is mapped if it is not.
///
/// # Safety
/// What it points to is there.
unsafe fn submit(file: c_int, submission: &Submission) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    let said: Vec<_> =
        unsafe { listed(submission) }.filter_map(|handle| imports::map(file, handle)).collect();
    talk::submitted(said.len());
    if !said.is_empty() {
        talk::asked(Call::Submit)?;
    }
    said.into_iter().collect()
}

/// The handles that a submission lists.
///
/// # Safety
/// What it points to is there for as long as the handles are taken.
unsafe fn listed(submission: &Submission) -> impl Iterator<Item = u32> {
    // SAFETY: the caller's promise.
    let chunks = unsafe { core::slice::from_raw_parts(submission.chunks, submission.count as usize) };
    // SAFETY: as above.
    let chunks = chunks.iter().map(|&chunk| unsafe { &*chunk });
    chunks.filter(|chunk| chunk.id == CHUNK_OF_HANDLES).flat_map(|chunk| {
        // SAFETY: a chunk of this kind has this structure.
        let handles = unsafe { &*chunk.data.cast::<Handles>() };
        (0..handles.count as usize).map(move |number| {
            // SAFETY: there are so many entries of that size, and each begins with the handle.
            unsafe {
                handles.entries.add(number * handles.entry_bytes as usize).cast::<u32>().read_unaligned()
            }
        })
    })
}

/// An import that is given an address is not mapped by that (`amdgpu_gem_va_update_vm` writes page tables for what is mapped
/// already).
unsafe fn map_address(file: c_int, asked: &GemVa) -> Option<Result<(), Errno>> {
    if asked.operation != MAP || imports::size_bytes(file, asked.handle).is_none() {
        return None;
    }
    talk::asked(Call::MapAddress).err().map(Err)
}

/// How big an import is, and where.
unsafe fn describe(file: c_int, asked: &GemOp) -> Option<Result<(), Errno>> {
    if asked.operation != GET_CREATE_INFO {
        return None;
    }
    let size_bytes = imports::size_bytes(file, asked.handle)?;
    // SAFETY: this operation wants a structure to be written to.
    unsafe { asked.value.write(GemCreate { size_bytes, alignment_bytes: 4096, domains: GTT, flags: 0 }) };
    Some(Ok(()))
}
