// Embedding, backward, 1 of 3: sorts every block of 1024 tokens by (token, position), so that embedding_rank.wgsl can find
// all positions of a token in their order. No float is added in an order that chance decides.
//
// A key is token * 1024 + position in the block: keys are unique, and their order is the wanted one. A block that the tokens
// do not fill ends in PAD, which is above every key. A token that is no row of wte counts as the last one, as forward.
//
// Header: none.
// Workgroup: 256 threads sort one block (a bitonic network). Grid: ceil(count / 1024), folded into (x, y).
// Workgroup memory: 4096 bytes.
//
// Bindings: 0 tokens (count) i32 in 0..vocab; 1 sorted keys (blocks * 1024) u32, written; 2 params.

struct Params {
    count: u32,
    vocab: u32, // < 2^22 - 1
}

@group(0) @binding(0) var<storage, read_write> tokens: array<u32>;
@group(0) @binding(1) var<storage, read_write> sorted: array<u32>;
@group(0) @binding(2) var<uniform> params: Params;

const THREADS: u32 = 256u;
const BLOCK: u32 = 1024u;
const PAD: u32 = 0xffffffffu;

var<workgroup> keys: array<u32, BLOCK>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let start = (workgroup.y * grid.x + workgroup.x) * BLOCK;
    for (var local = thread; local < BLOCK; local += THREADS) {
        var key = PAD;
        if (start + local < params.count) {
            key = min(tokens[start + local], params.vocab - 1u) * BLOCK + local;
        }
        keys[local] = key;
    }
    for (var run = 2u; run <= BLOCK; run *= 2u) {
        for (var distance = run / 2u; distance > 0u; distance /= 2u) {
            workgroupBarrier();
            for (var pair = thread; pair < BLOCK / 2u; pair += THREADS) {
                let low = 2u * pair - pair % distance;
                let high = low + distance;
                let ascending = (low & run) == 0u;
                let a = keys[low];
                let b = keys[high];
                if ((a > b) == ascending) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
        }
    }
    workgroupBarrier();
    if (start >= (params.count + BLOCK - 1u) / BLOCK * BLOCK) {
        return; // a folded grid can be a few workgroups too large
    }
    for (var local = thread; local < BLOCK; local += THREADS) {
        sorted[start + local] = keys[local];
    }
}
