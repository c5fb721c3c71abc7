//! Lists that are read in pages.

use std::collections::BTreeMap;

use cali_api::{Key, Kind};

use super::{Store, network_set};
use crate::PageToken;

/// How often each object is shown, and in how many pages.
async fn read(
    store: &Store,
    namespace: Option<&str>,
    mut between: impl AsyncFnMut(usize),
) -> (BTreeMap<Key, usize>, usize) {
    let (mut seen, mut count, mut after): (BTreeMap<Key, usize>, _, Option<PageToken>) =
        (BTreeMap::new(), 0, None);
    loop {
        let page = store
            .list_page(Kind::NetworkSet, namespace, after.as_ref(), 7)
            .await
            .expect("a page");
        assert!(page.items.len() <= 7, "{} at once", page.items.len());
        count += 1;
        assert!(count < 20, "the list does not end");
        for item in page.items {
            *seen.entry(item.object.key()).or_default() += 1;
        }
        match page.next {
            Some(next) => after = Some(next),
            None => return (seen, count),
        }
        between(count).await;
    }
}

/// Page by page, what stands all the while is shown once, whatever else is written meanwhile.
pub async fn pages_together_are_the_list(store: Store) {
    // "a-b" lies before "a" in the stores that order by "a-b/" and "a/".
    let names: Vec<(&str, String)> = (0..45)
        .map(|i| (["a", "a-b", "b"][i % 3], format!("set-{i:02}")))
        .collect();
    for (namespace, name) in &names {
        let set = network_set(namespace, name, "10.0.0.0/8");
        store.create(set).await.expect("create");
    }
    let (seen, pages) = read(&store, None, async |_| {}).await;
    assert!(pages >= 7, "{pages} pages");
    assert_eq!(seen.len(), 45);
    assert!(seen.values().all(|times| *times == 1), "{seen:?}");
    let (seen, pages) = read(&store, Some("a"), async |_| {}).await;
    assert!(pages >= 3, "{pages} pages");
    assert!(seen.keys().all(|key| key.namespace.as_deref() == Some("a")));
    assert_eq!(seen.len(), 15);

    let (seen, _) = read(&store, None, async |page| {
        for namespace in ["a", "a-b", "b"] {
            let early = network_set(namespace, &format!("aa-{page}"), "10.0.0.0/8");
            let late = network_set(namespace, &format!("zz-{page}"), "10.0.0.0/8");
            store.create(early).await.expect("create");
            store.create(late).await.expect("create");
        }
        let (namespace, name) = &names[page];
        let key = Key::namespaced(Kind::NetworkSet, *namespace, name.as_str());
        store.delete(&key, None).await.expect("delete");
    })
    .await;
    assert!(seen.values().all(|times| *times == 1), "{seen:?}");
    for (namespace, name) in &names[20..] {
        let key = Key::namespaced(Kind::NetworkSet, *namespace, name.as_str());
        assert!(seen.contains_key(&key), "{key} was not shown");
    }
}
