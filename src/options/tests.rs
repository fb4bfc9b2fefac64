use proptest::prelude::*;

use super::table::TABLE;
use super::*;

fn set(options: &[(OptionId, &str)]) -> Result<Options, OptionError> {
    let mut parsed = Options::default();
    let words: Vec<String> = options.iter().map(|(id, _)| format!("--{}=x", id.name())).collect();
    parsed.note_command_line(words.iter().map(|word| word.as_bytes()));
    for (id, argument) in options {
        parsed.set(*id, argument.as_bytes())?;
    }
    Ok(parsed)
}

fn message(options: &[(OptionId, &str)]) -> String {
    set(options).unwrap_err().to_string()
}

fn environment(options: Options, variables: &[(&str, &str)]) -> Result<Options, FromEnvironmentError> {
    options.with_environment(|name| {
        variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| value.as_bytes().to_vec())
    })
}

#[test]
fn everything_together() {
    let options = set(&[
        (OptionId::Image, "nvcr.io#nvidia/pytorch:24.01-py3"),
        (OptionId::Mounts, "/data:/data:ro"),
        (OptionId::Mounts, "/scratch,/data:/data:ro"),
        (OptionId::Workdir, "/workspace"),
        (OptionId::Env, "LANG,MODE=fast"),
        (OptionId::NoMountHome, ""),
        (OptionId::RemapRoot, ""),
        (OptionId::Writable, ""),
    ])
    .unwrap();
    assert!(options.enabled());
    let Some(ImageSource::Registry { typed, reference }) = &options.image else { panic!("{:?}", options.image) };
    assert_eq!(typed, "nvcr.io#nvidia/pytorch:24.01-py3");
    assert_eq!((&*reference.registry, &*reference.repository), ("nvcr.io", "nvidia/pytorch"));
    assert_eq!(options.mounts.iter().map(|mount| &*mount.source).collect::<Vec<_>>(), ["/data", "/scratch"]);
    assert_eq!(options.workdir.as_deref(), Some("/workspace"));
    assert_eq!(options.env, [ContainerEnv::FromHost("LANG".into()), ContainerEnv::Set("MODE".into(), "fast".into())]);
    assert_eq!((options.mount_home, options.remap_root, options.writable), (Some(false), Some(true), Some(true)));
    assert_eq!(options.merged_list(OptionId::Mounts, true).as_deref(), Some("/data:/data:ro,/scratch,/data:/data:ro"));
    assert_eq!(options.merged_list(OptionId::Env, true), None);
    assert!(options.without_container().is_empty());
}

#[test]
fn empty_arguments_are_refused() {
    for spec in TABLE.iter().filter(|spec| spec.argument.is_some()) {
        assert_eq!(message(&[(spec.id, "")]), format!("--{}: argument required", spec.name()));
    }
}

#[test]
fn text_that_is_no_text_is_refused() {
    let error = Options::default().set(OptionId::Workdir, b"/\xff").unwrap_err();
    assert_eq!(error.to_string(), "--container-workdir: argument is not valid UTF-8");
}

#[test]
fn a_single_value_may_be_repeated_but_not_changed() {
    use OptionId::{Image, Name, Save, Workdir};
    assert!(set(&[(Name, "a:create"), (Name, "a:create")]).is_ok());
    assert_eq!(message(&[(Name, "a"), (Name, "a:exec")]), "--container-name specified multiple times");
    assert_eq!(message(&[(Save, "/a"), (Save, "/b")]), "--container-save specified multiple times");
    assert!(set(&[(Image, "alpine"), (Image, "alpine")]).is_ok());
    assert_eq!(message(&[(Image, "alpine"), (Image, "debian")]), "--container-image specified multiple times");
    assert!(set(&[(Workdir, "/a"), (Workdir, "/a")]).is_ok());
    assert_eq!(message(&[(Workdir, "/a"), (Workdir, "/b")]), "--container-workdir specified multiple times");
}

#[test]
fn opposite_switches_conflict() {
    use OptionId::{Entrypoint, MountHome, NoEntrypoint, NoMountHome, NoRemapRoot, Readonly, RemapRoot, Writable};
    let pairs = [(MountHome, NoMountHome), (RemapRoot, NoRemapRoot), (Writable, Readonly), (Entrypoint, NoEntrypoint)];
    for (yes, no) in pairs {
        let expected = format!("both --{} and --{} were specified", yes.name(), no.name());
        assert_eq!(message(&[(yes, ""), (no, "")]), expected);
        assert_eq!(message(&[(no, ""), (yes, "")]), expected);
        assert!(set(&[(yes, ""), (yes, "")]).is_ok());
    }
}

#[test]
fn malformed_values_are_named() {
    use OptionId::{Device, Env, Image, Mounts, Name, Save, Unshare};
    for (id, argument, expected) in [
        (Image, "ghcr.io/Org/img:1", "--container-image: Invalid image reference: docker://ghcr.io/Org/img:1"),
        (Image, "ubuntu:", "--container-image: Invalid image reference: docker://ubuntu:"),
        (Mounts, "/tmp:", "--container-mounts: invalid format: /tmp:"),
        (Mounts, "/a:/b:r0", "--container-mounts: failed to mount: /a at /b: unknown option \"r0\""),
        (Env, "A,", "--container-env: invalid format: A,"),
        (Env, "A,,B", "--container-env: invalid format: A,,B"),
        (Env, "=x", "--container-env: invalid format: =x"),
        (Name, ":exec", "--container-name: empty name"),
        (Name, "a:b", "--container-name: flag must be \"auto\", \"create\", \"exec\" or \"no_exec\""),
        (Name, "a:auto:x", "--container-name: flag must be \"auto\", \"create\", \"exec\" or \"no_exec\""),
        (Save, "./", "--container-save: target is a directory"),
        (Unshare, "foo", "--container-unshare: unknown namespace 'foo'"),
        (Unshare, "net,foo", "--container-unshare: unknown namespace 'foo'"),
        (Unshare, "net,", "--container-unshare: empty namespace argument"),
        (
            Device,
            "v.com/d=0,gpu",
            "--container-device: \"gpu\" is no device name: it must be VENDOR/CLASS=NAME, as in nvidia.com/gpu=0",
        ),
        (
            Device,
            "v.com/d=-",
            "--container-device: \"v.com/d=-\": the device name \"-\" must begin with a letter or digit",
        ),
    ] {
        assert_eq!(message(&[(id, argument)]), expected);
    }
}

#[test]
fn names_have_a_mode() {
    for (text, name, mode) in [
        ("a", "a", NameMode::Auto),
        ("a:", "a", NameMode::Auto),
        ("a:auto", "a", NameMode::Auto),
        ("a:create", "a", NameMode::Create),
        ("a:exec", "a", NameMode::Exec),
        ("12.0:no_exec", "12.0", NameMode::NoExec),
    ] {
        let options = set(&[(OptionId::Name, text)]).unwrap();
        assert!(options.enabled(), "{text}");
        assert_eq!(options.name, Some(ContainerName { name: name.into(), mode }));
    }
}

#[test]
fn paths_are_images_too() {
    for path in ["./x.sqsh", "/x.sqsh", "../x"] {
        assert_eq!(set(&[(OptionId::Image, path)]).unwrap().image, Some(ImageSource::File(path.into())));
    }
}

#[test]
fn namespaces_add_up() {
    let options = set(&[(OptionId::Unshare, "net"), (OptionId::Unshare, "ipc,net")]).unwrap();
    assert_eq!(options.unshare, Unshare { net: true, ipc: true, uts: false });
    assert_eq!(options.merged_list(OptionId::Unshare, true).as_deref(), Some("net,ipc,net"));
}

#[test]
fn devices_add_up() {
    let shown = |options: &Options| options.devices.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let mut options = set(&[(OptionId::Device, "v.com/d=1"), (OptionId::Device, "v.com/d=0,v.com/d=1")]).unwrap();
    assert_eq!(shown(&options), "v.com/d=1 v.com/d=0");
    options.complete_list(OptionId::Device, b"w.com/x=a,v.com/d=0,v.com/d=1").unwrap();
    assert_eq!(shown(&options), "w.com/x=a v.com/d=0 v.com/d=1");
}

#[test]
fn what_a_script_or_the_environment_says_can_be_overridden() {
    use OptionId::{Image, Mounts, NoRemapRoot, RemapRoot};
    let mut options = Options::default();
    options.note_command_line(
        ["--container-im=b", "--container-mounts", "/b", "--", "--container-image=c"].map(str::as_bytes),
    );
    for (id, text) in [(Image, "a"), (Mounts, "/a"), (RemapRoot, ""), (Image, "b"), (Mounts, "/b"), (NoRemapRoot, "")] {
        options.set(id, text.as_bytes()).unwrap();
    }
    assert_eq!((options.image_text(), options.remap_root), (Some("b"), Some(false)));
    assert_eq!(options.merged_list(Mounts, false).as_deref(), Some("/a,/b"));
    assert_eq!(options.merged_list(Mounts, true), None);
}

#[test]
fn the_whole_list_replaces_its_relayed_end() {
    let mut options = set(&[(OptionId::Mounts, "/b")]).unwrap();
    options.complete_list(OptionId::Mounts, b"/a:/x:ro,/b").unwrap();
    assert_eq!(options.mounts.iter().map(|mount| &*mount.source).collect::<Vec<_>>(), ["/a", "/b"]);
    // Another command's.
    options.complete_list(OptionId::Mounts, b"/a,/c").unwrap();
    assert_eq!(options.mounts.len(), 2);
    options.complete_list(OptionId::Env, b"A,B").unwrap();
    assert!(options.env.is_empty());
}

#[test]
fn of_several_items_for_one_variable_the_last_counts() {
    let env = |texts: &[&str]| set(&texts.iter().map(|text| (OptionId::Env, *text)).collect::<Vec<_>>()).unwrap().env;
    let host = |name: &str| ContainerEnv::FromHost(name.into());
    let fixed = |name: &str, value: &str| ContainerEnv::Set(name.into(), value.into());
    assert_eq!(env(&["A,B,A"]), [host("A"), host("B")]);
    assert_eq!(env(&["A=1,B=,A=2"]), [fixed("A", "2"), fixed("B", "")]);
    assert_eq!(env(&["A=1=2"]), [fixed("A", "1=2")]);
    assert_eq!(env(&["A", "A=1"]), [fixed("A", "1")]);
}

#[test]
fn options_without_a_container_are_listed_as_pyxis_spells_them() {
    let options = set(&[
        (OptionId::Mounts, "/a"),
        (OptionId::Workdir, "/"),
        (OptionId::MountHome, ""),
        (OptionId::NoRemapRoot, ""),
        (OptionId::Readonly, ""),
        (OptionId::Env, "A"),
        (OptionId::Unshare, "net"),
        (OptionId::Device, "v.com/d=0"),
        (OptionId::Save, "/x.sqsh"),
        (OptionId::NoEntrypoint, ""),
        (OptionId::EntrypointLog, ""),
    ])
    .unwrap();
    assert!(!options.enabled());
    assert_eq!(
        options.without_container(),
        [
            "--container-mounts",
            "--container-workdir",
            "--[no-]container-mount-home",
            "--[no-]container-remap-root",
            "--[no-]container-entrypoint",
            "--container-entrypoint-log",
            "--container-readonly",
            "--container-save",
            "--container-device",
        ]
    );
    assert_eq!(set(&[(OptionId::Writable, "")]).unwrap().without_container(), ["--container-writable"]);
    assert!(Options::default().without_container().is_empty());
}

#[test]
fn the_environment_fills_in_what_was_not_given() {
    let options = environment(
        Options::default(),
        &[
            ("PYXIS_CONTAINER_IMAGE", "alpine"),
            ("PYXIS_CONTAINER_MOUNTS", "/a,/b"),
            ("PYXIS_CONTAINER_WORKDIR", "/w"),
            ("PYXIS_CONTAINER_MOUNT_HOME", "yes"),
            ("PYXIS_CONTAINER_REMAP_ROOT", "n"),
            ("PYXIS_CONTAINER_READONLY", "true"),
            ("PYXIS_CONTAINER_ENV", "A,B"),
            ("PYXIS_CONTAINER_ENTRYPOINT_LOG", "0"),
            ("PYXIS_CONTAINER_NAME", ""),
            ("PYXIS_CONTAINER_ENTRYPOINT", "0"),
            ("PYXIS_CONTAINER_SAVE", "x.sqsh"),
            ("PYXIS_CONTAINER_UNSHARE", "net,uts"),
            ("PYXIS_CONTAINER_DEVICE", "v.com/d=0,v.com/d=1"),
        ],
    )
    .unwrap();
    assert!(options.enabled());
    assert_eq!((options.mounts.len(), options.env.len()), (2, 2));
    assert_eq!(options.workdir.as_deref(), Some("/w"));
    assert_eq!((options.mount_home, options.remap_root, options.writable), (Some(true), Some(false), Some(false)));
    assert_eq!((options.name, options.save.as_deref(), options.entrypoint), (None, Some("x.sqsh"), Some(false)));
    assert_eq!(options.unshare, Unshare { net: true, ipc: false, uts: true });
    assert_eq!(options.devices.len(), 2);
}

#[test]
fn an_option_beats_its_variable_as_a_whole() {
    let given = set(&[
        (OptionId::Image, "alpine"),
        (OptionId::Mounts, "/a"),
        (OptionId::Workdir, "/w"),
        (OptionId::Env, "A"),
        (OptionId::NoMountHome, ""),
        (OptionId::Readonly, ""),
    ])
    .unwrap();
    let options = environment(
        given.clone(),
        &[
            ("PYXIS_CONTAINER_IMAGE", "Not/A Reference"),
            ("PYXIS_CONTAINER_MOUNTS", "/b"),
            ("PYXIS_CONTAINER_WORKDIR", "/x"),
            ("PYXIS_CONTAINER_ENV", "B"),
            ("PYXIS_CONTAINER_MOUNT_HOME", "1"),
            ("PYXIS_CONTAINER_WRITABLE", "1"),
        ],
    );
    assert_eq!(options, Ok(given));
}

#[test]
fn unknown_words_for_switches_are_ignored_and_writable_goes_before_readonly() {
    let options = environment(
        Options::default(),
        &[
            ("PYXIS_CONTAINER_MOUNT_HOME", "TRUE"),
            ("PYXIS_CONTAINER_REMAP_ROOT", "maybe"),
            ("PYXIS_CONTAINER_WRITABLE", "1"),
            ("PYXIS_CONTAINER_READONLY", "1"),
        ],
    )
    .unwrap();
    assert_eq!((options.mount_home, options.remap_root, options.writable), (None, None, Some(true)));
}

#[test]
fn a_variable_that_cannot_be_used_is_an_error() {
    for (variable, value, expected) in [
        ("PYXIS_CONTAINER_MOUNTS", "/a,", "--container-mounts: invalid format: /a,"),
        ("PYXIS_CONTAINER_NAME", ":a", "--container-name: empty name"),
        ("PYXIS_CONTAINER_SAVE", "/", "--container-save: target is a directory"),
        ("PYXIS_CONTAINER_UNSHARE", "x", "--container-unshare: unknown namespace 'x'"),
        (
            "PYXIS_CONTAINER_DEVICE",
            "x",
            "--container-device: \"x\" is no device name: it must be VENDOR/CLASS=NAME, as in nvidia.com/gpu=0",
        ),
    ] {
        let error = environment(Options::default(), &[(variable, value)]).unwrap_err();
        assert_eq!(error.to_string(), format!("{expected} (from the environment variable {variable})"));
    }
}

proptest! {
    #[test]
    fn any_argument_is_judged(index in 0..18_i32, argument in proptest::collection::vec(any::<u8>(), 0..200)) {
        let id = OptionId::from_value(index).unwrap();
        let mut options = Options::default();
        let first = options.set(id, &argument);
        // Slurm may call twice.
        if first.is_ok() {
            prop_assert!(options.set(id, &argument).is_ok());
        }
    }

    #[test]
    fn variables_round_trip(items in proptest::collection::btree_map("[A-Z_]{1,9}", "[^,\\x00]{0,9}", 1..6)) {
        let text = items.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(",");
        let options = set(&[(OptionId::Env, &text)]).unwrap();
        let expected: Vec<_> =
            items.into_iter().map(|(name, value)| ContainerEnv::Set(name, value)).collect();
        prop_assert_eq!(options.env, expected);
    }
}
