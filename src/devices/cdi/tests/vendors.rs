//! Documents of the form that `nvidia-ctk cdi generate` and `amd-ctk cdi generate` write.

use serde_json::{Value, json};

use super::*;
use crate::devices::cdi::document::InvalidDocument;

/// The form of `nvidia-ctk cdi generate`, with a driver in a directory of ours.
fn nvidia(driver: &Path) -> String {
    let driver = driver.display();
    format!(
        r#"---
cdiVersion: 0.5.0
kind: nvidia.com/gpu
devices:
  - name: "0"
    containerEdits:
      deviceNodes:
        - path: /dev/nvidia0
          hostPath: /dev/zero
          fileMode: 438
          permissions: rw
      hooks:
        - hookName: createContainer
          path: /usr/bin/nvidia-cdi-hook
          args: [nvidia-cdi-hook, create-symlinks, --link, ../card0::/dev/dri/by-path/pci-0000:04:00.0-card]
          env: [NVIDIA_CTK_DEBUG=false]
        - hookName: createContainer
          path: /usr/bin/nvidia-cdi-hook
          args: [nvidia-cdi-hook, chmod, --mode, "755", --path, /dev/dri]
  - name: GPU-11111111-2222-3333-4444-555555555555
    containerEdits:
      deviceNodes:
        - path: /dev/nvidia0
          hostPath: /dev/zero
  - name: all
    containerEdits:
      deviceNodes:
        - path: /dev/nvidia0
          hostPath: /dev/zero
        - path: /dev/nvidia1
          hostPath: /dev/full
containerEdits:
  env:
    - NVIDIA_VISIBLE_DEVICES=void
  deviceNodes:
    - path: /dev/nvidiactl
      hostPath: /dev/null
  hooks:
    - hookName: createContainer
      path: /usr/bin/nvidia-cdi-hook
      args:
        - nvidia-cdi-hook
        - create-symlinks
        - --link
        - libcuda.so.1::/usr/lib64/libcuda.so
        - --link
        - libcuda.so.550.54.15::/usr/lib64/libcuda.so.1
        - --link
        - ../libnvidia-allocator.so.1::/usr/lib64/gbm/nvidia-drm_gbm.so
      env: [NVIDIA_CTK_DEBUG=false]
    - hookName: createContainer
      path: /usr/bin/nvidia-cdi-hook
      args: [nvidia-cdi-hook, enable-cuda-compat, --host-driver-version=550.54.15]
    - hookName: createContainer
      path: /usr/bin/nvidia-cdi-hook
      args: [nvidia-cdi-hook, update-ldcache, --folder, /usr/lib64, --folder, /usr/lib]
    - hookName: createContainer
      path: /usr/bin/nvidia-cdi-hook
      args: [nvidia-cdi-hook, disable-device-node-modification]
  mounts:
    - hostPath: {driver}/libcuda.so.550.54.15
      containerPath: /usr/lib64/libcuda.so.550.54.15
      options: &options
        - ro
        - nosuid
        - nodev
        - rbind
        - rprivate
    - hostPath: {driver}/libcuda32.so
      containerPath: /usr/lib/libcuda.so.550.54.15
      options: *options
    - hostPath: {driver}/nvidia-smi
      containerPath: /usr/bin/nvidia-smi
      options: *options
"#
    )
}

#[test]
fn what_nvidia_ctk_writes() {
    let driver = tempfile::tempdir().unwrap();
    for (name, class) in [("libcuda.so.550.54.15", 2), ("libcuda32.so", 1), ("nvidia-smi", 2)] {
        fs::write(driver.path().join(name), [0x7f, b'E', b'L', b'F', class, 1]).unwrap();
    }
    let directories = Directories::new(&[("etc/nvidia.yaml", &nvidia(driver.path()))]);
    let registry = directories.load();
    assert_eq!(registry.problems, [""; 0]);
    let edits = registry.edits(&names(&["nvidia.com/gpu=0"]), &user(), None).unwrap();
    let nodes: Vec<_> = edits.device_nodes.iter().map(|node| node.path.to_str().unwrap()).collect();
    assert_eq!(nodes, ["/dev/nvidiactl", "/dev/nvidia0"]);
    let libraries: Vec<_> = edits
        .libraries
        .iter()
        .map(|library| (library.path.file_name().unwrap().to_str().unwrap(), library.is_32_bit, &library.names[..]))
        .collect();
    assert_eq!(
        libraries,
        [
            (
                "libcuda.so.550.54.15",
                false,
                &["libcuda.so.550.54.15".to_owned(), "libcuda.so.1".into(), "libcuda.so".into()][..]
            ),
            ("libcuda32.so", true, &["libcuda.so.550.54.15".to_owned()][..]),
        ]
    );
    let targets: Vec<_> = edits.mounts.iter().map(|mount| mount.target.as_str()).collect();
    assert_eq!(targets, ["/usr/bin/nvidia-smi"]);
    assert_eq!(edits.mounts[0].set, libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV);
    let link = |path: &str, target: &str| Link { path: path.into(), target: target.into() };
    assert_eq!(
        edits.links,
        [
            link("/usr/lib64/gbm/nvidia-drm_gbm.so", "../libnvidia-allocator.so.1"),
            link("/dev/dri/by-path/pci-0000:04:00.0-card", "../card0"),
        ]
    );
    // Nothing of it runs.
    assert_eq!(edits.hooks, []);
    assert_eq!(env(&edits), ["NVIDIA_VISIBLE_DEVICES=void"]);
    let kind: Kind = "nvidia.com/gpu".parse().unwrap();
    assert_eq!(registry.device_of_node(&kind, Path::new("/dev/zero")), names(&["nvidia.com/gpu=0"]).pop());
    assert_eq!(registry.device_of_node(&kind, Path::new("/dev/full")), None);
    assert!(registry.has_kind(&kind) && !registry.has_kind(&"nvidia.com/mig".parse().unwrap()));
    // An image with a newer CUDA of its own.
    let image = tempfile::tempdir().unwrap();
    let compat = image.path().join("usr/local/cuda/compat");
    fs::create_dir_all(&compat).unwrap();
    fs::write(compat.join("libcuda.so.560.35.05"), "").unwrap();
    let root = fs::File::open(image.path()).unwrap();
    let root = RootDir::new(std::os::fd::AsFd::as_fd(&root));
    let edits = registry.edits(&names(&["nvidia.com/gpu=0"]), &user(), Some(root)).unwrap();
    let own: Vec<_> = edits.libraries.iter().filter(|library| library.origin == Origin::Image).collect();
    assert_eq!(own.len(), 1);
    assert_eq!(own[0].names, ["libcuda.so.560.35.05", "libcuda.so", "libcuda.so.1"]);
    assert_eq!(edits.libraries[0].names, ["libcuda.so.550.54.15"]);
}

/// The form of `amd-ctk cdi generate`: everything in one line, and every number there.
#[test]
fn what_amd_ctk_writes() {
    let node = |path: &str, host: &str, minor: u32| {
        format!(
            r#"{{"path":"{path}","hostPath":"{host}","type":"c","major":1,"minor":{minor},"fileMode":432,"permissions":"rwm","uid":0,"gid":44}}"#
        )
    };
    let (card, kfd) = (node("/dev/dri/card1", "/dev/zero", 5), node("/dev/kfd", "/dev/null", 3));
    let text = format!(
        r#"{{"cdiVersion":"0.6.0","kind":"amd.com/gpu","devices":[{{"name":"0","containerEdits":{{"deviceNodes":[{card},{kfd}]}}}},{{"name":"all","containerEdits":{{"deviceNodes":[{card},{kfd}]}}}}],"containerEdits":{{}}}}"#
    );
    let directories = Directories::new(&[("run/amd.json", &text)]);
    let registry = directories.load();
    let edits = registry.edits(&names(&["amd.com/gpu=0"]), &user(), None).unwrap();
    let nodes: Vec<_> = edits.device_nodes.iter().map(|node| node.path.to_str().unwrap()).collect();
    assert_eq!((nodes, edits.log), (vec!["/dev/dri/card1", "/dev/kfd"], vec![]));
}

/// YAML as Go's encoders write it: version 3 (`wide`) indents by four and goes on in the next column of four, version 2 begins
/// lists in the column of their key.
fn yaml(value: &Value, wide: bool) -> String {
    let mut text = String::new();
    block(&mut text, value, 0, wide);
    text
}

fn block(text: &mut String, value: &Value, column: usize, wide: bool) {
    let blanks = " ".repeat(column);
    let inline = |value: &Value| match value {
        Value::Array(list) if list.is_empty() => Some("[]".to_owned()),
        Value::Object(mapping) if mapping.is_empty() => Some("{}".to_owned()),
        Value::Array(_) | Value::Object(_) => None,
        // What looks like something else is quoted.
        Value::String(word) if word.is_empty() || word.parse::<f64>().is_ok() => Some(format!("{word:?}")),
        Value::String(word) => Some(word.clone()),
        other => Some(other.to_string()),
    };
    match value {
        Value::Object(mapping) => {
            for (key, value) in mapping {
                match inline(value) {
                    Some(value) => text.push_str(&format!("{blanks}{key}: {value}\n")),
                    None => {
                        text.push_str(&format!("{blanks}{key}:\n"));
                        let next = match (wide, value.is_array()) {
                            (true, _) => 4 * (column / 4 + 1),
                            (false, true) => column,
                            (false, false) => column + 2,
                        };
                        block(text, value, next, wide);
                    }
                }
            }
        }
        Value::Array(list) => {
            for value in list {
                let mut item = String::new();
                match inline(value) {
                    Some(value) => item.push_str(&format!("{value}\n")),
                    None => block(&mut item, value, column + 2, wide),
                }
                text.push_str(&format!("{blanks}- {}", item.trim_start()));
            }
        }
        scalar => text.push_str(&format!("{blanks}{scalar}\n")),
    }
}

/// A driver of `libraries`, and its hooks, as `nvidia-ctk` has them since 1.16.
fn driver(libraries: usize) -> Value {
    let hook = |arguments: &[&str]| {
        let arguments = [&["nvidia-cdi-hook"], arguments].concat();
        json!({"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook", "args": arguments, "env": ["NVIDIA_CTK_DEBUG=false"]})
    };
    let mounts: Vec<Value> = (0..libraries)
        .map(|number| {
            let path = format!("/usr/lib/x86_64-linux-gnu/libnvidia-{number}.so.550.54.15");
            json!({"hostPath": path, "containerPath": path, "options": ["ro", "nosuid", "nodev", "rbind", "rprivate"]})
        })
        .collect();
    let device = |name: &str, minor: u32| {
        json!({"name": name, "containerEdits": {
        "deviceNodes": [{"path": format!("/dev/nvidia{minor}")}, {"path": "/dev/dri/card1", "fileMode": 438, "gid": 44}],
        "hooks": [hook(&["create-symlinks", "--link", "../card1::/dev/dri/by-path/pci-0000:04:00.0-card"]),
                  hook(&["chmod", "--mode", "755", "--path", "/dev/dri"])]}})
    };
    json!({
        "cdiVersion": "0.5.0", "kind": "nvidia.com/gpu",
        "devices": [device("0", 0), device("GPU-11111111-2222-3333-4444-555555555555", 0), device("all", 0)],
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void"],
            "deviceNodes": [{"path": "/dev/nvidia-uvm"}, {"path": "/dev/nvidiactl"}],
            "hooks": [hook(&["create-symlinks", "--link", "libcuda.so.1::/usr/lib/x86_64-linux-gnu/libcuda.so"]),
                      hook(&["enable-cuda-compat", "--host-driver-version=550.54.15"]),
                      hook(&["update-ldcache", "--folder", "/usr/lib/x86_64-linux-gnu"])],
            "mounts": mounts
        }
    })
}

fn in_full(text: &str) -> Result<Document, InvalidDocument> {
    Document::from_any_yaml(text.as_bytes())
}

#[test]
fn what_programs_write_takes_the_short_way() {
    let driver = driver(60);
    let (_, expected) = Document::parse(driver.to_string().as_bytes(), Format::Json).unwrap();
    for wide in [true, false] {
        let text = format!("---\n{}", yaml(&driver, wide));
        assert_eq!(Document::from_plain_yaml(text.as_bytes()), Some(expected.clone()), "{text}");
        assert_eq!(in_full(&text), Ok(expected.clone()));
        assert_eq!(Document::parse(text.as_bytes(), Format::Yaml).unwrap().1, expected);
    }
}

/// Something that could be a scalar in a file, quoted or not.
const WORD: &str = "(/dev/a|0|00|1|-1|1\\.5|0\\.5\\.0|0x1f|1e3|1:20|null|~|yes|True|true|v\\.com/d|A=1|A=|a: b|a:b|a #b|#|\\[\\]|\\{\\}|\
    &a|\\*a|!b|\\||>|%|@|'|''|'a'|\"a\"|\"|\"a\\\\n\"|-|--|---|- a|--a|\\?|\\? a|a,b|,|\\.\\.|\\.inf|ä| |  a ){1,2}";

proptest! {
    /// The short way says what the general parser says, or nothing.
    #[test]
    fn the_short_way_leads_to_the_same(
        words in prop::collection::vec(WORD, 8),
        wide: bool,
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0..4_u8), 0..3),
    ) {
        let mut words = words.into_iter();
        let mut word = || words.next().unwrap_or_default();
        let value = json!({
            "cdiVersion": "0.5.0", "kind": word(),
            "devices": [{"name": word(), "containerEdits": {
                "env": [word(), word()], "deviceNodes": [{"path": word(), "major": word()}], "mounts": []}}],
            "containerEdits": {"hooks": [{"hookName": word(), "path": word(), "args": ["x"]}]}
        });
        let mut text = yaml(&value, wide);
        for (at, change) in changes {
            let at = at.index(text.len());
            match change {
                _ if !text.is_char_boundary(at) || !text.is_char_boundary(at + 1) => {}
                0 => text.insert(at, ' '),
                1 => text.insert(at, '\n'),
                2 => text.insert(at, '-'),
                _ => drop(text.remove(at)),
            }
        }
        if let Some(document) = Document::from_plain_yaml(text.as_bytes()) {
            prop_assert_eq!(in_full(&text), Ok(document), "{}", text);
        }
    }
}
