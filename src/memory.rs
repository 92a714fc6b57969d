//! Shared memory that outlives a process: an owned mapping of a memfd, and of plain zeros for aligned buffers.
//!
//! Invariants: every access is checked against the length; a mapping is never resized; the bytes may be those of another,
//! dead process, so nothing in here believes them.
#![allow(unsafe_code, reason = "mapping memory and atomics inside it")]

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::ffi::{CString, c_void};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// An owned, page-aligned mapping, readable and writable.
#[derive(Debug)]
pub struct Memory {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping belongs to this value alone; nothing in it is tied to a thread.
unsafe impl Send for Memory {}
// SAFETY: shared references only read (`bytes`) or use atomics; plain writes need `&mut self`.
unsafe impl Sync for Memory {}

impl Memory {
    /// A new memfd of `length` zero bytes, and its mapping. `name` is what /proc shows.
    pub fn create(name: &str, length: usize) -> io::Result<(Self, OwnedFd)> {
        let name = CString::new(name).map_err(io::Error::from)?;
        let fd = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(fd.as_fd(), length as i64)?;
        Ok((Self::map(&fd, length)?, fd))
    }

    /// Maps a memfd; an error if it is shorter than `length`, since touching what is missing would kill the process.
    pub fn map(fd: impl AsFd, length: usize) -> io::Result<Self> {
        let size = nix::sys::stat::fstat(fd.as_fd())?.st_size;
        if usize::try_from(size).is_ok_and(|size| size < length) {
            return Err(io::Error::other(format!("shared memory has {size} bytes, expected {length}")));
        }
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses aliases nothing.
        let start = unsafe { mmap(None, non_zero(length)?, protection, MapFlags::MAP_SHARED, fd, 0)? };
        Ok(Self { start: start.cast(), length })
    }

    /// `length` zero bytes of this process alone; pages cost memory only once they are written.
    pub fn zeros(length: usize) -> io::Result<Self> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: as above.
        let start = unsafe { mmap_anonymous(None, non_zero(length)?, protection, MapFlags::MAP_PRIVATE)? };
        Ok(Self { start: start.cast(), length })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Never: a mapping is not empty.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Address of the first byte.
    pub fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }

    /// Address of the first byte, for whoever writes through the kernel.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for the life of self; written only through `&mut self` or by atomics that are not read this way
        // while another thread writes them.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }

    /// The bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: mapped for the life of self, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }

    /// The word at `offset` bytes, a multiple of 8.
    ///
    /// # Panics
    /// If it is not within the mapping or not aligned.
    pub fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.length, "word {offset} of {}", self.length);
        // SAFETY: within the mapping, aligned (a mapping starts at a page), and only ever accessed atomically.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this length, and nothing borrows it any more.
        let unmapped = unsafe { munmap(self.start.cast::<c_void>(), self.length) };
        debug_assert!(unmapped.is_ok(), "munmap: {unmapped:?}");
    }
}

fn non_zero(length: usize) -> io::Result<NonZeroUsize> {
    NonZeroUsize::new(length).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn a_second_mapping_sees_what_the_first_wrote() {
        let (mut one, fd) = Memory::create("tandem-test", 8192).expect("memfd");
        one.bytes_mut()[100] = 7;
        one.word(4096).store(9, Ordering::Release);
        let two = Memory::map(&fd, 8192).expect("map");
        drop(one);
        assert_eq!((two.bytes()[100], two.word(4096).load(Ordering::Acquire)), (7, 9));
        assert!(Memory::map(&fd, 8193).is_err());
    }
}
