//! Requests of a device at the primary, and a node without a copy that uses the volume in its place.

use super::*;

/// A tag that no device has.
const GUEST: Tag = Tag(200);

/// The engine was killed, and the volume was published at a node without a copy meanwhile: what the device of this node had asked
/// before was executed over what that node had written.
#[test]
fn what_a_device_asked_before_another_node_used_the_volume_is_never_executed() {
    let mut script = Script::new(true, &[], Memory::Kept);
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(0)) });
    script.give(Input::Request { tag: GUEST, request: Request::Write(extent(1)) });
    assert_eq!(script.outputs, [], "it may become primary");
    script.give(Input::FenceRequests { below: GUEST });
    assert_eq!(script.outputs, [Output::Complete { tag: WRITER, result: Err(DiskError::Fenced) }]);
    script.give(Input::Replied { tag: WRITER });
    script.read_catalogue();
    script.commit();
    script.hear(Script::joined(FIRST, &[]));
    script.hear(Message::Settled(Frame { stamp: version(2), incarnation: FIRST }));
    assert_eq!(script.replica.role(), Role::Primary(Primary::Serving));
    let of_device = |output: &Output| match output {
        Output::Send { message: Message::Prepare { request, .. }, .. } => *request == Request::Write(extent(0)),
        Output::Disk { tag, .. } => *tag == WRITER,
        _ => false,
    };
    let of_guest = |output: &Output| match output {
        Output::Send { message: Message::Prepare { request, .. }, .. } => *request == Request::Write(extent(1)),
        _ => false,
    };
    assert!(!script.outputs.iter().any(of_device), "{:?}", script.outputs);
    assert!(script.outputs.iter().any(of_guest), "what is no device's goes on: {:?}", script.outputs);
}
