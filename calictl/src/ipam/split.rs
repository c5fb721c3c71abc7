//! `ipam split`: one pool becomes several smaller ones, which together hold the same addresses and keep every allocation.

use anyhow::{Context, Result, anyhow, bail, ensure};
use cali_api::v3::IPPool;
use cali_api::{AnyResource, Cidr, Key, Kind};
use cali_datastore::Datastore;
use clap::Args;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::datastore::is_locked;
use crate::{connection, output};

#[derive(Debug, Args)]
pub(crate) struct Split {
    /// How many pools it becomes: a power of two
    number: u32,
    /// The pool with this CIDR
    #[arg(long, required_unless_present = "name")]
    cidr: Option<Cidr>,
    /// The pool with this name
    #[arg(long, conflicts_with = "cidr")]
    name: Option<String>,
}

pub(super) async fn run(split: &Split) -> Result<()> {
    let store = connection::open().await?;
    ensure!(
        is_locked(store.as_ref()).await?,
        "the datastore is not locked, so nodes would work while their pool changes: lock it first: calictl datastore lock"
    );
    let pool = find(store.as_ref(), split).await?;
    let parts = parts(&pool, split.number)?;
    // Pools may not overlap, so the whole goes before its parts come. Nodes do not look while the datastore is locked.
    store
        .delete(
            &Key::cluster(Kind::IPPool, pool.metadata.name.as_str()),
            None,
        )
        .await
        .with_context(|| format!("cannot take away the pool {}", pool.metadata.name))?;
    let mut made = Vec::new();
    for part in &parts {
        if let Err(error) = store.create(part.clone().into()).await {
            let restored = restore(store.as_ref(), &made, pool.clone()).await;
            let error =
                anyhow!(error).context(format!("cannot make the pool {}", part.metadata.name));
            return Err(match restored {
                Ok(()) => error.context("the pool is as it was"),
                Err(worse) => error.context(format!(
                    "and the pool {} could not be put back ({worse:#}): create it again with CIDR {}",
                    pool.metadata.name, pool.spec.cidr
                )),
            });
        }
        made.push(part.metadata.name.as_str());
    }
    for part in &parts {
        output::line(format!("{}  {}", part.metadata.name, part.spec.cidr));
    }
    output::line(format!(
        "Successfully split pool {} into {} pools; unlock the datastore to go on: calictl datastore unlock",
        pool.metadata.name,
        parts.len()
    ));
    Ok(())
}

async fn find(store: &dyn Datastore, split: &Split) -> Result<IPPool> {
    let pools = store
        .list(Kind::IPPool, None)
        .await
        .context("cannot list the pools")?;
    let wanted = |pool: &IPPool| match (&split.name, split.cidr) {
        (Some(name), _) => pool.metadata.name == *name,
        (None, cidr) => Some(pool.spec.cidr) == cidr,
    };
    let found = pools.items.iter().find_map(|item| match &*item.object {
        AnyResource::IPPool(pool) if wanted(pool) => Some((**pool).clone()),
        _ => None,
    });
    found.with_context(|| match (&split.name, split.cidr) {
        (Some(name), _) => format!("there is no pool {name}"),
        (None, Some(cidr)) => format!("there is no pool {cidr}"),
        (None, None) => "no pool is named".to_owned(),
    })
}

async fn restore(store: &dyn Datastore, made: &[&str], pool: IPPool) -> Result<()> {
    for name in made {
        store
            .delete(&Key::cluster(Kind::IPPool, *name), None)
            .await?;
    }
    let mut pool = pool;
    pool.metadata.resource_version = None;
    pool.metadata.uid = None;
    store.create(pool.into()).await?;
    Ok(())
}

/// The pools that take its place: `split-NAME-0` and on, in the order of their addresses.
fn parts(pool: &IPPool, number: u32) -> Result<Vec<IPPool>> {
    ensure!(
        number.is_power_of_two() && number > 1,
        "{number} is no power of two above one: a CIDR can only be halved again and again"
    );
    let whole = pool.spec.cidr;
    let longer = u8::try_from(number.trailing_zeros()).context("too many parts")?;
    let prefix = whole.prefix_len().saturating_add(longer);
    let block = pool.spec.block_prefix_len();
    if prefix > block {
        bail!(
            "{number} parts of {whole} would be /{prefix} each, smaller than a block (/{block}) of the pool {}",
            pool.metadata.name
        );
    }
    (0..number)
        .map(|at| {
            let mut part = pool.clone();
            part.metadata.name = format!("split-{}-{at}", pool.metadata.name);
            part.metadata.resource_version = None;
            part.metadata.uid = None;
            part.metadata.creation_timestamp = None;
            part.spec.cidr = nth(whole, prefix, at)?;
            Ok(part)
        })
        .collect()
}

/// Part number `at` of a network that is cut into networks of this length.
fn nth(whole: Cidr, prefix: u8, at: u32) -> Result<Cidr> {
    let address: IpAddr = match whole.addr() {
        IpAddr::V4(first) => {
            let offset = u64::from(at) << (32 - u32::from(prefix));
            Ipv4Addr::from(u32::try_from(u64::from(u32::from(first)) + offset)?).into()
        }
        IpAddr::V6(first) => {
            let offset = u128::from(at) << (128 - u32::from(prefix));
            Ipv6Addr::from(u128::from(first) + offset).into()
        }
    };
    Cidr::new(address, prefix).context("the part is no network")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(cidr: &str, block: u8) -> IPPool {
        let text = format!(
            "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {{name: p}}\nspec: {{cidr: '{cidr}', blockSize: {block}, natOutgoing: true}}"
        );
        let objects = cali_api::manifest::parse("test", &text).expect("a manifest");
        match &objects[0].value {
            AnyResource::IPPool(pool) => (**pool).clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_parts_cover_the_whole_and_keep_its_settings() {
        for (cidr, block, number, wanted) in [
            ("10.0.0.0/8", 26, 4, ["10.0.0.0/10", "10.192.0.0/10"]),
            (
                "255.255.0.0/16",
                26,
                2,
                ["255.255.0.0/17", "255.255.128.0/17"],
            ),
            ("fd00::/48", 122, 2, ["fd00::/49", "fd00:0:0:8000::/49"]),
        ] {
            let parts = parts(&pool(cidr, block), number).expect("parts");
            assert_eq!(parts.len(), number as usize);
            let ends = [&parts[0], &parts[parts.len() - 1]].map(|part| part.spec.cidr.to_string());
            assert_eq!(ends, wanted);
            assert_eq!(parts[1].metadata.name, "split-p-1");
            assert!(parts.iter().all(|part| part.spec.nat_outgoing));
        }
    }

    #[test]
    fn what_cannot_be_cut_so_is_refused() {
        for (number, reason) in [
            (3, "power of two"),
            (1, "power of two"),
            (1024, "smaller than a block"),
        ] {
            let error = parts(&pool("10.0.0.0/20", 26), number)
                .expect_err("refused")
                .to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
