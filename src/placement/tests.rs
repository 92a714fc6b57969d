use super::*;
use proptest::prelude::*;

fn node(number: usize) -> NodeName {
    NodeName(format!("node-{number}"))
}

fn at(number: usize) -> Place {
    Place::Node(node(number))
}

fn pool(number: usize, free: u64) -> Pool {
    Pool { node: node(number), pool: "default".into(), free, largest: free }
}

fn wanted(copies: usize) -> Wanted<'static> {
    Wanted { pool: "default", bytes: 10, copies, requisite: &[], preferred: &[] }
}

fn nodes(choices: Result<Vec<Choice>, Refusal>) -> Vec<String> {
    choices.expect("a place").into_iter().map(|choice| choice.node.0).collect()
}

#[test]
fn preferences_come_first_and_the_most_room_next() {
    let pools = [pool(1, 20), pool(2, 30), pool(3, 20)];
    assert_eq!(nodes(choose(&pools, &wanted(1))), ["node-2"]);
    assert_eq!(nodes(choose(&pools, &wanted(3))), ["node-2", "node-1", "node-3"]);
    let preferred = [at(9), at(3), at(1)];
    assert_eq!(nodes(choose(&pools, &Wanted { preferred: &preferred, ..wanted(2) })), ["node-3", "node-1"]);
    let full = [pool(1, 20), pool(2, 30), pool(3, 9)];
    assert_eq!(nodes(choose(&full, &Wanted { preferred: &preferred, ..wanted(1) })), ["node-1"]);
}

#[test]
fn with_fewer_copies_than_places_each_copy_is_in_one_of_them() {
    let pools = [pool(1, 20), pool(2, 30), pool(3, 20)];
    let requisite = [at(1), at(3)];
    assert_eq!(nodes(choose(&pools, &Wanted { requisite: &requisite, ..wanted(1) })), ["node-1"]);
    // A place that is none of ours does not hurt where another will do.
    let requisite = [Place::Unknown, at(3)];
    assert_eq!(nodes(choose(&pools, &Wanted { requisite: &requisite, ..wanted(1) })), ["node-3"]);
    assert_eq!(nodes(choose(&pools, &Wanted { requisite: &[Place::Anywhere], ..wanted(1) })), ["node-2"]);
}

#[test]
fn with_more_copies_than_places_each_place_has_one() {
    let pools = [pool(1, 20), pool(2, 30), pool(3, 40)];
    let (requisite, preferred) = ([at(1)], [at(1), at(2)]);
    assert_eq!(nodes(choose(&pools, &Wanted { requisite: &requisite, ..wanted(2) })), ["node-3", "node-1"]);
    let both = Wanted { requisite: &requisite, preferred: &preferred, ..wanted(2) };
    assert_eq!(nodes(choose(&pools, &both)), ["node-1", "node-2"]);
}

#[test]
fn each_refusal_says_why() {
    let pools = [pool(1, 20), pool(2, 30), Pool { pool: "fast".into(), ..pool(3, 100) }];
    let say = |wanted: &Wanted<'_>| choose(&pools, wanted).expect_err("refused").to_string();
    let unknown = say(&Wanted { pool: "slow", ..wanted(1) });
    assert_eq!(unknown, "no node has a pool \"slow\"; there are: default, fast; see `tandem pool add`");
    let elsewhere = say(&Wanted { requisite: &[at(3)], ..wanted(1) });
    assert_eq!(elsewhere, "the volume must be reachable from node-3, and pool \"default\" is on node-1, node-2");
    let few = say(&wanted(3));
    assert_eq!(few, "3 copies need 3 nodes with a pool \"default\", and it is on node-1, node-2");
    let full = say(&Wanted { bytes: 25, ..wanted(2) });
    assert!(full.contains("node-1 takes at most 20 bytes, node-2 takes at most 30 bytes"), "{full}");
}

#[test]
fn the_largest_volume_is_what_the_copies_that_must_be_can_take() {
    let pools = [pool(1, 20), pool(2, 30), pool(3, 40)];
    assert_eq!(largest(&pools, &wanted(1)), 40);
    assert_eq!(largest(&pools, &wanted(2)), 30);
    assert_eq!(largest(&pools, &Wanted { requisite: &[at(1)], ..wanted(2) }), 20);
    assert_eq!(largest(&pools, &Wanted { requisite: &[at(9)], ..wanted(1) }), 0);
    assert_eq!(largest(&pools, &wanted(4)), 0);
}

fn any_pools() -> impl Strategy<Value = Vec<Pool>> {
    let one = (0usize..6, prop::sample::select(vec!["default", "fast"]), 0u64..40, 0u64..40);
    let pools = prop::collection::vec(one, 0..12);
    pools.prop_map(|pools| {
        let unique: BTreeMap<_, _> = pools.into_iter().map(|(n, p, free, largest)| ((n, p), (free, largest))).collect();
        let pool = |((n, p), (free, largest)): ((usize, &str), (u64, u64))| Pool {
            node: node(n),
            pool: p.to_owned(),
            free,
            largest: largest.min(free),
        };
        unique.into_iter().map(pool).collect()
    })
}

fn any_places() -> impl Strategy<Value = Vec<Place>> {
    let place = prop_oneof![8 => (0usize..7).prop_map(at), 1 => Just(Place::Anywhere), 1 => Just(Place::Unknown)];
    prop::collection::vec(place, 0..5)
}

/// Every set of nodes of that size: what the choice is compared with.
fn subsets(pools: &[Pool], copies: usize) -> Vec<Vec<&Pool>> {
    let all = (0u32..1 << pools.len()).filter(|bits| bits.count_ones() as usize == copies);
    all.map(|bits| pools.iter().enumerate().filter(|(at, _)| bits >> at & 1 == 1).map(|(_, p)| p).collect()).collect()
}

fn meets(chosen: &[&NodeName], requisite: &[Place]) -> bool {
    let places: BTreeSet<_> = requisite.iter().collect();
    let each_copy = chosen.iter().all(|node| places.iter().any(|place| place.includes(node)));
    let each_place = places.iter().all(|place| chosen.iter().any(|node| place.includes(node)));
    places.is_empty() || chosen.len() < places.len() && each_copy || chosen.len() >= places.len() && each_place
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn a_choice_keeps_every_rule_and_is_found_whenever_there_is_one(
        pools in any_pools(), copies in 1usize..4, bytes in 1u64..40, requisite in any_places(), preferred in any_places(),
    ) {
        let wanted = Wanted { pool: "default", bytes, copies, requisite: &requisite, preferred: &preferred };
        let possible: Vec<Pool> =
            pools.iter().filter(|p| p.pool == "default" && p.largest >= bytes).cloned().collect();
        let names = |set: &Vec<&Pool>| set.iter().map(|pool| pool.node.clone()).collect::<Vec<_>>();
        let exists = subsets(&possible, copies).iter().any(|set| meets(&names(set).iter().collect::<Vec<_>>(), &requisite));
        let chosen = choose(&pools, &wanted);
        prop_assert_eq!(&chosen, &choose(&pools, &wanted));
        let mut backwards = pools.clone();
        backwards.reverse();
        prop_assert_eq!(chosen.is_ok(), exists, "{:?}", chosen);
        prop_assert_eq!(chosen.clone().ok(), choose(&backwards, &wanted).ok());
        if let Ok(chosen) = chosen {
            let nodes: BTreeSet<_> = chosen.iter().map(|choice| &choice.node).collect();
            prop_assert_eq!(nodes.len(), copies, "two copies on one node");
            for choice in &chosen {
                let pool = pools.iter().find(|p| p.node == choice.node && p.pool == choice.pool);
                prop_assert!(pool.is_some_and(|pool| pool.largest >= bytes), "over capacity");
            }
            prop_assert!(meets(&nodes.into_iter().collect::<Vec<_>>(), &requisite), "outside the requisite places");
        }
    }
}
