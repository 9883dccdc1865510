//! `KernelLog`: what the kernel says, out of `/dev/kmsg`.
//!
//! Each reader has a place of its own in the log: reading changes nothing and takes nothing away from others. Mostly
//! only root may open it. Nothing here waits.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;

/// Where the log is read.
pub const KERNEL_LOG: &str = "/dev/kmsg";

/// Longer than any record, `PRINTK_MESSAGE_MAX`.
const RECORD_BYTES: usize = 8192;
/// No log has more; a reader that is fed forever ends all the same.
const RECORDS_MAX: usize = 1 << 20;

/// The kernel's log, from some place on.
#[derive(Debug)]
pub struct KernelLog<R: Read = File> {
    device: R,
}

/// What is next in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Logged {
    /// A message of the kernel's, without its priority and time.
    Message(String),
    /// Some messages were overwritten before they were read.
    Lost,
}

impl KernelLog {
    /// From the oldest message that is left.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn from_oldest() -> io::Result<Self> {
        let flags = OFlags::NONBLOCK.bits() as i32;
        let device = File::options().read(true).custom_flags(flags).open(KERNEL_LOG)?;
        Ok(Self { device })
    }

    /// From what is said after this call.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn from_now() -> io::Result<Self> {
        let mut log = Self::from_oldest()?;
        log.device.seek(SeekFrom::End(0))?;
        Ok(log)
    }
}

impl<R: Read> KernelLog<R> {
    /// A log that is read one record at a time from `device`, which says [`ErrorKind::WouldBlock`] where there are no
    /// more for now.
    pub fn of(device: R) -> Self {
        Self { device }
    }

    /// What there is since the last call, one by one. What programs wrote into the log is left out.
    ///
    /// # Errors
    /// Once, as the last one: it cannot be read on.
    pub fn unread(&mut self) -> impl Iterator<Item = io::Result<Logged>> + '_ {
        let mut record = [0; RECORD_BYTES];
        let mut has_failed = false;
        let read = move || {
            if has_failed {
                return None;
            }
            match self.device.read(&mut record) {
                Ok(0) => None,
                Ok(length) => Some(Ok(message_in(&record[..length]).map(Logged::Message))),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => None,
                    ErrorKind::Interrupted => Some(Ok(None)),
                    // Overwritten before it was read; the next read goes on behind it.
                    ErrorKind::BrokenPipe => Some(Ok(Some(Logged::Lost))),
                    _ => {
                        has_failed = true;
                        Some(Err(error))
                    }
                },
            }
        };
        std::iter::from_fn(read).take(RECORDS_MAX).filter_map(Result::transpose)
    }
}

/// The text of a record, "priority,sequence,time,flags;text\n KEY=value...". What programs wrote there has a facility
/// (the upper bits of the priority) that is not the kernel's, 0.
fn message_in(record: &[u8]) -> Option<String> {
    let record = String::from_utf8_lossy(record);
    let (head, rest) = record.split_once(';')?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    (priority >> 3 == 0).then(|| rest.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Gives what it is told, one piece for each read.
    struct Records(Vec<Result<&'static str, ErrorKind>>);

    impl Read for Records {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() {
                return Err(ErrorKind::WouldBlock.into());
            }
            let record = self.0.remove(0)?;
            into[..record.len()].copy_from_slice(record.as_bytes());
            Ok(record.len())
        }
    }

    fn unread(records: &[Result<&'static str, ErrorKind>]) -> Vec<Result<Logged, ErrorKind>> {
        let mut log = KernelLog::of(Records(records.to_vec()));
        log.unread().map(|logged| logged.map_err(|error| error.kind())).collect()
    }

    #[test]
    fn records_are_taken_apart() {
        let record = b"3,512,7000000,-;[drm:virtio_gpu_dequeue_ctrl_func] *ERROR* response 0x1200 \
                       (command 0x10c)\n SUBSYSTEM=pci\n DEVICE=+pci:0000:02:00.0\n";
        assert!(message_in(record).unwrap().ends_with("(command 0x10c)"));
        let kernel = b"4,7,1,-;pci 0000:02:00.0: ACS redirect is set\n SUBSYSTEM=pci\n";
        assert_eq!(message_in(kernel).as_deref(), Some("pci 0000:02:00.0: ACS redirect is set"));
        assert_eq!(message_in(b"\xff\xfe"), None);
    }

    #[test]
    fn what_programs_say_is_not_the_kernels_word() {
        assert_eq!(message_in(b"12,513,7000001,-;peer-to-peer DMA, says a program"), None);
        let message = || Ok(Logged::Message("DMAR: fault".into()));
        let records = [Ok("3,1,2,-;DMAR: fault\n KEY=value\n"), Ok("12,1,2,-;DMAR: fault\n")];
        assert_eq!(unread(&records), [message()]);
    }

    #[test]
    fn a_hole_in_the_log_is_told_and_is_no_end_of_it() {
        let said = |text: &str| Ok(Logged::Message(text.into()));
        let records = [
            Ok("6,1,1,-;one"),
            Err(ErrorKind::BrokenPipe),
            Err(ErrorKind::Interrupted),
            Ok("6,4,1,-;two"),
            Err(ErrorKind::WouldBlock),
            Ok("6,5,1,-;three"),
        ];
        assert_eq!(unread(&records), [said("one"), Ok(Logged::Lost), said("two")]);
    }

    #[test]
    fn one_that_cannot_be_read_on_ends_with_the_reason() {
        let records = [Err(ErrorKind::PermissionDenied), Ok("6,5,1,-;more")];
        assert_eq!(unread(&records), [Err(ErrorKind::PermissionDenied)]);
    }

    proptest! {
        #[test]
        fn any_record_is_survived(record in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = message_in(&record);
        }
    }
}
