//! Replays arbitrary map logs: no panic, and what was replayed can be written and replayed again, unchanged.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tandem::store::format::BLOCK;
use tandem::store::log::{Position, Reader, Writer, epoch_of};
use tandem::store::record::Record;
use tandem::volume::InstanceId;

/// As in the golden file, so that it is a good beginning.
const START: Position = Position { epoch: 4, sequence: 0, chain: 5 };

fuzz_target!(|data: &[u8]| {
    let instance = InstanceId::from_bytes([0x11; 16]);
    let _ = epoch_of(data, instance);
    let _ = replay(data, instance);
    let file = plausible(data);
    if let Ok(commits) = replay(&file, instance) {
        write_and_replay(&commits, instance);
    }
});

fn replay(file: &[u8], instance: InstanceId) -> Result<Vec<Vec<Record>>, String> {
    let mut reader = Reader::new(file, instance, START);
    let mut commits = Vec::new();
    while let Some(commit) = reader.next_commit().map_err(|error| error.to_string())? {
        commits.push(commit.records().collect::<Result<_, _>>().map_err(|error| error.to_string())?);
    }
    Ok(commits)
}

/// Blocks that pass every check before their records are looked at: three bytes of the input decide on length and flags of
/// each, the rest is its content.
fn plausible(data: &[u8]) -> Vec<u8> {
    let mut chain = START.chain;
    let mut file = Vec::new();
    for (sequence, input) in data.chunks(256).take(32).enumerate() {
        let mut block = [0; BLOCK];
        let (control, records) = input.split_at(input.len().min(3));
        let length = u16::from_le_bytes([control[0], control.get(1).copied().unwrap_or(0)]).min(records.len() as u16);
        let flags = control.get(2).copied().unwrap_or(1);
        block[..8].copy_from_slice(b"TandemLG");
        block[8] = 1;
        block[32..48].fill(0x11);
        block[48..56].copy_from_slice(&START.epoch.to_le_bytes());
        block[56..64].copy_from_slice(&(sequence as u64).to_le_bytes());
        block[64] = flags >> 4;
        block[72..76].copy_from_slice(&chain.to_le_bytes());
        block[76..78].copy_from_slice(&length.to_le_bytes());
        block[78] = flags & 1;
        block[80..80 + records.len()].copy_from_slice(records);
        chain = crc32c::crc32c_append(crc32c::crc32c(&block[..12]), &block[16..]);
        block[12..16].copy_from_slice(&chain.to_le_bytes());
        file.extend_from_slice(&block);
    }
    file
}

fn write_and_replay(commits: &[Vec<Record>], instance: InstanceId) {
    let mut writer = Writer::new(instance, START, 64);
    let mut file = Vec::new();
    for commit in commits {
        writer.begin(writer.position().sequence);
        commit.iter().for_each(|record| writer.push(record).expect("64 blocks are enough"));
        file.extend_from_slice(writer.finish().1);
    }
    assert_eq!(replay(&file, instance).as_deref(), Ok(commits));
}
