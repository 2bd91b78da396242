//! The program as its users meet it, one module per behaviour.

mod service_double;
