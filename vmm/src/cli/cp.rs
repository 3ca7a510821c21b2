//! `ringside cp`: copies a file into a guest or out of one.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::exec::connect;
use super::{Done, Failure};
use crate::config::{BadInput, GuestName};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
A path in a guest is written NAME:PATH; one of the two paths must be. A path of the host that has a \
colon in its first part can be written ./PATH. Permission bits are kept.

Examples:
  ringside cp job.fio lab:/tmp/
  ringside cp lab:/proc/interrupts interrupts.txt")]
pub(super) struct CpArgs {
    /// What to copy: PATH or NAME:PATH
    #[arg(value_name = "SOURCE")]
    source: String,

    /// Where to: PATH or NAME:PATH; a folder of the host, or a path that ends in `/`, keeps the name
    #[arg(value_name = "TARGET")]
    target: String,

    /// Seconds to wait for the guest to be started and to boot [default: 10, and
    /// only if it runs already]
    #[arg(short, long, value_name = "SECONDS")]
    wait: Option<u32>,
}

#[derive(Debug, PartialEq, Eq)]
enum Place {
    Host(PathBuf),
    Guest(String, PathBuf),
}

impl Place {
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            Some((name, path)) if name.parse::<GuestName>().is_ok() && !path.is_empty() => {
                Place::Guest(name.to_owned(), path.into())
            }
            _ => Place::Host(text.into()),
        }
    }
}

pub(super) fn main(args: &CpArgs) -> Done {
    match (Place::parse(&args.source), Place::parse(&args.target)) {
        (Place::Host(source), Place::Guest(name, target)) => {
            put(&source, &name, &target, args.wait)
        }
        (Place::Guest(name, source), Place::Host(target)) => {
            get(&name, &source, &target, args.wait)
        }
        (Place::Host(_), Place::Host(_)) => Err(BadInput::new(
            format!("{} {}", args.source, args.target),
            "neither path is in a guest: write one of them as NAME:PATH",
        )
        .into()),
        (Place::Guest(..), Place::Guest(..)) => Err(BadInput::new(
            format!("{} {}", args.source, args.target),
            "both paths are in guests: copy to the host first",
        )
        .into()),
    }
}

/// `target`, with the name of `source` if `target` is a folder.
fn with_name(target: &Path, source: &Path, is_folder: bool) -> Result<PathBuf, BadInput> {
    if !is_folder {
        return Ok(target.to_owned());
    }
    source
        .file_name()
        .map(|name| target.join(name))
        .ok_or_else(|| {
            let source = source.display().to_string();
            BadInput::new(source, "has no file name: give the path of a file")
        })
}

fn ends_in_slash(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(b"/")
}

fn put(source: &Path, name: &str, target: &Path, wait: Option<u32>) -> Done {
    let bad = |problem: String| BadInput::new(source.display().to_string(), problem);
    let metadata = fs::metadata(source).map_err(|error| bad(format!("cannot be read: {error}")))?;
    if !metadata.is_file() {
        return Err(bad("not a file: only files are copied, use tar for folders".into()).into());
    }
    let mut file = File::open(source).map_err(|error| bad(format!("cannot be read: {error}")))?;
    let target = with_name(target, source, ends_in_slash(target))?;
    let mode = metadata.permissions().mode() & 0o7777;
    connect(name, wait)?
        .and_then(|client| client.put(&mut file, metadata.len(), &target, mode))
        .map_err(Failure::other)?;
    Ok(0)
}

fn get(name: &str, source: &Path, target: &Path, wait: Option<u32>) -> Done {
    let target = with_name(target, source, target.is_dir() || ends_in_slash(target))?;
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if !folder.is_dir() {
        let folder = folder.display().to_string();
        return Err(BadInput::new(folder, "no such folder: make it first").into());
    }
    let client = connect(name, wait)?.map_err(Failure::other)?;
    if target.exists() && !target.is_file() {
        // A pipe or a device such as /dev/stdout is written to, not replaced.
        let mut file = File::options().write(true).open(&target)?;
        client.get(source, &mut file).map_err(Failure::other)?;
        return Ok(0);
    }
    // A transfer that breaks leaves no half of a file.
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    let info = client.get(source, &mut file).map_err(Failure::other)?;
    let permissions = fs::Permissions::from_mode(info.mode & 0o777);
    file.as_file().set_permissions(permissions)?;
    file.persist(&target)
        .map_err(|error| io::Error::other(format!("{}: {}", target.display(), error.error)))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_path_has_its_name_before_a_colon() {
        for (text, place) in [
            ("lab:/tmp/x", Place::Guest("lab".into(), "/tmp/x".into())),
            ("lab:a:b", Place::Guest("lab".into(), "a:b".into())),
            ("x", Place::Host("x".into())),
            ("./lab:x", Place::Host("./lab:x".into())),
            ("/a/lab:x", Place::Host("/a/lab:x".into())),
            ("lab:", Place::Host("lab:".into())),
        ] {
            assert_eq!(Place::parse(text), place, "{text}");
        }
    }

    #[test]
    fn a_folder_keeps_the_name() {
        let joined = with_name(Path::new("/tmp/"), Path::new("a/b.txt"), true).unwrap();
        assert_eq!(joined, Path::new("/tmp/b.txt"));
        let kept = with_name(Path::new("c"), Path::new("b.txt"), false).unwrap();
        assert_eq!(kept, Path::new("c"));
        assert!(with_name(Path::new("/tmp"), Path::new("/"), true).is_err());
    }
}
