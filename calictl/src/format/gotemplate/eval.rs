//! Runs a template over a value.

use anyhow::{Result, bail};
use serde_json::Value;

use super::functions;
use super::parse::{Branch, Command, Node, Operand, Pipeline, Target};

/// So many nodes are run for one document; a template cannot run for ever, but `range` in `range` can take long.
const STEPS: usize = 50_000_000;

pub(super) fn render(nodes: &[Node], value: &Value) -> Result<String> {
    let mut run = Run {
        text: String::new(),
        variables: vec![("$".to_owned(), value.clone())],
        steps: 0,
    };
    run.nodes(nodes, value)?;
    Ok(run.text)
}

struct Run {
    text: String,
    /// The innermost last.
    variables: Vec<(String, Value)>,
    steps: usize,
}

impl Run {
    fn nodes(&mut self, nodes: &[Node], dot: &Value) -> Result<()> {
        for node in nodes {
            self.steps += 1;
            if self.steps > STEPS {
                bail!("it takes more than {STEPS} steps");
            }
            match node {
                Node::Text(text) => self.text.push_str(text),
                Node::Print(pipeline) => {
                    let value = self.pipeline(pipeline, dot)?;
                    if pipeline.into.is_none() {
                        self.text.push_str(&functions::printed(&value));
                    }
                }
                Node::If(branch) => self.branch(branch, dot, false)?,
                Node::With(branch) => self.branch(branch, dot, true)?,
                Node::Range { names, branch } => self.range(names, branch, dot)?,
            }
        }
        Ok(())
    }

    /// Variables that are declared inside end with it.
    fn scoped(&mut self, nodes: &[Node], dot: &Value) -> Result<()> {
        let scope = self.variables.len();
        let result = self.nodes(nodes, dot);
        self.variables.truncate(scope);
        result
    }

    fn branch(&mut self, branch: &Branch, dot: &Value, moves_dot: bool) -> Result<()> {
        let scope = self.variables.len();
        let value = self.pipeline(&branch.over, dot)?;
        let result = if functions::truth(&value) {
            self.scoped(&branch.then, if moves_dot { &value } else { dot })
        } else {
            self.scoped(&branch.otherwise, dot)
        };
        self.variables.truncate(scope);
        result
    }

    fn range(&mut self, names: &[String], branch: &Branch, dot: &Value) -> Result<()> {
        let over = self.pipeline(&branch.over, dot)?;
        let pairs: Vec<(Value, Value)> = match over {
            Value::Null => Vec::new(),
            Value::Array(items) => items
                .into_iter()
                .enumerate()
                .map(|(index, item)| (index.into(), item))
                .collect(),
            // Sorted by key, as in Go.
            Value::Object(map) => {
                let mut pairs: Vec<(String, Value)> = map.into_iter().collect();
                pairs.sort_by(|a, b| a.0.cmp(&b.0));
                pairs
                    .into_iter()
                    .map(|(key, item)| (key.into(), item))
                    .collect()
            }
            other => bail!("cannot range over {}", functions::described(&other)),
        };
        if pairs.is_empty() {
            return self.scoped(&branch.otherwise, dot);
        }
        for (index, item) in pairs {
            let scope = self.variables.len();
            match names {
                [] => {}
                [element] => self.variables.push((element.clone(), item.clone())),
                [key, element, ..] => {
                    self.variables.push((key.clone(), index));
                    self.variables.push((element.clone(), item.clone()));
                }
            }
            let result = self.nodes(&branch.then, &item);
            self.variables.truncate(scope);
            result?;
        }
        Ok(())
    }

    fn pipeline(&mut self, pipeline: &Pipeline, dot: &Value) -> Result<Value> {
        let mut last: Option<Value> = None;
        for command in &pipeline.commands {
            last = Some(self.command(command, dot, last)?);
        }
        let value = last.unwrap_or(Value::Null);
        match &pipeline.into {
            None => {}
            Some(Target::Declare(name)) => self.variables.push((name.clone(), value.clone())),
            Some(Target::Assign(name)) => {
                let found = self.variables.iter_mut().rev().find(|(n, _)| n == name);
                if let Some((_, old)) = found {
                    old.clone_from(&value);
                }
            }
        }
        Ok(value)
    }

    fn command(&mut self, command: &Command, dot: &Value, piped: Option<Value>) -> Result<Value> {
        match command {
            Command::Value(operand) => self.operand(operand, dot),
            Command::Call(name, operands) => {
                // `and` and `or` look no further than they must.
                let lazy = matches!(name.as_str(), "and" | "or");
                let mut values = Vec::with_capacity(operands.len() + 1);
                for operand in operands {
                    let value = self.operand(operand, dot)?;
                    if lazy && functions::truth(&value) == (name == "or") {
                        return Ok(value);
                    }
                    values.push(value);
                }
                values.extend(piped);
                functions::call(name, &values)
            }
        }
    }

    fn operand(&mut self, operand: &Operand, dot: &Value) -> Result<Value> {
        Ok(match operand {
            Operand::Literal(value) => value.clone(),
            Operand::Field(names) => functions::field(dot, names).clone(),
            Operand::Variable(name, names) => {
                let found = self.variables.iter().rev().find(|(n, _)| n == name);
                found.map_or(Value::Null, |(_, value)| {
                    functions::field(value, names).clone()
                })
            }
            Operand::Inner(pipeline, names) => {
                let value = self.pipeline(pipeline, dot)?;
                functions::field(&value, names).clone()
            }
            Operand::Call(name) => functions::call(name, &[])?,
        })
    }
}
