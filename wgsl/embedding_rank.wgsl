// Embedding, backward, 2 of 3: from the sorted blocks of embedding_sort.wgsl, the order of all positions by (token, position)
// and where each token's positions start in it. The rank of a key is the number of keys below it, found by a binary search in
// every block: one thread a key, and one a row of wte.
//
// Header: none.
// Workgroup: 256 threads. Grid: ceil((blocks * 1024 + vocab + 1) / 256), folded into (x, y).
//
// Bindings: 0 sorted keys (blocks * 1024) u32; 1 order (count) u32, written: positions; 2 starts (vocab + 1) u32, written:
// token v's positions are order[starts[v]] .. order[starts[v + 1]]; 3 params.

struct Params {
    blocks: u32,
    vocab: u32, // < 2^22 - 1
}

@group(0) @binding(0) var<storage, read_write> sorted: array<u32>;
@group(0) @binding(1) var<storage, read_write> order: array<u32>;
@group(0) @binding(2) var<storage, read_write> starts: array<u32>;
@group(0) @binding(3) var<uniform> params: Params;

const BLOCK: u32 = 1024u;
const PAD: u32 = 0xffffffffu;

// How many keys of the sorted block are below `bound`.
fn count_below(bound: u32, block: u32) -> u32 {
    let start = block * BLOCK;
    var count = 0u;
    for (var reach = BLOCK / 2u; reach > 0u; reach /= 2u) {
        if (sorted[start + count + reach - 1u] < bound) {
            count += reach;
        }
    }
    return count + u32(sorted[start + count] < bound); // BLOCK - 1 at most before this
}

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>) {
    let index = id.y * grid.x * 256u + id.x;
    let keys = params.blocks * BLOCK;
    if (index > keys + params.vocab) {
        return;
    }
    // A row of wte counts as a key of the first block that no position has come before.
    var key = (index - keys) * BLOCK;
    var own_block = 0u;
    if (index < keys) {
        key = sorted[index];
        own_block = index / BLOCK;
        if (key == PAD) {
            return;
        }
    }
    let token = key / BLOCK;
    var rank = count_below(key, own_block);
    for (var block = 0u; block < own_block; block++) {
        rank += count_below((token + 1u) * BLOCK, block); // equal tokens of earlier blocks come first
    }
    for (var block = own_block + 1u; block < params.blocks; block++) {
        rank += count_below(token * BLOCK, block);
    }
    if (index < keys) {
        order[rank] = own_block * BLOCK + key % BLOCK;
    } else {
        starts[index - keys] = rank;
    }
}
