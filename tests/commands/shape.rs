//! The shape of a JSON text: the names of its fields, in their order, and the types of what is in them.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};

/// `{name: string, layers: [{bytes: number}], error: null}`. Lists show each shape that their elements have, once.
pub fn shape(json: &str) -> String {
    serde_json::from_str::<Shape>(json.trim_end()).unwrap_or_else(|error| panic!("{error}: {json}")).0
}

struct Shape(String);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ShapeVisitor).map(Self)
    }
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<String, E> {
        Ok("null".into())
    }

    fn visit_bool<E>(self, _: bool) -> Result<String, E> {
        Ok("bool".into())
    }

    fn visit_u64<E>(self, _: u64) -> Result<String, E> {
        Ok("number".into())
    }

    fn visit_str<E>(self, _: &str) -> Result<String, E> {
        Ok("string".into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<String, A::Error> {
        let mut shapes: Vec<String> = Vec::new();
        while let Some(Shape(shape)) = elements.next_element()? {
            if !shapes.contains(&shape) {
                shapes.push(shape);
            }
        }
        Ok(format!("[{}]", shapes.join(" | ")))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<String, A::Error> {
        let mut fields = Vec::new();
        while let Some((name, Shape(shape))) = entries.next_entry::<String, Shape>()? {
            fields.push(format!("{name}: {shape}"));
        }
        Ok(format!("{{{}}}", fields.join(", ")))
    }
}
