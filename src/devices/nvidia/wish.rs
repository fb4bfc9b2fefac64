//! What a container is to have of NVIDIA's, as variables say it (behaviour reference, section 18.1): those of the job or of
//! `enroot.conf`, even empty ones, before those of the container.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::NvidiaError;
use super::require::Requirement;
use crate::request::Environment;

/// Longest text of a variable that is repeated to the user.
const MAX_SHOWN: usize = 200;

/// Whose variable it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The job's or the site's.
    Job,
    /// The image's, or what is laid over it for this container.
    Container,
}

/// `NVIDIA_VISIBLE_DEVICES`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Visible {
    /// Unset, empty, `void`: nothing at all.
    Nothing,
    /// `none`: the driver, without a GPU.
    DriverOnly,
    /// A list; `all` may be one of it.
    Devices(Vec<String>),
}

/// `NVIDIA_DRIVER_CAPABILITIES`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// CUDA and OpenCL.
    pub compute: bool,
    /// 32-bit programs.
    pub compat32: bool,
    /// X11.
    pub display: bool,
    /// OpenGL and Vulkan.
    pub graphics: bool,
    /// `nvidia-smi` and NVML.
    pub utility: bool,
    /// Video codecs.
    pub video: bool,
}

/// `NVIDIA_IMEX_CHANNELS`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Channels {
    /// All that the host has, for containers with `compute`.
    All,
    /// These.
    Listed(Vec<String>),
}

/// Everything that the variables say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// Which GPUs.
    pub visible: Visible,
    /// Who says so.
    pub source: Source,
    /// Which parts of the driver.
    pub capabilities: Capabilities,
    /// What driver and GPUs have to be.
    pub requirements: Vec<Requirement>,
    /// Capabilities of all divided GPUs: `config`, `monitor`.
    pub mig_capabilities: Vec<&'static str>,
    /// Memory of other nodes.
    pub channels: Channels,
    /// `NVIDIA_GDS=enabled`: GPUDirect Storage.
    pub storage: bool,
    /// `NVIDIA_GDRCOPY=enabled`.
    pub gdrcopy: bool,
    /// `NVIDIA_NVSWITCH=enabled`.
    pub nvswitch: bool,
    /// `CUDA_MPS_PIPE_DIRECTORY`.
    pub mps_directory: String,
}

struct Variables<'a> {
    job: &'a Environment,
    container: &'a Environment,
}

impl Variables<'_> {
    fn get(&self, name: &str) -> Option<(String, Source)> {
        let found = self.job.get(name).map(|value| (value, Source::Job));
        let (value, source) = found.or_else(|| Some((self.container.get(name)?, Source::Container)))?;
        Some((String::from_utf8_lossy(value).into_owned(), source))
    }

    fn is(&self, name: &str, wanted: &str) -> bool {
        self.get(name).is_some_and(|(value, _)| value == wanted)
    }
}

/// Which GPUs are wanted, and who says so.
pub fn visible(job: &Environment, container: &Environment) -> (Visible, Source) {
    let (value, source) =
        Variables { job, container }.get("NVIDIA_VISIBLE_DEVICES").unwrap_or((String::new(), Source::Container));
    let visible = match value.trim() {
        "" | "void" => Visible::Nothing,
        "none" => Visible::DriverOnly,
        list => Visible::Devices(words(list)),
    };
    (visible, source)
}

impl Wish {
    /// Understands the variables: of the job (what runs on the host for the container has them), of the container.
    pub fn read(job: &Environment, container: &Environment) -> Result<Self, NvidiaError> {
        let variables = Variables { job, container };
        let text = |name: &str| variables.get(name).map(|(value, _)| value).unwrap_or_default();
        let (visible, source) = visible(job, container);
        let disabled = !text("NVIDIA_DISABLE_REQUIRE").is_empty();
        let channels = words(&text("NVIDIA_IMEX_CHANNELS"));
        let mps_directory = text("CUDA_MPS_PIPE_DIRECTORY");
        Ok(Self {
            visible,
            source,
            capabilities: Capabilities::parse(&text("NVIDIA_DRIVER_CAPABILITIES"))?,
            requirements: if disabled { Vec::new() } else { requirements(job, container)? },
            mig_capabilities: [("config", "NVIDIA_MIG_CONFIG_DEVICES"), ("monitor", "NVIDIA_MIG_MONITOR_DEVICES")]
                .into_iter()
                .filter_map(|(capability, name)| variables.is(name, "all").then_some(capability))
                .collect(),
            channels: match channels.is_empty() || channels.iter().any(|channel| channel == "all") {
                true => Channels::All,
                false => Channels::Listed(channels),
            },
            storage: variables.is("NVIDIA_GDS", "enabled"),
            gdrcopy: variables.is("NVIDIA_GDRCOPY", "enabled"),
            nvswitch: variables.is("NVIDIA_NVSWITCH", "enabled"),
            mps_directory: match mps_directory.starts_with('/') {
                true => mps_directory,
                false => "/tmp/nvidia-mps".into(),
            },
        })
    }
}

impl Capabilities {
    /// All that there are.
    const ALL: Self = Self { compute: true, compat32: true, display: true, graphics: true, utility: true, video: true };

    fn parse(text: &str) -> Result<Self, NvidiaError> {
        let mut capabilities = Self::default();
        let words = words(text);
        if words.is_empty() {
            capabilities.utility = true;
        }
        for word in words {
            let capability = match word.as_str() {
                "all" => return Ok(Self::ALL),
                "compute" => &mut capabilities.compute,
                "compat32" => &mut capabilities.compat32,
                "display" => &mut capabilities.display,
                "graphics" => &mut capabilities.graphics,
                "utility" => &mut capabilities.utility,
                "video" => &mut capabilities.video,
                _ => return Err(NvidiaError::UnknownCapability(shown(&word))),
            };
            *capability = true;
        }
        Ok(capabilities)
    }
}

fn requirements(job: &Environment, container: &Environment) -> Result<Vec<Requirement>, NvidiaError> {
    let mut texts = BTreeMap::new();
    for (name, value) in container.iter().chain(job.iter()).filter(|(name, _)| name.starts_with(b"NVIDIA_REQUIRE_")) {
        texts.insert(name, String::from_utf8_lossy(value).into_owned());
    }
    let parse = |(name, text): (&[u8], String)| {
        Requirement::parse(&text).ok_or_else(|| NvidiaError::InvalidRequirement {
            name: shown(&String::from_utf8_lossy(name)),
            text: shown(&text),
        })
    };
    texts.into_iter().map(parse).collect()
}

/// The words of a list, without blanks around them.
fn words(list: &str) -> Vec<String> {
    list.split(',').map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// What a variable says, in one line of bounded length.
pub fn shown(text: &str) -> String {
    let mut line: String = text.chars().take(MAX_SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(MAX_SHOWN).is_some() {
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(job: &[&str], container: &[&str]) -> Result<Wish, String> {
        Wish::read(&job.iter().collect(), &container.iter().collect()).map_err(|error| error.to_string())
    }

    fn devices(list: &[&str]) -> Visible {
        Visible::Devices(list.iter().map(|&word| word.to_owned()).collect())
    }

    #[test]
    fn the_job_comes_before_the_image_even_if_it_says_nothing() {
        let image = ["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"];
        let of_image = wish(&[], &image).unwrap();
        assert_eq!((of_image.visible, of_image.source), (devices(&["all"]), Source::Container));
        for (value, visible) in [
            ("", Visible::Nothing),
            ("void", Visible::Nothing),
            ("none", Visible::DriverOnly),
            ("0,GPU-abc", devices(&["0", "GPU-abc"])),
        ] {
            let of_job = wish(&[&format!("NVIDIA_VISIBLE_DEVICES={value}")], &image).unwrap();
            assert_eq!((of_job.visible, of_job.source), (visible, Source::Job), "{value}");
        }
        assert_eq!(wish(&[], &[]).unwrap().visible, Visible::Nothing);
    }

    #[test]
    fn capabilities() {
        let parse =
            |text: &str| wish(&[&format!("NVIDIA_DRIVER_CAPABILITIES={text}")], &[]).map(|wish| wish.capabilities);
        let utility = Capabilities { utility: true, ..Capabilities::default() };
        assert_eq!(wish(&[], &[]).unwrap().capabilities, utility);
        assert_eq!(parse(""), Ok(utility));
        assert_eq!(parse("compute, utility"), Ok(Capabilities { compute: true, ..utility }));
        assert_eq!(parse("all,whatever"), Ok(Capabilities::ALL));
        for unknown in ["ngx", "Compute", "video,ngx,all"] {
            let word = if unknown.contains("ngx") { "ngx" } else { unknown };
            assert_eq!(parse(unknown), Err(format!("Unknown NVIDIA driver capability: {word}")));
        }
        assert_eq!(parse("a\nb"), Err("Unknown NVIDIA driver capability: a\\nb".into()));
    }

    #[test]
    fn requirements_of_image_and_job() {
        let image = ["NVIDIA_REQUIRE_CUDA=cuda>=13.0", "NVIDIA_REQUIRE_OTHER=driver>=400"];
        let texts = |wish: Wish| wish.requirements.into_iter().map(|one| one.text).collect::<Vec<_>>();
        assert_eq!(texts(wish(&["NVIDIA_REQUIRE_CUDA=cuda>=11.0"], &image).unwrap()), ["cuda>=11.0", "driver>=400"]);
        for value in ["1", "0", "false"] {
            assert_eq!(texts(wish(&[&format!("NVIDIA_DISABLE_REQUIRE={value}")], &image).unwrap()), [""; 0]);
        }
        let error = wish(&["NVIDIA_REQUIRE_X=gpu>1"], &[]).unwrap_err();
        assert!(error.contains("NVIDIA_REQUIRE_X") && error.contains("gpu>1"), "{error}");
        assert!(wish(&["NVIDIA_REQUIRE_X=gpu>1", "NVIDIA_DISABLE_REQUIRE=1"], &[]).is_ok());
    }

    #[test]
    fn the_rest() {
        let wish = wish(
            &["NVIDIA_MIG_MONITOR_DEVICES=all", "NVIDIA_MIG_CONFIG_DEVICES=0", "CUDA_MPS_PIPE_DIRECTORY=/run/mps"],
            &["NVIDIA_IMEX_CHANNELS=0, 3", "NVIDIA_GDS=enabled", "NVIDIA_NVSWITCH=disabled"],
        )
        .unwrap();
        assert_eq!(wish.mig_capabilities, ["monitor"]);
        assert_eq!(wish.channels, Channels::Listed(vec!["0".into(), "3".into()]));
        assert!(wish.storage && !wish.gdrcopy && !wish.nvswitch);
        assert_eq!(wish.mps_directory, "/run/mps");
    }
}
