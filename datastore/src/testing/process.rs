//! A server process and the log that it leaves; a client and what it says.

use std::fs::File;
use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A busy machine may need long to start a server.
pub(super) const START: Duration = Duration::from_secs(60);

/// A running server. Ends with this value.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a program whose output goes to the end of a file.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(command: &mut Command, log: &Path) -> Self {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .expect("the log file can be made");
        let other = file.try_clone().expect("the log file can be shared");
        let child = command
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(other)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        Self {
            child,
            log: log.to_owned(),
        }
    }

    /// Waits until the server answers.
    ///
    /// # Panics
    /// With the end of its log, if it ends or does not answer in time.
    pub fn wait(&mut self, mut ready: impl FnMut() -> bool) {
        let limit = Instant::now() + START;
        while !ready() {
            self.check();
            assert!(
                Instant::now() < limit,
                "the server does not answer:\n{}",
                self.log_end()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Checks that the server still runs.
    ///
    /// # Panics
    /// With the end of its log, if not.
    pub fn check(&mut self) {
        if let Ok(Some(status)) = self.child.try_wait() {
            panic!("the server ended with {status}:\n{}", self.log_end());
        }
    }

    /// Kills the server (SIGKILL) and waits for its end.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The last lines that it has written.
    #[must_use]
    pub fn log_end(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a client says that is given this input, on both streams; as an error if it failed.
///
/// # Errors
/// What it said.
///
/// # Panics
/// If it cannot be run.
pub fn told(command: &mut Command, input: &str) -> Result<String, String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("its input");
    // It may end before it has read everything; what it says then counts.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().expect("the end of a client");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    if output.status.success() {
        Ok(said)
    } else {
        Err(said)
    }
}

/// A port of loopback that nobody listens on now.
///
/// # Panics
/// If there is none.
pub(super) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}

/// Runs a script of the repository that prints a folder, or makes one ready.
///
/// # Panics
/// If it fails.
pub fn script(words: &[&str]) -> String {
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts");
    let output = Command::new(scripts.join(words[0]))
        .args(&words[1..])
        .stderr(Stdio::inherit())
        .output()
        .expect("the script can be run");
    assert!(output.status.success(), "scripts/{words:?} failed");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Where scripts keep what is costly to make.
pub(super) fn cache() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache"),
        PathBuf::from,
    );
    base.join("cali")
}
