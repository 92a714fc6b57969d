//! The changes of a tree that outlive it: records of the map log, and of the table in a checkpoint.
//!
//! Invariant: a record is a tag byte and fixed fields, at most [`MAX_RECORD`] bytes; decoding checks every field.

use super::format::{Input, LayerId, Output};
use super::map::{Entry, Extent};
use crate::volume::{SnapshotId, VolumeId, VolumeSize};

/// Bytes of the longest record.
pub const MAX_RECORD: usize = 53;

/// Stands for "no parent".
const NO_LAYER: u32 = u32::MAX;

/// A change of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// Blocks of a layer are now there; what they replace is freed.
    Map {
        /// The layer.
        layer: LayerId,
        /// Which blocks, and where.
        extent: Extent,
    },
    /// A layer begins, empty.
    NewLayer {
        /// The layer.
        layer: LayerId,
        /// What it lies on.
        parent: Option<LayerId>,
    },
    /// The volume's newest layer is now this one.
    NameVolume {
        /// The layer.
        layer: LayerId,
        /// The volume.
        volume: VolumeId,
        /// Its size.
        size: VolumeSize,
        /// Whether reads of sealed layers are checked.
        verify_reads: bool,
    },
    /// The volume is gone.
    UnnameVolume {
        /// The volume.
        volume: VolumeId,
    },
    /// The sealed layer is this snapshot.
    NameSnapshot {
        /// The layer.
        layer: LayerId,
        /// The snapshot.
        snapshot: SnapshotId,
        /// Of which volume.
        volume: VolumeId,
        /// Size of the volume then.
        size: VolumeSize,
        /// When, in milliseconds since 1970.
        created_ms: u64,
    },
    /// The snapshot is gone.
    UnnameSnapshot {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// The child took over what it does not shadow; the rest of the parent is freed and the parent's parent is the child's.
    Merged {
        /// The layer that is gone.
        parent: LayerId,
        /// Its only child.
        child: LayerId,
    },
    /// The same for the blocks below `end`, and the parent stays: a merge of a large layer is many of these and then one
    /// [`Record::Merged`].
    MergedPart {
        /// The layer that loses blocks.
        parent: LayerId,
        /// Its only child.
        child: LayerId,
        /// The first block that is left alone.
        end: u64,
    },
    /// A layer without children that nobody names is gone; all its blocks are freed.
    Freed {
        /// The layer.
        layer: LayerId,
    },
    /// The volume has a new size.
    Resize {
        /// The volume.
        volume: VolumeId,
        /// Its size.
        size: VolumeSize,
    },
    /// The volume has new settings.
    Modify {
        /// The volume.
        volume: VolumeId,
        /// Whether reads of sealed layers are checked.
        verify_reads: bool,
    },
    /// The checksums of all blocks that the sealed layer owns are in the file `checksums`.
    Checksummed {
        /// The layer.
        layer: LayerId,
    },
    /// The sealed layer is what a copy of the volume had that left the mirror then: a base.
    NameBase {
        /// The layer.
        layer: LayerId,
        /// Of which volume.
        volume: VolumeId,
    },
    /// No copy is brought up to date from this base any more.
    UnnameBase {
        /// The layer.
        layer: LayerId,
    },
}

/// Why bytes whose checksum is right are no record: a newer or a defective Tandem wrote them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// No record has this tag.
    #[error("there is no record with tag {0}")]
    Tag(u8),
    /// The bytes end inside the record.
    #[error("the bytes end inside a record with tag {0}")]
    Truncated(u8),
    /// A field is out of range.
    #[error("the field {field} of a record with tag {tag} is out of range")]
    Field {
        /// The record's tag.
        tag: u8,
        /// Which field.
        field: &'static str,
    },
}

impl Record {
    /// Writes the record; returns its length.
    pub fn encode(&self, bytes: &mut [u8; MAX_RECORD]) -> usize {
        let mut out = Output { bytes, at: 0 };
        match *self {
            Self::Map { layer, extent } => {
                out.u8(1);
                out.u32(layer.0);
                encode_extent(&extent, &mut out);
            }
            Self::NewLayer { layer, parent } => {
                out.u8(2);
                out.u32(layer.0);
                out.u32(parent.map_or(NO_LAYER, |parent| parent.0));
            }
            Self::NameVolume { layer, volume, size, verify_reads } => {
                out.u8(3);
                out.u32(layer.0);
                out.put(&volume.to_bytes());
                out.u64(size.bytes());
                out.u8(u8::from(verify_reads));
            }
            Self::UnnameVolume { volume } => {
                out.u8(4);
                out.put(&volume.to_bytes());
            }
            Self::NameSnapshot { layer, snapshot, volume, size, created_ms } => {
                out.u8(5);
                out.u32(layer.0);
                out.put(&snapshot.to_bytes());
                out.put(&volume.to_bytes());
                out.u64(size.bytes());
                out.u64(created_ms);
            }
            Self::UnnameSnapshot { snapshot } => {
                out.u8(6);
                out.put(&snapshot.to_bytes());
            }
            Self::Merged { parent, child } => {
                out.u8(7);
                out.u32(parent.0);
                out.u32(child.0);
            }
            Self::MergedPart { parent, child, end } => {
                out.u8(12);
                out.u32(parent.0);
                out.u32(child.0);
                out.u64(end);
            }
            Self::Freed { layer } => encode_layer(8, layer, &mut out),
            Self::Resize { volume, size } => {
                out.u8(9);
                out.put(&volume.to_bytes());
                out.u64(size.bytes());
            }
            Self::Modify { volume, verify_reads } => {
                out.u8(10);
                out.put(&volume.to_bytes());
                out.u8(u8::from(verify_reads));
            }
            Self::Checksummed { layer } => encode_layer(11, layer, &mut out),
            Self::NameBase { layer, volume } => {
                encode_layer(13, layer, &mut out);
                out.put(&volume.to_bytes());
            }
            Self::UnnameBase { layer } => encode_layer(14, layer, &mut out),
        }
        out.at
    }

    /// Reads the record whose tag was just taken from `input`.
    pub(super) fn decode(tag: u8, input: &mut Input<'_>) -> Result<Self, RecordError> {
        let mut fields = Fields { tag, input };
        match tag {
            1 => Ok(Self::Map { layer: fields.layer("layer")?, extent: fields.extent()? }),
            2 => {
                let layer = fields.layer("layer")?;
                let parent = fields.u32()?;
                Ok(Self::NewLayer { layer, parent: (parent != NO_LAYER).then_some(LayerId(parent)) })
            }
            3 => Ok(Self::NameVolume {
                layer: fields.layer("layer")?,
                volume: fields.volume()?,
                size: fields.size()?,
                verify_reads: fields.bool("verify_reads")?,
            }),
            4 => Ok(Self::UnnameVolume { volume: fields.volume()? }),
            5 => Ok(Self::NameSnapshot {
                layer: fields.layer("layer")?,
                snapshot: SnapshotId::from_bytes(fields.id()?),
                volume: fields.volume()?,
                size: fields.size()?,
                created_ms: fields.u64()?,
            }),
            6 => Ok(Self::UnnameSnapshot { snapshot: SnapshotId::from_bytes(fields.id()?) }),
            7 => Ok(Self::Merged { parent: fields.layer("parent")?, child: fields.layer("child")? }),
            8 => Ok(Self::Freed { layer: fields.layer("layer")? }),
            9 => Ok(Self::Resize { volume: fields.volume()?, size: fields.size()? }),
            10 => Ok(Self::Modify { volume: fields.volume()?, verify_reads: fields.bool("verify_reads")? }),
            11 => Ok(Self::Checksummed { layer: fields.layer("layer")? }),
            12 => Ok(Self::MergedPart {
                parent: fields.layer("parent")?,
                child: fields.layer("child")?,
                end: fields.u64()?,
            }),
            13 => Ok(Self::NameBase { layer: fields.layer("layer")?, volume: fields.volume()? }),
            14 => Ok(Self::UnnameBase { layer: fields.layer("layer")? }),
            unknown => Err(RecordError::Tag(unknown)),
        }
    }
}

/// Bytes of an encoded extent: start (8), count (4), value (4: 0 absent, 1 zeros, physical block + 2).
pub(super) const EXTENT_BYTES: usize = 16;

fn encode_layer(tag: u8, layer: LayerId, out: &mut Output<'_>) {
    out.u8(tag);
    out.u32(layer.0);
}

pub(super) fn encode_extent(extent: &Extent, out: &mut Output<'_>) {
    out.u64(extent.start);
    out.u32(extent.count);
    out.u32(extent.entry.value());
}

/// `None` if the bytes end or no map can hold it.
pub(super) fn decode_extent(input: &mut Input<'_>) -> Option<Extent> {
    let (start, count) = (input.u64()?, input.u32()?);
    let extent = Extent { start, count, entry: Entry::from_value(input.u32()?) };
    extent.is_valid().then_some(extent)
}

struct Fields<'a, 'b> {
    tag: u8,
    input: &'a mut Input<'b>,
}

impl Fields<'_, '_> {
    fn wrong(&self, field: &'static str) -> RecordError {
        RecordError::Field { tag: self.tag, field }
    }

    fn u32(&mut self) -> Result<u32, RecordError> {
        self.input.u32().ok_or(RecordError::Truncated(self.tag))
    }

    fn u64(&mut self) -> Result<u64, RecordError> {
        self.input.u64().ok_or(RecordError::Truncated(self.tag))
    }

    fn id(&mut self) -> Result<[u8; 16], RecordError> {
        self.input.take().ok_or(RecordError::Truncated(self.tag))
    }

    fn volume(&mut self) -> Result<VolumeId, RecordError> {
        self.id().map(VolumeId::from_bytes)
    }

    fn layer(&mut self, field: &'static str) -> Result<LayerId, RecordError> {
        let layer = self.u32()?;
        if layer == NO_LAYER { Err(self.wrong(field)) } else { Ok(LayerId(layer)) }
    }

    fn size(&mut self) -> Result<VolumeSize, RecordError> {
        let bytes = self.u64()?;
        VolumeSize::try_from(bytes).map_err(|_| self.wrong("size"))
    }

    fn bool(&mut self, field: &'static str) -> Result<bool, RecordError> {
        match self.input.u8().ok_or(RecordError::Truncated(self.tag))? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.wrong(field)),
        }
    }

    fn extent(&mut self) -> Result<Extent, RecordError> {
        let whole = self.input.bytes.len() - self.input.at >= EXTENT_BYTES;
        let truncated = if whole { self.wrong("extent") } else { RecordError::Truncated(self.tag) };
        decode_extent(self.input).ok_or(truncated)
    }
}
