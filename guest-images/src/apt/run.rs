//! Runs apt with the private configuration.

use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use super::archive::Archive;
use super::{Deb, Freshness, Request, Suite};
use crate::cache::write_atomically;
use crate::{Error, Progress, Result};

/// A private apt configuration on disk.
pub(super) struct PrivateApt {
    home: PathBuf,
    config: PathBuf,
    suite: Suite,
}

impl PrivateApt {
    /// Writes the configuration of `suite` below `home`.
    pub(super) fn prepare(home: &Path, suite: Suite) -> Result<Self> {
        for name in [
            "etc",
            "state/lists/partial",
            "archives/partial",
            "none/partial",
            "log",
        ] {
            let dir = home.join(name);
            fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
        }
        let config = home.join("etc/apt.conf");
        let home_text = home
            .to_str()
            .filter(|text| !text.contains(['"', '\n', '\\']));
        let home_text = home_text.ok_or_else(|| {
            Error::malformed(
                format!("cache folder {}", home.display()),
                "its path cannot be written in apt's configuration",
            )
        })?;
        write_atomically(&config, configuration(home_text, suite).as_bytes())?;
        let status = home.join("state/status");
        fs::write(&status, b"").map_err(Error::io("write", &status))?;
        Ok(Self {
            home: home.to_owned(),
            config,
            suite,
        })
    }

    /// Fetches the package lists if there are none or new ones are wanted; says whether it did.
    pub(super) fn update_lists(
        &self,
        freshness: Freshness,
        progress: &dyn Progress,
    ) -> Result<bool> {
        let stamp = self.home.join("state/updated");
        let age = age_of(&stamp);
        let fresh_enough = match freshness {
            Freshness::Cached => age.is_some(),
            // The requests of one job need the lists once.
            Freshness::Refresh => age.is_some_and(|age| age < ONE_JOB),
        };
        if fresh_enough {
            return Ok(false);
        }
        let archive = Archive::of_this_machine()?;
        let sources = self.home.join("etc/private.sources");
        write_atomically(&sources, sources_text(&archive, self.suite).as_bytes())?;
        progress.step(&format!(
            "fetching the package lists of {}",
            self.suite.name()
        ));
        let mut command = self.command();
        // Without this, apt-get update succeeds although a list could not be fetched.
        command.args(["-o", "APT::Update::Error-Mode=any", "update"]);
        let result = run_with_progress("apt-get update", &mut command, progress);
        progress.done();
        result.map_err(|error| match error {
            Error::ToolFailed { detail, .. } => Error::ArchiveUnreachable {
                suite: self.suite.name(),
                detail,
            },
            error => error,
        })?;
        fs::write(&stamp, b"").map_err(Error::io("write", &stamp))?;
        Ok(true)
    }

    /// Downloads packages, all of them checked against the signed lists by apt.
    pub(super) fn download(
        &self,
        request: Request,
        packages: &[&str],
        progress: &dyn Progress,
    ) -> Result<Vec<Deb>> {
        let archives = self.home.join("archives");
        let command_with = |options: &[&str], folder: &Path| {
            let mut command = self.command();
            command.arg("-t").arg(self.suite.name()).args(options);
            match request {
                Request::Exact => command.arg("download"),
                Request::Closure => command.args(["--no-install-recommends", "install"]),
            };
            // `apt-get download` writes to the current folder.
            command.arg("--").args(packages).current_dir(folder);
            command
        };

        // Packages that are there already are not listed, so this looks where there are none.
        let none = self.home.join("none");
        let place = format!("Dir::Cache::archives={}", none.display());
        let mut command = command_with(&["-o", &place, "--print-uris"], &none);
        let listing = run("apt-get", "apt", &mut command).map_err(|error| self.explain(error))?;
        let debs = listing
            .lines()
            .filter_map(|line| parse_uri_line(line).transpose())
            .map(|item| item.and_then(|item| item.into_deb(&archives)))
            .collect::<Result<Vec<Deb>>>()?;
        if debs.is_empty() {
            return Err(Error::malformed(
                "apt-get --print-uris",
                format!("names no package for {}", packages.join(" ")),
            ));
        }

        let what = match debs.as_slice() {
            [deb] => deb.name.clone(),
            debs => format!("{} packages", debs.len()),
        };
        progress.step(&format!("fetching {what} of {}", self.suite.name()));
        let mut command = command_with(&["--download-only", "--yes"], &archives);
        let result = run_with_progress("apt-get", &mut command, progress);
        progress.done();
        result.map_err(|error| self.explain(error))?;
        for deb in &debs {
            if !deb.path.is_file() {
                return Err(Error::malformed(
                    deb.path.display().to_string(),
                    "apt-get did not leave it there",
                ));
            }
        }
        Ok(debs)
    }

    fn command(&self) -> Command {
        let mut command = Command::new("apt-get");
        command
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command.arg("-c").arg(&self.config).arg("-qq");
        // apt's README.progress-reporting.
        command.args(["-o", "APT::Status-Fd=1"]);
        command
    }

    /// Gives apt's "no such package" its own error.
    fn explain(&self, error: Error) -> Error {
        if let Error::ToolFailed { detail, .. } = &error
            && let Some(package) = missing_package(detail)
        {
            return Error::PackageNotFound {
                suite: self.suite.name(),
                package: package.to_owned(),
            };
        }
        error
    }
}

/// Lists that were fetched less than this ago are the newest.
const ONE_JOB: Duration = Duration::from_secs(60);

/// How long ago a file was written; `None` if there is none.
fn age_of(path: &Path) -> Option<Duration> {
    let modified = fs::metadata(path).and_then(|data| data.modified()).ok()?;
    // A clock that was set back makes it older than it can be.
    Some(modified.elapsed().unwrap_or(Duration::MAX))
}

/// The private configuration. It is read after the machine's own (apt.conf(5)), so it keeps what
/// that says about proxies and overrules what it says about places; the machine's hooks are
/// removed because they would act on the machine's own state.
fn configuration(home: &str, suite: Suite) -> String {
    format!(
        r#"// Written by ringside: packages of {suite}.
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
#clear APT::Default-Release;
Dir::State "{home}/state";
Dir::State::lists "{home}/state/lists";
Dir::State::status "{home}/state/status";
Dir::State::extended_states "{home}/state/extended_states";
Dir::Cache "{home}";
Dir::Cache::archives "{home}/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Log "{home}/log";
Dir::Etc::sourcelist "{home}/etc/private.sources";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Get::AllowUnauthenticated "false";
APT::Keep-Downloaded-Packages "true";
APT::Sandbox::User "root";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
// Lists are signed with SHA-256; without this --print-uris shows MD5.
Acquire::ForceHash "SHA256";
Acquire::Retries "3";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
"#,
        suite = suite.name(),
    )
}

fn sources_text(archive: &Archive, suite: Suite) -> String {
    let mut text = format!(
        "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\nArchitectures: amd64\n\
         Targets: Packages\nPDiffs: no\n",
        archive.uri,
        suite.sources(),
    );
    if let Some(signed_by) = &archive.signed_by {
        text.push_str(&format!("Signed-By: {signed_by}\n"));
    }
    text
}

/// One package in the output of `apt-get --print-uris`.
#[derive(Debug, PartialEq, Eq)]
struct UriLine<'a> {
    file: &'a str,
    sha256: &'a str,
}

/// `'uri' file_name size SHA256:hash`; other lines are not for us.
fn parse_uri_line(line: &str) -> Result<Option<UriLine<'_>>> {
    let Some(rest) = line.strip_prefix('\'') else {
        return Ok(None);
    };
    let parsed = rest.split_once("' ").and_then(|(_, rest)| {
        let mut words = rest.split_whitespace();
        let file = words.next()?;
        let _size = words.next()?;
        let sha256 = words.next()?.strip_prefix("SHA256:")?;
        let plain = !file.contains('/') && file.ends_with(".deb");
        plain.then_some(UriLine { file, sha256 })
    });
    match parsed {
        Some(line) => Ok(Some(line)),
        None => Err(Error::malformed(
            "apt-get --print-uris",
            format!("unexpected line: {line}"),
        )),
    }
}

impl UriLine<'_> {
    /// The file is `name_version_arch.deb`, with `%3a` for the colon of a version's epoch.
    fn into_deb(self, archives: &Path) -> Result<Deb> {
        let mut parts = self.file.split('_');
        match (parts.next(), parts.next(), parts.next()) {
            (Some(name), Some(version), Some(_)) => Ok(Deb {
                name: name.to_owned(),
                version: version.replace("%3a", ":"),
                sha256: self.sha256.to_owned(),
                path: archives.join(self.file),
            }),
            _ => Err(Error::malformed(self.file, "not a package's file name")),
        }
    }
}

/// The package that apt could not find, if that is what it complains about.
fn missing_package(detail: &str) -> Option<&str> {
    for prefix in [
        "Unable to locate package ",
        "Can't find a source to download version",
    ] {
        if let Some((_, rest)) = detail.split_once(prefix) {
            return rest.split([' ', ';']).next();
        }
    }
    let (_, rest) = detail.split_once("Package '")?;
    let (name, rest) = rest.split_once('\'')?;
    rest.starts_with(" has no installation candidate")
        .then_some(name)
}

/// Runs a program to its end and returns its standard output.
pub(crate) fn run(
    tool: &'static str,
    package: &'static str,
    command: &mut Command,
) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| spawn_error(tool, package, error))?;
    check(tool, output.status, &output.stderr)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs apt-get and passes on the percentages that it reports.
fn run_with_progress(tool: &str, command: &mut Command, progress: &dyn Progress) -> Result<()> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| spawn_error("apt-get", "apt", error))?;
    let stderr = child.stderr.take();
    let errors = thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut stderr) = stderr {
            // What could be read until then is all that there is to show.
            let _ = stderr.read_to_end(&mut text);
        }
        text
    });
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines().map_while(io::Result::ok) {
            if let Some(percent) = parse_status(&line) {
                progress.percent(percent);
            }
        }
    }
    let status = child
        .wait()
        .map_err(|error| spawn_error("apt-get", "apt", error))?;
    check(tool, status, &errors.join().unwrap_or_default())
}

/// `dlstatus:item:percent:text`
fn parse_status(line: &str) -> Option<u8> {
    let mut fields = line.strip_prefix("dlstatus:")?.split(':');
    let percent = fields.nth(1)?;
    percent.split('.').next()?.parse().ok()
}

fn spawn_error(tool: &'static str, package: &'static str, error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::NotFound {
        Error::ToolMissing { tool, package }
    } else {
        Error::ToolFailed {
            tool: tool.to_owned(),
            detail: error.to_string(),
        }
    }
}

fn check(tool: &str, status: ExitStatus, stderr: &[u8]) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(stderr);
    let mut lines: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("E: ").or(line.strip_prefix("dpkg-deb: ")))
        .collect();
    if lines.is_empty() {
        lines = text.lines().collect();
    }
    let detail = match lines.is_empty() {
        true => status.to_string(),
        false => lines.join("; "),
    };
    Err(Error::ToolFailed {
        tool: tool.to_owned(),
        detail,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uri_lines() {
        let line = "'http://a.example/pool/f/fio_3.33-3+b1_amd64.deb' fio_1%3a3.33-3+b1_amd64.deb 70 SHA256:ab";
        let parsed = parse_uri_line(line).unwrap().unwrap();
        let deb = parsed.into_deb(Path::new("/c")).unwrap();
        assert_eq!(deb.name, "fio");
        assert_eq!(deb.version, "1:3.33-3+b1");
        assert_eq!(deb.sha256, "ab");
        assert_eq!(deb.path, Path::new("/c/fio_1%3a3.33-3+b1_amd64.deb"));
        assert_eq!(parse_uri_line("Reading package lists...").unwrap(), None);
        assert!(parse_uri_line("'http://a.example/x' ../x_1_a.deb 1 SHA256:ab").is_err());
        assert!(parse_uri_line("'http://a.example/x' x_1_a.deb 1 MD5Sum:ab").is_err());
        assert!(parse_uri_line("'").is_err());
    }

    #[test]
    fn status_lines() {
        assert_eq!(
            parse_status("dlstatus:3:45.6789:Retrieving file 3 of 7"),
            Some(45)
        );
        assert_eq!(parse_status("pmstatus:x:1:y"), None);
        assert_eq!(parse_status("dlstatus:3"), None);
    }

    #[test]
    fn missing_packages_are_recognised() {
        assert_eq!(
            missing_package("Unable to locate package nosuch"),
            Some("nosuch")
        );
        let virtual_only = "Package 'awk' has no installation candidate";
        assert_eq!(missing_package(virtual_only), Some("awk"));
        assert_eq!(missing_package("Failed to fetch x"), None);
    }

    #[test]
    fn sources_name_base_and_backports() {
        let archive = Archive {
            uri: "http://a.example/debian".into(),
            signed_by: Some("/k.gpg".into()),
        };
        let text = sources_text(&archive, Suite::TrixieBackports);
        assert!(text.contains("Suites: trixie trixie-backports\n"));
        assert!(text.ends_with("Signed-By: /k.gpg\n"));
    }

    #[test]
    fn errors_are_one_line() {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "echo 'W: x' >&2; echo 'E: first' >&2; echo 'E: second' >&2; exit 100",
        ]);
        let error = run("sh", "dash", &mut command).unwrap_err();
        assert_eq!(error.to_string(), "`sh` failed: first; second");
        let mut command = Command::new("/nonexistent/apt-get");
        let error = run("apt-get", "apt", &mut command).unwrap_err();
        assert!(matches!(error, Error::ToolMissing { .. }));
    }
}
