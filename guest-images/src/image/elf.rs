//! What the builder reads from ELF files: needed libraries, symbols with versions, module
//! information.

use object::read::elf::{Dyn, ElfFile64, ProgramHeader, Sym};
use object::{Endianness, Object, ObjectSection, SymbolIndex, elf};

use crate::{Error, Result};

/// A symbol of the dynamic symbol table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Symbol {
    pub(super) name: String,
    /// The version that it has or that is asked for.
    pub(super) version: Option<String>,
    /// It is wanted here and defined elsewhere.
    pub(super) undefined: bool,
    /// It stands for data and not for code.
    pub(super) is_data: bool,
}

/// An ELF file of the guest.
pub(super) struct Elf<'a> {
    name: &'a str,
    file: ElfFile64<'a, Endianness>,
}

impl<'a> Elf<'a> {
    /// Reads the headers; `name` is for error messages.
    pub(super) fn parse(name: &'a str, bytes: &'a [u8]) -> Result<Self> {
        let file = ElfFile64::parse(bytes).map_err(|error| malformed(name, error))?;
        Ok(Self { name, file })
    }

    /// The libraries that it needs by name (DT_NEEDED), none for a static program.
    pub(super) fn needed(&self) -> Result<Vec<String>> {
        let (endian, data) = (self.file.endian(), self.file.data());
        let sections = self.file.elf_section_table();
        let dynamic = sections
            .dynamic(endian, data)
            .map_err(|error| self.malformed(error))?;
        let Some((entries, link)) = dynamic else {
            return Ok(Vec::new());
        };
        let strings = sections
            .strings(endian, data, link)
            .map_err(|error| self.malformed(error))?;
        let is_needed = |entry: &&elf::Dyn64<Endianness>| entry.d_tag(endian) == elf::DT_NEEDED;
        let name = |entry: &elf::Dyn64<Endianness>| {
            let name = entry
                .string(endian, strings)
                .map_err(|error| self.malformed(error))?;
            Ok(String::from_utf8_lossy(name).into_owned())
        };
        entries.iter().filter(is_needed).map(name).collect()
    }

    /// The path of the loader that the program asks for (PT_INTERP).
    pub(super) fn interpreter(&self) -> Result<Option<String>> {
        let (endian, data) = (self.file.endian(), self.file.data());
        for header in self.file.elf_program_headers() {
            let found = header
                .interpreter(endian, data)
                .map_err(|error| self.malformed(error))?;
            if let Some(path) = found {
                return Ok(Some(String::from_utf8_lossy(path).into_owned()));
            }
        }
        Ok(None)
    }

    /// The dynamic symbols, without those of the file's own.
    pub(super) fn symbols(&self) -> Result<Vec<Symbol>> {
        let (endian, data) = (self.file.endian(), self.file.data());
        let versions = self
            .file
            .elf_section_table()
            .versions(endian, data)
            .map_err(|error| self.malformed(error))?;
        let table = self.file.elf_dynamic_symbol_table();
        let mut symbols = Vec::new();
        for (index, symbol) in table.symbols().iter().enumerate() {
            if symbol.st_bind() == elf::STB_LOCAL {
                continue;
            }
            let name = symbol
                .name(endian, table.strings())
                .map_err(|error| self.malformed(error))?;
            let version = match &versions {
                Some(versions) => {
                    let index = versions.version_index(endian, SymbolIndex(index)).index();
                    versions
                        .version(index)
                        .map_err(|error| self.malformed(error))?
                }
                None => None,
            };
            symbols.push(Symbol {
                name: String::from_utf8_lossy(name).into_owned(),
                version: version
                    .map(|version| String::from_utf8_lossy(version.name()).into_owned()),
                undefined: symbol.is_undefined(endian),
                is_data: matches!(symbol.st_type(), elf::STT_OBJECT | elf::STT_TLS),
            });
        }
        Ok(symbols)
    }

    /// The `name=value` strings of a kernel module.
    pub(super) fn module_info(&self) -> Result<Vec<(String, String)>> {
        let section = self
            .file
            .section_by_name(".modinfo")
            .ok_or_else(|| Error::malformed(self.name, "is not a kernel module"))?;
        let bytes = section.data().map_err(|error| self.malformed(error))?;
        let text = String::from_utf8_lossy(bytes);
        let pairs = text.split('\0').filter_map(|entry| entry.split_once('='));
        Ok(pairs
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect())
    }

    fn malformed(&self, error: object::Error) -> Error {
        malformed(self.name, error)
    }
}

fn malformed(name: &str, error: object::Error) -> Error {
    Error::malformed(name, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_dynamic_program_names_its_loader_and_libraries() {
        let bytes = fs::read("/bin/ls").unwrap();
        let elf = Elf::parse("ls", &bytes).unwrap();
        assert!(elf.needed().unwrap().iter().any(|name| name == "libc.so.6"));
        assert_eq!(
            elf.interpreter().unwrap().as_deref(),
            Some("/lib64/ld-linux-x86-64.so.2")
        );
        let symbols = elf.symbols().unwrap();
        let exit = symbols.iter().find(|symbol| symbol.name == "exit").unwrap();
        assert!(exit.undefined && !exit.is_data);
        assert!(exit.version.as_deref().unwrap().starts_with("GLIBC_"));
        assert!(elf.module_info().is_err());
    }

    #[test]
    fn the_static_agent_needs_nothing() {
        let elf = Elf::parse("agent", crate::agent::AGENT_BINARY).unwrap();
        assert_eq!(elf.needed().unwrap(), [""; 0]);
        assert_eq!(elf.interpreter().unwrap(), None);
    }

    #[test]
    fn garbage_is_refused() {
        assert!(Elf::parse("x", b"\x7fELF").is_err());
        assert!(Elf::parse("x", b"").is_err());
    }
}
