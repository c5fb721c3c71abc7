//! `bgpd` beside one other daemon: what most cases begin with.

use super::route::{Announcement, Route};
use super::segment::Host;
use super::speaker::{
    Neighbour, Product, Settings, Speaker, Stage, Start, all_established, table_is, wait,
};
use anyhow::{Context, Result, ensure};
use cali_api::Cidr;
use std::sync::Arc;

pub const OUR_AS: u32 = 64512;
pub const THEIR_AS: u32 = 64513;

pub const OURS: [&str; 3] = ["10.1.0.0/24", "10.1.1.0/24", "fd01::/64"];
pub const THEIRS: [&str; 3] = ["10.2.0.0/24", "10.2.1.0/24", "fd02::/64"];

/// `bgpd` and one other on a segment, with a session over each family.
pub struct Pair {
    pub ours: Box<dyn Speaker>,
    pub theirs: Box<dyn Speaker>,
    pub our_settings: Settings,
    pub their_settings: Settings,
}

impl Pair {
    /// Two speakers of these AS numbers that announce [`OURS`] and [`THEIRS`]; not started.
    pub fn new(stage: &mut Stage, product: Product, our_as: u32, their_as: u32) -> Result<Self> {
        let ours = stage.speaker(Product::Cali)?;
        let theirs = stage.speaker(product)?;
        let our_settings = Settings::new(our_as, Neighbour::both(host(&*theirs), their_as))
            .announce(OURS.map(Announcement::plain));
        let their_settings = Settings::new(their_as, Neighbour::both(host(&*ours), our_as))
            .announce(THEIRS.map(Announcement::plain));
        Ok(Self {
            ours,
            theirs,
            our_settings,
            their_settings,
        })
    }

    /// A change of every session, on both sides.
    pub fn each(mut self, change: impl Fn(&mut Neighbour)) -> Self {
        self.our_settings = self.our_settings.each(&change);
        self.their_settings = self.their_settings.each(&change);
        self
    }

    /// Starts both and waits for the sessions.
    pub fn up(&mut self) -> Result<()> {
        self.start()?;
        self.established()
    }

    pub fn start(&mut self) -> Result<()> {
        self.theirs.start(&self.their_settings, Start::Fresh)?;
        self.ours.start(&self.our_settings, Start::Fresh)
    }

    pub fn established(&mut self) -> Result<()> {
        all_established(&mut *self.ours, &self.our_settings).context("as bgpd sees it")?;
        all_established(&mut *self.theirs, &self.their_settings).context("as the other sees it")
    }

    /// Waits until each side's table holds exactly what the other announces now.
    pub fn exchanged(&mut self) -> Result<()> {
        table_is(&mut *self.ours, &seen(&*self.theirs, &self.their_settings))
            .context("table of bgpd")?;
        table_is(&mut *self.theirs, &seen(&*self.ours, &self.our_settings))
            .context("table of the other")
    }
}

pub fn host(speaker: &dyn Speaker) -> &Arc<Host> {
    &speaker.seat().host
}

/// A speaker's announcements as an eBGP neighbour sees them.
pub fn seen(speaker: &dyn Speaker, settings: &Settings) -> Vec<Route> {
    let announced = settings.announcements.iter();
    let extended = settings.neighbours.iter().any(|n| n.extended);
    announced
        .map(|announcement| Route {
            prefix: announcement.prefix,
            // IPv4 over a session of the other family has a next hop of that one (RFC 8950).
            next_hop: host(speaker).address(announcement.prefix.is_v4() && !extended),
            as_path: vec![settings.asn],
            communities: announcement.communities.clone(),
        })
        .collect()
}

/// Waits until the kernel has, or has not, a route to each prefix.
pub fn kernel_has(speaker: &dyn Speaker, prefixes: &[&str], present: bool) -> Result<()> {
    for text in prefixes {
        let prefix: Cidr = text.parse()?;
        wait(|| {
            let seen = host(speaker).kernel_route(&prefix);
            ensure!(
                seen.is_empty() != present,
                "expected {} of {prefix} in {}, seen {seen:?}",
                if present { "a route" } else { "no route" },
                host(speaker).ns.name()
            );
            Ok(())
        })?;
    }
    Ok(())
}
