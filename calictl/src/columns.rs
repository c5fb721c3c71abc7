//! The columns of `calictl get`, per kind: those that `calicoctl` prints.

use cali_api::Kind;
use serde_json::Value;

/// A heading, and how a cell is read from an object's JSON.
#[derive(Clone, Copy)]
pub(crate) struct Column {
    pub(crate) heading: &'static str,
    cell: Cell,
}

#[derive(Clone, Copy)]
enum Cell {
    /// The value at a JSON pointer, or this text where there is none.
    At(&'static str, &'static str),
    Computed(fn(&Value) -> String),
}

impl Column {
    const fn at(heading: &'static str, pointer: &'static str) -> Self {
        Self {
            heading,
            cell: Cell::At(pointer, ""),
        }
    }

    const fn or(heading: &'static str, pointer: &'static str, otherwise: &'static str) -> Self {
        Self {
            heading,
            cell: Cell::At(pointer, otherwise),
        }
    }

    const fn with(heading: &'static str, cell: fn(&Value) -> String) -> Self {
        Self {
            heading,
            cell: Cell::Computed(cell),
        }
    }

    pub(crate) fn cell(&self, object: &Value) -> String {
        match self.cell {
            Cell::At(pointer, otherwise) => object
                .pointer(pointer)
                .map_or_else(|| otherwise.to_owned(), text),
            Cell::Computed(compute) => compute(object),
        }
    }
}

const NAME: Column = Column::at("NAME", "/metadata/name");

/// Columns of a kind, the namespace not among them.
pub(crate) fn of(kind: Kind, wide: bool) -> Vec<Column> {
    let (narrow, more): (Vec<Column>, Vec<Column>) = match kind {
        Kind::BGPConfiguration => (
            vec![
                NAME,
                Column::or("LOGSEVERITY", "/spec/logSeverityScreen", "Info"),
                Column::or("MESHENABLED", "/spec/nodeToNodeMeshEnabled", "true"),
                Column::or("ASNUMBER", "/spec/asNumber", "-"),
            ],
            vec![],
        ),
        Kind::BGPFilter => (
            vec![
                NAME,
                Column::with("NUMEXPORTV4", |object| count(object, "/spec/exportV4")),
                Column::with("NUMIMPORTV4", |object| count(object, "/spec/importV4")),
                Column::with("NUMEXPORTV6", |object| count(object, "/spec/exportV6")),
                Column::with("NUMIMPORTV6", |object| count(object, "/spec/importV6")),
            ],
            vec![],
        ),
        Kind::BGPPeer => (
            vec![
                NAME,
                Column::at("PEERIP", "/spec/peerIP"),
                Column::with("NODE", |object| {
                    let found = ["/spec/node", "/spec/nodeSelector"]
                        .iter()
                        .find_map(|at| object.pointer(at));
                    found.map_or_else(|| "(global)".to_owned(), text)
                }),
                Column::or("ASN", "/spec/asNumber", "0"),
            ],
            vec![],
        ),
        Kind::ClusterInformation => (
            vec![
                NAME,
                Column::at("CLUSTERGUID", "/spec/clusterGUID"),
                Column::at("CLUSTERTYPE", "/spec/clusterType"),
                Column::at("CALICOVERSION", "/spec/calicoVersion"),
                Column::or("DATASTOREREADY", "/spec/datastoreReady", "false"),
            ],
            vec![],
        ),
        Kind::GlobalNetworkPolicy
        | Kind::NetworkPolicy
        | Kind::StagedGlobalNetworkPolicy
        | Kind::StagedNetworkPolicy => (
            vec![NAME, Column::or("TIER", "/spec/tier", "default")],
            vec![
                Column::at("ORDER", "/spec/order"),
                Column::at("SELECTOR", "/spec/selector"),
            ],
        ),
        Kind::StagedKubernetesNetworkPolicy => (
            vec![NAME],
            vec![Column::at("PODSELECTOR", "/spec/podSelector")],
        ),
        Kind::GlobalNetworkSet | Kind::NetworkSet => (
            vec![NAME],
            vec![Column::with("NETS", |object| {
                shortened(&list(object, "/spec/nets"))
            })],
        ),
        Kind::HostEndpoint => (
            vec![NAME, Column::at("NODE", "/spec/node")],
            vec![
                Column::at("INTERFACE", "/spec/interfaceName"),
                Column::with("IPS", |object| list(object, "/spec/expectedIPs")),
                Column::with("PROFILES", |object| list(object, "/spec/profiles")),
            ],
        ),
        Kind::IPAMConfiguration => (
            vec![
                NAME,
                Column::or("STRICTAFFINITY", "/spec/strictAffinity", "false"),
                Column::or("AUTOALLOCATEBLOCKS", "/spec/autoAllocateBlocks", "true"),
            ],
            vec![Column::or(
                "MAXBLOCKSPERHOST",
                "/spec/maxBlocksPerHost",
                "0",
            )],
        ),
        Kind::IPPool => return pool(wide),
        Kind::IPReservation => (
            vec![NAME],
            vec![Column::with("CIDRS", |object| {
                list(object, "/spec/reservedCIDRs")
            })],
        ),
        Kind::Node => (
            vec![NAME],
            vec![
                Column::or("ASN", "/spec/bgp/asNumber", "(64512)"),
                Column::at("IPV4", "/spec/bgp/ipv4Address"),
                Column::at("IPV6", "/spec/bgp/ipv6Address"),
            ],
        ),
        Kind::CalicoNodeStatus => (
            vec![NAME, Column::at("NODE", "/spec/node")],
            vec![Column::with("CLASSES", |object| {
                list(object, "/spec/classes")
            })],
        ),
        Kind::Profile => (vec![NAME], vec![Column::with("LABELS", labels)]),
        Kind::Tier => (vec![NAME, Column::at("ORDER", "/spec/order")], vec![]),
        Kind::WorkloadEndpoint => return endpoint(wide),
        Kind::BlockAffinity => (
            vec![
                NAME,
                Column::at("NODE", "/spec/node"),
                Column::at("CIDR", "/spec/cidr"),
                Column::or("STATE", "/spec/state", "confirmed"),
            ],
            vec![],
        ),
        Kind::IPAMBlock => (
            vec![
                NAME,
                Column::at("CIDR", "/spec/cidr"),
                Column::at("AFFINITY", "/spec/affinity"),
            ],
            vec![],
        ),
        _ => (vec![NAME], vec![]),
    };
    narrow
        .into_iter()
        .chain(more.into_iter().filter(|_| wide))
        .collect()
}

fn pool(wide: bool) -> Vec<Column> {
    let mut columns = vec![NAME, Column::at("CIDR", "/spec/cidr")];
    if wide {
        columns.extend([
            Column::or("NAT", "/spec/natOutgoing", "false"),
            Column::or("IPIPMODE", "/spec/ipipMode", "Never"),
            Column::or("VXLANMODE", "/spec/vxlanMode", "Never"),
            Column::or("DISABLED", "/spec/disabled", "false"),
            Column::or("DISABLEBGPEXPORT", "/spec/disableBGPExport", "false"),
        ]);
    }
    columns.push(Column::or("SELECTOR", "/spec/nodeSelector", "all()"));
    if wide {
        columns.push(Column::or(
            "ASSIGNMENTMODE",
            "/spec/assignmentMode",
            "Automatic",
        ));
    }
    columns
}

fn endpoint(wide: bool) -> Vec<Column> {
    let mut columns = vec![
        Column::with("WORKLOAD", |object| {
            let found = ["/spec/pod", "/spec/workload"]
                .iter()
                .find_map(|at| object.pointer(at));
            found.map(text).unwrap_or_default()
        }),
        Column::at("NODE", "/spec/node"),
        Column::with("NETWORKS", |object| list(object, "/spec/ipNetworks")),
        Column::at("INTERFACE", "/spec/interfaceName"),
    ];
    if wide {
        columns.insert(0, NAME);
        columns.push(Column::with("PROFILES", |object| {
            list(object, "/spec/profiles")
        }));
        columns.push(Column::with("NATS", |object| list(object, "/spec/ipNATs")));
    }
    columns
}

/// A value as a cell shows it.
pub(crate) fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn list(object: &Value, pointer: &str) -> String {
    let items = object.pointer(pointer).and_then(Value::as_array);
    items
        .map(|items| items.iter().map(text).collect::<Vec<_>>().join(","))
        .unwrap_or_default()
}

fn count(object: &Value, pointer: &str) -> String {
    object
        .pointer(pointer)
        .and_then(Value::as_array)
        .map_or(0, Vec::len)
        .to_string()
}

fn labels(object: &Value) -> String {
    let labels = object
        .pointer("/spec/labelsToApply")
        .and_then(Value::as_object);
    labels
        .map(|labels| {
            labels
                .iter()
                .map(|(key, value)| format!("{key}={}", text(value)))
                .collect::<Vec<_>>()
                .join(",")
        })
        .unwrap_or_default()
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(77) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// Cells in columns: at least five wide, three blanks between them, as Go's tabwriter is set up in `calicoctl`.
pub(crate) fn render(headings: &[&str], rows: &[Vec<String>]) -> String {
    let mut table = Rows::new(headings);
    for row in rows {
        table.push(row.clone());
    }
    let mut text = String::new();
    table.print_to(&mut text);
    text
}

/// A table whose rows come in one after the other.
pub(crate) struct Rows {
    widths: Vec<usize>,
    /// What has not been printed, the headings at first.
    waiting: Vec<Vec<String>>,
}

impl Rows {
    pub(crate) fn new(headings: &[&str]) -> Self {
        let mut rows = Self {
            widths: vec![0; headings.len()],
            waiting: Vec::new(),
        };
        rows.push(headings.iter().map(|&heading| heading.to_owned()).collect());
        rows
    }

    /// Takes a row; how many wait.
    pub(crate) fn push(&mut self, cells: Vec<String>) -> usize {
        for (width, cell) in self.widths.iter_mut().zip(&cells) {
            *width = (*width).max(cell.chars().count());
        }
        self.waiting.push(cells);
        self.waiting.len()
    }

    /// Prints what waits, in columns that are wide enough for everything so far.
    pub(crate) fn print_to(&mut self, text: &mut String) {
        for cells in self.waiting.drain(..) {
            for (cell, width) in cells.iter().zip(&self.widths) {
                let width = (width + 3).max(5);
                let blanks = width - cell.chars().count();
                text.push_str(cell);
                text.extend(std::iter::repeat_n(' ', blanks));
            }
            text.truncate(text.trim_end_matches(' ').len());
            text.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pools_have_calicos_columns() {
        let pool = json!({"metadata": {"name": "p"}, "spec": {"cidr": "10.0.0.0/16", "natOutgoing": true}});
        let headings: Vec<&str> = of(Kind::IPPool, true)
            .iter()
            .map(|column| column.heading)
            .collect();
        assert_eq!(
            headings,
            [
                "NAME",
                "CIDR",
                "NAT",
                "IPIPMODE",
                "VXLANMODE",
                "DISABLED",
                "DISABLEBGPEXPORT",
                "SELECTOR",
                "ASSIGNMENTMODE"
            ]
        );
        let cells: Vec<String> = of(Kind::IPPool, false)
            .iter()
            .map(|column| column.cell(&pool))
            .collect();
        assert_eq!(cells, ["p", "10.0.0.0/16", "all()"]);
    }

    #[test]
    fn columns_are_padded_as_calicoctl_pads_them() {
        let text = render(
            &["NAME", "CIDR"],
            &[vec!["routed".into(), "10.0.0.0/16".into()]],
        );
        assert_eq!(text, "NAME     CIDR\nrouted   10.0.0.0/16\n");
    }
}
