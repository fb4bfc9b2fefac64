# What hooks for enroot find in "${ENROOT_LIBRARY_PATH}/common.sh": the functions that site hooks call, for bash.
# shellcheck shell=bash

# Says something on standard error: LEVEL (INFO, WARN, ERROR) and text; without arguments an empty line. A third argument
# adds an empty line after it.
common::log() {
    local level="${1-}" text="${2-}" colour=""
    if [ $# -eq 0 ]; then
        printf '\n' >&2
        return 0
    fi
    case "${level}" in
    INFO) colour=34 ;;
    WARN) colour=33 ;;
    ERROR) colour=31 ;;
    esac
    if [ -n "${colour}" ] && [ -t 2 ]; then
        printf '\033[1;%sm[%s]\033[0m %s\n' "${colour}" "${level}" "${text}" >&2
    elif [ -n "${level}" ] && [ "${level}" != "-" ]; then
        printf '[%s] %s\n' "${level}" "${text}" >&2
    else
        printf '%s\n' "${text}" >&2
    fi
    if [ $# -gt 2 ]; then
        printf '\n' >&2
    fi
}

# Says an error and ends the hook.
common::err() {
    common::log ERROR "$*"
    exit 1
}

# Ends the hook unless every command exists.
common::checkcmd() {
    local name
    for name in "$@"; do
        command -v "${name}" >/dev/null || common::err "Command not found: ${name}"
    done
}

# The user's passwd(5) and group(5) entries on the host, also where he is root in the container.
common::getpwent() {
    local outside
    read -r _ outside _ </proc/self/uid_map
    getent passwd "${outside}"
}

common::getgrent() {
    local outside
    read -r _ outside _ </proc/self/gid_map
    getent group "${outside}"
}

# An absolute path without links; what does not exist is allowed at its end.
common::realpath() {
    readlink -f -- "$1" || common::err "No such file or directory: $1"
}

# The directory on which the file system with a path is mounted.
common::mountpoint() {
    stat -c %m -- "$1"
}

common::chdir() {
    cd -- "$1" 2>/dev/null || common::err "Could not change directory: $1"
}

# Debian's name of an architecture that uname(1) names.
common::debarch() {
    case "$1" in
    x86_64) printf 'amd64' ;;
    aarch64) printf 'arm64' ;;
    ppc64le | riscv64 | s390x) printf '%s' "$1" ;;
    *) common::err "Unsupported architecture: $1" ;;
    esac
}

# Standard input or files with ${NAME} replaced by variables of the environment.
common::envsubst() {
    local line result name
    cat -- "$@" | while IFS= read -r line || [ -n "${line}" ]; do
        result=""
        while [[ "${line}" == *'${'* ]]; do
            result+="${line%%'${'*}"
            line="${line#*'${'}"
            name="${line%%\}*}"
            if [[ "${line}" == *'}'* && "${name}" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]]; then
                result+="${!name-}"
                line="${line#*\}}"
            else
                result+='${'
            fi
        done
        printf '%s%s\n' "${result}" "${line}"
    done
}

# Makes a tree readable and removable for its owner.
common::fixperms() {
    chmod -R -f u+rwX -- "$1" || true
}

common::rmall() {
    common::fixperms "$1"
    rm -rf -- "$1"
}
