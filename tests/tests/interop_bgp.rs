//! `bgpd` with the BGP daemons that others run, each in a namespace of its own (root).
//!
//! A case is a fact about one session or one small topology; the table at the end says which daemon takes part in it.

use anyhow::{Context, Result, ensure};
use cali_tests::bgp::cali::{peer, status};
use cali_tests::bgp::pair::{OUR_AS, OURS, Pair, THEIR_AS, THEIRS, host, kernel_has, seen};
use cali_tests::bgp::route::{Announcement, Community, Route};
use cali_tests::bgp::speaker::{
    Neighbour, Product, Settings, Speaker, Stage, Start, all_established, table_is, wait,
};
use cali_tests::bgp::watch::{Pings, Watch};
use cali_tests::cases;
use std::net::IpAddr;

fn routes_of_both_families_go_both_ways(stage: &mut Stage, product: Product) -> Result<()> {
    let mut pair = Pair::new(stage, product, OUR_AS, THEIR_AS)?;
    pair.up()?;
    pair.exchanged()?;
    kernel_has(&*pair.ours, &THEIRS, true)?;
    if pair.theirs.has_kernel_routes() {
        kernel_has(&*pair.theirs, &OURS, true)?;
    }
    Ok(())
}

fn a_withdrawn_route_is_gone_and_the_others_stay(
    stage: &mut Stage,
    product: Product,
) -> Result<()> {
    let mut pair = Pair::new(stage, product, OUR_AS, THEIR_AS)?;
    pair.up()?;
    pair.exchanged()?;
    let established = sessions(&*pair.ours, &pair.our_settings)?;
    for (our_prefix, their_prefix) in [(OURS[0], THEIRS[0]), (OURS[2], THEIRS[2])] {
        pair.our_settings = pair.our_settings.without(our_prefix);
        pair.ours.configure(&pair.our_settings)?;
        pair.their_settings = pair.their_settings.without(their_prefix);
        pair.theirs.configure(&pair.their_settings)?;
        pair.exchanged()?;
        kernel_has(&*pair.ours, &[their_prefix], false)?;
    }
    kernel_has(&*pair.ours, &[THEIRS[1]], true)?;
    // And it comes back.
    pair.our_settings = pair.our_settings.announce([Announcement::plain(OURS[0])]);
    pair.ours.configure(&pair.our_settings)?;
    pair.their_settings = pair
        .their_settings
        .announce([Announcement::plain(THEIRS[0])]);
    pair.theirs.configure(&pair.their_settings)?;
    pair.exchanged()?;
    kernel_has(&*pair.ours, &[THEIRS[0]], true)?;
    same_sessions(&pair, &established)
}

/// How often each session of `bgpd` was established; a change means that one was reset.
fn sessions(ours: &dyn Speaker, settings: &Settings) -> Result<Vec<(IpAddr, u64)>> {
    let addresses = settings.neighbours.iter().map(|n| n.address);
    addresses
        .map(|address| Ok((address, peer(ours.seat(), address)?.established_count)))
        .collect()
}

fn same_sessions(pair: &Pair, before: &[(IpAddr, u64)]) -> Result<()> {
    let now = sessions(&*pair.ours, &pair.our_settings)?;
    ensure!(
        now == before,
        "a session was reset: {before:?} before, {now:?} now"
    );
    Ok(())
}

fn communities_of_all_kinds_go_both_ways(stage: &mut Stage, product: Product) -> Result<()> {
    let mut pair = Pair::new(stage, product, OUR_AS, THEIR_AS)?;
    let of = |asn: u16| {
        [
            Community::Standard(asn, 1),
            Community::Standard(asn, 65535),
            Community::Large(4_200_000_000, 2, 3),
            Community::Large(asn.into(), 0, 4_294_967_295),
            Community::RouteTarget(asn, 77),
        ]
    };
    let announce = |settings: &mut Settings, asn| {
        for announcement in &mut settings.announcements[..1] {
            announcement.communities.extend(of(asn));
        }
        // IPv6 with one of each kind.
        settings.announcements[2]
            .communities
            .extend([of(asn)[0], of(asn)[2], of(asn)[4]]);
    };
    announce(&mut pair.our_settings, 64512);
    announce(&mut pair.their_settings, 64513);
    pair.up()?;
    pair.exchanged()
}

fn as_numbers_of_four_octets_are_whole_on_both_sides(
    stage: &mut Stage,
    product: Product,
) -> Result<()> {
    let mut pair = Pair::new(stage, product, 4_200_000_001, 4_200_000_002)?;
    pair.up()?;
    pair.exchanged()
}

fn a_session_with_password_needs_the_right_one(stage: &mut Stage, product: Product) -> Result<()> {
    let mut pair = Pair::new(stage, product, OUR_AS, THEIR_AS)?
        .each(|neighbour| neighbour.password = Some("correct horse".replace(' ', "-")));
    let right = pair.our_settings.clone();
    pair.our_settings = right.each(|neighbour| neighbour.password = Some("wrong".to_owned()));
    pair.start()?;
    // Segments of a connection attempt were refused for their digest, in either direction.
    let refused = |pair: &Pair| {
        [&pair.ours, &pair.theirs]
            .map(|speaker| host(&**speaker).tcp_counter("TcpExtTCPMD5Failure"))
            .iter()
            .sum::<u64>()
    };
    wait(|| {
        let count = refused(&pair);
        ensure!(count >= 4, "only {count} segments were refused");
        Ok(())
    })?;
    for neighbour in right.neighbours.iter().map(|n| n.address) {
        ensure!(
            !pair.ours.established(neighbour)?,
            "a session with {neighbour} came up with a wrong password"
        );
    }
    // Put right without a restart.
    pair.our_settings = right;
    pair.ours.configure(&pair.our_settings)?;
    pair.established()?;
    pair.exchanged()
}

fn routes_are_sent_again_when_asked_for(stage: &mut Stage, product: Product) -> Result<()> {
    let mut pair = refreshed(stage, product)?;
    let established = sessions(&*pair.ours, &pair.our_settings)?;
    for neighbour in pair.our_settings.neighbours.clone() {
        let before = peer(pair.ours.seat(), neighbour.address)?.updates_in;
        pair.ours.ask_for_refresh(neighbour.address)?;
        wait(|| {
            let now = peer(pair.ours.seat(), neighbour.address)?.updates_in;
            ensure!(now > before, "{} sent nothing again", neighbour.address);
            Ok(())
        })?;
    }
    pair.exchanged()?;
    same_sessions(&pair, &established)
}

fn we_send_routes_again_when_asked(stage: &mut Stage, product: Product) -> Result<()> {
    let mut pair = refreshed(stage, product)?;
    let established = sessions(&*pair.ours, &pair.our_settings)?;
    let our_addresses = pair.their_settings.neighbours.clone();
    for (theirs, ours) in pair
        .our_settings
        .neighbours
        .clone()
        .iter()
        .zip(our_addresses)
    {
        let before = peer(pair.ours.seat(), theirs.address)?.updates_out;
        pair.theirs.ask_for_refresh(ours.address)?;
        wait(|| {
            let now = peer(pair.ours.seat(), theirs.address)?.updates_out;
            ensure!(now > before, "nothing was sent to {} again", theirs.address);
            Ok(())
        })?;
    }
    pair.exchanged()?;
    same_sessions(&pair, &established)
}

/// Graceful restart is on: FRR 8 answers no request before its own End-of-RIB, which it sends only then.
fn refreshed(stage: &mut Stage, product: Product) -> Result<Pair> {
    let mut pair = Pair::new(stage, product, OUR_AS, THEIR_AS)?
        .each(|neighbour| neighbour.graceful_restart = true);
    pair.up()?;
    pair.exchanged()?;
    Ok(pair)
}

/// A pair with graceful restart, and on each side an address inside each family's first prefix of it.
fn with_graceful_restart(stage: &mut Stage, product: Product) -> Result<Pair> {
    let mut pair = Pair::new(stage, product, OUR_AS, THEIR_AS)?
        .each(|neighbour| neighbour.graceful_restart = true);
    for (speaker, prefixes) in [(&pair.ours, OURS), (&pair.theirs, THEIRS)] {
        for prefix in [prefixes[0], prefixes[2]] {
            let ns = &host(&**speaker).ns;
            ns.ip(&format!("addr add {} dev lo", inside(prefix)?));
        }
    }
    pair.up()?;
    pair.exchanged()?;
    kernel_has(&*pair.ours, &THEIRS, true)?;
    Ok(pair)
}

/// An address inside a prefix.
fn inside(prefix: &str) -> Result<IpAddr> {
    let text = prefix.split_once('/').context("a prefix")?.0;
    let text = match text.strip_suffix(".0") {
        Some(start) => format!("{start}.1"),
        None => format!("{text}1"),
    };
    Ok(text.parse()?)
}

/// What must not be lost at a speaker while another restarts or it does itself: packets to the first prefix of each
/// family, and kernel routes.
fn witnesses(stage: &Stage, at: &dyn Speaker, prefixes: [&str; 3]) -> Result<(Watch, Vec<Pings>)> {
    let watch = Watch::start(host(at), stage.folder())?;
    let pings = [prefixes[0], prefixes[2]]
        .iter()
        .map(|prefix| Pings::start(host(at), inside(prefix)?))
        .collect::<Result<_>>()?;
    Ok((watch, pings))
}

/// The side that restarts comes back without its second prefix: all else was never gone, this one goes in the end.
fn our_restart_costs_no_kernel_route(stage: &mut Stage, product: Product) -> Result<()> {
    let mut pair = with_graceful_restart(stage, product)?;
    let here = witnesses(stage, &*pair.ours, THEIRS)?;
    let there = if pair.theirs.has_kernel_routes() {
        kernel_has(&*pair.theirs, &OURS, true)?;
        Some(witnesses(stage, &*pair.theirs, OURS)?)
    } else {
        None
    };
    let held = seen(&*pair.ours, &pair.our_settings);

    pair.ours.crash()?;
    for neighbour in pair.their_settings.neighbours.clone() {
        wait(|| {
            ensure!(
                !pair.theirs.established(neighbour.address)?,
                "the other has not noticed the crash"
            );
            Ok(())
        })?;
    }
    if pair.theirs.keeps_routes() {
        table_is(&mut *pair.theirs, &held).context("routes that the other holds for us")?;
    }
    pair.our_settings = pair.our_settings.without(OURS[1]);
    pair.ours.start(&pair.our_settings, Start::Again)?;
    pair.established()?;
    pair.exchanged()?;
    wait(|| {
        ensure!(!status(pair.ours.seat())?.restarting, "bgpd still restarts");
        Ok(())
    })?;
    kernel_has(&*pair.ours, &THEIRS, true)?;

    unharmed("bgpd", here, &THEIRS)?;
    if let Some(there) = there {
        kernel_has(&*pair.theirs, &[OURS[1]], false)?;
        wait(|| {
            ensure!(
                there.0.lost(&OURS[1].parse()?)?,
                "the watcher did not see the stale route go"
            );
            Ok(())
        })?;
        unharmed("the other", there, &[OURS[0], OURS[2]])?;
    }
    Ok(())
}

fn unharmed(at: &str, (watch, pings): (Watch, Vec<Pings>), prefixes: &[&str]) -> Result<()> {
    for ping in pings {
        ping.stop()?;
    }
    for prefix in prefixes {
        let prefix = prefix.parse()?;
        ensure!(
            !watch.lost(&prefix)?,
            "the kernel route to {prefix} at {at} was gone:\n{}",
            watch.report(&prefix)?.join("\n")
        );
    }
    Ok(())
}

fn their_restart_costs_no_kernel_route(stage: &mut Stage, product: Product) -> Result<()> {
    let mut pair = with_graceful_restart(stage, product)?;
    let here = witnesses(stage, &*pair.ours, THEIRS)?;

    pair.theirs.crash()?;
    for neighbour in pair.our_settings.neighbours.clone() {
        wait(|| {
            let peer = peer(pair.ours.seat(), neighbour.address)?;
            ensure!(
                peer.graceful_restart,
                "bgpd does not hold the routes of {}: {peer:?}",
                neighbour.address
            );
            Ok(())
        })?;
    }
    kernel_has(&*pair.ours, &THEIRS, true)?;
    pair.their_settings = pair.their_settings.without(THEIRS[1]);
    pair.theirs.start(&pair.their_settings, Start::Again)?;
    pair.established()?;
    pair.exchanged()?;
    kernel_has(&*pair.ours, &[THEIRS[1]], false)?;
    wait(|| {
        ensure!(
            here.0.lost(&THEIRS[1].parse()?)?,
            "the watcher did not see the stale route go"
        );
        Ok(())
    })?;
    unharmed("bgpd", here, &[THEIRS[0], THEIRS[2]])
}

/// The middle one reflects between its two clients (RFC 4456): next hop, path and communities as they were.
fn reflected(stage: &mut Stage, middle: Product, clients: Product) -> Result<()> {
    let mut reflector = stage.speaker(middle)?;
    let mut sides = [stage.speaker(clients)?, stage.speaker(clients)?];
    let neighbours = sides.iter().flat_map(|side| {
        Neighbour::both(host(&**side), OUR_AS).map(|mut neighbour| {
            neighbour.client = true;
            neighbour
        })
    });
    let reflector_settings = Settings::new(OUR_AS, neighbours);
    let announced = [OURS, THEIRS].map(|prefixes| {
        prefixes.map(|prefix| Announcement::with(prefix, [Community::Standard(64512, 5)]))
    });
    let settings = announced.clone().map(|announcements| {
        Settings::new(OUR_AS, Neighbour::both(host(&*reflector), OUR_AS)).announce(announcements)
    });
    reflector.start(&reflector_settings, Start::Fresh)?;
    for (side, settings) in sides.iter_mut().zip(&settings) {
        side.start(settings, Start::Fresh)?;
    }
    all_established(&mut *reflector, &reflector_settings)?;
    let learned = |from: usize| -> Vec<Route> {
        let mut routes = seen(&*sides[from], &settings[from]);
        routes.iter_mut().for_each(|route| route.as_path.clear());
        routes
    };
    let expected = [learned(1), learned(0)];
    for (side, expected) in sides.iter_mut().zip(&expected) {
        table_is(&mut **side, expected).context("table of a client")?;
    }
    Ok(())
}

fn we_reflect_routes_between_two_of_them(stage: &mut Stage, product: Product) -> Result<()> {
    reflected(stage, Product::Cali, product)
}

fn we_are_clients_of_their_reflector(stage: &mut Stage, product: Product) -> Result<()> {
    reflected(stage, product, Product::Cali)
}

// What a daemon cannot do itself is not in its list: GoBGP has no command that sends ROUTE-REFRESH, and
// after a restart it says that it kept its routes on the first session only; OpenBGPD helps
// those that restart, but does not come back as one that kept its routes; ExaBGP is no reflector, and release 4.2
// fails in its own code (`Update(RouteRefresh(..))`) when it is asked for its routes on a session with enhanced
// refresh.
cases! {
    bird2 (Product::Bird("bird2")):
        routes_of_both_families_go_both_ways
        a_withdrawn_route_is_gone_and_the_others_stay
        communities_of_all_kinds_go_both_ways
        as_numbers_of_four_octets_are_whole_on_both_sides
        a_session_with_password_needs_the_right_one
        routes_are_sent_again_when_asked_for
        we_send_routes_again_when_asked
        our_restart_costs_no_kernel_route
        their_restart_costs_no_kernel_route
        we_reflect_routes_between_two_of_them
        we_are_clients_of_their_reflector;
    bird217 (Product::Bird("bird217")):
        routes_of_both_families_go_both_ways
        a_withdrawn_route_is_gone_and_the_others_stay
        communities_of_all_kinds_go_both_ways
        as_numbers_of_four_octets_are_whole_on_both_sides
        a_session_with_password_needs_the_right_one
        routes_are_sent_again_when_asked_for
        we_send_routes_again_when_asked
        our_restart_costs_no_kernel_route
        their_restart_costs_no_kernel_route
        we_reflect_routes_between_two_of_them
        we_are_clients_of_their_reflector;
    bird3 (Product::Bird("bird3")):
        routes_of_both_families_go_both_ways
        a_withdrawn_route_is_gone_and_the_others_stay
        communities_of_all_kinds_go_both_ways
        as_numbers_of_four_octets_are_whole_on_both_sides
        a_session_with_password_needs_the_right_one
        routes_are_sent_again_when_asked_for
        we_send_routes_again_when_asked
        our_restart_costs_no_kernel_route
        their_restart_costs_no_kernel_route
        we_reflect_routes_between_two_of_them
        we_are_clients_of_their_reflector;
    frr8 (Product::Frr("frr")):
        routes_of_both_families_go_both_ways
        a_withdrawn_route_is_gone_and_the_others_stay
        communities_of_all_kinds_go_both_ways
        as_numbers_of_four_octets_are_whole_on_both_sides
        a_session_with_password_needs_the_right_one
        routes_are_sent_again_when_asked_for
        we_send_routes_again_when_asked
        our_restart_costs_no_kernel_route
        their_restart_costs_no_kernel_route
        we_reflect_routes_between_two_of_them
        we_are_clients_of_their_reflector;
    frr10 (Product::Frr("frr10")):
        routes_of_both_families_go_both_ways
        a_withdrawn_route_is_gone_and_the_others_stay
        communities_of_all_kinds_go_both_ways
        as_numbers_of_four_octets_are_whole_on_both_sides
        a_session_with_password_needs_the_right_one
        routes_are_sent_again_when_asked_for
        we_send_routes_again_when_asked
        our_restart_costs_no_kernel_route
        their_restart_costs_no_kernel_route
        we_reflect_routes_between_two_of_them
        we_are_clients_of_their_reflector;
    gobgp310 (Product::GoBgp("gobgpd")):
        routes_of_both_families_go_both_ways
        a_withdrawn_route_is_gone_and_the_others_stay
        communities_of_all_kinds_go_both_ways
        as_numbers_of_four_octets_are_whole_on_both_sides
        a_session_with_password_needs_the_right_one
        routes_are_sent_again_when_asked_for
        our_restart_costs_no_kernel_route
        we_reflect_routes_between_two_of_them
        we_are_clients_of_their_reflector;
    gobgp336 (Product::GoBgp("gobgp3")):
        routes_of_both_families_go_both_ways
        a_withdrawn_route_is_gone_and_the_others_stay
        communities_of_all_kinds_go_both_ways
        as_numbers_of_four_octets_are_whole_on_both_sides
        a_session_with_password_needs_the_right_one
        routes_are_sent_again_when_asked_for
        our_restart_costs_no_kernel_route
        we_reflect_routes_between_two_of_them
        we_are_clients_of_their_reflector;
    openbgpd (Product::OpenBgpd):
        routes_of_both_families_go_both_ways
        a_withdrawn_route_is_gone_and_the_others_stay
        communities_of_all_kinds_go_both_ways
        as_numbers_of_four_octets_are_whole_on_both_sides
        a_session_with_password_needs_the_right_one
        routes_are_sent_again_when_asked_for
        we_send_routes_again_when_asked
        we_reflect_routes_between_two_of_them
        we_are_clients_of_their_reflector;
    exabgp (Product::ExaBgp):
        routes_of_both_families_go_both_ways
        a_withdrawn_route_is_gone_and_the_others_stay
        communities_of_all_kinds_go_both_ways
        as_numbers_of_four_octets_are_whole_on_both_sides
        a_session_with_password_needs_the_right_one
        we_send_routes_again_when_asked
        our_restart_costs_no_kernel_route
        their_restart_costs_no_kernel_route
        we_reflect_routes_between_two_of_them;
}
