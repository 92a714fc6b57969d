//! The gRPC code of each cause of failure.
//!
//! Invariant: every match is exhaustive, so a new cause has to be given a code and a row in `docs/errors.md`. Kubelet repeats
//! every failed call; a code that is not final for it (ABORTED, UNAVAILABLE) also makes it unstage what may be half done.

use super::errors::{
    ExpandError, HealthError, PublishError, RequestError, StageError, StatsError, UnpublishError, UnstageError,
};
use super::path::PathError;
use crate::csi::control::ControlError;
use crate::csi::status::Coded;
use crate::mount::{GrowError, PrepareError, UnmountError};
use tonic::{Code, Status};

/// `Variant => Code`, and after the semicolon the variants that have the code of what they hold.
macro_rules! codes {
    ($($error:ident { $($variant:ident => $code:ident),* ; $($cause:ident),* })*) => {
        $(impl Coded for $error {
            fn code(&self) -> Code {
                match self {
                    $(Self::$cause(cause) => cause.code(),)*
                    $(Self::$variant { .. } => Code::$code,)*
                }
            }
        }
        impl From<$error> for Status {
            fn from(error: $error) -> Self {
                Self::new(error.code(), error.to_string())
            }
        })*
        /// Error, variant and code, for the test of the documented table.
        #[cfg(test)]
        const CODES: &[(&str, &str, Code)] = &[$($((stringify!($error), stringify!($variant), Code::$code),)*)*];
    };
}

codes! {
    RequestError { Missing => InvalidArgument, UnknownVolume => NotFound, UnderWay => Aborted; }
    PathError {
        Relative => InvalidArgument,
        Forbidden => InvalidArgument,
        NoParent => InvalidArgument,
        Unusable => InvalidArgument;
    }
    ControlError {
        Unknown => Unavailable,
        NotFound => NotFound,
        NoRoom => ResourceExhausted,
        InUse => FailedPrecondition,
        Refused => Internal;
    }
    PrepareError {
        Busy => Aborted,
        TooSmall => FailedPrecondition,
        Foreign => FailedPrecondition,
        BlankRestore => FailedPrecondition,
        Damaged => Internal,
        Probe => Internal,
        Mark => Internal,
        Device => Internal,
        Program => Internal;
        Grow
    }
    GrowError { Capability => FailedPrecondition, Superblock => Internal, Io => Internal, Program => Internal; }
    UnmountError {
        Busy => FailedPrecondition,
        Stacked => FailedPrecondition,
        Lazily => Internal,
        Ended => Internal,
        Program => Internal,
        Table => Internal;
    }
    StageError {
        Capability => InvalidArgument,
        Option => InvalidArgument,
        NotADirectory => InvalidArgument,
        Copying => Unavailable,
        Elsewhere => AlreadyExists,
        Occupied => FailedPrecondition,
        Device => Internal,
        Mount => Internal,
        Table => Internal,
        Record => Internal,
        Interrupted => Unavailable;
        Request, Path, Prepare, Grow, Replica
    }
    UnstageError {
        Published => FailedPrecondition,
        Twin => FailedPrecondition,
        Table => Internal,
        Record => Internal,
        Interrupted => Unavailable;
        Request, Path, Unmount, Replica
    }
    PublishError {
        Capability => InvalidArgument,
        Option => InvalidArgument,
        TargetIsStaging => InvalidArgument,
        NoStagingPath => FailedPrecondition,
        NotStaged => FailedPrecondition,
        StagedElsewhere => FailedPrecondition,
        NotAsStaged => FailedPrecondition,
        NewOptions => FailedPrecondition,
        OnlyOnce => FailedPrecondition,
        Occupied => FailedPrecondition,
        Otherwise => AlreadyExists,
        Target => Internal,
        Twin => Internal,
        Mount => Internal,
        Table => Internal,
        Record => Internal,
        Interrupted => Unavailable;
        Request, Path, Replica
    }
    UnpublishError {
        NotOurs => FailedPrecondition,
        NotEmpty => FailedPrecondition,
        Twin => FailedPrecondition,
        Target => Internal,
        Table => Internal,
        Record => Internal,
        Interrupted => Unavailable;
        Request, Path, Unmount, Replica
    }
    StatsError { UnknownVolume => NotFound, NotThere => NotFound, Failed => Internal, Record => Internal; Request }
    ExpandError {
        Capability => InvalidArgument,
        Negative => InvalidArgument,
        OtherAccess => InvalidArgument,
        NotThere => NotFound,
        OutOfRange => OutOfRange,
        DeviceBehind => Unavailable,
        Mounted => FailedPrecondition,
        Grow => Internal,
        Device => Internal,
        Record => Internal,
        Interrupted => Unavailable;
        Request, Replica
    }
    HealthError { UnknownVolume => NotFound, Table => Internal, Record => Internal; Request, Replica }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_table_has_every_cause_with_its_code() {
        let document = include_str!("../../../docs/errors.md");
        for (error, variant, code) in CODES {
            let name = format!("| `node::{error}::{variant}` |");
            let row = document.lines().find(|line| line.starts_with(&name));
            let row = row.unwrap_or_else(|| panic!("docs/errors.md does not mention {name}"));
            let letters = |text: &str| text.replace('_', "").to_lowercase();
            let found = row.split('|').nth(3).map(|cell| letters(cell.trim()));
            assert_eq!(found, Some(letters(&format!("{code:?}"))), "{row}");
        }
    }
}
