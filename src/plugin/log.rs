//! Slurm's log functions.
//!
//! What reaches the user depends on where we are: on the submit side everything; on a node errors and notices from
//! `user_init` on, and information never.

use std::ffi::{CString, c_char};

use super::symbols::Symbols;
use crate::task::UserMessage;

/// Hands one message to Slurm; without Slurm it goes nowhere.
pub fn say(message: UserMessage) {
    let symbols = Symbols::get();
    let (function, text) = match message {
        UserMessage::Notice(text) => (symbols.slurm_spank_log, text),
        UserMessage::Error(text) => (symbols.slurm_error, text),
        UserMessage::Log(text) => (symbols.slurm_info, text),
    };
    let (Some(function), Ok(text)) = (function, CString::new(printable(&text))) else { return };
    // SAFETY: a printf of one string argument.
    unsafe { function(c"%s".as_ptr().cast::<c_char>(), text.as_ptr()) };
}

/// One message is one line, and does nothing to a terminal: control characters, which may come from a user's argument,
/// are escaped.
fn printable(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() && character != '\t' {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_harmless_line() {
        assert_eq!(printable("größer\ta\nb\x1b[0m\0\u{85}"), "größer\ta\\nb\\u{1b}[0m\\u{0}\\u{85}");
    }

    #[test]
    fn without_slurm_messages_go_nowhere() {
        say(UserMessage::Error("x".into()));
    }
}
