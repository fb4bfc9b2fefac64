//! The SPANK handle of one running hook.

use std::ffi::{CStr, CString, OsStr, c_char, c_int};
use std::marker::PhantomData;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::ptr;

use spank_sys::{spank_err_t, spank_item_t, spank_option, spank_t};

use super::symbols::Symbols;
use super::{Context, Item, Spank, SpankError, hooks, log};
use crate::options::table::OptionSpec;
use crate::request::Environment;
use crate::task::UserMessage;

/// Slurm's handle, borrowed for one hook: it lies on the stack of the hook's caller and must not outlive the call. Not
/// `Send`, because SPANK has no locks.
#[derive(Debug)]
pub struct Handle<'hook> {
    spank: spank_t,
    symbols: &'static Symbols,
    hook: PhantomData<&'hook mut ()>,
}

impl Handle<'_> {
    /// Wraps the handle that Slurm passed to a hook.
    ///
    /// # Safety
    ///
    /// `spank` is that handle, and the hook runs as long as the result lives.
    pub unsafe fn new(spank: spank_t) -> Self {
        Self { spank, symbols: Symbols::get(), hook: PhantomData }
    }

    fn check(&self, code: spank_err_t) -> Result<(), SpankError> {
        if code == 0 {
            return Ok(());
        }
        let text = match self.symbols.spank_strerror {
            // SAFETY: takes any number and returns a static string.
            Some(strerror) => unsafe { strerror(code) },
            None => ptr::null(),
        };
        if text.is_null() {
            return Err(SpankError::Refused(format!("error {code}")));
        }
        // SAFETY: not null, so a C string.
        Err(SpankError::Refused(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()))
    }

    fn on_submit_side(&self) -> bool {
        matches!(self.context(), Context::Local | Context::Allocator)
    }

    /// The strings of `S_JOB_ENV`, valid until the environment is changed or the hook ends.
    fn environment_strings(&self) -> Result<impl Iterator<Item = &[u8]>, SpankError> {
        let get_item = self.symbols.spank_get_item.ok_or(SpankError::Missing("spank_get_item"))?;
        let mut strings: *mut *mut c_char = ptr::null_mut();
        // SAFETY: the handle is this hook's, and the item takes a `char ***`.
        self.check(unsafe { get_item(self.spank, spank_sys::S_JOB_ENV, &raw mut strings) })?;
        let mut index = 0;
        Ok(std::iter::from_fn(move || {
            if strings.is_null() {
                return None;
            }
            // SAFETY: an array of C strings that ends with a null pointer, and `index` has not passed its end.
            let string = unsafe { *strings.add(index) };
            if string.is_null() {
                return None;
            }
            index += 1;
            // SAFETY: a C string, unchanged while `self` is borrowed: changing the environment takes `&mut self`.
            Some(unsafe { CStr::from_ptr(string) }.to_bytes())
        }))
    }
}

impl Spank for Handle<'_> {
    fn context(&self) -> Context {
        let Some(spank_context) = self.symbols.spank_context else { return Context::Unknown };
        // SAFETY: reads a variable of Slurm's.
        match unsafe { spank_context() } {
            spank_sys::S_CTX_LOCAL => Context::Local,
            spank_sys::S_CTX_REMOTE => Context::Remote,
            spank_sys::S_CTX_ALLOCATOR => Context::Allocator,
            spank_sys::S_CTX_SLURMD => Context::Slurmd,
            spank_sys::S_CTX_JOB_SCRIPT => Context::JobScript,
            _ => Context::Unknown,
        }
    }

    fn register(&mut self, option: &'static OptionSpec) -> Result<(), SpankError> {
        let register = self.symbols.spank_option_register.ok_or(SpankError::Missing("spank_option_register"))?;
        // Slurm copies the strings and writes to none of them.
        let mut raw = spank_option {
            name: option.name.as_ptr().cast_mut(),
            arginfo: option.argument.map_or(ptr::null_mut(), |text| text.as_ptr().cast_mut()),
            usage: option.help.as_ptr().cast_mut(),
            has_arg: c_int::from(option.argument.is_some()),
            val: option.id as c_int,
            cb: Some(hooks::option_callback),
        };
        // SAFETY: the handle is this hook's; the option is copied before the call returns.
        self.check(unsafe { register(self.spank, &raw mut raw) })
    }

    fn number(&self, item: Item) -> Result<u32, SpankError> {
        let get_item = self.symbols.spank_get_item.ok_or(SpankError::Missing("spank_get_item"))?;
        let mut value: u32 = 0;
        // SAFETY: the handle is this hook's, and each of these items takes a pointer to 32 bits (uid_t, gid_t, uint32_t,
        // int).
        self.check(unsafe { get_item(self.spank, raw_item(item), &raw mut value) })?;
        Ok(value)
    }

    fn groups(&self) -> Result<Vec<u32>, SpankError> {
        let get_item = self.symbols.spank_get_item.ok_or(SpankError::Missing("spank_get_item"))?;
        let mut groups: *mut libc::gid_t = ptr::null_mut();
        let mut count: c_int = 0;
        // SAFETY: the handle is this hook's, and the item takes a `gid_t **` and an `int *`.
        let code =
            unsafe { get_item(self.spank, spank_sys::S_JOB_SUPPLEMENTARY_GIDS, &raw mut groups, &raw mut count) };
        self.check(code)?;
        let count = usize::try_from(count).unwrap_or(0);
        if groups.is_null() || count == 0 {
            return Ok(Vec::new());
        }
        // SAFETY: Slurm's array has `count` elements.
        Ok(unsafe { std::slice::from_raw_parts(groups, count) }.to_vec())
    }

    fn arguments(&self) -> Result<Vec<Vec<u8>>, SpankError> {
        let get_item = self.symbols.spank_get_item.ok_or(SpankError::Missing("spank_get_item"))?;
        let mut count: c_int = 0;
        let mut strings: *mut *mut c_char = ptr::null_mut();
        // SAFETY: the handle is this hook's, and the item takes an `int *` and a `char ***`.
        let code = unsafe { get_item(self.spank, spank_sys::S_JOB_ARGV, &raw mut count, &raw mut strings) };
        self.check(code)?;
        // SAFETY: Slurm's array has `count` C strings.
        Ok(unsafe { c_strings(count, strings) }.map(<[u8]>::to_vec).collect())
    }

    fn environment(&self) -> Result<Environment, SpankError> {
        if self.on_submit_side() {
            let strings = std::env::vars_os().map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat());
            return Ok(strings.collect());
        }
        Ok(self.environment_strings()?.collect())
    }

    fn variable(&self, name: &str) -> Option<Vec<u8>> {
        if self.on_submit_side() {
            return std::env::var_os(OsStr::new(name)).map(OsStringExt::into_vec);
        }
        let value = |string: &[u8]| Some(string.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?.to_vec());
        self.environment_strings().ok()?.find_map(value)
    }

    fn set_variable(&mut self, name: &[u8], value: &[u8]) -> Result<(), SpankError> {
        let name = CString::new(name).map_err(|_| SpankError::Nul)?;
        let value = CString::new(value).map_err(|_| SpankError::Nul)?;
        if self.on_submit_side() {
            // SAFETY: two C strings, which are copied. Slurm sets the variables of the options at the same point itself:
            // no other thread of the command reads the environment meanwhile.
            return match unsafe { libc::setenv(name.as_ptr(), value.as_ptr(), 1) } {
                0 => Ok(()),
                _ => Err(SpankError::Refused(std::io::Error::last_os_error().to_string())),
            };
        }
        let setenv = self.symbols.spank_setenv.ok_or(SpankError::Missing("spank_setenv"))?;
        // SAFETY: the handle is this hook's; the strings are copied.
        self.check(unsafe { setenv(self.spank, name.as_ptr(), value.as_ptr(), 1) })
    }

    fn remove_variable(&mut self, name: &[u8]) -> Result<(), SpankError> {
        let unsetenv = self.symbols.spank_unsetenv.ok_or(SpankError::Missing("spank_unsetenv"))?;
        let name = CString::new(name).map_err(|_| SpankError::Nul)?;
        // SAFETY: the handle is this hook's; the string is only read.
        self.check(unsafe { unsetenv(self.spank, name.as_ptr()) })
    }

    fn say(&mut self, message: UserMessage) {
        log::say(message);
    }
}

fn raw_item(item: Item) -> spank_item_t {
    match item {
        Item::Uid => spank_sys::S_JOB_UID,
        Item::Gid => spank_sys::S_JOB_GID,
        Item::JobId => spank_sys::S_JOB_ID,
        Item::StepId => spank_sys::S_JOB_STEPID,
        Item::Nodes => spank_sys::S_JOB_NNODES,
        Item::LocalTasks => spank_sys::S_JOB_LOCAL_TASK_COUNT,
        Item::TotalTasks => spank_sys::S_JOB_TOTAL_TASK_COUNT,
        Item::TaskId => spank_sys::S_TASK_ID,
    }
}

/// The strings of a C argument vector; an absent one is empty.
///
/// # Safety
///
/// `strings` is null or points to `count` pointers, each null or to a C string, which stay as they are for `'a`.
pub unsafe fn c_strings<'a>(count: c_int, strings: *mut *mut c_char) -> impl Iterator<Item = &'a [u8]> {
    let count = if strings.is_null() { 0 } else { usize::try_from(count).unwrap_or(0) };
    (0..count)
        // SAFETY: within the array, says the caller.
        .map(move |index| unsafe { *strings.add(index) })
        .filter(|string| !string.is_null())
        // SAFETY: a C string, says the caller.
        .map(|string| unsafe { CStr::from_ptr(string) }.to_bytes())
}
