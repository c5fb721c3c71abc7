//! One error for everything the kernel can answer: what was tried, on which object, and why it failed.

use std::fmt;

use nix::errno::Errno;

/// Result of a kernel operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed kernel operation: operation, object and cause.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{operation} {object}: {cause}")]
pub struct Error {
    /// What was tried, e.g. `replace route`.
    pub operation: &'static str,
    /// What it was tried on, e.g. `10.65.0.0/26 table 254`.
    pub object: String,
    /// Why it failed.
    pub cause: Cause,
}

/// Why a kernel operation failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// The kernel refused; `message` is its extended acknowledgement, if it gave one.
    Kernel {
        /// The error number.
        errno: Errno,
        /// Text from `NLMSGERR_ATTR_MSG` (`include/uapi/linux/netlink.h`).
        message: Option<Box<str>>,
    },
    /// What the kernel sent could not be read.
    Malformed(&'static str),
    /// No answer in time, or the connection to the kernel is gone.
    NoAnswer,
    /// A dump was interrupted by changes each time it was tried (`NLM_F_DUMP_INTR`).
    Inconsistent,
    /// The request itself is not valid.
    Invalid(String),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel {
                errno,
                message: Some(message),
            } => {
                write!(f, "{} ({message})", errno.desc())
            }
            Self::Kernel {
                errno,
                message: None,
            } => f.write_str(errno.desc()),
            Self::Malformed(what) => write!(f, "unreadable answer from the kernel: {what}"),
            Self::NoAnswer => f.write_str("no answer from the kernel"),
            Self::Inconsistent => f.write_str("the dump was interrupted by changes on every try"),
            Self::Invalid(why) => f.write_str(why),
        }
    }
}

impl Cause {
    /// The cause behind a positive error number of an answer. Numbers beyond those of the system belong to `ip_set`
    /// (`include/uapi/linux/netfilter/ipset/ip_set.h`, `IPSET_ERR_PRIVATE`).
    pub(crate) fn from_code(code: i32, message: Option<Box<str>>) -> Self {
        let (errno, text) = match code {
            4097 => (
                Errno::EPROTO,
                "the protocol of IP sets does not allow this message",
            ),
            4098 => (
                Errno::EPROTONOSUPPORT,
                "the kernel does not know this type of IP set",
            ),
            4099 => (Errno::ENOSPC, "the kernel can hold no more IP sets"),
            4100 => (Errno::EBUSY, "the IP set is in use"),
            4101 => (Errno::EEXIST, "an IP set with the second name is there"),
            4102 => (Errno::EINVAL, "the types of the IP sets do not match"),
            4103 => (
                Errno::EEXIST,
                "the member is there already, or is not there",
            ),
            4104 => (Errno::EINVAL, "the prefix length is not valid"),
            4106 => (
                Errno::EAFNOSUPPORT,
                "the type of IP set does not know this family",
            ),
            4108 => (Errno::EBUSY, "something refers to the IP set"),
            4352 => (Errno::ENOSPC, "the IP set is full"),
            4353.. => (
                Errno::EINVAL,
                "the member is not valid for this type of IP set",
            ),
            4096.. => (Errno::EINVAL, "not valid for IP sets"),
            _ => {
                return Self::Kernel {
                    errno: Errno::from_raw(code),
                    message,
                };
            }
        };
        Self::Kernel {
            errno,
            message: Some(message.unwrap_or_else(|| text.into())),
        }
    }
}

impl Error {
    /// An error with an error number and no further text.
    pub fn errno(operation: &'static str, object: impl Into<String>, errno: Errno) -> Self {
        Self::new(
            operation,
            object,
            Cause::Kernel {
                errno,
                message: None,
            },
        )
    }

    /// An error from its parts.
    pub fn new(operation: &'static str, object: impl Into<String>, cause: Cause) -> Self {
        Self {
            operation,
            object: object.into(),
            cause,
        }
    }

    /// An error from a failed system call of the standard library.
    pub fn io(operation: &'static str, object: impl Into<String>, error: &std::io::Error) -> Self {
        let cause = match error.raw_os_error() {
            Some(code) => Cause::Kernel {
                errno: Errno::from_raw(code),
                message: None,
            },
            None => Cause::Invalid(error.to_string()),
        };
        Self::new(operation, object, cause)
    }

    pub(crate) fn invalid(
        operation: &'static str,
        object: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self::new(operation, object, Cause::Invalid(why.into()))
    }

    /// The kernel's error number, if the kernel answered.
    pub fn code(&self) -> Option<Errno> {
        match &self.cause {
            Cause::Kernel { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// The object is not there (`ENOENT`, `ESRCH`, `ENODEV`, `EADDRNOTAVAIL`, `ENXIO`).
    pub fn is_not_found(&self) -> bool {
        matches!(
            self.code(),
            Some(
                Errno::ENOENT | Errno::ESRCH | Errno::ENODEV | Errno::EADDRNOTAVAIL | Errno::ENXIO
            )
        )
    }

    /// The object is there already.
    pub fn is_exists(&self) -> bool {
        self.code() == Some(Errno::EEXIST)
    }

    /// The process may not do this (`EPERM`, `EACCES`).
    pub fn is_permission(&self) -> bool {
        matches!(self.code(), Some(Errno::EPERM | Errno::EACCES))
    }

    /// No route leads there (`ENETUNREACH`, `EHOSTUNREACH`), or one that drops (`EACCES`, `EINVAL`).
    pub fn is_unreachable(&self) -> bool {
        matches!(
            self.code(),
            Some(Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EACCES | Errno::EINVAL)
        )
    }

    /// This kernel does not know the kind of object (`EOPNOTSUPP`, `EPROTONOSUPPORT`, `EAFNOSUPPORT`).
    pub fn is_unsupported(&self) -> bool {
        matches!(
            self.code(),
            Some(
                Errno::EOPNOTSUPP
                    | Errno::EPROTONOSUPPORT
                    | Errno::EAFNOSUPPORT
                    | Errno::ENOPROTOOPT
            )
        )
    }
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        match error.code() {
            Some(errno) => Self::new(Self::from_raw_os_error(errno as i32).kind(), error),
            None => Self::other(error),
        }
    }
}
