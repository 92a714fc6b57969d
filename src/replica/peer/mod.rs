//! The transport between the copies of a volume: frames over TCP and TLS, a handshake, and conversations that heal.
//!
//! ```text
//!   engine --Session::send, flush--> queue (bounded) --frames--> Line (TLS) ... Line --Event--> the peer's engine
//!                     a task of each conversation: connects, hears silence, writes what is much; tells Connected, Silent, Room
//! ```
//! # Invariants
//! * One connection per volume and peer: a full queue, a slow disk or a large request of one volume never holds up another,
//!   and frames of a conversation arrive in order or not at all.
//! * A message comes from the copy that it is said to come from: certificate, node, copy and volume were checked before.
//! * Whatever may wait has a limit ([`MAX_IN_FLIGHT`], [`MAX_FRAME`](header::MAX_FRAME), events, handshakes), and the
//!   sender sees it.
//! * Messages may be lost when a connection ends; [`Event::Connected`] says that, and the core says everything again.

mod blocks;
mod connection;
mod endpoint;
mod fair;
pub mod header;
pub mod hello;
mod line;
mod low_water;
pub mod message;
pub mod packet;
pub mod payload;
mod queue;
mod session;
#[cfg(test)]
mod tests;
mod volume;

pub use blocks::Blocks;
pub use endpoint::{AlreadyOpen, Endpoint, Security};
pub use hello::Party;
pub use line::{Heard, Line};
pub use payload::{Attached, DIGEST, Payload, Sealed, digests, is_zero};
pub use queue::{MAX_IN_FLIGHT, SendError};
pub use volume::{Event, Session};
