//! The stamp, read from the library's file.
//!
//! Pure: bytes in, [`Stamp`] or [`LoadFault`] out. No code of the library has run and nothing of it
//! is mapped, so the worst that a damaged file can do here is to be refused.

use object::Endianness;
use object::elf::{self, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader, Sym};
use sidelane_abi as abi;

use super::error::LoadFault;

type Header = FileHeader64<Endianness>;

/// What a plugin says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The plugin's own name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The compiler that built it.
    pub toolchain: String,
    /// ABI it was compiled against: major, minor.
    pub abi: (u32, u32),
}

#[cfg(target_arch = "x86_64")]
const MACHINE: (elf::Machine, &str) = (elf::EM_X86_64, "x86-64");
#[cfg(target_arch = "aarch64")]
const MACHINE: (elf::Machine, &str) = (elf::EM_AARCH64, "aarch64");
#[cfg(target_arch = "riscv64")]
const MACHINE: (elf::Machine, &str) = (elf::EM_RISCV, "riscv64");
#[cfg(target_arch = "powerpc64")]
const MACHINE: (elf::Machine, &str) = (elf::EM_PPC64, "powerpc64");
#[cfg(target_arch = "s390x")]
const MACHINE: (elf::Machine, &str) = (elf::EM_S390, "s390x");

/// Bytes of [`abi::Stamp`] before the pointer, which the file holds as a relocation.
const PLAIN_BYTES: usize = std::mem::offset_of!(abi::Stamp, plugin);

/// Reads and judges the stamp of the library whose whole file is `file`.
pub(super) fn read(file: &[u8]) -> Result<Stamp, LoadFault> {
    let (header, endian) = library_header(file)?;
    check_extents(header, endian, file)?;
    judge(stamp_bytes(header, endian, file)?, endian)
}

fn library_header(file: &[u8]) -> Result<(&Header, Endianness), LoadFault> {
    const HEADER_BYTES: usize = size_of::<Header>();
    if !file.starts_with(&elf::ELFMAG) {
        return Err(LoadFault::NotElf { found: looks_like(file) });
    }
    if file.len() < HEADER_BYTES {
        let end = HEADER_BYTES as u64;
        return Err(LoadFault::Truncated { part: "the ELF header", end, size: file.len() as u64 });
    }
    // Class and byte order stand at fixed offsets, and decide how `e_machine` is read.
    let bits = match file[4] {
        1 => 32,
        2 => 64,
        other => return Err(LoadFault::Damaged(format!("ELF class {other}"))),
    };
    let endian = match file[5] {
        1 => Endianness::Little,
        2 => Endianness::Big,
        other => return Err(LoadFault::Damaged(format!("ELF byte order {other}"))),
    };
    let raw = [file[18], file[19]];
    let machine = elf::Machine(match endian {
        Endianness::Little => u16::from_le_bytes(raw),
        Endianness::Big => u16::from_be_bytes(raw),
    });
    if machine != MACHINE.0 || bits != usize::BITS || endian != Endianness::default() {
        let found = machine_name(machine, bits, endian);
        return Err(LoadFault::WrongMachine { found, expected: MACHINE.1 });
    }
    let header = Header::parse(file).map_err(damaged)?;
    match header.e_type(endian) {
        elf::ET_DYN => Ok((header, endian)),
        elf::ET_EXEC => Err(LoadFault::NotShared { found: "an executable" }),
        elf::ET_REL => Err(LoadFault::NotShared { found: "an object file" }),
        elf::ET_CORE => Err(LoadFault::NotShared { found: "a core dump" }),
        _ => Err(LoadFault::NotShared { found: "an ELF file of another kind" }),
    }
}

fn looks_like(file: &[u8]) -> &'static str {
    match file {
        [] => "the file is empty",
        [b'#', b'!', ..] => "it is a script",
        [b'M', b'Z', ..] => "it is a Windows library",
        [0xcf, 0xfa, 0xed, 0xfe, ..] | [0xca, 0xfe, 0xba, 0xbe, ..] => "it is a macOS library",
        [b'!', b'<', b'a', b'r', b'c', b'h', b'>', ..] => "it is a static library",
        _ if file.iter().take(512).all(|&b| b >= 0x20 || b.is_ascii_whitespace()) => {
            "it looks like text"
        }
        _ => "it does not begin with \\x7fELF",
    }
}

fn machine_name(machine: elf::Machine, bits: u32, endian: Endianness) -> String {
    let name = match machine {
        elf::EM_X86_64 => "x86-64",
        elf::EM_386 => "x86",
        elf::EM_AARCH64 => "aarch64",
        elf::EM_ARM => "arm",
        elf::EM_RISCV => "riscv",
        elf::EM_PPC64 => "powerpc64",
        elf::EM_S390 => "s390x",
        elf::Machine(other) => return format!("ELF machine {other}"),
    };
    match endian {
        _ if bits != usize::BITS => format!("{name} ({bits}-bit)"),
        Endianness::Big if cfg!(target_endian = "little") => format!("{name} (big-endian)"),
        Endianness::Little if cfg!(target_endian = "big") => format!("{name} (little-endian)"),
        _ => name.to_owned(),
    }
}

/// Checks that all the headers speak of lies within the file: mapping a segment that does not is a
/// SIGBUS inside `dlopen`.
fn check_extents(header: &Header, endian: Endianness, file: &[u8]) -> Result<(), LoadFault> {
    let size = file.len() as u64;
    let within = |part, offset: u64, length: u64| {
        let end = offset.saturating_add(length);
        if end > size { Err(LoadFault::Truncated { part, end, size }) } else { Ok(()) }
    };
    let table = |count: u16, entry: u16| u64::from(count) * u64::from(entry);
    let segments = table(header.e_phnum(endian), header.e_phentsize(endian));
    within("the program header table", header.e_phoff(endian), segments)?;
    for segment in header.program_headers(endian, file).map_err(damaged)? {
        let (offset, length) = segment.file_range(endian);
        within("a segment", offset, length)?;
    }
    let sections = table(header.e_shnum(endian), header.e_shentsize(endian));
    within("the section header table", header.e_shoff(endian), sections)?;
    for section in header.sections(endian, file).map_err(damaged)?.iter() {
        if let Some((offset, length)) = section.file_range(endian) {
            within("a section", offset, length)?;
        }
    }
    Ok(())
}

/// Finds the stamp as the dynamic linker would map it: symbol, address, segment, file.
fn stamp_bytes<'a>(
    header: &Header,
    endian: Endianness,
    file: &'a [u8],
) -> Result<&'a [u8], LoadFault> {
    let sections = header.sections(endian, file).map_err(damaged)?;
    let symbols = sections.symbols(endian, file, elf::SHT_DYNSYM).map_err(damaged)?;
    let symbol = symbols
        .iter()
        .find(|symbol| {
            !symbol.is_undefined(endian)
                && symbols.symbol_name(endian, symbol) == Ok(abi::STAMP_SYMBOL.as_bytes())
        })
        .ok_or(LoadFault::NoStamp)?;
    if symbol.st_type() != elf::STT_OBJECT {
        return Err(LoadFault::BadStamp("the symbol is no data object"));
    }
    let address = symbol.st_value(endian);
    for segment in header.program_headers(endian, file).map_err(damaged)? {
        if segment.p_type(endian) != elf::PT_LOAD {
            continue;
        }
        let bytes = segment.data_range(endian, file, address, PLAIN_BYTES as u64);
        if let Ok(Some(bytes)) = bytes {
            return Ok(bytes);
        }
    }
    Err(LoadFault::BadStamp("its bytes are not in the file"))
}

fn judge(bytes: &[u8], endian: Endianness) -> Result<Stamp, LoadFault> {
    let word = |at: usize| {
        let raw = bytes[at..at + 4].try_into().expect("a range of four");
        match endian {
            Endianness::Little => u32::from_le_bytes(raw),
            Endianness::Big => u32::from_be_bytes(raw),
        }
    };
    if !bytes.starts_with(&abi::MAGIC) {
        return Err(LoadFault::BadStamp("its magic is not sidelane-plugin"));
    }
    // The version is judged before the size: another version may well have another size.
    let (major, minor) = (
        word(std::mem::offset_of!(abi::Stamp, abi_major)),
        word(std::mem::offset_of!(abi::Stamp, abi_minor)),
    );
    if major != abi::ABI_MAJOR {
        return Err(LoadFault::AbiMajor { found: major });
    }
    if minor > abi::ABI_MINOR {
        return Err(LoadFault::AbiMinorNewer { found: minor });
    }
    if minor < abi::ABI_MINOR_OLDEST {
        return Err(LoadFault::AbiMinorOlder { found: minor });
    }
    if (word(std::mem::offset_of!(abi::Stamp, size)) as usize) < size_of::<abi::Stamp>() {
        return Err(LoadFault::BadStamp("its size is smaller than a stamp's"));
    }
    match word(std::mem::offset_of!(abi::Stamp, panic)) {
        abi::panic_strategy::UNWIND | abi::panic_strategy::NONE => {}
        abi::panic_strategy::ABORT => return Err(LoadFault::PanicAbort),
        found => return Err(LoadFault::PanicUnknown { found }),
    }
    let stamp = Stamp {
        name: text(bytes, std::mem::offset_of!(abi::Stamp, name), 64)?,
        version: text(bytes, std::mem::offset_of!(abi::Stamp, version), 32)?,
        toolchain: text(bytes, std::mem::offset_of!(abi::Stamp, toolchain), 96)?,
        abi: (major, minor),
    };
    if stamp.name.is_empty() {
        return Err(LoadFault::BadStamp("its name is empty"));
    }
    Ok(stamp)
}

fn text(bytes: &[u8], at: usize, length: usize) -> Result<String, LoadFault> {
    let field = &bytes[at..at + length];
    let end = field.iter().position(|&b| b == 0).unwrap_or(length);
    let text = std::str::from_utf8(&field[..end])
        .map_err(|_| LoadFault::BadStamp("its text is not UTF-8"))?;
    if text.chars().any(char::is_control) {
        return Err(LoadFault::BadStamp("its text holds control characters"));
    }
    Ok(text.to_owned())
}

fn damaged(error: object::read::Error) -> LoadFault {
    LoadFault::Damaged(error.to_string())
}
