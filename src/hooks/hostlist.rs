//! Slurm's lists of hosts: `node[01-03,7],rack[0-1]n[1-2],other` (scontrol(1), "show hostnames").

#![forbid(unsafe_code)]

/// The first host of `list`; `None` if it is no such list.
pub fn first_host(list: &str) -> Option<String> {
    let mut host = String::new();
    let mut rest = list.trim();
    loop {
        let Some(end) = rest.find(['[', ']', ',']) else {
            host.push_str(rest);
            break;
        };
        let (text, after) = rest.split_at(end);
        host.push_str(text);
        match after.strip_prefix('[') {
            Some(after) => {
                let (ranges, after) = after.split_once(']')?;
                host.push_str(first_number(ranges)?);
                rest = after;
            }
            None if after.starts_with(',') => break,
            None => return None,
        }
    }
    let plain = |character: char| character.is_ascii_graphic();
    (!host.is_empty() && host.chars().all(plain)).then_some(host)
}

/// The first number of `7-9,12`, as it is written: zeros in front belong to the name.
fn first_number(ranges: &str) -> Option<&str> {
    let first = ranges.split(',').next()?;
    let number = first.split_once('-').map_or(first, |(low, _)| low);
    (!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())).then_some(number)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn first_hosts() {
        for (list, host) in [
            ("node", "node"),
            ("a,b", "a"),
            ("node[1-3]", "node1"),
            ("node[007-100,3]", "node007"),
            ("n[4,2]", "n4"),
            ("rack[2-3]n[05-07].example.org,x", "rack2n05.example.org"),
            ("node[1-3],other[5]", "node1"),
            ("c12,c[1-2]", "c12"),
            ("10.0.0.1", "10.0.0.1"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(host), "{list}");
        }
    }

    #[test]
    fn what_is_no_list_has_no_host() {
        for list in ["", ",a", "n[", "n[1-2", "n]", "n[]", "n[a-b]", "n[[1]]", "n[-1]", "a b", "a\nb", "\u{e9}"] {
            assert_eq!(first_host(list), None, "{list}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_judged(list in ".*") {
            if let Some(host) = first_host(&list) {
                prop_assert!(!host.is_empty() && !host.contains(['[', ']', ',', ' ', '\n']));
            }
        }

        #[test]
        fn what_is_composed_is_found(
            parts in proptest::collection::vec(("[a-z.-]{1,5}", 0..200_u32, 0..9_u32, 1..4_usize), 1..3),
            tail in "[a-z]{0,3}",
            more in proptest::collection::vec("[a-z]{1,4}(\\[1-2\\])?", 0..3),
        ) {
            let (mut list, mut host) = (String::new(), String::new());
            for (name, low, count, width) in &parts {
                list += &format!("{name}[{low:0width$}-{:0width$},999]", low + count);
                host += &format!("{name}{low:0width$}");
            }
            list += &tail;
            host += &tail;
            for item in more {
                list += &format!(",{item}");
            }
            prop_assert_eq!(first_host(&list), Some(host));
        }
    }
}
