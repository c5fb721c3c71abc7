//! Network namespaces: handles, creation under `/run/netns` (where `ip netns` finds them), and work inside them.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

use crate::error::{Error, Result};

/// Where named namespaces live (the same folder as `ip netns`).
pub const NETNS_DIR: &str = "/run/netns";

/// A handle to a network namespace. The namespace lives at least as long as the handle.
#[derive(Clone)]
pub struct NetNs {
    fd: Arc<OwnedFd>,
    label: Arc<str>,
}

impl NetNs {
    /// Makes a new namespace under its name. Its loopback device is down, as the kernel makes it.
    pub fn create(name: &str) -> Result<Self> {
        let path = named_path("create", name)?;
        prepare_dir()?;
        // Taking the name is atomic: of two creators one fails.
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|error| Error::io("create", format!("network namespace {name}"), &error))?;
        let made = in_thread(|| -> Result<(), Errno> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let own = Path::new("/proc/thread-self/ns/net");
            mount(
                Some(own),
                &path,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
        });
        if let Err(errno) = made {
            let _ = fs::remove_file(&path);
            return Err(Error::errno(
                "create",
                format!("network namespace {name}"),
                errno,
            ));
        }
        Self::open(name)
    }

    /// Opens a namespace by its name under [`NETNS_DIR`].
    pub fn open(name: &str) -> Result<Self> {
        Self::open_path(&named_path("open", name)?)
    }

    /// Opens a namespace by a path, such as `/proc/1234/ns/net`.
    pub fn open_path(path: &Path) -> Result<Self> {
        let label = path
            .strip_prefix(NETNS_DIR)
            .unwrap_or(path)
            .to_string_lossy()
            .into_owned();
        let file = File::open(path)
            .map_err(|error| Error::io("open", format!("network namespace {label}"), &error))?;
        Ok(Self {
            fd: Arc::new(file.into()),
            label: label.into(),
        })
    }

    /// The namespace behind a descriptor, for example one that came over a socket.
    pub fn from_fd(fd: OwnedFd) -> Self {
        use std::os::fd::AsRawFd;
        let label = format!("descriptor {}", fd.as_raw_fd());
        Self {
            fd: Arc::new(fd),
            label: label.into(),
        }
    }

    /// The namespace of the calling thread.
    pub fn current() -> Result<Self> {
        Self::open_path(Path::new("/proc/thread-self/ns/net"))
    }

    /// Removes a name. The namespace itself ends when no process, device or handle holds it any more.
    pub fn delete(name: &str) -> Result<()> {
        let path = named_path("delete", name)?;
        let fail = |errno| Error::errno("delete", format!("network namespace {name}"), errno);
        match umount2(&path, MntFlags::MNT_DETACH) {
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(errno) => return Err(fail(errno)),
        }
        fs::remove_file(&path)
            .map_err(|error| fail(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))))
    }

    /// Names of all namespaces under [`NETNS_DIR`].
    pub fn names() -> Result<Vec<String>> {
        let entries = match fs::read_dir(NETNS_DIR) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io("list", NETNS_DIR, &error)),
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Runs `work` on a thread of its own inside the namespace, and waits for it. A panic is passed on.
    ///
    /// Sockets that are opened there stay in the namespace, and `/proc/sys/net` is the namespace's. `/sys/class/net`
    /// is not: it shows the namespace in which it was mounted.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        in_thread(|| setns(&self.fd, CloneFlags::CLONE_NEWNET).map(|()| work()))
            .map_err(|errno| Error::errno("enter", self.to_string(), errno))
    }

    /// Device and inode: equal for two handles of one namespace.
    pub fn id(&self) -> Result<(u64, u64)> {
        let fail = |error: &io::Error| Error::io("inspect", self.to_string(), error);
        let file = self
            .fd
            .try_clone()
            .map(File::from)
            .map_err(|error| fail(&error))?;
        let metadata = file.metadata().map_err(|error| fail(&error))?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// The descriptor, for moving a device into the namespace.
    pub fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Display for NetNs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "network namespace {}", self.label)
    }
}

impl fmt::Debug for NetNs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NetNs({})", self.label)
    }
}

/// A thread that ends with its work, so that a changed namespace is never seen by anybody else.
fn in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn named_path(operation: &'static str, name: &str) -> Result<PathBuf> {
    if name.is_empty() || name.len() > 255 || name.contains('/') || name == "." || name == ".." {
        return Err(Error::invalid(
            operation,
            format!("network namespace {name:?}"),
            "not a valid name",
        ));
    }
    Ok(Path::new(NETNS_DIR).join(name))
}

/// Makes the folder a shared mount point, as `ip netns add` does, so that names made here are seen in every mount
/// namespace, and names made by `ip` here.
fn prepare_dir() -> Result<()> {
    let fail = |error: &io::Error| Error::io("prepare", NETNS_DIR, error);
    fs::create_dir_all(NETNS_DIR).map_err(|error| fail(&error))?;
    let dir = File::open(NETNS_DIR).map_err(|error| fail(&error))?;
    // `ip netns add` takes the same lock around the same two mounts.
    let _lock = Flock::lock(dir, FlockArg::LockExclusive)
        .map_err(|(_, errno)| Error::errno("lock", NETNS_DIR, errno))?;
    let share = || {
        mount(
            None::<&str>,
            NETNS_DIR,
            None::<&str>,
            MsFlags::MS_SHARED | MsFlags::MS_REC,
            None::<&str>,
        )
    };
    match share() {
        Err(Errno::EINVAL) => mount(
            Some(NETNS_DIR),
            NETNS_DIR,
            None::<&str>,
            MsFlags::MS_BIND | MsFlags::MS_REC,
            None::<&str>,
        )
        .and_then(|()| share()),
        result => result,
    }
    .map_err(|errno| Error::errno("prepare", NETNS_DIR, errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_the_folder() {
        for bad in ["", ".", "..", "../etc/passwd", "a/b"] {
            assert!(NetNs::open(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_current_namespace_is_itself() {
        let (one, two) = (NetNs::current().unwrap(), NetNs::current().unwrap());
        assert_eq!(one.id().unwrap(), two.id().unwrap());
    }
}
