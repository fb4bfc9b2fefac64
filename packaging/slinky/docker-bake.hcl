// Overrides the targets of the operator's image build that have Pyxis; read it after theirs, or alone:
//
//   docker buildx bake --file packaging/slinky/docker-bake.hcl extras

variable "REGISTRY" {
  default = "ghcr.io/slinkyproject"
}

// Where the new images go.
variable "OUTPUT_REGISTRY" {
  default = "registry.example"
}

variable "SLURM_VERSION" {
  default = "26.05.1"
}

variable "FLAVOR" {
  default = "ubuntu24.04"
}

// Of the architectures that `make packages` has been run for.
variable "PLATFORMS" {
  default = "linux/amd64"
}

group "default" {
  targets = ["extras"]
}

group "extras" {
  targets = ["slurmd_pyxis", "login_pyxis"]
}

target "_pyxis" {
  context    = "."
  dockerfile = "packaging/slinky/Containerfile"
  contexts   = {}
  platforms  = split(",", PLATFORMS)
  args = {
    SLURMD_BASE = "${REGISTRY}/slurmd:${SLURM_VERSION}-${FLAVOR}"
    LOGIN_BASE  = "${REGISTRY}/login:${SLURM_VERSION}-${FLAVOR}"
  }
}

target "slurmd_pyxis" {
  inherits = ["_pyxis"]
  target   = "slurmd-pyxis"
  tags     = ["${OUTPUT_REGISTRY}/slurmd-pyxis:${SLURM_VERSION}-${FLAVOR}"]
}

target "login_pyxis" {
  inherits = ["_pyxis"]
  target   = "login-pyxis"
  tags     = ["${OUTPUT_REGISTRY}/login-pyxis:${SLURM_VERSION}-${FLAVOR}"]
}
