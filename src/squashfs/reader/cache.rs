//! A bounded cache of unpacked blocks for many threads.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::Error;

type Cell<V> = Arc<OnceLock<Result<Arc<V>, Error>>>;

/// The entries used last, by two generations: when the young one is half of what the cache may hold, the old one is let
/// go and the young one becomes old. What is used in the old one moves to the young one.
pub struct Cache<K, V> {
    generations: Mutex<Generations<K, V>>,
    /// Most entries of a generation.
    capacity: usize,
}

struct Generations<K, V> {
    young: HashMap<K, Cell<V>>,
    old: HashMap<K, Cell<V>>,
}

impl<K, V> std::fmt::Debug for Cache<K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl<K: Copy + Eq + Hash, V> Cache<K, V> {
    /// A cache of at most `entries`.
    pub fn new(entries: usize) -> Self {
        let generations = Generations { young: HashMap::new(), old: HashMap::new() };
        Self { generations: Mutex::new(generations), capacity: (entries / 2).max(1) }
    }

    /// What `key` stands for, made by `make` if it is not there. Threads that want the same at the same time wait for one
    /// of them. Failures are not kept.
    pub fn get(&self, key: K, make: impl FnOnce() -> Result<V, Error>) -> Result<Arc<V>, Error> {
        let cell = self.cell(key);
        let result = cell.get_or_init(|| make().map(Arc::new)).clone();
        if result.is_err() {
            self.generations.lock().unwrap_or_else(PoisonError::into_inner).young.remove(&key);
        }
        result
    }

    /// Whether `key` is there, or being made.
    pub fn contains(&self, key: K) -> bool {
        let generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
        generations.young.contains_key(&key) || generations.old.contains_key(&key)
    }

    fn cell(&self, key: K) -> Cell<V> {
        let mut generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
        let Generations { young, old } = &mut *generations;
        if let Some(cell) = young.get(&key) {
            return Arc::clone(cell);
        }
        let cell = old.remove(&key).unwrap_or_default();
        if young.len() >= self.capacity {
            *old = std::mem::take(young);
        }
        young.insert(key, Arc::clone(&cell));
        cell
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn entries_are_made_once_and_bounded() {
        let (cache, made) = (Cache::new(8), AtomicUsize::new(0));
        let make = |key: u32| {
            cache.get(key, || {
                made.fetch_add(1, Ordering::Relaxed);
                Ok(key)
            })
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert_eq!(make(1).as_deref(), Ok(&1)));
            }
        });
        assert_eq!(made.load(Ordering::Relaxed), 1);
        for key in 0..100 {
            // 1 is in use all the time, and stays.
            make(1).unwrap();
            make(key).unwrap();
            let generations = cache.generations.lock().unwrap();
            assert!(generations.young.len() + generations.old.len() <= 8);
        }
        assert_eq!(made.load(Ordering::Relaxed), 100);
        assert!(cache.contains(99) && !cache.contains(2));
    }

    #[test]
    fn failures_are_not_kept() {
        let cache = Cache::new(2);
        assert_eq!(cache.get(1, || Err::<u8, _>(Error::Read(libc::EIO))), Err(Error::Read(libc::EIO)));
        assert_eq!(cache.get(1, || Ok(3)).as_deref(), Ok(&3));
    }
}
