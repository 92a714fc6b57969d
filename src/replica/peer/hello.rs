//! The handshake of two copies: who calls whom, in which cluster, about which volume, and whether they fit.
//!
//! ```text
//!   caller: Hello { nonce a } ->
//!                                <- Welcome { nonce b, echo a }     or Refuse { reason }
//!           Confirm { echo b } ->                                   or Refuse { reason }
//! ```
//! # Invariants
//! * Both sides check the same things in the same order; nothing but a handshake's frames is sent before both agree.
//! * Each side has seen its own fresh nonce come back, so a hello that was recorded, of this or an earlier incarnation,
//!   opens nothing.
//! * With encryption the names in the hello are those of the certificate.

use super::header::{FrameError, Header, Kind};
use crate::protocol::{Generation, Incarnation, Stamp};
use crate::store::format::Input;
use crate::tls::{Identity, Name};
use crate::volume::{ClusterId, InstanceId, VolumeId};
use std::fmt;
use uuid::Uuid;

/// Incompatible feature: the connection is encrypted. A setting of the whole cluster, so both sides must say the same.
pub const ENCRYPTED: u64 = 1;
/// Incompatible feature: pieces of ranges are copied, and compared before. Whoever does not know it refuses the connection:
/// there is no other way to bring a copy up to date any more.
pub const PIECES: u64 = 2;
/// Incompatible features that are understood.
const KNOWN: u64 = ENCRYPTED | PIECES;

/// A number that is used once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Nonce(pub [u8; 16]);

impl Nonce {
    /// A new one.
    pub fn random() -> Self {
        Self(Uuid::new_v4().into_bytes())
    }
}

impl fmt::Debug for Nonce {
    /// Not its value: whoever reads the log must not answer with it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Nonce")
    }
}

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Party {
    /// The machine.
    pub node: Name,
    /// The disk's copy there.
    pub copy: InstanceId,
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "copy {} on node {}", self.copy, self.node)
    }
}

/// What one side says about itself and whom it means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Features that the other side need not know.
    pub compatible: u64,
    /// Features that it must know.
    pub incompatible: u64,
    /// Whose cluster.
    pub cluster: ClusterId,
    /// Which volume.
    pub volume: VolumeId,
    /// Who speaks.
    pub from: Party,
    /// To whom.
    pub to: Party,
    /// The catalogue's generation in the last configuration that the speaker knows.
    pub generation: Generation,
    /// Of the speaker.
    pub incarnation: Incarnation,
    /// Must come back.
    pub nonce: Nonce,
}

/// Why two copies do not talk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// A newer Tandem.
    #[error("it uses features {0:#x} that this Tandem does not know: upgrade this node")]
    Features(u64),
    /// One side has encryption off.
    #[error("encryption is {} there, but not here: it is a setting of the whole cluster", on(.theirs))]
    Encryption {
        /// Whether the other side has it on.
        theirs: bool,
    },
    /// Another cluster.
    #[error("it belongs to cluster {theirs}, this node to {ours}: its address is another cluster's")]
    Cluster {
        /// What it says.
        theirs: ClusterId,
        /// This one.
        ours: ClusterId,
    },
    /// It calls itself other than its certificate does.
    #[error("it calls itself {says} and its certificate says {certificate}: use the certificate of that node")]
    Certificate {
        /// In the hello.
        says: Name,
        /// In the certificate.
        certificate: Identity,
    },
    /// Nothing of the kind is open here.
    #[error("volume {0} is not open on this node")]
    Volume(VolumeId),
    /// It looks for another copy than the one that is here.
    #[error("it looks for {wanted}, here is {here}: the disk was replaced, or the address is another node's")]
    NotHere {
        /// Whom it means.
        wanted: Party,
        /// Who got it.
        here: Party,
    },
    /// The node has a disk that is not in the configuration.
    #[error(
        "node {node} shows copy {found}, the volume's copy there is {known}: the disk under that name was replaced"
    )]
    OtherDisk {
        /// Which node.
        node: Name,
        /// What it shows.
        found: InstanceId,
        /// What the volume has.
        known: InstanceId,
    },
    /// No copy of the volume.
    #[error("{0} is no copy of the volume")]
    Stranger(Party),
    /// Its configuration is from before the catalogue was rebuilt.
    #[error("it knows generation {} of the catalogue, this copy {}: it must read the catalogue first", .theirs.0, .ours.0)]
    Generation {
        /// What it says.
        theirs: Generation,
        /// This one's.
        ours: Generation,
    },
    /// The nonce that came back is not the one that was sent: somebody repeats what another has said.
    #[error("it repeats an earlier conversation")]
    Replayed,
}

fn on(on: &bool) -> &'static str {
    if *on { "on" } else { "off" }
}

/// What the refused side is told: the kind of the rejection, without what it need not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[repr(u8)]
pub enum Reason {
    /// [`Rejection::Features`].
    #[error("it does not know a feature that this node uses: upgrade that node")]
    Features = 1,
    /// [`Rejection::Encryption`].
    #[error("encryption is on at one side only: it is a setting of the whole cluster")]
    Encryption = 2,
    /// [`Rejection::Cluster`].
    #[error("it belongs to another cluster")]
    Cluster = 3,
    /// [`Rejection::Certificate`].
    #[error("this node's certificate is another node's")]
    Certificate = 4,
    /// [`Rejection::Volume`].
    #[error("the volume is not open there")]
    Volume = 5,
    /// [`Rejection::NotHere`].
    #[error("there is another copy than the one that is looked for: its disk was replaced, or the address is wrong")]
    NotHere = 6,
    /// [`Rejection::OtherDisk`].
    #[error("this node's copy is not the volume's: the disk here was replaced")]
    OtherDisk = 7,
    /// [`Rejection::Stranger`].
    #[error("this node has no copy of the volume, as far as it knows")]
    Stranger = 8,
    /// [`Rejection::Generation`].
    #[error("this copy's configuration is older than the catalogue's generation there")]
    Generation = 9,
    /// [`Rejection::Replayed`].
    #[error("it was answered with an old conversation")]
    Replayed = 10,
}

impl Reason {
    /// As it travels.
    pub fn from_number(number: u8) -> Option<Self> {
        use Reason::*;
        [Features, Encryption, Cluster, Certificate, Volume, NotHere, OtherDisk, Stranger, Generation, Replayed]
            .into_iter()
            .find(|reason| *reason as u8 == number)
    }
}

impl Rejection {
    /// What the other side is told.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Features(_) => Reason::Features,
            Self::Encryption { .. } => Reason::Encryption,
            Self::Cluster { .. } => Reason::Cluster,
            Self::Certificate { .. } => Reason::Certificate,
            Self::Volume(_) => Reason::Volume,
            Self::NotHere { .. } => Reason::NotHere,
            Self::OtherDisk { .. } => Reason::OtherDisk,
            Self::Stranger(_) => Reason::Stranger,
            Self::Generation { .. } => Reason::Generation,
            Self::Replayed => Reason::Replayed,
        }
    }
}

/// What must be equal in the whole cluster.
#[derive(Clone, Copy, Debug)]
pub struct Cluster<'a> {
    /// This one.
    pub id: ClusterId,
    /// Whether encryption is on here.
    pub encrypted: bool,
    /// Who the certificate says is speaking; `None` without encryption.
    pub certificate: Option<&'a Identity>,
}

impl Cluster<'_> {
    /// Whether the speaker belongs to it.
    pub fn check(&self, hello: &Hello) -> Result<(), Rejection> {
        if hello.incompatible & !KNOWN != 0 {
            return Err(Rejection::Features(hello.incompatible & !KNOWN));
        }
        let theirs = hello.incompatible & ENCRYPTED != 0;
        if theirs != self.encrypted {
            return Err(Rejection::Encryption { theirs });
        }
        if hello.cluster != self.id {
            return Err(Rejection::Cluster { theirs: hello.cluster, ours: self.id });
        }
        match self.certificate {
            Some(certificate) if certificate.name != hello.from.node => {
                Err(Rejection::Certificate { says: hello.from.node.clone(), certificate: certificate.clone() })
            }
            _ => Ok(()),
        }
    }
}

/// The copies of one volume, as they are known here.
#[derive(Clone, Copy, Debug)]
pub struct Copies<'a> {
    /// Who is here.
    pub here: &'a Party,
    /// The others.
    pub peers: &'a [Party],
    /// Of the last configuration known here.
    pub generation: Generation,
}

impl Copies<'_> {
    /// Whether the speaker is one of them.
    pub fn check(&self, hello: &Hello) -> Result<(), Rejection> {
        if hello.to != *self.here {
            return Err(Rejection::NotHere { wanted: hello.to.clone(), here: self.here.clone() });
        }
        if !self.peers.contains(&hello.from) {
            let Hello { from: Party { node, copy: found }, .. } = hello;
            return Err(match self.peers.iter().find(|peer| peer.node == *node) {
                Some(known) => Rejection::OtherDisk { node: node.clone(), found: *found, known: known.copy },
                None => Rejection::Stranger(hello.from.clone()),
            });
        }
        if hello.generation < self.generation {
            return Err(Rejection::Generation { theirs: hello.generation, ours: self.generation });
        }
        Ok(())
    }
}

/// Header and body; `echo` makes a welcome of it.
pub(super) fn encode(hello: &Hello, echo: Option<Nonce>) -> (Header, Vec<u8>) {
    let kind = if echo.is_some() { Kind::Welcome } else { Kind::Hello };
    let mut header = Header::new(kind, hello.volume);
    header.stamp = Stamp { generation: hello.generation, ..Stamp::default() };
    header.incarnation = hello.incarnation;
    let mut body = Vec::new();
    body.extend(hello.compatible.to_le_bytes());
    body.extend(hello.incompatible.to_le_bytes());
    body.extend(hello.cluster.to_bytes());
    body.extend(hello.from.copy.to_bytes());
    body.extend(hello.to.copy.to_bytes());
    body.extend(hello.nonce.0);
    body.extend(echo.iter().flat_map(|echo| echo.0));
    for node in [&hello.from.node, &hello.to.node] {
        // At most 253 characters.
        body.push(node.as_str().len() as u8);
        body.extend(node.as_str().as_bytes());
    }
    header.body = body.len() as u32;
    (header, body)
}

/// The hello of a frame, and what a welcome echoes.
pub(super) fn decode(header: &Header, body: &[u8]) -> Result<(Hello, Option<Nonce>), FrameError> {
    let (hello, echo) = parse(header, body).ok_or(FrameError::Field("hello"))?;
    let (again, bytes) = encode(&hello, echo);
    if bytes != body || (Header { body_crc: header.body_crc, ..again }) != *header {
        return Err(FrameError::Field("unused"));
    }
    Ok((hello, echo))
}

fn parse(header: &Header, body: &[u8]) -> Option<(Hello, Option<Nonce>)> {
    let mut input = Input { bytes: body, at: 0 };
    let (compatible, incompatible) = (input.u64()?, input.u64()?);
    let cluster = ClusterId::from_bytes(input.take()?);
    let (from, to) = (InstanceId::from_bytes(input.take()?), InstanceId::from_bytes(input.take()?));
    let nonce = Nonce(input.take()?);
    let echo = if header.kind == Kind::Welcome { Some(Nonce(input.take()?)) } else { None };
    let from = Party { node: name(&mut input)?, copy: from };
    let to = Party { node: name(&mut input)?, copy: to };
    let (generation, incarnation) = (header.stamp.generation, header.incarnation);
    let volume = header.volume;
    let hello = Hello { compatible, incompatible, cluster, volume, from, to, generation, incarnation, nonce };
    Some((hello, echo))
}

fn name(input: &mut Input<'_>) -> Option<Name> {
    let length = usize::from(input.u8()?);
    let bytes = input.bytes.get(input.at..input.at + length)?;
    input.at += length;
    std::str::from_utf8(bytes).ok()?.parse().ok()
}
