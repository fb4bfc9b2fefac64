//! The plugin's logic against a Slurm made of plain data.

use std::collections::HashMap;

use super::hooks::{init, init_post_opt};
use super::local;
use super::remote::{task_exit, task_init, task_init_privileged, user_init};
use super::state::State;
use super::{Context, Failed, Item, Spank, SpankError};
use crate::options::table::{OptionId, OptionSpec};
use crate::request::Environment;
use crate::task::UserMessage;

/// A process in which the plugin is loaded.
struct Slurm {
    context: Context,
    numbers: HashMap<&'static str, u32>,
    variables: Environment,
    registered: Vec<&'static str>,
    refuse_options: bool,
    said: Vec<UserMessage>,
}

impl Slurm {
    fn new(context: Context) -> Self {
        Self {
            context,
            numbers: HashMap::new(),
            variables: Environment::default(),
            registered: Vec::new(),
            refuse_options: false,
            said: Vec::new(),
        }
    }

    /// A step manager of a step with two tasks.
    fn step() -> Self {
        let mut slurm = Self::new(Context::Remote);
        for (item, value) in [
            (Item::Uid, 1000),
            (Item::Gid, 100),
            (Item::JobId, 7),
            (Item::StepId, 0),
            (Item::LocalTasks, 2),
            (Item::TotalTasks, 4),
        ] {
            slurm.numbers.insert(item.name(), value);
        }
        slurm
    }

    fn number(mut self, item: Item, value: u32) -> Self {
        self.numbers.insert(item.name(), value);
        self
    }

    fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.set(name, value);
        self
    }

    /// What was said since the last call, with a letter for the kind.
    fn said(&mut self) -> Vec<String> {
        self.said
            .drain(..)
            .map(|message| match message {
                UserMessage::Notice(text) => format!("N {text}"),
                UserMessage::Error(text) => format!("E {text}"),
                UserMessage::Log(text) => format!("L {text}"),
            })
            .collect()
    }
}

impl Spank for Slurm {
    fn context(&self) -> Context {
        self.context
    }

    fn register(&mut self, option: &'static OptionSpec) -> Result<(), SpankError> {
        if self.refuse_options {
            return Err(SpankError::Refused("Bad argument".into()));
        }
        self.registered.push(option.name());
        Ok(())
    }

    fn number(&self, item: Item) -> Result<u32, SpankError> {
        self.numbers.get(item.name()).copied().ok_or_else(|| SpankError::Refused("Not available".into()))
    }

    fn groups(&self) -> Result<Vec<u32>, SpankError> {
        Ok(vec![100, 200])
    }

    fn arguments(&self) -> Result<Vec<Vec<u8>>, SpankError> {
        Ok(vec![b"/spool/job7/slurm_script".to_vec()])
    }

    fn environment(&self) -> Result<Environment, SpankError> {
        Ok(self.variables.clone())
    }

    fn variable(&self, name: &str) -> Option<Vec<u8>> {
        self.variables.get(name).map(<[u8]>::to_vec)
    }

    fn set_variable(&mut self, name: &[u8], value: &[u8]) -> Result<(), SpankError> {
        self.variables.set(name, value);
        Ok(())
    }

    fn remove_variable(&mut self, name: &[u8]) -> Result<(), SpankError> {
        self.variables.remove(&String::from_utf8_lossy(name));
        Ok(())
    }

    fn say(&mut self, message: UserMessage) {
        self.said.push(message);
    }
}

/// A step manager up to the fork of its tasks.
fn managed(slurm: &mut Slurm, arguments: &[&str], options: &[(OptionId, &str)]) -> State {
    let mut state = State::default();
    assert_eq!(init(&mut state, slurm, arguments), Ok(()));
    for (id, argument) in options {
        if let Err(error) = state.set_option(*id, argument.as_bytes()) {
            state.fail_later(error.to_string());
        }
    }
    assert_eq!(init_post_opt(&mut state, slurm, arguments), Ok(()));
    user_init(&mut state, slurm);
    assert_eq!(slurm.said(), [""; 0], "nobody would read it");
    state
}

/// One task of it.
fn task(state: &mut State, slurm: &mut Slurm, id: u32) -> (Result<(), Failed>, Vec<String>) {
    slurm.numbers.insert(Item::TaskId.name(), id);
    task_init_privileged(state, slurm);
    let result = task_init(state, slurm);
    (result, slurm.said())
}

#[test]
fn commands_offer_all_options_once() {
    for context in [Context::Local, Context::Allocator] {
        let mut slurm = Slurm::new(context);
        let mut state = State::default();
        assert_eq!(init(&mut state, &mut slurm, &[]), Ok(()));
        assert_eq!(slurm.registered.len(), 18);
        // Listed twice.
        assert_eq!(init(&mut state, &mut slurm, &[]), Ok(()));
        assert_eq!(slurm.registered.len(), 18);
        assert!(slurm.said().is_empty());
    }
}

#[test]
fn without_sbatch_support_only_srun_offers_them() {
    for (context, offered) in [(Context::Local, 18), (Context::Allocator, 0), (Context::Remote, 18)] {
        let mut slurm = Slurm::new(context);
        assert_eq!(init(&mut State::default(), &mut slurm, &["sbatch_support=0"]), Ok(()));
        assert_eq!(slurm.registered.len(), offered);
    }
}

#[test]
fn a_bad_plugstack_line_fails_commands_and_not_nodes() {
    for context in [Context::Local, Context::Allocator] {
        let mut slurm = Slurm::new(context);
        assert_eq!(init(&mut State::default(), &mut slurm, &["bogus"]), Err(Failed));
        assert_eq!(
            slurm.said(),
            ["E pyxis: unknown configuration option: bogus", "E pyxis: failed to parse configuration"]
        );
    }
    let mut slurm = Slurm::new(Context::Slurmd);
    assert_eq!(init(&mut State::default(), &mut slurm, &["bogus"]), Ok(()));
    assert!(slurm.said()[1].starts_with("E pyxis: unknown configuration option: bogus: correct plugstack.conf"));

    let mut slurm = Slurm::step();
    let mut state = managed(&mut slurm, &["bogus"], &[]);
    assert_eq!(task(&mut state, &mut slurm, 0), (Ok(()), vec![]), "a step that asks for nothing");
    let mut state = managed(&mut slurm, &["bogus"], &[(OptionId::Image, "alpine")]);
    let (result, said) = task(&mut state, &mut slurm, 0);
    assert_eq!(result, Err(Failed));
    assert_eq!(said, ["E pyxis: unknown configuration option: bogus (in plugstack.conf of this node)"]);
}

#[test]
fn refused_options_fail_commands_and_tasks() {
    let expected =
        ["E pyxis: couldn't register option container-image: Bad argument", "E pyxis: failed to register arguments"];
    let mut slurm = Slurm::new(Context::Local);
    slurm.refuse_options = true;
    assert_eq!(init(&mut State::default(), &mut slurm, &[]), Err(Failed));
    assert_eq!(slurm.said(), expected);

    let mut slurm = Slurm::step().number(Item::TaskId, 0);
    slurm.refuse_options = true;
    let mut state = State::default();
    assert_eq!(init(&mut state, &mut slurm, &[]), Ok(()));
    assert_eq!(slurm.said(), expected);
    assert_eq!(task_init(&mut state, &mut slurm), Err(Failed));
}

#[test]
fn slurmd_says_what_has_no_effect() {
    let mut slurm = Slurm::new(Context::Slurmd);
    assert_eq!(
        init(&mut State::default(), &mut slurm, &["use_squashfuse=1", "use_enroot_load=1", "importer=/x"]),
        Ok(())
    );
    let said = slurm.said();
    assert!(said[0].starts_with("L pyxis: version v"), "{said:?}");
    assert!(said[1].ends_with("no effect here: use_squashfuse, use_enroot_load"), "{said:?}");
    assert!(slurm.registered.is_empty());
}

#[test]
fn options_without_a_container_are_ignored_aloud_once() {
    let mut slurm = Slurm::new(Context::Local);
    let mut state = State::default();
    init(&mut state, &mut slurm, &[]).unwrap();
    state.set_option(OptionId::Mounts, b"/a").unwrap();
    state.set_option(OptionId::NoMountHome, b"").unwrap();
    assert_eq!(init_post_opt(&mut state, &mut slurm, &[]), Ok(()));
    assert_eq!(
        slurm.said(),
        [
            "E pyxis: ignoring --container-mounts because neither --container-image nor --container-name is set",
            "E pyxis: ignoring --[no-]container-mount-home because neither --container-image nor --container-name is set",
        ]
    );
    assert_eq!(init_post_opt(&mut state, &mut slurm, &[]), Ok(()));
    assert!(slurm.said().is_empty());
}

#[test]
fn a_list_given_twice_reaches_the_node_whole() {
    let mut slurm = Slurm::new(Context::Local).variable("PYXIS_CONTAINER_IMAGE", "alpine");
    let mut state = State::default();
    init(&mut state, &mut slurm, &[]).unwrap();
    for argument in ["/a", "/a", "/b"] {
        state.set_option(OptionId::Mounts, argument.as_bytes()).unwrap();
    }
    assert_eq!(init_post_opt(&mut state, &mut slurm, &[]), Ok(()));
    assert_eq!(slurm.said(), [""; 0]);
    assert_eq!(slurm.variables.get_str("SLURM_PYXIS_CONTAINER_MOUNTS"), Some("/a,/b"));

    // Slurm relays the last argument alone.
    let mut slurm = Slurm::step().variable("SLURM_PYXIS_CONTAINER_MOUNTS", "/a,/b");
    let state = managed(&mut slurm, &[], &[(OptionId::Image, "alpine"), (OptionId::Mounts, "/b")]);
    let request = state.step.as_ref().and_then(|step| step.request()).unwrap();
    assert_eq!(request.mounts.iter().map(|mount| &*mount.source).collect::<Vec<_>>(), ["/a", "/b"]);
    assert_eq!(slurm.variables.get_str("SLURM_PYXIS_CONTAINER_MOUNTS"), None);
}

#[test]
fn components_of_a_heterogeneous_job_ask_for_the_same() {
    use OptionId::{Image, Mounts, Readonly, Workdir};
    type Component<'a> = &'a [(OptionId, &'a str)];
    let judge = |components: &[Component<'_>]| {
        let mut slurm = Slurm::new(Context::Local);
        let mut state = State::default();
        init(&mut state, &mut slurm, &[]).unwrap();
        let typed = |component: &Component<'_>| {
            component.iter().map(|(id, argument)| format!("--{}={argument}", id.name())).collect::<Vec<_>>()
        };
        let line = components.iter().map(typed).collect::<Vec<_>>().join(&":".to_owned());
        state.note_command_line(line.iter().map(|word| word.as_bytes()));
        let mut results = components.iter().map(|component| {
            for (id, argument) in *component {
                state.set_option(*id, argument.as_bytes()).map_err(|error| vec![error.to_string()])?;
            }
            init_post_opt(&mut state, &mut slurm, &[]).map_err(|Failed| slurm.said())
        });
        results.find_map(Result::err)
    };
    let differ = Some(vec![format!("E pyxis: {}", super::state::Conflict::Components)]);
    assert_eq!(judge(&[&[(Image, "a"), (Mounts, "/a")], &[(Image, "a"), (Mounts, "/a")]]), None);
    assert_eq!(judge(&[&[(Image, "a")], &[], &[(Image, "a")]]), None);
    assert_eq!(judge(&[&[], &[(Image, "a")], &[]]), None);
    assert_eq!(judge(&[&[(Image, "a")], &[(Image, "b")]]), differ);
    assert_eq!(judge(&[&[(Image, "a")], &[], &[(Image, "b")]]), differ);
    assert_eq!(judge(&[&[(Image, "a")], &[(Image, "a"), (Mounts, "/a")]]), differ);
    assert_eq!(judge(&[&[(Image, "a")], &[(Readonly, "")]]), differ);
    let twice = Some(vec!["--container-workdir specified multiple times".to_owned()]);
    assert_eq!(judge(&[&[(Image, "a")], &[(Workdir, "/a"), (Workdir, "/b")]]), twice);
}

#[test]
fn a_script_and_the_job_it_is_submitted_from_may_not_disagree() {
    use OptionId::{Env, Image, NoRemapRoot, RemapRoot};
    let judge = |script: (OptionId, &str), inherited: (OptionId, &str), line: &[(OptionId, &str)]| {
        let variable = format!("SLURM_SPANK__SLURM_SPANK_OPTION_pyxis_{}", inherited.0.name().replace('-', "_"));
        let mut slurm = Slurm::new(Context::Allocator).variable(&variable, inherited.1);
        let mut state = State::default();
        init(&mut state, &mut slurm, &[]).unwrap();
        let words: Vec<_> = line.iter().map(|(id, _)| format!("--{}", id.name())).collect();
        state.note_command_line(words.iter().map(|word| word.as_bytes()));
        // In this order, as measured.
        for (id, argument) in [script, inherited].iter().chain(line) {
            state.set_option(*id, argument.as_bytes()).unwrap();
        }
        init_post_opt(&mut state, &mut slurm, &[]).map_err(|Failed| slurm.said().remove(0))
    };
    let error = judge((Image, "a"), (Image, "b"), &[]).unwrap_err();
    assert!(error.starts_with("E pyxis: --container-image specified multiple times: in the batch script"), "{error}");
    assert!(judge((RemapRoot, ""), (NoRemapRoot, ""), &[]).is_err());
    assert_eq!(judge((Image, "a"), (Image, "a"), &[]), Ok(()));
    assert_eq!(judge((Image, "a"), (Image, "b"), &[(Image, "c")]), Ok(()));
    assert_eq!(judge((RemapRoot, ""), (NoRemapRoot, ""), &[(RemapRoot, "")]), Ok(()));
    assert_eq!(judge((Env, "A"), (Env, "B"), &[]), Ok(()));
}

#[test]
fn a_list_given_once_hides_that_of_the_job() {
    let mut slurm = Slurm::new(Context::Local)
        .variable("PYXIS_CONTAINER_IMAGE", "alpine")
        .variable("SLURM_PYXIS_CONTAINER_MOUNTS", "/a,/b");
    let mut state = State::default();
    init(&mut state, &mut slurm, &[]).unwrap();
    state.set_option(OptionId::Mounts, b"/b").unwrap();
    assert_eq!(init_post_opt(&mut state, &mut slurm, &[]), Ok(()));
    assert_eq!(slurm.variables.get_str("SLURM_PYXIS_CONTAINER_MOUNTS"), None, "empty");
}

#[test]
fn slurm_s_own_containers_exclude_ours() {
    let mut slurm = Slurm::new(Context::Local).variable("SLURM_CONTAINER", "/bundle");
    let mut state = State::default();
    init(&mut state, &mut slurm, &[]).unwrap();
    assert_eq!(init_post_opt(&mut state, &mut slurm, &[]), Ok(()));
    state.set_option(OptionId::Image, b"alpine").unwrap();
    assert_eq!(init_post_opt(&mut state, &mut slurm, &[]), Err(Failed));
    assert!(slurm.said()[0].contains("exclude each other"));

    let mut slurm = Slurm::step().variable("SLURM_CONTAINER", "/bundle");
    let mut state = managed(&mut slurm, &[], &[(OptionId::Image, "alpine")]);
    let (result, said) = task(&mut state, &mut slurm, 0);
    assert_eq!(result, Err(Failed));
    assert!(said[0].contains("exclude each other"), "{said:?}");
}

#[test]
fn variables_are_judged_on_the_submit_side() {
    for context in [Context::Local, Context::Allocator] {
        let mut slurm = Slurm::new(context).variable("PYXIS_CONTAINER_IMAGE", "Not/Good");
        let mut state = State::default();
        init(&mut state, &mut slurm, &[]).unwrap();
        assert_eq!(init_post_opt(&mut state, &mut slurm, &[]), Err(Failed));
        assert_eq!(
            slurm.said(),
            ["E pyxis: --container-image: Invalid image reference: docker://Not/Good \
                 (from the environment variable PYXIS_CONTAINER_IMAGE)"]
        );
    }
}

#[test]
fn a_step_that_asks_for_nothing_gets_nothing() {
    let mut slurm = Slurm::step().variable("A", "1");
    let mut state = managed(&mut slurm, &[], &[(OptionId::Mounts, "/a")]);
    assert!(state.step.is_none());
    assert_eq!(task(&mut state, &mut slurm, 0), (Ok(()), vec![]));
    assert_eq!(slurm.variables, ["A=1"].iter().collect());
}

#[test]
fn the_extern_step_is_left_alone() {
    let mut slurm = Slurm::step().number(Item::StepId, 0xffff_fffc).variable("PYXIS_CONTAINER_IMAGE", "Not/Good");
    let state = managed(&mut slurm, &["bogus"], &[]);
    assert!(slurm.registered.is_empty());
    assert!(state.step.is_none() && state.failure().is_none());
}

#[test]
fn what_cannot_be_done_fails_the_task_once_a_node() {
    for (variable, value, reason) in [
        ("PYXIS_CONTAINER_NAME", ":a", "--container-name: empty name"),
        ("PYXIS_CONTAINER_MOUNTS", ":", "--container-mounts: invalid format: :"),
    ] {
        let mut slurm = Slurm::step().variable(variable, value);
        let mut state = managed(&mut slurm, &[], &[]);
        let (result, said) = task(&mut state, &mut slurm, 0);
        assert_eq!(result, Err(Failed));
        assert_eq!(said, [format!("E pyxis: {reason} (from the environment variable {variable})")]);
        let (result, said) = task(&mut state, &mut slurm, 1);
        assert_eq!(result, Err(Failed));
        assert_eq!(said, ["E pyxis: container was not started successfully by another task"]);
    }
}

#[test]
fn a_relayed_option_that_cannot_be_used_fails_the_task() {
    let mut slurm = Slurm::step();
    let mut state = managed(&mut slurm, &[], &[(OptionId::Image, "Not/Good")]);
    let (result, said) = task(&mut state, &mut slurm, 0);
    assert_eq!(result, Err(Failed));
    assert_eq!(said, ["E pyxis: --container-image: Invalid image reference: docker://Not/Good"]);
}

#[test]
fn a_fact_slurm_does_not_know_fails_the_task() {
    let mut slurm = Slurm::step();
    slurm.numbers.remove(Item::Gid.name());
    let mut state = managed(&mut slurm, &[], &[(OptionId::Image, "alpine")]);
    let (result, said) = task(&mut state, &mut slurm, 0);
    assert_eq!(result, Err(Failed));
    assert_eq!(said, ["E pyxis: couldn't get job group id: Not available"]);
}

#[test]
fn the_request_holds_what_slurm_knows() {
    let mut slurm = Slurm::step().number(Item::StepId, 0xffff_fffb).variable("PYXIS_CONTAINER_WORKDIR", "/w");
    let state = managed(&mut slurm, &[], &[(OptionId::Image, "alpine"), (OptionId::RemapRoot, "")]);
    let request = state.step.as_ref().and_then(|step| step.request()).unwrap();
    assert_eq!((request.user.uid, request.user.gid, &*request.user.groups), (1000, 100, &[100, 200][..]));
    let facts = request.step.as_ref().unwrap();
    assert_eq!((facts.job_id, facts.step_id, facts.local_tasks, facts.total_tasks), (7, 0xffff_fffb, 2, 4));
    assert_eq!(request.batch_script.as_deref(), Some("/spool/job7/slurm_script".as_ref()));
    assert_eq!(request.cwd, std::env::current_dir().unwrap());
    assert_eq!((request.workdir.as_deref(), request.remap_root, request.writable), (Some("/w"), Some(true), None));
}

#[test]
fn without_the_executable_every_task_fails_with_its_own_line() {
    let mut slurm = Slurm::step();
    let mut state = managed(&mut slurm, &["executable=/nonexistent/pyxis"], &[(OptionId::Image, "alpine")]);
    let (result, said) = task(&mut state, &mut slurm, 0);
    assert_eq!(result, Err(Failed));
    assert!(said.len() == 1 && said[0].contains("/nonexistent/pyxis"), "{said:?}");
    let (result, said) = task(&mut state, &mut slurm, 1);
    assert_eq!(result, Err(Failed));
    assert_eq!(said, ["E pyxis: container was not started successfully by another task"]);
}

#[test]
fn the_container_is_let_go_when_the_last_task_has_ended() {
    let mut slurm = Slurm::step();
    let mut state = managed(&mut slurm, &[], &[(OptionId::Image, "alpine")]);
    // Each hook comes twice if the plugin is listed twice.
    for (id, alive) in [(1, true), (1, true), (0, false), (0, false)] {
        slurm.numbers.insert(Item::TaskId.name(), id);
        task_exit(&mut state, &mut slurm);
        assert_eq!(state.step.as_ref().is_some_and(|step| step.keeps_container_alive()), alive);
    }
}

#[test]
fn a_batch_job_whose_options_were_lost_does_not_run_on_the_host() {
    let mut sbatch = Slurm::new(Context::Allocator).variable("SLURM_PYXIS_CONTAINER_IMAGE", "of another job");
    let mut state = State::default();
    init(&mut state, &mut sbatch, &[]).unwrap();
    init_post_opt(&mut state, &mut sbatch, &[]).unwrap();
    assert_eq!(sbatch.variables.get_str("SLURM_PYXIS_CONTAINER_IMAGE"), None);
    state.set_option(OptionId::Image, b"alpine").unwrap();
    init_post_opt(&mut state, &mut sbatch, &[]).unwrap();
    assert_eq!(sbatch.variables.get_str("SLURM_PYXIS_CONTAINER_IMAGE"), Some("alpine"));

    let step = |id| Slurm::step().number(Item::StepId, id).variable("SLURM_PYXIS_CONTAINER_IMAGE", "alpine");
    let mut batch = step(0xffff_fffb);
    let mut state = managed(&mut batch, &[], &[]);
    let (result, said) = task(&mut state, &mut batch, 0);
    assert_eq!(result, Err(Failed));
    assert!(said[0].contains("--container-image=alpine: submit the job with --export=ALL"), "{said:?}");
    // A step of that job is asked by itself.
    let mut other = step(0);
    let mut state = managed(&mut other, &[], &[]);
    assert_eq!(task(&mut state, &mut other, 0), (Ok(()), vec![]));
}

/// Arguments of the plugin with which a script stands in for the executable.
fn oracle(directory: &std::path::Path, script: &str) -> [String; 2] {
    let path = directory.join("oracle");
    std::fs::write(&path, script).unwrap();
    ["executable=/bin/sh".into(), format!("config={}", path.display())]
}

#[test]
fn srun_asks_what_a_tag_means_for_several_nodes() {
    let directory = tempfile::tempdir().unwrap();
    let digest = format!("sha256:{}", "0".repeat(64));
    let executable = oracle(directory.path(), &format!("echo \"1 {digest} $(basename $0) $1 $2 $(cat)\""));
    let ask = |nodes: u32, variables: &[(&str, &str)], image: &str, options: &[(OptionId, &str)]| {
        let mut slurm = Slurm::new(Context::Local).number(Item::Nodes, nodes);
        for (name, value) in variables {
            slurm = slurm.variable(name, value);
        }
        let mut state = State::default();
        init(&mut state, &mut slurm, &[&executable[0], &executable[1]]).unwrap();
        state.set_option(OptionId::Image, image.as_bytes()).unwrap();
        for (id, value) in options {
            state.set_option(*id, value.as_bytes()).unwrap();
        }
        init_post_opt(&mut state, &mut slurm, &[]).unwrap();
        local::user_init(&mut state, &mut slurm);
        assert_eq!(slurm.said(), Vec::<String>::new());
        slurm.variables.get("SLURM_PYXIS_CONTAINER_MEANING").map(|value| String::from_utf8_lossy(value).into_owned())
    };
    let answer = |nodes: u32, policy: &str| Some(format!("1 {digest} oracle {nodes} {policy} alpine"));
    assert_eq!(ask(2, &[], "alpine", &[]), answer(2, ""));
    assert_eq!(ask(2, &[], "alpine", &[(OptionId::Pull, "always")]), answer(2, "always"));
    // Components, which may be on other nodes, whenever they are.
    assert_eq!(ask(1, &[("SLURM_HET_SIZE", "2")], "alpine", &[]), answer(0, ""));
    for (nodes, image, pull) in [
        (1, "alpine", "recent"),
        (2, "alpine", "missing"),
        (2, "alpine", "never"),
        (2, &format!("alpine@{digest}"), "always"),
        (2, "/x.sqsh", "always"),
    ] {
        assert_eq!(ask(nodes, &[], image, &[(OptionId::Pull, pull)]), None, "{image} {pull}");
    }
    // What an outer step's srun has learned is of no use.
    let inherited = [("SLURM_PYXIS_CONTAINER_MEANING", "1 sha256:00 old")];
    assert_eq!(ask(1, &inherited, "alpine", &[]).as_deref(), Some(""));
}

#[test]
fn where_nodes_agree_is_passed_on() {
    let directory = tempfile::tempdir().unwrap();
    let place = format!("at 60001 {}", "0f".repeat(16));
    let executable = oracle(directory.path(), &format!("echo '{place}'"));
    let mut slurm = Slurm::new(Context::Local).number(Item::Nodes, 2);
    let mut state = State::default();
    init(&mut state, &mut slurm, &[&executable[0], &executable[1]]).unwrap();
    state.set_option(OptionId::Image, b"alpine").unwrap();
    local::user_init(&mut state, &mut slurm);
    assert_eq!(slurm.variables.get_str("SLURM_PYXIS_CONTAINER_MEANING"), Some(place.as_str()));
}

#[test]
fn an_answer_that_is_none_leaves_it_to_the_nodes() {
    let directory = tempfile::tempdir().unwrap();
    let digest = format!("sha256:{}", "0".repeat(64));
    for script in
        ["exit 1", "echo nonsense", &format!("echo '1 {digest} x'; exit 1"), &format!("printf '1 {digest} x\\033'")]
    {
        let executable = oracle(directory.path(), script);
        let mut slurm = Slurm::new(Context::Local).number(Item::Nodes, 2);
        let mut state = State::default();
        init(&mut state, &mut slurm, &[&executable[0], &executable[1]]).unwrap();
        state.set_option(OptionId::Image, b"alpine").unwrap();
        local::user_init(&mut state, &mut slurm);
        assert_eq!((slurm.said(), slurm.variables), (vec![], Environment::default()), "{script}");
    }
    let mut slurm = Slurm::new(Context::Local).number(Item::Nodes, 2);
    let mut state = State::default();
    init(&mut state, &mut slurm, &["executable=/nonexistent/pyxis"]).unwrap();
    state.set_option(OptionId::Image, b"alpine").unwrap();
    local::user_init(&mut state, &mut slurm);
    assert_eq!((slurm.said(), slurm.variables), (vec![], Environment::default()));
}

#[test]
fn nodes_get_what_srun_has_learned_and_tasks_do_not() {
    let mut slurm = Slurm::step().variable("SLURM_PYXIS_CONTAINER_MEANING", "1 sha256:00 x");
    let state = managed(&mut slurm, &[], &[(OptionId::Image, "alpine")]);
    let request = state.step.as_ref().and_then(|step| step.request()).unwrap();
    assert_eq!(request.meaning.as_deref(), Some("1 sha256:00 x"));
    assert_eq!(slurm.variables.get("SLURM_PYXIS_CONTAINER_MEANING"), None);
}
