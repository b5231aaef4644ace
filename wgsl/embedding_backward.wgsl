// Embedding, backward, 3 of 3: dwte[v] = sum of mask * dx over the positions of token v, dwpe[t] = the same over the batch.
// Every row of both is a sum over a list of rows of dx, added in a fixed order; rows without a list become zero.
//
// A workgroup makes TILE lanes of ROWS rows: wte's, then wpe's. Short lists are added by one thread a lane; a long one by all
// PARTS threads of a lane, four rows in flight each, and a tree. Where lists are long on average ROWS is 1, so that the
// longest, a text's most frequent token, does not wait for its neighbours. Prepend philox.wgsl and lanes4.wgsl or lanes1.wgsl.
//
// Header: elem, WIDTH, DROPOUT, ROWS (1 or 16).
// Workgroup: 256 threads. Grid: ceil((vocab + block_size) / ROWS) * ceil(lanes / 16), folded into (x, y).
// Workgroup memory: 256 * 4 * WIDTH + 80 bytes (4176 at most).
//
// Bindings: 0 dx (B, T, C) elem; 1 order (B * T) and 2 starts (vocab + 1) u32, from embedding_rank.wgsl; 3 dwte (vocab, C)
// f32, written; 4 dwpe (block_size, C) f32, written; 5 clock (4) u32; 6 params.

struct Params {
    batch: u32,
    time: u32,
    lanes: u32, // C / WIDTH
    vocab: u32,
    block_size: u32,
    seed_lo: u32,
    seed_hi: u32,
    step: u32, // of the masks, counted from the clock
    site: u32,
    drop_threshold: u32,
    keep_scale: f32,
}

@group(0) @binding(0) var<storage, read_write> dx: array<stored>;
@group(0) @binding(1) var<storage, read_write> order: array<u32>;
@group(0) @binding(2) var<storage, read_write> starts: array<u32>;
@group(0) @binding(3) var<storage, read_write> dwte: array<lanes>;
@group(0) @binding(4) var<storage, read_write> dwpe: array<lanes>;
@group(0) @binding(5) var<storage, read_write> clock: array<u32>;
@group(0) @binding(6) var<uniform> params: Params;

const TILE: u32 = 16u;
const PARTS: u32 = 16u;
const THREADS: u32 = TILE * PARTS;
const IN_FLIGHT: u32 = 4u;
const LONG: u32 = 8u; // a list longer than this is added by all threads

var<workgroup> sums: array<lanes, THREADS>;
var<workgroup> is_long: array<u32, PARTS>;
var<workgroup> long_rows: u32; // a bit a row

// How many rows of dx are added up for a row of wte and wpe.
fn list_length(row: u32) -> u32 {
    if (row < params.vocab) {
        return starts[row + 1u] - starts[row];
    }
    return select(0u, params.batch, row - params.vocab < params.time);
}

// The i-th of them.
fn list_item(row: u32, i: u32) -> u32 {
    if (row < params.vocab) {
        return order[starts[row] + i];
    }
    return i * params.time + row - params.vocab;
}

fn gradient(source: u32, lane: u32) -> lanes {
    let value = lanes(dx[source * params.lanes + lane]);
    if (!DROPOUT) {
        return value;
    }
    let column = lane * WIDTH;
    let block = philox4x32(
        vec4<u32>(column / 4u, source, params.step + clock[0], params.site),
        vec2<u32>(params.seed_lo, params.seed_hi),
    );
    let kept = own_words(block, column) >= lane_words(params.drop_threshold);
    return select(lanes(), value * params.keep_scale, kept);
}

fn store(row: u32, lane: u32, value: lanes) {
    if (row < params.vocab) {
        dwte[row * params.lanes + lane] = value;
    } else if (row < params.vocab + params.block_size) {
        dwpe[(row - params.vocab) * params.lanes + lane] = value;
    }
}

// One thread's share of a long list.
fn sum_part(row: u32, part: u32, lane: u32) -> lanes {
    let length = list_length(row);
    var sum = lanes();
    for (var start = part; start < length; start += PARTS * IN_FLIGHT) {
        for (var j = 0u; j < IN_FLIGHT; j++) {
            let i = start + j * PARTS;
            let value = gradient(list_item(row, min(i, length - 1u)), lane); // no branch, so the loads overlap
            sum += select(lanes(), value, i < length);
        }
    }
    return sum;
}

// The row by all threads. Call it in uniform control flow.
fn sum_together(row: u32, thread: u32, lane: u32, is_inside: bool) {
    let part = thread / TILE;
    var sum = lanes();
    if (is_inside) {
        sum = sum_part(row, part, lane);
    }
    sums[thread] = sum;
    for (var reach = PARTS / 2u; reach > 0u; reach /= 2u) {
        workgroupBarrier();
        if (part < reach) {
            sums[thread] += sums[thread + reach * TILE];
        }
    }
    if (part == 0u && is_inside) {
        store(row, lane, sums[thread]);
    }
    workgroupBarrier(); // the next row's sums may come
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let tiles = (params.lanes + TILE - 1u) / TILE;
    let group = workgroup.y * grid.x + workgroup.x;
    let first_row = group / tiles * ROWS;
    let lane = group % tiles * TILE + thread % TILE;
    let is_inside = lane < params.lanes;
    if (ROWS == 1u) {
        sum_together(first_row, thread, lane, is_inside && first_row < params.vocab + params.block_size);
        return;
    }
    let part = thread / TILE;
    let row = first_row + part;
    let has_row = row < params.vocab + params.block_size;
    var length = 0u;
    if (has_row) {
        length = list_length(row);
    }
    if (is_inside && length <= LONG) {
        var sum = lanes();
        for (var i = 0u; i < length; i++) {
            sum += gradient(list_item(row, i), lane);
        }
        store(row, lane, sum);
    }
    if (thread % TILE == 0u) {
        is_long[part] = u32(length > LONG);
    }
    workgroupBarrier();
    if (thread == 0u) {
        var bits = 0u;
        for (var i = 0u; i < PARTS; i++) {
            bits |= is_long[i] << i;
        }
        long_rows = bits;
    }
    var rows_left = workgroupUniformLoad(&long_rows);
    while (rows_left != 0u) {
        sum_together(first_row + firstTrailingBit(rows_left), thread, lane, is_inside);
        rows_left &= rows_left - 1u;
    }
}
