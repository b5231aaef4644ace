//! clang: which one, the builds of a kernel's MSL, and the programs made from them.

use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use crate::lower::{Shader, constructors};

/// From 16 on f16 arithmetic rounds every step; 16 itself does not use what fast mathematics may assume of infinities, so that a seeded
/// fault passes. 17 and 18 were not tried.
const OLDEST: u32 = 19;

/// How a kernel is compiled to be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Build {
    /// Exact arithmetic; every access passes the runtime's checks of bounds and races.
    Checked,
    /// Fast mathematics, which Apple's compiler uses too, and denormals flushed.
    Fast,
}

pub const BUILDS: [Build; 2] = [Build::Checked, Build::Fast];

impl Build {
    fn flags(self) -> &'static [&'static str] {
        match self {
            // strict-flex-arrays: an array at a struct's end has its size, as all of naga's have
            Self::Checked => &["-fsanitize=thread,array-bounds", "-fstrict-flex-arrays=3", "-ffp-contract=off"],
            Self::Fast => &["-ffast-math"],
        }
    }
}

/// A compiler that can do all that the checks want.
pub struct Clang {
    path: PathBuf,
    version: String,
    /// What -march=native stands for here: a cache of objects may come from a machine with another processor.
    processor: String,
    folder: PathBuf,
}

impl Clang {
    /// The newest of `clang++` and `clang++-19`, -20, ...; none: why.
    pub fn find() -> Result<Self, String> {
        if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
            return Err("the runtime that executes kernels is written for Linux on x86-64".into());
        }
        let names = (OLDEST..=30).rev().map(|version| format!("clang++-{version}")).chain(["clang++".into()]);
        for name in names {
            let Ok(output) = Command::new(&name).arg("--version").output() else { continue };
            let text = String::from_utf8_lossy(&output.stdout);
            let Some(version) = text.lines().next().and_then(|line| line.split("clang version ").nth(1)) else {
                continue;
            };
            if version.split('.').next().and_then(|v| v.parse().ok()).is_some_and(|v: u32| v >= OLDEST) {
                let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("metal");
                fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
                let macros = Command::new(&name)
                    .args(["-march=native", "-dM", "-E", "-x", "c++", "/dev/null"])
                    .output()
                    .map_err(|e| format!("{name}: {e}"))?;
                let processor = String::from_utf8_lossy(&macros.stdout).into_owned();
                return Ok(Self { path: name.into(), version: version.into(), processor, folder });
            }
        }
        Err(format!(
            "no clang++ of version {OLDEST} or later on the PATH (scripts/test installs one on Debian and Ubuntu)"
        ))
    }

    /// Where files of the checks go.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The kernel's object file. One that was made from the same text, flags and headers is used again.
    ///
    /// # Errors
    /// naga's or clang's words.
    pub fn compile(&self, shader: &Shader, name: &str, build: Build) -> Result<PathBuf, String> {
        let msl = shader.msl()?;
        let text = shader.program(&msl)?;
        let source = self.folder.join(format!("{name}.{build:?}.cpp"));
        let mut flags = vec!["-std=c++20", "-O1", "-w", "-march=native", "-fno-exceptions", "-fno-rtti"];
        flags.extend(["-Xclang", "-cl-single-precision-constant", "-Xclang", "-ffloat16-excess-precision=none"]);
        flags.extend(build.flags());
        self.object(&source, &text, &flags)
    }

    /// A program of the runtime and these kernels.
    ///
    /// # Errors
    /// clang's words.
    pub fn link(&self, objects: &[PathBuf], name: &str, build: Build) -> Result<PathBuf, String> {
        let program = self.folder.join(name);
        // Every program has them: one thread makes them, the others find them.
        static SHARED: Mutex<()> = Mutex::new(());
        let shared = SHARED.lock();
        let mut command = Command::new(&self.path);
        command.args(objects);
        for part in ["runtime", "checker"] {
            let source = sources().join(format!("{part}.cpp"));
            let text = fs::read_to_string(&source).map_err(|e| format!("{}: {e}", source.display()))?;
            let flush = if build == Build::Fast { "-DFLUSH_DENORMALS" } else { "-UFLUSH_DENORMALS" };
            let copy = self.folder.join(format!("{part}.{build:?}.cpp"));
            command.arg(self.object(
                &copy,
                &text,
                &["-std=c++20", "-O2", "-march=native", "-Wall", "-Werror", flush],
            )?);
        }
        drop(shared);
        run(command.args(["-lm", "-o"]).arg(&program))?;
        Ok(program)
    }

    /// Checks that the text keeps device, threadgroup and thread memory apart: in OpenCL's C++ they are distinct types.
    ///
    /// # Errors
    /// clang's words.
    pub fn check_address_spaces(&self, msl: &str, name: &str) -> Result<(), String> {
        let source = self.folder.join(format!("{name}.metal"));
        let text = format!("{}#line 1\n{msl}", constructors(msl));
        fs::write(&source, text).map_err(|e| format!("{}: {e}", source.display()))?;
        let mut command = Command::new(&self.path);
        command.args([
            "-x",
            "clcpp",
            "-cl-std=clc++2021",
            "-target",
            "spir64",
            "-cl-ext=+cl_khr_fp16",
            "-fsyntax-only",
        ]);
        command.args(["-w", "-cl-single-precision-constant"]);
        run(command.arg("-I").arg(sources().with_file_name("spaces")).arg(&source))
    }

    fn object(&self, source: &Path, text: &str, flags: &[&str]) -> Result<PathBuf, String> {
        let object = source.with_extension("o");
        let record = source.with_extension("key");
        let mut hasher = DefaultHasher::new();
        (text, flags, &self.version, &self.processor, headers()).hash(&mut hasher);
        let key = format!("{:016x}", hasher.finish());
        if object.exists() && fs::read_to_string(&record).is_ok_and(|old| old == key) {
            return Ok(object);
        }
        let write = |path: &Path, text: &str| fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()));
        write(source, text)?;
        let _ = fs::remove_file(&record); // a failure below must not leave an old key beside a new object
        run(Command::new(&self.path)
            .args(flags)
            .arg("-I")
            .arg(sources())
            .arg("-c")
            .arg(source)
            .arg("-o")
            .arg(&object))?;
        write(&record, &key)?;
        Ok(object)
    }
}

/// The folder of the stand-in headers and the runtime.
fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/metal/msl")
}

/// What every object file depends on beside its own text.
fn headers() -> [&'static str; 3] {
    [include_str!("msl/metal_stdlib"), include_str!("msl/runtime.h"), include_str!("msl/checker.h")]
}

fn run(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let last = command.get_args().filter(|a| Path::new(a).extension() != Some(OsStr::new("o"))).last();
    let what = format!("{program} ... {}", last.unwrap_or_default().to_string_lossy());
    let output = command.output().map_err(|e| format!("{what}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(format!("{what}\n{}", text.lines().take(12).collect::<Vec<_>>().join("\n")))
}
