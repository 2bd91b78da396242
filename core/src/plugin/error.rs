//! Why a plugin's library or its configuration was refused: one variant per reason, each with what
//! was found and what is accepted.

use std::path::PathBuf;

use sidelane_abi as abi;

/// A plugin that could not be loaded. Nothing of it is in use.
#[derive(Debug, thiserror::Error)]
#[error("plugin {}: {fault}", library.display())]
pub struct LoadError {
    /// The plugin's name in the configuration; empty from [`super::inspect`].
    pub plugin: String,
    /// The library, as configured.
    pub library: PathBuf,
    /// Why.
    pub fault: LoadFault,
}

/// Why a plugin could not be loaded.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LoadFault {
    /// No such file.
    #[error("no such file; build the plugin, or correct `library`")]
    NotFound,
    /// Not a regular file.
    #[error("is not a regular file")]
    NotAFile,
    /// The file could not be read.
    #[error("cannot be read: {0}")]
    Unreadable(String),
    /// Larger than [`super::loader::LIBRARY_BYTES_MAX`].
    #[error(
        "has {found} bytes, more than the {max} that a plugin may have; strip its debug information"
    )]
    TooLarge {
        /// The file's size.
        found: u64,
        /// The limit.
        max: u64,
    },
    /// Someone else could replace the code.
    #[error("{what} {problem}; tighten its permissions, or pin the library's `sha256`")]
    Writable {
        /// The file or its directory.
        what: String,
        /// Who could write.
        problem: String,
    },
    /// Not the pinned content.
    #[error("has sha256 {found}, the configuration pins {expected}")]
    HashMismatch {
        /// In hexadecimal.
        expected: String,
        /// In hexadecimal.
        found: String,
    },
    /// No ELF file at all.
    #[error("is not an ELF shared library ({found})")]
    NotElf {
        /// What it looks like.
        found: &'static str,
    },
    /// Cut short.
    #[error("is truncated: {part} ends at byte {end}, the file has {size}")]
    Truncated {
        /// What lies beyond the end.
        part: &'static str,
        /// Where it should end.
        end: u64,
        /// The file's size.
        size: u64,
    },
    /// ELF, but inconsistent.
    #[error("is a damaged ELF file: {0}")]
    Damaged(String),
    /// For another processor.
    #[error("is built for {found}, this host is {expected}")]
    WrongMachine {
        /// The file's machine.
        found: String,
        /// This program's.
        expected: &'static str,
    },
    /// An executable or an object file.
    #[error("is {found}, not a shared library; build it as `cdylib` (Rust) or with `-shared` (C)")]
    NotShared {
        /// What it is.
        found: &'static str,
    },
    /// A library, but no plugin.
    #[error("exports no `{}`: it is no Sidelane plugin", abi::STAMP_SYMBOL)]
    NoStamp,
    /// The stamp's symbol does not lead to a stamp.
    #[error("exports a `{symbol}` that is no stamp: {0}", symbol = abi::STAMP_SYMBOL)]
    BadStamp(&'static str),
    /// A function that every plugin must have is missing.
    #[error("has no function in its vtable's slot `{0}`, which must be filled")]
    NullSlot(&'static str),
    /// Another major version.
    #[error(
        "speaks plugin ABI {found}, this host speaks {}.{}; rebuild it with the sidelane-plugin of this host's release",
        abi::ABI_MAJOR,
        abi::ABI_MINOR
    )]
    AbiMajor {
        /// The plugin's major.
        found: u32,
    },
    /// A newer minor version.
    #[error(
        "speaks plugin ABI {}.{found}, newer than this host's {}.{}; update the host, or rebuild the plugin with an older sidelane-plugin",
        abi::ABI_MAJOR,
        abi::ABI_MAJOR,
        abi::ABI_MINOR
    )]
    AbiMinorNewer {
        /// The plugin's minor.
        found: u32,
    },
    /// A minor version that is too old.
    #[error(
        "speaks plugin ABI {}.{found}, this host speaks {}.{} to {}.{}; rebuild it with the sidelane-plugin of this host's release",
        abi::ABI_MAJOR,
        abi::ABI_MAJOR,
        abi::ABI_MINOR_OLDEST,
        abi::ABI_MAJOR,
        abi::ABI_MINOR
    )]
    AbiMinorOlder {
        /// The plugin's minor.
        found: u32,
    },
    /// A panic in it would end the process.
    #[error(
        "is compiled with panic = \"abort\": a panic in it would end the whole process; rebuild it with panic = \"unwind\""
    )]
    PanicAbort,
    /// A panic strategy this host does not know.
    #[error("says panic strategy {found}; known are 1 (unwind), 2 (abort, refused) and 3 (none)")]
    PanicUnknown {
        /// As stamped.
        found: u32,
    },
    /// No place for the private copy.
    #[error("cannot be copied to a private place: {0}")]
    PrivateCopy(String),
    /// The dynamic linker refused it.
    #[error("cannot be loaded: {0}")]
    Dlopen(String),
    /// What the library says of its types is not acceptable.
    #[error("declares unusable protocol types: {0}")]
    TypesInvalid(String),
    /// `protocol_types` names what the library does not serve.
    #[error("does not serve protocol type {missing} (serves: {served})")]
    TypeMissing {
        /// As configured.
        missing: String,
        /// What it serves.
        served: String,
    },
    /// Two plugins serve one type.
    #[error(
        "protocol type {protocol_type} is served by plugin \"{first}\" already, \"{second}\" cannot serve it too; restrict one of them with `protocol_types`"
    )]
    TypeConflict {
        /// The type.
        protocol_type: String,
        /// Who serves it.
        first: String,
        /// Who wants to.
        second: String,
    },
    /// Two entries of one name.
    #[error("plugin name \"{0}\" is used twice")]
    NameConflict(String),
    /// The plugin refused its configuration.
    #[error("refused its configuration{}: {}", at_path(.0), .0.message)]
    Refused(ConfigFault),
    /// Too many distinct libraries were loaded since the start.
    #[error(
        "is one more than the {max} distinct libraries that may be loaded in a process's life; restart to load more"
    )]
    GenerationsFull {
        /// The limit.
        max: usize,
    },
}

/// What a plugin says against a configuration block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigFault {
    /// One line.
    pub message: String,
    /// Dotted path within the block, or empty.
    pub path: String,
}

impl std::fmt::Display for ConfigFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.path.is_empty() {
            f.write_str(&self.message)
        } else {
            write!(f, "{}: {}", self.path, self.message)
        }
    }
}

impl std::error::Error for ConfigFault {}

fn at_path(fault: &ConfigFault) -> String {
    if fault.path.is_empty() { String::new() } else { format!(" at {}", fault.path) }
}
