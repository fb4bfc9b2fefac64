//! The reference of the configuration, made from the file that is shipped, which states every setting and its default.

#![forbid(unsafe_code)]

/// The file.
pub const SHIPPED: &str = include_str!("../../../packaging/pyxis.toml");

const HEAD: &str = "\
# The configuration

`/etc/pyxis/pyxis.toml`, or what `config=` behind the plugin's path in `plugstack.conf` says. Every setting is optional; what is
shown is its default, except in `[registry]` and `[[policy]]`. It is read at every container start: changes need no restart. A file
with a mistake in it starts no container, and the message names line and column; `pyxis doctor --node` finds it before a job does.

<!-- Made by: pyxis generate --configuration > docs/configuration.md -->
";

/// The reference, as Markdown.
pub fn reference() -> String {
    let mut text = String::from(HEAD);
    let mut paragraph: Vec<&str> = Vec::new();
    let mut keys: Vec<&str> = Vec::new();
    for line in SHIPPED.lines().chain([""]) {
        let uncommented = line.strip_prefix('#').unwrap_or(line);
        let is_text = line == "#" || line.starts_with("# ") || line.starts_with("#  ");
        if !keys.is_empty() && !uncommented.contains(" = ") || is_text && !keys.is_empty() {
            settings(&mut text, &mut keys, &mut paragraph);
        }
        if is_text {
            paragraph.push(uncommented.strip_prefix(' ').unwrap_or(uncommented));
        } else if uncommented.starts_with('[') {
            text += &format!("\n## `{uncommented}`\n");
            prose(&mut text, &mut paragraph);
        } else if uncommented.contains(" = ") {
            keys.push(uncommented);
        } else if !text.contains("\n## ") {
            // What is said of the file as a whole: the head says it, too.
            paragraph.clear();
        }
    }
    text
}

/// Settings, and what the lines above them say.
fn settings(text: &mut String, keys: &mut Vec<&str>, paragraph: &mut Vec<&str>) {
    *text += "\n```toml\n";
    for key in keys.drain(..) {
        *text += key;
        *text += "\n";
    }
    *text += "```\n";
    prose(text, paragraph);
}

/// Lines for people. Those that are indented are a list, as it is.
fn prose(text: &mut String, paragraph: &mut Vec<&str>) {
    let mut listed = false;
    for (index, line) in paragraph.drain(..).enumerate() {
        let indented = line.starts_with("  ");
        if index == 0 || indented != listed {
            *text += match (listed, indented) {
                (false, true) => "\n```text\n",
                (true, false) => "```\n\n",
                _ => "\n",
            };
        }
        listed = indented;
        *text += line;
        *text += "\n";
    }
    if listed {
        *text += "```\n";
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn the_document_is_the_reference() {
        let same = reference() == include_str!("../../../docs/configuration.md");
        assert!(same, "run: pyxis generate --configuration > docs/configuration.md");
    }

    /// The settings that the code knows in `table`: what it offers instead of one that does not exist.
    fn known(table: &str) -> Vec<String> {
        let text = format!("{table}\nno_such_setting = 1\n");
        let error = Config::parse(&text, "x".as_ref()).unwrap_err().to_string();
        let (_, offered) = error.split_once("expected ").unwrap_or_else(|| panic!("{table}: {error}"));
        offered.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    }

    #[test]
    fn no_setting_of_the_code_is_missing() {
        let tables = known("");
        assert!(tables.len() > 10, "{tables:?}");
        for table in tables {
            let (header, shown) = match table.as_str() {
                "registry" => ("[registry.\"a.io\"]".to_owned(), "[registry.\"docker.io\"]".to_owned()),
                "policy" => ("[[policy]]".into(), "[[policy]]".into()),
                name => (format!("[{name}]"), format!("[{name}]")),
            };
            assert!(SHIPPED.contains(&shown), "{table} is not in packaging/pyxis.toml");
            for key in known(&header) {
                let listed = |line: &str| {
                    line.starts_with("#   ") && line.split([' ', ',']).any(|word| word == key)
                        || line.starts_with(&format!("#{key} = "))
                        || line == format!("#[{table}.{key}]")
                };
                assert!(SHIPPED.lines().any(listed), "{table}.{key} is not in packaging/pyxis.toml");
            }
        }
    }
}
