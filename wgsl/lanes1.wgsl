// What a thread handles at a time in rows that are no multiple of four columns: one column. See lanes4.wgsl.
//
// Header: elem and out_elem (f32 or f16, the storage types of activations, given and made), WIDTH (1).

alias lanes = f32;
alias stored = elem;
alias made = out_elem;
alias lane_words = u32;

fn total(v: lanes) -> f32 {
    return v;
}

fn own_words(block: vec4<u32>, first_column: u32) -> lane_words {
    return block[first_column % 4u];
}
