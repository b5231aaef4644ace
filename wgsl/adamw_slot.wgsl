// One parameter of adamw.wgsl: p, g, m and v (count lanes) f32; p, m and v are rewritten.

@group(0) @binding(4u * SLOT_0) var<storage, read_write> p_0: array<lanes>;
@group(0) @binding(4u * SLOT_0 + 1u) var<storage, read_write> g_0: array<lanes>;
@group(0) @binding(4u * SLOT_0 + 2u) var<storage, read_write> m_0: array<lanes>;
@group(0) @binding(4u * SLOT_0 + 3u) var<storage, read_write> v_0: array<lanes>;

fn visit_0(start: u32, end: u32) {
    for (var i = start; i < end; i += THREADS) {
        let after = updated(State(p_0[i], m_0[i], v_0[i]), g_0[i], params.slots[SLOT_0].factor);
        p_0[i] = after.p;
        m_0[i] = after.m;
        v_0[i] = after.v;
    }
}
