//! The rules of a catalogue, over a file and over the network, and what only the network can do wrong.

mod network;
mod proposals;
mod rig;
mod rules;
mod writers;
