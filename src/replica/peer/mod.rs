//! The transport between the copies of a volume: frames over TCP and TLS, a handshake, and conversations that heal.
//!
//! ```text
//!   engine --Session::send, flush--> queue (bounded) --frames--> TLS --> the peer's Volume --Event--> its engine
//! ```
//! # Invariants
//! * One connection per volume and peer: a full queue, a slow disk or a large request of one volume never holds up another,
//!   and frames of a conversation arrive in order or not at all.
//! * A message comes from the copy that it is said to come from: certificate, node, copy and volume were checked before.
//! * Whatever may wait has a limit ([`MAX_IN_FLIGHT`], [`MAX_FRAME`](header::MAX_FRAME), events, handshakes), and the
//!   sender sees it.
//! * Messages may be lost when a connection ends; [`Event::Connected`] says that, and the core says everything again.

mod connection;
mod endpoint;
pub mod header;
pub mod hello;
pub mod message;
pub mod packet;
pub mod payload;
mod queue;
mod session;
#[cfg(test)]
mod tests;
mod volume;

pub use endpoint::{AlreadyOpen, Endpoint, Security};
pub use hello::Party;
pub use payload::{Attached, Blocks, DIGEST, Payload, Sealed, digests, is_zero};
pub use queue::{MAX_IN_FLIGHT, SendError};
pub use volume::{Event, Session};
