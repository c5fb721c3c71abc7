//! What the shells make of the generated completion scripts: each is asked for the words after a line, as by the tab key.

mod terminal;

use std::process::{Command, Stdio};

use terminal::Terminal;

/// Where a shell finds `calictl`, and the script made for it.
fn script(terminal: &Terminal, shell: &str) -> String {
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_calictl"));
    let link = terminal.path("calictl");
    if !link.exists() {
        std::os::unix::fs::symlink(program, &link).expect("a link");
    }
    let script = terminal.prints(&format!("completion {shell}"));
    let name = match shell {
        "zsh" => "_calictl",
        _ => "calictl.completion",
    };
    terminal.file(name, &script);
    terminal.path(name).display().to_string()
}

/// What a shell prints for these words of its own language.
fn shell(terminal: &Terminal, words: &[&str]) -> String {
    let output = Command::new(words[0])
        .args(&words[1..])
        .current_dir(terminal.folder.path())
        .env_clear()
        .env("HOME", terminal.folder.path())
        .env("TERM", "xterm")
        .env(
            "PATH",
            format!("{}:/usr/bin:/bin", terminal.folder.path().display()),
        )
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{} (scripts/setup installs it): {error}", words[0]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.is_empty(),
        "{}: {said}",
        words[0]
    );
    String::from_utf8(output.stdout).expect("text")
}

/// What each line is completed to, at least.
const LINES: [(&str, &[&str]); 4] = [
    ("calictl ap", &["apply"]),
    ("calictl get ippo", &["ippools"]),
    ("calictl delete --skip-n", &["--skip-not-exists"]),
    ("calictl node ch", &["checksystem"]),
];

fn expect(shell: &str, line: &str, words: &[&str], seen: &str) {
    for word in words {
        let offered = seen
            .split(|letter: char| letter.is_whitespace())
            .any(|offered| offered == *word);
        assert!(
            offered,
            "{shell}: {line:?} is not completed to {word}: {seen}"
        );
    }
}

#[test]
fn bash_completes_commands_kinds_and_flags() {
    let terminal = Terminal::new();
    let script = script(&terminal, "bash");
    for (line, words) in LINES {
        // The function that bash calls, with the variables that it sets.
        let asked = format!(
            "source {script}; COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _calictl calictl \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        );
        let seen = shell(&terminal, &["bash", "--norc", "-c", &asked]);
        expect("bash", line, words, &seen);
    }
}

#[test]
fn fish_completes_commands_kinds_and_flags() {
    let terminal = Terminal::new();
    let script = script(&terminal, "fish");
    for (line, words) in LINES {
        let asked = format!("source {script}; complete --do-complete '{line}'");
        let seen = shell(&terminal, &["fish", "--no-config", "-c", &asked]);
        expect("fish", line, words, &seen);
    }
}

/// A zsh in a terminal of its own: a line and a tab are typed, and a key that says what the line has become.
const TYPED: &str = r#"
zmodload zsh/zpty
zpty -b typed "TERM=dumb zsh -f -i"
zpty -w typed 'PROMPT=""; fpath=($PWD $fpath); autoload -U compinit; compinit -u -D'
zpty -w typed 'become() { print -r -- "LINE"": $BUFFER :END" }; zle -N become; bindkey "^X" become; echo READ""Y'
zpty -r -m typed unused '*READY*'
zpty -w -n typed "$1"$'\t\x18'
zpty -r -m typed seen '*LINE: * :END*'
zpty -d typed
print -r -- "$seen"
"#;

#[test]
fn zsh_completes_commands_kinds_and_flags() {
    let terminal = Terminal::new();
    script(&terminal, "zsh");
    for (line, words) in LINES {
        let seen = shell(&terminal, &["zsh", "-f", "-c", TYPED, "typed", line]);
        expect("zsh", line, words, &seen);
    }
}
