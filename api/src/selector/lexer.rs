//! Words of selector expressions.

/// A word and where it starts (byte offset).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token<'a> {
    pub(super) position: usize,
    pub(super) word: Word<'a>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word<'a> {
    Open,
    Close,
    OpenSet,
    CloseSet,
    Comma,
    Not,
    And,
    Or,
    Equal,
    NotEqual,
    In,
    NotIn,
    Contains,
    StartsWith,
    EndsWith,
    All,
    Global,
    /// `has(label)` is one word: no blank may separate the parenthesis.
    Has(&'a str),
    Label(&'a str),
    Text(&'a str),
    /// A quote that is never closed.
    OpenText,
    /// A byte sequence that starts no word.
    Stray(&'a str),
    End,
}

/// Longest label name.
pub(super) const MAX_LABEL: usize = 512;

fn is_label_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'/' | b'-')
}

/// The words of an expression, one at a time; `End` for ever after the last.
#[derive(Debug, Clone)]
pub(super) struct Lexer<'a> {
    source: &'a str,
    position: usize,
    /// After a label, `in`, `not in`, `contains`, `starts with` and `ends with` are operators;
    /// elsewhere they are labels.
    after_label: bool,
}

impl<'a> Lexer<'a> {
    pub(super) const fn new(source: &'a str) -> Self {
        Self {
            source,
            position: 0,
            after_label: false,
        }
    }

    fn rest(&self) -> &'a str {
        &self.source[self.position..]
    }

    fn skip_blanks(&mut self) {
        self.position += self.rest().len() - self.rest().trim_start_matches([' ', '\t']).len();
    }

    pub(super) fn next(&mut self) -> Token<'a> {
        self.skip_blanks();
        let position = self.position;
        let word = self.word();
        self.after_label = matches!(word, Word::Label(_));
        Token { position, word }
    }

    fn take(&mut self, length: usize) -> &'a str {
        let taken = &self.rest()[..length];
        self.position += length;
        taken
    }

    fn word(&mut self) -> Word<'a> {
        const SIGNS: [(&str, Word<'static>); 10] = [
            ("==", Word::Equal),
            ("!=", Word::NotEqual),
            ("&&", Word::And),
            ("||", Word::Or),
            ("!", Word::Not),
            ("(", Word::Open),
            (")", Word::Close),
            ("{", Word::OpenSet),
            ("}", Word::CloseSet),
            (",", Word::Comma),
        ];
        let rest = self.rest();
        let Some(first) = rest.chars().next() else {
            return Word::End;
        };
        if let Some((sign, word)) = SIGNS.iter().find(|(sign, _)| rest.starts_with(sign)) {
            self.position += sign.len();
            return *word;
        }
        if first == '"' || first == '\'' {
            return match rest[1..].find(first) {
                Some(length) => Word::Text(&self.take(length + 2)[1..=length]),
                None => Word::OpenText,
            };
        }
        if self.after_label
            && let Some(operator) = self.operator()
        {
            return operator;
        }
        let length = rest.bytes().take_while(|byte| is_label_byte(*byte)).count();
        if length == 0 {
            return Word::Stray(self.take(first.len_utf8()));
        }
        for (call, word) in [("all()", Word::All), ("global()", Word::Global)] {
            // A blank may stand within the parentheses, but not before them.
            if let Some(inner) = rest.strip_prefix(&call[..call.len() - 1])
                && let Some(tail) = inner.trim_start_matches([' ', '\t']).strip_prefix(')')
            {
                self.position = self.source.len() - tail.len();
                return word;
            }
        }
        if let Some(inner) = rest.strip_prefix("has(") {
            let name = inner.trim_start_matches([' ', '\t']);
            let length = name.bytes().take_while(|byte| is_label_byte(*byte)).count();
            let (name, tail) = name.split_at(length);
            if length > 0
                && let Some(tail) = tail.trim_start_matches([' ', '\t']).strip_prefix(')')
            {
                self.position = self.source.len() - tail.len();
                return Word::Has(name);
            }
        }
        Word::Label(self.take(length))
    }

    /// An operator that is spelled like labels are.
    fn operator(&mut self) -> Option<Word<'a>> {
        const OPERATORS: [(&str, &str, Word<'static>); 6] = [
            ("contains", "", Word::Contains),
            ("starts", "with", Word::StartsWith),
            ("ends", "with", Word::EndsWith),
            ("notin", "", Word::NotIn),
            ("not", "in", Word::NotIn),
            ("in", "", Word::In),
        ];
        for (first, second, word) in OPERATORS {
            let Some(tail) = self.rest().strip_prefix(first) else {
                continue;
            };
            let tail = if second.is_empty() {
                tail
            } else {
                let trimmed = tail.trim_start_matches([' ', '\t']);
                match trimmed.strip_prefix(second) {
                    Some(after) if trimmed.len() < tail.len() => after,
                    _ => continue,
                }
            };
            if !tail.bytes().next().is_some_and(is_label_byte) {
                self.position = self.source.len() - tail.len();
                return Some(word);
            }
        }
        None
    }
}
