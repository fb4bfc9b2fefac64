"""An OCI image layout made of this machine's own files: a shell, Python and what they need, and nothing of the driver.

    python3 image.py DIRECTORY [LIBCUDA VERSION]

With the file LIBCUDA as the CUDA of a driver VERSION, in /usr/local/cuda/compat.
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile

PROGRAMS = ["bash", "cat", "env", "ls", "grep", "readlink", "sort", "stat", "true", "ldconfig", "ldconfig.real", "id", "mount"]
DRIVER = re.compile(r"nvidia|libcuda\.so|/cuda")
ENVIRONMENT = [
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "NVIDIA_VISIBLE_DEVICES=all",
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    "NVIDIA_REQUIRE_CUDA=cuda>=11.0",
]


def libraries(path):
    """What the dynamic linker loads for `path`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LD_")}
    text = subprocess.run(["ldd", path], capture_output=True, text=True, env=clean).stdout
    return re.findall(r"(?:=> )?(/\S+) \(0x", text)


def files():
    """Paths in the image and the files they hold."""
    python = os.path.realpath("/usr/bin/python3")
    found = {"/usr/bin/" + os.path.basename(python): python, "/usr/bin/python3": python}
    for program in PROGRAMS:
        path = shutil.which(program, path="/usr/bin:/bin:/usr/sbin:/sbin")
        if path:
            found[os.path.join("/usr/bin", program)] = os.path.realpath(path)
    standard = sysconfig.get_path("stdlib", vars={"base": "/usr", "installed_base": "/usr"})
    for directory, _, names in os.walk(standard):
        if "__pycache__" in directory or "/test" in directory:
            continue
        for name in names:
            path = os.path.join(directory, name)
            found[path] = os.path.realpath(path)
    binaries = [path for path in found.values() if ".so" in path or os.access(path, os.X_OK)]
    # What PyTorch wants of the system, beside what its packages bring.
    extra = ["libstdc++.so.6", "libgcc_s.so.1", "libgomp.so.1", "libz.so.1", "libnuma.so.1",
             "libpthread.so.0", "libdl.so.2", "librt.so.1", "libm.so.6", "libutil.so.1"]
    multiarch = "/usr/lib/" + sysconfig.get_config_var("MULTIARCH")
    binaries += [os.path.join(multiarch, name) for name in extra if os.path.exists(os.path.join(multiarch, name))]
    for binary in binaries:
        for library in [binary] * (binary.startswith(multiarch)) + libraries(binary):
            if not DRIVER.search(library):
                found.setdefault(re.sub("^/lib", "/usr/lib", library), os.path.realpath(library))
    return found


def linker_cache(found):
    """The linker's cache of these files."""
    with tempfile.TemporaryDirectory() as root:
        for name, path in found.items():
            if ".so" in name:
                os.makedirs(os.path.dirname(root + name), exist_ok=True)
                shutil.copy(path, root + name)
        os.makedirs(root + "/etc")
        os.symlink("usr/lib", root + "/lib")
        subprocess.run(["ldconfig", "-X", "-r", root, "/usr/lib/" + sysconfig.get_config_var("MULTIARCH")], check=True)
        with open(root + "/etc/ld.so.cache", "rb") as file:
            return file.read()


def layer():
    """The image's one layer, an uncompressed tar archive."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.GNU_FORMAT) as archive:
        def add(name, kind=tarfile.REGTYPE, link="", content=b"", mode=0o755):
            entry = tarfile.TarInfo(name.lstrip("/"))
            entry.type, entry.linkname, entry.mode, entry.size = kind, link, mode, len(content)
            archive.addfile(entry, io.BytesIO(content))

        for directory in ["usr", "usr/bin", "usr/lib", "usr/lib64", "etc", "tmp", "proc", "sys", "dev", "run", "root", "home", "var", "opt"]:
            add(directory, tarfile.DIRTYPE)
        for name in ["bin", "lib", "lib64"]:
            add(name, tarfile.SYMTYPE, "usr/" + name)
        add("sbin", tarfile.SYMTYPE, "usr/bin")
        add("bin/sh", tarfile.SYMTYPE, "bash")
        # The library directory of the driver's files goes by this.
        add("etc/debian_version", content=b"gpu test\n", mode=0o644)
        add("etc/ld.so.conf", content=b"/usr/lib/x86_64-linux-gnu\n", mode=0o644)
        found = files()
        add("etc/ld.so.cache", content=linker_cache(found), mode=0o644)
        for name, path in sorted(found.items()):
            with open(path, "rb") as file:
                add(name, content=file.read())
        if len(sys.argv) > 2:
            for directory in ["usr/local", "usr/local/cuda", "usr/local/cuda/compat"]:
                add(directory, tarfile.DIRTYPE)
            name = "libcuda.so." + sys.argv[3]
            with open(sys.argv[2], "rb") as file:
                add("usr/local/cuda/compat/" + name, content=file.read())
            add("usr/local/cuda/compat/libcuda.so.1", tarfile.SYMTYPE, name)
    return data.getvalue()


def main():
    layout = sys.argv[1]
    blobs = os.path.join(layout, "blobs", "sha256")
    os.makedirs(blobs, exist_ok=True)

    def blob(content, media_type):
        digest = hashlib.sha256(content).hexdigest()
        with open(os.path.join(blobs, digest), "wb") as file:
            file.write(content)
        return {"mediaType": media_type, "digest": "sha256:" + digest, "size": len(content)}

    vendor = "application/vnd.oci.image."
    tar = blob(layer(), vendor + "layer.v1.tar")
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ENVIRONMENT, "WorkingDir": "/tmp"},
        "rootfs": {"type": "layers", "diff_ids": [tar["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": vendor + "manifest.v1+json",
        "config": blob(json.dumps(config).encode(), vendor + "config.v1+json"),
        "layers": [tar],
    }
    index = {"schemaVersion": 2, "manifests": [blob(json.dumps(manifest).encode(), manifest["mediaType"])]}
    with open(os.path.join(layout, "index.json"), "w") as file:
        json.dump(index, file)
    with open(os.path.join(layout, "oci-layout"), "w") as file:
        json.dump({"imageLayoutVersion": "1.0.0"}, file)


main()
