#!/bin/bash
# The life of the package: lifecycle.sh OLD NEW TESTBED, inside tests/releases/enter. Every command has to succeed.
set -euxo pipefail
old=$1 new=$2 testbed=$3
export DEBIAN_FRONTEND=noninteractive PYXIS_TEST_PACKAGE=1

# Waits for a condition.
until_true() {
    for _ in $(seq 600); do
        if "$@"; then return 0; fi
        sleep 0.1
    done
    echo "waited in vain for: $*" >&2
    return 1
}

says() { grep -q "$1" "$2"; }

version() { test "$(dpkg-query --show --showformat='${Version}' pyxis)" = "$1"; }

# --- It takes the place of NVIDIA's packages.
for name in nvslurm-plugin-pyxis enroot; do
    root=/tmp/$name
    mkdir -p "$root/DEBIAN" "$root/usr/share/pyxis" "$root/usr/bin"
    printf 'Package: %s\nVersion: 1.0-1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n' "$name" >"$root/DEBIAN/control"
done
echo 'required /usr/lib/slurm/spank_pyxis.so' >/tmp/nvslurm-plugin-pyxis/usr/share/pyxis/pyxis.conf
touch /tmp/enroot/usr/bin/enroot
for name in nvslurm-plugin-pyxis enroot; do
    dpkg-deb --root-owner-group --build "/tmp/$name" "/tmp/$name.deb"
    dpkg --install "/tmp/$name.deb"
done
! getent passwd pyxis
dpkg --install "$old"
for name in nvslurm-plugin-pyxis enroot; do
    test "$(dpkg-query --show --showformat='${db:Status-Status}' "$name" 2>/dev/null || echo not-installed)" != installed
done
test "$(cat /usr/share/pyxis/pyxis.conf)" = "required /usr/lib/spank-pyxis/spank_pyxis.so"
test "$(ls /usr/share/pyxis)" = pyxis.conf
test "$(readlink /usr/bin/enroot)" = pyxis

# --- What it makes.
getent passwd pyxis | grep ':/nonexistent:/usr/sbin/nologin$'
test "$(stat --format='%a %U' /var/lib/pyxis)" = "711 root"
test "$(stat --format='%a %U' /run/pyxis)" = "755 root"
dpkg --verify pyxis
for command in pyxis pyxis-import pyxis-doctor enroot enroot-mount; do man --where "$command"; done
bash -n /usr/share/bash-completion/completions/pyxis
if [ -e /etc/apparmor.d/abi/4.0 ]; then
    apparmor_parser --skip-kernel-load --skip-cache /etc/apparmor.d/pyxis
else
    test ! -e /etc/apparmor.d/pyxis
fi
# Again, after an interruption.
uid=$(id --user pyxis)
dpkg-reconfigure pyxis || dpkg --install "$old"
test "$(id --user pyxis)" = "$uid"

# --- An upgrade while a step runs: it goes on, and the next one has the new version.
"$testbed" up /nonexistent /nonexistent
shell=/var/tmp/pyxis-testbed/demo/shell
home=$("$shell" sh -c 'echo $HOME')
admin="env SLURM_CONF=/var/tmp/pyxis-testbed/demo/etc/slurm.conf"
idle() { test "$($admin sinfo --noheader --Node --format=%T | sort -u)" = idle; }

# A step that runs until there is a file.
start_step() {
    rm -f "$home/go"
    "$shell" srun --container-image=alpine:latest --container-mounts="$home:/home" --container-writable \
        sh -c 'echo up; while [ ! -e /home/go ]; do sleep 0.1; done; . /etc/os-release; echo "still in $ID"' >/tmp/step 2>&1 &
    step=$!
    until_true says '^up' /tmp/step
}

end_step() {
    touch "$home/go"
    wait "$step"
    cat /tmp/step
    says 'still in busybox' /tmp/step
    until_true idle
}

start_step
echo '# the administrator was here' >>/etc/pyxis/pyxis.toml
inode=$(stat --format=%i /usr/lib/spank-pyxis/spank_pyxis.so)
dpkg --install "$new"
version "$(dpkg-deb --field "$new" Version)"
test "$(stat --format=%i /usr/lib/spank-pyxis/spank_pyxis.so)" != "$inode"
says 'the administrator was here' /etc/pyxis/pyxis.toml
"$shell" srun --overlap -N1 --container-image=alpine:latest true
end_step

# And back.
start_step
dpkg --install "$old"
end_step
dpkg --install "$new"

# --- Removed while a step runs: the step ends well, the node stays up, other steps do not care.
start_step
cp /etc/pyxis/pyxis.toml /tmp/pyxis.toml
dpkg --remove pyxis
test ! -e /usr/bin/pyxis -a ! -e /usr/bin/enroot -a ! -e /usr/lib/spank-pyxis -a ! -e /usr/share/pyxis
test -e /etc/pyxis/pyxis.toml -a ! -L /etc/apparmor.d/pyxis
end_step
"$shell" srun true
dpkg --purge pyxis
test ! -e /etc/pyxis/pyxis.toml
# The account stays, as accounts do: files may be its.
getent passwd pyxis

# --- Purged: layers go unless somebody uses them, users' containers stay.
again() {
    dpkg --install "$new"
    cp /tmp/pyxis.toml /etc/pyxis/pyxis.toml
}

layers() { ls /var/lib/pyxis/layers/sha256 | wc -l; }

again
pyxis run --user pyxis-test-1 alpine:latest -- sh -c 'echo up; exec sleep 1000' >/tmp/container 2>&1 &
container=$!
until_true says '^up' /tmp/container
mountpoint --quiet /run/pyxis/mounts
dpkg --purge pyxis 2>/tmp/purge
says 'containers use layers' /tmp/purge
test "$(layers)" -gt 0
kill -0 "$container"
kill -KILL "$container"
wait "$container" || true

again
mkdir -p /var/lib/pyxis/containers/1000/pyxis_mine /var/lib/pyxis/containers/1001
# What held the locks may need a moment to go.
for layer in /var/lib/pyxis/layers/sha256/*; do until_true flock --nonblock --exclusive "$layer" true; done
dpkg --purge pyxis 2>/tmp/purge
says 'holds containers of users' /tmp/purge
test "$(find /var/lib/pyxis -mindepth 1 -printf '%P ')" = "containers containers/1000 containers/1000/pyxis_mine "
rm -r /var/lib/pyxis/containers

again
pyxis run --user pyxis-test-1 alpine:latest -- true
test "$(layers)" -gt 0
dpkg --purge pyxis
test ! -e /var/lib/pyxis -a ! -e /run/pyxis -a ! -e /etc/pyxis

# A store on another file system may be everybody's.
again
mount -t tmpfs store /var/lib/pyxis
mkdir /var/lib/pyxis/layers
dpkg --purge pyxis 2>/tmp/purge
says 'left as it is' /tmp/purge
test -d /var/lib/pyxis/layers
umount /var/lib/pyxis

"$testbed" down
set +x
echo "a whole life"
