//! Starting programs inside a namespace.
#![allow(unsafe_code)]

use std::{
    ffi::{CString, OsStr},
    io,
    os::fd::AsRawFd,
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    error::{Error, Result},
    netns::NetNs,
};

/// A folder or file that the program sees in another place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// What is on the host.
    pub source: PathBuf,
    /// Where the program sees it; must exist and be of the same kind (file or folder).
    pub target: PathBuf,
    /// The program cannot write to it.
    pub read_only: bool,
}

/// What a program gets beside its network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Isolation {
    /// Mounts of its own: what it, or [`Self::binds`], mount is not seen outside. Implied by `binds` and `sysfs`.
    pub private_mounts: bool,
    /// Bind mounts, in order.
    pub binds: Vec<Bind>,
    /// A fresh `/sys`, so that `/sys/class/net` shows the namespace's devices.
    pub sysfs: bool,
    /// A host name of its own.
    pub hostname: Option<String>,
    /// The program gets this signal when the thread that started it ends (`PR_SET_PDEATHSIG`).
    pub parent_death_signal: Option<i32>,
}

/// What happens between fork and exec: only system calls on data prepared before (`signal-safety(7)`).
struct Plan {
    netns: std::sync::Arc<std::os::fd::OwnedFd>,
    unshare: libc::c_int,
    binds: Vec<(CString, CString, bool)>,
    sysfs: bool,
    hostname: Option<CString>,
    parent_death_signal: Option<i32>,
}

const ROOT: &std::ffi::CStr = c"/";
const SYS: &std::ffi::CStr = c"/sys";
const SYSFS: &std::ffi::CStr = c"sysfs";

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

impl Plan {
    fn carry_out(&self) -> io::Result<()> {
        // SAFETY: plain system calls; every pointer is to a NUL-terminated string that `self` or a constant owns, or
        // null where the call allows it.
        unsafe {
            if let Some(signal) = self.parent_death_signal {
                check(libc::prctl(libc::PR_SET_PDEATHSIG, signal))?;
            }
            check(libc::setns(self.netns.as_raw_fd(), libc::CLONE_NEWNET))?;
            if self.unshare != 0 {
                check(libc::unshare(self.unshare))?;
            }
            if self.unshare & libc::CLONE_NEWNS != 0 {
                // What the host mounts later is still seen here, what is mounted here stays here.
                let flags = libc::MS_REC | libc::MS_SLAVE;
                check(libc::mount(
                    std::ptr::null(),
                    ROOT.as_ptr(),
                    std::ptr::null(),
                    flags,
                    std::ptr::null(),
                ))?;
            }
            for (source, target, read_only) in &self.binds {
                let null = std::ptr::null();
                let flags = libc::MS_BIND | libc::MS_REC;
                check(libc::mount(
                    source.as_ptr(),
                    target.as_ptr(),
                    null,
                    flags,
                    null.cast(),
                ))?;
                if *read_only {
                    let flags = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY;
                    check(libc::mount(null, target.as_ptr(), null, flags, null.cast()))?;
                }
            }
            if self.sysfs {
                check(libc::mount(
                    SYSFS.as_ptr(),
                    SYS.as_ptr(),
                    SYSFS.as_ptr(),
                    0,
                    std::ptr::null(),
                ))?;
            }
            if let Some(name) = &self.hostname {
                check(libc::sethostname(name.as_ptr(), name.as_bytes().len()))?;
            }
        }
        Ok(())
    }
}

fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::invalid("bind", path.display().to_string(), "the path holds a NUL"))
}

impl NetNs {
    /// A command that will run inside this namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let plan = Plan {
            netns: self.fd(),
            unshare: 0,
            binds: Vec::new(),
            sysfs: false,
            hostname: None,
            parent_death_signal: None,
        };
        command(program.as_ref(), plan)
    }

    /// A command that will run inside this namespace, with more of its own.
    pub fn isolated_command(
        &self,
        program: impl AsRef<OsStr>,
        isolation: &Isolation,
    ) -> Result<Command> {
        let mut binds = Vec::with_capacity(isolation.binds.len());
        for bind in &isolation.binds {
            binds.push((c_path(&bind.source)?, c_path(&bind.target)?, bind.read_only));
        }
        let mut unshare = 0;
        if isolation.private_mounts || isolation.sysfs || !binds.is_empty() {
            unshare |= libc::CLONE_NEWNS;
        }
        let hostname = match &isolation.hostname {
            Some(name) => {
                unshare |= libc::CLONE_NEWUTS;
                let name = CString::new(name.as_str());
                Some(name.map_err(|_| Error::invalid("set", "host name", "the name holds a NUL"))?)
            }
            None => None,
        };
        let plan = Plan {
            netns: self.fd(),
            unshare,
            binds,
            sysfs: isolation.sysfs,
            hostname,
            parent_death_signal: isolation.parent_death_signal,
        };
        Ok(command(program.as_ref(), plan))
    }
}

fn command(program: &OsStr, plan: Plan) -> Command {
    let mut command = Command::new(program);
    // SAFETY: the closure makes system calls only; it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || plan.carry_out());
    }
    command
}
