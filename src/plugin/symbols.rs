//! Slurm's functions, looked up in the process that loaded the plugin.
//!
//! They live in `libslurmfull.so` or in the executable itself, depending on how Slurm was built, and always in the global
//! scope. Taking their addresses from dlsym(3), and not from the linker, has three uses: the plugin names no library and
//! no release; a function that a release lacks is missing instead of making the whole library fail to load (Rust links
//! with `-z now`); and the same code can be linked into programs without Slurm.

use std::ffi::{CStr, c_char, c_int, c_long, c_void};
use std::sync::OnceLock;

use spank_sys::{spank_context_t, spank_err_t, spank_item_t, spank_option, spank_t};

macro_rules! symbols {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {
        /// The functions this process has.
        #[derive(Debug)]
        pub struct Symbols {
            $($(#[$doc])* pub $name: Option<$type>,)*
        }

        // The types below are the header's.
        $(const _: $type = spank_sys::$name;)*

        impl Symbols {
            fn find() -> Self {
                Self {
                    $($name: {
                        let address = lookup(const { c_name(concat!(stringify!($name), "\0")) });
                        // SAFETY: a function of this name has this type: the header says so, and it has been the same
                        // since Slurm 20.11. A null pointer is the `None` of a function pointer's option.
                        unsafe { std::mem::transmute::<*mut c_void, Option<$type>>(address) }
                    },)*
                }
            }
        }
    };
}

symbols! {
    /// Where the plugin is loaded.
    spank_context: unsafe extern "C" fn() -> spank_context_t;
    /// Text of an error code.
    spank_strerror: unsafe extern "C" fn(spank_err_t) -> *const c_char;
    /// Registers an option.
    spank_option_register: unsafe extern "C" fn(spank_t, *mut spank_option) -> spank_err_t;
    /// Reads a fact; the further arguments depend on the item.
    spank_get_item: unsafe extern "C" fn(spank_t, spank_item_t, ...) -> spank_err_t;
    /// Sets a variable of the job or task.
    spank_setenv: unsafe extern "C" fn(spank_t, *const c_char, *const c_char, c_int) -> spank_err_t;
    /// Removes a variable of the job or task.
    spank_unsetenv: unsafe extern "C" fn(spank_t, *const c_char) -> spank_err_t;
    /// Log, error level.
    slurm_error: unsafe extern "C" fn(*const c_char, ...);
    /// Log, information level.
    slurm_info: unsafe extern "C" fn(*const c_char, ...);
    /// To the user.
    slurm_spank_log: unsafe extern "C" fn(*const c_char, ...);
}

impl Symbols {
    /// Looked up once.
    pub fn get() -> &'static Self {
        static SYMBOLS: OnceLock<Symbols> = OnceLock::new();
        SYMBOLS.get_or_init(Self::find)
    }
}

/// `slurm_api_version()`: the number of libslurm's programming interface, not of the release.
///
/// Called from the library's constructor: allocates nothing and keeps nothing.
pub fn api_version() -> Option<c_long> {
    let address = lookup(c"slurm_api_version");
    // SAFETY: `long slurm_api_version(void)` of <slurm/slurm.h>, in every release; null is `None`.
    let function = unsafe { std::mem::transmute::<*mut c_void, Option<unsafe extern "C" fn() -> c_long>>(address) };
    // SAFETY: it returns a constant.
    function.map(|function| unsafe { function() })
}

const fn c_name(name: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(name.as_bytes()) {
        Ok(name) => name,
        Err(_) => panic!("a NUL inside a name"),
    }
}

/// The address of `name` in this process, or null.
fn lookup(name: &CStr) -> *mut c_void {
    // SAFETY: dlsym reads the name and the loader's tables.
    unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outside_of_slurm_nothing_is_found_and_nothing_fails() {
        assert!(Symbols::get().spank_get_item.is_none());
        assert_eq!(api_version(), None);
    }
}
