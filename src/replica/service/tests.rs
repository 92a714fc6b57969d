use super::*;

#[test]
fn copies_that_send_in_the_clear_are_noted() {
    let mirrored = rpc::Volume { record: Some(rpc::CopyRecord::default()), ..Default::default() };
    let noted = told(mirrored.clone(), Some(false));
    let [note] = &noted.health[..] else { panic!("one line: {noted:?}") };
    assert!(note.kind() == rpc::health::Kind::Note && note.message.contains("not encrypted"), "{note:?}");
    assert_eq!(told(mirrored.clone(), Some(true)), mirrored);
    let alone = rpc::Volume::default();
    assert_eq!(told(alone.clone(), Some(false)), alone, "it sends nothing");
    assert_eq!(told(alone.clone(), None), alone);
}
