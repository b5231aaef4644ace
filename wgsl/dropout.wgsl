// y = x * mask, where mask is 0 or keep_scale. One invocation handles four neighbouring columns of one row: the four words
// of one Philox block, counter (column / 4, row, step, site) and key (seed_lo, seed_hi). Prepend philox.wgsl.
//
// Constants from the header: none.
// Bindings: x (rows, columns), y (rows, columns), params.

struct Params {
  rows: u32,
  columns: u32,
  seed_lo: u32,
  seed_hi: u32,
  step: u32,
  site: u32,
  drop_threshold: u32,
  keep_scale: f32,
}

@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@group(0) @binding(2) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>) {
  let groups_per_row = (params.columns + 3u) / 4u;
  let group = id.y * grid.x * 256u + id.x;
  if (group >= params.rows * groups_per_row) {
    return;
  }
  let row = group / groups_per_row;
  let block = group % groups_per_row;
  let words = philox4x32(
    vec4<u32>(block, row, params.step, params.site),
    vec2<u32>(params.seed_lo, params.seed_hi),
  );
  for (var lane = 0u; lane < min(4u, params.columns - block * 4u); lane++) {
    let index = row * params.columns + block * 4u + lane;
    y[index] = select(0.0, x[index] * params.keep_scale, words[lane] >= params.drop_threshold);
  }
}
