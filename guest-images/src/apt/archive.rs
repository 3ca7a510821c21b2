//! Finds the Debian archive that the machine itself uses.
//!
//! Formats: sources.list(5), one-line style and deb822 style.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::run;
use crate::{Error, Result};

/// The main archive of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Archive {
    /// Its address, in any form that apt understands.
    pub(super) uri: String,
    /// What may have signed it: the path of a keyring, fingerprints, or a key itself (several
    /// lines in deb822's continuation form). `None`: all keys that the machine trusts.
    pub(super) signed_by: Option<String>,
}

/// Where Debian's keys are when the sources do not say it (package debian-archive-keyring).
const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.pgp",
    "/usr/share/keyrings/debian-archive-keyring.gpg",
];

/// Suites whose presence tells that an archive is Debian's main one.
const DEBIAN_SUITES: [&str; 12] = [
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
    "sid",
    "oldoldstable",
    "oldstable",
    "stable",
    "testing",
    "unstable",
    "rc-buggy",
];

impl Archive {
    /// Reads the machine's apt sources and takes the first entry for a Debian release.
    pub(super) fn of_this_machine() -> Result<Self> {
        let (list, parts) = source_paths()?;
        let mut files = vec![list.clone()];
        if let Ok(entries) = fs::read_dir(&parts) {
            let mut names: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            names.sort();
            files.extend(names);
        }
        let mut archive = files
            .iter()
            .find_map(|file| find_in_file(file))
            .ok_or_else(|| Error::NoArchive {
                searched: format!("{}, {}", list.display(), parts.display()),
            })?;
        if archive.signed_by.is_none() {
            let keyring = KEYRINGS.iter().find(|path| Path::new(path).is_file());
            archive.signed_by = keyring.map(|path| (*path).to_owned());
        }
        Ok(archive)
    }
}

/// The sources file and the folder of further ones, as apt is configured.
fn source_paths() -> Result<(PathBuf, PathBuf)> {
    let mut command = Command::new("apt-config");
    command.args([
        "shell",
        "LIST",
        "Dir::Etc::sourcelist/f",
        "PARTS",
        "Dir::Etc::sourceparts/d",
    ]);
    let text = run::run("apt-config", "apt", &mut command)?;
    let value = |name: &str| {
        text.lines().find_map(|line| {
            let quoted = line.strip_prefix(name)?.strip_prefix("='")?;
            Some(PathBuf::from(quoted.strip_suffix('\'')?))
        })
    };
    match (value("LIST"), value("PARTS")) {
        (Some(list), Some(parts)) => Ok((list, parts)),
        _ => Err(Error::malformed(
            "apt-config",
            "does not say where the sources are",
        )),
    }
}

fn find_in_file(path: &Path) -> Option<Archive> {
    let parse = match path.extension()?.to_str()? {
        "list" => find_in_one_line,
        "sources" => find_in_deb822,
        _ => return None,
    };
    parse(&fs::read_to_string(path).ok()?)
}

/// `deb [ option=value ... ] uri suite component ...`
fn find_in_one_line(text: &str) -> Option<Archive> {
    text.lines().find_map(|line| {
        let line = line.split('#').next()?.trim();
        let rest = line.strip_prefix("deb")?;
        // Not "deb-src".
        let rest = rest.strip_prefix([' ', '\t'])?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let uri = words.next()?;
        let suite = words.next()?;
        let signed_by = options
            .split_whitespace()
            .find_map(|option| option.strip_prefix("signed-by="))
            .map(|value| value.replace(',', " "));
        let components: Vec<&str> = words.collect();
        is_debian(uri, &[suite], &components).then(|| Archive {
            uri: uri.to_owned(),
            signed_by,
        })
    })
}

/// Stanzas of `Field: value`, divided by empty lines; a value goes on in lines that begin with a
/// blank.
fn find_in_deb822(text: &str) -> Option<Archive> {
    let mut stanza: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            if let Some(archive) = archive_of_stanza(&stanza) {
                return Some(archive);
            }
            stanza.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = stanza.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            stanza.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    None
}

fn archive_of_stanza(stanza: &[(String, String)]) -> Option<Archive> {
    let field = |name: &str| {
        let (_, value) = stanza.iter().find(|(key, _)| key == name)?;
        Some(value.as_str())
    };
    let words = |name: &str| -> Vec<&str> {
        field(name)
            .map(|value| value.split_whitespace().collect())
            .unwrap_or_default()
    };
    if !words("types").contains(&"deb") || field("enabled") == Some("no") {
        return None;
    }
    let uri = words("uris")
        .into_iter()
        .find(|uri| is_debian(uri, &words("suites"), &words("components")))?;
    Some(Archive {
        uri: uri.to_owned(),
        signed_by: field("signed-by").map(str::to_owned),
    })
}

fn is_debian(uri: &str, suites: &[&str], components: &[&str]) -> bool {
    // A compact disc holds one release only; a mirror's other archives have other paths.
    !uri.starts_with("cdrom:")
        && !uri.trim_end_matches('/').ends_with("-security")
        && components.contains(&"main")
        && suites.iter().any(|suite| DEBIAN_SUITES.contains(suite))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(uri: &str, signed_by: Option<&str>) -> Option<Archive> {
        Some(Archive {
            uri: uri.to_owned(),
            signed_by: signed_by.map(str::to_owned),
        })
    }

    #[test]
    fn one_line_style() {
        let text = "# deb http://a.example/debian bookworm main\n\
            deb cdrom:[Debian 12]/ bookworm main\n\
            deb-src http://b.example/debian bookworm main\n\
            deb http://c.example/debian-security bookworm main\n\
            deb [arch=amd64 signed-by=/k.gpg,/l.gpg]\thttp://d.example/debian bookworm main contrib # x\n";
        assert_eq!(
            find_in_one_line(text),
            archive("http://d.example/debian", Some("/k.gpg /l.gpg"))
        );
        let plain = "deb http://e.example/debian/ stable contrib main";
        assert_eq!(
            find_in_one_line(plain),
            archive("http://e.example/debian/", None)
        );
        assert_eq!(find_in_one_line("deb\ndeb x\ndeb [a x y\n"), None);
        assert_eq!(
            find_in_one_line("deb http://f.example/ubuntu jammy main"),
            None
        );
    }

    #[test]
    fn deb822_style() {
        let text = "Types: deb\nURIs: http://a.example/debian\nSuites: bookworm-security\n\
            Components: main\n\n\
            Types: deb\nEnabled: no\nURIs: http://b.example/debian\nSuites: bookworm\nComponents: main\n\n\
            Types: deb deb-src\n# comment\nURIs:\n http://c.example/debian\nSuites: bookworm bookworm-updates\n\
            Components: main\nSigned-By:\n -----BEGIN\n .\n key\n";
        let key = "\n -----BEGIN\n .\n key";
        assert_eq!(
            find_in_deb822(text),
            archive("http://c.example/debian", Some(key))
        );
        assert_eq!(find_in_deb822(""), None);
        assert_eq!(find_in_deb822(" stray\n:\nTypes\n"), None);
    }

    #[test]
    fn other_files_are_not_read() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("x.list.disabled");
        fs::write(&path, "deb http://a.example/debian bookworm main").unwrap();
        assert_eq!(find_in_file(&path), None);
        let path = temp.path().join("x.list");
        fs::write(&path, "deb http://a.example/debian bookworm main").unwrap();
        assert_eq!(
            find_in_file(&path),
            archive("http://a.example/debian", None)
        );
    }
}
