//! Header fields lent for a call.

use std::marker::PhantomData;

use sidelane_abi as abi;

use super::text::lend;

/// Borrowed header fields in the layout that the host reads: one vector, nothing per field.
pub struct HeaderList<'a> {
    fields: Vec<abi::Header>,
    borrowed: PhantomData<&'a [u8]>,
}

// SAFETY: the pointers lead to bytes borrowed for `'a`, which are only read.
unsafe impl Send for HeaderList<'_> {}
// SAFETY: as above.
unsafe impl Sync for HeaderList<'_> {}

impl<'a> HeaderList<'a> {
    /// Returns an empty list.
    #[must_use]
    pub const fn new() -> Self {
        Self { fields: Vec::new(), borrowed: PhantomData }
    }

    /// Returns an empty list that takes `capacity` fields without growing.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        Self { fields: Vec::with_capacity(capacity), borrowed: PhantomData }
    }

    /// Adds a field.
    pub fn push(&mut self, name: &'a [u8], value: &'a [u8]) {
        self.fields.push(abi::Header { name: lend(name), value: lend(value) });
    }

    /// Returns the emptied list for fields of another lifetime; the room stays.
    #[must_use]
    pub fn recycle<'b>(mut self) -> HeaderList<'b> {
        self.fields.clear();
        HeaderList { fields: self.fields, borrowed: PhantomData }
    }

    /// Number of fields.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.fields.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.fields.is_empty()
    }

    pub(crate) fn raw(&self) -> (*const abi::Header, usize) {
        (self.fields.as_ptr(), self.fields.len())
    }
}

impl Default for HeaderList<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> Extend<(&'a [u8], &'a [u8])> for HeaderList<'a> {
    fn extend<I: IntoIterator<Item = (&'a [u8], &'a [u8])>>(&mut self, fields: I) {
        let fields = fields.into_iter();
        self.fields.reserve(fields.size_hint().0);
        for (name, value) in fields {
            self.push(name, value);
        }
    }
}

impl<'a> FromIterator<(&'a [u8], &'a [u8])> for HeaderList<'a> {
    fn from_iter<I: IntoIterator<Item = (&'a [u8], &'a [u8])>>(fields: I) -> Self {
        let mut list = Self::new();
        list.extend(fields);
        list
    }
}
