//! Raw bindings to Slurm's plugin interface, `<slurm/spank.h>`; no logic.
//!
//! Made by bindgen from `include/wrapper.h` and the header installed on the build machine. Types, constants and
//! prototypes are the same in every release from 20.11 on, except that `spank_err_t` has other numbers before 21.08:
//! compare results with 0 only.
//!
//! Nothing here names a library: whoever *calls* one of the functions needs it at link time. The plugin does not; it
//! takes their types from here and their addresses from `dlsym(3)`.

#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals, missing_debug_implementations)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
