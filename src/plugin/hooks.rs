//! The functions Slurm calls: the only way into the plugin.
//!
//! Each catches panics and returns 0 or -1. Which hooks exist matters: Slurm forks a process for each prolog and epilog
//! of a node on which a plugin has those hooks, and keeps a plugin in slurmd only if it has `init` or `slurmd_exit`.

use std::ffi::{CStr, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use spank_sys::spank_t;

use super::handle::{Handle, c_strings};
use super::state::{Phase, State};
use super::{Context, Failed, Spank, allocator, job_script, local, log, remote, slurmd};
use crate::options::table::OptionId;
use crate::task::UserMessage;

macro_rules! hooks {
    ($($(#[$doc:meta])* $symbol:ident => $function:expr;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// For Slurm, as `spank_f` of `<slurm/spank.h>`.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $symbol(spank: spank_t, argc: c_int, argv: *mut *mut c_char) -> c_int {
                // SAFETY: the arguments of a hook, valid until it returns.
                unsafe { run(stringify!($symbol), spank, argc, argv, $function) }
            }
        )*
    };
}

hooks! {
    /// Every process, first: registers the options.
    slurm_spank_init => init;
    /// Commands and step managers, when all options are known.
    slurm_spank_init_post_opt => init_post_opt;
    /// `srun`, when the step's nodes are known: asks what the image's tag means, for all of them.
    slurm_spank_local_user_init => local_user_init;
    /// Step manager, as the user: collects what the container start needs.
    slurm_spank_user_init => user_init;
    /// Each task, still root: the leading one starts the container.
    slurm_spank_task_init_privileged => task_init_privileged;
    /// Each task, as the user: waits for the container and joins it.
    slurm_spank_task_init => task_init;
    /// Step manager, after each task: lets the container go when the last one has ended.
    slurm_spank_task_exit => task_exit;
    /// `slurmstepd spank epilog`, when a job is over: removes its containers where they end with it.
    slurm_spank_job_epilog => job_epilog;
    /// Every process, last.
    slurm_spank_exit => exit;
}

type Hook = fn(&mut State, &mut dyn Spank, &[&str]) -> Result<(), Failed>;

pub(super) fn init(state: &mut State, spank: &mut dyn Spank, arguments: &[&str]) -> Result<(), Failed> {
    if !state.enter(Phase::Init) {
        return Ok(());
    }
    match spank.context() {
        Context::Local => local::init(state, spank, arguments),
        Context::Allocator => allocator::init(state, spank, arguments),
        Context::Remote => {
            remote::init(state, spank, arguments);
            Ok(())
        }
        Context::Slurmd => {
            slurmd::init(spank, arguments);
            Ok(())
        }
        Context::JobScript | Context::Unknown => Ok(()),
    }
}

pub(super) fn init_post_opt(state: &mut State, spank: &mut dyn Spank, _: &[&str]) -> Result<(), Failed> {
    match spank.context() {
        // Once for each component of a heterogeneous job, each with options of its own: they decide what there is to do.
        Context::Local => local::init_post_opt(state, spank),
        Context::Allocator => allocator::init_post_opt(state, spank),
        Context::Remote if state.enter(Phase::InitPostOpt) => {
            remote::init_post_opt(state, spank);
            Ok(())
        }
        Context::Remote | Context::Slurmd | Context::JobScript | Context::Unknown => Ok(()),
    }
}

fn local_user_init(state: &mut State, spank: &mut dyn Spank, _: &[&str]) -> Result<(), Failed> {
    local::user_init(state, spank);
    Ok(())
}

fn user_init(state: &mut State, spank: &mut dyn Spank, _: &[&str]) -> Result<(), Failed> {
    if state.enter(Phase::UserInit) {
        remote::user_init(state, spank);
    }
    Ok(())
}

fn task_init_privileged(state: &mut State, spank: &mut dyn Spank, _: &[&str]) -> Result<(), Failed> {
    if state.enter(Phase::TaskInitPrivileged) {
        remote::task_init_privileged(state, spank);
    }
    Ok(())
}

fn task_init(state: &mut State, spank: &mut dyn Spank, _: &[&str]) -> Result<(), Failed> {
    if state.enter(Phase::TaskInit) { remote::task_init(state, spank) } else { Ok(()) }
}

fn task_exit(state: &mut State, spank: &mut dyn Spank, _: &[&str]) -> Result<(), Failed> {
    remote::task_exit(state, spank);
    Ok(())
}

fn job_epilog(_: &mut State, spank: &mut dyn Spank, arguments: &[&str]) -> Result<(), Failed> {
    job_script::epilog(spank, arguments);
    Ok(())
}

fn exit(state: &mut State, _: &mut dyn Spank, _: &[&str]) -> Result<(), Failed> {
    state.end();
    Ok(())
}

/// Runs one hook.
///
/// # Safety
///
/// The arguments are those of a hook that runs.
unsafe fn run(name: &str, spank: spank_t, argc: c_int, argv: *mut *mut c_char, hook: Hook) -> c_int {
    // SAFETY: the caller's promise.
    let mut handle = unsafe { Handle::new(spank) };
    let context = handle.context();
    // SAFETY: the caller's promise.
    let arguments = unsafe { c_strings(argc, argv) };
    let result = guarded(name, || {
        // Slurm splits the line of a text file: other encodings than UTF-8 are nobody's intention.
        let arguments: Vec<_> = arguments.map(String::from_utf8_lossy).collect();
        let arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
        State::with(|state| hook(state, &mut handle, &arguments))
    });
    match result {
        Ok(Ok(())) => 0,
        Ok(Err(Failed)) => -1,
        // On a node a failing hook would drain it or, in slurmd, keep it from starting; the task fails instead.
        Err(Panicked(reason)) if is_on_node(context) && name != TASK_INIT => {
            let _ = guarded(name, || {
                State::with(|state| {
                    state.fail_later(reason);
                    Ok(())
                })
            });
            0
        }
        Err(Panicked(_)) => -1,
    }
}

fn is_on_node(context: Context) -> bool {
    matches!(context, Context::Remote | Context::Slurmd | Context::JobScript)
}

/// The hook whose failure ends the task and nothing else.
const TASK_INIT: &str = "slurm_spank_task_init";

/// What Slurm calls for each option it finds.
///
/// # Safety
///
/// For Slurm, as `spank_opt_cb_f` of `<slurm/spank.h>`.
pub unsafe extern "C" fn option_callback(value: c_int, argument: *const c_char, remote: c_int) -> c_int {
    // An option without argument comes with a null pointer from the command line and with "" from the environment.
    let argument = if argument.is_null() {
        &[][..]
    } else {
        // SAFETY: a C string that outlives the call.
        unsafe { CStr::from_ptr(argument) }.to_bytes()
    };
    let set = || {
        let Some(id) = OptionId::from_value(value) else { return Err(Failed) };
        State::with(|state| match state.set_option(id, argument) {
            Ok(()) => Ok(()),
            // Slurm would log it and run the step without the option: the task has to fail instead.
            Err(error) if remote != 0 => {
                state.fail_later(error.to_string());
                Ok(())
            }
            Err(error) => {
                log::say(UserMessage::error(error));
                Err(Failed)
            }
        })
    };
    match guarded("an option", set) {
        Ok(Ok(())) => 0,
        Ok(Err(Failed)) => -1,
        Err(Panicked(reason)) => {
            let _ = guarded("an option", || {
                State::with(|state| {
                    state.fail_later(reason);
                    Ok(())
                })
            });
            -1
        }
    }
}

/// A bug of ours, in one line.
struct Panicked(String);

/// Runs `f`. A panic is logged and becomes a value.
fn guarded(name: &str, f: impl FnOnce() -> Result<(), Failed>) -> Result<Result<(), Failed>, Panicked> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|panic| {
        let text = panic
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("no message");
        let reason = format!("internal error in {name}: {text}; please report it");
        log::say(UserMessage::error(&reason));
        Panicked(reason)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_do_not_leave() {
        assert!(matches!(guarded("x", || Ok(())), Ok(Ok(()))));
        assert!(matches!(guarded("x", || Err(Failed)), Ok(Err(Failed))));
        let Err(Panicked(reason)) = guarded("x", || panic!("boom")) else { panic!("no panic") };
        assert_eq!(reason, "internal error in x: boom; please report it");
        assert!(guarded("x", || std::panic::panic_any(7)).is_err());
        // SAFETY: without Slurm, no function of it is called.
        let code = unsafe { run("x", std::ptr::null_mut(), 0, std::ptr::null_mut(), |_, _, _| panic!("boom")) };
        assert_eq!(code, -1);
    }
}
