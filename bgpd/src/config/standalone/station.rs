//! What the file says about BMP stations.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::time::Duration;

use serde::Deserialize;

use crate::bmp::{Stage, Station};

/// The keys of `[[bmp]]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Keys {
    station: SocketAddr,
    #[serde(default)]
    routes: Routes,
    /// Seconds between two reports of numbers.
    statistics: Option<NonZeroU16>,
}

/// Which routes are told.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Routes {
    /// As they were received.
    #[default]
    Before,
    /// As they came through the import policy.
    After,
    Both,
}

impl Keys {
    pub(super) fn station(&self) -> Station {
        let mut station = Station::new(self.station);
        station.stages = match self.routes {
            Routes::Before => vec![Stage::Before],
            Routes::After => vec![Stage::After],
            Routes::Both => vec![Stage::Before, Stage::After],
        };
        if let Some(seconds) = self.statistics {
            station.statistics = Duration::from_secs(seconds.get().into());
        }
        station
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    #[test]
    fn stations_get_what_was_received_unless_the_file_says_otherwise() {
        let read = |more: &str| {
            let text = format!("router-id = \"10.0.1.254\"\nas = 64513\n{more}");
            parse(&text).map(|c| c.stations)
        };
        let stations = read(
            "[[bmp]]\nstation = \"192.0.2.1:5000\"\n\
             [[bmp]]\nstation = \"[fd00::1]:5000\"\nroutes = \"both\"\nstatistics = 5\n",
        )
        .unwrap();
        assert_eq!(stations[0].stages, [Stage::Before]);
        assert_eq!(stations[0].statistics, Duration::from_secs(60));
        assert_eq!(stations[1].stages, [Stage::Before, Stage::After]);
        assert_eq!(stations[1].statistics, Duration::from_secs(5));
        assert_eq!(read("").unwrap(), []);
        assert!(read("[[bmp]]\nstation = \"host\"\n").is_err());
    }
}
