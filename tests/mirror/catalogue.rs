//! A catalogue in a directory, for engines in several processes: a configuration with compare-and-swap, the wish, addresses.

use nix::fcntl::{Flock, FlockArg};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use tandem::protocol::{Configuration, Message, Outcome, Stamp, Wish};
use tandem::replica::peer::Payload;
use tandem::replica::peer::packet::Packet;
use tandem::volume::{InstanceId, VolumeId};

#[derive(Clone, Debug)]
pub struct Catalogue {
    directory: PathBuf,
}

fn replace(path: &Path, bytes: &[u8]) {
    let new = path.with_extension(format!("new-{}", std::process::id()));
    fs::write(&new, bytes).expect("write");
    fs::rename(&new, path).expect("rename");
}

impl Catalogue {
    pub fn at(directory: &Path) -> Self {
        fs::create_dir_all(directory.join("nodes")).expect("a directory");
        Self { directory: directory.to_path_buf() }
    }

    fn lock(&self) -> Flock<File> {
        let file = File::create(self.directory.join("lock")).expect("a file");
        Flock::lock(file, FlockArg::LockExclusive).expect("locks")
    }

    /// As a frame that invites to it: the one encoding of configurations that there is.
    pub fn write(&self, configuration: &Configuration) {
        let invite = Message::Invite(Box::new(configuration.clone()));
        let encoded = Packet::Message(invite, Payload::default()).encode(VolumeId::from_bytes([0; 16]));
        replace(&self.directory.join("configuration"), &encoded.head);
    }

    pub fn read(&self) -> Configuration {
        let bytes = fs::read(self.directory.join("configuration")).expect("a configuration");
        match Packet::parse(&bytes) {
            Ok((_, Packet::Message(Message::Invite(configuration), _), _)) => *configuration,
            other => panic!("{other:?}"),
        }
    }

    pub fn propose(&self, expected: Stamp, next: &Configuration) -> Outcome {
        let _lock = self.lock();
        let current = self.read();
        if current.stamp != expected {
            return Outcome::Lost(Box::new(current));
        }
        self.write(next);
        Outcome::Committed
    }

    pub fn set_wish(&self, primary: Option<InstanceId>, copies: &[InstanceId]) {
        let primary = primary.map_or("none".into(), |copy| copy.to_string());
        let copies = copies.iter().map(|copy| format!(" {copy}"));
        replace(&self.directory.join("wish"), (primary + &copies.collect::<String>()).as_bytes());
    }

    pub fn wish(&self) -> Option<Wish> {
        let text = fs::read_to_string(self.directory.join("wish")).ok()?;
        let (primary, copies) = text.split_once(' ')?;
        let copies = copies.split(' ').map(|copy| copy.parse().expect("an id")).collect();
        Some(Wish { primary: primary.parse().ok(), copies })
    }

    /// Who alone uses the volume, on a node without a copy.
    pub fn set_client(&self, client: Option<InstanceId>) {
        replace(&self.directory.join("client"), client.map(|id| id.to_string()).unwrap_or_default().as_bytes());
    }

    pub fn client(&self) -> Option<InstanceId> {
        fs::read_to_string(self.directory.join("client")).ok()?.parse().ok()
    }

    /// Where a copy can be called.
    pub fn set_node(&self, copy: InstanceId, name: &str, address: &str) {
        replace(&self.directory.join("nodes").join(copy.to_string()), format!("{name} {address}").as_bytes());
    }

    /// By copy: the node's name and address.
    pub fn nodes(&self) -> BTreeMap<InstanceId, (String, String)> {
        let entries = fs::read_dir(self.directory.join("nodes")).expect("a directory").flatten();
        let node = |entry: fs::DirEntry| {
            let copy = entry.file_name().to_str()?.parse().ok()?;
            let text = fs::read_to_string(entry.path()).ok()?;
            let (name, address) = text.split_once(' ')?;
            Some((copy, (name.into(), address.into())))
        };
        entries.filter_map(node).collect()
    }
}
