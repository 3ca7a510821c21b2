//! `ringside image`: guest images made from Debian's packages.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};

use guest_images::apt::Freshness;
use guest_images::{CacheDir, Image, ImageName, Images, progress};

use super::{Done, Failure};
use crate::config::{BadInput, image_name};

#[derive(Debug, clap::Args)]
pub(super) struct ImageArgs {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, clap::Subcommand)]
enum ImageCommand {
    /// Build an image, unless it is there
    Build {
        /// debian-12 (Linux 6.1) or debian-13 (Linux 6.12); with -dpdk after it, also DPDK's testpmd
        image: String,

        /// Build it anew from the archive's newest packages
        #[arg(long)]
        refresh: bool,
    },
    /// List the images that are built
    List,
    /// Print the paths of an image's files: for other programs
    Path {
        /// debian-12 or debian-13
        image: String,

        /// Print one path only: bzimage, vmlinux, initramfs or manifest
        #[arg(long, value_name = "FILE")]
        file: Option<String>,
    },
    /// Remove an image; its packages stay cached
    Rm {
        /// debian-12 or debian-13
        image: String,
    },
}

fn parse(image: &str) -> Result<ImageName, BadInput> {
    image_name(image).map_err(|problem| BadInput::new(image, problem))
}

/// The images of this user's cache folder.
pub(super) fn images() -> Result<Images, Failure> {
    let cache = CacheDir::discover().map_err(Failure::other)?;
    Ok(Images::new(&cache))
}

/// The image, built first if need be.
pub(super) fn ready(name: ImageName, freshness: Freshness) -> Result<Image, Failure> {
    let progress = progress::on_stderr();
    let image = images()?.build(name, freshness, &*progress);
    progress.done();
    image.map_err(Failure::other)
}

pub(super) fn main(args: &ImageArgs) -> Done {
    let mut text = String::new();
    match &args.command {
        ImageCommand::Build { image, refresh } => {
            let freshness = if *refresh {
                Freshness::Refresh
            } else {
                Freshness::Cached
            };
            let image = ready(parse(image)?, freshness)?;
            let _ = writeln!(text, "{}", image.dir.display());
        }
        ImageCommand::List => {
            for image in images()?.list().map_err(Failure::other)? {
                let _ = writeln!(
                    text,
                    "{}  Linux {}  {} MiB  {}",
                    image.name,
                    image.kernel_release,
                    size(&image) >> 20,
                    image.dir.display()
                );
            }
        }
        ImageCommand::Path { image, file } => {
            let image = built(parse(image)?)?;
            let manifest = image.dir.join("manifest.json");
            let files = [
                ("bzimage", &image.bzimage),
                ("vmlinux", &image.vmlinux),
                ("initramfs", &image.initramfs),
                ("manifest", &manifest),
            ];
            match file {
                None => {
                    for (name, path) in files {
                        let _ = writeln!(text, "{name} {}", path.display());
                    }
                }
                Some(wanted) => {
                    let found = files.iter().find(|(name, _)| name == wanted);
                    let (_, path) = found.ok_or_else(|| {
                        BadInput::new(
                            format!("--file {wanted}"),
                            "use bzimage, vmlinux, initramfs or manifest",
                        )
                    })?;
                    let _ = writeln!(text, "{}", path.display());
                }
            }
        }
        ImageCommand::Rm { image } => {
            let name = parse(image)?;
            if !images()?.remove(name).map_err(Failure::other)? {
                return Err(not_built(name).into());
            }
        }
    }
    io::stdout().write_all(text.as_bytes())?;
    Ok(0)
}

fn built(name: ImageName) -> Result<Image, Failure> {
    let image = images()?.open(name).map_err(Failure::other)?;
    Ok(image.ok_or_else(|| not_built(name))?)
}

fn not_built(name: ImageName) -> BadInput {
    BadInput::new(
        name.to_string(),
        format!("there is no such image yet: make it with `ringside image build {name}`"),
    )
}

/// Bytes of all its files.
fn size(image: &Image) -> u64 {
    let Ok(entries) = fs::read_dir(&image.dir) else {
        return 0;
    };
    let sizes = entries.flatten().filter_map(|entry| entry.metadata().ok());
    sizes.map(|metadata| metadata.len()).sum()
}
