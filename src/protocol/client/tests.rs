//! One client and what a primary answers it, word for word. What clusters do with clients is in `simulation/client.rs`.

use super::*;
use crate::protocol::{Host, Next, Stamp, Standpoint};
use crate::volume::BlockRange;

fn primary() -> InstanceId {
    InstanceId::from_bytes([1; 16])
}

fn here() -> InstanceId {
    InstanceId::from_bytes([2; 16])
}

/// A primary with so many blocks that serves, and its client.
struct Pair {
    client: Client,
    host: Host,
    core: Standpoint,
    /// How often a session was asked for.
    entered: usize,
}

impl Pair {
    fn new(blocks: u64) -> Self {
        let mut host = Host::new(Incarnation(1));
        let term = Stamp::default();
        host.told(Some(here()), Some(term));
        let core = Standpoint { term: Some(term), answers: true, quiet: true, blocks, lost: Stamp::default() };
        let mut pair = Self { client: Client::new(Incarnation(2)), host, core, entered: 0 };
        pair.act(|client, outputs| client.connected(primary(), outputs));
        pair
    }

    /// What the client says to the primary is answered at once, and so on until nobody has anything to say; what was done.
    fn act(&mut self, tell: impl FnOnce(&mut Client, &mut Vec<ClientOutput>)) -> Vec<OperationId> {
        let (mut outputs, mut done) = (Vec::new(), Vec::new());
        tell(&mut self.client, &mut outputs);
        for _ in 0..1000 {
            if outputs.is_empty() {
                return done;
            }
            for output in std::mem::take(&mut outputs) {
                match output {
                    ClientOutput::Done { operation, result } => {
                        assert_eq!(result, Ok(()));
                        done.push(operation);
                    }
                    ClientOutput::Send { message, .. } => {
                        let answer = self.answer(&message);
                        self.client.received(primary(), &answer, &mut outputs);
                    }
                }
            }
        }
        panic!("they never come to an end: {} sessions", self.entered);
    }

    fn answer(&mut self, message: &Message) -> Message {
        if let Message::Enter { client, attempt } = *message {
            self.entered += 1;
            self.host.enter(here(), client, attempt);
            let Next::Send(_, entered) = self.host.settle(self.core) else { panic!("nothing is in its way") };
            return entered;
        }
        let Message::Ask { session, serial, request } = *message else { panic!("{message:?}") };
        match self.host.ask(here(), session, serial, request, self.core) {
            Ok(place) => self.host.done(place, Ok(())).expect("it waits").1,
            Err(refused) => refused,
        }
    }
}

fn read(first: u64) -> Request {
    Request::Read(BlockRange::new(first, 1).expect("a range"))
}

/// A device that has grown is asked beyond the size that the primary knows: sessions followed each other as fast as messages go.
#[test]
fn a_request_beyond_the_size_that_the_primary_knows_is_asked_again_with_each_heartbeat() {
    let mut pair = Pair::new(100);
    assert_eq!(pair.entered, 1);
    let [inside, beyond] = [OperationId(1), OperationId(2)];
    assert_eq!(pair.act(|client, outputs| client.start(inside, read(99), outputs)), [inside]);
    assert!(pair.act(|client, outputs| client.start(beyond, read(100), outputs)).is_empty());
    assert_eq!(pair.entered, 2, "once at once: it may have been replaced");
    for heartbeat in 1..=5 {
        assert!(pair.act(Client::tick).is_empty());
        assert_eq!(pair.entered, 2 + 2 * heartbeat, "two in a heartbeat");
    }
    pair.core.blocks = 200;
    assert_eq!(pair.act(Client::tick), [beyond]);
    assert!(pair.client.is_served());
}
