// Copies 32-bit words from one buffer to another.
//
// Compiled by Debian's glslang-tools, in this folder:
//   glslangValidator --target-env vulkan1.1 -o copy.spv copy.comp
#version 450

layout(local_size_x = 256) in;

layout(std430, set = 0, binding = 0) readonly buffer From { uint from[]; };
layout(std430, set = 0, binding = 1) writeonly buffer To { uint to[]; };

layout(push_constant) uniform Part {
    uint from_word; // where the part begins in the bound words
    uint to_word;
    uint word_count; // how long it is
};

// Also in copy_engine.rs, which counts the groups.
const uint WORDS_PER_GROUP = 256 * 64;

void main() {
    uint start = gl_WorkGroupID.x * WORDS_PER_GROUP;
    uint end = min(start + WORDS_PER_GROUP, word_count);
    for (uint i = start + gl_LocalInvocationID.x; i < end; i += 256) {
        to[to_word + i] = from[from_word + i];
    }
}
