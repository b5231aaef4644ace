//! Matrix products by the `gemm` crate, over views that are checked against their slices. It packs what it needs packed, so nothing is
//! transposed or copied for it, and its sums' order does not depend on its threads.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use gemm::Parallelism;

use super::filled;

/// A view of a slice as a matrix.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    /// Elements from row to row, and from column to column.
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// `rows` of `columns` neighbouring elements, the rows `stride` apart.
    pub fn new(values: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        Self { values, rows, columns, strides: [stride, 1] }
    }

    /// The same, its rows one after the other.
    pub fn dense(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::new(values, rows, columns, columns)
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        let [row, column] = self.strides;
        Self { rows: self.columns, columns: self.rows, strides: [column, row], ..self }
    }

    /// `count` rows from `first` on.
    pub fn rows(self, first: usize, count: usize) -> Self {
        Self { values: &self.values[first * self.strides[0]..], rows: count, ..self }
    }

    fn is_inside(&self) -> bool {
        self.rows == 0
            || self.columns == 0
            || (self.rows - 1) * self.strides[0] + (self.columns - 1) * self.strides[1] < self.values.len()
    }
}

/// A matrix to be written: `rows` of `columns` neighbouring elements, the rows `stride` apart.
pub struct MatrixMut<'a> {
    first: *mut f32,
    rows: usize,
    columns: usize,
    stride: usize,
    values: PhantomData<&'a mut [f32]>,
}

impl<'a> MatrixMut<'a> {
    /// All of `values`, its rows one after the other.
    pub fn dense(values: &'a mut [f32], rows: usize, columns: usize) -> Self {
        Strips::new(values).all(rows, columns)
    }
}

/// A slice whose parts several threads write at once.
pub struct Strips<'a> {
    first: *mut f32,
    len: usize,
    values: PhantomData<&'a mut [f32]>,
}

// SAFETY: what is written through it are the matrices of `Strips::matrix`, whose callers promise that they are disjoint.
unsafe impl Sync for Strips<'_> {}

impl<'a> Strips<'a> {
    /// Of all of `values`.
    pub fn new(values: &'a mut [f32]) -> Self {
        Self { first: values.as_mut_ptr(), len: values.len(), values: PhantomData }
    }

    /// Of memory that has no values yet: the first product of a place must not add to it.
    pub fn room(room: &'a mut [MaybeUninit<f32>]) -> Self {
        Self { first: room.as_mut_ptr().cast(), len: room.len(), values: PhantomData }
    }

    fn all(self, rows: usize, columns: usize) -> MatrixMut<'a> {
        assert!(rows * columns <= self.len, "a matrix beyond its slice");
        MatrixMut { first: self.first, rows, columns, stride: columns, values: PhantomData }
    }

    /// `rows` of `columns` elements from element `first` on, the rows `stride` apart.
    ///
    /// # Safety
    /// As long as the matrix lives, no other holds one of its elements.
    pub unsafe fn matrix(&self, first: usize, rows: usize, columns: usize, stride: usize) -> MatrixMut<'_> {
        let end = first + rows.saturating_sub(1) * stride + columns;
        assert!(end <= self.len, "a matrix beyond its slice");
        // SAFETY: `first` is inside, as its end is.
        MatrixMut { first: unsafe { self.first.add(first) }, rows, columns, stride, values: PhantomData }
    }
}

/// Multiplications from which on a product is shared by threads.
const WORTH_THREADS: usize = 1 << 20;

/// c = a b, or c += a b where `add`, by all threads where that pays.
pub fn product(a: Matrix, b: Matrix, c: MatrixMut, add: bool) {
    let shared = a.rows * a.columns * b.columns >= WORTH_THREADS;
    run(a, b, c, add, if shared { Parallelism::Rayon(0) } else { Parallelism::None });
}

/// The same by the calling thread, of which there are several at work.
pub fn product_alone(a: Matrix, b: Matrix, c: MatrixMut, add: bool) {
    run(a, b, c, add, Parallelism::None);
}

/// a b, its rows one after the other.
pub fn product_of(a: Matrix, b: Matrix) -> Vec<f32> {
    let (rows, columns) = (a.rows, b.columns);
    // SAFETY: a product that adds to nothing writes every element, and reads none.
    unsafe { filled(rows * columns, |c| product(a, b, Strips::room(c).all(rows, columns), false)) }
}

fn run(a: Matrix, b: Matrix, c: MatrixMut, add: bool, parallelism: Parallelism) {
    assert!(a.is_inside() && b.is_inside(), "a matrix beyond its slice");
    assert!(a.columns == b.rows && a.rows == c.rows && b.columns == c.columns, "sizes that do not fit");
    let [a_row, a_column] = a.strides.map(|stride| stride as isize);
    let [b_row, b_column] = b.strides.map(|stride| stride as isize);
    // SAFETY: all three views are inside of their slices, c was borrowed mutably, and the sizes fit.
    unsafe {
        gemm::gemm(
            c.rows,
            c.columns,
            a.columns,
            c.first,
            1,
            c.stride as isize,
            add,
            a.values.as_ptr(),
            a_column,
            a_row,
            b.values.as_ptr(),
            b_column,
            b_row,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}
