//! Lists that are read in pages.

use std::collections::BTreeMap;

use cali_api::{Key, Kind};

use super::{Store, network_set};
use crate::PageToken;

type Names = [(&'static str, String)];

/// How often each object is shown, and in how many pages; between them, other objects come and some of `changed` go.
async fn read(
    store: &Store,
    namespace: Option<&str>,
    changed: Option<&Names>,
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
        if let Some(names) = changed {
            write_between(store, count, names).await;
        }
    }
}

/// New objects before and behind all others, and one less.
async fn write_between(store: &Store, page: usize, names: &Names) {
    for namespace in ["a", "a-b", "b"] {
        for name in [format!("aa-{page}"), format!("zz-{page}")] {
            let set = network_set(namespace, &name, "10.0.0.0/8");
            store.create(set).await.expect("create");
        }
    }
    let (namespace, name) = &names[page];
    let key = Key::namespaced(Kind::NetworkSet, *namespace, name.as_str());
    store.delete(&key, None).await.expect("delete");
}

/// Page by page, what stands all the while is shown once, whatever else is written meanwhile.
pub async fn pages_together_are_the_list(store: Store) {
    // "a-b" lies before "a" in the stores that order by "a-b/" and "a/".
    let names: Vec<(&'static str, String)> = (0..45)
        .map(|i| (["a", "a-b", "b"][i % 3], format!("set-{i:02}")))
        .collect();
    for (namespace, name) in &names {
        let set = network_set(namespace, name, "10.0.0.0/8");
        store.create(set).await.expect("create");
    }
    let (seen, pages) = read(&store, None, None).await;
    assert!(pages >= 7, "{pages} pages");
    assert_eq!(seen.len(), 45);
    assert!(seen.values().all(|times| *times == 1), "{seen:?}");
    let (seen, pages) = read(&store, Some("a"), None).await;
    assert!(pages >= 3, "{pages} pages");
    assert!(seen.keys().all(|key| key.namespace.as_deref() == Some("a")));
    assert_eq!(seen.len(), 15);

    let (seen, _) = read(&store, None, Some(&names)).await;
    assert!(seen.values().all(|times| *times == 1), "{seen:?}");
    for (namespace, name) in &names[20..] {
        let key = Key::namespaced(Kind::NetworkSet, *namespace, name.as_str());
        assert!(seen.contains_key(&key), "{key} was not shown");
    }
}
