// What a thread handles at a time in rows of a multiple of four columns: four neighbouring columns, one vector load. Its
// twin lanes1.wgsl has the same names for one column and serves every other shape; a kernel is written once for both.
//
// Header: elem and out_elem (f32 or f16, the storage types of activations, given and made), WIDTH (the columns of a lane: 4).

alias lanes = vec4<f32>;      // what is computed with
alias stored = vec4<elem>;    // an activation in memory
alias made = vec4<out_elem>;  // one that is made, where its type may be another
alias lane_words = vec4<u32>; // a random word a column

fn total(v: lanes) -> f32 {
    return (v.x + v.y) + (v.z + v.w);
}

// Of a Philox block, which serves four columns, the words of this thread's.
fn own_words(block: vec4<u32>, first_column: u32) -> lane_words {
    return block;
}
