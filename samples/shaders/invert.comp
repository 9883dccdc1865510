// Every word of a buffer, inverted in place.
#version 450

layout(local_size_x = 64) in;

layout(std430, set = 0, binding = 0) buffer Words { uint words[]; };

void main() {
    uint at = gl_GlobalInvocationID.x;
    if (at < words.length()) {
        words[at] = ~words[at];
    }
}
