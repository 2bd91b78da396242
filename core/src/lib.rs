//! The library behind the program `sidelane`.

pub mod plugin;
