//! `cali`: every daemon and the command line in one executable, told apart by the name that it is called by. The image and the
//! Debian package hold it once, with a link for each name, so that what the programs have in common is there once; daemons of one host
//! share its pages.
//!
//! The CNI plugin is not in it: it is copied to the host, where it has to be small.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::{ExitCode, Termination};

/// musl's own allocator takes more than half of the time of a long list.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A program and the names it goes by.
struct Program {
    names: &'static [&'static str],
    main: fn() -> ExitCode,
}

const PROGRAMS: [Program; 6] = [
    Program {
        names: &["cali-node"],
        main: cali_node::program::main,
    },
    Program {
        names: &["felix"],
        main: || felix::program::main().report(),
    },
    Program {
        names: &["bgpd"],
        main: bgpd::program::main,
    },
    Program {
        names: &["typha"],
        main: || typha::program::main().report(),
    },
    Program {
        names: &["cali-controllers"],
        main: || cali_controllers::program::main().report(),
    },
    // kubectl runs its plugins by such names.
    Program {
        names: &["calictl", "calicoctl", "kubectl-calico", "kubectl_calico"],
        main: calictl::main,
    },
];

fn program(called: Option<&OsStr>) -> Option<&'static Program> {
    let name = Path::new(called?).file_name()?.to_str()?;
    PROGRAMS
        .iter()
        .find(|program| program.names.contains(&name))
}

fn main() -> ExitCode {
    let called: Option<OsString> = std::env::args_os().next();
    if let Some(program) = program(called.as_deref()) {
        return (program.main)();
    }
    let names: Vec<&str> = PROGRAMS.iter().map(|program| program.names[0]).collect();
    eprintln!(
        "cali {}: call it by the name of one of its programs ({}); make a link with that name to it",
        env!("CARGO_PKG_VERSION"),
        names.join(", ")
    );
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_part_of_the_path_names_the_program() {
        let names = |called: &str| program(Some(OsStr::new(called))).map(|found| found.names[0]);
        assert_eq!(names("/usr/bin/cali-node"), Some("cali-node"));
        assert_eq!(names("bgpd"), Some("bgpd"));
        assert_eq!(names("./kubectl-calico"), Some("calictl"));
        assert_eq!(names("/cali"), None);
        assert_eq!(names("/cali-node/other"), None);
        assert!(program(None).is_none());
    }
}
