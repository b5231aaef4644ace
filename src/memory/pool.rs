//! A model of the memory pool below Burn, CubeCL 0.11's `MemoryConfiguration::Adaptive`: what it takes from the device for a
//! sequence of allocations and releases.
//!
//! Small allocations share pages of 8 MiB. All others are cut, first fit, from pages sized to the largest allocation so far.
//! When one is larger still, pages of a new size take over; the old ones serve nothing new and go back once they are empty.
//! Pages of the size in use are never given back. So what is reserved depends on the order of allocations, and no formula over
//! their sum is near it: a page of 97 MiB holds four tensors of 24, or one of 50.

/// Pages of small allocations, and the largest allocation that they serve.
const SMALL_PAGE: u64 = 8 << 20;
const SMALL: u64 = 64 << 10;
/// Smallest page of the others; what a page has beyond its largest allocation; and what its size is a multiple of.
const MIN_PAGE: u64 = 2 << 20;
const SLACK: u64 = 1 << 20;
const GRANULE: u64 = 1 << 20;
/// Where an allocation may begin: the largest offset alignment that WebGPU allows a device to ask for.
const ALIGNMENT: u64 = 256;

/// Where an allocation lies. It has to be given back with [`Pool::free`].
#[derive(Debug)]
pub struct Place {
    /// Which pages: 0 the small ones, then one for each size of page.
    sheaf: usize,
    page: usize,
    offset: u64,
}

/// A part of a page.
#[derive(Clone, Copy, Debug)]
struct Slice {
    offset: u64,
    size: u64,
    padding: u64,
    used: bool,
}

/// A page, and how much of it nobody uses: a full one need not be looked through.
#[derive(Debug)]
struct Page {
    slices: Vec<Slice>,
    free: u64,
}

/// Pages of one size. A page that went back is None: the others keep their numbers.
#[derive(Debug)]
struct Sheaf {
    page_size: u64,
    pages: Vec<Option<Page>>,
}

impl Sheaf {
    fn new(page_size: u64) -> Self {
        Self { page_size, pages: Vec::new() }
    }

    fn reserved(&self) -> u64 {
        self.pages.iter().flatten().count() as u64 * self.page_size
    }

    /// The first fit in the pages held, else a new page: (page, offset).
    fn alloc(&mut self, size: u64) -> (usize, u64) {
        let whole = size.next_multiple_of(ALIGNMENT);
        for (number, page) in self.pages.iter_mut().enumerate() {
            if let Some(Page { slices, free }) = page
                && *free >= whole
            {
                merge(slices);
                if let Some(offset) = cut(slices, size) {
                    *free -= whole;
                    return (number, offset);
                }
            }
        }
        let mut slices = vec![Slice { offset: 0, size: self.page_size, padding: 0, used: false }];
        let offset = cut(&mut slices, size).unwrap_or(0);
        self.pages.push(Some(Page { slices, free: self.page_size.saturating_sub(whole) }));
        (self.pages.len() - 1, offset)
    }

    fn free(&mut self, page: usize, offset: u64) {
        let Some(Page { slices, free }) = &mut self.pages[page] else { return };
        if let Some(slice) = slices.iter_mut().find(|slice| slice.offset == offset && slice.used) {
            slice.used = false;
            *free += slice.size + slice.padding;
        }
    }

    fn release_empty(&mut self) {
        for page in &mut self.pages {
            if page.as_ref().is_some_and(|page| page.slices.iter().all(|slice| !slice.used)) {
                *page = None;
            }
        }
    }
}

/// Makes one of free neighbours.
fn merge(slices: &mut Vec<Slice>) {
    let mut merged: Vec<Slice> = Vec::with_capacity(slices.len());
    for slice in slices.drain(..) {
        match merged.last_mut() {
            Some(last) if !last.used && !slice.used => {
                last.size += last.padding + slice.size + slice.padding;
                last.padding = 0;
            }
            _ => merged.push(slice),
        }
    }
    *slices = merged;
}

/// Takes `size` bytes from the first free slice that holds them with their padding.
fn cut(slices: &mut Vec<Slice>, size: u64) -> Option<u64> {
    let whole = size.next_multiple_of(ALIGNMENT);
    let index = slices.iter().position(|slice| !slice.used && slice.size >= whole)?;
    let free = slices[index];
    slices[index] = Slice { offset: free.offset, size, padding: whole - size, used: true };
    if free.size > whole {
        let rest = Slice { offset: free.offset + whole, size: free.size - whole, padding: free.padding, used: false };
        slices.insert(index + 1, rest);
    }
    Some(free.offset)
}

/// The pool of one device.
#[derive(Debug)]
pub struct Pool {
    sheaves: Vec<Sheaf>,
    largest_page: u64,
}

impl Pool {
    /// An empty pool on a device whose largest buffer has `largest_buffer` bytes.
    pub fn new(largest_buffer: u64) -> Self {
        Self { sheaves: vec![Sheaf::new(SMALL_PAGE), Sheaf::new(MIN_PAGE)], largest_page: largest_buffer }
    }

    /// Bytes taken from the device.
    pub fn reserved(&self) -> u64 {
        self.sheaves.iter().map(Sheaf::reserved).sum()
    }

    /// The size of the pages that serve what is not small.
    pub fn page_size(&self) -> u64 {
        self.sheaves.last().map_or(0, |sheaf| sheaf.page_size)
    }

    /// Takes `bytes`.
    pub fn alloc(&mut self, bytes: u64) -> Place {
        let current = self.sheaves.len() - 1;
        for sheaf in &mut self.sheaves[1..current] {
            sheaf.release_empty();
        }
        let sheaf = if bytes <= SMALL {
            0
        } else if bytes.next_multiple_of(ALIGNMENT) <= self.page_size() {
            current
        } else {
            let page = (bytes + SLACK).next_multiple_of(GRANULE).min(self.largest_page.max(bytes));
            self.sheaves.push(Sheaf::new(page));
            current + 1
        };
        let (page, offset) = self.sheaves[sheaf].alloc(bytes);
        Place { sheaf, page, offset }
    }

    /// Gives back what [`Pool::alloc`] took.
    pub fn free(&mut self, place: Place) {
        self.sheaves[place.sheaf].free(place.page, place.offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn small_allocations_share_a_page_and_the_others_fill_theirs() {
        let mut pool = Pool::new(1 << 30);
        let small = pool.alloc(64 << 10);
        assert_eq!(pool.reserved(), 8 * MIB);
        let first = pool.alloc(MIB);
        let second = pool.alloc(MIB);
        assert_eq!(pool.reserved(), 10 * MIB, "both in a page of 2 MiB");
        let third = pool.alloc(MIB);
        assert_eq!(pool.reserved(), 12 * MIB);
        pool.free(second);
        let again = pool.alloc(MIB);
        assert_eq!(pool.reserved(), 12 * MIB, "room that was given back serves again");
        [small, first, third, again].into_iter().for_each(|place| pool.free(place));
        assert_eq!(pool.reserved(), 12 * MIB, "pages of the size in use stay");
    }

    #[test]
    fn a_larger_allocation_begins_larger_pages_and_the_old_ones_go_back_when_they_are_empty() {
        let mut pool = Pool::new(1 << 30);
        let old = pool.alloc(MIB);
        let large = pool.alloc(10 * MIB);
        assert_eq!((pool.page_size(), pool.reserved()), (11 * MIB, 13 * MIB));
        let next = pool.alloc(MIB);
        assert_eq!(pool.reserved(), 13 * MIB, "the page of 11 MiB had the room");
        pool.free(old);
        let last = pool.alloc(MIB);
        assert_eq!(pool.reserved(), 22 * MIB, "the old page is gone, another of 11 MiB came");
        [large, next, last].into_iter().for_each(|place| pool.free(place));
    }

    #[test]
    fn neighbours_that_are_free_serve_one_larger_allocation() {
        let mut pool = Pool::new(1 << 30);
        let places: Vec<Place> = (0..4).map(|_| pool.alloc(512 << 10)).collect();
        assert_eq!(pool.reserved(), 2 * MIB);
        let mut places = places.into_iter();
        for place in places.by_ref().take(2) {
            pool.free(place);
        }
        let joined = pool.alloc(MIB);
        assert_eq!(pool.reserved(), 2 * MIB);
        places.chain([joined]).for_each(|place| pool.free(place));
    }

    #[test]
    fn a_page_is_no_larger_than_the_largest_buffer() {
        let mut pool = Pool::new(16 * MIB);
        let place = pool.alloc(16 * MIB);
        assert_eq!(pool.page_size(), 16 * MIB);
        pool.free(place);
    }
}
