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

/// Whether this process is one of Slurm's. For the constructor, too.
pub fn are_there() -> bool {
    !lookup(c"spank_option_register").is_null()
}

/// `plugin_version` of another of Slurm's plugins, which is exactly Slurm's own: the first that `is_good`, of those in this
/// process, or of a few that lie beside Slurm's library and need nothing else. SPANK plugins do not count, which may say what
/// they like.
///
/// For the library's constructor: the loader's lock is ours then, so that nobody else loads or unloads a library.
pub fn version_of_other_plugins(is_good: fn(u32) -> bool) -> Option<u32> {
    struct Search {
        is_good: fn(u32) -> bool,
        found: Option<u32>,
    }

    unsafe extern "C" fn look(info: *mut libc::dl_phdr_info, _: usize, search: *mut c_void) -> c_int {
        // SAFETY: what dl_iterate_phdr(3) passes on, for this call.
        let (info, search) = unsafe { (&*info, &mut *search.cast::<Search>()) };
        if !info.dlpi_name.is_null() {
            // SAFETY: the loader's string.
            let path = unsafe { CStr::from_ptr(info.dlpi_name) };
            // Nothing is loaded that is not there.
            search.found = version_of_plugin(path, libc::RTLD_NOLOAD).filter(|version| (search.is_good)(*version));
        }
        c_int::from(search.found.is_some())
    }

    let mut search = Search { is_good, found: None };
    // SAFETY: `look` gets what it expects, and only during this call.
    unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut search).cast()) };
    search.found.or_else(|| {
        const PLUGINS: [&str; 4] = ["hash_k12.so", "hash_sha3.so", "proctrack_linuxproc.so", "select_linear.so"];
        let library = path_of(lookup(c"spank_option_register"))?.to_bytes();
        let directory = &library[..=library.iter().rposition(|&byte| byte == b'/')?];
        PLUGINS.iter().find_map(|name| {
            let mut path = [0; libc::PATH_MAX as usize];
            for (to, from) in path.iter_mut().zip(directory.iter().chain(name.as_bytes()).chain(b"\0")) {
                *to = *from;
            }
            version_of_plugin(CStr::from_bytes_until_nul(&path).ok()?, 0).filter(|version| is_good(*version))
        })
    })
}

/// `plugin_version` of the plugin in the file `path`, unless it is a SPANK plugin.
fn version_of_plugin(path: &CStr, flags: c_int) -> Option<u32> {
    // SAFETY: a string. What is loaded here Slurm itself would load.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL | flags) };
    if library.is_null() {
        return None;
    }
    // SAFETY: dlsym reads names and the loader's tables.
    let [kind, version] =
        [c"plugin_type", c"plugin_version"].map(|name| unsafe { libc::dlsym(library, name.as_ptr()) });
    let found = !kind.is_null() && !version.is_null();
    // SAFETY: a string, in Slurm's plugins of every release.
    let found = found && unsafe { libc::strncmp(kind.cast(), c"spank".as_ptr(), 5) } != 0;
    // SAFETY: a uint32_t, in Slurm's plugins of every release.
    let number = found.then(|| unsafe { version.cast::<u32>().read_unaligned() });
    // SAFETY: the handle is ours.
    unsafe { libc::dlclose(library) };
    number
}

/// The file that holds what is at this address.
fn path_of(address: *const c_void) -> Option<&'static CStr> {
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: dladdr reads the loader's tables and fills `info` in, all of whose fields may be zero.
    let info = unsafe {
        if libc::dladdr(address, info.as_mut_ptr()) == 0 {
            return None;
        }
        info.assume_init()
    };
    // SAFETY: the name of a library that stays as long as ours, being Slurm's own.
    (!info.dli_fname.is_null()).then(|| unsafe { CStr::from_ptr(info.dli_fname) })
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
