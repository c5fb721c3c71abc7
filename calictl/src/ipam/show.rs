//! `ipam show`.

use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::Result;
use cali_api::v3::{Affinity, AffinityType, IPAMConfigurationSpec};
use cali_api::{AnyResource, Cidr, Kind};
use cali_ipam::collect::Inventory;

use super::Cluster;
use crate::bgp_table::table;
use crate::output;

pub(super) async fn run(
    cluster: &Cluster,
    blocks: bool,
    borrowed: bool,
    configuration: bool,
) -> Result<()> {
    if configuration {
        let found = cluster.find(Kind::IPAMConfiguration, "default").await?;
        let spec = match found {
            Some((AnyResource::IPAMConfiguration(c), _)) => c.spec,
            _ => IPAMConfigurationSpec::default(),
        };
        output::write(settings(&spec));
    } else if borrowed {
        output::write(loans(&cluster.inventory));
    } else {
        let list = cluster.store.list(Kind::IPReservation, None).await?;
        let reserved: Vec<Cidr> = list
            .items
            .iter()
            .filter_map(|item| match item.object.as_ref() {
                AnyResource::IPReservation(r) => Some(&r.spec.reserved_cidrs),
                _ => None,
            })
            .flatten()
            .map(cali_api::Net::cidr)
            .collect();
        output::write(usage(&cluster.inventory, &reserved, blocks));
    }
    Ok(())
}

pub(super) fn address(inventory: &Inventory, address: IpAddr) -> String {
    let holder = inventory.blocks.iter().find_map(|b| b.holder(address));
    let Some(owner) = holder else {
        return format!("{address} is not assigned\n");
    };
    let mut text = format!("IP {address} is in use\n");
    if let Some(handle) = owner.handle() {
        let _ = writeln!(text, "Handle ID: {handle}");
    }
    text.push_str("Active Owner Attributes:\n");
    for (name, value) in owner.attributes() {
        let _ = writeln!(text, "  {name}: {value}");
    }
    text
}

fn size(cidr: &Cidr) -> f64 {
    let width = if cidr.is_v4() { 32 } else { 128 };
    2_f64.powi(i32::from(width - cidr.prefix_len()))
}

/// A number of addresses as `%.5g` prints it.
fn number(value: f64) -> String {
    if value < 100_000.0 {
        return format!("{value:.0}");
    }
    let exponent = value.log10().floor();
    let mantissa = format!("{:.4}", value / 10_f64.powf(exponent));
    let mantissa = mantissa.trim_end_matches('0').trim_end_matches('.');
    format!("{mantissa}e+{exponent:02}")
}

fn share(value: f64, total: f64) -> String {
    // The sum of nothing is -0.0, which would be printed with its sign.
    let value = value + 0.0;
    format!("{} ({:.0}%)", number(value), 100.0 * value / total)
}

fn usage(inventory: &Inventory, reserved: &[Cidr], with_blocks: bool) -> String {
    let row = |grouping: &str, cidr: Cidr| -> [String; 6] {
        let total = size(&cidr);
        let used = inventory
            .blocks
            .iter()
            .filter(|b| cidr.contains_cidr(&b.cidr()))
            .map(|b| b.held().len())
            .sum::<usize>() as f64;
        let kept: f64 = reserved
            .iter()
            .filter(|r| r.overlaps(&cidr))
            .map(|r| size(r).min(total))
            .sum();
        [
            grouping.to_owned(),
            cidr.to_string(),
            number(total),
            share(used, total),
            share(kept, total),
            share((total - used - kept).max(0.0), total),
        ]
    };
    let mut rows = Vec::new();
    for pool in &inventory.pools {
        rows.push(row("IP Pool", pool.spec.cidr));
        let within = inventory
            .blocks
            .iter()
            .map(cali_ipam::block::Block::cidr)
            .filter(|c| with_blocks && pool.spec.cidr.contains_cidr(c));
        rows.extend(within.map(|cidr| row("Block", cidr)));
    }
    let header = [
        "GROUPING",
        "CIDR",
        "IPS TOTAL",
        "IPS IN USE",
        "IPS RESERVED",
        "IPS FREE",
    ];
    for column in 2..6 {
        // Numbers stand at the right.
        let cells = rows.iter().map(|r| r[column].len());
        let width = cells.max().unwrap_or(0).max(header[column].len());
        for row in &mut rows {
            row[column] = format!("{:>width$}", row[column]);
        }
    }
    table(&header, &rows)
}

fn loans(inventory: &Inventory) -> String {
    let mut rows = Vec::new();
    for block in &inventory.blocks {
        let Some(Affinity {
            owner: AffinityType::Host,
            name: lender,
        }) = block.affinity()
        else {
            continue;
        };
        for (address, owner) in block.held() {
            let Some(node) = owner.attribute("node").filter(|n| n != lender) else {
                continue;
            };
            let pod = owner.attribute("namespace").zip(owner.attribute("pod"));
            let (kind, user) = match pod {
                Some((namespace, pod)) => ("pod", format!("{namespace}/{pod}")),
                None => (
                    owner.attribute("type").unwrap_or("unclassified"),
                    owner.handle().unwrap_or_default().to_owned(),
                ),
            };
            rows.push([
                address.to_string(),
                node.to_owned(),
                block.cidr().to_string(),
                lender.clone(),
                kind.to_owned(),
                user,
            ]);
        }
    }
    let header = [
        "IP",
        "BORROWING-NODE",
        "BLOCK",
        "BLOCK OWNER",
        "TYPE",
        "ALLOCATED-TO",
    ];
    table(&header, &rows)
}

fn settings(spec: &IPAMConfigurationSpec) -> String {
    let persistence = spec
        .kube_virt_vm_address_persistence
        .map_or_else(|| "Enabled".to_owned(), |p| p.to_string());
    let rows = [
        ["StrictAffinity", &spec.strict_affinity.to_string()],
        ["AutoAllocateBlocks", &spec.auto_allocates().to_string()],
        ["MaxBlocksPerHost", &spec.max_blocks_per_host.to_string()],
        ["KubeVirtVMAddressPersistence", &persistence],
        [
            "IPCooldownSeconds",
            &spec.ip_cooldown_seconds.unwrap_or(0).to_string(),
        ],
    ]
    .map(|row| row.map(str::to_owned));
    table(&["PROPERTY", "VALUE"], &rows)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use cali_api::v3::IPPoolSpec;
    use cali_ipam::Owner;
    use cali_ipam::block::{Block, Clock};
    use cali_ipam::pools::Pool;

    use super::*;

    fn inventory() -> Inventory {
        let now = SystemTime::UNIX_EPOCH;
        let cidr: Cidr = "10.0.0.0/26".parse().unwrap();
        let mut block = Block::new(cidr, Affinity::host("n1"), now);
        for (handle, node, count) in [("h1", "n1", 2), ("h2", "n2", 1)] {
            let owner = Owner::new(handle)
                .with("node", node)
                .with("namespace", "default")
                .with("pod", handle);
            block.assign(count, &owner, Clock::without_cooldown(now), |_| false);
        }
        Inventory {
            blocks: vec![block],
            pools: vec![Pool {
                name: "pool".into(),
                spec: IPPoolSpec::new("10.0.0.0/16".parse().unwrap()),
            }],
            ..Inventory::default()
        }
    }

    #[test]
    fn pools_and_blocks_show_what_is_used_reserved_and_free() {
        let reserved = ["10.0.0.60/30".parse().unwrap()];
        insta::assert_snapshot!(usage(&inventory(), &reserved, true), @r"
        +----------+-------------+-----------+------------+--------------+--------------+
        | GROUPING |    CIDR     | IPS TOTAL | IPS IN USE | IPS RESERVED |   IPS FREE   |
        +----------+-------------+-----------+------------+--------------+--------------+
        | IP Pool  | 10.0.0.0/16 |     65536 |     3 (0%) |       4 (0%) | 65529 (100%) |
        | Block    | 10.0.0.0/26 |        64 |     3 (5%) |       4 (6%) |     57 (89%) |
        +----------+-------------+-----------+------------+--------------+--------------+
        ");
    }

    #[test]
    fn borrowed_addresses_name_lender_and_borrower() {
        insta::assert_snapshot!(loans(&inventory()), @r"
        +----------+----------------+-------------+-------------+------+--------------+
        |    IP    | BORROWING-NODE |    BLOCK    | BLOCK OWNER | TYPE | ALLOCATED-TO |
        +----------+----------------+-------------+-------------+------+--------------+
        | 10.0.0.2 | n2             | 10.0.0.0/26 | n1          | pod  | default/h2   |
        +----------+----------------+-------------+-------------+------+--------------+
        ");
    }

    #[test]
    fn an_address_shows_its_holder() {
        let held = address(&inventory(), "10.0.0.2".parse().unwrap());
        assert_eq!(
            held,
            "IP 10.0.0.2 is in use\nHandle ID: h2\nActive Owner Attributes:\n  namespace: default\n  node: n2\n  pod: h2\n"
        );
        let free = address(&inventory(), "10.0.0.9".parse().unwrap());
        assert_eq!(free, "10.0.0.9 is not assigned\n");
    }

    #[test]
    fn large_numbers_are_short() {
        assert_eq!(number(65536.0), "65536");
        assert_eq!(number(2_f64.powi(64)), "1.8447e+19");
    }

    #[test]
    fn nothing_reserved_is_shown_without_a_sign() {
        assert_eq!(share(-0.0, 64.0), "0 (0%)");
        let nothing: f64 = std::iter::empty::<f64>().sum();
        assert_eq!(share(nothing, 64.0), "0 (0%)");
    }
}
