use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

#[derive(Clone, Debug)]
enum Step {
    Replace { start: u64, count: u32, entry: Entry },
    Clone,
}

/// Blocks around chunk borders, leaf borders and the end, so that few steps meet many forms.
fn block() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => 0..1200_u64,
        2 => LEAF_BLOCKS - 600..LEAF_BLOCKS + 600,
        1 => 3 * LEAF_BLOCKS..3 * LEAF_BLOCKS + 40,
        1 => MAX_LOGICAL_BLOCKS - 1600..MAX_LOGICAL_BLOCKS - 1500,
    ]
}

fn entry() -> impl Strategy<Value = Entry> {
    prop_oneof![
        2 => Just(Entry::Absent),
        2 => Just(Entry::Zero),
        5 => (0..4000_u32).prop_map(|block| Entry::Data(PhysicalBlock(block))),
        1 => (0..1500_u32).prop_map(|block| Entry::Data(PhysicalBlock(MAX_PHYSICAL_BLOCKS - 1500 - block))),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let count = prop_oneof![6 => 1..4_u32, 2 => 1..64_u32, 1 => 1..1500_u32];
    prop_oneof![
        30 => (block(), count, entry()).prop_map(|(start, count, entry)| Step::Replace { start, count, entry }),
        1 => Just(Step::Clone),
    ]
}

type Model = BTreeMap<u64, Entry>;

fn replace_in_model(model: &mut Model, start: u64, count: u32, entry: Entry) -> Model {
    let mut removed = Model::new();
    for by in 0..count {
        let block = start + u64::from(by);
        let old = match entry {
            Entry::Absent => model.remove(&block),
            _ => model.insert(block, entry.advanced(by)),
        };
        removed.extend(old.map(|old| (block, old)));
    }
    removed
}

fn spread(extents: impl Iterator<Item = Extent>) -> Model {
    let mut model = Model::new();
    let mut last: Option<Extent> = None;
    for extent in extents {
        assert!(extent.is_valid() && extent.entry != Entry::Absent, "{extent:?}");
        if let Some(last) = last.replace(extent) {
            assert!(last.end() <= extent.start && !last.is_continued_by(&extent), "{last:?} then {extent:?}");
        }
        model.extend((0..extent.count).map(|by| (extent.start + u64::from(by), extent.entry.advanced(by))));
    }
    model
}

fn check(map: &Map, model: &Model) {
    assert_eq!(&spread(map.extents()), model);
    let data = model.values().filter(|entry| matches!(entry, Entry::Data(_))).count() as u64;
    assert_eq!((map.data_blocks(), map.zero_blocks()), (data, model.len() as u64 - data));
    assert_eq!(map.is_empty(), model.is_empty());
    let mut pieces = 0;
    for chunk in map.leaves.iter().flatten().flat_map(|leaf| &leaf.chunks) {
        let mut at = 0;
        while at < CHUNK_BLOCKS {
            let (value, count) = chunk.run(at);
            pieces += u64::from(value != ABSENT);
            at += count;
        }
    }
    assert_eq!(map.pieces(), pieces);
    assert!(map.extents().count() as u64 <= pieces);
    for leaf in map.leaves.iter().flatten() {
        assert_eq!(leaf.used as usize, leaf.chunks.iter().filter(|chunk| !chunk.is_empty()).count());
    }
}

/// Found by fuzzing: the value after the last physical block was that of an absent one, and the extent swallowed it.
#[test]
fn the_last_physical_blocks_end_an_extent() {
    let mut map = Map::new();
    let entry = Entry::Data(PhysicalBlock(MAX_PHYSICAL_BLOCKS - 2));
    map.replace(10, 2, entry, &mut |_| {});
    map.replace(12, 1, Entry::Zero, &mut |_| {});
    map.replace(20, 2, entry, &mut |_| {});
    let data = |start| Extent { start, count: 2, entry };
    let zero = Extent { start: 12, count: 1, entry: Entry::Zero };
    assert_eq!(map.extents().collect::<Vec<_>>(), [data(10), zero, data(20)]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_a_sorted_map(
        steps in prop::collection::vec(step(), 1..300),
        probes in prop::collection::vec((block(), 1..2000_u32), 6),
    ) {
        let (mut map, mut model) = (Map::new(), Model::new());
        let mut clones = Vec::new();
        for step in steps {
            match step {
                Step::Clone => clones.push((map.clone(), model.clone())),
                Step::Replace { start, count, entry } => {
                    let mut removed = Vec::new();
                    map.replace(start, count, entry, &mut |extent| removed.push(extent));
                    prop_assert_eq!(spread(removed.into_iter()), replace_in_model(&mut model, start, count, entry));
                }
            }
        }
        check(&map, &model);
        for (clone, model) in &clones {
            check(clone, model);
        }
        for (block, limit) in probes {
            let at = |block: u64| model.get(&block).copied().unwrap_or(Entry::Absent);
            prop_assert_eq!(map.get(block), at(block));
            let end = MAX_LOGICAL_BLOCKS.min(block + u64::from(limit));
            let expected = (block..end).zip(0..).take_while(|&(next, by)| at(next) == at(block).advanced(by)).count();
            prop_assert_eq!(map.run(block, limit), (at(block), expected as u32));
            let tail = spread(map.extents_from(block));
            prop_assert_eq!(tail, model.range(block..).map(|(block, entry)| (*block, *entry)).collect::<Model>());
        }
    }
}

#[test]
fn scattered_blocks_become_a_table_and_go_back() {
    let (mut map, mut model) = (Map::new(), Model::new());
    let form = |map: &Map| match &map.leaves[0].as_ref().expect("not empty").chunks[0] {
        Chunk::Empty => "empty",
        Chunk::One(_) => "one",
        Chunk::Sparse(_) => "sparse",
        Chunk::Table(_) => "table",
    };
    for block in 0..200_u32 {
        let (start, entry) = (u64::from(block) * 2, Entry::Data(PhysicalBlock(5000 - block)));
        map.replace(start, 1, entry, &mut |_| panic!("nothing was there"));
        replace_in_model(&mut model, start, 1, entry);
    }
    check(&map, &model);
    assert_eq!(form(&map), "table");
    let before = map.clone();
    map.replace(2, 380, Entry::Zero, &mut |_| {});
    assert_eq!(form(&map), "sparse");
    check(&before, &model);
    map.replace(0, 512, Entry::Data(PhysicalBlock(7)), &mut |_| {});
    assert_eq!(form(&map), "one");
    map.replace(0, 1 << 20, Entry::Absent, &mut |_| {});
    assert!(map.is_empty() && map.leaves.iter().all(Option::is_none));
}

#[test]
fn a_long_extent_is_one_run() {
    let mut map = Map::new();
    map.replace(100, 3 << 18, Entry::Data(PhysicalBlock(0)), &mut |_| {});
    assert_eq!(map.run(100, u32::MAX), (Entry::Data(PhysicalBlock(0)), 3 << 18));
    assert_eq!(map.run(0, u32::MAX), (Entry::Absent, 100));
    let mut removed = Vec::new();
    map.replace(100, 3 << 18, Entry::Absent, &mut |extent| removed.push(extent));
    assert_eq!(removed, [Extent { start: 100, count: 3 << 18, entry: Entry::Data(PhysicalBlock(0)) }]);
}
