//! What a type's `Deserialize` asks for, learned by asking it. Pure.
//!
//! A [`Probe`] is a deserializer that holds nothing but a path. A type under test asks it for a struct, a list, a text;
//! along the path the probe answers with a value that has just the next step, and at its end it writes down what was asked
//! for and fails. So the schema follows from the same code that reads manifests, and cannot disagree with it.

use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, Expected, MapAccess, SeqAccess, Visitor,
};

/// One step into a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// A field of a struct.
    Field(&'static str),
    /// An element of a list.
    Item,
    /// A value of a map.
    Value,
}

/// What stands at the end of a path.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Shape {
    Struct(&'static [&'static str]),
    Map,
    List,
    /// A text, with what it is expected to be.
    Text(String),
    /// One of these texts.
    Enum(Vec<String>),
    Bool,
    /// A whole number between these.
    Integer(i64, Option<i64>),
    Number,
    /// A value of more than one form.
    Any,
}

/// What was found at the end of a path.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Found {
    pub(super) shape: Shape,
    /// Null stands for absence.
    pub(super) optional: bool,
    /// The first field without which a struct cannot be read.
    pub(super) missing: Option<String>,
}

/// A deserializer that holds a path; see the module.
pub(crate) struct Probe<'a> {
    path: &'a [Step],
    found: &'a mut Option<Found>,
    optional: bool,
}

pub(crate) type Stop = serde::de::value::Error;

impl<'a> Probe<'a> {
    pub(super) fn new(path: &'a [Step], found: &'a mut Option<Found>) -> Self {
        Self {
            path,
            found,
            optional: false,
        }
    }

    fn at_end<T>(self, shape: Shape) -> Result<T, Stop> {
        if self.path.is_empty() {
            *self.found = Some(Found {
                shape,
                optional: self.optional,
                missing: None,
            });
        }
        Err(Stop::custom("the path ends here"))
    }

    /// The way on, if the path leads into what was asked for.
    fn step(self) -> Result<(Step, Self), Self> {
        match self.path.split_first() {
            None => Err(self),
            Some((step, rest)) => Ok((
                step.clone(),
                Self {
                    path: rest,
                    found: self.found,
                    optional: false,
                },
            )),
        }
    }
}

fn expected<'de>(visitor: &impl Visitor<'de>) -> String {
    (visitor as &dyn Expected).to_string()
}

/// A map or list with one entry.
struct One<'a> {
    name: &'static str,
    probe: Option<Probe<'a>>,
    named: bool,
}

impl<'de> MapAccess<'de> for One<'_> {
    type Error = Stop;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Stop> {
        if std::mem::replace(&mut self.named, true) {
            return Ok(None);
        }
        seed.deserialize(StrDeserializer::<Stop>::new(self.name))
            .map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Stop> {
        match self.probe.take() {
            Some(probe) => seed.deserialize(probe),
            None => Err(Stop::custom("there is one entry")),
        }
    }
}

impl<'de> SeqAccess<'de> for One<'_> {
    type Error = Stop;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Stop> {
        self.probe
            .take()
            .map(|probe| seed.deserialize(probe))
            .transpose()
    }
}

macro_rules! integers {
    ($($method:ident: $type:ty),+) => {
        $(fn $method<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Stop> {
            self.at_end(Shape::Integer(i64::try_from(<$type>::MIN).unwrap_or(i64::MIN), i64::try_from(<$type>::MAX).ok()))
        })+
    };
}

macro_rules! plain {
    ($($method:ident: $shape:expr),+) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
            let shape: fn(String) -> Shape = $shape;
            self.at_end(shape(expected(&visitor)))
        })+
    };
}

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = Stop;

    plain! {
        deserialize_any: |_| Shape::Any, deserialize_bool: |_| Shape::Bool, deserialize_f32: |_| Shape::Number,
        deserialize_f64: |_| Shape::Number, deserialize_char: Shape::Text, deserialize_str: Shape::Text,
        deserialize_string: Shape::Text, deserialize_bytes: Shape::Text, deserialize_byte_buf: Shape::Text,
        deserialize_unit: |_| Shape::Any, deserialize_identifier: Shape::Text, deserialize_ignored_any: |_| Shape::Any
    }

    integers! {
        deserialize_i8: i8, deserialize_i16: i16, deserialize_i32: i32, deserialize_i64: i64, deserialize_u8: u8,
        deserialize_u16: u16, deserialize_u32: u32, deserialize_u64: u64
    }

    fn deserialize_option<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Stop> {
        self.optional = true;
        visitor.visit_some(self)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Stop> {
        self.deserialize_any(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Stop> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        match self.step() {
            Ok((_, probe)) => visitor.visit_seq(One {
                name: "",
                probe: Some(probe),
                named: true,
            }),
            Err(probe) => probe.at_end(Shape::List),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Stop> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, Stop> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        match self.step() {
            Ok((_, probe)) => visitor.visit_map(One {
                name: "0",
                probe: Some(probe),
                named: false,
            }),
            Err(probe) => probe.at_end(Shape::Map),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Stop> {
        match self.step() {
            Ok((Step::Field(name), probe)) => visitor.visit_map(One {
                name,
                probe: Some(probe),
                named: false,
            }),
            Ok(_) => Err(Stop::custom("the path is not that of a struct")),
            Err(probe) => {
                // What does it say to a struct without any field?
                let nothing = One {
                    name: "",
                    probe: None,
                    named: true,
                };
                let missing = visitor
                    .visit_map(nothing)
                    .err()
                    .and_then(|error| missing_field(&error.to_string()).map(str::to_owned));
                *probe.found = Some(Found {
                    shape: Shape::Struct(fields),
                    optional: probe.optional,
                    missing,
                });
                Err(Stop::custom("the path ends here"))
            }
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Stop> {
        let texts = variants.iter().filter(|text| !text.is_empty());
        self.at_end(Shape::Enum(texts.map(|text| (*text).to_owned()).collect()))
    }
}

fn missing_field(error: &str) -> Option<&str> {
    error.strip_prefix("missing field `")?.split('`').next()
}
