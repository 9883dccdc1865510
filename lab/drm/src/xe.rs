//! xe, include/uapi/drm/xe_drm.h: an Arc B580, as far as ANV asks. What is bound is mapped at once, and again for every
//! submission to its address space.
//!
//! The node, its files and memory are those of amdgpu's drm-shim: Mesa has none for xe.
#![expect(unsafe_code, reason = "reads and writes what a driver passes")]

use core::ffi::{c_char, c_int, c_ulong, c_void};

use rustix::io::Errno;
use rustix::ioctl::opcode;

use crate::amdgpu::{self, Amdgpu};
use crate::talk::{self, Call};
use crate::{Driver, Identity, imports, next};

const VERSION: u8 = 0x00;

/// Requests of the driver begin here: `DRM_COMMAND_BASE`; and end before this.
const COMMANDS: u8 = 0x40;
const COMMANDS_END: u8 = 0xa0;
const DEVICE_QUERY: u8 = COMMANDS;
const GEM_CREATE: u8 = COMMANDS + 0x01;
const GEM_MMAP_OFFSET: u8 = COMMANDS + 0x02;
const VM_CREATE: u8 = COMMANDS + 0x03;
const VM_DESTROY: u8 = COMMANDS + 0x04;
const VM_BIND: u8 = COMMANDS + 0x05;
const QUEUE_CREATE: u8 = COMMANDS + 0x06;
const QUEUE_DESTROY: u8 = COMMANDS + 0x07;
const QUEUE_GET_PROPERTY: u8 = COMMANDS + 0x08;
const EXEC: u8 = COMMANDS + 0x09;
const WAIT_USER_FENCE: u8 = COMMANDS + 0x0a;

const OP_MAP: u32 = 0;

/// What the GPU is: `INTEL_BMG_G21_IDS` of include/drm/intel/pciids.h.
const B580: Identity = Identity { vendor: 0x8086, device: 0xe20b };

/// `struct drm_version`.
#[repr(C)]
struct Version {
    numbers: [c_int; 3],
    name_bytes: usize,
    name: *mut c_char,
    date_bytes: usize,
    date: *mut c_char,
    description_bytes: usize,
    description: *mut c_char,
}

/// `struct drm_xe_device_query`, its beginning.
#[repr(C)]
struct Query {
    extensions: u64,
    query: u32,
    size: u32,
    data: *mut u8,
}

/// `struct drm_xe_gem_create`, its beginning.
#[repr(C)]
struct GemCreate {
    extensions: u64,
    size_bytes: u64,
    placement: u32,
    flags: u32,
    vm: u32,
    handle: u32,
}

/// `struct drm_xe_gem_mmap_offset`, its beginning.
#[repr(C)]
struct MmapOffset {
    extensions: u64,
    handle: u32,
    flags: u32,
    offset: u64,
}

/// `struct drm_xe_vm_create`, its beginning.
#[repr(C)]
struct VmCreate {
    extensions: u64,
    flags: u32,
    vm: u32,
}

/// `struct drm_xe_exec_queue_create`, its beginning.
#[repr(C)]
struct QueueCreate {
    extensions: u64,
    width: u16,
    placements: u16,
    vm: u32,
    flags: u32,
    queue: u32,
}

/// `struct drm_xe_exec_queue_get_property`, its beginning.
#[repr(C)]
struct QueueProperty {
    extensions: u64,
    queue: u32,
    property: u32,
    value: u64,
}

/// `struct drm_xe_vm_bind_op`.
#[repr(C)]
#[derive(Clone, Copy)]
struct BindOp {
    extensions: u64,
    handle: u32,
    cache: u32,
    offset: u64,
    range: u64,
    address: u64,
    op: u32,
    flags: u32,
    region: u32,
    padding: u32,
    reserved: [u64; 3],
}

/// `struct drm_xe_vm_bind`, its beginning. With several operations the place of the one has their address.
#[repr(C)]
struct VmBind {
    extensions: u64,
    vm: u32,
    queue: u32,
    padding: u32,
    count: u32,
    one: BindOp,
}

pub struct Xe;

impl Driver for Xe {
    fn stand_in(&self, file: c_int, size_bytes: u64) -> Result<u32, Errno> {
        Amdgpu.stand_in(file, size_bytes)
    }

    fn identity(&self) -> Option<Identity> {
        Some(B580)
    }

    unsafe fn answer(&self, file: c_int, number: u8, argument: *mut c_void) -> Option<Result<(), Errno>> {
        // SAFETY: each request wants this structure, or one that begins with it.
        unsafe {
            Some(match number {
                VERSION => name(&mut *argument.cast::<Version>()),
                DEVICE_QUERY => query(&mut *argument.cast::<Query>()),
                GEM_CREATE => create(file, &mut *argument.cast::<GemCreate>()),
                GEM_MMAP_OFFSET => map_offset(file, &mut *argument.cast::<MmapOffset>()),
                VM_CREATE => {
                    (*argument.cast::<VmCreate>()).vm = 1;
                    Ok(())
                }
                QUEUE_CREATE => {
                    (*argument.cast::<QueueCreate>()).queue = 1;
                    Ok(())
                }
                // No queue is banned.
                QUEUE_GET_PROPERTY => {
                    (*argument.cast::<QueueProperty>()).value = 0;
                    Ok(())
                }
                VM_BIND => bind(file, &*argument.cast::<VmBind>()),
                EXEC => submit(file),
                VM_DESTROY | QUEUE_DESTROY | WAIT_USER_FENCE => Ok(()),
                _ if (COMMANDS..COMMANDS_END).contains(&number) => Err(Errno::INVAL),
                // Requests that every driver has are the shim's.
                _ => return None,
            })
        }
    }
}

/// Says that the driver is xe.
///
/// # Safety
/// Its pointers have room for as much as they say.
unsafe fn name(asked: &mut Version) -> Result<(), Errno> {
    let fill = |at: *mut c_char, room: &mut usize, text: &[u8]| {
        if !at.is_null() {
            // SAFETY: no more is written than there is room for.
            unsafe { core::ptr::copy_nonoverlapping(text.as_ptr(), at.cast(), text.len().min(*room)) };
        }
        *room = text.len();
    };
    asked.numbers = [1, 1, 0];
    fill(asked.name, &mut asked.name_bytes, b"xe");
    fill(asked.date, &mut asked.date_bytes, b"0");
    fill(asked.description, &mut asked.description_bytes, b"stand-in");
    Ok(())
}

/// Answers what the device is, or how long the answer is where there is no room for it.
///
/// # Safety
/// Its pointer has room for as much as it says.
unsafe fn query(asked: &mut Query) -> Result<(), Errno> {
    let answer = description(asked.query).ok_or(Errno::INVAL)?;
    if asked.size == 0 {
        asked.size = answer.len() as u32;
        return Ok(());
    }
    if asked.size as usize != answer.len() {
        return Err(Errno::INVAL);
    }
    // SAFETY: there is room for so much.
    unsafe { core::ptr::copy_nonoverlapping(answer.as_ptr(), asked.data, answer.len()) };
    Ok(())
}

/// Numbers one after the other, as a structure has them.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn words<const N: usize>(mut self, words: [u16; N]) -> Self {
        words.iter().for_each(|word| self.0.extend(word.to_le_bytes()));
        self
    }

    fn halves<const N: usize>(mut self, halves: [u32; N]) -> Self {
        halves.iter().for_each(|half| self.0.extend(half.to_le_bytes()));
        self
    }

    fn longs<const N: usize>(mut self, longs: [u64; N]) -> Self {
        longs.iter().for_each(|long| self.0.extend(long.to_le_bytes()));
        self
    }
}

/// The answer to a query of that number.
fn description(query: u32) -> Option<Vec<u8>> {
    const MIB: u64 = 1 << 20;
    let bytes = Bytes::default();
    let bytes = match query {
        // Engines: one that renders, one that copies, one that computes.
        0 => [0, 1, 4]
            .iter()
            .fold(bytes.halves([3, 0]), |bytes, &class| bytes.words([class, 0, 0, 0]).longs([0; 3])),
        // Memory: the system's, and VRAM, all of which the CPU sees.
        1 => (bytes.halves([2, 0]))
            .words([0, 0])
            .halves([4096])
            .longs([4096 * MIB, 0, 0, 0])
            .longs([0; 6])
            .words([1, 1])
            .halves([65536])
            .longs([2048 * MIB, 0, 2048 * MIB, 0])
            .longs([0; 6]),
        // Configuration: revision and id, VRAM, alignment, bits of an address, priority.
        2 => bytes.halves([5, 0]).longs([u64::from(B580.device), 1, 65536, 48, 2]),
        // Graphics: version 20.1 with a clock of 19.2 MHz, near VRAM.
        3 => (bytes.halves([1, 0]))
            .words([0; 6])
            .halves([19_200_000])
            .longs([1 << 1, 1 << 0])
            .words([20, 1, 4, 0])
            .longs([0; 7]),
        // The hardware's own table: empty, so that the driver goes by its own for this device.
        4 => bytes,
        // Topology: twenty cores for geometry and as many for computing, banks of cache, eight units in each core.
        5 => (bytes.words([0, 1]).halves([8]).longs([0xf_ffff]))
            .words([0, 2])
            .halves([8])
            .longs([0xf_ffff])
            .words([0, 3])
            .halves([8])
            .longs([0xffff])
            .words([0, 5])
            .halves([4])
            .halves([0xff]),
        _ => return None,
    };
    Some(bytes.0)
}

fn create(file: c_int, asked: &mut GemCreate) -> Result<(), Errno> {
    asked.handle = Amdgpu.stand_in(file, asked.size_bytes)?;
    Ok(())
}

/// Where the shim maps memory of that handle.
fn map_offset(file: c_int, asked: &mut MmapOffset) -> Result<(), Errno> {
    let mut map = u64::from(asked.handle);
    let request = opcode::read_write::<u64>(b'd', amdgpu::GEM_MMAP);
    // SAFETY: the request wants a union of this size.
    if unsafe { next::ioctl(file, c_ulong::from(request), (&raw mut map).cast()) } != 0 {
        return Err(Errno::INVAL);
    }
    asked.offset = map;
    Ok(())
}

/// Each import that is bound is mapped (`vma_lock_and_validate` in `xe_vm.c`).
///
/// # Safety
/// What it points to is there.
unsafe fn bind(file: c_int, asked: &VmBind) -> Result<(), Errno> {
    let ops = match asked.count {
        0 => &[],
        1 => core::slice::from_ref(&asked.one),
        // SAFETY: then the place of the one begins with the address of so many.
        count => unsafe {
            let at = (&raw const asked.one).cast::<*const BindOp>().read();
            core::slice::from_raw_parts(at, count as usize)
        },
    };
    for op in ops.iter().filter(|op| op.op == OP_MAP) {
        if let Some(said) = imports::map(file, op.handle) {
            talk::asked(Call::MapAddress)?;
            said?;
        }
    }
    Ok(())
}

/// What was taken back since is mapped again (`xe_vm_validate_rebind`, which `xe_exec.c` calls).
fn submit(file: c_int) -> Result<(), Errno> {
    let said: Vec<_> =
        imports::of(file).into_iter().filter_map(|handle| imports::map(file, handle)).collect();
    talk::submitted(said.len());
    if !said.is_empty() {
        talk::asked(Call::Submit)?;
    }
    said.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_as_long_as_their_structures() {
        let length = |query| description(query).unwrap().len();
        assert_eq!([0, 1, 2, 3].map(length), [8 + 3 * 32, 8 + 2 * 88, 8 + 5 * 8, 8 + 96]);
        assert_eq!(length(5), 3 * 16 + 12);
        assert_eq!((length(4), description(6)), (0, None));
        assert_eq!(size_of::<BindOp>(), 80);
    }
}
