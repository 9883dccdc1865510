//! `Schema`: whether a JSON value is what `schema/peer-copy-3.json` says.
//!
//! As much of JSON Schema as that file uses: `type`, `const`, `enum`, `minimum`, `required`, `properties`,
//! `additionalProperties: false`, `items` and `$ref` to `$defs`. A word that is not known here is an error, so
//! that the file promises nothing that nobody checks.

use serde_json::Value;

/// The schema of the records that this program writes.
pub const TEXT: &str = include_str!("../schema/peer-copy-3.json");

/// Words that say nothing of a value.
const COMMENTS: [&str; 5] = ["$schema", "$id", "$defs", "title", "description"];

/// Checks a value.
///
/// # Errors
/// The first place that differs, and how.
pub fn check(value: &Value) -> Result<(), String> {
    let schema: Value = serde_json::from_str(TEXT).map_err(|error| format!("the schema itself: {error}"))?;
    check_by(&schema, &schema, value, "record")
}

fn check_by(root: &Value, schema: &Value, value: &Value, place: &str) -> Result<(), String> {
    let words = schema.as_object().ok_or_else(|| format!("the schema of {place} is no object"))?;
    for (word, says) in words {
        match word.as_str() {
            comment if COMMENTS.contains(&comment) => {}
            "$ref" => {
                let pointer = says.as_str().and_then(|text| text.strip_prefix('#'));
                let target = pointer.and_then(|pointer| root.pointer(pointer));
                check_by(root, target.ok_or_else(|| format!("{place}: no {says}"))?, value, place)?;
            }
            "type" => check_type(says, value, place)?,
            "const" if says == value => {}
            "const" => return Err(format!("{place} is {value}, not {says}")),
            "enum" if says.as_array().is_some_and(|all| all.contains(value)) => {}
            "enum" => return Err(format!("{place} is {value}, none of {says}")),
            "minimum" => {
                let (least, number) = (says.as_f64(), value.as_f64());
                if number.is_some_and(|number| least.is_some_and(|least| number < least)) {
                    return Err(format!("{place} is {value}, less than {says}"));
                }
            }
            "required" => {
                let mut names = says.as_array().into_iter().flatten().filter_map(Value::as_str);
                // What is no object has no fields to miss.
                if let Some(name) = names.find(|name| value.is_object() && value.get(name).is_none()) {
                    return Err(format!("{place} has no {name}"));
                }
            }
            "properties" => {
                for (name, schema) in says.as_object().into_iter().flatten() {
                    if let Some(value) = value.get(name) {
                        check_by(root, schema, value, &format!("{place}.{name}"))?;
                    }
                }
            }
            "additionalProperties" if says == &Value::Bool(false) => {
                let known =
                    |name: &String| words.get("properties").is_some_and(|all| all.get(name).is_some());
                if let Some(name) =
                    value.as_object().and_then(|object| object.keys().find(|name| !known(name)))
                {
                    return Err(format!("{place} has {name}, which nobody knows"));
                }
            }
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    check_by(root, says, item, &format!("{place}[{index}]"))?;
                }
            }
            other => return Err(format!("the schema of {place} says {other}, which is not checked here")),
        }
    }
    Ok(())
}

/// One type, or one of several.
fn check_type(says: &Value, value: &Value, place: &str) -> Result<(), String> {
    let is = |name: &Value| match name.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("number") => value.is_number(),
        Some("integer") => value.is_u64() || value.is_i64(),
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        _ => false,
    };
    let fits = match says {
        Value::Array(names) => names.iter().any(is),
        name => is(name),
    };
    if fits { Ok(()) } else { Err(format!("{place} is {value}, no {says}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record;

    fn example() -> Value {
        serde_json::to_value(record::tests::example()).unwrap()
    }

    #[test]
    fn what_is_written_is_what_the_schema_says() {
        assert_eq!(check(&example()), Ok(()));
    }

    #[test]
    fn the_schema_is_of_the_version_that_is_written() {
        let schema: Value = serde_json::from_str(TEXT).unwrap();
        assert_eq!(schema["properties"]["version"]["const"], record::VERSION);
        assert_eq!(schema["properties"]["schema"]["const"], record::SCHEMA);
    }

    #[test]
    fn what_differs_is_named() {
        let broken = |change: fn(&mut Value)| {
            let mut value = example();
            change(&mut value);
            check(&value).unwrap_err()
        };
        let missing = broken(|value| drop(value.as_object_mut().unwrap().remove("places")));
        assert_eq!(missing, "record has no places");
        assert!(broken(|value| value["version"] = 1.into()).contains("record.version is 1"));
        assert!(broken(|value| value["more"] = 2.into()).contains("more, which nobody knows"));
        let verdict = broken(|value| value["figures"][0]["verdict"] = "fast".into());
        assert!(verdict.starts_with("record.figures[0].verdict is \"fast\""), "{verdict}");
        let size = broken(|value| value["figures"][1]["what"]["size_bytes"] = Value::from(-1));
        assert!(size.contains("size_bytes is -1, less than"), "{size}");
        assert!(broken(|value| value["machine"]["cpus"] = "two".into()).contains("no \"integer\""));
    }

    #[test]
    fn every_field_of_a_record_is_required() {
        // So that a version's reader can count on each.
        fn walk(schema: &Value, place: &str) {
            if let Some(properties) = schema["properties"].as_object() {
                let required: Vec<&str> =
                    schema["required"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
                for (name, schema) in properties {
                    assert!(required.contains(&name.as_str()), "{place}.{name}");
                    walk(schema, &format!("{place}.{name}"));
                }
                assert_eq!(schema["additionalProperties"], false, "{place}");
            }
            for (name, schema) in schema["$defs"].as_object().into_iter().flatten() {
                walk(schema, name);
            }
        }
        walk(&serde_json::from_str(TEXT).unwrap(), "record");
    }
}
