//! What `bgpd` tells other programs than BGP daemons, read by those: MRT by bgpdump, BMP by Wireshark (root).

use anyhow::{Context, Result, ensure};
use cali_tests::bgp::pair::{OUR_AS, OURS, Pair, THEIR_AS, THEIRS, host};
use cali_tests::bgp::process::{Launch, Process};
use cali_tests::bgp::route::Community;
use cali_tests::bgp::speaker::{Product, Stage, wait};
use cali_tests::lab::{checked, programs};
use std::collections::BTreeSet;
use std::process::Command;

/// Where the station listens.
const PORT: u16 = 11019;

fn with_stage(case: impl FnOnce(&mut Stage) -> Result<()>) {
    let mut stage = Stage::new().expect("a folder");
    if let Err(error) = case(&mut stage) {
        panic!("{error:#}\n{}", stage.logs());
    }
}

/// `calictl bgp dump` of a table with learned and own routes of both families.
#[test]
fn bgpdump_reads_the_whole_table() {
    with_stage(|stage| {
        let mut pair = Pair::new(stage, Product::Bird("bird2"), OUR_AS, THEIR_AS)?;
        let [first, ..] = &mut pair.their_settings.announcements[..] else {
            unreachable!("there are announcements");
        };
        first
            .communities
            .extend([Community::Standard(64513, 7), Community::Large(64513, 2, 3)]);
        pair.up()?;
        pair.exchanged()?;
        let file = pair.ours.seat().file("table.mrt");
        let dump = Launch::new(programs().join("calictl"))
            .args(["bgp", "dump"])
            .path(&file)
            .env("CALI_RUN_DIR", pair.ours.seat().file("run").display());
        let output = dump.command(host(&*pair.ours))?.output()?;
        checked(output, || "calictl bgp dump".to_owned())?;
        let output = Command::new("bgpdump")
            .args(["-q", "-m"])
            .arg(&file)
            .output();
        let text = checked(output.context("cannot start bgpdump")?, || {
            "bgpdump".to_owned()
        })?;
        // TABLE_DUMP2|time|B|peer|AS|prefix|AS path|origin|next hop|local pref|MED|communities|...
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split('|').collect()).collect();
        let prefixes: BTreeSet<&str> = rows.iter().filter_map(|row| row.get(5).copied()).collect();
        let expected: BTreeSet<&str> = OURS.into_iter().chain(THEIRS).collect();
        ensure!(prefixes == expected, "bgpdump printed\n{text}");
        let of = |prefix: &str| rows.iter().find(|row| row.get(5) == Some(&prefix));
        for (v4, prefix) in [(true, THEIRS[0]), (false, THEIRS[2])] {
            let row = of(prefix).context("a row")?;
            let theirs = host(&*pair.theirs).address(v4).to_string();
            let learned = [
                theirs.as_str(),
                "64513",
                prefix,
                "64513",
                "IGP",
                theirs.as_str(),
            ];
            ensure!(
                row[3..9] == learned,
                "bgpdump printed {row:?}, not {learned:?}"
            );
        }
        let communities = of(THEIRS[0]).context("a row")?.get(11);
        ensure!(
            communities == Some(&"64513:7"),
            "communities {communities:?}"
        );
        Ok(())
    });
}

/// The types of all messages in a capture, as Wireshark names and checks them.
fn dissected(file: &std::path::Path, fields: &[&str]) -> Result<String> {
    let mut tshark = Command::new("tshark");
    tshark
        .args(["-r"])
        .arg(file)
        .args(["-d", &format!("tcp.port=={PORT},bmp"), "-Y", "bmp"]);
    tshark.args(["-T", "fields", "-E", "separator=|"]);
    for field in fields {
        tshark.args(["-e", field]);
    }
    let output = tshark.output().context("cannot start tshark")?;
    checked(output, || "tshark".to_owned())
}

/// A session comes up, routes come, one goes, the session ends: a station's stream from the wire.
#[test]
fn wireshark_reads_what_a_station_is_told() {
    with_stage(|stage| {
        let mut pair = Pair::new(stage, Product::Bird("bird2"), OUR_AS, THEIR_AS)?;
        let seat = pair.ours.seat();
        let (ns, file) = (&seat.host.ns, seat.file("bmp.pcap"));
        let launch = Launch::new("tcpdump")
            .args(["-n", "-U", "-i", "lo", "-w"])
            .path(&file)
            .args(["tcp", "port", &PORT.to_string()]);
        let capture = Process::start("tcpdump", &seat.host, &launch, &seat.file("tcpdump.log"))?;
        // A station that reads and says nothing.
        let launch = Launch::new("nc").args(["-l", "-k", "-d", "127.0.0.1", &PORT.to_string()]);
        let _station = Process::start("nc", &seat.host, &launch, &seat.file("station.log"))?;
        wait(|| {
            let listening = ns.run("ss", &["-Htln", &format!("sport = :{PORT}")]);
            ensure!(!listening.is_empty(), "nc does not listen");
            let log = std::fs::read_to_string(seat.file("tcpdump.log"))?;
            ensure!(
                log.contains("listening on"),
                "tcpdump does not capture: {log}"
            );
            Ok(())
        })?;
        pair.our_settings.station = Some(format!("127.0.0.1:{PORT}"));
        pair.up()?;
        pair.exchanged()?;
        pair.their_settings = pair.their_settings.without(THEIRS[1]);
        pair.theirs.configure(&pair.their_settings)?;
        pair.exchanged()?;
        let ours = pair.their_settings.neighbours[0].address;
        pair.theirs.shut(ours, "over")?;
        // 0 route monitoring, 1 statistics, 2 peer down, 3 peer up, 4 initiation.
        wait(|| {
            let kinds = dissected(&file, &["bmp.type"])?;
            let kinds: BTreeSet<&str> =
                kinds.split(['\n', ',']).filter(|k| !k.is_empty()).collect();
            ensure!(kinds == ["0", "1", "2", "3", "4"].into(), "types {kinds:?}");
            Ok(())
        })?;
        drop(capture);
        let faults = dissected(&file, &["_ws.malformed", "_ws.expert.message"])?;
        let faults: Vec<&str> = faults
            .split(['\n', '|'])
            .filter(|f| !f.is_empty())
            .collect();
        ensure!(faults.is_empty(), "Wireshark says {faults:?}");
        let routes = dissected(
            &file,
            &[
                "bgp.nlri_prefix",
                "bgp.mp_reach_nlri_ipv6_prefix",
                "bgp.withdrawn_prefix",
                "bmp.peer.down.reason",
                "bgp.notify.communication",
            ],
        )?;
        for word in ["10.2.0.0", "10.2.1.0", "fd02::", "over"] {
            ensure!(routes.contains(word), "no {word} in\n{routes}");
        }
        Ok(())
    });
}
