//! `NVIDIA_REQUIRE_*`: what an image needs of driver and GPUs (behaviour reference, section 18.2). Within an expression blanks
//! separate alternatives, and commas the conditions of one: `cuda>=12.4 brand=tesla,driver>=470,driver<471`.

#![forbid(unsafe_code)]

use std::cmp::Ordering;

/// An expression, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requirement {
    /// As it was written.
    pub text: String,
    alternatives: Vec<Vec<Condition>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Condition {
    key: Key,
    operator: Operator,
    value: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    Cuda,
    Driver,
    Arch,
    Brand,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// The longer ones first.
const OPERATORS: [(&str, Operator); 6] = [
    ("!=", Operator::NotEqual),
    ("<=", Operator::LessOrEqual),
    (">=", Operator::GreaterOrEqual),
    ("=", Operator::Equal),
    ("<", Operator::Less),
    (">", Operator::Greater),
];

/// What conditions are compared with. What is unknown fulfils every condition.
#[derive(Debug, Clone, Copy, Default)]
pub struct Facts<'a> {
    /// Version of the driver.
    pub driver: Option<&'a str>,
    /// Newest version of CUDA that it has.
    pub cuda: Option<&'a str>,
    /// Product line of a GPU.
    pub brand: Option<&'a str>,
    /// Compute capability of a GPU.
    pub arch: Option<&'a str>,
}

impl Requirement {
    /// Parses an expression; `None` for what is none.
    pub fn parse(text: &str) -> Option<Self> {
        let alternative = |text: &str| text.split(',').map(Condition::parse).collect();
        let alternatives = text.split_ascii_whitespace().map(alternative).collect::<Option<_>>()?;
        Some(Self { text: text.to_owned(), alternatives })
    }

    /// Whether a GPU with these facts will do; without any alternative, every GPU.
    pub fn holds(&self, facts: &Facts<'_>) -> bool {
        let hold = |alternative: &Vec<Condition>| alternative.iter().all(|condition| condition.holds(facts));
        self.alternatives.is_empty() || self.alternatives.iter().any(hold)
    }

    /// Whether anything but the driver's version matters.
    pub fn needs_inventory(&self) -> bool {
        self.alternatives.iter().flatten().any(|condition| condition.key != Key::Driver)
    }
}

impl Condition {
    fn parse(text: &str) -> Option<Self> {
        let at = text.find(['!', '<', '>', '='])?;
        let (key, rest) = text.split_at(at);
        let key = match key {
            "cuda" => Key::Cuda,
            "driver" => Key::Driver,
            "arch" => Key::Arch,
            "brand" => Key::Brand,
            _ => return None,
        };
        let (operator, value) =
            OPERATORS.iter().find_map(|&(sign, operator)| Some((operator, rest.strip_prefix(sign)?)))?;
        let is_valid = match key {
            Key::Brand => !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_alphanumeric()),
            _ => components(value).is_some(),
        };
        is_valid.then(|| Self { key, operator, value: value.to_owned() })
    }

    fn holds(&self, facts: &Facts<'_>) -> bool {
        let fact = match self.key {
            Key::Cuda => facts.cuda,
            Key::Driver => facts.driver,
            Key::Arch => facts.arch,
            Key::Brand => facts.brand,
        };
        let Some(fact) = fact else { return true };
        let order = match self.key {
            Key::Brand => fact.to_ascii_lowercase().cmp(&self.value.to_ascii_lowercase()),
            _ => match compare(fact, &self.value) {
                Some(order) => order,
                None => return true,
            },
        };
        match self.operator {
            Operator::Equal => order == Ordering::Equal,
            Operator::NotEqual => order != Ordering::Equal,
            Operator::Less => order == Ordering::Less,
            Operator::LessOrEqual => order != Ordering::Greater,
            Operator::Greater => order == Ordering::Greater,
            Operator::GreaterOrEqual => order != Ordering::Less,
        }
    }
}

/// Compares two versions component by component; what one lacks is 0.
pub fn compare(left: &str, right: &str) -> Option<Ordering> {
    let (mut left, mut right) = (components(left)?, components(right)?);
    let length = left.len().max(right.len());
    left.resize(length, 0);
    right.resize(length, 0);
    Some(left.cmp(&right))
}

fn components(version: &str) -> Option<Vec<u32>> {
    let number = |part: &str| match part.bytes().all(|byte| byte.is_ascii_digit()) {
        true => part.parse().ok(),
        false => None,
    };
    version.split('.').map(number).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const H200: Facts<'_> =
        Facts { driver: Some("580.159.04"), cuda: Some("13.0"), brand: Some("nvidia"), arch: Some("9.0") };

    fn holds(text: &str) -> bool {
        Requirement::parse(text).unwrap_or_else(|| panic!("{text}")).holds(&H200)
    }

    #[test]
    fn versions_are_compared_by_number() {
        for (condition, expected) in [
            ("cuda>=13.0", true),
            ("cuda>=13", true),
            ("cuda=13", true),
            ("cuda>12.10", true),
            ("cuda>=13.1", false),
            ("driver<581", true),
            ("driver>=580.95.05", true),
            ("driver<=580.159.4", true),
            ("driver!=580.159.04", false),
            ("arch>=8.0", true),
            ("arch<9", false),
            ("brand=nvidia", true),
            ("brand=NVIDIA", true),
            ("brand!=tesla", true),
        ] {
            assert_eq!(holds(condition), expected, "{condition}");
        }
    }

    #[test]
    fn alternatives_of_conditions() {
        assert!(holds("cuda>=14.0 brand=nvidia,driver>=580,driver<581"));
        assert!(!holds("cuda>=14.0 brand=tesla,driver>=580,driver<581"));
        assert!(!holds("brand=nvidia,driver>=570,driver<571"));
        assert!(holds("") && holds("  "));
    }

    #[test]
    fn what_is_unknown_is_no_obstacle() {
        let nothing = Facts::default();
        assert!(Requirement::parse("cuda>=99,brand=tesla,arch>=10.0").unwrap().holds(&nothing));
    }

    #[test]
    fn what_is_no_expression() {
        for text in ["cuda", "cuda>=", "cuda>=x", "gpu>=1", "cuda=>1", "cuda>=1,", ",cuda>=1", "brand=", "driver>=1..2"]
        {
            assert_eq!(Requirement::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_driver_alone_needs_no_inventory() {
        assert!(!Requirement::parse("driver>=580").unwrap().needs_inventory());
        assert!(Requirement::parse("driver>=580 brand=tesla").unwrap().needs_inventory());
    }

    proptest! {
        #[test]
        fn anything_is_understood_or_refused(text in "((cuda|driver|arch|brand|x)?[!<>=]{0,3}[0-9a-z.]{0,8}[ ,]{0,2}){0,6}") {
            if let Some(requirement) = Requirement::parse(&text) {
                requirement.holds(&H200);
                prop_assert!(requirement.holds(&Facts::default()));
            }
        }

        #[test]
        fn exactly_one_order(left in "[0-9]{1,4}(\\.[0-9]{1,4}){0,3}", right in "[0-9]{1,4}(\\.[0-9]{1,4}){0,3}") {
            let facts = Facts { cuda: Some(&left), ..Facts::default() };
            let holds = |operator: &str| Requirement::parse(&format!("cuda{operator}{right}")).unwrap().holds(&facts);
            let orders = [holds("<"), holds("="), holds(">")];
            prop_assert_eq!(orders.iter().filter(|&&order| order).count(), 1);
            prop_assert_eq!([holds(">="), holds("!="), holds("<=")], orders.map(|order| !order));
        }
    }
}
