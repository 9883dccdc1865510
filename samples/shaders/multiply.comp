// One element of a product of matrices: rows of the left one times columns of the right one.
#version 450

layout(local_size_x = 8, local_size_y = 8) in;

layout(std430, set = 0, binding = 0) readonly buffer Left { float left[]; };
layout(std430, set = 0, binding = 1) readonly buffer Right { float right[]; };
layout(std430, set = 0, binding = 2) writeonly buffer Product { float product[]; };

layout(push_constant) uniform Sizes {
    uint rows;
    uint inner;
    uint columns;
};

void main() {
    uint column = gl_GlobalInvocationID.x;
    uint row = gl_GlobalInvocationID.y;
    if (row >= rows || column >= columns) {
        return;
    }
    float sum = 0.0;
    for (uint at = 0; at < inner; at++) {
        sum += left[row * inner + at] * right[at * columns + column];
    }
    product[row * columns + column] = sum;
}
