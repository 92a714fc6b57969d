//! With how many bytes a socket wakes its reader.
#![allow(unsafe_code, reason = "SO_RCVLOWAT has no wrapper")]

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

/// From now on the socket is readable with so many bytes, at its end, or when the kernel takes no more (socket(7), SO_RCVLOWAT).
pub fn set_low_water(socket: &TcpStream, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    let size = size_of_val(&bytes) as libc::socklen_t;
    // SAFETY: the call reads one c_int.
    let set = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, (&raw const bytes).cast(), size)
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
