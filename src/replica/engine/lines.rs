//! What peers say, read by the engine's thread itself: a message wakes no other thread on its way.
//!
//! # Invariants
//! * Of a peer one connection is read, the one that was told last; after its silence none.
//! * A turn takes about [`AT_ONCE`] bytes of messages from a connection, then others have theirs. What is not read waits in the kernel, and TCP
//!   holds the peer back.

use super::turn::Engine;
use super::volume::VolumeKey;
use crate::replica::io::WatchKey;
use crate::replica::peer::{Event, Heard, Line};
use crate::volume::InstanceId;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

/// Bytes of one peer after which devices and other peers have their turn: half a millisecond of decryption.
const AT_ONCE: usize = 512 << 10;

/// Whose a watched descriptor is.
pub(super) enum Watched {
    /// A device's FUSE connection.
    Device(VolumeKey),
    /// A connection of a volume with one of its peers.
    Line(VolumeKey, InstanceId, Arc<Line>),
}

impl Engine {
    /// A name for a descriptor that is to be watched.
    pub fn next_watch(&mut self) -> WatchKey {
        self.last_watch.0 += 1;
        self.last_watch
    }

    /// Stops watching a descriptor, before it is closed.
    pub fn unwatch(&mut self, watch: WatchKey, fd: RawFd) {
        self.io.unwatch(watch, fd);
        self.watched.remove(&watch);
    }

    /// There is something to read.
    pub fn is_readable(&mut self, watch: WatchKey) {
        match self.watched.get(&watch) {
            Some(Watched::Device(key)) => self.make_ready(*key),
            Some(Watched::Line(..)) if !self.speaking.contains(&watch) => self.speaking.push_back(watch),
            Some(Watched::Line(..)) | None => {}
        }
    }

    /// A connection with a peer has begun, in place of any before.
    pub fn begin_listening(&mut self, key: VolumeKey, peer: InstanceId) {
        self.stop_listening(key, Some(peer));
        let line = self.volume_mut(key).and_then(|volume| volume.session()?.line(peer));
        // If it has ended, a silence or another one follows.
        let Some(line) = line else { return };
        let watch = self.next_watch();
        if let Err(error) = self.io.watch(watch, line.as_raw_fd()) {
            let volume = self.volume_mut(key).map(|volume| volume.id);
            tracing::error!(?volume, %peer, %error, "its connection cannot be watched: it ends, and another one begins");
            return line.close();
        }
        self.watched.insert(watch, Watched::Line(key, peer, line));
        // Something may have come with the handshake.
        self.speaking.push_back(watch);
    }

    /// Nothing more is read of this peer of the volume, or of all of them.
    pub fn stop_listening(&mut self, key: VolumeKey, peer: Option<InstanceId>) {
        let is_meant = |watched: &Watched| match watched {
            Watched::Line(of, with, _) => *of == key && peer.is_none_or(|peer| peer == *with),
            Watched::Device(_) => false,
        };
        // Rare, so a scan is good enough.
        let meant: Vec<_> =
            self.watched.iter().filter(|(_, watched)| is_meant(watched)).map(|(watch, _)| *watch).collect();
        for watch in meant {
            self.hang_up(watch);
        }
    }

    fn hang_up(&mut self, watch: WatchKey) {
        if let Some(Watched::Line(_, _, line)) = self.watched.get(&watch) {
            // Open until it is watched no more.
            let line = Arc::clone(line);
            self.unwatch(watch, line.as_raw_fd());
        }
    }

    /// Reads what peers have said.
    pub fn listen(&mut self) {
        for _ in 0..self.speaking.len() {
            if let Some(watch) = self.speaking.pop_front() {
                self.hear(watch);
            }
        }
    }

    fn hear(&mut self, watch: WatchKey) {
        let mut left = AT_ONCE;
        // What is heard may end its connection.
        while let Some(Watched::Line(key, _, line)) = self.watched.get(&watch) {
            let key = *key;
            match line.receive() {
                Heard::Event(event) => {
                    let bytes = size(&event);
                    self.peer_says(key, event);
                    self.pump();
                    if bytes >= left {
                        return self.speaking.push_back(watch);
                    }
                    left -= bytes;
                }
                Heard::Nothing => return,
                Heard::Later => return self.speaking.push_back(watch),
                Heard::Ended => self.hang_up(watch),
            }
        }
    }

    /// Something happened on a connection.
    pub fn peer_says(&mut self, key: VolumeKey, event: Event) {
        match self.volume_mut(key) {
            Some(volume) if volume.remote.is_some() => self.client_event(key, event),
            Some(volume) if volume.mirror.is_some() => self.peer_event(key, event),
            Some(_) | None => {}
        }
    }
}

/// Bytes that an event stands for, about.
fn size(event: &Event) -> usize {
    const SMALL: usize = 256;
    match event {
        Event::Received { payload, .. } => SMALL + payload.data().len(),
        Event::Connected(_) | Event::Silent(_) | Event::Room(_) => SMALL,
    }
}
