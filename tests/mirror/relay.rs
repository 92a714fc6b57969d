//! A way between two nodes that damages a block or stands still when it is told to.

use super::lab::Lab;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A read of so many bytes has payload in its middle: headers and crcs are shorter than half of it.
const SURELY_DATA: usize = 3000;

#[derive(Clone)]
pub struct Relay {
    wanted: Arc<AtomicBool>,
    stands: Arc<AtomicBool>,
    flipped: Arc<AtomicU64>,
}

impl Relay {
    /// What calls this node comes through here. The node is not started yet.
    pub async fn before(lab: &Lab, number: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        lab.catalogue.set_node(lab.copies[number], &format!("node-{number}"), &address);
        let behind = lab.directory(number).join("relay");
        std::fs::write(&behind, "").expect("write");
        let relay = Self { wanted: Arc::default(), stands: Arc::default(), flipped: Arc::default() };
        tokio::spawn(relay.clone().run(listener, behind));
        relay
    }

    pub fn flip_one(&self) {
        self.wanted.store(true, Ordering::SeqCst);
    }

    /// Nothing passes meanwhile.
    pub fn stand(&self, still: bool) {
        self.stands.store(still, Ordering::SeqCst);
    }

    pub fn flipped(&self) -> u64 {
        self.flipped.load(Ordering::SeqCst)
    }

    async fn run(self, listener: TcpListener, behind: PathBuf) {
        while let Ok((caller, _)) = listener.accept().await {
            let address = std::fs::read_to_string(&behind).unwrap_or_default();
            let Ok(called) = TcpStream::connect(&address).await else { continue };
            let (relay, (caller_in, caller_out), (called_in, called_out)) =
                (self.clone(), caller.into_split(), called.into_split());
            tokio::spawn(async move {
                tokio::select! {
                    () = relay.pass(caller_in, called_out) => {}
                    () = relay.pass(called_in, caller_out) => {}
                }
            });
        }
    }

    async fn pass(&self, mut from: impl AsyncReadExt + Unpin, mut to: impl AsyncWriteExt + Unpin) {
        let mut bytes = vec![0; 4096];
        loop {
            match from.read(&mut bytes).await {
                Ok(0) | Err(_) => return,
                Ok(read) => {
                    while self.stands.load(Ordering::SeqCst) {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    if read >= SURELY_DATA && self.wanted.swap(false, Ordering::SeqCst) {
                        bytes[read / 2] ^= 0x10;
                        self.flipped.fetch_add(1, Ordering::SeqCst);
                    }
                    if to.write_all(&bytes[..read]).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}
