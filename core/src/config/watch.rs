//! Watches the configuration for changes.
