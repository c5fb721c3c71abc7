//! Routes as text that fits into an annotation: a table of some thousand routes, of which most say the same, shrinks to a tenth.

use std::io::{Read, Write};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;

use crate::status::{OwnedRoute, PackedRoutes};

/// More than this, unpacked, was not packed by a node; octets.
const UNPACKED_LIMIT: u64 = 64 << 20;

/// Routes that cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The text is not base64.
    #[error("the routes are no base64")]
    Text(#[from] base64::DecodeError),
    /// It does not unpack.
    #[error("the routes cannot be unpacked")]
    Packing(#[from] std::io::Error),
    /// It is no list of routes.
    #[error("the routes cannot be read")]
    Routes(#[from] serde_json::Error),
}

impl PackedRoutes {
    /// As many of these as fit into `limit` octets of text; the first ones stay the longest.
    #[must_use]
    pub fn pack(routes: &[OwnedRoute], limit: usize) -> Self {
        let mut kept = routes.len();
        loop {
            let packed = text(&routes[..kept]);
            if packed.len() <= limit || kept == 0 {
                return Self {
                    packed,
                    left_out: routes.len() - kept,
                };
            }
            // In proportion to what is too much, and a little less: it shrinks unevenly.
            kept = kept.min(kept.saturating_mul(limit) / packed.len() * 9 / 10);
        }
    }

    /// The routes.
    pub fn unpack(&self) -> Result<Vec<OwnedRoute>, UnpackError> {
        let octets = STANDARD.decode(&self.packed)?;
        let mut text = Vec::new();
        GzDecoder::new(&octets[..])
            .take(UNPACKED_LIMIT)
            .read_to_end(&mut text)?;
        Ok(serde_json::from_slice(&text)?)
    }
}

fn text(routes: &[OwnedRoute]) -> String {
    let mut packer = GzEncoder::new(Vec::new(), Compression::default());
    // Plain data into memory: neither can fail.
    let octets = serde_json::to_vec(routes).unwrap_or_default();
    let packed = packer.write_all(&octets).and_then(|()| packer.finish());
    STANDARD.encode(packed.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::RouteHop;

    fn routes(count: u16) -> Vec<OwnedRoute> {
        let route = |number: u16| {
            let [high, low] = number.to_be_bytes();
            OwnedRoute {
                prefix: format!("10.{high}.{low}.0/26").parse().expect("a prefix"),
                kernel: format!("via 192.168.{high}.{low} dev eth0 proto bird"),
                source: "bgp".into(),
                because: format!("BGP peer 192.168.{high}.{low}"),
                programmed: true,
                problem: None,
                hops: vec![RouteHop {
                    gateway: Some([192, 168, high, low].into()),
                    device: "eth0".into(),
                }],
                encapsulation: None,
            }
        };
        (0..count).map(route).collect()
    }

    #[test]
    fn the_routes_of_a_large_cluster_fit_and_come_back() {
        let all = routes(5000);
        let packed = PackedRoutes::pack(&all, 150 << 10);
        assert_eq!(packed.left_out, 0, "{} octets", packed.packed.len());
        assert_eq!(packed.unpack().expect("routes"), all);
    }

    #[test]
    fn what_does_not_fit_is_counted() {
        let all = routes(2000);
        let packed = PackedRoutes::pack(&all, 10_000);
        assert!(packed.packed.len() <= 10_000);
        let kept = packed.unpack().expect("routes");
        assert_eq!(kept.len() + packed.left_out, all.len());
        assert_eq!(kept[..], all[..kept.len()]);
        assert!(kept.len() > 200, "{}", kept.len());
        assert_eq!(PackedRoutes::pack(&all, 1).left_out, 2000);
    }

    #[test]
    fn what_is_no_routes_is_an_error() {
        for packed in ["!", "AAAA", ""] {
            let packed = PackedRoutes {
                packed: packed.into(),
                left_out: 0,
            };
            assert!(packed.unpack().is_err(), "{packed:?}");
        }
    }
}
