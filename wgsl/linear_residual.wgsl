// The epilogue of a linear_* kernel: out = extra + dropout(sum + bias), four neighbouring columns of one row at a time: the
// four words of one Philox block.
//
// Expects from the header: DROPOUT (bool); CLOCK, the binding. Binds clock (4) u32. Prepend philox, linear_params, linear_quads
// or linear_singles, linear_extra_quads or _singles,
// linear_fetch, linear_bias or linear_no_bias.

@group(0) @binding(CLOCK) var<storage, read_write> clock: array<u32>;

fn finish(row: u32, col: u32, split: u32, sum: vec4<f32>, other: vec4<extra_elem>) {
    if (RAGGED && (row >= params.m || col >= params.n)) {
        return;
    }
    let count = min(4u, params.n - col);
    let index = row * params.out_stride + col;
    var value = sum * params.out_scale + bias_at(col);
    if (DROPOUT) {
        let words = philox4x32(
            vec4<u32>(col / 4u, row, params.step + clock[0], params.site), vec2<u32>(params.seed_lo, params.seed_hi));
        value = select(vec4<f32>(), value * params.keep_scale, words >= vec4<u32>(params.drop_threshold));
    }
    store_out(index, count, vec4<f32>(other) + value);
}
