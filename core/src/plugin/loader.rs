//! From a path to a mapped library: read, judge, copy to a private place, `dlopen`, never close.
//!
//! Knows files and the dynamic linker; calls no function of the plugin. Libraries stay mapped for
//! the life of the process: `dlclose` frees nothing while thread-local destructors pin a library,
//! and crashes when it does (docs/adr/0001-plugin-abi.md).

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use libloading::os::unix as dl;
use rustix::fs::{MemfdFlags, SealFlags};
use sha2::{Digest, Sha256};
use sidelane_abi as abi;

use super::error::LoadFault;
use super::stamp::{self, Stamp};

/// Largest library that is read. Bounds what a wrong path can make us allocate; a plugin with its
/// debug information has some tens of megabytes.
pub const LIBRARY_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// A library's file, whole and judged, not loaded.
pub(super) struct Image {
    bytes: Vec<u8>,
    pub(super) sha256: [u8; 32],
    pub(super) stamp: Stamp,
}

/// A mapped library. There is no way to unmap it.
pub(super) struct Library {
    pub(super) stamp: Stamp,
    pub(super) sha256: [u8; 32],
    /// Invariant: leads to the library's vtable, at least as large as ours, for the rest of the
    /// process's life.
    pub(super) vt: &'static abi::PluginVt,
    pub(super) types: Vec<TypeEntry>,
}

/// A `protocol_type` of a library.
#[derive(Clone, Debug)]
pub(super) struct TypeEntry {
    pub(super) name: String,
    /// One of [`abi::born`].
    pub(super) born: u32,
}

/// Reads the library's file and judges everything that can be judged without loading it.
pub(super) fn read(path: &Path, pinned: Option<&[u8; 32]>) -> Result<Image, LoadFault> {
    let file = open(path)?;
    let metadata = file.metadata().map_err(LoadFault::Unreadable)?;
    if !metadata.is_file() {
        return Err(LoadFault::NotAFile);
    }
    if metadata.len() > LIBRARY_BYTES_MAX {
        return Err(LoadFault::TooLarge { found: metadata.len(), max: LIBRARY_BYTES_MAX });
    }
    // A pinned hash says what the content is, whoever may write it.
    if pinned.is_none() {
        check_writers("the file", &metadata)?;
        check_directory(path)?;
    }
    let mut bytes = Vec::new();
    (&file).take(LIBRARY_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(LoadFault::Unreadable)?;
    if bytes.len() as u64 > LIBRARY_BYTES_MAX {
        return Err(LoadFault::TooLarge { found: bytes.len() as u64, max: LIBRARY_BYTES_MAX });
    }
    let sha256: [u8; 32] = Sha256::digest(&bytes).into();
    if let Some(expected) = pinned
        && *expected != sha256
    {
        let (expected, found) = (hex(expected), hex(&sha256));
        return Err(LoadFault::HashMismatch { expected, found });
    }
    let stamp = stamp::read(&bytes)?;
    Ok(Image { bytes, sha256, stamp })
}

/// Maps the image. The library's constructors run.
pub(super) fn load(image: Image) -> Result<Library, LoadFault> {
    let handle = match PrivateFile::create(&image) {
        Ok(file) => match dlopen(&file.path) {
            Ok(handle) => handle,
            // A directory that is mounted `noexec`, say. What is wrong with the library itself
            // fails again, with the same words.
            Err(_) => dlopen_memory(&image)?,
        },
        Err(error) => {
            tracing::debug!(%error, "no private directory for plugins, using anonymous memory");
            dlopen_memory(&image)?
        }
    };
    let vt = vtable(&handle, &image)?;
    std::mem::forget(handle);
    let types = types(vt)?;
    Ok(Library { stamp: image.stamp, sha256: image.sha256, vt, types })
}

/// Returns `bytes` in lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string does not fail");
        text
    })
}

/// Opens without blocking: the path may lead to a pipe.
fn open(path: &Path) -> Result<File, LoadFault> {
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits();
    OpenOptions::new()
        .read(true)
        .custom_flags(i32::try_from(nonblocking).expect("open flags fit a C int"))
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => LoadFault::NotFound,
            _ => LoadFault::Unreadable(error),
        })
}

fn check_directory(path: &Path) -> Result<(), LoadFault> {
    // The directory that holds the file itself, not the one that holds a link to it.
    let real = path.canonicalize().map_err(LoadFault::Unreadable)?;
    let directory = real.parent().unwrap_or_else(|| Path::new("/"));
    let metadata = directory.metadata().map_err(LoadFault::Unreadable)?;
    check_writers(&format!("the directory {}", directory.display()), &metadata)
}

/// Refuses what others can write: it is code that would run with our rights.
fn check_writers(what: &str, metadata: &std::fs::Metadata) -> Result<(), LoadFault> {
    let us = rustix::process::geteuid().as_raw();
    let our_group = rustix::process::getegid().as_raw();
    let (owner, group, mode) = (metadata.uid(), metadata.gid(), metadata.mode());
    // Many distributions give each user a group of their own, of the same number, and a umask of
    // 002: that group is the user.
    let private_group = group == our_group && group == us;
    let problem = if owner != us && owner != 0 {
        format!("belongs to user {owner}, neither to root nor to user {us} who runs this")
    } else if mode & 0o002 != 0 {
        format!("can be written by anyone (mode {:04o})", mode & 0o7777)
    } else if mode & 0o020 != 0 && !private_group {
        format!("can be written by group {group} (mode {:04o})", mode & 0o7777)
    } else {
        return Ok(());
    };
    Err(LoadFault::Writable { what: what.to_owned(), problem })
}

/// The private copy of a library; removed when dropped, which a mapping does not mind.
struct PrivateFile {
    path: PathBuf,
}

impl PrivateFile {
    /// Copies the image under a name that no library had before: the dynamic linker answers a
    /// path it knows with the code it mapped for it, whatever the file holds.
    fn create(image: &Image) -> io::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let stem: String = image
            .stamp
            .name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' })
            .collect();
        let hash = hex(&image.sha256[..8]);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{stem}-{hash}-{}-{count}.so", std::process::id());
        let path = private_directory()?.join(name);
        let mut file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o700).open(&path)?;
        let this = Self { path };
        write_and_verify(&mut file, &image.bytes)?;
        file.set_permissions(Permissions::from_mode(0o500))?;
        Ok(this)
    }
}

impl Drop for PrivateFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a plugin's private copy");
        }
    }
}

/// Returns our directory for private copies, made where it is missing; refuses one that is not
/// ours alone.
fn private_directory() -> io::Result<PathBuf> {
    let us = rustix::process::geteuid().as_raw();
    let base = std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute() && path.is_dir())
        .unwrap_or_else(std::env::temp_dir);
    let path = base.join(format!("sidelane-plugins-{us}"));
    match DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let metadata = path.symlink_metadata()?;
    if !metadata.is_dir() || metadata.uid() != us || metadata.mode() & 0o077 != 0 {
        let text = format!("{} is not a directory that is ours alone (0700)", path.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(path)
}

fn write_and_verify(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)?;
    file.seek(SeekFrom::Start(0))?;
    let mut chunk = vec![0; 64 * 1024];
    for expected in bytes.chunks(chunk.len()) {
        let found = &mut chunk[..expected.len()];
        file.read_exact(found)?;
        if found != expected {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the copy differs"));
        }
    }
    Ok(())
}

fn dlopen(path: &Path) -> Result<dl::Library, LoadFault> {
    // SAFETY: running the library's constructors is what loading a plugin means; plugins are
    // trusted like the program itself (plugin ABI, "Trust"), and `stamp::read` has seen that this
    // is one, for this machine, and whole.
    unsafe { dl::Library::open(Some(path), dl::RTLD_NOW | dl::RTLD_LOCAL) }.map_err(|error| {
        // libloading's own text says only that dlopen failed.
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        LoadFault::Dlopen(cause.unwrap_or_else(|| error.to_string()))
    })
}

/// Loads from anonymous memory. The descriptor stays open: a second library under the same
/// `/proc/self/fd` number would be answered with this one's code.
fn dlopen_memory(image: &Image) -> Result<dl::Library, LoadFault> {
    let failed = |error: io::Error| LoadFault::PrivateCopy(error.to_string());
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = rustix::fs::memfd_create(image.stamp.name.as_str(), flags)
        .map_err(|error| failed(error.into()))?;
    let mut file = File::from(memory);
    write_and_verify(&mut file, &image.bytes).map_err(failed)?;
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).map_err(|error| failed(error.into()))?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let library = dlopen(&path)?;
    let _stays_open = file.into_raw_fd();
    Ok(library)
}

/// Slots of the vtable that may not be null.
const REQUIRED_SLOTS: [(&str, usize); 5] = [
    ("create", std::mem::offset_of!(abi::PluginVt, create)),
    ("validate_route", std::mem::offset_of!(abi::PluginVt, validate_route)),
    ("deliver", std::mem::offset_of!(abi::PluginVt, deliver)),
    ("drain", std::mem::offset_of!(abi::PluginVt, drain)),
    ("destroy", std::mem::offset_of!(abi::PluginVt, destroy)),
];

/// Follows the mapped stamp to the plugin's functions.
fn vtable(library: &dl::Library, image: &Image) -> Result<&'static abi::PluginVt, LoadFault> {
    // SAFETY: the symbol is a data object with a stamp's magic and size (`stamp::read` on the very
    // bytes that were mapped); it is only used as the address it is.
    let symbol = unsafe { library.get::<*const abi::Stamp>(abi::STAMP_SYMBOL.as_bytes()) }
        .map_err(|error| LoadFault::Dlopen(error.to_string()))?;
    let stamp: *const abi::Stamp = *symbol;
    if stamp.is_null() || !stamp.is_aligned() {
        return Err(LoadFault::BadStamp("it is null or unaligned once loaded"));
    }
    // SAFETY: the address is the mapped stamp's, whose size the file's stamp said; the library is
    // never unmapped.
    let stamp: &'static abi::Stamp = unsafe { &*stamp };
    if stamp.magic != abi::MAGIC || stamp.abi_minor != image.stamp.abi.1 {
        return Err(LoadFault::BadStamp("once loaded it differs from the file's"));
    }
    let vt = stamp.plugin;
    if vt.is_null() || !vt.is_aligned() {
        return Err(LoadFault::BadStamp("its vtable is null or unaligned"));
    }
    // SAFETY: a stamp's `plugin` leads to a static vtable, which begins with its size (plugin ABI,
    // "Versions"); only that first field is read until the size is known to be enough.
    let size = unsafe { vt.cast::<usize>().read() };
    if size < size_of::<abi::PluginVt>() {
        return Err(LoadFault::BadStamp("its vtable is smaller than this ABI's"));
    }
    for (slot, offset) in REQUIRED_SLOTS {
        // SAFETY: the table is at least as large as ours.
        let at = unsafe { vt.byte_add(offset) };
        // SAFETY: as above, and the offset is that of a pointer.
        if unsafe { at.cast::<usize>().read() } == 0 {
            return Err(LoadFault::NullSlot(slot));
        }
    }
    // SAFETY: as above; the slots that Rust takes for never null are not.
    Ok(unsafe { &*vt })
}

/// Reads and judges the plugin's type descriptions.
fn types(vt: &'static abi::PluginVt) -> Result<Vec<TypeEntry>, LoadFault> {
    const TYPES_MAX: usize = 8;
    let invalid = |text: String| Err(LoadFault::TypesInvalid(text));
    if vt.types.is_null() || !vt.types.is_aligned() {
        return invalid("the list is null or unaligned".to_owned());
    }
    if vt.types_len == 0 || vt.types_len > TYPES_MAX {
        return invalid(format!("{} of them, accepted are 1 to {TYPES_MAX}", vt.types_len));
    }
    // SAFETY: `types` leads to `types_len` static descriptions (plugin ABI, `PluginVt::types`),
    // not null, aligned and few as checked above.
    let list = unsafe { std::slice::from_raw_parts(vt.types, vt.types_len) };
    let mut types: Vec<TypeEntry> = Vec::with_capacity(list.len());
    for desc in list {
        let Some(name) = type_name(desc) else {
            return invalid("a name is not 1 to 32 of A-Z, 0-9 and _".to_owned());
        };
        let missing = match desc.born {
            abi::born::HTTP if vt.claims.is_none() => Some("claims"),
            abi::born::HTTP if vt.accept_http.is_none() => Some("accept_http"),
            abi::born::HTTP if vt.refuse_http.is_none() => Some("refuse_http"),
            abi::born::BYTES if vt.accept_stream.is_none() => Some("accept_stream"),
            abi::born::BYTES if vt.refuse_stream.is_none() => Some("refuse_stream"),
            abi::born::HTTP | abi::born::BYTES => None,
            other => return invalid(format!("{name} is born {other}, accepted are 1 and 2")),
        };
        if let Some(slot) = missing {
            return invalid(format!("{name} needs {slot}, which is null"));
        }
        if types.iter().any(|earlier| earlier.name == name) {
            return invalid(format!("{name} stands twice"));
        }
        types.push(TypeEntry { name, born: desc.born });
    }
    Ok(types)
}

fn type_name(desc: &abi::TypeDesc) -> Option<String> {
    const NAME_BYTES_MAX: usize = 32;
    if desc.name.ptr.is_null() || desc.name.len == 0 || desc.name.len > NAME_BYTES_MAX {
        return None;
    }
    // SAFETY: a description's name is static text of `len` bytes (plugin ABI, `TypeDesc`).
    let name = unsafe { std::slice::from_raw_parts(desc.name.ptr, desc.name.len) };
    let fits = |b: &u8| b.is_ascii_uppercase() || b.is_ascii_digit() || *b == b'_';
    name.iter().all(fits).then(|| String::from_utf8_lossy(name).into_owned())
}
