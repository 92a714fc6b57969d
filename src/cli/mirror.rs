//! What `tandem volume show` says of a volume with copies on several nodes.

use super::units;
use crate::rpc::control::{self, copy::State, mirror::Role};
use serde::Serialize;

/// The copy on this node, and what it knows of the others.
#[derive(Debug, Serialize)]
pub struct Mirror {
    role: &'static str,
    serves: bool,
    generation: u64,
    version: u64,
    intact: bool,
    wished: bool,
    copied_bytes: u64,
    equal_bytes: u64,
    hot_extents: u64,
    requests: u64,
    copies: Vec<Copy>,
}

#[derive(Debug, Serialize)]
struct Copy {
    id: String,
    node: String,
    here: bool,
    member: bool,
    primary: bool,
    state: &'static str,
    connected: bool,
    copied_bytes: u64,
    equal_bytes: u64,
    left_bytes: u64,
}

impl From<&control::Mirror> for Mirror {
    fn from(m: &control::Mirror) -> Self {
        let role = match m.role() {
            Role::Unknown => "Unknown",
            Role::Outdated => "Outdated",
            Role::Candidate => "Candidate",
            Role::Secondary => "Secondary",
            Role::PrimaryReconciling => "Primary(Reconciling)",
            Role::PrimarySettling => "Primary(Settling)",
            Role::Primary => "Primary",
        };
        Self {
            role,
            serves: m.serves,
            generation: m.generation,
            version: m.version,
            intact: m.intact,
            wished: m.wished,
            copied_bytes: m.copied_bytes,
            equal_bytes: m.equal_bytes,
            hot_extents: m.hot_extents,
            requests: m.requests,
            copies: m.copies.iter().map(Copy::from).collect(),
        }
    }
}

impl From<&control::Copy> for Copy {
    fn from(c: &control::Copy) -> Self {
        let state = match c.state() {
            State::Unknown => "Unknown",
            State::UpToDate => "UpToDate",
            State::SyncTarget => "SyncTarget",
            State::Outdated => "Outdated",
        };
        Self {
            id: c.copy_id.clone(),
            node: c.node.clone(),
            here: c.here,
            member: c.member,
            primary: c.primary,
            state,
            connected: c.connected,
            copied_bytes: c.copied_bytes,
            equal_bytes: c.equal_bytes,
            left_bytes: c.left_bytes,
        }
    }
}

impl Mirror {
    /// For people.
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        let serves = if self.serves { "serves requests" } else { "does not serve requests" };
        let wished = if self.wished && !self.serves { ", and shall" } else { "" };
        let mut lines = vec![
            ("Role", format!("{}, {serves}{wished}", self.role)),
            ("Configuration", format!("version {} of generation {}", self.version, self.generation)),
            ("Hot extents", format!("{} of 4 MiB", self.hot_extents)),
        ];
        if self.copied_bytes + self.equal_bytes > 0 {
            let (copied, equal) = (units::bytes(self.copied_bytes), units::bytes(self.equal_bytes));
            lines.push(("Last resync", format!("{copied} copied, {equal} compared and equal")));
        }
        lines.extend(self.copies.iter().map(|copy| ("Copy", copy.line())));
        lines
    }
}

impl Copy {
    fn line(&self) -> String {
        let place = match self.node.as_str() {
            _ if self.here => "this node",
            "" => "unknown node",
            node => node,
        };
        let mut line = format!("{place}: {}", self.state);
        if self.state == "SyncTarget" {
            let [copied, equal, left] = [self.copied_bytes, self.equal_bytes, self.left_bytes].map(units::bytes);
            line += &format!(" ({copied} copied, {equal} equal already, at most {left} left)");
        }
        if self.primary {
            line += ", primary";
        }
        if !self.connected {
            line += ", NOT CONNECTED";
        }
        line + &format!(" ({})", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_is_told_in_the_words_of_the_field() {
        let copy = |node: &str, state: State, connected| control::Copy {
            copy_id: "c".into(),
            node: node.into(),
            here: node.is_empty(),
            primary: node.is_empty(),
            state: state.into(),
            connected,
            copied_bytes: 4096,
            left_bytes: 1 << 20,
            ..Default::default()
        };
        let copies = vec![
            copy("", State::UpToDate, true),
            copy("b", State::SyncTarget, true),
            copy("d", State::Outdated, false),
        ];
        let message = control::Mirror {
            role: Role::PrimaryReconciling.into(),
            wished: true,
            generation: 1,
            version: 7,
            copies,
            ..Default::default()
        };
        let lines: Vec<_> =
            Mirror::from(&message).lines().into_iter().map(|(title, value)| format!("{title} {value}")).collect();
        let expected = [
            "Role Primary(Reconciling), does not serve requests, and shall",
            "Configuration version 7 of generation 1",
            "Hot extents 0 of 4 MiB",
            "Copy this node: UpToDate, primary (c)",
            "Copy b: SyncTarget (4 KiB copied, 0 B equal already, at most 1 MiB left) (c)",
            "Copy d: Outdated, NOT CONNECTED (c)",
        ];
        assert_eq!(lines, expected);
    }
}
