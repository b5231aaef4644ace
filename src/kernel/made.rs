//! Kernels that are made once. A header is text, and writing one costs the host more than a launch does.

use std::sync::{PoisonError, RwLock};

use super::Kernel;

/// The kernels of one operation that were made in this process, each with what it was made for. They are few: a search is
/// cheaper than a hash.
#[derive(Debug)]
pub struct Made<K>(RwLock<Vec<(K, Kernel)>>);

impl<K> Made<K> {
    /// None yet.
    pub const fn new() -> Self {
        Self(RwLock::new(Vec::new()))
    }

    /// The kernel whose key `is` recognises, else the one that `make` makes, which is kept. All that the text depends on has
    /// to be in the key.
    pub fn find(&self, is: impl Fn(&K) -> bool, make: impl FnOnce() -> (K, Kernel)) -> Kernel {
        let made = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, kernel)) = made.iter().find(|(key, _)| is(key)) {
            return kernel.clone();
        }
        drop(made);
        let (key, kernel) = make();
        self.0.write().unwrap_or_else(PoisonError::into_inner).push((key, kernel.clone()));
        kernel
    }

    /// The kernel made for `key`.
    pub fn get(&self, key: K, make: impl FnOnce(&K) -> Kernel) -> Kernel
    where
        K: Copy + PartialEq,
    {
        self.find(
            |other| *other == key,
            || {
                let kernel = make(&key);
                (key, kernel)
            },
        )
    }
}

impl<K> Default for Made<K> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_made_once_for_a_key() {
        let made = Made::new();
        let get = |key: u32| made.get(key, |key| Kernel::new("made", format!("// {key}"), Vec::new(), (1, 1, 1)));
        assert_eq!([get(1), get(2)].map(|kernel| kernel.header().to_string()), ["// 1", "// 2"]);
        let again = made.get(2, |_| panic!("made twice"));
        assert_eq!(again.header(), "// 2");
    }
}
