use super::*;

#[test]
fn an_empty_layer_is_an_image() {
    let out = tempfile::tempfile().unwrap();
    let limits = LayerLimits { max_bytes: 1 << 20, max_entries: 100 };
    let summary = write_layer(&[0; 10_240][..], &out, &limits).unwrap();
    assert_eq!(summary, LayerSummary { unpacked: 10_240, image: 4096, entries: 0 });
    assert_eq!(out.metadata().unwrap().len(), 4096);
}
