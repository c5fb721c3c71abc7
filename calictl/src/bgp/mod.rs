//! `calictl bgp`: the BGP speaker of this node, seen from close up. Each view is a function from the daemon's
//! answer to text; only this file asks.

mod dump;
mod explain;
mod neighbor;
mod peers;
mod routes;
#[cfg(test)]
pub(crate) mod sample;

use crate::node::{Output, now};
use crate::{output, sockets};
use anyhow::{Context, Result, bail};
use cali_api::Cidr;
use cali_control::paths::run_dir;
use cali_control::status::{BgpRequest, BgpResponse, BgpStatus};
use clap::Subcommand;
use serde::Serialize;
use std::net::IpAddr;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// All neighbors, with how many routes each of them sends and gets
    Peers {
        /// How it is printed
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// The table: best and other paths, with the reason why a path is not used
    Routes(routes::Routes),
    /// Everything about one neighbor
    Neighbor {
        /// Its address
        address: IpAddr,
        /// How it is printed
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Why the routes to an address or prefix are as they are: paths, kernel, who is told
    Explain {
        /// An address or a prefix; the longest prefix around it that has a route is explained
        destination: String,
        /// How it is printed
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Write the table into a file as MRT (RFC 6396), for bgpdump and its like
    Dump {
        /// The file; "-" is the standard output
        file: PathBuf,
    },
    /// Ask a neighbor for its routes again, without ending the session
    Refresh {
        /// Its address
        address: IpAddr,
    },
}

pub(crate) async fn run(command: &Command) -> Result<()> {
    match command {
        Command::Peers { output } => {
            let status = status().await?;
            show(*output, &status.peers, || {
                Ok(peers::render(&status, now()?))
            })
        }
        Command::Routes(wanted) => {
            let mut routes = match ask(wanted.request()).await? {
                BgpResponse::Routes(routes) => routes,
                other => bail!("bgpd answered {other:?}"),
            };
            routes.retain(|route| wanted.wants(route));
            show(wanted.output, &routes, || {
                Ok(routes::render(&routes, wanted.view()))
            })
        }
        Command::Neighbor { address, output } => {
            let status = status().await?;
            let Some(peer) = status.peers.iter().find(|p| p.address == *address) else {
                bail!(
                    "there is no BGP peer {address}; `calictl bgp peers` lists those of this node"
                );
            };
            show(*output, peer, || Ok(neighbor::render(peer, now()?)))
        }
        Command::Explain {
            destination,
            output,
        } => {
            let of = parse_destination(destination)?;
            match ask(BgpRequest::Explain { of }).await? {
                BgpResponse::Explanation(explanation) => show(*output, &explanation, || {
                    Ok(explain::render(destination, &explanation))
                }),
                other => bail!("bgpd answered {other:?}"),
            }
        }
        Command::Dump { file } => dump::write(file).await,
        Command::Refresh { address } => match ask(BgpRequest::Refresh { peer: *address }).await? {
            BgpResponse::Done => Ok(()),
            other => bail!("bgpd answered {other:?}"),
        },
    }
}

/// An address stands for itself alone.
fn parse_destination(text: &str) -> Result<Cidr> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(Cidr::host(address));
    }
    text.parse()
        .with_context(|| format!("{text:?} is neither an address nor a prefix"))
}

async fn ask(request: BgpRequest) -> Result<BgpResponse> {
    match sockets::bgp(&run_dir(), request).await? {
        BgpResponse::Error(reason) => bail!(reason),
        answer => Ok(answer),
    }
}

async fn status() -> Result<BgpStatus> {
    match ask(BgpRequest::Status).await? {
        BgpResponse::Status(status) => Ok(status),
        other => bail!("bgpd answered {other:?}"),
    }
}

fn show<T: Serialize>(
    format: Output,
    value: &T,
    text: impl FnOnce() -> Result<String>,
) -> Result<()> {
    match format {
        Output::Json => output::line(serde_json::to_string_pretty(value)?),
        Output::Table => output::write(text()?),
    }
    Ok(())
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |v| v.to_string())
}

/// How long ago, short: `02:10:07` within a day, else `3d04h`.
pub(crate) fn age(at: u64, now: u64) -> String {
    let seconds = now.saturating_sub(at);
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    if hours < 24 {
        format!("{hours:02}:{minutes:02}:{:02}", seconds % 60)
    } else {
        format!("{}d{:02}h", hours / 24, hours % 24)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        assert_eq!(age(100, 107), "00:00:07");
        assert_eq!(age(0, 2 * 3600 + 607), "02:10:07");
        assert_eq!(age(0, 76 * 3600), "3d04h");
        assert_eq!(age(107, 100), "00:00:00", "the clock was set back");
    }

    #[test]
    fn an_address_is_a_destination_as_well() {
        let text = |t: &str| parse_destination(t).unwrap().to_string();
        assert_eq!(text("10.0.1.5"), "10.0.1.5/32");
        assert_eq!(text("fd00::/64"), "fd00::/64");
        let error = parse_destination("web").unwrap_err().to_string();
        assert_eq!(error, "\"web\" is neither an address nor a prefix");
    }
}
