//! Errors to gRPC codes, and the one place where a failed call is logged.
//!
//! Invariants: every match is exhaustive and has no `_`, so a new error needs a decision here. What may have left
//! something half made is never final for the sidecars (ABORTED or UNAVAILABLE), or they would forget it.

use super::errors::{
    ArgumentError, CapacityError, CreateGroupError, CreateSnapshotError, CreateVolumeError, DeleteGroupError,
    DeleteSnapshotError, DeleteVolumeError, ExpandError, GetGroupError, GetSnapshotError, GetVolumeError, ListError,
    MetadataError, ModifyError, OperatorError, PublishError, Transient, UnpublishError, ValidateError,
    VolumeHealthError,
};
use tonic::{Code, Status};

/// An error that has a gRPC code.
pub trait Coded: std::error::Error {
    /// The code that the caller gets.
    fn code(&self) -> Code;
}

/// The answer to a failed call; logs it, once and without anything of the request but what the error says.
pub fn failed(call: &'static str, error: &impl Coded) -> Status {
    let code = error.code();
    match code {
        Code::Aborted | Code::NotFound | Code::InvalidArgument => tracing::info!(call, ?code, %error, "refused"),
        _ => tracing::warn!(call, ?code, %error, "failed"),
    }
    Status::new(code, error.to_string())
}

impl Coded for ArgumentError {
    fn code(&self) -> Code {
        Code::InvalidArgument
    }
}

impl Coded for Transient {
    fn code(&self) -> Code {
        match self {
            Self::UnderWay(_) | Self::Conflict(_) | Self::Waiting { .. } => Code::Aborted,
            Self::NoAnswer { .. } | Self::Catalog(_) | Self::Replica(_) => Code::Unavailable,
            Self::NoPrimary(_) | Self::NoNode(_) => Code::Unavailable,
        }
    }
}

macro_rules! codes {
    ($($error:ident { $($variant:ident => $code:ident),* $(,)? })*) => {
        $(impl Coded for $error {
            fn code(&self) -> Code {
                match self {
                    Self::Argument(error) => error.code(),
                    Self::Transient(error) => error.code(),
                    $(Self::$variant { .. } => Code::$code,)*
                }
            }
        })*
        /// Error, variant and code, for the test of the documented table.
        #[cfg(test)]
        const CODES: &[(&str, &str, Code)] = &[$($((stringify!($error), stringify!($variant), Code::$code),)*)*];
    };
}

codes! {
    CreateVolumeError {
        Incompatible => AlreadyExists,
        SourceNotFound => NotFound,
        Range => OutOfRange,
        UnknownPool => InvalidArgument,
        NotHere => ResourceExhausted,
        NoRoom => ResourceExhausted,
        Copying => Aborted,
        Refused => InvalidArgument,
    }
    DeleteVolumeError { InUse => FailedPrecondition }
    PublishError {
        VolumeNotFound => NotFound,
        NodeNotFound => NotFound,
        NoCopy => FailedPrecondition,
        NotUpToDate => FailedPrecondition,
        NoConfiguration => FailedPrecondition,
        Incompatible => AlreadyExists,
        Elsewhere => FailedPrecondition,
        NodeFull => ResourceExhausted,
    }
    UnpublishError {}
    ValidateError { NotFound => NotFound }
    GetVolumeError { NotFound => NotFound }
    VolumeHealthError { NotFound => NotFound }
    ListError { Token => Aborted }
    CapacityError {}
    ExpandError { NotFound => NotFound, Range => OutOfRange, NoRoom => ResourceExhausted }
    ModifyError { NotFound => NotFound, Refused => InvalidArgument, NoRoom => ResourceExhausted }
    OperatorError {
        NotFound => NotFound,
        Single => FailedPrecondition,
        InUse => FailedPrecondition,
        NoCopy => FailedPrecondition,
        NotUpToDate => FailedPrecondition,
        NoPlace => ResourceExhausted,
        NoRoom => ResourceExhausted,
        Alone => FailedPrecondition,
        IsPrimary => FailedPrecondition,
        NoPrimary => FailedPrecondition,
        NotResynced => FailedPrecondition,
    }
    CreateSnapshotError {
        SourceNotFound => NotFound,
        Incompatible => AlreadyExists,
        NotHere => ResourceExhausted,
        NoRoom => ResourceExhausted,
    }
    DeleteSnapshotError { Grouped => InvalidArgument, InUse => FailedPrecondition }
    GetSnapshotError { NotFound => NotFound }
    CreateGroupError {
        SourceNotFound => NotFound,
        Incompatible => AlreadyExists,
        Apart => FailedPrecondition,
        NoRoom => ResourceExhausted,
    }
    DeleteGroupError { Mismatch => InvalidArgument, InUse => FailedPrecondition }
    GetGroupError { NotFound => NotFound, Mismatch => InvalidArgument }
    MetadataError {
        NotFound => NotFound,
        Offset => OutOfRange,
        OtherVolume => InvalidArgument,
        Refused => InvalidArgument,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_table_has_every_error_with_its_code() {
        let document = include_str!("../../docs/errors.md");
        let rows: Vec<_> = document.lines().filter(|line| line.starts_with("| `")).collect();
        let shared = [
            ("ArgumentError", "", Code::InvalidArgument),
            ("Transient", "UnderWay", Code::Aborted),
            ("Transient", "Conflict", Code::Aborted),
            ("Transient", "NoAnswer", Code::Unavailable),
            ("Transient", "Catalog", Code::Unavailable),
            ("Transient", "Replica", Code::Unavailable),
            ("Transient", "NoNode", Code::Unavailable),
            ("Transient", "Waiting", Code::Aborted),
        ];
        for (error, variant, code) in shared.iter().chain(CODES) {
            let name = if variant.is_empty() { (*error).to_owned() } else { format!("{error}::{variant}") };
            let row = rows.iter().find(|row| row.starts_with(&format!("| `{name}` |")));
            let row = row.unwrap_or_else(|| panic!("docs/errors.md does not mention {name}"));
            let code = code_name(*code);
            assert!(row.split('|').nth(3).is_some_and(|cell| cell.trim() == code), "{row} should say {code}");
        }
        assert!(rows.len() >= CODES.len() + shared.len());
    }

    fn code_name(code: Code) -> &'static str {
        match code {
            Code::InvalidArgument => "INVALID_ARGUMENT",
            Code::NotFound => "NOT_FOUND",
            Code::AlreadyExists => "ALREADY_EXISTS",
            Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Code::FailedPrecondition => "FAILED_PRECONDITION",
            Code::Aborted => "ABORTED",
            Code::OutOfRange => "OUT_OF_RANGE",
            Code::Unavailable => "UNAVAILABLE",
            other => panic!("{other:?} is not a code that the table knows"),
        }
    }
}
