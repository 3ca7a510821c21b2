//! Copies files to and from the host.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::protocol::{FRAME_HEADER, Malformed, Message};
use crate::serve::WRITE;
use crate::sys;

/// Writes a file. A regular file appears under its name when it is complete and not before;
/// devices and other special files are written in place.
pub fn put(connection: &mut File, path: &[u8], mode: u32, size: u64) -> io::Result<()> {
    let path = Path::new(OsStr::from_bytes(path));
    let mut target = Target::open(path)?;
    Message::Ready.write_to(connection)?;
    let mut received = 0;
    // After a failed write the rest is read and dropped, so that the host, which may be writing,
    // gets to read the error.
    let mut failed = None;
    loop {
        match Message::read_from(connection)? {
            Some(Message::Data(data)) => {
                received += data.len() as u64;
                if failed.is_none() {
                    failed = target.file.write_all(&data).err();
                }
            }
            Some(Message::End) => break,
            Some(_) => return Err(Malformed("file data expected").into()),
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
    if let Some(error) = failed {
        return Err(error);
    }
    if received != size {
        return Err(io::Error::other(format!(
            "{received} bytes came instead of {size}"
        )));
    }
    target.commit(path, mode)?;
    Message::Done.write_to(connection)
}

struct Target {
    file: File,
    /// The name until the file is complete; it is removed if that never happens.
    temporary: Option<PathBuf>,
}

impl Target {
    fn open(path: &Path) -> io::Result<Self> {
        match fs::metadata(path) {
            Ok(data) if data.is_dir() => Err(io::Error::from_raw_os_error(sys::EISDIR)),
            Ok(data) if !data.is_file() => Ok(Self {
                file: File::options().write(true).open(path)?,
                temporary: None,
            }),
            _ => {
                static COUNTER: AtomicU64 = AtomicU64::new(0);
                let count = COUNTER.fetch_add(1, Ordering::Relaxed);
                let mut name = path.as_os_str().to_owned();
                name.push(format!(".part-{}-{count}", process::id()));
                let name = PathBuf::from(name);
                let file = File::options().write(true).create_new(true).open(&name)?;
                Ok(Self {
                    file,
                    temporary: Some(name),
                })
            }
        }
    }

    fn commit(&mut self, path: &Path, mode: u32) -> io::Result<()> {
        if let Some(temporary) = &self.temporary {
            self.file
                .set_permissions(Permissions::from_mode(mode & 0o7777))?;
            fs::rename(temporary, path)?;
            self.temporary = None;
        }
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // There is nothing more to do about a file that cannot be removed.
            let _ = fs::remove_file(temporary);
        }
    }
}

/// Reads a file to its end, which for files of the kernel is not where their size says.
pub fn get(connection: &mut File, path: &[u8]) -> io::Result<()> {
    let mut file = File::open(OsStr::from_bytes(path))?;
    let data = file.metadata()?;
    if data.is_dir() {
        return Err(io::Error::from_raw_os_error(sys::EISDIR));
    }
    let info = Message::FileInfo {
        mode: data.permissions().mode() & 0o7777,
        size: data.len(),
    };
    info.write_to(connection)?;
    let mut buffer = vec![0; WRITE - FRAME_HEADER];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Message::End.write_to(connection),
            Ok(count) => Message::Data(buffer[..count].to_vec()).write_to(connection)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
