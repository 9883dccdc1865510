// A position-dependent sum of 32-bit words: the sum of word[i] * (2 i + 1), modulo 2^32.
//
// Every factor is odd, hence invertible: a word that changes changes the sum, and so does a swap of
// two different words unless their difference and their distance are both rich in factors of two.
// `checksum.rs` has the same on the CPU.
//
// Compiled by Debian's glslang-tools, in this folder:
//   glslangValidator --target-env vulkan1.1 -o checksum.spv checksum.comp
#version 450

layout(local_size_x = 256) in;

layout(std430, set = 0, binding = 0) readonly buffer Words { uint words[]; };
layout(std430, set = 0, binding = 1) buffer Sum { uint sum; };

layout(push_constant) uniform Part {
    uint first_word; // where the part begins in the bound words
    uint word_count; // how long it is
    uint position;   // i of its first word
};

// Also in checksum.rs, which counts the groups.
const uint WORDS_PER_GROUP = 256 * 64;

shared uint sums[256];

void main() {
    uint lane = gl_LocalInvocationID.x;
    uint start = gl_WorkGroupID.x * WORDS_PER_GROUP;
    uint end = min(start + WORDS_PER_GROUP, word_count);

    uint mine = 0;
    for (uint i = start + lane; i < end; i += 256) {
        mine += words[first_word + i] * (2 * (position + i) + 1);
    }
    sums[lane] = mine;
    barrier();

    for (uint half_lanes = 128; half_lanes > 0; half_lanes /= 2) {
        if (lane < half_lanes) {
            sums[lane] += sums[lane + half_lanes];
        }
        barrier();
    }
    if (lane == 0) {
        atomicAdd(sum, sums[0]);
    }
}
