//! The library behind the program `sidelane`.

pub mod config;
pub mod front;
pub mod plugin;
pub mod router;
