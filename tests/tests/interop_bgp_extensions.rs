//! `bgpd` with the BGP daemons that others run: what only some of them have (root).

use anyhow::{Context, Result, ensure};
use cali_control::status::BgpRequest;
use cali_tests::bgp::cali::{ask, peer};
use cali_tests::bgp::pair::{OUR_AS, OURS, Pair, THEIR_AS, THEIRS, host, kernel_has, seen};
use cali_tests::bgp::route::{Announcement, Community, Route, listed};
use cali_tests::bgp::speaker::{
    Neighbour, Product, Settings, Speaker, Stage, Start, all_established, table_is, wait,
};
use cali_tests::cases;
use std::collections::BTreeSet;

/// RFC 9494 §4.6.
const LLGR_STALE: Community = Community::Standard(65535, 6);
/// The AS numbers of two that announce the same prefixes.
const SOURCES: [u32; 2] = [64601, 64602];

/// The middle one learns two paths for each prefix and tells the end both (RFC 7911).
fn all_paths(stage: &mut Stage, middle: Product, end: Product) -> Result<()> {
    let mut middle = stage.speaker(middle)?;
    let mut end = stage.speaker(end)?;
    let mut sources = [stage.speaker(Product::Cali)?, stage.speaker(Product::Cali)?];
    let add_path = |mut neighbour: Neighbour| {
        neighbour.add_path = true;
        neighbour
    };
    let prefixes = [THEIRS[0], THEIRS[2]];
    let mut middle_neighbours: Vec<Neighbour> = Vec::new();
    for (source, asn) in sources.iter().zip(SOURCES) {
        middle_neighbours.extend(Neighbour::both(host(&**source), asn));
    }
    middle_neighbours.extend(Neighbour::both(host(&*end), THEIR_AS).map(add_path));
    let middle_settings = Settings::new(OUR_AS, middle_neighbours);
    let to_middle = Neighbour::both(host(&*middle), OUR_AS);
    let end_settings = Settings::new(THEIR_AS, to_middle.clone().map(add_path));
    middle.start(&middle_settings, Start::Fresh)?;
    end.start(&end_settings, Start::Fresh)?;
    for (source, asn) in sources.iter_mut().zip(SOURCES) {
        let settings =
            Settings::new(asn, to_middle.clone()).announce(prefixes.map(Announcement::plain));
        source.start(&settings, Start::Fresh)?;
    }
    all_established(&mut *middle, &middle_settings).context("as the middle sees it")?;
    let path = |text: &str, source: u32| -> Result<Route> {
        let prefix: cali_api::Cidr = text.parse()?;
        Ok(Route {
            prefix,
            next_hop: host(&*middle).address(prefix.is_v4()),
            as_path: vec![OUR_AS, source],
            communities: BTreeSet::new(),
        })
    };
    let mut expected = Vec::new();
    for text in prefixes {
        for source in SOURCES {
            expected.push(path(text, source)?);
        }
    }
    table_is(&mut *end, &expected).context("table of the end")?;
    // One of them goes, and only that one.
    sources[0].crash()?;
    expected.retain(|route| route.as_path[1] != SOURCES[0]);
    table_is(&mut *end, &expected).context("after one source is gone")
}

fn we_send_all_paths(stage: &mut Stage, product: Product) -> Result<()> {
    all_paths(stage, Product::Cali, product)
}

fn we_take_all_paths(stage: &mut Stage, product: Product) -> Result<()> {
    all_paths(stage, product, Product::Cali)
}

/// RFC 8950, as far as both kernels.
fn ipv4_goes_over_an_ipv6_session(stage: &mut Stage, product: Product) -> Result<()> {
    let mut pair =
        Pair::new(stage, product, OUR_AS, THEIR_AS)?.each(|neighbour| neighbour.extended = true);
    for settings in [&mut pair.our_settings, &mut pair.their_settings] {
        settings.neighbours.retain(|n| n.address.is_ipv6());
    }
    pair.up()?;
    pair.exchanged()?;
    for (speaker, prefixes) in [(&pair.ours, THEIRS), (&pair.theirs, OURS)] {
        kernel_has(&**speaker, &prefixes, true)?;
        let route = host(&**speaker).kernel_route(&prefixes[0].parse()?);
        ensure!(route.contains("via inet6"), "{route}");
    }
    Ok(())
}

/// The other is away for longer than its restart time: its routes stay, as a last choice, and are passed on as such.
fn their_long_absence_makes_their_routes_the_last_choice(
    stage: &mut Stage,
    product: Product,
) -> Result<()> {
    let mut pair =
        Pair::new(stage, product, OUR_AS, THEIR_AS)?.each(|neighbour| neighbour.long_lived = true);
    let mut third = stage.speaker(Product::Cali)?;
    let long_lived = |mut neighbour: Neighbour| {
        neighbour.long_lived = true;
        neighbour
    };
    let to_third = Neighbour::both(host(&*third), OUR_AS).map(long_lived);
    let sessions_with_them = pair.our_settings.neighbours.clone();
    pair.our_settings.neighbours.extend(to_third);
    pair.our_settings.announcements.clear();
    let third_settings = Settings::new(
        OUR_AS,
        Neighbour::both(host(&*pair.ours), OUR_AS).map(long_lived),
    );
    third.start(&third_settings, Start::Fresh)?;
    pair.up()?;
    let theirs = seen(&*pair.theirs, &pair.their_settings);
    table_is(&mut *third, &theirs)?;

    pair.theirs.crash()?;
    let mut stale = theirs.clone();
    for route in &mut stale {
        route.communities.insert(LLGR_STALE);
    }
    table_is(&mut *third, &stale).context("what we pass on")?;
    kernel_has(&*pair.ours, &THEIRS, true)?;
    for neighbour in &sessions_with_them {
        ensure!(
            !pair.ours.established(neighbour.address)?,
            "a session with a daemon that does not run"
        );
    }
    pair.theirs.start(&pair.their_settings, Start::Again)?;
    table_is(&mut *third, &theirs).context("after the return")
}

/// We are away for longer than our restart time.
fn our_long_absence_makes_our_routes_their_last_choice(
    stage: &mut Stage,
    product: Product,
) -> Result<()> {
    let mut pair =
        Pair::new(stage, product, OUR_AS, THEIR_AS)?.each(|neighbour| neighbour.long_lived = true);
    pair.up()?;
    pair.exchanged()?;
    let ours = seen(&*pair.ours, &pair.our_settings);
    let mut stale = ours.clone();
    for route in &mut stale {
        route.communities.insert(LLGR_STALE);
    }
    pair.ours.crash()?;
    table_is(&mut *pair.theirs, &stale).context("what the other keeps")?;
    pair.ours.start(&pair.our_settings, Start::Again)?;
    table_is(&mut *pair.theirs, &ours).context("after our return")
}

fn watched(stage: &mut Stage, product: Product, far: bool) -> Result<()> {
    let mut pair = Pair::new(stage, product, OUR_AS, THEIR_AS)?.each(|neighbour| {
        neighbour.bfd = true;
        neighbour.far = far;
    });
    pair.up()?;
    let neighbours = pair.our_settings.neighbours.clone();
    for neighbour in &neighbours {
        wait(|| {
            let bfd = peer(pair.ours.seat(), neighbour.address)?.bfd;
            let state = bfd.map(|bfd| bfd.state);
            ensure!(
                state.as_deref() == Some("Up"),
                "BFD with {} is {state:?}",
                neighbour.address
            );
            Ok(())
        })?;
    }
    // Only BFD's packets are lost: the hold time has no part in what follows.
    host(&*pair.theirs).ns.run(
        "nft",
        &["add table inet silence; add chain inet silence out { type filter hook output priority 0; }; \
           add rule inet silence out udp dport { 3784, 4784 } drop"],
    );
    for neighbour in &neighbours {
        wait(|| {
            let peer = peer(pair.ours.seat(), neighbour.address)?;
            let bfd = peer.bfd.map(|bfd| bfd.state);
            ensure!(
                bfd.as_deref() != Some("Up"),
                "BFD with {} has not noticed",
                neighbour.address
            );
            Ok(())
        })?;
    }
    wait(|| {
        let log = std::fs::read_to_string(pair.ours.seat().file("log"))?;
        ensure!(log.contains("BFD"), "no session ended because of BFD");
        Ok(())
    })?;
    host(&*pair.theirs)
        .ns
        .run("nft", &["delete table inet silence"]);
    pair.established().context("after the path is back")
}

fn bfd_over_one_hop_notices_a_silent_path(stage: &mut Stage, product: Product) -> Result<()> {
    watched(stage, product, false)
}

fn bfd_over_many_hops_notices_a_silent_path(stage: &mut Stage, product: Product) -> Result<()> {
    watched(stage, product, true)
}

/// RFC 9003, in both directions.
fn words_of_a_shutdown_arrive(stage: &mut Stage, product: Product) -> Result<()> {
    let mut pair = Pair::new(stage, product, OUR_AS, THEIR_AS)?;
    pair.up()?;
    let (to_us, to_them) = ("new optics, back at ten", "moved to rack 12");
    let ours = pair.their_settings.neighbours[0].address;
    let theirs = pair.our_settings.neighbours[0].address;
    pair.theirs.shut(ours, to_us)?;
    wait(|| {
        let info = peer(pair.ours.seat(), theirs)?.info.unwrap_or_default();
        ensure!(info.contains(to_us), "bgpd shows {info:?}");
        Ok(())
    })?;
    let drain = BgpRequest::Drain {
        message: Some(to_them.to_owned()),
    };
    ask(pair.ours.seat(), &drain)?;
    wait(|| {
        let log = std::fs::read_to_string(pair.theirs.log())?;
        ensure!(
            log.contains(to_them),
            "the other has not logged {to_them:?}"
        );
        Ok(())
    })
}

/// A session without any other address than fe80::/10, as a fabric without addresses of its own has it.
fn routes_go_over_a_link_local_session(stage: &mut Stage, product: Product) -> Result<()> {
    let mut pair = Pair::new(stage, product, OUR_AS, THEIR_AS)?;
    // FRR 10.3 at times finds no interface for the next hops of a link-local session that it has accepted (`show bgp nexthop` has
    // them without one, never updated), so it dials.
    pair.our_settings.neighbours = vec![Neighbour {
        waits: matches!(product, Product::Frr("frr10")),
        ..Neighbour::on_link(host(&*pair.theirs), THEIR_AS)
    }];
    pair.their_settings.neighbours = vec![Neighbour::on_link(host(&*pair.ours), OUR_AS)];
    pair.up()?;
    let known = |speaker: &mut dyn Speaker, prefixes: [&str; 3]| {
        wait(|| {
            let seen = speaker.table()?;
            let names: BTreeSet<String> = seen.iter().map(|r| r.prefix.to_string()).collect();
            ensure!(
                names == prefixes.map(str::to_owned).into(),
                "seen {}",
                listed(&seen)
            );
            Ok(())
        })
    };
    known(&mut *pair.ours, THEIRS).context("table of bgpd")?;
    known(&mut *pair.theirs, OURS).context("table of the other")?;
    for (speaker, other, prefixes) in [
        (&*pair.ours, host(&*pair.theirs).link_local(), THEIRS),
        (&*pair.theirs, host(&*pair.ours).link_local(), OURS),
    ] {
        kernel_has(speaker, &prefixes, true)?;
        for prefix in prefixes {
            let route = host(speaker).kernel_route(&prefix.parse()?);
            let through = route.contains(&format!("via inet6 {other} dev eth0"))
                || route.contains(&format!("via {other} dev eth0"));
            ensure!(through, "{prefix} is not reached through {other}: {route}");
        }
    }
    Ok(())
}

/// RFC 7313: what is sent again is enclosed in two markers, both ways.
fn a_refresh_has_a_beginning_and_an_end(stage: &mut Stage, product: Product) -> Result<()> {
    let mut pair = Pair::new(stage, product, OUR_AS, THEIR_AS)?
        .each(|neighbour| neighbour.graceful_restart = true);
    pair.up()?;
    pair.exchanged()?;
    let ours = pair.their_settings.neighbours.clone();
    let theirs = pair.our_settings.neighbours.clone();
    for (ours, theirs) in ours.iter().zip(&theirs) {
        let seen = peer(pair.ours.seat(), theirs.address)?;
        ensure!(
            seen.capabilities
                .iter()
                .any(|c| c == "enhanced-route-refresh"),
            "{} has {:?}",
            theirs.address,
            seen.capabilities
        );
        let markers = |count: u64, before: u64, who: &str| {
            ensure!(
                count >= before + 2,
                "{who} had {count} ROUTE-REFRESH messages, {before} before"
            );
            Ok(())
        };
        let before = seen.messages_in.refresh;
        pair.ours.ask_for_refresh(theirs.address)?;
        wait(|| {
            let count = peer(pair.ours.seat(), theirs.address)?.messages_in.refresh;
            markers(count, before, "bgpd")
        })?;
        let before = pair.theirs.refreshes(ours.address)?;
        pair.theirs.ask_for_refresh(ours.address)?;
        wait(|| markers(pair.theirs.refreshes(ours.address)?, before, "the other"))?;
    }
    pair.exchanged()
}

cases! {
    bird2 (Product::Bird("bird2")):
        we_send_all_paths
        we_take_all_paths
        ipv4_goes_over_an_ipv6_session
        routes_go_over_a_link_local_session
        a_refresh_has_a_beginning_and_an_end
        bfd_over_one_hop_notices_a_silent_path
        bfd_over_many_hops_notices_a_silent_path
        words_of_a_shutdown_arrive;
    bird217 (Product::Bird("bird217")):
        we_send_all_paths
        we_take_all_paths
        ipv4_goes_over_an_ipv6_session
        routes_go_over_a_link_local_session
        a_refresh_has_a_beginning_and_an_end
        their_long_absence_makes_their_routes_the_last_choice
        our_long_absence_makes_our_routes_their_last_choice
        bfd_over_one_hop_notices_a_silent_path
        bfd_over_many_hops_notices_a_silent_path
        words_of_a_shutdown_arrive;
    bird3 (Product::Bird("bird3")):
        we_send_all_paths
        we_take_all_paths
        ipv4_goes_over_an_ipv6_session
        routes_go_over_a_link_local_session
        a_refresh_has_a_beginning_and_an_end
        their_long_absence_makes_their_routes_the_last_choice
        our_long_absence_makes_our_routes_their_last_choice
        bfd_over_one_hop_notices_a_silent_path
        bfd_over_many_hops_notices_a_silent_path
        words_of_a_shutdown_arrive;
    frr8 (Product::Frr("frr")):
        we_send_all_paths
        we_take_all_paths
        ipv4_goes_over_an_ipv6_session
        routes_go_over_a_link_local_session
        a_refresh_has_a_beginning_and_an_end
        bfd_over_one_hop_notices_a_silent_path
        bfd_over_many_hops_notices_a_silent_path
        words_of_a_shutdown_arrive;
    frr10 (Product::Frr("frr10")):
        we_send_all_paths
        we_take_all_paths
        ipv4_goes_over_an_ipv6_session
        routes_go_over_a_link_local_session
        a_refresh_has_a_beginning_and_an_end
        their_long_absence_makes_their_routes_the_last_choice
        our_long_absence_makes_our_routes_their_last_choice
        bfd_over_one_hop_notices_a_silent_path
        bfd_over_many_hops_notices_a_silent_path
        words_of_a_shutdown_arrive;
    gobgp310 (Product::GoBgp("gobgpd")):
        we_send_all_paths
        we_take_all_paths
        their_long_absence_makes_their_routes_the_last_choice
        our_long_absence_makes_our_routes_their_last_choice
        words_of_a_shutdown_arrive;
    gobgp336 (Product::GoBgp("gobgp3")):
        we_send_all_paths
        we_take_all_paths
        their_long_absence_makes_their_routes_the_last_choice
        our_long_absence_makes_our_routes_their_last_choice
        words_of_a_shutdown_arrive;
    openbgpd (Product::OpenBgpd):
        we_send_all_paths
        we_take_all_paths
        a_refresh_has_a_beginning_and_an_end
        words_of_a_shutdown_arrive;
}
