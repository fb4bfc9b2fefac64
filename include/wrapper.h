/* What bindgen reads to make the spank-sys crate: Slurm's plugin interface. */
#include <slurm/slurm_errno.h>
#include <slurm/spank.h>
